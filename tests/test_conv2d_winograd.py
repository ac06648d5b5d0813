"""Winograd's convolution: accuracy on odd sizes, and what is not finite."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from accuracy import compare_conv2d
from conftest import ISAS
from torch import Tensor
from torch.nn import functional as F

from cnnkernels import _native, explain, functional

TIERS = [isa for isa in ISAS if isa in ("avx2", "avx512")]

pytestmark = [
    pytest.mark.skipif(
        not TIERS, reason="needs the compiled library, and vectors of more than four floats"
    ),
    pytest.mark.usefixtures("tier", "poisoned"),
]

# (batch, in_channels, height, width, out_channels, padding)
SHAPES = [
    (8, 64, 14, 14, 64, 1),
    (8, 64, 13, 16, 64, 0),
    (9, 71, 17, 19, 57, 1),
    (8, 64, 9, 30, 96, (2, 1)),
    (8, 100, 7, 7, 128, 1),
]


@pytest.fixture(params=TIERS)
def tier(request: pytest.FixtureRequest) -> Iterator[None]:
    assert _native.library is not None
    chosen = _native.library.config()["isa"]
    _native.library.set_isa(request.param)
    yield
    _native.library.set_isa(chosen)


def tensors(
    shape: tuple[int, int, int, int, int, int | tuple[int, int]],
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.channels_last,
) -> list[Tensor]:
    batch, channels, height, width, out, _ = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        made = torch.randn(size, generator=generator).to(dtype)
        return made.contiguous(memory_format=memory_format) if len(size) == 4 else made

    return [normal(batch, channels, height, width), normal(out, channels, 3, 3), normal(out)]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy(
    shape: tuple[int, int, int, int, int, int | tuple[int, int]],
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> None:
    arguments = tensors(shape, dtype, memory_format)
    padding = shape[-1]
    assert explain(functional.conv2d, *arguments, padding=padding)["algorithm"] == "winograd"
    compare_conv2d(arguments, {"padding": padding}, str(shape))


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("where", ["input", "grad_output"])
def test_infinity_and_nan_stay_where_they_are(where: str, value: float) -> None:
    """The sums of a patch would spread them over a tile."""
    shape = SHAPES[0]
    x, w, b = tensors(shape)
    grad_output = torch.ones_like(F.conv2d(x, w, b, padding=1))
    tensor = x if where == "input" else grad_output
    tensor[1, 2, 5, 6] = value
    results = []
    for convolve in (functional.conv2d, F.conv2d):
        leaves = [t.clone().requires_grad_() for t in (x, w, b)]
        output = convolve(*leaves, padding=1)
        results.append([output.detach(), *torch.autograd.grad(output, leaves, grad_output)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3, equal_nan=True)
