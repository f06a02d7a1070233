"""losses.py against closed forms: values by hand, gradients, and optima over all that can be said."""
import itertools
import math

import pytest
import torch

import losses


def double(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


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


# ----------------------------------------------------------------------------- the DPO family: values and gradients


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def softplus(x):
    return math.log(1 + math.exp(x))


LOGPROBS, REF = [[-1.0, -2.0], [-3.0, -0.5], [-2.5, -2.0]], [[-1.5, -1.0], [-2.0, -2.5], [-2.0, -4.0]]
LABELS, SIZES, GAPS = [1.0, 0.25, 0.5], [[2, 5], [3, 1], [4, 4]], [0.5, -1.0, 2.0]
D = [1.5, -3.0, -2.5]                                 # (first - its reference) - (second - its reference)
GAINED = [[0.5, -1.0], [-1.0, 2.0], [-0.5, 2.0]]      # each less its reference; their mean is 1 / 3
MEANS = [[-0.5, -0.4], [-1.0, -0.5], [-0.625, -0.5]]  # per token


def both(loss, margins):
    """loss(margin) where the first is better, loss(-margin) where the second is."""
    return sum(y * loss(m) + (1 - y) * loss(-m) for y, m in zip(LABELS, margins, strict=True))


def by_response(loss, gained):
    """loss(gain, chance that this response is the better one)."""
    return sum(loss(a, y) + loss(b, 1 - y) for (a, b), y in zip(gained, LABELS, strict=True))


def log_odds(mean):
    return math.log(math.exp(mean) / (1 - math.exp(mean)))


def chosen(values):
    return sum(y * a + (1 - y) * b for y, (a, b) in zip(LABELS, values, strict=True))


BY_HAND = {  # name: the loss of what stands above, and the same in plain arithmetic
    "ipo": (lambda lp, ref, y, n, gaps: losses.ipo(lp, ref, y, 0.4), lambda: both(lambda m: (m - 1.25) ** 2, D)),
    "cdpo": (lambda lp, ref, y, n, gaps: losses.dpo(lp, ref, losses.flipped(y, 0.1), 0.4),
             lambda: both(lambda m: 0.9 * softplus(-0.4 * m) + 0.1 * softplus(0.4 * m), D)),
    "robust": (lambda lp, ref, y, n, gaps: losses.dpo(lp, ref, losses.unflipped(y, 0.1), 0.4),
               lambda: both(lambda m: (0.9 * softplus(-0.4 * m) - 0.1 * softplus(0.4 * m)) / 0.8, D)),
    "simpo": (lambda lp, ref, y, n, gaps: losses.simpo(lp, n, y, 2.5, 0.7),
              lambda: both(lambda m: softplus(0.7 - 2.5 * m), [a - b for a, b in MEANS])),
    "rpo": (lambda lp, ref, y, n, gaps: losses.rpo(lp, ref, y, 0.4, 0.3),
            lambda: both(lambda m: softplus(-0.4 * m), D) - 0.3 * chosen(LOGPROBS)),
    "orpo": (lambda lp, ref, y, n, gaps: losses.orpo(lp, n, y, 0.3),
             lambda: 0.3 * both(lambda m: softplus(-m), [log_odds(a) - log_odds(b) for a, b in MEANS])
             - chosen(MEANS)),
    "kto": (lambda lp, ref, y, n, gaps: losses.kto(lp, ref, y, 0.4), lambda: by_response(
        lambda d, good: good * (1 - sigmoid(0.4 * (d - 1 / 3))) + (1 - good) * (1 - sigmoid(0.4 * (1 / 3 - d))),
        GAINED)),
    "bco": (lambda lp, ref, y, n, gaps: losses.bco(lp, ref, y, 0.4), lambda: by_response(
        lambda d, good: good * softplus(0.4 * (1 / 3 - d)) + (1 - good) * softplus(0.4 * (d - 1 / 3)), GAINED)),
    "copg": (lambda lp, ref, y, n, gaps: losses.copg(lp, ref, gaps, 0.4),
             lambda: sum((gap - 0.4 * d) ** 2 for gap, d in zip(GAPS, D)) / 1.6),
    "modpo": (lambda lp, ref, y, n, gaps: losses.modpo(lp, ref, y, 0.4, 0.25, gaps),
              lambda: both(lambda m: softplus(-m), [(0.4 * d - gap) / 0.25 for gap, d in zip(GAPS, D)]))}


@pytest.mark.parametrize("name", BY_HAND)
def test_the_family_by_hand(name):
    loss, expected = BY_HAND[name]
    logprobs, ref, labels, gaps = (torch.tensor(x, dtype=torch.float64) for x in (LOGPROBS, REF, LABELS, GAPS))
    assert loss(logprobs, ref, labels, torch.tensor(SIZES), gaps).item() == pytest.approx(expected(), rel=1e-12)


def test_ktos_common_point_is_not_below_the_reference():
    """All responses less likely than at the start: the point stays at 0."""
    found = losses.kto(torch.tensor([[-2.0, -4.0]]), torch.tensor([[-1.0, -1.0]]), torch.tensor([1.0]), 0.5)
    assert found.item() == pytest.approx(1 - sigmoid(-0.5) + 1 - sigmoid(1.5), rel=1e-6)


AT_START = {  # loss(logprobs, ref, labels), what it is for each pair, its gradient where the first response is better
    "dpo": (lambda lp, ref, y: losses.dpo(lp, ref, y, 0.7), math.log(2), [-0.35, 0.35]),
    "cdpo": (lambda lp, ref, y: losses.dpo(lp, ref, losses.flipped(y, 0.1), 0.7), math.log(2), [-0.28, 0.28]),
    "robust": (lambda lp, ref, y: losses.dpo(lp, ref, losses.unflipped(y, 0.1), 0.7), math.log(2),
               [-0.35 / 0.8, 0.35 / 0.8]),
    "ipo": (lambda lp, ref, y: losses.ipo(lp, ref, y, 0.5), 1.0, [-2.0, 2.0]),
    "kto": (lambda lp, ref, y: losses.kto(lp, ref, y, 0.8), 1.0, [-0.2, 0.2]),
    "bco": (lambda lp, ref, y: losses.bco(lp, ref, y, 0.8), 2 * math.log(2), [-0.4, 0.4]),
    "modpo": (lambda lp, ref, y: losses.modpo(lp, ref, y, 0.7, 0.5, torch.zeros(5)), math.log(2), [-0.7, 0.7]),
    "copg": (lambda lp, ref, y: losses.copg(lp, ref, 3 * (2 * y - 1), 0.6), 9 / 2.4, [-1.5, 1.5])}


@pytest.mark.parametrize("name", AT_START)
def test_the_family_begins_at_a_known_loss_and_moves_towards_the_label(name):
    """log 2 for all that tell the better from the worse response by a sigmoid."""
    loss, expected, gradient = AT_START[name]
    ref, gradient = double(5, 2), torch.tensor(gradient, dtype=torch.float64)
    for label, sign in ((1.0, 1), (0.0, -1)):
        logprobs = ref.clone().requires_grad_()
        found = loss(logprobs, ref, torch.full((5,), label, dtype=torch.float64))
        found.backward()
        assert found.item() == pytest.approx(5 * expected)
        torch.testing.assert_close(logprobs.grad, sign * gradient.expand(5, 2))


def test_simpo_and_orpo_move_towards_the_label():
    """The gradient by hand, wherever the policy is: for means of tokens, SimPO's is beta * sigmoid(margin - beta * gap)
    by the tokens of each; ORPO's log-odds have the gradient of the mean by (1 - P)."""
    logprobs, sizes = -double(4, 2).exp(), torch.tensor([[2, 5], [3, 3], [1, 7], [4, 2]])
    means = logprobs / sizes
    for labels, sign in ((torch.ones(4, dtype=torch.float64), 1), (torch.zeros(4, dtype=torch.float64), -1)):
        signs = torch.tensor([sign, -sign], dtype=torch.float64)
        pull = torch.sigmoid(0.6 - 1.5 * sign * (means[:, 0] - means[:, 1]))
        x = logprobs.clone().requires_grad_()
        losses.simpo(x, sizes, labels, 1.5, 0.6).backward()
        torch.testing.assert_close(x.grad, -1.5 * pull[:, None] * signs / sizes)
        odds = (means.exp() / (1 - means.exp())).log()
        pull = torch.sigmoid(-sign * (odds[:, 0] - odds[:, 1]))
        better = (signs > 0).double()
        x = logprobs.clone().requires_grad_()
        losses.orpo(x, sizes, labels, 0.3).backward()
        torch.testing.assert_close(x.grad, (-0.3 * pull[:, None] * signs / (1 - means.exp()) - better) / sizes)


def test_gradients_are_those_of_numerical_differences():
    """But for kto and bco, whose common point is held fast."""
    ref, labels, gaps = double(4, 2, seed=1), uniform(4), double(4, seed=2)
    sizes = torch.tensor([[2, 5], [3, 3], [1, 7], [4, 2]])
    for loss in (lambda x: losses.ipo(x, ref, labels, 0.5), lambda x: losses.simpo(x, sizes, labels, 2.0, 0.5),
                 lambda x: losses.rpo(x, ref, labels, 0.5, 0.2), lambda x: losses.orpo(x, sizes, labels, 0.5),
                 lambda x: losses.copg(x, ref, gaps, 0.5), lambda x: losses.modpo(x, ref, labels, 0.5, 0.3, gaps)):
        assert torch.autograd.gradcheck(loss, -double(4, 2).exp().requires_grad_())


def test_pro_by_hand():
    """Eqs. 7 to 9 with their temperatures written out; of two answers that differ by 1, the logistic loss."""
    logprobs, sizes = [[-4.0, -9.0, -2.0], [-1.0, -1.5, -6.0]], [[2, 3, 4], [1, 5, 2]]
    rewards = [[2.0, 1.5, -1.0], [3.0, 2.0, 0.0]]
    expected = 0.0
    for lp, count, r in zip(logprobs, sizes, rewards):
        means = [x / n for x, n in zip(lp, count)]
        for k in (0, 1):
            heat = {i: 1 / (r[k] - r[i]) for i in range(k + 1, 3)}
            heat[k] = min(heat.values())
            expected -= math.log(math.exp(means[k] / heat[k]) / sum(math.exp(means[i] / heat[i]) for i in heat))
        expected -= 0.3 * lp[0]
    found = losses.pro(*map(torch.tensor, (logprobs, sizes, rewards)), 0.3)
    assert found.item() == pytest.approx(expected)
    two = losses.pro(torch.tensor([[-4.0, -9.0]]), torch.tensor([[2, 3]]), torch.tensor([[1.0, 0.0]]), 0.05)
    assert two.item() == pytest.approx(softplus(-(-2 + 3)) + 0.05 * 4)


def test_pro_prefers_what_is_ranked_higher_and_ties_are_no_preference():
    logprobs, sizes = double(3, 4).requires_grad_(), torch.full((3, 4), 5)
    rewards = torch.tensor([[3.0, 2.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
    losses.pro(logprobs, sizes, rewards, 0.0).backward()
    slope = logprobs.grad
    assert (slope[:2, 0] < 0).all() and (slope[:2, 3] > 0).all() and not slope[2].any()
    assert torch.autograd.gradcheck(lambda lp: losses.pro(lp, sizes, rewards, 0.4), logprobs)


def test_orpo_is_finite_where_the_model_is_certain():
    """Log-probabilities of 0 and far below: no infinity in the loss or its gradient, in single precision."""
    logprobs = torch.tensor([[0.0, -1e-9], [-1e-12, -2000.0], [-3000.0, 0.0]], requires_grad=True)
    loss = losses.orpo(logprobs, torch.tensor([[3, 4], [2, 5], [1, 1]]), torch.tensor([1.0, 0.0, 1.0]), 0.1)
    loss.backward()
    assert loss.isfinite() and logprobs.grad.isfinite().all()


def test_without_their_second_term_rpo_is_dpo_and_orpo_is_fine_tuning():
    logprobs, ref, labels = -double(5, 2).exp(), double(5, 2, seed=1), uniform(5)
    sizes = torch.tensor([[2, 5]] * 5)
    assert losses.rpo(logprobs, ref, labels, 0.3, 0.0) == losses.dpo(logprobs, ref, labels, 0.3)
    of_first = losses.orpo(logprobs, sizes, torch.ones(5, dtype=torch.float64), 0.0)
    torch.testing.assert_close(of_first, losses.cross_entropy(logprobs[:, 0] / 2))


def test_modpo_of_one_objective_is_dpo():
    """The same loss and gradient."""
    ref, labels, results = double(6, 2), uniform(6), []
    for loss in (lambda x: losses.dpo(x, ref, labels, 0.3),
                 lambda x: losses.modpo(x, ref, labels, 0.3, 1.0, torch.zeros(6, dtype=torch.float64))):
        logprobs = double(6, 2, seed=1).requires_grad_()
        value = loss(logprobs)
        value.backward()
        results.append((value.detach(), logprobs.grad))
    torch.testing.assert_close(*results)
    for weight in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="above 0"):
            losses.modpo(ref, ref, labels, 0.3, weight, labels)


def test_robust_dpo_is_on_the_mean_over_flips_dpo_on_the_true_labels():
    logprobs, ref, rate = double(5, 2), double(5, 2, seed=1), 0.2

    def dpo(labels):
        return losses.dpo(logprobs, ref, labels, 0.7)
    for truth in (torch.ones(5, dtype=torch.float64), torch.tensor([1.0, 0, 0, 1, 0], dtype=torch.float64)):
        mean = (1 - rate) * dpo(losses.unflipped(truth, rate)) + rate * dpo(losses.unflipped(1 - truth, rate))
        torch.testing.assert_close(mean, dpo(truth))
        assert not torch.isclose(dpo(losses.unflipped(truth, rate)), dpo(truth))
    soft = uniform(5)
    torch.testing.assert_close(losses.unflipped(losses.flipped(soft, rate), rate), soft)


def test_kto_and_bco_hold_their_common_point_fast():
    """Gradients as of a constant point, and of KTO everywhere with the sign of worse less better: no finite optimum."""
    labels, beta = torch.tensor([0.9, 0.2, 0.6], dtype=torch.float64), 0.7
    good = torch.stack((labels, 1 - labels), dim=1)
    for seed in range(5):
        ref, logprobs = double(3, 2), double(3, 2, seed=seed + 1).requires_grad_()
        scores = beta * (logprobs.detach() - ref)
        losses.bco(logprobs, ref, labels, beta).backward()
        torch.testing.assert_close(logprobs.grad, beta * (torch.sigmoid(scores - scores.mean()) - good))
        logprobs.grad = None
        losses.kto(logprobs, ref, labels, beta).backward()
        likely = torch.sigmoid(scores - scores.mean().clamp(min=0))
        torch.testing.assert_close(logprobs.grad, beta * likely * (1 - likely) * (1 - 2 * good))
        assert (logprobs.grad.sign() == (0.5 - good).sign()).all()


# ----------------------------------------------------------------------------- the DPO family: optima

PAIRS = torch.tensor(list(itertools.combinations(range(7), 2)))  # each two of 7 responses once
REFERENCE, REWARD, OTHER = double(7, seed=1).log_softmax(-1), double(7, seed=2), double(7, seed=3)


def difference(reward, pairs=PAIRS):
    return reward[pairs[:, 0]] - reward[pairs[:, 1]]


def said(reward, pairs=PAIRS):
    """Labels as Bradley and Terry's: the chance that the first response is better."""
    return torch.sigmoid(difference(reward, pairs))


def fitted(loss, ref=REFERENCE, line_search="strong_wolfe", steps=500):
    """The policy over all that can be said, log-probabilities (n,), that a loss of log-probabilities leads to."""
    theta = ref.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([theta], max_iter=steps, max_eval=4 * steps, tolerance_grad=1e-12,
                                  tolerance_change=1e-14, line_search_fn=line_search)

    def closure():
        optimizer.zero_grad()
        value = loss(theta.log_softmax(-1))
        value.backward()
        return value
    optimizer.step(closure)
    return theta.detach().log_softmax(-1)


def apart(a, b):
    """Total variation between two policies, of log-probabilities."""
    return ((a.exp() - b.exp()).abs().sum() / 2).item()


def tilted(by, ref=REFERENCE):
    """ref * exp(by) / Z."""
    return (ref + by).log_softmax(-1)


@pytest.mark.parametrize("beta", [0.1, 1.0, 3.0])
def test_the_optimum_of_dpo_is_the_reference_tilted_by_the_reward(beta):
    """Over all pairs of 7 responses, labelled sigmoid(r_i - r_j), the optimum is pi = ref * exp(r / beta) / Z: that of
    reward less beta times divergence, which is DPO's point (arXiv 2305.18290, eqs. 4 to 7)."""
    found = fitted(lambda lp: losses.dpo(lp[PAIRS], REFERENCE[PAIRS], said(REWARD), beta))
    assert apart(REFERENCE, tilted(REWARD / beta)) > 0.05, "there is something to learn"
    assert apart(found, tilted(REWARD / beta)) < 1e-5


@pytest.mark.parametrize("rate", [0.1, 0.3])
def test_robust_dpo_finds_the_optimum_of_dpo_from_labels_partly_turned_round(rate):
    labels = losses.unflipped(losses.flipped(said(REWARD), rate), rate)
    assert apart(fitted(lambda lp: losses.dpo(lp[PAIRS], REFERENCE[PAIRS], labels, 1.0)), tilted(REWARD)) < 1e-5


@pytest.mark.parametrize("one, other", [(REWARD, OTHER), (OTHER, REWARD), (REWARD, REWARD)])
@pytest.mark.parametrize("weight, beta", [(1.0, 1.0), (0.5, 1.0), (0.2, 1.0), (0.8, 0.3)])
def test_the_optimum_of_modpo_is_that_of_the_weighted_sum(one, other, weight, beta):
    """Labelled by one objective, the other one as gaps; whichever of the two labels."""
    gaps = (1 - weight) * difference(other)
    found = fitted(lambda lp: losses.modpo(lp[PAIRS], REFERENCE[PAIRS], said(one), beta, weight, gaps))
    optimum = tilted((weight * one + (1 - weight) * other) / beta)
    assert apart(found, optimum) < 1e-5
    assert apart(optimum, tilted(one / beta)) > 0.03 or weight == 1 or one is other, "the weight matters"


@pytest.mark.parametrize("beta", [0.3, 1.0])
@pytest.mark.parametrize("pairs", [PAIRS, torch.tensor([[0, 4], [2, 4], [2, 6], [1, 6], [5, 1], [5, 3]])])
def test_the_optimum_of_copg_is_that_of_the_reward_from_any_pairs_that_reach_every_response(beta, pairs):
    found = fitted(lambda lp: losses.copg(lp[pairs], REFERENCE[pairs], difference(REWARD, pairs), beta))
    assert apart(found, tilted(REWARD / beta)) < 1e-5 < 0.05 < apart(REFERENCE, tilted(REWARD / beta))


@pytest.mark.parametrize("beta", [0.2, 0.5])
@pytest.mark.parametrize("labels", [said(REWARD), uniform(21)])
def test_the_optimum_of_ipo_is_the_reference_tilted_by_the_chance_of_being_better(beta, labels):
    """The gradient is 0 where the sum over others of (h - (2 P - 1) / (2 beta)) is, h the log-ratio: that sum of h is n
    times a response's own, less what is the same for all. So the chances are summed over the others, and divided by n.
    Labels that no reward explains do as well."""
    total = torch.zeros(7, dtype=torch.float64)
    total.index_add_(0, PAIRS[:, 0], labels).index_add_(0, PAIRS[:, 1], 1 - labels)
    found = fitted(lambda lp: losses.ipo(lp[PAIRS], REFERENCE[PAIRS], labels, beta))
    assert apart(found, tilted(total / 7 / beta)) < 1e-5 < 0.005 < apart(found, tilted(total / 6 / beta))


def chances(reward):
    """(n,): how often each response is the better one, over all pairs with others."""
    both = torch.sigmoid(reward[:, None] - reward)
    return (both.sum(1) - 0.5) / (len(reward) - 1)


EVEN = torch.tensor([-1.7, -0.9, -0.4, 0.0, 0.4, 0.9, 1.7], dtype=torch.float64)


@pytest.mark.parametrize("reward, beta", [(EVEN, 0.4), (EVEN, 1.0), (REWARD, 0.5)])
def test_the_optimum_of_bco_is_the_log_odds_of_being_better(reward, beta):
    """Score - mean = log(w / l) exactly where these are 0 on the mean, as of rewards that lie evenly around one; else
    up to what the sum of the probabilities, 1, leaves free: w + l times (sigmoid(score - mean) - w) is in proportion to
    the policy."""
    found = fitted(lambda lp: losses.bco(lp[PAIRS], REFERENCE[PAIRS], said(reward), beta), line_search=None)
    scores = beta * (found - REFERENCE)
    scores, odds = scores - scores.mean(), torch.logit(chances(reward))
    rest = (torch.sigmoid(scores) - chances(reward)) / found.exp()
    torch.testing.assert_close(rest, rest.mean().expand(7), atol=1e-6, rtol=0)
    if reward is EVEN:
        torch.testing.assert_close(scores, odds, atol=1e-5, rtol=0)
        assert apart(found, tilted(odds / beta)) < 1e-5
    else:
        assert 1e-3 < (scores - odds).abs().max() < 0.3 and apart(found, tilted(odds / beta)) < 0.05


@pytest.mark.parametrize("label, beta, margin", [(0.9, 2.0, 1.0), (0.7, 2.0, 0.0), (0.6, 0.5, 2.0), (0.5, 1.0, 1.0),
                                                 (0.2, 2.5, 0.7)])
def test_the_optimum_of_simpo_is_a_lead_per_token(label, beta, margin):
    """Of two responses, of 3 and 8 tokens: y * sigmoid(margin - g) = (1 - y) * sigmoid(margin + g), solved by halving,
    where g is beta times the difference of the means."""
    low, high = -50.0, 50.0
    while high - low > 1e-12:
        g = (low + high) / 2
        low, high = (g, high) if label * sigmoid(margin - g) > (1 - label) * sigmoid(margin + g) else (low, g)
    found = fitted(lambda lp: losses.simpo(lp[None], torch.tensor([[3, 8]]), torch.tensor([label]), beta, margin),
                   torch.tensor([0.4, 0.6], dtype=torch.float64).log())
    assert (beta * (found[0] / 3 - found[1] / 8)).item() == pytest.approx(low, abs=1e-5)
    assert margin or low == pytest.approx(math.log(label / (1 - label))), "with no margin: the label's log-odds"


@pytest.mark.parametrize("rate, beta", [(0.1, 0.5), (0.3, 0.5), (0.1, 2.0)])
def test_cdpo_has_a_finite_optimum_on_certain_labels(rate, beta):
    """Log-ratio logit(1 - rate) / beta, where DPO's has no end."""
    ref = torch.tensor([0.25, 0.75], dtype=torch.float64).log()
    labels = losses.flipped(torch.ones(1, dtype=torch.float64), rate)
    found = fitted(lambda lp: losses.dpo(lp[None], ref[None], labels, beta), ref)
    lead = (found - ref)[0] - (found - ref)[1]
    assert lead.item() == pytest.approx(math.log((1 - rate) / rate) / beta, abs=1e-5)


def test_certain_labels_leave_no_finite_optimum():
    """All goes to the best response, which the optimum of the reward gives less than half; and MODPO's weight ceases to
    matter: with 0.2 on it, the labelling objective still decides alone."""
    def steep(loss):
        return fitted(loss, steps=3000).exp()
    best, certain = REWARD.argmax(), (difference(REWARD) > 0).double()
    dpo = steep(lambda lp: losses.dpo(lp[PAIRS], REFERENCE[PAIRS], certain, 0.5))
    assert dpo[best] > 0.999 and tilted(REWARD / 0.5).exp()[best] < 0.9
    modpo = steep(lambda lp: losses.modpo(lp[PAIRS], REFERENCE[PAIRS], certain, 0.5, 0.2, 0.8 * difference(OTHER)))
    assert modpo[best] > 0.99 and tilted((0.2 * REWARD + 0.8 * OTHER) / 0.5).exp()[best] < 0.5


def test_without_a_reference_rpo_is_fine_tuning():
    """beta next to 0: each response as often as it is the better one."""
    found = fitted(lambda lp: losses.rpo(lp[PAIRS], REFERENCE[PAIRS], said(REWARD), 1e-9, 1.0))
    assert apart(found, (chances(REWARD) / chances(REWARD).sum()).log()) < 1e-5


# ----------------------------------------------------------------------------- PPO


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
    scores, ref, labels = double(6, 2), double(6, 2, seed=1), uniform(6)
    a, b, c = double(3, 6)
    sizes, below = torch.arange(1, 13).view(6, 2), -scores.abs()
    for loss, inputs, rest in ((losses.ipo, [scores, ref, labels], [0.3]), (losses.copg, [scores, ref, a], [0.3]),
                               (losses.simpo, [scores, sizes, labels], [2, 1]),
                               (losses.rpo, [scores, ref, labels], [0.3, 0.1]),
                               (losses.orpo, [below, sizes, labels], [0.1]),
                               (lambda *x: losses.modpo(*x[:3], 0.3, 0.5, x[3]), [scores, ref, labels, a], []),
                               (losses.cross_entropy, [a], []), (losses.bradley_terry, [scores, labels], []),
                               (losses.dpo, [scores, ref, labels], [0.3]), (losses.ppo_policy, [a, b, c], [0.2]),
                               (losses.ppo_value, [a, b, c], [0.2])):
        parts = [loss(*(x[i:i + 2] for x in inputs), *rest) for i in (0, 2, 4)]
        assert torch.allclose(loss(*inputs, *rest), torch.stack(parts).sum())
