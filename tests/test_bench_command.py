# ruff: noqa: F811 (the fixture of test_bench.py, under its own name)
"""bench.py as a command: which parts it runs, on what machine, what it keeps, and what it says where one fails."""
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import bench
import checkpoint
import peers
from conftest import ROOT, refused, run
from model import Config, Llama
from test_bench import RATES, SIZE, aligner, words_of  # noqa: F401 (a fixture)


@pytest.mark.slow
def test_a_machine_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "TABLE", {"lines": []})
    words = ["machine", "--device", "cpu", "--out", tmp_path / "new" / "table.json"]
    assert run(bench, monkeypatch, words) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [row[0] for row in rows] == ["machine:", "machine:"] and "failed:" not in sum(rows, [])
    kept = json.loads((tmp_path / "new/table.json").read_text())
    assert [line["what"].split()[0] for line in kept["lines"]] == [row[0] for row in rows]
    assert kept["device"] == "cpu" and "torch" in kept["versions"] and all(line["ours"] > 0 for line in kept["lines"])


def test_all_that_is_asked_of_a_gpu(tmp_path, monkeypatch, capsys):
    """In its order. One part finds no memory: it is told, kept, and the others go on; the end is no success."""
    done, out = [], tmp_path / "table.json"

    def measured(kind, folder, device, peer=None, **job):
        done.append(kind)
        if kind == "ppo_ours":
            raise bench.UserError("out of memory")
        return dict(RATES, tokens=9, seconds=1, peak=1.0, bytes=1)
    monkeypatch.setattr(bench, "TABLE", {"lines": []})
    monkeypatch.setattr(bench, "measure", measured)
    for name in ("story", "copy", "tests"):
        monkeypatch.setitem(bench.PARTS, name, lambda folder, device, name=name, **given: done.append((name, *given)))
    assert run(bench, monkeypatch, ["gpu", "--device", "cpu", "--out", out, "--aligner", tmp_path / "none"]) == 2
    assert done == ["machine", ("tests",), *["train_large"] * 5, "decode", "decode", "ppo_ours", ("story", "aligner"),
                    ("copy", "peer", "aligner")]
    said = capsys.readouterr()
    assert "ppo failed: out of memory" in " ".join(said.out.split()) and "error: 1 of 10 lines failed: ppo" in said.err
    lines = json.loads(out.read_text())["lines"]
    assert [line["what"] for line in lines if line["failed"]] == ["ppo"] and len(lines) == 10


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_where_no_gpu_is_one_line_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    refused(bench, monkeypatch, capsys, ["gpu"], "no GPU here")
    assert not list(tmp_path.iterdir())


def test_the_storys_aligner_stays_where_none_was(tmp_path, monkeypatch, capsys, aligner):
    commands, there = [], tmp_path / "there"

    def run_here(command, **_):
        commands.append(command[2:])
        if len(commands) < 3:
            checkpoint.save(Llama(Config(**SIZE), len(commands)), Path(command[3]) / "aligner")
        return SimpleNamespace(returncode=int(len(commands) == 3), stderr="words\nerror: no room\n", stdout="")
    monkeypatch.setattr(bench.subprocess, "run", run_here)
    for _ in range(2):
        bench.bench_story(tmp_path, "cpu", there)
    assert commands == [["--out", tmp_path / "story", "--device", "cpu"]] * 2
    assert all(map(torch.equal, checkpoint.load(there).parameters(), Llama(Config(**SIZE), 1).parameters()))
    assert all(line.startswith("story: seconds of make train ") for line in words_of(capsys))
    with pytest.raises(bench.UserError, match="story.py: no room"):
        bench.bench_story(tmp_path, "cpu", there)


def test_tests_that_fail_are_a_part_that_fails(tmp_path, monkeypatch, capsys):
    (tmp_path / "tests").mkdir()
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    file = tmp_path / "tests/test_it.py"
    file.write_text("import pytest\n@pytest.mark.cuda\ndef test_it(): pass\ndef test_more(): assert False\n")
    bench.bench_tests(tmp_path, "cuda")
    assert words_of(capsys)[0].startswith("tests: passed 1 1 passed, 1 deselected")
    file.write_text("import pytest\n@pytest.mark.cuda\ndef test_it(): assert False\n")
    with pytest.raises(bench.UserError, match="1 failed"):
        bench.bench_tests(tmp_path, "cuda")


def test_bad_input_gets_one_line(tmp_path, monkeypatch, capsys):
    for words, *said in (["flying"], "no such part"), (["copy", "--aligner", tmp_path], "make train"), \
            (["train", "--pairs", "x.jsonl"], "--tokenizer"), \
            (["dpo", "--tokenizer", "words.json"], "tokenizer.json"), (["machine", "--device", "abacus"], "abacus"), \
            (["train", "--steps", "0"], "at least 1"):
        refused(bench, monkeypatch, capsys, words, *said)


def test_without_an_aligner_all_is_the_rest(tmp_path, aligner, capsys):
    assert bench.parts_wanted([], tmp_path) == ["train", "dpo", "large", "decode"]
    assert "make train" in capsys.readouterr().err
    assert bench.parts_wanted(["machine", "decode", "train"], tmp_path) == ["train", "decode"]
    assert bench.parts_wanted([], aligner) == ["train", "dpo", "large", "align", "copy", "decode"]
    assert bench.parts_wanted(["copy", "gpu"], tmp_path) == ["tests", "large", "decode", "ppo", "story", "copy"]


def test_a_peer_that_fails_is_told_and_passed_over(tmp_path, capsys):
    assert bench.measure("train_trl", tmp_path, "cpu", "/bin/false", batches=[], eos="x") is None
    assert "train_trl: failed" in capsys.readouterr().err
    assert json.loads((tmp_path / "job.json").read_text())["device"] == "cpu"


@pytest.mark.parametrize("kind", sorted(peers.JOBS))
def test_a_peer_needs_nothing_of_ours(tmp_path, kind):
    """Its Python runs peers.py with torch and the peer alone."""
    (tmp_path / "job.json").write_text("{}")
    watch = (f"import json, runpy, sys; sys.argv = ['peers.py', {kind!r}, {str(tmp_path)!r}]\n"
             f"sys.path.insert(0, {str(ROOT)!r})\n"
             "try: runpy.run_path('peers.py', run_name='__main__')\n"
             "except TypeError as error: print(error)\n"
             "print(json.dumps(sorted(sys.modules)))")
    said = subprocess.run([sys.executable, "-c", watch], cwd=ROOT, capture_output=True, text=True, timeout=120)
    error, modules = said.stdout.splitlines()
    assert f"{kind}() missing" in error and "'batch" in error, said
    assert not ({path.stem for path in ROOT.glob("*.py")} | {"tokenizers", "safetensors"}) & set(json.loads(modules))


def test_a_measurement_is_a_process_under_its_own_python(tmp_path, monkeypatch):
    """A peer's runs peers.py under the peer's Python, ours timed.py under ours; each prints figures, last of all."""
    commands = []

    def run_here(command, **_):
        commands.append(command)
        return SimpleNamespace(returncode=0, stdout='some words\n{"seconds": 3}\n', stderr="")
    monkeypatch.setattr(bench.subprocess, "run", run_here)
    assert bench.measure("dpo_trl", tmp_path, "cpu", "python", beta=1) == {"seconds": 3}
    assert bench.measure("decode", tmp_path, "cpu", dtype="float32") == {"seconds": 3}
    assert commands == [["python", str(ROOT / "peers.py"), "dpo_trl", str(tmp_path)],
                        [sys.executable, str(ROOT / "timed.py"), "decode", str(tmp_path)]]
    assert json.loads((tmp_path / "job.json").read_text()) == {"device": "cpu", "dtype": "float32"}
