"""The ablations: which variants there are, when they are measured anew, and their figures for scripted edits."""
import json
import math
import re

import pytest

import ablate
import data
import measure
import resume
import story
import toy
import train
import wordings
from common import digest
from conftest import refused, run
from model import Config, Llama

VARIANTS = {name: variant for variants in ablate.FIGURES.values() for name, variant in variants.items()}
JOKE = toy.SENTENCES["joke"][0]


# ----------------------------------------------------------------------------------------------------------------
# Variants


def test_a_name_is_one_variant_and_only_the_recipe_is_in_several_figures():
    names = [name for variants in ablate.FIGURES.values() for name in variants if name != ablate.RECIPE]
    assert len(set(names)) == len(names)
    recipes = [variants[ablate.RECIPE] for variants in ablate.FIGURES.values() if ablate.RECIPE in variants]
    assert len(recipes) > 1 and set(map(repr, recipes)) == {repr(ablate.Variant())}
    told = [json.dumps(ablate.asdict(variant), sort_keys=True) for variant in VARIANTS.values()]
    assert len(set(told)) == len(told)  # no two names train the same


def test_different_names_have_different_folders():
    folders = [ablate.plain(name) for name in VARIANTS]
    assert len({folder.lower() for folder in folders}) == len(folders)
    assert all(re.fullmatch(r"[\w.][\w.-]*", folder) for folder in folders), folders


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_can_be_trained(name):
    variant = VARIANTS[name]
    assert variant.steps and set(variant.steps) <= set(train.METHODS) and min(variant.steps.values()) > 0
    assert isinstance(variant.pairing, data.Pairing) and 0 <= variant.pairing.keep < 1
    rows = list(toy.rated(150, 1, **variant.rating))
    words = {slot for row in rows for scored in row["responses"][0]["scores"] for slot in wordings.parts(scored)[1]
             if not slot.isdigit()}
    if "words" in variant.rating:
        assert words <= set(variant.rating["words"]) and f"{len(variant.rating['words'])} words" == name
    else:
        assert words - set(wordings.TRAINED_WORDS)  # made-up ones too
    assert not words & set(wordings.HELD_OUT_WORDS)


def test_sizes_are_as_their_names_say():
    for name, variant in ablate.FIGURES["size"].items():
        parameters = sum(p.numel() for p in Llama(Config(vocab_size=3072, **variant.shape), 0).parameters()) / 1e6
        said = float(name[:-1]) if re.fullmatch(r"[\d.]+M", name) else 2
        assert 0.75 * said < parameters < 1.3 * said, (name, parameters)


def test_all_variants_answer_the_same_questions_of_a_seed():
    found = ablate.answered(0, 5)
    assert list(found) == list(toy.POLICIES) and found == ablate.answered(0, 5) != ablate.answered(1, 5)
    assert all(len(prompts) == len(answers) == 5 for prompts, answers in found.values())


# ----------------------------------------------------------------------------------------------------------------
# What is measured


def granted(name, prompt, text):
    """The text with a named objective at its best: what is missing stands at its end, what is not wanted is gone."""
    trait, wanted = toy.NAMED[name]
    sentences = toy.sentences_of(text)
    if not wanted:
        return " ".join(s for s in sentences if trait not in toy.traits(prompt, s))
    right = toy.RIGHT[toy.task_of(prompt)] if trait == "right" else toy.SENTENCES[trait][:1]
    missing = [s for s in right if s not in sentences] if toy.score(name, prompt, text) < toy.best(name) else []
    return " ".join([*sentences, *missing])


def open_wishes(item, text):
    """Those of an item's named objectives on which a text could be better."""
    return [name for name in item["names"] if name in toy.NAMED
            and toy.score(name, item["prompt"], text) < toy.best(name)]


@pytest.fixture
def scripted(monkeypatch):
    """Edits by a function (item, text) -> text instead of an aligner; gives what was to be edited."""
    def use(function):
        calls = []

        def edit(aligner, items, seed, **sampling):
            calls.append(items)
            return [{**item, "aligned": function(item, item["original"])} for item in items]
        monkeypatch.setattr(story, "edit", edit)
        return calls
    return use


def first_open(item, text):
    name = open_wishes(item, text)[:1]
    return granted(*name, item["prompt"], text) if name else text


def all_named(item, text):
    for name in open_wishes(item, text):
        text = granted(name, item["prompt"], text)
    return text


def share(items, wins):
    """The mean over policies of wins among what had room, in points; wins(number with room) -> number."""
    rates = []
    for policy in toy.POLICIES:
        room = [len(open_wishes(item, item["original"])) for item in items if item["policy"] == policy]
        rates.append(100 * sum(map(wins, room)) / sum(room))
    return sum(rates) / len(rates)


def test_asked_for_more_at_once_and_again_and_again(scripted):
    calls = scripted(first_open)
    found = ablate.rounds_and_numbers(None, 0, 6)
    numbers = sorted({len(items[0]["names"]) for items in calls})
    assert list(found) == [*(f"{number} asked" for number in numbers), "round 2", "round 3"]
    first = {len(items[0]["names"]): items for items in reversed(calls)}
    for number in numbers:
        net = found[f"{number} asked"]["all"]["net"]["mean"]
        assert net == pytest.approx(share(first[number], lambda room: min(room, 1))), number
    assert found["1 asked"]["all"]["net"]["mean"] == 100 and numbers[-1] == len(toy.NAMED)
    for turn in (2, 3):  # a round grants one wish more, and is measured against the policies' own answers
        net = found[f"round {turn}"]["all"]["net"]["mean"]
        assert net == pytest.approx(share(first[9], lambda room, turn=turn: min(room, turn))), turn
    assert [cell["mean"] for table in found.values() for cell in [table["all"]["garbled"]]] == [0] * len(found)
    answers = [[(item["prompt"], item["original"]) for item in items] for items in calls[:len(numbers)]]
    assert all(asked == answers[0] for asked in answers) and len(answers[0]) == 6 * len(toy.POLICIES)


def test_unseen_wishes_are_added_one_by_one(scripted):
    calls = scripted(all_named)
    found = ablate.one_by_one(None, 0, 6)
    assert list(found) == [str(number) for number in range(len(ablate.UNSEEN) + 1)]
    assert list(found["0"]) == ["trained"]
    for number in range(len(ablate.UNSEEN) + 1):
        table = found[str(number)]
        assert table["trained"]["net"] == found["0"]["trained"]["net"] and table["trained"]["net"]["mean"] == 100
        assert table["trained"]["moved"]["mean"] == table["trained"]["worse"]["mean"] == 0
        if number:
            assert table["unseen"]["net"]["mean"] == table["the first unseen"]["net"]["mean"] == 0
            assert table["the first unseen"]["net"] == found["1"]["unseen"]["net"]
    for number, items in enumerate(calls):
        for item, last in zip(items, calls[-1]):
            assert item["names"] == last["names"][:3 + number] and set(item["names"][:3]) <= set(toy.NAMED)
            assert item["original"] == last["original"]
    orders = [[wordings.parts(name)[0] for name in item["names"][3:]] for item in calls[-1]]
    expected = sorted(template.split("_")[0] for template in ablate.UNSEEN)
    assert all(sorted(order) == expected for order in orders) and len({tuple(order) for order in orders}) > 5


def test_every_edit_counts_once(scripted):
    scripted(lambda item, text: text)
    for found in (ablate.one_by_one(None, 0, 3), ablate.rounds_and_numbers(None, 0, 3)):
        for table in found.values():
            assert {cells["kept"]["n"] for cells in table.values()} == {3 * len(toy.POLICIES)}


def test_what_was_asked_for_beside_the_unseen_wishes_counts_as_asked(scripted):
    scripted(all_named)
    found = ablate.one_by_one(None, 0, 6)
    assert [cells["moved"]["mean"] for table in found.values() for cells in table.values()
            if "moved" in cells] == [0] * sum(len(table) for table in found.values())


def test_the_unseen_wishes_for_an_answer_can_be_granted_together(scripted):
    calls = scripted(lambda item, text: text)
    ablate.one_by_one(None, 0, 20)
    for item in calls[-1]:
        parts = [wordings.parts(name) for name in item["names"][3:]]
        avoided = [slots[-1] for verb, slots in parts if verb in ("avoid", "butnot")]
        wanted = [slot for verb, slots in parts for slot in (slots[:-1] if verb == "butnot" else slots)
                  if verb != "avoid"]
        assert not set(avoided) & set(wanted), item["names"]


# ----------------------------------------------------------------------------------------------------------------
# Measured once


@pytest.fixture
def untrained(monkeypatch):
    """Variants without a training, whose edits append a joke; gives what was trained and how many edits were made."""
    done = {"trained": [], "edited": []}
    monkeypatch.setattr(story, "pretrain", lambda out, seed, device, shape, options:
                        done["trained"].append((out.name, shape, (options.optimizer, options.lr))))
    monkeypatch.setattr(story, "write_pairs", lambda folder, *words, **more: done["trained"].append((words, more)))
    monkeypatch.setattr(story, "train_aligner", lambda *words:
                        done["trained"].append((words[0].name, words[-2], (words[-1].optimizer, words[-1].lr))))
    monkeypatch.setattr(ablate, "Writer", lambda folder, device: folder)

    def edit(aligner, items, seed, **sampling):
        done["edited"].append(len(items))
        return [{**item, "aligned": f"{item['original']} {JOKE}"} for item in items]
    monkeypatch.setattr(story, "edit", edit)
    return done


def test_a_variant_is_measured_once_by_the_same_code_on_the_same_questions(untrained, tmp_path, monkeypatch):
    def rows(figure="steps", count=2, name=ablate.RECIPE, seed=0):
        untrained["edited"].clear()
        return ablate.run_variant(tmp_path, figure, name, seed, 1.0, count, "cpu"), len(untrained["edited"])
    first, edits = rows()
    assert edits == 1 and {row["figure"] for row in first} == {"steps"}
    assert set(measure.KINDS) - {"avoid a word never read", "avoid a trained word"} <= {row["kind"] for row in first}
    assert {row["measure"] for row in first if row["kind"] == "summary"} >= {"net, trained wordings", "worse", "kept"}
    assert rows() == (first, 0)
    words, edits = rows("words")  # the recipe again: the same aligner, the same figures
    assert edits == 0 and words == [{**row, "figure": "words"} for row in first]
    others, edits = rows("rounds")
    assert edits > 1 and {row["at"] for row in others} >= {"round 2", "9 asked"} and rows("rounds")[1] == 0
    several, edits = rows("several")
    assert edits == 3 and {row["at"] for row in several} == {"", "best of 2", "best of 8"} and rows()[1] == 0
    assert rows(seed=1)[1] == rows(name="no equal")[1] == 1
    fewer, edits = rows(count=1)
    assert edits == 1 and fewer != first and rows(count=1) == (fewer, 0)
    monkeypatch.setattr(ablate, "code_of", lambda script: {script: "edited"})
    fewer = [{**row, "code": digest({"ablate": "edited"})} for row in fewer]
    assert rows(count=1) == (fewer, 1) and rows(count=1) == (fewer, 0)
    folder = tmp_path / f"{ablate.plain(ablate.RECIPE)}-0"
    assert resume.read_run(folder)["ended"] and {path.name for path in folder.glob("*.json")} >= {"rounds.json"}


def test_a_variant_is_trained_as_its_name_says(untrained, tmp_path):
    variant = ablate.FIGURES["words"]["10 words"]
    ablate.run_variant(tmp_path, "words", "10 words", 3, 0.5, 1, "cpu")
    (base, shape, first), (how, rating), (_, steps, last) = untrained["trained"]
    seed, pairing, questions, worded = how
    assert first == last == ("muon", 1e-2)
    assert shape == variant.shape and base.endswith("-3") and seed == 3
    assert (pairing, worded, rating) == (variant.pairing, True, variant.rating)
    assert steps == {name: math.ceil(count / 2) for name, count in story.STEPS.items()}
    assert questions == math.ceil(story.QUESTIONS / 2)
    assert {row["scale"] for row in ablate.run_variant(tmp_path, "words", "10 words", 3, 0.5, 1, "cpu")} == {0.5}
    ablate.run_variant(tmp_path, "size", "AdamW", 3, 0.5, 1, "cpu")
    (other, _, first), _, (_, _, last) = untrained["trained"][3:]
    assert first == last == ("adamw", 3e-3) and other != base
    ablate.run_variant(tmp_path, "size", "no norms", 3, 0.5, 1, "cpu")
    (third, shape, _), _, (_, _, last) = untrained["trained"][6:]
    assert last == ("muon", 5e-3) and shape["model_type"] == "llama" and len({base, other, third}) == 3


def test_a_folder_of_another_scale_is_not_given_for_this_one(untrained, tmp_path, monkeypatch, capsys):
    words = ["--out", tmp_path, "--figures", "unseen", "--seeds", 0, "--questions", 1, "--device", "cpu", "--scale"]
    assert run(ablate, monkeypatch, [*words, 1]) == 0
    refused(ablate, monkeypatch, capsys, [*words, 2], "other scale (1.0, now 2.0)")
    refused(ablate, monkeypatch, capsys, [*words, 0], "--scale")


def test_the_command_writes_the_rows_and_a_page(untrained, tmp_path, monkeypatch, capsys):
    words = ["--out", tmp_path, "--figures", "words", "rounds", "--seeds", 0, 1, "--questions", 1, "--device", "cpu"]
    assert run(ablate, monkeypatch, words) == 0
    rows = [json.loads(line) for line in open(tmp_path / "rows.jsonl", encoding="utf-8")]
    assert {(row["figure"], row["variant"], row["seed"]) for row in rows} == {
        (figure, name, seed) for figure in ("words", "rounds") for name in ablate.FIGURES[figure] for seed in (0, 1)}
    keys = [tuple(row[key] for key in ("figure", "variant", "seed", "at", "kind", "measure")) for row in rows]
    assert len(set(keys)) == len(keys)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    shown = capsys.readouterr().out
    assert page.count("<svg") == 2 and all(name in page and name in shown for name in ablate.FIGURES["words"])
    untrained["edited"].clear()
    assert run(ablate, monkeypatch, words) == 0 and not untrained["edited"]
    assert [json.loads(line) for line in open(tmp_path / "rows.jsonl", encoding="utf-8")] == rows


def test_some_variants_by_their_names(untrained, tmp_path, monkeypatch, capsys):
    words = ["--out", tmp_path, "--seeds", 0, "--questions", 1, "--device", "cpu", "--figures", "steps", "pairs",
             "--variants"]
    assert run(ablate, monkeypatch, [*words, "no equal", ablate.RECIPE]) == 0
    rows = [json.loads(line) for line in open(tmp_path / "rows.jsonl", encoding="utf-8")]
    assert {(row["figure"], row["variant"]) for row in rows} == {
        ("steps", "no equal"), ("steps", ablate.RECIPE), ("pairs", ablate.RECIPE)}
    refused(ablate, monkeypatch, capsys, [*words, "no equal", "10 words"], "--variants", "'10 words'", "the paper's;")
    refused(ablate, monkeypatch, capsys, [*words, "no equal;"], "--variants", "'no equal;'")


def test_a_call_leaves_the_rows_of_others_and_tells_its_own_kind(untrained, tmp_path, monkeypatch, capsys):
    def call(figure, questions):
        words = ["--out", tmp_path, "--figures", figure, "--seeds", 0, "--questions", questions, "--device", "cpu"]
        assert run(ablate, monkeypatch, words) == 0
        rows = [json.loads(line) for line in open(tmp_path / "rows.jsonl", encoding="utf-8")]
        told = [line for line in capsys.readouterr().out.splitlines() if line in ablate.FIGURES]
        return {(row["figure"], row["questions"]) for row in rows}, told
    assert call("rounds", 1) == ({("rounds", 1)}, ["rounds"])
    assert call("unseen", 1) == ({("rounds", 1), ("unseen", 1)}, ["rounds", "unseen"])
    assert call("unseen", 2) == ({("rounds", 1), ("unseen", 1), ("unseen", 2)}, ["unseen"])
    made, others = ablate.run_variant, row(7, 1.0, figure="steps") | {"questions": 1, "code": "theirs"}

    def run_variant(*words):  # while another process writes a row
        text = (tmp_path / "rows.jsonl").read_text(encoding="utf-8")
        (tmp_path / "rows.jsonl").write_text(text + json.dumps(others) + "\n", encoding="utf-8")
        return made(*words)
    with monkeypatch.context() as patch:
        patch.setattr(ablate, "run_variant", run_variant)
        assert call("unseen", 1)[0] == {("rounds", 1), ("unseen", 1), ("unseen", 2), ("steps", 1)}
    monkeypatch.setattr(ablate, "code_of", lambda script: {script: "edited"})
    assert call("unseen", 1) == ({("rounds", 1), ("unseen", 1), ("unseen", 2), ("steps", 1)}, ["unseen"])


# ----------------------------------------------------------------------------------------------------------------
# Figures


def test_an_interval_over_seeds_is_students():
    """In closed form for one, two and four degrees of freedom; close to the normal one for many."""
    p = 0.975
    alpha = 4 * p * (1 - p)
    q = math.cos(math.acos(math.sqrt(alpha)) / 3) / math.sqrt(alpha)
    students = {2: math.tan(math.pi * (p - 0.5)), 3: 2 * (p - 0.5) * math.sqrt(2 / alpha), 5: 2 * math.sqrt(q - 1)}
    for count, student in students.items():
        values = [float(i * i) for i in range(count)]
        mean = sum(values) / count
        deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
        assert ablate.over_seeds(values) == (pytest.approx(mean), pytest.approx(student * deviation / math.sqrt(count),
                                                                                 rel=3e-3))
    assert ablate.over_seeds([7]) == (7, None) and ablate.over_seeds([3, 3, 3]) == (3, 0)
    halves = [ablate.over_seeds([0.0, 1.0] * n)[1] * math.sqrt(2 * n) for n in range(1, 20)]
    assert halves == sorted(halves, reverse=True) and 0.5 * 1.96 < halves[-1] < 0.53 * 2.03


def row(seed, mean, variant=ablate.RECIPE, at="", kind="all nine", measured="net", figure="steps", half=None):
    return {"figure": figure, "variant": variant, "seed": seed, "scale": 1.0, "at": at, "kind": kind,
            "measure": measured, "mean": mean, "interval": None if half is None else [mean - half, mean + half], "n": 4}


def test_rows_are_gathered_by_figure_variant_and_line():
    """A line that not all seeds have is left out."""
    rows = [row(0, 10), row(1, 30), row(0, 3, measured="garbled"), row(1, 60, kind="of seed 1"),
            row(0, 50, measured="worse"), row(1, 52, measured="worse"),
            row(0, -5, "other", "3"), row(0, 7, figure="pairs"), row(0, 51, kind="unseen", measured="worse"),
            row(0, 8, figure="pairs", kind="summary", measured="net, words")]
    assert ablate.gathered(rows) == {
        "steps": {ablate.RECIPE: {"net, all nine": {0: {"mean": 10, "interval": None},
                                                    1: {"mean": 30, "interval": None}},
                                  "worse": {0: {"mean": 50, "interval": None}, 1: {"mean": 52, "interval": None}}},
                  "other 3": {"net, all nine": {0: {"mean": -5, "interval": None}}}},
        "pairs": {ablate.RECIPE: {"net, words": {0: {"mean": 8, "interval": None}}}}}  # a summary is all that is told


def test_doubts_of_seeds_that_ask_other_questions_are_added_as_squares():
    seeds = {0: {"mean": 10, "interval": [7, 13]}, 1: {"mean": 30, "interval": [26, 34]}}
    assert ablate.joined(seeds) == (*ablate.over_seeds([10, 30]), pytest.approx(5 / 2))
    assert ablate.joined({0: seeds[0]}) == (10, None, 3)
    assert ablate.joined({**seeds, 2: {"mean": 20, "interval": None}})[2] is None


def test_a_variant_is_held_against_the_recipe_of_the_same_seed():
    variant = {"net": {seed: {"mean": mean} for seed, mean in ((0, 15), (1, 38), (7, 99))}, "kept": {7: {"mean": 1}}}
    recipe = {"net": {seed: {"mean": mean} for seed, mean in ((2, 0), (1, 30), (0, 10))}}
    assert ablate.beside(variant, recipe) == {"net": (*ablate.over_seeds([5, 8]), None)}


def test_the_report_tells_means_intervals_and_differences(tmp_path):
    rows = [row(0, 10, kind="all", half=3), row(1, 30, kind="all", half=4), row(0, -5, "other", "3", kind="all"),
            row(0, 2.25, "a <b>", kind="all", measured="worse"), row(1, 20, "less", kind="all"),
            row(0, 50, "other", kind="all", figure="size")]
    text = ablate.report(tmp_path, rows)
    half = ablate.over_seeds([10, 30])[1]
    assert text.splitlines()[:-1] == [
        "steps", f"  {ablate.RECIPE}: net, all +20.0 ±{half:.1f} (±2.5)", "  other 3 (1 of 2 seeds): net, all -5.0",
        "  a <b> (1 of 2 seeds): worse +2.2", "  less (1 of 2 seeds): net, all +20.0",
        "  other 3 (1 of 2 seeds), less the recipe: net, all -15.0", "  a <b> (1 of 2 seeds), less the recipe: ",
        "  less (1 of 2 seeds), less the recipe: net, all -10.0", "size", "  other: net, all +50.0"]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    cells = [re.sub("<.*?>", "|", line) for line in re.findall(r"<tr>(<td.*?)</tr>", page)]
    assert cells[:3] == [f"|{ablate.RECIPE}||+20.0 ±{half:.1f} (±2.5)||-|", "|other 3 (1 of 2 seeds)||-5.0||-|",
                         "|a &lt;b&gt; (1 of 2 seeds)||-||+2.2|"]
    assert "|less (1 of 2 seeds), less the recipe||-10.0||-|" in cells and ablate.told(None) == "-"
    assert [ablate.told(value) for value in ((1.25, None, None), (-1, 0.5, None), (0, 0.5, 2))] == [
        "+1.2", "-1.0 ±0.5", "+0.0 ±0.5 (±2.0)"]
