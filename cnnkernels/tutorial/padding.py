"""How kernel size and padding decide the size of the output, in three examples at stride 2.

For the second and third example the chapter shows, under the name of filter, a 1×1 and a 2×2
matrix. No 3×3 filter looks like that; they are the outputs. Each output pins the few weights that
meet a 1 of the image, and no other weight matters, so the chapter's numbers come back.
"""

from __future__ import annotations

import torch

from cnnkernels import functional as F
from cnnkernels.tutorial import by_hand as hand
from cnnkernels.tutorial.program import Program, Values
from cnnkernels.tutorial.stride import IMAGE, WEIGHT

# Example 2: the only window has its 1s under the top and the bottom weight of the middle column,
# so the output is the sum of these two. The other weights meet zeros and may be anything.
WEIGHT_2 = [
    [0.11, -0.41127872 / 2, 0.12],
    [0.13, 0.14, 0.15],
    [0.16, -0.41127872 / 2, 0.17],
]
# Example 3: the left windows have a 1 under the right weight of the middle row; the right windows
# have a second one under the left weight.
WEIGHT_3 = [
    [0.11, 0.12, 0.13],
    [0.4106578 - 0.08725476, 0.14, 0.08725476],
    [0.15, 0.16, 0.17],
]
# Name, weight, padding.
EXAMPLES = [
    ("kernel 2, padding 0", WEIGHT[0][0], 0),
    ("kernel 3, padding 0", WEIGHT_2, 0),
    ("kernel 3, padding 1", WEIGHT_3, 1),
]


def compute() -> Values:
    """The three convolutions on the backend in force."""
    values: dict[str, object] = {}
    image = torch.tensor(IMAGE).view(1, 1, 4, 4)
    for name, weight, padding in EXAMPLES:
        output = F.conv2d(image, torch.tensor([[weight]]), stride=2, padding=padding)
        values[f"{name}: size"] = tuple(output.shape[2:])
        values[f"{name}: output"] = output[0, 0]
    return values


def by_hand() -> Values:
    """The size by formula, the output by sums of products."""
    values: dict[str, object] = {}
    for name, weight, padding in EXAMPLES:
        size = hand.output_size(4, len(weight), stride=2, padding=padding)
        values[f"{name}: size"] = (size, size)
        values[f"{name}: output"] = hand.conv2d([IMAGE], [[weight]], stride=2, padding=padding)[0]
    return values


PROGRAM = Program(
    name="padding",
    chapter=1,
    title="Kernel size, padding and the size of the output",
    explanation="Stride 2 on a 4×4 image: a side has (4 + 2·padding − kernel) // 2 + 1 positions. "
    "The weights under the image's 1s follow from the chapter's outputs (which it labels as "
    "filters); the others meet zeros.",
    printed={
        "kernel 2, padding 0: size": (2, 2),
        "kernel 3, padding 0: size": (1, 1),
        "kernel 3, padding 0: output": [[-0.41127872]],
        "kernel 3, padding 1: size": (2, 2),
        "kernel 3, padding 1: output": [[0.08725476, 0.4106578], [0.08725476, 0.4106578]],
    },
    by_hand=by_hand,
    compute=compute,
)
