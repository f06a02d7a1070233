"""Using an aligner: policies that answer first, and runs that go on after a kill, in the world of test_align.py."""
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

import align
import blackbox
import checkpoint
import test_align
import test_endpoint
import toy
import writers
from common import UserError, write_jsonl
from conftest import refused, run, write
from model import Llama
from test_align import ROOT, TOLD, command, continuation, edit, read

world, in_fp32, aligned = test_align.world, test_align.in_fp32, test_align.aligned  # fixtures
serve = test_endpoint.serve


def stopped(words, monkeypatch):
    """Run align.py up to the moment before it writes its output."""
    def stop(*_):
        raise UserError("stopped")
    with monkeypatch.context() as patch:
        patch.setattr(align, "write_rows", stop)
        assert run(align, patch, words) == 2


def read_whole(path):
    """The rows of a journal but for a torn last one."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


# ----------------------------------------------------------------------------------------------------------------
# Prompts without answers


def test_a_llama_policy_answers_first(world, tmp_path, monkeypatch):
    words = command(world, tmp_path / "out.jsonl", "--policy", world / "policy", "--limit", 5, source="prompts.jsonl")
    assert run(align, monkeypatch, words) == 0
    tokenizer, rows = checkpoint.load_tokenizer(world / "policy"), read(tmp_path / "out.jsonl")
    assert len(rows) == 5
    for row, source in zip(rows, read(world / "prompts.jsonl")):
        answer = continuation(world / "policy", [0] + tokenizer.encode(source["prompt"]).ids)
        assert row["original"] == answer.split("\n\nHuman:")[0].strip()
        assert row["aligned"] == edit(world, source["prompt"], row["original"], TOLD) and "golden" not in row


@pytest.mark.slow
def test_a_prompt_too_long_for_the_policy_is_left_out(world, tmp_path, monkeypatch, capsys):
    """Its last turn ends in more spaces than the context holds. Also after a kill, right after that is known and among
    the edits."""
    prompts = [row["prompt"] for row in read(world / "prompts.jsonl")[:4]]
    long = [*prompts[:2], prompts[2] + " " * 5000, prompts[3]]
    for name, chosen in (("with", long), ("without", prompts[:2] + prompts[3:]), ("nothing", [" " * 5000])):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"prompt": prompt} for prompt in chosen])

    def said(name, out, dies_after=None):
        words = command(world, tmp_path / out, "--policy", world / "policy")
        words[words.index("--data") + 1] = str(tmp_path / f"{name}.jsonl")
        if dies_after:
            killed(words, dies_after)
            assert (tmp_path / f"{out}.part").exists()
        assert run(align, monkeypatch, words) == 0
        assert not (tmp_path / f"{out}.part").exists()
        return capsys.readouterr().out

    assert "left out" not in said("without", "expected")
    assert len(read(tmp_path / "expected")) == 3
    for count in (None, 1, 5):
        printed = said("with", f"out-{count}", dies_after=count)
        assert "left out: 1 prompts that do not fit the policy's context" in printed and ": 3 answers" in printed
        assert (tmp_path / f"out-{count}").read_bytes() == (tmp_path / "expected").read_bytes()
    printed = said("nothing", "empty")
    assert "left out: 1 prompts" in printed and ": 0 answers" in printed and read(tmp_path / "empty") == []


def test_a_server_answers_first(world, tmp_path, monkeypatch):
    server = blackbox.serve()
    write_jsonl(tmp_path / "in.jsonl", [{"prompt": f"\n\nHuman: How do I {task}?\n\nAssistant:"}
                                         for task in toy.TASKS[:4]])
    words = command(world, tmp_path / "out.jsonl", "--policy", server.url)
    words[words.index("--data") + 1] = str(tmp_path / "in.jsonl")
    try:
        assert run(align, monkeypatch, words) == 0
    finally:
        server.shutdown()
    rows = read(tmp_path / "out.jsonl")
    assert len(rows) == 4 and all(row["original"] for row in rows)
    helpful = [toy.score("helpful", row["prompt"], row["original"]) for row in rows]
    assert sum(value > 0 for value in helpful) > 1  # the answers are to their own questions
    for row in rows:
        assert toy.score("intact", row["prompt"], row["original"]) == 0
        assert row["aligned"] == edit(world, row["prompt"], row["original"], TOLD)


def test_what_a_server_does_not_answer_is_left_out_and_asked_again(world, serve, tmp_path, monkeypatch, capsys):
    """An empty answer of a file is edited as ever."""
    silent, seen = {"one": "", "two": ("status", 400, '{"error": "maximum context length"}', {})}, []

    def script(_, payload):
        seen.append(payload["messages"][0]["content"])
        return silent.get(seen[-1], f"An answer to {seen[-1]}")
    server = serve(script)
    source = write(tmp_path / "in.jsonl", *({"prompt": text} for text in ("one", "two", "three")))
    empty = write(tmp_path / "empty.jsonl", {"prompt": "four", "responses": [{"text": ""}]})
    words = command(world, tmp_path / "out.jsonl", "--policy", server.url, source=source)
    words.insert(words.index("--out"), str(empty))
    stopped(words, monkeypatch)
    assert set(seen) == {"one", "two", "three"}
    seen.clear()
    assert run(align, monkeypatch, words) == 0 and set(seen) == {"one", "two"}
    printed = capsys.readouterr().out
    assert "left out: 1 prompts to which the policy gave an empty answer\n" in printed
    assert "left out: 1 prompts that do not fit the policy's context\n" in printed
    assert [row["original"] for row in read(tmp_path / "out.jsonl")] == ["An answer to three", ""]
    assert read(tmp_path / "out.jsonl")[1]["aligned"] == edit(world, "four", "", TOLD)
    silent.clear()
    assert run(align, monkeypatch, words) == 0 and "left out" not in capsys.readouterr().out
    assert [row["prompt"] for row in read(tmp_path / "out.jsonl")] == ["one", "two", "three", "four"]


def test_an_empty_answer_of_a_llama_is_left_out_too(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(align, "answers_of", lambda *_: [(0, "Yes."), (1, ""), (2, None)])
    words = command(world, tmp_path / "out", "--policy", world / "policy", "--limit", 3, source="prompts.jsonl")
    stopped(words, monkeypatch)
    capsys.readouterr()
    monkeypatch.delattr(align, "answers_of")  # nobody is asked again
    assert run(align, monkeypatch, words) == 0
    printed = capsys.readouterr().out
    assert "left out: 1 prompts to which the" in printed and "left out: 1 prompts that do" in printed
    assert [row["original"] for row in read(tmp_path / "out")] == ["Yes."]


def test_prompts_without_a_policy_are_refused(world, tmp_path, monkeypatch, capsys):
    refused(align, monkeypatch, capsys, command(world, tmp_path / "out.jsonl", source="prompts.jsonl"),
            "9 prompts have no answer", "--policy")
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------------------------
# Killed, and run again

KILLED = """
import os, signal, sys
import align, writers
writers.computes_bf16 = lambda device: False  # as in this process
count = int(sys.argv.pop(1))
add, done = align.Journal.add, 0

def dying(journal, row):
    global done
    add(journal, row)
    done += 1
    if done == count:
        os.write(journal.file.fileno(), b'{"index": 8, "prompt": "a torn li')
        os.kill(os.getpid(), signal.SIGKILL)

align.Journal.add = dying
align.main()
"""


def killed(words, count):
    """Run align.py in a process that is killed, with SIGKILL, in the middle of writing row count + 1."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, "-c", KILLED, str(count), *words], capture_output=True, env=environment,
                           timeout=120)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()


@pytest.mark.parametrize("changed", ["aligner", "policy", "name", "objectives", "nothing"])
def test_a_run_goes_on_only_with_the_same_models_and_rows(world, serve, tmp_path, monkeypatch, capsys, changed):
    """However they are called: a model that was trained again stands in the same folder."""
    for name in ("aligner", "policy"):
        (tmp_path / name).mkdir()
        for file in (world / name).iterdir():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
    policy = serve("An answer.").url if changed == "name" else tmp_path / "policy"
    row, out = {"prompt": "a", "objectives": ["a: b"]}, tmp_path / "out.jsonl"
    words = command(world, out, "--model", tmp_path / "aligner", "--policy", policy, objectives=(),
                    source=write(tmp_path / "in.jsonl", row))
    stopped(words, monkeypatch)
    if changed in ("aligner", "policy"):
        checkpoint.save(Llama(checkpoint.load(world / changed).config, 5), tmp_path / changed)
    elif changed == "name":
        words += ["--policy-model", "another"]
    elif changed == "objectives":
        write(tmp_path / "in.jsonl", {**row, "objectives": ["a: c"]})
    if changed == "nothing":
        assert run(align, monkeypatch, words) == 0
    else:
        refused(align, monkeypatch, capsys, words, "out.jsonl.part", "other settings")


@pytest.mark.slow
def test_a_second_run_finishes_what_a_killed_one_began(world, aligned, tmp_path, monkeypatch, capsys):
    out = tmp_path / "aligned.jsonl"
    killed(command(world, out), 5)
    assert not out.exists() and (tmp_path / "aligned.jsonl.part").exists()
    edited, write = [], align.Writer.write
    monkeypatch.setattr(align.Writer, "write", lambda self, prompts, *rest, **more:
                        edited.extend(prompts) or write(self, prompts, *rest, **more))
    for words, setting in ((command(world, out, objectives=["helpful"]), "objectives"),
                           (command(world, out, "--seed", 1), "seed"), (command(world, out, "--rounds", 2), "rounds"),
                           (command(world, out, "--limit", 8), "data")):
        before = (tmp_path / "aligned.jsonl.part").read_bytes()
        refused(align, monkeypatch, capsys, words, "aligned.jsonl.part", "other settings", "delete it")
        assert (tmp_path / "aligned.jsonl.part").read_bytes() == before, setting
    assert run(align, monkeypatch, command(world, out)) == 0
    assert out.read_bytes() == aligned.read_bytes() and len(edited) == 4  # of nine
    assert [path.name for path in tmp_path.iterdir()] == ["aligned.jsonl"]


@pytest.mark.slow
def test_a_run_that_was_killed_after_its_last_row_has_only_to_write_them(world, aligned, tmp_path, monkeypatch, capsys):
    out = tmp_path / "aligned.jsonl"
    killed(command(world, out), 9)
    assert not out.exists() and len(read_whole(tmp_path / "aligned.jsonl.part")) == 1 + 9
    edited, write = [], align.Writer.write
    monkeypatch.setattr(align.Writer, "write", lambda self, prompts, *rest, **more:
                        edited.extend(prompts) or write(self, prompts, *rest, **more))
    assert run(align, monkeypatch, command(world, out)) == 0
    assert out.read_bytes() == aligned.read_bytes() and edited == [] and "9 answers" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["aligned.jsonl"]


@pytest.mark.slow
@pytest.mark.parametrize("count", [3, 9, 12])
def test_a_policys_answers_are_not_asked_for_twice(world, tmp_path, monkeypatch, count):
    """Killed among the policy's answers, right after them, and among the edits."""
    words = ["--policy", world / "policy", "--temperature", 1]
    assert run(align, monkeypatch, command(world, tmp_path / "whole", *words, source="prompts.jsonl")) == 0
    words = command(world, tmp_path / "out", *words, source="prompts.jsonl")
    killed(words, count)
    sizes, write = [], align.Writer.write
    monkeypatch.setattr(align.Writer, "write", lambda self, prompts, *rest, **more:
                        sizes.append(len(prompts)) or write(self, prompts, *rest, **more))
    assert run(align, monkeypatch, words) == 0
    assert (tmp_path / "out").read_bytes() == (tmp_path / "whole").read_bytes()
    assert sizes == {3: [6, 9], 9: [9], 12: [6]}[count]


@pytest.mark.parametrize("batch, most", [(1, 1), (3, 3), (100, 8)])
def test_a_served_policy_is_asked_no_more_at_a_time_than_a_batch(batch, most):
    class Policy:
        asked, peak, guard = 0, 0, threading.Lock()

        def complete(self, prompt, *_, **__):
            with self.guard:
                self.asked += 1
                self.peak = max(self.peak, self.asked)
            time.sleep(0.02)
            with self.guard:
                self.asked -= 1
            return prompt.upper()
    policy, items = Policy(), [{"index": place, "prompt": f"p{place}"} for place in range(24)]
    found = dict(writers.answers_of(policy, items, batch=batch))
    assert found == {place: f"P{place}" for place in range(24)} and policy.peak <= most
    assert most == 8 or policy.peak == most
