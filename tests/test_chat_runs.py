"""Chat templates in whole runs of an instruct model: training, answers, edits, preference models, rollouts."""
import json
import re
import shutil

import pytest
import torch

import align
import chat
import checkpoint
import combine
import data
import feedback
import ppo
import reward
import scorers
import train
import writers
from common import UserError
from conftest import refused, response, run, write
from model import Config, Llama
from resume import read_run
from test_chat import BY_HAND, DIALOGUE, LLAMA_3, QWEN, SIZES, SPECIAL, byte_level_tokenizer, instruct


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with "instruct", an untrained model with a ChatML template, and data of two questions."""
    folder = tmp_path_factory.mktemp("world")
    tokenizer = byte_level_tokenizer()
    instruct(folder / "instruct", QWEN, tokenizer)
    checkpoint.save(Llama(Config(vocab_size=tokenizer.get_vocab_size(), **SIZES)), folder / "instruct")
    (folder / "instruct" / "generation_config.json").write_text('{"eos_token_id": [4, 2]}')
    write(folder / "sft.jsonl", *[{"prompt": prompt, "completion": answer} for prompt, answer in
                                  ((DIALOGUE, "Salt it."), ("How do I cook rice?", "With water."))] * 8)
    write(folder / "prompts.jsonl", {"prompt": DIALOGUE}, {"prompt": "How do I cook rice?"})
    write(folder / "pairs.jsonl", *[{"prompt": DIALOGUE, "chosen": "Salt it.", "rejected": "No."}] * 4)
    return folder


def trained(world, method, out, source, *extra, base=None):
    settings = {"lr": 1e-2, "batch": 4, "max-steps": 2, "val-share": 0, "device": "cpu", "max-tokens": 400}
    words = [method, "--model", base or world / "instruct", "--data", world / source, "--out", out]
    return [*words, *[word for name, value in settings.items() for word in (f"--{name}", value)], *extra]


@pytest.fixture(scope="module")
def taught(world):
    """The model after it has learned both answers by heart."""
    with pytest.MonkeyPatch.context() as patch:
        words = trained(world, "sft", world / "taught", "sft.jsonl", "--epochs", 99, "--max-steps", 60)
        assert run(train, patch, words) == 0
    return world / "taught"


def test_what_was_trained_with_a_template_is_asked_with_it_and_ends_with_it(world, taught, tmp_path, monkeypatch):
    """It says by heart what it learned, and no more; asked without the template, it does not."""
    found = {}
    for how in ("auto", "plain"):
        words = ["answer", world / "prompts.jsonl", "--policy", taught, "--out", tmp_path / how, "--temperature", 0,
                 "--responses", 1, "--device", "cpu", "--max-new-tokens", 20, "--chat-template", how]
        assert run(feedback, monkeypatch, words) == 0
        found[how] = [json.loads(line)["responses"][0]["text"] for line in (tmp_path / how).read_text().splitlines()]
    assert found["auto"] == ["Salt it.", "With water."] and found["plain"] != found["auto"]
    config = json.loads((taught / "config.json").read_text())
    assert config["eos_token_id"] == [4, 2]
    assert read_run(taught)["settings"]["chat_template"] == chat.fingerprint(taught)


def test_a_policys_and_an_aligners_template_are_found_by_align(world, taught, tmp_path, monkeypatch):
    asked = []
    write_to = align.Writer.write

    def watched(self, prompts, *rest, **options):
        asked.append([self.tokenizer.tokenizer.decode(ids, skip_special_tokens=False) for ids in prompts])
        return write_to(self, prompts, *rest, **options)
    monkeypatch.setattr(align.Writer, "write", watched)
    words = ["--model", taught, "--policy", taught, "--data", world / "prompts.jsonl", "--out", tmp_path / "o.jsonl",
             "--objectives", "helpful", "--max-new-tokens", 12, "--device", "cpu"]
    assert run(align, monkeypatch, words) == 0
    policy, aligner = asked
    assert policy[1] == ("<|im_start|>system\nBe of use.<|im_end|>\n<|im_start|>user\nHow do I cook rice?<|im_end|>\n"
                         "<|im_start|>assistant\n")
    text, _ = data.aligner_prompt("How do I cook rice?", "With water.", [data.OBJECTIVES["helpful"]])
    assert aligner[1] == policy[1].replace("How do I cook rice?", text)


def test_an_answer_to_another_template_is_not_taken(world, taught, tmp_path, monkeypatch, capsys):
    """A killed align.py does not go on, nor does train.py give what it has, when the template has changed since."""
    for name in ("model", "policy"):
        shutil.copytree(taught, tmp_path / name)
    words = ["--model", tmp_path / "model", "--policy", tmp_path / "policy", "--data", world / "prompts.jsonl", "--out",
             tmp_path / "o.jsonl", "--objectives", "helpful", "--max-new-tokens", 4, "--device", "cpu"]

    def stop(*_):
        raise UserError("stopped")
    with monkeypatch.context() as patch:
        patch.setattr(align, "write_rows", stop)
        assert run(align, patch, words) == 2
    for name in ("model", "policy"):
        instruct(tmp_path / name, QWEN.replace("of use", "kind"))
        refused(align, monkeypatch, capsys, words, "run with other settings")
        instruct(tmp_path / name, QWEN)
    refused(align, monkeypatch, capsys, [*words, "--chat-template", "plain"], "run with other settings")
    assert run(align, monkeypatch, words) == 0
    again = trained(world, "sft", tmp_path / "out", "sft.jsonl", base=tmp_path / "model")
    assert run(train, monkeypatch, again) == 0
    assert run(train, monkeypatch, again) == 0 and "finished already" in capsys.readouterr().out
    instruct(tmp_path / "model", QWEN.replace("of use", "kind"))
    refused(train, monkeypatch, capsys, again, "other", "chat_template", "data")


def test_what_was_trained_without_a_template_is_asked_without(world, tmp_path, monkeypatch):
    """Also where a template lies beside the model, and also as a base."""
    out = tmp_path / "out"
    assert run(train, monkeypatch, trained(world, "sft", out, "sft.jsonl", "--chat-template", "plain")) == 0
    assert (out / "tokenizer_config.json").exists() and not isinstance(align.Writer(out, "cpu").tokenizer, chat.Chat)
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == 2
    assert run(train, monkeypatch, trained(world, "sft", tmp_path / "on", "sft.jsonl", base=out)) == 0
    assert read_run(tmp_path / "on")["settings"]["chat_template"] is None


def test_an_adapter_without_a_template_has_that_of_its_base(world, tmp_path, monkeypatch):
    """As peft leaves one."""
    out = tmp_path / "adapter"
    assert run(train, monkeypatch, trained(world, "sft", out, "sft.jsonl", "--lora-rank", 2)) == 0
    before = chat.fingerprint(out)
    for path in out.iterdir():
        if not path.name.startswith(("adapter", "tokenizer.json")):
            path.unlink()
    assert chat.fingerprint(out) == before == chat.fingerprint(world / "instruct") is not None
    assert isinstance(align.Writer(out, "cpu").tokenizer, chat.Chat)


def test_another_models_template_does_not_outlive_it(world, tmp_path, monkeypatch):
    shutil.copytree(world / "instruct", tmp_path / "other")
    (tmp_path / "other" / "chat_template.jinja").write_text(LLAMA_3)
    out = tmp_path / "out"
    assert run(train, monkeypatch, trained(world, "sft", out, "sft.jsonl", base=tmp_path / "other")) == 0
    assert (out / "chat_template.jinja").read_text() == LLAMA_3
    assert run(train, monkeypatch, trained(world, "sft", out, "sft.jsonl", "--overwrite")) == 0
    assert not (out / "chat_template.jinja").exists() and chat.fingerprint(out) == chat.fingerprint(world / "instruct")


@pytest.mark.parametrize("method, extra", [("dpo", []), ("simpo", []), ("dpo", ["--lora-rank", 2])])
def test_preferences_are_learned_behind_the_template(method, extra, world, tmp_path, monkeypatch):
    seen, packed = [], train.pack
    monkeypatch.setattr(train, "pack", lambda examples, *rest: seen.extend(examples) or packed(examples, *rest))
    assert run(train, monkeypatch, trained(world, method, tmp_path / "out", "pairs.jsonl", *extra)) == 0
    prompt = BY_HAND["qwen"].replace("Be brief.", "Be of use.")
    tokenizer = align.Writer(tmp_path / "out", "cpu").tokenizer
    assert [tokenizer.tokenizer.decode(list(document.ids), skip_special_tokens=False)
            for document in seen[0].documents] == [f"{prompt}Salt it.<|im_end|>", f"{prompt}No.<|im_end|>"]


def test_rollouts_are_asked_behind_the_template_and_end_with_it(world, taught, tmp_path):
    options = ppo.Options(rollouts=2, max_new_tokens=20, precision="fp32")
    llama = checkpoint.load(taught)
    tokenizer = train.load_tokenizer(taught, llama, options)
    prompts = ppo.encode_prompts(tokenizer, [DIALOGUE, "How do I cook rice?"], llama.config, options)
    rollouts = ppo.sample_rollouts(llama, tokenizer, prompts, 0, options)
    assert {rollout.response for rollout in rollouts} == {"Salt it.", "With water."}
    for rollout in rollouts:
        ids = list(rollout.document.ids)
        assert rollout.finished and ids[-1] == SPECIAL.index("<|im_end|>") and ids[0] == SPECIAL.index("<|im_start|>")
    plain = chat.settings_of(checkpoint.load_tokenizer(taught))
    assert {name for name in plain if plain[name] != chat.settings_of(tokenizer)[name]} == {"chat_template"}


def test_a_preference_model_scores_behind_the_template_that_it_was_trained_with(world, tmp_path, monkeypatch):
    words = [str(word) for word in trained(world, "train", tmp_path / "pms", "pairs.jsonl")]
    words.insert(1, words.pop(words.index("--data") + 1))
    words.remove("--data")
    assert run(reward, monkeypatch, words) == 0
    model, seen, scores = scorers.Scorers([tmp_path / "pms" / "overall"], "cpu"), [], scorers.document_scores
    monkeypatch.setattr(scorers, "document_scores", lambda llama, tokens, *rest: seen.append(tokens.tolist())
                        or scores(llama, tokens, *rest))
    model.score([DIALOGUE], ["Salt it."])
    said = checkpoint.load_tokenizer(world / "instruct").decode(seen[0], skip_special_tokens=False)
    assert said == BY_HAND["qwen"].replace("Be brief.", "Be of use.") + "Salt it.<|im_end|>"
    before = model.fingerprint["overall"]
    instruct(tmp_path / "pms" / "overall", LLAMA_3)
    assert model.fingerprint["overall"] != before


def test_models_with_other_templates_are_not_joined(world, taught, tmp_path, monkeypatch, capsys):
    shutil.copytree(taught, tmp_path / "other")
    words = ["soup", taught, tmp_path / "other", "--weights", 1, 1, "--out", tmp_path / "soup"]
    assert run(combine, monkeypatch, words) == 0
    assert chat.fingerprint(tmp_path / "soup") == chat.fingerprint(taught)
    instruct(tmp_path / "other", QWEN.replace("of use", "kind"))
    refused(combine, monkeypatch, capsys, [*words[:-1], tmp_path / "2"], "another chat_template")


def test_what_is_joined_is_asked_as_its_parts_are(world, tmp_path, monkeypatch, capsys):
    """Trained without the template that lies beside them: so are their soup, and the reference of a DPO model."""
    for name in ("a", "b"):
        words = trained(world, "dpo", tmp_path / name, "pairs.jsonl", "--chat-template", "plain", "--seed", ord(name))
        assert run(train, monkeypatch, words) == 0
    words = ["soup", tmp_path / "a", tmp_path / "b", "--weights", 1, 1, "--out", tmp_path / "soup"]
    assert run(combine, monkeypatch, words) == 0
    assert chat.find(tmp_path / "soup") is None is not chat.find(world / "instruct")
    assert not isinstance(align.Writer(tmp_path / "soup", "cpu").tokenizer, chat.Chat)
    over = trained(world, "sft", tmp_path / "soup", "sft.jsonl", "--overwrite")
    refused(train, monkeypatch, capsys, over, "run of several parts", "choose another --out")
    words = ["implicit", "--policy", tmp_path / "a", "--reference", world / "instruct", "--name", "x", "--data",
             world / "pairs.jsonl", "--out", tmp_path / "scored.jsonl", "--device", "cpu"]
    assert run(combine, monkeypatch, words) == 0
    good, bad = json.loads((tmp_path / "scored.jsonl").read_text().splitlines()[0])["responses"]
    plain, chosen = checkpoint.load_tokenizer(world / "instruct"), {"prompt": DIALOGUE, "completion": good["text"]}
    sums = [combine.response_logprobs(checkpoint.load(folder), plain, [chosen], 400)[0]
            for folder in (tmp_path / "a", world / "instruct")]
    assert good["scores"]["x"] == pytest.approx(0.1 * (sums[0] - sums[1]), abs=1e-3)


def test_the_card_tells_how_a_model_behind_a_template_is_asked(world, taught, tmp_path, monkeypatch, capsys):
    """Its code, run with transformers, says what was learned by heart, and scores as we do."""
    rows = [{"prompt": f"Why {n}?", "responses": [response("Yes.", helpful=1), response("No.", helpful=0)]}
            for n in range(4)]
    write(tmp_path / "pairs.jsonl", *data.reformulate(rows, [data.OBJECTIVES["helpful"]]))
    assert run(train, monkeypatch, trained(world, "better", tmp_path / "aligner", tmp_path / "pairs.jsonl")) == 0
    card = (tmp_path / "aligner" / "README.md").read_text()
    assert f"```\n{data.TEMPLATE['better']}\n```" in card and "add_generation_prompt=True" in card
    assert run(train, monkeypatch, trained(world, "reward", tmp_path / "pm", "pairs.jsonl")) == 0
    pytest.importorskip("transformers")
    prompt, answer = "How do I cook rice?", "With water."
    for folder in (taught, tmp_path / "pm"):
        code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
        capsys.readouterr()
        exec(code.replace(f'"{folder.name}"', repr(str(folder))), {"prompt": prompt, "pairs": [(prompt, answer)]})
        said = capsys.readouterr().out
        if folder == taught:
            assert said.strip() == answer
    score = scorers.Scorers([tmp_path / "pm"], "cpu").score([prompt], [answer])
    assert float(re.search(r"tensor\(\[(.*?)\]", said)[1]) == pytest.approx(float(score), abs=2e-3)


def test_adapters_of_one_base_are_each_asked_as_they_were_trained(world, tmp_path, monkeypatch):
    """Side by side, a preference model with the template and one without score as each does alone."""
    folders = [tmp_path / how / "overall" for how in ("auto", "plain")]
    for folder in folders:
        words = ["train", world / "pairs.jsonl", "--model", world / "instruct", "--out", folder.parent, "--lora-rank",
                 2, "--lr", 1e-2, "--batch", 4, "--max-steps", 2, "--val-share", 0, "--device", "cpu", "--max-tokens",
                 400, "--chat-template", folder.parent.name]
        assert run(reward, monkeypatch, words) == 0
    texts = [DIALOGUE, "How do I cook rice?"], ["Salt it.", "With water."]
    together = scorers.Scorers(folders, "cpu").score(*texts)
    alone = [scorers.Scorers([folder], "cpu").score(*texts)[0] for folder in folders]
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-5, rtol=1e-5)


def test_chat_template_is_refused_for_a_server(tmp_path, monkeypatch, capsys):
    words = ["answer", "p.jsonl", "--policy", "http://localhost:1", "--policy-model", "x", "--out", tmp_path / "o",
             "--chat-template", "plain"]
    refused(feedback, monkeypatch, capsys, words, "--chat-template is for a folder")


def test_the_option_has_the_two_values(monkeypatch, capsys, world):
    words = trained(world, "sft", "out", "sft.jsonl", "--chat-template", "file.jinja")
    refused(train, monkeypatch, capsys, words, "--chat-template", "auto", "plain")


def test_what_ends_an_answer_is_part_of_who_answers(world, tmp_path):
    """So that edits of a model that ended otherwise are not gone on with."""
    folder = shutil.copytree(world / "instruct", tmp_path / "instruct")
    before = writers.fingerprint(str(folder), "auto")
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), "eos_token_id": [2, 5]}))
    assert writers.fingerprint(str(folder), "auto") != before == writers.fingerprint(str(world / "instruct"), "auto")
    assert writers.fingerprint(str(folder), "plain") == writers.fingerprint(str(world / "instruct"), "plain")
