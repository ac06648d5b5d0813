"""The differentiable operators as :class:`torch.autograd.Function` classes.

``apply`` takes tensors first and numbers after them, and calls the operators of
``torch.ops.cnnkernels``. Unlike the derivatives that the operators carry themselves, these work
under every transform of :mod:`torch.func` (``grad``, ``vmap``, ``jvp``, ``jacrev``, ``jacfwd``,
``hessian``), nested as deep as you like, because each derivative is again such a Function:
convolution is linear in each of its arguments, and so its backward is made of convolutions; max
pooling selects, and the adjoint of selecting is scattering.

:mod:`cnnkernels.functional` uses them where a transform is active. In between it is faster without.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from cnnkernels import _vmap
from cnnkernels._shapes import Size2, conv2d_output_size

_ops = torch.ops.cnnkernels


def _sum(*terms: Tensor | None) -> Tensor | None:
    """The sum of the terms that there are."""
    present = [term for term in terms if term is not None]
    return sum(present[1:], start=present[0]) if present else None


def _conv2d_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    geometry: tuple[Size2, Size2, Size2, int],
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of input, weight and bias that output_mask asks for, None for the others."""
    if not any(output_mask):
        return None, None, None
    wanted = iter(
        Conv2dBackwardFunction.apply(grad_output, input, weight, *geometry, tuple(output_mask))
    )
    grad_input, grad_weight, grad_bias = (next(wanted) if want else None for want in output_mask)
    return grad_input, grad_weight, grad_bias


class Conv2dFunction(Function):
    """2-D convolution.

    ``Conv2dFunction.apply(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1)``
    computes :func:`cnnkernels.functional.conv2d`; padding is in numbers here, not ``"same"``.
    """

    @staticmethod
    def forward(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Size2 = 1,
        padding: Size2 = 0,
        dilation: Size2 = 1,
        groups: int = 1,
    ) -> Tensor:
        """The convolution's output."""
        return _ops.conv2d.default(input, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keeps the input and the weight."""
        input, weight, _, *geometry = inputs
        ctx.save_for_backward(input, weight)
        ctx.save_for_forward(input, weight)
        ctx.geometry = tuple(geometry)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of input, weight and bias, as far as they are needed."""
        input, weight = ctx.saved_tensors
        grads = _conv2d_backward(grad_output, input, weight, ctx.geometry, ctx.needs_input_grad[:3])
        return *grads, None, None, None, None

    @staticmethod
    def jvp(
        ctx: Any, input_t: Tensor | None, weight_t: Tensor | None, bias_t: Tensor | None, *_: None
    ) -> Tensor | None:
        """The tangent of the output."""
        input, weight = ctx.saved_tensors
        return _conv2d_jvp(input, weight, ctx.geometry, input_t, weight_t, bias_t)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        """Folds into the minibatch where only the input is batched; otherwise loops."""
        return _vmap.conv_rule(Conv2dFunction.apply, images=(0,))(info, in_dims, *args)


def _conv2d_jvp(
    input: Tensor,
    weight: Tensor,
    geometry: tuple[Size2, Size2, Size2, int],
    input_t: Tensor | None,
    weight_t: Tensor | None,
    bias_t: Tensor | None,
) -> Tensor | None:
    """The tangent of conv2d(input, weight, bias) for the tangents that there are."""
    if bias_t is not None:
        stride, padding, dilation, _ = geometry
        output_size = conv2d_output_size(input.shape, weight.shape, stride, padding, dilation)
        bias_t = bias_t[:, None, None].expand(output_size)
    return _sum(
        None if input_t is None else Conv2dFunction.apply(input_t, weight, None, *geometry),
        None if weight_t is None else Conv2dFunction.apply(input, weight_t, None, *geometry),
        bias_t,
    )


class Conv2dReLUFunction(Function):
    """2-D convolution and ReLU as one operator.

    ``Conv2dReLUFunction.apply(input, weight, bias=None, stride=1, padding=0, dilation=1,
    groups=1)`` computes :func:`cnnkernels.functional.conv2d_relu`; padding is in numbers here, not
    ``"same"``.
    """

    @staticmethod
    def forward(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Size2 = 1,
        padding: Size2 = 0,
        dilation: Size2 = 1,
        groups: int = 1,
    ) -> Tensor:
        """The ReLU's output."""
        return _ops.conv2d_relu.default(input, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keeps the input, the weight and the output, which tells what the ReLU clipped."""
        input, weight, _, *geometry = inputs
        ctx.save_for_backward(input, weight, output)
        ctx.save_for_forward(input, weight, output)
        ctx.geometry = tuple(geometry)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of input, weight and bias, as far as they are needed."""
        input, weight, output = ctx.saved_tensors
        grads = _conv2d_backward(
            _relu_derivative(grad_output, output),
            input,
            weight,
            ctx.geometry,
            ctx.needs_input_grad[:3],
        )
        return *grads, None, None, None, None

    @staticmethod
    def jvp(
        ctx: Any, input_t: Tensor | None, weight_t: Tensor | None, bias_t: Tensor | None, *_: None
    ) -> Tensor | None:
        """The tangent of the output."""
        input, weight, output = ctx.saved_tensors
        conv_t = _conv2d_jvp(input, weight, ctx.geometry, input_t, weight_t, bias_t)
        return None if conv_t is None else _relu_derivative(conv_t, output)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        """Folds into the minibatch where only the input is batched; otherwise loops."""
        return _vmap.conv_rule(Conv2dReLUFunction.apply, images=(0,))(info, in_dims, *args)


def _relu_derivative(change: Tensor, output: Tensor) -> Tensor:
    """The gradient or tangent where the ReLU clipped nothing, 0 elsewhere; its own adjoint."""
    return torch.ops.aten.threshold_backward(change, output, 0)


class Conv2dBackwardFunction(Function):
    """The gradients of a 2-D convolution, themselves differentiable.

    ``Conv2dBackwardFunction.apply(grad_output, input, weight, stride, padding, dilation, groups,
    output_mask)`` returns a tuple of those of (grad_input, grad_weight, grad_bias) that output_mask
    asks for.
    """

    @staticmethod
    def forward(
        grad_output: Tensor,
        input: Tensor,
        weight: Tensor,
        stride: Size2,
        padding: Size2,
        dilation: Size2,
        groups: int,
        output_mask: Sequence[bool],
    ) -> tuple[Tensor, ...]:
        """The gradients that are asked for."""
        grads = _ops.conv2d_backward(
            grad_output, input, weight, stride, padding, dilation, groups, output_mask
        )
        return tuple(grad for grad, want in zip(grads, output_mask, strict=True) if want)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keeps all three tensors: the gradients are linear in each."""
        grad_output, input, weight, *geometry, output_mask = inputs
        ctx.save_for_backward(grad_output, input, weight)
        ctx.save_for_forward(grad_output, input, weight)
        ctx.geometry = tuple(geometry)
        ctx.output_mask = output_mask
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        """The double backward, made of convolutions."""
        grad_output, input, weight = ctx.saved_tensors
        given = iter(cotangents)
        input_c, weight_c, bias_c = (next(given) if want else None for want in ctx.output_mask)
        needs_grad_output, needs_input, needs_weight = ctx.needs_input_grad[:3]
        grad_grad_output = grad_input = grad_weight = None
        if needs_grad_output:
            grad_grad_output = _conv2d_jvp(input, weight, ctx.geometry, input_c, weight_c, bias_c)
        if needs_input and weight_c is not None:
            grad_input, _, _ = _conv2d_backward(
                grad_output, input, weight_c, ctx.geometry, (True, False, False)
            )
        if needs_weight and input_c is not None:
            _, grad_weight, _ = _conv2d_backward(
                grad_output, input_c, weight, ctx.geometry, (False, True, False)
            )
        return grad_grad_output, grad_input, grad_weight, None, None, None, None, None

    @staticmethod
    def jvp(
        ctx: Any,
        grad_output_t: Tensor | None,
        input_t: Tensor | None,
        weight_t: Tensor | None,
        *_: None,
    ) -> tuple[Tensor | None, ...]:
        """The tangents of the gradients."""
        grad_output, input, weight = ctx.saved_tensors
        want_input, want_weight, _ = mask = ctx.output_mask
        tangents: list[tuple[Tensor | None, ...]] = []
        if grad_output_t is not None:
            tangents.append(_conv2d_backward(grad_output_t, input, weight, ctx.geometry, mask))
        if input_t is not None:
            tangents.append(
                _conv2d_backward(
                    grad_output, input_t, weight, ctx.geometry, (False, want_weight, False)
                )
            )
        if weight_t is not None:
            tangents.append(
                _conv2d_backward(
                    grad_output, input, weight_t, ctx.geometry, (want_input, False, False)
                )
            )
        # Autograd wants a tangent for every output, be it zero.
        sizes = (input.shape, weight.shape, weight.shape[:1])
        return tuple(
            weight.new_zeros(size) if tangent is None else tangent
            for tangent, size, want in zip(map(_sum, *tangents), sizes, mask, strict=True)
            if want
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        """Folds into the minibatch for the input's gradient alone; otherwise loops."""
        rule = _vmap.conv_backward_rule(Conv2dBackwardFunction.apply, images=(0, 1))
        return rule(info, in_dims, *args)


class MaxPool2dArgmaxFunction(Function):
    """2-D max pooling that also returns each window's winning tap, counted row by row.

    ``MaxPool2dArgmaxFunction.apply(input, kernel_size, stride=(), padding=0, dilation=1,
    ceil_mode=False)``; an empty stride is the kernel's size. The argmax is uint8 where the window
    has up to 255 taps, and it is all that is kept for the backward pass.
    """

    @staticmethod
    def forward(
        input: Tensor,
        kernel_size: Size2,
        stride: Size2 = (),
        padding: Size2 = 0,
        dilation: Size2 = 1,
        ceil_mode: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Output and argmax."""
        return _ops.max_pool2d_argmax(input, kernel_size, stride, padding, dilation, ceil_mode)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Keeps the argmax."""
        input, *pool = inputs
        _, argmax = output
        ctx.mark_non_differentiable(argmax)
        ctx.save_for_backward(argmax)
        ctx.save_for_forward(argmax)
        ctx.input_size = input.shape
        ctx.pool = pool

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, _: None) -> tuple[Tensor | None, ...]:
        """The gradient of the input."""
        (argmax,) = ctx.saved_tensors
        grad_input = MaxPool2dBackwardFunction.apply(grad_output, argmax, ctx.input_size, *ctx.pool)
        return grad_input, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, input_t: Tensor, *_: None) -> tuple[Tensor, None]:
        """The tangent of the output."""
        (argmax,) = ctx.saved_tensors
        return MaxPool2dGatherFunction.apply(input_t, argmax, *ctx.pool), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        """Folds into the minibatch."""
        rule = _vmap.pool_rule(MaxPool2dArgmaxFunction.apply, images=(0,))
        return rule(info, in_dims, *args)


class MaxPool2dFunction(MaxPool2dArgmaxFunction):
    """2-D max pooling.

    ``MaxPool2dFunction.apply(input, kernel_size, stride=(), padding=0, dilation=1,
    ceil_mode=False)`` computes :func:`cnnkernels.functional.max_pool2d`; an empty stride is the
    kernel's size.
    """

    @classmethod
    def apply(cls, *args: Any, **kwargs: Any) -> Tensor:
        """The pooled output."""
        return MaxPool2dArgmaxFunction.apply(*args, **kwargs)[0]


class MaxPool2dBackwardFunction(Function):
    """Scatters (adds) to the winners of max pooling: :class:`MaxPool2dGatherFunction`'s adjoint.

    ``MaxPool2dBackwardFunction.apply(grad_output, argmax, input_size, kernel_size, stride,
    padding, dilation, ceil_mode)``.
    """

    @staticmethod
    def forward(
        grad_output: Tensor, argmax: Tensor, input_size: Sequence[int], *pool: Any
    ) -> Tensor:
        """The gradient of the pool's input."""
        return _ops.max_pool2d_backward(grad_output, argmax, input_size, *pool)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keeps the argmax."""
        _, argmax, _, *ctx.pool = inputs
        ctx.save_for_backward(argmax)
        ctx.save_for_forward(argmax)
        ctx.input_size = output.shape

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of grad_output."""
        (argmax,) = ctx.saved_tensors
        grad = MaxPool2dGatherFunction.apply(cotangent, argmax, *ctx.pool)
        return grad, None, None, *(None for _ in ctx.pool)

    @staticmethod
    def jvp(ctx: Any, grad_output_t: Tensor, *_: None) -> Tensor:
        """The tangent of the result, which is linear in grad_output."""
        (argmax,) = ctx.saved_tensors
        return MaxPool2dBackwardFunction.apply(grad_output_t, argmax, ctx.input_size, *ctx.pool)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        """Folds into the minibatch."""
        rule = _vmap.pool_backward_rule(MaxPool2dBackwardFunction.apply)
        return rule(info, in_dims, *args)


class MaxPool2dGatherFunction(Function):
    """Reads a tensor at the winners of max pooling; :class:`MaxPool2dBackwardFunction`'s adjoint.

    ``MaxPool2dGatherFunction.apply(input, argmax, kernel_size, stride, padding, dilation,
    ceil_mode)``.
    """

    @staticmethod
    def forward(input: Tensor, argmax: Tensor, *pool: Any) -> Tensor:
        """The input's elements at the winners, shaped as argmax."""
        return _ops.max_pool2d_gather(input, argmax, *pool)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keeps the argmax."""
        input, argmax, *ctx.pool = inputs
        ctx.save_for_backward(argmax)
        ctx.save_for_forward(argmax)
        ctx.input_size = input.shape

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of the input."""
        (argmax,) = ctx.saved_tensors
        grad = MaxPool2dBackwardFunction.apply(cotangent, argmax, ctx.input_size, *ctx.pool)
        return grad, None, *(None for _ in ctx.pool)

    @staticmethod
    def jvp(ctx: Any, input_t: Tensor, *_: None) -> Tensor:
        """The tangent of the result, which is linear in the input."""
        (argmax,) = ctx.saved_tensors
        return MaxPool2dGatherFunction.apply(input_t, argmax, *ctx.pool)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        """Folds into the minibatch."""
        rule = _vmap.pool_rule(MaxPool2dGatherFunction.apply, images=(0, 1))
        return rule(info, in_dims, *args)


class Conv2dReLUMaxPool2dArgmaxFunction(Function):
    """Convolution, ReLU and max pooling as one operator, and each window's winning tap.

    Takes the arguments of :class:`Conv2dReLUMaxPool2dFunction`. A first backward runs the
    operator's own, by the way that :func:`cnnkernels.explain` names; a derivative that is itself to
    be differentiated goes through the backward of the pool and that of the convolution.
    """

    @staticmethod
    def forward(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Size2 = 1,
        padding: Size2 = 0,
        dilation: Size2 = 1,
        groups: int = 1,
        pool_kernel_size: Size2 = 2,
        pool_stride: Size2 = (),
        pool_padding: Size2 = 0,
        pool_dilation: Size2 = 1,
        pool_ceil_mode: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Output and argmax."""
        return _ops.conv2d_relu_max_pool2d_argmax(
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

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Keeps the input, the weight and the argmax."""
        input, weight, _, *arguments = inputs
        _, argmax = output
        ctx.mark_non_differentiable(argmax)
        ctx.save_for_backward(input, weight, argmax)
        ctx.save_for_forward(input, weight, argmax)
        ctx.geometry = tuple(arguments[:4])
        ctx.pool = tuple(arguments[4:])

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, _: None) -> tuple[Tensor | None, ...]:
        """Gradients of input, weight and bias, as far as they are needed."""
        input, weight, argmax = ctx.saved_tensors
        mask = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
            grad_features = MaxPool2dBackwardFunction.apply(
                grad_output,
                argmax,
                conv2d_output_size(input.shape, weight.shape, *ctx.geometry[:3]),
                *ctx.pool,
            )
            grads = _conv2d_backward(grad_features, input, weight, ctx.geometry, mask)
        else:
            grads = _ops.conv2d_relu_max_pool2d_backward(
                grad_output, input, weight, argmax, *ctx.geometry, *ctx.pool, mask
            )
        return *grads, *(None for _ in ctx.geometry + ctx.pool)

    @staticmethod
    def jvp(
        ctx: Any, input_t: Tensor | None, weight_t: Tensor | None, bias_t: Tensor | None, *_: None
    ) -> tuple[Tensor | None, None]:
        """The tangent of the output."""
        input, weight, argmax = ctx.saved_tensors
        features_t = _conv2d_jvp(input, weight, ctx.geometry, input_t, weight_t, bias_t)
        if features_t is None:
            return None, None
        return MaxPool2dGatherFunction.apply(features_t, argmax, *ctx.pool), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        """Folds into the minibatch where only the input is batched; otherwise loops."""
        rule = _vmap.conv_rule(Conv2dReLUMaxPool2dArgmaxFunction.apply, images=(0,))
        return rule(info, in_dims, *args)


class Conv2dReLUMaxPool2dFunction(Conv2dReLUMaxPool2dArgmaxFunction):
    """Convolution, ReLU and max pooling as one operator, which never stores the conv's output.

    ``Conv2dReLUMaxPool2dFunction.apply(input, weight, bias=None, stride=1, padding=0, dilation=1,
    groups=1, pool_kernel_size=2, pool_stride=(), pool_padding=0, pool_dilation=1,
    pool_ceil_mode=False)`` computes :func:`cnnkernels.functional.conv2d_relu_max_pool2d`; padding
    is in numbers here, and an empty pool_stride is the pool's kernel size.
    """

    @classmethod
    def apply(cls, *args: Any, **kwargs: Any) -> Tensor:
        """The pooled output."""
        return Conv2dReLUMaxPool2dArgmaxFunction.apply(*args, **kwargs)[0]
