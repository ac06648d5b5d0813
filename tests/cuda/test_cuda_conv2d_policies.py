"""Every convolution kernel on tiny cases, forced one by one: what compute-sanitizer runs.

All numbers are small integers, so that every precision gets every sum right: results are float64's,
rounded once, and equal maxima are equal everywhere.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from conftest import runs_kernel
from cuda_support import needs_cuda
from torch import Tensor
from torch.nn import functional as F

from cnnkernels import _native, functional

DEVICE = "cuda"

pytestmark = [
    needs_cuda,
    pytest.mark.sanitizer,
    pytest.mark.usefixtures("poisoned"),
]


@dataclass(frozen=True)
class Layer:
    """A convolution of a batch of images."""

    size: tuple[int, int, int, int]
    out_channels: int
    kernel_size: tuple[int, int]
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1

    def weight_size(self) -> tuple[int, ...]:
        return (self.out_channels, self.size[1] // self.groups, *self.kernel_size)

    def geometry(self) -> tuple[int, int, int, int]:
        return (self.stride, self.padding, self.dilation, self.groups)


# Tails in every direction, and layers whose channels fill whole vectors and tiles.
LAYERS = {
    "direct": [
        Layer((2, 3, 9, 11), 5, (3, 3), stride=2, padding=1),
        Layer((1, 1, 12, 13), 6, (5, 5)),
        Layer((1, 4, 7, 34), 33, (1, 3), padding=1),
    ],
    "implicit_gemm": [
        Layer((2, 19, 9, 7), 21, (3, 3), padding=1),
        Layer((1, 32, 8, 8), 64, (1, 1)),
        Layer((1, 16, 9, 11), 72, (3, 3), stride=2, padding=1),
        Layer((1, 8, 10, 9), 8, (3, 2), padding=2, dilation=2),
        Layer((1, 8, 6, 7), 12, (3, 3), padding=1, groups=2),
    ],
    "depthwise": [
        Layer((2, 10, 9, 7), 10, (3, 3), padding=1, groups=10),
        Layer((1, 16, 9, 12), 16, (3, 3), stride=2, padding=1, groups=16),
        Layer((1, 8, 8, 9), 16, (5, 3), padding=2, groups=8),
    ],
    "wgmma": [
        Layer((1, 64, 8, 8), 64, (3, 3), padding=1),
        Layer((2, 64, 5, 9), 72, (1, 1)),
    ],
}
LAYERS["native"] = [layers[0] for layers in LAYERS.values()]
FORMATS = [torch.contiguous_format, torch.channels_last]
# With the pools that a kernel joins, and with one that it does not.
BLOCKS = [
    (policy, LAYERS[policy][place], pool)
    for policy in ("direct", "implicit_gemm", "depthwise")
    for place, pool in [(0, (2, 2, 0)), (0, (3, 2, 1)), (1, (2, 1, 0))]
]


@contextlib.contextmanager
def forced(policy: str, allow_tf32: bool) -> Iterator[None]:
    conv, library = torch.backends.cudnn.conv, _native.library
    before = conv.fp32_precision, library.config()["cuda_conv2d"]
    library.set_cuda_conv2d(policy)
    conv.fp32_precision = "tf32" if allow_tf32 else "ieee"
    try:
        yield
    finally:
        conv.fp32_precision = before[0]
        library.set_cuda_conv2d(before[1])


def integers(size: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-2, 3, size, generator=generator).double()


def on_device(values: Tensor, dtype: torch.dtype, memory_format: torch.memory_format) -> Tensor:
    format_of = memory_format if values.dim() == 4 else torch.contiguous_format
    return values.to(dtype).to(DEVICE).contiguous(memory_format=format_of)


def results(function, tensors: list[Tensor], gradient_of) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    output = function(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, gradient_of(output))]


def compare(
    ours, torchs, layer: Layer, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    """Compare the output and all gradients bit by bit with those of float64, rounded."""
    values = [
        integers(layer.size, 0),
        integers(layer.weight_size(), 1),
        integers((layer.out_channels,), 2),
    ]
    grads = integers(torchs(*values).shape, 3)
    truth = results(torchs, values, lambda output: grads)
    found = results(
        ours,
        [on_device(tensor, dtype, memory_format) for tensor in values],
        lambda output: on_device(grads, dtype, memory_format),
    )
    for name, one, other in zip(("output", "input", "weight", "bias"), found, truth, strict=True):
        expected = other.to(dtype)
        assert torch.equal(one.cpu(), expected), f"{name} of {layer}, {dtype}, {memory_format}"


PRECISIONS = [
    pytest.param(torch.float32, False, id="fp32"),
    pytest.param(torch.float32, True, id="TF32"),
    pytest.param(torch.float16, False, id="fp16"),
    pytest.param(torch.bfloat16, False, id="bf16"),
    pytest.param(torch.float64, False, id="fp64"),
]


@pytest.mark.parametrize("policy", LAYERS)
@pytest.mark.parametrize(("dtype", "allow_tf32"), PRECISIONS)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_convolutions(
    memory_format: torch.memory_format, dtype: torch.dtype, allow_tf32: bool, policy: str
) -> None:
    # Where the policy's kernel does not apply, another of this package runs.
    kernels = ("conv2d", "conv2d_backward")
    for layer in LAYERS[policy]:

        def torchs(x: Tensor, weight: Tensor, bias: Tensor, layer: Layer = layer) -> Tensor:
            return F.conv2d(x, weight, bias, *layer.geometry())

        def ours(x: Tensor, weight: Tensor, bias: Tensor, layer: Layer = layer) -> Tensor:
            return functional.conv2d(x, weight, bias, *layer.geometry())

        with forced(policy, allow_tf32), runs_kernel(*kernels):
            compare(ours, torchs, layer, dtype, memory_format)


@pytest.mark.parametrize(("dtype", "allow_tf32"), PRECISIONS)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_blocks(memory_format: torch.memory_format, dtype: torch.dtype, allow_tf32: bool) -> None:
    for policy, layer, pool in BLOCKS:

        def torchs(
            x: Tensor,
            weight: Tensor,
            bias: Tensor,
            layer: Layer = layer,
            pool: tuple[int, int, int] = pool,
        ) -> Tensor:
            return F.max_pool2d(F.relu(F.conv2d(x, weight, bias, *layer.geometry())), *pool)

        def ours(
            x: Tensor,
            weight: Tensor,
            bias: Tensor,
            layer: Layer = layer,
            pool: tuple[int, int, int] = pool,
        ) -> Tensor:
            return functional.conv2d_relu_max_pool2d(
                x,
                weight,
                bias,
                *layer.geometry(),
                pool_kernel_size=pool[0],
                pool_stride=pool[1],
                pool_padding=pool[2],
            )

        with forced(policy, allow_tf32):
            compare(ours, torchs, layer, dtype, memory_format)
