"""Low-rank adapters (LoRA: Hu et al., arXiv 2106.09685): a frozen model, and beside each of its projections a small one
that is trained.

             x  (B, T, in)
          ___|________
         |            |
    W  (out, in)   A  (r, in)      r is small, so A and B together are small
    frozen, maybe     |
    in bf16        B  (out, r)     starts as zero: at first nothing is changed
         |            |  times alpha / r
         |_____ + ____|
               |
             y  (B, T, out)

Several adapters can stand side by side on one model: row k of a batch then goes through the k-th (MORLAIF's preference
models share a backbone so). Files in the format of `peft` are checkpoint.py's business.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from common import UserError


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
        sizes, bias = (self.in_features, self.out_features), self.bias is not None
        linear = nn.utils.skip_init(nn.Linear, *sizes, bias, device="meta")
        change = self.scale * self.lora_B[0] @ self.lora_A[0]
        linear.weight = nn.Parameter((self.weight.float() + change).to(self.weight.dtype).detach())
        linear.bias = self.bias
        return linear


def projections(llama):
    """(name, layer) of every linear layer of the blocks."""
    return [(name, module) for name, module in llama.named_modules()
            if isinstance(module, nn.Linear) and name.startswith("model.layers.")]


def replace(llama, name, layer):
    parent, _, leaf = name.rpartition(".")
    setattr(llama.get_submodule(parent), leaf, layer)


def add_lora(llama, rank, base, alpha=None, seed=0):
    """Freeze a Llama and give each of its projections an adapter to train, A random and B zero; a scalar head is
    trained too, in fp32. base: the folder with the frozen weights; alpha (default 2 * rank) over rank is the scale."""
    alpha, generator = alpha or 2 * rank, torch.Generator().manual_seed(seed)
    llama.adapter = {"r": rank, "lora_alpha": alpha, "base_model_name_or_path": str(base)}
    llama.requires_grad_(False)
    if llama.config.num_labels:
        llama.score.float().requires_grad_(True)  # bf16 would round small steps away
    for name, linear in projections(llama):
        layer = LoraLinear(linear, rank, alpha / rank)
        layer.lora_A.data.copy_(torch.randn(layer.lora_A.shape, generator=generator) * linear.in_features ** -0.5)
        replace(llama, name, layer)
    return llama


def merge_lora(llama):
    """Turn a Llama with one adapter into a plain one that computes the same."""
    for name, layer in projections(llama):
        if isinstance(layer, LoraLinear):
            replace(llama, name, layer.merged())
    llama.adapter = {}
    return llama.requires_grad_(True)


@dataclass
class Adapter:
    """What a folder holds: for some projections A (r, in) and B (out, r), and perhaps a scalar head (1, D)."""
    folder: object
    layers: dict
    scale: float
    head: torch.Tensor | None = None


def put_side_by_side(llama, adapters):
    """Put Adapters on one Llama: row k of what it computes from then on is adapter k's. They may differ in rank and in
    the layers that they change."""
    known = dict(projections(llama))
    for name in sorted({name for adapter in adapters for name in adapter.layers}):
        if name not in known:
            raise UserError(f"{adapters[0].folder}: has an adapter for {name}, which its base lacks; is it for this "
                            "model?")
        rank = max(len(adapter.layers[name][0]) for adapter in adapters if name in adapter.layers)
        layer = LoraLinear(known[name], rank, 1.0, len(adapters))
        for k, adapter in enumerate(adapters):
            a, b = adapter.layers.get(name, (layer.lora_A[k, :0], layer.lora_B[k, :, :0]))
            if a.size(1) != layer.in_features or b.size(0) != layer.out_features:
                raise UserError(f"{adapter.folder}: the adapter of {name} does not fit the base's {known[name]}; is it "
                                "for this model?")
            layer.lora_A.data[k, :len(a)] = a
            layer.lora_B.data[k, :, :len(a)] = adapter.scale * b
        replace(llama, name, layer)
    for adapter in adapters:
        head = (1, llama.config.hidden_size) if llama.config.num_labels else None
        if adapter.head is not None and adapter.head.shape != head:
            raise UserError(f"{adapter.folder}: its scalar head does not fit the base; is it for this model?")
    heads = [adapter.head for adapter in adapters if adapter.head is not None]
    if heads and len(heads) == len(adapters):
        llama.score = nn.Linear(llama.config.hidden_size, len(heads), bias=False, device=llama.device)
        llama.score.weight = nn.Parameter(torch.cat(heads).to(llama.device))
    return llama
