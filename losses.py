"""Every loss of this project, as a pure function of log-probabilities or scores.

A loss gives a sum, and whoever calls it divides by what it is a mean over (targets, pairs, tokens): so a batch may be
cut into parts and the gradients added up. To add one, write it here and list it in train.METHODS.

Shapes: K target tokens, P pairs of responses, whose first column is the first response; N tokens of rollouts.
"""
import torch
import torch.nn.functional as F


def cross_entropy(logprobs):
    """Negative log-likelihood of the targets: what language models, policies and aligners learn by (MetaAligner, arXiv
    2403.17141, eqs. 4 to 6, which differ in their data alone).

    logprobs (K,): of each target token, given the tokens before it. Gives the sum over targets."""
    return -logprobs.sum()


def bradley_terry(scores, labels):
    """Cross-entropy of the labels against P(first is better) = sigmoid(score_1 - score_2) (Bradley and Terry 1952; with
    soft labels, as in MORLAIF's preference models, arXiv 2406.07295).

    scores (P, 2): of the two responses; labels (P,): the probability that the first is better. Sum over pairs."""
    return F.binary_cross_entropy_with_logits(scores[:, 0] - scores[:, 1], labels, reduction="sum")


def dpo(logprobs, ref_logprobs, labels, beta):
    """Direct preference optimisation (Rafailov et al., arXiv 2305.18290, eq. 7): Bradley-Terry, where a response's
    score is beta * log(pi / ref), by how much likelier the policy makes it than the reference does. For labels y in
    [0, 1] its optimum is pi(first) / pi(second) = ref(first) / ref(second) * (y / (1 - y)) ** (1 / beta).

    logprobs, ref_logprobs (P, 2): of whole responses under the policy and under the frozen reference. Sum over pairs:
    log 2 for each as long as the policy is the reference."""
    return bradley_terry(beta * (logprobs - ref_logprobs), labels)


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
