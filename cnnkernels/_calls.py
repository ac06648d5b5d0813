"""What rewritten methods call in place of a convolution, its ReLU and its pooling.

``pool(relu(conv(x)))`` becomes ``max_pool2d(pool, relu_(relu, conv2d(conv, x)))``, with the names
of this module: each function is given what the code was about to call. A convolution that may be
joined is put off, and what is called next completes it. Whatever is not exactly what it has to be,
here and now, is called as it stands in the code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _disabled_torch_function_impl
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook

from cnnkernels import functional
from cnnkernels.nn import Conv2d, MaxPool2d


class Deferred(NamedTuple):
    """A convolution that is still to be computed, and then its ReLU.

    It goes from one function of this module to the next, and no other code ever sees it.
    """

    conv: Conv2d
    input: Tensor


def conv2d(module: Any, input: Any, /) -> Any:
    """``module(input)``, put off if the two are a plain convolution and a plain tensor."""
    if (
        is_plain(module, Conv2d)
        and module.padding_mode == "zeros"
        and isinstance(input, Tensor)
        and not any(map(_overrides_functions, (input, module.weight, module.bias)))
    ):
        return Deferred(module, input)
    return module(input)


def relu(function: Any, value: Any, /, *args: Any, **kwargs: Any) -> Any:
    """``function(value, ...)``, still put off if value is and the function is a ReLU."""
    if type(value) is Deferred:
        if is_relu(function, args, kwargs):
            return value
        value = value.conv(value.input)
    return function(value, *args, **kwargs)


def conv2d_relu(function: Any, value: Any, /, *args: Any, **kwargs: Any) -> Any:
    """``function(value, ...)``, together with what is put off if it is a ReLU."""
    output = relu(function, value, *args, **kwargs)
    return _with_relu(output) if type(output) is Deferred else output


def max_pool2d(function: Any, value: Any, /, *args: Any, **kwargs: Any) -> Any:
    """``function(value, ...)``, together with what is put off if it is a max pooling."""
    if type(value) is Deferred:
        pool = pool_arguments(function, args, kwargs)
        if pool is not None:
            return functional.conv2d_relu_max_pool2d(*_convolution(value), **pool)
        value = _with_relu(value)
    return function(value, *args, **kwargs)


def _with_relu(value: Deferred) -> Tensor:
    return functional.conv2d_relu(*_convolution(value))


def _convolution(value: Deferred) -> tuple[Any, ...]:
    """The arguments of the convolution, as those of :func:`cnnkernels.functional.conv2d`."""
    conv = value.conv
    return (
        value.input,
        conv.weight,
        conv.bias,
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.groups,
    )


def _overrides_functions(tensor: Tensor | None) -> bool:
    """Whether it is of a class that might treat a ReLU in another way than torch.

    What a mode for functions would do is not asked: one is active where there is a default device,
    while torch.export traces, and not in a checkpoint's second forward when it was in the first.
    """
    if tensor is None or type(tensor) is Tensor:
        return False
    return type(tensor).__torch_function__ is not _disabled_torch_function_impl


def is_plain(module: Any, cls: type[torch.nn.Module]) -> bool:
    """Whether calling the module does what the class says, and nobody watches it."""
    return type(module) is cls and not is_customised(module) and not _has_any_global_hook()


def is_customised(module: torch.nn.Module) -> bool:
    """Whether a call of the module runs more, or something else, than its class says."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module._compiled_call_impl is not None
        or "forward" in module.__dict__
        or "_conv_forward" in module.__dict__
    )


def tensor_relu(value: Any) -> Any:
    """The method as a function; torch.Tensor's own is none for what only looks like a tensor."""
    return value.relu()


def tensor_relu_(value: Any) -> Any:
    """As :func:`tensor_relu`."""
    return value.relu_()


METHODS = {"relu": tensor_relu, "relu_": tensor_relu_}
"""The methods of a tensor that can be joined, as functions of this module."""

# By the functions themselves: one that has been replaced in torch is another function.
_RELUS = (F.relu, torch.relu, torch.relu_, tensor_relu, tensor_relu_)
_POOLS = (F.max_pool2d, torch.max_pool2d, functional.max_pool2d)


def is_relu(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether ``function(value, *args, **kwargs)`` is a ReLU; in place or not is the same here."""
    if args or kwargs:
        # Only this one takes more, which is whether it may overwrite the convolution's result.
        return function is _RELUS[0] and len(args) + len(kwargs) == 1
    return function in _RELUS or is_plain(function, torch.nn.ReLU)


def pool_arguments(
    function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The fused block's arguments for ``function(value, *args, **kwargs)``, if it is a pooling."""
    if function in _POOLS:
        return _named(*args, **kwargs)
    if args or kwargs or not is_plain(function, MaxPool2d):
        return None
    return _named(
        function.kernel_size,
        function.stride,
        function.padding,
        function.dilation,
        function.ceil_mode,
        function.return_indices,
    )


def _named(
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> dict[str, Any] | None:
    if return_indices:
        return None
    return {
        "pool_kernel_size": kernel_size,
        "pool_stride": stride,
        "pool_padding": padding,
        "pool_dilation": dilation,
        "pool_ceil_mode": ceil_mode,
    }
