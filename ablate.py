"""What generalisation takes, and what it costs those who were not asked: ablations of the story's aligner.

    python ablate.py                           everything: hours; killed anywhere, it goes on when started again
    python ablate.py --figures words pairs     some figures
    python ablate.py --figures pairs --seeds 0 --scale 0.2
    python ablate.py --figures size --variants "the recipe" AdamW

    words     how many words to mention or avoid it takes to follow words that were never read (and one wording each)
    size      aligners of 0.5, 2 and 8 million parameters, each from its own foundation; and 2 for twice the steps, by
              AdamW, and without norms of queries and keys
    steps     MetaAligner's three steps: without the warm-up, partner instead of identity, without equal preference;
              these three alone, without the fourth, in which edits are held against others
    pairs     which edits become pairs, and what their prompts name (data.Pairing), beginning with the paper's
    unseen    six wishes never trained, added one by one to three trained ones (the paper's figure 3)
    rounds    editing the edit again, once and twice; and asking for 1, 3, 6 and 9 objectives at once
    several   of 2 and of 8 edits of each answer the one that was asked for most (choose.py)

Each variant is one aligner that is trained as the story trains its own, but for what its name says, and measured as
there (measure.py) on answers of the five policies' manners. Rows go to OUT/rows.jsonl, charts to OUT/report.html: all
that was measured there by the same code, at the same scale and number of questions.
"""
import itertools
import math
import random
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from common import announce, cli, code_of, digest, make_parser, number, write_jsonl

import data
import files
import measure
import story
import toy
import wordings
from choose import Choice
from model import device_named
from report import bar_chart, html_table, over_seeds, write_page
from resume import kept, whole_run
from writers import Writer


@dataclass(frozen=True)
class Variant:
    """An aligner that differs from the story's in one thing."""
    pairing: data.Pairing = field(default_factory=lambda: story.PAIRING)
    rating: dict = field(default_factory=dict)                        # keywords of toy.rated
    steps: dict = field(default_factory=lambda: dict(story.STEPS))    # optimizer steps of the aligner's steps
    shape: dict = field(default_factory=lambda: dict(story.FOUNDATION))
    worded: bool = True                                               # False: one wording for each objective
    optimizer: str = story.RECIPE.optimizer
    lr: float = story.RECIPE.lr                                       # of the foundation


def words(count):
    return Variant(rating={"words": wordings.TRAINED_WORDS[:count], "made_up": 0.0})


def without(*names, **more):
    return Variant(steps={**{name: count for name, count in story.STEPS.items() if name not in names}, **more})


def paired(**options):
    return Variant(replace(story.PAIRING, **options))


SHAPES = {"0.5M": dict(hidden_size=96, intermediate_size=256, num_attention_heads=3, num_key_value_heads=3,
                       num_hidden_layers=3),
          "8M": dict(hidden_size=384, intermediate_size=1024, num_attention_heads=6)}
RECIPE = "the recipe"
FIGURES = {  # figure -> {variant: what is trained}
    "words": {"10 words": words(10), "50 words": words(50), "200 words": words(200), RECIPE: Variant(),
              "one wording each": Variant(worded=False)},
    "size": {name: Variant(shape={**story.FOUNDATION, **shape}) for name, shape in SHAPES.items()}
    | {RECIPE: Variant(), "twice the steps": Variant(steps={name: 2 * count for name, count in story.STEPS.items()}),
       "AdamW": Variant(optimizer="adamw", lr=3e-3),  # the best rate without norms: LOG.md
       "no norms": Variant(shape={**story.FOUNDATION, "model_type": "llama"}, lr=5e-3)},
    "steps": {RECIPE: Variant(), "no warm-up": without("identity"),
              "partner": Variant(steps={"partner" if name == "identity" else name: count
                                        for name, count in story.STEPS.items()}),
              "no equal": without("equal"), "better only": without("identity", "equal", "contrast"),
              "the paper's three": without("contrast")},
    "pairs": {"the paper's": Variant(data.Pairing()), "only --dominance": Variant(data.Pairing(dominance=True)),
              "recipe, --subset 0.5": paired(subset=0.5), "recipe, no --best": paired(best=0.0),
              "recipe, no --keep": paired(keep=0.0), "recipe, --keep 0.2": paired(keep=0.2),
              "recipe, not --dominance": paired(dominance=False), RECIPE: Variant(),
              "recipe, no damage": Variant(rating={"damage": ()})},
    "unseen": {RECIPE: Variant()},
    "rounds": {RECIPE: Variant()},
    "several": {RECIPE: Variant()},
}
QUESTIONS = 40  # to each policy, for each variant and seed
UNSEEN = ("avoid", "mention", "begin", "end", "twice", "butnot")  # of words never read; the last two of any word


# ----------------------------------------------------------------------------------------------------------------
# One variant


def train_variant(out, folder, variant, seed, scale, device):
    """Train a variant's aligner into a folder, on a foundation that variants of its shape share."""
    kind, width = variant.shape["model_type"], variant.shape["hidden_size"]
    base = out / f"foundation-{variant.optimizer}-{kind}-{width}-{seed}"
    options = replace(story.RECIPE, optimizer=variant.optimizer, lr=variant.lr)
    texts = story.pretrain(base, seed, device, shape=variant.shape, options=options)
    steps = {name: math.ceil(scale * count) for name, count in variant.steps.items()}
    questions = math.ceil(story.QUESTIONS * max(steps.values()) / max(story.STEPS.values()))
    pairs = story.write_pairs(folder, seed, variant.pairing, questions, variant.worded, **variant.rating)
    story.train_aligner(folder, base / "foundation", pairs, texts, seed, device, steps, options)


def answered(seed, count):
    """{policy: (prompts, answers)}, other ones for each seed; the answers are of the policies' manners, as scripted."""
    rng, found = random.Random(f"ablation {seed}"), {}
    for policy in toy.POLICIES:
        prompts = [toy.question(rng)[0] for _ in range(count)]
        found[policy] = prompts, [toy.answer(policy, prompt, rng) for prompt in prompts]
    return found


def all_kinds(aligner, seed, count, name="", **sampling):
    """{name: the table of every kind of request, and under "summary" the lines that are told of it}."""
    items = [item for policy, (prompts, answers) in answered(seed, count).items()
             for item in measure.requests(policy, prompts, answers, seed)]
    edited = story.edit(aligner, items, seed, **sampling)
    return {name: {**measure.figures(edited), "summary": measure.summary(edited)}}


def one_by_one(aligner, seed, count):
    """{number of unseen wishes asked for: table}, three trained objectives always with them, in one random order for
    each question. A kind is one objective: what became of it when so many were asked for."""
    rng, found = random.Random(f"unseen {seed}"), {}
    asked = []
    for policy, (prompts, answers) in answered(seed, count).items():
        for prompt, answer in zip(prompts, answers):
            asked.append((policy, prompt, answer, rng.sample(list(toy.NAMED), 3), unseen_wishes(rng, answer)))
    for number_asked in range(len(UNSEEN) + 1):
        items = [item_of(policy, prompt, answer, [*named, *wishes[:number_asked]])
                 for policy, prompt, answer, named, wishes in asked]
        edited = story.edit(aligner, items, seed)
        parts = {"trained": (0, 3), "unseen": (3, 9), "the first unseen": (3, 4)}
        found[str(number_asked)] = {
            kind: measure.figures([{**item, "judged": item["names"][begin:end]} for item in edited])["all"]
            for kind, (begin, end) in parts.items() if number_asked or kind == "trained"}
    return found


def unseen_wishes(rng, answer):
    """Names of the six unseen wishes in a random order, about different words, but that "avoid" and "butnot" may name
    the same: what is to be taken out is what the answer names, where it names any (for "avoid", of those never read).
    """
    said = [word for word in wordings.WORDS if toy.mentions(answer, word)]
    unread = [word for word in said if word in wordings.HELD_OUT_WORDS]
    never = rng.sample([word for word in wordings.HELD_OUT_WORDS if word not in said], 5)
    trained = rng.sample([word for word in wordings.TRAINED_WORDS if word not in said], 2)
    names = [f"avoid_{(unread or never)[0]}", f"mention_{never[1]}", f"begin_{never[2]}", f"end_{never[3]}",
             f"twice_{trained[0]}", f"butnot_{trained[1]}_{(said or never[4:])[-1]}"]
    return rng.sample(names, len(names))


def item_of(policy, prompt, answer, names):
    rng = random.Random(f"{prompt} {names}")
    return {"policy": policy, "kind": "asked", "prompt": prompt, "original": answer, "names": names,
            "objectives": [wordings.worded(rng, name, "pairs") for name in names]}


def rounds_and_numbers(aligner, seed, count):
    """{"1 asked", ..., "9 asked": table}, and {"round 2", "round 3": table} of these nine, asked for again and again.
    """
    found, everything = {}, answered(seed, count)
    rng = random.Random(f"numbers {seed}")
    for asked in (1, 3, 6, 9):
        items = [item_of(policy, prompt, answer, rng.sample(list(toy.NAMED), asked))
                 for policy, (prompts, answers) in everything.items() for prompt, answer in zip(prompts, answers)]
        edited = story.edit(aligner, items, seed)
        found[f"{asked} asked"] = {"all": measure.figures(edited)["all"]}
    for turn in (2, 3):  # of the nine, against the policy's own answer
        again = story.edit(aligner, [{**item, "original": item["aligned"]} for item in edited], seed)
        edited = [{**item, "aligned": new["aligned"]} for item, new in zip(edited, again)]
        found[f"round {turn}"] = {"all": measure.figures(edited)["all"]}
    return found


def best_of_several(aligner, seed, count):
    """{"": the table of the likeliest edits, "best of 2": ..., "best of 8": ...}, of every kind of request each."""
    found = all_kinds(aligner, seed, count)
    for several in (2, 8):
        found |= all_kinds(aligner, seed, count, f"best of {several}", choice=Choice(several))
    return found


MEASURED = {"unseen": one_by_one, "rounds": rounds_and_numbers, "several": best_of_several}  # others: all_kinds


# ----------------------------------------------------------------------------------------------------------------
# All of them, and their figures


def run_variant(out, figure, name, seed, scale, count, device):
    """Train and measure a variant, unless that was done by this code. Gives its rows."""
    code = code_of("ablate")
    variant, folder = FIGURES[figure][name], out / f"{plain(name)}-{seed}"
    results = f"{figure}.json" if figure in MEASURED else "kinds.json"
    with whole_run(folder, {"variant": asdict(variant), "seed": seed, "scale": scale}, "ablate"):
        def make():
            train_variant(out, folder, variant, seed, scale, device)
            tables = MEASURED.get(figure, all_kinds)(Writer(folder / "aligner", device), seed, count)
            write_jsonl(folder / results, [tables])
        kept(folder, results, [count, code], make)
    tables = files.read_json(folder / results)
    about = {"figure": figure, "variant": name, "seed": seed, "scale": scale, "questions": count, "code": digest(code)}
    return [{**about, "at": at, "kind": kind, "measure": measured, **cell} for at, table in tables.items()
            for kind, cells in table.items() for measured, cell in cells.items()]


def plain(text):
    return "-".join("".join(c if c.isalnum() or c in ". " else " " for c in text).split())


def gathered(rows):
    """{figure: {name: {line: {seed: cell}}}} of rows, a name being a variant's, and what it was measured at; a cell has
    mean and interval."""
    found = {}
    for row in rows:
        kinds = found.setdefault(row["figure"], {}).setdefault(f"{row['variant']} {row['at']}".strip(), {})
        cells = kinds.setdefault(row["kind"], {}).setdefault(row["measure"], {})
        cells[row["seed"]] = {"mean": row["mean"], "interval": row["interval"]}
    return {figure: {name: complete(lines_of(kinds)) for name, kinds in names.items()}
            for figure, names in found.items()}


def complete(lines):
    """Of {line: {seed: cell}} the lines that all seeds have; a mean over some of them would be taken for that of all.
    """
    most = max(map(len, lines.values()), default=0)
    return {line: seeds for line, seeds in lines.items() if len(seeds) == most}


def lines_of(kinds):
    """{line: {seed: cell}} of {kind: {measure: {seed: cell}}}: the summary's, or else net of each kind, and worse and
    kept, which are of all that was asked for."""
    if "summary" in kinds:
        return kinds["summary"]
    edits = next(iter(kinds.values()))
    return ({f"net, {kind}": cells["net"] for kind, cells in kinds.items() if "net" in cells}
            | {measured: edits[measured] for measured in ("worse", "kept") if measured in edits})


def joined(seeds):
    """(mean, half the width of its 95 % interval over seeds, the same over prompts) of {seed: cell}; each seed asks
    questions of its own, so that their doubts are added as squares."""
    halves = [(cell["interval"][1] - cell["interval"][0]) / 2 for cell in seeds.values() if cell["interval"]]
    over_prompts = math.hypot(*halves) / len(seeds) if len(halves) == len(seeds) else None
    return *over_seeds([cell["mean"] for cell in seeds.values()]), over_prompts


def beside(lines, recipe):
    """{line: (mean, half an interval over seeds, None)} of the differences to the recipe, seed by seed."""
    found = {}
    for line, seeds in lines.items():
        differences = [cell["mean"] - recipe[line][seed]["mean"] for seed, cell in seeds.items()
                       if seed in recipe.get(line, {})]
        if differences:
            found[line] = *over_seeds(differences), None
    return found


def report(out, rows):
    """A page and a text of tables, a chart of what is asked for in each figure."""
    parts, texts = [f"<p>{LEGEND}</p>"], []
    for figure, variants in gathered(rows).items():
        label, recipe = labels(variants), variants.get(RECIPE, {})
        cells = {label[name]: {line: joined(seeds) for line, seeds in lines.items()}
                 for name, lines in variants.items()}
        names = list(dict.fromkeys(line for found in cells.values() for line in found))
        charted = [name for name in names if name.startswith("net")][:3]
        bars = [bar_of(name, found, charted) for name, found in cells.items() if found.keys() & charted]
        parts += [f"<h2>{figure}</h2>", f'<div class="card"><p class="small">{"; ".join(charted)}</p>',
                  bar_chart(bars, -100, 100, "; ".join(charted)), "</div>"]
        cells |= {f"{label[name]}, less the recipe": beside(lines, recipe) for name, lines in variants.items()
                  if recipe and name != RECIPE}
        parts.append(html_table(["", *names], [(key, *(told(found.get(name)) for name in names))
                                               for key, found in cells.items()]))
        texts += [figure] + [f"  {key}: " + "; ".join(f"{name} {told(value)}" for name, value in found.items())
                             for key, found in cells.items()]
    write_page(out / "report.html", "nanoalign: what generalisation takes", parts)
    return "\n".join([*texts, LEGEND])


def labels(variants):
    """{name: as it is told} of variants: with the number of its seeds where others have more."""
    counts = {name: max(map(len, lines.values()), default=0) for name, lines in variants.items()}
    most = max(counts.values())
    return {name: name if count == most else f"{name} ({count} of {most} seeds)" for name, count in counts.items()}


def bar_of(name, cells, lines):
    """A line of the chart, a bar for each of the lines."""
    means = [(line, cells[line][0]) for line in lines if line in cells]
    bars = [(0, mean, "after" if line == lines[0] else "before") for line, mean in means]
    return name, bars, None, ", ".join(f"{mean:.0f}" for _, mean in means)


def told(value):
    """A triple as `joined` gives it as text."""
    if value is None:
        return "-"
    mean, seeds, prompts = value
    return f"{mean:+.1f}" + (f" ±{seeds:.1f}" if seeds is not None else "") + (
        f" (±{prompts:.1f})" if prompts is not None else "")


def same(row, other, *keys):
    return all(row.get(key) == other[key] for key in keys)


LEGEND = "±: 95 % over seeds (Student's t); in brackets over prompts (bootstrap). Less the recipe: seed by seed."


def main():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--out", default="runs/ablate", metavar="FOLDER", help="where everything is written (default runs/ablate)")
    add("--figures", nargs="+", choices=list(FIGURES), default=list(FIGURES), metavar="F", help="which (default: all)")
    add("--variants", nargs="+", metavar="V", help='by their names, as they are told: "the recipe" (default: all)')
    add("--seeds", nargs="+", type=number(int, 0, 2**40), default=[0, 1, 2], metavar="N",
        help="of data, training and questions (0 1 2)")
    add("--scale", type=number(float, 0.001, 100), default=1.0, help="share of the story's optimizer steps that an "
        "aligner takes; its foundation always reads as long as the story's (default 1)")
    add("--questions", type=number(int, 1), default=QUESTIONS, help=f"to each policy (default {QUESTIONS})")
    add("--device", default=None, help="cpu, cuda, ... (default: cuda where there is one)")
    args = parser.parse_args()
    there = list(dict.fromkeys(name for figure in args.figures for name in FIGURES[figure]))
    wanted = args.variants or there
    if unknown := [name for name in wanted if name not in there]:
        parser.error(f"--variants: {unknown[0]!r} is not in these --figures; there are: {'; '.join(there)}")
    out, device = Path(args.out), device_named(args.device)
    tasks = [(figure, name, seed) for seed, figure in itertools.product(args.seeds, args.figures)
             for name in FIGURES[figure] if name in wanted]
    for place, (figure, name, seed) in enumerate(tasks, 1):
        announce(f"{place} of {len(tasks)}: {figure}, {name}, seed {seed}")
        made = run_variant(out, figure, name, seed, args.scale, args.questions, device)
        before = [row for _, row in files.records(out / "rows.jsonl")] if (out / "rows.jsonl").exists() else []
        asked = "figure", "variant", "seed", "scale", "questions"
        rows = [row for row in before if "code" in row and not same(row, made[0], *asked)] + made
        write_jsonl(out / "rows.jsonl", rows)
        text = report(out, [row for row in rows if same(row, made[0], "scale", "questions", "code")])
    print(text)


if __name__ == "__main__":
    cli(main)
