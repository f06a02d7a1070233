"""PPO: its parts against figures worked out by hand or by brute force, a policy small enough that its optimum is
known in closed form, and whole runs against interrupted ones."""
import itertools
import json
import math
from collections import defaultdict
from dataclasses import replace
from functools import partial

import pytest
import torch

import checkpoint
import conftest
import model
import ppo
import reward
import toy
import train
from common import UserError, write_jsonl
from resume import Run, read_metrics, read_run

SIZES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
             max_position_embeddings=256, bos_token_id=0, eos_token_id=1)
FAST = dict(iterations=3, rollouts=12, minibatch=5, update_epochs=2, max_new_tokens=10, reference_count=12,
            lr=1e-3, precision="fp32")


def tiny(vocab_size=64, seed=0, **changes):
    return model.Llama(model.Config(vocab_size=vocab_size, **{**SIZES, **changes}), seed)


def word_tokenizer(size):
    """<s>, </s> and single letters, as words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    vocabulary = {"<s>": 0, "</s>": 1, **{chr(97 + i): 2 + i for i in range(size - 2)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


class Table:
    """A reward for each response, by its text."""

    def __init__(self, rewards):
        self.names, self.fingerprint, self.rewards = ["table"], {"table": "t"}, rewards

    def score(self, prompts, responses):
        return torch.tensor([[self.rewards[response] for response in responses]])


class Letters:
    """Two rewards: how many a's, how many words in all."""
    names, fingerprint = ["a", "long"], {"a": "letters", "long": "letters"}

    def score(self, prompts, responses):
        return torch.tensor([[response.split().count("a") for response in responses],
                             [len(response.split()) for response in responses]]).float()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with "policy", which answers in the embedded world's words, and prompts.jsonl."""
    folder = tmp_path_factory.mktemp("world")
    tokenizer = toy.train_tokenizer(list(toy.pretraining_texts(60, 0)), 1200)
    checkpoint.save(tiny(tokenizer.get_vocab_size(), tie_word_embeddings=True), folder / "policy")
    tokenizer.save(str(folder / "policy" / "tokenizer.json"))
    write_jsonl(folder / "prompts.jsonl", ({"prompt": row["prompt"]} for row in toy.rated(9, 1)))
    return folder


# ----------------------------------------------------------------------------- the parts, by hand


def test_gae_by_hand():
    advantages, returns = ppo.gae(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5, 1.0]]), 0.5, 0.5,
                                  torch.ones(1, 2, dtype=torch.bool))
    assert advantages.tolist() == [[1.25, 1.0]]  # deltas 1 + 0.5 * 1 - 0.5 = 1 and 2 - 1 = 1; 1 + 0.25 * 1
    assert returns.tolist() == [[1.75, 2.0]]


@pytest.mark.parametrize("gamma, gae_lambda", [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.7, 0.0), (0.0, 0.9)])
def test_gae_is_the_sum_of_its_definition(gamma, gae_lambda):
    generator = torch.Generator().manual_seed(1)
    rewards, values = torch.randn(2, 20, 9, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, 10, (20,), generator=generator)
    mask = torch.arange(9) < lengths[:, None]
    expected = torch.zeros(20, 9, dtype=torch.float64)
    for b, length in enumerate(lengths.tolist()):
        v = [*values[b, :length].tolist(), 0.0]
        for t in range(length):
            for s in range(t, length):
                delta = float(rewards[b, s]) + gamma * v[s + 1] - v[s]
                expected[b, t] += (gamma * gae_lambda) ** (s - t) * delta
    outside = torch.where(mask, 0, math.nan)  # what is masked must not matter
    advantages, returns = ppo.gae(rewards + outside, values + outside, gamma, gae_lambda, mask)
    torch.testing.assert_close(advantages, expected)
    torch.testing.assert_close(returns, torch.where(mask, expected + values, 0))
    if gamma == gae_lambda == 1:
        masked = torch.where(mask, rewards, 0)
        torch.testing.assert_close(returns, torch.where(mask, masked.flip(1).cumsum(1).flip(1), 0))


def test_kl_coef_is_steered_by_hand():
    options = ppo.Options(kl_target=6.0, kl_horizon=10_000)
    assert ppo.steered(0.05, 12.0, 128, options) == pytest.approx(0.05 * 1.00256)  # 100 % over: cut at 20 %
    assert ppo.steered(0.05, 5.4, 100, options) == pytest.approx(0.05 * 0.999)     # 10 % under
    assert ppo.steered(0.05, 6.0, 128, options) == pytest.approx(0.05)
    assert ppo.steered(0.05, 99.0, 128, ppo.Options(kl_target=0.0)) == 0.05


def test_standardised_and_scaled():
    values = 3 * torch.randn(40, generator=torch.Generator().manual_seed(0)) + 5
    white = ppo.standardised(values)
    assert white.mean().item() == pytest.approx(0, abs=1e-5) and white.std(correction=0).item() == pytest.approx(1)
    running = [0, 0.0, 0.0]
    first = ppo.scaled(values[:15], running)
    second = ppo.scaled(values[15:], running)
    torch.testing.assert_close(first, values[:15] / values[:15].std(correction=0))
    torch.testing.assert_close(second, values[15:] / values.std(correction=0))  # by all that came so far
    assert ppo.scaled(torch.ones(3), [0, 0.0, 0.0]).tolist() == [1, 1, 1]  # no deviation to divide by
    assert ppo.scaled(torch.tensor([0.0] * 400 + [50.0]), [0, 0.0, 0.0])[-1].item() == 10


# ----------------------------------------------------------------------------- rollouts


def rollouts_of(policy, count, options):
    prompts = [(f"prompt {i}", [0, *range(2, 3 + i % 4)]) for i in range(count)]
    return ppo.sample_rollouts(policy, word_tokenizer(12), prompts, 0, options)


def actions_of(rollout):
    return rollout.document.ids[rollout.document.start:].tolist()


def with_values(policy):
    """An agent whose values are not all zero."""
    agent = ppo.Agent(policy)
    torch.nn.init.normal_(agent.value.weight, generator=torch.Generator().manual_seed(0))
    return agent


def test_logprobs_are_the_policys_own():
    """Of every action, the stop token included, against one text at a time through the plain forward pass."""
    policy, reference = tiny(12, seed=1), tiny(12, seed=2)
    options = ppo.Options(max_new_tokens=9, precision="fp32", micro_tokens=40)
    agent, rollouts = with_values(policy), rollouts_of(policy, 25, options)
    assert {rollout.finished for rollout in rollouts} == {True, False}
    logprobs, ref_logprobs, values, mask = ppo.evaluate_rollouts(agent, reference, rollouts, options)
    for row, rollout in enumerate(rollouts):
        actions, start = torch.tensor(actions_of(rollout)), rollout.document.start - 1
        assert rollout.finished == (actions[-1] == 1) and 1 not in actions[:-1] and len(actions) <= 9
        tokens = torch.tensor([rollout.document.ids.tolist()])
        for llama, found in ((policy, logprobs), (reference, ref_logprobs)):
            expected = model.logits(llama, tokens)[0, start:-1].log_softmax(-1).gather(1, actions[:, None])[:, 0]
            torch.testing.assert_close(found[row, :len(actions)], expected, rtol=1e-4, atol=1e-5)
        expected = agent.value(policy(tokens)[0, start:-1])[:, 0]
        torch.testing.assert_close(values[row, :len(actions)], expected, rtol=1e-4, atol=1e-5)
        assert mask[row].sum() == len(actions) and expected.abs().min() > 0
        assert not any(x[row, len(actions):].any() for x in (logprobs, ref_logprobs, values))


def test_logprobs_are_those_that_were_sampled_from():
    """Each action is where its random number falls in the cumulative distribution of the policy, as the plain forward
    pass gives it; its log-probability is the width of that interval. By another model's, it would not be."""
    policy, other, options = tiny(12, seed=1), tiny(12, seed=2), ppo.Options(max_new_tokens=9, precision="fp32")
    outside = {policy: 0, other: 0}
    for seed in range(12):
        rollout, = rollouts = rollouts_of(policy, 1, replace(options, seed=seed))
        logprobs, *_ = ppo.evaluate_rollouts(ppo.Agent(policy), policy, rollouts, options)
        chances, = model.uniforms([ppo.seed_from(seed, 0, 0)], 1, 9)
        tokens, actions = torch.tensor([rollout.document.ids.tolist()]), torch.tensor(actions_of(rollout))[:, None]
        for llama in outside:
            probabilities = model.logits(llama, tokens)[0, rollout.document.start - 1:-1].double().softmax(-1)
            ends, width = (x.gather(1, actions)[:, 0] for x in (probabilities.cumsum(1), probabilities))
            chance = chances[:len(actions)].double()
            outside[llama] += int(((chance < ends - width - 1e-6) | (chance > ends + 1e-6)).sum())
            if llama is policy:
                torch.testing.assert_close(logprobs[0].double().exp(), width, rtol=1e-4, atol=1e-6)
    assert outside[policy] == 0 and outside[other] > 20


def test_minibatches_line_up_with_what_was_evaluated():
    """With a learning rate of 0, every pass over the shuffled, packed, cut rollouts gives the ratios 1 and the same
    values; with the wrong alignment it would not."""
    policy, options = tiny(12, seed=1), ppo.Options(**{**FAST, "lr": 0.0, "micro_tokens": 30, "max_new_tokens": 9})
    agent, rollouts = with_values(policy), rollouts_of(policy, 17, options)
    logprobs, _, values, mask = ppo.evaluate_rollouts(agent, policy, rollouts, options)
    known = torch.stack((logprobs, values, torch.ones_like(logprobs), torch.where(mask, values + 2, 0)))
    learned = ppo.learn(agent, train.make_optimizer(agent, options), rollouts, known, mask, 0, options)
    assert learned["approx_kl"] == pytest.approx(0, abs=1e-9) and learned["clip_fraction"] == 0
    assert learned["policy_loss"] == pytest.approx(-1, abs=1e-5)
    assert learned["value_loss"] == pytest.approx(2, abs=1e-4)


def test_a_rollout_ends_with_the_stop_token_that_was_drawn():
    """Of several, as Llama 3's instruct models have them: it is an action like the others, with its own probability."""
    policy, options = tiny(12, seed=1, eos_token_id=[1, 5]), ppo.Options(max_new_tokens=9, precision="fp32")
    rollouts = rollouts_of(policy, 25, options)
    for rollout in rollouts:
        ids, start = list(rollout.document.ids), rollout.document.start
        seed = ppo.seed_from(options.seed, 0, int(rollout.prompt.split()[1]))
        drawn, = model.generate(policy, [ids[:start]], 9, temperature=1.0, seed=[seed])
        assert ids[start:] == drawn[:len(ids) - start] and rollout.finished == (ids[-1] in (1, 5))
        assert not {1, 5} & set(ids[start:-1])
    assert {rollout.document.ids[-1] for rollout in rollouts if rollout.finished} == {1, 5}


def test_a_reward_that_scores_all_alike_is_divided_by_1():
    """In fp32, the deviation of 256 times 0.7 is 1.2e-7 on some machines: rounding must not be blown up to a score."""
    class Alike:
        names = ["alike"]

        def score(self, prompts, responses):
            return torch.full((1, len(responses)), 0.7)
    options = ppo.Options(**{**FAST, "reference_count": 256, "rollouts": 64})
    prompts = [(f"prompt {i}", [0, 2 + i % 5]) for i in range(9)]
    mean, std = ppo.normalisation(tiny(12, seed=1), word_tokenizer(12), prompts, Alike(), options)
    assert std == [1] and mean == pytest.approx([0.7])


def test_texts_do_not_depend_on_batch_mates():
    policy, options = tiny(12, seed=1), ppo.Options(max_new_tokens=9, precision="fp32")
    together = {rollout.prompt: rollout.response for rollout in rollouts_of(policy, 9, options)}
    few = {rollout.prompt: rollout.response for rollout in rollouts_of(policy, 4, options)}
    assert few.items() <= together.items()
    other = rollouts_of(policy, 9, replace(options, seed=1))
    assert {rollout.prompt: rollout.response for rollout in other} != together


# ----------------------------------------------------------------------------- the optimum in closed form


def response_probabilities(policy, prompt, most):
    """{text: probability} of every response of at most `most` tokens to a prompt (ids), exactly."""
    tokenizer, size, found = word_tokenizer(policy.config.vocab_size), policy.config.vocab_size, {}
    with torch.no_grad():
        for words in itertools.product(range(size), repeat=most):
            new = list(words[:words.index(1)] if 1 in words else words)
            logprobs = model.logits(policy, torch.tensor([prompt + list(words)]))[0, len(prompt) - 1:-1].log_softmax(-1)
            actions = new + [1] * (len(new) < most)
            chance = sum(float(logprobs[t, action]) for t, action in enumerate(actions))
            found[tokenizer.decode(new)] = math.exp(chance)
    return found


def distance(p, q):
    """Total variation."""
    return sum(abs(p[text] - q[text]) for text in p) / 2


@pytest.mark.slow
def test_ppo_finds_the_optimum_of_reward_minus_divergence(tmp_path):
    """max_pi E[r] - beta KL(pi || reference) is solved by pi = reference * exp(r / beta) / Z."""
    beta, policy, tokenizer = 0.5, tiny(6, seed=3, num_hidden_layers=1), word_tokenizer(6)
    before = response_probabilities(policy, [0, 2], 2)
    assert len(before) == 31 and sum(before.values()) == pytest.approx(1)
    table = dict(zip(before, torch.randn(31, generator=torch.Generator().manual_seed(5)).tolist()))
    weights = {text: chance * math.exp(table[text] / beta) for text, chance in before.items()}
    optimum = {text: weight / sum(weights.values()) for text, weight in weights.items()}
    options = ppo.Options(iterations=100, rollouts=256, minibatch=128, max_new_tokens=2, reference_count=0,
                          lr=2e-3, kl_coef=beta, kl_target=0, norm_adv=False, scale_reward=False,
                          unfinished_penalty=0, precision="fp32")
    rows = ppo.improve(policy, tokenizer, ["a"], Table(table), [1.0], "linear", tmp_path, options, progress=False)
    after = response_probabilities(policy, [0, 2], 2)
    assert distance(before, optimum) > 0.3 and distance(after, optimum) < 0.03  # 0.703 and 0.012
    kl = sum(chance * math.log(chance / before[text]) for text, chance in after.items())
    assert sum(row["kl"] for row in rows[-10:]) / 10 == pytest.approx(kl, rel=0.1)
    assert sum(row["reward"] for row in rows[-10:]) / 10 == pytest.approx(
        sum(chance * table[text] for text, chance in optimum.items()), abs=0.1)


# ----------------------------------------------------------------------------- whole runs


def small_run(out, resume=False, policy=None, prompts=("a b", "b", "c c a"), weights=(1.0, -0.5),
              scalarization="linear", **changes):
    policy, options = policy or tiny(12, seed=1), ppo.Options(**{**FAST, **changes})
    rows = ppo.improve(policy, word_tokenizer(12), list(prompts), Letters(), weights, scalarization, out, options,
                       resume, progress=False)
    return rows, policy


def timeless(rows):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def killed(monkeypatch, out, states, **changes):
    """A run that dies when it is about to save once more."""
    plain, saved = Run.save, []

    def save(run, **parts):
        if len(saved) == states:
            raise KeyboardInterrupt
        saved.append(plain(run, **parts))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "save", save)
        small_run(out, save_seconds=0, **changes)


def test_a_killed_run_resumes_as_if_nothing_had_been(tmp_path, monkeypatch):
    rows, policy = small_run(tmp_path / "whole", iterations=5, kl_target=1.0)
    assert not (tmp_path / "whole" / "state.pt").exists()
    for states in (1, 3):
        out = tmp_path / str(states)
        killed(monkeypatch, out, states, iterations=5, kl_target=1.0)
        assert len(read_metrics(out)) == states + 1  # a row more than the state knows of
        resumed, _ = small_run(out, True, iterations=5, kl_target=1.0)
        assert timeless(resumed) == timeless(rows)
        assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
        assert not (out / "state.pt").exists()
    assert small_run(out, True, iterations=5, kl_target=1.0)[0] == resumed  # finished already


def test_metrics_are_what_they_say(tmp_path):
    rows, policy = small_run(tmp_path, kl_target=0.5, kl_horizon=100)
    loaded = checkpoint.load(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), policy.parameters()))
    assert checkpoint.load_tokenizer(tmp_path).to_str() == word_tokenizer(12).to_str()
    assert [row["iteration"] for row in rows] == [1, 2, 3] and rows[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert rows[0]["score"].keys() == {"a", "long"} and rows[0]["kl_coef"] == 0.05
    for before, after in zip(rows, rows[1:]):
        assert after["kl_coef"] == pytest.approx(ppo.steered(before["kl_coef"], before["kl"], 12,
                                                                    ppo.Options(kl_target=0.5, kl_horizon=100)))
        assert after["tokens"] - before["tokens"] == pytest.approx(12 * after["length"])
    assert all(0 <= row[name] <= 1 for row in rows for name in ("unfinished", "clip_fraction"))
    assert all(0 < row["entropy"] < math.log(12) * 2 for row in rows)


def test_scores_are_normalised_by_the_references(tmp_path):
    """The reward of the first iteration, recomputed from answers drawn here."""
    rows, _ = small_run(tmp_path, iterations=1, reference_count=30)
    policy, options = tiny(12, seed=1), ppo.Options(**{**FAST, "reference_count": 30})
    encoded = ppo.encode_prompts(word_tokenizer(12), ["a b", "b", "c c a"], policy.config, options)
    mean, std = (torch.tensor(x) for x in ppo.normalisation(policy, word_tokenizer(12), encoded, Letters(), options))
    scores = torch.tensor([rows[0]["score"]["a"], rows[0]["score"]["long"]])
    assert rows[0]["reward"] == pytest.approx(float(((scores - mean) / std) @ torch.tensor([1.0, -0.5])), rel=1e-4)
    assert (mean > 0).all() and (std > 0).all() and abs(rows[0]["reward"]) < 3
    alike = Table(defaultdict(lambda: 2.5))
    assert ppo.normalisation(policy, word_tokenizer(12), encoded, alike, options) == ([2.5], [1.0])


def test_other_settings_are_refused_on_resume(tmp_path, monkeypatch):
    killed(monkeypatch, tmp_path, 1)
    others = dict(lr=2e-3, seed=1, weights=(1.0, 0.0), prompts=["a"], scalarization="median", policy=tiny(12, seed=2))
    names = dict(prompts="data", policy="model")
    for name, value in others.items():
        with pytest.raises(UserError, match=f"unfinished run with other {names.get(name, name)}[ ;]"):
            small_run(tmp_path, True, **{name: value})
    monkeypatch.setattr(Letters, "fingerprint", "letters that score otherwise")
    with pytest.raises(UserError, match="unfinished run with other rewards;"):
        small_run(tmp_path, True)
    monkeypatch.undo()
    (tmp_path / "state.pt").write_bytes(b"torn")
    with pytest.raises(UserError, match="cannot be read"):
        small_run(tmp_path, True)


def test_prompts_that_do_not_fit_are_left_out(tmp_path, capsys):
    small_run(tmp_path, prompts=("a", "a " * 250), iterations=1)
    assert "1 of 2 prompts left out" in capsys.readouterr().out
    with pytest.raises(UserError, match="none of 1 prompts"):
        small_run(tmp_path, prompts=("a " * 250,))


def test_a_policy_learns_to_say_what_is_rewarded(tmp_path):
    rows, _ = small_run(tmp_path, weights=(1.0, 0.0), iterations=15, rollouts=32, minibatch=16, update_epochs=4,
                        lr=3e-3)
    assert rows[-1]["score"]["a"] > 3 * rows[0]["score"]["a"] > 0


def test_a_policy_learns_to_end_its_answers(tmp_path):
    """Where nothing else is rewarded, for the sake of the penalty alone."""
    few = dict(weights=(0.0, 0.0), iterations=8, rollouts=32, minibatch=16, update_epochs=4, lr=3e-3, kl_coef=0.0)
    rows, _ = small_run(tmp_path / "with", **few)
    assert rows[0]["unfinished"] > 0.2 and rows[-1]["unfinished"] < 0.1 and rows[-1]["reward"] == 0
    rows, _ = small_run(tmp_path / "without", unfinished_penalty=0.0, norm_adv=False, **few)
    assert rows[-1]["unfinished"] > 0.2 and rows[-1]["kl"] == pytest.approx(0, abs=1e-3)  # nothing to learn


# ----------------------------------------------------------------------------- command line


run = partial(conftest.run, ppo)


def command(world, out, *more, reward=("toy:helpfulness", "toy:conciseness")):
    words = ["--model", world / "policy", "--data", world / "prompts.jsonl", "--reward", *reward, "--out", out]
    words += ["--iterations", 2, "--rollouts", 6, "--minibatch", 3, "--update-epochs", 1, "--max-new-tokens", 8,
              "--reference-count", 6, "--device", "cpu", *more]
    return [str(word) for word in words]


def test_command_line(world, tmp_path, monkeypatch, capsys):
    weights = tmp_path / "weights.json"
    weights.write_text(json.dumps({"helpfulness": 2, "conciseness": -0.5, "bias": 1}))
    words = command(world, tmp_path / "out", "--weights", weights, "--scalarization", "worst_case")
    assert run(monkeypatch, words) == 0
    assert "rewards: 2 x helpfulness, -0.5 x conciseness" in capsys.readouterr().out
    rows = read_metrics(tmp_path / "out")
    assert len(rows) == 2 and list(rows[0]["score"]) == ["helpfulness", "conciseness"]
    checkpoint.load(tmp_path / "out")
    assert run(monkeypatch, command(world, tmp_path / "bf16", "--precision", "bf16", "--no-norm-adv")) == 0


def test_a_scalarizations_options_reach_the_rewards_and_the_settings(world, tmp_path, monkeypatch, capsys):
    seen, scalarize = [], reward.scalarize
    monkeypatch.setattr(reward, "scalarize", lambda scores, weights, name, **of: seen.append((name, of))
                        or scalarize(scores, weights, name, **of))
    words = ["--reward", "toy:detail", "toy:bias", "--scalarization", "lower_quantile", "share=0.5"]
    assert run(monkeypatch, command(world, tmp_path / "out", *words)) == 0
    assert set(map(str, seen)) == {"('lower_quantile', {'share': 0.5})"}
    assert json.loads((tmp_path / "out" / "run.json").read_text())["settings"]["scalarization"] == (
        "lower_quantile share=0.5")
    words[-1] = "share=1"
    assert run(monkeypatch, command(world, tmp_path / "out", *words)) == 2
    assert "other scalarization" in capsys.readouterr().err


def test_adapters_learn_while_the_base_is_shared_with_the_reference_and_stays_as_it_was(world, tmp_path, monkeypatch):
    seen, evaluate = [], ppo.evaluate_rollouts
    monkeypatch.setattr(ppo, "evaluate_rollouts", lambda agent, reference, *rest: seen.append((agent.policy, reference))
                        or evaluate(agent, reference, *rest))
    before = (world / "policy" / "model.safetensors").read_bytes()
    assert run(monkeypatch, command(world, tmp_path / "out", "--lora-rank", 2, "--lr", "0.01", "--precision", "fp32",
                                    "--no-centre")) == 0
    policy, reference = seen[-1]
    here, there = policy.model.layers[0].mlp.up_proj, reference.model.layers[0].mlp.up_proj
    assert here.weight is there.weight and there.lora_B.abs().max() == 0 < here.lora_B.abs().max()
    assert (world / "policy" / "model.safetensors").read_bytes() == before
    assert (tmp_path / "out" / "adapter_config.json").exists()
    loaded, tokens = checkpoint.load(tmp_path / "out"), torch.arange(2, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(model.logits(loaded, tokens), model.logits(policy, tokens), rtol=1e-4, atol=1e-4)


def test_a_reward_that_all_answers_share_teaches_nothing_when_centred(tmp_path):
    """Values are zero at first, so an equal reward would otherwise make every word likelier, or less likely."""
    few = dict(unfinished_penalty=0.0, norm_adv=False, reference_count=0, iterations=2, kl_coef=0.0, gae_lambda=0.9)
    moved = {}
    for centre in (True, False):
        policy = tiny(12, seed=1)
        rows = ppo.improve(policy, word_tokenizer(12), ["a b", "b"], Table(defaultdict(lambda: 2.5)), [1.0], "linear",
                           tmp_path / str(centre), ppo.Options(**{**FAST, **few, "centre": centre}), progress=False)
        moved[centre] = rows[-1]["kl"]
    assert moved[True] == pytest.approx(0, abs=1e-5) and abs(moved[False]) > 1e-4


def test_a_finished_policy_is_the_answer_to_its_own_question_only(world, tmp_path, monkeypatch, capsys):
    words = command(world, tmp_path / "out")
    assert run(monkeypatch, words) == 0 == run(monkeypatch, words)
    assert "finished already" in capsys.readouterr().out
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    for more, name in ((["--seed", "1"], "seed (0, now 1)"), (["--weights", "1", "2"], "weights"),
                       (["--reward", "toy:detail", "toy:bias"], "rewards"), (["--scalarization", "median"], "scalar")):
        for flags in ([], ["--resume"]):
            conftest.refused(ppo, monkeypatch, capsys, [*words, *more, *flags], "finished run with other", name)
    conftest.refused(ppo, monkeypatch, capsys, [*words, "--resume", "--overwrite"], "give one of them")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert run(monkeypatch, [*words, "--seed", "1", "--overwrite"]) == 0
    assert read_run(tmp_path / "out")["settings"]["seed"] == 1


@pytest.mark.cuda
def test_a_gpu_trains_the_policy(world, tmp_path, monkeypatch):
    words = command(world, tmp_path / "out", "--lora-rank", 2, "--bf16-moments")
    assert run(monkeypatch, [*words, "--device", "cuda"]) == 0
    assert all(math.isfinite(row["policy_loss"]) for row in read_metrics(tmp_path / "out"))


@pytest.mark.parametrize("more, expected", [
    (["--weights", "1"], "1 for 2 rewards"), (["--weights", "1", "x"], "not all numbers"),
    (["--weights", "1", "nan"], "not all finite"),
    (["--reward", "toy:charm"], "cannot judge 'charm'"), (["--reward", "nowhere"], "nowhere"),
    (["--reward", "toy:bias", "toy:bias"], "given twice"), (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
    (["--model", "nowhere"], "nowhere"), (["--out", "POLICY"], "model to start from")])
def test_refused(world, tmp_path, monkeypatch, capsys, more, expected):
    more = [str(world / "policy") if word == "POLICY" else word for word in more]
    assert run(monkeypatch, command(world, tmp_path / "out", *more)) == 2
    message, = capsys.readouterr().err.strip().splitlines()
    assert message.startswith("error: ") and expected in message and not (tmp_path / "out").exists()


@pytest.mark.parametrize("more, expected", [
    (["--scalarization", "guess"], ("--scalarization", "'guess'", "worst_case")),
    (["--clip-coef", "0"], ("--clip-coef", "0 must be from 1e-09 to")), (["--lr", "nan"], ("--lr", "nan must be")),
    (["--gae-lambda", "1.1"], ("--gae-lambda", "from 0 to 1")), (["--rollouts", "0"], ("--rollouts", "from 1 to"))])
def test_mistakes_are_refused_before_any_model_is_loaded(world, tmp_path, monkeypatch, capsys, more, expected):
    for name in ("Together", "device_named"):  # what main begins with
        monkeypatch.delattr(ppo, name)
    conftest.refused(ppo, monkeypatch, capsys, command(world, tmp_path / "out", *more), *expected)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content, said", [
    ('{"a": 1}', "no weight for b"), ('{"a": 1, "b": [2]}', "are not all numbers"), ('{"a": 1, "b": NaN}', "not all f"),
    ("[1, 2]", "no weight for a, b"), ("{", "invalid JSON")])
def test_a_file_of_weights_is_named_with_what_is_wrong_in_it(tmp_path, content, said):
    (tmp_path / "w.json").write_text(content)
    with pytest.raises(UserError, match=rf"w\.json.*{said}"):
        reward.read_weights([str(tmp_path / "w.json")], ["a", "b"])


def test_weights_are_for_the_models_that_they_were_fitted_to(tmp_path):
    (tmp_path / "w.json").write_text('{"a": 1, "b": 2, "of": {"a": "x", "b": "y"}}')
    words, names = [str(tmp_path / "w.json")], ["b", "a"]
    assert reward.read_weights(words, names, {"a": "x", "b": "y"}) == [2.0, 1.0] == reward.read_weights(words, names)
    for other in ({"a": "x", "b": "z"}, {"a": "x", "b": None}):
        with pytest.raises(UserError, match="w.json: was fitted to other models of b; run"):
            reward.read_weights(words, names, other)


def test_several_kinds_of_reward_keep_their_order(monkeypatch, tmp_path):
    class Scorers:
        def __init__(self, folders, device=None):
            self.names = [folder.rsplit("/", 1)[-1] for folder in folders]
            self.fingerprint = {name: f"of {name}" for name in self.names}

        def score(self, prompts, responses):
            return torch.tensor([[float(len(name))] * len(prompts) for name in self.names])

    monkeypatch.setattr(ppo.reward, "Scorers", Scorers, raising=False)
    for name in ("a", "bbb"):
        (tmp_path / name).mkdir()
    rewards = ppo.Together([f"{tmp_path}/bbb", "toy:toxicity", f"{tmp_path}/a", "toy:detail"])
    prompt = next(iter(toy.TASK_OF_QUESTION))
    text = f"{toy.SENTENCES['insult'][0]} {toy.SENTENCES['insult'][1]} {toy.SENTENCES['warning'][0]}"
    assert rewards.names == ["bbb", "toxicity", "a", "detail"] and len(rewards.fingerprint) == 4
    assert rewards.fingerprint["toxicity"] == "exact" and rewards.fingerprint["bbb"] == "of bbb"
    assert rewards.score([prompt], [text]).tolist() == [[3.0], [-2.0], [1.0], [1.0]]
