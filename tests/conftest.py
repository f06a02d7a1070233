"""What all tests share: imports from the top folder, the real material beside the repository, the `cuda` marker, the
scripts' command lines in this process, and small files of rows."""
import csv
import io
import json
import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
import resume  # noqa: E402

torch.set_num_threads(1)  # the models of the tests are too small for more


def pytest_configure(config):
    config.addinivalue_line("markers", "cuda: needs a CUDA device; skipped where there is none")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def shared():
    """The folder of real data and checkpoints beside the repository; the test is skipped where it is absent."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("no ../shared here")
    return folder


def run(module, monkeypatch, words):
    """The command line of a script, align or train, say, in this process; gives its exit status."""
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, words)])
    try:
        common.cli(module.main)
    except SystemExit as stop:
        return stop.code
    return 0


def interrupt_at_state(patch, number):
    """A run is interrupted, as by Ctrl-C, when it has saved so many states."""
    save, states = resume.Run.save, []

    def count(run, **parts):
        save(run, **parts)
        states.append(1)
        if len(states) == number:
            raise KeyboardInterrupt
    patch.setattr(resume.Run, "save", count)


def refused(module, monkeypatch, capsys, words, *expected):
    """Asserts that a command ends with status 2 and, last, one line that says all that is expected."""
    capsys.readouterr()
    assert run(module, monkeypatch, words) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.match(rf"({module.__name__}\.py( \w+)?: )?error: ", message), message  # with the subcommand, if any
    assert all(text in message for text in expected), message


def assert_one_line(text, message):
    assert text.startswith("error: ") and text.endswith("\n") and text.count("\n") == 1, text
    assert len(text) < 600 and re.search(message, text), text


def write(path, *rows):
    """A JSON Lines file; gives its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def response(text, **scores):
    return {"text": text, "scores": scores}


def write_csv(path, rows, escape):
    """As pandas' to_csv does with escapechar="\\" (both quotes and backslashes are doubled) or without."""
    file = io.StringIO(newline="")
    writer = csv.writer(file, lineterminator="\n")
    writer.writerows([[cell.replace("\\", "\\\\") for cell in row] if escape else row for row in rows])
    path.write_text(file.getvalue(), encoding="utf-8", newline="")
    return path
