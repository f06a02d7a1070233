"""What `make train` does with answers once its models are trained (the training itself is tested in test_train.py)."""
import dataclasses
import functools
import json
import random

import pytest
import torch

import data
import eval as evaluation
import formats
import measure
import resume
import story
import toy
import wordings
from conftest import refused, run, write

JOKE = toy.SENTENCES["joke"][0]
WISHES = [kind for kind in story.JUDGED if kind != "all nine"]


@pytest.fixture(scope="module")
def items():
    rng = random.Random(0)
    prompts = [toy.question(rng)[0] for _ in range(60)]
    answers = [toy.answer("verbose", prompt, rng) for prompt in prompts]
    return list(measure.requests("verbose", prompts, answers, 0))


@pytest.fixture
def joking(items, monkeypatch):
    """The items, edited by an aligner that appends one joke, and so improves on humour and on nothing else; it is done
    with the last ones first."""
    def align(aligner, items, objectives, **_):
        assert objectives is None and all(item["objectives"] for item in items)
        return [{**item, "aligned": f"{item['original']} {JOKE}"} for item in reversed(list(items))]
    monkeypatch.setattr(story, "align", align)
    return story.edit(None, items, 0)


def test_edits_come_in_the_order_of_what_was_asked(items, joking):
    assert [{key: item[key] for key in items[0]} for item in joking] == items
    assert all(item["aligned"] == f"{item['original']} {JOKE}" for item in joking)


def test_judging_pools_wishes_of_a_kind_and_agrees_with_the_scorers(items, joking):
    rows, result = story.judge(joking, 0)
    judged = [item for item in items if item["kind"] in story.JUDGED]
    nine = [item for item in judged if item["kind"] == "all nine"]
    without = [item for item in nine if toy.score("humour", item["prompt"], item["original"]) == 0]
    figures = result["objectives"]
    assert list(figures) == [*toy.NAMED, *WISHES, "intact"] and result["rows"] == len(rows) == len(judged)
    assert [figures[name]["n"] for name in toy.NAMED] == [60] * 9 and figures["intact"]["n"] == len(judged)
    assert figures["humour"]["wins"] == len(without) == figures["humour"]["room_n"] and not figures["humour"]["losses"]
    for kind in WISHES:
        assert figures[kind]["n"] == len([item for item in judged if item["kind"] == kind]) == figures[kind]["ties"]
    before = [(toy.score("helpful", row["prompt"], row["original"]), toy.score("helpful", row["prompt"], row["golden"]))
              for item, row in zip(judged, rows) if item["kind"] == "all nine"]
    wins = sum((ours > golden) + 0.5 * (ours == golden) for ours, golden in before)
    assert figures["helpful"]["win_rate_original"] == pytest.approx(100 * wins / 60)
    assert figures["helpful"]["net"] == 0 == figures["mention a word never read"]["net"]


def test_golden_answers_mention_what_is_asked_for_half_the_time(items, joking):
    rows, result = story.judge(joking, 0)
    judged = [item for item in items if item["kind"] in WISHES]
    golden = [row["golden"] for row in rows if not row["objectives"][0].startswith(tuple(toy.NAMED))]
    said = [toy.mentions(text, wordings.parts(item["names"][0])[1][0]) for item, text in zip(judged, golden)]
    assert len(golden) == len(judged) > 100 and 0.35 < sum(said) / len(said) < 0.65
    assert story.judge(joking, 0) == (rows, result) and story.judge(joking, 1)[0] != rows


def test_eval_finds_in_the_files_what_the_story_found(joking, tmp_path, monkeypatch):
    rows, result = story.judge(joking, 0)
    path = write(tmp_path / "verbose.jsonl", *rows)
    assert run(evaluation, monkeypatch, [path, "--out", tmp_path / "out"]) == 0
    assert json.loads((tmp_path / "out" / "eval.json").read_text()) == {"verbose": result}
    assert "mention a word never read" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    words = [path, "--out", tmp_path / "out", "--objectives", "intact", "topic: mention mammoths"]
    assert run(evaluation, monkeypatch, words) == 0
    found = json.loads((tmp_path / "out" / "eval.json").read_text())["verbose"]["objectives"]
    assert found["intact"] == result["objectives"]["intact"] and found["topic"]["n"] == len(rows)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    story.write_pairs(folder, 0, questions=150)
    return folder


def test_the_aligners_pairs_hold_nothing_that_is_held_out(pairs):
    rows = list(formats.read_pairs(pairs / "pairs.jsonl"))
    parts = [wordings.parts(name) for row in rows for name in row["objectives"]]
    assert {verb for verb, _ in parts} <= {*toy.NAMED, *wordings.TRAINED_VERBS} and len(rows) > 300
    words = {slot for _, slots in parts for slot in slots if not slot.isdigit()}
    assert not words & set(wordings.HELD_OUT_WORDS)
    assert words & set(wordings.TRAINED_WORDS) and words - set(wordings.TRAINED_WORDS)  # real and made-up ones
    rated = (pairs / "rated.jsonl").read_text()
    assert not any(toy.mentions(rated, word) for word in wordings.HELD_OUT_WORDS)
    assert {row["relation"] for row in rows} == {"better", "equal", "keep"}


def told(row):
    """The wishes that a pair's prompt names."""
    return row["prompt"].partition(": ")[2].partition("\n\n")[0]


def test_pairs_are_made_as_they_are_asked_for(pairs, tmp_path):
    whole = (pairs / "pairs.jsonl").read_bytes()
    assert story.write_pairs(tmp_path / "same", 0, questions=150).read_bytes() == whole
    assert story.write_pairs(tmp_path / "other", 1, questions=150).read_bytes() != whole
    prompts = [[json.loads(line)["prompt"] for line in open(folder / "rated.jsonl", encoding="utf-8")]
               for folder in (pairs, tmp_path / "same", tmp_path / "other")]
    assert prompts[0] == prompts[1] != prompts[2]
    paper = story.write_pairs(tmp_path / "paper", 0, data.Pairing(), 50, words=["owls", "kites"], made_up=0.0)
    rows = list(formats.read_pairs(paper))
    assert {row["relation"] for row in rows} == {"better", "equal"}
    words = {slot for row in rows for name in row["objectives"] for slot in wordings.parts(name)[1]}
    assert {word for word in words if not word.isdigit()} == {"owls", "kites"}
    assert len({row["prompt"].partition("Question: ")[2].partition("Answer: ")[0] for row in rows}) <= 50


@pytest.mark.parametrize("worded", [True, False])
def test_objectives_are_worded_in_many_ways_or_in_one(tmp_path, worded):
    rows = formats.read_pairs(story.write_pairs(tmp_path, 0, questions=100, worded=worded))
    said = [(row["objectives"][0], told(row)) for row in rows if len(row["objectives"]) == 1]
    assert len(said) > 50 and all(wordings.meant(text) == name for name, text in said)
    first = [text == wordings.objective(name).description for name, text in said]
    assert sum(first) < 0.5 * len(said) if worded else all(first)


def test_a_folder_belongs_to_one_seed_and_to_one_process_at_a_time(tmp_path, monkeypatch, capsys):
    told = []
    monkeypatch.setattr(story, "story", lambda out, seed, device: told.append(seed))
    words = ["--out", tmp_path / "run", "--device", "cpu", "--seed"]
    assert [run(story, monkeypatch, [*words, 1]) for _ in range(2)] == [0, 0]
    refused(story, monkeypatch, capsys, [*words, 2], "run: holds a run with other seed (1, now 2)")
    assert told == [1, 1] and resume.read_run(tmp_path / "run")["ended"]
    monkeypatch.setattr(story, "story", lambda *_: refused(story, monkeypatch, capsys, [*words, 1], "another process"))
    assert run(story, monkeypatch, [*words, 1]) == 0


@pytest.fixture
def short(monkeypatch):
    """The story with two steps of every training, few texts to make a tokenizer of, and three questions to each
    policy."""
    monkeypatch.setattr(toy, "pretraining_texts", lambda count, *words, texts=toy.pretraining_texts, **more:
                        texts(min(count, 800), *words, **more))
    monkeypatch.setattr(story, "pretrain", functools.partial(story.pretrain, steps=dict.fromkeys(story.READING, 2)))
    monkeypatch.setattr(story, "POLICY", dataclasses.replace(story.POLICY, max_steps=2))
    monkeypatch.setattr(story, "SMALL_STEPS", 2)
    monkeypatch.setattr(story, "write_pairs", functools.partial(story.write_pairs, questions=80))
    steps = dict.fromkeys(story.STEPS, 2)
    monkeypatch.setattr(story, "train_aligner", functools.partial(story.train_aligner, steps=steps))
    monkeypatch.setattr(story, "PROMPTS", 3)


@pytest.mark.slow
def test_the_story_from_end_to_end(short, tmp_path, capsys):
    story.story(tmp_path, 0, torch.device("cpu"))
    printed = capsys.readouterr().out
    assert all(name in printed for name in [*toy.POLICIES, *toy.NAMED, "mention a word never read"])
    assert all(line in printed for line in [*measure.FIGURES, "net, words never read", "net, held-out combinations"])
    found = json.loads((tmp_path / "results.json").read_text())
    assert list(found) == [*toy.POLICIES, "editor"] and list(found["editor"]) == [*toy.POLICIES, "mean"]
    for policy in toy.POLICIES:
        rows = list(formats.read_aligned(tmp_path / "aligned" / f"{policy}.jsonl"))
        assert len({row["prompt"] for row in rows}) <= 3 <= len(rows) / 3
        assert found[policy]["rows"] == len(rows) and found[policy]["objectives"]["helpful"]["n"] == 3
        assert found["editor"][policy]["all"]["kept"]["n"] >= len(rows)
    chart = (tmp_path / "story.svg").read_text(encoding="utf-8")
    assert all(f">{name}</text>" in chart for name in [*toy.NAMED, "mention a word never read"])
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == len(toy.POLICIES) and "What was asked for, and what was not: small" in page


@pytest.mark.slow
def test_a_story_told_again_trains_only_what_would_be_another_model(short, tmp_path, capsys, monkeypatch):
    def trained():  # the story up to its answers
        device, foundation = torch.device("cpu"), tmp_path / "foundation"
        texts = story.pretrain(tmp_path, 0, device)
        story.train_policies(tmp_path, foundation, 0, device)
        story.train_aligner(tmp_path / "aligner", foundation, pairs, texts, 0, device)
        said = capsys.readouterr().out
        return {name for name in PARTS if f"{tmp_path / name}: finished already" not in said}, said
    PARTS = ["foundation", "small", "large", "aligner"]
    pairs = story.write_pairs(tmp_path, 0)
    assert trained()[0] == set(PARTS) and trained()[0] == set()
    monkeypatch.setattr(toy, "answer", lambda *args, answer=toy.answer: answer(*args) + " Indeed.")  # the data changes
    again, said = trained()
    assert again == {"small", "large"} and f"{tmp_path / 'large'}: was made with other data; made anew" in said
    rate = story.PRETRAIN.lr
    monkeypatch.setattr(story, "PRETRAIN", dataclasses.replace(story.PRETRAIN, lr=1e-4))
    again, said = trained()
    assert again == {"foundation", "large", "aligner"}  # "small" starts from nothing
    assert f"foundation: was made with other lr ({rate}, now 0.0001)" in said
    assert "aligner: was made with other model" in said
