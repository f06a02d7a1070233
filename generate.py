"""How tokens are written fast: the same texts as model.generate, word for word in fp32, many times sooner.

Read `stream` first: it holds the loop. Three things make it fast. Keys and values that have been computed are kept
(`Cache`). A text that is finished makes room for the next one. And where a text repeats what stands before in it, as an
edit mostly does, several tokens are looked up there and verified in one pass (`Lookup`).

Shapes: N new tokens of all rows, one row's after another's; R rows; C new tokens of one row, at most; L cached ones; V
vocabulary, H query heads, G key/value heads, E head_dim.
"""
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from common import UserError
from model import Packed, as_one, as_rows, compute_dtype, computes_bf16, places_of, sdpa, uniforms


def generate(llama, prompts, max_new_tokens, **options):
    """Continue all prompts together; gives the list of new token ids per prompt. The rest is as for `stream`."""
    texts = [[] for _ in prompts]
    for number, new in stream(llama, prompts, max_new_tokens, len(prompts), **options):
        texts[number] = new
    return texts


@torch.inference_mode()
def stream(llama, prompts, max_new_tokens, rows, temperature=0.0, stop_ids=(), seed=0, draft=0, acceptance=None,
           keep_stop=False, **filters):
    """Continue each prompt, `rows` of them at a time, the next one taking the place of one that has finished; yields
    (number of the prompt, its new token ids without the stop token) as they finish.

    prompts: lists of token ids, of any lengths (at least 1). temperature 0 is greedy. seed: an int, or one per prompt;
    what a prompt's continuation is depends on its own seed and, but for rounding (of bf16, in one edit of 50), not on
    its neighbours. draft: up to so many tokens per step and row are looked up in the text before; this changes how long
    it takes, not what is written. acceptance: what is known of a model's copying, and grows. filters: top_k, ... of
    filtered_probs, where there is a temperature. keep_stop: what is yielded ends with the stop token, if there was one.
    """
    if min(map(len, prompts), default=1) == 0:
        raise UserError("generate: a prompt has no tokens; give it at least the BOS token")
    if not 0 <= temperature < float("inf"):
        raise UserError(f"generate: the temperature is {temperature}; give 0 or more")
    filtered_probs(torch.zeros(1, 2), 1.0, **filters)  # UserError now for what it refuses
    acceptance = acceptance or Acceptance()
    waiting = list(range(len(prompts))) if max_new_tokens > 0 else []
    chances = uniforms(seed, len(prompts), max_new_tokens) if temperature > 0 else None
    rows = min(rows, len(waiting))
    cache = Cache(llama.config, rows, compute_dtype(llama.model.embed_tokens.weight), llama.device)
    live, logits = [], []
    while waiting or live:
        free = rows - len(live)
        if waiting and free >= rows / 8:  # a few at a time, for one pass over all their prompts
            joining, waiting = waiting[:free], waiting[free:]
            logits.append(prefill(llama, cache, [prompts[number] for number in joining], len(live)))     # (R, V)
            live += [Text(number, prompts[number], max_new_tokens) for number in joining]
        logits = torch.cat(logits)                                                   # (N, V)
        if temperature == 0:
            chosen = logits.max(-1).indices  # argmax is slower on a CPU in bf16
        else:
            chance = torch.stack([chance for text in live for chance in text.chances(chances)]).to(logits.device)
            chosen = sample(logits, chance, temperature, **filters)
        chosen = iter(chosen.tolist())
        for row, text in enumerate(live):
            verified = [next(chosen) for _ in range(1 + len(text.guess))]
            cache.lengths[row] -= text.take(verified, stop_ids, acceptance)          # forget the wrong guesses
        for row in reversed(range(len(live))):  # from the end, so that a freed place is filled by a settled row
            if live[row].finished:
                yield live[row].number, live[row].new + (live[row].stop if keep_stop else [])
                cache.move(len(live) - 1, row)
                live[row] = live[-1]
                live.pop()
        for text in live if draft else ():
            text.look_up(draft, acceptance, alone=len(live) == 1)
        logits = [advance(llama, cache, [[text.new[-1], *text.guess] for text in live])] if live else []


def prefill(llama, cache, prompts, first, most=4096):
    """Put prompts into the cache's rows from `first` on, about `most` tokens at a time; logits (R, V) of what comes
    next."""
    logits, start = [], 0
    while start < len(prompts):
        end, size = start, 0
        while end < len(prompts) and (size == 0 or size + len(prompts[end]) <= most):
            cache.lengths[first + end], size, end = 0, size + len(prompts[end]), end + 1
        counts = [len(prompt) for prompt in prompts[start:end]]
        tokens = torch.tensor([[token for prompt in prompts[start:end] for token in prompt]], device=llama.device)
        hidden = llama(tokens, cache.append(counts, first + start))[0]               # (N, D)
        last = torch.tensor(counts, device=llama.device).cumsum(0) - 1
        logits.append(llama.lm_head(hidden[last]))
        start = end
    return torch.cat(logits)


def advance(llama, cache, texts):
    """Append a few tokens per row to the cache, texts being lists; logits (N, V) of what follows each of them."""
    tokens = torch.tensor([[token for text in texts for token in text]], device=llama.device)
    return llama.lm_head(llama(tokens, cache.append([len(text) for text in texts]))[0])


# ----------------------------------------------------------------------------------------------------------------
# Attention to what is there


class Cache:
    """Keys and values of texts in the making, left-aligned: row r holds the first lengths[r] tokens of its text. Each
    forward pass appends to them, to one row more than to another, and what is appended attends to what is there.

    block (layers, 2, rows, G, room, E); room is made for 64 tokens at a time."""

    def __init__(self, config, rows, dtype, device):
        shape = config.num_hidden_layers, 2, rows, config.num_key_value_heads, 0, config.head_dim
        self.block, self.lengths = torch.zeros(shape, dtype=dtype, device=device), [0] * rows

    def move(self, source, target):
        """Copy row `source` over row `target` (a finished row's place is taken by the last one)."""
        if source != target:
            length = self.lengths[target] = self.lengths[source]
            self.block[:, :, target, :, :length] = self.block[:, :, source, :, :length]

    def append(self, counts, first=0):
        """Prepare for counts[r] further tokens of row first + r, one row's after another's."""
        device, before = self.block.device, self.lengths[first:first + len(counts)]
        rows = [row for row, count in enumerate(counts, first) for _ in range(count)]
        positions = [length + i for length, count in zip(before, counts) for i in range(count)]
        self.rows, self.positions = torch.tensor([rows, positions], device=device).split(1)          # (1, N) each
        self.lengths[first:first + len(counts)] = map(sum, zip(before, counts))
        self.room = -(-(max(positions) + 1) // 64) * 64  # rounded up, so that bf16 seldom rounds otherwise
        if self.room > self.block.size(4):
            self.block = F.pad(self.block, (0, 0, 0, self.room - self.block.size(4)))
        self.packed = Packed(counts, device, partial(sdpa, is_causal=True)) if not any(before) else None
        self.grids = [] if self.packed else self.grids_of(torch.tensor(before), torch.tensor(counts))
        return self

    def grids_of(self, before, counts):
        """On which padded grids new tokens attend: where few rows have several of them, all rows' first ones, and then
        those of these few; else on one, which they fill as they are where each row has as many."""
        row, offset = places_of(counts)
        most = int(counts.max())
        if len(row) == most * len(counts):
            return [(slice(len(counts)), None, None, (len(counts), most), self.hidden(before, 0, most))]
        parts = [(0, most)] if 2 * len(row) > most * len(counts) else [(0, 1), (1, most)]
        return [self.grid(before, row, offset, *part) for part in parts]

    def grid(self, before, row, offset, start, end):
        """New tokens `start` to `end` of each row that has so many, on a padded grid (R, C): (these rows, which of the
        N tokens, their places on the grid, its shape, what is hidden from them)."""
        device, tokens = self.block.device, ((offset >= start) & (offset < end)).nonzero()[:, 0]
        rows, number = row[tokens].unique(return_inverse=True)
        places = number * (end - start) + offset[tokens] - start
        shape, hide = (len(rows), end - start), self.hidden(before[rows], start, end)
        which = slice(len(rows)) if len(rows) == len(before) else rows.to(device)    # a slice copies no keys
        return which, tokens.to(device), places.to(device), shape, hide

    def hidden(self, before, start, end):
        """-inf where a row's new token from `start` to `end` does not see a cached one, else 0: (R, 1, C, L)."""
        seen = (before[:, None, None, None] + torch.arange(start, end)[:, None]).to(self.block.device)  # (R, 1, C, 1)
        unseen = torch.arange(self.room, device=self.block.device) > seen
        return torch.where(unseen, float("-inf"), 0.0).to(self.block.dtype)

    def __call__(self, layer, q, k, v):
        self.block[layer][:, self.rows[0], :, self.positions[0]] = torch.stack((k[0], v[0]), 1).to(self.block.dtype)
        if self.packed:
            return self.packed(layer, q, k, v)
        y = torch.empty_like(q)                                                      # (1, N, H, E)
        for rows, tokens, places, shape, hide in self.grids:
            k, v = self.block[layer][:, rows, :, :self.room].transpose(2, 3)         # (R, L, G, E) each
            if tokens is None:  # the only grid
                return sdpa(q.view(*shape, *q.shape[2:]), k, v, attn_mask=hide).reshape(q.shape)
            asking = as_rows(q[:, tokens], places, shape).to(k.dtype)                # (R, C, H, E)
            y[:, tokens] = as_one(sdpa(asking, k, v, attn_mask=hide), places, 1).to(y.dtype)
        return y


class Joined(nn.Module):
    """Linear layers that read the same input, as one product, for writing only. `packed`: bf16 weights lie in memory as
    a CPU's matrix products want them, once, instead of in each pass."""

    def __init__(self, linears, packed):
        super().__init__()
        self.weight, self.packed = torch.cat([linear.weight for linear in linears]), packed
        self.bias = None if linears[0].bias is None else torch.cat([linear.bias for linear in linears])
        if packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, None)

    def forward(self, x):
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)

    def in_parts(self, *sizes):
        return lambda x: self(x).split(sizes, -1)


@torch.inference_mode()
def prepack(llama):
    """Lay out a model's weights for writing: one product for queries, keys and values, one for gate and up and, of a
    bf16 model on a CPU, each packed. It writes the same; it cannot be trained or saved any more."""
    packed = (llama.device.type == "cpu" and llama.lm_head.weight.dtype == torch.bfloat16 and computes_bf16("cpu")
              and hasattr(torch.ops.mkldnn, "_reorder_linear_weight"))
    for attention, mlp in ((block.self_attn, block.mlp) for block in llama.model.layers):
        q, k, v, gate, up = attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj
        attention.project = Joined([q, k, v], packed).in_parts(q.out_features + k.out_features, v.out_features)
        mlp.project = Joined([gate, up], packed).in_parts(gate.out_features, up.out_features)
        del attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj
        if packed:
            attention.o_proj, mlp.down_proj = Joined([attention.o_proj], True), Joined([mlp.down_proj], True)
    if packed:
        llama.lm_head = Joined([llama.lm_head], True)
    return llama


# ----------------------------------------------------------------------------------------------------------------
# Texts in the making, and prompt lookup


class Acceptance:
    """What is known of a model's copying, over all its texts: how many tokens it has written, how many of them had been
    looked up, and {token, or ("alone", token): (times copying went on after it, times tried)}."""

    def __init__(self):
        self.written, self.accepted, self.after = 0, 0, {}

    @property
    def share(self):
        return self.accepted / max(1, self.written)

    def chance(self, token):
        went_on, tried = self.after.get(token, (9, 10))
        return went_on / tried

    def learn(self, before, guess, right):
        """After the token `before` and those of the guess, copying went on `right` times, and then perhaps not."""
        for i, token in enumerate([before, *guess][:min(right + 1, len(guess))]):
            went_on, tried = self.after.get(token, (9, 10))
            self.after[token] = (went_on + (i < right), tried + 1)


class Text:
    """A text in the making: which prompt it continues, its new tokens, and the guess that is being verified."""

    def __init__(self, number, prompt, most):
        self.number, self.most, self.lookup = number, most, Lookup(prompt)
        self.new, self.guess, self.stop, self.finished = [], [], [], False

    def chances(self, chances):
        """The uniform numbers by which the next tokens are drawn."""
        start = len(self.new)
        return [chances[self.number][min(start + i, self.most - 1)] for i in range(1 + len(self.guess))]

    def take(self, verified, stop_ids, acceptance):
        """Add what the model itself would have written: verified[i] is its choice after the first i guessed tokens, and
        holds as long as these are its choices too. Sampled choices are drawn as without guessing, so their distribution
        is the model's (speculative sampling, arXiv 2302.01318, where the draft is a point mass). Gives how many guessed
        tokens were wrong."""
        right, before = 0, len(self.new)
        for token in verified:
            if token in stop_ids:
                self.stop, self.finished = [token], True
                break
            self.new.append(token)
            if right == len(self.guess) or self.guess[right] != token or len(self.new) == self.most:
                break
            right += 1
        self.finished = self.finished or len(self.new) == self.most
        acceptance.learn(self.lookup.start, self.guess, right)
        acceptance.written += 1 + right
        acceptance.accepted += right
        self.lookup.add(self.new[before:])
        return len(self.guess) - right

    def look_up(self, draft, acceptance, alone):
        self.guess = self.lookup.guess(min(draft, self.most - len(self.new) - 1), acceptance, alone)


class Lookup:
    """Guesses what comes next in a text by what followed its last tokens, eight to one, when they last stood there
    (prompt lookup: Saxena 2023; here for batches). A guess ends where copying is likelier to have ended than not: an
    aligner that drops sentences is not followed across a full stop."""

    least = 1.5  # tokens that a guess must be expected to win, among rows that keep the device busy

    def __init__(self, tokens):
        self.tokens, self.start = list(tokens), tokens[-1]  # start: what Acceptance knows a guess's beginning by
        self.after = {n: dict(zip(zip(*(tokens[i:] for i in range(n))), range(n, len(tokens))))
                      for n in (8, 4, 3, 2, 1)}

    def add(self, tokens):
        for token in tokens:
            for n, after in self.after.items():
                after[tuple(self.tokens[-n:])] = len(self.tokens)
            self.tokens.append(token)

    def guess(self, longest, acceptance, alone):
        """Up to `longest` tokens, as long as all of them are likely to come true; none where little is expected of
        them. A row alone leaves the device idle, so that wrong guesses cost it little, and it guesses more boldly."""
        bold, worth = (0.05, 0.0) if alone else (0.5, self.least)
        likely, expected, guess = 1.0, 0.0, []
        places = [(n, after.get(tuple(self.tokens[-n:]))) for n, after in self.after.items()]
        n, place = next(filter(all, places), (0, len(self.tokens)))
        self.start = self.tokens[-1] if n > 1 else ("alone", self.tokens[-1])
        for before, token in zip([self.start, *self.tokens[place:]], self.tokens[place:place + longest]):
            likely *= acceptance.chance(before)
            if likely < bold:
                break
            expected += likely
            guess.append(token)
        return guess if expected >= worth else []


# ----------------------------------------------------------------------------------------------------------------
# Sampling


def filtered_probs(logits, temperature, top_k=0, top_p=1.0, min_p=0.0):
    """Probabilities (N, V) after temperature, then of the top_k likeliest tokens (0: of all), then of the smallest set
    of likeliest ones whose mass reaches top_p (nucleus sampling: Holtzman et al., arXiv 1904.09751), then of those that
    have at least min_p times the likeliest one's (Nguyen et al., arXiv 2407.01082), renormalised."""
    if top_k < 0 or not 0 < top_p <= 1 or not 0 <= min_p <= 1:
        raise UserError(f"generate: top_k {top_k} must be at least 0, top_p {top_p} above 0 and at most 1, min_p "
                        f"{min_p} from 0 to 1")
    probs = (logits.float() / max(temperature, 1e-6)).softmax(-1)  # below it, the likeliest token, without infinities
    if 0 < top_k < probs.size(-1):
        kth = probs.topk(top_k, dim=-1).values[:, -1:]
        probs = probs.masked_fill(probs < kth, 0)
        probs = probs / probs.sum(-1, keepdim=True)
    if top_p < 1:
        ordered, index = probs.sort(dim=-1, descending=True)
        before = ordered.cumsum(-1) - ordered                                        # mass of the likelier ones
        probs = torch.zeros_like(probs).scatter(-1, index, ordered.masked_fill(before >= top_p, 0))
        probs = probs / probs.sum(-1, keepdim=True)
    if min_p > 0:
        probs = probs.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), 0)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs


def sample(logits, chance, temperature, **filters):
    """One token per row (N,) by inverting the cumulative distribution at `chance` (N,), uniform in [0, 1)."""
    cumulative = filtered_probs(logits, temperature, **filters).double().cumsum(-1)
    point = chance.double()[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, point, right=True)[:, 0].clamp(max=logits.size(-1) - 1)
