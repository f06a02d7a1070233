"""The rivals on the embedded world: how each is trained from the same start on the same rated answers, and answers.

    name                 what is done                                                          its knob
    start                nothing: the policy that all begin from
    best-of-n            the best of n of its answers by the scorers                           n
    self-refinement      it edits its own answers with the aligner's prompt
    metaaligner          one aligner, told all objectives in words                             pairs (contrast: 4th step
                                                                                               as well); how long
    aligner              one aligner, told nothing: it edits towards the weighted sum
    dpo, ipo, copg, ...  trained on pairs labelled by the weighted sum                         beta
    dpo on raw sums      the paper's "MODPO" column: scores as they are, certain labels, ties broken
    raft                 fine-tuned on the best answer of each prompt
    pro                  trained on all four answers to a question, ranked by the weighted sum
    modpo, cpo, ric      as published; cpo and ric are asked for the objectives' highest scores they were shown
    modpo, implicit      MODPO, the margins by DPO models of the objectives instead of scores
    ric, online          the same, and one round of learning from its own answers
    ric, all maxima      the paper's "SFT" column: scores as they are, asked for the maxima all at once
    ppo, rloo, grpo      reinforcement learning on the exact scores (MORLHF)                   kl_coef
    soup, mod            one DPO model per objective, their weights or their next tokens joined
    conditioned          a policy told objectives in words

A rival is a function (world, weights, knob) -> Entry. compare.py measures entries.
"""
import itertools
import math
import random
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from common import seed_from, write_jsonl

import torch

import checkpoint
import combine
import data
import formats
import methods
import ppo
import story
import toy
import train
import wordings
from writers import Writer
from objectives import Objective

OBJECTIVES = ("helpful", "harmless", "honest", "humour", "polite")  # what the comparison asks for, with equal weights
UNSEEN = "empathetic"  # no answer is rated on it; the foundation has read of it, as a real one has
BRIEF = "conciseness"  # fewer sentences of any kind: at odds with "helpful", which counts the right ones
SIMPLE = Objective("weighted", "be better")                         # the one objective of Aligner, always named
TEXTS = {name: wordings.objective(name) for name in (*OBJECTIVES, UNSEEN)} | {
    BRIEF: Objective(BRIEF, "say as little as possible", ("use few words", "be as short as you can", "The shorter.")),
    SIMPLE.name: SIMPLE}
LENGTH = 64  # tokens of an answer, at most
POLICY = train.Options(lr=3e-4, batch=32, weight_decay=0.01, epochs=1e6, max_tokens=512, val_share=0.0)


@dataclass
class World:
    """Where all begin: folders of the foundation and of the start, rated answers, and questions to be answered."""
    out: Path
    seed: int
    device: torch.device
    steps: int                                     # optimizer steps of every training
    full: bool = True                              # False: one value of each knob
    prompts: list = field(default_factory=list)    # the test questions
    answers: list = field(default_factory=list)    # the start's, one to each
    scale: dict = field(default_factory=dict)      # {objective: deviation of the start's scores}

    @property
    def start(self):
        return self.out / "start"


@dataclass
class Entry:
    """A rival's answers, one to each of the world's prompts, and what they cost. costs: of training, {"tokens",
    "seconds", "fresh": answers drawn for it}. written: tokens at inference of all answers; draws: answers that
    were written for each that is given. nats: its divergence from the start, where it has one."""
    answers: list
    costs: dict = field(default_factory=lambda: {"tokens": 0, "seconds": 0.0, "fresh": 0})
    written: int = 0
    draws: int = 1
    nats: float | None = None


# ----------------------------------------------------------------------------------------------------------------
# The world: a start, rated answers, questions


def build(world, reading, practice, questions, prompts):
    """The foundation, the start, rated answers and test questions; trained and drawn once, read if they are there.
    reading, practice: optimizer steps of the foundation and of the start, which says what the rated answers say."""
    ratings = [text.format(name) for name in (*OBJECTIVES, BRIEF) for text in ("<{}>", " <{}>", "< {}:", " < {}:")]
    story.pretrain(world.out, world.seed, world.device, reading, phrases=ratings)  # so that conditions are short
    rated = list(rated_answers(questions, world.seed))
    rows = [{"prompt": row["prompt"], "completion": f" {text}"} for row in rated for text in row["texts"]]
    fit(world, "start", "sft", rows, world.out / "foundation", max_steps=practice, lr=2e-3)
    rng = random.Random(f"test {world.seed}")
    world.prompts = [toy.question(rng)[0] for _ in range(prompts)]
    world.answers = sampled(world, Writer(world.start, world.device), world.prompts, 0).answers
    known = [row["prompt"] for row in rated[:256]]
    own = sampled(world, Writer(world.start, world.device), known, 2).answers
    for name in (*OBJECTIVES, BRIEF):
        scores = torch.tensor([float(toy.score(name, *pair)) for pair in zip(known, own)])
        world.scale[name] = float(scores.std(correction=0)) or 1.0
    write_jsonl(world.out / "raw.jsonl", (scored(row, dict.fromkeys(world.scale, 1.0)) for row in rated))
    write_jsonl(world.out / "rated.jsonl", (scored(row, world.scale) for row in rated))


def rated_answers(count, seed, responses=4):
    """Yield {"prompt", "texts"}: answers of anybody's manners, each of another's, about nothing but the question."""
    rng = random.Random(f"rivals {seed}")
    for _ in range(count):
        prompt, number = toy.question(rng)
        sentences = toy.material(rng, number, [])
        yield {"prompt": prompt, "texts": [toy.write(rng, sentences, toy.manners(rng)) for _ in range(responses)]}


def scored(row, scale):
    """A rated row with the comparison's objectives, in the given units; answers begin with a space, as when said."""
    return {"prompt": row["prompt"], "responses": [
        {"text": f" {text}",
         "scores": {name: toy.score(name, row["prompt"], text) / unit for name, unit in scale.items()}}
        for text in row["texts"]]}


def even(names=OBJECTIVES):
    return {name: 1 / len(names) for name in names}


def as_text(weights):
    return ",".join(f"{name}={weight:g}" for name, weight in weights.items())


# ----------------------------------------------------------------------------------------------------------------
# Training and answering


def fit(world, label, method, rows, base=None, times=1, **options):
    """Train `method` on rows (or on what its data function makes of the world's rated answers, where rows is None) from
    the start, in the folder `label`. Gives its costs. Those that learn from single answers take twice the steps, for a
    pair is two answers, and a higher rate; and all of it so many `times` as long."""
    learner = methods.METHODS[method]
    single = {} if learner.pairs else {"lr": 3e-3, "max_steps": times * 2 * world.steps}
    options = replace(POLICY, **{"max_steps": times * world.steps, "seed": world.seed, **single, **options})
    rows = learner.rows([world.out / "rated.jsonl"], options) if rows is None else rows
    enough = options.max_steps * options.batch
    rows = random.Random(world.seed).sample(rows, enough) if len(rows) > enough else rows
    llama = checkpoint.load(base or world.start, device=world.device)
    tokenizer = checkpoint.load_tokenizer(base or world.start, llama)
    stage = train.prepare(method, rows, tokenizer, llama.config, options)
    told = train.train(llama, tokenizer, [stage], world.out / label, options, resume=True, overwrite=True)
    return {"tokens": told[-1]["tokens"], "seconds": told[-1]["seconds"], "fresh": 0}


def sampled(world, writer, prompts, draw=1):
    """An Entry of one answer to each prompt at temperature 1; another for another draw. Draw 0 is what all figures are
    against, so that what is drawn anew from the start shows what drawing alone does."""
    ids = [writer.encode(prompt, LENGTH) for prompt in prompts]
    seeds = [seed_from(world.seed, draw, i) for i in range(len(ids))]
    texts = dict(writer.write(ids, LENGTH, 64, temperature=1.0, seeds=seeds))
    return counted(writer, Entry([texts[i] for i in range(len(ids))]))


def counted(writer, entry):
    ids = data.text_ids(writer.tokenizer, [f" {text}" for text in entry.answers])
    entry.written = sum(map(len, ids)) + len(ids)  # with the stop token of each
    return entry


def policy_entry(world, writer, costs, before=""):
    """What a trained policy answers, told `before`; with its divergence from the start."""
    told = [methods.after_text(before, prompt)["prompt"] for prompt in world.prompts]
    entry = sampled(world, writer, told)
    ours = text_logprobs(writer, told, entry.answers)
    theirs = text_logprobs(Writer(world.start, world.device), world.prompts, entry.answers)
    entry.nats, entry.costs = float((ours - theirs).mean()), costs
    return entry


@torch.inference_mode()
def text_logprobs(writer, prompts, texts):
    """(N,): the log-probability of each text and its end after its prompt."""
    rows = [{"prompt": prompt, "completion": f" {text}"} for prompt, text in zip(prompts, texts)]
    found = combine.response_logprobs(writer.llama, writer.tokenizer, rows, None)
    return torch.tensor(found)


def policy(world, label, costs, before=""):
    return policy_entry(world, Writer(world.out / label, world.device), costs, before)


# ----------------------------------------------------------------------------------------------------------------
# The rivals. Each (world, weights, knob) -> Entry.


def start(world, weights, knob):
    return replace(sampled(world, Writer(world.start, world.device), world.prompts), nats=0.0)


def best_of_n(world, weights, n):
    writer = Writer(world.start, world.device)
    draws = [sampled(world, writer, world.prompts, 100 + k) for k in range(n)]
    best = []
    for prompt, *texts in zip(world.prompts, *(draw.answers for draw in draws)):
        best.append(max(texts, key=lambda text: value(world, weights, prompt, text)))
    return Entry(best, written=sum(draw.written for draw in draws), draws=n, nats=math.log(n) - (n - 1) / n)


def value(world, weights, prompt, text):
    """The weighted sum of an answer's scores in the world's units."""
    return sum(weight * toy.score(name, prompt, text) / world.scale.get(name, 1.0) for name, weight in weights.items())


def drafts(world):
    """The rated answers as an aligner's prompt holds them, without the space that policies begin with."""
    rows = list(formats.read_rated(world.out / "rated.jsonl"))
    return [{**row, "responses": [{**response, "text": response["text"].strip()} for response in row["responses"]]}
            for row in rows]


def pairs_of(world, names, pairing):
    """Pairs for an aligner that is asked for objectives of names. Where no objective may get worse (dominance), BRIEF
    counts only where it is asked for: else no edit could add a sentence."""
    rows, pairing = drafts(world), replace(pairing, seed=world.seed)
    others = [name for name in names if name != BRIEF or not pairing.dominance]
    pairs = list(data.reformulate(rows, [TEXTS[name] for name in others], pairing))
    if len(others) < len(names):
        everything = data.reformulate(rows, [TEXTS[name] for name in names], pairing)
        pairs += [pair for pair in everything if BRIEF in pair["objectives"]]
    return list(map(story.after_a_space, pairs))


def sum_pairs(world, weights):
    """Pairs for an aligner that is told nothing: an answer and one with a higher weighted sum."""
    rows = drafts(world)
    for response in (response for row in rows for response in row["responses"]):
        response["scores"] = {SIMPLE.name: methods.weighted(response["scores"], weights)}
    return list(map(story.after_a_space, data.reformulate(rows, [SIMPLE], data.Pairing(seed=world.seed))))


def train_editor(world, label, rows, times=1):
    """An aligner: a warm-up by identity, then pairs; twice as long as others train, and so many `times` as long. Gives
    its costs."""
    random.Random(world.seed).shuffle(rows)
    chosen = {"equal": [row for row in rows if row["relation"] == "equal"],
              "better": [row for row in rows if row["relation"] != "equal"]}
    warm = [{**row, "completion": row["prompt"][slice(*row["answer"])]} for row in chosen["equal"] or rows]
    few = max(1, world.steps // 10)
    first = fit(world, f"{label} warm-up", "better", warm, max_steps=few)
    rest = fit(world, label, "better", chosen["better"], world.out / f"{label} warm-up",
               max_steps=times * 4 * world.steps - few)
    return {name: first[name] + rest[name] for name in rest}


def edited(world, writer, answers, objectives, costs):
    """An Entry of edits of answers, asked for objectives; drawn at temperature 1, as policies' answers are."""
    items = [{"prompt": prompt, "original": answer, "objectives": objectives}
             for prompt, answer in zip(world.prompts, answers)]
    edits = story.edit(writer, items, world.seed, temperature=1.0)
    entry = counted(writer, Entry([item["aligned"] for item in edits], costs))
    entry.written += counted(writer, Entry(answers)).written
    entry.draws = 2
    return entry


PAIRINGS = {"dominance": story.PAIRING, "contrast": story.PAIRING, "paper's pairs": data.Pairing()}


def times_of(knob):
    """A knob that ends in how many times as long is trained, "dominance x4", in its two parts."""
    rest, _, times = knob.rpartition("x")
    return rest.strip(), int(times)


def knobs_of(world, name):
    """The values of a rival's knob that a run takes: all, or the first that does not train longer."""
    knobs = RIVALS[name][1]
    return knobs if world.full else [knob for knob in knobs if not str(knob).endswith("x4")][:1] or knobs[:1]


def metaaligner(world, weights, knob, answers=None):
    kind, times = times_of(knob)
    pairs = pairs_of(world, (*OBJECTIVES, BRIEF), PAIRINGS[kind])
    supervised = f"metaaligner {kind} x{times}".replace("contrast", "dominance")
    label, costs = f"metaaligner {knob}", train_editor(world, supervised, pairs, times)
    if kind == "contrast":
        write_jsonl(world.out / f"{label}.jsonl", pairs)
        rows = methods.contrast_rows([world.out / f"{label}.jsonl"], replace(POLICY, seed=world.seed))
        more = fit(world, label, "contrast", rows, world.out / supervised, times, **story.CONTRAST)
        costs = {name: costs[name] + more[name] for name in costs}
    asked = [TEXTS[name] for name, weight in weights.items() if weight]
    return edited(world, Writer(world.out / label, world.device), answers or world.answers, asked, costs)


def aligner(world, weights, knob, answers=None):
    label = f"aligner {as_text(weights)}"
    costs = train_editor(world, label, sum_pairs(world, weights))
    return edited(world, Writer(world.out / label, world.device), answers or world.answers, [SIMPLE], costs)


def self_refinement(world, weights, knob):
    asked = [TEXTS[name] for name, weight in weights.items() if weight]
    return edited(world, Writer(world.start, world.device), world.answers, asked, Entry([]).costs)


def preferred(world, weights, knob, method, times=1, **options):
    """A policy trained by a method of methods.py whose data function heeds --weights; the knob is beta."""
    weights = {name: weight for name, weight in weights.items() if weight}
    label = f"{method} {as_text(weights)} {knob}" + (f" x{times}" if times > 1 else "")
    options = {"weights": as_text(weights), **({"beta": knob} if knob else {}), **options}
    return policy(world, label, fit(world, label, method, None, times=times, **options))


def raw_sums(world, weights, beta):
    """DPO on certain labels of the plain sum of the scores as they are, ties for whichever comes first."""
    rows = []
    for row in formats.read_rated(world.out / "raw.jsonl"):
        for a, b in itertools.combinations(row["responses"], 2):
            sums = [sum(response["scores"][name] for name in weights) for response in (a, b)]
            rows.append(formats.preference(row["prompt"], a["text"], b["text"], "sum", float(sums[0] >= sums[1])))
    return policy(world, "dpo on raw sums", fit(world, "dpo on raw sums", "dpo", rows, beta=beta))


def modpo_implicit(world, weights, beta):
    """MODPO whose margins are the implicit rewards of one DPO model for each objective but the first, as when there are
    preferences and no scores: these are pairs' log-odds at temperature 1."""
    weights = {name: weight for name, weight in weights.items() if weight}
    label = f"modpo implicit {as_text(weights)} {beta}"
    folders, _, costs = singles(world, dict(list(weights.items())[1:]), beta)
    first, *others = weights
    source = world.out / "rated.jsonl"
    for name, folder in zip(others, folders):  # each adds its score to those that are there
        made = world.out / f"{label} {name}.jsonl"
        combine.run_implicit(folder, world.start, beta, f"{name}*", [source], made, world.device)
        source = made
    asked = {first: weights[first]} | {f"{name}*": weights[name] for name in others}
    options = replace(POLICY, seed=world.seed, weights=as_text(asked))
    rest = fit(world, label, "modpo", methods.modpo_rows([source], options), weights=as_text(asked), beta=beta)
    return policy(world, label, {name: costs[name] + rest[name] for name in rest})


def cpo(world, weights, beta):
    """CPSFT, then CDPO from it; asked for the highest rating of each objective that has a weight."""
    names = as_text(dict.fromkeys(weights, 1.0))
    first = fit(world, f"cpsft {names}", "cpsft", None, weights=names)
    label = f"cdpo {names} {beta}"
    rest = fit(world, label, "cdpo", None, world.out / f"cpsft {names}", weights=names, beta=beta)
    best = highest(world, weights)
    asked = methods.asked_ratings({name: best[name] for name, weight in weights.items() if weight})
    return policy(world, label, {name: first[name] + rest[name] for name in rest}, asked)


def highest(world, names):
    """{name: the highest score of any rated answer}."""
    scores = [response["scores"] for row in formats.read_rated(world.out / "rated.jsonl")
              for response in row["responses"]]
    return {name: max(score[name] for score in scores) for name in names}


def ric(world, weights, knob):
    """RiC's offline stage, asked for the scores that its rule makes of the weights."""
    names = dict.fromkeys(weights, 1.0)
    label = f"ric {as_text(names)} {knob}"
    costs = fit(world, label, "ric", None, times=times_of(knob)[1], weights=as_text(names))
    return policy(world, label, costs, methods.asked_scores(ric_targets(world, weights)))


def ric_targets(world, weights):
    """{objective: z-score to ask for} by RiC's "linf" rule, between the lowest and the highest that training showed
    (the paper: +-4.2): the highest for the largest weight, low + (high - low) * min(n * w, 1) for others. A weight of
    0 asks for the worst, not for anything. (Its "l2" rule asks for less than the mean when five weights are equal.)"""
    rated = list(formats.read_rated(world.out / "rated.jsonl"))
    scale = methods.score_scale(rated, list(weights))
    shown = [methods.z_scores(response["scores"], scale) for row in rated for response in row["responses"]]
    total, largest, targets = sum(weights.values()), max(weights.values()), {}
    for name, weight in weights.items():
        low, high = (pick(scores[name] for scores in shown) for pick in (min, max))
        share = 1.0 if weight == largest else min(len(weights) * weight / total, 1.0)
        targets[name] = low + (high - low) * share
    return targets


def ric_online(world, weights, knob, count=512):
    """RiC with one round online: the policy is asked for scores near the best, and goes on learning from what it then
    says, under the scores obtained, and from half as many rated answers; of both, those that are among the best 30 % of
    the drawn ones on an objective."""
    names, rng = dict.fromkeys(weights, 1.0), random.Random(f"online {world.seed}")
    first, label = ric(world, weights, knob), f"ric {as_text(names)} {knob}"
    rated = list(formats.read_rated(world.out / "rated.jsonl"))
    scale = methods.score_scale(rated, list(names))
    shown = [(row["prompt"], response["text"], methods.z_scores(response["scores"], scale))
             for row in rated for response in row["responses"]]
    prompts = [row["prompt"] for row in rng.choices(rated, k=count)]
    asked = [methods.asked_scores(near_the_best(rng, [scores for _, _, scores in shown], names)) for _ in prompts]
    drawn = sampled(world, Writer(world.out / label, world.device), list(map(str.__add__, asked, prompts)), 3).answers
    said = [(prompt, f" {text}", methods.z_scores(
        {name: toy.score(name, prompt, text) / world.scale[name] for name in names}, scale))
        for prompt, text in zip(prompts, drawn)]
    bar = {name: sorted(scores[name] for _, _, scores in said)[int(0.7 * count)] for name in names}
    good = [[row for row in found if any(row[2][name] >= bar[name] for name in names)] for found in (said, shown)]
    rows = [{**methods.after_text(methods.asked_scores(scores), prompt), "completion": text}
            for prompt, text, scores in good[0] + rng.sample(good[1], min(len(good[1]), count // 2))]
    more = fit(world, f"{label} online", "sft", rows, world.out / label, max_steps=max(1, world.steps // 2), lr=1e-3)
    costs = {name: first.costs[name] + more[name] for name in more} | {"fresh": count}
    return policy(world, f"{label} online", costs, methods.asked_scores(ric_targets(world, weights)))


def near_the_best(rng, shown, names):
    """{objective: z-score}, drawn evenly between the lowest and the highest shown; then the highest for all but the one
    that was drawn lowest, RiC's guess at the Pareto front."""
    ends = {name: [pick(scores[name] for scores in shown) for pick in (min, max)] for name in names}
    place = {name: rng.random() for name in names}
    lowest = min(place, key=place.get)
    return {name: low + (high - low) * place[name] if name == lowest else high for name, (low, high) in ends.items()}


def ric_maxima(world, weights, knob):
    """RiC's first stage on scores as they are, asked for all maxima at once."""
    rated = list(formats.read_rated(world.out / "raw.jsonl"))
    rows = [{**methods.after_text(methods.asked_scores({name: response["scores"][name] for name in weights}),
                                  row["prompt"]), "completion": response["text"]}
            for row in rated for response in row["responses"]]
    costs = fit(world, "ric, all maxima", "sft", rows)
    most = {name: max(response["scores"][name] for row in rated for response in row["responses"]) for name in weights}
    return policy(world, "ric, all maxima", costs, methods.asked_scores(most))


def reinforced(world, weights, kl_coef, advantages):
    """PPO, RLOO or GRPO on the exact scores, joined linearly."""
    label = f"{advantages} {as_text(weights)} {kl_coef}"
    names = [name for name, weight in weights.items() if weight]
    options = ppo.Options(iterations=max(2, world.steps // 8), rollouts=64, minibatch=32, update_epochs=2, lr=1e-3,
                          max_new_tokens=LENGTH, kl_coef=kl_coef, kl_target=0.0, seed=world.seed,
                          advantages=advantages)
    llama = checkpoint.load(world.start, device=world.device)
    tokenizer = checkpoint.load_tokenizer(world.start, llama)
    prompts = list(dict.fromkeys(row["prompt"] for row in formats.read_rated(world.out / "rated.jsonl")))
    told = ppo.improve(llama, tokenizer, prompts, ppo.ExactScorer(names), [weights[name] for name in names], "linear",
                       world.out / label, options, resume=True, overwrite=True)
    drawn = options.iterations * options.rollouts
    asked = sum(map(len, data.text_ids(tokenizer, prompts))) / len(prompts)  # prompts are trained on with responses
    costs = {"tokens": round(options.update_epochs * (told[-1]["tokens"] + drawn * asked)),
             "seconds": told[-1]["seconds"], "fresh": drawn + options.reference_count}
    return policy(world, label, costs)


def singles(world, weights, beta):
    """DPO models, one for each objective with a weight: (folders, weights, costs of all)."""
    folders, costs = [], []
    for name in weights:
        label = f"dpo {name}=1 {beta}"
        costs.append(fit(world, label, "dpo", None, weights=f"{name}=1", beta=beta))
        folders.append(world.out / label)
    return folders, list(weights.values()), {name: sum(cost[name] for cost in costs) for name in costs[0]}


def soup(world, weights, beta):
    folders, parts, costs = singles(world, weights, beta)
    writer = Writer(folders[0], world.device)
    writer.llama = combine.prepack(combine.soup(folders, combine.shares(parts, folders)).to(
        world.device, next(writer.llama.parameters()).dtype).eval())
    return policy_entry(world, writer, costs)


def mod(world, weights, beta):
    folders, parts, costs = singles(world, weights, beta)
    writer = combine.ProductWriter(folders, combine.shares(parts, folders), world.device)
    return replace(policy_entry(world, writer, costs), draws=len(folders))


def conditioned(world, weights, knob):
    objectives = [TEXTS[name] for name in (*OBJECTIVES, BRIEF)]
    rows = list(methods.conditioned(formats.read_rated(world.out / "rated.jsonl"), objectives, world.seed))
    costs = fit(world, f"conditioned {knob}", "sft", rows, times=times_of(knob)[1])
    asked = methods.asked_texts([TEXTS[name] for name, weight in weights.items() if weight])
    return policy(world, f"conditioned {knob}", costs, asked)


RIVALS = {  # name -> (function, values of its knob, the first one in the table)
    "start": (start, [None]),
    "best-of-n": (best_of_n, [16, 4]),
    "self-refinement": (self_refinement, [None]),
    "metaaligner": (metaaligner, ["contrast x4", "dominance x4", "dominance x1", "paper's pairs x1"]),
    "aligner": (aligner, [None]),
    "dpo": (partial(preferred, method="dpo"), [0.1, 0.5, 0.03]),
    "dpo, x4": (partial(preferred, method="dpo", times=4), [0.1]),
    "ipo": (partial(preferred, method="ipo"), [0.1]),
    "simpo": (partial(preferred, method="simpo"), [2.0]),
    "copg": (partial(preferred, method="copg"), [0.1]),
    "raft": (partial(preferred, method="raft"), [None]),
    "pro": (partial(preferred, method="pro", sft_coef=0.45), [None]),
    "dpo on raw sums": (raw_sums, [0.1]),
    "modpo": (partial(preferred, method="modpo"), [0.1]),
    "modpo, implicit": (modpo_implicit, [0.1]),
    "cpo": (cpo, [0.1]),
    "ric": (ric, ["x4", "x1"]),
    "ric, online": (ric_online, ["x4"]),
    "ric, all maxima": (ric_maxima, [None]),
    "ppo": (partial(reinforced, advantages="gae"), [0.02]),
    "rloo": (partial(reinforced, advantages="rloo"), [0.02, 0.1]),
    "grpo": (partial(reinforced, advantages="gdpo"), [0.02]),
    "soup": (soup, [0.1]),
    "mod": (mod, [0.1]),
    "conditioned": (conditioned, ["x4", "x1"]),
}
