"""How fast is it, beside its peers? Times our path and a peer's on the same model, data, dtype and machine in one run.

    machine   a bf16 matrix product and a copy: what the other figures are measured against
    train     supervised fine-tuning of a 40M Llama: train.py's step against TRL's SFTTrainer
    large     on a GPU, 1.1B and 7B Llamas, else the 40M one: utilisation of full fine-tuning, memory of it and of LoRA
    align     greedy edits of real answers: align.py's generation against `transformers` at its best batch size
    copy      edits that keep 65 to 75 % of their input: guessing tokens from the prompt against not guessing
    decode    one sequence without copying, 7B on a GPU, else 40M: weights read per second against the copy
    kernels   attention to a cache, prefill, attention in training: each against the plain way to the same result
    adapters  twelve preference models, adapters of one base, scoring: side by side against one after another

Every measurement is a process of its own, so that its peak memory is its own. The aligner is one that `make train`
wrote, as it is and widened to 40M parameters: the same function at that size's cost (see `widen`).
"""
import argparse
import functools
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SIZE = dict(vocab_size=32000, hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8)
LARGE = {  # of TinyLlama and of Llama 2
    "1.1B": dict(vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22,
                 num_attention_heads=32, num_key_value_heads=4),
    "7B": dict(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
               num_attention_heads=32),
}
NEW_TOKENS = 256
KERNELS = dict(config=SIZE, cache=(16, 316), prompts=list(range(224, 32, -6)), documents=(64, 27), rows=(8, 512),
               least=1.0)
ADAPTERS = dict(config=SIZE, adapters=12, rank=8, tokens=100, answers=(1, 4, 16), calls=5)
PARTS = ["machine", "train", "large", "align", "copy", "decode", "kernels", "adapters"]
COLUMNS = "{:<46}{:>14}{:>14}{:>9}  {}"


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], epilog=__doc__.split("\n", 2)[2],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("parts", nargs="*", metavar="PART", help=f"what to time: {' '.join(PARTS)} (default: all)")
    add("--peer", metavar="PYTHON", help="a Python with torch, transformers, datasets and trl; without it, only ours")
    add("--aligner", default="runs/story/aligner", metavar="FOLDER", help="default: what `make train` wrote")
    add("--pairs", metavar="FILE", help="training data, as train.py reads it (default: texts of the embedded world)")
    add("--answers", metavar="FILE", help="answers to edit, as align.py reads them (default: the embedded world's)")
    add("--tokenizer", metavar="FILE", help="tokenizer.json for --pairs (default: the aligner's)")
    add("--steps", type=int, default=4, metavar="N", help="training steps that are timed (default 4)")
    add("--count", type=int, default=64, metavar="N", help="answers to edit (default 64)")
    add("--max-tokens", type=int, default=1024, metavar="N", help="longest training example (default 1024)")
    add("--device", default=None, help="cpu, cuda, ... (default: cuda where there is one)")
    add("--job", help=argparse.SUPPRESS)  # how bench.py starts itself: one measurement
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"no such part: {' '.join(unknown)}; there are {' '.join(PARTS)}")
    if not args.parts and not args.job and not (Path(args.aligner) / "config.json").exists():
        print(f"{args.aligner}: no aligner there, so no align and no copy; `make train` makes one", file=sys.stderr)
        args.parts = ["machine", "train", "large", "decode", "kernels", "adapters"]
    args.parts = args.parts or PARTS
    return args


if __name__ == "__main__":
    ARGS = arguments()  # --help and mistyped flags are answered before the seconds that importing torch takes

import torch  # noqa: E402

# ----------------------------------------------------------------------------------------------------------------
# Measurements. Each is a process: it reads job.json in a folder and prints one JSON object.


def sync(device):
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(function, device, least=0.5):
    """Seconds per call, over enough calls to last `least` seconds, after two to warm up."""
    for _ in range(2):
        function()
    sync(device)
    began, calls = time.perf_counter(), 0
    while calls < 3 or time.perf_counter() - began < least:
        function()
        sync(device)
        calls += 1
    return (time.perf_counter() - began) / calls


def once(function, device):
    """Seconds of one call."""
    began = time.perf_counter()
    function()
    sync(device)
    return time.perf_counter() - began


def peak(device):
    """Peak memory of this process in GiB: the device's, or resident."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def machine(device):
    """bf16 FLOP/s of a matrix product, the best of three shapes; bytes/s of a copy, those read and those written."""
    rates = []
    shapes = (4096, 512, 1376), (4096, 2048, 2048), (8192, 8192, 8192)
    for rows, inner, columns in shapes[:3 if device == "cuda" else 2]:
        a = torch.randn(rows, inner, device=device).bfloat16()
        b = torch.randn(columns, inner, device=device).bfloat16()
        rates.append(2 * rows * inner * columns / seconds(lambda: a @ b.T, device))
    source = torch.randn(2**28 if device == "cuda" else 2**26, device=device)
    target = torch.empty_like(source)
    return {"flops": max(rates), "bytes": 2 * source.nbytes / seconds(lambda: target.copy_(source), device)}


def fresh(size, dtype, device):
    """A Llama of that size, its weights small noise made where they stay: at no time are they there twice."""
    import model
    with torch.device("meta"):
        llama = model.Llama(model.Config(**size)).to(dtype)
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


def train_ours(job, folder, device):
    import model
    import train
    llama = model.Llama.from_pretrained(folder, device=device)
    return timed_steps(job, llama, train.Options(lr=1e-5, micro_tokens=4096), device)


def large(job, folder, device):
    """Weights as train.start_from loads them: in fp32, but for LoRA's frozen ones, which a GPU holds in bf16."""
    import model
    import train
    options = train.Options(**job["options"])
    half = options.lora_rank and device == "cuda" and model.computes_bf16(device)
    llama = fresh(job["config"], torch.bfloat16 if half else torch.float32, device)
    if options.lora_rank:
        llama = model.add_lora(llama, options.lora_rank, folder)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    return timed_steps(job, llama, options, device)


def timed_steps(job, llama, options, device):
    import model
    import train
    llama.checkpoint_activations = options.checkpoint_activations
    if options.compile:
        model.compile_blocks(llama)
    optimizer = train.make_optimizer(llama, options)
    times = [once(lambda: training_step(llama, optimizer, options, examples), device) for examples in job["batches"]]
    return timed_training(job, times, device)


def training_step(llama, optimizer, options, examples):
    """The step in train.train."""
    import train
    batches = list(train.pack(examples, options.micro_tokens, llama.device))
    count = sum(len(batch.targets) for batch in batches)
    for batch in batches:
        with train.autocast(llama.device, options):
            loss = train.cross_entropy(llama, batch) / count
        loss.backward()
    torch.nn.utils.clip_grad_norm_(train.trained(llama).values(), options.clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def train_trl(job, folder, device):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer
    times = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.began = time.perf_counter()

        def on_step_end(self, *_, **__):
            sync(device)
            times.append(time.perf_counter() - self.began)
    rows = [{"input_ids": ids, "completion_mask": [0] * n_prompt + [1] * (len(ids) - n_prompt)}
            for batch in job["batches"] for ids, n_prompt in batch]
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=f"{folder}/tokenizer.json", eos_token=job["eos"],
                                        pad_token=job["eos"])
    config = SFTConfig(output_dir=f"{folder}/trl", per_device_train_batch_size=len(job["batches"][0]), bf16=True,
                       max_length=job["max_tokens"], max_steps=len(job["batches"]), use_cpu=device == "cpu",
                       gradient_checkpointing=False, report_to="none", save_strategy="no", disable_tqdm=True,
                       train_sampling_strategy="sequential", learning_rate=1e-5)
    llama = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    SFTTrainer(llama, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
               callbacks=[Clock()]).train()
    return timed_training(job, times, device)


def timed_training(job, times, device):
    """The first two steps warm up."""
    tokens = sum(len(ids) for batch in job["batches"][2:] for ids, _ in batch)
    return {"tokens": tokens, "seconds": sum(times[2:]), "peak": peak(device)}


def align_ours(job, folder, device):
    import model
    llama = model.Llama.from_pretrained(folder, getattr(torch, job["dtype"]), device)
    model.prepack(llama)

    def edit(prompts):
        return model.stream(llama, prompts, job["new_tokens"], job["batch"], stop_ids=llama.config.stop_ids,
                            draft=job["draft"])
    return timed_edits(job, edit, llama.tally, device)


def align_transformers(job, folder, device):
    from transformers import AutoModelForCausalLM
    llama = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, job["dtype"])).to(device).eval()
    stop = llama.config.eos_token_id

    def edit(prompts):
        for start in range(0, len(prompts), job["batch"]):
            yield from enumerate(batch_of(prompts[start:start + job["batch"]]), start)

    def batch_of(prompts):
        longest = max(map(len, prompts))
        ids = torch.tensor([[stop] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
        new = llama.generate(input_ids=ids, attention_mask=mask, max_new_tokens=job["new_tokens"], do_sample=False,
                             pad_token_id=stop)[:, longest:].tolist()
        return [row[:row.index(stop)] if stop in row else row for row in new]
    return timed_edits(job, edit, {}, device)


def timed_edits(job, edit, tally, device):
    """All prompts, the longest first, `batch` at a time, after a first few to warm up. The faster of `passes` counts."""
    order = sorted(range(len(job["prompts"])), key=lambda i: -len(job["prompts"][i]))
    prompts, times = [job["prompts"][i] for i in order], []
    dict(edit(prompts[:job["batch"]]))
    for _ in range(job["passes"]):
        began = time.perf_counter()
        written = {order[place]: new for place, new in edit(prompts)}
        sync(device)
        times.append(time.perf_counter() - began)
    return {"seconds": min(times), "peak": peak(device), "written": [written[i] for i in range(len(order))],
            "copied": tally["copied"] / max(1, tally["written"]) if tally else 0.0}


def decode(job, folder, device):
    """Seconds for each further token of one sequence, and the bytes of weights that it reads: all, but of the embedding
    one row. What comes before the first 16 tokens is in both of the times that are subtracted."""
    import model
    llama = fresh(job["config"], getattr(torch, job["dtype"]), device)
    read = sum(p.nbytes for name, p in llama.named_parameters() if "embed" not in name)
    model.prepack(llama)
    if device == "cuda":
        model.compile_blocks(llama)

    def write(count):
        return once(lambda: model.generate(llama, [[5] * 128], count, stop_ids=(), draft=0), device)
    write(16 + 96)
    longer, shorter = zip(*[(write(16 + 96), write(16)) for _ in range(3)])
    return {"seconds": (min(longer) - min(shorter)) / 96, "bytes": read}


def kernels_of(job, device):
    """Yield (what, what the plain way is, our way, the plain way): the ways are functions that give the same."""
    import model
    config, kind, kernel = model.Config(**job["config"]), getattr(torch, job["dtype"]), "PyTorch's kernel"
    heads, generator = (config.num_attention_heads, config.head_dim), torch.Generator().manual_seed(0)

    def noise(*shape):
        return torch.randn(shape, generator=generator).to(device, kind)
    rows, tokens = job["cache"]
    room = -(-tokens // 64) * 64  # as model.Cache makes it
    q, block = noise(rows, 1, *heads), noise(2, rows, heads[0], 2 * room, heads[1])
    hidden = (torch.arange(room, device=device) >= tokens).expand(rows, 1, 1, room)
    hide = torch.zeros(hidden.shape, dtype=kind, device=device).masked_fill(hidden, float("-inf"))
    for where, (k, v) in (("", block[..., :room, :].contiguous()), (" in a larger block", block[..., :room, :])):
        yield (f"cache of {rows} x {tokens}{where}", kernel,
               lambda: model.cached_attention(q[:, 0] * heads[1] ** -0.5, k, v, hide),
               lambda: model.sdpa(q, k.transpose(1, 2), v.transpose(1, 2), attn_mask=~hidden)[:, 0])

    llama, count = model.Llama(config).to(device, kind).requires_grad_(False), len(job["prompts"])
    ids = torch.randint(config.vocab_size, (count, max(job["prompts"])), generator=generator).to(device)
    prompts = [row[:length].tolist() for row, length in zip(ids, job["prompts"])]
    ends = torch.arange(count, device=device), torch.tensor(job["prompts"], device=device) - 1
    yield (f"prefill, {sum(job['prompts']):,} tokens", f"{count} rows padded to {len(ids[0])}",
           lambda: model.prefill(llama, model.Cache(config, count, kind, device), prompts),
           lambda: llama.lm_head(llama.hidden(ids, model.Causal(ids))[ends]))

    def train(attend, x):
        y = attend(*x)
        return y, *torch.autograd.grad(y, x, grad_outputs=x[0].detach())
    rows, tokens = job["documents"]
    packed, apart = (model.Packed([tokens] * rows, device) for _ in range(2))
    alone = model.groups_of([tokens], device, apart=True)[0][2:]
    apart.groups = [(start, start + tokens, *alone) for start in range(0, rows * tokens, tokens)]
    x = [noise(1, rows * tokens, *heads).requires_grad_() for _ in "qkv"]
    yield (f"training, {rows} documents of {tokens}", "one document at a time",
           lambda: train(functools.partial(packed, 0), x), lambda: train(functools.partial(apart, 0), x))
    rows, tokens = job["rows"]
    x = [noise(rows, tokens, *heads).requires_grad_() for _ in "qkv"]
    yield (f"training, {rows} x {tokens}", kernel, lambda: train(model.causal_attention, x),
           lambda: train(functools.partial(model.sdpa, is_causal=True), x))


def kernels(job, folder, device):
    """[(what, what the plain way is, seconds of our way, of the plain way), ...]: the fastest of calls in turn."""
    found = []
    for what, plain, *ways in kernels_of(job, device):
        for ours, theirs in zip(*(way() for way in ways), strict=True):
            far = (ours - theirs).float().norm() / theirs.float().norm()
            if not far < max(4 * torch.finfo(ours.dtype).eps, 1e-5):
                sys.exit(f"{what}: not what the plain way gives")
        times, began = [], time.perf_counter()
        while len(times) < 3 or time.perf_counter() - began < job["least"]:
            times.append([once(way, device) for way in ways])
        found.append((what, plain, *map(min, zip(*times))))
    return found


def adapters(job, folder, device):
    """[(answers, seconds with all adapters side by side, seconds one after another), ...], the fastest of calls in turn.
    One after another, each adapter's weights are copied into a model with one adapter, which then scores."""
    import model
    kind, texts, folder = getattr(torch, job["dtype"]), torch.Generator().manual_seed(0), Path(folder)
    model.Llama(model.Config(**job["config"])).save_pretrained(folder / "base")
    names = []
    for k in range(job["adapters"]):
        base = model.Llama.from_pretrained(folder / "base", scorer=True)
        llama = model.add_lora(base, job["rank"], folder / "base", seed=k)
        for name, parameter in llama.named_parameters():
            if name == "score.weight" or "lora_B" in name:
                parameter.data.normal_(0, 0.05, generator=texts)
        llama.save_pretrained(folder / f"{k}")
        names.append(folder / f"{k}")
    several, one = (model.load_adapters(model.Llama.from_pretrained(folder / "base", kind, device, scorer=True), chosen)
                    for chosen in (names, names[:1]))
    swapped = dict(one.named_parameters())
    weights = {name: parameter.detach() for name, parameter in several.named_parameters() if name in swapped
               and (name == "score.weight" or "lora_" in name)}

    def in_turn(tokens, lengths):
        scores = []
        for k in range(len(names)):
            for name, values in weights.items():
                swapped[name].data.copy_(values[k:k + 1])
            scores.append(model.document_scores(one, tokens, lengths)[0])
        return torch.stack(scores)

    found = []
    for answers in job["answers"]:
        lengths = [job["tokens"]] * answers
        tokens = torch.randint(2, job["config"]["vocab_size"], (sum(lengths),), generator=texts).to(device)
        ways = [functools.partial(model.document_scores, several, tokens, lengths),
                functools.partial(in_turn, tokens, lengths)]
        with torch.inference_mode():
            torch.testing.assert_close(ways[0](), ways[1](), rtol=0.05, atol=0.05 if kind == torch.bfloat16 else 1e-3)
            times = [[once(way, device) for way in ways] for _ in range(job["calls"])]
        found.append((answers, *map(min, zip(*times))))
    return found


def adapters_peft(job, folder, device):
    """[(answers, seconds), ...] of peft: the adapters that `adapters` has written, switched to one after another."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification
    llama = AutoModelForSequenceClassification.from_pretrained(f"{folder}/base", num_labels=1, pad_token_id=0,
                                                               dtype=getattr(torch, job["dtype"])).to(device)
    several = PeftModel.from_pretrained(llama, f"{folder}/0", adapter_name="0")
    for k in range(1, job["adapters"]):
        several.load_adapter(f"{folder}/{k}", adapter_name=f"{k}")

    def in_turn(ids):
        for k in range(job["adapters"]):
            several.set_adapter(f"{k}")
            several(input_ids=ids).logits
    found = []
    for answers in job["answers"]:
        ids = torch.randint(2, job["config"]["vocab_size"], (answers, job["tokens"])).to(device)
        with torch.inference_mode():
            found.append((answers, min(once(functools.partial(in_turn, ids), device) for _ in range(job["calls"]))))
    return found


JOBS = {"adapters": adapters, "adapters_peft": adapters_peft,
        "train_ours": train_ours, "train_trl": train_trl, "large": large, "align_ours": align_ours,
        "align_transformers": align_transformers, "decode": decode, "kernels": kernels}


def measure(kind, folder, args, peer=False, **job):
    """Run one measurement in a process of its own; None where a peer fails, and says so."""
    (folder / "job.json").write_text(json.dumps({**job, "device": args.device}))
    python = args.peer if peer else sys.executable
    ended = subprocess.run([python, __file__, "--job", f"{kind}:{folder}"], capture_output=True, text=True)
    if ended.returncode:
        said = (ended.stderr.strip().splitlines() or ["it ended without a word"])[-1]
        if not peer:
            from data import UserError
            raise UserError(f"{kind}: {said}")
        print(f"{kind}: failed under {python}: {said}", file=sys.stderr)
        return None
    return json.loads(ended.stdout.strip().splitlines()[-1])


# ----------------------------------------------------------------------------------------------------------------
# What is measured


def widen(small, config):
    """A Llama of a larger shape that computes what `small` does: its new channels, heads and layers hold zeros.

    A norm averages over more channels, so its weight shrinks; a head keeps its rotation frequencies by spreading its
    channels; a score is divided by more, so queries grow; tokens that `small` lacks are as likely as its BOS."""
    import model
    big, s = model.Llama(config), small.config
    size, spread = s.hidden_size, config.head_dim // s.head_dim
    half = torch.arange(s.head_dim // 2) * spread
    channels = torch.cat([half, config.head_dim // 2 + half])
    channels = (torch.arange(s.num_attention_heads)[:, None] * config.head_dim + channels).flatten()
    share = s.num_attention_heads // s.num_key_value_heads

    def norm(wide, narrow):
        wide.weight[:size] = narrow.weight * (size / config.hidden_size) ** 0.5
        wide.eps = narrow.eps * size / config.hidden_size
    with torch.no_grad():
        for parameter in big.parameters():
            parameter.zero_()
        for wide, narrow in zip(big.model.layers, small.model.layers):
            norm(wide.input_layernorm, narrow.input_layernorm)
            norm(wide.post_attention_layernorm, narrow.post_attention_layernorm)
            wide.self_attn.q_proj.weight[channels, :size] = narrow.self_attn.q_proj.weight * spread ** 0.5
            for name in ("k_proj", "v_proj"):
                heads = getattr(narrow.self_attn, name).weight.unflatten(0, (-1, s.head_dim))
                getattr(wide.self_attn, name).weight[channels, :size] = heads.repeat_interleave(share, 0).flatten(0, 1)
            wide.self_attn.o_proj.weight[:size, channels] = narrow.self_attn.o_proj.weight
            for name in ("gate_proj", "up_proj", "down_proj"):
                weight = getattr(narrow.mlp, name).weight
                getattr(wide.mlp, name).weight[:weight.size(0), :weight.size(1)] = weight
        norm(big.model.norm, small.model.norm)
        big.model.embed_tokens.weight[:s.vocab_size, :size] = small.model.embed_tokens.weight
        big.lm_head.weight[:, :size] = small.lm_head.weight[s.bos_token_id]
        big.lm_head.weight[:s.vocab_size, :size] = small.lm_head.weight
    return big


def training_batches(args, tokenizer):
    """Batches of 8 examples: two to warm up, then those that are timed."""
    import data
    import toy
    if args.pairs:
        rows = list(data.read_completions(args.pairs))
    else:
        rows = [{"prompt": "", "completion": "\n\n".join(texts)} for texts in zip(*[toy.pretraining_texts(2000, 0)] * 4)]
    examples, _ = data.encode_pairs(tokenizer, rows[:40 * (args.steps + 2)], 1, 2, args.max_tokens)
    return [[(list(ids), n_prompt) for ids, n_prompt in examples[start:start + 8]]
            for start in range(0, 8 * (args.steps + 2), 8)]


def random_batches(words, lengths, count):
    """Batches of a document of each of the lengths, all of it but its first token to be learned."""
    generator = torch.Generator().manual_seed(0)
    return [[(torch.randint(words, (length,), generator=generator).tolist(), 0) for length in lengths]
            for _ in range(count)]


def embedded_prompts(writer, count):
    """Prompts that ask the aligner to edit answers of the embedded world, and those answers' token ids."""
    import random

    import data
    import story
    import toy
    rng, found = random.Random("bench"), []
    while len(found) < count:
        prompt = toy.question(rng)[0]
        for item in story.requests([prompt], [toy.answer(rng.choice(["verbose", "toxic"]), prompt, rng)], len(found)):
            text, context = data.aligner_prompt(prompt, item["original"], item["objectives"])
            found.append((writer.encode(text, NEW_TOKENS, context),
                          writer.tokenizer.encode(item["original"], add_special_tokens=False).ids))
    return found[:count]


def answer_prompts(writer, args):
    """Prompts to edit the answers of --answers, evenly spread over the file; those that do not fit are left out."""
    import data
    if not args.answers:
        return [prompt for prompt, _ in embedded_prompts(writer, args.count)]
    objectives, found = data.find_objectives(["harmless", "helpful"]), []
    for row in data.read_rated(args.answers, objective="chosen"):
        for response in row["responses"]:
            text, context = data.aligner_prompt(row["prompt"], response["text"], objectives)
            found.append(writer.encode(text, NEW_TOKENS, context))
    found = [prompt for prompt in found if prompt is not None]
    return found[::max(1, len(found) // args.count)][:args.count]


def kept(answer, edit):
    """Share of an answer's tokens that its edit keeps, in order."""
    import difflib
    matcher = difflib.SequenceMatcher(None, answer, edit, autojunk=False)
    return sum(block.size for block in matcher.get_matching_blocks()) / max(1, len(answer))


def flops(config, lengths, targets):
    """Model FLOPs of a training step: 6 per weight and token, the head for targets only, causal attention."""
    block = config.hidden_size * (2 * config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim \
        + 3 * config.hidden_size * config.intermediate_size
    inner = config.num_attention_heads * config.head_dim
    return 6 * (config.num_hidden_layers * (block * sum(lengths) + inner * sum(n * n for n in lengths))
                + config.vocab_size * config.hidden_size * targets)


# ----------------------------------------------------------------------------------------------------------------
# The parts


def line(what, ours, peer="", ratio="", note=""):
    print(COLUMNS.format(what, ours, peer, ratio, note), flush=True)


def versus(ours, peer):
    return f"{ours / peer:.2f} x"


def utilisation(config, job, ours, rates):
    """Of the steps that were timed, in words."""
    timed = [example for batch in job["batches"][2:] for example in batch]
    work = flops(config, [len(ids) for ids, _ in timed], sum(len(ids) - max(n, 1) for ids, n in timed))
    return f"{100 * work / ours['seconds'] / rates['flops']:.0f} % of the matrix product; {ours['peak']:.1f} GiB"


def shape(name, device):
    """(name, size) of a large model; where there is no GPU, of the 40M one, which takes the same path."""
    return (name, LARGE[name]) if device == "cuda" else ("40M", SIZE)


def measure_or_tell(what, kind, folder, args, **job):
    """As measure; where that fails, for want of memory, say, None and a line of the table that says why."""
    from data import UserError
    try:
        return measure(kind, folder, args, **job)
    except UserError as error:
        line(what, "", note=f"failed: {error}")


def bench_train(args, folder, rates):
    import model
    import toy
    tokenizer = (toy.train_tokenizer(list(toy.pretraining_texts(500, 0))) if not args.tokenizer
                 else model.load_tokenizer(Path(args.tokenizer).parent))
    config = model.Config(**SIZE)
    model.Llama(config).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    batches = training_batches(args, tokenizer)
    job = {"batches": batches, "max_tokens": args.max_tokens, "eos": tokenizer.id_to_token(2)}
    ours = measure("train_ours", folder, args, **job)
    note = utilisation(config, job, ours, rates)
    speed, theirs = ours["tokens"] / ours["seconds"], None
    if args.peer:
        theirs = measure("train_trl", folder, args, peer=True, **job)
    if theirs:
        other = theirs["tokens"] / theirs["seconds"]
        line("train: SFT, 40M, real tokens/s", f"{speed:,.0f}", f"{other:,.0f}", versus(speed, other),
             f"{note}, TRL {theirs['peak']:.1f} GiB")
    else:
        line("train: SFT, 40M, real tokens/s", f"{speed:,.0f}", note=note)


def bench_large(args, folder, rates):
    """Speed with 8 rows of 2,048 packed tokens at a time. Memory with one, and with two of them in a step: the second
    comes when gradients are there already, as most do in training."""
    import model
    gpu = args.device == "cuda"
    row, rows = [700, 1348], 8 if gpu else 1
    fast = dict(micro_tokens=2048 * rows, compile=gpu)
    lean = dict(micro_tokens=2048, checkpoint_activations=True)
    for what, unit, name, lengths, options in (
            ("full, {}, 2,048 tokens", "real tokens/s", "1.1B", row * rows, fast),
            ("full, {}, lean", "GiB", "1.1B", [*row, 2048], dict(lean, bf16_moments=True)),
            ("LoRA of rank 16, {}", "GiB", "7B", [*row, 2048], dict(lean, lora_rank=16))):
        label, size = shape(name, args.device)
        what = f"large: {what.format(label)}, {unit}"
        job = dict(config=size, batches=random_batches(size["vocab_size"], lengths, args.steps + 2), options=options)
        ours = measure_or_tell(what, "large", folder, args, **job)
        if not ours:
            continue
        speed = f"{ours['tokens'] / ours['seconds']:,.0f}"
        if unit == "GiB":
            line(what, f"{ours['peak']:.1f}", note=f"{speed} tokens/s")
        else:
            line(what, speed, note=utilisation(model.Config(**size), job, ours, rates))


def aligners(args, folder):
    """(label, folder) of the aligner as it is and widened."""
    import align
    import model
    small = align.Writer(args.aligner, args.device)
    wide = folder / "wide"
    names = dict(bos_token_id=small.llama.config.bos_token_id, eos_token_id=small.llama.config.eos_token_id,
                 max_position_embeddings=small.llama.config.max_position_embeddings)
    widen(model.Llama.from_pretrained(args.aligner), model.Config(**SIZE, **names)).save_pretrained(wide)
    narrow, llama = folder / "narrow", model.Llama.from_pretrained(args.aligner)
    llama.save_pretrained(narrow)
    millions = sum(p.numel() for p in llama.parameters()) / 1e6
    return small, [(f"{millions:.1f}M", narrow), ("40M", wide)]


def dtype(args):
    import model
    return "bfloat16" if model.computes_bf16(args.device) else "float32"


def bench_align(args, folder, rates):
    writer, sizes = aligners(args, folder)
    prompts = answer_prompts(writer, args)
    job = {"prompts": prompts, "new_tokens": NEW_TOKENS, "dtype": dtype(args), "passes": 1}
    for label, where in sizes:
        runs = {batch: measure("align_ours", where, args, batch=batch, draft=15, **job) for batch in (32, 64)}
        batch, ours = min(runs.items(), key=lambda item: item[1]["seconds"])
        speed, note = len(prompts) / ours["seconds"], f"batch {batch}, {100 * ours['copied']:.0f} % copied"
        theirs = {}
        for size in (1, 16, 64) if args.peer else ():
            run = measure("align_transformers", where, args, peer=True, batch=size, **job)
            if run:
                theirs[size] = len(prompts) / run["seconds"], run["written"]
        if not theirs:
            line(f"align: {label}, answers/s", f"{speed:.2f}", note=note)
            continue
        best = max(theirs, key=lambda size: theirs[size][0])
        same = sum(a == b for a, b in zip(ours["written"], theirs[best][1]))
        line(f"align: {label}, answers/s", f"{speed:.2f}", f"{theirs[best][0]:.2f}", versus(speed, theirs[best][0]),
             f"{note}; transformers best at {best}: "
             + ", ".join(f"{size}: {rate:.2f}" for size, (rate, _) in theirs.items())
             + f"; {same} of {len(prompts)} the same text")


def bench_copy(args, folder, rates):
    writer, sizes = aligners(args, folder)
    found = embedded_prompts(writer, 600)
    job = {"new_tokens": NEW_TOKENS, "dtype": dtype(args), "passes": 3}
    prompts = [prompt for prompt, _ in found]
    written = measure("align_ours", sizes[0][1], args, batch=64, draft=15, prompts=prompts, **job)["written"]
    chosen = [prompt for (prompt, answer), edit in zip(found, written) if 0.65 <= kept(answer, edit) <= 0.75]
    for label, where in sizes:
        for batch, count in ((1, 16), (16, 64)):
            prompts = chosen[:count]
            runs = {draft: measure("align_ours", where, args, batch=batch, draft=draft, prompts=prompts, **job)
                    for draft in (0, 15)}
            speeds = {draft: sum(map(len, run["written"])) / run["seconds"] for draft, run in runs.items()}
            same = sum(a == b for a, b in zip(runs[0]["written"], runs[15]["written"]))
            line(f"copy: {label}, batch {batch}, new tokens/s", f"{speeds[15]:,.0f}", f"{speeds[0]:,.0f}",
                 versus(speeds[15], speeds[0]), f"{100 * runs[15]['copied']:.0f} % copied; {same} of {len(prompts)} the "
                 "same text; against draft=0")


def bench_decode(args, folder, rates):
    label, size = shape("7B", args.device)
    what = f"decode: {label}, one sequence, tokens/s"
    ours = measure_or_tell(what, "decode", folder, args, config=size, dtype=dtype(args))
    if ours:
        rate = ours["bytes"] / ours["seconds"]
        line(what, f"{1 / ours['seconds']:,.0f}",
             note=f"{rate / 1e9:.1f} GB/s of weights, {100 * rate / rates['bytes']:.0f} % of the copy")


def bench_kernels(args, folder, rates):
    for what, plain, *times in measure("kernels", folder, args, dtype=dtype(args), **KERNELS):
        line(f"kernels: {what}, ms", *(f"{1e3 * each:,.2f}" for each in times), versus(*times[::-1]),
             f"against {plain}")


def bench_adapters(args, folder, rates):
    job = dict(dtype=dtype(args), **ADAPTERS)
    ours = measure("adapters", folder, args, **job)
    for answers, together, in_turn in ours:
        what = f"adapters: {ADAPTERS['adapters']} score {answers} x {ADAPTERS['tokens']} tokens, ms"
        line(what, f"{1e3 * together:,.0f}", f"{1e3 * in_turn:,.0f}", versus(in_turn, together),
             "side by side, against one after another")
    theirs = measure("adapters_peft", folder, args, peer=True, **job) if args.peer else None
    for (answers, peft), (_, together, _) in zip(theirs or (), ours):
        line(f"adapters: the same, {answers} answers, against peft", f"{1e3 * together:,.0f}", f"{1e3 * peft:,.0f}",
             versus(peft, together))


def main():
    args = ARGS
    if args.job:
        kind, _, folder = args.job.partition(":")
        job = json.loads((Path(folder) / "job.json").read_text())
        print("\n" + json.dumps(JOBS[kind](job, folder, job["device"])))
        return
    import data
    import train
    args.device = train.device_named(args.device).type
    if {"align", "copy"} & set(args.parts) and not (Path(args.aligner) / "config.json").exists():
        raise data.UserError(f"{args.aligner}: no aligner there; run `make train` first, or give --aligner")
    if args.pairs and not args.tokenizer:
        raise data.UserError("--pairs: give --tokenizer too, the tokenizer.json that its texts are to be cut with")
    rates = machine(args.device)
    line("", "ours", "peer", "ratio")
    line("machine: bf16 matrix product, GFLOP/s", f"{rates['flops'] / 1e9:,.0f}")
    line("machine: copy, GB/s", f"{rates['bytes'] / 1e9:,.1f}")
    parts = {"train": bench_train, "large": bench_large, "align": bench_align, "copy": bench_copy,
             "decode": bench_decode, "kernels": bench_kernels, "adapters": bench_adapters}
    for name, part in parts.items():
        if name in args.parts:
            with tempfile.TemporaryDirectory() as folder:
                part(args, Path(folder), rates)


if __name__ == "__main__":
    if ARGS.job:
        main()  # under a peer's Python, which need not have what nanoalign needs
    else:
        import data
        data.cli(main)
