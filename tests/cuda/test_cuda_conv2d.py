"""The CUDA convolution kernels, and torch's where a plan prefers them: float64 is the judge.

Every policy runs every shape: what it forces where that applies, and the fastest kernel elsewhere.
Tiny cases for compute-sanitizer: test_cuda_conv2d_policies.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accuracy import assert_close_to_truth, in_both_formats, with_gradients
from conftest import runs_kernel
from cuda_support import assert_returns_at_once, busy_side_stream, needs_cuda
from hypothesis import given, settings
from hypothesis import strategies as st
from test_conv2d import DTYPES, SHAPES, case_arguments
from test_functional import BAD_CONVOLUTIONS
from torch import Tensor
from torch.nn import functional as F

from cnnkernels import _native, explain, functional

pytestmark = [needs_cuda, pytest.mark.usefixtures("poisoned", "_strict_float32")]

FORMATS = [torch.contiguous_format, torch.channels_last]
NATIVE = ["native", "direct", "implicit_gemm", "depthwise", "wgmma"]
Shape = tuple[int, int, int, int, int, tuple[int, int], dict[str, Any]]
# Of whole tiles and of parts of them, in both sizes; first layers; few channels a group.
TILES: list[Shape] = [
    (2, 64, 14, 15, 64, (3, 3), {"padding": 1}),
    (3, 128, 9, 9, 130, (3, 3), {"padding": 1}),
    (2, 72, 20, 20, 200, (1, 1), {}),
    (2, 40, 17, 18, 96, (3, 3), {"stride": 2, "padding": 1}),
    (2, 24, 12, 13, 40, (3, 3), {"dilation": 2, "padding": 2}),
    (2, 64, 9, 10, 64, (3, 3), {"padding": 1, "groups": 2}),
    (2, 3, 40, 44, 64, (7, 7), {"stride": 2, "padding": 3}),
    (2, 3, 33, 35, 32, (3, 3), {"padding": 1}),
    (2, 48, 19, 21, 48, (3, 3), {"padding": 1, "groups": 48}),
    (2, 48, 19, 21, 48, (5, 5), {"stride": 2, "padding": 2, "groups": 48}),
    (2, 32, 11, 12, 64, (3, 3), {"padding": 1, "groups": 32}),
    (2, 32, 11, 12, 32, (3, 3), {"padding": 1, "groups": 8}),
    (1, 32, 12, 13, 64, (5, 5), {"padding": 2}),
    (2, 64, 1, 1, 40, (3, 3), {"padding": 1}),
]


def set_policy(name: str) -> None:
    if _native.library is not None:
        _native.library.set_cuda_conv2d(name)


@pytest.fixture(autouse=True)
def _policy() -> Iterator[None]:
    """Kernels wherever there are any, but for what a test itself chooses."""
    before = "auto" if _native.library is None else _native.library.config()["cuda_conv2d"]
    set_policy("native")
    yield
    set_policy(before)


@pytest.fixture
def _strict_float32() -> Iterator[None]:
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.conv.fp32_precision = before


def on_gpu(x: Tensor | None) -> Tensor | None:
    """The tensor on the GPU with the strides that it has."""
    if x is None:
        return None
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda").copy_(x)


def torch_conv2d_relu(x: Tensor, w: Tensor, b: Tensor | None = None, **options: Any) -> Tensor:
    return F.relu(F.conv2d(x, w, b, **options))


OPERATORS = [(functional.conv2d, F.conv2d), (functional.conv2d_relu, torch_conv2d_relu)]


def compare(
    arguments: list[Tensor | None], options: dict[str, Any], native: bool = True, relu: bool = False
) -> None:
    """Compare a convolution of GPU tensors with float64, by the measure of torch's error there."""
    what = f"{[a if a is None else (tuple(a.shape), a.stride()) for a in arguments]} {options}"
    ours, theirs = OPERATORS[relu]
    double = [None if a is None else a.cpu().double() for a in arguments]
    shape = theirs(*double, **options).shape
    dtype = next(a.dtype for a in arguments if a is not None)
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grad = grad.to(dtype).double()
    if relu:  # what rounding clips another way is no error of a gradient
        near = theirs(*double, **options).abs() < 1e-2
        grad[near] = 0
    truth, truth_gradients = with_gradients(lambda *t: theirs(*t, **options), double, grad)
    absolute = [None if a is None else a.abs() for a in double]
    magnitude, magnitude_gradients = with_gradients(
        lambda *t: theirs(*t, **options), absolute, grad.abs()
    )
    torchs, torchs_gradients = with_gradients(
        lambda *t: theirs(*t, **options), arguments, grad.cuda()
    )
    operator = "conv2d_relu" if relu else "conv2d"
    with runs_kernel(*((operator, "conv2d_backward") if native else ())):
        output, gradients = with_gradients(lambda *t: ours(*t, **options), arguments, grad.cuda())
    if in_both_formats(torchs):
        assert in_both_formats(output), what
    else:
        assert output.stride() == torchs.stride(), what
    assert_close_to_truth(output.cpu(), torchs.cpu(), truth, magnitude, what)
    names = ["input", "weight", "bias"]
    for name, mine, theirs_, exact, sizes in zip(
        names, gradients, torchs_gradients, truth_gradients, magnitude_gradients, strict=False
    ):
        assert_close_to_truth(
            mine.cpu(), theirs_.cpu(), exact, sizes, f"{what}: gradient of {name}"
        )


@pytest.mark.parametrize("policy", ["auto", *NATIVE])
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shapes(dtype: torch.dtype, memory_format: torch.memory_format, policy: str) -> None:
    set_policy(policy)
    for number, shape in enumerate([*SHAPES, *TILES]):
        arguments = case_arguments(shape, dtype, memory_format, bias=number % 3 != 0)
        compare([on_gpu(a) for a in arguments], shape[-1], policy != "auto", relu=number % 2 == 1)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    groups = data.draw(st.sampled_from([1, 1, 2, 3, 8]), "groups")
    kernel, dilation, stride = (
        data.draw(st.tuples(st.integers(1, most), st.integers(1, most)), name)
        for name, most in (("kernel", 5), ("dilation", 3), ("stride", 4))
    )
    padding = data.draw(st.tuples(st.integers(0, 4), st.integers(0, 4)), "padding")
    least = [max(1, dilation[i] * (kernel[i] - 1) + 1 - 2 * padding[i]) for i in range(2)]
    height, width = (data.draw(st.integers(n, n + 19), "size") for n in least)
    channels = st.one_of(st.integers(1, 9), st.sampled_from([16, 24, 64, 65, 128]))
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    shape: Shape = (
        *(data.draw(st.integers(1, 3), "batch"), groups * data.draw(channels, "in"), height, width),
        *(groups * data.draw(channels, "out"), kernel, options),
    )
    set_policy(data.draw(st.sampled_from(NATIVE), "policy"))
    arguments = case_arguments(
        shape, data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(FORMATS))
    )
    compare([on_gpu(a) for a in arguments], options, relu=data.draw(st.booleans()))


@pytest.mark.parametrize("policy", NATIVE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [1, 2, 3, 4])
def test_addresses_that_are_not_those_of_vectors(
    offset: int, dtype: torch.dtype, policy: str
) -> None:
    set_policy(policy)
    for memory_format in FORMATS:
        for shape in TILES[::2]:
            arguments = []
            for tensor in case_arguments(shape, dtype, memory_format):
                assert tensor is not None
                storage = torch.zeros(tensor.numel() + offset, dtype=dtype, device="cuda")
                arguments.append(storage[offset:].as_strided(tensor.shape, tensor.stride(), offset))
                arguments[-1].copy_(tensor)
            compare(arguments, shape[-1])


@pytest.mark.parametrize("policy", NATIVE)
def test_other_strides(policy: str) -> None:
    set_policy(policy)
    base = torch.randn(4, 8, 20, 22, device="cuda")
    for view in (
        base.transpose(2, 3),
        base[::2, 1:5, ::2, 3:],
        base[:, :1].expand(-1, 4, -1, -1),
        base[0].permute(2, 0, 1)[None, :4],
    ):
        channels = view.shape[1]
        weight = torch.randn(5, 3, 3, channels, device="cuda").permute(0, 3, 1, 2)[..., :2]
        compare([view, weight, torch.randn(10, device="cuda")[::2]], {})


def test_one_image_and_none() -> None:
    for relu in (False, True):
        x = torch.randn(3, 9, 10, device="cuda")
        weight, bias = torch.randn(4, 3, 3, 3, device="cuda"), torch.randn(4, device="cuda")
        compare([x, weight, bias], {"padding": 1}, relu=relu)
        leaves = [t.requires_grad_() for t in (x.new_zeros(0, 3, 9, 10), weight, bias)]
        output = OPERATORS[relu][0](*leaves)
        assert output.shape == (0, 4, 7, 8)
        gradients = torch.autograd.grad(output.sum(), leaves)
        assert [g.shape for g in gradients] == [t.shape for t in leaves]
        assert not any(g.any() for g in gradients)


@pytest.mark.parametrize("mask", [(True, False, False), (False, True, False), (False, False, True)])
@pytest.mark.parametrize("policy", ["auto", "native"])
def test_only_the_gradients_asked_for(policy: str, mask: tuple[bool, bool, bool]) -> None:
    set_policy(policy)
    for dtype in (torch.float32, torch.float16):
        x, weight, grad = (
            torch.randn(size, device="cuda", dtype=dtype)
            for size in [(2, 32, 8, 9), (40, 32, 3, 3), (2, 40, 6, 7)]
        )
        arguments = [[1, 1], [0, 0], [1, 1]]
        ours = torch.ops.cnnkernels.conv2d_backward(grad, x, weight, *arguments, 1, mask)
        theirs = torch.ops.aten.convolution_backward(
            grad, x, weight, [40], *arguments, False, [0, 0], 1, mask
        )
        for wanted, mine, torchs in zip(mask, ours, theirs, strict=True):
            assert (mine is not None) == wanted
            if wanted:
                torch.testing.assert_close(mine, torchs, rtol=1e-2, atol=1e-1)


def test_tf32_where_torch_allows_it() -> None:
    set_policy("implicit_gemm")
    arguments = [on_gpu(a) for a in case_arguments(TILES[1], torch.float32)]
    plan = explain(functional.conv2d, *arguments, padding=1)
    assert plan["products"] == "exact parts"
    strict = functional.conv2d(*arguments, padding=1)
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    plan = explain(functional.conv2d, *arguments, padding=1)
    assert plan["products"] == "tf32"
    rounded = functional.conv2d(*arguments, padding=1)
    truth = F.conv2d(*(a.cpu().double() for a in arguments if a is not None), padding=1)
    errors = [(t.cpu().double() - truth).norm() / truth.norm() for t in (strict, rounded)]
    assert errors[0] < 1e-6 < errors[1] < 1e-3


def test_plans_say_what_runs() -> None:
    half = [on_gpu(a) for a in case_arguments(TILES[1], torch.float16)]
    set_policy("auto")
    plan = explain(functional.conv2d, *half, padding=1)
    for name in ("", "input_gradient", "weight_gradient"):
        if plan[name or "algorithm"] == "aten":
            assert "torch is" in plan[f"{name}_reason" if name else "reason"]
    assert plan["bias_gradient"] == "sum"
    before = dict(_native.library.kernel_calls()) if _native.library is not None else {}
    functional.conv2d(*half, padding=1)
    after = dict(_native.library.kernel_calls()) if _native.library is not None else {}
    assert (after != before) == (plan["algorithm"] != "aten")
    for policy, algorithms in {
        "direct": ("direct", "direct", "plain"),
        "implicit_gemm": ("implicit GEMM",) * 3,
    }.items():
        set_policy(policy)
        plan = explain(functional.conv2d_relu, *half, padding=1)
        names = ("algorithm", "input_gradient", "weight_gradient")
        assert tuple(plan[name] for name in names) == algorithms
    depthwise = [on_gpu(a) for a in case_arguments(TILES[8], torch.float32)]
    set_policy("native")
    plan = explain(functional.conv2d, *depthwise, padding=1, groups=48)
    assert plan["algorithm"] == plan["weight_gradient"] == "depthwise"
    with pytest.raises(ValueError, match="winograd"):
        set_policy("winograd")


@pytest.mark.parametrize("policy", NATIVE)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_repeats_are_equal_bit_by_bit(memory_format: torch.memory_format, policy: str) -> None:
    set_policy(policy)
    for shape in ((8, 64, 28, 28, 64, (3, 3), {"padding": 1}), (16, *TILES[8][1:])):
        arguments = [on_gpu(a) for a in case_arguments(shape, torch.float32, memory_format)]
        results = []
        for _ in range(3):
            leaves = [a.clone().requires_grad_() for a in arguments if a is not None]
            output = functional.conv2d(*leaves, **shape[-1])
            results.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
        for again in results[1:]:
            assert all(torch.equal(*pair) for pair in zip(results[0], again, strict=True))


@pytest.mark.parametrize("policy", NATIVE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_non_finite_values_stay_where_torch_has_them(dtype: torch.dtype, policy: str) -> None:
    set_policy(policy)
    for memory_format in FORMATS:
        for shape in (*TILES[:1], TILES[8], (2, 3, 9, 11, 5, (3, 3), {"padding": 1})):
            for value in (torch.inf, -torch.inf, torch.nan):
                x, weight, _ = case_arguments(shape, dtype, memory_format, bias=False)
                assert x is not None
                assert weight is not None
                x[0, 0, 0, -1] = x[-1, -1, 3, 0] = value
                truth = F.conv2d(x.double(), weight.double(), **shape[-1])
                leaf, w = on_gpu(x).requires_grad_(), on_gpu(weight).requires_grad_()
                ours = functional.conv2d(leaf, w, **shape[-1])
                assert torch.equal(ours.cpu().isnan(), truth.isnan())
                assert torch.equal(ours.cpu().isinf(), truth.isinf())
                gradient, _ = torch.autograd.grad(ours, (leaf, w), torch.ones_like(ours))
                assert gradient.isfinite().all()
                clipped = functional.conv2d_relu(on_gpu(x), on_gpu(weight), **shape[-1])
                assert torch.equal(clipped.cpu().isnan(), truth.isnan())
                assert not clipped.isneginf().any()


def test_derivatives() -> None:
    for options in ({"padding": 1}, {"stride": 2, "groups": 2}):
        groups = options.get("groups", 1)
        leaves = [
            torch.randn(size, dtype=torch.float64, device="cuda", requires_grad=True)
            for size in [(2, 4, 5, 6), (4, 4 // groups, 3, 2), (4,)]
        ]

        def conv2d(*leaves: Tensor, options: dict[str, Any] = options) -> Tensor:
            return functional.conv2d(*leaves, **options)

        with runs_kernel("conv2d", "conv2d_backward"):
            torch.autograd.gradcheck(conv2d, leaves, nondet_tol=0.0)
        torch.autograd.gradgradcheck(conv2d, leaves)


def test_autocast() -> None:
    x, weight = torch.randn(2, 16, 9, 9, device="cuda"), torch.randn(24, 16, 3, 3, device="cuda")
    weight.requires_grad_()
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cuda", dtype), runs_kernel("conv2d"):
            output = functional.conv2d(x, weight, padding=1)
        assert output.dtype == dtype
        with runs_kernel("conv2d_backward"):
            (gradient,) = torch.autograd.grad(output.float().sum(), weight)
        assert gradient.dtype == torch.float32
        expected = F.conv2d(x, weight, padding=1)
        torch.testing.assert_close(output.float(), expected, rtol=0.05, atol=0.3)


@pytest.mark.parametrize("case", BAD_CONVOLUTIONS)
def test_arguments_that_do_not_fit_are_refused_as_on_the_cpu(case: str) -> None:
    arguments, options = BAD_CONVOLUTIONS[case]

    def error(device: str) -> tuple[type, str]:
        moved = [a.to(device) if isinstance(a, Tensor) else a for a in arguments]
        with pytest.raises(Exception) as raised:  # noqa: PT011
            functional.conv2d(*moved, **options)
        return raised.type, str(raised.value).replace("cuda:0", "cpu")

    assert error("cuda") == error("cpu")


def test_the_device_of_the_arguments_must_be_the_same() -> None:
    x, weight = torch.ones(1, 1, 4, 4, device="cuda"), torch.ones(1, 1, 3, 3)
    for pair in ((x, weight), (x.cpu(), weight.cuda())):
        with pytest.raises(RuntimeError, match="same device"):
            functional.conv2d(*pair)


@pytest.mark.parametrize("policy", ["auto", *NATIVE])
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_nothing_waits_for_the_device(memory_format: torch.memory_format, policy: str) -> None:
    set_policy(policy)
    x = torch.randn(4, 16, 16, 16, device="cuda").contiguous(memory_format=memory_format)
    leaves = [x, torch.randn(32, 16, 3, 3, device="cuda"), torch.randn(32, device="cuda")]
    for leaf in leaves:
        leaf.requires_grad_()
    grad = torch.randn(4, 32, 14, 14, device="cuda")

    def work() -> None:
        torch.autograd.grad(functional.conv2d(*leaves), leaves, grad)

    assert_returns_at_once(work)


@pytest.mark.parametrize("policy", NATIVE)
def test_the_current_stream_is_used(policy: str) -> None:
    set_policy(policy)
    x, weight = torch.randn(4, 8, 16, 16, device="cuda"), torch.randn(16, 8, 3, 3, device="cuda")
    grad = torch.randn(4, 16, 14, 14, device="cuda")
    results = []
    for late in (True, False):
        image = torch.zeros_like(x) if late else x.clone()
        torch.cuda.synchronize()
        with busy_side_stream():
            image.copy_(x)
            leaves = [image.requires_grad_(), weight.clone().requires_grad_()]
            output = functional.conv2d(*leaves)
            results.append([output.detach(), *torch.autograd.grad(output, leaves, grad)])
    torch.cuda.synchronize()
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("policy", ["auto", *NATIVE])
def test_a_captured_step_sees_what_changes(policy: str) -> None:
    set_policy(policy)
    x = torch.randn(4, 8, 16, 16, device="cuda")
    weight = torch.randn(16, 8, 3, 3, device="cuda", requires_grad=True)
    bias = torch.randn(16, device="cuda", requires_grad=True)

    def step() -> list[Tensor]:
        output = functional.conv2d_relu(x, weight, bias, padding=1)
        return [output.detach(), *torch.autograd.grad(output.square().sum(), (weight, bias))]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        x.copy_(torch.randn_like(x))
        graph.replay()
        for mine, expected in zip(captured, step(), strict=True):
            torch.testing.assert_close(mine, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU only")
def test_the_device_of_the_input_is_used() -> None:
    x, weight = torch.randn(2, 8, 9, 9), torch.randn(16, 8, 3, 3)
    leaves = [t.to("cuda:1").requires_grad_() for t in (x, weight)]
    with runs_kernel("conv2d", "conv2d_backward"):
        output = functional.conv2d(*leaves)
        gradients = torch.autograd.grad(output.sum(), leaves)
    assert {t.device for t in (output, *gradients)} == {leaves[0].device}
    torch.testing.assert_close(output.cpu(), F.conv2d(x, weight), rtol=1e-4, atol=1e-4)


def test_what_is_too_large_goes_to_torch() -> None:
    x, weight = torch.randn(1, 2, 40, 40, device="cuda"), torch.randn(3, 2, 17, 16, device="cuda")
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    assert explain(functional.conv2d, *leaves)["algorithm"] == "aten"
    output = functional.conv2d(*leaves)
    torch.testing.assert_close(output, F.conv2d(x, weight))
    torch.autograd.grad(output.sum(), leaves)
