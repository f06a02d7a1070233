"""Writes tests/fixtures: what Hugging Face's transformers computes with small models, for test_model.py.

    python -m pip install torch transformers safetensors tokenizers
    python tests/make_fixtures.py

Per case: NAME.safetensors has the weights under their Hugging Face names, "tokens" (T,) and "logits" (T, V) fp32;
configs.json has the config.json in the form of transformers 4 (`v4`, written below by hand) and as the installed
transformers 5 saves it (`v5`). The weights are random but larger than at the start of a training, so that positions,
biases and norms all show in the logits; they are rounded to bfloat16 to be small, and used in fp32.
"""
import json
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

FIXTURES = Path(__file__).parent / "fixtures"
STORIES = Path(__file__).parents[2] / "shared" / "checkpoints" / "stories260K"
STEPS = 48  # tokens; beyond original_max_position_embeddings below

BASE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 16,
    "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "vocab_size": 32, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "rope_scaling": None, "attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False, "pretraining_tp": 1,
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32", "use_cache": True,
}
# The four angles per step with theta 100 and head_dim 8 are 1, 0.32, 0.1, 0.03: in a context of 32 tokens these make
# 5.1, 1.6, 0.5 and 0.2 turns, so that llama3 keeps the first, blends the second and stretches the others.
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}
CASES = {
    "plain": {},
    "tied": {"tie_word_embeddings": True, "rms_norm_eps": 1e-2},
    "grouped": {"num_attention_heads": 4, "num_key_value_heads": 2, "rope_theta": 500.0},
    "head_dim": {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 12},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "linear_old_key": {"rope_scaling": {"type": "linear", "factor": 2.5}},
    "llama3": {"rope_scaling": LLAMA3, "rope_theta": 100.0, "num_attention_heads": 4, "num_key_value_heads": 2,
               "head_dim": 8, "tie_word_embeddings": True, "eos_token_id": [2, 3]},
}
KIN = {  # a window that is off, a head_dim of its own, a window of fewer tokens than there are, one in one layer of two
    "qwen2": {"num_attention_heads": 4, "rope_theta": 1000.0, "tie_word_embeddings": True, "use_sliding_window": False,
              "sliding_window": 32, "max_window_layers": 1, "use_mrope": False},
    "qwen3": {"num_key_value_heads": 1, "head_dim": 12, "rms_norm_eps": 1e-2, "attention_bias": False,
              "use_sliding_window": False, "sliding_window": None, "max_window_layers": 2},
    "mistral": {"num_attention_heads": 4, "head_dim": 8, "sliding_window": 40},
    "qwen2_window": {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 1},
}
CASES |= {case: {"model_type": case.split("_")[0], "architectures": [f"{case.split('_')[0].capitalize()}ForCausalLM"],
                 **changes} for case, changes in KIN.items()}
LLAMAS_OWN = ("attention_bias", "mlp_bias", "pretraining_tp")


def randomise(llama, generator):
    for name, parameter in llama.named_parameters():
        middle = 1.0 if "norm" in name else 0.0
        values = middle + 0.35 * torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(values.bfloat16().float())


def case(name, v4, seed):
    generator = torch.Generator().manual_seed(seed)
    llama = AutoModelForCausalLM.from_config(AutoConfig.for_model(**v4)).float().eval()
    randomise(llama, generator)
    tokens = torch.randint(3, v4["vocab_size"], (STEPS,), generator=generator)
    with torch.no_grad():
        logits = llama(tokens[None]).logits[0].float()
    weights = {key: value.detach().bfloat16().contiguous() for key, value in llama.named_parameters()}
    save_file(weights | {"tokens": tokens, "logits": logits}, FIXTURES / f"{name}.safetensors")
    with tempfile.TemporaryDirectory() as folder:
        llama.config.save_pretrained(folder)
        return {"v4": v4, "v5": json.loads((Path(folder) / "config.json").read_text())}


def stories():
    """Logits of the real checkpoint at every eighth position of 128 random tokens."""
    llama = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32).eval()
    tokens = torch.randint(3, 512, (128,), generator=torch.Generator().manual_seed(260))
    with torch.no_grad():
        logits = llama(tokens[None]).logits[0, ::8].contiguous()
    save_file({"tokens": tokens, "logits": logits}, FIXTURES / "stories260K.safetensors")


def main():
    FIXTURES.mkdir(exist_ok=True)
    plain = {key: value for key, value in BASE.items() if key not in LLAMAS_OWN}
    configs = {name: case(name, (plain if name in KIN else BASE) | changes, seed)
               for seed, (name, changes) in enumerate(CASES.items())}
    (FIXTURES / "configs.json").write_text(json.dumps(configs, indent=1) + "\n")
    if STORIES.is_dir():
        stories()
    else:
        print(f"{STORIES} is absent: stories260K.safetensors is left as it is", file=sys.stderr)


if __name__ == "__main__":
    main()
