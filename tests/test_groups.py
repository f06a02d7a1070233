"""Advantages without a value head, by groups of responses to one prompt: RLOO, GRPO and GDPO against exact gradients,
against figures worked out one by one, against an optimum in closed form, and through whole runs."""
import itertools
import math
import random
import statistics
from array import array
from collections import Counter
from dataclasses import replace

import pytest
import torch

import conftest
import data
import losses
import ppo
import test_ppo
from common import UserError
from resume import read_metrics, read_run
from test_ppo import FAST, command, distance, killed, run, small_run, timeless, tiny, word_tokenizer

METHODS = ["rloo", "grpo", "gdpo"]
world = test_ppo.world  # the fixture


def rollouts_at(places, finished=True):
    """Rollouts of no text, which were drawn at these places."""
    return [ppo.Rollout("", "", data.Document(array("i", [0, 1]), 1), finished, place) for place in places]


# ----------------------------------------------------------------------------- RLOO: the exact gradient


@pytest.mark.parametrize("count, group", [(5, 2), (4, 3), (5, 3)])
def test_rloo_is_on_average_the_exact_gradient(count, group):
    """Over all tuples of outputs, each as often as the policy draws it, in any order of rows: the gradient, by
    automatic differentiation, of sum_y pi(y) (R(y) - beta log(pi(y) / ref(y)))."""
    generator, beta = torch.Generator().manual_seed(count * group), 0.3
    logits, reference, rewards = torch.randn(3, count, generator=generator, dtype=torch.float64)
    logprobs = logits.requires_grad_().log_softmax(0)
    divergence = logprobs - reference.log_softmax(0)
    exact, = torch.autograd.grad((logprobs.exp() * (rewards - beta * divergence)).sum(), logits, retain_graph=True)
    tuples = torch.tensor(list(itertools.product(range(count), repeat=group)))               # (tuples, group)
    chances = logprobs.detach()[tuples].sum(1).exp().repeat_interleave(group) / group
    order = torch.randperm(tuples.numel(), generator=generator)
    drawn = tuples.flatten()[order]
    cost = beta * divergence.detach()[drawn, None] * torch.tensor([0.25, 0.75])              # of two tokens
    options = ppo.Options(advantages="rloo", group=group)
    advantages, returns = ppo.group_advantages(rewards[drawn], None, None, rollouts_at(order.tolist()), cost,
                                               torch.ones(len(drawn), 2, dtype=torch.bool), options)
    assert torch.equal(advantages[:, 0], advantages[:, 1]) and not returns.any()
    loss = losses.ppo_policy(logprobs[drawn], logprobs[drawn].detach(), advantages[:, 0] * chances[order], 0.2)
    torch.testing.assert_close(-torch.autograd.grad(loss, logits)[0], exact)
    assert chances.sum() == pytest.approx(1) and exact.abs().max() > 0.05


def test_rloo_of_two_has_the_pairwise_gradient():
    """P3O's (arXiv 2310.00212): of -(r_1 - r_2) (log pi_1 - log pi_2) / 2."""
    rewards, logprobs = torch.randn(2, 10, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logprobs.requires_grad_()
    pairwise = -((rewards[:, 0] - rewards[:, 1]) * (logprobs[:, 0] - logprobs[:, 1])).sum() / 2
    ours = losses.ppo_policy(logprobs.flatten(), logprobs.detach().flatten(), ppo.rloo(rewards.flatten(), 2), 0.2) / 2
    torch.testing.assert_close(*(torch.autograd.grad(loss, logprobs)[0] for loss in (ours, pairwise)))


def test_rloo_by_hand():
    rewards = torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0, 5.0])
    assert ppo.rloo(rewards, 3).tolist() == [-3, -1.5, 4.5, 0, 0, 0]  # 1 - (2 + 6) / 2 and so on


# ----------------------------------------------------------------------------- GRPO and GDPO


def test_grpo_by_hand():
    found = ppo.grpo(torch.tensor([1.0, 3.0, 5.0, 0.0, 0.0, 30.0]), 3).tolist()
    deviation = math.sqrt(300)  # of 0, 0 and 30 about 10: (100 + 100 + 400) / 2
    assert found[:3] == pytest.approx([-1, 0, 1], abs=1e-4)
    assert found[3:] == pytest.approx([-10 / deviation, -10 / deviation, 20 / deviation], abs=1e-4)


@pytest.mark.parametrize("method", [ppo.rloo, ppo.grpo, lambda x, group: ppo.gdpo(torch.stack((x, -x)), [2, 1], group)])
def test_equal_rewards_have_no_advantage_at_all(method):
    """0, and not what rounding leaves: the mean of six times 0.7 is another number than 0.7 in fp32."""
    rewards = torch.tensor([0.7] * 6 + [1e6 + 0.1] * 6 + [-1 / 3] * 6)
    assert method(rewards, 6).eq(0).all() and method(rewards, 6).shape == (18,)


def test_grpo_knows_no_shift_and_no_scale():
    rewards = torch.randn(8, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = ppo.grpo(rewards.flatten(), 4).view(8, 4)
    shifts, scales = torch.linspace(-5, 5, 8)[:, None], torch.linspace(1, 9, 8)[:, None]
    torch.testing.assert_close(ppo.grpo((rewards * scales + shifts).flatten(), 4), found.flatten(), rtol=2e-3, atol=0)
    torch.testing.assert_close(found.mean(1), torch.zeros(8, dtype=torch.float64))
    torch.testing.assert_close(found.std(1), torch.ones(8, dtype=torch.float64), rtol=2e-3, atol=0)
    torch.testing.assert_close(ppo.grpo(-rewards.flatten(), 4), -found.flatten())
    assert torch.equal(found.argsort(1), rewards.argsort(1))


def test_gdpo_of_one_objective_is_grpo_standardised():
    scores = torch.randn(1, 12, generator=torch.Generator().manual_seed(2))
    one = ppo.standardised(ppo.grpo(scores[0], 3))
    torch.testing.assert_close(ppo.gdpo(scores, [1.0], 3), one)
    torch.testing.assert_close(ppo.gdpo(scores, [4.0], 3), one)
    torch.testing.assert_close(ppo.gdpo(scores, [-4.0], 3), -one)


def test_in_gdpo_an_objective_counts_by_its_weight_and_not_by_its_scale():
    """GRPO of the sum hardly sees the small objective; GDPO sees both, and of equal weights, cancels what they are at
    odds about."""
    small, large = torch.tensor([[0.0, 1, 0, 1], [500.0, 0, 0, 500]])
    both = torch.stack((small, large))
    torch.testing.assert_close(ppo.gdpo(both, [1, 1], 4), torch.tensor([0, 0, -1, 1]) * math.sqrt(2), rtol=0, atol=1e-3)
    assert ppo.grpo(small + large, 4).sign().tolist() == [1, -1, -1, 1]
    assert ppo.gdpo(both, [0, 2], 4).tolist() == pytest.approx([1, -1, -1, 1], abs=1e-4)
    mean, deviation = ppo.gdpo(torch.randn(2, 30), [1, 3], 5).mean(), ppo.gdpo(torch.randn(2, 30), [1, 3], 5).std()
    assert float(mean) == pytest.approx(0, abs=1e-5) and float(deviation) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("name", METHODS)
def test_divergence_is_charged_to_those_who_diverged_more_than_their_group(name):
    """Of equal scores, that alone is left, and in full: nothing divides it by its deviation."""
    options, scores = ppo.Options(advantages=name, group=2), torch.full((1, 4), 2.5)
    mask = torch.tensor([[True, True], [True, False], [True, True], [True, False]])
    cost = torch.tensor([[0.25, 0.5], [0.5, 0.0], [1.0, 1.0], [-1.0, 0.0]])
    few = (rollouts_at([3, 0, 1, 2]), cost, mask, options)  # rows 1 and 2, 3 and 0 are groups
    found, returns = ppo.group_advantages(scores[0], scores, [1.0], *few)
    assert found.tolist() == [[-1.75, -1.75], [1.5, 0], [-1.5, -1.5], [1.75, 0]] and not returns.any()
    few[0][0].finished = False
    found, _ = ppo.group_advantages(scores[0], scores, [1.0], *few[:3], replace(options, unfinished_penalty=3.0))
    assert found[:, 0].tolist() == [-4.75, 1.5, -1.5, 4.75]


# ----------------------------------------------------------------------------- in a run


def one_by_one(name, scores, weights, lost):
    """A run's advantages of responses, their groups in order, with plain numbers. scores (K lists)."""
    groups = [range(start, start + 4) for start in range(0, len(lost), 4)]
    rewards = [sum(weight * row[i] for weight, row in zip(weights, scores)) for i in range(len(lost))]

    def relative(row):
        return [(row[i] - statistics.mean(row[j] for j in group)) / (statistics.stdev(row[j] for j in group) + 1e-4)
                for group in groups for i in group]

    def beside_others(row):
        return [row[i] - statistics.mean(row[j] for j in group if j != i) for group in groups for i in group]
    if name == "rloo":
        return beside_others([reward - loss for reward, loss in zip(rewards, lost)])
    gained = relative(rewards)
    if name == "gdpo":
        sums = [sum(weight * x for weight, x in zip(weights, column)) for column in zip(*map(relative, scores))]
        gained = [(x - statistics.mean(sums)) / statistics.pstdev(sums) for x in sums]
    return [x - loss for x, loss in zip(gained, beside_others(lost))]


@pytest.mark.parametrize("name", METHODS)
def test_a_run_credits_each_action_with_its_responses_advantage(name, tmp_path, monkeypatch):
    """Figures worked out one by one, of three iterations in which the policy leaves the reference."""
    seen, evaluate, learn = [], ppo.evaluate_rollouts, ppo.learn
    monkeypatch.setattr(ppo, "evaluate_rollouts", lambda *args: seen.append([evaluate(*args)]) or seen[-1][0])

    def spy(agent, optimizer, rollouts, known, mask, *rest):
        seen[-1] += [rollouts, known.clone(), mask]
        found = learn(agent, optimizer, rollouts, known, mask, *rest)
        assert not any(parameter.any() for parameter in agent.value.parameters())  # a value head learns nothing
        return found
    monkeypatch.setattr(ppo, "learn", spy)
    rows, _ = small_run(tmp_path, advantages=name, group=4, reference_count=0, kl_coef=0.5, kl_target=0.001,
                        kl_horizon=20, unfinished_penalty=0.75, lr=3e-3)
    for row, ((logprobs, ref_logprobs, _, _), rollouts, (_, values, advantages, returns), mask) in zip(rows, seen):
        order = sorted(range(12), key=lambda i: rollouts[i].place)
        drawn = [rollouts[i] for i in order]
        assert Counter(rollout.prompt for rollout in drawn[::4]) == {"a b": 1, "b": 1, "c c a": 1}
        assert all(len({rollout.prompt for rollout in drawn[i:i + 4]}) == 1 for i in (0, 4, 8))
        assert all(len({rollout.response for rollout in drawn[i:i + 4]}) > 2 for i in (0, 4, 8))
        words = [rollout.response.split() for rollout in drawn]
        lost = [row["kl_coef"] * float((logprobs - ref_logprobs)[i].sum()) + 0.75 * (not rollout.finished)
                for i, rollout in zip(order, drawn)]
        expected = one_by_one(name, [[found.count("a") for found in words], [*map(len, words)]], (1.0, -0.5), lost)
        assert advantages[order].amax(1).clamp(min=0) + advantages[order].amin(1).clamp(max=0) == pytest.approx(
            torch.tensor(expected), rel=1e-3, abs=1e-4)
        assert torch.equal(advantages, advantages[:, :1] * mask) and not values.any() and not returns.any()
        assert order != list(range(12)) and row["value_loss"] == 0 == row["explained_variance"]
    assert rows[0]["kl_coef"] != rows[2]["kl_coef"] and abs(rows[2]["kl"]) > 0.01


@pytest.mark.parametrize("name", METHODS)
def test_what_all_responses_to_a_prompt_share_teaches_nothing(name, tmp_path):
    """Not in the least: no weight changes, though prompts differ by much, and lengths mix them."""
    policy, before = tiny(12, seed=1), tiny(12, seed=1)

    class OfPrompt:
        names, fingerprint = ["prompt"], {"prompt": "its length"}

        def score(self, prompts, responses):
            return torch.tensor([[0.7 + 30 * len(prompt) for prompt in prompts]])
    options = ppo.Options(**{**FAST, "advantages": name, "group": 3, "unfinished_penalty": 0.0})
    rows = ppo.improve(policy, word_tokenizer(12), ["a b", "b", "c c a"], OfPrompt(), [1.0], "linear", tmp_path,
                       options, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), before.parameters()))
    assert [row["grad_norm"] for row in rows] == [0, 0, 0] and rows[0]["unfinished"] > 0.2


class ByPrompt:
    """A reward for each prompt and response, by their texts."""
    names, fingerprint = ["table"], {"table": "by prompt"}

    def __init__(self, rewards):
        self.rewards = rewards

    def score(self, prompts, responses):
        return torch.tensor([[self.rewards[pair] for pair in zip(prompts, responses)]])


@pytest.mark.slow
def test_rloo_finds_the_optimum_of_reward_minus_divergence(tmp_path):
    """pi = reference * exp(r / beta) / Z, for two prompts whose rewards lie far apart: what a prompt adds cancels."""
    beta, policy, tokenizer = 0.5, tiny(6, seed=3, num_hidden_layers=1), word_tokenizer(6)
    generator, prompts, table, optima = random.Random(5), {"a": [0, 2], "b b": [0, 3, 3]}, {}, {}
    before = {text: test_ppo.response_probabilities(policy, ids, 1) for text, ids in prompts.items()}
    for prompt, chances in before.items():
        rewards = {text: generator.gauss(0, 1) for text in chances}
        weights = {text: chance * math.exp(rewards[text] / beta) for text, chance in chances.items()}
        optima[prompt] = {text: weight / sum(weights.values()) for text, weight in weights.items()}
        table |= {(prompt, text): reward + 20 * (prompt == "a") for text, reward in rewards.items()}
    options = ppo.Options(iterations=40, rollouts=128, minibatch=64, max_new_tokens=1, reference_count=0, lr=6e-3,
                          kl_coef=beta, kl_target=0, unfinished_penalty=0, precision="fp32", advantages="rloo", group=4)
    ppo.improve(policy, tokenizer, [*prompts], ByPrompt(table), [1.0], "linear", tmp_path, options, progress=False)
    for prompt, ids in prompts.items():
        after = test_ppo.response_probabilities(policy, ids, 1)
        assert distance(before[prompt], optima[prompt]) > 0.3  # 0.629 and 0.423
        assert distance(after, optima[prompt]) < 0.03          # 0.006 and 0.005


@pytest.mark.parametrize("name", METHODS)
def test_a_policy_learns_to_say_what_is_rewarded(name, tmp_path):
    rows, _ = small_run(tmp_path, weights=(1.0, 0.0), iterations=8, rollouts=32, minibatch=16, update_epochs=4,
                        lr=3e-3, advantages=name)
    assert rows[-1]["score"]["a"] > 2 * rows[0]["score"]["a"] > 0


def test_a_killed_run_resumes_as_if_nothing_had_been(tmp_path, monkeypatch):
    few = dict(iterations=4, kl_target=1.0, advantages="rloo", group=3)
    rows, _ = small_run(tmp_path / "whole", **few)
    killed(monkeypatch, tmp_path / "killed", 2, **few)
    resumed, _ = small_run(tmp_path / "killed", True, **few)
    assert timeless(resumed) == timeless(rows)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert weights[0] == weights[1]
    killed(monkeypatch, tmp_path / "other", 1, **few)
    for change in (dict(group=4), dict(advantages="grpo"), dict(advantages="gae")):
        with pytest.raises(UserError, match=f"unfinished run with other {next(iter(change))} "):
            small_run(tmp_path / "other", True, **{**few, **change})


# ----------------------------------------------------------------------------- command line


@pytest.mark.parametrize("name", METHODS)
def test_command_line(name, world, tmp_path, monkeypatch):
    words = command(world, tmp_path / "out", "--advantages", name, "--group", 3)
    assert run(monkeypatch, words) == 0
    assert len(read_metrics(tmp_path / "out")) == 2
    settings = read_run(tmp_path / "out")["settings"]
    assert settings["advantages"] == name and settings["group"] == 3


@pytest.mark.parametrize("more, expected", [
    (["--advantages", "guess"], ("--advantages", "'guess'", "rloo")),
    (["--advantages", "rloo", "--group", "1"], ("--group", "1 must be from 2")),
    (["--advantages", "rloo", "--group", "4"], ("--group 4 must be at least 2 and divide --rollouts 6",)),
    (["--advantages", "grpo"], ("--advantages grpo: --group 4 must", "divide --rollouts 6")),
    (["--advantages", "rloo", "--group", "12"], ("--group 12 must", "divide --rollouts 6")),
    (["--group", "3"], ("--group has no use with --advantages gae",)),
    (["--advantages", "gdpo", "--group", "3", "--scalarization", "median"], ("--advantages gdpo", "leave out", "med")),
    *((["--advantages", name, "--group", "3", *words], (said, f"has no use with --advantages {name}"))
      for name, (said, *words) in itertools.product(METHODS, (
          ("--gamma", "--gamma", "0.9"), ("--gae-lambda", "--gae-lambda", "1"), ("--vf-coef", "--vf-coef", "0"),
          ("--centre", "--no-centre"), ("--norm-adv", "--norm-adv"), ("--scale-reward", "--no-scale-reward"))))])
def test_mistakes_are_refused_before_any_model_is_loaded(world, tmp_path, monkeypatch, capsys, more, expected):
    for name in ("Together", "device_named"):  # what main begins with
        monkeypatch.delattr(ppo, name)
    conftest.refused(ppo, monkeypatch, capsys, command(world, tmp_path / "out", *more), *expected)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", [dict(group=1), dict(group=5), dict(advantages="gdpo", scalarization="median")])
def test_a_caller_is_refused_too(tmp_path, change):
    with pytest.raises(UserError, match="--advantages"):
        small_run(tmp_path / "out", **{"advantages": "rloo", **change})
    assert not (tmp_path / "out").exists()
