"""MORLAIF's rewards: preference models that learn feedback on single principles, and how their scores become one.

    python reward.py train labels.jsonl --model FOLDER --out pms [--lora-rank 8]
    python reward.py score labels.jsonl --models pms/toxicity pms/detail

The labels are what `python feedback.py label` writes, or pairs from elsewhere. Paper: Williams 2024, arXiv 2406.07295.
From top to bottom: preference models; their scores; scalarization; the figures that are reported.
"""
import math
import re
from pathlib import Path

from common import (UserError, add_options, check_out, cli, file_digest, in_short, make_parser, read_options,
                    write_jsonl)

import numpy
import torch

import checkpoint
import data
import files
import formats
import parallel
import train
from eval import mean_and_interval
from model import device_named
from optimizers import refuse_beside_muon
from scorers import Scorers, score_once

# ----------------------------------------------------------------------------------------------------------------
# Preference models: a Llama with a scalar head each, in a folder of its own with principle.json beside the weights


def train_principles(base, rows, out, options, device, overwrite=False, about=None, progress=True):
    """Train one preference model for each principle in the label rows, from the Llama in `base`, into OUT/PRINCIPLE; a
    killed run continues. overwrite: models that were made with other settings are made anew. principle.json gets the
    name and the scores' mean and standard deviation on the responses trained on. Gives the folders."""
    by_principle = {}
    for row in rows:
        by_principle.setdefault(row["principle"], []).append(row)
    for name in by_principle:
        if name in (".", "..") or not re.fullmatch(r"[^/\x00-\x1f]{1,100}", name):
            raise UserError(f"the principle {in_short(repr(name))} cannot name a folder; give it another name in the "
                            "labels")
    folders = [Path(out) / name for name in by_principle]
    for folder in folders:
        checkpoint.check_folder(folder, [base])
    for folder, labels in zip(folders, by_principle.values()):
        llama = train.start_from(base, "reward", device, options)
        tokenizer = train.load_tokenizer(base, llama, options, None if overwrite else folder)
        stage = train.prepare("reward", labels, tokenizer, llama.config, options)
        about_it = {"base": str(base), "principle": folder.name, "device": str(device), **(about or {})}
        train.train(llama, tokenizer, [stage], folder, options, True, overwrite, about_it, progress)
        parallel.first(write_principle, folder, labels, device)
    return folders


def write_principle(folder, labels, device):
    """principle.json in the folder of a preference model, where it is not there yet."""
    if not (folder / "principle.json").exists():
        scores = Scorers([folder], device).score(*reference_responses(labels))[0]
        content = {"name": folder.name, "mean": float(scores.mean()), "std": float(scores.std(correction=0))}
        write_jsonl(folder / "principle.json", [content])


def reference_responses(rows, most=512):
    """(prompts, responses) of the first few rows: what scores are normalised on."""
    pairs = [(row["prompt"], row[side]) for row in rows[:most // 2] for side in ("response_a", "response_b")]
    return [prompt for prompt, _ in pairs], [response for _, response in pairs]


# ----------------------------------------------------------------------------------------------------------------
# Pairs of responses scored, and how often the scores agree with the labels


def score_pairs(scorers, rows):
    """Raw scores (K, P, 2) of the two responses of P pairs. A text that stands in several pairs, or in one pair that is
    labelled on several principles, is scored once."""
    texts = [(row["prompt"], row[side]) for row in rows for side in ("response_a", "response_b")]
    return score_once(scorers, texts).view(len(scorers.names), len(rows), 2)


def print_accuracy(scorers, rows, scores):
    """A line per preference model: how often it agrees with the labels on its principle (on the overall preference
    where there are none), beside "the longer response is better", and how far its probabilities are off."""
    print(f"{'preference model':20}{'pairs':>7}{'accuracy':>24}{'the longer one':>24}{'calibration error':>19}")
    for name, pairs in zip(scorers.names, scores):
        own = [i for i, row in enumerate(rows) if row["principle"] == name]
        own = own or [i for i, row in enumerate(rows) if row["principle"] == "overall"]
        if not own:
            continue
        labels = numpy.array([rows[i]["p_a"] for i in own])
        margins = (pairs[own, 0] - pairs[own, 1]).numpy()
        longer = [len(rows[i]["response_a"]) - len(rows[i]["response_b"]) for i in own]
        prompts = [rows[i]["prompt"] for i in own]
        shares = [accuracy(values, numpy.sign(labels - 0.5), prompts) for values in (margins, longer)]
        error, _ = calibration(0.5 + 0.5 * numpy.tanh(margins / 2), labels)
        print(f"{name:20}{int((labels != 0.5).sum()):7}" + "".join(f"{with_interval(*share):>24}" for share in shares)
              + f"{error:19.3f}")


def with_interval(percent, interval):
    if percent is None:
        return "-"
    return f"{percent:.1f}" + (f" [{interval[0]:.1f}, {interval[1]:.1f}]" if interval else "")


def print_correlations(names, scores):
    """Pearson's correlation between each two preference models' scores (K, N)."""
    if len(names) > 1:
        print("\ncorrelations between scores")
        for name, row in zip(names, correlations(scores)):
            print(f"{name:20}" + "".join(f"{value:6.2f}" for value in row))


def write_weights(path, scorers, rows, scores):
    """Fit the weights with which the principles' scores (K, P, 2), in standard deviations, predict the overall
    preference of the pairs that are labelled with it, and write {principle: weight, ..., "of": {principle: the model's
    fingerprint}} for `ppo.py --weights`."""
    own = [i for i, row in enumerate(rows) if row["principle"] == "overall"]
    which = [k for k, name in enumerate(scorers.names) if name != "overall"]
    if own and len(which) > 1:
        std = scorers.std[which].where(scorers.std[which] > 0, torch.ones(()))
        differences = (scores[which][:, own, 0] - scores[which][:, own, 1]) / std[:, None]
        weights = fit_weights(differences.T.numpy(), [rows[i]["p_a"] for i in own])
        named = {scorers.names[k]: round(float(weight), 4) for k, weight in zip(which, weights)}
        fingerprint = scorers.fingerprint
        write_jsonl(path, [{**named, "of": {name: fingerprint[name] for name in named}}])
        print(f"\n{path}: weights that predict the overall preference: "
              + ", ".join(f"{name} {weight:+.2f}" for name, weight in named.items()))


def read_weights(words, names, fingerprint=None):
    """Weights [K] from the command line: numbers, a JSON file {name: weight}, or nothing, which is 1 each. fingerprint:
    the rewards', which are to be the models that the file's weights were fitted to, where it says so."""
    if not words:
        return [1.0] * len(names)
    where = f"--weights {words[0]}" if words[0].endswith(".json") else "--weights"
    if len(words) == 1 and words[0].endswith(".json"):
        content = files.read_json(words[0])
        missing = [name for name in names if not isinstance(content, dict) or name not in content]
        if missing:
            raise UserError(f"{words[0]}: no weight for {', '.join(missing)}; give {{name: weight}} for every reward")
        of = content.get("of")
        if fingerprint and isinstance(of, dict):
            others = [name for name in names if of.get(name) != fingerprint[name]]
            if others:
                raise UserError(f"{words[0]}: was fitted to other models of {', '.join(others)}; run `reward.py train` "
                                "again, or leave \"of\" out of it")
        words = [content[name] for name in names]
    try:
        weights = [float(word) for word in words]
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {words} are not all numbers; give numbers, or one .json file") from error
    if len(weights) != len(names):
        raise UserError(f"{where}: {len(weights)} for {len(names)} rewards ({', '.join(names)}); give one for each")
    if not all(map(math.isfinite, weights)):
        raise UserError(f"{where}: {weights} are not all finite; mend them")
    return weights


# ----------------------------------------------------------------------------------------------------------------
# Scalarization: K principles' weighted scores of N responses, x (K, N), become N rewards. Each response's depends on
# its own scores alone. "Monotone": to raise an x never lowers the reward.


def linear(x):
    """The sum. Monotone."""
    return x.sum(0)


def worst_case(x):
    """Max-min: the lowest. Monotone."""
    return x.amin(0)


def soft_max_min(x, *, temperature=1.0):
    """The mean weighted by softmin(x / temperature): the lowest as the temperature goes to 0, the mean as it grows.
    Not monotone: an x that rises more than a temperature above the result is weighted down faster than it rises."""
    if not temperature > 0:
        raise UserError(f"soft_max_min: the temperature is {temperature}; give more than 0")
    return (torch.softmax((x.amin(0) - x) / temperature, 0) * x).sum(0)


def uncertainty_weighted(x, *, lam=0.5):
    """The mean minus lam times the variance across the K principles (the population's: divided by K). Not monotone:
    an x that rises far above the others adds more to the variance than to the mean."""
    return x.mean(0) - lam * x.var(0, correction=0)


def lower_quantile(x, *, share=1 / 3):
    """The mean of the lowest share of the principles, rounded up to a whole number of them. Monotone."""
    if not 0 < share <= 1:
        raise UserError(f"lower_quantile: the share is {share}; give more than 0 and at most 1")
    count = math.ceil(len(x) * share - 1e-9)  # 1e-9: a third of 12 is 4, whatever the rounding
    return x.sort(0).values[:max(1, count)].mean(0)


def median(x):
    """The middle one; for an even K, the mean of the two middle ones. Monotone."""
    ordered = x.sort(0).values
    return (ordered[(len(x) - 1) // 2] + ordered[len(x) // 2]) / 2


def bernoulli_nash(x):
    """The geometric mean of utilities made positive, softplus(x) = log(1 + exp(x)), computed in log space. Monotone.
    Softplus is nearly x where x is large, and nearly exp(x) where it is low: a very bad x cannot be made up for."""
    log_utility = torch.logaddexp(x, torch.zeros_like(x)).log()
    return torch.where(x < -40, x, log_utility).mean(0).exp()  # below -40 they are equal, until exp(x) is 0


SCALARIZATIONS = {function.__name__: function for function in (
    linear, worst_case, soft_max_min, uncertainty_weighted, lower_quantile, median, bernoulli_nash)}


SCALARIZATION_HELP = "; ".join(
    " ".join([name, *(f"{key}={value:.3g}" for key, value in (join.__kwdefaults__ or {}).items())])
    for name, join in SCALARIZATIONS.items())


def read_scalarization(text):
    """(name, options) of a scalarization as a text, "lower_quantile share=0.25". UserError where there is none such."""
    name, *words = text.split()
    options = {}
    for key, _, value in (word.partition("=") for word in words):
        try:
            if key in options:
                raise ValueError
            options[key] = float(value)
        except ValueError:
            raise UserError(f"--scalarization {text}: {key!r} twice, or without a number; write {key}=NUMBER "
                            "once") from None
    try:
        scalarize(torch.zeros(2, 1), [1.0, 1.0], name, **options)
    except UserError as error:
        raise UserError(f"--scalarization {text}: {error}") from None
    if not all(map(math.isfinite, options.values())):
        raise UserError(f"--scalarization {text}: not all finite; mend it")
    return name, options


def scalarize(scores, weights, scalarization, **options):
    """Rewards (N,) from K principles' scores (K, N) and weights (K,), on x = weights * scores.

    scores: a float tensor, normalised per principle beforehand. weights: a tensor or list; they may be negative.
    scalarization: a name in SCALARIZATIONS, whose keyword arguments are the options. Raises UserError for any other.
    """
    if scalarization not in SCALARIZATIONS:
        raise UserError(f"scalarization {scalarization!r}: unknown; give one of {', '.join(SCALARIZATIONS)}")
    join = SCALARIZATIONS[scalarization]
    known = join.__kwdefaults__ or {}
    for name in sorted(set(options) - set(known)):
        raise UserError(f"scalarization {scalarization!r}: no option {name!r}; it has {', '.join(known) or 'none'}")
    if scores.dim() != 2 or not len(scores) or not scores.is_floating_point():
        raise UserError(f"scores: {scores.dtype} {tuple(scores.shape)}; give floats, (principles, responses)")
    weights = torch.as_tensor(weights, dtype=scores.dtype, device=scores.device)
    if weights.shape != scores.shape[:1]:
        raise UserError(f"weights: {tuple(weights.shape)}; give one for each of the {len(scores)} principles")
    return join(weights[:, None] * scores, **options)


# ----------------------------------------------------------------------------------------------------------------
# What is reported. P pairs, K principles, N responses; numpy arrays (or tensors on the CPU) go in, numpy comes out.


def fit_weights(differences, p_a, ridge=1e-3):
    """Weights (K,) with which the score differences (P, K) predict the overall preference p_a (P,), in [0, 1].

    Logistic regression without an intercept (a pair has no sides) by Newton's method: the minimum of the mean
    cross-entropy plus ridge / 2 times the weights' squared length, in log-odds per unit of score (the paper fits its
    weights so too).
    """
    differences, p_a = (numpy.asarray(values, dtype=float) for values in (differences, p_a))
    count, size = differences.shape
    weights = numpy.zeros(size)

    def loss(weights):
        log_odds = differences @ weights
        return (numpy.logaddexp(0, log_odds) - p_a * log_odds).mean() + ridge / 2 * weights @ weights

    for _ in range(100):
        chance = 0.5 + 0.5 * numpy.tanh(differences @ weights / 2)
        gradient = differences.T @ (chance - p_a) / count + ridge * weights
        if abs(gradient).max() < 1e-10:
            break
        curvature = (differences.T * (chance * (1 - chance))) @ differences / count + ridge * numpy.eye(size)
        step = numpy.linalg.solve(curvature, gradient)
        before = loss(weights)
        while loss(weights - step) > before + 1e-12:  # a whole step may overshoot far from the minimum
            step /= 2
        weights = weights - step
    return weights


def accuracy(margins, truth, groups, seed=0):
    """(percent, [low, high]): how often margins (P,) have the sign of truth (P,), which is -1, 0 or 1.

    Pairs whose truth is 0 are left out; a margin of 0 counts half. The interval is the 95 % bootstrap interval over
    groups (P,), the pairs' prompts; None where there is nothing to count, or only one prompt for an interval.
    """
    margins, truth = numpy.asarray(margins, dtype=float), numpy.asarray(truth, dtype=float)
    right = numpy.where(margins == 0, 0.5, margins * truth > 0)
    kept = truth != 0
    return mean_and_interval(right[kept], [group for group, keep in zip(groups, kept) if keep], seed)


def calibration(p, outcome, bins=10):
    """(expected calibration error, [(mean p, frequency, count) of each bin of p that is not empty]).

    p (P,): predicted probabilities; outcome (P,): what happened, 0 or 1, or its probability. The error is the mean
    over pairs of |mean p - frequency| in the pair's bin, 0 to 1 (Guo et al. 2017, arXiv 1706.04599); None for P = 0.
    """
    p, outcome = numpy.asarray(p, dtype=float), numpy.asarray(outcome, dtype=float)
    number = numpy.minimum((p * bins).astype(int), bins - 1)
    rows = [(float(p[number == b].mean()), float(outcome[number == b].mean()), int((number == b).sum()))
            for b in numpy.unique(number)]
    error = sum(count * abs(mean - frequency) for mean, frequency, count in rows) / len(p) if len(p) else None
    return error, rows


def correlations(scores):
    """Pearson's correlations (K, K) of scores (K, N); a principle that scores all alike has 0 with the others."""
    scores = numpy.asarray(scores, dtype=float)
    centred = scores - scores.mean(1, keepdims=True)
    centred[numpy.ptp(scores, 1) == 0] = 0
    length = numpy.sqrt((centred ** 2).sum(1))
    matrix = centred @ centred.T / numpy.outer(numpy.where(length > 0, length, 1), numpy.where(length > 0, length, 1))
    numpy.fill_diagonal(matrix, 1)
    return matrix.clip(-1, 1)


# ----------------------------------------------------------------------------------------------------------------
# Command line

TRAINING = dict(lr=1e-5, batch=64, epochs=1.0, val_share=0.1)  # where the defaults are not train.Options' own


def read_labels(files, principles=None):
    """The preferences in files, on these principles alone (None: on all)."""
    rows = formats.read_all(files, formats.read_preferences, None)
    labelled = {row["principle"] for row in rows}
    missing = [name for name in principles or () if name not in labelled]
    if missing or not rows:
        raise UserError(f"{files[0]}: no labels of {', '.join(missing or ['any principle'])}; label responses with "
                        "`python feedback.py label`")
    return [row for row in rows if not principles or row["principle"] in principles]


def run_train(files, base, out, principles, device, options, overwrite=False):
    """Preference models, and how good they are on the prompts held out."""
    rows, device = read_labels(files, principles), device_named(device)
    about = {"files": {path: file_digest(path) for path in files}}
    folders = train_principles(base, rows, out, options, device, overwrite, about)
    parallel.first(report, folders, rows, out, options, device)


def report(folders, rows, out, options, device):
    """Print how good preference models are on the rows of prompts held out, and write their weights."""
    held_out = [row for row in rows if data.is_held_out(row, options.val_share, options.seed)]
    if held_out:
        scorers = Scorers(folders, device)
        scores = score_pairs(scorers, held_out)
        print(f"\non the {len(held_out)} labels of prompts held out:")
        print_accuracy(scorers, held_out, scores)
        print_correlations(scorers.names, scores.flatten(1))
        write_weights(Path(out) / "weights.json", scorers, held_out, scores)
    print(f"saved in {', '.join(map(str, folders))}")


def run_score(files, folders, out, device):
    """Pairs scored by preference models, and how often these agree with the labels."""
    if out:
        check_out(out, files)
    rows, scorers = read_labels(files), Scorers(folders, device)
    scores = score_pairs(scorers, rows)
    print_accuracy(scorers, rows, scores)
    print_correlations(scorers.names, scores.flatten(1))
    if out:
        write_jsonl(out, ({**row, "scores": {name: pair.tolist() for name, pair in zip(scorers.names, pairs)}}
                          for row, pairs in zip(rows, scores.transpose(0, 1))))
        print(f"{out}: {len(rows)} pairs with scores [response_a, response_b]")


def add_train(commands):
    parser = commands.add_parser("train", help="train a preference model for each principle that is labelled",
                                 description="Train a preference model for each principle that is labelled, and report "
                                             "how it does on prompts held out. A killed run continues.")
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE", help="labels, rated responses, pairs (see `python data.py --help`)")
    add("--model", required=True, metavar="FOLDER", help="the Llama to start from")
    add("--out", required=True, metavar="FOLDER", help="where a folder for each principle goes")
    add("--principles", nargs="+", metavar="NAME", help="train only these (default: all that are labelled)")
    add("--device", help="cpu, cuda, ... (default: cuda where there is one)")
    add("--overwrite", action="store_true", help="make models that were made with other settings anew")
    unheeded = {*train.unheeded([train.METHODS["reward"]]), "principle", "merge", "samples"}  # all principles in turn
    add_options(parser, train.Options, leave_out=unheeded, **TRAINING)


def add_score(commands):
    parser = commands.add_parser("score", help="score pairs, and tell how accurate the scores are",
                                 description="Score pairs of responses by preference models, and tell how often they "
                                             "agree with the labels.")
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE", help="pairs, in any form that `train` takes")
    add("--models", required=True, nargs="+", metavar="FOLDER", help="preference models, whole or adapters")
    add("--out", metavar="FILE", help="write the pairs with their scores there")
    add("--device", help="cpu, cuda, ... (default: cuda where there is one)")


def main():
    parser = make_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_train(commands)
    add_score(commands)
    args = parser.parse_args()
    if args.command == "train":
        refuse_beside_muon(parser, args)
        options = read_options(train.Options, args, **TRAINING)
        with parallel.processes(args.device) as device:
            run_train(args.files, args.model, args.out, args.principles, device, options, args.overwrite)
    else:
        run_score(args.files, args.models, args.out, args.device)


if __name__ == "__main__":
    cli(main)
