"""The ``max_pool2d`` suite: the pooling layers of the tutorial and of networks.

Each memory format has rows of its own, since a network seldom chooses one for its pooling, and
torch's two differ by a factor of ten. Layers that no cache holds are also measured against a copy
of as many bytes as they have to read and write: that ratio is our share of the bandwidth.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import cnnkernels.functional

from .cases import FORWARD, TORCH, Case, Options, Workload
from .layers import MaxPool2dLayer, batches_for, is_tutorial, read_max_pool2d_layers
from .operators import LAYOUTS, Operator, operator_workload, rotation_of

COPY = "copy"

_LARGE_BYTES = 16 * 2**20


def cases(options: Options) -> list[Case]:
    """A case for each layer, batch, mode, layout and peer; of the tutorial's alone when quick."""
    return [
        Case(
            suite="max_pool2d",
            name=layer.name,
            batch=batch,
            mode=" / ".join((mode, layout, *peer)),
            gradients=() if mode == FORWARD else ("input",),
            prepare=functools.partial(_workload, layer, batch, mode, layout, peer, options.seed),
        )
        for mode in options.modes
        for layout in LAYOUTS
        for peer in ((), (COPY,))
        for layer in read_max_pool2d_layers()
        if is_tutorial(layer.name) or not options.quick
        for batch in batches_for(layer.name, options.batches)
        if not peer or _input_size(layer, batch).numel() * 4 >= _LARGE_BYTES
    ]


def _input_size(layer: MaxPool2dLayer, batch: int) -> torch.Size:
    return torch.Size((batch, layer.channels, layer.height, layer.width))


def _workload(
    layer: MaxPool2dLayer, batch: int, mode: str, layout: str, peer: tuple[str, ...], seed: int
) -> Workload:
    window = (layer.kernel_size, layer.stride, layer.padding)

    # Any: with indices, which are not asked for, it returns a pair.
    def ours(x: Tensor) -> Any:
        return cnnkernels.functional.max_pool2d(x, *window)

    def torchs(x: Tensor) -> Tensor:
        return F.max_pool2d(x, *window)

    size = _input_size(layer, batch)
    workload = operator_workload(
        Operator(ours, torchs, "max_pool2d", "max_pool2d_backward"),
        size,
        (),
        mode=mode,
        input_gradient=True,
        seed=seed,
        layouts=(layout,),
    )
    if not peer:
        return workload
    outputs = torchs(torch.empty(size, device="meta")).numel()
    # As many as there are inputs: a copy of what the caches still hold is no measure.
    elements = _bytes_moved(size.numel(), outputs, mode) // 8
    sources = torch.ones(rotation_of(size), elements)
    destination = torch.empty(elements)
    candidates = [
        replace(
            candidate,
            call=lambda index: destination.copy_(sources[index % len(sources)]),
            variant=COPY,
        )
        if candidate.side == TORCH
        else candidate
        for candidate in workload.candidates
    ]
    return replace(workload, candidates=tuple(candidates))


def _bytes_moved(inputs: int, outputs: int, mode: str) -> int:
    """What a float32 pooling must read and write; with a backward, the argmaxes as well."""
    forward = 4 * (inputs + outputs)
    return forward if mode == FORWARD else 2 * (forward + outputs)
