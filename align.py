"""Use an aligner: edit the answers of any policy towards objectives named in words.

    python align.py --model ALIGNER --data answers.csv --objectives harmless helpful --out aligned.jsonl
    python align.py --model ALIGNER --data prompts.jsonl --policy http://localhost:8000 --policy-model NAME \\
        --objectives humour "Brevity: The response should be short." --out aligned.jsonl
    python align.py --model ALIGNER --interactive

y' = aligner(prompt(q, y, objectives)) (MetaAligner, section 3.3): the policy that wrote y is never looked into, and
the objectives need not be ones that the aligner was trained on.
"""
import argparse
import csv
import hashlib
import json
import os
import sys
from pathlib import Path

import data
from data import UserError, cli


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], epilog=__doc__.split("\n", 2)[2],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, metavar="FOLDER", help="the aligner")
    add("--data", nargs="+", default=[], metavar="FILE", help="answers to edit, or prompts, in any form data.py reads")
    add("--objectives", nargs="+", default=["harmless", "helpful"], metavar="O",
        help='names, "Name: what a response must do", or JSON files, in this order (default: harmless helpful)')
    add("--out", default="aligned.jsonl", metavar="FILE", help=".jsonl(.gz) or .csv (default aligned.jsonl)")
    add("--policy", metavar="FOLDER_OR_URL", help="who answers prompts that come without an answer: a Llama folder, "
        "or an OpenAI-compatible server (key in OPENAI_API_KEY)")
    add("--policy-model", default="default", metavar="NAME", help="the model's name on that server")
    add("--queries", metavar="FILE", help="file with the queries, for outputs that lack them")
    add("--template", metavar="FILE", help="JSON with the prompt template that the aligner was trained with")
    add("--limit", type=int, metavar="N", help="only the first N rows")
    add("--rounds", type=int, default=1, metavar="N", help="edit the edit again, N times in all (default 1)")
    add("--max-new-tokens", type=int, default=1024, metavar="N", help="longest edit (default 1024)")
    add("--temperature", type=float, default=0.0, help="0, the default, takes the likeliest token")
    add("--batch", type=int, default=32, metavar="N", help="answers edited at a time (default 32)")
    add("--seed", type=int, default=0, help="of the sampling (default 0)")
    add("--device", default=None, help="cpu, cuda, ... (default: cuda where there is one)")
    add("--compile", action="store_true", help="let torch.compile fuse each block, which takes a minute or more at first")
    add("--interactive", action="store_true", help="type a question, an answer and objectives; see the edit")
    args = parser.parse_args(argv)
    if not args.data and not args.interactive:
        parser.error("give --data FILE..., or --interactive")
    for name in ("rounds", "batch", "max_new_tokens"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.limit is not None and args.limit < 1:
        parser.error("--limit must be at least 1")
    if not 0 <= args.temperature < float("inf"):
        parser.error("--temperature must be 0 or more")
    return args


if __name__ == "__main__":
    arguments()  # --help and mistyped flags are answered before the seconds that importing torch takes

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

import model  # noqa: E402
from eval import Endpoint, ansi_diff, in_parallel  # noqa: E402

# ----------------------------------------------------------------------------------------------------------------
# Who writes: a Llama in a folder, or a server

DRAFT = 15  # tokens guessed per step, at most: edits are mostly copied, so guessing makes them fast (see model.Copier)


class Writer:
    """A Llama with its tokenizer: texts in, texts out."""

    def __init__(self, folder, device=None, compiled=False):
        try:
            device = torch.zeros(0, device=device or ("cuda" if torch.cuda.is_available() else "cpu")).device
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"--device {device}: cannot be used here ({model.first_line(error)}); give cpu, or leave "
                            "it out")
        dtype = torch.bfloat16 if model.computes_bf16(device) else torch.float32
        self.llama = model.Llama.from_pretrained(folder, dtype, device).eval()
        self.tokenizer = model.load_tokenizer(folder, self.llama)
        if compiled:
            model.compile_blocks(self.llama)
        else:
            model.prepack(self.llama)

    def encode(self, prompt, new_tokens, context=None):
        """Prompt ids that leave room for new_tokens in the model's context, or None if they cannot."""
        config = self.llama.config
        room = config.max_position_embeddings - new_tokens
        return data.encode_prompt(self.tokenizer, prompt, config.bos_token_id, room, context)

    def write(self, prompts, new_tokens, rows, temperature=0.0, seeds=0):
        """Yield (number, text) of prompts (lists of token ids) as they are done, `rows` at a time, the longest first."""
        order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
        seeds = [seeds[i] for i in order] if seeds else 0
        for place, new in model.stream(self.llama, [prompts[i] for i in order], new_tokens, rows, temperature,
                                       seed=seeds, draft=DRAFT, stop_ids=self.llama.config.stop_ids):
            yield order[place], self.tokenizer.decode(new).strip()


def answered(items, policy, args):
    """Yield (number, answer) for items without an answer, from a folder or a server."""
    if policy.startswith(("http://", "https://")):
        endpoint = Endpoint(policy, args.policy_model, cache=f"{args.out}.policy-cache.jsonl", timeout=600)

        def ask(item):
            return endpoint.complete(item["prompt"], args.max_new_tokens, args.temperature, seed=args.seed)
        yield from enumerate(in_parallel(ask, items, 8))
        return
    writer = Writer(policy, args.device)
    new_tokens = min(args.max_new_tokens, writer.llama.config.max_position_embeddings // 2)
    prompts = [writer.encode(item["prompt"], new_tokens, [0, len(item["prompt"])]) for item in items]
    seeds = [seed_of(item, 0, args.seed) for item in items]
    for number, text in writer.write(prompts, new_tokens, args.batch, args.temperature, seeds):
        yield number, text.split("\n\nHuman:")[0].strip()


def seed_of(item, round_number, seed):
    """A seed for one item and round, so that its text does not depend on its neighbours in a batch."""
    return (seed * 1_000_003 + item["index"]) * 101 + round_number


# ----------------------------------------------------------------------------------------------------------------
# Editing


def align(aligner, items, objectives, template=data.TEMPLATE, rounds=1, max_new_tokens=1024, temperature=0.0, batch=32,
          seed=0):
    """Yield each item with its edit under "aligned", as they are done.

    items: dicts with "index", "prompt", "original", and "objectives" (a list of Objective) where an item has its own.
    One whose prompt does not fit the model even without its oldest turns keeps its answer and says "left_as_is"."""
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
                edited.append({**item, "aligned": answer, "left_as_is": True})
            else:
                prompts.append(ids)
                fitting.append(item)
        if last:
            yield from edited
        seeds = [seed_of(item, round_number + 1, seed) for item in fitting]
        for number, text in aligner.write(prompts, new_tokens, batch, temperature, seeds):
            edited.append({**fitting[number], "aligned": text})
            if last:
                yield edited[-1]
        items = sorted(edited, key=lambda item: item["index"])


def how(args):
    """align()'s options from the command line."""
    return {name: getattr(args, name) for name in ("rounds", "max_new_tokens", "temperature", "batch", "seed")}


def read_items(args, skipped):
    """One item per answer of the files (or per prompt, where there is none): {"index", "prompt", "original"?, ...}."""
    items = []
    for path in args.data:
        for row in data.read_rated(path, objective="chosen", queries=args.queries, skipped=skipped):
            shared = {key: row[key] for key in ("prompt", "golden") if key in row}
            for response in row["responses"] or [None]:
                if args.limit is not None and len(items) >= args.limit:
                    return items
                original = {} if response is None else {"original": response["text"]}
                items.append({"index": len(items), **shared, **original})
    return items


# ----------------------------------------------------------------------------------------------------------------
# The journal: rows as they finish, so that a second run continues where a killed one stopped


class Journal:
    """OUT.part, a line per finished row behind a first line that tells what run it belongs to."""

    def __init__(self, path, run):
        self.path, self.rows = Path(f"{path}.part"), {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists() or not self.recover(run):
            self.path.write_text(json.dumps({"run": run}) + "\n", encoding="utf-8")
        self.file = open(self.path, "a", encoding="utf-8", errors="replace")

    def recover(self, run):
        """Read what a killed run had finished; its last line may be torn and is then cut off. False where it had
        finished nothing."""
        whole = self.path.read_bytes()
        *lines, torn = whole.split(b"\n")  # not splitlines(), which would also cut at U+2028 inside an answer
        if not whole or len(lines) < 2 and whole.startswith(b'{"run": '):
            return False
        try:
            same = json.loads(lines[0])["run"] == run
            rows = [json.loads(line) for line in lines[1:]] if same else []
        except (ValueError, TypeError, KeyError, IndexError):
            raise UserError(f"{self.path}: is not the unfinished output of this program; move it, or give another "
                            "--out")
        if not same:
            raise UserError(f"{self.path}: is the unfinished output of a run with other settings; delete it, or give "
                            "those settings again, or another --out")
        os.truncate(self.path, len(whole) - len(torn))
        for row in rows:
            self.rows[row["index"]] = {**self.rows.get(row["index"], {}), **row}
        return True

    def add(self, rows):
        for row in rows:
            self.file.write(json.dumps(row, ensure_ascii=False) + "\n")
            self.rows[row["index"]] = {**self.rows.get(row["index"], {}), **row}
        self.file.flush()

    def finish(self):
        self.file.close()
        self.path.unlink()


def fingerprint(args, items, objectives, template):
    """What decides the output; equal for a run and the one that continues it."""
    settings = {key: getattr(args, key) for key in ("model", "policy", "policy_model", "rounds", "max_new_tokens",
                                                    "temperature", "seed")}
    content = json.dumps([settings, items, [str(o) for o in objectives], template], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


# ----------------------------------------------------------------------------------------------------------------
# Output


def check_out(args):
    """UserError now, rather than after hours, for an output that could not be put in place."""
    if Path(args.out).exists() and not Path(args.out).is_file():
        raise UserError(f"{args.out}: is no ordinary file; choose another --out")
    if Path(args.out).resolve() in [Path(path).resolve() for path in args.data]:
        raise UserError(f"{args.out}: is an input too; choose another --out")


def write_rows(path, rows):
    """JSONL, or CSV with the objectives joined by " | " in one cell; whole or not at all."""
    if not str(path).endswith(".csv"):
        data.write_jsonl(path, rows)
        return

    def write(aside):
        with open(aside, "w", encoding="utf-8", newline="") as file:
            columns = ["prompt", "original", "aligned", "objectives", "golden"]
            writer = csv.DictWriter(file, columns, restval="", extrasaction="ignore")
            writer.writeheader()
            writer.writerows({**row, "objectives": " | ".join(row["objectives"])} for row in rows)
    data.write_whole(path, write)


def interactive(aligner, args):
    """Question, answer, objectives; the edit as a coloured word diff. Ends with an empty question."""
    def ask(what):
        print(f"{what}: ", end="", flush=True, file=sys.stderr)
        return sys.stdin.readline().strip()
    template = data.read_template(args.template) if args.template else data.TEMPLATE
    index = 0
    while question := ask("question (empty to end)"):
        answer = ask("answer")
        wanted = ask(f"objectives, separated by ; (empty: {' '.join(args.objectives)})")
        try:
            objectives = data.find_objectives([o.strip() for o in wanted.split(";")] if wanted else args.objectives)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            continue
        item = {"index": index, "prompt": f"\n\nHuman: {question}\n\nAssistant:", "original": answer}
        edited = next(align(aligner, [item], objectives, template, **how(args)))
        print(ansi_diff(answer, edited["aligned"]))
        if edited.get("left_as_is"):
            print("(left as it is: too long for the aligner's context)", file=sys.stderr)
        index += 1


def main():
    args = arguments()
    template = data.read_template(args.template) if args.template else data.TEMPLATE
    objectives = data.find_objectives(args.objectives)
    if args.interactive:
        interactive(Writer(args.model, args.device, args.compile), args)
        return
    check_out(args)
    skipped = data.Counter()
    items = read_items(args, skipped)
    if not items:
        raise UserError(f"{args.data[0]}: no rows to align")
    unanswered = [item for item in items if "original" not in item]
    if unanswered and not args.policy:
        raise UserError(f"{args.data[0]}: {len(unanswered)} prompts have no answer; give --policy FOLDER_OR_URL, "
                        "whose answers are to be edited")
    aligner = Writer(args.model, args.device, args.compile)
    journal = Journal(args.out, fingerprint(args, items, objectives, template))
    items = [{**item, **journal.rows.get(item["index"], {})} for item in items]
    unanswered = [item for item in items if "original" not in item]
    for number, text in tqdm(answered(unanswered, args.policy, args) if unanswered else (), desc="policy answers",
                             total=len(unanswered), unit=" answers", disable=None if unanswered else True):
        unanswered[number]["original"] = text
        journal.add([{"index": unanswered[number]["index"], "original": text}])
    todo = [item for item in items if "aligned" not in item]
    with tqdm(total=len(items), initial=len(items) - len(todo), desc="aligning", unit=" answers") as bar:
        for row in align(aligner, todo, objectives, template, **how(args)):
            journal.add([row])
            bar.update()
    rows = [journal.rows[index] for index in range(len(items))]
    names = [str(objective) for objective in objectives]
    write_rows(args.out, [{"prompt": row["prompt"], "original": row["original"], "aligned": row["aligned"],
                           "objectives": names, **({"golden": row["golden"]} if "golden" in row else {})}
                          for row in rows])
    journal.finish()
    for reason, count in skipped.items():
        print(f"left out: {count} rows, {reason}")
    kept = sum(row.get("left_as_is", False) for row in rows)
    if kept:
        print(f"left as they were: {kept} answers that do not fit the aligner's context")
    changed = sum(row["aligned"] != row["original"] for row in rows)
    tally = aligner.llama.tally
    share = f"; {100 * tally['copied'] / tally['written']:.0f} % of the tokens copied" if tally["written"] else ""
    print(f"{args.out}: {len(rows)} answers, {changed} changed{share}")


if __name__ == "__main__":
    cli(main)
