"""The ``max_pool2d`` suite: the pooling layers of the tutorial and of networks."""

from __future__ import annotations

import functools
from typing import Any

import torch.nn.functional as F
from torch import Tensor

import cnnkernels.functional

from .cases import FORWARD, Case, Options, Workload
from .layers import MaxPool2dLayer, batches_for, is_tutorial, read_max_pool2d_layers
from .operators import Operator, operator_workload


def cases(options: Options) -> list[Case]:
    """A case for each pooling layer, batch and mode; of the tutorial's layers alone when quick."""
    return [
        Case(
            suite="max_pool2d",
            name=layer.name,
            batch=batch,
            mode=mode,
            gradients=() if mode == FORWARD else ("input",),
            prepare=functools.partial(_workload, layer, batch, mode, options.seed),
        )
        for layer in read_max_pool2d_layers()
        if is_tutorial(layer.name) or not options.quick
        for batch in batches_for(layer.name, options.batches)
        for mode in options.modes
    ]


def _workload(layer: MaxPool2dLayer, batch: int, mode: str, seed: int) -> Workload:
    kernel_size, stride, padding = layer.kernel_size, layer.stride, layer.padding

    # Any: with indices, which are not asked for, it returns a pair.
    def ours(x: Tensor) -> Any:
        return cnnkernels.functional.max_pool2d(x, kernel_size, stride, padding)

    def peer(x: Tensor) -> Tensor:
        return F.max_pool2d(x, kernel_size, stride, padding)

    return operator_workload(
        Operator(ours, peer, "max_pool2d", "max_pool2d_backward"),
        (batch, layer.channels, layer.height, layer.width),
        (),
        mode=mode,
        input_gradient=True,
        seed=seed,
    )
