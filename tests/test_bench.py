"""bench.py: that what is compared is the same thing, and the figures' arithmetic. Speeds are not tested."""
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import bench
import model
import train
from conftest import ROOT
from model import Config, Llama


def run(*words):
    return subprocess.run([sys.executable, ROOT / "bench.py", *map(str, words)], cwd=ROOT, capture_output=True,
                          text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})  # as in conftest


@pytest.mark.parametrize("groups, tied", [(2, True), (4, False)])
def test_a_widened_model_computes_the_same(groups, tied):
    small = Llama(Config(vocab_size=30, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=groups, head_dim=8, tie_word_embeddings=tied))
    with torch.no_grad():
        for name, parameter in small.named_parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    wide = bench.widen(small, Config(vocab_size=50, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
                                     num_attention_heads=4, num_key_value_heads=4, head_dim=16))
    tokens = torch.randint(30, (2, 20), generator=torch.Generator().manual_seed(0))
    expected, found = small(tokens), wide(tokens)
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


def test_what_an_edit_keeps():
    assert bench.kept([1, 2, 3, 4], [1, 2, 9, 4]) == 0.75
    assert bench.kept([1, 2], [3]) == 0 and bench.kept([1, 2], [0, 1, 2, 5, 5]) == 1


def test_transformers_writes_the_same_edits(tmp_path):
    """Both jobs on one small model in fp32: what is timed is the same work."""
    pytest.importorskip("transformers")
    llama = Llama(Config(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2))
    llama.save_pretrained(tmp_path)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 40, (length,), generator=generator).tolist() for length in (5, 30, 12, 9)]
    job = {"prompts": prompts, "new_tokens": 16, "dtype": "float32", "batch": 3, "draft": 7, "passes": 1}
    ours, theirs = bench.align_ours(job, tmp_path, "cpu"), bench.align_transformers(job, tmp_path, "cpu")
    assert ours["written"] == theirs["written"] and any(ours["written"])


SIZE = dict(vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
KERNELS = dict(config=SIZE, cache=(3, 50), prompts=[9, 5, 3], documents=(4, 7), rows=(2, 20), least=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kernels_are_timed_at_any_size(dtype):
    found = bench.kernels({**KERNELS, "dtype": dtype}, None, "cpu")
    assert len(found) == 5 and all(min(ours, theirs) > 0 for _, _, ours, theirs in found)


def unmasked(q, k, v, hide):
    return model.sdpa(q[:, None], k.transpose(1, 2), v.transpose(1, 2), scale=1.0)[:, 0]


def seeing_the_future(q, k, v):
    return model.sdpa(q, k, v, is_causal=not q.requires_grad)


def of_three_tokens(llama, cache, prompts):
    return llama(torch.tensor([prompt[-3:] for prompt in prompts]))[:, -1]


@pytest.mark.parametrize("name, wrong, what", [
    ("cached_attention", unmasked, "cache"), ("prefill", of_three_tokens, "prefill"),
    ("causal_attention", seeing_the_future, "training")])
def test_a_kernel_that_gives_something_else_is_not_timed(monkeypatch, name, wrong, what):
    monkeypatch.setattr(model, name, wrong)
    with pytest.raises(SystemExit, match=f"{what}.*not what the plain way gives"):
        bench.kernels({**KERNELS, "dtype": "float32"}, None, "cpu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_are_timed_at_any_size(tmp_path, dtype):
    job = dict(config=SIZE, adapters=3, rank=2, tokens=7, answers=(1, 5), calls=2, dtype=dtype)
    found = bench.adapters(job, tmp_path, "cpu")
    assert [answers for answers, _, _ in found] == [1, 5] and all(min(times) > 0 for _, *times in found)


def test_adapters_that_score_something_else_are_not_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(model.LoraLinear, "forward", lambda self, x: torch.nn.functional.linear(x, self.weight))
    scores = model.document_scores
    monkeypatch.setattr(model, "document_scores", lambda *args: scores(*args).roll(1))
    with pytest.raises(AssertionError):
        bench.adapters(dict(config=SIZE, adapters=3, rank=2, tokens=7, answers=(2,), calls=2, dtype="float32"), tmp_path, "cpu")


def test_large_shapes_have_the_published_numbers_of_parameters():
    for name, published in (("1.1B", 1_100_048_384), ("7B", 6_738_415_616)):
        label, size = bench.shape(name, "cuda")
        with torch.device("meta"):
            assert label == name and sum(p.numel() for p in Llama(Config(**size)).parameters()) == published
        assert bench.shape(name, "cpu") == ("40M", bench.SIZE)


@pytest.mark.parametrize("dtype, tied", [(torch.float32, False), (torch.bfloat16, True)])
def test_a_fresh_model_lacks_nothing(dtype, tied):
    """It is made on no device at first, which must not be where its rotation or its tied head stay."""
    size = dict(SIZE, tie_word_embeddings=tied)
    llama = bench.fresh(size, dtype, "cpu")
    expected = Llama(Config(**size)).frequencies
    assert torch.equal(llama.frequencies, expected) and llama.frequencies.dtype == torch.float32
    assert (llama.lm_head.weight is llama.model.embed_tokens.weight) == tied
    for name, parameter in llama.named_parameters():
        assert parameter.dtype == dtype and parameter.device.type == "cpu" and parameter.requires_grad, name
        assert (parameter == 1).all() if "norm" in name else 0.01 < parameter.std() < 0.03, name


@pytest.mark.parametrize("chosen", [
    {}, dict(bf16_moments=True, checkpoint_activations=True), dict(lora_rank=3, clip=0.1), dict(precision="fp32")])
def test_a_timed_step_is_one_of_training(tmp_path, chosen):
    """Two steps of train.train, in which the learning rate is still the highest, leave the same weights."""
    options = train.Options(**{"lr": 1e-2, "warmup": 0, "batch": 6, "epochs": 1, "micro_tokens": 30, "clip": 0.5,
                               "weight_decay": 0.1, "precision": "bf16", **chosen})
    generator = torch.Generator().manual_seed(0)
    examples = [(torch.randint(60, (length,), generator=generator).tolist(), length % 4) for length in range(5, 17)]
    stage, llamas = train.Stage("sft", examples), []
    for _ in range(2):
        llama = Llama(Config(**SIZE))
        llamas.append(model.add_lora(llama, options.lora_rank, tmp_path) if options.lora_rank else llama)
    tokenizer = SimpleNamespace(to_str=lambda: "{}")
    rows = train.train(llamas[0], tokenizer, [stage], tmp_path / "out", options, progress=False)
    assert [row["lr"] for row in rows] == [1e-2, 1e-2] and max(row["grad_norm"] for row in rows) > options.clip
    batches = [train.examples_of(stage, step, options) for step in range(2)]
    bench.timed_steps({"batches": batches}, llamas[1], options, "cpu")
    assert llamas[1].checkpoint_activations == options.checkpoint_activations
    untrained = dict(Llama(Config(**SIZE)).named_parameters())
    for (name, expected), found in zip(llamas[0].named_parameters(), llamas[1].parameters()):
        assert torch.equal(expected, found), name
        assert name not in untrained or torch.equal(found, untrained[name]) == bool(options.lora_rank), name


def here(kind, folder, args, **job):
    """As bench.measure, but in this process."""
    return bench.JOBS[kind](json.loads(json.dumps(job)), folder, args.device)


ARGS = SimpleNamespace(device="cpu", steps=1, peer=None)
RATES = {"flops": 1e9, "bytes": 1e9}


def test_lora_moves_its_adapters_alone(tmp_path, monkeypatch):
    moved, steps = {}, bench.timed_steps

    def watched(job, llama, options, device):
        before = {name: parameter.detach().clone() for name, parameter in llama.named_parameters()}
        found = steps(job, llama, options, device)
        moved.update({name: not torch.equal(before[name], now) for name, now in llama.named_parameters()})
        return found
    monkeypatch.setattr(bench, "timed_steps", watched)
    job = dict(config=SIZE, batches=bench.random_batches(60, [7, 5], 4), options=dict(lora_rank=2))
    found = here("large", tmp_path, ARGS, **job)
    assert found["tokens"] == 2 * 12 and found["seconds"] > 0 and found["peak"] > 0
    assert any(moved.values()) and all(was == ("lora_" in name) for name, was in moved.items()), moved


def test_large_models_give_figures(tmp_path, monkeypatch, capsys):
    jobs = []
    monkeypatch.setattr(bench, "SIZE", SIZE)
    monkeypatch.setattr(bench, "measure", lambda *words, **job: jobs.append(job) or here(*words, **job))
    bench.bench_large(ARGS, tmp_path, RATES)
    bench.bench_decode(ARGS, tmp_path, RATES)
    lines = capsys.readouterr().out.splitlines()
    assert [line[:46].rstrip() for line in lines] == [
        "large: full, 40M, 2,048 tokens, real tokens/s", "large: full, 40M, lean, GiB",
        "large: LoRA of rank 16, 40M, GiB", "decode: 40M, one sequence, tokens/s"]
    assert all(float(line[46:60].replace(",", "")) > 0 for line in lines)
    assert "% of the matrix product" in lines[0] and "% of the copy" in lines[3]
    for job in jobs[:3]:
        for examples in job["batches"]:
            packed = list(train.pack(examples, job["options"]["micro_tokens"], torch.device("cpu")))
            assert [len(batch.tokens) for batch in packed] == [2048] * len(packed)
            assert all(len(batch.targets) == 2048 - len(batch.lengths) for batch in packed)


def test_on_a_gpu_the_shapes_are_large(tmp_path, monkeypatch, capsys):
    """Nothing is run: what would be, and the line of a step of 16,384 tokens in a second."""
    jobs = []
    monkeypatch.setattr(bench, "measure", lambda *_, **job: jobs.append(job) or dict(tokens=16384, seconds=1, peak=9.5))
    bench.bench_large(SimpleNamespace(device="cuda", steps=1, peer=None), tmp_path, {"flops": 4e14})
    assert [job["config"]["num_hidden_layers"] for job in jobs] == [22, 22, 32]
    packed = [[batch.lengths for batch in train.pack(job["batches"][0], job["options"]["micro_tokens"],
                                                     torch.device("cpu"))] for job in jobs]
    assert packed == [[[700] * 8 + [1348] * 8], [[700, 1348], [2048]], [[700, 1348], [2048]]]
    assert jobs[0]["options"]["compile"] and not jobs[0]["options"].get("checkpoint_activations")
    first, lean, lora = capsys.readouterr().out.splitlines()
    # Weights but the embedding and norms, 8 rows of 2,048 tokens less two; half of the scores are not computed.
    multiplied = (1_100_048_384 - 32000 * 2048 - 45 * 2048) * 16384 - 32000 * 2048 * 16
    multiplied += 22 * 8 * 2 * 2048 * (700**2 + 1348**2) / 2
    share = f"{100 * 6 * multiplied / 4e14:.0f}"
    assert " ".join(first.split()) == ("large: full, 1.1B, 2,048 tokens, real tokens/s 16,384 "
                                       f"{share} % of the matrix product; 9.5 GiB")
    assert " ".join(lean.split()) == "large: full, 1.1B, lean, GiB 9.5 16,384 tokens/s"
    assert " ".join(lora.split()) == "large: LoRA of rank 16, 7B, GiB 9.5 16,384 tokens/s"


def test_a_job_without_memory_is_told_and_passed_over(tmp_path, monkeypatch, capsys):
    """The middle one of the three asks for more than any machine has, in a process of its own; the others go on."""
    measure = bench.measure

    def short_of_memory(*words, **job):
        if "bf16_moments" not in job["options"]:
            return here(*words, **job)
        return measure(*words, **{**job, "config": dict(SIZE, vocab_size=2**42)})
    monkeypatch.setattr(bench, "SIZE", SIZE)
    monkeypatch.setattr(bench, "measure", short_of_memory)
    bench.bench_large(ARGS, tmp_path, RATES)
    lines = capsys.readouterr().out.splitlines()
    assert ["failed: " in line for line in lines] == [False, True, False]
    assert lines[1].startswith("large: full, 40M, lean, GiB  ") and "memory" in lines[1]


def test_what_precedes_the_first_tokens_is_not_in_the_time_of_one(tmp_path, monkeypatch):
    now = 0.0

    def generate(llama, prompts, count, stop_ids, draft):
        nonlocal now
        assert len(prompts) == 1 and stop_ids == () and draft == 0
        now += 7 + count / 2
    monkeypatch.setattr(model, "generate", generate)
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now)
    found = here("decode", tmp_path, ARGS, config=SIZE, dtype="bfloat16")
    blocks = 2 * (4 * 32 * 32 + 3 * 32 * 48 + 2 * 32)
    assert found == {"seconds": 0.5, "bytes": 2 * (blocks + 32 + 60 * 32)}


def test_a_machine_is_measured(tmp_path):
    done = run("machine", "decode", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()[1:]]
    assert [row[0] for row in rows] == ["machine:", "machine:", "decode:"] and "failed" not in done.stdout


def test_bad_input_gets_one_line(tmp_path):
    for words, said in ((["flying"], "no such part"), (["copy", "--aligner", tmp_path], "make train"),
                        (["train", "--pairs", "x.jsonl"], "--tokenizer"), (["machine", "--device", "abacus"], "abacus")):
        done = run(*words)
        assert done.returncode == 2 and said in done.stderr.strip().splitlines()[-1], done.stderr
        assert "Traceback" not in done.stderr


def test_a_peer_that_fails_is_told_and_passed_over(tmp_path, capsys):
    class Args:
        device, peer = "cpu", "/bin/false"
    assert bench.measure("train_trl", tmp_path, Args, peer=True, batches=[]) is None
    assert "train_trl: failed" in capsys.readouterr().err
    assert json.loads((tmp_path / "job.json").read_text())["device"] == "cpu"
