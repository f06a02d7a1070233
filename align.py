"""Use an aligner: edit the answers of any policy towards objectives named in words.

    python align.py --model ALIGNER --data answers.csv --objectives helpful "Brevity: Be short" --out aligned.jsonl
    python align.py --model ALIGNER --data prompts.jsonl --policy http://localhost:8000 --policy-model NAME
    python align.py --model ALIGNER --interactive

y' = aligner(prompt(q, y, objectives)) (MetaAligner, section 3.3): the policy that wrote y is never looked into, and
the objectives need not be ones that the aligner was trained on. A killed run goes on when it is started again.

--best-of 8 takes of eight edits of each answer the one that was asked for most (choose.py). Many answers: --model may
be a server's URL, with --model-name NAME, which is asked --batch questions at a time; or each of N processes takes the
rows I, I + N, ... of the input, by --shard I/N, with an output of its own; `cat` joins these.
"""
import functools
import sys
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass

from common import (UserError, add_options, check_out, cli, digest, lasting, make_parser, number, option, read_options,
                    refuse_given, seed_from)

from tqdm import tqdm

import choose
import data
from answers import DEFAULT, Items, asked_for, check, finished, shard, windows, write_rows
from objectives import row_objectives
from report import ansi_diff
from resume import Journal
from writers import Served, Writer, answers_of, fingerprint, is_url, opened


@dataclass
class Options:
    """How to edit."""
    rounds: int = option(1, "edit the edit again, so many times in all", 1, 10**6)
    max_new_tokens: int = option(1024, "longest edit", 1, 10**9)
    batch: int = option(32, "answers edited, or questions to a server, at a time (to a policy's, 8 at most)", 1, 10**9,
                        free=True)
    seed: int = option(0, "of the sampling", 0, 2**60)


@dataclass
class Sampling:
    """How each token is chosen: the keywords of generate.filtered_probs."""
    temperature: float = option(0.0, "0 takes the likeliest token (of several edits: for the first)", 0, 1e9)
    top_k: int = option(0, "draw among so many of the likeliest tokens; 0: among all", 0, 10**9)
    top_p: float = option(1.0, "draw among the likeliest tokens that together have this probability", 1e-9, 1)
    min_p: float = option(0.0, "leave out tokens with less than this share of the likeliest one's probability", 0, 1)


# ----------------------------------------------------------------------------------------------------------------
# Editing


def align(aligner, items, objectives, template=data.TEMPLATE, rounds=1, max_new_tokens=1024, batch=32, seed=0,
          choice=choose.Choice(), **sampling):
    """Yield each item with its edit under "aligned", as they are done.

    items: dicts with "index", "prompt", "original", and "objectives" (a list of Objective) where an item has its own.
    One whose prompt does not fit the model even without its oldest turns keeps its answer and says "left_as_is".
    choice: of how many edits which one is taken. sampling: temperature, top_k, ... (see generate.stream)."""
    new_tokens = aligner.room(max_new_tokens)

    def asking(item, objectives):
        text, context = data.aligner_prompt(item["prompt"], answer_of(item), objectives, template=template)
        return aligner.encode(text, new_tokens, context)
    for round_number in range(rounds):
        last = round_number + 1 == rounds
        prompts, fitting, edited = [], [], []
        for item in items:
            prompt = asking(item, item.get("objectives", objectives))
            if prompt is None:
                edited.append(edited_item(item, None))
            else:
                prompts.append(prompt)
                fitting.append(item)
        if last:
            yield from edited
        seeds = [seed_from(seed, item["index"], round_number + 1) for item in fitting]
        write = aligner.write
        if choice.best_of > 1:
            write = functools.partial(choose.write, aligner, choice, list(map(answer_of, fitting)),
                                      [asking(item, []) or prompt for item, prompt in zip(fitting, prompts)])
        for i, text in write(prompts, new_tokens, batch, seeds, **sampling):
            edited.append(edited_item(fitting[i], text))
            if last:
                yield edited[-1]
        items = sorted(edited, key=lambda item: item["index"])


def answer_of(item):
    """The answer that is to be edited: that of the last round."""
    return item.get("aligned", item["original"])


def edited_item(item, text):
    """The item with its edit; None, an edit that does not fit the model, leaves it as it is."""
    if text is not None:
        return {**item, "aligned": text}
    untouched = item.get("left_as_is", "aligned" not in item)  # if this is not the first round, it may have been edited
    return {**item, "aligned": answer_of(item), "left_as_is": untouched}


# ----------------------------------------------------------------------------------------------------------------
# Command line


def arguments(argv=None):
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--model", required=True, metavar="FOLDER_OR_URL", help="the aligner: a folder, or an OpenAI-compatible server "
        "(key in OPENAI_API_KEY); --max-new-tokens is then to leave its context room for the prompt")
    add("--model-name", metavar="NAME", help="the aligner's name on that server")
    add("--data", nargs="+", metavar="FILE", help="answers (or edits) to edit, or prompts, in any form data.py reads")
    add("--objectives", nargs="+", metavar="O", help='names, "Name: what a response must do", or JSON files, in this '
        f"order, for all rows (default: each row's own or, where it has none, {' '.join(DEFAULT)})")
    add("--out", metavar="FILE", help=".jsonl(.gz) or .csv (default aligned.jsonl)")
    add("--policy", metavar="FOLDER_OR_URL", help="who answers prompts that come without an answer: a Llama folder, "
        "or an OpenAI-compatible server (key in OPENAI_API_KEY)")
    add("--policy-model", metavar="NAME", help="the model's name on that server (default: default)")
    add("--queries", metavar="FILE", help="file with the queries, for outputs that lack them")
    add("--template", metavar="FILE", help="JSON with the prompt template that the aligner was trained with")
    add("--chat-template", choices=["auto", "plain"], help="auto: ask aligner and policy by their own chat templates, "
        "where their folders have one and they were not trained without it; plain: without (default auto). An aligner "
        "behind a server is asked by its completions; auto: by its chat completions, for one with such a template")
    add("--limit", type=number(int, 1), metavar="N", help="only the first N answers, or prompts")
    add("--shard", type=shard, metavar="I/N", help="of these, only the rows I, I + N, I + 2N, ..., I from 0 to N - 1")
    for group in (Options, Sampling, choose.Choice):
        add_options(parser, group)
    add("--device", default=None, help="cpu, cuda, ... (default: cuda where there is one)")
    add("--interactive", action="store_true", help="type a question, an answer and objectives; see the edit")
    args = parser.parse_args(argv)
    if not args.data and not args.interactive:
        parser.error("give --data FILE..., or --interactive")
    args.asked_by = args.chat_template or ("plain" if is_url(args.model) else "auto")  # the aligner
    args.chat_template = args.chat_template or "auto"                                  # the policy
    if is_url(args.model):
        if not args.model_name:
            parser.error("--model URL needs --model-name")
        refuse_given(parser, args, ["top_k", "min_p", "best_of"], "is nothing that OpenAI-compatible servers know")
        if not args.policy or is_url(args.policy):
            refuse_given(parser, args, ["device"], "is for a folder; the server has a device of its own")
    else:
        refuse_given(parser, args, ["model_name"], "is an aligner's behind a server; give --model URL")
    if not is_url(args.policy or ""):
        refuse_given(parser, args, ["policy_model"], "is a policy's behind a server; give --policy URL")
    args.policy_model = args.policy_model or "default"
    if args.interactive:
        refuse_given(parser, args, ["shard", "data", "policy", "queries", "limit", "out"], "is not for --interactive")
    args.out = args.out or "aligned.jsonl"
    if args.out.endswith(".csv.gz"):
        parser.error("--out: CSV is written as it is; give FILE.csv or FILE.jsonl.gz")
    elif args.shard and args.out.endswith(".csv"):
        parser.error("--shard: CSV files cannot be joined by cat; give --out FILE.jsonl")
    if (args.best_of or 1) == 1:
        refuse_given(parser, args, ["guidance", "edit_cost"], "needs --best-of 2 or more")
    if not args.temperature and (args.best_of or 1) == 1:
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
            print("(left as it is: too long for the aligner's context or --max-new-tokens)", file=sys.stderr)
        index += 1


def main():
    args = arguments()
    options, sampling, choice = (read_options(group, args) for group in (Options, Sampling, choose.Choice))
    template = data.read_template(args.template) if args.template else data.TEMPLATE
    wanted = args.objectives or DEFAULT
    objectives = asked_for(wanted)
    if args.interactive:
        interactive(aligner_of(args), wanted, template, choice=choice, **vars(options), **vars(sampling))
    else:
        edit_files(args, options, sampling, choice, template, objectives if args.objectives else None)


def aligner_of(args):
    if is_url(args.model):
        return Served(args.model, args.model_name, args.asked_by)
    return Writer(args.model, args.device, args.asked_by)


def edit_files(args, options, sampling, choice, template, objectives):
    """Edit the answers of --data into --out, after the policy has given those that are missing."""
    files = [text for text in args.objectives or () if text.endswith(".json")]
    check_out(args.out, [*args.data, *files, args.queries, args.template])
    items = Items(args.data, objectives, args.queries, args.limit, args.shard)
    check(items, args.out, args.policy)
    content, aligner = items.digest, aligner_of(args)
    answered_by = fingerprint(args.policy, args.chat_template) if items.unanswered else args.policy
    journal = Journal(args.out, digest(fingerprint(args.model, args.asked_by), args.model_name, args.asked_by,
                                       answered_by, args.policy_model, lasting(options), vars(sampling), vars(choice),
                                       content, template))
    with ExitStack() as stack:
        policy = functools.cache(lambda: stack.enter_context(  # called only where an answer is missing still
            opened(args.policy, args.policy_model, f"{args.out}.policy-cache.jsonl", args.device, args.chat_template)))
        done, faults = sum("aligned" in row for row in journal.rows.values()), Counter()
        bar = stack.enter_context(tqdm(total=items.count, initial=done, desc="aligning", unit=" answers"))
        for window in windows(items):
            missing = [item for item in window if "original" not in item]
            for item in window:
                item.update(journal.rows.get(item["index"], {}))
            if asked := [item for item in missing if "original" not in item]:
                answers = answers_of(policy(), asked, options.max_new_tokens, sampling.temperature, options.batch,
                                     options.seed)
                for i, text in tqdm(answers, "policy answers", len(asked), unit=" answers", leave=False):
                    asked[i]["original"] = text
                    if text or not is_url(args.policy):  # after a kill, a server is asked again
                        journal.add({"index": asked[i]["index"], "original": text})
            left_out = {item["index"]: "that do not fit the policy's context" if item["original"] is None else
                        "to which the policy gave an empty answer" for item in missing
                        if not (item["original"] or "").strip()}
            faults.update(left_out.values())
            todo = [{**item, "objectives": row_objectives(item)} for item in window
                    if "aligned" not in item and item["index"] not in left_out]
            for row in align(aligner, todo, None, template, choice=choice, **vars(options), **vars(sampling)):
                journal.add({key: row[key] for key in ("index", "aligned", "left_as_is") if key in row})
                bar.update()
    told = Counter()
    write_rows(args.out, finished(items, content, journal, told))
    journal.finish()
    tell(args.out, told, items.skipped, faults, aligner.acceptance)


def tell(out, told, skipped, faults, acceptance):
    """What was left out, what was changed, and how much of it was copied."""
    for reason, count in skipped.items():
        print(f"left out: {count} rows, {reason}")
    for reason, count in faults.items():
        print(f"left out: {count} prompts {reason}")
    if told["kept"]:
        print(f"left as they were: {told['kept']} answers that do not fit the aligner's context and --max-new-tokens")
    if told["empty"]:
        print(f"empty: {told['empty']} edits, of answers that are not")
    share = f"; {100 * acceptance.share:.0f} % of the tokens copied" if acceptance.written else ""
    print(f"{out}: {told['rows']} answers, {told['changed']} changed{share}")


if __name__ == "__main__":
    cli(main)
