"""The CUDA pooling kernels: maxima bit by bit, gradients against float64.

Indices are compared with torch's on the CPU, which names the first winner everywhere; torch's own
CUDA kernels are what outputs, strides and errors are measured by.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from accuracy import assert_close_to_truth, in_both_formats
from conftest import runs_kernel
from cuda_support import assert_returns_at_once, busy_side_stream, needs_cuda
from hypothesis import given, settings
from hypothesis import strategies as st
from test_max_pool2d import DTYPES, FORMATS, SHAPES, values
from torch.nn import functional as F

from cnnkernels import functional

pytestmark = [needs_cuda, pytest.mark.usefixtures("poisoned")]

KERNELS = ("max_pool2d", "max_pool2d_backward")
# Rows that are read in whole vectors, and their neighbours that are not.
EVEN_SHAPES: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    ((2, 3, height, width), options)
    for options in ({"kernel_size": 2}, {"kernel_size": 3, "stride": 2, "padding": 1})
    for height, width in [(4, 4), (6, 8), (8, 16), (7, 32), (16, 62), (5, 64), (12, 128), (34, 130)]
]
MANY_CHANNELS: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    ((2, channels, 6, 8), options)
    for options in ({"kernel_size": 2}, {"kernel_size": 3, "stride": 2, "padding": 1})
    for channels in (8, 12, 32, 64, 66, 256, 300)
]


def on_gpu(x: torch.Tensor) -> torch.Tensor:
    """The tensor on the GPU with the strides that it has."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda").copy_(x)


def assert_strides(ours: torch.Tensor, theirs: torch.Tensor, what: str) -> None:
    if in_both_formats(theirs):
        assert in_both_formats(ours), what
    else:
        assert ours.stride() == theirs.stride(), what


def compare(x: torch.Tensor, options: dict[str, Any]) -> None:
    """Compare everything that a pooling of x returns, which lies on the GPU."""
    what = f"{tuple(x.shape)} {x.stride()} {x.dtype} {options}"
    on_cpu = x.cpu()
    # As on the CPU, what has no elements is torch's.
    with runs_kernel(*(KERNELS if x.numel() else ())):
        mine = x.detach().requires_grad_()
        ours, our_indices = functional.max_pool2d(mine, return_indices=True, **options)
        with torch.no_grad():
            plain = functional.max_pool2d(x, **options)
        grad = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)
        (our_gradient,) = torch.autograd.grad(ours, mine, grad.cuda())
    torchs = x.detach().requires_grad_()
    theirs = F.max_pool2d(torchs, **options)
    values, indices = F.max_pool2d(on_cpu, return_indices=True, **options)
    exact = {"rtol": 0, "atol": 0, "equal_nan": True, "msg": what}
    torch.testing.assert_close(ours, theirs, **exact)
    torch.testing.assert_close(ours.cpu(), values, **exact)
    torch.testing.assert_close(plain, theirs, **exact)
    assert torch.equal(our_indices.cpu(), indices), what
    assert_strides(ours, theirs, what)
    if not x.numel():
        return
    (their_gradient,) = torch.autograd.grad(theirs, torchs, grad.cuda())
    # Overlapping windows add up: float64 is the truth.
    truth, magnitude = (
        torch.autograd.grad(F.max_pool2d(leaf, **options), leaf, of_output.double())[0]
        for leaf, of_output in [
            (on_cpu.double().requires_grad_(), grad),
            (on_cpu.double().requires_grad_(), grad.abs()),
        ]
    )
    assert_close_to_truth(
        our_gradient.cpu(), their_gradient.cpu(), truth, magnitude, f"{what}: gradient"
    )


@pytest.mark.parametrize("kind", ["normal", "ties", "nan", "-inf"])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shapes(dtype: torch.dtype, memory_format: torch.memory_format, kind: str) -> None:
    for size, options in [*SHAPES, *EVEN_SHAPES, *MANY_CHANNELS]:
        x = values(size, dtype, kind)
        if x.dim() == 4:
            x = x.contiguous(memory_format=memory_format)
        compare(on_gpu(x), options)


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
    ).contiguous(memory_format=data.draw(st.sampled_from(FORMATS)))
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
            functional.max_pool2d(on_gpu(x), **options)
        return
    ours = functional.max_pool2d(on_gpu(x), **options)
    torch.testing.assert_close(ours.cpu(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [1, 2, 3, 4, 8])
def test_addresses_that_are_not_those_of_vectors(offset: int, dtype: torch.dtype) -> None:
    for size, options in EVEN_SHAPES[::3]:
        x = values(size, dtype, "normal")
        storage = torch.zeros(x.numel() + offset, dtype=dtype, device="cuda")
        view = storage[offset:].view(size)
        compare(view.copy_(x), options)


@pytest.mark.parametrize("options", [{"kernel_size": 2}, {"kernel_size": 3, "padding": 1}], ids=str)
def test_other_strides(options: dict[str, Any]) -> None:
    x = values((2, 3, 12, 24), torch.float32, "ties").cuda()
    for view in (
        x.transpose(2, 3),
        x[..., ::2],
        x[:, :, 1:, 3:],
        x[:, :1].expand(-1, 5, -1, -1),
        x[0].permute(2, 0, 1),
    ):
        theirs = F.max_pool2d(view, **options)
        with runs_kernel("max_pool2d"):
            ours = functional.max_pool2d(view, **options)
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_gradients_of_other_strides(memory_format: torch.memory_format) -> None:
    x = values((2, 4, 9, 10), torch.float32, "normal").cuda()
    grads = torch.randn(2, 4, 4, 5, device="cuda")
    for grad in (
        grads.contiguous(memory_format=torch.channels_last),
        grads.transpose(2, 3).contiguous().transpose(2, 3),
        torch.ones(1, device="cuda").expand(2, 4, 4, 5),
    ):
        results = []
        for of_output in (grad, grad.contiguous()):
            leaf = x.contiguous(memory_format=memory_format).requires_grad_()
            functional.max_pool2d(leaf, 2).backward(of_output)
            results.append(leaf.grad)
        assert torch.equal(*results)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((8, 64, 56, 56), {"kernel_size": 3, "stride": 2, "padding": 1}),
        ((4, 33, 41, 43), {"kernel_size": 5, "stride": 1, "padding": 2}),
        ((4, 32, 64, 64), {"kernel_size": 2}),
    ],
)
def test_repeats_are_equal_bit_by_bit(
    size: tuple[int, ...], options: dict[str, Any], memory_format: torch.memory_format
) -> None:
    x = values(size, torch.float32, "normal").contiguous(memory_format=memory_format)
    results = []
    for _ in range(5):
        leaf = on_gpu(x).requires_grad_()
        output = functional.max_pool2d(leaf, **options)
        grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).cuda()
        output.backward(grad)
        results.append((output.detach(), leaf.grad))
    for output, gradient in results[1:]:
        assert torch.equal(output, results[0][0])
        assert torch.equal(gradient, results[0][1])


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(
    ("size", "kernel_size"),
    [((70_000, 1, 16, 16), 2), ((70_000, 1, 16, 16), 3), ((2, 70_001, 4, 4), 2)],
)
def test_more_planes_than_a_grid_has_rows(
    size: tuple[int, ...], kernel_size: int, memory_format: torch.memory_format
) -> None:
    x = values(size, torch.float32, "normal").contiguous(memory_format=memory_format)
    results = []
    for pool, leaf in ((functional.max_pool2d, on_gpu(x)), (F.max_pool2d, x)):
        output = pool(leaf.requires_grad_(), kernel_size)
        output.backward(torch.ones_like(output))
        results.append((output.detach().cpu(), leaf.grad.cpu()))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_more_elements_than_32_bits_count(memory_format: torch.memory_format) -> None:
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("it takes 40 GiB of memory of the GPU")
    size = (3, 2, 20_000, 20_000)
    x = torch.empty(size, dtype=torch.float16, device="cuda", memory_format=memory_format)
    for image in x:
        image.normal_()
    assert x.numel() > 2**31
    leaf = x.requires_grad_()
    with runs_kernel(*KERNELS):
        output = functional.max_pool2d(leaf, 2)
        grad = torch.empty_like(output)
        for image in grad:
            image.normal_()
        (gradient,) = torch.autograd.grad(output, leaf, grad)
    for image in range(size[0]):
        for channel in range(size[1]):
            plane = x[image, channel].detach().clone()[None].requires_grad_()
            expected = F.max_pool2d(plane, 2)
            assert torch.equal(output[image, channel], expected[0])
            expected.backward(grad[image, channel][None].contiguous())
            assert torch.equal(gradient[image, channel], plane.grad[0])
            del plane, expected


def test_derivatives() -> None:
    x = torch.randn(2, 3, 7, 8, dtype=torch.float64, device="cuda", requires_grad=True)
    for options in ({"kernel_size": 2}, {"kernel_size": 3, "stride": 2, "padding": 1}):

        def pool(x: torch.Tensor, options: dict[str, Any] = options) -> torch.Tensor:
            return functional.max_pool2d(x, **options)

        # Deterministic to the last bit: nothing is added in an order of chance.
        torch.autograd.gradcheck(pool, x, nondet_tol=0.0)
        torch.autograd.gradgradcheck(pool, x, nondet_tol=0.0)
        ours, theirs = (
            torch.func.vmap(torch.func.grad(lambda x, f=f: f(x).sin().sum()))(x.detach())
            for f in (
                functools.partial(functional.max_pool2d, **options),
                functools.partial(F.max_pool2d, **options),
            )
        )
        torch.testing.assert_close(ours, theirs)


def test_an_argmax_of_no_window_moves_no_gradient() -> None:
    """The device cannot raise as the CPU does: it leaves such gradients out."""
    x = torch.randn(1, 3, 8, 8, device="cuda")
    _, argmax = torch.ops.cnnkernels.max_pool2d_argmax(x, [2, 2])
    grad = torch.ones(1, 3, 4, 4, device="cuda")
    foreign = torch.full_like(argmax, 9)
    gradient = torch.ops.cnnkernels.max_pool2d_backward(grad, foreign, x.shape, [2, 2])
    assert torch.equal(gradient, torch.zeros_like(x))


def test_arguments_that_do_not_fit_are_refused_as_on_the_cpu() -> None:
    for options in ({"kernel_size": 0}, {"kernel_size": 2, "padding": 2}, {"kernel_size": 9}):
        errors = []
        for device in ("cpu", "cuda"):
            with pytest.raises((RuntimeError, ValueError)) as error:
                functional.max_pool2d(torch.ones(1, 1, 4, 4, device=device), **options)
            errors.append((error.type, str(error.value)))
        assert errors[0] == errors[1]


@pytest.mark.parametrize("memory_format", FORMATS)
def test_nothing_waits_for_the_device(memory_format: torch.memory_format) -> None:
    x = torch.randn(4, 8, 32, 32, device="cuda").contiguous(memory_format=memory_format)
    x.requires_grad_()
    grad = torch.randn(4, 8, 16, 16, device="cuda")

    def work() -> None:
        output = functional.max_pool2d(x, 2)
        torch.autograd.grad(output, x, grad)

    assert_returns_at_once(work)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_the_current_stream_is_used(memory_format: torch.memory_format) -> None:
    x = torch.randn(4, 8, 32, 32, device="cuda").contiguous(memory_format=memory_format)
    grad = torch.randn(4, 8, 16, 16, device="cuda")
    results = []
    for pool in (functional.max_pool2d, F.max_pool2d):
        late = torch.zeros_like(x)
        late_grad = torch.zeros_like(grad)
        torch.cuda.synchronize()
        with busy_side_stream():
            late.copy_(x)
            leaf = late.requires_grad_()
            output = pool(leaf, 2)
            late_grad.copy_(grad)
            (gradient,) = torch.autograd.grad(output, leaf, late_grad)
        results.append((output.detach(), gradient))
    torch.cuda.synchronize()
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU only")
def test_the_device_of_the_input_is_used() -> None:
    x = torch.randn(2, 3, 8, 8, device="cuda:1", requires_grad=True)
    output = functional.max_pool2d(x, 2)
    output.backward(torch.ones_like(output))
    assert output.device == x.grad.device == x.device
    assert torch.equal(output.detach().cpu(), F.max_pool2d(x.detach().cpu(), 2))


@pytest.mark.sanitizer
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((2, 3, 8, 16), {"kernel_size": 2}),
        ((1, 5, 9, 7), {"kernel_size": 3, "stride": 2, "padding": 1}),
        ((1, 8, 10, 16), {"kernel_size": 3, "stride": 2, "padding": 1}),
        ((1, 3, 9, 11), {"kernel_size": (2, 3), "dilation": 2, "ceil_mode": True}),
        ((1, 2, 20, 19), {"kernel_size": 17}),
    ],
)
def test_tiny_cases(
    size: tuple[int, ...],
    options: dict[str, Any],
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> None:
    """Little of torch runs on the GPU here: what compute-sanitizer finds is ours."""
    x = values(size, dtype, "ties").contiguous(memory_format=memory_format)
    leaf = x.clone().requires_grad_()
    expected, expected_indices = F.max_pool2d(leaf, return_indices=True, **options)
    grad = torch.arange(expected.numel()).remainder(7).reshape(expected.shape).to(dtype)
    expected.backward(grad)
    gpu_leaf = x.cuda().requires_grad_()
    with runs_kernel(*KERNELS):
        output, indices = functional.max_pool2d(gpu_leaf, return_indices=True, **options)
        (gradient,) = torch.autograd.grad(output, gpu_leaf, grad.cuda())
    assert torch.equal(output.detach().cpu(), expected.detach())
    assert torch.equal(indices.cpu(), expected_indices)
    # Small whole numbers: no sum is rounded.
    assert torch.equal(gradient.cpu(), leaf.grad)
