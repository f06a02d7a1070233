"""What bench.py times of ours: peers.py is its other half.

    python timed.py KIND FOLDER     prints the figures of one of JOBS, on what FOLDER/job.json says
"""
import sys
from array import array

from common import UserError, cli

import torch

import checkpoint
import data
import generate
import lora
import ppo
import toy
import train
from compiled import compile_blocks
from model import Config, Llama, computes_bf16
from peers import NEW_TOKENS, WARM, once, peak, per_token, run_job, timed_edits, timed_training


def machine(folder, device):
    """FLOP/s of a matrix product in bf16, or in fp32 where the device computes no bf16, the best of three shapes;
    bytes/s of a copy, those read and those written."""
    precision = torch.bfloat16 if computes_bf16(device) else torch.float32
    shapes = [(4096, 512, 1376), (4096, 2048, 2048)] + [(8192, 8192, 8192)] * (device == "cuda")
    rates = []
    for rows, inner, columns in shapes:
        a = torch.randn(rows, inner, device=device, dtype=precision)
        b = torch.randn(columns, inner, device=device, dtype=precision)
        rates.append(2 * rows * inner * columns / seconds(device, torch.matmul, a, b.T))
    source = torch.randn(2**28 if device == "cuda" else 2**26, device=device)
    target = torch.empty_like(source)
    return {"flops": max(rates), "bytes": 2 * source.nbytes / seconds(device, target.copy_, source)}


def seconds(device, function, *given):
    """Seconds per call, over enough calls to last half a second, after two to warm up."""
    for _ in range(2):
        once(device, function, *given)
    times = []
    while len(times) < 3 or sum(times) < 0.5:
        times.append(once(device, function, *given))
    return sum(times) / len(times)


def train_ours(folder, device, batches, method="sft", **options):
    options = train.Options(**{"micro_tokens": 4096, **options})
    return timed_steps(checkpoint.load(folder, device=device), batches, options, device, train.METHODS[method])


def train_large(folder, device, batches, config, options):
    """Weights as train.start_from loads them: in fp32, but for LoRA's frozen ones, which a GPU holds in bf16."""
    options = train.Options(**options)
    half = options.lora_rank and device == "cuda" and computes_bf16(device)
    llama = fresh(config, torch.bfloat16 if half else torch.float32, device)
    if options.lora_rank:
        llama = lora.add_lora(llama, options.lora_rank, folder)
    return timed_steps(llama, batches, options, device)


def timed_steps(llama, batches, options, device, method=train.METHODS["sft"]):
    """Steps as train.train takes them, at the highest learning rate, after the reference's log-probabilities."""
    llama.checkpoint_activations = options.checkpoint_activations
    if options.compile:
        compile_blocks(llama)
    steps, reference, losses = [examples_from(batch, method.pairs) for batch in batches], 0.0, []
    if method.reference:
        for some in (steps[:WARM], steps[WARM:]):
            reference = once(device, train.add_ref_logprobs, llama, sum(some, []), options, False)
    optimizer = train.make_optimizer(llama, options)

    def step(examples):
        packed = list(train.pack(examples, options.micro_tokens, llama.device))
        losses.append(train.train_step(llama, optimizer, packed, method, options.lr, options)[0])
    times = [once(device, step, examples) for examples in steps]
    return timed_training(times, losses, batches, device, reference)


def examples_from(batch, pairs=False):
    """data.Examples of a batch [(ids, start of what is learned), ...], of each or of each two."""
    documents = [data.Document(array("i", ids), start) for ids, start in batch]
    size = 2 if pairs else 1
    return [data.Example(documents[first:first + size]) for first in range(0, len(documents), size)]


def fresh(size, dtype, device):
    """A Llama of that size, its weights small noise made where they stay: at no time are they there twice."""
    with torch.device("meta"):
        llama = Llama(Config(**size)).to(dtype)
    llama.to_empty(device=device)
    llama.tie()
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in llama.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.02, generator=generator)
            else:
                parameter.fill_(1)
    return llama


def align_ours(folder, device, prompts, dtype, batch, passes, draft):
    llama = generate.prepack(checkpoint.load(folder, getattr(torch, dtype), device))
    acceptance = generate.Acceptance()

    def edit(prompts):
        return generate.stream(llama, prompts, NEW_TOKENS, batch, stop_ids=llama.config.stop_ids, draft=draft,
                               acceptance=acceptance)
    return {**timed_edits(edit, prompts, batch, passes, device), "copied": acceptance.share}


def decode(folder, device, config, dtype, batch):
    """Seconds for each further token of `batch` sequences, and the bytes that it reads: the weights, of the embedding a
    row each, and the keys and values of the tokens before, 192 on average. What comes before the first 16 tokens is in
    both of the times that are subtracted."""
    llama = fresh(config, getattr(torch, dtype), device)
    weights = sum(p.nbytes for name, p in llama.named_parameters() if "embed" not in name)
    shape = llama.config
    token = 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * getattr(torch, dtype).itemsize
    generate.prepack(llama)

    def write(count):
        return once(device, generate.generate, llama, [[5] * 128] * batch, count)
    return {"seconds": per_token(write), "bytes": weights + batch * 192 * token}


def ppo_ours(folder, device, config, options):
    """Seconds of the three parts of an iteration as ppo.improve has them, the faster of two after one to warm up.
    Prompts of 128 random tokens, rewards at random."""
    policy, options = fresh(config, torch.float32, device), ppo.Options(**options)
    reference, agent = ppo.frozen_copy(policy), ppo.Agent(policy)
    optimizer, generator = train.make_optimizer(agent, options), torch.Generator().manual_seed(0)
    prompts = [("", torch.randint(3, config["vocab_size"], (128,), generator=generator).tolist())
               for _ in range(options.rollouts)]
    tokenizer, turns = toy.train_tokenizer(["Hello there"]), []

    def clocked(part, function, *given):
        found = []
        turns[-1][part] = once(device, lambda: found.append(function(*given)))
        return found[0]
    for iteration in range(3):
        turns.append({})
        rollouts = clocked("answering", ppo.sample_rollouts, policy, tokenizer, prompts, iteration, options)
        evaluated = clocked("scoring", ppo.evaluate_rollouts, agent, reference, rollouts, options)
        logprobs, ref_logprobs, values, mask = evaluated
        rewards, cost = torch.randn(len(rollouts), generator=generator), options.kl_coef * (logprobs - ref_logprobs)
        known = torch.stack((logprobs, values, *ppo.token_advantages(rewards, cost, values, mask, options)))
        clocked("learning", ppo.learn, agent, optimizer, rollouts, known, mask, iteration, options)
    return {"seconds": {part: min(turn[part] for turn in turns[1:]) for part in turns[0]}, "actions": int(mask.sum()),
            "lengths": [len(rollout.document.ids) for rollout in rollouts], "epochs": options.update_epochs,
            "peak": peak(device)}


JOBS = {"machine": machine, "train_ours": train_ours, "train_large": train_large, "align_ours": align_ours,
        "decode": decode, "ppo_ours": ppo_ours}


def main():
    if len(sys.argv) != 3 or sys.argv[1] not in JOBS:
        raise UserError("timed.py: is started by bench.py; see `python bench.py --help`")
    run_job(JOBS, *sys.argv[1:])


if __name__ == "__main__":
    cli(main)
