"""The ``optimizer`` suite: one step of gradient descent over the parameters of a network."""

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
    """The sizes of the parameters of the tutorial's Net, LeNet-5 and ResNet-50."""
    return {
        "ch1_net": _lenet_like(kernel_size=3, features=16 * 6 * 6),
        "lenet5": _lenet_like(kernel_size=5, features=16 * 5 * 5),
        "resnet50": _resnet50(),
    }


def cases(options: Options) -> list[Case]:
    """A case for each parameter list and rule; without ResNet-50 when quick."""
    return [
        Case(
            suite="optimizer",
            name=f"{name} {rule.name}",
            batch=None,
            mode=STEP,
            gradients=(),
            prepare=functools.partial(_workload, rule, sizes, options.seed),
        )
        for name, sizes in parameter_lists().items()
        if name != "resnet50" or not options.quick
        for rule in RULES
    ]


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


def _workload(rule: Rule, sizes: Sequence[Size], seed: int) -> Workload:
    elements = sum(torch.Size(size).numel() for size in sizes)
    rotation = 1 if elements > _LARGE_ELEMENTS else _ROTATION
    candidates = [_candidate(OURS, "", rule.ours, sizes, rotation, seed)]
    for variant, fused in TORCH_VARIANTS.items():
        make = functools.partial(rule.torch, fused)
        candidates.append(_candidate(TORCH, variant, make, sizes, rotation, seed))
    return Workload(
        candidates=tuple(candidates),
        reference=lambda index: _steps(
            functools.partial(rule.torch, None), sizes, seed + index, torch.float64
        ),
        inputs=rotation,
        kernels=(rule.kernel,),
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
