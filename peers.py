"""What bench.py times of its peers, transformers and TRL, and the clocks that it holds to both sides.

    PEER_PYTHON peers.py KIND FOLDER     prints the figures of one of JOBS, on what FOLDER/job.json says

bench.py starts it like this, with a Python that has torch and the peers, but perhaps not what our own files need: so it
imports none of them. Token ids come from there: what is timed of both sides is the same work.
"""
import itertools
import json
import resource
import sys
import time
from pathlib import Path

import torch

MAX_TOKENS = 1024  # of the longest training example
NEW_TOKENS = 256   # of the longest edit
WARM = 2           # training steps before those that are timed


# ----------------------------------------------------------------------------------------------------------------
# Clocks and gauges, of both sides


def sync(device):
    if device == "cuda":
        torch.cuda.synchronize()


def once(device, function, *given):
    """Seconds of one call."""
    began = time.perf_counter()
    function(*given)
    sync(device)
    return time.perf_counter() - began


def peak(device):
    """Peak memory of this process in GiB: the device's, or resident."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def per_token(write):
    """Seconds for a further token, of write(count), which gives the seconds of so many."""
    write(16 + 96)
    longer, shorter = zip(*[(write(16 + 96), write(16)) for _ in range(3)])
    return (min(longer) - min(shorter)) / 96


def timed_training(times, losses, batches, device, reference=0.0):
    """The figures of training steps on batches [[(ids, start of what is learned), ...], ...]; the first WARM of them
    warm up. reference: the seconds that the reference's log-probabilities took of the others."""
    tokens = sum(len(ids) for batch in batches[WARM:] for ids, _ in batch)
    return {"tokens": tokens, "seconds": sum(times[WARM:]) + reference, "losses": losses, "peak": peak(device)}


def timed_edits(edit, prompts, batch, passes, device):
    """The figures of edit(prompts), which yields (place, new ids): of all prompts, the longest first, after a first
    `batch` to warm up. The fastest of the passes counts."""
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    prompts, times = [prompts[i] for i in order], []
    dict(edit(prompts[:batch]))
    for _ in range(passes):
        began = time.perf_counter()
        written = {order[place]: new for place, new in edit(prompts)}
        sync(device)
        times.append(time.perf_counter() - began)
    return {"seconds": min(times), "peak": peak(device), "written": [written[i] for i in range(len(order))]}


# ----------------------------------------------------------------------------------------------------------------
# Measurements


def train_trl(folder, device, batches, eos, packing, together, longest=MAX_TOKENS, config=None, rank=0):
    """TRL's fine-tuning. together: the examples that are padded to one length, or the rows of `longest` tokens that
    examples are packed into; of single examples, a step accumulates the gradients of as many as a batch has. config:
    random weights of this shape, in place of the folder's; rank: of LoRA by peft, on frozen weights in bf16."""
    from trl import SFTConfig, SFTTrainer
    rows = [{"input_ids": ids, "completion_mask": [0] * start + [1] * (len(ids) - start)}
            for batch in batches for ids, start in batch]
    size = together if packing else len(batches[0])
    times, losses, tokens = trained(SFTTrainer, SFTConfig, folder, device, rows, eos, max_steps=len(batches), bf16=True,
                                    packing=packing, per_device_train_batch_size=together, max_length=longest,
                                    gradient_accumulation_steps=size // together, learning_rate=1e-5,
                                    start=(config, rank))
    return {**timed_training(times, losses, batches, device), "tokens": tokens[-1] - tokens[WARM - 1]}


def dpo_trl(folder, device, batches, eos, beta, lr, bf16, precompute, together):
    """TRL's DPO on pairs: in a batch, the better response is followed by the worse one. bf16: autocast. precompute: the
    reference's log-probabilities before the first step, else in each. together: the pairs that are padded to one
    length; of more, a step accumulates the gradients."""
    from trl import DPOConfig, DPOTrainer
    reference = []

    class OnTokens(DPOTrainer):
        def _prepare_dataset(self, dataset, *_):
            return dataset

        def compute_ref_log_probs(self, *given):
            began = time.perf_counter()
            found = super().compute_ref_log_probs(*given)
            sync(device)
            reference.append(time.perf_counter() - began)
            return found
    rows = [{"prompt_ids": ids[:start], "chosen_ids": ids[start:], "rejected_ids": worse[worse_start:]}
            for batch in batches for (ids, start), (worse, worse_start) in zip(batch[::2], batch[1::2])]
    times, losses, _ = trained(OnTokens, DPOConfig, folder, device, rows, eos, max_steps=len(batches), bf16=bf16,
                            precompute_ref_log_probs=precompute, per_device_train_batch_size=together,
                            gradient_accumulation_steps=len(rows) // len(batches) // together, beta=beta,
                            learning_rate=lr, lr_scheduler_type="constant", adam_beta2=0.95)
    return timed_training(times, losses, batches, device, sum(reference[WARM * len(reference) // len(batches):]))


def trained(Trainer, Config, folder, device, rows, eos, start=(None, 0), **options):
    """(seconds, losses, tokens so far) of each step of one of TRL's trainers, which takes the rows in their order.
    start: (the shape of random weights, None: the folder's; LoRA's rank, 0: none)."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    times, losses, tokens = [], [], []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.began = time.perf_counter()

        def on_step_end(self, *_, **__):
            sync(device)
            times.append(time.perf_counter() - self.began)

        def on_log(self, *_, logs, **__):
            losses.extend([logs["loss"]] if "loss" in logs else [])
            tokens.extend([logs["num_tokens"]] if "num_tokens" in logs else [])
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=f"{folder}/tokenizer.json", eos_token=eos, pad_token=eos)
    config = Config(output_dir=f"{folder}/trl", use_cpu=device == "cpu", logging_steps=1,
                    gradient_checkpointing=False, report_to="none", save_strategy="no", disable_tqdm=True,
                    train_sampling_strategy="sequential", **{"max_length": MAX_TOKENS, **options})
    (shape, rank), more = start, {}
    if rank:
        from peft import LoraConfig
        more["peft_config"] = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear",
                                         task_type="CAUSAL_LM")
    if shape:
        llama = random_llama(shape, torch.bfloat16 if rank else torch.float32, device)
    else:
        llama = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    Trainer(llama, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
            callbacks=[Clock()], **more).train()
    return times, losses, tokens


def align_transformers(folder, device, prompts, dtype, batch, passes, lookup=None):
    """transformers' generation, `batch` prompts at a time; lookup: the tokens that it guesses from the prompt."""
    from transformers import AutoModelForCausalLM
    llama = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device).eval()
    eos = llama.config.eos_token_id
    stops = eos if isinstance(eos, list) else [eos]

    def edit(prompts):
        for start in range(0, len(prompts), batch):
            yield from enumerate(edit_together(prompts[start:start + batch]), start)

    def edit_together(prompts):
        longest = max(map(len, prompts))
        ids = torch.tensor([stops[:1] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
        new = llama.generate(input_ids=ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False,
                             pad_token_id=stops[0], prompt_lookup_num_tokens=lookup)[:, longest:].tolist()
        return [list(itertools.takewhile(lambda token: token not in stops, row)) for row in new]
    return timed_edits(edit, prompts, batch, passes, device)


def random_llama(shape, dtype, device):
    from transformers import AutoModelForCausalLM, LlamaConfig
    with torch.device(device):
        return AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=dtype)


def decode_transformers(folder, device, config, dtype, batch):
    """What timed.decode does, by transformers on random weights of the same shape."""
    llama = random_llama(config, getattr(torch, dtype), device).eval()
    ids = torch.full((batch, 128), 5, device=device)

    def write(count):
        return once(device, lambda: llama.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
                                                   min_new_tokens=count, max_new_tokens=count, pad_token_id=2))
    return {"seconds": per_token(write)}


JOBS = {"train_trl": train_trl, "dpo_trl": dpo_trl, "align_transformers": align_transformers,
        "decode_transformers": decode_transformers}


def run_job(jobs, kind, folder):
    """What the process of a measurement does: one of the jobs, with what the folder says of it."""
    job = json.loads((Path(folder) / "job.json").read_text())
    print("\n" + json.dumps(jobs[kind](folder, **job)))


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in JOBS:
        sys.exit("error: peers.py: is started by bench.py; see `python bench.py --help`")
    run_job(JOBS, *sys.argv[1:])
