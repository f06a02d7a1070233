"""data.py: objectives, the reformulation, token ids, and the command line."""
import datetime
import itertools
import json
import random
import resource
import subprocess
import sys
from array import array
from collections import Counter
from pathlib import Path

import pytest
from conftest import assert_one_line, response, write
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import data
import formats
import objectives
from common import UserError
from objectives import Objective

SCRIPT = Path(data.__file__)


def run(*arguments, **options):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **options)


def edited(example):
    """The answer that an example's prompt shows."""
    start, end = example["answer"]
    return example["prompt"][start:end]


# ----------------------------------------------------------------------------------------------------------------
# Objectives


def test_the_objectives_that_ship_have_a_sentence_and_other_wordings_each():
    """Eighteen, MORLAIF's twelve principles, and the better one, all in all."""
    assert set(data.OBJECTIVES) == {"overall", *objectives.PRINCIPLES, *(
        "harmless helpful humour instruction_following honest truthful correct informative professional "
        "specific factual readable fair repetition length coherent complex verbose".split())}
    for name, objective in data.OBJECTIVES.items():
        assert objective.name == name and str(objective) == f"{name}: {objective.description}"
        assert objective.description.startswith("The response should ") and "." not in objective.description
        assert len(objective.wordings) >= 3
    texts = [text for objective in data.OBJECTIVES.values() for text in (objective.description, *objective.wordings)]
    assert len(set(texts)) == len(texts) and not any(text != text.strip() or "|" in text for text in texts)


def test_an_objective_that_no_file_needed_is_told(tmp_path):
    scored = {"prompt": "q", "responses": [response("a", helpful=1), response("b", helpful=2)]}
    rated = write(tmp_path / "r.jsonl", scored)
    pairs = write(tmp_path / "p.jsonl", {"prompt": "q", "chosen": "a", "rejected": "b"})
    for files, told in (([rated], True), ([rated, pairs], False), ([pairs], False)):
        done = run("reformulate", *files, "--out", tmp_path / "out.jsonl", "--objective", "honest")
        assert done.returncode == 0
        assert ("note: --objective honest: the files say themselves" in done.stderr) == told


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
    (tmp_path / "c.json").write_text('{"brief": ["be brief", "few words"], "calm": "be calm | no shouting"}')
    assert data.find_objectives(["Brevity: be short | few words |  in a word ", str(tmp_path / "c.json")]) == [
        Objective("Brevity", "be short", ("few words", "in a word")), Objective("brief", "be brief", ("few words",)),
        Objective("calm", "be calm", ("no shouting",))]
    as_list.write_text('[{"name": "brief", "description": "be brief", "wordings": ["few words"]}, '
                       '{"name": "calm", "description": "be calm | no shouting", "wordings": ["hush"]}]')
    assert data.find_objectives([str(as_list)]) == [Objective("brief", "be brief", ("few words",)),
                                                    Objective("calm", "be calm", ("no shouting", "hush"))]
    assert data.find_objectives(["Format: as in package.json"]) == [Objective("Format", "as in package.json")]


@pytest.mark.parametrize("wanted, message", [
    (["harmles"], "unknown objective 'harmles'.*: harmless;"),
    (["instruction"], "instruction_following"),
    (["zzzz"], "unknown objective 'zzzz'; known are harmless, helpful, .*; give a known name or"),
    ([": no name"], "needs a name"), (["name: "], "needs a name"),
    (["helpful", "helpful: something else"], "two different"),
    (["absent.json"], "absent.json: no such file"),
])
def test_unknown_objectives_name_the_nearest_known(wanted, message):
    with pytest.raises(UserError, match=message):
        data.find_objectives(wanted)


@pytest.mark.parametrize("content", [
    "[1]", '"text"', '{"a": 1}', '[{"name": "a"}]', "{", '{"a": " "}', "[]", "{}", '{"a": []}', '{"a": ["b", ""]}',
    '{"a": {"b": "c"}}', '{"a": "b | "}', '{"a: b": "c"}'])
def test_objective_files_of_another_shape_are_refused(tmp_path, content):
    (tmp_path / "o.json").write_text(content)
    with pytest.raises(UserError, match="o.json"):
        data.find_objectives([str(tmp_path / "o.json")])


# ----------------------------------------------------------------------------------------------------------------
# Reformulation


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
    for row in data.reformulate(iter(rated), {o.name: o for o in (A, B, C, D)}, data.Pairing(seed=3, margin=margin)):
        question = row["prompt"][slice(*row["context"])]
        made[question, edited(row), row["completion"], frozenset(row["objectives"]), row["relation"]] += 1
        told = "; ".join(f"The response should be {name}" for name in row["objectives"])
        assert f": {told}\n" in row["prompt"] and len(set(row["objectives"])) == len(row["objectives"])
    assert made == expected and len(expected) > 1000


def test_the_seed_decides_the_order_of_objectives_and_nothing_else():
    def make(seed):
        return list(data.reformulate(random_rated(random.Random(0)), [A, B, C, D], data.Pairing(seed=seed)))
    assert make(5) == make(5)
    assert make(5) != make(6)
    assert [sorted(row["objectives"]) for row in make(5)] == [sorted(row["objectives"]) for row in make(6)]
    answers = [response("one", a=1, b=1, c=1), response("two", a=0, b=0, c=0)]
    rated = [{"prompt": "q", "responses": answers}] * 600
    orders = Counter("".join(row["objectives"]) for row in data.reformulate(rated, [A, B, C]))
    assert len(orders) == 6 and min(orders.values()) > 60  # 100 each are expected


def paired(**options):
    """What reformulate makes of random ratings, and {(question, text): scores on a, b, c, d}."""
    rated = list(random_rated(random.Random(7), 400))
    scores = {(row["prompt"], answer["text"]): {name: score for name, score in answer["scores"].items()
                                                if name in "abcd" and score is not None}
              for row in rated for answer in row["responses"]}
    skipped = Counter()
    rows = list(data.reformulate(rated, [A, B, C, D], data.Pairing(**options), skipped=skipped))
    for row in rows:
        question = row["prompt"][slice(*row["context"])]
        row["before"], row["after"] = scores[question, edited(row)], scores[question, row["completion"]]
        row["most"] = {name: max(found.get(name, -1) for (asked, _), found in scores.items() if asked == question)
                       for name in "abcd"}
        row["gains"] = {name for name in row["after"] if row["before"].get(name, 9) < row["after"][name]}
    return *([row for row in rows if row["relation"] == name] for name in ("better", "equal", "keep")), skipped


def test_dominance_leaves_out_what_makes_anything_worse_and_nothing_else():
    plain, equal, _, _ = paired()
    better, same_equal, kept, skipped = paired(dominance=True)
    assert not kept and len(equal) == len(same_equal)
    assert all(row["after"][name] >= row["before"][name] for row in better for name in row["before"].keys()
               & row["after"].keys())
    assert all(set(row["objectives"]) == row["gains"] for row in better) and len(better) > 100
    assert len(plain) - len(better) == skipped["the edit makes another objective worse"] > 100


def test_a_subset_names_some_of_what_improves_and_each_part_of_it_at_some_time():
    for share, most in ((1.0, 0.6), (0.5, 0.8)):
        better, *_ = paired(subset=share)
        several = [row for row in better if len(row["gains"]) == 2]
        assert all(set() < set(row["objectives"]) <= row["gains"] for row in better)
        whole = sum(set(row["objectives"]) == row["gains"] for row in several) / len(several)
        assert most - 0.2 < whole < most + 0.05  # of two, half of the draws take both
    assert all(set(row["objectives"]) == row["gains"] for row in paired()[0])


def test_what_cannot_improve_is_named_beside_what_does():
    better, *_ = paired(best=1.0)
    added = [row for row in better if set(row["objectives"]) - row["gains"]]
    for row in better:
        others = set(row["objectives"]) - row["gains"]
        can = {name for name in row["after"] if row["after"][name] == row["most"][name]} - row["gains"]
        assert row["gains"] <= set(row["objectives"]) and others <= can and bool(others) == bool(can)
    assert len(added) > 100 and len(paired(best=0.5)[0]) == len(better)
    assert 0.3 < sum(bool(set(row["objectives"]) - row["gains"]) for row in paired(best=0.5)[0]) / len(added) < 0.7


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_where_nothing_is_to_be_done_the_answer_stays_as_it_is(share):
    better, _, kept, _ = paired(keep=share)
    assert all(edited(row) == row["completion"] and row["prompt"].startswith("Improve") for row in kept)
    assert all(row["after"][name] == row["most"][name] for row in kept for name in row["objectives"])
    could = [row for row in better if any(row["before"][name] == row["most"][name] for name in row["before"])]
    assert len(kept) / len(could) == pytest.approx(share / (1 - share), rel=0.15 if share < 0.5 else 0.01)
    assert {len(row["objectives"]) for row in kept} >= {1, 2, 3}
    worse = {(row["prompt"][slice(*row["context"])], edited(row)) for row in could}
    assert all((row["prompt"][slice(*row["context"])], row["completion"]) in worse for row in kept)


def test_a_ceiling_says_what_cannot_improve():
    rated = [{"prompt": "q", "responses": [response("one", a=1, b=3, c=1), response("two", a=1, b=3, c=0)]}] * 50
    def named(ceiling):
        made = list(data.reformulate(rated, [A, B, C], data.Pairing(keep=0.5), ceiling=ceiling))
        assert {row["completion"] for row in made if row["relation"] == "keep"} <= {"two"}
        return {tuple(sorted(row["objectives"])) for row in made if row["relation"] == "keep"}
    assert named(None) == {("a",), ("b",), ("a", "b")}
    assert named({"a": 1, "b": 5}) == {("a",)} and named({"a": 2, "b": 5}) == set() == named({"c": 1})


def test_an_empty_answer_is_not_to_stay_as_it_is():
    rated = [{"prompt": "q", "responses": [response("one", a=1, b=1), response(" ", a=0, b=1)]}] * 50
    rows = list(data.reformulate(rated, [A, B], data.Pairing(keep=0.5)))
    assert {(row["relation"], row["completion"]) for row in rows} == {("better", "one"), ("equal", "one")}


def test_of_one_objective_alone_no_worse_answer_has_nothing_to_do(tmp_path, capsys):
    rated = list(random_rated(random.Random(7), 100))
    rows = list(data.reformulate(rated, [A], data.Pairing(keep=0.5)))
    assert {row["relation"] for row in rows} == {"better", "equal"}
    file = tmp_path / "rated.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rated))
    for keep, zero in ((0.5, ["keep", "0", "0"]), (0.0, [])):  # which is told where it was asked for
        data.run_reformulate([file], tmp_path / "pairs.jsonl", ["a: be a"], None, None, None, data.Pairing(keep=keep))
        told = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("keep")]
        assert told == ([zero] if zero else [])


def test_an_objective_of_several_wordings_is_asked_for_in_each_of_them():
    many = Objective("a", "be a", ("more of a", "A!"))
    rated = [{"prompt": "q", "responses": [response("one", a=1, b=1), response("two", a=0, b=0)]}] * 600
    rows = list(data.reformulate(rated, [many, B], template=PLAIN))
    told = Counter(text for row in rows for text in row["prompt"].split("|")[1].split("; "))
    assert told.keys() == {"be a", "more of a", "A!", B.description} and told[B.description] == 600
    assert all(150 < told[text] < 250 for text in ("be a", "more of a", "A!"))  # 200 are expected
    assert all(sorted(row["objectives"]) == ["a", "b"] for row in rows)
    assert rows == list(data.reformulate(rated, [many, B], template=PLAIN))


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


def test_rows_whose_answers_cannot_be_compared_are_counted():
    one, two = response("one", a=1, b=2), response("two", a=0, c=1)
    rows = [[], [one], [one, response("two", c=1)], [one, two], [two, two]]
    skipped = Counter()
    rated = [{"prompt": "q", "responses": responses} for responses in rows]
    assert len(list(data.reformulate(rated, [A, B], skipped=skipped))) == 2  # of the last two rows
    assert skipped == {"no two answers to the prompt are scored on one objective asked for": 3}


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
        sides.setdefault(row["prompt"][slice(*row["context"])], set()).add(data.is_held_out(row, 0.1, seed=1))
    assert all(len(side) == 1 for side in sides.values())
    kept = sum(True in side for side in sides.values()) / len(sides)
    assert 0.07 < kept < 0.13
    assert [data.is_held_out(row, 0.1, 1) for row in rows] != [data.is_held_out(row, 0.1, 2) for row in rows]
    texts = [{"prompt": "", "completion": f"text {i}"} for i in range(1000)]
    assert 60 < sum(data.is_held_out(row, 0.1) for row in texts) < 140
    assert not any(data.is_held_out(row, 0.0) for row in texts) and all(data.is_held_out(row, 1.0) for row in texts)


def test_a_preference_without_a_prompt_is_held_out_by_its_first_response():
    rows = [formats.preference("", f"text {i}", f"other {i % 7}", "overall", 1.0) for i in range(1000)]
    texts = [{"prompt": "", "completion": f"text {i}"} for i in range(1000)]
    sides = [data.is_held_out(row, 0.1, seed=1) for row in rows]
    assert sides == [data.is_held_out(row, 0.1, seed=1) for row in texts] and 60 < sum(sides) < 140
    asked = [{**row, "prompt": "why?"} for row in rows]
    assert len({data.is_held_out(row, 0.5) for row in asked}) == 1


# ----------------------------------------------------------------------------------------------------------------
# Token ids


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
        document = data.encode_document(tokenizer, prompt, completion, bos_id=1, eos_id=2)
        ids, count = list(document.ids), document.start
        assert ids[:count] == data.encode_prompt(tokenizer, prompt, bos_id=1)
        assert ids[0] == 1 and ids.count(1) == 1 and ids[-1] == 2 and ids.count(2) == 1
        assert tokenizer.decode(ids[count:-1]) == completion and tokenizer.decode(ids[1:count]) == prompt
    assert data.encode_prompt(tokenizer, "Hello", None) == data.encode_prompt(tokenizer, "Hello", 1)[1:]
    only_x = data.encode_prompt(tokenizer, "x", None)
    document = data.encode_document(tokenizer, "", "x", 1, None)
    assert document == data.Document(array("i", [1, *only_x]), 1) and document.ids.typecode == "i"


def test_a_tokenizer_file_that_cuts_and_pads_does_neither_here():
    cutting = byte_level_tokenizer()
    cutting.enable_truncation(4)
    cutting.enable_padding(length=50)
    expected = data.encode_document(byte_level_tokenizer(), TEXTS[0], TEXTS[3], 1, 2)
    assert data.encode_document(cutting, TEXTS[0], TEXTS[3], 1, 2) == expected


def test_too_long_prompts_lose_their_oldest_turns_and_nothing_else(tokenizer):
    """For every length allowed: what is left is the longest that fits, found here by trying all cuts."""
    turns = ["Human: how do I cook rice?", "Assistant: With water.", "Human: and pasta?",
             "Assistant: Also so.", "Human: and if I have no water at all?\n\nAssistant:"]
    prompt, (start, end) = data.aligner_prompt("\n\n".join(turns), "Use milk.", [A, B])
    contexts = ["\n\n".join(turns[k:]) for k in range(len(turns))]
    prompts = [prompt[:start] + context + prompt[end:] for context in contexts]
    lengths = [len(data.encode_document(tokenizer, text, "Wait for rain.", 1, 2).ids) for text in prompts]
    whole = lengths[0]
    assert lengths == sorted(lengths, reverse=True)
    for allowed in range(whole + 1):
        document = data.encode_document(tokenizer, prompt, "Wait for rain.", 1, 2, allowed, [start, end])
        fitting = [context for context, length in zip(contexts, lengths) if length <= allowed]
        if document is None:
            assert not fitting
            continue
        ids, count = list(document.ids), document.start
        text = tokenizer.decode(ids[1:count])
        assert len(ids) <= allowed and ids[0] == 1 and tokenizer.decode(ids[count:-1]) == "Wait for rain."
        assert text.startswith(prompt[:start]) and text.endswith(prompt[end:])
        left = text[start:len(text) - len(prompt) + end]
        assert left == fitting[0] if fitting else turns[-1].endswith(left) and left
    no_context = data.encode_document(tokenizer, prompt, "Wait for rain.", 1, 2, whole - 1)
    assert no_context is None


@pytest.mark.parametrize("context", ["word " * 20_000, "x" * 100_000])
def test_a_very_long_single_turn_keeps_its_end(context):
    prompt, span = data.aligner_prompt(context + "the end", "a", [A])
    document = data.encode_document(byte_level_tokenizer(), prompt, "b", 1, 2, 300, span)
    ids, count = list(document.ids), document.start
    assert 280 <= len(ids) <= 300
    assert byte_level_tokenizer().decode(ids[1:count]).endswith("the end" + prompt[span[1]:])


def test_many_pairs_are_encoded_as_one_by_one_and_those_left_out_are_counted(tokenizer):
    rows = list(data.reformulate(random_rated(random.Random(4), rows=150), [A, B, C, D]))[:1500]
    rows += [{"prompt": "p", "completion": "long " * 200}, {"prompt": "long " * 200, "completion": "c"}]
    one_by_one = [data.encode_document(tokenizer, row["prompt"], row["completion"], 1, 2, 130, row.get("context"))
                  for row in rows]
    examples, dropped = data.encode_examples(tokenizer, iter(rows), 1, 2, 130)
    assert examples == [data.Example([document]) for document in one_by_one if document]
    assert {example.label for example in examples} == {1.0}
    assert dropped == one_by_one.count(None) >= 2 and len(examples) + dropped == len(rows)


def test_preferences_become_two_documents_with_a_label(tokenizer):
    """One that is too long on either side is dropped, and both sides are as they would be alone."""
    def row(response_a, response_b, p_a):
        return formats.preference("why?", response_a, response_b, "overall", p_a)
    rows = [row("yes", "no", 0.7), row("long " * 200, "no", 0.1), row("no", "long " * 200, 0.1), row("a", "bc", 0.0)]
    examples, dropped = data.encode_examples(tokenizer, rows * 600, 1, 2, 130)
    assert dropped == 1200 and examples[2:4] == examples[:2] and len(examples) == 1200
    assert [example.label for example in examples[:2]] == [0.7, 0.0]
    for example, texts in zip(examples[:2], [("yes", "no"), ("a", "bc")]):
        assert example.documents == [data.encode_document(tokenizer, "why?", text, 1, 2) for text in texts]


def test_a_stray_column_p_a_makes_no_preference_of_a_completion(tokenizer):
    """Rows of mixed kinds are told apart one by one."""
    pair = {"prompt": "why?", "completion": "because", "p_a": 0.3, "response_a": "x", "response_b": "y"}
    rows = [pair, formats.preference("why?", "x", "y", "overall", 0.3), {"prompt": "", "completion": "text"}]
    examples, dropped = data.encode_examples(tokenizer, rows, 1, 2)
    assert [len(example.documents) for example in examples] == [1, 2, 1] and dropped == 0
    assert examples[0] == data.Example([data.encode_document(tokenizer, "why?", "because", 1, 2)], label=1.0)
    assert examples[1].label == 0.3 and data.is_held_out(pair, 1.0)


# ----------------------------------------------------------------------------------------------------------------
# The command line


RATED = {"prompt": "why?", "responses": [response("yes", helpful=2, honest=1),
                                         response("no", helpful=1, honest=0)]}


def test_reformulate_and_show(tmp_path):
    path, out = write(tmp_path / "r.jsonl", RATED, RATED), tmp_path / "new" / "pairs.jsonl.gz"
    result = run("reformulate", path, path, "--out", out, "--seed", 7)
    assert result.returncode == 0, result.stderr
    table = [row.split() for row in result.stdout.splitlines()[1:]]
    assert table == [["2", "all"], ["better", "4", "4"], ["equal", "0", "0"]]
    objectives = [data.OBJECTIVES["helpful"], data.OBJECTIVES["honest"]]
    assert list(formats.read_pairs(out)) == list(data.reformulate([RATED] * 4, objectives, data.Pairing(seed=7)))
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


def test_show_takes_labels_kto_and_examples_that_have_odd_keys(tmp_path):
    label = formats.preference("q", "x", "y", "tone", 0.25)
    for row, words in ((label, "1: tone 0.25\nx"),
                       ({"prompt": "q", "completion": "x", "label": False}, "1: chosen 0\nx"),
                       ({"prompt": "q", "completion": "x", "responses": 5, "\x1b[2J": "z"}, "responses\n5")):
        shown = run("show", write(tmp_path / "r.jsonl", row))
        assert shown.returncode == 0 and words in shown.stdout and "\x1b" not in shown.stdout, shown


def test_values_that_only_parquet_has_are_shown_too():
    assert data.printable([datetime.date(2024, 1, 2), b"x"]) == '["2024-01-02", "b\'x\'"]'


def limit_file_size():
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


@pytest.mark.parametrize("arguments, message, options", [
    (["reformulate", "absent.jsonl", "--out", "o"], "absent.jsonl: no such file", {}),
    (["reformulate", "folder", "--out", "o"], "folder: is a folder", {}),
    (["reformulate", "bad.jsonl", "--out", "o"], "bad.jsonl:2: invalid JSON", {}),
    (["reformulate", "good.jsonl", "--out", "good.jsonl"], "another --out", {}),
    (["reformulate", "good.jsonl", "--out", "folder/../good.jsonl"], "another --out", {}),
    (["reformulate", "good.jsonl", "--out", "folder"], "another --out", {}),
    (["reformulate", "good.jsonl", "--out", "good.jsonl/o"], "good.jsonl: ", {}),
    (["reformulate", "good.jsonl", "--out", "o", "--objectives", "fairr"], "the nearest known: fair", {}),
    (["reformulate", "good.jsonl", "--out", "o", "--template", "bad.jsonl"], "bad.jsonl:2: invalid JSON", {}),
    (["reformulate", *["good.jsonl"] * 90, "--out", "o"], "o: File too large",
     {"preexec_fn": limit_file_size}),
    (["show", "bad.jsonl"], "bad.jsonl:2: invalid JSON", {}),
])
def test_bad_commands_are_one_line_status_2_and_write_nothing(tmp_path, arguments, message, options):
    (tmp_path / "folder").mkdir()
    good = write(tmp_path / "good.jsonl", RATED).read_bytes()
    (tmp_path / "bad.jsonl").write_bytes(good + b"{\n")
    result = run(*arguments, cwd=tmp_path, **options)
    assert result.returncode == 2
    assert_one_line(result.stderr, message)
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "good.jsonl", "bad.jsonl"}
    assert (tmp_path / "good.jsonl").read_bytes() == good


@pytest.mark.parametrize("arguments", [
    ["reformulate", "r.jsonl", "--out", "o", "--margin", "-1"],
    ["reformulate", "r.jsonl", "--out", "o", "--margin", "nan"], ["show", "r.jsonl", "--number", "-1"]])
def test_numbers_out_of_range_are_refused(tmp_path, arguments):
    write(tmp_path / "r.jsonl", RATED)
    result = run(*arguments, cwd=tmp_path)
    message = result.stderr.splitlines()[-1]
    assert result.returncode == 2 and arguments[-2] in message and "must be at least 0" in message
    assert [path.name for path in tmp_path.iterdir()] == ["r.jsonl"]


def test_a_closed_pipe_is_no_traceback(tmp_path):
    path = write(tmp_path / "r.jsonl", *[RATED] * 5000)
    process = subprocess.Popen([sys.executable, str(SCRIPT), "show", str(path), "-n", "5000"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.stdout.close()
    assert_one_line(process.stderr.read(), "closed")
    assert process.wait() == 2


def test_an_answer_of_100_000_characters_goes_all_the_way(tmp_path):
    long = "word " * 20_000
    answers = [response(long, helpful=1), response("x", helpful=0)]
    path = write(tmp_path / "r.jsonl", {"prompt": "q", "responses": answers})
    assert run("reformulate", path, "--out", tmp_path / "o.jsonl").returncode == 0
    assert [row["completion"] for row in formats.read_pairs(tmp_path / "o.jsonl")] == [long]


def test_help_needs_neither_torch_nor_numpy():
    code = "import sys, data; print(sorted({'torch', 'numpy', 'tokenizers'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=SCRIPT.parent)
    assert result.stdout.strip() == "[]"
