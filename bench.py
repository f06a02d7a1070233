"""How fast is it, beside its peers? Times our path and a peer's on the same model, data, dtype and machine in one run.

    machine   a matrix product, in bf16 where that is computed, and a copy: what the other figures are measured against
    train     supervised fine-tuning, of a 40M Llama if no other is given: train.py's step against TRL's SFTTrainer
    dpo       the same for DPO on preference pairs, the reference included; and whether both find the same losses
    large     on a GPU, 1.1B and 7B Llamas, else the 40M one: utilisation and memory of full fine-tuning and of LoRA
    align     greedy edits of real answers: align.py's generation against `transformers`, at its best batch size, or one
              by one with prompt lookup; and whether both write the same
    copy      edits that keep 65 to 75 % of their input, one at a time: guessing tokens from the prompt against
              transformers' prompt lookup, not guessing against its plain generation; batches against not guessing
    decode    without copying, one sequence and many, 7B on a GPU, else 40M: bytes read per second against the copy
    ppo       an iteration of ppo.py, 1.1B on a GPU, else 40M: how long it answers, and how long it learns
    story     seconds that `make train` takes, whose aligner copy then edits with, where --aligner names none
    tests     on a GPU, the tests that need one
    gpu       on a machine with a GPU, all that is to be known of it: tests, large, decode, ppo, story and copy

Without PART, all are run up to decode. One that fails is told on its line, and the others go on.
Every measurement is a process of its own, so that its peak memory is its own. The aligner is one that `make train`
wrote, as it is and widened to 40M parameters: the same function at that size's cost (see `widen`). Both sides are timed
in turns, each in its fastest way; a line tells medians, and how far the turns' ratios spread. What is timed of ours
stands in timed.py, what runs in the Python of a peer in peers.py.
"""
import contextlib
import difflib
import itertools
import json
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

from common import UserError, cli, make_parser, number, write_text

import torch

import checkpoint
import data
import formats
import peers
import timed
import toy
from writers import DRAFT, Writer
from measure import requests
from model import Config, Llama, computes_bf16, device_named
from peers import MAX_TOKENS, NEW_TOKENS, WARM
from resume import MODEL, circumstances

ROOT = Path(__file__).parent
SIZE = dict(vocab_size=32000, hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8)
LARGE = {  # of TinyLlama and of Llama 2
    "1.1B": dict(vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22,
                 num_attention_heads=32, num_key_value_heads=4),
    "7B": dict(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
               num_attention_heads=32),
}
BATCH = 8                       # examples, or pairs, in a training step
DPO = dict(beta=0.1, lr=1e-4)   # of both sides; the rate is high, so that losses move within a few steps
TURNS = 3                       # of both sides, each in its fastest way: the machine's pace changes
# In which ways peers may be fastest. Of SFT and DPO by TRL: how many examples are padded to one length, or packed.
TUNING = {"8 padded together": dict(packing=False, together=BATCH), "1 at a time": dict(packing=False, together=1),
          "packed, 1 row": dict(packing=True, together=1), "packed, 2 rows": dict(packing=True, together=2)}
LIKE_OURS = dict(bf16=False, precompute=True, together=1)
PREFERRING = {"bf16, 1 at a time": dict(LIKE_OURS, bf16=True), "fp32, 1 at a time": LIKE_OURS,
              "bf16, 8 padded together": dict(LIKE_OURS, bf16=True, together=BATCH),
              "bf16, reference in each step": dict(bf16=True, precompute=False, together=1)}
WRITING = {"batch 16": dict(batch=16), "batch 64": dict(batch=64), "one by one": dict(batch=1),
           "one by one, prompt lookup": dict(batch=1, lookup=DRAFT)}  # transformers' generation
ONE_BY_ONE = [words for words, way in WRITING.items() if way["batch"] == 1]


# ----------------------------------------------------------------------------------------------------------------
# Each measurement in its process


JOBS = {**peers.JOBS, **timed.JOBS}


def measure(kind, folder, device, peer=None, **job):
    """The figures of one of JOBS in a process of its own, a peer's under its Python; None where that fails,
    and says so."""
    (folder / "job.json").write_text(json.dumps({"device": device, **job}))
    command = [peer, peers.__file__] if kind in peers.JOBS else [sys.executable, timed.__file__]
    ended = subprocess.run([*command, kind, str(folder)], capture_output=True, text=True)
    if ended.returncode:
        said = last_words(ended)
        if kind not in peers.JOBS:
            raise UserError(f"{kind}: {said}")
        print(f"{kind}: failed under {peer}: {said}", file=sys.stderr)
        return None
    return json.loads(ended.stdout.strip().splitlines()[-1])


def last_words(ended):
    """Why a process failed."""
    return (ended.stderr.strip().splitlines() or ["it ended without a word"])[-1].removeprefix("error: ")


# ----------------------------------------------------------------------------------------------------------------
# What is measured


def widen(small, config):
    """A Llama of a larger shape that computes what `small` does: its new channels, heads and layers hold zeros.

    A norm averages over more channels, so its weight and epsilon shrink; a head keeps its rotation frequencies by
    spreading its channels; a score is divided by more, so queries grow; tokens that `small` lacks are as likely as its
    BOS. Norms of queries and keys take the size of these out again, so it stands in their weights instead."""
    s, more = small.config, config.hidden_size / small.config.hidden_size
    big = Llama(replace(config, rms_norm_eps=s.rms_norm_eps / more))
    size, spread, normed = s.hidden_size, config.head_dim // s.head_dim, s.model_type == "qwen3"
    grown = (spread / more, spread / more) if normed else (spread, 1)  # of queries and of keys, squared
    half = torch.arange(s.head_dim // 2) * spread
    channels = torch.cat([half, config.head_dim // 2 + half])
    channels = (torch.arange(s.num_attention_heads)[:, None] * config.head_dim + channels).flatten()
    share = s.num_attention_heads // s.num_key_value_heads

    def norm(wide, narrow):
        wide.weight[:size] = narrow.weight * more ** -0.5
    with torch.no_grad():
        for parameter in big.parameters():
            parameter.zero_()
        for wide, narrow in zip(big.model.layers, small.model.layers):
            norm(wide.input_layernorm, narrow.input_layernorm)
            norm(wide.post_attention_layernorm, narrow.post_attention_layernorm)
            wide.self_attn.q_proj.weight[channels, :size] = narrow.self_attn.q_proj.weight * grown[0] ** 0.5
            for name, growth in ("k_proj", grown[1]), ("v_proj", 1):
                heads = getattr(narrow.self_attn, name).weight.unflatten(0, (-1, s.head_dim)) * growth ** 0.5
                getattr(wide.self_attn, name).weight[channels, :size] = heads.repeat_interleave(share, 0).flatten(0, 1)
            if normed:
                wide.self_attn.q_norm.weight[channels[:s.head_dim]] = narrow.self_attn.q_norm.weight
                wide.self_attn.k_norm.weight[channels[:s.head_dim]] = narrow.self_attn.k_norm.weight * spread ** -0.5
            wide.self_attn.o_proj.weight[:size, channels] = narrow.self_attn.o_proj.weight
            for name in ("gate_proj", "up_proj", "down_proj"):
                weight = getattr(narrow.mlp, name).weight
                getattr(wide.mlp, name).weight[:weight.size(0), :weight.size(1)] = weight
        norm(big.model.norm, small.model.norm)
        big.model.embed_tokens.weight[:s.vocab_size, :size] = small.model.embed_tokens.weight
        big.lm_head.weight[:, :size] = small.lm_head.weight[s.bos_token_id]
        big.lm_head.weight[:s.vocab_size, :size] = small.lm_head.weight
    return big


def aligners(folder, aligner):
    """[(label, folder), ...] of the aligner as it is and widened, as whole models."""
    small = checkpoint.load(aligner)
    config = replace(small.config, **SIZE, num_key_value_heads=None, head_dim=None, tie_word_embeddings=False)
    fits = all(value <= getattr(config, name) for name, value in vars(small.config).items() if name in SIZE)
    plain = config.model_type in ("llama", "qwen3") and not config.attention_bias and not config.mlp_bias
    if not fits or config.head_dim % small.config.head_dim or not plain:
        raise UserError(f"{aligner}: cannot be widened to 40M parameters; give an aligner that `make train` wrote")
    checkpoint.save(small, folder / "narrow")
    checkpoint.save(widen(small, config), folder / "wide")
    millions = sum(p.numel() for p in small.parameters()) / 1e6
    return [(f"{millions:.1f}M", folder / "narrow"), ("40M", folder / "wide")]


def start(folder, model, tokenizer):
    """(name, Config, tokenizer) of the Llama to train, written to a folder: a given one, or a 40M one from scratch."""
    llama = checkpoint.load(model) if model else Llama(Config(**SIZE))
    checkpoint.save(llama, folder)
    if model or tokenizer:
        words = checkpoint.load_tokenizer(Path(tokenizer).parent if tokenizer else model, llama)
    else:
        words = toy.train_tokenizer(list(toy.pretraining_texts(500, 0)))
    words.save(str(folder / "tokenizer.json"))
    return Path(model).resolve().name if model else "40M", llama.config, words


def completions(pairs, count):
    """Rows to fine-tune on, of a file or about the embedded world."""
    if pairs:
        return formats.read_completions(pairs)
    texts = toy.pretraining_texts(80 * count, 0)
    return ({"prompt": "", "completion": "\n\n".join(some)} for some in zip(*[texts] * 16))


def preferences(pairs, count):
    """Pairs of a file or of the embedded world, the better response first; those as good as each other are left out."""
    rows = formats.read_preferences(pairs) if pairs else formats.compared(toy.rated(count, 0), "helpful")
    for row in rows:
        if row["p_a"] != 0.5:
            texts = [row["response_a"], row["response_b"]][::1 if row["p_a"] > 0.5 else -1]
            yield formats.preference(row["prompt"], *texts, row["principle"], 1.0)


def training_batches(tokenizer, config, read, pairs, steps):
    """Batches of documents [(ids, start of what is learned), ...] of BATCH examples: some to warm up, then those that
    are timed. read: completions or preferences; pairs: their file, or None: the embedded world."""
    wanted, longest = BATCH * (WARM + steps), min(MAX_TOKENS, config.max_position_embeddings)
    rows = itertools.islice(read(pairs, wanted), 20 * wanted)
    stop = config.stop_ids[0] if config.stop_ids else None
    examples, _ = data.encode_examples(tokenizer, rows, config.bos_token_id, stop, longest)
    if len(examples) < wanted:
        raise UserError(f"{pairs or 'the embedded world'}: gives {len(examples)} of {wanted} examples of at most "
                        f"{longest} tokens; give more, or fewer --steps")
    return [[(list(document.ids), document.start) for example in examples[first:first + BATCH]
             for document in example.documents] for first in range(0, wanted, BATCH)]


def random_batches(words, lengths, count):
    """Batches of a document of each of the lengths, all of it but its first token to be learned."""
    generator = torch.Generator().manual_seed(0)
    return [[(torch.randint(words, (length,), generator=generator).tolist(), 0) for length in lengths]
            for _ in range(count)]


def embedded_prompts(writer, count):
    """Prompts that ask the aligner to edit answers of the embedded world, and those answers' token ids."""
    rng, found = random.Random("bench"), []
    while len(found) < count:
        prompt = toy.question(rng)[0]
        answer = toy.answer(rng.choice(["verbose", "toxic"]), prompt, rng)
        for item in requests("bench", [prompt], [answer], len(found)):
            text, context = data.aligner_prompt(prompt, answer, item["objectives"])
            found.append((writer.encode(text, NEW_TOKENS, context), data.text_ids(writer.tokenizer, [f" {answer}"])[0]))
    return found[:count]


def answer_prompts(writer, answers, count):
    """Prompts to edit the answers of a file, evenly spread over it; those that do not fit are left out."""
    if not answers:
        return [prompt for prompt, _ in embedded_prompts(writer, count)]
    objectives, found = data.find_objectives(["harmless", "helpful"]), []
    for row in formats.read_rated(answers, objective="chosen"):
        for response in row["responses"]:
            text, context = data.aligner_prompt(row["prompt"], response["text"], objectives)
            found.append(writer.encode(text, NEW_TOKENS, context))
    found = [prompt for prompt in found if prompt is not None]
    if not found:
        raise UserError(f"{answers}: has no answer that fits the aligner's context; give another --answers")
    return found[::max(1, len(found) // count)][:count]


def kept(answer, edit):
    """Share of an answer's tokens that its edit keeps, in order."""
    matcher = difflib.SequenceMatcher(None, answer, edit, autojunk=False)
    return sum(block.size for block in matcher.get_matching_blocks()) / max(1, len(answer))


def flops(config, lengths, targets, frozen=False):
    """Model FLOPs of a training step: 6 per weight and token, the head for targets only, causal attention. Of frozen
    weights 4, for they get no gradients; what their adapters add, a hundredth or less, is not counted."""
    block = config.hidden_size * (2 * config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim \
        + 3 * config.hidden_size * config.intermediate_size
    inner = config.num_attention_heads * config.head_dim
    weights = config.num_hidden_layers * block * sum(lengths) + config.vocab_size * config.hidden_size * targets
    return (4 if frozen else 6) * weights + 6 * config.num_hidden_layers * inner * sum(n * n for n in lengths)


# ----------------------------------------------------------------------------------------------------------------
# The parts, each a few lines of the table


TABLE = {"lines": []}  # what was printed so far; "path": where it is kept too, if anywhere


def print_line(what, ours=None, peer=None, note="", decimals=0, ratio=None, failed=False):
    """A line of the table, with how many times the peer's figure ours is, where that is not given."""
    TABLE["lines"].append({"what": what, "ours": ours, "peer": peer, "note": note, "failed": failed})
    if "path" in TABLE:
        write_text(TABLE["path"], json.dumps({**TABLE["about"], "lines": TABLE["lines"]}, indent=1) + "\n")
    figures = ["" if figure is None else f"{figure:,.{decimals}f}" for figure in (ours, peer)]
    ratio = f"{ratio or ours / peer:.2f} x" if peer else ""
    print(f"{what:<46}{figures[0]:>14}{figures[1]:>14}{ratio:>9}  {note}".rstrip(), flush=True)


@contextlib.contextmanager
def going_on(what):
    """What fails in here, for want of memory, say, is told on a line, and the next part goes on."""
    try:
        yield
    except UserError as error:
        print_line(what, note=f"failed: {error}", failed=True)


def compare(what, rate, ours, theirs, told=lambda words, run: words, decimals=0):
    """A line of two sides' medians over TURNS turns, with the median of the turns' ratios and how far they spread. A
    side is {words: function that measures, or gives None where that fails}: of several ways, the first turn finds the
    fastest by rate(run), and the others take that. told(words, run) says more of ours."""
    first = [{words: run for words, measured in side.items() if (run := measured())} for side in (ours, theirs)]
    best = [max(runs, key=lambda words: rate(runs[words]), default=None) for runs in first]
    turns, alone = [[rate(runs[words]) for runs, words in zip(first, best) if runs]], best[1] is None
    for _ in range(0 if alone else TURNS - 1):
        runs = [side[words]() for side, words in zip((ours, theirs), best)]
        turns += [[rate(run) for run in runs]] if all(runs) else []
    ratios, notes = [] if alone else [one / other for one, other in turns], [told(best[0], first[0][best[0]])]
    if ratios:
        each = ", ".join(f"{words}: {rate(run):,.{decimals}f}" for words, run in first[1].items())
        notes += [f"{len(ratios)} turns, {min(ratios):.2f} to {max(ratios):.2f} x",
                  f"the peer's best is {best[1]}" + (f" ({each})" if len(first[1]) > 1 else "")]
    medians = [statistics.median(side) for side in zip(*turns)]
    print_line(what, *medians, note="; ".join(filter(None, notes)), decimals=decimals,
               ratio=statistics.median(ratios) if ratios else None)


def utilisation(config, batches, ours, rates, frozen=False):
    """Of the steps that were timed, in words."""
    timed = [example for batch in batches[WARM:] for example in batch]
    targets = sum(len(ids) - max(start, 1) for ids, start in timed)
    work = flops(config, [len(ids) for ids, _ in timed], targets, frozen)
    return f"{100 * work / ours['seconds'] / rates['flops']:.0f} % of the matrix product; {ours['peak']:.1f} GiB"


def large_size(name, device):
    """(label, size) of a large model; where there is no GPU, of the 40M one, which takes the same path."""
    return (name, LARGE[name]) if device == "cuda" else ("40M", SIZE)


def dtype_of(device):
    return "bfloat16" if computes_bf16(device) else "float32"


def bench_machine(folder, device):
    rates = measure("machine", folder, device)
    print(f"{'':<46}{'ours':>14}{'peer':>14}{'ratio':>9}")
    print_line(f"machine: {dtype_of(device)} matrix product, GFLOP/s", rates["flops"] / 1e9)
    print_line("machine: copy, GB/s", rates["bytes"] / 1e9, decimals=1)
    return rates


def bench_train(folder, device, rates, peer, steps, pairs, tokenizer, model):
    name, config, tokenizer = start(folder, model, tokenizer)
    batches = training_batches(tokenizer, config, completions, pairs, steps)

    def ours(**options):
        return measure("train_ours", folder, device, batches=batches, **options)

    def theirs(way):
        return measure("train_trl", folder, device, peer, batches=batches, eos=end_word(tokenizer, config), **way)
    compare(f"train: SFT, {name}, real tokens/s", speed, {"": ours},
            {words: partial(theirs, way) for words, way in TUNING.items() if peer},
            lambda words, run: utilisation(config, batches, run, rates))
    compare("train: the same, compiled, against not", speed, {"": partial(ours, compile=True)}, {"not compiled": ours})


def end_word(tokenizer, config):
    """What TRL pads with: masked, so any word would do."""
    return tokenizer.id_to_token(config.stop_ids[0] if config.stop_ids else 0)


def speed(run):
    return run["tokens"] / run["seconds"]


def bench_dpo(folder, device, peer, steps, pairs, tokenizer, model):
    """The losses of the first steps in fp32, which begin at log 2 and agree while log-probabilities, masks and updates
    do; then the speed, in turns."""
    name, config, tokenizer = start(folder, model, tokenizer)
    batches = training_batches(tokenizer, config, preferences, pairs, steps)

    def ours(precision="auto"):
        return measure("train_ours", folder, device, batches=batches, method="dpo", precision=precision, weight_decay=0,
                       **DPO)

    def theirs(way):
        return measure("dpo_trl", folder, device, peer, batches=batches, eos=end_word(tokenizer, config), **DPO, **way)
    if peer and (run := theirs(LIKE_OURS)):
        print_losses(f"dpo: {name}, fp32", ours("fp32")["losses"], run["losses"])
    compare(f"dpo: {name}, real tokens/s", speed, {"": ours},
            {words: partial(theirs, way) for words, way in PREFERRING.items() if peer},
            lambda words, run: "the reference once")


def print_losses(what, ours, theirs):
    """A line for each of the first steps; how far apart the two are, of all."""
    apart = max(abs(one - other) for one, other in zip(ours, theirs, strict=True))
    for step, both in enumerate(zip(ours[:4], theirs), 1):
        note = f"steps 1 to {len(ours)}: at most {apart:.0e} apart" if step == 1 else ""
        print_line(f"{what}, loss of step {step}", *both, note, decimals=5)


def bench_large(folder, device, rates, steps, peer=None):
    """Speed with 8 rows of 2,048 packed tokens at a time, of LoRA with 4; TRL packs examples into such rows too. Memory
    with one, and with two of them in a step: the second comes when gradients are there already, as most do in training.
    """
    words = toy.train_tokenizer(["Hello there"])
    words.save(str(folder / "tokenizer.json"))  # TRL wants one, and is given token ids
    row, rows = [700, 1348], 8 if device == "cuda" else 2
    lean = dict(micro_tokens=2048, checkpoint_activations=True)
    for what, name, lengths, options in (
            ("full, {}", "1.1B", row * rows, dict(micro_tokens=2048 * rows)),
            ("full, {}, of many lengths", "1.1B", list(range(10, 1034, 272 // rows)), dict(micro_tokens=2048 * rows)),
            ("LoRA of rank 16, {}", "7B", row * (rows // 2), dict(micro_tokens=1024 * rows, lora_rank=16)),
            ("full, {}, lean", "1.1B", [*row, 2048], dict(lean, bf16_moments=True)),
            ("LoRA of rank 16, {}, lean", "7B", [*row, 2048], dict(lean, lora_rank=16))):
        label, size = large_size(name, device)
        what = f"large: {what.format(label)}, " + ("GiB" if "lean" in what else "real tokens/s")
        batches = random_batches(size["vocab_size"], lengths, WARM + steps)
        with going_on(what):
            ours = measure("train_large", folder, device, batches=batches, config=size, options=options)
            if "lean" in what:
                print_line(what, ours["peak"], note=f"{speed(ours):,.0f} tokens/s", decimals=1)
                continue
            rank = options.get("lora_rank", 0)
            job = dict(config=size, rank=rank, packing=True, together=options["micro_tokens"] // 2048, longest=2048)
            theirs = measure("train_trl", folder, device, peer, batches=batches, eos="</s>", **job) if peer else None
            print_line(what, speed(ours), speed(theirs) if theirs else None,
                       utilisation(Config(**size), batches, ours, rates, bool(rank)))


def bench_align(folder, device, peer, aligner, answers, count):
    prompts = answer_prompts(Writer(aligner, device), answers, count)
    job = dict(prompts=prompts, dtype=dtype_of(device), passes=1)
    for label, where in aligners(folder, aligner):
        check_same(f"align: {label}", where, device, peer, prompts[:8])
        compare(f"align: {label}, answers/s", lambda run: len(prompts) / run["seconds"],
                {f"batch {batch}": partial(measure, "align_ours", where, device, batch=batch, draft=DRAFT, **job)
                 for batch in (32, 64)},
                {words: partial(measure, "align_transformers", where, device, peer, **way, **job)
                 for words, way in WRITING.items() if peer},
                lambda words, run: f"{words}, {100 * run['copied']:.0f} % copied", decimals=2)


def check_same(what, where, device, peer, prompts):
    """In fp32, both write the same: on a line of its own, how many texts are equal token for token, whether the peer
    guesses or not."""
    job = dict(prompts=prompts, dtype="float32", passes=1)
    theirs = {words: run for words in ONE_BY_ONE if peer and (
        run := measure("align_transformers", where, device, peer, **WRITING[words], **job))}
    ours = measure("align_ours", where, device, batch=len(prompts), draft=DRAFT, **job) if theirs else None
    for words, run in theirs.items():
        same = sum(a == b for a, b in zip(ours["written"], run["written"], strict=True))
        print_line(f"{what}, fp32, the same text", same, len(prompts), words)


def bench_copy(folder, device, peer, aligner):
    """Edits that keep 65 to 75 % of their input; one sequence at a time beside the peer, several beside ourselves."""
    found = embedded_prompts(Writer(aligner, "cpu"), 600)
    sizes = aligners(folder, aligner)

    def edits(where, prompts, batch, draft, passes=1):
        return measure("align_ours", where, device, prompts=prompts, dtype=dtype_of(device), batch=batch, passes=passes,
                       draft=draft)

    def pace(run):
        return sum(map(len, run["written"])) / run["seconds"]

    def told(words, run):
        return f"{100 * run['copied']:.0f} % copied"
    written = edits(sizes[0][1], [prompt for prompt, _ in found], 64, DRAFT)["written"]
    chosen = [prompt for (prompt, answer), edit in zip(found, written) if 0.65 <= kept(answer, edit) <= 0.75]
    if not chosen:
        raise UserError(f"{aligner}: writes no edit that keeps 65 to 75 % of its input; give another --aligner")
    for label, where in sizes:
        ours = {draft: partial(edits, where, chosen[:16], 1, draft, 3) for draft in (DRAFT, 0)}
        theirs = {words: partial(measure, "align_transformers", where, device, peer, prompts=chosen[:16], passes=3,
                                 dtype=dtype_of(device), **WRITING[words])
                  for words in ONE_BY_ONE if peer}
        compare(f"copy: {label}, one sequence, new tokens/s", pace, {"": ours[DRAFT]}, theirs, told)
        compare(f"copy: {label}, one sequence, without copying", pace, {"": ours[0]},
                {words: run for words, run in theirs.items() if "lookup" not in words}, told)
        ours = {draft: partial(edits, where, chosen[:64], 16, draft) for draft in (DRAFT, 0)}
        compare(f"copy: {label}, batch 16, against not copying", pace, {"": ours[DRAFT]}, {"ours": ours[0]}, told)


def bench_decode(folder, device, rates, peer=None):
    label, size = large_size("7B", device)
    for batch in (1, 64) if device == "cuda" else (1, 4):
        what = f"decode: {label}, {'one sequence' if batch == 1 else f'{batch} at a time'}, tokens/s"
        job = dict(config=size, dtype=dtype_of(device), batch=batch)
        with going_on(what):
            ours = measure("decode", folder, device, **job)
            theirs = measure("decode_transformers", folder, device, peer, **job) if peer else None
            rate = ours["bytes"] / ours["seconds"]
            print_line(what, batch / ours["seconds"], batch / theirs["seconds"] if theirs else None,
                       f"{rate / 1e9:.1f} GB/s of weights and keys, {100 * rate / rates['bytes']:.0f} % of the copy")


def bench_ppo(folder, device, rates):
    """An iteration with ppo.py's own numbers on a GPU. What the others say of the responses is in "scoring": the policy
    before it learns, its reference, the value head."""
    label, size = large_size("1.1B", device)
    job = dict(rollouts=128, minibatch=32, max_new_tokens=128) if device == "cuda" else \
        dict(rollouts=4, minibatch=2, max_new_tokens=8)
    ours = measure("ppo_ours", folder, device, config=size, options=job)
    took, epochs = ours["seconds"], ours["epochs"]
    work = epochs * flops(Config(**size), ours["lengths"], ours["actions"]) / took["learning"] / rates["flops"]
    parts = ", ".join(f"{part} {seconds:.2f}" for part, seconds in took.items())
    print_line(f"ppo: {label}, seconds of an iteration", sum(took.values()), decimals=2, note=f"{parts} "
               f"({100 * work:.0f} % of the matrix product); {ours['actions'] / took['answering']:,.0f} tokens/s "
               f"written; {ours['peak']:.1f} GiB")


def bench_story(folder, device, aligner):
    """The whole of `make train`, in a folder that is new; its aligner stays."""
    began, out = time.perf_counter(), folder / "story"
    command = [sys.executable, ROOT / "story.py", "--out", out, "--device", device]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        raise UserError(f"story.py: {last_words(ended)}")
    print_line("story: seconds of make train", time.perf_counter() - began, decimals=1)
    if not holds_model(aligner):
        shutil.copytree(out / "aligner", aligner, dirs_exist_ok=True)


def bench_tests(folder, device):
    """Tests that need a GPU, and so are skipped on any other device."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "tests"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    said = (ended.stdout.strip().splitlines() or [last_words(ended)])[-1]
    if ended.returncode:
        print(ended.stdout[-10000:], file=sys.stderr)
        raise UserError(said)
    print_line("tests: passed", int((re.findall(r"(\d+) passed", said) or [0])[0]), note=said)


# ----------------------------------------------------------------------------------------------------------------
# Command line


PARTS = {"train": bench_train, "dpo": bench_dpo, "large": bench_large, "align": bench_align, "copy": bench_copy,
         "decode": bench_decode, "ppo": bench_ppo, "story": bench_story, "tests": bench_tests}
ON_A_GPU = ["tests", "large", "decode", "ppo", "story", "copy"]  # in this order: what is cut off is the least


def arguments(argv=None):
    parser, names = make_parser(__doc__), ["machine", *PARTS, "gpu"]
    add = parser.add_argument
    add("parts", nargs="*", metavar="PART", help=f"what to time: {' '.join(names)}")
    add("--peer", metavar="PYTHON", help="a Python with torch, transformers, datasets and trl; without it, only ours")
    add("--aligner", metavar="FOLDER", help="default: what `make train` wrote; of gpu, runs/gpu-aligner")
    add("--model", metavar="FOLDER", help="the Llama that train and dpo start from (default: 40M, from scratch)")
    add("--pairs", metavar="FILE", help="training data, as train.py reads it (default: the embedded world's)")
    add("--tokenizer", metavar="FILE", help="the tokenizer.json for --pairs (default: that of --model)")
    add("--answers", metavar="FILE", help="answers to edit, as align.py reads them (default: the embedded world's)")
    add("--steps", type=number(int, 1), default=4, metavar="N", help="training steps that are timed (default 4)")
    add("--count", type=number(int, 1), default=256, metavar="N", help="answers to edit (default 256)")
    add("--out", metavar="FILE", help="where the table is kept as JSON too, line by line (gpu: runs/gpu.json)")
    add("--device", help="cpu, cuda, ... (default: cuda where there is one)")
    args = parser.parse_args(argv)
    if unknown := set(args.parts) - set(names):
        parser.error(f"no such part: {' '.join(unknown)}; there are {' '.join(names)}")
    return args


def parts_wanted(parts, aligner):
    """The names of PARTS that were asked for; without any, those that go without an aligner where there is none."""
    parts = [*parts, *ON_A_GPU] if "gpu" in parts else parts
    order = [*ON_A_GPU, *(name for name in PARTS if name not in ON_A_GPU)] if "story" in parts else list(PARTS)
    usual = [name for name in PARTS if name not in ("ppo", "story", "tests")]
    wanted, edits = [name for name in order if name in (parts or usual)], {"align", "copy"}
    if not edits & set(wanted) or holds_model(aligner) or "story" in wanted:
        return wanted
    if parts:
        raise UserError(f"{aligner}: no aligner there; run `make train` first, or give --aligner")
    print(f"{aligner}: no aligner there, so no align and no copy; `make train` makes one", file=sys.stderr)
    return [name for name in wanted if name not in edits]


def holds_model(folder):
    return any((Path(folder) / name).exists() for name in MODEL)


def main():
    args = arguments()
    device, gpu = device_named(args.device).type, "gpu" in args.parts
    if gpu and device != "cuda" and not args.device:
        raise UserError("no GPU here that PyTorch can use, and that is what this measures; `make bench` measures a CPU")
    aligner = args.aligner or ("runs/gpu-aligner" if gpu else "runs/story/aligner")
    parts = parts_wanted(args.parts, aligner)
    uncut = args.pairs and not (args.tokenizer or args.model)
    if uncut or args.tokenizer and Path(args.tokenizer).name != "tokenizer.json":
        raise UserError("--pairs: give --model, or --tokenizer, the tokenizer.json that its texts are to be cut with")
    if path := args.out or ("runs/gpu.json" if gpu else None):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        TABLE.update(path=path, about={**circumstances(), "device": name_of(device)})
    with tempfile.TemporaryDirectory() as folder:
        rates = bench_machine(Path(folder), device)
    training = dict(peer=args.peer, steps=args.steps, pairs=args.pairs, tokenizer=args.tokenizer, model=args.model)
    given = {
        "train": dict(rates=rates, **training),
        "dpo": training,
        "large": dict(rates=rates, steps=args.steps, peer=args.peer),
        "align": dict(peer=args.peer, aligner=aligner, answers=args.answers, count=args.count),
        "copy": dict(peer=args.peer, aligner=aligner),
        "decode": dict(rates=rates, peer=args.peer),
        "ppo": dict(rates=rates),
        "story": dict(aligner=aligner),
        "tests": {},
    }
    for name in parts:
        with going_on(name), tempfile.TemporaryDirectory() as folder:
            PARTS[name](Path(folder), device, **given[name])
    if failed := [line["what"] for line in TABLE["lines"] if line["failed"]]:
        raise UserError(f"{len(failed)} of {len(TABLE['lines'])} lines failed: {'; '.join(failed)}")


def name_of(device):
    return torch.cuda.get_device_name() if device == "cuda" else device


if __name__ == "__main__":
    cli(main)
