"""Compiled training computes what plain training does; where nothing can be compiled, a line says so."""
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import checkpoint
import compiled
import toy
import train
from common import UserError
from lora import add_lora
from model import Config, Llama
from test_train import FAST, random_examples

ROOT = Path(__file__).parents[1]
SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
             num_key_value_heads=1, max_position_embeddings=512, bos_token_id=0, eos_token_id=1)


@pytest.fixture(scope="module")
def compiler():
    """Skips where there is none."""
    try:
        compiled.compile_blocks(Llama(Config(**SIZES)))
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def tokenizer():
    return toy.train_tokenizer(["a few words"], 300)


KINDS = {"plain": {}, "recomputed": dict(checkpoint_activations=True), "lora": dict(lora_rank=2)}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_training_finds_the_losses_of_plain_training(compiler, tokenizer, tmp_path, monkeypatch, kind):
    """Batches of three documents and of one, of every length up to 20; what is validated is never compiled. Adapters
    are traced and differentiated by the compiler, and no C++ is written of it, which takes a minute."""
    found = {}
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    if kind == "lora":
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    for compile in (False, True):
        llama = Llama(Config(**SIZES), 3)
        if kind == "lora":
            add_lora(llama, 2, "base")
        options = train.Options(**{**vars(FAST), "batch": 3, "compile": compile, **KINDS[kind]})
        stage = train.Stage("pretrain", random_examples(16), random_examples(4, 1))
        rows = train.train(llama, tokenizer, [stage], tmp_path / str(compile), options, progress=False)
        found[compile] = [row.get("loss", row.get("val_loss")) for row in rows]
        assert (llama.model.layers[0].parts is not None) == compile
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 1  # something was compiled
    assert len(found[True]) > 6 and found[True] == pytest.approx(found[False], rel=1e-5)


def test_a_compiled_block_without_gradients_is_the_plain_one(monkeypatch):
    """What is compiled is never called, so this needs no compiler."""
    monkeypatch.setattr(torch, "compile", lambda part, **how: part if part is torch.sin else lambda *given: 1 / 0)
    llama, tokens = Llama(Config(**SIZES)), torch.arange(2, 9)[None]
    plain = llama(tokens)
    compiled.compile_blocks(llama)
    with torch.no_grad():
        assert torch.equal(llama(tokens), plain)
    with pytest.raises(ZeroDivisionError):
        llama(tokens)


def test_without_a_compiler_a_line_says_so(tokenizer, tmp_path):
    """By the command, as a user on a machine without g++ would see it; nothing is left in the folder."""
    checkpoint.save(Llama(Config(**{**SIZES, "vocab_size": 512})), tmp_path / "base")
    tokenizer.save(str(tmp_path / "base/tokenizer.json"))
    (tmp_path / "texts.jsonl").write_text('{"text": "a few words"}\n' * 20)
    command = [sys.executable, ROOT / "train.py", "pretrain", "--model", tmp_path / "base", "--data",
               tmp_path / "texts.jsonl", "--out", tmp_path / "out", "--compile"]
    ended = subprocess.run(command, capture_output=True, text=True, env={
        **os.environ, "CXX": str(tmp_path / "none"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")})
    assert ended.returncode == 2
    assert ended.stderr.strip().splitlines()[-1].startswith("error: --compile: does not work here (InvalidCxxCompiler")
    assert not (tmp_path / "out").exists()
