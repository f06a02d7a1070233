"""model.py against transformers' logits, a published text, brute force."""
import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoint
import model
from common import UserError
from model import Config, Llama, Packed, logits, token_logprobs

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
    llama = checkpoint.load(tmp_path)
    with torch.no_grad():
        found = logits(llama, tokens[None])[0]
    assert found.dtype == torch.float32
    assert (found - golden)[:llama.config.max_position_embeddings].abs().max() < 1e-4


@pytest.mark.parametrize("case, key, value", [
    ("llama3", "rope_scaling", None), ("linear", "rope_scaling", None), ("linear_old_key", "rope_scaling", None),
    ("llama3", "rope_theta", 10000.0), ("tied", "rms_norm_eps", 1e-5)])
def test_the_golden_logits_can_tell(tmp_path, case, key, value):
    """Were a number of the configuration ignored, the test above would fail."""
    tokens, golden = fixture_folder(tmp_path, case)
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[case]["v4"] | {key: value}))
    with torch.no_grad():
        assert (logits(checkpoint.load(tmp_path), tokens[None])[0] - golden).abs().max() > 1e-2


def test_llama3_scaling_in_each_of_its_three_bands():
    frequencies = model.rope_frequencies(Config(**{key: value for key, value in CONFIGS["llama3"]["v4"].items()
                                                   if key in Config.__dataclass_fields__}))
    blend = (32 * 100 ** -0.25 / (2 * math.pi) - 1) / (4 - 1)  # of the second one, 1.6 turns in the old context
    expected = [1.0, 100 ** -0.25 * (blend + (1 - blend) / 8), 100 ** -0.5 / 8, 100 ** -0.75 / 8]
    assert frequencies.tolist() == pytest.approx(expected, rel=1e-6)


def test_logits_of_the_real_checkpoint(shared):
    golden = load_file(FIXTURES / "stories260K.safetensors")
    llama = checkpoint.load(shared / "checkpoints/stories260K")
    with torch.no_grad():
        assert (logits(llama, golden["tokens"][None])[0, ::8] - golden["logits"]).abs().max() < 1e-4


def test_published_greedy_text(shared):
    folder = shared / "checkpoints/stories260K"
    llama = checkpoint.load(folder)
    tokens, = model.generate(llama, [[1]], 256)
    assert len(tokens) == 256
    text = checkpoint.load_tokenizer(folder, llama).decode(tokens)
    assert text + "\n" == (folder / "published-greedy.txt").read_text(encoding="utf-8")  # the newline ends the file


# ----------------------------------------------------------------------------------------------------------------
# Packed documents

LENGTHS = [5, 1, 17, 9, 8]  # 40 tokens
ALL_TARGETS = torch.tensor([place for place in range(40) if place not in (0, 5, 6, 23, 32)])


def packed_logits(llama, tokens, lengths=LENGTHS):
    return logits(llama, tokens[None], Packed(lengths, "cpu"))[0]


def test_packed_documents_are_computed_as_if_alone():
    llama = tiny(rope_theta=100.0)
    tokens = random_tokens(40)
    alone = torch.cat([logits(llama, document[None])[0] for document in tokens.split(LENGTHS)])
    assert torch.allclose(packed_logits(llama, tokens), alone, atol=1e-5)
    both = logits(llama, tokens.expand(2, -1), Packed(LENGTHS, "cpu"))
    assert torch.allclose(both, alone.expand(2, -1, -1), atol=1e-5), "in each of two rows"
    plain = logits(llama, tokens[None])[0]
    assert torch.allclose(plain[:5], alone[:5], atol=1e-5) and (plain[5:] - alone[5:]).abs().max() > 0.1


def test_packed_gradients_are_those_of_the_documents_alone():
    llama, tokens = tiny(), random_tokens(40)
    weighting = torch.randn(40, 40, generator=torch.Generator().manual_seed(1))
    (packed_logits(llama, tokens) * weighting).sum().backward()
    packed = {name: parameter.grad for name, parameter in llama.named_parameters()}
    llama.zero_grad()
    for document, weights in zip(tokens.split(LENGTHS), weighting.split(LENGTHS)):
        (logits(llama, document[None])[0] * weights).sum().backward()
    for name, parameter in llama.named_parameters():
        assert torch.allclose(packed[name], parameter.grad, rtol=1e-4, atol=1e-4 * parameter.grad.abs().max()), name


def test_one_document_never_changes_another():
    llama, tokens = tiny(), random_tokens(40)
    before = packed_logits(llama, tokens).split(LENGTHS)
    for changed in range(len(LENGTHS)):
        documents = list(tokens.split(LENGTHS))
        documents[changed] = (documents[changed] + 1) % 40
        after = packed_logits(llama, torch.cat(documents)).split(LENGTHS)
        for other in range(len(LENGTHS)):
            assert torch.equal(before[other], after[other]) == (other != changed)


def test_documents_of_any_lengths_attend_together_with_their_like():
    """Lengths on both sides of the places where they are rounded, in any order."""
    lengths, llama = [15, 16, 17, 64, 65, 1, 130, 2], tiny(max_position_embeddings=256)
    tokens = random_tokens(sum(lengths))
    alone = torch.cat([logits(llama, document[None])[0] for document in tokens.split(lengths)])
    assert torch.allclose(packed_logits(llama, tokens, lengths), alone, atol=1e-5)
    groups = model.groups_of(lengths, "cpu")
    assert [shape for *_, shape in groups] == [(2, 16), (1, 32), (1, 64), (1, 128), (1, 16), (1, 192), (1, 16)]


def test_positions_restart():
    assert Packed([3, 1, 2], "cpu").positions.tolist() == [[0, 1, 2, 0, 0, 1]]


# ----------------------------------------------------------------------------------------------------------------
# Log-probabilities


def test_token_logprobs_are_those_of_the_full_logits():
    llama, tokens = tiny(), random_tokens(40)
    firsts = [0, 5, 6, 23, 32]
    targets = torch.tensor([place for place in range(40) if place not in firsts and place % 3 > 0])
    rows = torch.cat([logits(llama, document[None])[0] for document in tokens.split(LENGTHS)])
    expected = [rows[place - 1].log_softmax(-1)[tokens[place]].item() for place in targets]
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


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 4}, {"head_dim": 6}, {"model_type": "qwen2"},
                                     {"model_type": "qwen3"}], ids=str)
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


@pytest.mark.cuda
def test_cuda_agrees_with_cpu():
    llama, tokens = tiny(seed=3), random_tokens(40)
    expected = packed_logits(llama, tokens).detach()
    gradient = gradients(llama)["model.embed_tokens.weight"]
    llama.to("cuda")
    found = logits(llama, tokens[None].to("cuda"), Packed(LENGTHS, "cuda"))[0]
    assert torch.allclose(found.cpu(), expected, atol=1e-3)
    llama.zero_grad()
    token_logprobs(llama, tokens.to("cuda"), LENGTHS, ALL_TARGETS.to("cuda"), chunk=7).square().mean().backward()
    assert torch.allclose(llama.model.embed_tokens.weight.grad.cpu(), gradient, atol=1e-3 * gradient.abs().max())


# ----------------------------------------------------------------------------------------------------------------
# Writing, the plain way


def test_plain_greedy_writing_takes_the_likeliest_token():
    llama = tiny(seed=3)
    text, = model.generate(llama, [[7, 1, 30]], 12)
    for place in range(12):
        with torch.no_grad():
            assert text[place] == logits(llama, torch.tensor([[7, 1, 30, *text[:place]]]))[0, -1].argmax()
    stop = text[5]
    assert model.generate(llama, [[7, 1, 30], [2]], 12, stop_ids=(stop,))[0] == text[:text.index(stop)]


def test_plain_sampling_has_the_models_distribution():
    """A single token, by its seed, over 4,000 seeds."""
    llama, prompt = tiny(seed=5, vocab_size=6), [3, 1, 4]
    with torch.no_grad():
        expected = (logits(llama, torch.tensor([prompt]))[0, -1] / 1.5).softmax(-1)
    counts = Counter(text[0] for text in model.generate(llama, [prompt] * 4000, 1, temperature=1.5, seed=1))
    for token, chance in enumerate(expected.tolist()):
        assert abs(counts[token] - 4000 * chance) < 4.5 * math.sqrt(4000 * chance * (1 - chance)) + 1
    again = model.generate(llama, [prompt] * 5, 8, temperature=1.5, seed=[4, 1, 4, 2, 9])
    assert again[0] == again[2] != again[1], "a text depends on its seed alone"


@pytest.mark.parametrize("name, said", [("abacus", "--device abacus: cannot be used here"), ("cuda:99", "cuda:99")])
def test_a_device_that_is_not_there(name, said):
    with pytest.raises(UserError, match=said):
        model.device_named(name)
