"""bench.py: that what is compared is the same thing, and the figures' arithmetic. Speeds are not tested."""
import json
import subprocess
import sys

import pytest
import torch

import bench
import model
from conftest import ROOT
from model import Config, Llama


def run(*words):
    return subprocess.run([sys.executable, ROOT / "bench.py", *map(str, words)], cwd=ROOT, capture_output=True,
                          text=True, timeout=120)


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


def unmasked(q, k, v, hidden):
    return model.sdpa(q, k.transpose(1, 2), v.transpose(1, 2))


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


def test_a_machine_is_measured(tmp_path):
    done = run("machine", "decode", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()[1:]]
    assert [row[0] for row in rows] == ["machine:", "machine:", "decode:"]


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
