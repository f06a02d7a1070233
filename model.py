"""A Llama transformer in one file: the network, three ways of attending, its checkpoints, and generation.

Read it in this order. `Config` names the numbers of a model as Hugging Face does. `Llama` is the network. How its
queries meet its keys is not the network's business: it is handed one of three small objects, `Causal` (plain rows),
`Packed` (documents one after another, which never see each other) or `Cache` (generation). `from_pretrained` and
`save_pretrained` speak Hugging Face's folders. `generate` samples. `token_logprobs` is the one function that every
loss in this project is made of.

Shapes: B rows, T tokens, V vocabulary, D hidden width, H query heads, G key/value heads, E head_dim.
"""
import ctypes
import dataclasses
import json
import math
import os
from collections import Counter
from pathlib import Path

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large pages for tensors, where Linux offers them; read by torch

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from data import UserError, write_whole


def keep_memory():
    """Let the C library keep freed memory for the next tensor, instead of giving each large block back to the system
    and having it zeroed again, page by page: training a 40M Llama on two cores gains 1.1 to 1.6 x. Only glibc has it."""
    tune = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if tune:
        tune(-4, 0)    # M_MMAP_MAX: no block is a mapping of its own
        tune(-1, -1)   # M_TRIM_THRESHOLD: nothing is given back


keep_memory()


def computes_bf16(device):
    """Whether the device multiplies bf16 matrices in hardware; a CPU that does not takes 2 to 4 x longer in bf16."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    known = torch.cpu.get_capabilities()
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))

# ----------------------------------------------------------------------------------------------------------------
# Configuration


@dataclasses.dataclass
class Config:
    """The numbers of a Llama, under the names of Hugging Face's config.json."""
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
    num_labels: int = 0                     # 0: a language model; else so many scalar heads (a preference model: 1)

    def __post_init__(self):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise UserError(f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                                f"{self.num_attention_heads}: give head_dim")
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                            f"num_key_value_heads {self.num_key_value_heads}")

    @property
    def stop_ids(self):
        """The token ids that end a text, as a tuple (Llama 3's instruct models name several)."""
        eos = self.eos_token_id
        return () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)

    @staticmethod
    def read(path):
        """Read a config.json; UserError names every key whose value asks for mathematics that is not here."""
        try:
            raw = json.loads(Path(path).read_text(encoding="utf-8"))
            assert isinstance(raw, dict)
        except FileNotFoundError:
            raise UserError(f"{path}: not found; --model takes a folder with config.json, weights, tokenizer.json")
        except (OSError, ValueError, AssertionError) as error:
            raise UserError(f"{path}: cannot be read as a JSON object ({error})")
        refuse_other_mathematics(raw, path)
        known = {field.name for field in dataclasses.fields(Config)}
        values = {"rms_norm_eps": 1e-6} | {key: value for key, value in raw.items() if key in known}
        rope = raw.get("rope_parameters") or {}  # transformers 5 writes theta and scaling into one dictionary
        if "rope_theta" in rope:
            values["rope_theta"] = rope["rope_theta"]
        scaling = raw.get("rope_scaling") or {k: v for k, v in rope.items() if k != "rope_theta"}
        values["rope_scaling"] = scaling if scaling and rope_type(scaling) != "default" else None
        if "LlamaForSequenceClassification" in (raw.get("architectures") or ()):
            values.setdefault("num_labels", len(raw.get("id2label") or (0, 1)))
        needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        given = tuple(key for key in ("num_key_value_heads", "head_dim") if values.get(key) is not None)
        wrong = [key for key in needed + given if not isinstance(values.get(key), int) or values[key] < 1]
        wrong += [key for key in ("rope_theta", "rms_norm_eps") if not isinstance(values.get(key, 1.0), (int, float))]
        if wrong:
            raise UserError(f"{path}: {', '.join(wrong)} missing or not such a number; is it a Llama's config?")
        return Config(**values)


def rope_type(scaling):
    return scaling.get("rope_type", scaling.get("type", "default"))


# Keys that change the network's mathematics, each with the values that leave it as written here.
NEUTRAL = {
    "model_type": ("llama",), "hidden_act": ("silu",), "attention_dropout": (0,), "sliding_window": (),
    "partial_rotary_factor": (1,), "rope_interleaved": (False,), "quantization_config": (),
    "num_local_experts": (0, 1), "attn_logit_softcapping": (), "final_logit_softcapping": (), "use_qk_norm": (False,),
    "embedding_multiplier": (1,), "residual_multiplier": (1,), "logits_scaling": (1,), "no_rope_layers": ([],),
}
ROPE_KEYS = {  # scaling type -> the numbers that it needs
    "default": (), "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def refuse_other_mathematics(raw, path):
    rope = raw.get("rope_parameters") or {}
    scaling = raw.get("rope_scaling") or rope
    if not isinstance(rope, dict) or not isinstance(scaling, dict):
        raise UserError(f"{path}: rope_scaling must be null or an object such as "
                        '{"rope_type": "linear", "factor": 2.0}')
    wrong = [f"{key} = {value!r}" for source in (raw, rope) for key, value in source.items()
             if key in NEUTRAL and value is not None and value not in NEUTRAL[key]]
    kind = rope_type(scaling)
    if kind not in ROPE_KEYS:
        wrong.append(f"rope_scaling type {kind!r} (known: {', '.join(ROPE_KEYS)})")
    else:
        wrong += [f"rope_scaling without a number {key!r}" for key in ROPE_KEYS[kind]
                  if not isinstance(scaling.get(key), (int, float))]
    if wrong:
        raise UserError(f"{path}: asks for what model.py does not compute: {'; '.join(wrong)}; use a plain Llama")


# ----------------------------------------------------------------------------------------------------------------
# The network


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return (self.weight * y.to(x.dtype)).to(compute_dtype(x))  # rounded once, not by each projection that reads it


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
    """Rotary embedding of x (B, T, heads, E) by cos, sin (B, T, 1, E): channel i is paired with channel i + E/2."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.head_dim = config.head_dim
        inner, shared = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, inner, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, shared, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, shared, bias=config.attention_bias)
        self.o_proj = nn.Linear(inner, config.hidden_size, bias=config.attention_bias)

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

    def forward(self, x, cos, sin, attend, layer):
        heads = (*x.shape[:2], -1, self.head_dim)
        q = rotate(self.q_proj(x).view(heads), cos, sin)          # (B, T, H, E)
        k = rotate(self.k_proj(x).view(heads), cos, sin)          # (B, T, G, E)
        v = self.v_proj(x).view(heads)
        return self.o_proj(attend(layer, q, k, v).flatten(2))     # (B, T, D)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        sizes = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(*sizes, bias=config.mlp_bias)
        self.up_proj = nn.Linear(*sizes, bias=config.mlp_bias)
        self.down_proj = nn.Linear(*reversed(sizes), bias=config.mlp_bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, cos, sin, attend, layer):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """Parameters carry Hugging Face's names, so a checkpoint needs no translation."""

    def __init__(self, config, seed=0):
        """A model from scratch, its weights drawn from `seed`."""
        super().__init__()
        self.config = config
        self.checkpoint_activations = False  # recompute each block in the backward pass: less memory, a third slower
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
        self.adapter = {}                        # of LoRA: rank, scale, base folder; see add_lora
        self.habits, self.tally = {}, Counter()  # of generate: how this model copies; tokens written, and copied
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

    def forward(self, tokens, lengths=None):
        """Logits (B, T, V) of tokens (B, T). With `lengths` (ints that sum to B*T) the flattened rows are documents
        packed one after another: each is computed as if it were alone."""
        if lengths is None:
            return self.lm_head(self.hidden(tokens, Causal(tokens)))
        flat = self.lm_head(self.hidden(tokens.reshape(1, -1), Packed(lengths, tokens.device)))
        return flat.view(*tokens.shape, -1)

    def hidden(self, tokens, attend):
        """Final hidden states (B, T, D), normalised. `attend` has .positions (B, T) or (1, T) and is called with
        (layer, q, k, v)."""
        x = self.model.embed_tokens(tokens)                                          # (B, T, D)
        angles = attend.positions[..., None].float() * self.frequencies.to(x.device) # (B, T, E/2)
        angles = torch.cat((angles, angles), dim=-1)[:, :, None]                     # (B, T, 1, E)
        cos, sin = angles.cos().to(compute_dtype(x)), angles.sin().to(compute_dtype(x))
        for layer, block in enumerate(self.model.layers):
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, attend, layer, use_reentrant=False)
            else:
                x = block(x, cos, sin, attend, layer)
        return self.model.norm(x)

    @staticmethod
    def from_pretrained(folder, dtype=torch.float32, device="cpu", scorer=False):
        """Load a Hugging Face Llama folder: model.safetensors, its shards by index, or pytorch_model*.bin; or an adapter
        in PEFT's format, which is merged into the model that it names. scorer: a model with a scalar head instead of
        words; made of a language model, its head gives zero until it is trained."""
        if not is_adapter(folder):
            return load_checkpoint(folder, dtype, device, scorer)
        llama = load_checkpoint(base_of(folder), dtype, device, scorer)
        load_adapters(llama, [folder])
        return merge_lora(llama)

    def save_pretrained(self, folder):
        """Write config.json and model.safetensors, so that `transformers` loads them; each file is put in place
        whole, the configuration last. Of a model with LoRA, the adapter alone, as `peft` loads it."""
        if self.adapter:
            save_adapter(self, folder)
        else:
            save_checkpoint(self, folder)


# ----------------------------------------------------------------------------------------------------------------
# Three ways of attending. Each takes q (B, T, H, E), k and v (B, T, G, E) and gives (B, T, H, E).


def sdpa(q, k, v, **options):
    """Scaled dot-product attention on (B, T, heads, E) layouts; G < H key/value heads are shared, not copied."""
    y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
                                       enable_gqa=q.size(2) != k.size(2), **options)
    return y.transpose(1, 2)


def causal_attention(q, k, v):
    """Causal attention of documents laid out as rows: q (R, T, H, E), k and v (R, T, G, E), gives (R, T, H, E). On a
    CPU in bf16 and for up to 1,024 tokens, the definition written out trains about twice as fast as PyTorch's kernel."""
    (rows, tokens, heads, size), sharing = q.shape, q.size(2) // k.size(2)
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or tokens > 1024:
        return sdpa(q, k, v, is_causal=True)
    if sharing > 1:
        k, v = k.repeat_interleave(sharing, dim=2), v.repeat_interleave(sharing, dim=2)
    q, k, v = (x.transpose(1, 2).reshape(-1, tokens, size) for x in (q, k, v))       # (R * H, T, E)
    future = q.new_full((tokens, tokens), float("-inf")).triu(1)
    with torch.autocast("cpu", enabled=False):  # which would copy the scores to fp32; softmax adds up in fp32 anyway
        scores = torch.baddbmm(future, q, k.transpose(1, 2), alpha=size ** -0.5)     # (R * H, T, T)
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
    no padding anywhere but inside the attention itself, where each document is laid out as a row of its own, padded on
    the right to its group's longest. Causality hides that padding, so no mask is needed and the fast kernels apply."""

    def __init__(self, lengths, device):
        self.lengths = torch.as_tensor(lengths).tolist()
        self.positions = places_of(self.lengths)[1][None].to(device)
        self.groups = groups_of(self.lengths, device, apart=torch.device(device).type == "cpu")

    def __call__(self, layer, q, k, v):
        y = []
        for start, end, places, shape in self.groups:
            rows = [as_rows(x[:, start:end], places, shape) for x in (q, k, v)]
            y.append(as_one(causal_attention(*rows), places, len(q)))
        return y[0] if len(y) == 1 else torch.cat(y, dim=1)


def groups_of(lengths, device, apart):
    """Which documents attention takes together: [(first token, end, places in the padded rows, (R, T)), ...]. A GPU
    takes all at once. A CPU takes those apart that differ in length; lengths are rounded up, since it builds a kernel
    for each new one."""
    wide = [max(lengths)] * len(lengths)
    if apart:
        wide = [-(-length // 64) * 64 if length > 64 else -(-length // 16) * 16 for length in lengths]
    groups, start, first = [], 0, 0
    for last in range(1, len(lengths) + 1):
        if last == len(lengths) or wide[last] != wide[first]:
            end = start + sum(lengths[first:last])
            document, position = places_of(lengths[first:last])
            groups.append((start, end, (document * wide[first] + position).to(device), (last - first, wide[first])))
            start, first = end, last
    return groups


def places_of(lengths):
    """For documents one after another: which of them each token belongs to, and where in it. Both (N,)."""
    lengths = torch.as_tensor(lengths)
    document = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    return document, torch.arange(len(document)) - (lengths.cumsum(0) - lengths)[document]


def rounded(count):
    """The next power of two up to 8, then the next multiple of 8."""
    return 1 << (count - 1).bit_length() if count <= 8 else -(-count // 8) * 8


def as_rows(x, places, shape):
    """Tokens one after another (B, N, h, E) as rows (B * R, T, h, E), padded with zeros."""
    padded = x.new_zeros(len(x), shape[0] * shape[1], *x.shape[2:])
    return padded.index_copy(1, places, x).view(-1, shape[1], *x.shape[2:])


def as_one(x, places, rows):
    """The inverse of as_rows, for B = rows."""
    return x.reshape(rows, -1, *x.shape[2:]).index_select(1, places)


class Cache:
    """Keys and values of R texts, left-aligned: row r holds its text's first lengths[r] tokens. Each forward pass
    appends to them, to one row more than to another, and what is appended attends to what is there. Room is made for 64
    tokens at a time: what is read is then one whole block, which kernels like, and their shapes seldom change."""

    def __init__(self, config, rows, dtype, device):
        shape = rows, config.num_key_value_heads, 0, config.head_dim
        self.k = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.v = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.lengths, self.room, self.apart = [0] * rows, 0, torch.device(device).type == "cpu"

    def grow(self, length):
        """Make room for rows of `length` tokens."""
        more = -(-length // 64) * 64 - self.room
        if more > 0:
            self.room += more
            for kept in (self.k, self.v):
                for layer in range(len(kept)):
                    kept[layer] = F.pad(kept[layer], (0, 0, 0, more))

    def move(self, source, target):
        """Copy row `source` over row `target` (a finished row's place is taken by the last one)."""
        if source != target:
            for x in (*self.k, *self.v):
                x[target] = x[source]
            self.lengths[target] = self.lengths[source]

    def append(self, counts, first=0, spare=0):
        """Prepare for counts[r] further tokens of row first + r, one row's after another's; and for spare ones behind
        the last row's, which attend to nothing and are not kept."""
        device, (row, offset) = self.k[0].device, places_of([*counts[:-1], counts[-1] + spare])
        before = torch.tensor(self.lengths[first:first + len(counts)])
        self.row, self.position = (first + row).to(device), (before[row] + offset).to(device)
        self.positions = self.position[None]
        for r, count in enumerate(counts):
            self.lengths[first + r] += count
        self.grow(max(self.lengths[first:first + len(counts)]) + spare)
        self.prefill = None if before.any() else Packed(counts, device)
        self.parts = [] if self.prefill else self.divide(torch.tensor(counts), before, first)
        return self

    def divide(self, counts, before, first):
        """Attention of few new tokens to many old ones: in one part on a GPU, its rows padded to the longest; apart on
        a CPU, first every row's first token, then each row's guessed tokens if it has any: a fifth faster with 64 rows.
        The number of rows is rounded, since kernels are chosen, and on a CPU built, for each new shape. A part is
        (slice of rows, (R, C) which new tokens, (R, C, room) what is hidden from them)."""
        starts, device = counts.cumsum(0) - counts, self.k[0].device

        def part(row, rows, columns):
            offset = torch.minimum(columns, counts[row:row + rows, None] - 1)        # too short: the last token again
            here = slice(first + row, min(first + row + rounded(rows), len(self.lengths)))
            hidden = torch.arange(self.room) > (before[row:row + rows, None] + offset)[..., None]
            hidden = F.pad(hidden, (0, 0, 0, 0, 0, here.stop - here.start - rows))
            return here, (starts[row:row + rows, None] + offset).to(device), hidden.to(device)

        if not self.apart:
            return [part(0, len(counts), torch.arange(rounded(int(counts.max()))))]
        return [part(0, len(counts), torch.arange(1))] + [part(row, 1, torch.arange(1, count))
                                                          for row, count in enumerate(counts.tolist()) if count > 1]

    def __call__(self, layer, q, k, v):
        keys, values = self.k[layer], self.v[layer]
        keys[self.row, :, self.position] = k[0].to(keys.dtype)
        values[self.row, :, self.position] = v[0].to(values.dtype)
        if self.prefill:
            return self.prefill(layer, q, k, v)
        y = torch.zeros_like(q[0])                                                   # (N, H, E)
        for rows, which, hidden in self.parts:
            asking = F.pad(q[0][which], (0, 0, 0, 0, 0, 0, 0, len(hidden) - len(which)))
            y[which] = cached_attention(asking, keys[rows], values[rows], hidden)[:len(which)]
        return y[None]


def cached_attention(q, k, v, hidden):
    """Attention of new tokens q (R, C, H, E) to k, v (R, G, L, E) but for what is hidden (R, C, L); gives (R, C, H, E).
    The H/G query heads that share keys are rows of one matrix product with them. Written out, because PyTorch's kernels
    are slow for a few queries: on a CPU in bf16, 5 to 7 x."""
    (rows, new, heads, size), groups = q.shape, k.size(1)
    q = q.view(rows, new, groups, -1, size).permute(0, 2, 3, 1, 4).flatten(2, 3)     # (R, G, H/G * C, E)
    scores = (q * size ** -0.5) @ k.transpose(2, 3)                                  # (R, G, H/G * C, L)
    scores = scores.view(rows, heads, new, -1).masked_fill_(hidden[:, None], float("-inf"))
    y = scores.softmax(-1).view(rows, groups, -1, k.size(2)) @ v                     # (R, G, H/G * C, E)
    return y.view(rows, heads, new, size).transpose(1, 2)


# ----------------------------------------------------------------------------------------------------------------
# Log-probabilities: every loss is made of these


KEEP = 2**25  # logits, in number: up to so many are kept for the backward pass (about 300 MB), more are recomputed


def token_logprobs(llama, tokens, lengths, targets, chunk=512, hidden=None):
    """Log-probability of the chosen tokens, each given the tokens of its document before it.

    tokens (N,): documents packed one after another, of `lengths`; targets (N,) bool: which tokens to score, never a
    document's first. Gives (targets.sum(),) in fp32, in order. Logits exist for the chosen tokens only, `chunk` rows
    at a time; where they are more than KEEP, they are computed again in the backward pass rather than kept. hidden
    (N, D): the final hidden states, where they are known already."""
    if hidden is None:
        hidden = llama.hidden(tokens[None], Packed(lengths, tokens.device))[0]       # (N, D)
    where = targets.nonzero()[:, 0]
    hidden, wanted = hidden.index_select(0, where - 1), tokens[where]                # the token before predicts

    def score(rows, ids):
        return -F.cross_entropy(llama.lm_head(rows).float(), ids, reduction="none")

    again = torch.is_grad_enabled() and len(where) * llama.config.vocab_size > KEEP
    return torch.cat([checkpoint(score, h, t, use_reentrant=False) if again else score(h, t)
                      for h, t in zip(hidden.split(chunk), wanted.split(chunk))])


def document_scores(llama, tokens, lengths):
    """What a preference model gives each document, read at its last token: (K, documents) in fp32.

    tokens (N,): documents packed one after another, of `lengths`. K is the number of heads: 1, or that of the adapters
    that load_adapters has put side by side, each of which computes its own hidden states."""
    rows = len(llama.score.weight)
    hidden = llama.hidden(tokens.expand(rows, -1), Packed(lengths, tokens.device))   # (K, N, D)
    last = torch.as_tensor(lengths, device=tokens.device).cumsum(0) - 1
    return torch.einsum("knd,kd->kn", hidden[:, last].float(), llama.score.weight.float())


# ----------------------------------------------------------------------------------------------------------------
# Generation


@torch.inference_mode()
def generate(llama, prompts, max_new_tokens, temperature=0.0, top_k=None, top_p=None, stop_ids=(), seed=0, draft=0):
    """Continue each prompt; gives the list of new token ids per prompt, the stop token not included.

    prompts: lists of token ids, of any lengths (at least 1). temperature 0 is greedy. seed: an int, or one per prompt;
    what a prompt's continuation is depends on its own seed and not on its neighbours in the batch. draft: up to so many
    tokens per step and row are guessed from the text before (see Copier) and verified in the same forward pass; this
    changes how long it takes, not what is written. A row that has finished leaves the batch.
    """
    if not prompts:
        return []
    if min(map(len, prompts)) == 0:
        raise UserError("generate: a prompt has no tokens; give it at least the BOS token")
    if temperature < 0 or (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise UserError(f"generate: temperature {temperature} must be at least 0, top_k {top_k} at least 1, "
                        f"top_p {top_p} above 0 and at most 1")
    outputs = [[] for _ in prompts]
    if max_new_tokens < 1:
        return outputs
    device = llama.device
    cache = Cache(llama.config, len(prompts), llama.lm_head.weight.dtype, device)
    logits = prefill(llama, cache, prompts)                                          # (R, V)
    chance = uniforms(seed, len(prompts), max_new_tokens) if temperature > 0 else None
    rows = [Row(number, Copier(prompt, llama.habits) if draft else None) for number, prompt in enumerate(prompts)]
    while True:
        if temperature > 0:
            at = [(row.number, len(row.new) + i) for row in rows for i in range(1 + len(row.guess))]
            chosen = sample(logits, chance[tuple(zip(*at))].to(device), temperature, top_k, top_p).tolist()
        else:
            chosen = logits.max(-1).indices.tolist()  # argmax is 5 x slower on a CPU in bf16
        chosen = iter(chosen)
        for place, row in enumerate(rows):
            row.take([next(chosen) for _ in range(1 + len(row.guess))], stop_ids, max_new_tokens)
            cache.lengths[place] -= row.wrong                                        # forget the wrong guesses
            llama.tally.update(written=1 + len(row.guess) - row.wrong, copied=len(row.guess) - row.wrong)
            outputs[row.number] = row.new
        for place in reversed(range(len(rows))):  # from the end, so that a freed place is filled by a settled row
            if rows[place].finished:
                cache.move(len(rows) - 1, place)
                rows[place] = rows[-1]
                rows.pop()
        if not rows:
            return outputs
        least = 0.05 if len(rows) == 1 else 0.5  # one row alone leaves the device idle: wrong guesses cost it little
        for row in rows if draft else ():
            row.guess = row.copier.guess(min(draft, max_new_tokens - len(row.new) - 1), least)
        logits = advance(llama, cache, [[row.new[-1], *row.guess] for row in rows])


def advance(llama, cache, texts):
    """Append a few tokens per row to the cache; logits (N, V) of what follows each of them, row after row."""
    tokens, counts = [token for text in texts for token in text], list(map(len, texts))
    spare = rounded(len(tokens)) - len(tokens)  # shapes that recur
    attend = cache.append(counts, spare=spare)
    hidden = llama.hidden(torch.tensor([tokens + [0] * spare], device=llama.device), attend)[0]
    return llama.lm_head(hidden)[:len(tokens)]


def prefill(llama, cache, prompts, most=4096):
    """Put the prompts into the cache, about `most` tokens at a time, and give the logits (R, V) of what comes next.
    What all prompts begin with, an aligner's instructions, say, is computed once."""
    first, last = min(prompts), max(prompts)  # in the order of dictionaries: what these two share, all share
    shared = 0
    while shared < len(first) - 1 and first[shared] == last[shared] and len(prompts) > 1:
        shared += 1
    shared = 0 if shared < 32 else shared
    cache.grow(max(map(len, prompts)) + 1)
    if shared:
        head = torch.tensor([first[:shared]], device=llama.device)
        llama.hidden(head, cache.append([shared]))
        for row in range(1, len(prompts)):
            cache.move(0, row)
    logits, start = [], 0
    while start < len(prompts):
        end, size = start, 0
        while end < len(prompts) and (size == 0 or size + len(prompts[end]) - shared <= most):
            size, end = size + len(prompts[end]) - shared, end + 1
        counts = [len(prompt) - shared for prompt in prompts[start:end]]
        tokens = torch.tensor([[token for prompt in prompts[start:end] for token in prompt[shared:]]],
                              device=llama.device)
        hidden = llama.hidden(tokens, cache.append(counts, start))[0]                # (N, D)
        logits.append(llama.lm_head(hidden[torch.tensor(counts, device=llama.device).cumsum(0) - 1]))
        start = end
    return torch.cat(logits)


class Row:
    """A text in the making: which prompt it continues, its new tokens, and the guess that is being verified."""

    def __init__(self, number, copier):
        self.number, self.copier = number, copier
        self.new, self.guess, self.wrong, self.finished = [], [], 0, False

    def take(self, verified, stop_ids, most):
        """Add what the model itself would have written: verified[i] is its choice after the first i guessed tokens,
        and holds as long as these are its choices too. Sampled choices are drawn as without guessing, so their
        distribution is the model's (speculative sampling, arXiv 2302.01318, where the draft is a point mass)."""
        right = 0
        for token in verified:
            if token in stop_ids:
                self.finished = True
                break
            self.new.append(token)
            if right == len(self.guess) or self.guess[right] != token:
                break
            right += 1
        self.finished = self.finished or len(self.new) >= most
        self.wrong = len(self.guess) - right
        if self.copier:
            self.copier.learn(self.guess, right)
            for token in self.new[len(self.new) - right - 1:] if not self.finished else ():
                self.copier.add(token)


class Copier:
    """Guesses what comes next in a text by what followed its last two tokens earlier on: an edit is mostly its input
    (prompt lookup: Saxena 2023; here for batches). A guess ends where copying is likelier to have ended than not, which
    habits {token: (times it went on after it, times tried)} tells, for all texts of a model together: an aligner that
    drops sentences is not followed across a full stop. So nine of ten guesses come true in the embedded world, against
    one of two without, and little is lost where the device has no room to spare."""

    def __init__(self, tokens, habits):
        self.tokens, self.habits, self.after = [], habits, {}
        for token in tokens:
            self.add(token)

    def add(self, token):
        self.tokens.append(token)
        self.after.setdefault(tuple(self.tokens[-2:]), []).append(len(self.tokens))

    def guess(self, longest, least):
        """Up to `longest` tokens, as long as all of them come true with a chance of `least`."""
        def agreement(place):
            count = 2
            while count < 8 and self.tokens[place - 1 - count:place - count] == self.tokens[-1 - count:-count]:
                count += 1
            return count

        places = self.after[tuple(self.tokens[-2:])][-9:-1]                          # the last one is here
        if not places:
            return []
        place, likely, guess = max(places, key=agreement), 1.0, []
        for before, token in zip(self.tokens[place - 1:], self.tokens[place:place + longest]):
            went_on, tried = self.habits.get(before, (9, 10))
            likely *= went_on / tried
            if likely < least:
                break
            guess.append(token)
        return guess

    def learn(self, guess, right):
        """After the tokens that come before the guessed ones, copying went on `right` times, and then perhaps not."""
        for i, before in enumerate([self.tokens[-1], *guess][:min(right + 1, len(guess))]):
            went_on, tried = self.habits.get(before, (9, 10))
            self.habits[before] = (went_on + (i < right), tried + 1)


def uniforms(seed, rows, steps):
    """(rows, steps) uniform numbers, each row from a generator of its own."""
    seeds = seed if isinstance(seed, (list, tuple)) else [seed * 1_000_003 + row for row in range(rows)]
    return torch.stack([torch.rand(steps, generator=torch.Generator().manual_seed(s)) for s in seeds])


def filtered_probs(logits, temperature, top_k=None, top_p=None):
    """Probabilities (R, V) after temperature, then top-k, then top-p (the smallest set of likeliest tokens whose mass
    reaches top_p; Holtzman et al., arXiv 1904.09751), renormalised."""
    probs = (logits.float() / temperature).softmax(-1)
    if top_k is not None and top_k < probs.size(-1):
        kth = probs.topk(top_k, dim=-1).values[:, -1:]
        probs = probs.masked_fill(probs < kth, 0)
        probs = probs / probs.sum(-1, keepdim=True)
    if top_p is not None and top_p < 1:
        ordered, index = probs.sort(dim=-1, descending=True)
        before = ordered.cumsum(-1) - ordered                                        # mass of the likelier ones
        probs = torch.zeros_like(probs).scatter(-1, index, ordered.masked_fill(before >= top_p, 0))
        probs = probs / probs.sum(-1, keepdim=True)
    return probs


def sample(logits, chance, temperature, top_k=None, top_p=None):
    """One token per row (R,) by inverting the cumulative distribution at `chance` (R,), uniform in [0, 1)."""
    cumulative = filtered_probs(logits, temperature, top_k, top_p).double().cumsum(-1)
    point = chance.double()[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, point, right=True)[:, 0].clamp(max=logits.size(-1) - 1)


# ----------------------------------------------------------------------------------------------------------------
# Low-rank adapters (LoRA: Hu et al., arXiv 2106.09685), in the format of `peft`


class LoraLinear(nn.Linear):
    """A frozen linear layer with K adapters side by side: row b of x (B, T, in) goes through W + scale * B_k A_k, with
    k = b, or through the only adapter there is. Starts as the layer it replaces, whose weights it takes over."""

    def __init__(self, linear, rank, scale, count=1):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.scale = linear.in_features, linear.out_features, scale
        self.weight, self.bias = linear.weight, linear.bias
        where = dict(device=linear.weight.device, dtype=torch.float32)
        self.lora_A = nn.Parameter(torch.zeros(count, rank, self.in_features, **where))
        self.lora_B = nn.Parameter(torch.zeros(count, self.out_features, rank, **where))

    def forward(self, x):
        low = x @ self.lora_A.transpose(1, 2).to(x.dtype)                            # (B, T, rank)
        up = (self.scale * self.lora_B.transpose(1, 2)).to(x.dtype)                  # (K, rank, out)
        return torch.baddbmm(F.linear(x, self.weight, self.bias), low, up.expand(len(x), -1, -1))

    def merged(self):
        """The same function as a plain layer."""
        linear = nn.utils.skip_init(nn.Linear, self.in_features, self.out_features, self.bias is not None, device="meta")
        change = self.scale * self.lora_B[0] @ self.lora_A[0]
        linear.weight = nn.Parameter((self.weight.float() + change).to(self.weight.dtype).detach())
        linear.bias = self.bias
        return linear


def add_lora(llama, rank, base, alpha=None, seed=0):
    """Freeze a Llama and give each of its projections an adapter to train, A random and B zero; a scalar head is trained
    too. base: the folder that holds the frozen weights; alpha (default 2 * rank) over rank is the adapters' scale."""
    alpha, generator = alpha or 2 * rank, torch.Generator().manual_seed(seed)
    llama.adapter = {"r": rank, "lora_alpha": alpha, "base_model_name_or_path": str(base)}
    for name, parameter in llama.named_parameters():
        parameter.requires_grad_(name == "score.weight")
    for name, linear in projections(llama):
        layer = LoraLinear(linear, rank, alpha / rank)
        layer.lora_A.data.copy_(torch.randn(layer.lora_A.shape, generator=generator) * linear.in_features ** -0.5)
        replace(llama, name, layer)
    return llama


def projections(llama):
    """(name, layer) of every linear layer of the blocks."""
    return [(name, module) for name, module in llama.named_modules()
            if isinstance(module, nn.Linear) and name.startswith("model.layers.")]


def replace(llama, name, layer):
    parent, _, leaf = name.rpartition(".")
    setattr(llama.get_submodule(parent), leaf, layer)


def merge_lora(llama):
    """Turn a Llama with one adapter into a plain one that computes the same."""
    for name, layer in projections(llama):
        if isinstance(layer, LoraLinear):
            replace(llama, name, layer.merged())
    llama.adapter = {}
    return llama.requires_grad_(True)


def load_adapters(llama, folders):
    """Put adapters side by side on one Llama: row k of what it computes from then on is adapter k's. They may differ
    in rank and in the layers that they change."""
    read = [read_adapter(folder) for folder in folders]
    known = dict(projections(llama))
    for name in sorted({name for layers, _, _ in read for name in layers}):
        if name not in known:
            raise UserError(f"{folders[0]}: has an adapter for {name}, which its base lacks; is it for this model?")
        rank = max(len(layers[name][0]) for layers, _, _ in read if name in layers)
        layer = LoraLinear(known[name], rank, 1.0, len(read))
        for k, (layers, scale, _) in enumerate(read):
            a, b = layers.get(name, (layer.lora_A[k, :0], layer.lora_B[k, :, :0]))
            if a.size(1) != layer.in_features or b.size(0) != layer.out_features:
                raise UserError(f"{folders[k]}: the adapter of {name} does not fit the base's {known[name]}; is it for "
                                "this model?")
            layer.lora_A.data[k, :len(a)] = a
            layer.lora_B.data[k, :, :len(a)] = scale * b
        replace(llama, name, layer)
    heads = [head for _, _, head in read if head is not None]
    if heads and len(heads) == len(read) and llama.config.num_labels:
        llama.score = nn.Linear(llama.config.hidden_size, len(heads), bias=False, device=llama.device)
        llama.score.weight = nn.Parameter(torch.cat(heads).to(llama.device))
    return llama


def is_adapter(folder):
    return (Path(folder) / "adapter_config.json").exists()


def adapter_config(folder):
    path = Path(folder) / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read as LoRA's configuration ({first_line(error)}); copy it again")
    neutral = {"peft_type": ("LORA",), "use_dora": (False,), "bias": ("none",), "fan_in_fan_out": (False,),
               "rank_pattern": ({},), "alpha_pattern": ({},), "lora_bias": (False,)}
    wrong = [f"{key} = {config[key]!r}" for key, values in neutral.items() if config.get(key) not in (None, *values)]
    if wrong:
        raise UserError(f"{path}: asks for what model.py does not compute: {'; '.join(wrong)}; use plain LoRA")
    return config, alpha / (rank ** 0.5 if config.get("use_rslora") else rank)


def base_of(folder):
    """The folder of the model that an adapter belongs to: as its configuration says, or beside the adapter."""
    named = str(adapter_config(folder)[0].get("base_model_name_or_path") or "")
    places = [Path(named), Path(folder).parent / named, Path(folder).parent / Path(named).name]
    found = next((place for place in places if named and (place / "config.json").exists()), None)
    if found is None:
        raise UserError(f"{folder}/adapter_config.json: base_model_name_or_path {named!r} is no folder here; put the "
                        "base model there")
    return found


def read_adapter(folder):
    """({layer: (A (r, in), B (out, r))}, scale, the scalar head (1, D) or None) of a folder in PEFT's format."""
    _, scale = adapter_config(folder)
    path = Path(folder) / "adapter_model.safetensors"
    if not path.exists():
        raise UserError(f"{path}: not found; an adapter is that file and adapter_config.json")
    shapes, read = open_weights(path)
    layers, head, other = {}, None, []
    for key in shapes:
        name, _, part = key.removeprefix("base_model.model.").partition(".lora_")
        if part in ("A.weight", "B.weight"):
            layers.setdefault(name, {})[part[0]] = read(key).float()
        elif name == "score.weight":
            head = read(key).float()
        else:
            other.append(key)
    if other or not all(set(pair) == {"A", "B"} for pair in layers.values()):
        raise UserError(f"{path}: holds more than LoRA of projections and a scalar head: {', '.join(other[:5])}")
    return {name: (pair["A"], pair["B"]) for name, pair in layers.items()}, scale, head


def save_adapter(llama, folder):
    from safetensors.torch import save_file
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    layers = [(name, layer) for name, layer in projections(llama) if isinstance(layer, LoraLinear)]
    weights = {f"base_model.model.{name}.lora_{part}.weight": getattr(layer, f"lora_{part}").detach()[0].contiguous()
               for name, layer in layers for part in "AB"}
    scorer = bool(llama.config.num_labels)
    if scorer:
        weights["base_model.model.score.weight"] = llama.score.weight.detach()
    config = {"peft_type": "LORA", "task_type": "SEQ_CLS" if scorer else "CAUSAL_LM", **llama.adapter,
              "target_modules": sorted({name.rpartition(".")[2] for name, _ in layers}), "lora_dropout": 0.0,
              "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
              "modules_to_save": ["score"] if scorer else None}
    write_whole(folder / "adapter_model.safetensors",
                lambda path: save_file(weights, path, metadata={"format": "pt"}))
    write_whole(folder / "adapter_config.json",
                lambda path: path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8"))


# ----------------------------------------------------------------------------------------------------------------
# Checkpoints in Hugging Face's layout


def checkpoint_files(folder):
    """The weight files of a folder: [path, ...], the safetensors ones where both kinds exist."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give a Hugging Face Llama folder or one that train.py wrote")
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / f"{name}.index.json").exists():
            index = folder / f"{name}.index.json"
            try:
                files = [folder / f for f in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
            except (ValueError, KeyError, AttributeError, TypeError):
                raise UserError(f"{index}: no 'weight_map' can be read from it; copy the checkpoint again")
            absent = [f.name for f in files if not f.exists()]
            if absent:
                raise UserError(f"{folder}: shards missing: {', '.join(absent)} (named in {index.name})")
            return files
        if (folder / name).exists():
            return [folder / name]
    raise UserError(f"{folder}: no checkpoint here (neither model.safetensors nor pytorch_model*.bin)")


def map_weights(path):
    """(shapes {name: shape}, read(name) -> tensor) of one file, mapped from disk."""
    if path.suffix == ".safetensors":
        from safetensors import safe_open
        file = safe_open(path, "pt")
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}, file.get_tensor
    tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}, tensors.__getitem__


def open_weights(path):
    """(shapes, read) as of map_weights. What has been read of a mapping counts as memory for as long as it is mapped,
    so the file is mapped afresh after each 1/25 of it; each time costs, so not for every tensor."""
    try:
        shapes, get = map_weights(path)
    except Exception as error:  # safetensors, pickle, zip and OS errors, all meaning the same to the user
        raise UserError(f"{path}: not a readable checkpoint ({first_line(error)}); copy or convert it again")
    fresh = path.stat().st_size // 25

    def read(name):
        nonlocal get, fresh
        if fresh < 0:
            get, fresh = None, path.stat().st_size // 25
            get = map_weights(path)[1]
        tensor = get(name)
        fresh -= tensor.nbytes
        return tensor
    return shapes, read


def first_line(error):
    return (str(error).splitlines() or [type(error).__name__])[0]


def load_checkpoint(folder, dtype, device, scorer=False):
    folder = Path(folder)
    files = checkpoint_files(folder)
    config = Config.read(folder / "config.json")
    if config.num_labels and not scorer:
        raise UserError(f"{folder}: is a preference model, which writes no words; give a language model")
    fresh = scorer and not config.num_labels
    config.num_labels = config.num_labels or int(scorer)
    with torch.device("meta"):
        llama = Llama(config)
    wanted = {name: tuple(parameter.shape) for name, parameter in llama.named_parameters()}
    found = {}
    for path in files:
        shapes, read = open_weights(path)
        found.update({name: (shape, read) for name, shape in shapes.items()})
    ignorable = ("rotary_emb.inv_freq",) + (("lm_head.weight",) if config.tie_word_embeddings or fresh else ())
    if fresh:
        found["score.weight"] = wanted["score.weight"], lambda _: torch.zeros(wanted["score.weight"])
    problems = [f"missing {name}" for name in wanted if name not in found]
    problems += [f"unexpected {name}" for name in found if name not in wanted and not name.endswith(ignorable)]
    problems += [f"{name} is {found[name][0]}, config.json says {shape}" for name, shape in wanted.items()
                 if name in found and found[name][0] != shape]
    if problems:
        raise UserError(f"{folder}: weights do not fit config.json: {'; '.join(problems[:20])}"
                        + (f"; and {len(problems) - 20} more" if len(problems) > 20 else ""))
    # Largest first: while one is copied, it is held twice, and then little else has been loaded yet.
    for name in sorted(wanted, key=lambda name: -math.prod(wanted[name])):
        module, _, leaf = name.rpartition(".")
        tensor = found[name][1](name).to(device=device, dtype=dtype, copy=True)
        setattr(llama.get_submodule(module), leaf, nn.Parameter(tensor))
    llama.tie()
    return llama


def save_checkpoint(llama, folder):
    from safetensors import SafetensorError
    from safetensors.torch import save_file
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: parameter.detach().contiguous() for name, parameter in llama.named_parameters()}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
              "torch_dtype": str(llama.model.embed_tokens.weight.dtype).removeprefix("torch."),
              **dataclasses.asdict(llama.config)}
    if labels := config.pop("num_labels"):  # transformers reads the score at the last token that is not padding
        config.update(architectures=["LlamaForSequenceClassification"], pad_token_id=llama.config.bos_token_id,
                      id2label={str(i): f"LABEL_{i}" for i in range(labels)},
                      label2id={f"LABEL_{i}": i for i in range(labels)})

    def write_weights(path):
        try:
            save_file(weights, path, metadata={"format": "pt"})
        except SafetensorError as error:  # a full disk, too
            raise UserError(f"{folder}: cannot write the weights ({error}); is the disk full?")

    def write_config(path):
        Path(path).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_whole(folder / "model.safetensors", write_weights)
    write_whole(folder / "config.json", write_config)


def load_tokenizer(folder, llama=None):
    """The folder's tokenizer.json as a tokenizers.Tokenizer; UserError when it has ids that the embedding lacks."""
    from tokenizers import Tokenizer
    path = Path(folder) / "tokenizer.json"
    if not path.exists():
        raise UserError(f"{path}: not found; copy the model's tokenizer.json there")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception
        raise UserError(f"{path}: cannot be read as a tokenizer ({first_line(error)}); copy it again")
    if llama is not None:
        highest = max(tokenizer.get_vocab().values())
        if highest >= llama.config.vocab_size:
            raise UserError(f"{path}: has token id {highest}, but the embedding of {folder} ends at "
                            f"{llama.config.vocab_size - 1}; use the tokenizer that belongs to the weights")
    return tokenizer
