"""Judges, win rates and reports, against figures worked out by hand and a server that misbehaves."""
import csv
import gzip
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy
import pytest

import eval as evaluation
import toy
from data import Objective, UserError
from eval import Endpoint, endpoint_judge, evaluate, exact_judge, read_verdict, word_diff

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


# -------------------------------------------------------------------------------------------- win rates


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
    assert "high" in evaluation.policy_chart(none) and "+0.0" in evaluation.table_text({"policy": none})


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
    assert one["verdicts"] == other["verdicts"]


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
    judged = [({"prompt": str(number)}, None, None) for number in range(60)]
    for _ in range(400):  # gains of +1, 0, -1 with probabilities that make the truth +0.3
        values = generator.choice([1.0, 0.0, -1.0], 60, p=[0.5, 0.3, 0.2])
        low, high = evaluation.mean_and_interval(values, judged, seed=0)[1]
        covered += low <= 30 <= high
    assert 0.90 <= covered / 400 <= 0.98


def test_rows_of_one_prompt_are_no_new_evidence():
    values = numpy.array([1.0, 0.0, 1.0, -1.0, 0.5])
    judged = [({"prompt": str(number)}, None, None) for number in range(5)]
    once = evaluation.mean_and_interval(values, judged, seed=0)
    four_times = evaluation.mean_and_interval(numpy.tile(values, 4), judged * 4, seed=0)
    assert four_times[0] == pytest.approx(once[0]) and four_times[1] == pytest.approx(once[1])
    assert evaluation.mean_and_interval(values[:1], judged[:1], 0) == (100.0, None)
    assert evaluation.mean_and_interval(values[:0], [], 0) == (None, None)


# ------------------------------------------------------------------------------------- diffs and reports


TEXTS = ["", "one", "The cat sat.", "The dog sat down,\n\nthen  it slept. ", "  <b>bold</b> & \"x\"",
         "a b a b a c", "été 猫"]


@pytest.mark.parametrize("before", TEXTS)
@pytest.mark.parametrize("after", TEXTS)
def test_word_diff_holds_both_texts(before, after):
    pieces = word_diff(before, after)
    assert "".join(text for op, text in pieces if op != "+") == before
    assert "".join(text for op, text in pieces if op != "-") == after
    assert all(text for _, text in pieces)
    coloured = evaluation.ansi_diff(before, after)
    assert re.sub(r"\033\[31m.*?\033\[0m|\033\[\d+m", "", coloured, flags=re.DOTALL) == after


def test_word_diff_keeps_what_is_common():
    assert word_diff("You are wrong, sir.", "You are right, sir.") == [
        (" ", "You are "), ("-", "wrong"), ("+", "right"), (" ", ", sir.")]
    assert word_diff("a b c", "a b c d") == [(" ", "a b c"), ("+", " d")]
    many = "word another. " * 7000
    began = time.perf_counter()
    assert word_diff(many, many + "end") == [(" ", many), ("+", "end")]
    assert [op for op, _ in word_diff("a " + many, "b another " + many)] == ["-", "+", " "]
    assert [op for op, _ in word_diff("a " + many + "b", "b " + many + "a")] == ["-", "+"]
    generator = random.Random(0)
    word_diff(*(" ".join(generator.choice("ab") for _ in range(1200)) for _ in range(2)))
    assert time.perf_counter() - began < 5


class Page(HTMLParser):
    """What a browser would see: tags, attributes and text, and the texts of ins and del."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self.marked, self.open = set(), [], "", [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += attributes
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert tag in self.open, f"</{tag}> closes nothing"
        while self.open.pop() != tag:
            pass

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] in ("ins", "del"):
            self.marked.append((self.open[-1], data))


def test_report_is_one_safe_page(tmp_path):
    evil = '<script>alert("x")</script><img src=http://example.org/a.png>'
    rows = [{"prompt": f"\n\nHuman: {evil}\n\nAssistant:", "original": f"1 {evil} old",
             "aligned": f"2 {evil} new", "golden": "1", "objectives": [str(Objective(f"high {evil}", evil))]}]
    rows.append({**rows[0], "prompt": "other"})
    result = evaluate(rows, None, exact_judge(score), progress=False)
    examples = {evil: evaluation.pick_examples(rows, result)}
    assert len(examples[evil]) == 2
    path = tmp_path / "new folder" / "report.html"
    figures = [("A figure", "<svg></svg>")]
    evaluation.write_report(path, {evil: result, "other": result}, examples, evil, evil, figures)
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert not page.tags & {"script", "img", "link", "iframe"} and "src" not in dict(page.attributes)
    assert "url(" not in text and "@import" not in text
    assert page.text.count(evil) >= 4  # the title, the heading, the prompt, the objective, all as plain text
    assert page.marked[:4] == [("del", "1"), ("ins", "2"), ("del", "old"), ("ins", "new")]
    assert "A figure" in page.text and {"svg", "ins", "del", "table", "rect"} <= page.tags
    assert os.listdir(path.parent) == ["report.html"]


def test_half_surrogates_do_not_stop_a_report(tmp_path):
    rows = [row(1, 2, 1, "a \ud800"), row(1, 2, 1, "b")]
    result = evaluate(rows, None, exact_judge(score), progress=False)
    examples = {"p": evaluation.pick_examples(rows, result)}
    assert len(examples["p"]) == 2
    evaluation.write_report(tmp_path / "r.html", {"p": result}, examples, "t")
    assert "a ?" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_examples_are_rows_that_changed():
    rows = [row(number, number + (number % 2), prompt=str(number)) for number in range(20)]
    result = evaluate(rows, None, exact_judge(score), progress=False)
    examples = evaluation.pick_examples(rows, result, count=4, seed=1)
    assert len(examples) == 4 and all(int(example["prompt"]) % 2 for example in examples)
    assert examples == evaluation.pick_examples(rows, result, count=4, seed=1)
    assert {example["verdicts"]["high"]["aligned original"] for example in examples} == {1.0}


def test_table_fits_a_terminal():
    long = Objective("an_objective_with_a_very_long_name_indeed", "x")
    rows = [row(1, 2, 2, str(n), [long]) for n in range(4)] + [row(2, 1, 1, str(n), [HIGH]) for n in range(4)]
    room = evaluation.exact_room(score, lambda name: 9)
    result = evaluate(rows, None, exact_judge(score), progress=False, room=room)
    figures = result["objectives"]["high"]
    figures.update(n=15000, win_rate_original=100.0, win_rate_aligned=100.0, gain=-100.0,
                   gain_interval=[-100.0, -100.0], words={"original": 1234, "aligned": 1234})
    lines = evaluation.table_text({"policy": result}).splitlines()
    assert max(map(len, lines)) <= 110
    assert any(re.search(r"high +15000 +100.0 -> 100.0 +-100.0 \[-100.0, -100.0\]", line) for line in lines)


# --------------------------------------------------------------------------------------- a server to mistrust


class Server:
    """An OpenAI-compatible server that does to each request what `script(number, payload)` says:
    a text to reply, ("status", code, body, headers), ("raw", bytes), ("hang", seconds) or "close"."""

    def __init__(self, script):
        self.script, self.requests, self.headers = script, [], []
        self.busy = self.most = 0
        self.guard = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            wbufsize = 1 << 16  # head and body leave together

            def do_POST(self):
                outer.handle(self)

            def log_message(self, *_):
                pass

        class Listener(ThreadingHTTPServer):
            request_queue_size = 64  # with the default of 5, a burst of connections waits a second

        self.http = Listener(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def handle(self, request):
        payload = json.loads(request.rfile.read(int(request.headers["Content-Length"])))
        with self.guard:
            number = len(self.requests)
            self.requests.append(payload)
            self.headers.append((request.path, dict(request.headers)))
            self.busy += 1
            self.most = max(self.most, self.busy)
        action = self.script(number, payload)
        with self.guard:  # before the reply, so that the client's next request does not count beside this one
            self.busy -= 1
        try:
            self.answer(request, action)
        except OSError:
            pass  # the client did not wait

    def answer(self, request, action):
        code, headers = 200, {}
        if action == "close":
            request.close_connection = True
            return
        if isinstance(action, str):
            body = json.dumps({"choices": [{"message": {"role": "assistant", "content": action}}]}).encode()
        elif action[0] == "hang":
            time.sleep(action[1])
            return
        elif action[0] == "raw":
            body = action[1]
        else:
            _, code, body, headers = action
            body = body.encode()
        request.send_response(code)
        for name, value in headers.items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    servers = []

    def start(script):
        servers.append(Server(script if callable(script) else lambda number, payload: script))
        return servers[-1]

    yield start
    for server in servers:
        server.http.shutdown()
        server.http.server_close()


def honest(number, payload):
    """Reads the judge's prompt and answers as the exact scorer would."""
    text = payload["messages"][0]["content"]
    name = re.search(r"^Criterion: (\w+): The number should be", text, re.MULTILINE)[1]
    first, second = (score(name, "", re.search(rf"<answer_{letter}>\n(.*)\n</answer_{letter}>", text)[1])
                     for letter in "ab")
    return "Tie." if first == second else "**A**" if first > second else "Answer: B"


def client(server, **options):
    return Endpoint(server.url, "judge", **{"backoff": 0.01, "timeout": 5, **options})


def ask(endpoint, text="hello", **extra):
    return evaluation.reply_text(endpoint.chat([{"role": "user", "content": text}], 16, **extra))


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
    rows = [row(*(generator.randint(1, 4) for _ in range(3)), str(number), [HIGH, LOW])
            for number in range(12)]
    judge = endpoint_judge(client(server, cache=tmp_path / "cache.jsonl"))
    found = evaluate(rows, None, judge, concurrency=4, progress=False)
    assert found == evaluate(rows, None, exact_judge(score), progress=False)
    texts = [request["messages"][0]["content"] for request in server.requests]
    assert len(set(texts)) == len(texts), "a question was asked twice"
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
    assert "11 comparisons" in evaluation.table_text({"p": evaluate(ROWS, None, judge, progress=False)})
    assert "No comparison could be counted" in evaluation.policy_chart(unequal)


BAD = {
    "overload": ("status", 503, "busy", {}),
    "rate limit": ("status", 429, '{"error": {"message": "slow down"}}', {}),
    "server error": ("status", 500, "<html>oops", {}),
    "hang": ("hang", 0.6),
    "truncated": ("raw", b'{"choices": [{"message": {"content": "A'),
    "no choices": ("raw", b'{"error": {"message": "upstream failed"}}'),
    "not text": ("raw", b"\xff\xfe"),
    "list": ("raw", b"[1, 2]"),
    "closed": "close",
}


@pytest.mark.parametrize("name", BAD)
def test_a_failure_that_passes_is_tried_again(serve, name):
    server = serve(lambda number, payload: BAD[name] if number < 2 else "B")
    endpoint = client(server, timeout=0.3)
    assert ask(endpoint) == "B"
    assert len(server.requests) == 3 and endpoint.retried == 2


@pytest.mark.parametrize("name", ["overload", "truncated", "closed"])
def test_a_failure_that_stays_ends_in_one_line(serve, tmp_path, name):
    server = serve(lambda number, payload: "A" if payload["messages"][0]["content"] == "first" else BAD[name])
    endpoint = client(server, retries=3, cache=tmp_path / "cache.jsonl")
    assert ask(endpoint, "first") == "A"
    with pytest.raises(UserError, match="after 4 attempts.*cache.jsonl") as caught:
        ask(endpoint)
    assert "\n" not in str(caught.value) and len(server.requests) == 5


def test_retry_after_is_respected(serve):
    server = serve(lambda number, payload: ("status", 429, "", {"Retry-After": "1"}) if number == 0 else "A")
    began = time.monotonic()
    assert ask(client(server)) == "A" and time.monotonic() - began >= 1
    date = evaluation.email.utils.formatdate(time.time() + 30, usegmt=True)
    assert 28 <= evaluation.retry_after({"Retry-After": date}) <= 30
    for value, seconds in (("2.5", 2.5), ("soon", 0), ("", 0), ("-3", 0)):
        assert evaluation.retry_after({"Retry-After": value}) == seconds
    for_hours = serve(("status", 429, "quota", {"Retry-After": "7200"}))
    with pytest.raises(UserError, match="7200 s"):
        ask(client(for_hours))


@pytest.mark.parametrize("code, body, told", [
    (401, '{"error": {"message": "bad key secret-key"}}', r"401 bad key \*\*\*; is OPENAI_API_KEY set"),
    (404, '{"detail": "no such\\nmodel"}', "404 no such model"),
    (400, '{"error": "bad request"}', "400 bad request"), (422, "[1]", "422"), (302, "", "give that URL"),
    (307, "", "to http://elsewhere/: give that URL"),
])
def test_refusals_end_at_once_with_the_servers_words(serve, code, body, told):
    server = serve(("status", code, body, {"Location": "http://elsewhere/"}))
    with pytest.raises(UserError, match=told) as caught:
        ask(client(server, key="secret-key"))
    assert len(server.requests) == 1 and "\n" not in str(caught.value)


def test_nobody_there_is_told_at_once(serve):
    server = serve("A")
    server.http.shutdown()
    server.http.server_close()
    began = time.monotonic()
    with pytest.raises(UserError, match="no server answers"):
        ask(client(server, backoff=10))
    assert time.monotonic() - began < 5
    for url in ("localhost:8000", "file:///etc/passwd", "http://", "http://host:port"):
        with pytest.raises(UserError, match="address"):
            Endpoint(url, "m")


def test_addresses_key_and_extra_fields(serve, monkeypatch):
    server = serve("A")
    for url in ("", "/", "/v1", "/v1/", "/v1/chat/completions"):
        assert ask(Endpoint(server.url + url, "judge", key=" k1\n"), logprobs=True, top_logprobs=5) == "A"
    assert {path for path, _ in server.headers} == {"/v1/chat/completions"}
    assert {headers["Authorization"] for _, headers in server.headers} == {"Bearer k1"}
    assert server.requests[0] == {"model": "judge", "messages": [{"role": "user", "content": "hello"}],
                                  "max_tokens": 16, "temperature": 0.0, "logprobs": True, "top_logprobs": 5}
    monkeypatch.setenv("OPENAI_API_KEY", "from-environment")
    ask(client(server))
    assert server.headers[-1][1]["Authorization"] == "Bearer from-environment"
    monkeypatch.setenv("OPENAI_API_KEY", "two\nlines")
    with pytest.raises(UserError, match="OPENAI_API_KEY"):
        client(server)


def test_fields_that_a_newer_model_refuses_are_changed(serve):
    def strict(number, payload):
        if "max_tokens" in payload:
            return ("status", 400, "Unsupported parameter: 'max_tokens' is not supported with this model. "
                    "Use 'max_completion_tokens' instead.", {})
        if "temperature" in payload:
            return "status", 400, "Unsupported value: 'temperature' does not support 0.0 with this model.", {}
        return f"A{payload['max_completion_tokens']}"

    server = serve(strict)
    endpoint = client(server)
    assert ask(endpoint) == "A16" and len(server.requests) == 3
    assert ask(endpoint, "again") == "A16" and len(server.requests) == 4


def test_texts_that_do_not_fit_the_judge_are_left_out(serve):
    def small(number, payload):
        if len(payload["messages"][0]["content"]) > 50_000:
            return "status", 400, '{"error": {"message": "maximum context length is 4096 tokens"}}', {}
        return "tie"

    rows = ROWS + [row(1, "2 " * 50_000, 3, "long")]
    high = evaluate(rows, None, endpoint_judge(client(serve(small))), progress=False)["objectives"]["high"]
    assert (high["n"], high["left_out"], high["unparsed"]) == (5, 1, 2)


def test_one_question_from_many_threads_is_asked_once(serve):
    def slow(number, payload):
        time.sleep(0.2)
        return "A"

    server = serve(slow)
    endpoint = client(server)
    assert list(evaluation.in_parallel(lambda _: ask(endpoint), range(8), 8)) == ["A"] * 8
    assert len(server.requests) == 1 and endpoint.reused == 7


def test_concurrency_is_used_and_bounded(serve):
    def slow(number, payload):
        time.sleep(0.03)
        return "A"

    server = serve(slow)
    rows = [row(1, 2, 3, str(number)) for number in range(10)]
    evaluate(rows, None, endpoint_judge(client(server)), concurrency=3, progress=False)
    assert server.most == 3 and len(server.requests) == 60


def test_in_parallel_keeps_order_and_stops_at_the_first_error():
    def uneven(number):
        time.sleep(0.02 * (number % 3 == 0))
        return number * number

    assert list(evaluation.in_parallel(uneven, range(20), 4)) == [number * number for number in range(20)]
    assert list(evaluation.in_parallel(uneven, [], 4)) == []
    begun = []

    def failing(number):
        begun.append(number)
        if number == 5:
            raise UserError("no")
        time.sleep(30 if number == 0 else 0.01)

    started = time.monotonic()
    with pytest.raises(UserError):
        list(evaluation.in_parallel(failing, range(1000), 4))
    time.sleep(0.1)
    assert time.monotonic() - started < 5 and len(begun) < 20


def test_cache_survives_a_torn_line(serve, tmp_path):
    server, cache = serve(lambda number, payload: f"reply {number}"), tmp_path / "cache.jsonl"
    endpoint = client(server, cache=cache)
    assert [ask(endpoint, text) for text in "abc"] == ["reply 0", "reply 1", "reply 2"]
    key = json.loads(cache.read_text().splitlines()[2])["key"]
    no_reply = json.dumps({"key": key, "reply": {"choices": []}}).encode() + b"\n"
    torn = cache.read_bytes()[:-10]  # as a kill in the middle of the third line leaves it
    cache.write_bytes(no_reply + torn)
    endpoint = client(server, cache=cache)
    assert [ask(endpoint, text) for text in "abc"] == ["reply 0", "reply 1", "reply 3"]
    endpoint = client(server, cache=cache)
    assert [ask(endpoint, text) for text in "cba"] == ["reply 3", "reply 1", "reply 0"]
    assert len(server.requests) == 4
    other = Endpoint(server.url, "another model", cache=cache)
    assert ask(other, "a") == "reply 4"
    assert ask(endpoint, "a", temperature=0.5) == "reply 5"


def test_dialogues_become_messages(serve):
    dialogue = "\n\nHuman: Hi there\n\nAssistant: Hello!\nHow are you?\n\nHuman: Fine.\n\nAssistant:"
    assert evaluation.chat_messages(dialogue) == [
        {"role": "user", "content": "Hi there"}, {"role": "assistant", "content": "Hello!\nHow are you?"},
        {"role": "user", "content": "Fine."}]
    assert evaluation.chat_messages("Human: a\n\nHuman: b\n\nAssistant: ") == [
        {"role": "user", "content": "a\n\nb"}]
    assert evaluation.chat_messages("Write: a poem") == [{"role": "user", "content": "Write: a poem"}]
    assert evaluation.chat_messages("\n\nAssistant: Yes?\n\nHuman: No") == [
        {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "No"}]
    server = serve("An answer")
    assert client(server).complete(dialogue, 100, temperature=0.7) == "An answer"
    assert len(server.requests[0]["messages"]) == 3 and server.requests[0]["temperature"] == 0.7


# ---------------------------------------------------------------------------------------- command line


def run(*arguments, folder):
    command = [sys.executable, str(ROOT / "eval.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=folder, text=True, capture_output=True, timeout=60)


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
    "another world": (GOOD.encode(), "--judge-url"),
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
    (["rows.jsonl", "--limit", "0"], "--limit"),
    (["rows.jsonl", "--out", "rows.jsonl/x"], "rows.jsonl"),
])
def test_bad_arguments_end_without_a_traceback(tmp_path, arguments, told):
    write_rows(tmp_path / "rows.jsonl", toy_rows(2))
    done = run(*arguments, folder=tmp_path)
    assert done.returncode == 2 and told in done.stderr and "Traceback" not in done.stderr
    assert os.listdir(tmp_path) == ["rows.jsonl"]


def test_policies_are_named_by_their_files():
    assert evaluation.policy_names(["a/claude.jsonl", "b/vicuna.csv.gz", "gpt-3.5.jsonl"]) == [
        "claude", "vicuna", "gpt-3.5"]
    paths = ["a/aligned.jsonl", "b/aligned.jsonl"]
    assert evaluation.policy_names(paths) == paths
