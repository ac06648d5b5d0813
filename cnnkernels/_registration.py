"""Completes the ``cnnkernels`` operators of the dispatcher.

The compiled library defines the operators, with CPU kernels and derivatives; what is added here is
how they act on fake tensors (torch.compile, torch.export) and under ``torch.vmap``. Without a
library the same operators are defined here from :mod:`cnnkernels.fallback`, so that scripts,
exported programs and saved models still load and run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from cnnkernels import _vmap, fallback
from cnnkernels._native import is_native_available

_POOL = (
    "int[2] kernel_size, int[2] stride=[], int[2] padding=0, int[2] dilation=1, "
    "bool ceil_mode=False"
)
_CONV_GEOMETRY = "int[2] stride, int[2] padding, int[2] dilation, int groups"
_BLOCK_POOL = (
    "*, int[2] pool_kernel_size=2, int[2] pool_stride=[], int[2] pool_padding=0, "
    "int[2] pool_dilation=1, bool pool_ceil_mode=False"
)
_BLOCK_GEOMETRY = (
    f"{_CONV_GEOMETRY}, int[2] pool_kernel_size, int[2] pool_stride, int[2] pool_padding, "
    "int[2] pool_dilation, bool pool_ceil_mode"
)


_CONV = (
    "Tensor input, Tensor weight, Tensor? bias=None, int[2] stride=1, int[2] padding=0, "
    "int[2] dilation=1, int groups=1"
)
_CONV_PADDING = _CONV.replace("int[2] padding=0", 'str padding="valid"')
_GD_STEP = "(Tensor(a!)[] params, Tensor[] grads, float lr) -> ()"
_SGD_STEP = (
    "(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] momentum_buffers, *, "
    "float weight_decay, float momentum, float lr, float dampening, bool nesterov, "
    "bool maximize, bool is_first_step, Tensor? grad_scale=None, Tensor? found_inf=None) -> ()"
)


# name -> (arguments and results, implementation); the schemas are those of csrc/ops.
_OPERATORS: dict[str, tuple[str, Callable[..., Any]]] = {
    "conv2d": (f"({_CONV}) -> Tensor", fallback.conv2d),
    "conv2d.padding": (
        f"({_CONV_PADDING}) -> Tensor",
        fallback.conv2d_padding,
    ),
    "conv2d_relu": (f"({_CONV}) -> Tensor", fallback.conv2d_relu),
    "conv2d_relu.padding": (f"({_CONV_PADDING}) -> Tensor", fallback.conv2d_relu_padding),
    "conv2d_backward": (
        f"(Tensor grad_output, Tensor input, Tensor weight, {_CONV_GEOMETRY}, "
        "bool[3] output_mask) -> (Tensor, Tensor, Tensor)",
        fallback.conv2d_backward,
    ),
    "max_pool2d": (f"(Tensor input, {_POOL}) -> Tensor", fallback.max_pool2d),
    "max_pool2d_with_indices": (
        f"(Tensor input, {_POOL}) -> (Tensor, Tensor)",
        fallback.max_pool2d_with_indices,
    ),
    "max_pool2d_argmax": (
        f"(Tensor input, {_POOL}) -> (Tensor, Tensor)",
        fallback.max_pool2d_argmax,
    ),
    "max_pool2d_backward": (
        f"(Tensor grad_output, Tensor argmax, SymInt[] input_size, {_POOL}) -> Tensor",
        fallback.max_pool2d_backward,
    ),
    "max_pool2d_gather": (
        f"(Tensor input, Tensor argmax, {_POOL}) -> Tensor",
        fallback.max_pool2d_gather,
    ),
    "conv2d_relu_max_pool2d": (
        f"({_CONV}, {_BLOCK_POOL}) -> Tensor",
        fallback.conv2d_relu_max_pool2d,
    ),
    "conv2d_relu_max_pool2d.padding": (
        f"({_CONV_PADDING}, {_BLOCK_POOL}) -> Tensor",
        fallback.conv2d_relu_max_pool2d_padding,
    ),
    "conv2d_relu_max_pool2d_argmax": (
        f"(Tensor input, Tensor weight, Tensor? bias, {_BLOCK_GEOMETRY}) -> (Tensor, Tensor)",
        fallback.conv2d_relu_max_pool2d_argmax,
    ),
    "conv2d_relu_max_pool2d_backward": (
        "(Tensor grad_output, Tensor input, Tensor weight, Tensor argmax, "
        f"{_BLOCK_GEOMETRY}, bool[3] output_mask) -> (Tensor, Tensor, Tensor)",
        fallback.conv2d_relu_max_pool2d_backward,
    ),
    "gd_step_": (_GD_STEP, fallback.gd_step_),
    "gd_step_.tensor_lr": (_GD_STEP.replace("float lr", "Tensor lr"), fallback.gd_step_),
    "sgd_step_": (_SGD_STEP, fallback.sgd_step_),
    "sgd_step_.tensor_lr": (_SGD_STEP.replace("float lr", "Tensor lr"), fallback.sgd_step_),
}


def _define() -> torch.library.Library:
    """Defines every operator from :mod:`cnnkernels.fallback`."""
    library = torch.library.Library("cnnkernels", "DEF")
    for name, (schema, implementation) in _OPERATORS.items():
        base, _, overload = name.partition(".")
        library.define(f"{base}{'.' + overload if overload else ''}{schema}")
        # Composite: autograd, autocast, torch.func and the compiler see through to torch's own.
        library.impl(name, implementation, "CompositeImplicitAutograd")
    return library


def _complete() -> None:
    """Registers fake kernels and vmap rules for the operators of the compiled library."""
    for name, (_, implementation) in _OPERATORS.items():
        if name.endswith(".padding"):
            continue  # the library composes these of the operators with padding in numbers
        mutates = name.partition(".")[0].endswith("step_")
        torch.library.register_fake(
            f"cnnkernels::{name}", (lambda *args, **kwargs: None) if mutates else implementation
        )
    ops = torch.ops.cnnkernels
    for name, rule in {
        "conv2d": _vmap.conv_rule(ops.conv2d, images=(0,)),
        "conv2d_relu": _vmap.conv_rule(ops.conv2d_relu, images=(0,)),
        "conv2d_backward": _vmap.conv_backward_rule(ops.conv2d_backward, images=(0, 1)),
        "max_pool2d": _vmap.pool_rule(ops.max_pool2d, images=(0,)),
        "max_pool2d_with_indices": _vmap.pool_rule(ops.max_pool2d_with_indices, images=(0,)),
        "max_pool2d_argmax": _vmap.pool_rule(ops.max_pool2d_argmax, images=(0,)),
        "max_pool2d_backward": _vmap.pool_backward_rule(ops.max_pool2d_backward),
        "max_pool2d_gather": _vmap.pool_rule(ops.max_pool2d_gather, images=(0, 1)),
        "conv2d_relu_max_pool2d": _vmap.conv_rule(ops.conv2d_relu_max_pool2d, images=(0,)),
        "conv2d_relu_max_pool2d_argmax": _vmap.conv_rule(
            ops.conv2d_relu_max_pool2d_argmax, images=(0,)
        ),
        "conv2d_relu_max_pool2d_backward": _vmap.conv_backward_rule(
            ops.conv2d_relu_max_pool2d_backward, images=(0, 1, 3)
        ),
    }.items():
        torch.library.register_vmap(f"cnnkernels::{name}", rule)


if is_native_available():
    _complete()
else:
    _library = _define()
