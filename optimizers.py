"""How weights move: AdamW, its moments whole or in bf16; Muon; and the learning rate of each step."""
import math

import torch

from common import refuse_given
from model import computes_half
from parallel import sliced, trained, whole


def make_optimizer(llama, options, kind="adamw"):
    """AdamW, decay on matrices only, the update fused into one kernel; or with its moments in bf16; or "muon", with
    Muon for the blocks' matrices."""
    parameters, muon = trained(llama), kind == "muon"
    inside = {name: p for name, p in parameters.items() if muon and ".layers." in name and p.dim() == 2}
    others = [p for name, p in parameters.items() if name not in inside]
    groups = [{"params": [p for p in others if p.dim() > 1], "weight_decay": options.weight_decay},
              {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0}]
    if options.bf16_moments:
        return LeanAdamW(groups, lr=options.lr)
    if muon:
        groups.append({"params": list(inside.values()), "weight_decay": options.weight_decay, "muon": True})
        return Muon(groups, computes_half(llama.device, options), lr=options.lr, betas=(0.9, 0.95), fused=True)
    return torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.95), fused=True)


def refuse_beside_muon(parser, args):
    """An error for options of AdamW's that were given beside --optimizer muon."""
    if args.optimizer == "muon":
        refuse_given(parser, args, ["bf16_moments", "lora_rank"], "is for AdamW alone; leave it or --optimizer out")


class Muon(torch.optim.AdamW):
    """Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) for the matrices of groups that say "muon",
    AdamW for what else there is. A matrix moves along the average of its gradients with all singular values made one,
    nearly: so also in directions that rare examples alone ask for. As far as an update of AdamW usually moves it (Liu
    et al., arXiv 2502.16982, equation 4), so that one learning rate serves both. half: it computes in bf16."""
    MOMENTUM = 0.95

    def __init__(self, groups, half, **options):
        super().__init__(groups, **options)
        self.half = half

    def step(self, closure=None):
        for group in self.param_groups:
            if group.get("muon"):
                self.move(group)
        return super().step(closure)  # which passes over weights without a gradient

    @torch.no_grad()
    def move(self, group):
        """Move a group's matrices and take their gradients away. Those of one shape, or lying down of one, go together,
        as many small products are slow."""
        alike = {}
        for weight in group["params"]:
            if weight.grad is not None:
                alike.setdefault(tuple(sorted(weight.shape)), []).append(weight)
        for (_, long), weights in alike.items():
            averages = [whole(self.average(weight)) for weight in weights]
            lying = torch.stack([a if a.shape[1] == long else a.T for a in averages])  # (matrices, short, long)
            for weight, update in zip(weights, orthogonal(lying.bfloat16() if self.half else lying)):
                update = update if weight.shape[1] == long else update.T
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(sliced(update.to(weight.dtype), weight), alpha=-0.2 * math.sqrt(long) * group["lr"])
                weight.grad = None

    def average(self, weight):
        """The average of a weight's gradients, the newest looked ahead to, as Nesterov's."""
        if not self.state[weight]:  # AdamW, when it loads a state, looks for a step in each
            self.state[weight].update(step=torch.tensor(0.0), average=torch.zeros_like(weight))
        average = self.state[weight]["average"].lerp_(weight.grad, 1 - self.MOMENTUM)
        return weight.grad.lerp(average, self.MOMENTUM)


def orthogonal(x):
    """Matrices (matrices, short, long) with their singular values moved to about one (0.7 to 1.2), by five steps of a
    polynomial that needs products alone (Newton and Schulz; the coefficients are Jordan's)."""
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        square = x @ x.mT
        factor = torch.baddbmm(square, square, square, beta=-4.775, alpha=2.0315)  # -4.775 S + 2.0315 S S
        x = torch.baddbmm(x, factor, x, beta=3.4445)                               # 3.4445 x + factor x
    return x


class LeanAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) with both moments in bf16, rounded up or down at random: rounded
    to the nearest, an average that changes by less than 0.4 % a step would never change."""

    def __init__(self, groups, lr, betas=(0.9, 0.95), eps=1e-8):
        super().__init__(groups, dict(lr=lr, betas=betas, eps=eps))

    @torch.no_grad()
    def step(self, closure=None):
        weights = [(group, weight) for group in self.param_groups for weight in group["params"]
                   if weight.grad is not None]
        for place, (group, weight) in enumerate(weights):
            state, gradient, (beta1, beta2) = self.state[weight], weight.grad.float(), group["betas"]
            steps = state["step"] = state.get("step", 0) + 1
            mean = state["mean"].float() if steps > 1 else torch.zeros_like(gradient)
            square = state["square"].float() if steps > 1 else torch.zeros_like(gradient)
            mean.lerp_(gradient, 1 - beta1)
            square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            generator = torch.Generator(weight.device).manual_seed(steps * 1_000_003 + place)
            state["mean"], state["square"] = (rounded_at_random(x, generator) for x in (mean, square))
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            spread = (square / (1 - beta2 ** steps)).sqrt_().add_(group["eps"])
            weight.addcdiv_(mean, spread, value=-group["lr"] / (1 - beta1 ** steps))


def rounded_at_random(x, generator):
    """fp32 to bf16, up or down with the chances that make the mean exact: noise is added to the bits that are cut."""
    noise = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    noise = sliced(noise, x)  # a slice's noise is that of the whole, however many slices there are
    return ((x.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32).bfloat16()


def learning_rate(step, total, options):
    """Linear warm-up over a share of the steps, then a cosine to zero."""
    rising = max(1, math.ceil(options.warmup * total))
    if step < rising:
        return options.lr * (step + 1) / rising
    return options.lr * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, total - rising)))
