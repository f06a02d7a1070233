"""What `make train` does with answers once its models are trained (the training itself is tested in test_train.py)."""
import dataclasses
import json
import random
from types import SimpleNamespace

import pytest
import torch

import data
import eval as evaluation
import formats
import measure
import resume
import story
import toy
import train
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


def test_a_folder_belongs_to_one_seed_one_recipe_and_one_process_at_a_time(tmp_path, monkeypatch, capsys):
    told = []
    monkeypatch.setattr(story, "story", lambda out, seed, device, options: told.append((seed, options.width)))
    words = ["--out", tmp_path / "run", "--device", "cpu", "--seed"]
    assert [run(story, monkeypatch, [*words, 1]) for _ in range(2)] == [0, 0]
    refused(story, monkeypatch, capsys, [*words, 2], "run: holds a run with other seed (1, now 2)")
    refused(story, monkeypatch, capsys, [*words, 1, "--width", 64], "holds a run with other width (192, now 64)")
    refused(story, monkeypatch, capsys, [*words, 1, "--quick"], "holds a run with other ")
    refused(story, monkeypatch, capsys, [*words, 1, "--width", 100], "--width 100", "give 64")
    assert run(story, monkeypatch, [*words, 1, "--best-of", 8, "--prompts", 5]) == 0  # of the same models, other edits
    assert told == [(1, 192)] * 3 and resume.read_run(tmp_path / "run")["ended"]
    monkeypatch.setattr(story, "story", lambda *_: refused(story, monkeypatch, capsys, [*words, 1], "another process"))
    assert run(story, monkeypatch, [*words, 1]) == 0


def test_the_recipe_is_what_it_was_and_another_is_said_to_be_one(tmp_path, monkeypatch, capsys):
    """The sizes and steps of RESULTS.md's figures."""
    assert story.FOUNDATION == dict(model_type="qwen3", hidden_size=192, intermediate_size=512, num_hidden_layers=4,
                                    num_attention_heads=6, num_key_value_heads=3, tie_word_embeddings=True,
                                    bos_token_id=0, eos_token_id=1, max_position_embeddings=1024)
    small = {name: value for name, value in story.shape_of(96, 2).items() if value != story.FOUNDATION[name]}
    assert small == dict(hidden_size=96, intermediate_size=256, num_hidden_layers=2, num_attention_heads=3)
    assert story.STEPS == {"identity": 40, "equal": 10, "better": 880, "contrast": 160}
    assert story.READING == {"words": 240, "texts": 720}
    training = story.RECIPE.training(5)
    assert (training.lr, training.batch, training.seed, training.weight_decay, training.max_steps) == (
        1e-2, 32, 5, 0.01, 0)
    assert (training.optimizer, story.RECIPE.policy_lr, story.RECIPE.aligner_lr) == ("muon", 3e-3, 3e-3)
    assert story.told_otherwise(story.RECIPE) == ""
    assert "better_steps 7 (880)" in story.told_otherwise(story.Options(better_steps=7))
    assert "it shows nothing" in story.told_otherwise(story.Options(**story.QUICK))
    found = []
    monkeypatch.setattr(story, "story", lambda out, seed, device, options: found.append((out.name, options)))
    monkeypatch.chdir(tmp_path)
    assert run(story, monkeypatch, ["--quick", "--device", "cpu", "--prompts", 3]) == 0
    assert found == [("quick", story.Options(**{**story.QUICK, "prompts": 3}))]
    assert "Not the recipe's options" in capsys.readouterr().out
    assert story.Options(equal_steps=0).steps == {"identity": 40, "better": 880, "contrast": 160}


TWO = dict(layers=1, width=64, word_steps=2, text_steps=2, small_steps=2, large_steps=2, identity_steps=2,
           equal_steps=2, better_steps=2, contrast_steps=2, questions=80, prompts=3)


@pytest.fixture
def short(monkeypatch):
    """Two steps of every training, few texts to make a tokenizer of, and three questions to each policy."""
    monkeypatch.setattr(toy, "pretraining_texts", lambda count, *words, texts=toy.pretraining_texts, **more:
                        texts(min(count, 800), *words, **more))
    return story.Options(**TWO)


@pytest.mark.slow
def test_the_story_from_end_to_end(short, tmp_path, capsys):
    story.story(tmp_path, 0, torch.device("cpu"), short)
    printed = capsys.readouterr().out
    assert all(name in printed for name in [*toy.POLICIES, *toy.NAMED, "mention a word never read"])
    assert all(line in printed for line in [*measure.FIGURES, "net, words never read", "net, combinations never read"])
    found = json.loads((tmp_path / "results.json").read_text())
    assert list(found) == [*toy.POLICIES, "editor", "summary"] and list(found["editor"]) == [*toy.POLICIES, "mean"]
    for policy in toy.POLICIES:
        rows = list(formats.read_aligned(tmp_path / "aligned" / f"{policy}.jsonl"))
        assert len({row["prompt"] for row in rows}) <= 3 <= len(rows) / 3
        assert found[policy]["rows"] == len(rows) and found[policy]["objectives"]["helpful"]["n"] == 3
        assert found["editor"][policy]["all"]["kept"]["n"] >= len(rows)
    nothing = found["summary"]["all nine: copy: nothing done"]
    assert nothing["kept"]["mean"] == 100 and nothing["net"]["mean"] == 0 and nothing["win"]["n"] == 15
    assert "one of the nine: edits, asked for another" in found["summary"]
    assert not any("all nine: edits, asked for" in name for name in found["summary"])
    chart = (tmp_path / "story.svg").read_text(encoding="utf-8")
    assert all(f">{name}</text>" in chart for name in [*toy.NAMED, "mention a word never read"])
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == len(toy.POLICIES) + 8 and "What was asked for, and what was not: small" in page
    assert all(f"How the loss fell: {what}" in page for what in ("supervised, better", "aligner, contrast"))
    assert "Not the recipe&#x27;s options" in page
    assert "foundation, no answer seen" in page and "Not the recipe's options" in printed


def test_the_foundation_writes_without_having_seen_the_answer(items):
    """It is told question and objectives, in the form of the texts that it has read."""
    seen = []

    class Foundation:
        def encode(self, prompt, new_tokens):
            seen.append(prompt)
            return [len(seen)]

        def write(self, ids, new_tokens, rows):
            return [(place, f" text {number}\n\nHuman: Please say that again.") for place, (number,) in
                    reversed(list(enumerate(ids)))]
    some = items[:9]
    found = story.alone(Foundation(), some)
    assert [item["aligned"] for item in found] == [f"text {number + 1}" for number in range(9)]
    for item, prompt in zip(some, seen):
        assert item["original"] not in prompt and prompt.endswith(item["prompt"])
        assert prompt.startswith("The answer: ") and all(o.description in prompt for o in item["objectives"])


def test_a_step_takes_as_many_steps_as_it_is_given_of_pairs_again_and_again(tmp_path, monkeypatch):
    options = dataclasses.replace(story.RECIPE, batch=4, replay=0.5)
    prepared, rows = {}, [{"prompt": str(number)} for number in range(7)]
    method = dataclasses.replace(train.METHODS["better"], rows=lambda *_: list(rows))
    monkeypatch.setitem(train.METHODS, "better", method)
    monkeypatch.setattr(story.checkpoint, "load_tokenizer", lambda folder: None)
    monkeypatch.setattr(story.checkpoint, "load", lambda base, device: SimpleNamespace(config=None))
    monkeypatch.setattr(train, "prepare", lambda name, rows, *_: prepared.setdefault(name, rows))
    monkeypatch.setattr(train, "train", lambda *_, **__: None)
    story.train_aligner(tmp_path, "base", "pairs", ["text"], 0, "cpu", {"better": 10}, options)
    assert len(prepared["better"]) == 20 and {row["prompt"] for row in prepared["better"]} == set("0123456")
    assert prepared["better"][:7] == prepared["better"][7:14] and sorted(map(str, prepared["better"][:7])) == sorted(
        map(str, rows))


@pytest.mark.slow
def test_a_story_told_again_trains_only_what_would_be_another_model(short, tmp_path, capsys, monkeypatch):
    def trained(options=short):  # the story up to its answers
        device, foundation = torch.device("cpu"), tmp_path / "foundation"
        texts = story.pretrain(tmp_path, 0, device, options.reading, options.shape, options=options)
        story.train_policies(tmp_path, foundation, 0, device, options)
        story.train_aligner(tmp_path, foundation, pairs, texts, 0, device, options.steps, options)
        said = capsys.readouterr().out
        return {name for name in PARTS if f"{tmp_path / name}: finished already" not in said}, said
    PARTS = ["foundation", "small", "large", "supervised", "aligner"]
    pairs = story.write_pairs(tmp_path, 0, questions=short.questions)
    assert trained()[0] == set(PARTS) and trained()[0] == set()
    monkeypatch.setattr(toy, "answer", lambda *args, answer=toy.answer: answer(*args) + " Indeed.")  # the data changes
    again, said = trained()
    assert again == {"small", "large"} and f"{tmp_path / 'large'}: was made with other data; made anew" in said
    again, said = trained(dataclasses.replace(short, text_steps=3))
    assert again == {"foundation", "large", "supervised", "aligner"}  # "small" starts from nothing
    assert "foundation: was made with other data; made anew" in said and "supervised: was made with other" in said
    again, said = trained(dataclasses.replace(short, text_steps=3, aligner_lr=1e-4))
    assert again == {"supervised", "aligner"}
    assert "supervised: was made with other lr (0.003, now 0.0001); made anew" in said
    again, said = trained(dataclasses.replace(short, text_steps=3, aligner_lr=1e-4, contrast_lr=1e-3))
    assert again == {"aligner"} and "aligner: was made with other lr (0.0003, now 0.001); made anew" in said
