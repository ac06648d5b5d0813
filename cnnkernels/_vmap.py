"""How the operators act under ``torch.vmap``: fold the new dimension into the minibatch, or loop.

A rule serves twice: as the ``vmap`` of an autograd Function, and for the operator itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

Rule = Callable[..., tuple[Any, Any]]


def _is_batched(dim: object) -> bool:
    # The entry of an argument that is a list is None or a list of Nones.
    return isinstance(dim, int)


def _out_dims(outputs: Any) -> Any:
    if isinstance(outputs, tuple):
        return tuple(None if output is None else 0 for output in outputs)
    return 0


def _map(function: Callable[[Any], Any], outputs: Any) -> Any:
    if isinstance(outputs, tuple):
        return tuple(None if output is None else function(output) for output in outputs)
    return function(outputs)


def _loop(
    call: Callable[..., Any], batch_size: int, in_dims: Sequence[Any], args: Sequence[Any]
) -> Any:
    """Calls once for each sample and stacks the results along a new first dimension."""
    samples = [
        call(
            *(
                arg.select(dim, index) if _is_batched(dim) else arg
                for arg, dim in zip(args, in_dims, strict=True)
            )
        )
        for index in range(batch_size)
    ]
    if isinstance(samples[0], tuple):
        return tuple(
            None if column[0] is None else torch.stack(column)
            for column in zip(*samples, strict=True)
        )
    return torch.stack(samples)


def _fold(
    call: Callable[..., Any],
    batch_size: int,
    in_dims: Sequence[Any],
    args: Sequence[Any],
    images: Sequence[int],
) -> Any:
    """Calls once, with the new dimension as (a part of) the minibatch of every image argument."""
    folded = list(args)
    batched_samples = False
    for index in images:
        arg, dim = args[index], in_dims[index]
        if _is_batched(dim):
            arg = arg.movedim(dim, 0)
        else:
            arg = arg.unsqueeze(0).expand(batch_size, *arg.shape)
        batched_samples = arg.dim() == 5
        folded[index] = arg.flatten(0, 1) if batched_samples else arg
    outputs = call(*folded)
    if not batched_samples:
        return outputs
    minibatch = folded[images[0]].shape[0] // max(batch_size, 1)
    return _map(lambda output: output.unflatten(0, (batch_size, minibatch)), outputs)


def conv_rule(call: Callable[..., Any], images: Sequence[int]) -> Rule:
    """The rule of a convolution: folds where only its images (by position) are batched."""

    def rule(info: Any, in_dims: Sequence[Any], *args: Any, **numbers: Any) -> tuple[Any, Any]:
        batched = {index for index, dim in enumerate(in_dims) if _is_batched(dim)}
        bound = functools.partial(call, **numbers)
        if batched <= set(images):
            outputs = _fold(bound, info.batch_size, in_dims, args, images)
        else:
            outputs = _loop(bound, info.batch_size, in_dims, args)
        return outputs, _out_dims(outputs)

    return rule


def conv_backward_rule(
    call: Callable[..., Any], images: Sequence[int], mask_index: int = -1
) -> Rule:
    """The rule of a convolution's backward, which sums over the minibatch but for the input.

    So it folds only where the gradient of the input alone is wanted.
    """
    fold = conv_rule(call, images)

    def rule(info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
        if tuple(args[mask_index]) == (True, False, False):
            return fold(info, in_dims, *args)
        outputs = _loop(call, info.batch_size, in_dims, args)
        return outputs, _out_dims(outputs)

    return rule


def pool_rule(call: Callable[..., Any], images: Sequence[int]) -> Rule:
    """The rule of an operator all of whose tensors are images: always folds."""

    def rule(info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
        outputs = _fold(call, info.batch_size, in_dims, args, images)
        return outputs, _out_dims(outputs)

    return rule


def pool_backward_rule(call: Callable[..., Any]) -> Rule:
    """The rule of ``max_pool2d_backward(grad_output, argmax, input_size, ...)``."""

    def rule(info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
        grad_output, argmax, input_size, *rest = args
        if len(input_size) == 4:
            folded_size = (info.batch_size * input_size[0], *input_size[1:])
        else:
            folded_size = (info.batch_size, *input_size)
        folded_args = (grad_output, argmax, folded_size, *rest)
        outputs = _fold(call, info.batch_size, in_dims, folded_args, (0, 1))
        return outputs, _out_dims(outputs)

    return rule
