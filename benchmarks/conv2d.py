"""The ``conv2d`` suite: the convolution layers of the tutorial and of networks."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

import cnnkernels.functional

from .cases import FORWARD, Case, Options, Workload
from .layers import Conv2dLayer, batches_for, read_conv2d_layers
from .operators import Operator, operator_workload


def cases(options: Options) -> list[Case]:
    """A case for each layer of ``options.shapes``, batch and mode."""
    return [
        Case(
            suite="conv2d",
            name=layer.name,
            batch=batch,
            mode=mode,
            gradients=() if mode == FORWARD else _gradients(layer),
            prepare=functools.partial(_workload, layer, batch, mode, options.seed, options.dtype),
        )
        for file in options.shapes
        for layer in read_conv2d_layers(file)
        for batch in batches_for(layer.name, options.batches)
        for mode in options.modes
    ]


def parameter_sizes(layer: Conv2dLayer) -> list[tuple[int, ...]]:
    """The sizes of a layer's weight and, if it has one, bias."""
    weight = (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)
    return [weight, (layer.out_channels,)] if layer.bias else [weight]


def _gradients(layer: Conv2dLayer) -> tuple[str, ...]:
    names = [] if layer.reads_image else ["input"]
    names += ["weight", "bias"] if layer.bias else ["weight"]
    return tuple(names)


def _workload(layer: Conv2dLayer, batch: int, mode: str, seed: int, dtype: torch.dtype) -> Workload:
    stride, padding, groups = layer.stride, layer.padding, layer.groups

    def ours(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return cnnkernels.functional.conv2d(x, weight, bias, stride, padding, 1, groups)

    def peer(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.conv2d(x, weight, bias, stride, padding, 1, groups)

    return operator_workload(
        Operator(ours, peer, "conv2d", "conv2d_backward"),
        (batch, layer.in_channels, layer.height, layer.width),
        parameter_sizes(layer),
        mode=mode,
        input_gradient=not layer.reads_image,
        seed=seed,
        dtype=dtype,
    )
