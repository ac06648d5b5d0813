"""The convolution kernels against float64 and torch, on every tier, layout, dtype and tail."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accuracy import compare, compare_conv2d, onednn, reads_only_padding
from conftest import runs_kernel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from cnnkernels import explain, functional, get_backend

pytestmark = pytest.mark.usefixtures("isa", "poisoned")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

# (batch, in_channels, height, width, out_channels, kernel, arguments)
SHAPES: list[tuple[int, int, int, int, int, tuple[int, int], dict[str, Any]]] = [
    (1, 96, 61, 67, 80, (3, 3), {"stride": 2, "padding": 1}),  # several blocks of rows
    (1, 200, 30, 40, 300, (1, 1), {}),  # several blocks of pixels
    (1, 1, 4, 4, 1, (4, 4), {}),
    (1, 1, 4, 4, 2, (2, 2), {"stride": 2}),
    (1, 1, 4, 4, 1, (3, 3), {"stride": 2, "padding": 1}),
    (2, 1, 32, 32, 6, (3, 3), {}),
    (3, 6, 15, 15, 16, (3, 3), {}),
    # Every tail of a row, and every remainder of output channels.
    *[(1, 2, 3, width, 3, (1, 2), {}) for width in (*range(2, 20), 31, 32, 33, 48, 50)],
    *[(2, 3, 5, 11, channels, (3, 3), {"padding": 1}) for channels in (*range(1, 10), 15, 25)],
    # Strides, with and without padding, and larger than the kernel.
    *[
        (2, 3, 13, 17, 4, (3, 2), {"stride": stride, "padding": padding})
        for stride in [(1, 2), (2, 1), (2, 3), 4]
        for padding in [0, 1, (2, 1)]
    ],
    (2, 3, 13, 14, 4, (1, 1), {"stride": 3}),
    (2, 5, 12, 19, 4, (3, 3), {"dilation": (2, 3), "padding": (2, 3)}),
    (2, 3, 20, 21, 5, (3, 3), {"dilation": 2, "stride": 2, "padding": 3}),
    (2, 6, 9, 10, 9, (3, 3), {"groups": 3, "padding": 1}),
    (2, 8, 9, 18, 8, (3, 3), {"groups": 8, "padding": 1, "stride": 2}),
    (2, 4, 9, 18, 8, (5, 3), {"groups": 4, "padding": (4, 0)}),
    (1, 3, 40, 40, 7, (7, 7), {"stride": 2, "padding": 3}),
    (1, 40, 6, 9, 13, (3, 3), {"padding": 1}),
    (5, 17, 8, 8, 33, (1, 1), {}),
    (1, 1, 30, 30, 2, (14, 13), {}),
    (3, 2, 1, 50, 3, (1, 5), {}),
    (3, 2, 50, 1, 3, (5, 1), {}),
]


def case_arguments(
    shape: tuple[int, int, int, int, int, tuple[int, int], dict[str, Any]],
    dtype: torch.dtype,
    memory_format: torch.memory_format = torch.contiguous_format,
    bias: bool = True,
) -> list[torch.Tensor | None]:
    batch, channels, height, width, out, kernel, options = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(dtype)

    input = normal(batch, channels, height, width).contiguous(memory_format=memory_format)
    weight = normal(out, channels // options.get("groups", 1), *kernel)
    return [input, weight.contiguous(memory_format=memory_format), normal(out) if bias else None]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shapes(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    for number, shape in enumerate(SHAPES[2:]):
        arguments = case_arguments(shape, dtype, memory_format, bias=number % 3 != 0)
        compare_conv2d(arguments, shape[-1], f"{shape} {dtype} {memory_format}")


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_several_blocks(
    shape: tuple[int, int, int, int, int, tuple[int, int], dict[str, Any]],
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> None:
    arguments = case_arguments(shape, dtype, memory_format)
    compare_conv2d(arguments, shape[-1], f"{shape} {dtype} {memory_format}")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    groups = data.draw(st.integers(1, 3), "groups")
    kernel = data.draw(st.tuples(st.integers(1, 5), st.integers(1, 5)), "kernel")
    dilation = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3)), "dilation")
    padding = data.draw(st.tuples(st.integers(0, 4), st.integers(0, 4)), "padding")
    stride = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 4)), "stride")
    least = [max(1, dilation[i] * (kernel[i] - 1) + 1 - 2 * padding[i]) for i in range(2)]
    height, width = (data.draw(st.integers(n, n + 19), "size") for n in least)
    shape = (
        data.draw(st.integers(1, 3), "batch"),
        groups * data.draw(st.integers(1, 5), "in"),
        height,
        width,
        groups * data.draw(st.integers(1, 9), "out"),
        kernel,
        {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups},
    )
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    memory_format = data.draw(
        st.sampled_from([torch.contiguous_format, torch.channels_last]), "format"
    )
    arguments = case_arguments(shape, dtype, memory_format)
    works = not any(
        reads_only_padding(size, kernel[i], stride[i], padding[i], dilation[i])
        for i, size in enumerate((height, width))
    )
    with onednn(works):
        compare(
            lambda x, w, b: functional.conv2d(x, w, b, **shape[-1]),
            lambda x, w, b: F.conv2d(x, w, b, **shape[-1]),
            arguments,
            str(shape),
        )


# (batch, channels, height, width, kernel, options): long rows and few images, whose weight
# gradients are one long sum.
DEPTHWISE: list[tuple[int, int, int, int, int, dict[str, Any]]] = [
    (5, 96, 22, 58, 3, {"padding": (0, 4)}),
    (1, 19, 12, 17, 7, {"padding": 3}),
    (1, 32, 54, 42, 3, {"padding": (3, 4)}),
    (3, 48, 24, 59, 3, {"padding": (4, 0)}),
    (2, 40, 32, 30, 3, {"padding": 3, "stride": 2, "dilation": 2}),
    (1, 36, 35, 38, 7, {"stride": 2, "dilation": 2}),
    (1, 20, 30, 130, 3, {"padding": 1, "stride": (2, 1)}),
]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", DEPTHWISE, ids=str)
def test_long_sums_of_depthwise_weight_gradients(
    shape: tuple[int, int, int, int, int, dict[str, Any]], memory_format: torch.memory_format
) -> None:
    batch, channels, height, width, kernel, options = shape
    options = {**options, "groups": channels}
    case = (batch, channels, height, width, channels, (kernel, kernel), options)
    arguments = case_arguments(case, torch.float32, memory_format, bias=False)
    compare_conv2d(arguments, options, str(shape))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "shape",
    [
        (64, 44, 7, 7, 40, (3, 3), {"padding": 1}),  # sums over several images, several chunks
        (9, 20, 30, 30, 24, (3, 3), {"stride": 2}),  # several sums an image, several slices
        (5, 24, 14, 14, 24, (3, 3), {"padding": 1, "groups": 24}),
        (16, 3, 112, 112, 2, (3, 3), {}),  # direct, several chunks
    ],
    ids=str,
)
def test_weight_gradient_is_the_same_for_any_number_of_threads(
    shape: tuple[int, int, int, int, int, tuple[int, int], dict[str, Any]],
    memory_format: torch.memory_format,
) -> None:
    x, w, _ = case_arguments(shape, torch.float32, memory_format, bias=False)
    assert x is not None
    assert w is not None
    before = torch.get_num_threads()
    gradients = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            weight = w.clone().requires_grad_()
            output = functional.conv2d(x, weight, **shape[-1])
            generator = torch.Generator().manual_seed(1)
            grad_output = torch.randn(output.shape, generator=generator)
            gradients += torch.autograd.grad(output, weight, grad_output)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_agree(threads: int) -> None:
    """Large enough to run in parallel; a thread count has one result, run after run."""
    shape = (6, 16, 40, 42, 24, (3, 3), {"padding": 1})
    input, weight, bias = case_arguments(shape, torch.float32)
    assert input is not None
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        leaves = [t.clone().requires_grad_() for t in (input, weight, bias) if t is not None]
        results = []
        for _ in range(2):
            output = functional.conv2d(*leaves, padding=1)
            results.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
        for first, second in zip(*results, strict=True):
            assert torch.equal(first, second)
        compare(
            lambda x, w, b: functional.conv2d(x, w, b, padding=1),
            lambda x, w, b: F.conv2d(x, w, b, padding=1),
            [input, weight, bias],
            f"{threads} threads",
        )
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_any_strides(layout: str) -> None:
    base = torch.randn(4, 6, 20, 22)
    input = {
        "transposed": base.transpose(2, 3),
        "sliced": base[::2, 1:5, ::2, 3:],
        "expanded": base[:1, :1].expand(3, 4, 20, 22),
    }[layout]
    channels = input.shape[1]
    weight = torch.randn(5, 3, 3, channels).permute(0, 3, 1, 2)[:, :, :, :2]
    with runs_kernel("conv2d"):
        ours = functional.conv2d(input, weight)
    torch.testing.assert_close(ours, F.conv2d(input, weight), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mask", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_the_gradients_asked_for(mask: tuple[bool, bool, bool]) -> None:
    input, weight, grad = torch.randn(2, 3, 8, 9), torch.randn(4, 3, 3, 3), torch.randn(2, 4, 6, 7)
    gradients = torch.ops.cnnkernels.conv2d_backward(
        grad, input, weight, [1, 1], [0, 0], [1, 1], 1, mask
    )
    expected = torch.ops.aten.convolution_backward(
        grad, input, weight, [4], [1, 1], [0, 0], [1, 1], False, [0, 0], 1, mask
    )
    for wanted, mine, torchs in zip(mask, gradients, expected, strict=True):
        assert (mine is not None) == wanted
        if wanted:
            torch.testing.assert_close(mine, torchs, rtol=1e-4, atol=1e-4)


def test_non_finite_values_stay_where_torch_has_them() -> None:
    """Borders, tails and gaps of packed rows must not leak NaN or lose infinities."""
    for size in range(5, 24):
        input = torch.randn(1, 2, 6, size)
        input[0, 0, 2, size - 1] = float("inf")
        input[0, 1, 5, 0] = float("nan")
        weight = torch.randn(3, 2, 3, 2)
        for options in ({}, {"stride": 2}, {"padding": 1}):
            x, y = input.clone().requires_grad_(), input.clone().requires_grad_()
            w, v = weight.clone().requires_grad_(), weight.clone().requires_grad_()
            ours, theirs = functional.conv2d(x, w, **options), F.conv2d(y, v, **options)
            assert torch.equal(ours.isnan(), theirs.isnan())
            assert torch.equal(ours.isinf(), theirs.isinf())
            grad = torch.randn_like(ours)
            ours.backward(grad)
            theirs.backward(grad)
            assert x.grad is not None
            assert w.grad is not None
            assert v.grad is not None
            assert x.grad.isfinite().all()
            assert torch.equal(w.grad.isfinite(), v.grad.isfinite())


def test_infinite_gradient_stays_where_torch_has_it() -> None:
    for size in range(5, 20):
        input, weight = torch.randn(1, 2, 5, size), torch.randn(3, 2, 3, 3)
        x, y = input.clone().requires_grad_(), input.clone().requires_grad_()
        ours, theirs = functional.conv2d(x, weight), F.conv2d(y, weight)
        grad = torch.randn_like(ours)
        grad[0, 1, 2, size - 3] = float("inf")
        ours.backward(grad)
        theirs.backward(grad)
        assert x.grad is not None
        assert y.grad is not None
        assert torch.equal(x.grad.isfinite(), y.grad.isfinite())


def test_long_sums_are_as_accurate_as_torch() -> None:
    """512 channels of 3x3: a plain float sum of 4608 products would lose to torch."""
    for memory_format in (torch.contiguous_format, torch.channels_last):
        shape = (2, 512, 9, 9, 8, (3, 3), {"padding": 1})
        compare(
            lambda x, w, b: functional.conv2d(x, w, b, padding=1),
            lambda x, w, b: F.conv2d(x, w, b, padding=1),
            case_arguments(shape, torch.float32, memory_format),
            "512 channels",
        )


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("algorithm", "channels", "out_channels", "size"),
    [
        ("direct", 1, 4, 32),
        ("outer product", 16, 32, 9),
        ("outer product", 31, 47, 7),
        ("winograd", 32, 32, 14),
        ("winograd", 33, 47, 15),
    ],
)
def test_plan_follows_the_shape(
    algorithm: str, channels: int, out_channels: int, size: int, memory_format: torch.memory_format
) -> None:
    shape = (2, channels, size, size, out_channels, (3, 3), {"padding": 1})
    arguments = case_arguments(shape, torch.float32, memory_format)
    if get_backend() == "native":
        plan = explain(functional.conv2d, *arguments, padding=1)
        assert plan["algorithm"] == algorithm
    compare_conv2d(arguments, {"padding": 1}, algorithm)


def test_other_dtypes_go_to_aten() -> None:
    for dtype in (torch.int64, torch.complex64):
        input = torch.ones(1, 2, 5, 5, dtype=dtype)
        weight = torch.ones(3, 2, 3, 3, dtype=dtype)
        assert torch.equal(functional.conv2d(input, weight), F.conv2d(input, weight))


@pytest.mark.parametrize("groups", [1, 4, 64])
@pytest.mark.parametrize("padding", [30, 300, 3000])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_windows_in_the_padding_alone(
    memory_format: torch.memory_format, padding: int, groups: int
) -> None:
    """A row of all windows may end before the image begins."""
    options: dict[str, Any] = {
        "stride": (1, 2 * padding + 1),
        "padding": (0, padding),
        "groups": groups,
    }
    shape = (16, 64, 3, 1, 64, (1, 1), options)
    with onednn(False):  # its outputs that read only padding crash it
        compare_conv2d(
            case_arguments(shape, torch.float32, memory_format), options, f"padding {padding}"
        )


@pytest.mark.parametrize(
    ("channels", "filters", "groups"), [(2, 4, 1), (4, 48, 1), (32, 32, 32)], ids=str
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_sums_over_many_pixels(
    channels: int, filters: int, groups: int, memory_format: torch.memory_format
) -> None:
    """Gradients of one sign, where the rounding of a long sum shows."""
    image = torch.rand(1, channels, 160, 160).contiguous(memory_format=memory_format)
    gradient = torch.rand(1, filters, 158, 158).contiguous(memory_format=memory_format)
    weight, bias = torch.rand(filters, channels // groups, 3, 3), torch.rand(filters)

    def gradients(conv2d: Any, dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [tensor.to(dtype).requires_grad_() for tensor in (weight, bias)]
        output = conv2d(image.to(dtype), *leaves, groups=groups)
        return torch.autograd.grad(output, leaves, gradient.to(dtype))

    for exact, theirs, ours in zip(
        gradients(F.conv2d, torch.float64),
        gradients(F.conv2d, torch.float32),
        gradients(functional.conv2d, torch.float32),
        strict=True,
    ):
        error, peer = ((t.double() - exact).norm() / exact.norm() for t in (ours, theirs))
        assert error <= max(2 * peer, torch.finfo(torch.float32).eps / 2)
