"""What others need in a model's folder: our own promises first, then transformers, TRL, peft and `transformers serve`,
where they are installed."""
import functools
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

import align
import chat
import checkpoint
import combine
import data
import endpoint
import folders
import formats
import resume
import reward
import toy
import train
import writers
from common import UserError, write_jsonl
from conftest import refused, response, run, write
from generate import generate
from model import Config, Llama

SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
MADE = {"README.md", "chat_template.jinja", "config.json", "generation_config.json", "metrics.jsonl",
        "model.safetensors", "run.json", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"}
TEXTS = ["\n\nHuman: How do I hang a picture?\n\nAssistant:", "a  b\n \u00e9 \u6f22\U0001f642 x", "", "Mark it. Drill."]
FOREIGN = {name: f"{name} of a stranger".encode() for name in folders.SIDE} | {
    "tokenizer_config.json": b'{"bos_token": "<s>",  "eos_token": "</s>", "pad_token": "</s>"}',
    "generation_config.json": b'{"eos_token_id":  1}'}


def trained(method, model, files, out, *more):
    """The folder `out` after a step of a method from the folder `model`."""
    words = [method, "--model", model, "--data", files, "--out", out, "--max-steps", 1, "--batch", 4, "--lr", 0.001,
             "--device", "cpu", "--precision", "fp32", "--chat-template", "plain", *more]
    with pytest.MonkeyPatch.context() as patch:
        assert run(train, patch, words) == 0
    return out


def start(folder, tokenizer, **changes):
    """A folder with a random Llama and its tokenizer, and nothing else."""
    config = Config(**{**SIZES, "vocab_size": tokenizer.get_vocab_size(), "max_position_embeddings": 512,
                       "bos_token_id": 0, "eos_token_id": 1, **changes})
    checkpoint.save(Llama(config, 1), folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Data, a model to start from, and what is trained from it: policy, adapter, merged, aligner, pm."""
    folder = tmp_path_factory.mktemp("world")
    rows = list(toy.rated(16, 1))
    write_jsonl(folder / "rated.jsonl", rows)
    write_jsonl(folder / "texts.jsonl", [{"text": text} for text in toy.pretraining_texts(40, 0)])
    objectives = {name: toy.wordings.objective(name) for row in rows for answer in row["responses"]
                  for name in answer["scores"]}
    examples = list(data.reformulate(rows, objectives))
    write_jsonl(folder / "pairs.jsonl", map(data.with_pair, examples))
    write_jsonl(folder / "labels.jsonl", [formats.preference(
        row["prompt"], row["responses"][0]["text"], row["responses"][1]["text"], "detail", 0.9) for row in rows])
    tokenizer = toy.train_tokenizer(toy.pretraining_texts(60, 0), 400, [" Please."], words=[" hang a picture"])
    first = start(folder / "start", tokenizer)
    policy = trained("sft", first, folder / "rated.jsonl", folder / "policy")
    trained("sft", policy, folder / "rated.jsonl", folder / "adapter", "--lora-rank", 2)
    trained("sft", policy, folder / "rated.jsonl", folder / "merged", "--lora-rank", 2, "--merge")
    trained("aligner", policy, folder / "pairs.jsonl", folder / "aligner")
    trained("reward", policy, folder / "labels.jsonl", folder / "pm")
    return folder


def names(folder):
    return {path.name for path in folder.iterdir()}


def read(path):
    return json.loads(path.read_text())


def ids_of(folder, text):
    """The ids that training puts before a completion."""
    config = checkpoint.read_config(folder / "config.json")
    return data.encode_prompt(known_tokenizer(folder), text, config.bos_token_id)


known_tokenizer = functools.cache(checkpoint.load_tokenizer)


# ----------------------------------------------------------------------------------------------------------------
# Which files there are


def test_what_began_here_is_whole(world):
    assert names(world / "policy") == names(world / "merged") == names(world / "aligner") == MADE
    assert names(world / "adapter") == MADE - {"config.json", "model.safetensors"} | {*checkpoint.ADAPTER,
                                                                                      checkpoint.CONTEXT}
    assert names(world / "pm") == MADE - {"chat_template.jinja", "generation_config.json"}
    config = read(world / "policy/config.json")
    told = read(world / "policy/tokenizer_config.json")
    assert told["model_max_length"] == config["max_position_embeddings"] > 100
    assert [told[f"{name}_token"] for name in ("bos", "eos", "pad")] == ["<s>", "</s>", "</s>"]
    assert read(world / "policy/generation_config.json") == {
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "max_length": config["max_position_embeddings"]}
    templates = [(world / name / "chat_template.jinja").read_text() for name in ("policy", "adapter", "aligner")]
    assert templates == [chat.DIALOGUE, chat.DIALOGUE, chat.WHOLE]


@pytest.fixture(scope="module")
def foreign(world):
    """A model from elsewhere, with every side file there is, and a tokenizer.json that adds BOS by itself."""
    folder = world / "foreign"
    shutil.copytree(world / "start", folder)
    tokenizer = read(world / "policy/tokenizer.json")
    cut = {"max_length": 9, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    (folder / "tokenizer.json").write_text(json.dumps({**tokenizer, "truncation": cut}, indent=7))
    for name, content in FOREIGN.items():
        (folder / name).write_bytes(content)
    return folder


def test_what_came_from_elsewhere_stays_as_it_came(world, foreign, tmp_path):
    """Through a training, an adapter, and a training from that adapter, be it one as peft writes it."""
    rated = world / "rated.jsonl"
    once = trained("sft", foreign, rated, tmp_path / "once")
    adapter = trained("sft", once, rated, tmp_path / "adapter", "--lora-rank", 2)
    bare = shutil.copytree(adapter, tmp_path / "bare")
    for name in folders.SIDE:
        (bare / name).unlink()
    for folder in (once, adapter, trained("sft", adapter, rated, tmp_path / "again"),
                   trained("sft", bare, rated, tmp_path / "from-bare")):
        assert {name: (folder / name).read_bytes() for name in folders.SIDE} == FOREIGN
        assert (folder / "tokenizer.json").read_bytes() == (foreign / "tokenizer.json").read_bytes()
    scorer = trained("reward", foreign, world / "labels.jsonl", tmp_path / "pm")
    assert not (scorer / "generation_config.json").exists()
    assert read(scorer / "tokenizer_config.json") == {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<s>"}
    assert read(scorer / "config.json")["pad_token_id"] == 0


def test_a_former_models_files_do_not_outlive_it(world, foreign, tmp_path):
    out = trained("sft", foreign, world / "rated.jsonl", tmp_path / "out")
    trained("pretrain", world / "policy", world / "texts.jsonl", out, "--overwrite")
    assert names(out) == MADE - {"chat_template.jinja"}, "texts have no chat"
    assert read(out / "tokenizer_config.json").items() >= folders.MADE_HERE.items()


def test_somebody_elses_readme_stays(world, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/README.md").write_text("My notes.")
    trained("sft", world / "start", world / "rated.jsonl", tmp_path / "out")
    assert (tmp_path / "out/README.md").read_text() == "My notes."
    trained("sft", world / "start", world / "rated.jsonl", tmp_path / "twice")
    trained("pretrain", world / "start", world / "texts.jsonl", tmp_path / "twice", "--overwrite")
    assert "- pretrain\n" in (tmp_path / "twice/README.md").read_text()


@pytest.mark.parametrize("broken", [b"{", b"[1]", b"\xff"])
def test_a_broken_file_of_the_base_costs_no_training(world, foreign, tmp_path, broken):
    base = shutil.copytree(foreign, tmp_path / "base")
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        (base / name).write_bytes(broken)
    for method, file in (("sft", "rated"), ("reward", "labels")):
        out = trained(method, base, world / f"{file}.jsonl", tmp_path / method)
        assert checkpoint.load(out, scorer=method == "reward") and (out / "README.md").exists()


@pytest.mark.parametrize("place", ["first", "last", "save"])
def test_a_kill_leaves_no_model_and_no_finished_run(world, tmp_path, monkeypatch, place):
    out, put, calls = tmp_path / "out", folders.put, []

    def dies(*given):
        calls.append(given)
        if place != "last" or len(calls) == len({*folders.SIDE, "tokenizer.json", "README.md"}):
            raise KeyboardInterrupt
        put(*given)
    words = ["sft", "--model", world / "start", "--data", world / "rated.jsonl", "--out", out, "--max-steps", 1,
             "--batch", 2, "--device", "cpu"]
    with monkeypatch.context() as patch:
        patch.setattr(*(checkpoint, "save_weights") if place == "save" else (folders, "put"), dies)
        assert run(train, patch, words) == 130 and calls
    assert not (out / "config.json").exists() and resume.read_run(out)["ended"] is None
    assert run(train, monkeypatch, words) == 0 and names(out) == MADE


def test_side_files_are_no_part_of_a_fingerprint(world, tmp_path):
    for kind in ("policy", "pm", "adapter"):
        folder = shutil.copytree(world / kind, tmp_path / kind)
        found = checkpoint.fingerprint(folder)
        for name in (*folders.SIDE, "README.md"):
            (folder / name).write_text("{}")
        assert checkpoint.fingerprint(folder) == found


def test_models_with_and_without_these_files_fit_each_other(world):
    pair = [world / "start", world / "policy", world / "adapter"]
    assert len({read(folder / "tokenizer.json")["post_processor"] is None for folder in pair}) == 2
    assert len(list(combine.load_alike(pair, combine.SHAPE))) == 3


def test_a_soup_is_whole(world, tmp_path, monkeypatch):
    words = ["soup", world / "policy", world / "merged", "--weights", 1, 3, "--out", tmp_path / "out"]
    assert run(combine, monkeypatch, words) == 0
    assert names(tmp_path / "out") == MADE - {"metrics.jsonl"}
    for name in ("tokenizer_config.json", "chat_template.jinja", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (world / "policy" / name).read_bytes()
    assert "| method | soup |" in (tmp_path / "out/README.md").read_text()
    assert chat.find(tmp_path / "out") is None, "our own template is for others"


def test_a_pair_of_folders_can_be_moved(world, tmp_path, monkeypatch):
    """The base need not be beside the adapter, and another model where it was is not taken for it."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(world / "start", tmp_path / "here/models/base")
    trained("sft", Path("here/models/base"), world / "rated.jsonl", tmp_path / "here/runs/adapter", "--lora-rank", 2)
    assert read(tmp_path / "here/runs/adapter/adapter_config.json")["base_model_name_or_path"] == "here/models/base"
    (tmp_path / "here").rename(tmp_path / "there")
    start(tmp_path / "here/models/base", checkpoint.load_tokenizer(world / "start"), hidden_size=16, head_dim=4)
    assert checkpoint.base_of(tmp_path / "there/runs/adapter").resolve() == tmp_path / "there/models/base"


def test_the_pad_of_a_preference_model_never_ends_a_text():
    def pad(bos, eos):
        return checkpoint.padding_id(Config(vocab_size=9, bos_token_id=bos, eos_token_id=eos))
    assert [pad(3, 4), pad(0, [0, 1]), pad(1, 1), pad(None, 0), pad(3, None)] == [3, 2, 0, 1, 3]
    assert pad(None, None) is None


# ----------------------------------------------------------------------------------------------------------------
# The card, and the pairs


def test_the_card_tells_what_the_model_is(world):
    card = (world / "aligner/README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- nanoalign\n"
                           "- identity\n- equal\n- better\n---\n# aligner\n")
    rows = [row for row in map(json.loads, (world / "aligner/metrics.jsonl").open()) if "loss" in row]
    assert f"| last figures better | step 1, tokens {rows[-1]['tokens']:,}, loss {rows[-1]['loss']:.5g}" in card
    assert "lr `0.001`, batch `4`, chat_template `plain`, max_steps `1`" in card and "seed" not in card
    assert f"| trained from | `{world / 'policy'}` |" in card and "pairs.jsonl` (" in card
    assert f"```\n{data.TEMPLATE['better']}\n```" in card
    assert "base_model" not in card
    adapter = (world / "adapter/README.md").read_text()
    assert adapter.startswith("---\nlibrary_name: peft\n") and "- lora\n---" in adapter
    assert "library_name: transformers" in (world / "merged/README.md").read_text()
    assert "text-classification" in (world / "pm/README.md").read_text()


def test_a_base_is_named_where_its_name_on_the_hub_is_known(world, tmp_path):
    cached = tmp_path / "hub/models--some-org--A-1.1B/snapshots/0123abcd"
    shutil.copytree(world / "start", cached)
    once = trained("sft", cached, world / "rated.jsonl", tmp_path / "once")
    twice = trained("sft", once, world / "rated.jsonl", tmp_path / "twice")
    for folder in (once, twice):
        assert "\nbase_model: some-org/A-1.1B\n" in (folder / "README.md").read_text().partition("\n---\n")[0]


def test_an_aligners_own_template_is_not_told_as_ours(world, tmp_path):
    rows = [{**row, "prompt": f"Edit! {row['prompt']}", "context": [0, 0], "answer": [0, 0]}
            for row in map(json.loads, (world / "pairs.jsonl").open())]
    out = trained("aligner", world / "start", write(tmp_path / "pairs.jsonl", *rows), tmp_path / "out")
    assert data.TEMPLATE["better"] not in (out / "README.md").read_text()
    assert "--template" in (out / "README.md").read_text()


def test_pairs_say_what_is_better_than_what(world, tmp_path, monkeypatch, capsys):
    kinds = set()
    for row in map(json.loads, (world / "pairs.jsonl").open()):
        kinds.add(row["relation"])
        assert ("chosen" in row) == ("rejected" in row) == (row["relation"] == "better")
        if "chosen" in row:
            assert row["chosen"] == row["completion"] != row["rejected"]
            assert f"\n\nAnswer: {row['rejected']}\n\nEdited answer:" in row["prompt"]
    assert kinds == {"better", "equal"}
    for reads in (formats.read_rated, formats.read_preferences):
        with pytest.raises(UserError, match="these are examples already"):
            list(reads(world / "pairs.jsonl"))
    rows = list(formats.read_completions(world / "pairs.jsonl"))
    assert len(rows) == len(list((world / "pairs.jsonl").open())) and not any("rejected" in row for row in rows)
    source = write(tmp_path / "rated.jsonl", {"prompt": "Why?", "responses": [
        response("So.", helpful=1, honest=1), response("No.", helpful=0, honest=1)]})
    for relations, found in ((["better"], ["better"]), (["equal"], ["equal"]), ([], ["better", "equal"])):
        words = ["reformulate", source, "--out", tmp_path / "out.jsonl"]
        assert run(data, monkeypatch, [*words, *["--relations"][:len(relations)], *relations]) == 0
        assert [json.loads(row)["relation"] for row in (tmp_path / "out.jsonl").open()] == found
    refused(data, monkeypatch, capsys, ["reformulate", source, "--out", tmp_path / "none.jsonl", "--relations", "keep"],
            "gives no keep example, but 1 better, 1 equal", "--keep")
    assert not (tmp_path / "none.jsonl").exists()


# ----------------------------------------------------------------------------------------------------------------
# transformers


def kinds_of_tokenizer(shared, kind):
    """(tokenizer, what else its model's configuration says)."""
    if kind == "toy":
        return toy.train_tokenizer(["How do I hang a picture? Mark it."], 300), {}
    if kind in ("no BOS", "one for both"):
        return toy.train_tokenizer(["some words"], 300), {"bos_token_id": None if kind == "no BOS" else 1}
    return Tokenizer.from_file(str(shared / kind / "tokenizer.json")), {"bos_token_id": 1, "eos_token_id": 2}


@pytest.mark.parametrize("kind", ["toy", "no BOS", "one for both", "checkpoints/stories260K", "tokenizers/llama-2"])
def test_autotokenizer_gives_the_ids_of_training(tmp_path, world, shared, kind):
    """Of models that began here, whatever tokenizer.json they began with."""
    transformers = pytest.importorskip("transformers")
    tokenizer, changes = kinds_of_tokenizer(shared, kind)
    base = start(tmp_path / "base", tokenizer, **changes)
    out = trained("sft", base, world / "rated.jsonl", tmp_path / "out", "--max-tokens", 4000)
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    rng = random.Random(0)
    texts = TEXTS + ["".join(rng.choices("ab \n.\u00e9\u6f22\U0001f642<>/s", k=20)) for _ in range(30)]
    for text in texts:
        assert theirs(text).input_ids == ids_of(out, text), repr(text)
        assert theirs.decode(theirs(text).input_ids, skip_special_tokens=True).strip() == text.strip()
    for text in ("end </s> of <s>", "</s>"):  # which others read as tokens, unless told otherwise
        assert theirs(text, split_special_tokens=True).input_ids == ids_of(out, text)
    batch = theirs(TEXTS, padding=True)
    assert [[token for token, kept in zip(*row) if kept] for row in zip(batch["input_ids"], batch["attention_mask"])] \
        == [ids_of(out, text) for text in TEXTS]


def test_autotokenizer_of_a_model_from_elsewhere(shared, world, tmp_path):
    transformers = pytest.importorskip("transformers")
    base = shared / "checkpoints/stories260K"
    out = trained("sft", base, world / "rated.jsonl", tmp_path / "out")
    assert (out / "tokenizer_config.json").read_bytes() == (base / "tokenizer_config.json").read_bytes()
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    assert type(theirs) is type(transformers.AutoTokenizer.from_pretrained(base))
    for text in TEXTS:
        assert theirs(text).input_ids == ids_of(out, text), repr(text)


@pytest.mark.parametrize("name", ["policy", "merged", "aligner"])
def test_a_pipeline_goes_on_as_we_do(world, name):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.pipeline("text-generation", model=str(world / name))
    options = dict(max_new_tokens=24, do_sample=False)
    (said,) = theirs(TEXTS[0], return_full_text=False, **options)
    ids = theirs.tokenizer(TEXTS[0], return_tensors="pt")
    new = theirs.model.generate(**ids, **options)[0, ids.input_ids.size(1):].tolist()
    llama, stop = checkpoint.load(world / name), dict(stop_ids=[1], keep_stop=True)
    ours = generate(llama, [ids_of(world / name, TEXTS[0])], 24, **stop)[0]
    assert new == ours and said["generated_text"] == theirs.tokenizer.decode(new, skip_special_tokens=True)
    batch = transformers.AutoTokenizer.from_pretrained(world / name)([TEXTS[3], TEXTS[0] * 2], padding=True,
                                                                     return_tensors="pt")
    together = theirs.model.generate(**batch, **options)[0, batch.input_ids.size(1):].tolist()
    alone = generate(llama, [ids_of(world / name, TEXTS[3])], 24, **stop)[0]
    assert together[:len(alone)] == alone, "beside a longer one, padded"
    assert theirs.model.generate(**ids).size(1) > 60 or new[-1] == 1, "to its end, not to transformers' 20 tokens"


def test_chat_messages_become_the_prompts_of_training(world):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(world / "policy")
    prompts = {row["prompt"] for row in map(json.loads, (world / "rated.jsonl").open())}
    assert any(prompt.count("Human:") > 1 for prompt in prompts)
    for prompt in prompts:
        messages = endpoint.chat_messages(prompt)
        assert theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"] == \
            ids_of(world / "policy", prompt)
        whole = theirs.apply_chat_template([*messages, {"role": "assistant", "content": "Yes."}], tokenize=False)
        assert whole == f"<s>{prompt} Yes.</s>"
    edits = transformers.AutoTokenizer.from_pretrained(world / "aligner")
    text = data.aligner_prompt("Why?", "So.", [])[0]
    found = edits.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, return_dict=True)
    assert found["input_ids"] == ids_of(world / "aligner", text)


# ----------------------------------------------------------------------------------------------------------------
# Preference models


@pytest.mark.parametrize("base", ["start", "foreign"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_an_unequal_batch_is_scored_as_one_by_one(world, foreign, tmp_path, side, base):
    """By transformers as by us, also where a text holds what others are padded with."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "pm"
    trained("reward", world / base, world / "labels.jsonl", folder)
    llama = checkpoint.load(folder, scorer=True)
    llama.score.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    checkpoint.save(llama, folder)
    if base == "foreign":
        (folder / "tokenizer.json").write_bytes((world / "start/tokenizer.json").read_bytes())
        for name in folders.SIDE[1:]:
            (folder / name).unlink(missing_ok=True)  # they are nonsense
    pairs = [(TEXTS[0], "Mark it."), (TEXTS[0], "Mark the height with a pencil. Drill a small hole."), ("Why?", ""),
             ("Say <s> then", "<s> and <s> <s>")]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side=side)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    if base == "start":
        texts = [tokenizer(*pair).input_ids for pair in pairs]
        assert texts[:3] == [data.encode_document(checkpoint.load_tokenizer(folder), *pair, 0, 1).ids.tolist()
                             for pair in pairs[:3]]
    else:
        texts = [[0, *(token for text in pair for token in tokenizer(text, add_special_tokens=False).input_ids), 1]
                 for pair in pairs]
    assert 0 in texts[3][1:]
    batch = tokenizer.pad({"input_ids": texts}, return_tensors="pt")
    with torch.no_grad():
        together = model(**batch).logits[:, 0]
        apart = torch.cat([model(input_ids=torch.tensor([text])).logits[:, 0] for text in texts])
        model.config.pad_token_id = 1
        misread = model(**batch).logits[:, 0]
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-4)
    ours = reward.Scorers([folder]).score(*zip(*pairs[:3]))[0]
    torch.testing.assert_close(together[:3], ours, atol=1e-5 if ours.dtype == torch.float32 else 1e-2, rtol=1e-3)
    assert (misread - apart).abs().max() > 1e-3, "what the right pad is good for"


def test_the_code_on_a_card_runs(world, capsys):
    """Of a policy and of a preference model; the latter gives the scores that we give."""
    pytest.importorskip("transformers")
    pairs = [(TEXTS[0], "Mark it."), ("Why?", "Drill a small hole. Mark it.")]
    for name in ("policy", "pm", "adapter"):
        if name == "adapter":
            pytest.importorskip("peft")
        code = re.search(r"```python\n(.*?)```", (world / name / "README.md").read_text(), re.DOTALL)[1]
        code = code.replace(f'"{name}"', repr(str(world / name)))
        capsys.readouterr()
        exec(code, {"prompt": TEXTS[0], "pairs": pairs})
        said = capsys.readouterr().out
        if name == "pm":
            ours = reward.Scorers([world / name]).score(*zip(*pairs))[0]
            found = re.search(r"tensor\(\[(.*?)\]", said)[1].split(",")
            torch.testing.assert_close(torch.tensor([float(x) for x in found]), ours, atol=1e-3, rtol=1e-2)


# ----------------------------------------------------------------------------------------------------------------
# TRL and peft


def test_trl_goes_on_from_a_folder_and_takes_the_pairs_as_they_are(world, tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    lines = (world / "pairs.jsonl").read_text().splitlines(keepends=True)
    better = tmp_path / "better.jsonl"
    better.write_text("".join(line for line in lines if json.loads(line)["relation"] == "better"))
    for kind, file, key in (("SFT", world / "pairs.jsonl", "input_ids"), ("SFT", better, "input_ids"),
                            ("DPO", better, "prompt_ids")):
        rows = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache"))
        config = getattr(trl, f"{kind}Config")(
            output_dir=str(tmp_path / "trl"), max_steps=2, per_device_train_batch_size=2, use_cpu=True, bf16=False,
            report_to="none", save_strategy="no", max_length=2000, disable_tqdm=True)
        trainer = getattr(trl, f"{kind}Trainer")(str(world / "policy"), args=config, train_dataset=rows)
        assert trainer.train().global_step == 2
        first = trainer.train_dataset[0]
        prompt = ids_of(world / "policy", rows[0]["prompt"])
        assert first[key][:len(prompt) - 1] == prompt[:-1], "but for tokens that join prompt and completion"
        ends = [first["input_ids"]] if kind == "SFT" else [first["chosen_ids"], first["rejected_ids"]]
        assert all(ids[-1] == 1 for ids in ends), "EOS is learned"


def test_peft_loads_an_adapter_from_where_it_was_trained_and_onto_its_base(world, tmp_path, monkeypatch):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    monkeypatch.chdir(world)
    trained("sft", Path("policy"), world / "rated.jsonl", world / "sub/adapter", "--lora-rank", 2)
    ids = torch.tensor([ids_of(world / "policy", TEXTS[0])])
    adapted = peft.AutoPeftModelForCausalLM.from_pretrained("sub/adapter")
    monkeypatch.chdir(tmp_path)
    base = transformers.AutoModelForCausalLM.from_pretrained(world / "policy")
    onto = peft.PeftModel.from_pretrained(base, world / "sub/adapter")
    tokenizer = transformers.AutoTokenizer.from_pretrained(world / "sub/adapter")
    assert tokenizer(TEXTS[0]).input_ids == ids[0].tolist()
    import model
    with torch.no_grad():
        ours = model.logits(checkpoint.load(world / "sub/adapter"), ids)
        for theirs in (adapted, onto):
            torch.testing.assert_close(theirs(ids).logits, ours, atol=1e-4, rtol=1e-4)


# ----------------------------------------------------------------------------------------------------------------
# transformers serve


@pytest.fixture
def served(world, request):
    """The URL of `transformers serve`, with the policy loaded, or the folder that the test names."""
    folder = world / getattr(request, "param", "policy")
    for name in ("transformers", "fastapi", "uvicorn", "openai"):
        pytest.importorskip(name)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [Path(sys.executable).with_name("transformers"), "serve", folder, "--host", "127.0.0.1", "--port",
         str(port), "--device", "cpu"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})
    url, until = f"http://127.0.0.1:{port}", time.monotonic() + 120
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        while not answers(opener, url):
            assert server.poll() is None and time.monotonic() < until, "the server does not start"
            time.sleep(0.5)
        yield url
    finally:
        server.terminate()
        server.wait(30)


def answers(opener, url):
    try:
        opener.open(f"{url}/health", timeout=5).close()
        return True
    except OSError:
        return False


def test_a_served_policy_answers_as_its_folder_does(world, served, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    asked = list(dict.fromkeys(row["prompt"] for row in map(json.loads, (world / "rated.jsonl").open())))[:3]
    prompts = write(tmp_path / "prompts.jsonl", *({"prompt": prompt} for prompt in asked))
    words = ["--model", world / "aligner", "--data", prompts, "--policy", served, "--policy-model", world / "policy",
             "--out", tmp_path / "out.jsonl", "--objectives", "harmless", "--max-new-tokens", 16, "--device", "cpu"]
    assert run(align, monkeypatch, words) == 0
    said = [json.loads(row)["original"].strip() for row in (tmp_path / "out.jsonl").open()]
    llama, tokenizer = checkpoint.load(world / "policy"), checkpoint.load_tokenizer(world / "policy")
    ours = generate(llama, [ids_of(world / "policy", prompt) for prompt in asked], 16)
    assert said == [tokenizer.decode(ids).strip() for ids in ours]


@pytest.mark.parametrize("served", ["aligner"], indirect=True)
def test_a_served_aligner_edits_as_its_folder_does(world, served, tmp_path, monkeypatch):
    """By completions, and by chats of one message. Both make the ids of the text that training made of it: BOS, and no
    other special token."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(writers, "computes_bf16", lambda device: False)  # fp32, as the server computes
    words = ["--data", world / "rated.jsonl", "--objectives", "harmless", "--max-new-tokens", 16, "--limit", 6]
    here = [*words, "--model", world / "aligner", "--out", tmp_path / "here.jsonl", "--device", "cpu"]
    assert run(align, monkeypatch, here) == 0
    for template in ("plain", "auto"):
        there = [*words, "--model", served, "--model-name", world / "aligner", "--out", tmp_path / "there.jsonl"]
        assert run(align, monkeypatch, [*there, "--chat-template", template]) == 0
        assert (tmp_path / "there.jsonl").read_bytes() == (tmp_path / "here.jsonl").read_bytes()
    transformers = pytest.importorskip("transformers")
    tokenizer, writer = transformers.AutoTokenizer.from_pretrained(world / "aligner"), align.Writer(world / "aligner")
    for row in map(json.loads, (tmp_path / "here.jsonl").open()):
        text, context = data.aligner_prompt(row["prompt"], row["original"], data.find_objectives(["harmless"]))
        assert tokenizer(text).input_ids == writer.encode(text, 16, context)
        messages = [{"role": "user", "content": text}]
        assert tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) == \
            writer.encode(text, 16, context)
