"""The weight gradient that is read where it lies: accuracy on every tail, tier and thread count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accuracy import compare_conv2d
from conftest import runs_kernel
from torch import Tensor

from cnnkernels import _native, explain, functional

pytestmark = [
    pytest.mark.skipif(_native.library is None, reason="needs the compiled library"),
    pytest.mark.usefixtures("isa", "poisoned"),
]

# (batch, in_channels, height, width, out_channels, kernel, arguments)
Shape = tuple[int, int, int, int, int, tuple[int, int], dict[str, Any]]
SHAPES: list[Shape] = [
    # One tap, either side the wider one, with every remainder of vectors and of elements.
    (3, 24, 19, 21, 144, (1, 1), {}),
    (3, 144, 19, 21, 24, (1, 1), {}),
    (2, 40, 31, 17, 33, (1, 1), {}),
    (2, 17, 31, 17, 50, (1, 1), {}),
    *[(1, channels, 30, 30, 37, (1, 1), {}) for channels in (16, 21, 29, 45)],
    (2, 32, 33, 35, 48, (1, 1), {"stride": 2}),
    (2, 48, 33, 35, 20, (1, 1), {"stride": (3, 1), "padding": (1, 2)}),
    # First layers: runs of a kernel row, with and without a border.
    (2, 3, 61, 67, 32, (3, 3), {"stride": 2, "padding": 1}),
    (2, 3, 61, 131, 40, (7, 7), {"stride": 2, "padding": 3}),
    (2, 3, 40, 150, 17, (5, 5), {}),
    (2, 5, 40, 50, 24, (3, 2), {"dilation": (2, 1), "padding": (2, 1)}),
    (9, 8, 14, 9, 32, (3, 3), {"padding": 1}),  # several rows a block
]


def tensors(shape: Shape, dtype: torch.dtype) -> list[Tensor]:
    batch, channels, height, width, out, kernel, _ = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        made = torch.randn(size, generator=generator).to(dtype)
        return made.contiguous(memory_format=torch.channels_last)

    return [normal(batch, channels, height, width), normal(out, channels, *kernel)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy(shape: Shape, dtype: torch.dtype) -> None:
    arguments = tensors(shape, dtype)
    plan = explain(functional.conv2d, *arguments, **shape[-1])
    # Matrix tiles take some; every other tier, and float64, must come here.
    assert plan["weight_gradient"] in ("runs", "amx" if plan["isa"] == "amx" else "")
    compare_conv2d(arguments, shape[-1], str(shape))


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[1], SHAPES[9]], ids=str)
def test_the_same_for_any_number_of_threads(shape: Shape) -> None:
    x, weight = tensors(shape, torch.float32)
    gradients = []
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            leaf = weight.clone().requires_grad_()
            with runs_kernel("conv2d_backward"):
                functional.conv2d(x, leaf, **shape[-1]).square().sum().backward()
            assert leaf.grad is not None
            gradients.append(leaf.grad)
    finally:
        torch.set_num_threads(threads)
    assert gradients[0].equal(gradients[1])
    assert gradients[0].equal(gradients[2])


def test_weights_in_any_order() -> None:
    x, weight = tensors(SHAPES[0], torch.float32)
    expected = torch.nn.grad.conv2d_weight(
        x.double(), weight.shape, torch.ones(3, 144, 19, 21).double()
    )
    for leaf in (weight, weight.contiguous()):
        leaf = leaf.clone(memory_format=torch.preserve_format).requires_grad_()
        functional.conv2d(x, leaf).sum().backward()
        torch.testing.assert_close(leaf.grad, expected.float(), rtol=1e-4, atol=1e-4)
