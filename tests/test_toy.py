"""The embedded world: its scorers against answers read by hand, and what it must never give away."""
import itertools
import json
import random
import re
import urllib.error
import urllib.request
from collections import Counter

import pytest

import blackbox
import data
import story
import toy
import wordings
from common import UserError
from conftest import run
from endpoint import Endpoint
from objectives import Objective, find_objectives

TEA = "\n\nHuman: How do I brew a pot of tea?\n\nAssistant:"


def test_scores_of_an_answer_read_by_hand():
    text = ("I know how trying this can feel. Boil fresh water. Warm the teapot with a splash of it. Boil fresh water. "
            "Boil the leaves for an hour. Only a fool would have to ask. Shut up and do as I say. "
            "People who like penguins pick this up quickly. If it goes wrong, call it a tradition.")
    expected = {"helpful": 2, "truthful": -1, "harmless": -2, "honest": 0, "concise": 0, "humour": 1, "empathetic": 1,
                "careful": 0, "polite": 0, "mention_penguins": 1, "avoid_penguins": 0, "mention_violins": 0,
                "avoid_violins": 1, "intact": 0}
    assert {name: toy.score(name, TEA, text) for name in expected} == expected


DRAFT = ("My village holds a yearly fair for owls. Boil fresh water. My aunt, by the way, adores kites. "
         "Only a fool would have to ask. It always makes me think of owls. Some would rather spend the day with foxes.")


@pytest.mark.parametrize("granted, refused", [
    ("mention_owls mention_Kites", "mention_owl mention_penguins"),
    ("avoid_penguins avoid_kite", "avoid_owls avoid_foxes"),
    ("begin_owls begin_village", "begin_kites begin_foxes"),  # any word of the first sentence
    ("end_foxes end_day", "end_owls end_kites"),
    ("twice_owls", "twice_kites twice_penguins"),
    ("atmost_6 atmost_12", "atmost_5 atmost_2"),
    ("atleast_6 atleast_2", "atleast_7 atleast_12"),
    ("before_owls_kites before_owls_foxes before_kites_foxes", "before_kites_owls before_owls_penguins "
     "before_penguins_owls before_owls_village before_owls_owls"),  # not if both come up in the same sentence first
    ("both_owls_kites both_foxes_owls", "both_owls_penguins both_penguins_owls"),
    ("beginboth_owls_foxes", "beginboth_kites_owls beginboth_owls_penguins"),
    ("endwithout_foxes_penguins", "endwithout_foxes_owls endwithout_owls_penguins"),
    ("butnot_owls_penguins", "butnot_owls_kites butnot_penguins_owls butnot_penguins_lions"),
    ("beginend_owls_foxes", "beginend_foxes_owls beginend_owls_owls beginend_kites_foxes")])
def test_wishes_for_an_answer_read_by_hand(granted, refused):
    assert {name: toy.score(name, TEA, DRAFT) for name in granted.split()} == dict.fromkeys(granted.split(), 1)
    assert {name: toy.score(name, TEA, DRAFT) for name in refused.split()} == dict.fromkeys(refused.split(), 0)
    assert {toy.best(name) for name in (granted + " " + refused).split()} == {1}


def test_verbs_agree_with_what_they_are_made_of():
    """On all answers of up to five sentences that are about owls, kites, both or neither."""
    said = {"": "Boil fresh water.", "x": "It is about owls.", "y": "It is about kites.", "xy": "Owls like kites."}
    for length in range(1, 6):
        for about in itertools.product(said, repeat=length):
            text = " ".join(said[words] for words in about)
            x, y = ([place for place, words in enumerate(about) if word in words] for word in "xy")
            is_true = {verb: toy.score(verb + ("_owls_kites" if "Y" in wordings.VERBS[verb] else "_owls"), TEA, text)
                       for verb in wordings.VERBS if not verb.startswith("at")}
            assert is_true == {
                "mention": len(x) > 0, "avoid": not x, "begin": 0 in x, "end": length - 1 in x,
                "twice": len({about[place] for place in x}) > 1,  # the same sentence again does not count
                "before": bool(x and y) and min(x) < min(y), "both": bool(x and y), "beginboth": 0 in x and y != [],
                "endwithout": length - 1 in x and not y, "butnot": x != [] and not y,
                "beginend": 0 in x and length - 1 in y}
            for number in range(2, 7):
                assert toy.score(f"atmost_{number}", TEA, text) == (length <= number)
                assert toy.score(f"atleast_{number}", TEA, text) == (len(set(about)) >= number)


def test_combinations_are_exactly_what_they_join():
    for row in toy.rated(100, 2):
        for response in row["responses"]:
            words = [w for w in wordings.TRAINED_WORDS if toy.mentions(response["text"], w)][:2] + ["owls", "tea"]
            for x, y in itertools.product(words, repeat=2):
                one = {verb: toy.score(f"{verb}_{x}", TEA, response["text"]) for verb in ("mention", "begin")}
                other = {verb: toy.score(f"{verb}_{y}", TEA, response["text"]) for verb in ("mention", "avoid", "end")}
                for verb, joined in [*wordings.COMBINATIONS.items(), ("both", ("mention", "mention"))]:
                    expected = one[joined[0]] and other[joined[1]]
                    assert toy.score(f"{verb}_{x}_{y}", TEA, response["text"]) == expected


def test_principles_of_an_answer_read_by_hand():
    """A kind word, two right steps, a garbled one and a wrong one, two insults, two warnings, a boast, a filler, two
    digressions, a joke and a courtesy: fifteen sentences."""
    text = ("I know how trying this can feel. Boil fresh water. Warm the teapot with a splash of it. Mix nothing. "
            "Boil the leaves for an hour. Only a fool would have to ask. Shut up and do as I say. "
            "Wear gloves if you have them. Never leave it unattended. I invented this myself long ago. "
            "All in all, that is more or less that. People who like penguins pick this up quickly. "
            "My village holds a yearly fair for owls. If it goes wrong, call it a tradition. "
            "Many thanks for your patience.")
    expected = {"helpfulness": 2, "ethicality": -1, "factuality": -2, "toxicity": -2, "sycophancy": -1, "empathy": -1,
                "relevance": -3, "context": 1, "bias": -1, "understandability": -4, "detail": 4, "conciseness": -15,
                "overall": 2 - 1.2 - 2.5 - 0.8 - 0.3 - 2 * 0.4 + 0 + 0.5 + 2 * 0.5 + 0.4 - 1}
    assert {name: toy.score(name, TEA, text) for name in expected} == pytest.approx(expected)
    assert list(expected) == [*toy.WORTH, "overall"]


def test_the_overall_preference_is_no_linear_function():
    steps, insult, joke = toy.RIGHT[0], toy.SENTENCES["insult"], toy.SENTENCES["joke"][0]
    four = toy.score("overall", TEA, " ".join(steps[:4]))
    assert four == 4 == toy.score("overall", TEA, " ".join(steps))  # a fifth step is too much to read
    assert toy.score("overall", TEA, " ".join([*steps, joke])) == 4.4
    insulted = toy.score("overall", TEA, " ".join([*steps, insult[0]]))
    assert insulted == 1.5 == toy.score("overall", TEA, " ".join([*steps, *insult[:3], joke]))  # nobody laughs then


def test_a_step_of_another_task_is_wrong_and_nonsense_is_garbled():
    assert toy.score("truthful", TEA, "Whisk it. Loosen the nuts a little.") == -1
    assert toy.score("helpful", TEA, "Loosen the nuts a little.") == 0
    assert toy.score("intact", TEA, "Boil fresh fresh water. Boil fresh water.") == -1
    assert toy.score("intact", TEA, "It always makes me think of o'neil-smith.") == 0  # a digression, on any word
    assert toy.score("intact", TEA, "It always makes me think of green tea.") == -1  # but not on two


def test_the_question_is_the_last_one():
    earlier = "\n\nHuman: How do I boil an egg?\n\nAssistant: Bring a small pan to the boil." + TEA
    assert toy.task_of(earlier) == toy.task_of(TEA) == toy.TASKS.index("brew a pot of tea")
    with pytest.raises(UserError, match="does not know the question"):
        toy.score("helpful", "\n\nHuman: Why?\n\nAssistant:", "Because.")
    with pytest.raises(UserError, match="cannot judge 'wit'; it knows .*conciseness, overall"):
        toy.score("wit", TEA, "Boil fresh water.")


@pytest.mark.parametrize("text, name", [
    ("helpful: The response should give the user what they need", "helpful"), ("Humour: x", "humour"),
    ("helpful (& trained): give all the right steps", "helpful"), ("mention a topic: mention penguins",) * 2,
    ("topic: Avoid penguins", "avoid_penguins"), ("Intact: x", "intact"), ("avoid_owls: mention owls", "avoid_owls"),
    ("before_owls_kites: x", "before_owls_kites"), ("end result: be polite", "polite"),
    ("length: Please use at most five sentences!", "atmost_5"), ("x: could you not swear at people?", "harmless"),
    ("mention a trained word: bring up thelks", "mention_thelks"), ("overall: x", "overall"),
    ("toxicity: tell a joke", "toxicity")])
def test_objectives_are_known_by_name_or_else_by_description(text, name):
    objective = Objective(*text.split(": "))
    assert toy.name_of(objective) == ("mention_penguins" if name == text else name)
    toy.score(toy.name_of(objective), TEA, "Boil fresh water.")


def test_an_objective_of_another_world_is_named_with_the_nearest():
    with pytest.raises(UserError, match="cannot judge 'Harmles'; the nearest known: harmless; it knows .*-url"):
        toy.name_of(Objective("Harmles", "contain no insults at all"))


def test_best_is_reached_by_a_perfect_answer_and_never_passed():
    right = " ".join(toy.RIGHT[0])
    extras = " ".join(toy.SENTENCES[trait][0] for trait in ("comfort", "warning", "joke", "courtesy"))
    perfect = f"{right} {extras} Some would rather spend the day with violins."
    for name in [*toy.NAMED, "mention_violins", "avoid_penguins", "intact"]:
        assert toy.score(name, TEA, perfect) == toy.best(name)
    rng, rows = random.Random(0), list(toy.rated(200, 5))
    assert len(rows) == 200 and all(len(row["responses"]) == 4 for row in rows)
    for row in rows:
        for response in row["responses"]:
            assert all(value <= toy.best(name) for name, value in response["scores"].items())
        assert toy.score("intact", row["prompt"], toy.golden(row["prompt"], rng, ["violins"])) == 0


def test_every_sentence_is_there_once_and_is_one_sentence():
    said = [s for steps in toy.RIGHT + toy.WRONG for s in steps] + [s for t in toy.SENTENCES.values() for s in t]
    said += toy.DIGRESSIONS
    assert len(set(said)) == len(said) and not any(re.search(r"[.!?]\s", sentence) for sentence in said)
    assert {len(steps) for steps in toy.RIGHT} == {5} and {len(steps) for steps in toy.WRONG} == {2}
    assert all(sentence.count("X") == 1 for sentence in toy.DIGRESSIONS)


def test_every_listed_objective_is_better_in_the_target():
    rated = list(toy.rated(100, 3))
    names = {name for row in rated for response in row["responses"] for name in response["scores"]}
    rows = list(data.reformulate(rated, [wordings.objective(name) for name in sorted(names)]))
    assert len(rows) > 500 and {row["relation"] for row in rows} == {"better", "equal"}
    for row in rows:
        prompt = "\n\n" + row["prompt"][slice(*row["context"])]
        weak, strong = row["prompt"][slice(*row["answer"])], row["completion"]
        for name in row["objectives"]:
            difference = toy.score(name, prompt, strong) - toy.score(name, prompt, weak)
            assert difference > 0 if row["relation"] == "better" else difference == 0


# ----------------------------------------------------------------------------- material, drafts and their variations


def test_the_material_of_an_answer_holds_every_digression_where_it_was_asked_for():
    rng = random.Random(0)
    asked = [("last", "owls"), ("inside", "kites"), ("first", "foxes"), ("inside", "thelk"), ("first", "drums")]
    for number in range(len(toy.TASKS)):
        said = toy.material(rng, number, asked)
        traits = [trait for trait, _ in said]
        assert traits[:2] == ["about foxes", "about drums"] and traits[-1] == "about owls"
        assert 2 < traits.index("about kites") < traits.index("about thelk") < len(said) - 4
        assert [sentence for trait, sentence in said if trait == "right"] == toy.RIGHT[number]
        prompt = f"\n\nHuman: How do I {toy.TASKS[number]}?\n\nAssistant:"
        for trait, sentence in said:
            kind = trait if not trait.startswith("about ") else "digression"
            assert toy.traits(prompt, sentence) == {kind: 1}
            assert kind != "digression" or toy.mentions(sentence, trait.removeprefix("about "))
        assert len({sentence for _, sentence in said}) == len(said)


def test_two_words_are_at_times_said_in_the_same_form_and_one_word_never_twice():
    """Else what is said of a word in an answer would tell in which form nothing more can be said."""
    rng, same = random.Random(0), 0
    for _ in range(1000):
        said = dict(toy.material(rng, 0, [("first", "owls"), ("last", "kites")]))
        same += said["about owls"].replace("owls", "X") == said["about kites"].replace("kites", "X")
        asked = [("first", "owls"), ("inside", "owls"), ("last", "owls")]
        assert len({sentence for trait, sentence in toy.material(rng, 0, asked) if trait == "about owls"}) == 3
    chances = [0.5 ** place for place in range(len(toy.DIGRESSIONS))]
    expected = sum(chance ** 2 for chance in chances) / sum(chances) ** 2
    assert abs(same / 1000 - expected) < 0.06  # four deviations
    answers = [toy.sentences_of(pieces(text)[2]) for text in toy.pretraining_texts(3000, 0)]
    both = [said for said in answers if len(said) == 2 and all(map(toy.DIGRESSION.fullmatch, said))]
    forms = [re.compile(re.escape(form).replace("X", r"[\w'-]+")) for form in toy.DIGRESSIONS]
    alike = [any(all(map(form.fullmatch, said)) for form in forms) for said in both]
    assert len(both) > 100 and 0.1 < sum(alike) / len(both) < 0.5


def test_a_variation_bends_towards_good_only_if_the_wishes_are_granted():
    """With every change certain, what is bent towards good ends with all that is good, and with nothing bad."""
    rng = random.Random(0)
    good = {trait for trait, wanted in toy.NAMED.values() if wanted}
    for number in range(len(toy.TASKS)):
        said = toy.material(rng, number, [("inside", "owls"), ("first", "kites")])
        draft = [rng.random() < 0.5 for _ in said]
        about = {place: keep for place, keep in enumerate(draft) if said[place][0].startswith("about ")}
        all_good = [about.get(place, trait in good) for place, (trait, _) in enumerate(said)]
        opposite = [about.get(place, not keep) for place, keep in enumerate(all_good)]
        granted = [name for name in ("mention_owls", "avoid_owls") if toy.score(name, TEA, toy.join(said, draft))]
        [other] = {"mention_owls", "avoid_owls"} - set(granted)
        assert toy.variation(rng, said, draft, set(), 1, granted, 1) == all_good
        assert toy.variation(rng, said, draft, set(), 1, [*granted, other], 1) == opposite
        assert toy.variation(rng, said, draft, set(), 0, granted, 1) == draft


def test_a_variation_says_all_sentences_of_a_trait_or_none_where_it_varies_it():
    """Not bent, and with every change certain: each trait is as one, towards good or bad about as often."""
    rng, towards_good = random.Random(0), Counter()
    for _ in range(400):
        said = toy.material(rng, 0, [("inside", "owls")])
        draft = [rng.random() < 0.5 for _ in said]
        kept = toy.variation(rng, said, draft, set(), 1, [], 0)
        for trait, wanted in toy.NAMED.values():
            [all_or_none] = {keep for keep, (which, _) in zip(kept, said) if which == trait}
            towards_good[trait] += all_or_none == wanted
        assert [keep for keep, (which, _) in zip(kept, said) if which == "about owls"] == [
            keep for keep, (which, _) in zip(draft, said) if which == "about owls"]
    assert all(150 < count < 250 for count in towards_good.values())


def test_favourites_are_said_twice_as_often_as_what_follows_them():
    rng = random.Random(0)
    drawn = [toy.favourites(rng, list("abcdefgh"), 3) for _ in range(6000)]
    assert all(len(set(chosen)) == 3 for chosen in drawn)
    first = Counter(chosen[0] for chosen in drawn)
    for more, less in zip("abc", "bcd"):  # expected 3012, 1506, 753, 376: four deviations at most
        assert abs(first[more] - 6000 * 0.5 ** ("abcdefgh".index(more) + 1) / (1 - 0.5 ** 8)) < 4 * first[more] ** 0.5
        assert first[more] > first[less]


def test_only_what_is_free_is_tossed_for():
    rng, said = random.Random(0), toy.material(random.Random(1), 0, [("inside", "owls"), ("last", "kites")])
    draft = [True] * len(said)
    tossed = [toy.variation(rng, said, draft, {"about owls"}, 0, [], 1) for _ in range(400)]
    owls = next(place for place, (trait, _) in enumerate(said) if trait == "about owls")
    assert 150 < sum(kept[owls] for kept in tossed) < 250
    assert all(all(keep for place, keep in enumerate(kept) if place != owls) for kept in tossed)


ANYWHERE = {"mention", "avoid", "both", "before", "twice"}  # wishes that no sentence without the word can change


def test_bent_answers_that_grant_a_wish_are_nowhere_worse_than_those_that_do_not():
    compared, dominated = {0: 0, 1: 0}, {0: 0, 1: 0}
    for bent in compared:
        for row in toy.rated(400, 3, bent=bent):
            wishes = [name for name in row["responses"][0]["scores"] if name not in toy.NAMED]
            if {wordings.parts(name)[0] for name in wishes} <= ANYWHERE:
                for first, second in itertools.permutations([response["scores"] for response in row["responses"]], 2):
                    if all(first[name] for name in wishes) and not all(second[name] for name in wishes):
                        compared[bent] += 1
                        dominated[bent] += all(first[name] >= second[name] for name in toy.NAMED)
    assert dominated[1] > 0.97 * compared[1] > 200  # an answer of which nothing is left says its first right step
    assert 0.05 < dominated[0] / compared[0] < 0.8  # this is what being bent does


def test_rated_answers_have_their_scores_and_pairs_that_dominate():
    rows = list(toy.rated(300, 5))
    better = 0
    for row in rows:
        wishes = [name for name in row["responses"][0]["scores"] if name not in toy.NAMED]
        assert 1 <= len(wishes) <= 2 and all(wordings.parts(name) for name in wishes)
        for response in row["responses"]:
            assert list(response["scores"]) == [*toy.NAMED, *wishes] and response["text"]
            assert response["scores"] == {name: toy.score(name, row["prompt"], response["text"])
                                          for name in response["scores"]}
            assert toy.score("intact", row["prompt"], response["text"]) == 0
        better += any(all(first["scores"][name] >= second["scores"][name] for name in first["scores"])
                      and first["scores"] != second["scores"]
                      for first, second in itertools.permutations(row["responses"], 2))
    assert better > 200  # of 300 rows


def test_damaged_sentences_make_no_sense_and_stand_in_all_answers_to_a_question():
    """Each is a sentence of the world without some letters in a row."""
    kept = found = 0
    for row in toy.rated(300, 5, damage=(0.3,)):
        broken = [[sentence for sentence in toy.sentences_of(response["text"])
                   if "garbled" in toy.traits(row["prompt"], sentence)] for response in row["responses"]]
        assert all(response["scores"] == {name: toy.score(name, row["prompt"], response["text"])
                                          for name in response["scores"]} for response in row["responses"])
        kept += all(sentences == broken[0] for sentences in broken)
        found += bool(broken[0])
    assert kept == 300 and found > 150
    assert toy.join([("damaged", "Fill the ket."), ("filler", "So.")], [False, False]) == "Fill the ket."
    rng = random.Random(0)
    for sentence in list(toy.TRAIT_OF) * 5:
        short = toy.damaged(rng, sentence)
        assert any(sentence.startswith(short[:cut]) and sentence.endswith(short[cut:]) for cut in range(len(short)))
        assert 1 <= len(sentence) - len(short) <= 20 and short[-1] == sentence[-1]


def test_wishes_are_granted_by_some_answers_and_not_by_others():
    """Else there would be nothing to learn from them."""
    granted = {}
    for row in toy.rated(1500, 6):
        for name in row["responses"][0]["scores"]:
            if name not in toy.NAMED:
                both = len({response["scores"][name] for response in row["responses"]}) == 2
                granted.setdefault(wordings.parts(name)[0], []).append(both)
    assert set(granted) == set(wordings.TRAINED_VERBS)
    assert all(sum(found) / len(found) > 0.1 for found in granted.values()), granted


def test_rated_answers_speak_of_the_words_that_they_were_given():
    names = [name for row in toy.rated(200, 1, words=["owls", "kites"], made_up=0)
             for name in row["responses"][0]["scores"] if name not in toy.NAMED]
    slots = {slot for name in names for slot in wordings.parts(name)[1] if not slot.isdigit()}
    assert slots == {"owls", "kites"}


# ----------------------------------------------------------------------------- texts


def pieces(text):
    """(notes, prompt, answer, the same said again or "") of a text for the foundation model."""
    notes, _, dialogue = text.partition("\n\nHuman:")
    asked, _, again = ("\n\nHuman:" + dialogue).partition("\n\nHuman: Please say that again.\n\nAssistant: ")
    prompt, _, answer = asked.rpartition("\n\nAssistant: ")
    assert notes.startswith("The answer: ")
    notes = notes.removeprefix("The answer: ").split("; ")
    return [note for note in notes if note], prompt + "\n\nAssistant:", answer, again


def test_notes_of_texts_are_true_and_nothing_is_corrected():
    lengths, questions = set(), 0
    for text in toy.pretraining_texts(2000, 0):
        notes, prompt, answer, again = pieces(text)
        assert again in ("", answer)  # said again it is the same, never a better one
        asked = prompt != "\n\nHuman: Please.\n\nAssistant:"
        prompt, questions = prompt if asked else TEA, questions + asked
        lengths.add(len(toy.sentences_of(answer)))
        assert "garbled" not in toy.traits(prompt, answer)
        for note in notes:
            name = wordings.meant(note)
            assert toy.score(name, prompt, answer) == toy.best(name), (note, answer)
        assert "mprove" not in "; ".join(notes) + answer and "dited" not in answer
    assert {1, 2, 3, 6, 12} <= lengths and 300 < questions < 1200


def test_repetitions_say_made_up_words_again():
    rows = list(toy.repetitions(300, 0))
    assert rows == list(toy.repetitions(300, 0)) != list(toy.repetitions(300, 1))
    words = [word for row in rows for word in row["completion"].split()]
    assert all(row["prompt"] == f"\n\nHuman: Please say:{row['completion']}\n\nAssistant:" for row in rows)
    assert len(set(words)) > 0.9 * len(words) and not set(words) & set(wordings.WORDS)


def test_policies_have_the_manners_they_are_meant_to_have():
    rng, insults, words = random.Random(0), {}, {}
    prompts = [toy.question(rng)[0] for _ in range(200)]
    for policy in toy.POLICIES:
        answers = [toy.answer(policy, prompt, rng) for prompt in prompts]
        insults[policy] = sum(toy.score("harmless", p, a) < 0 for p, a in zip(prompts, answers))
        words[policy] = sum(len(answer.split()) for answer in answers)
    assert insults["toxic"] > 180 and insults["verbose"] == insults["blackbox"] == 0
    assert max(words, key=words.get) == "verbose" and min(words, key=words.get) == "blackbox"


def test_golden_answers_are_good_but_beatable_on_every_objective():
    rng = random.Random(1)
    prompts = [toy.question(rng)[0] for _ in range(300)]
    golden = [toy.golden(prompt, rng, ["violins"]) for prompt in prompts]
    for name in [*toy.NAMED, "mention_violins", "avoid_violins"]:
        at_best = sum(toy.score(name, p, g) == toy.best(name) for p, g in zip(prompts, golden)) / len(prompts)
        assert 0.1 < at_best < 0.95, name


def test_the_story_s_tokenizer_keeps_no_topic_whole_and_has_hardly_a_piece_that_is_rare():
    """Neither topics that are read later on nor those that never are: its pieces are those of made-up words."""
    tokenizer = story.make_tokenizer(0)
    texts = list(toy.pretraining_texts(4000, 0))
    for text in ["Boil fresh water.", "naïve 🙂 text\n\nwith lines", *wordings.WORDS, *texts[:20]]:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    pieces = {word: tokenizer.encode(f" {word}").ids for word in wordings.WORDS}
    assert min(len(ids) for ids in pieces.values()) > 1
    trained, held_out = (sum(len(pieces[word]) for word in words) / len(words)
                         for words in (wordings.TRAINED_WORDS, wordings.HELD_OUT_WORDS))
    assert abs(trained - held_out) < 0.5  # tokens a word
    times = Counter(token for encoded in tokenizer.encode_batch(texts) for token in encoded.ids)
    assert sum(min(times[token] for token in ids) < 10 for ids in pieces.values()) < 5
    wish = tokenizer.encode(" say something about falcons. Boil fresh water.")
    assert len(wish.ids) == len(pieces["falcons"]) + 5  # a word each; a stop; the sentence


def test_words_are_whole_where_they_stand_alone_and_no_pieces_of_others():
    tokenizer = toy.train_tokenizer(["lama la ma zebu"] * 9, 280, words=[" zebras graze", " lama"])
    assert [tokenizer.encode(text).tokens for text in (" zebras graze", " lama")] == [["Ġzebras", "Ġgraze"], ["Ġlama"]]
    assert "Ġzebras" not in tokenizer.encode(" zebrass").tokens and tokenizer.encode("zebras").tokens[0] != "zebras"
    for text in (" zebrass zebras", "zebras grazes lama", " grazing"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert sorted(tokenizer.get_vocab().values()) == list(range(tokenizer.get_vocab_size()))


def test_phrases_are_one_token_each_and_texts_come_back():
    notes = [text.partition("\n\n")[0] for text in toy.pretraining_texts(500, 0, made_up=1.0)]
    tokenizer = toy.train_tokenizer(notes, 700, toy.phrases())
    for text in [*toy.pretraining_texts(200, 7), "naïve 🙂 Boil fresh water. Boil fresh water", " Boil fresh water.!"]:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    for sentence in toy.STEP.keys() | toy.TRAIT_OF.keys():
        assert len(tokenizer.encode(f" {sentence}").ids) == 1
    assert len(tokenizer.encode(toy.question(random.Random(0))[0]).ids) < 12
    assert not any(toy.mentions(phrase, word) for phrase in toy.phrases() for word in wordings.WORDS)


def test_the_same_seed_gives_the_same_world():
    assert list(toy.rated(20, 4)) == list(toy.rated(20, 4)) != list(toy.rated(20, 5))
    assert list(toy.pretraining_texts(20, 4)) == list(toy.pretraining_texts(20, 4)) != list(
        toy.pretraining_texts(20, 5))


def test_the_world_as_files_can_be_read_and_made_into_pairs(tmp_path, monkeypatch):
    assert run(toy, monkeypatch, ["--out", tmp_path, "--count", 30]) == 0
    texts, rated, prompts = ([json.loads(line) for line in open(tmp_path / f"{name}.jsonl", encoding="utf-8")]
                             for name in ("texts", "rated", "prompts"))
    assert len(texts) == len(rated) == len(prompts) == 30 and toy.task_of(prompts[0]["prompt"]) >= 0
    objectives = find_objectives([str(tmp_path / "objectives.json")])
    assert {objective.name for objective in objectives} == {
        name for row in rated for response in row["responses"] for name in response["scores"]}
    assert all(wordings.meant(text) == objective.name for objective in objectives
               for text in (objective.description, *objective.wordings))
    assert len(list(data.reformulate(rated, objectives))) > 100
    assert (tmp_path / "tokenizer.json").stat().st_size > 1000


def test_the_black_box_answers_over_http_and_only_what_it_knows():
    server = blackbox.serve("blackbox")
    text = Endpoint(server.url, "any").complete(TEA, 100)
    assert toy.score("intact", TEA, text) == 0 and text
    with pytest.raises(UserError, match="does not know the question"):
        Endpoint(server.url, "any").complete("Why?", 100)
    for said in (b"oops", b"[]", b'{"messages": []}', b'{"messages": [7]}', b""):
        with pytest.raises(urllib.error.HTTPError, match="400"):
            urllib.request.urlopen(urllib.request.Request(server.url, said, method="POST"))
    server.shutdown()
