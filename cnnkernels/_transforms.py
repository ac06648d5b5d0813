"""The operators while a torch.func transform or forward-mode differentiation is active.

They go through the Python autograd Functions, which torch.func can differentiate and batch at any
depth.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cnnkernels import _native, fallback
from cnnkernels._shapes import resolve_padding
from cnnkernels.autograd import (
    Conv2dFunction,
    Conv2dReLUFunction,
    Conv2dReLUMaxPool2dFunction,
    MaxPool2dArgmaxFunction,
    MaxPool2dFunction,
)


def _autocast(*tensors: Tensor | None) -> list[Any]:
    """Casts as the operators' autocast does, but where autograd sees it."""
    if not torch.is_autocast_enabled("cpu"):
        return list(tensors)
    dtype = torch.get_autocast_dtype("cpu")
    return [
        tensor.to(dtype)
        if tensor is not None and tensor.is_floating_point() and tensor.dtype != torch.float64
        else tensor
        for tensor in tensors
    ]


def _kernels_pool(input: Tensor, *pool: Any) -> bool:
    """Whether the pooling operators with argmax, which only the kernels have, take this input."""
    library = _native.library
    return library is not None and not library.max_pool2d_reason(input, *pool)


def _kernels_take_block(*args: Any) -> bool:
    """The same for the block."""
    library = _native.library
    return library is not None and not library.conv2d_relu_max_pool2d_reason(*args)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
) -> Tensor:
    input, weight, bias = _autocast(input, weight, bias)
    input, padding = resolve_padding(input, weight, stride, padding, dilation)
    return Conv2dFunction.apply(input, weight, bias, stride, padding, dilation, groups)


def conv2d_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
) -> Tensor:
    input, weight, bias = _autocast(input, weight, bias)
    input, padding = resolve_padding(input, weight, stride, padding, dilation)
    return Conv2dReLUFunction.apply(input, weight, bias, stride, padding, dilation, groups)


def max_pool2d(
    input: Tensor, kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool
) -> Tensor:
    pool = kernel_size, stride, padding, dilation, ceil_mode
    if not _kernels_pool(input, *pool):
        return fallback.max_pool2d(input, *pool)
    return MaxPool2dFunction.apply(input, *pool)


def max_pool2d_with_indices(
    input: Tensor, kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool
) -> tuple[Tensor, Tensor]:
    pool = kernel_size, stride, padding, dilation, ceil_mode
    if not _kernels_pool(input, *pool):
        return fallback.max_pool2d_with_indices(input, *pool)
    output, argmax = MaxPool2dArgmaxFunction.apply(input, *pool)
    width = input.shape[-1]
    return output, fallback.argmax_to_indices(argmax, width, *pool[:-1])


def conv2d_relu_max_pool2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    pool_kernel_size: Any,
    pool_stride: Any,
    pool_padding: Any,
    pool_dilation: Any,
    pool_ceil_mode: bool,
) -> Tensor:
    conv = stride, padding, dilation, groups
    pool = pool_kernel_size, pool_stride, pool_padding, pool_dilation, pool_ceil_mode
    input, weight, bias = _autocast(input, weight, bias)
    if not _kernels_take_block(input, weight, bias, *conv, *pool):
        return max_pool2d(F.relu(conv2d(input, weight, bias, *conv)), *pool)
    input, padding = resolve_padding(input, weight, stride, padding, dilation)
    return Conv2dReLUMaxPool2dFunction.apply(
        input, weight, bias, stride, padding, dilation, groups, *pool
    )
