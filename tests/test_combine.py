"""What is joined after training: against models taken alone, sums over all that can be said, and the losses."""
import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import checkpoint
import combine
import data
import feedback
import folders
import formats
import generate as engine
import lora
import methods
import model
import toy
import train
from combine import Product, best_of, shares
from common import UserError
from conftest import refused, response, run, write
from model import Config, Llama
from train import METHODS, Options

PROMPTS = [[3, 4, 5, 6], [7], [8, 9, 3, 4, 5, 6, 11, 12, 13, 14], [2, 2], [20, 21, 22]]


def tiny(seed, vocab_size=40, **changes):
    """A small random model whose weights are large enough for every token before to matter."""
    sizes = dict(vocab_size=vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, bos_token_id=0,
                 eos_token_id=1)
    llama, generator = Llama(Config(**(sizes | changes))), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in llama.named_parameters():
            parameter.copy_(("norm" in name) + 0.25 * torch.randn(parameter.shape, generator=generator))
    return llama


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with models "a", "b", "c" of one shape, "wide" of another, "other" with another tokenizer, an adapter
    "x" of a and "y" of b; prompts.jsonl and rated.jsonl."""
    folder = tmp_path_factory.mktemp("world")
    rated = list(toy.rated(16, 3, responses=3))
    texts = [row["prompt"] + answer["text"] for row in rated for answer in row["responses"]]
    tokenizer, another = toy.train_tokenizer(texts, 400), toy.train_tokenizer(texts[:30], 400)
    size = tokenizer.get_vocab_size()
    assert another.get_vocab_size() == size and another.to_str() != tokenizer.to_str()
    models = {"a": tiny(1, size), "b": tiny(2, size), "c": tiny(3, size), "other": tiny(4, size),
              "wide": tiny(5, size, hidden_size=48, num_attention_heads=6, head_dim=8, num_hidden_layers=3)}
    models["a"].model.embed_tokens.weight.data[0, 0] = -0.0
    for name, llama in models.items():
        checkpoint.save(llama, folder / name)
        (another if name == "other" else tokenizer).save(str(folder / name / "tokenizer.json"))
    for name, base, seed in (("x", "a", 8), ("y", "a", 9)):
        llama, generator = lora.add_lora(checkpoint.load(folder / base), 4, folder / base), torch.Generator()
        for key, parameter in llama.named_parameters():
            if "lora_" in key:
                parameter.data.normal_(0, 0.3, generator=generator.manual_seed(seed + len(key)))
        checkpoint.save(llama, folder / name)
        tokenizer.save(str(folder / name / "tokenizer.json"))
    write(folder / "prompts.jsonl", *({"prompt": row["prompt"]} for row in rated[:6]))
    write(folder / "rated.jsonl", *rated[:8])
    return folder


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def soup_of(monkeypatch, world, out, names, weights):
    words = ["soup", *(world / name for name in names), "--weights", *weights, "--out", out]
    assert run(combine, monkeypatch, words) == 0
    return out


def tensors(folder):
    return load_file(folder / "model.safetensors")


def bits(weights):
    return {name: tensor.contiguous().view(torch.uint8).numpy().tobytes() for name, tensor in weights.items()}


# ----------------------------------------------------------------------------- weights


def test_weights_are_divided_by_their_sum():
    assert shares([1, 3], "ab") == [0.25, 0.75] and shares([0, 7.0, 0], "abc") == [0, 1, 0]
    assert shares([-1, 3], "ab") == [-0.5, 1.5]
    for bad in ([1, -1], [0, 0], [math.nan, 1], [math.inf, 1], [1e308, 1e308], [0.1, 0.2, -0.3], [math.inf, -math.inf]):
        with pytest.raises(UserError, match="give finite ones"):
            shares(bad, range(len(bad)))
    with pytest.raises(UserError, match="3 for 2 models"):
        shares([1, 1, 1], "ab")


def test_a_soup_is_the_average_weight_by_weight_and_loads_as_any_model(world, tmp_path, monkeypatch):
    out = soup_of(monkeypatch, world, tmp_path / "out", "abc", [1, 4, 5])
    parts, found = [tensors(world / name) for name in "abc"], tensors(out)
    assert found.keys() == parts[0].keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, 0.1 * parts[0][name] + 0.4 * parts[1][name] + 0.5 * parts[2][name])
    llama = checkpoint.load(out)
    assert checkpoint.load_tokenizer(out, llama).to_str() == checkpoint.load_tokenizer(world / "a").to_str()
    assert llama.config == checkpoint.load(world / "a").config
    left = {path.name for path in out.iterdir()} - {*folders.SIDE, "README.md"}
    assert left == {"config.json", "model.safetensors", "run.json", "tokenizer.json"}


@pytest.mark.parametrize("names, weights, same", [("abc", [0, 2.5, 0], "b"), ("abc", [1, 0, 0], "a"),
                                                  ("aaa", [1, 1, 1], "a"), ("bbb", [0.1, 0.3, 0.7], "b")])
def test_all_the_weight_on_one_model_or_equal_ones_is_that_model_bit_for_bit(world, tmp_path, monkeypatch, names,
                                                                             weights, same):
    out = soup_of(monkeypatch, world, tmp_path / "out", names, weights)
    assert bits(tensors(out)) == bits(tensors(world / same))


def test_adapters_are_merged_before_they_are_averaged(world, tmp_path, monkeypatch):
    found = checkpoint.load(soup_of(monkeypatch, world, tmp_path / "out", "xy", [1, 1]))
    base, adapters = checkpoint.load(world / "a"), [load_file(world / name / "adapter_model.safetensors")
                                                    for name in "xy"]
    name, scale = "model.layers.1.mlp.up_proj", 2.0  # alpha / rank of add_lora
    a, b = ([adapter[f"base_model.model.{name}.lora_{part}.weight"] for adapter in adapters] for part in "AB")
    change = (found.get_submodule(name).weight - base.get_submodule(name).weight).detach()
    merged, apart = scale * (b[0] @ a[0] + b[1] @ a[1]) / 2, scale * (b[0] + b[1]) / 2 @ (a[0] + a[1]) / 2
    torch.testing.assert_close(change, merged, atol=1e-5, rtol=0)
    assert (change - apart).norm() > 0.5 * merged.norm()
    assert not found.adapter and torch.equal(found.model.embed_tokens.weight, base.model.embed_tokens.weight)


def test_where_the_head_alone_differs_the_soup_is_the_product(world, tmp_path, monkeypatch):
    """Logits are then linear in the weights: the soup's are their average, and so are the product's, normalised."""
    folders = []
    for seed in (1, 2):
        llama = checkpoint.load(world / "a")
        llama.lm_head.weight.data.normal_(generator=torch.Generator().manual_seed(seed))
        folders.append(tmp_path / f"{seed}")
        checkpoint.save(llama, folders[-1])
        (folders[-1] / "tokenizer.json").write_bytes((world / "a/tokenizer.json").read_bytes())
    joined = Product([checkpoint.load(folder) for folder in folders], [0.3, 0.7])
    tokens = torch.tensor([PROMPTS[2]])
    with torch.no_grad():
        found, expected = (model.logits(llama, tokens).log_softmax(-1)
                           for llama in (combine.soup(folders, [0.3, 0.7]), joined))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def shortened(world, short, name):
    """A copy of a model with a context of 77 tokens."""
    short.mkdir()
    for file in ("model.safetensors", "tokenizer.json"):
        (short / file).write_bytes((world / name / file).read_bytes())
    config = json.loads((world / name / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 77}))
    return short


def test_a_soup_reads_no_further_than_the_shortest_context(world, tmp_path):
    short = shortened(world, tmp_path / "short", "b")
    tokenizer = checkpoint.load_tokenizer(short)
    tokenizer.enable_truncation(77)  # which makes no other tokenizer of it
    tokenizer.save(str(short / "tokenizer.json"))
    assert combine.soup([world / "a", short], [0.5, 0.5]).config.max_position_embeddings == 77
    assert combine.soup([world / "a", short], [1, 0]).config.max_position_embeddings == 256
    assert Product([checkpoint.load(world / "a"), checkpoint.load(short)], [1, 0]).config.max_position_embeddings == 77


def test_refusals_of_soup(world, tmp_path, monkeypatch, capsys):
    a, b, out = world / "a", world / "b", tmp_path / "out"

    def refuses(models, weights, *told, out=out):
        refused(combine, monkeypatch, capsys, ["soup", *models, "--weights", *weights, "--out", out], *told)
    refuses([a, world / "wide"], [1, 1], "wide: has another", "hidden_size", "num_hidden_layers")
    refuses([a, world / "other"], [1, 1], "other: has another tokenizer than", str(a))
    refuses([a, b], [1], "--weights: 1 for 2 models")
    refuses([a, b], [1, -1], "--weights: 1.0, -1.0 add up to 0")
    refuses([a, b], ["nan", 1], "finite")
    refuses([a, b], [1, 1], str(b), "a model to start from", out=b)
    refuses([world / "x", b], [1, 1], str(a), "that another needs", out=a)
    refuses([a, b], [1, 1], "c: holds a model already", out=world / "c")
    refuses([a, b], [1, 1], "y: holds a model already", out=world / "y")
    refuses([a, tmp_path / "nothing"], [1, 1], "nothing: no such folder")
    assert not out.exists()


@pytest.mark.parametrize("dying", ["weights", "configuration"])
def test_an_interrupted_soup_leaves_no_model_and_can_be_made_again(world, tmp_path, monkeypatch, dying):
    words = ["soup", world / "a", world / "b", "--weights", 1, 1, "--out", tmp_path / "out"]

    def die(weights, aside, **_):
        aside.write_bytes(b"half of it")
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        if dying == "weights":
            patch.setattr(checkpoint, "save_file", die)
        else:
            text = checkpoint.write_text
            patch.setattr(checkpoint, "write_text", lambda path, said: die(0, path.parent / "none")
                          if path.name == "config.json" and (path.parent / "none").unlink(True) is None
                          else text(path, said))
        assert run(combine, monkeypatch, words) == 130
    (tmp_path / "out/none").unlink(missing_ok=True)
    left = {path.name for path in (tmp_path / "out").iterdir()} - {*folders.SIDE, "README.md"}
    assert left == {*["model.safetensors"] * (dying == "configuration"), "run.json", "tokenizer.json"}
    with pytest.raises(UserError):
        checkpoint.load(tmp_path / "out")
    assert run(combine, monkeypatch, words) == 0
    whole = soup_of(monkeypatch, world, tmp_path / "whole", "ab", [1, 1])
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (whole / name).read_bytes()


# ----------------------------------------------------------------------------- next tokens


def log_probabilities(llama, tokens):
    with torch.no_grad():
        return model.logits(llama, torch.tensor([tokens]))[0, -1].log_softmax(-1)


def mixed():
    """Models of other depths and widths, whose cache must not be mixed up."""
    return [tiny(1), tiny(2, hidden_size=48, num_attention_heads=6, head_dim=8, num_hidden_layers=3), tiny(3)]


def test_the_product_is_the_weighted_sum_of_log_probabilities():
    llamas, weights = mixed(), [0.2, 0.5, 0.3]
    expected = sum(w * log_probabilities(llama, PROMPTS[2]) for w, llama in zip(weights, llamas))
    product = Product(llamas, weights)
    torch.testing.assert_close(log_probabilities(product, PROMPTS[2]), expected.log_softmax(-1))
    with torch.no_grad():
        torch.testing.assert_close(model.logits(product, torch.tensor([PROMPTS[2]]))[0, -1], expected)


@pytest.mark.parametrize("draft", [0, 7])
def test_a_product_writes_with_its_cache_what_it_writes_without(draft):
    product = Product(mixed(), [0.2, 0.5, 0.3])
    expected = model.generate(product, PROMPTS, 10, stop_ids=(5, 11))
    assert engine.generate(product, PROMPTS, 10, stop_ids=(5, 11), draft=draft) == expected
    assert dict(engine.stream(product, PROMPTS, 10, 2, stop_ids=(5, 11), draft=draft)) == dict(enumerate(expected))
    assert expected not in [engine.generate(llama, PROMPTS, 10, stop_ids=(5, 11)) for llama in product.llamas]
    options = dict(temperature=0.8, seed=4)
    assert engine.generate(product, PROMPTS, 10, **options) == model.generate(product, PROMPTS, 10, **options)


def test_all_the_weight_on_one_model_or_equal_ones_write_as_that_model():
    first, second, third = mixed()
    expected = engine.generate(second, PROMPTS, 20)
    for product in (Product([first, second, third], [0, 1, 0]), Product([second, second, second], [0.2, 0.5, 0.3])):
        torch.testing.assert_close(log_probabilities(product, PROMPTS[0]), log_probabilities(second, PROMPTS[0]))
        assert engine.generate(product, PROMPTS, 20) == expected
    assert engine.generate(first, PROMPTS, 20) != expected


def test_a_product_scores_packed_documents():
    product, texts = Product(mixed(), [0.2, 0.5, 0.3]), [PROMPTS[2], PROMPTS[0]]
    tokens, targets = torch.tensor(texts[0] + texts[1]), torch.tensor([2, 9, 13])
    with torch.no_grad():
        found = model.token_logprobs(product, tokens, [10, 4], targets)
    expected = [log_probabilities(product, text[:at])[text[at]] for text, at in
                ((texts[0], 2), (texts[0], 9), (texts[1], 3))]
    torch.testing.assert_close(found, torch.stack(expected))


def test_the_product_of_each_token_is_not_that_of_whole_texts():
    """All texts of two tokens: each step's own normalisation is seen."""
    llamas, weights, prompt = [tiny(1, 5), tiny(2, 5)], [0.5, 0.5], [3, 4]
    product = Product(llamas, weights)

    def texts(llama):
        first = log_probabilities(llama, prompt)
        return torch.stack([first[i] + log_probabilities(llama, [*prompt, i]) for i in range(5)])
    whole = sum(w * texts(llama) for w, llama in zip(weights, llamas)).flatten().softmax(0)
    found = texts(product).exp().flatten()
    assert found.sum().item() == pytest.approx(1, abs=1e-5)
    assert (found - whole).abs().sum() / 2 > 0.02
    prefix = sum(w * log_probabilities(llama, prompt) for w, llama in zip(weights, llamas)).softmax(0)
    torch.testing.assert_close(texts(product).exp().sum(1), prefix)


def answers(monkeypatch, world, out, names, weights, *words):
    assert run(combine, monkeypatch, ["answer", *(world / name for name in names), "--weights", *weights, "--data",
                                      world / "prompts.jsonl", "--max-new-tokens", 12, "--device", "cpu", "--out", out,
                                      *words]) == 0
    return read(out)


@pytest.mark.parametrize("temperature", [0, 1])
def test_with_all_the_weight_on_one_model_answers_are_those_of_feedback(world, tmp_path, monkeypatch, temperature):
    words = ["--max-new-tokens", 12, "--device", "cpu", "--temperature", temperature, "--seed", 3]
    assert run(feedback, monkeypatch, ["answer", world / "prompts.jsonl", "--policy", world / "b", "--out",
                                       tmp_path / "alone.jsonl", *words]) == 0
    expected = read(tmp_path / "alone.jsonl")
    found = answers(monkeypatch, world, tmp_path / "out.jsonl", ["a", "b", "wide"], [0, 2, 0], *words)
    assert found == expected and len(found) > 3
    assert answers(monkeypatch, world, tmp_path / "ab.jsonl", "ab", [1, 1], *words) != expected
    texts = [[response["text"] for response in row["responses"]] for row in formats.read_rated(tmp_path / "out.jsonl")]
    assert texts == [[response["text"] for response in row["responses"]] for row in found], "they can be read"


def test_killed_answers_go_on(world, tmp_path, monkeypatch, capsys):
    whole = answers(monkeypatch, world, tmp_path / "whole.jsonl", "ab", [1, 1], "--limit", 4)
    assert len(whole) == 4 and "4 prompts with 2 responses each" in capsys.readouterr().out
    add, added = feedback.Journal.add, []

    def stop(journal, row):
        add(journal, row)
        added.append(row["index"])
        if len(added) == 3:
            raise KeyboardInterrupt
    words = ["answer", world / "a", world / "b", "--weights", 1, 1, "--data", world / "prompts.jsonl", "--limit", 4,
             "--max-new-tokens", 12, "--device", "cpu", "--out", tmp_path / "killed.jsonl"]
    with monkeypatch.context() as patch:
        patch.setattr(feedback.Journal, "add", stop)
        assert run(combine, monkeypatch, words) == 130
    assert not (tmp_path / "killed.jsonl").exists()
    other = [*words[:4], 1, 2, *words[6:]]
    refused(combine, monkeypatch, capsys, other, "killed.jsonl.part", "other settings")
    with monkeypatch.context() as patch:
        patch.setattr(feedback.Journal, "add", lambda journal, row: added.append(row["index"]) or add(journal, row))
        assert run(combine, monkeypatch, words) == 0 and read(tmp_path / "killed.jsonl") == whole
    assert sorted(added) == list(range(8)), "nothing is answered twice"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed.jsonl", "whole.jsonl"]


def test_an_answer_ends_where_the_next_turn_begins_and_empty_ones_are_left_out(world, tmp_path, monkeypatch, capsys):
    said = iter([[" One.\n\nHuman: Two?", "\n\nHuman: Four?"], ["Three.", "Five."]])  # all first answers, all second
    monkeypatch.setattr(combine.ProductWriter, "write", lambda *_, **__: iter(enumerate(next(said))))
    write(tmp_path / "prompts.jsonl", {"prompt": "p"}, {"prompt": "q"})
    rows = answers(monkeypatch, world, tmp_path / "out.jsonl", "ab", [1, 1], "--data", tmp_path / "prompts.jsonl")
    assert rows == [{"prompt": "p", "responses": [{"text": "One."}, {"text": "Three."}]}]
    told = capsys.readouterr().out
    assert "1 prompts with 2 responses each" in told and "left out: 1 prompts that got an empty answer" in told


def test_refusals_of_answer(world, tmp_path, monkeypatch, capsys):
    def refuses(models, weights, out, *told):
        refused(combine, monkeypatch, capsys, ["answer", *models, "--weights", *weights, "--data",
                                               world / "prompts.jsonl", "--device", "cpu", "--out", out], *told)
    a, out = world / "a", tmp_path / "out.jsonl"
    refuses([a, world / "other"], [1, 1], out, "other: has another tokenizer")
    refuses([a, world / "b"], [1], out, "1 for 2 models")
    heads = tmp_path / "heads"
    checkpoint.save(tiny(1, checkpoint.load(a).config.vocab_size, num_key_value_heads=4), heads)
    (heads / "tokenizer.json").write_bytes((a / "tokenizer.json").read_bytes())
    refuses([a, heads], [1, 1], out, "heads: has another num_key_value_heads than")
    refuses([a, world / "b"], [1, 1], world / "prompts.jsonl", "is an input too")
    assert list(tmp_path.iterdir()) == [heads]


# ----------------------------------------------------------------------------- best-of-N


def test_the_best_has_the_highest_weighted_sum_and_is_the_first_of_equals():
    rated = [response("a", x=1, y=0), response("b", x=0, y=1), response("c", x=0.9, y=0.9), response("d", x=0.9, y=.9)]
    assert best_of(rated, {"x": 1.0})["text"] == "a" and best_of(rated, {"y": 1.0, "x": 0.5})["text"] == "c"
    assert best_of(rated, {"x": 0.5, "y": 1.0}, n=2)["text"] == "b"
    assert best_of(rated, {"x": 1.0, "y": -1.0})["text"] == "a" and best_of(rated, {"x": 1.0}, n=1)["text"] == "a"


@pytest.mark.parametrize("n", [1, 2, 4])
def test_the_law_of_best_of_n(n):
    """Over all draws of n of five answers: P(best = y) = F(r)^n - F(r-)^n, and its divergence is within the bound."""
    chance, scores = [0.1, 0.35, 0.2, 0.05, 0.3], [2.0, -1.0, 0.5, 3.0, 0.0]
    texts = [response(str(i), r=score) for i, score in enumerate(scores)]
    found = dict.fromkeys("01234", 0.0)
    for draw in itertools.product(range(5), repeat=n):
        found[best_of([texts[i] for i in draw], {"r": 1.0})["text"]] += math.prod(chance[i] for i in draw)
    for i, score in enumerate(scores):
        below = sum(p for p, other in zip(chance, scores) if other < score)
        assert found[str(i)] == pytest.approx((below + chance[i]) ** n - below ** n)
    divergence = sum(found[str(i)] * math.log(found[str(i)] / p) for i, p in enumerate(chance))
    assert -1e-12 <= divergence <= math.log(n) - (n - 1) / n + 1e-12


def test_best_from_the_command_line(tmp_path, monkeypatch, capsys):
    rated = write(tmp_path / "rated.jsonl", {"prompt": "p", "golden": "g", "responses": [
        response("a", x=0, y=3), response("b", x=1, y=0), response("c", x=5, y=5)]},
        {"prompt": "q", "responses": []}, {"prompt": "r", "responses": [response("d", x=1)]})
    out, words = tmp_path / "best.jsonl", ["best", rated, "--weights", "x=1,y=0.5", "--out", tmp_path / "best.jsonl"]
    assert run(combine, monkeypatch, words) == 0
    assert read(out) == [{"prompt": "p", "golden": "g", "responses": [response("c", x=5, y=5)]}]
    assert "1 prompts; the mean weighted score is 7.5, of first answers 1.5" in capsys.readouterr().out
    assert run(combine, monkeypatch, [*words, "--n", 2]) == 0 and read(out)[0]["responses"] == [response("a", x=0, y=3)]
    before = out.read_bytes()
    for changes, told in ((["--weights", "z=1"], "no answer is rated on z"), (["--weights", "x"], "--weights"),
                          (["--n", 0], "must be at least 1"), (["--out", rated], "is an input too")):
        refused(combine, monkeypatch, capsys, [*words, *changes], told)
    half = write(tmp_path / "half.jsonl", {"prompt": "p", "responses": [response("a", x=0), response("b", y=0)]})
    refused(combine, monkeypatch, capsys, ["best", half, *words[2:]], "half.jsonl", "all rated on x, y")
    monkeypatch.setattr("common.json.dumps", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(combine, monkeypatch, words)
    assert out.read_bytes() == before and not (tmp_path / "best.jsonl.tmp").exists()


# ----------------------------------------------------------------------------- implicit rewards


def implicit(monkeypatch, world, out, policy="b", reference="a", *words):
    words = ["implicit", "--policy", world / policy, "--reference", world / reference, "--name", "honest_dpo",
             "--data", world / "rated.jsonl", "--device", "cpu", "--out", out, *words]
    assert run(combine, monkeypatch, words) == 0
    return read(out)


def by_hand(folder, prompt, text):
    """log p(text, EOS | BOS, prompt) a token at a time, in the model's own words."""
    llama, tokenizer = checkpoint.load(folder), checkpoint.load_tokenizer(folder)
    ids = [0, *data.text_ids(tokenizer, [prompt])[0]]
    total = 0.0
    for token in [*data.text_ids(tokenizer, [text])[0], 1]:
        total += log_probabilities(llama, ids)[token].item()
        ids.append(token)
    return total


def test_an_implicit_reward_is_beta_times_the_log_ratio_of_the_whole_response(world, tmp_path, monkeypatch):
    rows, before = implicit(monkeypatch, world, tmp_path / "out.jsonl", "b", "a", "--beta", 0.3), read(
        world / "rated.jsonl")
    for row, old in zip(rows, before):
        assert row["prompt"] == old["prompt"]
        for new, was in zip(row["responses"], old["responses"]):
            assert new["text"] == was["text"]
            assert {name: new["scores"][name] for name in was["scores"]} == was["scores"]
            assert new["scores"].keys() - was["scores"].keys() == {"honest_dpo"}
    for row, i in ((rows[1], 0), (rows[5], 1)):  # such as fit the context whole
        answer = row["responses"][i]
        expected = [by_hand(world / name, row["prompt"], answer["text"]) for name in "ba"]
        assert answer["scores"]["honest_dpo"] == pytest.approx(0.3 * (expected[0] - expected[1]), abs=2e-3, rel=1e-4)


def test_a_policy_that_is_its_reference_has_no_reward(world, tmp_path, monkeypatch):
    rows = implicit(monkeypatch, world, tmp_path / "out.jsonl", "a", "a")
    assert {answer["scores"]["honest_dpo"] for row in rows for answer in row["responses"]} == {0.0}


def test_implicit_rewards_are_those_that_dpo_compares_and_modpo_takes(world, tmp_path, monkeypatch):
    """The difference of two scores is the logit of DPO's loss; MODPO's gap is made of it."""
    def encoded(row):  # no Example where the pair does not fit the context whole
        pair = formats.preference(row["prompt"], *(answer["text"] for answer in row["responses"][:2]), "p", 0.3)
        return data.encode_examples(checkpoint.load_tokenizer(world / "a"), [pair], 0, 1, 256)[0]
    rows = implicit(monkeypatch, world, tmp_path / "out.jsonl", "b", "a", "--beta", 0.2)
    row = max(filter(encoded, rows), key=lambda row: abs(row["responses"][0]["scores"]["honest_dpo"]
                                                        - row["responses"][1]["scores"]["honest_dpo"]))
    first, second = row["responses"][:2]
    examples = encoded(row)
    options = Options(beta=0.2, precision="fp32")
    train.add_ref_logprobs(checkpoint.load(world / "a"), examples, options, False)
    batch, = train.pack(examples, 10**6, torch.device("cpu"))
    with torch.no_grad():
        loss = train.batch_loss(checkpoint.load(world / "b"), batch, METHODS["dpo"], options)
    gap = torch.tensor(first["scores"]["honest_dpo"] - second["scores"]["honest_dpo"])
    assert abs(gap) > 0.5
    expected = F.binary_cross_entropy_with_logits(gap, torch.tensor(0.3))
    torch.testing.assert_close(loss, expected, atol=1e-3, rtol=1e-4)
    chosen = methods.modpo_rows([tmp_path / "out.jsonl"], Options(weights="helpful=0.5,honest_dpo=0.25"))
    found, = (new["gap"] for new in chosen if (new["prompt"], new["response_a"], new["response_b"])
              == (row["prompt"], first["text"], second["text"]))
    assert found == pytest.approx(0.25 * gap.item(), abs=1e-5)


def test_answers_that_do_not_fit_get_no_score(world, tmp_path, monkeypatch, capsys):
    """A long prompt loses its oldest turns; an answer that does not fit by itself stays without the score."""
    turns = "".join(f"\n\nHuman: Question {i}?\n\nAssistant: Yes, sure." for i in range(60))
    end = "\n\nHuman: Why?\n\nAssistant:"
    write(tmp_path / "rated.jsonl", {"prompt": turns + end, "responses": [response(" So."), response(" No." * 300)]},
          {"prompt": end, "responses": [response("")]})
    words = ["implicit", "--policy", world / "b", "--reference", world / "a", "--name", "r", "--data",
             tmp_path / "rated.jsonl", "--out", tmp_path / "out.jsonl", "--device", "cpu"]
    assert run(combine, monkeypatch, words) == 0
    scored, left, empty = (answer["scores"] for row in read(tmp_path / "out.jsonl") for answer in row["responses"])
    assert "r" in scored and "r" in empty and left == {}
    assert "2 answers of 2 prompts scored on r; 1 left without" in capsys.readouterr().out
    assert empty["r"] == pytest.approx(0.1 * (by_hand(world / "b", end, "") - by_hand(world / "a", end, "")), abs=1e-4)


def test_the_reference_reads_what_the_policy_reads(world, tmp_path, monkeypatch):
    """Though its own context may be shorter: training lengthens the policy's."""
    shortened(world, world / "short-a", "a")
    found = implicit(monkeypatch, world, tmp_path / "short.jsonl", "b", "short-a")
    assert found == implicit(monkeypatch, world, tmp_path / "out.jsonl", "b", "a")


def test_a_thousand_answers_and_more_keep_their_places(world):
    llama, tokenizer = checkpoint.load(world / "a"), checkpoint.load_tokenizer(world / "a")
    rows = [{"prompt": "a", "completion": "abcdefgh"[:1 + i % 7]} for i in range(1011)]
    found = combine.response_logprobs(llama, tokenizer, rows, 256)
    alone = [combine.response_logprobs(llama, tokenizer, [row], 256)[0] for row in rows[:7]]
    assert found == pytest.approx([alone[i % 7] for i in range(1011)], abs=1e-4) and len(set(alone)) == 7


def test_refusals_of_implicit(world, tmp_path, monkeypatch, capsys):
    words = ["implicit", "--policy", world / "b", "--reference", world / "a", "--name", "r", "--data",
             world / "rated.jsonl", "--out", tmp_path / "out.jsonl", "--device", "cpu"]
    for changes, told in ((["--reference", world / "other"], "other: has another tokenizer than"),
                          (["--name", "helpful"], "rated on helpful already"), (["--name", "a b"], "--name: 'a b'"),
                          (["--out", world / "rated.jsonl"], "is an input too"), (["--beta", 0], "--beta"),
                          (["--data", world / "prompts.jsonl"], "none of its 0 answers")):
        refused(combine, monkeypatch, capsys, [*words, *changes], told)
    smaller = tmp_path / "smaller"
    checkpoint.save(tiny(1, 300), smaller)
    toy.train_tokenizer(["a b"], 300).save(str(smaller / "tokenizer.json"))
    refused(combine, monkeypatch, capsys, [*words, "--reference", smaller], "smaller: has another vocab_size, tok")
    assert not (tmp_path / "out.jsonl").exists()


def test_help_shows_an_example_of_each_command(monkeypatch, capsys):
    assert run(combine, monkeypatch, ["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"python combine.py {name} " in said for name in ("soup", "answer", "best", "implicit"))
