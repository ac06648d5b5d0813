"""The operators as a graph compiler must see them: calls of the dispatcher's operators."""

from __future__ import annotations

from typing import Any

import torch

from cnnkernels import _registration as _registration  # defines the operators

conv2d = torch.ops.cnnkernels.conv2d
conv2d_relu = torch.ops.cnnkernels.conv2d_relu
max_pool2d = torch.ops.cnnkernels.max_pool2d
max_pool2d_with_indices = torch.ops.cnnkernels.max_pool2d_with_indices


def conv2d_relu_max_pool2d(*args: Any) -> torch.Tensor:
    """Passes the pool's arguments by name, as the operator's schema wants them."""
    *conv, kernel_size, stride, padding, dilation, ceil_mode = args
    return torch.ops.cnnkernels.conv2d_relu_max_pool2d(
        *conv,
        pool_kernel_size=kernel_size,
        pool_stride=stride,
        pool_padding=padding,
        pool_dilation=dilation,
        pool_ceil_mode=ceil_mode,
    )
