"""A pretended GPU, so that a machine without one can run the tests marked `cuda`: python -m pytest -p pretend -m cuda

Its tensors say that they are on a device of their own; their numbers lie in CPU tensors, and are computed there. What a
GPU refuses is refused: to mix its tensors with a CPU's, to be read without a copy. It says nothing about speed, memory
or kernels. In this process, in the project's files and its tests, "cuda" means this device: their text is changed as
they are imported.
"""
import importlib.abc
import importlib.machinery
import sys
from pathlib import Path

import safetensors.torch
import torch
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

ROOT = Path(__file__).parents[1]
aten = torch.ops.aten


class Module(_DummyBackendModule):
    """What torch.cuda is to a GPU."""

    def is_available(self):
        return True

    def is_bf16_supported(self, including_emulation=True):
        return True

    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]

    def synchronize(self, device=None):
        pass

    def max_memory_allocated(self, device=None):
        return 2**30


_setup_privateuseone_for_python_backend("gpu", Module())
torch.__future__.set_swap_module_params_on_conversion(True)  # tied weights stay tied; their numbers go with them
DEVICE = torch.device("gpu", 0)


class Pretended(torch.Tensor):
    """A tensor of the device; `raw` holds its numbers."""

    @staticmethod
    def __new__(cls, raw):
        return torch.Tensor._make_wrapper_subclass(cls, raw.size(), strides=raw.stride(), dtype=raw.dtype,
                                                   device=DEVICE, storage_offset=raw.storage_offset())

    def __init__(self, raw):
        self.raw = raw

    def __repr__(self, **_):
        return f"Pretended({self.raw})"

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, operation, _types, given=(), named=None):
        return compute(operation, given, named or {})


# ----------------------------------------------------------------------------------------------------------------
# Operations

COPIES = aten._to_copy.default, aten.copy_.default
INDEXED = aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default


def mapped(kind, function, found):
    """The same, lists and dicts of it too, with function(x) for each x of a kind."""
    if isinstance(found, kind):
        return function(found)
    if isinstance(found, (list, tuple)):
        return type(found)(mapped(kind, function, x) for x in found)
    if isinstance(found, dict):
        return {name: mapped(kind, function, x) for name, x in found.items()}
    return found


def compute(operation, given, named):
    """What every operation on the device's tensors goes through."""
    tensors = []
    mapped(torch.Tensor, tensors.append, (given, *named.values()))
    ours = [x for x in tensors if isinstance(x, Pretended)]
    to = torch.device(named["device"]) if named.get("device") is not None else None
    check(operation, given, named, tensors, bool(ours) if to is None else to.type == "gpu")
    plain, plain_named = mapped(Pretended, lambda x: x.raw, (given, named))
    if to is not None:
        plain_named["device"] = "cpu"
    plain_named.pop("pin_memory", None)
    found = operation(*plain, **plain_named)
    if operation is aten.copy_.default:
        return given[0]
    if operation is aten._local_scalar_dense.default or to is not None and to.type == "cpu":
        return found
    known = {id(x.raw): x for x in ours}                       # what is computed in place is the tensor that it was
    return mapped(torch.Tensor, lambda x: known[id(x)] if id(x) in known else wrapped(x, ours), found)


def wrapped(x, ours):
    """A result; a view of what was made outside of inference mode is no inference tensor either."""
    if ours and x.untyped_storage()._cdata == ours[0].raw.untyped_storage()._cdata and not ours[0].is_inference():
        with torch.inference_mode(False):
            return Pretended(x)
    return Pretended(x)


def check(operation, given, named, tensors, here):
    """RuntimeError for what a GPU refuses. A number in a CPU's tensor is no mixture, nor is an index on a CPU."""
    allowed = [id(x) for x in given[1] if x is not None] if operation in INDEXED else []
    alien = [x for x in tensors if not isinstance(x, Pretended) and x.dim() and id(x) not in allowed]
    if here and alien and operation not in COPIES:
        raise RuntimeError(f"{operation}: expected all tensors to be on the same device, found gpu and cpu")
    generator = named.get("generator")
    if generator is not None and (generator._cdata in Generator.ours) != here:
        raise RuntimeError(f"{operation}: the generator is on another device")


def made(operation):
    def make(*given, **named):
        return compute(operation, given, {**named, "device": DEVICE})
    return make


library, fallback, cast = (torch.library.Library(name, "IMPL") for name in ("aten", "_", "aten"))
fallback.fallback(lambda operation, *given, **named: compute(operation, given, named), "PrivateUse1")
library.impl("empty.memory_format", made(aten.empty.memory_format), "PrivateUse1")
library.impl("empty_strided", made(aten.empty_strided.default), "PrivateUse1")


# ----------------------------------------------------------------------------------------------------------------
# Autocast: which operations a GPU computes in bf16, and which in fp32, of those that occur here

fallback.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")


AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)


def autocast(operation, low):
    def run(*given, **named):
        dtype = torch.get_autocast_dtype("gpu") if low else torch.float32
        with torch._C._ExcludeDispatchKeyGuard(AUTOCAST):
            def rounded(x):
                return x.to(dtype) if x.is_floating_point() and x.device.type == "gpu" else x
            given, named = mapped(torch.Tensor, rounded, (given, named))
            return operation(*given, **named)
    return run


for name in ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "scaled_dot_product_attention"):
    cast.impl(name, autocast(getattr(aten, name).default, True), "AutocastPrivateUse1")
for name, overload in (("softmax", "int"), ("log_softmax", "int"), ("nll_loss", "default"), ("exp", "default"),
                       ("log", "default"), ("rsqrt", "default"), ("cumsum", "default"), ("sum", "dim_IntList")):
    full = name if overload == "default" else f"{name}.{overload}"
    cast.impl(full, autocast(getattr(getattr(aten, name), overload), False), "AutocastPrivateUse1")


# ----------------------------------------------------------------------------------------------------------------
# Ways into and out of the device that pass no operation

plain_tensor, plain_list, plain_save, plain_safe = torch.tensor, torch.Tensor.tolist, torch.save, \
    safetensors.torch.save_file


def tensor(values, *given, device=None, **named):
    return plain_tensor(values, *given, **named).to(device or "cpu")


def as_tensor(values, *given, **named):
    return values if isinstance(values, torch.Tensor) and not (given or named) else tensor(values, *given, **named)


def tolist(x):
    return plain_list(x.cpu() if x.device.type == "gpu" else x)


def on_cpu(found):
    return mapped(torch.Tensor, lambda x: x.detach().cpu(), found)


class Generator(torch.Generator):
    """Every generator draws on a CPU; those of the device, `ours`, draw for its tensors alone."""
    ours = {}

    def __new__(cls, device="cpu"):
        found = super().__new__(cls, "cpu")
        if torch.device(device).type == "gpu":
            cls.ours[found._cdata] = found
        return found


torch.tensor, torch.as_tensor, torch.Tensor.tolist, torch.Generator = tensor, as_tensor, tolist, Generator
torch.save = lambda found, *given, **named: plain_save(on_cpu(found), *given, **named)
safetensors.torch.save_file = lambda found, *given, **named: plain_safe(on_cpu(found), *given, **named)


# ----------------------------------------------------------------------------------------------------------------
# The project's files, read as if this device were CUDA's


class Translated(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname):
        text = Path(self.path).read_text(encoding="utf-8")
        return compile(text.replace('"cuda"', '"gpu"').replace("torch.cuda.", "torch.gpu."), self.path, "exec")


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        for folder in (ROOT, ROOT / "tests"):
            file = folder / f"{name}.py"
            if file.exists():
                return importlib.util.spec_from_file_location(name, file, loader=Translated(name, str(file)))
        return None


sys.meta_path.insert(0, Finder())
