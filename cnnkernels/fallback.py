"""The operators in pure PyTorch.

These functions have the names, the argument order and the results of the compiled operators. They
run when there is no compiled library, under ``use_backend("torch")``, and on fake tensors, where
they tell the compiler the shapes and memory formats of the compiled operators' results.

In all of them ``argmax`` is the winning tap of each pooling window, numbered row by row inside the
window (``kh * kernel_width + kw``), or the number of taps where a ReLU clips the winner: uint8 for
windows of up to 255 taps, int32 above.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from cnnkernels._shapes import Size2, conv2d_output_size, pair, stride_or_kernel


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size2 = 1,
    padding: Size2 | str = 0,
    dilation: Size2 = 1,
    groups: int = 1,
) -> Tensor:
    """2-D convolution: :func:`torch.nn.functional.conv2d`."""
    return F.conv2d(input, weight, bias, stride, padding, dilation, groups)


def conv2d_padding(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size2 = 1,
    padding: str = "valid",
    dilation: Size2 = 1,
    groups: int = 1,
) -> Tensor:
    """2-D convolution with the padding given by name, ``"same"`` or ``"valid"``."""
    return F.conv2d(input, weight, bias, stride, padding, dilation, groups)


def conv2d_relu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size2 = 1,
    padding: Size2 | str = 0,
    dilation: Size2 = 1,
    groups: int = 1,
) -> Tensor:
    """2-D convolution and ReLU, one after the other."""
    return F.relu(F.conv2d(input, weight, bias, stride, padding, dilation, groups))


def conv2d_relu_padding(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size2 = 1,
    padding: str = "valid",
    dilation: Size2 = 1,
    groups: int = 1,
) -> Tensor:
    """2-D convolution with the padding given by name, and ReLU."""
    return conv2d_relu(input, weight, bias, stride, padding, dilation, groups)


def conv2d_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: Size2,
    padding: Size2,
    dilation: Size2,
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of :func:`conv2d` for input, weight and bias, as far as output_mask asks."""
    batched = input.dim() == 4
    grad_input, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        grad_output if batched else grad_output.unsqueeze(0),
        input if batched else input.unsqueeze(0),
        weight,
        [weight.shape[0]],
        pair(stride),
        pair(padding),
        pair(dilation),
        False,
        (0, 0),
        groups,
        output_mask,
    )
    if grad_input is not None and not batched:
        grad_input = grad_input.squeeze(0)
    return grad_input, grad_weight, grad_bias


def max_pool2d(
    input: Tensor,
    kernel_size: Size2,
    stride: Size2 = (),
    padding: Size2 = 0,
    dilation: Size2 = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """2-D max pooling: :func:`torch.nn.functional.max_pool2d`; an empty stride is the kernel's."""
    return torch.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode)


def max_pool2d_with_indices(
    input: Tensor,
    kernel_size: Size2,
    stride: Size2 = (),
    padding: Size2 = 0,
    dilation: Size2 = 1,
    ceil_mode: bool = False,
) -> tuple[Tensor, Tensor]:
    """2-D max pooling and the int64 index of each maximum in its H x W plane."""
    # torch's annotations leave out the ints that it takes.
    return F.max_pool2d_with_indices(
        input,
        kernel_size,  # type: ignore[arg-type]
        stride,  # type: ignore[arg-type]
        padding,  # type: ignore[arg-type]
        dilation,  # type: ignore[arg-type]
        ceil_mode,
    )


def _memory_format(tensor: Tensor) -> torch.memory_format:
    channels_last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    if channels_last and not tensor.is_contiguous():
        return torch.channels_last
    return torch.contiguous_format


def _window_origins(
    output: Tensor, kernel_size: Size2, stride: Size2, padding: Size2
) -> tuple[Tensor, Tensor]:
    """Row and column of the first tap of each window, shaped (out_height, 1) and (out_width,)."""
    (sh, sw), (ph, pw) = stride_or_kernel(stride, kernel_size), pair(padding)
    rows = torch.arange(output.shape[-2], device=output.device) * sh - ph
    columns = torch.arange(output.shape[-1], device=output.device) * sw - pw
    return rows.unsqueeze(-1), columns


def argmax_to_indices(
    argmax: Tensor,
    input_width: int,
    kernel_size: Size2,
    stride: Size2 = (),
    padding: Size2 = 0,
    dilation: Size2 = 1,
) -> Tensor:
    """The int64 indices in the H x W plane that torch's pooling would have returned."""
    rows, columns = _window_origins(argmax, kernel_size, stride, padding)
    kernel_width = pair(kernel_size)[1]
    (dh, dw), tap = pair(dilation), argmax.long()
    row = rows + (tap // kernel_width) * dh
    column = columns + (tap % kernel_width) * dw
    return row * input_width + column


def max_pool2d_argmax(
    input: Tensor,
    kernel_size: Size2,
    stride: Size2 = (),
    padding: Size2 = 0,
    dilation: Size2 = 1,
    ceil_mode: bool = False,
) -> tuple[Tensor, Tensor]:
    """2-D max pooling and the winning tap of each window."""
    output, indices = max_pool2d_with_indices(
        input, kernel_size, stride, padding, dilation, ceil_mode
    )
    rows, columns = _window_origins(output, kernel_size, stride, padding)
    (kh, kw), (dh, dw), width = pair(kernel_size), pair(dilation), input.shape[-1]
    tap = (indices // width - rows) // dh * kw + (indices % width - columns) // dw
    return output, tap.to(torch.uint8 if kh * kw < 256 else torch.int32)


def _without_winner(argmax: Tensor, kernel_size: Size2) -> Tensor:
    """Where a ReLU clipped the winner: the argmax is one past the window's last tap."""
    height, width = pair(kernel_size)
    return argmax == height * width


def max_pool2d_backward(
    grad_output: Tensor,
    argmax: Tensor,
    input_size: Sequence[int],
    kernel_size: Size2,
    stride: Size2 = (),
    padding: Size2 = 0,
    dilation: Size2 = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """Adds each element of grad_output to its window's winner in a tensor of input_size.

    The result has argmax's memory format.
    """
    clipped = _without_winner(argmax, kernel_size)
    indices = argmax_to_indices(argmax, input_size[-1], kernel_size, stride, padding, dilation)
    return torch.ops.aten.max_pool2d_with_indices_backward(
        torch.where(clipped, 0, grad_output),
        torch.empty(
            input_size,
            dtype=grad_output.dtype,
            device=grad_output.device,
            memory_format=_memory_format(argmax),
        ),
        pair(kernel_size),
        stride_or_kernel(stride, kernel_size),
        pair(padding),
        pair(dilation),
        ceil_mode,
        torch.where(clipped, 0, indices),
    )


def max_pool2d_gather(
    input: Tensor,
    argmax: Tensor,
    kernel_size: Size2,
    stride: Size2 = (),
    padding: Size2 = 0,
    dilation: Size2 = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """Reads input at each window's winner, 0 where there is none.

    It is the adjoint of :func:`max_pool2d_backward`. The result has argmax's memory format.
    """
    clipped = _without_winner(argmax, kernel_size)
    indices = argmax_to_indices(argmax, input.shape[-1], kernel_size, stride, padding, dilation)
    indices = torch.where(clipped, 0, indices)
    winners = input.flatten(-2).gather(-1, indices.flatten(-2)).unflatten(-1, argmax.shape[-2:])
    return torch.where(clipped, 0, winners).contiguous(memory_format=_memory_format(argmax))


def conv2d_relu_max_pool2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size2 = 1,
    padding: Size2 | str = 0,
    dilation: Size2 = 1,
    groups: int = 1,
    pool_kernel_size: Size2 = 2,
    pool_stride: Size2 = (),
    pool_padding: Size2 = 0,
    pool_dilation: Size2 = 1,
    pool_ceil_mode: bool = False,
) -> Tensor:
    """Convolution, ReLU and max pooling, one after the other."""
    features = F.relu(F.conv2d(input, weight, bias, stride, padding, dilation, groups))
    return torch.max_pool2d(
        features, pool_kernel_size, pool_stride, pool_padding, pool_dilation, pool_ceil_mode
    )


def conv2d_relu_max_pool2d_padding(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size2 = 1,
    padding: str = "valid",
    dilation: Size2 = 1,
    groups: int = 1,
    pool_kernel_size: Size2 = 2,
    pool_stride: Size2 = (),
    pool_padding: Size2 = 0,
    pool_dilation: Size2 = 1,
    pool_ceil_mode: bool = False,
) -> Tensor:
    """Convolution with the padding given by name, ReLU and max pooling."""
    return conv2d_relu_max_pool2d(
        input,
        weight,
        bias,
        stride,
        padding,
        dilation,
        groups,
        pool_kernel_size,
        pool_stride,
        pool_padding,
        pool_dilation,
        pool_ceil_mode,
    )


def conv2d_relu_max_pool2d_argmax(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Size2,
    padding: Size2,
    dilation: Size2,
    groups: int,
    pool_kernel_size: Size2,
    pool_stride: Size2,
    pool_padding: Size2,
    pool_dilation: Size2,
    pool_ceil_mode: bool,
) -> tuple[Tensor, Tensor]:
    """:func:`conv2d_relu_max_pool2d` and the winning tap of each pooling window.

    Where the winner is clipped, the tap is the number of taps.
    """
    features = F.relu(F.conv2d(input, weight, bias, stride, padding, dilation, groups))
    output, argmax = max_pool2d_argmax(
        features, pool_kernel_size, pool_stride, pool_padding, pool_dilation, pool_ceil_mode
    )
    height, width = pair(pool_kernel_size)
    return output, torch.where(output <= 0, height * width, argmax).to(argmax.dtype)


def conv2d_relu_max_pool2d_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    argmax: Tensor,
    stride: Size2,
    padding: Size2,
    dilation: Size2,
    groups: int,
    pool_kernel_size: Size2,
    pool_stride: Size2,
    pool_padding: Size2,
    pool_dilation: Size2,
    pool_ceil_mode: bool,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of :func:`conv2d_relu_max_pool2d` for input, weight and bias."""
    grad_features = max_pool2d_backward(
        grad_output,
        argmax,
        conv2d_output_size(input.shape, weight.shape, stride, padding, dilation),
        pool_kernel_size,
        pool_stride,
        pool_padding,
        pool_dilation,
        pool_ceil_mode,
    )
    return conv2d_backward(
        grad_features, input, weight, stride, padding, dilation, groups, output_mask
    )


def gd_step_(params: Sequence[Tensor], grads: Sequence[Tensor], lr: float | Tensor) -> None:
    """One step of gradient descent in place: ``param -= lr * grad`` for every pair."""
    for param, grad in zip(params, grads, strict=True):
        param.add_(grad, alpha=-float(lr))


def sgd_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    weight_decay: float,
    momentum: float,
    lr: float | Tensor,
    dampening: float,
    nesterov: bool,
    maximize: bool,
    is_first_step: bool,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One step of SGD in place, with the arguments of ``torch._fused_sgd_``.

    ``momentum_buffers`` is empty when momentum is 0. On the first step the buffers' contents are
    ignored and overwritten. With grad_scale the gradients are divided by it in place first; with a
    found_inf other than 0 nothing changes at all.
    """
    if found_inf is not None and found_inf.item() != 0:
        return
    for index, (param, grad) in enumerate(zip(params, grads, strict=True)):
        if grad_scale is not None:
            grad.div_(grad_scale)
        update = -grad if maximize else grad
        if weight_decay != 0:
            update = update.add(param, alpha=weight_decay)
        if momentum != 0:
            buffer = momentum_buffers[index]
            if is_first_step:
                buffer.copy_(update)
            else:
                buffer.mul_(momentum).add_(update, alpha=1 - dampening)
            update = update.add(buffer, alpha=momentum) if nesterov else buffer
        param.add_(update, alpha=-float(lr))
