"""How objectives are said: every wording is understood again, and each kind of held-out is where it may be only."""
import random
import re
from collections import Counter

import pytest

import formats
import story
import toy
import wordings
from wordings import BARE, FRAMES, HELD_OUT_VERBS, HELD_OUT_WORDS, TRAINED_WORDS, VERBS, WORDINGS, WORDS

ALL = [(key, wording) for key, lists in WORDINGS.items() for wording in sum(lists, [])]
SLOTS = {key: re.findall(r"\b[XYN]\b", lists[0][0]) for key, lists in WORDINGS.items()}


def filled(key, wording):
    """A wording about owls, kites and seven sentences, filled in by hand, and the name that it must have."""
    values = {"X": "owls", "Y": "kites", "N": "seven"}
    text = re.sub(r"\b[XYN]\b", lambda match: values[match[0]], wording)
    return text, "_".join([key, *(values[slot].replace("seven", "7") for slot in SLOTS[key])])


# ----------------------------------------------------------------------------- the table


def test_the_table_has_as_many_wordings_as_it_promises_and_none_twice():
    plain = Counter(wording.lower().rstrip(".!?") for _, wording in ALL)
    assert [text for text, count in plain.items() if count > 1] == []
    for key, (pairs, held_out) in WORDINGS.items():
        assert len(pairs) >= (16 if key in ("mention", "avoid") else 12 if key in wordings.NAMED else 5), key
        assert len(held_out) != 1, f"{key}: only one wording is held out"
    assert {key for key, (_, held_out) in WORDINGS.items() if not held_out} == set(wordings.COMBINATIONS)


def test_every_wording_is_an_imperative_or_a_phrase_with_its_stop_and_has_the_words_that_it_is_about():
    for key, wording in ALL:
        slots = re.findall(r"\b[XYN]\b", wording)
        assert sorted(slots) == sorted(SLOTS[key]), wording
        assert wording[0].islower() != (wording[-1] in ".?"), wording
        assert ";" not in wording and "|" not in wording  # a prompt joins wishes with ";"
    assert {"".join(slots) for slots in SLOTS.values()} == {"", "X", "XY", "N"}


def test_the_verbs_of_the_table_are_those_that_are_judged():
    assert set(VERBS) == set(toy.VERBS) and set(wordings.NAMED) == set(toy.NAMED)
    assert set(wordings.TRAINED_VERBS) == set(VERBS) - {"twice", "butnot", "beginend"} == set(toy.ASKED)
    for verb, joined in wordings.COMBINATIONS.items():
        assert set(joined) <= set(wordings.TRAINED_VERBS)


def test_words_are_all_different_and_are_in_no_sentence_and_no_wording():
    """Else a scorer could take a step for a digression."""
    said = [s for steps in toy.RIGHT + toy.WRONG for s in steps] + [s for t in toy.SENTENCES.values() for s in t]
    said += [*toy.DIGRESSIONS, *toy.QUESTIONS, *toy.TASKS, *(text for pair in toy.GREETINGS for text in pair)]
    said += [wording for _, wording in ALL] + [*BARE, *FRAMES]
    assert not set(re.findall(r"[a-z]+", " ".join(said).lower())) & set(WORDS)
    assert len(set(WORDS)) == len(WORDS) == 240 and all(word.isalpha() and word.islower() for word in WORDS)
    assert len(HELD_OUT_WORDS) == 40 and not set(HELD_OUT_WORDS) & set(TRAINED_WORDS)
    assert set(HELD_OUT_WORDS) | set(TRAINED_WORDS) == set(WORDS)


# ----------------------------------------------------------------------------- from names to texts, and back


@pytest.mark.parametrize("key", WORDINGS)
def test_every_wording_is_understood_in_every_frame(key):
    for wording in sum(WORDINGS[key], []):
        text, name = filled(key, wording)
        assert wordings.meant(text) == name, text
        for case in (text.upper(), f"  {text.rstrip('.?')} ", text.rstrip(".?") + "!"):
            assert wordings.meant(case) == name, case
        if wording[0].islower():
            framed = text.removeprefix("do ") if text.startswith("do not ") else text
            for form in [*(form.format(text) for form in BARE), *(form.format(framed) for form in FRAMES)]:
                assert wordings.meant(form) == name, form
                assert wordings.without_frame(form) == text.lower()


@pytest.mark.parametrize("key", WORDINGS)
def test_what_is_said_means_what_was_named(key):
    rng = random.Random(key)
    for which in ("pairs", "held out", "all"):
        for _ in range(60):
            words = rng.sample(WORDS, 2) if rng.random() < 0.5 else [wordings.coin(rng) for _ in range(2)]
            slots = [str(rng.randint(2, 12))] if SLOTS[key] == ["N"] else words[:len(SLOTS[key])]
            name = "_".join([key, *slots])
            assert wordings.parts(name) == (key, slots)
            assert wordings.meant(wordings.say(rng, name, which)) == name
            assert wordings.meant(wordings.worded(rng, name, which).description) == name


def test_what_is_said_is_of_the_list_that_was_asked_for():
    rng = random.Random(0)
    for key, (pairs, held_out) in WORDINGS.items():
        name = filled(key, pairs[0])[1]
        expected = {"pairs": pairs, "held out": held_out or pairs, "all": pairs + held_out}
        for which, wanted in expected.items():
            said = {wordings.without_frame(wordings.say(rng, name, which)) for _ in range(600)}
            assert said == {filled(key, wording)[0].lower().rstrip(".?") for wording in wanted}, (key, which)


def test_an_objective_has_its_plainest_description_and_no_held_out_wording():
    for key, (pairs, held_out) in WORDINGS.items():
        plain, name = filled(key, pairs[0])
        objective = wordings.objective(name)
        assert (objective.name, objective.description) == (name, plain) and len(set(objective.wordings)) >= 5
        assert {wordings.meant(text) for text in objective.wordings} == {name}
        never = {filled(key, wording)[0].lower().rstrip(".?") for wording in held_out}
        assert not never & {wordings.without_frame(text) for text in objective.wordings}
    assert wordings.objective("mention_owls").wordings == wordings.objective.__wrapped__("mention_owls").wordings


@pytest.mark.parametrize("text, plain", [
    ("Please Tell a joke.", "tell a joke"), ("tell a joke, please!", "tell a joke"),
    ("Could you tell a joke?", "tell a joke"), ("The  response should\nnot boast", "do not boast"),
    ("make sure to not mention Owls", "do not mention owls"), ("No insults.", "no insults"),
    ("Is it modest?", "is it modest"), ("please make sure to be witty", "be witty"),
    ("notice owls", "notice owls"), ("pleased", "pleased"), ("", "")])
def test_a_frame_is_taken_off(text, plain):
    assert wordings.without_frame(text) == plain


@pytest.mark.parametrize("text, name", [
    ("At most 5 sentences.", "atmost_5"), ("use at least twelve sentences", "atleast_12"),
    ("mention o'neil-smith", "mention_o'neil-smith"), ("mention naïveté", "mention_naïveté"),
    ("First owls, then kites.", "before_owls_kites"), ("Kites after owls.", "before_owls_kites"),
    ("mention owls first and kites last", "beginend_owls_kites"), ("No boasting.", "honest"),
    ("with owls", "mention_owls"), ("Without owls", "avoid_owls")])
def test_wishes_read_by_hand_are_understood(text, name):
    assert wordings.meant(text) == name


@pytest.mark.parametrize("text", ["", "please", "mention", "mention red owls", "Boil fresh water.", "mention owls and",
                                  "use at most one sentences", "use at most 99 sentences", "use at most some sentences",
                                  "mention an_owl", "mention owls; avoid kites", "The response should be short."])
def test_a_text_that_asks_nothing_known_means_nothing(text):
    assert wordings.meant(text) is None


@pytest.mark.parametrize("name", ["mention_", "mention", "before_x", "before_x_", "both_x_y_z", "atmost_99",
                                  "atmost_one", "atmost_1", "atmost_13", "atleast_", "atmost_-2", "mention_a_b",
                                  "mention_-a", "mention_a b", "harmless_owls", "wit", "", "_owls", "mention__owls"])
def test_a_bad_name_has_no_parts(name):
    assert wordings.parts(name) is None


@pytest.mark.parametrize("name, parts", [
    ("mention_owls", ("mention", ["owls"])), ("before_owls_kites", ("before", ["owls", "kites"])),
    ("atmost_2", ("atmost", ["2"])), ("atleast_12", ("atleast", ["12"])), ("humour", ("humour", [])),
    ("avoid_o'neil-smith", ("avoid", ["o'neil-smith"]))])
def test_the_parts_of_a_name(name, parts):
    assert wordings.parts(name) == parts


@pytest.mark.parametrize("text, wording, name", [
    ("mentoin owls", "mention owls", "mention_owls"), ("please tell a jok", "tell a joke", "humour"),
    ("contain no insults", "contain no insult", "harmless"), ("Begin with the owls", "begin with owls", "begin_owls"),
    ("warn of all dangers", "warn of dangers", "careful")])
def test_the_nearest_wish_of_a_text_that_is_none(text, wording, name):
    assert wordings.meant(text) is None
    likeness, *found = wordings.nearest_wish(text)
    assert found == [wording, name] and 0.7 < likeness < 1


def test_the_nearest_wish_of_a_wording_is_itself():
    rng = random.Random(0)
    for name in ("mention_owls", "avoid_kites", "end_thelk", "humour", "helpful"):
        said = wordings.say(rng, name, "all")
        assert wordings.nearest_wish(said)[0] == 1 and wordings.nearest_wish(said)[2] == name
    assert wordings.nearest_wish("")[0] == 0


# ----------------------------------------------------------------------------- made-up words


def test_made_up_words_are_many_and_are_no_real_ones():
    rng = random.Random(0)
    coined = [wordings.coin(rng) for _ in range(10_000)]
    assert all(re.fullmatch("[a-z]{4,20}", word) for word in coined)
    assert not set(coined) & set(WORDS) and len(set(coined)) > 9000
    assert [wordings.coin(random.Random(seed)) for seed in range(50)] == [
        wordings.coin(random.Random(seed)) for seed in range(50)]
    assert all(wordings.meant(f"mention {word}") == f"mention_{word}" for word in coined[:300])


def test_a_coin_never_falls_on_a_real_word(monkeypatch):
    rng = random.Random(1)
    first, state = wordings.coin(rng), random.Random(1).getstate()
    monkeypatch.setattr(wordings, "WORDS", [*WORDS, first])
    rng.setstate(state)
    assert wordings.coin(rng) != first


def test_any_word_is_made_up_as_often_as_asked():
    rng = random.Random(0)
    shares = [sum(wordings.any_word(rng, made_up=share) not in TRAINED_WORDS for _ in range(2000)) / 2000
              for share in (0, 0.3, 1)]
    assert shares[0] == 0 and 0.26 < shares[1] < 0.34 and shares[2] == 1
    assert {wordings.any_word(rng, HELD_OUT_WORDS, 0) for _ in range(500)} == set(HELD_OUT_WORDS)


# ----------------------------------------------------------------------------- what is held out, and from where


@pytest.fixture(scope="module")
def texts():
    """Texts for the foundation model, as [(notes, all of it)]."""
    found = list(toy.pretraining_texts(3000, 0))
    heads = [text.partition("\n\nHuman:")[0].removeprefix("The answer: ") for text in found]
    return [([note for note in head.split("; ") if note], text) for head, text in zip(heads, found)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Rated answers and the pairs made of them, as the story makes them."""
    folder = tmp_path_factory.mktemp("pairs")
    story.write_pairs(folder, 0, questions=1200)
    return folder


@pytest.fixture(scope="module")
def pairs(folder):
    """The story's pairs, as [(wishes in the prompt, row)]."""
    def wishes(row):
        return row["prompt"].partition("\n\n")[0].partition("objectives: ")[2].split("; ")
    return [(wishes(row), row) for row in formats.read_pairs(folder / "pairs.jsonl")]


def verb_of(name):
    return wordings.parts(name)[0]


def expression_for(wording):
    """A regular expression for a wording without its stop; X, Y and N are any words."""
    return re.compile(re.sub(r"\b[XYN]\b", r"[\\w'-]+", wording.rstrip(".?")), re.IGNORECASE)


def test_the_wishes_of_pairs_mean_what_their_objectives_are_named(pairs):
    assert len(pairs) > 2000
    for wishes, row in pairs:
        assert [wordings.meant(wish) for wish in wishes] == row["objectives"]


def test_held_out_wordings_are_in_texts_and_in_no_pair(texts, pairs):
    held_out = [wording for lists in WORDINGS.values() for wording in lists[1]]
    read = {wordings.without_frame(note) for notes, _ in texts for note in notes}
    asked = {wordings.without_frame(wish) for wishes, _ in pairs for wish in wishes}
    for wording in held_out:
        assert any(map(expression_for(wording).fullmatch, read)), wording
        assert not any(map(expression_for(wording).fullmatch, asked)), wording


def test_nearly_every_other_wording_is_in_pairs(pairs):
    asked = {wordings.without_frame(wish) for wishes, _ in pairs for wish in wishes}
    others = [wording for key in (*wordings.NAMED, "mention", "avoid") for wording in WORDINGS[key][0]]
    found = [wording for wording in others if any(map(expression_for(wording).fullmatch, asked))]
    assert len(found) > 0.95 * len(others), set(others) - set(found)


def test_held_out_words_are_in_no_text_and_in_no_pair(texts, folder):
    def words(text):
        return set(re.findall("[a-z]+", text.replace("\\n", " ").lower()))  # a line end in JSON is no letter n
    read = words("\n".join(text for _, text in texts))
    rated, paired = (words((folder / f"{name}.jsonl").read_text(encoding="utf-8")) for name in ("rated", "pairs"))
    for found in (read, rated, paired):
        assert not found & set(HELD_OUT_WORDS)
        assert len(found & set(TRAINED_WORDS)) > 0.9 * len(TRAINED_WORDS)  # while the trained ones do occur


def test_held_out_verbs_are_in_texts_and_in_no_pair_while_trained_ones_are_in_both(texts, pairs, folder):
    read = Counter(verb_of(wordings.meant(note)) for notes, _ in texts for note in notes)
    asked = Counter(verb_of(name) for _, row in pairs for name in row["objectives"])
    scored = {verb_of(name) for row in formats.read_rated(folder / "rated.jsonl")
              for response in row["responses"] for name in response["scores"]}
    assert set(read) == {*wordings.NAMED, *wordings.TRAINED_VERBS, *HELD_OUT_VERBS}
    assert set(asked) == {*wordings.NAMED, *wordings.TRAINED_VERBS} == scored
    assert min(asked.values()) > 20 and min(read[verb] for verb in HELD_OUT_VERBS) > 20


def test_a_number_is_a_word_where_a_word_is_asked_for():
    assert wordings.meant("mention three") == "mention_three" and wordings.meant("begin with two") == "begin_two"
    assert wordings.meant("use at most three sentences") == "atmost_3" == wordings.meant("At most 3 sentences.")


HALVES = [({"begin", "beginboth"}, {"end", "endwithout"}),  # verbs that ask for a half of a combination, in any words
          ({"mention", "twice", "before", "both", "beginboth"}, {"avoid", "endwithout"})]


def test_combinations_are_nowhere_and_no_prompt_asks_for_what_they_join(texts, pairs):
    joined = wordings.COMBINATIONS
    assert joined == {"butnot": ("mention", "avoid"), "beginend": ("begin", "end")}
    names = [wordings.meant(note) for notes, _ in texts for note in notes]
    names += [wordings.meant(wish) for wishes, _ in pairs for wish in wishes]
    assert None not in names and not {verb_of(name) for name in names} & set(joined)
    prompts = [{verb_of(name) for name in row["objectives"]} for _, row in pairs]
    prompts += [{verb_of(wordings.meant(note)) for note in notes} for notes, _ in texts]
    for first, second in HALVES:
        assert not any(first & verbs and second & verbs for verbs in prompts)
        assert all(any(verb in verbs for verbs in prompts) for verb in first | second)
    assert any(len(verbs - set(toy.NAMED)) == 2 for verbs in prompts)  # others are asked for together


def test_raters_never_look_for_both_of_what_a_combination_joins(folder):
    for row in formats.read_rated(folder / "rated.jsonl"):
        verbs = {verb_of(name) for name in row["responses"][0]["scores"]}
        assert not any(first & verbs and second & verbs for first, second in HALVES)
