"""AdamW with its moments in bf16 and Muon: against PyTorch's, and through the training loop."""
import math

import pytest
import torch

import optimizers
import toy
import train
from common import UserError
from conftest import interrupt_at_state
from test_train import FAST, random_examples, timeless, tiny
from train import Options, Stage


def test_random_rounding_goes_to_the_two_neighbours_and_keeps_the_mean():
    x = torch.tensor([1.0, 1.001, -3.1415, 1e-20, 0.0]).repeat(20_000, 1)
    rounded = optimizers.rounded_at_random(x.contiguous(), torch.Generator().manual_seed(0))
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
            optimizer.step(closure=None)  # as torch.distributed.checkpoint calls it before it loads a state
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
    monkeypatch.setattr(optimizers, "rounded_at_random", lambda x, generator: x)
    torch.testing.assert_close(weights(ours)[0], expected, rtol=1e-5, atol=1e-6)


def test_muon_is_pytorchs_for_the_blocks_matrices_and_adamw_for_the_rest():
    """Five steps of a Llama whose matrices are square, wide and tall, with a decay that would show."""
    options, llamas = Options(lr=1e-2, weight_decay=0.1, precision="bf16"), (tiny(), tiny())
    ours = train.make_optimizer(llamas[0], options, "muon")
    named = dict(llamas[1].named_parameters())
    blocks = [p for name, p in named.items() if name.endswith("_proj.weight")]
    vectors = [p for p in named.values() if p.dim() == 1]
    tables = [p for name, p in named.items() if name.split(".")[-2] in ("embed_tokens", "lm_head")]
    assert len(blocks) == 7 * llamas[1].config.num_hidden_layers
    assert len(blocks) + len(vectors) + len(tables) == len(named)
    theirs = [torch.optim.Muon(blocks, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
              torch.optim.AdamW(tables, lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95)),
              torch.optim.AdamW(vectors, lr=1e-2, weight_decay=0.0, betas=(0.9, 0.95))]
    generator = torch.Generator().manual_seed(0)
    before = [p.detach().clone() for p in blocks]
    for _ in range(5):
        for name, parameter in llamas[0].named_parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            named[name].grad = parameter.grad.clone()
        for optimizer in (ours, *theirs):
            optimizer.step()
    for name, parameter in llamas[0].named_parameters():
        torch.testing.assert_close(parameter, named[name], rtol=1e-3, atol=2e-4)
    assert min((p - old).abs().mean() for p, old in zip(blocks, before)) > 2e-3


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_orthogonal_makes_all_singular_values_one_nearly(kind):
    """Of matrices whose values range over two decades; the vectors stay."""
    generator = torch.Generator().manual_seed(0)
    x = torch.stack([torch.linalg.qr(torch.randn(48, 16, generator=generator))[0].T for _ in range(3)])
    turn = torch.linalg.qr(torch.randn(16, 16, generator=generator))[0]
    values = torch.logspace(0, -2, 16)
    found = turn.T @ optimizers.orthogonal((turn @ (values[:, None] * x)).to(kind)).float() @ x.mT  # (3, 16, 16)
    diagonal = found.diagonal(dim1=1, dim2=2)
    assert 0.4 < diagonal.min() and diagonal.max() < 1.3 and (diagonal[:, :8] > 0.65).all()
    assert (found - torch.diag_embed(diagonal)).abs().max() < 0.03
    assert torch.equal(optimizers.orthogonal(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4))


def test_muon_says_what_it_does_not_heed(tmp_path, capsys):
    for extra in (["--lora-rank", "2"], ["--bf16-moments"]):
        with pytest.raises(SystemExit):
            train.arguments(["sft", "--model", "m", "--data", "d", "--out", "o", "--optimizer", "muon", *extra])
        assert f"{extra[0]} is for AdamW alone" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("kind, short", [({"bf16_moments": True}, 0.02), ({"optimizer": "muon"}, 0.2)],
                         ids=["bf16 moments", "muon"])
def test_another_optimizer_learns_and_resumes(kind, short, tmp_path, monkeypatch):
    """The loss falls as AdamW's, less a share of it."""
    def trained(out, resume=False, **changes):
        stage = Stage("sft", random_examples(64, 3), random_examples(16, 4))
        options = Options(**{**vars(FAST), "epochs": 8, "val_every": 1000, **changes})
        tokenizer = toy.train_tokenizer(["a b"], 300)
        return train.train(tiny(), tokenizer, [stage], tmp_path / out, options, resume, progress=False)
    whole = trained("whole", **kind)
    losses = [[row["loss"] for row in rows if "loss" in row] for rows in (whole, trained("fp32"))]
    start, reached = losses[0][0], [sum(column[-16:]) / 16 for column in losses]
    assert start - reached[1] > 0.5 and reached[0] - reached[1] < short * (start - reached[1])
    assert losses[0] != losses[1]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at_state(patch, 5)
        trained("killed", save_seconds=0, **kind)
    assert timeless(trained("killed", True, **kind)) == timeless(whole)


def test_a_gradient_that_is_no_number_is_not_saved(tmp_path, monkeypatch):
    """Not even in the last step, whose loss is still one."""
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(math.inf))
    with pytest.raises(UserError, match="its gradient's norm inf"):
        stage = Stage("pretrain", random_examples(4))
        train.train(tiny(), toy.train_tokenizer(["a b"], 300), [stage], tmp_path / "out", FAST, progress=False)
    assert not (tmp_path / "out" / "config.json").exists()
