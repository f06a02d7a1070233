"""ppo.py in two processes (gloo, on the CPU), beside the same run in one."""
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import checkpoint
import conftest
import parallel
import ppo
import resume
from common import UserError, read_options, write_jsonl
from test_parallel import torchrun
from test_ppo import Letters, tiny, word_tokenizer

# Runs the command lines in a file, one after another, in processes that torchrun has started; each writes the checksums
# of the weights that it holds then, and how many prompts it had at a time to respond to.
WORKER = """
import json, sys
import torch
jobs, out, tests = sys.argv[1:]
sys.path.append(tests)
import checkpoint, common, generate, parallel, ppo, test_ppo
ppo.Together = lambda words, device: test_ppo.Letters()
plain, held, written = ppo.improve, [], []

def improve(policy, *rest):
    rows = plain(policy, *rest)
    held.append(checkpoint.weights_digest(policy))
    return rows

def counted(policy, prompts, *rest, **options):
    written.append(len(prompts))
    return generate.generate(policy, prompts, *rest, **options)

ppo.improve, ppo.generate = improve, counted
with parallel.processes("cpu") as device:
    for words in json.load(open(jobs)):
        args = ppo.arguments(words)
        ppo.run(args, common.read_options(ppo.Options, args), torch.device(device))
    json.dump([held, written], open(f"{out}/held-{parallel.rank()}.json", "w"))
"""
FAST = ["--replicate", "--precision", "fp32", "--lr", "0.01", "--update-epochs", 2, "--rollouts", 8, "--minibatch", 5,
        "--iterations", 3, "--kl-target", "0.01", "--kl-horizon", 100, "--micro-tokens", 30, "--weights", 1, "-0.5",
        "--max-new-tokens", 10, "--reference-count", 6, "--device", "cpu", "--save-seconds", 1000]
JOBS = {
    "gae": FAST,
    "grpo": [*FAST, "--advantages", "grpo", "--group", 2],
    "lora": [*FAST, "--lora-rank", 2, "--bf16-moments", "--advantages", "rloo", "--group", 4],
    "one response": [*FAST, "--rollouts", 1, "--reference-count", 1, "--no-centre", "--no-norm-adv"],  # one has none
}
LONG = [*FAST, "--iterations", 6, "--save-seconds", 0]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with "policy", which answers in twelve words, soon ending, and prompts.jsonl."""
    folder = tmp_path_factory.mktemp("world")
    checkpoint.save(tiny(12, seed=1), folder / "policy")
    word_tokenizer(12).save(str(folder / "policy" / "tokenizer.json"))
    write_jsonl(folder / "prompts.jsonl", ({"prompt": prompt} for prompt in ("a b", "b", "c c a", "d e f a b c d")))
    return folder


def command(world, out, *more):
    words = ["--model", world / "policy", "--data", world / "prompts.jsonl", "--reward", "a", "long", "--out", out]
    return [str(word) for word in (*words, *more)]


def run(patch, words):
    """In this process, with rewards that need no models."""
    with patch.context() as inner:
        inner.setattr(ppo, "Together", lambda words, device: Letters())
        return conftest.run(ppo, inner, words)


def start(folder, jobs):
    """The command lines, in two processes."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    (folder / "worker.py").write_text(WORKER)
    return torchrun(folder / "worker.py", folder / "jobs.json", folder, Path(__file__).parent)


@pytest.fixture(scope="module")
def killed(world, tmp_path_factory):
    """The folder of a run of which one of two processes was killed in an iteration after the second."""
    out = tmp_path_factory.mktemp("killed") / "out"
    agent = start(out.parent, [command(world, out, *LONG)])
    deadline, rows = time.monotonic() + 300, out / "metrics.jsonl"
    while not (rows.exists() and b'"iteration": 3' in rows.read_bytes()):
        assert agent.poll() is None and time.monotonic() < deadline, agent.communicate()
        time.sleep(0.01)
    workers = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    os.kill(int(random.choice(workers)), signal.SIGKILL)
    said = agent.communicate(timeout=300)[1].decode()
    told = [line for line in said.splitlines() if line.startswith("error:")]
    assert agent.returncode and len(told) <= 1 and all("--resume" in line for line in told), said
    return out


@pytest.fixture(scope="module")
def together(world, killed, tmp_path_factory):
    """The folder with what two processes made of JOBS, and of runs that one and two of them began."""
    folder = tmp_path_factory.mktemp("together")
    shutil.copytree(killed, folder / "of two")
    with pytest.MonkeyPatch.context() as patch:
        stopped(patch, world, folder / "of one")
    jobs = [command(world, folder / name, *more) for name, more in JOBS.items()]
    jobs += [command(world, folder / name, *LONG, "--resume") for name in ("of one", "of two")]
    jobs.append([*command(world, folder / "gae", *FAST), "--resume"])  # which is finished
    agent = start(folder, jobs)
    told, said = (stream.decode() for stream in agent.communicate(timeout=600))
    assert agent.returncode == 0, said
    assert told.count("saved in") == len(jobs), "one of the processes speaks"
    return folder


def stopped(patch, world, out):
    """A run of one process that ends after its third state."""
    conftest.interrupt_at_state(patch, 3)
    assert run(patch, command(world, out, *LONG)) == 130


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """The folder of LONG, run in one process without a stop."""
    out = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as patch:
        assert run(patch, command(world, out, *LONG)) == 0
    return out


def assert_same(out, expected):
    """The same files, rows of metrics to 1e-4, and weights."""
    assert {path.name for path in out.iterdir()} == {path.name for path in expected.iterdir()}
    for row, other in zip(resume.read_metrics(out), resume.read_metrics(expected), strict=True):
        assert row.pop("score") == pytest.approx(other.pop("score"), abs=1e-4)
        assert {**row, "seconds": 0} == pytest.approx({**other, "seconds": 0}, abs=1e-4)
    for path in expected.glob("*.safetensors"):
        torch.testing.assert_close(load_file(out / path.name), load_file(path), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", JOBS)
def test_two_processes_do_as_one_does(world, together, tmp_path, monkeypatch, name):
    assert run(monkeypatch, command(world, tmp_path / "out", *JOBS[name])) == 0
    assert_same(together / name, tmp_path / "out")
    assert resume.read_run(together / name)["processes"] == 2


def test_each_process_writes_its_share_and_holds_the_same_policy(together):
    (held, written), (others, more) = (json.loads((together / f"held-{rank}.json").read_text()) for rank in range(2))
    assert held == others                                   # to the last bit
    assert len({*held[:len(JOBS)], held[-1]}) == 1 + len(JOBS)  # a finished run trains nothing: its policy is the base
    assert written[:4] == [3, 4, 4, 4] == more[:4]         # of 6 of the reference's, of 8 of each iteration's responses


@pytest.mark.parametrize("name", ["of one", "of two"])
def test_a_killed_run_goes_on_in_two_processes(together, whole, name):
    """Begun by one process, or by two, of which one was killed."""
    assert_same(together / name, whole)
    assert "resumed" in resume.read_run(together / name)


def test_a_killed_run_of_two_goes_on_in_one(killed, world, whole, tmp_path, monkeypatch):
    out = shutil.copytree(killed, tmp_path / "out")
    assert torch.load(out / "state.pt", weights_only=True)["course"]["iteration"] >= 2
    assert run(monkeypatch, [*command(world, out, *LONG), "--resume"]) == 0
    assert_same(out, whole)


def test_slices_are_refused_by_name(world, tmp_path, monkeypatch):
    monkeypatch.setattr(parallel, "several", lambda: True)
    args = ppo.arguments(command(world, tmp_path / "out"))
    with pytest.raises(UserError, match=r"^ppo\.py: .*give --replicate$"):
        ppo.run(args, read_options(ppo.Options, args), torch.device("cpu"))
