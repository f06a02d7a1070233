"""How a command starts, reads its options, fails, and writes whole files: what every script here begins with.

    if __name__ == "__main__":
        cli(main)

Options are said once: a field of a dataclass carries its default, its help, what values it may have, and whether a
resumed run may change it. The command line (`add_options`), the check of ranges, and the check of a resumed run
(`lasting`) are all made of it.
"""
import argparse
import ast
import ctypes
import dataclasses
import errno
import functools
import gzip
import hashlib
import json
import os
import re
import sys
import time
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


class UserError(Exception):
    """Something the user can put right. The message says what, where and what to do, in one line."""


# ----------------------------------------------------------------------------------------------------------------
# Starting and failing


def cli(main):
    """Run a script's main(). What the user or the machine is to blame for becomes one line and status 2."""
    keep_memory()
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # the command was started with it closed
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # half a surrogate, of a path say, prints as a question mark
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        stop(str(error))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # silences Python's last flush
        stop("what read this command's output closed it; the output is incomplete")
    except OSError as error:
        hint = "free some space" if error.errno == errno.ENOSPC else "check the path and its permissions"
        stop(f"{error.filename}: {error.strerror}; {hint}" if error.filename else f"{error}; {hint}")
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search("out of memory|can't allocate", str(error)):
            raise
        stop("out of memory; lower --micro-tokens or --batch, or free some memory")
    except KeyboardInterrupt:
        stop("interrupted", status=130)


def stop(message, status=2):
    print("error: " + in_short(" ".join(message.splitlines())), file=sys.stderr)
    sys.exit(status)


def note(text):
    """Tell something that is no error, beside the output: what was left out, or taken in one of two ways."""
    print("note: " + in_short(" ".join(text.splitlines())), file=sys.stderr)


def in_short(text, limit=500):
    """A message of any length as one that can be read: a wrong value may be megabytes long. What to do stands last."""
    return text if len(text) <= limit else f"{text[:limit - 205]} ... {text[-200:]}"


def quiet_interrupt(kind, error, traceback):
    """Ctrl-C before `cli` has begun: while PyTorch is imported, which is why scripts import this file before it."""
    if issubclass(kind, KeyboardInterrupt):
        print("error: interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


sys.excepthook = quiet_interrupt


def keep_memory():
    """Let the C library keep freed memory for the next tensor, instead of giving each large block back to the system
    and having it zeroed again, page by page. Only glibc has it."""
    tune = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if tune:
        tune(-4, 0)    # M_MMAP_MAX: no block is a mapping of its own
        tune(-1, -1)   # M_TRIM_THRESHOLD: nothing is given back


def announce(text, began=time.perf_counter()):
    """Print a heading, with the seconds since the command started."""
    print(f"\n[{time.perf_counter() - began:4.0f} s] {text}", flush=True)


def first_line(error):
    """What an exception says, on one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]


# ----------------------------------------------------------------------------------------------------------------
# Options


def option(default, help, low=None, high=None, choices=None, free=False):
    """A field of a dataclass of options. low, high: the range of a number, both included. free: a resumed run may
    change it, because it decides how fast a run goes or what it tells, and not what comes out."""
    return dataclasses.field(default=default, metadata=dict(help=help, low=low, high=high, choices=choices, free=free))


def make_parser(doc):
    """An argument parser whose help is a module's docstring: its first line above the options, the rest below."""
    first, _, rest = doc.partition("\n")
    return argparse.ArgumentParser(description=first, epilog=rest.strip("\n"),
                                   formatter_class=argparse.RawDescriptionHelpFormatter)


def number(kind, low=None, high=None):
    """A `type` for argparse: an int or a float from low to high; NaN is in no range."""
    def parse(text):
        value = kind(text)
        low_enough, high_enough = low is None or value >= low, high is None or value <= high
        if not (low_enough and high_enough and value == value):
            wanted = {(True, True): "a number", (False, True): f"at least {low}", (True, False): f"at most {high}",
                      (False, False): f"from {low} to {high}"}[low is None, high is None]
            raise argparse.ArgumentTypeError(f"{text} must be {wanted}")
        return value
    parse.__name__ = kind.__name__  # what argparse calls it in "invalid int value"
    return parse


def add_options(parser, Options, leave_out=(), **defaults):
    """Add a flag for each field of the dataclass Options but those to leave out; `defaults` replace the fields' own.
    What is not given parses as None: read_options puts the default in its place."""
    for field in dataclasses.fields(Options):
        if field.name in leave_out:
            continue
        about, flag, default = field.metadata, flag_of(field.name), defaults.get(field.name, field.default)
        text = about["help"].replace("%", "%%")  # argparse would take it for a place to fill in
        shared = dict(default=None, help=f"{text} (default {'none' if default in ('', None) else default})")
        if field.type is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **shared)
        elif about["choices"]:
            parser.add_argument(flag, choices=about["choices"], **shared)
        else:
            parser.add_argument(flag, type=number(field.type, about["low"], about["high"]),
                                metavar=field.type.__name__.upper(), **shared)


def flag_of(name):
    return "--" + name.replace("_", "-")


def refuse_given(parser, args, names, why):
    """An error for an option among `names` that was given, because it would not be heeded."""
    for name in sorted(names):
        if getattr(args, name, None) is not None:
            parser.error(f"{flag_of(name)} {why}")


def read_options(Options, args, **defaults):
    """The dataclass Options filled from parsed arguments; `defaults` as for add_options."""
    given = {field.name: getattr(args, field.name, None) for field in dataclasses.fields(Options)}
    return Options(**{**defaults, **{name: value for name, value in given.items() if value is not None}})


def lasting(options):
    """{name: value} of the options that a resumed run must have in common with the one that it continues."""
    return {field.name: getattr(options, field.name) for field in dataclasses.fields(options)
            if not field.metadata["free"]}


# ----------------------------------------------------------------------------------------------------------------
# Files that are there whole or not at all


def write_whole(path, write):
    """Call write(aside) and then rename aside to path: a reader never sees half a file, and after any error what was
    there before is still there, and nothing else. UserError while another process writes it."""
    path = Path(os.path.realpath(path))  # a link stays one
    aside = Path(f"{path}.tmp")
    with locked(aside):
        try:
            mode = aside.stat().st_mode
            write(aside)
            aside.chmod(mode)  # safetensors makes files that nobody else may read
            with open(aside, "rb") as file:
                os.fsync(file.fileno())  # on the disk before its name is, if the power fails
            os.replace(aside, path)
        except BaseException as error:
            aside.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.filename is None:  # a full disk does not say which file
                error.filename = str(path)
            raise


def write_text(path, text):
    """Write a text file; half a surrogate pair, which UTF-8 cannot hold, becomes a question mark."""
    write_whole(path, lambda aside: aside.write_text(text, encoding="utf-8", errors="replace"))


def write_jsonl(path, rows):
    """Write rows as JSON Lines, gzipped if the path ends in .gz; returns how many."""
    path, count = Path(path), 0
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: is no ordinary file; choose another --out")

    def write(aside):
        nonlocal count
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(aside, "wt", encoding="utf-8", errors="replace", newline="\n") as file:
            for count, row in enumerate(rows, 1):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    write_whole(path, write)
    return count


def check_out(out, inputs):
    """UserError now, rather than after hours, for an output file that could not be put in place, or is an input."""
    if Path(out).exists() and not Path(out).is_file():
        raise UserError(f"{out}: is no ordinary file; choose another --out")
    for path in (Path(path) for path in inputs if path):
        if path.exists() and any(made.exists() and made.samefile(path) for made in (Path(out), Path(f"{out}.part"))):
            raise UserError(f"{out}: is an input too ({path}); choose another --out")


def locked(path):
    """The file at path, opened to read and append bytes, and locked until it is closed or the process ends. UserError
    while another process has it so."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = open(path, "ab+")
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise UserError(f"{path}: another process is writing it; wait until it has ended, or choose another "
                            "--out") from None
        except OSError:
            pass  # a file system that knows no locks
        if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
            return file
        file.close()  # the other process has just finished with it, and removed it


# ----------------------------------------------------------------------------------------------------------------
# What decides a result: seeds, and checksums of content, files and code


def seed_from(*parts):
    """A seed made of ints and texts: the same for the same ones, on any machine and Python; for others, another."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")


def digest(*content):
    """A checksum (text) of values that JSON can hold: equal for equal content, in any process and version."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def file_digest(path):
    """A checksum (text) of a file's bytes. Gigabytes take seconds: of a file that stays as it is, it is made once."""
    there = os.stat(path)
    return known_digest(os.path.realpath(path), there.st_ino, there.st_size, there.st_mtime_ns)


@functools.cache
def known_digest(path, *version):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.cache
def code_of(script, folder=Path(__file__).parent):
    """{name: checksum} of a script of this folder and of all those that it imports, directly or not. Docstrings, empty
    lines and those with nothing but a comment make no difference."""
    found, waiting = {}, [script]
    while waiting:
        path = folder / f"{waiting.pop()}.py"
        if path.stem in found or not path.exists():
            continue
        text, docstrings = path.read_text(encoding="utf-8"), set()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                waiting += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                waiting.append(node.module)
            elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                docstrings.update(range(node.lineno, node.end_lineno + 1))
        kept = [line.rstrip() for number, line in enumerate(text.splitlines(), 1)
                if line.strip() and not line.lstrip().startswith("#") and number not in docstrings]
        found[path.stem] = digest(kept)
    return found
