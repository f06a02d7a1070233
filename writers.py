"""Who writes: a Llama in a folder, or a server. A policy answers prompts; an aligner goes on from its own.

What a `Writer` writes is fast (generate.py), and the same for the same seeds, but for the rounding of bf16.
"""
from contextlib import closing, contextmanager

import torch

import chat
import checkpoint
import data
from common import seed_from
from endpoint import Endpoint, TooLong, in_parallel
from generate import Acceptance, prepack, stream
from model import computes_bf16, device_named

DRAFT = 15  # tokens looked up per step, at most: edits are mostly copied (see generate.Lookup)


class Writer:
    """A Llama with its tokenizer: texts in, texts out. chat_template: "auto", as the model was trained, or "plain"."""

    def __init__(self, folder, device=None, chat_template="auto"):
        device = device_named(device)
        dtype = torch.bfloat16 if computes_bf16(device) else torch.float32
        self.llama = prepack(checkpoint.load(folder, dtype, device).eval())
        tokenizer = checkpoint.load_tokenizer(folder, self.llama)
        self.tokenizer = chat.with_template(tokenizer, folder, self.llama.config, chat_template)
        self.acceptance = Acceptance()

    def room(self, new_tokens):
        """Of so many new tokens, those that leave the prompt half of the context."""
        return min(new_tokens, self.llama.config.max_position_embeddings // 2)

    def encode(self, prompt, new_tokens, context=None):
        """Prompt ids that leave room for new_tokens in the model's context, or None if they cannot."""
        config = self.llama.config
        room = config.max_position_embeddings - new_tokens
        prompt = prompt.encode("utf-8", "replace").decode()  # half a surrogate pair, which no tokenizer takes, is a "?"
        return data.encode_prompt(self.tokenizer, prompt, config.bos_token_id, room, context)

    def write(self, prompts, new_tokens, rows, seeds=0, **sampling):
        """Yield (place, text) of prompts (lists of token ids) as they are done, `rows` at a time, the longest first."""
        for place, new in self.ids(prompts, new_tokens, rows, seeds, **sampling):
            yield place, self.tokenizer.decode(new).strip()

    def ids(self, prompts, new_tokens, rows, seeds=0, **sampling):
        """The same, with each text's token ids instead of it."""
        order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
        seeds = [seeds[i] for i in order] if seeds else 0
        for place, new in stream(self.llama, [prompts[i] for i in order], new_tokens, rows, seed=seeds, draft=DRAFT,
                                 stop_ids=self.llama.config.stop_ids, acceptance=self.acceptance, **sampling):
            yield order[place], new


class Served:
    """As a Writer, a model behind a server, which makes the ids and decodes them. chat_template: "plain", a prompt as
    it is; "auto", as the one message of a chat."""

    def __init__(self, url, model, chat_template="plain"):
        self.endpoint = Endpoint(url, model, timeout=600, plain=chat_template == "plain")
        self.acceptance = Acceptance()  # nothing is known of it

    def room(self, new_tokens):
        return new_tokens

    def encode(self, prompt, new_tokens, context=None):
        return prompt.encode("utf-8", "replace").decode()

    def write(self, prompts, new_tokens, rows, seeds=0, temperature=0.0, top_p=1.0, **_):
        """Yield (place, text) of prompts, in their order; the text is None where the server says "too long"."""
        def ask(place):
            sampling = {"top_p": top_p, "seed": seeds[place] % 2**31} if temperature else {}
            try:
                return place, self.endpoint.go_on(prompts[place], new_tokens, temperature, **sampling).strip()
            except TooLong:
                return place, None
        yield from in_parallel(ask, range(len(prompts)), rows)


def is_url(policy):
    return policy.startswith(("http://", "https://"))


def fingerprint(policy, chat_template):
    """All that is known of how a Llama in a folder, or a server, answers."""
    if is_url(policy):
        return policy
    return [checkpoint.fingerprint(policy), chat.fingerprint(policy, chat_template),
            chat.stops_beside(policy, chat_template)]


@contextmanager
def opened(policy, policy_model="default", cache=None, device=None, chat_template="auto"):
    """Within it, who answers prompts: the Writer of a Llama in a folder, or the Endpoint of a server at a URL. cache: a
    file of the server's replies."""
    if is_url(policy):
        with closing(Endpoint(policy, policy_model, cache=cache, timeout=600)) as endpoint:
            yield endpoint
    else:
        yield Writer(policy, device, chat_template)


def answers_of(policy, items, max_new_tokens=1024, temperature=0.0, batch=32, seed=0):
    """Yield (place, answer) of items {"index", "prompt"}, as they are done, by an opened policy. The answer is None to
    a prompt that does not fit the policy's context, "" where the policy said nothing."""
    if isinstance(policy, Writer):
        yield from written_answers(policy, items, max_new_tokens, temperature, batch, seed)
        return

    def ask(item):
        try:
            return policy.complete(item["prompt"], max_new_tokens, temperature, seed=seed) or ""
        except TooLong:
            return None
    yield from enumerate(in_parallel(ask, items, min(batch, 8)))


def written_answers(writer, items, max_new_tokens, temperature, batch, seed):
    """As answers_of, by a Writer."""
    new_tokens = writer.room(max_new_tokens)
    prompts = [writer.encode(item["prompt"], new_tokens, [0, len(item["prompt"])]) for item in items]
    fitting = [i for i, prompt in enumerate(prompts) if prompt]
    yield from ((i, None) for i, prompt in enumerate(prompts) if not prompt)
    seeds = [seed_from(seed, items[i]["index"], 0) for i in fitting]
    for place, text in writer.write([prompts[i] for i in fitting], new_tokens, batch, seeds, temperature=temperature):
        yield fitting[place], text.split("\n\nHuman:")[0].strip()
