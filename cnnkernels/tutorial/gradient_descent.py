"""Gradient descent on y = x²: from x = 1, each step subtracts eta times the slope 2x.

A step multiplies x by 1 − 2·eta, so after n steps x = (1 − 2·eta)ⁿ.
"""

from __future__ import annotations

import torch

from cnnkernels.optim import SimpleGD
from cnnkernels.tutorial.program import Program, Values

START, ETA, STEPS = 1.0, 0.01, 800


def descend(steps: int = STEPS, eta: float = ETA) -> list[float]:
    """The values of x before the first step and after each step, on the backend in force."""
    x = torch.tensor([START], requires_grad=True)
    optimizer = SimpleGD([x], lr=eta)
    path = [x.item()]
    for _ in range(steps):
        optimizer.zero_grad()
        y = x[0] ** 2
        y.backward()
        optimizer.step()
        path.append(x.item())
    return path


def compute() -> Values:
    """Points of the descent on the backend in force."""
    path = descend()
    return {
        "x after 1 step": path[1],
        "x after 100 steps": path[100],
        "x after 800 steps": path[800],
        "y after 800 steps": path[800] ** 2,
        "x after each step": path[1:],
    }


def by_hand() -> Values:
    """Powers of 1 − 2·eta."""

    def x(n: int) -> float:
        return START * (1 - 2 * ETA) ** n

    return {
        "x after 1 step": x(1),
        "x after 100 steps": x(100),
        "x after 800 steps": x(800),
        "y after 800 steps": x(800) ** 2,
        "x after each step": [x(n) for n in range(1, STEPS + 1)],
    }


PROGRAM = Program(
    name="gradient-descent",
    chapter=2,
    title="Gradient descent on y = x²",
    explanation="800 steps of 0.01 from x = 1. By hand, x after n steps is 0.98ⁿ. The chapter "
    "shows the descent as an animation; --out saves it.",
    by_hand=by_hand,
    compute=compute,
    # 800 roundings, each of up to 2^-24 of the value, and twice that in y.
    tolerance=2 * STEPS * 2.0**-24,
)
