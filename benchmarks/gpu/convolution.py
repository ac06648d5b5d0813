"""The ``convolution`` suite: layers of networks, large and small, each with a bias.

Each layer in each precision: the forward pass under ``torch.no_grad()``, the gradient of the input
and that of the weight, each alone, and the whole backward pass with the bias's (without the
input's where the input is the image). In NCHW and in channels_last there are eager torch, for which
cuDNN chooses by measuring (``cudnn.benchmark``), and ours by its own plan; where that plan is to
leave a pass to ATen, ours with the kernels forced is measured beside it. A forward pass has
cuDNN's convolution in channels_last without a bias as well: its kernel alone.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import cnnkernels.functional
from cnnkernels import _native

from ..cases import FORWARD
from ..layers import Conv2dLayer, read_conv2d_layers
from ..operators import LAYOUTS
from .device import Device
from .operation import (
    ATEN,
    BIAS,
    CHANNELS_LAST,
    INPUT,
    NCHW,
    WEIGHT,
    Function,
    Operation,
    Tensors,
    Variant,
    format_pairs,
    operation_workload,
    settings,
)
from .options import Options
from .precision import BF16, FP16, FP32, PRECISIONS, TF32, Precision
from .rows import OURS, TORCH, Case, Pairs, Workload

SUITE = "convolution"
INPUT_GRADIENT = "input gradient"
WEIGHT_GRADIENT = "weight gradient"
BACKWARD = "backward"
MODES = (FORWARD, BACKWARD, INPUT_GRADIENT, WEIGHT_GRADIENT)

NATIVE = "native"
CUDNN_ALONE = "cuDNN alone"
"""The ratio to cuDNN's kernel in channels_last, without bias; ours reads NCHW."""

FIRST = "first layer"
DEPTHWISE = "depthwise"
NARROW = "up to 128 channels"
WIDE = "more channels"
KINDS = (FIRST, DEPTHWISE, NARROW, WIDE)

NETWORKS = ("resnet50_v1_5", "vgg16", "mobilenet_v2", "small_cnn", "tutorial")
_SMALL_NETWORKS = ("small_cnn", "tutorial")
_FIRST_CHANNELS = 4
_NARROW_CHANNELS = 128

# How many layers of each kind are measured unless all are asked for.
_LAYERS = {FIRST: 6, DEPTHWISE: 4, NARROW: 10, WIDE: 5}
_REPRESENTATIVES = 2
# What is measured of all those layers, and then of the first of each kind alone.
_PASSES = (
    (FORWARD, FP32), (FORWARD, FP16), (BACKWARD, FP16), (BACKWARD, FP32), (FORWARD, TF32),
)  # fmt: skip
_REPRESENTED_PASSES = (
    (BACKWARD, TF32), (FORWARD, BF16), (BACKWARD, BF16), (INPUT_GRADIENT, FP16),
    (WEIGHT_GRADIENT, FP16), (INPUT_GRADIENT, FP32), (WEIGHT_GRADIENT, FP32),
)  # fmt: skip


def cases(options: Options, device: Device) -> list[Case]:
    """The layers and passes that goals speak of, and the costliest, come first."""
    layers = _layers(options)
    representatives = [(network, layer) for place, network, layer in layers if place == 0]
    chosen = [(network, layer) for _, network, layer in layers]
    if options.full:
        plan = [(chosen, tuple(itertools.product(MODES, PRECISIONS)))]
    else:
        plan = [(chosen, _PASSES), (representatives, _REPRESENTED_PASSES)]
    return [
        _case(network, layer, mode, PRECISIONS[precision], options, device)
        for layers_of, passes in plan
        for mode, precision in passes
        for network, layer in layers_of
        if mode != INPUT_GRADIENT or not layer.reads_image
    ]


def kind_of(layer: Conv2dLayer) -> str:
    """The kind of a layer, of :data:`KINDS`."""
    if layer.groups > 1:
        return DEPTHWISE
    if layer.in_channels <= _FIRST_CHANNELS:
        return FIRST
    widest = max(layer.in_channels, layer.out_channels)
    return NARROW if widest <= _NARROW_CHANNELS else WIDE


def _layers(options: Options) -> list[tuple[int, str, Conv2dLayer]]:
    """The layers to measure, kinds in turn; the number is 0 for the representatives of a kind.

    Within a kind networks take turns, and of a network the layers in which it spends most come
    first.
    """
    by_kind = []
    for kind in KINDS:
        by_network = [
            [(network, layer) for layer in _by_cost(network) if kind_of(layer) == kind]
            for network in NETWORKS
        ]
        turns = [each for turn in itertools.zip_longest(*by_network) for each in turn if each]
        most = len(turns) if options.full else _LAYERS[kind]
        by_kind.append(turns[: min(most, options.layers or most)])
    return [
        (place // _REPRESENTATIVES, *pair)
        for place, turn in enumerate(itertools.zip_longest(*by_kind))
        for pair in turn
        if pair
    ]


def _by_cost(network: str) -> list[Conv2dLayer]:
    layers = read_conv2d_layers(network)
    if network == "tutorial":
        # The other layers of the tutorial are of one output each.
        layers = [layer for layer in layers if "_net_" in layer.name]
    return sorted(layers, key=lambda layer: -layer.count * _flops(layer, batch=1))


def _case(
    network: str,
    layer: Conv2dLayer,
    mode: str,
    precision: Precision,
    options: Options,
    device: Device,
) -> Case:
    small = network in _SMALL_NETWORKS
    batch = options.small_batch if small else options.batch
    return Case(
        suite=SUITE,
        name=f"{network} {layer.name}",
        batch=batch,
        dtype=precision.name,
        mode=mode,
        prepare=functools.partial(
            _workload,
            _shrunk(layer, options.shrink),
            batch,
            mode,
            precision,
            device,
            options.seed,
        ),
        # Where the program's time is what counts.
        wall=small,
        kind=kind_of(layer),
    )


def _shrunk(layer: Conv2dLayer, shrink: int) -> Conv2dLayer:
    groups = max(1, layer.groups // shrink)
    return replace(
        layer,
        in_channels=max(groups, layer.in_channels // shrink),
        out_channels=max(groups, layer.out_channels // shrink),
        groups=groups,
        height=max(layer.kernel_size[0], layer.height // shrink),
        width=max(layer.kernel_size[1], layer.width // shrink),
    )


def _output_size(layer: Conv2dLayer, batch: int) -> torch.Size:
    height, width = (
        (size + 2 * padding - kernel) // stride + 1
        for size, padding, kernel, stride in zip(
            (layer.height, layer.width),
            layer.padding,
            layer.kernel_size,
            layer.stride,
            strict=True,
        )
    )
    return torch.Size((batch, layer.out_channels, height, width))


def _weight_size(layer: Conv2dLayer) -> torch.Size:
    return torch.Size((layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size))


def _flops(layer: Conv2dLayer, batch: int) -> int:
    """A multiplication and an addition for each output and weight of its channel; in each pass."""
    return 2 * _output_size(layer, batch).numel() * _weight_size(layer)[1:].numel()


def _gradients(layer: Conv2dLayer, mode: str) -> tuple[str, ...]:
    whole = (WEIGHT, BIAS) if layer.reads_image else (INPUT, WEIGHT, BIAS)
    return {
        FORWARD: (),
        INPUT_GRADIENT: (INPUT,),
        WEIGHT_GRADIENT: (WEIGHT,),
        BACKWARD: whole,
    }[mode]


def _functions(layer: Conv2dLayer) -> dict[str, Function]:
    geometry: tuple[Any, ...] = (layer.stride, layer.padding, 1, layer.groups)

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return cnnkernels.functional.conv2d(x, weight, bias, *geometry)

    def torchs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv2d(x, weight, bias, *geometry)

    def without_bias(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv2d(x, weight, None, *geometry)

    return {OURS: ours, TORCH: torchs, CUDNN_ALONE: without_bias}


def _workload(
    layer: Conv2dLayer, batch: int, mode: str, precision: Precision, device: Device, seed: int
) -> Workload:
    flops = _flops(layer, batch)
    gradients = _gradients(layer, mode)
    operation = Operation(
        input_size=torch.Size((batch, layer.in_channels, layer.height, layer.width)),
        weight_size=_weight_size(layer),
        output_size=_output_size(layer, batch),
        precision=precision,
        gradients=gradients,
        with_forward=False,
        flops=flops,
    )
    labels: dict[str, tuple[str, str]] = {}

    def variants(tensors: Mapping[str, Tensors]) -> list[Variant]:
        chosen = _variants(_functions(layer), mode, gradients, precision, tensors)
        labels.update({variant.label: (variant.side, variant.layout) for variant in chosen})
        return chosen

    return operation_workload(
        operation,
        _functions(layer)[TORCH],
        variants,
        device,
        seed,
        pairs=lambda medians: _pairs(labels, medians),
        flops=flops * max(1, sum(gradient != BIAS for gradient in gradients)),
    )


def _variants(
    functions: Mapping[str, Function],
    mode: str,
    gradients: tuple[str, ...],
    precision: Precision,
    tensors: Mapping[str, Tensors],
) -> list[Variant]:
    plain = settings(precision)
    found = [
        Variant(f"{TORCH} {layout}", TORCH, layout, functions[TORCH], plain) for layout in LAYOUTS
    ]
    if mode == FORWARD:
        alone = functions[CUDNN_ALONE]
        found.append(Variant(CUDNN_ALONE, CUDNN_ALONE, CHANNELS_LAST, alone, plain, judged=False))
    for layout in LAYOUTS:

        def ours(
            side: str, context: Callable[[], AbstractContextManager[object]], layout: str = layout
        ) -> Variant:
            with context():
                plan = _plan(tensors[layout].explain(functions[OURS]), gradients)
            return Variant(f"{side} {layout}", side, layout, functions[OURS], context, plan)

        by_plan = ours(OURS, plain)
        found.append(by_plan)
        if ATEN in by_plan.plan.split(_AND) and tensors[layout].weight.is_cuda and has_policies():
            found.append(ours(NATIVE, functools.partial(_forced, precision, NATIVE)))
    return found


_AND = " + "


def _plan(plan: Mapping[str, object], gradients: tuple[str, ...]) -> str:
    """The algorithms of the passes in a call."""
    keys = {INPUT: "input_gradient", WEIGHT: "weight_gradient"}
    algorithm = str(plan["algorithm"])
    passes = [str(plan.get(keys[name], algorithm)) for name in gradients if name in keys]
    return _AND.join(passes or [algorithm])


def has_policies() -> bool:
    """Whether the library lets its choice on CUDA be forced."""
    return hasattr(_native.library, "set_cuda_conv2d")


@contextlib.contextmanager
def cuda_policy(name: str) -> Iterator[None]:
    """Lets the library choose on CUDA by a policy: "auto", "native", or an algorithm's name."""
    library = _native.library
    assert library is not None
    before = library.config()["cuda_conv2d"]
    library.set_cuda_conv2d(name)
    try:
        yield
    finally:
        library.set_cuda_conv2d(before)


@contextlib.contextmanager
def _forced(precision: Precision, policy: str) -> Iterator[None]:
    with settings(precision)(), cuda_policy(policy):
        yield


def _pairs(labels: Mapping[str, tuple[str, str]], medians: Mapping[str, float]) -> Pairs:
    by_place = {place: label for label, place in labels.items()}
    pairs = format_pairs(by_place, medians)
    if CUDNN_ALONE in labels:
        pairs[CUDNN_ALONE] = (by_place[OURS, NCHW], CUDNN_ALONE)
    for layout in LAYOUTS:
        if (NATIVE, layout) in by_place:
            forced = by_place[NATIVE, layout]
            pairs[f"{NATIVE} {layout}"] = (forced, by_place[TORCH, layout])
    return pairs
