"""generate.py against model.generate, brute force over all that can be written, and exact distributions."""
import math
from collections import Counter

import pytest
import torch

import checkpoint
import data
import generate as engine
import model
from common import UserError
from generate import Acceptance, Lookup, generate, stream
from test_model import random_tokens, tiny

# ----------------------------------------------------------------------------------------------------------------
# Generation

PROMPTS = [random_tokens(length, seed=seed).tolist() for seed, length in enumerate((7, 1, 30, 2, 2, 13, 1, 8))]


def greedy_by_hand(llama, prompt, steps, stop_ids=()):
    """No cache: the whole text through the model for every token."""
    return model.generate(llama, [prompt], steps, stop_ids=stop_ids)[0]


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
    assert rows == left


@pytest.mark.parametrize("draft", [0, 7])
@pytest.mark.parametrize("rows", [1, 2, 5, 100])
def test_a_finished_row_makes_room_for_the_next(rows, draft, monkeypatch):
    llama, batches, advance = tiny(seed=3), [], engine.advance
    prompts = [[1 + number % 7] * (number % 3) + prompt for number, prompt in enumerate(PROMPTS * 3)]
    expected = [greedy_by_hand(llama, prompt, 20, (5, 11, 30)) for prompt in prompts]
    monkeypatch.setattr(engine, "advance", lambda *rest: batches.append(len(rest[2])) or advance(*rest))
    found = list(stream(llama, prompts, 20, rows, stop_ids=(5, 11, 30), draft=draft))
    assert dict(found) == dict(enumerate(expected)) and len(found) == len(prompts)
    assert max(batches) <= rows
    if rows == 5 and not draft:
        turns = sum(max(map(len, expected[start:start + 5])) for start in range(0, 24, 5))
        assert len(batches) < 0.85 * turns, "no row waits for its neighbours"


def test_real_stories_in_a_batch(shared):
    folder = shared / "checkpoints/stories260K"
    llama = checkpoint.load(folder)
    tokenizer = checkpoint.load_tokenizer(folder, llama)
    texts = ("Tom and his", "", "One day, a small bird saw", "The")
    prompts = [data.encode_prompt(tokenizer, text, 1) for text in texts]
    assert [len(prompt) for prompt in prompts][1] == 1
    assert generate(llama, prompts, 80) == [generate(llama, [prompt], 80)[0] for prompt in prompts]


def test_nothing_to_do():
    llama = tiny()
    assert generate(llama, [], 5) == []
    assert generate(llama, [[1], [2]], 0) == [[], []]
    with pytest.raises(UserError, match="a prompt has no tokens"):
        generate(llama, [[1], []], 5)
    for bad in ({"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}, {"min_p": -0.1}, {"min_p": 1.1}):
        with pytest.raises(UserError, match="generate: .*(give 0 or more|must be at least 0)"):
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
        acceptance = Acceptance()
        options = dict(stop_ids=stop_ids, draft=draft, acceptance=acceptance)
        assert generate(llama, LOOPS, 40, **options) == expected
        assert [generate(llama, [prompt], 40, **options)[0] for prompt in LOOPS] == expected
        assert acceptance.accepted > 20 and acceptance.written >= 2 * sum(map(len, expected))
    assert generate(llama, LOOPS, 1, draft=draft) == [greedy_by_hand(llama, prompt, 1) for prompt in LOOPS]


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
    llama = checkpoint.load(shared / "checkpoints/stories260K")
    tokenizer = checkpoint.load_tokenizer(shared / "checkpoints/stories260K", llama)
    texts = pandas_free(shared / "data/outputs/hh-rlhf/Claude-3.csv")
    prompts = [tokenizer.encode(text).ids[:length] for text, length in zip(texts, range(40, 400, 15))]
    stop_ids = [tokenizer.token_to_id(mark) for mark in "!?"]
    plain = generate(llama, prompts, 60, stop_ids=stop_ids)
    acceptance = Acceptance()
    assert generate(llama, prompts, 60, stop_ids=stop_ids, draft=15, acceptance=acceptance) == plain
    assert acceptance.accepted > 50 and len(set(map(len, plain))) > 3


def pandas_free(path):
    import csv
    with open(path, encoding="utf-8", newline="") as file:
        return [row["query"] + row["generated_text"] for row in csv.DictReader(file)][:24]


def test_a_guess_is_what_followed_the_same_tokens():
    lookup, even = Lookup([1, 2, 3, 4, 5, 9, 2, 3]), Acceptance()
    assert lookup.guess(3, even, alone=True) == [4, 5, 9] and lookup.guess(2, even, alone=True) == [4, 5]
    lookup.add([7])
    assert lookup.guess(3, even, alone=True) == [], "3, 7 has not occurred"
    lookup.add([2, 3])
    assert lookup.guess(2, even, alone=True) == [7, 2], "the last time that 2, 3 occurred"
    longest = Lookup([8, 1, 2, 50, 9, 1, 2, 60, 0, 8, 1, 2])
    assert longest.guess(1, even, alone=True) == [50], "8, 1, 2 agrees for longer than the later 9, 1, 2"
    assert Lookup([6]).guess(4, even, alone=True) == []
    assert Lookup([5, 6, 7, 8, 6]).guess(4, even, alone=True) == [7, 8, 6], "one token is enough"


def test_a_guess_ends_where_copying_has_ended():
    """Token 4 is a full stop, after which this model has mostly gone its own way."""
    acceptance = Acceptance()
    lookup = Lookup([1, 2, 3, 4, 5, 6, 7, 1, 2])
    for _ in range(12):
        guess = lookup.guess(4, acceptance, alone=False)
        acceptance.learn(2, guess, guess.index(4) + 1)  # 3 and 4 come true, what follows 4 does not
    assert lookup.guess(4, acceptance, alone=False) == [3, 4]
    another = Lookup([1, 2, 3, 4, 5, 6, 7, 1, 2])
    assert another.guess(4, acceptance, alone=False) == [3, 4], "another text of the same model"
    assert lookup.guess(4, acceptance, alone=True) == [3, 4, 5, 6], "where wrong guesses cost little"
    assert lookup.guess(1, acceptance, alone=False) == [], "one token is not worth a guess"
    assert lookup.guess(1, acceptance, alone=True) == [3]


def test_that_one_token_recurs_says_less_than_that_two_do():
    """What is learned of guesses after a single matching token does not speak against those after two."""
    acceptance, single, double = Acceptance(), Lookup([1, 2, 3, 4, 9, 2]), Lookup([1, 2, 3, 4, 1, 2])
    assert single.guess(2, acceptance, alone=False) == double.guess(2, acceptance, alone=False) == [3, 4]
    for _ in range(12):
        acceptance.learn(single.start, [3, 4], 0)
    assert single.guess(2, acceptance, alone=False) == [] and double.guess(2, acceptance, alone=False) == [3, 4]


@pytest.fixture
def hopeful(monkeypatch):
    """Guesses that go on, however often they have been wrong and however little they win."""
    monkeypatch.setattr(Acceptance, "learn", lambda *_: None)
    monkeypatch.setattr(Lookup, "least", 0.0)


def test_sampling_with_copying_takes_the_same_chances(hopeful):
    llama = tiny(seed=3, vocab_size=12)
    loops = [[token % 12 for token in prompt] for prompt in LOOPS]
    options = dict(temperature=0.5, top_k=20, top_p=0.95, stop_ids=(5,), seed=list(range(8)))
    acceptance = Acceptance()
    found = generate(llama, loops, 30, draft=7, acceptance=acceptance, **options)
    assert found == generate(llama, loops, 30, **options) and acceptance.accepted > 20


def always_right(text, verified, stop_ids, acceptance):
    """The acceptance rule, broken: a guess is believed unseen."""
    text.new += [*text.guess, verified[-1]]
    text.lookup.add(text.new[-len(text.guess) - 1:])
    text.finished = len(text.new) >= text.most
    return 0


@pytest.mark.slow
@pytest.mark.parametrize("rule", [None, always_right], ids=["as it is", "broken"])
def test_copying_keeps_the_exact_distribution(rule, monkeypatch, hopeful):
    """Three tokens after a prompt in which every pair occurs: the chance of each triple, from full forwards."""
    llama, prompt, rows = tiny(seed=5, vocab_size=5), random_tokens(120, 5).tolist(), 5_000 if rule else 10_000
    assert len(set(zip(prompt, prompt[1:]))) == 25
    expected = {(): float(rows)}
    with torch.no_grad():
        for _ in range(3):
            expected = {(*text, token): count * chance for text, count in expected.items() for token, chance in
                        probabilities_by_hand(next_logits(llama, prompt + list(text)), 1.5, 5,
                                              1.0).items()}
    if rule:
        monkeypatch.setattr(engine.Text, "take", rule)
    acceptance = Acceptance()
    texts = [text for start in range(0, rows, 1000) for text in
             generate(llama, [prompt] * 1000, 3, temperature=1.5, seed=start, draft=2, acceptance=acceptance)]
    counts = Counter(map(tuple, texts))
    statistic, limit = chi_square(counts, {key: value for key, value in expected.items() if value >= 5})
    if rule:
        assert statistic > 3 * limit
    else:
        assert statistic < limit and acceptance.accepted > 1000
        assert acceptance.accepted < acceptance.written - rows, "some guesses were refused"


def test_long_batches_are_prefilled_in_parts():
    llama, computed = tiny(seed=3), []
    expected = [generate(llama, [prompt], 10)[0] for prompt in PROMPTS]
    cache = engine.Cache(llama.config, len(PROMPTS), torch.float32, "cpu")
    llama.model.embed_tokens.register_forward_hook(lambda module, inputs, output: computed.append(output.size(1)))
    with torch.no_grad():
        first = engine.prefill(llama, cache, PROMPTS, 0, most=20).argmax(-1).tolist()
    assert first == [text[0] for text in expected] and cache.lengths == list(map(len, PROMPTS))
    assert computed == [7 + 1, 30, 2 + 2 + 13 + 1, 8], "in their order, at most 20 tokens unless one has more"


def next_logits(llama, tokens):
    return model.logits(llama, torch.tensor([tokens]))[0, -1].tolist()


def probabilities_by_hand(logits, temperature, top_k, top_p, min_p=0.0):
    """The definition, in plain Python: scale, keep the k likeliest, then the fewest that together reach top_p, then
    those with at least the share min_p of the likeliest one's."""
    weights = {token: math.exp(logit / temperature) for token, logit in enumerate(logits)}
    kept = sorted(weights, key=weights.get, reverse=True)[:top_k or None]
    total, mass, nucleus = sum(weights[token] for token in kept), 0.0, []
    for token in kept:
        if mass < top_p:
            nucleus.append(token)
        mass += weights[token] / total
    nucleus = [token for token in nucleus if weights[token] >= min_p * weights[nucleus[0]]]
    total = sum(weights[token] for token in nucleus)
    return {token: weights[token] / total for token in nucleus}


def chi_square(counts, expected):
    """(statistic, the value that chance exceeds once in about 300,000: Wilson and Hilferty's approximation)."""
    freedom = len(expected) - 1
    statistic = sum((counts[key] - value) ** 2 / value for key, value in expected.items())
    return statistic, freedom * (1 - 2 / (9 * freedom) + 4.5 * math.sqrt(2 / (9 * freedom))) ** 3


@pytest.mark.slow
@pytest.mark.parametrize("temperature, top_k, top_p, min_p", [
    (1.0, 0, 1.0, 0.0), (0.7, 0, 1.0, 0.0), (1.5, 5, 1.0, 0.0), (1.0, 0, 0.8, 0.0), (1.3, 6, 0.9, 0.0),
    (1.0, 0, 1.0, 0.3), (1.5, 7, 0.95, 0.2)])
def test_sampled_pairs_have_their_exact_distribution(temperature, top_k, top_p, min_p):
    """Two tokens after one prompt: the chance of each pair is p(first) p(second | first), from full forwards."""
    llama, prompt, rows = tiny(seed=5, vocab_size=9), [3, 1, 4], 20_000
    expected = {}
    with torch.no_grad():
        first = probabilities_by_hand(next_logits(llama, prompt), temperature, top_k, top_p, min_p)
        for one, chance in first.items():
            logits = next_logits(llama, prompt + [one])
            for two, second in probabilities_by_hand(logits, temperature, top_k, top_p, min_p).items():
                expected[one, two] = rows * chance * second
    options = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
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


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-40, 1e-320])
def test_the_lower_the_temperature_the_surer_the_likeliest_token(temperature):
    logits = torch.randn(9, 11, generator=torch.Generator().manual_seed(3)).clamp(max=2) * 30
    logits[:, 4] = 100
    assert torch.equal(engine.filtered_probs(logits, temperature), torch.eye(11)[4].expand(9, 11))


@pytest.mark.parametrize("top_k, top_p, min_p", [(0, 1.0, 0.0), (4, 1.0, 0.0), (0, 0.7, 0.0), (0, 1.0, 0.25),
                                                 (6, 0.9, 0.15), (0, 1.0, 1.0)])
def test_filtered_probabilities_are_those_by_hand_and_those_of_transformers(top_k, top_p, min_p):
    logits = torch.randn(50, 11, generator=torch.Generator().manual_seed(3)) * 2
    found = engine.filtered_probs(logits, 1.3, top_k, top_p, min_p)
    expected = torch.zeros_like(found)
    for row, line in enumerate(logits.tolist()):
        for token, chance in probabilities_by_hand(line, 1.3, top_k, top_p, min_p).items():
            expected[row, token] = chance
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    hf = pytest.importorskip("transformers")
    warped = logits / 1.3
    for warper in ([hf.TopKLogitsWarper(top_k)] if top_k else []) + [hf.TopPLogitsWarper(top_p)] * (top_p < 1) + [
            hf.MinPLogitsWarper(min_p)] * (min_p > 0):
        warped = warper(None, warped)
    torch.testing.assert_close(found, warped.softmax(-1), rtol=1e-5, atol=1e-6)


def test_sampling_never_takes_what_has_no_chance():
    logits = torch.tensor([[-math.inf, 0.0, 0.0, -math.inf]] * 4)
    chance = torch.tensor([0.0, 0.499, 0.5, 1 - 2**-24])  # the ends of what torch.rand gives, and the middle
    assert engine.sample(logits, chance, 1.0).tolist() == [1, 1, 2, 2]


def test_sampling_is_that_of_the_plain_way():
    """The same seeds, the same chances, the same texts; also where tokens are looked up."""
    llama, seeds = tiny(seed=3, vocab_size=12), list(range(8))
    loops = [[token % 12 for token in prompt] for prompt in LOOPS]
    expected = model.generate(llama, loops, 25, temperature=0.7, stop_ids=(5,), seed=seeds)
    for draft in (0, 7):
        assert generate(llama, loops, 25, temperature=0.7, stop_ids=(5,), seed=seeds, draft=draft) == expected
    assert len(set(map(len, expected))) > 2


def test_nothing_to_write_is_no_error():
    """A resumed run may find all of its rows finished."""
    assert list(stream(tiny(), [], 5, 32)) == [] == list(stream(tiny(), [[1]], 0, 32))


@pytest.mark.cuda
def test_cuda_writes_what_a_cpu_writes():
    llama = tiny(seed=3)
    texts = generate(llama, LOOPS, 60, stop_ids=(5, 11, 30))
    llama.to("cuda")
    for draft in (0, 7):
        assert generate(llama, LOOPS, 60, stop_ids=(5, 11, 30), draft=draft) == texts
        assert dict(stream(llama, LOOPS, 60, 3, stop_ids=(5, 11, 30), draft=draft)) == dict(enumerate(texts))
    assert list(stream(llama, [], 5, 32)) == []


@pytest.mark.parametrize("changes", [{}, {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
                                     {"model_type": "qwen2"}, {"model_type": "qwen3"}], ids=str)
def test_weights_laid_out_for_a_cpu_write_the_same(changes):
    if not model.computes_bf16("cpu"):
        pytest.skip("this CPU does not multiply bf16")
    llama = tiny(seed=3, hidden_size=64, **changes).bfloat16()
    expected = [generate(llama, LOOPS, 40, draft=draft) for draft in (0, 7)]
    size = sum(p.numel() for p in llama.parameters())
    assert engine.prepack(llama) is llama
    assert sum(p.numel() for p in llama.parameters()) < size / 2, "the weights of the blocks are not there twice"
    assert [generate(llama, LOOPS, 40, draft=draft) for draft in (0, 7)] == expected


@pytest.mark.parametrize("changes", [{}, {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
                                     {"model_type": "qwen2"}, {"model_type": "qwen3"}], ids=str)
def test_joined_weights_write_the_same_in_fp32(changes):
    llama = tiny(seed=3, **changes)
    expected, size = model.generate(llama, LOOPS, 25), sum(p.numel() for p in llama.parameters())
    engine.prepack(llama)
    assert [generate(llama, LOOPS, 25, draft=draft) for draft in (0, 7)] == [expected] * 2
    assert sum(p.numel() for p in llama.parameters()) < 0.6 * size, "the joined weights are not there twice"


@pytest.mark.parametrize("counts", [[1, 1, 1, 1], [3, 3, 3, 3], [1, 1, 1, 7], [1, 4, 1, 1], [5, 1, 5, 5]])
def test_new_tokens_attend_as_in_the_whole_text(counts):
    """Rows that append unequally, on one grid or on two, against the texts computed whole."""
    llama = tiny(seed=3)
    texts = [random_tokens(length + count, seed=length).tolist() for length, count in zip((9, 4, 70, 1), counts)]
    cache = engine.Cache(llama.config, 4, torch.float32, "cpu")
    with torch.no_grad():
        engine.prefill(llama, cache, [text[:-count] for text, count in zip(texts, counts)], 0)
        found = engine.advance(llama, cache, [text[-count:] for text, count in zip(texts, counts)]).split(counts)
        for text, count, rows in zip(texts, counts, found):
            whole = model.logits(llama, torch.tensor([text]))[0, -count:]
            torch.testing.assert_close(rows, whole, rtol=1e-4, atol=1e-4)
    assert cache.lengths == list(map(len, texts))
    assert len(cache.grids) == (2 if counts in ([1, 1, 1, 7], [1, 4, 1, 1]) else 1)


def test_the_stop_token_is_told_where_it_is_asked_for():
    llama = tiny(seed=3)
    plain, told = (generate(llama, PROMPTS, 20, stop_ids=(5, 11, 30), keep_stop=keep) for keep in (False, True))
    assert [text[:len(short)] for text, short in zip(told, plain)] == plain
    ends = [text[len(short):] for text, short in zip(told, plain)]
    assert all(end in ([5], [11], [30]) if len(short) < 20 else end == [] for end, short in zip(ends, plain))
    assert len(set(map(tuple, ends))) > 2
