"""The optimizers on a GPU against torch.optim there, with float64 as the judge."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accuracy import assert_close_to_truth
from conftest import runs_kernel
from cuda_support import assert_returns_at_once, busy_side_stream, needs_cuda
from torch import Tensor

from cnnkernels import optim

pytestmark = [needs_cuda, pytest.mark.usefixtures("poisoned")]

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SIZES: list[tuple[int, ...]] = [
    (),
    (1,),
    (3,),
    (0,),
    (7,),
    (8,),
    (64,),
    (5, 1, 3, 3),
    (1003,),
    (16, 8, 3, 3),
    (70_001,),
]
OPTIONS: list[dict[str, Any]] = [
    {"momentum": momentum, "weight_decay": weight_decay, "maximize": maximize, **more}
    for momentum, weight_decay, maximize in itertools.product((0.0, 0.9), (0.0, 0.1), (False, True))
    for more in ([{}, {"dampening": 0.3}, {"nesterov": True}] if momentum else [{}])
]

MakeOptimizer = Callable[[list[Tensor]], torch.optim.Optimizer]


def parameters(
    dtype: torch.dtype, sizes: list[tuple[int, ...]] = SIZES, device: str = "cuda"
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator).to(device, dtype).requires_grad_() for s in sizes]


def set_gradients(params: list[Tensor], step: int) -> None:
    """Sets gradients that are the same in every dtype, and exact in all of them."""
    generator = torch.Generator().manual_seed(step)
    for param in params:
        gradient = (torch.randn(param.shape, generator=generator) * 8).round().div(8)
        param.grad = gradient.to(param.device, param.dtype)


def run(make: MakeOptimizer, params: list[Tensor], steps: int = 3) -> tuple[Tensor, Tensor | None]:
    """All parameters after some steps, end to end, and all momentum buffers if there are any."""
    optimizer = make(params)
    for step in range(steps):
        set_gradients(params, step)
        optimizer.step()
    buffers = [optimizer.state[p].get("momentum_buffer") for p in params]
    return flat(params), None if buffers[0] is None else flat(buffers)


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def compare(
    options: dict[str, Any], dtype: torch.dtype, sizes: list[tuple[int, ...]] = SIZES, **torchs: Any
) -> None:
    """Compare parameters and momentum buffers after some steps, with float64 as the judge."""
    options = {"lr": 0.1, **options}
    doubles = [p.detach().double().requires_grad_() for p in parameters(dtype, sizes)]
    truth = run(lambda p: torch.optim.SGD(p, **options, foreach=False), doubles)
    with runs_kernel("sgd_step_"):
        ours = run(lambda p: optim.SGD(p, **options), parameters(dtype, sizes))
    theirs = run(lambda p: torch.optim.SGD(p, **options, **torchs), parameters(dtype, sizes))
    for name, mine, others, true in zip(
        ("parameters", "momentum buffers"), ours, theirs, truth, strict=True
    ):
        assert (mine is None) == (others is None) == (true is None)
        if mine is not None and others is not None and true is not None:
            assert_close_to_truth(mine, others, true, true.abs(), f"{options} {dtype}: {name}")


@pytest.mark.parametrize("torchs", [{"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_option(dtype: torch.dtype, options: dict[str, Any], torchs: dict[str, Any]) -> None:
    compare(options, dtype, **torchs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_more_tensors_than_a_launch_takes(dtype: torch.dtype) -> None:
    sizes = [(1 + index * 37 % 501,) for index in range(700)] + [(300_001,), (5,)]
    compare({"momentum": 0.9, "weight_decay": 0.01}, dtype, sizes, fused=True)
    compare({}, dtype, [(index % 3,) for index in range(2000)], fused=True)


@pytest.mark.parametrize("lr_dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_learning_rate_on_the_device(dtype: torch.dtype, lr_dtype: torch.dtype) -> None:
    results = []
    for lr in (0.125, torch.tensor(0.125, dtype=lr_dtype, device="cuda")):
        results.append(run(lambda p, lr=lr: optim.SGD(p, lr=lr, momentum=0.5), parameters(dtype)))
    assert torch.equal(results[0][0], results[1][0])
    on_cpu = run(
        lambda p: optim.SGD(p, lr=torch.tensor(0.125, dtype=lr_dtype), momentum=0.5),
        parameters(dtype),
    )
    assert torch.equal(results[0][0], on_cpu[0])


@pytest.mark.parametrize("cls", [optim.SGD, optim.SimpleGD])
def test_a_learning_rate_on_the_device_that_changes(cls: Any) -> None:
    lr = torch.tensor(0.5, device="cuda")
    param = torch.zeros(100, device="cuda", requires_grad=True)
    param.grad = torch.ones_like(param)
    optimizer = cls([param], lr=lr)
    optimizer.step()
    lr.fill_(0.25)
    optimizer.step()
    assert param.eq(-0.75).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_simple_gd(dtype: torch.dtype) -> None:
    params, others = parameters(dtype), parameters(dtype)
    doubles = [p.detach().double().requires_grad_() for p in params]
    with runs_kernel("gd_step_"):
        ours, _ = run(lambda p: optim.SimpleGD(p, lr=0.1), params)
    theirs, _ = run(lambda p: torch.optim.SGD(p, lr=0.1), others)
    truth, _ = run(lambda p: torch.optim.SGD(p, lr=0.1), doubles)
    assert_close_to_truth(ours, theirs, truth, truth.abs(), "SimpleGD")


@pytest.mark.sanitizer
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_length_exactly(dtype: torch.dtype) -> None:
    """Each element once, and nothing beside them, at every address a tensor can have."""
    border, momentum, lr = 5, 0.5, 0.25
    lengths = [*range(1, 70), 255, 256, 257, 1023, 1025, 4099]
    storages, params, starts = [], [], []
    for length in lengths:
        before = border + length % 8
        storage = torch.full((length + before + border,), float("nan"), dtype=dtype)
        storage[before:-border] = torch.arange(length).remainder(7)
        storages.append(storage.cuda())
        starts.append(before)
        params.append(storages[-1][before:-border].detach().requires_grad_())
        params[-1].grad = torch.arange(length).remainder(5).to(dtype).cuda()
    optimizer = optim.SGD(params, lr=lr, momentum=momentum)
    for _ in range(2):
        with runs_kernel("sgd_step_"):
            optimizer.step()
    for length, storage, before, param in zip(lengths, storages, starts, params, strict=True):
        gradient = torch.arange(length).remainder(5).double()
        first = torch.arange(length).remainder(7).double() - lr * gradient
        velocity = momentum * gradient + gradient
        after = storage.cpu().double()
        assert torch.equal(after[before:-border], first - lr * velocity)
        buffer = optimizer.state[param]["momentum_buffer"]
        assert torch.equal(buffer.cpu().double(), velocity)
        assert after[:before].isnan().all()
        assert after[-border:].isnan().all()


def test_memory_orders() -> None:
    """Equal strides step in place; other strides take torch's operations."""
    orders = {
        "channels_last": torch.randn(4, 3, 5, 5).contiguous(memory_format=torch.channels_last),
        "transposed": torch.randn(6, 7).t(),
        "sliced": torch.randn(6, 14)[:, ::2],
    }
    for (name, values), same in itertools.product(orders.items(), [True, False]):
        storage = values.cuda() if name != "sliced" else torch.randn(6, 14).cuda()[:, ::2]
        gradient = torch.randn_like(storage)
        if not same:
            gradient = gradient.contiguous()
        expected = storage - 0.5 * (1 + 1.5) * gradient
        strides = storage.stride()
        param = storage.requires_grad_() if storage.is_leaf else storage.detach().requires_grad_()
        param.grad = gradient
        optimizer = optim.SGD([param], lr=0.5, momentum=0.5)
        for _ in range(2):
            optimizer.step()
        torch.testing.assert_close(param.detach(), expected, msg=f"{name} {same}")
        assert param.stride() == strides


def test_channels_last_weights_are_stepped_by_the_kernel() -> None:
    weight = torch.randn(4, 3, 5, 5, device="cuda").to(memory_format=torch.channels_last)
    expected = weight.clone()
    weight.requires_grad_()
    optimizer = optim.SGD([weight], lr=0.5, momentum=0.5)
    for velocity in (1.0, 1.5, 1.75):
        weight.grad = torch.ones_like(weight)
        with runs_kernel("sgd_step_"):
            optimizer.step()
        expected -= 0.5 * velocity
        torch.testing.assert_close(weight.detach(), expected)
        assert weight.is_contiguous(memory_format=torch.channels_last)


def test_dtypes_and_devices_side_by_side() -> None:
    results = []
    for cls in (optim.SGD, torch.optim.SGD):
        params = [
            *parameters(torch.float32),
            *parameters(torch.float64),
            *parameters(torch.float32, device="cpu"),
            *parameters(torch.float16, SIZES[:3]),
        ]
        optimizer = cls(params, lr=0.1, momentum=0.9)
        for step in range(3):
            set_gradients(params, step)
            optimizer.step()
        results.append(params)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "weight_decay": 0.1}], ids=str)
def test_with_a_grad_scaler(options: dict[str, Any], fused: bool | None) -> None:
    results = []
    for cls in (optim.SGD, torch.optim.SGD):
        params = [torch.ones(300, device="cuda"), torch.ones(2, 2, device="cuda")]
        for param in params:
            param.requires_grad_()
        optimizer = cls(params, lr=0.1, fused=fused, **options)
        scaler = torch.amp.GradScaler("cuda", init_scale=8.0, growth_interval=2)
        for factor in (1.0, 2.0, float("inf"), 3.0):
            optimizer.zero_grad()
            loss = sum((p * p).sum() * factor for p in params)
            scaler.scale(loss).backward()
            before = [p.detach().clone() for p in params]
            scaler.step(optimizer)
            scaler.update()
            if factor == float("inf"):
                torch.testing.assert_close([p.detach() for p in params], before)
        results.append((params, scaler.get_scale()))
    torch.testing.assert_close(results[0][0], results[1][0])
    assert results[0][1] == results[1][1] == 8.0


def test_an_overflow_in_the_first_step_leaves_no_trace() -> None:
    param = torch.ones(300, device="cuda", requires_grad=True)
    optimizer = optim.SGD([param], lr=0.1, momentum=0.9, fused=True)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0)
    for factor, expected in ((float("inf"), 1.0), (1.0, 0.9), (1.0, 0.71)):
        optimizer.zero_grad()
        scaler.scale((param * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        torch.testing.assert_close(param.detach(), torch.full_like(param, expected))


@pytest.mark.parametrize("found_inf", [None, 0.0, 1.0])
@pytest.mark.parametrize("grad_scale", [None, 8.0])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("lr_on_device", [False, True])
def test_against_the_operator_of_torch(
    lr_on_device: bool, momentum: float, grad_scale: float | None, found_inf: float | None
) -> None:
    """Parameters, gradients and momentum buffers after torch._fused_sgd_ and our optimizer."""
    results = []
    for cls, arguments in ((optim.SGD, {}), (torch.optim.SGD, {"fused": True})):
        lr = torch.tensor(0.1, device="cuda") if lr_on_device else 0.1
        params = parameters(torch.float32)
        optimizer = cls(params, lr=lr, momentum=momentum, weight_decay=0.1, **arguments)
        set_gradients(params, 0)
        optimizer.step()
        set_gradients(params, 1)
        for name, value in (("grad_scale", grad_scale), ("found_inf", found_inf)):
            setattr(optimizer, name, None if value is None else torch.tensor(value, device="cuda"))
        optimizer.step()
        buffers = [optimizer.state[p].get("momentum_buffer") for p in params]
        gradients = [p.grad for p in params]
        results.append([*params, *gradients, *(b for b in buffers if b is not None)])
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_state_loads_both_ways(momentum: float) -> None:
    for first, second in ((optim.SGD, torch.optim.SGD), (torch.optim.SGD, optim.SGD)):
        params = parameters(torch.float64)
        optimizer = first(params, lr=0.1, momentum=momentum)
        set_gradients(params, 0)
        optimizer.step()
        continued = [p.detach().clone().requires_grad_() for p in params]
        other = second(continued, lr=1.0)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for ps, opt in ((params, optimizer), (continued, other)):
            set_gradients(ps, 1)
            opt.step()
        torch.testing.assert_close(params, continued)


def test_gradients_that_come_and_go() -> None:
    results = []
    for cls in (optim.SGD, torch.optim.SGD):
        params = parameters(torch.float64)
        optimizer = cls(params, lr=0.1, momentum=0.9, weight_decay=0.1)
        for step in range(6):
            set_gradients(params, step)
            params[step % 4].grad = None
            if step == 3:
                params[5].data = params[5].detach().clone() * 2
                params[9].data = params[9].detach().to(memory_format=torch.channels_last)
            optimizer.step()
        results.append(params)
    torch.testing.assert_close(*results)


def test_saved_parameters_are_noticed() -> None:
    param = torch.ones(3, device="cuda", requires_grad=True)
    output = (param * param).sum()
    param.grad = torch.ones_like(param)
    optim.SGD([param], lr=0.1).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward()


def test_repeats_are_equal_bit_by_bit() -> None:
    results = [
        run(lambda p: optim.SGD(p, lr=0.1, momentum=0.9), parameters(torch.float32))
        for _ in range(3)
    ]
    for params, buffers in results[1:]:
        assert torch.equal(params, results[0][0])
        assert torch.equal(buffers, results[0][1])


@pytest.mark.parametrize("tensors", [1, 12, 700])
@pytest.mark.parametrize("on_device", ["nothing", "lr", "scale"])
def test_a_step_does_not_wait_for_the_device(on_device: str, tensors: int) -> None:
    params = parameters(torch.float32, [(100 + index,) for index in range(tensors)])
    set_gradients(params, 0)
    lr = torch.tensor(0.1, device="cuda") if on_device == "lr" else 0.1
    optimizer = optim.SGD(params, lr=lr, momentum=0.9, weight_decay=0.1)
    if on_device == "scale":
        optimizer.grad_scale = torch.tensor(1.0, device="cuda")
        optimizer.found_inf = torch.tensor(0.0, device="cuda")
    with runs_kernel("sgd_step_"):
        assert_returns_at_once(optimizer.step)


def test_the_current_stream_is_used() -> None:
    results = []
    for cls in (optim.SGD, torch.optim.SGD):
        params = parameters(torch.float32)
        set_gradients(params, 0)
        late = [param.grad for param in params]
        for param in params:
            param.grad = torch.zeros_like(param)
        optimizer = cls(params, lr=0.1, momentum=0.9)
        torch.cuda.synchronize()
        with busy_side_stream():
            for param, gradient in zip(params, late, strict=True):
                param.grad.copy_(gradient)
            optimizer.step()
            optimizer.step()
        torch.cuda.synchronize()
        results.append(params)
    torch.testing.assert_close(*results)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU only")
def test_the_device_of_the_parameters_is_used() -> None:
    results = []
    for cls in (optim.SGD, torch.optim.SGD):
        params = [*parameters(torch.float32, device="cuda:1"), *parameters(torch.float32)]
        optimizer = cls(params, lr=0.1, momentum=0.9)
        for step in range(2):
            set_gradients(params, step)
            optimizer.step()
        results.append(params)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("tensors", [1, 3])
def test_more_elements_than_32_bits_count(tensors: int) -> None:
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("it takes 40 GiB of memory of the GPU")
    elements = 2**31 + 129
    params = [
        torch.zeros(elements if index == 0 else 1000, dtype=torch.float16, device="cuda")
        for index in range(tensors)
    ]
    for param in params:
        param.requires_grad_()
        param.grad = torch.ones_like(param)
    optimizer = optim.SGD(params, lr=0.5, momentum=0.5)
    for _ in range(2):
        with runs_kernel("sgd_step_"):
            optimizer.step()
    for param in params:
        least, most = param.detach().aminmax()
        assert (least.item(), most.item()) == (-1.25, -1.25)


@pytest.mark.sanitizer
@pytest.mark.parametrize("options", OPTIONS[:: len(OPTIONS) // 4], ids=str)
def test_tiny_steps(options: dict[str, Any]) -> None:
    """Little of torch runs on the GPU here: what compute-sanitizer finds is ours."""
    sizes: list[tuple[int, ...]] = [(5,), (0,), (3, 4), (1,), (1500,)]
    ours, theirs = parameters(torch.float32, sizes), parameters(torch.float32, sizes, "cpu")
    optimizer = optim.SGD(ours, lr=torch.tensor(0.1).cuda(), **options)
    peer = torch.optim.SGD(theirs, lr=0.1, **options)
    for step in range(2):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        with runs_kernel("sgd_step_"):
            optimizer.step()
        peer.step()
    torch.testing.assert_close([p.detach().cpu() for p in ours], [p.detach() for p in theirs])
