"""Gradient descent whose step is one operator call for all tensors of a parameter group."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import _profiler_enabled
from torch.optim.optimizer import (
    Optimizer,
    ParamsT,
    _global_optimizer_post_hooks,
    _global_optimizer_pre_hooks,
)
from torch.optim.sgd import sgd

from cnnkernels import _backend, fallback

__all__ = ["SGD", "SimpleGD"]


def _observable(step: Callable[..., Any]) -> Callable[..., Any]:
    """Lets hooks and profilers see a step as torch does, at no cost where there are none.

    Torch wraps the ``step`` of every optimizer in a profiler's record and loops over hooks, which
    takes longer than the kernel does for a small network. A ``step`` marked as hooked is left
    alone, so that this wrapper can decide for each call.
    """
    observed = Optimizer.profile_hook_step(step)

    @functools.wraps(step)
    def wrapper(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        if (
            _profiler_enabled()
            or self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
        ):
            return observed(self, *args, **kwargs)
        return step(self, *args, **kwargs)

    wrapper.hooked = True  # type: ignore[attr-defined]
    return wrapper


def _zero_grad(optimizer: Optimizer, set_to_none: bool = True) -> None:
    """Forgets the gradients of all tensors, or sets them to zero.

    Args:
        optimizer: whose tensors they are; this is a method of each class below.
        set_to_none: whether to forget them; False is slower and keeps their memory.
    """
    # A profiler sees a record of each call, and zeros are torch's business.
    if not set_to_none or _profiler_enabled():
        Optimizer.zero_grad(optimizer, set_to_none)
        return
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = None


class SimpleGD(Optimizer):
    """Plain gradient descent, ``param -= lr * grad``: the optimizer that the tutorial defines.

    Args:
        params: tensors, or dicts that define parameter groups (each may have its own ``lr``).
        lr: learning rate, a float or a tensor of one element.

    Raises:
        ValueError: lr is negative, or a tensor of several elements.
        TypeError: params is a tensor rather than an iterable of tensors.

    >>> x = torch.tensor([1.0], requires_grad=True)
    >>> optimizer = SimpleGD([x], lr=0.1)
    >>> (x**2).sum().backward()
    >>> optimizer.step()
    >>> x.item()
    0.800000011920929
    """

    def __init__(self, params: ParamsT, lr: float | Tensor) -> None:
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        if lr < 0.0:
            raise ValueError(f"Invalid learning rate: {lr}")
        super().__init__(params, {"lr": lr})

    @_observable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step; tensors without a gradient stay as they are.

        Args:
            closure: called first, with gradients enabled, to compute the loss and its gradients.

        Returns:
            What the closure returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        library = _backend.native_library()
        for group in self.param_groups:
            if library is None or not library.gd_step_group(group):
                params = [param for param in group["params"] if param.grad is not None]
                # The sum refuses, as torch does, what float() would parse.
                lr = group["lr"].item() if isinstance(group["lr"], Tensor) else 0.0 + group["lr"]
                with torch.no_grad():
                    fallback.gd_step_(params, [param.grad for param in params], lr)
        return loss

    zero_grad = _zero_grad


class SGD(torch.optim.SGD):
    """:class:`torch.optim.SGD` whose step is one kernel call for each parameter group.

    Arguments, errors, ``state_dict`` (which loads both ways), schedulers, hooks and
    :class:`torch.amp.GradScaler` are torch's. So is the step itself wherever the kernel does not
    apply: ``differentiable=True``, sparse gradients, devices without kernels, complex numbers, and
    groups that mix dtypes. ``foreach`` and ``fused`` are accepted and matter only there (and
    ``fused=True`` lets a GradScaler leave unscaling to the step, as with torch). On CUDA a learning
    rate that is a tensor there is read by the kernel, so that a step in a CUDA graph takes the
    value it has at each replay. Where a :class:`torch.amp.GradScaler` with ``fused=True`` skips the
    first step there, nothing waits to see it: the momentum buffers are made, of zeros, and with
    ``dampening`` the first step that is taken counts as a later one.
    """

    @_observable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step; tensors without a gradient stay as they are.

        Args:
            closure: called first, with gradients enabled, to compute the loss and its gradients.

        Returns:
            What the closure returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None and found_inf.is_cpu and found_inf.item() != 0:
            # A GradScaler met an overflow. A kernel would leave the parameters alone too, but not
            # before a first momentum buffer, without contents, has been made.
            return loss
        grad_scale = getattr(self, "grad_scale", None)
        differentiable = self.defaults["differentiable"]
        library = None if differentiable else _backend.native_library()
        for group in self.param_groups:
            # False, and nothing done, where the kernel does not apply.
            if library is None or not library.sgd_step_group(
                group, self.state, grad_scale, found_inf
            ):
                with torch.set_grad_enabled(differentiable):
                    self._torch_step(group)
        return loss

    zero_grad = _zero_grad

    def _torch_step(self, group: dict[str, Any]) -> None:
        """Steps one group as torch.optim.SGD does."""
        params: list[Tensor] = []
        grads: list[Tensor] = []
        buffers: list[Tensor | None] = []
        has_sparse_grad = self._init_group(group, params, grads, buffers)
        sgd(
            params,
            grads,
            buffers,
            has_sparse_grad=has_sparse_grad,
            foreach=group["foreach"],
            fused=group["fused"],
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=getattr(self, "found_inf", None),
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            lr=group["lr"],
            dampening=group["dampening"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
        )
        if group["momentum"] != 0:
            for param, buffer in zip(params, buffers, strict=True):
                self.state[param]["momentum_buffer"] = buffer
