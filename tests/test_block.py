"""The fused block against its three torch calls, with float64 as the judge."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accuracy import compare, onednn, reads_only_padding
from conftest import runs_kernel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from cnnkernels import explain, functional

pytestmark = pytest.mark.usefixtures("isa", "poisoned")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
FORMATS = [torch.contiguous_format, torch.channels_last]

STEM_POOL = {"pool_kernel_size": 3, "pool_stride": 2, "pool_padding": 1}
WIDE_POOL = {"pool_kernel_size": (2, 3), "pool_stride": (3, 2), "pool_padding": (1, 0)}

# (batch, in_channels, height, width, out_channels, kernel, arguments)
SHAPES: list[tuple[int, int, int, int, int, tuple[int, int], dict[str, Any]]] = [
    (1, 1, 32, 32, 6, (3, 3), {}),
    (2, 6, 15, 15, 16, (3, 3), {}),
    *[(1, 2, 6, width, 5, (3, 2), {}) for width in (*range(3, 20), 33, 34, 35, 66)],
    *[(2, 3, 7, 8, channels, (3, 3), {"padding": 1}) for channels in (*range(1, 9), 13)],
    (2, 3, 17, 19, 5, (3, 3), {"stride": 2, "padding": 1}),
    (2, 3, 17, 19, 5, (3, 3), {"stride": 3}),
    (2, 3, 17, 19, 5, (3, 3), {"dilation": 2}),
    (2, 3, 17, 19, 5, (3, 3), {"dilation": (1, 3), "stride": (2, 3), "padding": 2}),
    (2, 6, 9, 12, 8, (3, 3), {"groups": 2, "padding": 1}),
    (2, 6, 9, 12, 6, (3, 3), {"groups": 6}),
    (1, 20, 8, 9, 4, (3, 3), {}),
    (2, 3, 30, 32, 8, (7, 7), {"stride": 2, "padding": 3} | STEM_POOL),
    # In stages, with a dense backward.
    (3, 40, 12, 14, 48, (3, 3), {"padding": 1}),
    (2, 36, 9, 11, 34, (3, 3), {"padding": 1} | STEM_POOL),
    # More windows than are summed at once, kernels of other widths and strides.
    (3, 6, 40, 42, 5, (3, 3), {"padding": 1}),
    (2, 5, 15, 17, 7, (3, 2), {"stride": (1, 2)}),
    (2, 2, 9, 40, 3, (3, 5), {"padding": (1, 2)}),
    # Many rows of windows for few weights, and kernels of more taps than a tile.
    (9, 1, 40, 41, 3, (3, 3), {}),
    (2, 1, 40, 41, 3, (5, 5), {"padding": 2}),
    (2, 3, 12, 13, 4, (3, 3), {"pool_kernel_size": 3}),
    (2, 3, 12, 13, 4, (3, 3), {"pool_kernel_size": 3, "pool_stride": 1, "pool_padding": 1}),
    (2, 3, 12, 13, 4, (3, 3), {"pool_ceil_mode": True, "padding": (0, 1)}),
    (2, 3, 13, 13, 4, (3, 3), WIDE_POOL),
    (2, 3, 20, 21, 4, (3, 3), {"pool_kernel_size": 3, "pool_dilation": 2}),
    (1, 2, 24, 25, 3, (3, 3), {"pool_kernel_size": 18}),
]  # fmt: skip


def torch_block(input: Tensor, weight: Tensor, bias: Tensor | None, **options: Any) -> Tensor:
    pool = {n.removeprefix("pool_"): v for n, v in options.items() if n.startswith("pool_")}
    conv = {n: v for n, v in options.items() if not n.startswith("pool_")}
    return F.max_pool2d(F.relu(F.conv2d(input, weight, bias, **conv)), **{"kernel_size": 2, **pool})


def integers(
    shape: tuple[Any, ...], dtype: torch.dtype, memory_format: torch.memory_format
) -> list[Tensor | None]:
    """Arguments whose convolution is exact in every dtype, so that the winners are torch's."""
    batch, channels, height, width, out, kernel, options = shape
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randint(-2, 3, size, generator=generator).to(dtype)

    input = draw(batch, channels, height, width).contiguous(memory_format=memory_format)
    weight = draw(out, channels // options.get("groups", 1), *kernel)
    return [input, weight, draw(out)]


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shapes(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    """Exact values with many ties: the first of equal winners must get the gradient."""
    for number, shape in enumerate(SHAPES):
        arguments = integers(shape, dtype, memory_format)
        if number % 3 == 0:
            arguments[2] = None
        with runs_kernel("conv2d_relu_max_pool2d", "conv2d_relu_max_pool2d_backward"):
            compare(
                lambda x, w, b=None, o=shape[-1]: functional.conv2d_relu_max_pool2d(x, w, b, **o),
                lambda x, w, b=None, o=shape[-1]: torch_block(x, w, b, **o),
                arguments,
                f"{shape} {dtype} {memory_format}",
            )


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
    groups = data.draw(st.integers(1, 2), "groups")
    kernel, stride, dilation, pool_kernel, pool_stride = (
        data.draw(pair, name) for name in ("kernel", "stride", "dilation", "pool", "pool stride")
    )
    padding = data.draw(st.tuples(st.integers(0, 2), st.integers(0, 2)), "padding")
    pool_padding = tuple(data.draw(st.integers(0, k // 2)) for k in pool_kernel)
    sizes = []
    for i in range(2):
        conv_least = max(1, pool_kernel[i] - 2 * pool_padding[i])
        reach = (conv_least - 1) * stride[i] + dilation[i] * (kernel[i] - 1) + 1
        sizes.append(data.draw(st.integers(max(1, reach - 2 * padding[i]), reach + 16), "size"))
    options = {
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "pool_kernel_size": pool_kernel,
        "pool_stride": pool_stride,
        "pool_padding": pool_padding,
        "pool_ceil_mode": data.draw(st.booleans(), "ceil"),
    }
    shape = (
        data.draw(st.integers(1, 3)),
        groups * data.draw(st.integers(1, 4)),
        *sizes,
        groups * data.draw(st.integers(1, 7)),
        kernel,
        options,
    )
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    arguments = integers(shape, dtype, data.draw(st.sampled_from(FORMATS), "format"))
    works = not any(
        reads_only_padding(size, kernel[i], stride[i], padding[i], dilation[i])
        for i, size in enumerate(sizes)
    )
    with onednn(works):
        compare(
            lambda x, w, b: functional.conv2d_relu_max_pool2d(x, w, b, **options),
            lambda x, w, b: torch_block(x, w, b, **options),
            arguments,
            str(shape),
        )


@pytest.mark.parametrize("memory_format", FORMATS)
def test_what_a_device_may_leave_to_torch(memory_format: torch.memory_format) -> None:
    """Strides and kernels beyond those of CUDA's kernels."""
    for shape in [
        (1, 2, 21, 23, 3, (3, 3), {"stride": 5, "padding": 1}),
        (1, 1, 20, 21, 2, (17, 17), {}),
    ]:
        arguments = integers(shape, torch.float32, memory_format)
        compare(
            lambda x, w, b, o=shape[-1]: functional.conv2d_relu_max_pool2d(x, w, b, **o),
            lambda x, w, b, o=shape[-1]: torch_block(x, w, b, **o),
            arguments,
            str(shape),
        )


def blocks() -> dict[str, tuple[Tensor, Tensor]]:
    """An input and weights for each way through the backward."""
    return {
        "windows": (torch.randn(2, 1, 32, 32), torch.randn(6, 1, 3, 3)),
        "winners": (torch.randn(2, 4, 15, 15), torch.randn(16, 4, 5, 5)),
        "neighbourhoods": (torch.randn(2, 6, 15, 15), torch.randn(16, 6, 3, 3)),
        "dense": (torch.randn(2, 32, 14, 14), torch.randn(32, 32, 3, 3)),
    }


@pytest.mark.parametrize("backward", blocks())
def test_explain_names_the_backward(backward: str, isa: str) -> None:
    x, weight = blocks()[backward]
    if isa == "baseline" and backward == "neighbourhoods":
        backward = "winners"  # which do not fit its registers
    assert explain(functional.conv2d_relu_max_pool2d, x, weight)["backward"] == backward


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("backward", blocks())
def test_foreign_argmax_is_refused(backward: str, memory_format: torch.memory_format) -> None:
    x, weight = (t.contiguous(memory_format=memory_format) for t in blocks()[backward])
    arguments = ([1, 1], [0, 0], [1, 1], 1, [2, 2], [2, 2], [0, 0], [1, 1], False)
    output, argmax = torch.ops.cnnkernels.conv2d_relu_max_pool2d_argmax(x, weight, None, *arguments)
    argmax[1, 3, -1, -1] = 5
    with pytest.raises(ValueError, match="argmax holds 5 for window"):
        torch.ops.cnnkernels.conv2d_relu_max_pool2d_backward(
            output, x, weight, argmax, *arguments, [False, True, True]
        )


@pytest.mark.parametrize("backward", blocks())
def test_a_gradient_alone_is_the_one_of_all_three(backward: str) -> None:
    x, weight = blocks()[backward]
    arguments = ([1, 1], [0, 0], [1, 1], 1, [2, 2], [2, 2], [0, 0], [1, 1], False)
    output, argmax = torch.ops.cnnkernels.conv2d_relu_max_pool2d_argmax(x, weight, None, *arguments)

    def gradients(*wanted: bool) -> tuple[Tensor, ...]:
        return torch.ops.cnnkernels.conv2d_relu_max_pool2d_backward(
            output, x, weight, argmax, *arguments, wanted
        )

    whole = gradients(True, True, True)
    for i in range(3):
        wanted = [j == i for j in range(3)]
        assert torch.equal(gradients(*wanted)[i], whole[i])


def test_more_windows_than_totals_take_at_a_time(isa: str) -> None:
    """As many channels as fill the registers of each tier."""
    ways = set()
    for channels in (3, 6, 12):
        shape = (1, channels, 190, 190, 3, (3, 3), {})
        arguments = integers(shape, torch.float32, torch.contiguous_format)
        ways.add(explain(functional.conv2d_relu_max_pool2d, *arguments)["backward"])
        compare(functional.conv2d_relu_max_pool2d, torch_block, arguments, str(shape))
    assert "neighbourhoods" in ways


def test_rounded_values_are_as_close_as_torch() -> None:
    for shape in SHAPES:
        batch, channels, height, width, out, kernel, options = shape
        generator = torch.Generator().manual_seed(3)
        input = torch.randn(batch, channels, height, width, generator=generator)
        weight = torch.randn(
            out, channels // options.get("groups", 1), *kernel, generator=generator
        )
        ours = functional.conv2d_relu_max_pool2d(input, weight, None, **options)
        theirs = torch_block(input, weight, None, **options)
        truth = torch_block(input.double(), weight.double(), None, **options)
        roundoff = 2 * 2.0**-24 * max(1.0, truth.norm().item())
        assert (ours - truth).norm() <= max(2 * (theirs - truth).norm().item(), roundoff), shape


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("memory_format", FORMATS)
def test_threads(threads: int, memory_format: torch.memory_format) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for options in ({}, {"pool_kernel_size": 3, "pool_stride": 2}):
            shape = (7, 3, 40, 42, 14, (3, 3), options)
            arguments = integers(shape, torch.float32, memory_format)
            compare(
                lambda x, w, b, o=options: functional.conv2d_relu_max_pool2d(x, w, b, **o),
                lambda x, w, b, o=options: torch_block(x, w, b, **o),
                arguments,
                f"{threads} threads",
            )
            leaves = [t.clone().requires_grad_() for t in arguments if t is not None]
            results = []
            for _ in range(2):
                output = functional.conv2d_relu_max_pool2d(*leaves, **options)
                results.append(torch.autograd.grad(output.square().sum(), leaves))
            assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    finally:
        torch.set_num_threads(before)


def test_nan_and_infinite_gradients_stay_where_torch_has_them() -> None:
    for width in range(6, 20):
        input, weight = torch.randn(1, 2, 8, width), torch.randn(3, 2, 3, 3)
        input[0, 0, 4, width - 1] = float("nan")
        ours = functional.conv2d_relu_max_pool2d(input, weight)
        theirs = torch_block(input, weight, None)
        assert torch.equal(ours.isnan(), theirs.isnan())
        input = torch.randn(1, 2, 8, width)
        x, y = input.clone().requires_grad_(), input.clone().requires_grad_()
        ours, theirs = functional.conv2d_relu_max_pool2d(x, weight), torch_block(y, weight, None)
        grad = torch.randn_like(theirs)
        grad[0, 1, 1, -1] = float("inf")
        ours.backward(grad)
        theirs.backward(grad)
        assert x.grad is not None
        assert y.grad is not None
        assert torch.equal(x.grad.isfinite(), y.grad.isfinite())


def test_gradient_of_a_zero_output_is_zero() -> None:
    input = torch.ones(1, 1, 4, 4, requires_grad=True)
    weight = -torch.ones(1, 1, 1, 1)
    output = functional.conv2d_relu_max_pool2d(input, weight)
    assert output.eq(0).all()
    output.backward(torch.ones_like(output))
    assert input.grad is not None
    assert input.grad.eq(0).all()


@pytest.mark.parametrize("module", [nn.Dropout(0.5, inplace=True), nn.Hardtanh(inplace=True)])
def test_the_output_may_be_changed_in_place(backend: str, module: nn.Module) -> None:
    image, weight = torch.randn(2, 1, 10, 10), torch.randn(3, 1, 3, 3, requires_grad=True)
    gradients = []
    for block in (functional.conv2d_relu_max_pool2d, torch_block):
        torch.manual_seed(1)
        output = module(block(image, weight, None))
        output += 1
        gradients.append(torch.autograd.grad(output.sum(), weight)[0])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("size", "pool"), [(32, 2), (31, 3)])
def test_16_bit_gradients_go_to_the_winners_of_the_three_operators(
    dtype: torch.dtype, size: int, pool: int
) -> None:
    # Sums of these products are exact in float, in whatever order an algorithm takes them, and are
    # rounded to 16 bits.
    image = (torch.randint(-127, 128, (8, 3, size, size)) / 64).to(dtype).requires_grad_()
    weight = (torch.randint(-127, 128, (8, 3, 3, 3)) / 256).to(dtype).requires_grad_()

    def three(image: Tensor, weight: Tensor) -> Tensor:
        return functional.max_pool2d(functional.conv2d(image, weight).relu(), pool)

    def block(image: Tensor, weight: Tensor) -> Tensor:
        return functional.conv2d_relu_max_pool2d(image, weight, pool_kernel_size=pool)

    for memory_format in (torch.contiguous_format, torch.channels_last):
        values, gradients = [], []
        for function in (three, block):
            output = function(image.contiguous(memory_format=memory_format), weight)
            values.append(output)
            gradients.append(torch.autograd.grad(output.float().sum(), (image, weight)))
        assert torch.equal(*values)
        for expected, actual in zip(*gradients, strict=True):
            difference = (expected.float() - actual.float()).norm() / expected.float().norm()
            assert difference < torch.finfo(dtype).eps


def test_infinite_gradients_reach_what_they_do_in_torch() -> None:
    """Whatever the way back: some lay out what they multiply with zeros around it."""
    for name, (x, weight) in blocks().items():
        image = x.clone().requires_grad_()
        output = functional.conv2d_relu_max_pool2d(image, weight)
        gradient = torch.ones_like(output)
        gradient[0, 1, 2, 2] = float("inf")
        (ours,) = torch.autograd.grad(output, image, gradient)
        (theirs,) = torch.autograd.grad(torch_block(image, weight, None), image, gradient)
        assert bool(theirs.isinf().any()) == bool(output[0, 1, 2, 2] > 0), name
        assert torch.isfinite(ours[1]).all(), name
        assert torch.equal(torch.isfinite(ours), torch.isfinite(theirs)), name


def test_sums_over_many_winners_are_as_close_as_torch(backend: str) -> None:
    """Gradients of one sign, where the rounding of a long sum shows; on a grid without ties."""
    image = torch.randint(0, 64, (1, 1, 224, 224)) / 64.0
    weight = torch.randint(1, 9, (4, 1, 3, 3)) / 8.0
    bias, gradient = torch.zeros(4), torch.rand(1, 4, 111, 111)

    def errors(block: Any, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (weight, bias)]
        output = block(image.to(dtype), *leaves)
        return list(torch.autograd.grad(output, leaves, gradient.to(dtype)))

    judge = errors(torch_block, torch.float64)
    for mine, theirs, exact in zip(
        errors(functional.conv2d_relu_max_pool2d), errors(torch_block), judge, strict=True
    ):
        ours, peer = ((t.double() - exact).norm() / exact.norm() for t in (mine, theirs))
        assert ours <= max(2 * peer, torch.finfo(torch.float32).eps / 4)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pool_stride", 0),
        ("pool_padding", 5),
        ("pool_kernel_size", 0),
        ("pool_dilation", 0),
        ("stride", 0),
        ("padding", -1),
    ],
)
def test_errors_name_the_argument_and_the_value(name: str, value: int) -> None:
    with pytest.raises(RuntimeError, match=rf"\b{name}\b.*{value}"):
        functional.conv2d_relu_max_pool2d(
            torch.ones(1, 1, 9, 9), torch.ones(1, 1, 3, 3), **{name: value}
        )
