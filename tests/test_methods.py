# ruff: noqa: F811 (the fixture of test_train.py, under its own name)
"""Methods: their rows against brute force on a few rated answers, their losses as train.py calls them, and each of them
from the command line."""
import itertools
import math
import random
import re
import statistics
from array import array
from collections import Counter

import pytest
import torch

import checkpoint
import data
import formats
import methods
import reward
import train
from common import UserError
from conftest import refused, response, run, write
from data import Document, Example
from methods import METHODS
from objectives import OBJECTIVES, find_objectives
from test_train import metrics, tiny, world  # noqa: F401 (a fixture)
from train import Options

RATED = [{"prompt": "\n\nHuman: one?\n\nAssistant:", "responses": [
             response("a", helpful=4, honest=0), response("b", helpful=1, honest=2),
             response("c", helpful=0, honest=2)]},
         {"prompt": "two?", "responses": [
             response("d", helpful=3, honest=1, humour=9), response("e", helpful=3, honest=-1)]},
         {"prompt": "three?", "responses": [
             response("f", helpful=2.5, honest=3), response("g", helpful=0, honest=0),
             response("h", helpful=-2, honest=1)]}]
SCORES = {answer["text"]: answer["scores"] for row in RATED for answer in row["responses"]}
PROMPTS = {answer["text"]: row["prompt"] for row in RATED for answer in row["responses"]}
PAIRS = [("a", "b"), ("a", "c"), ("b", "c"), ("d", "e"), ("f", "g"), ("f", "h"), ("g", "h")]
WEIGHTS = "helpful=0.7,honest=0.3"


@pytest.fixture
def rated(tmp_path):
    return write(tmp_path / "rated.jsonl", *RATED)


def total(text, helpful=0.7, honest=0.3):
    return helpful * SCORES[text]["helpful"] + honest * SCORES[text]["honest"]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def asked(row):
    """The condition that a row's prompt begins with, as [(name, score)], and what stands after it."""
    condition, rest = row["prompt"][:row["context"][0]], row["prompt"][row["context"][0]:]
    found = re.findall(r"<\s?(\w+)(?:: | ?> )(-?[\d.]+)", condition)
    return [(name, float(score)) for name, score in found], rest


# ----------------------------------------------------------------------------- weights and labels


def test_weights_are_read_in_their_order():
    assert list(methods.weights_of("honest=2, helpful=-0.5  x=0").items()) == \
        [("honest", 2.0), ("helpful", -0.5), ("x", 0.0)]
    assert methods.weights_of(methods.WEIGHTS) == {"helpful": 0.7, "honest": 0.3}


@pytest.mark.parametrize("words, expected", [
    (["dpo", "--weights", "helpful=much"], ["'helpful=much' is no weight"]),
    (["dpo", "--weights", "helpful"], ["'helpful' is no weight"]),
    (["dpo", "--weights", "helpful=nan"], ["no weight"]), (["ipo", "--weights", "helpful=inf"], ["no weight"]),
    (["dpo", "--weights", "helpful=1 helpful=2"], ["one of 'helpful' twice"]),
    (["dpo", "--weights", "helpful=1,honest=-1"], ["adds up to nothing"]),
    (["raft"], ["--weights", "give the objectives' weights"]), (["copg"], ["give the objectives' weights"]),
    (["dpo", "--weights", "helpfull=1"], ["no answer is rated on helpfull, but on", "helpful"]),
    (["modpo", "--weights", "helpful=0,honest=1"], ["modpo", "above 0", "name another one first"]),
    (["modpo", "--weights", "helpful=-1,honest=3"], ["modpo", "above 0"]),
    (["modpo", "--weights", "helpful=1", "--temperature", "0"], ["modpo", "above 0"]),
    (["conditioned", "--weights", "concise=1"], ["unknown objective 'concise'"]),
    (["dpo", "--temperature", "1"], ["--temperature", "--weights"]),
    (["dpo", "--weights", "helpful=1", "--principle", "honest"], ["--principle", "--weights"]),
    (["dpo", "--weights", "helpful=1", "--label-smoothing", "0.5"], ["--label-smoothing"]),
    (["copg", "--weights", "helpful=1", "--temperature", "2"], ["--temperature is no option of copg"]),
    (["ipo", "--weights", "helpful=1", "--label-smoothing", "0.1"], ["--label-smoothing is no option of ipo"]),
    (["dpo", "--margin", "1"], ["--margin is no option of dpo"]),
    (["orpo", "--beta", "0.1"], ["--beta is no option of orpo"]), (["ric", "--beta", "1"], ["no option of ric"]),
    (["raft", "--principle", "honest"], ["--principle is no option of raft"]),
    (["sft", "--weights", "helpful=1"], ["--weights is no option of sft"]),
    (["kto", "--weights", "helpful=1", "--replay", "x"], ["--replay mixes texts into texts"])])
def test_what_cannot_be_asked_for_is_one_line(world, rated, tmp_path, monkeypatch, capsys, words, expected):
    words = [*words, "--model", world / "base", "--data", rated, "--out", tmp_path / "out", "--device", "cpu"]
    refused(train, monkeypatch, capsys, words, *expected)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["dpo", "modpo", "raft", "cpsft", "cdpo", "ric", "conditioned"])
def test_data_without_the_scores_are_refused_or_left_out(world, tmp_path, monkeypatch, capsys, method):
    """Prompts without answers, answers without scores, and answers that are never rated on both."""
    nothing = {"prompt": "p", "responses": []}
    one, other = ({"prompt": "p", "responses": [response("a", **{name: 1}), response("b", **{name: 0})]}
                  for name in ("helpful", "honest"))
    words = [method, "--model", world / "base", "--weights", WEIGHTS, "--out", tmp_path / "out", "--device", "cpu"]
    for rows, expected in (([nothing], "no answer is rated on helpful, honest, but on nothing"),
                           ([{"prompt": "p", "responses": ["x"]}], "x.jsonl:1"),
                           ([{"prompt": "p", "responses": [response("a"), response("b")]}], "but on nothing"),
                           ([one, other], "no prompt has answers that are all rated on helpful, honest")):
        refused(train, monkeypatch, capsys, [*words, "--data", write(tmp_path / "x.jsonl", *rows)], expected)
    some = write(tmp_path / "some.jsonl", nothing, one, *RATED, other)
    capsys.readouterr()
    rows = METHODS[method].rows([some], Options(weights=WEIGHTS))
    assert rows == METHODS[method].rows([write(tmp_path / "rated.jsonl", *RATED)], Options(weights=WEIGHTS))
    assert "left out: 2 rows, an answer is not rated on all of helpful, honest" in capsys.readouterr().out


@pytest.mark.parametrize("gap, temperature, chance", [
    (1.0, 1.0, 1 / (1 + math.exp(-1))), (-1.0, 2.0, 1 / (1 + math.exp(0.5))), (0.0, 1.0, 0.5), (0.1, 0.0, 1.0),
    (-0.1, 0.0, 0.0), (0.0, 0.0, 0.5), (1e300, 1e-9, 1.0), (-1e300, 1e-9, 0.0), (0.0, 1e-9, 0.5)])
def test_labels_are_a_sigmoid_of_the_difference(gap, temperature, chance):
    assert methods.chance_of(gap, temperature) == pytest.approx(chance)


# ----------------------------------------------------------------------------- rows, by brute force


@pytest.mark.parametrize("temperature", [0.5, 2.0, 0.0])
def test_scored_rows_are_every_two_answers_by_their_weighted_sums(rated, temperature):
    rows = methods.scored_rows([rated], Options(weights=WEIGHTS, temperature=temperature))
    assert [(row["response_a"], row["response_b"]) for row in rows] == PAIRS
    for row, (a, b) in zip(rows, PAIRS):
        gap = total(a) - total(b)
        label = sigmoid(gap / temperature) if temperature else float(gap > 0)
        assert row["prompt"] == PROMPTS[a] and (row["gap"], row["p_a"]) == pytest.approx((gap, label))
    assert methods.preference_rows([rated], Options(weights=WEIGHTS, temperature=temperature)) == rows


@pytest.mark.parametrize("keep", [0.0, 0.4])
def test_contrast_rows_reject_what_was_not_asked_for(rated, tmp_path, keep):
    rows = list(formats.read_rated(rated)) * 20
    pairs = list(data.reformulate(rows, find_objectives(["helpful", "honest"]), data.Pairing(keep=keep)))
    path, rejected = write(tmp_path / "pairs.jsonl", *pairs), Counter()
    asked = [pair for pair in pairs if pair["relation"] != "equal"]
    found = methods.contrast_rows([path], Options(seed=1))
    assert found == methods.contrast_rows([path], Options(seed=1)) != methods.contrast_rows([path], Options(seed=2))
    assert [(row["prompt"], row["response_a"], row["context"], row["p_a"]) for row in found] == [
        (pair["prompt"], pair["completion"], pair["context"], 1.0) for pair in asked]
    for row, pair in zip(found, asked):
        answer, chosen, other = pair["prompt"][slice(*pair["answer"])], pair["completion"], row["response_b"]
        assert other != chosen and PROMPTS[other] == PROMPTS[chosen]
        rejected[pair["relation"], list(PROMPTS.values()).count(PROMPTS[chosen]), other == answer] += 1
    kept = sum(pair["relation"] == "keep" for pair in asked)
    assert rejected["keep", 2, True] == rejected["keep", 3, True] == rejected["better", 2, False] == 0
    assert rejected["keep", 2, False] + rejected["keep", 3, False] == kept and (kept > 20) == (keep > 0)
    assert 0.35 < rejected["better", 3, True] / (rejected["better", 3, True] + rejected["better", 3, False]) < 0.65
    with pytest.raises(UserError, match="do not say where question and answer are"):
        methods.contrast_rows([write(tmp_path / "bare.jsonl", {"prompt": "p", "completion": "c",
                                                               "relation": "better"})], Options())


def test_contrast_rows_reject_texts_of_the_same_rated_answers(tmp_path):
    """Though another row has the same question."""
    rated = [{"prompt": prompt, "responses": [response(f"{mark}{i}", helpful=i) for i in range(3)]}
             for mark, prompt in (("a", "same?"), ("b", "other?"), ("c", "same?"))]
    pairs = write(tmp_path / "pairs.jsonl", *data.reformulate(rated, find_objectives(["helpful"])))
    found = [row for seed in range(20) for row in methods.contrast_rows([pairs], Options(seed=seed))]
    assert len(found) == 20 * 9 and all(row["response_a"][0] == row["response_b"][0] for row in found)


def test_equal_sums_are_no_preference(tmp_path):
    """7 * 0.3 and 3 * 0.7 differ in the last digit of a float."""
    row = {"prompt": "p", "responses": [response("a", helpful=0, honest=7), response("b", helpful=3, honest=0)]}
    path, options = write(tmp_path / "x.jsonl", row), Options(weights=WEIGHTS, temperature=0.0)
    assert 0.3 * 7 != 0.7 * 3 and methods.scored_rows([path], options)[0]["p_a"] == 0.5
    assert methods.raft_rows([path], options)[0]["completion"] == "a"


@pytest.mark.parametrize("weights, helpful, honest", [(WEIGHTS, 0.7, 0.3), ("honest=0.2 helpful=2", 2, 0.2)])
def test_modpo_rows_are_labelled_by_the_first_objective(rated, weights, helpful, honest):
    """At its optimum, beta * log-ratio is the difference of the weighted sums by the temperature, as dpo's."""
    rows = methods.modpo_rows([rated], Options(weights=weights, temperature=0.5))
    first, weight = ("helpful", helpful) if weights.startswith("helpful") else ("honest", honest)
    assert [(row["response_a"], row["response_b"]) for row in rows] == PAIRS
    for row, (a, b) in zip(rows, PAIRS):
        assert row["p_a"] == pytest.approx(sigmoid((SCORES[a][first] - SCORES[b][first]) / 0.5))
        log_odds = math.log(row["p_a"] / (1 - row["p_a"]))
        assert weight * log_odds + row["gap"] == \
            pytest.approx((total(a, helpful, honest) - total(b, helpful, honest)) / 0.5)


def test_raft_rows_are_the_best_answers(rated):
    assert methods.raft_rows([rated], Options(weights=WEIGHTS)) == [
        {"prompt": RATED[i]["prompt"], "completion": best} for i, best in enumerate("adf")]
    worst = methods.raft_rows([rated], Options(weights="helpful=-1"))
    assert [row["completion"] for row in worst] == ["c", "d", "h"]  # d is the first of two that are as helpful


def test_pro_rows_are_all_answers_from_the_best_to_the_worst(tmp_path, capsys):
    def row(prompt, *scores):
        return {"prompt": prompt, "responses": [{"text": f"{prompt} {i}", "scores": {"x": score, "y": -1}}
                                                for i, score in enumerate(scores)]}
    path = write(tmp_path / "rated.jsonl", row("a", 1, 3, 2), row("b", 5, 5, 5), row("c", 1, 2), row("d", 0, 0, 4))
    rows = METHODS["pro"].rows([path], Options(weights="x=2,y=1"))
    assert [(row["ranked"], row["rewards"]) for row in rows] == [
        (["a 1", "a 2", "a 0"], [5, 3, 1]), (["d 2", "d 0", "d 1"], [7, -1, -1])]
    assert "left out: 1 prompts that have another number of answers than 3" in capsys.readouterr().out
    path = write(tmp_path / "same.jsonl", row("b", 5, 5, 5))
    with pytest.raises(UserError, match="no prompt has an answer that is better than another on x=2"):
        METHODS["pro"].rows([path], Options(weights="x=2"))


def test_cpsft_rows_ask_for_answers_own_ratings(rated):
    seen = set()
    for seed in range(8):
        rows = methods.cpsft_rows([rated], Options(weights=WEIGHTS, seed=seed))
        assert [row["completion"] for row in rows] == list("abcdefgh")
        for row in rows:
            ratings, rest = asked(row)
            assert ratings == [(name, SCORES[row["completion"]][name]) for name, _ in ratings]
            assert rest == PROMPTS[row["completion"]] and row["context"][1] == len(row["prompt"])
            seen.add(frozenset(name for name, _ in ratings))
    assert seen == {frozenset(names) for names in (["helpful"], ["honest"], ["helpful", "honest"])}
    assert rows == methods.cpsft_rows([rated], Options(weights=WEIGHTS, seed=7))


def test_cdpo_rows_ask_for_the_ratings_of_one_answer(rated):
    """An objective asked for gives minus the distance, one that is not its score; both weighted."""
    seen, split = set(), 0
    for seed in range(20):
        rows = methods.cdpo_rows([rated], Options(weights=WEIGHTS, seed=seed, temperature=2.0))
        assert [(row["response_a"], row["response_b"]) for row in rows] == PAIRS
        for row, pair in zip(rows, PAIRS):
            ratings, rest = dict(asked(row)[0]), asked(row)[1]
            there = [answer["scores"] for r in RATED if r["prompt"] == rest for answer in r["responses"]]
            assert any(all(scores[name] == rating for name, rating in ratings.items()) for scores in there)
            values = [sum(weight * (-abs(ratings[name] - SCORES[text][name]) if name in ratings else SCORES[text][name])
                          for name, weight in (("helpful", 0.7), ("honest", 0.3))) for text in pair]
            gap = values[0] - values[1]
            assert rest == PROMPTS[pair[0]] and (row["gap"], row["p_a"]) == pytest.approx((gap, sigmoid(gap / 2)))
            seen.add(frozenset(ratings))
            split += len(ratings) == 2
    assert len(seen) == 3 and split > 10


def test_cdpo_that_asks_for_the_most_of_all_is_dpo_on_the_sum(rated):
    """Where the answer whose ratings are asked for is the best at everything, -|most - score| is score - most: the most
    is the same for both answers. d is such an answer, and a is not."""
    plain = methods.scored_rows([rated], Options(weights=WEIGHTS))
    plain, same, other = {(row["response_a"], row["response_b"]): row for row in plain}, 0, 0
    for seed in range(20):
        for row in methods.cdpo_rows([rated], Options(weights=WEIGHTS, seed=seed)):
            pair, ratings = (row["response_a"], row["response_b"]), dict(asked(row)[0])
            most = {name: max(SCORES[text][name] for text in SCORES if PROMPTS[text] == PROMPTS[pair[0]])
                    for name in ratings}
            if ratings == most:
                assert (row["gap"], row["p_a"]) == pytest.approx((plain[pair]["gap"], plain[pair]["p_a"]))
                same += len(ratings) == 2
            elif abs(row["gap"] - plain[pair]["gap"]) > 0.1:
                other += 1
    assert same > 5 and other > 5


def test_ric_rows_ask_for_answers_own_scores_in_deviations(rated):
    rows = methods.ric_rows([rated], Options(weights="honest=1 helpful=9"))
    assert [row["completion"] for row in rows] == list("abcdefgh")
    scales = {}
    for name in ("honest", "helpful"):
        scores = [SCORES[text][name] for text in "abcdefgh"]
        mean = sum(scores) / 8
        scales[name] = mean, math.sqrt(sum((score - mean) ** 2 for score in scores) / 8)
    for row in rows:
        wanted = [(name, (SCORES[row["completion"]][name] - mean) / deviation)
                  for name, (mean, deviation) in scales.items()]
        found, rest = asked(row)
        assert [name for name, _ in found] == [name for name, _ in wanted] and rest == PROMPTS[row["completion"]]
        assert [score for _, score in found] == pytest.approx([score for _, score in wanted], abs=0.0501)
        assert len({score for _, score in found} & {0.0, 1.0, -1.0}) < 3 and "-0.0" not in row["prompt"]
    assert methods.asked_scores({"a": -0.04, "b": 0.04, "c": -1.25}) == "<a> 0.0 <b> 0.0 <c> -1.2"


@pytest.mark.parametrize("score", [3, 0.1, -1e17])
def test_ric_of_constant_scores_is_fine_tuning_after_a_constant_text(tmp_path, score):
    rows = [{"prompt": row["prompt"], "responses": [response(a["text"], x=score) for a in row["responses"]]}
            for row in RATED]
    found = methods.ric_rows([write(tmp_path / "x.jsonl", *rows)], Options(weights="x=1"))
    assert [(row["prompt"].lstrip("\n"), row["completion"]) for row in found] == [
        (f"<x> 0.0\n\n{row['prompt'].lstrip()}", a["text"]) for row in RATED for a in row["responses"]]


def test_scores_keep_their_scale_over_several_files(tmp_path):
    """The mean is that of all files together."""
    paths = [write(tmp_path / f"{i}.jsonl", row) for i, row in enumerate(RATED)]
    together = write(tmp_path / "all.jsonl", *RATED)
    options = Options(weights=WEIGHTS)
    assert methods.ric_rows(paths, options) == methods.ric_rows([together], options)
    scale = methods.score_scale(RATED, ["helpful"])["helpful"]
    scores = [SCORES[text]["helpful"] for text in "abcdefgh"]
    assert scale == pytest.approx((statistics.fmean(scores), statistics.pstdev(scores)))


def test_conditioned_rows_ask_for_what_the_answer_is_best_at(rated):
    """On each objective that is asked for, no answer is better and some answer is worse."""
    seen = set()
    for seed in range(60):
        rows = methods.conditioned_rows([rated], Options(weights=WEIGHTS, seed=seed))
        best = [text for text in "abcdefgh" if any(
            SCORES[text][name] == max(same) > min(same) for name in ("helpful", "honest")
            for same in [[SCORES[other][name] for other in SCORES if PROMPTS[other] == PROMPTS[text]]])]
        assert [row["completion"] for row in rows] == best == ["a", "b", "c", "d", "f"]
        for row in rows:
            start, end = row["context"]
            assert row["prompt"][start:end] == PROMPTS[row["completion"]] and end == len(row["prompt"])
            texts = row["prompt"][:start].strip().removeprefix("The answer: ").split("; ")
            names = [name for text in texts for name in ("helpful", "honest")
                     if text in (OBJECTIVES[name].description, *OBJECTIVES[name].wordings)]
            assert len(names) == len(texts) == len(set(names))
            for name in names:
                same = [SCORES[other][name] for other in SCORES if PROMPTS[other] == PROMPTS[row["completion"]]]
                assert SCORES[row["completion"]][name] == max(same) > min(same)
            seen.update(itertools.product([row["completion"]], texts))
    wordings = {name: {OBJECTIVES[name].description, *OBJECTIVES[name].wordings} for name in ("helpful", "honest")}
    for text, name in (("a", "helpful"), ("b", "honest"), ("f", "helpful"), ("f", "honest")):
        assert wordings[name] <= {words for who, words in seen if who == text}, "in each of its wordings"


# ----------------------------------------------------------------------------- conditions before prompts


def test_a_condition_stands_apart_from_the_prompt():
    assert methods.after_text("<x> 1.0", "Why?") == {"prompt": "<x> 1.0\n\nWhy?", "context": [9, 13]}
    assert methods.after_text("<x> 1.0", "\n\nHuman: Why?") == {"prompt": "<x> 1.0\n\nHuman: Why?", "context": [7, 20]}


@pytest.mark.parametrize("method", ["cpsft", "ric", "conditioned"])
def test_the_condition_of_a_prompt_that_is_too_long_survives(world, tmp_path, method):
    """The oldest turns go, whole; the condition, the last question and the completion stay."""
    turns = "".join(f"\n\nHuman: question {i}\n\nAssistant: answer {i}" for i in range(12))
    prompt = f"{turns}\n\nHuman: the last question\n\nAssistant:"
    rows = [{"prompt": prompt, "responses": [response("good", helpful=1), response("bad", helpful=0)]}]
    rows = METHODS[method].rows([write(tmp_path / "x.jsonl", *rows)], Options(weights="helpful=1"))
    tokenizer = checkpoint.load_tokenizer(world / "base")
    whole = data.encode_documents(tokenizer, rows, 0, 1)
    examples, dropped = data.encode_examples(tokenizer, rows, 0, 1, len(whole[0].ids) // 2)
    assert not dropped and len(examples) == len(rows)
    for row, example in zip(rows, examples):
        document, = example.documents
        condition = row["prompt"][:row["context"][0]]
        said = tokenizer.decode(list(document.ids[1:document.start]), skip_special_tokens=False)
        assert said.startswith(condition) and condition and "question 0" not in said and "question 11" in said
        assert prompt.endswith(said[len(condition):]), "nothing is lost but the beginning"
        assert re.match(r"(\n\n)?(Human|Assistant): ", said[len(condition):])
        assert tokenizer.decode(list(document.ids[document.start:-1])) == row["completion"]


@pytest.mark.parametrize("method", ["dpo", "cpsft", "cdpo", "ric", "conditioned"])
def test_all_rows_of_a_prompt_are_held_out_together(world, method):
    """Whatever condition stands before it: as many prompts are held out as of the prompts by themselves."""
    rows = METHODS[method].rows([world / "rated.jsonl"], Options(weights="helpful=1,harmless=1"))
    sides = {}
    for row in rows:
        start, end = row.get("context", (0, None))
        sides.setdefault(row["prompt"][start:end], set()).add(data.is_held_out(row, 0.6))
    assert len(sides) > 5 and all(len(side) == 1 for side in sides.values())
    assert {prompt: data.is_held_out({"prompt": prompt, "completion": ""}, 0.6) for prompt in sides} == \
        {prompt: out for prompt, (out,) in sides.items()}
    assert set().union(*sides.values()) == {True, False}


# ----------------------------------------------------------------------------- losses, as train.py calls them


def random_pairs(count=9, seed=0):
    """Pairs of one prompt and two responses, all of various lengths, with labels, gaps and a reference at random."""
    rng, examples = random.Random(seed), []

    def words(most):
        return [rng.randrange(2, 64) for _ in range(rng.randint(1, most))]
    for _ in range(count):
        prompt = words(9)
        documents = [Document(array("i", prompt + words(12)), len(prompt)) for _ in range(2)]
        ref_logprobs = [-rng.expovariate(0.1) for _ in range(2)]
        examples.append(Example(documents, round(rng.random(), 3), rng.gauss(0, 2), ref_logprobs=ref_logprobs))
    return examples


def test_sizes_and_gaps_find_their_pairs_in_packed_batches():
    """A batch's pairs are in the order of its examples; its documents are not."""
    examples, found = random_pairs(20), []
    batches = list(train.pack(examples, 100, torch.device("cpu")))
    assert len(batches) > 2 and any(pair[0] > pair[1] + 1 for batch in batches for pair in batch.pairs.tolist())
    for batch in batches:
        parts = [part.tolist() for part in batch.tokens.split(batch.lengths)]
        for pair, *rest in zip(batch.pairs.tolist(), batch.sizes.tolist(), batch.gaps.tolist(), batch.labels.tolist(),
                               batch.ref_logprobs.tolist()):
            found.append(([parts[i] for i in pair], *rest))
    wanted = [([list(d.ids) for d in e.documents], [len(d.ids) - d.start for d in e.documents], e.gap, e.label,
               e.ref_logprobs) for e in examples]
    assert len(found) == len(wanted) == 20
    for documents, sizes, *numbers in wanted:
        same, = [row for row in found if row[0] == documents]
        assert same[1] == sizes and same[2:4] == pytest.approx(tuple(numbers[:2])) and \
            same[4] == pytest.approx(numbers[2])


def softplus(x):
    return math.log(1 + math.exp(x)) if x < 500 else x


def log_odds(mean):
    return mean - math.log(-math.expm1(mean))


def soft(label, loss, margin):
    """What is expected of loss(margin) where the first is better, and loss(-margin) where the second is."""
    return label * loss(margin) + (1 - label) * loss(-margin)


FORMULAS = {  # of a pair: label y, d = first gain less second, a = means per token, lp = sums, gap; options o
    "dpo": lambda y, d, a, lp, gap, o: soft((1 - o.label_smoothing) * y + o.label_smoothing * (1 - y),
                                            lambda m: softplus(-o.beta * m), d),
    "robust": lambda y, d, a, lp, gap, o: (
        (1 - o.label_smoothing) * soft(y, lambda m: softplus(-o.beta * m), d)
        - o.label_smoothing * soft(y, lambda m: softplus(o.beta * m), d)) / (1 - 2 * o.label_smoothing),
    "ipo": lambda y, d, a, lp, gap, o: soft(y, lambda m: (m - 0.5 / o.beta) ** 2, d),
    "rpo": lambda y, d, a, lp, gap, o: soft(y, lambda m: softplus(-o.beta * m), d)
    - o.sft_coef * (y * lp[0] + (1 - y) * lp[1]),
    "simpo": lambda y, d, a, lp, gap, o: soft(y, lambda m: softplus(o.margin - o.beta * m), a[0] - a[1]),
    "orpo": lambda y, d, a, lp, gap, o: o.odds_coef * soft(y, lambda m: softplus(-m), log_odds(a[0]) - log_odds(a[1]))
    - y * a[0] - (1 - y) * a[1],
    "copg": lambda y, d, a, lp, gap, o: (gap - o.beta * d) ** 2 / (4 * o.beta),
    "modpo": lambda y, d, a, lp, gap, o: soft(y, lambda m: softplus(-m), (o.beta * d - gap) / 0.4)}
FORMULAS["cdpo"] = FORMULAS["dpo"]


@pytest.mark.parametrize("method", [*FORMULAS, "kto", "bco"])
def test_each_methods_loss_takes_its_own_options_and_columns(method):
    """Of log-probabilities at random, summed here response by response."""
    examples = random_pairs()
    batch, = train.pack(examples, 10**6, torch.device("cpu"))
    logprobs = -torch.rand(len(batch.targets), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    options = Options(beta=0.3, label_smoothing=0.2, margin=0.7, sft_coef=0.15, odds_coef=0.35, weights="x=0.4,y=3")
    places = {tuple(part.tolist()): i for i, part in enumerate(batch.tokens.split(batch.lengths))}
    pairs = []
    for example in examples:
        means, sums = [], []
        for document in example.documents:
            mine = logprobs[batch.document == places[tuple(document.ids)]]
            assert len(mine) == len(document.ids) - document.start
            means.append(mine.mean().item())
            sums.append(mine.sum().item())
        gains = [lp - ref for lp, ref in zip(sums, example.ref_logprobs)]
        pairs.append((example.label, gains, means, sums, example.gap))
    if method in FORMULAS:
        expected = sum(FORMULAS[method](y, gains[0] - gains[1], *rest, options) for y, gains, *rest in pairs)
    else:
        point = 0.3 * sum(gain for _, gains, *_ in pairs for gain in gains) / (2 * len(pairs))
        each = [(0.3 * gain - (max(point, 0) if method == "kto" else point), good)
                for y, gains, *_ in pairs for gain, good in zip(gains, (y, 1 - y))]
        expected = sum(good * sigmoid(-u) + (1 - good) * sigmoid(u) if method == "kto" else
                       good * softplus(-u) + (1 - good) * softplus(u) for u, good in each)
    assert METHODS[method].loss(logprobs, batch, options).item() == pytest.approx(expected, rel=1e-5)


def test_pro_finds_the_answers_of_each_prompt_in_packed_batches():
    """The sum over batches is that of each prompt's own answers, by the formula."""
    rng, examples = random.Random(3), []
    for _ in range(9):
        documents = [Document(array("i", [rng.randrange(2, 64) for _ in range(rng.randint(3, 12))]), 2)
                     for _ in range(4)]
        examples.append(Example(documents, rewards=sorted((rng.gauss(0, 1) for _ in range(4)), reverse=True)))
    batches = list(train.pack(examples, 120, torch.device("cpu")))
    assert len(batches) > 2 and sum(batch.count for batch in batches) == 9

    def logprob(token):
        return -token / 40
    found = sum(METHODS["pro"].loss(torch.tensor([logprob(token) for token in batch.tokens[batch.targets].tolist()]),
                                    batch, Options(sft_coef=0.2)).item() for batch in batches)
    expected = 0.0
    for example in examples:
        sums = [sum(map(logprob, document.ids[2:])) for document in example.documents]
        means = [total / len(document.ids[2:]) for total, document in zip(sums, example.documents)]
        expected -= 0.2 * sums[0]
        for k in range(3):
            gaps = [example.rewards[k] - reward for reward in example.rewards[k + 1:]]
            others = sum(math.exp(gap * mean) for gap, mean in zip(gaps, means[k + 1:]))
            own = math.exp(max(gaps) * means[k])
            expected -= math.log(own / (own + others))
    assert found == pytest.approx(expected, rel=1e-5)


# ----------------------------------------------------------------------------- the command line

DATA = {"pretrain": "texts.jsonl", "identity": "pairs.jsonl", "partner": "pairs.jsonl", "equal": "pairs.jsonl",
        "better": "pairs.jsonl", "contrast": "pairs.jsonl"}
START = {"dpo": math.log(2), "robust": math.log(2), "cdpo": math.log(2), "reward": math.log(2), "ipo": 25.0,
         "kto": 1.0, "bco": 2 * math.log(2)}  # at beta 0.1, as long as the policy is the reference


def words_of(world, method, out, *more):
    words = [method, "--model", world / "base", "--data", world / DATA.get(method, "rated.jsonl"), "--out", out,
             "--lr", 1e-3, "--batch", 4, "--max-steps", 2, "--val-share", 0.3, "--device", "cpu", "--precision", "fp32",
             *more]
    heeded = METHODS[method].options
    if "weights" in heeded and "--weights" not in more:
        words += ["--weights", "helpful=0.7,harmless=0.3"]
    return words + (["--principle", "helpful"] if method == "reward" else []) + \
        (["--warmup-data", 1.0] if "warmup_data" in heeded else [])


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_from_the_command_line(world, tmp_path, monkeypatch, method):
    out = tmp_path / "out"
    assert run(train, monkeypatch, words_of(world, method, out)) == 0
    rows = metrics(out)
    assert [row["step"] for row in rows if "loss" in row] == [1, 2] and {row["stage"] for row in rows} == {method}
    assert all(math.isfinite(value) for row in rows for value in (row.get("loss", 0), row.get("val_loss", 0)))
    if method in START and method != "reward":
        assert rows[0]["val_loss"] == pytest.approx(START[method], rel=1e-4) == rows[1]["loss"]
    before, after = checkpoint.load(world / "base"), checkpoint.load(out, scorer=METHODS[method].scorer)
    assert not torch.equal(before.model.layers[0].mlp.up_proj.weight, after.model.layers[0].mlp.up_proj.weight)
    assert all(weight.isfinite().all() for weight in after.parameters())


def losses_of(world, monkeypatch, method, out, *more):
    assert run(train, monkeypatch, words_of(world, method, out, *more, "--max-steps", 4)) == 0
    return [(row["step"], row.get("loss"), row.get("val_loss")) for row in metrics(out)]


def test_modpo_with_one_objective_is_dpo(world, tmp_path, monkeypatch):
    """The same labels and losses, step by step, but for the last bits; and with a second objective, others."""
    dpo, modpo, other, both = (
        losses_of(world, monkeypatch, method, tmp_path / str(place), "--temperature", 2, "--weights", weights)
        for place, (method, weights) in enumerate((("dpo", "helpful=1"), ("modpo", "helpful=1"), ("dpo", "harmless=1"),
                                                   ("modpo", "helpful=1,harmless=1"))))

    def told(rows):
        return [[value for value in row if value is not None] for row in rows]
    same = [pytest.approx(row, rel=1e-5) for row in told(dpo)]
    assert len(dpo) == 6 and told(modpo) == same and told(other) != same and told(both) != same
    assert dpo[-1][2] != pytest.approx(math.log(2), abs=1e-3), "something was learned"


def test_modpos_optimum_is_that_of_dpo_on_the_weighted_sum(tmp_path):
    """Through the rows: whichever objective labels, what the loss asks of beta * log-ratio is the weighted sum's."""
    path = write(tmp_path / "rated.jsonl", *RATED)
    of_sum = methods.scored_rows([path], Options(weights=WEIGHTS, temperature=0.8))
    for weights in (WEIGHTS, "honest=0.3,helpful=0.7"):
        rows = methods.modpo_rows([path], Options(weights=weights, temperature=0.8))
        weight = next(iter(methods.weights_of(weights).values()))
        asked_for = [weight * math.log(row["p_a"] / (1 - row["p_a"])) + row["gap"] for row in rows]
        assert asked_for == pytest.approx([math.log(row["p_a"] / (1 - row["p_a"])) for row in of_sum])


def test_help_has_every_method_in_its_table(capsys):
    with pytest.raises(SystemExit):
        train.arguments(["--help"])
    said = capsys.readouterr().out
    table = said[said.index("    method   "):said.index("To add a method")]
    listed = [name for line in table.splitlines()[1:] for name in re.findall(r"\w+", line[:28])]
    assert sorted(listed) == sorted(METHODS) and max(map(len, table.splitlines())) <= 120
    assert len(set(listed)) == len(listed)


def test_reward_models_take_none_of_the_methods_own_options(monkeypatch, capsys):
    """They learn each principle apart: `reward.py train` knows no weights, temperature, beta or margin."""
    assert run(reward, monkeypatch, ["train", "--help"]) == 0
    said = capsys.readouterr().out
    flags = re.findall(r"--[\w-]+", said)
    assert "--lr" in flags and "--lora-rank" in flags
    for name in {name for method in METHODS.values() for name in method.options}:
        assert f"--{name.replace('_', '-')}" not in flags
