"""A Llama, or one of its kin: the network's mathematics, and nothing else.

Read it in this order. `Config` names the numbers of a model as Hugging Face does. `Llama` is the network: tokens in,
hidden states out; its `lm_head` turns these into words. How queries meet keys is not the network's business: it is
handed an object that says so, `Causal` (plain rows), `Packed` (documents one after another, which never see each other)
or generate.py's `Cache`. `token_logprobs` is what nearly every loss in this project is made of. `generate`, at the end,
writes a text in a dozen lines; generate.py writes the same text fast.

Shapes: B rows, T tokens, V vocabulary, D hidden width, H query heads, G key/value heads, E head_dim.
"""
import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from common import UserError, first_line

# ----------------------------------------------------------------------------------------------------------------
# Configuration


@dataclasses.dataclass
class Config:
    """The numbers of a model, under the names of Hugging Face's config.json. A sliding window of W tokens hides from a
    token what is W or more before it, which is not computed here: max_position_embeddings is W at most."""
    model_type: str = "llama"               # or "qwen2": biases on q, k, v; "qwen3": norms of q, k; "mistral": neither
    vocab_size: int = 32000
    hidden_size: int = 512
    intermediate_size: int = 1376
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None  # None: as many as query heads
    head_dim: int | None = None             # None: hidden_size / num_attention_heads
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None        # {"rope_type": "linear" | "llama3", "factor": ..., ...}
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | list | None = 2
    sliding_window: int | None = None
    layer_types: list | None = None         # "sliding_attention" or "full_attention"; None: the window is in all layers
    num_labels: int = 0                     # 0: a language model; else so many scalar heads (a preference model: 1)

    def __post_init__(self):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise UserError(f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                                f"{self.num_attention_heads}: give head_dim")
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.head_dim % 2:
            raise UserError(f"head_dim {self.head_dim} is odd, but a rotary embedding turns pairs: give an even one")
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                            f"num_key_value_heads {self.num_key_value_heads}")
        if self.sliding_window:
            self.max_position_embeddings = min(self.max_position_embeddings, self.sliding_window)
        scaling = self.rope_scaling or {}
        if rope_type(scaling) == "llama3" and not scaling["low_freq_factor"] < scaling["high_freq_factor"]:
            raise UserError(f"rope_scaling: low_freq_factor {scaling['low_freq_factor']} is not below high_freq_factor "
                            f"{scaling['high_freq_factor']}")

    @property
    def stop_ids(self):
        """The token ids that end a text, as a tuple (Llama 3's instruct models name several)."""
        eos = self.eos_token_id
        return () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)


def rope_type(scaling):
    return scaling.get("rope_type", scaling.get("type", "default"))


# ----------------------------------------------------------------------------------------------------------------
# The network


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        y = F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)
        return y.to(compute_dtype(x))  # rounded once, not by each projection that reads it


def compute_dtype(x):
    """What a projection of x computes in: autocast's dtype where that is on, else x's."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def rope_frequencies(config):
    """(E/2,) angles per position step, with the `linear` and `llama3` context extensions. Source: RoFormer
    (arXiv 2104.09864); llama3: wavelengths over a quarter of the original context are stretched by `factor`, short
    ones kept, those between blended."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
    frequencies = 1.0 / config.rope_theta ** exponents
    scaling = config.rope_scaling or {}
    if rope_type(scaling) == "linear":
        return frequencies / scaling["factor"]
    if rope_type(scaling) == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # in the old context
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return keep * frequencies + (1 - keep) * frequencies / scaling["factor"]
    return frequencies


def rotate(x, cos, sin):
    """Rotary embedding of x (B, T, heads, E) by cos, sin (B, T, 1, E): channel i is paired with channel i + E/2. The
    first half of sin is negative, as Llama.forward makes it."""
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, -1), sin)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.head_dim, self.heads = config.head_dim, (config.num_attention_heads, config.num_key_value_heads)
        inner, shared = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        biases = config.attention_bias or config.model_type == "qwen2"
        self.q_proj = nn.Linear(config.hidden_size, inner, bias=biases)
        self.k_proj = nn.Linear(config.hidden_size, shared, bias=biases)
        self.v_proj = nn.Linear(config.hidden_size, shared, bias=biases)
        self.o_proj = nn.Linear(inner, config.hidden_size, bias=config.attention_bias)
        norms = (RMSNorm(config.head_dim, config.rms_norm_eps) for _ in range(2))  # of each head's query and key
        self.q_norm, self.k_norm = norms if config.model_type == "qwen3" else (None, None)

    @torch.no_grad()
    def mimic(self):
        """Draw keys towards queries, and outputs towards the transpose of values (see Llama.initialise)."""
        def by_head(weight):
            return weight.unflatten(0, (-1, self.head_dim))                          # (heads, E, D)
        sharing = self.q_proj.out_features // self.k_proj.out_features
        queries = by_head(self.q_proj.weight)[::sharing]                             # one of each group
        values = by_head(self.v_proj.weight).repeat_interleave(sharing, 0)
        self.k_proj.weight.copy_(0.9 * queries.flatten(0, 1) + 0.44 * self.k_proj.weight)
        self.o_proj.weight.copy_(0.3 * values.flatten(0, 1).T)

    def forward(self, x, cos, sin):
        turned, v = (part.unflatten(2, (-1, self.head_dim)) for part in self.project(x))
        if self.q_norm:
            q, k = turned.split(self.heads, 2)
            turned = torch.cat((self.q_norm(q), self.k_norm(k)), 2)
        return *rotate(turned, cos, sin).split(self.heads, 2), v  # for attend: (B, T, H, E), (B, T, G, E), (B, T, G, E)

    def project(self, x):
        """Queries and keys beside each other (B, T, (H + G) * E), and values (B, T, G * E)."""
        return torch.cat((self.q_proj(x), self.k_proj(x)), -1), self.v_proj(x)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        sizes = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(*sizes, bias=config.mlp_bias)
        self.up_proj = nn.Linear(*sizes, bias=config.mlp_bias)
        self.down_proj = nn.Linear(*reversed(sizes), bias=config.mlp_bias)

    def forward(self, x):
        gate, up = self.project(x)
        return self.down_proj(F.silu(gate) * up)

    def project(self, x):
        return self.gate_proj(x), self.up_proj(x)


class Block(nn.Module):
    parts = None  # (before, after), compiled: see compiled.py

    def __init__(self, config):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, cos, sin, attend, layer):
        before, after = self.parts or (Block.before, Block.after)
        return after(self, x, attend(layer, *before(self, x, cos, sin)))

    def before(self, x, cos, sin):
        return self.self_attn(self.input_layernorm(x), cos, sin)

    def after(self, x, y):
        x = x + self.self_attn.o_proj(y.flatten(2))                                  # (B, T, D)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """A Llama, and by config.model_type a Qwen2, Qwen3 or Mistral, which are Llamas but for what Attention says.
    Parameters carry Hugging Face's names, so a checkpoint needs no translation."""

    def __init__(self, config, seed=0):
        """A model from scratch, its weights drawn from `seed`."""
        super().__init__()
        self.config = config
        self.checkpoint_activations = False  # recompute each block in the backward pass: less memory, slower
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers)),
            "norm": RMSNorm(config.hidden_size, config.rms_norm_eps),
        })
        if config.num_labels:
            self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        else:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            self.tie()
        self.adapter = {}  # of LoRA: rank, scale, base folder; see lora.py
        self.frequencies = rope_frequencies(config)  # no buffer: .to(torch.bfloat16) must leave it in fp32
        if self.device.type != "meta":
            self.initialise(seed)

    def tie(self):
        if self.config.tie_word_embeddings and not self.config.num_labels:
            self.lm_head.weight = self.model.embed_tokens.weight

    def initialise(self, seed):
        """Scaled normal weights, drawn from `seed`. Attention starts by mimicking what training finds (Trockman and
        Kolter, arXiv 2305.09828): keys resemble queries, and a head's output resembles its input."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:  # projections into the residual stream start smaller (GPT-2)
                depth = 2 * self.config.num_hidden_layers if name.endswith(("o_proj.weight", "down_proj.weight")) else 1
                nn.init.normal_(parameter, std=(parameter.size(1) * depth) ** -0.5, generator=generator)
        for block in self.model.layers:
            block.self_attn.mimic()

    @property
    def device(self):
        return self.model.embed_tokens.weight.device

    def forward(self, tokens, attend=None):
        """Final hidden states (B, T, D), normalised, of tokens (B, T): the one door to the network. `attend` has
        .positions (B, T) or (1, T) and is called with (layer, q, k, v); by default, rows are plain texts."""
        attend = attend or Causal(tokens)
        x = self.model.embed_tokens(tokens)                                          # (B, T, D)
        self.frequencies = self.frequencies.to(x.device)
        angles = attend.positions[..., None, None].float() * self.frequencies        # (B, T, 1, E/2)
        cos, sin = angles.cos().to(compute_dtype(x)), angles.sin().to(compute_dtype(x))
        cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)     # (B, T, 1, E)
        for layer, block in enumerate(self.model.layers):
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, attend, layer, use_reentrant=False)
            else:
                x = block(x, cos, sin, attend, layer)
        return self.model.norm(x)


def logits(llama, tokens, attend=None):
    """Logits (B, T, V) of the token after each of tokens (B, T)."""
    return llama.lm_head(llama(tokens, attend))


# ----------------------------------------------------------------------------------------------------------------
# Ways of attending. Each takes q (B, T, H, E), k and v (B, T, G, E) and gives (B, T, H, E).


def sdpa(q, k, v, **options):
    """Scaled dot-product attention on (B, T, heads, E) layouts; G < H key/value heads are shared, not copied."""
    y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
                                       enable_gqa=bool(q.size(2) != k.size(2)), **options)
    return y.transpose(1, 2)


def causal_attention(q, k, v):
    """Causal attention of documents laid out as rows: q (R, T, H, E), k and v (R, T, G, E), gives (R, T, H, E). On a
    CPU in bf16 and for up to 1,024 tokens, the definition is written out, because PyTorch's kernel trains slowly there.
    The H/G query heads that share keys are rows of one matrix product with them, so that no keys are copied."""
    (rows, tokens, heads, size), sharing = q.shape, q.size(2) // k.size(2)
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or tokens > 1024:
        return sdpa(q, k, v, is_causal=True)
    k, v = (x.transpose(1, 2).reshape(-1, tokens, size) for x in (k, v))             # (R * G, T, E)
    q = q.transpose(1, 2).reshape(len(k), -1, size)                                  # (R * G, H/G * T, E)
    future = q.new_full((tokens, tokens), float("-inf")).triu(1).repeat(sharing, 1)
    with torch.autocast("cpu", enabled=False):  # which would copy the scores to fp32; softmax adds up in fp32 anyway
        scores = torch.baddbmm(future, q, k.transpose(1, 2), alpha=size ** -0.5)     # (R * G, H/G * T, T)
        y = torch.bmm(scores.softmax(-1), v)
    return y.view(rows, heads, tokens, size).transpose(1, 2)


class Causal:
    """Rows of equal length; a token sees itself and those before it."""

    def __init__(self, tokens):
        self.positions = torch.arange(tokens.size(1), device=tokens.device)[None]

    def __call__(self, layer, q, k, v):
        return sdpa(q, k, v, is_causal=True)


class Packed:
    """Documents of the given lengths one after another, the same in each of the B rows (one, but for several adapters):
    no padding anywhere but inside the attention itself, where documents of like length stand as rows of their own,
    padded on the right. Causality hides that padding, so no mask is needed and the fast kernels apply."""

    def __init__(self, lengths, device, attention=causal_attention):
        self.lengths, self.attention = torch.as_tensor(lengths).tolist(), attention
        self.positions = places_of(self.lengths)[1][None].to(device)
        self.groups = groups_of(self.lengths, device)

    def __call__(self, layer, q, k, v):
        y = []
        sizes = [len(places) for places, _ in self.groups]
        for (places, shape), *parts in zip(self.groups, *(x.split(sizes, 1) for x in (q, k, v))):
            rows = [as_rows(part, places, shape) for part in parts]
            y.append(as_one(self.attention(*rows), places, len(q)))
        return y[0] if len(y) == 1 else torch.cat(y, dim=1)


def groups_of(lengths, device):
    """Which neighbouring documents attention takes together, those whose rounded lengths are equal: [(their tokens'
    places in the padded rows, (R, T)), ...]. Rounded, because a CPU builds a kernel for each new shape."""
    wide = [-(-length // 64) * 64 if length > 64 else -(-length // 16) * 16 for length in lengths]
    groups, first = [], 0
    for last in range(1, len(lengths) + 1):
        if last == len(lengths) or wide[last] != wide[first]:
            document, position = places_of(lengths[first:last])
            places = (document * wide[first] + position).to(device)
            groups.append((places, (last - first, wide[first])))
            first = last
    return groups


def places_of(lengths):
    """For documents one after another: which of them each token belongs to, and where in it. Both (N,)."""
    lengths = torch.as_tensor(lengths)
    document = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    return document, torch.arange(len(document)) - (lengths.cumsum(0) - lengths)[document]


def as_rows(x, places, shape):
    """Tokens one after another (B, N, h, E) as rows (B * R, T, h, E), padded with zeros."""
    padded = x.new_zeros(len(x), shape[0] * shape[1], *x.shape[2:])
    return padded.index_copy(1, places, x).view(-1, shape[1], *x.shape[2:])


def as_one(x, places, rows):
    """The inverse of as_rows, for B = rows."""
    return x.reshape(rows, -1, *x.shape[2:]).index_select(1, places)


# ----------------------------------------------------------------------------------------------------------------
# Log-probabilities: every loss is made of these


KEEP = 2**27  # logits, in number: up to so many are kept for the backward pass (about 1 GB), more are recomputed
CHUNK = 2**27  # logits at a time on a GPU (0.5 GB): each chunk casts the head, and adds to a gradient of its size


def token_logprobs(llama, tokens, lengths, targets, chunk=None):
    """Log-probability of the chosen tokens, each given the tokens of its document before it: (K,) in fp32.

    tokens (N,): documents packed one after another, of `lengths`; targets (K,): the places of the tokens to score,
    never a document's first."""
    hidden = llama(tokens[None], Packed(lengths, tokens.device))[0]                  # (N, D)
    return chosen_logprobs(llama, hidden, tokens, targets, chunk)


def chosen_logprobs(llama, hidden, tokens, targets, chunk=None):
    """token_logprobs, where the final hidden states (N, D) are known. Logits exist for the chosen tokens only, `chunk`
    rows at a time (by default 512 on a CPU, elsewhere as many as give CHUNK logits); where they are more than KEEP,
    they are computed again in the backward pass rather than kept."""
    chunk = chunk or (512 if hidden.device.type == "cpu" else -(-CHUNK // llama.config.vocab_size))
    hidden, wanted = hidden.index_select(0, targets - 1), tokens[targets]            # the token before predicts

    def logprobs(rows, ids):
        return -F.cross_entropy(llama.lm_head(rows).float(), ids, reduction="none")

    again = torch.is_grad_enabled() and len(targets) * llama.config.vocab_size > KEEP
    return torch.cat([checkpoint(logprobs, h, t, use_reentrant=False) if again else logprobs(h, t)
                      for h, t in zip(hidden.split(chunk), wanted.split(chunk))])


def document_scores(llama, tokens, lengths):
    """What a preference model gives each document, read at its last token: (K, documents) in fp32.

    tokens (N,): documents packed one after another, of `lengths`. K is the number of heads: 1, or that of the adapters
    that lora.py has put side by side, each of which computes its own hidden states."""
    hidden = llama(tokens.expand(len(llama.score.weight), -1), Packed(lengths, tokens.device))       # (K, N, D)
    heads = llama.score.weight.float()                                               # (K, D)
    last = torch.as_tensor(lengths, device=tokens.device).cumsum(0) - 1
    return (hidden[:, last].float() * heads[:, None]).sum(-1)  # a matrix product would be rounded by autocast


# ----------------------------------------------------------------------------------------------------------------
# Generation, the plain way


@torch.inference_mode()
def generate(llama, prompts, max_new_tokens, temperature=0.0, stop_ids=(), seed=0):
    """Continue each prompt (a list of token ids); gives the new ones of each, without the stop token. For every token
    the whole text goes through the model again: generate.py writes the same, and remembers what it has computed.

    temperature 0 takes the likeliest token; else one is drawn. seed: an int, or one per prompt (see `uniforms`)."""
    texts, chances = [], uniforms(seed, len(prompts), max_new_tokens)
    for prompt, chance in zip(prompts, chances):
        new = []
        while len(new) < max_new_tokens:
            scores = logits(llama, torch.tensor([prompt + new], device=llama.device))[0, -1].float()     # (V,)
            if temperature == 0:
                token = int(scores.argmax())
            else:  # where the cumulative distribution passes this token's chance
                cumulative = (scores / temperature).softmax(-1).double().cumsum(-1)
                token = int((cumulative <= chance[len(new)] * cumulative[-1]).sum())
            if token in stop_ids:
                break
            new.append(token)
        texts.append(new)
    return texts


def uniforms(seed, rows, steps):
    """(rows, steps) numbers in [0, 1), each row from a generator of its own: what a text is depends on its seed alone,
    and not on its neighbours. seed: an int, or one per row."""
    seeds = seed if isinstance(seed, (list, tuple)) else [seed * 1_000_003 + row for row in range(rows)]
    return [torch.rand(steps, generator=torch.Generator().manual_seed(s)) for s in seeds]


# ----------------------------------------------------------------------------------------------------------------
# Devices


def device_named(name):
    """The device of a --device, by default cuda where there is one; UserError where this machine has none such."""
    try:
        return torch.zeros(0, device=name or ("cuda" if torch.cuda.is_available() else "cpu")).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: cannot be used here ({first_line(error)}); give cpu, or leave it "
                        "out") from error


def computes_bf16(device):
    """Whether the device multiplies bf16 matrices in hardware; a CPU that does not is slower in bf16 than in fp32."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    known = torch.cpu.get_capabilities()
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))


def computes_half(device, options):
    """Whether a training on the device multiplies in bf16: what options.precision says."""
    return computes_bf16(device) if options.precision == "auto" else options.precision == "bf16"
