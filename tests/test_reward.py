"""Preference models, scalarization and what is reported, against slow loops and figures worked out by hand."""
import itertools
import json
import math
import re
import statistics
from functools import partial

import numpy
import pytest
import torch

import checkpoint
import conftest
import data
import feedback
import formats
import lora
import model
import reward
import toy
from common import UserError, write_jsonl
from formats import preference

run, refused = partial(conftest.run, reward), partial(conftest.refused, reward)


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ----------------------------------------------------------------------------- scalarization


def slow_linear(x):
    total = 0.0
    for value in x:
        total += value
    return total


def slow_worst_case(x):
    lowest = x[0]
    for value in x:
        lowest = value if value < lowest else lowest
    return lowest


def slow_soft_max_min(x, temperature=1.0):
    parts = [math.exp(-value / temperature) for value in x]
    return sum(part * value for part, value in zip(parts, x)) / sum(parts)


def slow_uncertainty_weighted(x, lam=0.5):
    return statistics.fmean(x) - lam * statistics.pvariance(x)


def slow_lower_quantile(x, share=1 / 3):
    count = min(n for n in range(1, len(x) + 1) if n / len(x) >= share - 1e-6)
    return statistics.fmean(sorted(x)[:count])


def slow_bernoulli_nash(x):
    return math.prod(math.log(1 + math.exp(value)) for value in x) ** (1 / len(x))


SLOW = {"linear": slow_linear, "worst_case": slow_worst_case, "soft_max_min": slow_soft_max_min,
        "uncertainty_weighted": slow_uncertainty_weighted, "lower_quantile": slow_lower_quantile,
        "median": statistics.median, "bernoulli_nash": slow_bernoulli_nash}
CASES = [(name, {}) for name in SLOW] + [
    ("soft_max_min", {"temperature": 0.3}), ("uncertainty_weighted", {"lam": 2.0}),
    ("lower_quantile", {"share": 0.5})]
MONOTONE = ["linear", "worst_case", "lower_quantile", "median", "bernoulli_nash"]


def random_case(size, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(size, count, generator=generator, dtype=torch.float64),
            torch.randn(size, generator=generator, dtype=torch.float64))


def test_the_seven_are_there_in_order():
    assert list(reward.SCALARIZATIONS) == list(SLOW)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("scalarization, options", CASES)
def test_scalarizations_agree_with_slow_loops(scalarization, options, dtype, tolerance):
    for size, count in itertools.product((1, 2, 3, 4, 7, 12), (1, 5)):
        scores, weights = random_case(size, count, seed=size)
        rewards = reward.scalarize(scores.to(dtype), weights.to(dtype), scalarization, **options)
        x = (weights[:, None] * scores).T.tolist()
        expected = [SLOW[scalarization](x[n], **options) for n in range(count)]
        assert rewards.dtype == dtype and rewards.shape == (count,)
        assert rewards.tolist() == pytest.approx(expected, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("scalarization", SLOW)
def test_neither_the_principles_order_nor_the_rest_of_a_batch_matters(scalarization):
    scores, weights = random_case(7, 9)
    rewards = reward.scalarize(scores, weights, scalarization)
    order, others = torch.tensor([3, 0, 6, 2, 1, 5, 4]), torch.tensor([8, 1, 0, 4, 3, 2, 7, 6, 5])
    reordered = reward.scalarize(scores[order], weights[order], scalarization)
    assert torch.allclose(reordered, rewards, rtol=1e-12, atol=1e-14)
    assert torch.equal(reward.scalarize(scores[:, others], weights, scalarization), rewards[others])
    for n in range(9):  # alone, and beside a response with extreme scores
        beside = torch.cat([scores[:, n:n + 1], torch.full((7, 1), 1e4, dtype=torch.float64)], 1)
        for batch in (beside[:, :1], beside):
            found = float(reward.scalarize(batch, weights, scalarization)[0])
            assert found == pytest.approx(float(rewards[n]), rel=1e-12)
    assert len(set(rewards.tolist())) == 9


@pytest.mark.parametrize("scalarization", MONOTONE)
def test_a_better_score_never_lowers_a_monotone_reward(scalarization):
    scores, weights = random_case(6, 200)
    weights = weights.abs()
    before = reward.scalarize(scores, weights, scalarization)
    for principle, rise in itertools.product(range(6), (0.1, 1.0, 10.0)):
        raised = scores.clone()
        raised[principle] += rise
        assert (reward.scalarize(raised, weights, scalarization) >= before).all()
    assert (reward.scalarize(scores + 1, weights, scalarization) > before).all()


@pytest.mark.parametrize("scalarization, low, high", [("soft_max_min", 2.0, 9.0), ("uncertainty_weighted", 3.0, 9.0)])
def test_the_other_two_are_not_monotone_as_they_say(scalarization, low, high):
    rewards = reward.scalarize(torch.tensor([[0.0, 0.0], [low, high]]), [1.0, 1.0], scalarization)
    assert rewards[0] > rewards[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_soft_max_min_lies_between_its_limits(dtype):
    scores, weights = (values.to(dtype) for values in random_case(5, 50))
    x = weights[:, None] * scores
    at = {t: reward.scalarize(scores, weights, "soft_max_min", temperature=t) for t in (1e-30, 1e-3, 0.1, 1, 10, 1e6)}
    assert torch.equal(at[1e-30], x.amin(0)) and torch.allclose(at[1e6], x.mean(0), atol=1e-5)
    for cooler, warmer in itertools.pairwise(at):
        assert (at[cooler] <= at[warmer] + 1e-6).all()
    assert (at[1] > x.amin(0)).all() and (at[1] < x.mean(0)).all()


def test_a_scalarization_is_read_with_its_options():
    assert reward.read_scalarization("linear") == ("linear", {})
    assert reward.read_scalarization("lower_quantile share=0.25") == ("lower_quantile", {"share": 0.25})
    assert reward.read_scalarization("  uncertainty_weighted   lam=2e-1 ") == ("uncertainty_weighted", {"lam": 0.2})
    assert all(f"{key}=" in reward.SCALARIZATION_HELP for key in ("temperature", "lam", "share"))


@pytest.mark.parametrize("text, said", [
    ("guess", "'guess': unknown; give one of linear"), ("linear share=1", "no option 'share'; it has none"),
    ("lower_quantile share", "write share=NUMBER"), ("lower_quantile share=x", "write share=NUMBER"),
    ("lower_quantile share=0.5 share=0.2", "'share' twice"), ("lower_quantile share=2", "the share is 2.0"),
    ("soft_max_min temperature=0", "give more than 0"), ("uncertainty_weighted lam=inf", "not all finite"),
    ("soft_max_min temperature=nan", "give more than 0"), ("soft_max_min lam=1", "it has temperature")])
def test_a_scalarization_that_is_none_is_one_line(text, said):
    with pytest.raises(UserError, match=re.escape(f"--scalarization {text}: ") + ".*" + re.escape(said)):
        reward.read_scalarization(text)


def test_scalarizations_by_hand():
    x = torch.tensor([[1.0, 5.0], [2.0, -1.0], [4.0, 0.0], [9.0, 2.0]])
    ones = torch.ones(4)
    assert reward.scalarize(x, ones, "median").tolist() == [3.0, 1.0]
    assert reward.scalarize(x, ones, "lower_quantile").tolist() == [1.5, -0.5]  # a third of four, rounded up: two
    assert reward.scalarize(x[:3], ones[:3], "lower_quantile").tolist() == [1.0, -1.0]
    assert reward.scalarize(x[:2], ones[:2], "lower_quantile").tolist() == [1.0, -1.0]  # K = 2: one of them
    assert reward.scalarize(x[:1], ones[:1], "lower_quantile").tolist() == [1.0, 5.0]
    twelve = torch.arange(12.0)[:, None]
    assert reward.scalarize(twelve, torch.ones(12), "lower_quantile").tolist() == [1.5]  # the mean of 0, 1, 2, 3
    assert reward.scalarize(x, [1, -1, 0, 0.5], "linear").tolist() == [3.5, 7.0]
    assert reward.scalarize(x, [1, -1, 0, 0.5], "worst_case").tolist() == [-2.0, 0.0]


def test_bernoulli_nash_stays_finite_and_tells_bad_from_worse():
    for dtype, lowest in ((torch.float32, -80.0), (torch.float64, -700.0)):
        x = torch.tensor([[lowest, lowest - 5, -41.0, -39.0, 0.0, 50.0, 1e4]], dtype=dtype)
        rewards = reward.scalarize(x, [1.0], "bernoulli_nash")
        assert rewards.isfinite().all() and (rewards > 0).all() and rewards[1] < rewards[0]
        assert rewards[2:].tolist() == pytest.approx([math.exp(-41), math.exp(-39), math.log(2), 50, 1e4], rel=1e-5)
    mixed = torch.tensor([[-150.0, -120.0], [300.0, 300.0]])  # in float32, exp of the first alone is 0
    rewards = reward.scalarize(mixed, [1.0, 1.0], "bernoulli_nash")
    assert rewards.log().tolist() == pytest.approx([(math.log(300) - 150) / 2, (math.log(300) - 120) / 2], rel=1e-4)


@pytest.mark.parametrize("arguments, told", [
    (([1, 1, 1], "product", {}), "'product': unknown; give one of linear, worst_case"),
    (([1, 1, 1], "linear", {"lam": 1}), "no option 'lam'; it has none"),
    (([1, 1, 1], "soft_max_min", {"lam": 1}), "no option 'lam'; it has temperature"),
    (([1, 1, 1], "soft_max_min", {"temperature": 0}), "temperature is 0"),
    (([1, 1, 1], "lower_quantile", {"share": 1.5}), "share is 1.5"),
    (([1, 1], "linear", {}), "one for each of the 3 principles"),
    (([[1], [1], [1]], "linear", {}), "one for each of the 3 principles"),
])
def test_scalarize_refuses_what_it_cannot_mean(arguments, told):
    weights, scalarization, options = arguments
    with pytest.raises(UserError, match=told):
        reward.scalarize(torch.zeros(3, 4), weights, scalarization, **options)


@pytest.mark.parametrize("scores", [torch.zeros(3), torch.zeros(0, 4), torch.zeros(1, 2, 3),
                                    torch.zeros(3, 4).long()])
def test_scalarize_refuses_scores_of_another_form(scores):
    with pytest.raises(UserError, match="give floats"):
        reward.scalarize(scores, torch.ones(len(scores)), "linear")


# ----------------------------------------------------------------------------- what is reported


def test_fitted_weights_are_those_that_made_the_labels():
    generator = numpy.random.default_rng(0)
    differences, true = generator.normal(size=(20000, 4)), numpy.array([2.0, -0.7, 0.0, 0.3])
    p_a = 1 / (1 + numpy.exp(-differences @ true))
    assert reward.fit_weights(differences, p_a, ridge=0) == pytest.approx(true, abs=1e-6)  # soft labels: exactly
    drawn = (generator.random(20000) < p_a).astype(float)
    assert reward.fit_weights(differences, drawn) == pytest.approx(true, abs=0.1)
    assert reward.fit_weights(torch.tensor(differences), torch.tensor(p_a), 0) == pytest.approx(true, abs=1e-6)


@pytest.mark.parametrize("scale", [0.01, 1.0, 300.0])
def test_fitted_weights_are_a_minimum_also_of_separable_labels(scale):
    generator = numpy.random.default_rng(1)
    differences = scale * generator.normal(size=(200, 3))
    p_a = (differences[:, 0] > 0).astype(float)

    def loss(weights):
        chance = 1 / (1 + numpy.exp(-numpy.clip(differences @ weights, -700, 700)))
        cross_entropy = -numpy.log(numpy.where(p_a == 1, chance, 1 - chance) + 1e-300).mean()
        return cross_entropy + 0.05 / 2 * (weights ** 2).sum()

    weights = reward.fit_weights(differences, p_a, ridge=0.05)
    for k in range(3):  # the slope by differences, in every direction
        step = numpy.eye(3)[k] * 1e-6
        assert abs(loss(weights + step) - loss(weights - step)) / 2e-6 < 1e-5
    assert weights[0] > 5 * abs(weights[1:]).max() and loss(weights) < loss(numpy.zeros(3))


def test_fitted_weights_where_newtons_whole_steps_go_astray():
    differences, p_a = numpy.array([[63.0, 15.0], [-19.0, 1.0], [-5.0, -2.0]]), numpy.array([0.0, 0.0, 1.0])
    weights = reward.fit_weights(differences, p_a, ridge=1e-3)
    slope = differences.T @ (1 / (1 + numpy.exp(-differences @ weights)) - p_a) / 3 + 1e-3 * weights
    assert abs(slope).max() < 1e-9


def test_accuracy_by_hand():
    margins, truth = [1.0, -2.0, 0.5, 0.0, 3.0, -1.0], [1, -1, -1, 1, 0, 0]  # right, right, wrong, half; two out
    percent, (low, high) = reward.accuracy(margins, truth, list("abcdef"))
    assert percent == pytest.approx(62.5) and low < percent < high
    assert reward.accuracy(margins, truth, ["a"] * 6) == (pytest.approx(62.5), None)
    assert reward.accuracy(margins, [0] * 6, list("abcdef")) == (None, None)
    twice = reward.accuracy(margins * 2, truth * 2, list("abcdef") * 2)  # the same prompts again: no new evidence
    assert twice == (pytest.approx(percent), pytest.approx([low, high]))
    assert reward.accuracy(torch.tensor(margins), torch.tensor(truth), list("abcdef"))[0] == pytest.approx(percent)


def test_calibration_by_hand():
    p, outcome = [0.05, 0.15, 0.19, 0.95, 1.0, 0.85], [0, 1, 0, 1, 1, 0.5]
    error, bins = reward.calibration(p, outcome)
    expected = [(0.05, 0.0, 1), (0.17, 0.5, 2), (0.85, 0.5, 1), (0.975, 1.0, 2)]
    assert [bins[k] == pytest.approx(row) for k, row in enumerate(expected)] == [True] * 4 and len(bins) == 4
    assert error == pytest.approx((0.05 + 2 * 0.33 + 0.35 + 2 * 0.025) / 6)
    assert reward.calibration([], []) == (None, [])
    generator = numpy.random.default_rng(0)
    p = generator.random(20000)
    assert reward.calibration(p, generator.random(20000) < p)[0] < 0.02
    assert reward.calibration(p, generator.random(20000) < p ** 3)[0] > 0.1


def test_correlations_agree_with_numpys():
    scores = torch.randn(4, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores[1] = 0.1  # whose mean over fifty is not quite 0.1
    scores[3] = -2 * scores[0] + 7
    found = reward.correlations(scores)
    others = [0, 2, 3]
    assert found[numpy.ix_(others, others)] == pytest.approx(numpy.corrcoef(scores[others].numpy()))
    assert found[1].tolist() == [0, 1, 0, 0] == found[:, 1].tolist() and found[0, 3] == pytest.approx(-1)


# ----------------------------------------------------------------------------- preference models


SIZES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
             max_position_embeddings=256, bos_token_id=0, eos_token_id=1)


@pytest.fixture
def labelled(tmp_path):
    """A folder with a tiny Llama in "base", and labels of 40 pairs on three principles; one answer insults more."""
    rated = [row for row in toy.rated(500, 3, responses=2)
             if len({answer["scores"]["harmless"] for answer in row["responses"]}) == 2][:40]
    texts = [row["prompt"] + response["text"] for row in rated for response in row["responses"]]
    tokenizer = toy.train_tokenizer(texts, 400)
    llama = model.Llama(model.Config(vocab_size=tokenizer.get_vocab_size(), **SIZES), 1)
    checkpoint.save(llama, tmp_path / "base")
    tokenizer.save(str(tmp_path / "base" / "tokenizer.json"))
    pairs = [{"prompt": row["prompt"], "response_a": row["responses"][0]["text"],
              "response_b": row["responses"][1]["text"]} for row in rated]
    write_jsonl(tmp_path / "labels.jsonl", feedback.embedded_labels(pairs, ["toxicity", "detail", "overall"], 1))
    return tmp_path


def training(labelled, out, *more):
    return ["train", labelled / "labels.jsonl", "--model", labelled / "base", "--out", labelled / out, "--lr", "3e-3",
            "--batch", "8", "--val-share", "0.25", "--precision", "fp32", "--device", "cpu", *more]


def scoring(labelled, *folders):
    return ["score", labelled / "labels.jsonl", "--models", *folders, "--device", "cpu"]


def test_one_model_is_trained_for_each_principle_and_its_scores_are_normalised(labelled, monkeypatch, capsys):
    assert run(monkeypatch, training(labelled, "pms", "--principles", "toxicity", "detail")) == 0
    said = capsys.readouterr().out
    assert re.search(r"toxicity +\d+ +\d+\.\d \[\d+\.\d, \d+\.\d\]", said) and "correlations" in said
    folders = [labelled / "pms" / name for name in ("toxicity", "detail")]
    scorers = reward.Scorers(folders, "cpu")
    rows = list(formats.read_preferences(labelled / "labels.jsonl", "toxicity"))
    scores = scorers.score(*reward.reference_responses(rows))
    assert scorers.names == ["toxicity", "detail"]
    assert not (labelled / "pms" / "overall").exists()
    torch.testing.assert_close(scores.mean(1), scorers.mean, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(scores.std(1, correction=0), scorers.std, rtol=1e-3, atol=1e-4)


def test_whole_models_and_adapters_score_in_one_call_as_each_alone(labelled, monkeypatch):
    """Adapters of one base side by side; the order of the folders is that of the scores."""
    assert run(monkeypatch, training(labelled, "whole", "--principles", "toxicity")) == 0
    assert run(monkeypatch, training(labelled, "lora", "--lora-rank", "4")) == 0
    assert (labelled / "lora" / "detail" / "adapter_config.json").exists()
    folders = [labelled / "lora" / "detail", labelled / "whole" / "toxicity", labelled / "lora" / "overall"]
    rows = list(formats.read_preferences(labelled / "labels.jsonl", "toxicity"))
    prompts, responses = reward.reference_responses(rows)
    together = reward.Scorers(folders, "cpu").score(prompts, responses, micro_tokens=1000)
    alone = [reward.Scorers([folder], "cpu").score(prompts, responses)[0] for folder in folders]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-4, atol=1e-4)
    assert (together[0] - together[2]).abs().max() > 1e-3


def test_a_score_is_that_of_the_text_as_it_is_trained_on(labelled, monkeypatch):
    assert run(monkeypatch, training(labelled, "pms", "--principles", "detail")) == 0
    llama = checkpoint.load(labelled / "pms" / "detail", scorer=True)
    tokenizer = checkpoint.load_tokenizer(labelled / "base")
    ids = data.encode_document(tokenizer, "How?", "So.", 0, 1).ids
    with torch.no_grad():
        expected = model.document_scores(llama, torch.tensor(ids), [len(ids)])
    found = reward.Scorers([labelled / "pms" / "detail"], "cpu").score(["How?", "Why? " * 300], ["So.", "So."])
    torch.testing.assert_close(found[:, :1], expected)
    assert found.isfinite().all()  # the second is longer than the context


def test_other_labels_or_settings_are_refused_and_trained_on_when_asked_to(labelled, monkeypatch, capsys):
    words = training(labelled, "pms", "--max-steps", "2")
    assert run(monkeypatch, words) == 0
    before = {path: path.read_bytes() for path in (labelled / "pms").rglob("*.*")}
    refused(monkeypatch, capsys, [*words, "--lr", "1e-3"], "toxicity: holds a finished run with other lr (0.003, now")
    labels = read(labelled / "labels.jsonl")
    write_jsonl(labelled / "labels.jsonl", [{**row, "p_a": 0.5} if row["principle"] == "detail" else row
                                            for row in labels if row["principle"] != "overall"])
    refused(monkeypatch, capsys, words, "detail: holds a finished run with other data")  # toxicity's are the same
    assert {path: path.read_bytes() for path in (labelled / "pms").rglob("*.*")} == before
    assert run(monkeypatch, [*words, "--overwrite"]) == 0
    said = capsys.readouterr().out
    assert "toxicity: finished already" in said and "detail: was made with other data; made anew" in said
    again = {path: path.read_bytes() for path in (labelled / "pms").rglob("*.*")}
    changed = {path.relative_to(labelled / "pms") for path in before if again.get(path) != before[path]}
    assert {str(path) for path in changed} >= {"detail/model.safetensors", "detail/principle.json"}
    assert not any(path.parts[0] == "toxicity" for path in changed)
    told = json.loads((labelled / "pms" / "weights.json").read_text())["of"]  # nobody has taken it for the new models'
    assert told["toxicity"] == checkpoint.fingerprint(labelled / "pms" / "toxicity")
    assert told["detail"] != checkpoint.fingerprint(labelled / "pms" / "detail")


def test_training_again_finds_it_finished_and_score_reads_what_train_wrote(labelled, monkeypatch, capsys):
    assert run(monkeypatch, training(labelled, "pms")) == 0
    before = {path: path.read_bytes() for path in (labelled / "pms").rglob("*.*")}
    assert list(json.loads((labelled / "pms" / "weights.json").read_text())) == ["toxicity", "detail", "of"]
    assert run(monkeypatch, training(labelled, "pms")) == 0
    assert "finished already" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in (labelled / "pms").rglob("*.*")} == before
    models = [labelled / "pms" / name for name in ("detail", "overall")]
    assert run(monkeypatch, [*scoring(labelled, *models), "--out", labelled / "scored.jsonl", "--device", "cpu"]) == 0
    rows = read(labelled / "scored.jsonl")
    scorers = reward.Scorers(models, "cpu")
    expected = scorers.score([rows[5]["prompt"]] * 2, [rows[5]["response_a"], rows[5]["response_b"]])
    assert rows[5]["scores"]["overall"] == pytest.approx(expected[1].tolist(), abs=1e-4)
    margins = [row["scores"]["detail"][0] - row["scores"]["detail"][1] for row in rows if row["principle"] == "detail"]
    truth = [row["p_a"] - 0.5 for row in rows if row["principle"] == "detail"]
    right = statistics.fmean(m * t > 0 for m, t in zip(margins, truth) if t)
    assert re.search(rf"detail +\d+ +{100 * right:.1f} \[", capsys.readouterr().out)


def test_bad_input_to_train_and_score_is_one_line(labelled, monkeypatch, capsys):
    refused(monkeypatch, capsys, training(labelled, "pms", "--principles", "kindness"), "no labels of kindness")
    refused(monkeypatch, capsys, training(labelled, "pms", "--principles", "detail", "wit"), "no labels of wit;")
    refused(monkeypatch, capsys, scoring(labelled, labelled / "nowhere"), "nowhere", "no such folder")
    refused(monkeypatch, capsys, ["score", labelled / "none.jsonl", "--models", labelled / "base"], "none.jsonl")
    write_jsonl(labelled / "answers.jsonl", [{"prompt": "Why?", "responses": [{"text": "So."}, {"text": "No."}]}])
    refused(monkeypatch, capsys, ["score", labelled / "answers.jsonl", "--models", labelled / "base"], "answers.jsonl",
            "no labels of any principle", "feedback.py label")
    for content in ([], {"name": "a", "mean": 0}, {"name": "a", "mean": "0", "std": 1},
                    {"name": 1, "mean": 0, "std": 1}):
        (labelled / "base" / "principle.json").write_text(json.dumps(content))
        refused(monkeypatch, capsys, scoring(labelled, labelled / "base"), "principle.json", "no name, mean and std")
    assert not (labelled / "pms").exists()


def test_only_preference_models_score(labelled, monkeypatch, capsys):
    """A language model's scalar head would be zero, and all its scores alike; one of several heads is none of ours."""
    refused(monkeypatch, capsys, scoring(labelled, labelled / "base"), "base", "is a language model")
    llama = checkpoint.load(labelled / "base")
    checkpoint.save(lora.add_lora(llama, 4, labelled / "base"), labelled / "adapter")
    (labelled / "adapter" / "tokenizer.json").write_bytes((labelled / "base" / "tokenizer.json").read_bytes())
    refused(monkeypatch, capsys, scoring(labelled, labelled / "adapter"), "adapter", "is a language model")
    two = model.Llama(model.Config(vocab_size=llama.config.vocab_size, **SIZES, num_labels=2))
    checkpoint.save(two, labelled / "two")
    refused(monkeypatch, capsys, scoring(labelled, labelled / "two"), "two: 2 scalar heads")


@pytest.mark.parametrize("words", [["--val-share", "1"], ["--lr", "-1"], ["--batch", "0"], ["--epochs", "nan"],
                                   ["--beta", "0.1"], ["--precision", "fp8"]])
def test_train_takes_the_numbers_of_train_and_names_a_wrong_one(labelled, monkeypatch, capsys, words):
    refused(monkeypatch, capsys, training(labelled, "pms", *words), *words[:1])
    assert not (labelled / "pms").exists()


@pytest.mark.parametrize("name", ["up/../down", "..", "", "a\0b", "a\nb", "x" * 200_000])
def test_a_principle_that_cannot_name_a_folder_is_refused(labelled, monkeypatch, capsys, name):
    write_jsonl(labelled / "labels.jsonl", [preference("p", "a", "b", name, 1.0)])
    refused(monkeypatch, capsys, training(labelled, "pms"), repr(name)[:20], "cannot name a folder")


def test_fitted_weights_are_those_the_overall_labels_were_made_with(tmp_path):
    """In units of each principle's standard deviation, which the models' raw scores are not."""
    class Scorers:
        names, std = ["a", "overall", "b"], torch.tensor([2.0, 1.0, 0.5])
        fingerprint = {"a": "x", "overall": "y", "b": "z"}
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(3, 4000, 2, generator=generator) * Scorers.std[:, None, None]
    margin = (scores[..., 0] - scores[..., 1]) / Scorers.std[:, None]
    p_a = torch.sigmoid(1.5 * margin[0] - 0.5 * margin[2]).tolist()
    rows = [preference("q", "x", "y", "overall", p) for p in p_a]
    reward.write_weights(tmp_path / "weights.json", Scorers, rows, scores)
    found = json.loads((tmp_path / "weights.json").read_text())
    assert found.pop("of") == {"a": "x", "b": "z"} and found == pytest.approx({"a": 1.5, "b": -0.5}, abs=0.02)


def test_a_text_in_several_pairs_is_scored_once():
    class Scorers:
        names, asked = ["length", "first"], []

        def score(self, prompts, responses):
            self.asked += responses
            return torch.tensor([[float(len(text)) for text in responses], [float(ord(text[0])) for text in responses]])
    rows = [preference("q", *pair, "overall", 1.0) for pair in (("aa", "b"), ("b", "cccc"), ("aa", "b"))]
    scores = reward.score_pairs(Scorers(), rows)
    assert scores.tolist() == [[[2, 1], [1, 4], [2, 1]], [[97, 98], [98, 99], [97, 98]]]
    assert Scorers.asked == ["aa", "b", "cccc"]
