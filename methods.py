"""The methods that train.py's one loop runs: each is one data function and one loss function, and METHODS lists them.

    method                      learns from                                        source
    pretrain                    texts                                              next-token prediction
    sft                         prompts and completions, or the best-rated answer  fine-tuning
    identity, partner           equally good answers: an aligner's warm-up         MetaAligner, step 1; Aligner
    equal, better               pairs "an answer -> another"                       MetaAligner, steps 2 and 3
    contrast                    such pairs, after better: the edit over others     RPO
    reward                      preferences                                        Bradley-Terry; MORLAIF
    dpo, ipo, robust, rpo,      preferences, or answers rated on objectives        the DPO family (losses.py)
    simpo, orpo, kto, bco
    copg, modpo, pro            answers rated on objectives                        CoPG; MODPO; PRO
    raft                        answers rated on objectives, the best of each      RAFT; best-of-n fine-tuning
    cpsft, cdpo                 answers rated on objectives                        CPO, its two steps
    ric, conditioned            answers rated on objectives                        RiC; conditioned on objectives' texts

To add a method: write its loss in losses.py, its data function in methods.py, and a line in METHODS there. Where
several objectives are joined, --weights says how: R = the sum of weight * score. Scores make labels by
sigmoid(difference / temperature): certain labels (temperature 0) leave most of these losses without a finite optimum.
"""
import itertools
import math
import random
import statistics
from dataclasses import dataclass

import torch

import data
import files
import formats
import losses
from common import UserError
from objectives import find_objectives

# ----------------------------------------------------------------------------------------------------------------
# Data functions: files to rows (see the table of rows in data.py). A text is a row with an empty prompt.


def pretrain_rows(paths, options):
    """Next-token prediction on whole texts."""
    return [{"prompt": "", "completion": text} for path in paths for text in formats.read_texts(path)]


def sft_rows(paths, options):
    """Supervised fine-tuning: a prompt's completion, or the best-rated response of preference data."""
    return formats.read_all(paths, formats.read_completions)


def equal_rows(paths, options):
    """Equal-preference pairs (MetaAligner, step 2)."""
    return formats.read_all(paths, formats.read_pairs, "equal")


def better_rows(paths, options):
    """Contrastive preference pairs (MetaAligner, step 3)."""
    return formats.read_all(paths, formats.read_pairs, "better")


def partner_rows(paths, options):
    """Warm-up (MetaAligner, step 1) on a random part of the equal-preference pairs as they are."""
    rows = equal_rows(paths, options)
    generator = torch.Generator().manual_seed(options.seed)
    chosen = torch.randperm(len(rows), generator=generator)[:math.ceil(options.warmup_data * len(rows))].tolist()
    return [rows[i] for i in sorted(chosen)]


def identity_rows(paths, options):
    """Warm-up with the answer itself as the target, so that the model starts from copying (Aligner's residual idea,
    arXiv 2402.02416)."""
    rows = partner_rows(paths, options)
    if not all("answer" in row for row in rows):
        raise UserError(f"{paths[0]}: its rows do not say where the answer is in the prompt ('answer': [start, end]); "
                        "make them with `python data.py reformulate`, or leave the step identity out of --steps")
    return [{**row, "completion": row["prompt"][slice(*row["answer"])]} for row in rows]


def contrast_rows(paths, options):
    """An aligner's pairs as preferences: the edit that was asked for over the answer as it is or, as often, over one
    more of the same rated answers, which does something else. Where the answer is to stay, over such a one."""
    rows, rng, found = better_rows(paths, options), random.Random(options.seed), []
    if not all({"answer", "context"} <= set(row) for row in rows):
        raise UserError(f"{paths[0]}: its rows do not say where question and answer are in the prompt ('context', "
                        "'answer': [start, end]); make them with `python data.py reformulate`")
    for _, group in itertools.groupby(rows, lambda row: row["prompt"][slice(*row["context"])]):
        pairs = [(row, row["prompt"][slice(*row["answer"])]) for row in group]  # of one rated row: they stand together
        texts = list(dict.fromkeys(text for row, answer in pairs for text in (answer, row["completion"])))
        for row, answer in pairs:
            others = [text for text in texts if text not in (answer, row["completion"])]
            rejected = [answer] if answer != row["completion"] else []
            if others:
                rejected.append(rng.choice(others))
            if rejected:
                pair = formats.preference(row["prompt"], row["completion"], rng.choice(rejected), "asked", 1.0)
                found.append({**pair, "context": row["context"]})
    return found


def preference_rows(paths, options):
    """Pairs of responses with the probability that the first is better (AI feedback, HH-RLHF, rated answers); with
    --weights, that of rated answers' weighted sums."""
    if options.weights:
        if options.principle:
            raise UserError("--principle: --weights says already what responses are compared on; leave one of them out")
        return scored_rows(paths, options)
    rows = formats.read_all(paths, formats.read_preferences, options.principle or None)
    if options.principle and not rows:
        there = sorted({row["principle"] for path in paths for row in formats.read_preferences(path)})
        raise UserError(f"{paths[0]}: compares no responses on {files.shown(options.principle)}, but on "
                        f"{files.shorten(there) or 'nothing'}; choose one of these with --principle")
    if len(principles := sorted({row["principle"] for row in rows})) > 1:
        raise UserError(f"{paths[0]}: compares responses on {files.shorten(principles)}; choose one with "
                        "--principle, or train a preference model for each (reward.py train)")
    return rows


# ----------------------------------------------------------------------------------------------------------------
# Data functions of answers rated on several objectives, which --weights names


WEIGHTS = "helpful=0.7,honest=0.3"  # an example


def weights_of(text):
    """{objective: weight} of a text like WEIGHTS. UserError for anything else, or for weights that add up to
    nothing."""
    found = {}
    for part in text.replace(",", " ").split():
        name, _, number = part.partition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not math.isfinite(weight) or name in found:
            raise UserError(f"--weights: {part!r} is no weight, or one of {name!r} twice; write {WEIGHTS}")
        found[name] = weight
    if not sum(found.values()):
        told = f"{text!r} adds up to nothing" if text else "not given"
        raise UserError(f"--weights: {told}; give the objectives' weights, such as {WEIGHTS}")
    return found


def rated_rows(paths, names):
    """Rated rows whose responses are all scored on names, the others left out; UserError for a name that is nowhere, or
    when no row is left."""
    rows = [row for row in formats.read_all(paths, formats.read_rated, "overall", None) if row["responses"]]
    there = {name for row in rows for response in row["responses"] for name in response["scores"]}
    if missing := [name for name in names if name not in there]:
        raise UserError(f"{paths[0]}: no answer is rated on {files.shorten(missing)}, but on "
                        f"{files.shorten(sorted(there)) or 'nothing'}; choose of these with --weights")
    good = [row for row in rows if all(set(names) <= set(response["scores"]) for response in row["responses"])]
    if len(good) < len(rows):
        print(f"{paths[0]}: left out: {len(rows) - len(good):,} rows, an answer is not rated on all of "
              f"{files.shorten(names)}")
    if not good:
        raise UserError(f"{paths[0]}: no prompt has answers that are all rated on {files.shorten(names)}; leave some "
                        "of these out of --weights")
    return good


def weighted(scores, weights):
    """The weighted sum of scores, rounded: sums that are equal are so in floating point too."""
    return round(sum(weight * scores[name] for name, weight in weights.items()), 12)


def chance_of(gap, temperature):
    """That a response is the better one whose score is higher by gap: sigmoid(gap / temperature); at 0, certainty."""
    if not temperature or abs(gap) / temperature > 500:
        return float(gap > 0) + 0.5 * (gap == 0)
    return 1 / (1 + math.exp(-gap / temperature))


def scored_pair(prompt, a, b, labelled, temperature, gap):
    """A preference between two rated responses, labelled by `labelled` = (score of a, score of b)."""
    label = chance_of(labelled[0] - labelled[1], temperature)
    return {**formats.preference(prompt, a["text"], b["text"], "weighted", label), "gap": gap}


def scored_rows(paths, options):
    """Every two answers to a prompt, by the weighted sum of their scores; "gap" is its difference."""
    weights, rows = weights_of(options.weights), []
    for row in rated_rows(paths, weights):
        for a, b in itertools.combinations(row["responses"], 2):
            sums = weighted(a["scores"], weights), weighted(b["scores"], weights)
            rows.append(scored_pair(row["prompt"], a, b, sums, options.temperature, sums[0] - sums[1]))
    return rows


def modpo_rows(paths, options):
    """Every two answers, labelled by the first objective that --weights names; "gap" is what the others, weighted, say,
    in the labels' log-odds (MODPO, with exact scores as margins; those of trained models: combine.py implicit)."""
    weights, rows = weights_of(options.weights), []
    first, *others = weights
    if not weights[first] > 0 or not options.temperature:
        raise UserError("modpo: the first objective of --weights labels the pairs, by --temperature; both must be "
                        "above 0: name another one first")
    for row in rated_rows(paths, weights):
        for a, b in itertools.combinations(row["responses"], 2):
            rest = [weighted(response["scores"], {name: weights[name] for name in others}) for response in (a, b)]
            labelled = a["scores"][first], b["scores"][first]
            rows.append(scored_pair(row["prompt"], a, b, labelled, options.temperature,
                                    (rest[0] - rest[1]) / options.temperature))
    return rows


def pro_rows(paths, options):
    """All answers to a prompt, the best first by the weighted sum of their scores. As many for each prompt: those with
    another number than most are left out, and so are prompts whose answers are all as good."""
    weights, rows = weights_of(options.weights), []
    for row in rated_rows(paths, weights):
        ranked = sorted(((weighted(response["scores"], weights), response["text"]) for response in row["responses"]),
                        key=lambda pair: -pair[0])
        if ranked[0][0] > ranked[-1][0]:
            rewards, texts = zip(*ranked)
            rows.append({"prompt": row["prompt"], "ranked": list(texts), "rewards": list(rewards)})
    if not rows:
        raise UserError(f"{paths[0]}: no prompt has an answer that is better than another on {options.weights}; give "
                        "other data or --weights")
    size = statistics.mode(len(row["ranked"]) for row in rows)
    if others := sum(len(row["ranked"]) != size for row in rows):
        print(f"{paths[0]}: left out: {others:,} prompts that have another number of answers than {size}")
    return [row for row in rows if len(row["ranked"]) == size]


def raft_rows(paths, options):
    """The best of each prompt's answers by the weighted sum (RAFT, arXiv 2304.06767, with answers that are there; the
    first of equally good ones)."""
    weights = weights_of(options.weights)
    return [{"prompt": row["prompt"], "completion": max(
        row["responses"], key=lambda response: weighted(response["scores"], weights))["text"]}
        for row in rated_rows(paths, weights)]


def after_text(text, prompt):
    """A prompt that begins with a text, and where the rest of it is: {"prompt", "context"}. Cut the rest, if at all. An
    empty line is between them; dialogues begin with one."""
    text += "" if prompt[:1].isspace() else "\n\n"
    return {"prompt": text + prompt, "context": [len(text), len(text) + len(prompt)]}


def asked_ratings(scores):
    """CPO's condition: "< helpful: 4 > < concise: -1 >"."""
    return " ".join(f"< {name}: {score:g} >" for name, score in scores.items())


def cpsft_rows(paths, options):
    """Every answer, its own ratings asked for (CPSFT of CPO, arXiv 2402.19085), some or all of them."""
    weights, rng = weights_of(options.weights), random.Random(options.seed)
    return [{**after_text(asked_ratings({name: response["scores"][name] for name in data.some(list(weights), rng)}),
                          row["prompt"]), "completion": response["text"]}
            for row in rated_rows(paths, weights) for response in row["responses"]]


def cdpo_rows(paths, options):
    """Every two answers under one condition: the ratings of one answer to the prompt on some of the objectives (CDPO of
    CPO). An answer's value is the sum of weight * what each objective gives: minus the distance from the rating asked
    for, or, of an objective without one, the score."""
    weights, rng, rows = weights_of(options.weights), random.Random(options.seed), []
    for row in rated_rows(paths, weights):
        scores = rng.choice(row["responses"])["scores"]
        asked = {name: scores[name] for name in data.some(list(weights), rng)}
        for a, b in itertools.combinations(row["responses"], 2):
            values = [weighted({name: -abs(asked[name] - score) if name in asked else score
                                for name, score in response["scores"].items()}, weights) for response in (a, b)]
            pair = scored_pair(row["prompt"], a, b, values, options.temperature, values[0] - values[1])
            rows.append({**pair, **after_text(asked_ratings(asked), row["prompt"])})
    return rows


def asked_scores(scores):
    """RiC's condition: "<helpful> 0.7 <concise> -1.2"."""
    return " ".join(f"<{name}> {score:z.1f}" for name, score in scores.items())  # z: no "-0.0"


def ric_rows(paths, options):
    """Every answer, its own scores asked for (RiC, arXiv 2402.10207, offline stage): less their mean over all answers
    and divided by their deviation, to one decimal. The weights' names count, not their sizes."""
    names = list(weights_of(options.weights))
    rated = rated_rows(paths, names)
    scale = score_scale(rated, names)
    return [{**after_text(asked_scores(z_scores(response["scores"], scale)), row["prompt"]),
             "completion": response["text"]} for row in rated for response in row["responses"]]


def score_scale(rated, names):
    """{name: (mean, deviation)} of the scores of all answers; a deviation of 0 counts as 1."""
    scale = {}
    for name in names:
        scores = [response["scores"][name] for row in rated for response in row["responses"]]
        scale[name] = statistics.mean(scores), statistics.pstdev(scores) or 1.0  # exact: equal ones deviate by 0
    return scale


def z_scores(scores, scale):
    return {name: (scores[name] - mean) / deviation for name, (mean, deviation) in scale.items()}


def conditioned_rows(paths, options):
    """Questions after objectives' texts, with an answer that no other beats on these and some do not reach: a policy
    that follows objectives in words (as Janus, arXiv 2405.17977, and CoSA do). Names are those of --weights."""
    objectives = find_objectives(list(weights_of(options.weights)))
    return list(conditioned(rated_rows(paths, [objective.name for objective in objectives]), objectives, options.seed))


def conditioned(rated, objectives, seed):
    """Yield the rows of conditioned_rows; an objective with several wordings is asked for in one of them."""
    rng, by_name = random.Random(seed), {objective.name: objective for objective in objectives}
    for row in rated:
        for response in row["responses"]:
            scores = [other["scores"] for other in row["responses"]]
            names = [name for name, score in response["scores"].items() if name in by_name
                     and score == max(s[name] for s in scores) > min(s[name] for s in scores)]
            if names:
                rng.shuffle(names)
                text = asked_texts([by_name[name].worded(rng) for name in data.some(names, rng)])
                yield {**after_text(text, row["prompt"]), "completion": response["text"]}


def asked_texts(objectives):
    """What a policy conditioned on objectives reads before a prompt."""
    return "The answer: " + "; ".join(objective.description for objective in objectives)


# ----------------------------------------------------------------------------------------------------------------
# Methods


@dataclass(frozen=True)
class Method:
    """rows(paths, options): the data function. loss(values, batch, options): the summed loss of a Batch, where values
    are the log-probabilities (K,) of its targets or, of a scorer, its documents' scores. scorer: trains a scalar head
    instead of words. reference: the batch holds ref_logprobs, what the model gave the same responses at the start.
    batch_mean: the loss compares with a mean over the batch, and so depends on --micro-tokens.
    options: the names of those Options that not every method heeds, and this one does."""
    rows: object
    loss: object
    scorer: bool = False
    reference: bool = False
    batch_mean: bool = False
    options: tuple = ()

    @property
    def pairs(self):
        """Whether examples are pairs of responses, or more of them."""
        return self.loss is not cross_entropy


def cross_entropy(logprobs, batch, options):
    return losses.cross_entropy(logprobs)


def bradley_terry(scores, batch, options):
    return losses.bradley_terry(scores[batch.pairs], batch.labels)


def dpo(logprobs, batch, options):
    labels = losses.flipped(batch.labels, options.label_smoothing)
    return losses.dpo(batch.by_pair(logprobs), batch.ref_logprobs, labels, options.beta)


def robust(logprobs, batch, options):
    labels = losses.unflipped(batch.labels, options.label_smoothing)
    return losses.dpo(batch.by_pair(logprobs), batch.ref_logprobs, labels, options.beta)


def ipo(logprobs, batch, options):
    return losses.ipo(batch.by_pair(logprobs), batch.ref_logprobs, batch.labels, options.beta)


def simpo(logprobs, batch, options):
    return losses.simpo(batch.by_pair(logprobs), batch.sizes, batch.labels, options.beta, options.margin)


def rpo(logprobs, batch, options):
    return losses.rpo(batch.by_pair(logprobs), batch.ref_logprobs, batch.labels, options.beta, options.sft_coef)


def orpo(logprobs, batch, options):
    return losses.orpo(batch.by_pair(logprobs), batch.sizes, batch.labels, options.odds_coef)


def kto(logprobs, batch, options):
    return losses.kto(batch.by_pair(logprobs), batch.ref_logprobs, batch.labels, options.beta)


def bco(logprobs, batch, options):
    return losses.bco(batch.by_pair(logprobs), batch.ref_logprobs, batch.labels, options.beta)


def copg(logprobs, batch, options):
    return losses.copg(batch.by_pair(logprobs), batch.ref_logprobs, batch.gaps, options.beta)


def pro(logprobs, batch, options):
    return losses.pro(batch.by_pair(logprobs), batch.sizes, batch.rewards, options.sft_coef)


def modpo(logprobs, batch, options):
    weight = next(iter(weights_of(options.weights).values()))
    return losses.modpo(batch.by_pair(logprobs), batch.ref_logprobs, batch.labels, options.beta, weight, batch.gaps)


PAIRS = ("principle", "weights", "temperature")  # how pairs are made
METHODS = {
    "pretrain": Method(pretrain_rows, cross_entropy),
    "sft": Method(sft_rows, cross_entropy),
    "identity": Method(identity_rows, cross_entropy, options=("warmup_data",)),
    "partner": Method(partner_rows, cross_entropy, options=("warmup_data",)),
    "equal": Method(equal_rows, cross_entropy),
    "better": Method(better_rows, cross_entropy),
    "contrast": Method(contrast_rows, rpo, reference=True, options=("beta", "sft_coef")),
    "reward": Method(preference_rows, bradley_terry, scorer=True, options=("principle",)),
    "dpo": Method(preference_rows, dpo, reference=True, options=("beta", "label_smoothing", *PAIRS)),
    "robust": Method(preference_rows, robust, reference=True, options=("beta", "label_smoothing", *PAIRS)),
    "ipo": Method(preference_rows, ipo, reference=True, options=("beta", *PAIRS)),
    "rpo": Method(preference_rows, rpo, reference=True, options=("beta", "sft_coef", *PAIRS)),
    "simpo": Method(preference_rows, simpo, options=("beta", "margin", *PAIRS)),
    "orpo": Method(preference_rows, orpo, options=("odds_coef", *PAIRS)),
    "kto": Method(preference_rows, kto, reference=True, batch_mean=True, options=("beta", *PAIRS)),
    "bco": Method(preference_rows, bco, reference=True, batch_mean=True, options=("beta", *PAIRS)),
    "copg": Method(scored_rows, copg, reference=True, options=("beta", "weights")),
    "modpo": Method(modpo_rows, modpo, reference=True, options=("beta", "weights", "temperature")),
    "pro": Method(pro_rows, pro, options=("sft_coef", "weights")),
    "raft": Method(raft_rows, cross_entropy, options=("weights",)),
    "cpsft": Method(cpsft_rows, cross_entropy, options=("weights",)),
    "cdpo": Method(cdpo_rows, dpo, reference=True, options=("beta", "label_smoothing", "weights", "temperature")),
    "ric": Method(ric_rows, cross_entropy, options=("weights",)),
    "conditioned": Method(conditioned_rows, cross_entropy, options=("weights",)),
}
ALIGNER = ["identity", "equal", "better"]  # MetaAligner's three steps; partner is another warm-up


def unheeded(methods):
    """The names of the options that none of these Methods heeds."""
    special = {name for method in METHODS.values() for name in method.options}
    return special - {name for method in methods for name in method.options}
