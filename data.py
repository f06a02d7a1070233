"""Data: the examples that an aligner learns from, made of rated answers.

    python data.py reformulate harmless-base/train.jsonl.gz --out pairs.jsonl
    python data.py reformulate rated.jsonl --out pairs.jsonl --objectives helpful "Brevity: The answer should be short"
    python data.py reformulate labels.jsonl --out pairs.jsonl                  # of AI feedback, on several principles
    python data.py show pairs.jsonl -n 2

The rows that flow through the project are dicts, and lines of JSON Lines files ("?": not in every row):

    row         keys                                              made by                    read by
    rated       prompt, responses: [{text, scores: {objective:    formats.read_rated, toy,   reformulate, align, ppo,
                number}}], golden?, objectives?, margin?: what    feedback answer            feedback, train sft
                scores of no greater difference are, is equal
    example     prompt, completion, objectives, relation,         reformulate                train identity, partner,
                context and answer: [start, end] in the prompt,                              equal, better, contrast;
                of better ones chosen and rejected                                           TRL
    completion  prompt, completion, context?                      formats.read_completions   train sft
    preference  prompt, response_a, response_b, principle,        feedback label,            train reward, train dpo,
                p_a: probability that response_a is better, gap?: formats.read_preferences,  reward train and score
                by how much its score is higher                   methods.scored_rows
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
    prompt, response_a, response_b  our labels (p_a), or what `reward.py score` writes (scores, which count); where all
                                    pairs of a prompt's responses stand there, one row with each one's mean
    prompt, response 1, response 2  Auto-J
    instruction, output             Alpaca (input is joined to instruction), or AlpacaEval's outputs
    query, generated_text           MetaAligner's outputs (goldens?)
    prompt, original, aligned       what align.py writes; the response is "aligned"
    prompt, or query                prompts without answers; what they should come to is called golden
"""
import bisect
import functools
import itertools
import json
import math
import random
import re
import zlib
from array import array
from collections import Counter
from dataclasses import dataclass

from common import (UserError, add_options, check_out, cli, make_parser, note, number, option, read_options,
                    write_jsonl)

from tqdm import tqdm

import chat
from files import field, first_and_all, read_json, records, shorten, shown
from formats import LABEL_MARGIN, SCORE_MARGIN, located_rated, read_pairs
from objectives import OBJECTIVES, find_objectives, nearest


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


@dataclass
class Pairing:
    """Which edits become examples, and what their prompts name. The defaults are the paper's."""
    margin: float = option(None, "a score is better if it is higher by more; none: of labels' probabilities, "
                           f"{LABEL_MARGIN}; of preference models' scores, {SCORE_MARGIN}; of all others, 0", 0)
    dominance: bool = option(False, "leave out edits that make any objective worse")
    subset: float = option(0.0, "chance that a prompt names only some of what improves", 0, 1)
    best: float = option(0.0, "chance that a prompt also names some of what cannot improve", 0, 1)
    keep: float = option(0.0, "share of edits that have nothing to do: the worse answer stays as it is, asked for what "
                         "it has already; there are none where one objective alone is scored", 0, 0.99)
    seed: int = option(0, "of the order of the objectives in each prompt, and of all that is drawn", -2**62, 2**62)


def reformulate(rated, objectives, pairing=Pairing(), template=TEMPLATE, skipped=None, ceiling=None):
    """Yield the examples of rated rows (MetaAligner's dynamic objectives reformulation), the same for a seed.

    For each two responses to a prompt, up to three: the second edited into the first, prompted with all the objectives
    on which the first is better; the first edited into the second, with all those on which the second is better; and
    the second edited into the first, to stay equal on those on which they are. Pairing changes this. An objective that
    has several wordings is asked for in one of them.
    rated: rows as read_rated yields them; a row's "margin" counts where Pairing has none. objectives: Objectives, a
        list or a dict by name; scores on others do not count. ceiling: {name: the score that cannot improve} (default:
        the highest of the row's answers).
    skipped: a Counter, told of what was left out: examples with an empty target, "better" ones whose two answers are
        the same text, edits that make another objective worse, and rows that give none.
    Yields {"prompt", "completion", "objectives": [names], "relation": "better", "equal" or "keep", "context" and
        "answer": [start, end] of the row's prompt and of the edited answer in the prompt}."""
    values = objectives.values() if isinstance(objectives, dict) else objectives
    by_name = {objective.name: objective for objective in values}
    skipped = Counter() if skipped is None else skipped
    generator = random.Random(pairing.seed)
    for row in rated:
        answers, compared = [(response["text"], scores_on(by_name, response)) for response in row["responses"]], False
        margin = row.get("margin", 0.0) if pairing.margin is None else pairing.margin
        for first, second in itertools.combinations(answers, 2):
            for source, target, names, relation in edits(first, second, margin, ceiling or highest(answers), pairing,
                                                         generator, skipped):
                compared = True
                if names:
                    generator.shuffle(names)
                    told = [by_name[name].worded(generator) for name in names]
                    yield make_example(row["prompt"], source, target, told, relation, template)
        if not compared:
            skipped["no two answers to the prompt are scored on one objective asked for"] += 1


def edits(first, second, margin, ceiling, pairing, generator, skipped):
    """Yield what is to be learned of two answers (text, scores): (source, target, names, relation)."""
    better, worse, equal = compare(first[1], second[1], margin)
    for (source, before), (target, after), names, others in ((second, first, better, worse),
                                                             (first, second, worse, better)):
        if reason := names and why_not(source, target, others if pairing.dominance else []):
            skipped[reason] += 1
            yield source, target, [], "better"
        elif names:
            yield source, target, named(names, full(after, ceiling), pairing, generator), "better"
            done = full(before, ceiling) if source.strip() else []
            if pairing.keep and done and generator.random() < pairing.keep / (1 - pairing.keep):
                yield source, source, some(done, generator), "keep"
    if equal and not first[0].strip():
        skipped["the target is empty"] += 1
    if equal:
        yield second[0], first[0], equal if first[0].strip() else [], "equal"


def full(scores, ceiling):
    """The names of scores that cannot improve."""
    return [name for name, score in scores.items() if score >= ceiling.get(name, math.inf)]


def highest(answers):
    """{name: the highest score} that any of answers [(text, scores)] has."""
    names = {name for _, scores in answers for name in scores}
    return {name: max(scores[name] for _, scores in answers if name in scores) for name in names}


def why_not(source, target, worse):
    """Why an edit that improves something, and makes `worse` worse, is left out; "" if it is not."""
    if not target.strip():
        return "the target is empty"
    if source == target:
        return "the better and the worse answer are the same"
    return "the edit makes another objective worse" if worse else ""


def named(names, best, pairing, generator):
    """What a prompt names, of `names`, which improve, and of `best`, which cannot."""
    others = [name for name in best if name not in names]
    if pairing.subset and generator.random() < pairing.subset:
        names = some(names, generator)
    if pairing.best and others and generator.random() < pairing.best:
        names = names + some(others, generator)
    return names


def some(names, generator):
    """A random part of a list, at least one of it."""
    return generator.sample(names, generator.randint(1, len(names)))


def scores_on(names, response):
    """A response's scores on some objectives; null and NaN say nothing."""
    return {name: score for name, score in response["scores"].items()
            if name in names and score is not None and score == score}


def make_example(prompt, source, target, objectives, relation, template):
    asked = "equal" if relation == "equal" else "better"
    text, context = aligner_prompt(prompt, source, objectives, asked, template)
    begin = context[1] + len(split_template(template[asked])[2])
    return {"prompt": text, "completion": target, "objectives": [objective.name for objective in objectives],
            "relation": relation, "context": context, "answer": [begin, begin + len(source)]}


def with_pair(example):
    """An example as it is written: where it says what is better, also as TRL's DPOTrainer reads it."""
    start, end = example["answer"]
    pair = {"chosen": example["completion"], "rejected": example["prompt"][start:end]}
    return {**example, **(pair if example["relation"] == "better" else {})}


def is_held_out(row, share, seed=0):
    """Whether an example, pair or preference is in the share (0 to 1) kept for validation: with a prompt, all its rows.
    Where there is no prompt, its (first) completion decides."""
    start, end = row.get("context", (0, None))
    text = row["prompt"][start:end] or completions_of(row)[0]
    return zlib.crc32(f"{seed} {text}".encode("utf-8", "replace")) < share * 2**32


# ----------------------------------------------------------------------------------------------------------------
# Token ids

TURN = re.compile(r"\n\n(?=(?:Human|Assistant): *\S)")


@dataclass(slots=True)
class Document:
    """A text as token ids, of which ids[start:] is the completion, to be learned."""
    ids: array  # of 4-byte ints: as lists, UltraFeedback's would take tens of gigabytes
    start: int


@dataclass(slots=True)
class Example:
    """What a loss sees at once: one document, the two of a pair, or all answers to a prompt, the best first."""
    documents: list  # of Document
    label: float = 1.0  # of a pair: the probability that the first is the better one
    gap: float = 0.0    # of a pair of rated responses: by how much the first one's score is higher
    rewards: list | None = None       # of ranked answers: one each
    ref_logprobs: list | None = None  # of the completions under the reference, where a method needs them


def completions_of(row):
    """The one completion of an example or pair, the two responses of a preference, or ranked ones."""
    if "ranked" in row:
        return row["ranked"]
    return [row["completion"]] if "completion" in row else [row["response_a"], row["response_b"]]


def text_ids(tokenizer, texts):
    """The ids of each text by a `tokenizers` Tokenizer: none added, none cut; a "</s>" in a text is text. Of a Chat,
    without its template."""
    tokenizer = tokenizer.tokenizer if isinstance(tokenizer, chat.Chat) else tokenizer
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def encode_prompt(tokenizer, prompt, bos_id, max_tokens=None, context=None):
    """The ids of a prompt, after BOS (or None): the very ids that training puts before a completion. A Chat asks it by
    its template, unless there is none: what is written after an empty prompt is a text.

    If there are more than max_tokens, the context ([start, end] in the prompt) loses its oldest turns, then the oldest
    words of its last turn. Returns None if the rest alone is too long."""
    begin = [] if bos_id is None else [bos_id]
    dialogue = isinstance(tokenizer, chat.Chat) and chat.is_dialogue(prompt, context)

    def ids_of(text):
        if isinstance(tokenizer, chat.Chat) and prompt:
            return tokenizer.prompt_ids(text, dialogue)
        return begin + text_ids(tokenizer, [text])[0]

    ids = ids_of(prompt)
    if max_tokens is None or len(ids) <= max_tokens:
        return ids
    start, end = context or (0, 0)
    places = chat.cuts(prompt, start, end) if dialogue else [match.end() for match in TURN.finditer(prompt, start, end)]
    if not dialogue:
        places += [match.start() for match in chat.PIECE.finditer(prompt, max([start, *places]) + 1, end)]

    def without(cut):
        return ids_of(prompt[:start] + chat.HUMAN * dialogue + prompt[cut:])

    if not places or len(without(places[-1])) > max_tokens:
        return None
    first = bisect.bisect_left(places, True, key=lambda cut: len(without(cut)) <= max_tokens)
    return without(places[first])


def encode_document(tokenizer, prompt, completion, bos_id, eos_id, max_tokens=None, context=None):
    """BOS, the prompt's ids, the completion's ids, EOS, as a Document; or None if they are over max_tokens.

    The two are encoded apart: ids[:start] is what encode_prompt gives at generation, and the ids after it decode to the
    completion. Too long ones lose the oldest turns of their context, and nothing else."""
    row = {"prompt": prompt, "completion": completion, "context": context}
    return encode_documents(tokenizer, [row], bos_id, eos_id, max_tokens)[0]


def encode_documents(tokenizer, rows, bos_id, eos_id, max_tokens=None):
    """encode_document of rows {"prompt", "completion", "context"?}: a list of Documents, None where one is too long."""
    documents = []
    for row, (prompt, completion) in zip(rows, encode_parts(tokenizer, rows, bos_id, eos_id)):
        if max_tokens is not None and len(prompt) + len(completion) > max_tokens:
            room = max_tokens - len(completion)
            prompt = encode_prompt(tokenizer, row["prompt"], bos_id, room, row.get("context"))
        documents.append(None if prompt is None else Document(array("i", prompt + completion), len(prompt)))
    return documents


def encode_parts(tokenizer, rows, bos_id, eos_id):
    """[(ids of the prompt, ids of the completion with what ends it)] of rows, however many; by a Chat, as its template
    has a question and the answer to it."""
    if isinstance(tokenizer, chat.Chat):
        return [tokenizer.encode(row["prompt"], row["completion"], chat.is_dialogue(row["prompt"], row.get("context")))
                if row["prompt"] else encode_parts(tokenizer.tokenizer, [row], bos_id, eos_id)[0] for row in rows]
    prompts = text_ids(tokenizer, [row["prompt"] for row in rows])
    completions = text_ids(tokenizer, [row["completion"] for row in rows])
    begin, end = ([] if token is None else [token] for token in (bos_id, eos_id))
    return [(begin + prompt, completion + end) for prompt, completion in zip(prompts, completions)]


def encode_examples(tokenizer, rows, bos_id, eos_id, max_tokens=None):
    """(list of Examples, number dropped as too long). Rows {"prompt", "completion", "context"?} give one document each;
    preferences give two, labelled p_a; ranked answers ("ranked", with their "rewards") as many as there are."""
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
                    label = row.get("p_a", 1.0) if len(documents) > 1 else 1.0
                    examples.append(Example(documents, label, row.get("gap", 0.0), row.get("rewards")))
            bar.update(len(chunk))
    return examples, dropped


# ----------------------------------------------------------------------------------------------------------------
# The command line


def run_reformulate(files, out, objectives, objective, queries, template, pairing, relations=None):
    """Rated files in, one file of examples out (of all relations, or of these), and a table of what it has."""
    check_out(out, [*files, queries, template, *(objectives or ())])
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

    other = Counter()

    def examples():
        bar = tqdm(rated(), desc="reformulate", unit=" rows", disable=None)
        for example in reformulate(bar, wanted, pairing, template, skipped):
            if relations and example["relation"] not in relations:
                other[example["relation"]] += 1
                continue
            made[example["relation"], len(example["objectives"])] += 1
            yield with_pair(example)
        if not made and other:
            there = ", ".join(f"{count:,} {relation}" for relation, count in other.items())
            raise UserError(f"{files[0]}: gives no {' or '.join(relations)} example, but {there}; choose of these with "
                            "--relations (keep needs --keep, and two objectives)")
        if not made:
            raise UserError(f"{files[0]}: gives no example (scored: {shorten(scored) or 'nothing'}); "
                            "give prompts with two answers or more, scored on the objectives asked for")

    count = write_jsonl(out, examples())
    if pairs_on and pairs_on[0].name not in scored:
        note(f"--objective {pairs_on[0].name}: the files say themselves what their answers are scored on")
    print(f"{out}: {count:,} examples, by how many objectives they ask for")
    print_counts(made, skipped, [*TEMPLATE, *(["keep"] if pairing.keep else [])])


def print_counts(made, skipped, relations):
    sizes = sorted({size for _, size in made})
    print(" " * 8 + "".join(f"{size:>11}" for size in [*sizes, "all"]))
    for relation in relations:
        counts = [made[relation, size] for size in sizes]
        print(f"{relation:8}" + "".join(f"{count:>11,}" for count in [*counts, sum(counts)]))
    for reason, count in skipped.items():
        print(f"left out: {count:,} because {reason}")


def run_show(file, count=3):
    """Print the first records of any file of answers."""
    (_, record), source = first_and_all(records(file), file)
    pair = "completion" in record and "label" not in record
    rows = read_pairs(file, source=source) if pair else (row for _, row in located_rated(file, "chosen", source=source))
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
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

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
    add("--template", metavar="FILE",
        help='JSON {"better": text, "equal": text}, each text with {objectives}, {prompt}, {answer}')
    add("--relations", nargs="+", choices=["better", "equal", "keep"],
        help="only such examples (default: all); TRL's DPOTrainer takes a file of better ones as it is")
    add_options(command, Pairing)

    command = commands.add_parser("show", help="print a few records of a file of answers or examples")
    command.add_argument("file", metavar="FILE")
    command.add_argument("-n", "--number", dest="count", type=number(int, 0), default=3, help="how many (default: 3)")

    args = parser.parse_args()
    if args.command == "show":
        run_show(args.file, args.count)
    else:
        run_reformulate(args.files, args.out, args.objectives, args.objective, args.queries, args.template,
                        read_options(Pairing, args), args.relations)


if __name__ == "__main__":
    cli(main)
