"""Modules that take the place of torch's: same arguments, same parameters, same ``state_dict``."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.common_types import _size_2_t

from cnnkernels import functional

__all__ = ["Conv2d", "Conv2dReLU", "Conv2dReLUMaxPool2d", "MaxPool2d"]


class Conv2d(torch.nn.Conv2d):
    """:class:`torch.nn.Conv2d` on :func:`cnnkernels.functional.conv2d`.

    Arguments, attributes, errors, initial values and ``state_dict`` are torch's, all padding modes
    included. Input shaped (N, C_in, H, W) or (C_in, H, W).
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.padding_mode != "zeros":
            padded = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            return functional.conv2d(
                padded, weight, bias, self.stride, 0, self.dilation, self.groups
            )
        return functional.conv2d(
            input, weight, bias, self.stride, self.padding, self.dilation, self.groups
        )


class Conv2dReLU(Conv2d):
    """A convolution and a ReLU in one operator: :func:`cnnkernels.functional.conv2d_relu`.

    It has the arguments, the parameters and the ``state_dict`` of a :class:`torch.nn.Conv2d` and
    computes ``ReLU(Conv2d(input))``.

    >>> Conv2dReLU(3, 8, kernel_size=3, padding=1)(torch.zeros(4, 3, 32, 32)).shape
    torch.Size([4, 8, 32, 32])
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.padding_mode != "zeros":
            padded = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            return functional.conv2d_relu(
                padded, weight, bias, self.stride, 0, self.dilation, self.groups
            )
        return functional.conv2d_relu(
            input, weight, bias, self.stride, self.padding, self.dilation, self.groups
        )


class MaxPool2d(torch.nn.MaxPool2d):
    """:class:`torch.nn.MaxPool2d` on :func:`cnnkernels.functional.max_pool2d`.

    Arguments and attributes are torch's, ``return_indices`` included. Input shaped (N, C, H, W) or
    (C, H, W).
    """

    def forward(self, input: Tensor):  # type: ignore[no-untyped-def]
        """Runs the forward pass."""
        return functional.max_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            ceil_mode=self.ceil_mode,
            return_indices=self.return_indices,
        )


class Conv2dReLUMaxPool2d(Conv2d):
    """A convolution, a ReLU and max pooling in one operator.

    It has the parameters and the ``state_dict`` of a :class:`torch.nn.Conv2d` and computes
    ``MaxPool2d(ReLU(Conv2d(input)))`` without ever storing the convolution's output.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, device, dtype: the convolution's, as in :class:`torch.nn.Conv2d`.
        pool_kernel_size, pool_stride, pool_padding, pool_dilation, pool_ceil_mode: the pooling's,
            as in :class:`torch.nn.MaxPool2d`; a pool_stride of None is pool_kernel_size.

    >>> block = Conv2dReLUMaxPool2d(3, 8, kernel_size=3, padding=1, pool_kernel_size=2)
    >>> block(torch.zeros(4, 3, 32, 32)).shape
    torch.Size([4, 8, 16, 16])
    """

    __constants__ = [  # noqa: RUF012  torch declares it so
        *torch.nn.Conv2d.__constants__,
        "pool_kernel_size",
        "pool_stride",
        "pool_padding",
        "pool_dilation",
        "pool_ceil_mode",
    ]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: _size_2_t,
        stride: _size_2_t = 1,
        padding: _size_2_t | str = 0,
        dilation: _size_2_t = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        pool_kernel_size: _size_2_t = 2,
        pool_stride: _size_2_t | None = None,
        pool_padding: _size_2_t = 0,
        pool_dilation: _size_2_t = 1,
        pool_ceil_mode: bool = False,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )
        self.set_pool(pool_kernel_size, pool_stride, pool_padding, pool_dilation, pool_ceil_mode)

    @torch.jit.unused
    def set_pool(
        self,
        kernel_size: _size_2_t,
        stride: _size_2_t | None = None,
        padding: _size_2_t = 0,
        dilation: _size_2_t = 1,
        ceil_mode: bool = False,
    ) -> None:
        """Sets the pooling's arguments, which are those of :class:`torch.nn.MaxPool2d`."""
        self.pool_kernel_size = kernel_size
        self.pool_stride = kernel_size if stride is None else stride
        self.pool_padding = padding
        self.pool_dilation = dilation
        self.pool_ceil_mode = ceil_mode

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.padding_mode != "zeros":
            padded = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            return functional.conv2d_relu_max_pool2d(
                padded,
                weight,
                bias,
                self.stride,
                0,
                self.dilation,
                self.groups,
                pool_kernel_size=self.pool_kernel_size,
                pool_stride=self.pool_stride,
                pool_padding=self.pool_padding,
                pool_dilation=self.pool_dilation,
                pool_ceil_mode=self.pool_ceil_mode,
            )
        return functional.conv2d_relu_max_pool2d(
            input,
            weight,
            bias,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            pool_kernel_size=self.pool_kernel_size,
            pool_stride=self.pool_stride,
            pool_padding=self.pool_padding,
            pool_dilation=self.pool_dilation,
            pool_ceil_mode=self.pool_ceil_mode,
        )

    def extra_repr(self) -> str:
        """The convolution's arguments, then the pooling's."""
        return (
            f"{super().extra_repr()}, pool_kernel_size={self.pool_kernel_size}, "
            f"pool_stride={self.pool_stride}, pool_padding={self.pool_padding}, "
            f"pool_dilation={self.pool_dilation}, pool_ceil_mode={self.pool_ceil_mode}"
        )
