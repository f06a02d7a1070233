"""Low-rank adapters and scalar heads: against plain layers, against peft and transformers, and through training."""
import json
import math
import re
import shutil

import pytest
import torch

import checkpoint
import data
import folders
import formats
import lora
import parallel
import resume
import toy
import train
from common import UserError, write_jsonl
from conftest import assert_one_line
from model import Config, Llama, document_scores, logits
from train import METHODS, Options

SIZES = dict(vocab_size=90, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=1)
LENGTHS = [7, 3, 12, 5]


def tokens(seed=0, count=sum(LENGTHS)):
    return torch.randint(2, 90, (count,), generator=torch.Generator().manual_seed(seed))


def stir(llama, seed=1):
    """Give every adapter and head weights that matter."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in llama.named_parameters():
        if "lora_" in name or name == "score.weight":
            parameter.data.normal_(0, 0.3, generator=generator)
    return llama


@pytest.fixture
def base(tmp_path):
    checkpoint.save(Llama(Config(**SIZES), 3), tmp_path / "base")
    return tmp_path / "base"


def adapter(base, seed, rank=4, scorer=True):
    """A folder with a random adapter for the base."""
    llama = checkpoint.load(base, scorer=scorer)
    checkpoint.save(stir(lora.add_lora(llama, rank, base), seed), base.parent / f"adapter-{seed}")
    return base.parent / f"adapter-{seed}"


def test_an_adapter_starts_as_the_model_itself_and_is_all_that_is_trained(base):
    plain, llama = checkpoint.load(base), lora.add_lora(checkpoint.load(base), 4, base)
    assert torch.equal(logits(llama, tokens()[None]), logits(plain, tokens()[None]))
    names = parallel.trained(llama)
    assert len(names) == 2 * 7 * 2 and all("lora_" in name for name in names)


def test_a_projection_with_an_adapter_is_the_definition(base):
    """W x + alpha / r B A x, written out for one layer."""
    llama = stir(lora.add_lora(checkpoint.load(base), 4, base, alpha=6))
    layer, x = llama.model.layers[1].mlp.up_proj, torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    expected = [layer.weight @ row + 1.5 * layer.lora_B[0] @ (layer.lora_A[0] @ row) for row in x]
    torch.testing.assert_close(layer(x[None])[0], torch.stack(expected))


@pytest.mark.parametrize("scorer", [True, False])
def test_merging_changes_nothing_and_leaves_a_plain_model(base, scorer):
    llama = stir(lora.add_lora(checkpoint.load(base, scorer=scorer), 4, base))

    def output():
        if scorer:
            return document_scores(llama, tokens(), LENGTHS)
        return logits(llama, tokens()[None])
    before = output()
    lora.merge_lora(llama)
    torch.testing.assert_close(output(), before, rtol=1e-4, atol=1e-4)
    assert not [name for name, _ in llama.named_parameters() if "lora" in name]


def test_a_saved_adapter_is_loaded_with_equal_scores_and_holds_nothing_of_the_base(base):
    folder = adapter(base, 5)
    llama = stir(lora.add_lora(checkpoint.load(base, scorer=True), 4, base), 5)
    with torch.no_grad():
        torch.testing.assert_close(
            document_scores(checkpoint.load(folder, scorer=True), tokens(), LENGTHS),
            document_scores(llama, tokens(), LENGTHS), rtol=1e-4, atol=1e-4)
    assert (folder / "adapter_model.safetensors").stat().st_size < (base / "model.safetensors").stat().st_size
    assert not (folder / "model.safetensors").exists()


def test_adapters_side_by_side_score_as_each_does_alone(base):
    """Also of different ranks, and one that changes fewer layers than the others."""
    from safetensors.torch import load_file, save_file
    folders = [adapter(base, 1), adapter(base, 2, rank=2), adapter(base, 3, rank=8)]
    path = folders[0] / "adapter_model.safetensors"
    save_file({name: x for name, x in load_file(path).items() if "q_proj" in name or "score" in name}, path)
    together = checkpoint.load_adapters(checkpoint.load(base, scorer=True), folders)
    with torch.no_grad():
        scores = document_scores(together, tokens(), LENGTHS)
        alone = [document_scores(checkpoint.load(folder, scorer=True), tokens(), LENGTHS)[0]
                 for folder in folders]
    assert scores.shape == (3, 4)
    torch.testing.assert_close(scores, torch.stack(alone), rtol=1e-4, atol=1e-4)
    assert (scores[0] - scores[1]).abs().max() > 0.01


def test_scores_are_read_at_each_documents_last_token_and_know_nothing_of_the_others(base):
    llama = stir(checkpoint.load(base, scorer=True))
    with torch.no_grad():
        scores = document_scores(llama, tokens(), LENGTHS)[0]
        for document, score in zip(tokens().split(LENGTHS), scores):
            hidden = llama(document[None])
            torch.testing.assert_close(hidden[0, -1] @ llama.score.weight[0], score, rtol=1e-4, atol=1e-5)


def test_transformers_gives_the_same_scores(base, tmp_path):
    transformers = pytest.importorskip("transformers")
    checkpoint.save(stir(checkpoint.load(base, scorer=True)), tmp_path / "pm")
    ours = checkpoint.load(tmp_path / "pm", scorer=True)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "pm")
    documents = tokens().split(LENGTHS)
    padded = torch.nn.utils.rnn.pad_sequence(documents, batch_first=True, padding_value=0)  # BOS, as config.json says
    with torch.no_grad():
        torch.testing.assert_close(theirs(padded).logits[:, 0], document_scores(ours, tokens(), LENGTHS)[0],
                                   rtol=1e-4, atol=1e-4)
    theirs.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        torch.testing.assert_close(
            document_scores(checkpoint.load(tmp_path / "theirs", scorer=True), tokens(), LENGTHS),
            document_scores(ours, tokens(), LENGTHS))


def test_peft_loads_ours_and_we_load_theirs(base, tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    ours = checkpoint.load(adapter(base, 7, scorer=False))
    plain = transformers.AutoModelForCausalLM.from_pretrained(base)
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter-7")
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens()[None]).logits, logits(ours, tokens()[None]), rtol=1e-4, atol=1e-4)
    scorer = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, pad_token_id=0)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=3, lora_alpha=5, target_modules=["v_proj", "down_proj"],
                             init_lora_weights=False, use_rslora=True)
    scorer = peft.get_peft_model(scorer, config)
    scorer.save_pretrained(tmp_path / "theirs")
    loaded = checkpoint.load(tmp_path / "theirs", scorer=True)
    with torch.no_grad():
        expected = torch.stack([scorer(document[None]).logits[0, 0] for document in tokens().split(LENGTHS)])
        torch.testing.assert_close(document_scores(loaded, tokens(), LENGTHS)[0], expected, rtol=1e-4, atol=1e-4)
    pm = adapter(base, 8)
    theirs = peft.PeftModel.from_pretrained(transformers.AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=1, pad_token_id=0), pm)
    with torch.no_grad():
        expected = torch.stack([theirs(document[None]).logits[0, 0] for document in tokens().split(LENGTHS)])
        torch.testing.assert_close(document_scores(checkpoint.load(pm, scorer=True), tokens(),
                                                         LENGTHS)[0], expected, rtol=1e-4, atol=1e-4)


def broken(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("changes, said", [
    ({"use_dora": True}, "use_dora = True"), ({"rank_pattern": {"q_proj": 2}}, "rank_pattern = an object"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"), ({"task_type": "TOKEN_CLS"}, "task_type = 'TOKEN"),
    *(({"r": r}, f"r is {r!r}, not a whole number from 1 to") for r in ("four", 0, -4, True, 4.5)),
    ({"r": None}, "r is missing"), ({"r": 2}, "has no A and B of rank 2"),
    *(({"lora_alpha": alpha}, f"lora_alpha is {alpha!r}, not a number from") for alpha in (math.nan, math.inf, "8")),
    ({"use_rslora": "no"}, "use_rslora is 'no', not true or false"),
    *(({"base_model_name_or_path": name}, f"base_model_name_or_path {name[:20]!r}"[:-1])
      for name in ("nowhere", "", "base\0", "x" * 9999, "adapter-1")),
    ({"base_model_name_or_path": 3}, "base_model_name_or_path is 3, not a text")], ids=lambda x: str(x)[:40])
def test_what_is_not_computed_here_is_refused_by_name(base, changes, said):
    folder = adapter(base, 1)
    broken(folder, **changes)
    with pytest.raises(UserError) as error:
        checkpoint.load(folder, scorer=True)
    assert_one_line(f"error: {error.value}\n", re.escape(said))


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
SCORE = "base_model.model.score.weight"


@pytest.mark.parametrize("changes, said", [
    *(({f"{Q}{part}.weight": tensor}, "has no A and B of rank 4 .* for model.layers.0.self_attn.q_proj;")
      for part, tensor in (("A", None), ("B", None), ("A", torch.zeros(3, 32)), ("B", torch.zeros(32, 3)),
                           ("A", torch.tensor(1.0)), ("B", torch.zeros(32)), ("A", torch.zeros(1, 4, 32)))),
    ({f"{Q}A.weight": torch.zeros(4, 31)}, "adapter of model.layers.0.self_attn.q_proj does not fit"),
    ({f"{Q}A.weight": torch.zeros(4, 32, dtype=torch.int32)}, "no tensor of 16, 32 or 64-bit floats"),
    *(({SCORE: tensor}, "its scalar head does not fit the base")
      for tensor in (torch.tensor(1.0), torch.zeros(32), torch.zeros(1, 31), torch.zeros(2, 32), torch.zeros(0, 32))),
    ({"base_model.model.lm_head.weight": torch.zeros(90, 32)}, "alone, but holds base_model.model.lm_head.weight"),
    (None, "alone, but holds nothing")], ids=str)
def test_adapters_that_cannot_be(base, changes, said):
    from safetensors.torch import load_file, save_file
    folder = adapter(base, 1)
    path = folder / "adapter_model.safetensors"
    tensors = {} if changes is None else {**load_file(path), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)
    with pytest.raises(UserError, match=said):
        checkpoint.load(folder, scorer=True)


def test_a_scalar_head_beside_a_language_model_is_refused(base):
    folder = adapter(base, 1)
    broken(folder, task_type=None)
    with pytest.raises(UserError, match="its scalar head does not fit the base"):
        checkpoint.load(folder)


@pytest.mark.cuda
def test_a_gpu_gives_the_scores_that_a_cpu_gives(base):
    folders = [adapter(base, 1), adapter(base, 2, rank=2)]
    with torch.no_grad():
        here, there = (document_scores(checkpoint.load_adapters(
            checkpoint.load(base, device=device, scorer=True), folders), tokens().to(device), LENGTHS).cpu()
            for device in ("cpu", "cuda"))
    torch.testing.assert_close(here, there, rtol=1e-3, atol=1e-3)


def test_an_adapter_for_another_model_is_refused(base, tmp_path):
    other = Llama(Config(**{**SIZES, "hidden_size": 16, "head_dim": 8}), 0)
    folder = adapter(base, 1)
    with pytest.raises(UserError, match="does not fit"):
        checkpoint.load_adapters(other, [folder])


def test_a_preference_model_is_not_taken_for_a_language_model(base, tmp_path):
    checkpoint.save(checkpoint.load(base, scorer=True), tmp_path / "pm")
    with pytest.raises(UserError, match="preference model"):
        checkpoint.load(tmp_path / "pm")


# ----------------------------------------------------------------------------------------------------------------
# Through the training loop

QUICK = Options(lr=1e-2, batch=8, epochs=3, max_tokens=64, val_share=0.2, precision="fp32", warmup=0.1)


def labelled(count=60):
    """Pairs in which the response with the word "good" is better, with a chance of 0.9 by its label."""
    rows = []
    for i in range(count):
        good, bad = f"it is good {i % 7}", f"it is bad {i % 5}"
        first = i % 2 == 0
        rows.append(formats.preference(f"say {i}:", good if first else bad, bad if first else good, "helpfulness",
                                    0.9 if first else 0.1))
    return rows


def pm_training(base, out, rank=0, **changes):
    options = Options(**{**vars(QUICK), "lora_rank": rank, **changes})
    tokenizer = toy.train_tokenizer(["it is good bad say : 0123456789"], 90)
    llama = train.start_from(base, "reward", torch.device("cpu"), options)
    stage = train.prepare("reward", labelled(), tokenizer, llama.config, options)
    return llama, tokenizer, stage, train.train(llama, tokenizer, [stage], out, options, progress=False)


@pytest.fixture
def words(tmp_path):
    sizes = {**SIZES, "vocab_size": 300}
    checkpoint.save(Llama(Config(**sizes), 3), tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("rank", [0, 4])
def test_a_preference_model_learns_the_labels_probabilities(words, tmp_path, rank):
    """The loss falls from log 2 towards the labels' entropy, below which no model can come."""
    llama, tokenizer, stage, rows = pm_training(words, tmp_path / "pm", rank)
    losses = [row["val_loss"] for row in rows if "val_loss" in row]
    entropy = -(0.9 * torch.tensor(0.9).log() + 0.1 * torch.tensor(0.1).log()).item()
    assert losses[0] == pytest.approx(0.6931, abs=1e-3) and entropy - 1e-4 < losses[-1] < entropy + 0.05
    loaded = checkpoint.load(tmp_path / "pm", scorer=True)
    good, bad = (data.encode_document(tokenizer, "say 3:", text, 0, 1).ids for text in ("it is good 2", "it is bad 2"))
    with torch.no_grad():
        scores = document_scores(loaded, torch.tensor([*good, *bad]), [len(good), len(bad)])[0]
    assert torch.sigmoid(scores[0] - scores[1]).item() == pytest.approx(0.9, abs=0.05)


def test_the_loss_of_packed_pairs_is_that_of_each_pair_alone(words):
    options = Options(**vars(QUICK))
    llama = stir(checkpoint.load(words, scorer=True))
    tokenizer = toy.train_tokenizer(["it is good bad say : 0123456789"], 90)
    stage = train.prepare("reward", labelled(12), tokenizer, llama.config, options)
    (batch,) = train.pack(stage.examples, 10**6, torch.device("cpu"))
    expected = 0.0
    with torch.no_grad():
        for example in stage.examples:
            a, b = (llama(torch.tensor([document.ids.tolist()]))[0, -1] @ llama.score.weight[0]
                    for document in example.documents)
            p = torch.sigmoid(a - b)
            expected -= example.label * p.log() + (1 - example.label) * (1 - p).log()
        found = train.batch_loss(llama, batch, METHODS["reward"], options)
        assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    assert batch.count == len(stage.examples)


def test_lora_training_leaves_the_base_as_it_was_and_resumes(words, tmp_path, monkeypatch):
    before = (words / "model.safetensors").read_bytes()
    *_, whole = pm_training(words, tmp_path / "whole", 4, save_seconds=0)
    write, steps = resume.Run.write, []

    def stop_half_way(run, row):
        write(run, row)
        steps.append(row)
        if len(steps) == 9:
            raise KeyboardInterrupt
    monkeypatch.setattr(resume.Run, "write", stop_half_way)
    with pytest.raises(KeyboardInterrupt):
        pm_training(words, tmp_path / "killed", 4, save_seconds=0)
    monkeypatch.setattr(resume.Run, "write", write)
    options = Options(**{**vars(QUICK), "lora_rank": 4, "save_seconds": 0})
    tokenizer = toy.train_tokenizer(["it is good bad say : 0123456789"], 90)
    llama = train.start_from(words, "reward", torch.device("cpu"), options)
    stage = train.prepare("reward", labelled(), tokenizer, llama.config, options)
    resumed = train.train(llama, tokenizer, [stage], tmp_path / "killed", options, resume=True, progress=False)

    def plain(rows):
        return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]
    assert plain(resumed) == plain(whole)
    assert (words / "model.safetensors").read_bytes() == before
    assert ((tmp_path / "killed" / "adapter_model.safetensors").read_bytes()
            == (tmp_path / "whole" / "adapter_model.safetensors").read_bytes())


def test_every_stage_trains_adapters_and_merges_them_on_request(words, tmp_path, monkeypatch):
    tokenizer = toy.train_tokenizer(["it is good bad say : 0123456789"], 90)
    tokenizer.save(str(words / "tokenizer.json"))
    write_jsonl(tmp_path / "rows.jsonl", [{"prompt": f"say {i}:", "completion": " it is good"} for i in range(20)])
    for name, more in (("adapter", []), ("merged", ["--merge"])):
        command = ["sft", "--model", words, "--data", tmp_path / "rows.jsonl", "--out", tmp_path / name,
                   "--lora-rank", 2, "--batch", 4, "--lr", 0.01, "--precision", "fp32", "--device", "cpu", *more]
        monkeypatch.setattr("sys.argv", ["train.py", *map(str, command)])
        train.main()
    assert not (tmp_path / "adapter" / "config.json").exists()
    assert {path.name for path in (tmp_path / "merged").iterdir()} - {*folders.SIDE, "README.md"} == \
        {"config.json", "metrics.jsonl", "model.safetensors", "run.json", "tokenizer.json"}
    with torch.no_grad():
        plain, adapted, merged = (logits(checkpoint.load(folder), tokens()[None])
                                  for folder in (words, tmp_path / "adapter", tmp_path / "merged"))
    assert torch.equal(adapted, merged) and (plain - merged).abs().max() > 0.01


def test_an_adapter_trained_on_longer_texts_keeps_its_longer_context(words, tmp_path):
    """The base ends at 64 tokens; what was trained on up to 100 must not be cut again when it is loaded."""
    llama = lora.add_lora(checkpoint.load(words), 2, words)
    llama.config.max_position_embeddings = 100
    checkpoint.save(llama, tmp_path / "adapter")
    assert checkpoint.load(words).config.max_position_embeddings == 64
    assert checkpoint.load(tmp_path / "adapter").config.max_position_embeddings == 100
    checkpoint.merge(tmp_path / "adapter")
    assert checkpoint.load(tmp_path / "adapter").config.max_position_embeddings == 100
    (tmp_path / "broken").mkdir()
    checkpoint.save(llama, tmp_path / "broken")
    for content, said in (([], "holds a list"), ({}, "max_position_embeddings is missing"),
                          *(({"max_position_embeddings": size}, "max_position_embeddings is ")
                            for size in (0, -1, "64", True, 64.5, math.inf, 10**30))):
        (tmp_path / "broken" / "context.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=said):
            checkpoint.load(tmp_path / "broken")


def test_a_scalar_head_is_trained_in_fp32_beside_frozen_bf16_weights(words):
    """In bf16, steps of a learning rate of 1e-5 would be rounded away."""
    llama = lora.add_lora(checkpoint.load(words, torch.bfloat16, scorer=True), 2, words)
    names = {name: weight.dtype for name, weight in parallel.trained(llama).items()}
    assert set(names.values()) == {torch.float32} and "score.weight" in names
    assert llama.model.embed_tokens.weight.dtype == torch.bfloat16


def test_a_preference_models_adapter_is_merged_with_its_head_and_taken_for_no_language_model(base):
    folder = adapter(base, 4)
    with torch.no_grad():
        expected = document_scores(checkpoint.load(folder, scorer=True), tokens(), LENGTHS)
    with pytest.raises(UserError, match="adapts a preference model, which writes no words"):
        checkpoint.load(folder)
    checkpoint.merge(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    with torch.no_grad():
        torch.testing.assert_close(document_scores(checkpoint.load(folder, scorer=True), tokens(), LENGTHS), expected)


def test_a_whole_model_saved_over_an_adapter_is_the_one_that_is_loaded(base):
    folder = adapter(base, 4, scorer=False)
    other = Llama(Config(**SIZES), 9)
    checkpoint.save(other, folder)
    assert torch.equal(logits(checkpoint.load(folder), tokens()[None]), logits(other, tokens()[None]))


def test_a_full_disk_is_one_line_for_an_adapter_too(base, tmp_path, monkeypatch):
    llama = lora.add_lora(checkpoint.load(base), 2, base)

    def full(*_, **__):
        raise checkpoint.SafetensorError("No space left on device")
    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match="cannot write the weights .*is the disk full?"):
        checkpoint.save(llama, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_there_is_nothing_to_adapt_in_a_model_from_scratch(words):
    (words / "model.safetensors").unlink()
    assert train.start_from(words, "pretrain", torch.device("cpu"), Options()).config.vocab_size == 300
    with pytest.raises(UserError, match="holds no weights to adapt; leave --lora-rank out"):
        train.start_from(words, "pretrain", torch.device("cpu"), Options(lora_rank=2))


def test_an_adapter_knows_its_base_from_another_of_the_same_name(base, tmp_path, monkeypatch):
    folder = adapter(base, 1)
    assert checkpoint.base_of(folder) == base
    checkpoint.save(Llama(Config(**SIZES), 4), tmp_path / "elsewhere" / "base")
    moved = (tmp_path / "elsewhere" / "adapter")
    shutil.copytree(folder, moved)
    config = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "base"}))
    with pytest.raises(UserError, match="elsewhere/adapter: adapts another model than the one that is now in .*base"):
        checkpoint.load(moved, scorer=True)
    monkeypatch.chdir(tmp_path)  # where the right one is
    assert checkpoint.base_of(moved).resolve() == base.resolve()


def test_a_model_in_use_is_no_folder_to_write_to(base, tmp_path):
    folder = adapter(base, 1)
    (tmp_path / "link").symlink_to(base)
    for out in (base, folder, tmp_path / "link"):
        with pytest.raises(UserError, match="is a model to start from, or that another needs"):
            checkpoint.check_folder(out, [folder])
    checkpoint.check_folder(folder, [base])
    checkpoint.check_folder(tmp_path / "new", [base, folder])


def test_what_a_killed_save_has_left_is_removed_by_the_next(base):
    (base / ".tmpAb12Cd").write_bytes(b"half of the weights")
    checkpoint.save(Llama(Config(**SIZES), 3), base)
    assert sorted(path.name for path in base.iterdir()) == ["config.json", "model.safetensors"]
