"""The client of OpenAI-compatible servers, against a server that misbehaves."""
import email.utils
import json
import resource
import subprocess
import sys
import threading
import time
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import sick_server
from common import UserError
from conftest import assert_one_line
from endpoint import Endpoint, chat_messages, in_parallel, reply_text, retry_after


class Server:
    """An OpenAI-compatible server that does to each request what `script(number, payload)` says: a text to reply,
    ("status", code, body, headers), ("raw", bytes), ("hang", seconds) or "close"."""

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


def client(server, **options):
    return Endpoint(server.url, "judge", **{"backoff": 0.01, "timeout": 5, **options})


def ask(endpoint, text="hello", **extra):
    return reply_text(endpoint.chat([{"role": "user", "content": text}], 16, **extra))


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
    date = email.utils.formatdate(time.time() + 30, usegmt=True)
    assert 28 <= retry_after({"Retry-After": date}) <= 30
    for value, seconds in (("2.5", 2.5), ("soon", 0), ("", 0), ("-3", 0), ("\xb2", 0), ("1 Jan 0001 00:00 -0000", 0)):
        assert retry_after({"Retry-After": value}) == seconds
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


@pytest.fixture
def sick(monkeypatch):
    """sick(name, times) starts a SickServer."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    servers = []

    def start(*words):
        servers.append(sick_server.SickServer(*words))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


KEY = "sk-Secret/471100+key"


def until(condition):
    for _ in range(100):
        if condition():
            return True
        time.sleep(0.02)


def fails(endpoint, server, message, requests):
    """Asserts that a question ends in one short line without any part of the key, after so many requests; nothing is
    kept, and the client has hung up."""
    with pytest.raises(UserError) as caught:
        ask(endpoint)
    assert_one_line(f"error: {caught.value}\n", message)
    assert not any(part in str(caught.value) for part in ("sk-", "ecret", "471100", "+key"))
    assert server.requests == requests and until(lambda: server.open == 0)
    assert endpoint.cache.read_bytes() == b""


@pytest.mark.parametrize("name", sick_server.PASSING)
def test_a_sickness_that_passes_is_outlived_and_one_that_stays_ends_in_one_line(sick, tmp_path, name):
    late = name.startswith(("drip", "silence"))
    patience, told = (0.4, "after 2 attempts.*no whole reply within 0.4 s") if late else (5, "after 2 attempts")
    options = dict(key=KEY, timeout=patience, cache=tmp_path / "cache.jsonl")
    server = sick(name)
    with closing(client(server, retries=1, **options)) as endpoint:
        began = time.monotonic()
        fails(endpoint, server, told, 2)
        assert time.monotonic() - began < 4
    server = sick(name, 1)
    with closing(client(server, **options)) as endpoint:
        assert ask(endpoint) == "A" and (server.requests, endpoint.retried) == (2, 1)
    assert len((tmp_path / "cache.jsonl").read_text().splitlines()) == 1


TOLD = {
    "huge body": "more than 16 MB", "body without an end": "more than 16 MB", "huge error": "HTTP 400 Bad$",
    "error of errors": "HTTP 400 no$", "error with control characters": r"HTTP 400 \[31mred no$",
    "error with the key": r"HTTP 401 bad key \*\*\*; is OPENAI_API_KEY set",
    "error with the key at its cut": r"HTTP 400 x{295}\*\*\*$", "error with the key behind blanks": "HTTP 400 Bad$",
    "error with the key escaped": r"HTTP 400 bad key \*\*\*$", "reason with the key": r"HTTP 403 \*\*\*$",
    "Location with the key": r"HTTP 302 Moved \(to http://elsewhere/x+\?key=\*\*\*",
    "a wait without end": "asks to wait",
}


@pytest.mark.parametrize("name", sick_server.ENDING)
def test_a_sickness_that_cannot_pass_ends_at_once_in_one_line(sick, tmp_path, name):
    server = sick(name)
    with closing(client(server, key=KEY, cache=tmp_path / "cache.jsonl")) as endpoint:
        fails(endpoint, server, TOLD.get(name, "HTTP "), 1)
    assert server.sent < 30 << 20  # of 200 MB and more


@pytest.mark.parametrize("name", sick_server.TELLING)
def test_a_reply_is_kept_without_the_key_in_it(sick, tmp_path, name):
    server, cache = sick(name), tmp_path / "cache.jsonl"
    with closing(client(server, key=KEY, cache=cache)) as endpoint:
        assert ask(endpoint) == ask(endpoint) == "It is ***." and server.requests == 1
    assert "It is ***." in cache.read_text()


def test_a_word_in_place_of_a_key_is_not_looked_for(serve):
    assert ask(client(serve("EMPTY, it says"), key="EMPTY")) == "EMPTY, it says"


@pytest.mark.parametrize("url", ["http://name:secret@host", "http://secret@host:80/v1", "https://host/v1?api-key=secret",
                                 "http://host/#secret", "user:secret@host"])
def test_an_address_with_a_password_is_refused_and_not_told(url):
    with pytest.raises(UserError, match="OPENAI_API_KEY") as caught:
        Endpoint(url, "m")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("name", sick_server.SILENT)
def test_an_empty_reply_is_no_answer_and_is_not_kept(sick, tmp_path, name):
    server, cache = sick(name, 4), tmp_path / "cache.jsonl"
    with closing(client(server, cache=cache)) as endpoint:
        assert endpoint.complete("hello", 16) is None
        assert (server.requests, endpoint.empty, endpoint.retried) == (3, 1, 0)
        assert not ask(endpoint).strip() and server.requests == 4 and cache.read_bytes() == b""
        assert endpoint.complete("hello", 16) == ask(endpoint) == "A" and (server.requests, endpoint.empty) == (5, 1)
    server = sick(name, 1)
    assert client(server).complete("hello", 16) == "A" and server.requests == 2


def test_a_token_of_blanks_with_its_alternatives_is_a_reply(serve, tmp_path):
    reply = json.loads(sick_server.WELL)
    reply["choices"][0]["message"]["content"] = " "
    server = serve(("raw", json.dumps(reply).encode()))
    with closing(client(server, cache=tmp_path / "cache.jsonl")) as endpoint:
        assert ask(endpoint) == ask(endpoint) == " " and len(server.requests) == 1


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
    for url in ("http://[zz]:80", "http://two..dots", "http://localhost:1/é", "http://localhost:1/\x01"):
        with pytest.raises(UserError, match="address"):
            ask(Endpoint(url, "m", backoff=10))
    assert time.monotonic() - began < 5


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


def test_one_question_from_many_threads_is_asked_once(serve):
    def slow(number, payload):
        time.sleep(0.2)
        return "A"

    server = serve(slow)
    endpoint = client(server)
    assert list(in_parallel(lambda _: ask(endpoint), range(8), 8)) == ["A"] * 8
    assert len(server.requests) == 1 and endpoint.reused == 7


def test_in_parallel_keeps_order_and_stops_at_the_first_error():
    def uneven(number):
        time.sleep(0.02 * (number % 3 == 0))
        return number * number

    assert list(in_parallel(uneven, range(20), 4)) == [number * number for number in range(20)]
    assert list(in_parallel(uneven, [], 4)) == []
    begun = []

    def failing(number):
        begun.append(number)
        if number == 5:
            raise UserError("no")
        time.sleep(30 if number == 0 else 0.01)

    started = time.monotonic()
    with pytest.raises(UserError):
        list(in_parallel(failing, range(1000), 4))
    time.sleep(0.1)
    assert time.monotonic() - started < 5 and len(begun) < 20


def test_cache_survives_a_torn_line(serve, tmp_path):
    server, cache = serve(lambda number, payload: f"reply {number}"), tmp_path / "cache.jsonl"

    def asked(texts, model="judge", **extra):
        with closing(Endpoint(server.url, model, cache=cache)) as endpoint:
            return [ask(endpoint, text, **extra) for text in texts]

    assert asked("abc") == ["reply 0", "reply 1", "reply 2"]
    entry = json.loads(cache.read_text().splitlines()[2])
    broken = [{**entry, "reply": {"choices": []}}, {**entry, "key": []}, {**entry, "reply": 7}, 7, [entry], "key"]
    lines = "".join(json.dumps(line) + "\n" for line in broken) + "[" * 5000 + "\n"
    torn = cache.read_bytes()[:-10]  # as a kill in the middle of the third line leaves it
    cache.write_bytes(lines.encode() + torn)
    assert asked("abc") == ["reply 0", "reply 1", "reply 3"]
    assert asked("cba") == ["reply 3", "reply 1", "reply 0"]
    assert len(server.requests) == 4
    assert asked("a", "another model") == ["reply 4"] and asked("a", temperature=0.5) == ["reply 5"]


def test_what_is_kept_belongs_to_one_server_and_says_something(serve, tmp_path, capsys):
    one, other, cache = serve("from one"), serve("from the other"), tmp_path / "cache.jsonl"
    for server in (one, other, one):
        with closing(client(server, cache=cache)) as endpoint:
            assert ask(endpoint) == server.script(0, None)
    assert (len(one.requests), len(other.requests)) == (1, 1)
    mine, others = map(json.loads, cache.read_text().splitlines())
    empty = {**mine, "reply": {"choices": [{"message": {"content": None}}]}}
    earlier = {name: mine[name] for name in ("key", "reply")}  # as it was kept before it said which server it is from
    capsys.readouterr()
    for entry, told in ((empty, ""), (earlier, f"note: {cache}: 1 replies")):
        cache.write_text(json.dumps(entry) + "\n" + json.dumps(others) + "\n")
        with closing(client(one, cache=cache)) as endpoint:
            assert ask(endpoint) == "from one"
        assert capsys.readouterr().err.startswith(told)
    assert len(one.requests) == 3


def test_a_cache_that_cannot_be_had_is_told_before_anything_is_asked(serve, tmp_path):
    server, cache = serve("A"), tmp_path / "folder" / "cache.jsonl"
    with closing(client(server, cache=cache)) as endpoint:
        assert cache.exists()
        with pytest.raises(UserError, match="cache.jsonl: another process is writing it"):
            client(server, cache=cache)
        other = f"import endpoint; endpoint.Endpoint({server.url!r}, 'm', cache={str(cache)!r})"
        found = subprocess.run([sys.executable, "-c", other], cwd=Path(__file__).parents[1], capture_output=True)
        assert b"another process is writing it" in found.stderr
        ask(endpoint)
    endpoint.close()  # again
    before = cache.read_bytes()
    assert ask(endpoint, "after its end") == "A" and cache.read_bytes() == before
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file" / "cache.jsonl", tmp_path / "folder"):
        with pytest.raises(OSError) as caught:
            client(server, cache=path)
        assert caught.value.filename and caught.value.strerror  # of which common.cli makes one line
    client(server, cache=tmp_path / "unused.jsonl").close()
    assert len(server.requests) == 2 and not (tmp_path / "unused.jsonl").exists()


def test_a_full_disk_leaves_whole_lines(serve, tmp_path):
    server, cache = serve("x" * 1000), tmp_path / "cache.jsonl"
    with closing(client(server, cache=cache)) as endpoint:
        ask(endpoint, "first")
        whole, limits = cache.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 500, limits[1]))  # half of the next line
        try:
            with pytest.raises(OSError) as caught:
                ask(endpoint, "second")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert caught.value.filename == str(cache) and cache.read_bytes() == whole
        ask(endpoint, "third")
    assert len([json.loads(line) for line in cache.read_text().splitlines()]) == 2


def test_half_a_surrogate_pair_is_no_character(serve):
    reply = '{"choices": [{"message": {"content": "so \\ud83d \\ud83d\\ude00"}}]}'
    assert client(serve(("raw", reply.encode()))).complete("hello", 16) == "so \ufffd \U0001f600"


def test_dialogues_become_messages(serve):
    dialogue = "\n\nHuman: Hi there\n\nAssistant: Hello!\nHow are you?\n\nHuman: Fine.\n\nAssistant:"
    assert chat_messages(dialogue) == [
        {"role": "user", "content": "Hi there"}, {"role": "assistant", "content": "Hello!\nHow are you?"},
        {"role": "user", "content": "Fine."}]
    assert chat_messages("Human: a\n\nHuman: b\n\nAssistant: ") == [
        {"role": "user", "content": "a\n\nb"}]
    assert chat_messages("Write: a poem") == [{"role": "user", "content": "Write: a poem"}]
    assert chat_messages("\n\nAssistant: Yes?\n\nHuman: No") == [
        {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "No"}]
    server = serve("An answer")
    assert client(server).complete(dialogue, 100, temperature=0.7) == "An answer"
    assert len(server.requests[0]["messages"]) == 3 and server.requests[0]["temperature"] == 0.7
