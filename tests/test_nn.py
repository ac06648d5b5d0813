"""cnnkernels.nn against torch.nn: construction, parameters, state, copies, values."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from typing import Any

import pytest
import torch
from conftest import runs_kernel

from cnnkernels import nn

CONVOLUTIONS: list[dict[str, Any]] = [
    {"in_channels": 2, "out_channels": 4, "kernel_size": 3},
    {"in_channels": 2, "out_channels": 4, "kernel_size": (3, 2), "stride": 2, "padding": (1, 0)},
    {"in_channels": 2, "out_channels": 4, "kernel_size": 3, "dilation": 2, "padding": "same"},
    {"in_channels": 2, "out_channels": 4, "kernel_size": 3, "groups": 2, "bias": False},
    {
        "in_channels": 2,
        "out_channels": 4,
        "kernel_size": 3,
        "padding": 1,
        "padding_mode": "reflect",
    },
    {
        "in_channels": 2,
        "out_channels": 4,
        "kernel_size": 3,
        "padding": "same",
        "padding_mode": "circular",
    },
    {
        "in_channels": 2,
        "out_channels": 4,
        "kernel_size": 3,
        "padding": 1,
        "padding_mode": "replicate",
        "dtype": torch.float64,
    },
]
POOLS: list[dict[str, Any]] = [
    {"kernel_size": 2},
    {"kernel_size": 3, "stride": (2, 1), "padding": 1, "ceil_mode": True},
    {"kernel_size": 2, "dilation": 2, "return_indices": True},
]


def test_conv2d_relu_has_the_arguments_of_conv2d() -> None:
    assert issubclass(nn.Conv2dReLU, nn.Conv2d)
    assert inspect.signature(nn.Conv2dReLU) == inspect.signature(torch.nn.Conv2d)


@pytest.mark.parametrize("ours", [nn.Conv2d, nn.MaxPool2d])
def test_arguments_are_those_of_torch(ours: type[torch.nn.Module]) -> None:
    theirs = getattr(torch.nn, ours.__name__)
    assert issubclass(ours, theirs)
    assert inspect.signature(ours) == inspect.signature(theirs)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("kwargs", CONVOLUTIONS)
def test_conv2d(kwargs: dict[str, Any]) -> None:
    torch.manual_seed(1)
    theirs = torch.nn.Conv2d(**kwargs)
    torch.manual_seed(1)
    ours = nn.Conv2d(**kwargs)
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), rtol=0, atol=0)
    assert repr(ours) == repr(theirs)
    input = torch.randn(2, 2, 8, 9, dtype=theirs.weight.dtype)
    for images in (input, input[0], input.to(memory_format=torch.channels_last)):
        expected = theirs(images)
        with runs_kernel("conv2d"):
            output = ours(images)
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
        assert output.stride() == expected.stride()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("kwargs", CONVOLUTIONS)
def test_conv2d_relu(kwargs: dict[str, Any]) -> None:
    ours, conv = nn.Conv2dReLU(**kwargs), torch.nn.Conv2d(**kwargs)
    conv.load_state_dict(ours.state_dict())
    assert repr(ours) == repr(conv).replace("Conv2d", "Conv2dReLU")
    model = torch.nn.Sequential(conv, torch.nn.ReLU())
    input = torch.randn(2, 2, 8, 9, dtype=conv.weight.dtype)
    for images in (input, input[0], input.to(memory_format=torch.channels_last)):
        expected = model(images)
        with runs_kernel("conv2d_relu"):
            output = ours(images)
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
        assert output.stride() == expected.stride()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("kwargs", POOLS)
def test_max_pool2d(kwargs: dict[str, Any]) -> None:
    theirs, ours = torch.nn.MaxPool2d(**kwargs), nn.MaxPool2d(**kwargs)
    assert repr(ours) == repr(theirs)
    input = torch.randn(2, 2, 8, 9)
    with runs_kernel("max_pool2d"):
        output = ours(input)
    torch.testing.assert_close(output, theirs(input))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("kwargs", CONVOLUTIONS)
@pytest.mark.parametrize(
    "pool", [{}, {"kernel_size": 3, "stride": (1, 2), "padding": 1}, {"kernel_size": (2, 3)}]
)
def test_block(kwargs: dict[str, Any], pool: dict[str, Any]) -> None:
    block = nn.Conv2dReLUMaxPool2d(
        **kwargs, **{f"pool_{name}": value for name, value in pool.items()}
    )
    conv = torch.nn.Conv2d(**kwargs)
    conv.load_state_dict(block.state_dict())
    model = torch.nn.Sequential(
        conv, torch.nn.ReLU(), torch.nn.MaxPool2d(**{"kernel_size": 2, **pool})
    )
    input = torch.randn(2, 2, 8, 9, dtype=conv.weight.dtype)
    with runs_kernel("conv2d_relu_max_pool2d"):
        output = block(input)
    torch.testing.assert_close(output, model(input), rtol=1e-4, atol=1e-5)


def test_block_shows_its_pool() -> None:
    text = repr(nn.Conv2dReLUMaxPool2d(1, 2, 3, pool_kernel_size=3, pool_padding=1))
    assert text == (
        "Conv2dReLUMaxPool2d(1, 2, kernel_size=(3, 3), stride=(1, 1), pool_kernel_size=3, "
        "pool_stride=3, pool_padding=1, pool_dilation=1, pool_ceil_mode=False)"
    )


@pytest.mark.parametrize(
    "kwargs",
    [
        {"in_channels": 3, "out_channels": 4, "kernel_size": 3, "groups": 2},
        {"in_channels": 3, "out_channels": 4, "kernel_size": 3, "groups": 0},
        {"in_channels": 3, "out_channels": 4, "kernel_size": 3, "padding": "full"},
        {"in_channels": 3, "out_channels": 4, "kernel_size": 3, "padding": "same", "stride": 2},
        {"in_channels": 3, "out_channels": 4, "kernel_size": 3, "padding_mode": "mirror"},
        {"in_channels": 3, "out_channels": 4},
    ],
)
@pytest.mark.parametrize("ours", [nn.Conv2d, nn.Conv2dReLU, nn.Conv2dReLUMaxPool2d])
def test_bad_arguments_raise_what_torch_raises(
    ours: type[torch.nn.Module], kwargs: dict[str, Any]
) -> None:
    with pytest.raises((ValueError, TypeError)) as expected:
        torch.nn.Conv2d(**kwargs)
    with pytest.raises(expected.type):
        ours(**kwargs)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"),
        nn.Conv2dReLU(2, 3, 3, padding="same", padding_mode="reflect"),
        nn.MaxPool2d(2, return_indices=False),
        nn.Conv2dReLUMaxPool2d(2, 3, 3, pool_kernel_size=3, pool_stride=1),
    ],
    ids=lambda module: type(module).__name__,
)
def test_copies(module: torch.nn.Module) -> None:
    input = torch.randn(1, 2, 8, 8)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for other in (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(file, weights_only=False),
    ):
        assert type(other) is type(module)
        assert repr(other) == repr(module)
        torch.testing.assert_close(other(input), module(input), rtol=0, atol=0)


def test_state_dicts_load_both_ways() -> None:
    theirs = torch.nn.Conv2d(2, 3, 3)
    for ours in (nn.Conv2d(2, 3, 3), nn.Conv2dReLU(2, 3, 3), nn.Conv2dReLUMaxPool2d(2, 3, 3)):
        ours.load_state_dict(theirs.state_dict())
        torch.testing.assert_close(ours.weight, theirs.weight, rtol=0, atol=0)
        theirs.load_state_dict(ours.state_dict())


@pytest.mark.usefixtures("backend")
def test_parametrization_and_functional_call() -> None:
    conv = nn.Conv2d(2, 3, 3)
    input = torch.randn(1, 2, 6, 6)
    doubled = {name: 2 * p.detach() for name, p in conv.named_parameters()}
    torch.testing.assert_close(torch.func.functional_call(conv, doubled, (input,)), 2 * conv(input))
    torch.nn.utils.parametrizations.weight_norm(conv)
    torch.testing.assert_close(
        conv(input), torch.nn.functional.conv2d(input, conv.weight, conv.bias), rtol=1e-4, atol=1e-5
    )
