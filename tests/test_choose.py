"""The edit that was asked for: scores against whole texts through the model, what is chosen against trying all."""
import json
import random
import shutil
import time
from collections import Counter

import pytest
import torch

import align
import choose
import data
import toy
import writers
from choose import Choice
from conftest import refused, run
from model import logits
from objectives import Objective
from test_align import command, read
from test_align import world as untrained  # noqa: F401  (a fixture)

ASKED = [Objective("brevity", "The response should be short.")]


@pytest.fixture(scope="module")
def world(untrained, tmp_path_factory):  # noqa: F811
    """The untrained models, but one token of six ends a text, so that there are texts of some tokens."""
    folder = tmp_path_factory.mktemp("ending") / "world"
    shutil.copytree(untrained, folder)
    path = folder / "aligner" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "eos_token_id": list(range(1, config["vocab_size"], 6))}), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def writer(world):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writers, "computes_bf16", lambda device: False)
        yield writers.Writer(world / "aligner", "cpu")


@pytest.fixture(scope="module")
def items():
    rng = random.Random(0)
    prompts = [toy.question(rng)[0] for _ in range(7)]
    return [{"index": place, "prompt": prompt, "original": toy.answer("verbose", prompt, rng), "objectives": ASKED}
            for place, prompt in enumerate(prompts)]


def logprob(writer, item, objectives, ids):
    """log p(ids | the aligner's prompt), the plain way."""
    text, _ = data.aligner_prompt(item["prompt"], item["original"], objectives)
    prompt = [0] + writer.tokenizer.encode(text).ids
    with torch.no_grad():
        rows = logits(writer.llama, torch.tensor([prompt + ids]))[0].double().log_softmax(-1)
    return sum(float(rows[len(prompt) + i - 1, token]) for i, token in enumerate(ids))


def edited(writer, items, choice, **more):
    options = {"max_new_tokens": 120, "batch": 4, "seed": 3, **more}
    return {row["index"]: row["aligned"] for row in align.align(writer, items, None, choice=choice, **options)}


def found_by(writer, items, count, **more):
    """choose.candidates of each item, as align has them written."""
    kept, candidates = [], choose.candidates

    def watched(*words, **named):
        found = candidates(*words, **named)
        kept.extend(found)
        return found
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choose, "candidates", watched)
        edited(writer, items, Choice(count), **more)
    return kept


@pytest.mark.parametrize("guidance, edit_cost", [(0.0, 0.0), (0.5, 0.0), (0.5, 8.0), (30.0, 0.0)])
def test_what_is_chosen_is_worth_most(writer, items, guidance, edit_cost):
    """By whole texts through the model; the objectives' prompt against one that names none."""
    chosen, compared = edited(writer, items, Choice(4, guidance, edit_cost)), 0
    assert (chosen != edited(writer, items, Choice(4, guidance, 0))) == (edit_cost > 0)
    for item, found in zip(items, found_by(writer, items, 4)):
        assert 2 <= len(found) <= 5 and item["original"] in found
        worth = {}
        for text, ids in found.items():
            given, free = (logprob(writer, item, objectives, ids) for objectives in (ASKED, []))
            old, new = (toy.sentences_of(words) for words in (item["original"], text))
            sentences = len(set(old) ^ set(new)) if text != item["original"] else 0
            worth[text] = given + guidance * (given - free) - edit_cost * sentences
        if len(set(old)) == len(old):
            compared += 1
            assert worth[chosen[item["index"]]] == pytest.approx(max(worth.values()), abs=1e-2)
    assert compared > 4


def test_the_first_candidate_is_the_likeliest_edit_and_the_last_the_answer(writer, items):
    plain, found = edited(writer, items, Choice()), found_by(writer, items, 5)
    for item, texts in zip(items, found):
        assert next(iter(texts)) == plain[item["index"]] and list(texts)[-1] == item["original"]
        for text, ids in texts.items():
            assert writer.tokenizer.decode(ids[:-1]).strip() == text and ids[-1] in writer.llama.config.stop_ids
    assert sum(map(len, found)) > 4 * len(items)  # drawn ones differ
    other = found_by(writer, items, 5, seed=4)
    assert [next(iter(texts)) for texts in other] == [next(iter(texts)) for texts in found] and other != found
    assert found_by(writer, items, 5) == found


def test_an_edit_that_comes_to_no_end_is_not_taken(writer, items):
    brief = [{**item, "original": "No."} for item in items]

    def written(**more):
        return [ids for texts in found_by(writer, brief, 2, **more) for ids in list(texts.values())[:-1]]
    whole = written()
    most = max(map(len, whole)) - 1
    short = written(max_new_tokens=most)
    assert 0 < len(short) < len(whole)
    assert all(len(ids) <= most and ids[-1] in writer.llama.config.stop_ids for ids in short)


def test_an_answer_that_no_edit_could_be_as_long_as_is_left_as_it_is(writer, items):
    length = max(len(list(found.values())[-1]) for found in found_by(writer, items, 2))  # of the longest answer
    for most in (length - 1, length):
        rows = {row["index"]: row for row in align.align(writer, items, None, choice=Choice(3, 0.5, 0), seed=3,
                                                         max_new_tokens=most)}
        left = [row for row in rows.values() if row.get("left_as_is")]
        assert len(left) == length - most and all(row["aligned"] == row["original"] for row in left)


def test_an_answer_is_scored_as_an_edit_that_says_the_same(writer, items):
    """After a space where edits begin with one: " A" and "A" are other tokens."""
    kinds = Counter()
    for item, found in zip(items, found_by(writer, items, 2)):
        *edits, answer = [writer.tokenizer.decode(ids[:-1]) for ids in found.values()]
        spaced = any(text.startswith(" ") for text in edits)
        assert answer == " " * spaced + item["original"]
        kinds[spaced] += 1
    assert kinds[True] and kinds[False]


def test_what_stands_around_an_answer_that_is_kept_stays(writer, items):
    padded = [{**item, "original": f"  {item['original']}\n"} for item in items]
    dear = edited(writer, padded, Choice(4, 0.5, 1000))
    assert dear == {item["index"]: item["original"] for item in padded}


def test_a_text_is_drawn_by_its_own_seed_and_not_by_its_neighbours(writer, items):
    together = edited(writer, items, Choice(4))
    for item in items:
        assert edited(writer, [item], Choice(4), batch=1) == {item["index"]: together[item["index"]]}


def test_where_a_changed_sentence_costs_too_much_every_answer_stays(writer, items):
    dear = edited(writer, items, Choice(4, 0.5, 1000))
    assert dear == {item["index"]: item["original"] for item in items}
    cheap = edited(writer, items, Choice(4, 0.5, 0))
    assert sum(cheap[item["index"]] != item["original"] for item in items) > 3


def test_one_edit_is_the_one_that_is_written_without_a_choice(writer, items):
    assert edited(writer, items, Choice(1, 30, 30)) == edited(writer, items, Choice())


def test_rounds_choose_anew_among_edits_of_the_last_one(writer, items):
    first, seen, write = edited(writer, items, Choice(3, 2, 0)), [], choose.write
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choose, "write", lambda *words, **named: seen.append(words[2]) or write(*words, **named))
        second = edited(writer, items, Choice(3, 2, 0), rounds=2)
    assert seen == [[item["original"] for item in items], [first[item["index"]] for item in items]]
    assert second != first
    again = edited(writer, [{**item, "original": first[item["index"]]} for item in items], Choice(3, 0, 1000))
    assert again == first


def test_document_logprobs_are_those_of_each_text_alone(writer):
    rng = random.Random(1)
    documents = [data.Document([0, *(rng.randrange(4, 200) for _ in range(rng.randrange(6, 60)))], start)
                 for start in (1, 3, 5, 2, 4)]
    found = choose.document_logprobs(writer.llama, documents, micro_tokens=70)
    for document, total in zip(documents, found):
        with torch.no_grad():
            rows = logits(writer.llama, torch.tensor([document.ids]))[0].double().log_softmax(-1)
        by_hand = sum(float(rows[i - 1, document.ids[i]]) for i in range(document.start, len(document.ids)))
        assert total == pytest.approx(by_hand, abs=1e-3)
    assert choose.document_logprobs(writer.llama, []) == []


def test_changed_counts_what_is_taken_out_and_what_is_put_in():
    text = "Boil water. Add the tea! Is it dark? Wait"
    assert choose.changed(text, text) == 0
    assert choose.changed(text, "Boil water. Is it dark? Wait") == 1
    assert choose.changed(text, f"{text}. Smile.") == 3  # "Wait" is "Wait." now
    assert choose.changed(text, "Add the tea! Boil water. Is it dark? Wait") == 2
    assert choose.changed("", "A. B.") == 2 and choose.changed("A. B.", "") == 2
    assert choose.changed("a. b. c. d. e.", "d. e. a. x. b. y. c.") == 6  # a, b, c stay
    assert choose.changed("- salt\n- oil\n- rice", "- salt\n- rice") == 1
    assert choose.changed("一。二。三。四。", "一。四。") == 2


def test_no_edit_is_written_of_an_answer_that_is_too_long(writer, items, monkeypatch):
    asked, ids = [], writers.Writer.ids
    monkeypatch.setattr(writers.Writer, "ids", lambda self, prompts, *rest, **more:
                        asked.append(len(prompts)) or ids(self, prompts, *rest, **more))
    long = {**items[0], "original": items[0]["original"] * 5}
    found = edited(writer, [items[1], long, items[2]], Choice(3))
    assert asked == [2, 2, 2] and found.pop(0) == long["original"]
    assert found == edited(writer, items[1:3], Choice(3))
    assert edited(writer, [long], Choice(3)) == {0: long["original"]}, "none is left"


def test_a_run_of_blanks_is_no_long_work():
    began = time.perf_counter()
    assert choose.changed("One." + " " * 50_000 + "two \n\n three", "One. two\nthree") == 0
    assert time.perf_counter() - began < 1


# ----------------------------------------------------------------------------------------------------------------
# The command


def test_an_old_choice_is_not_given_for_a_new_one(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(writers, "computes_bf16", lambda device: False)
    out = tmp_path / "out.jsonl"
    assert run(align, monkeypatch, command(world, out)) == 0
    plain = read(out)
    assert run(align, monkeypatch, command(world, out, "--best-of", 3, "--edit-cost", 500)) == 0
    assert [row["aligned"] for row in read(out)] == [row["original"] for row in plain]
    assert run(align, monkeypatch, command(world, out, "--best-of", 3, "--edit-cost", 0)) == 0
    assert [row["aligned"] for row in read(out)] != [row["original"] for row in plain]

    def killed(*words):
        raise KeyboardInterrupt
    other = tmp_path / "other.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(align, "write_rows", killed)
        assert run(align, patch, command(world, other, "--best-of", 3, "--edit-cost", 500)) != 0
    assert not other.exists()
    refused(align, monkeypatch, capsys, command(world, other, "--best-of", 3, "--edit-cost", 0), "other settings")
    assert run(align, monkeypatch, command(world, other, "--best-of", 3, "--edit-cost", 500)) == 0
    assert [row["aligned"] for row in read(other)] == [row["original"] for row in plain]


@pytest.mark.parametrize("extra, said", [
    (("--guidance", 1), "--guidance needs --best-of"), (("--edit-cost", 1, "--best-of", 1), "needs --best-of 2"),
    (("--best-of", 0), "--best-of"), (("--best-of", 3, "--guidance", -1), "--guidance"),
])
def test_refusals(world, tmp_path, monkeypatch, capsys, extra, said):
    refused(align, monkeypatch, capsys, command(world, tmp_path / "out.jsonl", *extra), said)
    server = ["--model", "http://127.0.0.1:9", "--model-name", "m", "--data", world / "answers.jsonl", "--best-of", 2]
    refused(align, monkeypatch, capsys, server, "--best-of")


def test_objectives_of_the_template_are_named_in_one_prompt_and_in_the_other_none(writer, items, monkeypatch):
    seen, ids = [], writers.Writer.encode
    monkeypatch.setattr(writers.Writer, "encode", lambda self, text, *rest: seen.append(text) or ids(self, text, *rest))
    edited(writer, items[:1], Choice(2))
    assert len(seen) == 2 and "The response should be short." in seen[0] and "should be short" not in seen[1]
    assert seen[0].replace("The response should be short.", "") == seen[1]
