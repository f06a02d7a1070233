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
import train
from model import Config, Llama, computes_bf16
from peers import NEW_TOKENS, WARM, once, run_job, timed_edits, timed_training


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


def decode(folder, device, config, dtype):
    """Seconds for each further token of one sequence, and the bytes of weights that it reads: all, but of the embedding
    one row. What comes before the first 16 tokens is in both of the times that are subtracted."""
    llama = fresh(config, getattr(torch, dtype), device)
    read = sum(p.nbytes for name, p in llama.named_parameters() if "embed" not in name)
    generate.prepack(llama)

    def write(count):
        return once(device, generate.generate, llama, [[5] * 128], count)
    write(16 + 96)
    longer, shorter = zip(*[(write(16 + 96), write(16)) for _ in range(3)])
    return {"seconds": (min(longer) - min(shorter)) / 96, "bytes": read}


JOBS = {"train_ours": train_ours, "train_large": train_large, "align_ours": align_ours, "decode": decode}


def main():
    if len(sys.argv) != 3 or sys.argv[1] not in JOBS:
        raise UserError("timed.py: is started by bench.py; see `python bench.py --help`")
    run_job(JOBS, *sys.argv[1:])


if __name__ == "__main__":
    cli(main)
