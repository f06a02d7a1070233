"""Playing with an aligner: what a line of the terminal means, what the judge says, and whole sessions."""
import io
import random
import re
import time

import pytest

import play
import toy
import wordings
from choose import Choice
from conftest import refused, run
from objectives import Objective

TEA = f"\n\nHuman: {toy.QUESTIONS[0].replace('TASK', toy.TASKS[0])}\n\nAssistant:"
JOKE, INSULT = (toy.SENTENCES[trait][0] for trait in ("joke", "insult"))
OWLS = toy.DIGRESSIONS[0].replace("X", "owls")


@pytest.mark.parametrize("text, task", [
    ("1", 0), (str(len(toy.TASKS)), len(toy.TASKS) - 1), ("0", None), (str(len(toy.TASKS) + 1), None), ("²", None),
    ("brew a pot of tea", 0), ("BREW TEA", 0), ("tea", 0), ("How do I brew a pot of tea?", 0),
    ("eggs", toy.TASKS.index("boil an egg")), ("How can I clean the windows?", toy.TASKS.index("clean a window")),
    ("fly to the moon", None), ("zzz", None), ("?", None)])
def test_numbers_and_words_mean_a_task(text, task):
    assert play.task_meant(text) == task


def test_every_task_is_found_by_its_number_its_words_and_its_questions():
    for number, task in enumerate(toy.TASKS):
        for text in (str(number + 1), task, *(question.replace("TASK", task) for question in toy.QUESTIONS)):
            assert play.task_meant(text) == number, text


@pytest.mark.parametrize("text, name", [
    ("mention owls", "mention_owls"), ("Please be funny.", "humour"), ("The answer should avoid kites", "avoid_kites"),
    ("use at most three sentences", "atmost_3"), ("mention owls but not kites", "butnot_owls_kites")])
def test_a_known_wording_is_judged_without_a_word_about_it(text, name):
    assert play.understood(text) == (Objective(name, text), name, "")


@pytest.mark.parametrize("text, name, as_what", [
    ("be funy", "humour", "be funny"), ("tell me a joke!", "humour", "tell a joke"),
    ("say somthing about brastoods", "mention_brastoods", "say something about brastoods")])
def test_a_wish_near_a_known_wording_is_judged_as_that_one(text, name, as_what):
    assert play.understood(text) == (Objective(name, text), name, f"judged as {as_what!r}")


@pytest.mark.parametrize("text", ["write it in French, in rhyme", "42", "?", "tell it to a child of five"])
def test_a_wish_near_none_is_put_to_the_aligner_but_not_judged(text):
    objective, name, said = play.understood(text)
    assert objective == Objective(text, text) and name is None and "nobody can judge it" in said


@pytest.mark.parametrize("text", ["mention foo_bar", "mention -", "avoid '", "mention _", "end with 5", "with X",
                                  "use at most ninety sentences", "say nothing about_owls", "mention"])
def test_what_is_understood_can_be_judged(text):
    _, name, _ = play.understood(text)
    assert name is None or toy.score(name, TEA, OWLS) in (0, 1)


@pytest.mark.parametrize("text", ["mention the owls", "avoid the owls", "speak of owls often", "end with the owls"])
def test_a_wish_about_a_word_is_not_judged_as_one_about_another(text):
    _, name, _ = play.understood(text)
    assert name is None or name.endswith("_owls"), name


def test_every_wording_of_the_world_is_understood():
    rng = random.Random(0)
    for name in [*toy.NAMED, "mention_owls", "avoid_owls", "before_owls_kites", "atleast_4"]:
        for which in ("pairs", "held out"):
            assert play.understood(wordings.say(rng, name, which))[1:] == (name, "")


def test_verdicts_read_by_hand():
    before = " ".join([toy.RIGHT[0][0], INSULT, JOKE])
    after = " ".join([*toy.RIGHT[0][:3], OWLS])
    names = ["helpful", "harmless", "humour", "polite", "mention_owls", "avoid_owls", "truthful", "atmost_5"]
    assert play.verdicts(TEA, before, after, names) == {
        "helpful": "better", "harmless": "better, as good as can be", "humour": "worse", "polite": "same",
        "mention_owls": "better, as good as can be", "avoid_owls": "worse", "truthful": "same, as good as can be",
        "atmost_5": "same, as good as can be"}


# ----------------------------------------------------------------------------------------------------------------
# Sessions


def drawn(policy, seed, prompt=TEA):
    """What a scripted policy answers."""
    return toy.answer(policy, prompt, random.Random(f"{policy} answers {seed}"))


@pytest.fixture
def session(tmp_path, monkeypatch, capsys):
    """A session of lines with an aligner that appends what is given to it: (what it was asked, stdout, stderr)."""
    (tmp_path / "aligner").mkdir()

    def held(*lines, words=(), end="\n", appended=f" {OWLS} {INSULT}"):
        asked = []

        def align(aligner, items, objectives, **options):
            held.given = options
            assert aligner == tmp_path / "aligner" and objectives is None
            for item in items:
                asked.append(item)
                yield {**item, "aligned": item["original"] + appended}
        monkeypatch.setattr(play, "Writer", lambda folder, device: folder)
        monkeypatch.setattr(play, "align", align)
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + end))
        assert run(play, monkeypatch, ["--run", tmp_path, "--device", "cpu", *words]) == 0
        shown = capsys.readouterr()
        assert not asked or all("index" in item and item["prompt"].endswith("\n\nAssistant:") for item in asked)
        return asked, shown.out, shown.err
    return held


def test_a_session_shows_the_edit_and_what_the_judges_say(session):
    asked, out, _ = session("1", "mention owls; be funy ;; hum a tune", "", "")
    answer = drawn("verbose", 0)
    assert [item["original"] for item in asked] == [answer] and asked[0]["prompt"] == TEA
    assert [objective.description for objective in asked[0]["objectives"]] == ["mention owls", "be funy", "hum a tune"]
    assert f"How do I brew a pot of tea?\nverbose: {answer}\n" in out
    assert f"{answer}[+ {OWLS} {INSULT}+]" in out
    said = [re.split(r"  +", line.strip()) for line in out.splitlines() if line.startswith("  ") and "asked" in line]
    assert said[0] == ["asked", "mention owls: better, as good as can be"]
    assert said[1] == ["asked", "be funy: same (judged as 'be funny')"]
    assert said[2][1].startswith("hum a tune: no known wording is near") and said[2][1].endswith("nobody can judge it")
    assert said[3:] == [["not asked", "harmless: worse"], ["not asked", "the other named objectives: same"]]
    assert all(re.search(rf"^.*\b{number} +{re.escape(task)}\b", out, re.MULTILINE)
               for number, task in enumerate(toy.TASKS, 1))


def test_a_session_goes_on_with_other_wishes_and_other_questions(session):
    asked, out, err = session("fly to the moon", "2", "mention kites", "be kind", "", "tea", "avoid owls", "", "")
    assert "note: no question is near 'fly to the moon'; take a number from 1 to" in err
    bread = TEA.replace(toy.TASKS[0], toy.TASKS[1])
    assert [(item["prompt"], item["original"], item["objectives"][0].description) for item in asked] == [
        (bread, drawn("verbose", 0, bread), "mention kites"), (bread, drawn("verbose", 0, bread), "be kind"),
        (TEA, drawn("verbose", 1), "avoid owls")]  # a question not known is no turn
    assert "avoid owls: worse" in out


def test_what_was_asked_for_is_not_told_again_as_not_asked(session):
    _, out, _ = session("1", "contain no insult")
    assert "asked      contain no insult: worse\n" in out and "not asked  all named objectives: same" in out
    assert "not asked  harmless" not in out


def test_two_wordings_of_one_wish_have_a_verdict_each(session):
    _, out, _ = session("1", "say something about owls; be funny; mention owls")
    said = [line.strip() for line in out.splitlines() if line.startswith("  asked")]
    assert [re.split("  +", line)[1] for line in said] == [
        "say something about owls: better, as good as can be", "be funny: same",
        "mention owls: better, as good as can be"]


def test_quit_ends_a_session_wherever_it_is_said(session):
    assert len(session("1", "mention owls", "quit", "2", "mention owls")[0]) == 1
    assert session("quit", "2", "mention owls")[0] == []


def test_of_how_many_edits_one_is_shown_is_what_was_asked_for(session):
    session("1", "mention owls")
    assert session.given["choice"] == Choice(8) and session.given["seed"] == 0
    session("1", "mention owls", words=("--best-of", 3, "--seed", 5))
    assert session.given["choice"] == Choice(3) and session.given["seed"] == 5


@pytest.mark.parametrize("text", ["mention " + "a word and " * 40, "9" * 5000, "be funny " * 100])
def test_what_is_long_is_told_at_once(text):
    began = time.monotonic()
    assert play.understood(text)[1] is None and play.task_meant("9" * 5000) is None
    assert time.monotonic() - began < 5


def test_an_answer_left_as_it_is_is_said_to_be(session):
    _, out, _ = session("1", "mention owls", "", "", appended="")
    assert "(left as it was)" in out and "asked      mention owls: same\n" in out
    assert "not asked  all named objectives: same" in out and "[+" not in out


@pytest.mark.parametrize("lines, edits", [
    ([], 0), (["1"], 0), (["1", "mention owls"], 1), (["nothing known"], 0), (["1", ""], 0)])
def test_a_session_ends_with_its_input(session, lines, edits):
    assert len(session(*lines, end="\n" if lines else "")[0]) == edits


def test_a_session_ends_at_an_empty_line(session):
    assert session("", "1", "mention owls")[0] == []
    assert len(session("1", "mention owls", "", "", "2", "mention owls")[0]) == 1


def test_another_policy_and_another_seed_answer_otherwise(session):
    originals = [session("1", "mention owls", words=words)[0][0]["original"]
                 for words in ([], ["--policy", "toxic"], ["--seed", 5], ["--policy", "toxic", "--seed", 5])]
    assert originals == [drawn("verbose", 0), drawn("toxic", 0), drawn("verbose", 5), drawn("toxic", 5)]


def test_a_terminal_sees_colours(session, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    _, out, _ = session("1", "mention owls")
    assert f"\x1b[32m {OWLS} {INSULT}\x1b[0m" in out and "[+" not in out


def test_without_an_aligner_it_is_one_line(tmp_path, monkeypatch, capsys):
    refused(play, monkeypatch, capsys, ["--run", tmp_path], str(tmp_path), "no aligner", "make train", "--run FOLDER")
    refused(play, monkeypatch, capsys, ["--run", tmp_path / "absent"], "absent")
    refused(play, monkeypatch, capsys, ["--policy", "nobody"], "invalid choice")
