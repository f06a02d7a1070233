"""The whole story on the embedded world, in the order of MetaAligner's paper; `make train` runs it.

    1. a foundation model is pretrained          5. every policy answers questions
    2. two policies are trained on it            6. the aligner edits the answers, on trained and held-out objectives
    3. rated answers are reformulated            7. exact judges compare, and a report is written
    4. the aligner is trained in three steps

The aligner never sees a policy. Some wordings of objectives, some words, a verb and two combinations of verbs are kept
from it (wordings.py says which), and what it does to objectives that nobody named is measured too (measure.py).
"""
import itertools
import random
import sys
from dataclasses import replace
from pathlib import Path

from common import announce, cli, make_parser, write_jsonl
import checkpoint
import data
import formats
import measure
import toy
import train
import wordings
from align import Writer, align
from endpoint import Endpoint
from eval import evaluate, exact_judge, exact_room
from model import Config, Llama, device_named
from report import ansi_diff, bar_chart, pick_examples, print_table, write_report, write_svg
from resume import whole_run

FOUNDATION = dict(hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=6,
                  num_key_value_heads=3, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1,
                  max_position_embeddings=1024)
SMALL = {**FOUNDATION, "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 3,
         "num_key_value_heads": 3}
SMALL_STEPS = 300  # it starts from nothing; the large policy, which starts from the foundation, takes 100
COMMON = dict(weight_decay=0.01, epochs=1.0, max_tokens=512, val_share=0.01, val_every=100, save_seconds=60.0)
PRETRAIN = train.Options(lr=3e-3, batch=32, **COMMON)
READING = {"words": 240, "texts": 720}  # optimizer steps of what the foundation reads
POLICY = train.Options(lr=3e-3, batch=32, max_steps=100, **COMMON)
ALIGNER = train.Options(lr=3e-3, batch=32, warmup_data=0.5, **COMMON)
STEPS = {"identity": 40, "equal": 10, "better": 880}  # optimizer steps of the aligner's three steps
PAIRING = data.Pairing(dominance=True, best=0.2, keep=0.15)
QUESTIONS = 7000                                      # rated for the aligner's pairs
REPLAY = 0.15                                         # share of pretraining texts in the aligner's batches
PROMPTS = 64                                          # questions to each policy


# ----------------------------------------------------------------------------------------------------------------
# Training


def pretrain(out, seed, device, steps=READING, shape=FOUNDATION, phrases=()):
    """The foundation model, in out/foundation: it repeats made-up words, then reads texts. Gives these.

    Its tokenizer is made of texts about made-up words, so that real ones, read or never read, are in pieces alike; the
    world's phrases, and further ones, are one token each."""
    def rows_of(part):
        count = round(1.02 * PRETRAIN.batch * steps[part]) + 10
        if part == "words":
            return list(toy.repetitions(count, seed))
        return [{"prompt": "", "completion": text} for text in toy.pretraining_texts(count, seed)]
    notes = (text.partition("\n\n")[0] for text in toy.pretraining_texts(8000, seed, made_up=1.0))
    tokenizer = toy.train_tokenizer(notes, 1536, [*toy.phrases(), *phrases])
    vocabulary = -(-tokenizer.get_vocab_size() // 64) * 64  # a multiple of 64 is what matrix units like
    llama = Llama(Config(vocab_size=vocabulary, **shape), seed).to(device)
    options, rows = replace(PRETRAIN, seed=seed), {part: rows_of(part) for part in steps}
    stages = [train.prepare("sft" if part == "words" else "pretrain", rows[part], tokenizer, llama.config, options)
              for part in steps]
    train.train(llama, tokenizer, stages, out / "foundation", options, resume=True, overwrite=True)
    return [row["completion"] for row in rows["texts"]]


def train_policies(out, foundation, seed, device):
    """Two sizes: "large" goes on from the foundation, "small" starts from nothing; each with its own bad manners."""
    tokenizer = checkpoint.load_tokenizer(foundation)
    for name in ("small", "large"):
        rng = random.Random(f"{name} {seed}")
        options = replace(POLICY, seed=seed, max_steps=SMALL_STEPS if name == "small" else POLICY.max_steps)
        prompts = [toy.question(rng)[0] for _ in range(options.batch * options.max_steps)]
        rows = [{"prompt": prompt, "completion": f" {toy.answer(name, prompt, rng)}"} for prompt in prompts]
        base = checkpoint.load(foundation, device=device)
        if name == "small":
            base = Llama(Config(vocab_size=base.config.vocab_size, **SMALL), seed).to(device)
        stage = train.prepare("sft", rows, tokenizer, base.config, options)
        train.train(base, tokenizer, [stage], out / name, options, resume=True, overwrite=True)


def write_pairs(out, seed, pairing=PAIRING, questions=QUESTIONS, worded=True, **rating):
    """Rated answers to files, and the pairs made of them, each objective in one of its wordings (or, not worded, in the
    same one always). rating: keywords of toy.rated."""
    rows = list(toy.rated(questions, seed + 1, **rating))
    names = sorted({name for row in rows for response in row["responses"] for name in response["scores"]})
    objectives = [wordings.objective(name) for name in names]
    if not worded:
        objectives = [replace(objective, wordings=()) for objective in objectives]
    pairs = data.reformulate(rows, objectives, replace(pairing, seed=seed),
                             ceiling={name: toy.best(name) for name in names})
    write_jsonl(out / "rated.jsonl", rows)
    write_jsonl(out / "pairs.jsonl", map(after_a_space, pairs))
    return out / "pairs.jsonl"


def after_a_space(pair):
    """A pair whose target begins with a space, as the answer in its prompt does: so a sentence is the same token in
    both, wherever it stands."""
    begin, end = pair["answer"]
    return {**pair, "completion": f" {pair['completion']}", "answer": [begin - 1, end]}


def train_aligner(out, foundation, pairs, texts, seed, device, steps=STEPS):
    llama = checkpoint.load(foundation, device=device)
    tokenizer = checkpoint.load_tokenizer(foundation, llama)
    stages = []
    for name, count in steps.items():
        options = replace(ALIGNER, seed=seed)
        rows = train.METHODS[name].rows([pairs], options)
        random.Random(seed).shuffle(rows)
        enough = round(count * options.batch * (1 - REPLAY) * 1.02)  # so that an epoch has so many steps
        stages.append(train.prepare(name, rows[:enough], tokenizer, llama.config, options, texts[:2000], REPLAY))
    train.train(llama, tokenizer, stages, out, options, resume=True, overwrite=True)


# ----------------------------------------------------------------------------------------------------------------
# Questions, answers and what is asked of them


def ask_policy(name, prompts, out, seed, device):
    """One answer of a policy to each prompt. All that anybody ever learns of a policy is this text."""
    rng = random.Random(f"{name} answers {seed}")
    if name == "blackbox":
        server = toy.serve(name)
        endpoint = Endpoint(server.url, name)
        texts = [endpoint.complete(prompt, 256) for prompt in prompts]
        server.shutdown()
        return texts
    if name in ("small", "large"):
        writer = Writer(out / name, device)
        ids = [writer.encode(prompt, 256) for prompt in prompts]
        texts = dict(writer.write(ids, 256, 64, temperature=1.0, seeds=[seed * 10_007 + i for i in range(len(ids))]))
        return [texts[i] for i in range(len(prompts))]
    return [toy.answer(name, prompt, rng) for prompt in prompts]


JUDGED = ("all nine", "mention a trained word", "mention a word never read", "avoid a trained word",
          "avoid a word never read")  # the kinds of requests that are compared with golden answers


def judged_objectives(item):
    """The objectives that an edit is judged on, wishes of a kind pooled under one name, and whether it stayed whole."""
    named = [f"{name if item['kind'] == 'all nine' else item['kind']}: {objective.description}"
             for name, objective in zip(item["names"], item["objectives"])]
    return [*named, str(toy.INTACT)]


def edit(aligner, items, seed, **sampling):
    """The items with their edits under "aligned", in their order."""
    items = [{**item, "index": index} for index, item in enumerate(items)]
    edits = align(aligner, items, None, batch=64, max_new_tokens=256, seed=seed, **sampling)
    return sorted(edits, key=lambda item: item["index"])


def judge(edited, seed):
    """Of edited items, those of the kinds in JUDGED as rows as align.py writes them, and their figures."""
    rng = random.Random(f"golden {seed}")
    rows = [{"prompt": item["prompt"], "original": item["original"], "aligned": item["aligned"],
             "objectives": judged_objectives(item),
             "golden": toy.golden(item["prompt"], rng, wordings.parts(item["names"][0])[1])}
            for item in edited if item["kind"] in JUDGED]
    judge, room = exact_judge(toy.score, toy.name_of), exact_room(toy.score, toy.best, toy.name_of)
    result = evaluate(rows, None, judge, concurrency=1, progress=False, room=room)
    order = [name for name in (*toy.NAMED, *JUDGED, "intact") if name in result["objectives"]]
    return rows, {**result, "objectives": {name: result["objectives"][name] for name in order}}


# ----------------------------------------------------------------------------------------------------------------
# The story


def story(out, seed, device):
    announce("1. a foundation model reads texts")
    texts = pretrain(out, seed, device)
    announce("2. two policies learn to answer, not too well")
    train_policies(out, out / "foundation", seed, device)
    announce("3. rated answers become pairs for the aligner")
    pairs = write_pairs(out, seed)
    for row in itertools.islice(formats.read_pairs(pairs), 1):
        print(f"--- one of them ({row['relation']})\n{row['prompt']}\n--- its target\n{row['completion']}")
    announce("4. the aligner learns: to copy, to keep, to improve")
    train_aligner(out / "aligner", out / "foundation", pairs, texts, seed, device)
    announce("5. five policies answer; the aligner, which has never seen them, edits")
    aligner = Writer(out / "aligner", device)
    rng = random.Random(f"prompts {seed}")
    prompts = [toy.question(rng)[0] for _ in range(PROMPTS)]
    rows, results, edited = {}, {}, []
    for name in toy.POLICIES:
        answers = ask_policy(name, prompts, out, seed, device)
        edits = edit(aligner, list(measure.requests(name, prompts, answers, seed)), seed)
        rows[name], results[name] = judge(edits, seed)
        write_jsonl(out / "aligned" / f"{name}.jsonl", rows[name])
        edited += edits
    announce("6. the judges compare")
    write_results(out, rows, results, edited)
    announce(f"7. done; open {out / 'report.html'}, or play: .venv/bin/python play.py --run {out}")


def write_results(out, rows, results, edited):
    print_table(results)
    tables = {name: measure.figures([item for item in edited if item["policy"] == name]) for name in results}
    means = measure.over_policies(tables)
    print(f"\nWhat was asked for, and what was not: means over {len(tables)} policies\n{measure.table_text(means)}"
          f"\n{measure.LEGEND}\n")
    print("\n".join(f"{line:<30}{value:8.1f}" for line, value in measure.summary(means).items()))
    figures = {name: {k: v for k, v in result.items() if k != "verdicts"} for name, result in results.items()}
    write_jsonl(out / "results.json", [{**figures, "editor": {**tables, "mean": means}}])
    examples = {name: pick_examples(rows[name], results[name]) for name in rows}
    notes = ("Five policies of the embedded world, edited by an aligner that has seen none of them. 'A word never "
             "read' occurs in no text that it was trained on.")
    sections = [(f"What was asked for, and what was not: {name}", measure.html(table))
                for name, table in {"mean over the policies": means, **tables}.items()]
    write_report(out / "report.html", results, examples, "nanoalign: the story", notes, sections)
    write_svg(out / "story.svg", mean_chart(figures), CHART)
    for name in results:
        item = next(item for item in edited if item["policy"] == name and item["kind"] == "mention a word never read")
        print(f"\n{name}, asked to: {item['objectives'][0].description}")
        print(ansi_diff(item["original"], item["aligned"]) if sys.stdout.isatty() else
              f"- {item['original']}\n+ {item['aligned']}")


CHART = "Win rate against golden answers: five policies (grey), aligned (green)"


def mean_chart(results):
    """Win rates against golden answers before and after, per objective that was asked for: a mean over policies."""
    labels = {name: name for name in toy.NAMED} | {kind: kind for kind in JUDGED[1:]}
    lines = []
    for name, label in labels.items():
        cells = [result["objectives"][name] for result in results.values() if name in result["objectives"]]
        if not cells:  # with few questions, nobody may have mentioned a topic to avoid
            continue
        before, after = (sum(cell[f"win_rate_{which}"] for cell in cells) / len(cells)
                         for which in ("original", "aligned"))
        lines.append((label, [(0, before, "before"), (0, after, "after")], None, f"{before:.0f} -> {after:.0f}"))
    return bar_chart(lines, 0, 100, "win rate against golden answers, in %: the policy's own answers, and aligned")


def arguments():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--out", default="runs/story", metavar="FOLDER", help="where everything is written (default runs/story)")
    add("--seed", type=int, default=0, help="of the data, the training and the questions (default 0)")
    add("--device", default=None, help="cpu, cuda, ... (default: cuda where there is one)")
    return parser.parse_args()


def main():
    args = arguments()
    device = device_named(args.device)
    out = Path(args.out)
    with whole_run(out, {"seed": args.seed}, "story"):
        story(out, args.seed, device)


if __name__ == "__main__":
    cli(main)
