"""Which implementation of the operators a call runs: the one place where that is decided."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import TracebackType
from typing import Any, Protocol, cast

from torch._C import _are_functorch_transforms_active
from torch._C._functorch import TransformType, peek_interpreter_stack
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from cnnkernels import _graph, _native, _transforms, fallback


class Operators(Protocol):
    """The operators, all arguments by position; a pool's empty stride stands for its kernel size.

    The compiled library's entry points, :mod:`~cnnkernels.fallback` and the private modules for
    graph capture and torch.func are all of this form.
    """

    conv2d: Callable[..., Any]
    conv2d_relu: Callable[..., Any]
    max_pool2d: Callable[..., Any]
    max_pool2d_with_indices: Callable[..., Any]
    conv2d_relu_max_pool2d: Callable[..., Any]


def _operators_of(name: str) -> Operators:
    if name == "torch":
        return cast(Operators, fallback)
    if name != "native":
        raise ValueError(f"backend must be 'native' or 'torch', got {name!r}")
    if _native.library is None:
        raise RuntimeError(f"the native backend is not available: {_native.reason}")
    return cast(Operators, _native.library)


def _default() -> Operators:
    name = os.environ.get("CNNKERNELS_BACKEND")
    if not name:
        return _operators_of("native" if _native.library is not None else "torch")
    try:
        return _operators_of(name)
    except (ValueError, RuntimeError) as error:
        raise type(error)(f"CNNKERNELS_BACKEND={name}: {error}") from None


class _Block:
    """One entered block; compared by identity."""

    def __init__(self, operators: Operators) -> None:
        self.operators = operators


_DEFAULT = _default()
_eager: ContextVar[Operators] = ContextVar(
    "cnnkernels_backend",
    default=_DEFAULT,
)
# A graph compiler can guard on a module's global, but not on a context variable: this is the
# choice of the block entered last, in any thread, of those that are still open.
_captured: Operators = _DEFAULT
_open_blocks: list[_Block] = []


def current() -> Operators:
    """The operators for a call made here and now."""
    if is_compiling():
        if _captured is _native.library and not _are_functorch_transforms_active():
            return cast(Operators, _graph)
        return cast(Operators, fallback)
    operators = _eager.get()
    if operators is _native.library and (
        _are_functorch_transforms_active() or forward_ad._current_level >= 0
    ):
        if _functionalizes():
            return operators  # autograd Functions have no rule for it
        # Derivatives written in C++ refuse both of these.
        return cast(Operators, _transforms)
    return operators


def _functionalizes() -> bool:
    """Whether the innermost transform is torch.func.functionalize."""
    interpreter = peek_interpreter_stack()
    return interpreter is not None and interpreter.key() == TransformType.Functionalize


def native_library() -> Any | None:
    """The compiled library if it is the backend here and now, for the optimizers' steps."""
    if is_compiling():
        # A compiler fuses torch's own step better than it could call ours.
        return None
    return _native.library if _eager.get() is _native.library else None


def get_backend() -> str:
    """The name of the backend in use in this context: ``"native"`` or ``"torch"``."""
    return "native" if native_library() is not None else "torch"


def _choose_captured() -> None:
    global _captured
    try:
        _captured = _open_blocks[-1].operators
    except IndexError:
        _captured = _DEFAULT


@contextlib.contextmanager
def using(operators: Operators) -> Iterator[None]:
    """Makes these the operators of the current context inside the block."""
    token, block = _eager.set(operators), _Block(operators)
    _open_blocks.append(block)
    _choose_captured()
    try:
        yield
    finally:
        # Blocks of other threads may have been entered since: this is not always the last.
        _open_blocks.remove(block)
        _choose_captured()
        _eager.reset(token)


class use_backend(contextlib.ContextDecorator):
    """Chooses the backend inside a ``with`` block, or in a function that it decorates.

    The choice holds for the current thread (for the current context, in the sense of
    :mod:`contextvars`). Blocks nest. The environment variable ``CNNKERNELS_BACKEND`` sets the
    backend outside of all blocks; without it that is ``"native"`` where the library is available.
    Gradients are computed by the backend of their forward call. TorchScript and saved programs
    call the operators of the dispatcher and take no notice.

    Args:
        name: ``"native"``, the compiled library, or ``"torch"``, the same operators in PyTorch.

    Raises:
        ValueError: name is neither of the two.
        RuntimeError: the library is not available; the message says why.

    >>> with use_backend("torch"):
    ...     get_backend()
    'torch'
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._operators = _operators_of(name)
        self._blocks: list[contextlib.AbstractContextManager[None]] = []

    def _recreate_cm(self) -> use_backend:
        return type(self)(self.name)

    def __enter__(self) -> None:
        block = using(self._operators)
        block.__enter__()
        self._blocks.append(block)

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._blocks.pop().__exit__(None, None, None)
