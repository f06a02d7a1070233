"""An OpenAI-compatible server that is sick in a way with a name, for tests of whoever asks it.

    server = SickServer("drip body", times=2)       # two requests are answered so, all others well
    ... server.url, server.requests, server.close()

    python tests/sick_server.py "drip body" 2       # the same as a program: prints its URL, ends when its input does

A sickness is a function of the key in the request's Authorization header. It gives the parts of a reply: bytes to send,
seconds to wait, or RESET. They are sorted by what a client is to do: PASSING may be gone at the next attempt; at ENDING
there is nothing to try again; SILENT are whole replies that say nothing; NO_LOGPROBS say A, but not how likely that is;
in TELLING the text is the key itself. No other file of the project is needed.
"""
import gzip
import itertools
import json
import socket
import struct
import sys
import threading

RESET = object()
PAUSE = 0.05  # seconds between the bytes that drip
NEVER_ENDING = 10**9


def head(status="200 OK", **headers):
    lines = [f"HTTP/1.1 {status}", *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def http(body, status="200 OK", **headers):
    body = body.encode() if isinstance(body, str) else body
    return head(status, **{"Content_Length": len(body), **headers}) + body


def said(content, logprobs=None):
    """The JSON text of a chat completion."""
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": content}, "logprobs": logprobs}]})


def likeliest(candidates):
    return said("A", {"content": [{"token": "A", "top_logprobs": candidates}]})


WELL = likeliest([{"token": "A", "logprob": -0.25}, {"token": "B", "logprob": -1.75}])


def dripping(start, byte):
    """start, and then byte after byte, until the client hangs up."""
    yield start
    for _ in range(NEVER_ENDING):
        yield PAUSE
        yield byte


def always(*parts):
    return lambda key: parts


def nested(depth):
    return "[" * depth + "]" * depth


def escaped(key):
    """With each letter as JSON's escape."""
    return "".join(f"\\u{ord(letter):04x}" for letter in key)


CHUNKED = head(Transfer_Encoding="chunked")
PASSING = {
    "drip body": lambda key: dripping(head(Content_Length=NEVER_ENDING), b" "),
    "drip body of unknown length": lambda key: dripping(head() + WELL.encode(), b" "),
    "drip chunks": lambda key: dripping(CHUNKED, b"1\r\n \r\n"),
    "drip head": lambda key: dripping(b"HTTP/1.1 200 OK\r\nX-Slow: ", b"x"),
    "drip status": lambda key: dripping(b"HTTP/1.1 200 ", b"x"),
    "drip interim replies": lambda key: dripping(b"", head("100 Continue")),
    "drip error": lambda key: dripping(head("503 Busy", Content_Length=1000), b"x"),
    "silence": always(NEVER_ENDING),
    "silence after the head": always(head(Content_Length=10), NEVER_ENDING),
    "closed": always(),
    "reset": always(RESET),
    "reset in the head": always(b"HTTP/1.1 200 OK\r\nContent-", RESET),
    "reset in the body": always(head(Content_Length=len(WELL)) + WELL[:30].encode(), PAUSE, RESET),
    "truncated body": always(head() + WELL[:-3].encode()),
    "longer than it says": always(http(WELL, Content_Length=len(WELL) - 3)),
    "shorter than it says": always(http(WELL, Content_Length=len(WELL) + 3)),
    "truncated error": lambda key: [head("503 Busy", Content_Length=1000) + f"bad {key[:-2]}".encode()],
    "chunk of no size": always(CHUNKED + b"size\r\n" + WELL.encode()),
    "chunk of negative size": always(CHUNKED + b"-5\r\n" + WELL.encode()),
    "chunk cut off": always(CHUNKED + b"fff\r\n" + WELL.encode()),
    "chunks without an end": always(CHUNKED + f"{len(WELL):x}\r\n{WELL}\r\n".encode()),
    "no HTTP": lambda key: [f"{key} is not known here\r\n\r\n".encode()],
    "status line with the key": lambda key: [f"HTTP/1.1 {key} OK\r\n\r\n".encode()],
    "HTTP of the future": always(b"HTTP/9.9 200 OK\r\n\r\n" + WELL.encode()),
    "line of the head too long": always(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70_000 + b"\r\n\r\n"),
    "too many lines of the head": always(b"HTTP/1.1 200 OK\r\n" + b"X: x\r\n" * 200 + b"\r\n"),
    "204 without a body": always(head("204 No Content")),
    "no body": always(http("")),
    "HTML": always(http("<html>Please log in</html>")),
    "gzip": always(http(gzip.compress(WELL.encode()), Content_Encoding="gzip")),
    "not UTF-8": always(http(WELL.replace("A", "\xff").encode("latin-1"))),
    "a number too long": always(http('{"choices": [{"message": {"content": ' + "9" * 5000 + "}}]}")),
    "nested deep": always(http("[" * 100_000)),
    "nested deep and whole": always(http(nested(900))),
    "nested deep in the text": always(http(f'{{"choices": [{{"message": {{"content": {nested(900)}}}}}]}}')),
    "nested deep beside the text": always(http(WELL[:-1] + f', "x": {nested(300)}}}')),
    "nested deep in an error": always(http('{"error": ' + nested(900) + "}", "503 Busy")),
    "200 with an error": lambda key: [http(json.dumps({"error": {"message": f"out of money, {key}", "code": 402}}))],
    "429 and a wait that is none": always(http("slow down", "429 Slow", Retry_After="soon, \xb2")),
    "429 and a wait of long ago": always(http("slow down", "429 Slow", Retry_After="Mon, 1 Jan 0001 00:00:00 -0000")),
    **{f"reply {text}": always(http(text)) for text in (
        "null", "true", "7", '"A"', "[]", '["A"]', "{}", "NaN", '{"choices": null}', '{"choices": []}',
        '{"choices": {}}', '{"choices": "A"}', '{"choices": [null]}', '{"choices": ["A"]}', '{"choices": [{}]}',
        '{"choices": [{"message": null}]}', '{"choices": [{"message": ["A"]}]}', '{"choices": [{"text": "A"}]}')},
}
ENDING = {
    "huge body": lambda key: itertools.chain([head(Content_Length=200 << 20)], itertools.repeat(b" " * 65536, 3200)),
    "body without an end": lambda key: itertools.chain([head()], itertools.repeat(b" " * 65536)),
    "huge error": lambda key: itertools.chain([head("400 Bad")], itertools.repeat(key.encode() * 5000, 3000)),
    "error nested deep": always(http('{"error": ' + "[" * 50_000, "400 Bad")),
    "error nested deep and whole": always(http('{"error": ' + nested(900) + "}", "400 Bad")),
    "error of errors": always(http('{"error": ' * 300 + '"no"' + "}" * 300, "400 Bad")),
    "error that is not UTF-8": always(http(b"\xff\xfe\x00", "400 Bad")),
    "error with control characters": always(http('{"error": "\\u001b[31mred\\u0007\\r\\nno"}', "400 Bad")),
    "error with the key": lambda key: [http(json.dumps({"error": f"bad key {key}"}), "401 No")],
    "error with the key at its cut": lambda key: [http("x" * 295 + key, "400 Bad")],
    "error with the key behind blanks": lambda key: [http("x" + " " * 65_525 + key, "400 Bad")],
    "error with the key escaped": lambda key: [http(f'{{"error": "bad key {escaped(key)}"}}', "400 Bad")],
    "torn error with the key escaped": lambda key: [http(f'{{"error": "bad key {escaped(key)}', "400 Bad")],
    "error with the key percent-encoded": lambda key: [http("".join(f"%{ord(c):02X}" for c in key), "400 Bad")],
    "reason with the key": lambda key: [http("", f"403 {key}")],
    "Location with the key": lambda key: [http("", "302 Moved", Location=f"http://elsewhere/{'x' * 270}?key={key}")],
    "redirect without a place": always(http("", "302 Moved")),
    "interim status": always(head("101 Switching Protocols")),
    "a wait without end": always(http("slow down", "429 Slow", Retry_After="9" * 400)),
}
SILENT = {
    **{f"content {text}": always(http(f'{{"choices": [{{"message": {{"content": {text}}}}}]}}')) for text in (
        "null", '""', '" \\n\\t"', "7", "true", "NaN", '["A"]', '{"text": "A"}', '[{"type": "text", "text": "A"}]')},
    "filtered": always(http(json.dumps({"choices": [{"message": {"role": "assistant", "content": None},
                                                     "logprobs": None, "finish_reason": "content_filter"}]}))),
    "no content": always(http('{"choices": [{"message": {}}]}')),
    "no tokens": always(http(said("", {"content": []}))),
}
NO_LOGPROBS = {
    **{f"logprobs {json.dumps(value)}": always(http(said("A", value))) for value in (
        None, True, 7, "A", [], {}, {"content": None}, {"content": []}, {"content": "A"}, {"content": [None]},
        {"content": [{"token": "A", "logprob": -0.1}]}, {"content": [{"token": "A", "top_logprobs": None}]},
        {"content": [{"token": "A", "top_logprobs": []}]}, {"content": [{"token": "A", "top_logprobs": {"A": -0.1}}]})},
    **{f"logprob {text[:20]}": always(http(likeliest([{"token": "A", "logprob": "HERE"}]).replace('"HERE"', text)))
       for text in ("null", "true", "false", '"-0.1"', "[]", "NaN", "Infinity", "-Infinity", "0.1", "5", "1e999",
                    "-" + "9" * 4000)},
    "token null": always(http(likeliest([{"token": None, "logprob": -0.1}]))),
    "candidate null": always(http(likeliest([None]))),
}
TELLING = {
    "key": lambda key: [http(said(f"It is {key}."))],
    "key escaped": lambda key: [http(said("HERE").replace("HERE", f"It is {escaped(key)}."))],
    "key percent-encoded": lambda key: [http(said("It is " + "".join(f"%{ord(c):02x}" for c in key) + "."))],
}
SICK = {**PASSING, **ENDING, **SILENT, **NO_LOGPROBS, **TELLING}


class SickServer:
    """Answers the first `times` requests with the sickness of that name, all others well. `requests`: how many came;
    `sent`: bytes sent; `open`: connections that are still being served."""

    def __init__(self, name, times=NEVER_ENDING):
        self.sickness, self.times = SICK[name], times
        self.requests = self.sent = self.open = 0
        self.guard = threading.Lock()
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self):
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:  # it is closed
                return
            threading.Thread(target=self.answer, args=[connection], daemon=True).start()

    def answer(self, connection):
        with self.guard:
            self.open += 1
        try:
            with connection:
                key = read_request(connection)
                with self.guard:
                    self.requests += 1
                    sick = self.requests <= self.times
                self.send(connection, self.sickness(key) if sick else [http(WELL)])
        except OSError:
            pass  # the client did not wait
        with self.guard:
            self.open -= 1

    def send(self, connection, parts):
        for part in parts:
            if part is RESET:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            elif isinstance(part, bytes):
                connection.sendall(part)
                with self.guard:
                    self.sent += len(part)
            else:
                wait(connection, part)

    def close(self):
        self.listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self.listener.close()


def wait(connection, seconds):
    """Wait, but no longer than the client does."""
    connection.settimeout(seconds if seconds < NEVER_ENDING else None)
    try:
        if not connection.recv(1):
            raise OSError("the client hung up")
    except TimeoutError:
        pass
    connection.settimeout(None)


def read_request(connection):
    """Read a whole request; gives the key in it."""
    with connection.makefile("rb") as file:
        headers = {}
        for line in iter(file.readline, b"\r\n"):
            if not line:
                raise OSError("the client hung up")
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.lower()] = value.strip()
        file.read(int(headers.get("content-length", 0)))
    return headers.get("authorization", "").removeprefix("Bearer ") or "no-key-was-given"


if __name__ == "__main__":
    server = SickServer(sys.argv[1], *map(int, sys.argv[2:3]))
    print(server.url, flush=True)
    sys.stdin.read()
