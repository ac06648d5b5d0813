"""Workloads of a single operator: both sides, both memory formats, forward and backward."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import cnnkernels

from .cases import FORWARD, OURS, TORCH, Candidate, Workload

NCHW = "NCHW"
CHANNELS_LAST = "channels_last"
LAYOUTS = {NCHW: torch.contiguous_format, CHANNELS_LAST: torch.channels_last}

# Inputs rotate so that no call finds the values of the last one; large ones need fewer of them.
_ROTATION = range(2, 9)
_ROTATION_BYTES = 32 * 2**20

Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Operator:
    """An operator as both sides offer it: functions of the input and the parameters.

    A native run passes through the entry points ``forward_kernel`` and ``backward_kernel``.
    """

    ours: Function
    torch: Function
    forward_kernel: str
    backward_kernel: str


def operator_workload(
    operator: Operator,
    input_size: Sequence[int],
    parameter_sizes: Sequence[Sequence[int]],
    *,
    mode: str,
    input_gradient: bool,
    seed: int,
    dtype: torch.dtype = torch.float32,
    layouts: Sequence[str] = tuple(LAYOUTS),
) -> Workload:
    """Both sides of an operator on random data of a dtype, in both layouts or in one.

    The parameters are scaled as a network's initial weights are. Forward mode runs under
    ``torch.no_grad()``; forward+backward asks for the gradients of the parameters and, with
    ``input_gradient``, of the input. Conversion to a layout happens here, outside of any timing.
    """
    generator = torch.Generator().manual_seed(seed)
    rotation = rotation_of(input_size)
    inputs = [torch.randn(input_size, generator=generator) for _ in range(rotation)]
    parameters = [_parameter(size, generator) for size in parameter_sizes]
    output_size = operator.torch(inputs[0], *parameters).shape
    gradients = [torch.randn(output_size, generator=generator) for _ in range(rotation)]

    def call(function: Function, data: _Data) -> Callable[[int], tuple[Tensor, ...]]:
        if mode == FORWARD:
            return _forward(function, data)
        return _forward_backward(function, data, input_gradient)

    data = _Data(inputs, parameters, gradients).to_dtype(dtype)
    context = torch.no_grad if mode == FORWARD else contextlib.nullcontext
    candidates = []
    for layout in layouts:
        converted = data.to_layout(layout)
        plan = cnnkernels.explain(operator.ours, converted.inputs[0], *converted.parameters)
        ours = call(operator.ours, converted)
        peer = call(operator.torch, converted)
        candidates.append(
            Candidate(OURS, layout, ours, ours, plan=str(plan["algorithm"]), context=context)
        )
        candidates.append(Candidate(TORCH, layout, peer, peer, context=context))
    backward = () if mode == FORWARD else (operator.backward_kernel,)
    return Workload(
        candidates=tuple(candidates),
        reference=lambda index: call(operator.torch, data.double(index))(0),
        inputs=rotation,
        kernels=(operator.forward_kernel, *backward),
    )


@dataclass(frozen=True)
class _Data:
    """The rotating inputs and output gradients, and the parameters, of one candidate."""

    inputs: list[Tensor]
    parameters: list[Tensor]
    gradients: list[Tensor]

    def to_layout(self, layout: str) -> _Data:
        return self._map(lambda tensor: to_layout(tensor, layout))

    def to_dtype(self, dtype: torch.dtype) -> _Data:
        return self._map(lambda tensor: tensor.to(dtype))

    def double(self, index: int) -> _Data:
        """The ``index``-th input and gradient alone, with the parameters, in float64."""
        only = slice(index, index + 1)
        return _Data(self.inputs[only], self.parameters, self.gradients[only])._map(Tensor.double)

    def _map(self, function: Callable[[Tensor], Tensor]) -> _Data:
        return _Data(
            inputs=[function(tensor) for tensor in self.inputs],
            parameters=[function(tensor) for tensor in self.parameters],
            gradients=[function(tensor) for tensor in self.gradients],
        )


def _forward(function: Function, data: _Data) -> Callable[[int], tuple[Tensor, ...]]:
    inputs, parameters = data.inputs, data.parameters
    rotation = len(inputs)

    def call(index: int) -> tuple[Tensor, ...]:
        return (function(inputs[index % rotation], *parameters),)

    return call


def _forward_backward(
    function: Function, data: _Data, input_gradient: bool
) -> Callable[[int], tuple[Tensor, ...]]:
    inputs = [_leaf(tensor, input_gradient) for tensor in data.inputs]
    parameters = [_leaf(tensor, True) for tensor in data.parameters]
    gradients = data.gradients
    rotation = len(inputs)
    differentiated = [
        (tensor, *parameters) if input_gradient else tuple(parameters) for tensor in inputs
    ]

    def call(index: int) -> tuple[Tensor, ...]:
        index %= rotation
        output = function(inputs[index], *parameters)
        return (output, *torch.autograd.grad(output, differentiated[index], gradients[index]))

    return call


def _leaf(tensor: Tensor, requires_grad: bool) -> Tensor:
    return tensor.detach().requires_grad_(requires_grad)


def _parameter(size: Sequence[int], generator: torch.Generator) -> Tensor:
    fan_in = max(1, torch.Size(size[1:]).numel())
    return torch.randn(size, generator=generator) / fan_in**0.5


def rotation_of(size: Sequence[int]) -> int:
    """How many inputs of a size take turns."""
    bytes_each = 4 * torch.Size(size).numel()
    return min(max(_ROTATION_BYTES // bytes_each, _ROTATION.start), _ROTATION.stop - 1)


def to_layout(tensor: Tensor, layout: str) -> Tensor:
    """The tensor in a layout of :data:`LAYOUTS`; the same one if it has not four dimensions."""
    return tensor.to(memory_format=LAYOUTS[layout]) if tensor.dim() == 4 else tensor
