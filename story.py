"""The whole story on the embedded world, in the order of MetaAligner's paper; `make train` runs it.

    1. a foundation model is pretrained          5. every policy answers questions
    2. two policies are trained on it            6. the aligner edits the answers, on trained and held-out objectives
    3. rated answers are reformulated            7. exact judges compare, and a report is written
    4. the aligner is trained in the paper's three steps, and in one more

The aligner never sees a policy. Some wordings of objectives, some words, a verb and two combinations of verbs are in
none of its pairs (wordings.py says which, and where they are), and what it does to objectives that nobody named is
measured too (measure.py), beside what nothing, a foundation that never saw the answer, and an edit towards something
else would have done.
"""
import itertools
import random
import re
import sys
import textwrap
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from common import add_options, announce, cli, make_parser, number, option, read_options, write_jsonl
import blackbox
import checkpoint
import data
import formats
import measure
import toy
import train
import wordings
from align import align
from choose import Choice
from endpoint import Endpoint
from eval import evaluate, exact_judge, exact_room
from model import Config, Llama, device_named
from report import ansi_diff, bar_chart, html_table, pick_examples, print_table, text_table, write_report, write_svg
from resume import whole_run
from runs import curves_section
from writers import Writer

COMMON = dict(weight_decay=0.01, epochs=1.0, max_tokens=512, val_share=0.01, val_every=100, save_seconds=60.0)


def shape_of(width, layers):
    """The sizes of a model, a head for each 32 of its width, with Qwen3's norms of queries and keys: at high rates, it
    learns faster."""
    heads = width // 32
    return dict(model_type="qwen3", hidden_size=width, intermediate_size=width * 8 // 3, num_hidden_layers=layers,
                num_attention_heads=heads, num_key_value_heads=heads // (2 if heads % 2 == 0 else 1),
                tie_word_embeddings=True, bos_token_id=0, eos_token_id=1, max_position_embeddings=1024)


@dataclass
class Options:
    """The story's sizes, steps and rates. The small policy, which starts from nothing, has half the foundation's layers
    and width; the large one and the aligner start from the foundation."""
    layers: int = option(4, "the foundation's blocks", 1, 200)
    width: int = option(192, "its hidden size, a multiple of 64", 64, 2**14)
    word_steps: int = option(240, "optimizer steps in which it repeats made-up words", 1, 10**6)
    text_steps: int = option(720, "optimizer steps in which it reads texts", 1, 10**6)
    small_steps: int = option(300, "optimizer steps of the small policy", 1, 10**6)
    large_steps: int = option(100, "optimizer steps of the large policy", 1, 10**6)
    identity_steps: int = option(40, "optimizer steps of the aligner's warm-up; 0: none", 0, 10**6)
    equal_steps: int = option(10, "its optimizer steps on equal preference; 0: none", 0, 10**6)
    better_steps: int = option(880, "its optimizer steps on better preference", 1, 10**6)
    contrast_steps: int = option(160, "its optimizer steps on edits against others; 0: none", 0, 10**6)
    lr: float = option(1e-2, "highest learning rate of the foundation", 0, 10)
    policy_lr: float = option(3e-3, "the policies'", 0, 10)
    aligner_lr: float = option(3e-3, "the aligner's", 0, 10)
    contrast_lr: float = option(3e-4, "the aligner's where edits are held against others", 0, 10)
    batch: int = option(32, "examples per optimizer step", 1, 10**6)
    questions: int = option(7000, "questions whose answers are rated for the aligner's pairs", 1, 10**8)
    replay: float = option(0.15, "share of pretraining texts in the aligner's batches", 0, 0.9)
    prompts: int = option(64, "questions to each policy in the end", 1, 10**6)
    best_of: int = option(1, "edits of each of their answers, of which the one asked for most is taken", 1, 1000)
    optimizer: str = option("muon", "how foundation and aligner move (the policies: adamw)", choices=["adamw", "muon"])
    compile: bool = option(False, "train foundation and aligner compiled: faster, where there is a C++ compiler")

    @property
    def shape(self):
        return shape_of(self.width, self.layers)

    @property
    def reading(self):
        return {"words": self.word_steps, "texts": self.text_steps}

    @property
    def steps(self):
        steps = {"identity": self.identity_steps, "equal": self.equal_steps, "better": self.better_steps,
                 "contrast": self.contrast_steps}
        return {name: count for name, count in steps.items() if count}

    def training(self, seed, **more):
        own = {"lr": self.lr, "batch": self.batch, "compile": self.compile, "optimizer": self.optimizer, "seed": seed}
        return train.Options(**{**own, **COMMON, **more})


RECIPE = Options()
FOUNDATION, READING, STEPS, QUESTIONS = RECIPE.shape, RECIPE.reading, RECIPE.steps, RECIPE.questions
PAIRING = data.Pairing(dominance=True, best=0.2, keep=0.08)
DAMAGE = (0, 0, 0.1, 0.3)                # of rated answers (toy.rated): what is broken is to be left as it is
CONTRAST = dict(beta=0.2, sft_coef=0.1)  # of the fourth step
QUICK = dict(layers=2, width=128, word_steps=50, text_steps=70, small_steps=60, large_steps=20, identity_steps=20,
             equal_steps=5, better_steps=60, contrast_steps=5, questions=500, prompts=6)
QUICK_NOTE = ("Quick: everything runs once, in trainings of seconds. It shows that all works and what the report looks "
              "like; of what the method can do it shows nothing.")


# ----------------------------------------------------------------------------------------------------------------
# Training


def make_tokenizer(seed, phrases=()):
    """The world's phrases, and further ones, are one token each, and so are the words that stand 20 times in the notes.
    All others, read or never read, are in pieces alike: merges are learned from made-up words, so that hardly a piece
    is rare."""
    notes = (text.partition("\n\n")[0] for text in toy.pretraining_texts(8000, seed, made_up=1.0))
    times = Counter(word for note in notes for word in re.findall(r" ?\w+|[^\w ]+", note))
    words = [word for word, count in times.items() if count >= 20]
    rng = random.Random(f"tokenizer {seed}")
    made_up = (f" {wordings.coin(rng)}" for _ in range(20000))
    return toy.train_tokenizer(made_up, 640, [*toy.phrases(), *phrases], words)


def pretrain(out, seed, device, steps=READING, shape=FOUNDATION, phrases=(), options=RECIPE):
    """The foundation model, in out/foundation: it repeats made-up words, then reads texts. Gives these."""
    def rows_of(part):
        count = round(1.02 * options.batch * steps[part]) + 10
        if part == "words":
            return list(toy.repetitions(count, seed))
        return [{"prompt": "", "completion": text} for text in toy.pretraining_texts(count, seed)]
    tokenizer = make_tokenizer(seed, phrases)
    vocabulary = -(-tokenizer.get_vocab_size() // 64) * 64  # a multiple of 64 is what matrix units like
    llama = Llama(Config(vocab_size=vocabulary, **shape), seed).to(device)
    training, rows = options.training(seed), {part: rows_of(part) for part in steps}
    stages = [train.prepare("sft" if part == "words" else "pretrain", rows[part], tokenizer, llama.config, training)
              for part in steps]
    train.train(llama, tokenizer, stages, out / "foundation", training, resume=True, overwrite=True)
    return [row["completion"] for row in rows["texts"]]


def train_policies(out, foundation, seed, device, options=RECIPE):
    """Two sizes: "large" goes on from the foundation, "small" starts from nothing; each with its own bad manners."""
    tokenizer = checkpoint.load_tokenizer(foundation)
    for name in ("small", "large"):
        rng = random.Random(f"{name} {seed}")
        steps = options.small_steps if name == "small" else options.large_steps
        training = options.training(seed, lr=options.policy_lr, max_steps=steps, compile=False, optimizer="adamw")
        prompts = [toy.question(rng)[0] for _ in range(training.batch * training.max_steps)]
        rows = [{"prompt": prompt, "completion": f" {toy.answer(name, prompt, rng)}"} for prompt in prompts]
        base = checkpoint.load(foundation, device=device)
        if name == "small":
            small = shape_of(options.width // 2, max(1, options.layers // 2))
            base = Llama(Config(vocab_size=base.config.vocab_size, **small), seed).to(device)
        stage = train.prepare("sft", rows, tokenizer, base.config, training)
        train.train(base, tokenizer, [stage], out / name, training, resume=True, overwrite=True)


def write_pairs(out, seed, pairing=PAIRING, questions=QUESTIONS, worded=True, **rating):
    """Rated answers to files, and the pairs made of them, each objective in one of its wordings (or, not worded, in the
    same one always). rating: keywords of toy.rated."""
    rows = list(toy.rated(questions, seed + 1, **{"damage": DAMAGE, **rating}))
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


def train_aligner(out, foundation, pairs, texts, seed, device, steps=STEPS, options=RECIPE):
    """The aligner, in out/aligner. MetaAligner's steps come first; then, where "contrast" is among them, what these
    gave, in out/supervised, learns to prefer the edits that were asked for over others."""
    tokenizer, supervised = checkpoint.load_tokenizer(foundation), dict(steps)
    contrast = supervised.pop("contrast", 0)

    def fit(base, folder, steps, training, texts):
        llama, stages = checkpoint.load(base, device=device), []
        for name, count in steps.items():
            rows = train.METHODS[name].rows([pairs], training)
            random.Random(seed).shuffle(rows)
            enough = round(count * options.batch * (1 - options.replay * bool(texts)) * 1.02)  # of an epoch's steps
            again = list(itertools.islice(itertools.cycle(rows), enough))  # where there are too few of them
            stages.append(train.prepare(name, again, tokenizer, llama.config, training, texts, options.replay))
        train.train(llama, tokenizer, stages, folder, training, resume=True, overwrite=True)
    last = out / ("supervised" if contrast else "aligner")
    fit(foundation, last, supervised, options.training(seed, lr=options.aligner_lr, warmup_data=0.5), texts[:2000])
    if contrast:
        preferring = options.training(seed, lr=options.contrast_lr, **CONTRAST)
        fit(last, out / "aligner", {"contrast": contrast}, preferring, [])


# ----------------------------------------------------------------------------------------------------------------
# Questions, answers and what is asked of them


def ask_policy(name, prompts, out, seed, device):
    """One answer of a policy to each prompt. All that anybody ever learns of a policy is this text."""
    rng = random.Random(f"{name} answers {seed}")
    if name == "blackbox":
        server = blackbox.serve(name)
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


def alone(foundation, items):
    """The items with what the foundation writes to question and objectives, without the answer, under "aligned": in
    the form of the texts that it has read."""
    ids = [foundation.encode(f"The answer: {'; '.join(o.description for o in item['objectives'])}{item['prompt']}", 256)
           for item in items]
    texts = dict(foundation.write(ids, 256, 64))
    return [{**item, "aligned": texts[place].split("\n\nHuman:")[0].strip()} for place, item in enumerate(items)]


def baselines(aligner, foundation, edited, seed, **sampling):
    """{who: items} of what else there could be in the place of the edits, for the kinds in measure.DOUBTED."""
    edited = [item for item in edited if item["kind"] in measure.DOUBTED]
    return {"the edits": edited,
            "copy: nothing done": [{**item, "aligned": item["original"]} for item in edited],
            "foundation, no answer seen": alone(foundation, edited),
            "edits, asked for another": edit(aligner, list(measure.asked_for_another(edited, seed)), seed,
                                              **sampling)}


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


def story(out, seed, device, options=RECIPE):
    announce("1. a foundation model reads texts")
    texts = pretrain(out, seed, device, options.reading, options.shape, options=options)
    announce("2. two policies learn to answer, not too well")
    train_policies(out, out / "foundation", seed, device, options)
    announce("3. rated answers become pairs for the aligner")
    pairs = write_pairs(out, seed, questions=options.questions)
    for row in itertools.islice(formats.read_pairs(pairs), 1):
        print(f"--- one of them ({row['relation']})\n{row['prompt']}\n--- its target\n{row['completion']}")
    announce("4. the aligner learns: to copy, to keep, to improve")
    train_aligner(out, out / "foundation", pairs, texts, seed, device, options.steps, options)
    announce("5. five policies answer; the aligner, which has never seen them, edits")
    aligner = Writer(out / "aligner", device)
    rng = random.Random(f"prompts {seed}")
    prompts = [toy.question(rng)[0] for _ in range(options.prompts)]
    rows, results, edited, choice = {}, {}, [], Choice(options.best_of)
    for name in toy.POLICIES:
        answers = ask_policy(name, prompts, out, seed, device)
        asked = list(measure.requests(name, prompts, answers, seed))
        edits = edit(aligner, asked, seed, choice=choice)
        rows[name], results[name] = judge(edits, seed)
        write_jsonl(out / "aligned" / f"{name}.jsonl", rows[name])
        edited += edits
    others = baselines(aligner, Writer(out / "foundation", device), edited, seed, choice=choice)
    announce("6. the judges compare")
    note = told_otherwise(options)
    write_results(out, rows, results, edited, others, note)
    print(f"\n{note}" if note else "")
    announce(f"7. done; open {out / 'report.html'}, or play: .venv/bin/python play.py --run {out}")


def told_otherwise(options):
    """Where the options are not the recipe's, a line that says so; else ""."""
    others = [f"{name} {value} ({asdict(RECIPE)[name]})" for name, value in asdict(options).items()
              if value != asdict(RECIPE)[name]]
    if options == Options(**QUICK):
        return QUICK_NOTE
    return f"Not the recipe's options, which are in brackets: {', '.join(others)}." if others else ""


def write_results(out, rows, results, edited, others, note):
    tables = {name: measure.figures([item for item in edited if item["policy"] == name]) for name in results}
    for name, result in results.items():
        judged = [item for item in edited if item["policy"] == name and item["kind"] in JUDGED]
        result["kept"] = measure.figures(judged)["all"]["kept"]
    print_table(results)
    means, lines, doubts = measure.figures(edited), measure.summary(edited), measure.doubts(others)
    print(f"\nWhat was asked for, and what was not: means over {len(tables)} policies\n{measure.table_text(means)}"
          f"\n{measure.LEGEND}\n")
    print("\n".join(f"{line:<38}{measure.told(value)}" for line, value in lines.items()))
    head, cells = measure.doubts_table(doubts)
    print(f"\n{textwrap.fill(measure.DOUBTS, 110)}\n{text_table(head, cells)}")
    figures = {name: {k: v for k, v in result.items() if k != "verdicts"} for name, result in results.items()}
    summary = {**lines, **doubts}
    write_jsonl(out / "results.json", [{**figures, "editor": {**tables, "mean": means}, "summary": summary}])
    examples = {name: pick_examples(rows[name], results[name]) for name in rows}
    notes = (f"{note} Five policies of the embedded world, edited by an aligner that has seen none of them. 'A word "
             "never read' occurs in no text that it was trained on; what is 'in pretraining only' is in no pair.")
    sections = [("Would something simpler do?", f"<p>{measure.DOUBTS}</p>{html_table(head, cells)}")]
    sections += [(f"What was asked for, and what was not: {name}", measure.html(table))
                 for name, table in {"mean over the policies": means, **tables}.items()]
    sections += curves_section(out, ("foundation", "small", "large", "supervised", "aligner"))
    write_report(out / "report.html", results, examples, "nanoalign: the story", notes.strip(), sections)
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


def arguments(argv=None):
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--out", metavar="FOLDER", help="where everything is written (default runs/story; --quick: runs/quick)")
    add("--seed", type=number(int, 0, 2**40), default=0, help="of the data, the training and the questions (default 0)")
    add("--quick", action="store_true", help="everything once in a minute, by other defaults: "
        + ", ".join(f"{name} {value}" for name, value in QUICK.items()))
    add("--device", default=None, help="cpu, cuda, ... (default: cuda where there is one)")
    add_options(parser, Options)
    args = parser.parse_args(argv)
    if (args.width or 64) % 64:
        parser.error(f"--width {args.width} is no multiple of 64; give {args.width // 64 * 64 or 64}")
    return args


def main():
    args = arguments()
    options, device = read_options(Options, args, **(QUICK if args.quick else {})), device_named(args.device)
    out = Path(args.out or ("runs/quick" if args.quick else "runs/story"))
    if note := told_otherwise(options):
        print(note)
    asked = {"prompts": options.prompts, "best_of": options.best_of}
    trained = {name: value for name, value in asdict(options).items() if name not in asked}
    with whole_run(out, {"seed": args.seed, **trained}, "story", asked):
        story(out, args.seed, device, options)


if __name__ == "__main__":
    cli(main)
