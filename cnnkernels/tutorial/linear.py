"""The linear layer, which is a convolution too: y = x·Aᵀ is a 1×1 convolution over the features."""

from __future__ import annotations

import torch
from torch import Tensor

from cnnkernels import functional as F
from cnnkernels.tutorial.program import Program, Values

INPUT = [1.0, 100.0]
# The weights that the chapter prints, for one and for two output features.
ONE_FEATURE = [[0.04909718]]
TWO_FEATURES = [[-0.5130856], [0.6920992]]


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``torch.nn.functional.linear`` as a 1×1 convolution.

    Args:
        x: shape (..., in_features).
        weight: shape (out_features, in_features).

    Returns:
        Shape (..., out_features).
    """
    out_features, in_features = weight.shape
    pixels = x.reshape(-1, in_features, 1, 1)
    y = F.conv2d(pixels, weight.view(out_features, in_features, 1, 1))
    return y.view(*x.shape[:-1], out_features)


def compute() -> Values:
    """The chapter's two layers on the backend in force."""
    x = torch.tensor(INPUT).view(1, 2, 1, 1)
    one = linear(x, torch.tensor(ONE_FEATURE))
    two = linear(x, torch.tensor(TWO_FEATURES))
    return {
        "1 feature: size": one.size(),
        "1 feature: y": one.flatten(),
        "2 features: size": two.size(),
        "2 features: y": two.view(2, 2),
    }


def by_hand() -> Values:
    """Each input times each weight."""
    return {
        "1 feature: size": (1, 2, 1, 1),
        "1 feature: y": [x * ONE_FEATURE[0][0] for x in INPUT],
        "2 features: size": (1, 2, 1, 2),
        "2 features: y": [[x * weight[0] for weight in TWO_FEATURES] for x in INPUT],
    }


PROGRAM = Program(
    name="linear",
    chapter=1,
    title="The linear layer",
    explanation="The inputs 1 and 100 have one feature each, so every output is one product. The "
    "backends compute it as a 1×1 convolution, which is what a linear layer is.",
    printed={
        "1 feature: size": (1, 2, 1, 1),
        "1 feature: y": [0.04909718, 4.909718],
        "2 features: size": (1, 2, 1, 2),
        "2 features: y": [[-0.5130856, 0.6920992], [-51.30856, 69.20992]],
    },
    by_hand=by_hand,
    compute=compute,
)
