"""The ``optimizer`` suite: a step of gradient descent over 1 to 100 million parameters.

``cnnkernels.optim.SGD`` against ``torch.optim.SGD``'s default on a GPU, ``foreach=True``, and
``fused=True``, with the parameters in one tensor and in 160 of ResNet-50's unequal sizes.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import cnnkernels.optim

from ..accuracy import relative_error
from ..cases import STEP
from ..optimizer import LEARNING_RATE, MOMENTUM, WEIGHT_DECAY, parameter_lists
from .device import Device
from .options import Options
from .rows import OURS, TORCH, Case, Contender, Pairs, Workload

SUITE = "optimizer"
FOREACH = "torch foreach"
FUSED = "torch fused"
PEERS = {"foreach": FOREACH, "fused": FUSED}
"""The names of a row's ratios, and whose time is over ours."""

PLAIN = "plain"
MOMENTUM_RULE = "momentum, weight decay"
RULES: dict[str, dict[str, Any]] = {
    PLAIN: {},
    MOMENTUM_RULE: {"momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY},
}
TENSORS = (1, 160)

# Enough steps that the momentum buffers are first filled, then updated.
_ACCURACY_STEPS = 3

_MAKERS: dict[str, tuple[str, type[torch.optim.SGD], dict[str, Any]]] = {
    OURS: (OURS, cnnkernels.optim.SGD, {}),
    FOREACH: (TORCH, torch.optim.SGD, {"foreach": True}),
    FUSED: (TORCH, torch.optim.SGD, {"fused": True}),
}


def cases(options: Options, device: Device) -> list[Case]:
    """A case for each number of parameters, number of tensors, dtype and rule."""
    return [
        Case(
            suite=SUITE,
            name=case_name(parameters, tensors),
            batch=None,
            dtype=str(dtype).removeprefix("torch."),
            mode=f"{STEP}, {rule}",
            prepare=functools.partial(
                _workload, rule, sizes_of(parameters, tensors), dtype, device, options.seed
            ),
        )
        for dtype in options.dtypes
        for rule in RULES
        for tensors in TENSORS
        for parameters in options.parameters
    ]


def case_name(parameters: int, tensors: int) -> str:
    """How a row names its list, as "25M in 160"."""
    millions = f"{parameters / 1e6:g}M" if parameters >= 10**6 else f"{parameters:,}"
    return f"{millions} in {tensors}"


def sizes_of(parameters: int, tensors: int) -> list[int]:
    """So many parameters in tensors whose sizes are to each other as ResNet-50's largest are.

    Raises ValueError when there are too few parameters for the tensors to differ.
    """
    network = sorted(torch.Size(size).numel() for size in parameter_lists()["resnet50"])[::-1]
    whole = network[:tensors]
    sizes = [max(1, round(parameters * size / sum(whole))) for size in whole]
    sizes[0] += parameters - sum(sizes)
    if sizes[0] < 1:
        raise ValueError(f"{parameters} parameters are too few for {tensors} tensors")
    # As in a network, large and small ones take turns.
    return sizes[::2] + sizes[1::2][::-1]


def bytes_per_parameter(rule: str, dtype: torch.dtype) -> int:
    """Parameter and gradient are read, the parameter is written; a momentum buffer both."""
    return (5 if "momentum" in RULES[rule] else 3) * dtype.itemsize


def _workload(
    rule: str, sizes: Sequence[int], dtype: torch.dtype, device: Device, seed: int
) -> Workload:
    elements = sum(sizes)
    # Of the numbers that a step moves, those that it writes are counted once.
    bytes_each = elements * dtype.itemsize * (3 if "momentum" in RULES[rule] else 2)
    rotation = device.rotation(bytes_each)
    contenders = [
        _contender(label, rule, sizes, dtype, device, rotation, seed) for label in _MAKERS
    ]
    return Workload(
        contenders=tuple(contenders),
        rotation=rotation,
        bytes_each=bytes_each,
        bytes_moved=elements * bytes_per_parameter(rule, dtype),
        errors=functools.partial(_errors, rule, sizes, dtype, device, seed),
        pairs=_pairs,
    )


def _pairs(medians: Mapping[str, float]) -> Pairs:
    return {name: (OURS, peer) for name, peer in PEERS.items()}


def _contender(
    label: str,
    rule: str,
    sizes: Sequence[int],
    dtype: torch.dtype,
    device: Device,
    rotation: int,
    seed: int,
) -> Contender:
    optimizers = [
        _optimizer(label, rule, _parameters(sizes, dtype, device, seed + index))
        for index in range(rotation)
    ]
    for optimizer in optimizers:
        # The first step makes the momentum buffers.
        optimizer.step()

    def call(index: int) -> None:
        optimizers[index % rotation].step()

    return Contender(label, _MAKERS[label][0], call)


def _optimizer(label: str, rule: str, parameters: list[Tensor]) -> torch.optim.SGD:
    _, make, arguments = _MAKERS[label]
    return make(parameters, LEARNING_RATE, **RULES[rule], **arguments)


def _parameters(
    sizes: Sequence[int], dtype: torch.dtype, device: Device, seed: int
) -> list[Tensor]:
    """Random parameters with gradients; the same in every call with a seed and dtype."""
    generator = torch.Generator(device.kind).manual_seed(seed)
    parameters = []
    for size in sizes:
        values, gradient = (
            torch.randn(size, generator=generator, device=device.kind).to(dtype) for _ in range(2)
        )
        parameter = values.requires_grad_()
        parameter.grad = gradient
        parameters.append(parameter)
    return parameters


def _errors(
    rule: str, sizes: Sequence[int], dtype: torch.dtype, device: Device, seed: int
) -> dict[str, float]:
    def results(label: str, double: bool) -> tuple[Tensor, ...]:
        parameters = _parameters(sizes, dtype, device, seed)
        if double:
            parameters = [_doubled(parameter) for parameter in parameters]
        optimizer = _optimizer(label, rule, parameters)
        for _ in range(_ACCURACY_STEPS):
            optimizer.step()
        flat = torch.cat([parameter.detach() for parameter in parameters])
        if "momentum" not in RULES[rule]:
            return (flat,)
        buffers = [optimizer.state[parameter]["momentum_buffer"] for parameter in parameters]
        return flat, torch.cat(buffers)

    truth = results(FOREACH, double=True)
    return {label: relative_error(results(label, double=False), truth) for label in _MAKERS}


def _doubled(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    result = parameter.detach().double().requires_grad_()
    result.grad = parameter.grad.double()
    return result
