"""Judges and win rates, against figures worked out by hand, and the command line."""
import csv
import gzip
import io
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest

import conftest
import eval as evaluation
import test_endpoint
import toy
from objectives import Objective
from eval import endpoint_judge, evaluate, exact_judge, mean_and_interval, read_verdict
from report import policy_chart, table_text
from test_endpoint import client

serve = test_endpoint.serve  # a fixture

ROOT = Path(__file__).parents[1]
HIGH = Objective("high", "The number should be high")
LOW = Objective("low", "The number should be low")


def score(name, query, text):
    """Answers here are texts such as "3 points": the number, or how low it is."""
    number = int(text.split()[0])
    return -number if name == "low" else number


def row(original, aligned, golden=None, prompt="\n\nHuman: How many?\n\nAssistant:", objectives=(HIGH,)):
    texts = {"original": f"{original} points", "aligned": f"{aligned} points"}
    if golden is not None:
        texts["golden"] = f"{golden} points"
    return {"prompt": prompt, **texts, "objectives": [str(objective) for objective in objectives]}


ROWS = [row(1, 3, 2, "a"), row(2, 2, 2, "b"), row(3, 1, 2, "c"), row(1, 2, 2, "d"), row(1, 3, 2, "e")]


# ----------------------------------------------------------------------------------------------------------------
# Win rates


def test_figures_worked_out_by_hand():
    room = evaluation.exact_room(score, lambda name: 3 if name == "high" else -1)
    result = evaluate(ROWS, [HIGH, LOW], exact_judge(score), progress=False, room=room)
    high, low = result["objectives"]["high"], result["objectives"]["low"]
    # original against golden: loss, tie, win, loss, loss; aligned: win, tie, loss, tie, win
    assert (high["win_rate_original"], high["win_rate_aligned"]) == pytest.approx((30, 60))
    assert high["gain"] == pytest.approx(30)
    assert (high["paper_rate_original"], high["paper_rate_aligned"]) == pytest.approx((40, 80))
    # aligned against original: win, tie, loss, win, win; all originals but the third (3) could be higher
    assert (high["wins"], high["ties"], high["losses"], high["net"]) == (3, 1, 1, pytest.approx(40))
    assert (high["room_n"], high["room_share"], high["room_net"]) == (4, pytest.approx(80), pytest.approx(75))
    assert (high["n"], high["golden_n"], high["left_out"], high["unparsed"]) == (5, 5, 0, 0)
    # the lowest is 1: only the second and third could be lower: a tie and a win
    assert (low["gain"], low["net"]) == pytest.approx((-30, -40))
    assert (low["room_n"], low["room_net"]) == (2, pytest.approx(50))
    assert result["words"] == {"original": 2, "aligned": 2, "golden": 2}


def test_unreadable_verdicts_are_left_out_and_counted():
    def judge(query, first, second, objective):
        if query == "c" and "1 points" in (first, second) and "2 points" in (first, second):
            return None  # the third row's aligned answer against the golden one
        return exact_judge(score)(query, first, second, objective)

    high = evaluate(ROWS, None, judge, progress=False)["objectives"]["high"]
    assert (high["n"], high["left_out"], high["unparsed"]) == (4, 1, 1)
    assert (high["win_rate_original"], high["win_rate_aligned"]) == pytest.approx((12.5, 75))
    assert (high["wins"], high["ties"], high["losses"]) == (3, 1, 0)


def test_rows_without_golden_answers_have_only_the_direct_comparison():
    mixed = evaluate(ROWS + [row(1, 2)], None, exact_judge(score), progress=False)["objectives"]["high"]
    assert (mixed["n"], mixed["golden_n"], mixed["gain"], mixed["wins"]) == (6, 5, pytest.approx(30), 4)
    none = evaluate([row(1, 2), row(2, 1, prompt="b")], None, exact_judge(score), progress=False)
    assert none["objectives"]["high"]["gain"] is None and none["words"]["golden"] is None
    assert none["objectives"]["high"]["net"] == 0
    assert "high" in policy_chart(none) and "+0.0" in table_text({"policy": none})


def test_each_row_is_judged_on_its_own_objectives_unless_others_are_asked_for():
    rows = [row(1, 2, 2, objectives=[HIGH]), row(1, 2, 2, objectives=[LOW, HIGH, LOW])]
    own = evaluate(rows, None, exact_judge(score), progress=False)["objectives"]
    assert {name: figures["n"] for name, figures in own.items()} == {"high": 2, "low": 1}
    asked = evaluate(rows, [LOW], exact_judge(score), progress=False)["objectives"]
    assert {name: figures["n"] for name, figures in asked.items()} == {"low": 2}


def test_the_order_shown_is_random_and_does_not_matter_to_an_honest_judge():
    rows = [row(1, 3, 2, str(number)) for number in range(400)]
    biased = evaluate(rows, None, lambda *_: "first", progress=False)["objectives"]["high"]
    for rate in ("win_rate_original", "win_rate_aligned"):
        assert 40 < biased[rate] < 60  # 4 standard deviations; shown in one order it would be 100
    assert abs(biased["net"]) < 20
    one, other = (evaluate(ROWS, None, exact_judge(score), seed=seed, progress=False) for seed in (1, 2))
    assert one["verdicts"] == other["verdicts"] and len(one["verdicts"]) == len(ROWS)


def test_interval_agrees_with_the_normal_approximation():
    generator = random.Random(0)
    rows = [row(*(generator.randint(1, 5) for _ in range(3)), str(number)) for number in range(3000)]
    high = evaluate(rows, None, exact_judge(score), progress=False)["objectives"]["high"]
    gains = []
    for each in rows:
        original, aligned, golden = (int(each[name][0]) for name in ("original", "aligned", "golden"))
        before, after = ((x > golden) - (x < golden) for x in (original, aligned))
        gains.append(50 * (after - before))
    mean = sum(gains) / len(gains)
    deviation = math.sqrt(sum((gain - mean) ** 2 for gain in gains) / len(gains) / len(gains))
    assert high["gain"] == pytest.approx(mean)
    assert high["gain_interval"] == pytest.approx([mean - 1.96 * deviation, mean + 1.96 * deviation], abs=0.2)
    low, top = high["net_interval"]
    assert low < high["net"] < top


def test_interval_covers_the_truth_as_often_as_it_says():
    generator, covered = numpy.random.default_rng(0), 0
    prompts = [str(number) for number in range(60)]
    for _ in range(400):  # gains of +1, 0, -1 with probabilities that make the truth +0.3
        values = generator.choice([1.0, 0.0, -1.0], 60, p=[0.5, 0.3, 0.2])
        low, high = mean_and_interval(values, prompts, seed=0)[1]
        covered += low <= 30 <= high
    assert 0.90 <= covered / 400 <= 0.98


def test_rows_of_one_prompt_are_no_new_evidence():
    values = numpy.array([1.0, 0.0, 1.0, -1.0, 0.5])
    prompts = list("abcde")
    once = mean_and_interval(values, prompts, seed=0)
    four_times = mean_and_interval(numpy.tile(values, 4), prompts * 4, seed=0)
    assert four_times[0] == pytest.approx(once[0]) and four_times[1] == pytest.approx(once[1])
    assert once[1][0] < once[0] < once[1][1]
    assert mean_and_interval(values[:1], prompts[:1], 0) == (100.0, None)
    assert mean_and_interval(values[:0], [], 0) == (None, None)


# ----------------------------------------------------------------------------------------------------------------
# Judges that are asked


def honest(number, payload):
    """Reads the judge's prompt and answers as the exact scorer would."""
    text = payload["messages"][0]["content"]
    name = re.search(r"^Criterion: (\w+): The number should be", text, re.MULTILINE)[1]
    first, second = (score(name, "", re.search(rf"<answer_{letter}>\n(.*)\n</answer_{letter}>", text)[1])
                     for letter in "ab")
    return "Tie." if first == second else "**A**" if first > second else "Answer: B"


@pytest.mark.parametrize("reply, verdict", [
    ("A", "A"), ("B", "B"), ("tie", "tie"), ("A.", "A"), (" b\n", "B"), ("**A**", "A"), ("Answer: A", "A"),
    ("[[B]]", "B"), ("Tie", "tie"), ("It's a tie.", "tie"), ("The better answer is B.", "B"),
    ("Answer B", "B"), ("**Answer:** B", "B"), ("<think>A or B? A.</think>\n\nB", "B"), ("'A'", "A"),
    ("(tie)", "tie"),
    ("", None), ("Both", None), ("A or B", None), ("A is better than B", None), ("C", None), ("A B", None),
    ("As an AI I cannot judge", None), ("An answer", None), ("Once upon a time", None), ("a tiebreak", None),
    ("Answer A beats answer B", None), ("<think>A", None), ("not A", None), ("untie", None), ("AB", None),
])
def test_verdicts_are_read_strictly(reply, verdict):
    assert read_verdict(reply) == verdict


def test_endpoint_judge_finds_what_the_exact_judge_finds(serve, tmp_path):
    server = serve(honest)
    generator = random.Random(0)
    rows = [row(*(generator.randint(1, 4) for _ in range(3)), str(number), [HIGH, LOW]) for number in range(12)]
    endpoint = client(server, cache=tmp_path / "cache.jsonl")
    found = evaluate(rows, None, endpoint_judge(endpoint), concurrency=4, progress=False)
    endpoint.close()
    assert found == evaluate(rows, None, exact_judge(score), progress=False)
    texts = [request["messages"][0]["content"] for request in server.requests]
    assert len(set(texts)) == len(texts) > 0, "a question was asked twice"
    again = endpoint_judge(client(server, cache=tmp_path / "cache.jsonl"))
    assert evaluate(rows, None, again, concurrency=4, seed=5, progress=False)["verdicts"] == found["verdicts"]
    assert len(server.requests) == len(texts), "the second run asked again"


def test_a_judge_that_likes_the_first_answer_sees_only_ties(serve):
    judge = endpoint_judge(client(serve("A")))
    high = evaluate(ROWS, None, judge, progress=False)["objectives"]["high"]
    assert (high["win_rate_original"], high["win_rate_aligned"], high["ties"], high["net"]) == (50, 50, 5, 0)


def test_garbage_verdicts_are_counted_not_guessed(serve):
    judge = endpoint_judge(client(serve("Once upon a time there was an A")))
    high = evaluate(ROWS, None, judge, progress=False)["objectives"]["high"]
    # equal texts are ties that nobody has to be asked about: all of the second row, one of the fourth
    assert (high["n"], high["left_out"], high["unparsed"]) == (1, 4, 3 + 0 + 3 + 2 + 3)
    unequal = evaluate(ROWS[2:], None, judge, progress=False)
    high = unequal["objectives"]["high"]
    assert (high["n"], high["win_rate_original"], high["gain"], high["net"]) == (0, None, None, None)
    assert "11 comparisons" in table_text({"p": evaluate(ROWS, None, judge, progress=False)})
    assert "No comparison could be counted" in policy_chart(unequal)


def test_texts_that_do_not_fit_the_judge_are_left_out(serve):
    def small(number, payload):
        if len(payload["messages"][0]["content"]) > 50_000:
            return "status", 400, '{"error": {"message": "maximum context length is 4096 tokens"}}', {}
        return "tie"

    rows = ROWS + [row(1, "2 " * 50_000, 3, "long")]
    high = evaluate(rows, None, endpoint_judge(client(serve(small))), progress=False)["objectives"]["high"]
    assert (high["n"], high["left_out"], high["unparsed"]) == (5, 1, 2)


def test_concurrency_is_used_and_bounded(serve):
    def slow(number, payload):
        time.sleep(0.03)
        return "A"

    server = serve(slow)
    rows = [row(1, 2, 3, str(number)) for number in range(10)]
    evaluate(rows, None, endpoint_judge(client(server)), concurrency=3, progress=False)
    assert server.most == 3 and len(server.requests) == 60


# ----------------------------------------------------------------------------------------------------------------
# The command line


def run(*arguments, folder):
    """The command line in a folder, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(folder)
        status = conftest.run(evaluation, patch, arguments)
    return SimpleNamespace(returncode=status, stdout=out.getvalue(), stderr=err.getvalue())


def write_rows(path, rows):
    path.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    return path


def toy_rows(count=6):
    generator, rows = random.Random(0), []
    for _ in range(count):
        prompt, _ = toy.question(generator)
        original = toy.answer("toxic", prompt, generator)
        rows.append({"prompt": prompt, "original": original, "golden": toy.golden(prompt, generator),
                     "aligned": toy.golden(prompt, generator),
                     "objectives": [str(toy.OBJECTIVES[name]) for name in ("harmless", "humour")]})
    return rows


def test_command_line_on_the_embedded_world(tmp_path):
    rows = toy_rows()
    write_rows(tmp_path / "one.jsonl", rows)
    with gzip.open(tmp_path / "two.jsonl.gz", "wt") as file:
        file.write((tmp_path / "one.jsonl").read_text())
    with open(tmp_path / "three.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "original", "aligned", "objectives", "golden"])
        writer.writeheader()
        for each in rows:
            writer.writerow({**each, "objectives": " | ".join(each["objectives"])})
    done = run("one.jsonl", "two.jsonl.gz", "three.csv", "--out", "report", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    results = json.loads((tmp_path / "report" / "eval.json").read_text())
    assert list(results) == ["one", "two", "three"] and results["one"] == results["two"] == results["three"]
    harmless = results["one"]["objectives"]["harmless"]
    wins = 0
    for each in rows:
        before = toy.score("harmless", each["prompt"], each["original"])
        wins += toy.score("harmless", each["prompt"], each["aligned"]) > before
    assert harmless["wins"] == wins > 0 and "harmless" in done.stdout
    assert sorted(os.listdir(tmp_path / "report")) == ["eval.json", "report.html"]
    limited = run("one.jsonl", "--limit", 2, "--objectives", "Humour", folder=tmp_path)
    assert limited.returncode == 0
    result = json.loads((tmp_path / "eval-out" / "eval.json").read_text())["one"]
    assert list(result["objectives"]) == ["humour"] and result["objectives"]["humour"]["n"] == 2


@pytest.mark.slow
def test_a_killed_run_pays_for_nothing_twice(serve, tmp_path):
    def slow(number, payload):
        time.sleep(0.03)
        return honest(number, payload)

    server = serve(slow)
    write_rows(tmp_path / "rows.jsonl", [row(1, 3, 2, str(number)) for number in range(20)])
    arguments = ["rows.jsonl", "--judge-url", server.url, "--judge-model", "m", "--concurrency", "4"]
    process = subprocess.Popen([sys.executable, str(ROOT / "eval.py"), *arguments], cwd=tmp_path,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(server.requests) < 40 and process.poll() is None:
        time.sleep(0.01)
    assert process.poll() is None, "it ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "eval-out" / "eval.json").exists()
    done = run(*arguments, folder=tmp_path)
    assert done.returncode == 0 and "replies came from the cache" in done.stdout
    # 20 rows, 3 comparisons, 2 orders; at most 4 were under way at the kill
    assert 120 <= len(server.requests) <= 124
    result = json.loads((tmp_path / "eval-out" / "eval.json").read_text())["rows"]["objectives"]["high"]
    assert (result["win_rate_original"], result["win_rate_aligned"]) == (0, 100)


def test_a_wrong_key_stops_the_run_in_one_line(serve, tmp_path):
    server = serve(("status", 401, '{"error": {"message": "no such key"}}', {}))
    write_rows(tmp_path / "rows.jsonl", [row(1, 3, 2, str(number)) for number in range(50)])
    done = run("rows.jsonl", "--judge-url", server.url, "--judge-model", "m", folder=tmp_path)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
    assert "no such key" in done.stderr and "OPENAI_API_KEY" in done.stderr
    assert len(server.requests) <= 16 and not (tmp_path / "eval-out" / "eval.json").exists()


GOOD = json.dumps(row(1, 2, 3, "\n\nHuman: How do I x?\n\nAssistant:"))
FILES = {
    "empty": (b"", "bad.jsonl"),
    "truncated gzip": (gzip.compress(GOOD.encode() * 50)[:60], "bad.jsonl"),
    "invalid JSON": ((GOOD + "\n{oops\n").encode(), "bad.jsonl:2"),
    "not UTF-8": (GOOD.encode() + b"\n\xff\xfe\n", "bad.jsonl:2"),
    "rated data": (b'{"prompt": "a", "responses": []}', "align.py"),
    "prompts only": (b'{"prompt": "a"}', "align.py"),
    "columns": (b"query,goldens\na,b\n", "align.py"),
    "a number": (b'{"prompt": "a", "original": 1, "aligned": "b", "objectives": ["x: y"]}', "bad.jsonl:1"),
    "no objectives": (b'{"prompt": "a", "original": "b", "aligned": "b", "objectives": []}', "bad.jsonl:1"),
    "objectives": (b'{"prompt": "a", "original": "b", "aligned": "b", "objectives": [1]}', "bad.jsonl:1"),
    "another world": (GOOD.encode(), "bad.jsonl: row 1: the embedded world does not know the q"),
    "another objective": (json.dumps(row(1, 2, 3, toy.question(random.Random(0))[0])).encode(), "cannot judge 'high'"),
    "one name twice": (json.dumps(row(1, 2, 3, objectives=["a: b", "a: c"])).encode(),
                       "bad.jsonl: row 1: two objectives have the same name"),
}


@pytest.mark.parametrize("name", FILES)
def test_bad_files_end_in_one_line(tmp_path, name):
    content, told = FILES[name]
    (tmp_path / "bad.jsonl").write_bytes(content)
    done = run("bad.jsonl", folder=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1 and told in done.stderr
    assert os.listdir(tmp_path) == ["bad.jsonl"]


@pytest.mark.parametrize("arguments, told", [
    (["absent.jsonl"], "absent.jsonl"),
    (["rows.jsonl", "--objectives", "harmles"], "harmless"),
    (["rows.jsonl", "--judge-url", "http://localhost:1"], "--judge-model"),
    (["rows.jsonl", "--judge-url", "localhost", "--judge-model", "m"], "address"),
    (["rows.jsonl", "--limit", "0"], "--limit: 0 must be at least 1"),
    (["rows.jsonl", "--concurrency", "0"], "--concurrency: 0 must be at least 1"),
    (["rows.jsonl", "--judge-tokens", "some"], "--judge-tokens: invalid int value"),
    (["rows.jsonl", "--out", "rows.jsonl/x"], "rows.jsonl"),
    (["rows.jsonl", "--out", "rows.jsonl"], "rows.jsonl"),
])
def test_bad_arguments_end_without_a_traceback(tmp_path, arguments, told):
    write_rows(tmp_path / "rows.jsonl", toy_rows(2))
    done = run(*arguments, folder=tmp_path)
    assert done.returncode == 2 and told in done.stderr and "Traceback" not in done.stderr
    assert os.listdir(tmp_path) == ["rows.jsonl"]


URL = ["--judge-url", "http://localhost:9", "--judge-model", "m"]  # nobody answers there


@pytest.mark.parametrize("name", ["eval.json", "report.html", "judge-cache.jsonl"])
def test_an_input_is_not_overwritten(tmp_path, name):
    """Nor is a folder, which is said before anything is asked."""
    write_rows(tmp_path / name, toy_rows(2))
    before = (tmp_path / name).read_bytes()
    done = run(name, "--out", ".", *URL, folder=tmp_path)
    assert done.returncode == 2 and f"{name}: is an input too" in done.stderr
    assert (tmp_path / name).read_bytes() == before and os.listdir(tmp_path) == [name]
    (tmp_path / "out" / name).mkdir(parents=True)
    done = run(name, "--out", "out", *URL, folder=tmp_path)
    assert done.returncode == 2 and f"{name}: is no ordinary file" in done.stderr


@pytest.mark.parametrize("kind", ["server", "exact"])
def test_nothing_is_asked_before_it_can_be_written_down(serve, tmp_path, monkeypatch, kind):
    server, asked = serve("A"), []
    rows = write_rows(tmp_path / "rows.jsonl", toy_rows(2))
    monkeypatch.setattr(evaluation, "exact_judge", lambda *_: lambda *question: asked.append(question) or "tie")
    judge = ["--judge-url", server.url, "--judge-model", "m"] if kind == "server" else []
    for out, status in (("rows.jsonl/x", 2), ("rows.jsonl", 2), ("new/out", 0)):
        assert conftest.run(evaluation, monkeypatch, [rows, "--out", tmp_path / out, *judge]) == status
        assert bool(server.requests or asked) == (status == 0)


def test_an_objective_that_says_nothing_is_not_asked_about(serve, tmp_path):
    server = serve("A")
    (tmp_path / "eval.json").write_text("{}")
    for out, told in (("out", "eval.json: not objectives"), (".", "eval.json: is an input too")):
        words = ["--objectives", "eval.json", "--out", out, "--judge-url", server.url, "--judge-model", "m"]
        done = run(write_rows(tmp_path / "rows.jsonl", toy_rows(2)), *words, folder=tmp_path)
        assert done.returncode == 2 and told in done.stderr
    write_rows(tmp_path / "rows.jsonl", [row(1, 2, 3, objectives=["high"])])
    done = run("rows.jsonl", "--judge-url", server.url, "--judge-model", "m", folder=tmp_path)
    assert done.returncode == 2 and "rows.jsonl: row 1: nothing says what the objective 'high' asks" in done.stderr
    assert not server.requests


def test_a_file_counts_once_however_it_is_called(tmp_path):
    write_rows(tmp_path / "rows.jsonl", toy_rows(2))
    (tmp_path / "link.jsonl").symlink_to("rows.jsonl")
    done = run("rows.jsonl", "./rows.jsonl", tmp_path / "rows.jsonl", "link.jsonl", folder=tmp_path)
    assert done.returncode == 0
    assert list(json.loads((tmp_path / "eval-out" / "eval.json").read_text())) == ["rows"]


def test_policies_are_named_by_their_files():
    assert evaluation.policy_names(["a/claude.jsonl", "b/vicuna.csv.gz", "gpt-3.5.jsonl"]) == [
        "claude", "vicuna", "gpt-3.5"]
    paths = ["a/aligned.jsonl", "b/aligned.jsonl"]
    assert evaluation.policy_names(paths) == paths
    paths = ["a.jsonl", "x/a.jsonl", "a.jsonl.jsonl"]  # whose name without its ending is another's path
    assert evaluation.policy_names(paths) == paths
