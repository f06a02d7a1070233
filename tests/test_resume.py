"""resume.py: what a killed run leaves behind, and that it goes on from there and from nowhere else."""
import json
import pickle

import pytest
import torch

import resume
from common import UserError
from resume import Journal, Run


# ----------------------------------------------------------------------------------------------------------------
# Training runs

SETTINGS = {"lr": 0.5, "steps": ["a", "b"], "data": "abc"}


def steps(run, first, last):
    for number in range(first, last):
        run.write({"step": number})


def model_in(folder, name="config.json"):
    (folder / name).write_text("{}")


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


@pytest.fixture
def finished(tmp_path):
    run = Run(tmp_path / "out", SETTINGS)
    steps(run, 0, 2)
    model_in(tmp_path / "out")
    run.finish()
    return tmp_path / "out"


def test_a_run_writes_a_row_per_step_at_once_and_is_finished_with_its_model(tmp_path):
    run = Run(tmp_path / "new" / "out", SETTINGS)
    assert run.state is None and not run.finished
    for number in range(3):
        run.write({"step": number, "text": "é\n"})
        assert resume.read_metrics(tmp_path / "new" / "out")[-1] == {"step": number, "text": "é\n"}
    run.save(step=3)
    (tmp_path / "new" / "out" / "state.pt.tmp").write_bytes(b"of a run that was killed while it saved")
    assert [row["step"] for row in run.finish()] == [0, 1, 2]
    assert [path.name for path in (tmp_path / "new" / "out").iterdir()] == ["metrics.jsonl"]


def test_a_resumed_run_finds_its_state_and_the_metrics_that_this_knows_of(stopped):
    run = Run(stopped, dict(SETTINGS), resume=True)
    assert not run.finished and run.state["step"] == 3 and run.state["model"]["weight"].tolist() == [0, 1, 2, 3]
    assert [row["step"] for row in resume.read_metrics(stopped)] == [0, 1, 2]  # the others will be done again
    steps(run, 3, 6)
    run.save(step=6)
    steps(run, 6, 7)
    run.metrics.close()
    again = Run(stopped, SETTINGS, resume=True)
    assert again.state["step"] == 6 and [row["step"] for row in again.finish()] == [0, 1, 2, 3, 4, 5]
    assert [path.name for path in stopped.iterdir()] == ["metrics.jsonl"]


def test_a_run_that_was_killed_before_its_first_state_begins_at_the_beginning(tmp_path):
    run = Run(tmp_path, SETTINGS)
    steps(run, 0, 2)
    run.metrics.close()
    again = Run(tmp_path, SETTINGS, resume=True)
    assert again.state is None and not again.finished and resume.read_metrics(tmp_path) == []


@pytest.mark.parametrize("name", resume.FINISHED)
def test_a_finished_run_has_nothing_left_to_do(finished, name):
    (finished / "config.json").rename(finished / name)
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    assert Run(finished, SETTINGS, resume=True).finished
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == before
    assert sorted(before) == sorted(["metrics.jsonl", name])


def test_a_run_with_a_state_is_not_finished_even_if_its_model_is_there(stopped):
    """Killed after the model was saved and before the state was removed."""
    model_in(stopped)
    run = Run(stopped, SETTINGS, resume=True)
    assert not run.finished and run.state["step"] == 3


def test_without_resume_everything_begins_again(stopped):
    """A later --resume must find neither the old state nor, in the old model, a finished run."""
    for name in resume.FINISHED:
        model_in(stopped, name)
    run = Run(stopped, {"lr": 1.0})
    assert not run.finished and run.state is None
    assert [path.name for path in stopped.iterdir()] == ["metrics.jsonl"] and resume.read_metrics(stopped) == []


@pytest.mark.parametrize("again", [False, True])
def test_a_model_that_no_run_wrote_is_neither_finished_nor_removed(tmp_path, again):
    """It has no metrics. Were a run begun beside it and killed, --resume would take it for that run's model."""
    model_in(tmp_path)
    with pytest.raises(UserError, match="holds a model but no metrics.jsonl, so no run made it; choose another --out"):
        Run(tmp_path, SETTINGS, resume=again)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("changes, named", [
    ({"lr": 0.25}, "lr"), ({"steps": ["a"]}, "steps"), ({"lr": 0.25, "data": "abd"}, "lr, data"),
    ({"new": None}, "new")])
def test_other_settings_are_refused_by_name(stopped, changes, named):
    before = {path.name: path.read_bytes() for path in stopped.iterdir()}
    with pytest.raises(UserError, match=rf"state\.pt: was made with other settings of {named}; .*--resume"):
        Run(stopped, {**SETTINGS, **changes}, resume=True)
    assert {path.name: path.read_bytes() for path in stopped.iterdir()} == before
    Run(stopped, {name: SETTINGS[name] for name in ("data", "lr", "steps")}, resume=True)  # in any order


class Code:
    """What would run when it is unpickled."""
    def __reduce__(self):
        return print, ("run",)


def of_something_else(content, path):
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, Code):
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path)


@pytest.mark.parametrize("content, said", [
    (b"", "cannot be read"), (b"my notes\nof today\n", "cannot be read"), (b"PK\x03\x04 torn", "cannot be read"),
    (Code(), "cannot be read"), ({"model": torch.zeros(2), "step": 3}, "other settings of lr, steps, data"),
    ([1, 2], "other settings of lr, steps, data"), (torch.zeros(2), "other settings of lr, steps, data")])
def test_a_state_of_something_else_is_one_line(stopped, capsys, content, said):
    of_something_else(content, stopped / "state.pt")
    before = {path.name: path.read_bytes() for path in stopped.iterdir()}
    with pytest.raises(UserError, match=rf"state\.pt: .*{said}") as error:
        Run(stopped, SETTINGS, resume=True)
    assert len(str(error.value).splitlines()) == 1 and capsys.readouterr().out == ""
    assert {path.name: path.read_bytes() for path in stopped.iterdir()} == before


def test_a_torn_state_is_one_line(stopped):
    whole = (stopped / "state.pt").read_bytes()
    (stopped / "state.pt").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(UserError, match=r"state\.pt: cannot be read .*; delete it") as error:
        Run(stopped, SETTINGS, resume=True)
    assert len(str(error.value).splitlines()) == 1
    (stopped / "state.pt").unlink()
    assert Run(stopped, SETTINGS, resume=True).state is None  # as the line says


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
    assert sorted(path.name for path in stopped.iterdir()) == ["metrics.jsonl", "state.pt"]


# ----------------------------------------------------------------------------------------------------------------
# Journals


def test_a_torn_line_is_cut_off_and_the_next_begins_afresh(tmp_path):
    """Also when the second run is killed in its turn."""
    for number in range(3):
        journal = Journal(tmp_path / "out", "run")
        assert sorted(journal.rows) == list(range(number))
        journal.add({"index": number})
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
    assert list(Journal(tmp_path / "out", "run").rows.values()) == rows
    journal = Journal(tmp_path / "out", "run")
    journal.add({"index": 4, "aligned": "\ud800"})
    journal.add({"index": 0, "left_as_is": True})
    again = Journal(tmp_path / "out", "run").rows
    assert again[4]["aligned"] == "?" and again[0] == {**rows[0], "left_as_is": True}


@pytest.mark.parametrize("content", [
    b"", b'{"run": "ot', b'{"run": "other"}\n', b'{"run": "other"}\n{"index": 0, "al'])
def test_a_journal_without_a_row_is_begun_again(tmp_path, content):
    (tmp_path / "out.part").write_bytes(content)
    journal = Journal(tmp_path / "out", "run")
    journal.add({"index": 0, "aligned": "a"})
    rows = [json.loads(line) for line in open(tmp_path / "out.part", encoding="utf-8")]
    assert rows == [{"run": "run"}, {"index": 0, "aligned": "a"}]


@pytest.mark.parametrize("content", [b"\xff\xfe\n\n", b"[1]\n[2]\n", b"my notes\nof today\n", b"my notes"])
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


def test_a_finished_journal_is_gone(tmp_path):
    journal = Journal(tmp_path / "new" / "out", "run")
    journal.add({"index": 0})
    journal.finish()
    assert list((tmp_path / "new").iterdir()) == [] and Journal(tmp_path / "new" / "out", "another").rows == {}
