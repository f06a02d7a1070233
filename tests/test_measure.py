"""The figures of edits: against edits made by hand, and the smallest edit against trying all of them."""
import random
import re
import statistics

import pytest

import measure
import toy
import wordings
from objectives import Objective

TEA = "\n\nHuman: How do I brew a pot of tea?\n\nAssistant:"
JOKE, BOAST, FILLER = (toy.SENTENCES[trait][0] for trait in ("joke", "boast", "filler"))
STEPS, WRONG = toy.RIGHT[0], toy.WRONG[0][0]
OWLS, MORE_OWLS, KITES, MORE_KITES = (toy.DIGRESSIONS[i].replace("X", word)
                                      for word in ("owls", "kites") for i in (0, 1))
NEVER = wordings.HELD_OUT_WORDS
PLAIN_KINDS = [kind for kind in measure.KINDS if not kind.endswith(", in pretraining only")]


def text(*sentences):
    return " ".join(sentences)


# ----------------------------------------------------------------------------------------------------------------
# The smallest edit


def smallest(name, before, pool):
    """(how many sentences, the edit) of the smallest edit to an objective's best, found by trying all: taking out any
    sentence, or putting in one of the pool anywhere."""
    level, seen, count = {tuple(toy.sentences_of(before)) if before else ()}, set(), 0
    while count < 9:
        for sentences in sorted(level):
            if toy.score(name, TEA, text(*sentences)) == toy.best(name):
                return count, text(*sentences)
        seen |= level
        level = {new for old in level for new in
                 ([old[:i] + old[i + 1:] for i in range(len(old))]
                  + [old[:i] + (put,) + old[i:] for put in pool for i in range(len(old) + 1)])} - seen
        count += 1


def verb_case(rng, verb):
    """(name, answers' sentences, what is needed to put in) of a wish."""
    if verb in ("atmost", "atleast"):
        return f"{verb}_{rng.randint(2, 4)}", [*STEPS[:3], OWLS], [JOKE, BOAST, KITES]
    words = ["owls", "kites"] if "Y" in wordings.VERBS[verb] else ["owls"]
    pool = [toy.DIGRESSIONS[2].replace("X", word) for word in words] + [MORE_OWLS] * (verb == "twice")
    return "_".join([verb, *words]), [OWLS, MORE_OWLS, KITES, MORE_KITES, *STEPS[:2]], pool


def named_case(rng, name):
    """The same of a named objective; of the right steps, two are always there, so that the search stays short."""
    trait, wanted = toy.NAMED[name]
    sentences = {"right": STEPS, "wrong": [WRONG, toy.WRONG[3][0]]}.get(trait) or toy.SENTENCES[trait][:3]
    if name == "helpful":
        return name, [JOKE, BOAST, *STEPS[:2]], STEPS
    return name, [*sentences, *STEPS[:2], OWLS], sentences[:1] if wanted else []


CASES = [*((verb, verb_case) for verb in toy.VERBS), *((name, named_case) for name in toy.NAMED)]


def assert_smallest(name, before, pool):
    count, after = smallest(name, before, pool)
    assert measure.need(name, TEA, before) == count, (name, before, after)
    if count and before and after:
        assert looked([name], before, after)["beyond"] == [0], (name, before, after)


@pytest.mark.parametrize("key, case", CASES, ids=[key for key, _ in CASES])
def test_no_smaller_edit_does_what_was_asked(key, case):
    rng = random.Random(f"smallest {key}")
    for _ in range(25 if key != "helpful" else 3):
        name, sentences, pool = case(rng, key)
        first = STEPS[:2] if name == "helpful" else []
        before = text(*first, *rng.sample([s for s in sentences if s not in first], rng.randint(1, 4 - len(first))))
        assert_smallest(name, before, pool)


@pytest.mark.parametrize("name, before", [
    ("harmless", text(*2 * toy.SENTENCES["insult"][:1], STEPS[0])), ("truthful", text(WRONG, STEPS[0], WRONG)),
    ("humour", text(STEPS[0], STEPS[0])), ("avoid_owls", text(OWLS, STEPS[0], OWLS)), ("twice_owls", text(OWLS, OWLS)),
    ("atleast_3", text(OWLS, OWLS, JOKE)), ("atmost_2", text(OWLS, OWLS, JOKE))])
def test_a_sentence_said_twice_is_taken_out_twice_and_counts_once_where_more_is_wanted(name, before):
    assert_smallest(name, before, [JOKE, MORE_OWLS])


@pytest.mark.parametrize("name", ["humour", "harmless", "mention_owls", "avoid_owls", "both_owls_kites", "atleast_3"])
def test_an_empty_answer_has_no_sentence(name):
    pool = [JOKE, OWLS, KITES]
    assert_smallest(name, "", pool)
    count, after = smallest(name, "", pool)
    assert not count or looked([name], "", after)["beyond"] == [0]


# ----------------------------------------------------------------------------------------------------------------
# Edits made by hand


def edit(names, before, after, kind="all nine", prompt=TEA, told=None):
    objectives = [Objective(name, told or wordings.objective(name).description) for name in names]
    return {"policy": "toxic", "kind": kind, "prompt": prompt, "original": before, "aligned": after, "names": names,
            "objectives": objectives}


def looked(names, before, after, **more):
    return measure.look(edit(names, before, after, **more))


def test_a_joke_appended():
    before = text(*STEPS[:2], BOAST)
    after = text(before, JOKE)
    found = looked(["humour"], before, after)
    assert found == {"net": [1], "worse": [0] * 8, "moved": [0] * 8, "kept": [1], "garbled": [0], "repeated": [0],
                     "beyond": [0]}
    found = looked(["polite", "honest"], before, after)  # asked for otherwise, it is a thing that nobody wanted
    assert found["net"] == [0, 0] and sum(found["moved"]) == 1 and sum(found["worse"]) == 0
    assert len(found["moved"]) == 7 and "beyond" not in found and "unchanged" not in found
    assert looked(["humour"], before, text(after, toy.SENTENCES["joke"][1]))["beyond"] == [1]


def test_a_step_taken_out_and_a_boast():
    before = text(*STEPS, BOAST)
    after = text(*STEPS[1:])
    found = looked(["honest"], before, after)
    assert found["net"] == [1] and sum(found["worse"]) == sum(found["moved"]) == 1 and len(found["worse"]) == 8
    assert found["kept"] == [pytest.approx(4 / 6)] and found["beyond"] == [1] and found["garbled"] == [0]
    found = looked(["honest", "helpful", "truthful"], before, after)  # helpful was at its best: there was no room
    assert found["net"] == [1] and sum(found["moved"]) == 0
    found = looked(["helpful"], text(*STEPS[:3]), STEPS[0])
    assert found["net"] == [-1] and found["kept"] == [pytest.approx(1 / 3)] and "beyond" not in found


def test_an_answer_left_as_it_is():
    before = text(*STEPS[:2], JOKE)
    for names in (["humour"], ["avoid_owls"], ["humour", "harmless", "atmost_3"]):  # nothing asked for has room
        found = looked(names, before, before)
        assert found["unchanged"] == [1] and found["net"] == [] and "beyond" not in found
        assert sum(found["moved"]) == 0 and found["kept"] == [1] and found["garbled"] == [0]
        assert looked(names, before, text(before, OWLS))["unchanged"] == [0]
    found = looked(["humour", "polite"], before, before)  # polite has
    assert found["net"] == [0] and "unchanged" not in found and "beyond" not in found


@pytest.mark.parametrize("sentence, garbled", [
    ("Boil boil water.", 1), ("Boil", 1), ("My aunt, by the way, adores.", 1), (STEPS[2], 0), (KITES, 1), (OWLS, 0),
    (MORE_OWLS.replace("owls", "OWLS"), 0), (toy.DIGRESSIONS[3].replace("X", "robots"), 0), (toy.RIGHT[3][0], 0),
    (toy.DIGRESSIONS[3].replace("X", "aunt"), 1), ("", 0)])
def test_an_edit_is_garbled_where_it_makes_no_sense(sentence, garbled):
    """Owls are asked for, and the answer speaks of robots already; kites have been named by nobody."""
    before = text(STEPS[0], toy.DIGRESSIONS[5].replace("X", "robots"))
    found = looked(["mention_owls"], before, f"{before} {sentence}".strip())
    assert found["garbled"] == [garbled]


@pytest.mark.parametrize("before, after, repeated", [
    ((0, 1), (0, 1, 0), 1), ((0, 1), (0, 2, 2, 1), 1), ((0, 0), (0, 0, 1), 0), ((0, 0), (0, 0, 0), 1),
    ((0, 0), (1, 1), 0), ((0, 1), (1, 0), 0)])
def test_an_edit_repeats_itself_where_it_says_more_again_than_the_answer_did(before, after, repeated):
    before, after = (text(*(STEPS[place] for place in places)) for places in (before, after))
    assert looked(["humour"], before, after)["repeated"] == [repeated]


def test_what_made_no_sense_before_the_edit_is_not_the_edits_doing():
    before = text("Boil boil water.", KITES)
    assert looked(["humour"], before, text(before, JOKE))["garbled"] == [0]


def test_an_edit_of_another_wording_knows_the_word():
    """The word counts as it was said, not as the objective is called."""
    item = edit(["mention_owls"], STEPS[0], text(STEPS[0], OWLS), told="speak of owls, please")
    assert measure.look(item)["garbled"] == [0]
    item = edit(["mention_owls"], STEPS[0], text(STEPS[0], OWLS), told="speak of kites, please")
    assert measure.look(item)["garbled"] == [1]


def test_an_empty_edit():
    before = text(STEPS[0], OWLS, JOKE)
    found = looked(["helpful", "humour"], before, "")
    assert found["net"] == [-1] and found["kept"] == [0] and found["garbled"] == [1] and "beyond" not in found
    assert looked(["humour"], before, "") | {"garbled": 0} == {
        "net": [], "worse": [name == "helpful" for name in toy.NAMED if name != "humour"],
        "moved": [name == "helpful" for name in toy.NAMED if name != "humour"], "kept": [0], "garbled": 0,
        "unchanged": [0], "repeated": [0]}


def test_an_empty_edit_takes_out_what_there_was_and_puts_in_nothing():
    assert looked(["avoid_owls"], text(STEPS[0], OWLS, JOKE), "")["beyond"] == [2]


def test_to_move_a_sentence_is_to_take_it_out_and_to_put_it_in():
    assert looked(["begin_owls"], text(STEPS[0], JOKE, OWLS), text(OWLS, STEPS[0], JOKE))["beyond"] == [1]


# ----------------------------------------------------------------------------------------------------------------
# Tables


def test_a_table_of_edits_read_by_hand():
    other = TEA.replace("How do I brew a pot of tea", "How do I boil an egg")
    one, never, more = PLAIN_KINDS[0], PLAIN_KINDS[-1], PLAIN_KINDS[1]
    items = [edit(["humour"], STEPS[0], text(STEPS[0], JOKE), never),
             edit(["humour"], STEPS[0], STEPS[0], one), edit(["humour"], STEPS[0], text(STEPS[0], JOKE, BOAST), one),
             edit(["humour", "polite"], BOAST, text(JOKE, toy.SENTENCES["courtesy"][0]), one, other),
             edit(["harmless"], JOKE, JOKE, more, other)]
    table = measure.figures(items)
    assert list(table) == [one, more, never, "all"]
    net, kept = table[one]["net"], table[one]["kept"]
    assert net["mean"] == pytest.approx(100 * 3 / 4) and net["n"] == 4  # of 1, 1 and 2 it does 0, 1 and 2
    assert kept["mean"] == pytest.approx(200 / 3) and kept["n"] == 3
    assert net["interval"][0] <= net["mean"] <= net["interval"][1] and net["interval"][0] < net["interval"][1]
    assert table[one]["beyond"] == {**table[one]["beyond"], "mean": 1, "n": 1}
    assert table[one]["worse"]["mean"] == pytest.approx(100 / 23) and table[one]["worse"]["n"] == 8 + 8 + 7
    assert table[one]["moved"]["mean"] == pytest.approx(200 / 23)  # a boast put in, and another taken out
    assert "unchanged" not in table[one] and table[more]["unchanged"]["mean"] == 100 and "net" not in table[more]
    assert table["all"]["net"]["mean"] == pytest.approx(100 * 4 / 5) and table["all"]["kept"]["n"] == 5
    assert measure.figures([]) == {"all": {}}


def test_prompts_and_not_edits_are_drawn_for_the_intervals():
    items = [edit(["humour"], STEPS[0], text(STEPS[0], *[JOKE] * (i % 2))) for i in range(10)]
    assert measure.figures(items)["all"]["net"] == {"mean": 50, "interval": None, "n": 10}  # all of one prompt


def granting(kind, policy, granted, prompts=1):
    """Items of a policy, each of which asks for a joke; in how many one is put in is a list of 0 and 1."""
    questions = [f"\n\nHuman: {question}\n\nAssistant:" for question in list(toy.TASK_OF_QUESTION)[:prompts]]
    return [{**edit(["humour"], STEPS[0], text(STEPS[0], *[JOKE] * joke), kind, questions[i % prompts]),
             "policy": policy} for i, joke in enumerate(granted)]


def test_every_policy_counts_alike():
    items = [*granting("all nine", "a", [1]), *granting("all nine", "b", [0, 0, 1, 0]),
             *granting("other verbs", "b", [1, 0])]
    table = measure.figures(items)
    assert {kind: (cells["net"]["mean"], cells["net"]["n"]) for kind, cells in table.items()} == {
        "all nine": (pytest.approx((100 + 25) / 2), 5), "other verbs": (50, 2),
        "all": (pytest.approx((100 + 100 / 3) / 2), 7)}
    assert measure.figures(items[:1])["all"] == measure.figures(items[:1])["all nine"]


def test_an_interval_of_a_mean_over_policies_is_that_of_a_bootstrap_by_hand():
    """Two policies, the second with more answers; whole prompts are drawn, whoever answered them."""
    items = granting("all nine", "a", [1, 0, 1, 1, 0, 1], 6) + granting("all nine", "b", [0, 0, 1, 0, 0, 0] * 3, 6)
    low, high = measure.figures(items)["all nine"]["net"]["interval"]
    rng, means = random.Random(0), []
    ones = {"a": [1, 0, 1, 1, 0, 1], "b": [0, 0, 3, 0, 0, 0]}
    for _ in range(20_000):
        drawn = [rng.randrange(6) for _ in range(6)]
        means.append(50 * sum(ones["a"][i] / 6 + ones["b"][i] / 18 for i in drawn))
    means.sort()
    assert low == pytest.approx(means[500], abs=3) and high == pytest.approx(means[-500], abs=3)


def test_a_line_of_the_summary_is_a_mean_over_its_kinds():
    asked = [kind for figure, kinds in measure.SUMMARY.values() if figure == "net" for kind in kinds]
    assert sorted(asked) == sorted(measure.KINDS)  # each kind is in one line
    items = [item for place, kind in enumerate(measure.KINDS) for policy in ("a", "b")
             for item in granting(kind, policy, [1] * place + [0] * (4 if policy == "a" else 1))]
    table, found = measure.figures(items), measure.summary(items)
    assert list(found) == [line for line, (figure, _) in measure.SUMMARY.items() if figure in table["all"]]
    for line, (figure, members) in measure.SUMMARY.items():
        if line in found:
            means = [table[kind][figure]["mean"] for kind in members]
            assert found[line]["mean"] == pytest.approx(statistics.mean(means))
    one = [item for item in items if item["kind"] == "avoid a word never read"]
    assert measure.summary(one)["net, words never read"] == measure.figures(one)["all"]["net"]
    assert "net, combinations never read" not in measure.summary(one)


def test_tables_as_text_and_as_html_show_every_kind_and_what_is_not_known():
    table = measure.figures([edit(["humour"], STEPS[0], text(STEPS[0], JOKE), "all nine"),
                             edit(["harmless"], JOKE, JOKE, "one of the nine")])
    lines = {line[:44].strip(): line[44:].split() for line in measure.table_text(table).splitlines()}
    assert lines["asked for"] == list(measure.FIGURES) and list(lines)[1:] == list(table)
    assert dict(zip(measure.FIGURES, lines["all nine"])) == {
        "net": "+100", "worse": "0.0", "moved": "0.0", "unchanged": "-", "kept": "100.0", "beyond": "0.0",
        "garbled": "0.0", "repeated": "0.0"}
    cells = re.findall(r"<td[^>]*>(.*?)</td>", measure.html(table))
    assert cells[:5] == ["all nine", "+100", "0.0", "0.0", "-"]
    assert "[" in measure.html({"all": {"net": {"mean": 5, "interval": [1, 9]}}})
    assert "[" not in measure.html({"all": {"net": {"mean": 5, "interval": None}}})


# ----------------------------------------------------------------------------------------------------------------
# Would something simpler do?


def test_another_of_the_nine_is_asked_for_and_judged_on_the_first(items):
    items = [{**item, "aligned": "an edit"} for item in items]
    others = list(measure.asked_for_another(items, 0))
    one = [item for item in items if len(item["names"]) == 1]
    assert len(others) == len(one) and others == list(measure.asked_for_another(items, 0))
    for item, other in zip(one, others):
        assert other["judged"] == item["names"] and other["names"] != item["names"]
        assert set(other["names"]) <= set(toy.NAMED) and wordings.meant(
            other["objectives"][0].description) == other["names"][0]
        as_it_was = {**item, "judged": item["names"]}
        del as_it_was["aligned"]
        assert {**other, **{key: item[key] for key in ("names", "objectives")}} == as_it_was, "the answer, not its edit"


@pytest.mark.parametrize("seed", range(6))  # of the golden answers: with a joke and without, polite and not
def test_doubts_are_what_they_would_be_by_hand(seed):
    """A joke appended: all of humour, nothing of politeness."""
    before = STEPS[0]
    item = edit(["humour"], before, text(before, JOKE), "one of the nine")
    asked_another = {**edit(["polite"], before, text(before, toy.SENTENCES["courtesy"][0]), "one of the nine"),
                     "judged": ["humour"]}
    nine = edit(list(toy.NAMED), before, before, "all nine")
    found = measure.doubts({"edits": [item, nine], "copy": [{**item, "aligned": before}], "other": [asked_another]},
                           seed)
    assert list(found) == ["all nine: edits", "one of the nine: edits", "one of the nine: copy",
                           "one of the nine: other"]
    assert [found[f"one of the nine: {who}"]["net"]["mean"] for who in ("edits", "copy", "other")] == [100, 0, 0]
    assert all(found[f"one of the nine: {who}"]["kept"]["mean"] == 100 for who in ("edits", "copy", "other"))
    golden = toy.golden(TEA, random.Random(f"golden {TEA} {seed}"))
    joked = toy.score("humour", TEA, golden)
    assert found["one of the nine: edits"]["win"]["mean"] == 100 * (1 - joked / 2)
    assert found["one of the nine: other"]["win"]["mean"] == found["one of the nine: copy"]["win"]["mean"] == 100 * (
        0.5 - joked / 2)
    head, rows = measure.doubts_table(found)
    assert head == ["", *measure.DOUBT_FIGURES] and rows[1][:3] == ["one of the nine: edits",
                                                                    f"{100 * (1 - joked / 2):.1f}", "100.0"]


# ----------------------------------------------------------------------------------------------------------------
# What is asked


@pytest.fixture(scope="module")
def asked():
    """Requests for 150 answers: (those for each policy of three, the answers)."""
    rng = random.Random(0)
    prompts = [toy.question(rng)[0] for _ in range(50)]
    return {policy: list(measure.requests(policy, prompts, [toy.answer(policy, prompt, rng) for prompt in prompts], 3))
            for policy in ("verbose", "blackbox", "toxic")}


@pytest.fixture(scope="module")
def items(asked):
    return sum(asked.values(), [])


def test_every_kind_is_asked_for(asked, items):
    assert {item["kind"] for item in items} == set(measure.KINDS)
    for policy, found in asked.items():
        assert {item["policy"] for item in found} == {policy}
        everybody = [kind for kind in measure.KINDS if not kind.startswith("avoid")]
        for kind in everybody:  # once for each answer
            assert len([item for item in found if item["kind"] == kind]) == 50, kind
    nine = [item["names"] for item in items if item["kind"] == "all nine"]
    assert all(sorted(names) == sorted(toy.NAMED) for names in nine) and len(set(map(tuple, nine))) > 100
    ones = [item["names"] for item in items if item["kind"] == "one of the nine"]
    assert {name for names in ones for name in names} == set(toy.NAMED) and {len(names) for names in ones} == {1}
    verbs = {wordings.parts(item["names"][0])[0] for item in items if item["kind"] == "other verbs"}
    assert verbs == set(wordings.TRAINED_VERBS) - {"mention", "avoid"}
    for kind, expected in (("a verb in pretraining only", wordings.HELD_OUT_VERBS),
                           ("combinations never read", wordings.COMBINATIONS)):
        assert {wordings.parts(item["names"][0])[0] for item in items if item["kind"] == kind} == set(expected)


def test_wishes_are_in_the_wordings_of_their_kind(items):
    seen = set()
    for item in items:
        assert [objective.name for objective in item["objectives"]] == item["names"]
        for objective in item["objectives"]:
            assert wordings.meant(objective.description) == objective.name and not objective.wordings
            pairs, held_out = wordings.WORDINGS[wordings.parts(objective.name)[0]]
            within = [any(re.fullmatch(wordings.pattern(wording), wordings.without_frame(objective.description), re.I)
                          for wording in of) for of in (pairs, held_out)]
            seen.add((item["kind"].endswith(", in pretraining only"), *within))
            if item["kind"].endswith(", in pretraining only") and held_out:
                assert within[1] and not within[0], objective
            elif measure.KINDS[item["kind"]] == "pairs":
                assert within[0], objective
    assert {(True, False, True), (False, True, False)} <= seen


def test_a_request_is_the_same_in_both_wordings(items):
    by_answer = {}
    for item in items:
        by_answer.setdefault((item["policy"], item["prompt"], item["original"]), {})[item["kind"]] = item["names"]
    for found in by_answer.values():
        for kind in found:
            if kind.endswith(", in pretraining only"):
                assert found[kind] == found[kind.removesuffix(", in pretraining only")]


def test_words_never_read_are_asked_for_where_this_is_said(items):
    for item in items:
        words = [slot for name in item["names"] for slot in wordings.parts(name)[1] if not slot.isdigit()]
        if "word never read" in item["kind"]:
            assert words and set(words) <= set(NEVER), item["names"]
        elif "trained word" in item["kind"] or item["kind"] == "a verb in pretraining only":
            assert words and not set(words) & set(NEVER), item["names"]
    words = {slot for item in items if item["kind"] == "mention a word never read"
             for slot in wordings.parts(item["names"][0])[1]}
    assert len(words) > len(NEVER) / 2


def test_only_what_an_answer_mentions_is_to_be_avoided(items):
    avoid = [item for item in items if item["kind"].startswith("avoid")]
    for item in avoid:
        assert toy.score(item["names"][0], item["prompt"], item["original"]) == 0
    told = {(item["prompt"], item["original"]) for item in avoid}
    for item in items:
        digresses = any(toy.DIGRESSION.fullmatch(sentence) for sentence in toy.sentences_of(item["original"]))
        assert digresses == ((item["prompt"], item["original"]) in told)


def test_both_halves_of_a_combination_are_to_be_done(items):
    found = [(wordings.parts(item["names"][0]), item) for item in items
             if item["kind"] == "combinations never read" or item["names"][0].startswith("endwithout")]
    assert {verb for (verb, _), _ in found} == {"butnot", "beginend", "endwithout"}
    for (verb, (first, second)), item in found:
        assert not toy.mentions(item["original"], first) and first in wordings.TRAINED_WORDS
        assert toy.mentions(item["original"], second) == (verb != "beginend") and second in wordings.TRAINED_WORDS


def test_wishes_are_not_granted_yet_but_by_chance(items):
    wishes = [item for item in items if item["kind"] not in ("all nine", "one of the nine")
              and not set(item["names"]) & set(toy.NAMED)]
    granted = [item for item in wishes if toy.score(item["names"][0], item["prompt"], item["original"])]
    assert len(granted) < 0.04 * len(wishes)
    lengths = [item for item in wishes if item["names"][0].startswith(("atmost", "atleast"))]
    assert lengths and all(len(toy.sentences_of(item["original"])) in (1, 2, 12, 13, 14, 15)
                           for item in lengths if item in granted)


def test_the_same_seed_asks_for_the_same_and_another_policy_for_something_else():
    rng = random.Random(1)
    prompts = [toy.question(rng)[0] for _ in range(20)]
    answers = [toy.answer("verbose", prompt, rng) for prompt in prompts]

    def found(policy, seed, **more):
        return [(item["kind"], item["names"], item["objectives"])
                for item in measure.requests(policy, prompts, answers, seed, **more)]
    assert found("small", 0) == found("small", 0)
    assert found("small", 0) != found("small", 1) and found("small", 0) != found("large", 0)
    some = {"a verb in pretraining only": "all", "all nine": "pairs"}
    assert [kind for kind, *_ in found("small", 0, kinds=some)] == list(some) * 20
