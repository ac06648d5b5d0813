"""The operators, called as their namesakes in :mod:`torch.nn.functional`.

Each function runs on the backend in use (:func:`cnnkernels.use_backend`), is differentiable any
number of times, and works in eager mode, under torch.compile and torch.export, in TorchScript
(scripted and traced), under :mod:`torch.func` transforms, autocast, tensor subclasses and
:mod:`torch.fx`. The compiled library has kernels for float32, float64, bfloat16 and float16 on the
CPU; everything else that torch can compute is passed on to torch, through the same functions.

Wrong arguments raise what torch.nn.functional raises: TypeError, ValueError or RuntimeError.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Optional

import torch
from torch import Tensor
from torch.overrides import (
    handle_torch_function,
    has_torch_function_unary,
    has_torch_function_variadic,
)

from cnnkernels import _backend
from cnnkernels._shapes import Size2

if TYPE_CHECKING:
    # TorchScript knows this name, and spreads an int over a list of that length.
    from torch._jit_internal import BroadcastingList2  # type: ignore[attr-defined]

__all__ = ["conv2d", "conv2d_relu", "conv2d_relu_max_pool2d", "max_pool2d"]


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size2 = 1,
    padding: Size2 | str = 0,
    dilation: Size2 = 1,
    groups: int = 1,
) -> Tensor:
    """2-D convolution (cross-correlation); the same as :func:`torch.nn.functional.conv2d`.

    Args:
        input: images, shaped (N, C_in, H, W) or (C_in, H, W).
        weight: filters, shaped (C_out, C_in / groups, kH, kW), of input's dtype.
        bias: shaped (C_out,), or None.
        stride: step of the filter, one int or (vertical, horizontal).
        padding: rows and columns of zeros on both sides, one int or (vertical, horizontal);
            ``"valid"`` is none, ``"same"`` as many as keep the size (stride 1 only; an odd total
            puts the extra one on the right and below).
        dilation: distance of the filter's taps, one int or (vertical, horizontal).
        groups: number of blocks that the channels are split into; C_in of them is depthwise.

    Returns:
        A tensor shaped (N, C_out, H_out, W_out), or (C_out, H_out, W_out) for a single image, with
        ``H_out = floor((H + 2 padding - dilation (kH - 1) - 1) / stride) + 1``; channels_last if
        the input or the weight is.

    Raises:
        RuntimeError: shapes, dtypes or geometry that do not fit together.
        TypeError: arguments of the wrong type.
    """
    if has_torch_function_variadic(input, weight, bias):
        return handle_torch_function(
            conv2d,
            (input, weight, bias),
            input,
            weight,
            bias=bias,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
        )
    return _backend.current().conv2d(input, weight, bias, stride, padding, dilation, groups)


def conv2d_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size2 = 1,
    padding: Size2 | str = 0,
    dilation: Size2 = 1,
    groups: int = 1,
) -> Tensor:
    """``relu(conv2d(input, ...))`` as one operator.

    What the ReLU clips is never stored, and the result is written once. Values and gradients are
    those of the two calls: NaN passes, and so does its gradient.

    Args:
        input: images, shaped (N, C_in, H, W) or (C_in, H, W).
        weight: filters, shaped (C_out, C_in / groups, kH, kW), of input's dtype.
        bias: shaped (C_out,), or None.
        stride: the convolution's, as in :func:`conv2d`.
        padding: a number or ``"same"`` or ``"valid"``, as in :func:`conv2d`.
        dilation: the convolution's.
        groups: the convolution's.

    Returns:
        A tensor shaped as :func:`conv2d`'s. It is kept for the backward pass: as after
        :func:`torch.relu`, changing it in place before is an error there.

    Raises:
        RuntimeError: shapes, dtypes or geometry that do not fit together.
        TypeError: arguments of the wrong type.
    """
    if has_torch_function_variadic(input, weight, bias):
        return handle_torch_function(
            conv2d_relu,
            (input, weight, bias),
            input,
            weight,
            bias=bias,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
        )
    return _backend.current().conv2d_relu(input, weight, bias, stride, padding, dilation, groups)


def max_pool2d(
    input: Tensor,
    kernel_size: Size2,
    stride: Size2 | None = None,
    padding: Size2 = 0,
    dilation: Size2 = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """2-D max pooling; the same as :func:`torch.nn.functional.max_pool2d`.

    The first of several equal maxima wins; a NaN wins over everything; padding never wins.

    Args:
        input: images, shaped (N, C, H, W) or (C, H, W).
        kernel_size: size of the window, one int or (vertical, horizontal).
        stride: step of the window; None is kernel_size.
        padding: rows and columns of minus infinity on both sides, at most half the kernel.
        dilation: distance of the window's taps.
        ceil_mode: keeps a last window that is only partly inside.
        return_indices: also returns where each maximum is.

    Returns:
        The maxima, shaped (N, C, H_out, W_out) or (C, H_out, W_out), in the input's memory format.
        With return_indices a pair of them and of the int64 indices of the winners in their
        H x W planes.

    Raises:
        RuntimeError: shapes or geometry that do not fit together.
        TypeError: arguments of the wrong type.
    """
    if has_torch_function_unary(input):
        return handle_torch_function(
            max_pool2d,
            (input,),
            input,
            kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            ceil_mode=ceil_mode,
            return_indices=return_indices,
        )
    if stride is None:
        stride = ()
    operators = _backend.current()
    if return_indices:
        return operators.max_pool2d_with_indices(
            input, kernel_size, stride, padding, dilation, ceil_mode
        )
    return operators.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode)


def conv2d_relu_max_pool2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size2 = 1,
    padding: Size2 | str = 0,
    dilation: Size2 = 1,
    groups: int = 1,
    *,
    pool_kernel_size: Size2 = 2,
    pool_stride: Size2 | None = None,
    pool_padding: Size2 = 0,
    pool_dilation: Size2 = 1,
    pool_ceil_mode: bool = False,
) -> Tensor:
    """``max_pool2d(relu(conv2d(input, ...)), pool_kernel_size, ...)`` as one operator.

    The convolution's output stays in registers or in a cache. Values and gradients are those of the
    three calls, but for what is not finite: where an input is infinite or NaN, the three calls
    multiply it by the zero gradients of the outputs that did not win, which gives NaN, and this
    operator leaves such products out where its backward visits the winners alone.

    Args:
        input: images, shaped (N, C_in, H, W) or (C_in, H, W).
        weight: filters, shaped (C_out, C_in / groups, kH, kW), of input's dtype.
        bias: shaped (C_out,), or None.
        stride: the convolution's, as in :func:`conv2d`.
        padding: the convolution's, a number or ``"same"`` or ``"valid"``.
        dilation: the convolution's.
        groups: the convolution's.
        pool_kernel_size: size of the pooling window, as in :func:`max_pool2d`.
        pool_stride: the pooling's; None is pool_kernel_size.
        pool_padding: the pooling's.
        pool_dilation: the pooling's.
        pool_ceil_mode: the pooling's.

    Returns:
        The pooled features, shaped (N, C_out, H_out, W_out) or (C_out, H_out, W_out).

    Raises:
        RuntimeError: shapes, dtypes or geometry that do not fit together.
        TypeError: arguments of the wrong type.
    """
    if has_torch_function_variadic(input, weight, bias):
        return handle_torch_function(
            conv2d_relu_max_pool2d,
            (input, weight, bias),
            input,
            weight,
            bias=bias,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            pool_kernel_size=pool_kernel_size,
            pool_stride=pool_stride,
            pool_padding=pool_padding,
            pool_dilation=pool_dilation,
            pool_ceil_mode=pool_ceil_mode,
        )
    return _backend.current().conv2d_relu_max_pool2d(
        input,
        weight,
        bias,
        stride,
        padding,
        dilation,
        groups,
        pool_kernel_size,
        () if pool_stride is None else pool_stride,
        pool_padding,
        pool_dilation,
        pool_ceil_mode,
    )


def _script_max_pool2d(
    input: Tensor,
    kernel_size: BroadcastingList2[int],
    stride: Optional[BroadcastingList2[int]] = None,  # noqa: UP045  TorchScript reads it
    padding: BroadcastingList2[int] = 0,
    dilation: BroadcastingList2[int] = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor:
    if stride is None:
        stride = torch.jit.annotate(list[int], [])
    return torch.ops.cnnkernels.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode)


def _script_max_pool2d_with_indices(
    input: Tensor,
    kernel_size: BroadcastingList2[int],
    stride: Optional[BroadcastingList2[int]] = None,  # noqa: UP045  TorchScript reads it
    padding: BroadcastingList2[int] = 0,
    dilation: BroadcastingList2[int] = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> tuple[Tensor, Tensor]:
    if stride is None:
        stride = torch.jit.annotate(list[int], [])
    return torch.ops.cnnkernels.max_pool2d_with_indices(
        input, kernel_size, stride, padding, dilation, ceil_mode
    )


def _register_with_torchscript() -> None:
    """Makes scripts compile the functions above to the operators, as they do torch's own."""
    from torch._jit_internal import boolean_dispatched
    from torch.jit._builtins import _register_builtin

    _register_builtin(conv2d, "cnnkernels::conv2d")
    _register_builtin(conv2d_relu, "cnnkernels::conv2d_relu")
    _register_builtin(conv2d_relu_max_pool2d, "cnnkernels::conv2d_relu_max_pool2d")
    dispatch: dict[str, Any] = {
        "if_true": _script_max_pool2d_with_indices,
        "if_false": _script_max_pool2d,
        "index": 6,
        "default": False,
        "arg_name": "return_indices",
    }
    boolean_dispatched[max_pool2d] = dispatch


# TorchScript is deprecated: a torch without these tables must not keep the package from loading.
with contextlib.suppress(ImportError):
    _register_with_torchscript()
