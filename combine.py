"""What is joined after training, without training: models' weights, their next tokens, answers, and implicit rewards.

    python combine.py soup A B --weights 0.3 0.7 --out FOLDER
    python combine.py answer A B --weights 0.3 0.7 --data prompts.jsonl --out answers.jsonl
    python combine.py best rated.jsonl --weights helpful=0.7,concise=0.3 --out best.jsonl
    python combine.py implicit --policy DPO_MODEL --reference START --beta 0.1 --name honest \\
        --data rated.jsonl --out scored.jsonl

soup and answer join one model per objective, all trained from one start: `soup` their weights, once (rewarded soups),
`answer` their next-token distributions, at each step (MOD: dearer, and models may differ in size). `best` needs no
model, but answers to choose from, and their scores (best-of-N). `implicit` makes a score of a model that DPO has
trained; MODPO takes it as a margin: train.py modpo --weights helpful=0.5,honest=0.5.
"""
# From top to bottom: loading models that fit each other; each of the four; the command line.
import dataclasses
import math
import re
from pathlib import Path

from common import UserError, add_options, check_out, cli, make_parser, number, read_options, write_jsonl

import torch
from torch import nn
from tqdm import tqdm

import chat
import checkpoint
import data
import formats
import methods
from choose import document_logprobs
from feedback import Answering, write_answers
from files import shorten
from folders import complete
from generate import Acceptance, prepack
from model import Causal, Config, computes_bf16, device_named
from resume import circumstances, now, write_run
from writers import Writer, fingerprint, written_answers

# ----------------------------------------------------------------------------------------------------------------
# Models that fit each other

TOKENS = ("vocab_size", "bos_token_id", "eos_token_id")      # which numbers of two models must be equal, for their
CACHED = (*TOKENS, "num_key_value_heads", "head_dim")        # log-probabilities to be compared; for a cache to hold
SHAPE = [name for name in vars(Config()) if name != "max_position_embeddings"]  # both; for an average of weights


def load_alike(folders, same, dtype=torch.float32, device="cpu", chat_template="auto"):
    """Yield (Llama, tokenizer) of each folder, an adapter merged into its base. UserError for one whose tokenizer or
    chat template, or whose number of a name in `same`, is not the first one's."""
    first = None
    for folder in folders:
        llama = checkpoint.load(folder, dtype, device).eval()
        tokenizer = checkpoint.load_tokenizer(folder, llama)
        tokenizer.no_truncation()  # how long a text may be is no difference; neither is padding, which is off already
        tokenizer = chat.with_template(tokenizer, folder, llama.config, chat_template)
        found = {**{name: getattr(llama.config, name) for name in same}, **chat.settings_of(tokenizer)}
        first = first or found
        if other := [name for name in found if found[name] != first[name]]:
            raise UserError(f"{folder}: has another {shorten(other)} than {folders[0]}; join models that were trained "
                            "from one start")
        yield llama, tokenizer


def shares(weights, folders):
    """The weights divided by their sum. UserError for weights that cannot be, or are not one for each folder."""
    if len(weights) != len(folders):
        raise UserError(f"--weights: {len(weights)} for {len(folders)} models; give one for each")
    total = sum(weights)
    if not math.isfinite(total) or abs(total) <= 1e-9 * max(map(abs, weights)):
        raise UserError(f"--weights: {shorten(weights)} add up to {total:g}; give finite ones that add up to something")
    return [weight / total for weight in weights]


# ----------------------------------------------------------------------------------------------------------------
# Weights: rewarded soups


@torch.no_grad()
def soup(folders, weights):
    """The Llama each of whose weights is the weighted average of the models' in folders (rewarded soups: Rame et al.,
    arXiv 2306.04488). weights: `shares`. Whole weights are averaged, adapters merged first: an average of the A and one
    of the B, multiplied, are not the average of the B A. Its context is the shortest of theirs."""
    total, contexts = {}, []
    models = tqdm(load_alike(folders, SHAPE), "soup", len(folders), unit=" models")
    for weight, (llama, _) in zip(weights, models):
        if weight:  # so that the only one with a weight is kept bit for bit
            contexts.append(llama.config.max_position_embeddings)
            for name, parameter in llama.named_parameters():
                part = weight * parameter.double()  # so that the average of equal numbers is that number
                total[name] = total[name] + part if name in total else part
    for name, parameter in llama.named_parameters():
        parameter.copy_(total.pop(name))
    llama.config.max_position_embeddings = min(contexts)
    return llama


def run_soup(folders, weights, out):
    """A folder of their soup, its config.json last: until all is written, no model is there."""
    weights, out = shares(weights, folders), Path(out)
    checkpoint.check_folder(out, folders)
    if any(path for name in ("config.json", *checkpoint.ADAPTER, "*.index.json") for path in out.glob(name)):
        raise UserError(f"{out}: holds a model already; choose another --out")
    llama = soup(folders, weights)
    out.mkdir(parents=True, exist_ok=True)
    about = {"method": ["soup"], "base": str(folders[0]), "changed": dict(zip(map(str, folders), weights))}
    tokenizer = chat.with_template(checkpoint.load_tokenizer(folders[0], llama), folders[0], llama.config)
    parts = {str(folder): checkpoint.fingerprint(folder) for folder in folders}
    run = {**circumstances(), **about, "parts": parts, "ended": None,
           "settings": {"weights": weights, **chat.settings_of(tokenizer)}}  # which say how the soup is asked
    write_run(out, run)
    complete(out, llama, tokenizer, about)
    checkpoint.save(llama, out)
    write_run(out, {**run, "ended": now()})
    print(f"{out}: " + " + ".join(f"{weight:g} * {folder}" for weight, folder in zip(weights, folders)))


# ----------------------------------------------------------------------------------------------------------------
# Next tokens: multi-objective decoding


class Shifted:
    """A way of attending, for a model whose layers are numbered from `first` on."""

    def __init__(self, attend, first):
        self.attend, self.first, self.positions = attend, first, attend.positions

    def __call__(self, layer, q, k, v):
        return self.attend(self.first + layer, q, k, v)


class Product(nn.Module):
    """Models side by side as if they were one Llama, whose next token is drawn from the product of their p ** weight,
    normalised (MOD: Shi et al., arXiv 2406.18853, for policies with one reference and one beta). To the cache it is one
    model with all their layers, so it generates, and token_logprobs scores, as any other. Of whole texts this is not
    the product of their probabilities: each step is normalised by itself.

    weights: `shares`. The models may differ in width and depth, not in what CACHED names."""

    def __init__(self, llamas, weights):
        super().__init__()
        self.llamas, self.weights, self.model = nn.ModuleList(llamas), weights, llamas[0].model
        configs = [llama.config for llama in llamas]
        self.config = dataclasses.replace(
            configs[0], hidden_size=sum(config.hidden_size for config in configs),
            num_hidden_layers=sum(config.num_hidden_layers for config in configs),
            max_position_embeddings=min(config.max_position_embeddings for config in configs))

    @property
    def device(self):
        return self.llamas[0].device

    def forward(self, tokens, attend=None):
        """Their hidden states (B, T, sum of D), one's beside another's, of tokens (B, T)."""
        attend, first, hidden = attend or Causal(tokens), 0, []
        for llama in self.llamas:
            hidden.append(llama(tokens, Shifted(attend, first)))
            first += llama.config.num_hidden_layers
        return torch.cat(hidden, dim=-1)

    def lm_head(self, hidden):
        """sum_i weight_i log pi_i (.., V) in fp32 of hidden states (.., sum of D): logits, for they are not
        normalised."""
        parts = hidden.split([llama.config.hidden_size for llama in self.llamas], dim=-1)
        return sum(weight * llama.lm_head(part).float().log_softmax(-1)
                   for weight, llama, part in zip(self.weights, self.llamas, parts))


class ProductWriter(Writer):
    """A Writer, of the Product of the models in folders."""

    def __init__(self, folders, weights, device=None, chat_template="auto"):
        device = device_named(device)
        dtype = torch.bfloat16 if computes_bf16(device) else torch.float32
        loaded = list(load_alike(folders, CACHED, dtype, device, chat_template))
        self.llama = Product([prepack(llama) for llama, _ in loaded], weights)
        self.tokenizer, self.acceptance = loaded[0][1], Acceptance()


def run_answer(folders, weights, files, out, limit, device, options):
    """Prompts in, answers out, as `feedback.py answer` writes them; with all the weight on one model, the same ones."""
    weights = shares(weights, folders)
    writer = ProductWriter(folders, weights, device, options.chat_template)
    models = [fingerprint(folder, options.chat_template) for folder in folders]

    def answers(items, seed):
        return written_answers(writer, items, options.max_new_tokens, options.temperature, options.batch, seed)
    write_answers(files, out, limit, options, "the models together", [models, weights], answers)


# ----------------------------------------------------------------------------------------------------------------
# Answers: best-of-N


def best_of(responses, weights, n=None):
    """Of the first n rated responses (None: of all), the one with the highest sum of weight * score, the first of
    equally good ones. Drawn from p, with F the distribution function of their distinct sums r, it is y with chance
    F(r(y)) ** n - (F(r(y)) - p(y)) ** n, and at most log n - (n - 1) / n from p in KL divergence."""
    return max(responses[:n], key=lambda response: methods.weighted(response["scores"], weights))


def run_best(files, weights, out, n=None):
    """Rated rows in, the same with their best response alone out."""
    check_out(out, files)
    weights = methods.weights_of(weights)
    rows = methods.rated_rows(files, weights)
    best = [{**row, "responses": [best_of(row["responses"], weights, n)]} for row in tqdm(rows, "best", unit=" rows")]
    write_jsonl(out, best)
    first, chosen = (sum(methods.weighted(row["responses"][0]["scores"], weights) for row in found) / len(found)
                     for found in (rows, best))
    print(f"{out}: {len(best)} prompts; the mean weighted score is {chosen:.4g}, of first answers {first:.4g}")


# ----------------------------------------------------------------------------------------------------------------
# Implicit rewards


@torch.inference_mode()
def response_logprobs(llama, tokenizer, rows, context, micro_tokens=16384):
    """log p(completion and its EOS | prompt), summed over tokens, of rows {"prompt", "completion", "context"}; None for
    one that does not fit `context` tokens even without its oldest turns."""
    stop, found = llama.config.stop_ids[0] if llama.config.stop_ids else None, [None] * len(rows)
    with tqdm(total=len(rows), desc="scoring", unit=" answers") as bar:
        for start in range(0, len(rows), 1000):
            documents = data.encode_documents(tokenizer, rows[start:start + 1000], llama.config.bos_token_id, stop,
                                              context)
            places = [place for place, document in enumerate(documents) if document]
            totals = document_logprobs(llama, [documents[place] for place in places], micro_tokens)
            for place, total in zip(places, totals):
                found[start + place] = total
            bar.update(len(documents))
    return found


def run_implicit(policy, reference, beta, name, files, out, device):
    """Rated rows in, the same with one more score out: beta * log(pi / ref) of each response, which is the reward that
    DPO has fitted, up to a number for each prompt (Rafailov et al., arXiv 2305.18290, eq. 5)."""
    check_out(out, files)
    if not re.fullmatch(r"[^\s,=]+", name):
        raise UserError(f"--name: {name!r} cannot stand in --weights; leave out spaces, commas and =")
    rows = formats.read_all(files, formats.read_rated, "chosen", None)
    responses = [(row["prompt"], response) for row in rows for response in row["responses"]]
    if any(name in response["scores"] for _, response in responses):
        raise UserError(f"{files[0]}: answers are rated on {name} already; give the new score another --name")
    asked = [{"prompt": prompt, "completion": response["text"], "context": [0, len(prompt)]}
             for prompt, response in responses]
    logprobs, context, same = [], None, (*TOKENS, "sliding_window")
    how = "auto" if chat.find(policy) else "plain"  # the reference is asked as the policy was when it was trained
    for llama, tokenizer in load_alike([policy, reference], same, device=device_named(device), chat_template=how):
        context = context or llama.config.max_position_embeddings  # the policy's: of the same text, both
        logprobs.append(response_logprobs(llama, tokenizer, asked, context))
    fitting = 0
    for (_, response), ours, theirs in zip(responses, *logprobs):
        if ours is not None:
            response["scores"][name], fitting = beta * (ours - theirs), fitting + 1
    if not fitting:
        raise UserError(f"{files[0]}: none of its {len(responses)} answers can be scored; give answers that fit the "
                        f"policy's context of {context} tokens")
    write_jsonl(out, rows)
    print(f"{out}: {fitting} answers of {len(rows)} prompts scored on {name}; {len(responses) - fitting} left without "
          "the score, which do not fit the policy's context")


# ----------------------------------------------------------------------------------------------------------------
# Command line


def arguments(argv=None):
    parser = make_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    soup, answer, best, implicit = (commands.add_parser(name, help=help, description=f"{help}.") for name, help in (
        ("soup", "Average models' weights (rewarded soups)"),
        ("answer", "Answer prompts by the product of models' next-token probabilities (MOD); a killed run continues"),
        ("best", "Keep the best of each prompt's rated answers (best-of-N)"),
        ("implicit", "Score answers by beta * log(policy / reference), a DPO model's implicit reward")))
    for command in (soup, answer):
        command.add_argument("models", nargs="+", metavar="FOLDER", help="Llamas (or adapters, which are merged)")
        command.add_argument("--weights", required=True, nargs="+", type=float, metavar="W",
                             help="one for each model; they are divided by their sum")
    soup.add_argument("--out", required=True, metavar="FOLDER", help="a new folder for the average, in fp32")
    answer.add_argument("--limit", type=number(int, 1), metavar="N", help="only the first N prompts")
    add_options(answer, Answering)
    best.add_argument("files", nargs="+", metavar="FILE", help="rated answers, in any form that data.py reads")
    best.add_argument("--weights", required=True, metavar="W", help=f"how scores are joined: {methods.WEIGHTS}")
    best.add_argument("--n", type=number(int, 1), metavar="N", help="choose among the first N answers (default: all)")
    implicit.add_argument("--policy", required=True, metavar="FOLDER", help="the model that DPO has trained")
    implicit.add_argument("--reference", required=True, metavar="FOLDER", help="the model that it was trained from")
    implicit.add_argument("--beta", type=number(float, 1e-9, 1e9), default=0.1, metavar="FLOAT",
                          help="that of its training (default %(default)s)")
    implicit.add_argument("--name", required=True, metavar="NAME", help="the new score's name")
    for command, what in ((answer, "prompts"), (implicit, "answers, rated or not")):
        command.add_argument("--data", required=True, nargs="+", metavar="FILE",
                             help=f"{what}, in any form that data.py reads")
        command.add_argument("--device", help="cpu, cuda, ... (default: cuda where there is one)")
    for command in (answer, best, implicit):
        command.add_argument("--out", required=True, metavar="FILE", help=".jsonl(.gz) of rated rows")
    return parser.parse_args(argv)


def main():
    args = arguments()
    if args.command == "soup":
        run_soup(args.models, args.weights, args.out)
    elif args.command == "answer":
        run_answer(args.models, args.weights, args.data, args.out, args.limit, args.device,
                   read_options(Answering, args))
    elif args.command == "best":
        run_best(args.files, args.weights, args.out, args.n)
    else:
        run_implicit(args.policy, args.reference, args.beta, args.name, args.data, args.out, args.device)


if __name__ == "__main__":
    cli(main)
