"""Data: what answers are judged by, and the examples that an aligner learns from.

    python data.py reformulate harmless-base/train.jsonl.gz --out pairs.jsonl
    python data.py reformulate rated.jsonl --out pairs.jsonl --objectives helpful "Brevity: The answer should be short"
    python data.py show pairs.jsonl -n 2

The rows that flow through the project are dicts, and lines of JSON Lines files ("?": not in every row):

    row         keys                                              made by                    read by
    rated       prompt, responses: [{text, scores: {objective:    formats.read_rated, toy,   reformulate, align, ppo,
                number}}], golden?, objectives?                   feedback answer            feedback, train sft
    example     prompt, completion, objectives, relation,         reformulate                train identity, partner,
                context and answer: [start, end] in the prompt                               equal, better
    completion  prompt, completion, context?                      formats.read_completions   train sft
    preference  prompt, response_a, response_b, principle,        feedback label,            train reward, train dpo,
                p_a: probability that response_a is better        formats.read_preferences   reward train and score
    text        text                                              toy                        train pretrain
    aligned     prompt, original, aligned, golden?, objectives:   align                      eval, and as rated
                ["name: description"]

Rated rows are read from files of many formats (JSON Lines, a JSON list, CSV, Parquet), told by the first record's keys:

    prompt, responses               rated rows themselves; responses need no scores
    instruction, completions        UltraFeedback's release
    chosen, rejected                HH-RLHF's dialogues; with prompt, TRL's pairs, of texts or messages
    prompt, completion, label       KTO: label is true or false, the score 1 or 0
    prompt, response, helpfulness   HelpSteer2 (and correctness, coherence, complexity, verbosity)
    prompt, response_0, response_1  PKU-SafeRLHF (and better_response_id, safer_response_id)
    prompt, response_a, response_b  our labels (p_a), or what `reward.py score` writes (scores, which count)
    prompt, response 1, response 2  Auto-J
    instruction, output             Alpaca (input is joined to instruction), or AlpacaEval's outputs
    query, generated_text           MetaAligner's outputs (goldens?)
    prompt, original, aligned       what align.py writes; the response is "aligned"
    prompt, or query                prompts without answers; what they should come to is called golden
"""
import bisect
import difflib
import functools
import itertools
import json
import random
import re
import zlib
from array import array
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from common import UserError, check_out, cli, make_parser, number, write_jsonl

from tqdm import tqdm

from files import field, first_and_all, read_json, records, shorten, shown
from formats import located_rated, read_pairs


# ----------------------------------------------------------------------------------------------------------------
# Objectives


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
    # three that HelpSteer2 rates: what it calls coherence, complexity and verbosity
    "coherent": "The response should be clear, of one piece and nowhere at odds with itself",
    "complex": "The response should show the knowledge and the language of somebody who is versed in the matter",
    "verbose": "The response should go into every detail, at length",
}
OBJECTIVES = {name: Objective(name, description) for name, description in DESCRIPTIONS.items()}


def plain_name(name):
    return re.sub(r"[\s_-]+", "_", name.strip().lower())


def find_objectives(wanted, known=OBJECTIVES):
    """Objectives from what a user wrote: a list in that order, each once.

    wanted: texts, each a known name (case, "-", " " and "_" make no difference), "Name: description", or the path of a
    JSON file {"name": "description", ...} or [{"name": ..., "description": ...}, ...]. Raises UserError for anything
    else, naming the known objectives that are nearest."""
    by_name = {plain_name(name): objective for name, objective in known.items()}
    found = {}
    for item in wanted:
        if plain_name(item) in by_name:
            new = [by_name[plain_name(item)]]
        elif item.endswith(".json") and (":" not in item or Path(item).exists()):
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
    if ":" in name:
        raise UserError(f"{where}: the name {shown(name)} holds a colon, which ends a name; leave it out")
    return Objective(name.strip(), description.strip())


def read_objectives(path):
    content = read_json(path)
    if isinstance(content, dict):
        content = [{"name": name, "description": description} for name, description in content.items()]
    if not isinstance(content, list) or not content or not all(isinstance(item, dict) for item in content):
        raise UserError(f'{path}: not objectives; write {{"name": "description", ...}} into it')
    return [make_objective(item.get("name"), item.get("description"), f"{path}: objective {place}")
            for place, item in enumerate(content, 1)]


def nearest(name, known):
    by_name = {plain_name(key): key for key in known}
    close = difflib.get_close_matches(plain_name(name), by_name, n=3, cutoff=0.5)
    return f"the nearest known: {', '.join(by_name[key] for key in close)}; " if close else ""


def row_objectives(row):
    """The objectives for which a row was aligned, each once."""
    found = {}
    for text in row["objectives"]:
        name, _, description = text.partition(": ")
        found.setdefault(name, Objective(name, description))
    return list(found.values())


# ----------------------------------------------------------------------------------------------------------------
# Dynamic objectives reformulation

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

    It is told the objectives' descriptions, not their names, in the given order."""
    instruction, question, draft, ending = split_template(template[relation])
    prompt = prompt.strip()
    before = instruction + "; ".join([objective.description for objective in objectives]) + question
    return f"{before}{prompt}{draft}{answer}{ending}", [len(before), len(before) + len(prompt)]


def compare(first, second, margin=0.0):
    """Of two dicts of scores: the names on which the first is better, worse, equal (at most margin apart). A name that
    either lacks is in none of the three."""
    apart = {name: score - second[name] for name, score in first.items() if name in second}
    better = [name for name in apart if apart[name] > margin]
    worse = [name for name in apart if -apart[name] > margin]
    equal = [name for name in apart if not abs(apart[name]) > margin]
    return better, worse, equal


def reformulate(rated, objectives, seed=0, margin=0.0, template=TEMPLATE, skipped=None):
    """Yield the examples of rated rows (MetaAligner's dynamic objectives reformulation), the same for a seed.

    For each two responses to a prompt, up to three: the second edited into the first, prompted with all the objectives
    on which the first is better; the first edited into the second, with all those on which the second is better; and
    the second edited into the first, to stay equal on those on which they are.
    rated: rows as read_rated yields them. objectives: Objectives, a list or a dict by name; scores on others do not
        count. margin: a score is better if it is higher by more than this.
    skipped: a Counter, told of what was left out: examples with an empty target, "better" ones whose two answers are
        the same text, and rows that give none.
    Yields {"prompt", "completion", "objectives": [names], "relation": "better" or "equal", "context" and "answer":
        [start, end] of the row's prompt and of the edited answer in the prompt}."""
    values = objectives.values() if isinstance(objectives, dict) else objectives
    by_name = {objective.name: objective for objective in values}
    skipped = Counter() if skipped is None else skipped
    generator = random.Random(seed)
    for row in rated:
        answers, compared = [(response["text"], scores_on(by_name, response)) for response in row["responses"]], False
        for (first, first_scores), (second, second_scores) in itertools.combinations(answers, 2):
            better, worse, equal = compare(first_scores, second_scores, margin)
            compared = compared or bool(better or worse or equal)
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
        if not compared:
            skipped["no two answers to the prompt are scored on one objective asked for"] += 1


def scores_on(names, response):
    """A response's scores on some objectives; null and NaN say nothing."""
    return {name: score for name, score in response["scores"].items()
            if name in names and score is not None and score == score}


def make_example(prompt, source, target, objectives, relation, template):
    text, context = aligner_prompt(prompt, source, objectives, relation, template)
    begin = context[1] + len(split_template(template[relation])[2])
    return {"prompt": text, "completion": target, "objectives": [objective.name for objective in objectives],
            "relation": relation, "context": context, "answer": [begin, begin + len(source)]}


def is_held_out(row, share, seed=0):
    """Whether an example, pair or preference is in the share (0 to 1) kept for validation: with a prompt, all its rows.
    Where there is no prompt, its (first) completion decides."""
    start, end = row.get("context", (0, None))
    text = row["prompt"][start:end] or completions_of(row)[0]
    return zlib.crc32(f"{seed} {text}".encode("utf-8", "replace")) < share * 2**32


# ----------------------------------------------------------------------------------------------------------------
# Token ids

TURN = re.compile(r"\n\n(?=(?:Human|Assistant): *\S)")
PIECE = re.compile(r"\S{1,20}")


@dataclass(slots=True)
class Document:
    """A text as token ids, of which ids[start:] is the completion, to be learned."""
    ids: array  # of 4-byte ints: as lists, UltraFeedback's would take tens of gigabytes
    start: int


@dataclass(slots=True)
class Example:
    """What a loss sees at once: one document, or the two of a pair."""
    documents: list  # of Document
    label: float = 1.0  # of a pair: the probability that the first is the better one
    ref_logprobs: list | None = None  # of the completions under the reference, where a method needs them


def completions_of(row):
    """The one completion of an example or pair, or the two responses of a preference."""
    return [row["completion"]] if "completion" in row else [row["response_a"], row["response_b"]]


def text_ids(tokenizer, texts):
    """The ids of each text by a `tokenizers` Tokenizer: none added, none cut; a "</s>" in a text is text."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def encode_prompt(tokenizer, prompt, bos_id, max_tokens=None, context=None):
    """The ids of a prompt, after BOS (or None): the very ids that training puts before a completion.

    If there are more than max_tokens, the context ([start, end] in the prompt) loses its oldest turns, then the oldest
    words of its last turn. Returns None if the rest alone is too long."""
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


def encode_document(tokenizer, prompt, completion, bos_id, eos_id, max_tokens=None, context=None):
    """BOS, the prompt's ids, the completion's ids, EOS, as a Document; or None if they are over max_tokens.

    The two are encoded apart: ids[:start] is what encode_prompt gives at generation, and the ids after it decode to the
    completion. Too long ones lose the oldest turns of their context, and nothing else."""
    row = {"prompt": prompt, "completion": completion, "context": context}
    return encode_documents(tokenizer, [row], bos_id, eos_id, max_tokens)[0]


def encode_documents(tokenizer, rows, bos_id, eos_id, max_tokens=None):
    """encode_document of rows {"prompt", "completion", "context"?}: a list of Documents, None where one is too long."""
    prompts = text_ids(tokenizer, [row["prompt"] for row in rows])
    completions = text_ids(tokenizer, [row["completion"] for row in rows])
    begin, end = ([] if token is None else [token] for token in (bos_id, eos_id))
    documents = []
    for row, prompt, completion in zip(rows, prompts, completions):
        prompt, completion = begin + prompt, completion + end
        if max_tokens is not None and len(prompt) + len(completion) > max_tokens:
            room = max_tokens - len(completion)
            prompt = encode_prompt(tokenizer, row["prompt"], bos_id, room, row.get("context"))
        documents.append(None if prompt is None else Document(array("i", prompt + completion), len(prompt)))
    return documents


def encode_examples(tokenizer, rows, bos_id, eos_id, max_tokens=None):
    """(list of Examples, number dropped as too long). Rows {"prompt", "completion", "context"?} give one document each;
    preferences give two, labelled p_a."""
    rows, examples, dropped = iter(rows), [], 0
    with tqdm(desc="tokenise", unit=" examples", delay=2, disable=None) as bar:
        while chunk := list(itertools.islice(rows, 1000)):
            single = [{**row, "completion": text} for row in chunk for text in completions_of(row)]
            encoded = iter(encode_documents(tokenizer, single, bos_id, eos_id, max_tokens))
            for row in chunk:
                documents = [next(encoded) for _ in completions_of(row)]
                if None in documents:
                    dropped += 1
                else:
                    examples.append(Example(documents, 1.0 if "completion" in row else row["p_a"]))
            bar.update(len(chunk))
    return examples, dropped


# ----------------------------------------------------------------------------------------------------------------
# The command line


def run_reformulate(files, out, objectives=None, objective=None, queries=None, margin=0.0, seed=0, template=None):
    """Rated files in, one file of examples out, and a table of what it has."""
    check_out(out, files)
    pairs_on = find_objectives([objective] if objective else [])
    wanted = find_objectives(objectives) if objectives else [*OBJECTIVES.values(), *pairs_on]
    known = {objective.name: objective for objective in wanted}
    template = read_template(template) if template else TEMPLATE
    made, scored, skipped = Counter(), Counter(), Counter()

    def rated():
        for file in files:
            chosen_at = pairs_on[0].name if pairs_on else None
            for where, row in located_rated(file, chosen_at, queries, skipped):
                names = {name for response in row["responses"] for name in response["scores"]}
                unknown = sorted(names - set(known))
                if unknown and not objectives:
                    raise UserError(f"{where}: scores an unknown objective {shown(unknown[0])}; "
                                    f"{nearest(unknown[0], known)}"
                                    "say with --objectives which ones to use, and describe new ones there")
                scored.update(names)
                yield row

    def examples():
        bar = tqdm(rated(), desc="reformulate", unit=" rows", disable=None)
        for example in reformulate(bar, wanted, seed, margin, template, skipped):
            made[example["relation"], len(example["objectives"])] += 1
            yield example
        if not made:
            raise UserError(f"{files[0]}: gives no example (scored: {shorten(scored) or 'nothing'}); "
                            "give prompts with two answers or more, scored on the objectives asked for")

    count = write_jsonl(out, examples())
    print(f"{out}: {count:,} examples, by how many objectives they ask for")
    print_counts(made, skipped)


def print_counts(made, skipped):
    sizes = sorted({size for _, size in made})
    print(" " * 8 + "".join(f"{size:>11}" for size in [*sizes, "all"]))
    for relation in TEMPLATE:
        counts = [made[relation, size] for size in sizes]
        print(f"{relation:8}" + "".join(f"{count:>11,}" for count in [*counts, sum(counts)]))
    for reason, count in skipped.items():
        print(f"left out: {count:,} because {reason}")


def run_show(file, count=3):
    """Print the first records of any file of answers."""
    (_, record), source = first_and_all(records(file), file)
    if "completion" in record and "label" not in record:
        rows = read_pairs(file, source=source)
    else:
        rows = (row for _, row in located_rated(file, "chosen", source=source))
    for which, row in enumerate(itertools.islice(rows, count), 1):
        for place, response in enumerate(row.pop("responses") if "completion" not in row else [], 1):
            scores = ", ".join(f"{name} {score:g}" for name, score in response["scores"].items())
            row[f"response {place}: {scores or 'no scores'}"] = response["text"]
        for key, value in row.items():
            print(f"--- {which}. {printable(key)}\n{printable(value)}")


def printable(value, limit=2000):
    """Text for a terminal: no control characters, and of a long one only the beginning."""
    text = value.strip() if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    begin = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text[:limit])
    return begin + (f"... ({len(text):,} characters)" if len(text) > limit else "")


def main():
    parser = make_parser(__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("reformulate", help="make examples of rated answers",
                                  description="Make prompt/completion examples of rated answers.")
    add = command.add_argument
    add("files", nargs="+", metavar="FILE", help="rated answers, in any of the formats in `data.py --help`")
    add("--out", required=True, metavar="FILE", help="JSON Lines to write, gzipped if it ends in .gz")
    add("--objectives", nargs="+", metavar="O",
        help='names, "Name: description" or JSON files of them (default: all that the data score)')
    add("--objective", metavar="O",
        help="what `chosen` is better at (KTO, Auto-J: what `label` tells), if the path does not say it")
    add("--queries", metavar="FILE", help="CSV with the column `query`, for outputs that have none")
    add("--margin", type=number(float, 0), default=0.0, help="a score is better if it is higher by more (default: 0)")
    add("--seed", type=int, default=0, help="for the order of the objectives in each prompt (default: 0)")
    add("--template", metavar="FILE",
        help='JSON {"better": text, "equal": text}, each text with {objectives}, {prompt}, {answer}')
    command.set_defaults(run=run_reformulate)

    command = commands.add_parser("show", help="print a few records of any file")
    command.add_argument("file", metavar="FILE")
    command.add_argument("-n", "--number", dest="count", type=number(int, 0), default=3, help="how many (default: 3)")
    command.set_defaults(run=run_show)

    args = vars(parser.parse_args())
    args.pop("run")(**args)


if __name__ == "__main__":
    cli(main)
