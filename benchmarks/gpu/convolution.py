"""The ``convolution`` suite: torch's own convolution, the baseline of kernels to come.

The distinct layers of ResNet-50, VGG-16 and MobileNetV2, in float32 proper, in TF32 and in
float16, in NCHW and in channels_last, each with a bias: the forward pass under ``torch.no_grad()``,
the gradient of the input and that of the weight, each alone. cuDNN chooses by measuring
(``cudnn.benchmark``). The error is not taken: a convolution in float64 takes longer than all else.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cases import FORWARD
from ..layers import Conv2dLayer, read_conv2d_layers
from ..operators import LAYOUTS, to_layout
from .device import Device
from .options import Options
from .rows import TORCH, Case, Contender, Workload

SUITE = "convolution"
INPUT_GRADIENT = "input gradient"
WEIGHT_GRADIENT = "weight gradient"

NETWORKS = ("resnet50_v1_5", "vgg16", "mobilenet_v2")
PRECISIONS: dict[str, tuple[torch.dtype, bool]] = {
    "fp32": (torch.float32, False),
    "TF32": (torch.float32, True),
    "fp16": (torch.float16, False),
}
"""The dtype of a precision, and whether TF32 may replace float32."""


def cases(options: Options, device: Device) -> list[Case]:
    """A case for each layer and pass, of all networks in turn, their costliest layers first."""
    by_network = [_layers(network, options) for network in NETWORKS]
    return [
        Case(
            suite=SUITE,
            name=f"{network} {layer.name}",
            batch=options.batch,
            dtype="",
            mode=mode,
            prepare=functools.partial(
                _workload,
                _shrunk(layer, options.shrink),
                options.batch,
                mode,
                device,
                options.seed,
            ),
            wall=False,
        )
        for layers in itertools.zip_longest(*by_network)
        for network, layer in zip(NETWORKS, layers, strict=True)
        if layer is not None
        for mode in (FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT)
        if mode != INPUT_GRADIENT or not layer.reads_image
    ]


def _layers(network: str, options: Options) -> list[Conv2dLayer]:
    layers = read_conv2d_layers(network)
    costs = {layer: layer.count * _flops(layer, batch=1) for layer in layers}
    return sorted(layers, key=lambda layer: -costs[layer])[: options.layers]


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
    """A multiplication and an addition for each output and weight of its channel; in all passes."""
    return 2 * _output_size(layer, batch).numel() * _weight_size(layer)[1:].numel()


@contextlib.contextmanager
def _cudnn(allow_tf32: bool) -> Iterator[None]:
    backend = torch.backends.cudnn
    before = backend.allow_tf32, backend.benchmark, backend.benchmark_limit
    # Of its candidates cuDNN measures those that it expects to be the fastest.
    backend.allow_tf32, backend.benchmark = allow_tf32, True
    if backend.is_available():
        backend.benchmark_limit = 3
    try:
        yield
    finally:
        backend.allow_tf32, backend.benchmark = before[:2]
        if backend.is_available():
            backend.benchmark_limit = before[2]


def _workload(layer: Conv2dLayer, batch: int, mode: str, device: Device, seed: int) -> Workload:
    size = torch.Size((batch, layer.in_channels, layer.height, layer.width))
    output_size, weight_size = _output_size(layer, batch), _weight_size(layer)
    # Of the smallest element: what exceeds the cache in float16 does in float32.
    bytes_each = 2 * (size.numel() + output_size.numel())
    rotation = device.rotation(bytes_each)
    generator = torch.Generator(device.kind).manual_seed(seed)

    def random(of_size: torch.Size, scale: float = 1.0) -> Tensor:
        return torch.randn(of_size, generator=generator, device=device.kind) * scale

    inputs = [random(size) for _ in range(rotation)]
    gradients = [random(output_size) for _ in range(rotation)] if mode != FORWARD else []
    weight = random(weight_size, weight_size[1:].numel() ** -0.5)
    bias = random(weight_size[:1])
    contenders = []
    for (precision, (dtype, allow_tf32)), layout in itertools.product(PRECISIONS.items(), LAYOUTS):

        def converted(
            tensors: list[Tensor], dtype: torch.dtype = dtype, layout: str = layout
        ) -> list[Tensor]:
            return [to_layout(tensor.to(dtype), layout) for tensor in tensors]

        contenders.append(
            Contender(
                label=f"{precision} {layout}",
                side=TORCH,
                layout=layout,
                call=_call(
                    layer,
                    mode,
                    converted(inputs),
                    converted(gradients),
                    to_layout(weight.to(dtype), layout),
                    bias.to(dtype),
                ),
                context=functools.partial(_cudnn, allow_tf32),
            )
        )
    return Workload(
        contenders=tuple(contenders),
        rotation=rotation,
        bytes_each=bytes_each,
        flops=_flops(layer, batch),
    )


def _call(
    layer: Conv2dLayer,
    mode: str,
    inputs: list[Tensor],
    gradients: list[Tensor],
    weight: Tensor,
    bias: Tensor,
) -> Callable[[int], object]:
    rotation = len(inputs)
    geometry = (list(layer.stride), list(layer.padding), [1, 1])
    if mode == FORWARD:

        def forward(index: int) -> object:
            with torch.no_grad():
                return F.conv2d(inputs[index % rotation], weight, bias, *geometry, layer.groups)

        return forward
    mask = [mode == INPUT_GRADIENT, mode == WEIGHT_GRADIENT, False]

    def backward(index: int) -> object:
        index %= rotation
        return torch.ops.aten.convolution_backward(
            gradients[index],
            inputs[index],
            weight,
            None,
            *geometry,
            False,
            [0, 0],
            layer.groups,
            mask,
        )

    return backward
