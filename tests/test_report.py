"""Word diffs, tables, charts and pages."""
import os
import random
import re
import time
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest

from objectives import Objective
from eval import evaluate, exact_judge, exact_room
from report import (CHART_STYLE, DARK, LIGHT, STYLE, ansi_diff, bar_chart, line_chart, pick_examples, print_table,
                    short, table_text, visible, word_diff, write_report, write_svg)
from test_eval import HIGH, row, score

TEXTS = ["", "one", "The cat sat.", "The dog sat down,\n\nthen  it slept. ", "  <b>bold</b> & \"x\"",
         "a b a b a c", "été 猫"]


@pytest.mark.parametrize("before", TEXTS)
@pytest.mark.parametrize("after", TEXTS)
def test_word_diff_holds_both_texts(before, after):
    pieces = word_diff(before, after)
    assert "".join(text for op, text in pieces if op != "+") == before
    assert "".join(text for op, text in pieces if op != "-") == after
    assert all(text for _, text in pieces)
    coloured = ansi_diff(before, after)
    assert re.sub(r"\033\[31m.*?\033\[0m|\033\[\d+m", "", coloured, flags=re.DOTALL) == after


def test_word_diff_keeps_what_is_common():
    assert word_diff("You are wrong, sir.", "You are right, sir.") == [
        (" ", "You are "), ("-", "wrong"), ("+", "right"), (" ", ", sir.")]
    assert word_diff("a b c", "a b c d") == [(" ", "a b c"), ("+", " d")]
    many = "word another. " * 7000
    began = time.perf_counter()
    assert word_diff(many, many + "end") == [(" ", many), ("+", "end")]
    assert [op for op, _ in word_diff("a " + many, "b another " + many)] == ["-", "+", " "]
    assert [op for op, _ in word_diff("a " + many + "b", "b " + many + "a")] == ["-", "+"]
    generator = random.Random(0)
    word_diff(*(" ".join(generator.choice("ab") for _ in range(1200)) for _ in range(2)))
    assert time.perf_counter() - began < 5


class Page(HTMLParser):
    """What a browser would see: tags, attributes and text, and the texts of ins and del."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self.marked, self.open = set(), [], "", [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += attributes
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert tag in self.open, f"</{tag}> closes nothing"
        while self.open.pop() != tag:
            pass

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] in ("ins", "del"):
            self.marked.append((self.open[-1], data))


def test_report_is_one_safe_page(tmp_path):
    evil = '<script>alert("x")</script><img src=http://example.org/a.png>'
    rows = [{"prompt": f"\n\nHuman: {evil}\n\nAssistant:", "original": f"1 {evil} old",
             "aligned": f"2 {evil} new", "golden": "1", "objectives": [str(Objective(f"high {evil}", evil))]}]
    rows.append({**rows[0], "prompt": "other"})
    result = evaluate(rows, None, exact_judge(score), progress=False)
    examples = {evil: pick_examples(rows, result)}
    assert len(examples[evil]) == 2
    path = tmp_path / "new folder" / "report.html"
    figures = [("A figure", "<svg></svg>")]
    write_report(path, {evil: result, "other": result}, examples, evil, evil, figures)
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert not page.tags & {"script", "img", "link", "iframe"} and "src" not in dict(page.attributes)
    assert "url(" not in text and "@import" not in text
    assert page.text.count(evil) >= 4  # the title, the heading, the prompt, the objective, all as plain text
    assert page.marked[:4] == [("del", "1"), ("ins", "2"), ("del", "old"), ("ins", "new")]
    assert "A figure" in page.text and {"svg", "ins", "del", "table", "rect"} <= page.tags
    assert os.listdir(path.parent) == ["report.html"]


def test_half_surrogates_do_not_stop_a_report(tmp_path):
    rows = [row(1, 2, 1, "a \ud800"), row(1, 2, 1, "b")]
    result = evaluate(rows, None, exact_judge(score), progress=False)
    examples = {"p": pick_examples(rows, result)}
    assert len(examples["p"]) == 2
    write_report(tmp_path / "r.html", {"p": result}, examples, "t")
    assert "a ?" in (tmp_path / "r.html").read_text(encoding="utf-8")


EVIL = "a\x1b[2J\x9b1m\x00\x07\x7f\x08 naïve\xa0猫 \u200d\tb\r\nc\rd"
TAME = "a\ufffd[2J\ufffd1m\ufffd\ufffd\ufffd\ufffd naïve\xa0猫 \u200d\tb\nc\nd"


def test_control_characters_reach_no_terminal_and_no_page(tmp_path, capsys):
    assert visible(EVIL) == TAME
    assert re.sub(r"\x1b\[\d+m", "", ansi_diff(f"x {EVIL}", f"x {EVIL} y")) == f"x {TAME} y"
    shown = re.sub(r"\x1b\[\d+m", "", ansi_diff("x", EVIL) + ansi_diff(EVIL, "x"))
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", shown)
    rows = [row(1, f"2 {EVIL}", 1, f"{number} {EVIL}", [Objective(f"odd\n{EVIL}", EVIL)]) for number in range(2)]
    result = evaluate(rows, None, exact_judge(score), progress=False)
    print_table({f"policy {EVIL}": result})
    write_report(tmp_path / "r.html", {EVIL: result}, {EVIL: pick_examples(rows, result)}, EVIL, EVIL, [(EVIL, "")])
    write_svg(tmp_path / "r.svg", bar_chart([(EVIL, [(0, 1, "after")], None, EVIL)], 0, 1, EVIL), EVIL)
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    table = capsys.readouterr().out
    for text in (table, page, (tmp_path / "r.svg").read_text(encoding="utf-8")):
        assert TAME[:17] in text and not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", text)
    assert Page(page).text.count(TAME) >= 8
    ElementTree.parse(tmp_path / "r.svg")
    assert re.findall("^(.*)-> 9$", table, re.MULTILINE)[0].startswith("  odd a"), "a line end in a name ends no line"


def test_examples_are_rows_that_changed():
    rows = [row(number, number + (number % 2), prompt=str(number)) for number in range(20)]
    result = evaluate(rows, None, exact_judge(score), progress=False)
    examples = pick_examples(rows, result, count=4, seed=1)
    assert len(examples) == 4 and all(int(example["prompt"]) % 2 for example in examples)
    assert examples == pick_examples(rows, result, count=4, seed=1)
    assert {example["verdicts"]["high"]["aligned original"] for example in examples} == {1.0}


def test_table_fits_a_terminal():
    long = Objective("an_objective_with_a_very_long_name_indeed", "x")
    rows = [row(1, 2, 2, str(n), [long]) for n in range(4)] + [row(2, 1, 1, str(n), [HIGH]) for n in range(4)]
    room = exact_room(score, lambda name: 9)
    result = evaluate(rows, None, exact_judge(score), progress=False, room=room)
    figures = result["objectives"]["high"]
    figures.update(n=15000, win_rate_original=100.0, win_rate_aligned=100.0, gain=-100.0,
                   gain_interval=[-100.0, -100.0], words={"original": 1234, "aligned": 1234})
    lines = table_text({"policy": result}).splitlines()
    assert max(map(len, lines)) <= 110
    assert any(re.search(r"high +15000 +100.0 -> 100.0 +-100.0 \[-100.0, -100.0\]", line) for line in lines)


def test_half_surrogates_do_not_stop_a_table(capsys):
    rows = [row(1, 2, 1, str(number), [Objective("odd \ud800", "x")]) for number in range(2)]
    print_table({"policy \udcff": evaluate(rows, None, exact_judge(score), progress=False)})
    shown = capsys.readouterr().out
    shown.encode("utf-8")
    assert "policy ? (2 edits)" in shown and re.search(r"odd \? +2 +50.0 -> 100.0", shown)


def test_a_line_chart_stands_where_its_figures_are():
    """The plot is 700 wide from 60 on, and 270 high down to 290; what begins far above the rest is cut off."""
    lines = [(0, "faint", [(1, 100.0), (50, 4.0), (100, 2.0)], []),
             (1, "line", [(0, 3.0), (100, 3.0)], [(0, 2.5, 3.5), (100, 2.0, 400.0)])]
    root = ElementTree.fromstring(line_chart(lines, "tokens <x>", "loss"))
    low, high = 2 - 0.05 * 2, 4 + 0.15 * 2
    faint, line = root.findall("polyline")

    def spots(element):
        return [tuple(map(float, pair.split(","))) for pair in element.get("points").split()]

    def up(y):
        return pytest.approx(290 - 270 * (y - low) / (high - low), abs=0.06)
    assert spots(faint) == [(67, 20), (410, up(4)), (760, up(2))]
    assert spots(line) == [(60, up(3)), (760, up(3))]
    assert spots(root.find("polygon")) == [(60, up(3.5)), (760, 20), (760, up(2)), (60, up(2.5))]
    assert line.get("stroke") != faint.get("stroke") and len(root.findall("circle")) == 2
    texts = [text.text for text in root.findall("text")]
    assert texts[5:] == ["0", "25", "50", "75", "100", "tokens <x>"] and float(texts[0]) == pytest.approx(low, abs=0.01)
    for flat in ([(0, 1.0)], [(5, 0.0), (6, 0.0)]):  # one point, no height
        ElementTree.fromstring(line_chart([(0, "line", flat, [])], "x", "y"))
    assert [short(n) for n in (0, 7, 1234, 1_572_448, 2e9)] == ["0", "7", "1.23k", "1.57M", "2G"]


def test_what_was_asked_is_said_and_what_nobody_asked_stands_apart(tmp_path):
    intact = Objective("intact", "every sentence makes sense")
    rows = [{**row(1, 2, 1, str(n), [HIGH, intact])} for n in range(3)]
    result = evaluate(rows, None, exact_judge(lambda name, prompt, text: score("high", prompt, text)), progress=False)
    assert set(result["objectives"]) == {"high", "intact"}
    result["kept"] = {"mean": 73.6}
    lines = table_text({"policy": result}).splitlines()
    assert "policy (3 edits, 74 % of their sentences survive)" in lines
    assert any(line.startswith("  beside them: intact") for line in lines)
    write_report(tmp_path / "r.html", {"p": result, "q": result}, {"p": pick_examples(rows, result)}, "t")
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.text.count(f"asked for: {HIGH.description}") == 3 and "every sentence" not in page.text
    assert "74 % of their sentences survive" in page.text
    chart = text[text.index("<svg"):text.index("</svg>")]
    assert ">high<" in chart and ">intact<" not in chart
    assert page.text.index("Judged beside them; nobody asked for it") < page.text.index("intact")


def test_every_colour_has_a_light_and_a_dark_shade():
    assert set(re.findall(r"var\(--([\w-]+)\)", STYLE + CHART_STYLE)) == set(LIGHT) == set(DARK)


def test_a_chart_as_a_file_of_its_own(tmp_path):
    lines = [("fir <&> st", [(50, 75, "before"), (50, 20, "after")], (10, 30), "20.0 [10, 30]"),
             ("second", [(50, 400, "after")], None, "beyond the axis")]
    path = tmp_path / "new folder" / "chart.svg"
    write_svg(path, bar_chart(lines, 0, 100, "points"), "How <good> is it?")
    text = path.read_text(encoding="utf-8")
    root = ElementTree.fromstring(text)
    namespace = "{http://www.w3.org/2000/svg}"
    found = {tag: list(root.iter(namespace + tag)) for tag in ("svg", "title", "style", "rect", "text", "path", "line")}
    assert root.tag == namespace + "svg" and len(found["svg"]) == 2
    assert len(list(root.iter())) == sum(map(len, found.values()))  # nothing else, and all in the namespace
    background, *bars = found["rect"]
    assert background.get("fill") == "#ffffff" and float(background.get("rx")) > 0
    # the axis is 440 wide and begins at 200
    assert [(bar.get("class"), float(bar.get("x")), float(bar.get("width"))) for bar in bars] == [
        ("before", 420, 110), ("after", 288, 132), ("after", 420, 220)]
    assert len(found["path"]) == 1 and found["path"][0].get("d").startswith("M244.0 ")
    texts = [text.text for text in found["text"]]
    assert texts == ["How <good> is it?", "0", "25", "50", "75", "100", "fir <&> st", "20.0 [10, 30]", "second",
                     "beyond the axis"]
    assert found["title"][0].text == "How <good> is it?"
    # it depends on nothing: no page's variables, no other file
    style = found["style"][0].text
    assert LIGHT["after"] in style and all(f".{line.get('class')} " in style for line in found["line"] + bars)
    assert "var(" not in text and "url(" not in text and "href" not in text
    # the chart lies inside the card
    _, _, width, height = map(float, root.get("viewBox").split())
    x, y, inner_width, inner_height = (float(found["svg"][1].get(name)) for name in ("x", "y", "width", "height"))
    assert x + inner_width <= width and y + inner_height <= height
    assert os.listdir(path.parent) == ["chart.svg"]
