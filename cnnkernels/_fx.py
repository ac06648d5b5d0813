"""Finds, with torch.fx, where a ``forward`` calls a convolution, a ReLU and perhaps a pooling.

Only the places are taken from the trace. The traced graph is never run: it is one of several ways
through ``forward``, with all that Python decided or did on the way burnt in or lost.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import operator
import random
import sys
import warnings
from collections.abc import Iterator
from itertools import islice
from types import CodeType, FrameType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import fx

from cnnkernels import _calls
from cnnkernels.nn import Conv2d

_IMAGES_RANK = 4
_Place = tuple[str, int, str]


class Site(NamedTuple):
    """Where the source of a method calls a convolution that can be joined with what follows."""

    method: str
    line: int
    """Of the call's last character; the method's first line is 0."""
    column: int
    """One after the call's last character, in bytes of UTF-8, as the compiler counts."""
    joined: str
    """The function in :mod:`cnnkernels._calls` for the last of the calls that can be joined."""


def find_sites(model: torch.nn.Module) -> dict[torch.nn.Module, frozenset[Site]]:
    """The sites of each module in the model whose own ``forward`` has any.

    Forwards run on a copy of the model whose parameters and buffers have no data, so that the model
    stays as it is. A model that cannot be copied has no sites, nor has a module that torch.fx
    cannot trace.
    """
    candidates = {name: m for name, m in model.named_modules() if _may_have_sites(m)}
    if not candidates:
        return {}
    with _random_states_kept(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            without_data = _copy_without_data(model)
        except Exception:  # whatever a class of the model raises
            return {}
        found = {
            module: _sites(module, without_data.get_submodule(name))
            for name, module in candidates.items()
        }
    return {module: sites for module, sites in found.items() if sites}


def _may_have_sites(module: torch.nn.Module) -> bool:
    forward = inspect.getattr_static(type(module), "forward", None)
    return (
        isinstance(forward, FunctionType)
        and not (forward.__module__ or "").startswith(("torch.", "cnnkernels.nn"))
        and "forward" not in vars(module)
        and any(_calls.is_plain(inner, Conv2d) for inner in module.modules())
    )


@contextlib.contextmanager
def _random_states_kept() -> Iterator[None]:
    state = random.getstate()
    with torch.random.fork_rng(devices=()):
        yield
    random.setstate(state)


def _copy_without_data(model: torch.nn.Module) -> torch.nn.Module:
    memo: dict[int, Any] = {}
    for module in model.modules():
        for values in (module._parameters, module._buffers, vars(module)):
            for value in values.values():
                if isinstance(value, torch.Tensor) and not torch.nn.parameter.is_lazy(value):
                    bare = value.detach().to("meta")
                    if isinstance(value, torch.nn.Parameter):
                        bare = torch.nn.Parameter(bare, value.requires_grad)
                    memo[id(value)] = bare
    return copy.deepcopy(model, memo)


def _sites(module: torch.nn.Module, without_data: torch.nn.Module) -> frozenset[Site]:
    tracer = _Tracer(type(module))
    parameters = inspect.signature(type(module).forward).parameters.values()
    # Forwards branch on arguments that need not be given: they are given their defaults.
    simple = (bool, int, float, str, type(None))
    defaults = {p.name: p.default for p in parameters if isinstance(p.default, simple)}
    try:
        graph = tracer.trace(without_data, defaults)
        return frozenset(
            Site(*tracer.ends[node], joined)
            for node in graph.nodes
            if node in tracer.ends and (joined := _joined(node, module)) is not None
        )
    except Exception:  # whatever forward raises when its arguments are not tensors
        return frozenset()


class _Tracer(fx.Tracer):
    """Traces one module's ``forward`` and remembers where it calls the modules inside."""

    proxy_buffer_attributes = True

    def __init__(self, cls: type[torch.nn.Module]) -> None:
        super().__init__()
        self.ends: dict[fx.Node, tuple[str, int, int]] = {}
        """For a node that calls a module: the method, and the first fields of a :class:`Site`."""
        self._methods: dict[_Place, str] = {}
        for name in dir(cls):
            function = inspect.getattr_static(cls, name)
            if isinstance(function, FunctionType) and not hasattr(torch.nn.Module, name):
                self._methods[_place(function.__code__)] = name
        self._methods[_place(cls.forward.__code__)] = "forward"

    def is_leaf_module(self, m: torch.nn.Module, module_qualified_name: str) -> bool:
        """Inner modules are traced by themselves."""
        return True

    def call_module(
        self, m: torch.nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Notes the call's place; calls that another thread makes meanwhile go their way."""
        if m not in (self.submodule_paths or ()):
            return forward(*args, **kwargs)
        output = super().call_module(m, forward, args, kwargs)
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and _place(frame.f_code) not in self._methods:
            frame = frame.f_back
        end = frame and _end_of_call(frame)
        if frame is not None and end is not None:
            line, column = end
            method = self._methods[_place(frame.f_code)]
            self.ends[output.node] = (method, line - frame.f_code.co_firstlineno, column)
        return output

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """The stand-in for a value, with one for shapes that knows their length."""
        return (_Value if _shape_length(node) is None else _Shape)(node, self)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """Iterates over shapes too."""
        if isinstance(obj, _Shape):
            return iter([obj[index] for index in range(len(obj))])  # type: ignore[index]
        return super().iter(obj)


class _Value(fx.Proxy):
    def __getattr__(self, k: str) -> Any:
        if k == "shape":  # at once, where torch.fx waits for what is done with it
            return self.tracer.create_proxy("call_function", getattr, (self, k), {})
        return super().__getattr__(k)


class _Shape(_Value):
    def __len__(self) -> int:
        length = _shape_length(self.node)
        assert length is not None
        return length


def _place(code: CodeType) -> _Place:
    """Where a code is from; torch.fx runs a ``forward`` with keywords in a changed copy."""
    return code.co_filename, code.co_firstlineno, code.co_name


def _end_of_call(frame: FrameType) -> tuple[int, int] | None:
    """Line and column after the call that the frame is in; None where the code does not say."""
    if not hasattr(frame.f_code, "co_positions"):
        return None  # Python 3.10
    positions = frame.f_code.co_positions()
    _, line, _, column = next(islice(positions, frame.f_lasti // 2, None))
    return None if line is None or column is None else (line, column)


def _shape_length(node: fx.Node) -> int | None:
    """The length of a shape, of images in a batch, or of a slice of one; None for other values."""
    if node.op == "call_method" and node.target == "size" and len(node.args) == 1:
        return None if node.kwargs else _IMAGES_RANK
    if node.op != "call_function":
        return None
    if node.target is getattr and node.args[1] == "shape":
        return _IMAGES_RANK
    if node.target is operator.getitem and isinstance(node.args[1], slice):
        length = _shape_length(node.args[0])  # type: ignore[arg-type]
        return None if length is None else len(range(length)[node.args[1]])
    return None


def _joined(node: fx.Node, module: torch.nn.Module) -> str | None:
    """What a convolution's node can be joined with: a :class:`Site`'s last field, or None."""
    if not _calls.is_plain(module.get_submodule(str(node.target)), Conv2d):
        return None
    relu = _only_user(node)
    if relu is None or not _calls.is_relu(*_call(relu, module)):
        return None
    pool = _only_user(relu)
    if pool is None or _calls.pool_arguments(*_call(pool, module)) is None:
        return "conv2d_relu"
    return "max_pool2d"


def _only_user(node: fx.Node) -> fx.Node | None:
    """The one node that takes this one's value, if it takes it as its first argument."""
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].args[:1] == (node,) else None


def _call(node: fx.Node, module: torch.nn.Module) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """What a node calls, and the arguments after the first."""
    function: Any = node.target
    if node.op == "call_module":
        function = module.get_submodule(function)
    elif node.op == "call_method":
        function = _calls.METHODS.get(function)
    return function, node.args[1:], node.kwargs
