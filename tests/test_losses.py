"""losses.py against closed forms: values by hand, gradients, and optima over all that can be said."""
import itertools
import math

import pytest
import torch

import losses


def double(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_cross_entropy_by_hand():
    assert losses.cross_entropy(torch.tensor([0.5, 0.25, 0.125]).log()).item() == pytest.approx(6 * math.log(2))
    assert losses.cross_entropy(torch.zeros(0)).item() == 0


def test_bradley_terry_by_hand():
    """-y log s - (1 - y) log (1 - s), s = sigmoid(a - b)."""
    scores, labels = [[1.0, 0.5], [-2.0, 1.0], [3.0, 3.0]], [1.0, 0.0, 0.3]
    chances = [1 / (1 + math.exp(b - a)) for a, b in scores]
    expected = -sum(y * math.log(s) + (1 - y) * math.log(1 - s) for s, y in zip(chances, labels))
    assert losses.bradley_terry(torch.tensor(scores), torch.tensor(labels)).item() == pytest.approx(expected)


def test_dpo_by_hand():
    logprobs, ref, beta = [[-1.0, -2.0], [-3.0, -0.5]], [[-1.5, -1.0], [-2.0, -2.5]], 0.4
    margins = [beta * ((a - c) - (b - d)) for (a, b), (c, d) in zip(logprobs, ref)]
    labels = [1.0, 0.25]
    expected = -sum(y * math.log(1 / (1 + math.exp(-m))) + (1 - y) * math.log(1 / (1 + math.exp(m)))
                    for m, y in zip(margins, labels))
    found = losses.dpo(torch.tensor(logprobs), torch.tensor(ref), torch.tensor(labels), beta)
    assert found.item() == pytest.approx(expected)


def test_dpo_begins_at_log_2_and_moves_towards_the_label():
    ref = double(5, 2)
    for label, sign in ((1.0, -1), (0.0, 1)):
        logprobs = ref.clone().requires_grad_()
        loss = losses.dpo(logprobs, ref, torch.full((5,), label, dtype=torch.float64), 0.7)
        loss.backward()
        assert loss.item() == pytest.approx(5 * math.log(2))
        assert torch.allclose(logprobs.grad, sign * 0.35 * torch.tensor([1.0, -1.0], dtype=torch.float64).expand(5, 2))


@pytest.mark.parametrize("beta", [0.1, 1.0, 3.0])
def test_the_optimum_of_dpo_is_the_reference_tilted_by_the_reward(beta):
    """Over all pairs of 7 responses, labelled sigmoid(r_i - r_j), the optimum is pi = ref * exp(r / beta) / Z: that of
    reward less beta times divergence, which is DPO's point (arXiv 2305.18290, eqs. 4 to 7)."""
    ref, reward = double(7, seed=1).log_softmax(-1), double(7, seed=2)
    pairs = torch.tensor(list(itertools.combinations(range(7), 2)))
    labels = torch.sigmoid(reward[pairs[:, 0]] - reward[pairs[:, 1]])
    theta = ref.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([theta], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-14,
                                  line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = losses.dpo(theta.log_softmax(-1)[pairs], ref[pairs], labels, beta)
        loss.backward()
        return loss
    optimizer.step(closure)
    optimum = (ref + reward / beta).softmax(-1)
    assert (optimum - ref.exp()).abs().sum() / 2 > 0.05, "there is something to learn"
    assert (theta.softmax(-1) - optimum).abs().sum() / 2 < 1e-5


@pytest.mark.parametrize("ratio, advantage, loss, gradient", [
    (1.5, 2.0, -2.4, 0.0), (1.5, -2.0, 3.0, 3.0), (0.5, 2.0, -1.0, -1.0), (0.5, -2.0, 1.6, 0.0),
    (1.1, 2.0, -2.2, -2.2)])
def test_ppos_policy_loss_by_hand(ratio, advantage, loss, gradient):
    """d loss / d log-probability is -advantage * ratio where the ratio is not clipped."""
    new = torch.tensor([math.log(ratio) - 3], requires_grad=True)
    found = losses.ppo_policy(new, torch.tensor([-3.0]), torch.tensor([advantage]), 0.2)
    found.backward()
    assert (found.item(), new.grad.item()) == pytest.approx((loss, gradient), abs=1e-5)


@pytest.mark.parametrize("new, returned, loss, gradient", [
    (1.0, 2.0, 1.62, 0.0), (1.0, 0.0, 0.5, 1.0), (0.1, 2.0, 1.805, -1.9), (-1.0, -2.0, 1.62, 0.0)])
def test_ppos_value_loss_by_hand(new, returned, loss, gradient):
    """From 0 at the rollout, values are followed to 0.2 either way."""
    new = torch.tensor([new], requires_grad=True)
    found = losses.ppo_value(new, torch.tensor([0.0]), torch.tensor([returned]), 0.2)
    found.backward()
    assert (found.item(), new.grad.item()) == pytest.approx((loss, gradient), abs=1e-5)


def test_losses_add_up_over_the_parts_of_a_batch():
    scores, ref, labels = double(6, 2), double(6, 2, seed=1), torch.rand(6, dtype=torch.float64)
    a, b, c = double(3, 6)
    for loss, inputs, rest in ((losses.cross_entropy, [a], []), (losses.bradley_terry, [scores, labels], []),
                               (losses.dpo, [scores, ref, labels], [0.3]), (losses.ppo_policy, [a, b, c], [0.2]),
                               (losses.ppo_value, [a, b, c], [0.2])):
        parts = [loss(*(x[i:i + 2] for x in inputs), *rest) for i in (0, 2, 4)]
        assert torch.allclose(loss(*inputs, *rest), torch.stack(parts).sum())
