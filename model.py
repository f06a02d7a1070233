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
import functools
import inspect
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
        self.frequencies = self.frequencies.to(x.device)
        angles = attend.positions[..., None].float() * self.frequencies              # (B, T, E/2)
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


def compile_blocks(llama):
    """Fuse the arithmetic of each block (torch.compile). Where there is no compiler, the blocks run as they are. How the
    cache is attended to changes with each pass, so that is left as it is."""
    import torch._dynamo
    torch._dynamo.config.suppress_errors = True
    Cache.__call__ = torch.compiler.disable(Cache.__call__)
    for block in llama.model.layers:
        block.compile(dynamic=True)


def prepack(llama):
    """Lay out a bf16 model's weights on a CPU as its matrix products want them, once instead of in each pass: they are
    then 2 x as fast for one token, 1.4 x for 16, 1.2 x for 64, with the same results. For inference only: weights of
    blocks exist in that layout alone. Elsewhere, and where this PyTorch cannot, the model stays as it is."""
    reorder = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
    fits = llama.device.type == "cpu" and llama.lm_head.weight.dtype == torch.bfloat16 and computes_bf16("cpu")
    if not fits or reorder is None:
        return
    with torch.inference_mode():
        for name, linear in [*projections(llama), ("lm_head", llama.lm_head)]:
            packed = reorder(linear.weight.detach(), None)
            linear.forward = functools.partial(packed_product, packed=packed, bias=linear.bias)
            if name != "lm_head":
                linear.weight = None


def packed_product(x, packed, bias):
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


# ----------------------------------------------------------------------------------------------------------------
# Three ways of attending. Each takes q (B, T, H, E), k and v (B, T, G, E) and gives (B, T, H, E).


def sdpa(q, k, v, **options):
    """Scaled dot-product attention on (B, T, heads, E) layouts; G < H key/value heads are shared, not copied."""
    y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
                                       enable_gqa=bool(q.size(2) != k.size(2)), **options)
    return y.transpose(1, 2)


def causal_attention(q, k, v):
    """Causal attention of documents laid out as rows: q (R, T, H, E), k and v (R, T, G, E), gives (R, T, H, E). On a
    CPU in bf16 and for up to 1,024 tokens, the definition written out trains about twice as fast as PyTorch's kernel.
    The H/G query heads that share keys are rows of one matrix product: a step 6 to 10 % faster than with copied keys."""
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
    no padding anywhere but inside the attention itself, where each document is laid out as a row of its own, padded on
    the right to its group's longest. Causality hides that padding, so no mask is needed and the fast kernels apply.
    On a GPU in bf16, PyTorch's kernel for documents of different lengths does without the padding."""

    def __init__(self, lengths, device):
        self.lengths, kind = torch.as_tensor(lengths).tolist(), torch.device(device).type
        self.positions = places_of(self.lengths)[1][None].to(device, non_blocking=True)
        self.groups = groups_of(self.lengths, device, apart=kind == "cpu")
        self.starts = F.pad(torch.tensor(self.lengths).cumsum(0), (1, 0)).to(device, torch.int32, non_blocking=True)
        self.kernel = varlen_kernel() if kind == "cuda" else None

    def __call__(self, layer, q, k, v):
        if self.kernel and len(q) == 1 and q.dtype in (torch.bfloat16, torch.float16) and q.size(-1) % 8 == 0:
            return self.kernel(q[0], k[0], v[0], self.starts, max(self.lengths))[None]
        y = []
        for start, end, places, shape in self.groups:
            rows = [as_rows(x[:, start:end], places, shape) for x in (q, k, v)]
            y.append(as_one(causal_attention(*rows), places, len(q)))
        return y[0] if len(y) == 1 else torch.cat(y, dim=1)


@functools.cache
def varlen_kernel():
    """PyTorch's causal attention of documents one after another, as a function of q (N, H, E), k and v (N, G, E), starts
    (documents + 1,) and the longest document's length; None where PyTorch is older."""
    try:
        from torch.nn.attention.varlen import varlen_attn
        known = inspect.signature(varlen_attn).parameters
    except ImportError:
        return None
    if "window_size" not in known:
        return None
    shared = {"enable_gqa": True} if "enable_gqa" in known else {}  # before there was that flag, none was needed

    def attend(q, k, v, starts, longest):
        options = shared if q.size(1) != k.size(1) else {}
        return varlen_attn(q, k, v, starts, starts, longest, longest, window_size=(-1, 0), **options)
    return attend


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
            places = (document * wide[first] + position).to(device, non_blocking=True)
            groups.append((start, end, places, (last - first, wide[first])))
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
    """Keys and values of texts in the making, left-aligned: row r holds the first lengths[r] tokens of its text. Each
    forward pass appends to them, to one row more than to another, and what is appended attends to what is there.

    The rows stand on shelves, tensors (layers, 2, rows, G, room, E). On a CPU a shelf has 16 rows and is as long as its
    own longest, so that attention reads little more than there is; on a GPU there is one. Room is made for many tokens
    at a time: what is read is then one whole block, which kernels like, and their shapes seldom change."""

    def __init__(self, config, rows, dtype, device):
        self.static = torch.device(device).type == "cuda"  # shapes and places in memory that stay, for CUDA graphs
        self.width, self.step = (rows, 512) if self.static else (16, 64)
        self.graphs, self.kept = {}, {}
        layers, groups, size = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
        self.shelves = [torch.zeros(layers, 2, min(self.width, rows - first), groups, 0, size, dtype=dtype, device=device)
                        for first in range(0, rows, self.width)]
        self.lengths, self.device = [0] * rows, torch.device(device)

    def grow(self, shelf, length):
        """Make room for rows of `length` tokens on a shelf."""
        more = -(-length // self.step) * self.step - self.shelves[shelf].size(4)
        if more > 0:
            self.shelves[shelf] = F.pad(self.shelves[shelf], (0, 0, 0, more))

    def take(self, row, length):
        """A copy of a row's first tokens: (layers, 2, G, length, E)."""
        return self.shelves[row // self.width][:, :, row % self.width, :, :length].clone()

    def put(self, row, taken):
        """Make what was taken the whole text of a row."""
        shelf, self.lengths[row] = row // self.width, taken.size(3)
        self.grow(shelf, taken.size(3))
        self.shelves[shelf][:, :, row % self.width, :, :taken.size(3)] = taken

    def move(self, source, target):
        """Copy row `source` over row `target` (a finished row's place is taken by the last one)."""
        if source != target:
            self.put(target, self.take(source, self.lengths[source]))

    def place(self, name, tensor):
        """A tensor on the device; where places are fixed, in that of the last one of this name and shape."""
        if not self.fixed:
            return tensor.to(self.device)
        if (name, tensor.shape) not in self.kept:
            self.kept[name, tensor.shape] = torch.empty_like(tensor, device=self.device)
        return self.kept[name, tensor.shape].copy_(tensor, non_blocking=True)

    def append(self, counts, first=0, spare=0, fixed=False):
        """Prepare for counts[r] further tokens of row first + r, one row's after another's; and for spare ones behind
        the last row's, which attend to nothing and are not kept. fixed: what is prepared stays in its place, for a
        recorded pass to read."""
        self.fixed = fixed
        before, end = self.lengths[first:first + len(counts)], first + len(counts)
        row, offset = places_of([*counts[:-1], counts[-1] + spare])
        position = torch.tensor(before)[row] + offset
        self.positions = self.place("positions", position[None])
        self.lengths[first:end] = [length + count for length, count in zip(before, counts)]
        self.writes, groups, start = [], [], 0
        for shelf in range(first // self.width, -(-end // self.width)):
            a, b = max(0, shelf * self.width - first), min(len(counts), (shelf + 1) * self.width - first)
            more = spare if b == len(counts) else 0
            self.grow(shelf, max(self.lengths[first + a:first + b]) + more)
            new = slice(start, start := start + sum(counts[a:b]) + more)
            on_shelf = first + row[new] - shelf * self.width
            self.writes.append((shelf, new, self.place("rows", on_shelf)))
            groups.append(((shelf, first - shelf * self.width), a, b))
        self.prefill = None if any(before) else Packed(counts, self.device)
        if not self.prefill:
            self.divide(groups, torch.tensor(before), torch.tensor(counts), len(row))
        return self

    def divide(self, groups, before, counts, tokens):
        """Attention of new tokens to those in the cache, in parts: (shelf, slice of its rows, what is added to the
        scores to hide (R, 1, C, L)). `which` says where the parts' queries come from, `back` where their results go.
        The number of rows is rounded, since kernels are chosen, and on a CPU built, for each new shape."""
        self.parts, which, starts = [], [], counts.cumsum(0) - counts
        back = torch.zeros(tokens, dtype=torch.long)
        for shelf, a, b, start, end in [piece for group in groups for piece in self.pieces(counts, *group)]:
            last = torch.minimum(torch.arange(start, end), counts[a:b, None] - 1)    # too short: its last token again
            seen = before[a:b, None] + last                                          # (R, C): the last one it sees
            low, (*_, size, _, room, _) = shelf[1] + a, self.shelves[shelf[0]].shape
            rows = slice(low, min(low + rounded(b - a), size))
            length = min(room, -(-int(seen.max() + 1) // self.step) * self.step)
            hide = torch.zeros(rows.stop - low, 1, end - start, length, dtype=self.shelves[0].dtype)
            hide[:b - a, 0].masked_fill_(torch.arange(length) > seen[..., None], float("-inf"))
            token, done = starts[a:b, None] + last, sum(map(len, which))             # (R, C)
            back[token] = torch.arange(done, done + token.numel()).view(token.shape)
            which.append(F.pad(token, (0, 0, 0, len(hide) - len(token))).flatten())
            self.parts.append((shelf[0], rows, self.place("hide", hide)))
        self.sizes = list(map(len, which))
        self.which = self.place("which", torch.cat(which))
        self.back = self.place("back", back)

    def pieces(self, counts, shelf, a, b):
        """Which new tokens of a shelf's rows a to b attend together: [(shelf, first row, end, first token, end), ...].
        All rows, padded to the one that has most; on a CPU, where that is mostly padding, the rows' first tokens
        together and further ones row by row; and long texts 128 tokens at a time, which read no further than they see."""
        most, total = int(counts[a:b].max()), int(counts[a:b].sum())
        if self.static or most <= 16 and total * 2 > (b - a) * most:
            return [(shelf, a, b, 0, rounded(most))]
        first = [] if most > 16 else [(shelf, a, b, 0, 1)]
        return first + [(shelf, i, i + 1, start, min(start + 128, int(counts[i]))) for i in range(a, b)
                        for start in range(len(first), int(counts[i]), 128)]

    def __call__(self, layer, q, k, v):
        new = torch.stack((k[0], v[0]), 1).to(self.shelves[0].dtype)                 # (N, 2, G, E)
        for shelf, tokens, row in self.writes:
            self.shelves[shelf][layer][:, row, :, self.positions[0, tokens]] = new[tokens]
        if self.prefill:
            return self.prefill(layer, q, k, v)
        asking = (q[0] * q.size(-1) ** -0.5).to(new.dtype).index_select(0, self.which).split(self.sizes)
        with torch.autocast(self.device.type, enabled=False):
            y = [cached_attention(x, *self.shelves[shelf][layer][:, rows, :, :hide.size(3)], hide)
                 for x, (shelf, rows, hide) in zip(asking, self.parts)]
        return torch.cat(y).index_select(0, self.back)[None]                         # (1, N, H, E)


def cached_attention(q, k, v, hide):
    """Attention of new tokens q (R * C, H, E), scaled, to k, v (R, G, L, E), what is hidden being -inf in hide
    (R, 1, C, L); gives (R * C, H, E). The H/G query heads that share keys are rows of one matrix product with them.
    Written out, because PyTorch's kernels are slow for a few queries: on a CPU in bf16, 5 to 7 x."""
    (rows, _, new, _), (_, heads, size), groups = hide.shape, q.shape, k.size(1)
    q = q.view(rows, new, groups, -1, size).permute(0, 2, 3, 1, 4).flatten(2, 3)     # (R, G, H/G * C, E)
    scores = (q @ k.transpose(2, 3)).view(rows, heads, new, -1).add_(hide)
    y = scores.softmax(-1).view(rows, groups, -1, k.size(2)) @ v                     # (R, G, H/G * C, E)
    return y.view(rows, heads, new, size).transpose(1, 2).flatten(0, 1)


# ----------------------------------------------------------------------------------------------------------------
# Log-probabilities: every loss is made of these


KEEP = 2**25  # logits, in number: up to so many are kept for the backward pass (about 300 MB), more are recomputed


def token_logprobs(llama, tokens, lengths, targets, chunk=512, hidden=None):
    """Log-probability of the chosen tokens, each given the tokens of its document before it.

    tokens (N,): documents packed one after another, of `lengths`; targets (K,): the places of the tokens to score, never
    a document's first. Gives (K,) in fp32. Logits exist for the chosen tokens only, `chunk` rows
    at a time; where they are more than KEEP, they are computed again in the backward pass rather than kept. hidden
    (N, D): the final hidden states, where they are known already."""
    if hidden is None:
        hidden = llama.hidden(tokens[None], Packed(lengths, tokens.device))[0]       # (N, D)
    hidden, wanted = hidden.index_select(0, targets - 1), tokens[targets]            # the token before predicts

    def score(rows, ids):
        return -F.cross_entropy(llama.lm_head(rows).float(), ids, reduction="none")

    again = torch.is_grad_enabled() and len(targets) * llama.config.vocab_size > KEEP
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


def generate(llama, prompts, max_new_tokens, **how):
    """Continue all prompts together; gives the list of new token ids per prompt. The rest is as for `stream`."""
    outputs = [[] for _ in prompts]
    for number, new in stream(llama, prompts, max_new_tokens, len(prompts), **how):
        outputs[number] = new
    return outputs


@torch.inference_mode()
def stream(llama, prompts, max_new_tokens, rows, temperature=0.0, top_k=None, top_p=None, stop_ids=(), seed=0, draft=0):
    """Continue each prompt, `rows` of them at a time, the next one taking the place of one that has finished; yields
    (number of the prompt, its new token ids without the stop token) as they finish.

    prompts: lists of token ids, of any lengths (at least 1). temperature 0 is greedy. seed: an int, or one per prompt;
    what a prompt's continuation is depends on its own seed and not on its neighbours in the batch. draft: up to so many
    tokens per step and row are guessed from the text before (see Copier) and verified in the same forward pass; this
    changes how long it takes, not what is written.
    """
    refuse(prompts, temperature, top_k, top_p)
    waiting, live, logits = list(range(len(prompts))) if max_new_tokens > 0 else [], [], []
    chance = uniforms(seed, len(prompts), max_new_tokens).to(llama.device) if temperature > 0 and waiting else None
    choose = functools.partial(choice, chance=chance, temperature=temperature, top_k=top_k, top_p=top_p)
    rows = min(rows, len(waiting))
    cache = Cache(llama.config, rows, compute_dtype(llama.lm_head.weight), llama.device)
    head = shared_start(llama, cache, prompts) if len(waiting) > 1 else None
    ahead = AHEAD if cache.static and not draft else 1
    while waiting or live:
        free = rows - len(live)
        if waiting and free >= rows / 8:
            numbers, waiting = waiting[:free], waiting[free:]
            logits.append(prefill(llama, cache, [prompts[number] for number in numbers], len(live), head))  # (R, V)
            live += [Row(number, Copier(prompts[number], llama.habits) if draft else None) for number in numbers]
        tokens = [choose(torch.cat(logits), live)]                                   # (N,)
        for step in range(1, ahead):
            tokens.append(choose(advance(llama, cache, tokens[-1][:, None]), live, step))
        tokens = iter(torch.stack(tokens, 1).flatten().tolist())                     # here the host waits for a GPU
        for place, row in enumerate(live):
            row.take([next(tokens) for _ in range(ahead + len(row.guess))], stop_ids, max_new_tokens)
            cache.lengths[place] -= row.wrong                                        # forget the wrong guesses
            llama.tally.update(written=1 + row.right, copied=row.right if draft else 0)
        for place in reversed(range(len(live))):  # from the end, so that a freed place is filled by a settled row
            if live[place].finished:
                yield live[place].number, live[place].new
                cache.move(len(live) - 1, place)
                live[place] = live[-1]
                live.pop()
        for row in live if draft else ():
            row.guess = row.copier.guess(min(draft, max_new_tokens - len(row.new) - 1), alone=len(live) == 1)
        logits = [advance(llama, cache, [[row.new[-1], *row.guess] for row in live])] if live else []


AHEAD = 8  # tokens per row that a GPU decodes before the host looks at them, where none are guessed


def refuse(prompts, temperature, top_k, top_p):
    if min(map(len, prompts), default=1) == 0:
        raise UserError("generate: a prompt has no tokens; give it at least the BOS token")
    if temperature < 0 or (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise UserError(f"generate: temperature {temperature} must be at least 0, top_k {top_k} at least 1, "
                        f"top_p {top_p} above 0 and at most 1")


def choice(logits, live, step=0, *, chance, temperature, top_k, top_p):
    """The next tokens (N,) by logits (N, V), `step` tokens after those that the rows know of."""
    if temperature == 0:
        return logits.max(-1).indices  # argmax is 5 x slower on a CPU in bf16
    at = [(row.number, min(len(row.new) + step + i, chance.size(1) - 1))
          for row in live for i in range(1 + len(row.guess))]
    number, place = torch.tensor(at).T.to(logits.device, non_blocking=True)
    return sample(logits, chance[number, place], temperature, top_k, top_p)


def advance(llama, cache, texts):
    """Append a few tokens per row to the cache, texts being lists, or a tensor (R, C); logits (N, V) of what follows
    each of them, row after row. The shapes are made to recur: on a CPU, which builds a kernel for each new one, by spare
    tokens at the end; on a GPU, which then replays the whole pass, by making all rows equally long."""
    counts, before = [len(text) for text in texts], cache.lengths[:]
    total = sum(counts)
    if cache.static:
        rows, width = min(rounded(len(counts)), len(before)), rounded(max(counts))
        if not torch.is_tensor(texts):
            texts = torch.tensor([text + [0] * (width - len(text)) for text in texts])
        attend = cache.append([width] * rows, fixed=True)
        tokens = cache.place("tokens", F.pad(texts, (0, 0, 0, rows - len(texts))).view(1, -1))
    else:
        spare = rounded(total) - total
        tokens = torch.tensor([[token for text in texts for token in text] + [0] * spare])
        attend = cache.append(counts, spare=spare)

    def forward():
        return llama.lm_head(llama.hidden(tokens, attend)[0])
    if not cache.static:
        return forward()[:total]
    cache.lengths = [length + count for length, count in zip(before, counts)] + before[len(counts):]
    logits = replayed(cache.graphs, (tokens.shape, attend.shelves[0].shape, attend.parts[0][2].shape), forward)
    if len(logits) == total:
        return logits
    real = [row * width + i for row, count in enumerate(counts) for i in range(count)]
    return logits[torch.tensor(real).to(cache.device, non_blocking=True)]


def replayed(graphs, key, forward):
    """forward(); on a GPU recorded when it is called for the third time with a key, and from then on replayed: one call
    for the host instead of thousands. What it reads must stay in its place, what it returns holds until the next."""
    calls, replay, output = graphs.get(key, (0, None, None))
    if replay is None and calls < 2:
        graphs[key] = calls + 1, None, None
        return forward()
    if replay is None:
        replay, output = record(forward)
        graphs[key] = calls, replay, output
    replay()
    return output


def record(forward):
    """(a function that does what forward() did, the tensor where it leaves the result)."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = forward()
    return graph.replay, output


def shared_start(llama, cache, prompts):
    """The keys and values of what all prompts begin with, an aligner's instructions, say; None if that is short."""
    first, last = min(prompts), max(prompts)  # in the order of dictionaries: what these two share, all share
    shared = len(os.path.commonprefix([first[:-1], last])) // 32 * 32
    if not shared:
        return None
    llama.hidden(torch.tensor([first[:shared]], device=llama.device), cache.append([shared]))
    return cache.take(0, shared)


def prefill(llama, cache, prompts, first=0, head=None, most=4096):
    """Put prompts into the cache's rows from `first` on, about `most` tokens at a time; logits (R, V) of what comes
    next. What is known already is not computed again: the head, which all begin with, and prompts that come again."""
    numbers = {}
    for prompt in prompts:
        numbers.setdefault(tuple(prompt), len(numbers))
    known, texts, logits, start = 0 if head is None else head.size(3), list(numbers), [], 0
    for row in range(first, first + len(texts)):
        cache.lengths[row] = 0
        cache.grow(row // cache.width, len(texts[row - first]) + 1)
        if known:
            cache.put(row, head)
    while start < len(texts):
        end, size = start, 0
        while end < len(texts) and (size == 0 or size + len(texts[end]) - known <= most):
            size, end = size + len(texts[end]) - known, end + 1
        counts = [len(text) - known for text in texts[start:end]]
        tokens = torch.tensor([[token for text in texts[start:end] for token in text[known:]]], device=llama.device)
        hidden = llama.hidden(tokens, cache.append(counts, first + start))[0]        # (N, D)
        logits.append(llama.lm_head(hidden[torch.tensor(counts, device=llama.device).cumsum(0) - 1]))
        start = end
    places = [numbers[tuple(prompt)] for prompt in prompts]
    for row, place in reversed(list(enumerate(places))):  # from the end: a place is copied before it is written over
        cache.move(first + place, first + row)
    return torch.cat(logits)[places]


class Row:
    """A text in the making: which prompt it continues, its new tokens, and the guess that is being verified."""

    def __init__(self, number, copier):
        self.number, self.copier = number, copier
        self.new, self.guess, self.right, self.wrong, self.finished = [], [], 0, 0, False

    def take(self, verified, stop_ids, most):
        """Add what the model itself would have written: verified[i] is its choice after the first i guessed tokens (or,
        without guesses, after its own), and holds as long as these are its choices too. Sampled choices are drawn as
        without guessing, so their distribution is the model's (speculative sampling, arXiv 2302.01318, where the draft
        is a point mass)."""
        guess, self.right = self.guess or verified[:-1], 0
        for token in verified:
            if token in stop_ids:
                self.finished = True
                break
            self.new.append(token)
            if self.right == len(guess) or guess[self.right] != token or len(self.new) == most:
                break
            self.right += 1
        self.finished = self.finished or len(self.new) == most
        self.wrong = len(guess) - self.right
        if self.copier:
            self.copier.learn(self.guess, self.right)
            for token in self.new[len(self.new) - self.right - 1:] if not self.finished else ():
                self.copier.add(token)


class Copier:
    """Guesses what comes next in a text by what followed its last tokens, eight to two, when they last stood there: an
    edit is mostly its input (prompt lookup: Saxena 2023; here for batches). A guess ends where copying is likelier to
    have ended than not, which habits {token: (times it went on after it, times tried)} tells, for all texts of a model
    together: an aligner that drops sentences is not followed across a full stop. So nine of ten guesses come true in the embedded world, against
    one of two without, and little is lost where the device has no room to spare."""

    worth = 1.5  # tokens that a guess must be expected to win, among rows that keep the device busy

    def __init__(self, tokens, habits):
        self.tokens, self.habits = list(tokens), habits
        self.after = {n: dict(zip(zip(*(tokens[i:] for i in range(n))), range(n, len(tokens)))) for n in (8, 4, 3, 2)}

    def add(self, token):
        for n, after in self.after.items():
            after[tuple(self.tokens[-n:])] = len(self.tokens)
        self.tokens.append(token)

    def guess(self, longest, alone):
        """Up to `longest` tokens, as long as all of them are likely to come true; none where little is expected of them.
        A row alone leaves the device idle, so that wrong guesses cost it little, and it guesses more boldly."""
        least, worth = (0.05, 0.0) if alone else (0.5, self.worth)
        places = (after.get(tuple(self.tokens[-n:])) for n, after in self.after.items())
        place = next(filter(None, places), len(self.tokens))
        likely, expected, guess = 1.0, 0.0, []
        for before, token in zip(self.tokens[place - 1:], self.tokens[place:place + longest]):
            went_on, tried = self.habits.get(before, (9, 10))
            likely *= went_on / tried
            if likely < least:
                break
            expected += likely
            guess.append(token)
        return guess if expected >= worth else []

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
