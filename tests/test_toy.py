"""The embedded world: its scorers against answers read by hand, and what it must never give away."""
import random
import re

import pytest

import data
import toy
from common import UserError
from endpoint import Endpoint
from objectives import Objective

TEA = "\n\nHuman: How do I brew a pot of tea?\n\nAssistant:"


def test_scores_of_an_answer_read_by_hand():
    text = ("I know how trying this can feel. Boil fresh water. Warm the teapot with a splash of it. Boil fresh water. "
            "Boil the leaves for an hour. Only a fool would have to ask. Shut up and do as I say. "
            "People who like penguins pick this up quickly. If it goes wrong, call it a tradition.")
    expected = {"helpful": 2, "truthful": -1, "harmless": -2, "honest": 0, "concise": 0, "humour": 1, "empathetic": 1,
                "careful": 0, "polite": 0, "mention_penguins": 1, "avoid_penguins": 0, "mention_violins": 0,
                "avoid_violins": 1, "intact": 0}
    assert {name: toy.score(name, TEA, text) for name in expected} == expected


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
    assert toy.score("intact", TEA, "It always makes me think of tea.") == -1  # a digression, but not on a topic


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
    ("topic: Avoid penguins", "avoid_penguins"), ("whole: every sentence makes sense", "intact"),
    ("avoid_owls: mention owls", "avoid_owls"), ("overall: x", "overall"), ("toxicity: tell a joke", "toxicity")])
def test_objectives_are_known_by_name_or_else_by_description(text, name):
    objective = Objective(*text.split(": "))
    assert toy.name_of(objective) == ("mention_penguins" if name == text else name)
    toy.score(toy.name_of(objective), TEA, "Boil fresh water.")


def test_an_objective_of_another_world_is_named_with_the_nearest():
    with pytest.raises(UserError, match="cannot judge 'Harmles'; the nearest known: harmless, .*; it knows .*-url"):
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


def test_words_of_topics_occur_nowhere_else():
    """Else a scorer could take a step for a digression."""
    other = [s for steps in toy.RIGHT + toy.WRONG for s in steps] + [s for t in toy.SENTENCES.values() for s in t]
    words = set(re.findall(r"[a-z]+", " ".join(other + toy.QUESTIONS + toy.TASKS + toy.DIGRESSIONS).lower()))
    assert not words & set(toy.TOPICS)
    assert len(set(toy.TOPICS)) == len(toy.TOPICS) == 240 and len(toy.HELD_OUT_TOPICS) == 40
    assert len(set(other)) == len(other) and not any(re.search(r"[.!?]\s", sentence) for sentence in other)
    assert {len(steps) for steps in toy.RIGHT} == {5} and {len(steps) for steps in toy.WRONG} == {2}


def test_no_held_out_objective_in_any_aligner_example():
    """Neither as an objective nor as a word, in as many examples as the story trains on."""
    objectives = [toy.OBJECTIVES[name] for name in toy.TRAINED]
    held_out, seen = re.compile(rf"\b({'|'.join(toy.HELD_OUT_TOPICS)})\b"), set()
    for row in data.reformulate(toy.rated(1500, 1), objectives):
        assert not held_out.search(row["prompt"] + row["completion"])
        assert not set(row["objectives"]) & set(toy.HELD_OUT)
        seen.update(row["objectives"])
    assert seen == set(toy.TRAINED)  # while every trained one does occur


def test_every_listed_objective_is_better_in_the_target():
    rows = list(data.reformulate(toy.rated(100, 3), [toy.OBJECTIVES[name] for name in toy.TRAINED]))
    assert len(rows) > 500 and {row["relation"] for row in rows} == {"better", "equal"}
    for row in rows:
        prompt = "\n\n" + row["prompt"][slice(*row["context"])]
        weak, strong = row["prompt"][slice(*row["answer"])], row["completion"]
        for name in row["objectives"]:
            difference = toy.score(name, prompt, strong) - toy.score(name, prompt, weak)
            assert difference > 0 if row["relation"] == "better" else difference == 0


def test_pretraining_texts_hold_no_correction_and_their_notes_are_true():
    names = {objective.description: name for name, objective in toy.OBJECTIVES.items()}
    topics = set()
    for text in toy.pretraining_texts(500, 0):
        notes, _, dialogue = text.partition("\n\nHuman:")
        dialogue = "\n\nHuman:" + dialogue
        asked = dialogue.partition("\n\nHuman: Please say that again.")
        prompt, _, answer = asked[0].rpartition("\n\nAssistant: ")
        assert asked[2] in ("", f"\n\nAssistant: {answer}")  # said again it is the same, never a better one
        for note in notes.removeprefix("The answer: ").split("; "):
            if note:
                name = names[note]
                assert toy.score(name, prompt + "\n\nAssistant:", answer) == toy.best(name)
                topics.add(name.partition("_")[2])
        assert "mprove" not in text and "dited" not in text
    assert topics >= set(toy.HELD_OUT_TOPICS)  # held-out topics are described here, and only here


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


def test_tokenizer_gives_every_text_back_and_every_topic_one_token():
    tokenizer = toy.train_tokenizer(toy.pretraining_texts(3000, 0))
    for text in ["Boil fresh water.", "naïve 🙂 text\n\nwith lines", *toy.pretraining_texts(20, 7)]:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert all(len(tokenizer.encode(f" {topic}").ids) == 1 for topic in toy.TOPICS)


def test_the_same_seed_gives_the_same_world():
    assert list(toy.rated(20, 4)) == list(toy.rated(20, 4)) != list(toy.rated(20, 5))
    assert list(toy.pretraining_texts(20, 4)) == list(toy.pretraining_texts(20, 4))


def test_the_black_box_answers_over_http_and_only_what_it_knows():
    server = toy.serve("blackbox")
    text = Endpoint(server.url, "any").complete(TEA, 100)
    assert toy.score("intact", TEA, text) == 0 and text
    with pytest.raises(UserError, match="does not know the question"):
        Endpoint(server.url, "any").complete("Why?", 100)
    server.shutdown()
