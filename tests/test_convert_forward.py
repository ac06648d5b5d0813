"""replace_modules in models that call functions in their forward: what is joined, and what not."""

from __future__ import annotations

import abc
import contextlib
import copy
import functools
import io
import linecache
import pickle
import random
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import runs_kernel
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune

from cnnkernels import _backend, functional, nn, replace_modules

# Before 3.11 Python's code does not say in which column a call stands, and nothing is joined.
pytestmark = [
    pytest.mark.usefixtures("backend"),
    pytest.mark.skipif(sys.version_info < (3, 11), reason="needs columns in Python's code objects"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
]

INPUT = torch.randn(2, 3, 10, 11, generator=torch.Generator().manual_seed(5))
BLOCK = "conv2d_relu_max_pool2d"


@contextlib.contextmanager
def joins(count: int) -> Iterator[None]:
    """Asserts how many blocks run as one operator."""
    block = functional.conv2d_relu_max_pool2d
    with mock.patch.object(functional, BLOCK, side_effect=block) as joined:
        yield
    assert joined.call_count == count


def assert_same(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def gradients(model: torch.nn.Module, *args: Any) -> tuple[Any, list[Tensor]]:
    output = model(*args)
    loss = sum(part.square().sum() for part in (output if type(output) is tuple else (output,)))
    return output, list(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))


class Parts(torch.nn.Module):
    """What the forwards below are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3, padding=1)
        self.again = torch.nn.Conv2d(4, 4, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(4)
        self.relu = torch.nn.ReLU()
        self.inplace = torch.nn.ReLU(inplace=True)
        self.pool = torch.nn.MaxPool2d(2)
        self.indices = torch.nn.MaxPool2d(2, return_indices=True)
        self.convs = torch.nn.ModuleList([self.conv, self.again])
        self.size, self.flag, self.calls = 2, False, 0
        self.seen: list[Tensor] = []


JOINED: list[tuple[type[Parts], int]] = []
APART: list[type[Parts]] = []


def joined(count: int) -> Callable[[type[Parts]], type[Parts]]:
    """Marks a class in whose forward so many blocks are joined."""

    def mark(cls: type[Parts]) -> type[Parts]:
        JOINED.append((cls, count))
        return cls

    return mark


def apart(cls: type[Parts]) -> type[Parts]:
    """Marks a class that stays as it is."""
    APART.append(cls)
    return cls


@joined(1)
class Functions(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(F.relu(self.conv(x)), (2, 2))


@joined(1)
class TorchFunctions(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return torch.max_pool2d(torch.relu(self.conv(x)), 2)


@joined(1)
class Modules(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.relu(self.conv(x)))


@joined(3)
class InPlace(Parts):
    def forward(self, x: Tensor) -> Tensor:
        a = self.pool(self.inplace(self.conv(x)))
        b = self.pool(torch.relu_(self.conv(x)))
        return a + b + F.max_pool2d(F.relu(self.conv(x), inplace=True), kernel_size=2)


@joined(2)
class Methods(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.conv(x).relu()) - F.max_pool2d(self.conv(x).relu_(), 2, 2)


@joined(6)
class PoolArguments(Parts):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (
            F.max_pool2d(F.relu(self.conv(x)), 3, 2, 1, 1, True),
            F.max_pool2d(F.relu(self.conv(x)), (3, 2), stride=(1, 2), ceil_mode=True),
            F.max_pool2d(F.relu(self.conv(x)), [2, 3], None, dilation=(2, 1)),
            F.max_pool2d(F.relu(self.conv(x)), self.size, stride=self.size - 1, padding=1),
            F.max_pool2d(F.relu(self.conv(x)), 2, return_indices=False),
            torch.max_pool2d(F.relu(self.conv(x)), kernel_size=[2, 2], padding=[1, 0]),
        )


@joined(2)
class Statements(Parts):
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = F.relu(x)
        x = F.max_pool2d(x, 2)
        if x.ndim is not None:
            x = F.relu(self.again(x))
            x = self.pool(x).flatten(1)
        return x


@joined(2)
class Names(Parts):
    def forward(self, x: Tensor) -> Tensor:
        first = self.conv(x)
        second = self.relu(first)
        third = self.pool(second)
        fourth = self.again(third).relu()
        return torch.flatten(F.max_pool2d(fourth, 2), 1)


@joined(2)
class OneLine(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.pool(F.relu(self.again(self.pool(F.relu(self.conv(x)))))))


@joined(2)
class Spread(Parts):
    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(
            F.relu(
                self.conv(
                    x,
                )
            ),
            # "ünïcödé" moves the compiler's columns
            2,
        )
        return "ünïcödé" and self.pool(self.relu(self.again(x)))


@joined(2)
class Loop(Parts):
    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = self.pool(F.relu(conv(x)))
        return x


@joined(2)
class Subscripts(Parts):
    def forward(self, x: Tensor) -> Tensor:
        for i in range(2):
            x = self.pool(F.relu(self.convs[i](x)))
        return x


@joined(2)
class OtherMethods(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return self._second(self.first(x))

    def first(self, x: Tensor) -> Tensor:
        return self.pool(F.relu(self.conv(x)))

    def _second(self, x: Tensor) -> Tensor:
        return self.pool(F.relu(self.again(x)))


@joined(1)
class TwiceTheSame(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).mean() + self.pool(F.relu(self.conv(x)))


@joined(1)
class Shapes(Parts):
    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.conv(x)))
        features = 1
        for size in x.size()[1:]:
            features *= size
        for size in x.shape[:-3]:
            features *= size
        n, _, _, _ = x.shape
        return x.view(-1, features).view(n, *x.shape[1:])


@joined(1)
class Mangled(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.__conv = self.conv

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(F.relu(self.__conv(x)))


class Base(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return self.pool(x)


@joined(1)
class Super(Base):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.pool(F.relu(self.conv(x))))


@joined(1)
class Abstract(Parts, abc.ABC):
    def forward(self, x: Tensor) -> Tensor:
        return self.pool(F.relu(self.conv(x)))


@joined(1)
class Inherited(Functions):
    pass


@joined(1)
class SideEffects(Parts):
    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.pool(F.relu(self.conv(x)))
        self.seen.append(x.detach())
        return x * self.calls


@apart
class UsedTwice(Parts):
    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        return self.pool(F.relu(h)) + self.pool(h)


@apart
class ReluUsedTwice(Parts):
    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.conv(x))
        return self.pool(h) + h.mean()


@apart
class Returned(Parts):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = F.relu(self.conv(x))
        return self.pool(h), h


@apart
class Walrus(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return self.pool(F.relu(h := self.conv(x))) + h.sum()


@apart
class SecondArgument(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x[:1, :1] > 0, F.relu(self.conv(x)), 0.0)


@apart
class Indices(Parts):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y, indices = F.max_pool2d(F.relu(self.conv(x)), 2, return_indices=True)
        return y, indices.float(), self.indices(F.relu(self.conv(x)))[0]


@apart
class OtherActivations(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return self.pool(F.relu6(self.conv(x))) + self.pool(F.leaky_relu(self.conv(x)))


@apart
class OtherPools(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(F.relu(self.conv(x)), 2) + F.adaptive_max_pool2d(self.conv(x), 1)


@apart
class Normalised(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.relu(self.norm(self.conv(x))))


@apart
class InATry(Parts):
    def forward(self, x: Tensor) -> Tensor:
        h = x
        try:
            h = self.conv(x)
            h = F.relu(h)
            h = F.max_pool2d(h, 100)
        except RuntimeError:
            return h
        return h


@apart
class InAWith(Parts):
    def forward(self, x: Tensor) -> Tensor:
        h = x
        with contextlib.suppress(RuntimeError):
            h = F.relu(self.conv(x))
            h = F.max_pool2d(h, 100)
        return h


@apart
class Between(Parts):
    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.conv(x))
        x.mul_(0)
        return self.pool(h)


@apart
class EvaluatedBefore(Parts):
    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        h = F.relu(self.conv(x))
        return x.mul_(0).sum() + self.pool(h)


@apart
class ArgumentsThatCompute(Parts):
    def forward(self, x: Tensor) -> Tensor:
        h = x.clone()
        return F.max_pool2d(F.relu(self.conv(h)), self.change(h))

    def change(self, h: Tensor) -> int:
        h.zero_()
        return 2


@apart
class Locals(Parts):
    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.conv(x))
        y = self.pool(h)
        return y + locals()["h"].sum()


@apart
class Closure(Parts):
    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.conv(x))
        y = self.pool(h)
        return y + (lambda: h.sum())()


@apart
class Deleted(Parts):
    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.conv(x))
        y = self.pool(h)
        del h
        return y


@apart
class NotTraced(Parts):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > -1e9:
            x = self.pool(F.relu(self.conv(x)))
        return x


def pooled(conv: torch.nn.Module, x: Tensor) -> Tensor:
    return F.max_pool2d(F.relu(conv(x)), 2)


@apart
class Helper(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return pooled(self.conv, x)


def doubled(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(forward)
    def wrapper(*args: Any) -> Tensor:
        return 2 * forward(*args)

    return wrapper


@apart
class Decorated(Parts):
    @doubled
    def forward(self, x: Tensor) -> Tensor:
        return self.pool(F.relu(self.conv(x)))


@apart
class SuperOnly(Functions):
    def forward(self, x: Tensor) -> Tensor:
        return -super().forward(x)


@apart
class OfAnInstance(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.forward = lambda x: -self.pool(F.relu(self.conv(x)))


@apart
class Unpacked(Parts):
    def forward(self, x: Tensor) -> Tensor:
        arguments = [2, 1]
        return F.max_pool2d(F.relu(self.conv(*[x])), *arguments)


class Registered(Parts):
    subclasses: list[type] = []  # noqa: RUF012

    def __init_subclass__(cls) -> None:
        Registered.subclasses.append(cls)


@apart
class Registering(Registered):
    def forward(self, x: Tensor) -> Tensor:
        return self.pool(F.relu(self.conv(x)))


@apart
class PickledInItsOwnWay(Parts):
    def __reduce__(self) -> Any:
        return PickledInItsOwnWay, ()

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(F.relu(self.conv(x)))


def name_of(value: Any) -> str | None:
    return getattr(value, "__name__", None)


@pytest.mark.parametrize(("cls", "count"), JOINED, ids=name_of)
def test_joined(cls: type[Parts], count: int) -> None:
    theirs, ours = cls(), cls()
    ours.load_state_dict(theirs.state_dict())
    names, modules = [name for name, _ in ours.named_modules()], list(ours.modules())
    assert replace_modules(ours) is ours
    converted = type(ours)
    assert converted is not cls
    assert isinstance(ours, cls)
    assert converted.__name__ == cls.__name__
    assert converted.__qualname__ == cls.__qualname__
    assert converted.__module__ == cls.__module__
    assert repr(ours) == repr(replace_modules(copy.deepcopy(theirs), fuse=False))
    assert [name for name, _ in ours.named_modules()] == names
    assert all(a is b for a, b in zip(ours.modules(), modules, strict=True))
    assert ours.calls == 0
    assert ours.seen == []
    replace_modules(ours)
    assert type(ours) is converted

    expected = gradients(theirs, INPUT)
    with joins(count), runs_kernel(BLOCK):
        results = gradients(ours, INPUT)
    assert_same(results, expected)
    with joins(count):
        assert_same(ours.eval()(INPUT), theirs.eval()(INPUT))


@pytest.mark.parametrize("cls", APART, ids=name_of)
def test_apart(cls: type[Parts]) -> None:
    theirs, ours = cls(), cls()
    ours.load_state_dict(theirs.state_dict())
    replace_modules(ours)
    assert type(ours) is cls
    with torch.no_grad(), joins(0):
        assert_same(ours(INPUT.clone()), theirs(INPUT.clone()))
