"""Training with torch.compile (`train.py --compile`): on a CPU it writes C++, which needs a compiler, on a GPU Triton.

What a block computes before its attention, and what after, becomes one function each: so a dozen passes over memory
between two matrix products become one. Attention stays as it is, for each batch has rows of other lengths. The first
step waits for the compiler; later runs find in PyTorch's cache what it made. It pays a little for small models, whose
steps are many small operations: 1.15 x on a CPU; at 40M parameters it gains nothing there (RESULTS.md, section 5).
"""
import torch

from common import UserError, first_line
from model import Block


def compile_blocks(llama):
    """Have a Llama's blocks compiled where gradients are computed; elsewhere they stay as they are. UserError where
    nothing can be compiled."""
    try:
        torch.compile(torch.sin)(torch.zeros(8, device=llama.device))
    except Exception as error:  # PyTorch has a kind for everything that can be missing
        raise UserError(f"--compile: does not work here ({first_line(error)}); install a C++ compiler (g++) and "
                        "Python's headers, or leave it out") from error
    parts = while_training(Block.before), while_training(Block.after)
    for block in llama.model.layers:
        block.parts = parts


def while_training(part):
    """A part of a block that is compiled, for any number of tokens, when gradients are first computed."""
    compiled = torch.compile(part, dynamic=True)

    def run(*given):
        return (compiled if torch.is_grad_enabled() else part)(*given)
    return run
