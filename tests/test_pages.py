"""DATA.md says what is so: every format stands there, and becomes what is written."""
import json
import re

import pytest

import formats
from conftest import ROOT, write

PAGE = (ROOT / "DATA.md").read_text(encoding="utf-8")
BLOCKS = [[json.loads(line) for line in block.splitlines()] for block in re.findall(r"```json\n(.*?)\n```", PAGE, re.S)]


@pytest.mark.parametrize("record, row", BLOCKS, ids=[" ".join(record) for record, _ in BLOCKS])
def test_a_record_becomes_the_row_that_is_written_below_it(tmp_path, record, row):
    found, = formats.read_rated(write(tmp_path / "helpful-base.jsonl", record), None)
    assert found == row


def test_every_format_stands_on_the_page():
    told = [next(convert for _, keys, convert in formats.FORMATS if keys <= set(record)) for record, _ in BLOCKS]
    missing = {name for name, _, convert in formats.FORMATS if convert not in told}
    assert missing == {"queries"} and "or `query`" in PAGE  # the same as prompts


def test_what_data_py_shows_of_the_page_is_understood():
    """Objectives as they are written there."""
    from objectives import find_objectives
    found, = find_objectives(["Name: text | another wording"])
    assert (found.name, found.description, found.wordings) == ("Name", "text", ("another wording",))
