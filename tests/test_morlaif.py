"""What `make morlaif` does with models once they are trained, and the whole of it at a tiny size."""
import json
from dataclasses import replace

import numpy
import pytest
import torch

import feedback
import formats
import morlaif
import toy


@pytest.fixture(scope="module")
def pairs():
    rows = [(row["prompt"], *row["responses"]) for row in toy.rated(120, 5, responses=2)]
    return [{"prompt": prompt, "response_a": a["text"], "response_b": b["text"]} for prompt, a, b in rows]


def test_exact_scores_are_those_of_the_world(pairs):
    scores = morlaif.exact_pairs(["detail", "overall"], pairs)
    assert scores.shape == (2, 120, 2)
    assert scores[1, 7, 1].item() == pytest.approx(toy.score("overall", pairs[7]["prompt"], pairs[7]["response_b"]))


def test_normalised_scores_have_mean_0_and_deviation_1_and_a_constant_one_stays_finite():
    scores = torch.randn(3, 50, 2, generator=torch.Generator().manual_seed(0)) * 4 + 2
    scores[2] = 1.0
    found = morlaif.normalised_like(scores, scores)
    torch.testing.assert_close(found[:2].flatten(1).mean(1), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(found[:2].flatten(1).std(1), torch.ones(2))
    assert torch.equal(found[2], torch.zeros(50, 2))


def test_ties_are_left_out_and_an_undecided_margin_is_half_right():
    assert morlaif.right(torch.tensor([2.0, -1.0, 0.0, 3.0]), torch.tensor([1, 1, -1, 0])) == [1.0, 0.0, 0.5, None]


def test_exact_principles_predict_the_overall_preference_nearly_always_and_more_of_them_better(pairs):
    """The ceiling of figure 5: without noise of models, joined weights are right far beyond chance."""
    scores = morlaif.exact_pairs(morlaif.PRINCIPLES, pairs)
    truth = morlaif.exact_pairs(["overall"], pairs)[0]
    truth = (truth[:, 0] - truth[:, 1]).sign()
    scores = morlaif.normalised_like(scores, scores)
    found = morlaif.by_number(scores, scores, truth, pairs, seed=0, orders=4)
    share = {count: numpy.mean([value for value in values if value is not None]) for count, values in found.items()}
    assert share[12] > 0.85 and share[12] > share[3] > share[1] > 0.5


def test_weights_do_not_depend_on_the_scale_of_the_annotators_doubt_but_on_what_it_prefers(pairs):
    scores = morlaif.exact_pairs(["toxicity", "bias", "sycophancy"], pairs)
    weights = morlaif.fitted(morlaif.normalised_like(scores, scores), pairs, 0)
    assert weights.abs().mean().item() == pytest.approx(1)
    assert weights[0] > 0 and weights[1] > 0 and weights[2] < 0  # the asker likes courtesy, which sycophancy forbids


def test_a_scalarized_score_joins_the_principles_and_not_the_overall_one():
    scores = {name: torch.randn(13, 40, generator=torch.Generator().manual_seed(i))
              for i, name in enumerate(("start", "single", "worst_case", "linear, small"))}
    weights = {"same size": [1.0] * 12, "small": [0.5] * 12}
    found = morlaif.scalarized(scores, weights)
    assert set(found) == {"single", "worst_case", "linear, small"}
    assert found["single"] == [scores["start"][12].tolist(), scores["single"][12].tolist()]
    like = scores["start"][:12]
    x = (scores["worst_case"][:12] - like.mean(1, keepdim=True)) / like.std(1, keepdim=True)
    assert found["worst_case"][1] == pytest.approx(x.min(0).values.tolist(), abs=1e-5)


def test_rates_pool_seeds_and_leave_out_what_is_unknown():
    results = [{"seed": 0, "values": [1, 0, None], "prompts": ["a", "b", "c"]},
               {"seed": 1, "values": [1, 1, 1], "prompts": ["a", "b", "c"]}]
    percent, interval, each = morlaif.Found(results).rate(lambda r: r["values"], lambda r: r["prompts"])
    assert percent == pytest.approx(80) and each == [50, 100]
    assert interval[0] < 80 < interval[1]


@pytest.mark.slow
def test_the_whole_of_it_at_a_tiny_size(tmp_path, monkeypatch, capsys):
    """Every figure is printed and drawn; win rates of a pair of policies add up to 100; a second run repeats
    nothing."""
    tiny = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    monkeypatch.setattr(morlaif, "POLICY", {**morlaif.POLICY, **tiny})
    monkeypatch.setattr(morlaif, "SMALL", {**morlaif.SMALL, **tiny, "hidden_size": 16})
    monkeypatch.setattr(morlaif, "SFT", replace(morlaif.SFT, max_steps=3, batch=8))
    monkeypatch.setattr(morlaif, "PREFERENCE", replace(morlaif.PREFERENCE, epochs=0.5, batch=8))
    monkeypatch.setattr(morlaif, "PPO", replace(morlaif.PPO, rollouts=8, reference_count=8, max_new_tokens=24,
                                                minibatch=8, update_epochs=1))
    monkeypatch.setattr(morlaif, "QUICK_PAIRS", {"train": 24, "fit": 24, "test": 24})
    monkeypatch.setattr(morlaif, "QUICK_ITERATIONS", 2)
    monkeypatch.setattr(morlaif, "QUESTIONS", 12)
    monkeypatch.setattr("sys.argv", ["morlaif.py", "--quick", "--out", str(tmp_path / "run"), "--device", "cpu"])
    morlaif.main()
    said = capsys.readouterr().out
    for figure in ("Fig. 2a", "Fig. 2b", "Fig. 3", "Fig. 4", "Fig. 5"):
        assert figure in said and figure in (tmp_path / "run/quick/report.html").read_text()
    path = tmp_path / "run/quick/seed-0/results.json"
    wins = json.loads(path.read_text())["policies"]["wins"]
    for first in wins:
        for second in wins:
            assert numpy.add(wins[first][second], wins[second][first]) == pytest.approx(numpy.ones(12))
    labels = list(formats.read_preferences(path.parent / "labels.jsonl"))
    assert {row["principle"] for row in labels} == {*feedback.PRINCIPLES, "overall"}
    before = path.stat().st_mtime_ns
    morlaif.main()
    assert path.stat().st_mtime_ns == before and "learns to answer" not in capsys.readouterr().out
    code = morlaif.code_of("morlaif")
    monkeypatch.setattr(morlaif, "code_of", lambda script: {**code, "reward": "edited"})
    morlaif.main()
    said = capsys.readouterr().out
    assert path.stat().st_mtime_ns > before and "results.json: was made of other code or data; made anew" in said
