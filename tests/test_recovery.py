# ruff: noqa: F811 (the fixtures of test_train.py, under their own names)
"""Training runs that are killed, resumed, begun again, or asked something else: the same bytes, or a refusal."""
import json
import os
import shlex
import signal
import subprocess
import sys

import pytest

import checkpoint
import formats
import resume
import train
from common import write_jsonl
from conftest import refused, run
from test_train import ROOT, command, finished, metrics, timeless, tiny, weights, world  # noqa: F401 (fixtures)


KILLED = """
import os, signal, sys
import resume
import train
count, where = int(sys.argv.pop(1)), sys.argv.pop(1)
write, save = resume.Run.write, resume.torch.save
rows = 0

def dying_write(run, row):
    global rows
    write(run, row)
    rows += 1
    if rows == count and where == "row":
        os.kill(os.getpid(), signal.SIGKILL)

def dying_save(state, path):
    save(state, path)
    if rows >= count and where == "save":
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

resume.Run.write, resume.torch.save = dying_write, dying_save
train.main()
"""


def killed(words, count, where):
    """Run train.py in a process that is killed, with SIGKILL, at its count-th row of metrics, or while it saves."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, "-c", KILLED, str(count), where, *words], capture_output=True,
                           env=environment, timeout=120)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()


@pytest.mark.slow
@pytest.mark.parametrize("count, where", [(2, "row"), (10, "row"), (10, "save"), (14, "row")])
def test_a_killed_run_goes_on_as_if_it_had_not_been(world, tmp_path, monkeypatch, finished, count, where):
    """At the first step; in the middle of the second stage; there with half a state written; and between stages."""
    words = command(world, out=tmp_path / "out")
    killed(words, count, where)
    assert not (tmp_path / "out" / "config.json").exists() and len(metrics(tmp_path / "out")) == count
    assert (tmp_path / "out" / "state.pt").exists() == (count > 2)
    assert (tmp_path / "out" / "state.pt.tmp").exists() == (where == "save")
    assert run(train, monkeypatch, [*words, "--resume"]) == 0
    assert timeless(metrics(tmp_path / "out")) == timeless(metrics(finished))
    assert weights(tmp_path / "out") == weights(finished)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in finished.iterdir()}


@pytest.mark.slow
def test_a_resumed_run_repeats_no_step(world, tmp_path, monkeypatch, finished):
    words = command(world, out=tmp_path / "out")
    killed(words, 10, "row")
    drawn, examples_of = [], train.examples_of
    monkeypatch.setattr(train, "examples_of", lambda stage, step, options:
                        drawn.append((stage.name, step)) or examples_of(stage, step, options))
    assert run(train, monkeypatch, [*words, "--resume"]) == 0
    assert drawn == [("equal", 1), ("equal", 2), ("equal", 3), *(("better", step) for step in range(4))]


@pytest.mark.slow
def test_other_settings_or_data_are_refused(world, tmp_path, monkeypatch, capsys):
    killed(command(world, out=tmp_path / "out"), 10, "row")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    for changes, name in (({"lr": 1e-3}, "lr"), ({"batch": 8}, "batch"), ({"seed": 1}, "seed"),
                          ({"warmup-data": 0.5}, "data"), ({"precision": "fp32"}, "precision")):
        for flags in (["--resume"], []):
            refused(train, monkeypatch, capsys, [*command(world, out=tmp_path / "out", **changes), *flags],
                    "unfinished run with other", name)
    words = command(world, out=tmp_path / "out")
    refused(train, monkeypatch, capsys, words, "unfinished run with these settings; --resume")
    refused(train, monkeypatch, capsys, [*words, "--resume", "--steps", "identity", "better"], "other data")
    tokenizer, wider = checkpoint.load_tokenizer(world / "base"), tmp_path / "wider"
    checkpoint.save(tiny(tokenizer.get_vocab_size(), tie_word_embeddings=True, intermediate_size=96), wider)
    tokenizer.save(str(wider / "tokenizer.json"))
    refused(train, monkeypatch, capsys, [*command(world, out=tmp_path / "out", model_folder=wider), "--resume"],
            "model")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    (tmp_path / "out" / "state.pt").write_bytes(before["state.pt"][:5000])
    refused(train, monkeypatch, capsys, [*words, "--resume"], "state.pt", "cannot be read", "delete it")


@pytest.mark.slow
def test_a_finished_run_says_so_to_the_same_question_and_to_no_other(world, finished, tmp_path, monkeypatch, capsys):
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in finished.iterdir()}
    for flags in ([], ["--resume"]):
        assert run(train, monkeypatch, [*command(world, out=finished), *flags]) == 0
        assert "finished already" in capsys.readouterr().out
    rows = formats.read_pairs(world / "pairs.jsonl")
    write_jsonl(tmp_path / "pairs.jsonl", ({**row, "completion": row["completion"] + "!"} for row in rows))
    other_base = tmp_path / "base"
    checkpoint.save(tiny(checkpoint.load(world / "base").config.vocab_size, seed=9), other_base)
    (other_base / "tokenizer.json").write_bytes((world / "base" / "tokenizer.json").read_bytes())
    for more, name in ((["--lr", 2e-3], "lr (0.003, now 0.002)"), (["--seed", 3], "seed"),
                       (["--max-steps", 1], "max_steps"),
                       (["--data", tmp_path / "pairs.jsonl"], "data"), (["--model", other_base], "model"),
                       (["--steps", "identity", "better"], "data"), (["--lora-rank", 2], "lora_rank")):
        for flags in ([], ["--resume"]):
            refused(train, monkeypatch, capsys, [*command(world, out=finished), *more, *flags],
                    "holds a finished run with other", name, "--overwrite")
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in finished.iterdir()} == before


@pytest.mark.slow
def test_a_sweep_into_one_folder_is_refused_at_the_second_and_run_json_reproduces_each(world, tmp_path, monkeypatch,
                                                                                       capsys):
    def words(rate, *flags, out="out"):
        return [*map(str, command(world, "pretrain", tmp_path / out, **{"max-steps": 3, "lr": rate})), *flags]
    assert run(train, monkeypatch, words(1e-3)) == 0
    refused(train, monkeypatch, capsys, words(2e-3), "holds a finished run with other lr (0.001, now 0.002)")
    found = []
    for rate in (1e-3, 2e-3, 4e-3):
        assert run(train, monkeypatch, words(rate, "--overwrite")) == 0
        found.append((resume.read_run(tmp_path / "out"), timeless(metrics(tmp_path / "out"))))
    assert len({json.dumps(rows) for _, rows in found}) == 3
    for told, rows in found:
        argv = [word if word != str(tmp_path / "out") else str(tmp_path / "again")
                for word in shlex.split(told["command"])]
        assert run(train, monkeypatch, argv[1:]) == 0
        assert timeless(metrics(tmp_path / "again")) == rows
        assert told["last"]["loss"] == [row["loss"] for row in rows if "loss" in row][-1]


@pytest.mark.slow
def test_a_run_begun_anew_is_not_taken_for_the_finished_one_before(world, tmp_path, monkeypatch):
    words = command(world, "pretrain", tmp_path / "out", **{"max-steps": 2})
    assert run(train, monkeypatch, words) == 0
    first = weights(tmp_path / "out")
    changed = command(world, "pretrain", tmp_path / "out", **{"max-steps": 2, "seed": 5})
    killed([*changed, "--overwrite"], 2, "row")
    assert run(train, monkeypatch, [*changed, "--resume"]) == 0
    assert weights(tmp_path / "out") != first and len(metrics(tmp_path / "out")) == 4
