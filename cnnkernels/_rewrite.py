"""Rewrites methods, so that a convolution, a ReLU and a pooling in a row are computed as one.

``F.max_pool2d(F.relu(self.conv(x)), 2)`` in a method's source becomes, in a subclass that takes the
class's place, ``max_pool2d(F.max_pool2d, relu(F.relu, conv2d(self.conv, x)), 2)`` of
:mod:`cnnkernels._calls`. Everything is evaluated as before and in the order of before, but for the
convolution itself, which waits until the arguments of the other two are known. These are names,
attributes and literals. All else in the method stays what it was.
"""

from __future__ import annotations
import __future__

import abc
import ast
import functools
import inspect
import sys
from types import CellType, CodeType, FunctionType
from typing import Any
from weakref import WeakValueDictionary

import torch

from cnnkernels import _calls
from cnnkernels._fx import Site

_CALLS = "_cnnkernels_calls"
"""The name of :mod:`cnnkernels._calls` in a rewritten method, where it is a closure's variable."""

_FUTURES = functools.reduce(
    int.__or__, (getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)
)
_SITES = "_cnnkernels_sites"
_classes: WeakValueDictionary[Any, type[torch.nn.Module]] = WeakValueDictionary()


def rewritten_class(cls: type[torch.nn.Module], sites: frozenset[Site]) -> type[torch.nn.Module]:
    """A subclass in whose methods the calls at the sites are joined; cls if none can be.

    It has the name, the module and the documentation of cls. Instances are copied and pickled as
    such of cls and of the sites, since the subclass itself can be found nowhere.
    """
    if not _may_be_subclassed(cls):
        return cls
    methods = {
        site.method: method
        for site in sites
        if isinstance(method := inspect.getattr_static(cls, site.method, None), FunctionType)
    }
    key = (cls, sites, frozenset(methods.items()))
    made = _classes.get(key)
    if made is None:
        rewritten = {
            name: new
            for name, method in methods.items()
            if (new := _rewritten(method, {site for site in sites if site.method == name}))
        }
        if not rewritten:
            return cls
        made = _subclass(cls, {**rewritten, _SITES: sites, "__reduce_ex__": _reduce_ex})
        _classes[key] = made
    return made


def _may_be_subclassed(cls: type) -> bool:
    """Whether nobody notices a subclass, and instances are pickled as torch's modules are."""
    metaclass: type = type(cls)
    pickling = ("__reduce_ex__", "__reduce__", "__getnewargs__", "__getnewargs_ex__")
    return (
        metaclass in (type, abc.ABCMeta)
        and not any("__init_subclass__" in vars(base) for base in cls.__mro__[:-1])
        and all(getattr(cls, name, None) is getattr(object, name, None) for name in pickling)
    )


def _subclass(cls: type[torch.nn.Module], namespace: dict[str, Any]) -> type[torch.nn.Module]:
    metaclass: Any = type(cls)
    own = ("__module__", "__qualname__", "__doc__", "__annotations__")
    shown = {name: value for name, value in vars(cls).items() if name in own}
    return metaclass(cls.__name__, (cls,), {**shown, "__qualname__": cls.__qualname__, **namespace})


def _reduce_ex(self: torch.nn.Module, protocol: int) -> Any:
    # Up to protocol 1 objects are made in another way.
    reduced = object.__reduce_ex__(self, max(protocol, 2))
    if _SITES not in vars(type(self)):
        return reduced  # another class has been put on top since
    return restore, (type(self).__base__, getattr(self, _SITES)), *reduced[2:]


def restore(cls: type[torch.nn.Module], sites: frozenset[Site]) -> torch.nn.Module:
    """An empty instance, as pickle makes it; of cls itself where its source has changed."""
    rewritten = rewritten_class(cls, sites)
    return rewritten.__new__(rewritten)


def _rewritten(function: FunctionType, sites: set[Site]) -> FunctionType | None:
    """The function with the calls at its sites joined; None if there is nothing to join."""
    try:
        # All that the file holds: what a name means to the compiler is decided out there.
        tree = ast.parse("".join(inspect.findsource(function)[0]))
        original = _code_like(function.__code__, _compiled(tree, function))
    except (OSError, TypeError, SyntaxError, ValueError, RecursionError):  # there is no source
        return None
    definition = _definition(function.__code__, tree)
    if definition is None or original is None or not _is_same(original, function.__code__):
        return None  # it has changed since
    first = function.__code__.co_firstlineno
    ends = {(first + site.line, site.column): site.joined for site in sites}
    if not _Joiner(definition, function.__code__).join(ends):
        return None
    _enclose(definition, tree)
    code = _code_like(function.__code__, _compiled(tree, function))
    assert code is not None
    return _with_code(function, code)


def _compiled(tree: ast.Module, function: FunctionType) -> CodeType:
    """The code of the file that the function is from."""
    code = function.__code__
    flags = code.co_flags & _FUTURES
    return compile(tree, code.co_filename, "exec", flags=flags, dont_inherit=True)


def _code_like(code: CodeType, outer: CodeType) -> CodeType | None:
    """The code in there that has this one's name and first line."""
    if (outer.co_name, outer.co_firstlineno) == (code.co_name, code.co_firstlineno):
        return outer
    inner = (const for const in outer.co_consts if isinstance(const, CodeType))
    return next(filter(None, (_code_like(code, const) for const in inner)), None)


def _definition(code: CodeType, tree: ast.Module) -> ast.FunctionDef | None:
    """The function definition in there that has this code's name and first line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            first_line = min([node.lineno, *(part.lineno for part in node.decorator_list)])
            if (node.name, first_line) == (code.co_name, code.co_firstlineno):
                return node
    return None


def _enclose(definition: ast.FunctionDef, tree: ast.Module) -> None:
    """Puts a function around the definition, of which :mod:`cnnkernels._calls` is an argument."""
    scope = ast.parse(f"def scope({_CALLS}): pass").body[0]
    for parent in ast.walk(tree):
        if definition in ast.iter_child_nodes(parent):
            _replace_child(parent, definition, scope)
            break
    assert isinstance(scope, ast.FunctionDef)
    scope.body = [definition]


def _is_same(code: CodeType, other: CodeType) -> bool:
    """Whether two codes do the same, wherever they stand."""
    fields = (
        "co_code co_names co_varnames co_freevars co_cellvars "
        "co_argcount co_posonlyargcount co_kwonlyargcount"
    )
    if any(getattr(code, field) != getattr(other, field) for field in fields.split()):
        return False
    if len(code.co_consts) != len(other.co_consts):
        return False
    return all(
        _is_same(ours, theirs)
        if isinstance(ours, CodeType) and isinstance(theirs, CodeType)
        else type(ours) is type(theirs) and ours == theirs
        for ours, theirs in zip(code.co_consts, other.co_consts, strict=True)
    )


def _with_code(function: FunctionType, code: CodeType) -> FunctionType:
    """The function with another code, in which :mod:`cnnkernels._calls` is one more variable."""
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    cells[_CALLS] = CellType(_calls)
    if sys.version_info >= (3, 11):
        code = code.replace(co_qualname=function.__code__.co_qualname)
    new = FunctionType(
        code,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        tuple(cells[name] for name in code.co_freevars),
    )
    new.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(new, function)
    del new.__dict__["__wrapped__"]
    return new


class _Joiner:
    """Changes a definition so that calls in a row become one.

    Values go from call to call either directly, or through a local variable that the very next
    statement reads, where nothing else reads it: then the expression takes the variable's place.
    """

    def __init__(self, definition: ast.FunctionDef, code: CodeType) -> None:
        self._definition = definition
        self._code = code

    def join(self, ends: dict[tuple[int, int], str]) -> bool:
        """Joins what can be joined of the calls that end there; whether that is anything."""
        sites = [
            (node, ends[end])
            for node in ast.walk(self._definition)
            if isinstance(node, ast.Call)
            and (end := (node.end_lineno or 0, node.end_col_offset or 0)) in ends
        ]
        # Not any() of a generator, which would stop at the first.
        return sum(self._join(call, joined) for call, joined in sites) > 0

    def _join(self, conv: ast.Call, joined: str) -> bool:
        if len(conv.args) != 1 or isinstance(conv.args[0], ast.Starred) or conv.keywords:
            return False
        relu = self._next_call(conv)
        if relu is None:
            return False
        pool = self._next_call(relu) if joined == "max_pool2d" else None
        _pass_to("conv2d", conv)
        if pool is None:
            _pass_to("conv2d_relu", relu)
        else:
            _pass_to("relu", relu)
            _pass_to("max_pool2d", pool)
        return True

    def _next_call(self, value: ast.expr) -> ast.Call | None:
        """The call whose first argument, or whose method's object, the value is and remains."""
        parents = self._parents()
        parent = parents[value]
        if isinstance(parent, ast.Assign) and self._moves_into_next_statement(parent, parents):
            parents = self._parents()
            parent = parents[value]
        if isinstance(parent, ast.Attribute) and parent.attr in _calls.METHODS:
            call = parents[parent]
            if isinstance(call, ast.Call) and not call.args and not call.keywords:
                return call
        if not isinstance(parent, ast.Call) or not parent.args or parent.args[0] is not value:
            return None
        others = [*parent.args[1:], *(keyword.value for keyword in parent.keywords)]
        has_unpacking = any(keyword.arg is None for keyword in parent.keywords)
        return parent if all(map(_is_inert, others)) and not has_unpacking else None

    def _parents(self) -> dict[ast.AST, ast.AST]:
        return {
            child: parent
            for parent in ast.walk(self._definition)
            for child in ast.iter_child_nodes(parent)
        }

    def _moves_into_next_statement(
        self, statement: ast.Assign, parents: dict[ast.AST, ast.AST]
    ) -> bool:
        """Puts an assigned value in the place of its variable, if nobody can tell; whether so."""
        target = statement.targets[0]
        block, following = _block_and_following(statement, parents[statement])
        if len(statement.targets) != 1 or not isinstance(target, ast.Name) or following is None:
            return False
        assert following.value is not None
        use = _first_evaluated(following.value)
        if not isinstance(use, ast.Name) or use.id != target.id:
            return False
        if _reads(following, target.id) != 1 or not self._is_only_local(target.id):
            return False
        if self._may_resume_after_an_exception(statement, parents):
            return False
        is_overwritten = isinstance(following, ast.Assign) and (
            [ast.dump(t) for t in following.targets] == [ast.dump(target)]
        )
        if not (
            is_overwritten
            or isinstance(following, ast.Return)
            or _reads(self._definition, target.id) == 1
        ):
            return False
        _replace_child(parents[use], use, statement.value)
        block.remove(statement)
        return True

    def _is_only_local(self, name: str) -> bool:
        """Whether no other scope, and no function that looks at the scope, sees the variable."""
        watchers = {"locals", "vars", "dir", "eval", "exec", "_getframe", "currentframe"}
        is_local = name in self._code.co_varnames and name not in self._code.co_cellvars
        return is_local and watchers.isdisjoint(self._code.co_names)

    def _may_resume_after_an_exception(
        self, statement: ast.stmt, parents: dict[ast.AST, ast.AST]
    ) -> bool:
        """Whether it is in a ``try`` or ``with``, after which the variable might be looked at."""
        node: ast.AST = statement
        while node is not self._definition:
            node = parents[node]
            if not isinstance(node, ast.If | ast.For | ast.While | ast.FunctionDef):
                return True
        return False


def _pass_to(name: str, call: ast.Call) -> None:
    """Makes a call one of a function in :mod:`cnnkernels._calls` with what was to be called."""

    def function(name: str) -> ast.expr:
        return ast.Attribute(ast.Name(_CALLS, ast.Load()), name, ast.Load())

    if isinstance(call.func, ast.Attribute) and not call.args:
        call.args = [function(_calls.METHODS[call.func.attr].__name__), call.func.value]
    else:
        call.args = [call.func, *call.args]
    call.func = function(name)
    ast.fix_missing_locations(call)


def _is_inert(node: ast.expr) -> bool:
    """Whether to evaluate it earlier or later is the same.

    Attributes and operators are taken to have no effects of their own, as a property that writes a
    weight would have.
    """
    if isinstance(node, ast.Constant | ast.Name):
        return True
    if isinstance(node, ast.Attribute):
        return _is_inert(node.value)
    if isinstance(node, ast.UnaryOp):
        return _is_inert(node.operand)
    if isinstance(node, ast.BinOp):
        return _is_inert(node.left) and _is_inert(node.right)
    return isinstance(node, ast.Tuple | ast.List) and all(map(_is_inert, node.elts))


def _first_evaluated(node: ast.expr) -> ast.expr:
    """The part of an expression that is evaluated before all that is not inert."""
    if isinstance(node, ast.Call):
        if node.args and _is_inert(node.func):
            return _first_evaluated(node.args[0])
        return _first_evaluated(node.func)
    if isinstance(node, ast.Attribute | ast.Subscript):
        return _first_evaluated(node.value)
    return _first_evaluated(node.left) if isinstance(node, ast.BinOp) else node


def _block_and_following(
    statement: ast.stmt, parent: ast.AST
) -> tuple[list[ast.stmt], ast.Assign | ast.Return | None]:
    """The statements among which it stands, and the next if that has a value to compute."""
    for _, block in ast.iter_fields(parent):
        if isinstance(block, list) and any(item is statement for item in block):
            following = next(iter(block[block.index(statement) + 1 :]), None)
            has_value = isinstance(following, ast.Assign | ast.Return) and following.value
            return block, following if has_value else None
    raise AssertionError("a statement is in a block of its parent")


def _reads(node: ast.AST, name: str) -> int:
    """How often a variable is read, changed or deleted, and not just written, in there."""
    inside = list(ast.walk(node))
    changed = [inner.target for inner in inside if isinstance(inner, ast.AugAssign)]
    names = [inner for inner in inside if isinstance(inner, ast.Name) and inner.id == name]
    return sum(inner in changed or not isinstance(inner.ctx, ast.Store) for inner in names)


def _replace_child(parent: ast.AST, child: ast.AST, new: ast.AST) -> None:
    for field, value in ast.iter_fields(parent):
        if value is child:
            setattr(parent, field, new)
        elif isinstance(value, list):
            value[:] = [new if item is child else item for item in value]
