"""Reinforcement learning from preference models: PPO as it is used on language models (RLHF), in one loop.

Each iteration, the policy answers a batch of prompts, and preference models score the answers, one principle each. A
few epochs of PPO (Schulman et al., arXiv 1707.06347) then make those answers more likely whose scalarized score is
high, less what they cost in divergence from the policy at the start, the reference. `improve` does this, and reads
from top to bottom; the functions below it are what it computes with, in the order of their use.

What an iteration draws depends on the seed and the iteration's number alone: so a resumed run repeats a killed one.
"""
import argparse
import copy
import math
import os
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path

import data
from data import UserError, cli

EPILOG = """examples:
  python ppo.py --model policy --data prompts.jsonl --reward pms/helpfulness pms/toxicity --weights 1 0.5 --out better
  python ppo.py --model policy --data prompts.jsonl --reward toy:helpfulness --out better --lr 1e-4

A reward is the folder of a preference model, or toy:NAME, an exact scorer of the embedded world. Their scores are
normalised, so that the reference's answers have mean 0 and deviation 1 on each, before --how makes one of them:
linear, worst_case, soft_max_min, uncertainty_weighted, lower_quantile, median or bernoulli_nash (see reward.py).
Every run writes OUT/metrics.jsonl, a row per iteration."""


def arguments(argv=None):
    parser = argparse.ArgumentParser(description="Train a policy by PPO on the scores of preference models.",
                                     epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, metavar="FOLDER", help="the policy to start from, and to stay near to")
    add("--data", required=True, nargs="+", metavar="FILE", help="prompts, in any form that data.py reads")
    add("--reward", required=True, nargs="+", metavar="R", help="folders of preference models, or toy:NAME")
    add("--weights", nargs="+", metavar="W", help="one per reward, or a JSON file {name: weight} (default: 1 each)")
    add("--how", default="linear", metavar="NAME", help="how several rewards become one, see below (default linear)")
    add("--out", required=True, metavar="FOLDER", help="where the policy and the metrics go")
    add("--resume", action="store_true", help="go on where a killed run with the same arguments stopped")
    defaults = Options()
    for name, kind, _, text in OPTION_HELP:
        flag, default = "--" + name.replace("_", "-"), getattr(defaults, name)
        if kind is bool:
            add(flag, action=argparse.BooleanOptionalAction, default=default, help=f"{text} (default {default})")
        else:
            add(flag, type=kind, default=default, metavar=kind.__name__.upper(), help=f"{text} (default {default})",
                choices=["auto", "bf16", "fp32"] if kind is str else None)
    add("--device", default=None, help="cpu, cuda, ... (default: cuda where there is one)")
    args = parser.parse_args(argv)
    for name, _, span, _ in OPTION_HELP:
        value = getattr(args, name)
        if span and not span[0] <= value <= span[1]:
            parser.error(f"--{name.replace('_', '-')} is {value}, but must be from {span[0]} to {span[1]}")
    return args


@dataclass
class Options:
    """How to train. The defaults are MORLAIF's (arXiv 2406.07295), but for the value coefficient, which is TRL's."""
    iterations: int = 100
    rollouts: int = 128
    minibatch: int = 32
    epochs: int = 4
    max_new_tokens: int = 128
    reference_count: int = 256
    lr: float = 4e-6
    weight_decay: float = 0.0
    warmup: float = 0.05
    grad_clip: float = 1.0
    kl: float = 0.05
    kl_target: float = 6.0
    kl_horizon: int = 10000
    gamma: float = 1.0
    lam: float = 0.95
    clip: float = 0.2
    value_coefficient: float = 0.1
    centre: bool = True
    whiten: bool = True
    scale_reward: bool = True
    unfinished_penalty: float = 1.0
    lora_rank: int = 0
    bf16_moments: bool = False
    micro_tokens: int = 16384
    precision: str = "auto"
    seed: int = 0
    save_seconds: float = 300.0


OPTION_HELP = [  # name, type, what is refused at once, help
    ("iterations", int, (1, 10**9), "rounds of answering and learning"),
    ("rollouts", int, (1, 10**6), "answers per iteration"),
    ("minibatch", int, (1, 10**6), "answers per optimizer step"),
    ("epochs", int, (1, 1000), "passes over an iteration's answers"),
    ("max_new_tokens", int, (1, 10**6), "longest answer"),
    ("reference_count", int, (0, 10**6), "the reference's answers to normalise scores on; 0: take them as they are"),
    ("lr", float, (0, 10), "highest learning rate"), ("weight_decay", float, (0, 10), "AdamW's, on matrices only"),
    ("warmup", float, (0, 1), "share of the iterations in which the rate rises; a cosine to zero follows"),
    ("grad_clip", float, (1e-9, 1e9), "largest gradient norm"),
    ("kl", float, (0, 1e6), "reward lost per nat of divergence from the reference, at first"),
    ("kl_target", float, (0, 1e6), "nats per answer that the coefficient is steered to; 0: it stays as it is"),
    ("kl_horizon", int, (1, 10**12), "the more answers this is, the slower it is steered"),
    ("gamma", float, (0, 1), "discount per token"), ("lam", float, (0, 1), "lambda of generalised advantages"),
    ("clip", float, (1e-9, 1e9), "largest change of a token's probability ratio, or of a value, to learn from"),
    ("value_coefficient", float, (0, 1e6), "weight of the value's loss beside the policy's"),
    ("centre", bool, None, "subtract an iteration's mean reward, so that while values are yet to be learned nothing is "
     "gained by ending sooner or later"),
    ("whiten", bool, None, "give an iteration's advantages mean 0 and deviation 1"),
    ("scale_reward", bool, None, "divide rewards by their running deviation, and cut them at +-10"),
    ("unfinished_penalty", float, (0, 1e6), "subtracted from the reward of an answer that does not end"),
    ("lora_rank", int, (0, 10**6), "train low-rank adapters of this rank, the rest frozen; 0: train everything"),
    ("bf16_moments", bool, None, "keep AdamW's moments in bf16, rounded at random: 4 bytes less for each weight"),
    ("micro_tokens", int, (1, 10**9), "tokens per forward pass; lower it when memory runs out"),
    ("precision", str, None, "bf16 (autocast over fp32 weights), fp32, or auto: bf16 where the device has it"),
    ("seed", int, (0, 2**60), "of prompts, sampling and minibatches"),
    ("save_seconds", float, (0, 1e9), "seconds between saved states"),
]

if __name__ == "__main__":
    arguments()  # --help and mistyped flags are answered before the seconds that importing torch takes

import time  # noqa: E402

import torch  # noqa: E402
from torch import nn  # noqa: E402
from tqdm import tqdm  # noqa: E402

import model  # noqa: E402
import reward  # noqa: E402
import toy  # noqa: E402
import train  # noqa: E402

# ----------------------------------------------------------------------------------------------------------------
# Rewards: anything with .names [K] and .score(prompts, responses), which gives (K, N) in fp32


class ExactScorer:
    """The embedded world's own judges, in place of preference models."""

    def __init__(self, names):
        self.names = list(names)
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
        twice = sorted({name for name in found if found.count(name) > 1})
        if twice:
            raise UserError(f"--reward: {', '.join(twice)} given twice; name each reward once")

    def score(self, prompts, responses):
        return torch.cat([part.score(prompts, responses) for part in self.parts])[self.order]


def read_weights(words, names):
    """Weights [K] from the command line: numbers, a JSON file {name: weight}, or nothing, which is 1 each."""
    if not words:
        return [1.0] * len(names)
    if len(words) == 1 and words[0].endswith(".json"):
        content = data.read_json(words[0])
        missing = [name for name in names if not isinstance(content, dict) or name not in content]
        if missing:
            raise UserError(f"{words[0]}: no weight for {', '.join(missing)}; give {{name: weight}} for every reward")
        words = [content[name] for name in names]
    try:
        weights = [float(word) for word in words]
    except (TypeError, ValueError):
        raise UserError(f"--weights: {words} are not all numbers; give numbers, or one .json file")
    if len(weights) != len(names):
        raise UserError(f"--weights: {len(weights)} for {len(names)} rewards ({', '.join(names)}); give one for each")
    if not all(map(math.isfinite, weights)):
        raise UserError(f"--weights: {weights} are not all finite; mend them")
    return weights


# ----------------------------------------------------------------------------------------------------------------
# The loop


@dataclass
class Course:
    """What a run carries from one iteration to the next, besides weights and optimizer."""
    kl: float                                       # the coefficient
    iteration: int = 0
    mean: list = field(default_factory=list)        # of each principle's scores for the reference's answers
    std: list = field(default_factory=list)
    rewards: list = field(default_factory=lambda: [0, 0.0, 0.0])  # how many so far, their mean, squares about it
    tokens: int = 0                                 # of answers
    seconds: float = 0.0


def improve(policy, tokenizer, prompts, rewards, weights, how, out, options, resume=False, progress=True):
    """Train policy, in place, to answer prompts (texts) so that rewards score it higher; save it in the folder out.

    rewards: has .names [K] and .score(prompts, responses) -> (K, N); reward.scalarize makes N rewards of these with
    weights [K] and how. out/metrics.jsonl gets a row per iteration, out/state.pt the state from which a call with
    resume, and the same policy as at the start, goes on. Gives the rows of metrics."""
    out, device = Path(out), policy.device
    out.mkdir(parents=True, exist_ok=True)
    plan = {"prompts": zlib.crc32(repr(prompts).encode("utf-8", "replace")), "rewards": list(rewards.names),
            "weights": [float(weight) for weight in weights], "how": how, "policy": fingerprint(policy)}
    state = load_state(out, plan, options, device) if resume else None
    if state == "finished":
        print(f"{out}: finished already")
        return train.read_metrics(out)
    encoded = encode(tokenizer, prompts, policy.config, options)
    frozen = {id(weight): weight for weight in policy.parameters() if not weight.requires_grad}  # LoRA's base: once
    reference = copy.deepcopy(policy, frozen).requires_grad_(False)
    agent = nn.ModuleDict({"policy": policy, "value": value_head(policy)})
    optimizer = train.make_optimizer(agent, options)
    if state:
        agent.load_state_dict(state["agent"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
        course = Course(**state["course"])
    else:
        course = Course(options.kl, 0, *normalisation(reference, tokenizer, encoded, rewards, options))
        train.forget(out)
    metrics = train.open_metrics(out, state["metrics_bytes"] if state else 0)
    began, saved = time.perf_counter() - course.seconds, time.perf_counter()
    with tqdm(total=options.iterations, initial=course.iteration, desc=out.name, disable=not progress) as bar:
        for iteration in range(course.iteration, options.iterations):
            # Answer, score
            chosen = prompts_of(encoded, iteration, options.rollouts, options)
            rollouts = answer(policy, tokenizer, chosen, iteration, options)
            scores = score(rewards, rollouts)                                        # (K, N)
            normalised = (scores - torch.tensor(course.mean)[:, None]) / torch.tensor(course.std)[:, None]
            scalar = reward.scalarize(normalised, weights, how)                      # (N,)
            unfinished = torch.tensor([not rollout.finished for rollout in rollouts])
            final = scalar - options.unfinished_penalty * unfinished
            if options.centre:
                final = final - final.mean()
            if options.scale_reward:
                final = scaled(final, course.rewards)
            # Credit each token with what follows from it
            (old, values, expected), mask = measure(agent, reference, rollouts, options)  # (B, T) each
            divergence = old - expected
            given = -course.kl * divergence
            ends = mask.sum(1) - 1
            given[torch.arange(len(ends), device=device), ends] += final.to(device)
            advantages, returns = gae(given, values, options.gamma, options.lam, mask)
            if options.whiten:
                advantages[mask] = whiten(advantages[mask])
            # Learn
            for group in optimizer.param_groups:
                group["lr"] = train.learning_rate(iteration, options.iterations, options)
            learned = learn(agent, optimizer, rollouts, (old, values, advantages, returns), mask, iteration, options)
            # Report
            kl, lengths = float(divergence.sum(1).mean()), mask.sum(1)
            course.tokens += int(lengths.sum())
            course.iteration, course.seconds = iteration + 1, round(time.perf_counter() - began, 3)
            row = {"iteration": iteration + 1, "reward": float(scalar.mean()),
                   "score": dict(zip(rewards.names, scores.mean(1).tolist())), "kl": kl, "kl_coefficient": course.kl,
                   "entropy": -float(old[mask].mean()), **learned,
                   "value_explained_variance": explained(values[mask], returns[mask]),
                   "length": float(lengths.float().mean()), "unfinished": float(unfinished.float().mean()),
                   "tokens": course.tokens, "seconds": course.seconds}
            if not all(math.isfinite(row[name]) for name in ("kl", "policy_loss", "value_loss", "grad_norm")):
                raise UserError(f"{out}: iteration {iteration + 1} gives no finite loss; lower --lr or raise --kl")
            train.write_row(metrics, row)
            bar.set_postfix_str(f"reward {row['reward']:.3f}, kl {kl:.2f}, length {row['length']:.0f}, "
                                f"{train.memory(device)}")
            bar.update()
            course.kl = adapted(course.kl, kl, len(rollouts), options)
            if time.perf_counter() - saved > options.save_seconds and iteration + 1 < options.iterations:
                save_state(out, agent, optimizer, course, plan, metrics, options)
                saved = time.perf_counter()
    metrics.close()
    data.write_whole(out / "tokenizer.json", lambda path: Path(path).write_text(tokenizer.to_str(), encoding="utf-8"))
    policy.save_pretrained(out)
    for name in ("state.pt", "state.pt.tmp"):  # the latter from a run that was killed while it saved
        (out / name).unlink(missing_ok=True)
    return train.read_metrics(out)


# ----------------------------------------------------------------------------------------------------------------
# Rollouts


@dataclass
class Rollout:
    """An answer of the policy: ids[n_prompt:] are its actions, the stop token that ends it one of them."""
    prompt: str
    text: str
    ids: list
    n_prompt: int
    finished: bool


def encode(tokenizer, prompts, config, options):
    """[(prompt, ids)] of the prompts that leave room for an answer in the model's context; says how many do not."""
    room = config.max_position_embeddings - options.max_new_tokens
    encoded = [(prompt, data.encode_prompt(tokenizer, prompt, config.bos_token_id, room)) for prompt in prompts]
    kept = [(prompt, ids) for prompt, ids in encoded if ids]
    if len(kept) < len(prompts):
        print(f"{len(prompts) - len(kept)} of {len(prompts)} prompts left out: empty, or too long for an answer of "
              f"{options.max_new_tokens} tokens in a context of {config.max_position_embeddings}")
    if not kept:
        raise UserError(f"none of {len(prompts)} prompts to train on; check --data, or lower --max-new-tokens")
    return kept


def prompts_of(encoded, step, count, options):
    """The prompts of an iteration: every one once, in a random order, before any comes again."""
    return train.examples_of(train.Stage("ppo", encoded), step, train.Options(batch=count, seed=options.seed))


def answer(policy, tokenizer, prompts, iteration, options):
    """The policy's answers to prompts [(text, ids)], sampled at temperature 1, as Rollouts, the shortest first."""
    stop = policy.config.stop_ids
    seeds = [hash((options.seed, iteration, i)) % 2**63 for i in range(len(prompts))]
    with train.autocast(policy.device, options):
        written = model.generate(policy, [ids for _, ids in prompts], options.max_new_tokens, temperature=1.0,
                                 stop_ids=stop, seed=seeds)
    rollouts = []
    for (prompt, ids), new in zip(prompts, written):
        finished = len(new) < options.max_new_tokens
        actions = [*new, stop[0]] if finished else new
        rollouts.append(Rollout(prompt, tokenizer.decode(new).strip(), [*ids, *actions], len(ids), finished))
    return sorted(rollouts, key=lambda rollout: len(rollout.ids))


def score(rewards, rollouts):
    """What rewards give the answers: (K, N)."""
    scores = rewards.score([rollout.prompt for rollout in rollouts], [rollout.text for rollout in rollouts])
    if not scores.isfinite().all():
        bad = [name for name, row in zip(rewards.names, scores) if not row.isfinite().all()]
        raise UserError(f"the reward {', '.join(bad)} gives scores that are not finite; train it again")
    return scores


def normalisation(reference, tokenizer, encoded, rewards, options):
    """(means [K], deviations [K]) of the scores of the reference's answers; a principle that scores all alike: 1."""
    scores = []
    for start in range(0, options.reference_count, options.rollouts):
        count = min(options.rollouts, options.reference_count - start)
        chosen = prompts_of(encoded, 0, options.reference_count, options)[start:start + count]
        scores.append(score(rewards, answer(reference, tokenizer, chosen, -2 - start, options)))
    if not scores:
        return [0.0] * len(rewards.names), [1.0] * len(rewards.names)
    scores = torch.cat(scores, 1)
    std = scores.std(1, correction=0)
    return scores.mean(1).tolist(), torch.where(std > 0, std, 1).tolist()


def value_head(policy):
    """What reads the value of a state from its hidden state (D,); it gives 0 until it is trained."""
    head = nn.Linear(policy.config.hidden_size, 1, device=policy.device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def evaluate(agent, batch):
    """(log-probabilities, values) of a packed batch's actions, (actions,) each in fp32. A value is that of the state
    in which the action was chosen: it is read at the token before."""
    policy, value = agent["policy"], agent["value"]
    hidden = policy.hidden(batch.tokens[None], model.Packed(batch.lengths, batch.tokens.device))[0]     # (N, D)
    logprobs = model.token_logprobs(policy, batch.tokens, batch.lengths, batch.targets, hidden=hidden)
    states = hidden[batch.targets - 1].float()
    return logprobs, (states * value.weight).sum(-1) + value.bias  # autocast would round a matrix product to bf16


def packed(rollouts, options, device):
    """Batches of rollouts, in order (they are sorted by length already), with how many actions each has."""
    for batch in train.pack([(rollout.ids, rollout.n_prompt) for rollout in rollouts], options.micro_tokens, device):
        yield batch, len(batch.targets)


@torch.no_grad()
def measure(agent, reference, rollouts, options):
    """(3, B, T): log-probabilities of the actions, values, the reference's log-probabilities, zero after each row's
    last action; and where there are actions, (B, T) bool."""
    parts = []
    for batch, _ in packed(rollouts, options, reference.device):
        with train.autocast(reference.device, options):
            expected = model.token_logprobs(reference, batch.tokens, batch.lengths, batch.targets)
            parts.append(torch.stack([*evaluate(agent, batch), expected]))
    counts = torch.tensor([len(rollout.ids) - rollout.n_prompt for rollout in rollouts])
    mask = (torch.arange(int(counts.max())) < counts[:, None]).to(reference.device)
    grid = torch.zeros(3, *mask.shape, device=mask.device)
    grid[:, mask] = torch.cat(parts, 1)
    return grid, mask


# ----------------------------------------------------------------------------------------------------------------
# From rewards to losses


def scaled(rewards, running):
    """Rewards (N,) over the deviation of all rewards so far, these included, cut at +-10; their mean stays. running:
    [how many, their mean, squares about it], brought up to date in place."""
    count, mean, squares = running
    total, shift = count + len(rewards), float(rewards.mean()) - mean
    running[:] = [total, mean + shift * len(rewards) / total,
                  squares + float(rewards.var(correction=0)) * len(rewards) + shift**2 * count * len(rewards) / total]
    deviation = math.sqrt(running[2] / total)
    return (rewards / (deviation if deviation > 1e-6 else 1.0)).clamp(-10, 10)


def gae(rewards, values, gamma, lam, mask):
    """Generalised advantage estimation (Schulman et al., arXiv 1506.02438, eq. 16): (advantages, returns).

    rewards, values (B, T): of each action, and of the state in which it was chosen. mask (B, T) bool: a row's first
    tokens, its actions; the state after the last has the value 0. With d_t = r_t + gamma * v_(t+1) - v_t, an
    advantage is the sum of (gamma * lam)^l * d_(t+l) over l, and a return is advantage plus value. Both (B, T), and
    zero outside the mask."""
    rewards, values = (torch.where(mask, x, 0) for x in (rewards, values))
    advantages, next_value = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])
    following = next_value
    for t in reversed(range(rewards.size(1))):
        following = rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * following
        next_value = values[:, t]
        advantages[:, t] = following
    return advantages, advantages + values


def whiten(advantages):
    """Advantages (N,), shifted and scaled to mean 0 and deviation 1."""
    return (advantages - advantages.mean()) / (advantages.std(correction=0) + 1e-8)


def policy_loss(new, old, advantages, clip):
    """The clipped surrogate (PPO, eq. 7), negated and summed over tokens: log-probabilities new, old (N,), advantages
    (N,). Once a token's probability ratio has left 1 +- clip in its advantage's direction, it has no gradient."""
    ratio = (new - old).exp()
    return -torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages).sum()


def value_loss(new, old, returns, clip):
    """Half the squared error of values new (N,) from returns (N,), summed over tokens; a move of more than clip from
    what they were at the rollout, old (N,), gains nothing."""
    near = old + (new - old).clamp(-clip, clip)
    return 0.5 * torch.max((new - returns)**2, (near - returns)**2).sum()


def adapted(coefficient, kl, count, options):
    """The KL coefficient after `count` answers that diverged by kl nats each: more where that is over the target,
    less where it is under (Ziegler et al., arXiv 1909.08593, section 2.2)."""
    if not options.kl_target:
        return coefficient
    error = min(max(kl / options.kl_target - 1, -0.2), 0.2)
    return coefficient * (1 + error * count / options.kl_horizon)


def explained(values, returns):
    """The share of the returns' variance that the values account for; 0 where they vary not at all."""
    variance = float(returns.var(correction=0))
    return 1 - float((returns - values).var(correction=0)) / variance if variance > 0 else 0.0


def learn(agent, optimizer, rollouts, measured, mask, iteration, options):
    """PPO's epochs over an iteration's rollouts. measured: log-probabilities, values, advantages, returns, (B, T)
    each. Gives what to report, as means over tokens (of grad_norm: over optimizer steps)."""
    device, totals, actions, norms = mask.device, torch.zeros(4, device=mask.device), 0, []
    for epoch in range(options.epochs):
        generator = torch.Generator().manual_seed(hash((options.seed, iteration, epoch, 1)) % 2**63)
        for chosen in torch.randperm(len(rollouts), generator=generator).split(options.minibatch):
            chosen = chosen.sort().values  # the shortest first, as they are packed
            where = mask[chosen]
            flat = torch.stack([x[chosen][where] for x in measured])                 # (4, actions)
            done, total = 0, flat.size(1)
            for batch, count in packed([rollouts[i] for i in chosen.tolist()], options, device):
                old, values, advantages, returns = flat[:, done:done + count]
                done += count
                with train.autocast(device, options):
                    logprobs, new_values = evaluate(agent, batch)
                of_policy = policy_loss(logprobs, old, advantages, options.clip)
                of_value = value_loss(new_values, values, returns, options.clip)
                ((of_policy + options.value_coefficient * of_value) / total).backward()
                change = (logprobs - old).detach()
                shift = change.expm1()                                               # the ratio minus 1
                clipped, divergence = (shift.abs() > options.clip).sum(), (shift - change).sum()
                totals += torch.stack([of_policy.detach(), of_value.detach(), clipped, divergence])
                actions += count
            norms.append(nn.utils.clip_grad_norm_(train.trained(agent).values(), options.grad_clip))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    names = ("policy_loss", "value_loss", "clip_fraction", "approx_kl")
    means = (totals / actions).tolist()
    return {**dict(zip(names, means)), "grad_norm": float(torch.stack(norms).mean())}


# ----------------------------------------------------------------------------------------------------------------
# The state to resume from


def fingerprint(policy):
    """A checksum of the weights that a run starts from."""
    checksum = 0
    for parameter in policy.parameters():
        content = parameter.detach().cpu().contiguous().view(-1).view(torch.uint8)
        checksum = zlib.crc32(content.numpy(), checksum)
    return checksum


def save_state(out, agent, optimizer, course, plan, metrics, options):
    weights = {name: parameter.detach() for name, parameter in train.trained(agent).items()}
    state = {"agent": weights, "optimizer": optimizer.state_dict(), "course": asdict(course), "plan": plan,
             "metrics_bytes": os.fstat(metrics.fileno()).st_size, "options": asdict(options)}
    train.write_state(out / "state.pt", state)


def load_state(out, plan, options, device):
    """What save_state wrote, as of train.read_state; UserError where it is of a run with other settings."""
    state = train.read_state(out, device)
    if state in (None, "finished"):
        return state
    made = {**state["options"], **state["plan"]} if isinstance(state["plan"], dict) else {}  # else: train.py's
    wanted = {**asdict(options), **plan}
    free = ("save_seconds", "micro_tokens")  # what may change when a run goes on
    changed = [name for name in wanted if name not in free and made.get(name) != wanted[name]]
    train.refuse_other_settings(out, changed)
    return state


# ----------------------------------------------------------------------------------------------------------------
# Command line


def main():
    args = arguments()
    options = Options(**{name: getattr(args, name) for name in vars(Options())})
    device = train.device_named(args.device)
    if Path(args.out).resolve() == Path(args.model).resolve():
        raise UserError(f"{args.out}: is the model to start from; choose another --out")
    rewards = Together(args.reward, device)
    weights = read_weights(args.weights, rewards.names)
    reward.scalarize(torch.zeros(len(weights), 1), weights, args.how)  # UserError now where --how is unknown
    policy = train.start_from(args.model, "ppo", device, options)
    tokenizer = model.load_tokenizer(args.model, policy)
    rows = [row for path in args.data for row in data.read_rated(path, objective="chosen")]
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))
    print(f"{sum(p.numel() for p in policy.parameters()):,} parameters on {device}; {len(prompts):,} prompts; "
          "rewards: " + ", ".join(f"{weight:g} x {name}" for weight, name in zip(weights, rewards.names)))
    rows = improve(policy, tokenizer, prompts, rewards, weights, args.how, args.out, options, args.resume)
    print(f"reward {rows[0]['reward']:.3f} at first, {rows[-1]['reward']:.3f} at last, {rows[-1]['kl']:.2f} nats "
          f"from the reference; saved in {args.out}")


if __name__ == "__main__":
    cli(main)
