"""Convolution on matrix tiles: accuracy, precision settings, and what has no bfloat16 parts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accuracy import compare
from conftest import ISAS, runs_kernel
from torch import Tensor
from torch.nn import functional as F

from cnnkernels import _native, explain, functional

pytestmark = [
    pytest.mark.skipif("amx" not in ISAS, reason="this machine has no matrix tiles"),
    pytest.mark.usefixtures("amx", "poisoned"),
]

# (batch, in_channels, size, out_channels, kernel, arguments): large enough for the planner to
# choose tiles for all three passes, in each order of going over them.
SHAPES: dict[str, tuple[int, int, int, int, int, dict[str, Any]]] = {
    "chunks": (8, 64, 20, 64, 3, {"padding": 1}),
    "tails": (7, 70, 17, 50, 3, {"padding": 1}),
    "stride": (6, 64, 21, 96, 3, {"padding": 1, "stride": 2}),
    "dilation": (4, 64, 20, 64, 3, {"padding": 3, "dilation": 3}),
    "groups": (8, 128, 16, 128, 3, {"padding": 1, "groups": 2}),
    "pointwise": (8, 128, 15, 200, 1, {}),
    "pointwise stride": (8, 128, 29, 200, 1, {"stride": 2}),
    "pointwise padding": (8, 128, 15, 200, 1, {"padding": 1}),
    "few pixels": (4, 256, 7, 256, 3, {"padding": 1}),
    "few pixels stride": (4, 256, 9, 250, 3, {"padding": 1, "stride": 2}),
}


@pytest.fixture
def amx() -> Iterator[None]:
    assert _native.library is not None
    chosen = _native.library.config()["isa"]
    _native.library.set_isa("amx")
    yield
    _native.library.set_isa(chosen)


@pytest.fixture
def precision() -> Iterator[None]:
    chosen = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(chosen)


def tensors(
    name: str, dtype: torch.dtype, memory_format: torch.memory_format = torch.contiguous_format
) -> list[Tensor]:
    batch, channels, size, out, kernel, options = SHAPES[name]
    generator = torch.Generator().manual_seed(0)
    weight = (out, channels // options.get("groups", 1), kernel, kernel)
    shapes = [(batch, channels, size, size), weight, (out,)]
    made = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return [t.contiguous(memory_format=memory_format) if t.dim() == 4 else t for t in made]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_accuracy(name: str, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    arguments = tensors(name, dtype, memory_format)
    options = SHAPES[name][-1]
    plan = explain(functional.conv2d, *arguments, **options)
    assert plan["algorithm"] == "amx"
    assert plan["parts"] == {torch.float32: 3, torch.bfloat16: 1, torch.float16: 2}[dtype]
    with runs_kernel("conv2d", "conv2d_backward"):
        compare(
            lambda x, w, b: functional.conv2d(x, w, b, **options),
            lambda x, w, b: F.conv2d(x, w, b, **options),
            arguments,
            f"{name} {dtype} {memory_format}",
        )


def relative_errors(name: str) -> list[float]:
    """Of the output, the input's gradient and the weight's."""
    x, w, _ = tensors(name, torch.float32)
    options = SHAPES[name][-1]
    results = []
    for cast in (torch.Tensor.float, torch.Tensor.double):
        leaves = [cast(t).detach().requires_grad_() for t in (x, w)]
        convolve = functional.conv2d if cast is torch.Tensor.float else F.conv2d
        output = convolve(leaves[0], leaves[1], **options)
        grad_output = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
        gradients = torch.autograd.grad(output, leaves, cast(grad_output))
        results.append([output.detach(), *gradients])
    return [
        ((ours.double() - truth).norm() / truth.norm()).item()
        for ours, truth in zip(*results, strict=True)
    ]


@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize("name", ["chunks", "pointwise", "few pixels"])
def test_precision(name: str) -> None:
    """What is left out of a product: 2^-24 with three parts, 2^-16 with two, 2^-8 with one."""
    bounds = {"highest": (0, 3e-7), "high": (1e-7, 3e-5), "medium": (5e-4, 6e-3)}
    for setting, (least, most) in bounds.items():
        torch.set_float32_matmul_precision(setting)
        for error in relative_errors(name):
            assert least < error < most, f"{setting}: {error}"


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("where", ["input", "weight", "grad_output"])
@pytest.mark.parametrize("name", ["chunks", "pointwise", "few pixels"])
def test_infinity_and_nan(name: str, where: str, value: float) -> None:
    """Infinity times a part that is zero would be NaN."""
    x, w, b = tensors(name, torch.float32)
    options = SHAPES[name][-1]
    grad_output = torch.ones_like(F.conv2d(x, w, b, **options))
    tensor = {"input": x, "weight": w, "grad_output": grad_output}[where]
    tensor[-1, -1, tensor.size(2) // 2, tensor.size(3) // 2] = value
    results = []
    for convolve in (functional.conv2d, F.conv2d):
        leaves = [t.clone().requires_grad_() for t in (x, w, b)]
        output = convolve(*leaves, **options)
        results.append([output.detach(), *torch.autograd.grad(output, leaves, grad_output)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3, equal_nan=True)


def test_huge_numbers_do_not_overflow() -> None:
    """Rounding the largest float to bfloat16 gives infinity; cutting it does not."""
    x, w, _ = tensors("chunks", torch.float32)
    x[0, 0, 5, 5] = torch.finfo(torch.float32).max
    w.mul_(1e-3)
    options = SHAPES["chunks"][-1]
    ours = functional.conv2d(x, w, **options)
    theirs = F.conv2d(x, w, **options)
    assert ours.isfinite().all()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", SHAPES)
def test_threads_do_not_change_results(name: str) -> None:
    x, w, b = tensors(name, torch.float32)
    options = SHAPES[name][-1]
    chosen = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaves = [t.clone().requires_grad_() for t in (x, w, b)]
            output = functional.conv2d(*leaves, **options)
            results.append(torch.autograd.grad(output.square().sum(), leaves))
    finally:
        torch.set_num_threads(chosen)
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            assert torch.equal(first, second)
