"""On a GPU, and on the pretended one of every other machine (test_pretend.py): whole commands, from their arguments to
what they write, beside what a CPU writes. `python bench.py gpu` runs them first."""
import json
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import align
import bench
import checkpoint
import combine
import generate
import lora
import model
import parallel
import ppo
import resume
import reward
import toy
import train
from conftest import run, write
from model import Config, Llama

pytestmark = pytest.mark.cuda

SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=512, bos_token_id=0, eos_token_id=1)
STEPS = ["--batch", 4, "--micro-tokens", 150, "--epochs", 9, "--max-steps", 3, "--val-every", 3, "--lr", 1e-2,
         "--save-seconds", 0, "--val-share", 0.2]


def tiny(seed=0, **changes):
    """A small random model whose texts depend on all that stands before."""
    llama, generator = Llama(Config(**{"vocab_size": 400, **SIZES, **changes})), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in llama.named_parameters():
            parameter.copy_(("norm" in name) + 0.25 * torch.randn(parameter.shape, generator=generator))
    return llama


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with models "a" and "b", texts.jsonl to fine-tune on, rated.jsonl, labels.jsonl on two principles."""
    folder, rated = tmp_path_factory.mktemp("world"), list(toy.rated(16, 3))
    words = [row["prompt"] + answer["text"] for row in rated for answer in row["responses"]]
    tokenizer = toy.train_tokenizer(words, 400)
    for name in "ab":
        checkpoint.save(tiny(ord(name), vocab_size=tokenizer.get_vocab_size()), folder / name)
        tokenizer.save(str(folder / name / "tokenizer.json"))
    texts = [(row["prompt"], [answer["text"][:40 + 9 * (n % 2)] for n, answer in enumerate(row["responses"])])
             for row in rated]
    write(folder / "texts.jsonl", *({"prompt": prompt, "completion": answers[0]} for prompt, answers in texts))
    write(folder / "rated.jsonl", *rated)
    write(folder / "pairs.jsonl", *({"prompt": prompt, "chosen": one, "rejected": two}
                                    for prompt, (one, two, *_) in texts))
    write(folder / "labels.jsonl", *({"prompt": prompt, "response_a": one, "response_b": two, "principle": name,
                                      "p_a": p_a} for prompt, (one, two, *_) in texts
                                     for name, p_a in (("short", float(len(one) < len(two))), ("odd", 0.7))))
    return folder


def losses(out):
    return [row[name] for row in resume.read_metrics(out) for name in ("loss", "val_loss") if name in row]


def trained(monkeypatch, world, out, method, data, device, *more):
    words = [method, "--model", world / "a", "--data", world / data, "--out", out, "--device", device, *STEPS,
             "--samples", 0, *more]
    assert run(train, monkeypatch, words) == 0
    return losses(out)


WAYS = {"fp32": ["--precision", "fp32"], "LoRA": ["--lora-rank", 4],
        "lean": ["--precision", "bf16", "--bf16-moments", "--checkpoint-activations", "--samples", 1]}


@pytest.mark.parametrize("way", WAYS)
def test_training_finds_the_losses_of_a_cpu(world, tmp_path, monkeypatch, way):
    """Those of fp32 there, whatever is rounded here; and where the run is cut off and goes on, its own."""
    rank = ["--lora-rank", 4] if way == "LoRA" else []
    expected = trained(monkeypatch, world, tmp_path / "cpu", "sft", "texts.jsonl", "cpu", "--precision", "fp32", *rank)
    close = 1e-3 if way == "fp32" else 0.02
    found = trained(monkeypatch, world, tmp_path / "gpu", "sft", "texts.jsonl", "cuda", *WAYS[way])
    assert found == pytest.approx(expected, rel=close) and len(found) == 5
    assert abs(expected[-1] - expected[0]) > 3e-3, "what is learned is heard"
    put = resume.Run.write

    def cut_off(self, row):
        put(self, row)
        if row.get("step") == 2:
            raise KeyboardInterrupt
    monkeypatch.setattr(resume.Run, "write", cut_off)
    words = [monkeypatch, world, tmp_path / "cut", "sft", "texts.jsonl", "cuda", *WAYS[way]]
    with pytest.raises((KeyboardInterrupt, AssertionError)):
        trained(*words)
    monkeypatch.setattr(resume.Run, "write", put)
    assert (tmp_path / "cut/state.pt").exists()
    assert trained(*words, "--resume") == pytest.approx(found, rel=close / 10)


def test_a_run_of_dpo_begins_at_its_reference(world, tmp_path, monkeypatch):
    more = ["--precision", "fp32", "--beta", 0.5]
    here, there = (trained(monkeypatch, world, tmp_path / device, "dpo", "pairs.jsonl", device, *more)
                   for device in ("cpu", "cuda"))
    assert there == pytest.approx(here, rel=2e-3) and there[0] == pytest.approx(math.log(2), rel=1e-5)
    assert abs(there[-1] - there[0]) > 0.01


def test_preference_models_are_trained_and_asked(world, tmp_path, monkeypatch):
    """A head is trained in fp32, whatever its base is held in; several models are asked side by side."""
    words = ["train", world / "labels.jsonl", "--model", world / "a", "--out", tmp_path / "pms", "--device", "cuda",
             *STEPS, "--max-steps", 1, "--micro-tokens", 4000, "--lora-rank", 4]
    assert run(reward, monkeypatch, words) == 0
    llama = train.start_from(world / "a", "reward", model.device_named("cuda"), train.Options(lora_rank=4))
    assert parallel.trained(llama)["score.weight"].dtype == torch.float32
    models = [tmp_path / "pms" / name for name in ("short", "odd")]
    here, there = (reward.Scorers(models, device).score(["How?", "Why?"], ["So.", "Do it so, now."])
                   for device in ("cpu", "cuda"))
    assert here.shape == (2, 2) and (here - there).abs().max() < 0.05 * here.abs().max()


def test_a_policy_is_trained_by_ppo(world, tmp_path, monkeypatch):
    words = ["--model", world / "a", "--data", world / "rated.jsonl", "--reward", "toy:concise", "--lr", 1e-3,
             "--iterations", 2, "--rollouts", 6, "--minibatch", 3, "--update-epochs", 1, "--max-new-tokens", 6,
             "--reference-count", 6, "--precision", "fp32"]
    for device in ("cpu", "cuda"):
        assert run(ppo, monkeypatch, [*words, "--out", tmp_path / device, "--device", device]) == 0
    here, there = (resume.read_metrics(tmp_path / device) for device in ("cpu", "cuda"))
    for name in ("reward", "policy_loss", "value_loss", "grad_norm", "length"):
        assert [row[name] for row in there] == pytest.approx([row[name] for row in here], rel=2e-2, abs=1e-4), name


@pytest.mark.parametrize("draft, adapted", [(0, False), (7, True)])
def test_drawn_texts_are_those_of_a_cpu(draft, adapted):
    llama, prompts = tiny(3), [[3, 4, 5, 6], [7], [8, 9, 3, 4, 5, 6, 8, 9, 3, 4, 5, 6, 8], list(range(3, 90))]
    if adapted:
        llama = lora.add_lora(llama, 4, "base")
        for name, parameter in llama.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(len(name)))
    how = dict(temperature=0.7, stop_ids=(1, 11), seed=[5, 6, 7, 8], draft=draft, top_p=0.9, top_k=50)
    expected = generate.generate(llama, prompts, 20, **how)
    assert dict(generate.stream(llama.to("cuda"), prompts, 20, 3, **how)) == dict(enumerate(expected))
    assert max(map(len, expected)) > 8
    assert model.generate(llama, prompts, 4) == generate.generate(llama, prompts, 4, draft=draft)


def test_answers_are_aligned(world, tmp_path, monkeypatch):
    out = tmp_path / "aligned.jsonl"
    assert run(align, monkeypatch, ["--model", world / "a", "--data", world / "rated.jsonl", "--objectives", "helpful",
                                    "--limit", 6, "--max-new-tokens", 8, "--out", out, "--device", "cuda"]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 6 and all(row["aligned"] for row in rows)


def test_models_answer_together(world, tmp_path, monkeypatch):
    words = ["answer", world / "a", world / "b", "--weights", 0.4, 0.6, "--data", world / "rated.jsonl", "--limit", 4,
             "--max-new-tokens", 6, "--out", tmp_path / "answers.jsonl", "--device", "cuda"]
    assert run(combine, monkeypatch, words) == 0
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize("kind, job", [
    ("train_large", dict(options={})), ("train_large", dict(options=dict(lora_rank=2, checkpoint_activations=True))),
    ("decode", dict(dtype="bfloat16", batch=3)),
    ("ppo_ours", dict(options=dict(rollouts=4, minibatch=2, max_new_tokens=3, update_epochs=1)))], ids=str)
def test_what_is_to_be_timed_runs(tmp_path, monkeypatch, kind, job):
    """bench.py's jobs, of tiny models; in decode's, 3 tokens at most are written."""
    write = generate.generate
    monkeypatch.setattr(generate, "generate", lambda llama, prompts, count: write(llama, prompts, min(count, 3)))
    size = {name: SIZES[name] for name in SIZES if "position" not in name and "id" != name[-2:]}
    given = dict(batches=bench.random_batches(60, [7, 9], 3)) if kind == "train_large" else {}
    found = bench.JOBS[kind](tmp_path, "cuda", config={**size, "vocab_size": 60}, **given, **job)
    assert found.get("peak", 1) > 0 and found["seconds"]


def test_little_is_sent_to_a_gpu_for_a_token():
    """What hides later tokens from earlier ones is made there: a pass sends a few numbers for each new token."""
    llama, sizes = tiny().to("cuda"), []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, given=(), named=None):
            if operation is torch.ops.aten._to_copy.default and (named or {}).get("device"):
                sizes.append(given[0].numel())
            return operation(*given, **(named or {}))
    cache = generate.Cache(llama.config, 3, torch.float32, llama.device)
    with torch.no_grad():
        generate.prefill(llama, cache, [[5] * 200] * 3, 0)
        with Copies():
            generate.advance(llama, cache, [[7] * 8] * 3)
    assert 0 < sum(sizes) <= 6 * 3 * 8, sizes


def test_logits_are_made_in_large_chunks(monkeypatch):
    """As many rows at a time as give CHUNK logits, and the numbers of a CPU."""
    llama, tokens, sizes = tiny(), torch.arange(3, 43), []
    places = torch.arange(1, 40)
    expected = model.token_logprobs(llama, tokens, [40], places).detach()
    llama.to("cuda").lm_head.register_forward_hook(lambda layer, given, made: sizes.append(len(given[0])))
    monkeypatch.setattr(model, "CHUNK", 400 * 16)
    with torch.no_grad():
        found = model.token_logprobs(llama, tokens.to("cuda"), [40], places.to("cuda"))
    assert sizes == [16, 16, 7] and torch.allclose(found.cpu(), expected, atol=1e-4)


def test_what_lies_on_two_devices_is_no_sum():
    """Of the device itself: what all of the above rests on."""
    here, there = torch.ones(3), torch.ones(3, device="cuda")
    for mixed in (lambda: here + there, lambda: here @ there, lambda: torch.cat([here, there]),
                  lambda: tiny().to("cuda")(torch.tensor([[1]]))):
        with pytest.raises(RuntimeError, match="device"):
            mixed()
    with pytest.raises((TypeError, RuntimeError)):
        there.numpy()
    with pytest.raises(RuntimeError, match="device"):
        torch.randn(3, device="cuda", generator=torch.Generator())
    assert (here + there.cpu()).tolist() == [2, 2, 2]
