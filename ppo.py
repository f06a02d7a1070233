"""Reinforcement learning from preference models: PPO as it is used on language models (RLHF), in one loop.

examples:
  python ppo.py --model policy --data prompts.jsonl --reward pms/helpfulness pms/toxicity --weights 1 0.5 --out better
  python ppo.py --model policy --data prompts.jsonl --reward toy:helpfulness --out better --lr 1e-4

A reward is the folder of a preference model, or toy:NAME, an exact scorer of the embedded world. Their scores are
normalised, so that the reference's responses have mean 0 and deviation 1 on each, before --scalarization makes one
reward of them (see reward.py). Every run writes OUT/metrics.jsonl, a row per iteration, and OUT/run.json; it goes on
with --resume after a kill, and --overwrite begins again.
"""
# Each iteration, the policy responds to a batch of prompts, and preference models score the responses, one principle
# each. A few epochs of PPO (Schulman et al., arXiv 1707.06347) then make those responses more likely whose scalarized
# score is high, less what they cost in divergence from the policy at the start, the reference. `improve` does this, and
# reads from top to bottom; the functions below it are what it computes with, in the order of their use. How much better
# than expected an action was is told by a value head (`gae`), or by other responses to the prompt (`group_advantages`).
#
# What an iteration draws depends on the seed and the iteration's number alone: so a resumed run repeats a killed one
# (on a GPU, as train.py says, but for the last bits). Of several processes, each writes and scores a share of the
# responses, and is told of the others'; all compute the same advantages; each learns from a share of a minibatch.
#
# Shapes: N responses of an iteration, T actions (tokens) of the longest of them, K principles.
import copy
import math
import time
from array import array
from dataclasses import asdict, dataclass, field
from pathlib import Path

from common import (UserError, add_options, cli, digest, file_digest, lasting, make_parser, option, read_options,
                    refuse_given, seed_from)

import torch
from torch import nn
from tqdm import tqdm

import chat
import checkpoint
import data
import formats
import losses
import parallel
import reward
import toy
import train
from generate import generate
from model import Packed, chosen_logprobs, device_named, token_logprobs
from peers import peak
from resume import Run, for_card, read_metrics


@dataclass
class Options:
    """How to train. The defaults are MORLAIF's (arXiv 2406.07295), but for vf_coef, which is TRL's."""
    iterations: int = option(100, "rounds of answering and learning", 1, 10**9)
    rollouts: int = option(128, "responses per iteration", 1, 10**6)
    minibatch: int = option(32, "responses per optimizer step", 1, 10**6)
    update_epochs: int = option(4, "passes over an iteration's responses", 1, 1000)
    max_new_tokens: int = option(128, "longest response", 1, 10**6)
    reference_count: int = option(256, "the reference's responses to normalise scores on; 0: take scores as they are",
                                  0, 10**6)
    lr: float = option(4e-6, "highest learning rate", 0, 10)
    weight_decay: float = option(0.0, "AdamW's, on matrices only", 0, 10)
    warmup: float = option(0.05, "share of the iterations in which the rate rises; a cosine to zero follows", 0, 1)
    max_grad_norm: float = option(1.0, "longer gradients are cut to this", 1e-9, 1e9)
    kl_coef: float = option(0.05, "reward lost per nat of divergence from the reference, at first", 0, 1e6)
    kl_target: float = option(6.0, "kl_coef is steered towards so many nats per response; 0: it stays as it is", 0, 1e6)
    kl_horizon: int = option(10000, "the more responses this is, the slower it is steered", 1, 10**12)
    advantages: str = option("gae", "what an action is compared with: gae, a value head's guess; rloo, grpo, gdpo, "
                             "other responses to the prompt", choices=["gae", "rloo", "grpo", "gdpo"])
    group: int = option(4, "rloo, grpo, gdpo: responses to each prompt of an iteration", 2, 10**6)
    gamma: float = option(1.0, "discount per token", 0, 1)
    gae_lambda: float = option(0.95, "lambda of generalised advantage estimation", 0, 1)
    clip_coef: float = option(0.2, "largest change of a token's probability ratio, or of a value, to learn from",
                              1e-9, 1e9)
    vf_coef: float = option(0.1, "weight of the value's loss beside the policy's", 0, 1e6)
    centre: bool = option(True, "subtract an iteration's mean reward, so that while values are yet to be learned "
                          "nothing is gained by ending sooner or later")
    norm_adv: bool = option(True, "give an iteration's advantages mean 0 and deviation 1")
    scale_reward: bool = option(True, "divide rewards by their running deviation, and cut them at +-10")
    unfinished_penalty: float = option(1.0, "subtracted from the reward of a response that does not end", 0, 1e6)
    chat_template: str = chat.template_option()
    lora_rank: int = option(0, "train low-rank adapters of this rank, the rest frozen; 0: train everything", 0, 10**6)
    bf16_moments: bool = option(False, "keep AdamW's moments in bf16, rounded at random: 4 bytes less for each weight")
    replicate: bool = option(False, "with torchrun, needed: each process holds the whole policy", free=True)
    micro_tokens: int = option(16384, "tokens per forward pass; lower it when memory runs out", 1, 10**9, free=True)
    precision: str = option("auto", "bf16 (autocast over fp32 weights), fp32, or auto: bf16 where the device has it",
                            choices=["auto", "bf16", "fp32"])
    log: str = option("", "where every row of metrics goes too; a resumed run's rows go there again",
                      choices=["wandb", "tensorboard"], free=True)
    seed: int = option(0, "of prompts, sampling and minibatches", 0, 2**60)
    save_seconds: float = option(300.0, "seconds between saved states", 0, 1e9, free=True)


# ----------------------------------------------------------------------------------------------------------------
# Rewards: anything with .names [K], .score(prompts, responses), which gives (K, N) in fp32, .fingerprint {name: text}


class ExactScorer:
    """The embedded world's own judges, in place of preference models."""

    def __init__(self, names):
        self.names, self.fingerprint = list(names), dict.fromkeys(names, "exact")
        for name in self.names:
            toy.score(name, next(iter(toy.TASK_OF_QUESTION)), "")  # UserError for one that it does not know

    def score(self, prompts, responses):
        return torch.tensor([[float(toy.score(name, *pair)) for pair in zip(prompts, responses)]
                             for name in self.names])


class Together:
    """Several rewards as one, in the order of the words that name them on the command line."""

    def __init__(self, words, device=None):
        exact = [word.removeprefix("toy:") for word in words if word.startswith("toy:")]
        folders = [word for word in words if not word.startswith("toy:")]
        for folder in folders:
            if not Path(folder).is_dir():
                raise UserError(f"--reward {folder}: no such folder; give a preference model's, or toy:NAME")
        self.parts = [ExactScorer(exact)] if exact else []
        self.parts += [reward.Scorers(folders, device)] if folders else []
        found = [name for part in self.parts for name in part.names]
        apart = [word for word in words if word.startswith("toy:")] + folders
        self.order = [apart.index(word) for word in words]
        self.names = [found[i] for i in self.order]
        self.fingerprint = {name: found for part in self.parts for name, found in part.fingerprint.items()}
        twice = sorted({name for name in found if found.count(name) > 1})
        if twice:
            raise UserError(f"--reward: {', '.join(twice)} given twice; name each reward once")

    def score(self, prompts, responses):
        return torch.cat([part.score(prompts, responses) for part in self.parts])[self.order]


# ----------------------------------------------------------------------------------------------------------------
# The loop


@dataclass
class Course:
    """What a run carries from one iteration to the next, besides weights and optimizer."""
    kl_coef: float
    mean: list                                                     # [K], of the scores of the reference's responses
    std: list                                                      # [K]
    running: list = field(default_factory=lambda: [0, 0.0, 0.0])   # of all rewards so far: see `scaled`
    iteration: int = 0
    tokens: int = 0                                                # of responses
    seconds: float = 0.0


def improve(policy, tokenizer, prompts, rewards, weights, scalarization, out, options, resume=False, overwrite=False,
            about=None, progress=True):
    """Train policy, in place, to respond to prompts (texts) so that rewards score it higher; save it in the folder out.

    rewards: .names [K], .score(prompts, responses) -> (K, N), .fingerprint, another for rewards that score otherwise.
    weights [K], scalarization: see reward.read_scalarization. out gets metrics.jsonl, a row per iteration (given back),
    state.pt, to resume from, and run.json, with what `about` adds. resume, overwrite: as of resume.Run."""
    copies, join = copies_of(options, scalarization), reward.read_scalarization(scalarization)
    encoded = encode_prompts(tokenizer, prompts, policy.config, options)
    about = for_card(["ppo"], prompts[0], options) | parallel.about() | (about or {})
    settings = settings_of(policy, tokenizer, prompts, rewards, weights, scalarization, options)
    run = parallel.led(lambda: Run(out, settings, "ppo", resume, overwrite, about, options.log))
    if run.finished:
        return read_metrics(out)
    reference, agent = frozen_copy(policy), Agent(policy)
    optimizer = train.make_optimizer(agent, options)
    course = resumed(run, agent, optimizer)
    if course is None:
        course = Course(options.kl_coef, *normalisation(reference, tokenizer, encoded, rewards, options))
    began, saved = time.perf_counter() - course.seconds, time.perf_counter()
    with tqdm(total=options.iterations, initial=course.iteration, desc=run.out.name, disable=not progress) as bar:
        for iteration in range(course.iteration, options.iterations):
            # The policy responds, and its responses are scored
            chosen = train.draw(encoded, iteration, options.rollouts // copies, (options.seed, 0))
            rollouts = sample_rollouts(policy, tokenizer, chosen, iteration, options, copies)
            scores = score_rollouts(rewards, rollouts)                                       # (K, N)
            scalarized = reward.scalarize(normalised(scores, course.mean, course.std), weights, join[0], **join[1])
            unfinished = torch.tensor([not rollout.finished for rollout in rollouts])        # (N,)
            # Each token is credited with what follows from it, or with how its response does beside others
            logprobs, ref_logprobs, values, mask = evaluate_rollouts(agent, reference, rollouts, options)  # (N, T) each
            cost = course.kl_coef * (logprobs - ref_logprobs)
            if options.advantages == "gae":
                final = final_rewards(scalarized, unfinished, course.running, options)       # (N,)
                advantages, returns = token_advantages(final, cost, values, mask, options)
            else:
                advantages, returns = group_advantages(scalarized, scores, weights, rollouts, cost, mask, options)
            # The policy learns
            known = torch.stack((logprobs, values, advantages, returns))                     # (4, N, T)
            learned = learn(agent, optimizer, rollouts, known, mask, iteration, options)
            # What came of it
            kl = float((logprobs - ref_logprobs).sum(1).mean())
            course.tokens += int(mask.sum())
            course.iteration, course.seconds = iteration + 1, round(time.perf_counter() - began, 3)
            row = {"iteration": iteration + 1, "reward": float(scalarized.mean()),
                   "score": dict(zip(rewards.names, scores.mean(1).tolist())), "kl": kl, "kl_coef": course.kl_coef,
                   "entropy": -float(logprobs[mask].mean()), **learned,
                   "explained_variance": explained_variance(values[mask], returns[mask]),
                   "length": float(mask.sum(1).float().mean()), "unfinished": float(unfinished.float().mean()),
                   "tokens": course.tokens, "seconds": course.seconds}
            if not all(math.isfinite(row[name]) for name in ("kl", "policy_loss", "value_loss", "grad_norm")):
                raise UserError(f"{out}: iteration {iteration + 1} gives no finite loss; lower --lr or raise --kl-coef")
            run.write(row)
            bar.set_postfix_str(f"reward {row['reward']:.3f}, kl {kl:.2f}, {peak(policy.device.type):.1f} GiB")
            bar.update()
            course.kl_coef = steered(course.kl_coef, kl, len(rollouts), options)
            if time.perf_counter() - saved > options.save_seconds and iteration + 1 < options.iterations:
                run.save(agent=parallel.trained(agent), optimizer=optimizer.state_dict(), course=asdict(course))
                saved = time.perf_counter()
    return parallel.first(train.finish, run, policy, tokenizer)


def copies_of(options, scalarization):
    """How many responses each prompt gets. UserError where they make no whole groups, or cannot be compared so."""
    if options.advantages == "gae":
        return 1
    if options.group < 2 or options.rollouts % options.group:
        raise UserError(f"--advantages {options.advantages}: --group {options.group} must be at least 2 and divide "
                        f"--rollouts {options.rollouts}; change one of them")
    if options.advantages == "gdpo" and scalarization != "linear":
        raise UserError(f"--advantages gdpo: joins rewards by their weighted sum alone; leave out --scalarization "
                        f"{scalarization}, or give --advantages grpo")
    return options.group


def resumed(run, agent, optimizer):
    """The Course of a killed run, whose weights and moments go into agent and optimizer; None where a run begins."""
    if run.state is None:
        return None
    with run.loading():
        agent.load_state_dict(run.state.pop("agent"), strict=False)  # with LoRA, it holds the adapters alone
        optimizer.load_state_dict(run.state.pop("optimizer"))
        return Course(**run.state["course"])


def settings_of(policy, tokenizer, prompts, rewards, weights, scalarization, options):
    """All that decides what a run makes: {name: value}."""
    return {**lasting(options), "data": digest(prompts), "rewards": [list(rewards.names), rewards.fingerprint],
            "weights": list(map(float, weights)), "scalarization": scalarization,
            "model": digest(checkpoint.weights_digest(policy), vars(policy.config)),
            **chat.settings_of(tokenizer)}


# ----------------------------------------------------------------------------------------------------------------
# The policies


class Agent(nn.Module):
    """A policy, and a head beside it that reads the value of a state from its hidden state (D,): 0 until it is
    trained."""

    def __init__(self, policy):
        super().__init__()
        self.policy = policy
        self.value = nn.Linear(policy.config.hidden_size, 1, device=policy.device)
        nn.init.zeros_(self.value.weight)
        nn.init.zeros_(self.value.bias)

    def logprobs_and_values(self, batch):
        """Of a Batch's actions (its targets), (actions,) each in fp32. A value is that of the state in which the action
        was chosen: it is read at the token before."""
        hidden = self.policy(batch.tokens[None], Packed(batch.lengths, batch.tokens.device))[0]      # (tokens, D)
        logprobs = chosen_logprobs(self.policy, hidden, batch.tokens, batch.targets)
        states = hidden[batch.targets - 1].float()
        return logprobs, (states * self.value.weight).sum(-1) + self.value.bias  # autocast would round a matrix product


def frozen_copy(policy):
    """The reference: the policy as it is now. What LoRA leaves as it is, the two share."""
    shared = {id(weight): weight for weight in policy.parameters() if not weight.requires_grad}
    return copy.deepcopy(policy, shared).requires_grad_(False)


# ----------------------------------------------------------------------------------------------------------------
# Rollouts


@dataclass
class Rollout:
    """A response of the policy: document.ids[document.start:] are its actions, the stop token that ends it one of
    them. place: which of its iteration it was, before they were sorted."""
    prompt: str
    response: str
    document: data.Document
    finished: bool
    place: int


def encode_prompts(tokenizer, prompts, config, options):
    """[(prompt, ids)] of the prompts that leave room for a response in the model's context; says how many do not."""
    room = config.max_position_embeddings - options.max_new_tokens
    encoded = [(prompt, data.encode_prompt(tokenizer, prompt, config.bos_token_id, room)) for prompt in prompts]
    kept = [(prompt, ids) for prompt, ids in encoded if ids]
    if len(kept) < len(prompts):
        print(f"{len(prompts) - len(kept)} of {len(prompts)} prompts left out: empty, or too long for a response of "
              f"{options.max_new_tokens} tokens in a context of {config.max_position_embeddings}")
    if not kept:
        raise UserError(f"none of {len(prompts)} prompts to train on; check --data, or lower --max-new-tokens")
    return kept


def sample_rollouts(policy, tokenizer, prompts, iteration, options, copies=1):
    """The policy's responses to prompts [(text, ids)], sampled at temperature 1, as Rollouts, the shortest first. Of
    several to each prompt, those to the same one are neighbours by their places."""
    prompts, stop = [prompt for prompt in prompts for _ in range(copies)], policy.config.stop_ids

    def write(places):
        seeds = [seed_from(options.seed, iteration, place) for place in places]
        with train.autocast(policy.device, options):
            return generate(policy, [prompts[place][1] for place in places], options.max_new_tokens, temperature=1.0,
                            stop_ids=stop, seed=seeds, keep_stop=True)
    rollouts, written = [], parallel.by_shares(write, range(len(prompts)))
    for place, ((prompt, ids), actions) in enumerate(zip(prompts, written)):
        finished = bool(actions) and actions[-1] in stop
        response = tokenizer.decode(actions[:-1] if finished else actions).strip()
        document = data.Document(array("i", [*ids, *actions]), len(ids))
        rollouts.append(Rollout(prompt, response, document, finished, place))
    return sorted(rollouts, key=lambda rollout: len(rollout.document.ids))


def score_rollouts(rewards, rollouts):
    """What rewards give the responses: (K, N)."""
    def score(share):
        scores = rewards.score([rollout.prompt for rollout in share], [rollout.response for rollout in share])
        return [column.clone() for column in scores.T]  # a view would be sent with all that it is a view of
    scores = torch.stack(parallel.by_shares(score, rollouts), 1)
    if not scores.isfinite().all():
        bad = [name for name, row in zip(rewards.names, scores) if not row.isfinite().all()]
        raise UserError(f"the reward {', '.join(bad)} gives scores that are not finite; train it again")
    return scores


def normalisation(reference, tokenizer, encoded, rewards, options):
    """(means [K], deviations [K]) of the scores of the reference's responses; a principle that scores all alike: 1."""
    scores, prompts = [], train.draw(encoded, 0, options.reference_count, (options.seed, 0))
    for start in range(0, options.reference_count, options.rollouts):
        chosen = prompts[start:start + options.rollouts]
        scores.append(score_rollouts(rewards, sample_rollouts(reference, tokenizer, chosen, -2 - start, options)))
    if not scores:
        return [0.0] * len(rewards.names), [1.0] * len(rewards.names)
    scores = torch.cat(scores, 1)
    mean, std = scores.mean(1), scores.std(1, correction=0)
    alike = std <= 1e-6 * mean.abs().clamp(min=1)  # but for rounding
    return mean.tolist(), torch.where(alike, 1, std).tolist()


def pack_rollouts(rollouts, options, device):
    """Batches of rollouts, in order: they are sorted by length already."""
    return train.pack([data.Example([rollout.document]) for rollout in rollouts], options.micro_tokens, device)


@torch.no_grad()
def evaluate_rollouts(agent, reference, rollouts, options):
    """(N, T) each: the actions' log-probabilities, those by the reference, and values, zero after each row's last
    action; and where there are actions, a bool."""
    device = reference.device

    def evaluate(share):
        parts, counts = [], [len(rollout.document.ids) - rollout.document.start for rollout in share]
        for batch in pack_rollouts(share, options, device):
            with train.autocast(device, options):
                logprobs, values = agent.logprobs_and_values(batch)
                ref_logprobs = token_logprobs(reference, batch.tokens, batch.lengths, batch.targets)
            parts.append(torch.stack((logprobs, ref_logprobs, values)))
        return [part.clone() for part in torch.cat(parts, 1).cpu().split(counts, 1)]
    parts = parallel.by_shares(evaluate, rollouts)                                           # N of (3, actions)
    counts = torch.tensor([part.size(1) for part in parts])
    mask = (torch.arange(int(counts.max())) < counts[:, None]).to(device)
    rows = torch.zeros(3, *mask.shape, device=device)
    rows[:, mask] = torch.cat(parts, 1).to(device)
    return *rows, mask


# ----------------------------------------------------------------------------------------------------------------
# From scores to advantages


def normalised(scores, mean, std):
    """Scores (K, N) in deviations std [K] from mean [K]."""
    return (scores - torch.tensor(mean)[:, None]) / torch.tensor(std)[:, None]


def final_rewards(scalarized, unfinished, running, options):
    """What each response earns at its end (N,): its scalarized score (N,), less a penalty where it is unfinished (N,),
    centred and scaled. running: as for `scaled`."""
    rewards = scalarized - options.unfinished_penalty * unfinished
    if options.centre:
        rewards = rewards - rewards.mean()
    return scaled(rewards, running) if options.scale_reward else rewards


def scaled(rewards, running):
    """Rewards (N,) over the deviation of all rewards so far, these included, cut at +-10; their mean stays. running:
    [how many, their mean, squares about it], brought up to date in place."""
    count, mean, squares = running
    total, shift = count + len(rewards), float(rewards.mean()) - mean
    running[:] = [total, mean + shift * len(rewards) / total,
                  squares + float(rewards.var(correction=0)) * len(rewards) + shift**2 * count * len(rewards) / total]
    deviation = math.sqrt(running[2] / total)
    return (rewards / (deviation if deviation > 1e-6 else 1.0)).clamp(-10, 10)


def token_advantages(final, cost, values, mask, options):
    """(advantages, returns) of actions by `gae`, (N, T) each. An action loses its cost (N, T), in divergence from the
    reference; a response's last earns what the response does, final (N,)."""
    rewards, last = -cost, mask.sum(1) - 1
    rewards[torch.arange(len(last), device=mask.device), last] += final.to(mask.device)
    advantages, returns = gae(rewards, values, options.gamma, options.gae_lambda, mask)
    if options.norm_adv:
        advantages[mask] = standardised(advantages[mask])
    return advantages, returns


def gae(rewards, values, gamma, gae_lambda, mask):
    """Generalised advantage estimation (Schulman et al., arXiv 1506.02438, eq. 16): (advantages, returns).

    rewards, values (N, T): of each action, and of the state in which it was chosen. mask (N, T) bool: a row's first
    tokens, its actions; the state after the last has the value 0. With d_t = r_t + gamma * v_(t+1) - v_t, an
    advantage is the sum of (gamma * lambda)^l * d_(t+l) over l, and a return is advantage plus value. Both (N, T), and
    zero outside the mask."""
    rewards, values = (torch.where(mask, x, 0) for x in (rewards, values))
    advantages, next_value = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])
    following = next_value
    for t in reversed(range(rewards.size(1))):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = delta + gamma * gae_lambda * following
        advantages[:, t] = following
        next_value = values[:, t]
    return advantages, advantages + values


def standardised(advantages):
    """Advantages (actions,), shifted and scaled to mean 0 and deviation 1."""
    return (advantages - advantages.mean()) / (advantages.std(correction=0) + 1e-8)


def group_advantages(scalarized, scores, weights, rollouts, cost, mask, options):
    """(advantages, returns) of actions without values, (N, T) each; returns are 0, as the values are. All actions of a
    response have one advantage: of its scalarized score (N,) by rloo or grpo, of its scores (K, N) by gdpo. What it
    loses, its cost (N, T) and the penalty if it is unfinished, counts apart from that, by rloo, and is not divided."""
    place = torch.tensor([rollout.place for rollout in rollouts])
    drawn, group = place.argsort(), options.group  # in the order drawn, groups are neighbours
    lost = cost.sum(1).cpu() + options.unfinished_penalty * torch.tensor([not rollout.finished for rollout in rollouts])
    if options.advantages == "gdpo":
        gained = gdpo(scores[:, drawn], weights, group)
    else:
        gained = {"rloo": rloo, "grpo": grpo}[options.advantages](scalarized[drawn], group)
    advantages = (gained - rloo(lost[drawn], group))[place].to(mask.device)[:, None] * mask
    return advantages, torch.zeros_like(advantages)


def rloo(rewards, group):
    """Reinforce, leave one out (Ahmadian et al., arXiv 2402.14740): rewards (N,), `group` neighbours to a prompt, less
    the mean of the others to it, (N,). Linear in the rewards; exactly 0 where a group's are equal."""
    grouped = rewards.view(-1, group)
    apart = grouped - grouped[:, :1]  # without rounding, which Adam would make as much of as of anything else
    return (apart - (apart.sum(1, keepdim=True) - apart) / (group - 1)).flatten()


def grpo(rewards, group):
    """Group-relative advantages (Shao et al., arXiv 2402.03300, section 4.1): rewards (N,) less their group's mean,
    over its deviation (with group - 1 degrees of freedom, and 1e-4 more, as in TRL). Gives (N,)."""
    deviation = rewards.view(-1, group).std(1).repeat_interleave(group)
    return rloo(rewards, group) * (1 - 1 / group) / (deviation + 1e-4)  # the mean of the others -> of all


def gdpo(scores, weights, group):
    """GRPO of each reward apart (Liu et al., arXiv 2601.05242): scores (K, N), by grpo, then their sum by weights [K],
    standardised over the batch. Gives (N,). A reward counts by its weight, whatever its scale in a group."""
    return standardised(torch.as_tensor(weights, dtype=scores.dtype) @ torch.stack([grpo(x, group) for x in scores]))


# ----------------------------------------------------------------------------------------------------------------
# Learning


def learn(agent, optimizer, rollouts, known, mask, iteration, options):
    """PPO's epochs over an iteration's rollouts. known (4, N, T): the log-probabilities, values, advantages and returns
    of their actions. Gives what to report, as means over actions (of grad_norm: over optimizer steps)."""
    for group in optimizer.param_groups:
        group["lr"] = train.learning_rate(iteration, options.iterations, options)
    totals, actions, norms = torch.zeros(4, device=mask.device), 0, []
    for epoch in range(options.update_epochs):
        generator = torch.Generator().manual_seed(seed_from(options.seed, iteration, epoch, 1))
        for chosen in torch.randperm(len(rollouts), generator=generator).split(options.minibatch):
            chosen = chosen.sort().values  # the shortest first, as they are packed
            share, count = parallel.every(chosen), int(mask[chosen].sum())
            flat = known[:, share][:, mask[share]]                                           # (4, actions)
            for batch, part in parts_of([rollouts[i] for i in share.tolist()], flat, options):
                totals += add_gradients(agent, batch, part, count, options)
            actions += count
            parallel.add_up_gradients(parallel.trained(agent).values())
            norms.append(nn.utils.clip_grad_norm_(parallel.trained(agent).values(), options.max_grad_norm))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    parallel.add_up([totals])
    names = ("policy_loss", "value_loss", "clip_fraction", "approx_kl")
    return {**dict(zip(names, (totals / actions).tolist())), "grad_norm": float(torch.stack(norms).mean())}


def parts_of(rollouts, flat, options):
    """A minibatch in parts that fit a forward pass: Batches, each with what is known (4, actions) of its actions."""
    done = 0
    for batch in pack_rollouts(rollouts, options, flat.device):
        yield batch, flat[:, done:done + batch.count]
        done += batch.count


def add_gradients(agent, batch, known, actions, options):
    """Add a Batch's part to the gradients of a minibatch of so many actions. Gives sums (4,) over its own actions: of
    the two losses, of ratios out of the clip range, and of the divergence from the policy that chose them (Schulman's
    estimate, ratio - 1 - log ratio)."""
    old_logprobs, old_values, advantages, returns = known
    with train.autocast(known.device, options):
        logprobs, values = agent.logprobs_and_values(batch)
    policy_loss = losses.ppo_policy(logprobs, old_logprobs, advantages, options.clip_coef)
    value_loss = losses.ppo_value(values, old_values, returns, options.clip_coef)
    ((policy_loss + options.vf_coef * value_loss) / actions).backward()
    logratio = (logprobs - old_logprobs).detach()
    clipped, divergence = logratio.expm1().abs() > options.clip_coef, logratio.expm1() - logratio
    return torch.stack((policy_loss.detach(), value_loss.detach(), clipped.sum(), divergence.sum()))


def explained_variance(values, returns):
    """The share of the returns' variance that the values account for; 0 where they vary not at all."""
    variance = float(returns.var(correction=0))
    return 1 - float((returns - values).var(correction=0)) / variance if variance > 0 else 0.0


def steered(kl_coef, kl, count, options):
    """kl_coef after `count` responses that diverged by kl nats each: more where that is over the target, less where it
    is under (Ziegler et al., arXiv 1909.08593, section 2.2)."""
    if not options.kl_target:
        return kl_coef
    error = min(max(kl / options.kl_target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * count / options.kl_horizon)


# ----------------------------------------------------------------------------------------------------------------
# Command line


def arguments(argv=None):
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--model", required=True, metavar="FOLDER", help="the policy to start from, and to stay near to")
    add("--data", required=True, nargs="+", metavar="FILE", help="prompts, in any form that data.py reads")
    add("--reward", required=True, nargs="+", metavar="R", help="folders of preference models, or toy:NAME")
    add("--weights", nargs="+", metavar="W", help="one per reward, or a JSON file {name: weight} (default: 1 each)")
    add("--scalarization", nargs="+", default=["linear"], metavar="S", help="how several rewards become one, and its "
        f"options: {reward.SCALARIZATION_HELP} (default linear)")
    add("--out", required=True, metavar="FOLDER", help="where the policy and the metrics go")
    add("--resume", action="store_true", help="go on where a killed run with the same arguments stopped")
    add("--overwrite", action="store_true", help="begin again, whatever run the folder holds")
    add("--device", help="cpu, cuda, ... (default: cuda where there is one)")
    add_options(parser, Options)
    args = parser.parse_args(argv)
    options = read_options(Options, args)
    of_values = {"gamma", "gae_lambda", "vf_coef", "centre", "norm_adv", "scale_reward"}
    refuse_given(parser, args, {"group"} if options.advantages == "gae" else of_values,
                 f"has no use with --advantages {options.advantages}; leave it out")
    args.scalarization = " ".join(args.scalarization)
    reward.read_scalarization(args.scalarization)
    copies_of(options, args.scalarization)
    if args.resume and args.overwrite:
        parser.error("--resume goes on with a run, --overwrite begins again; give one of them")
    return args


def main():
    args = arguments()
    with parallel.processes(args.device) as device:
        run(args, read_options(Options, args), device_named(device))


def run(args, options, device):
    """What the command line asks for, from files to the saved policy."""
    if parallel.several() and not options.replicate:
        raise UserError("ppo.py: under torchrun, each process holds the whole policy, not a slice; give --replicate")
    checkpoint.check_folder(args.out, [args.model, *(word for word in args.reward if not word.startswith("toy:"))])
    rewards = Together(args.reward, device)
    weights = reward.read_weights(args.weights, rewards.names, rewards.fingerprint)
    policy = train.start_from(args.model, "ppo", device, options)
    tokenizer = train.load_tokenizer(args.model, policy, options, None if args.overwrite else args.out)
    rows = formats.read_all(args.data, formats.read_rated, "chosen", None)
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))
    print(f"{sum(p.numel() for p in policy.parameters()):,} parameters on {device}; {len(prompts):,} prompts; "
          "rewards: " + ", ".join(f"{weight:g} x {name}" for weight, name in zip(weights, rewards.names)))
    about = {"base": args.model, "reward": args.reward, "device": str(device),
             "files": {path: file_digest(path) for path in args.data}}
    rows = improve(policy, tokenizer, prompts, rewards, weights, args.scalarization, args.out, options, args.resume,
                   args.overwrite, about)
    print(f"reward {rows[0]['reward']:.3f} at first, {rows[-1]['reward']:.3f} at last, {rows[-1]['kl']:.2f} nats "
          f"from the reference; saved in {args.out}")


if __name__ == "__main__":
    cli(main)
