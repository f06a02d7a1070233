"""Files of records: JSON Lines, JSON, CSV and Parquet, told apart by their content, gzipped or not.

From top to bottom: lines; records; how a message quotes a wrong value; a record's fields. Whatever cannot be read is a
UserError, with file and line. What the records mean is formats.py's business.
"""
import csv
import functools
import gzip
import itertools
import json
import os
import re
import sys
import zlib
from pathlib import Path

from common import UserError, first_line, note


# ----------------------------------------------------------------------------------------------------------------
# Lines and records


def lines(path):
    """Yield (line number, text) of a UTF-8 file, gzipped or not (its first bytes tell). Raises UserError."""
    number = 0
    try:
        with open(path, "rb") as raw:
            stream = gzip.open(raw) if raw.peek(2)[:2] == b"\x1f\x8b" else raw
            for number, line in enumerate(stream, 1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{number}: byte {error.start + 1} of the line is not UTF-8; "
                        "convert the file to UTF-8") from None
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise UserError(f"{path}: the gzip data is damaged or cut off after line {number}; "
                        "get the file again") from None
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check the path") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; give a file in it") from None


def parse_json(text, path, line=None):
    """The value of a JSON text, which is a line of a file or (None) all of it. Raises UserError."""
    try:
        value = json.loads(text)
        if "\\ud" in text.lower():  # half of a surrogate pair is no character: it becomes U+FFFD
            halves = json.dumps(value, ensure_ascii=False).encode("utf-16", "surrogatepass")
            value = json.loads(halves.decode("utf-16", "replace"))
        return value
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{line or error.lineno}: invalid JSON at column {error.colno} ({error.msg}); "
                        "mend or remove the line") from None
    except (RecursionError, ValueError):
        raise UserError(f"{path}:{line or 1}: JSON too deep or with a number too long; remove it") from None


def read_json(path):
    return parse_json("".join(text for _, text in lines(path)), path)


def first_and_all(iterator, path):
    """(the first item, an iterator over all of them); UserError if there is none."""
    for first in iterator:
        return first, itertools.chain([first], iterator)
    raise UserError(f"{path}: no data in it (empty, or nothing below a header); give a file with records")


def records(path):
    """Yield (where, dict) for each record of a JSON Lines file, a JSON list, a CSV or a Parquet file, told by content.
    where: "path:line", for messages. Raises UserError for a file that is broken."""
    if is_parquet(path):
        yield from parquet_records(path)
        return
    first, source = first_and_all(((number, text) for number, text in lines(path) if text.strip()), path)
    mark = first[1].lstrip()[0]
    if mark not in "{[":
        yield from csv_records(path)
        return
    if mark == "{":
        located = ((f"{path}:{number}", parse_json(text, path, number)) for number, text in source)
    else:
        located = ((f"{path}: item {number}", item) for number, item in enumerate(read_json(path), 1))
    for where, record in located:
        if not isinstance(record, dict):
            raise UserError(f"{where}: expected an object {{...}}, found {kind(record)}; mend or remove it")
        yield where, record


def is_parquet(path):
    if not Path(path).is_file():  # a pipe can be read only once
        return False
    with open(path, "rb") as file:
        return file.read(4) == b"PAR1"


def parquet_records(path):
    """Yield (where, dict of plain Python values) for each row of a Parquet file. where: "path: row N"."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UserError(f"{path}: is a Parquet file; install pyarrow to read it, or convert it to JSON Lines") from None
    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches():
            for record in batch.to_pylist():
                number += 1
                yield f"{path}: row {number}", record
    except (ArrowException, OSError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: damaged after row {number} ({shorten([first_line(error)])}); get it again") from None


OURS = "prompt,original,aligned,objectives,golden"  # the header of what align.py writes, without any escapes


def csv_records(path):
    if not Path(path).is_file():
        raise UserError(f"{path}: CSV cannot be read from a pipe; give a file, or JSON Lines")
    csv.field_size_limit(sys.maxsize)  # by default, an answer of more than 131,072 characters is refused
    there = os.stat(path)
    escape = "\\" if escapes_backslashes(path, there.st_ino, there.st_size, there.st_mtime_ns) else None
    reader = csv.reader((text for _, text in lines(path)), escapechar=escape, strict=True)
    header, line = None, 1
    try:
        for cells in reader:
            if header is None and cells:
                header = cells
                if len(set(header)) < len(header):
                    raise UserError(f"{path}:{line}: the header ({shorten(header)}) has a column twice; rename one")
            elif cells and len(cells) != len(header):
                raise UserError(f"{path}:{line}: {len(cells)} cells, but the header ({shorten(header)}) has "
                                f"{len(header)}; mend the row (is a quote missing?)")
            elif cells:
                yield f"{path}:{line}", dict(zip(header, cells))
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}:{line}: invalid CSV ({error}); mend the row that begins there") from None


@functools.cache
def escapes_backslashes(path, *version):
    r"""Whether a CSV file was written with the backslash as escape character (pandas: escapechar="\\"): then each one
    stands there twice. Some of MetaAligner's published outputs were written without: a single "\_" or "\(" gives them
    away, and to unescape them would change their text or break their rows. Of a file that is read again, and has not
    changed, this is known, and its note is told."""
    pattern = re.compile(r'(?<!\\)(?:\\\\)*\\(?![\\"])')
    single = doubled = None  # the first lines with such
    for number, text in lines(path):
        if number == 1 and text.strip() == OURS:
            return False
        if "\\" in text:
            single = single or pattern.search(text) and number
            doubled = doubled or "\\\\" in text and number
    if single and doubled:
        note(f"{path}: backslashes stay as they are, as line {single} has a single one; two (line {doubled}) stay two")
    return not single


# ----------------------------------------------------------------------------------------------------------------
# Values: how a message quotes a wrong one, and those that are as they should be


def kind(value):
    names = {str: "a text", dict: "an object", list: "a list", type(None): "nothing", bool: "true or false"}
    return names.get(type(value)) or shown(value)


def shown(value):
    """A wrong value as a message can quote it."""
    return kind(value) if isinstance(value, (dict, list)) else shorten([repr(value)])


def shorten(names, limit=100):
    text = ", ".join(str(name) for name in names)
    begin = "".join(character if character.isprintable() else " " for character in text[:limit])
    return begin if len(text) <= limit else begin + "..."


def field(record, key, where, wanted=str):
    """record[key], if it is there and of the wanted type; else UserError."""
    value = record.get(key)
    if not isinstance(value, wanted):
        raise UserError(f"{where}: {key!r} should be {kind(wanted())}, found {kind(value)}; mend or remove it")
    return value


def objects(record, key, where):
    """record[key], if it is a list of objects; else UserError."""
    value = field(record, key, where, list)
    for item in value:
        if not isinstance(item, dict):
            raise UserError(f"{where}: {key!r} should hold objects, found {kind(item)}; mend or remove it")
    return value
