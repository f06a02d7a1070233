# ruff: noqa: F811 (fixtures of other tests, under their own names)
"""Many answers: an aligner behind a server, rows shared out between processes, inputs larger than memory."""
import itertools
import json
import os
import threading
import tracemalloc

import pytest

import align
import answers
import checkpoint
import endpoint
import test_align
import test_endpoint
import writers
from common import write_jsonl
from conftest import refused, run, write
from test_align import NEW_TOKENS, command, continuation, read
from test_align_runs import killed

world, in_fp32, aligned = test_align.world, test_align.in_fp32, test_align.aligned  # fixtures
serve = test_endpoint.serve


def completions(world):
    """A script for test_endpoint.Server: the aligner, asked the plain way, by completions and by chats of one message
    with a template that adds nothing."""
    tokenizer, guard = checkpoint.load_tokenizer(world / "aligner"), threading.Lock()

    def script(_, payload):
        chat = "messages" in payload
        prompt = payload["messages"][0]["content"] if chat else payload["prompt"]
        with guard:
            text = continuation(world / "aligner", [0] + tokenizer.encode(prompt).ids, payload["max_tokens"])
        return text if chat else completion(f" {text}\n")
    return script


def completion(text):
    return "raw", json.dumps({"choices": [{"text": text}]}).encode()


def served(world, server, out, *extra, **more):
    words = command(world, out, "--model", server.url, "--model-name", "ours", *extra, **more)
    place = words.index("--device")
    return words[:place] + words[place + 2:]


# ----------------------------------------------------------------------------------------------------------------
# Behind a server


@pytest.mark.parametrize("template", ["plain", "auto"])
def test_a_served_aligner_writes_what_its_folder_does(world, aligned, serve, tmp_path, monkeypatch, template):
    server, out = serve(completions(world)), tmp_path / "out.jsonl"
    words = served(world, server, out, *(["--chat-template", "auto"] if template == "auto" else []))
    assert run(align, monkeypatch, words) == 0
    assert out.read_bytes() == aligned.read_bytes() and [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]
    asked, path = {"plain": ("prompt", "/v1/completions"), "auto": ("messages", "/v1/chat/completions")}[template]
    assert all(payload.keys() == {"model", asked, "max_tokens", "temperature"} for payload in server.requests)
    assert {there for there, _ in server.headers} == {path}
    assert len(server.requests) == 9 and 1 < server.most <= 4, "as many at a time as --batch says"


def test_rounds_and_objectives_reach_a_server(world, serve, tmp_path, monkeypatch):
    server, more = serve(completions(world)), {"objectives": ["Brevity: Be short."]}
    assert run(align, monkeypatch, command(world, tmp_path / "here", "--rounds", 2, "--limit", 4, **more)) == 0
    words = served(world, server, tmp_path / "there", "--rounds", 2, "--limit", 4, **more)
    assert run(align, monkeypatch, words) == 0
    assert (tmp_path / "there").read_bytes() == (tmp_path / "here").read_bytes() and len(server.requests) == 8


def test_a_served_aligner_edits_the_answers_of_a_policy(world, serve, tmp_path, monkeypatch):
    """Of a folder, whose device may be named, and of a server."""
    server = serve(completions(world))
    for number, policy in enumerate((world / "policy", serve("An answer.").url)):
        more = ["--policy", policy, "--limit", 3]
        assert run(align, monkeypatch, command(world, tmp_path / "here", *more, source="prompts.jsonl")) == 0
        words = served(world, server, tmp_path / "there", *more, *(["--device", "cpu"] if not number else []),
                       source="prompts.jsonl")
        assert run(align, monkeypatch, words) == 0
        assert (tmp_path / "there").read_bytes() == (tmp_path / "here").read_bytes()


def test_what_a_server_finds_too_long_is_left_as_it_is(world, aligned, serve, tmp_path, monkeypatch, capsys):
    """In any round; other refusals end the run, and a failure that passes does not."""
    well, expected = completions(world), read(aligned)
    long, seen = expected[2]["original"], []

    def script(number, payload):
        seen.append(payload["prompt"])
        if number == 0:
            return "status", 503, "busy", {}
        if long in payload["prompt"]:
            return "status", 400, '{"error": {"message": "This model\'s maximum context length is 9 tokens"}}', {}
        return well(number, payload)
    monkeypatch.setattr(endpoint.time, "sleep", lambda seconds: None)
    server = serve(script)
    assert run(align, monkeypatch, served(world, server, tmp_path / "out.jsonl")) == 0
    assert "left as they were: 1 answers" in capsys.readouterr().out and len(seen) == 10
    expected[2]["aligned"] = long
    assert read(tmp_path / "out.jsonl") == expected
    server.script = lambda *_: ("status", 404, "no completions here", {})
    refused(align, monkeypatch, capsys, served(world, server, tmp_path / "2.jsonl"), "/v1/completions: HTTP 404")


def test_a_killed_run_asks_a_server_for_the_rest(world, aligned, serve, tmp_path, monkeypatch, capsys):
    server, out = serve(completions(world)), tmp_path / "out.jsonl"
    words = served(world, server, out)
    killed(words, 5)
    server.requests.clear()
    for changed in (["--model-name", "other"], ["--chat-template", "auto"], ["--max-new-tokens", 3]):
        refused(align, monkeypatch, capsys, [*words, *map(str, changed)], "out.jsonl.part", "other settings")
    assert run(align, monkeypatch, words) == 0
    assert out.read_bytes() == aligned.read_bytes() and len(server.requests) == 4


def test_a_server_is_told_how_to_sample(world, serve, tmp_path, monkeypatch):
    server, told = serve(lambda *_: completion("An edit.")), []
    for shard in ("0/2", "1/2"):
        words = served(world, server, tmp_path / "out.jsonl", "--temperature", 0.5, "--top-p", 0.9, "--shard", shard)
        assert run(align, monkeypatch, words) == 0
    told = {payload["prompt"]: payload["seed"] for payload in server.requests}
    assert all((payload["temperature"], payload["top_p"]) == (0.5, 0.9) for payload in server.requests)
    assert len(set(told.values())) == 9
    server.requests.clear()
    words = served(world, server, tmp_path / "out.jsonl", "--temperature", 0.5, "--top-p", 0.9)
    assert run(align, monkeypatch, words) == 0
    assert {payload["prompt"]: payload["seed"] for payload in server.requests} == told, "whole, or in shards"


# ----------------------------------------------------------------------------------------------------------------
# In shards


@pytest.mark.parametrize("extra", [[], ["--temperature", 1, "--policy"]])
def test_shards_joined_are_the_whole(world, tmp_path, monkeypatch, extra):
    source = "prompts.jsonl" if extra else "answers.jsonl"
    extra = [*extra, world / "policy"] if extra else []
    assert run(align, monkeypatch, command(world, tmp_path / "whole", *extra, "--limit", 8, source=source)) == 0
    parts = [tmp_path / f"part-{number}.jsonl" for number in range(3)]
    for number, part in enumerate(parts):
        words = command(world, part, *extra, "--limit", 8, "--shard", f"{number}/3", source=source)
        assert run(align, monkeypatch, words) == 0
    whole, lines = (tmp_path / "whole").read_text().splitlines(), [part.read_text().splitlines() for part in parts]
    assert list(map(len, lines)) == [3, 3, 2] and sorted(sum(lines, [])) == sorted(whole)
    assert [line for row in itertools.zip_longest(*lines) for line in row if line] == whole, "as paste joins them"


def test_a_shard_without_rows_is_an_empty_file(world, tmp_path, monkeypatch, capsys):
    words = command(world, tmp_path / "out.jsonl", "--limit", 2, "--shard", "2/3")
    assert run(align, monkeypatch, words) == 0 and "out.jsonl: 0 answers" in capsys.readouterr().out
    assert (tmp_path / "out.jsonl").read_bytes() == b""


def test_what_does_not_go_together_is_one_line(world, serve, tmp_path, monkeypatch, capsys):
    url = "http://127.0.0.1:9"
    shards = ("3/3", "a/2", "1", "0/0", "-1/2", "1/2/3", "/2", "1.0/2")
    cases = [([f"--shard={word}"], f"--shard: {word} must be I/N") for word in shards] + [
        (["--shard", "0/2", "--out", tmp_path / "out.csv"], "--shard: CSV"),
        (["--shard", "0/2", "--interactive"], "--data is not for --interactive"),
        (["--out", tmp_path / "out.csv.gz"], "--out: CSV is written as it is"),
        (["--policy-model", "ours"], "--policy-model is a policy's behind a server"),
        (["--model-name", "ours"], "--model-name is an aligner's behind a server"),
        (["--model", url], "--model URL needs --model-name"),
        (["--model", url, "--model-name", "a"], "--device is for a folder"),
        (["--model", url, "--model-name", "a", "--temperature", 1, "--top-k", 3], "--top-k is nothing"),
        (["--model", url, "--model-name", "a", "--temperature", 1, "--min-p", 0.1], "--min-p is nothing")]
    for words, said in cases:
        refused(align, monkeypatch, capsys, command(world, tmp_path / "out.jsonl", *words), said)
    for words in (["--shard", "0/2"], ["--policy", "p"], ["--queries", "q"], ["--limit", 3],
                  ["--out", "a.jsonl"]):
        refused(align, monkeypatch, capsys, ["--model", "a", "--interactive", *words], f"{words[0]} is not for --inter")
    words = command(world, tmp_path / "out.jsonl", "--model", url, "--model-name", "a")
    words = [word for word in words if word not in ("--device", "cpu")]
    refused(align, monkeypatch, capsys, words, "no server answers there")


# ----------------------------------------------------------------------------------------------------------------
# Larger than memory


@pytest.mark.parametrize("source", ["answers.jsonl", "prompts.jsonl"])
def test_windows_make_no_difference(world, aligned, tmp_path, monkeypatch, source):
    policy = ["--policy", world / "policy"] if source == "prompts.jsonl" else []
    texts = []
    for size in (answers.WINDOW, 2):
        monkeypatch.setattr(answers, "WINDOW", size)
        assert run(align, monkeypatch, command(world, tmp_path / "out", *policy, source=source)) == 0
        texts.append((tmp_path / "out").read_bytes())
    assert texts[0] == texts[1] and len(texts[0].splitlines()) == 9


class Shouting:
    """An aligner that writes its prompt's last letters, louder; `before` is told how many are asked for together."""
    acceptance = writers.Acceptance()

    def __init__(self, before=lambda count: None):
        self.before = before

    def room(self, new_tokens):
        return new_tokens

    def encode(self, prompt, *_):
        return prompt

    def write(self, prompts, *_, **__):
        self.before(len(prompts))
        yield from ((place, prompt[-NEW_TOKENS:].upper()) for place, prompt in enumerate(prompts))


def shouted(monkeypatch, world, source, out, **aligner):
    monkeypatch.setattr(align, "aligner_of", lambda args: Shouting(**aligner))
    return run(align, monkeypatch, command(world, out, source=source))


def test_no_more_than_a_window_is_in_memory(world, tmp_path, monkeypatch):
    source, held = tmp_path / "in.jsonl", []
    write_jsonl(source, ({"prompt": f"{n} " * 1000, "responses": [{"text": "A."}]} for n in range(1000, 2000)))
    monkeypatch.setattr(answers, "WINDOW", 20)
    tracemalloc.start()
    try:
        assert shouted(monkeypatch, world, source, tmp_path / "out", before=held.append) == 0
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert held == [20] * 50 and len(read(tmp_path / "out")) == 1000
    assert peak < source.stat().st_size / 5, "of some 5 MB"


def test_a_file_that_changes_meanwhile_is_an_error(world, tmp_path, monkeypatch, capsys):
    rows = [{"prompt": "a", "responses": [{"text": text}]} for text in ("one", "two")]
    source = write(tmp_path / "in.jsonl", *rows)
    assert shouted(monkeypatch, world, source, tmp_path / "out", before=lambda _: write(source, rows[1], rows[0])) == 2
    assert "has changed since the edits began" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_what_comes_through_a_pipe_is_read_once(world, aligned, tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_bytes((world / "answers.jsonl").read_bytes()))
    writer.start()
    assert run(align, monkeypatch, command(world, tmp_path / "out", source=tmp_path / "pipe")) == 0
    writer.join()
    assert (tmp_path / "out").read_bytes() == aligned.read_bytes()


def test_edits_that_are_empty_are_counted(world, tmp_path, monkeypatch, capsys):
    """But for those of answers that are empty, too."""
    source = tmp_path / "in.jsonl"
    write_jsonl(source, ({"prompt": f"q{n}", "responses": [{"text": text}]} for n, text in enumerate(["A.", "", "B."])))
    monkeypatch.setattr(Shouting, "write", lambda self, prompts, *_, **__: ((i, "") for i in range(len(prompts))))
    assert shouted(monkeypatch, world, source, tmp_path / "out", before=lambda count: None) == 0
    assert "empty: 2 edits, of answers that are not" in capsys.readouterr().out
