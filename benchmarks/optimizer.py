"""The ``optimizer`` suite: one step of gradient descent over the parameters of a network.

Each row has one peer: torch's default, torch's fused step, and for lists that no cache holds a copy
of as many bytes as the step must read and write, so that the ratio is our share of the bandwidth.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import cnnkernels.optim

from .cases import OURS, STEP, TORCH, Candidate, Case, Options, Workload
from .conv2d import parameter_sizes
from .layers import read_conv2d_layers

LEARNING_RATE = 1e-3
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4

TORCH_VARIANTS: dict[str, bool | None] = {"default": None, "fused": True}
"""torch's peers, by the ``fused`` argument of ``torch.optim.SGD``."""

COPY = "copy"

# Two parameter lists take turns, so that consecutive calls do not update the same memory, unless
# one list is larger than any cache anyway.
_ROTATION = 2
_LARGE_ELEMENTS = 8 * 2**20
# Enough steps that the momentum buffers are first filled, then updated.
_ACCURACY_STEPS = 3

Size = tuple[int, ...]
MakeOptimizer = Callable[[list[Tensor]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Rule:
    """An update rule: our optimizer, torch's arguments for the same, and the native entry point."""

    name: str
    ours: MakeOptimizer
    momentum: float
    weight_decay: float
    kernel: str

    @property
    def bytes_per_parameter(self) -> int:
        """Of float32: parameter and gradient are read, the parameter is written; a buffer both."""
        return 20 if self.momentum else 12

    def torch(self, fused: bool | None, parameters: list[Tensor]) -> torch.optim.Optimizer:
        """The optimizer of torch for this rule."""
        return torch.optim.SGD(
            parameters,
            LEARNING_RATE,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            fused=fused,
        )


def _sgd(parameters: list[Tensor], weight_decay: float) -> torch.optim.Optimizer:
    return cnnkernels.optim.SGD(
        parameters, LEARNING_RATE, momentum=MOMENTUM, weight_decay=weight_decay
    )


RULES = (
    Rule("plain", lambda p: cnnkernels.optim.SimpleGD(p, LEARNING_RATE), 0.0, 0.0, "gd_step_"),
    Rule("momentum", lambda p: _sgd(p, 0.0), MOMENTUM, 0.0, "sgd_step_"),
    Rule(
        "momentum+wd",
        lambda p: _sgd(p, WEIGHT_DECAY),
        MOMENTUM,
        WEIGHT_DECAY,
        "sgd_step_",
    ),
)


def parameter_lists() -> dict[str, list[Size]]:
    """The sizes of the parameters of the tutorial's Net, LeNet-5, ResNet-50, and a flat list."""
    return {
        "ch1_net": _lenet_like(kernel_size=3, features=16 * 6 * 6),
        "lenet5": _lenet_like(kernel_size=5, features=16 * 5 * 5),
        "resnet50": _resnet50(),
        "flat": [(25_000_000,)],
    }


def cases(options: Options) -> list[Case]:
    """A case for each parameter list, rule and peer; without the large lists when quick."""
    return [
        Case(
            suite="optimizer",
            name=f"{name} {rule.name}",
            batch=None,
            mode=f"{STEP} / {peer}",
            gradients=(),
            prepare=functools.partial(_workload, rule, peer, sizes, options.seed),
        )
        for peer in (*TORCH_VARIANTS, COPY)
        for name, sizes in parameter_lists().items()
        if _is_large(sizes) or peer != COPY
        if not _is_large(sizes) or not options.quick
        for rule in RULES
    ]


def _elements(sizes: Sequence[Size]) -> int:
    return sum(torch.Size(size).numel() for size in sizes)


def _is_large(sizes: Sequence[Size]) -> bool:
    return _elements(sizes) > _LARGE_ELEMENTS


def _lenet_like(kernel_size: int, features: int) -> list[Size]:
    weights: list[Size] = [
        (6, 1, kernel_size, kernel_size),
        (16, 6, kernel_size, kernel_size),
        (120, features),
        (84, 120),
        (10, 84),
    ]
    return [size for weight in weights for size in (weight, weight[:1])]


def _resnet50() -> list[Size]:
    """Each convolution's weight, the weight and bias of its batch norm, and the classifier's."""
    sizes: list[Size] = []
    for layer in read_conv2d_layers("resnet50_v1_5"):
        norm = (layer.out_channels,)
        sizes += [*parameter_sizes(layer), norm, norm] * layer.count
    return [*sizes, (1000, 2048), (1000,)]


def _workload(rule: Rule, peer: str, sizes: Sequence[Size], seed: int) -> Workload:
    rotation = 1 if _is_large(sizes) else _ROTATION
    make = functools.partial(rule.torch, TORCH_VARIANTS.get(peer))
    if peer == COPY:
        theirs = _copy(rule, make, sizes, seed)
    else:
        theirs = _candidate(TORCH, peer, make, sizes, rotation, seed)
    return Workload(
        candidates=(_candidate(OURS, "", rule.ours, sizes, rotation, seed), theirs),
        reference=lambda index: _steps(
            functools.partial(rule.torch, None), sizes, seed + index, torch.float64
        ),
        inputs=rotation,
        kernels=(rule.kernel,),
    )


def _copy(rule: Rule, make: MakeOptimizer, sizes: Sequence[Size], seed: int) -> Candidate:
    """A copy that reads and writes as many bytes as the rule; errors are those of ``make``."""
    source = torch.zeros(_elements(sizes) * rule.bytes_per_parameter // 8)
    destination = torch.empty_like(source)
    return Candidate(
        side=TORCH,
        layout="",
        call=lambda index: destination.copy_(source),
        results=lambda index: _steps(make, sizes, seed + index, torch.float32),
        variant=COPY,
    )


def _candidate(
    side: str, variant: str, make: MakeOptimizer, sizes: Sequence[Size], rotation: int, seed: int
) -> Candidate:
    optimizers = [
        make(_parameters(sizes, torch.Generator().manual_seed(seed + index), torch.float32))
        for index in range(rotation)
    ]

    def call(index: int) -> None:
        optimizers[index % rotation].step()

    return Candidate(
        side=side,
        layout="",
        call=call,
        results=lambda index: _steps(make, sizes, seed + index, torch.float32),
        variant=variant,
    )


def _parameters(
    sizes: Sequence[Size], generator: torch.Generator, dtype: torch.dtype
) -> list[Tensor]:
    """Random parameters with gradients; the same values in every dtype."""
    parameters = []
    for size in sizes:
        parameter = torch.randn(size, generator=generator).to(dtype).requires_grad_()
        parameter.grad = torch.randn(size, generator=generator).to(dtype)
        parameters.append(parameter)
    return parameters


def _steps(
    make: MakeOptimizer, sizes: Sequence[Size], seed: int, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """The parameters and momentum buffers after some steps from a fresh start, flattened."""
    parameters = _parameters(sizes, torch.Generator().manual_seed(seed), dtype)
    optimizer = make(parameters)
    for _ in range(_ACCURACY_STEPS):
        optimizer.step()
    results = [_flat(parameters)]
    buffers = [state["momentum_buffer"] for state in optimizer.state.values() if state]
    if any(buffer is not None for buffer in buffers):
        results.append(_flat(buffers))
    return tuple(results)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])
