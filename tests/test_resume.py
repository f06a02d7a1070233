"""resume.py: what a killed run leaves behind, and that it goes on from there and from nowhere else."""
import importlib.metadata
import json
import pickle
import re
import subprocess
import sys
import types
import zipfile

import pytest
import torch

import common
import resume
from common import UserError
from resume import Journal, Run


# ----------------------------------------------------------------------------------------------------------------
# Training runs

SETTINGS = {"lr": 0.5, "steps": ["a", "b"], "data": "abc"}
OTHER = {**SETTINGS, "lr": 0.25}


def steps(run, first, last):
    for number in range(first, last):
        run.write({"step": number})


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def finish(run):
    """As train.train does: the model, then the rest."""
    (run.out / "config.json").write_text("{}")
    return run.finish()


@pytest.fixture
def stopped(tmp_path):
    """A run whose state is of step 3, and which was killed in step 5, in the middle of a line."""
    run = Run(tmp_path / "out", SETTINGS)
    steps(run, 0, 3)
    run.save(model={"weight": torch.arange(4.0)}, step=3)
    steps(run, 3, 5)
    run.metrics.write(b'{"step": 5, "lo')
    run.metrics.close()
    return tmp_path / "out"


def test_every_row_goes_to_the_log_too(tmp_path, monkeypatch):
    """Fakes of both packages, which the tests do without. (Without reinit, wandb would put the rows of a process's
    second run, a preference model's, say, into its first.)"""
    sent = []
    wandb = types.SimpleNamespace(init=lambda **more: sent.append(more) or types.SimpleNamespace(log=sent.append))
    writer = types.SimpleNamespace(add_scalar=lambda *words: sent.append(words), flush=lambda: None)
    board = types.SimpleNamespace(SummaryWriter=lambda folder: sent.append(folder) or writer)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    row = {"stage": "sft", "step": 2, "loss": 0.5, "samples": []}
    run = Run(tmp_path / "w", SETTINGS, log="wandb")
    run.write(row)
    assert sent == [{"dir": str(tmp_path / "w"), "name": "w", "reinit": True}, {"sft/step": 2, "sft/loss": 0.5}]
    sent.clear()
    run = Run(tmp_path / "t", SETTINGS, log="tensorboard")
    run.write(row)
    run.write({"iteration": 3, "reward": 1.5, "score": {"bias": 2.0}})
    assert sent == [str(tmp_path / "t"), ("sft/step", 2, 2), ("sft/loss", 0.5, 2), ("ppo/iteration", 3, 3),
                    ("ppo/reward", 1.5, 3), ("ppo/score/bias", 2.0, 3)]
    assert len(resume.read_metrics(tmp_path / "t")) == 2


@pytest.mark.parametrize("name, package", [("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")])
def test_a_log_that_is_not_installed_is_one_line_and_harms_nothing(stopped, tmp_path, monkeypatch, name, package):
    before = contents(stopped)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"--log {name}: cannot be imported .*; pip install {name}, or leave --log out"):
        Run(stopped, OTHER, overwrite=True, log=name)
    assert contents(stopped) == before
    with pytest.raises(UserError, match=f"--log {name}"):
        Run(tmp_path / "new", OTHER, log=name)
    assert not (tmp_path / "new").exists()


@pytest.fixture
def finished(tmp_path):
    run = Run(tmp_path / "out", SETTINGS)
    steps(run, 0, 2)
    finish(run)
    return tmp_path / "out"


def test_a_run_writes_a_row_per_step_at_once_and_is_finished_with_its_model(tmp_path):
    run = Run(tmp_path / "new" / "out", SETTINGS)
    assert run.state is None and not run.finished
    for number in range(3):
        run.write({"step": number, "text": "é\n"})
        assert resume.read_metrics(tmp_path / "new" / "out")[-1] == {"step": number, "text": "é\n"}
    run.save(step=3)
    (tmp_path / "new" / "out" / "state.pt.tmp").write_bytes(b"of a run that was killed while it saved")
    assert [row["step"] for row in finish(run)] == [0, 1, 2]
    assert sorted(contents(tmp_path / "new" / "out")) == ["config.json", "metrics.jsonl", "run.json"]


def test_run_json_tells_what_was_asked_for_and_what_came_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "sft", "--data", "a b.jsonl"])
    run = Run(tmp_path, SETTINGS, about={"base": "llama"})
    begun = resume.read_run(tmp_path)
    assert begun["command"] == "train.py sft --data 'a b.jsonl'" and begun["ended"] is None
    assert begun["settings"] == SETTINGS and begun["base"] == "llama"
    assert begun["versions"]["torch"] == importlib.metadata.version("torch")
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=resume.__file__.rpartition("/")[0], capture_output=True,
                          text=True)
    assert begun["commit"] == (head.stdout.strip() or None)
    assert begun["code"]["losses"] == common.code_of("losses")["losses"] and "toy" not in begun["code"]
    run.write({"step": 1, "loss": 2.0})
    run.write({"step": 1, "val_loss": 3.0})
    run.write({"step": 2, "loss": 1.0})
    finish(run)
    ended = resume.read_run(tmp_path)
    assert ended["last"] == {"step": 2, "loss": 1.0, "val_loss": 3.0} and ended["ended"] >= begun["began"]
    assert {**ended, "ended": None, "last": None} == {**begun, "last": None}


def test_a_resumed_run_finds_its_state_and_the_metrics_that_this_knows_of(stopped):
    run = Run(stopped, dict(SETTINGS), resume=True)
    assert not run.finished and run.state["step"] == 3 and run.state["model"]["weight"].tolist() == [0, 1, 2, 3]
    assert [row["step"] for row in resume.read_metrics(stopped)] == [0, 1, 2]  # the others will be done again
    steps(run, 3, 6)
    run.save(step=6)
    steps(run, 6, 7)
    run.metrics.close()
    again = Run(stopped, SETTINGS, resume=True)
    assert again.state["step"] == 6 and [row["step"] for row in finish(again)] == [0, 1, 2, 3, 4, 5]
    assert sorted(contents(stopped)) == ["config.json", "metrics.jsonl", "run.json"]
    assert len(resume.read_run(stopped)["resumed"]) == 2


@pytest.mark.parametrize("flags", [{}, {"resume": True}, {"overwrite": True}, {"resume": True, "overwrite": True}])
def test_a_run_that_was_killed_before_its_first_state_begins_at_the_beginning(tmp_path, flags):
    run = Run(tmp_path, OTHER)
    steps(run, 0, 2)
    run.metrics.close()
    again = Run(tmp_path, SETTINGS, **flags)
    assert again.state is None and not again.finished and resume.read_metrics(tmp_path) == []


# What is in the folder, what is asked for, and how; what comes of it: "finished", "go on", "begin" or an error's words.
NAMED = r"other lr \(0\.5, now 0\.25\); give another --out, or --overwrite"
TABLE = [
    ("finished", SETTINGS, "", "finished"), ("finished", SETTINGS, "resume", "finished"),
    ("finished", SETTINGS, "overwrite", "begin"), ("finished", SETTINGS, "resume overwrite", "finished"),
    ("finished", OTHER, "", f"holds a finished run with {NAMED}"),
    ("finished", OTHER, "resume", f"holds a finished run with {NAMED}"),
    ("finished", OTHER, "overwrite", "begin"), ("finished", OTHER, "resume overwrite", "begin"),
    ("stopped", SETTINGS, "", "unfinished run with these settings; --resume"),
    ("stopped", SETTINGS, "resume", "go on"), ("stopped", SETTINGS, "overwrite", "begin"),
    ("stopped", SETTINGS, "resume overwrite", "go on"),
    ("stopped", OTHER, "", f"holds an unfinished run with {NAMED}"),
    ("stopped", OTHER, "resume", f"holds an unfinished run with {NAMED}"),
    ("stopped", OTHER, "overwrite", "begin"), ("stopped", OTHER, "resume overwrite", "begin"),
]


def outcome(folder, settings, flags, **more):
    """What comes of a Run, after checking that an error or a finished run left all as it was."""
    before = contents(folder)
    try:
        run = Run(folder, settings, **dict.fromkeys(flags.split(), True), **more)
    except UserError as error:
        assert contents(folder) == before and len(str(error).splitlines()) == 1
        return str(error)
    if run.finished:
        assert contents(folder) == before
        return "finished"
    if run.state:
        return "go on"
    assert sorted(contents(folder)) == ["metrics.jsonl", "run.json"] and resume.read_metrics(folder) == []
    return "begin"


@pytest.mark.parametrize("what, settings, flags, expected", TABLE)
def test_an_old_result_is_never_given_for_a_new_question(request, capsys, what, settings, flags, expected):
    folder = request.getfixturevalue(what)
    found = outcome(folder, settings, flags)
    assert re.search(expected, found), found
    assert ("made anew" in capsys.readouterr().out) == (settings is OTHER and flags == "resume overwrite")


@pytest.mark.parametrize("what, flags, expected", [
    ("finished", "", r"finished run with other code \(losses\.py\)"),
    ("finished", "resume", r"finished run with other code \(losses\.py\)"),
    ("finished", "resume overwrite", "begin"), ("stopped", "resume", "go on"),
    ("stopped", "resume overwrite", "begin")])
def test_a_result_of_other_code_is_an_old_one_and_a_killed_run_may_go_on_with_it(request, capsys, monkeypatch, what,
                                                                                  flags, expected):
    folder, code = request.getfixturevalue(what), common.code_of("train")
    monkeypatch.setattr(resume, "code_of", lambda script: {**code, "losses": "edited"})
    found = outcome(folder, SETTINGS, flags)
    assert re.search(expected, found), found
    told = {"go on": "goes on, though losses.py changed since it began", "begin": "made with other code (losses.py); "
            "made anew"}
    assert told.get(expected, "") in capsys.readouterr().out
    if expected == "go on":
        assert resume.read_run(folder)["code"]["losses"] == "edited"


@pytest.mark.parametrize("changes, named", [
    ({"steps": ["a"]}, r'steps \(\["a", "b"\], now \["a"\]\)'), ({"data": "x" * 100}, "data;"),
    ({"new": 1, "lr": 1}, r"lr \(0\.5, now 1\), new \(null, now 1\)")])
def test_other_settings_are_named_with_their_values_where_these_are_short(finished, changes, named):
    assert re.search(f"finished run with other {named}", outcome(finished, {**SETTINGS, **changes}, "resume"))


def test_two_processes_do_not_write_one_folder(tmp_path):
    run = Run(tmp_path, SETTINGS)
    steps(run, 0, 2)
    before = contents(tmp_path)
    with pytest.raises(UserError, match="metrics.jsonl: another process is writing it; .*choose another --out"):
        Run(tmp_path, OTHER)
    assert contents(tmp_path) == before
    run.metrics.close()
    assert not Run(tmp_path, OTHER).finished


def test_a_run_with_a_state_is_not_finished_even_if_its_model_is_there(stopped):
    """Killed after the model was saved and before run.json told of it."""
    (stopped / "config.json").write_text("{}")
    run = Run(stopped, SETTINGS, resume=True)
    assert not run.finished and run.state["step"] == 3


def test_a_run_that_was_killed_as_it_removed_its_state_is_finished(finished):
    before = contents(finished)
    for name in ("state.pt", "state.pt.tmp"):
        (finished / name).write_bytes(b"of the step before the last")
    assert Run(finished, SETTINGS, resume=True).finished and contents(finished) == before


def test_a_finished_run_whose_model_was_removed_is_made_again(finished):
    (finished / "config.json").unlink()
    assert not Run(finished, SETTINGS, resume=True).finished


def test_beginning_again_leaves_nothing_that_a_later_run_would_believe(finished):
    """Neither the old model nor what was measured of it."""
    for name in (*resume.MODEL, "model.safetensors", "adapter_model.safetensors", "principle.json", "state.pt"):
        (finished / name).write_text("{}")
    Run(finished, OTHER, overwrite=True).metrics.close()
    assert sorted(contents(finished)) == ["metrics.jsonl", "run.json"]


@pytest.mark.parametrize("flags", ["", "resume", "overwrite", "resume overwrite"])
def test_a_model_that_no_run_wrote_is_neither_finished_nor_removed(tmp_path, flags):
    (tmp_path / "config.json").write_text("{}")
    found = outcome(tmp_path, SETTINGS, flags)
    assert "holds a model but no metrics.jsonl, so no run made it; choose another --out" in found


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "context.json", "state.pt"])
def test_nothing_is_removed_that_no_run_made(tmp_path, name):
    (tmp_path / name).write_text("mine")
    for flags in ("", "resume", "overwrite", "resume overwrite"):
        assert "no run made it" in outcome(tmp_path, SETTINGS, flags)


@pytest.mark.parametrize("flags", ["", "resume", "overwrite", "resume overwrite"])
def test_a_folder_of_several_parts_is_no_training_runs(tmp_path, flags):
    with resume.whole_run(tmp_path, {"seed": 0}, "story"):
        pass
    assert "holds a run of several parts" in outcome(tmp_path, SETTINGS, flags)


def test_options_that_may_be_others_in_the_next_call_are_told_and_not_compared(tmp_path):
    (tmp_path / "run.json").write_text('{"settings": {"seed": 0, "best_of": 2}}')  # as it was written once
    for best_of in (1, 8):
        with resume.whole_run(tmp_path, {"seed": 0}, "story", {"best_of": best_of}):
            pass
        run = resume.read_run(tmp_path)
        assert (run["settings"], run["options"]) == ({"seed": 0}, {"best_of": best_of})
    with pytest.raises(UserError, match=r"other seed \(0, now 1\)"):
        with resume.whole_run(tmp_path, {"seed": 1}, "story", {"best_of": 8}):
            pass


def test_a_run_that_ends_while_another_looks_at_it_is_not_begun_again(tmp_path, monkeypatch):
    first, lock = Run(tmp_path, SETTINGS), resume.locked
    steps(first, 0, 2)

    def locked(path):
        finish(first)
        return lock(path)
    monkeypatch.setattr(resume, "locked", locked)
    assert Run(tmp_path, SETTINGS).finished and (tmp_path / "config.json").exists()


def test_what_is_overwritten_need_not_be_whole(finished, tmp_path):
    for name in ("run.json", "metrics.jsonl"):
        (finished / name).write_bytes(b"\xff")
        assert outcome(finished, SETTINGS, "resume overwrite") == "begin"
        finish(Run(finished, SETTINGS))


@pytest.mark.parametrize("flags, expected", [("", "without run.json"), ("resume", "without run.json"),
                                             ("overwrite", "begin"), ("resume overwrite", "begin")])
def test_a_run_that_does_not_say_what_it_was_asked_for_is_not_believed(finished, flags, expected):
    (finished / "run.json").unlink()
    assert expected in outcome(finished, SETTINGS, flags)


@pytest.mark.parametrize("content", [b"", b"[]", b'{"settings": 1}', b'{"settings": {}, "code": []}', b"\xff\xfe",
                                     b"[" * 100_000])
def test_a_broken_run_json_is_one_line(finished, content):
    (finished / "run.json").write_bytes(content)
    assert "run.json: cannot be read" in outcome(finished, SETTINGS, "resume")
    assert outcome(finished, SETTINGS, "overwrite") == "begin"


@pytest.mark.parametrize("content", [None, b"\x00" * 40, b"3\n", b'{"step": 0}\n{"st'])
def test_metrics_that_are_lost_or_damaged_are_one_line(finished, content):
    path = finished / "metrics.jsonl"
    path.unlink() if content is None else path.write_bytes(content)
    assert "metrics.jsonl: cannot be read as metrics" in outcome(finished, SETTINGS, "resume")


@pytest.mark.parametrize("size", [None, 0, 10])
def test_metrics_shorter_than_the_state_says_are_one_line(stopped, size):
    path = stopped / "metrics.jsonl"
    path.unlink() if size is None else path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match="metrics.jsonl: is shorter than state.pt says; delete state.pt"):
        Run(stopped, SETTINGS, resume=True)
    assert not path.exists() or b"\x00" not in path.read_bytes()
    (stopped / "state.pt").unlink()
    assert Run(stopped, SETTINGS, resume=True).state is None  # as the line says


class Code:
    """What would run when it is unpickled."""
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize("content, said", [
    (b"", "cannot be read"), (b"my notes\nof today\n", "cannot be read"), (b"PK\x03\x04 torn", "cannot be read"),
    (pickle.dumps(Code(), protocol=2), "cannot be read"), ({"model": torch.zeros(2), "step": 3}, "belongs to another"),
    ([1, 2], "belongs to another run"), (torch.zeros(2), "belongs to another run"), (Code(), "cannot be read")])
def test_a_state_of_something_else_is_one_line(stopped, capsys, content, said):
    if isinstance(content, bytes):
        (stopped / "state.pt").write_bytes(content)
    else:
        torch.save(content, stopped / "state.pt")
    found = outcome(stopped, SETTINGS, "resume")
    assert re.search(rf"state\.pt: .*{said}", found) and capsys.readouterr().out == ""


def test_a_state_of_another_run_is_not_gone_on_from(stopped, tmp_path):
    run = Run(tmp_path / "other", OTHER)
    run.save(step=5)
    (tmp_path / "other" / "state.pt").rename(stopped / "state.pt")
    assert "state.pt: belongs to another run" in outcome(stopped, SETTINGS, "resume")


def test_a_torn_state_and_any_flipped_bit_in_it_are_one_line(stopped):
    """A bit in a number would otherwise be trained on."""
    whole = (stopped / "state.pt").read_bytes()
    with zipfile.ZipFile(stopped / "state.pt") as file:
        weight = next(name for name in file.namelist() if name.endswith("data/0"))
        start = whole.index(file.read(weight))
    for place in range(start, start + 16):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        (stopped / "state.pt").write_bytes(damaged)
        assert "state.pt: cannot be read" in outcome(stopped, SETTINGS, "resume")
    (stopped / "state.pt").write_bytes(whole[:len(whole) // 2])
    assert "state.pt: cannot be read" in outcome(stopped, SETTINGS, "resume")


def test_a_state_that_fits_neither_model_nor_code_is_one_line(stopped):
    run = Run(stopped, SETTINGS, resume=True)
    for wrong in (lambda: run.state["optimizer"], lambda: torch.nn.Linear(2, 2).load_state_dict(run.state["model"])):
        with pytest.raises(UserError, match="state.pt: does not fit this run .*; delete it") as error:
            with run.loading():
                wrong()
        assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("error", [RuntimeError("[enforce fail at inline_container.cc]\nwrite failed"),
                                   OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_state_that_cannot_be_written_leaves_the_last_one(stopped, monkeypatch, error):
    run = Run(stopped, SETTINGS, resume=True)
    steps(run, 3, 6)
    before = (stopped / "state.pt").read_bytes()

    def fail(state, path):
        path.write_bytes(b"half")
        raise error
    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises((UserError, OSError, KeyboardInterrupt)) as raised:
        run.save(step=6)
    if isinstance(error, RuntimeError):
        assert "state.pt: cannot be written" in str(raised.value) and "disk full?" in str(raised.value)
        assert len(str(raised.value).splitlines()) == 1
    assert (stopped / "state.pt").read_bytes() == before
    assert sorted(contents(stopped)) == ["metrics.jsonl", "run.json", "state.pt"]


def test_a_part_is_kept_as_long_as_it_is_made_of_the_same(tmp_path, capsys):
    made = []

    def part(made_of):
        resume.kept(tmp_path, "part", made_of, lambda: made.append(made_of) or (tmp_path / "part").write_text("x"))
    for made_of in ([1, {"a": "b"}], [1, {"a": "b"}], [2, {"a": "b"}], [2, {"a": "b"}]):
        part(made_of)
    assert made == [[1, {"a": "b"}], [2, {"a": "b"}]] and capsys.readouterr().out.count("made anew") == 1
    (tmp_path / "part").unlink()
    part([2, {"a": "b"}])
    assert len(made) == 3
    resume.kept(tmp_path, "whole", [1], lambda: part([3]))  # a part in a part
    (tmp_path / "whole").write_text("x")
    resume.kept(tmp_path, "whole", [1], lambda: made.append("again"))
    part([3])
    assert len(made) == 4


# ----------------------------------------------------------------------------------------------------------------
# Journals


def test_a_torn_line_is_cut_off_and_the_next_begins_afresh(tmp_path):
    """Also when the second run is killed in its turn."""
    for number in range(3):
        journal = Journal(tmp_path / "out", "run")
        assert sorted(journal.rows) == list(range(number))
        journal.add({"index": number})
        journal.file.close()
        with open(tmp_path / "out.part", "ab") as file:
            file.write(b'{"index": 9, "aligned": "caf\xc3')
    assert (tmp_path / "out.part").read_bytes().count(b"caf") == 1


def test_journal_keeps_any_text(tmp_path):
    """Also line separators that JSON leaves as they are, and half a surrogate pair."""
    rows = [{"index": n, "aligned": text} for n, text in enumerate(["a\u2028b\x85c\x1cd", "\n", "é\x00", ""])]
    journal = Journal(tmp_path / "out", "run")
    for row in rows:
        journal.add(row)
    assert list(journal.rows.values()) == rows
    journal.file.close()
    journal = Journal(tmp_path / "out", "run")
    assert list(journal.rows.values()) == rows
    journal.add({"index": 4, "aligned": "\ud800"})
    journal.add({"index": 0, "left_as_is": True})
    journal.file.close()
    again = Journal(tmp_path / "out", "run").rows
    assert again[4]["aligned"] == "?" and again[0] == {**rows[0], "left_as_is": True}


@pytest.mark.parametrize("content", [
    b"", b'{"ru', b'{"run": "ot', b'{"run": "other"}\n', b'{"run": "other"}\n{"index": 0, "al'])
def test_a_journal_without_a_row_is_begun_again(tmp_path, content):
    (tmp_path / "out.part").write_bytes(content)
    journal = Journal(tmp_path / "out", "run")
    journal.add({"index": 0, "aligned": "a"})
    rows = [json.loads(line) for line in open(tmp_path / "out.part", encoding="utf-8")]
    assert rows == [{"run": "run"}, {"index": 0, "aligned": "a"}]


@pytest.mark.parametrize("content", [b"\xff\xfe\n\n", b"[1]\n[2]\n", b"my notes\nof today\n", b"my notes",
                                     b'{"run": "run"}\n{"aligned": "a"}\n', b'{"run": "run"}\n[0]\n'])
def test_a_part_file_of_something_else_is_left_alone(tmp_path, content):
    (tmp_path / "out.part").write_bytes(content)
    with pytest.raises(UserError, match="out.part: is not the unfinished output"):
        Journal(tmp_path / "out", "run")
    assert (tmp_path / "out.part").read_bytes() == content


def test_a_journal_of_other_settings_is_left_alone(tmp_path):
    Journal(tmp_path / "out", "run").add({"index": 0, "aligned": "a"})
    before = (tmp_path / "out.part").read_bytes()
    with pytest.raises(UserError, match="out.part: is the unfinished output of a run with other settings; delete it"):
        Journal(tmp_path / "out", "other")
    assert (tmp_path / "out.part").read_bytes() == before


def test_two_processes_do_not_write_one_journal(tmp_path):
    journal = Journal(tmp_path / "out", "run")
    journal.add({"index": 0})
    with pytest.raises(UserError, match="out.part: another process is writing it"):
        Journal(tmp_path / "out", "run")
    journal.finish()
    assert Journal(tmp_path / "out", "run").rows == {}


def test_a_finished_journal_is_gone(tmp_path):
    journal = Journal(tmp_path / "new" / "out", "run")
    journal.add({"index": 0})
    journal.finish()
    assert list((tmp_path / "new").iterdir()) == [] and Journal(tmp_path / "new" / "out", "another").rows == {}
