# ruff: noqa: F811 (the fixture of test_train.py, under its own name)
"""Training in two processes (gloo, on the CPU), beside the same training in one."""
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import formats
import parallel
import resume
import reward
import train
from common import UserError, read_options, write_jsonl
from conftest import interrupt_at_state, refused, run
from model import Config, Llama
from test_train import ROOT, metrics, random_examples, world  # noqa: F401 (a fixture)
from train import METHODS, Options, Stage

# Runs the command lines in a file, one after another, in processes that torchrun has started; of the first, it writes
# what each process holds: the bytes of weights, of their gradients, and of moments.
WORKER = """
import json, sys
import torch
import common, parallel, reward, train
clip, step, held = torch.nn.utils.clip_grad_norm_, train.train_step, {}

def measured(found):
    return sum(x.to_local().nbytes for x in found if torch.is_tensor(x) and x.dim())

def clip_measured(parameters, most):
    parameters = list(parameters)
    held.setdefault("weights", measured(parameters))
    held.setdefault("gradients", measured([p.grad for p in parameters]))
    return clip(parameters, most)

def step_measured(llama, optimizer, *rest):
    told = step(llama, optimizer, *rest)
    held.setdefault("moments", measured([x for state in optimizer.state.values() for x in state.values()]))
    return told

torch.nn.utils.clip_grad_norm_, train.train_step = clip_measured, step_measured
jobs, out = sys.argv[1:]
with parallel.processes("cpu") as device:
    for words in json.load(open(jobs)):
        if words[0] == "principles":
            options = common.read_options(train.Options, train.arguments(["reward", *words[1:]]))
            data, base, out_folder = words[words.index("--data") + 1], words[2], words[words.index("--out") + 1]
            reward.run_train([data], base, out_folder, None, device, options)
        else:
            args = train.arguments(words)
            train.run(args, common.read_options(train.Options, args), torch.device(device))
    json.dump(held, open(f"{out}/held-{parallel.rank()}.json", "w"))
"""
RATED = ["--weights", "harmless=1,helpful=1"]
JOBS = {  # name: the method, its data, options
    "sft": ("sft", "rated.jsonl", "--micro-tokens", 150, "--max-steps", 4, "--val-every", 3),  # in several passes
    "stages": ("aligner", "pairs.jsonl", "--steps", "equal", "better"),
    "dpo": ("dpo", "rated.jsonl", *RATED),
    "lora": ("sft", "rated.jsonl", "--lora-rank", 2),
    "bf16 moments": ("sft", "rated.jsonl", "--bf16-moments"),
    "muon": ("sft", "rated.jsonl", "--optimizer", "muon"),
    "recomputed": ("sft", "rated.jsonl", "--checkpoint-activations", "--batch", 1),  # one process has no example
    "replicated": ("sft", "rated.jsonl", "--replicate"),
    "principles": ("principles", "labels.jsonl", "--lora-rank", 2),
}


def words_of(world, job, out):
    method, data, *changes = job
    shared = ["--lr", 3e-3, "--batch", 4, "--max-steps", 2, "--val-share", 0.2, "--precision", "fp32", "--samples", 1,
              "--device", "cpu", "--save-seconds", 1000]
    words = [method, "--model", world / "base", "--data", world / data, "--out", out, *shared, *changes]
    return [str(word) for word in words]


def torchrun(*words):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TORCH_CPP_LOG_LEVEL": "ERROR"}
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                             *map(str, words)], env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE)


LONG = ("sft", "rated.jsonl", "--max-steps", 8, "--epochs", 4, "--save-seconds", 0,
        "--optimizer", "muon")  # whose state holds AdamW's moments too, of all but the blocks' matrices


@pytest.fixture(scope="module")
def killed(world, tmp_path_factory):
    """The folder of a run of which one of two processes was killed in a step after the first; what was said."""
    out = tmp_path_factory.mktemp("killed") / "out"
    agent = torchrun(ROOT / "train.py", *words_of(world, LONG, out))
    deadline, rows = time.monotonic() + 300, out / "metrics.jsonl"
    while not (rows.exists() and b'"step": 3, "loss"' in rows.read_bytes()):
        assert agent.poll() is None and time.monotonic() < deadline, agent.communicate()
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.5))
    workers = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    os.kill(int(random.choice(workers)), signal.SIGKILL)
    said = agent.communicate(timeout=300)[1].decode()
    assert agent.returncode
    return out, said


@pytest.fixture(scope="module")
def together(world, killed, tmp_path_factory):
    """The folder with what two processes made of JOBS, and of runs that one and two of them began."""
    folder = tmp_path_factory.mktemp("together")
    shutil.copytree(killed[0], folder / "of two")
    with pytest.MonkeyPatch.context() as patch:
        stopped(patch, world, folder / "of one")
    write_jsonl(world / "labels.jsonl", [
        formats.preference(row["prompt"], *(response["text"] for response in row["responses"][:2]), principle, 0.9)
        for row in formats.read_rated(world / "rated.jsonl") for principle in ("polite", "brief")])
    jobs = [words_of(world, job, folder / name) for name, job in JOBS.items()]
    jobs += [[*words_of(world, LONG, folder / name), "--resume"] for name in ("of one", "of two")]
    jobs.append([*words_of(world, JOBS["sft"], folder / "sft"), "--resume"])  # which is finished
    (folder / "jobs.json").write_text(json.dumps(jobs))
    (folder / "worker.py").write_text(WORKER)
    agent = torchrun(folder / "worker.py", folder / "jobs.json", folder)
    told, said = (stream.decode() for stream in agent.communicate(timeout=600))
    assert agent.returncode == 0, said
    assert told.count("saved in") == len(jobs), "one of the processes speaks"
    return folder


def stopped(patch, world, out):
    """A run of one process that ends after its third state."""
    interrupt_at_state(patch, 3)
    assert run(train, patch, words_of(world, LONG, out)) == 130


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """The folder of LONG, trained in one process without a stop."""
    out = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as patch:
        assert run(train, patch, words_of(world, LONG, out)) == 0
    return out


def assert_same(out, expected):
    """The same files, rows of metrics to 1e-4, and weights: to 1e-4, but for the few whose gradients are nearly
    nothing, which AdamW makes as long a step of as of any; these, to a step of the learning rate."""
    assert {path.name for path in out.iterdir()} == {path.name for path in expected.iterdir()}
    rows = metrics(expected)
    for row, other in zip(metrics(out), rows, strict=True):
        assert {**row, "seconds": 0} == pytest.approx({**other, "seconds": 0}, abs=1e-4) if "loss" in row else \
            row.pop("val_loss") == pytest.approx(other.pop("val_loss"), abs=1e-4) and row == other
    for path in expected.glob("*.safetensors"):
        found, wanted = load_file(out / path.name), load_file(path)
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=3e-3)
        apart = torch.cat([(found[name] - wanted[name]).abs().flatten() for name in wanted])
        assert (apart > 1e-4).float().mean() < 1e-3


@pytest.mark.parametrize("name", [name for name in JOBS if name != "principles"])
def test_two_processes_train_as_one_does(world, together, tmp_path, monkeypatch, name):
    assert run(train, monkeypatch, words_of(world, JOBS[name], tmp_path / name)) == 0
    assert_same(together / name, tmp_path / name)


def test_two_processes_train_preference_models(world, together, tmp_path):
    words = words_of(world, JOBS["principles"], tmp_path)
    options = read_options(Options, train.arguments(["reward", *words[1:]]))
    reward.run_train([str(world / "labels.jsonl")], str(world / "base"), tmp_path, None, "cpu", options)
    for folder in (tmp_path / "polite", tmp_path / "brief"):
        assert_same(together / "principles" / folder.name, folder)
        found, expected = (json.loads((path / "principle.json").read_text()) for path in (
            together / "principles" / folder.name, folder))
        assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", ["of one", "of two"])
def test_a_killed_run_goes_on_in_two_processes(together, whole, name):
    """Begun by one process, or by two, of which one was killed."""
    assert_same(together / name, whole)
    assert "resumed" in resume.read_run(together / name)


def test_a_killed_run_of_two_goes_on_in_one(killed, world, whole, tmp_path, monkeypatch):
    """And nothing is lost that was reported before the state that was put in place."""
    said, out = killed[1], shutil.copytree(killed[0], tmp_path / "out")
    told = [line for line in said.splitlines() if line.startswith("error:")]
    assert len(told) <= 1 and all("--resume" in line for line in told), said
    state = torch.load(out / "state.pt", weights_only=True)
    assert state["step"] >= 2 and (out / state["folder"]).is_dir()
    assert (out / "metrics.jsonl").stat().st_size >= state["metrics_bytes"]
    assert run(train, monkeypatch, [*words_of(world, LONG, out), "--resume"]) == 0
    assert_same(out, whole)


def test_a_damaged_state_of_several_processes_is_one_line(killed, world, tmp_path, monkeypatch, capsys):
    out = shutil.copytree(killed[0], tmp_path / "out")
    (out / torch.load(out / "state.pt", weights_only=True)["folder"] / "__1_0.distcp").unlink()
    refused(train, monkeypatch, capsys, [*words_of(world, LONG, out), "--resume"], "state.pt", "delete it")


def test_a_card_holds_what_the_readme_says(world, together):
    """Sixteen bytes a parameter by the number of processes, of the tiny model as it is, of those in the table by it."""
    count = sum(weight.numel() for weight in load_file(world / "base" / "model.safetensors").values())
    for place in range(2):
        held = json.loads((together / f"held-{place}.json").read_text())
        assert held == {"weights": 4 * count / 2, "gradients": 4 * count / 2, "moments": 8 * count / 2}
    shared = dict(vocab_size=32000)
    models = {"TinyLlama 1.1B": Config(**shared, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22,
                                       num_attention_heads=32, num_key_value_heads=4),
              "Llama 2 7B": Config(**shared, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                                   num_attention_heads=32),
              "Llama 2 13B": Config(**shared, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40,
                                    num_attention_heads=40)}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, config in models.items():
        with torch.device("meta"):
            count = sum(parameter.numel() for parameter in Llama(config).parameters())
        told = re.search(rf"\| {name} \| (.*) \|\n", readme)[1].split(" | ")
        assert told == [f"{16 * count / cards / 1e9:.1f}" for cards in (1, 2, 4, 8, 16)]


@pytest.mark.parametrize("processes", [2, 3, 8])
@pytest.mark.parametrize("count", [1, 2, 30])
def test_a_steps_examples_are_shared_out_by_tokens(monkeypatch, processes, count):
    """Each to one process; no share is larger than another by more than an example; as many passes for each."""
    examples, options = random_examples(count, 1), Options(micro_tokens=25)
    monkeypatch.setattr(parallel, "several", lambda: True)
    monkeypatch.setattr(parallel, "count", lambda: processes)
    shares = parallel.shares(examples, train.size)
    assert sorted(map(id, sum(shares, []))) == sorted(map(id, examples)) and len(shares) == processes
    loads = [sum(map(train.size, share)) for share in shares]
    assert max(loads) - min(loads) <= max(map(train.size, examples))
    passes, targets = [], 0
    for place in range(processes):
        monkeypatch.setattr(parallel, "rank", lambda place=place: place)
        batches = list(train.batches_of(examples, options, "cpu"))
        passes.append(len(batches))
        targets += sum(batch.count for batch in batches)
        assert sum(len(batch.tokens) for batch in batches if not batch.spare) == loads[place]
    assert len(set(passes)) == 1 and targets == train.batch_of(examples, "cpu").count
    assert passes[0] <= math.ceil(max(loads) / 25) * 2


def test_what_needs_one_process_is_refused_by_name(monkeypatch, tmp_path):
    monkeypatch.setattr(parallel, "several", lambda: True)
    with pytest.raises(UserError, match="kto: compares all examples of a pass.*without torchrun"):
        train.train(None, None, [Stage("kto", [], method=METHODS["kto"])], tmp_path / "out", Options())
