"""The formats that answers come in, told apart by their records' keys.

From top to bottom: rated rows; examples, texts and what align.py writes; preferences. What is in each kind of row, and
which keys tell a format, is listed at the top of data.py. Whatever cannot be read is a UserError, with file and line.
"""
import itertools
import math
import re
import statistics
from collections import Counter
from pathlib import Path

from common import UserError
from files import field, first_and_all, is_parquet, kind, lines, objects, records, shorten, shown


# ----------------------------------------------------------------------------------------------------------------
# Rated rows

ASSISTANT = "\n\nAssistant:"


def read_rated(path, objective=None, queries=None, skipped=None):
    """Yield the rated rows of a file in any of FORMATS, told apart by its first record.

    objective: the name of what "chosen" is better at, or what "label" tells (KTO, Auto-J). HH-RLHF's files tell it by
        their own name or their folder's (harmless-base/train.jsonl.gz, helpful-online.test.jsonl).
    queries: file with the "query" column, for MetaAligner outputs that have none (IMHI), joined row by row;
        by default the file in the same folder that is called queries plus the same ending.
    skipped: a Counter, told how many rows were left out and why: HH-RLHF pairs whose dialogues differ before the last
        assistant turn (5 of 2,312 in harmless-base's test set), so that the two answers are to different questions.
    Raises UserError, with file and line, for whatever cannot be read.
    """
    for _, row in located_rated(path, objective, queries, skipped):
        yield row


def located_rated(path, objective=None, queries=None, skipped=None, source=None):
    """read_rated, as pairs (where, row). source: the file's records, where they are being read already."""
    (where, record), source = first_and_all(source or records(path), path)
    columns = set(record)
    if "generated_text" in columns and not {"query", "prompt"} & columns:
        source = with_queries(path, source, queries)
        columns.add("query")
    if {"prompt", "completion"} <= columns and "label" not in columns:
        raise UserError(f"{where}: these are examples already (prompt, completion); give the data rated")
    convert = next((convert for _, keys, convert in FORMATS if keys <= columns), None)
    if convert is None:
        raise UserError(f"{where}: no known format has {shorten(record) or 'no keys'}; {KNOWN}")
    if convert in (from_pair, from_kto, from_auto_j):
        objective = objective or objective_of_path(path)
    def converted():
        for where, record in source:
            content = convert(record, where, objective)
            if content is not None:
                yield where, rated_row(record, where, *content)
            elif skipped is not None:
                skipped["the two dialogues differ before the last answer"] += 1
    rows = joined(converted()) if convert in JOINED else converted()
    yield from round_robins(rows) if convert is from_judged else rows


def joined(rows):
    """Pairs (where, rated row), neighbours of one prompt as one row: with all their responses, where each has one (KTO,
    HelpSteer2); else, where these are the same, with all their scores (labels, scored pairs)."""
    def common(item):
        texts = [response["text"] for response in item[1]["responses"]]
        return {**item[1], "responses": texts if len(texts) > 1 else []}
    for _, ((where, row), *others) in itertools.groupby(rows, common):
        for other_where, other in others:
            if len(other["responses"]) == 1:
                row["responses"] += other["responses"]
                continue
            for response, more in zip(row["responses"], other["responses"]):
                if any(response["scores"].get(name, score) != score for name, score in more["scores"].items()):
                    raise UserError(f"{other_where}: scores the pair of the row before anew; remove one of the two")
                response["scores"].update(more["scores"])
        yield where, row


def round_robins(rows):
    """Pairs (where, rated row of two responses), neighbours of one prompt as one row with all its responses, if each
    two of these are compared, and on the same objectives; else as they are. A score is then the mean over the pairs
    that a response is in: of probabilities to be the better one, that against all the others (Borda's count)."""
    for _, group in itertools.groupby(rows, lambda item: {**item[1], "responses": []}):
        group = [(where, row, frozenset(each["text"] for each in row["responses"])) for where, row in group]
        pairs = {texts: row for _, row, texts in group}
        once = all(len(texts) == 2 and pairs[texts] == row for _, row, texts in group)  # in one order, with one score
        scores = {}
        for response in itertools.chain.from_iterable(row["responses"] for row in pairs.values()):
            scores.setdefault(response["text"], []).append(response["scores"])
        names = {frozenset(each) for several in scores.values() for each in several}
        if len(scores) == 2 or not once or len(pairs) != math.comb(len(scores), 2) or len(names) != 1:
            yield from ((where, row) for where, row, _ in group)
            continue
        responses = [{"text": text, "scores": {name: statistics.fmean(each[name] for each in several)
                                               for name in several[0]}} for text, several in scores.items()]
        where, row, _ = group[0]
        yield where, {**row, "responses": responses}


def objective_of_path(path):
    for name in (Path(path).name, Path(path).resolve().parent.name):
        if match := re.match(r"(harmless|helpful)(?![a-z])", name):
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


def rated_row(record, where, prompt, answers, best_is_golden=False, margin=None):
    """A rated row of answers [(text, scores)], with the record's golden answer and objectives, where it has any, and
    the margin up to which scores count as equal, where they are estimates."""
    row = {"prompt": prompt, "responses": []} | ({} if margin is None else {"margin": margin})
    for text, scores in answers:
        row["responses"].append({"text": text, "scores": present(scores, where)})
    golden, objectives = golden_and_objectives(record, where)
    if best_is_golden and golden is None and (best := best_rated(row["responses"])):
        golden = best["text"]
    return row | ({} if golden is None else {"golden": golden}) | ({"objectives": objectives} if objectives else {})


def golden_and_objectives(record, where):
    """(text or None, list of texts) of a record; UserError for anything else. In align.py's CSV files, objectives are
    joined by " | ", and an empty golden answer is none."""
    golden, objectives = record.get("golden", record.get("goldens")), record.get("objectives")
    if isinstance(objectives, str):
        golden, objectives = None if golden == "" else golden, [text for text in objectives.split(" | ") if text]
    objectives = [] if objectives is None else objectives
    if not isinstance(objectives, list) or not all(isinstance(text, str) for text in objectives):
        raise UserError(f'{where}: "objectives" should be a list like ["Name: text"]; mend or remove it')
    return golden if golden is None else field({"golden": golden}, "golden", where), objectives


def from_rated(record, where, _):
    answers = [(field(response, "text", where),
                {} if response.get("scores") is None else field(response, "scores", where, dict))
               for response in objects(record, "responses", where)]
    margin = record.get("margin")
    if margin is not None and (type(margin) not in (int, float) or not 0 <= margin < math.inf):
        raise UserError(f"{where}: 'margin' is {shown(margin)}, not a number from 0; mend or remove it")
    return field(record, "prompt", where), answers, False, margin


def present(scores, where):
    """The scores that are there: null and NaN say nothing. Raises UserError for what is not a number."""
    scores = {name: score for name, score in scores.items() if score is not None and score == score}
    for name, score in scores.items():
        if type(score) not in (int, float) or not -1e300 < score < 1e300:
            raise UserError(f"{where}: the score {shown(name)} is {shown(score)}, not a number; mend or remove it")
    return scores


RATINGS = {"honesty": "honest", "truthfulness": "truthful", "helpfulness": "helpful", "correctness": "correct",
           "coherence": "coherent", "complexity": "complex", "verbosity": "verbose"}


def from_ultrafeedback(record, where, _):
    """UltraFeedback's release. A rating that is N/A is left out; golden has the highest sum of ratings."""
    answers = []
    for completion in objects(record, "completions", where):
        scores = {}
        for name, annotation in field(completion, "annotations", where, dict).items():
            rating = annotation.get("Rating") if isinstance(annotation, dict) else annotation
            try:
                rating = None if rating in ("N/A", "") else float(rating) if isinstance(rating, str) else rating
            except ValueError:
                raise UserError(f"{where}: the rating {shown(rating)} is no number; mend or remove it") from None
            scores[RATINGS.get(name, name)] = rating
        answers.append((field(completion, "response", where), scores))
    return field(record, "instruction", where), answers, True


def best_rated(responses):
    """The response with the highest sum of scores, the first of several such; None if none has any."""
    scored = [response for response in responses if response["scores"]]
    return max(scored, key=lambda response: sum(response["scores"].values()), default=None)


def from_pair(record, where, objective):
    """Pairs: chosen and rejected answers to a prompt (TRL), or dialogues (HH-RLHF); None if those differ before their
    last answers. Messages before the last one are the prompt, which they must repeat or go on from."""
    answers = [answer_text(record, key, where, several=True) for key in ("chosen", "rejected")]
    if "prompt" in record:
        prompt = prompt_text(record, "prompt", where)
        first, second = (record[key][:-1] if isinstance(record[key], list) else [] for key in ("chosen", "rejected"))
        if first != second:
            return None
        if first and [message["content"] for message in first] != [prompt]:
            before = dialogue_text({"chosen": first}, "chosen", where) + ASSISTANT
            if prompt.strip() not in before:
                raise UserError(f"{where}: the messages of 'chosen' do not repeat the 'prompt'; mend or remove the row")
            prompt = before
    else:
        dialogues = [dialogue_text(record, key, where) for key in ("chosen", "rejected")]
        parts = [text.rpartition(ASSISTANT) for text in dialogues]
        if not parts[0][1] or parts[0][0] != parts[1][0]:
            return None
        prompt = parts[0][0] + ASSISTANT
        answers = [answer.strip() for _, _, answer in parts]
    return prompt, [(answers[0], {objective: 1}), (answers[1], {objective: 0})]


def from_kto(record, where, objective):
    """KTO: one answer, and whether it was approved of."""
    scores = {objective: int(field(record, "label", where, bool))}
    return prompt_text(record, "prompt", where), [(answer_text(record, "completion", where), scores)]


def from_helpsteer(record, where, _):
    """HelpSteer2: one response with its ratings."""
    scores = {RATINGS[name]: rating for name, rating in record.items() if name in RATINGS}
    return prompt_text(record, "prompt", where), [(field(record, "response", where), scores)]


def from_safe_rlhf(record, where, _):
    """PKU-SafeRLHF: which of two responses, 0 or 1, is the more helpful one, and which the more harmless one."""
    best = {"helpful": record.get("better_response_id"), "harmless": record.get("safer_response_id")}
    for name, number in best.items():
        if type(number) is not int or number not in (0, 1):
            raise UserError(f"{where}: the id of the more {name} response is {shown(number)}, not 0 or 1; mend it")
    return prompt_text(record, "prompt", where), [
        (field(record, f"response_{i}", where), {name: int(i == best[name]) for name in best}) for i in (0, 1)]


def from_auto_j(record, where, objective):
    """Auto-J. Label 0: people preferred the first response; 1: the second; 2: neither."""
    label = record.get("label")
    if label not in (0, 1, 2) or isinstance(label, bool):
        raise UserError(f"{where}: 'label' is {shown(label)}, not 0, 1 or 2; mend or remove the row")
    first = (1.0, 0.0, 0.5)[int(label)]
    return field(record, "prompt", where), [(field(record, "response 1", where), {objective: first}),
                                            (field(record, "response 2", where), {objective: 1 - first})]


LABEL_MARGIN = 0.2  # of probabilities to be the better one: 0.6 against 0.4, or closer, is a tie
SCORE_MARGIN = 0.4  # of preference models' scores, which are log-odds: 0.4 is as much, 0.6 against 0.4


def from_judged(record, where, _):
    """Our labels, which become each response's probability to be the better one, or what `reward.py score` writes:
    scores {name: [of response_a, of response_b]}."""
    margin = SCORE_MARGIN
    if "scores" not in record:
        (label,) = from_label(record, where)
        record = {**record, "scores": {label["principle"]: [label["p_a"], 1 - label["p_a"]]}}
        margin = LABEL_MARGIN
    scores = field(record, "scores", where, dict)
    for name, both in scores.items():
        if not isinstance(both, list) or len(both) != 2:
            raise UserError(f"{where}: the scores {shown(name)} are {kind(both)}, not a list of two numbers; mend them")
    return field(record, "prompt", where), [
        (field(record, f"response_{side}", where), {name: both[i] for name, both in scores.items()})
        for i, side in enumerate("ab")], False, margin


def from_alpaca(record, where, _):
    """Alpaca's rows and AlpacaEval's outputs. What the instruction speaks about, the input, stands below it."""
    given = "" if record.get("input") is None else field(record, "input", where)
    prompt = field(record, "instruction", where) + (f"\n\n{given}" if given.strip() else "")
    return prompt, [(field(record, "output", where), {})]


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


def answer_text(record, key, where, several=False):
    """A text as it is; of chat messages, the last one, which is the assistant's. several: there may be others."""
    text = dialogue_text(record, key, where)
    if not isinstance(record[key], list):
        return text
    if record[key][-1]["role"] != "assistant" or len(record[key]) > 1 and not several:
        raise UserError(f"{where}: {key!r} should {'end with' if several else 'be'} one message by the assistant; mend "
                        "or remove it")
    return record[key][-1]["content"]


def unrated(prompt_key, answer_key=None):
    """A converter for files with one answer or none to a prompt, and no scores. Without answer_key, a record with a key
    that looks like an answer's (and is not empty, true or false) is a UserError."""
    def convert(record, where, _):
        answers = [(field(record, answer_key, where), {})] if answer_key else []
        for key, value in () if answers else record.items():
            if ANSWERS.fullmatch(key.lower()) and value not in (None, "", [], {}) and not isinstance(value, bool):
                raise UserError(f"{where}: {shown(key)} looks like an answer, in no known format; remove it or {KNOWN}")
        return prompt_text(record, prompt_key, where), answers
    return convert


ANSWERS = re.compile(  # keys of answers, by their names, but not of their number, id, format, ...
    r"(?!(num|n|max|min|is|has|in)[\W_])(?!.*[\W_](ids?|idx|index|format|schema|type|length|len|tokens?|count|model|by|at|"
    r"to|date|time|version|scores?|ratings?|language|lang|source|config|settings)$)"
    r".*(response|answer|output|completion|generated|generation|reply|replies|chosen|rejected|aligned).*", re.DOTALL)
FORMATS = [  # name, the keys or columns that tell it, what makes a rated row of a record
    ("rated", {"prompt", "responses"}, from_rated),
    ("UltraFeedback", {"instruction", "completions"}, from_ultrafeedback),
    ("HH-RLHF or TRL pairs", {"chosen", "rejected"}, from_pair),
    ("KTO", {"prompt", "completion", "label"}, from_kto),
    ("HelpSteer2", {"prompt", "response", "helpfulness"}, from_helpsteer),
    ("PKU-SafeRLHF", {"prompt", "response_0", "response_1"}, from_safe_rlhf),
    ("labels or scored pairs", {"prompt", "response_a", "response_b"}, from_judged),
    ("Auto-J", {"prompt", "response 1", "response 2"}, from_auto_j),
    ("Alpaca or AlpacaEval outputs", {"instruction", "output"}, from_alpaca),
    ("MetaAligner outputs", {"query", "generated_text"}, unrated("query", "generated_text")),
    ("aligned", {"prompt", "original", "aligned"}, unrated("prompt", "aligned")),
    ("prompts", {"prompt"}, unrated("prompt")),
    ("queries", {"query"}, unrated("query")),
]
KNOWN = f"give one of: {'; '.join(name for name, _, _ in FORMATS)} (their keys: python data.py --help)"
JOINED = (from_kto, from_helpsteer, from_judged)  # of which several rows may belong together


# ----------------------------------------------------------------------------------------------------------------
# Examples, texts, and what align.py writes

def read_pairs(path, relation=None, skipped=None, source=None):
    """Yield examples {"prompt", "completion", ...} of a file by reformulate, or any in that form of TRL's; other keys
    are kept, but chosen and rejected, which tell the same again. relation: yield only those with this "relation":
    "equal", or "better", which "keep" is read with. skipped: a Counter, told how many were left out: those that KTO
    labels false, and those without a relation. source: the file's records, if they are being read already. Raises
    UserError, with file and line."""
    skipped = Counter() if skipped is None else skipped
    _, source = first_and_all(source or records(path), path)
    for where, row in source:
        if "label" in row and not field(row, "label", where, bool):
            skipped["their label is false"] += 1
            continue
        there = [key for key, value in row.items() if value is not None]
        row = {key: row[key] for key in there if key not in ("chosen", "rejected")}
        if not {"prompt", "completion"} <= set(row):
            raise UserError(f"{where}: no prompt and completion, but {shorten(there) or 'nothing'}; make examples with "
                            "`python data.py reformulate FILE --out pairs.jsonl`")
        prompt, completion = prompt_text(row, "prompt", where), answer_text(row, "completion", where)
        for key in [key for key in ("context", "answer") if key in row]:
            span = field(row, key, where, list)
            if [type(place) for place in span] != [int, int] or not 0 <= span[0] <= span[1] <= len(prompt):
                raise UserError(f"{where}: {key!r} should be [start, end] in the prompt; mend or remove it")
        found = row.get("relation")
        if found not in (None, "better", "equal", "keep"):
            raise UserError(f"{where}: 'relation' is {shown(found)}, not 'better', 'equal' or 'keep'; mend the row")
        if relation in (None, found) or (relation, found) == ("better", "keep"):
            yield {**row, "prompt": prompt, "completion": completion}
        elif "relation" not in row:
            skipped["no 'relation' says whether the completion is better than the answer or equal"] += 1


def read_completions(path, skipped=None):
    """Yield {"prompt", "completion", ...} to fine-tune on: as read_pairs; the last of chat messages; Alpaca's outputs;
    the best-rated responses. skipped: a Counter, told how many rows were left out and why."""
    skipped = Counter() if skipped is None else skipped
    (where, record), source = first_and_all(records(path), path)
    if "completion" in record:
        yield from read_pairs(path, skipped=skipped, source=source)
        return
    if "messages" in record and not {"chosen", "responses", "completions"} & set(record):
        for where, row in source:
            completion = answer_text(row, "messages", where, several=True)
            yield {"prompt": prompt_text({"prompt": row["messages"][:-1]}, "prompt", where), "completion": completion}
        return
    shows_how = {"instruction", "output"} <= set(record) and "generator" not in record  # Alpaca, but not AlpacaEval
    for _, row in located_rated(path, "chosen", skipped=skipped, source=source):
        best = row["responses"][0] if shows_how else best_rated(row["responses"])
        if best is None:
            skipped["no response has a score"] += 1
        elif not best["text"].strip():
            skipped["the best response is empty"] += 1
        else:
            yield {"prompt": row["prompt"], "completion": best["text"]}


def read_texts(path):
    """Yield texts to pretrain on: "text" of records, or plain text's paragraphs, between blank lines. Which, a name in
    .jsonl, .json, .csv or .txt (and .gz) tells; else whether one of the first two lines that are not blank begins as
    JSON does. (If it is the second alone, the first was cut off.)"""
    ending = ".parquet" if is_parquet(path) else Path(re.sub(r"\.gz$", "", str(path))).suffix.lower()
    if ending not in (".parquet", ".jsonl", ".json", ".csv", ".txt"):
        start = itertools.islice((text for _, text in lines(path) if text.strip()), 2)
        begins = re.compile(r'\s*(\[\s*)?\{\s*("|$)|\s*\[\s*$')
        ending = ".jsonl" if any(map(begins.match, start)) else ".txt"
    if ending != ".txt":
        _, source = first_and_all(records(path), path)
        for where, record in source:
            yield field(record, "text", where)
        return
    _, source = first_and_all(lines(path), path)
    for blank, group in itertools.groupby((text for _, text in source), key=lambda text: not text.strip()):
        if not blank:
            yield "".join(group).strip()


def read_aligned(path, limit=None):
    """The rows (at most `limit`) of a file that align.py wrote, JSON Lines or CSV, checked."""
    rows, (_, source) = [], first_and_all(records(path), path)
    for where, row in source:
        golden, objectives = golden_and_objectives(row, where)
        row |= {"objectives": objectives} | ({"golden": golden} if "golden" in row else {})
        missing = [name for name in ("prompt", "original", "aligned", "objectives") if row.get(name) in (None, [])]
        if missing:
            raise UserError(f"{where}: no {', '.join(missing)}; this is not what align.py writes, give it to "
                            f"align.py first: python align.py --model ALIGNER --data {path} ...")
        for name in ("prompt", "original", "aligned"):
            field(row, name, where)
        rows.append(row)
        if len(rows) == limit:
            break
    return rows


# ----------------------------------------------------------------------------------------------------------------
# Preferences

def read_preferences(path, principle=None, skipped=None):
    """Yield {"prompt", "response_a", "response_b", "principle", "p_a"}: pairs of responses and the probability that the
    first is the better one on a principle (None: whatever the file's rows say, and with them, which).

    Files: what `feedback.py label` writes; AlpacaEval's annotated outputs (a model's against the reference); any that
    read_rated reads, of whose rows every two responses are compared on each score that both have (so what `reward.py
    score` writes tells which ones the models prefer). skipped: a Counter, told how many rows were left out and why.
    """
    (_, first), source = first_and_all(records(path), path)
    if {"reference", "responses"} <= set(first):
        convert = from_alpaca_eval
    elif {"response_a", "response_b"} <= set(first) and "scores" not in first:
        convert = from_label
    else:
        rated = located_rated(path, principle or "overall", skipped=skipped, source=source)
        yield from compared((row for _, row in rated), principle, skipped)
        return
    for where, row in source:
        for pair in convert(row, where):
            if principle in (None, pair["principle"]) or pair["principle"] == "overall" and "principle" not in row:
                yield pair


def compared(rated, principle, skipped=None):
    """A preference for every two responses of rated rows and each principle (or the one) that both are scored on."""
    for row in rated:
        found = [preference(row["prompt"], a["text"], b["text"], name, (score > b["scores"][name])
                            + 0.5 * (score == b["scores"][name]))
                 for a, b in itertools.combinations(row["responses"], 2)
                 for name, score in a["scores"].items() if name in b["scores"] and principle in (None, name)]
        yield from found
        if not found and skipped is not None:
            skipped["no two responses are scored on the same principle"] += 1


def preference(prompt, response_a, response_b, principle, p_a):
    return {"prompt": prompt, "response_a": response_a, "response_b": response_b, "principle": principle, "p_a": p_a}


def from_label(record, where):
    texts = [field(record, key, where) for key in ("prompt", "response_a", "response_b")]
    p_a = record.get("p_a")
    if type(p_a) not in (int, float) or not 0 <= p_a <= 1:
        raise UserError(f"{where}: 'p_a' is {shown(p_a)}, not a probability; mend or remove the row")
    yield preference(*texts, field({"principle": "overall", **record}, "principle", where), p_a)


def from_alpaca_eval(record, where):
    """Each model's response against the reference, by GPT-4-turbo's probability of preferring it."""
    for response in field(record, "responses", where, dict).values():
        p_a = response.get("gpt4_preference_over_reference") if isinstance(response, dict) else None
        if p_a is None:
            raise UserError(f"{where}: a response without 'gpt4_preference_over_reference'; mend or remove it")
        yield from from_label({"prompt": record.get("prompt"), "response_a": response.get("text"),
                               "response_b": record.get("reference"), "p_a": p_a}, where)


# ----------------------------------------------------------------------------------------------------------------
# Any of these, of several files


def read_all(paths, read, *options):
    """The rows that read(path, *options, skipped) yields of each path, and a line for each reason that skipped, a
    Counter, has for rows left out."""
    rows = []
    for path in paths:
        skipped = Counter()
        rows += read(path, *options, skipped)
        for reason, count in skipped.items():
            print(f"{path}: left out: {count:,} rows, {reason}")
    return rows
