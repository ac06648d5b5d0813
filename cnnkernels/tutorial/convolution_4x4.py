"""A 4×4 filter on a 4×4 image: one position, sixteen products, one number."""

from __future__ import annotations

import torch

from cnnkernels import nn
from cnnkernels.tutorial.max_pooling import IMAGE
from cnnkernels.tutorial.program import Program, Values

# The chapter's filter is random; these are the weights that it prints.
WEIGHT = [
    [-0.03335193, -0.05553913, 0.10690624, -0.0219309],
    [-0.02052614, 0.23662615, -0.07596081, -0.04400161],
    [0.19031712, -0.06902602, -0.24611491, -0.06604707],
    [-0.05149609, -0.08155683, 0.06496871, -0.15480098],
]


def compute() -> Values:
    """The layer with the chapter's weights, on the backend in force."""
    layer = nn.Conv2d(in_channels=1, out_channels=1, kernel_size=4, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(WEIGHT))
        output = layer(torch.tensor(IMAGE).view(1, 1, 4, 4))
    return {
        "size of the output": output.size(),
        "output": output.item(),
        "output, the chapter's own sum": output.item(),
    }


def by_hand() -> Values:
    """Sixteen products, added row by row.

    The chapter calls the outer index the column and the inner one the row; in a square filter the
    sum is the same. It prints the weights to eight decimals, so that its sum of the unrounded ones
    differs in the eighth digit.
    """
    total = 0.0
    for row in range(4):
        for col in range(4):
            total += WEIGHT[row][col] * IMAGE[row][col]
    return {
        "size of the output": (1, 1, 1, 1),
        "output": total,
        "output, the chapter's own sum": total,
    }


PROGRAM = Program(
    name="convolution-4x4",
    chapter=1,
    title="A 4×4 filter on a 4×4 image",
    explanation="The filter fits the image in one position only, so the output is one number. The "
    "chapter prints it twice, from the layer and from a sum of its own, and the weights to eight "
    "decimals.",
    printed={
        "size of the output": (1, 1, 1, 1),
        "output": -0.8313058,
        "output, the chapter's own sum": -0.8313058316707611,
    },
    by_hand=by_hand,
    compute=compute,
)
