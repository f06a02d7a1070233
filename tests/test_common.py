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


@pytest.mark.parametrize("error", [
    MemoryError(), torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate\n20.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried to")])
def test_out_of_memory_is_one_line(error, capsys):
    def main():
        raise error
    with pytest.raises(SystemExit):
        common.cli(main)
    assert_one_line(capsys.readouterr().err, "^error: out of memory; lower --micro-tokens or --batch")


def test_what_the_system_says_of_too_much_memory_is_taken_for_that():
    """Asked for in earnest."""
    code = ("import common, torch, resource; resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30,) * 2)\n"
            "common.cli(lambda: torch.ones(2**40))")
    ended = subprocess.run([sys.executable, "-c", code], cwd=Path(common.__file__).parent, capture_output=True,
                           text=True)
    assert ended.returncode == 2
    assert_one_line(ended.stderr, "out of memory")


def test_a_message_of_any_length_is_one_that_can_be_read(capsys):
    with pytest.raises(SystemExit):
        common.stop(f"rows.jsonl:3: the rating {'9' * 200_000} is no number; mend or remove it")
    told = capsys.readouterr().err
    assert_one_line(told, "rows.jsonl:3: the rating 999.* is no number; mend or remove it$")
    common.note("a\nb" * 1000)
    assert len(told) < 520 and len(capsys.readouterr().err.splitlines()) == 1
    assert common.in_short("x" * 500) == "x" * 500 and len(common.in_short("x" * 501)) == 500


@pytest.mark.parametrize("closed, told", [(">&-", ["error: why"]), ("2>&-", ["said"]), (">&- 2>&-", [])])
def test_a_command_whose_output_is_closed_is_no_traceback(closed, told):
    code = ("import common, tqdm\ndef main():\n    print('said')\n    list(tqdm.tqdm(range(3), disable=None))\n"
            "    raise common.UserError('why')\ncommon.cli(main)")
    ended = subprocess.run(["sh", "-c", f'"{sys.executable}" -c "$0" {closed}', code], capture_output=True, text=True,
                           cwd=Path(common.__file__).parent)
    assert ended.returncode == 2 and [*ended.stdout.splitlines(), *ended.stderr.splitlines()] == told


def test_output_that_a_terminal_cannot_show_is_no_traceback():
    code = "import common; common.cli(lambda: print('\\u2013 \\udc80'))"
    ended = subprocess.run([sys.executable, "-c", code], cwd=Path(common.__file__).parent, capture_output=True,
                           env={"PYTHONIOENCODING": "latin-1"})
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, b"? ?\n", b"")


def test_ctrl_c_while_modules_are_imported_is_one_line():
    # the handler: jobs in the background of a shell inherit that Ctrl-C is ignored
    code = ("import common, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
            "signal.raise_signal(signal.SIGINT)")
    ended = subprocess.run([sys.executable, "-c", code], cwd=Path(common.__file__).parent, capture_output=True,
                           text=True)
    assert ended.stderr == "error: interrupted\n" and ended.returncode == -2  # ended by SIGINT, as a shell expects
    other = subprocess.run([sys.executable, "-c", "import common; 1 / 0"], cwd=Path(common.__file__).parent,
                           capture_output=True, text=True)
    assert other.stderr.startswith("Traceback") and "ZeroDivisionError" in other.stderr


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


def test_a_link_to_an_output_stays_one(tmp_path):
    (tmp_path / "target.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to("target.txt")
    common.write_text(tmp_path / "link.txt", "new")
    assert (tmp_path / "link.txt").is_symlink() and (tmp_path / "target.txt").read_text() == "new"


def test_two_processes_do_not_write_one_file(tmp_path):
    path = tmp_path / "o.jsonl"

    def rows():
        yield {"a": 1}
        with pytest.raises(UserError, match="o.jsonl.tmp: another process is writing it"):
            common.write_jsonl(path, [{"b": 2}])
        yield {"a": 2}
    assert common.write_jsonl(path, rows()) == 2 and path.read_text() == '{"a": 1}\n{"a": 2}\n'


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
    (tmp_path / "link.jsonl").symlink_to("in.jsonl")
    (tmp_path / "new.jsonl.part").hardlink_to(tmp_path / "out.jsonl")
    for out, path in (("link.jsonl", "in.jsonl"), ("in.jsonl", "./folder/../link.jsonl"), ("new.jsonl", "out.jsonl")):
        with pytest.raises(UserError, match="is an input too"):
            common.check_out(out, [None, path])
    (tmp_path / "link.jsonl").unlink(), (tmp_path / "new.jsonl.part").unlink()
    common.check_out("out.jsonl", ["in.jsonl", None, "absent"])
    common.check_out("new/out.jsonl", [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "in.jsonl", "out.jsonl"]
    with pytest.raises(UserError, match="no ordinary file"):
        common.write_jsonl("folder", [])


def test_one_process_at_a_time_has_a_locked_file(tmp_path):
    path = tmp_path / "new" / "file"
    file = common.locked(path)
    file.write(b"a")
    file.flush()
    code = f"import common; common.cli(lambda: common.locked({str(path)!r}).write(b'b'))"

    def other():
        return subprocess.run([sys.executable, "-c", code], cwd=Path(common.__file__).parent, capture_output=True,
                              text=True)
    assert_one_line(other().stderr, "new/file: another process is writing it; wait until it has ended")
    assert path.read_bytes() == b"a"
    file.close()
    assert other().returncode == 0 and path.read_bytes() == b"ab"


def test_a_file_that_was_removed_meanwhile_is_made_anew(tmp_path, monkeypatch):
    """Between opening it and locking it, the process that had it may have finished with it."""
    path, calls = tmp_path / "file", []

    def flock(file, how):
        if not calls:
            path.unlink()
        calls.append(how)
    monkeypatch.setattr(common.fcntl, "flock", flock)
    common.locked(path).close()
    assert len(calls) == 2 and path.exists()


def test_a_file_system_without_locks_is_written_to_all_the_same(tmp_path, monkeypatch):
    def flock(file, how):
        raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(common.fcntl, "flock", flock)
    common.locked(tmp_path / "a").close()
    monkeypatch.setattr(common, "fcntl", None)
    common.locked(tmp_path / "b").close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_files_digest_is_that_of_sha256sum(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert common.file_digest(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_the_code_of_a_script_is_what_it_computes_and_of_those_it_imports(tmp_path):
    def code(**files):
        for name, text in files.items():
            (tmp_path / f"{name}.py").write_text(text)
        common.code_of.cache_clear()
        return common.code_of("a", tmp_path)
    first = code(a='"""Doc."""\nimport os\nimport b\n', b="from c import x\ndef f():\n    'Doc.'\n    return 1\n",
                 c="import a\nx = 1\n", d="x = 1\n")
    assert first.keys() == {"a", "b", "c"}
    changed = "from c import x\n\n# said otherwise\ndef f():\n    # one\n    return 1\n\n"
    assert code(b=changed, a="import os, b\n") != first
    assert code(a='import os\nimport b\n') == first
    other = code(c="import a\nx = 2\n")
    assert {name for name in first if first[name] != other[name]} == {"c"}
    assert code(d="x = 2\n") == other


def test_seeds_are_the_same_on_every_machine():
    """Worked out once, by `printf %s "(0, 1, 'a')" | sha256sum`: the first 14 digits, as a number."""
    assert common.seed_from(0, 1, "a") == int("3a2c4be73333bd", 16)
    parts = [(0,), (1,), (0, 0), (0, 1), (1, 0), ("0",), (2**64, -5, "x")]
    seeds = [common.seed_from(*part) for part in parts]
    assert len(set(seeds)) == len(parts) and all(0 <= seed < 2**63 for seed in seeds)
