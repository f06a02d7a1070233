"""How weights move: AdamW, its moments whole or in bf16, and the learning rate of each step."""
import math

import torch

from parallel import sliced, trained


def make_optimizer(llama, options):
    """AdamW, decay on matrices only, the update fused into one kernel; or with its moments in bf16."""
    parameters = trained(llama).values()
    groups = [{"params": [p for p in parameters if p.dim() > 1], "weight_decay": options.weight_decay},
              {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]
    if options.bf16_moments:
        return LeanAdamW(groups, lr=options.lr)
    return torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.95), fused=True)


class LeanAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) with both moments in bf16, rounded up or down at random: rounded
    to the nearest, an average that changes by less than 0.4 % a step would never change."""

    def __init__(self, groups, lr, betas=(0.9, 0.95), eps=1e-8):
        super().__init__(groups, dict(lr=lr, betas=betas, eps=eps))

    @torch.no_grad()
    def step(self):
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
