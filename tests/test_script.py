"""TorchScript, scripted and traced, saved and loaded."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import runs_kernel
from torch import Tensor
from torch.nn import functional as F

from cnnkernels import functional, nn, replace_modules

pytestmark = [
    pytest.mark.usefixtures("backend"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
]


def conv_of_ints(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return functional.conv2d(x, w, b, 2, 1, 1, 1)


def conv_of_tuples(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return functional.conv2d(x, w, bias=b, stride=(2, 1), padding=(1, 0), dilation=(1, 2))


def conv_of_lists(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return functional.conv2d(x, w, None, stride=[2, 1]) + b[:, None, None]


def conv_same(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return functional.conv2d(x, w, b, padding="same") + functional.conv2d(x, w, b, 1, 1)


def conv_relu(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    y = functional.conv2d_relu(x, w, b, 2, 1, 1, 1)
    z = functional.conv2d_relu(x, w, bias=b, stride=(2, 2), padding=[1, 1])
    return y + z + functional.conv2d_relu(x, w, padding="same")[:, :, ::2, ::2]


def pool(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    y = functional.max_pool2d(x, 2) + functional.max_pool2d(x, (2, 2), stride=2, padding=0)
    return y + functional.max_pool2d(x, kernel_size=[2, 2], stride=(2, 2), ceil_mode=False)


def pool_indices(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    y, indices = functional.max_pool2d(x, 3, 1, return_indices=True)
    return y * indices


def block(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    y = functional.conv2d_relu_max_pool2d(x, w, b, padding="same")
    return y + functional.conv2d_relu_max_pool2d(
        x, w, b, 1, 1, pool_kernel_size=(3, 2), pool_stride=2, pool_padding=(1, 0)
    )


FUNCTIONS: list[Callable[..., Tensor]] = [
    conv_of_ints,
    conv_of_tuples,
    conv_of_lists,
    conv_same,
    conv_relu,
    pool,
    pool_indices,
    block,
]


def arguments() -> list[Tensor]:
    return [
        torch.randn(2, 3, 8, 8, requires_grad=True),
        torch.randn(4, 3, 3, 3, requires_grad=True),
        torch.randn(4, requires_grad=True),
    ]


def assert_close(ours: Any, expected: Any) -> None:
    """Scripts run the library where there is one, whichever backend is asked for values."""
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)


def saved_and_loaded(module: torch.jit.ScriptModule | torch.jit.ScriptFunction) -> Any:
    file = io.BytesIO()
    torch.jit.save(module, file)
    file.seek(0)
    return torch.jit.load(file)


def grads(output: Tensor, tensors: list[Tensor]) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(output.square().sum(), tensors, allow_unused=True)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_scripted_functions(function: Callable[..., Tensor]) -> None:
    tensors = arguments()
    expected = function(*tensors)
    scripted = torch.jit.script(function)
    assert "cnnkernels::" in str(scripted.inlined_graph)
    assert "aten::conv2d" not in str(scripted.inlined_graph)
    for script in (scripted, saved_and_loaded(scripted)):
        # Again and again: the executor specialises on the second and third call.
        for _ in range(3):
            output = script(*tensors)
            assert_close(output, expected)
            assert_close(grads(output, tensors), grads(function(*tensors), tensors))


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_traced_functions(function: Callable[..., Tensor]) -> None:
    tensors = arguments()
    traced = torch.jit.trace(function, tuple(t.detach() for t in tensors))
    for script in (traced, saved_and_loaded(traced)):
        output = script(*tensors)
        assert_close(output, function(*tensors))
        assert_close(grads(output, tensors), grads(function(*tensors), tensors))


MODULES = [
    nn.Conv2d(2, 4, 3),
    nn.Conv2d(2, 4, (3, 2), stride=2, padding=(1, 0), groups=2, bias=False),
    nn.Conv2d(2, 4, 3, padding="same", dilation=2),
    nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"),
    nn.Conv2dReLU(2, 4, 3),
    nn.Conv2dReLU(2, 4, 3, padding="same", dilation=2),
    nn.Conv2dReLU(2, 4, 3, padding=1, padding_mode="reflect", bias=False),
    nn.MaxPool2d(2),
    nn.MaxPool2d((3, 2), stride=1, padding=1, ceil_mode=True),
    nn.MaxPool2d(2, return_indices=True),
    nn.Conv2dReLUMaxPool2d(2, 4, 3, padding=1),
    nn.Conv2dReLUMaxPool2d(2, 4, 3, padding="same", pool_kernel_size=(3, 2), pool_stride=1),
    nn.Conv2dReLUMaxPool2d(2, 4, 3, padding=1, padding_mode="circular", pool_ceil_mode=True),
]


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_scripted_and_traced_modules(module: torch.nn.Module) -> None:
    input = torch.randn(2, 2, 9, 9)
    expected = module(input)
    scripted = torch.jit.script(module)
    for script in (
        scripted,
        saved_and_loaded(scripted),
        torch.jit.freeze(scripted.eval()),
        torch.jit.trace(module, input),
    ):
        assert_close(script(input), expected)
    assert scripted.state_dict().keys() == module.state_dict().keys()


def test_scripted_networks_run_the_kernels() -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = torch.nn.Sequential(
                torch.nn.Conv2d(1, 4, 3),
                torch.nn.ReLU(),
                torch.nn.MaxPool2d(2),
                torch.nn.Conv2d(4, 4, 3, padding=1),
                torch.nn.ReLU(),
            )
            self.conv = torch.nn.Conv2d(4, 8, 3)
            self.linear = torch.nn.Linear(8 * 2 * 2, 3)

        def forward(self, input: Tensor) -> Tensor:
            hidden = functional.max_pool2d(F.relu(self.conv(self.features(input))), 2)
            return self.linear(hidden.flatten(1))

    model = replace_modules(Net())
    input = torch.randn(2, 1, 14, 14)
    script = saved_and_loaded(torch.jit.script(model))
    assert_close(script(input), model(input))
    with runs_kernel("conv2d", "conv2d_relu", "max_pool2d", "conv2d_relu_max_pool2d"):
        script(input).sum().backward()
    model(input).sum().backward()
    for ours, theirs in zip(script.parameters(), model.parameters(), strict=True):
        assert_close(ours.grad, theirs.grad)
