"""checkpoint.py against transformers, real configurations, and hand-made broken folders."""
import copy
import json
import math
import os
import re
import resource
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import checkpoint
from common import UserError
from lora import add_lora
from model import Config, Llama, logits
from test_model import CONFIGS, random_tokens, tiny, weights_of

@pytest.mark.parametrize("changes", [
    {}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}, {"head_dim": 12},
    {"rope_scaling": {"type": "linear", "factor": 3.0}, "eos_token_id": [2, 3]},
    {"rope_scaling": CONFIGS["llama3"]["v4"]["rope_scaling"], "rope_theta": 100.0}], ids=str)
def test_transformers_loads_what_is_saved(tmp_path, changes):
    transformers = pytest.importorskip("transformers")
    ours = tiny(**changes)
    checkpoint.save(ours, tmp_path / "ours")
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    tokens = random_tokens(100).view(2, 50)
    with torch.no_grad():
        assert torch.allclose(logits(ours, tokens), theirs(tokens).logits, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    assert weights_equal(checkpoint.load(tmp_path / "theirs"), ours)


# ----------------------------------------------------------------------------------------------------------------
# Checkpoints


def weights_equal(one, other):
    one, other = dict(one.named_parameters()), dict(other.named_parameters())
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"attention_bias": True},
                                     {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "head_dim": 6}], ids=str)
def test_save_and_load(tmp_path, changes):
    llama = tiny(**changes)
    checkpoint.save(llama, tmp_path)
    again = checkpoint.load(tmp_path)
    assert weights_equal(llama, again) and again.config == llama.config
    tokens = random_tokens(30)[None]
    assert torch.equal(logits(llama, tokens), logits(again, tokens))
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == bool(changes.get("tie_word_embeddings"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1, "whoever may read the configuration may read the weights"


def test_bfloat16_and_where_its_angles_are_computed(tmp_path):
    """In bf16, positions beyond 256 and their angles would be coarse: `.to` must leave the frequencies alone."""
    llama = tiny()
    checkpoint.save(llama, tmp_path)
    loaded = checkpoint.load(tmp_path, dtype=torch.bfloat16)
    cast = copy.deepcopy(llama).to(torch.bfloat16)
    tokens = random_tokens(600)[None]
    found, expected = logits(loaded, tokens), logits(llama, tokens)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, logits(cast, tokens))
    error = (found.float() - expected).abs().mean() / expected.std()
    assert 0 < error < 0.03


def write_sharded(weights, folder, name, shards=3):
    """As Hugging Face does: NAME-00001-of-00003.EXT, ... and NAME.EXT.index.json."""
    names = list(weights)
    stem, _, ending = name.rpartition(".")
    where = {}
    for number in range(shards):
        file = f"{stem}-{number + 1:05}-of-{shards:05}.{ending}"
        part = {key: weights[key] for key in names[number::shards]}
        (save_file if ending == "safetensors" else torch.save)(part, folder / file)
        where |= dict.fromkeys(part, file)
    (folder / f"{name}.index.json").write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))


def checkpoint_folder(folder, llama, kind, weights=None):
    """Write `llama` (or other `weights` under its config) as one kind of checkpoint."""
    checkpoint.save(llama, folder)
    weights = weights_of(llama) if weights is None else weights
    (folder / "model.safetensors").unlink()
    if kind == "safetensors":
        save_file(weights, folder / "model.safetensors")
    elif kind == "bin":
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        write_sharded(weights, folder, {"sharded safetensors": "model.safetensors",
                                        "sharded bin": "pytorch_model.bin"}[kind])
    return folder


@pytest.mark.parametrize("kind", ["sharded safetensors", "sharded bin"])
def test_a_model_that_is_saved_over_shards_is_the_one_that_is_loaded(tmp_path, kind):
    checkpoint_folder(tmp_path, tiny(), kind)
    later = Llama(tiny().config, 2)
    checkpoint.save(later, tmp_path)
    there = weights_of(checkpoint.load(tmp_path))
    assert all(torch.equal(weight, there[name]) for name, weight in weights_of(later).items())


KINDS = ["safetensors", "bin", "sharded safetensors", "sharded bin"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_checkpoint_gives_the_same_model(tmp_path, kind):
    llama = tiny(attention_bias=True)
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}  # old checkpoints carry it
    checkpoint_folder(tmp_path, llama, kind, weights_of(llama) | extra)
    assert weights_equal(checkpoint.load(tmp_path), llama)


def test_a_tied_head_that_was_written_twice_is_tied(tmp_path):
    llama = tiny(tie_word_embeddings=True)
    weights = weights_of(llama)
    checkpoint_folder(tmp_path, llama, "bin", weights | {"lm_head.weight": weights["model.embed_tokens.weight"]})
    again = checkpoint.load(tmp_path)
    assert weights_equal(again, llama) and again.lm_head.weight is again.model.embed_tokens.weight


@pytest.mark.parametrize("kind", KINDS)
def test_many_small_tensors_load_fast(tmp_path, kind):
    llama = tiny(num_hidden_layers=33)
    assert len(weights_of(llama)) == 300
    checkpoint_folder(tmp_path, llama, kind)
    start = time.process_time()
    checkpoint.load(tmp_path)
    assert time.process_time() - start < 2


PEAK = """
import gc, os, sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
import checkpoint
def megabytes(key):
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith(key))
for warm_up in sys.argv[2:4]:
    checkpoint.load(warm_up)
for folder in sys.argv[4:]:
    if os.fork() == 0:  # a fresh account of memory for each
        gc.collect()
        open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
        before = megabytes("VmRSS")
        llama = checkpoint.load(folder)
        print(megabytes("VmHWM") - before, flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's account of memory")
def test_peak_memory_of_loading(tmp_path):
    config = Config(vocab_size=8000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=5,
                    num_attention_heads=8)
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in Llama(config).named_parameters()}
    with tempfile.TemporaryDirectory(dir=tmp_path) as top:  # not to leave gigabytes behind
        top = Path(top)
        folders = [top / name for name in ("warm.safetensors", "warm.bin", *KINDS[:2], KINDS[3])]
        for folder, kind in zip(folders, ("safetensors", "bin", *KINDS[:2], KINDS[3])):
            checkpoint_folder(folder, tiny(), kind)
        weights = {name: torch.full(shape, 0.5) for name, shape in shapes.items()}
        for folder, kind in zip(folders[2:], (*KINDS[:2], KINDS[3])):
            checkpoint_folder(folder, tiny(), kind, weights)
            (folder / "config.json").write_text(json.dumps(vars(config)))
        del weights
        command = [sys.executable, "-c", PEAK, str(Path(checkpoint.__file__).parent), *map(str, folders)]
        peaks = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    size = 4 * sum(math.prod(shape) for shape in shapes.values()) / 2**20
    assert size > 300 and len(peaks) == 3
    for kind, peak in zip((*KINDS[:2], KINDS[3]), peaks):
        assert 0.9 < float(peak) / size < 1.15, kind


# ----------------------------------------------------------------------------------------------------------------
# Real configurations, with the number of parameters that each model is published with

LLAMA1 = {"architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
          "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 11008, "max_sequence_length": 2048,
          "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32, "pad_token_id": 0,
          "rms_norm_eps": 1e-06, "torch_dtype": "float16", "transformers_version": "4.28.0.dev0", "use_cache": True,
          "vocab_size": 32000}
LLAMA2 = LLAMA1 | {"max_position_embeddings": 4096, "num_key_value_heads": 32, "pretraining_tp": 1,
                   "rms_norm_eps": 1e-05, "rope_scaling": None, "tie_word_embeddings": False}
LLAMA3 = LLAMA2 | {"attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000, "eos_token_id": 128001,
                   "intermediate_size": 14336, "max_position_embeddings": 8192, "num_key_value_heads": 8,
                   "rope_theta": 500000.0, "vocab_size": 128256, "torch_dtype": "bfloat16"}
STRETCHED = {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
             "rope_type": "llama3"}
LLAMA31 = LLAMA3 | {"eos_token_id": [128001, 128008, 128009], "max_position_embeddings": 131072, "mlp_bias": False,
                    "rope_scaling": STRETCHED}
SMOLLM2 = LLAMA3 | {"bos_token_id": 0, "eos_token_id": 0, "hidden_size": 576, "initializer_range": 0.0416666,
                    "intermediate_size": 1536, "is_llama_config": True, "num_attention_heads": 9,
                    "num_hidden_layers": 30, "num_key_value_heads": 3, "rope_interleaved": False,
                    "rope_theta": 100000, "tie_word_embeddings": True, "vocab_size": 49152,
                    "transformers_js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}}}
PUBLISHED = {
    "Llama 1 7B": (LLAMA1, 6_738_415_616, (32, 128, 10000.0, 1e-6), (2,)),
    "Llama 2 13B": (LLAMA2 | {"hidden_size": 5120, "intermediate_size": 13824, "num_attention_heads": 40,
                              "num_hidden_layers": 40, "num_key_value_heads": 40},
                    13_015_864_320, (40, 128, 10000.0, 1e-5), (2,)),
    "Llama 2 70B": (LLAMA2 | {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64,
                              "num_hidden_layers": 80, "num_key_value_heads": 8},
                    68_976_648_192, (8, 128, 10000.0, 1e-5), (2,)),
    "Llama 3 8B": (LLAMA3, 8_030_261_248, (8, 128, 500000.0, 1e-5), (128001,)),
    "Llama 3.1 8B": (LLAMA31, 8_030_261_248, (8, 128, 500000.0, 1e-5), (128001, 128008, 128009)),
    "Llama 3.2 1B": (LLAMA31 | {"eos_token_id": 128001, "head_dim": 64, "hidden_size": 2048,
                                "intermediate_size": 8192, "num_hidden_layers": 16, "tie_word_embeddings": True,
                                "rope_scaling": STRETCHED | {"factor": 32.0}},
                     1_235_814_400, (8, 64, 500000.0, 1e-5), (128001,)),
    "TinyLlama 1.1B": (LLAMA2 | {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
                                 "max_position_embeddings": 2048, "num_key_value_heads": 4, "rope_theta": 10000.0},
                       1_100_048_384, (4, 64, 10000.0, 1e-5), (2,)),
    "SmolLM2 135M": (SMOLLM2, 134_515_008, (3, 64, 100000, 1e-5), (0,)),
    "SmolLM2 1.7B": (SMOLLM2 | {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32,
                                "num_hidden_layers": 24, "num_key_value_heads": 32, "rope_theta": 130000},
                     1_711_376_384, (32, 64, 130000, 1e-5), (0,)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_real_configurations(tmp_path, name):
    raw, parameters, numbers, stops = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = checkpoint.read_config(tmp_path / "config.json")
    assert (config.num_key_value_heads, config.head_dim, config.rope_theta, config.rms_norm_eps) == numbers
    assert config.stop_ids == stops and config.rope_scaling == raw.get("rope_scaling")
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in Llama(config).parameters()) == parameters


def test_what_an_absent_key_means(tmp_path):
    """The defaults are those of Hugging Face, whose eps (1e-6) is not that of a model from scratch here."""
    needed = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
    (tmp_path / "config.json").write_text(json.dumps({key: LLAMA1[key] for key in needed}))
    config = checkpoint.read_config(tmp_path / "config.json")
    assert (config.rms_norm_eps, config.rope_theta, config.tie_word_embeddings) == (1e-6, 10000.0, False)
    assert (config.num_key_value_heads, config.head_dim, config.stop_ids) == (32, 128, (2,))
    nulls = dict.fromkeys([*vars(config), *checkpoint.CONFIG, *checkpoint.NEUTRAL, "torch_dtype"])
    others = {"pad_token_id": -1, "type": "x", "factor": 2.0}  # which mean nothing there
    (tmp_path / "config.json").write_text(json.dumps(nulls | others | {key: LLAMA1[key] for key in needed}))
    none = vars(config) | {"bos_token_id": None, "eos_token_id": None}
    assert vars(checkpoint.read_config(tmp_path / "config.json")) == none and checkpoint.read_config(
        tmp_path / "config.json").stop_ids == (), "null is as if absent, but for tokens, of which there are none then"


@pytest.mark.parametrize("changes, said", [
    ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ({"model_type": "mixtral", "sliding_window": 4096}, "model_type = 'mixtral'; sliding_window = 4096"),
    ({"quantization_config": {"bits": 4}}, "quantization_config = an object"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type = 'yarn'"),
    ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "type = 'dynamic'"),
    ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "rope_type = 'longrope'"),
    ({"rope_scaling": {"rope_type": ["linear"]}}, "rope_type = a list"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is missing; high_freq_factor is"),
    ({"rope_scaling": {"rope_type": "linear", "factor": None}}, "rope_scaling: factor is missing"),
    ({"rope_scaling": {"factor": 2.0}}, "rope_scaling has a factor but no type"),
    ({"rope_scaling": "linear"}, "rope_scaling is 'linear', not an object"),
    ({"rope_parameters": [1]}, "rope_parameters is a list, not an object"),
    *(({"rope_scaling": {"type": "linear", "factor": factor}}, f"factor is {factor!r}, not a number from 0.01 to")
      for factor in (0, -2.0, math.nan, math.inf, "2", True)),
    *(({"rope_scaling": STRETCHED | {"high_freq_factor": high}}, f"factor 1.0 is not below high_freq_factor {high}")
      for high in (1.0, 0.5)),
    ({"rope_scaling": STRETCHED | {"original_max_position_embeddings": 0}}, "_max_position_embeddings is 0, not a"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
    ({"rope_scaling": STRETCHED, "rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
    ({"rope_interleaved": True}, "rope_interleaved = True"),
    ({"attention_dropout": 0.1}, "attention_dropout = 0.1"),
    ({"hidden_act": "gelu" * 9999}, "hidden_act = 'gelugelu"),
    ({"hidden_size": None}, "hidden_size is missing"),
    ({"vocab_size": "512"}, "vocab_size is '512', not a whole number from 1 to 16777216"),
    ({"vocab_size": True, "mlp_bias": 1}, "vocab_size is True, not a whole number from 1 to 16777216; mlp_bias is 1"),
    ({"hidden_size": 10**400}, "hidden_size is 10000"),
    ({"num_hidden_layers": 100_000}, "num_hidden_layers is 100000, not a whole number from 1 to 512"),
    ({"num_attention_heads": 0}, "num_attention_heads is 0, not"),
    ({"num_key_value_heads": 8.0}, "num_key_value_heads is 8.0, not a whole number"),
    ({"head_dim": 127}, "head_dim 127 is odd"),
    *(({"rms_norm_eps": eps}, f"rms_norm_eps is {eps!r}, not a number") for eps in ("1e-5", -1e-5, 0, math.nan)),
    *(({"rope_theta": base}, f"rope_theta is {base!r}, not a number") for base in ("1e4", 0, -1e4, math.nan, math.inf)),
    ({"rope_parameters": {"rope_theta": 0}}, "rope_theta is 0, not a number"),
    *(({"max_position_embeddings": size}, f"max_position_embeddings is {size!r}, not") for size in (0, "2048", 2048.5)),
    *(({key: "false"}, f"{key} is 'false', not true or false")
      for key in ("attention_bias", "mlp_bias", "tie_word_embeddings")),
    ({"architectures": "LlamaForSequenceClassification"}, "architectures is 'LlamaForSequenceClassification', not"),
    ({"architectures": ["LlamaForSequenceClassification"], "id2label": ["bad"]}, "id2label is a list, not an object"),
    *(({"bos_token_id": bos}, f"bos_token_id is {said}, not a whole number from 0 to 31999")
      for bos, said in ((32000, "32000"), (-1, "-1"), ("<s>", "'<s>'"), ([1], "a list"), (1.0, "1.0"))),
    *(({"eos_token_id": eos}, f"eos_token_id is {said}, not a whole number from 0 to 31999")
      for eos, said in ((32000, "32000"), (-1, "-1"), ([2, ""], "''"), ([2, 32000], "32000"), ({}, "an object"))),
    ({"eos_token_id": [2, None]}, "eos_token_id is missing"),
    ({"num_key_value_heads": 5}, "32 is not a multiple of num_key_value_heads 5"),
    ({"num_attention_heads": 30, "num_key_value_heads": 30}, "4096 is not a multiple of num_attention_heads 30"),
], ids=str)
def test_configurations_that_are_refused(tmp_path, changes, said):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA2 | changes))
    with pytest.raises(UserError) as error:
        checkpoint.read_config(path)
    message = str(error.value)
    assert said in message and str(path) in message and "\n" not in message and len(message) < 600 + len(str(path))


# ----------------------------------------------------------------------------------------------------------------
# Broken folders


def cut(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


def break_header(path):
    raw = path.read_bytes()
    path.write_bytes(raw[:8] + b"?" * 20 + raw[28:])


BROKEN = {  # what happens to a good folder of this kind -> what is said
    "no weights": ("safetensors", lambda f: (f / "model.safetensors").unlink(), "no checkpoint here"),
    "no config": ("bin", lambda f: (f / "config.json").unlink(), "config.json: not found"),
    "config no JSON": ("bin", lambda f: (f / "config.json").write_text("{'a': 1}"), "invalid JSON at column 2"),
    "config a list": ("bin", lambda f: (f / "config.json").write_text("[]"), "holds a list, not an object"),
    "config not UTF-8": ("bin", lambda f: (f / "config.json").write_bytes(b"\xff\xfe{}"), "is not UTF-8"),
    "bad header": ("safetensors", lambda f: break_header(f / "model.safetensors"), "not a readable checkpoint"),
    "long header": ("safetensors", lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 99), "not a readable"),
    "cut tensors": ("safetensors", lambda f: cut(f / "model.safetensors", 20000), "not a readable checkpoint"),
    "empty file": ("safetensors", lambda f: cut(f / "model.safetensors", 0), "not a readable checkpoint"),
    "cut bin": ("bin", lambda f: cut(f / "pytorch_model.bin", 20000), "not a readable checkpoint"),
    "bin short by a few bytes": ("bin", lambda f: cut(f / "pytorch_model.bin", -3), "not a readable checkpoint"),
    "empty bin": ("bin", lambda f: cut(f / "pytorch_model.bin", 0), "not a readable checkpoint"),
    "pointer": ("bin", lambda f: (f / "pytorch_model.bin").write_text("version https://git-lfs"), "not a readable"),
    "no weights inside": ("bin", lambda f: torch.save({"step": 3}, f / "pytorch_model.bin"), "not a readable"),
    "shard gone": ("sharded bin", lambda f: (f / "pytorch_model-00002-of-00003.bin").unlink(),
                   "shards missing: pytorch_model-00002-of-00003.bin"),
    "shards gone": ("sharded safetensors", lambda f: [p.unlink() for p in f.glob("*-0000[13]-*")],
                    "shards missing: model-00001-of-00003.safetensors, model-00003-of-00003.safetensors"),
    "shard cut": ("sharded safetensors", lambda f: cut(f / "model-00002-of-00003.safetensors", 900),
                  "model-00002-of-00003.safetensors: not a readable checkpoint"),
    "index broken": ("sharded bin", lambda f: (f / "pytorch_model.bin.index.json").write_text("{"), "invalid JSON"),
    "index empty": ("sharded bin", lambda f: (f / "pytorch_model.bin.index.json").write_text("{}"), "'weight_map'"),
    "index of no files": ("sharded bin", lambda f: map_to(f, None), "'weight_map'"),
    "index of numbers": ("sharded bin", lambda f: map_to(f, 3, [4], "a\0b"), "shards missing: 3, a"),
    "index of a path": ("sharded bin", lambda f: map_to(f, "../other.bin", f"{f}/x.bin"), "shards missing: ../other"),
    "index of names too long": ("sharded bin", lambda f: map_to(f, "x" * 9999), "shards missing: xxxxx"),
    "config too deep": ("bin", lambda f: (f / "config.json").write_text("[" * 99999 + "]" * 99999), "too deep"),
    "index deep": ("sharded bin", lambda f: (f / "pytorch_model.bin.index.json").write_text("[" * 99999), "too deep"),
}


def map_to(folder, *files):
    """Let the index name these files."""
    where = {f"model.layers.{i}.mlp": file for i, file in enumerate(files) if file is not None}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))


@pytest.mark.parametrize("name", BROKEN)
def test_broken_folders_are_refused(tmp_path, name):
    kind, harm, said = BROKEN[name]
    checkpoint_folder(tmp_path, tiny(), kind)
    checkpoint.load(tmp_path)
    harm(tmp_path)
    with pytest.raises(UserError) as error:
        checkpoint.load(tmp_path)
    message = str(error.value)
    assert said in message and str(tmp_path) in message and "\n" not in message


NO_FLOATS = {
    "a list": lambda weights: [1, 2],
    "a tensor": lambda weights: torch.zeros(3),
    "nested": lambda weights: {"state_dict": weights},
    "a number": lambda weights: weights | {"step": 3},
    "a number as name": lambda weights: weights | {3: torch.zeros(2)},
    "integers": lambda weights: weights | {"model.norm.weight": torch.ones(32, dtype=torch.int8)},
    "8-bit floats": lambda weights: weights | {"model.norm.weight": torch.ones(32).to(torch.float8_e4m3fn)},
    "complex": lambda weights: weights | {"model.norm.weight": torch.ones(32, dtype=torch.complex64)},
    "sparse": lambda weights: weights | {"lm_head.weight": weights["lm_head.weight"].to_sparse()},
    "no data": lambda weights: weights | {"lm_head.weight": weights["lm_head.weight"].to("meta")},
}


@pytest.mark.parametrize("name", NO_FLOATS)
def test_what_is_no_tensor_of_floats_is_refused(tmp_path, name):
    content = NO_FLOATS[name](weights_of(tiny()))
    said = "in it is no tensor of 16, 32 or 64-bit floats" if isinstance(content, dict) else ""
    with pytest.raises(UserError, match=f"pytorch_model.bin: not a readable checkpoint .*{said}"):
        checkpoint.load(checkpoint_folder(tmp_path / "bin", tiny(), "bin", content))
    if name in ("integers", "8-bit floats"):
        with pytest.raises(UserError, match=f"model.norm.weight' {said}"):
            checkpoint.load(checkpoint_folder(tmp_path / "safetensors", tiny(), "safetensors", content))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS[:2])
def test_floats_of_other_sizes_are_read(tmp_path, kind, dtype):
    llama = tiny().to(dtype)
    assert weights_equal(checkpoint.load(checkpoint_folder(tmp_path, llama, kind)), llama.float())


def test_a_head_that_should_be_tied_and_differs_is_refused(tmp_path):
    """transformers 4 would take the embedding for it, transformers 5 the head."""
    checkpoint.save(tiny(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(UserError, match="tie_word_embeddings, but lm_head.weight is not the embedding"):
        checkpoint.load(tmp_path)
    assert checkpoint.load(tmp_path, scorer=True).config.num_labels == 1, "a preference model needs no head of words"


def test_a_head_that_gives_scores_is_never_replaced(tmp_path):
    """Even where the configuration says nothing of it."""
    llama = tiny(num_labels=1)
    checkpoint.save(llama, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for changes in ({"architectures": None}, {"num_labels": 0}, {"num_labels": 1, "id2label": None}):
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        assert weights_equal(checkpoint.load(tmp_path, scorer=True), llama)


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Runs:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)
    checkpoint_folder(tmp_path, tiny(), "bin", {"model.norm.weight": Runs()})
    with pytest.raises(UserError, match="not a readable checkpoint"):
        checkpoint.load(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_no_folder_at_all(tmp_path):
    with pytest.raises(UserError, match="absent: no such folder"):
        checkpoint.load(tmp_path / "absent")


@pytest.mark.parametrize("kind", ["safetensors", "sharded bin"])
def test_tensors_that_do_not_fit_are_listed(tmp_path, kind):
    llama = tiny()
    weights = weights_of(llama)
    del weights["model.layers.1.mlp.up_proj.weight"], weights["lm_head.weight"]
    weights["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)
    weights["model.norm.weight"] = torch.ones(31)
    with pytest.raises(UserError) as error:
        checkpoint.load(checkpoint_folder(tmp_path, llama, kind, weights))
    problems = str(error.value).split("weights do not fit config.json: ")[1].split("; ")
    assert sorted(problems) == [
        "missing lm_head.weight", "missing model.layers.1.mlp.up_proj.weight",
        "model.norm.weight is (31,), config.json says (32,)", "unexpected model.layers.0.self_attn.q_proj.bias"]


def test_a_long_list_is_cut(tmp_path):
    llama = tiny(num_hidden_layers=6)
    with pytest.raises(UserError, match=r"; and 36 more$"):  # 6 x 9 + 3 - 1 are missing, 20 are shown
        checkpoint.load(checkpoint_folder(tmp_path, llama, "bin", {"model.norm.weight": torch.ones(32)}))


def tokenizer_file(folder, words):
    from tokenizers import Tokenizer, models
    Tokenizer(models.WordLevel({f"word{n}": n for n in range(words)}, unk_token="word0")).save(
        str(folder / "tokenizer.json"))


def test_tokenizers(tmp_path):
    llama = tiny()
    with pytest.raises(UserError, match="tokenizer.json: not found"):
        checkpoint.load_tokenizer(tmp_path, llama)
    tokenizer_file(tmp_path, 40)
    assert checkpoint.load_tokenizer(tmp_path, llama).encode("word7").ids == [7]
    tokenizer_file(tmp_path, 41)
    with pytest.raises(UserError, match=re.escape(f"has token id 40, but the embedding of {tmp_path} ends at 39")):
        checkpoint.load_tokenizer(tmp_path, llama)
    path = tmp_path / "tokenizer.json"
    whole = json.loads(path.read_text())
    bare = whole | {"model": whole["model"] | {"vocab": {"a": 0}, "unk_token": "b"}}
    panic = whole | {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]],
                               "continuing_subword_prefix": "long"}}
    for content in ({}, [], panic, bare):  # the last has no token for what is unknown
        path.write_text(json.dumps(content))
        with pytest.raises(UserError, match="cannot be read as a tokenizer"):
            checkpoint.load_tokenizer(tmp_path)
    path.write_text(json.dumps(whole | {"model": {"type": "BPE", "vocab": {}, "merges": []}}))
    for model in (None, llama):
        with pytest.raises(UserError, match="tokenizer.json: has no tokens"):
            checkpoint.load_tokenizer(tmp_path, model)
    path.write_text(json.dumps(whole | {"padding": {
        "strategy": {"Fixed": 100}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "word0"}}))
    assert checkpoint.load_tokenizer(tmp_path).encode("word7").ids == [7]


# ----------------------------------------------------------------------------------------------------------------
# Checksums


@pytest.mark.parametrize("kind", [*KINDS, "preference model", "adapter"])
def test_a_fingerprint_is_of_what_decides_the_output_and_of_nothing_else(tmp_path, kind):
    base, folder = tmp_path / "one/base", tmp_path / "one/base"
    if kind in ("preference model", "adapter"):
        checkpoint.save(tiny(num_labels=1), base)
        (base / "principle.json").write_text('{"mean": 1.0}')
    else:
        checkpoint_folder(base, tiny(), kind)
    tokenizer_file(base, 40)
    deciding = [path for path in base.iterdir() if not path.name.endswith("index.json")]
    if kind == "adapter":
        folder = tmp_path / "one/adapter"
        checkpoint.save(add_lora(checkpoint.load(base, scorer=True), 2, "base"), folder)
        (folder / "principle.json").write_text('{"mean": 2.0}')
        deciding += list(folder.iterdir())
    found = checkpoint.fingerprint(folder)
    assert len(deciding) == {"safetensors": 3, "bin": 3, "preference model": 4, "adapter": 8}.get(kind, 5)
    for path in deciding:
        before = path.read_bytes()
        path.write_bytes(before[:-3] + before[-3:].replace(before[-2:-1], b"?"))
        if path.name not in ("adapter_config.json", "context.json"):  # which can be read no more
            assert checkpoint.fingerprint(folder) != found, path
        path.write_bytes(before)
    for stray in ("metrics.jsonl", "context.json", "model.safetensors.tmp")[::2 if kind == "adapter" else 1]:
        (folder / stray).write_text("{}")
    (tmp_path / "one").rename(tmp_path / "other")
    assert checkpoint.fingerprint(tmp_path / "other" / folder.name) == found
    path = tmp_path / "other" / folder.name / "principle.json"
    path.unlink(missing_ok=True)
    without = checkpoint.fingerprint(path.parent)
    path.mkdir()
    assert checkpoint.fingerprint(path.parent) == without, "no file"
    path.rmdir()
    path.write_text('{"mean": 3.0}')
    assert checkpoint.fingerprint(path.parent) not in (found, without)


def test_what_has_no_fingerprint(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        checkpoint.fingerprint(tmp_path / "absent")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_digest_of_weights_is_of_names_shapes_and_every_value(dtype, device):
    llama = tiny().to(dtype)
    found = checkpoint.weights_digest(llama)
    assert found == checkpoint.weights_digest(tiny().to(dtype).to(device))
    assert found != checkpoint.weights_digest(tiny(seed=1).to(dtype))
    weight = llama.model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        weight[-1, -1] *= -1
        assert checkpoint.weights_digest(llama) != found
        weight[-1, -1] *= -1
        assert checkpoint.weights_digest(llama) == found
    one, other = (checkpoint.weights_digest(torch.nn.ModuleDict({name: llama.lm_head})) for name in ("a", "b"))
    assert one != other, "the same bytes under another name"
    weight.data = weight.data.view(weight.shape[::-1])
    assert checkpoint.weights_digest(llama) != found, "the same bytes in another shape"


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path):
    old = tiny(seed=1)
    checkpoint.save(old, tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, hard))
    try:
        with pytest.raises(UserError, match="cannot write the weights .* is the disk full?"):
            checkpoint.save(tiny(seed=2), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert weights_equal(checkpoint.load(tmp_path), old)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


