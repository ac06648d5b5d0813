"""Convolution on matrix tiles: accuracy, precision settings, and what has no bfloat16 parts."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accuracy import compare_conv2d, onednn
from conftest import ISAS
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
    "in place": (8, 64, 15, 96, 1, {}),  # for bfloat16, both ways
    "in place, groups": (8, 128, 13, 192, 1, {"groups": 2}),
    "few pixels": (4, 256, 7, 256, 3, {"padding": 1}),
    "few pixels stride": (4, 256, 9, 250, 3, {"padding": 1, "stride": 2}),
    "wide dilation": (8, 64, 45, 64, 3, {"padding": 40, "dilation": 40}),
    "wide dilation, no padding": (2, 64, 90, 64, 3, {"dilation": 38}),
    "few pixels, wide dilation": (1, 256, 36, 256, 3, {"padding": 35, "dilation": 35}),
}
# Of few channels, of which only the forward pass reads the input in runs.
ROW_RUNS: dict[str, tuple[int, int, int, int, int, dict[str, Any]]] = {
    "stem": (2, 3, 70, 64, 7, {"padding": 3, "stride": 2}),
    "patches": (3, 3, 128, 100, 16, {"stride": 16}),
    "several tiles a run": (2, 13, 37, 70, 5, {"padding": (1, 2), "dilation": (2, 1)}),
    "wide padding": (2, 4, 33, 40, 3, {"padding": 5}),
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
    batch, channels, size, out, kernel, options = (SHAPES | ROW_RUNS)[name]
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
    compare_conv2d(arguments, options, f"{name} {dtype} {memory_format}")


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ROW_RUNS)
def test_row_runs(name: str, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    arguments = tensors(name, dtype, memory_format)
    options = ROW_RUNS[name][-1]
    if dtype == torch.bfloat16:
        assert explain(functional.conv2d, *arguments, **options)["algorithm"] == "amx"
    with onednn(name != "wide padding"):  # its outputs that read only padding crash it
        compare_conv2d(arguments, options, f"{name} {dtype} {memory_format}")
    # What is not finite must not spread through the weights of zero at the end of a run.
    x, w, b = arguments
    x[0, 0, 20, 20] = torch.inf
    ours, theirs = (
        functional.conv2d(x, w, b, **options),
        F.conv2d(x.double(), w.double(), b.double(), **options),
    )
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours.isinf(), theirs.isinf())


def test_gradient_that_no_tap_reaches() -> None:
    """Every output lies over padding alone."""
    x = torch.randn(4, 1024, 2, 2, requires_grad=True)
    w = torch.randn(1024, 1024, 1, 1, requires_grad=True)
    output = functional.conv2d(x, w, stride=3, padding=1)
    gradients = torch.autograd.grad(output.sum(), (x, w))
    assert not output.any()
    assert not any(g.any() for g in gradients)


@pytest.mark.parametrize("name", ["chunks", "pointwise", "few pixels", "stem"])
@pytest.mark.parametrize(
    "scales",
    [
        (1e-20, 1e-16, 1),
        (1e-36, 1, 1),
        (1e-36, 1e20, 1),
        (1, 1e-37, 1),
        (1e-15, 1, 1e-21),
        (0, 1, 1),
    ],
    ids=str,
)
def test_small_numbers(name: str, scales: tuple[float, float, float]) -> None:
    """Lesser parts that are no normal numbers are lost on tiles."""
    x, w, _ = tensors(name, torch.float32)
    x, w = x * scales[0], w * scales[1]
    options = (SHAPES | ROW_RUNS)[name][-1]
    truth_leaves = [t.double().requires_grad_() for t in (x, w)]
    truth = F.conv2d(*truth_leaves, **options)
    grad_output = torch.randn(truth.shape, generator=torch.Generator().manual_seed(1)) * scales[2]
    truths = [truth, *torch.autograd.grad(truth, truth_leaves, grad_output.double())]
    leaves = [t.requires_grad_() for t in (x, w)]
    output = functional.conv2d(*leaves, **options)
    for ours, exact in zip(
        [output, *torch.autograd.grad(output, leaves, grad_output)], truths, strict=True
    ):
        # The results may be denormal themselves.
        least = 2.0**-149 * exact.numel() ** 0.5
        assert (ours.double() - exact).norm() <= 4e-7 * exact.norm() + least


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


@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize("name", ["chunks", "pointwise", "few pixels"])
def test_medium_keeps_nan_and_large_numbers(name: str) -> None:
    """Rounding would make zero of the NaN whose bits are all ones, infinity of the largest."""
    torch.set_float32_matmul_precision("medium")
    x, w, _ = tensors(name, torch.float32)
    options = SHAPES[name][-1]
    x.view(torch.int32)[0, 0, 3, 3] = 0x7FFFFFFF
    ours, theirs = functional.conv2d(x, w, **options), F.conv2d(x, w, **options)
    assert torch.equal(ours.isnan(), theirs.isnan())
    x[0, 0, 3, 3] = torch.finfo(torch.float32).max
    assert functional.conv2d(x, w * 1e-3, **options).isfinite().all()


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


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({}, 3),
        ({"": "tf32"}, 2),
        ({"mkldnn": "bf16"}, 1),
        ({"mkldnn.conv": "bf16"}, 1),
        ({"mkldnn.matmul": "tf32"}, 2),
        ({"mkldnn.conv": "ieee", "mkldnn.matmul": "bf16"}, 3),
        ({"cuda.matmul": "tf32"}, 3),
    ],
    ids=str,
)
def test_backend_precision(settings: dict[str, str], parts: int) -> None:
    """The convolution's own setting prevails over that of matrix products."""
    code = [
        "import torch, cnnkernels",
        *(
            f"torch.backends.{name + '.' if name else ''}fp32_precision = {value!r}"
            for name, value in settings.items()
        ),
        "x, w = torch.randn(8, 64, 20, 20), torch.randn(64, 64, 3, 3)",
        "cnnkernels.functional.conv2d(x.double(), w.double())",
        "print(cnnkernels.explain(cnnkernels.functional.conv2d, x, w)['parts'])",
    ]
    environment = os.environ | {"CNNKERNELS_CPU_ISA": "amx"}
    ran = subprocess.run(
        [sys.executable, "-c", "\n".join(code)],
        check=True,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert int(ran.stdout) == parts
