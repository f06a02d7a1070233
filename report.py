"""Reports: word diffs, tables, charts and self-contained pages of what `eval.evaluate` found."""
import difflib
import html
import math
import os
import random
import re

import numpy

from common import write_text
from objectives import row_objectives

# ----------------------------------------------------------------------------------------------------------------
# Texts of others, to be shown

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufffe\uffff]")  # all but tab and line feed


def visible(text):
    """A text without control characters, which could clear a terminal or break a page: each becomes U+FFFD."""
    return CONTROL.sub("\ufffd", re.sub("\r\n?", "\n", text))


def escape(text):
    """A text as HTML or SVG."""
    return html.escape(visible(text))


# ----------------------------------------------------------------------------------------------------------------
# Word diffs


def in_common(old, new):
    """How many sentences of a list stand in another in the same order, at most."""
    longest = [0] * (len(new) + 1)
    for sentence in old:
        before = list(longest)
        for place, other in enumerate(new):
            longest[place + 1] = before[place] + 1 if sentence == other else max(before[place + 1], longest[place])
    return longest[-1]


def word_diff(before, after):
    """[(op, text), ...] with op " " (kept), "-" (taken out) or "+" (put in), by words: the kept and taken-out texts
    joined are `before`, the kept and put-in ones `after`. Where more than 5,000 words and spaces lie between the
    texts' common beginning and end, these are one change: to compare them would take minutes."""
    old, new = (re.findall(r"\w+|\s+|[^\w\s]", text) for text in (before, after))
    start = len(os.path.commonprefix([old, new]))
    end = len(os.path.commonprefix([old[start:][::-1], new[start:][::-1]]))
    head, tail = "".join(old[:start]), "".join(old[len(old) - end:])
    old, new = old[start:len(old) - end], new[start:len(new) - end]
    pieces, removed, added = [(" ", head)], "", ""
    size = max(len(old), len(new))
    matcher = difflib.SequenceMatcher(str.isspace, old, new, autojunk=size > 1000)
    codes = matcher.get_opcodes() if size <= 5000 else [("replace", 0, len(old), 0, len(new))]
    for tag, old_start, old_end, new_start, new_end in codes:
        left, right = "".join(old[old_start:old_end]), "".join(new[new_start:new_end])
        if tag == "equal" and not (removed and added and len(left.split()) < 2):
            pieces += [("-", removed), ("+", added), (" ", left)]
            removed = added = ""
        else:  # a change; one kept word between two changes reads better as part of them
            removed, added = removed + left, added + right
    pieces += [("-", removed), ("+", added), (" ", tail)]
    return [(op, text) for op, text in pieces if text]


def ansi_diff(before, after):
    """The word diff for a terminal: what was taken out in red, what was put in in green. Of both texts what `visible`
    leaves."""
    colour = {"-": "\033[31m{}\033[0m", "+": "\033[32m{}\033[0m", " ": "{}"}
    return "".join(colour[op].format(visible(text)) for op, text in word_diff(before, after))


# ----------------------------------------------------------------------------------------------------------------
# Figures as texts, and the table for a terminal

APART = ("intact",)  # what is judged beside the objectives: nobody asks for it
COLUMNS = ("n", "win rate", "gain [95% interval]", "net", "room: net", "words")
WIDTHS = (5, 14, 23, 6, 12, 11)

LEGEND = """

win rate: the policy's own -> the aligned answers, against the golden ones, wins + ties/2; gain: its change in
points; net: wins - losses of the aligned against the policy's own; room: how many of the policy's own could
be better, and the net among them; words: mean length; survive: sentences of the policy's own that stand in
the aligned ones"""


def signed(value, interval=None):
    """"+12.3", or "+12.3 [+8.1, +16.4]", or "-" where it is not known."""
    text = "-" if value is None else f"{value:+.1f}"
    return text if interval is None else f"{text} [{interval[0]:+.1f}, {interval[1]:+.1f}]"


def change(before, after, digits=1):
    """"41.2 -> 56.0", or "-" where it is not known."""
    return "-" if before is None or after is None else f"{before:.{digits}f} -> {after:.{digits}f}"


def over_seeds(values):
    """(mean, half the width of its 95 % interval by Student's t, None of a single value) of one figure's values."""
    student = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
    mean = float(numpy.mean(values))
    if len(values) == 1:
        return mean, None
    quantile = student.get(len(values), 1.96 + 2.7 / (len(values) - 1))
    return mean, quantile * float(numpy.std(values, ddof=1)) / math.sqrt(len(values))


def text_table(head, rows):
    """A table of texts for a terminal, as wide as it needs; the first column stands to the left."""
    widths = [max(len(str(row[i])) for row in [head, *rows]) for i in range(len(head))]
    return "\n".join("  ".join(f"{cell:<{w}}" if i == 0 else f"{cell:>{w}}" for i, (cell, w) in
                               enumerate(zip(row, widths))) for row in [head, *rows])


def table_cells(figures):
    """One objective's figures as the texts under COLUMNS."""
    room = "-"
    if figures.get("room_share") is not None:
        room = f"{figures['room_share']:.0f}%: {signed(figures['room_net'])}"
    words = figures["words"]
    return [str(figures["n"]), change(figures["win_rate_original"], figures["win_rate_aligned"]),
            signed(figures["gain"], figures["gain_interval"]), signed(figures["net"]), room,
            change(words["original"], words["aligned"], 0)]


def left_out(result):
    """What the judge's unreadable replies cost, as a text; "" if there were none."""
    unparsed, rows = (sum(figures[name] for figures in result["objectives"].values())
                      for name in ("unparsed", "left_out"))
    if not rows:
        return ""
    return f"{unparsed} comparisons without a readable verdict; {rows} rows left out for them"


def objectives_and_others(result):
    """({name: figures} of what was asked for, the same of what was judged beside it) of a result of `evaluate`."""
    asked, others = {}, {}
    for name, figures in result["objectives"].items():
        (others if name in APART else asked)[name] = figures
    return asked, others


def survived(result):
    """How much of the policy's answers is in the edits, as a text; "" where nobody counted."""
    return f"{result['kept']['mean']:.0f} % of their sentences survive" if result.get("kept") else ""


def table_text(results):
    """The table of {policy: result of `evaluate`}, at most 110 columns wide."""
    def line(head, cells):
        head = re.sub(r"\s", " ", head if len(head) <= 26 else head[:25] + "~")
        return f"{head:<26}" + "".join(f"  {cell:>{width}}" for cell, width in zip(cells, WIDTHS))

    lines = [line("", COLUMNS)]
    for policy, result in results.items():
        asked, others = objectives_and_others(result)
        about = ", ".join(filter(None, [f"{result['rows']} edits", survived(result)]))
        lines.append(f"\n{policy} ({about})")
        lines += [line("  " + name, table_cells(figures)) for name, figures in asked.items()]
        lines += [line("  beside them: " + name, table_cells(figures)) for name, figures in others.items()]
        lines += [f"  {left_out(result)}"] if left_out(result) else []
    return "\n".join(lines) + LEGEND


def print_table(results):
    print(visible(table_text(results)).encode("utf-8", "replace").decode())  # half a surrogate pair cannot be printed


# ----------------------------------------------------------------------------------------------------------------
# Charts

LIGHT = {"page": "#fbfaf8", "card": "#ffffff", "ink": "#22262b", "soft": "#6b7280", "line": "#e3e1dc",
         "before": "#b8b4ab", "after": "#2a7f78", "in": "#d3efdc", "in-ink": "#14532d", "out": "#fbdcd8",
         "out-ink": "#8c1d18"}
DARK = {"page": "#16181b", "card": "#1e2125", "ink": "#e6e4df", "soft": "#9aa1ab", "line": "#33383e",
        "before": "#6d6f73", "after": "#4fb6ac", "in": "#173d27", "in-ink": "#b9efcb", "out": "#4a1f1c",
        "out-ink": "#ffc9c2"}

CHART_STYLE = """
svg { font-size: 13px } svg text { fill: var(--ink) } svg .soft { fill: var(--soft) }
.before { fill: var(--before) } .after { fill: var(--after) }
.grid { stroke: var(--line) } .middle { stroke: var(--soft); stroke-dasharray: 3 3 }
.whisker { stroke: var(--ink); stroke-width: 1.4 }
.line { stroke-width: 1.8 } .faint { stroke-width: 1.2; opacity: 0.5 }
"""


def bar_chart(lines, low, high, unit):
    """An SVG (str) of horizontal bars. lines: (label, [(from, to, css class)], whisker (from, to) or None, note); the
    axis goes from `low` to `high`, with a dashed line in its middle."""
    left, right, step = 200, 640, 38
    bottom = 12 + step * len(lines)

    def x(value):
        return round(left + (min(max(value, low), high) - low) / (high - low) * (right - left), 1)

    parts = [f'<svg viewBox="0 0 830 {bottom + 26}" role="img" aria-label="{escape(unit)}">']
    for tick in numpy.linspace(low, high, 5):
        kind = "middle" if tick == (low + high) / 2 else "grid"
        at = x(tick)
        parts.append(f'<line class="{kind}" x1="{at}" x2="{at}" y1="4" y2="{bottom}"/>'
                     f'<text class="soft" text-anchor="middle" x="{at}" y="{bottom + 18}">{tick:g}</text>')
    for row, (label, bars, whisker, note) in enumerate(lines):
        middle, thick = 10 + step * (row + 0.5), 22 / len(bars)
        short = label if len(label) <= 27 else label[:26] + "…"
        parts.append(f'<text x="{left - 12}" y="{middle + 5}" text-anchor="end">{escape(short)}</text>')
        for position, (start, end, kind) in enumerate(bars):
            y, width = middle - 11 + thick * position, round(abs(x(end) - x(start)), 1)
            parts.append(f'<rect class="{kind}" x="{min(x(start), x(end))}" y="{y}" width="{width}" '
                         f'height="{thick - 1.5}" rx="2"/>')
        if whisker:  # on the last bar
            y, start, end = y + thick / 2 - 0.75, x(whisker[0]), x(whisker[1])
            line = f"M{start} {y}H{end}M{start} {y - 4}v8M{end} {y - 4}v8"
            parts.append(f'<path class="whisker" fill="none" d="{line}"/>')
        parts.append(f'<text class="soft" x="{right + 14}" y="{middle + 5}">{escape(note)}</text>')
    return "".join(parts) + "</svg>"


COLOURS = "#1a6 #c33 #36c #a3a #c80 #088 #777 #e5a #7a0 #840".split()


def colour_of(number):
    return COLOURS[number % len(COLOURS)]


def short(number):
    """1234567 as "1.23M"."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def line_chart(lines, across, up):
    """An SVG (str) of lines over axes with names. lines: (place of its colour, css class "faint" or "line", points
    [(x, y), ...], interval [(x, low, high), ...]); x from 0. Where lines begin far above the rest, they are cut off."""
    points = [point for _, _, points, _ in lines for point in points]
    right = max(x for x, _ in points)
    low, high = min(y for _, y in points), max(y for x, y in points if x >= 0.08 * right)
    right = right or 1
    low, high = low - 0.05 * (high - low or 1), high + 0.15 * (high - low or 1)

    def place(x, y):
        return f"{60 + 700 * x / right:.1f},{290 - 270 * (min(max(y, low), high) - low) / (high - low):.1f}"
    parts = [f'<svg viewBox="0 0 790 340" role="img" aria-label="{escape(f"{up} over {across}")}">']
    for y in numpy.linspace(low, high, 5):
        left, at = place(0, y).split(",")
        parts.append(f'<line class="grid" x1="{left}" x2="760" y1="{at}" y2="{at}"/>'
                     f'<text class="soft" text-anchor="end" x="52" y="{float(at) + 4:.1f}">{y:.3g}</text>')
    for x in numpy.linspace(0, right, 5):
        parts.append(f'<text class="soft" text-anchor="middle" x="{place(x, low).split(",")[0]}" y="308">'
                     f"{short(x)}</text>")
    parts.append(f'<text class="soft" text-anchor="middle" x="410" y="330">{escape(across)}</text>')
    for number, kind, points, interval in lines:
        if interval:
            edge = [(x, most) for x, _, most in interval] + [(x, least) for x, least, _ in reversed(interval)]
            parts.append(f'<polygon opacity="0.13" fill="{colour_of(number)}" '
                         f'points="{" ".join(place(*point) for point in edge)}"/>')
        spots = [place(*point) for point in points]
        parts.append(f'<polyline class="{kind}" fill="none" stroke="{colour_of(number)}" points="{" ".join(spots)}"/>')
        if kind == "line":
            parts += [f'<circle r="2.6" fill="{colour_of(number)}" cx="{x}" cy="{y}"/>' for x, y in
                      (spot.split(",") for spot in spots)]
    return "".join(parts) + "</svg>"


def policy_chart(result):
    """Win rate before and after per objective or, where no row has a golden answer, wins minus losses."""
    known = {name: figures for name, figures in objectives_and_others(result)[0].items() if figures["n"]}
    with_golden = {name: figures for name, figures in known.items() if figures["gain"] is not None}
    if not known:
        return "No comparison could be counted."
    if not with_golden:
        meaning = "wins minus losses of the aligned against the policy's own answers, in points"
        lines = [(name, [(0, figures["net"], "after")], figures["net_interval"],
                  signed(figures["net"], figures["net_interval"])) for name, figures in known.items()]
        return f'<div class="small">{meaning.capitalize()}</div>' + bar_chart(lines, -100, 100, meaning)
    lines = []
    for name, figures in with_golden.items():
        before, after, interval = (figures[key] for key in ("win_rate_original", "win_rate_aligned", "gain_interval"))
        whisker = interval and [before + end for end in interval]
        lines.append((name, [(0, before, "before"), (0, after, "after")], whisker, signed(figures["gain"], interval)))
    legend = ('<div class="small">Win rate against the golden answers, in %:'
              '<i class="key" style="background: var(--before)"></i>the policy\'s own'
              '<i class="key" style="background: var(--after)"></i>aligned</div>')
    return legend + bar_chart(lines, 0, 100, "win rate against the golden answers, before and after")


def write_svg(path, svg, title):
    """Writes an SVG of `bar_chart` as a file of its own, in light colours on a white card, under a title (plain text):
    a README can show it."""
    width, height = map(int, re.match(r'<svg viewBox="0 0 (\d+) (\d+)"', svg).groups())
    style = re.sub(r"var\(--([\w-]+)\)", lambda name: LIGHT[name[1]], CHART_STYLE)  # not every viewer knows var()
    chart = svg.replace("<svg", f'<svg x="16" y="44" width="{width}" height="{height}"', 1)
    title = escape(title)
    write_text(path, f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width + 32} {height + 56}" '
               f'font-family="system-ui, sans-serif"><title>{title}</title><style>{style}</style>'
               '<rect width="100%" height="100%" rx="10" fill="#ffffff"/>'
               f'<text x="20" y="30" font-size="16" font-weight="600">{title}</text>{chart}</svg>\n')


# ----------------------------------------------------------------------------------------------------------------
# Pages

STYLE = """
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, sans-serif }
main { max-width: 920px; margin: 0 auto; padding: 40px 20px 80px }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 8px } h2 { font-size: 22px; margin: 52px 0 12px }
h3 { font-size: 14px; color: var(--soft); margin: 28px 0 10px } p { margin: 8px 0 }
.soft { color: var(--soft) } .small { font-size: 14px }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 18px;
  margin: 12px 0; overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums }
th { font-weight: 600; color: var(--soft) }
th, td { padding: 5px 9px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line) }
th:first-child, td:first-child { text-align: left }
tr:last-child td { border-bottom: 0 } td.unsure { color: var(--soft) }
svg { display: block; width: 100%; min-width: 600px; height: auto }
.key { display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin: 0 5px 0 14px;
  vertical-align: -1px }
.text { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 420px; overflow-y: auto }
.prompt { color: var(--soft); font-size: 14px; max-height: 130px; display: flex;
  flex-direction: column-reverse; border-bottom: 1px solid var(--line); padding-bottom: 10px;
  margin-bottom: 10px } /* column-reverse: begins scrolled to its end, the question */
ins { background: var(--in); color: var(--in-ink); text-decoration: none; border-radius: 3px }
del { background: var(--out); color: var(--out-ink); border-radius: 3px }
.chip { display: inline-block; font-size: 12.5px; border: 1px solid var(--line); border-radius: 99px;
  padding: 1px 10px; margin: 10px 6px 0 0 } .chip.win { background: var(--in); color: var(--in-ink) }
.chip.loss { background: var(--out); color: var(--out-ink) }
"""

EXPLANATION = """The <b>win rate</b> is the share of prompts on which a judge, who is told one objective and
nothing else, prefers an answer to the golden one (a tie counts half); the <b>gain</b> is by how many points
it rises from the policy's own answers to the aligned ones, and <b>net</b> is wins minus losses of the aligned
against the policy's own. The <b>interval</b> (a thin line in the charts, brackets in the tables) holds 95 %
of the values that come out when the prompts are drawn anew with replacement: where it leaves out zero, the
choice of prompts alone does not explain the difference. <b>Room</b> tells how many of the policy's own
answers could be better at all, and the net among them."""


def html_table(head, rows):
    """A table of texts; a cell may be (text, HTML attributes)."""
    def row(cells):
        cells = [cell if isinstance(cell, tuple) else (cell, "") for cell in cells]
        return "".join(f"<td {attributes}>{escape(text)}</td>" for text, attributes in cells)

    body = "".join(f"<tr>{row(cells)}</tr>" for cells in rows)
    head = "".join(f"<th>{escape(text)}</th>" for text in head)
    return f'<div class="card"><table><tr>{head}</tr>{body}</table></div>'


def overview(results):
    """A table of net per objective and policy: green up, red down, grey where the interval holds zero."""
    names = list(dict.fromkeys(name for result in results.values() for name in objectives_and_others(result)[0]))

    def cell(figures):
        if not figures or figures["net"] is None:
            return "-"
        interval = figures["net_interval"]
        if not interval or interval[0] <= 0 <= interval[1]:
            return signed(figures["net"]), 'class="unsure"'
        colour = "42, 157, 108" if figures["net"] > 0 else "214, 69, 58"
        strength = 0.1 + abs(figures["net"]) / 200
        return signed(figures["net"]), f'style="background: rgba({colour}, {strength:.2f})"'

    rows = [(name, *(cell(result["objectives"].get(name)) for result in results.values())) for name in names]
    return html_table(["", *results], rows)


def pick_examples(rows, result, count=6, seed=0):
    """A random few of the rows that were changed, in order, each with its "verdicts" from `result`."""
    changed = [index for index, row in enumerate(rows) if row["original"] != row["aligned"]]
    chosen = random.Random(seed).sample(changed, min(count, len(changed)))
    return [{**rows[index], "verdicts": result["verdicts"][index]} for index in sorted(chosen)]


def example_card(row):
    """One example: the prompt, what was asked for, the word diff, and the verdict per objective."""
    marks = {" ": "{}", "-": "<del>{}</del>", "+": "<ins>{}</ins>"}
    pieces = word_diff(row["original"][:6000], row["aligned"][:6000])
    edit = "".join(marks[op].format(escape(text)) for op, text in pieces)
    chips, asked = [], "; ".join(o.description or o.name for o in row_objectives(row) if o.name not in APART)
    for objective in row_objectives(row):
        worth = row.get("verdicts", {}).get(objective.name, {}).get("aligned original")
        kind, word = {1: ("win", ": better"), 0: ("loss", ": worse"), 0.5: ("", ": tie")}.get(worth, ("", ""))
        chips.append(f'<span class="chip {kind}" title="{escape(objective.description)}">'
                     f"{escape(objective.name)}{word}</span>")
    prompt = re.sub(r"\n\s*\n", "\n", row["prompt"].strip().removesuffix("Assistant:").strip())[-3000:]
    return (f'<div class="card"><div class="text prompt">{escape(prompt)}</div>'
            f'<p class="small soft">asked for: {escape(asked)}</p><div class="text">{edit}</div>{"".join(chips)}</div>')


def policy_section(policy, result, examples):
    """One policy's part of a report, as a list of HTML parts."""
    words = result["words"]
    golden = "" if words["golden"] is None else f", golden answers {words['golden']:.0f}"
    lengths = f"mean words {change(words['original'], words['aligned'], 0)}{golden}"
    about = "; ".join(filter(None, [f"{result['rows']} edits", survived(result), lengths, left_out(result)]))
    asked, others = ([(name, *table_cells(figures)) for name, figures in found.items()]
                     for found in objectives_and_others(result))
    parts = [f'<h2>{escape(policy)}</h2><p class="soft">{about}</p>',
             f'<div class="card">{policy_chart(result)}</div>', html_table(["objective", *COLUMNS], asked)]
    parts += ["<h3>Judged beside them; nobody asked for it</h3>", html_table(["", *COLUMNS], others)] if others else []
    if examples:
        parts += ["<h3>Examples: what the aligner took out and put in</h3>", *map(example_card, examples)]
    return parts


def write_report(path, results, examples, title, notes="", figures=()):
    """Writes one self-contained HTML page.

    results: {policy: result of `evaluate`}; examples: {policy: rows of `pick_examples`}; notes: plain text under the
    title; figures: further sections, (title, SVG or HTML).
    """
    parts = [f'<p class="soft">{escape(notes)}</p>'] if notes else []
    parts += [f"<p>{EXPLANATION}</p>"]
    parts += ["<h2>Net, by objective and policy</h2>", overview(results)] if len(results) > 1 else []
    parts += [f'<h2>{escape(name)}</h2><div class="card">{figure}</div>' for name, figure in figures]
    for policy, result in results.items():
        parts += policy_section(policy, result, examples.get(policy))
    write_page(path, title, parts)


def write_page(path, title, parts):
    """Writes a self-contained HTML page of parts (HTML) under a title (plain text)."""
    title = escape(title)
    light, dark = (" ".join(f"--{name}: {colour};" for name, colour in theme.items()) for theme in (LIGHT, DARK))
    style = (f":root {{ {light} color-scheme: light dark }}\n"
             f"@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}{STYLE}{CHART_STYLE}")
    write_text(path, '<!doctype html><html lang="en"><meta charset="utf-8">'
               '<meta name="viewport" content="width=device-width, initial-scale=1">'
               f"<title>{title}</title><style>{style}</style><main><h1>{title}</h1>{''.join(parts)}</main></html>\n")
