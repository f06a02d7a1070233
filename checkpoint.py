"""Folders of models: Hugging Face's (config.json, safetensors or .bin weights, tokenizer.json) and PEFT's adapters.

`load` and `save` are what the rest of the project uses. Nothing that is read here can run code, and what asks for
mathematics that model.py does not compute is refused by name.
"""
import dataclasses
import json
import math
import os
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import nn

from common import UserError, digest, file_digest, first_line, write_text, write_whole
from files import kind, read_json, shorten, shown
from lora import Adapter, LoraLinear, merge_lora, projections, put_side_by_side
from model import Config, Llama, rope_type


def load(folder, dtype=torch.float32, device="cpu", scorer=False):
    """The Llama in a Hugging Face folder: model.safetensors, its shards by index, or pytorch_model*.bin; or an adapter
    in PEFT's format, which is merged into the model that it names. scorer: a model with a scalar head instead of words;
    made of a language model, its head gives zero until it is trained."""
    if not is_adapter(folder):
        return load_weights(folder, dtype, device, scorer)
    if adapts_scorer(folder) and not scorer:
        raise UserError(f"{folder}: adapts a preference model, which writes no words; give a language model")
    return merge_lora(load_adapters(load_weights(base_of(folder), dtype, device, scorer), [folder]))


def save(llama, folder):
    """Write config.json and model.safetensors, so that `transformers` loads them; each file is put in place whole, the
    configuration last. Of a model with LoRA, the adapter alone, as `peft` loads it."""
    if llama.adapter:
        save_adapter(llama, folder)
    else:
        save_weights(llama, folder)


# ----------------------------------------------------------------------------------------------------------------
# Configuration

PLAIN = "a plain Llama, Qwen2, Qwen3 or Mistral"
# What the keys of a config.json must be where they are not null: a type and, for numbers, the lowest and the highest.
# Where the mathematics sets no end, it lies far beyond any Llama's, to refuse an absurd size before memory runs out.
CONFIG = {
    "vocab_size": (int, 1, 2**24), "hidden_size": (int, 1, 2**20), "intermediate_size": (int, 1, 2**22),
    "num_hidden_layers": (int, 1, 512), "num_attention_heads": (int, 1, 2**12), "num_key_value_heads": (int, 1, 2**12),
    "head_dim": (int, 2, 2**12), "max_position_embeddings": (int, 1, 2**31), "rms_norm_eps": (float, 1e-30, 0.1),
    "rope_theta": (float, 1, 1e12), "rope_scaling": (dict,), "rope_parameters": (dict,), "attention_bias": (bool,),
    "mlp_bias": (bool,), "tie_word_embeddings": (bool,), "architectures": (list,), "id2label": (dict,),
    "num_labels": (int, 0, 2**12), "sliding_window": (int, 1, 2**31), "use_sliding_window": (bool,),
    "max_window_layers": (int, 0, 2**12), "layer_types": (list,),
}
NEEDED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
TURNS = (float, 1e-3, 1e6)
ROPE = {  # rope_type -> the same for the numbers that it needs
    "default": {}, "linear": {"factor": (float, 0.01, 1e6)},
    "llama3": {"factor": (float, 0.01, 1e6), "low_freq_factor": TURNS, "high_freq_factor": TURNS,
               "original_max_position_embeddings": (float, 1, 2**31)},
}
# model_type -> the keys that not every architecture has, and numbers whose default is not Config's, each with what
# transformers takes it for where it is absent.
QWEN2 = {"num_key_value_heads": 32, "max_position_embeddings": 32768, "bos_token_id": None, "eos_token_id": None,
         "sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 28, "layer_types": None}
ARCHITECTURES = {
    "llama": {"attention_bias": False, "mlp_bias": False},
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    "qwen2": QWEN2,
    "qwen3": QWEN2 | {"head_dim": 128, "attention_bias": False},
}
# Keys that change the network's mathematics, each with the values that leave it as written in model.py; those above,
# of the architecture at hand, are read instead.
NEUTRAL = {
    "model_type": tuple(ARCHITECTURES), "hidden_act": ("silu",), "attention_dropout": (0,), "sliding_window": (),
    "use_sliding_window": (False,), "attention_bias": (False,), "mlp_bias": (False,), "use_mrope": (False,),
    "mrope_section": (), "partial_rotary_factor": (1,), "rope_interleaved": (False,), "quantization_config": (),
    "num_local_experts": (0, 1), "attn_logit_softcapping": (), "final_logit_softcapping": (), "use_qk_norm": (False,),
    "embedding_multiplier": (1,), "residual_multiplier": (1,), "logits_scaling": (1,), "no_rope_layers": ([],),
}


def read_object(path):
    """The object in a JSON file; UserError where there is none."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds {kind(value)}, not an object; copy it again")
    return value


def check(values, rules, needed, where):
    """UserError, naming each of values {key: value} that is not as rules {key: (type, lowest, highest)} say. null is as
    if absent. needed: the keys that must be there. where: the file, and the place in it."""
    wrong = [f"{key} is missing" for key in needed if values.get(key) is None]
    for key, (wanted, *ends) in rules.items():
        value = values.get(key)
        if wanted in (int, float):  # true is an int to Python; NaN is in no range
            fits = type(value) in (int, wanted) and ends[0] <= value <= ends[1]
            words = f"a {'whole ' if wanted is int else ''}number from {ends[0]} to {ends[1]}"
        else:
            fits, words = isinstance(value, wanted), kind(wanted())
        if value is not None and not fits:
            wrong.append(f"{key} is {shown(value)}, not {words}")
    if wrong:
        raise UserError(f"{where}: {'; '.join(wrong)}; mend it, or copy it again")


def refuse_other_mathematics(values, neutral, where, plain):
    """UserError, naming each of values {key: value} that is not among those that change nothing."""
    wrong = [f"{key} = {shown(value)}" for key, value in values.items()
             if key in neutral and value is not None and value not in neutral[key]]
    if wrong:
        raise UserError(f"{where}: asks for what model.py does not compute: {'; '.join(wrong)}; use {plain}")


def window_of(raw, path):
    """Of a Qwen's keys, {"sliding_window", "layer_types"}: both None where no layer has a window."""
    first, layers, kinds = raw.get("max_window_layers", 0), raw["num_hidden_layers"], raw.get("layer_types")
    if kinds is None:
        kinds = ["sliding_attention" if layer >= first else "full_attention" for layer in range(layers)]
    if len(kinds) != layers or any(each not in ("sliding_attention", "full_attention") for each in kinds):
        raise UserError(f"{path}: layer_types is {shorten(kinds)}, not sliding_attention or full_attention for each of "
                        f"the {layers} layers; mend it, or copy it again")
    window = raw.get("sliding_window") if raw.get("use_sliding_window") and "sliding_attention" in kinds else None
    return {"sliding_window": window, "layer_types": kinds if window else None}


def read_config(path):
    """The Config in a config.json; UserError names every key that is missing, wrong or asks for other mathematics."""
    if not Path(path).exists():
        raise UserError(f"{path}: not found; --model takes a folder with config.json, weights, tokenizer.json")
    none = ("bos_token_id", "eos_token_id")  # where null says that there is none; elsewhere it is as if absent
    raw = read_object(path)
    family = str(raw.get("model_type") or "llama")
    own = ARCHITECTURES.get(family, {})
    raw = {key: value for key, value in (own | raw).items() if value is not None or key in none}
    refuse_other_mathematics(raw, {key: NEUTRAL[key] for key in NEUTRAL if key not in own}, path, PLAIN)
    rope = raw.get("rope_parameters")  # of transformers 5, theta and scaling in one object
    if isinstance(rope, dict) and rope.get("rope_theta") is not None:
        raw["rope_theta"] = rope["rope_theta"]
    check(raw, CONFIG, NEEDED, path)
    scaling = {key: value for key, value in (raw.get("rope_scaling") or rope or {}).items() if value is not None}
    types = {"rope_type": list(ROPE), "type": list(ROPE)}
    for place in (rope or {}, scaling):
        refuse_other_mathematics(place, NEUTRAL | types, path, PLAIN)
    if "factor" in scaling and not {"rope_type", "type"} & scaling.keys():
        raise UserError(f'{path}: rope_scaling has a factor but no type; add "rope_type": "linear" or "llama3"')
    scaled, numbers = rope_type(scaling), ROPE[rope_type(scaling)]
    check(scaling, numbers, numbers, f"{path}: rope_scaling")
    values = {"rms_norm_eps": 1e-6} | {key: raw[key] for key in vars(Config()) if key in raw}
    values["rope_scaling"] = {"rope_type": scaled} | {key: scaling[key] for key in numbers} if numbers else None
    if "use_sliding_window" in own:
        values |= window_of(raw, path)
    if f"{family.capitalize()}ForSequenceClassification" in raw.get("architectures", ()):
        values["num_labels"] = raw.get("num_labels") or len(raw.get("id2label") or (0, 1))
    try:
        config = Config(**values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    ids = (int, 0, config.vocab_size - 1)
    for token in config.stop_ids:
        check({"eos_token_id": token}, {"eos_token_id": ids}, ["eos_token_id"], path)
    check({"bos_token_id": config.bos_token_id}, {"bos_token_id": ids}, (), path)
    return config


# ----------------------------------------------------------------------------------------------------------------
# Weights


def checkpoint_files(folder):
    """The weight files of a folder: [path, ...], the safetensors ones where both kinds exist."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give a folder of Hugging Face's, or one that train.py wrote")
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if index.exists():
            shards, present = read_object(index).get("weight_map"), [path.name for path in folder.iterdir()]
            if not isinstance(shards, dict) or not shards:
                raise UserError(f"{index}: no 'weight_map' can be read from it; copy the checkpoint again")
            absent = {file if isinstance(file, str) else shown(file) for file in shards.values() if file not in present}
            if absent:  # a path that leads out of the folder, too
                raise UserError(f"{folder}: shards missing: {shorten(sorted(absent))} (named in {index.name})")
            return [folder / file for file in sorted(set(shards.values()))]
        if (folder / name).exists():
            return [folder / name]
    raise UserError(f"{folder}: no checkpoint here (neither model.safetensors nor pytorch_model*.bin)")


def map_weights(path):
    """(shapes {name: shape}, read(name) -> tensor) of one file, mapped from disk. ValueError where it holds anything
    else than tensors of floats: quantised weights are not the numbers that they stand for."""
    if path.suffix == ".safetensors":
        file = safe_open(path, "pt")
        parts, read = {name: file.get_slice(name) for name in file.keys()}, file.get_tensor
        shapes = {name: tuple(part.get_shape()) for name, part in parts.items()
                  if part.get_dtype() in ("F64", "F32", "F16", "BF16")}
    else:
        parts = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        shapes, read = {name: tuple(part.shape) for name, part in parts.items() if is_plain(part)}, parts.__getitem__
    odd = [name for name in parts if name not in shapes or not isinstance(name, str)]
    if odd:
        raise ValueError(f"{shown(odd[0])} in it is no tensor of 16, 32 or 64-bit floats")
    return shapes, read


def is_plain(part):
    """Whether it is a tensor of floats, all of which are in memory or in a file that is mapped to it."""
    return (isinstance(part, torch.Tensor) and part.layout == torch.strided and part.device.type == "cpu"
            and part.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16))


def open_weights(path):
    """(shapes, read) as of map_weights. What has been read of a mapping counts as memory for as long as it is mapped,
    so the file is mapped afresh after each 1/25 of it; each time costs, so not for every tensor."""
    try:
        shapes, get = map_weights(path)
    except Exception as error:  # safetensors, pickle, zip and OS errors, all meaning the same to the user
        raise UserError(f"{path}: not a readable checkpoint ({first_line(error)}); copy or convert it") from error
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


def load_weights(folder, dtype, device, scorer):
    """As `load`, of a folder that holds whole weights."""
    folder = Path(folder)
    files = checkpoint_files(folder)
    config = read_config(folder / "config.json")
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
        found.setdefault("score.weight", (wanted["score.weight"], lambda _: torch.zeros(wanted["score.weight"])))
    problems = [f"missing {name}" for name in wanted if name not in found]
    problems += [f"unexpected {name}" for name in found if name not in wanted and not name.endswith(ignorable)]
    problems += [f"{name} is {found[name][0]}, config.json says {shape}" for name, shape in wanted.items()
                 if name in found and found[name][0] != shape]
    if problems:
        raise UserError(f"{folder}: weights do not fit config.json: {'; '.join(problems[:20])}"
                        + (f"; and {len(problems) - 20} more" if len(problems) > 20 else ""))
    if config.tie_word_embeddings and not config.num_labels and "lm_head.weight" in found:
        head, words = (found[name][1](name) for name in ("lm_head.weight", "model.embed_tokens.weight"))
        if head.dtype != words.dtype or not torch.equal(head, words):
            raise UserError(f"{folder}: config.json has tie_word_embeddings, but lm_head.weight is not the embedding; "
                            "set it to false, or remove the tensor")
    # Largest first: while one is copied, it is held twice, and then little else has been loaded yet.
    for name in sorted(wanted, key=lambda name: -math.prod(wanted[name])):
        module, _, leaf = name.rpartition(".")
        tensor = found[name][1](name).to(device=device, dtype=dtype, copy=True)
        setattr(llama.get_submodule(module), leaf, nn.Parameter(tensor))
    llama.tie()
    return llama


def save_weights(llama, folder):
    """As `save`, of a model without adapters."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: parameter.detach().contiguous() for name, parameter in llama.named_parameters()}
    name, own = llama.config.model_type.capitalize(), ARCHITECTURES[llama.config.model_type]
    config = {"architectures": [f"{name}ForCausalLM"], "hidden_act": "silu",
              "torch_dtype": str(llama.model.embed_tokens.weight.dtype).removeprefix("torch."),
              **dataclasses.asdict(llama.config), "use_sliding_window": llama.config.sliding_window is not None}
    for key in {"attention_bias", "mlp_bias", "sliding_window", "use_sliding_window", "layer_types"} - own.keys():
        del config[key]
    if labels := config.pop("num_labels"):  # transformers reads the score at the last token that is not padding
        config.update(architectures=[f"{name}ForSequenceClassification"], pad_token_id=padding_id(llama.config),
                      id2label={str(i): f"LABEL_{i}" for i in range(labels)},
                      label2id={f"LABEL_{i}": i for i in range(labels)})
    write_tensors(folder / "model.safetensors", weights)
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    for other in (*(folder / name for name in (*ADAPTER, CONTEXT)), *folder.glob("*.index.json")):
        other.unlink(missing_ok=True)  # it would be loaded instead


def padding_id(config):
    """The token id that a preference model's texts are padded with for transformers, which reads a score at the last
    token that is not this one: so none that ends a text. None where nothing ends a text, and each may be its last."""
    if config.bos_token_id is not None and config.bos_token_id not in config.stop_ids:
        return config.bos_token_id
    return next((i for i in range(config.vocab_size) if i not in config.stop_ids), None) if config.stop_ids else None


def write_tensors(path, weights):
    """Write {name: tensor} as safetensors, whole or not at all."""
    def write(aside):
        for left in aside.parent.glob(".tmp??????"):  # by safetensors, when it was killed while it wrote
            left.unlink()
        try:
            save_file(weights, aside, metadata={"format": "pt"})
        except SafetensorError as error:  # a full disk, too
            raise UserError(f"{path.parent}: cannot write the weights ({error}); is the disk full?") from error
    write_whole(path, write)


def load_tokenizer(folder, llama=None):
    """The folder's tokenizer.json as a tokenizers.Tokenizer; UserError when it has ids that the embedding lacks."""
    path = Path(folder) / "tokenizer.json"
    if not path.exists():
        raise UserError(f"{path}: not found; copy the model's tokenizer.json there")
    try:
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.no_padding()
        tokenizer.post_processor = None  # adds BOS and the like, which we do (data.encode_documents)
        tokenizer.encode("1 \u00b0 \u6f22\U0001f642\n", add_special_tokens=False)  # fails without an unknown token
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # tokenizers raises plain Exception, or panics, which is no Exception
        raise UserError(f"{path}: cannot be read as a tokenizer ({first_line(error)}); copy it again") from error
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest < 0:
        raise UserError(f"{path}: has no tokens; copy the model's tokenizer.json there")
    if llama is not None and highest >= llama.config.vocab_size:
        raise UserError(f"{path}: has token id {highest}, but the embedding of {folder} ends at "
                        f"{llama.config.vocab_size - 1}; use the tokenizer that belongs to the weights")
    return tokenizer


# ----------------------------------------------------------------------------------------------------------------
# What a model is, in a few letters: where these are equal, so is what the models compute


def fingerprint(folder):
    """A checksum (text) of the files in a model's folder that decide what it computes, wherever the folder is: weights,
    configuration, tokenizer and a preference model's normalisation; of an adapter, those of its base too."""
    folder = Path(folder)
    whole, adapter = (base_of(folder), (*ADAPTER, CONTEXT)) if is_adapter(folder) else (folder, ())
    files = [whole / "config.json", *checkpoint_files(whole), *(folder / name for name in adapter),
             *(place / name for place in (whole, folder) for name in ("tokenizer.json", "principle.json"))]
    return digest([(path.name, file_digest(path) if path.is_file() else None) for path in files])


def weights_digest(llama):
    """A checksum (text) of a model's parameters in memory, on any device: their names, shapes and bytes."""
    def checksum(parameter):
        return zlib.crc32(parameter.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest([(name, list(parameter.shape), checksum(parameter)) for name, parameter in llama.named_parameters()])


# ----------------------------------------------------------------------------------------------------------------
# Adapters in PEFT's format


ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
CONTEXT = "context.json"  # beside an adapter: max_position_embeddings, which may be more than its base's; its "base",
                          # as of `glance`; and "path", from the adapter's folder to it


def adapts_scorer(folder):
    return adapter_config(folder)[0].get("task_type") == "SEQ_CLS"


def is_adapter(folder):
    return (Path(folder) / "adapter_config.json").exists()


ADAPTER_CONFIG = {"r": (int, 1, 2**16), "lora_alpha": (float, 0, 1e6), "use_rslora": (bool,),
                  "base_model_name_or_path": (str,)}
PLAIN_LORA = {  # as NEUTRAL, of adapter_config.json
    "peft_type": ("LORA",), "task_type": ("CAUSAL_LM", "SEQ_CLS"), "use_dora": (False,), "bias": ("none",),
    "fan_in_fan_out": (False,), "rank_pattern": ({},), "alpha_pattern": ({},), "lora_bias": (False,),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),  # others change the base's weights
    "layer_replication": (), "alora_invocation_tokens": (), "use_qalora": (False,),
}


def adapter_config(folder):
    """(what adapter_config.json holds, the scale of the adapter's products)."""
    path = Path(folder) / "adapter_config.json"
    config = read_object(path)
    check(config, ADAPTER_CONFIG, ("r", "lora_alpha"), path)
    refuse_other_mathematics(config, PLAIN_LORA, path, "plain LoRA")
    return config, config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])


def base_of(folder):
    """The folder of the model that an adapter belongs to: as its configuration says, from the working directory (as
    `peft` reads it) or from beside the adapter; or as context.json does, so that both can be moved. Where we made it,
    that also tells one model from another of that name."""
    named = adapter_config(folder)[0].get("base_model_name_or_path") or ""
    own = read_object(Path(folder) / CONTEXT) if (Path(folder) / CONTEXT).exists() else {}
    places = [Path(named), Path(folder).parent / named, Path(folder).parent / Path(named).name,
              *(Path(folder) / path for path in [str(own.get("path"))] if Path(path).name == Path(named).name)]
    try:
        places = [place for place in places if named and (place / "config.json").exists()]
    except OSError:  # a name longer than any file's
        places = []
    if not places:
        raise UserError(f"{folder}/adapter_config.json: base_model_name_or_path {shown(named)} is no folder here; put "
                        "the base model there")
    found = [place for place in places if own.get("base") in (None, glance(place))]
    if not found:
        raise UserError(f"{folder}: adapts another model than the one that is now in {places[0]}; put that there again")
    return found[0]


def glance(folder):
    """A checksum (text) of a model's configuration, and of the beginning, middle and end of its weight files: other
    models have another, and to make it takes no time. (`fingerprint` reads every byte.)"""
    parts = [file_digest(Path(folder) / "config.json")]
    for path in checkpoint_files(folder):
        size = path.stat().st_size
        with open(path, "rb") as file:
            for place in (0, size // 2, size - 2**16):
                file.seek(max(place, 0))
                parts.append(zlib.crc32(file.read(2**16)))
    return digest(parts)


def check_folder(out, folders):
    """UserError where the folder `out`, which a model is to be written to, is that of a model in use: one of `folders`,
    or the base of an adapter in one."""
    for folder in folders:
        used = [folder, *([base_of(folder)] if is_adapter(folder) else [])]
        if Path(out).resolve() in [Path(place).resolve() for place in used]:
            raise UserError(f"{out}: is a model to start from, or that another needs; choose another --out")


def read_adapter(folder):
    """The Adapter in a folder in PEFT's format."""
    config, scale = adapter_config(folder)
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
    if other or not shapes:
        raise UserError(f"{path}: should hold LoRA of projections and a scalar head alone, but holds "
                        f"{shorten(other) or 'nothing'}; copy it again")
    odd = [name for name, pair in layers.items() if not pairs_up(config["r"], **pair)]
    if odd:
        raise UserError(f"{path}: has no A and B of rank {config['r']} (r in adapter_config.json) for {shorten(odd)}; "
                        "copy it again")
    return Adapter(folder, {name: (pair["A"], pair["B"]) for name, pair in layers.items()}, scale, head)


def pairs_up(rank, A=None, B=None):
    """Whether there are A (rank, in) and B (out, rank)."""
    return A is not None and B is not None and A.dim() == B.dim() == 2 and len(A) == B.size(1) == rank


def load_adapters(llama, folders):
    """Put the adapters of folders side by side on one Llama; its context becomes the longest of theirs."""
    for path in (Path(folder) / CONTEXT for folder in folders):
        if path.exists():
            context, key = read_object(path), "max_position_embeddings"
            check(context, {key: (int, 1, llama.config.sliding_window or 2**31)}, [key], path)
            llama.config.max_position_embeddings = max(llama.config.max_position_embeddings, context[key])
    return put_side_by_side(llama, [read_adapter(folder) for folder in folders])


def save_adapter(llama, folder):
    """As `save`, of a model with an adapter."""
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
    write_tensors(folder / "adapter_model.safetensors", weights)
    base, context = llama.adapter["base_model_name_or_path"], {}
    if (Path(base) / "config.json").exists():
        context = {"base": glance(base), "path": os.path.relpath(base, folder)}
    context["max_position_embeddings"] = llama.config.max_position_embeddings
    write_text(folder / CONTEXT, json.dumps(context) + "\n")
    write_text(folder / "adapter_config.json", json.dumps(config, indent=2) + "\n")


def merge(folder):
    """Turn the adapter in a folder into a whole model there."""
    save(load(folder, scorer=adapts_scorer(folder)), folder)
