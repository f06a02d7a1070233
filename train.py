"""The training loop, one for every method, and the methods.

A method is two functions: one that turns files into examples (token ids, and where the part to be learned begins), one
that turns a packed batch into a loss. `STAGES` lists them; everything else, from bf16 and accumulation to resuming
after a kill, is `train`, read from top to bottom.

A step is `batch` examples, cut into micro-batches of at most `micro_tokens` tokens, packed without padding. Which
examples a step holds depends on the seed and the step's number alone: that is why a resumed run repeats a killed one.
"""
import argparse
import json
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import data
from data import UserError, cli

EPILOG = """examples:
  python train.py pretrain --model FOLDER --data texts.jsonl --out base
  python train.py sft      --model base --data answers.jsonl --out policy
  python train.py aligner  --model base --data pairs.jsonl --out aligner --lr 1e-5 --batch 512

FOLDER is a Hugging Face Llama folder; for pretrain, one with config.json and tokenizer.json alone starts from scratch.
pairs.jsonl is what `python data.py reformulate` writes. Every run writes OUT/metrics.jsonl, a row per step."""


def arguments(argv=None):
    parser = argparse.ArgumentParser(description="Train a Llama: foundation, policy or aligner.", epilog=EPILOG,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("stage", choices=["pretrain", "sft", "aligner"])
    add("--model", required=True, metavar="FOLDER", help="the Llama to start from")
    add("--data", required=True, nargs="+", metavar="FILE", help="texts, prompt/completion rows, or aligner pairs")
    add("--out", required=True, metavar="FOLDER", help="where checkpoint and metrics go")
    add("--resume", action="store_true", help="go on where a killed run with the same arguments stopped")
    add("--steps", nargs="+", default=["identity", "equal", "better"], choices=["identity", "partner", "equal", "better"],
        help="the aligner's steps, in order: warm-up (identity: the answer itself; partner: an equally good one), "
             "equal preference, contrastive preference (default: identity equal better)")
    add("--warmup-data", type=float, default=0.1, metavar="SHARE",
        help="part of the equal-preference pairs used for the warm-up step (default 0.1)")
    add("--replay", nargs="+", default=[], metavar="FILE", help="pretraining texts mixed into an aligner's batches")
    add("--replay-share", type=float, default=0.15, metavar="SHARE", help="their share of a batch (default 0.15)")
    add_options(parser, Options(), OPTION_HELP)
    add("--merge", action="store_true", help="with --lora-rank: write a whole model instead of an adapter")
    args = parser.parse_args(argv)
    check_ranges(parser, args)
    return args


def add_options(parser, options, texts):
    """A flag for each number of `options`, with its help in `texts` [(name, type, help)], and the switches."""
    for name, kind, text in texts:
        parser.add_argument("--" + name.replace("_", "-"), type=kind, default=getattr(options, name),
                            metavar=kind.__name__.upper(), help=f"{text} (default {getattr(options, name)})",
                            choices=["auto", "bf16", "fp32"] if kind is str else None)
    parser.add_argument("--bf16-moments", action="store_true",
                        help="keep AdamW's moments in bf16, rounded at random: 4 bytes less for each weight")
    parser.add_argument("--checkpoint-activations", action="store_true",
                        help="recompute blocks in the backward pass: less memory")
    parser.add_argument("--compile", action="store_true",
                        help="let torch.compile fuse each block, which takes a minute or more at first")
    parser.add_argument("--device", default=None, help="cpu, cuda, ... (default: cuda where there is one)")


def check_ranges(parser, args):
    for name, (lowest, highest) in RANGES.items():
        if hasattr(args, name) and not lowest <= getattr(args, name) <= highest:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}, but must be from {lowest} to {highest}")


@dataclass
class Options:
    """How to train; the defaults are MetaAligner's (arXiv 2403.17141, implementation details)."""
    lr: float = 1e-5
    weight_decay: float = 1e-5
    warmup: float = 0.05
    epochs: float = 2.0
    batch: int = 512
    max_tokens: int = 4096
    micro_tokens: int = 16384
    clip: float = 1.0
    max_steps: int = 0
    val_share: float = 0.01
    val_every: int = 100
    save_seconds: float = 300.0
    precision: str = "auto"
    seed: int = 0
    lora_rank: int = 0
    bf16_moments: bool = False
    checkpoint_activations: bool = False
    compile: bool = False


OPTION_HELP = [
    ("lr", float, "highest learning rate"), ("weight_decay", float, "AdamW's, on matrices only"),
    ("warmup", float, "share of the steps in which the rate rises; a cosine to zero follows"),
    ("epochs", float, "passes over the examples, for each step of an aligner"),
    ("batch", int, "examples per optimizer step"), ("max_tokens", int, "longest example; older turns are dropped"),
    ("micro_tokens", int, "tokens per forward pass; lower it when memory runs out"),
    ("clip", float, "largest gradient norm"),
    ("max_steps", int, "stop after so many, in each step of an aligner; 0: after the epochs"),
    ("val_share", float, "share of the prompts held out for validation"),
    ("val_every", int, "steps between validations"), ("save_seconds", float, "seconds between saved states"),
    ("precision", str, "bf16 (autocast over fp32 weights), fp32, or auto: bf16 where the device has it"),
    ("lora_rank", int, "train low-rank adapters of this rank, the rest frozen; 0: train everything"),
    ("seed", int, "orders the examples"),
]
RANGES = {  # what is refused at once, rather than after the data has been read
    "lr": (0, 10), "weight_decay": (0, 10), "warmup": (0, 1), "epochs": (1e-9, 1e9), "batch": (1, 10**9),
    "max_tokens": (2, 10**9), "micro_tokens": (1, 10**9), "clip": (1e-9, 1e9), "max_steps": (0, 10**12),
    "val_share": (0, 0.99), "val_every": (1, 10**12), "warmup_data": (0, 1), "replay_share": (0, 0.99),
    "save_seconds": (0, 1e9), "seed": (0, 2**60),
    "lora_rank": (0, 10**6),
}

if __name__ == "__main__":
    arguments()  # --help and mistyped flags are answered before the seconds that importing torch takes

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

import model  # noqa: E402

# ----------------------------------------------------------------------------------------------------------------
# Methods: data functions. Each gives rows {"prompt", "completion", "context"?}; a text is a row with an empty prompt.


def pretraining_rows(paths, **_):
    """Next-token prediction on whole texts."""
    return [{"prompt": "", "completion": text} for path in paths for text in data.read_texts(path)]


def sft_rows(paths, **_):
    """Supervised fine-tuning: a prompt's completion, or the best-rated response of preference data."""
    return [row for path in paths for row in data.read_completions(path)]


def equal_rows(paths, **_):
    """Equal-preference pairs (MetaAligner, step 2)."""
    return [row for path in paths for row in data.read_pairs(path) if row.get("relation") == "equal"]


def better_rows(paths, **_):
    """Contrastive preference pairs (MetaAligner, step 3)."""
    return [row for path in paths for row in data.read_pairs(path) if row.get("relation") == "better"]


def partner_rows(paths, seed=0, share=0.1):
    """Warm-up (MetaAligner, step 1) on a random part of the equal-preference pairs as they are."""
    rows = equal_rows(paths)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(rows), generator=generator)[:math.ceil(share * len(rows))].tolist()
    return [rows[i] for i in sorted(chosen)]


def identity_rows(paths, seed=0, share=0.1):
    """Warm-up with the answer itself as the target, so that the model starts from copying (Aligner's residual idea,
    arXiv 2402.02416)."""
    rows = partner_rows(paths, seed, share)
    if not all("answer" in row for row in rows):
        raise UserError(f"{paths[0]}: its rows do not say where the answer is in the prompt ('answer': [start, end]); make "
                        "them with `python data.py reformulate`, or leave the step identity out of --steps")
    return [{**row, "completion": row["prompt"][slice(*row["answer"])]} for row in rows]


def preference_rows(paths, principle=None, **_):
    """Pairs of responses with the probability that the first is better (MORLAIF, AI feedback)."""
    return [row for path in paths for row in data.read_preferences(path, principle)]


# ----------------------------------------------------------------------------------------------------------------
# Methods: loss functions. Each takes a packed batch and gives the summed loss over its targets.


def cross_entropy(llama, batch):
    """Negative log-likelihood of the completions given their prompts (MetaAligner, eqs. 4-6)."""
    return -model.token_logprobs(llama, batch.tokens, batch.lengths, batch.targets).sum()


def bradley_terry(llama, batch):
    """Cross-entropy of the labels against P(a better) = sigmoid(score_a - score_b), summed over the pairs (Bradley and
    Terry 1952; with soft labels, as in MORLAIF's preference models)."""
    scores = model.document_scores(llama, batch.tokens, batch.lengths)[0][batch.pairs]   # (pairs, 2)
    return torch.nn.functional.binary_cross_entropy_with_logits(scores[:, 0] - scores[:, 1], batch.labels,
                                                                reduction="sum")


STAGES = {  # name -> (data function, loss function)
    "pretrain": (pretraining_rows, cross_entropy),
    "sft": (sft_rows, cross_entropy),
    "identity": (identity_rows, cross_entropy),
    "partner": (partner_rows, cross_entropy),
    "equal": (equal_rows, cross_entropy),
    "better": (better_rows, cross_entropy),
    "reward": (preference_rows, bradley_terry),  # reward.py trains one for each principle
}


# ----------------------------------------------------------------------------------------------------------------
# From rows to batches


@dataclass
class Stage:
    """One run of the loop: a name, examples [(ids, n_prompt)] or, of pairs, [(ids of both, n_first, label)], held-out
    ones, texts to mix in, a loss."""
    name: str
    examples: list
    held_out: list = field(default_factory=list)
    replay: list = field(default_factory=list)
    replay_share: float = 0.0
    loss: object = cross_entropy


@dataclass
class Batch:
    """Examples packed one after another: tokens (N,), targets (K,), the places of what the loss is a mean over, lengths
    per document. Of pairs: which two documents (P, 2), and labels (P,)."""
    tokens: torch.Tensor
    targets: torch.Tensor
    lengths: list
    pairs: torch.Tensor | None = None
    labels: torch.Tensor | None = None


def prepare(name, rows, tokenizer, config, options, replay=(), replay_share=0.0):
    """Tokenise rows into a Stage. Whole prompts are held out, so that no held-out prompt is trained on in another
    pair. Says how many examples did not fit; UserError when none is left. Training on examples longer than the model's
    context lengthens the context: config is told."""
    def encode(rows):
        stop = config.stop_ids[0] if config.stop_ids else None
        return data.encode_pairs(tokenizer, rows, config.bos_token_id, stop, options.max_tokens)
    held_out = [data.held_out(row, options.val_share, options.seed) for row in rows]
    examples, dropped = encode([row for row, out in zip(rows, held_out) if not out])
    validation, more = encode([row for row, out in zip(rows, held_out) if out])
    if dropped + more:
        print(f"{name}: {dropped + more} of {len(rows)} examples left out: over {options.max_tokens} tokens even "
              "without their oldest turns (see --max-tokens)")
    if not examples:
        raise UserError(f"{name}: no example to train on ({len(rows)} rows read); check --data, --max-tokens, --val-share")
    longest = max(max(len(example[0]) - example[1], example[1]) if len(example) == 3 else len(example[0])
                  for example in examples)
    if longest > config.max_position_embeddings:
        print(f"{name}: the model's context grows from {config.max_position_embeddings} tokens to {longest}")
        config.max_position_embeddings = longest
    texts = encode([{"prompt": "", "completion": text} for text in replay])[0]
    return Stage(name, examples, validation, texts, replay_share, STAGES[name][1])


def ahead(make, items, device):
    """Yield make(item) for each item; beside a GPU, a thread makes the next one while this one is in use. On a CPU the
    thread would take 7 % of the step's time."""
    if device.type == "cpu":
        yield from map(make, items)
        return
    with ThreadPoolExecutor(1) as thread:
        coming = []
        for item in items:
            coming.append(thread.submit(make, item))
            if len(coming) > 1:
                yield coming.pop(0).result()
        for last in coming:
            yield last.result()


def steps_in(stage, options):
    total = math.ceil(options.epochs * len(stage.examples) / options.batch)
    return min(total, options.max_steps) if options.max_steps else total


def examples_of(stage, step, options):
    """The examples of a step: a pure function of seed and step. The data is shuffled anew for each epoch."""
    def draw(pool, count, salt):
        chosen = []
        while len(chosen) < count:
            epoch, place = divmod(step * count + len(chosen), len(pool))
            generator = torch.Generator().manual_seed(hash((options.seed, salt, epoch)) % 2**63)
            order = torch.randperm(len(pool), generator=generator)
            chosen += [pool[i] for i in order[place:place + count - len(chosen)].tolist()]
        return chosen
    extra = round(options.batch * stage.replay_share) if stage.replay else 0
    return draw(stage.examples, options.batch - extra, 0) + (draw(stage.replay, extra, 1) if extra else [])


def pack(examples, micro_tokens, device):
    """Batches of at most micro_tokens tokens (an example that is longer gets its own), lengths alike side by side."""
    groups, size = [[]], 0
    for example in sorted(examples, key=lambda example: len(example[0])):
        if groups[-1] and size + len(example[0]) > micro_tokens:
            groups, size = groups + [[]], 0
        groups[-1].append(example)
        size += len(example[0])
    for group in groups:
        if len(group[0]) == 3:
            yield pack_pairs(group, device)
            continue
        tokens = torch.tensor([token for ids, _ in group for token in ids])
        targets = torch.cat([torch.arange(len(ids)) >= max(n_prompt, 1) for ids, n_prompt in group]).nonzero()[:, 0]
        yield Batch(tokens.to(device, non_blocking=True), targets.to(device, non_blocking=True),
                    [len(ids) for ids, _ in group])


def pack_pairs(group, device):
    """A batch of pairs, both documents of each in it, documents of like length side by side."""
    documents = [part for ids, first, _ in group for part in (ids[:first], ids[first:])]
    order = sorted(range(len(documents)), key=lambda i: len(documents[i]))
    lengths = [len(documents[i]) for i in order]
    tokens = torch.tensor([token for i in order for token in documents[i]])
    place = torch.empty(len(order), dtype=torch.long)
    place[order] = torch.arange(len(order))
    pairs = place.view(-1, 2)
    targets = torch.tensor(lengths).cumsum(0)[pairs[:, 0]] - 1  # one for each pair
    labels = torch.tensor([label for _, _, label in group], dtype=torch.float32)
    return Batch(tokens.to(device), targets.to(device), lengths, pairs.to(device), labels.to(device))


# ----------------------------------------------------------------------------------------------------------------
# The loop


def train(llama, tokenizer, stages, out, options, resume=False, progress=True):
    """Train llama through the stages, one after another, and save it as a folder that from_pretrained reads.

    out/metrics.jsonl gets a row per step and per validation, out/state.pt the state to resume from. A finished run
    leaves no state behind. Gives the rows of metrics."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    device = llama.device
    llama.checkpoint_activations = options.checkpoint_activations
    if options.compile:
        model.compile_blocks(llama)
    state = load_state(out, stages, options, llama) if resume else None
    if state == "finished":
        print(f"{out}: finished already")
        return read_metrics(out)
    if state:
        llama.load_state_dict(state["model"], strict=False)  # with LoRA, it holds the adapters alone
    else:
        forget(out)
    metrics = open_metrics(out, state["metrics_bytes"] if state else 0)
    for number, stage in enumerate(stages):
        if state and number < state["stage"]:
            continue
        optimizer = make_optimizer(llama, options)
        first, tokens, spent, total = 0, 0, 0.0, steps_in(stage, options)
        if state and state["stage"] == number:
            optimizer.load_state_dict(state["optimizer"])
            first, tokens, spent = state["step"], state["tokens"], state["seconds"]
        began = saved = time.perf_counter()
        name = f"{out.name}: {stage.name}"
        with tqdm(total=total, initial=first, desc=name, unit="step", disable=not progress) as bar:
            if first == 0:
                validate(llama, stage, 0, metrics, options)
            def packed(step, stage=stage):
                return list(pack(examples_of(stage, step, options), options.micro_tokens, device))
            for step, batches in enumerate(ahead(packed, range(first, total), device), first):
                rate = learning_rate(step, total, options)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                count = sum(len(batch.targets) for batch in batches)
                loss = 0.0
                for batch in batches:
                    with autocast(device, options):
                        part = stage.loss(llama, batch) / count
                    part.backward()
                    loss = loss + part.detach()
                    tokens += len(batch.tokens)
                norm = torch.nn.utils.clip_grad_norm_(trained(llama).values(), options.clip)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                now = time.perf_counter()
                row = {"stage": stage.name, "step": step + 1, "loss": float(loss), "lr": rate, "grad_norm": float(norm),
                       "tokens": tokens, "seconds": round(spent + now - began, 3)}
                if not math.isfinite(row["loss"]):
                    raise UserError(f"{out}: the loss of step {step + 1} is {row['loss']}; lower --lr or check --data")
                write_row(metrics, row)
                speed = f"{tokens / max(row['seconds'], 1e-3):,.0f} tok/s"
                bar.set_postfix_str(f"loss {row['loss']:.3f}, {speed}, {memory(device)}")
                bar.update()
                if (step + 1) % options.val_every == 0 or step + 1 == total:
                    validate(llama, stage, step + 1, metrics, options)
                if now - saved > options.save_seconds and step + 1 < total:
                    save_state(out, llama, optimizer, stages, number, step + 1, tokens, row["seconds"], metrics,
                               options)
                    saved = time.perf_counter()
        if number + 1 < len(stages):
            save_state(out, llama, make_optimizer(llama, options), stages, number + 1, 0, 0, 0.0, metrics, options)
    metrics.close()
    data.write_whole(out / "tokenizer.json", lambda path: Path(path).write_text(tokenizer.to_str(), encoding="utf-8"))
    llama.save_pretrained(out)
    for name in ("state.pt", "state.pt.tmp"):  # the latter from a run that was killed while it saved
        (out / name).unlink(missing_ok=True)
    return read_metrics(out)


def trained(llama):
    """What is trained, by name: all parameters, but for LoRA."""
    return {name: parameter for name, parameter in llama.named_parameters() if parameter.requires_grad}


def make_optimizer(llama, options):
    """AdamW, decay on matrices only, the update fused into one kernel; or with its moments in bf16."""
    parameters = trained(llama).values()
    groups = [{"params": [p for p in parameters if p.dim() > 1], "weight_decay": options.weight_decay},
              {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]
    if options.bf16_moments:
        return LeanAdamW(groups, lr=options.lr)
    return torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.95), fused=True)


class LeanAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) with both moments in bf16, rounded up or down at random: rounded
    to the nearest, an average that changes by less than 0.4 % a step would never change."""

    def __init__(self, groups, lr, betas=(0.9, 0.95), eps=1e-8):
        super().__init__(groups, dict(lr=lr, betas=betas, eps=eps))

    @torch.no_grad()
    def step(self):
        for number, (group, weight) in enumerate((group, weight) for group in self.param_groups
                                                 for weight in group["params"] if weight.grad is not None):
            state, gradient, (beta1, beta2) = self.state[weight], weight.grad.float(), group["betas"]
            steps = state["step"] = state.get("step", 0) + 1
            mean = state["mean"].float() if steps > 1 else torch.zeros_like(gradient)
            square = state["square"].float() if steps > 1 else torch.zeros_like(gradient)
            mean.lerp_(gradient, 1 - beta1)
            square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            generator = torch.Generator(weight.device).manual_seed(steps * 1_000_003 + number)
            state["mean"], state["square"] = (rounded_at_random(x, generator) for x in (mean, square))
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            spread = (square / (1 - beta2 ** steps)).sqrt_().add_(group["eps"])
            weight.addcdiv_(mean, spread, value=-group["lr"] / (1 - beta1 ** steps))


def rounded_at_random(x, generator):
    """fp32 to bf16, up or down with the chances that make the mean exact: noise is added to the bits that are cut."""
    noise = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    return ((x.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32).bfloat16()


def learning_rate(step, total, options):
    """Linear warm-up over a share of the steps, then a cosine to zero."""
    rising = max(1, math.ceil(options.warmup * total))
    if step < rising:
        return options.lr * (step + 1) / rising
    return options.lr * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, total - rising)))


def autocast(device, options):
    wanted = model.computes_bf16(device) if options.precision == "auto" else options.precision == "bf16"
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=wanted)


@torch.no_grad()
def validate(llama, stage, step, metrics, options):
    """Mean loss per target token on the held-out examples, written to metrics."""
    if not stage.held_out:
        return
    loss, count = 0.0, 0
    for batch in pack(stage.held_out, options.micro_tokens, llama.device):
        with autocast(llama.device, options):
            loss += float(stage.loss(llama, batch))
        count += len(batch.targets)
    write_row(metrics, {"stage": stage.name, "step": step, "val_loss": loss / count})


def memory(device):
    """Peak memory so far, for the progress bar."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
    import resource
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB"


# ----------------------------------------------------------------------------------------------------------------
# Metrics and the state to resume from


def write_row(metrics, row):
    metrics.write((json.dumps(row) + "\n").encode())
    metrics.flush()


def read_metrics(out):
    return [json.loads(line) for line in open(Path(out) / "metrics.jsonl", encoding="utf-8")]


def open_metrics(out, keep):
    """The metrics file, cut back to the bytes that the resumed state knows of."""
    metrics = open(out / "metrics.jsonl", "ab")
    metrics.truncate(keep)
    return metrics


FINISHED = ("config.json", "adapter_config.json")  # the last file that a finished run writes


def forget(out):
    """Remove what an earlier run into the same folder would make --resume believe."""
    (out / "state.pt").unlink(missing_ok=True)
    if (out / "metrics.jsonl").exists():
        for name in FINISHED:
            (out / name).unlink(missing_ok=True)


def save_state(out, llama, optimizer, stages, stage, step, tokens, seconds, metrics, options):
    weights = {name: parameter.detach() for name, parameter in trained(llama).items()}
    state = {"model": weights, "optimizer": optimizer.state_dict(), "stage": stage, "step": step,
             "tokens": tokens, "seconds": seconds, "metrics_bytes": os.fstat(metrics.fileno()).st_size,
             "options": vars(options), "plan": plan(stages)}
    write_state(out / "state.pt", state)


def write_state(path, state):
    def write(aside):
        try:
            torch.save(state, aside)
        except RuntimeError as error:  # how PyTorch reports a full disk
            raise UserError(f"{path}: cannot be written ({model.first_line(error)}); is the disk full?")
    data.write_whole(path, write)


def read_state(out, device):
    """What write_state wrote to OUT/state.pt; None to begin at the beginning; "finished" when there is nothing left to
    do."""
    path = out / "state.pt"
    if not path.exists():
        written = any((out / name).exists() for name in FINISHED)
        return "finished" if written and (out / "metrics.jsonl").exists() else None
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        raise UserError(f"{path}: cannot be read ({model.first_line(error)}); delete it to start again")


def refuse_other_settings(out, changed):
    if changed:
        raise UserError(f"{out / 'state.pt'}: was made with other settings of {', '.join(changed)}; give the same to "
                        "--resume, or leave --resume out to start again")


def plan(stages):
    """What is trained on, in figures: a resumed run must find the same."""
    def figures(pool):
        return [len(pool), sum(len(example[0]) for example in pool), sum(sum(example[2:]) for example in pool)]
    return [[stage.name, stage.replay_share if stage.replay else 0.0]
            + [figures(pool) for pool in (stage.examples, stage.held_out, stage.replay)] for stage in stages]


def load_state(out, stages, options, llama):
    """What save_state wrote, as of read_state; UserError where it is of a run with other settings."""
    state = read_state(out, llama.device)
    if state in (None, "finished"):
        return state
    schedule = ("lr", "weight_decay", "warmup", "epochs", "batch", "max_tokens", "clip", "max_steps", "val_share",
                "precision", "lora_rank", "bf16_moments", "seed")
    changed = [key for key in schedule if state["options"].get(key) != getattr(options, key)]
    changed += ["data or steps"] if state.get("plan") != plan(stages) else []
    shapes = {name: tensor.shape for name, tensor in trained(llama).items()}
    changed += ["model"] if shapes != {name: tensor.shape for name, tensor in state.get("model", {}).items()} else []
    refuse_other_settings(out, changed)
    return state


# ----------------------------------------------------------------------------------------------------------------
# Command line


def main():
    args = arguments()
    options = Options(**{name: getattr(args, name) for name in vars(Options())})
    device = device_named(args.device)
    if Path(args.out).resolve() == Path(args.model).resolve():
        raise UserError(f"{args.out}: is the model to start from; choose another --out")
    llama = start_from(args.model, args.stage, device, options)
    tokenizer = model.load_tokenizer(args.model, llama)
    replay = [text for path in args.replay for text in data.read_texts(path)]
    names = args.steps if args.stage == "aligner" else [args.stage]
    stages = []
    for name in names:
        rows = STAGES[name][0](args.data, seed=options.seed, share=args.warmup_data)
        if not rows and name != names[-1]:  # data of two answers, one better, have no equal pairs
            print(f"{name}: no such pairs in the data, step left out")
            continue
        stages.append(prepare(name, rows, tokenizer, llama.config, options, replay, args.replay_share))
    print(f"{sum(p.numel() for p in llama.parameters()):,} parameters on {device}; "
          + ", ".join(f"{s.name}: {len(s.examples):,} examples, {steps_in(s, options):,} steps" for s in stages))
    rows = train(llama, tokenizer, stages, args.out, options, args.resume)
    if args.merge and model.is_adapter(args.out):
        model.Llama.from_pretrained(args.out).save_pretrained(args.out)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            (Path(args.out) / name).unlink()
    for stage in stages:
        losses = [row["val_loss"] for row in rows if row["stage"] == stage.name and "val_loss" in row]
        if losses:
            print(f"{stage.name}: validation loss {losses[0]:.3f} before, {losses[-1]:.3f} after")
    print(f"saved in {args.out}")


def device_named(name):
    """The device of a --device, by default cuda where there is one; UserError where this machine has none such."""
    try:
        return torch.zeros(0, device=name or ("cuda" if torch.cuda.is_available() else "cpu")).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: cannot be used here ({model.first_line(error)}); give cpu, or leave it out")


def start_from(folder, stage, device, options):
    """The model in a folder, with a scalar head for preferences and with LoRA where it is wanted; for pretraining, one
    from scratch where the folder has a configuration alone."""
    weights = list(Path(folder).glob("*.safetensors")) + list(Path(folder).glob("*.bin"))
    if stage == "pretrain" and not weights and (Path(folder) / "config.json").exists():
        return model.Llama(model.Config.read(Path(folder) / "config.json"), options.seed).to(device)
    if not options.lora_rank:
        return model.Llama.from_pretrained(folder, device=device, scorer=stage == "reward")
    if model.is_adapter(folder):
        raise UserError(f"{folder}: is an adapter itself; merge it into its base first (--merge when it is trained)")
    frozen = torch.bfloat16 if device.type == "cuda" and model.computes_bf16(device) else torch.float32
    llama = model.Llama.from_pretrained(folder, frozen, device, scorer=stage == "reward")
    return model.add_lora(llama, options.lora_rank, folder, seed=options.seed)


if __name__ == "__main__":
    cli(main)
