"""Convolution with a ReLU as its results are stored: every algorithm, tier, dtype and layout.

The convolution itself is judged against float64 in its own tests. What a ReLU makes of it must
be the same numbers, bit for bit, but for the sign of zero; operands of few bits, whose sums are
exact, let the same gradients flow as in torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accuracy import compare
from conftest import runs_kernel
from hypothesis import given, settings
from hypothesis import strategies as st
from test_conv2d import DTYPES, SHAPES, case_arguments
from torch import Tensor
from torch.nn import functional as F

from cnnkernels import explain, functional, get_backend

pytestmark = pytest.mark.usefixtures("isa", "poisoned")

FORMATS = [torch.contiguous_format, torch.channels_last]

# (algorithm, (batch, in_channels, height, width, out_channels, kernel, arguments)); on a tier with
# matrix tiles another may be cheaper.
Shape = tuple[int, int, int, int, int, tuple[int, int], dict[str, Any]]
ALGORITHMS: dict[str, tuple[str, Shape]] = {
    "direct": ("direct", (2, 1, 12, 33, 5, (3, 3), {"padding": 1})),
    "short rows": ("direct", (2, 1, 9, 3, 3, (1, 2), {})),
    "outer product": ("outer product", (2, 16, 9, 9, 37, (3, 3), {"padding": 1})),
    "groups": ("outer product", (2, 32, 9, 9, 66, (3, 3), {"groups": 2})),
    "weights first": ("outer product", (2, 500, 5, 5, 610, (1, 1), {})),
    "patches": ("patches", (1, 17, 4, 3, 19, (3, 3), {"padding": 1, "stride": 2})),
    "classifier": ("patches", (3, 64, 5, 5, 41, (5, 5), {})),
    "winograd": ("winograd", (2, 33, 15, 17, 47, (3, 3), {"padding": 1})),
    "depthwise": ("depthwise", (2, 35, 11, 40, 35, (3, 3), {"padding": 1, "groups": 35})),
    "depthwise, strided": (
        "depthwise",
        (2, 35, 11, 13, 35, (3, 3), {"padding": 1, "groups": 35, "stride": 2}),
    ),
    "depthwise, long sums": ("depthwise", (2, 35, 11, 12, 35, (7, 7), {"groups": 35})),
    "depthwise, dilated": ("depthwise", (2, 35, 11, 12, 35, (3, 3), {"groups": 35, "dilation": 2})),
}
# Orders of going over matrix tiles, and others where there are none.
AMX: dict[str, Shape] = {
    "chunks": (8, 64, 20, 20, 70, (3, 3), {"padding": 1}),
    "pointwise": (8, 128, 15, 15, 200, (1, 1), {}),
    "few pixels": (4, 256, 7, 7, 250, (3, 3), {"padding": 1}),
    "row runs": (2, 3, 112, 112, 64, (7, 7), {"padding": 3, "stride": 2}),
}
CASES: dict[str, tuple[str, Shape]] = ALGORITHMS | {
    f"amx, {name}": ("amx", shape) for name, shape in AMX.items()
}


def assert_plan(name: str, arguments: list[Tensor | None], isa: str) -> None:
    """Assert that the algorithm runs that the case is for, where the tier has it."""
    algorithm, shape = CASES[name]
    few_lanes = isa == "baseline" or arguments[0].dtype == torch.float64
    if get_backend() != "native" or (algorithm == "amx") != (isa == "amx"):
        return
    if algorithm == "winograd" and few_lanes:
        return
    if algorithm == "amx" and arguments[0].dtype == torch.float64:
        return  # tiles have none
    assert explain(functional.conv2d_relu, *arguments, **shape[-1])["algorithm"] == algorithm


def both(arguments: list[Tensor | None], options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The operator's output, and the ReLU of the convolution's."""
    with runs_kernel("conv2d_relu"):
        ours = functional.conv2d_relu(*arguments, **options)
    return ours, F.relu(functional.conv2d(*arguments, **options))


@pytest.fixture(params=[1, 2])
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_every_algorithm(
    name: str, dtype: torch.dtype, memory_format: torch.memory_format, isa: str
) -> None:
    shape = CASES[name][1]
    for bias in (True, False):
        arguments = case_arguments(shape, dtype, memory_format, bias)
        assert_plan(name, arguments, isa)
        ours, expected = both(arguments, shape[-1])
        assert torch.equal(ours, expected)
        assert ours.stride() == expected.stride()
        # Neither nothing nor everything was clipped, and no zero is a negative one.
        assert 0.1 < (ours == 0).double().mean() < 0.9
        assert not ours.signbit().any()


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [2, 4, 8])
def test_few_channels_a_group(
    channels: int, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    for kernel in ((3, 3), (7, 7)):  # one chain of products, and several
        shape = (2, 40, 9, 12, 40, kernel, {"groups": 40 // channels, "padding": 1})
        ours, expected = both(case_arguments(shape, dtype, memory_format), shape[-1])
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_infinity_and_nan(
    name: str, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    """Minus infinity is clipped, after it has told that parts and tiles do not do; NaN passes."""
    shape = CASES[name][1]
    for value in (torch.inf, -torch.inf, torch.nan):
        for index in range(3):
            arguments = case_arguments(shape, dtype, memory_format)
            tensor = arguments[index]
            assert tensor is not None
            tensor.select(0, -1)[(tensor.dim() - 1) * (0,)] = value
            ours, expected = both(arguments, shape[-1])
            torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True)
            assert not ours.isneginf().any()
            if index == 1:
                continue  # a weight's products with the border's zeros are NaN, or left out
            double = [t.double() for t in arguments if t is not None]
            truth = F.relu(F.conv2d(*double, **shape[-1]))
            assert torch.equal(ours.isnan(), truth.isnan())
            assert torch.equal(ours.isposinf(), truth.isposinf())


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_winograd_tells_an_overflow_before_it_is_clipped(
    memory_format: torch.memory_format,
) -> None:
    """The sum of two pixels of a patch is infinite, times a negative weight minus infinity.

    The output channels fill their vectors: infinity times the zeros behind them would be NaN.
    """
    shape: Shape = (2, 33, 15, 17, 48, (3, 3), {})
    x, w, _ = case_arguments(shape, torch.float32, memory_format, bias=False)
    assert x is not None
    assert w is not None
    x.zero_()
    w.zero_()
    x[:, :, 0, :3] = torch.tensor([-1e38, 3e38, 1e38])
    w[:, :, 0] = torch.tensor([-1e-4, 2.5e-5, 2.5e-5])
    ours = functional.conv2d_relu(x, w)
    expected = F.relu(F.conv2d(x.double(), w.double()))
    assert (expected[:, :, 0, 0] > 0).all()
    torch.testing.assert_close(ours, expected.float())


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_negative_zero(name: str, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    """Products that underflow are negative zeros, at least as a float16; a ReLU's zero is none."""
    shape = ALGORITHMS[name][1]
    x, w, b = case_arguments(shape, dtype, memory_format)
    assert x is not None
    assert w is not None
    assert b is not None
    x.fill_(-1e-7)
    ours = functional.conv2d_relu(x, w.fill_(1e-7), b.fill_(-0.0), **shape[-1])
    assert torch.equal(ours, torch.zeros_like(ours))
    assert not ours.signbit().any()


def integers(
    shape: Shape, dtype: torch.dtype, memory_format: torch.memory_format, bias: bool = True
) -> list[Tensor | None]:
    """Arguments whose sums are exact, so that what is clipped is what torch clips."""
    batch, channels, height, width, out, kernel, options = shape
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randint(-2, 3, size, generator=generator).to(dtype)

    input = draw(batch, channels, height, width).contiguous(memory_format=memory_format)
    weight = draw(out, channels // options.get("groups", 1), *kernel)
    return [input, weight, draw(out) if bias else None]


def compare_with_torch(arguments: list[Tensor | None], options: dict[str, Any], what: str) -> None:
    with runs_kernel("conv2d_relu", "conv2d_backward"):
        compare(
            lambda x, w, b=None: functional.conv2d_relu(x, w, b, **options),
            lambda x, w, b=None: F.relu(F.conv2d(x, w, b, **options)),
            arguments,
            what,
        )


@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_and_gradients(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    shapes = SHAPES[2:] + [shape for _, shape in ALGORITHMS.values()]  # but the largest two
    for number, shape in enumerate(shapes):
        arguments = integers(shape, dtype, memory_format, bias=number % 3 != 0)
        compare_with_torch(arguments, shape[-1], f"{shape} {dtype} {memory_format}")


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    groups = data.draw(st.integers(1, 3), "groups")
    pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))
    kernel, stride, dilation = (data.draw(pairs, name) for name in ("kernel", "stride", "dilation"))
    # Less than the kernel's extent: oneDNN crashes where an output reads nothing but padding.
    padding = tuple(data.draw(st.integers(0, k // 2), "padding") for k in kernel)
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
    memory_format = data.draw(st.sampled_from(FORMATS), "format")
    ours, expected = both(case_arguments(shape, dtype, memory_format), shape[-1])
    assert torch.equal(ours, expected)
    compare_with_torch(integers(shape, dtype, memory_format), shape[-1], str(shape))


def test_a_clipped_output_has_no_gradient() -> None:
    input = torch.ones(1, 1, 4, 4, requires_grad=True)
    output = functional.conv2d_relu(input, torch.zeros(2, 1, 1, 1))
    output.backward(torch.ones_like(output))
    assert input.grad is not None
    assert input.grad.eq(0).all()


@pytest.mark.parametrize(
    ("name", "value"), [("stride", 0), ("padding", -1), ("dilation", 0), ("groups", 0)]
)
def test_errors_name_the_operator_the_argument_and_the_value(name: str, value: int) -> None:
    with pytest.raises(RuntimeError, match=rf"conv2d_relu.*\b{name}\b.*{value}"):
        functional.conv2d_relu(torch.ones(1, 1, 9, 9), torch.ones(1, 1, 3, 3), **{name: value})
