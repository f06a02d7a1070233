"""The whole story on the embedded world, in the order of MetaAligner's paper; `make train` runs it.

    1. a foundation model is pretrained          5. every policy answers questions
    2. two policies are trained on it            6. the aligner edits the answers, on trained and held-out objectives
    3. rated answers are reformulated            7. exact judges compare, and a report is written
    4. the aligner is trained in three steps

The aligner never sees a policy, and 80 of the 480 "mention X" and "avoid X" objectives are kept from it.
"""
import itertools
import json
import random
import sys
from dataclasses import replace
from pathlib import Path

from common import announce, cli, code_of, digest, make_parser, write_jsonl
import checkpoint
import data
import files
import formats
import toy
import train
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
WORDS = train.Options(lr=1.5e-3, batch=96, max_steps=150, **COMMON)
PRETRAIN = train.Options(lr=1.5e-3, batch=32, max_steps=300, **COMMON)
POLICY = train.Options(lr=3e-3, batch=32, max_steps=100, **COMMON)
ALIGNER = train.Options(lr=1.5e-3, batch=32, warmup_data=0.5, **COMMON)
STEPS = {"identity": 40, "equal": 20, "better": 460}  # optimizer steps of the aligner's three steps
REPLAY = 0.15                                         # share of pretraining texts in the aligner's batches
PROMPTS = 160                                         # questions to each policy


# ----------------------------------------------------------------------------------------------------------------
# Training


def pretrain(out, seed, device):
    """The foundation model, first on single sentences, then on whole answers. Gives the texts of the second part."""
    def enough(texts, options):
        return list(texts(round(1.02 * options.batch * options.max_steps) + 100, seed))
    brief, texts = enough(toy.brief_texts, WORDS), enough(toy.pretraining_texts, PRETRAIN)
    tokenizer = toy.train_tokenizer(texts[:5000] + brief[:2000])
    vocabulary = -(-tokenizer.get_vocab_size() // 64) * 64  # a multiple of 64 is what matrix units like
    llama = Llama(Config(vocab_size=vocabulary, **FOUNDATION), seed).to(device)
    for folder, chosen, options in ((out / "words", brief, WORDS), (out / "foundation", texts, PRETRAIN)):
        rows = [{"prompt": "", "completion": text} for text in chosen]
        options = replace(options, seed=seed)
        stage = train.prepare("pretrain", rows, tokenizer, llama.config, options)
        train.train(llama, tokenizer, [stage], folder, options, resume=True, overwrite=True)
        llama = checkpoint.load(folder, device=device)
    return texts


def train_policies(out, foundation, seed, device):
    """Two sizes: "large" goes on from the foundation, "small" starts from nothing; each with its own bad manners."""
    tokenizer = checkpoint.load_tokenizer(foundation)
    for name in ("small", "large"):
        rng = random.Random(f"{name} {seed}")
        options = replace(POLICY, seed=seed, max_steps=SMALL_STEPS if name == "small" else POLICY.max_steps)
        prompts = [toy.question(rng)[0] for _ in range(options.batch * options.max_steps)]
        rows = [{"prompt": prompt, "completion": toy.answer(name, prompt, rng)} for prompt in prompts]
        base = checkpoint.load(foundation, device=device)
        if name == "small":
            base = Llama(Config(vocab_size=base.config.vocab_size, **SMALL), seed).to(device)
        stage = train.prepare("sft", rows, tokenizer, base.config, options)
        train.train(base, tokenizer, [stage], out / name, options, resume=True, overwrite=True)


def write_pairs(out, topics, seed):
    """Rated answers to files, and the pairs made of them."""
    names = [name for name in toy.TRAINED if name in toy.NAMED or name.partition("_")[2] in set(topics)]
    objectives = [toy.OBJECTIVES[name] for name in names]
    needed = round(max(STEPS.values()) * ALIGNER.batch / 9) + 300  # a question gives a dozen "better" pairs
    write_jsonl(out / "rated.jsonl", toy.rated(needed, seed + 1, topics))
    write_jsonl(out / "pairs.jsonl", data.reformulate(formats.read_rated(out / "rated.jsonl"), objectives,
                                                    data.Pairing(seed=seed)))
    return out / "pairs.jsonl"


def train_aligner(out, foundation, pairs, texts, seed, device):
    llama = checkpoint.load(foundation, device=device)
    tokenizer = checkpoint.load_tokenizer(foundation, llama)
    stages = []
    for name, steps in STEPS.items():
        options = replace(ALIGNER, seed=seed)
        rows = train.METHODS[name].rows([pairs], options)
        random.Random(seed).shuffle(rows)
        enough = round(steps * options.batch * (1 - REPLAY) * 1.02)  # so that an epoch has so many steps
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


KEPT = ("helpful", "harmless")  # trained objectives that are asked for beside a topic


def requests(prompts, answers, seed, topics=toy.TRAINED_TOPICS):
    """Every answer is to be edited up to five times: towards the nine named objectives at once; to mention a trained
    and a held-out topic; and, where it happens to mention one, to avoid a trained or a held-out topic."""
    rng = random.Random(f"requests {seed}")
    for prompt, answer in zip(prompts, answers):
        yield request(rng, prompt, answer, "named", toy.NAMED)
        for kind, pool in (("trained", topics), ("held-out", toy.HELD_OUT_TOPICS)):
            topic = rng.choice(pool)
            yield request(rng, prompt, answer, kind, [f"mention_{topic}", *KEPT], topic)
            mentioned = [topic for topic in pool if toy.score(f"mention_{topic}", prompt, answer)]
            if mentioned:
                yield request(rng, prompt, answer, kind, [f"avoid_{mentioned[0]}", *KEPT], mentioned[0])


def request(rng, prompt, answer, kind, names, topic=None):
    names = rng.sample(list(names), len(names))
    return {"prompt": prompt, "original": answer, "kind": kind, "names": names,
            "objectives": [toy.OBJECTIVES[name] for name in names],
            "golden": toy.golden(prompt, rng, [topic] if topic else [])}


def judged_objectives(item):
    """The objectives that an edit is judged on, those of a kind pooled under one name, and whether it stayed whole."""
    pooled = []
    for name in item["names"]:
        verb = name.partition("_")[0]
        label = (name if item["kind"] == "named" else f"{verb} a {item['kind']} topic" if "_" in name
                 else f"{name} (& {item['kind']})")
        pooled.append(f"{label}: {toy.OBJECTIVES[name].description}")
    return [*pooled, str(toy.INTACT)]


def edit_and_judge(aligner, items, seed):
    """Rows as align.py writes them, and their figures."""
    items = [{**item, "index": index} for index, item in enumerate(items)]
    edited = sorted(align(aligner, items, None, batch=64, max_new_tokens=256, seed=seed), key=lambda i: i["index"])
    rows = [{"prompt": item["prompt"], "original": item["original"], "aligned": item["aligned"],
             "objectives": judged_objectives(item), "golden": item["golden"]} for item in edited]
    judge, room = exact_judge(toy.score, toy.name_of), exact_room(toy.score, toy.best, toy.name_of)
    result = evaluate(rows, None, judge, concurrency=1, progress=False, room=room)
    order = [*toy.NAMED, *sorted(set(result["objectives"]) - {*toy.NAMED, "intact"}), "intact"]
    return rows, {**result, "objectives": {name: result["objectives"][name] for name in order}}


# ----------------------------------------------------------------------------------------------------------------
# The story, and one ablation


def story(out, seed, device):
    announce("1. a foundation model reads texts")
    texts = pretrain(out, seed, device)
    announce("2. two policies learn to answer, not too well")
    train_policies(out, out / "foundation", seed, device)
    announce("3. rated answers become pairs for the aligner")
    pairs = write_pairs(out, toy.TRAINED_TOPICS, seed)
    for row in itertools.islice(formats.read_pairs(pairs), 1):
        print(f"--- one of them ({row['relation']})\n{row['prompt']}\n--- its target\n{row['completion']}")
    announce("4. the aligner learns: to copy, to keep, to improve")
    train_aligner(out / "aligner", out / "foundation", pairs, texts, seed, device)
    announce("5. five policies answer; the aligner, which has never seen them, edits")
    aligner = Writer(out / "aligner", device)
    rng = random.Random(f"prompts {seed}")
    prompts = [toy.question(rng)[0] for _ in range(PROMPTS)]
    rows, results = {}, {}
    for name in toy.POLICIES:
        answers = ask_policy(name, prompts, out, seed, device)
        rows[name], results[name] = edit_and_judge(aligner, requests(prompts, answers, seed), seed)
        write_jsonl(out / "aligned" / f"{name}.jsonl", rows[name])
    announce("6. the judges compare")
    write_results(out, rows, results)
    announce(f"7. done; open {out / 'report.html'}, or edit something yourself, say \"How do I boil an egg?\":\n"
            f"    .venv/bin/python align.py --model {out / 'aligner'} --interactive "
            '--objectives "humour: tell a joke" "topic: mention penguins"')


def write_results(out, rows, results):
    print_table(results)
    figures = {name: {k: v for k, v in result.items() if k != "verdicts"} for name, result in results.items()}
    write_jsonl(out / "results.json", [figures])
    examples = {name: pick_examples(rows[name], results[name]) for name in rows}
    notes = ("Five policies of the embedded world, edited by an aligner that has seen none of them. 'Held-out' topics "
             "occur in no pair that it was trained on, only in pretraining texts.")
    write_report(out / "report.html", results, examples, "nanoalign: the story", notes)
    write_svg(out / "story.svg", mean_chart(figures), CHART)
    for name in results:
        row = next(row for row in rows[name] if any("held-out" in text for text in row["objectives"]))
        print(f"\n{name}, asked to: {'; '.join(text.partition(': ')[2] for text in row['objectives'][:-1])}")
        print(ansi_diff(row["original"], row["aligned"]) if sys.stdout.isatty() else
              f"- {row['original']}\n+ {row['aligned']}")


CHART = "Win rate against golden answers: five policies (grey), aligned (green)"


def mean_chart(results):
    """Win rates against golden answers before and after, per objective that was asked for: a mean over policies."""
    labels = {name: name for name in toy.NAMED}
    for verb in ("mention", "avoid"):
        labels |= {f"{verb} a trained topic": f"{verb} X", f"{verb} a held-out topic": f"{verb} X, pretraining only"}
    lines = []
    for name, label in labels.items():
        cells = [result["objectives"][name] for result in results.values() if name in result["objectives"]]
        if not cells:  # with few questions, nobody may have mentioned a topic to avoid
            continue
        before, after = (sum(cell[f"win_rate_{which}"] for cell in cells) / len(cells)
                         for which in ("original", "aligned"))
        lines.append((label, [(0, before, "before"), (0, after, "after")], None, f"{before:.0f} -> {after:.0f}"))
    return bar_chart(lines, 0, 100, "win rate against golden answers, in %: the policy's own answers, and aligned")


def ablation(out, counts, seed, device):
    """How many trained objectives does it take to follow held-out ones from their text alone?"""
    texts = pretrain(out, seed, device)
    rng = random.Random(f"prompts {seed}")
    prompts = [toy.question(rng)[0] for _ in range(PROMPTS)]
    answers = ask_policy("verbose", prompts, out, seed, device)
    for count in counts:
        folder = out / f"topics-{count}-{seed}"
        topics = random.Random(seed).sample(toy.TRAINED_TOPICS, count)
        train_aligner(folder, out / "foundation", write_pairs(folder, topics, seed), texts, seed, device)
        _, result = edit_and_judge(Writer(folder, device), requests(prompts, answers, seed, topics), seed)
        rows = [{"topics": count, "seed": seed, "objective": name, "net": figures["room_net"],
                 "interval": figures["room_net_interval"], "n": figures["room_n"], "code": digest(code_of("story"))}
                for name, figures in result["objectives"].items() if "topic" in name]
        add_rows(out / "topics.jsonl", rows)
        print("\n".join(json.dumps(row) for row in rows))


def add_rows(path, rows):
    """Put rows of one count of topics into a file, in the place of those of the same count and of those that other code
    has made."""
    kept = [row for _, row in files.records(path)] if path.exists() else []
    kept = [row for row in kept if row["topics"] != rows[0]["topics"] and row["code"] == rows[0]["code"]]
    write_jsonl(path, kept + rows)


def arguments():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--out", default="runs/story", metavar="FOLDER", help="where everything is written (default runs/story)")
    add("--seed", type=int, default=0, help="of the data, the training and the questions (default 0)")
    add("--topics", type=int, nargs="+", metavar="N", help="ablation: instead of the story, train one aligner on N "
        "topics, for each N, and measure how well it follows held-out ones")
    add("--device", default=None, help="cpu, cuda, ... (default: cuda where there is one)")
    return parser.parse_args()


def main():
    args = arguments()
    device = device_named(args.device)
    out = Path(args.out)
    with whole_run(out, {"seed": args.seed}, "story"):
        if args.topics:
            ablation(out, args.topics, args.seed, device)
        else:
            story(out, args.seed, device)


if __name__ == "__main__":
    cli(main)
