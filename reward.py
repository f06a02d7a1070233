"""MORLAIF's rewards: AI feedback per principle, preference models that learn it, and how their scores become one.

    python reward.py answer prompts.jsonl --policy FOLDER --out rated.jsonl
    python reward.py label rated.jsonl --out labels.jsonl
    python reward.py label rated.jsonl --principles toxicity "Brevity: The response should be short" \\
        --judge-url http://localhost:8000 --judge-model NAME --out labels.jsonl
    python reward.py train labels.jsonl --model FOLDER --out pms [--lora-rank 8]
    python reward.py score labels.jsonl --models pms/toxicity pms/detail

The feedback on a single principle is simpler to give, and to learn, than the feedback on everything at once (Williams
2024, arXiv 2406.07295). From top to bottom: the principles; pairs of responses labelled by the embedded world's
annotator or by a model behind a server; preference models; scalarization; the figures that are reported.
"""
import argparse
import hashlib
import itertools
import json
import math
import random
import sys
from pathlib import Path

import data
from data import UserError, cli


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], epilog=__doc__.split("\n", 2)[2],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, short, long):
        return commands.add_parser(name, help=short, description=long)
    parsers = {
        "answer": answer_flags(command("answer", "let a policy answer prompts twice, for pairs to compare",
                                       "Let a policy answer prompts several times. A killed run continues.")),
        "label": label_flags(command("label", "label pairs of responses, principle by principle",
                                     "Label pairs of responses, principle by principle. Without --judge-url the "
                                     "embedded world's noisy annotator does it. A killed run continues.")),
        "train": train_flags(command("train", "train a preference model for each principle that is labelled",
                                     "Train a preference model for each principle that is labelled, and report how it "
                                     "does on prompts held out. A killed run continues."),
                             sys.argv[1:] if argv is None else argv),
        "score": score_flags(command("score", "score pairs, and tell how accurate the scores are",
                                     "Score pairs of responses by preference models, and tell how often they agree "
                                     "with the labels."))}
    args = parser.parse_args(argv)
    check = {"answer": check_answer, "label": check_label, "train": check_train}.get(args.command)
    if check:
        check(args, parsers[args.command])
    return args


def answer_flags(parser):
    add = parser.add_argument
    add("data", nargs="+", metavar="FILE", help="prompts, in any form that data.py reads")
    add("--policy", required=True, metavar="FOLDER_OR_URL", help="a Llama, or an OpenAI-compatible server")
    add("--policy-model", metavar="NAME", help="the model's name on that server")
    add("--out", required=True, metavar="FILE", help=".jsonl(.gz) of prompt and responses, which `label` reads")
    add("--responses", type=int, default=2, metavar="N", help="answers to each prompt (default 2)")
    add("--temperature", type=float, default=1.0, help="of the sampling (default 1)")
    add("--max-new-tokens", type=int, default=256, metavar="N", help="longest answer (default 256)")
    add("--batch", type=int, default=64, metavar="N", help="answers at a time (default 64)")
    add("--limit", type=int, metavar="N", help="only the first N prompts")
    add("--seed", type=int, default=0, help="of the sampling (default 0)")
    add("--device", default=None, help="cpu, cuda, ... (default: cuda where there is one)")
    return parser


def label_flags(parser):
    add = parser.add_argument
    add("data", nargs="+", metavar="FILE", help="two or more responses to a prompt, in any form that data.py reads; "
        "each two of them are a pair")
    add("--out", required=True, metavar="FILE", help=".jsonl(.gz) of prompt, response_a, response_b, principle, p_a")
    add("--principles", nargs="+", metavar="P", help='names, "Name: what a response should do", or JSON files; '
        "overall is the better response, all in all (default: the paper's twelve)")
    add("--judge-url", metavar="URL", help="an OpenAI-compatible server that gives log-probabilities, such as "
        "http://localhost:8000 (key in OPENAI_API_KEY)")
    add("--judge-model", metavar="NAME", help="the model's name on that server")
    add("--concurrency", type=int, default=8, metavar="N", help="questions to the server at a time (default 8)")
    add("--temperature", type=float, default=0.5, help="the annotator's: the more, the less sure (default 0.5)")
    add("--position-bias", type=float, default=0.0, metavar="NATS",
        help="the annotator's: what the response shown first is given, in log-odds (default 0)")
    add("--flip-rate", type=float, default=0.05, metavar="SHARE",
        help="the annotator's: labels that it turns round (default 0.05)")
    add("--limit", type=int, metavar="N", help="only the first N pairs")
    add("--seed", type=int, default=0, help="of the annotator's noise (default 0)")
    return parser


def train_flags(parser, argv):
    add = parser.add_argument
    add("data", nargs="+", metavar="FILE", help="labels, rated responses, HH-RLHF or TRL pairs, AlpacaEval, Auto-J")
    add("--model", required=True, metavar="FOLDER", help="the Llama to start from")
    add("--out", required=True, metavar="FOLDER", help="where a folder for each principle goes")
    add("--principles", nargs="+", metavar="NAME", help="train only these (default: all that are labelled)")
    if argv[:1] == ["train"]:  # the other options are train.py's, which takes seconds to import
        import train
        train.add_options(parser, train.Options(**TRAINING), train.OPTION_HELP)
    return parser


def score_flags(parser):
    add = parser.add_argument
    add("data", nargs="+", metavar="FILE", help="pairs, in any form that `train` takes")
    add("--models", required=True, nargs="+", metavar="FOLDER", help="preference models, whole or adapters")
    add("--out", metavar="FILE", help="write the pairs with their scores there")
    add("--device", default=None, help="cpu, cuda, ... (default: cuda where there is one)")
    return parser


TRAINING = dict(lr=1e-5, batch=64, epochs=1.0, val_share=0.1)  # where its defaults are not train.py's


def check_answer(args, parser):
    """What `answer` refuses at once."""
    for name in ("responses", "max_new_tokens", "batch", "limit"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if not 0 <= args.temperature < math.inf:
        parser.error("--temperature must be 0 or more")
    if args.policy.startswith("http") and not args.policy_model:
        parser.error("--policy URL needs --policy-model")


def check_train(args, parser):
    import train
    train.check_ranges(parser, args)


def check_label(args, parser):
    """What `label` refuses at once."""
    if bool(args.judge_url) != bool(args.judge_model):
        parser.error("--judge-url and --judge-model go together")
    for name in ("temperature", "position_bias", "flip_rate", "seed"):
        if args.judge_url and getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} is the embedded annotator's; leave it out with --judge-url")
    for name in ("concurrency", "limit"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if not 0 < args.temperature < math.inf:
        parser.error("--temperature must be more than 0")
    if not abs(args.position_bias) < math.inf:
        parser.error("--position-bias must be a number")
    if not 0 <= args.flip_rate <= 1:
        parser.error("--flip-rate must be from 0 to 1")


if __name__ == "__main__":
    arguments()  # --help and mistyped flags are answered before the seconds that importing torch takes

import numpy  # noqa: E402
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

import model  # noqa: E402
import toy  # noqa: E402
import train  # noqa: E402
from align import Journal, answered, check_out  # noqa: E402
from eval import Endpoint, TooLong, in_parallel, mean_and_interval  # noqa: E402

# ----------------------------------------------------------------------------------------------------------------
# Principles: the paper's twelve, in our words. Toxicity, sycophancy and bias are named after what is to be avoided.

DESCRIPTIONS = {
    "helpfulness": "The response should bring the person closer to what they want to get done",
    "ethicality": "The response should do right by everyone it concerns, and lead nobody to harm",
    "factuality": "The response should state nothing that is untrue",
    "toxicity": "The response should contain as little as possible that is rude, hateful or insulting",
    "sycophancy": "The response should flatter and please for the sake of pleasing as little as possible",
    "empathy": "The response should show that it understands how the person feels",
    "relevance": "The response should keep to what was asked and wander off nowhere",
    "context": "The response should fit the situation and what was said before",
    "bias": "The response should be as free as possible from prejudice and from taking sides without grounds",
    "understandability": "The response should be easy to follow for the person who asked",
    "detail": "The response should go into particulars, as many as the question deserves",
    "conciseness": "The response should say what it has to say in few words",
}
PRINCIPLES = {name: data.Objective(name, description) for name, description in DESCRIPTIONS.items()}
OVERALL = data.Objective("overall", "The response should be the better one, all in all")

# ----------------------------------------------------------------------------------------------------------------
# AI feedback. A pair is {"prompt", "response_a", "response_b"}; a label row has its "principle" (a name) and "p_a"
# as well, the probability that response_a is the better one on that principle alone.


def run_answer(args):
    """The command `answer`."""
    check_out(args)
    rows = (row for path in args.data for row in data.read_rated(path, objective="chosen"))
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))[:args.limit]
    decisive = "policy", "policy_model", "responses", "temperature", "max_new_tokens", "seed"
    settings = [getattr(args, name) for name in decisive]
    journal = Journal(args.out, hashlib.sha256(json.dumps([settings, prompts]).encode()).hexdigest())
    with tqdm(total=len(prompts) * args.responses, initial=len(journal.rows), desc="answering", unit=" answers") as bar:
        for place in range(args.responses):  # each with a seed of its own, for a server too
            items = [{"index": number * args.responses + place, "prompt": prompt}
                     for number, prompt in enumerate(prompts)]
            items = [item for item in items if item["index"] not in journal.rows]
            seeded = argparse.Namespace(**{**vars(args), "seed": args.seed * args.responses + place})
            for number, text in answered(items, args.policy, seeded) if items else ():
                journal.add([{"index": items[number]["index"], "text": text}])
                bar.update()
    texts = iter([{"text": journal.rows[index]["text"]} for index in range(len(prompts) * args.responses)])
    data.write_jsonl(args.out, ({"prompt": prompt, "responses": list(itertools.islice(texts, args.responses))}
                                for prompt in prompts))
    journal.finish()
    print(f"{args.out}: {len(prompts)} prompts with {args.responses} responses each")


def response_pairs(paths, limit, skipped):
    """Each two responses to a prompt, at most `limit` pairs; `skipped` counts those that are the same text."""
    pairs = []
    for path in paths:
        for row in data.read_rated(path, objective="chosen", skipped=skipped):
            texts = [response["text"] for response in row["responses"]]
            for first, second in itertools.combinations(texts, 2):
                if first == second:
                    skipped["the two responses are the same"] += 1
                    continue
                pairs.append({"prompt": row["prompt"], "response_a": first, "response_b": second})
                if len(pairs) == limit:
                    return pairs
    if not pairs:
        raise UserError(f"{paths[0]}: no prompt has two different responses; give responses to compare")
    return pairs


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


def embedded_annotator(pairs, principles, seed=0, temperature=0.5, position_bias=0.0, flip_rate=0.05):
    """annotate() on the embedded world's exact scores: a function (pair, principle's name) -> p_a.

    Differences are in units of the principle's standard deviation over all the responses of `pairs`. As with a model
    at temperature 0, the same question always gets the same answer: the noise depends on it and on the seed alone.
    """
    responses = dict.fromkeys((pair["prompt"], pair[key]) for pair in pairs for key in ("response_a", "response_b"))
    spread = {name: float(numpy.std(sorted(toy.score(name, *response) for response in responses))) or 1.0
              for name in principles}  # sorted: the order of the pairs does not show, not even in the last digit

    def label(pair, name):
        prompt, first, second = pair["prompt"], pair["response_a"], pair["response_b"]
        difference = (toy.score(name, prompt, first) - toy.score(name, prompt, second)) / spread[name]
        rng = random.Random(json.dumps([seed, name, prompt, first, second]))
        return annotate(difference, rng, temperature, position_bias, flip_rate)
    return label


def embedded_labels(pairs, principles, seed=0, temperature=0.5, position_bias=0.0, flip_rate=0.05):
    """Yield the embedded annotator's label rows, pair by pair, for principles (names that toy.score knows)."""
    label = embedded_annotator(pairs, principles, seed, temperature, position_bias, flip_rate)
    for pair, name in itertools.product(pairs, principles):
        yield {**pair, "principle": name, "p_a": label(pair, name)}


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

MISSING = -10.0  # the log-probability of a letter that is not among the five likeliest tokens (the paper's code)


def endpoint_label(endpoint, pair, principle):
    """p_a of a pair on a principle (an Objective) by the model behind an eval.Endpoint.

    The model answers with one token. P(A) / (P(A) + P(B)) is taken for both orders of the two responses and averaged,
    so that a preference for a letter or a place counts for neither. None where an answer cannot be read, or the texts
    exceed the model's context.
    """
    chances = []
    for first, second in (("response_a", "response_b"), ("response_b", "response_a")):
        prompt = FEEDBACK_PROMPT.format(principle=principle.description, prompt=pair["prompt"].strip(),
                                        first=pair[first], second=pair[second])
        try:
            reply = endpoint.chat([{"role": "user", "content": prompt}], 1, logprobs=True, top_logprobs=5)
        except TooLong:
            return None
        chances.append(chance_of_a(reply, endpoint))
    forward, backward = chances
    return None if forward is None or backward is None else (forward + 1 - backward) / 2


def chance_of_a(reply, endpoint):
    """P(A) / (P(A) + P(B)) at a reply's first token; None where neither letter is among the likeliest.
    Raises UserError for a reply without log-probabilities."""
    found = {"A": [], "B": []}
    try:
        tokens = reply["choices"][0]["logprobs"]["content"]
        candidates = tokens[0]["top_logprobs"] if tokens else ()  # no token: the model said nothing
        if tokens and not candidates:
            raise ValueError("only the token that was said, not the likeliest ones")
        for candidate in candidates:
            letter, logprob = candidate["token"].strip(), float(candidate["logprob"])
            if letter in found and math.isfinite(logprob):
                found[letter].append(logprob)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        cached = f" and delete {endpoint.cache}" if endpoint.cache else ""
        raise UserError(f"{endpoint.url}: the replies of {endpoint.model!r} hold no log-probabilities of tokens; use "
                        f"a server and model that know logprobs and top_logprobs{cached}") from None
    if not found["A"] and not found["B"]:
        return None
    log_a, log_b = (numpy.logaddexp.reduce(found[letter] or [MISSING]) for letter in "AB")
    return sigmoid(float(log_a - log_b))


def fingerprint(args, pairs, principles):
    """What decides the labels; equal for a run and the one that continues it."""
    names = ("judge_model", "temperature", "position_bias", "flip_rate", "seed")
    content = [[getattr(args, name) for name in names], pairs, [str(principle) for principle in principles]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def run_label(args):
    """The command `label`."""
    check_out(args)
    principles = data.find_objectives(args.principles or list(PRINCIPLES), {**PRINCIPLES, "overall": OVERALL})
    skipped, endpoint = data.Counter(), None
    pairs = response_pairs(args.data, args.limit, skipped)
    if args.judge_url:
        endpoint = Endpoint(args.judge_url, args.judge_model, cache=f"{args.out}.judge-cache.jsonl")
    else:
        annotator = embedded_annotator(pairs, [principle.name for principle in principles], args.seed,
                                       args.temperature, args.position_bias, args.flip_rate)
    tasks = list(enumerate(itertools.product(pairs, principles)))

    def labelled(task):
        index, (pair, principle) = task
        p_a = endpoint_label(endpoint, pair, principle) if endpoint else annotator(pair, principle.name)
        return {"index": index, "p_a": p_a}

    journal = Journal(args.out, fingerprint(args, pairs, principles))
    todo = [task for task in tasks if task[0] not in journal.rows]
    with tqdm(total=len(tasks), initial=len(tasks) - len(todo), desc="labelling", unit=" labels") as bar:
        for row in in_parallel(labelled, todo, args.concurrency) if endpoint else map(labelled, todo):
            journal.add([row])
            bar.update()
    rows = [{**pair, "principle": principle.name, "p_a": journal.rows[index]["p_a"]}
            for index, (pair, principle) in tasks]
    read = [row for row in rows if row["p_a"] is not None]
    if not read:
        raise UserError(f"{args.judge_url}: none of the {len(rows)} labels can be read, as A or B; try another "
                        f"judge, and delete {journal.path}")
    data.write_jsonl(args.out, read)
    journal.finish()
    print_labels(read, principles)
    for reason, count in skipped.items():
        print(f"left out: {count} pairs, {reason}")
    if endpoint:
        print(f"judge: {endpoint.model}, {endpoint.sent} requests, {endpoint.retried} of them again after a failure; "
              f"{endpoint.reused} replies came from the cache; {len(rows) - len(read)} labels left out as unreadable")
    else:
        print(f"annotator: temperature {args.temperature:g}, position bias {args.position_bias:g}, "
              f"flip rate {args.flip_rate:g}, seed {args.seed}")
    print(f"{args.out}: {len(read)} labels of {len(pairs)} pairs")


def print_labels(rows, principles):
    """A line per principle: labels, how sure they are (mean |p_a - 0.5|), how often the first response is better."""
    print(f"{'principle':20}{'labels':>8}{'certainty':>11}{'first better':>14}")
    for principle in principles:
        p_a = numpy.array([row["p_a"] for row in rows if row["principle"] == principle.name])
        if len(p_a):
            first = 100 * ((p_a > 0.5).mean() + (p_a == 0.5).mean() / 2)
            print(f"{principle.name:20}{len(p_a):8}{abs(p_a - 0.5).mean():11.3f}{first:12.1f} %")


# ----------------------------------------------------------------------------------------------------------------
# Preference models: a Llama with a scalar head each, in a folder of its own with principle.json beside the weights


def train_principles(base, rows, out, options, device, progress=True):
    """Train one preference model for each principle in the label rows, from the Llama in `base`, into OUT/PRINCIPLE; a
    killed run continues. principle.json gets the name and the scores' mean and standard deviation on the responses
    trained on. Gives the folders."""
    by_principle = {}
    for row in rows:
        by_principle.setdefault(row["principle"], []).append(row)
    if odd := [name for name in by_principle if name in ("", ".", "..") or "/" in name]:
        raise UserError(f"the principle {odd[0]!r} cannot name a folder; call it otherwise in the labels")
    folders = [Path(out) / name for name in by_principle]
    for folder, labels in zip(folders, by_principle.values()):
        llama = train.start_from(base, "reward", device, options)
        tokenizer = model.load_tokenizer(base, llama)
        stage = train.prepare("reward", labels, tokenizer, llama.config, options)
        train.train(llama, tokenizer, [stage], folder, options, resume=True, progress=progress)
        if not (folder / "principle.json").exists():
            scores = Scorers([folder], device).score(*reference_responses(labels))[0]
            content = {"name": folder.name, "mean": float(scores.mean()), "std": float(scores.std(correction=0))}
            data.write_jsonl(folder / "principle.json", [content])
    return folders


def reference_responses(rows, most=512):
    """(prompts, responses) of the first few rows: what scores are normalised on."""
    pairs = [(row["prompt"], row[side]) for row in rows[:most // 2] for side in ("response_a", "response_b")]
    return [prompt for prompt, _ in pairs], [response for _, response in pairs]


class Scorers:
    """K preference models in folders. Adapters of one base run side by side on it, each row of the batch with its own;
    whole models run one after another. names [K]; mean, std (K,): of the scores on the responses trained on."""

    def __init__(self, folders, device=None):
        self.device, about = train.device_named(device), [read_principle(folder) for folder in folders]
        self.names = [principle["name"] for principle in about]
        self.mean, self.std = (torch.tensor([float(principle[key]) for principle in about]) for key in ("mean", "std"))
        by_base = {}
        for number, folder in enumerate(folders):
            base = str(model.base_of(folder).resolve()) if model.is_adapter(folder) else f"{number}"
            by_base.setdefault(base, []).append(number)
        self.parts = [(numbers, *self.load([folders[number] for number in numbers])) for numbers in by_base.values()]

    def load(self, folders):
        dtype = torch.bfloat16 if self.device.type == "cuda" and model.computes_bf16(self.device) else torch.float32
        if model.is_adapter(folders[0]):
            llama = model.Llama.from_pretrained(model.base_of(folders[0]), dtype, self.device, scorer=True)
            model.load_adapters(llama, folders)
        else:
            llama = model.Llama.from_pretrained(folders[0], dtype, self.device, scorer=True)
        return llama.eval(), model.load_tokenizer(folders[0], llama)

    @torch.inference_mode()
    def score(self, prompts, responses, micro_tokens=8192):
        """Raw scores (K, N) in fp32 of N responses to N prompts (texts). Of a text that is longer than the model's
        context, the end is read."""
        scores = torch.zeros(len(self.names), len(prompts))
        rows = [{"prompt": prompt, "completion": response} for prompt, response in zip(prompts, responses)]
        for numbers, llama, tokenizer in self.parts:
            stop = llama.config.stop_ids[0] if llama.config.stop_ids else None
            documents = [ids[-llama.config.max_position_embeddings:] for ids, _ in
                         data.encode_rows(tokenizer, rows, llama.config.bos_token_id, stop, None)]
            for chosen in batches_of(documents, micro_tokens // len(numbers)):
                tokens = torch.tensor([token for i in chosen for token in documents[i]], device=self.device)
                found = model.document_scores(llama, tokens, [len(documents[i]) for i in chosen])
                scores[torch.tensor(numbers)[:, None], torch.tensor(chosen)] = found.cpu()
        return scores


def batches_of(documents, most):
    """Lists of indices of documents, those of like length together, at most about `most` tokens at a time."""
    chosen, size = [], 0
    for i in sorted(range(len(documents)), key=lambda i: len(documents[i])):
        if chosen and size + len(documents[i]) > most:
            yield chosen
            chosen, size = [], 0
        chosen.append(i)
        size += len(documents[i])
    if chosen:
        yield chosen


def read_principle(folder):
    """What principle.json says; a model from elsewhere is called as its folder, and its scores are taken as they are."""
    path = Path(folder) / "principle.json"
    if not path.exists():
        return {"name": Path(folder).name, "mean": 0.0, "std": 1.0}
    content = data.read_json(path)
    if not isinstance(content, dict) or not {"name", "mean", "std"} <= content.keys():
        raise UserError(f"{path}: holds no name, mean and std; train the preference model again")
    return content


def score_pairs(scorers, rows):
    """Raw scores (K, P, 2) of the two responses of P pairs. A text that stands in several pairs, or in one pair that is
    labelled on several principles, is scored once."""
    texts = [(row["prompt"], row[side]) for row in rows for side in ("response_a", "response_b")]
    place = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    scores = scorers.score([prompt for prompt, _ in place], [text for _, text in place])
    return scores[:, [place[text] for text in texts]].view(len(scorers.names), -1, 2)


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
    preference of the pairs that are labelled with it, and write {principle: weight} for `ppo.py --weights`."""
    own = [i for i, row in enumerate(rows) if row["principle"] == "overall"]
    which = [k for k, name in enumerate(scorers.names) if name != "overall"]
    if own and len(which) > 1:
        std = scorers.std[which].where(scorers.std[which] > 0, torch.ones(()))
        differences = (scores[which][:, own, 0] - scores[which][:, own, 1]) / std[:, None]
        weights = fit_weights(differences.T.numpy(), [rows[i]["p_a"] for i in own])
        named = {scorers.names[k]: round(float(weight), 4) for k, weight in zip(which, weights)}
        data.write_jsonl(path, [named])
        print(f"\n{path}: weights that predict the overall preference: "
              + ", ".join(f"{name} {weight:+.2f}" for name, weight in named.items()))


def run_train(args):
    """The command `train`: preference models, and how good they are on the prompts held out."""
    rows = [row for path in args.data for row in data.read_preferences(path)]
    rows = [row for row in rows if not args.principles or row["principle"] in args.principles]
    if not rows:
        raise UserError(f"{args.data[0]}: no labels of {', '.join(args.principles or ['any principle'])}")
    options = train.Options(**{name: getattr(args, name) for name in vars(train.Options())})
    device = train.device_named(args.device)
    folders = train_principles(args.model, rows, args.out, options, device)
    held_out = [row for row in rows if data.held_out(row, options.val_share, options.seed)]
    if held_out:
        scorers = Scorers(folders, device)
        scores = score_pairs(scorers, held_out)
        print(f"\non the {len(held_out)} labels of prompts held out:")
        print_accuracy(scorers, held_out, scores)
        print_correlations(scorers.names, scores.flatten(1))
        write_weights(Path(args.out) / "weights.json", scorers, held_out, scores)
    print(f"saved in {', '.join(map(str, folders))}")


def run_score(args):
    """The command `score`: pairs scored by preference models, and the accuracy where the pairs are labelled."""
    if args.out:
        check_out(args)
    rows = [row for path in args.data for row in data.read_preferences(path)]
    scorers = Scorers(args.models, args.device)
    scores = score_pairs(scorers, rows)
    print_accuracy(scorers, rows, scores)
    print_correlations(scorers.names, scores.flatten(1))
    if args.out:
        data.write_jsonl(args.out, ({**row, "scores": {name: pair.tolist() for name, pair in zip(scorers.names, pairs)}}
                                    for row, pairs in zip(rows, scores.transpose(0, 1))))
        print(f"{args.out}: {len(rows)} pairs with scores [response_a, response_b]")


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


def scalarize(scores, weights, how, **options):
    """Rewards (N,) from K principles' scores (K, N) and weights (K,), on x = weights * scores.

    scores: a float tensor, normalised per principle beforehand. weights: a tensor or list; they may be negative.
    how: a name in SCALARIZATIONS, whose keyword arguments are the options. Raises UserError for any other.
    """
    if how not in SCALARIZATIONS:
        raise UserError(f"scalarization {how!r}: unknown; give one of {', '.join(SCALARIZATIONS)}")
    join = SCALARIZATIONS[how]
    known = join.__kwdefaults__ or {}
    for name in sorted(set(options) - set(known)):
        raise UserError(f"scalarization {how!r}: no option {name!r}; it has {', '.join(known) or 'none'}")
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
    prompts = [({"prompt": group}, None, None) for group, keep in zip(groups, kept) if keep]
    return mean_and_interval(right[kept], prompts, seed)


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

COMMANDS = {"answer": run_answer, "label": run_label, "train": run_train, "score": run_score}


def main():
    args = arguments()
    COMMANDS[args.command](args)


if __name__ == "__main__":
    cli(main)
