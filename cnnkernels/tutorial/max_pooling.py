"""Max pooling: a window keeps only its largest number.

It shortens what follows (16 numbers become 4), and it forgets small shifts: two rows of pixels
that show the same peak at different places leave the same number.
"""

from __future__ import annotations

import torch

from cnnkernels import functional as F
from cnnkernels.tutorial import by_hand as hand
from cnnkernels.tutorial.program import Program, Values

IMAGE = [
    [1.0, 2.0, 1.0, 2.0],
    [3.0, 4.0, 3.0, 4.0],
    [1.0, 2.0, 1.0, 2.0],
    [3.0, 4.0, 3.0, 4.0],
]
# The chapter's two rows of pixels are 11 long, so the window that covers them is (1, 11).
ROW = [0.0, 0, 0, 0, 1, 2, 3, 4, 5, 1, 2]
SHIFTED_ROW = [0.0, 1, 2, 3, 4, 5, 1, 2, 3, 4, 5]


def compute() -> Values:
    """The pooled matrix and the pooled rows on the backend in force."""
    image = torch.tensor(IMAGE).view(1, 1, 4, 4)
    rows = torch.tensor([[ROW], [SHIFTED_ROW]])
    pooled = F.max_pool2d(image, (2, 2))
    return {
        "size before": image.size(),
        "size after": pooled.size(),
        "pooled 4×4 matrix": pooled[0, 0],
        "pooled row and shifted row": F.max_pool2d(rows, (1, len(ROW))).flatten(),
    }


def by_hand() -> Values:
    """The largest number of each window."""
    pooled = hand.max_pool2d([IMAGE], 2, 2)
    return {
        "size before": (1, 1, 4, 4),
        "size after": (1, *pooled.shape),
        "pooled 4×4 matrix": pooled[0],
        "pooled row and shifted row": [float(max(ROW)), float(max(SHIFTED_ROW))],
    }


PROGRAM = Program(
    name="max-pooling",
    chapter=1,
    title="Max pooling of a 4×4 matrix",
    explanation="Each 2×2 window holds 1, 2, 3 and 4, so each leaves 4. A window over a whole row "
    "of pixels leaves the same 5 wherever the peak lies.",
    printed={
        "size before": (1, 1, 4, 4),
        "size after": (1, 1, 2, 2),
        "pooled 4×4 matrix": [[4.0, 4.0], [4.0, 4.0]],
        "pooled row and shifted row": [5.0, 5.0],
    },
    by_hand=by_hand,
    compute=compute,
)
