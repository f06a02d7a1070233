"""Feedback: the annotator against figures worked out by hand, a judge against a server, answers and labels against
killed runs."""
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
from collections import Counter
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import checkpoint
import conftest
import feedback
import formats
import model
import sick_server
import test_endpoint
import toy
from common import locked, write_jsonl
from objectives import Objective
from endpoint import Endpoint

ROOT = Path(__file__).parents[1]
BRIEF = Objective("Brevity", "The response should be short")
PAIR = {"prompt": "\n\nHuman: Why?\n\nAssistant:", "response_a": "Because.", "response_b": "Because {it} is so."}
run, refused = partial(conftest.run, feedback), partial(conftest.refused, feedback)
sick = test_endpoint.sick  # a fixture


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ----------------------------------------------------------------------------- the annotator


def test_annotate_by_hand():
    rng = random.Random(0)
    assert feedback.annotate(1.0, rng, 0.5, 0.0, 0.0) == pytest.approx(1 / (1 + math.exp(-2)))
    assert feedback.annotate(1.0, rng, 0.5, 0.0, 1.0) == pytest.approx(1 / (1 + math.exp(2)))
    assert feedback.annotate(0.0, rng, 0.5, 0.0, 0.5) == 0.5
    assert feedback.annotate(-3.0, rng, 1e-9, 0.0, 0.0) == 0.0 and feedback.annotate(3.0, rng, 1e-9, 0.0, 0.0) == 1.0
    shown = {round(math.log(p / (1 - p)), 9) for p in (feedback.annotate(1.0, rng, 2.0, 0.3, 0.0) for _ in range(50))}
    assert shown == {0.8, 0.2}  # 1 / 2, and the bias with or against it


def test_a_position_bias_shows_on_single_labels_and_averages_out_over_many():
    rng = random.Random(1)
    labels = [feedback.annotate(0.0, rng, 0.5, 2.0, 0.0) for _ in range(4000)]
    assert set(round(p, 6) for p in labels) == {round(1 / (1 + math.exp(-2)), 6), round(1 / (1 + math.exp(2)), 6)}
    assert abs(statistics.fmean(labels) - 0.5) < 4 * 0.381 / math.sqrt(4000)  # four standard deviations


def test_labels_are_turned_round_as_often_as_asked_for():
    rng = random.Random(2)
    turned = sum(feedback.annotate(1.0, rng, 0.5, 0.0, 0.2) < 0.5 for _ in range(4000))
    assert abs(turned - 800) < 4 * math.sqrt(4000 * 0.2 * 0.8)


def world_pairs(count=30, seed=0):
    return [{"prompt": row["prompt"], "response_a": row["responses"][0]["text"],
             "response_b": row["responses"][1]["text"]} for row in toy.rated(count, seed, responses=2)]


def test_embedded_labels_follow_the_exact_scores():
    pairs = world_pairs()
    rows = list(feedback.embedded_labels(pairs, ["toxicity", "overall"], temperature=0.25, flip_rate=0))
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
    rows = list(feedback.embedded_labels(pairs, ["bias", "detail"], flip_rate=0.5, position_bias=1))
    assert rows == list(feedback.embedded_labels(pairs, ["bias", "detail"], flip_rate=0.5, position_bias=1))
    reversed_rows = list(feedback.embedded_labels(pairs[::-1], ["detail", "bias"], flip_rate=0.5, position_bias=1))
    assert reversed_rows[::-1] == rows
    assert rows != list(feedback.embedded_labels(pairs, ["bias", "detail"], 1, flip_rate=0.5, position_bias=1))


def test_a_principle_on_which_all_are_equal_is_even():
    pair = {**world_pairs(1)[0], "response_a": "Boil fresh water.", "response_b": "Boil fresh water. Mix it."}
    assert [row["p_a"] for row in feedback.embedded_labels([pair], ["toxicity"])] == [0.5]


def test_both_the_world_and_the_judge_know_the_twelve():
    assert list(feedback.PRINCIPLES) == list(toy.WORTH) and len(feedback.PRINCIPLES) == 12
    assert all(principle.name == name for name, principle in feedback.PRINCIPLES.items())


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
    # an absent letter is as likely as the least likely token listed, or as all that they leave, whichever is less
    (logs(A=0.5, x=0.3, y=0.1, z=0.04, w=0.02), logs(B=0.4, x=0.3, y=0.1, z=0.1, w=0.05), (50 / 52 + 40 / 45) / 2),
    (logs(A=0.5, x=0.4), logs(B=0.9, the=0.06), (5 / 6 + 90 / 94) / 2), (logs(A=0.7), logs(B=0.9), 0.8),
    ({"A": 0.0}, {"B": 1e-7}, 1.0), ({"A": -0.5, "x": -9999.0}, {"B": 0, "x": -100}, 1.0),
    ({"A": 0.0, "B": -9999.0}, {"B": 0.0, "A": -9999.0}, 1.0),
    # where the letters have less than 1 % together, nobody answered
    (logs(I=0.98, A=0.011, x=0.001), logs(A=0.5, B=0.5), (11 / 12 + 0.5) / 2),
    (logs(I=0.98, A=0.006, B=0.005), logs(B=0.5, A=0.5), (6 / 11 + 0.5) / 2),
    (logs(I=0.98, A=0.009, x=0.001), logs(A=0.5, B=0.5), None),
    (logs(I=0.98, A=0.005, B=0.004), logs(A=0.5, B=0.5), None),
    (logs(A=0.5, B=0.5), {"I": -1e-5, "A": -14.0, "The": -15.0, "As": -15.5, "Both": -16.0}, None),
    (logs(x=0.9, Answer=0.1), logs(A=0.5, B=0.5), None), (logs(A=0.5, B=0.5), {}, None),
])
def test_probabilities_by_hand_in_both_orders(serve, forward, backward, p_a):
    server = serve(in_order(forward, backward))
    found = feedback.endpoint_label(Endpoint(server.url, "judge"), PAIR, BRIEF)
    assert found == (None if p_a is None else pytest.approx(p_a, abs=1e-12))


def test_what_the_judge_is_asked(serve):
    server = serve(lambda payload: logs(A=0.5, B=0.5))
    feedback.endpoint_label(Endpoint(server.url, "judge"), PAIR, BRIEF)
    first, second = server.requests
    assert asked(first) == [PAIR["response_a"], PAIR["response_b"]] == asked(second)[::-1]
    assert (first["max_tokens"], first["logprobs"], first["top_logprobs"], first["temperature"]) == (1, True, 5, 0)
    text = first["messages"][0]["content"]
    assert BRIEF.description in text and "regardless of everything else" in text and "Human: Why?" in text


def test_texts_beyond_the_judges_context_are_left_out(serve):
    server = serve(lambda payload: (400, '{"error": "maximum context length is 4096 tokens"}'))
    assert feedback.endpoint_label(Endpoint(server.url, "judge"), PAIR, BRIEF) is None


@pytest.mark.parametrize("name", sick_server.NO_LOGPROBS)
def test_a_server_without_logprobs_is_told_of_in_one_line(sick, world, monkeypatch, capsys, tmp_path, name):
    server = sick(name)
    refused(monkeypatch, capsys, judged(world, server, tmp_path / "out", "--verdicts", "logprobs"), server.url,
            "no log-probabilities", "--verdicts text", "delete", "out.judge-cache.jsonl")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", sick_server.SILENT)
def test_a_judge_that_says_nothing_decides_nothing(sick, name):
    server = sick(name)
    assert feedback.endpoint_label(Endpoint(server.url, "judge"), PAIR, BRIEF) is None and server.requests == 2


# ----------------------------------------------------------------------------- labels


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A file of 6 prompts with 3 responses each, one of them said twice."""
    path = tmp_path_factory.mktemp("world") / "rated.jsonl"
    rows = [row for row in toy.rated(30, 3, responses=3) if len({each["text"] for each in row["responses"]}) == 3][:6]
    rows[2]["responses"][1] = rows[2]["responses"][0]
    write_jsonl(path, rows)
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
    assert list(formats.read_preferences(out)) == rows
    assert len(rows) == 17 * 12 and "left out: 1 pairs, the two responses are the same" in said
    pairs = feedback.response_pairs([world], None, Counter())
    assert rows == list(feedback.embedded_labels(pairs, list(feedback.PRINCIPLES), 4, position_bias=0.5))
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
    pairs = feedback.response_pairs([world], 5, Counter())
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
import feedback
count = int(sys.argv.pop(1))
add, done = feedback.Journal.add, 0

def dying(journal, row):
    global done
    add(journal, row)
    done += 1
    if done == count:
        os.write(journal.file.fileno(), b'{"index": 9, "p_a": 0.')
        os.kill(os.getpid(), signal.SIGKILL)

feedback.Journal.add = dying
feedback.main()
"""


def killed(words, count):
    """Run feedback.py in a process that is killed, with SIGKILL, in the middle of writing label count + 1."""
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
    annotated, annotate = [], feedback.annotate
    monkeypatch.setattr(feedback, "annotate", lambda *rest: annotated.append(rest) or annotate(*rest))
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


@pytest.mark.slow
def test_another_judge_or_question_is_another_run(serve, world, tmp_path, monkeypatch, capsys):
    server, other, out = serve(shorter), serve(shorter), tmp_path / "out"
    killed(judged(world, server, out, "--concurrency", 1), 4)
    (tmp_path / "out.judge-cache.jsonl").unlink()
    asked_before = len(server.requests)
    refused(monkeypatch, capsys, judged(world, other, out), "out.part", "other settings")
    with monkeypatch.context() as changed:
        changed.setattr(feedback, "FEEDBACK_PROMPT", "Well?\n" + feedback.FEEDBACK_PROMPT)
        refused(monkeypatch, capsys, judged(world, server, out), "out.part", "other settings")
    assert not other.requests and len(server.requests) == asked_before
    server.url += "/v1/"  # the same server
    assert run(monkeypatch, judged(world, server, out)) == 0
    assert len(server.requests) == asked_before + 2 * (10 - 4)


def test_of_two_runs_with_one_out_the_second_asks_nothing(serve, world, tmp_path, monkeypatch, capsys):
    server = serve(shorter)
    for name in ("out.judge-cache.jsonl", "out.part"):
        with locked(tmp_path / name):
            refused(monkeypatch, capsys, judged(world, server, tmp_path / "out"), name, "another process")
    (tmp_path / "out.judge-cache.jsonl").mkdir()
    refused(monkeypatch, capsys, judged(world, server, tmp_path / "out"), "judge-cache.jsonl", "no ordinary file")
    assert not server.requests


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
    (["--temperature", "0"], ["--temperature", "0 must be from"]),
    (["--temperature", "nan"], ["--temperature", "nan must be from"]),
    (["--position-bias", "inf"], ["--position-bias", "inf must be from"]),
    (["--flip-rate", "1.1"], ["--flip-rate", "1.1 must be from 0 to 1"]),
    (["--seed", "1.5"], ["--seed", "1.5"]),
    (["--limit", "0"], ["--limit", "0 must be at least 1"]),
    (["--concurrency", "0"], ["--concurrency", "0 must be at least 1"]),
])
def test_refusals_of_label(world, tmp_path, monkeypatch, capsys, words, told):
    refused(monkeypatch, capsys, ["label", world, "--out", tmp_path / "out", *words], *told)
    assert not list(tmp_path.iterdir())


def test_files_that_cannot_be_labelled(world, tmp_path, monkeypatch, capsys):
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "Why?"}])
    write_jsonl(tmp_path / "other.jsonl", [{"prompt": "Why?", "chosen": "So.", "rejected": "No."}])
    (tmp_path / "p.json").write_text('{"detail": "say more"}')
    (tmp_path / "x.judge-cache.jsonl").write_bytes(world.read_bytes())
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    for source, told in ((tmp_path / "prompts.jsonl", "no prompt has two different responses"),
                         (tmp_path / "other.jsonl", "does not know the question"),
                         (tmp_path / "none", "no such file")):
        refused(monkeypatch, capsys, ["label", source, "--out", tmp_path / "out"], told)
    refused(monkeypatch, capsys, ["label", world, "--out", world], "is an input too")
    refused(monkeypatch, capsys, ["label", world, "--out", tmp_path], "no ordinary file")
    refused(monkeypatch, capsys, ["label", world, "--principles", "p.json", "--out", "./p.json"], "is an input too (p.")
    refused(monkeypatch, capsys, ["label", "x.judge-cache.jsonl", "--out", "x"], "is an input too (x.judge-cache")
    assert sorted(tmp_path.iterdir()) == before


# ----------------------------------------------------------------------------- a policy's answers


def save_policy(folder, context=256):
    """A tiny untrained Llama."""
    rated = list(toy.rated(40, 3, responses=2))
    texts = [row["prompt"] + response["text"] for row in rated for response in row["responses"]]
    tokenizer = toy.train_tokenizer(texts, 400)
    config = model.Config(vocab_size=tokenizer.get_vocab_size(), hidden_size=32, intermediate_size=64,
                          num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=context, bos_token_id=0,
                          eos_token_id=1)
    checkpoint.save(model.Llama(config, 1), folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_a_policy_answers_twice_and_a_killed_run_goes_on(tmp_path, monkeypatch, capsys):
    prompts = [row["prompt"] for row in toy.rated(7, 2)]
    write_jsonl(tmp_path / "prompts.jsonl", ({"prompt": prompt} for prompt in prompts))
    words = ["answer", tmp_path / "prompts.jsonl", "--policy", save_policy(tmp_path / "policy"), "--max-new-tokens", 12,
             "--batch", 3, "--device", "cpu", "--out"]
    assert run(monkeypatch, [*words, tmp_path / "whole.jsonl"]) == 0
    rows = read(tmp_path / "whole.jsonl")
    assert [row["prompt"] for row in rows] == prompts
    assert all(len(row["responses"]) == 2 for row in rows)
    assert sum(row["responses"][0] != row["responses"][1] for row in rows) > 3
    said = capsys.readouterr().out
    assert "7 prompts with 2 responses each" in said and "left out" not in said
    add, added = feedback.Journal.add, []

    def stop(journal, row):
        add(journal, row)
        added.append(row)
        if len(added) == 9:
            raise KeyboardInterrupt
    monkeypatch.setattr(feedback.Journal, "add", stop)
    assert run(monkeypatch, [*words, tmp_path / "killed.jsonl"]) == 130 and not (tmp_path / "killed.jsonl").exists()
    monkeypatch.setattr(feedback.Journal, "add", add)
    refused(monkeypatch, capsys, [*words, tmp_path / "killed.jsonl", "--seed", 1], "jsonl.part", "other settings")
    assert run(monkeypatch, [*words, tmp_path / "killed.jsonl"]) == 0
    assert (tmp_path / "killed.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not (tmp_path / "killed.jsonl.part").exists()
    words = ["label", tmp_path / "whole.jsonl", "--principles", "detail", "--out", tmp_path / "labels.jsonl"]
    assert run(monkeypatch, words) == 0


def test_prompts_beyond_the_policys_context_are_left_out_and_counted(tmp_path, monkeypatch, capsys):
    fitting, endless = "\n\nHuman: Why?\n\nAssistant:", "\N{SLIGHTLY SMILING FACE}" * 20  # 80 bytes in one piece
    words = ["answer", tmp_path / "prompts.jsonl", "--policy", save_policy(tmp_path / "policy", 60), "--device", "cpu",
             "--max-new-tokens", 12, "--out", tmp_path / "out.jsonl"]
    write_jsonl(tmp_path / "prompts.jsonl", ({"prompt": prompt} for prompt in (fitting, endless, f"{fitting} Please.")))
    assert run(monkeypatch, words) == 0
    rows, said = read(tmp_path / "out.jsonl"), capsys.readouterr().out
    assert [row["prompt"] for row in rows] == [fitting, f"{fitting} Please."]
    assert all(isinstance(response["text"], str) for row in rows for response in row["responses"])
    assert "left out: 1 prompts that do not fit the policy's context" in said
    assert "2 prompts with 2 responses each" in said and not (tmp_path / "out.jsonl.part").exists()
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": endless}])
    (tmp_path / "out.jsonl").unlink()
    refused(monkeypatch, capsys, words, "1 prompts that do not fit", "out.jsonl.part")
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.slow
def test_the_model_decides_whose_answers_they_are_and_not_its_folder(tmp_path, monkeypatch, capsys):
    write_jsonl(tmp_path / "prompts.jsonl", ({"prompt": row["prompt"]} for row in toy.rated(4, 2)))
    policy, moved, out = tmp_path / "policy", tmp_path / "moved", tmp_path / "out.jsonl"
    words = ["answer", tmp_path / "prompts.jsonl", "--max-new-tokens", 4, "--device", "cpu", "--policy"]
    save_policy(policy)
    assert run(monkeypatch, [*words, policy, "--out", tmp_path / "whole.jsonl"]) == 0
    killed([*words, policy, "--out", out], 3)
    policy.rename(moved)
    save_policy(policy, 250)
    refused(monkeypatch, capsys, [*words, policy, "--out", out], "out.jsonl.part", "other settings")
    assert run(monkeypatch, [*words, moved, "--out", out]) == 0
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_empty_answers_and_prompts_too_long_are_left_out_and_counted(serve, tmp_path, monkeypatch, capsys):
    def answer(payload):
        asked_for = payload["messages"][-1]["content"]
        if asked_for == "long":
            return 400, '{"error": "maximum context length is 4096 tokens"}'
        said = {**said_of, "late": "" if payload["seed"] else "x"}
        return {"message": {"content": said.get(asked_for, "An answer.")}}
    said_of = {"null": None, "blank": "\n"}
    server, out = serve(answer), tmp_path / "out.jsonl"
    words = ["answer", tmp_path / "prompts.jsonl", "--policy", server.url, "--policy-model", "m", "--out", out]
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": text} for text in ("null", "one", "late", "long", "blank")])
    assert run(monkeypatch, words) == 0
    said = capsys.readouterr().out
    assert "left out: 3 prompts that got an empty answer" in said
    assert "left out: 1 prompts that do not fit the policy's context" in said
    assert read(out) == [{"prompt": "one", "responses": [{"text": "An answer."}] * 2}]
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "blank"}, {"prompt": "null"}])
    out.unlink()
    refused(monkeypatch, capsys, words, server.url, "2 prompts that got an empty answer", "delete", "out.jsonl.part")
    assert not out.exists()
    said_of.clear()  # it says something now: what was empty was not kept
    assert run(monkeypatch, words) == 0
    assert read(out) == [{"prompt": text, "responses": [{"text": "An answer."}] * 2} for text in ("blank", "null")]


def test_a_server_is_asked_for_each_answer_anew(serve, tmp_path, monkeypatch):
    """Not from the cache of the first: the seeds differ."""
    def answer(payload):
        text = f"{payload['messages'][-1]['content']} {payload['seed']}"
        return {"index": 0, "message": {"role": "assistant", "content": text}}
    server = serve(answer)
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "one"}, {"prompt": "two"}])
    assert run(monkeypatch, ["answer", tmp_path / "prompts.jsonl", "--policy", server.url, "--policy-model", "m",
                             "--seed", "3", "--responses", "3", "--temperature", "0.7",
                             "--out", tmp_path / "out.jsonl"]) == 0
    assert [request["seed"] for request in server.requests] == [9, 9, 10, 10, 11, 11]
    assert {(request["model"], request["temperature"], request["max_tokens"]) for request in server.requests} == {
        ("m", 0.7, 256)}
    expected = [{"prompt": prompt, "responses": [{"text": f"{prompt} {seed}"} for seed in (9, 10, 11)]}
                for prompt in ("one", "two")]
    assert read(tmp_path / "out.jsonl") == expected


@pytest.mark.parametrize("words, told", [
    (["--responses", "0"], ["--responses", "must be from 1"]), (["--limit", "0"], ["--limit", "must be at least 1"]),
    (["--batch", "0"], ["--batch", "must be from 1"]),
    (["--max-new-tokens", "0"], ["--max-new-tokens", "must be from 1"]),
    (["--temperature", "-1"], ["--temperature", "must be from 0"]),
    (["--temperature", "nan"], ["--temperature", "must be from 0"]),
    (["--seed", "-1"], ["--seed", "must be from 0"]), (["--policy", "http://x"], ["--policy-model"]),
    (["--policy", "nowhere"], ["nowhere", "no such folder"]),
])
def test_refusals_of_answer(tmp_path, monkeypatch, capsys, words, told):
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "Why?"}])
    refused(monkeypatch, capsys, ["answer", tmp_path / "prompts.jsonl", "--out", tmp_path / "out.jsonl", "--policy",
                                  "folder", *words], *told)
    assert not (tmp_path / "out.jsonl").exists()
