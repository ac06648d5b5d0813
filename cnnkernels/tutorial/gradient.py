"""The gradient of f(x, y) = 2x + y² at (1, 2).

f is a convolution in disguise: the image (x, y) under the filter (2, y) gives 2·x + y·y. Written
that way, the backward pass of the convolution computes the gradient. y occurs twice, as a pixel
and as a weight, and receives y from each: 2y together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cnnkernels import functional as F
from cnnkernels.tutorial.program import Program, Values

X, Y = 1.0, 2.0


def value_and_gradient(x: float, y: float) -> tuple[Tensor, Tensor]:
    """f(x, y) and (∂f/∂x, ∂f/∂y), by a 1×2 convolution and its backward pass."""
    point = torch.tensor([x, y], requires_grad=True)
    image = point.view(1, 1, 1, 2)
    weight = torch.stack([torch.tensor(2.0), point[1]]).view(1, 1, 1, 2)
    f = F.conv2d(image, weight).squeeze()
    (gradient,) = torch.autograd.grad(f, point)
    return f, gradient


def compute() -> Values:
    """The value and the gradient on the backend in force."""
    f, gradient = value_and_gradient(X, Y)
    return {"f(1, 2)": f, "gradient at (1, 2)": gradient}


def by_hand() -> Values:
    """∂f/∂x = 2 and ∂f/∂y = 2y."""
    return {"f(1, 2)": 2 * X + Y**2, "gradient at (1, 2)": [2.0, 2 * Y]}


PROGRAM = Program(
    name="gradient",
    chapter=1,
    title="Gradient of 2x + y²",
    explanation="The image (x, y) under the filter (2, y) is 2x + y²; the convolution's backward "
    "pass gives the gradient.",
    printed={"gradient at (1, 2)": [2.0, 4.0]},
    by_hand=by_hand,
    compute=compute,
)
