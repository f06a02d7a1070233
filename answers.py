"""Answers that are to be edited, read as a stream from files of any form; edits, written whole.

An aligner's input may be larger than memory: `Items` reads the files anew each time that one goes through it, a part of
them for each process of a cluster, and `windows` hands out some thousand rows at a time.
"""
import argparse
import csv
import hashlib
import itertools
import json
from collections import Counter
from pathlib import Path

from common import UserError, note, write_jsonl, write_whole

import formats
from objectives import OBJECTIVES, find_objectives

DEFAULT = ["harmless", "helpful"]  # objectives, where neither the user nor a row names any
COLUMNS = ("prompt", "original", "aligned", "objectives", "golden")
JOINT = " | "  # between the objectives in a cell of a CSV file
WINDOW = 4096  # rows in memory at a time: many batches, so that sorting them by length still pays


def shard(text):
    """(I, N) of the text "I/N"."""
    first, _, step = text.partition("/")
    if not (first.isdecimal() and step.isdecimal() and int(first) < int(step)):
        raise argparse.ArgumentTypeError(f"{text} must be I/N, such as 0/8 to 7/8 for eight processes")
    return int(first), int(step)


class Items:
    """One item per answer of the files (or per prompt, where there is none): {"index", "prompt", "original"?,
    "golden"?, "objectives": texts}. It can be gone through any number of times.

    objectives: Objectives for every item; None: each row's own, or DEFAULT. limit: of all rows, the first so many.
    shard: (i, n), of these only the rows i, i + n, i + 2n, ...
    After each time, `count` tells how many items there were, `unanswered` how many without an "original", `unheeded`
    how many with objectives that are not heeded, `ambiguous` how many whose objectives no CSV file can hold, `skipped`
    which rows were left out and why, and `digest` what all of it was."""

    def __init__(self, paths, objectives=None, queries=None, limit=None, shard=None):
        self.paths, self.objectives, self.queries, self.limit, self.shard = paths, objectives, queries, limit, shard
        self.shared = objectives or find_objectives(DEFAULT)
        self.held = None  # what came through a pipe, which can be read only once

    def __iter__(self):
        self.count = self.unanswered = self.unheeded = self.ambiguous = 0
        if self.held is None:
            self.skipped = Counter()
            if any(Path(path).is_fifo() for path in self.paths):
                self.held = list(self.rows())
        content = hashlib.sha256()
        for index, (where, row, response) in self.rows() if self.held is None else self.held:
            item = self.item(index, where, row, response)
            self.count += 1
            self.unanswered += response is None
            self.unheeded += bool(row.get("objectives") and self.objectives)
            self.ambiguous += JOINT.join(item["objectives"]).split(JOINT) != item["objectives"]
            content.update(json.dumps(item).encode() + b"\n")
            yield item
        self.digest = content.hexdigest()

    def rows(self):
        """Pairs (index, (where, row, response or None)) of the shard's part of the files."""
        answers = ((where, row, response) for path in self.paths
                   for where, row in formats.located_rated(path, "chosen", self.queries, self.skipped)
                   for response in row["responses"] or [None])
        first, step = self.shard or (0, 1)
        return itertools.islice(enumerate(itertools.islice(answers, self.limit)), first, None, step)

    def item(self, index, where, row, response):
        own = None if self.objectives else row.get("objectives")
        told = own_objectives(own, where) if own else self.shared
        item = {"index": index, **{key: row[key] for key in ("prompt", "golden") if key in row},
                "objectives": [str(objective) for objective in told]}
        return item if response is None else {**item, "original": response["text"]}


def windows(items, size=None):
    """Lists of at most `size` neighbouring items (None: WINDOW)."""
    items = iter(items)
    while window := list(itertools.islice(items, size or WINDOW)):
        yield window


def asked_for(texts):
    """The Objectives in texts, as find_objectives takes them. UserError for one in several wordings of the user's own:
    an edit is asked for in one."""
    found = find_objectives(texts)
    for objective in found:
        if objective.wordings and objective != OBJECTIVES.get(objective.name):
            raise UserError(f"objective {objective.name!r} has several wordings, with ' | ' between them; give one")
    return found


def own_objectives(texts, where):
    """The Objectives that a row names, in texts as on the command line, but for files. Raises UserError."""
    try:
        if any(text.endswith(".json") for text in texts):
            raise UserError('a row names no file of objectives; write "Name: description" there')
        return asked_for(texts)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def check(items, out, policy):
    """Go through Items once: UserError now, rather than after hours, for what cannot be read, edited or written."""
    for _ in items:
        pass
    if not items.count and not items.shard:
        raise UserError(f"{items.paths[0]}: no rows to align")
    if out.endswith(".csv") and items.ambiguous:
        raise UserError(f"{out}: no CSV file can hold objectives with {JOINT!r} in them; give --out FILE.jsonl")
    if items.unanswered and not policy:
        raise UserError(f"{items.paths[0]}: {items.unanswered} prompts have no answer; give --policy FOLDER_OR_URL, "
                        "whose answers are to be edited")
    if items.unheeded:
        note(f"{items.unheeded} of {items.count} answers come with objectives of their own; --objectives is used "
             "instead")
    if Path(out).exists():
        note(f"{out}: exists already; it is replaced when all is done")


def finished(items, content, journal, told):
    """Yield the rows of the output: the items that have an edit. told: a Counter, learns what became of them. content:
    the digest that the items had when they were edited."""
    for item in items:
        row = {**item, **journal.rows.get(item["index"], {})}
        if "aligned" in row:
            told.update(rows=1, changed=row["aligned"] != row["original"], kept=row.get("left_as_is", False),
                        empty=not row["aligned"].strip() and bool(row["original"].strip()))
            yield {key: row[key] for key in COLUMNS if key in row}
    if items.digest != content:
        raise UserError(f"{items.paths[0]}: it, or another file of --data, has changed since the edits began; delete "
                        f"{journal.path} and begin again")


def write_rows(path, rows):
    """JSONL, or CSV with the objectives joined by JOINT in one cell; whole or not at all."""
    if not str(path).endswith(".csv"):
        write_jsonl(path, rows)
        return

    def write(aside):
        with open(aside, "w", encoding="utf-8", errors="replace", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, restval="", extrasaction="ignore")
            writer.writeheader()
            writer.writerows({**row, "objectives": JOINT.join(row["objectives"])} for row in rows)
    write_whole(path, write)
