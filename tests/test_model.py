"""model.py against transformers' logits, a published text, brute force, and hand-made broken folders."""
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
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._dynamo.testing import CompileCounter
from torch.fx.experimental.proxy_tensor import make_fx

import model
from data import UserError
from model import Config, Llama, Packed, generate, token_logprobs

FIXTURES = Path(__file__).parent / "fixtures"
CONFIGS = json.loads((FIXTURES / "configs.json").read_text())
CASES = sorted(CONFIGS)


def fixture_folder(folder, case, form="v4"):
    """Lay a golden case out as a Hugging Face folder; gives (tokens (T,), logits (T, V))."""
    weights = load_file(FIXTURES / f"{case}.safetensors")
    tokens, logits = weights.pop("tokens"), weights.pop("logits")
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIGS[case][form]))
    return tokens, logits


def tiny(seed=0, **changes):
    """A small random model whose weights are large enough for every token before to matter to the logits."""
    sizes = dict(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2)
    llama = Llama(Config(**(sizes | changes)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in llama.named_parameters():
            parameter.copy_(("norm" in name) + 0.25 * torch.randn(parameter.shape, generator=generator))
    return llama


def random_tokens(count, vocabulary=40, seed=0):
    return torch.randint(vocabulary, (count,), generator=torch.Generator().manual_seed(seed))


def weights_of(llama):
    return {name: parameter.detach().clone() for name, parameter in llama.named_parameters()}


# ----------------------------------------------------------------------------------------------------------------
# Against transformers


@pytest.mark.parametrize("form", ["v4", "v5"])
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_transformers(tmp_path, case, form):
    tokens, golden = fixture_folder(tmp_path, case, form)
    with torch.no_grad():
        logits = Llama.from_pretrained(tmp_path)(tokens[None])[0]
    assert logits.dtype == torch.float32
    assert (logits - golden).abs().max() < 1e-4


@pytest.mark.parametrize("case, key, value", [
    ("llama3", "rope_scaling", None), ("linear", "rope_scaling", None), ("linear_old_key", "rope_scaling", None),
    ("llama3", "rope_theta", 10000.0), ("tied", "rms_norm_eps", 1e-5)])
def test_the_golden_logits_can_tell(tmp_path, case, key, value):
    """Were a number of the configuration ignored, the test above would fail."""
    tokens, golden = fixture_folder(tmp_path, case)
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[case]["v4"] | {key: value}))
    with torch.no_grad():
        assert (Llama.from_pretrained(tmp_path)(tokens[None])[0] - golden).abs().max() > 1e-2


def test_llama3_scaling_in_each_of_its_three_bands():
    frequencies = model.rope_frequencies(Config(**{key: value for key, value in CONFIGS["llama3"]["v4"].items()
                                                   if key in Config.__dataclass_fields__}))
    blend = (32 * 100 ** -0.25 / (2 * math.pi) - 1) / (4 - 1)  # of the second one, 1.6 turns in the old context
    expected = [1.0, 100 ** -0.25 * (blend + (1 - blend) / 8), 100 ** -0.5 / 8, 100 ** -0.75 / 8]
    assert frequencies.tolist() == pytest.approx(expected, rel=1e-6)


def test_logits_of_the_real_checkpoint(shared):
    golden = load_file(FIXTURES / "stories260K.safetensors")
    llama = Llama.from_pretrained(shared / "checkpoints/stories260K")
    with torch.no_grad():
        assert (llama(golden["tokens"][None])[0, ::8] - golden["logits"]).abs().max() < 1e-4


def test_published_greedy_text(shared):
    folder = shared / "checkpoints/stories260K"
    llama = Llama.from_pretrained(folder)
    tokens, = generate(llama, [[1]], 256)
    assert len(tokens) == 256
    text = model.load_tokenizer(folder, llama).decode(tokens)
    assert text + "\n" == (folder / "published-greedy.txt").read_text(encoding="utf-8")  # the newline ends the file


@pytest.mark.parametrize("changes", [
    {}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}, {"head_dim": 12},
    {"rope_scaling": {"type": "linear", "factor": 3.0}, "eos_token_id": [2, 3]},
    {"rope_scaling": CONFIGS["llama3"]["v4"]["rope_scaling"], "rope_theta": 100.0}], ids=str)
def test_transformers_loads_what_is_saved(tmp_path, changes):
    transformers = pytest.importorskip("transformers")
    ours = tiny(**changes)
    ours.save_pretrained(tmp_path / "ours")
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    tokens = random_tokens(100).view(2, 50)
    with torch.no_grad():
        assert torch.allclose(ours(tokens), theirs(tokens).logits, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    assert weights_equal(Llama.from_pretrained(tmp_path / "theirs"), ours)


# ----------------------------------------------------------------------------------------------------------------
# Checkpoints


def weights_equal(one, other):
    one, other = dict(one.named_parameters()), dict(other.named_parameters())
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"attention_bias": True},
                                     {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "head_dim": 6}], ids=str)
def test_save_and_load(tmp_path, changes):
    llama = tiny(**changes)
    llama.save_pretrained(tmp_path)
    again = Llama.from_pretrained(tmp_path)
    assert weights_equal(llama, again) and again.config == llama.config
    tokens = random_tokens(30)[None]
    assert torch.equal(llama(tokens), again(tokens))
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == bool(changes.get("tie_word_embeddings"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1, "whoever may read the configuration may read the weights"


def test_bfloat16_and_where_its_angles_are_computed(tmp_path):
    """In bf16, positions beyond 256 and their angles would be coarse: `.to` must leave the frequencies alone."""
    llama = tiny()
    llama.save_pretrained(tmp_path)
    loaded = Llama.from_pretrained(tmp_path, dtype=torch.bfloat16)
    cast = copy.deepcopy(llama).to(torch.bfloat16)
    tokens = random_tokens(600)[None]
    assert loaded(tokens).dtype == torch.bfloat16
    assert torch.equal(loaded(tokens), cast(tokens))
    error = (loaded(tokens).float() - llama(tokens)).abs().mean() / llama(tokens).std()
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
    llama.save_pretrained(folder)
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


KINDS = ["safetensors", "bin", "sharded safetensors", "sharded bin"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_checkpoint_gives_the_same_model(tmp_path, kind):
    llama = tiny(attention_bias=True)
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}  # old checkpoints carry it
    checkpoint_folder(tmp_path, llama, kind, weights_of(llama) | extra)
    assert weights_equal(Llama.from_pretrained(tmp_path), llama)


def test_a_tied_head_that_was_written_twice_is_tied(tmp_path):
    llama = tiny(tie_word_embeddings=True)
    weights = weights_of(llama)
    checkpoint_folder(tmp_path, llama, "bin", weights | {"lm_head.weight": weights["model.embed_tokens.weight"]})
    again = Llama.from_pretrained(tmp_path)
    assert weights_equal(again, llama) and again.lm_head.weight is again.model.embed_tokens.weight


@pytest.mark.parametrize("kind", KINDS)
def test_many_small_tensors_load_fast(tmp_path, kind):
    llama = tiny(num_hidden_layers=33)
    assert len(weights_of(llama)) == 300
    checkpoint_folder(tmp_path, llama, kind)
    start = time.process_time()
    Llama.from_pretrained(tmp_path)
    assert time.process_time() - start < 2


PEAK = """
import gc, os, sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from model import Llama
def megabytes(key):
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith(key))
for warm_up in sys.argv[2:4]:
    Llama.from_pretrained(warm_up)
for folder in sys.argv[4:]:
    if os.fork() == 0:  # a fresh account of memory for each
        gc.collect()
        open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
        before = megabytes("VmRSS")
        llama = Llama.from_pretrained(folder)
        print(megabytes("VmHWM") - before, flush=True)
        os._exit(0)
    os.wait()
"""


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
        command = [sys.executable, "-c", PEAK, str(Path(model.__file__).parent), *map(str, folders)]
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
    config = Config.read(tmp_path / "config.json")
    assert (config.num_key_value_heads, config.head_dim, config.rope_theta, config.rms_norm_eps) == numbers
    assert config.stop_ids == stops and config.rope_scaling == raw.get("rope_scaling")
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in Llama(config).parameters()) == parameters


def test_what_an_absent_key_means(tmp_path):
    """The defaults are those of Hugging Face, whose eps (1e-6) is not that of a model from scratch here."""
    needed = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
    (tmp_path / "config.json").write_text(json.dumps({key: LLAMA1[key] for key in needed}))
    config = Config.read(tmp_path / "config.json")
    assert (config.rms_norm_eps, config.rope_theta, config.tie_word_embeddings) == (1e-6, 10000.0, False)
    assert (config.num_key_value_heads, config.head_dim, config.stop_ids) == (32, 128, (2,))


@pytest.mark.parametrize("changes, said", [
    ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ({"model_type": "mistral", "sliding_window": 4096}, "model_type = 'mistral'; sliding_window = 4096"),
    ({"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4}"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling type 'yarn'"),
    ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_scaling type 'dynamic'"),
    ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "rope_scaling type 'longrope'"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "without a number 'low_freq_factor'"),
    ({"rope_scaling": {"rope_type": "linear"}}, "without a number 'factor'"),
    ({"rope_scaling": "linear"}, "rope_scaling must be null or an object"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
    ({"rope_interleaved": True}, "rope_interleaved = True"),
    ({"attention_dropout": 0.1}, "attention_dropout = 0.1"),
    ({"hidden_size": None}, "hidden_size missing or not such a number"),
    ({"vocab_size": "512"}, "vocab_size missing or not such a number"),
    ({"num_attention_heads": 0}, "num_attention_heads missing or not such a number"),
    ({"num_key_value_heads": 8.0}, "num_key_value_heads missing or not such a number"),
    ({"rms_norm_eps": "1e-5"}, "rms_norm_eps missing or not such a number"),
    ({"num_key_value_heads": 5}, "32 is not a multiple of num_key_value_heads 5"),
    ({"num_attention_heads": 30, "num_key_value_heads": 30}, "4096 is not a multiple of num_attention_heads 30"),
], ids=str)
def test_configurations_that_are_refused(tmp_path, changes, said):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA2 | changes))
    with pytest.raises(UserError) as error:
        Config.read(path)
    assert said in str(error.value) and "\n" not in str(error.value)


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
    "config no JSON": ("bin", lambda f: (f / "config.json").write_text("{'a': 1}"), "cannot be read as a JSON object"),
    "config a list": ("bin", lambda f: (f / "config.json").write_text("[]"), "cannot be read as a JSON object"),
    "config not UTF-8": ("bin", lambda f: (f / "config.json").write_bytes(b"\xff\xfe{}"), "config.json: cannot be"),
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
    "index broken": ("sharded bin", lambda f: (f / "pytorch_model.bin.index.json").write_text("{"), "'weight_map'"),
    "index empty": ("sharded bin", lambda f: (f / "pytorch_model.bin.index.json").write_text("{}"), "'weight_map'"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_folders_are_refused(tmp_path, name):
    kind, harm, said = BROKEN[name]
    checkpoint_folder(tmp_path, tiny(), kind)
    Llama.from_pretrained(tmp_path)
    harm(tmp_path)
    with pytest.raises(UserError) as error:
        Llama.from_pretrained(tmp_path)
    message = str(error.value)
    assert said in message and str(tmp_path) in message and "\n" not in message


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Runs:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)
    checkpoint_folder(tmp_path, tiny(), "bin", {"model.norm.weight": Runs()})
    with pytest.raises(UserError, match="not a readable checkpoint"):
        Llama.from_pretrained(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_no_folder_at_all(tmp_path):
    with pytest.raises(UserError, match="absent: no such folder"):
        Llama.from_pretrained(tmp_path / "absent")


@pytest.mark.parametrize("kind", ["safetensors", "sharded bin"])
def test_tensors_that_do_not_fit_are_listed(tmp_path, kind):
    llama = tiny()
    weights = weights_of(llama)
    del weights["model.layers.1.mlp.up_proj.weight"], weights["lm_head.weight"]
    weights["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)
    weights["model.norm.weight"] = torch.ones(31)
    with pytest.raises(UserError) as error:
        Llama.from_pretrained(checkpoint_folder(tmp_path, llama, kind, weights))
    problems = str(error.value).split("weights do not fit config.json: ")[1].split("; ")
    assert sorted(problems) == [
        "missing lm_head.weight", "missing model.layers.1.mlp.up_proj.weight",
        "model.norm.weight is (31,), config.json says (32,)", "unexpected model.layers.0.self_attn.q_proj.bias"]


def test_a_long_list_is_cut(tmp_path):
    llama = tiny(num_hidden_layers=6)
    with pytest.raises(UserError, match=r"; and 36 more$"):  # 6 x 9 + 3 - 1 are missing, 20 are shown
        Llama.from_pretrained(checkpoint_folder(tmp_path, llama, "bin", {"model.norm.weight": torch.ones(32)}))


def tokenizer_file(folder, words):
    from tokenizers import Tokenizer, models
    Tokenizer(models.WordLevel({f"word{n}": n for n in range(words)}, unk_token="word0")).save(
        str(folder / "tokenizer.json"))


def test_tokenizers(tmp_path):
    llama = tiny()
    with pytest.raises(UserError, match="tokenizer.json: not found"):
        model.load_tokenizer(tmp_path, llama)
    tokenizer_file(tmp_path, 40)
    assert model.load_tokenizer(tmp_path, llama).encode("word7").ids == [7]
    tokenizer_file(tmp_path, 41)
    with pytest.raises(UserError, match=re.escape(f"has token id 40, but the embedding of {tmp_path} ends at 39")):
        model.load_tokenizer(tmp_path, llama)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be read as a tokenizer"):
        model.load_tokenizer(tmp_path)


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path):
    old = tiny(seed=1)
    old.save_pretrained(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, hard))
    try:
        with pytest.raises(UserError, match="cannot write the weights .* is the disk full?"):
            tiny(seed=2).save_pretrained(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert weights_equal(Llama.from_pretrained(tmp_path), old)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


# ----------------------------------------------------------------------------------------------------------------
# Packed documents

LENGTHS = [5, 1, 17, 9, 8]  # 40 tokens
ALL_TARGETS = torch.tensor([place for place in range(40) if place not in (0, 5, 6, 23, 32)])


BOTH_WAYS = pytest.mark.parametrize("in_turn", [True, False], ids=["in turn, as on a CPU", "padded, as on a GPU"])


def packed_logits(llama, tokens, in_turn):
    attend = Packed(LENGTHS, "cpu")
    attend.groups = model.groups_of(LENGTHS, "cpu", apart=in_turn)
    return llama.lm_head(llama.hidden(tokens[None], attend))[0]


@BOTH_WAYS
def test_packed_documents_are_computed_as_if_alone(in_turn):
    llama = tiny(rope_theta=100.0)
    tokens = random_tokens(40)
    alone = torch.cat([llama(document[None])[0] for document in tokens.split(LENGTHS)])
    assert torch.allclose(packed_logits(llama, tokens, in_turn), alone, atol=1e-5)
    assert torch.allclose(llama(tokens.view(2, 20), LENGTHS).view(40, -1), alone, atol=1e-5), "over two rows"
    plain = llama(tokens[None])[0]
    assert torch.allclose(plain[:5], alone[:5], atol=1e-5) and (plain[5:] - alone[5:]).abs().max() > 0.1


@BOTH_WAYS
def test_packed_gradients_are_those_of_the_documents_alone(in_turn):
    llama, tokens = tiny(), random_tokens(40)
    weighting = torch.randn(40, 40, generator=torch.Generator().manual_seed(1))
    (packed_logits(llama, tokens, in_turn) * weighting).sum().backward()
    packed = {name: parameter.grad for name, parameter in llama.named_parameters()}
    llama.zero_grad()
    for document, weights in zip(tokens.split(LENGTHS), weighting.split(LENGTHS)):
        (llama(document[None])[0] * weights).sum().backward()
    for name, parameter in llama.named_parameters():
        assert torch.allclose(packed[name], parameter.grad, rtol=1e-4, atol=1e-4 * parameter.grad.abs().max()), name


@BOTH_WAYS
def test_one_document_never_changes_another(in_turn):
    llama, tokens = tiny(), random_tokens(40)
    before = packed_logits(llama, tokens, in_turn).split(LENGTHS)
    for changed in range(len(LENGTHS)):
        documents = list(tokens.split(LENGTHS))
        documents[changed] = (documents[changed] + 1) % 40
        after = packed_logits(llama, torch.cat(documents), in_turn).split(LENGTHS)
        for other in range(len(LENGTHS)):
            assert torch.equal(before[other], after[other]) == (other != changed)


def one_by_one(q, k, v, starts, longest):
    """What PyTorch's kernel for documents of different lengths does."""
    documents = list(zip(starts.tolist(), starts.tolist()[1:]))
    assert longest == max(end - start for start, end in documents) and starts.dtype == torch.int32
    return torch.cat([model.sdpa(*(x[None, start:end] for x in (q, k, v)), is_causal=True)[0]
                      for start, end in documents])


def test_a_kernel_for_documents_of_different_lengths_is_given_them_whole(monkeypatch):
    """Its use on a GPU, with a stand-in for the kernel; the test on a GPU below meets the real one."""
    llama, tokens, calls = tiny().bfloat16(), random_tokens(40), []
    expected = llama(tokens[None], LENGTHS)
    attend = Packed(LENGTHS, "cpu")
    attend.kernel = lambda *rest: calls.append(1) or one_by_one(*rest)
    found = llama.lm_head(llama.hidden(tokens[None], attend))
    assert len(calls) == 2 and (found - expected).norm() < 0.02 * expected.norm()
    attend.kernel = None
    assert torch.equal(llama.lm_head(llama.hidden(tokens[None], attend)), expected), "otherwise in padded rows"


def test_positions_restart():
    assert Packed([3, 1, 2], "cpu").positions.tolist() == [[0, 1, 2, 0, 0, 1]]


# ----------------------------------------------------------------------------------------------------------------
# Log-probabilities


def test_token_logprobs_are_those_of_the_full_logits():
    llama, tokens = tiny(), random_tokens(40)
    firsts = [0, 5, 6, 23, 32]
    targets = torch.tensor([place for place in range(40) if place not in firsts and place % 3 > 0])
    logits = torch.cat([llama(document[None])[0] for document in tokens.split(LENGTHS)])
    expected = [logits[place - 1].log_softmax(-1)[tokens[place]].item() for place in targets]
    for chunk in (4096, 7):
        assert token_logprobs(llama, tokens, LENGTHS, targets, chunk).tolist() == pytest.approx(expected, abs=1e-5)
        with torch.no_grad():
            assert token_logprobs(llama, tokens, LENGTHS, targets, chunk).tolist() == pytest.approx(expected, abs=1e-5)
    assert token_logprobs(llama, tokens, LENGTHS, torch.zeros(0, dtype=torch.long)).shape == (0,)


def gradients(llama, **options):
    llama.zero_grad()
    token_logprobs(llama, random_tokens(40), LENGTHS, ALL_TARGETS, **options).square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in llama.named_parameters()}


@pytest.mark.parametrize("keep", [0, model.KEEP])
@pytest.mark.parametrize("chunk", [1, 7, 34])
def test_chunks_do_not_change_the_gradient(monkeypatch, chunk, keep):
    llama = tiny()
    expected = gradients(llama)
    rows = []
    llama.lm_head.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    monkeypatch.setattr(model, "KEEP", keep)
    found = gradients(llama, chunk=chunk)
    assert max(rows) == chunk and sum(rows) == (35 if keep else 70), "more than KEEP are computed again"
    for name in expected:
        assert torch.allclose(found[name], expected[name], atol=1e-6 * expected[name].abs().max() + 1e-7), name


def test_checkpointed_activations_give_the_same_gradient():
    llama = tiny()
    calls = Counter()
    for block in llama.model.layers:
        block.register_forward_pre_hook(lambda *_: calls.update(["forward"]))
    expected = gradients(llama)
    assert calls.pop("forward") == 2
    llama.checkpoint_activations = True
    found = gradients(llama)
    assert calls["forward"] == 4, "each block is computed again"
    assert all(torch.allclose(found[name], expected[name], rtol=1e-5) for name in expected)


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 4}, {"head_dim": 6}], ids=str)
def test_bfloat16_autocast_stays_near_fp32(changes):
    llama = tiny(**changes)
    expected = gradients(llama)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(llama)
    for name in expected:
        assert found[name].dtype == torch.float32
        assert torch.cosine_similarity(found[name].flatten(), expected[name].flatten(), dim=0) > 0.995, name


@pytest.mark.parametrize("heads, tokens", [((4, 4), 1), ((4, 4), 30), ((6, 2), 30), ((6, 2), 131), ((2, 1), 1030)])
def test_attention_written_out_for_bfloat16(heads, tokens):
    """Against fp64, softmax(q k / sqrt(E)) v per head and token, and its gradients."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(tokens, number, 8, generator=generator).bfloat16().requires_grad_()
              for number in (heads[0], heads[1], heads[1])]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    q, k, v = exact[0], *(x.repeat_interleave(heads[0] // heads[1], dim=1) for x in exact[1:])
    scores = torch.einsum("thc,shc->hts", q, k) / math.sqrt(8)
    past = torch.arange(tokens)[:, None] >= torch.arange(tokens)
    expected = torch.einsum("hts,shc->thc", scores.masked_fill(~past, -1e9).softmax(-1), v)
    found = model.causal_attention(*(x[None] for x in inputs))[0]
    gradient = torch.randn(expected.shape, generator=generator)
    expected.backward(gradient.double()), found.backward(gradient.bfloat16())
    for one, other in [(found, expected), *((x.grad, y.grad) for x, y in zip(inputs, exact))]:
        assert (one - other).norm() <= 0.02 * other.norm()


# ----------------------------------------------------------------------------------------------------------------
# Generation

PROMPTS = [random_tokens(length, seed=seed).tolist() for seed, length in enumerate((7, 1, 30, 2, 2, 13, 1, 8))]


def greedy_by_hand(llama, prompt, steps, stop_ids=()):
    """No cache: the whole text through the model for every token."""
    tokens = list(prompt)
    for _ in range(steps):
        with torch.no_grad():
            new = llama(torch.tensor([tokens]))[0, -1].argmax().item()
        if new in stop_ids:
            break
        tokens.append(new)
    return tokens[len(prompt):]


class AsOnGPU(model.Cache):
    """One shelf, equal shapes and places, a little room at a time."""
    def __init__(self, config, rows, dtype, device):
        super().__init__(config, rows, dtype, device)
        self.static, self.width, self.step = True, rows, 16
        self.shelves = [torch.zeros(config.num_hidden_layers, 2, rows, config.num_key_value_heads, 0, config.head_dim,
                                    dtype=dtype)]


def as_on_a_gpu(monkeypatch):
    """Generation with a GPU's shapes and order. A pass is recorded as CUDA records it: the operations, on the tensors
    that they met, and nothing of the Python between them. Gives the list of what has been recorded."""
    recorded = []

    def record(forward):
        operations = make_fx(lambda: forward().clone())()
        output = operations()
        recorded.append(operations)
        return lambda: output.copy_(operations()), output
    monkeypatch.setattr(model, "Cache", AsOnGPU)
    monkeypatch.setattr(model, "record", record)
    return recorded


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 4, "attention_bias": True}, {"head_dim": 6}], ids=str)
def test_greedy_generation_is_that_of_full_forwards(changes):
    llama = tiny(seed=3, **changes)
    expected = [greedy_by_hand(llama, prompt, 20) for prompt in PROMPTS]
    assert generate(llama, PROMPTS, 20) == expected
    assert [generate(llama, [prompt], 20)[0] for prompt in PROMPTS] == expected
    assert len(set(map(tuple, expected))) == len(PROMPTS)


def test_rows_that_finish_leave_the_others_alone():
    llama = tiny(seed=3)
    stop_ids = (5, 11, 30)
    expected = [greedy_by_hand(llama, prompt, 20, stop_ids) for prompt in PROMPTS]
    lengths = list(map(len, expected))
    assert len(set(lengths)) > 3 and 20 in lengths, "the case is a mixed one"
    assert generate(llama, PROMPTS, 20, stop_ids=stop_ids) == expected
    assert generate(llama, PROMPTS[::-1], 20, stop_ids=stop_ids) == expected[::-1]


def test_finished_rows_are_not_computed():
    llama = tiny(seed=3)
    rows = []
    llama.lm_head.register_forward_hook(lambda module, inputs, output: rows.append(output.size(0)))
    prompts = [prompt + [number] for number, prompt in enumerate(PROMPTS * 3)]
    lengths = [len(answer) for answer in generate(llama, prompts, 20, stop_ids=(5, 11, 30))]
    left = [sum(length >= step for length in lengths) for step in range(max(lengths))]
    assert len(set(left)) > 5 and max(left) == 24
    rounded = {1: 1, 2: 2, 3: 4, 4: 4, 5: 8, 6: 8, 7: 8, 8: 8, **{n: 16 for n in range(9, 17)}}  # shapes are few
    assert rows == [rounded.get(count, 24) for count in left]


@pytest.mark.parametrize("draft", [0, 7])
@pytest.mark.parametrize("rows", [1, 2, 5, 100])
def test_a_finished_row_makes_room_for_the_next(rows, draft, monkeypatch):
    llama, batches, advance = tiny(seed=3), [], model.advance
    prompts = [[1 + number % 7] * (number % 3) + prompt for number, prompt in enumerate(PROMPTS * 3)]
    expected = [greedy_by_hand(llama, prompt, 20, (5, 11, 30)) for prompt in prompts]
    monkeypatch.setattr(model, "advance", lambda *rest: batches.append(len(rest[2])) or advance(*rest))
    found = list(model.stream(llama, prompts, 20, rows, stop_ids=(5, 11, 30), draft=draft))
    assert dict(found) == dict(enumerate(expected)) and len(found) == len(prompts)
    assert max(batches) <= rows
    if rows == 5 and not draft:
        turns = sum(max(map(len, expected[start:start + 5])) for start in range(0, 24, 5))
        assert len(batches) < 0.85 * turns, "no row waits for its neighbours"


@pytest.mark.parametrize("as_gpu", [False, True], ids=["as on a CPU", "as on a GPU"])
def test_compiled_blocks_write_the_same(as_gpu, monkeypatch):
    """Traced as for a compiler; few times, since neither prompts nor the growing cache may ask for another."""
    llama, traced, compile_module = tiny(seed=3), CompileCounter(), torch.nn.Module.compile
    if as_gpu:
        as_on_a_gpu(monkeypatch)
        monkeypatch.setattr(model, "replayed", lambda graphs, key, forward: forward())
    expected = [generate(llama, LOOPS, 40, draft=draft) for draft in (0, 7)]
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: compile_module(self, backend=traced, **how))
    monkeypatch.setattr(model.Cache, "__call__", model.Cache.__call__)  # put back afterwards
    torch._dynamo.reset()
    model.compile_blocks(llama)
    assert [generate(llama, LOOPS, 40, draft=draft) for draft in (0, 7)] == expected
    assert 0 < traced.frame_count <= 8


@pytest.mark.parametrize("changes", [{}, {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}], ids=str)
def test_packed_weights_write_the_same(changes):
    if not model.computes_bf16("cpu"):
        pytest.skip("this CPU does not multiply bf16")
    llama = tiny(seed=3, hidden_size=64, **changes).bfloat16()
    expected = [generate(llama, LOOPS, 40, draft=draft) for draft in (0, 7)]
    size = sum(p.numel() for p in llama.parameters())
    model.prepack(llama)
    packed = sum(p.numel() for p in llama.parameters())
    assert packed < size / 2, "the weights of the blocks are not there twice"
    assert [generate(llama, LOOPS, 40, draft=draft) for draft in (0, 7)] == expected
    other = tiny(seed=3)
    model.prepack(other)
    assert sum(p.numel() for p in other.parameters()) == sum(p.numel() for p in tiny().parameters()), "fp32 stays"


def test_real_stories_in_a_batch(shared):
    folder = shared / "checkpoints/stories260K"
    llama = Llama.from_pretrained(folder)
    tokenizer = model.load_tokenizer(folder, llama)
    prompts = [tokenizer.encode(text).ids for text in ("Tom and his", "", "One day, a small bird saw", "The")]
    assert [len(prompt) for prompt in prompts][1] == 1
    assert generate(llama, prompts, 80) == [generate(llama, [prompt], 80)[0] for prompt in prompts]


def test_nothing_to_do():
    llama = tiny()
    assert generate(llama, [], 5) == []
    assert generate(llama, [[1], [2]], 0) == [[], []]
    with pytest.raises(UserError, match="a prompt has no tokens"):
        generate(llama, [[1], []], 5)
    for bad in ({"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}):
        with pytest.raises(UserError, match="must be at least 0"):
            generate(llama, [[1]], 5, **bad)


def test_sampling_follows_its_seed_and_not_its_neighbours():
    llama = tiny(seed=3)
    options = dict(temperature=0.8, top_k=20, top_p=0.95, stop_ids=(5, 11))
    together = generate(llama, PROMPTS, 15, seed=list(range(8)), **options)
    assert together == generate(llama, PROMPTS, 15, seed=list(range(8)), **options)
    assert together == [generate(llama, [p], 15, seed=[s], **options)[0] for s, p in enumerate(PROMPTS)]
    assert generate(llama, PROMPTS, 15, seed=1, **options) == generate(llama, PROMPTS, 15, seed=1, **options)
    assert generate(llama, PROMPTS, 15, seed=1, **options) != generate(llama, PROMPTS, 15, seed=2, **options)
    twins = generate(llama, [PROMPTS[0]] * 8, 15, seed=1, **options)
    assert len(set(map(tuple, twins))) == 8, "equal prompts do not share their chance"


# ----------------------------------------------------------------------------------------------------------------
# Copying: guesses from the text before, verified


LOOPS = [prompt * 6 for prompt in PROMPTS]  # texts that say the same again and again: much to copy


@pytest.mark.parametrize("draft", [1, 3, 15, 100])
def test_copying_writes_what_plain_greedy_decoding_writes(draft):
    llama = tiny(seed=3)
    for stop_ids in ((), (5, 11, 30)):
        expected = [greedy_by_hand(llama, prompt, 40, stop_ids) for prompt in LOOPS]
        llama.tally.clear()
        assert generate(llama, LOOPS, 40, stop_ids=stop_ids, draft=draft) == expected
        assert [generate(llama, [prompt], 40, stop_ids=stop_ids, draft=draft)[0] for prompt in LOOPS] == expected
        assert llama.tally["copied"] > 20 and llama.tally["written"] >= 2 * sum(map(len, expected))
    assert generate(llama, LOOPS, 1, draft=draft) == [greedy_by_hand(llama, prompt, 1) for prompt in LOOPS]


@pytest.mark.parametrize("draft", [0, 3, 15])
def test_recorded_passes_write_the_same(draft, monkeypatch):
    """As on a GPU: equal shapes, passes that are replayed, several of them before the host looks."""
    recorded = as_on_a_gpu(monkeypatch)
    llama = tiny(seed=3)
    expected = [greedy_by_hand(llama, prompt, 40, (5, 11, 30)) for prompt in LOOPS]
    assert generate(llama, LOOPS, 40, stop_ids=(5, 11, 30), draft=draft) == expected
    assert recorded and len(set(map(len, expected))) > 3
    assert (llama.tally["copied"] > 10) == (draft > 0)
    found = dict(model.stream(llama, LOOPS, 40, 3, stop_ids=(5, 11, 30), draft=draft))
    assert found == dict(enumerate(expected)), "three at a time"


def test_recorded_passes_sample_the_same(monkeypatch):
    llama = tiny(seed=3)
    options = dict(temperature=0.8, top_k=20, top_p=0.95, stop_ids=(5, 11), seed=list(range(8)))
    expected = generate(llama, PROMPTS, 30, **options)
    recorded = as_on_a_gpu(monkeypatch)
    assert generate(llama, PROMPTS, 30, **options) == expected and recorded


def test_copying_takes_fewer_passes():
    llama, passes = tiny(seed=4, vocab_size=3), []  # so few words that it soon repeats itself
    llama.lm_head.register_forward_hook(lambda *_: passes.append(1))
    counts = {}
    for draft in (0, 1, 7):
        passes.clear()
        generate(llama, [[1, 2]], 60, draft=draft)
        counts[draft] = len(passes)
    assert counts[0] == 60 and 30 <= counts[1] < 45 and counts[7] < 30


def test_copying_real_answers(shared):
    """A trained model on real dialogues, batches of unequal rows."""
    llama = Llama.from_pretrained(shared / "checkpoints/stories260K")
    tokenizer = model.load_tokenizer(shared / "checkpoints/stories260K", llama)
    texts = pandas_free(shared / "data/outputs/hh-rlhf/Claude-3.csv")
    prompts = [tokenizer.encode(text).ids[:length] for text, length in zip(texts, range(40, 400, 15))]
    stop_ids = [tokenizer.token_to_id(mark) for mark in "!?"]
    plain = generate(llama, prompts, 60, stop_ids=stop_ids)
    llama.tally.clear()
    assert generate(llama, prompts, 60, stop_ids=stop_ids, draft=15) == plain
    assert llama.tally["copied"] > 50 and len(set(map(len, plain))) > 3


def pandas_free(path):
    import csv
    with open(path, encoding="utf-8", newline="") as file:
        return [row["query"] + row["generated_text"] for row in csv.DictReader(file)][:24]


def test_a_guess_is_what_followed_the_same_two_tokens():
    copier = model.Copier([1, 2, 3, 4, 5, 9, 2, 3], {})
    assert copier.guess(3, alone=True) == [4, 5, 9] and copier.guess(2, alone=True) == [4, 5]
    copier.add(7)
    assert copier.guess(3, alone=True) == [], "3, 7 has not occurred"
    copier.add(2), copier.add(3)
    assert copier.guess(2, alone=True) == [7, 2], "the last time that 2, 3 occurred"
    longest = model.Copier([8, 1, 2, 50, 9, 1, 2, 60, 0, 8, 1, 2], {})
    assert longest.guess(1, alone=True) == [50], "8, 1, 2 agrees for longer than the later 9, 1, 2"
    assert model.Copier([6], {}).guess(4, alone=True) == []


def test_a_guess_ends_where_copying_has_ended():
    """Token 4 is a full stop, after which this model has mostly gone its own way."""
    habits = {}
    copier = model.Copier([1, 2, 3, 4, 5, 6, 7, 1, 2], habits)
    for _ in range(12):
        guess = copier.guess(4, alone=False)
        copier.learn(guess, guess.index(4) + 1)  # 3 and 4 come true, what follows 4 does not
    assert copier.guess(4, alone=False) == [3, 4]
    another = model.Copier([1, 2, 3, 4, 5, 6, 7, 1, 2], habits)
    assert another.guess(4, alone=False) == [3, 4], "another text of the same model"
    assert copier.guess(4, alone=True) == [3, 4, 5, 6], "where wrong guesses cost little"
    assert copier.guess(1, alone=False) == [] and copier.guess(1, alone=True) == [3], "one token is not worth a guess"


@pytest.fixture
def hopeful(monkeypatch):
    """Guesses that go on, however often they have been wrong and however little they win."""
    monkeypatch.setattr(model.Copier, "learn", lambda *_: None)
    monkeypatch.setattr(model.Copier, "worth", 0.0)


def test_sampling_with_copying_takes_the_same_chances(hopeful):
    llama = tiny(seed=3, vocab_size=12)
    loops = [[token % 12 for token in prompt] for prompt in LOOPS]
    options = dict(temperature=0.5, top_k=20, top_p=0.95, stop_ids=(5,), seed=list(range(8)))
    assert generate(llama, loops, 30, draft=7, **options) == generate(llama, loops, 30, **options)
    assert llama.tally["copied"] > 20


def always_right(row, verified, stop_ids, most):
    """The acceptance rule, broken: a guess is believed unseen."""
    row.new += [*row.guess, verified[-1]]
    row.wrong, row.finished = 0, len(row.new) >= most


@pytest.mark.parametrize("rule", [None, always_right], ids=["as it is", "broken"])
def test_copying_keeps_the_exact_distribution(rule, monkeypatch, hopeful):
    """Three tokens after a prompt in which every pair occurs: the chance of each triple, from full forwards."""
    llama, prompt, rows = tiny(seed=5, vocab_size=5), random_tokens(120, 5).tolist(), 20_000
    assert len(set(zip(prompt, prompt[1:]))) == 25
    expected = {(): float(rows)}
    with torch.no_grad():
        for _ in range(3):
            expected = {(*text, token): count * chance for text, count in expected.items() for token, chance in
                        probabilities_by_hand(llama(torch.tensor([prompt + list(text)]))[0, -1].tolist(), 1.5, 5,
                                              None).items()}
    if rule:
        monkeypatch.setattr(model.Row, "take", rule)
    texts = [text for start in range(0, rows, 1000)
             for text in generate(llama, [prompt] * 1000, 3, temperature=1.5, seed=start, draft=2)]
    counts = Counter(map(tuple, texts))
    statistic, limit = chi_square(counts, {key: value for key, value in expected.items() if value >= 5})
    if rule:
        assert statistic > 3 * limit
    else:
        assert statistic < limit and llama.tally["copied"] > 1000
        assert llama.tally["copied"] < llama.tally["written"] - rows, "some guesses were refused"


def test_what_all_prompts_begin_with_is_computed_once():
    llama, computed = tiny(seed=3), []
    prompts = [random_tokens(64, seed=9).tolist() + prompt for prompt in PROMPTS]
    expected = [generate(llama, [prompt], 20)[0] for prompt in prompts]
    llama.model.embed_tokens.register_forward_hook(lambda module, inputs, output: computed.append(output.size(1)))
    assert generate(llama, prompts, 20) == expected
    assert computed[:2] == [64, sum(map(len, PROMPTS))]
    computed.clear()
    twins = [*prompts[2:4], prompts[0], prompts[2], *prompts[:2], prompts[0]]
    assert generate(llama, twins, 20) == [expected[i] for i in (2, 3, 0, 2, 0, 1, 0)]
    assert computed[:2] == [64, sum(map(len, PROMPTS[:4]))], "nor is a prompt computed twice"


def test_long_batches_are_prefilled_in_parts():
    llama, computed = tiny(seed=3), []
    expected = [generate(llama, [prompt], 10)[0] for prompt in PROMPTS]
    cache = model.Cache(llama.config, len(PROMPTS), torch.float32, "cpu")
    llama.model.embed_tokens.register_forward_hook(lambda module, inputs, output: computed.append(output.size(1)))
    with torch.no_grad():
        first = model.prefill(llama, cache, PROMPTS, most=20).argmax(-1).tolist()
    assert first == [text[0] for text in expected] and cache.lengths == list(map(len, PROMPTS))
    assert computed == [7 + 1, 30, 2 + 2 + 13 + 1, 8], "in their order, at most 20 tokens unless one has more"


def probabilities_by_hand(logits, temperature, top_k, top_p):
    """The definition, in plain Python: scale, keep the k likeliest, then the fewest that together reach top_p."""
    weights = {token: math.exp(logit / temperature) for token, logit in enumerate(logits)}
    kept = sorted(weights, key=weights.get, reverse=True)[:top_k]
    total, mass, nucleus = sum(weights[token] for token in kept), 0.0, []
    for token in kept:
        if top_p is None or mass < top_p:
            nucleus.append(token)
        mass += weights[token] / total
    total = sum(weights[token] for token in nucleus)
    return {token: weights[token] / total for token in nucleus}


def chi_square(counts, expected):
    """(statistic, the value that chance exceeds once in about 300,000: Wilson and Hilferty's approximation)."""
    freedom = len(expected) - 1
    statistic = sum((counts[key] - value) ** 2 / value for key, value in expected.items())
    return statistic, freedom * (1 - 2 / (9 * freedom) + 4.5 * math.sqrt(2 / (9 * freedom))) ** 3


@pytest.mark.parametrize("temperature, top_k, top_p",
                         [(1.0, None, None), (0.7, None, None), (1.5, 5, None), (1.0, None, 0.8), (1.3, 6, 0.9)])
def test_sampled_pairs_have_their_exact_distribution(temperature, top_k, top_p):
    """Two tokens after one prompt: the chance of each pair is p(first) p(second | first), from full forwards."""
    llama, prompt, rows = tiny(seed=5, vocab_size=9), [3, 1, 4], 20_000
    expected = {}
    with torch.no_grad():
        first = probabilities_by_hand(llama(torch.tensor([prompt]))[0, -1].tolist(), temperature, top_k, top_p)
        for one, chance in first.items():
            logits = llama(torch.tensor([prompt + [one]]))[0, -1].tolist()
            for two, second in probabilities_by_hand(logits, temperature, top_k, top_p).items():
                expected[one, two] = rows * chance * second
    options = dict(temperature=temperature, top_k=top_k, top_p=top_p)
    counts = Counter(map(tuple, generate(llama, [prompt] * rows, 2, seed=7, **options)))
    assert counts.keys() <= expected.keys()
    rare = {key for key, value in expected.items() if value < 5}  # too few for the approximation: one class
    classes = {key: value for key, value in expected.items() if key not in rare}
    classes["rare"] = sum(expected[key] for key in rare) + 1e-9
    counts["rare"] = sum(counts[key] for key in rare)
    statistic, limit = chi_square(counts, classes)
    assert len(classes) > 5 and statistic < limit
    wrong = dict(zip(classes, [value * (1.1 if number % 2 else 0.9) for number, value in enumerate(classes.values())]))
    assert chi_square(counts, wrong)[0] > limit, "a tenth off would be seen"


def test_sampling_never_takes_what_has_no_chance():
    logits = torch.tensor([[-math.inf, 0.0, 0.0, -math.inf]] * 4)
    chance = torch.tensor([0.0, 0.499, 0.5, 1 - 2**-24])  # the ends of what torch.rand gives, and the middle
    assert model.sample(logits, chance, 1.0).tolist() == [1, 1, 2, 2]


@pytest.mark.cuda
def test_cuda_agrees_with_cpu():
    llama, tokens = tiny(seed=3), random_tokens(40)
    expected, texts = llama(tokens[None], LENGTHS), generate(llama, LOOPS, 60, stop_ids=(5, 11, 30))
    gradient = gradients(llama)["model.embed_tokens.weight"]
    llama.to("cuda")
    assert torch.allclose(llama(tokens[None].cuda(), LENGTHS).cpu(), expected, atol=1e-3)
    for draft in (0, 7):
        assert generate(llama, LOOPS, 60, stop_ids=(5, 11, 30), draft=draft) == texts
        assert dict(model.stream(llama, LOOPS, 60, 3, stop_ids=(5, 11, 30), draft=draft)) == dict(enumerate(texts))
    llama.zero_grad()
    token_logprobs(llama, tokens.cuda(), LENGTHS, ALL_TARGETS.cuda(), chunk=7).square().mean().backward()
    assert torch.allclose(llama.model.embed_tokens.weight.grad.cpu(), gradient, atol=1e-3 * gradient.abs().max())


@pytest.mark.cuda
@pytest.mark.parametrize("groups", [4, 2])
def test_cudas_kernel_for_documents_of_different_lengths(groups):
    kernel, generator = model.varlen_kernel(), torch.Generator("cuda").manual_seed(0)
    if kernel is None:
        pytest.skip("this PyTorch has none")
    q, k, v = (torch.randn(40, heads, 16, generator=generator, device="cuda").bfloat16().requires_grad_()
               for heads in (4, groups, groups))
    starts = torch.tensor([0, 5, 6, 23, 32, 40], dtype=torch.int32, device="cuda")
    found, expected = kernel(q, k, v, starts, 17), one_by_one(q, k, v, starts, 17)
    assert (found - expected).norm() < 0.02 * expected.norm()
    weights = torch.randn(found.shape, generator=generator, device="cuda").bfloat16()
    for one, other in zip(*(torch.autograd.grad(y, (q, k, v), weights) for y in (found, expected))):
        assert (one - other).norm() < 0.02 * other.norm()
