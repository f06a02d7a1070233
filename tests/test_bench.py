"""bench.py: that what is compared is the same thing, and the figures' arithmetic. Speeds are not tested."""
import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch

import bench
import checkpoint
import data
import generate
import lora
import peers
import timed
import toy
import train
from conftest import write
from model import Config, Llama, logits

SIZE = dict(vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
RATES = {"flops": 1e9, "bytes": 1e9}


def here(kind, folder, device, peer=None, **job):
    """As bench.measure, but in this process."""
    return bench.JOBS[kind](folder, device, **json.loads(json.dumps(job)))


# ----------------------------------------------------------------------------------------------------------------
# The arithmetic


@pytest.mark.parametrize("groups, tied, kind", [(2, True, "llama"), (4, False, "llama"), (2, True, "qwen3")])
def test_a_widened_model_computes_the_same(tmp_path, groups, tied, kind):
    small = Llama(Config(vocab_size=30, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=groups, head_dim=8, tie_word_embeddings=tied,
                         rms_norm_eps=0.1, model_type=kind))
    with torch.no_grad():
        for name, parameter in small.named_parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    wide = bench.widen(small, Config(vocab_size=50, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
                                     num_attention_heads=4, num_key_value_heads=4, head_dim=16, model_type=kind))
    checkpoint.save(wide, tmp_path)
    tokens = torch.randint(30, (2, 20), generator=torch.Generator().manual_seed(0))
    expected, found, loaded = logits(small, tokens), logits(wide, tokens), logits(checkpoint.load(tmp_path), tokens)
    assert torch.equal(loaded, found), "what is saved is the same function"
    assert torch.allclose(found[..., :30], expected, atol=1e-4) and expected.std() > 0.5
    others = expected[..., small.config.bos_token_id, None].expand_as(found[..., 30:])
    assert torch.allclose(found[..., 30:], others, atol=1e-4), "new tokens are as likely as BOS"


def test_flops_of_a_step_counted_by_hand():
    """One block, 2 documents of 3 and 1 tokens, 2 targets. Per token: q 8x8, k and v 4x8 each, o 8x8, three 8x10.
    Scores and their products with values, causal: 2 * 8 * n * n / 2 multiplications per document."""
    config = Config(vocab_size=11, hidden_size=8, intermediate_size=10, num_hidden_layers=1, num_attention_heads=2,
                    num_key_value_heads=1)
    forward = 4 * (8 * 8 + 2 * 4 * 8 + 8 * 8 + 3 * 8 * 10) + 8 * (9 + 1) + 2 * 11 * 8
    assert bench.flops(config, [3, 1], 2) == 2 * 3 * forward  # a multiplication and an addition; backward is twice
    assert bench.flops(config, [3, 1], 2, frozen=True) == 2 * (2 * forward + 8 * (9 + 1)), "but not of frozen weights"


def test_what_an_edit_keeps():
    assert bench.kept([1, 2, 3, 4], [1, 2, 9, 4]) == 0.75
    assert bench.kept([1, 2], [3]) == 0 and bench.kept([1, 2], [0, 1, 2, 5, 5]) == 1


# ----------------------------------------------------------------------------------------------------------------
# The work that is timed


@pytest.mark.parametrize("stops", [2, [2, 7, 11]])
def test_transformers_writes_the_same_edits(tmp_path, stops):
    """Both jobs on one small model in fp32: what is timed is the same work."""
    pytest.importorskip("transformers")
    checkpoint.save(Llama(Config(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                 num_attention_heads=4, num_key_value_heads=2, eos_token_id=stops)), tmp_path)
    job = dict(prompts=random_prompts(5, 30, 12, 9), dtype="float32", batch=3, passes=1)
    ours = here("align_ours", tmp_path, "cpu", draft=7, **job)
    theirs = here("align_transformers", tmp_path, "cpu", **job)
    guessing = here("align_transformers", tmp_path, "cpu", **{**job, "batch": 1, "lookup": 7})
    assert ours["written"] == theirs["written"] == guessing["written"] and any(ours["written"])


def random_prompts(*lengths):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 40, (length,), generator=generator).tolist() for length in lengths]


def test_edits_come_back_in_the_order_of_their_prompts(tmp_path):
    """The longest prompt is edited first; each edit is that of its own prompt, and as many are copied as were."""
    llama = Llama(Config(**SIZE))
    checkpoint.save(llama, tmp_path)
    prompts = random_prompts(5, 30, 12, 9)
    found = here("align_ours", tmp_path, "cpu", prompts=prompts, dtype="float32", batch=3, passes=2, draft=7)
    alone = [generate.generate(llama, [prompt], peers.NEW_TOKENS, stop_ids=(2,))[0] for prompt in prompts]
    assert found["written"] == alone and len(set(map(tuple, alone))) == 4
    assert found["seconds"] > 0 and 0 < found["copied"] < 1, "noise soon repeats itself"


def test_large_shapes_have_the_published_numbers_of_parameters():
    for name, published in (("1.1B", 1_100_048_384), ("7B", 6_738_415_616)):
        label, size = bench.large_size(name, "cuda")
        with torch.device("meta"):
            assert label == name and sum(p.numel() for p in Llama(Config(**size)).parameters()) == published
        assert bench.large_size(name, "cpu") == ("40M", bench.SIZE)


@pytest.mark.parametrize("dtype, tied", [(torch.float32, False), (torch.bfloat16, True)])
def test_a_fresh_model_lacks_nothing(dtype, tied):
    """It is made on no device at first, which must not be where its rotation or its tied head stay."""
    size = dict(SIZE, tie_word_embeddings=tied)
    llama = timed.fresh(size, dtype, "cpu")
    expected = Llama(Config(**size)).frequencies
    assert torch.equal(llama.frequencies, expected) and llama.frequencies.dtype == torch.float32
    assert (llama.lm_head.weight is llama.model.embed_tokens.weight) == tied
    for name, parameter in llama.named_parameters():
        assert parameter.dtype == dtype and parameter.device.type == "cpu" and parameter.requires_grad, name
        assert (parameter == 1).all() if "norm" in name else 0.01 < parameter.std() < 0.03, name


@pytest.mark.parametrize("chosen, method", [
    ({}, "sft"), (dict(bf16_moments=True, checkpoint_activations=True), "sft"),
    (dict(lora_rank=3, max_grad_norm=0.1), "sft"), (dict(precision="fp32"), "sft"), (dict(beta=2.0), "dpo")])
def test_a_timed_step_is_one_of_training(tmp_path, chosen, method):
    """Two steps of train.train, in which the learning rate is still the highest, leave the same losses and weights."""
    options = train.Options(**{"lr": 1e-2, "warmup": 0, "batch": 6, "epochs": 1, "micro_tokens": 30,
                               "max_grad_norm": 0.5, "weight_decay": 0.1, "precision": "bf16", **chosen})
    pairs = method == "dpo"
    prompts = random_prompts(*range(5, 17 + 12 * pairs))
    examples = timed.examples_from([(ids, len(ids) % 4) for ids in prompts], pairs)
    stage = train.Stage(method, examples, method=train.METHODS[method])
    llamas = []
    for _ in range(2):
        llama = Llama(Config(**SIZE))
        llamas.append(lora.add_lora(llama, options.lora_rank, tmp_path) if options.lora_rank else llama)
    tokenizer = toy.train_tokenizer(["Hello there"])
    rows = train.train(llamas[0], tokenizer, [stage], tmp_path / "out", options, progress=False)
    assert [row["lr"] for row in rows] == [1e-2, 1e-2] and max(row["grad_norm"] for row in rows) > options.max_grad_norm
    chosen = [train.examples_of(stage, step, options) for step in range(2)]
    batches = [[(list(document.ids), document.start) for example in batch for document in example.documents]
               for batch in chosen]
    found = timed.timed_steps(llamas[1], batches, options, "cpu", stage.method)
    assert found["losses"] == [row["loss"] for row in rows]
    assert llamas[1].checkpoint_activations == options.checkpoint_activations
    untrained = dict(Llama(Config(**SIZE)).named_parameters())
    for (name, expected), now in zip(llamas[0].named_parameters(), llamas[1].parameters(), strict=True):
        assert torch.equal(expected, now), name
        assert name not in untrained or torch.equal(now, untrained[name]) == bool(options.lora_rank), name


def test_the_time_of_the_reference_counts(tmp_path, monkeypatch):
    """Every call takes as many seconds as it has pairs, at the reference, or 100, at a step; two steps warm up."""
    checkpoint.save(Llama(Config(**SIZE)), tmp_path)
    pairs = [[(ids, 3) for ids in random_prompts(5, 6, 7, 8)]] * 5

    def once(device, function, *given):
        function(*given)
        return len(given[1]) if function is train.add_ref_logprobs else 100.0
    monkeypatch.setattr(timed, "once", once)
    found = here("train_ours", tmp_path, "cpu", batches=pairs, method="dpo", lr=1e-2)
    assert found["seconds"] == 3 * 100 + 3 * 2 and found["tokens"] == 3 * (5 + 6 + 7 + 8) and found["peak"] > 0
    assert found["losses"][0] == pytest.approx(math.log(2)) and found["losses"][4] < 0.6
    assert here("train_ours", tmp_path, "cpu", batches=pairs)["seconds"] == 300, "fine-tuning has no reference"


def test_trl_finds_the_same_losses(tmp_path, monkeypatch):
    """DPO of both in fp32: log 2, then what moves with masks, stop tokens, the order of pairs and of updates. With a
    clock that ticks when it is read: of four steps two count, and what the reference thinks of their eight pairs."""
    pytest.importorskip("trl")
    checkpoint.save(Llama(Config(**SIZE)), tmp_path)
    tokenizer = toy.train_tokenizer(["Hello there"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    rows, generator = [], torch.Generator().manual_seed(0)
    for length in range(5, 21):
        prompt = random_prompts(length)[0]
        for answer in (length % 7 + 3, 14 - length % 5):
            rows.append((prompt + torch.randint(3, 40, (answer,), generator=generator).tolist() + [2], length))
    batches = [rows[first:first + 8] for first in range(0, len(rows), 8)]
    same = dict(batches=batches, beta=0.5, lr=1e-2)
    theirs = dict(same, eos=tokenizer.id_to_token(2), bf16=False)
    ours = here("train_ours", tmp_path, "cpu", method="dpo", precision="fp32", weight_decay=0, **same)["losses"]
    monkeypatch.setattr(peers, "time", SimpleNamespace(perf_counter=itertools.count().__next__))
    for together, precompute, ticks in ((1, True, 2 + 8), (4, False, 2)):
        found = here("dpo_trl", tmp_path, "cpu", precompute=precompute, together=together, **theirs)
        assert found["losses"] == pytest.approx(ours, abs=1e-3) and len(ours) == 4, (together, precompute)
        assert found["seconds"] == ticks and found["tokens"] == sum(len(ids) for ids, _ in rows[16:])
    monkeypatch.undo()
    assert ours[0] == pytest.approx(math.log(2)) and max(abs(loss - ours[0]) for loss in ours[1:]) > 0.1
    cut = [[(ids[:-1], start) for ids, start in batch] for batch in batches]
    without = here("train_ours", tmp_path, "cpu", method="dpo", precision="fp32", weight_decay=0,
                   **{**same, "batches": cut})["losses"]
    assert without != pytest.approx(ours, abs=1e-2), "the stop token is heard"


def test_trl_is_timed_on_all_tokens_that_it_fine_tunes_on(tmp_path):
    """Padded or one by one, those of the batches after the first two; packed, as many as the rows of these hold."""
    pytest.importorskip("trl")
    checkpoint.save(Llama(Config(**SIZE)), tmp_path)
    tokenizer = toy.train_tokenizer(["Hello there"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    batches = [[(ids, 3) for ids in random_prompts(*range(40 * n, 40 * n + 80, 10))] for n in range(1, 5)]
    job, last = dict(batches=batches, eos=tokenizer.id_to_token(2)), sum(len(ids) for batch in batches[2:]
                                                                          for ids, _ in batch)
    for together in (8, 1):
        found = here("train_trl", tmp_path, "cpu", packing=False, together=together, **job)
        assert found["tokens"] == last and len(found["losses"]) == 4 and found["seconds"] > 0
    found = here("train_trl", tmp_path, "cpu", packing=True, together=1, **job)
    assert 1000 < found["tokens"] <= 2 * peers.MAX_TOKENS and all(map(math.isfinite, found["losses"]))
    for rank in (0, 2):  # of random weights, by their shape alone
        if rank:
            pytest.importorskip("peft")
        found = here("train_trl", tmp_path, "cpu", packing=True, together=1, longest=256, config=SIZE, rank=rank, **job)
        assert 256 < found["tokens"] <= 2 * 256 and found["losses"][0] == pytest.approx(math.log(60), abs=0.2)


def test_lora_moves_its_adapters_alone(tmp_path, monkeypatch):
    moved, steps = {}, timed.timed_steps

    def watched(llama, *words):
        before = {name: parameter.detach().clone() for name, parameter in llama.named_parameters()}
        found = steps(llama, *words)
        moved.update({name: not torch.equal(before[name], now) for name, now in llama.named_parameters()})
        return found
    monkeypatch.setattr(timed, "timed_steps", watched)
    batches = bench.random_batches(60, [7, 5], 4)
    found = here("train_large", tmp_path, "cpu", batches=batches, config=SIZE, options=dict(lora_rank=2))
    assert found["tokens"] == 2 * 12 and found["seconds"] > 0 and found["peak"] > 0
    assert any(moved.values()) and all(was == ("lora_" in name) for name, was in moved.items()), moved


def test_what_precedes_the_first_tokens_is_not_in_the_time_of_one(tmp_path, monkeypatch):
    now = 0.0

    def write_slowly(llama, prompts, count):
        nonlocal now
        assert len(prompts) == 3
        now += 7 + count / 2
    monkeypatch.setattr(generate, "generate", write_slowly)
    monkeypatch.setattr(peers.time, "perf_counter", lambda: now)
    found = here("decode", tmp_path, "cpu", config=SIZE, dtype="bfloat16", batch=3)
    blocks, keys = 2 * (4 * 32 * 32 + 3 * 32 * 48 + 2 * 32), 2 * 2 * 32  # keys and values of a token, in two layers
    assert found == {"seconds": 0.5, "bytes": 2 * (blocks + 32 + 60 * 32 + 3 * keys * (128 + (16 + 112) // 2))}


def test_transformers_writes_as_many_tokens(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    lengths, once = [], peers.once
    monkeypatch.setattr(peers, "once", lambda device, write: once(device, lambda: lengths.append(write().shape)))
    found = here("decode_transformers", tmp_path, "cpu", config=SIZE, dtype="float32", batch=2)
    assert lengths[:3] == [(2, 128 + 112), (2, 128 + 112), (2, 128 + 16)] and len(lengths) == 7 and found.keys() == {
        "seconds"}


def test_an_iteration_of_ppo_is_timed_in_parts(tmp_path, monkeypatch):
    """With a clock that ticks when it is read. In each, the policy learns."""
    moved, learn = [], timed.ppo.learn

    def watched(agent, optimizer, rollouts, known, *more):
        before = agent.policy.lm_head.weight.clone()
        found = learn(agent, optimizer, rollouts, known, *more)
        moved.append(not torch.equal(before, agent.policy.lm_head.weight))
        return found
    monkeypatch.setattr(timed.ppo, "learn", watched)
    monkeypatch.setattr(peers, "time", SimpleNamespace(perf_counter=itertools.count().__next__))
    options = dict(rollouts=4, minibatch=2, max_new_tokens=5, lr=0.01)
    found = here("ppo_ours", tmp_path, "cpu", config=SIZE, options=options)
    assert found["seconds"] == {"answering": 1, "scoring": 1, "learning": 1} and found["epochs"] == 4
    assert found["actions"] == sum(found["lengths"]) - 4 * 128 and 4 < found["actions"] <= 20
    assert moved == [True] * 3


# ----------------------------------------------------------------------------------------------------------------
# The parts


@pytest.mark.slow
def test_large_models_give_figures(tmp_path, monkeypatch, capsys):
    jobs = []
    monkeypatch.setattr(bench, "TABLE", {"lines": []})
    monkeypatch.setattr(bench, "SIZE", SIZE)
    monkeypatch.setattr(bench, "measure", lambda *words, **job: jobs.append(job) or here(*words, **job))
    bench.bench_large(tmp_path, "cpu", RATES, steps=1)
    bench.bench_decode(tmp_path, "cpu", RATES)
    bench.bench_ppo(tmp_path, "cpu", RATES)
    lines = capsys.readouterr().out.splitlines()
    assert [line[:46].rstrip() for line in lines] == [
        "large: full, 40M, real tokens/s", "large: full, 40M, of many lengths, real tokens",
        "large: LoRA of rank 16, 40M, real tokens/s", "large: full, 40M, lean, GiB",
        "large: LoRA of rank 16, 40M, lean, GiB", "decode: 40M, one sequence, tokens/s",
        "decode: 40M, 4 at a time, tokens/s", "ppo: 40M, seconds of an iteration"]
    assert all(line["ours"] > 0 for line in bench.TABLE["lines"])
    assert all("% of the matrix product" in lines[i] for i in (0, 1, 2, 7)) and "% of the copy" in lines[5]
    for job, tokens in zip(jobs, (4096, 3888, 2048, 2048, 2048)):
        for batch in packed(job, range(3)):
            assert sum(batch.lengths) == len(batch.tokens) == tokens
            assert len(batch.targets) == tokens - len(batch.lengths)


def packed(job, steps):
    """The Batches of some steps of a measurement."""
    return [batch for step in steps for batch in
            train.pack(timed.examples_from(job["batches"][step]), job["options"]["micro_tokens"], torch.device("cpu"))]


def test_on_a_gpu_the_shapes_are_large(tmp_path, monkeypatch, capsys):
    """Nothing is run: what would be, and the line of a step of 16,384 tokens in a second."""
    jobs = []
    monkeypatch.setattr(bench, "measure", lambda *_, **job: jobs.append(job) or dict(tokens=16384, seconds=1, peak=9.5))
    bench.bench_large(tmp_path, "cuda", {"flops": 4e14}, steps=1)
    assert [job["config"]["num_hidden_layers"] for job in jobs] == [22, 22, 32, 22, 32]
    lengths = [[batch.lengths for batch in packed(job, [0])] for job in jobs]
    many = lengths.pop(1)[0]
    assert lengths == [[[700] * 8 + [1348] * 8], [[700] * 4 + [1348] * 4], *[[[700, 1348], [2048]]] * 2]
    assert [bool(job["options"].get("checkpoint_activations")) for job in jobs] == [False] * 3 + [True] * 2
    assert len(set(many)) == 31 and 16000 < sum(many) <= 16384
    # Weights but the embedding and norms, 8 rows of 2,048 tokens less two; half of the scores are not computed.
    multiplied = (1_100_048_384 - 32000 * 2048 - 45 * 2048) * 16384 - 32000 * 2048 * 16
    multiplied += 22 * 8 * 2 * 2048 * (700**2 + 1348**2) / 2
    # Of frozen weights no gradients: two thirds. Here 4 rows, told as if they had taken a second for 16,384 tokens.
    frozen = (6_738_415_616 - 32000 * 4096 - 65 * 4096) * 8192 - 32000 * 4096 * 8
    frozen = 2 / 3 * frozen + 32 * 4 * 2 * 4096 * (700**2 + 1348**2) / 2
    full, rank = (f"{100 * 6 * work / 4e14:.0f} % of the matrix product; 9.5 GiB" for work in (multiplied, frozen))
    lines = words_of(capsys)
    assert lines.pop(1).startswith("large: full, 1.1B, of many lengths, real tokens/s 16,384 ")
    assert lines == [f"large: full, 1.1B, real tokens/s 16,384 {full}",
                     f"large: LoRA of rank 16, 7B, real tokens/s 16,384 {rank}",
                     "large: full, 1.1B, lean, GiB 9.5 16,384 tokens/s",
                     "large: LoRA of rank 16, 7B, lean, GiB 9.5 16,384 tokens/s"]


@pytest.mark.slow
def test_a_job_without_memory_is_told_and_passed_over(tmp_path, monkeypatch, capsys):
    """One of the five asks for more than any machine has, in a process of its own; the others go on."""
    measure = bench.measure

    def short_of_memory(*words, **job):
        if "bf16_moments" not in job["options"]:
            return here(*words, **job)
        return measure(*words, **{**job, "config": dict(SIZE, vocab_size=2**42)})
    monkeypatch.setattr(bench, "SIZE", SIZE)
    monkeypatch.setattr(bench, "measure", short_of_memory)
    bench.bench_large(tmp_path, "cpu", RATES, steps=1)
    lines = capsys.readouterr().out.splitlines()
    assert ["failed: " in line for line in lines] == [False] * 3 + [True, False]
    assert lines[3].startswith("large: full, 40M, lean, GiB  ") and "memory" in lines[3]


def words_of(capsys):
    """The lines of the table, with single spaces."""
    return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]


def test_sides_take_turns_each_in_its_fastest_way(capsys):
    """Ours, in its second way, takes 2, 4 and 1 seconds; the peer takes 5 in the best of its ways, then 8 and 8."""
    calls = []

    def side(name, **times):
        def measured(way):
            calls.append((name, way))
            return times[way].pop(0)
        return {way: lambda way=way: measured(way) for way in times}
    ours = side("ours", slow=[10.0], quick=[2.0, 4.0, 1.0])
    theirs = side("theirs", first=[9.0], fails=[None], best=[5.0, 8.0, 8.0])
    bench.compare("what", lambda run: 100 / run, ours, theirs, lambda words, run: f"{words} in {run}")
    assert calls == [("ours", "slow"), ("ours", "quick"), ("theirs", "first"), ("theirs", "fails"), ("theirs", "best"),
                     *[("ours", "quick"), ("theirs", "best")] * 2]
    assert words_of(capsys) == ["what 50 12 2.50 x quick in 2.0; 3 turns, 2.00 to 8.00 x; the peer's best is best "
                                "(first: 11, best: 20)"]
    for others in ({}, {"gone": lambda: None}):
        bench.compare("what", lambda run: run, {"": lambda: 7}, others)
        assert words_of(capsys) == ["what 7"], "without a peer, ours alone, once"
    times = iter([4, None, 2])
    bench.compare("what", lambda run: run, {"": lambda: 8}, {"a": lambda: next(times)})
    assert words_of(capsys) == ["what 8 3 3.00 x 2 turns, 2.00 to 4.00 x; the peer's best is a"]


@pytest.mark.parametrize("peer", [None, "python"])
def test_training_is_compared(tmp_path, monkeypatch, capsys, peer):
    """TRL is handed the very batches that ours trains on: 8 examples of BOS, an embedded text and EOS."""
    jobs = []
    monkeypatch.setattr(bench, "measure", lambda kind, folder, *_, **job: jobs.append((kind, job)) or dict(
        tokens=1000, seconds=1 if "compile" in job else 2 if kind == "train_ours" else 4 if job["packing"] else 8,
        peak=3.5))
    bench.bench_train(tmp_path, "cpu", RATES, peer, steps=2, pairs=None, tokenizer=None, model=None)
    batches = jobs[0][1]["batches"]
    documents = [document for batch in batches for document in batch]
    assert [len(batch) for batch in batches] == [8] * 4 and len({tuple(ids) for ids, _ in documents}) == 32
    assert all(ids[0] == 1 and ids[-1] == 2 and start == 1 and len(ids) <= bench.MAX_TOKENS for ids, start in documents)
    line, compiled = words_of(capsys)
    assert compiled.startswith("train: the same, compiled, against not 1,000 500 2.00 x 3 turns")
    assert line.startswith("train: SFT, 40M, real tokens/s 500 250 2.00 x " if peer else
                           "train: SFT, 40M, real tokens/s 500 ")
    assert ("the peer's best is packed" in line) == bool(peer)
    eos = checkpoint.load_tokenizer(tmp_path).id_to_token(2)
    assert all(job["batches"] == batches and job.get("eos", eos) == eos for _, job in jobs)
    ways = [{name: job[name] for name in ("packing", "together")} for kind, job in jobs if kind == "train_trl"]
    assert ways[:4] == ([*bench.TUNING.values()] if peer else []) and len(ways) == (6 if peer else 0)
    assert checkpoint.load(tmp_path).config == Config(**bench.SIZE)


def test_too_few_pairs_are_told(tmp_path):
    pairs = write(tmp_path / "pairs.jsonl", *[{"prompt": "Hello", "completion": " there"}] * 23)
    tokenizer = toy.train_tokenizer(["Hello there"])
    config = Config(**SIZE)
    with pytest.raises(bench.UserError, match="23 of 24 examples"):
        bench.training_batches(tokenizer, config, bench.completions, pairs, 1)
    write(pairs, *[{"prompt": "Hello", "completion": " there"}] * 24)
    batches = bench.training_batches(tokenizer, config, bench.completions, pairs, 1)
    assert [len(batch) for batch in batches] == [8, 8, 8]
    ids, start = batches[2][7]
    assert tokenizer.decode(ids[1:start]) == "Hello" and tokenizer.decode(ids[start:-1]) == " there"


def test_pairs_are_handed_over_the_better_one_first(tmp_path):
    """Two that are as good as each other are no pair; a model's own context and stop token are heeded."""
    labels = [dict(prompt="Hello", response_a=" one", response_b=" two", p_a=p_a) for p_a in (0.9, 0.5, 0.2)]
    long = dict(labels[0], response_a=" one" * 40)
    pairs = write(tmp_path / "pairs.jsonl", *[*labels, long] * 12)
    tokenizer = toy.train_tokenizer(["Hello one two"])
    config = Config(**SIZE, max_position_embeddings=40, eos_token_id=[7, 8])
    batches = bench.training_batches(tokenizer, config, bench.preferences, pairs, 1)
    assert [len(batch) for batch in batches] == [16, 16, 16]
    texts = [(tokenizer.decode(ids[1:start]), tokenizer.decode(ids[start:-1])) for ids, start in batches[1]]
    assert texts == [("Hello", " one"), ("Hello", " two"), ("Hello", " two"), ("Hello", " one")] * 4
    assert {(ids[0], ids[-1]) for batch in batches for ids, _ in batch} == {(1, 7)}
    with pytest.raises(bench.UserError, match="24 of 32 examples of at most 40 tokens"):
        bench.training_batches(tokenizer, config, bench.preferences, pairs, 2)


def test_pairs_of_the_embedded_world_differ_in_how_helpful_they_are():
    rows = [row for row, _ in zip(bench.preferences(None, 20), range(30))]
    scores = [[toy.score("helpful", row["prompt"], row[key]) for key in ("response_a", "response_b")] for row in rows]
    assert len(rows) == 30 and all(better > worse for better, worse in scores)


def test_a_given_model_is_what_both_start_from(tmp_path, aligner):
    given = Llama(checkpoint.load(aligner).config, seed=5)
    checkpoint.save(given, tmp_path / "given")
    words = checkpoint.load_tokenizer(aligner)
    words.save(str(tmp_path / "given/tokenizer.json"))
    for tokenizer in (None, aligner / "tokenizer.json"):
        name, config, _ = bench.start(tmp_path, tmp_path / "given", tokenizer)
        assert name == "given" and config == given.config
        assert all(map(torch.equal, checkpoint.load(tmp_path).parameters(), given.parameters()))
        assert checkpoint.load_tokenizer(tmp_path).to_str() == words.to_str()


def test_dpo_is_compared_and_so_are_the_losses_of_both(tmp_path, monkeypatch, capsys, aligner):
    jobs = []

    def measured(kind, folder, device, peer=None, **job):
        jobs.append((kind, job))
        losses = [0.7, 0.6, 0.5, 0.4, 0.3 if kind == "train_ours" else 0.25]
        return dict(tokens=1000, seconds=1 if kind == "train_ours" else 2, losses=losses, peak=1.0)
    monkeypatch.setattr(bench, "measure", measured)
    bench.bench_dpo(tmp_path, "cpu", "python", 2, None, None, aligner)
    lines, what = words_of(capsys), f"dpo: {aligner.name}"
    assert lines[0] == f"{what}, fp32, loss of step 1 0.70000 0.70000 1.00 x steps 1 to 5: at most 5e-02 apart"
    assert [line.split(" step ")[1] for line in lines[1:4]] == [f"{n} 0.{8 - n}0000 0.{8 - n}0000 1.00 x"
                                                                for n in (2, 3, 4)]
    assert lines[4].startswith(f"{what}, real tokens/s 1,000 500 2.00 x ") and len(lines) == 5
    assert [job["precision"] for kind, job in jobs if kind == "train_ours"] == ["fp32"] + ["auto"] * 3
    assert all((job["beta"], job["lr"], job["batches"]) == (0.1, 1e-4, jobs[0][1]["batches"]) for _, job in jobs)
    tried = [{key: job[key] for key in ("bf16", "precompute", "together")} for kind, job in jobs if kind == "dpo_trl"]
    assert tried[:5] == [bench.LIKE_OURS, *bench.PREFERRING.values()] and len(tried) == 7
    bench.bench_dpo(tmp_path, "cpu", None, 2, None, None, aligner)
    assert words_of(capsys) == [f"{what}, real tokens/s 1,000 the reference once"], "without a peer, ours alone"


@pytest.fixture(scope="module")
def aligner(tmp_path_factory):
    """A folder with an untrained aligner of the embedded world's kind."""
    folder = tmp_path_factory.mktemp("aligner")
    tokenizer = toy.train_tokenizer(list(toy.pretraining_texts(100, 0)), 400)
    tokenizer.save(str(folder / "tokenizer.json"))
    checkpoint.save(Llama(Config(**{**SIZE, "vocab_size": 400}, model_type="qwen3", bos_token_id=0, eos_token_id=1,
                                 rope_theta=5e3, tie_word_embeddings=True, max_position_embeddings=1024)), folder)
    return folder


def test_the_aligner_is_timed_as_it_is_and_widened(tmp_path, aligner):
    (label, narrow), (wide_label, wide) = bench.aligners(tmp_path, aligner)
    small, big = checkpoint.load(narrow), checkpoint.load(wide)
    millions = sum(p.numel() for p in checkpoint.load(aligner).parameters()) / 1e6
    assert (label, wide_label) == (f"{millions:.1f}M", "40M")
    assert 35e6 < sum(p.numel() for p in big.parameters()) < 65e6
    assert (big.config.stop_ids, big.config.rope_theta, big.config.hidden_size) == ((1,), 5e3, 512)
    tokens = torch.randint(400, (1, 50), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(logits(big, tokens)[..., :400], logits(small, tokens), atol=1e-4)


def test_what_cannot_be_widened_is_told(tmp_path):
    for odd in (dict(hidden_size=1024), dict(num_attention_heads=2, head_dim=48), dict(attention_bias=True),
                dict(model_type="qwen2")):
        checkpoint.save(Llama(Config(**{**SIZE, **odd})), tmp_path / "odd")
        with pytest.raises(bench.UserError, match="cannot be widened"):
            bench.aligners(tmp_path, tmp_path / "odd")


@pytest.mark.slow
def test_aligning_is_compared_at_the_best_of_each(tmp_path, monkeypatch, capsys, aligner):
    took = {("align_ours", 32, None): 4.0, ("align_ours", 64, None): 8.0, ("align_transformers", 1, None): 32.0,
            ("align_transformers", 16, None): 10.0, ("align_transformers", 64, None): None,
            ("align_transformers", 1, 15): 8.0}
    jobs = []

    def measured(kind, folder, device, peer=None, **job):
        jobs.append((kind, job["batch"], job.get("lookup"), job["dtype"]))
        assert job["prompts"] == prompts and job.get("draft", 15) == 15
        written = [[place] if kind == "align_ours" else [place % 2] for place in range(len(job["prompts"]))]
        time = took.get((kind, job["batch"], job.get("lookup")), 1.0)
        return time and dict(seconds=time, written=written, copied=0.25, peak=1.0)
    prompts = bench.answer_prompts(bench.Writer(aligner, "cpu"), None, 4)
    monkeypatch.setattr(bench, "measure", measured)
    bench.bench_align(tmp_path, "cpu", "python", aligner, None, 4)
    lines, dtype = words_of(capsys), bench.dtype_of("cpu")
    assert lines[3:] == ["align: 40M, fp32, the same text 2 4 0.50 x one by one",
                         "align: 40M, fp32, the same text 2 4 0.50 x one by one, prompt lookup",
                         "align: 40M, answers/s 1.00 0.50 2.00 x batch 32, 25 % copied; 3 turns, 2.00 to 2.00 x; the "
                         "peer's best is one by one, prompt lookup (batch 16: 0.40, one by one: 0.12, one by one, "
                         "prompt lookup: 0.50)"]
    assert len(lines) == 6 and lines[0].startswith("align: 0.0M, fp32") and len(jobs) == 26
    assert jobs[:3] == [("align_transformers", 1, None, "float32"), ("align_transformers", 1, 15, "float32"),
                        ("align_ours", 4, None, "float32")]
    assert jobs[3:13] == [(*job, dtype) for job in (
        ("align_ours", 32, None), ("align_ours", 64, None), ("align_transformers", 16, None),
        ("align_transformers", 64, None), ("align_transformers", 1, None), ("align_transformers", 1, 15),
        *[("align_ours", 32, None), ("align_transformers", 1, 15)] * 2)]
    bench.bench_align(tmp_path, "cpu", None, aligner, None, 4)
    assert words_of(capsys)[1] == "align: 40M, answers/s 1.00 batch 32, 25 % copied"


def test_prompts_are_spread_over_the_answers(tmp_path, aligner):
    writer = bench.Writer(aligner, "cpu")
    rows = [{"prompt": f"Question {i}?", "responses": [{"text": f"Answer {i}." * (400 if i % 2 else 1)}]}
            for i in range(8)]
    answers = write(tmp_path / "answers.jsonl", *rows)
    texts = [writer.tokenizer.decode(ids) for ids in bench.answer_prompts(writer, answers, 2)]
    assert ["Answer 0." in texts[0], "Answer 4." in texts[1], len(texts)] == [True, True, 2], "1, 3, ... do not fit"
    assert all(data.OBJECTIVES[name].description in text for name in ("harmless", "helpful") for text in texts)
    with pytest.raises(bench.UserError, match="no answer that fits"):
        bench.answer_prompts(writer, write(tmp_path / "long.jsonl", rows[1]), 2)


def test_copying_is_compared_on_edits_that_keep_70_percent(tmp_path, monkeypatch, capsys, aligner):
    """A third of the edits drop 30 % of their answer, the others all or nothing. With guesses, both are twice as fast;
    the peer takes three times as long as ours."""
    found, jobs = [([5] * (i + 9), list(range(i, i + 20))) for i in range(60)], []
    edits = [answer[:(14, 0, 20)[i % 3]] for i, (_, answer) in enumerate(found)]

    def measured(kind, folder, device, peer=None, **job):
        guesses = job.get("draft", job.get("lookup"))
        jobs.append((kind, job["batch"], guesses, job["prompts"]))
        written = edits if len(jobs) == 1 else [[1] * 10] * len(job["prompts"])
        seconds = (1.0 if guesses else 2.0) * (1 if kind == "align_ours" else 3)
        return dict(seconds=seconds, written=written, copied=0.5 if guesses else 0.0)
    monkeypatch.setattr(bench, "measure", measured)
    monkeypatch.setattr(bench, "embedded_prompts", lambda writer, count: found)
    bench.bench_copy(tmp_path, "cpu", "python", aligner)
    chosen = [prompt for prompt, _ in found][::3]
    assert all(prompts == chosen[:16 if batch == 1 else 64] for _, batch, _, prompts in jobs[1:])
    ours, theirs = "align_ours", "align_transformers"
    assert [job[:3] for job in jobs[1:]] == [
        (ours, 1, 15), (theirs, 1, None), (theirs, 1, 15), *[(ours, 1, 15), (theirs, 1, 15)] * 2,
        *[(ours, 1, 0), (theirs, 1, None)] * 3, *[(ours, 16, 15), (ours, 16, 0)] * 3] * 2
    assert words_of(capsys)[3:] == [
        "copy: 40M, one sequence, new tokens/s 160 53 3.00 x 50 % copied; 3 turns, 3.00 to 3.00 x; the peer's best is "
        "one by one, prompt lookup (one by one: 27, one by one, prompt lookup: 53)",
        "copy: 40M, one sequence, without copying 80 27 3.00 x 0 % copied; 3 turns, 3.00 to 3.00 x; the peer's best is "
        "one by one",
        "copy: 40M, batch 16, against not copying 200 100 2.00 x 50 % copied; 3 turns, 2.00 to 2.00 x; the peer's best "
        "is ours"]
    jobs.clear()
    bench.bench_copy(tmp_path, "cpu", None, aligner)
    assert words_of(capsys)[0] == "copy: 0.0M, one sequence, new tokens/s 160 50 % copied"
