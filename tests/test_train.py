"""The training loop: its parts against figures worked out by hand, and whole runs against interrupted ones."""
import gzip
import json
import math
import os
import re
import subprocess
import sys
import types
from array import array
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import checkpoint
import data
import folders
import formats
import toy
import methods
import train
from common import UserError, read_options, write_jsonl
from conftest import refused, run
from data import Document, Example
from model import Config, Llama, generate, logits
from train import METHODS, Method, Options, Stage

ROOT = Path(__file__).parents[1]
SIZES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
             max_position_embeddings=512, bos_token_id=0, eos_token_id=1)
FAST = Options(lr=3e-3, batch=4, max_tokens=512, val_share=0.2, val_every=3, epochs=1.0, precision="fp32", warmup=0.2)


def tiny(vocab_size=64, seed=0, **changes):
    return Llama(Config(vocab_size=vocab_size, **{**SIZES, **changes}), seed)


def random_examples(count, seed=0, longest=20):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, longest, (count,), generator=generator).tolist()
    return [text_example(torch.randint(2, 64, (n,), generator=generator).tolist(), n // 2) for n in lengths]


def text_example(ids, start):
    return Example([Document(array("i", ids), start)])


def text(example):
    """The token ids of an example of one document."""
    document, = example.documents
    return document.ids


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with "init" (no weights), "base" (a tiny Llama), texts.jsonl, rated.jsonl and pairs.jsonl."""
    folder = tmp_path_factory.mktemp("world")
    texts = list(toy.pretraining_texts(60, 0))
    tokenizer = toy.train_tokenizer(texts, 1200)
    llama = tiny(tokenizer.get_vocab_size(), tie_word_embeddings=True)
    for name in ("init", "base"):
        checkpoint.save(llama, folder / name)
        tokenizer.save(str(folder / name / "tokenizer.json"))
    (folder / "init" / "model.safetensors").unlink()
    objectives = [toy.OBJECTIVES[name] for name in toy.NAMED]
    write_jsonl(folder / "texts.jsonl", ({"text": text} for text in texts))
    write_jsonl(folder / "rated.jsonl", toy.rated(12, 1, responses=3))
    write_jsonl(folder / "pairs.jsonl", data.reformulate(formats.read_rated(folder / "rated.jsonl"), objectives))
    return folder


def command(world, stage="aligner", out="out", model_folder="base", **changes):
    """The words of a command line for a run of a few seconds."""
    files = {"pretrain": "texts.jsonl", "sft": "rated.jsonl", "aligner": "pairs.jsonl"}
    settings = {"lr": 3e-3, "batch": 4, "max-steps": 4, "val-share": 0.2, "val-every": 3, "save-seconds": 0,
                "device": "cpu", **({"warmup-data": 1.0} if stage == "aligner" else {}), **changes}
    words = [stage, "--model", world / model_folder, "--data", world / files[stage], "--out", out]
    words += [word for name, value in settings.items() if value is not None for word in (f"--{name}", value)]
    return [str(word) for word in words]


def metrics(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def timeless(rows):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def weights(folder):
    return (Path(folder) / "model.safetensors").read_bytes()


# ----------------------------------------------------------------------------- the parts, by hand


def test_learning_rate_rises_linearly_and_falls_as_a_cosine():
    options = Options(lr=8.0, warmup=0.2)
    rates = [train.learning_rate(step, 10, options) for step in range(10)]
    cosine = [4 * (1 + math.cos(math.pi * part / 8)) for part in range(8)]
    assert rates == pytest.approx([4.0, 8.0, *cosine])
    assert rates[6] == pytest.approx(4.0)  # half-way down
    assert [train.learning_rate(step, 1, options) for step in range(1)] == [8.0]
    assert train.learning_rate(0, 100, Options(lr=1.0, warmup=0.05)) == pytest.approx(0.2)


@pytest.mark.parametrize("count, batch", [(12, 4), (10, 4), (3, 8)])
def test_each_epoch_covers_every_example_once(count, batch):
    stage, options = Stage("s", random_examples(count)), Options(batch=batch, seed=3)
    drawn = [id(example) for step in range(3 * count) for example in train.examples_of(stage, step, options)]
    everything = sorted(map(id, stage.examples))
    epochs = [drawn[start:start + count] for start in range(0, len(drawn), count)]
    assert len(epochs) == 3 * batch and all(sorted(epoch) == everything for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1  # in another order each time


@pytest.mark.parametrize("share", [0.25, 0.99])
def test_an_epoch_covers_every_example_beside_replayed_texts(share):
    """Also where next to nothing of a batch is left for them."""
    stage = Stage("s", random_examples(22), replay=random_examples(5, 1), replay_share=share)
    options = Options(batch=4, epochs=1.0)
    drawn = [id(example) for step in range(train.steps_in(stage, options))
             for example in train.examples_of(stage, step, options)]
    assert set(map(id, stage.examples)) <= set(drawn)
    own = [example for example in drawn if example in set(map(id, stage.examples))]
    assert len(own) < 22 + 4, "and hardly any of them twice"


def test_examples_depend_on_seed_and_step_alone():
    stage = Stage("s", random_examples(30), replay=random_examples(9, 1), replay_share=0.25)
    first = [train.examples_of(stage, step, Options(batch=8)) for step in range(6)]
    torch.manual_seed(99)
    assert train.examples_of(stage, 4, Options(batch=8)) == first[4]
    assert train.examples_of(stage, 4, Options(batch=8, seed=1)) != first[4]
    replayed = set(map(id, stage.replay))
    assert [sum(id(example) in replayed for example in examples) for examples in first] == [2] * 6


def test_pack_keeps_to_the_budget_and_loses_nothing():
    examples = random_examples(40) + [text_example(range(2, 62), 7)]  # one longer than the budget
    batches = list(train.pack(examples, 50, "cpu"))
    for batch in batches:
        assert len(batch.tokens) == sum(batch.lengths)
        assert len(batch.tokens) <= 50 or len(batch.lengths) == 1
    parts = [part.tolist() for batch in batches for part in batch.tokens.split(batch.lengths)]
    assert sorted(parts) == sorted(text(example).tolist() for example in examples)


def test_targets_are_the_completions_and_never_a_first_token():
    batch, = train.pack([text_example([5, 6, 7, 8], 2), text_example([9, 10, 11], 0)], 100, "cpu")
    assert batch.tokens.tolist() == [9, 10, 11, 5, 6, 7, 8] and batch.lengths == [3, 4]
    assert batch.targets.tolist() == [1, 2, 5, 6] and batch.document.tolist() == [0, 0, 1, 1]
    assert batch.pairs is None and batch.count == 4


def pair_example(first, second, label, prompt=(7, 7, 7)):
    """Two responses (token ids) to one prompt."""
    return Example([Document(array("i", [*prompt, *ids]), len(prompt)) for ids in (first, second)], label)


def test_pairs_find_their_documents_and_sum_over_their_targets():
    examples = [pair_example([8] * 9, [9], 0.9), pair_example([10], [11] * 5, 0.2)]
    batch, = train.pack(examples, 1000, "cpu")
    assert batch.lengths == [4, 4, 8, 12] and batch.count == 2
    starts = torch.tensor(batch.lengths).cumsum(0) - torch.tensor(batch.lengths)
    said = batch.tokens[starts[batch.pairs] + 3]  # the first token of each response
    pairs = [[8, 9], [10, 11]] if batch.labels.tolist() == pytest.approx([0.9, 0.2]) else [[10, 11], [8, 9]]
    assert said.tolist() == pairs
    sums = batch.by_pair(torch.ones(len(batch.targets)))
    assert sums.tolist() == [[{8: 9, 9: 1, 10: 1, 11: 5}[token] for token in row] for row in pairs]


def test_cross_entropy_is_that_of_a_padded_batch():
    """Values and gradients against torch's own, on rows padded at the right, with ignore_index."""
    llama, examples = tiny(), random_examples(7)
    batch, = train.pack(examples, 10_000, "cpu")
    loss = train.batch_loss(llama, batch, METHODS["sft"], FAST)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in llama.named_parameters()}
    llama.zero_grad()
    longest = max(len(text(example)) for example in examples)
    tokens, labels = torch.zeros(7, longest, dtype=torch.long), torch.full((7, longest), -100)
    for row, example in enumerate(examples):
        ids, start = text(example), example.documents[0].start
        tokens[row, :len(ids)] = torch.tensor(list(ids))
        labels[row, start:len(ids)] = torch.tensor(list(ids[start:]))
    expected = F.cross_entropy(logits(llama, tokens)[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100,
                               reduction="sum")
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in llama.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-4)


def test_micro_batches_add_up_to_one_batch(tmp_path, world):
    """The same steps whatever the accumulation: same losses, gradient norms and weights, to rounding."""
    tokenizer, results = checkpoint.load_tokenizer(world / "base"), []
    for number, micro_tokens in enumerate((10_000, 40, 1)):
        llama, stage = tiny(), Stage("pretrain", random_examples(12), random_examples(4, 1))
        options = Options(**{**vars(FAST), "micro_tokens": micro_tokens})
        rows = train.train(llama, tokenizer, [stage], tmp_path / str(number), options, progress=False)
        assert len({len(list(train.pack(stage.examples, n, "cpu"))) for n in (10_000, 40, 1)}) == 3
        results.append(([row.get("loss", row.get("val_loss")) for row in rows],
                        [row["grad_norm"] for row in rows if "loss" in row], llama.state_dict()))
    for losses, norms, state in results[1:]:
        assert losses == pytest.approx(results[0][0], rel=1e-5) and norms == pytest.approx(results[0][1], rel=1e-4)
        for name, tensor in state.items():
            torch.testing.assert_close(tensor, results[0][2][name], rtol=1e-4, atol=1e-5)


def test_identity_rows_ask_for_the_answer_itself(world):
    rows = methods.identity_rows([world / "pairs.jsonl"], Options(warmup_data=1.0))
    assert len(rows) > 20 and all(row["relation"] == "equal" for row in rows)
    for row in rows:
        assert row["completion"] and row["prompt"].endswith(f"Answer: {row['completion']}\n\nEdited answer:")
    part = methods.identity_rows([world / "pairs.jsonl"], Options(warmup_data=0.25, seed=1))
    assert len(part) == math.ceil(0.25 * len(rows)) and all(row in rows for row in part)
    assert part != methods.identity_rows([world / "pairs.jsonl"], Options(warmup_data=0.25, seed=2))


def test_each_step_has_its_own_pairs(world):
    pairs = list(formats.read_pairs(world / "pairs.jsonl"))
    equal, better = (METHODS[name].rows([world / "pairs.jsonl"], Options()) for name in ("equal", "better"))
    assert len(equal) + len(better) == len(pairs) and {row["relation"] for row in better} == {"better"}
    partner = methods.partner_rows([world / "pairs.jsonl"], Options(warmup_data=0.5))
    assert all(row in equal for row in partner) and len(partner) == math.ceil(len(equal) / 2)


def test_no_held_out_prompt_is_trained_on(world):
    tokenizer, rows = checkpoint.load_tokenizer(world / "base"), methods.better_rows([world / "pairs.jsonl"], Options())
    stage = train.prepare("better", rows, tokenizer, Config(**SIZES), FAST)
    questions = [row["prompt"] for row in formats.read_rated(world / "rated.jsonl")]

    def asked(examples):
        texts = [tokenizer.decode(text(example)) for example in examples]
        return {question for question in questions if any(question.strip() in said for said in texts)}
    assert stage.examples and stage.held_out and len(stage.examples) + len(stage.held_out) == len(rows)
    assert asked(stage.examples) and asked(stage.held_out) and not asked(stage.examples) & asked(stage.held_out)


def test_examples_end_at_max_tokens_and_longer_ones_lengthen_the_models_context(world, capsys):
    tokenizer = checkpoint.load_tokenizer(world / "base")
    rows = [{"prompt": "", "completion": "answer " * count} for count in (5, 700, 2000)]
    config = Config(**SIZES)
    before, options = config.max_position_embeddings, Options(val_share=0.0, max_tokens=1500)
    stage = train.prepare("pretrain", rows, tokenizer, config, options)
    lengths = sorted(len(text(example)) for example in stage.examples)
    assert len(lengths) == 2 and "1 of 3 examples left out: over 1500 tokens" in capsys.readouterr().out
    assert config.max_position_embeddings == lengths[-1] > before


# ----------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """An aligner trained without interruption by the command line, in bf16."""
    out = tmp_path_factory.mktemp("finished") / "aligner"
    with pytest.MonkeyPatch.context() as patch:
        assert run(train, patch, command(world, out=out)) == 0
    return out


def test_metrics_have_a_row_per_step_and_per_validation(finished):
    rows = metrics(finished)
    expected = [(name, kind, step) for name in ("identity", "equal", "better")
                for kind, step in (("val_loss", 0), ("loss", 1), ("loss", 2), ("loss", 3), ("val_loss", 3), ("loss", 4),
                                   ("val_loss", 4))]
    assert [(row["stage"], "loss" if "loss" in row else "val_loss", row["step"]) for row in rows] == expected
    for row in rows:
        keys = {"stage", "step", "val_loss", "samples"} if "val_loss" in row else \
            {"stage", "step", "loss", "lr", "grad_norm", "tokens", "seconds"}
        assert set(row) == keys and all(map(math.isfinite, (row[key] for key in keys - {"stage", "samples"})))
    for name in ("identity", "equal", "better"):  # tokens and seconds are counted from the stage's beginning
        of_stage = [row for row in rows if row["stage"] == name and "loss" in row]
        assert all(a["tokens"] < b["tokens"] and a["seconds"] <= b["seconds"] for a, b in zip(of_stage, of_stage[1:]))
        assert of_stage[0]["lr"] == pytest.approx(3e-3)  # one step of warm-up


def test_samples_are_greedy_continuations_of_held_out_prompts(world, tmp_path, monkeypatch, capsys):
    """Of the last validation, by the model that was saved, written the plain way."""
    words = command(world, "sft", tmp_path / "out", precision="fp32", samples=2, **{"val-share": 0.5, "max-steps": 2})
    assert run(train, monkeypatch, words) == 0
    rows = methods.sft_rows([world / "rated.jsonl"], Options())
    held_out = list(dict.fromkeys(row["prompt"] for row in rows if data.is_held_out(row, 0.5, 0)))[:2]
    llama, last = checkpoint.load(tmp_path / "out"), [row for row in metrics(tmp_path / "out") if "samples" in row][-1]
    tokenizer = checkpoint.load_tokenizer(tmp_path / "out", llama)
    prompts = [[0, *tokenizer.encode(prompt).ids] for prompt in held_out]
    written = generate(llama, prompts, train.SAMPLE, stop_ids=llama.config.stop_ids)
    assert len(held_out) == 2 and last["step"] == 2
    assert last["samples"] == [{"prompt": prompt, "text": tokenizer.decode(new)}
                               for prompt, new in zip(held_out, written)]
    assert "out: sft, step 2: " in capsys.readouterr().out
    assert "samples" not in json.loads((tmp_path / "out" / "run.json").read_text())["last"]


@pytest.mark.parametrize("context", [40, 16, 10])
def test_samples_end_where_the_context_does(context):
    """A sliding window is not computed beyond it."""
    llama = Llama(Config(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, eos_token_id=None,
                         num_attention_heads=2, max_position_embeddings=100, model_type="mistral",
                         sliding_window=context))
    documents = [data.Document(array("i", range(2, 2 + size)), size - 1) for size in (5, 11)]
    stage = train.Stage("sft", [], [data.Example([document]) for document in documents])
    words = types.SimpleNamespace(decode=lambda ids: " ".join(map(str, ids)))
    samples = train.write_samples(llama, words, stage, train.Options(precision="fp32"))
    lengths = [(len(sample["prompt"].split()), len(sample["text"].split())) for sample in samples]
    assert lengths == [(4, context - 10), (10, context - 10)]


def test_samples_change_nothing_else(world, tmp_path, monkeypatch, finished):
    for count in (0, 7):
        out = tmp_path / str(count)
        assert run(train, monkeypatch, command(world, out=out, samples=count)) == 0
        rows = metrics(out)
        assert weights(out) == weights(finished)
        told, before = ([{key: value for key, value in row.items() if key != "samples"} for row in found]
                        for found in (rows, metrics(finished)))
        assert timeless(told) == timeless(before)
        assert any("samples" in row for row in rows) == (count > 0)
    texts = [row for row in rows if "samples" in row]  # of seven prompts that were asked for, as many as there are
    assert len({len(row["samples"]) for row in texts[:3]}) == 1 and 0 < len(texts[0]["samples"]) <= 7


def test_scorers_and_runs_without_held_out_rows_write_no_samples(world, tmp_path, monkeypatch):
    tokenizer, llama = checkpoint.load_tokenizer(world / "base"), checkpoint.load(world / "base", scorer=True)
    rows = [{"prompt": f"question {i}", "response_a": "good", "response_b": "bad", "p_a": 0.9} for i in range(20)]
    options = Options(lr=1e-3, batch=4, max_steps=2, val_share=0.3)
    stage = train.prepare("reward", rows, tokenizer, llama.config, options)
    found = train.train(llama, tokenizer, [stage], tmp_path / "pm", options, progress=False)
    assert any("val_loss" in row for row in found) and not any("samples" in row for row in found)
    assert run(train, monkeypatch, command(world, "pretrain", tmp_path / "all", **{"val-share": 0})) == 0
    assert not any("samples" in row for row in metrics(tmp_path / "all"))
    assert run(train, monkeypatch, command(world, "pretrain", tmp_path / "texts")) == 0  # of a text, its beginning
    texts = [json.loads(line)["text"] for line in open(world / "texts.jsonl", encoding="utf-8")]
    told = [sample["prompt"] for row in metrics(tmp_path / "texts") for sample in row.get("samples", ())]
    assert told and all(prompt and any(text.startswith(prompt) for text in texts) for prompt in told)


def test_tokens_are_real_ones(world, finished):
    """Counted here by the tokenizer alone: prompt, completion, BOS and EOS of the examples that were drawn."""
    tokenizer, options = checkpoint.load_tokenizer(world / "base"), Options(batch=4, val_share=0.2, max_tokens=4096)
    rows = methods.better_rows([world / "pairs.jsonl"], Options())
    stage = train.prepare("better", rows, tokenizer, Config(**SIZES), options)
    length = {}
    for row in rows:
        ids = [tokenizer.encode(row[key]).ids for key in ("prompt", "completion")]
        length[tuple(ids[0] + ids[1])] = len(ids[0]) + len(ids[1]) + 2
    drawn = [sum(length[tuple(text(example)[1:-1])] for example in train.examples_of(stage, step, options))
             for step in range(4)]
    counted = [row["tokens"] for row in metrics(finished) if row["stage"] == "better" and "loss" in row]
    assert counted == [sum(drawn[:n + 1]) for n in range(4)]


def test_a_trained_model_is_an_ordinary_folder(world, finished):
    llama = checkpoint.load(finished)
    tokenizer, before = checkpoint.load_tokenizer(finished, llama), checkpoint.load(world / "base")
    assert tokenizer.to_str() == checkpoint.load_tokenizer(world / "base").to_str()
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in llama.parameters())
    assert not torch.equal(llama.lm_head.weight, before.lm_head.weight)
    assert sorted(path.name for path in finished.iterdir()) == \
        ["README.md", "chat_template.jinja", "config.json", "generation_config.json", "metrics.jsonl",
         "model.safetensors", "run.json", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"]


def test_autocast_computes_in_bf16_over_fp32_weights(world, tmp_path, finished):
    seen = Counter()

    tokenizer = checkpoint.load_tokenizer(world / "base")
    losses = {}
    for precision in ("bf16", "fp32"):
        llama = tiny()
        llama.model.layers[0].mlp.down_proj.register_forward_hook(lambda *a: seen.update([a[2].dtype]))
        stage = Stage("pretrain", random_examples(8), random_examples(4, 1))
        options = Options(**{**vars(FAST), "precision": precision})
        rows = train.train(llama, tokenizer, [stage], tmp_path / precision, options, progress=False)
        losses[precision] = [row["val_loss"] for row in rows if "val_loss" in row]
        assert {p.dtype for p in llama.parameters()} == {torch.float32}
        assert set(seen) == {torch.bfloat16 if precision == "bf16" else torch.float32}
        seen.clear()
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02) and losses["bf16"] != losses["fp32"]


def test_activation_checkpointing_changes_nothing(world, tmp_path):
    runs = []
    for again in (False, True):
        options, llama = Options(**{**vars(FAST), "checkpoint_activations": again}), tiny()
        calls = Counter()
        llama.model.layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.update(["mlp"]))
        rows = train.train(llama, checkpoint.load_tokenizer(world / "base"), [Stage("pretrain", random_examples(12))],
                           tmp_path / str(again), options, progress=False)
        runs.append((timeless(rows), calls["mlp"]))
    assert runs[0][0] == runs[1][0] and (runs[0][1], runs[1][1]) == (3, 6)  # each block is computed twice


def test_training_learns(world, tmp_path):
    """Over and over the same few examples: their loss goes to nearly nothing."""
    options = Options(lr=1e-2, batch=4, epochs=60.0, val_share=0.0, precision="bf16")
    rows = train.train(tiny(), checkpoint.load_tokenizer(world / "base"), [Stage("pretrain", random_examples(4))],
                       tmp_path / "out", options, progress=False)
    assert rows[0]["loss"] > 3.5 and rows[-1]["loss"] < 0.2


@pytest.mark.parametrize("left_out", ["identity", "equal", "better"])
def test_each_step_of_the_aligner_can_be_left_out(world, tmp_path, monkeypatch, left_out):
    steps = [name for name in ("identity", "equal", "better") if name != left_out]
    warmup = 1.0 if "identity" in steps else None
    words = command(world, out=tmp_path / "out", **{"max-steps": 1, "warmup-data": warmup}) + ["--steps", *steps]
    assert run(train, monkeypatch, words) == 0
    assert list(dict.fromkeys(row["stage"] for row in metrics(tmp_path / "out"))) == steps


def test_pairs_without_equal_ones_train_the_last_step(world, tmp_path, monkeypatch, capsys):
    """Two answers to a prompt, one of them better at one thing, as in HH-RLHF."""
    better = methods.better_rows([world / "pairs.jsonl"], Options())
    write_jsonl(tmp_path / "pairs.jsonl", [{k: v for k, v in row.items() if k != "answer"} for row in better])
    words = command(world, out=tmp_path / "out", **{"max-steps": 1})
    words[words.index("--data") + 1] = str(tmp_path / "pairs.jsonl")
    assert run(train, monkeypatch, words) == 0
    assert "identity: no such pairs in the data, step left out" in capsys.readouterr().out
    assert {row["stage"] for row in metrics(tmp_path / "out")} == {"better"}


@pytest.mark.parametrize("stage, folder", [("pretrain", "init"), ("pretrain", "base"), ("sft", "base")])
def test_the_other_stages(world, tmp_path, monkeypatch, stage, folder):
    words = command(world, stage, tmp_path / "out", folder, epochs=2, **{"max-steps": 0})
    assert run(train, monkeypatch, words) == 0
    rows = [row for row in metrics(tmp_path / "out") if "loss" in row]
    source = "texts.jsonl" if stage == "pretrain" else "rated.jsonl"
    options = Options(val_share=0.2)
    texts = METHODS[stage].rows([world / source], options)
    kept = sum(not data.is_held_out(row, options.val_share, 0) for row in texts)
    assert len(rows) == math.ceil(2 * kept / 4) and rows[-1]["loss"] < rows[0]["loss"]
    checkpoint.load(tmp_path / "out")


def test_sft_takes_the_best_answer(world):
    rows, rated = methods.sft_rows([world / "rated.jsonl"], Options()), formats.read_rated(world / "rated.jsonl")
    apart = 0
    assert len(rows) == 12
    for row, source in zip(rows, rated, strict=True):
        sums = {response["text"]: sum(response["scores"].values()) for response in source["responses"]}
        assert sums[row["completion"]] == max(sums.values())
        apart += max(sums.values()) > min(sums.values())
    assert apart > 6


# ----------------------------------------------------------------------------- the command line, and bad input


def test_help_is_made_of_the_methods_and_the_options(capsys):
    with pytest.raises(SystemExit) as stop:
        train.arguments(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for name in [*METHODS, "aligner", "--resume", "--max-steps", "examples:", "(default 1e-05)", "(default 4096)"]:
        assert name in said


@pytest.mark.parametrize("words, expected", [
    (["sft", "--beta", "0.5"], "--beta is no option of sft; leave it out"),
    (["sft", "--beta", "0.1"], "--beta is no option of sft; leave it out"),  # given is given, though it is the default
    (["dpo", "--warmup-data", "0.5"], "--warmup-data is no option of dpo"),
    (["sft", "--steps", "better"], "--steps is for aligner"), (["sft", "--merge"], "--merge is for adapters"),
    (["dpo", "--replay", "x.jsonl"], "--replay mixes texts into texts")])
def test_what_would_not_be_heeded_is_refused(capsys, words, expected):
    with pytest.raises(SystemExit) as stop:
        train.arguments([*words, "--model", "m", "--data", "d", "--out", "o"])
    assert stop.value.code == 2 and expected in capsys.readouterr().err.splitlines()[-1]


def test_defaults_are_the_papers():
    defaults = vars(read_options(Options, train.arguments(["aligner", "--model", "m", "--data", "d", "--out", "o"])))
    expected = {"lr": 1e-5, "weight_decay": 1e-5, "warmup": 0.05, "epochs": 2.0, "batch": 512, "max_tokens": 4096,
                "max_grad_norm": 1.0, "precision": "auto"}
    assert {key: defaults[key] for key in expected} == expected and train.ALIGNER == ["identity", "equal", "better"]


@pytest.mark.parametrize("words, expected", [
    (["--batch", "0"], "--batch"), (["--val-share", "1"], "--val-share"), (["--epochs", "nan"], "--epochs"),
    (["--precision", "fp8"], "--precision"), (["--steps", "worse"], "--steps"), (["--micro-tokens", "-1"], "--micro"),
])
def test_impossible_settings_are_refused(world, tmp_path, monkeypatch, capsys, words, expected):
    refused(train, monkeypatch, capsys, command(world, out=tmp_path / "out") + words, expected)
    assert not (tmp_path / "out").exists()


def damaged(world, folder):
    """(name, stage, what to change in the command, what the message must say)"""
    (folder / "empty.jsonl").write_text("")
    (folder / "broken.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')
    (folder / "columns.jsonl").write_text('{"question": "a"}\n')
    (folder / "bytes.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a text"}\n' * 99)[:40])
    (folder / "pairs.jsonl").write_text('{"prompt": "a", "completion": "b", "relation": "equal"}\n')
    (folder / "none").mkdir()
    for name in ("header", "vocabulary"):
        (folder / name).mkdir()
        for file in (world / "base").iterdir():
            (folder / name / file.name).write_bytes(file.read_bytes())
    (folder / "header" / "model.safetensors").write_bytes(b"\xff" * 100)
    tokenizer = checkpoint.load_tokenizer(world / "base")
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save(str(folder / "vocabulary" / "tokenizer.json"))
    return [("sft", {"--data": "empty.jsonl"}, ["empty.jsonl", "no data"]),
            ("sft", {"--data": "broken.jsonl"}, ["broken.jsonl:2", "invalid JSON"]),
            ("aligner", {"--data": "columns.jsonl"}, ["columns.jsonl:1", "no prompt and completion"]),
            ("aligner", {"--data": "absent.jsonl"}, ["absent.jsonl", "no such file"]),
            ("aligner", {"--data": "pairs.jsonl"}, ["pairs.jsonl", "answer", "reformulate"]),
            ("pretrain", {"--data": "bytes.jsonl"}, ["bytes.jsonl:1", "not UTF-8"]),
            ("pretrain", {"--data": "cut.jsonl.gz"}, ["cut.jsonl.gz", "gzip"]),
            ("aligner", {"--model": "none"}, ["none", "no checkpoint"]),
            ("pretrain", {"--model": "absent"}, ["absent", "no such folder"]),
            ("aligner", {"--model": "header"}, ["model.safetensors", "not a readable checkpoint"]),
            ("aligner", {"--model": "vocabulary"}, ["tokenizer.json", "token id", "embedding"]),
            ("aligner", {"--device": "abacus"}, ["--device abacus"])]


def test_bad_input_is_one_line_and_leaves_nothing(world, tmp_path, monkeypatch, capsys):
    for stage, changes, expected in damaged(world, tmp_path):
        words = command(world, stage, tmp_path / "out")
        for flag, value in changes.items():
            words[words.index(flag) + 1] = str(tmp_path / value) if flag != "--device" else value
        refused(train, monkeypatch, capsys, words, *expected)
        assert not (tmp_path / "out").exists(), changes


def test_the_model_to_start_from_is_not_overwritten(world, monkeypatch, capsys):
    before = weights(world / "base")
    refused(train, monkeypatch, capsys, command(world, out=world / "base"), "is a model to start from")
    assert weights(world / "base") == before and not (world / "base" / "metrics.jsonl").exists()


def test_no_example_left_is_an_error(world, tmp_path, monkeypatch, capsys):
    words = command(world, out=tmp_path / "out", **{"max-tokens": 20})
    refused(train, monkeypatch, capsys, words, "no example to train on", "--max-tokens")


def test_a_loss_that_is_no_number_stops_the_run(world, tmp_path):
    method = Method(methods.pretrain_rows, lambda logprobs, batch, options: -logprobs.sum() * math.nan)
    stage = Stage("pretrain", random_examples(8), method=method)
    with pytest.raises(UserError, match="the loss of step 1 is nan, .*lower --lr"):
        train.train(tiny(), checkpoint.load_tokenizer(world / "base"), [stage], tmp_path / "out", FAST, progress=False)
    assert metrics(tmp_path / "out") == [] and not (tmp_path / "out" / "config.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("file, share, save_seconds", [("state.pt", 0.3, 0), ("model.safetensors", 0.5, 10_000)])
def test_a_full_disk_is_one_line(world, tmp_path, file, share, save_seconds):
    """A process that may write no file of more than a share of the weights' size stands in for a full disk."""
    limit = int(share * os.path.getsize(world / "base" / "model.safetensors"))
    code = (f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
            "import common, train; common.cli(train.main)")
    words = command(world, "pretrain", tmp_path / "out", **{"max-steps": 2, "save-seconds": save_seconds})
    ended = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=120,
                           env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    message = ended.stderr.strip().splitlines()[-1]
    assert ended.returncode == 2 and "Traceback" not in ended.stderr and message.startswith("error: "), ended.stderr
    assert re.search("disk full|space", message)
    left = {path.name for path in (tmp_path / "out").iterdir()} - {*folders.SIDE, "README.md"}
    assert left == {"metrics.jsonl", "run.json", *["tokenizer.json"] * (file == "model.safetensors")}


def test_pretrain_starts_from_scratch_only_where_there_are_no_weights(world, tmp_path, monkeypatch, capsys):
    """Half of a download is none."""
    folder = tmp_path / "half"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_bytes((world / "base" / name).read_bytes())
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"model.norm.weight": "1.safetensors"}}')
    words = command(world, "pretrain", tmp_path / "out", **{"max-steps": 1})
    words[words.index("--model") + 1] = str(folder)
    refused(train, monkeypatch, capsys, words, "half: shards missing: 1.safetensors")
    (folder / "model.safetensors.index.json").unlink()
    assert run(train, monkeypatch, words) == 0
