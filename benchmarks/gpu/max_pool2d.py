"""The ``max_pool2d`` suite: the pooling layers of ``shapes/max_pool.csv``.

Both sides are measured in both memory formats, with their inputs already in them. *Forward* is a
call whose input requires a gradient, so that the argmax is written; *backward* is the gradient of
the input alone, of graphs that are kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import cnnkernels.functional

from ..accuracy import relative_error
from ..cases import FORWARD
from ..layers import MaxPool2dLayer, batches_for, read_max_pool2d_layers
from ..operators import LAYOUTS, to_layout
from .device import Device
from .operation import format_pairs
from .options import Options
from .rows import OURS, TORCH, Case, Contender, Workload

SUITE = "max_pool2d"
BACKWARD = "backward"

_ARGMAX_BYTES = 1

Pool = Callable[[Tensor], Tensor]


def cases(options: Options, device: Device) -> list[Case]:
    """A case for each layer, batch, dtype and pass."""
    return [
        Case(
            suite=SUITE,
            name=layer.name,
            batch=batch,
            dtype=str(dtype).removeprefix("torch."),
            mode=mode,
            prepare=functools.partial(
                _workload, _shrunk(layer, options.shrink), batch, dtype, mode, device, options.seed
            ),
        )
        for mode in (FORWARD, BACKWARD)
        for dtype in options.dtypes
        for layer in _chosen(options)
        for batch in batches_for(layer.name, options.batches)
    ]


def _chosen(options: Options) -> list[MaxPool2dLayer]:
    """All layers, or the last few: the first are the tutorial's."""
    layers = read_max_pool2d_layers()
    return layers if options.layers is None else layers[-options.layers :]


def _shrunk(layer: MaxPool2dLayer, shrink: int) -> MaxPool2dLayer:
    return replace(
        layer,
        channels=max(1, layer.channels // shrink),
        height=max(layer.kernel_size, layer.height // shrink),
        width=max(layer.kernel_size, layer.width // shrink),
    )


def _workload(
    layer: MaxPool2dLayer, batch: int, dtype: torch.dtype, mode: str, device: Device, seed: int
) -> Workload:
    pools = _pools(layer)
    size = torch.Size((batch, layer.channels, layer.height, layer.width))
    output_size = pools[TORCH](torch.empty(size, device="meta")).shape
    inputs, outputs = size.numel(), output_size.numel()
    bytes_moved = (inputs + outputs) * dtype.itemsize + outputs * _ARGMAX_BYTES
    rotation = device.rotation(bytes_moved)
    generator = torch.Generator(device.kind).manual_seed(seed)

    def random(of_size: torch.Size) -> list[Tensor]:
        return [
            torch.randn(of_size, generator=generator, device=device.kind).to(dtype)
            for _ in range(rotation)
        ]

    data = random(size), random(output_size)
    contenders = [
        Contender(
            label=f"{side} {layout}",
            side=side,
            layout=layout,
            call=_call(pool, mode, *([to_layout(t, layout) for t in tensors] for tensors in data)),
        )
        for side, pool in pools.items()
        for layout in LAYOUTS
    ]
    first = data[0][0], data[1][0]
    return Workload(
        contenders=tuple(contenders),
        rotation=rotation,
        bytes_each=bytes_moved,
        bytes_moved=bytes_moved,
        errors=functools.partial(_errors, pools, mode, *first),
        exact=functools.partial(_values_equal, pools, first[0]),
        pairs=functools.partial(format_pairs, {(c.side, c.layout): c.label for c in contenders}),
    )


def _pools(layer: MaxPool2dLayer) -> dict[str, Pool]:
    window = (layer.kernel_size, layer.stride, layer.padding)

    # Any: with indices, which are not asked for, it returns a pair.
    def ours(x: Tensor) -> Any:
        return cnnkernels.functional.max_pool2d(x, *window)

    def torchs(x: Tensor) -> Tensor:
        return F.max_pool2d(x, *window)

    return {OURS: ours, TORCH: torchs}


def _call(
    pool: Pool, mode: str, inputs: list[Tensor], gradients: list[Tensor]
) -> Callable[[int], object]:
    rotation = len(inputs)
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    if mode == FORWARD:
        return lambda index: pool(leaves[index % rotation])
    outputs = [pool(leaf) for leaf in leaves]

    def backward(index: int) -> object:
        index %= rotation
        return torch.autograd.grad(
            outputs[index], leaves[index], gradients[index], retain_graph=True
        )

    return backward


def _values_equal(pools: dict[str, Pool], x: Tensor) -> bool:
    """Whether our maxima are torch's, in both formats."""
    with torch.no_grad():
        inputs = [to_layout(x, layout) for layout in LAYOUTS]
        return all(torch.equal(pools[OURS](x), pools[TORCH](x)) for x in inputs)


def _errors(pools: dict[str, Pool], mode: str, x: Tensor, gradient: Tensor) -> dict[str, float]:
    """The distance from float64 of the output, or of the input's gradient."""

    def result(pool: Pool, x: Tensor, gradient: Tensor) -> Tensor:
        leaf = x.detach().requires_grad_()
        output = pool(leaf)
        if mode == FORWARD:
            return output
        return torch.autograd.grad(output, leaf, gradient)[0]

    truth = result(pools[TORCH], x.double(), gradient.double())
    return {
        f"{side} {layout}": relative_error(
            [result(pool, to_layout(x, layout), to_layout(gradient, layout))], [truth]
        )
        for side, pool in pools.items()
        for layout in LAYOUTS
    }
