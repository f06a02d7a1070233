"""Where the two systems meet: labels and preference models give an aligner's examples, and judge its edits."""
import itertools
import json
import math
import random
import re
from collections import Counter
from functools import partial

import pytest
import torch

import combine
import conftest
import data
import eval as evaluation
import feedback
import formats
import reward
import scorers
import test_feedback
import test_reward
import toy
import train
from conftest import run, write
from endpoint import Endpoint
from objectives import OBJECTIVES, PRINCIPLES, find_objectives

serve, world, labelled = test_feedback.serve, test_feedback.world, test_reward.labelled  # fixtures
refused = conftest.refused
NAMES = ["detail", "toxicity", "honest"]


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def label(prompt, first, second, principle, p_a):
    return {"prompt": prompt, "response_a": first, "response_b": second, "principle": principle, "p_a": p_a}


def told(examples):
    """What examples ask for, whatever the order in them: the prompt, the edit, the objectives, the relation."""
    return Counter((row["prompt"][slice(*row["context"])], row["prompt"][slice(*row["answer"])], row["completion"],
                    frozenset(row["objectives"]), row["relation"]) for row in examples)


def reformulated(monkeypatch, path, *words):
    out = path.parent / "pairs.jsonl"
    assert run(data, monkeypatch, ["reformulate", path, "--out", out, *words]) == 0
    return told(formats.read_pairs(out))


# ----------------------------------------------------------------------------- labels become examples


BY_HAND = [label("q", "x", "y", "detail", 0.8), label("q", "x", "y", "toxicity", 0.55),
           label("r", "v", "w", "detail", 0), label("r", "v", "w", "honest", 1),
           label("s", "v", "w", "detail", 0.6), label("s", "v", "w", "honest", 0.4), label("t", "", "w", "detail", 0.9)]


@pytest.mark.parametrize("words, expected", [
    ([], [("q", "y", "x", {"detail"}, "better"), ("q", "y", "x", {"toxicity"}, "equal"),
          ("r", "v", "w", {"detail"}, "better"), ("r", "w", "v", {"honest"}, "better"),
          ("s", "w", "v", {"detail", "honest"}, "equal")]),
    (["--margin", "0"], [("q", "y", "x", {"detail", "toxicity"}, "better"), ("r", "v", "w", {"detail"}, "better"),
                         ("r", "w", "v", {"honest"}, "better"), ("s", "w", "v", {"detail"}, "better"),
                         ("s", "v", "w", {"honest"}, "better")]),
    (["--objectives", "honest", "toxicity"], [
        ("q", "y", "x", {"toxicity"}, "equal"), ("r", "w", "v", {"honest"}, "better"),
        ("s", "w", "v", {"honest"}, "equal")]),
])
def test_labels_become_examples_by_hand(tmp_path, monkeypatch, capsys, words, expected):
    """A probability of more than 0.6 says better, one from 0.4 to 0.6 equal, unless another margin is given."""
    path = write(tmp_path / "labels.jsonl", *BY_HAND)
    found = reformulated(monkeypatch, path, *words)
    assert found == Counter((*rest, frozenset(names), relation) for *rest, names, relation in expected)
    said = capsys.readouterr().out
    assert f"{len(expected)} examples" in said
    assert ("left out: 1 because the target is empty" in said) == ("--objectives" not in words)


def mean(mine, texts, text, name):
    """Of the probabilities that a text is the better one, against each of the others."""
    chances = [mine[text, other, name] if (text, other, name) in mine else 1 - mine[other, text, name]
               for other in texts if other != text]
    return sum(chances) / len(chances)


def slow_examples(labels, margin):
    """Every example of labels, by loops over prompts, pairs and principles."""
    found = Counter()
    for prompt in {row["prompt"] for row in labels}:
        mine = {(row["response_a"], row["response_b"], row["principle"]): row["p_a"] for row in labels
                if row["prompt"] == prompt}
        texts = list(dict.fromkeys(text for first, second, _ in mine for text in (first, second)))
        whole = all((*pair, name) in mine for pair in itertools.combinations(texts, 2) for name in NAMES)
        for first, second in itertools.combinations(texts, 2):
            better, worse, equal = set(), set(), set()
            for name in NAMES:
                if (first, second, name) not in mine:
                    continue
                p_a = mine[first, second, name]
                apart = 2 * p_a - 1
                if whole:
                    apart = mean(mine, texts, first, name) - mean(mine, texts, second, name)
                (better if apart > margin else worse if apart < -margin else equal).add(name)
            for source, target, names, relation in ((second, first, better, "better"), (first, second, worse, "better"),
                                                    (second, first, equal, "equal")):
                if names:
                    found[prompt, source, target, frozenset(names), relation] += 1
    return found


@pytest.mark.parametrize("margin", [None, 0.0, 0.35])
def test_labels_of_several_answers_by_brute_force(tmp_path, monkeypatch, margin):
    """Where each two answers are compared on the same principles, each has its mean; else each pair is by itself."""
    rng, labels = random.Random(7), []
    for number in range(40):
        texts = [f"answer {number} {place}" for place in range(rng.randint(2, 4))]
        mine = [label(f"q{number}", *pair, name, rng.random()) for pair in itertools.combinations(texts, 2)
                for name in NAMES]
        if rng.random() < 0.3:  # one that could not be read
            mine.pop(rng.randrange(len(mine)))
        elif rng.random() < 0.3:  # an answer that a policy gave twice
            mine += mine[:len(NAMES)]
        labels += mine
    path = write(tmp_path / "labels.jsonl", *labels)
    words = [] if margin is None else ["--margin", margin]
    expected = slow_examples(labels, 0.2 if margin is None else margin)
    assert reformulated(monkeypatch, path, *words) == expected
    sizes = {(relation, len(names)) for _, _, _, names, relation in expected}
    assert sizes >= {("better", 3), ("better", 2)} and (("equal", 1) in sizes) == (margin != 0)
    rows = list(formats.read_rated(path))
    assert {len(row["responses"]) for row in rows} == {2, 3, 4}
    for row in rows:  # of each two, one is the better one: the scores of a row have the mean one half
        for name in row["responses"][0]["scores"]:
            assert sum(each["scores"][name] for each in row["responses"]) == pytest.approx(len(row["responses"]) / 2)


def test_two_pairs_of_one_prompt_are_not_compared_with_each_other(tmp_path):
    """That v beats w and x beats y says nothing of v and y."""
    path = write(tmp_path / "labels.jsonl", label("q", "v", "w", "detail", 0.9), label("q", "x", "y", "detail", 0.7))
    assert [[each["text"] for each in row["responses"]] for row in formats.read_rated(path)] == [["v", "w"], ["x", "y"]]
    for pairs in (["xy", "xz", "yx"], ["xx", "xy", "xz"], ["xx"], ["xy", "xz", "yz", "zx"]):  # not each pair once
        again = write(tmp_path / "again.jsonl", *(label("q", *pair, "detail", 0.9) for pair in pairs))
        assert ["".join(each["text"] for each in row["responses"]) for row in formats.read_rated(again)] == pairs


def test_a_margin_is_kept_where_rated_rows_are_written_and_read_again(tmp_path, monkeypatch, capsys):
    """By combine.py best, here: of labels, which are estimates."""
    label = formats.preference("Why?", "Yes.", "No.", "toxicity", 0.55)
    words = ["best", write(tmp_path / "labels.jsonl", label), "--weights", "toxicity=1", "--out", tmp_path / "b.jsonl"]
    assert run(combine, monkeypatch, words) == 0
    assert [row["margin"] for row in formats.read_rated(tmp_path / "b.jsonl")] == [formats.LABEL_MARGIN]
    for wrong in (-1, "0.2", True):
        path = write(tmp_path / "rated.jsonl", {"prompt": "Why?", "responses": [], "margin": wrong})
        words = ["reformulate", path, "--out", tmp_path / "o.jsonl"]
        conftest.refused(data, monkeypatch, capsys, words, "rated.jsonl:1", "'margin' is")


def test_principles_are_objectives_and_others_are_told_of(tmp_path, monkeypatch, capsys):
    assert find_objectives([*PRINCIPLES, "Overall"]) == [*PRINCIPLES.values(), OBJECTIVES["overall"]]
    path = write(tmp_path / "labels.jsonl", label("q", "x", "y", "Brevity", 0.8), label("q", "x", "y", "detail", 0.1))
    out = ["--out", tmp_path / "out.jsonl"]
    refused(data, monkeypatch, capsys, ["reformulate", path, *out], "labels.jsonl:1", "unknown objective 'Brevity'",
            "--objectives")
    assert not (tmp_path / "out.jsonl").exists()
    assert reformulated(monkeypatch, path, "--objectives", "Brevity: Be short", "detail") == Counter([
        ("q", "y", "x", frozenset(["Brevity"]), "better"), ("q", "x", "y", frozenset(["detail"]), "better")])
    texts = [row["prompt"] for row in formats.read_pairs(tmp_path / "pairs.jsonl")]
    detail = PRINCIPLES["detail"]
    assert "Be short" in texts[0] and any(text in texts[1] for text in (detail.description, *detail.wordings))


def test_an_aligner_learns_its_three_steps_from_labels(labelled, monkeypatch, capsys):
    """From rated answers through the annotator's labels; HH-RLHF's pairs alone have no equal ones."""
    words = ["label", write(labelled / "rated.jsonl", *toy.rated(12, 5, responses=3)), "--principles", "toxicity",
             "detail", "bias", "--out", labelled / "l.jsonl"]
    assert run(feedback, monkeypatch, words) == 0
    examples = reformulated(monkeypatch, labelled / "l.jsonl")
    relations = Counter(relation for *_, relation in examples.elements())
    capsys.readouterr()
    assert run(train, monkeypatch, ["aligner", "--model", labelled / "base", "--data", labelled / "pairs.jsonl",
                                    "--out", labelled / "aligner", "--max-steps", 1, "--batch", 4, "--max-tokens", 900,
                                    "--precision", "fp32", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "step left out" not in said and "out: over" not in said
    assert f"equal: {relations['equal']} examples" in said and f"better: {relations['better']} examples" in said


# ----------------------------------------------------------------------------- preference models' scores


def test_scored_pairs_become_examples_by_hand(tmp_path, monkeypatch):
    """Scores are log-odds: 0.4 is a probability of 0.6."""
    assert 1 / (1 + math.exp(-formats.SCORE_MARGIN)) == pytest.approx(0.6, abs=0.002) and formats.LABEL_MARGIN == 0.2
    scored = {**label("q", "x", "y", "detail", 0.1), "scores": {"detail": [1.5, -2], "honest": [0.5, 0.9],
                                                                "toxicity": [0, 0.41]}}
    path = write(tmp_path / "scored.jsonl", scored, {**scored, "principle": "honest"})
    assert reformulated(monkeypatch, path) == Counter([
        ("q", "y", "x", frozenset(["detail"]), "better"), ("q", "x", "y", frozenset(["toxicity"]), "better"),
        ("q", "y", "x", frozenset(["honest"]), "equal")])


@pytest.fixture
def models(labelled, monkeypatch):
    """The folder of `labelled`, with preference models in "pms"."""
    assert run(reward, monkeypatch, test_reward.training(labelled, "pms", "--max-steps", "3")) == 0
    return labelled


def test_what_score_writes_becomes_examples(models, monkeypatch):
    """By brute force on the models' scores."""
    folders, path = [models / "pms" / name for name in ("toxicity", "detail")], models / "scored.jsonl"
    assert run(reward, monkeypatch, [*test_reward.scoring(models, *folders), "--out", path]) == 0
    labels = read(models / "labels.jsonl")
    pairs = list(dict.fromkeys((row["prompt"], row["response_a"], row["response_b"]) for row in labels))
    assert len(labels) == 3 * len(pairs)
    score, expected = reward.Scorers(folders, "cpu").score, Counter()
    for prompt, *texts in pairs:
        scores = score([prompt] * 2, texts)
        for source, target, sign, relation in ((1, 0, 1, "better"), (0, 1, -1, "better"), (1, 0, 0, "equal")):
            names = frozenset(name for name, (a, b) in zip(("toxicity", "detail"), scores.tolist())
                              if (a - b > 0.02) - (b - a > 0.02) == sign)
            expected.update([(prompt.strip(), texts[source], texts[target], names, relation)] if names else [])
    assert reformulated(monkeypatch, path, "--margin", "0.02") == expected
    assert {relation for *_, relation in expected} == {"better", "equal"}


# ----------------------------------------------------------------------------- verdicts as text


def asked(payload):
    """The two responses in the order in which the judge is shown them, and whether a letter alone is asked for."""
    text = payload["messages"][0]["content"]
    kind = "response" if "<response_a>" in text else "answer"
    return *(re.search(rf"<{kind}_{letter}>\n(.*)\n</{kind}_{letter}>", text, re.DOTALL)[1] for letter in "ab"), kind


def says(text):
    return {"index": 0, "message": {"role": "assistant", "content": text}}


def wordy(payload):
    """A judge without log-probabilities: the longer one; the first of nearly equally long ones; sometimes nonsense."""
    first, second, _ = asked(payload)
    if (len(first) + len(second)) % 5 == 0:
        return says("Once upon a time")
    return says("A" if abs(len(first) - len(second)) < 12 else "**A**" if len(first) > len(second) else "Answer: B")


def by_length(pair):
    """What the labels of `wordy` should be; None where nobody can read them."""
    first, second = len(pair["response_a"]), len(pair["response_b"])
    if (first + second) % 5 == 0:
        return None
    return 0.5 if abs(first - second) < 12 else float(first > second)


def judging(world, server, out, *more):
    return ["label", world, "--out", out, "--judge-url", server.url, "--judge-model", "judge", "--concurrency", 1,
            "--principles", "toxicity", "detail", *more]


def labels_by_text(world):
    pairs = feedback.response_pairs([world], None, Counter())
    distinct = {tuple(pair.values()) for pair in pairs}  # of an answer that was given twice, two pairs are the same
    return [{**pair, "principle": name, "p_a": by_length(pair), "by": "text"} for pair in pairs
            for name in ("toxicity", "detail") if by_length(pair) is not None], len(pairs), len(distinct)


def test_a_server_without_logprobs_is_asked_for_text_in_both_orders(serve, world, tmp_path, monkeypatch, capsys):
    server, out = serve(wordy), tmp_path / "labels.jsonl"
    expected, count, distinct = labels_by_text(world)
    assert {row["p_a"] for row in expected} == {0.0, 0.5, 1.0} and len(expected) < 2 * count
    assert run(feedback, monkeypatch, judging(world, server, out)) == 0
    assert read(out) == expected
    said, told = capsys.readouterr()
    assert "by A, B or tie as text, in both orders" in said and "gives no log-probabilities" in told
    assert f"{2 * count - len(expected)} labels left out as unreadable" in said
    assert [asked(payload)[2] for payload in server.requests] == ["response"] + ["answer"] * (4 * distinct)
    assert PRINCIPLES["detail"].description in server.requests[-1]["messages"][0]["content"]
    before, requests = out.read_bytes(), len(server.requests)
    assert run(feedback, monkeypatch, judging(world, server, out)) == 0
    assert out.read_bytes() == before and len(server.requests) == requests  # all from the cache
    sure = [row for row in expected if row["p_a"] != 0.5]
    assert sum(relation == "better" for *_, relation in reformulated(monkeypatch, out).elements()) >= len(sure) / 2
    assert list(formats.read_preferences(out)) == [{k: v for k, v in row.items() if k != "by"} for row in expected]


def test_verdicts_as_asked_for(serve, world, tmp_path, monkeypatch, capsys):
    server = serve(test_feedback.shorter)  # has log-probabilities, and says A or B
    words = judging(world, server, tmp_path / "out", "--verdicts", "text", "--judge-tokens", 5, "--limit", 3)
    assert run(feedback, monkeypatch, words[:4] + ["--judge-url", serve(wordy).url] + words[6:]) == 0
    assert all(row["by"] == "text" for row in read(tmp_path / "out"))
    mute = serve(wordy)
    refused(feedback, monkeypatch, capsys, judging(world, mute, tmp_path / "none", "--verdicts", "logprobs"), mute.url,
            "no log-probabilities", "--verdicts text")
    assert run(feedback, monkeypatch, judging(world, server, tmp_path / "soft", "--verdicts", "logprobs")) == 0
    auto = judging(world, server, tmp_path / "auto")
    server.requests.clear()
    assert run(feedback, monkeypatch, auto) == 0
    *_, distinct = labels_by_text(world)
    assert len(server.requests) == 4 * distinct  # how the judge answers is learned from a reply that is needed anyway
    assert (tmp_path / "auto").read_bytes() == (tmp_path / "soft").read_bytes()
    assert not any("by" in row for row in read(tmp_path / "auto"))
    refused(feedback, monkeypatch, capsys, ["label", world, "--out", tmp_path / "x", "--verdicts", "text"],
            "--verdicts", "--judge-url")


@pytest.mark.parametrize("first, second", [(wordy, test_feedback.shorter), (test_feedback.shorter, wordy)])
def test_a_killed_run_goes_on_as_it_began(serve, world, tmp_path, monkeypatch, capsys, first, second):
    """Text verdicts and log-probabilities are never mixed, whatever the server gives by then."""
    now = [first]
    server, out, add = serve(lambda payload: now[0](payload)), tmp_path / "out", feedback.Journal.add
    assert run(feedback, monkeypatch, judging(world, server, tmp_path / "whole")) == 0

    def stop(journal, row):
        add(journal, row)
        if len(journal.rows) == 3:
            raise KeyboardInterrupt
    with monkeypatch.context() as killing:
        killing.setattr(feedback.Journal, "add", stop)
        assert run(feedback, monkeypatch, judging(world, server, out)) == 130
    (tmp_path / "out.judge-cache.jsonl").unlink()
    other = "logprobs" if first is wordy else "text"
    refused(feedback, monkeypatch, capsys, judging(world, server, out, "--verdicts", other), "other settings")
    if first is wordy:  # the second server says a letter as well
        now[0] = lambda payload: {**second_choice(payload), "message": wordy(payload)["message"]}
        server.requests.clear()
        assert run(feedback, monkeypatch, judging(world, server, out)) == 0
        assert {asked(payload)[2] for payload in server.requests} == {"answer"}  # it is not tried again
        assert out.read_bytes() == (tmp_path / "whole").read_bytes()
    else:
        now[0] = second
        refused(feedback, monkeypatch, capsys, judging(world, server, out), "no log-probabilities", "--verdicts text")
        assert not out.exists()


def second_choice(payload):
    return test_feedback.choice({"A": -0.1, "B": -2.0})


def test_a_server_that_refuses_logprobs_is_asked_for_text(serve, world, tmp_path, monkeypatch):
    def strict(status, told, payload):
        return (status, json.dumps({"detail": told})) if "logprobs" in payload else wordy(payload)

    for status, told in ((400, "`logprobs` is not supported with this model"),
                         (422, [{"type": "extra_forbidden", "loc": ["body", "top_logprobs"]}])):
        out, server = tmp_path / f"{status}.jsonl", serve(partial(strict, status, told))
        assert run(feedback, monkeypatch, judging(world, server, out)) == 0
        assert read(out) == labels_by_text(world)[0]
        assert "logprobs" in server.requests[0] and not any("top_logprobs" in each for each in server.requests[1:])


def test_whether_there_are_logprobs_is_learned_from_a_reply_that_says_something(serve):
    """Not from one to texts that are too long, nor from an empty one."""
    pairs = [{"prompt": prompt, "response_a": "a", "response_b": "b"} for prompt in ("long", "mute", "Why?")]

    def server(last):
        def script(payload):
            text = payload["messages"][0]["content"]
            if "long" in text.split("<conversation>")[1]:
                return 400, '{"error": "maximum context length is 4096 tokens"}'
            return says("") if "mute" in text.split("<conversation>")[1] else last
        return Endpoint(serve(script).url, "judge")
    principle = PRINCIPLES["detail"]
    assert feedback.gives_logprobs(server({"A": -0.1}), pairs, principle)
    assert not feedback.gives_logprobs(server(says("A")), pairs, principle)
    assert not feedback.gives_logprobs(server({"A": -0.1}), pairs[:2], principle)


# ----------------------------------------------------------------------------- preference models as judges


def aligned_rows(labelled):
    rated = list(toy.rated(8, 9, responses=3))
    objectives = [str(PRINCIPLES[name]) for name in ("toxicity", "detail")]
    return [{"prompt": row["prompt"], "objectives": objectives,
             **dict(zip(("original", "aligned", "golden"), (each["text"] for each in row["responses"])))}
            for row in rated]


def test_win_rates_by_preference_models(models, monkeypatch, capsys):
    """By brute force on the models' scores."""
    rows, folders = aligned_rows(models), [models / "pms" / name for name in ("detail", "toxicity")]
    rows[3]["aligned"] = rows[3]["original"]
    words = [write(models / "aligned.jsonl", *rows), "--device", "cpu", "--out", models / "report", "--judge", *folders]
    assert run(evaluation, monkeypatch, words) == 0
    found = json.loads((models / "report" / "eval.json").read_text())["aligned"]["objectives"]
    assert set(found) == {"toxicity", "detail"} and "pms/detail" in (models / "report" / "report.html").read_text()
    wins = 0
    for folder in folders:
        model, figures, worth = reward.Scorers([folder], "cpu"), found[folder.name], Counter()
        for row in rows:
            texts = [row[name] for name in ("original", "aligned", "golden")]
            original, aligned, golden = model.score([row["prompt"]] * 3, texts)[0].tolist()
            worth["wins"] += aligned > original and row["aligned"] != row["original"]
            worth["ties"] += row["aligned"] == row["original"]
            worth["before"] += (original > golden) + 0.5 * (row["original"] == row["golden"])
            worth["after"] += (aligned > golden) + 0.5 * (row["aligned"] == row["golden"])
        assert (figures["wins"], figures["ties"]) == (worth["wins"], worth["ties"])
        assert figures["ties"] == 1 and figures["losses"] == len(rows) - 1 - worth["wins"]
        assert figures["win_rate_original"] == pytest.approx(100 * worth["before"] / len(rows))
        assert figures["win_rate_aligned"] == pytest.approx(100 * worth["after"] / len(rows))
        wins += worth["wins"]
    assert 0 < wins < 14


def test_scores_that_differ_by_rounding_alone_are_a_tie():
    class Models:
        names, std = ["Detail", "honest"], torch.tensor([2.0, 0.0])

        def score(self, prompts, responses):
            values = torch.tensor([float(text) for text in responses])
            return torch.stack([values, -values])
    rows = [{"prompt": "q", "original": "1", "aligned": second} for second in ("1.0001", "1.001")]
    judge = evaluation.model_judge(Models(), rows)
    found = [[judge("q", row["original"], row["aligned"], OBJECTIVES[name]) for name in ("detail", "honest")]
             for row in rows]
    assert found == [["tie", "first"], ["second", "first"]]  # half of 1e-4 standard deviations; more than 1e-4


def test_refusals_of_a_judge(models, monkeypatch, capsys):
    toxicity, detail = (models / "pms" / name for name in ("toxicity", "detail"))
    rows = write(models / "aligned.jsonl", *aligned_rows(models))
    before = sorted(models.iterdir())
    for words, *expected in (
            (["--judge", toxicity], "aligned.jsonl: row 1: no preference model", "(toxicity)", "'detail'"),
            (["--judge", toxicity, "--objectives", "harmless"], "no preference model", "'harmless'"),
            (["--judge", toxicity, "--objectives", "wit"], "unknown objective 'wit'"),
            (["--judge", toxicity, detail, "--judge-url", "http://localhost:9", "--judge-model", "m"], "two judges"),
            (["--judge", models / "base"], "is a language model"), (["--judge", models / "no"], "no such folder"),
            (["--device", "cpu"], "--device", "--judge")):
        refused(evaluation, monkeypatch, capsys, [rows, "--out", models / "out", *words], *expected)
    assert sorted(models.iterdir()) == before
    copy = models / "copy"
    copy.mkdir()
    for path in toxicity.iterdir():
        if path.is_file():
            (copy / path.name).write_bytes(path.read_bytes())
    refused(evaluation, monkeypatch, capsys, [rows, "--judge", toxicity, copy], "is a preference model for 'toxicity'")
    assert run(evaluation, monkeypatch, [rows, "--judge", toxicity, "--objectives", "Toxicity", "--out",
                                         models / "out"]) == 0


def test_a_text_is_scored_once():
    class Models:
        names, asked = ["detail"], []

        def score(self, prompts, responses):
            self.asked += responses
            return torch.tensor([[float(len(text)) for text in responses]])
    scores = scorers.score_once(Models(), [("q", "aa"), ("q", "b"), ("q", "aa"), ("r", "aa")])
    assert scores.tolist() == [[2, 1, 2, 2]] and Models.asked == ["aa", "b", "aa"]
