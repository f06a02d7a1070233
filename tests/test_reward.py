"""Feedback, scalarization and what is reported, against slow loops, figures worked out by hand, and a server."""
import itertools
import json
import math
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy
import pytest
import torch

import conftest
import data
import model
import reward
import toy
from data import Objective, UserError
from eval import Endpoint

ROOT = Path(__file__).parents[1]
BRIEF = Objective("Brevity", "The response should be short")
PAIR = {"prompt": "\n\nHuman: Why?\n\nAssistant:", "response_a": "Because.", "response_b": "Because {it} is so."}
run = partial(conftest.run, reward)


def refused(monkeypatch, capsys, words, *expected):
    capsys.readouterr()
    assert run(monkeypatch, words) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.match(r"(reward.py \w+: )?error: ", message) and all(text in message for text in expected), message


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ----------------------------------------------------------------------------- scalarization


def slow_linear(x):
    total = 0.0
    for value in x:
        total += value
    return total


def slow_worst_case(x):
    lowest = x[0]
    for value in x:
        lowest = value if value < lowest else lowest
    return lowest


def slow_soft_max_min(x, temperature=1.0):
    parts = [math.exp(-value / temperature) for value in x]
    return sum(part * value for part, value in zip(parts, x)) / sum(parts)


def slow_uncertainty_weighted(x, lam=0.5):
    return statistics.fmean(x) - lam * statistics.pvariance(x)


def slow_lower_quantile(x, share=1 / 3):
    count = min(n for n in range(1, len(x) + 1) if n / len(x) >= share - 1e-6)
    return statistics.fmean(sorted(x)[:count])


def slow_bernoulli_nash(x):
    return math.prod(math.log(1 + math.exp(value)) for value in x) ** (1 / len(x))


SLOW = {"linear": slow_linear, "worst_case": slow_worst_case, "soft_max_min": slow_soft_max_min,
        "uncertainty_weighted": slow_uncertainty_weighted, "lower_quantile": slow_lower_quantile,
        "median": statistics.median, "bernoulli_nash": slow_bernoulli_nash}
CASES = [(name, {}) for name in SLOW] + [
    ("soft_max_min", {"temperature": 0.3}), ("uncertainty_weighted", {"lam": 2.0}),
    ("lower_quantile", {"share": 0.5})]
MONOTONE = ["linear", "worst_case", "lower_quantile", "median", "bernoulli_nash"]


def random_case(size, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(size, count, generator=generator, dtype=torch.float64),
            torch.randn(size, generator=generator, dtype=torch.float64))


def test_the_seven_are_there_in_order():
    assert list(reward.SCALARIZATIONS) == list(SLOW)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("how, options", CASES)
def test_scalarizations_agree_with_slow_loops(how, options, dtype, tolerance):
    for size, count in itertools.product((1, 2, 3, 4, 7, 12), (1, 5)):
        scores, weights = random_case(size, count, seed=size)
        rewards = reward.scalarize(scores.to(dtype), weights.to(dtype), how, **options)
        x = (weights[:, None] * scores).T.tolist()
        expected = [SLOW[how](x[n], **options) for n in range(count)]
        assert rewards.dtype == dtype and rewards.shape == (count,)
        assert rewards.tolist() == pytest.approx(expected, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("how", SLOW)
def test_neither_the_principles_order_nor_the_rest_of_a_batch_matters(how):
    scores, weights = random_case(7, 9)
    rewards = reward.scalarize(scores, weights, how)
    order, others = torch.tensor([3, 0, 6, 2, 1, 5, 4]), torch.tensor([8, 1, 0, 4, 3, 2, 7, 6, 5])
    assert torch.allclose(reward.scalarize(scores[order], weights[order], how), rewards, rtol=1e-12, atol=1e-14)
    assert torch.equal(reward.scalarize(scores[:, others], weights, how), rewards[others])
    for n in range(9):  # alone, and beside a response with extreme scores
        beside = torch.cat([scores[:, n:n + 1], torch.full((7, 1), 1e4, dtype=torch.float64)], 1)
        for batch in (beside[:, :1], beside):
            assert float(reward.scalarize(batch, weights, how)[0]) == pytest.approx(float(rewards[n]), rel=1e-12)
    assert len(set(rewards.tolist())) == 9


@pytest.mark.parametrize("how", MONOTONE)
def test_a_better_score_never_lowers_a_monotone_reward(how):
    scores, weights = random_case(6, 200)
    weights = weights.abs()
    before = reward.scalarize(scores, weights, how)
    for principle, rise in itertools.product(range(6), (0.1, 1.0, 10.0)):
        raised = scores.clone()
        raised[principle] += rise
        assert (reward.scalarize(raised, weights, how) >= before).all()
    assert (reward.scalarize(scores + 1, weights, how) > before).all()


@pytest.mark.parametrize("how, low, high", [("soft_max_min", 2.0, 9.0), ("uncertainty_weighted", 3.0, 9.0)])
def test_the_other_two_are_not_monotone_as_they_say(how, low, high):
    rewards = reward.scalarize(torch.tensor([[0.0, 0.0], [low, high]]), [1.0, 1.0], how)
    assert rewards[0] > rewards[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_soft_max_min_lies_between_its_limits(dtype):
    scores, weights = (values.to(dtype) for values in random_case(5, 50))
    x = weights[:, None] * scores
    at = {t: reward.scalarize(scores, weights, "soft_max_min", temperature=t) for t in (1e-30, 1e-3, 0.1, 1, 10, 1e6)}
    assert torch.equal(at[1e-30], x.amin(0)) and torch.allclose(at[1e6], x.mean(0), atol=1e-5)
    for cooler, warmer in itertools.pairwise(at):
        assert (at[cooler] <= at[warmer] + 1e-6).all()
    assert (at[1] > x.amin(0)).all() and (at[1] < x.mean(0)).all()


def test_scalarizations_by_hand():
    x = torch.tensor([[1.0, 5.0], [2.0, -1.0], [4.0, 0.0], [9.0, 2.0]])
    ones = torch.ones(4)
    assert reward.scalarize(x, ones, "median").tolist() == [3.0, 1.0]
    assert reward.scalarize(x, ones, "lower_quantile").tolist() == [1.5, -0.5]  # a third of four, rounded up: two
    assert reward.scalarize(x[:3], ones[:3], "lower_quantile").tolist() == [1.0, -1.0]
    assert reward.scalarize(x[:2], ones[:2], "lower_quantile").tolist() == [1.0, -1.0]  # K = 2: one of them
    assert reward.scalarize(x[:1], ones[:1], "lower_quantile").tolist() == [1.0, 5.0]
    twelve = torch.arange(12.0)[:, None]
    assert reward.scalarize(twelve, torch.ones(12), "lower_quantile").tolist() == [1.5]  # the mean of 0, 1, 2, 3
    assert reward.scalarize(x, [1, -1, 0, 0.5], "linear").tolist() == [3.5, 7.0]
    assert reward.scalarize(x, [1, -1, 0, 0.5], "worst_case").tolist() == [-2.0, 0.0]


def test_bernoulli_nash_stays_finite_and_tells_bad_from_worse():
    for dtype, lowest in ((torch.float32, -80.0), (torch.float64, -700.0)):
        x = torch.tensor([[lowest, lowest - 5, -41.0, -39.0, 0.0, 50.0, 1e4]], dtype=dtype)
        rewards = reward.scalarize(x, [1.0], "bernoulli_nash")
        assert rewards.isfinite().all() and (rewards > 0).all() and rewards[1] < rewards[0]
        assert rewards[2:].tolist() == pytest.approx([math.exp(-41), math.exp(-39), math.log(2), 50, 1e4], rel=1e-5)
    mixed = torch.tensor([[-150.0, -120.0], [300.0, 300.0]])  # in float32, exp of the first alone is 0
    rewards = reward.scalarize(mixed, [1.0, 1.0], "bernoulli_nash")
    assert rewards.log().tolist() == pytest.approx([(math.log(300) - 150) / 2, (math.log(300) - 120) / 2], rel=1e-4)


@pytest.mark.parametrize("arguments, told", [
    (([1, 1, 1], "product", {}), "'product': unknown; give one of linear, worst_case"),
    (([1, 1, 1], "linear", {"lam": 1}), "no option 'lam'; it has none"),
    (([1, 1, 1], "soft_max_min", {"lam": 1}), "no option 'lam'; it has temperature"),
    (([1, 1, 1], "soft_max_min", {"temperature": 0}), "temperature is 0"),
    (([1, 1, 1], "lower_quantile", {"share": 1.5}), "share is 1.5"),
    (([1, 1], "linear", {}), "one for each of the 3 principles"),
    (([[1], [1], [1]], "linear", {}), "one for each of the 3 principles"),
])
def test_scalarize_refuses_what_it_cannot_mean(arguments, told):
    weights, how, options = arguments
    with pytest.raises(UserError, match=told):
        reward.scalarize(torch.zeros(3, 4), weights, how, **options)


@pytest.mark.parametrize("scores", [torch.zeros(3), torch.zeros(0, 4), torch.zeros(1, 2, 3),
                                    torch.zeros(3, 4).long()])
def test_scalarize_refuses_scores_of_another_form(scores):
    with pytest.raises(UserError, match="give floats"):
        reward.scalarize(scores, torch.ones(len(scores)), "linear")


# ----------------------------------------------------------------------------- the annotator


def test_annotate_by_hand():
    rng = random.Random(0)
    assert reward.annotate(1.0, rng, 0.5, 0.0, 0.0) == pytest.approx(1 / (1 + math.exp(-2)))
    assert reward.annotate(1.0, rng, 0.5, 0.0, 1.0) == pytest.approx(1 / (1 + math.exp(2)))
    assert reward.annotate(0.0, rng, 0.5, 0.0, 0.5) == 0.5
    assert reward.annotate(-3.0, rng, 1e-9, 0.0, 0.0) == 0.0 and reward.annotate(3.0, rng, 1e-9, 0.0, 0.0) == 1.0
    shown = {round(math.log(p / (1 - p)), 9) for p in (reward.annotate(1.0, rng, 2.0, 0.3, 0.0) for _ in range(50))}
    assert shown == {0.8, 0.2}  # 1 / 2, and the bias with or against it


def test_a_position_bias_shows_on_single_labels_and_averages_out_over_many():
    rng = random.Random(1)
    labels = [reward.annotate(0.0, rng, 0.5, 2.0, 0.0) for _ in range(4000)]
    assert set(round(p, 6) for p in labels) == {round(1 / (1 + math.exp(-2)), 6), round(1 / (1 + math.exp(2)), 6)}
    assert abs(statistics.fmean(labels) - 0.5) < 4 * 0.381 / math.sqrt(4000)  # four standard deviations


def test_labels_are_turned_round_as_often_as_asked_for():
    rng = random.Random(2)
    turned = sum(reward.annotate(1.0, rng, 0.5, 0.0, 0.2) < 0.5 for _ in range(4000))
    assert abs(turned - 800) < 4 * math.sqrt(4000 * 0.2 * 0.8)


def world_pairs(count=30, seed=0):
    return [{"prompt": row["prompt"], "response_a": row["responses"][0]["text"],
             "response_b": row["responses"][1]["text"]} for row in toy.rated(count, seed, responses=2)]


def test_embedded_labels_follow_the_exact_scores():
    pairs = world_pairs()
    rows = list(reward.embedded_labels(pairs, ["toxicity", "overall"], temperature=0.25, flip_rate=0))
    assert [row["principle"] for row in rows] == ["toxicity", "overall"] * len(pairs)
    assert list(rows[0]) == ["prompt", "response_a", "response_b", "principle", "p_a"]
    for name in ("toxicity", "overall"):
        scores = [[toy.score(name, pair["prompt"], pair[key]) for key in ("response_a", "response_b")]
                  for pair in pairs]
        spread = statistics.pstdev({(pair["prompt"], pair[key]): score for pair, both in zip(pairs, scores)
                                    for key, score in zip(("response_a", "response_b"), both)}.values())
        for row, (first, second) in zip([row for row in rows if row["principle"] == name], scores):
            assert row["p_a"] == pytest.approx(1 / (1 + math.exp(-(first - second) / spread / 0.25)))
    assert len({row["p_a"] for row in rows}) > 10


def test_the_noise_depends_on_the_question_and_the_seed_alone():
    pairs = world_pairs()
    rows = list(reward.embedded_labels(pairs, ["bias", "detail"], flip_rate=0.5, position_bias=1))
    assert rows == list(reward.embedded_labels(pairs, ["bias", "detail"], flip_rate=0.5, position_bias=1))
    reversed_rows = list(reward.embedded_labels(pairs[::-1], ["detail", "bias"], flip_rate=0.5, position_bias=1))
    assert reversed_rows[::-1] == rows
    assert rows != list(reward.embedded_labels(pairs, ["bias", "detail"], 1, flip_rate=0.5, position_bias=1))


def test_a_principle_on_which_all_are_equal_is_even():
    pair = {**world_pairs(1)[0], "response_a": "Boil fresh water.", "response_b": "Boil fresh water. Mix it."}
    assert [row["p_a"] for row in reward.embedded_labels([pair], ["toxicity"])] == [0.5]


def test_both_the_world_and_the_judge_know_the_twelve():
    assert list(reward.PRINCIPLES) == list(toy.PRINCIPLES) and len(reward.PRINCIPLES) == 12
    assert all(principle.name == name for name, principle in reward.PRINCIPLES.items())


# ----------------------------------------------------------------------------- a model behind a server


@pytest.fixture
def serve(monkeypatch):
    """serve(script) starts a server; script(payload) gives the likeliest tokens as {token: log-probability}, a whole
    choice, or (status, text). The server has .url and .requests."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    servers = []

    def start(script):
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.requests.append(payload)
                said, status = script(payload), 200
                if isinstance(said, tuple):
                    status, body = said
                else:
                    body = json.dumps({"choices": [said if "message" in said else choice(said)]})
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *_):
                pass

        class Listener(ThreadingHTTPServer):
            request_queue_size = 64  # with the default of 5, a burst of connections waits a second

        server = Listener(("127.0.0.1", 0), Handler)
        server.url, server.requests = f"http://127.0.0.1:{server.server_port}", []
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def choice(logprobs):
    """A chat completion's choice of one token, the likeliest of {token: log-probability}."""
    likeliest = [{"token": token, "logprob": logprob} for token, logprob in logprobs.items()]
    said = likeliest[0]["token"] if likeliest else ""
    content = [{"token": said, "top_logprobs": likeliest}] if likeliest else []
    return {"index": 0, "message": {"role": "assistant", "content": said}, "logprobs": {"content": content}}


def asked(payload):
    """The two responses in the order in which the judge is shown them."""
    text = payload["messages"][0]["content"]
    return [re.search(rf"<response_{letter}>\n(.*)\n</response_{letter}>", text, re.DOTALL)[1] for letter in "ab"]


def logs(**chances):
    return {token: math.log(chance) for token, chance in chances.items()}


def in_order(forward, backward):
    """A script that says one thing where PAIR is shown in its own order, and another in the other order."""
    return lambda payload: forward if asked(payload)[0] == PAIR["response_a"] else backward


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("forward, backward, p_a", [
    (logs(A=0.6, B=0.2), logs(B=0.3, A=0.2), (0.75 + 0.6) / 2),
    (logs(A=0.9, B=0.1), logs(A=0.9, B=0.1), 0.5),  # it says A whatever stands there
    ({" A": math.log(0.3), "A": math.log(0.3), "B\n": math.log(0.2)}, logs(A=0.5, B=0.5), (0.75 + 0.5) / 2),
    (logs(A=0.5, x=0.4), {"B": -0.1, "the": -3}, (sigmoid(math.log(0.5) + 10) + sigmoid(-0.1 + 10)) / 2),
    (logs(B=0.5), logs(Yes=0.5, a=0.4, A=0.01),
     (sigmoid(-10 - math.log(0.5)) + 1 - sigmoid(math.log(0.01) + 10)) / 2),
    ({"A": 0.0, "B": -9999.0}, {"B": 0.0, "A": -9999.0}, 1.0),
    (logs(x=0.9, Answer=0.1), logs(A=0.5, B=0.5), None), (logs(A=0.5, B=0.5), {}, None),
])
def test_probabilities_by_hand_in_both_orders(serve, forward, backward, p_a):
    server = serve(in_order(forward, backward))
    found = reward.endpoint_label(Endpoint(server.url, "judge"), PAIR, BRIEF)
    assert found == (None if p_a is None else pytest.approx(p_a, abs=1e-12))


def test_what_the_judge_is_asked(serve):
    server = serve(lambda payload: logs(A=0.5, B=0.5))
    reward.endpoint_label(Endpoint(server.url, "judge"), PAIR, BRIEF)
    first, second = server.requests
    assert asked(first) == [PAIR["response_a"], PAIR["response_b"]] == asked(second)[::-1]
    assert (first["max_tokens"], first["logprobs"], first["top_logprobs"], first["temperature"]) == (1, True, 5, 0)
    text = first["messages"][0]["content"]
    assert BRIEF.description in text and "regardless of everything else" in text and "Human: Why?" in text


def test_texts_beyond_the_judges_context_are_left_out(serve):
    server = serve(lambda payload: (400, '{"error": "maximum context length is 4096 tokens"}'))
    assert reward.endpoint_label(Endpoint(server.url, "judge"), PAIR, BRIEF) is None


@pytest.mark.parametrize("logprobs", [
    {}, {"logprobs": None}, {"logprobs": {"tokens": ["A"]}},
    {"logprobs": {"content": [{"token": "A", "logprob": -0.1}]}},
    {"logprobs": {"content": [{"token": "A", "logprob": -0.1, "top_logprobs": []}]}}])
def test_a_server_without_logprobs_is_told_of_in_one_line(serve, world, monkeypatch, capsys, tmp_path, logprobs):
    server = serve(lambda payload: {"index": 0, "message": {"role": "assistant", "content": "A"}, **logprobs})
    refused(monkeypatch, capsys, judged(world, server, tmp_path / "out"), server.url, "no log-probabilities",
            "delete", "out.judge-cache.jsonl")
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A file of 6 prompts with 3 responses each, one of them said twice."""
    rows, path = list(toy.rated(6, 3, responses=3)), tmp_path_factory.mktemp("world") / "rated.jsonl"
    rows[2]["responses"][1] = rows[2]["responses"][0]
    data.write_jsonl(path, rows)
    return path


def judged(world, server, out, *extra):
    return ["label", world, "--out", out, "--judge-url", server.url, "--judge-model", "judge", "--principles",
            "toxicity", "Brevity: The response should be short", "--limit", 5, *extra]


def undecided(first, second):
    return (len(first) + len(second)) % 3 == 0


def shorter(payload):
    """Prefers the shorter one, and A a little; sometimes says something else."""
    first, second = asked(payload)
    if undecided(first, second):
        return logs(Hm=0.9)
    advantage = (len(second) - len(first)) / 100 + 0.2
    return {"A": math.log(sigmoid(advantage)), "B": math.log(sigmoid(-advantage))}


def test_label_by_the_annotator(world, tmp_path, monkeypatch, capsys):
    out = tmp_path / "labels.jsonl"
    assert run(monkeypatch, ["label", world, "--out", out, "--seed", 4, "--position-bias", 0.5]) == 0
    rows, said = read(out), capsys.readouterr().out
    assert list(data.read_preferences(out)) == rows
    assert len(rows) == 17 * 12 and "left out: 1 pairs, the two responses are the same" in said
    pairs = reward.response_pairs([world], None, data.Counter())
    assert rows == list(reward.embedded_labels(pairs, list(reward.PRINCIPLES), 4, position_bias=0.5))
    assert "annotator: temperature 0.5, position bias 0.5, flip rate 0.05" in said
    mine = [row["p_a"] for row in rows if row["principle"] == "detail"]
    line = next(line for line in said.splitlines() if line.startswith("detail")).split()
    certainty = statistics.fmean(abs(p - 0.5) for p in mine)
    first = 100 * statistics.fmean((p > 0.5) + (p == 0.5) / 2 for p in mine)
    assert line[1:] == ["17", f"{certainty:.3f}", f"{first:.1f}", "%"]
    assert [path.name for path in tmp_path.iterdir()] == ["labels.jsonl"]


def test_label_by_a_server_and_again_from_its_cache(serve, world, tmp_path, monkeypatch, capsys):
    server, out = serve(shorter), tmp_path / "labels.jsonl"
    assert run(monkeypatch, judged(world, server, out)) == 0
    rows, said = read(out), capsys.readouterr().out
    pairs = reward.response_pairs([world], 5, data.Counter())
    readable = [pair for pair in pairs if not undecided(pair["response_a"], pair["response_b"])]
    assert 0 < len(readable) < 5
    expected = []
    for pair in readable:
        advantage = (len(pair["response_b"]) - len(pair["response_a"])) / 100
        p_a = (sigmoid(advantage + 0.2) + sigmoid(advantage - 0.2)) / 2
        expected += [{**pair, "principle": name, "p_a": pytest.approx(p_a)} for name in ("toxicity", "Brevity")]
    assert rows == expected
    assert f"{2 * (5 - len(readable))} labels left out as unreadable" in said
    requests = len(server.requests)
    assert requests == 20 and "20 requests" in said
    before = out.read_bytes()
    assert run(monkeypatch, judged(world, server, out)) == 0
    assert out.read_bytes() == before and len(server.requests) == requests
    assert "0 requests" in capsys.readouterr().out


KILLED = """
import os, signal, sys
import align
import reward
count = int(sys.argv.pop(1))
add, done = align.Journal.add, 0

def dying(journal, rows):
    global done
    add(journal, rows)
    done += 1
    if done == count:
        os.write(journal.file.fileno(), b'{"index": 9, "p_a": 0.')
        os.kill(os.getpid(), signal.SIGKILL)

align.Journal.add = dying
reward.main()
"""


def killed(words, count):
    """Run reward.py in a process that is killed, with SIGKILL, in the middle of writing label count + 1."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, "-c", KILLED, str(count), *map(str, words)], capture_output=True,
                           env=environment, timeout=120)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()


def test_a_killed_run_by_the_annotator_goes_on(world, tmp_path, monkeypatch, capsys):
    words = ["label", world, "--principles", "overall", "bias", "--seed", 1, "--out"]
    assert run(monkeypatch, [*words, tmp_path / "whole"]) == 0
    killed([*words, tmp_path / "out"], 7)
    assert not (tmp_path / "out").exists()
    refused(monkeypatch, capsys, [*words, tmp_path / "out", "--flip-rate", 0.1], "out.part", "other settings")
    annotated, annotate = [], reward.annotate
    monkeypatch.setattr(reward, "annotate", lambda *rest: annotated.append(rest) or annotate(*rest))
    assert run(monkeypatch, [*words, tmp_path / "out"]) == 0
    assert (tmp_path / "out").read_bytes() == (tmp_path / "whole").read_bytes()
    assert len(annotated) == 34 - 7 and len(list(tmp_path.iterdir())) == 2


def test_a_killed_run_with_a_server_asks_nothing_twice(serve, world, tmp_path, monkeypatch):
    server = serve(shorter)
    assert run(monkeypatch, judged(world, server, tmp_path / "whole")) == 0
    words = judged(world, server, tmp_path / "out", "--concurrency", 1)
    killed(words, 4)
    (tmp_path / "out.judge-cache.jsonl").unlink()  # the journal alone will do
    server.requests.clear()
    assert run(monkeypatch, words) == 0
    assert (tmp_path / "out").read_bytes() == (tmp_path / "whole").read_bytes()
    assert len(server.requests) == 2 * (10 - 4)


def test_a_judge_that_never_says_a_or_b_leaves_nothing_behind_but_what_it_said(serve, world, tmp_path, monkeypatch,
                                                                               capsys):
    server = serve(lambda payload: logs(Sorry=0.9))
    refused(monkeypatch, capsys, judged(world, server, tmp_path / "out"), server.url, "none of the 10 labels",
            "out.part")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words, told", [
    (["--principles", "helpfulnes"], ["unknown objective 'helpfulnes'", "helpfulness"]),
    (["--principles", "Wit: be witty"], ["cannot judge 'Wit'", "--judge-url"]),
    (["--judge-url", "http://localhost:1"], ["--judge-model go together"]),
    (["--judge-url", "http://localhost:1", "--judge-model", "m", "--flip-rate", "0.2"], ["--flip-rate", "annotator"]),
    (["--judge-url", "localhost", "--judge-model", "m"], ["localhost: not the address"]),
    (["--temperature", "0"], ["--temperature must be more than 0"]), (["--temperature", "nan"], ["more than 0"]),
    (["--position-bias", "inf"], ["--position-bias"]), (["--flip-rate", "1.1"], ["--flip-rate must be"]),
    (["--limit", "0"], ["--limit must be"]), (["--concurrency", "0"], ["--concurrency must be"]),
])
def test_refusals_of_label(world, tmp_path, monkeypatch, capsys, words, told):
    refused(monkeypatch, capsys, ["label", world, "--out", tmp_path / "out", *words], *told)
    assert not list(tmp_path.iterdir())


def test_files_that_cannot_be_labelled(world, tmp_path, monkeypatch, capsys):
    data.write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "Why?"}])
    data.write_jsonl(tmp_path / "other.jsonl", [{"prompt": "Why?", "chosen": "So.", "rejected": "No."}])
    before = sorted(tmp_path.iterdir())
    for source, told in ((tmp_path / "prompts.jsonl", "no prompt has two different responses"),
                         (tmp_path / "other.jsonl", "does not know the question"),
                         (tmp_path / "none", "no such file")):
        refused(monkeypatch, capsys, ["label", source, "--out", tmp_path / "out"], told)
    refused(monkeypatch, capsys, ["label", world, "--out", world], "is an input too")
    refused(monkeypatch, capsys, ["label", world, "--out", tmp_path], "no ordinary file")
    assert sorted(tmp_path.iterdir()) == before


# ----------------------------------------------------------------------------- what is reported


def test_fitted_weights_are_those_that_made_the_labels():
    generator = numpy.random.default_rng(0)
    differences, true = generator.normal(size=(20000, 4)), numpy.array([2.0, -0.7, 0.0, 0.3])
    p_a = 1 / (1 + numpy.exp(-differences @ true))
    assert reward.fit_weights(differences, p_a, ridge=0) == pytest.approx(true, abs=1e-6)  # soft labels: exactly
    drawn = (generator.random(20000) < p_a).astype(float)
    assert reward.fit_weights(differences, drawn) == pytest.approx(true, abs=0.1)
    assert reward.fit_weights(torch.tensor(differences), torch.tensor(p_a), 0) == pytest.approx(true, abs=1e-6)


@pytest.mark.parametrize("scale", [0.01, 1.0, 300.0])
def test_fitted_weights_are_a_minimum_also_of_separable_labels(scale):
    generator = numpy.random.default_rng(1)
    differences = scale * generator.normal(size=(200, 3))
    p_a = (differences[:, 0] > 0).astype(float)

    def loss(weights):
        chance = 1 / (1 + numpy.exp(-numpy.clip(differences @ weights, -700, 700)))
        cross_entropy = -numpy.log(numpy.where(p_a == 1, chance, 1 - chance) + 1e-300).mean()
        return cross_entropy + 0.05 / 2 * (weights ** 2).sum()

    weights = reward.fit_weights(differences, p_a, ridge=0.05)
    for k in range(3):  # the slope by differences, in every direction
        step = numpy.eye(3)[k] * 1e-6
        assert abs(loss(weights + step) - loss(weights - step)) / 2e-6 < 1e-5
    assert weights[0] > 5 * abs(weights[1:]).max() and loss(weights) < loss(numpy.zeros(3))


def test_fitted_weights_where_newtons_whole_steps_go_astray():
    differences, p_a = numpy.array([[63.0, 15.0], [-19.0, 1.0], [-5.0, -2.0]]), numpy.array([0.0, 0.0, 1.0])
    weights = reward.fit_weights(differences, p_a, ridge=1e-3)
    slope = differences.T @ (1 / (1 + numpy.exp(-differences @ weights)) - p_a) / 3 + 1e-3 * weights
    assert abs(slope).max() < 1e-9


def test_accuracy_by_hand():
    margins, truth = [1.0, -2.0, 0.5, 0.0, 3.0, -1.0], [1, -1, -1, 1, 0, 0]  # right, right, wrong, half; two out
    percent, (low, high) = reward.accuracy(margins, truth, list("abcdef"))
    assert percent == pytest.approx(62.5) and low < percent < high
    assert reward.accuracy(margins, truth, ["a"] * 6) == (pytest.approx(62.5), None)
    assert reward.accuracy(margins, [0] * 6, list("abcdef")) == (None, None)
    twice = reward.accuracy(margins * 2, truth * 2, list("abcdef") * 2)  # the same prompts again: no new evidence
    assert twice == (pytest.approx(percent), pytest.approx([low, high]))
    assert reward.accuracy(torch.tensor(margins), torch.tensor(truth), list("abcdef"))[0] == pytest.approx(percent)


def test_calibration_by_hand():
    p, outcome = [0.05, 0.15, 0.19, 0.95, 1.0, 0.85], [0, 1, 0, 1, 1, 0.5]
    error, bins = reward.calibration(p, outcome)
    expected = [(0.05, 0.0, 1), (0.17, 0.5, 2), (0.85, 0.5, 1), (0.975, 1.0, 2)]
    assert [bins[k] == pytest.approx(row) for k, row in enumerate(expected)] == [True] * 4 and len(bins) == 4
    assert error == pytest.approx((0.05 + 2 * 0.33 + 0.35 + 2 * 0.025) / 6)
    assert reward.calibration([], []) == (None, [])
    generator = numpy.random.default_rng(0)
    p = generator.random(20000)
    assert reward.calibration(p, generator.random(20000) < p)[0] < 0.02
    assert reward.calibration(p, generator.random(20000) < p ** 3)[0] > 0.1


def test_correlations_agree_with_numpys():
    scores = torch.randn(4, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores[1] = 0.1  # whose mean over fifty is not quite 0.1
    scores[3] = -2 * scores[0] + 7
    found = reward.correlations(scores)
    others = [0, 2, 3]
    assert found[numpy.ix_(others, others)] == pytest.approx(numpy.corrcoef(scores[others].numpy()))
    assert found[1].tolist() == [0, 1, 0, 0] == found[:, 1].tolist() and found[0, 3] == pytest.approx(-1)


# ----------------------------------------------------------------------------- preference models


SIZES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
             max_position_embeddings=256, bos_token_id=0, eos_token_id=1)


@pytest.fixture
def labelled(tmp_path):
    """A folder with a tiny Llama in "base", and labels of 40 pairs on three principles."""
    rated = list(toy.rated(40, 3, responses=2))
    tokenizer = toy.train_tokenizer([row["prompt"] + response["text"] for row in rated for response in row["responses"]], 400)
    model.Llama(model.Config(vocab_size=tokenizer.get_vocab_size(), **SIZES), 1).save_pretrained(tmp_path / "base")
    tokenizer.save(str(tmp_path / "base" / "tokenizer.json"))
    pairs = [{"prompt": row["prompt"], "response_a": row["responses"][0]["text"], "response_b": row["responses"][1]["text"]}
             for row in rated]
    data.write_jsonl(tmp_path / "labels.jsonl", reward.embedded_labels(pairs, ["toxicity", "detail", "overall"], 1))
    return tmp_path


def training(labelled, out, *more):
    return ["train", labelled / "labels.jsonl", "--model", labelled / "base", "--out", labelled / out, "--lr", "3e-3", "--batch",
            "8", "--val-share", "0.25", "--precision", "fp32", "--device", "cpu", *more]


def test_one_model_is_trained_for_each_principle_and_its_scores_are_normalised(labelled, monkeypatch, capsys):
    assert run(monkeypatch, training(labelled, "pms", "--principles", "toxicity", "detail")) == 0
    said = capsys.readouterr().out
    assert re.search(r"toxicity +\d+ +\d+\.\d \[\d+\.\d, \d+\.\d\]", said) and "correlations" in said
    folders = [labelled / "pms" / name for name in ("toxicity", "detail")]
    scorers = reward.Scorers(folders, "cpu")
    rows = list(data.read_preferences(labelled / "labels.jsonl", "toxicity"))
    scores = scorers.score(*reward.reference_responses(rows))
    assert scorers.names == ["toxicity", "detail"]
    assert not (labelled / "pms" / "overall").exists()
    torch.testing.assert_close(scores.mean(1), scorers.mean, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(scores.std(1, correction=0), scorers.std, rtol=1e-3, atol=1e-4)


def test_whole_models_and_adapters_score_in_one_call_as_each_alone(labelled, monkeypatch):
    """Adapters of one base side by side; the order of the folders is that of the scores."""
    assert run(monkeypatch, training(labelled, "whole", "--principles", "toxicity")) == 0
    assert run(monkeypatch, training(labelled, "lora", "--lora-rank", "4")) == 0
    assert (labelled / "lora" / "detail" / "adapter_config.json").exists()
    folders = [labelled / "lora" / "detail", labelled / "whole" / "toxicity", labelled / "lora" / "overall"]
    rows = list(data.read_preferences(labelled / "labels.jsonl", "toxicity"))
    prompts, responses = reward.reference_responses(rows)
    together = reward.Scorers(folders, "cpu").score(prompts, responses, micro_tokens=1000)
    alone = [reward.Scorers([folder], "cpu").score(prompts, responses)[0] for folder in folders]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-4, atol=1e-4)
    assert (together[0] - together[2]).abs().max() > 1e-3


def test_a_score_is_that_of_the_text_as_it_is_trained_on(labelled, monkeypatch):
    assert run(monkeypatch, training(labelled, "pms", "--principles", "detail")) == 0
    llama = model.Llama.from_pretrained(labelled / "pms" / "detail", scorer=True)
    tokenizer = model.load_tokenizer(labelled / "base")
    ids, _ = data.encode_pair(tokenizer, "How?", "So.", 0, 1)
    with torch.no_grad():
        expected = model.document_scores(llama, torch.tensor(ids), [len(ids)])
    found = reward.Scorers([labelled / "pms" / "detail"], "cpu").score(["How?", "Why? " * 300], ["So.", "So."])
    torch.testing.assert_close(found[:, :1], expected)
    assert found.isfinite().all()  # the second is longer than the context


def test_training_again_finds_it_finished_and_score_reads_what_train_wrote(labelled, monkeypatch, capsys):
    assert run(monkeypatch, training(labelled, "pms")) == 0
    before = {path: path.read_bytes() for path in (labelled / "pms").rglob("*.*")}
    assert list(json.loads((labelled / "pms" / "weights.json").read_text())) == ["toxicity", "detail"]
    assert run(monkeypatch, training(labelled, "pms")) == 0
    assert "finished already" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in (labelled / "pms").rglob("*.*")} == before
    models = [labelled / "pms" / name for name in ("detail", "overall")]
    assert run(monkeypatch, ["score", labelled / "labels.jsonl", "--models", *models, "--out", labelled / "scored.jsonl"]) == 0
    rows = read(labelled / "scored.jsonl")
    scorers = reward.Scorers(models, "cpu")
    expected = scorers.score([rows[5]["prompt"]] * 2, [rows[5]["response_a"], rows[5]["response_b"]])
    assert rows[5]["scores"]["overall"] == pytest.approx(expected[1].tolist(), abs=1e-4)
    margins = [row["scores"]["detail"][0] - row["scores"]["detail"][1] for row in rows if row["principle"] == "detail"]
    truth = [row["p_a"] - 0.5 for row in rows if row["principle"] == "detail"]
    right = statistics.fmean(m * t > 0 for m, t in zip(margins, truth) if t)
    assert re.search(rf"detail +\d+ +{100 * right:.1f} \[", capsys.readouterr().out)


def test_bad_input_to_train_and_score_is_one_line(labelled, monkeypatch, capsys):
    refused(monkeypatch, capsys, training(labelled, "pms", "--principles", "kindness"), "no labels of kindness")
    refused(monkeypatch, capsys, ["score", labelled / "labels.jsonl", "--models", labelled / "nowhere"], "nowhere", "no such folder")
    refused(monkeypatch, capsys, ["score", labelled / "none.jsonl", "--models", labelled / "base"], "none.jsonl")
    (labelled / "base" / "principle.json").write_text("[]")
    refused(monkeypatch, capsys, ["score", labelled / "labels.jsonl", "--models", labelled / "base"], "principle.json")


# ----------------------------------------------------------------------------- a policy's answers


def test_a_policy_answers_twice_and_a_killed_run_goes_on(labelled, monkeypatch, capsys):
    data.write_jsonl(labelled / "prompts.jsonl", [{"prompt": row["prompt"]} for row in toy.rated(7, 2)])
    words = ["answer", labelled / "prompts.jsonl", "--policy", labelled / "base", "--max-new-tokens", 12, "--batch", 3,
             "--device", "cpu", "--out"]
    assert run(monkeypatch, [*words, labelled / "whole.jsonl"]) == 0
    rows = read(labelled / "whole.jsonl")
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in toy.rated(7, 2)]
    assert all(len(row["responses"]) == 2 for row in rows)
    assert sum(row["responses"][0] != row["responses"][1] for row in rows) > 3
    write, written = reward.Journal.add, []

    def stop(journal, rows):
        write(journal, rows)
        written.append(rows)
        if len(written) == 9:
            raise KeyboardInterrupt
    monkeypatch.setattr(reward.Journal, "add", stop)
    assert run(monkeypatch, [*words, labelled / "killed.jsonl"]) == 130 and not (labelled / "killed.jsonl").exists()
    monkeypatch.setattr(reward.Journal, "add", write)
    assert run(monkeypatch, [*words, labelled / "killed.jsonl"]) == 0
    assert (labelled / "killed.jsonl").read_bytes() == (labelled / "whole.jsonl").read_bytes()
    assert run(monkeypatch, ["label", labelled / "whole.jsonl", "--principles", "detail", "--out", labelled / "l.jsonl"]) == 0
    refused(monkeypatch, capsys, ["answer", labelled / "prompts.jsonl", "--policy", labelled / "base", "--out",
                                  labelled / "x.jsonl", "--responses", "0"], "--responses must be at least 1")


def test_a_server_is_asked_for_each_answer_anew(labelled, monkeypatch):
    """Not from the cache of the first: the seeds differ."""
    seeds = []

    def answered(items, policy, args):
        seeds.append(args.seed)
        yield from enumerate(f"{item['prompt']} {args.seed}" for item in items)
    monkeypatch.setattr(reward, "answered", answered)
    data.write_jsonl(labelled / "prompts.jsonl", [{"prompt": "one"}, {"prompt": "two"}])
    assert run(monkeypatch, ["answer", labelled / "prompts.jsonl", "--policy", "http://x", "--policy-model", "m", "--seed", "3",
                             "--responses", "3", "--out", labelled / "out.jsonl"]) == 0
    assert seeds == [9, 10, 11]
    assert [response["text"] for response in read(labelled / "out.jsonl")[1]["responses"]] == ["two 9", "two 10", "two 11"]


def test_a_principle_that_cannot_name_a_folder_is_refused(labelled, monkeypatch, capsys):
    data.write_jsonl(labelled / "labels.jsonl", [data.preference("p", "a", "b", "up/../down", 1.0)])
    refused(monkeypatch, capsys, training(labelled, "pms"), "up/../down", "cannot name a folder")


def test_fitted_weights_are_those_the_overall_labels_were_made_with(tmp_path):
    """In units of each principle's standard deviation, which the models' raw scores are not."""
    class Scorers:
        names, std = ["a", "overall", "b"], torch.tensor([2.0, 1.0, 0.5])
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(3, 4000, 2, generator=generator) * Scorers.std[:, None, None]
    margin = (scores[..., 0] - scores[..., 1]) / Scorers.std[:, None]
    p_a = torch.sigmoid(1.5 * margin[0] - 0.5 * margin[2]).tolist()
    rows = [data.preference("q", "x", "y", "overall", p) for p in p_a]
    reward.write_weights(tmp_path / "weights.json", Scorers, rows, scores)
    assert json.loads((tmp_path / "weights.json").read_text()) == pytest.approx({"a": 1.5, "b": -0.5}, abs=0.02)


def test_a_text_in_several_pairs_is_scored_once():
    class Scorers:
        names, asked = ["length", "first"], []

        def score(self, prompts, responses):
            self.asked += responses
            return torch.tensor([[float(len(text)) for text in responses], [float(ord(text[0])) for text in responses]])
    rows = [data.preference("q", *pair, "overall", 1.0) for pair in (("aa", "b"), ("b", "cccc"), ("aa", "b"))]
    scores = reward.score_pairs(Scorers(), rows)
    assert scores.tolist() == [[[2, 1], [1, 4], [2, 1]], [[97, 98], [98, 99], [97, 98]]]
    assert Scorers.asked == ["aa", "b", "cccc"]
