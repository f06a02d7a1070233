"""Folders of models: Hugging Face's (config.json, safetensors or .bin weights, tokenizer.json) and PEFT's adapters.

`load` and `save` are what the rest of the project uses. Nothing that is read here can run code, and what asks for
mathematics that model.py does not compute is refused by name.
"""
import dataclasses
import json
import math
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import nn

from common import UserError, digest, file_digest, first_line, write_text, write_whole
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


def read_config(path):
    """Read a config.json; UserError names every key whose value asks for mathematics that is not here."""
    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            raise ValueError("it holds no object")
    except FileNotFoundError:
        raise UserError(f"{path}: not found; --model takes a folder with config.json, weights, "
                        "tokenizer.json") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a JSON object ({first_line(error)}); copy it again") from error
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
# Weights


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
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise UserError(f"{index}: no 'weight_map' can be read from it; copy the checkpoint again") from error
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
        raise UserError(f"{path}: not a readable checkpoint ({first_line(error)}); copy or convert it "
                        "again") from error
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


def save_weights(llama, folder):
    """As `save`, of a model without adapters."""
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
    write_tensors(folder / "model.safetensors", weights)
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    for name in (*ADAPTER, CONTEXT):  # which would be loaded instead
        (folder / name).unlink(missing_ok=True)


def write_tensors(path, weights):
    """Write {name: tensor} as safetensors, whole or not at all."""
    def write(aside):
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
    except Exception as error:  # tokenizers raises plain Exception
        raise UserError(f"{path}: cannot be read as a tokenizer ({first_line(error)}); copy it again") from error
    if llama is not None:
        highest = max(tokenizer.get_vocab().values())
        if highest >= llama.config.vocab_size:
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
    return digest([(path.name, file_digest(path) if path.exists() else None) for path in files])


def weights_digest(llama):
    """A checksum (text) of a model's parameters in memory, on any device: their names, shapes and bytes."""
    def checksum(parameter):
        return zlib.crc32(parameter.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest([(name, list(parameter.shape), checksum(parameter)) for name, parameter in llama.named_parameters()])


# ----------------------------------------------------------------------------------------------------------------
# Adapters in PEFT's format


ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
CONTEXT = "context.json"  # beside an adapter, {"max_position_embeddings"}: it may be longer than its base's


def adapts_scorer(folder):
    return adapter_config(folder)[0].get("task_type") == "SEQ_CLS"


def is_adapter(folder):
    return (Path(folder) / "adapter_config.json").exists()


def adapter_config(folder):
    path = Path(folder) / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read as LoRA's configuration ({first_line(error)}); copy it "
                        "again") from error
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
    """The Adapter in a folder in PEFT's format."""
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
    return Adapter(folder, {name: (pair["A"], pair["B"]) for name, pair in layers.items()}, scale, head)


def load_adapters(llama, folders):
    """Put the adapters of folders side by side on one Llama; its context becomes the longest of theirs."""
    for path in (Path(folder) / CONTEXT for folder in folders):
        if path.exists():
            try:
                longest = int(json.loads(path.read_text())["max_position_embeddings"])
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path}: says no max_position_embeddings; delete it, or copy it again") from error
            llama.config.max_position_embeddings = max(llama.config.max_position_embeddings, longest)
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
    write_text(folder / CONTEXT, json.dumps({"max_position_embeddings": llama.config.max_position_embeddings}) + "\n")
    write_text(folder / "adapter_config.json", json.dumps(config, indent=2) + "\n")


def merge(folder):
    """Turn the adapter in a folder into a whole model there."""
    save(load(folder, scorer=adapts_scorer(folder)), folder)
