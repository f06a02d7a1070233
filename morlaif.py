"""MORLAIF on the embedded world, with the paper's four figures; `make morlaif` runs it.

    1. a policy learns to answer, not too well         4. the models' accuracy, alone and combined (figures 2 and 5)
    2. it answers questions twice; a noisy annotator   5. PPO on one model of the overall preference, and on the
       says, principle by principle, which is better      principles' models, joined in several ways
    3. a preference model learns each principle,       6. exact judges compare the policies (figures 3 and 4)
       and one the overall preference

Source: Williams 2024, arXiv 2406.07295. Everything is done anew for each seed; a killed run goes on where it stopped.
"""
import itertools
import random
from dataclasses import replace
from pathlib import Path

from common import announce, cli, code_of, make_parser, number, write_jsonl

import numpy
import torch

import checkpoint
import files
import ppo
import reward
import toy
import train
from writers import Writer
from eval import mean_and_interval
from feedback import PRINCIPLES, embedded_labels
from model import Config, Llama, device_named
from report import bar_chart, html_table, write_page
from resume import kept, whole_run

POLICY = dict(hidden_size=128, intermediate_size=336, num_hidden_layers=2, num_attention_heads=4,
              tie_word_embeddings=True, bos_token_id=0, eos_token_id=1, max_position_embeddings=512)
SMALL = {**POLICY, "hidden_size": 48, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 3}
MANNERS = {"right": 0.55, "wrong": 0.35, "insult": 0.15, "boast": 0.4, "filler": 0.4, "other": 0.35}
COMMON = dict(batch=32, weight_decay=0.01, max_tokens=512, val_every=1000, save_seconds=60.0)
SFT = train.Options(lr=6e-3, epochs=1.0, max_steps=400, val_share=0.01, **COMMON)
PREFERENCE = train.Options(epochs=2.0, val_share=0.0, **COMMON)
PREFERENCE_LR = {"policy": 2e-3, "small": 3e-3}
# gae_lambda 1: in so few steps the values explain little; a shorter horizon would then credit the last words with all.
PPO = ppo.Options(iterations=30, rollouts=64, lr=2e-4, kl_coef=0.05, kl_target=0.0, gae_lambda=1.0, save_seconds=60.0)
PAIRS = {"train": 2000, "fit": 400, "test": 400}  # to train the models, to fit the weights, to measure accuracy
QUICK_PAIRS, QUICK_ITERATIONS = {**PAIRS, "train": 1000}, 25
ANNOTATOR = dict(temperature=0.5, position_bias=0.2, flip_rate=0.05)
QUESTIONS = 300                                   # to each policy in the end


# ----------------------------------------------------------------------------------------------------------------
# A policy, pairs of its answers, feedback


def train_bases(out, seed, device):
    """The policy to start from, and a model several times smaller for small preference models: both learn answers."""
    rng = random.Random(f"morlaif {seed}")
    prompts = [toy.question(rng)[0] for _ in range(round(SFT.batch * SFT.max_steps * 1.02))]
    rows = [{"prompt": prompt, "completion": toy.answer(MANNERS, prompt, rng)} for prompt in prompts]
    tokenizer = toy.train_tokenizer([row["prompt"] + row["completion"] for row in rows[:5000]])
    vocabulary = -(-tokenizer.get_vocab_size() // 64) * 64
    for name, sizes in (("policy", POLICY), ("small", SMALL)):
        llama = Llama(Config(vocab_size=vocabulary, **sizes), seed).to(device)
        options = replace(SFT, seed=seed)
        stage = train.prepare("sft", rows, tokenizer, llama.config, options)
        train.train(llama, tokenizer, [stage], out / name, options, resume=True, overwrite=True)


def answers_of(folder, prompts, seed, device):
    """One answer of a policy to each prompt, sampled at temperature 1."""
    writer = Writer(folder, device)
    ids = [writer.encode(prompt, PPO.max_new_tokens) for prompt in prompts]
    seeds = [seed * 10**7 + i for i in range(len(ids))]
    texts = dict(writer.write(ids, PPO.max_new_tokens, 256, seeds, temperature=1.0))
    return [texts[i] for i in range(len(prompts))]


def make_pairs(out, counts, seed, device):
    """{"train", "fit", "test": pairs of the policy's answers}; the same from a file when a run goes on."""
    def make():
        rng = random.Random(f"pairs {seed}")
        prompts = [toy.question(rng)[0] for _ in range(sum(counts.values()))]
        first, second = (answers_of(out / "policy", prompts, seed * 2 + i, device) for i in range(2))
        write_jsonl(out / "pairs.jsonl", [{"prompt": prompt, "response_a": a, "response_b": b}
                                          for prompt, a, b in zip(prompts, first, second)])
    kept(out, "pairs.jsonl", [counts, seed, checkpoint.fingerprint(out / "policy"), code_of("morlaif")], make)
    rows = iter([row for _, row in files.records(out / "pairs.jsonl")])
    return {name: list(itertools.islice(rows, count)) for name, count in counts.items()}


def exact_pairs(names, pairs):
    """The exact scores (K, P, 2) of pairs of responses."""
    return torch.tensor([[[float(toy.score(name, row["prompt"], row[side])) for side in ("response_a", "response_b")]
                          for row in pairs] for name in names])


# ----------------------------------------------------------------------------------------------------------------
# Preference models: how good they are, alone and together (figures 2 and 5)


def learn_preferences(out, pairs, seed, device):
    """{"same size", "small": (folder per principle, then the overall one's)}."""
    names = [*PRINCIPLES, "overall"]
    labels = list(embedded_labels(pairs["train"], names, seed, **ANNOTATOR))
    write_jsonl(out / "labels.jsonl", labels)
    folders = {}
    for size, base in (("same size", "policy"), ("small", "small")):
        options = replace(PREFERENCE, seed=seed, lr=PREFERENCE_LR[base])
        made = reward.train_principles(out / base, labels, out / f"pms-{base}", options, device, overwrite=True)
        folders[size] = made
    return folders


def normalised_like(scores, like):
    """Scores (K, ...) in deviations from the mean of `like` (K, ...), principle by principle."""
    mean, std = like.flatten(1).mean(1), like.flatten(1).std(1)
    shape = (-1,) + (1,) * (scores.dim() - 1)
    return (scores - mean.view(shape)) / std.where(std > 0, torch.ones(())).view(shape)


def fitted(scores, pairs, seed):
    """Weights (K,) with which normalised score differences (K, P, 2) predict what the annotator prefers overall, by
    logistic regression, their mean size 1."""
    labels = [row["p_a"] for row in embedded_labels(pairs, ["overall"], seed, **ANNOTATOR)]
    weights = reward.fit_weights((scores[..., 0] - scores[..., 1]).T.numpy(), labels)
    return torch.tensor(weights / (abs(weights).mean() or 1.0), dtype=torch.float32)


def right(margins, truth):
    """1, 0, or 0.5 for a margin of 0, of each pair (P,); None where the truth is a tie."""
    return [None if t == 0 else 0.5 if m == 0 else float(m * t > 0) for m, t in zip(margins.tolist(), truth.tolist())]


def combined(scores, weights, scalarization):
    """Margins (P,) of the scalarized scores (K, P, 2) of two responses."""
    rewards = reward.scalarize(scores.flatten(1), weights, scalarization).view(-1, 2)
    return rewards[:, 0] - rewards[:, 1]


def judge_models(folders, pairs, seed, device):
    """Per test pair, who is right: each principle's model and the single one; the principles' models joined in each
    way; and joined linearly, a growing number of principles, beside exact principles. And the weights."""
    scorers = reward.Scorers(folders, device)
    truth = exact_pairs([*PRINCIPLES, "overall"], pairs["test"])
    truth = (truth[..., 0] - truth[..., 1]).sign()                                           # (K + 1, P)
    fit, test = (reward.score_pairs(scorers, pairs[name]) for name in ("fit", "test"))       # (K + 1, P, 2)
    alone, error = {}, {}
    for name, margin, t in zip(scorers.names, test[..., 0] - test[..., 1], truth):
        alone[name] = right(margin, t)
        error[name] = reward.calibration(torch.sigmoid(margin[t != 0]), (t[t != 0] > 0).float())[0]
    correlation = reward.correlations(test[:-1].flatten(1)).tolist()
    fit, test = normalised_like(fit, fit)[:-1], normalised_like(test, fit)[:-1]
    weights = fitted(fit, pairs["fit"], seed)
    joined = {name: right(combined(test, weights, name), truth[-1]) for name in reward.SCALARIZATIONS}
    exact_fit, exact_test = (exact_pairs(PRINCIPLES, pairs[name]) for name in ("fit", "test"))
    exact_fit, exact_test = normalised_like(exact_fit, exact_fit), normalised_like(exact_test, exact_fit)
    number = {"models": by_number(fit, test, truth[-1], pairs["fit"], seed),
              "ceiling": by_number(exact_fit, exact_test, truth[-1], pairs["fit"], seed)}
    return {"alone": alone, "calibration": error, "correlation": correlation, "weights": weights.tolist(),
            "joined": joined, "number": number}


def by_number(fit, test, truth, pairs, seed, orders=10):
    """{k: who is right, per pair, with k principles joined linearly}, a mean over random orders of the principles. fit
    and test: normalised scores (K, P, 2), those of `fit` of the responses in `pairs`."""
    rng, found = random.Random(f"orders {seed}"), {}
    for order in [rng.sample(range(len(fit)), len(fit)) for _ in range(orders)]:
        for count in (1, 2, 3, 4, 6, 8, 10, 12):
            chosen = sorted(order[:count])
            weights = fitted(fit[chosen], pairs, seed)
            found.setdefault(count, []).append(right(combined(test[chosen], weights, "linear"), truth))
    return {count: [None if column[0] is None else sum(column) / orders for column in zip(*rows)]
            for count, rows in found.items()}


# ----------------------------------------------------------------------------------------------------------------
# Policies, and who wins (figures 3 and 4)


def train_policies(out, models, weights, scalarizations, iterations, seed, device):
    """PPO from the same start: on the single model (RLAIF), and on the principles' models (MORLAIF), joined in each
    way; also with models several times smaller than the policy. Gives how each went."""
    runs = {"single": (models["same size"][-1:], [1.0], "linear"),
            "single, small": (models["small"][-1:], [1.0], "linear")}
    runs |= {name: (models["same size"][:-1], weights["same size"], name) for name in scalarizations}
    runs["linear, small"] = (models["small"][:-1], weights["small"], "linear")
    rng = random.Random(f"ppo {seed}")
    prompts = [toy.question(rng)[0] for _ in range(2000)]
    options, course = replace(PPO, seed=seed, iterations=iterations), {}
    for name, (folders, weight, scalarization) in runs.items():
        folder = out / "policies" / name.replace(", ", "-")
        policy = checkpoint.load(out / "policy", device=device)
        tokenizer = checkpoint.load_tokenizer(out / "policy", policy)
        rows = ppo.improve(policy, tokenizer, prompts, reward.Scorers(folders, device), weight, scalarization, folder,
                           options, resume=True, overwrite=True)
        course[name] = {"folder": str(folder), "kl": [row["kl"] for row in rows]}
    return course


def judge_policies(out, course, weights, seed, device):
    """Each policy's answers to new questions, their exact scores, and who wins on the overall preference."""
    rng = random.Random(f"questions {seed}")
    prompts = [toy.question(rng)[0] for _ in range(QUESTIONS)]
    folders = {"start": out / "policy", **{name: Path(run["folder"]) for name, run in course.items()}}
    answers = {name: answers_of(folder, prompts, seed, device) for name, folder in folders.items()}
    scorer = ppo.ExactScorer([*PRINCIPLES, "overall"])
    scores = {name: scorer.score(prompts, texts) for name, texts in answers.items()}
    write_jsonl(out / "answers.jsonl", [{"prompt": prompt, **{name: texts[i] for name, texts in answers.items()}}
                                        for i, prompt in enumerate(prompts)])
    overall = {name: found[-1] for name, found in scores.items()}
    wins = {first: {second: ((overall[first] - overall[second]).sign() / 2 + 0.5).tolist() for second in overall}
            for first in overall}
    words = {name: [len(text.split()) for text in texts] for name, texts in answers.items()}
    return {"prompts": prompts, "scores": {name: found.tolist() for name, found in scores.items()}, "wins": wins,
            "scalarized": scalarized(scores, weights), "words": words}


def scalarized(scores, weights):
    """{run: (before, after)}: the exact principles' scores, joined as that run joins its models', of the starting
    policy's answers and of its own."""
    found = {}
    for name in scores:
        scalarization, size = name.split(",")[0], "small" if name.endswith("small") else "same size"
        if scalarization in reward.SCALARIZATIONS:
            found[name] = [reward.scalarize(normalised_like(scores[which][:-1], scores["start"][:-1]), weights[size],
                                            scalarization).tolist() for which in ("start", name)]
        elif scalarization == "single":
            found[name] = [scores[which][-1].tolist() for which in ("start", name)]
    return found


def run_seed(out, seed, quick, device):
    """All that one seed gives, from OUT/results.json; made first, unless this very code has done so already."""
    with whole_run(out, {"seed": seed, "quick": quick}, "morlaif"):
        kept(out, "results.json", [seed, quick, code_of("morlaif")],
             lambda: write_jsonl(out / "results.json", [find_out(out, seed, quick, device)]))
    return files.read_json(out / "results.json")


def find_out(out, seed, quick, device):
    """All that one seed gives."""
    scalarizations = ["linear", "worst_case"] if quick else [*reward.SCALARIZATIONS]
    counts, iterations = (QUICK_PAIRS, QUICK_ITERATIONS) if quick else (PAIRS, PPO.iterations)
    announce(f"seed {seed}: a policy learns to answer")
    train_bases(out, seed, device)
    announce(f"seed {seed}: it answers twice, and an annotator compares")
    pairs = make_pairs(out, counts, seed, device)
    announce(f"seed {seed}: preference models learn")
    models = learn_preferences(out, pairs, seed, device)
    announce(f"seed {seed}: how accurate they are")
    judged = {size: judge_models(folders, pairs, seed, device) for size, folders in models.items()}
    weights = {size: found["weights"] for size, found in judged.items()}
    announce(f"seed {seed}: policies learn from them")
    course = train_policies(out, models, weights, scalarizations, iterations, seed, device)
    announce(f"seed {seed}: exact judges compare")
    return {"seed": seed, "test": [row["prompt"] for row in pairs["test"]], "models": judged, "course": course,
            "policies": judge_policies(out, course, weights, seed, device)}


# ----------------------------------------------------------------------------------------------------------------
# What is found, over all seeds


class Found:
    """Tables, printed and drawn. A figure is a mean over pairs or questions of all seeds, with its 95 % bootstrap
    interval over their prompts; the seeds' own means stand beside it."""

    def __init__(self, results):
        self.results, self.parts = results, []

    def rate(self, of, prompts):
        """(percent, interval, [each seed's]) of the values `of(result)`, one per prompt of `prompts(result)`."""
        values, groups, each = [], [], []
        for result in self.results:
            known = [(value, f"{result['seed']} {prompt}") for value, prompt in zip(of(result), prompts(result))
                     if value is not None]
            values += [value for value, _ in known]
            groups += [prompt for _, prompt in known]
            each.append(100 * sum(value for value, _ in known) / max(1, len(known)))
        percent, interval = mean_and_interval(values, groups, 0)
        return percent, interval, each

    def chart(self, title, rows, low=0.0, high=100.0):
        """rows: (label, rate)."""
        print(f"\n{title}")
        for label, (percent, interval, each) in rows:
            print(f"  {label:34}{reward.with_interval(percent, interval):>24}   seeds "
                  + " ".join(f"{value:.1f}" for value in each))
        middle = (low + high) / 2
        lines = [(label, [(middle, percent, "after")], interval, reward.with_interval(percent, interval))
                 for label, (percent, interval, _) in rows if percent is not None]
        self.parts.append(f"<h2>{title}</h2><div class=\"card\">{bar_chart(lines, low, high, title)}</div>")

    def table(self, title, head, rows):
        print(f"\n{title}")
        for cells in [("", *head), *rows]:
            print("  " + f"{cells[0]:22}" + "".join(f"{cell:>11.10}" for cell in cells[1:]))
        self.parts.append(f"<h2>{title}</h2>" + html_table(["", *head], rows))


def test_prompts(result):
    return result["test"]


def questions(result):
    return result["policies"]["prompts"]


def tell_all(out, results):
    """Print and draw all that was found."""
    found = Found(results)
    noise = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in ANNOTATOR.items())
    print(f"annotator: {noise}; {len(results)} seeds; intervals: 95 %, bootstrap over prompts")
    sizes = list(results[0]["models"])
    for size in sizes:
        tell_models(found, size)
    found.table("Calibration: how far the models' probabilities are off (expected calibration error, in points)", sizes,
                [(name, *(calibration_error(results, size, name) for size in sizes))
                 for name in [*PRINCIPLES, "overall"]])
    tell_policies(found, results[0]["course"])
    tell_principles(found)
    write_page(out / "report.html", "nanoalign: MORLAIF", found.parts)
    print(f"\nwrote {out / 'report.html'} and a results.json for each seed")


def tell_models(found, size):
    def alone(name):
        return found.rate(lambda r: r["models"][size]["alone"][name], test_prompts)

    def joined(name):
        return found.rate(lambda r: r["models"][size]["joined"][name], test_prompts)
    single = ("the single model, overall", alone("overall"))
    found.chart(f"Fig. 2a: accuracy of preference models alone, in % ({size})",
                [(name, alone(name)) for name in PRINCIPLES] + [single])
    found.chart(f"Fig. 2b: overall preference predicted by the twelve joined, in % ({size})",
                [(name, joined(name)) for name in reward.SCALARIZATIONS] + [single])


def tell_policies(found, course):
    def better(name):
        return found.rate(lambda r: [0.5 + 0.5 * ((after > before) - (after < before))
                                     for before, after in zip(*r["policies"]["scalarized"][name])], questions)

    def wins(first, second):
        return found.rate(lambda r: r["policies"]["wins"][first][second], questions)
    found.chart("The exact score on the scalarized objective: share of questions answered better than by the start",
                [(name, better(name)) for name in course])
    tell_course(found.results)
    joined = [name for name in course if name in reward.SCALARIZATIONS]
    pairs = [(name, "start") for name in course] + [(name, "single") for name in joined]
    pairs += [("linear, small", "single"), ("linear, small", "single, small")]
    found.chart("Fig. 3: win rate on the exact overall preference, in %",
                [(f"{first} over {second}", wins(first, second)) for first, second in pairs])
    found.table("Fig. 4: win rate of row over column, in %", joined,
                [(a, *("-" if a == b else f"{wins(a, b)[0]:.1f}" for b in joined)) for a in joined])


def tell_principles(found):
    def accuracy(kind, count):
        return found.rate(lambda r: r["models"]["same size"]["number"][kind][count], test_prompts)
    models = [result["models"]["same size"] for result in found.results]
    correlation = numpy.mean([each["correlation"] for each in models], axis=0)
    found.table("Fig. 5: correlations between the principles' models", PRINCIPLES,
                [(name, *(f"{value:.2f}" for value in row)) for name, row in zip(PRINCIPLES, correlation)])
    for kind, counts in models[0]["number"].items():
        found.chart(f"Fig. 5: accuracy against the number of principles, in % ({kind})",
                    [(f"{count} principles", accuracy(kind, count)) for count in counts])


def calibration_error(results, size, name):
    """The mean over seeds, in points, as a text."""
    errors = [result["models"][size]["calibration"][name] for result in results]
    return "-" if None in errors else f"{100 * numpy.mean(errors):.1f}"


def tell_course(results):
    """How far each policy went: divergence from the start, exact overall score and length, means over seeds."""
    print(f"\n  {'policy':22}{'KL, nats':>10}{'most':>8}{'overall before':>16}{'after':>8}{'words':>14}")
    for name in results[0]["course"]:
        kl = [result["course"][name]["kl"] for result in results]
        policies = [result["policies"] for result in results]
        before, after = (numpy.mean([p["scores"][which][-1] for p in policies]) for which in ("start", name))
        words = [numpy.mean([p["words"][which] for p in policies]) for which in ("start", name)]
        print(f"  {name:22}{numpy.mean([k[-1] for k in kl]):10.2f}{max(map(max, kl)):8.2f}{before:16.2f}{after:8.2f}"
              f"{words[0]:8.1f} -> {words[1]:.1f}")


def arguments(argv=None):
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--out", default="runs/morlaif", metavar="FOLDER", help="where everything is written (default runs/morlaif)")
    add("--seeds", type=number(int, 0, 2**40), nargs="+", default=[0, 1, 2], metavar="N", help="default 0 1 2")
    add("--quick", action="store_true", help="one seed, and PPO with two scalarizations instead of seven")
    add("--device", help="cpu, cuda, ... (default: cuda where there is one)")
    return parser.parse_args(argv)


def main():
    args = arguments()
    device = device_named(args.device)
    out = Path(args.out) / "quick" if args.quick else Path(args.out)
    results = [run_seed(out / f"seed-{seed}", seed, args.quick, device)
               for seed in (args.seeds[:1] if args.quick else args.seeds)]
    announce("what was found")
    tell_all(out, results)


if __name__ == "__main__":
    cli(main)
