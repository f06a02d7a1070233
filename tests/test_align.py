"""Using an aligner: against a straightforward reference, row by row. Policies and kills: test_align_runs.py."""
import csv
import io
import json
import operator
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import align
import checkpoint
import data
import toy
import writers
from common import write_jsonl
from conftest import refused, run, write
from model import Config, Llama, logits

ROOT = Path(__file__).parents[1]
SIZES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
             max_position_embeddings=400, bos_token_id=0, eos_token_id=1)
NEW_TOKENS = 12
BRIEF = "Brevity: The response should be short."


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with "aligner" and "policy" (untrained, so their texts are noise), answers.jsonl and prompts.jsonl."""
    folder = tmp_path_factory.mktemp("world")
    tokenizer = toy.train_tokenizer(list(toy.pretraining_texts(60, 0)), 1000)
    for seed, name in enumerate(("aligner", "policy")):
        llama = Llama(Config(vocab_size=tokenizer.get_vocab_size(), **SIZES), seed)
        with torch.no_grad():
            for parameter in llama.model.parameters():
                parameter.mul_(2)  # noise that depends on every token before it
        checkpoint.save(llama, folder / name)
        tokenizer.save(str(folder / name / "tokenizer.json"))
    rows = list(toy.rated(9, 1, responses=1))
    write_jsonl(folder / "answers.jsonl", rows)
    write_jsonl(folder / "prompts.jsonl", ({"prompt": row["prompt"]} for row in rows))
    return folder


def command(world, out, *extra, source="answers.jsonl", objectives=("harmless", BRIEF)):
    words = ["--model", world / "aligner", "--data", world / source, "--out", out, "--max-new-tokens", NEW_TOKENS,
             "--batch", 4, "--device", "cpu", *(["--objectives", *objectives] if objectives else []), *extra]
    return [str(word) for word in words]


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def continuation(folder, ids, new_tokens=NEW_TOKENS):
    """The greedy text after ids, the plain way: the whole text through the model for each new token."""
    llama = checkpoint.load(folder)
    tokenizer, new = checkpoint.load_tokenizer(folder), []
    with torch.no_grad():
        while len(new) < new_tokens:
            token = int(logits(llama, torch.tensor([ids + new]))[0, -1].argmax())
            if token == SIZES["eos_token_id"]:
                break
            new.append(token)
    return tokenizer.decode(new).strip()


def edit(world, prompt, answer, descriptions):
    """The edit as the paper has it: prompt, answer and objectives in the template, and what the aligner says next."""
    text = (f"Improve the answer on these objectives: {'; '.join(descriptions)}\n\n"
            f"Question: {prompt.strip()}\n\nAnswer: {answer}\n\nEdited answer:")
    tokenizer = checkpoint.load_tokenizer(world / "aligner")
    return continuation(world / "aligner", [0] + tokenizer.encode(text).ids)


HARMLESS = data.OBJECTIVES["harmless"].description
TOLD = [HARMLESS, "The response should be short."]


@pytest.fixture(scope="module", autouse=True)
def in_fp32():
    """What noise says next hangs on the last bits; the plain reference is in fp32, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writers, "computes_bf16", lambda device: False)
        yield


@pytest.fixture(scope="module")
def aligned(world, tmp_path_factory):
    """answers.jsonl, aligned without interruption."""
    out = tmp_path_factory.mktemp("aligned") / "aligned.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        assert run(align, patch, command(world, out)) == 0
    return out


# ----------------------------------------------------------------------------------------------------------------
# What comes out


def test_edits_are_those_of_a_plain_reference(world, aligned):
    rows, sources = read(aligned), read(world / "answers.jsonl")
    assert len(rows) == len(sources) == 9 and len({row["aligned"] for row in rows}) > 5  # noise, but not all the same
    for row, source in zip(rows, sources):
        answer = source["responses"][0]["text"]
        assert row == {"prompt": source["prompt"], "original": answer, "golden": source["golden"],
                       "aligned": edit(world, source["prompt"], answer, TOLD),
                       "objectives": [f"harmless: {HARMLESS}", BRIEF]}
    assert sorted(path.name for path in aligned.parent.iterdir()) == ["aligned.jsonl"]


def test_two_rounds_are_one_after_the_other(world, aligned, tmp_path, monkeypatch):
    assert run(align, monkeypatch, command(world, tmp_path / "twice.jsonl", "--rounds", 2)) == 0
    once, twice = read(aligned), read(tmp_path / "twice.jsonl")
    assert [row["original"] for row in twice] == [row["original"] for row in once]
    assert [row["aligned"] for row in twice] == [edit(world, row["prompt"], row["aligned"], TOLD) for row in once]


def test_csv_says_what_jsonl_says(world, aligned, tmp_path, monkeypatch):
    assert run(align, monkeypatch, command(world, tmp_path / "aligned.csv")) == 0
    with open(tmp_path / "aligned.csv", encoding="utf-8", newline="") as file:
        rows = [{**row, "objectives": row["objectives"].split(" | ")} for row in csv.DictReader(file)]
    assert rows == read(aligned)


def test_csv_survives_quotes_line_ends_and_backslashes(tmp_path):
    row = {"prompt": 'a "b", c\n\nd', "original": "\\_ \\", "aligned": "one\r\ntwo\u2028",
           "objectives": ["A: b", "C: d"]}
    align.write_rows(tmp_path / "out.csv", [row])
    with open(tmp_path / "out.csv", encoding="utf-8", newline="") as file:
        assert list(csv.DictReader(file)) == [{**row, "objectives": "A: b | C: d", "golden": ""}]


def test_objectives_reach_the_prompt_in_the_given_order(world, tmp_path, monkeypatch):
    """Known ones, ones from a file and new ones; each as its description."""
    (tmp_path / "mine.json").write_text('{"rhyme": "every line should rhyme", "salt": "mention salt"}')
    seen, encode = [], align.Writer.encode
    monkeypatch.setattr(align.Writer, "encode",
                        lambda self, text, *rest: seen.append(text) or encode(self, text, *rest))
    names = [BRIEF, str(tmp_path / "mine.json"), "Humour", "Cats: Speak of cats"]
    assert run(align, monkeypatch, command(world, tmp_path / "out.jsonl", "--limit", 2, objectives=names)) == 0
    told = ["The response should be short.", "every line should rhyme", "mention salt",
            data.OBJECTIVES["humour"].description, "Speak of cats"]
    assert len(seen) == 2 and all(f"objectives: {'; '.join(told)}\n\n" in text for text in seen)
    labels = ["Brevity", "rhyme", "salt", "humour", "Cats"]
    assert read(tmp_path / "out.jsonl")[0]["objectives"] == [f"{name}: {text}" for name, text in zip(labels, told)]
    seen.clear()
    assert run(align, monkeypatch, command(world, tmp_path / "2.jsonl", "--limit", 1, objectives=names[::-1])) == 0
    assert "objectives: Speak of cats; " in seen[0]


def test_another_template_is_used(world, tmp_path, monkeypatch):
    template = {"better": "Make it {objectives}.\n{prompt}\n{answer}\nBetter:"}
    (tmp_path / "template.json").write_text(json.dumps(template))
    words = command(world, tmp_path / "out.jsonl", "--limit", 1, "--template", tmp_path / "template.json")
    assert run(align, monkeypatch, words) == 0
    row, = read(tmp_path / "out.jsonl")
    text = f"Make it {'; '.join(TOLD)}.\n{row['prompt'].strip()}\n{row['original']}\nBetter:"
    ids = [0] + checkpoint.load_tokenizer(world / "aligner").encode(text).ids
    assert row["aligned"] == continuation(world / "aligner", ids)


def test_limit(world, aligned, tmp_path, monkeypatch):
    assert run(align, monkeypatch, command(world, tmp_path / "out.jsonl", "--limit", 3)) == 0
    assert read(tmp_path / "out.jsonl") == read(aligned)[:3]


def test_samples_depend_on_the_seed_and_not_on_the_batch(world, aligned, tmp_path, monkeypatch):
    """But for a draw that falls on the line between two tokens, within what rounding moves it: one text at most."""
    texts = {}
    for name, batch, seed in (("a", 1, 5), ("b", 4, 5), ("c", 9, 5), ("d", 4, 6)):
        words = command(world, tmp_path / name, "--temperature", 1, "--seed", seed, "--batch", batch)
        assert run(align, monkeypatch, words) == 0
        texts[name] = [row["aligned"] for row in read(tmp_path / name)]

    def same(one, other):
        return sum(map(operator.eq, texts[one], texts[other]))
    assert len(texts["a"]) == 9 and min(same("a", "b"), same("a", "c"), same("b", "c")) >= 8
    assert same("a", "d") <= 1 and texts["a"] != [row["aligned"] for row in read(aligned)]


def test_an_edit_that_does_not_fit_again_was_edited_all_the_same():
    """Round 1 makes of "short" what is too long for round 2; "long" never fits, and is left as it is."""
    class Aligner:
        def room(self, new_tokens):
            return new_tokens

        def encode(self, text, new_tokens, context):
            return [1] if "short" in text else None

        def write(self, prompts, *_, **__):
            return [(number, "an edit, grown") for number in range(len(prompts))]
    items = [{"index": i, "prompt": "q", "original": text} for i, text in enumerate(("short", "long"))]
    rows = {row["original"]: row for row in align.align(Aligner(), items, [], rounds=2)}
    assert rows["short"]["aligned"] == "an edit, grown" and not rows["short"]["left_as_is"]
    assert rows["long"]["aligned"] == "long" and rows["long"]["left_as_is"]


def test_top_k_top_p_and_min_p_reach_the_sampling(world, aligned, tmp_path, monkeypatch):
    texts = {}
    for words in (["--top-k", 0], ["--top-k", 1], ["--top-p", 1e-6], ["--top-k", 3], ["--min-p", 1]):
        out = tmp_path / "-".join(map(str, words))
        assert run(align, monkeypatch, command(world, out / "out.jsonl", "--temperature", 1, *words)) == 0
        texts[out.name] = read(out / "out.jsonl")
    assert texts["--top-k-1"] == texts["--top-p-1e-06"] == texts["--min-p-1"] == read(aligned), "only one is left"
    assert texts["--top-k-0"] != texts["--top-k-3"] != texts["--top-k-1"]


def test_several_answers_to_a_prompt_and_several_files(world, tmp_path, monkeypatch):
    write_jsonl(tmp_path / "two.jsonl", toy.rated(2, 5, responses=2))
    words = command(world, tmp_path / "out.jsonl", "--limit", 6)
    words.insert(words.index("--data") + 1, str(tmp_path / "two.jsonl"))
    assert run(align, monkeypatch, words) == 0
    expected = [r["text"] for row in read(tmp_path / "two.jsonl") + read(world / "answers.jsonl")
                for r in row["responses"]]
    assert [row["original"] for row in read(tmp_path / "out.jsonl")] == expected[:6]


def test_what_it_wrote_is_edited_again(world, aligned, tmp_path, monkeypatch):
    """The edit is the answer now, the objectives are still those of the row; from JSON Lines and from CSV."""
    once = read(aligned)
    align.write_rows(tmp_path / "once.csv", once)
    for source in (aligned, tmp_path / "once.csv"):
        words = command(world, tmp_path / "twice.jsonl", source=source, objectives=())
        assert run(align, monkeypatch, words) == 0
        assert read(tmp_path / "twice.jsonl") == [
            {**row, "original": row["aligned"], "aligned": edit(world, row["prompt"], row["aligned"], TOLD)}
            for row in once]


def test_a_rows_own_objectives_count_where_none_are_given(world, tmp_path, monkeypatch, capsys):
    humour, own = data.OBJECTIVES["humour"], ["Humour", "Rhyme:  end in a rhyme "]
    texts = [{"text": "A first answer."}, {"text": "A second."}]
    rows = [{"prompt": "a", "responses": texts, "objectives": own}, {"prompt": "b", "responses": texts[:1]}]
    source, out = write(tmp_path / "in.jsonl", *rows), tmp_path / "out.jsonl"
    default = [str(data.OBJECTIVES[name]) for name in ("harmless", "helpful")]
    assert run(align, monkeypatch, command(world, out, source=source, objectives=())) == 0
    assert "note" not in capsys.readouterr().err
    first, second, third = read(out)
    assert first["objectives"] == second["objectives"] == [str(humour), "Rhyme: end in a rhyme"]
    assert third["objectives"] == default
    assert second["aligned"] == edit(world, "a", "A second.", [humour.description, "end in a rhyme"])
    assert run(align, monkeypatch, command(world, out, source=source, objectives=[BRIEF])) == 0
    assert "note: 2 of 3 answers come with objectives of their own; --objectives is used" in capsys.readouterr().err
    assert [row["objectives"] for row in read(out)] == [[BRIEF]] * 3
    assert read(out)[1]["aligned"] == edit(world, "a", "A second.", ["The response should be short."])


@pytest.mark.parametrize("own, expected", [
    (["humor"], "unknown objective 'humor'; the nearest known: humour"), (["a: b", "a: c"], "two different"),
    ([""], "unknown objective ''"), ([":"], "needs a name and a description"), (["mine.json"], "no file"),
    ([1], "a list")])
def test_a_rows_wrong_objectives_are_said_with_their_place(world, tmp_path, monkeypatch, capsys, own, expected):
    (tmp_path / "mine.json").write_text('{"a": "b"}')
    row = {"prompt": "a", "responses": [{"text": "b"}]}
    source, out = write(tmp_path / "in.jsonl", row, {**row, "objectives": own}), tmp_path / "out.jsonl"
    refused(align, monkeypatch, capsys, command(world, out, source=source, objectives=()), "in.jsonl:2: ", expected)
    assert run(align, monkeypatch, command(world, out, "--limit", 1, source=source, objectives=())) == 0


def test_a_csv_file_is_refused_where_its_objectives_could_not_be_told_apart(world, tmp_path, monkeypatch, capsys):
    words = command(world, tmp_path / "out.csv", objectives=["a: b |", "c: d"])
    refused(align, monkeypatch, capsys, words, "give --out FILE.jsonl")
    assert not list(tmp_path.iterdir())


def test_an_edit_is_asked_for_in_one_wording(world, tmp_path, monkeypatch, capsys):
    refused(align, monkeypatch, capsys, command(world, tmp_path / "o.jsonl", objectives=["a: yes | no"]), "give one")
    rows = [{**row, "objectives": ["harmless", "a: yes | no"]} for row in read(world / "answers.jsonl")]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    words = command(world, tmp_path / "o.jsonl", objectives=[], source=tmp_path / "rows.jsonl")
    refused(align, monkeypatch, capsys, words, "rows.jsonl:1: objective 'a' has several wordings")
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_half_a_surrogate_pair_among_the_objectives(world, tmp_path, monkeypatch):
    """Which is what Python makes of a command line that is not UTF-8."""
    for out, name in (("out.jsonl", "a: \udcff"), ("out.csv", "a: \udcff"), ("same.jsonl", "a: ?")):
        assert run(align, monkeypatch, command(world, tmp_path / out, "--limit", 1, objectives=[name])) == 0
    assert read(tmp_path / "out.jsonl") == read(tmp_path / "same.jsonl")


# ----------------------------------------------------------------------------------------------------------------
# Too long


@pytest.mark.parametrize("length", [4_000, 100_000])
def test_an_answer_too_long_is_left_as_it_is(world, tmp_path, monkeypatch, capsys, length):
    answer = ("a very long answer " * length)[:length - 1] + "."
    rows = [{"prompt": "\n\nHuman: Hi\n\nAssistant:", "responses": [{"text": text}]} for text in ("Short.", answer)]
    write_jsonl(tmp_path / "in.jsonl", rows)
    for rounds in (1, 2):
        words = command(world, tmp_path / "out.jsonl", "--rounds", rounds)
        words[words.index("--data") + 1] = str(tmp_path / "in.jsonl")
        assert run(align, monkeypatch, words) == 0
        short, long = read(tmp_path / "out.jsonl")
        assert long["aligned"] == long["original"] == answer and "left_as_is" not in long
        assert short["aligned"] != short["original"]
        printed = capsys.readouterr().out
        assert "left as they were: 1 answers" in printed and "2 answers, 1 changed" in printed


def test_a_long_dialogue_loses_its_oldest_turns(world, tmp_path, monkeypatch):
    turns = "".join(f"\n\nHuman: Tell me more about {n}\n\nAssistant: It is a number." for n in range(100))
    write_jsonl(tmp_path / "in.jsonl", [{"prompt": f"{turns}\n\nHuman: And now?\n\nAssistant:",
                                         "responses": [{"text": "Now you know."}]}])
    lengths, stream = [], writers.stream
    monkeypatch.setattr(writers, "stream", lambda llama, prompts, *rest, **more:
                        lengths.extend(prompts) or stream(llama, prompts, *rest, **more))
    words = command(world, tmp_path / "out.jsonl")
    words[words.index("--data") + 1] = str(tmp_path / "in.jsonl")
    assert run(align, monkeypatch, words) == 0
    text = checkpoint.load_tokenizer(world / "aligner").decode(lengths[0])
    assert 300 < len(lengths[0]) <= SIZES["max_position_embeddings"] - NEW_TOKENS
    assert text.startswith(f"Improve the answer on these objectives: {'; '.join(TOLD)}\n\nQuestion: ")
    assert text.endswith("Human: And now?\n\nAssistant:\n\nAnswer: Now you know.\n\nEdited answer:")
    assert "about 99" in text and "about 10\n" not in text
    assert read(tmp_path / "out.jsonl")[0]["prompt"].startswith(turns)


# ----------------------------------------------------------------------------------------------------------------
# Interactive


def test_interactive_shows_the_edit(world, monkeypatch, capsys):
    question, answer = "How do I boil an egg?", "Boil the egg."
    lines = [question, answer, f"{BRIEF} ; humour", question, answer, "humor", question, answer, "", ""]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    words = ["--model", world / "aligner", "--interactive", "--device", "cpu", "--max-new-tokens", NEW_TOKENS]
    assert run(align, monkeypatch, words) == 0
    shown = capsys.readouterr()
    assert "unknown objective 'humor'" in shown.err and "humour" in shown.err  # said, and asked again
    dialogue = f"\n\nHuman: {question}\n\nAssistant:"
    expected = [edit(world, dialogue, answer, descriptions) for descriptions in (
        ["The response should be short.", data.OBJECTIVES["humour"].description],
        [HARMLESS, data.OBJECTIVES["helpful"].description])]
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown.out)
    for word in answer.split() + " ".join(expected).split():
        assert word in plain
    assert "\x1b[" in shown.out


def test_interactive_ends_with_its_input_and_says_what_is_too_long(world, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi?\n" + "word " * 20_000 + "\n\n"))
    assert run(align, monkeypatch, ["--model", world / "aligner", "--interactive", "--device", "cpu"]) == 0
    assert "too long for the aligner's context" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------
# Real files, and bad ones


def test_outputs_find_their_queries(world, shared, tmp_path, monkeypatch):
    folder = shared / "data" / "outputs" / "imhi"
    words = command(world, tmp_path / "out.jsonl", "--limit", 4)
    words[words.index("--data") + 1] = str(folder / "Mentallama-7B.DR.csv")
    assert run(align, monkeypatch, words) == 0
    csv.field_size_limit(10**9)
    with open(folder / "queries.DR.csv", encoding="utf-8", newline="") as file:
        queries = [row["query"] for row in csv.DictReader(file, escapechar="\\")][:4]
    rows = read(tmp_path / "out.jsonl")
    assert [row["prompt"] for row in rows] == queries and all(row["golden"] for row in rows)


def test_the_published_outputs_are_read(world, shared, tmp_path, monkeypatch):
    words = command(world, tmp_path / "out.csv", "--limit", 6)
    words[words.index("--data") + 1] = str(shared / "data" / "outputs" / "hh-rlhf" / "Claude-3.csv")
    assert run(align, monkeypatch, words) == 0
    with open(tmp_path / "out.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 and all(row["prompt"] and row["original"] and row["golden"] for row in rows)


def test_help_says_what_can_be_asked_for(monkeypatch, capsys):
    assert run(align, monkeypatch, ["--help"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    for text in ("--policy FOLDER_OR_URL", "--rounds", "--interactive", "(default 1024)"):
        assert text in told


def damaged(world, folder):
    """(what to change in the command, what the message must say)"""
    (folder / "empty.jsonl").write_text("")
    (folder / "broken.jsonl").write_text('{"prompt": "a", "responses": []}\n{"prompt"\n')
    (folder / "columns.csv").write_text("question,reply\na,b\n")
    (folder / "bytes.csv").write_bytes(b"query,generated_text\ncaf\xe9,b\n")
    (folder / "template.json").write_text('{"better": "{prompt} {answer}"}')
    (folder / "header").mkdir()
    for file in (world / "aligner").iterdir():
        (folder / "header" / file.name).write_bytes(file.read_bytes())
    (folder / "header" / "model.safetensors").write_bytes(b"\x08" + b"\x00" * 7 + b"not json")
    return [({"--data": "empty.jsonl"}, ["empty.jsonl", "no data"]),
            ({"--data": "broken.jsonl"}, ["broken.jsonl:2", "invalid JSON"]),
            ({"--data": "columns.csv"}, ["columns.csv:2", "no known format"]),
            ({"--data": "bytes.csv"}, ["bytes.csv:2", "not UTF-8"]),
            ({"--data": "absent.csv"}, ["absent.csv", "no such file"]),
            ({"--template": "template.json"}, ["template.json", "objectives"]),
            ({"--model": "header"}, ["model.safetensors", "not a readable checkpoint"]),
            ({"--model": "absent"}, ["absent", "no such folder"]),
            ({"--objectives": "helpfull"}, ["unknown objective 'helpfull'", "helpful"]),
            ({"--device": "abacus"}, ["--device abacus"]),
            ({"--limit": "0"}, ["--limit"]), ({"--rounds": "0"}, ["--rounds"]),
            ({"--temperature": "-1"}, ["--temperature"]), ({"--temperature": "nan"}, ["--temperature"]),
            ({"--top-k": "5"}, ["--top-k needs a --temperature above 0"]),
            ({"--min-p": "0.1"}, ["--min-p needs a --temperature above 0"]), ({"--min-p": "1.5"}, ["--min-p"]),
            ({"--top-p": "1.5"}, ["--top-p", "from 1e-09 to 1"]),
            ({"--out": "header"}, ["header", "no ordinary file"])]


def test_bad_input_is_one_line_and_leaves_nothing(world, tmp_path, monkeypatch, capsys):
    cases = damaged(world, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for changes, expected in cases:
        words = command(world, tmp_path / "out.jsonl", objectives=["harmless"])
        for flag, value in changes.items():
            path = flag in ("--data", "--template", "--model", "--out")
            words += [flag, str(tmp_path / value) if path else value]  # the last one counts
        refused(align, monkeypatch, capsys, words, *expected)
        assert sorted(tmp_path.rglob("*")) == before, changes


@pytest.mark.parametrize("flag", ["--data", "--queries", "--template", "--objectives"])
def test_an_input_is_not_overwritten(world, tmp_path, monkeypatch, capsys, flag):
    source = write(tmp_path / "in.json", data.TEMPLATE)  # which may also be two objectives
    refused(align, monkeypatch, capsys, [*command(world, source), flag, source], "is an input too")
    assert read(source) == [data.TEMPLATE]


def test_an_output_of_before_is_replaced_and_this_is_said(world, tmp_path, monkeypatch, capsys):
    (tmp_path / "out.jsonl").write_text("old\n")
    assert run(align, monkeypatch, command(world, tmp_path / "out.jsonl", "--limit", 1)) == 0
    assert "out.jsonl: exists already; it is replaced" in capsys.readouterr().err
    assert len(read(tmp_path / "out.jsonl")) == 1


def test_the_exit_status_of_the_script(world, tmp_path):
    """The same through a shell's eyes."""
    words = command(world, tmp_path / "out.jsonl", source="prompts.jsonl")
    ended = subprocess.run([sys.executable, ROOT / "align.py", *words], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2 and len(ended.stderr.splitlines()) == 1 and ended.stderr.startswith("error: ")
