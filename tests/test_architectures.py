"""Qwen2, Qwen3 and Mistral: against transformers and peft, their definitions written out, and published numbers. Their
logits as transformers has published them are in test_model.py, with Llama's."""
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import checkpoint
import combine
import data
import lora
import parallel
import toy
import train
from common import UserError
from generate import generate
from model import Config, Llama, document_scores, logits
from model import generate as write_plainly
from test_checkpoint import weights_equal
from test_lora import stir
from test_model import LENGTHS, fixture_folder, packed_logits, random_tokens, tiny, weights_of

LAYERS = ["full_attention", "sliding_attention"]
FAMILIES = {
    "qwen2": dict(model_type="qwen2", tie_word_embeddings=True, rope_theta=1e3),
    "qwen2, window": dict(model_type="qwen2", sliding_window=48, layer_types=LAYERS, bos_token_id=None),
    "qwen3": dict(model_type="qwen3", head_dim=12, rms_norm_eps=1e-3, tie_word_embeddings=True),
    "qwen3, biases": dict(model_type="qwen3", attention_bias=True, num_key_value_heads=4, rope_theta=100.0),
    "mistral": dict(model_type="mistral", head_dim=6),
    "mistral, window": dict(model_type="mistral", sliding_window=48, rope_scaling=dict(rope_type="linear", factor=2.0)),
}
everywhere = pytest.mark.parametrize("name", FAMILIES)


def config_file(folder, **keys):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(keys))
    return folder / "config.json"


# ----------------------------------------------------------------------------------------------------------------
# The network


def by_hand(weights, config, tokens):
    """Logits (T, V) in fp64, one head and one token after another. What a model has no weights for, it does not do."""
    weights = {name: weight.double().numpy() for name, weight in weights.items()}
    half, sharing = config.head_dim // 2, config.num_attention_heads // config.num_key_value_heads

    def norm(x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + config.rms_norm_eps) * weights[f"{name}.weight"]

    def project(x, name):
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)

    def turned(head, place):  # each pair of channels is a complex number
        pairs = (head[:half] + 1j * head[half:]) * np.exp(1j * place * config.rope_theta ** (-np.arange(half) / half))
        return np.concatenate([pairs.real, pairs.imag])
    x = weights["model.embed_tokens.weight"][tokens]
    for layer in range(config.num_hidden_layers):
        name = f"model.layers.{layer}"
        y = norm(x, f"{name}.input_layernorm")
        q, k, v = (project(y, f"{name}.self_attn.{part}_proj").reshape(len(y), -1, config.head_dim) for part in "qkv")
        if f"{name}.self_attn.q_norm.weight" in weights:
            q, k = norm(q, f"{name}.self_attn.q_norm"), norm(k, f"{name}.self_attn.k_norm")
        mixed = np.zeros_like(q)
        for place, head in np.ndindex(*q.shape[:2]):
            query = turned(q[place, head], place)
            scores = np.array([query @ turned(k[past, head // sharing], past) for past in range(place + 1)])
            chances = np.exp(scores / config.head_dim ** 0.5)
            mixed[place, head] = chances / chances.sum() @ v[:place + 1, head // sharing]
        x = x + project(mixed.reshape(len(x), -1), f"{name}.self_attn.o_proj")
        y = norm(x, f"{name}.post_attention_layernorm")
        gate = project(y, f"{name}.mlp.gate_proj")
        x = x + project(gate / (1 + np.exp(-gate)) * project(y, f"{name}.mlp.up_proj"), f"{name}.mlp.down_proj")
    words = "lm_head.weight" if "lm_head.weight" in weights else "model.embed_tokens.weight"
    return norm(x, "model.norm") @ weights[words].T


@pytest.mark.parametrize("seed", range(12))
def test_logits_are_those_of_the_definition(seed):
    rng = np.random.default_rng(seed)
    shared = int(rng.choice([1, 2, 3]))
    config = dict(model_type=["llama", "qwen2", "qwen3", "mistral"][seed % 4], num_key_value_heads=shared,
                  num_attention_heads=shared * int(rng.choice([1, 2])), head_dim=2 * int(rng.integers(1, 7)),
                  rms_norm_eps=10 ** rng.uniform(-6, -1), rope_theta=10 ** rng.uniform(1, 5), hidden_size=20,
                  tie_word_embeddings=bool(rng.integers(2)))
    llama, tokens = tiny(seed, **config), random_tokens(13, seed=seed)
    with torch.no_grad():
        found = logits(llama, tokens[None])[0].double().numpy()
    np.testing.assert_allclose(found, by_hand(weights_of(llama), llama.config, tokens), rtol=1e-4, atol=1e-4)


def test_what_each_has_beside_a_llamas_weights():
    def beside(**changes):
        names = tiny(**changes).state_dict().keys() ^ tiny().state_dict().keys()
        return {name.removeprefix("model.layers.0.self_attn.") for name in names if "layers.1" not in name}
    biases = {f"{part}_proj.bias" for part in "qkv"}
    norms = {"q_norm.weight", "k_norm.weight"}
    assert beside(model_type="qwen2") == biases
    assert beside(model_type="qwen3") == norms
    assert beside(model_type="qwen3", attention_bias=True) == norms | biases | {"o_proj.bias"}
    assert not beside(model_type="mistral")


@everywhere
def test_documents_packed_and_texts_written_with_a_cache(name):
    llama, tokens = tiny(3, **FAMILIES[name]), random_tokens(40)
    with torch.no_grad():
        alone = torch.cat([logits(llama, document[None])[0] for document in tokens.split(LENGTHS)])
        assert torch.allclose(packed_logits(llama, tokens), alone, atol=1e-5)
    prompts = [random_tokens(length, seed=length).tolist() for length in (7, 1, 20, 2)]
    texts = write_plainly(llama, prompts, 20)
    assert generate(llama, prompts, 20) == texts == generate(llama, prompts, 20, draft=5)
    assert len(set(map(tuple, texts))) == len(prompts)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_from_scratch_biases_are_zero_and_norms_one(family):
    llama = Llama(Config(vocab_size=30, hidden_size=32, intermediate_size=40, num_attention_heads=4, head_dim=8,
                         num_key_value_heads=2, num_hidden_layers=1, model_type=family))
    attention = llama.model.layers[0].self_attn
    if family == "qwen2":
        assert not any(layer.bias.any() for layer in (attention.q_proj, attention.k_proj, attention.v_proj))
    else:
        assert attention.q_norm.weight.tolist() == attention.k_norm.weight.tolist() == [1.0] * 8
    queries, keys = (layer.weight.unflatten(0, (-1, 8)) for layer in (attention.q_proj, attention.k_proj))
    assert torch.cosine_similarity(queries[::2].flatten(), keys.flatten(), dim=0) > 0.8, "keys are drawn to queries"


# ----------------------------------------------------------------------------------------------------------------
# Windows


@pytest.mark.parametrize("form", ["v4", "v5"])
@pytest.mark.parametrize("case", ["mistral", "qwen2_window"])
def test_a_context_ends_where_a_window_would_hide_a_token(tmp_path, case, form):
    """transformers' logits with a window of 40 tokens: as ours up to there, and no further."""
    tokens, golden = fixture_folder(tmp_path, case, form)
    llama = checkpoint.load(tmp_path)
    assert (llama.config.max_position_embeddings, llama.config.sliding_window) == (40, 40)
    with torch.no_grad():
        wrong = (logits(llama, tokens[None])[0] - golden).abs().amax(-1)
    assert wrong[:40].max() < 1e-4 and wrong[40:].min() > 1e-3


NEEDED = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=16,
              max_position_embeddings=1000, num_key_value_heads=8)
SLIDING, FULL = ["sliding_attention"] * 4, ["full_attention"] * 4
WINDOWS = [  # of a config.json -> the context, and the window in Config
    (dict(model_type="mistral", sliding_window=300), 300, 300),
    (dict(model_type="mistral", sliding_window=None), 1000, None),
    (dict(model_type="mistral", max_position_embeddings=9000), 4096, 4096),
    (dict(model_type="mistral", sliding_window=1001), 1000, 1001),
    (dict(sliding_window=300), 1000, None), (dict(sliding_window=300, use_sliding_window=False), 1000, None),
    (dict(sliding_window=None, use_sliding_window=True, max_window_layers=0), 1000, None),
    (dict(sliding_window=300, use_sliding_window=True), 1000, None),
    (dict(sliding_window=300, use_sliding_window=True, max_window_layers=4), 1000, None),
    (dict(sliding_window=300, use_sliding_window=True, max_window_layers=3), 300, 300),
    (dict(use_sliding_window=True, max_window_layers=3, max_position_embeddings=9000), 4096, 4096),
    (dict(sliding_window=300, use_sliding_window=True, max_window_layers=0, layer_types=FULL), 1000, None),
    (dict(sliding_window=300, use_sliding_window=True, layer_types=SLIDING), 300, 300),
    (dict(sliding_window=300, use_sliding_window=False, layer_types=SLIDING), 1000, None),
]


@pytest.mark.parametrize("keys, context, window", WINDOWS, ids=str)
def test_which_windows_are_on(tmp_path, keys, context, window):
    for family in [keys["model_type"]] if "model_type" in keys else ["qwen2", "qwen3"]:
        config = checkpoint.read_config(config_file(tmp_path, **NEEDED | {"model_type": family, "head_dim": 2} | keys))
        assert (config.max_position_embeddings, config.sliding_window) == (context, window)
        assert (config.layer_types is not None) == (window is not None and family != "mistral")


@pytest.mark.parametrize("keys, context, window", WINDOWS, ids=str)
def test_transformers_has_the_same_windows_on(tmp_path, keys, context, window):
    transformers = pytest.importorskip("transformers")
    config_file(tmp_path, **NEEDED | {"model_type": "qwen2"} | keys)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    kinds = getattr(theirs, "layer_types", None)  # a Mistral has none: the window is in all
    assert (theirs.sliding_window if kinds is None or "sliding_attention" in kinds else None) == window
    if window:
        assert checkpoint.read_config(tmp_path / "config.json").layer_types == kinds


def test_examples_beyond_a_window_are_refused_and_no_others(capsys):
    tokenizer, options = toy.train_tokenizer(["answer"], 300), train.Options(val_share=0.0)
    short, whole, longer = ({"prompt": "", "completion": "answer " * count} for count in (5, 30, 31))
    window, more = (len(data.encode_document(tokenizer, **row, bos_id=1, eos_id=2).ids) for row in (whole, longer))
    config = Config(vocab_size=300, max_position_embeddings=32, sliding_window=window)
    assert 32 < window < more and config.max_position_embeddings == 32
    train.prepare("sft", [short, whole], tokenizer, config, options)
    assert f"context grows from 32 tokens to {window}" in capsys.readouterr().out
    assert config.max_position_embeddings == window
    said = f"^sft: an example has {more} tokens, more than .* sliding_window, .* --max-tokens {window}$"
    for rows, texts in (([short, longer], ()), ([short, whole], [longer["completion"]])):
        with pytest.raises(UserError, match=said):
            train.prepare("sft", rows, tokenizer, config, options, texts)
    train.prepare("sft", [short, whole, longer], tokenizer, config, train.Options(val_share=0.0, max_tokens=window))
    assert "1 of 3 examples left out" in capsys.readouterr().out and config.max_position_embeddings == window


def test_held_out_examples_beyond_a_window_are_refused_too():
    tokenizer, options = toy.train_tokenizer(["answer"], 300), train.Options(val_share=0.5, seed=1)
    rows = [{"prompt": f"{number}", "completion": "answer"} for number in range(20)]
    held_out = next(row for row in rows if data.is_held_out(row, 0.5, 1))
    config = Config(vocab_size=300, max_position_embeddings=32, sliding_window=40)
    assert train.prepare("sft", rows, tokenizer, config, options).held_out
    held_out["completion"] = "answer " * 40
    with pytest.raises(UserError, match="sliding_window"):
        train.prepare("sft", rows, tokenizer, config, options)


def test_an_adapter_does_not_lead_beyond_the_window_of_its_base(tmp_path):
    checkpoint.save(tiny(model_type="mistral", sliding_window=64, max_position_embeddings=32), tmp_path / "base")
    llama = lora.add_lora(checkpoint.load(tmp_path / "base"), 2, tmp_path / "base")
    llama.config.max_position_embeddings = 64
    checkpoint.save(llama, tmp_path / "adapter")
    assert checkpoint.load(tmp_path / "adapter").config.max_position_embeddings == 64
    context = json.loads((tmp_path / "adapter/context.json").read_text())
    (tmp_path / "adapter/context.json").write_text(json.dumps(context | {"max_position_embeddings": 65}))
    with pytest.raises(UserError, match="max_position_embeddings is 65, not a whole number from 1 to 64"):
        checkpoint.load(tmp_path / "adapter")


# ----------------------------------------------------------------------------------------------------------------
# Configurations, with the number of parameters that each model is published with

QWEN25 = {"architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
          "eos_token_id": 151645, "hidden_act": "silu", "hidden_size": 3584, "initializer_range": 0.02,
          "intermediate_size": 18944, "max_position_embeddings": 32768, "max_window_layers": 28, "model_type": "qwen2",
          "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06,
          "rope_theta": 1000000.0, "sliding_window": 131072, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
          "use_cache": True, "use_sliding_window": False, "vocab_size": 152064}
QWEN3 = {**QWEN25, "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "head_dim": 128, "hidden_size": 4096,
         "intermediate_size": 12288, "max_position_embeddings": 40960, "max_window_layers": 36, "model_type": "qwen3",
         "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8, "rope_scaling": None,
         "rope_theta": 1000000, "sliding_window": None, "vocab_size": 151936}
MISTRAL = {"architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
           "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336, "model_type": "mistral",
           "max_position_embeddings": 32768, "num_attention_heads": 32, "num_hidden_layers": 32,
           "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096,
           "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 32000}
PUBLISHED = {  # parameters, context, head_dim
    "Qwen2.5 7B": (QWEN25, 7_615_616_512, 32768, 128),
    "Qwen2.5 0.5B": (QWEN25 | {"hidden_size": 896, "intermediate_size": 4864, "max_window_layers": 21,
                               "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2,
                               "sliding_window": 32768, "tie_word_embeddings": True, "vocab_size": 151936},
                     494_032_768, 32768, 64),
    "Qwen3 8B": (QWEN3, 8_190_735_360, 40960, 128),
    "Qwen3 0.6B": (QWEN3 | {"hidden_size": 1024, "intermediate_size": 3072, "max_window_layers": 28,
                            "num_attention_heads": 16, "num_hidden_layers": 28, "tie_word_embeddings": True},
                   596_049_920, 40960, 128),
    "Mistral 7B v0.1": (MISTRAL, 7_241_732_096, 4096, 128),
    "Mistral 7B v0.3": (MISTRAL | {"sliding_window": None, "rope_theta": 1000000.0, "vocab_size": 32768},
                        7_248_023_552, 32768, 128),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_real_configurations(tmp_path, name):
    raw, parameters, context, head_dim = PUBLISHED[name]
    config = checkpoint.read_config(config_file(tmp_path, **raw))
    assert (config.max_position_embeddings, config.head_dim) == (context, head_dim)
    assert config.rope_theta == raw["rope_theta"] and config.stop_ids == (raw["eos_token_id"],)
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in Llama(config).parameters()) == parameters


@pytest.mark.parametrize("raw, changes, said", [
    *((QWEN25, {"model_type": other}, f"model_type = '{other}'") for other in ("qwen2_moe", "qwen2_vl", "qwen3_moe")),
    (QWEN25, {"model_type": ["qwen2"]}, "model_type = a list"),
    (QWEN25, {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}}, "= 'yarn'"),
    (QWEN25, {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}, "type = 'mrope'; mrope_section"),
    (QWEN25, {"rope_parameters": {"rope_type": "default", "mrope_section": [8, 8, 8]}}, "mrope_section = a list"),
    (QWEN25, {"use_mrope": True}, "use_mrope = True"), (QWEN25, {"attention_bias": True}, "attention_bias = True"),
    (QWEN25, {"mlp_bias": True}, "mlp_bias = True; use a plain Llama, Qwen2, Qwen3 or Mistral"),
    (QWEN3, {"mlp_bias": True}, "mlp_bias = True"), (QWEN3, {"attention_bias": "yes"}, "attention_bias is 'yes', not"),
    (QWEN3, {"num_local_experts": 8}, "num_local_experts = 8"),
    (MISTRAL, {"attention_bias": True, "use_sliding_window": True}, "attention_bias = True; use_sliding_window = True"),
    (MISTRAL | {"model_type": "llama"}, {}, "sliding_window = 4096"),
    (MISTRAL | {"model_type": "llama"}, {"sliding_window": None, "use_sliding_window": True}, "use_sliding_window = T"),
    *((MISTRAL, {"sliding_window": window}, f"sliding_window is {window!r}, not a whole number from 1 to")
      for window in (0, -1, "4096", True, 4096.5)),
    (QWEN25, {"use_sliding_window": 1}, "use_sliding_window is 1, not true or false"),
    (QWEN25, {"max_window_layers": -1}, "max_window_layers is -1, not a whole number from 0 to"),
    (QWEN25, {"layer_types": "full"}, "layer_types is 'full', not a list"),
    *((QWEN25, {"layer_types": [*["full_attention"] * count, *more]}, "layer_types is ")
      for count, more in ((27, []), (29, []), (27, ["chunked_attention"]), (27, [None]), (27, [["full_attention"]]))),
], ids=lambda x: str(x)[-60:])
def test_configurations_that_are_refused(tmp_path, raw, changes, said):
    path = config_file(tmp_path, **raw | changes)
    with pytest.raises(UserError) as error:
        checkpoint.read_config(path)
    message = str(error.value)
    assert said in message and str(path) in message and "\n" not in message and len(message) < 600 + len(str(path))


@pytest.mark.parametrize("family", checkpoint.ARCHITECTURES)
def test_an_absent_key_means_what_it_means_to_transformers(tmp_path, family):
    transformers = pytest.importorskip("transformers")
    needed = dict(vocab_size=64, hidden_size=128, intermediate_size=48, num_hidden_layers=4, num_attention_heads=32)
    config_file(tmp_path, model_type=family, **needed)
    ours, theirs = checkpoint.read_config(tmp_path / "config.json"), transformers.AutoConfig.from_pretrained(tmp_path)
    names = ["num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "bos_token_id", "eos_token_id"]
    assert {name: getattr(ours, name) for name in names} == {name: getattr(theirs, name) for name in names}
    assert ours.sliding_window == getattr(theirs, "sliding_window", None)
    assert ours.head_dim == getattr(theirs, "head_dim", 4)
    assert ours.max_position_embeddings == min(theirs.max_position_embeddings, ours.sliding_window or 2**31)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]


# ----------------------------------------------------------------------------------------------------------------
# Folders: as they were, whatever has been done to the weights

CLASSES = {"qwen2": "Qwen2", "qwen3": "Qwen3", "mistral": "Mistral"}


@everywhere
def test_a_model_is_saved_as_what_it_was(tmp_path, name):
    llama, family = tiny(**FAMILIES[name]), FAMILIES[name]["model_type"]
    checkpoint.save(llama, tmp_path)
    again = checkpoint.load(tmp_path)
    assert weights_equal(llama, again) and again.config == llama.config
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["architectures"] == [f"{CLASSES[family]}ForCausalLM"] and raw["model_type"] == family
    keys = {"attention_bias", "mlp_bias", "sliding_window", "use_sliding_window", "layer_types"} & raw.keys()
    windows = {"sliding_window", "use_sliding_window", "layer_types"}
    assert keys == {"qwen2": windows, "qwen3": windows | {"attention_bias"}, "mistral": {"sliding_window"}}[family]


@everywhere
def test_transformers_loads_what_is_saved_and_we_what_it_saves(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    ours = tiny(5, **FAMILIES[name])
    checkpoint.save(ours, tmp_path / "ours")
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    assert type(theirs).__name__ == f"{CLASSES[ours.config.model_type]}ForCausalLM"
    tokens = random_tokens(96).view(2, 48)
    with torch.no_grad():
        assert torch.allclose(logits(ours, tokens), theirs(tokens).logits, atol=1e-5)
        alone = torch.cat([theirs(document[None]).logits[0] for document in tokens[0, :40].split(LENGTHS)])
        assert torch.allclose(packed_logits(ours, tokens[0, :40]), alone, atol=1e-5)
        longer = random_tokens(64)[None]
        wrong = (logits(ours, longer) - theirs(longer).logits).abs().amax(-1)[0]
        assert bool(wrong[48:].min() > 1e-3) == ("window" in name) and wrong[:48].max() < 1e-4
    prompts = [random_tokens(length, seed=length).tolist() for length in (1, 9, 30)]
    for prompt, text in zip(prompts, generate(ours, prompts, 18)):
        expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=18, do_sample=False, eos_token_id=None,
                                   pad_token_id=0)
        assert expected[0, len(prompt):].tolist() == text
    theirs.save_pretrained(tmp_path / "theirs")
    again = checkpoint.load(tmp_path / "theirs")
    assert weights_equal(again, ours) and again.config == ours.config


@everywhere
def test_preference_models(tmp_path, name):
    llama = stir(tiny(**FAMILIES[name], num_labels=1))
    checkpoint.save(llama, tmp_path / "pm")
    raw = json.loads((tmp_path / "pm/config.json").read_text())
    assert raw["architectures"] == [f"{CLASSES[raw['model_type']]}ForSequenceClassification"]
    with pytest.raises(UserError, match="is a preference model"):
        checkpoint.load(tmp_path / "pm")
    again, tokens = checkpoint.load(tmp_path / "pm", scorer=True), random_tokens(40)
    assert weights_equal(again, llama) and again.config == llama.config
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "pm")
    with torch.no_grad():
        expected = torch.cat([theirs(document[None]).logits[:, 0] for document in tokens.split(LENGTHS)])
        assert torch.allclose(document_scores(llama, tokens, LENGTHS)[0], expected, atol=1e-5)


@pytest.mark.parametrize("bos, eos, padding", [(0, 2, 0), (2, 2, 0), (3, [0, 3], 1), (None, 2, 0), (1, None, 1)])
def test_a_token_that_ends_texts_is_no_padding(tmp_path, bos, eos, padding):
    """transformers reads the score at the last token that is not padding; a Qwen base model's BOS is its EOS."""
    checkpoint.save(tiny(model_type="qwen2", num_labels=1, bos_token_id=bos, eos_token_id=eos), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["pad_token_id"] == padding


@everywhere
def test_adapters_leave_biases_and_norms_alone(tmp_path, name):
    base, tokens = tmp_path / "base", random_tokens(40)
    checkpoint.save(tiny(7, **FAMILIES[name]), base)
    llama = stir(lora.add_lora(checkpoint.load(base), 4, base))
    assert all("lora_" in name for name in parallel.trained(llama)) and len(parallel.trained(llama)) == 2 * 7 * 2
    checkpoint.save(llama, tmp_path / "adapter")
    merged, plain = checkpoint.load(tmp_path / "adapter"), weights_of(checkpoint.load(base))
    with torch.no_grad():
        expected = logits(llama, tokens[None])
        assert torch.allclose(logits(merged, tokens[None]), expected, atol=1e-4)
    kept = [name for name, weight in merged.named_parameters() if torch.equal(weight, plain[name])]
    assert set(kept) == {name for name in plain if "proj.weight" not in name}
    checkpoint.merge(tmp_path / "adapter")
    assert checkpoint.read_config(tmp_path / "adapter/config.json") == checkpoint.read_config(base / "config.json")


@everywhere
def test_peft_loads_ours_and_we_load_theirs(tmp_path, name):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base, tokens = tmp_path / "base", random_tokens(40)
    checkpoint.save(tiny(7, **FAMILIES[name]), base)
    checkpoint.save(stir(lora.add_lora(checkpoint.load(base), 4, base)), tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), tmp_path / "ours")
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens[None]).logits,
                                   logits(checkpoint.load(tmp_path / "ours"), tokens[None]), rtol=1e-4, atol=1e-4)
    theirs = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(
        task_type="CAUSAL_LM", r=3, lora_alpha=5, target_modules="all-linear", init_lora_weights=False))
    theirs.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens[None]).logits,
                                   logits(checkpoint.load(tmp_path / "theirs"), tokens[None]), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two models of each architecture, and a Llama, with one tokenizer."""
    top = tmp_path_factory.mktemp("models")
    tokenizer = toy.train_tokenizer(["some words of some texts"], 300)
    kinds = {name: keys | {"bos_token_id": 1, "head_dim": 8} for name, keys in FAMILIES.items()} | {"llama": {}}
    for name, keys in kinds.items():
        for seed in (1, 2):
            llama = tiny(seed, vocab_size=300, max_position_embeddings=256, **keys)
            checkpoint.save(llama, top / f"{name} {seed}")
            tokenizer.save(str(top / f"{name} {seed}/tokenizer.json"))
    return top


@everywhere
def test_soups(folders, tmp_path, name):
    pair = [folders / f"{name} 1", folders / f"{name} 2"]
    combine.run_soup(pair, [0.3, 0.7], tmp_path / "soup")
    one, other = (load_file(folder / "model.safetensors") for folder in pair)
    found = load_file(tmp_path / "soup/model.safetensors")
    assert found.keys() == one.keys()
    for key in found:
        torch.testing.assert_close(found[key], 0.3 * one[key] + 0.7 * other[key])
    assert (tmp_path / "soup/config.json").read_text() == (pair[0] / "config.json").read_text()
    for alien in {"llama", "qwen2", "qwen3", "mistral"} - {name}:
        with pytest.raises(UserError, match=f"{alien} 2: has another .*(model_type|sliding_window|attention_bias)"):
            combine.run_soup([pair[0], folders / f"{alien} 2"], [0.3, 0.7], tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_product_of_several_architectures(folders):
    """Its next token's log-probabilities are the weighted sum of theirs, up to a number."""
    llamas = [checkpoint.load(folders / name) for name in ("qwen2 1", "qwen3 1", "mistral, window 1", "llama 1")]
    weights, tokens = [0.4, 0.3, 0.2, 0.1], random_tokens(40, 300)
    product = combine.Product(llamas, weights)
    with torch.no_grad():
        expected = sum(w * logits(llama, tokens[None])[0].log_softmax(-1) for w, llama in zip(weights, llamas))
        found = product.lm_head(product(tokens[None]))[0]
    torch.testing.assert_close(found.softmax(-1), expected.softmax(-1))
    assert product.config.max_position_embeddings == 48
    assert generate(product, [[5, 6, 7]], 12) == write_plainly(product, [[5, 6, 7]], 12)


def test_a_reference_whose_window_ends_sooner_is_refused(folders, tmp_path):
    (tmp_path / "rated.jsonl").write_text(json.dumps(
        {"prompt": "some", "responses": [{"text": " words", "scores": {"short": 1}}]}) + "\n")
    with pytest.raises(UserError, match="mistral, window 1: has another sliding_window than"):
        combine.run_implicit(folders / "llama 1", folders / "mistral, window 1", 0.1, "new", [tmp_path / "rated.jsonl"],
                             tmp_path / "out.jsonl", None)


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "mistral, window"])
def test_a_short_training_learns_and_keeps_the_architecture(folders, tmp_path, name):
    options = train.Options(lr=1e-2, batch=4, epochs=6, val_share=0.0, precision="fp32", save_seconds=1e9)
    base = folders / f"{name} 1"
    llama, tokenizer = checkpoint.load(base), checkpoint.load_tokenizer(base)
    before = weights_of(llama)
    rows = [{"prompt": "some", "completion": f" words of texts {i}"} for i in range(8)]
    stage = train.prepare("sft", rows, tokenizer, llama.config, options)
    losses = [row["loss"] for row in train.train(llama, tokenizer, [stage], tmp_path / "out", options, progress=False)]
    assert losses[-1] < losses[0] / 2
    after = checkpoint.load(tmp_path / "out")
    assert after.config == checkpoint.load(base).config
    assert not [key for key, weight in after.named_parameters() if torch.equal(weight, before[key])], "all are trained"
