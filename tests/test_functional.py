"""cnnkernels.functional against torch.nn.functional: signatures, values, gradients, errors."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from conftest import runs_kernel
from torch import Tensor
from torch.nn import functional as F

from cnnkernels import explain, functional, is_native_available

pytestmark = pytest.mark.usefixtures("backend")

# (input size, weight size, arguments)
CONVOLUTIONS: list[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
    ((2, 3, 9, 8), (4, 3, 3, 3), {}),
    ((2, 3, 9, 8), (4, 3, 3, 2), {"stride": 2, "padding": (1, 0)}),
    ((2, 4, 9, 8), (6, 2, 3, 3), {"groups": 2, "dilation": (1, 2), "padding": 2}),
    ((2, 4, 9, 8), (8, 1, 3, 3), {"groups": 4, "stride": (2, 1)}),
    ((2, 3, 9, 8), (4, 3, 4, 2), {"padding": "same"}),
    ((2, 3, 9, 8), (4, 3, 3, 3), {"padding": "same", "dilation": 2}),
    ((2, 3, 9, 8), (4, 3, 3, 3), {"padding": "valid", "stride": [2]}),
    ((3, 9, 8), (4, 3, 3, 3), {"padding": 1}),
    ((0, 3, 9, 8), (4, 3, 3, 3), {}),
]
POOLS: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    ((2, 3, 8, 9), {"kernel_size": 2}),
    ((2, 3, 8, 9), {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0)}),
    ((2, 3, 8, 9), {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True}),
    ((2, 3, 8, 9), {"kernel_size": 2, "dilation": 2, "stride": [1]}),
    ((3, 8, 9), {"kernel_size": [2, 3]}),
    ((0, 3, 8, 9), {"kernel_size": 2}),
]


def leaves(*tensors: Tensor | None) -> list[Any]:
    return [None if t is None else t.detach().clone().requires_grad_() for t in tensors]


def conv_arguments(
    input_size: tuple[int, ...],
    weight_size: tuple[int, ...],
    memory_format: torch.memory_format = torch.contiguous_format,
) -> tuple[Tensor, Tensor, Tensor]:
    input = torch.randn(input_size, dtype=torch.float64)
    if len(input_size) == 4:
        input = input.contiguous(memory_format=memory_format)
    weight = torch.randn(weight_size, dtype=torch.float64)
    return input, weight, torch.randn(weight_size[0], dtype=torch.float64)


def torch_conv2d_relu(*args: Any, **kwargs: Any) -> Tensor:
    return F.relu(F.conv2d(*args, **kwargs))


def torch_block(input: Tensor, weight: Tensor, bias: Tensor | None, **kwargs: Any) -> Tensor:
    pool = {name.removeprefix("pool_"): value for name, value in kwargs.items() if "pool_" in name}
    conv = {name: value for name, value in kwargs.items() if "pool_" not in name}
    pool.setdefault("kernel_size", 2)
    return F.max_pool2d(F.relu(F.conv2d(input, weight, bias, **conv)), **pool)


def assert_same_call(ours: Any, theirs: Any, tensors: tuple[Tensor | None, ...]) -> None:
    """Value, memory format and gradients of two functions of the same tensors."""
    our_tensors, their_tensors = leaves(*tensors), leaves(*tensors)
    our_output, their_output = ours(*our_tensors), theirs(*their_tensors)
    torch.testing.assert_close(our_output, their_output)
    assert our_output.stride() == their_output.stride()
    grad = torch.randn_like(their_output)
    our_output.backward(grad)
    their_output.backward(grad)
    for our, their in zip(our_tensors, their_tensors, strict=True):
        if their is not None:
            torch.testing.assert_close(our.grad, their.grad)


def test_signatures_are_those_of_torch() -> None:
    """Those of torch are builtins or dispatchers: their documented signatures count."""
    for function in (functional.conv2d, functional.conv2d_relu):
        conv = inspect.signature(function).parameters
        assert {name: p.default for name, p in conv.items()} == {
            "input": inspect.Parameter.empty,
            "weight": inspect.Parameter.empty,
            "bias": None,
            "stride": 1,
            "padding": 0,
            "dilation": 1,
            "groups": 1,
        }
    theirs = inspect.signature(F.max_pool2d_with_indices).parameters
    ours = inspect.signature(functional.max_pool2d).parameters
    assert list(ours) == list(theirs)
    assert [p.default for p in ours.values()] == [p.default for p in theirs.values()]


@pytest.mark.parametrize(("input_size", "weight_size", "kwargs"), CONVOLUTIONS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(functional.conv2d, F.conv2d), (functional.conv2d_relu, torch_conv2d_relu)],
    ids=["conv2d", "conv2d_relu"],
)
def test_conv2d(
    ours: Any,
    theirs: Any,
    input_size: tuple[int, ...],
    weight_size: tuple[int, ...],
    kwargs: dict[str, Any],
    memory_format: torch.memory_format,
    with_bias: bool,
) -> None:
    input, weight, bias = conv_arguments(input_size, weight_size, memory_format)
    assert_same_call(
        lambda *t: ours(*t, **kwargs),
        lambda *t: theirs(*t, **kwargs),
        (input, weight, bias if with_bias else None),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("input_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("weight_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "functions",
    [(functional.conv2d, F.conv2d), (functional.conv2d_relu, torch_conv2d_relu)],
    ids=["conv2d", "conv2d_relu"],
)
@pytest.mark.parametrize(
    ("input_size", "weight_size"),
    [
        ((2, 3, 9, 8), (4, 3, 3, 3)),
        ((2, 3, 9, 8), (1, 3, 3, 3)),
        ((2, 3, 3, 3), (4, 3, 3, 3)),
        ((3, 9, 8), (4, 3, 3, 3)),
    ],
    ids=str,
)
def test_conv2d_memory_formats(
    functions: tuple[Any, Any],
    input_size: tuple[int, ...],
    weight_size: tuple[int, ...],
    dtype: torch.dtype,
    input_format: torch.memory_format,
    weight_format: torch.memory_format,
) -> None:
    """Those of the output and of the gradients, whichever of the two asks for channels_last."""
    if len(input_size) == 3:
        input_format = torch.contiguous_format
    strides = []
    for function in functions:
        input = torch.randn(input_size, dtype=dtype).to(memory_format=input_format)
        weight = torch.randn(weight_size, dtype=dtype).to(memory_format=weight_format)
        output = function(input.requires_grad_(), weight.requires_grad_())
        grads = torch.autograd.grad(output.sum(), (input, weight))
        strides.append([tensor.stride() for tensor in (output, *grads)])
    assert strides[0] == strides[1]


@pytest.mark.parametrize(("input_size", "kwargs"), POOLS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_max_pool2d(
    input_size: tuple[int, ...], kwargs: dict[str, Any], memory_format: torch.memory_format
) -> None:
    input = torch.randint(-3, 3, input_size).double()
    if input.dim() == 4:
        input = input.contiguous(memory_format=memory_format)
    assert_same_call(
        lambda t: functional.max_pool2d(t, **kwargs), lambda t: F.max_pool2d(t, **kwargs), (input,)
    )
    ours = functional.max_pool2d(input, return_indices=True, **kwargs)
    theirs = F.max_pool2d(input, return_indices=True, **kwargs)
    assert isinstance(ours, tuple)
    torch.testing.assert_close(ours, tuple(theirs))
    assert ours[1].dtype is torch.int64


@pytest.mark.parametrize(
    ("input_size", "weight_size", "kwargs"),
    [
        ((2, 3, 9, 8), (4, 3, 3, 3), {}),
        ((2, 3, 9, 8), (4, 3, 3, 3), {"padding": "same", "pool_kernel_size": 3}),
        ((2, 3, 9, 8), (4, 3, 2, 4), {"padding": "same", "pool_ceil_mode": True}),
        (
            (2, 4, 9, 8),
            (4, 2, 3, 3),
            {"groups": 2, "padding": 1, "pool_kernel_size": (3, 2), "pool_stride": 1},
        ),
        (
            (2, 3, 12, 11),
            (4, 3, 3, 3),
            {"stride": 2, "padding": 1, "pool_kernel_size": 3, "pool_padding": 1},
        ),
        ((3, 9, 8), (4, 3, 3, 3), {"pool_dilation": 2}),
        ((0, 3, 9, 8), (4, 3, 3, 3), {}),
    ],
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_block(
    input_size: tuple[int, ...],
    weight_size: tuple[int, ...],
    kwargs: dict[str, Any],
    memory_format: torch.memory_format,
) -> None:
    tensors = conv_arguments(input_size, weight_size, memory_format)
    assert_same_call(
        lambda *t: functional.conv2d_relu_max_pool2d(*t, **kwargs),
        lambda *t: torch_block(*t, **kwargs),
        tensors,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_run(dtype: torch.dtype) -> None:
    input = torch.randn(2, 3, 12, 12, dtype=dtype, requires_grad=True)
    weight = torch.randn(4, 3, 3, 3, dtype=dtype, requires_grad=True)
    with runs_kernel("conv2d", "conv2d_backward", "max_pool2d", "max_pool2d_backward"):
        output = functional.max_pool2d(functional.conv2d(input, weight), 2)
        output.sum().backward()
    with runs_kernel("conv2d_relu_max_pool2d", "conv2d_relu_max_pool2d_backward"):
        block = functional.conv2d_relu_max_pool2d(input, weight)
        block.sum().backward()
    with runs_kernel("conv2d_relu", "conv2d_backward"):
        clipped = functional.conv2d_relu(input, weight)
        clipped.sum().backward()
    assert output.dtype is block.dtype is clipped.dtype is dtype
    expected = F.max_pool2d(F.conv2d(input.double(), weight.double()), 2).to(dtype)
    tolerance = (
        {"rtol": 2e-2, "atol": 5e-2} if dtype != torch.float32 else {"rtol": 1e-4, "atol": 1e-5}
    )
    torch.testing.assert_close(output, expected, **tolerance)
    torch.testing.assert_close(block, F.relu(expected), **tolerance)
    torch.testing.assert_close(F.max_pool2d(clipped, 2), F.relu(expected), **tolerance)


def test_only_the_gradients_that_are_asked_for() -> None:
    input, weight, bias = conv_arguments((2, 3, 6, 6), (4, 3, 3, 3))
    for wanted in ([True, False, False], [False, True, False], [False, False, True]):
        tensors = [
            t.clone().requires_grad_(want)
            for t, want in zip((input, weight, bias), wanted, strict=True)
        ]
        for function in (
            functional.conv2d,
            functional.conv2d_relu,
            functional.conv2d_relu_max_pool2d,
        ):
            function(*tensors).sum().backward()
        assert [t.grad is not None for t in tensors] == wanted


def test_complex_and_integer_go_to_torch() -> None:
    input, weight = torch.randn(1, 2, 6, 6).cfloat(), torch.randn(3, 2, 3, 3).cfloat()
    torch.testing.assert_close(functional.conv2d(input, weight), F.conv2d(input, weight))
    ints, int_weight = torch.arange(36).view(1, 1, 6, 6), torch.ones(1, 1, 2, 2, dtype=torch.long)
    torch.testing.assert_close(functional.conv2d(ints, int_weight), F.conv2d(ints, int_weight))
    torch.testing.assert_close(
        functional.conv2d_relu(ints - 20, int_weight), torch_conv2d_relu(ints - 20, int_weight)
    )
    torch.testing.assert_close(functional.max_pool2d(ints, 2), F.max_pool2d(ints, 2))


def test_autocast() -> None:
    input = torch.randn(1, 2, 8, 8, requires_grad=True)
    weight = torch.randn(3, 2, 3, 3, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = functional.conv2d(input, weight)
        clipped = functional.conv2d_relu(input, weight)
        block = functional.conv2d_relu_max_pool2d(input, weight)
        pooled = functional.max_pool2d(input, 2)
    assert output.dtype is clipped.dtype is block.dtype is torch.bfloat16
    assert torch.equal(clipped, output.relu())
    assert pooled.dtype is torch.float32
    (output.float().sum() + clipped.float().sum() + block.float().sum()).backward()
    assert input.grad is not None
    assert input.grad.dtype is torch.float32


def _image(*size: int) -> Tensor:
    return torch.zeros(size)


BAD_CONVOLUTIONS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "weight of other channels": ((_image(1, 3, 5, 5), _image(2, 4, 3, 3)), {}),
    "weight of three dimensions": ((_image(1, 3, 5, 5), _image(2, 3, 3)), {}),
    "input of five dimensions": ((_image(1, 1, 3, 5, 5), _image(2, 3, 3, 3)), {}),
    "input of two dimensions": ((_image(5, 5), _image(2, 3, 3, 3)), {}),
    "kernel larger than input": ((_image(1, 3, 2, 2), _image(2, 3, 3, 3)), {}),
    "bias of other length": ((_image(1, 3, 5, 5), _image(2, 3, 3, 3), _image(3)), {}),
    "bias of two dimensions": ((_image(1, 3, 5, 5), _image(2, 3, 3, 3), _image(2, 1)), {}),
    "other dtypes": ((_image(1, 3, 5, 5), _image(2, 3, 3, 3).double()), {}),
    "bias of other dtype": ((_image(1, 3, 5, 5), _image(2, 3, 3, 3), _image(2).double()), {}),
    "stride 0": ((_image(1, 3, 5, 5), _image(2, 3, 3, 3)), {"stride": 0}),
    "stride of three": ((_image(1, 3, 5, 5), _image(2, 3, 3, 3)), {"stride": (1, 1, 1)}),
    "stride of a float": ((_image(1, 3, 5, 5), _image(2, 3, 3, 3)), {"stride": 1.5}),
    "stride of a string": ((_image(1, 3, 5, 5), _image(2, 3, 3, 3)), {"stride": "same"}),
    "negative padding": ((_image(1, 3, 5, 5), _image(2, 3, 3, 3)), {"padding": -1}),
    "unknown padding": ((_image(1, 3, 5, 5), _image(2, 3, 3, 3)), {"padding": "full"}),
    "same with stride": (
        (_image(1, 3, 5, 5), _image(2, 3, 3, 3)),
        {"padding": "same", "stride": 2},
    ),
    "dilation 0": ((_image(1, 3, 5, 5), _image(2, 3, 3, 3)), {"dilation": 0}),
    "groups 0": ((_image(1, 3, 5, 5), _image(2, 3, 3, 3)), {"groups": 0}),
    "groups that do not divide": ((_image(1, 4, 5, 5), _image(3, 2, 3, 3)), {"groups": 2}),
    "no tensor": (([[1.0]], _image(2, 3, 3, 3)), {}),
    "unknown argument": ((_image(1, 3, 5, 5), _image(2, 3, 3, 3)), {"strides": 1}),
}
BAD_POOLS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "input of two dimensions": ((_image(5, 5), 2), {}),
    "no channels": ((_image(2, 0, 5, 5), 2), {}),
    "kernel 0": ((_image(1, 3, 5, 5), 0), {}),
    "kernel of three": ((_image(1, 3, 5, 5), (2, 2, 2)), {}),
    "kernel of a float": ((_image(1, 3, 5, 5), 2.0), {}),
    "kernel larger than input": ((_image(1, 3, 5, 5), 6), {}),
    "stride 0": ((_image(1, 3, 5, 5), 2, 0), {}),
    "padding over half the kernel": ((_image(1, 3, 5, 5), 2), {"padding": 2}),
    "negative padding": ((_image(1, 3, 5, 5), 2), {"padding": -1}),
    "dilation 0": ((_image(1, 3, 5, 5), 2), {"dilation": 0}),
    "padding over half the kernel, but not over half its extent": (
        (_image(1, 3, 8, 8), 2),
        {"padding": 2, "dilation": 3},
    ),
    "stride over 32 bits": ((_image(1, 3, 5, 5), 2, 2**62), {}),
    "kernel over 32 bits": ((_image(1, 3, 5, 5), 2**40), {}),
    "stride over 64 bits": ((_image(1, 3, 5, 5), 2, 2**64), {}),
    "ceil_mode of None": ((_image(1, 3, 5, 5), 2, 2, 0, 1, None), {}),
    "no tensor": (([[1.0]], 2), {}),
    "no kernel": ((_image(1, 3, 5, 5),), {}),
}


@pytest.mark.parametrize("huge", [2**31, 2**40, 2**62, 2**63 - 1])
def test_a_stride_that_is_never_taken_may_be_huge(huge: int) -> None:
    image, weight = _image(1, 3, 5, 5).requires_grad_(), _image(2, 3, 3, 3)
    output = functional.conv2d(image, weight, None, huge)
    torch.testing.assert_close(output, F.conv2d(image, weight, None, huge))
    output.sum().backward()
    assert functional.conv2d_relu(image, weight, None, huge).shape == (1, 2, 1, 1)
    block = functional.conv2d_relu_max_pool2d(image, weight, stride=huge, pool_kernel_size=1)
    assert block.shape == (1, 2, 1, 1)


@pytest.mark.parametrize("kwargs", [{"padding": 2**62}, {"dilation": 2**62}, {"padding": 2**31}])
def test_sizes_that_overflow_are_refused(backend: str, kwargs: dict[str, int]) -> None:
    if backend == "torch" and "dilation" in kwargs:
        pytest.skip("torch's own size overflows here, and it returns a tensor")
    image, weight = _image(1, 3, 5, 5), _image(2, 3, 3, 3)
    for function in (
        functional.conv2d,
        functional.conv2d_relu,
        functional.conv2d_relu_max_pool2d,
    ):
        with pytest.raises(RuntimeError):
            function(image, weight, **kwargs)


def test_a_border_that_dwarfs_the_image_is_left_to_aten() -> None:
    image, weight = torch.randn(1, 3, 5, 5, requires_grad=True), torch.randn(2, 3, 3, 3)
    kwargs = {"stride": 1000, "padding": 2000, "dilation": 1000}
    for function, peer in (
        (functional.conv2d, F.conv2d),
        (functional.conv2d_relu, torch_conv2d_relu),
    ):
        if is_native_available():
            assert explain(function, image, weight, **kwargs)["algorithm"] == "aten"
        output = function(image, weight, **kwargs)
        expected = peer(image, weight, **kwargs)
        torch.testing.assert_close(output, expected)
        (ours,) = torch.autograd.grad(output.sum(), image)
        (theirs,) = torch.autograd.grad(expected.sum(), image)
        torch.testing.assert_close(ours, theirs)
    block = functional.conv2d_relu_max_pool2d(image, weight, **kwargs)
    torch.testing.assert_close(block, torch_block(image, weight, None, **kwargs))


def assert_same_error(ours: Any, theirs: Any, args: Any, kwargs: Any) -> None:
    with pytest.raises(Exception) as expected:  # noqa: PT011  torch decides which
        theirs(*args, **kwargs)
    with pytest.raises(expected.type):
        ours(*args, **kwargs)


@pytest.mark.parametrize("size", [2**64, (2**64, 1), [1, -(2**64)]])
def test_ints_over_64_bits_raise_what_torch_raises(size: Any) -> None:
    image, weight = _image(1, 3, 5, 5), _image(2, 3, 3, 3)
    assert_same_error(functional.conv2d, F.conv2d, (image, weight, None, size), {})
    assert_same_error(functional.max_pool2d, F.max_pool2d, (image, size), {})


@pytest.mark.parametrize("case", BAD_CONVOLUTIONS)
def test_bad_convolutions_raise_what_torch_raises(case: str) -> None:
    for function in (functional.conv2d, functional.conv2d_relu):
        assert_same_error(function, F.conv2d, *BAD_CONVOLUTIONS[case])


@pytest.mark.parametrize("case", BAD_POOLS)
def test_bad_pools_raise_what_torch_raises(case: str) -> None:
    assert_same_error(functional.max_pool2d, F.max_pool2d, *BAD_POOLS[case])


@pytest.mark.parametrize("case", BAD_CONVOLUTIONS)
def test_bad_blocks_raise_what_torch_raises(case: str) -> None:
    args, kwargs = BAD_CONVOLUTIONS[case]
    assert_same_error(functional.conv2d_relu_max_pool2d, F.conv2d, args, kwargs)


@pytest.mark.parametrize(
    "kwargs",
    [{"pool_kernel_size": 9}, {"pool_stride": 0}, {"pool_padding": 2}, {"pool_dilation": 0}],
)
def test_bad_pools_of_blocks_raise_what_torch_raises(kwargs: dict[str, Any]) -> None:
    args = (_image(1, 3, 8, 8), _image(2, 3, 3, 3))
    assert_same_error(
        functional.conv2d_relu_max_pool2d,
        lambda input, weight, **kwargs: torch_block(input, weight, None, **kwargs),
        args,
        kwargs,
    )


class Labelled(Tensor):
    """A tensor subclass with torch's default behaviour: results are of the subclass too."""


def test_tensor_subclasses_stay() -> None:
    input = torch.randn(1, 2, 6, 6).as_subclass(Labelled)
    weight = torch.randn(3, 2, 3, 3)
    assert type(functional.conv2d(input, weight)) is Labelled
    assert type(functional.conv2d_relu(input, weight)) is Labelled
    assert type(functional.conv2d(weight, input[:, :, :3, :3])) is Labelled
    assert type(functional.max_pool2d(input, 2)) is Labelled
    assert type(functional.conv2d_relu_max_pool2d(input, weight)) is Labelled
    torch.testing.assert_close(
        functional.conv2d(input, weight).as_subclass(Tensor),
        F.conv2d(input.as_subclass(Tensor), weight),
    )


def test_fx_traces_the_functions() -> None:
    def forward(input: Tensor, weight: Tensor) -> Tensor:
        output = functional.conv2d(input, weight, padding=1)
        pooled = functional.max_pool2d(output, 2)
        block = functional.conv2d_relu_max_pool2d(input, weight, padding=1)
        return pooled + block + functional.conv2d_relu(input, weight, stride=2, padding=1)

    graph = torch.fx.symbolic_trace(forward)
    targets = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert [target for target in targets if target.__module__ == functional.__name__] == [
        functional.conv2d,
        functional.max_pool2d,
        functional.conv2d_relu_max_pool2d,
        functional.conv2d_relu,
    ]
    input, weight = torch.randn(1, 2, 6, 6), torch.randn(3, 2, 3, 3)
    torch.testing.assert_close(graph(input, weight), forward(input, weight))


def test_meta_tensors() -> None:
    input = torch.empty(2, 3, 8, 8, device="meta")
    weight = torch.empty(4, 3, 3, 3, device="meta")
    assert functional.conv2d(input, weight).shape == (2, 4, 6, 6)
    assert functional.conv2d_relu(input, weight).shape == (2, 4, 6, 6)
    assert functional.max_pool2d(input, 2).shape == (2, 3, 4, 4)
    assert functional.conv2d_relu_max_pool2d(input, weight).shape == (2, 4, 3, 3)


def test_compiled_graphs_call_the_operators() -> None:
    """The graph is run by torch's eager interpreter: no compiler is needed."""

    def forward(input: Tensor, weight: Tensor) -> Tensor:
        output = functional.conv2d(input, weight, padding="same", stride=1)
        output = output + functional.conv2d_relu(input, weight, None, 1, "same")
        block = functional.conv2d_relu_max_pool2d(input, weight, padding=1)
        return functional.max_pool2d(output, 2).sum() + block.sum()

    compiled = torch.compile(forward, backend="aot_eager", fullgraph=True)
    tensors = [torch.randn(1, 2, 6, 6), torch.randn(3, 2, 3, 3)]
    ours, theirs = leaves(*tensors), leaves(*tensors)
    with runs_kernel("conv2d", "conv2d_relu", "max_pool2d", "conv2d_relu_max_pool2d"):
        compiled(*ours).backward()
    forward(*theirs).backward()
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our.grad, their.grad)


def test_export() -> None:
    class Net(torch.nn.Module):
        def forward(self, input: Tensor, weight: Tensor) -> Tensor:
            clipped = functional.conv2d_relu(input, weight)
            return functional.max_pool2d(functional.conv2d(input, weight) + clipped, 2)

    args = (torch.randn(2, 2, 6, 6), torch.randn(3, 2, 3, 3))
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(Net(), args, dynamic_shapes=({0: batch}, None))
    input = torch.randn(5, 2, 6, 6)
    torch.testing.assert_close(program.module()(input, args[1]), Net()(input, args[1]))


def test_a_tensor_without_its_storage(backend: str) -> None:
    image, weight = torch.randn(1, 1, 9, 9), torch.randn(2, 1, 3, 3)
    image.untyped_storage().resize_(0)
    for call in (
        lambda: functional.conv2d(image, weight),
        lambda: functional.conv2d_relu(image, weight),
        lambda: functional.max_pool2d(image, 2),
        lambda: functional.conv2d_relu_max_pool2d(image, weight),
    ):
        with pytest.raises(RuntimeError, match="not allocated"):
            call()


def test_arrays_are_no_ints() -> None:
    with pytest.raises(TypeError, match="stride"):
        functional.conv2d(_image(1, 1, 5, 5), _image(1, 1, 2, 2), stride=np.array([1, 2]))
