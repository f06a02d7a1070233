"""How a command starts, reads its options, fails, and writes whole files: what every script here begins with.

    if __name__ == "__main__":
        cli(main)

Options are said once: a field of a dataclass carries its default, its help, what values it may have, and whether a
resumed run may change it. The command line (`add_options`), the check of ranges, and the check of a resumed run
(`lasting`) are all made of it.
"""
import argparse
import ctypes
import dataclasses
import errno
import gzip
import hashlib
import json
import os
import sys
import time
from pathlib import Path


class UserError(Exception):
    """Something the user can put right. The message says what, where and what to do, in one line."""


# ----------------------------------------------------------------------------------------------------------------
# Starting and failing


def cli(main):
    """Run a script's main(). What the user or the machine is to blame for becomes one line and status 2."""
    keep_memory()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
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
    except KeyboardInterrupt:
        stop("interrupted", status=130)


def stop(message, status=2):
    print("error: " + " ".join(message.splitlines()), file=sys.stderr)
    sys.exit(status)


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
        shared = dict(default=None, help=f"{text} (default {'none' if default == '' else default})")
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
    there before is still there, and nothing else."""
    path, aside = Path(path), Path(f"{path}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        aside.touch()
        mode = aside.stat().st_mode
        write(aside)
        aside.chmod(mode)  # safetensors makes files that nobody else may read
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
    """UserError now, rather than after hours, for an output file that could not be put in place."""
    if Path(out).exists() and not Path(out).is_file():
        raise UserError(f"{out}: is no ordinary file; choose another --out")
    if Path(out).resolve() in [Path(path).resolve() for path in inputs]:
        raise UserError(f"{out}: is an input too; choose another --out")


def seed_from(*parts):
    """A seed made of ints and texts: the same for the same ones, on any machine and Python; for others, another."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")


def digest(*content):
    """A checksum (text) of values that JSON can hold: equal for equal content, in any process and version."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
