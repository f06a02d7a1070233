"""The files that answers come in: many formats, told apart by their content, gzipped or not.

From top to bottom: lines and records of any file; rated rows; examples, texts and what align.py writes; preferences; a
look at rows. What is in each kind of row is listed at the top of data.py. Whatever cannot be read is a UserError, with
file and line.
"""
import csv
import gzip
import itertools
import json
import re
import sys
import zlib
from pathlib import Path

from common import UserError


# ----------------------------------------------------------------------------------------------------------------
# Lines and records


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


# ----------------------------------------------------------------------------------------------------------------
# Rated rows

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


# ----------------------------------------------------------------------------------------------------------------
# Examples, texts, and what align.py writes


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


def read_aligned(path, limit=None):
    """The rows (at most `limit`) of a file that align.py wrote, JSON Lines or CSV, checked."""
    rows = []
    for where, row in records(path):
        if isinstance(row.get("objectives"), str):  # a cell of a CSV file
            row["objectives"] = [text for text in row["objectives"].split(" | ") if text]
            row["golden"] = None if row.get("golden") == "" else row.get("golden")
        missing = [name for name in ("prompt", "original", "aligned", "objectives") if row.get(name) is None]
        if missing:
            raise UserError(f"{where}: no {', '.join(missing)}; this is not what align.py writes, give it to "
                            f"align.py first: python align.py --model ALIGNER --data {path} ...")
        texts = [row["prompt"], row["original"], row["aligned"]]
        texts += [] if row.get("golden") is None else [row["golden"]]
        if not isinstance(row["objectives"], list) or not row["objectives"]:
            raise UserError(f'{where}: "objectives" should be a list like ["Name: text"]; mend the row')
        if not all(isinstance(text, str) for text in texts + row["objectives"]):
            raise UserError(f"{where}: holds something else where a text should be; mend or remove the row")
        rows.append(row)
        if len(rows) == limit:
            break
    return rows


# ----------------------------------------------------------------------------------------------------------------
# Preferences


def read_preferences(path, principle=None):
    """Yield {"prompt", "response_a", "response_b", "principle", "p_a"}: pairs of responses and the probability that the
    first is the better one on a principle (None: whatever the file's rows say, and with them, which).

    Files: what `reward.py label` writes; AlpacaEval's annotated outputs (a model's against the reference); pairs judged
    by people (Auto-J); HH-RLHF's or TRL's pairs; rated rows, every two responses of which are compared on a score.
    """
    (_, first), source = first_and_all(records(path), path)
    convert = next((convert for keys, convert in PREFERENCES if keys <= set(first)), None)
    if convert is None:
        yield from compared(read_rated(path, objective=principle or "overall"), principle)
        return
    for where, row in source:
        for pair in convert(row, where):
            if principle in (None, pair["principle"]) or pair["principle"] == "overall" and "principle" not in row:
                yield pair


def compared(rated, principle):
    """A preference for every two responses of rated rows and each principle (or the one) that both are scored on."""
    for row in rated:
        for a, b in itertools.combinations(row["responses"], 2):
            for name in a["scores"]:
                if name in b["scores"] and principle in (None, name):
                    difference = a["scores"][name] - b["scores"][name]
                    p_a = (difference > 0) + 0.5 * (difference == 0)
                    yield preference(row["prompt"], a["text"], b["text"], name, p_a)


def preference(prompt, response_a, response_b, principle, p_a):
    return {"prompt": prompt, "response_a": response_a, "response_b": response_b, "principle": principle, "p_a": p_a}


def from_label(record, where):
    texts = [field(record, key, where) for key in ("prompt", "response_a", "response_b")]
    p_a = record.get("p_a")
    if type(p_a) not in (int, float) or not 0 <= p_a <= 1:
        raise UserError(f"{where}: 'p_a' is {p_a!r}, not a probability; mend or remove the row")
    yield preference(*texts, field({"principle": "overall", **record}, "principle", where), p_a)


def from_alpaca_eval(record, where):
    """Each model's response against the reference, by GPT-4-turbo's probability of preferring it."""
    for response in field(record, "responses", where, dict).values():
        p_a = response.get("gpt4_preference_over_reference") if isinstance(response, dict) else None
        if p_a is None:
            raise UserError(f"{where}: a response without 'gpt4_preference_over_reference'; mend or remove it")
        yield from from_label({"prompt": record.get("prompt"), "response_a": response.get("text"),
                               "response_b": record.get("reference"), "p_a": p_a}, where)


def from_auto_j(record, where):
    """Label 0: people preferred the first; 1: the second; 2: neither."""
    texts = [field(record, key, where) for key in ("prompt", "response 1", "response 2")]
    label = record.get("label")
    if label not in (0, 1, 2):
        raise UserError(f"{where}: 'label' is {label!r}, not 0, 1 or 2; mend or remove the row")
    yield preference(*texts, "overall", (1.0, 0.0, 0.5)[int(label)])


PREFERENCES = [  # the keys that tell a format, what makes rows of a record
    ({"response_a", "response_b", "p_a"}, from_label),
    ({"reference", "responses"}, from_alpaca_eval),
    ({"response 1", "response 2", "label"}, from_auto_j),
]


# ----------------------------------------------------------------------------------------------------------------
# A look at rows


def print_rows(rows):
    """Print rows of any kind, a text under the name of each key."""
    for number, row in enumerate(rows, 1):
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
