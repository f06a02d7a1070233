"""A client of OpenAI-compatible servers, and questions to them in parallel.

    endpoint = Endpoint("http://localhost:8000", "some-model", cache="replies.jsonl")
    answer = endpoint.complete("How do I boil an egg?", max_tokens=256)
    answers = list(in_parallel(lambda prompt: endpoint.complete(prompt, 256), prompts, workers=8))
"""
import email.utils
import hashlib
import http.client
import json
import os
import queue
import random
import re
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

from common import UserError

# ----------------------------------------------------------------------------------------------------------------
# One model behind a server


class TooLong(UserError):
    """The server says that the request is longer than its model's context."""


class TryAgain(Exception):
    """A failure that may pass; `wait` is the number of seconds the server asked for, if it did."""

    def __init__(self, reason, wait=0.0):
        super().__init__(reason)
        self.wait = wait


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would take the key to another host, and turns the question into an empty GET."""

    def redirect_request(self, *_):
        return None


class Endpoint:
    """A client of one model behind an OpenAI-compatible server; its methods may be called from many threads.

    url: "http://host:8000", ".../v1" or ".../v1/chat/completions". key: by default the environment's OPENAI_API_KEY.
    cache: a JSONL file where every reply is kept, so that no question is ever paid for twice, in this run or a later
    one. timeout, backoff: seconds; retries: after the first attempt.
    """

    def __init__(self, url, model, key=None, cache=None, timeout=60, retries=6, backoff=1.0, seed=0):
        if not re.fullmatch(r"https?://([^\s/:]+|\[[^\s/]+\])(:\d+)?(/\S*)?", url):
            raise UserError(f"{url}: not the address of a server; give one like http://localhost:8000")
        url = url.rstrip("/")
        if not url.endswith("/chat/completions"):
            url += "/chat/completions" if url.endswith("/v1") else "/v1/chat/completions"
        key = (os.environ.get("OPENAI_API_KEY", "") if key is None else key).strip()
        if not (key.isascii() and key.isprintable()):
            raise UserError("OPENAI_API_KEY: holds characters that no key has; set it again")
        self.url, self.model, self.key = url, model, key
        self.timeout, self.retries, self.backoff = timeout, retries, backoff
        self.random = random.Random(seed)
        self.opener = urllib.request.build_opener(NoRedirect)
        self.answered = False   # has the server ever sent anything?
        self.refused = set()    # optional fields that this model does not take
        self.sent = self.reused = self.retried = 0
        self.guard, self.gates = threading.Lock(), {}
        self.cache = Path(cache) if cache else None
        self.replies = self._load() if cache else {}

    def chat(self, messages, max_tokens, temperature=0.0, **extra):
        """The server's reply, a dict in the form of the chat completions API, to `messages`, a list of {"role",
        "content"}. Extra fields (logprobs=True, top_logprobs=5, seed=1, ...) go to the server as they are. The same
        question always gets the same reply, from the cache, at any temperature."""
        payload = {"model": self.model, "messages": messages, "max_tokens": max_tokens, "temperature": temperature,
                   **extra}
        key = hashlib.sha256(json.dumps(payload, sort_keys=True).encode()).hexdigest()
        with self.guard:
            gate = self.gates.setdefault(key, threading.Lock())
        with gate:  # two threads with one question: the second waits for the first one's reply
            if key not in self.replies:
                self._keep(key, self._ask(payload))
            else:
                with self.guard:
                    self.reused += 1
            return self.replies[key]

    def complete(self, prompt, max_tokens, temperature=0.0, **extra):
        """The model's answer (str) to a prompt in HH-RLHF form, or to any other text as one user turn."""
        return reply_text(self.chat(chat_messages(prompt), max_tokens, temperature, **extra))

    def _ask(self, payload):
        """Sends until a whole reply has come: waits twice as long after each failure, give or take a half."""
        for attempt in range(self.retries + 1):
            try:
                return self._send(payload)
            except TryAgain as error:
                failure = error
            if failure.wait > 600 or attempt == self.retries:
                break
            with self.guard:
                self.retried += 1
                pause = min(60.0, self.backoff * 2 ** attempt) * (0.5 + self.random.random())
            time.sleep(max(pause, failure.wait))
        wait = f", and asks to wait {failure.wait:.0f} s" if failure.wait > 600 else ""
        kept = f"; replies so far are kept in {self.cache}, run the same again later" if self.cache else ""
        raise UserError(f"{self.url}: no usable reply after {attempt + 1} attempts, the last one: "
                        f"{failure}{wait}{kept}")

    def _send(self, payload):
        """One attempt. Raises TryAgain where another may succeed, UserError where it cannot."""
        body = {name: value for name, value in payload.items() if name not in self.refused}
        if "max_tokens" in self.refused:
            body["max_completion_tokens"] = payload["max_tokens"]
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        with self.guard:
            self.sent += 1
        try:
            request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
            with self.opener.open(request, timeout=self.timeout) as response:
                self.answered = True
                reply = json.loads(response.read())
        except urllib.error.HTTPError as error:
            self.answered = True
            self._refuse(error, body)
        except (ValueError, RecursionError, http.client.InvalidURL) as error:
            if not self.answered:  # nothing could be sent, to a name that no host can have, say
                raise UserError(f"{self.url}: not the address of a server ({error}); check the URL") from error
            raise TryAgain("a reply that is not whole JSON") from error
        except (OSError, http.client.HTTPException) as error:
            cause = error.reason if isinstance(error, urllib.error.URLError) else error
            absent = isinstance(cause, (ConnectionRefusedError, socket.gaierror, ssl.SSLError))
            if absent and not self.answered:
                raise UserError(f"{self.url}: no server answers there ({cause}); start it, or check the URL") from error
            raise TryAgain(str(cause) or type(cause).__name__) from error
        if not is_reply(reply):
            raise TryAgain(f"a reply without choices: {self._one_line(json.dumps(reply))}")
        return reply

    def _refuse(self, error, body):
        """Raises what an HTTP error status means."""
        try:
            message = self._one_line(error.read().decode("utf-8", "replace"))
        except (OSError, http.client.HTTPException):
            message = error.reason
        if error.code in (408, 429) or error.code >= 500:
            raise TryAgain(f"HTTP {error.code} {message}", retry_after(error.headers))
        unsupported = {name for name in ("max_tokens", "temperature") if name in body and name in message}
        if error.code == 400 and unsupported and re.search("not support|unsupported", message, re.I):
            self.refused |= unsupported
            raise TryAgain(message)
        if error.code in (400, 413) and re.search("context|too long|maximum model length", message, re.I):
            raise TooLong(f"{self.url}: HTTP {error.code} {message}")
        advice = {401: "; is OPENAI_API_KEY set?", 404: "; check the URL and the model's name"}
        where = f" (to {error.headers.get('Location')}: give that URL)" if 300 <= error.code < 400 else ""
        raise UserError(f"{self.url}: HTTP {error.code} {message}{where}{advice.get(error.code, '')}")

    def _one_line(self, text):
        """The message in a server's error, whatever its form, without our key in it."""
        try:
            inner = json.loads(text)
            while isinstance(inner, dict):
                inner = next((inner[name] for name in ("error", "message", "detail") if name in inner), text)
            text = inner if isinstance(inner, str) else json.dumps(inner)
        except (ValueError, RecursionError):
            pass
        text = " ".join(text.split())
        return (text.replace(self.key, "***") if self.key else text)[:300]

    def _load(self):
        """The cached replies. A line that a killed run left unfinished is passed over."""
        replies = {}
        if self.cache.exists():
            for line in self.cache.read_bytes().splitlines():
                try:
                    entry = json.loads(line)
                    if is_reply(entry["reply"]):
                        replies[entry["key"]] = entry["reply"]
                except (ValueError, KeyError, TypeError):
                    continue
        return replies

    def _keep(self, key, reply):
        with self.guard:
            self.replies[key] = reply
            if self.cache is None:
                return
            self.cache.parent.mkdir(parents=True, exist_ok=True)
            with open(self.cache, "ab+") as file:
                if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
                    file.write(b"\n")
                file.write(json.dumps({"key": key, "reply": reply}).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())


# ----------------------------------------------------------------------------------------------------------------
# Replies and messages


def is_reply(reply):
    """Does it have the form of a chat completion?"""
    try:
        return isinstance(reply["choices"][0]["message"], dict)
    except (KeyError, IndexError, TypeError):
        return False


def reply_text(reply):
    """The text of a chat completion, "" if it has none."""
    content = reply["choices"][0]["message"].get("content")
    return content if isinstance(content, str) else ""


def retry_after(headers):
    """Seconds to wait by a Retry-After header, which holds seconds or a date; 0.0 without a valid one."""
    value = headers.get("Retry-After", "")
    try:
        if not value.strip().replace(".", "", 1).isdigit():
            value = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        return max(0.0, float(value))
    except (ValueError, TypeError):
        return 0.0


def chat_messages(text):
    """The chat messages of a dialogue "\\n\\nHuman: ...\\n\\nAssistant:", without empty turns; turns of one speaker in
    a row become one. A text without such marks is one user turn."""
    first, *turns = re.split(r"(?:^|\n\n)(Human|Assistant):", text)
    messages = [{"role": "user", "content": first.strip()}]
    for speaker, said in zip(turns[::2], turns[1::2]):
        role = "user" if speaker == "Human" else "assistant"
        if messages[-1]["role"] == role:
            messages[-1]["content"] = (messages[-1]["content"] + "\n\n" + said.strip()).strip()
        elif said.strip():
            messages.append({"role": role, "content": said.strip()})
    return messages if len(messages) == 1 or messages[0]["content"] else messages[1:]


# ----------------------------------------------------------------------------------------------------------------
# In parallel


def in_parallel(function, items, workers):
    """Yields function(item) in the order of the list `items`, computed by at most `workers` threads. The first error is
    raised at once, and nothing waits for the threads that are still asking a slow server."""
    waiting, guard = iter(enumerate(items)), threading.Lock()
    finished, stop = queue.SimpleQueue(), threading.Event()

    def work():
        while not stop.is_set():
            with guard:
                index, item = next(waiting, (None, None))
            if index is None:
                return
            try:
                finished.put((index, function(item), None))
            except BaseException as error:
                stop.set()  # nobody asks on while the error is on its way
                finished.put((index, None, error))

    for _ in range(min(workers, len(items))):
        threading.Thread(target=work, daemon=True).start()
    done = {}
    try:
        for wanted in range(len(items)):
            while wanted not in done:
                index, value, error = finished.get()
                if error is not None:
                    raise error
                done[index] = value
            yield done.pop(wanted)
    finally:
        stop.set()
