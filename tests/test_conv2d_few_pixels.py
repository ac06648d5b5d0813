"""Convolution with few output pixels: one image, squeeze and excitation, classifiers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accuracy import compare_conv2d
from torch import Tensor
from torch.nn import functional as F

from cnnkernels import explain, functional, get_backend

pytestmark = pytest.mark.usefixtures("isa", "poisoned")

# (batch, in_channels, height, width, out_channels, kernel, options)
Shape = tuple[int, int, int, int, int, int, dict[str, Any]]

PATCHES: dict[str, Shape] = {
    "squeeze": (1, 97, 1, 1, 23, 1, {}),
    "excite": (8, 33, 1, 1, 130, 1, {}),
    "classifier": (3, 64, 5, 5, 41, 5, {}),
    "border": (1, 17, 4, 3, 19, 3, {"padding": 1, "stride": 2}),
    "overlap": (2, 40, 4, 3, 9, 3, {"dilation": (1, 1)}),
    "dilated": (1, 21, 9, 7, 6, 3, {"dilation": (3, 2), "padding": (1, 0), "stride": (3, 1)}),
}

WEIGHTS_FIRST: dict[str, Shape] = {
    "last stage": (1, 200, 7, 7, 190, 3, {"padding": 1}),
    "strided": (2, 150, 13, 9, 230, 3, {"padding": 1, "stride": 2}),
    "pointwise": (2, 500, 5, 5, 610, 1, {}),
    "groups": (1, 300, 6, 6, 600, 3, {"padding": 1, "groups": 3, "stride": 2}),
}


def tensors(shape: Shape, dtype: torch.dtype, memory_format: torch.memory_format) -> list[Tensor]:
    batch, channels, height, width, out, kernel, options = shape
    generator = torch.Generator().manual_seed(0)
    sizes = [
        (batch, channels, height, width),
        (out, channels // options.get("groups", 1), kernel, kernel),
        (out,),
    ]
    made = [torch.randn(size, generator=generator).to(dtype) for size in sizes]
    return [t.contiguous(memory_format=memory_format) if t.dim() == 4 else t for t in made]


def plan_of(shape: Shape, arguments: list[Tensor]) -> dict[str, Any]:
    """What explain says of the native kernels; nothing where they are not there."""
    return explain(functional.conv2d, *arguments, **shape[-1]) if get_backend() == "native" else {}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("name", PATCHES)
def test_patches(
    name: str, dtype: torch.dtype, memory_format: torch.memory_format, threads: int
) -> None:
    shape = PATCHES[name]
    arguments = tensors(shape, dtype, memory_format)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert plan_of(shape, arguments).get("algorithm", "patches") == "patches"
        compare_conv2d(arguments, shape[-1], f"{name} {dtype} {memory_format}")
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_weights_with_gaps_take_another_algorithm(memory_format: torch.memory_format) -> None:
    shape = PATCHES["classifier"]
    x, w, b = tensors(shape, torch.float32, memory_format)
    w = w.transpose(0, 1).contiguous().transpose(0, 1)
    assert plan_of(shape, [x, w, b]).get("algorithm") != "patches"
    compare_conv2d([x, w, b], {}, "weights with gaps")


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", WEIGHTS_FIRST)
def test_weights_first(
    name: str, dtype: torch.dtype, memory_format: torch.memory_format, isa: str
) -> None:
    shape = WEIGHTS_FIRST[name]
    arguments = tensors(shape, dtype, memory_format)
    plan = plan_of(shape, arguments)
    if plan and isa != "amx" and name != "last stage":  # tiles or Winograd may be cheaper
        assert plan["algorithm"] == "outer product"
        assert plan["weights_first"]
    compare_conv2d(arguments, shape[-1], f"{name} {dtype} {memory_format}")


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_what_is_not_finite_stays_in_its_pixel(memory_format: torch.memory_format) -> None:
    shape = PATCHES["excite"]
    x, w, b = tensors(shape, torch.float32, memory_format)
    x[2, 5] = torch.inf
    x[4, 7] = torch.nan
    ours, theirs = functional.conv2d(x, w, b), F.conv2d(x, w, b)
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours.isinf(), theirs.isinf())
