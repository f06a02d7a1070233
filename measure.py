"""What an edit does to what was asked for, and to what was not: exact figures on the embedded world.

MetaAligner's paper measures objectives that are named in the prompt. The figures here are of all nine, and of the text:

    net        wins minus losses of the edits against the unedited answers, on what was asked for, where there is room
    worse      unnamed objectives that an edit makes worse: share of (edit, unnamed objective)
    moved      those that it makes better or worse
    unchanged  edits that leave the answer as it is, where nothing asked for can improve
    kept       share of the answer's sentences that stand in the edit, in the same order
    beyond     sentences taken out or put in beyond those of the smallest edit that does what was asked; ten at most,
               since a few edits that come to no end would rule the mean
    garbled    edits with a new sentence that this world does not know, or about a word that nobody has named
    repeated   edits that say again what they have said, more often than the answer does

Nothing that is asked for "in pretraining only" is in a pair: of these wordings, and this verb, the foundation has read
in texts that correct no answer.

An item is {"policy", "kind", "prompt", "original", "names", "objectives"}; edited, it has "aligned". A kind is one line
of the table: what was asked, and in which words.
"""
import itertools
import random
import re
from collections import Counter

import toy
import wordings
from eval import mean_and_interval
from report import html_table, in_common

KINDS = {  # kind -> the wordings of which its wishes are (wordings.say)
    "all nine": "pairs",
    "all nine, in pretraining only": "held out",
    "one of the nine": "pairs",
    "one of the nine, in pretraining only": "held out",
    "mention a trained word": "pairs",
    "mention a trained word, in pretraining only": "held out",
    "mention a word never read": "pairs",
    "avoid a trained word": "pairs",
    "avoid a trained word, in pretraining only": "held out",
    "avoid a word never read": "pairs",
    "other verbs": "pairs",
    "other verbs, in pretraining only": "held out",
    "a verb in pretraining only": "all",
    "combinations never read": "all",
}
OTHER_VERBS = [verb for verb in wordings.TRAINED_VERBS if verb not in ("mention", "avoid")]
PLAIN = {word.lower() for text in toy.DIGRESSIONS for word in re.findall(r"[\w'-]+", text)}


# ----------------------------------------------------------------------------------------------------------------
# What is asked


def requests(policy, prompts, answers, seed, kinds=KINDS):
    """Yield items: every answer is to be edited towards each kind once, except towards avoiding a word where it
    mentions none."""
    rng = random.Random(f"requests {policy} {seed}")
    for place, (prompt, answer) in enumerate(zip(prompts, answers)):
        named = [word for word in wordings.WORDS if toy.mentions(answer, word)]
        asked = asked_of(rng, place, answer, named)
        for kind, which in kinds.items():
            if kind in asked:
                names = asked[kind]
                yield {"policy": policy, "kind": kind, "prompt": prompt, "original": answer, "names": names,
                       "objectives": [wordings.worded(rng, name, which) for name in names]}


def asked_of(rng, place, answer, named):
    """{kind: names} for one answer, which mentions the words `named`. Both halves of a combination are to be done."""
    trained, second = rng.sample([word for word in wordings.TRAINED_WORDS if word not in named], 2)
    never = rng.choice(wordings.HELD_OUT_WORDS)
    one = [list(toy.NAMED)[place % len(toy.NAMED)]]
    there = [word for word in named if word in wordings.TRAINED_WORDS]  # which could be taken out
    verb = rng.choice([verb for verb in OTHER_VERBS if there or verb != "endwithout"])
    asked = {"all nine": rng.sample(list(toy.NAMED), len(toy.NAMED)), "one of the nine": one,
             "mention a trained word": [f"mention_{trained}"], "mention a word never read": [f"mention_{never}"],
             "other verbs": [wish(verb, answer, trained, there[0] if verb == "endwithout" else second)],
             "a verb in pretraining only": [f"{rng.choice(wordings.HELD_OUT_VERBS)}_{trained}"]}
    if named:
        kind = "avoid a word never read" if named[0] in wordings.HELD_OUT_WORDS else "avoid a trained word"
        asked[kind] = [f"avoid_{named[0]}"]
    asked["combinations never read"] = [f"butnot_{trained}_{there[0]}" if there else f"beginend_{trained}_{second}"]
    return asked | {f"{kind}, in pretraining only": names for kind, names in asked.items()
                    if f"{kind}, in pretraining only" in KINDS}


def wish(verb, answer, *words):
    """The name of a wish that the answer does not grant yet, unless by chance."""
    if verb in ("atmost", "atleast"):
        length = len(toy.sentences_of(answer)) + (-2 if verb == "atmost" else 2)
        return f"{verb}_{min(max(length, 2), len(wordings.NUMBERS) + 1)}"
    return "_".join([verb, *words[:2 if "Y" in wordings.VERBS[verb] else 1]])


# ----------------------------------------------------------------------------------------------------------------
# What became of it


def need(name, prompt, text):
    """How many sentences the smallest edit that brings an objective to its best takes out or puts in."""
    if name in toy.NAMED:
        trait, wanted = toy.NAMED[name]
        if wanted:
            return max(toy.best(name) - toy.traits(prompt, text).get(trait, 0), 0)
        return sum(toy.traits(prompt, sentence).get(trait, 0) for sentence in toy.sentences_of(text))
    verb, slots = wordings.parts(name)
    sentences = toy.counted(verb, text)
    if verb in ("atmost", "atleast"):
        return max(0, (len(sentences) - int(slots[0])) * (1 if verb == "atmost" else -1))
    about = [[toy.mentions(sentence, word) for sentence in sentences] for word in slots]
    if toy.VERBS[verb](*about):
        return 0
    missing, said = [not any(x) for x in about], [sum(x) for x in about]
    rest = [x for x, y in zip(about[0], about[-1]) if not y]  # what is left without what is said of the last word
    return {"mention": 1, "avoid": said[0], "begin": 1, "end": 1, "twice": 2 - said[0],
            "before": max(1, sum(missing)), "both": sum(missing), "beginboth": (about[0][:1] != [True]) + missing[-1],
            "endwithout": said[-1] + (rest[-1:] != [True]), "butnot": said[-1] + (not any(rest)),
            "beginend": (about[0][:1] != [True]) + (about[-1][-1:] != [True])}[verb]


def look(item):
    """What one edit did: {figure: list of numbers}, in shares of 1 (beyond: sentences). An item's "judged" are those of
    its names that "net" is about, where these are not all."""
    prompt, before, after = item["prompt"], item["original"], item["aligned"]
    scores = {name: (toy.score(name, prompt, before), toy.score(name, prompt, after))
              for name in dict.fromkeys([*item["names"], *toy.NAMED])}
    old, new = (toy.sentences_of(text) for text in (before, after))
    same = in_common(old, new)
    room = [name for name in item.get("judged", item["names"]) if scores[name][0] < toy.best(name)]
    done = all(scores[name][0] >= toy.best(name) for name in item["names"])
    asked = [scores[name] for name in room]
    unnamed = [scores[name] for name in toy.NAMED if name not in item["names"]]
    found = {"net": [(b < a) - (b > a) for b, a in asked],
             "worse": [b > a for b, a in unnamed], "moved": [b != a for b, a in unnamed],
             "kept": [same / len(old)] if old else [],
             "garbled": [not new or any(garbled(sentence, item) for sentence in set(new) - set(old))],
             "repeated": [len(new) - len(set(new)) > len(old) - len(set(old))]}
    if done:
        found["unchanged"] = [before == after]
    if room and len(item["names"]) == 1 and scores[room[0]][1] == toy.best(room[0]):
        found["beyond"] = [min(len(old) + len(new) - 2 * same - need(room[0], prompt, before), 10)]
    return found


def garbled(sentence, item):
    """Whether a new sentence of an edit makes no sense: see above."""
    if "garbled" in toy.traits(item["prompt"], sentence):
        return True
    if not toy.DIGRESSION.fullmatch(sentence):
        return False
    known = " ".join([item["original"], *(objective.description for objective in item["objectives"])])
    return not any(toy.mentions(known, word) for word in re.findall(r"[\w'-]+", sentence) if word.lower() not in PLAIN)


FIGURES = ("net", "worse", "moved", "unchanged", "kept", "beyond", "garbled", "repeated")


def by_kind(items):
    """{kind: {figure: [(number, policy, prompt)]}} of edited items; a last kind, "all", is of all items."""
    found = {}
    for item in items:
        for figure, numbers in look(item).items():
            for kind in (item["kind"], "all"):
                values = found.setdefault(kind, {}).setdefault(figure, [])
                values.extend((0.01 * number if figure == "beyond" else number, item["policy"], item["prompt"])
                              for number in numbers)
    return {kind: found.get(kind, {}) for kind in [*(kind for kind in KINDS if kind in found), "all"]}


def mean_of(parts, seed):
    """{"mean", "interval", "n"} of lists of (number, policy, prompt), in points (of shares of 1: 0 to 100): the mean
    over the lists of their means over policies, however many numbers each has; its interval by bootstrap over prompts,
    in which the policies' shares vary with the prompts drawn: rather too wide than too narrow."""
    weights = []
    for part in parts:
        counts = Counter(policy for _, policy, _ in part)
        weights += [1 / (len(counts) * counts[policy]) for _, policy, _ in part]
    numbers, _, prompts = zip(*itertools.chain(*parts))
    mean, interval = mean_and_interval(numbers, prompts, seed, weights)
    return {"mean": mean, "interval": interval, "n": len(numbers)}


def figures(items, seed=0):
    """{kind: {figure: {"mean", "interval", "n"}}} of edited items, in points (beyond: sentences); each policy counts
    alike."""
    return {kind: {figure: mean_of([found[figure]], seed) for figure in FIGURES if found.get(figure)}
            for kind, found in by_kind(items).items()}


SUMMARY = {  # line of the summary -> (figure, the kinds over which it is a mean)
    "net, trained wordings": ("net", ("all nine", "one of the nine", "mention a trained word", "avoid a trained word",
                                      "other verbs")),
    "net, wordings in pretraining only": ("net", tuple(kind for kind in KINDS if kind.endswith("pretraining only")
                                                       and kind != "a verb in pretraining only")),
    "net, words never read": ("net", ("mention a word never read", "avoid a word never read")),
    "net, combinations never read": ("net", ("combinations never read",)),
    "net, a verb in pretraining only": ("net", ("a verb in pretraining only",)),
} | {figure: (figure, ("all",)) for figure in FIGURES[1:]}


def summary(items, seed=0):
    """{line of SUMMARY: {"mean", "interval", "n"}} of edited items. Of several kinds each counts alike, and in a kind
    each policy; in "all", each by how many edits it has."""
    found, lines = by_kind(items), {}
    for line, (figure, kinds) in SUMMARY.items():
        parts = [found[kind][figure] for kind in kinds if found.get(kind, {}).get(figure)]
        if parts:
            lines[line] = mean_of(parts, seed)
    return lines


LEGEND = """
net: wins - losses on what was asked, where it could be better; worse, moved: unnamed objectives made worse, and
changed either way; unchanged: answers left as they are where nothing asked could improve; kept: sentences of the
answer that survive in the edit; beyond: sentences changed beyond the smallest edit that does it (where it was done; ten
at most);
garbled: edits with a sentence that makes no sense; repeated: with one said again. All in %, but for beyond. In
pretraining only: in wordings, or by a verb, of which the foundation has read, while no pair asks so"""


def told(value, figure="", bounds=True):
    """A cell of a table as text: its mean, and its interval where it has one."""
    if value is None:
        return "-"
    low_high = ", ".join(f"{bound:.1f}" for bound in value.get("interval") or [])
    return f"{value['mean']:{'+.0f' if figure == 'net' else '.1f'}}" + (f" [{low_high}]" if bounds and low_high else "")


def table_text(table):
    """The table of `figures` for a terminal."""
    lines = [f"{'asked for':<44}" + "".join(f"{figure:>10}" for figure in FIGURES)]
    lines += [f"{kind:<44}" + "".join(f"{told(table[kind].get(figure), figure, False):>10}" for figure in FIGURES)
              for kind in table]
    return "\n".join(lines)


def html(table):
    """The table of `figures` for a page, with its intervals where it has them."""
    return html_table(["asked for", *FIGURES], [(kind, *(told(found.get(figure), figure) for figure in FIGURES))
                                                for kind, found in table.items()])


# ----------------------------------------------------------------------------------------------------------------
# Would something simpler do?

DOUBTED = ("all nine", "one of the nine")  # the kinds of requests for which there are baselines
DOUBTS = ("Beside the edits: doing nothing; a foundation that is told question and objectives, but never saw the "
          "answer, its likeliest text; and edits towards another of the nine than they are judged on. Win rate: "
          "against golden answers; survive: the policy's sentences that stand in the text. All in %, over all "
          "policies.")
DOUBT_FIGURES = {"win rate": "win", "net": "net", "survive": "kept", "unnamed worse": "worse", "garbled": "garbled"}


def asked_for_another(items, seed):
    """Yield items that ask for one objective as items that ask for another of the nine, but are judged on the first."""
    rng = random.Random(f"another {seed}")
    for item in items:
        if len(item["names"]) == 1:
            name = rng.choice([name for name in toy.NAMED if name not in item["names"]])
            told = {"names": [name], "objectives": [wordings.worded(rng, name, "pairs")], "judged": item["names"]}
            yield {key: value for key, value in item.items() if key != "aligned"} | told  # edited anew


def doubts(others, seed=0):
    """{"kind: who": {figure: {"mean", "interval", "n"}}} of {who: items}, in points."""
    found = {}
    for kind, who in itertools.product(DOUBTED, others):
        items = [item for item in others[who] if item["kind"] == kind]
        if items:
            table = figures(items, seed)[kind]
            wins, prompts = [wins_over_golden(item, seed) for item in items], [item["prompt"] for item in items]
            mean, interval = mean_and_interval(wins, prompts, seed)
            table["win"] = {"mean": mean, "interval": interval, "n": len(items)}
            found[f"{kind}: {who}"] = {name: table[name] for name in DOUBT_FIGURES.values() if name in table}
    return found


def wins_over_golden(item, seed):
    """The share of what an item is judged on, on which its text beats a golden answer to the prompt; ties are half."""
    prompt, golden = item["prompt"], toy.golden(item["prompt"], random.Random(f"golden {item['prompt']} {seed}"))
    names = item.get("judged", item["names"])
    scores = [(toy.score(name, prompt, item["aligned"]), toy.score(name, prompt, golden)) for name in names]
    return sum((ours > theirs) + 0.5 * (ours == theirs) for ours, theirs in scores) / len(scores)


def doubts_table(found):
    """(head, rows) of `doubts` as texts."""
    return ["", *DOUBT_FIGURES], [[who, *(told(table.get(name)) for name in DOUBT_FIGURES.values())]
                                  for who, table in found.items()]
