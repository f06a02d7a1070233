"""A client of OpenAI-compatible servers, and questions to them in parallel.

    endpoint = Endpoint("http://localhost:8000", "some-model", cache="replies.jsonl")
    answer = endpoint.complete("How do I boil an egg?", max_tokens=256)
    answers = list(in_parallel(lambda prompt: endpoint.complete(prompt, 256), prompts, workers=8))
"""
import email.utils
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

from common import UserError, digest, locked, note

MOST_REPLY = 16 * 2**20  # bytes of a reply: many times the longest answer with the log-probabilities of all its tokens
MOST_ERROR = 64 * 2**10  # bytes of an error's text
DEEPEST = 50             # lists and objects within each other in a reply; a chat completion has nine
EMPTY_TRIES = 3          # how often a policy that says nothing is asked the same
SHORTEST_KEY = 8         # characters; what is shorter is no secret but a word such as EMPTY, for servers without keys

# ----------------------------------------------------------------------------------------------------------------
# One model behind a server


class TooLong(UserError):
    """The server says that the request is longer than its model's context."""


class TryAgain(Exception):
    """A failure that may pass; `wait` is the number of seconds the server asked for, if it did."""

    def __init__(self, reason, wait=0.0):
        super().__init__(reason)
        self.wait = wait


class AnyStatus(urllib.request.HTTPErrorProcessor):
    """A reply of any status comes back as it is. To follow a redirect would take the key to another host, and turn the
    question into an empty GET."""

    def http_response(self, request, response):
        return response

    https_response = http_response


class Connecting(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """The connection stays with the request, so that another thread can shut it down."""

    def do_open(self, kind, request, **options):
        def connect(*args, **more):
            request.connection = kind(*args, **more)
            return request.connection
        return super().do_open(connect, request, **options)


class Endpoint:
    """A client of one model behind an OpenAI-compatible server; its methods may be called from many threads.

    url: "http://host:8000", ".../v1" or ".../v1/chat/completions". plain: the model goes on from texts as they are, by
    the completions API; it is asked with `go_on` and not with `chat`. key: by default the environment's OPENAI_API_KEY.
    cache: a JSONL file where every reply that says something is kept, so that no question to this server is ever paid
    for twice, in this run or a later one. It is opened, and locked, at once: what cannot be written is an error before
    anything is asked. timeout: seconds for a whole exchange, from connecting to the last byte; retries: after the
    first attempt; backoff: seconds. `empty` counts the prompts that `complete` got no answer to.
    """

    def __init__(self, url, model, key=None, cache=None, timeout=60, retries=6, backoff=1.0, seed=0,
                 plain=False):
        if re.search("[@?#]", url):  # not quoted: it may be a password
            raise UserError("the server's address holds a '@', a '?' or a '#'; give it without name, password and "
                            "query, like http://localhost:8000, and the key in OPENAI_API_KEY")
        if not re.fullmatch(r"https?://([^\s/:]+|\[[^\s/]+\])(:\d+)?(/\S*)?", url):
            raise UserError(f"{url}: not the address of a server; give one like http://localhost:8000")
        url = url.rstrip("/")
        base = re.sub("(/chat)?/completions$", "", url)
        base += "" if base != url or url.endswith("/v1") else "/v1"
        url, self.plain = base + ("/completions" if plain else "/chat/completions"), plain
        key = (os.environ.get("OPENAI_API_KEY", "") if key is None else key).strip()
        if not (key.isascii() and key.isprintable()):
            raise UserError("OPENAI_API_KEY: holds characters that no key has; set it again")
        self.url, self.model, self.key = url, model, key
        self.timeout, self.retries, self.backoff = timeout, retries, backoff
        self.random = random.Random(seed)
        self.opener = urllib.request.build_opener(AnyStatus, Connecting)
        self.secret = key_pattern(key) if len(key) >= SHORTEST_KEY else None
        self.answered = False   # has the server ever sent anything?
        self.refused = set()    # optional fields that this model does not take
        self.sent = self.reused = self.retried = self.empty = 0
        self.guard, self.gates = threading.Lock(), {}
        self.cache = Path(cache) if cache else None
        self.file = locked(self.cache) if cache else None
        self.replies = self._load() if cache else {}

    def close(self):
        """Let others have the cache. An empty one is removed. To call it again does nothing."""
        with self.guard:
            if self.file:
                if not os.fstat(self.file.fileno()).st_size:
                    self.cache.unlink(missing_ok=True)
                self.file.close()
            self.file = None

    def chat(self, messages, max_tokens, temperature=0.0, **extra):
        """The server's reply, a dict in the form of the chat completions API, to `messages`, a list of {"role",
        "content"}. Extra fields (logprobs=True, top_logprobs=5, seed=1, ...) go to the server as they are. The same
        question always gets the same reply, from the cache, at any temperature; only one that got an empty reply is
        asked anew."""
        payload = {"model": self.model, "messages": messages, "max_tokens": max_tokens, "temperature": temperature,
                   **extra}
        key = digest(payload)
        with self.guard:
            gate = self.gates.setdefault(key, threading.Lock())
        with gate:  # two threads with one question: the second waits for the first one's reply
            if key in self.replies:
                with self.guard:
                    self.reused += 1
                return self.replies[key]
            reply = self._ask(payload)
            if not is_empty(reply):
                self._keep(key, reply)
            return reply

    def complete(self, prompt, max_tokens, temperature=0.0, **extra):
        """The model's answer (str) to a prompt in HH-RLHF form, or to any other text as one user turn; None where it
        says nothing, however often it is asked."""
        for _ in range(min(EMPTY_TRIES, self.retries + 1)):
            text = reply_text(self.chat(chat_messages(prompt), max_tokens, temperature, **extra))
            if text.strip():
                return text
        with self.guard:
            self.empty += 1
        return None

    def go_on(self, text, max_tokens, temperature=0.0, **extra):
        """What the model writes (str, "" for nothing) after a text as it is or, where it is not `plain`, after a chat
        of this one message. Kept nowhere: whoever asks a million questions has a journal of the answers."""
        asked = {"prompt": text} if self.plain else {"messages": [{"role": "user", "content": text}]}
        return reply_text(self._ask({"model": self.model, **asked, "max_tokens": max_tokens,
                                     "temperature": temperature, **extra}))

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
            response, content = self._exchange(request)
        except (ValueError, http.client.InvalidURL) as error:  # nothing could be sent, to a name that no host can have
            raise UserError(f"{self.url}: not the address of a server ({error}); check the URL") from error
        except OSError as error:
            cause = error.reason if isinstance(error, urllib.error.URLError) else error
            absent = isinstance(cause, (ConnectionRefusedError, socket.gaierror, ssl.SSLError))
            if absent and not self.answered:
                raise UserError(f"{self.url}: no server answers there ({cause}); start it, or check the URL") from error
            late = f"no whole reply within {self.timeout:g} s" if isinstance(cause, TimeoutError) else ""
            raise TryAgain(late or self._told(str(cause)) or type(cause).__name__) from error
        except http.client.HTTPException as error:  # whose text quotes what the server sent
            raise TryAgain(f"a reply that is not whole HTTP ({type(error).__name__})") from error
        text = content.decode("utf-8", "replace")
        if not 200 <= response.status < 300:
            self._refuse(response, text if len(content) <= MOST_ERROR else "", body)
        if len(content) > MOST_REPLY:
            raise UserError(f"{self.url}: a reply of more than {MOST_REPLY >> 20} MB; check the URL")
        try:
            reply = json.loads(content)
            if is_reply(reply, self.plain):
                return change_texts(reply, self._masked)
        except (ValueError, RecursionError) as error:
            raise TryAgain("a reply that is not whole JSON, or nested too deeply") from error
        raise TryAgain(f"a reply without choices: {self._told(text)}")

    def _exchange(self, request):
        """(response, bytes of its body) of an urllib Request, of a longer body only a little more than is allowed.
        TimeoutError where it takes longer than the timeout, OSError or HTTPException where it fails.

        The timeout of a socket begins anew with every byte, and a server may send one now and then, even in the head.
        So a thread does the work, and is cut off at the deadline."""
        deadline, finished = time.monotonic() + self.timeout, queue.SimpleQueue()

        def work():
            try:
                with self.opener.open(request, timeout=self.timeout) as response:
                    self.answered, content = True, bytearray()
                    most = MOST_REPLY if 200 <= response.status < 300 else MOST_ERROR
                    while len(content) <= most and (chunk := response.read1(1 << 16)):
                        content += chunk
                        if time.monotonic() > deadline:
                            raise TimeoutError
                    if response.length and len(content) <= most:  # what is missing
                        raise http.client.IncompleteRead(b"", response.length)
                finished.put((response, content, None))
            except BaseException as error:
                finished.put((None, None, error))

        threading.Thread(target=work, daemon=True).start()
        try:
            response, content, error = finished.get(timeout=self.timeout)
        except queue.Empty:
            shut_down(request)
            raise TimeoutError from None
        if error is not None:
            raise error
        return response, content

    def _refuse(self, response, text, body):
        """Raises what an HTTP error status means."""
        status, message = response.status, self._told(text) or self._told(response.reason)
        if status in (408, 429) or status >= 500:
            raise TryAgain(f"HTTP {status} {message}", retry_after(response.headers))
        unsupported = {name for name in ("max_tokens", "temperature", "logprobs", "top_logprobs")
                       if name in body and name.removeprefix("top_") in message}
        refusal = re.search("not support|unsupported|forbidden|unexpected", message, re.I)
        if status in (400, 422) and unsupported and refusal:
            self.refused |= unsupported
            raise TryAgain(message)
        if status in (400, 413) and re.search("context|too long|maximum model length", message, re.I):
            raise TooLong(f"{self.url}: HTTP {status} {message}")
        advice = {401: "; is OPENAI_API_KEY set?", 404: "; check the URL and the model's name"}
        place = self._told(response.headers.get("Location", ""))
        where = f" (to {place}: give that URL)" if place and status < 400 else ""
        raise UserError(f"{self.url}: HTTP {status} {message}{where}{advice.get(status, '')}")

    def _masked(self, text):
        """The text without our key, however it is written there."""
        return self.secret.sub("***", text) if self.secret else text

    def _told(self, text):
        """The message in what a server sent, whatever its form: one short line, without our key in it."""
        try:
            inner = json.loads(text)
            while isinstance(inner, dict):
                inner = next((inner[name] for name in ("error", "message", "detail") if name in inner), text)
            text = inner if isinstance(inner, str) else json.dumps(inner)
        except (ValueError, RecursionError):
            pass
        text = "".join(letter if letter.isprintable() else " " for letter in self._masked(text)[:4000])
        return " ".join(text.split())[:300]

    def _load(self):
        """This server's replies in the cache. Passed over: a line that a killed run left unfinished, an empty reply,
        and what an earlier version kept, which does not say from which server it is."""
        replies, unknown = {}, 0
        self.file.seek(0)
        for line in self.file.read().splitlines():
            try:
                entry = json.loads(line)
                unknown += "key" in entry and "url" not in entry
                if entry["url"] == self.url and is_reply(entry["reply"]) and not is_empty(entry["reply"]):
                    replies[entry["key"]] = entry["reply"]
            except (ValueError, KeyError, TypeError, RecursionError):
                continue
        if unknown:
            note(f"{self.cache}: {unknown} replies in it do not say from which server they are; they are not used")
        return replies

    def _keep(self, key, reply):
        line = json.dumps({"url": self.url, "key": key, "reply": reply}).encode() + b"\n"
        with self.guard:
            self.replies[key] = reply
            if self.file:
                append(self.file, line)


def key_pattern(key):
    """A pattern that finds a key (printable ASCII) as it is, percent-encoded, and with JSON's escapes."""
    return re.compile("".join(rf"(?:\\{{0,3}}{re.escape(letter)}|(?i:%{ord(letter):02x}|\\{{1,3}}u00{ord(letter):02x}))"
                              for letter in key))


def shut_down(request):
    """End the connection of a Request that another thread is still reading from."""
    sock = getattr(getattr(request, "connection", None), "sock", None)
    try:
        if sock:
            sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # it has just ended


def append(file, line):
    """Add a line (bytes) to a file that `locked` opened: on the disk and whole, or, where that fails, not at all."""
    number = file.fileno()
    size = os.fstat(number).st_size
    if size and os.pread(number, 1, size - 1) != b"\n":  # a killed run left a line unfinished
        line = b"\n" + line
    try:
        while line:
            line = line[os.write(number, line):]
        os.fsync(number)
    except OSError as error:
        os.ftruncate(number, size)
        error.filename = file.name
        raise


# ----------------------------------------------------------------------------------------------------------------
# Replies and messages


def is_reply(reply, plain=False):
    """Does it have the form of a chat completion or, plain, of a completion?"""
    try:
        choice = reply["choices"][0]
        return isinstance(choice["text"], str) if plain else isinstance(choice["message"], dict)
    except (KeyError, IndexError, TypeError):
        return False


def reply_text(reply):
    """The text of a completion, "" if it has none. Half a surrogate pair is no character: it becomes U+FFFD."""
    choice = reply["choices"][0]
    content = choice["message"].get("content") if "message" in choice else choice["text"]
    return content.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if isinstance(content, str) else ""


def is_empty(reply):
    """Does a chat completion say nothing: no text, and no token's log-probabilities either?"""
    logprobs = reply["choices"][0].get("logprobs")
    return not reply_text(reply).strip() and not (isinstance(logprobs, dict) and logprobs.get("content"))


def change_texts(value, change, depth=DEEPEST):
    """A copy of a JSON value with change(text) for every text in it. ValueError where it is nested deeper than depth.
    """
    if isinstance(value, str):
        return change(value)
    if isinstance(value, (list, dict)) and not depth:
        raise ValueError("nested too deeply")
    if isinstance(value, list):
        return [change_texts(each, change, depth - 1) for each in value]
    if isinstance(value, dict):
        return {change(name): change_texts(each, change, depth - 1) for name, each in value.items()}
    return value


def retry_after(headers):
    """Seconds to wait by a Retry-After header, which holds seconds or a date; 0.0 without a valid one."""
    value = headers.get("Retry-After", "")
    try:
        if not value.strip().replace(".", "", 1).isdigit():
            value = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        return max(0.0, float(value))
    except (ValueError, TypeError, IndexError, OverflowError):
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
