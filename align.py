"""Use an aligner: edit the answers of any policy towards objectives named in words.

    python align.py --model ALIGNER --data answers.csv --objectives helpful "Brevity: Be short" --out aligned.jsonl
    python align.py --model ALIGNER --data prompts.jsonl --policy http://localhost:8000 --policy-model NAME
    python align.py --model ALIGNER --interactive

y' = aligner(prompt(q, y, objectives)) (MetaAligner, section 3.3): the policy that wrote y is never looked into, and
the objectives need not be ones that the aligner was trained on. A killed run goes on when it is started again.
"""
import csv
import itertools
import sys
from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from common import (UserError, add_options, check_out, cli, digest, lasting, make_parser, note, number, option,
                    read_options, refuse_given, seed_from, write_jsonl, write_whole)

import torch
from tqdm import tqdm

import chat
import checkpoint
import data
import formats
from endpoint import Endpoint, TooLong, in_parallel
from generate import Acceptance, prepack, stream
from model import computes_bf16, device_named
from objectives import OBJECTIVES, find_objectives, row_objectives
from report import ansi_diff
from resume import Journal


@dataclass
class Options:
    """How to edit."""
    rounds: int = option(1, "edit the edit again, so many times in all", 1, 10**6)
    max_new_tokens: int = option(1024, "longest edit", 1, 10**9)
    batch: int = option(32, "answers edited at a time", 1, 10**9, free=True)
    seed: int = option(0, "of the sampling", 0, 2**60)


@dataclass
class Sampling:
    """How each token is chosen: the keywords of generate.filtered_probs."""
    temperature: float = option(0.0, "0 takes the likeliest token", 0, 1e9)
    top_k: int = option(0, "draw among so many of the likeliest tokens; 0: among all", 0, 10**9)
    top_p: float = option(1.0, "draw among the likeliest tokens that together have this probability", 1e-9, 1)
    min_p: float = option(0.0, "leave out tokens with less than this share of the likeliest one's probability", 0, 1)


# ----------------------------------------------------------------------------------------------------------------
# Who writes: a Llama in a folder, or a server

DRAFT = 15  # tokens looked up per step, at most: edits are mostly copied (see generate.Lookup)


class Writer:
    """A Llama with its tokenizer: texts in, texts out. chat_template: "auto", as the model was trained, or "plain"."""

    def __init__(self, folder, device=None, chat_template="auto"):
        device = device_named(device)
        dtype = torch.bfloat16 if computes_bf16(device) else torch.float32
        self.llama = prepack(checkpoint.load(folder, dtype, device).eval())
        tokenizer = checkpoint.load_tokenizer(folder, self.llama)
        self.tokenizer = chat.with_template(tokenizer, folder, self.llama.config, chat_template)
        self.acceptance = Acceptance()

    def encode(self, prompt, new_tokens, context=None):
        """Prompt ids that leave room for new_tokens in the model's context, or None if they cannot."""
        config = self.llama.config
        room = config.max_position_embeddings - new_tokens
        prompt = prompt.encode("utf-8", "replace").decode()  # half a surrogate pair, which no tokenizer takes, is a "?"
        return data.encode_prompt(self.tokenizer, prompt, config.bos_token_id, room, context)

    def write(self, prompts, new_tokens, rows, seeds=0, **sampling):
        """Yield (place, text) of prompts (lists of token ids) as they are done, `rows` at a time, the longest first."""
        order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
        seeds = [seeds[i] for i in order] if seeds else 0
        for place, new in stream(self.llama, [prompts[i] for i in order], new_tokens, rows, seed=seeds, draft=DRAFT,
                                 stop_ids=self.llama.config.stop_ids, acceptance=self.acceptance, **sampling):
            yield order[place], self.tokenizer.decode(new).strip()


def is_url(policy):
    return policy.startswith(("http://", "https://"))


def fingerprint(policy, chat_template):
    """All that is known of how a Llama in a folder, or a server, answers."""
    return policy if is_url(policy) else [checkpoint.fingerprint(policy), chat.fingerprint(policy, chat_template)]


def policy_answers(items, policy, policy_model="default", cache=None, device=None, max_new_tokens=1024, temperature=0.0,
                   batch=32, seed=0, chat_template="auto"):
    """Yield (place, answer) of items {"index", "prompt"}, as they are done, by a Llama in a folder or a server at a
    URL. The answer is None to a prompt that does not fit the policy's context, "" where the policy said nothing.
    cache: a file of the server's replies."""
    if is_url(policy):
        def ask(item):
            try:
                return endpoint.complete(item["prompt"], max_new_tokens, temperature, seed=seed) or ""
            except TooLong:
                return None
        with closing(Endpoint(policy, policy_model, cache=cache, timeout=600)) as endpoint:
            yield from enumerate(in_parallel(ask, items, 8))
        return
    yield from written_answers(Writer(policy, device, chat_template), items, max_new_tokens, temperature, batch, seed)


def written_answers(writer, items, max_new_tokens, temperature, batch, seed):
    """As policy_answers, by a Writer."""
    new_tokens = min(max_new_tokens, writer.llama.config.max_position_embeddings // 2)
    prompts = [writer.encode(item["prompt"], new_tokens, [0, len(item["prompt"])]) for item in items]
    fitting = [i for i, prompt in enumerate(prompts) if prompt]
    yield from ((i, None) for i, prompt in enumerate(prompts) if not prompt)
    seeds = [seed_from(seed, items[i]["index"], 0) for i in fitting]
    for place, text in writer.write([prompts[i] for i in fitting], new_tokens, batch, seeds, temperature=temperature):
        yield fitting[place], text.split("\n\nHuman:")[0].strip()


# ----------------------------------------------------------------------------------------------------------------
# Editing


def align(aligner, items, objectives, template=data.TEMPLATE, rounds=1, max_new_tokens=1024, batch=32, seed=0,
          **sampling):
    """Yield each item with its edit under "aligned", as they are done.

    items: dicts with "index", "prompt", "original", and "objectives" (a list of Objective) where an item has its own.
    One whose prompt does not fit the model even without its oldest turns keeps its answer and says "left_as_is".
    sampling: temperature, top_k, ... (see generate.stream)."""
    new_tokens = min(max_new_tokens, aligner.llama.config.max_position_embeddings // 2)
    for round_number in range(rounds):
        last = round_number + 1 == rounds
        prompts, fitting, edited = [], [], []
        for item in items:
            answer = item.get("aligned", item["original"])
            text, context = data.aligner_prompt(item["prompt"], answer, item.get("objectives", objectives),
                                                template=template)
            ids = aligner.encode(text, new_tokens, context)
            if ids is None:
                edited.append({**item, "aligned": answer, "left_as_is": item.get("left_as_is", "aligned" not in item)})
            else:
                prompts.append(ids)
                fitting.append(item)
        if last:
            yield from edited
        seeds = [seed_from(seed, item["index"], round_number + 1) for item in fitting]
        for i, text in aligner.write(prompts, new_tokens, batch, seeds, **sampling):
            edited.append({**fitting[i], "aligned": text})
            if last:
                yield edited[-1]
        items = sorted(edited, key=lambda item: item["index"])


# ----------------------------------------------------------------------------------------------------------------
# Files in, files out

DEFAULT = ["harmless", "helpful"]  # objectives, where neither the user nor a row names any
COLUMNS = ("prompt", "original", "aligned", "objectives", "golden")
JOINT = " | "  # between the objectives in a cell of a CSV file


def read_items(paths, objectives=None, queries=None, limit=None, skipped=None):
    """One item per answer of the files (or per prompt, where there is none): {"index", "prompt", "original"?,
    "golden"?, "objectives": texts}. objectives: Objectives for every item; None: each row's own, or DEFAULT."""
    answers = ((where, row, response) for path in paths
               for where, row in formats.located_rated(path, objective="chosen", queries=queries, skipped=skipped)
               for response in row["responses"] or [None])
    items, unheeded, shared = [], 0, objectives or find_objectives(DEFAULT)
    for index, (where, row, response) in enumerate(itertools.islice(answers, limit)):
        own = row.get("objectives")
        unheeded += bool(own and objectives)
        told = own_objectives(own, where) if own and not objectives else shared
        item = {"index": index, **{key: row[key] for key in ("prompt", "golden") if key in row},
                "objectives": [str(objective) for objective in told]}
        items.append(item if response is None else {**item, "original": response["text"]})
    if unheeded:
        note(f"{unheeded} of {len(items)} answers come with objectives of their own; --objectives is used instead")
    return items


def asked_for(texts):
    """The Objectives in texts, as find_objectives takes them. UserError for one in several wordings of the user's own:
    an edit is asked for in one."""
    found = find_objectives(texts)
    for objective in found:
        if objective.wordings and objective != OBJECTIVES.get(objective.name):
            raise UserError(f"objective {objective.name!r} has several wordings, with ' | ' between them; give one")
    return found


def own_objectives(texts, where):
    """The Objectives that a row names, in texts as on the command line, but for files. Raises UserError."""
    try:
        if any(text.endswith(".json") for text in texts):
            raise UserError('a row names no file of objectives; write "Name: description" there')
        return asked_for(texts)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def write_rows(path, rows):
    """JSONL, or CSV with the objectives joined by JOINT in one cell; whole or not at all."""
    if not str(path).endswith(".csv"):
        write_jsonl(path, rows)
        return

    def write(aside):
        with open(aside, "w", encoding="utf-8", errors="replace", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, restval="", extrasaction="ignore")
            writer.writeheader()
            writer.writerows({**row, "objectives": JOINT.join(row["objectives"])} for row in rows)
    write_whole(path, write)


# ----------------------------------------------------------------------------------------------------------------
# Command line


def arguments(argv=None):
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--model", required=True, metavar="FOLDER", help="the aligner")
    add("--data", nargs="+", metavar="FILE", help="answers (or edits) to edit, or prompts, in any form data.py reads")
    add("--objectives", nargs="+", metavar="O", help='names, "Name: what a response must do", or JSON files, in this '
        f"order, for all rows (default: each row's own or, where it has none, {' '.join(DEFAULT)})")
    add("--out", default="aligned.jsonl", metavar="FILE", help=".jsonl(.gz) or .csv (default aligned.jsonl)")
    add("--policy", metavar="FOLDER_OR_URL", help="who answers prompts that come without an answer: a Llama folder, "
        "or an OpenAI-compatible server (key in OPENAI_API_KEY)")
    add("--policy-model", default="default", metavar="NAME", help="the model's name on that server")
    add("--queries", metavar="FILE", help="file with the queries, for outputs that lack them")
    add("--template", metavar="FILE", help="JSON with the prompt template that the aligner was trained with")
    add("--chat-template", choices=["auto", "plain"], default="auto", help="auto: ask aligner and policy by their own "
        "chat templates, where their folders have one and they were not trained without it; plain: without")
    add("--limit", type=number(int, 1), metavar="N", help="only the first N answers, or prompts")
    add_options(parser, Options)
    add_options(parser, Sampling)
    add("--device", default=None, help="cpu, cuda, ... (default: cuda where there is one)")
    add("--interactive", action="store_true", help="type a question, an answer and objectives; see the edit")
    args = parser.parse_args(argv)
    if not args.data and not args.interactive:
        parser.error("give --data FILE..., or --interactive")
    if not args.temperature:
        refuse_given(parser, args, vars(Sampling()).keys() - {"temperature"}, "needs a --temperature above 0")
    return args


def interactive(aligner, wanted, template, **options):
    """Question, answer, objectives (by default the texts `wanted`); the edit as a coloured word diff. Ends with an
    empty question. options: as of `align`."""
    def ask(what):
        print(f"{what}: ", end="", flush=True, file=sys.stderr)
        return sys.stdin.readline().strip()
    index = 0
    while question := ask("question (empty to end)"):
        answer = ask("answer")
        said = ask(f"objectives, separated by ; (empty: {' '.join(wanted)})")
        try:
            objectives = asked_for([text.strip() for text in said.split(";")] if said else wanted)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            continue
        item = {"index": index, "prompt": f"\n\nHuman: {question}\n\nAssistant:", "original": answer}
        edited = next(align(aligner, [item], objectives, template, **options))
        print(ansi_diff(answer, edited["aligned"]))
        if edited.get("left_as_is"):
            print("(left as it is: too long for the aligner's context)", file=sys.stderr)
        index += 1


def main():
    args = arguments()
    options, sampling = read_options(Options, args), read_options(Sampling, args)
    template = data.read_template(args.template) if args.template else data.TEMPLATE
    wanted = args.objectives or DEFAULT
    objectives = asked_for(wanted)
    if args.interactive:
        aligner = Writer(args.model, args.device, args.chat_template)
        interactive(aligner, wanted, template, **vars(options), **vars(sampling))
    else:
        edit_files(args, options, sampling, template, objectives if args.objectives else None)


def edit_files(args, options, sampling, template, objectives):
    """Edit the answers of --data into --out, after the policy has given those that are missing."""
    files = [text for text in args.objectives or () if text.endswith(".json")]
    check_out(args.out, [*args.data, *files, args.queries, args.template])
    skipped = Counter()
    items = read_items(args.data, objectives, args.queries, args.limit, skipped)
    if not items:
        raise UserError(f"{args.data[0]}: no rows to align")
    if args.out.endswith(".csv") and any(JOINT.join(i["objectives"]).split(JOINT) != i["objectives"] for i in items):
        raise UserError(f"{args.out}: no CSV file can hold objectives with {JOINT!r} in them; give --out FILE.jsonl")
    unanswered = [item for item in items if "original" not in item]
    if unanswered and not args.policy:
        raise UserError(f"{args.data[0]}: {len(unanswered)} prompts have no answer; give --policy FOLDER_OR_URL, "
                        "whose answers are to be edited")
    if Path(args.out).exists():
        note(f"{args.out}: exists already; it is replaced when all is done")
    aligner = Writer(args.model, args.device, args.chat_template)
    policy = fingerprint(args.policy, args.chat_template) if unanswered else args.policy
    journal = Journal(args.out, digest(fingerprint(args.model, args.chat_template), policy, args.policy_model,
                                       lasting(options),
                                       vars(sampling), items, template))
    for item in items:
        item.update(journal.rows.get(item["index"], {}))
    if asked := [item for item in unanswered if "original" not in item]:
        answers = policy_answers(asked, args.policy, args.policy_model, f"{args.out}.policy-cache.jsonl", args.device,
                                 options.max_new_tokens, sampling.temperature, options.batch, options.seed,
                                 args.chat_template)
        for i, text in tqdm(answers, "policy answers", len(asked), unit=" answers"):
            asked[i]["original"] = text
            if text or not is_url(args.policy):  # after a kill, a server is asked again
                journal.add({"index": asked[i]["index"], "original": text})
    faults = {item["index"]: "that do not fit the policy's context" if item["original"] is None else
              "to which the policy gave an empty answer" for item in unanswered if not (item["original"] or "").strip()}
    items = [item for item in items if item["index"] not in faults]
    todo = [{**item, "objectives": row_objectives(item)} for item in items if "aligned" not in item]
    edits = align(aligner, todo, None, template, **vars(options), **vars(sampling))
    for row in tqdm(edits, "aligning", len(items), initial=len(items) - len(todo), unit=" answers"):
        journal.add({key: row[key] for key in ("index", "aligned", "left_as_is") if key in row})
    rows = [{**item, **journal.rows[item["index"]]} for item in items]
    write_rows(args.out, [{key: row[key] for key in COLUMNS if key in row} for row in rows])
    journal.finish()
    tell(args.out, rows, skipped, Counter(faults.values()), aligner.acceptance)


def tell(out, rows, skipped, faults, acceptance):
    """What was left out, what was changed, and how much of it was copied."""
    for reason, count in skipped.items():
        print(f"left out: {count} rows, {reason}")
    for reason, count in faults.items():
        print(f"left out: {count} prompts {reason}")
    if kept := sum(row.get("left_as_is", False) for row in rows):
        print(f"left as they were: {kept} answers that do not fit the aligner's context")
    changed = sum(row["aligned"] != row["original"] for row in rows)
    share = f"; {100 * acceptance.share:.0f} % of the tokens copied" if acceptance.written else ""
    print(f"{out}: {len(rows)} answers, {changed} changed{share}")


if __name__ == "__main__":
    cli(main)
