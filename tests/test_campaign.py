"""The campaign itself: its trials pass on the code as it is, and each promise that is broken on purpose is missed by
none of them."""
import functools
import itertools
import json
import os
import random
import signal
import time

import pytest
import torch
from conftest import run

import campaign
import common
import endpoint
import formats
import resume
import trials

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a process that uses CUDA cannot be forked")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world, server = campaign.begin(tmp_path_factory.mktemp("campaign") / "scratch", 0)
    yield world
    campaign.end(world, server)
    assert not world.folder.exists()


def of(part, world, subject, count, begins=""):
    """What goes wrong in the first trials of a subject, of those whose names begin so: "" where nothing does."""
    mine = (trial for name, what, trial in part(world) if name == subject and str(what).startswith(begins))
    return map(campaign.attempt, itertools.islice(mine, count))


# ----------------------------------------------------------------------------------------------------------------
# A command in a fork


def test_a_fork_gives_its_status_and_what_it_printed(capfd):
    def refuse():
        print("on the way")
        raise common.UserError("x: no such file")
    assert campaign.forked(refuse) == (2, "on the way\nerror: x: no such file\n")
    assert campaign.forked(lambda: print("é")) == (0, "é\n")
    assert campaign.forked(lambda: os.write(2, b"to stderr")) == (0, "to stderr")
    status, output = campaign.forked(lambda: 1 / 0)
    assert status == 1 and output.startswith("Traceback") and "ZeroDivisionError" in output
    assert campaign.forked(lambda: os.kill(os.getpid(), signal.SIGKILL)) == (-signal.SIGKILL, "")
    assert capfd.readouterr() == ("", "")


def test_a_fork_is_killed_when_its_time_is_over():
    began = time.perf_counter()
    assert campaign.forked(lambda: print("begun") or time.sleep(60), 0.2) == (None, "begun\n")
    assert time.perf_counter() - began < 5


def test_a_fork_that_takes_all_memory_does_not_get_it():
    def greedy():
        campaign.limit_memory(1)
        bytearray(2**31)
    status, output = campaign.forked(greedy)
    assert status == 2 and "out of memory" in output


@pytest.mark.parametrize("status, output, said", [
    (0, "done", ""), (2, "a\rb\nerror: x: no\n", ""), (2, "usage\ndata.py show: error: x\n", ""), (None, "", "in time"),
    (1, "Traceback\n", "status 1"), (0, "Traceback\n1", "status 0"), (-9, "", "status -9: nothing was printed"),
    (2, "error: " + "x" * 601, "not one line"), (2, "no\n", "not one line"), (2, "error: y\n", ""),
    (2, "thread panicked\nerror: x", "status 2")])
def test_what_is_wrong_with_a_result(status, output, said):
    found = campaign.complaint((status, output))
    assert said in found and bool(said) == bool(found)


def test_an_error_must_name_what_is_wrong():
    assert campaign.complaint((2, "error: other --max-tokens"), "max_tokens") == ""
    assert "does not name lr" in campaign.complaint((2, "error: other data"), "data", "lr")


@pytest.mark.parametrize("kind, number, when, status, left", [
    ("call", 0, "", 0, b"new new"), ("call", 1, "before", -9, b"old"), ("call", 1, "after", -9, b"new new"),
    ("call", 1, "half", -9, b"old"), ("byte", 3, "", -signal.SIGXFSZ, b"old"), ("full", 3, "", 2, b"old"),
    ("byte", 7, "", 0, b"new new")])
def test_a_run_is_ended_where_it_is_to_be(tmp_path, kind, number, when, status, left):
    path, aside = tmp_path / "file", tmp_path / "aside"
    path.write_bytes(b"old")

    def work():
        aside.write_text("new new")
        os.replace(aside, path)
    found, output = campaign.forked(campaign.ended_at(work, kind, number, when))
    assert found == status and path.read_bytes() == left
    size = {"before": 7, "half": 3}.get(when, 3 if status and not when else None)
    assert [file.stat().st_size for file in tmp_path.glob("aside")] == ([] if size is None else [size])
    assert output == {0: f"calls: {int(kind == 'call')}\n"}.get(status, output) and "Traceback" not in output


# ----------------------------------------------------------------------------------------------------------------
# What is drawn


def test_damage_changes_something_and_depends_on_the_seed_alone():
    value = {"a": [1, {"b": "c"}], "d": None}
    for number in range(300):
        changed, old, new = campaign.mutated(random.Random(number), value)
        assert (changed, old, new) == campaign.mutated(random.Random(number), value)
        assert changed != json.dumps(value) or new == json.dumps(old)
        assert campaign.damaged(random.Random(number), b"ab") == campaign.damaged(random.Random(number), b"ab")
    assert value == {"a": [1, {"b": "c"}], "d": None}
    made = {campaign.damaged(random.Random(number), b"ab") for number in range(300)}
    assert {b"a", b"", b"ab\0", b"\xffab"} <= made and any(len(content) == 2 and content != b"ab" for content in made)


@pytest.mark.parametrize("name", campaign.FORMATS)
def test_every_format_is_read_as_long_as_nothing_is_changed(name, tmp_path):
    """And a row that is missing is missed."""
    chunks, _, _, form, columns, _ = campaign.draw_file(random.Random(name), name)
    whole = campaign.laid_out(chunks, form, columns)
    path = tmp_path / "file.json"
    for reader in campaign.FORMATS[name][0].split():
        drawn = chunks, None, whole, form, columns, (None, None)
        assert campaign.forked(functools.partial(campaign.read_mutant, path, reader, drawn)) == (0, "")
        if len(chunks) > 1:
            drawn = chunks, 0, campaign.laid_out(chunks[:-1], form, columns), form, columns, (None, None)
            result = campaign.forked(functools.partial(campaign.read_mutant, path, reader, drawn))
            assert result[0] == 0 and result[1].startswith("other rows come out changed")


@pytest.mark.parametrize("row, keys", [
    ({"text": 1}, "text"), ({}, "text"), ({"scores": {"a": float("nan")}}, "scores"), ({"p_a": 1.5}, "p_a"),
    ({"scores": {"a": True}}, "scores"), ({"objectives": [1]}, "objectives"), ({"golden": 1}, ""),
    ({"responses": [{"text": "a", "scores": {"a": "1"}}]}, "responses"), ({"prompt": "a", "context": [0, 4]}, "")])
def test_rows_that_are_not_valid(row, keys):
    assert not campaign.is_valid(row, keys)
    assert campaign.is_valid({"prompt": "abc", "context": [0, 3], "golden": None, "p_a": 0.5, "objectives": ["a"],
                              "responses": [{"text": "a", "scores": {"a": 1}}]}, "prompt responses")


# ----------------------------------------------------------------------------------------------------------------
# The promises hold, and where one is broken on purpose a trial finds it


@pytest.mark.slow
@pytest.mark.parametrize("part, count", [(campaign.rows, 46), (campaign.checkpoints, 6), (campaign.endpoints, 6),
                                         (trials.disks, 6), (trials.stale, 2)])
def test_the_promises_hold(world, part, count):
    for subject, what, trial in itertools.islice(part(world), count):
        assert campaign.attempt(trial) == "", (subject, what)


@pytest.mark.slow
@pytest.mark.parametrize("subject", ["train sft", "align, policy", "feedback label", "label, server"])
def test_killed_runs_go_on(world, subject):
    assert list(of(trials.kills, world, subject, 1)) == [""]


def kill(monkeypatch, kind, low, high, when=""):
    """Have all runs end in one kind of way, drawn between two shares of what there is of it."""
    def draw_end(rng, known):
        share, most = rng.uniform(low, high), {"time": known.seconds, "call": known.calls, "byte": known.largest}[kind]
        return kind, share * most if kind == "time" else round(share * most), when
    monkeypatch.setattr(trials, "draw_end", draw_end)


@pytest.mark.slow
def test_a_journal_that_is_begun_again_is_found(world, monkeypatch):
    monkeypatch.setattr(resume.Journal, "recover", lambda journal, run: False)
    kill(monkeypatch, "byte", 0.01, 0.06)
    assert any("out.jsonl.part has lost what was reported done" in wrong
               for wrong in of(trials.kills, world, "feedback label", 6))


@pytest.mark.slow
def test_a_file_that_is_not_put_in_place_whole_is_found(world, monkeypatch):
    monkeypatch.setattr(resume, "write_whole", lambda path, write: write(path))
    kill(monkeypatch, "byte", 0.2, 1.5)
    assert any("state.pt: " in wrong for wrong in of(trials.kills, world, "train sft", 4))


def test_metrics_that_are_cut_back_too_far_are_found(world, monkeypatch):
    read = resume.Run.read
    monkeypatch.setattr(resume.Run, "read", lambda run: {**read(run), "metrics_bytes": 0})
    kill(monkeypatch, "call", 0.3, 0.8, "before")
    assert any("metrics.jsonl has lost" in wrong for wrong in of(trials.kills, world, "train sft", 3))


def test_another_result_is_found(world, monkeypatch):
    """One that is drawn anew by every process."""
    monkeypatch.setattr("feedback.sigmoid", lambda log_odds: os.getpid() % 9973 / 9973)
    assert all("other bytes: out.jsonl" in wrong for wrong in of(trials.kills, world, "feedback label", 1))


def test_a_cache_that_is_not_read_is_found(world, monkeypatch):
    monkeypatch.setattr(endpoint.Endpoint, "_load", lambda self: {})
    kill(monkeypatch, "call", 0.3, 0.8, "before")
    assert any("were paid for twice" in wrong for wrong in of(trials.kills, world, "label, server", 3))


@pytest.mark.slow
def test_scores_that_are_no_numbers_are_found(world, monkeypatch):
    monkeypatch.setattr(formats, "present", lambda scores, where: scores)
    assert any("not valid" in wrong for wrong in of(campaign.rows, world, "rated", 60))


def test_rows_that_are_left_out_are_found(world, monkeypatch):
    records = formats.records
    monkeypatch.setattr(formats, "records", lambda path: itertools.islice(records(path), 3))
    assert any("come out changed" in wrong for wrong in of(campaign.rows, world, "labels", 20))


@pytest.mark.slow
def test_a_text_that_is_not_the_files_is_found(world, monkeypatch):
    field = formats.field

    def known(*args):
        return value if "says so" in (value := field(*args)) else "A says so 0."
    monkeypatch.setattr(formats, "field", known)
    assert any("and that is not in" in wrong for wrong in of(campaign.rows, world, "labels", 40))


@pytest.mark.slow
def test_code_that_runs_is_found(world, monkeypatch):
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **words: load(*args, **{**words, "weights_only": False}))
    assert any("to load it ran code" in wrong for wrong in of(campaign.checkpoints, world, "bin", 60))


def test_a_key_that_is_told_is_found(world, monkeypatch):
    monkeypatch.setattr(endpoint.Endpoint, "_masked", lambda self, text: text)
    assert "the key is told" in of(campaign.endpoints, world, "label, server", 1, "500, key")


def test_a_verdict_that_is_invented_is_found(world, monkeypatch):
    monkeypatch.setattr("eval.read_verdict", lambda text: "A")
    assert any("verdicts are invented" in wrong for wrong in of(campaign.endpoints, world, "eval, server", 2, "chatty"))


def test_an_input_that_is_overwritten_is_found(world, monkeypatch):
    for module in ("align", "data", "common", "feedback"):
        monkeypatch.setattr(f"{module}.check_out", lambda out, inputs: None)
    assert "other bytes: w/rated.jsonl" in of(trials.disks, world, "data reformulate", 1, "is an input")


def test_an_old_result_that_is_given_is_found(world, monkeypatch):
    monkeypatch.setattr(resume, "changed", lambda there, asked: [])
    assert "the old result is given" in next(of(trials.stale, world, "train sft", 1, "finished, lr"))


# ----------------------------------------------------------------------------------------------------------------
# The runner


def test_counts_failures_and_shares_of_the_time(world, monkeypatch, capsys):
    made = []

    def first(world):
        """One.
        More."""
        for number in itertools.count():
            yield "a", number, functools.partial(made.append, number)

    def second(world):
        """Two."""
        yield "b", "x y", lambda: "went\nwrong"
        yield "b", "z", lambda: 1 / 0

    monkeypatch.setattr(campaign, "PARTS", {first: 1, second: 1})
    counts, spent, failures = campaign.run(world, [], 0.2 / 60)
    assert counts == {"first": {"a": [len(made), len(made)]}, "second": {"b": [2, 0]}}
    assert failures == [("second/b/x y", "went wrong"), ("second/b/z", "ZeroDivisionError: division by zero")]
    campaign.tell(counts, spent, failures, 7)
    out = capsys.readouterr().out
    assert f"first: One. (0 s)\n    a{' ' * 23}{len(made):8} tried{len(made):8} survived\n" in out
    assert "failed: second/b/x y: went wrong\n    python campaign.py --seed 7 --only 'second/b/x y'\n" in out
    assert out.endswith(f"{len(made) + 2} tried, {len(made)} survived, 2 failed\n")


def test_only_names_parts_subjects_and_trials(world, monkeypatch):
    def part(world):
        for number, subject in itertools.product(range(5), ("a", "ab")):
            yield subject, number, lambda: ""
    monkeypatch.setattr(campaign, "PARTS", {part: 1})
    assert campaign.run(world, ["part/a"], 1)[0] == {"part": {"a": [5, 5]}}
    assert campaign.run(world, ["part/ab/3"], 1)[0] == {"part": {"ab": [1, 1]}}
    assert campaign.run(world, ["part"], 1)[0] == {"part": {"a": [5, 5], "ab": [5, 5]}}


@pytest.mark.slow
def test_the_command_from_end_to_end(tmp_path, monkeypatch):
    words = ["--out", str(tmp_path / "out"), "--only", "rows/texts/3", "disks/data reformulate/2", "--seed", "1"]
    status, printed = trials.whole_process(["campaign", *words])
    assert status == 0 and "\n2 tried, 2 survived, 0 failed\n" in printed
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["campaign.json"]
    told = json.loads((tmp_path / "out" / "campaign.json").read_text())
    assert told["tried and survived"] == {"rows": {"texts": [1, 1]}, "disks": {"data reformulate": [1, 1]}}
    assert told["failures"] == {} and told["seed"] == 1
    assert run(campaign, monkeypatch, ["--only", "row"]) == 2
