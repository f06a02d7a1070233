"""Six promises, and thousands of disasters drawn by chance to see whether they hold; `make campaign` runs it.

    python campaign.py                                    all parts, 12 minutes
    python campaign.py --only kills rows --minutes 3      some of the parts
    python campaign.py --only kills/align                 one subject of a part
    python campaign.py --only kills/align/17 --seed 0     one trial again, as a failure tells it

At the end stands a table: how many trials each part has made of each subject, and how many the promise survived; then
every failure, with the command that repeats it. The same is in OUT/campaign.json; the status is 1 if anything failed.
Each part gets a share of the minutes, so a slow machine makes fewer trials; what a trial does depends on the seed and
the trial's name alone. Linux only: the scripts run in forks of this process, so that PyTorch is imported once.
"""
# The parts kills, disks and stale are in trials.py, with all that they share with those here, from top to bottom: rows
# and checkpoints, which are read damaged; endpoints, which are sick; and the runner.
import csv
import functools
import gzip
import http.server
import io
import itertools
import json
import math
import os
import pickle
import re
import shlex
import shutil
import signal
import socket
import struct
import sys
import threading
import time
from pathlib import Path

import common

import torch
from tqdm import tqdm

import checkpoint
import data
import endpoint
import formats
import reward
import train
from trials import (World, command, complaint, difference, disks, ended_at, files_in, forked, kills, limit_memory,
                    make_world, stale, undisturbed, words_of)
from writers import Writer

KEY = "sk-campaign-0123456789"  # the secret that no line and no file may show


# ----------------------------------------------------------------------------------------------------------------
# Damage

ODD = ["null", "true", "0", "-1", "0.5", "7", "1e999", "-1e999", "NaN", "1e308", "5e-324", "1" * 5000, '""', '" "',
       '"\\u0000"', '"\\ud800"', '"\\u2028a\\r\\nb"', '"\u0085"', '"\\ufeff"', '"1"', '"N/A"', '"a/b"', "[]", "{}",
       "[[]]", "[null]", '["a"]', '{"a": 1}', '[{"role": "user", "content": null}]', '"' + "x y" * 70_000 + '"',
       "[" * 3000 + "]" * 3000, '{"a":' * 200_000 + "1" + "}" * 200_000, '"\\n\\nHuman: a\\n\\nAssistant: b"',
       '"{objectives}{prompt}{answer}"']
BYTES = [b"\0", b"\xef\xbb\xbf", b"\r", b"\xe2\x80\xa8", b"\xff", b'"', b"\\", b"{", b",", b"9" * 5000]


def places(value, path=()):
    """The paths of all that a JSON value holds."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def mutated(rng, value):
    """A JSON value with one thing in it changed: (its JSON text, what it was, the JSON text of what it is or "")."""
    path, value = rng.choice(list(places(value))), json.loads(json.dumps(value))
    holder = functools.reduce(lambda inner, key: inner[key], path[:-1], value)
    old, how = holder[path[-1]], rng.choice(("odd", "odd", "odd", "odd", "delete", "rename", "list", "text"))
    new = {"odd": rng.choice(ODD), "list": json.dumps([old]), "text": json.dumps(str(old))}.get(how, "")
    if new:
        holder[path[-1]] = "@NEW@"
    else:
        del holder[path[-1]]
    if how == "rename" and isinstance(holder, dict):
        holder[f"{path[-1]}x"] = old
    return json.dumps(value).replace('"@NEW@"', new), old, new


def damaged(rng, content):
    """Bytes with a bit turned, cut off, or with some lost or added."""
    place, how = rng.randrange(len(content) + 1), rng.choice(("flip", "flip", "flip", "cut", "lose", "add", "add"))
    here, rest = content[:place], content[place:]
    if how == "flip" and rest:
        return here + bytes([rest[0] ^ 1 << rng.randrange(8)]) + rest[1:]
    if how == "add":
        return here + rng.choice(BYTES) + rest
    return here + (rest[rng.randint(1, 40):] if how == "lose" else b"")


# ----------------------------------------------------------------------------------------------------------------
# Rows

READERS = {  # name: (what reads a file, the keys that its rows must have)
    "rated": (lambda path: formats.read_rated(path, objective="chosen"), "prompt responses"),
    "preferences": (formats.read_preferences, "prompt response_a response_b principle p_a"),
    "completions": (formats.read_completions, "prompt completion"),
    "examples": (formats.read_pairs, "prompt completion"),
    "texts": (lambda path: ({"text": text} for text in formats.read_texts(path)), "text"),
    "aligned": (formats.read_aligned, "prompt original aligned objectives"),
    "objectives": (lambda path: map(vars, data.find_objectives([str(path)])), "name description"),
    "template": (lambda path: [data.read_template(path)], "better equal"),
    "weights": (lambda path: [{"scores": dict(enumerate(reward.read_weights([str(path)], ["a", "b"])))}], "scores"),
}
FORMATS = {  # name: (its readers, a record of a question Q and answers A and B)
    "rated": ("rated preferences completions", """{"prompt": "Q", "golden": "B", "responses": [
        {"text": "A", "scores": {"harmless": 2, "helpful": 0.5}}, {"text": "B", "scores": {"harmless": 1}}]}"""),
    "UltraFeedback": ("rated preferences completions", """{"instruction": "Q", "completions": [
        {"response": "A", "annotations": {"helpfulness": {"Rating": "4"}, "honesty": {"Rating": "N/A"}}},
        {"response": "B", "annotations": {"helpfulness": {"Rating": "2"}}}]}"""),
    "HH pairs": ("rated preferences completions", r"""{"chosen": "\n\nHuman: Q\n\nAssistant: A",
        "rejected": "\n\nHuman: Q\n\nAssistant: B"}"""),
    "TRL pairs": ("rated preferences completions", '{"prompt": "Q", "chosen": "A", "rejected": "B"}'),
    "TRL messages": ("rated preferences completions", """{"prompt": [{"role": "user", "content": "Q"}],
        "chosen": [{"role": "assistant", "content": "A"}], "rejected": [{"role": "assistant", "content": "B"}]}"""),
    "AlpacaEval": ("rated", '{"instruction": "Q", "output": "A", "generator": "m"}'),
    "Alpaca": ("rated completions", '{"instruction": "Q", "input": "B", "output": "A"}'),
    "KTO": ("rated completions", '{"prompt": "Q", "completion": "A", "label": true}'),
    "HelpSteer2": ("rated", """{"prompt": "Q", "response": "A", "helpfulness": 3, "correctness": 4,
        "coherence": 4, "complexity": 1, "verbosity": 2}"""),
    "PKU-SafeRLHF": ("rated preferences", """{"prompt": "Q", "response_0": "A", "response_1": "B",
        "is_response_0_safe": true, "is_response_1_safe": false, "better_response_id": 0, "safer_response_id": 0}"""),
    "MetaAligner CSV": ("rated", '{"query": "Q", "generated_text": "A", "goldens": "B"}'),
    "prompts": ("rated", '{"prompt": "Q"}'),
    "prompts CSV": ("rated", '{"prompt": "Q", "golden": "A"}'),
    "examples": ("examples completions", """{"prompt": "Q", "completion": "A", "relation": "better",
        "context": [0, 2], "answer": [2, 4]}"""),
    "labels": ("preferences", '{"prompt": "Q", "response_a": "A", "response_b": "B", "principle": "p", "p_a": 0.25}'),
    "AlpacaEval annotated": ("preferences", """{"prompt": "Q", "reference": "B", "responses": {
        "m": {"text": "A", "gpt4_preference_over_reference": 0.75}}}"""),
    "Auto-J": ("preferences", '{"prompt": "Q", "response 1": "A", "response 2": "B", "label": 1}'),
    "aligned": ("aligned", '{"prompt": "Q", "original": "A", "aligned": "B", "objectives": ["a: b"], "golden": "A"}'),
    "aligned CSV": ("aligned", '{"prompt": "Q", "original": "A", "aligned": "B", "objectives": "a | b", "golden": ""}'),
    "texts": ("texts", '{"text": "A"}'),
    "objectives list": ("objectives", '{"name": "Q", "description": "A"}'),
    "template alone": ("template", """{"better": "{objectives} {prompt} {answer}:",
        "equal": "{objectives}{prompt}{answer}"}"""),
    "weights alone": ("weights", '{"a": 1, "b": 0.5}'),
}


def is_valid(row, keys):
    """Whether a row has the keys; and texts, finite scores, a probability, places in the prompt, where they belong."""
    parts = [row, *row.get("responses", ())]
    texts = [part[key] for part in parts for key in ("prompt", "completion", "response_a", "response_b", "principle",
             "text", "original", "aligned", "name", "description", "better", "equal") if key in part]
    texts += [row["golden"]] if row.get("golden") is not None else []
    scores = [score for part in parts for score in part.get("scores", {}).values()] + [row.get("p_a", 0)]
    spans = [row[key] for key in ("context", "answer") if key in row]
    return (set(keys.split()) <= row.keys() and all(isinstance(text, str) for text in texts + row.get("objectives", []))
            and all(type(score) in (int, float) and math.isfinite(score) for score in scores)
            and 0 <= row.get("p_a", 0) <= 1 and all(0 <= a <= b <= len(row["prompt"]) for a, b in spans))


def laid_out(chunks, form, columns):
    """The bytes of a file of records, each given as bytes."""
    content = b"".join(chunk + b"\n" for chunk in chunks)
    if form == "list":
        content = b"[" + b",\n".join(chunks) + b"]\n"
    if form == "csv":
        content = cells(columns) + b"\n" + content
    return gzip.compress(content, mtime=0) if form == "gz" else content


def cells(values):
    """A line of CSV, as bytes."""
    line = io.StringIO()
    csv.writer(line).writerow(values)
    return line.getvalue().removesuffix("\r\n").encode()


def draw_file(rng, name):
    """A file of four records, or of one "alone", with something in it changed: (the records as they were, each bytes;
    the place of the one that is changed, or None; the file's bytes; its form and columns; (old, new) of a text)."""
    form = name.split()[-1].lower()
    form = form if form in ("csv", "list", "alone") else rng.choice(("lines", "list", "gz"))
    rows = [json.loads(re.sub(r"(?<!/)\b([QAB])\b", rf"\1 says so {n}.", FORMATS[name][1]))
            for n in range(1 if form == "alone" else 4)]
    columns, text = list(rows[0]), (None, None)
    chunks = [cells(row.values()) if form == "csv" else json.dumps(row).encode() for row in rows]
    place, how, made = rng.randrange(len(rows)), rng.choice(("value", "value", "value", "bytes", "file")), list(chunks)
    if how == "value" and form == "csv":
        key, new = rng.choice(columns), json.loads(rng.choice([x for x in ODD if x[0] == '"' and "ud800" not in x]))
        text = rows[place][key], new
        made[place] = cells({**rows[place], key: new}.values())
    elif how == "value":
        changed, old, new = mutated(rng, rows[place])
        made[place] = changed.encode()
        if new.startswith('"') and isinstance(old, str):  # half a surrogate pair is no character
            text = old, json.loads(new).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    elif how == "bytes":
        made[place] = damaged(rng, chunks[place])
    content = laid_out(made, form, columns)
    if how == "file":
        place = None
        content = rng.choice((b"\xef\xbb\xbf" + content, content.replace(b"\n", b"\r\n"), content + b"\r\n")
                             if form != "gz" else (content[:rng.randrange(3, len(content))], damaged(rng, content)))
    return chunks, place, content, form, columns, text


def leaves(value):
    """All the texts and numbers in a JSON value."""
    if isinstance(value, (dict, list)):
        return [leaf for item in (value.values() if isinstance(value, dict) else value) for leaf in leaves(item)]
    return [value]


def read_mutant(path, reader, drawn):
    """In a child: print what is wrong with what a reader makes of a file by draw_file."""
    limit_memory()
    chunks, place, content, form, columns, (old, new) = drawn
    read, keys = READERS[reader]

    def rows_of(content):
        path.write_bytes(content)
        return list(read(path))
    parts = (chunks, [], []) if place is None else (chunks[:place], chunks[place:place + 1], chunks[place + 1:])
    before, was, after = [rows_of(laid_out(part, form, columns)) if part else [] for part in parts]
    try:
        rows = rows_of(content)
    except common.UserError as error:
        message = common.in_short(" ".join(str(error).splitlines()))
        print("" if path.name in message else f"does not name the file: {message[:300]}")
        return
    json.dumps(rows, ensure_ascii=False).encode()  # raises, where there is half a surrogate pair
    now, wrong = rows[len(before):len(rows) - len(after)], [row for row in rows if not is_valid(row, keys)]
    if wrong:
        print(f"a row that is not valid: {wrong[0]!r:.300}")
    elif rows[:len(before)] != before or rows[len(rows) - len(after):] != after or place is None and now:
        print(f"other rows come out changed: {rows!r:.300}")
    elif new and new.strip() and old in leaves(was) and len(now) >= len(was):
        if not {new, new.strip()} & {*leaves(now)}:
            print(f"{old!r} was made {new!r:.50}, and that is not in {now!r:.300}")


def rows(world):
    """What is read of a damaged file stands in it, and the other rows come out as they were; or a line refuses it."""
    folder = world.fresh("rows")

    def trial(name, number):
        rng = world.rng("rows", name, number)
        reader, drawn = rng.choice(FORMATS[name][0].split()), draw_file(rng, name)
        result = forked(functools.partial(read_mutant, folder / f"{name.replace(' ', '-')}.json", reader, drawn), 20)
        return complaint(result) or result[1].strip() and f"read as {reader}: {result[1]:.600}"
    for number in itertools.count():
        for name in FORMATS:
            yield name, number, functools.partial(trial, name, number)


# ----------------------------------------------------------------------------------------------------------------
# Checkpoints


class Code:
    """What would make a file, were it unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def make_models(base, models):
    """In a child: write folders with a model of every kind, made of that in `base`."""
    for name in ("llama", "shards", "bin", "adapter", "principle"):
        shutil.copytree(base, models / name)
    for name in ("shards", "bin", "adapter"):
        (models / name / "model.safetensors").unlink()
    weights, index = {name: weight.detach() for name, weight in checkpoint.load(base).named_parameters()}, {}
    torch.save(weights, models / "bin" / "pytorch_model.bin")
    for part, names in enumerate((list(weights)[:4], list(weights)[4:])):
        checkpoint.write_tensors(models / "shards" / f"{part}.safetensors", {name: weights[name] for name in names})
        index.update(dict.fromkeys(names, f"{part}.safetensors"))
    common.write_text(models / "shards" / "model.safetensors.index.json", json.dumps({"weight_map": index}))
    checkpoint.save(train.start_from(base, "sft", torch.device("cpu"), train.Options(lora_rank=2)), models / "adapter")
    checkpoint.save(checkpoint.load(base, scorer=True), models / "principle")
    common.write_jsonl(models / "principle" / "principle.json", [{"name": "detail", "mean": 0.0, "std": 1.0}])


def use(kind, folder, words):
    """In a child: load what is in a folder, and do with it what a command does."""
    limit_memory()
    if kind == "state":
        command(words)()
    elif kind == "principle":
        reward.Scorers([folder], "cpu").score(["a"], ["b"])
    else:
        writer = Writer(folder, "cpu")
        list(writer.write([writer.encode("How do I boil an egg?", 4)], 4, 1))


def checkpoints(world):
    """A damaged model, or state of a training, is refused in one line, or can be used; to load it runs no code."""
    models, marker = world.fresh("models"), world.folder / "code-ran"
    forked(functools.partial(make_models, world.folder / "world" / "base", models))
    known = undisturbed(world, "train sft")
    words, more, _ = words_of(world, "train sft", world.folder / "damaged")
    forked(ended_at(command(words + more), "call", known.calls // 2))
    shutil.move(world.folder / "damaged" / "out", models / "state")

    def trial(kind, number):
        rng, folder = world.rng("checkpoints", kind, number), world.fresh("damaged") / "out"
        shutil.copytree(models / kind, folder)
        path, how = rng.choice(sorted(folder.iterdir())), rng.choice(("json", "json", "bytes", "head", "other", "code"))
        content = path.read_bytes()
        if how == "json" and path.suffix == ".json":
            content = mutated(rng, json.loads(content))[0].encode()
        elif how == "other":
            content = rng.choice(sorted(path for path in models.rglob("*") if path.is_file())).read_bytes()
        elif how == "code" and rng.random() < 0.5:
            content = pickle.dumps(Code(marker), rng.choice((0, 2, 4)))
        elif how == "code":
            whole = io.BytesIO()
            torch.save({"model": Code(marker), "metrics_bytes": 0}, whole)
            content = whole.getvalue()
        else:
            begin = 300 if how == "head" else len(content)
            content = damaged(rng, content[:begin]) + content[begin:]
        path.write_bytes(content)
        result = forked(functools.partial(use, kind, folder, words + more), 20)
        wrong = complaint(result)
        if result[0] == 0 and path.name == "state.pt":  # what went on from it is the same, or else it is refused
            wrong = wrong or difference(files_in(folder.parent), known.files)
        if marker.exists():
            marker.unlink()
            wrong = "to load it ran code"
        return wrong and f"{path.name} ({how}): {wrong}"
    for number in itertools.count():
        for kind in sorted(os.listdir(models)):
            yield kind, number, functools.partial(trial, kind, number)


# ----------------------------------------------------------------------------------------------------------------
# Endpoints


def reply(status, body, *head):
    """The bytes of an HTTP response; the body is bytes, or what JSON can hold."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = [f"HTTP/1.1 {status} said", f"Content-Length: {len(body)}", "Connection: close", *head]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


def said(logprobs=None, **message):
    """A chat completion, as an HTTP response."""
    return reply(200, {"choices": [{"message": {"role": "assistant", **message}, "logprobs": logprobs}]})


def likeliest(*candidates):
    """A chat completion with the log-probabilities of (token, log-probability) at its one token."""
    top = [{"token": token, "logprob": logprob} for token, logprob in candidates]
    return said({"content": [{"token": "?", "logprob": 0.0, "top_logprobs": top}]}, content="?")


def healthy(payload):
    """What a judge says, or a policy, drawn by the question."""
    number = int(common.digest(payload["messages"])[:6], 16)
    top = [{"token": letter, "logprob": -0.1 * (1 + (number >> shift) % 30)} for letter, shift in (("A", 2), ("B", 9))]
    return said({"content": [{**top[0], "top_logprobs": top}]}, content=("A", "B", "tie")[number % 3])


def drip(request, first=b"HTTP/1.1 200 OK\r\n\r\n"):
    """A byte now and then, for ever."""
    for byte in itertools.chain([first], itertools.repeat(b" ", 3000)):
        request.wfile.write(byte)
        time.sleep(0.05)


def flood(request):
    """A body of 300 MB."""
    for part in (b"HTTP/1.1 200 OK\r\n\r\n", *[b"[" * 2**20] * 300):
        request.wfile.write(part)


def reset(request):
    """The connection is torn down."""
    request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    request.connection.close()


SICK = {
    "drip": drip, "drip in the head": lambda request: drip(request, b"HTTP/1.1 200 OK\r\nX:"), "flood": flood,
    "reset": reset, "silence": lambda request: time.sleep(20), "close": b"", "banana": b"banana\r\n\r\n",
    "binary": bytes(range(256)) * 9, "status 9999": reply(9999, {}), "status -1": reply(-1, {}),
    "long head": b"HTTP/1.1 200 OK\r\nX: " + b"x" * 200_000 + b"\r\n\r\n{}",
    "many heads": b"HTTP/1.1 200 OK\r\n" + b"X: x\r\n" * 500 + b"\r\n{}", "100": b"HTTP/1.1 100 Go\r\n\r\n" * 500,
    "chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfffffff\r\n{}",
    "chunk size": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n",
    "length -1": b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n{}", "cut": said(content="A")[:-9],
    "gzip": reply(200, gzip.compress(b"{}"), "Content-Encoding: gzip"), "302": reply(302, {}, "Location: http://x/v1"),
    "307, key": reply(307, {}, f"Location: /{KEY}"), "401, key": reply(401, {"error": {"message": f"wrong: {KEY}"}}),
    "400, key": reply(400, {"message": [KEY]}), "500, key": reply(500, KEY.encode() * 2000),
    "500, key cut": reply(500, b"x " * 140 + KEY.encode()), "200, key": reply(200, {"error": {KEY: KEY}}),
    "reason, key": b"HTTP/1.1 500 " + KEY.encode() + b"\r\n\r\n", "answer, key": said(content=f"my key is {KEY}"),
    "answer, key escaped": said(content="@").replace(b"@", "".join(f"\\u{ord(x):04x}" for x in KEY).encode()),
    "400": reply(400, {"error": "no"}), "404": reply(404, b"<html>"), "500": reply(500, {}),
    "429": reply(429, {}, "Retry-After: 0"), "429, long": reply(429, {}, "Retry-After: 1e9"),
    "429, odd": reply(429, {}, "Retry-After: soon"), "503, NaN": reply(503, {}, "Retry-After: nan"),
    "204": reply(204, b""), "empty": reply(200, b""), "html": reply(200, b"<html>"), "list": reply(200, []),
    "null": reply(200, None), "1": reply(200, 1),
    "NaN": reply(200, b"NaN"), "not UTF-8": reply(200, b'{"choices": [{"message": {"content": "\xff\xfe"}}]}'),
    "half": reply(200, b'{"choices": ['), "deep": reply(200, b"[" * 200_000), "no choices": reply(200, {"choices": []}),
    "deep content": said(content=functools.reduce(lambda inner, _: [inner], range(900))), "no content": said(),
    "choices {}": reply(200, {"choices": {"0": {}}}), "choices [1]": reply(200, {"choices": [1]}),
    "message A": reply(200, {"choices": [{"message": "A"}]}), "content null": said(content=None),
    "content list": said(content=["A"]), "content 1": said(content=1), "content empty": said(content=""),
    "half a pair": said(content="\ud800"), "NUL": said(content="\0"), "chatty": said(content="A or B, I think"),
    "long": said(content="word " * 40_000), "logprobs [1]": said({"content": [1]}), "logprobs 1": said(1, content="?"),
    "logprob text": likeliest(("A", "likely")), "logprob NaN": likeliest(("A", float("nan")), ("B", float("nan"))),
    "logprob huge": likeliest(("A", 1e999)), "logprob null": likeliest(("A", None)), "token 1": likeliest((1, -1)),
    "other letters": likeliest(("C", -0.1)), "logprob digits": likeliest(("A", "1" * 5000)), "none": likeliest(),
}
NAMES = list(SICK)


class Server(http.server.BaseHTTPRequestHandler):
    """Answers POST /TAG/SICKNESS/..., and notes the question under TAG. SICKNESS is "healthy", or a sickness's number
    in SICK, with ".2" if it befalls the first two questions alone."""

    def do_POST(self):
        _, tag, sickness, *_ = self.path.split("/")
        payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.guard, open(self.folder / tag, "a") as file:
            file.write(common.digest(payload) + "\n")
            self.count[tag] = self.count.get(tag, 0) + 1
            number, _, most = sickness.partition(".")
            well = number == "healthy" or most and self.count[tag] > int(most)
        answer = healthy(payload) if well else SICK[NAMES[int(number)]]
        try:
            answer(self) if callable(answer) else self.wfile.write(answer)
        except OSError:
            pass  # the client did not wait

    def log_message(self, *_):
        pass


def serve(world):
    """Start the server in a child, which ends when this process does; gives the child's number."""
    Server.folder, Server.guard, Server.count, parent = world.fresh("asked"), threading.Lock(), {}, os.getpid()
    listener = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    listener.service_actions = lambda: os.getppid() == parent or os._exit(0)  # it is called twice a second
    world.server = f"http://127.0.0.1:{listener.server_port}"
    child = os.fork()
    if not child:
        listener.serve_forever()
    listener.server_close()
    return child


def impatient(work):
    """work() with a key, and with a client that waits only half a second for a server, and not at all to try again."""
    def run():
        pause, begin = time.sleep, endpoint.Endpoint.__init__
        time.sleep = lambda seconds: pause(min(seconds, 0.01))
        endpoint.Endpoint.__init__ = lambda self, *args, **words: begin(self, *args, **{**words, "timeout": 0.5})
        os.environ["OPENAI_API_KEY"] = KEY
        limit_memory()
        work()
    return run


def verdicts(found):
    """{what was judged: verdict} in the files of eval.py or feedback.py label."""
    judged = json.loads(found["out/eval.json"])["aligned"]["verdicts"] if "out/eval.json" in found else []
    labels = [json.loads(line) for line in found.get("out.jsonl", b"").splitlines()]
    return {**{(number, name, pair): worth for number, row in enumerate(judged) for name, pairs in row.items()
               for pair, worth in pairs.items()},
            **{(row["prompt"], row["response_a"], row["response_b"], row["principle"]): row["p_a"] for row in labels}}


def endpoints(world):
    """A sick server costs one line, or is got over; no verdict is invented, and nobody is told the key."""
    def trial(subject, sickness, often):
        right, out = verdicts(undisturbed(world, subject).files) if subject != "align, server" else {}, world.fresh()
        words, _, _ = words_of(world, subject, out, f"{NAMES.index(sickness)}{often}")
        result = forked(impatient(command(words)), 30)
        found = files_in(out, Path.read_bytes)
        told = KEY in result[1] or any(KEY.encode() in content for content in found.values())
        given = verdicts(found) if subject != "align, server" else {}
        invented = [key for key, worth in given.items() if worth is not None and (not often or worth != right[key])]
        return (complaint(result) or ("the key is told" if told else "")
                or (f"{len(invented)} verdicts are invented" if invented else ""))
    cases = list(itertools.product(("align, server", "eval, server", "label, server"), SICK, ("", ".2")))
    world.rng("endpoints").shuffle(cases)
    for subject, sickness, often in cases:
        yield subject, sickness + (", twice" if often else ""), functools.partial(trial, subject, sickness, often)


# ----------------------------------------------------------------------------------------------------------------
# The runner

PARTS = {kills: 5, rows: 2, checkpoints: 1, endpoints: 2, disks: 1.5, stale: 2.5}  # and their shares of the time


def begin(folder, seed):
    """(a World in a folder, which is emptied; the number of the child that is its server)."""
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    torch.set_num_threads(1)  # a process with threads cannot be forked safely
    tqdm.monitor_interval = 0
    tqdm.set_lock(threading.RLock())  # its own is shared with the forks: one that is killed would keep it
    for script in ("train", "ppo"):
        common.code_of(script)  # it takes a while, and is kept
    shutil.rmtree(folder, ignore_errors=True)
    world = World(folder, seed)
    server = serve(world)
    status, output = forked(functools.partial(make_world, folder / "world"))
    if status != 0:
        raise common.UserError(f"{folder}: the tiny world cannot be made: {output[-300:]}")
    return world, server


def end(world, server):
    """Remove what `begin` has made."""
    os.kill(server, signal.SIGKILL)
    os.waitpid(server, 0)
    shutil.rmtree(world.folder)


def run(world, only, minutes):
    """Make the trials of all parts, or of those whose names begin with one of `only`, for so many minutes. Gives
    {part: {subject: [tried, survived]}}, {part: seconds} and the failures, [(name, what went wrong)]."""
    parts = {part: share for part, share in PARTS.items()
             if not only or any(name.split("/")[0] == part.__name__ for name in only)}
    last, counts, spent, failures = time.perf_counter() + 60 * minutes, {}, {}, []
    with tqdm(total=round(60 * minutes), bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}") as bar:
        for place, (part, share) in enumerate(parts.items()):
            began, table = time.perf_counter(), counts.setdefault(part.__name__, {})
            over = began + (last - began) * share / sum(list(parts.values())[place:])
            wanted = {name for name in only if name.split("/")[0] == part.__name__}
            for subject, what, trial in part(world):
                name = f"{part.__name__}/{subject}/{what}"
                if wanted and not any(f"{name}/".startswith(f"{prefix}/") for prefix in wanted):
                    continue
                wrong, count = attempt(trial), table.setdefault(subject, [0, 0])
                count[0], count[1] = count[0] + 1, count[1] + (not wrong)
                failures += [(name, wrong)] if wrong else []
                bar.set_postfix_str(f"{part.__name__}: {sum(tried for tried, _ in table.values())} tried, "
                                    f"{len(failures)} failed in all")
                bar.update(min(round(time.perf_counter() - last + 60 * minutes), bar.total) - bar.n)
                if time.perf_counter() > over or wanted == {name}:
                    break
            spent[part.__name__] = round(time.perf_counter() - began)
    return counts, spent, failures


def attempt(trial):
    """What went wrong in a trial, on one line, or ""."""
    try:
        return " ".join((trial() or "").split())
    except Exception as error:
        return f"{type(error).__name__}: {common.first_line(error)}"


def tell(counts, spent, failures, seed):
    """Print the table and the failures, each with the command that repeats it."""
    for part in (part for part in PARTS if part.__name__ in counts):
        print(f"\n{part.__name__}: {part.__doc__.splitlines()[0]} ({spent[part.__name__]} s)")
        for subject, (tried, survived) in counts[part.__name__].items():
            print(f"    {subject:24}{tried:8} tried{survived:8} survived")
    for name, wrong in failures:
        print(f"\nfailed: {name}: {wrong}\n    python campaign.py --seed {seed} --only {shlex.quote(name)}")
    tried = sum(count[0] for table in counts.values() for count in table.values())
    print(f"\n{tried} tried, {tried - len(failures)} survived, {len(failures)} failed")


def main():
    parser = common.make_parser(__doc__)
    add = parser.add_argument
    add("--out", default="runs/campaign", metavar="FOLDER", help="where campaign.json goes (default %(default)s)")
    add("--only", nargs="+", default=[], metavar="NAME", help="PART, PART/SUBJECT or PART/SUBJECT/TRIAL (default: all)")
    add("--minutes", type=common.number(float, 0, 1e4), default=12.0, help="for all parts together (default 12)")
    add("--seed", type=common.number(int, 0, 2**40), default=0, help="of all that is drawn (default 0)")
    args = parser.parse_args()
    known = [part.__name__ for part in PARTS]
    if unknown := [name for name in args.only if name.split("/")[0] not in known]:
        parser.error(f"--only {unknown[0]}: the parts are {', '.join(known)}")
    world, server = begin(Path(args.out).resolve() / "campaign-scratch", args.seed)
    try:
        counts, spent, failures = run(world, args.only, args.minutes)
    finally:
        end(world, server)
    tell(counts, spent, failures, args.seed)
    found = {"seed": args.seed, "seconds": spent, "tried and survived": counts, "failures": dict(failures)}
    common.write_text(Path(args.out) / "campaign.json", json.dumps(found, indent=1) + "\n")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    common.cli(main)
