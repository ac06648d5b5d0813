"""Puts the kernels into existing models: for good (replace_modules) or for a while (patch)."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from cnnkernels import functional
from cnnkernels._calls import is_customised
from cnnkernels._fx import find_sites
from cnnkernels._rewrite import rewritten_class
from cnnkernels.nn import Conv2d, Conv2dReLU, Conv2dReLUMaxPool2d, MaxPool2d

__all__ = ["patch", "replace_modules"]

Model = TypeVar("Model", bound=torch.nn.Module)

_REPLACEMENTS: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    torch.nn.Conv2d: Conv2d,
    torch.nn.MaxPool2d: MaxPool2d,
}


def replace_modules(model: Model, fuse: bool = True) -> Model:
    """Makes a model run on the kernels, in place, and returns it.

    Every module whose class is exactly :class:`torch.nn.Conv2d` or :class:`torch.nn.MaxPool2d`
    changes its class to :class:`cnnkernels.nn.Conv2d` or :class:`cnnkernels.nn.MaxPool2d`. It stays
    the same object: its parameters (optimizers hold on to them), hooks, parametrizations and
    training flag remain, and so does the model's ``state_dict``.

    With fuse, a convolution, a ReLU and a max pooling that follow one another in a
    :class:`torch.nn.Sequential` become one :class:`cnnkernels.nn.Conv2dReLUMaxPool2d` in the
    convolution's place and :class:`torch.nn.Identity` in the other two, so that indices and
    ``state_dict`` keys do not move. A convolution and a ReLU without such a pooling become a
    :class:`cnnkernels.nn.Conv2dReLU` in the same way. Modules stay apart where someone could tell:
    hooks on any of them, a pooling that returns indices, a convolution or pooling that is also used
    elsewhere in the model, and a Sequential whose ``forward`` is not torch's. Code that runs a
    Sequential's layers one at a time and looks at what is in between needs ``fuse=False``.

    With fuse, the same calls are joined in a ``forward`` of one's own too, be they of modules or of
    functions: ``F.max_pool2d(F.relu(self.conv(x)), 2)``. :mod:`torch.fx` finds them, and the
    module's class becomes a subclass of the same name, in whose methods just these calls are
    rewritten; modules, hooks, ``state_dict``, copies and pickles stay what they were. With every
    call it is seen anew whether the parts still are what they were: where there is a hook, another
    module in the place of one, or a subclass of Tensor, the calls run one by one. To be traced, a
    ``forward`` runs once on stand-ins for tensors, in a copy of the model without data.
    A ``forward`` that compares its object's exact type sees the subclass, and one that is put on
    the original class later is not seen: convert after such changes, or with ``fuse=False``.

    Classes that cannot be rewritten stay: those whose ``forward`` torch.fx cannot trace, or that
    have no source (TorchScript demands it as well; a class typed at Python's prompt has none), or
    are pickled in a way of their own, or notice subclasses; all classes of a model of which
    :func:`copy.deepcopy` makes no copy; and all before Python 3.11.

    Calling it again changes nothing.

    Args:
        model: any module; it may itself be a convolution, a pooling or a Sequential.
        fuse: whether to join convolution, ReLU and pooling.

    Returns:
        The model that was passed in.

    Raises:
        TypeError: model is not a :class:`torch.nn.Module`.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {torch.typename(model)}")
    for module in model.modules():
        replacement = _REPLACEMENTS.get(_plain_class(module))
        if replacement is not None:
            _set_plain_class(module, replacement)
    if fuse:
        uses = Counter(child for module in model.modules() for child in module._modules.values())
        for module in model.modules():
            if isinstance(module, torch.nn.Sequential) and _is_plain_sequential(module):
                _fuse_sequential(module, uses)
        for module, sites in find_sites(model).items():
            _set_plain_class(module, rewritten_class(_plain_class(module), sites))
    return model


def _plain_class(module: torch.nn.Module) -> type[torch.nn.Module]:
    """The module's class; for a parametrized module the class that it had before."""
    cls = type(module)
    return cls.__bases__[0] if parametrize.is_parametrized(module) else cls


def _set_plain_class(module: torch.nn.Module, cls: type[torch.nn.Module]) -> None:
    """Changes the module's class; a parametrized module keeps its properties on top of it.

    Parametrization gives a module a class of its own with the tensors as properties, and takes the
    base of that class when it is removed again.
    """
    if parametrize.is_parametrized(module):
        own = {
            name: value
            for name, value in vars(type(module)).items()
            if name not in ("__dict__", "__weakref__")
        }
        cls = type(f"Parametrized{cls.__name__}", (cls,), own)
    module.__class__ = cls


def _is_plain_sequential(module: torch.nn.Sequential) -> bool:
    return type(module).forward is torch.nn.Sequential.forward and "forward" not in vars(module)


def _fuse_sequential(
    sequential: torch.nn.Sequential, uses: Counter[torch.nn.Module | None]
) -> None:
    names = list(sequential._modules)
    # Nothing comes after the last two: the last stands for it, which is no pooling if it is a ReLU.
    following = [*names[2:], *names[-1:]]
    for conv_name, relu_name, pool_name in zip(names, names[1:], following, strict=False):
        conv, relu, pool = (sequential._modules[name] for name in (conv_name, relu_name, pool_name))
        if _plain_class(conv) is not Conv2d or type(relu) is not torch.nn.ReLU:
            continue
        if is_customised(conv) or is_customised(relu) or uses[conv] > 1:
            continue
        replaced = [relu_name]
        if type(pool) is not MaxPool2d or (
            pool.return_indices or is_customised(pool) or uses[pool] > 1
        ):
            _set_plain_class(conv, Conv2dReLU)
        else:
            _set_plain_class(conv, Conv2dReLUMaxPool2d)
            cast(Conv2dReLUMaxPool2d, conv).set_pool(
                pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode
            )
            replaced.append(pool_name)
        for name in replaced:
            training = sequential._modules[name].training
            sequential._modules[name] = torch.nn.Identity().train(training)


# What a torch function mode is shown for each way to call torch's operators.
_FUNCTIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.conv2d: functional.conv2d,
    torch.max_pool2d: functional.max_pool2d,
    torch.nn.functional.max_pool2d: functional.max_pool2d,
}


def _max_pool2d_with_indices(*args: Any, **kwargs: Any) -> Any:
    # torch.nn.functional's takes return_indices too, and ignores it.
    kwargs["return_indices"] = True
    return functional.max_pool2d(*args[:6], **kwargs)


_FUNCTIONS[torch.nn.functional.max_pool2d_with_indices] = _max_pool2d_with_indices
_FUNCTIONS[torch._C._nn.max_pool2d_with_indices] = _max_pool2d_with_indices


class patch(TorchFunctionMode, contextlib.ContextDecorator):
    """Inside, unmodified code runs on these kernels.

    A context manager (and a decorator) in which :func:`torch.nn.functional.conv2d` and
    :func:`~torch.nn.functional.max_pool2d`, their namesakes in :mod:`torch`, and every module that
    calls them run :mod:`cnnkernels.functional` instead. It holds for the current thread, nests, and
    changes nothing in torch. Convolution, ReLU and pooling are not fused, since the calls come one
    by one, and each call of any torch function costs about a microsecond more; for a model that is
    used often :func:`replace_modules` is better. It is also what checkpoints need: torch leaves the
    mode while it runs a backward, so that a checkpoint's second forward would run torch's kernels
    where its first ran these, which ``use_reentrant=False`` refuses.

    >>> with patch():
    ...     torch.nn.functional.max_pool2d(torch.ones(1, 1, 4, 4), 2).shape
    torch.Size([1, 1, 2, 2])
    """

    def _recreate_cm(self) -> patch:
        return type(self)()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Replaces the function that is being called where there is a kernel for it."""
        kwargs = kwargs or {}
        if "out" in kwargs:
            return func(*args, **kwargs)
        return _FUNCTIONS.get(func, func)(*args, **kwargs)
