"""The pooling kernels against torch, bit by bit: a maximum rounds nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import runs_kernel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from cnnkernels import explain, functional

pytestmark = pytest.mark.usefixtures("isa", "poisoned")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
FORMATS = [torch.contiguous_format, torch.channels_last]

# (size, arguments)
SHAPES: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    *[((1, 2, 5, width), {"kernel_size": 2}) for width in (*range(2, 20), 33, 34, 35, 64)],
    *[
        ((2, channels, 6, 7), {"kernel_size": 3, "stride": 2, "padding": 1})
        for channels in (*range(1, 10), 15, 16, 17, 35)
    ],
    # Rows that windows share, without and with a border on either side.
    *[
        ((1, 2, height, width), {"kernel_size": 3, "stride": 2, "padding": padding})
        for height, width in [(4, 6), (7, 8), (5, 31), (6, 32), (9, 34), (8, 70), (700, 66)]
        for padding in [0, 1, (0, 1), (1, 0)]
    ],
    ((2, 3, 300, 41), {"kernel_size": 2}),  # several bands
    ((2, 3, 11, 13), {"kernel_size": 3, "stride": 1, "padding": 1}),
    ((2, 3, 11, 13), {"kernel_size": (2, 3), "stride": (3, 2), "padding": (1, 0)}),
    ((2, 3, 11, 13), {"kernel_size": 3, "stride": 2, "ceil_mode": True}),
    ((2, 3, 12, 14), {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True}),
    ((2, 3, 21, 23), {"kernel_size": 3, "dilation": (2, 3)}),
    ((2, 3, 21, 23), {"kernel_size": 3, "dilation": 2, "stride": 3, "padding": 1}),
    ((1, 2, 40, 41), {"kernel_size": 17, "stride": 3}),  # more than 256 taps
    ((2, 3, 20, 20), {"kernel_size": 5, "stride": 1, "padding": 2}),
    # In two passes: rows first.
    ((2, 3, 9, 70), {"kernel_size": 4, "stride": 1}),
    ((2, 70, 9, 11), {"kernel_size": (5, 4), "stride": (1, 2), "padding": (2, 1)}),
    ((2, 3, 23, 25), {"kernel_size": 4, "stride": 1, "dilation": (2, 3), "padding": 2}),
    ((1, 66, 12, 13), {"kernel_size": 6, "stride": 2, "padding": 3, "ceil_mode": True}),
    # Taller than any band.
    ((1, 2, 90, 5), {"kernel_size": (3, 2), "stride": 1, "dilation": (30, 1)}),
    ((1, 2, 200, 70), {"kernel_size": 3, "stride": (2, 3), "dilation": (60, 2), "padding": 1}),
    # More windows over an element than a gather compares.
    ((1, 3, 20, 21), {"kernel_size": 9, "stride": 1, "padding": 4}),
    ((1, 130, 5, 70), {"kernel_size": 3, "stride": 1, "padding": 1}),
    ((1, 2, 300, 9), {"kernel_size": 3}),
    ((3, 9, 10), {"kernel_size": 2}),
    ((0, 3, 9, 10), {"kernel_size": 2}),
]


def values(size: tuple[int, ...], dtype: torch.dtype, kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, generator=generator)
    if kind == "ties":
        x = x.round()
    elif kind == "nan":
        x[torch.rand(size, generator=generator) < 0.2] = float("nan")
    elif kind == "-inf":
        x[torch.rand(size, generator=generator) < 0.7] = -float("inf")
    return x.to(dtype)


def compare(x: torch.Tensor, options: dict[str, Any]) -> None:
    mine, torchs = x.clone().requires_grad_(), x.clone().requires_grad_()
    with runs_kernel(*(["max_pool2d", "max_pool2d_backward"] if x.numel() else [])):
        ours, our_indices = functional.max_pool2d(mine, return_indices=True, **options)
        theirs, indices = F.max_pool2d(torchs, return_indices=True, **options)
        what = f"{tuple(x.shape)} {x.dtype} {options}"
        assert ours.stride() == theirs.stride(), what
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True, msg=what)
        assert torch.equal(our_indices, indices), what
        with torch.no_grad():
            plain = functional.max_pool2d(x, **options)
        torch.testing.assert_close(plain, theirs, rtol=0, atol=0, equal_nan=True, msg=what)
        grad = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)
        ours.backward(grad)
    # Overlapping windows add up: float64 is the truth, rounded once.
    reference = x.double().requires_grad_()
    truth = torch.zeros(0)
    if x.numel():
        F.max_pool2d(reference, **options).backward(grad.double())
        assert reference.grad is not None
        truth = reference.grad
        assert mine.grad is not None
        epsilon = {torch.float64: 1e-15, torch.float32: 1e-6}.get(
            x.dtype, 4e-3 if x.dtype == torch.bfloat16 else 1e-3
        )
        torch.testing.assert_close(
            mine.grad.double(), truth, rtol=epsilon, atol=epsilon, msg=f"{what}: gradient"
        )


@pytest.mark.parametrize("kind", ["normal", "ties", "nan", "-inf"])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shapes(dtype: torch.dtype, memory_format: torch.memory_format, kind: str) -> None:
    for size, options in SHAPES:
        x = values(size, dtype, kind)
        if x.dim() == 4:
            x = x.contiguous(memory_format=memory_format)
        compare(x, options)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_window(data: st.DataObject) -> None:
    pair = st.tuples(st.integers(1, 4), st.integers(1, 4))
    kernel, stride, dilation = (data.draw(pair, n) for n in ("kernel", "stride", "dilation"))
    extent = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    padding = tuple(data.draw(st.integers(0, k // 2), "padding") for k in kernel)
    height, width = (
        data.draw(st.integers(max(1, e - 2 * p), e + 20), "size")
        for e, p in zip(extent, padding, strict=True)
    )
    size = (data.draw(st.integers(1, 2)), data.draw(st.integers(1, 10)), height, width)
    x = values(
        size, data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(["ties", "nan"]))
    )
    x = x.contiguous(memory_format=data.draw(st.sampled_from(FORMATS)))
    options = {
        "kernel_size": kernel,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "ceil_mode": data.draw(st.booleans()),
    }
    try:
        expected = F.max_pool2d(x, **options)
    except RuntimeError:
        with pytest.raises(RuntimeError):
            functional.max_pool2d(x, **options)
        return
    ours = functional.max_pool2d(x, **options)
    torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True)
    assert ours.stride() == expected.stride()


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("window", [{"kernel_size": 2}, {"kernel_size": 3, "stride": 2}])
def test_threads(window: dict[str, Any], threads: int, memory_format: torch.memory_format) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x = values((5, 20, 50, 52), torch.float32, "ties").contiguous(memory_format=memory_format)
        compare(x, {**window, "padding": 1})
        compare(x, window)
    finally:
        torch.set_num_threads(before)


def test_argmax_is_one_byte_where_the_window_allows() -> None:
    x = torch.randn(1, 1, 40, 40)
    assert torch.ops.cnnkernels.max_pool2d_argmax(x, [15, 17])[1].dtype == torch.uint8
    assert torch.ops.cnnkernels.max_pool2d_argmax(x, [16, 16])[1].dtype == torch.int32


def test_foreign_argmax_is_refused_and_nothing_is_touched() -> None:
    grad = torch.ones(1, 1, 2, 2)
    argmax = torch.full((1, 1, 2, 2), 9, dtype=torch.uint8)
    with pytest.raises(ValueError, match="argmax holds 9"):
        torch.ops.cnnkernels.max_pool2d_backward(grad, argmax, [1, 1, 4, 4], [2, 2])
    with pytest.raises(RuntimeError, match="argmax must be uint8"):
        torch.ops.cnnkernels.max_pool2d_backward(grad, argmax.long(), [1, 1, 4, 4], [2, 2])


@pytest.mark.parametrize("tap", [5, 255])
@pytest.mark.parametrize("at", [(0, 0, 0), (1, 9, 33), (2, 4, 16)])
def test_argmax_of_no_window_is_refused(at: tuple[int, int, int], tap: int) -> None:
    grad, argmax = torch.ones(1, 3, 10, 34), torch.zeros(1, 3, 10, 34, dtype=torch.uint8)
    argmax[(0, *at)] = tap
    with pytest.raises(ValueError, match=rf"argmax holds {tap} for window \({at[1]}, {at[2]}\)"):
        torch.ops.cnnkernels.max_pool2d_backward(grad, argmax, [1, 3, 21, 69], [2, 2])


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("kernel", [3, 9])
def test_argmax_outside_of_the_image_is_refused(
    kernel: int, memory_format: torch.memory_format
) -> None:
    """A tap that the window has, but over the border: gathered by no element, and yet no winner."""
    x = torch.randn(2, 70, 12, 13).contiguous(memory_format=memory_format)
    window = ([kernel] * 2, [1, 1], [kernel // 2] * 2)
    output, argmax = torch.ops.cnnkernels.max_pool2d_argmax(x, *window)
    grad = torch.ones_like(output)
    torch.ops.cnnkernels.max_pool2d_backward(grad, argmax, x.shape, *window)
    corners = {(0, 6): 0, (11, 6): kernel**2 - 1, (6, 0): 0, (6, 12): kernel - 1}
    for (y, column), tap in corners.items():
        for channel in (0, 40, 69):
            foreign = argmax.clone(memory_format=torch.preserve_format)
            foreign[1, channel, y, column] = tap
            with pytest.raises(ValueError, match=rf"argmax holds {tap} for window"):
                torch.ops.cnnkernels.max_pool2d_backward(grad, foreign, x.shape, *window)


def test_explain_names_the_passes() -> None:
    x = torch.randn(1, 8, 20, 20)

    def passes(x: torch.Tensor, *window: int) -> tuple[str, str]:
        plan = explain(functional.max_pool2d, x, *window)
        return plan["algorithm"], plan["backward"]

    assert passes(x, 2) == ("quads", "quads")
    assert passes(x.bfloat16(), 2) == ("quads", "quads")
    assert passes(x, 3, 2, 1) == ("shared rows", "gather")
    assert passes(x, 3, 1)[0] == "rows"
    assert passes(x, 3, 1, 1)[0] == passes(x.bfloat16(), 3, 1)[0] == "packed rows"
    assert passes(x, 5, 1, 2) == ("separable", passes(x, 5, 1)[1])
    assert passes(x.contiguous(memory_format=torch.channels_last), 2)[0] == "channel vectors"
    assert passes(x, 13, 1, 6) == ("separable", "scatter")
    one_channel = x[:, :1].contiguous(memory_format=torch.channels_last)
    assert passes(one_channel, 2) == ("quads", "quads")


def test_gather_is_the_transpose_of_the_backward() -> None:
    x = torch.randn(2, 3, 9, 10, dtype=torch.float64)
    window = ([3, 3], [2, 2], [1, 1])
    output, argmax = torch.ops.cnnkernels.max_pool2d_argmax(x, *window)
    assert torch.equal(torch.ops.cnnkernels.max_pool2d_gather(x, argmax, *window), output)
    u, v = torch.randn_like(output), torch.randn_like(x)
    scattered = torch.ops.cnnkernels.max_pool2d_backward(u, argmax, x.shape, *window)
    gathered = torch.ops.cnnkernels.max_pool2d_gather(v, argmax, *window)
    torch.testing.assert_close((scattered * v).sum(), (u * gathered).sum())
