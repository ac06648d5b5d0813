"""One pass of a convolution, or of a block that begins with one, as the suites time it.

The variants of an operation are functions of the input, the weight and the bias. All have the same
random data, in the memory format of each. A forward pass alone runs under ``torch.no_grad()``. A
backward pass alone is that of graphs that are kept, so that its forward pass is not in the time.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

import cnnkernels

from ..accuracy import relative_error
from ..operators import LAYOUTS, to_layout
from .device import Device
from .precision import Precision, cudnn_settings
from .rows import OURS, TORCH, Contender, Pairs, Workload

NCHW, CHANNELS_LAST = LAYOUTS
RATIO = "ratio"
SAME = "same"
"""The ratios of a row that are not of one format: each side in its faster one, and ours in the
format of torch's faster."""

INPUT = "input"
WEIGHT = "weight"
BIAS = "bias"
_OUTPUT = "output"

ATEN = "aten"

# As many operations in float64 take a GPU milliseconds, and a CPU seconds.
_JUDGED_FLOPS = 10**10

Function = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Operation:
    """The sizes, and the pass.

    ``gradients`` are those that a call computes, of :data:`INPUT`, :data:`WEIGHT` and
    :data:`BIAS`; with none it is the forward pass alone. ``with_forward`` says whether a call that
    computes gradients makes the forward pass too. ``flops`` are those of the forward pass.
    """

    input_size: torch.Size
    weight_size: torch.Size
    output_size: torch.Size
    precision: Precision
    gradients: tuple[str, ...]
    with_forward: bool
    flops: int

    @property
    def forward(self) -> bool:
        """Whether a call makes the forward pass."""
        return self.with_forward or not self.gradients

    @property
    def results(self) -> tuple[str, ...]:
        """What a call returns."""
        return ((_OUTPUT,) if self.forward else ()) + self.gradients

    @property
    def bytes_moved(self) -> int:
        """Every tensor that a pass needs or makes once; the bias is nothing beside the others."""
        x, weight, y = (
            size.numel() for size in (self.input_size, self.weight_size, self.output_size)
        )
        elements = x + weight + y if self.forward else 0
        if self.gradients:
            elements += y
        for gradient, needed, made in ((INPUT, weight, x), (WEIGHT, x, weight)):
            if gradient in self.gradients:
                elements += needed + made
        return elements * self.precision.dtype.itemsize

    @property
    def judged_images(self) -> int:
        """The first images of the batch, as many as a convolution in float64 is quick for."""
        batch = self.input_size[0]
        return max(1, min(batch, _JUDGED_FLOPS * batch // max(1, self.flops)))


@dataclass(frozen=True)
class Tensors:
    """The rotating inputs and gradients of the output, and the parameters."""

    inputs: list[Tensor]
    gradients: list[Tensor]
    weight: Tensor
    bias: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> Tensors:
        """The tensors that a function makes of these."""
        return Tensors(
            [function(tensor) for tensor in self.inputs],
            [function(tensor) for tensor in self.gradients],
            function(self.weight),
            function(self.bias),
        )

    def explain(self, function: Function) -> Mapping[str, object]:
        """How one of our operators would run on these."""
        return cnnkernels.explain(function, self.inputs[0], self.weight, self.bias)


@dataclass(frozen=True)
class Variant:
    """A way of doing an operation. Of one that is not ``judged`` the error is not taken."""

    label: str
    side: str
    layout: str
    function: Function
    context: Callable[[], AbstractContextManager[object]]
    plan: str = ""
    judged: bool = True


def operation_workload(
    operation: Operation,
    reference: Function,
    variants: Callable[[Mapping[str, Tensors]], Sequence[Variant]],
    device: Device,
    seed: int,
    *,
    pairs: Callable[[Mapping[str, float]], Pairs],
    flops: int,
    missing: dict[str, str] | None = None,
) -> Workload:
    """The workload of an operation.

    ``variants`` makes them of the tensors in each memory format, ``reference`` is torch's function,
    and ``flops`` is what a call must compute (0: not told).
    """
    bytes_each = (
        operation.input_size.numel() + operation.output_size.numel()
    ) * operation.precision.dtype.itemsize
    rotation = device.rotation(bytes_each)
    tensors = _random(operation, rotation, device, seed)
    by_layout = {
        layout: tensors.map(functools.partial(to_layout, layout=layout)) for layout in LAYOUTS
    }
    chosen = variants(by_layout)
    contenders = [
        Contender(
            label=variant.label,
            side=variant.side,
            layout=variant.layout,
            call=_call(operation, variant.function, by_layout[variant.layout], variant.context),
            context=_timed_context(operation, variant.context),
            plan=variant.plan,
        )
        for variant in chosen
    ]
    return Workload(
        contenders=tuple(contenders),
        rotation=rotation,
        bytes_each=bytes_each,
        bytes_moved=operation.bytes_moved,
        flops=flops,
        arithmetic=operation.precision.name,
        errors=functools.partial(_errors, operation, reference, tensors, chosen),
        pairs=pairs,
        missing=missing or {},
    )


def settings(
    precision: Precision,
) -> Callable[[], AbstractContextManager[object]]:
    """The context of a variant that needs no more than torch's switches."""
    return functools.partial(cudnn_settings, precision)


def format_pairs(
    layouts: Mapping[tuple[str, str], str], medians: Mapping[str, float]
) -> dict[str, tuple[str, str]]:
    """The ratios between ours and torch's.

    ``layouts`` has the label of each side and format. They are one in each format, by its name,
    one with each side in its faster format, and one with ours in the format of torch's faster.
    """

    def fastest(side: str) -> str:
        return min(LAYOUTS, key=lambda layout: medians[layouts[side, layout]])

    peer = fastest(TORCH)
    pairs = {layout: (layout, layout) for layout in LAYOUTS}
    pairs |= {RATIO: (fastest(OURS), peer), SAME: (peer, peer)}
    return {
        name: (layouts[OURS, ours], layouts[TORCH, theirs])
        for name, (ours, theirs) in pairs.items()
    }


def _random(operation: Operation, rotation: int, device: Device, seed: int) -> Tensors:
    """Normal numbers; the weight is scaled as a network's initial weights are."""
    generator = torch.Generator(device.kind).manual_seed(seed)

    def random(size: torch.Size, scale: float = 1.0) -> Tensor:
        values = torch.randn(size, generator=generator, device=device.kind)
        return (values * scale).to(operation.precision.dtype)

    size = operation.weight_size
    return Tensors(
        [random(operation.input_size) for _ in range(rotation)],
        [random(operation.output_size) for _ in range(rotation if operation.gradients else 0)],
        random(size, size[1:].numel() ** -0.5),
        random(size[:1]),
    )


def _timed_context(
    operation: Operation, context: Callable[[], AbstractContextManager[object]]
) -> Callable[[], AbstractContextManager[object]]:
    @contextlib.contextmanager
    def entered() -> Iterator[None]:
        with context(), contextlib.nullcontext() if operation.gradients else torch.no_grad():
            yield

    return entered


def _call(
    operation: Operation,
    function: Function,
    tensors: Tensors,
    context: Callable[[], AbstractContextManager[object]],
) -> Callable[[int], tuple[Tensor, ...]]:
    """The call that is timed, within the context; it returns ``operation.results``."""

    def leaf(tensor: Tensor, name: str) -> Tensor:
        return tensor.detach().requires_grad_(name in operation.gradients)

    inputs = [leaf(tensor, INPUT) for tensor in tensors.inputs]
    weight, bias = leaf(tensors.weight, WEIGHT), leaf(tensors.bias, BIAS)
    gradients, rotation = tensors.gradients, len(inputs)
    if not operation.gradients:
        return lambda index: (function(inputs[index % rotation], weight, bias),)
    differentiated = []
    for x in inputs:
        leaves = {INPUT: x, WEIGHT: weight, BIAS: bias}
        differentiated.append([leaves[name] for name in operation.gradients])
    if operation.with_forward:

        def forward_backward(index: int) -> tuple[Tensor, ...]:
            index %= rotation
            output = function(inputs[index], weight, bias)
            return (
                output,
                *torch.autograd.grad(output, differentiated[index], gradients[index]),
            )

        return forward_backward
    with context():
        outputs = [function(x, weight, bias) for x in inputs]

    def backward(index: int) -> tuple[Tensor, ...]:
        index %= rotation
        return torch.autograd.grad(
            outputs[index], differentiated[index], gradients[index], retain_graph=True
        )

    return backward


def results_of(
    operation: Operation,
    function: Function,
    tensors: Tensors,
    context: Callable[[], AbstractContextManager[object]],
) -> tuple[Tensor, ...]:
    """``operation.results`` of the first input, by a call as it is timed."""
    with _timed_context(operation, context)():
        return _call(operation, function, tensors, context)(0)


def _errors(
    operation: Operation, reference: Function, tensors: Tensors, variants: Sequence[Variant]
) -> dict[str, float]:
    """Each variant's distance from float64, the worst of its results.

    The call is the timed one, of the whole batch. It is judged by the first images: of the others
    the gradient of the output is zero, so that nothing of them is in a gradient of the parameters.
    """
    images = operation.judged_images

    def first(tensor: Tensor) -> Tensor:
        kept = torch.zeros_like(tensor)
        kept[:images] = tensor[:images]
        return kept

    whole = Tensors(
        tensors.inputs[:1],
        [first(tensor) for tensor in tensors.gradients[:1]],
        tensors.weight,
        tensors.bias,
    )
    few = Tensors(
        [tensor[:images] for tensor in whole.inputs],
        [tensor[:images] for tensor in whole.gradients],
        whole.weight,
        whole.bias,
    ).map(Tensor.double)

    def results(
        function: Function,
        tensors: Tensors,
        context: Callable[[], AbstractContextManager[object]],
    ) -> list[Tensor]:
        found = results_of(operation, function, tensors, context)
        return [
            result[:images] if name in (_OUTPUT, INPUT) else result
            for name, result in zip(operation.results, found, strict=True)
        ]

    truth = results(reference, few, contextlib.nullcontext)
    return {
        variant.label: relative_error(
            results(
                variant.function,
                whole.map(functools.partial(to_layout, layout=variant.layout)),
                variant.context,
            ),
            truth,
        )
        for variant in variants
        if variant.judged
    }
