"""formats.py: the readers of every format, on small files and on real ones, and what broken files do."""
import csv
import gzip
import hashlib
import io
import json
import sys
from collections import Counter

import pytest
from conftest import assert_one_line, response, write

import common
import data
import formats
from common import UserError


# ----------------------------------------------------------------------------------------------------------------
# Small files


DIALOGUE = "\n\nHuman: hi\n\nAssistant: yes?\n\nHuman: why?\n\nAssistant:"


def test_hh_rlhf_is_split_at_the_last_turn_and_knows_its_objective(tmp_path):
    pair = {"chosen": DIALOGUE + " Because. ", "rejected": DIALOGUE + " No."}
    answers = [response("Because.", harmless=1), response("No.", harmless=0)]
    expected = [{"prompt": DIALOGUE, "responses": answers}]
    assert list(formats.read_rated(write(tmp_path / "harmless-base" / "test.jsonl", pair))) == expected
    assert list(formats.read_rated(write(tmp_path / "harmless-base.test.jsonl", pair))) == expected
    path = write(tmp_path / "helpful-online" / "x.jsonl", pair)
    assert next(formats.read_rated(path))["responses"][0]["scores"] == {"helpful": 1}
    assert next(formats.read_rated(path, objective="honest"))["responses"][0]["scores"] == {"honest": 1}
    with pytest.raises(UserError, match="--objective"):
        next(formats.read_rated(write(tmp_path / "helpfulness.jsonl", pair)))


def test_hh_rlhf_pairs_with_different_dialogues_are_skipped_and_counted(tmp_path):
    other = DIALOGUE.replace("why", "how")
    path = write(tmp_path / "x.jsonl", {"chosen": DIALOGUE + " a", "rejected": other + " b"},
                 {"chosen": "no turn", "rejected": "no turn"},
                 {"chosen": DIALOGUE + " a", "rejected": DIALOGUE + " b"})
    skipped = Counter()
    assert len(list(formats.read_rated(path, "helpful", skipped=skipped))) == 1
    assert list(skipped.values()) == [2]


def test_ultrafeedback_leaves_out_only_the_ratings_that_are_missing(tmp_path):
    def completion(text, *ratings):
        names = ("instruction_following", "honesty", "truthfulness", "helpfulness")
        return {"model": "m", "response": text, "overall_score": 7.5, "annotations": {
            name: {"Rating": rating, "Rationale": "because"} for name, rating in zip(names, ratings)}}
    row = {"instruction": "say hi", "models": ["m"], "source": "s", "completions": [
        completion("hi", "4", "N/A", "3", "5"), completion("hello", "5", "5", "5", "1"),
        completion("ho", "1", "1", "1", "1")]}
    read = list(formats.read_rated(write(tmp_path / "uf.jsonl", row)))
    assert read == [{"prompt": "say hi", "golden": "hello", "responses": [
        response("hi", instruction_following=4, truthful=3, helpful=5),
        response("hello", instruction_following=5, honest=5, truthful=5, helpful=1),
        response("ho", instruction_following=1, honest=1, truthful=1, helpful=1)]}]
    assert all(name in data.OBJECTIVES for name in read[0]["responses"][1]["scores"])


def test_trl_pairs_as_texts_and_as_messages(tmp_path):
    user, yes, no = ({"role": role, "content": text} for role, text in
                     (("user", "why?"), ("assistant", "yes\n\nAssistant: x"), ("assistant", "no")))
    rows = [{"prompt": "why?", "chosen": "yes\n\nAssistant: x", "rejected": "no"},
            {"prompt": [user], "chosen": [yes], "rejected": [no]},
            {"prompt": "why?", "chosen": [user, yes], "rejected": [user, no]}]
    read = list(formats.read_rated(write(tmp_path / "p.jsonl", *rows), objective="honest"))
    assert [row["prompt"] for row in read] == ["why?", "\n\nHuman: why?\n\nAssistant:", "why?"]
    answers = [response("yes\n\nAssistant: x", honest=1), response("no", honest=0)]
    assert all(row["responses"] == answers for row in read)
    whole = write(tmp_path / "w.jsonl", {"chosen": [user, no, user, no],
                                         "rejected": [user, no, user, user, no]})
    assert not list(formats.read_rated(whole, objective="honest"))  # two different dialogues
    whole = write(tmp_path / "w.jsonl", {"chosen": [user, yes, user, no], "rejected": [user, yes, user, no]})
    assert next(formats.read_rated(whole, objective="honest"))["responses"][0]["text"] == "no"


@pytest.mark.parametrize("messages", [
    [], ["hi"], [{"role": "bot", "content": "x"}], [{"role": "user"}], 5, None])
def test_wrong_messages_are_refused(tmp_path, messages):
    path = write(tmp_path / "p.jsonl", {"prompt": messages, "chosen": "a", "rejected": "b"})
    with pytest.raises(UserError, match="p.jsonl:1: '(prompt|role|content)' should"):
        list(formats.read_rated(path, objective="honest"))


def test_rated_rows_keep_golden_and_objectives_and_drop_missing_scores(tmp_path):
    row = {"prompt": "q", "golden": "g", "objectives": ["helpful"], "other": 1,
           "responses": [{"text": "x", "scores": {"a": 1, "b": None, "c": float("nan")}}, {"text": "y"}]}
    assert list(formats.read_rated(write(tmp_path / "r.jsonl", row))) == [
        {"prompt": "q", "golden": "g", "objectives": ["helpful"],
         "responses": [response("x", a=1), response("y")]}]


def test_files_without_scores(tmp_path):
    outputs = tmp_path / "model_outputs.json"
    output = {"instruction": "q", "output": "a", "generator": "m", "dataset": "d"}
    outputs.write_text(json.dumps([output] * 2, indent=1))
    assert list(formats.read_rated(outputs)) == [{"prompt": "q", "responses": [response("a")]}] * 2
    prompts = write(tmp_path / "prompts.jsonl", {"prompt": "q"})
    assert list(formats.read_rated(prompts)) == [{"prompt": "q", "responses": []}]


def write_csv(path, rows, escape):
    """As pandas' to_csv does with escapechar="\\" (both quotes and backslashes are doubled) or without."""
    file = io.StringIO(newline="")
    writer = csv.writer(file, lineterminator="\n")
    writer.writerows([[cell.replace("\\", "\\\\") for cell in row] if escape else row for row in rows])
    path.write_text(file.getvalue(), encoding="utf-8", newline="")
    return path


@pytest.mark.parametrize("escape", [True, False])
@pytest.mark.parametrize("last", [
    "plain", "ends in two \\\\", 'x \\\\"quoted\\\\"', "é\r\nline\rend", "a" * 200_000])
def test_csv_cells_come_back_whoever_wrote_them(tmp_path, escape, last):
    cells = [["a\\_b", 'say "hi", \\(x\\)', last], [last, "multi\n\nline\\\\", "\\n"], ["", "", ""]]
    path = write_csv(tmp_path / "o.csv", [["query", "goldens", "generated_text"], *cells], escape)
    assert list(formats.read_rated(path)) == [
        {"prompt": query, "golden": golden, "responses": [response(text)]} for query, golden, text in cells]


def test_csv_without_queries_is_joined_to_them_row_by_row(tmp_path):
    rows = [["goldens", "generated_text"], ["g1", "t1"], ["g2", "t2"]]
    answers = write_csv(tmp_path / "m.DR.csv", rows, True)
    queries = [["query", "other"], ["q1", "-"], ["q2", "-"]]
    write_csv(tmp_path / "queries.SWMH.csv", [["query"], ["wrong"], ["wrong"]], True)
    write_csv(tmp_path / "queries.csv", [["query"], ["wrong"], ["wrong"]], True)
    given = write_csv(tmp_path / "given.csv", queries[:2], True)
    write_csv(tmp_path / "queries.DR.csv", queries, True)
    expected = [{"prompt": f"q{n}", "golden": f"g{n}", "responses": [response(f"t{n}")]} for n in (1, 2)]
    assert list(formats.read_rated(answers)) == expected
    with pytest.raises(UserError, match="m.DR.csv: has 2 rows, but .*given.csv has 1"):
        next(formats.read_rated(answers, queries=given))
    with pytest.raises(UserError, match="--queries"):
        next(formats.read_rated(write_csv(tmp_path / "sub.txt", [["generated_text"], ["t"]], True)))


def test_gzip_byte_order_marks_blank_lines_and_half_characters_are_read(tmp_path):
    text = '\ufeff\n{"prompt": "é\\ud83d"}\n\n{"prompt": "\\ud83d\\ude00"}\r\n'
    (tmp_path / "named-as-you-like").write_bytes(gzip.compress(text.encode()))
    rows = list(formats.read_rated(tmp_path / "named-as-you-like"))
    assert [row["prompt"] for row in rows] == ["é\ufffd", "\U0001f600"]


def test_pairs_texts_and_completions(tmp_path):
    message = [{"role": "user", "content": "p"}]
    pairs = write(tmp_path / "p.jsonl",
                  {"prompt": "p", "completion": "c", "relation": "equal", "context": [0, 1]},
                  {"prompt": message, "completion": [{"role": "assistant", "content": "c"}]})
    assert list(formats.read_pairs(pairs)) == [
        {"prompt": "p", "completion": "c", "relation": "equal", "context": [0, 1]},
        {"prompt": "\n\nHuman: p\n\nAssistant:", "completion": "c"}]
    assert list(formats.read_completions(pairs)) == list(formats.read_pairs(pairs))
    rated = write(tmp_path / "r.jsonl", {"prompt": "q", "responses": [
        response("x", a=1, b=1), response("y", a=0, b=3), response("z")]},
        {"prompt": "p", "responses": [response("n")]})
    assert list(formats.read_completions(rated)) == [{"prompt": "q", "completion": "y"}]
    texts = write(tmp_path / "t.jsonl", {"text": "a\n\nb"}, {"text": "c"})
    assert list(formats.read_texts(texts)) == ["a\n\nb", "c"]
    (tmp_path / "t.txt").write_text("\none\ntwo\n\n \nthree")
    assert list(formats.read_texts(tmp_path / "t.txt")) == ["one\ntwo", "three"]


@pytest.mark.parametrize("row, message", [
    ({"chosen": "a", "rejected": "b"}, "reformulate"), ({"prompt": "p", "completion": 1}, "'completion'"),
    ({"prompt": "p", "completion": "c", "context": [0, 2]}, "'context'"),
    ({"prompt": "p", "completion": "c", "answer": [0.0, 1]}, "'answer'")])
def test_read_pairs_refuses(tmp_path, row, message):
    path = write(tmp_path / "p.jsonl", {"prompt": "p", "completion": "c"}, row)
    with pytest.raises(UserError, match=f"p.jsonl:2: .*{message}"):
        list(formats.read_pairs(path))


def test_what_align_writes_is_read_from_json_lines_and_csv(tmp_path):
    row = {"prompt": "p", "original": "o", "aligned": "a", "objectives": ["x: be x", "y: be y"], "golden": "g"}
    path = write(tmp_path / "a.jsonl", row, row, row)
    assert formats.read_aligned(path) == [row] * 3 and formats.read_aligned(path, limit=2) == [row] * 2
    cells = [*row.values()]
    cells[3] = " | ".join(row["objectives"])
    path = write_csv(tmp_path / "a.csv", [[*row], cells, [*cells[:4], ""]], True)
    assert formats.read_aligned(path) == [row, {**row, "golden": None}]
    path = write(tmp_path / "b.jsonl", {**row, "golden": None}, {**row, "golden": ""})
    assert [row["golden"] for row in formats.read_aligned(path)] == [None, ""]
    assert data.row_objectives(row) == [data.Objective("x", "be x"), data.Objective("y", "be y")]


@pytest.mark.parametrize("change, said", [
    ({"original": None}, "no original; .*align.py first"), ({"objectives": []}, "objectives"),
    ({"objectives": ""}, "objectives"), ({"objectives": {"x": "y"}}, "objectives"),
    ({"aligned": 3}, "a text should be"), ({"golden": 3}, "a text should be"), ({"golden": 0}, "a text should be"),
    ({"golden": False}, "a text should be"), ({"golden": []}, "a text should be"),
    ({"golden": 0, "objectives": "x: be x"}, "a text should be"), ({"objectives": ["x", 3]}, "a text should be")])
def test_read_aligned_refuses(tmp_path, change, said):
    row = {"prompt": "p", "original": "o", "aligned": "a", "objectives": ["x: be x"]}
    path = write(tmp_path / "a.jsonl", row, {**row, **change})
    with pytest.raises(UserError, match=f"a.jsonl:2: .*{said}"):
        formats.read_aligned(path)


# ----------------------------------------------------------------------------------------------------------------
# Preferences


def test_preferences_are_read_from_labels_with_their_principle(tmp_path):
    rows = [formats.preference("q", "x", "y", "helpfulness", 0.7), formats.preference("q", "x", "y", "detail", 0.2)]
    path = tmp_path / "labels.jsonl"
    common.write_jsonl(path, rows)
    assert list(formats.read_preferences(path)) == rows
    assert list(formats.read_preferences(path, "detail")) == rows[1:]


def test_rated_responses_become_preferences_by_their_scores(tmp_path):
    path = tmp_path / "rated.jsonl"
    responses = [{"text": text, "scores": {"helpful": score}} for text, score in (("a", 1), ("b", 3), ("c", 1))]
    common.write_jsonl(path, [{"prompt": "q", "responses": responses}])
    found = [(row["response_a"], row["response_b"], row["p_a"]) for row in formats.read_preferences(path, "helpful")]
    assert found == [("a", "b", 0.0), ("a", "c", 0.5), ("b", "c", 1.0)]


def test_chosen_and_rejected_are_a_preference(tmp_path):
    path = tmp_path / "pairs.jsonl"
    common.write_jsonl(path, [{"prompt": "q", "chosen": "good", "rejected": "bad"}])
    assert list(formats.read_preferences(path)) == [formats.preference("q", "good", "bad", "overall", 1.0)]


def test_preferences_on_several_scores_come_in_the_order_of_the_file(tmp_path):
    """Not in that of a set, which differs from run to run."""
    names = [f"score {number}" for number in range(20)]
    rows = [{"text": text, "scores": dict.fromkeys(names, value)} for text, value in (("a", 1), ("b", 0))]
    path = write(tmp_path / "rated.jsonl", {"prompt": "q", "responses": rows})
    assert [row["principle"] for row in formats.read_preferences(path)] == names


@pytest.mark.parametrize("row, said", [
    ({"prompt": "q", "response_a": "x", "response_b": "y", "p_a": 1.5}, "p_a"),
    ({"prompt": "q", "response_a": "x", "response_b": "y", "p_a": "1"}, "p_a"),
    ({"prompt": "q", "response_a": "x", "response_b": 3, "p_a": 1}, "response_b"),
    ({"prompt": "q", "response_a": "x", "response_b": "y", "p_a": 1, "principle": ["detail"]}, "principle"),
    ({"prompt": "q", "response_a": "x", "response_b": "y", "p_a": 1, "principle": 3}, "principle"),
    ({"prompt": "q", "response 1": "x", "response 2": "y", "label": 3}, "label"),
    ({"prompt": "q", "reference": "x", "responses": {"m": {"text": "y"}}}, "gpt4_preference"),
    ({"prompt": "q", "reference": "x", "responses": ["y"]}, "responses"),
    ({"prompt": "q", "reference": "x", "responses": {"m": {"gpt4_preference_over_reference": 1}}}, "response_a"),
])
def test_broken_preferences_are_named_with_their_line(tmp_path, row, said):
    path = tmp_path / "labels.jsonl"
    good = {key: (0 if key == "label" else 0.5 if key == "p_a" else {} if key == "responses" else "t") for key in row}
    common.write_jsonl(path, [good, row])
    with pytest.raises(UserError, match=rf"labels\.jsonl:2: .*{said}"):
        list(formats.read_preferences(path))


@pytest.mark.parametrize("good, missing", [
    ({"prompt": "q", "response_a": "x", "response_b": "y", "p_a": 1}, "p_a"),
    ({"prompt": "q", "response 1": "x", "response 2": "y", "label": 2.0}, "label"),
    ({"prompt": "q", "reference": "x", "responses": {"m": {"text": "y", "gpt4_preference_over_reference": 1}}},
     "prompt")])
def test_a_later_row_without_a_key_is_named_too(tmp_path, good, missing):
    path = write(tmp_path / "labels.jsonl", good, {key: value for key, value in good.items() if key != missing})
    rows = formats.read_preferences(path)
    assert next(rows)["prompt"] == "q"
    with pytest.raises(UserError, match=rf"labels\.jsonl:2: .*{missing}"):
        next(rows)


# ----------------------------------------------------------------------------------------------------------------
# Real files


def test_real_hh_rlhf(shared):
    skipped = Counter()
    rows = list(formats.read_rated(shared / "data/hh-rlhf/harmless-base.test.jsonl.gz", skipped=skipped))
    assert len(rows) == 2307 and sum(skipped.values()) == 5
    with gzip.open(shared / "data/hh-rlhf/harmless-base.test.jsonl.gz", "rt", encoding="utf-8") as file:
        whole = {json.loads(line)["chosen"].rstrip() for line in file}
    for row in rows:
        assert row["prompt"].startswith("\n\nHuman:") and row["prompt"].endswith("\n\nAssistant:")
        text = row["responses"][0]["text"]
        assert any(row["prompt"] + space + text in whole for space in (" ", "  ", "", "   ")) or not text
    examples = list(data.reformulate(rows, data.OBJECTIVES))
    assert len(examples) == 2303  # four chosen ones are empty
    assert {row["relation"] for row in examples} == {"better"}


@pytest.mark.parametrize("name, rows, digest", [  # of the cells as pandas 2 reads them, escapechar as noted
    ("hh-rlhf/Claude-3.csv", 1200, "7b3d95f71053cabd"),
    ("hh-rlhf/gpt-3.5-turbo.csv", 1200, "70d1515f79261da2"),
    ("ultrafeedback/Vicuna-7B.csv", 1200, "4ae56af2b7e28009"),
    ("ultrafeedback/gpt-3.5-turbo.csv", 1200, "33727f158937cfdc"),  # None
    ("imhi/queries.DR.csv", 405, "bc0dcfa2cfefe1c5"),  # None
    ("imhi/Mentallama-7B.DR.csv", 405, "d07621142bc5e83e"),
    ("imhi/vicuna_7B.DR.csv", 405, "de24a050619a471d")])
def test_real_csv_cells_are_those_that_pandas_reads(shared, name, rows, digest):
    records = [record for _, record in formats.records(shared / "data/outputs" / name)]
    cells = "\x1f".join(record[column] for column in records[0] for record in records)
    assert len(records) == rows and hashlib.sha256(cells.encode()).hexdigest()[:16] == digest


def test_real_outputs_written_with_and_without_escapes_have_the_same_queries(shared):
    escaped, plain = (list(formats.read_rated(shared / "data/outputs/ultrafeedback" / name))
                      for name in ("Vicuna-7B.csv", "gpt-3.5-turbo.csv"))
    assert ([(row["prompt"], row["golden"]) for row in escaped]
            == [(row["prompt"], row["golden"]) for row in plain])


def test_real_imhi_outputs_find_their_queries(shared):
    rows = list(formats.read_rated(shared / "data/outputs/imhi/vicuna_7B.DR.csv"))
    assert len(rows) == 405 and all(row["prompt"].startswith("Consider this post") for row in rows)
    # The same post is meant: the golden answer of the first row speaks of the site that its query names.
    assert "Ancestry.com" in rows[0]["prompt"] and "Ancestry.com" in rows[0]["golden"]


def test_real_preferences(shared):
    """AlpacaEval's 12 responses to 805 prompts; Auto-J's published counts of labels."""
    rows = list(formats.read_preferences(shared / "data/alpaca_eval/rated.jsonl.gz"))
    assert len({row["prompt"] for row in rows}) == 805 and len(rows) == 805 * 12 - 4  # four are missing
    assert all(0 <= row["p_a"] <= 1 for row in rows)
    rows = list(formats.read_preferences(shared / "data/auto-j/human-pairwise.jsonl.gz"))
    assert len(rows) == 1392 and {row["p_a"] for row in rows} == {0.0, 0.5, 1.0}


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
