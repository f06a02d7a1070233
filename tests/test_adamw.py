"""AdamW with its moments in bf16: against PyTorch's, and through the training loop."""
import math

import pytest
import torch

import adamw
import toy
import train
from common import UserError
from conftest import interrupt_at_state
from test_train import FAST, random_examples, timeless, tiny
from train import Options, Stage


def test_random_rounding_goes_to_the_two_neighbours_and_keeps_the_mean():
    x = torch.tensor([1.0, 1.001, -3.1415, 1e-20, 0.0]).repeat(20_000, 1)
    rounded = adamw.rounded_at_random(x.contiguous(), torch.Generator().manual_seed(0))
    assert rounded.dtype == torch.bfloat16 and (rounded[:, 0] == 1).all() and (rounded[:, 4] == 0).all()
    for column, value in zip(rounded.float().T, x[0].tolist()):
        assert len(column.unique()) <= 2
        assert column.double().mean().item() == pytest.approx(value, rel=1e-4)
    assert abs(x[0, 1].bfloat16().item() - 1.001) > 9e-4  # which to the nearest would be lost


def test_lean_adamw_is_adamw_but_for_the_rounding(monkeypatch):
    """With moments kept whole, the same weights as PyTorch's; with bf16 moments, 4 bytes of state for each weight."""
    def weights(optimizer_of, steps=20):
        layer = torch.nn.Linear(8, 4)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
        optimizer, generator = optimizer_of(layer), torch.Generator().manual_seed(1)
        for _ in range(steps):
            layer(torch.randn(5, 8, generator=generator)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return layer.weight.detach().clone(), optimizer

    def theirs(layer):
        return train.make_optimizer(layer, Options(lr=1e-2, weight_decay=0.1))

    def ours(layer):
        return train.make_optimizer(layer, Options(lr=1e-2, weight_decay=0.1, bf16_moments=True))
    expected, _ = weights(theirs)
    lean, optimizer = weights(ours)
    torch.testing.assert_close(lean, expected, rtol=0.02, atol=0.005)
    state = next(iter(optimizer.state.values()))
    assert sum(x.nbytes for x in state.values() if isinstance(x, torch.Tensor)) == 4 * 32
    monkeypatch.setattr(adamw, "rounded_at_random", lambda x, generator: x)
    torch.testing.assert_close(weights(ours)[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_bf16_moments_reach_the_same_loss_and_resume(tmp_path, monkeypatch):
    def trained(out, resume=False, **changes):
        stage = Stage("sft", random_examples(64, 3), random_examples(16, 4))
        options = Options(**{**vars(FAST), "epochs": 8, "save_seconds": 0, **changes})
        tokenizer = toy.train_tokenizer(["a b"], 300)
        return train.train(tiny(), tokenizer, [stage], tmp_path / out, options, resume, progress=False)
    whole = trained("lean", bf16_moments=True)
    losses = [[row["loss"] for row in rows if "loss" in row] for rows in (whole, trained("fp32"))]
    start, reached = losses[0][0], [sum(column[-16:]) / 16 for column in losses]
    assert start - reached[1] > 0.5 and abs(reached[0] - reached[1]) < 0.02 * (start - reached[1])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at_state(patch, 5)
        trained("killed", bf16_moments=True)
    assert timeless(trained("killed", True, bf16_moments=True)) == timeless(whole)


def test_a_gradient_that_is_no_number_is_not_saved(tmp_path, monkeypatch):
    """Not even in the last step, whose loss is still one."""
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(math.inf))
    with pytest.raises(UserError, match="its gradient's norm inf"):
        stage = Stage("pretrain", random_examples(4))
        train.train(tiny(), toy.train_tokenizer(["a b"], 300), [stage], tmp_path / "out", FAST, progress=False)
    assert not (tmp_path / "out" / "config.json").exists()
