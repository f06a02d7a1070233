"""Methods with a reference, through the training loop: against a closed form, and resumed, with and without LoRA."""
import math

import pytest
import torch

import checkpoint
import formats
import resume
import toy
import methods
import train
from common import write_jsonl
from conftest import refused, run
from model import logits
from test_train import FAST, metrics, pair_example, timeless, tiny, world  # noqa: F401 (a fixture)
from train import METHODS, Options, Stage


def all_pairs(reward):
    """Every two one-token responses to one prompt, labelled sigmoid(r_i - r_j); the tokens are 2, 3, ..."""
    chances = torch.sigmoid(reward[:, None] - reward).tolist()
    return [pair_example([2 + i], [2 + j], chances[i][j]) for i in range(len(reward)) for j in range(i)]


def dpo_run(llama, out, resume=False, **changes):
    options = Options(**{**vars(FAST), "lr": 1e-2, "batch": 10, "epochs": 60.0, "beta": 0.5, "samples": 0, **changes})
    examples = all_pairs(torch.tensor([0.8, -0.6, 0.1, -1.2, 0.9]))
    stage = Stage("dpo", examples, examples[:3], method=METHODS["dpo"])
    return train.train(llama, toy.train_tokenizer(["a b"], 300), [stage], out, options, resume, progress=False)


@pytest.mark.parametrize("rank", [0, 4])
def test_dpo_finds_the_optimum_of_reward_less_divergence(tmp_path, rank):
    """Over all that can be said: pi(y) ~ ref(y) exp(r(y) / beta), among the five responses that are compared."""
    checkpoint.save(tiny(8, num_hidden_layers=1), tmp_path / "base")
    options = Options(lora_rank=rank)
    llama = train.start_from(tmp_path / "base", "dpo", torch.device("cpu"), options)

    def said():
        with torch.no_grad():
            return logits(llama, torch.tensor([[7, 7, 7]]))[0, -1, 2:7].softmax(-1)
    before = said()
    rows = dpo_run(llama, tmp_path / "out", lora_rank=rank)
    optimum = (before.log() + torch.tensor([0.8, -0.6, 0.1, -1.2, 0.9]) / 0.5).softmax(-1)
    assert rows[0] == {"stage": "dpo", "step": 0, "val_loss": pytest.approx(math.log(2), abs=1e-6)}
    assert rows[1]["loss"] == pytest.approx(math.log(2), abs=1e-6), "the policy begins as the reference"
    assert (before - optimum).abs().sum() / 2 > 0.3 and (said() - optimum).abs().sum() / 2 < 0.01


@pytest.mark.parametrize("rank", [0, 4])
def test_a_resumed_run_keeps_its_first_reference(tmp_path, monkeypatch, rank):
    """The reference is what the run began from, not what it had become when it was killed."""
    checkpoint.save(tiny(8), tmp_path / "base")

    def begin():
        return train.start_from(tmp_path / "base", "dpo", torch.device("cpu"), Options(lora_rank=rank))
    whole = dpo_run(begin(), tmp_path / "whole", lora_rank=rank, save_seconds=0, epochs=9.0)
    write, rows = resume.Run.write, []

    def stop_half_way(run, row):
        write(run, row)
        rows.append(row)
        if len(rows) == 7:
            raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(resume.Run, "write", stop_half_way)
        dpo_run(begin(), tmp_path / "killed", lora_rank=rank, save_seconds=0, epochs=9.0)
    resumed = dpo_run(begin(), tmp_path / "killed", True, lora_rank=rank, save_seconds=0, epochs=9.0)
    assert timeless(resumed) == timeless(whole)


def test_dpo_from_the_command_line(world, tmp_path, monkeypatch, capsys):  # noqa: F811 (the same fixture)
    """Pairs in TRL's form; and the best of rated answers, of which one objective must be chosen."""
    rows = list(formats.read_rated(world / "rated.jsonl"))
    write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": row["prompt"], "chosen": row["responses"][0]["text"],
                                            "rejected": row["responses"][1]["text"]} for row in rows])
    words = ["dpo", "--model", world / "base", "--data", tmp_path / "pairs.jsonl", "--out", tmp_path / "out",
             "--batch", 4, "--lr", 1e-3, "--precision", "fp32", "--device", "cpu", "--beta", 0.2, "--val-share", 0.5]
    assert run(train, monkeypatch, words) == 0
    rows = metrics(tmp_path / "out")
    said = [row["loss"] for row in rows if "loss" in row]
    assert rows[0]["val_loss"] == pytest.approx(math.log(2), abs=1e-5) == said[0] and min(said) < 0.6
    words[words.index("--data") + 1] = world / "rated.jsonl"
    refused(train, monkeypatch, capsys, words, "rated.jsonl", "compares responses on ", "--principle")
    helpful = methods.preference_rows([world / "rated.jsonl"], Options(principle="helpful"))
    assert len(helpful) == 12 * 3 and {row["principle"] for row in helpful} == {"helpful"}
    assert run(train, monkeypatch, [*words, "--principle", "helpful", "--overwrite"]) == 0
