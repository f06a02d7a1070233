"""Runs side by side: what differs in their options, how their losses fell, and what came of them.

    python runs.py runs/lr-1e-3 runs/lr-3e-3       folders that train.py, reward.py or ppo.py wrote
    python runs.py runs/story runs/story-1         and those of several parts: stories, seeds of compare.py, ablate.py
    python runs.py runs/* --figures net kept       of what came of them, the figures with these in their names

A folder of several parts is compared part by part, under the parts' names. Runs that differ in nothing but their seed
are joined: a mean with its 95 % interval over seeds (Student). A loss is a mean over the last tenth of the steps; its
chart shows the mean of each of at most 60 stretches (faint), and the validations (with dots). ppo.py's runs have
rewards for losses. What has no end yet is called unfinished, and is joined with nothing.
"""
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

from common import UserError, check_out, cli, digest, first_line, make_parser

from report import colour_of, escape, html_table, line_chart, over_seeds, short, text_table, visible, write_page
from resume import read_run

FILES = ("metrics.jsonl", "results.json", "kinds.json", "run.json")  # a folder with one of them holds a run, or a part
DIGESTS = ("data", "model", "tokenizer")  # settings that are checksums: they may follow from the seed
STRETCHES = 60
MOST = 40  # figures shown, where none are named


@dataclass
class Curve:
    """One stage's losses, or ppo's rewards."""
    points: list    # [(tokens, loss)] per step
    checks: list    # [(tokens, loss)] per validation
    steps: int
    seconds: float
    samples: list   # the last validation's [{"prompt", "text"}]
    unit: str = "loss"


@dataclass
class Part:
    """A run, or a part of one."""
    name: str       # the run's
    state: str      # finished, or what else
    settings: dict  # {name: text}, the seed among them
    code: dict      # {script: checksum}
    curves: dict    # {stage: Curve}
    figures: dict   # {name: (value, [low, high] or None)}

    @property
    def seed(self):
        return self.settings.get("seed")

    def key(self):
        """What runs that are joined have in common."""
        others = {name: text for name, text in self.settings.items() if name not in ("seed", *DIGESTS)}
        return digest(others, list(self.curves))


# ----------------------------------------------------------------------------------------------------------------
# Reading


def read_rows(path):
    """The rows of a metrics.jsonl. A killed run's torn last line is left out; UserError for any other broken one."""
    rows, (*lines, last) = [], path.read_bytes().split(b"\n")
    for number, line in enumerate([*lines, last], 1):
        try:
            row = json.loads(line) if number <= len(lines) or last else {}
            if not isinstance(row, dict):
                raise ValueError("it is no object")
            rows.append(row)
        except (ValueError, RecursionError) as error:
            if number <= len(lines):
                raise UserError(f"{path}:{number}: is broken ({first_line(error)}); leave this run out, or train it "
                                "again") from None
    return rows


def curves_of(path):
    """{stage: Curve} of a metrics.jsonl."""
    found = {}

    def of(row, key, number):
        if isinstance(row.get(key), bool) or not isinstance(row.get(key), (int, float)):
            raise UserError(f"{path}:{number}: {key!r} is no number; leave this run out, or train it again")
        return row[key]
    for number, row in enumerate(read_rows(path), 1):
        reward = "iteration" in row
        stage = str(row.get("stage", "ppo"))
        value = "reward" if reward else "loss"
        if value not in row and "val_loss" not in row:
            continue
        curve = found.setdefault(stage, Curve([], [], 0, 0.0, [], value))
        if value in row:
            curve.points.append((of(row, "tokens", number), of(row, value, number)))
            curve.steps, curve.seconds = of(row, "iteration" if reward else "step", number), of(row, "seconds", number)
        else:  # a validation, which comes after its step
            curve.checks.append((curve.points[-1][0] if curve.points else 0, of(row, "val_loss", number)))
        if isinstance(row.get("samples"), list):
            curve.samples = [sample for sample in row["samples"] if isinstance(sample, dict)]
    for curve in found.values():
        curve.points, curve.checks = ([(x, y) for x, y in points if math.isfinite(y)]
                                      for points in (curve.points, curve.checks))
    return {stage: curve for stage, curve in found.items() if curve.points or curve.checks}


def cells(value, name=()):
    """Yield (name, value, interval or None) of the figures in what was found: of objects with a mean, a net or a gain,
    however deep."""
    for key in ("mean", "net", "gain"):
        if isinstance(value, dict) and isinstance(value.get(key), (int, float)):
            interval = value.get(f"{key}_interval", value.get("interval"))
            pair = isinstance(interval, list) and [isinstance(end, (int, float)) for end in interval] == [True, True]
            yield (*name, *([] if key == "mean" else [key])), value[key], interval if pair else None
            return
    if isinstance(value, dict):
        for key, part in value.items():
            yield from cells(part, (*name, *filter(None, [key])))


def figures_of(folder):
    """{name: (value, interval)} of what a folder's results tell; a list of results is one of seeds, which are joined.
    """
    path = next((folder / name for name in FILES[1:3] if (folder / name).exists()), None)
    if not path:
        return {}
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)}); leave this run out, or make it again") from None
    if not isinstance(content, list):
        content = [content]
    found = {}
    for result in content:
        result = result["summary"] if isinstance(result, dict) and "summary" in result else result
        for name, value, interval in cells(result):
            found.setdefault(", ".join(name), []).append((value, interval))
    return {name: values[0] if len(values) == 1 else joined([value for value, _ in values])
            for name, values in found.items() if len(values) == len(content)}  # what not all seeds have is no mean


def joined(values):
    """(mean, 95 % interval over seeds)."""
    mean, half = over_seeds(values)
    return mean, None if half is None else [mean - half, mean + half]


def flat(settings, prefix=""):
    """{name: text} of settings, those in settings as name.name."""
    found = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value)
            brief = len(text) <= 24 and name not in DIGESTS
            found[prefix + name] = text if brief else f"...{text[-12:]} {digest(value)[:6]}"
    return found


def read_part(name, folder, above):
    """A Part from a folder. above: the settings of the run that it is a part of."""
    run = read_run(folder)
    about = {key: run[key] for key in ("base", "principle", "reward") if key in run}
    if run.get("files"):
        about["files"] = digest(sorted(run["files"].values()))[:6]
    settings = {**above, **flat({**about, **run.get("options", {}), **run.get("settings", {})})}
    state = "finished" if run.get("ended") else "unfinished" if run else "no run.json"
    metrics = folder / "metrics.jsonl"
    return Part(name, state, settings, run.get("code", {}), curves_of(metrics) if metrics.exists() else {},
                figures_of(folder))


def read_parts(folder, name):
    """{name of the part ("" for the run itself): Part}, in the order in which they began. UserError where there is
    none."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give one that train.py, ppo.py, story.py or others wrote")
    places = sorted({path.parent for file in FILES for path in folder.rglob(file)})
    if not places:
        raise UserError(f"{folder}: holds no run (no {', '.join(FILES)}, nor do the folders in it); give another")
    above = flat(read_run(folder).get("settings", {}))
    places.sort(key=lambda place: (place != folder, str(read_run(place).get("began"))))
    return {"" if place == folder else str(place.relative_to(folder)): read_part(name, place, above)
            for place in places}


# ----------------------------------------------------------------------------------------------------------------
# Comparing


def differing(parts):
    """The names of the settings that are not the same in all parts that tell them; checksums only where they differ
    for one seed."""
    found = {}
    for part in parts:
        for name, text in part.settings.items():
            found.setdefault((name, part.seed if name in DIGESTS else None), set()).add(text)
    return list(dict.fromkeys(name for (name, _), texts in found.items() if len(texts) > 1))


def groups_of(parts):
    """[(label, parts)]: finished parts of one setting together, if each has a seed of its own; any other alone."""
    by_key, found = {}, []
    for part in parts:
        by_key.setdefault(part.key() if part.state == "finished" else part.name, []).append(part)
    columns = [name for name in differing(parts) if name != "seed"]
    for members in by_key.values():
        if len({part.seed for part in members}) < len(members):
            found += [(part.name, [part]) for part in members]
        elif len(members) == 1:
            found.append((members[0].name, members))
        else:
            what = ", ".join(f"{name} {members[0].settings.get(name, '-')}" for name in columns) or "all"
            found.append((f"{what} (seeds {', '.join(part.seed for part in members)})", members))
    return found


def stretches(points):
    """[(mean x, mean y)] of at most STRETCHES neighbouring parts of points."""
    count = min(STRETCHES, len(points))
    parts = [points[i * len(points) // count:(i + 1) * len(points) // count] for i in range(count)]
    return [tuple(sum(axis) / len(part) for axis in zip(*part)) for part in parts]


def mean_line(lines):
    """(points, interval) of several lines, place by place, as far as all go."""
    columns = [list(zip(*column)) for column in zip(*lines)]
    points = [(sum(x) / len(x), joined(y)[0]) for x, y in columns]
    if len(lines) == 1:
        return points, []
    return points, [(point[0], *joined(y)[1]) for point, (_, y) in zip(points, columns)]


def chart(groups, stage):
    """A stage's chart as HTML, a colour for each of groups [(label, parts)]; "" where it has no losses."""
    lines, keys, unit = [], [], "loss"
    for number, (label, parts) in enumerate(groups):
        curves = [part.curves[stage] for part in parts if stage in part.curves]
        for kind, of in (("faint", lambda curve: stretches(curve.points)), ("line", lambda curve: curve.checks)):
            points, interval = mean_line(list(map(of, curves)))
            if points:
                lines.append((number, kind, points, interval if kind == "line" or not curves[0].checks else []))
                unit = curves[0].unit
        if curves:
            keys.append(f'<i class="key" style="background: {colour_of(number)}"></i>{escape(label)}')
    if not lines:
        return ""
    return f'<div class="card"><div class="small">{"".join(keys)}</div>{line_chart(lines, "tokens", unit)}</div>'


def last_of(curve):
    """{column: number} of a stage: the mean of the last tenth of its steps, and the validations' ends."""
    last = curve.points[-math.ceil(len(curve.points) / 10):]
    found = {curve.unit: sum(y for _, y in last) / len(last) if last else None}
    if curve.checks:
        found |= {"validation at first": curve.checks[0][1], "validation": curve.checks[-1][1]}
    return found


def told(values, decimals=3):
    """Values of several seeds as a text, with their interval where there are several."""
    if not values or None in values:
        return "-"
    mean, half = over_seeds(values)
    return f"{mean:.{decimals}f}" + ("" if half is None else f" ±{half:.{decimals}f}")


def stage_table(groups, stage, columns):
    """(head, rows) of one stage: a row for each run with its settings, and one for those that are joined."""
    rows, parts = [], [(label, members) for label, members in groups if any(stage in m.curves for m in members)]
    names = list(dict.fromkeys(name for _, members in parts for m in members for name in last_of(m.curves[stage])))
    for label, members in parts:
        for part in members:
            curve, last = part.curves[stage], last_of(part.curves[stage])
            tokens = curve.points[-1][0] if curve.points else 0
            rows.append([part.name, *(part.settings.get(name, "-") for name in columns), part.state, str(curve.steps),
                         short(tokens), f"{curve.seconds:.0f}", *(told([last.get(name)]) for name in names)])
        if len(members) > 1:
            values = [last_of(part.curves[stage]) for part in members]
            rows.append([f"= {label}", *[""] * (len(columns) + 4), *(told([value.get(name) for value in values])
                                                                    for name in names)])
    return ["run", *columns, "state", "steps", "tokens", "seconds", *names], rows


def figure_table(groups, wanted):
    """(head, rows, how many figures are not shown) of what came of the runs: each by itself, then those joined."""
    known = [(label, parts) for label, parts in groups if any(part.figures for part in parts)]
    known = [column for label, parts in known for column in (
        [(part.name, [part]) for part in parts] + [(f"= {label}", parts)] * (len(parts) > 1))]
    names = list(dict.fromkeys(name for _, parts in known for part in parts for name in part.figures))
    named = [name for name in names if not wanted or any(text in name for text in wanted)]
    shown = named if wanted else named[:MOST]

    def cell(name, parts):
        values = [part.figures[name] for part in parts if name in part.figures]
        if len(values) < len(parts):
            return "-"
        value, interval = values[0] if len(values) == 1 else joined([value for value, _ in values])
        return f"{value:.2f}" + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else "")
    rows = [[name, *(cell(name, parts) for _, parts in known)] for name in shown]
    return ["", *(label for label, _ in known)], rows, len(names) - len(shown)


def sample_cards(groups, stage):
    """The last samples of each run, under their prompts, as HTML parts."""
    by_prompt = {}
    for _, parts in groups:
        for part in parts:
            for sample in part.curves[stage].samples if stage in part.curves else ():
                by_prompt.setdefault(str(sample.get("prompt")), []).append(f"{part.name}: {sample.get('text')}")
    return [f'<div class="card"><div class="text prompt">{escape(prompt)}</div>'
            + "".join(f'<div class="text">{escape(text)}</div>' for text in texts) + "</div>"
            for prompt, texts in by_prompt.items()]


# ----------------------------------------------------------------------------------------------------------------
# The page and the text


def compare(parts, title, wanted=()):
    """(HTML parts, texts) of parts of the same name."""
    groups, columns = groups_of(parts), differing(parts)
    html, texts = [f"<h2>{escape(title)}</h2>"], [f"== {title}"]
    other = sorted({name for part in parts for name in part.code if len({p.code.get(name) for p in parts}) > 1})
    if other and len(parts) > 1:
        texts.append(f"made by different code: {', '.join(other)}")
        html.append(f'<p class="soft">{escape(texts[-1].capitalize())}</p>')
    if not all(part.curves or part.figures for part in parts):  # killed before its first step, say
        rows = [[part.name, *(part.settings.get(name, "-") for name in columns), part.state] for part in parts]
        html.append(html_table(["run", *columns, "state"], rows))
        texts.append(text_table(["run", *columns, "state"], rows))
    for stage in dict.fromkeys(stage for part in parts for stage in part.curves):
        table, cards = stage_table(groups, stage, columns), sample_cards(groups, stage)
        html += [f"<h3>{escape(stage)}</h3>", chart(groups, stage), html_table(*table)]
        html += ["<h3>What was written at the last validation</h3>", *cards] if cards else []
        texts.append(f"{stage}\n{text_table(*table)}")
    head, rows, left = figure_table(groups, wanted)
    if rows:
        more = f"{left} more figures; --figures TEXT names some" if left else ""
        html += ["<h3>What came of it</h3>", html_table(head, rows), f'<p class="soft">{more}</p>']
        texts += [text_table(head, rows), *filter(None, [more])]
    elif wanted and left:
        texts.append(f"none of {left} figures has {' or '.join(wanted)} in its name")
        html.append(f'<p class="soft">{escape(texts[-1].capitalize())}</p>')
    return html, texts


def curves_section(folder, names):
    """[(title, HTML)] of the losses of a run's parts, for another page."""
    found = []
    for name in names:
        part = read_part(name, Path(folder) / name, {})
        found += [(f"How the loss fell: {name}, {stage}", chart([("training; with dots: validation", [part])], stage))
                  for stage in part.curves]
    return found


def main():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="folders of runs, or of several parts")
    add("--figures", nargs="+", default=[], metavar="TEXT", help=f"show the figures with one of these in their names "
        f"(default: the first {MOST})")
    add("--out", default="runs/runs.html", metavar="FILE", help="the page (default runs/runs.html)")
    args = parser.parse_args()
    given = {folder.resolve(): folder for folder in map(Path, args.runs)}
    folders = [folder for place, folder in given.items() if place != Path(args.out).resolve() or folder.is_dir()]
    if not folders:
        parser.error(f"{args.out} is the page; give folders of runs")
    check_out(args.out, [folder / name for folder in folders for name in FILES])
    above = Path(os.path.commonpath([folder.resolve().parent for folder in folders]))
    names, by_part = [str(folder.resolve().relative_to(above)) for folder in folders], {}
    for folder, name in zip(folders, names):
        for part, found in read_parts(folder, name).items():
            by_part.setdefault(part, []).append(found)
    html, texts = [], []
    for part, found in by_part.items():
        made = compare(found, part or " | ".join(names), args.figures)
        html, texts = html + made[0], texts + made[1]
    write_page(args.out, "nanoalign: runs side by side", html)
    print(visible("\n\n".join(texts)) + f"\n\nwrote {args.out}")


if __name__ == "__main__":
    cli(main)
