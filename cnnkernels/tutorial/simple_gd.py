"""An optimizer of one's own: the chapter's SimpleGD on y = x².

``cnnkernels.optim.SimpleGD`` is that class, its update p ← p − lr·∂y/∂p one kernel call for all
parameters. Here it is used with a closure, which ``step`` calls to compute y and its gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cnnkernels.optim import SimpleGD
from cnnkernels.tutorial.program import Program, Values

START, LEARNING_RATE, STEPS = 1.0, 0.1, 50


def compute() -> Values:
    """The end of the descent on the backend in force."""
    x = torch.tensor([START], requires_grad=True)
    optimizer = SimpleGD([x], lr=LEARNING_RATE)

    def closure() -> Tensor:
        optimizer.zero_grad()
        y = x[0] ** 2
        y.backward()
        return y

    losses = [optimizer.step(closure) for _ in range(STEPS)]
    return {
        "y that step 1 returns": losses[0],
        "y that step 50 returns": losses[-1],
        "x after 50 steps": x.item(),
    }


def by_hand() -> Values:
    """A step multiplies x by 1 − 2·0.1 = 0.8; step n returns y from before the step."""
    return {
        "y that step 1 returns": 1.0,
        "y that step 50 returns": (0.8**49) ** 2,
        "x after 50 steps": 0.8**50,
    }


PROGRAM = Program(
    name="simple-gd",
    chapter=2,
    title="SimpleGD on y = x²",
    explanation="50 steps of 0.1 from x = 1, with a closure. By hand, x after n steps is 0.8ⁿ.",
    by_hand=by_hand,
    compute=compute,
    # 50 roundings of x, and twice that in y = x².
    tolerance=2 * STEPS * 2.0**-24,
)
