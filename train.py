"""Train a Llama: one loop, and the methods that run in it.

examples:
  python train.py pretrain --model FOLDER --data texts.jsonl --out base
  python train.py sft      --model base --data answers.jsonl --out policy
  python train.py dpo      --model policy --data preferences.jsonl --out better --lr 1e-6 --batch 64
  python train.py ipo      --model policy --data rated.jsonl --weights helpful=0.7,honest=0.3 --out better
  python train.py aligner  --model base --data pairs.jsonl --out aligner

FOLDER is a Hugging Face folder of a Llama, Qwen2, Qwen3 or Mistral; for pretrain, one with config.json and
tokenizer.json alone starts from scratch. pairs.jsonl is what `python data.py reformulate` writes; `aligner` runs
identity, equal and better, MetaAligner's three steps; contrast goes on from there. OUT/metrics.jsonl tells each step.
"""
# A method is one data function and one loss function (methods.py); the rest, from bf16 to resuming, is `train`. A step
# is `batch` examples, cut into micro-batches of at most `micro_tokens` tokens, packed without padding. Which it holds
# depends on seed and step alone, so a resumed run repeats a killed one (on a GPU but for the last bits, which grow).
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

from common import (UserError, add_options, cli, digest, file_digest, lasting, make_parser, number, option,
                    read_options, refuse_given, seed_from)

import torch
from tqdm import tqdm

import chat
import checkpoint
import data
import folders
import formats
import methods
import parallel
from compiled import compile_blocks
from generate import generate
from lora import add_lora
from methods import ALIGNER, METHODS, Method, unheeded
from model import Llama, computes_bf16, computes_half, device_named, document_scores, token_logprobs
from optimizers import learning_rate, make_optimizer, refuse_beside_muon
from peers import peak
from resume import Run, for_card, plan, read_metrics, read_run


@dataclass
class Options:
    """How to train; the defaults are MetaAligner's (arXiv 2403.17141, implementation details)."""
    lr: float = option(1e-5, "highest learning rate", 0, 10)
    optimizer: str = option("adamw", "muon: small models learn in half the steps", choices=["adamw", "muon"])
    weight_decay: float = option(1e-5, "on matrices only", 0, 10)
    warmup: float = option(0.05, "share of the steps in which the rate rises; a cosine to zero follows", 0, 1)
    epochs: float = option(2.0, "passes over the examples, for each step of an aligner", 1e-9, 1e9)
    batch: int = option(512, "examples per optimizer step", 1, 10**9)
    chat_template: str = chat.template_option()
    max_tokens: int = option(4096, "longest example; older turns are dropped", 2, 10**9)
    micro_tokens: int = option(16384, "tokens per forward pass; lower it when memory runs out", 1, 10**9, free=True)
    max_grad_norm: float = option(1.0, "longer gradients are cut to this", 1e-9, 1e9)
    max_steps: int = option(0, "stop after so many, in each step of an aligner; 0: after the epochs", 0, 10**12)
    val_share: float = option(0.01, "share of the prompts held out for validation", 0, 0.99)
    val_every: int = option(100, "steps between validations", 1, 10**12, free=True)
    save_seconds: float = option(300.0, "seconds between saved states", 0, 1e9, free=True)
    samples: int = option(3, "held-out prompts that are continued, greedily, at each validation; 0: none", 0, 1000,
                          free=True)
    log: str = option("", "where every row of metrics goes too; a resumed run's rows go there again",
                      choices=["wandb", "tensorboard"], free=True)
    precision: str = option("auto", "bf16 (autocast over fp32 weights), fp32, or auto: bf16 where the device has it",
                            choices=["auto", "bf16", "fp32"])
    lora_rank: int = option(0, "train low-rank adapters of this rank, the rest frozen; 0: train everything", 0, 10**6)
    merge: bool = option(False, "with --lora-rank: write a whole model instead of an adapter")
    bf16_moments: bool = option(False, "keep AdamW's moments in bf16, rounded at random: 4 bytes less for each weight")
    compile: bool = option(False, "compile the blocks: a small model trains 1.15 x as fast (compiled.py)")
    checkpoint_activations: bool = option(False, "recompute blocks in the backward pass: less memory", free=True)
    replicate: bool = option(False, "with torchrun: each process holds the whole model, not a slice; faster where it "
                             "fits", free=True)
    seed: int = option(0, "orders the examples", 0, 2**60)
    # Of some methods alone, which name them in METHODS:
    beta: float = option(0.1, "dpo and its family: how strongly the policy is held to the reference (simpo, which has "
                          "none: the scale of a token's log-probability, usually 2 or more)", 1e-9, 1e9)
    principle: str = option("", "pairs: on which principle, where the data compare responses on several")
    weights: str = option("", "rated answers: on which objectives, and how they are joined: helpful=0.7,honest=0.3")
    temperature: float = option(1.0, "with --weights: labels are sigmoid(difference / this); 0: certain", 0, 1e9)
    label_smoothing: float = option(0.0, "dpo: share of labels taken as wrong (cDPO); robust: share known to be wrong",
                                    0, 0.49)
    margin: float = option(1.0, "simpo: log-odds by which the better response is to lead (the paper's gamma)", 0, 1e6)
    sft_coef: float = option(0.005, "rpo, pro: weight of the better, the best response's likelihood", 0, 1e6)
    odds_coef: float = option(0.1, "orpo: weight of the odds ratio beside the likelihood", 0, 1e6)
    warmup_data: float = option(0.1, "aligner: part of the equal-preference pairs that the warm-up step takes", 0, 1)


# ----------------------------------------------------------------------------------------------------------------
# From rows to batches


@dataclass
class Stage:
    """One run of the loop: a name, data.Examples, held-out ones, texts to mix in and their share, a method."""
    name: str
    examples: list
    held_out: list = field(default_factory=list)
    replay: list = field(default_factory=list)
    replay_share: float = 0.0
    method: Method = METHODS["pretrain"]


@dataclass
class Batch:
    """Documents packed one after another, with what is to be learned of them."""
    tokens: torch.Tensor                       # (N,)
    lengths: list                              # of the documents
    targets: torch.Tensor                      # (K,): the places of the completions' tokens
    document: torch.Tensor                     # (K,): which document each target stands in
    pairs: torch.Tensor | None = None          # (P, 2): which documents are compared; of ranked answers (P, K)
    labels: torch.Tensor | None = None         # (P,): the probability that the first is the better one
    gaps: torch.Tensor | None = None           # (P,): by how much the first one's score is higher
    rewards: torch.Tensor | None = None        # (P, K): of ranked answers, from high to low
    ref_logprobs: torch.Tensor | None = None   # (P, 2): of the responses, by the reference
    spare: bool = False                        # counts for nothing: see batches_of

    @property
    def count(self):
        """What a loss is a mean over: pairs, or else targets."""
        if self.spare:
            return 0
        return len(self.targets) if self.pairs is None else len(self.pairs)

    def by_pair(self, logprobs):
        """(P, 2), or (P, K): the log-probabilities (targets,) summed over each response."""
        return logprobs.new_zeros(len(self.lengths)).index_add(0, self.document, logprobs)[self.pairs]

    @property
    def sizes(self):
        """(P, 2), or (P, K): how many targets each response has, its stop token among them."""
        return torch.bincount(self.document, minlength=len(self.lengths))[self.pairs]


def prepare(name, rows, tokenizer, config, options, replay=(), replay_share=0.0):
    """Tokenise rows into a Stage. Whole prompts are held out, so that no held-out prompt is trained on in another
    pair. Says how many examples did not fit; UserError when none is left. Examples longer than the model's context
    lengthen the context, and config is told; UserError where they are longer than its sliding window."""
    def encode(rows):
        stop = config.stop_ids[0] if config.stop_ids else None
        return data.encode_examples(tokenizer, rows, config.bos_token_id, stop, options.max_tokens)
    held_out = [data.is_held_out(row, options.val_share, options.seed) for row in rows]
    examples, dropped = encode([row for row, out in zip(rows, held_out) if not out])
    validation, more = encode([row for row, out in zip(rows, held_out) if out])
    if dropped + more:
        print(f"{name}: {dropped + more} of {len(rows)} examples left out: over {options.max_tokens} tokens even "
              "without their oldest turns (see --max-tokens)")
    if not examples:
        raise UserError(f"{name}: no example to train on ({len(rows)} rows read); check --data, --max-tokens, "
                        "--val-share")
    texts = encode([{"prompt": "", "completion": text} for text in replay])[0]
    longest = max(len(document.ids) for example in (*examples, *validation, *texts) for document in example.documents)
    if config.sliding_window and longest > config.sliding_window:
        raise UserError(f"{name}: an example has {longest} tokens, more than the model's sliding_window, beyond which "
                        f"its attention is not computed here; give --max-tokens {config.sliding_window}")
    if longest > config.max_position_embeddings:
        print(f"{name}: the model's context grows from {config.max_position_embeddings} tokens to {longest}")
        config.max_position_embeddings = longest
    return Stage(name, examples, validation, texts, replay_share, METHODS[name])


def steps_in(stage, options):
    own = options.batch - replayed(stage, options)
    total = math.ceil(options.epochs * len(stage.examples) / own)
    return min(total, options.max_steps) if options.max_steps else total


def replayed(stage, options):
    """How many of a step's examples are texts mixed in: at least one is not."""
    return min(round(options.batch * stage.replay_share), options.batch - 1) if stage.replay else 0


def examples_of(stage, step, options):
    """The examples of a step: a pure function of seed and step. The data is shuffled anew for each epoch."""
    extra = replayed(stage, options)
    chosen = draw(stage.examples, step, options.batch - extra, (options.seed, "examples"))
    return chosen + (draw(stage.replay, step, extra, (options.seed, "replay")) if extra else [])


def draw(pool, step, count, seed):
    """The items of a pool that step number `step` takes, `count` a step: each once before any comes again."""
    chosen = []
    while len(chosen) < count:
        epoch, place = divmod(step * count + len(chosen), len(pool))
        generator = torch.Generator().manual_seed(seed_from(*seed, epoch))
        order = torch.randperm(len(pool), generator=generator)
        chosen += [pool[i] for i in order[place:place + count - len(chosen)].tolist()]
    return chosen


def batches_of(examples, options, device):
    """Yield the Batches of this process's share of examples, and spare ones until it has as many as any other: in each
    pass, all processes take part."""
    shares = parallel.shares(examples, size)
    yield from pack(shares[parallel.rank()], options.micro_tokens, device)
    if len(shares) > 1:
        passes = [len(groups_of(share, options.micro_tokens)) for share in shares]
        for _ in range(max(passes) - passes[parallel.rank()]):
            batch = batch_of([min(examples, key=size)], device)
            batch.spare = True
            yield batch


def pack(examples, micro_tokens, device):
    """Yield Batches of at most micro_tokens tokens (an example that is longer gets its own), lengths alike together."""
    for group in groups_of(examples, micro_tokens):
        yield batch_of(group, device)


def groups_of(examples, micro_tokens):
    """The examples of each Batch of `pack`."""
    groups, total = [], 0
    for example in sorted(examples, key=size):
        if not groups or total + size(example) > micro_tokens:
            groups.append([])
            total = 0
        groups[-1].append(example)
        total += size(example)
    return groups


def size(example):
    """How many tokens an example has."""
    return sum(len(document.ids) for document in example.documents)


def batch_of(examples, device):
    """A Batch of examples, their documents in the order of their lengths."""
    documents = [document for example in examples for document in example.documents]
    order = sorted(range(len(documents)), key=lambda i: len(documents[i].ids))
    lengths = [len(documents[i].ids) for i in order]
    tokens = torch.tensor([token for i in order for token in documents[i].ids])
    learned = torch.cat([torch.arange(len(documents[i].ids)) >= max(documents[i].start, 1) for i in order])
    targets = learned.nonzero()[:, 0]
    document = torch.repeat_interleave(torch.arange(len(order)), torch.tensor(lengths))[targets]
    batch = Batch(tokens.to(device), lengths, targets.to(device), document.to(device))
    if len(examples[0].documents) > 1:
        batch.pairs = torch.tensor(order).argsort().view(len(examples), -1).to(device)
        batch.labels, batch.gaps = (torch.tensor(values, dtype=torch.float32, device=device) for values in (
            [example.label for example in examples], [example.gap for example in examples]))
    if examples[0].rewards:
        batch.rewards = torch.tensor([example.rewards for example in examples], device=device)
    if examples[0].ref_logprobs:
        batch.ref_logprobs = torch.tensor([example.ref_logprobs for example in examples], device=device)
    return batch


# ----------------------------------------------------------------------------------------------------------------
# The loop


def train(llama, tokenizer, stages, out, options, resume=False, overwrite=False, about=None, progress=True):
    """Train llama through the stages, one after another, and save it as a folder that others can load (folders.py).

    out/metrics.jsonl gets a row per step and per validation, out/state.pt the state to resume from, out/run.json what
    was asked for, with what `about` adds. resume, overwrite: as of resume.Run. Gives the rows of metrics."""
    parallel.check([stage.name for stage in stages if stage.method.batch_mean])
    if options.compile:
        compile_blocks(llama)
    about = {**for_card([stage.name for stage in stages], prompt_of(stages[-1], tokenizer), options),
             **parallel.about(), **(about or {})}
    run = parallel.led(lambda: Run(out, settings_of(llama, tokenizer, stages, options), "train", resume, overwrite,
                                   about, options.log))
    if run.finished:
        return read_metrics(out)
    parallel.shard(llama, computes_half(parallel.device_of(llama), options), options.replicate)
    llama.checkpoint_activations = options.checkpoint_activations
    for stage in stages:
        if stage.method.reference:  # before the state is loaded: until then, the model is the reference
            add_ref_logprobs(llama, stage.examples + stage.held_out, options, progress)
    if state := run.state:
        parallel.restore(run, llama)
    for place, stage in enumerate(stages):
        if state and place < state["stage"]:
            continue
        optimizer = make_optimizer(llama, options, options.optimizer)
        first, tokens, spent, total = 0, 0, 0.0, steps_in(stage, options)
        if state and place == state["stage"] and state["step"]:
            parallel.restore(run, llama, optimizer)
            first, tokens, spent = state["step"], state["tokens"], state["seconds"]
        began = saved = time.perf_counter()
        with tqdm(total=total, initial=first, desc=f"{run.out.name}: {stage.name}", unit="step",
                  disable=not progress) as bar:
            if first == 0:
                validate(llama, tokenizer, stage, 0, run, options, progress)
            for step in range(first, total):
                rate = learning_rate(step, total, options)
                examples = examples_of(stage, step, options)
                batches = list(batches_of(examples, options, llama.device))
                loss, norm = train_step(llama, optimizer, batches, stage.method, rate, options)
                tokens += sum(map(size, examples))
                now = time.perf_counter()
                row = {"stage": stage.name, "step": step + 1, "loss": loss, "lr": rate, "grad_norm": norm,
                       "tokens": tokens, "seconds": round(spent + now - began, 3)}
                if not (math.isfinite(loss) and math.isfinite(norm)):
                    raise UserError(f"{out}: the loss of step {step + 1} is {loss}, its gradient's norm {norm}; lower "
                                    "--lr or check --data")
                run.write(row)
                speed = tokens / max(row["seconds"], 1e-3)
                bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tok/s, {peak(llama.device.type):.1f} GiB")
                bar.update()
                if (step + 1) % options.val_every == 0 or step + 1 == total:
                    validate(llama, tokenizer, stage, step + 1, run, options, progress)
                if parallel.all_of(now - saved)[0] > options.save_seconds and step + 1 < total:  # by rank 0's clock
                    parallel.save(run, llama, optimizer, stage=place, step=step + 1, tokens=tokens,
                                  seconds=row["seconds"])
                    saved = time.perf_counter()
        if place + 1 < len(stages):
            parallel.save(run, llama, stage=place + 1, step=0)
    parallel.gather(llama)
    return parallel.first(finish, run, llama, tokenizer, options.merge)


def finish(run, llama, tokenizer, merge=False):
    """Save the model in the run's folder; merge: an adapter as a whole model. Gives the rows of metrics."""
    folders.complete(run.out, llama, tokenizer, run.about)
    checkpoint.save(llama, run.out)
    if merge:
        checkpoint.merge(run.out)
    return run.finish()


def settings_of(llama, tokenizer, stages, options):
    """All that decides what a run makes: {name: value}."""
    others = unheeded([stage.method for stage in stages])
    settings = {name: value for name, value in lasting(options).items() if name not in others}
    if any(stage.method.batch_mean for stage in stages):
        settings["micro_tokens"] = options.micro_tokens  # it decides what the mean is over
    return {**settings, "data": plan(stages), "model": digest(checkpoint.weights_digest(llama), vars(llama.config)),
            **chat.settings_of(tokenizer)}


def prompt_of(stage, tokenizer):
    """The first prompt (text) that a stage trains on."""
    document = stage.examples[0].documents[0]
    return tokenizer.decode(list(document.ids[:document.start]))


def train_step(llama, optimizer, batches, method, rate, options):
    """One optimizer step on the batches together, at a learning rate: (mean loss, gradient norm)."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    count, loss = parallel.total(sum(batch.count for batch in batches)), 0.0
    for batch in batches:
        part = batch_loss(llama, batch, method, options) / count
        part.backward()
        loss = loss + part.detach()
    norm = torch.nn.utils.clip_grad_norm_(parallel.trained(llama).values(), options.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return parallel.total(float(loss)), float(parallel.whole(norm))


def batch_loss(llama, batch, method, options):
    """A method's loss, summed over a batch."""
    with autocast(llama.device, options):
        if method.scorer:
            found = document_scores(llama, batch.tokens, batch.lengths)[0]
        else:
            found = token_logprobs(llama, batch.tokens, batch.lengths, batch.targets)
        loss = method.loss(found, batch, options)
    return 0 * loss if batch.spare else loss


@torch.no_grad()
def add_ref_logprobs(llama, examples, options, progress):
    """Give each pair the log-probabilities of its responses under llama as it is now, the reference. Once, because they
    never change; so training needs no second model in memory."""
    shares, found = parallel.shares(examples, size), []
    with tqdm(total=len(shares[parallel.rank()]), desc="reference", unit="pair", disable=not progress) as bar:
        for batch in batches_of(examples, options, llama.device):
            with autocast(llama.device, options):
                logprobs = token_logprobs(llama, batch.tokens, batch.lengths, batch.targets)
            found += batch.by_pair(logprobs).tolist()
            bar.update(batch.count)
    for share, pairs in zip(shares, parallel.all_of(found)):
        for example, pair in zip(sorted(share, key=size), pairs):  # the order of `pack`; a spare one's is left over
            example.ref_logprobs = pair


@torch.no_grad()
def validate(llama, tokenizer, stage, step, run, options, progress=True):
    """Mean loss on the held-out examples, and what is written to a few of their prompts, written to the metrics."""
    if not stage.held_out:
        return
    loss, count = 0.0, 0
    for batch in batches_of(stage.held_out, options, llama.device):
        loss += float(batch_loss(llama, batch, stage.method, options))
        count += batch.count
    row = {"stage": stage.name, "step": step, "val_loss": parallel.total(loss) / parallel.total(count)}
    if options.samples and not stage.method.scorer:
        row["samples"] = write_samples(llama, tokenizer, stage, options)
        if progress:
            text = " ".join(data.printable(row["samples"][0]["text"], 100).split())
            tqdm.write(f"{run.out.name}: {stage.name}, step {step}: {text or '(nothing)'}")
    run.write(row)


SAMPLE = 48  # tokens of a sample, at most, and as far as the context goes


def write_samples(llama, tokenizer, stage, options):
    """[{"prompt", "text"}]: greedy continuations of the first held-out prompts, of texts their first quarter. What is
    trained does not depend on them: they draw nothing. Of a long prompt, the end is told."""
    prompts = {}
    for document in (example.documents[0] for example in stage.held_out):
        start = document.start if document.start > 1 else max(1, len(document.ids) // 4)
        prompts[tuple(document.ids[:start])] = None
        if len(prompts) == options.samples:
            break
    prompts = list(map(list, prompts))
    room = llama.config.max_position_embeddings - max(map(len, prompts))
    with autocast(llama.device, options):
        texts = generate(llama, prompts, min(SAMPLE, room), stop_ids=llama.config.stop_ids)
    return [{"prompt": tokenizer.decode(ids)[-1000:], "text": tokenizer.decode(new)}
            for ids, new in zip(prompts, texts)]


# ----------------------------------------------------------------------------------------------------------------
# What a step needs


def autocast(device, options):
    """bf16 arithmetic over fp32 weights, where options.precision and the device say so."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=computes_half(device, options))


def start_from(folder, name, device, options):
    """The model in a folder, with a scalar head for a method that scores and with LoRA where it is wanted; for
    pretrain, one from scratch where the folder has a configuration alone; for ppo, whole in each process."""
    place = device if name == "ppo" else parallel.place_to_load(device)
    weights = [path for ending in ("safetensors", "bin", "index.json") for path in Path(folder).glob(f"*.{ending}")]
    if name == "pretrain" and not weights and (Path(folder) / "config.json").exists():
        if options.lora_rank:
            raise UserError(f"{folder}: holds no weights to adapt; leave --lora-rank out to train all from scratch")
        return Llama(checkpoint.read_config(Path(folder) / "config.json"), options.seed).to(place)
    scorer = name in METHODS and METHODS[name].scorer
    if not options.lora_rank:
        return checkpoint.load(folder, device=place, scorer=scorer)
    if checkpoint.is_adapter(folder):
        raise UserError(f"{folder}: is an adapter itself; merge it into its base first (--merge when it is trained)")
    half = device.type == "cuda" and computes_bf16(device) and options.precision != "fp32"
    frozen = torch.bfloat16 if half else torch.float32
    return add_lora(checkpoint.load(folder, frozen, place, scorer), options.lora_rank, folder, seed=options.seed)


def load_tokenizer(folder, llama, options, out=None):
    """The tokenizer in a model's folder, behind its chat template where options say so; llama.config is told what ends
    an answer then. out: the folder of the run, where it goes on."""
    began = parallel.first(read_run, out).get("began") if out else None
    tokenizer = checkpoint.load_tokenizer(folder, llama)
    return chat.with_template(tokenizer, folder, llama.config, options.chat_template, began)


# ----------------------------------------------------------------------------------------------------------------
# Command line


def arguments(argv=None):
    parser = make_parser(f"{__doc__}\n{methods.__doc__}")
    add = parser.add_argument
    add("method", choices=[*METHODS, "aligner"], metavar="METHOD", help="what to learn, and how (see the list below)")
    add("--model", required=True, metavar="FOLDER", help="the Llama to start from")
    add("--data", required=True, nargs="+", metavar="FILE", help="what the method learns from (see below)")
    add("--out", required=True, metavar="FOLDER", help="where checkpoint and metrics go")
    add("--resume", action="store_true", help="go on where a killed run with the same arguments stopped")
    add("--overwrite", action="store_true", help="begin again, whatever run the folder holds")
    add("--steps", nargs="+", choices=[*ALIGNER, "partner"],
        help="an aligner's steps, in order: warm-up (identity: the answer itself; partner: an equally good one), "
             "equal preference, contrastive preference (default: identity equal better)")
    add("--replay", nargs="+", default=[], metavar="FILE", help="pretraining texts mixed into the batches")
    add("--replay-share", type=number(float, 0, 0.99), metavar="SHARE", help="their share of a batch (default 0.15)")
    add("--device", help="cpu, cuda, ... (default: cuda where there is one)")
    add_options(parser, Options)
    args = parser.parse_args(argv)
    if args.steps and args.method != "aligner":
        parser.error(f"--steps is for aligner; {args.method} is one step")
    args.names = (args.steps or ALIGNER) if args.method == "aligner" else [args.method]
    chosen = [METHODS[name] for name in args.names]
    refuse_beside_muon(parser, args)
    refuse_given(parser, args, unheeded(chosen), f"is no option of {' '.join(args.names)}; leave it out")
    if args.temperature is not None and not args.weights:
        parser.error("--temperature makes labels of what --weights joins; give these too")
    if args.merge and not args.lora_rank:
        parser.error("--merge is for adapters; give --lora-rank too")
    if args.resume and args.overwrite:
        parser.error("--resume goes on with a run, --overwrite begins again; give one of them")
    if args.replay_share is not None and not args.replay:
        parser.error("--replay-share is the share of --replay's texts; give these too")
    if args.replay and METHODS[args.names[0]].pairs:
        parser.error(f"--replay mixes texts into texts; {args.method} learns from pairs")
    return args


def main():
    args = arguments()
    with parallel.processes(args.device) as device:
        run(args, read_options(Options, args), device_named(device))


def run(args, options, device):
    """The stages that the command line asks for, from files to the saved model."""
    checkpoint.check_folder(args.out, [args.model])
    llama = start_from(args.model, args.names[0], device, options)
    tokenizer = load_tokenizer(args.model, llama, options, None if args.overwrite else args.out)
    replay = [text for path in args.replay for text in formats.read_texts(path)]
    share = 0.15 if args.replay_share is None else args.replay_share
    stages = []
    for name in args.names:
        rows = METHODS[name].rows(args.data, options)
        if not rows and name != args.names[-1]:  # data of two answers, one better, have no equal pairs
            print(f"{name}: no such pairs in the data, step left out")
            continue
        stages.append(prepare(name, rows, tokenizer, llama.config, options, replay, share))
    print(f"{sum(p.numel() for p in llama.parameters()):,} parameters on {device}; "
          + ", ".join(f"{s.name}: {len(s.examples):,} examples, {steps_in(s, options):,} steps" for s in stages))
    about = {"base": args.model, "device": str(device),
             "files": {path: file_digest(path) for path in [*args.data, *args.replay]}}
    rows = train(llama, tokenizer, stages, args.out, options, args.resume, args.overwrite, about)
    for stage in stages:
        losses_there = [row["val_loss"] for row in rows if row["stage"] == stage.name and "val_loss" in row]
        if losses_there:
            print(f"{stage.name}: validation loss {losses_there[0]:.3f} before, {losses_there[-1]:.3f} after")
    print(f"saved in {args.out}")


if __name__ == "__main__":
    cli(main)
