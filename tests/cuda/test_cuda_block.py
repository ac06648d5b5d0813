"""The fused block on CUDA against its three torch calls, with float64 as the judge.

Integers make the convolution exact in every dtype, so that the winners are torch's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import runs_kernel
from cuda_support import assert_returns_at_once, busy_side_stream, needs_cuda
from test_block import DTYPES, FORMATS, SHAPES, STEM_POOL, integers, torch_block
from torch import Tensor

from cnnkernels import _native, explain, functional

pytestmark = [needs_cuda, pytest.mark.usefixtures("poisoned")]

KERNELS = ("conv2d_relu_max_pool2d", "conv2d_relu_max_pool2d_backward")
# Blocks of which a tile holds several images, or a part of one.
MORE_SHAPES: list[tuple[Any, ...]] = [
    (5, 16, 7, 7, 24, (3, 3), {"padding": 1}),
    (2, 64, 28, 30, 128, (3, 3), {"padding": 1}),
    (2, 32, 27, 29, 70, (3, 3), {"padding": 1} | STEM_POOL),
    (3, 8, 17, 16, 16, (1, 1), {}),
    (2, 16, 21, 20, 32, (5, 5), {"stride": 2, "padding": 2, "groups": 2}),
]


@pytest.fixture(params=["auto", "native", "direct", "implicit_gemm", "wgmma"])
def policy(request: pytest.FixtureRequest) -> Iterator[str]:
    """What plans may choose."""
    assert _native.library is not None
    _native.library.set_cuda_conv2d(request.param)
    yield request.param
    _native.library.set_cuda_conv2d("auto")


def on_gpu(arguments: list[Tensor | None]) -> list[Tensor | None]:
    return [None if a is None else a.cuda() for a in arguments]


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shapes(dtype: torch.dtype, memory_format: torch.memory_format, policy: str) -> None:
    for number, shape in enumerate([*SHAPES, *MORE_SHAPES]):
        arguments = integers(shape, dtype, memory_format)
        if number % 3 == 0:
            arguments[2] = None
        what = f"{shape} {dtype} {memory_format} {policy}"
        options = shape[-1]
        gpu = on_gpu(arguments)
        leaves = [None if a is None else a.clone().requires_grad_() for a in gpu]
        with runs_kernel(*KERNELS):
            output = functional.conv2d_relu_max_pool2d(*leaves, **options)
            wanted = [leaf for leaf in leaves if leaf is not None]
            gradients = torch.autograd.grad(output, wanted, torch.ones_like(output))
        double = [None if a is None else a.double().requires_grad_() for a in arguments]
        truth = torch_block(*double, **options)
        torch.testing.assert_close(output.cpu().double(), truth.to(dtype).double(), rtol=0, atol=0,
                                   msg=what)  # fmt: skip
        expected = torch.autograd.grad(
            truth, [leaf for leaf in double if leaf is not None], torch.ones_like(truth)
        )
        for ours, theirs in zip(gradients, expected, strict=True):
            torch.testing.assert_close(ours.cpu().double(), theirs.to(dtype).double(), rtol=0,
                                       atol=0, msg=what)  # fmt: skip


@pytest.mark.parametrize("memory_format", FORMATS)
def test_rounded_values(memory_format: torch.memory_format, policy: str) -> None:
    """Random floats, where torch's strict float32 is the measure."""
    torch.manual_seed(1)
    for batch, channels, height, width, out, kernel, options in MORE_SHAPES:
        x = torch.randn(batch, channels, height, width, device="cuda")
        x = x.contiguous(memory_format=memory_format)
        weight = torch.randn(out, channels // options.get("groups", 1), *kernel, device="cuda")
        with torch.backends.cudnn.flags(allow_tf32=False):
            ours = functional.conv2d_relu_max_pool2d(x, weight, None, **options)
            theirs = torch_block(x, weight, None, **options)
        truth = torch_block(x.double(), weight.double(), None, **options)
        allowed = max(2 * (theirs - truth).norm().item(), 2 * 2.0**-24 * truth.norm().item())
        assert (ours - truth).norm().item() <= allowed, (options, policy)


@pytest.mark.parametrize(
    ("size", "weight_size", "options"),
    [
        ((1, 2, 21, 23), (3, 2, 3, 3), {"stride": 5, "padding": 1}),
        ((1, 1, 20, 21), (2, 1, 17, 17), {}),
    ],
)
def test_what_is_too_large_goes_to_torch(
    size: tuple[int, ...], weight_size: tuple[int, ...], options: dict[str, Any], policy: str
) -> None:
    x = torch.randint(-2, 3, size, device="cuda").float().requires_grad_()
    weight = torch.randint(-2, 3, weight_size, device="cuda").float().requires_grad_()
    ours = functional.conv2d_relu_max_pool2d(x, weight, None, **options)
    theirs = torch_block(x, weight, None, **options)
    assert torch.equal(ours, theirs), policy
    for mine, other in zip(
        torch.autograd.grad(ours.sum(), (x, weight)),
        torch.autograd.grad(theirs.sum(), (x, weight)),
        strict=True,
    ):
        torch.testing.assert_close(mine, other)
    assert not explain(functional.conv2d_relu_max_pool2d, x, weight, **options)["fused"]


def test_explain_tells_whether_they_are_one() -> None:
    x = torch.randn(8, 3, 32, 32, device="cuda")
    weight = torch.randn(16, 3, 3, 3, device="cuda")
    assert explain(functional.conv2d_relu_max_pool2d, x, weight)["fused"] in (True, False)
    apart = explain(functional.conv2d_relu_max_pool2d, x, weight, pool_kernel_size=4)
    assert not apart["fused"]
    assert "windows" in apart["fused_reason"]


def test_other_streams() -> None:
    x, weight = torch.randn(4, 3, 40, 40, device="cuda"), torch.randn(8, 3, 3, 3, device="cuda")
    expected = functional.conv2d_relu_max_pool2d(x, weight)
    with busy_side_stream():
        ours = functional.conv2d_relu_max_pool2d(x, weight)
    torch.cuda.synchronize()
    assert torch.equal(ours, expected)


def test_nothing_waits() -> None:
    x = torch.randn(4, 3, 40, 40, device="cuda", requires_grad=True)
    weight = torch.randn(8, 3, 3, 3, device="cuda", requires_grad=True)
    grad = torch.ones(4, 8, 19, 19, device="cuda")

    def work() -> None:
        output = functional.conv2d_relu_max_pool2d(x, weight)
        torch.autograd.grad(output, (x, weight), grad)

    assert_returns_at_once(work)


def test_graphs(policy: str) -> None:
    x = torch.randn(4, 16, 24, 24, device="cuda", dtype=torch.float16)
    weight = torch.randn(32, 16, 3, 3, device="cuda", dtype=torch.float16)
    stream = torch.cuda.Stream()
    with torch.no_grad(), torch.cuda.stream(stream):
        functional.conv2d_relu_max_pool2d(x, weight)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            output = functional.conv2d_relu_max_pool2d(x, weight)
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(output, functional.conv2d_relu_max_pool2d(x, weight)), policy


def test_empty_batch() -> None:
    x = torch.empty(0, 3, 16, 16, device="cuda", requires_grad=True)
    weight = torch.randn(4, 3, 3, 3, device="cuda", requires_grad=True)
    output = functional.conv2d_relu_max_pool2d(x, weight)
    assert output.shape == (0, 4, 7, 7)
    assert not torch.autograd.grad(output.sum(), weight)[0].any()
