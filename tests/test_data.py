"""data.py: objectives, readers of every format, the reformulation, token ids, and what bad input does."""
import csv
import errno
import gzip
import hashlib
import io
import itertools
import json
import random
import re
import resource
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import data
from data import Objective, UserError

SCRIPT = Path(data.__file__)


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run(*arguments, **options):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **options)


def response(text, **scores):
    return {"text": text, "scores": scores}


def edited(example):
    """The answer that an example's prompt shows."""
    start, end = example["answer"]
    return example["prompt"][start:end]


# ----------------------------------------------------------------------------------------------- objectives

def test_fifteen_objectives_ship_with_one_sentence_each():
    assert set(data.OBJECTIVES) == set(
        "harmless helpful humour instruction_following honest truthful correct informative professional "
        "specific factual readable fair repetition length".split())
    for name, objective in data.OBJECTIVES.items():
        assert objective.name == name and str(objective) == f"{name}: {objective.description}"
        assert objective.description.startswith("The response should ") and "." not in objective.description
    assert len({objective.description for objective in data.OBJECTIVES.values()}) == 15


def test_objectives_are_found_by_name_text_and_file_in_the_order_asked(tmp_path):
    as_dict, as_list = tmp_path / "a.json", tmp_path / "b.json"
    as_dict.write_text('{"polite": "Be polite", "harmless": "Harm: none"}')
    as_list.write_text('[{"name": "rhyme", "description": "The response should rhyme"}]')
    wanted = ["Instruction-Following", " HELPFUL ", "Brevity: be: short", str(as_list), "helpful"]
    found = data.find_objectives(wanted)
    assert found == [data.OBJECTIVES["instruction_following"], data.OBJECTIVES["helpful"],
                     Objective("Brevity", "be: short"), Objective("rhyme", "The response should rhyme")]
    assert data.find_objectives([str(as_dict)]) == [Objective("polite", "Be polite"),
                                                    Objective("harmless", "Harm: none")]
    own = {"Mention Garlic": Objective("Mention Garlic", "mention garlic")}
    assert data.find_objectives(["mention_garlic"], known=own) == list(own.values())


@pytest.mark.parametrize("wanted, message", [
    (["harmles"], "unknown objective 'harmles'.*: harmless;"),
    (["instruction"], "instruction_following"),
    (["zzzz"], "unknown objective 'zzzz'; give a known name or"),
    ([": no name"], "needs a name"), (["name: "], "needs a name"),
    (["helpful", "helpful: something else"], "two different"),
    (["absent.json"], "absent.json: no such file"),
])
def test_unknown_objectives_name_the_nearest_known(wanted, message):
    with pytest.raises(UserError, match=message):
        data.find_objectives(wanted)


@pytest.mark.parametrize("content", ["[1]", '"text"', '{"a": 1}', '[{"name": "a"}]', "{", '{"a": " "}'])
def test_objective_files_of_another_shape_are_refused(tmp_path, content):
    (tmp_path / "o.json").write_text(content)
    with pytest.raises(UserError, match="o.json"):
        data.find_objectives([str(tmp_path / "o.json")])


# -------------------------------------------------------------------------------------------- reformulation

A, B, C, D = (Objective(name, f"The response should be {name}") for name in "abcd")
PLAIN = {"better": "B|{objectives}|{prompt}|{answer}|", "equal": "E|{objectives}|{prompt}|{answer}|"}


def test_hand_computed_example():
    """Two answers: the first is better on a, worse on b, equal on c; d is scored for one of them only."""
    rated = [{"prompt": "q", "responses": [response("one", a=5, b=1, c=3, d=1),
                                           response("two", a=4, b=2, c=3)]}]
    assert list(data.reformulate(rated, [A, B, C, D], template=PLAIN)) == [
        {"prompt": "B|The response should be a|q|two|", "completion": "one", "objectives": ["a"],
         "relation": "better", "context": [27, 28], "answer": [29, 32]},
        {"prompt": "B|The response should be b|q|one|", "completion": "two", "objectives": ["b"],
         "relation": "better", "context": [27, 28], "answer": [29, 32]},
        {"prompt": "E|The response should be c|q|two|", "completion": "one", "objectives": ["c"],
         "relation": "equal", "context": [27, 28], "answer": [29, 32]}]


def test_equal_examples_ask_for_the_equal_objectives_not_the_worse_ones():
    """The reference code fills HH's equal-preference prompts with the objectives the answer is worse on."""
    rated = [{"prompt": "q", "responses": [response("one", a=0, b=0, c=2, d=2),
                                           response("two", a=1, b=1, c=2, d=2)]}]
    equal = [row for row in data.reformulate(rated, [A, B, C, D]) if row["relation"] == "equal"]
    assert [sorted(row["objectives"]) for row in equal] == [["c", "d"]]
    assert C.description in equal[0]["prompt"] and D.description in equal[0]["prompt"]
    assert A.description not in equal[0]["prompt"] and B.description not in equal[0]["prompt"]


def random_rated(generator, rows=300):
    for number in range(rows):
        yield {"prompt": f"question {number}", "responses": [
            {"text": f"answer {number}.{k}", "scores": {
                name: generator.choice([0, 1, 1.5, 2, 3, None]) for name in generator.sample("abcde", 5)
                if generator.random() < 0.8}}
            for k in range(generator.randint(0, 5))]}


@pytest.mark.parametrize("margin", [0.0, 0.5, 1.0])
def test_against_brute_force_on_random_ratings(margin):
    """Missing scores, nulls, ties, a margin, an objective (e) nobody asked for, any number of answers."""
    rated = list(random_rated(random.Random(1)))
    expected = Counter()
    for row in rated:
        answers = row["responses"]
        for i, j in itertools.product(range(len(answers)), repeat=2):
            apart = {name: answers[i]["scores"][name] - answers[j]["scores"][name] for name in "abcd"
                     if None not in (answers[i]["scores"].get(name), answers[j]["scores"].get(name))}
            better = frozenset(name for name in apart if apart[name] > margin)
            equal = frozenset(name for name in apart if abs(apart[name]) <= margin)
            if i != j and better:
                expected[row["prompt"], answers[j]["text"], answers[i]["text"], better, "better"] += 1
            if i < j and equal:
                expected[row["prompt"], answers[j]["text"], answers[i]["text"], equal, "equal"] += 1
    made = Counter()
    for row in data.reformulate(iter(rated), {o.name: o for o in (A, B, C, D)}, seed=3, margin=margin):
        question = row["prompt"][slice(*row["context"])]
        made[question, edited(row), row["completion"], frozenset(row["objectives"]), row["relation"]] += 1
        told = "; ".join(f"The response should be {name}" for name in row["objectives"])
        assert f": {told}\n" in row["prompt"] and len(set(row["objectives"])) == len(row["objectives"])
    assert made == expected and len(expected) > 1000


def test_the_seed_decides_the_order_of_objectives_and_nothing_else():
    def make(seed):
        return list(data.reformulate(random_rated(random.Random(0)), [A, B, C, D], seed=seed))
    assert make(5) == make(5)
    assert make(5) != make(6)
    assert [sorted(row["objectives"]) for row in make(5)] == [sorted(row["objectives"]) for row in make(6)]
    answers = [response("one", a=1, b=1, c=1), response("two", a=0, b=0, c=0)]
    rated = [{"prompt": "q", "responses": answers}] * 600
    orders = Counter("".join(row["objectives"]) for row in data.reformulate(rated, [A, B, C]))
    assert len(orders) == 6 and min(orders.values()) > 60  # 100 each are expected


def test_reformulation_streams():
    def rows():
        yield {"prompt": "q", "responses": [response("one", a=1), response("two", a=0)]}
        raise AssertionError("read ahead of what was asked for")
    assert next(data.reformulate(rows(), [A]))["completion"] == "one"


def test_empty_targets_and_better_copies_are_left_out_and_counted():
    answers = [response("same", a=1, b=2), response("same", a=0, b=2), response(" ", a=2)]
    rated = [{"prompt": "q", "responses": answers}]
    skipped = Counter()
    made = [(edited(row), row["completion"], row["relation"])
            for row in data.reformulate(rated, [A, B], skipped=skipped)]
    assert made == [("same", "same", "equal")]
    assert sorted(skipped.values()) == [1, 2]  # one copy; the empty answer would have been two pairs' target


def test_prompt_has_instruction_objectives_context_answer_in_this_order():
    text, (start, end) = data.aligner_prompt("  why?\n", "an {answer}", [B, A])
    parts = ("Improve", B.description + "; " + A.description, "why?", "an {answer}")
    places = [text.index(part) for part in parts]
    assert places == sorted(places) and text[start:end] == "why?" and text == text.rstrip()
    equal, _ = data.aligner_prompt("why?", "an {answer}", [B, A], relation="equal")
    assert equal.startswith("Keep") and equal.split(":", 1)[1] == text.split(":", 1)[1]


def test_templates_come_from_files_and_braces_in_texts_survive(tmp_path):
    path = tmp_path / "t.json"
    path.write_text(json.dumps({"better": "{x} improve {objectives} | {prompt} | {answer} | Edit: "}))
    template = data.read_template(path)
    told = [Objective("n", "{objectives}")]
    text, (start, end) = data.aligner_prompt("{answer} {0}", "{prompt} {", told, "better",
                                             template)
    assert text == "{x} improve {objectives} | {answer} {0} | {prompt} { | Edit:"
    assert text[start:end] == "{answer} {0}"
    assert template["equal"] == data.TEMPLATE["equal"]


@pytest.mark.parametrize("content", [
    {"better": "{objectives} {answer} {prompt}"}, {"better": "{objectives} {prompt}"}, {"better": 3}, [],
    {"equal": "{objectives}{prompt}{answer}"}, {"better": "{objectives}{prompt}{answer}{answer}"},
    {"better": "{objectives}{prompt}{answer}", "other": ""}])
def test_wrong_templates_are_refused(tmp_path, content):
    (tmp_path / "t.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="t.json"):
        data.read_template(tmp_path / "t.json")


def test_held_out_keeps_a_prompts_examples_together_and_about_the_share():
    rows = list(data.reformulate(random_rated(random.Random(2), rows=3000), [A, B, C, D]))
    sides = {}
    for row in rows:
        sides.setdefault(row["prompt"][slice(*row["context"])], set()).add(data.held_out(row, 0.1, seed=1))
    assert all(len(side) == 1 for side in sides.values())
    kept = sum(True in side for side in sides.values()) / len(sides)
    assert 0.07 < kept < 0.13
    assert [data.held_out(row, 0.1, 1) for row in rows] != [data.held_out(row, 0.1, 2) for row in rows]
    texts = [{"prompt": "", "completion": f"text {i}"} for i in range(1000)]
    assert 60 < sum(data.held_out(row, 0.1) for row in texts) < 140
    assert not any(data.held_out(row, 0.0) for row in texts) and all(data.held_out(row, 1.0) for row in texts)


# --------------------------------------------------------------------------------------- readers: small files

DIALOGUE = "\n\nHuman: hi\n\nAssistant: yes?\n\nHuman: why?\n\nAssistant:"


def test_hh_rlhf_is_split_at_the_last_turn_and_knows_its_objective(tmp_path):
    pair = {"chosen": DIALOGUE + " Because. ", "rejected": DIALOGUE + " No."}
    answers = [response("Because.", harmless=1), response("No.", harmless=0)]
    expected = [{"prompt": DIALOGUE, "responses": answers}]
    assert list(data.read_rated(write(tmp_path / "harmless-base" / "test.jsonl", pair))) == expected
    assert list(data.read_rated(write(tmp_path / "harmless-base.test.jsonl", pair))) == expected
    path = write(tmp_path / "helpful-online" / "x.jsonl", pair)
    assert next(data.read_rated(path))["responses"][0]["scores"] == {"helpful": 1}
    assert next(data.read_rated(path, objective="honest"))["responses"][0]["scores"] == {"honest": 1}
    with pytest.raises(UserError, match="--objective"):
        next(data.read_rated(write(tmp_path / "helpfulness.jsonl", pair)))


def test_hh_rlhf_pairs_with_different_dialogues_are_skipped_and_counted(tmp_path):
    other = DIALOGUE.replace("why", "how")
    path = write(tmp_path / "x.jsonl", {"chosen": DIALOGUE + " a", "rejected": other + " b"},
                 {"chosen": "no turn", "rejected": "no turn"},
                 {"chosen": DIALOGUE + " a", "rejected": DIALOGUE + " b"})
    skipped = Counter()
    assert len(list(data.read_rated(path, "helpful", skipped=skipped))) == 1
    assert list(skipped.values()) == [2]


def test_ultrafeedback_leaves_out_only_the_ratings_that_are_missing(tmp_path):
    def completion(text, *ratings):
        names = ("instruction_following", "honesty", "truthfulness", "helpfulness")
        return {"model": "m", "response": text, "overall_score": 7.5, "annotations": {
            name: {"Rating": rating, "Rationale": "because"} for name, rating in zip(names, ratings)}}
    row = {"instruction": "say hi", "models": ["m"], "source": "s", "completions": [
        completion("hi", "4", "N/A", "3", "5"), completion("hello", "5", "5", "5", "1"),
        completion("ho", "1", "1", "1", "1")]}
    read = list(data.read_rated(write(tmp_path / "uf.jsonl", row)))
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
    read = list(data.read_rated(write(tmp_path / "p.jsonl", *rows), objective="honest"))
    assert [row["prompt"] for row in read] == ["why?", "\n\nHuman: why?\n\nAssistant:", "why?"]
    answers = [response("yes\n\nAssistant: x", honest=1), response("no", honest=0)]
    assert all(row["responses"] == answers for row in read)
    whole = write(tmp_path / "w.jsonl", {"chosen": [user, no, user, no],
                                         "rejected": [user, no, user, user, no]})
    assert not list(data.read_rated(whole, objective="honest"))  # two different dialogues
    whole = write(tmp_path / "w.jsonl", {"chosen": [user, yes, user, no], "rejected": [user, yes, user, no]})
    assert next(data.read_rated(whole, objective="honest"))["responses"][0]["text"] == "no"


@pytest.mark.parametrize("messages", [
    [], ["hi"], [{"role": "bot", "content": "x"}], [{"role": "user"}], 5, None])
def test_wrong_messages_are_refused(tmp_path, messages):
    path = write(tmp_path / "p.jsonl", {"prompt": messages, "chosen": "a", "rejected": "b"})
    with pytest.raises(UserError, match="p.jsonl:1: '(prompt|role|content)' should"):
        list(data.read_rated(path, objective="honest"))


def test_rated_rows_keep_golden_and_objectives_and_drop_missing_scores(tmp_path):
    row = {"prompt": "q", "golden": "g", "objectives": ["helpful"], "other": 1,
           "responses": [{"text": "x", "scores": {"a": 1, "b": None, "c": float("nan")}}, {"text": "y"}]}
    assert list(data.read_rated(write(tmp_path / "r.jsonl", row))) == [
        {"prompt": "q", "golden": "g", "objectives": ["helpful"],
         "responses": [response("x", a=1), response("y")]}]


def test_files_without_scores(tmp_path):
    outputs = tmp_path / "model_outputs.json"
    output = {"instruction": "q", "output": "a", "generator": "m", "dataset": "d"}
    outputs.write_text(json.dumps([output] * 2, indent=1))
    assert list(data.read_rated(outputs)) == [{"prompt": "q", "responses": [response("a")]}] * 2
    prompts = write(tmp_path / "prompts.jsonl", {"prompt": "q"})
    assert list(data.read_rated(prompts)) == [{"prompt": "q", "responses": []}]


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
    assert list(data.read_rated(path)) == [
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
    assert list(data.read_rated(answers)) == expected
    with pytest.raises(UserError, match="m.DR.csv: has 2 rows, but .*given.csv has 1"):
        next(data.read_rated(answers, queries=given))
    with pytest.raises(UserError, match="--queries"):
        next(data.read_rated(write_csv(tmp_path / "sub.txt", [["generated_text"], ["t"]], True)))


def test_gzip_byte_order_marks_blank_lines_and_half_characters_are_read(tmp_path):
    text = '\ufeff\n{"prompt": "é\\ud83d"}\n\n{"prompt": "\\ud83d\\ude00"}\r\n'
    (tmp_path / "named-as-you-like").write_bytes(gzip.compress(text.encode()))
    rows = list(data.read_rated(tmp_path / "named-as-you-like"))
    assert [row["prompt"] for row in rows] == ["é\ufffd", "\U0001f600"]


def test_pairs_texts_and_completions(tmp_path):
    message = [{"role": "user", "content": "p"}]
    pairs = write(tmp_path / "p.jsonl",
                  {"prompt": "p", "completion": "c", "relation": "equal", "context": [0, 1]},
                  {"prompt": message, "completion": [{"role": "assistant", "content": "c"}]})
    assert list(data.read_pairs(pairs)) == [
        {"prompt": "p", "completion": "c", "relation": "equal", "context": [0, 1]},
        {"prompt": "\n\nHuman: p\n\nAssistant:", "completion": "c"}]
    assert list(data.read_completions(pairs)) == list(data.read_pairs(pairs))
    rated = write(tmp_path / "r.jsonl", {"prompt": "q", "responses": [
        response("x", a=1, b=1), response("y", a=0, b=3), response("z")]},
        {"prompt": "p", "responses": [response("n")]})
    assert list(data.read_completions(rated)) == [{"prompt": "q", "completion": "y"}]
    texts = write(tmp_path / "t.jsonl", {"text": "a\n\nb"}, {"text": "c"})
    assert list(data.read_texts(texts)) == ["a\n\nb", "c"]
    (tmp_path / "t.txt").write_text("\none\ntwo\n\n \nthree")
    assert list(data.read_texts(tmp_path / "t.txt")) == ["one\ntwo", "three"]


@pytest.mark.parametrize("row, message", [
    ({"chosen": "a", "rejected": "b"}, "reformulate"), ({"prompt": "p", "completion": 1}, "'completion'"),
    ({"prompt": "p", "completion": "c", "context": [0, 2]}, "'context'"),
    ({"prompt": "p", "completion": "c", "answer": [0.0, 1]}, "'answer'")])
def test_read_pairs_refuses(tmp_path, row, message):
    path = write(tmp_path / "p.jsonl", {"prompt": "p", "completion": "c"}, row)
    with pytest.raises(UserError, match=f"p.jsonl:2: .*{message}"):
        list(data.read_pairs(path))


# --------------------------------------------------------------------------------------- readers: real files

def test_real_hh_rlhf(shared):
    skipped = Counter()
    rows = list(data.read_rated(shared / "data/hh-rlhf/harmless-base.test.jsonl.gz", skipped=skipped))
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
    records = [record for _, record in data.records(shared / "data/outputs" / name)]
    cells = "\x1f".join(record[column] for column in records[0] for record in records)
    assert len(records) == rows and hashlib.sha256(cells.encode()).hexdigest()[:16] == digest


def test_real_outputs_written_with_and_without_escapes_have_the_same_queries(shared):
    escaped, plain = (list(data.read_rated(shared / "data/outputs/ultrafeedback" / name))
                      for name in ("Vicuna-7B.csv", "gpt-3.5-turbo.csv"))
    assert ([(row["prompt"], row["golden"]) for row in escaped]
            == [(row["prompt"], row["golden"]) for row in plain])


def test_real_imhi_outputs_find_their_queries(shared):
    rows = list(data.read_rated(shared / "data/outputs/imhi/vicuna_7B.DR.csv"))
    assert len(rows) == 405 and all(row["prompt"].startswith("Consider this post") for row in rows)
    # The same post is meant: the golden answer of the first row speaks of the site that its query names.
    assert "Ancestry.com" in rows[0]["prompt"] and "Ancestry.com" in rows[0]["golden"]


# ------------------------------------------------------------------------------------------------ token ids

TEXTS = ["Hello world", " two  spaces ", "line\n\nline\n", "naïve café – “quotes” 日本 🙂", "</s><s> <unk>", "x",
         "{}\\\\\"",
         "Human: no\n\nAssistant: yes"]


def byte_level_tokenizer():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"],
                                  show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    texts = ["How do I cook rice? The response should be helpful and short."] * 3
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


@pytest.fixture(scope="module", params=["byte-level", "tokenizers/llama-2", "checkpoints/stories260K"])
def tokenizer(request):
    if request.param == "byte-level":
        return byte_level_tokenizer()
    shared = request.getfixturevalue("shared")
    return Tokenizer.from_file(str(shared / request.param / "tokenizer.json"))


def test_generation_sees_the_prompt_ids_of_training_and_completions_decode(tokenizer):
    for prompt, completion in itertools.product(TEXTS, TEXTS):
        ids, count = data.encode_pair(tokenizer, prompt, completion, bos_id=1, eos_id=2)
        assert ids[:count] == data.encode_prompt(tokenizer, prompt, bos_id=1)
        assert ids[0] == 1 and ids.count(1) == 1 and ids[-1] == 2 and ids.count(2) == 1
        assert tokenizer.decode(ids[count:-1]) == completion and tokenizer.decode(ids[1:count]) == prompt
    assert data.encode_prompt(tokenizer, "Hello", None) == data.encode_prompt(tokenizer, "Hello", 1)[1:]
    only_x = data.encode_prompt(tokenizer, "x", None)
    assert data.encode_pair(tokenizer, "", "x", 1, None) == ([1, *only_x], 1)


def test_a_tokenizer_file_that_cuts_and_pads_does_neither_here():
    cutting = byte_level_tokenizer()
    cutting.enable_truncation(4)
    cutting.enable_padding(length=50)
    expected = data.encode_pair(byte_level_tokenizer(), TEXTS[0], TEXTS[3], 1, 2)
    assert data.encode_pair(cutting, TEXTS[0], TEXTS[3], 1, 2) == expected


def test_too_long_prompts_lose_their_oldest_turns_and_nothing_else(tokenizer):
    """For every length allowed: what is left is the longest that fits, found here by trying all cuts."""
    turns = ["Human: how do I cook rice?", "Assistant: With water.", "Human: and pasta?",
             "Assistant: Also so.", "Human: and if I have no water at all?\n\nAssistant:"]
    prompt, (start, end) = data.aligner_prompt("\n\n".join(turns), "Use milk.", [A, B])
    contexts = ["\n\n".join(turns[k:]) for k in range(len(turns))]
    prompts = [prompt[:start] + context + prompt[end:] for context in contexts]
    lengths = [len(data.encode_pair(tokenizer, text, "Wait for rain.", 1, 2)[0]) for text in prompts]
    whole = lengths[0]
    assert lengths == sorted(lengths, reverse=True)
    for allowed in range(whole + 1):
        pair = data.encode_pair(tokenizer, prompt, "Wait for rain.", 1, 2, allowed, [start, end])
        fitting = [context for context, length in zip(contexts, lengths) if length <= allowed]
        if pair is None:
            assert not fitting
            continue
        ids, count = pair
        text = tokenizer.decode(ids[1:count])
        assert len(ids) <= allowed and ids[0] == 1 and tokenizer.decode(ids[count:-1]) == "Wait for rain."
        assert text.startswith(prompt[:start]) and text.endswith(prompt[end:])
        left = text[start:len(text) - len(prompt) + end]
        assert left == fitting[0] if fitting else turns[-1].endswith(left) and left
    no_context = data.encode_pair(tokenizer, prompt, "Wait for rain.", 1, 2, whole - 1)
    assert no_context is None


@pytest.mark.parametrize("context", ["word " * 20_000, "x" * 100_000])
def test_a_very_long_single_turn_keeps_its_end(context):
    prompt, span = data.aligner_prompt(context + "the end", "a", [A])
    ids, count = data.encode_pair(byte_level_tokenizer(), prompt, "b", 1, 2, 300, span)
    assert 280 <= len(ids) <= 300
    assert byte_level_tokenizer().decode(ids[1:count]).endswith("the end" + prompt[span[1]:])


def test_many_pairs_are_encoded_as_one_by_one_and_those_left_out_are_counted(tokenizer):
    rows = list(data.reformulate(random_rated(random.Random(4), rows=150), [A, B, C, D]))[:1500]
    rows += [{"prompt": "p", "completion": "long " * 200}, {"prompt": "long " * 200, "completion": "c"}]
    one_by_one = [data.encode_pair(tokenizer, row["prompt"], row["completion"], 1, 2, 130, row.get("context"))
                  for row in rows]
    encoded, dropped = data.encode_pairs(tokenizer, iter(rows), 1, 2, 130)
    assert [(list(ids), count) for ids, count in encoded] == [pair for pair in one_by_one if pair]
    assert dropped == one_by_one.count(None) >= 2 and len(encoded) + dropped == len(rows)


# ----------------------------------------------------------------------------------------- the command line

RATED = {"prompt": "why?", "responses": [response("yes", helpful=2, honest=1),
                                         response("no", helpful=1, honest=0)]}


def test_reformulate_and_show(tmp_path):
    path, out = write(tmp_path / "r.jsonl", RATED, RATED), tmp_path / "new" / "pairs.jsonl.gz"
    result = run("reformulate", path, path, "--out", out, "--seed", 7)
    assert result.returncode == 0, result.stderr
    table = [row.split() for row in result.stdout.splitlines()[1:]]
    assert table == [["2", "all"], ["better", "4", "4"], ["equal", "0", "0"]]
    objectives = [data.OBJECTIVES["helpful"], data.OBJECTIVES["honest"]]
    assert list(data.read_pairs(out)) == list(data.reformulate([RATED] * 4, objectives, seed=7))
    pairs = write(tmp_path / "p.jsonl", {"prompt": "why?", "chosen": "a", "rejected": "b"})
    for file, words in ((path, ["why?", "helpful 2", "no"]), (out, ["Improve", "completion"]),
                        (pairs, ["1: chosen 1\na", "2: chosen 0\nb"])):
        shown = run("show", file, "-n", 1)
        assert shown.returncode == 0 and all(word in shown.stdout for word in words)


def test_reformulate_takes_objectives_margin_and_template(tmp_path):
    path, out, template = write(tmp_path / "r.jsonl", RATED), tmp_path / "o.jsonl", tmp_path / "t.json"
    template.write_text(json.dumps(PLAIN))
    row = {"prompt": "why?", "responses": [response("yes", tone=2), response("no", tone=1)]}
    path = write(tmp_path / "r.jsonl", row)
    result = run("reformulate", path, "--out", out, "--objectives", "tone: be kind", "--margin", 1,
                 "--template", template)
    assert result.returncode == 0, result.stderr
    assert [json.loads(line)["prompt"] for line in out.read_text().splitlines()] == ["E|be kind|why?|no|"]
    pairs = write(tmp_path / "p.jsonl", {"prompt": "why?", "chosen": "a", "rejected": "b"})
    result = run("reformulate", pairs, "--out", out, "--objective", "tone: be kind")
    assert result.returncode == 0 and "be kind" in json.loads(out.read_text())["prompt"]


def test_shown_texts_cannot_control_the_terminal(tmp_path):
    result = run("show", write(tmp_path / "r.jsonl", {"prompt": "\x1b[31mred", "completion": "x" * 5000}))
    assert "\x1b" not in result.stdout and "(5,000 characters)" in result.stdout


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
        data.cli(data.main)
    printed = capsys.readouterr()
    assert stopped.value.code == 2 and printed.out == ""
    assert_one_line(printed.err, message)
    assert out.read_text() == "as it was" and len(list(tmp_path.iterdir())) == 2


def assert_one_line(text, message):
    assert text.startswith("error: ") and text.endswith("\n") and text.count("\n") == 1, text
    assert len(text) < 600 and re.search(message, text), text


def limit_file_size():
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


@pytest.mark.parametrize("arguments, message, options", [
    (["reformulate", "absent.jsonl", "--out", "o"], "absent.jsonl: no such file", {}),
    (["reformulate", "folder", "--out", "o"], "folder: is a folder", {}),
    (["reformulate", "bad.jsonl", "--out", "o"], "bad.jsonl:2: invalid JSON", {}),
    (["reformulate", "good.jsonl", "--out", "good.jsonl"], "another --out", {}),
    (["reformulate", "good.jsonl", "--out", "folder"], "another --out", {}),
    (["reformulate", "good.jsonl", "--out", "good.jsonl/o"], "good.jsonl: ", {}),
    (["reformulate", "good.jsonl", "--out", "o", "--objectives", "fairr"], "the nearest known: fair", {}),
    (["reformulate", "good.jsonl", "--out", "o", "--margin", "-1"], "--margin", {}),
    (["reformulate", "good.jsonl", "--out", "o", "--template", "bad.jsonl"], "bad.jsonl:2: invalid JSON", {}),
    (["reformulate", *["good.jsonl"] * 90, "--out", "o"], "o: File too large",
     {"preexec_fn": limit_file_size}),
    (["show", "bad.jsonl"], "bad.jsonl:2: invalid JSON", {}),
])
def test_bad_commands_are_one_line_status_2_and_write_nothing(tmp_path, arguments, message, options):
    (tmp_path / "folder").mkdir()
    (tmp_path / "good.jsonl").write_bytes(GOOD)
    (tmp_path / "bad.jsonl").write_bytes(two_lines(b"{"))
    result = run(*arguments, cwd=tmp_path, **options)
    assert result.returncode == 2
    assert_one_line(result.stderr, message)
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "good.jsonl", "bad.jsonl"}
    assert (tmp_path / "good.jsonl").read_bytes() == GOOD


@pytest.mark.parametrize("error, status, message", [
    (UserError("two\nlines"), 2, "two lines"), (KeyboardInterrupt(), 130, "interrupted"),
    (OSError(errno.ENOSPC, "No space left", "x.jsonl"), 2, "x.jsonl: No space left; free"),
    (PermissionError(errno.EACCES, "Permission denied", "y"), 2, "y: Permission denied")])
def test_cli_turns_errors_into_one_line(error, status, message, capsys):
    def main():
        raise error
    with pytest.raises(SystemExit) as stopped:
        data.cli(main)
    assert stopped.value.code == status
    assert_one_line(capsys.readouterr().err, message)


def test_a_closed_pipe_is_no_traceback(tmp_path):
    path = write(tmp_path / "r.jsonl", *[RATED] * 5000)
    process = subprocess.Popen([sys.executable, str(SCRIPT), "show", str(path), "-n", "5000"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.stdout.close()
    assert_one_line(process.stderr.read(), "closed")
    assert process.wait() == 2


def test_programming_errors_are_not_hidden():
    def main():
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError):
        data.cli(main)


def test_writing_is_whole_or_not_at_all(tmp_path):
    path = tmp_path / "o.jsonl"
    assert data.write_jsonl(path, iter([{"a": "é\ud800"}, {"b": 1}])) == 2
    assert path.read_text(encoding="utf-8") == '{"a": "é?"}\n{"b": 1}\n'
    assert [file.name for file in tmp_path.iterdir()] == ["o.jsonl"]

    def rows():
        yield {"c": 2}
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        data.write_jsonl(path, rows())
    assert "é" in path.read_text(encoding="utf-8")
    assert [file.name for file in tmp_path.iterdir()] == ["o.jsonl"]


def test_an_answer_of_100_000_characters_goes_all_the_way(tmp_path):
    long = "word " * 20_000
    answers = [response(long, helpful=1), response("x", helpful=0)]
    path = write(tmp_path / "r.jsonl", {"prompt": "q", "responses": answers})
    assert run("reformulate", path, "--out", tmp_path / "o.jsonl").returncode == 0
    assert [row["completion"] for row in data.read_pairs(tmp_path / "o.jsonl")] == [long]


def test_help_needs_neither_torch_nor_numpy():
    code = "import sys, data; print(sorted({'torch', 'numpy', 'tokenizers', 'tqdm'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=SCRIPT.parent)
    assert result.stdout.strip() == "[]"


# ---------------------------------------------------------------------------------------------- preferences

def test_preferences_are_read_from_labels_with_their_principle(tmp_path):
    rows = [data.preference("q", "x", "y", "helpfulness", 0.7), data.preference("q", "x", "y", "detail", 0.2)]
    path = tmp_path / "labels.jsonl"
    data.write_jsonl(path, rows)
    assert list(data.read_preferences(path)) == rows
    assert list(data.read_preferences(path, "detail")) == rows[1:]


def test_rated_responses_become_preferences_by_their_scores(tmp_path):
    path = tmp_path / "rated.jsonl"
    responses = [{"text": text, "scores": {"helpful": score}} for text, score in (("a", 1), ("b", 3), ("c", 1))]
    data.write_jsonl(path, [{"prompt": "q", "responses": responses}])
    found = [(row["response_a"], row["response_b"], row["p_a"]) for row in data.read_preferences(path, "helpful")]
    assert found == [("a", "b", 0.0), ("a", "c", 0.5), ("b", "c", 1.0)]


def test_chosen_and_rejected_are_a_preference(tmp_path):
    path = tmp_path / "pairs.jsonl"
    data.write_jsonl(path, [{"prompt": "q", "chosen": "good", "rejected": "bad"}])
    assert list(data.read_preferences(path)) == [data.preference("q", "good", "bad", "overall", 1.0)]


@pytest.mark.parametrize("row, said", [
    ({"prompt": "q", "response_a": "x", "response_b": "y", "p_a": 1.5}, "p_a"),
    ({"prompt": "q", "response_a": "x", "response_b": "y", "p_a": "1"}, "p_a"),
    ({"prompt": "q", "response_a": "x", "response_b": 3, "p_a": 1}, "response_b"),
    ({"prompt": "q", "response 1": "x", "response 2": "y", "label": 3}, "label"),
    ({"prompt": "q", "reference": "x", "responses": {"m": {"text": "y"}}}, "gpt4_preference"),
    ({"prompt": "q", "reference": "x", "responses": ["y"]}, "responses"),
])
def test_broken_preferences_are_named_with_their_line(tmp_path, row, said):
    path = tmp_path / "labels.jsonl"
    good = {key: (0 if key == "label" else 0.5 if key == "p_a" else {} if key == "responses" else "t") for key in row}
    data.write_jsonl(path, [good, row])
    with pytest.raises(UserError, match=rf"labels\.jsonl:2: .*{said}"):
        list(data.read_preferences(path))


def test_real_preferences(shared):
    """AlpacaEval's 12 responses to 805 prompts; Auto-J's published counts of labels."""
    rows = list(data.read_preferences(shared / "data/alpaca_eval/rated.jsonl.gz"))
    assert len({row["prompt"] for row in rows}) == 805 and len(rows) == 805 * 12 - 4  # four are missing
    assert all(0 <= row["p_a"] <= 1 for row in rows)
    rows = list(data.read_preferences(shared / "data/auto-j/human-pairwise.jsonl.gz"))
    assert len(rows) == 1392 and {row["p_a"] for row in rows} == {0.0, 0.5, 1.0}
