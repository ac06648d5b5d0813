"""gd_step_ and sgd_step_ against torch.optim and float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from conftest import BACKENDS, ISAS, runs_kernel, set_tier
from torch import Tensor

from cnnkernels import optim

pytestmark = pytest.mark.usefixtures("isa", "poisoned")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SIZES: list[tuple[int, ...]] = [
    (),
    (1,),
    (3,),
    (7,),
    (8,),
    (17,),
    (64,),
    (5, 1, 3, 3),
    (0,),
    (1003,),
]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.3},
    {"momentum": 0.9, "nesterov": True},
    {"weight_decay": 0.1},
    {"momentum": 0.9, "weight_decay": 0.1, "maximize": True},
    {"maximize": True},
]


def parameters(dtype: torch.dtype, sizes: list[tuple[int, ...]] = SIZES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in sizes]


def run(optimizer: torch.optim.Optimizer, params: list[Tensor], steps: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for p in params:
            gradient = torch.randn(p.shape, generator=generator)
            # The same numbers for every dtype, exact in all of them.
            p.grad = (gradient * 8).round().div(8).to(p.dtype).contiguous()
        optimizer.step()
    return params


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sgd_against_float64(dtype: torch.dtype, options: dict[str, Any]) -> None:
    start = [p.detach().clone() for p in parameters(dtype)]
    doubles = [p.double().clone().requires_grad_() for p in start]
    truth = run(torch.optim.SGD(doubles, lr=0.1, **options), doubles)
    ours = [p.clone().requires_grad_() for p in start]
    with runs_kernel("sgd_step_"):
        run(optim.SGD(ours, lr=0.1, **options), ours)
    tolerance = {
        torch.float64: 1e-14,
        torch.float32: 3e-6,
        torch.bfloat16: 4e-2,
        torch.float16: 5e-3,
    }[dtype]
    for mine, true, first in zip(ours, truth, start, strict=True):
        torch.testing.assert_close(mine.double(), true.double(), rtol=tolerance, atol=tolerance)
        if mine.numel() > 8:
            # Every block of a vector is stepped, in 16-bit types too.
            assert (mine != first).double().mean() > 0.9


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_simple_gd(dtype: torch.dtype) -> None:
    params, others = parameters(dtype), parameters(dtype)
    with runs_kernel("gd_step_"):
        run(optim.SimpleGD(params, lr=0.25), params)
    run(torch.optim.SGD(others, lr=0.25), others)
    for mine, torchs in zip(params, others, strict=True):
        torch.testing.assert_close(
            mine, torchs, rtol=2e-2 if dtype.itemsize == 2 else 1e-6, atol=1e-6
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_length_exactly(dtype: torch.dtype) -> None:
    """Each element once, and nothing beside them: torch's fused step skips 16-bit elements."""
    border, momentum, lr = 5, 0.5, 0.25
    lengths = range(1, 201)
    storages, params = [], []
    for length in lengths:
        storage = torch.full((length + 2 * border,), float("nan"), dtype=dtype)
        storage[border:-border] = torch.arange(length).remainder(7)
        storages.append(storage)
        params.append(storage[border:-border].detach().requires_grad_())
        params[-1].grad = torch.arange(length).remainder(5).to(dtype)
    optimizer = optim.SGD(params, lr=lr, momentum=momentum)
    for _ in range(2):
        with runs_kernel("sgd_step_"):
            optimizer.step()
    for length, storage, param in zip(lengths, storages, params, strict=True):
        gradient = torch.arange(length).remainder(5).double()
        first = torch.arange(length).remainder(7).double() - lr * gradient
        velocity = momentum * gradient + gradient
        assert torch.equal(param.detach().double(), first - lr * velocity)
        assert torch.equal(optimizer.state[param]["momentum_buffer"].double(), velocity)
        assert storage[:border].isnan().all()
        assert storage[-border:].isnan().all()


@pytest.mark.parametrize("total", [49_151, 49_152, 49_153, 73_733])
def test_results_do_not_depend_on_threads(total: int) -> None:
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            params = parameters(torch.float32, [(5,), (total - 1030,), (0,), (1025,)])
            run(optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.01), params)
            results.append(params)
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_step_runs_on_the_tier_of_the_moment(isa: str) -> None:
    """Tiers round differently: a plan that is kept must not outlive the choice of one."""
    (param,) = parameters(torch.float32, [(4001,)])
    param.grad = param.detach().flip(0)
    optimizer = optim.SimpleGD([param], lr=0.1)
    results = []
    for tier in (*ISAS, isa):
        set_tier(tier)
        fresh = param.detach().clone().requires_grad_()
        fresh.grad = param.grad
        optimizer.step()
        optim.SimpleGD([fresh], lr=0.1).step()
        results.append((param.detach().clone(), fresh.detach()))
    assert all(torch.equal(*pair) for pair in results)


@pytest.mark.parametrize("threads", [1, 2])
def test_chunks_and_threads(threads: int) -> None:
    """Lists long enough for parallel chunks, with borders of tensors anywhere in them."""
    sizes: list[tuple[int, ...]] = [(4095,), (1,), (4097,), (100_001,), (13,), (40_000,)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for options in ({}, {"momentum": 0.9, "nesterov": True}):
            ours, theirs = parameters(torch.float64, sizes), parameters(torch.float64, sizes)
            run(optim.SGD(ours, lr=0.1, **options), ours)
            run(torch.optim.SGD(theirs, lr=0.1, **options), theirs)
            for mine, torchs in zip(ours, theirs, strict=True):
                torch.testing.assert_close(mine, torchs, rtol=1e-14, atol=1e-14)
    finally:
        torch.set_num_threads(before)


def test_memory_orders() -> None:
    """Equal strides step in place; other strides take torch's operations."""
    orders = {
        "channels_last": torch.randn(4, 3, 5, 5).contiguous(memory_format=torch.channels_last),
        "transposed": torch.randn(6, 7).t(),
        "sliced": torch.randn(6, 14)[:, ::2],
    }
    for (name, param), same in itertools.product(orders.items(), [True, False]):
        start = param.clone(memory_format=torch.preserve_format)
        storage = param if name == "sliced" else start
        gradient = torch.randn_like(param)
        if not same:
            gradient = gradient.contiguous()
        expected = storage - 0.5 * gradient
        torch.ops.cnnkernels.gd_step_([storage], [gradient], 0.5)
        torch.testing.assert_close(storage, expected, msg=f"{name} {same}")


def test_versions_are_bumped() -> None:
    param, gradient, buffer = torch.ones(4), torch.ones(4), torch.ones(4)
    torch.ops.cnnkernels.gd_step_([param], [gradient], 0.1)
    assert param._version == 1
    assert gradient._version == 0
    torch.ops.cnnkernels.sgd_step_(
        [param], [gradient], [buffer], weight_decay=0.0, momentum=0.9, lr=0.1, dampening=0.0,
        nesterov=False, maximize=False, is_first_step=False, grad_scale=torch.tensor(2.0),
    )  # fmt: skip
    assert (param._version, gradient._version, buffer._version) == (2, 1, 1)


def test_saved_parameter_is_noticed() -> None:
    param = torch.ones(4, requires_grad=True)
    loss = (param * param).sum()
    with torch.no_grad():
        torch.ops.cnnkernels.gd_step_([param], [torch.ones(4)], 0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("found_inf", [None, 0.0, 1.0])
@pytest.mark.parametrize("grad_scale", [None, 8.0])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_against_the_operator_of_torch(
    options: dict[str, Any], first: bool, grad_scale: float | None, found_inf: float | None
) -> None:
    """Parameters, gradients, momentum buffers and versions after torch._fused_sgd_ and ours."""
    settings = {
        "weight_decay": 0.0,
        "momentum": 0.0,
        "dampening": 0.0,
        "nesterov": False,
        "maximize": False,
        "lr": 0.1,
        **options,
        "is_first_step": first,
        "grad_scale": None if grad_scale is None else torch.tensor(grad_scale),
        "found_inf": None if found_inf is None else torch.tensor(found_inf),
    }
    with_buffers = settings["momentum"] != 0
    results = []
    for operator in (torch.ops.cnnkernels.sgd_step_, torch._fused_sgd_):
        generator = torch.Generator().manual_seed(2)
        lists = [[torch.randn(size, generator=generator) for size in SIZES] for _ in range(3)]
        operator(lists[0], lists[1], lists[2] if with_buffers else [], **settings)
        results.append([tensor for tensors in lists for tensor in tensors])
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lr_dtype", [torch.float32, torch.float64], ids=str)
def test_a_learning_rate_in_a_tensor(dtype: torch.dtype, lr_dtype: torch.dtype) -> None:
    """The same step as with the number that the tensor holds."""
    lr = torch.tensor(0.1, dtype=lr_dtype)
    gradient = torch.randn(40, dtype=torch.float64).to(dtype)
    first = torch.randn(40, dtype=torch.float64).to(dtype)
    params, buffers = [first.clone() for _ in range(4)], [torch.ones_like(first) for _ in range(2)]
    torch.ops.cnnkernels.gd_step_([params[0]], [gradient], lr)
    torch.ops.cnnkernels.gd_step_([params[1]], [gradient], lr.item())
    for param, buffer, rate in zip(params[2:], buffers, (lr, lr.item()), strict=True):
        torch.ops.cnnkernels.sgd_step_(
            [param], [gradient], [buffer], weight_decay=0.1, momentum=0.9, lr=rate, dampening=0.0,
            nesterov=True, maximize=False, is_first_step=False,
        )  # fmt: skip
    assert torch.equal(params[0], params[1])
    assert torch.equal(params[2], params[3])
    assert not torch.equal(params[0], first)


def test_dtypes_in_one_list() -> None:
    params = [torch.ones(30, dtype=dtype) for dtype in (*DTYPES, *reversed(DTYPES))]
    gradients = [torch.full_like(param, 0.5) for param in params]
    torch.ops.cnnkernels.gd_step_(params, gradients, 0.5)
    for param in params:
        assert param.eq(0.75).all(), param.dtype


@pytest.mark.parametrize("name", ["lr", "grad_scale", "found_inf"])
@pytest.mark.parametrize("number", [torch.ones(2), torch.tensor(1j)], ids=["two", "complex"])
def test_numbers_that_are_none_are_refused(name: str, number: Tensor) -> None:
    param, gradient = torch.ones(3), torch.ones(3)
    numbers = {"lr": torch.tensor(0.1), name: number}
    with pytest.raises(RuntimeError, match=f"sgd_step_: {name} must "):
        torch.ops.cnnkernels.sgd_step_(
            [param], [gradient], [], weight_decay=0.0, momentum=0.0, dampening=0.0,
            nesterov=False, maximize=False, is_first_step=False, **numbers,
        )  # fmt: skip
    assert param.eq(1).all()
    assert gradient.eq(1).all()


def test_scaling_and_found_inf() -> None:
    def step(found: float) -> tuple[Tensor, Tensor]:
        param, gradient = torch.ones(20), torch.full((20,), 4.0)
        torch.ops.cnnkernels.sgd_step_(
            [param], [gradient], [], weight_decay=0.0, momentum=0.0, lr=1.0, dampening=0.0,
            nesterov=False, maximize=False, is_first_step=False,
            grad_scale=torch.tensor(8.0), found_inf=torch.tensor(found),
        )  # fmt: skip
        return param, gradient

    param, gradient = step(0.0)
    assert param.eq(0.5).all()
    assert gradient.eq(0.5).all()
    param, gradient = step(1.0)
    assert param.eq(1).all()
    assert gradient.eq(4).all()


@pytest.mark.parametrize(
    ("params", "grads", "message"),
    [
        ([torch.ones(3)], [torch.ones(4)], r"grads\[0\]"),
        ([torch.ones(3)], [], "grads must have as many"),
        ([torch.ones(3, requires_grad=True)], [torch.ones(3)], r"params\[0\] requires grad"),
    ],
)
def test_bad_lists(params: list[Tensor], grads: list[Tensor], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.cnnkernels.gd_step_(params, grads, 0.1)
    assert all(p.detach().eq(1).all() for p in params)


def test_versions_are_bumped_where_torch_does_the_step() -> None:
    """Another memory order takes torch's operations, below autograd: the trace must be left too."""
    param = torch.ones(2, 3, 4, 4)
    gradient = torch.ones_like(param).contiguous(memory_format=torch.channels_last)
    torch.ops.cnnkernels.gd_step_([param], [gradient], 0.25)
    assert param._version == 1
    assert param.eq(0.75).all()


def test_a_tensor_listed_twice_is_stepped_twice() -> None:
    param, gradient = torch.ones(300_000), torch.ones(300_000)
    for _ in range(5):
        torch.ops.cnnkernels.gd_step_([param, param], [gradient, gradient], 0.125)
    assert param.eq(1 - 10 * 0.125).all()


def test_a_gradient_that_cannot_be_cast_changes_nothing() -> None:
    params, grads = [torch.ones(3), torch.ones(3)], [torch.ones(3), torch.ones(3).cfloat()]
    with pytest.raises(RuntimeError, match=r"grads\[1\]"):
        torch.ops.cnnkernels.gd_step_(params, grads, 0.5)
    assert params[0].eq(1).all()


def test_a_refused_step_changes_nothing() -> None:
    params = [torch.ones(2, dtype=torch.complex64), torch.ones(2), torch.ones(2, dtype=torch.int64)]
    with pytest.raises(RuntimeError):
        torch.ops.cnnkernels.gd_step_(params, [torch.ones_like(p) for p in params], 0.5)
    if BACKENDS[0] == "native":
        assert all(torch.equal(p, torch.ones_like(p)) and p._version == 0 for p in params)


def test_inference_tensors_change_in_inference_mode_only(backend: str) -> None:
    with torch.inference_mode():
        param, grad = torch.ones(3), torch.ones(3)
    with pytest.raises(RuntimeError, match=r"[Ii]nference"):
        torch.ops.cnnkernels.gd_step_([param], [grad], 0.5)
    assert torch.equal(param, torch.ones(3))


@pytest.mark.skipif(BACKENDS[0] != "native", reason="torch's own step crashes there")
def test_a_parameter_without_memory_is_refused() -> None:
    params = [torch.ones(3, requires_grad=True), torch.ones(4, requires_grad=True)]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = optim.SimpleGD(params, lr=0.5)
    optimizer.step()
    params[1].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="not allocated"):
        optimizer.step()
    assert params[0].eq(0.5).all()
