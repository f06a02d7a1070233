"""common.py: how commands start and fail, their options, and files that are whole or not there at all."""
import argparse
import ctypes
import errno
import gzip
import io
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_one_line

import common
from common import UserError


# ----------------------------------------------------------------------------------------------------------------
# Starting and failing


@pytest.mark.parametrize("error, status, message", [
    (UserError("two\nlines"), 2, "two lines"), (KeyboardInterrupt(), 130, "interrupted"),
    (OSError(errno.ENOSPC, "No space left", "x.jsonl"), 2, "x.jsonl: No space left; free"),
    (PermissionError(errno.EACCES, "Permission denied", "y"), 2, "y: Permission denied")])
def test_cli_turns_errors_into_one_line(error, status, message, capsys):
    def main():
        raise error
    with pytest.raises(SystemExit) as stopped:
        common.cli(main)
    assert stopped.value.code == status
    assert_one_line(capsys.readouterr().err, message)


def test_a_stop_is_an_error_on_one_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        common.stop("a\nb", status=3)
    assert stopped.value.code == 3 and capsys.readouterr().err == "error: a b\n"
    assert common.first_line(ValueError("one\ntwo")) == "one" and common.first_line(KeyError()) == "KeyError"


def test_keeping_memory_changes_no_result_and_may_be_asked_for_twice():
    def result():
        blocks = [torch.arange(size, dtype=torch.float64).square() for size in (10, 100_000, 3_000_000, 10)]
        return [block.sum().item() for block in blocks]
    before = result()
    common.keep_memory()
    common.keep_memory()
    assert result() == before == result()


def test_a_c_library_without_mallopt_is_left_alone(monkeypatch):
    """musl and macOS have none; Windows has no CDLL(None)."""
    asked = []
    monkeypatch.setattr(ctypes, "CDLL", lambda name: asked.append(name) or SimpleNamespace())
    common.keep_memory()
    monkeypatch.setattr(common.os, "name", "nt")
    common.keep_memory()
    assert asked == [None]


@pytest.mark.parametrize("error, status", [(None, 0), (UserError("b\udcff"), 2)])
def test_half_a_surrogate_does_not_stop_a_command(error, status, capsys):
    """A path that cannot be decoded holds such."""
    def main():
        print("a\udcff")
        if error:
            raise error
        sys.exit(0)
    with pytest.raises(SystemExit) as stopped:
        common.cli(main)
    assert stopped.value.code == status
    assert capsys.readouterr() == ("a?\n", "error: b?\n" if error else "")


def test_streams_that_cannot_be_reconfigured_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "stderr", None)
    common.cli(lambda: print("said"))
    assert sys.stdout.getvalue() == "said\n"


def test_programming_errors_are_not_hidden():
    def main():
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError):
        common.cli(main)


# ----------------------------------------------------------------------------------------------------------------
# Options


@dataclass
class Options:
    steps: int = common.option(100, "how many steps", low=1, high=1000)
    lr: float = common.option(1e-3, "the learning rate", low=0)
    how: str = common.option("mean", "what 5 % are done", choices=("mean", "worst"))
    clip_norm: float = common.option(1.0, "the largest gradient")
    quiet: bool = common.option(False, "say nothing", free=True)
    log_every: int = common.option(10, "how often to tell", low=1, free=True)


def parsed(words, **defaults):
    parser = argparse.ArgumentParser()
    common.add_options(parser, Options, **defaults)
    return common.read_options(Options, parser.parse_args(words), **defaults)


def test_options_are_the_flags_of_a_command():
    assert Options() == parsed([]) == Options(100, 1e-3, "mean", 1.0, False, 10)
    assert parsed(["--lr", "0.5", "--clip-norm=-2", "--quiet", "--how", "worst"]) == Options(
        lr=0.5, clip_norm=-2.0, quiet=True, how="worst")
    assert parsed(["--no-quiet", "--lr", "1"], quiet=True, steps=7) == Options(steps=7, lr=1.0)
    assert type(parsed(["--lr", "1"]).lr) is float


@pytest.mark.parametrize("words, message", [
    (["--steps", "0"], "--steps: 0 must be from 1 to 1000"), (["--steps", "1001"], "must be from 1 to 1000"),
    (["--steps", "1.5"], "invalid int value: '1.5'"), (["--lr", "nan"], "--lr: nan must be at least 0"),
    (["--lr=-1"], "must be at least 0"), (["--how", "best"], "choose from"),
    (["--clip-norm", "nan"], "--clip-norm: nan must be a number")])
def test_options_out_of_range_are_refused(words, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        parsed(words)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_help_tells_what_an_option_is_and_its_default(capsys):
    parser = common.make_parser("What it does.\n\n    python it.py   in this\n    order\n")
    common.add_options(parser, Options, steps=7)
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    told = capsys.readouterr().out
    in_order = ("What it does.", "how many steps (default 7)", "--how {mean,worst}", "--no-quiet", "--log-every INT",
                "\n    python it.py   in this\n    order\n")
    places = [told.rindex(text) for text in in_order]
    assert places == sorted(places)


def test_an_option_that_is_given_is_told_from_its_default(capsys):
    parser = argparse.ArgumentParser()
    common.add_options(parser, Options, leave_out=["lr"])
    args = parser.parse_args(["--steps", "100", "--quiet"])
    assert common.read_options(Options, args) == Options(quiet=True)
    common.refuse_given(parser, args, ["lr", "log_every", "how"], "is of no use here")
    for name in ("steps", "quiet"):
        with pytest.raises(SystemExit) as stopped:
            common.refuse_given(parser, args, ["log_every", name], "is of no use here")
        assert stopped.value.code == 2 and f"--{name} is of no use here" in capsys.readouterr().err


@pytest.mark.parametrize("low, high, accepted, refused, wanted", [
    (None, None, ["-1e9", "inf"], ["nan"], "a number"), (0, None, ["0", "inf"], ["-1e-9", "nan"], "at least 0"),
    (0, 1, ["0", "1"], ["1.1", "nan"], "from 0 to 1"), (None, 1, ["-inf", "1"], ["2", "nan"], "at most 1")])
def test_numbers_are_in_their_range(low, high, accepted, refused, wanted):
    parse = common.number(float, low, high)
    assert [parse(text) for text in accepted] == [float(text) for text in accepted]
    for text in refused:
        with pytest.raises(argparse.ArgumentTypeError, match=f"^{text} must be {wanted}$"):
            parse(text)


def test_a_resumed_run_may_change_the_free_options_only():
    assert common.lasting(Options()) == {"steps": 100, "lr": 1e-3, "how": "mean", "clip_norm": 1.0}
    assert common.lasting(Options(quiet=True, log_every=1)) == common.lasting(Options())
    assert common.lasting(Options(lr=2e-3)) != common.lasting(Options())


def test_a_digest_is_the_same_in_any_process_and_for_any_order_of_keys():
    content = [{"b": 1, "a": [1.5, None, "é"]}, "text", True]
    code = f"import common; print(common.digest(*{content!r}))"
    found = {subprocess.run([sys.executable, "-c", code], cwd=Path(common.__file__).parent, capture_output=True,
                            text=True, env={"PYTHONHASH3a2c4be73333bd": seed}).stdout.strip() for seed in ("1", "2")}
    assert found == {common.digest({"a": [1.5, None, "é"], "b": 1}, "text", True)} and len(found.pop()) == 64
    others = [["text"], ["tex", "t"], [["text"]], [{"text": 1}], [{"text": "1"}], [{"text": 1.5}], []]
    assert len({common.digest(*other) for other in others}) == len(others)


# ----------------------------------------------------------------------------------------------------------------
# Files


def test_writing_is_whole_or_not_at_all(tmp_path):
    path = tmp_path / "o.jsonl"
    assert common.write_jsonl(path, iter([{"a": "é\ud800"}, {"b": 1}])) == 2
    assert path.read_text(encoding="utf-8") == '{"a": "é?"}\n{"b": 1}\n'
    assert [file.name for file in tmp_path.iterdir()] == ["o.jsonl"]

    def rows():
        yield {"c": 2}
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        common.write_jsonl(path, rows())
    assert "é" in path.read_text(encoding="utf-8")
    assert [file.name for file in tmp_path.iterdir()] == ["o.jsonl"]


def test_a_gzipped_file_is_told_by_its_ending(tmp_path):
    assert common.write_jsonl(tmp_path / "new" / "o.jsonl.gz", [{"a": 1}, {"b": "é"}]) == 2
    with gzip.open(tmp_path / "new" / "o.jsonl.gz", "rt", encoding="utf-8") as file:
        assert [json.loads(line) for line in file] == [{"a": 1}, {"b": "é"}]


def test_texts_are_written_whole_and_in_utf_8(tmp_path):
    common.write_text(tmp_path / "new" / "t.txt", "é\ud800\n")
    assert (tmp_path / "new" / "t.txt").read_bytes() == "é?\n".encode()


def test_an_error_that_names_no_file_gets_its_name_and_leaves_the_old_one(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("old")

    def write(aside):
        aside.write_text("half")
        raise OSError(errno.ENOSPC, "No space left")
    with pytest.raises(OSError) as error:
        common.write_whole(path, write)
    assert error.value.filename == str(path) and path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_private_file_by_a_writer_gets_the_usual_mode(tmp_path):
    def write(aside):
        aside.write_text("x")
        aside.chmod(0o600)
    common.write_whole(tmp_path / "a", write)
    (tmp_path / "b").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_outputs_that_could_not_be_put_in_place_are_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "in.jsonl").touch()
    (tmp_path / "out.jsonl").touch()
    for out, said in (("folder", "folder: is no ordinary file"), ("/dev/null", "no ordinary file"),
                      ("folder/../in.jsonl", "is an input too"), (tmp_path / "in.jsonl", "is an input too")):
        with pytest.raises(UserError, match=said):
            common.check_out(out, ["other.jsonl", "in.jsonl"])
    common.check_out("out.jsonl", ["in.jsonl"])
    common.check_out("new/out.jsonl", [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "in.jsonl", "out.jsonl"]
    with pytest.raises(UserError, match="no ordinary file"):
        common.write_jsonl("folder", [])


def test_seeds_are_the_same_on_every_machine():
    """Worked out once, by `printf %s "(0, 1, 'a')" | sha256sum`: the first 14 digits, as a number."""
    assert common.seed_from(0, 1, "a") == int("3a2c4be73333bd", 16)
    parts = [(0,), (1,), (0, 0), (0, 1), (1, 0), ("0",), (2**64, -5, "x")]
    seeds = [common.seed_from(*part) for part in parts]
    assert len(set(seeds)) == len(parts) and all(0 <= seed < 2**63 for seed in seeds)
