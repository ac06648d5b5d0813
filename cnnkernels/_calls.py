"""What a rewritten ``forward`` calls in place of a convolution, its ReLU and its pooling.

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
from torch.compiler import is_exporting
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook
from torch.overrides import has_torch_function_variadic

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
        and (
            not has_torch_function_variadic(input, module.weight, module.bias)
            or is_exporting()  # which watches all functions with a mode
        )
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


def max_pool2d(function: Any, value: Any, /, *args: Any, **kwargs: Any) -> Any:
    """``function(value, ...)``, together with what is put off if it is a max pooling."""
    if type(value) is Deferred:
        pool = pool_arguments(function, args, kwargs)
        if pool is not None:
            conv = value.conv
            return functional.conv2d_relu_max_pool2d(
                value.input,
                conv.weight,
                conv.bias,
                conv.stride,
                conv.padding,
                conv.dilation,
                conv.groups,
                **pool,
            )
        value = F.relu(value.conv(value.input))
    return function(value, *args, **kwargs)


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
