"""One output of a 3×3 convolution, product by product: 15."""

from __future__ import annotations

import torch

from cnnkernels import functional as F
from cnnkernels.tutorial.program import Program, Values

WINDOW = [
    [1.0, 2.0, 3.0],
    [0.0, 1.0, 2.0],
    [3.0, 0.0, 1.0],
]
WEIGHT = [
    [2.0, 0.0, 1.0],
    [0.0, 1.0, 2.0],
    [1.0, 0.0, 2.0],
]


def compute() -> Values:
    """The convolution on the backend in force."""
    image = torch.tensor(WINDOW).view(1, 1, 3, 3)
    weight = torch.tensor(WEIGHT).view(1, 1, 3, 3)
    return {"one output": F.conv2d(image, weight).item()}


def by_hand() -> Values:
    """Nine products, added."""
    total = 0.0
    for row in range(3):
        for col in range(3):
            total += WINDOW[row][col] * WEIGHT[row][col]
    return {"one output": total}


PROGRAM = Program(
    name="worked-convolution",
    chapter=1,
    title="A 3×3 convolution, product by product",
    explanation="1·2 + 2·0 + 3·1 + 0·0 + 1·1 + 2·2 + 3·1 + 0·0 + 1·2: pixels and weights at the "
    "same place are multiplied, and the nine products added.",
    printed={"one output": 15.0},
    by_hand=by_hand,
    compute=compute,
)
