"""The loss function: how far apart the network finds two images.

The chapter does not print its filter, but its two losses say enough about it. All images repeat a
2×2 block (a b; c d), so a 4×4 filter counts only by four sums A, B, C, D of its weights, one for
each place in the block, and gives aA + bB + cC + dD. The chapter's images (0 1; 0 0), (0 2; 0 0)
and (10 122; 1000 200) then have the losses

    (2B − B)² = 0.4581                       so  B = ±0.6768
    (10A + 122B + 1000C + 200D − B)² = 58437.6680

Many filters fulfil both. The one below has A = D = 0 and all its weights inside ±1/4, where torch
draws the weights of a 4×4 filter. It was made to give the two losses: that they come back shows
that the chapter's numbers fit together and that the layers add up, not which filter it had.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from cnnkernels import functional as F
from cnnkernels.tutorial import by_hand as hand
from cnnkernels.tutorial.program import Program, Values

SLIGHTLY_DIFFERENT, COMPLETELY_DIFFERENT = 0.4581, 58437.6680
INPUT = [[0.0, 1.0], [0.0, 0.0]]
TARGETS = {
    "the same image": INPUT,
    "0 and 2": [[0.0, 2.0], [0.0, 0.0]],
    "10, 122, 1000, 200": [[10.0, 122.0], [1000.0, 200.0]],
}


def filter_from_losses() -> list[list[float]]:
    """A 4×4 filter that gives the chapter's two losses (see the module's text)."""
    b = math.sqrt(SLIGHTLY_DIFFERENT)
    c = (math.sqrt(COMPLETELY_DIFFERENT) - 121 * b) / 1000
    # Each sum is spread evenly over its four weights.
    return (np.tile([[0.0, b], [c, 0.0]], (2, 2)) / 4).tolist()


def compute() -> Values:
    """The three losses on the backend in force."""
    weight = torch.tensor(filter_from_losses()).view(1, 1, 4, 4)

    def output(block: list[list[float]]) -> torch.Tensor:
        return F.conv2d(torch.tensor(block).repeat(2, 2).view(1, 1, 4, 4), weight)

    return {
        name: torch.nn.functional.mse_loss(output(INPUT), output(target))
        for name, target in TARGETS.items()
    }


def by_hand() -> Values:
    """The squared difference of two sums of sixteen products."""
    weight = [[filter_from_losses()]]

    def output(block: list[list[float]]) -> float:
        return float(hand.conv2d([np.tile(block, (2, 2))], weight).item())

    return {name: (output(INPUT) - output(target)) ** 2 for name, target in TARGETS.items()}


PROGRAM = Program(
    name="loss",
    chapter=1,
    title="The loss of three comparisons",
    explanation="The same image has loss 0 under any filter. The chapter does not print its "
    "filter; the one used here was derived from its two other losses, so these two rows show "
    "that the chapter's numbers fit together, not which filter it had.",
    printed={
        "the same image": 0.0,
        "0 and 2": SLIGHTLY_DIFFERENT,
        "10, 122, 1000, 200": COMPLETELY_DIFFERENT,
    },
    by_hand=by_hand,
    compute=compute,
)
