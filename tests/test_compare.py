"""The comparison of rivals: its figures on hand-made answers, the rivals at a tiny size, and the whole command."""
import itertools
import json
import math
import random
import re
import statistics
from dataclasses import asdict, replace
from functools import partial
from html import escape

import pytest
import torch
from tokenizers import Tokenizer

import checkpoint
import combine
import compare
import formats
import methods
import model
import ppo
import report
import rivals
import story
import toy
import train
import wordings
from align import Writer
from common import code_of
from compare import hypervolume, shown
from conftest import refused, run
from rivals import BRIEF, OBJECTIVES, RIVALS, UNSEEN, Entry, World

EGG, TEA = (f"\n\nHuman: How do I {task}?\n\nAssistant:" for task in ("boil an egg", "brew a pot of tea"))
SHAPE = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
SIZE = dict(reading={"texts": 2}, practice=3, questions=30, prompts=4)
STEPS = 2


# ----------------------------------------------------------------------------------------------------------------
# Hypervolume


def cells(points, corner, end):
    """How many squares of a unit grid from corner to end whole points dominate, counted one by one."""
    squares = itertools.product(range(corner, end), repeat=2)
    return sum(any(x > i and y > j for x, y in points) for i, j in squares)


def test_hypervolume_is_the_area_counted_square_by_square():
    rng = random.Random(0)
    for count in [0, 1, 2, 3, 5, 8] * 5:
        points = [(rng.randint(-6, 6), rng.randint(-6, 6)) for _ in range(count)]
        assert hypervolume(points, -3) == cells(points, -3, 6), points


def test_hypervolume_of_simple_cases():
    assert hypervolume([(0, 0)], -3) == 9 and hypervolume([(1, 2), (2, 1)], 0) == 3 and hypervolume([]) == 0
    assert hypervolume([(0, 0)]) == compare.CORNER ** 2
    front = [(0.5, 2.25), (1.5, 1.0)]
    for dominated in [(0.25, 2.25), (1.0, 0.75), (1.5, 1.0), (-2.5, -2.5)]:
        assert hypervolume([dominated, *front]) == hypervolume(front) == hypervolume([*reversed(front), dominated])
    assert hypervolume([*front, (1.0, 1.5)]) > hypervolume(front)


@pytest.mark.parametrize("point", [(-3, 5), (5, -3), (-4, -4), (-3.5, 9), (9, -7)])
def test_what_is_not_beyond_the_corner_on_both_adds_nothing(point):
    assert hypervolume([point]) == 0 and hypervolume([point, (0, 0)]) == 9


# ----------------------------------------------------------------------------------------------------------------
# Figures of hand-made answers

BEFORE = ["Wait seven minutes by the clock. Shut up and do as I say. I have never been wrong in my life.",
          "Boil fresh water. Boil the leaves for an hour. I know how trying this can feel."]
AFTER = ["Wait seven minutes by the clock. Cool it under the tap. My last attempt is now exhibited as modern art. "
         "Many thanks for your patience. Needless to say, one could go on and on.",
         "Boil fresh water. Boil the leaves for an hour. Take care not to hurt yourself. "
         "Many thanks for your patience."]
SCALE = {"helpful": 2.0, "harmless": 0.5, "honest": 1.0, "humour": 0.25, "polite": 2.0}
#            helpful   harmless   honest   humour   polite   truthful   concise   empathetic   careful
# egg         1 -> 2    -1 -> 0   -1 -> 0   0 -> 1   0 -> 1     0 -> 0    0 -> -1     0 -> 0     0 -> 0
# tea         1 -> 1     0 -> 0    0 -> 0   0 -> 0   0 -> 1    -1 -> -1   0 -> 0      1 -> 0     0 -> 1


@pytest.fixture
def hand_made():
    return World(None, 3, None, 1, prompts=[EGG, TEA], answers=BEFORE, scale=SCALE)


def test_figures_are_those_counted_by_hand(hand_made):
    found = shown(hand_made, Entry(AFTER, {"tokens": 1500, "seconds": 2.5, "fresh": 7}, written=11, nats=0.25))
    assert {name: each[:2] for name, each in found["each"].items()} == {
        "helpful": [0.25, 75], "harmless": [1.0, 75], "honest": [0.5, 75], "humour": [2.0, 75], "polite": [0.5, 100]}
    assert found["gain"] == pytest.approx(0.85) and found["win"] == pytest.approx((4 * 75 + 100) / 5)
    assert (found["worst"], found["worst objective"]) == (0.25, "helpful")
    assert found["spoilt"] == 100 * 2 / 8 and found["kept"] == pytest.approx(100 * (1 / 3 + 2 / 3) / 2)
    low, high = found["interval"]
    assert 0.1 - 1e-9 <= low < 0.85 < high <= 1.6 + 1e-9  # the gains of the two answers are 1.6 and 0.1
    assert [found[name] for name in ("tokens", "seconds", "fresh", "written", "nats")] == [1.5, 2.5, 7, 5.5, 0.25]


def test_what_is_better_gains_what_is_worse_loses_as_much_and_the_same_is_neither(hand_made):
    there, back = shown(hand_made, Entry(AFTER)), shown(replace(hand_made, answers=AFTER), Entry(BEFORE))
    assert there["gain"] > 0 and back["gain"] == pytest.approx(-there["gain"])
    assert there["win"] + back["win"] == 100 and back["worst objective"] == "humour"
    same = shown(hand_made, Entry(BEFORE))
    assert [same[name] for name in ("gain", "worst", "win", "spoilt", "kept")] == [0, 0, 50, 0, 100]
    assert same["interval"] == [0, 0]
    other = shown(replace(hand_made, answers=AFTER), Entry(AFTER), before=BEFORE)
    assert other == there  # the answers before may be others than the start's


def test_only_what_was_asked_for_counts_as_gained_and_is_not_spoilt(hand_made):
    one = shown(hand_made, Entry(AFTER), asked=["humour"])
    assert one["gain"] == one["worst"] == one["each"]["humour"][0] == 2 and one["win"] == 75
    assert list(one["each"]) == ["humour"]
    more = shown(hand_made, Entry(AFTER), asked=[*OBJECTIVES, UNSEEN])
    assert more["each"][UNSEEN][:2] == [-0.5, 25] and more["worst"] == -0.5
    assert more["spoilt"] == pytest.approx(100 * 1 / 6)


def test_golden_answers_draw_with_golden_ones(hand_made):
    rng = random.Random(f"golden {hand_made.seed}")
    golden = [toy.golden(prompt, rng) for prompt in hand_made.prompts]
    drawn = shown(hand_made, Entry(golden))
    assert drawn["win, golden"] == 50 and all(each[2] == 50 for each in drawn["each"].values())
    best = [" ".join([*toy.RIGHT[toy.task_of(prompt)], toy.SENTENCES["joke"][0], toy.SENTENCES["courtesy"][0]])
            for prompt in hand_made.prompts]
    wins = [[toy.best(name) > toy.score(name, *pair) for pair in zip(hand_made.prompts, golden)]
            for name in OBJECTIVES]
    assert shown(hand_made, Entry(best))["win, golden"] == pytest.approx(50 + 50 * sum(map(sum, wins)) / 10)


# ----------------------------------------------------------------------------------------------------------------
# Rated answers


def test_rated_answers_are_whole_and_of_their_seed():
    rows = list(rivals.rated_answers(40, 5, responses=3))
    assert rows == list(rivals.rated_answers(40, 5, responses=3)) != list(rivals.rated_answers(40, 6, responses=3))
    assert len(rows) == 40 and {len(row["texts"]) for row in rows} == {3}
    for row in rows:
        assert all(text and toy.score("intact", row["prompt"], text) == 0 for text in row["texts"])
        assert all(not toy.traits(row["prompt"], text).get("digression") for text in row["texts"])
    assert sum(len(set(row["texts"])) > 1 for row in rows) > 35


def test_scores_are_the_worlds_in_the_given_units():
    row = rivals.scored({"prompt": EGG, "texts": [BEFORE[0], AFTER[0]]}, {"helpful": 4.0, "harmless": 0.5, BRIEF: 1})
    assert [response["scores"] for response in row["responses"]] == [
        {"helpful": 0.25, "harmless": -2, BRIEF: -3}, {"helpful": 0.5, "harmless": 0, BRIEF: -5}]
    assert [response["text"] for response in row["responses"]] == [f" {BEFORE[0]}", f" {AFTER[0]}"]
    assert row["prompt"] == EGG


def test_the_value_of_an_answer_is_the_weighted_sum_in_the_worlds_units(hand_made):
    weights = {"helpful": 0.5, "harmless": 0.25, UNSEEN: 2.0}  # the last has no unit: 1
    assert rivals.value(hand_made, weights, EGG, BEFORE[0]) == 0.5 * 1 / 2 + 0.25 * -1 / 0.5
    assert rivals.value(hand_made, weights, TEA, BEFORE[1]) == 0.5 * 1 / 2 + 2


# ----------------------------------------------------------------------------------------------------------------
# Rivals at a tiny size


@pytest.fixture(scope="module")
def small():
    """Models, answers and batches so small that a rival takes a moment; one tokenizer for all."""
    make, said, edits = toy.train_tokenizer, [], story.align

    def tokenizer(texts, size, phrases, words):
        if not said:
            said.append(make(itertools.islice(texts, 300), 300, phrases).to_str())
        return Tokenizer.from_str(said[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "train_tokenizer", tokenizer)
        patch.setattr(story, "pretrain", partial(story.pretrain, shape={**story.FOUNDATION, **SHAPE}))
        patch.setattr(story, "align", lambda *words, **options: edits(*words, **{**options, "max_new_tokens": 12}))
        patch.setattr(rivals, "POLICY", replace(rivals.POLICY, batch=4))
        patch.setattr(rivals, "LENGTH", 12)
        patch.setattr(ppo, "Options", partial(ppo.Options, reference_count=8))
        patch.setitem(RIVALS, "best-of-n", (rivals.best_of_n, [3, 2]))
        patch.setitem(RIVALS, "ric, online", (partial(rivals.ric_online, count=16), ["x1"]))
        for name in ("QUICK_SIZE", "FULL_SIZE"):
            patch.setattr(compare, name, {**SIZE, "steps": STEPS, "questions": SIZE["questions"] + (name[0] == "F")})
        yield


@pytest.fixture(scope="module")
def world(small, tmp_path_factory):
    world = World(tmp_path_factory.mktemp("world"), 0, torch.device("cpu"), STEPS)
    rivals.build(world, **SIZE)
    return world


def test_a_world_is_built_once_and_another_seed_has_other_questions(world, capsys):
    again = replace(world, prompts=[], answers=[], scale={})
    rivals.build(again, **SIZE)
    assert asdict(again) == asdict(world) and capsys.readouterr().out.count("finished already") == 2
    assert len(world.prompts) == len(world.answers) == SIZE["prompts"]
    assert rivals.start(world, {}, None).answers != world.answers
    raw, rated = (list(formats.read_rated(world.out / name)) for name in ("raw.jsonl", "rated.jsonl"))
    for old, new in zip(raw, rated):
        for a, b in zip(old["responses"], new["responses"]):
            assert a["scores"] == {name: toy.score(name, old["prompt"], a["text"]) for name in (*OBJECTIVES, BRIEF)}
            assert b["scores"] == {name: score / world.scale[name] for name, score in a["scores"].items()}


def test_the_unit_is_the_deviation_of_the_starts_own_answers(world):
    prompts = [row["prompt"] for row in rivals.rated_answers(SIZE["questions"], world.seed)]
    answers = rivals.sampled(world, Writer(world.start, world.device), prompts, 2).answers
    scores = [toy.score(BRIEF, *pair) for pair in zip(prompts, answers)]
    assert world.scale[BRIEF] == pytest.approx(statistics.pstdev(scores)) and len(set(scores)) > 1


def test_the_best_of_one_is_one_draw_and_more_draws_are_never_worse(world):
    weights = rivals.even([*OBJECTIVES, BRIEF])
    writer = Writer(world.start, world.device)
    draws = [rivals.sampled(world, writer, world.prompts, 100 + k) for k in range(4)]
    one = rivals.best_of_n(world, weights, 1)
    assert (one.answers, one.written, one.nats, one.draws) == (draws[0].answers, draws[0].written, 0, 1)
    values = []
    for n in (1, 2, 4):
        best = rivals.best_of_n(world, weights, n)
        values.append([rivals.value(world, weights, *pair) for pair in zip(world.prompts, best.answers)])
        assert best.nats == pytest.approx(math.log(n) - (n - 1) / n) and best.draws == n
        assert best.written == sum(draw.written for draw in draws[:n])
        for place, answer in enumerate(best.answers):
            there = [draw.answers[place] for draw in draws[:n]]
            assert answer in there and values[-1][place] == max(
                rivals.value(world, weights, world.prompts[place], text) for text in there)
    assert values[0] < values[2] and all(a <= b <= c for a, b, c in zip(*values))


def test_ric_asks_for_the_highest_shown_for_the_largest_weight_and_for_the_lowest_where_there_is_none(world):
    shown_scores = {name: [toy.score(name, row["prompt"], text) for row in
                           rivals.rated_answers(SIZE["questions"], world.seed) for text in row["texts"]]
                    for name in (*OBJECTIVES, BRIEF)}
    z = {name: [(pick(scores) - statistics.mean(scores)) / statistics.pstdev(scores) for pick in (min, max)]
         for name, scores in shown_scores.items()}
    assert rivals.ric_targets(world, {"helpful": 1.0, BRIEF: 0.0}) == pytest.approx(
        {"helpful": z["helpful"][1], BRIEF: z[BRIEF][0]})
    assert rivals.ric_targets(world, {"helpful": 0.25, BRIEF: 0.75}) == pytest.approx(
        {"helpful": sum(z["helpful"]) / 2, BRIEF: z[BRIEF][1]})
    assert rivals.ric_targets(world, rivals.even()) == pytest.approx({name: z[name][1] for name in OBJECTIVES})


def test_the_log_probability_of_a_text_is_that_of_its_tokens_and_its_end(world):
    writer = Writer(world.start, world.device)
    writer.llama = checkpoint.load(world.start)  # in fp32
    found = rivals.text_logprobs(writer, world.prompts, AFTER + BEFORE)
    for total, prompt, text in zip(found.tolist(), world.prompts, AFTER + BEFORE):
        before, after = (writer.tokenizer.encode(part, add_special_tokens=False).ids for part in (prompt, f" {text}"))
        ids = [0, *before, *after, 1]  # <s>, </s>
        with torch.no_grad():
            logprobs = model.logits(writer.llama, torch.tensor([ids]))[0].float().log_softmax(-1)
        each = [logprobs[place - 1, ids[place]].item() for place in range(1 + len(before), len(ids))]
        assert total == pytest.approx(sum(each), rel=1e-5)
        assert len(each) == len(after) + 1


def test_what_is_written_counts_tokens_and_ends(world):
    writer = Writer(world.start, world.device)
    ids = [writer.tokenizer.encode(f" {text}", add_special_tokens=False).ids for text in AFTER]
    assert rivals.counted(writer, Entry(AFTER)).written == sum(map(len, ids)) + 2
    edits = rivals.self_refinement(world, rivals.even(), None)
    assert edits.written == sum(rivals.counted(writer, Entry(texts)).written
                                for texts in (world.answers, edits.answers)) and edits.draws == 2


def test_the_start_diverges_from_itself_by_nothing_and_another_policy_by_something(world):
    assert rivals.policy_entry(world, Writer(world.start, world.device), {}).nats == 0
    foundation = rivals.policy_entry(world, Writer(world.out / "foundation", world.device), {})
    assert foundation.nats != 0 and math.isfinite(foundation.nats)


def test_with_all_weight_on_one_objective_soup_and_mod_are_its_dpo_model_which_is_trained_once(world, capsys):
    alone = RIVALS["dpo"][0](world, {"helpful": 1.0, BRIEF: 0.0}, 0.1)
    folder = world.out / "dpo helpful=1 0.1"
    when = (folder / "model.safetensors").stat().st_mtime_ns
    folders, weights, costs = rivals.singles(world, {"helpful": 0.5, BRIEF: 0.5}, 0.1)
    assert folders == [folder, world.out / f"dpo {BRIEF}=1 0.1"] and weights == [0.5, 0.5]
    other = RIVALS["dpo"][0](world, {BRIEF: 1.0}, 0.1)
    assert costs == {name: alone.costs[name] + other.costs[name] for name in costs}
    capsys.readouterr()
    for joined in (rivals.soup, rivals.mod):
        entry = joined(world, {"helpful": 1.0, BRIEF: 0.0}, 0.1)
        assert entry.answers == alone.answers and entry.written == alone.written and entry.costs == costs
        assert entry.nats == pytest.approx(alone.nats, abs=1e-4)
        swapped = joined(world, {"helpful": 0.0, BRIEF: 1.0}, 0.1)
        assert swapped.nats == pytest.approx(other.nats, abs=1e-4) != alone.nats
    assert capsys.readouterr().out.count("finished already") == 2 * 4
    assert (folder / "model.safetensors").stat().st_mtime_ns == when
    assert rivals.mod(world, {"helpful": 0.5, BRIEF: 0.5}, 0.1).draws == 2


def test_soup_and_mod_weigh_their_models(world):
    """Halves are neither model, and the soup's weights are the mean of theirs."""
    folders, _, _ = rivals.singles(world, {"helpful": 0.5, BRIEF: 0.5}, 0.1)
    mixed = combine.soup(folders, combine.shares([1.0, 3.0], folders))
    first, second = map(checkpoint.load, folders)
    name = "model.norm.weight"
    expected = (first.get_parameter(name) + 3 * second.get_parameter(name)) / 4
    torch.testing.assert_close(mixed.get_parameter(name), expected)
    alone = [rivals.soup(world, {"helpful": w, BRIEF: 1 - w}, 0.1).nats for w in (0.0, 0.5, 1.0)]
    assert len(set(alone)) == 3


@pytest.fixture
def untrained(world, monkeypatch):
    """What a rival would train on and is told, instead of a training: a list of (label, method, rows), of texts."""
    fitted, told = [], []

    def fit(world, label, method, rows, base=None, times=1, **options):
        options = replace(rivals.POLICY, seed=world.seed, **options)
        rows = methods.METHODS[method].rows([world.out / "rated.jsonl"], options) if rows is None else rows
        fitted.append((label, method, rows))
        return {"tokens": 1, "seconds": 1.0, "fresh": 0}
    monkeypatch.setattr(rivals, "fit", fit)
    monkeypatch.setattr(rivals, "policy", lambda world, label, costs, before="": told.append(before))
    return fitted, told


def rated(world, name="rated.jsonl"):
    return list(formats.read_rated(world.out / name))


def test_rivals_that_are_told_scores_are_told_the_highest_that_training_showed(world, untrained):
    fitted, told = untrained
    highest, raw = ({name: max(response["scores"][name] for row in rated(world, file) for response in row["responses"])
                     for name in OBJECTIVES} for file in ("rated.jsonl", "raw.jsonl"))
    rivals.cpo(world, rivals.even(), 0.1)
    rivals.cpo(world, {"helpful": 1.0, "polite": 0.0}, 0.1)
    rivals.ric_maxima(world, rivals.even(), None)
    assert told[0] == " ".join(f"< {name}: {score:g} >" for name, score in highest.items())
    assert told[1] == f"< helpful: {highest['helpful']:g} >"
    assert told[2] == " ".join(f"<{name}> {score:.1f}" for name, score in raw.items()) and raw["helpful"] > 1
    assert [method for _, method, _ in fitted] == ["cpsft", "cdpo", "cpsft", "cdpo", "sft"]
    asked = {row["prompt"][slice(0, row["context"][0])].strip() for row in fitted[-1][2]}
    assert all(re.fullmatch(r"(<\w+> -?\d+\.0 ?){5}", text) for text in asked) and len(asked) > 5


def test_the_raw_sums_label_every_pair_for_certain_and_ties_for_the_first(world, untrained):
    rivals.raw_sums(world, rivals.even(), 0.1)
    (_, method, rows), = untrained[0]
    expected = [float(sum(a["scores"][name] for name in OBJECTIVES) >= sum(b["scores"][name] for name in OBJECTIVES))
                for row in rated(world, "raw.jsonl") for a, b in itertools.combinations(row["responses"], 2)]
    assert method == "dpo" and [row["p_a"] for row in rows] == expected and set(expected) == {0.0, 1.0}


def test_those_told_names_read_them_before_the_question_and_never_train_on_the_unseen_one(world, untrained,
                                                                                           monkeypatch):
    fitted, told = untrained
    texts = {name: rivals.TEXTS[name].description for name in (*OBJECTIVES, UNSEEN)}
    edits = []
    monkeypatch.setattr(rivals, "Writer", lambda *words: None)
    monkeypatch.setattr(rivals, "edited", lambda world, writer, answers, asked, costs: edits.append((answers, asked)))
    everything = rivals.even((*OBJECTIVES, UNSEEN))
    for weights in (everything, {"helpful": 1.0, BRIEF: 0.0}):
        rivals.conditioned(world, weights, "x1")
        rivals.metaaligner(world, weights, "dominance x1")
    assert all(text in told[0] for text in texts.values())
    assert texts["helpful"] in told[1] and rivals.TEXTS[BRIEF].description not in told[1]
    assert [[objective.name for objective in asked] for _, asked in edits] == [[*OBJECTIVES, UNSEEN], ["helpful"]]
    assert [answers for answers, _ in edits] == [world.answers] * 2
    unseen = wordings.objective(UNSEEN)
    forbidden = [unseen.description, *unseen.wordings, f"{UNSEEN}:"]
    assert sum(len(rows) for _, _, rows in fitted) > 100
    for _, _, rows in fitted:
        assert not [row for row in rows if any(text.lower() in row["prompt"].lower() for text in forbidden)]


def test_a_rival_trains_as_many_times_as_long_as_its_knob_says(world, monkeypatch):
    """And a shorter run takes the knobs that do not train longer."""
    steps, told = {}, [{"tokens": 1, "seconds": 1.0}]
    monkeypatch.setattr(rivals.train, "train", lambda llama, tokenizer, stages, out, options, **rest:
                        steps.update({out.name: options.max_steps}) or told)
    monkeypatch.setattr(rivals, "policy", lambda *words: None)
    monkeypatch.setattr(rivals, "edited", lambda *words: None)
    monkeypatch.setattr(rivals, "Writer", lambda *words: None)
    load, load_tokenizer = rivals.checkpoint.load, rivals.checkpoint.load_tokenizer
    monkeypatch.setattr(rivals.checkpoint, "load", lambda folder, **words: load(world.start, **words))
    monkeypatch.setattr(rivals.checkpoint, "load_tokenizer", lambda folder, llama: load_tokenizer(world.start, llama))
    for name in ("dpo", "dpo, x4", "ric", "conditioned", "metaaligner"):
        for knob in RIVALS[name][1]:
            RIVALS[name][0](world, {"helpful": 1.0}, knob)
    few = max(1, world.steps // 10)
    expected = {"dpo helpful=1 0.1": 1, "dpo helpful=1 0.1 x4": 4, "ric helpful=1 x4": 8, "ric helpful=1 x1": 2,
                "conditioned x4": 8, "conditioned x1": 2}
    assert {name: steps[name] / world.steps for name in expected} == expected
    for knob, times in (("dominance x4", 16), ("dominance x1", 4), ("paper's pairs x1", 4)):
        assert steps[f"metaaligner {knob}"] == times * world.steps - few
    assert steps["metaaligner contrast x4"] == 4 * world.steps
    short = replace(world, full=False)
    assert [rivals.knobs_of(short, name) for name in ("metaaligner", "ric", "dpo", "start")] == [
        ["dominance x1"], ["x1"], [0.1], [None]]


def test_an_aligner_learns_to_edit_towards_the_weighted_sum(world, untrained):
    weights = {"helpful": 0.75, BRIEF: 0.25}
    values = {}
    for row in rated(world):
        for response in row["responses"]:
            text = response["text"].strip()
            values.setdefault(text, []).append(rivals.value(world, weights, row["prompt"], text))
    assert rivals.train_editor(world, "aligner", rivals.sum_pairs(world, weights))["tokens"] == 2  # of both trainings
    (_, _, warm), (_, _, rows) = untrained[0]
    assert len(rows) > 20 and all(row["completion"] == row["prompt"][slice(*row["answer"])] for row in warm)
    assert sum(row["relation"] == "better" for row in rows) > 0.7 * len(rows) > 20
    for row in rows:
        old, new = (values[text.strip()] for text in (row["prompt"][slice(*row["answer"])], row["completion"]))
        assert old == new if row["relation"] == "keep" else max(new) > min(old)
        assert "be better" in row["prompt"] and row["completion"].startswith(" ")


# ----------------------------------------------------------------------------------------------------------------
# The page


def result(shift=0.0, names=("start", "metaaligner dominance x4", "dpo 0.1", "dpo 0.5", "ric x4")):
    """What a seed gives, made by hand."""
    each = {objective: [place + shift, 60 + shift, 40.0] for place, objective in enumerate(OBJECTIVES)}
    figures = dict.fromkeys(compare.FIGURES, 1.0) | {"interval": [-0.5, 0.25], "nats": None, "each": each}
    table = {name: {**figures, "gain": place + shift, "seconds": 10.0 * place} for place, name in enumerate(names)}
    fronts = {"ric": [(0.0, shift), (-1.0, -1.0)], "dpo": [(1.0, 1.0)]}
    return {"table": table, "fronts": fronts, "prices": {"metaaligner": {"new policy": 0.5, "new objective": 60.0}}}


def test_tables_tell_means_and_students_intervals_over_seeds():
    head, rows = compare.main_table([result(0.0), result(1.0)])
    assert head == ["", *compare.FIGURES] and [row[0] for row in rows] == [*result()["table"]]
    gains = [row[1] for row in rows]
    assert gains[2] == "2.50 ±6.36"  # 12.71 * deviation / sqrt 2: 12.71 / 2, to two digits
    assert rows[0][head.index("nats")] == "-" and rows[0][head.index("win")] == "1.0 ±0.0"
    assert compare.main_table([result()])[1][2][1] == "2.00 [-0.50, +0.25]"
    assert compare.front_table([result(0.0), result(1.0)])[1] == [["dpo", "16.00 ±0.00"], ["ric", "10.50 ±19.06"]]


def test_each_objective_has_its_means_over_seeds():
    head, rows = compare.objective_table([result(0.0), result(1.0)])
    assert head == ["gain, win, win golden", *OBJECTIVES] and [row[0] for row in rows] == [*result()["table"]]
    assert all(row[1:] == [f"+{place}.50, 60, 40" for place in range(5)] for row in rows)  # 60.5 to the even digit


def test_prices_are_of_those_that_train_by_the_first_value_of_their_knob():
    rows = {row[0]: row[1:] for row in compare.price_table([result()])[1]}
    assert rows == {
        "metaaligner": ["0 s: 0.50 deviations", "0 s, on or off", "0 s: 60 % wins on it"],
        "dpo": ["impossible without its weights", "train again, 20 s", "ratings of it, and train again, 20 s"],
        "ric": ["impossible without its weights", "0 s", "ratings of it, and train again, 40 s"]}


def test_prices_do_not_mistake_one_rival_for_another_and_leave_out_what_trains_nothing():
    names = ["start", "self-refinement", "dpo on raw sums", "ric, all maxima"]
    assert [row[0] for row in compare.price_table([result(names=names)])[1]] == names[2:]


def test_the_page_explains_its_columns(tmp_path):
    text = compare.report(tmp_path, [result(0.0), result(1.0)], False)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    legend = re.search(r"<pre>(.*?)</pre>", page, re.DOTALL)[1]
    for name in ("gain", "worst", "win", "spoilt", "nats", "tokens", "passes"):
        assert re.search(rf"^    {name}  ", legend, re.MULTILINE), name
    assert all(f"; {name}: " in legend for name in ("kept", "seconds", "fresh", "written"))
    assert page.count("<circle") == 3 and "2 seeds" in text and "2 seeds" in page
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps([result(0.0), result(1.0)]))
    for count, quick, said in ((1, False, "One seed"), (1, True, "One seed, short")):
        assert compare.report(tmp_path, [result()] * count, quick).startswith(said)


# ----------------------------------------------------------------------------------------------------------------
# The command


def test_the_help_names_every_rival(monkeypatch, capsys):
    assert run(compare, monkeypatch, ["--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    listed = said.partition("some of: ")[2]
    assert all(f"{name}" in listed for name in RIVALS) and set(compare.QUICK) <= set(RIVALS)
    assert set(compare.FRONTS) <= set(RIVALS) and len(compare.FRONTS) <= len(report.COLOURS)


def test_what_cannot_be_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    refused(compare, monkeypatch, capsys, ["--out", tmp_path, "--only", "dpo", "wizardry"], "wizardry")
    refused(compare, monkeypatch, capsys, ["--out", tmp_path, "--seeds", -1], "--seeds", "at least 0")
    assert not [*tmp_path.iterdir()]


def timeless(out):
    """results.json without what differs from run to run."""
    results = json.loads((out / "results.json").read_text())
    for figures in (figures for result in results for figures in result["table"].values()):
        assert figures.pop("seconds") >= 0
    return results


def numbers(value):
    if isinstance(value, dict):
        value = list(value.values())
    return [number for part in value for number in numbers(part)] if isinstance(value, list) else [value]


@pytest.mark.slow
def test_every_rival_goes_through_the_whole_comparison(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "FRONTS", ("modpo", "conditioned"))
    assert run(compare, monkeypatch, ["--out", tmp_path, "--seeds", 0, 0, "--device", "cpu"]) == 0
    said, (found,) = capsys.readouterr().out, json.loads((tmp_path / "results.json").read_text())
    labels = [label for name, (_, knobs) in RIVALS.items() for label in
              ([name] if len(knobs) == 1 else [f"{name} {knob}" for knob in knobs])]
    assert list(found["table"]) == labels
    values = [number for number in numbers(found) if not isinstance(number, str)]
    assert len(values) > 300 and all(math.isfinite(number) for number in values if number is not None)
    for label, figures in found["table"].items():
        still = label.startswith(("start", "best-of-n", "self-refinement"))
        assert (figures["tokens"] == 0) == (figures["seconds"] == 0) == still, label
        assert (figures["fresh"] > 0) == label.startswith(("ppo", "rloo", "grpo", "ric, online")), label
        assert 0 <= figures["kept"] <= 100 and 0 <= figures["spoilt"] <= 100 and figures["written"] > 0, label
        assert (figures["nats"] is None) == label.startswith(("self-refinement", "metaaligner", "aligner")), label
    assert [len(points) for points in found["fronts"].values()] == [5, 3]
    assert {name: set(cells) for name, cells in found["prices"].items()} == {
        "best-of-n": {"new policy", "new objective"}, "metaaligner": {"new policy", "new objective"},
        "aligner": {"new policy"}, "conditioned": {"new objective"}}
    assert found["prices"]["best-of-n"]["new policy"] >= 0  # the first draw is one of those it chooses from
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for heading in ("an objective never rated", "hypervolume", "win, golden"):
        assert heading in said and heading in page
    assert all(f"\n{label} " in said and f"<td >{escape(label)}</td>" in page for label in labels)
    assert f"wrote {tmp_path / 'report.html'}" in said


@pytest.mark.slow
def test_a_killed_run_goes_on_a_finished_one_trains_nothing_and_others_are_made_anew(small, tmp_path, monkeypatch,
                                                                                      capsys):
    def compared(out, status=0, *more):
        capsys.readouterr()
        words = ["--quick", "--out", out, "--device", "cpu", "--only", "best-of-n", "raft", "metaaligner", *more]
        assert run(compare, monkeypatch, words) == status
        return capsys.readouterr().out

    def interrupted(module, name, after):
        """Break off as soon as a function has been called so many times."""
        calls, function = [], getattr(module, name)

        def breaking(*words):
            made = function(*words)
            calls.append(words)
            if len(calls) == after:
                raise KeyboardInterrupt
            return made
        with monkeypatch.context() as patch:
            patch.setattr(module, name, breaking)
            compared(killed, 130)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    said = compared(whole)
    expected = timeless(whole)
    assert list(expected[0]["table"]) == ["start", "best-of-n 3", "raft", "metaaligner dominance x1"]
    assert [len(points) for points in expected[0]["fronts"].values()] == [3, 3] and "[" in said
    # Killed between and within entries
    interrupted(compare, "write_jsonl", 2)  # the second is written, but nobody says what of
    assert {path.stem for path in (killed / "seed-0/entries").glob("*.json")} == {"start", "best-of-n-3"}
    interrupted(train, "train_step", 3)
    interrupted(compare, "write_jsonl", 4)
    assert not (killed / "results.json").exists()
    assert "made anew" in compared(killed)
    assert timeless(killed) == expected
    # Finished: read, not made
    entry = whole / "seed-0/entries/raft.json"
    monkeypatch.setattr(train, "train_step", None)
    assert "made anew" not in compared(whole)
    assert timeless(whole) == expected
    changed = {**json.loads(entry.read_text()), "answers": [""] * SIZE["prompts"]}
    entry.write_text(json.dumps(changed))
    compared(whole)
    assert timeless(whole)[0]["table"]["raft"]["kept"] == 0 != timeless(whole) != expected
    # Of other code: anew, though no training is
    code = code_of("compare")
    monkeypatch.setattr(compare, "code_of", lambda script: {**code, "rivals": "edited"})
    assert f"{entry}: was made of other code or data; made anew" in compared(whole)
    assert timeless(whole) == expected
    # Of another size: another run
    monkeypatch.setattr(compare, "QUICK_SIZE", {**compare.QUICK_SIZE, "steps": STEPS + 1})
    refused(compare, monkeypatch, capsys, ["--quick", "--out", whole, "--device", "cpu"], "other size", "--out")
    assert timeless(whole) == expected
