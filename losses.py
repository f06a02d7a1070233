"""Every loss of this project, as a pure function of log-probabilities or scores.

A loss gives a sum, and whoever calls it divides by what it is a mean over (targets, pairs, tokens): so a batch may be
cut into parts and the gradients added up; kto and bco alone hold responses against the mean of the part that they are
in. To add one, write it here and list it in methods.METHODS.

Shapes: K target tokens, P pairs of responses, whose first column is the first response; N tokens of rollouts. A label
is the probability that the first response is the better one: 1 says that it is.
"""
import torch
import torch.nn.functional as F


def cross_entropy(logprobs):
    """Negative log-likelihood of the targets: what language models, policies and aligners learn by (MetaAligner, arXiv
    2403.17141, eqs. 4 to 6, which differ in their data alone).

    logprobs (K,): of each target token, given the tokens before it. Gives the sum over targets."""
    return -logprobs.sum()


def expected(loss, margins, labels):
    """The sum over pairs of loss(margin) where the first response is better, and of loss(-margin) where the second is,
    each as often as the labels say: what is expected of labels drawn with these chances.

    loss: (P,) -> (P,), of the better response's margin over the worse; margins, labels (P,)."""
    return (labels * loss(margins) + (1 - labels) * loss(-margins)).sum()


def bradley_terry(scores, labels):
    """Cross-entropy of the labels against P(first is better) = sigmoid(score_1 - score_2) (Bradley and Terry 1952; with
    soft labels, as in MORLAIF's preference models, arXiv 2406.07295).

    scores (P, 2): of the two responses; labels (P,): the probability that the first is better. Sum over pairs."""
    return expected(lambda margin: F.softplus(-margin), scores[:, 0] - scores[:, 1], labels)


# ----------------------------------------------------------------------------------------------------------------
# Preference optimisation: the DPO family. pi is the policy, ref the frozen reference.
#
# logprobs, ref_logprobs (P, 2): of whole responses; labels (P,); sizes (P, 2): tokens of each response. Sums over
# pairs. Where labels are 0 or 1, as exact scores make them, most of these have no finite optimum: the better response
# is made ever likelier, however little better it is. Soft labels, sigmoid(score difference), bring the optimum back.


def log_ratios(logprobs, ref_logprobs):
    """How much more the first response gained than the second, log(pi / ref) against log(pi / ref): (P,)."""
    gained = logprobs - ref_logprobs
    return gained[:, 0] - gained[:, 1]


def dpo(logprobs, ref_logprobs, labels, beta):
    """Direct preference optimisation (Rafailov et al., arXiv 2305.18290, eq. 7): Bradley-Terry, where a response's
    score is beta * log(pi / ref), by how much likelier the policy makes it than the reference does. For labels y its
    optimum is pi(first) / pi(second) = ref(first) / ref(second) * (y / (1 - y)) ** (1 / beta).

    log 2 for each pair as long as the policy is the reference."""
    return bradley_terry(beta * (logprobs - ref_logprobs), labels)


def flipped(labels, rate):
    """Labels of which a share `rate` is turned round: DPO on them is cDPO (Mitchell 2023), with a finite optimum."""
    return labels * (1 - 2 * rate) + rate


def unflipped(labels, rate):
    """The inverse: labels (outside of [0, 1]) whose loss is on average, over labels of which a share `rate` was turned
    round, that of the true ones. DPO on them is robust DPO (Chowdhury et al., arXiv 2403.00409)."""
    return (labels - rate) / (1 - 2 * rate)


def ipo(logprobs, ref_logprobs, labels, beta):
    """Identity preference optimisation (Azar et al., arXiv 2310.12036, eq. 17): the log-ratio is drawn to 1 / (2 beta),
    and no further. For all pairs of n responses, pi = ref * exp(sum of P(better than another) / (n * beta)) / Z.
    Log-probabilities are sums over a response, as in the paper; TRL divides by its tokens: beta means something else
    there."""
    return expected(lambda margin: (margin - 1 / (2 * beta)) ** 2, log_ratios(logprobs, ref_logprobs), labels)


def simpo(logprobs, sizes, labels, beta, margin):
    """SimPO (Meng et al., arXiv 2405.14734, eq. 6): no reference; the mean log-probability per token of the better
    response is to be higher by margin / beta (the paper's gamma is `margin`)."""
    means = logprobs / sizes
    return expected(lambda gap: F.softplus(margin - beta * gap), means[:, 0] - means[:, 1], labels)


def rpo(logprobs, ref_logprobs, labels, beta, sft_coef):
    """Regularised preference optimisation (Liu et al., arXiv 2405.16436): DPO, and the better response's negative
    log-likelihood times sft_coef, so that it does not become less likely while the worse one does so faster."""
    likelihood = labels * logprobs[:, 0] + (1 - labels) * logprobs[:, 1]
    return dpo(logprobs, ref_logprobs, labels, beta) - sft_coef * likelihood.sum()


def orpo(logprobs, sizes, labels, odds_coef):
    """ORPO (Hong et al., arXiv 2403.07691, eqs. 6 and 7): fine-tuning on the better response, and its odds against the
    worse one's, P / (1 - P) with P the geometric mean of its tokens' probabilities. No reference."""
    means = logprobs / sizes                                                   # (P, 2): log P
    odds = means - torch.log(-torch.expm1(means.clamp(max=-1e-6)))             # (P, 2): log of P / (1 - P)
    likelihood = labels * means[:, 0] + (1 - labels) * means[:, 1]
    return odds_coef * bradley_terry(odds, labels) - likelihood.sum()


def kto(logprobs, ref_logprobs, labels, beta):
    """KTO (Ethayarajh et al., arXiv 2402.01306, eq. 8) on pairs: each response by itself, good with the chance that its
    label gives it, gains up to 1 as its log-ratio leaves a common point. That point is beta * KL(pi, ref): here the
    mean log-ratio of the batch's own responses, at least 0 (the paper: of prompts with other prompts' responses)."""
    scores = beta * (logprobs - ref_logprobs)
    point = scores.detach().mean().clamp(min=0)
    good = torch.stack((labels, 1 - labels), dim=1)                            # (P, 2)
    return (good * torch.sigmoid(point - scores) + (1 - good) * torch.sigmoid(scores - point)).sum()


def bco(logprobs, ref_logprobs, labels, beta):
    """Binary classifier optimisation (Jung et al., arXiv 2404.04656): is a response the better or the worse one of its
    pair, told by beta * log(pi / ref) against the mean of these over the batch (the paper: a running mean). At the
    optimum a response's score exceeds that mean by log(chance of being better / chance of being worse): exactly, if
    these logarithms are 0 on the mean; nearly, if not."""
    scores = beta * (logprobs - ref_logprobs)
    scores = scores - scores.detach().mean()
    good = torch.stack((labels, 1 - labels), dim=1)                            # (P, 2)
    return F.binary_cross_entropy_with_logits(scores, good, reduction="sum")


def pro(logprobs, sizes, rewards, sft_coef):
    """PRO (Song et al., arXiv 2306.17492, eqs. 7 to 9), on all K answers to a prompt, the best first: each is to be
    the likeliest, per token, of itself and those after it. Rewards set temperatures: against answer i, answer k counts
    reward_k - reward_i, and itself the largest of these. To this is added the best one's negative log-likelihood times
    sft_coef (the paper's code: 0.05 (K - 1)^2). No reference. With two answers whose rewards differ by 1:
    -log sigmoid(the difference of their means), and that likelihood.

    logprobs, sizes (P, K): of the answers; rewards (P, K), none higher than the one before it. Sum over prompts."""
    means, loss = logprobs / sizes, -sft_coef * logprobs[:, 0].sum()
    for k in range(means.shape[1] - 1):
        gaps = rewards[:, k, None] - rewards[:, k:]                            # (P, K - k): 0 of k itself
        gaps = torch.cat((gaps[:, -1:], gaps[:, 1:]), dim=1)                   # of k itself, now the largest
        loss = loss - (gaps * means[:, k:]).log_softmax(dim=1)[:, 0].sum()
    return loss


def copg(logprobs, ref_logprobs, gaps, beta):
    """Contrastive policy gradient (Flet-Berliac et al., arXiv 2406.19185) as a regression: beta * the log-ratio is to
    be the difference of the rewards, gaps (P,). Its optimum is pi = ref * exp(reward / beta) / Z, from any pairs that
    reach every response, whoever wrote them: no labels are needed."""
    return ((gaps - beta * log_ratios(logprobs, ref_logprobs)) ** 2).sum() / (4 * beta)


def modpo(logprobs, ref_logprobs, labels, beta, weight, gaps):
    """Multi-objective DPO (Zhou et al., arXiv 2310.03708, eq. 9): pairs labelled by one objective, of `weight`. gaps
    (P,): what the others, weighted, say of them, the first response's sum less the second's, in the units of the
    labels' log-odds. Its optimum is that of the weighted sum of all; with weight 1 and no others it is DPO."""
    if not weight > 0:
        raise ValueError("the objective that labels the pairs needs a weight above 0")
    return expected(lambda margin: F.softplus(-margin),
                    (beta * log_ratios(logprobs, ref_logprobs) - gaps) / weight, labels)


# ----------------------------------------------------------------------------------------------------------------
# PPO (Schulman et al., arXiv 1707.06347)


def ppo_policy(logprobs, old_logprobs, advantages, clip_coef):
    """The clipped surrogate (eq. 7), negated. Once a token's probability ratio has left 1 +- clip_coef in its
    advantage's direction, it has no gradient.

    logprobs, old_logprobs (N,): of the actions now, and when they were sampled; advantages (N,). Sum over tokens."""
    ratio = (logprobs - old_logprobs).exp()
    return -torch.min(ratio * advantages, ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantages).sum()


def ppo_value(values, old_values, returns, clip_coef):
    """Half the squared error of values (N,) from returns (N,); a move of more than clip_coef from what they were at the
    rollout, old_values (N,), gains nothing. Sum over tokens."""
    near = old_values + (values - old_values).clamp(-clip_coef, clip_coef)
    return 0.5 * torch.max((values - returns) ** 2, (near - returns) ** 2).sum()
