"""The rivals side by side: MetaAligner's Table 1 as columns that a command fills in.

    python compare.py                      all rivals (rivals.py lists them), three seeds
    python compare.py --quick              the start and eight of them, one seed, shorter trainings
    python compare.py --only dpo ric       some of them

On the embedded world every objective is judged exactly. All rivals begin from one policy and learn from the same rated
answers, whose scores are in units of that policy's deviation. Each then answers the same questions, and is asked for
five objectives with equal weights. OUT/report.html holds the tables and the fronts, OUT/results.json what is in them.
Killed anywhere, it goes on when it is started again.

    gain      mean over the five objectives, in deviations, against the start's answers to the same questions
    worst     the same of the objective that gained least
    win       wins + ties / 2 against the start's answers, and against golden ones, mean over the five
    spoilt    objectives not asked for on which an answer is worse than the start's: share of (answer, objective); the
              row "start", its answers drawn anew, shows how much of it drawing alone does
    nats      divergence from the start (best-of-n: its upper bound); kept: share of the start's sentences that stand
    tokens    trained on, in thousands; seconds: of its steps (a reference's pass comes on top); fresh: answers drawn
    passes    texts written for each answer that is given, by how many models at once; written: their tokens
"""
import random
from dataclasses import asdict
from functools import partial
from pathlib import Path

from common import announce, cli, code_of, make_parser, number, write_jsonl

import files
import rivals
import toy
from ablate import plain
from eval import mean_and_interval
from model import device_named
from report import colour_of, escape, html_table, in_common, over_seeds, text_table, write_page
from resume import kept, whole_run
from rivals import BRIEF, OBJECTIVES, RIVALS, UNSEEN, Entry, World

QUICK = ("start", "best-of-n", "metaaligner", "aligner", "dpo", "modpo", "ric", "rloo", "conditioned")
FULL_SIZE = dict(reading={"texts": 400}, practice=500, steps=100, questions=3000, prompts=200)
QUICK_SIZE = dict(reading={"texts": 300}, practice=400, steps=60, questions=2000, prompts=150)
MIXES = [{"helpful": w, BRIEF: 1 - w} for w in (1.0, 0.75, 0.5, 0.25, 0.0)]  # the front's weights
FRONTS = ("best-of-n", "metaaligner", "dpo", "modpo", "ric", "cpo", "rloo", "soup", "mod", "conditioned")
TOLD = ("metaaligner", "cpo", "conditioned")  # told which objectives, not how much: three points of the front
CORNER = -3.0  # in deviations: hypervolumes are of what is gained beyond this on both objectives
UNASKED = [name for name in toy.NAMED if name not in OBJECTIVES]
FIGURES = {"gain": 2, "worst": 2, "win": 1, "win, golden": 1, "spoilt": 1, "nats": 1, "kept": 0, "tokens": 0,
           "seconds": 0, "fresh": 0, "passes": 0, "written": 1}  # figure -> decimals


# ----------------------------------------------------------------------------------------------------------------
# What an entry shows


def gains(world, entry, names, before=None):
    """[(mean gain over names in deviations, ...) per name] for each prompt: a list of lists."""
    before = before or world.answers
    return [[(toy.score(name, prompt, after) - toy.score(name, prompt, old)) / world.scale.get(name, 1.0)
             for name in names] for prompt, old, after in zip(world.prompts, before, entry.answers)]


def wins(name, prompts, answers, others):
    """Wins + ties / 2, in %, of answers against others."""
    apart = [toy.score(name, *new) - toy.score(name, *old)
             for new, old in zip(zip(prompts, answers), zip(prompts, others))]
    return 100 * sum((gap > 0) + 0.5 * (gap == 0) for gap in apart) / len(apart)


def shown(world, entry, asked=OBJECTIVES, before=None):
    """{figure: value} of an entry that was asked for some objectives, against the answers before."""
    before = before or world.answers
    rng = random.Random(f"golden {world.seed}")
    golden = [toy.golden(prompt, rng) for prompt in world.prompts]
    each = [sum(column) / len(column) for column in zip(*gains(world, entry, asked, before))]
    spoilt = [toy.score(name, prompt, after) < toy.score(name, prompt, old) for name in UNASKED if name not in asked
              for prompt, old, after in zip(world.prompts, before, entry.answers)]
    stand = [in_common(*map(toy.sentences_of, texts)) / max(1, len(toy.sentences_of(texts[0])))
             for texts in zip(before, entry.answers)]
    means = [sum(row) / len(row) for row in gains(world, entry, asked, before)]
    win, over_golden = ([wins(name, world.prompts, entry.answers, others) for name in asked]
                        for others in (before, golden))
    return {"gain": sum(each) / len(each), "worst": min(each), "worst objective": asked[each.index(min(each))],
            "interval": [end / 100 for end in mean_and_interval(means, list(range(len(means))))[1]],
            "win": sum(win) / len(win), "win, golden": sum(over_golden) / len(over_golden),
            "spoilt": 100 * sum(spoilt) / len(spoilt), "nats": entry.nats, "kept": 100 * sum(stand) / len(stand),
            "tokens": entry.costs["tokens"] / 1000, "seconds": entry.costs["seconds"], "fresh": entry.costs["fresh"],
            "passes": entry.draws, "written": entry.written / len(entry.answers),
            "each": {name: found for name, *found in zip(asked, each, win, over_golden)}}


def hypervolume(points, corner=CORNER):
    """The area that points (x, y) dominate above (corner, corner): more of both is better."""
    area, height = 0.0, corner
    for x, y in sorted(points, reverse=True):
        if x > corner and y > height:
            area += (x - corner) * (y - height)
            height = y
    return area


# ----------------------------------------------------------------------------------------------------------------
# One seed


def entry_of(world, label, make):
    """The Entry that make() gives, kept in a file."""
    path = world.out / "entries" / f"{plain(label)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    kept(world.out, f"entries/{path.name}", [label, code_of("compare")],
         lambda: write_jsonl(path, [asdict(make())]))
    return Entry(**files.read_json(path))


def label_of(name, knob):
    """What a rival is called in the table: with its knob, where it has several values."""
    return name if len(RIVALS[name][1]) == 1 else f"{name} {knob}"


def tables(world, names):
    """{rival, knob: figures} with equal weights."""
    found = {}
    for name in names:
        function = RIVALS[name][0]
        for knob in rivals.knobs_of(world, name):
            label = label_of(name, knob)
            announce(f"seed {world.seed}: {label}")
            entry = entry_of(world, label, partial(function, world, rivals.even(), knob))
            found[label] = shown(world, entry)
            print(f"{label}: gain {found[label]['gain']:+.2f}, worst {found[label]['worst']:+.2f}")
    return found


def fronts(world, names):
    """{rival: [(gain on helpful, gain on BRIEF), ...]} over MIXES; of those told names, over what they can be told."""
    found = {}
    for name in (name for name in FRONTS if name in names):
        function, knobs = RIVALS[name][0], rivals.knobs_of(world, name)
        for mix in [MIXES[0], MIXES[2], MIXES[4]] if name in TOLD or not world.full else MIXES:
            label = f"{name}, {rivals.as_text(mix)}"
            announce(f"seed {world.seed}: {label}")
            entry = entry_of(world, label, partial(function, world, mix, knobs[0]))
            columns = zip(*gains(world, entry, ["helpful", BRIEF]))
            found.setdefault(name, []).append(tuple(sum(column) / len(column) for column in columns))
    return found


def prices(world, names):
    """{rival: {"new policy", "new objective": (seconds, gain in deviations or points)}} of those that need no training
    for it. A new policy: the scripted verbose one. A new objective: UNSEEN, beside the five."""
    rng = random.Random(f"verbose {world.seed}")
    count = RIVALS["best-of-n"][1][0]
    verbose = [[toy.answer("verbose", prompt, rng) for prompt in world.prompts] for _ in range(count)]
    everything, found = rivals.even((*OBJECTIVES, UNSEEN)), {}
    for name in (name for name in ("best-of-n", "metaaligner", "aligner", "conditioned") if name in names):
        function, knobs = RIVALS[name][0], rivals.knobs_of(world, name)
        if name == "best-of-n":
            best = [max(texts, key=lambda text: rivals.value(world, rivals.even(), prompt, text))
                    for prompt, *texts in zip(world.prompts, *verbose)]
            found[name] = {"new policy": shown(world, Entry(best), before=verbose[0])["gain"]}
        elif name != "conditioned":
            entry = entry_of(world, f"{name}, new policy",
                             partial(function, world, rivals.even(), knobs[0], answers=verbose[0]))
            found[name] = {"new policy": shown(world, entry, before=verbose[0])["gain"]}
        if name != "aligner":
            entry = entry_of(world, f"{name}, new objective", partial(function, world, everything, knobs[0]))
            found.setdefault(name, {})["new objective"] = wins(UNSEEN, world.prompts, entry.answers, world.answers)
    return found


def run_seed(out, seed, names, quick, device):
    """{"table", "fronts", "prices"} of one seed."""
    size = QUICK_SIZE if quick else FULL_SIZE
    world = World(out / f"seed-{seed}", seed, device, size["steps"], full=not quick)
    with whole_run(world.out, {"seed": seed, "size": size}, "compare"):
        announce(f"seed {seed}: the start")
        rivals.build(world, **{name: value for name, value in size.items() if name != "steps"})
        return {"table": tables(world, names), "fronts": fronts(world, names), "prices": prices(world, names)}


# ----------------------------------------------------------------------------------------------------------------
# The page


FREE_WEIGHTS = ("best-of-n", "ric", "ric, online", "soup", "mod")
ON_OR_OFF = ("metaaligner", "cpo", "conditioned")  # told names or ratings: an objective has a weight or has none


def told(values, decimals):
    """A figure over seeds, with its 95 % interval where there are several."""
    values = [value for value in values if value is not None]
    if not values:
        return "-"
    mean, half = over_seeds(values)
    return f"{mean:.{decimals}f}" + ("" if half is None else f" ±{half:.{decimals}f}")


def main_table(results):
    rows = []
    for label in results[0]["table"]:
        found = [result["table"][label] for result in results]
        cells = [told([figures[name] for figures in found], decimals) for name, decimals in FIGURES.items()]
        if len(found) == 1:  # one seed: the interval is over the questions
            cells[0] += " [{:+.2f}, {:+.2f}]".format(*found[0]["interval"])
        rows.append([label, *cells])
    return ["", *FIGURES], rows


def objective_table(results):
    """Per objective: gain, wins against the start and wins against golden answers; means over the seeds."""
    rows = []
    for label in results[0]["table"]:
        seeds = [result["table"][label]["each"] for result in results]
        means = [[sum(found[name][i] for found in seeds) / len(seeds) for i in range(3)] for name in OBJECTIVES]
        rows.append([label, *("{:+.2f}, {:.0f}, {:.0f}".format(*mean) for mean in means)])
    return ["gain, win, win golden", *OBJECTIVES], rows


def price_table(results):
    """Table 1's columns with what each costs, of those that train or were measured on what is new."""
    rows = []
    for name, (_, knobs) in RIVALS.items():
        labels = [label for knob in knobs if (label := label_of(name, knob)) in results[0]["table"]]
        if not labels or name in ("start", "self-refinement"):
            continue
        label = labels[0]
        again = f"train again, {told([result['table'][label]['seconds'] for result in results], 0)} s"

        def measured(what, unit, decimals, name=name):
            values = [result["prices"].get(name, {}).get(what) for result in results]
            return f"0 s: {told(values, decimals)} {unit}" if any(value is not None for value in values) else None
        rows.append([name, measured("new policy", "deviations", 2) or "impossible without its weights",
                     "0 s" if name in FREE_WEIGHTS else "0 s, on or off" if name in ON_OR_OFF else again,
                     measured("new objective", "% wins on it", 0) or f"ratings of it, and {again}"])
    return ["", "a policy never trained on", "weights never trained on", "an objective never rated"], rows


def front_table(results):
    rows = [[name, told([hypervolume(result["fronts"][name]) for result in results], 2)]
            for name in results[0]["fronts"]]
    return ["", "hypervolume"], sorted(rows, key=lambda row: -float(row[1].split()[0]))


def front_chart(points):
    """An SVG of {name: [(x, y), ...]}: gain on helpful to the right, on brevity upwards."""
    everything = [point for line in points.values() for point in line] + [(0.0, 0.0)]
    low = [min(point[axis] for point in everything) - 0.2 for axis in (0, 1)]
    high = [max(point[axis] for point in everything) + 0.2 for axis in (0, 1)]

    def place(point):
        right, up = ((point[axis] - low[axis]) / (high[axis] - low[axis]) for axis in (0, 1))
        return 60 + 480 * right, 360 - 330 * up
    parts = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 400" font-family="sans-serif" font-size="12">']
    zero = place((0.0, 0.0))
    parts += [f'<line x1="60" x2="540" y1="{zero[1]:.0f}" y2="{zero[1]:.0f}" stroke="#bbb"/>',
              f'<line x1="{zero[0]:.0f}" x2="{zero[0]:.0f}" y1="30" y2="360" stroke="#bbb"/>',
              '<text x="300" y="390" text-anchor="middle">gain on helpful, in deviations</text>',
              '<text x="20" y="195" transform="rotate(-90 20 195)" text-anchor="middle">gain on brevity</text>']
    for number_, (name, line) in enumerate(points.items()):
        colour, spots = colour_of(number_), [place(point) for point in line]
        path = " ".join(f"{x:.0f},{y:.0f}" for x, y in spots)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        parts += [f'<circle cx="{x:.0f}" cy="{y:.0f}" r="3.5" fill="{colour}"/>' for x, y in spots]
        parts.append(f'<text x="560" y="{45 + 18 * number_}" fill="{colour}">{escape(name)}</text>')
    return "".join([*parts, "</svg>"])


def report(out, results, quick):
    """The page, the JSON beside it, and the tables as a text."""
    main, each, prices_, front = (table(results) for table in (main_table, objective_table, price_table, front_table))
    mean_front = {name: [tuple(sum(axis) / len(results) for axis in zip(*spots)) for spots in
                         zip(*(result["fronts"][name] for result in results))] for name in results[0]["fronts"]}
    note = ("One seed, short trainings: an impression, no result." if quick else
            "One seed; in brackets, a 95 % interval over questions." if len(results) == 1 else
            f"{len(results)} seeds; ± is a 95 % interval over seeds (Student).")
    parts = [f"<p>{note} Asked for: {', '.join(OBJECTIVES)}.</p>",
             "<h2>Five objectives at once</h2>", html_table(*main),
             "<h2>Each of them: gain, % wins against the start, % wins against golden answers</h2>", html_table(*each),
             "<h2>What is new costs (MetaAligner's Table 1)</h2>", html_table(*prices_),
             "<h2>Helpful against brief: two objectives that conflict</h2>", front_chart(mean_front),
             html_table(*front),
             f"<pre>{escape(__doc__[__doc__.index('    gain'):])}</pre>"]
    write_page(out / "report.html", "nanoalign: the rivals, measured", parts)
    write_jsonl(out / "results.json", [results])
    return f"{note}\n\n" + "\n\n".join(text_table(*table) for table in (main, each, prices_, front))


def main():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--out", default="runs/compare", metavar="FOLDER", help="where everything is written (default runs/compare)")
    add("--seeds", nargs="+", type=number(int, 0), default=None, metavar="N", help="(default 0 1 2; --quick: 0)")
    add("--quick", action="store_true", help=f"{', '.join(QUICK)}; one value of each knob, short trainings")
    add("--only", nargs="+", choices=list(RIVALS), metavar="RIVAL",
        help=f"some of: {'; '.join(RIVALS)} (those with a comma in quotes)")
    add("--device", default=None, help="cpu, cuda, ... (default: cuda where there is one)")
    args = parser.parse_args()
    names = list(dict.fromkeys(["start", *(args.only or (QUICK if args.quick else RIVALS))]))
    out, device = Path(args.out), device_named(args.device)
    seeds = dict.fromkeys(args.seeds or ([0] if args.quick else [0, 1, 2]))  # one given twice counts once
    results = [run_seed(out, seed, names, args.quick, device) for seed in seeds]
    print("\n" + report(out, results, args.quick) + f"\n\nwrote {out / 'report.html'}")


if __name__ == "__main__":
    cli(main)
