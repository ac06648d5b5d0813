"""Training steps captured into CUDA graphs, whose replays see what has changed on the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accuracy import assert_close_to_truth
from conftest import runs_kernel
from cuda_support import needs_cuda
from torch import Tensor
from torch.nn import functional as F

import cnnkernels
from cnnkernels import functional, optim

pytestmark = needs_cuda

SIZES = [(3,), (17, 5), (1001,), (8, 3, 3, 3), (0,), (70_001,)]


def capture(work: Callable[[], object], warm_ups: int = 2) -> torch.cuda.CUDAGraph:
    """Capture work after it has run a few times on a side stream, as torch asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm_ups):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def parameters(tensors: int = len(SIZES)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    params = []
    for index in range(tensors):
        # One large tensor is enough.
        size = SIZES[index] if index < len(SIZES) else SIZES[index % (len(SIZES) - 1)]
        param = torch.randn(size, generator=generator).cuda()
        param.requires_grad_()
        param.grad = torch.zeros_like(param)
        params.append(param)
    return params


def fill_gradients(params: list[Tensor], step: int) -> None:
    """Writes new gradients where the old ones are."""
    generator = torch.Generator().manual_seed(step)
    for param in params:
        param.grad.copy_(torch.randn(param.shape, generator=generator))


def flat(params: list[Tensor]) -> Tensor:
    return torch.cat([param.detach().flatten() for param in params])


@pytest.mark.parametrize("tensors", [len(SIZES), 700])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9, "weight_decay": 0.1},
        {"momentum": 0.9, "nesterov": True, "fused": True},
    ],
    ids=str,
)
def test_steps_with_a_learning_rate_that_changes_between_replays(
    options: dict[str, Any], tensors: int
) -> None:
    rates = [0.1, 0.1, 0.1, 0.05, 0.2, 0.0, 0.01]
    warm_ups = 2
    lr = torch.tensor(rates[0], device="cuda")
    ours = parameters(tensors)
    optimizer = optim.SGD(ours, lr=lr, **options)
    with runs_kernel("sgd_step_"):
        graph = capture(optimizer.step, warm_ups)
    # The warm-up stepped with gradients of zero; what is captured does not run.
    for step, rate in enumerate(rates[warm_ups:]):
        lr.fill_(rate)
        fill_gradients(ours, step)
        graph.replay()
    results = []
    for dtype in (torch.float32, torch.float64):
        params = [p.detach().to(dtype).requires_grad_() for p in parameters(tensors)]
        for param in params:
            param.grad = torch.zeros_like(param)
        peer = torch.optim.SGD(params, lr=rates[0], **{**options, "fused": None})
        for step, rate in enumerate(rates):
            if step >= warm_ups:
                fill_gradients(params, step - warm_ups)
            peer.param_groups[0]["lr"] = rate
            peer.step()
        results.append(flat(params))
    theirs, truth = results
    assert_close_to_truth(flat(ours), theirs, truth, truth.abs(), f"{options} {tensors}")


def test_a_step_with_a_grad_scale_that_changes_between_replays() -> None:
    param = torch.zeros(100, device="cuda", requires_grad=True)
    param.grad = torch.full_like(param, 8.0)
    optimizer = optim.SGD([param], lr=0.5)
    optimizer.grad_scale = torch.tensor(8.0, device="cuda")
    optimizer.found_inf = torch.tensor(1.0, device="cuda")
    graph = capture(optimizer.step)
    graph.replay()
    assert param.eq(0).all()
    assert param.grad.eq(8).all()
    for scale, skipped, expected in ((8.0, 0.0, -0.5), (2.0, 1.0, -0.5), (2.0, 0.0, -1.0)):
        param.grad.fill_(scale)
        optimizer.grad_scale.fill_(scale)
        optimizer.found_inf.fill_(skipped)
        graph.replay()
        assert param.eq(expected).all()


def test_simple_gd_with_a_number_for_its_rate() -> None:
    params = parameters()
    expected = flat(params)
    fill_gradients(params, 0)
    gradients = torch.cat([param.grad.flatten() for param in params])
    optimizer = optim.SimpleGD(params, lr=0.25)
    with runs_kernel("gd_step_"):
        graph = capture(optimizer.step, warm_ups=1)
    for _ in range(3):
        graph.replay()
    torch.testing.assert_close(flat(params), expected - 4 * 0.25 * gradients)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_pooling_forward_and_backward(memory_format: torch.memory_format) -> None:
    x = torch.randn(2, 8, 16, 20, device="cuda").contiguous(memory_format=memory_format)
    grad = torch.randn(2, 8, 8, 10, device="cuda")
    x.requires_grad_()
    kept: dict[str, Tensor] = {}

    def work() -> None:
        kept["output"] = functional.max_pool2d(x, 2)
        (kept["gradient"],) = torch.autograd.grad(kept["output"], x, grad)

    with runs_kernel("max_pool2d", "max_pool2d_backward"):
        graph = capture(work)
    for _ in range(2):
        with torch.no_grad():
            x.normal_()
            grad.normal_()
        graph.replay()
        peer = x.detach().requires_grad_()
        expected = F.max_pool2d(peer, 2)
        expected.backward(grad)
        assert torch.equal(kept["output"], expected)
        assert torch.equal(kept["gradient"], peer.grad)


def test_a_whole_training_step() -> None:
    def network() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(
            torch.nn.Conv2d(1, 6, 3),
            torch.nn.ReLU(),
            torch.nn.MaxPool2d(2),
            torch.nn.Flatten(),
            torch.nn.Linear(6 * 15 * 15, 10),
        ).cuda()

    images = torch.randn(4, 1, 32, 32, device="cuda")
    labels = torch.randint(10, (4,), device="cuda")
    eager, captured = network(), cnnkernels.replace_modules(network())

    def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    ours = optim.SGD(captured.parameters(), lr=0.05, momentum=0.9)
    theirs = torch.optim.SGD(eager.parameters(), lr=0.05, momentum=0.9)
    first = images.clone()
    later = [
        torch.randn(images.shape, generator=torch.Generator().manual_seed(i)) for i in range(4)
    ]
    warm_ups = 2
    with runs_kernel("sgd_step_"):
        graph = capture(lambda: train(captured, ours), warm_ups)
    for batch in later:
        images.copy_(batch)
        graph.replay()
    for batch in [first] * warm_ups + later:
        images.copy_(batch)
        train(eager, theirs)
    for mine, torchs in zip(captured.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(mine, torchs, rtol=1e-3, atol=1e-4)
