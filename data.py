"""Data: what answers are judged by, the files they come in, and the examples an aligner learns from.

From top to bottom: errors and command lines; objectives; files of many formats, all read as *rated rows*;
their reformulation into prompt/completion examples (MetaAligner); token ids; the command line.

A rated row is {"prompt": text, "responses": [{"text", "scores": {objective: number}}, ...], "golden"?: text}.
"""

import argparse
import bisect
import csv
import difflib
import errno
import functools
import gzip
import itertools
import json
import os
import random
import re
import sys
import zlib
from array import array
from collections import Counter
from dataclasses import dataclass
from pathlib import Path


# ---------------------------------------------------------------------------------- errors and command lines

class UserError(Exception):
    """Something the user can put right. The message says what, where and what to do, in one line."""


def cli(main):
    """Run a script's main(). What the user or the machine is to blame for becomes one line and status 2."""
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        stop(str(error))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # silences Python's last flush
        stop("what read this command's output closed it; the output is incomplete")
    except OSError as error:
        hint = "free some space" if error.errno == errno.ENOSPC else "check the path and its permissions"
        stop(f"{error.filename}: {error.strerror}; {hint}" if error.filename else f"{error}; {hint}")
    except KeyboardInterrupt:
        stop("interrupted", status=130)


def stop(message, status=2):
    print("error: " + " ".join(message.splitlines()), file=sys.stderr)
    sys.exit(status)


# ------------------------------------------------------------------------------------------------ objectives

@dataclass(frozen=True)
class Objective:
    """What a response is judged by: a name to report it under, and the text that the aligner reads."""

    name: str
    description: str

    def __str__(self):
        return f"{self.name}: {self.description}"


DESCRIPTIONS = {
    # the nine that the paper trains on: of HH-RLHF, UltraFeedback and IMHI
    "harmless": "The response should not hurt, insult or endanger anyone, nor help somebody to do so",
    "helpful": "The response should give the user what they need to get their task done",
    "humour": "The response should be funny and make the user smile",
    "instruction_following": "The response should do all that the instruction asks, in the form asked for",
    "honest": "The response should say how sure it is and admit what it does not know",
    "truthful": "The response should state only things that are true and agree with the given text",
    "correct": "The response should come to the right conclusion",
    "informative": "The response should give the evidence and the reasons for its conclusion",
    "professional": "The response should be consistent, well grounded and worded as an expert would",
    # the six that the paper's aligners meet only at test time
    "specific": "The response should speak of concrete details instead of generalities",
    "factual": "The response should rest on facts that can be checked",
    "readable": "The response should be well ordered and easy to read",
    "fair": "The response should treat all people and groups alike, without prejudice",
    "repetition": "The response should say nothing twice",
    "length": "The response should be as short as its content allows",
}
OBJECTIVES = {name: Objective(name, description) for name, description in DESCRIPTIONS.items()}


def plain_name(name):
    return re.sub(r"[\s_-]+", "_", name.strip().lower())


def find_objectives(wanted, known=OBJECTIVES):
    """Objectives from what a user wrote: a list in that order, each once.

    wanted: texts, each a known name (case, "-", " " and "_" make no difference), "Name: description", or the
    path of a JSON file {"name": "description", ...} or [{"name": ..., "description": ...}, ...].
    Raises UserError for anything else, naming the known objectives that are nearest.
    """
    by_name = {plain_name(name): objective for name, objective in known.items()}
    found = {}
    for item in wanted:
        if plain_name(item) in by_name:
            new = [by_name[plain_name(item)]]
        elif item.endswith(".json"):
            new = read_objectives(item)
        elif ":" in item:
            new = [make_objective(*item.split(":", 1), where=repr(item))]
        else:
            raise UserError(f"unknown objective {item!r}; {nearest(item, known)}"
                            'give a known name or "Name: what a response should do"')
        for objective in new:
            if found.setdefault(objective.name, objective) != objective:
                raise UserError(f"objective {objective.name!r} has two different descriptions; leave one out")
    return list(found.values())


def make_objective(name, description, where):
    if not all(isinstance(text, str) and text.strip() for text in (name, description)):
        raise UserError(f"{where}: an objective needs a name and a description, texts that are not empty")
    return Objective(name.strip(), description.strip())


def read_objectives(path):
    content = read_json(path)
    if isinstance(content, dict):
        content = [{"name": name, "description": description} for name, description in content.items()]
    if not isinstance(content, list) or not all(isinstance(item, dict) for item in content):
        raise UserError(f'{path}: not objectives; write {{"name": "description", ...}} into it')
    return [make_objective(item.get("name"), item.get("description"), f"{path}: objective {number}")
            for number, item in enumerate(content, 1)]


def nearest(name, known):
    by_name = {plain_name(key): key for key in known}
    close = difflib.get_close_matches(plain_name(name), by_name, n=3, cutoff=0.5)
    return f"the nearest known: {', '.join(by_name[key] for key in close)}; " if close else ""


# --------------------------------------------------------------------------------- files: lines and records

def lines(path):
    """Yield (line number, text) of a UTF-8 file, gzipped or not (its first bytes tell). Raises UserError."""
    number = 0
    try:
        with open(path, "rb") as raw:
            stream = gzip.open(raw) if raw.peek(2)[:2] == b"\x1f\x8b" else raw
            for number, line in enumerate(stream, 1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{number}: byte {error.start + 1} of the line is not UTF-8; "
                        "convert the file to UTF-8") from None
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise UserError(f"{path}: the gzip data is damaged or cut off after line {number}; "
                        "get the file again") from None
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check the path") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; give a file in it") from None


def parse_json(text, path, line=None):
    """The value of a JSON text, which is a line of a file or (None) all of it. Raises UserError."""
    try:
        value = json.loads(text)
        if "\\ud" in text.lower():  # half of a surrogate pair is no character: it becomes U+FFFD
            halves = json.dumps(value, ensure_ascii=False).encode("utf-16", "surrogatepass")
            value = json.loads(halves.decode("utf-16", "replace"))
        return value
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{line or error.lineno}: invalid JSON at column {error.colno} ({error.msg}); "
                        "mend or remove the line") from None
    except (RecursionError, ValueError):
        raise UserError(f"{path}:{line or 1}: JSON too deep or with a number too long; remove it") from None


def read_json(path):
    return parse_json("".join(text for _, text in lines(path)), path)


def first_and_all(iterator, path):
    """(the first item, an iterator over all of them); UserError if there is none."""
    for first in iterator:
        return first, itertools.chain([first], iterator)
    raise UserError(f"{path}: no data in it; give a file that is not empty")


def records(path):
    """Yield (where, dict) for each record of a JSON Lines file, a JSON list or a CSV file, told by content.

    where: "path:line", for messages. Raises UserError for a file that is broken.
    """
    first, source = first_and_all(((number, text) for number, text in lines(path) if text.strip()), path)
    mark = first[1].lstrip()[0]
    if mark not in "{[":
        yield from csv_records(path)
        return
    if mark == "{":
        located = ((f"{path}:{number}", parse_json(text, path, number)) for number, text in source)
    else:
        items = enumerate(read_json(path), 1)
        located = ((f"{path}: item {number}", item) for number, item in items)
    for where, record in located:
        if not isinstance(record, dict):
            raise UserError(f"{where}: expected an object {{...}}, found {kind(record)}; mend or remove it")
        yield where, record


def csv_records(path):
    csv.field_size_limit(sys.maxsize)  # by default, an answer of more than 131,072 characters is refused
    escape = "\\" if escapes_backslashes(path) else None
    reader = csv.reader((text for _, text in lines(path)), escapechar=escape, strict=True)
    header, line = None, 1
    try:
        for cells in reader:
            if header is None:
                header = cells
            elif cells and len(cells) != len(header):
                raise UserError(f"{path}:{line}: {len(cells)} cells, but the header ({shorten(header)}) has "
                                f"{len(header)}; mend the row (is a quote missing?)")
            elif cells:
                yield f"{path}:{line}", dict(zip(header, cells))
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}:{line}: invalid CSV ({error}); mend the row that begins there") from None


def escapes_backslashes(path):
    r"""Whether a CSV file was written with the backslash as escape character (pandas: escapechar="\\").

    Then each one in a cell stands there twice. Some of MetaAligner's published outputs were written without:
    a single "\_" or "\(" gives them away, and to unescape them would change their text or break their rows.
    """
    single = re.compile(r'(?<!\\)(?:\\\\)*\\(?![\\"])')
    return not any("\\" in text and single.search(text) for _, text in lines(path))


def kind(value):
    names = {str: "a text", dict: "an object", list: "a list", type(None): "nothing"}
    return names.get(type(value), repr(value))


def shorten(names, limit=100):
    text = ", ".join(str(name) for name in names)
    return text if len(text) <= limit else text[:limit] + "..."


def field(record, key, where, wanted=str):
    """record[key], if it is there and of the wanted type; else UserError."""
    value = record.get(key)
    if not isinstance(value, wanted):
        wanted = kind(wanted())
        raise UserError(f"{where}: {key!r} should be {wanted}, found {kind(value)}; mend or remove it")
    return value


def objects(record, key, where):
    """record[key], if it is a list of objects; else UserError."""
    value = field(record, key, where, list)
    for item in value:
        if not isinstance(item, dict):
            raise UserError(f"{where}: {key!r} should hold objects, found {kind(item)}; mend or remove it")
    return value


# ---------------------------------------------------------------------------------------- files: rated rows

ASSISTANT = "\n\nAssistant:"


def read_rated(path, objective=None, queries=None, skipped=None):
    """Yield the rated rows of a file in any of FORMATS, told apart by its first record.

    objective: the name of what "chosen" is better at, for files of pairs. HH-RLHF's tell it by their own name
        or their folder's (harmless-base/train.jsonl.gz, helpful-online.test.jsonl).
    queries: file with the "query" column, for MetaAligner outputs that have none (IMHI), joined row by row;
        by default the file in the same folder that is called queries plus the same ending.
    skipped: a Counter, told how many rows were left out and why. These are HH-RLHF pairs whose dialogues
        differ before the last assistant turn (5 of 2,312 in harmless-base's test set): the two last answers
        are to different questions.
    Raises UserError, with file and line, for whatever cannot be read.
    """
    for _, row in located_rated(path, objective, queries, skipped):
        yield row


def located_rated(path, objective=None, queries=None, skipped=None):
    """read_rated, as pairs (where, row)."""
    (where, record), source = first_and_all(records(path), path)
    columns = set(record)
    if "generated_text" in columns and "query" not in columns:
        source = with_queries(path, source, queries)
        columns.add("query")
    if {"prompt", "completion"} <= columns:
        raise UserError(f"{where}: these are examples already (prompt, completion); give the data rated")
    convert = next((convert for _, keys, convert in FORMATS if keys <= columns), None)
    if convert is None:
        known = "; ".join(f"{name} ({', '.join(sorted(keys))})" for name, keys, _ in FORMATS)
        raise UserError(f"{where}: no known format has {shorten(record)}; give one of: {known}")
    if convert is from_pair:
        objective = objective or objective_of_path(path)
    for where, record in source:
        row = convert(record, where, objective)
        if row is not None:
            yield where, row
        elif skipped is not None:
            skipped["the two dialogues differ before the last answer"] += 1


def objective_of_path(path):
    for name in (Path(path).name, Path(path).resolve().parent.name):
        match = re.match(r"(harmless|helpful)(?![a-z])", name)
        if match:
            return match[1]
    raise UserError(f"{path}: says which answer is better, but not at what; give --objective NAME")


def with_queries(path, source, queries):
    path = Path(path)
    beside = [file for file in path.parent.glob("queries*") if path.name.endswith(file.name[len("queries"):])]
    queries = queries or max(beside, key=lambda file: len(file.name), default=None)
    if queries is None:
        raise UserError(f"{path}: has no column 'query'; give the file that has it with --queries FILE")
    answers, asked = list(source), list(records(queries))
    if len(answers) != len(asked):
        raise UserError(f"{path}: has {len(answers):,} rows, but {queries} has {len(asked):,}; "
                        "give the queries that belong to it")
    for (where, answer), (where_asked, query) in zip(answers, asked):
        yield where, {**answer, "query": field(query, "query", where_asked)}


def rated_row(record, prompt, responses, golden=None):
    extra = {"golden": golden} if isinstance(golden, str) else {}
    if isinstance(record.get("objectives"), list):
        extra["objectives"] = record["objectives"]
    return {"prompt": prompt, "responses": responses, **extra}


def from_rated(record, where, _):
    responses = []
    for response in objects(record, "responses", where):
        scores = field({"scores": {}, **response}, "scores", where, dict)
        responses.append({"text": field(response, "text", where), "scores": present(scores, where)})
    return rated_row(record, field(record, "prompt", where), responses, record.get("golden"))


def present(scores, where):
    """The scores that are there: null and NaN say nothing. Raises UserError for what is not a number."""
    scores = {name: score for name, score in scores.items() if score is not None and score == score}
    for name, score in scores.items():
        if type(score) not in (int, float) or not -1e300 < score < 1e300:
            raise UserError(f"{where}: the score {name!r} is {shorten([repr(score)])}, not a number; "
                            "mend it or leave it out")
    return scores


RATINGS = {"honesty": "honest", "truthfulness": "truthful", "helpfulness": "helpful"}


def from_ultrafeedback(record, where, _):
    """UltraFeedback's release. A rating that is N/A is left out; golden has the highest sum of ratings."""
    responses = []
    for completion in objects(record, "completions", where):
        scores = {}
        for name, annotation in field(completion, "annotations", where, dict).items():
            rating = annotation.get("Rating") if isinstance(annotation, dict) else annotation
            try:
                scores[RATINGS.get(name, name)] = None if rating in (None, "N/A", "") else float(rating)
            except (TypeError, ValueError):
                raise UserError(f"{where}: the rating {rating!r} is no number; mend or remove it") from None
        responses.append({"text": field(completion, "response", where), "scores": present(scores, where)})
    golden = best_rated(responses)
    return rated_row(record, field(record, "instruction", where), responses, golden and golden["text"])


def best_rated(responses):
    """The response with the highest sum of scores, the first of several such; None if none has any."""
    scored = [response for response in responses if response["scores"]]
    return max(scored, key=lambda response: sum(response["scores"].values()), default=None)


def from_pair(record, where, objective):
    """Pairs: chosen and rejected answers to a prompt (TRL), or dialogues (HH-RLHF), None if those differ."""
    if "prompt" in record:
        prompt = prompt_text(record, "prompt", where)
        answers = [answer_text(record, key, where) for key in ("chosen", "rejected")]
    else:
        dialogues = [dialogue_text(record, key, where) for key in ("chosen", "rejected")]
        parts = [text.rpartition(ASSISTANT) for text in dialogues]
        if not parts[0][1] or parts[0][0] != parts[1][0]:
            return None
        prompt = parts[0][0] + ASSISTANT
        answers = [answer.strip() for _, _, answer in parts]
    return rated_row(record, prompt, [{"text": answers[0], "scores": {objective: 1}},
                                      {"text": answers[1], "scores": {objective: 0}}])


def dialogue_text(record, key, where):
    """A text as it is; a list of chat messages as a dialogue in HH-RLHF's form."""
    if isinstance(record.get(key), str):
        return record[key]
    speakers = {"user": "Human", "assistant": "Assistant", "system": "System"}
    turns = [(field(message, "role", where), field(message, "content", where))
             for message in objects(record, key, where)]
    if not turns or any(role not in speakers for role, _ in turns):
        raise UserError(f"{where}: {key!r} should have messages by {', '.join(speakers)}; mend or remove it")
    return "".join(f"\n\n{speakers[role]}: {content}" for role, content in turns)


def prompt_text(record, key, where):
    return dialogue_text(record, key, where) + ASSISTANT * isinstance(record[key], list)


def answer_text(record, key, where):
    text = dialogue_text(record, key, where)
    return record[key][-1]["content"] if isinstance(record[key], list) else text


def unrated(prompt_key, answer_key=None, golden_key="golden"):
    """A converter for files with one answer or none to a prompt, and no scores."""
    def convert(record, where, _):
        answers = [{"text": field(record, answer_key, where), "scores": {}}] if answer_key else []
        return rated_row(record, prompt_text(record, prompt_key, where), answers, record.get(golden_key))
    return convert


FORMATS = [  # name, the keys or columns that tell it, what makes a rated row of a record
    ("rated", {"prompt", "responses"}, from_rated),
    ("UltraFeedback", {"instruction", "completions"}, from_ultrafeedback),
    ("HH-RLHF or TRL pairs", {"chosen", "rejected"}, from_pair),
    ("AlpacaEval outputs", {"instruction", "output"}, unrated("instruction", "output")),
    ("MetaAligner outputs", {"query", "generated_text"}, unrated("query", "generated_text", "goldens")),
    ("prompts", {"prompt"}, unrated("prompt")),
    ("queries", {"query"}, unrated("query", golden_key="goldens")),
]


# --------------------------------------------------------------------------- files: examples, texts, writing

def read_pairs(path):
    """Yield examples {"prompt", "completion", ...} of a file by reformulate, or any in that form of TRL's.

    A row's other keys (such as "relation" and "context") are kept. Raises UserError, with file and line.
    """
    _, source = first_and_all(records(path), path)
    for where, row in source:
        if not {"prompt", "completion"} <= set(row):
            raise UserError(f"{where}: no prompt and completion, but {shorten(row)}; make examples with "
                            "`python data.py reformulate FILE --out pairs.jsonl`")
        prompt, completion = prompt_text(row, "prompt", where), answer_text(row, "completion", where)
        for key in {"context", "answer"} & set(row):
            span = field(row, key, where, list)
            if [type(place) for place in span] != [int, int] or not 0 <= span[0] <= span[1] <= len(prompt):
                raise UserError(f"{where}: {key!r} should be [start, end] in the prompt; mend or remove it")
        yield {**row, "prompt": prompt, "completion": completion}


def read_completions(path):
    """Yield {"prompt", "completion", ...} to fine-tune on: as read_pairs, or the best-rated answers."""
    (_, record), _ = first_and_all(records(path), path)
    if "completion" in record:
        yield from read_pairs(path)
        return
    for row in read_rated(path, objective="chosen"):
        best = best_rated(row["responses"])
        if best is not None and best["text"].strip():
            yield {"prompt": row["prompt"], "completion": best["text"]}


def read_preferences(path, principle=None):
    """Yield {"prompt", "response_a", "response_b", "principle", "p_a"}: pairs of responses and the probability that the
    first is the better one on a principle (None: whatever the file's rows say, and with them, which).

    Files: what `reward.py label` writes; AlpacaEval's annotated outputs (a model's against the reference); pairs judged
    by people (Auto-J); HH-RLHF's or TRL's pairs; rated rows, every two responses of which are compared on a score.
    """
    (_, first), source = first_and_all(records(path), path)
    convert = next((convert for keys, convert in PREFERENCES if keys <= set(first)), None)
    for where, row in source if convert else ():
        for pair in convert(row, where):
            if principle in (None, pair["principle"]) or pair["principle"] == "overall" and "principle" not in row:
                yield pair
    for row in read_rated(path, objective=principle or "overall") if not convert else ():
        for a, b in itertools.combinations(row["responses"], 2):
            for name in a["scores"].keys() & b["scores"].keys():
                if principle in (None, name):
                    difference = a["scores"][name] - b["scores"][name]
                    p_a = (difference > 0) + 0.5 * (difference == 0)
                    yield preference(row["prompt"], a["text"], b["text"], name, p_a)


def preference(prompt, response_a, response_b, principle, p_a):
    return {"prompt": prompt, "response_a": response_a, "response_b": response_b, "principle": principle, "p_a": p_a}


def from_label(record, where):
    texts = [field(record, key, where) for key in ("prompt", "response_a", "response_b")]
    p_a = record["p_a"]
    if type(p_a) not in (int, float) or not 0 <= p_a <= 1:
        raise UserError(f"{where}: 'p_a' is {p_a!r}, not a probability; mend or remove the row")
    yield preference(*texts, record.get("principle", "overall"), p_a)


def from_alpaca_eval(record, where):
    """Each model's response against the reference, by GPT-4-turbo's probability of preferring it."""
    for response in field(record, "responses", where, dict).values():
        p_a = response.get("gpt4_preference_over_reference") if isinstance(response, dict) else None
        if p_a is None:
            raise UserError(f"{where}: a response without 'gpt4_preference_over_reference'; mend or remove it")
        row = {"prompt": record["prompt"], "response_a": response["text"], "response_b": record["reference"], "p_a": p_a}
        yield from from_label(row, where)


def from_auto_j(record, where):
    """Label 0: people preferred the first; 1: the second; 2: neither."""
    texts = [field(record, key, where) for key in ("prompt", "response 1", "response 2")]
    if record["label"] not in (0, 1, 2):
        raise UserError(f"{where}: 'label' is {record['label']!r}, not 0, 1 or 2; mend or remove the row")
    yield preference(*texts, "overall", (1.0, 0.0, 0.5)[record["label"]])


PREFERENCES = [  # the keys that tell a format, what makes rows of a record
    ({"response_a", "response_b", "p_a"}, from_label),
    ({"reference", "responses"}, from_alpaca_eval),
    ({"response 1", "response 2", "label"}, from_auto_j),
]


def read_texts(path):
    """Yield texts to pretrain on: "text" of JSON Lines, or plain text's paragraphs, between blank lines."""
    first, source = first_and_all(lines(path), path)
    if first[1].lstrip()[:1] in ("{", "["):
        for where, record in records(path):
            yield field(record, "text", where)
        return
    for blank, group in itertools.groupby((text for _, text in source), key=lambda text: not text.strip()):
        if not blank:
            yield "".join(group).strip()


def write_whole(path, write):
    """Call write(aside) and then rename aside to path: a reader never sees half a file, and after any error what was
    there before is still there, and nothing else."""
    path, aside = Path(path), Path(f"{path}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        aside.touch()
        mode = aside.stat().st_mode
        write(aside)
        aside.chmod(mode)  # safetensors makes files that nobody else may read
        os.replace(aside, path)
    except BaseException as error:
        aside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # a full disk does not say which file
            error.filename = str(path)
        raise


def write_jsonl(path, rows):
    """Write rows as JSON Lines, gzipped if the path ends in .gz; returns how many."""
    path, count = Path(path), 0
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: is no ordinary file; choose another --out")

    def write(aside):
        nonlocal count
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(aside, "wt", encoding="utf-8", errors="replace", newline="\n") as file:
            for count, row in enumerate(rows, 1):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    write_whole(path, write)
    return count


# --------------------------------------------------------------------------- dynamic objectives reformulation

TEMPLATE = {
    "better": "Improve the answer on these objectives: {objectives}\n\n"
              "Question: {prompt}\n\nAnswer: {answer}\n\nEdited answer:",
    "equal": "Keep the answer equal on these objectives: {objectives}\n\n"
             "Question: {prompt}\n\nAnswer: {answer}\n\nEdited answer:",
}


@functools.lru_cache
def split_template(text):
    """The four texts around a template's three placeholders. Raises ValueError if these are wrong."""
    parts = re.split(r"\{(objectives|prompt|answer)\}", text)
    if parts[1::2] != ["objectives", "prompt", "answer"]:
        raise ValueError("needs {objectives}, {prompt} and {answer}, once each and in this order; mend it")
    return parts[0], parts[2], parts[4], parts[6].rstrip(" ")  # tokenizers join a last space to the next word


def read_template(path):
    """A prompt template from a JSON file {"better": text, "equal"?: text}. Raises UserError."""
    content = read_json(path)
    if not isinstance(content, dict) or "better" not in content or set(content) - set(TEMPLATE):
        raise UserError(f'{path}: no template; write {{"better": "...", "equal": "..."}} into it')
    for relation in content:
        try:
            split_template(field(content, relation, path))
        except ValueError as error:
            raise UserError(f"{path}: {relation!r} {error}") from None
    return {**TEMPLATE, **content}


def aligner_prompt(prompt, answer, objectives, relation="better", template=TEMPLATE):
    """What an aligner reads before it writes the edited answer: (text, [start, end] of the prompt in it).

    It is told the objectives' descriptions, not their names, in the given order.
    """
    instruction, question, draft, ending = split_template(template[relation])
    prompt = prompt.strip()
    before = instruction + "; ".join([objective.description for objective in objectives]) + question
    return f"{before}{prompt}{draft}{answer}{ending}", [len(before), len(before) + len(prompt)]


def compare(first, second, margin=0.0):
    """Of two dicts of scores: the names on which the first is better, worse, equal (at most margin apart).

    A name that either lacks is in none of the three.
    """
    better, worse, equal = [], [], []
    for name, score in first.items():
        if name in second:
            difference = score - second[name]
            (better if difference > margin else worse if -difference > margin else equal).append(name)
    return better, worse, equal


def reformulate(rated, objectives, seed=0, margin=0.0, template=TEMPLATE, skipped=None):
    """Yield the examples of rated rows (MetaAligner's dynamic objectives reformulation), the same for a seed.

    For each two responses to a prompt, up to three: the second edited into the first, prompted with all the
    objectives on which the first is better; the first edited into the second, with all those on which the
    second is better; and the second edited into the first, to stay equal on those on which they are.
    rated: rows as read_rated yields them. objectives: Objectives, a list or a dict by name; scores on others
        do not count. margin: a score is better if it is higher by more than this.
    skipped: a Counter, told of what was left out: examples with an empty target, and "better" ones whose two
        answers are the same text.
    Yields {"prompt", "completion", "objectives": [names], "relation": "better" or "equal",
        "context" and "answer": [start, end] of the row's prompt and of the edited answer in the prompt}.
    """
    values = objectives.values() if isinstance(objectives, dict) else objectives
    by_name = {objective.name: objective for objective in values}
    skipped = Counter() if skipped is None else skipped
    generator = random.Random(seed)
    for row in rated:
        answers = [(response["text"], {name: score for name, score in response["scores"].items()
                                       if name in by_name and score is not None and score == score})
                   for response in row["responses"]]
        for (first, first_scores), (second, second_scores) in itertools.combinations(answers, 2):
            better, worse, equal = compare(first_scores, second_scores, margin)
            directions = [(second, first, better, "better"), (first, second, worse, "better"),
                          (second, first, equal, "equal")]
            for source, target, names, relation in directions:
                if names and not target.strip():
                    skipped["the target is empty"] += 1
                elif names and relation == "better" and source == target:
                    skipped["the better and the worse answer are the same"] += 1
                elif names:
                    generator.shuffle(names)
                    told = [by_name[name] for name in names]
                    yield make_example(row["prompt"], source, target, told, relation, template)


def make_example(prompt, source, target, objectives, relation, template):
    text, context = aligner_prompt(prompt, source, objectives, relation, template)
    begin = context[1] + len(split_template(template[relation])[2])
    return {"prompt": text, "completion": target, "objectives": [objective.name for objective in objectives],
            "relation": relation, "context": context, "answer": [begin, begin + len(source)]}


def held_out(row, share, seed=0):
    """Whether an example is in the share (0 to 1) kept for validation: with a prompt, all its examples."""
    start, end = row.get("context", (0, None))
    text = row["prompt"][start:end] or row["completion"]
    return zlib.crc32(f"{seed} {text}".encode("utf-8", "replace")) < share * 2**32


# -------------------------------------------------------------------------------------------------- token ids

TURN = re.compile(r"\n\n(?=(?:Human|Assistant): *\S)")
PIECE = re.compile(r"\S{1,20}")


def text_ids(tokenizer, texts):
    """The ids of each text by a `tokenizers` Tokenizer: none added, none cut; a "</s>" in a text is text."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def encode_prompt(tokenizer, prompt, bos_id, max_tokens=None, context=None):
    """The ids of a prompt, after BOS (or None): the very ids that training puts before a completion.

    If there are more than max_tokens, the context ([start, end] in the prompt) loses its oldest turns, then
    the oldest words of its last turn. Returns None if the rest alone is too long.
    """
    begin = [] if bos_id is None else [bos_id]
    ids = begin + text_ids(tokenizer, [prompt])[0]
    if max_tokens is None or len(ids) <= max_tokens:
        return ids
    start, end = context or (0, 0)
    cuts = [match.end() for match in TURN.finditer(prompt, start, end)]
    cuts += [match.start() for match in PIECE.finditer(prompt, max([start, *cuts]) + 1, end)]

    def without(cut):
        return begin + text_ids(tokenizer, [prompt[:start] + prompt[cut:]])[0]

    if not cuts or len(without(cuts[-1])) > max_tokens:
        return None
    first = bisect.bisect_left(cuts, True, key=lambda cut: len(without(cut)) <= max_tokens)
    return without(cuts[first])


def encode_pair(tokenizer, prompt, completion, bos_id, eos_id, max_tokens=None, context=None):
    """(ids, n_prompt): BOS, the prompt's ids, the completion's ids, EOS; or None if they are over max_tokens.

    The two are encoded apart: ids[:n_prompt] is what encode_prompt gives at generation, and the ids after it
    decode to the completion. Too long ones lose the oldest turns of their context, and nothing else.
    """
    row = {"prompt": prompt, "completion": completion, "context": context}
    return encode_rows(tokenizer, [row], bos_id, eos_id, max_tokens)[0]


def encode_rows(tokenizer, rows, bos_id, eos_id, max_tokens):
    prompts = text_ids(tokenizer, [row["prompt"] for row in rows])
    completions = text_ids(tokenizer, [row["completion"] for row in rows])
    begin, end = ([] if token is None else [token] for token in (bos_id, eos_id))
    encoded = []
    for row, prompt, completion in zip(rows, prompts, completions):
        prompt, completion = begin + prompt, completion + end
        if max_tokens is not None and len(prompt) + len(completion) > max_tokens:
            room = max_tokens - len(completion)
            prompt = encode_prompt(tokenizer, row["prompt"], bos_id, room, row.get("context"))
        encoded.append(None if prompt is None else (prompt + completion, len(prompt)))
    return encoded


def encode_preferences(tokenizer, rows, bos_id, eos_id, max_tokens):
    """Of rows of read_preferences: (ids of prompt and response_a, then those of prompt and response_b; how many are the
    first's; p_a), or None where one of them is over max_tokens."""
    sides = [encode_rows(tokenizer, [{**row, "completion": row[side]} for row in rows], bos_id, eos_id, max_tokens)
             for side in ("response_a", "response_b")]
    return [a and b and (a[0] + b[0], len(a[0]), row["p_a"]) for a, b, row in zip(*sides, rows)]


def encode_pairs(tokenizer, rows, bos_id, eos_id, max_tokens=None):
    """encode_pair of rows {"prompt", "completion", "context"?}: (list of (ids, n_prompt), number dropped); of rows of
    read_preferences, encode_preferences.

    The ids are arrays of 4 bytes each: as lists, UltraFeedback's would take tens of gigabytes.
    """
    from tqdm import tqdm
    rows, kept, dropped = iter(rows), [], 0
    with tqdm(desc="tokenise", unit=" examples", delay=2, disable=None) as bar:
        while chunk := list(itertools.islice(rows, 1000)):
            encode = encode_preferences if "p_a" in chunk[0] else encode_rows
            encoded = encode(tokenizer, chunk, bos_id, eos_id, max_tokens)
            kept += [(array("i", pair[0]), *pair[1:]) for pair in encoded if pair is not None]
            dropped += encoded.count(None)
            bar.update(len(chunk))
    return kept, dropped


# ----------------------------------------------------------------------------------------------- command line

def run_reformulate(options):
    """Rated files in, one file of examples out, and a table of what it has."""
    from tqdm import tqdm
    if options.out in options.files:
        raise UserError(f"{options.out}: is an input too; choose another --out")
    if not options.margin >= 0:
        raise UserError(f"--margin {options.margin}: give zero or more")
    pairs_on = find_objectives([options.objective] if options.objective else [])
    wanted = find_objectives(options.objectives) if options.objectives else [*OBJECTIVES.values(), *pairs_on]
    template = read_template(options.template) if options.template else TEMPLATE
    made, scored, skipped = Counter(), Counter(), Counter()

    def rated():
        known = {objective.name: objective for objective in wanted}
        for file in options.files:
            chosen_at = pairs_on[0].name if pairs_on else None
            for where, row in located_rated(file, chosen_at, options.queries, skipped):
                names = {name for response in row["responses"] for name in response["scores"]}
                for name in sorted(names - set(known)) if not options.objectives else ():
                    raise UserError(f"{where}: scores an unknown objective {name!r}; {nearest(name, known)}"
                                    "say with --objectives which ones to use, and describe new ones there")
                scored.update(names)
                yield row

    def examples():
        bar = tqdm(rated(), desc="reformulate", unit=" rows", disable=None)
        for example in reformulate(bar, wanted, options.seed, options.margin, template, skipped):
            made[example["relation"], len(example["objectives"])] += 1
            yield example
        if not made:
            raise UserError(f"{options.files[0]}: gives no example (scored: {shorten(scored) or 'nothing'}); "
                            "give prompts with two answers or more, scored on the objectives asked for")

    count = write_jsonl(options.out, examples())
    print(f"{options.out}: {count:,} examples, by how many objectives they ask for")
    print_table(made, skipped)


def print_table(made, skipped):
    sizes = sorted({size for _, size in made})
    print(" " * 8 + "".join(f"{size:>11}" for size in [*sizes, "all"]))
    for relation in TEMPLATE:
        counts = [made[relation, size] for size in sizes]
        print(f"{relation:8}" + "".join(f"{count:>11,}" for count in [*counts, sum(counts)]))
    for reason, count in skipped.items():
        print(f"left out: {count:,} because {reason}")


def run_show(options):
    """Print the first records of any file that this module reads."""
    (_, record), _ = first_and_all(records(options.file), options.file)
    read = read_pairs if "completion" in record else functools.partial(read_rated, objective="chosen")
    for number, row in enumerate(itertools.islice(read(options.file), options.number), 1):
        for place, response in enumerate(row.pop("responses", []), 1):
            scores = ", ".join(f"{name} {score:g}" for name, score in response["scores"].items())
            row[f"response {place}: {scores or 'no scores'}"] = response["text"]
        for key, value in row.items():
            print(f"--- {number}. {key}\n{printable(value)}")


def printable(value, limit=2000):
    """Text for a terminal: no control characters, and of a long one only the beginning."""
    text = value.strip() if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    shown = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text[:limit])
    return shown + (f"... ({len(text):,} characters)" if len(text) > limit else "")


def main():
    parser = argparse.ArgumentParser(
        description="Make training examples for an aligner out of rated answers, and look at data.",
        epilog="examples:\n"
               "  python data.py reformulate harmless-base/train.jsonl.gz --out pairs.jsonl\n"
               "  python data.py reformulate rated.jsonl --out pairs.jsonl --objectives helpful "
               '"Brevity: The response should be short"\n'
               "  python data.py show pairs.jsonl -n 2",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("reformulate", help="make examples of rated answers",
                                  description="Make prompt/completion examples of rated answers.")
    option = command.add_argument
    option("files", nargs="+", metavar="FILE", help="UltraFeedback, HH-RLHF, TRL pairs, or rated JSON Lines")
    option("--out", required=True, metavar="FILE", help="JSON Lines to write, gzipped if it ends in .gz")
    option("--objectives", nargs="+", metavar="O",
           help='names, "Name: description" or JSON files of them (default: all that the data score)')
    option("--objective", metavar="O", help="what `chosen` is better at, if the path does not say it")
    option("--queries", metavar="FILE", help="CSV with the column `query`, for outputs that have none")
    option("--margin", type=float, default=0.0, help="a score is better if it is higher by more (default: 0)")
    option("--seed", type=int, default=0, help="for the order of the objectives in each prompt (default: 0)")
    option("--template", metavar="FILE",
           help='JSON {"better": text, "equal": text}, each text with {objectives}, {prompt}, {answer}')
    command.set_defaults(run=run_reformulate)

    command = commands.add_parser("show", help="print a few records of any file")
    command.add_argument("file", metavar="FILE")
    command.add_argument("-n", "--number", type=int, default=3, help="how many (default: 3)")
    command.set_defaults(run=run_show)

    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    cli(main)
