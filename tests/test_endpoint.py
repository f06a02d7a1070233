"""The client of OpenAI-compatible servers, against a server that misbehaves."""
import email.utils
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from common import UserError
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
    for value, seconds in (("2.5", 2.5), ("soon", 0), ("", 0), ("-3", 0)):
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


@pytest.mark.parametrize("body, told", [("x" * 295 + "secret-key", r"x\*\*\*$"), ("[" * 100_000, r"400 \[\[")])
def test_long_refusals_are_cut_and_do_not_tell_the_key(serve, body, told):
    server = serve(("status", 400, body, {}))
    with pytest.raises(UserError, match=told) as caught:
        ask(client(server, key="secret-key"))
    assert "secr" not in str(caught.value) and len(str(caught.value)) < 400


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
