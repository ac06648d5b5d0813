"""Stride 2: the window moves two pixels at a time.

The image repeats the block (0 1; 0 0). A 2×2 window that moves by two meets exactly this block
each time, and picks the filter's upper right weight.
"""

from __future__ import annotations

import torch

from cnnkernels import nn
from cnnkernels.tutorial import by_hand as hand
from cnnkernels.tutorial.program import Program, Values

IMAGE = [
    [0.0, 1.0, 0.0, 1.0],
    [0.0, 0.0, 0.0, 0.0],
    [0.0, 1.0, 0.0, 1.0],
    [0.0, 0.0, 0.0, 0.0],
]
# The two filters that the chapter prints, of one channel each.
WEIGHT = [
    [[[-0.07809174, -0.39049476], [-0.00448102, -0.09000683]]],
    [[[0.03750324, 0.12070286], [-0.06378353, 0.22772777]]],
]


def compute() -> Values:
    """The layer with the chapter's weights, on the backend in force."""
    layer = nn.Conv2d(1, 2, kernel_size=2, stride=2, padding=0, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(WEIGHT))
        output = layer(torch.tensor(IMAGE).view(1, 1, 4, 4))
    return {
        "size of the output": output.size(),
        "first filter": output[0, 0],
        "second filter": output[0, 1],
    }


def by_hand() -> Values:
    """The sums of products, window by window."""
    first, second = hand.conv2d([IMAGE], WEIGHT, stride=2)
    return {
        "size of the output": (1, 2, 2, 2),
        "first filter": first,
        "second filter": second,
    }


PROGRAM = Program(
    name="stride",
    chapter=1,
    title="Two 2×2 filters at stride 2",
    explanation="All four windows hold the same block, whose only 1 meets the filter's upper right "
    "weight. The weights are those that the chapter prints.",
    printed={
        "size of the output": (1, 2, 2, 2),
        "first filter": [[-0.39049476, -0.39049476], [-0.39049476, -0.39049476]],
        "second filter": [[0.12070286, 0.12070286], [0.12070286, 0.12070286]],
    },
    by_hand=by_hand,
    compute=compute,
)
