"""AI feedback: two responses to a prompt, and which one does better, principle by principle.

    python feedback.py answer prompts.jsonl --policy FOLDER --out rated.jsonl
    python feedback.py label rated.jsonl --out labels.jsonl
    python feedback.py label rated.jsonl --principles toxicity "Brevity: The response should be short" \\
        --judge-url http://localhost:8000 --judge-model NAME --out labels.jsonl

Feedback on a single principle is simpler to give, and to learn, than feedback on everything at once (MORLAIF: Williams
2024, arXiv 2406.07295). From top to bottom: a policy's answers; pairs of them; labels by the embedded world's
annotator, or by a model behind a server. What learns from the labels is reward.py, and data.py makes an aligner's
examples of them. The principles are in objectives.py.
"""
# A pair is {"prompt", "response_a", "response_b"}; a label row has its "principle" (a name) and "p_a" as well, the
# probability that response_a is the better one on that principle alone; and "by": "text" where the judge said so in
# words, so that p_a is 1, 0, or 0.5 for a tie.
import itertools
import json
import math
import random
from collections import Counter
from contextlib import closing, nullcontext
from dataclasses import dataclass

from common import (UserError, add_options, check_out, cli, digest, lasting, make_parser, note, number, option,
                    read_options, refuse_given, write_jsonl)

import numpy
from tqdm import tqdm

import chat
import formats
import toy
from endpoint import Endpoint, TooLong, in_parallel, is_empty
from eval import JUDGE_PROMPT, POINTS, endpoint_judge
from objectives import OBJECTIVES, PRINCIPLES, find_objectives
from resume import Journal
from writers import answers_of, fingerprint, is_url, opened

# ----------------------------------------------------------------------------------------------------------------
# A policy's answers


@dataclass
class Answering:
    """How a policy answers."""
    responses: int = option(2, "answers to each prompt", 1, 100)
    temperature: float = option(1.0, "0 takes the likeliest token", 0, 1e9)
    max_new_tokens: int = option(256, "longest answer", 1, 10**9)
    chat_template: str = chat.template_option()
    batch: int = option(64, "answers at a time (of a served policy: 8 at most)", 1, 10**9, free=True)
    seed: int = option(0, "of the sampling", 0, 2**30)


def run_answer(files, policy, policy_model, out, limit, device, sampling):
    """Prompts in, a policy's answers out: rated rows without scores."""
    cache = f"{out}.policy-cache.jsonl"
    check_out(cache, files)

    def answers(items, seed):
        with opened(policy, policy_model, cache, device, sampling.chat_template) as who:
            yield from answers_of(who, items, sampling.max_new_tokens, sampling.temperature, sampling.batch, seed)
    write_answers(files, out, limit, sampling, policy, [fingerprint(policy, sampling.chat_template), policy_model],
                  answers)


def write_answers(files, out, limit, sampling, policy, answered_by, answers):
    """run_answer of any policy, whose name is policy, and all that decides what it says answered_by. answers(items
    {"index", "prompt"}, seed): yields (place, answer), as writers.answers_of does."""
    check_out(out, files)
    rows = formats.read_all(files, formats.read_rated, "chosen", None)
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))[:limit]
    journal = Journal(out, digest(answered_by, lasting(sampling), prompts))
    count, answered = sampling.responses, {index: row["text"] for index, row in journal.rows.items()}
    items = [{"index": index, "prompt": prompts[index // count]} for index in range(len(prompts) * count)]
    with tqdm(total=len(items), initial=len(journal.rows), desc="answering", unit=" answers") as bar:
        for place in range(count):  # each with a seed of its own, for a server too
            todo = [item for item in items[place::count] if item["index"] not in journal.rows]
            if not todo:
                continue
            for i, text in answers(todo, sampling.seed * count + place):
                answered[todo[i]["index"]] = text
                if text or not is_url(policy):  # a server that said nothing is asked again when a killed run goes on
                    journal.add({"index": todo[i]["index"], "text": text})
                bar.update()
    rows, left_out = [], Counter()
    for first, prompt in zip(range(0, len(items), count), prompts):
        texts = [answered[index] for index in range(first, first + count)]
        if None in texts:
            left_out["do not fit the policy's context"] += 1
        elif not all(texts):
            left_out["got an empty answer"] += 1
        else:
            rows.append({"prompt": prompt, "responses": [{"text": text} for text in texts]})
    told = [f"{many} prompts that {reason}" for reason, many in left_out.items()]
    if not rows:
        raise UserError(f"{policy}: no prompt is answered: {', '.join(told)}; give another policy, and delete "
                        f"{journal.path}")
    write_jsonl(out, rows)
    journal.finish()
    for line in told:
        print(f"left out: {line}")
    print(f"{out}: {len(rows)} prompts with {count} responses each")


def response_pairs(files, limit, skipped):
    """Each two responses to a prompt, at most `limit` pairs; `skipped` counts those that are the same text."""
    pairs = []
    for path in files:
        for row in formats.read_rated(path, objective="chosen", skipped=skipped):
            texts = [response["text"] for response in row["responses"]]
            for first, second in itertools.combinations(texts, 2):
                if first == second:
                    skipped["the two responses are the same"] += 1
                    continue
                pairs.append({"prompt": row["prompt"], "response_a": first, "response_b": second})
                if len(pairs) == limit:
                    return pairs
    if not pairs:
        raise UserError(f"{files[0]}: no prompt has two different responses; give responses to compare")
    return pairs


# ----------------------------------------------------------------------------------------------------------------
# Labels by the embedded world's annotator


@dataclass
class Noise:
    """How the embedded world's annotator errs."""
    temperature: float = option(0.5, "annotator: the more, the less sure", 1e-9, 1e9)
    position_bias: float = option(0.0, "annotator: what the response shown first is given, in log-odds", -1e9, 1e9)
    flip_rate: float = option(0.05, "annotator: share of the labels that are turned round", 0, 1)
    seed: int = option(0, "annotator: of the noise", 0, 2**60)


def annotate(difference, rng, temperature, position_bias, flip_rate):
    """The probability p_a that a noisy annotator gives to the first response of a pair.

    difference: by how much the first is really better, in standard deviations; temperature > 0 in the same units.
    The two are shown in random order, and the log-odds of the one shown first are raised by position_bias; with
    chance flip_rate, the label is turned round.
    """
    shown_first = rng.random() < 0.5
    log_odds = difference / temperature + (position_bias if shown_first else -position_bias)
    p_a = sigmoid(log_odds)
    return 1 - p_a if rng.random() < flip_rate else p_a


def sigmoid(log_odds):
    return 0.5 + 0.5 * math.tanh(log_odds / 2)  # overflows nowhere


def embedded_annotator(pairs, principles, noise):
    """annotate() on the embedded world's exact scores: a function (pair, principle's name) -> p_a.

    Differences are in units of the principle's standard deviation over all the responses of `pairs`. As with a model
    at temperature 0, the same question always gets the same answer: the noise depends on it and on the seed alone.
    """
    responses = dict.fromkeys((pair["prompt"], pair[side]) for pair in pairs for side in ("response_a", "response_b"))
    spread = {name: float(numpy.std(sorted(toy.score(name, *response) for response in responses))) or 1.0
              for name in principles}  # sorted: the order of the pairs does not show, not even in the last digit

    def label(pair, name):
        prompt, first, second = pair["prompt"], pair["response_a"], pair["response_b"]
        difference = (toy.score(name, prompt, first) - toy.score(name, prompt, second)) / spread[name]
        rng = random.Random(json.dumps([noise.seed, name, prompt, first, second]))
        return annotate(difference, rng, noise.temperature, noise.position_bias, noise.flip_rate)
    return label


def embedded_labels(pairs, principles, seed=0, **noise):
    """Yield the embedded annotator's label rows, pair by pair, for principles (names that toy.score knows). noise: any
    of the other fields of Noise."""
    label = embedded_annotator(pairs, principles, Noise(seed=seed, **noise))
    for pair, name in itertools.product(pairs, principles):
        yield {**pair, "principle": name, "p_a": label(pair, name)}


# ----------------------------------------------------------------------------------------------------------------
# Labels by a model behind a server

FEEDBACK_PROMPT = """Below are a conversation and two responses that could come next in it. Say which one does \
better by this principle, and regardless of everything else:

{principle}

<conversation>
{prompt}
</conversation>

<response_a>
{first}
</response_a>

<response_b>
{second}
</response_b>

The better one by the principle "{principle}" is (one letter, A or B):"""

# The least P(A) + P(B) that is an answer. A judge who answers gives the letters nearly all there is; where they share
# less than this, it said something else, and which of them is ahead in the rest tells nothing.
ANSWERED = 0.01
ROUNDING = 1e-3  # by so much may the logarithm of a probability of 1 exceed 0


@dataclass
class Asking:
    """How a judge behind a server tells which response is better."""
    verdicts: str = option("auto", "judge: by the log-probabilities of A and B, or by what it says, A, B or tie; auto: "
                           "as text where the server gives none", choices=("auto", "logprobs", "text"))
    judge_tokens: int = option(16, "judge: most tokens of a text verdict; more for one that reasons first", 1, 10**9)


def endpoint_label(endpoint, pair, principle):
    """p_a of a pair on a principle (an Objective) by the model behind an Endpoint.

    The model answers with one token. P(A) / (P(A) + P(B)) is taken for both orders of the two responses and averaged,
    so that a preference for a letter or a place counts for neither. None where an answer cannot be read, or the texts
    exceed the model's context.
    """
    try:
        forward = chance_of_a(ask_letter(endpoint, pair, principle), endpoint)
        backward = chance_of_a(ask_letter(endpoint, pair, principle, swapped=True), endpoint)
    except TooLong:
        return None
    return None if forward is None or backward is None else (forward + 1 - backward) / 2


def ask_letter(endpoint, pair, principle, swapped=False):
    """The reply to FEEDBACK_PROMPT. swapped: response_b is shown as the first."""
    first, second = ("response_b", "response_a") if swapped else ("response_a", "response_b")
    prompt = FEEDBACK_PROMPT.format(principle=principle.description, prompt=pair["prompt"].strip(), first=pair[first],
                                    second=pair[second])
    return endpoint.chat([{"role": "user", "content": prompt}], 1, logprobs=True, top_logprobs=5)


def chance_of_a(reply, endpoint):
    """P(A) / (P(A) + P(B)) at a reply's first token; None where it has none, or both are less likely than ANSWERED.
    Raises UserError for a reply without log-probabilities."""
    if is_empty(reply):
        return None
    listed = likeliest_tokens(reply)
    if listed is None:
        cached = f" and delete {endpoint.cache}" if endpoint.cache else ""
        raise UserError(f"{endpoint.url}: the replies of {endpoint.model!r} hold no log-probabilities of tokens; give "
                        f"--verdicts text, or use a server and model that know logprobs and top_logprobs{cached}")
    return chance_among(listed)


def likeliest_tokens(reply):
    """[(token, log-probability), ...] of what a reply could have begun with; None where it does not say that."""
    try:
        likeliest = reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        listed = [(candidate["token"].strip(), log_probability(candidate["logprob"])) for candidate in likeliest]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError):
        return None
    return listed or None  # only the token that was said, not the likeliest ones


def gives_logprobs(endpoint, pairs, principle):
    """Whether the first reply that says anything, of at most 20, holds log-probabilities. If so, nothing was asked in
    vain: endpoint_label finds the reply in the cache."""
    for pair in pairs[:20]:
        try:
            reply = ask_letter(endpoint, pair, principle)
        except TooLong:
            continue
        if not is_empty(reply):
            return likeliest_tokens(reply) is not None
    return False


def text_label(judge, pair, principle):
    """p_a of a pair on a principle by an eval.endpoint_judge: 1 or 0 where it prefers the same response in both orders,
    0.5 where it does not, or says tie; None where an answer cannot be read."""
    return POINTS[judge(pair["prompt"], pair["response_a"], pair["response_b"], principle.description)]


def log_probability(value):
    """A number that is one, as a float; ValueError or OverflowError for any other."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -math.inf < value <= ROUNDING:
        raise ValueError("no log-probability")
    return float(value)


def chance_among(listed):
    """chance_of_a of [(token, log-probability), ...], the likeliest tokens.

    A letter that is not listed is at most as likely as the least likely one that is, and as all that the listed ones
    leave. It is taken to be so likely: the label is then less sure than the judge, and never surer."""
    logprobs = [logprob for _, logprob in listed]
    left = max(0.0, 1 - math.fsum(map(math.exp, logprobs)))
    most = min(min(logprobs), math.log(left) if left else -math.inf)
    found = {letter: [logprob for token, logprob in listed if token == letter] for letter in "AB"}
    if math.fsum(math.exp(logprob) for letter in found for logprob in found[letter]) < ANSWERED:
        return None
    log_a, log_b = (numpy.logaddexp.reduce(found[letter] or [most]) for letter in "AB")
    return sigmoid(float(log_a - log_b))


# ----------------------------------------------------------------------------------------------------------------
# Pairs in, labels out


def labeller(endpoint, asking, journal, pairs, principles):
    """("logprobs" or "text", a function (pair, principle) -> p_a or None). A run that goes on asks as it began."""
    by = asking.verdicts
    if by == "auto" and journal.rows:
        by = next(iter(journal.rows.values()))["by"]
    elif by == "auto":
        by = "logprobs" if gives_logprobs(endpoint, pairs, principles[0]) else "text"
        if by == "text":
            note(f"{endpoint.url}: gives no log-probabilities; {endpoint.model} is asked for verdicts as text")
    if by == "logprobs":
        return by, lambda pair, principle: endpoint_label(endpoint, pair, principle)
    judge = endpoint_judge(endpoint, asking.judge_tokens)
    return by, lambda pair, principle: text_label(judge, pair, principle)


def run_label(files, out, principles, judge_url, judge_model, concurrency, limit, noise, asking=Asking()):
    """Files of responses in, labels of every two of them out, on each principle."""
    cache = f"{out}.judge-cache.jsonl"
    for path in (out, cache):
        check_out(path, [*files, *(text for text in principles or () if text.endswith(".json"))])
    principles = find_objectives(principles or list(PRINCIPLES), OBJECTIVES)
    skipped = Counter()
    pairs = response_pairs(files, limit, skipped)
    annotator = None if judge_url else embedded_annotator(pairs, [principle.name for principle in principles], noise)
    tasks = list(enumerate(itertools.product(pairs, principles)))

    def annotated(pair, principle):
        return annotator(pair, principle.name)

    def labelled(task):
        index, (pair, principle) = task
        return {"index": index, "p_a": label(pair, principle), "by": by}

    with closing(Endpoint(judge_url, judge_model, cache=cache)) if judge_url else nullcontext() as endpoint:
        judge = [endpoint.url, judge_model, FEEDBACK_PROMPT, JUDGE_PROMPT, lasting(asking)] if endpoint else []
        journal = Journal(out, digest(judge or lasting(noise), pairs, list(map(str, principles))))
        by, label = labeller(endpoint, asking, journal, pairs, principles) if endpoint else ("annotator", annotated)
        todo = [task for task in tasks if task[0] not in journal.rows]
        with tqdm(total=len(tasks), initial=len(tasks) - len(todo), desc="labelling", unit=" labels") as bar:
            for row in in_parallel(labelled, todo, concurrency) if endpoint else map(labelled, todo):
                journal.add(row)
                bar.update()
    rows = [{**pair, "principle": principle.name, "p_a": journal.rows[index]["p_a"],
             **({"by": "text"} if by == "text" else {})} for index, (pair, principle) in tasks]
    read = [row for row in rows if row["p_a"] is not None]
    if not read:
        raise UserError(f"{judge_url}: none of the {len(rows)} labels can be read, as A or B; try another judge, and "
                        f"delete {journal.path}")
    write_jsonl(out, read)
    journal.finish()
    print_labels(read, principles)
    for reason, count in skipped.items():
        print(f"left out: {count} pairs, {reason}")
    if endpoint:
        told = "A, B or tie as text" if by == "text" else "the log-probabilities of A and B"
        print(f"judge: {endpoint.model}, by {told}, in both orders")
        print(f"{endpoint.sent} requests, {endpoint.retried} of them again after a failure; "
              f"{endpoint.reused} replies came from the cache; {len(rows) - len(read)} labels left out as unreadable")
    else:
        print(f"annotator: temperature {noise.temperature:g}, position bias {noise.position_bias:g}, "
              f"flip rate {noise.flip_rate:g}, seed {noise.seed}")
    print(f"{out}: {len(read)} labels of {len(pairs)} pairs")


def print_labels(rows, principles):
    """A line per principle: labels, how sure they are (mean |p_a - 0.5|), how often the first response is better."""
    print(f"{'principle':20}{'labels':>8}{'certainty':>11}{'first better':>14}")
    for principle in principles:
        p_a = numpy.array([row["p_a"] for row in rows if row["principle"] == principle.name])
        if len(p_a):
            first = 100 * ((p_a > 0.5).mean() + (p_a == 0.5).mean() / 2)
            print(f"{principle.name:20}{len(p_a):8}{abs(p_a - 0.5).mean():11.3f}{first:12.1f} %")


# ----------------------------------------------------------------------------------------------------------------
# Command line


def add_answer(commands):
    parser = commands.add_parser("answer", help="let a policy answer prompts twice, for pairs to compare",
                                 description="Let a policy answer prompts several times. A killed run continues.")
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE", help="prompts, in any form that data.py reads")
    add("--policy", required=True, metavar="FOLDER_OR_URL", help="a Llama, or an OpenAI-compatible server")
    add("--policy-model", metavar="NAME", help="the model's name on that server")
    add("--out", required=True, metavar="FILE", help=".jsonl(.gz) of prompt and responses, which `label` reads")
    add("--limit", type=number(int, 1), metavar="N", help="only the first N prompts")
    add_options(parser, Answering)
    add("--device", help="cpu, cuda, ... (default: cuda where there is one)")
    return parser


def add_label(commands):
    parser = commands.add_parser("label", help="label pairs of responses, principle by principle",
                                 description="Label pairs of responses, principle by principle. Without --judge-url "
                                             "the embedded world's noisy annotator does it. A killed run continues.")
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE", help="two or more responses to a prompt, in any form that data.py reads; "
        "each two of them are a pair")
    add("--out", required=True, metavar="FILE", help=".jsonl(.gz) of prompt, response_a, response_b, principle, p_a")
    add("--principles", nargs="+", metavar="P", help='names, "Name: what a response should do", or JSON files; '
        "overall is the better response, all in all (default: the paper's twelve)")
    add("--judge-url", metavar="URL", help="an OpenAI-compatible server, at best one that gives log-probabilities, "
        "such as http://localhost:8000 (key in OPENAI_API_KEY)")
    add("--judge-model", metavar="NAME", help="the model's name on that server")
    add("--concurrency", type=number(int, 1), default=8, metavar="N",
        help="questions to the server at a time (default %(default)s)")
    add("--limit", type=number(int, 1), metavar="N", help="only the first N pairs")
    add_options(parser, Asking)
    add_options(parser, Noise)
    return parser


def main():
    parser = make_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    answer, label = add_answer(commands), add_label(commands)
    args = parser.parse_args()
    if args.command == "answer":
        if is_url(args.policy) and not args.policy_model:
            answer.error("--policy URL needs --policy-model")
        if is_url(args.policy):
            refuse_given(answer, args, ["chat_template"], "is for a folder; a server knows its model's own")
        else:
            refuse_given(answer, args, ["policy_model"], "is a policy's behind a server; give --policy URL")
        run_answer(args.files, args.policy, args.policy_model, args.out, args.limit, args.device,
                   read_options(Answering, args))
    else:
        if bool(args.judge_url) != bool(args.judge_model):
            label.error("--judge-url and --judge-model go together")
        if args.judge_url:
            why = "is the embedded annotator's; leave it out with --judge-url"
            refuse_given(label, args, vars(Noise()), why)
        else:
            refuse_given(label, args, vars(Asking()), "is for a judge behind a server; give --judge-url as well")
        run_label(args.files, args.out, args.principles, args.judge_url, args.judge_model, args.concurrency, args.limit,
                  read_options(Noise, args), read_options(Asking, args))


if __name__ == "__main__":
    cli(main)
