"""cnnkernels.optim against torch.optim, and against gradient descent written out."""

from __future__ import annotations

import copy
import inspect
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import runs_kernel
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode

from cnnkernels import optim

pytestmark = pytest.mark.usefixtures("backend")

SIZES = [(3,), (4, 5), (2, 3, 3, 3), (1,), (0,)]


def parameters(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(size, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
        for size in SIZES
    ]


def set_gradients(params: list[Tensor], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for param in params:
        grad = torch.randn(param.shape, dtype=torch.float64, generator=generator)
        param.grad = grad.to(param.dtype)


def assert_same_steps(
    ours: Callable[[list[Tensor]], torch.optim.Optimizer],
    theirs: Callable[[list[Tensor]], torch.optim.Optimizer],
    steps: int = 4,
    dtype: torch.dtype = torch.float64,
    **tolerance: float,
) -> None:
    our_params, their_params = parameters(dtype), parameters(dtype)
    our_optimizer, their_optimizer = ours(our_params), theirs(their_params)
    for step in range(steps):
        for params, optimizer in ((our_params, our_optimizer), (their_params, their_optimizer)):
            set_gradients(params, step)
            optimizer.step()
    torch.testing.assert_close(our_params, their_params, **tolerance)
    assert_same_state(our_optimizer, their_optimizer, **tolerance)


def assert_same_state(
    ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer, **tolerance: float
) -> None:
    our_state, their_state = ours.state_dict(), theirs.state_dict()
    assert our_state["param_groups"] == their_state["param_groups"]
    assert our_state["state"].keys() == their_state["state"].keys()
    for index, state in our_state["state"].items():
        assert state.keys() == their_state["state"][index].keys()
        for name, value in state.items():
            torch.testing.assert_close(value, their_state["state"][index][name], **tolerance)


SETTINGS: list[dict[str, Any]] = [
    {},
    {"lr": 0.1},
    {"lr": 0.1, "maximize": True},
    {"lr": 0.1, "weight_decay": 0.3},
    {"lr": 0.1, "momentum": 0.9},
    {"lr": 0.1, "momentum": 0.9, "dampening": 0.4, "weight_decay": 0.01},
    {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01, "maximize": True},
    {"lr": 0.1, "momentum": 0.9, "foreach": True},
    {"lr": 0.1, "momentum": 0.9, "fused": True},
    {"lr": torch.tensor(0.1, dtype=torch.float64), "momentum": 0.9},
    {"lr": torch.tensor([0.1], dtype=torch.float64)},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_sgd(settings: dict[str, Any]) -> None:
    with runs_kernel("sgd_step_"):
        assert_same_steps(
            lambda p: optim.SGD(p, **settings), lambda p: torch.optim.SGD(p, **settings)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sgd_dtypes(dtype: torch.dtype) -> None:
    settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
    tolerance = {"rtol": 3e-2, "atol": 3e-2} if dtype != torch.float32 else {}
    with runs_kernel("sgd_step_"):
        assert_same_steps(
            lambda p: optim.SGD(p, **settings),
            lambda p: torch.optim.SGD(p, **settings),
            dtype=dtype,
            **tolerance,
        )


def test_sgd_arguments_are_those_of_torch() -> None:
    assert inspect.signature(optim.SGD) == inspect.signature(torch.optim.SGD)


@pytest.mark.parametrize(
    "settings",
    [
        {"lr": -1.0},
        {"momentum": -0.1},
        {"weight_decay": -0.1},
        {"nesterov": True},
        {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
        {"lr": torch.tensor([0.1, 0.2])},
        {"fused": True, "foreach": True},
        {"fused": True, "differentiable": True},
        {"epsilon": 1.0},
    ],
    ids=str,
)
def test_sgd_errors_are_those_of_torch(settings: dict[str, Any]) -> None:
    with pytest.raises((ValueError, RuntimeError, TypeError)) as expected:
        torch.optim.SGD(parameters(), **settings)
    with pytest.raises(expected.type) as error:
        optim.SGD(parameters(), **settings)
    assert str(error.value) == str(expected.value)


def test_sgd_groups_and_parameters_without_gradients() -> None:
    def build(cls: type[torch.optim.SGD]) -> Callable[[list[Tensor]], torch.optim.Optimizer]:
        return lambda p: cls(
            [{"params": p[:2], "lr": 0.2, "momentum": 0.5}, {"params": p[2:]}], lr=0.1
        )

    assert_same_steps(build(optim.SGD), build(torch.optim.SGD))

    params = [torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)]
    optimizer = optim.SGD(params, lr=0.5, momentum=0.9)
    optimizer.step()
    assert not optimizer.state
    params[1].grad = torch.ones(3)
    optimizer.step()
    torch.testing.assert_close([p.detach() for p in params], [torch.ones(2), torch.full((3,), 0.5)])
    assert list(optimizer.state) == [params[1]]


def test_sgd_first_gradients_at_different_steps() -> None:
    results = []
    for cls in (optim.SGD, torch.optim.SGD):
        params = parameters()
        optimizer = cls(params, lr=0.1, momentum=0.9, dampening=0.5, nesterov=False)
        for step in range(3):
            set_gradients(params, step)
            if step == 0:
                params[0].grad = params[2].grad = None
            optimizer.step()
        results.append((params, optimizer))
    torch.testing.assert_close(results[0][0], results[1][0])
    assert_same_state(results[0][1], results[1][1])


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_state_loads_both_ways(momentum: float) -> None:
    for first, second in ((optim.SGD, torch.optim.SGD), (torch.optim.SGD, optim.SGD)):
        params = parameters()
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
        assert_same_state(optimizer, other)


def test_sgd_deepcopies_and_pickles() -> None:
    params = parameters()
    optimizer = optim.SGD(params, lr=0.1, momentum=0.9)
    set_gradients(params, 0)
    optimizer.step()
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert type(other) is optim.SGD
        assert_same_state(other, optimizer)
        other.step()


@pytest.mark.parametrize("fused", [None, True])
def test_sgd_with_a_grad_scaler(fused: bool | None) -> None:
    results = []
    for cls in (optim.SGD, torch.optim.SGD):
        params = [torch.ones(3, requires_grad=True), torch.ones(2, 2, requires_grad=True)]
        optimizer = cls(params, lr=0.1, momentum=0.9, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
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


def test_sgd_overflow_in_the_first_step_leaves_no_momentum() -> None:
    param = torch.ones(3, requires_grad=True)
    optimizer = optim.SGD([param], lr=0.1, momentum=0.9, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for factor, expected in ((float("inf"), 1.0), (1.0, 0.9)):
        optimizer.zero_grad()
        scaler.scale((param * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        torch.testing.assert_close(param.detach(), torch.full((3,), expected))
        assert ("momentum_buffer" in optimizer.state[param]) == (factor == 1.0)


def test_sgd_with_a_scheduler() -> None:
    results = []
    for cls in (optim.SGD, torch.optim.SGD):
        params = parameters()
        optimizer = cls(params, lr=0.1, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.5, total_steps=6)
        for step in range(6):
            set_gradients(params, step)
            optimizer.step()
            if step < 5:
                scheduler.step()
        results.append(params)
    torch.testing.assert_close(results[0], results[1])


def test_sgd_that_is_differentiated() -> None:
    results = []
    for cls in (optim.SGD, torch.optim.SGD):
        param = torch.tensor([1.0, 2.0], requires_grad=True)
        lr = torch.tensor(0.5, requires_grad=True)
        updated = param.clone()
        updated.grad = 3 * param
        cls([updated], lr=lr, differentiable=True).step()
        results.append(torch.autograd.grad(updated.sum(), (param, lr)))
    torch.testing.assert_close(results[0], results[1])


def test_sgd_on_what_the_kernel_does_not_cover() -> None:
    """Sparse gradients, complex numbers, and dtypes side by side take torch's path."""
    results = []
    for cls in (optim.SGD, torch.optim.SGD):
        embedding = torch.nn.Embedding(4, 2, sparse=True)
        torch.nn.init.ones_(embedding.weight)
        others = [
            torch.ones(2, dtype=torch.cfloat, requires_grad=True),
            torch.ones(2, dtype=torch.float64, requires_grad=True),
        ]
        optimizer = cls([*others, embedding.weight], lr=0.1)
        (
            embedding(torch.tensor([1, 1, 3])).sum() + sum((p * p).abs().sum() for p in others)
        ).backward()
        optimizer.step()
        results.append([embedding.weight, *others])
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize(
    ("build", "kernel"),
    [
        (lambda p: optim.SimpleGD(p, lr=0.1), "gd_step_"),
        (lambda p: optim.SGD(p, lr=0.1, momentum=0.9), "sgd_step_"),
    ],
    ids=["SimpleGD", "SGD"],
)
class TestEveryStep:
    """What holds for both optimizers."""

    def test_closure_runs_with_gradients_and_its_loss_is_returned(
        self, build: Any, kernel: str
    ) -> None:
        param = torch.tensor([2.0], requires_grad=True)
        optimizer = build([param])

        def closure() -> Tensor:
            assert torch.is_grad_enabled()
            optimizer.zero_grad()
            loss = (param * param).sum()
            loss.backward()
            return loss

        with torch.no_grad(), runs_kernel(kernel):
            loss = optimizer.step(closure)
        assert loss.item() == 4.0
        assert param.item() == pytest.approx(1.6)
        assert optimizer.step() is None

    def test_version_counters_go_up(self, build: Any, kernel: str) -> None:
        param = torch.ones(3, requires_grad=True)
        output = (param * param).sum()
        param.grad = torch.ones(3)
        version = param._version
        with runs_kernel(kernel):
            build([param]).step()
        assert param._version > version
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.backward()

    def test_hooks(self, build: Any, kernel: str) -> None:
        param = torch.ones(3, requires_grad=True)
        param.grad = torch.ones(3)
        optimizer, calls = build([param]), []
        optimizer.register_step_pre_hook(lambda *_: calls.append(param[0].item()))
        optimizer.register_step_post_hook(lambda *_: calls.append(param[0].item()))
        optimizer.step()
        assert calls == [1.0, pytest.approx(0.9)]

    def test_hooks_on_all_optimizers(self, build: Any, kernel: str) -> None:
        param = torch.ones(3, requires_grad=True)
        calls: list[Any] = []
        handle = register_optimizer_step_post_hook(
            lambda optimizer, args, kwargs: calls.append(optimizer)
        )
        optimizer = build([param])
        try:
            optimizer.step()
        finally:
            handle.remove()
        optimizer.step()
        assert calls == [optimizer]

    def test_profilers_see_the_step(self, build: Any, kernel: str) -> None:
        optimizer = build([torch.ones(3, requires_grad=True)])
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            optimizer.step()
        names = [event.name for event in profile.events()]
        assert names.count(f"Optimizer.step#{type(optimizer).__name__}.step") == 1

    def test_any_strides(self, build: Any, kernel: str) -> None:
        params = [
            torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
            torch.randn(6, 5).t(),
            torch.randn(10)[::2],
        ]
        grads = [torch.randn(2, 3, 4, 4), torch.randn(5, 6), torch.randn(5)]
        expected = [p - 0.1 * g for p, g in zip(params, grads, strict=True)]
        for param, grad in zip(params, grads, strict=True):
            param.requires_grad_()
            param.grad = grad
        build(params).step()
        torch.testing.assert_close([p.detach() for p in params], expected)

    def test_nothing_to_do(self, build: Any, kernel: str) -> None:
        param = torch.ones(3, requires_grad=True)
        build([param]).step()
        torch.testing.assert_close(param.detach(), torch.ones(3))


def test_leaves_that_require_grad_only_change_without_grad() -> None:
    """The operators themselves keep the rule that torch's own in-place operators have."""
    param, grad = torch.ones(3, requires_grad=True), torch.ones(3)
    with pytest.raises(RuntimeError, match=r"leaf|requires grad"):
        torch.ops.cnnkernels.gd_step_([param], [grad], 0.1)
    torch.testing.assert_close(param.detach(), torch.ones(3))
    with torch.no_grad():
        torch.ops.cnnkernels.gd_step_([param], [grad], 0.1)
    torch.testing.assert_close(param.detach(), torch.full((3,), 0.9))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_simple_gd(dtype: torch.dtype) -> None:
    params = parameters(dtype)
    set_gradients(params, 0)
    expected = [
        (p.double() - 0.1 * p.grad.double()).to(dtype) for p in params if p.grad is not None
    ]
    with runs_kernel("gd_step_"):
        optim.SimpleGD(params, lr=0.1).step()
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(
        [p.detach() for p in params], [e.detach() for e in expected], **tolerance
    )


def test_simple_gd_groups_and_tensor_lr() -> None:
    a, b = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    a.grad = b.grad = torch.ones(2)
    optim.SimpleGD([{"params": [a], "lr": 0.5}, {"params": [b]}], lr=torch.tensor(0.25)).step()
    assert (a[0].item(), b[0].item()) == (0.5, 0.75)


@pytest.mark.parametrize("lr", [-0.1, torch.tensor([0.1, 0.2])])
def test_simple_gd_bad_lr(lr: Any) -> None:
    with pytest.raises(ValueError, match=r"lr|learning rate"):
        optim.SimpleGD(parameters(), lr=lr)


def test_simple_gd_needs_an_lr_and_an_iterable() -> None:
    with pytest.raises(TypeError):
        optim.SimpleGD(parameters())  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="iterable of Tensors"):
        optim.SimpleGD(torch.ones(2), lr=0.1)


def test_simple_gd_minimises_x_squared() -> None:
    """Chapter 2 of the tutorial: each step multiplies x by 1 - 2 lr."""
    x = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    optimizer = optim.SimpleGD([x], lr=0.1)
    for _ in range(50):
        optimizer.zero_grad()
        (x**2).sum().backward()
        optimizer.step()
    assert x.item() == pytest.approx(0.8**50)


@pytest.mark.parametrize("optimizer", [optim.SGD, optim.SimpleGD])
def test_a_learning_rate_is_a_number(optimizer: Any) -> None:
    param = torch.ones(2, requires_grad=True)
    ours = optimizer([param], lr=0.1)
    param.grad = torch.ones(2)
    ours.param_groups[0]["lr"] = "0.1"
    with pytest.raises(TypeError):
        ours.step()
    assert torch.equal(param, torch.ones(2))


def _replace_data(optimizer: torch.optim.Optimizer, params: list[Tensor]) -> None:
    params[0].data = params[0].detach().clone() * 2
    params[2].data = params[2].detach().to(memory_format=torch.channels_last)


def _shrink_data(optimizer: torch.optim.Optimizer, params: list[Tensor]) -> None:
    params[0].data = params[0].detach()[:2].clone()
    params[0].grad = None
    if params[0] in optimizer.state:
        buffer = optimizer.state[params[0]]["momentum_buffer"]
        optimizer.state[params[0]]["momentum_buffer"] = buffer[:2].clone()


def _replace_buffers(optimizer: torch.optim.Optimizer, params: list[Tensor]) -> None:
    for state in optimizer.state.values():
        state["momentum_buffer"] = state["momentum_buffer"].clone() * 0.5


def _replace_data_of_buffers(optimizer: torch.optim.Optimizer, params: list[Tensor]) -> None:
    for state in optimizer.state.values():
        buffer = state["momentum_buffer"]
        buffer.data = buffer.clone() * 0.5
        if buffer.dim() == 4:
            buffer.data = buffer.data.to(memory_format=torch.channels_last)


def _narrow_buffers(optimizer: torch.optim.Optimizer, params: list[Tensor]) -> None:
    for state in optimizer.state.values():
        state["momentum_buffer"] = state["momentum_buffer"].float()


def _forget_a_buffer(optimizer: torch.optim.Optimizer, params: list[Tensor]) -> None:
    optimizer.state[params[1]] = {}


def _forget_the_state(optimizer: torch.optim.Optimizer, params: list[Tensor]) -> None:
    optimizer.state.clear()


def _turn_the_state_around(optimizer: torch.optim.Optimizer, params: list[Tensor]) -> None:
    entries = list(optimizer.state.items())
    optimizer.state.clear()
    optimizer.state.update(reversed(entries))


def _load_state(optimizer: torch.optim.Optimizer, params: list[Tensor]) -> None:
    state = copy.deepcopy(optimizer.state_dict())
    for of_param in state["state"].values():
        if of_param.get("momentum_buffer") is not None:
            of_param["momentum_buffer"].mul_(-1)
    state["param_groups"][0]["lr"] = 0.3
    optimizer.load_state_dict(state)


def _add_a_group(optimizer: torch.optim.Optimizer, params: list[Tensor]) -> None:
    params.append(torch.full((6,), 0.5, dtype=torch.float64, requires_grad=True))
    optimizer.add_param_group({"params": [params[-1]], "lr": 0.7})


def _extend_a_group(optimizer: torch.optim.Optimizer, params: list[Tensor]) -> None:
    params.insert(0, torch.full((6,), 0.5, dtype=torch.float64, requires_grad=True))
    optimizer.param_groups[0]["params"].insert(0, params[0])


def _turn_a_group_around(optimizer: torch.optim.Optimizer, params: list[Tensor]) -> None:
    optimizer.param_groups[0]["params"].reverse()


def _replace_a_group(optimizer: torch.optim.Optimizer, params: list[Tensor]) -> None:
    optimizer.param_groups[0]["params"] = params[1:]
    params[0].grad = None


def _shorten_a_group(optimizer: torch.optim.Optimizer, params: list[Tensor]) -> None:
    for param in params[3:]:
        param.grad = None
        optimizer.state.pop(param, None)
    del optimizer.param_groups[0]["params"][3:]


def _list_a_parameter_twice(optimizer: torch.optim.Optimizer, params: list[Tensor]) -> None:
    optimizer.param_groups[0]["params"][0] = params[1]


def _freeze(optimizer: torch.optim.Optimizer, params: list[Tensor]) -> None:
    params[0].requires_grad_(False)
    params[0].grad = None


def _change_the_options(optimizer: torch.optim.Optimizer, params: list[Tensor]) -> None:
    optimizer.param_groups[0].update(lr=1, weight_decay=torch.tensor(0.5), maximize=True)


@pytest.mark.parametrize(
    "change",
    [
        _replace_data,
        _shrink_data,
        _replace_buffers,
        _replace_data_of_buffers,
        _narrow_buffers,
        _forget_a_buffer,
        _forget_the_state,
        _turn_the_state_around,
        _load_state,
        _add_a_group,
        _extend_a_group,
        _turn_a_group_around,
        _replace_a_group,
        _shorten_a_group,
        _list_a_parameter_twice,
        _freeze,
        _change_the_options,
    ],
)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_takes_up_what_has_changed(
    momentum: float, change: Callable[[torch.optim.Optimizer, list[Tensor]], None]
) -> None:
    results = []
    for cls in (optim.SGD, torch.optim.SGD):
        params = parameters()
        optimizer = cls(params, lr=0.1, momentum=momentum)
        for step in range(5):
            if step == 3:
                change(optimizer, params)
            set_gradients([p for p in params if p.requires_grad], step)
            optimizer.step()
        buffers = [optimizer.state[p].get("momentum_buffer") for p in params]
        results.append((params, buffers))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_with_gradients_that_come_and_go_and_change_their_order(momentum: float) -> None:
    results = []
    for cls in (optim.SGD, torch.optim.SGD):
        params = parameters()
        optimizer = cls(params, lr=0.1, momentum=momentum, weight_decay=0.1)
        for step in range(8):
            optimizer.zero_grad(set_to_none=step % 3 != 2)
            set_gradients(params, step)
            params[step % 4].grad = None
            if step % 3 == 0 and params[2].grad is not None:
                params[2].grad = params[2].grad.to(memory_format=torch.channels_last)
            optimizer.step()
        results.append((params, optimizer))
    torch.testing.assert_close(results[0][0], results[1][0])
    assert_same_state(results[0][1], results[1][1])


def test_sgd_takes_the_buffers_of_their_parameters() -> None:
    """Parameters of one size, in another order than the state, and in two groups."""
    results = []
    for cls in (optim.SGD, torch.optim.SGD):
        params = [torch.full((3,), float(i), requires_grad=True) for i in range(6)]
        groups = [{"params": params[2::-1]}, {"params": params[3:], "momentum": 0.5}]
        optimizer = cls(groups, lr=0.1, momentum=0.9)
        for step in range(5):
            for index in (0, 4, 2, 3, 1, 5)[: step + 2]:
                params[index].grad = torch.full((3,), float(index - step))
            optimizer.step()
        _turn_the_state_around(optimizer, params)
        optimizer.step()
        buffers = [optimizer.state[p]["momentum_buffer"] for p in params]
        results.append((params, buffers))
    torch.testing.assert_close(*results)


def test_sgd_with_two_dtypes_side_by_side() -> None:
    results = []
    for cls in (optim.SGD, torch.optim.SGD):
        params = [*parameters(torch.float32), *parameters(torch.float64)]
        optimizer = cls(params, lr=0.1, momentum=0.9)
        for step in range(3):
            set_gradients(params, step)
            optimizer.step()
        results.append(params)
    torch.testing.assert_close(*results)


def test_sgd_refuses_a_buffer_of_another_size() -> None:
    params = [torch.ones(3, requires_grad=True), torch.ones(4, requires_grad=True)]
    optimizer = optim.SGD(params, lr=0.5, momentum=0.5)
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    optimizer.state[params[0]]["momentum_buffer"] = torch.ones(2)
    with pytest.raises(RuntimeError):
        optimizer.step()
    assert all(param.eq(1).all() for param in params)


def test_sgd_steps_channels_last_weights_in_place() -> None:
    weight = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last).requires_grad_()
    expected = weight.detach().clone()
    optimizer = optim.SGD([weight], lr=0.5, momentum=0.5)
    for velocity in (1.0, 1.5, 1.75):
        weight.grad = torch.ones_like(weight)
        with runs_kernel("sgd_step_"):
            optimizer.step()
        expected -= 0.5 * velocity
        torch.testing.assert_close(weight.detach(), expected)
        assert weight.is_contiguous(memory_format=torch.channels_last)


def test_sgd_that_share_their_parameters() -> None:
    results = []
    for cls in (optim.SGD, torch.optim.SGD):
        params = parameters()
        optimizers = [
            cls(params, lr=0.1, momentum=0.9),
            cls(params, lr=0.2),
            cls(params[::-1], lr=0.05, momentum=0.5, nesterov=True),
        ]
        for step in range(4):
            set_gradients(params, step)
            for optimizer in optimizers:
                optimizer.step()
        results.append(params)
    torch.testing.assert_close(*results)


def test_sgd_after_its_network_has_changed_its_dtype() -> None:
    results = []
    for cls in (optim.SGD, torch.optim.SGD):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        optimizer = cls(model.parameters(), lr=0.1)
        for step in range(4):
            if step == 2:
                model.double()
            set_gradients(list(model.parameters()), step)
            optimizer.step()
        results.append(list(model.parameters()))
    torch.testing.assert_close(*results)


def test_sgd_adds_nothing_to_the_optimizer() -> None:
    """What it keeps from step to step is neither copied nor pickled with it."""
    attributes = []
    for cls in (optim.SGD, torch.optim.SGD):
        params = parameters()
        optimizer = cls(params, lr=0.1, momentum=0.9)
        for step in range(3):
            set_gradients(params, step)
            optimizer.step()
        attributes.append((vars(optimizer).keys(), optimizer.__getstate__().keys()))
    assert attributes[0] == attributes[1]


@pytest.mark.parametrize("elements", [3, 400_000])
def test_sgd_keeps_no_tensor_alive(elements: int) -> None:
    param = torch.zeros(elements, requires_grad=True)
    optimizer = optim.SGD([param], lr=0.1, momentum=0.9)
    for _ in range(3):
        param.grad = torch.ones(elements)
        optimizer.step()
    gradient, buffer = (
        weakref.ref(param.grad),
        weakref.ref(optimizer.state[param]["momentum_buffer"]),
    )
    optimizer.zero_grad()
    assert gradient() is None
    optimizer.state.clear()
    assert buffer() is None
    optimizer.param_groups[0]["params"].clear()
    alive = weakref.ref(param)
    del param
    assert alive() is None
    optimizer.step()


def test_sgd_lists_follow_one_another_at_the_same_address() -> None:
    """Whatever is remembered of a list must not be taken for another one's."""
    for round_ in range(20):
        sizes = [60_000, 7, 100] if round_ % 2 else [100, 60_000, 7]
        params = [torch.ones(size, requires_grad=True) for size in sizes]
        optimizer = optim.SGD(params, lr=0.5, momentum=0.5)
        for _ in range(3):
            for param in params:
                param.grad = torch.ones_like(param)
            optimizer.step()
        for param in params:
            assert param.eq(1 - 0.5 * (1 + 1.5 + 1.75)).all()
        del optimizer, params, param


def test_sgd_in_two_threads() -> None:
    shared = torch.ones(400_000, requires_grad=True)
    shared.grad = torch.ones_like(shared)
    standing = optim.SGD([shared], lr=0.0, momentum=0.5)
    own = [torch.ones(300_000, requires_grad=True) for _ in range(2)]

    def train(param: Tensor) -> None:
        optimizer = optim.SGD([param], lr=0.25, momentum=0.5)
        for _ in range(20):
            param.grad = torch.zeros_like(param)
            optimizer.step()
            standing.step()
        param.grad = torch.ones_like(param)
        optimizer.step()

    threads = [threading.Thread(target=train, args=(param,)) for param in own]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(param.eq(0.75).all() for param in own)
    assert shared.eq(1).all()


def test_sgd_while_another_thread_replaces_the_gradient() -> None:
    param = torch.ones(1_000_000, requires_grad=True)
    param.grad = torch.zeros_like(param)
    optimizer = optim.SGD([param], lr=0.5, momentum=0.5)
    finished = threading.Event()

    def replace() -> None:
        while not finished.is_set():
            param.grad = torch.zeros_like(param)

    thread = threading.Thread(target=replace)
    thread.start()
    for _ in range(100):
        optimizer.step()
    finished.set()
    thread.join()
    assert param.eq(1).all()


class _Log(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_dispatch_modes_and_profilers_see_the_operator(backend: str) -> None:
    params = parameters()
    optimizer = optim.SGD(params, lr=0.1, momentum=0.9)
    set_gradients(params, 0)
    optimizer.step()
    with _Log() as log:
        optimizer.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    if backend == "native":
        assert log.names == ["cnnkernels::sgd_step_"]
        assert "cnnkernels::sgd_step_" in [event.name for event in profile.events()]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_versions_of_buffers_go_up_as_well(momentum: float) -> None:
    param = torch.ones(3, requires_grad=True)
    param.grad = torch.ones(3)
    optimizer = optim.SGD([param], lr=0.1, momentum=momentum)
    optimizer.step()
    buffer = optimizer.state[param].get("momentum_buffer")
    versions = (param._version, param.grad._version, buffer._version if momentum else 0)
    optimizer.step()
    assert param._version > versions[0]
    assert param.grad._version == versions[1]
    assert not momentum or buffer._version > versions[2]


@pytest.mark.parametrize("name", ["momentum", "weight_decay", "dampening"])
@pytest.mark.parametrize("value", ["0.1", None, 1j])
def test_sgd_options_are_numbers(name: str, value: Any, backend: str) -> None:
    param = torch.ones(2, requires_grad=True)
    optimizer = optim.SGD([param], lr=0.1, momentum=0.5)
    param.grad = torch.ones(2)
    optimizer.param_groups[0][name] = value
    if backend == "native":
        with pytest.raises(TypeError):
            optimizer.step()
        assert torch.equal(param, torch.ones(2))
