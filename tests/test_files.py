"""files.py: JSON Lines, JSON, CSV, Parquet and plain text, whoever wrote them, and what broken files do."""
import gzip
import hashlib
import json
import sys

import pytest
from conftest import assert_one_line, response, write_csv

import align
import common
import data
import files
import formats
from common import UserError
from test_formats import LABEL, rated


@pytest.mark.parametrize("escape", [True, False])
@pytest.mark.parametrize("last", [
    "plain", "ends in two \\\\", 'x \\\\"quoted\\\\"', "é\r\nline\rend", "a" * 200_000])
def test_csv_cells_come_back_whoever_wrote_them(tmp_path, escape, last):
    cells = [["a\\_b", 'say "hi", \\(x\\)', last], [last, "multi\n\nline\\\\", "\\n"], ["", "", ""]]
    path = write_csv(tmp_path / "o.csv", [["query", "goldens", "generated_text"], *cells], escape)
    assert list(formats.read_rated(path)) == [
        {"prompt": query, "golden": golden, "responses": [response(text)]} for query, golden, text in cells]


def test_csv_with_single_and_doubled_backslashes_tells_how_it_is_read(tmp_path, capsys):
    rows = [["query", "generated_text"], ["a", r"x \\\\ y"], ["b", r"\(z\)"]]
    path = write_csv(tmp_path / "o.csv", rows, False)
    assert [row["responses"][0]["text"] for row in formats.read_rated(path)] == [rows[1][1], rows[2][1]]
    said = capsys.readouterr().err
    assert said.startswith("note: ") and said.count("\n") == 1
    assert "o.csv: backslashes stay as they are, as line 3 has a single one; two (line 2) stay two" in said
    for unmixed in (rows[:2], [rows[0], rows[2]]):
        list(formats.read_rated(write_csv(path, unmixed, False)))
    list(formats.read_rated(write_csv(path, rows, True)))
    assert not capsys.readouterr().err


def test_what_align_writes_has_its_backslashes_as_they_are(tmp_path):
    """No line of it has a single one, so nothing else tells it from a file that doubles them."""
    row = {"prompt": "a \\\\ b", "original": "\\\\", "aligned": 'c\\\\"d"', "objectives": ["o: p"], "golden": "g"}
    align.write_rows(tmp_path / "o.csv", [row])
    assert formats.read_aligned(tmp_path / "o.csv") == [row]


@pytest.mark.parametrize("text, said", [
    ("\nprompt,aligned,prompt\na,b,c\n", ":2: the header \\(prompt, aligned, prompt\\) has a column twice"),
    (",,\na,b,c\n", ":1: .*column twice"), ("prompt,original,aligned,objectives\n", "no data in it"),
    ("\nresponse_a,response_b,p_a,prompt\n\n", "no data in it")])
def test_csv_headers_that_say_nothing_are_refused(tmp_path, text, said):
    path = tmp_path / "h.csv"
    path.write_text(text)
    for name in ("rated", "aligned", "preferences", "texts", "pairs", "completions"):
        with pytest.raises(UserError, match=f"h.csv.*{said}"):
            list(getattr(formats, f"read_{name}")(path))


def test_gzip_byte_order_marks_blank_lines_and_half_characters_are_read(tmp_path):
    text = '\ufeff\n{"prompt": "é\\ud83d"}\n\n{"prompt": "\\ud83d\\ude00"}\r\n'
    (tmp_path / "named-as-you-like").write_bytes(gzip.compress(text.encode()))
    rows = list(formats.read_rated(tmp_path / "named-as-you-like"))
    assert [row["prompt"] for row in rows] == ["é\ufffd", "\U0001f600"]


@pytest.mark.parametrize("name, content, expected", [  # expected: texts, or what the refusal says
    ("t.jsonl", '\n\n{"text": "a\\n\\nb"}\n{"text": "c"}\n', ["a\n\nb", "c"]),
    ("t", '\n \n{"text": "a"}\n\n{"text": "c"}\n', ["a", "c"]), ("t", '[\n{"text": "a"}]', ["a"]),
    ("t", '[ {"text": "a"}]', ["a"]), ("t.csv", "id,text\n1,a\n", ["a"]),
    ("t.txt", '{"text": "a"}\n\n[b]', ['{"text": "a"}', "[b]"]), ("t.md", "{x}\n\nb", ["{x}", "b"]),
    ("t", "[Enter a ghost]\nBoo!\n\n{sic}", ["[Enter a ghost]\nBoo!", "{sic}"]),
    ("t", '{"text": "a"', "t:1: invalid JSON"), ("t", 'a"}\n{"text": "b"}\n', "t:2: 'text' should be a text"),
    ("t.json", "a story\n\nb", "t.json:3: 'text' should be"),
    ("t.jsonl", '{"text": "a"}\n{"prompt": "c"}\n', "t.jsonl:2: 'text' should be")])
@pytest.mark.parametrize("gzipped", [False, True])
def test_texts_are_told_by_name_or_else_by_how_they_begin(tmp_path, name, content, expected, gzipped):
    path = tmp_path / (name + ".gz" * gzipped)
    path.write_bytes(gzip.compress(content.encode()) if gzipped else content.encode())
    if isinstance(expected, list):
        assert list(formats.read_texts(path)) == expected
        return
    with pytest.raises(UserError, match=expected.replace(":", "(.gz)?:", 1)):
        list(formats.read_texts(path))


def parquet(path, rows):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    return path


def test_parquet_rows_are_those_of_json_lines(tmp_path):
    """Where a key or a score is missing, Parquet has a null."""
    first = rated("p", response("x", fair=2), response("y", tone=1.5), golden="g")
    path = parquet(tmp_path / "r.parquet", [first, rated("q", {"text": "z", "scores": None})])
    assert list(formats.read_rated(path)) == [first, rated("q", response("z"))]
    pairs = [{"prompt": "p", "completion": "c", "relation": "equal", "context": [0, 1]},
             {"prompt": "q", "completion": "d"}]
    read = list(formats.read_pairs(parquet(tmp_path / "p", pairs)))
    assert read == pairs and all(data.is_held_out(row, 1.0) for row in read)
    path = parquet(tmp_path / "t.txt", [{"text": "a\n\nb"}, {"text": "c"}])
    assert list(formats.read_texts(path)) == ["a\n\nb", "c"]
    wrong = parquet(tmp_path / "w", [LABEL, LABEL, LABEL, {**LABEL, "p_a": 3.0}])
    with pytest.raises(UserError, match="w: row 4: 'p_a' is 3.0"):
        list(formats.read_preferences(wrong))
    (tmp_path / "b").write_bytes(wrong.read_bytes()[:-9])
    with pytest.raises(UserError, match="b: damaged after row 0 .*; get it again") as refused:
        list(formats.read_rated(tmp_path / "b"))
    assert len(str(refused.value).splitlines()) == 1 and len(str(refused.value)) < 400


def test_parquet_without_pyarrow_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    path = tmp_path / "r.jsonl"
    path.write_bytes(b"PAR1" + bytes(20))
    for read in (formats.read_rated, formats.read_texts):
        with pytest.raises(UserError, match="r.jsonl: is a Parquet file; install pyarrow to read it, or convert it"):
            list(read(path))


@pytest.mark.parametrize("name, rows, digest", [  # of the cells as pandas 2 reads them, escapechar as noted
    ("hh-rlhf/Claude-3.csv", 1200, "7b3d95f71053cabd"),
    ("hh-rlhf/gpt-3.5-turbo.csv", 1200, "70d1515f79261da2"),
    ("ultrafeedback/Vicuna-7B.csv", 1200, "4ae56af2b7e28009"),
    ("ultrafeedback/gpt-3.5-turbo.csv", 1200, "33727f158937cfdc"),  # None
    ("imhi/queries.DR.csv", 405, "bc0dcfa2cfefe1c5"),  # None
    ("imhi/Mentallama-7B.DR.csv", 405, "d07621142bc5e83e"),
    ("imhi/vicuna_7B.DR.csv", 405, "de24a050619a471d")])
def test_real_csv_cells_are_those_that_pandas_reads(shared, name, rows, digest):
    records = [record for _, record in files.records(shared / "data/outputs" / name)]
    cells = "\x1f".join(record[column] for column in records[0] for record in records)
    assert len(records) == rows and hashlib.sha256(cells.encode()).hexdigest()[:16] == digest


def test_real_outputs_written_with_and_without_escapes_have_the_same_queries(shared):
    escaped, plain = (list(formats.read_rated(shared / "data/outputs/ultrafeedback" / name))
                      for name in ("Vicuna-7B.csv", "gpt-3.5-turbo.csv"))
    assert ([(row["prompt"], row["golden"]) for row in escaped]
            == [(row["prompt"], row["golden"]) for row in plain])


# ----------------------------------------------------------------------------------------------------------------
# Broken files


RATED = {"prompt": "why?", "responses": [response("yes", helpful=2, honest=1),
                                         response("no", helpful=1, honest=0)]}


def two_lines(second):
    return json.dumps(RATED).encode() + b"\n" + second + b"\n"


GOOD = json.dumps(RATED).encode() + b"\n"
BAD_FILES = {  # content of the file, what the message must say
    "empty": (b"", "empty"),
    "blank": (b"\n \n", "empty"),
    "empty list": (b"[]", "empty"),
    "truncated gzip": (gzip.compress(GOOD * 3000)[:-200], "gzip"),
    "damaged gzip": (gzip.compress(GOOD)[:10] + b"\xff" * 40, "gzip data is damaged"),
    "gzip with another checksum": (gzip.compress(GOOD)[:-8] + bytes(8), "gzip data is damaged"),
    "invalid JSON": (two_lines(b'{"prompt": "x", '), ":2: invalid JSON"),
    "deep JSON": (two_lines(b'{"a":' + b"[" * 200_000), ":2: "),
    "long number": (two_lines(b'{"a":' + b"1" * 9000 + b"}"), ":2: "),
    "no object": (two_lines(b"[1]"), ":2: expected an object"),
    "list of texts": (b'["a"]', "item 1"),
    "broken list": (b'[{"prompt": "a"},\n{]', ":2: invalid JSON"),
    "wrong columns": (b"id,question\n1,why\n", "id, question.*UltraFeedback"),
    "wrong keys": (b'{"question": 1}', "question.*MetaAligner"),
    "header only": (b"query,generated_text\n", "empty"),
    "not UTF-8": (two_lines(b'{"prompt": "\xff"}'), ":2: byte 13 .*UTF-8"),
    "not UTF-8 CSV": (b"query,generated_text\na,b\nc,\xe9\n", ":3: byte 3 .*UTF-8"),
    "short CSV row": (b'query,goldens,generated_text\na,"b\nb",c\n\n"x\ny",b\n', ":5: 2 cells"),
    "open quote": (b'query,goldens,generated_text\na,b,c\nd,e,"f\n', ":3: invalid CSV"),
    "missing key": (two_lines(b'{"prompt": "x"}'), ":2: 'responses'"),
    "no text": (two_lines(b'{"prompt": "x", "responses": [{"scores": {}}]}'), ":2: 'text'"),
    "no responses": (two_lines(b'{"prompt": "x", "responses": ["a"]}'), ":2: 'responses'"),
    "score a text": (two_lines(b'{"prompt": "x", "responses": [{"text": "a", "scores": {"helpful": "5"}}]}'),
                     ":2: the score 'helpful'"),
    "score infinite": (two_lines(b'{"prompt": "x", "responses": [{"text": "a", "scores": {"fair": 1e999}}]}'),
                       ":2: the score 'fair'"),
    "scores a list": (two_lines(b'{"prompt": "x", "responses": [{"text": "a", "scores": [5]}]}'),
                      ":2: 'scores'"),
    "unknown objective": (two_lines(b'{"prompt": "x", "responses": [{"text": "a", "scores": {"fairr": 5}}]}'),
                          ":2: .*'fairr'.*: fair;"),
    "bad rating": (b'{"instruction": "x", "completions": [{"response": "a", '
                   b'"annotations": {"honesty": {"Rating": "B"}}}]}', ":1: the rating 'B'"),
    "bad completion": (b'{"instruction": "x", "completions": [1]}', ":1: 'completions'"),
    "pairs on nothing": (b'{"prompt": "x", "chosen": "a", "rejected": "b"}', "--objective"),
    "examples": (b'{"prompt": "x", "completion": "a"}', "already"),
    "nothing scored": (b'{"instruction": "x", "output": "a"}', "no example"),
    "no queries": (b"goldens,generated_text\na,b\n", "--queries"),
    "answers beside prompts": (b'{"prompt": "x", "response": "a"}', ":1: 'response' looks like an answer"),
    "KTO on nothing": (b'{"prompt": "x", "completion": "a", "label": true}', "--objective"),
    "pairs with no label": (b'{"prompt": "x", "response_a": "a", "response_b": "b"}', ":1: 'p_a' is None"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_one_line_status_2_and_leave_the_output_alone(tmp_path, case, capsys, monkeypatch):
    content, message = BAD_FILES[case]
    path, out = tmp_path / "bad.data", tmp_path / "out.jsonl"
    path.write_bytes(content)
    out.write_text("as it was")
    monkeypatch.setattr(sys, "argv", ["data.py", "reformulate", str(path), "--out", str(out)])
    with pytest.raises(SystemExit) as stopped:
        common.cli(data.main)
    printed = capsys.readouterr()
    assert stopped.value.code == 2 and printed.out == ""
    assert_one_line(printed.err, message)
    assert out.read_text() == "as it was" and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("item, said", [
    ({"wording": ["x"]}, "has wording; an objective has"), ({"wordings": "x"}, "'wordings' is"),
    ({"wordings": [3]}, "needs a name and a description"), ({"description": 3}, "needs a name")])
def test_a_file_of_objectives_that_says_something_else_is_one_line(tmp_path, item, said):
    path = tmp_path / "objectives.json"
    path.write_text(json.dumps([{"name": "brief", "description": "be brief", **item}]))
    with pytest.raises(UserError, match=said):
        data.find_objectives([str(path)])
