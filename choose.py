"""Of several edits of an answer, the one that was asked for.

The likeliest edit is not always the one that was asked for: an aligner in doubt leaves the answer as it is, or mends
what it mends most often. So it writes several edits y of an answer x, the likeliest one and others that are drawn, and
x is among them; that one is taken which is worth most:

    log p(y | x, o) + guidance * (log p(y | x, o) - log p(y | x, -)) - edit_cost * changed(x, y)

Here o is what is asked for, and -, the same prompt that names no objective (of a dialogue that is cut to the context,
perhaps with more of its old turns): what is as likely where nothing is asked was not asked for (maximum mutual
information, "MMI-antiLM": Li et al., arXiv 1510.03055; there of replies). changed: sentences that are taken out or put
in. Logarithms are natural, of whole texts with their end; an edit that has not come to its end in --max-new-tokens is
not taken, and an answer of more tokens than these is not edited, since no whole edit could be held against it.
"""
import re
from array import array
from dataclasses import dataclass

from common import option, seed_from

import torch

import data
import train
from model import token_logprobs
from report import in_common

TEMPERATURE = 0.7  # of the edits that are drawn, where none is given


@dataclass
class Choice:
    """How one of several edits is chosen (choose.py)."""
    best_of: int = option(1, "write so many edits of each answer, and take the one that was asked for; but for the "
                          f"first, they are drawn at a temperature of {TEMPERATURE}, where none is given", 1, 1000)
    guidance: float = option(0.5, "with --best-of: how much it counts that an edit is likelier for what is asked than "
                             "where nothing is", 0, 1000)
    edit_cost: float = option(1.0, "with --best-of: what a sentence taken out or put in costs, in nats", 0, 1000)


def write(aligner, choice, answers, unasked, prompts, new_tokens, rows, seeds, **sampling):
    """As writers.Writer.write, (place, text) of each prompt (a list of token ids), in their order; the text is the one
    that is worth most of choice.best_of edits and the answer as it is; None for an answer of more than new_tokens.

    unasked: the prompts, but for the objectives, of which they name none. seeds: one for each prompt."""
    for start in range(0, len(prompts), 4 * rows):  # a portion at a time, so that there is something to see
        portion = slice(start, start + 4 * rows)
        edits = candidates(aligner, prompts[portion], answers[portion], choice.best_of, new_tokens, rows,
                           seeds[portion], **sampling)
        asked, nothing = (scored(aligner.llama, side[portion], edits) for side in (prompts, unasked))
        for place, (found, answer) in enumerate(zip(edits, answers[portion]), start):
            worth = {text: (1 + choice.guidance) * next(asked) - choice.guidance * next(nothing)
                     - choice.edit_cost * changed(answer, text) for text in found}
            best = max(worth, key=worth.get, default=None)
            yield place, answer if best == answer.strip() else best


def scored(llama, prompts, edits):
    """An iterator over log p(text | its prompt) of all texts in a list of {text: its ids}."""
    return iter(document_logprobs(llama, [data.Document(array("i", prompt + ids), len(prompt))
                                          for prompt, found in zip(prompts, edits) for ids in found.values()]))


def candidates(aligner, prompts, answers, count, new_tokens, rows, seeds, temperature=0.0, **sampling):
    """{text: its ids, with the token that ends it} of each prompt: `count` edits, but for those that came to no end,
    and the answer; {} where this has more than new_tokens. The first edit is written at the temperature; the others are
    drawn, at TEMPERATURE where it is 0."""
    stops, edits, spaces = aligner.llama.config.stop_ids, [{} for _ in prompts], [""] * len(prompts)

    def ids_of(place, space):
        return data.text_ids(aligner.tokenizer, [space + answers[place].strip()])[0] + list(stops[:1])
    fitting = [place for place in range(len(prompts))
               if min(len(ids_of(place, space)) for space in ("", " ")) <= new_tokens]
    for number in range(count):
        own = [seed_from(seeds[place], number) if number else seeds[place] for place in fitting]
        warm = TEMPERATURE if number and not temperature else temperature
        for i, ids in aligner.ids([prompts[place] for place in fitting], new_tokens, rows, own, keep_stop=True,
                                  temperature=warm, **sampling):
            ended = bool(ids) and ids[-1] in stops
            text = aligner.tokenizer.decode(ids[:-1] if ended else ids)
            if text.startswith(" "):
                spaces[fitting[i]] = " "
            if ended or not stops:
                edits[fitting[i]].setdefault(text.strip(), ids)
    for place in fitting:
        edits[place].setdefault(answers[place].strip(), ids_of(place, spaces[place]))  # it begins as edits do
    return edits


@torch.inference_mode()
def document_logprobs(llama, documents, micro_tokens=16384):
    """log p(completion | prompt), summed over tokens, of each data.Document: a list of floats."""
    found, order = [0.0] * len(documents), sorted(range(len(documents)), key=lambda i: len(documents[i].ids))
    waiting = iter(order)  # as they are packed
    for batch in train.pack([data.Example([documents[i]]) for i in order], micro_tokens, llama.device):
        logprobs = token_logprobs(llama, batch.tokens, batch.lengths, batch.targets).double()    # (K,)
        sums = logprobs.new_zeros(len(batch.lengths)).index_add(0, batch.document, logprobs)     # (documents,)
        for total in sums.tolist():
            found[next(waiting)] = total
    return found


def changed(before, after):
    """How many sentences of a text are taken out, and how many put in, to make another of it."""
    old, new = (list(filter(None, map(str.strip, re.split(r"(?<=[.!?])\s+|\n|(?<=[。！？])", text))))
                for text in (before, after))
    return len(old) + len(new) - 2 * in_common(old, new)
