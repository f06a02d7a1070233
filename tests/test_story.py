"""What `make train` does with answers once its models are trained (the training itself is tested in test_train.py)."""
import dataclasses
import json
import random

import pytest
import torch

import eval as evaluation
import formats
import resume
import story
import toy
from conftest import refused, run, write
from eval import exact_judge, exact_room


@pytest.fixture(scope="module")
def items():
    rng = random.Random(0)
    prompts = [toy.question(rng)[0] for _ in range(60)]
    return list(story.requests(prompts, [toy.answer("verbose", prompt, rng) for prompt in prompts], 0))


def test_every_answer_is_asked_for_named_trained_and_held_out_objectives(items):
    asked = [name for item in items for name in item["names"]]
    assert set(toy.NAMED) <= set(asked)
    held_out = {name for item in items if item["kind"] == "held-out" for name in item["names"]} - set(story.KEPT)
    trained = {name for item in items if item["kind"] == "trained" for name in item["names"]} - set(story.KEPT)
    assert held_out <= set(toy.HELD_OUT) and trained <= set(toy.TRAINED) and held_out and trained
    for item in items:  # to mention what is not there yet would be no request; to avoid, only what is there
        for name in item["names"]:
            if name.startswith("avoid"):
                assert toy.score(name, item["prompt"], item["original"]) == 0
        assert [objective.name for objective in item["objectives"]] == item["names"]


def test_judging_pools_topics_and_agrees_with_the_scorers(items):
    rows = []  # an edit that appends one fixed joke, and so improves on humour and on nothing else
    for item in items:
        edited = item["original"] + " If it goes wrong, call it a tradition."
        rows.append({**item, "aligned": edited, "objectives": story.judged_objectives(item)})
    judge, room = exact_judge(toy.score, toy.name_of), exact_room(toy.score, toy.best, toy.name_of)
    figures = story.evaluate(rows, None, judge, 1, progress=False, room=room)["objectives"]
    named = [item for item in items if item["kind"] == "named"]
    without = [item for item in named if toy.score("humour", item["prompt"], item["original"]) == 0]
    assert figures["humour"]["n"] == len(named) and figures["humour"]["wins"] == len(without)
    assert figures["helpful"]["net"] == 0 == figures["mention a held-out topic"]["net"]
    assert figures["mention a held-out topic"]["n"] == len(named) and figures["intact"]["n"] == len(items)


def test_eval_finds_in_the_files_what_the_story_found(items, tmp_path, monkeypatch):
    def joking(_, items, *__, **___):
        return [{**item, "aligned": item["original"] + " If it goes wrong, call it a tradition."} for item in items]
    monkeypatch.setattr(story, "align", joking)
    rows, result = story.edit_and_judge(None, items, 0)
    path = write(tmp_path / "verbose.jsonl", *rows)
    assert run(evaluation, monkeypatch, [path, "--out", tmp_path / "out"]) == 0
    assert json.loads((tmp_path / "out" / "eval.json").read_text()) == {"verbose": result}
    assert "mention a held-out topic" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    words = [path, "--out", tmp_path / "out", "--objectives", "intact", "topic: mention mammoths"]
    assert run(evaluation, monkeypatch, words) == 0
    found = json.loads((tmp_path / "out" / "eval.json").read_text())["verbose"]["objectives"]
    assert found["intact"] == result["objectives"]["intact"] and found["topic"]["n"] == len(items)


def test_the_aligners_pairs_hold_no_held_out_topic(tmp_path):
    path = story.write_pairs(tmp_path, toy.TRAINED_TOPICS[:50], 0)
    names = {name for row in formats.read_pairs(path) for name in row["objectives"]}
    assert not names & set(toy.HELD_OUT)
    assert {name.partition("_")[2] for name in names - set(toy.NAMED)} == set(toy.TRAINED_TOPICS[:50])
    rated = (tmp_path / "rated.jsonl").read_text()
    assert not any(topic in rated for topic in toy.HELD_OUT_TOPICS)


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
    """The story with two steps of every training."""
    for name in ("WORDS", "PRETRAIN", "POLICY"):
        monkeypatch.setattr(story, name, dataclasses.replace(getattr(story, name), max_steps=2))
    monkeypatch.setattr(story, "SMALL_STEPS", 2)
    monkeypatch.setattr(story, "STEPS", {"identity": 2, "better": 2})
    monkeypatch.setattr(story, "PROMPTS", 3)


@pytest.mark.slow
def test_the_story_from_end_to_end(short, tmp_path, capsys):
    story.story(tmp_path, 0, torch.device("cpu"))
    printed = capsys.readouterr().out
    assert all(name in printed for name in [*toy.POLICIES, *toy.NAMED, "mention a held-out topic"])
    for policy in toy.POLICIES:
        rows = formats.read_aligned(tmp_path / "aligned" / f"{policy}.jsonl")
        assert len({row["prompt"] for row in rows}) <= 3 <= len(rows) / 3
    chart = (tmp_path / "story.svg").read_text(encoding="utf-8")
    assert all(f">{name}</text>" in chart for name in [*toy.NAMED, "mention X"])
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == len(toy.POLICIES) and "mention a held-out topic" in page


@pytest.mark.slow
def test_a_story_told_again_trains_only_what_would_be_another_model(short, tmp_path, capsys, monkeypatch):
    def trained():  # the story up to its answers
        device, foundation = torch.device("cpu"), tmp_path / "foundation"
        texts = story.pretrain(tmp_path, 0, device)
        story.train_policies(tmp_path, foundation, 0, device)
        story.train_aligner(tmp_path / "aligner", foundation, pairs, texts, 0, device)
        said = capsys.readouterr().out
        return {name for name in PARTS if f"{tmp_path / name}: finished already" not in said}, said
    PARTS = ["words", "foundation", "small", "large", "aligner"]
    pairs = story.write_pairs(tmp_path, toy.TRAINED_TOPICS[:20], 0)
    assert trained()[0] == set(PARTS) and trained()[0] == set()
    monkeypatch.setattr(toy, "answer", lambda *args, answer=toy.answer: answer(*args) + " Indeed.")  # the data changes
    again, said = trained()
    assert again == {"small", "large"} and f"{tmp_path / 'large'}: was made with other data; made anew" in said
    monkeypatch.setattr(story, "WORDS", dataclasses.replace(story.WORDS, lr=1e-4))
    again, said = trained()
    assert again == {"words", "foundation", "large", "aligner"}  # "small" starts from nothing
    assert "words: was made with other lr (0.0015, now 0.0001)" in said
    assert "foundation: was made with other model" in said


@pytest.mark.slow
def test_the_ablation_measures_every_count_on_the_same_answers(short, tmp_path, monkeypatch):
    story.ablation(tmp_path, [5, 10], 0, torch.device("cpu"))
    rows = [json.loads(line) for line in open(tmp_path / "topics.jsonl", encoding="utf-8")]
    held_out = [(row["topics"], row["n"]) for row in rows if row["objective"] == "mention a held-out topic"]
    assert [topics for topics, _ in held_out] == [5, 10] and held_out[0][1] == held_out[1][1] > 0
    for count in (5, 10):
        pairs = formats.read_pairs(tmp_path / f"topics-{count}-0" / "pairs.jsonl")
        names = {name.partition("_")[2] for row in pairs for name in row["objectives"]} - {""}
        assert len(names & set(toy.TOPICS)) == count
    story.ablation(tmp_path, [10], 0, torch.device("cpu"))  # as after a kill: no row twice, and none is lost
    again = [json.loads(line) for line in open(tmp_path / "topics.jsonl", encoding="utf-8")]
    assert again == rows
    monkeypatch.setattr(story, "code_of", lambda script: {"story": "edited"})
    story.ablation(tmp_path, [10], 0, torch.device("cpu"))
    again = [json.loads(line) for line in open(tmp_path / "topics.jsonl", encoding="utf-8")]
    assert {row["topics"] for row in again} == {10}  # what other code has measured is not beside it
