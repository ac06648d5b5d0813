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
from torch.utils.checkpoint import checkpoint

from cnnkernels import functional, nn, replace_modules

# Before 3.11 Python's code does not say in which column a call stands, and nothing is joined.
pytestmark = [
    pytest.mark.usefixtures("backend"),
    pytest.mark.skipif(sys.version_info < (3, 11), reason="needs columns in Python's code objects"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
]

INPUT = torch.randn(2, 3, 10, 11, generator=torch.Generator().manual_seed(5))
BLOCK, PAIR = "conv2d_relu_max_pool2d", "conv2d_relu"


@contextlib.contextmanager
def joins(blocks: int, pairs: int = 0) -> Iterator[None]:
    """Asserts how many blocks, and how many pairs of convolution and ReLU, run as one operator."""
    block, relu = functional.conv2d_relu_max_pool2d, functional.conv2d_relu
    with (
        mock.patch.object(functional, BLOCK, side_effect=block) as joined_blocks,
        mock.patch.object(functional, PAIR, side_effect=relu) as joined_pairs,
    ):
        yield
    assert (joined_blocks.call_count, joined_pairs.call_count) == (blocks, pairs)


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


JOINED: list[tuple[type[Parts], int, int]] = []
APART: list[type[Parts]] = []


def joined(blocks: int, pairs: int = 0) -> Callable[[type[Parts]], type[Parts]]:
    """Marks a class in whose forward so many blocks and pairs are joined."""

    def mark(cls: type[Parts]) -> type[Parts]:
        JOINED.append((cls, blocks, pairs))
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
        return torch.tanh(self.pool(F.relu(self.again(self.pool(F.relu(self.conv(x)))))))


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


@joined(0, 3)
class Pairs(Parts):
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = F.relu(x)
        y = F.relu(self.again(x), inplace=True)
        return x + y + self.again(x).relu_()


@joined(1, 1)
class Residual(Parts):
    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        y = self.pool(F.relu(self.again(x)))
        return y + self.pool(x)


@apart
class UsedTwice(Parts):
    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        return self.pool(F.relu(h)) + self.pool(h)


@joined(0, 1)
class ReluUsedTwice(Parts):
    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.conv(x))
        return self.pool(h) + h.mean()


@joined(0, 1)
class Returned(Parts):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = F.relu(self.conv(x))
        return self.pool(h), h


@apart
class Walrus(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return self.pool(F.relu(h := self.conv(x))) + h.sum()


@joined(0, 1)
class SecondArgument(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x[:1, :1] > 0, F.relu(self.conv(x)), 0.0)


@joined(0, 2)
class Indices(Parts):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y, indices = F.max_pool2d(F.relu(self.conv(x)), 2, return_indices=True)
        return y, indices.float(), self.indices(F.relu(self.conv(x)))[0]


@apart
class OtherActivations(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return self.pool(F.relu6(self.conv(x))) + self.pool(F.leaky_relu(self.conv(x)))


@joined(0, 1)
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


@joined(0, 1)
class InAWith(Parts):
    def forward(self, x: Tensor) -> Tensor:
        h = x
        with contextlib.suppress(RuntimeError):
            h = F.relu(self.conv(x))
            h = F.max_pool2d(h, 100)
        return h


@joined(0, 1)
class Between(Parts):
    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.conv(x))
        x.mul_(0)
        return self.pool(h)


@joined(0, 1)
class EvaluatedBefore(Parts):
    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        h = F.relu(self.conv(x))
        return x.mul_(0).sum() + self.pool(h)


@joined(0, 1)
class ArgumentsThatCompute(Parts):
    def forward(self, x: Tensor) -> Tensor:
        h = x.clone()
        return F.max_pool2d(F.relu(self.conv(h)), self.change(h))

    def change(self, h: Tensor) -> int:
        h.zero_()
        return 2


@joined(0, 1)
class Locals(Parts):
    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.conv(x))
        y = self.pool(h)
        return y + locals()["h"].sum() if self.flag else y


@joined(0, 1)
class Closure(Parts):
    def forward(self, x: Tensor) -> Tensor:
        self.inner = lambda: x
        x = F.relu(self.conv(x))
        return self.pool(x)


@joined(0, 1)
class Deleted(Parts):
    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.conv(x))
        y = self.pool(h)
        del h
        return y


@joined(1)
class ChangedAfterwards(Parts):
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = self.relu(x)
        x = self.pool(x)
        x += 1
        return x


@apart
class ChangedOnAnotherWay(Parts):
    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        y = F.relu(h)
        if self.flag:
            h += 1
        return y


@apart
class ReadOnAnotherWay(Parts):
    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        y = F.relu(h)
        return y + h if self.flag else y


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


@pytest.mark.parametrize(("cls", "blocks", "pairs"), JOINED, ids=name_of)
def test_joined(cls: type[Parts], blocks: int, pairs: int) -> None:
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

    kernels = [BLOCK] * (blocks > 0) + [PAIR] * (pairs > 0)
    with torch.no_grad():  # some change what a backward needs
        expected = theirs(INPUT.clone())
        with joins(blocks, pairs), runs_kernel(*kernels):
            assert_same(ours(INPUT.clone()), expected)
    if cls not in (Between, EvaluatedBefore, ArgumentsThatCompute):
        expected = gradients(theirs, INPUT)
        with joins(blocks, pairs):
            assert_same(gradients(ours, INPUT), expected)
    ours.eval().flag = theirs.eval().flag = True
    with torch.no_grad():
        assert_same(ours(INPUT.clone()), theirs(INPUT.clone()))
    if cls is Closure:
        assert_same(ours.inner(), theirs.inner())


@pytest.mark.parametrize("cls", APART, ids=name_of)
def test_apart(cls: type[Parts]) -> None:
    theirs, ours = cls(), cls()
    ours.load_state_dict(theirs.state_dict())
    replace_modules(ours)
    assert type(ours) is cls
    for flag in (False, True):
        ours.flag = theirs.flag = flag
        with torch.no_grad(), joins(0):
            assert_same(ours(INPUT.clone()), theirs(INPUT.clone()))


class Net(torch.nn.Module):
    """The chapter's network."""

    def __init__(self) -> None:
        super(Net, self).__init__()  # noqa: UP008  as it stands there
        self.conv1 = torch.nn.Conv2d(1, 6, 3)
        self.conv2 = torch.nn.Conv2d(6, 16, 3)
        self.fc1 = torch.nn.Linear(16 * 6 * 6, 120)
        self.fc2 = torch.nn.Linear(120, 84)
        self.fc3 = torch.nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        # Max pooling over a (2, 2) window
        x = F.max_pool2d(F.relu(self.conv1(x)), (2, 2))
        # If the size is a square you can only specify a single number
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = x.view(-1, self.num_flat_features(x))
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        x = self.fc3(x)
        return x

    def num_flat_features(self, x: Tensor) -> int:
        size = x.size()[1:]  # all dimensions except the batch dimension
        num_features = 1
        for s in size:
            num_features *= s
        return num_features


DIGITS = torch.randn(3, 1, 32, 32, generator=torch.Generator().manual_seed(6))


def pair(cls: type[torch.nn.Module], **kwargs: Any) -> tuple[Any, Any]:
    """A converted model, and one with the same weights that is as it was."""
    theirs = cls(**kwargs)
    ours = replace_modules(copy.deepcopy(theirs))
    assert type(ours) is not cls
    return ours, theirs


def test_the_chapter_net_trains_as_before() -> None:
    ours, theirs = pair(Net)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (ours, theirs)]
    labels = torch.arange(3)
    for model, optimizer in zip((ours, theirs), optimizers, strict=True):
        with joins(6 if model is ours else 0):
            for _ in range(3):
                optimizer.zero_grad()
                F.cross_entropy(model(DIGITS), labels).backward()
                optimizer.step()
    assert_same(list(ours.parameters()), list(theirs.parameters()))
    assert list(ours.state_dict()) == list(theirs.state_dict())


def test_one_image_without_a_batch() -> None:
    ours, theirs = pair(Functions)
    with joins(1):
        assert_same(ours(INPUT[0]), theirs(INPUT[0]))


def test_nothing_is_joined_without_fuse() -> None:
    model = replace_modules(Net(), fuse=False)
    assert type(model) is Net
    with joins(2):
        replace_modules(model)(DIGITS)


def test_modules_inside_modules() -> None:
    class Outer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Functions(), Modules()
            self.chain = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3), torch.nn.ReLU())
            self.first.again = self.second.again = self.second.conv = torch.nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            if x.sum() == 0:  # not to be traced
                return x
            return self.second(self.first(x))

    theirs = Outer()
    ours = replace_modules(copy.deepcopy(theirs))
    assert type(ours) is Outer
    assert type(ours.first) is not Functions
    with joins(2):
        assert_same(ours(INPUT), theirs(INPUT))


def test_blocks_of_one_class_stay_of_one_class() -> None:
    model = replace_modules(torch.nn.Sequential(Functions(), Functions()))
    assert type(model[0]) is type(model[1])


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickle(protocol: int) -> None:
    ours, theirs = pair(Net)
    ours.eval().extra = {"key": 1}
    loaded = pickle.loads(pickle.dumps(ours, protocol))
    assert type(loaded) is type(ours)
    assert loaded.extra == {"key": 1}
    assert not loaded.training
    with joins(2):
        assert_same(loaded(DIGITS), theirs(DIGITS))


def test_save_copy_and_load() -> None:
    ours, theirs = pair(Net)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    for model in (torch.load(file, weights_only=False), copy.deepcopy(ours), copy.copy(ours)):
        assert type(model) is type(ours)
        with joins(2):
            assert_same(model(DIGITS), theirs(DIGITS))
    other = Net()
    other.load_state_dict(ours.state_dict())
    ours.load_state_dict(other.state_dict())
    assert_same(other(DIGITS), theirs(DIGITS))


def test_a_pickle_whose_source_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pair(Net)
    data = pickle.dumps(ours)

    def forward(self: Net, x: Tensor) -> Tensor:
        return self.conv1(x)

    monkeypatch.setattr(Net, "forward", forward)
    loaded = pickle.loads(data)
    assert type(loaded) is Net
    assert_same(loaded(DIGITS), theirs(DIGITS))


def test_hooks_of_the_model_stay() -> None:
    model, calls = Net(), []
    model.register_forward_hook(lambda *_: calls.append("forward"))
    model.conv1.register_forward_pre_hook(lambda *_: calls.append("conv1"))
    model.fc3.register_full_backward_hook(lambda *_: calls.append("fc3"))
    expected = copy.deepcopy(model)(DIGITS)
    replace_modules(model)
    calls.clear()
    with joins(1):
        output = model(DIGITS)
    output.sum().backward()
    assert calls == ["conv1", "forward", "fc3"]
    assert_same(output, expected)


@pytest.mark.parametrize("name", ["conv", "relu", "pool"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_set_later_run(name: str, kind: str) -> None:
    ours, theirs = pair(Modules)
    calls: list[str] = []
    hook = lambda *_: calls.append(name)  # noqa: E731
    handle = getattr(ours.get_submodule(name), f"register_{kind}_hook")(hook)
    images = INPUT.clone().requires_grad_()
    with joins(0, name == "pool"):
        output = ours(images)
    output.sum().backward()
    assert calls == [name]
    assert_same(output, theirs(INPUT))
    handle.remove()
    with joins(1):
        ours(INPUT)


def test_hooks_of_all_modules_run() -> None:
    ours, _ = pair(Modules)
    calls: list[str] = []
    hook = lambda module, *_: calls.append(type(module).__name__)  # noqa: E731
    handle = torch.nn.modules.module.register_module_forward_hook(hook)
    try:
        with joins(0):
            ours(INPUT)
    finally:
        handle.remove()
    assert calls == ["Conv2d", "ReLU", "MaxPool2d", "Modules"]


class Doubled(torch.nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def circular(model: Parts) -> None:
    model.conv = nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular")


def of_ones_own(model: Parts) -> None:
    plain = model.conv.forward
    model.conv.forward = lambda x: -plain(x)


LATER: dict[str, tuple[Callable[[Any], Any], int, int]] = {
    "another convolution": (lambda m: setattr(m, "conv", nn.Conv2d(3, 5, 3)), 1, 0),
    "a plain convolution": (lambda m: setattr(m, "conv", torch.nn.Conv2d(3, 4, 5)), 0, 0),
    "circular padding": (circular, 0, 0),
    "a forward of its own": (of_ones_own, 0, 0),
    "another activation": (lambda m: setattr(m, "relu", torch.nn.GELU()), 0, 0),
    "another pool": (lambda m: setattr(m, "pool", torch.nn.AvgPool2d(2)), 0, 1),
    "another pool size": (lambda m: setattr(m.pool, "kernel_size", 3), 1, 0),
    "indices": (lambda m: setattr(m.pool, "return_indices", True), 0, 1),
    "pruned": (lambda m: prune.random_unstructured(m.conv, "weight", 0.5), 0, 0),
    "parametrized": (
        lambda m: parametrize.register_parametrization(m.conv, "weight", Doubled()),
        0,
        0,
    ),
    "spectral norm": (lambda m: torch.nn.utils.parametrizations.spectral_norm(m.conv), 0, 0),
    "weight norm": (lambda m: torch.nn.utils.parametrizations.weight_norm(m.conv), 0, 0),
    "other weights": (lambda m: m.load_state_dict(replaced_weights(m)), 1, 0),
    "no bias": (lambda m: setattr(m.conv, "bias", None), 1, 0),
    "compiled": (lambda m: m.conv.compile(backend="eager"), 0, 0),
}


def replaced_weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: torch.ones_like(value) for name, value in model.state_dict().items()}


@pytest.mark.parametrize("change", LATER)
def test_changes_made_later_hold(change: str) -> None:
    ours, theirs = pair(Modules)
    make, blocks, pairs = LATER[change]
    for model in (ours, theirs):
        torch.manual_seed(1)
        make(model)
    for _ in range(2):  # some change with every call
        with joins(blocks, pairs):
            output = ours(INPUT)
        assert_same(output, theirs(INPUT))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(dtype: torch.dtype) -> None:
    ours, theirs = pair(Functions)
    with joins(1):
        output = ours.to(dtype)(INPUT.to(dtype))
    torch.testing.assert_close(output, theirs.to(dtype)(INPUT.to(dtype)), rtol=1e-2, atol=1e-2)
    assert output.dtype == dtype


def test_autocast() -> None:
    ours, theirs = pair(Functions)
    with torch.autocast("cpu", torch.bfloat16), joins(1):
        output = ours(INPUT)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(output, theirs(INPUT), rtol=1e-2, atol=1e-2)


class Branches(Parts):
    """Everything that a trace would burn in."""

    scale = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.dropout = torch.nn.Dropout()

    def forward(self, x: Tensor, factor: float = 1.0, extra: Tensor | None = None) -> Any:
        h = self.conv(x)
        a = F.relu(h)
        y = self.pool(a)
        y = self.pool(F.relu(self.again(y)))
        y = F.dropout(y, training=self.training) * self.scale * SCALE * factor
        if self.flag:
            y = y + h.mean()
        if extra is not None:
            y = y + extra
        if torch.is_grad_enabled():
            y = y + 1
        if isinstance(x, Tensor):
            y = y + 2
        self.calls += 1
        self.last = y
        return y + random.random() + torch.rand(1)


SCALE = 1.0


def seeded(model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    random.seed(1)
    torch.manual_seed(1)
    return model(*args, **kwargs)


def test_nothing_is_burnt_in(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = Branches()
    ours = copy.deepcopy(theirs)
    random.seed(2)
    torch.manual_seed(2)
    states = random.getstate(), torch.get_rng_state()
    replace_modules(ours)
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert type(ours) is not Branches
    assert ours.calls == 0
    assert not hasattr(ours, "last")

    def check(*args: Any, **kwargs: Any) -> None:
        with joins(1):
            output = seeded(ours, *args, **kwargs)
        assert_same(output, seeded(theirs, *args, **kwargs))
        assert ours.calls == theirs.calls
        assert_same(ours.last, theirs.last)

    check(INPUT)
    check(INPUT, 2.0)
    check(INPUT, factor=3.0, extra=torch.ones(()))
    with torch.no_grad():
        check(x=INPUT, extra=None)
    for model in (ours, theirs):
        model.eval()
        model.flag, model.scale = True, 2.0
    check(INPUT)
    monkeypatch.setitem(globals(), "SCALE", 3.0)
    check(INPUT)


def test_replaced_functions_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pair(Functions)
    monkeypatch.setattr(F, "relu", F.gelu)
    with joins(0):
        assert_same(ours(INPUT), theirs(INPUT))


def test_closures_and_defaults() -> None:
    pool: Any = F.max_pool2d

    class Local(Parts):
        def forward(self, x: Tensor, /, *rest: Any, size: int = 2, **others: Any) -> Tensor:
            return pool(F.relu(self.conv(x)), size) * size

    ours, theirs = pair(Local)
    with joins(2):
        assert_same(ours(INPUT), theirs(INPUT))
        assert_same(ours(INPUT, 1, size=3, a=4), theirs(INPUT, 1, size=3, a=4))
    pool = F.avg_pool2d
    with joins(0, 1):
        assert_same(ours(INPUT), theirs(INPUT))


def test_wrong_arguments_raise_what_they_raised() -> None:
    ours, theirs = pair(Functions)
    for args in ((), (INPUT[:, :2],), (None,), ([1],), (INPUT.long(),), (INPUT, INPUT)):
        with pytest.raises((RuntimeError, TypeError, AttributeError)) as expected:
            theirs(*args)
        with pytest.raises(expected.type):
            ours(*args)


def test_a_traceback_shows_the_users_line() -> None:
    ours, _ = pair(Functions)
    try:
        ours(INPUT[:, :2])
    except RuntimeError as error:
        lines = [frame.line for frame in traceback.extract_tb(error.__traceback__)]
    assert "return F.max_pool2d(F.relu(self.conv(x)), (2, 2))" in lines


def test_a_parametrized_model() -> None:
    model = Functions()
    model.scale = torch.nn.Parameter(torch.ones(()))
    parametrize.register_parametrization(model, "scale", Doubled())
    expected = model(INPUT)
    replace_modules(model)
    assert type(model).__name__ == "ParametrizedFunctions"
    for candidate in (model, copy.deepcopy(model)):
        with joins(1):
            assert_same(candidate(INPUT), expected)
    parametrize.remove_parametrizations(model, "scale")
    assert type(model).__name__ == "Functions"
    with joins(1):
        assert_same(model(INPUT), expected)


def test_a_model_that_cannot_be_copied_stays() -> None:
    model = Functions()
    model.lock = threading.Lock()
    assert type(replace_modules(model)) is Functions


def test_parameters_are_not_copied() -> None:
    class Writing(Parts):
        def forward(self, x: Tensor) -> Tensor:
            self.conv._parameters["weight"].data.zero_()
            self.norm.running_mean.add_(1)
            return self.pool(F.relu(self.conv(x)))

    model = Writing()
    state = copy.deepcopy(model.state_dict())
    replace_modules(model)
    torch.testing.assert_close(dict(model.state_dict()), dict(state), rtol=0, atol=0)


def test_a_class_without_source_stays() -> None:
    scope: dict[str, Any] = {"Parts": Parts, "F": F, "__name__": "elsewhere"}
    source = "\n".join(
        [
            "class Sourceless(Parts):",
            "    def forward(self, x):",
            "        return F.max_pool2d(F.relu(self.conv(x)), 2)",
        ]
    )
    exec(compile(source, "<nowhere>", "exec"), scope)
    cls = scope["Sourceless"]
    assert type(replace_modules(cls())) is cls
    # As it is in a notebook, whose cells are known to linecache.
    cell = source.splitlines(keepends=True)
    linecache.cache["<nowhere>"] = (1, None, [*cell[:2], cell[2].replace("2)", "3)")], "")
    try:
        assert type(replace_modules(cls())) is cls  # this is another function
        linecache.cache["<nowhere>"] = (1, None, cell, "")
        with joins(1):
            replace_modules(cls())(INPUT)
    finally:
        del linecache.cache["<nowhere>"]


def test_a_subclass_of_tensor_sees_all_functions() -> None:
    class Watched(Tensor):
        functions: list[str] = []  # noqa: RUF012

        @classmethod
        def __torch_function__(
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            cls.functions.append(func.__name__)
            return super().__torch_function__(func, types, args, kwargs or {})

    ours, theirs = pair(Functions)
    output = ours(INPUT.as_subclass(Watched))
    assert {"conv2d", "relu"} <= set(Watched.functions)
    assert_same(output.as_subclass(Tensor), theirs(INPUT))


def test_a_checkpoint_under_a_default_device() -> None:
    ours, theirs = pair(Functions)
    with torch.device("cpu"), runs_kernel(BLOCK):  # its mode is not active in the backward
        output = checkpoint(ours, INPUT, use_reentrant=False)
        results = torch.autograd.grad(output.sum(), [ours.conv.weight])
    assert_same(results, torch.autograd.grad(theirs(INPUT).sum(), [theirs.conv.weight]))


def test_torch_fx_traces_what_was_written() -> None:
    ours, theirs = pair(Functions)
    graph = torch.fx.symbolic_trace(ours)
    assert [node.name for node in graph.graph.nodes][-4:] == [
        "conv2d",
        "relu",
        "max_pool2d",
        "output",
    ]
    assert_same(graph(INPUT), theirs(INPUT))


def test_script_runs_what_was_written() -> None:
    ours, theirs = pair(Net)
    with runs_kernel("conv2d"):
        assert_same(torch.jit.script(ours)(DIGITS), theirs(DIGITS))


def test_jit_trace() -> None:
    ours, theirs = pair(Functions)
    traced = torch.jit.trace(ours, INPUT)
    with runs_kernel(BLOCK):
        assert_same(traced(INPUT), theirs(INPUT))


@pytest.mark.parametrize("cls", [Net, Statements, Loop])
def test_compile(cls: type[torch.nn.Module]) -> None:
    ours, theirs = pair(cls)
    images = DIGITS if cls is Net else INPUT
    torch.compiler.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    expected = gradients(theirs, images)
    with runs_kernel(BLOCK):
        results = gradients(compiled, images)
    assert_same(results, expected)


def test_compile_sees_changes() -> None:
    ours, theirs = pair(Modules)
    torch.compiler.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    assert_same(compiled(INPUT), theirs(INPUT))
    ours.relu = theirs.relu = torch.nn.GELU()
    assert_same(compiled(INPUT), theirs(INPUT))


@pytest.mark.parametrize("strict", [True, False])
def test_export(strict: bool) -> None:
    ours, theirs = pair(Net)
    program = torch.export.export(ours, (DIGITS,), strict=strict)
    with runs_kernel(BLOCK):
        assert_same(program.module()(DIGITS), theirs(DIGITS))


def test_transforms() -> None:
    ours, theirs = pair(Functions)
    images = INPUT[None]
    assert_same(torch.func.vmap(ours)(images), theirs(INPUT)[None])

    def loss(model: torch.nn.Module, parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, parameters, (INPUT,)).square().sum()

    parameters = {name: value.detach() + 0.1 for name, value in ours.named_parameters()}
    for transform in (torch.func.grad, torch.func.jacrev):
        ours_grad = transform(functools.partial(loss, ours))(parameters)
        assert_same(ours_grad, transform(functools.partial(loss, theirs))(parameters))
    tangents = {name: torch.ones_like(value) for name, value in parameters.items()}
    results = [
        torch.func.jvp(functools.partial(loss, model), (parameters,), (tangents,))
        for model in (ours, theirs)
    ]
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


def test_other_threads_go_on_meanwhile() -> None:
    model, errors, stop = Net(), [], threading.Event()

    def run() -> None:
        try:
            while not stop.is_set():
                model(DIGITS)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    for _ in range(5):
        replace_modules(Net())
    stop.set()
    thread.join()
    assert errors == []


def test_replicas() -> None:
    ours, theirs = pair(Functions)
    replica = ours._replicate_for_data_parallel()
    replica.conv = replica.conv._replicate_for_data_parallel()
    replica.conv.weight = torch.ones_like(ours.conv.weight)
    theirs.conv.weight.data.fill_(1)
    replica.conv.bias = theirs.conv.bias.data
    with joins(1):
        assert_same(replica(INPUT), theirs(INPUT))


def test_a_network_inside_of_the_package_is_joined() -> None:
    """The benchmark's, which the command line imports as a part of the installed package."""
    training_step = pytest.importorskip("cnnkernels.benchmarks.training_step")
    model = replace_modules(training_step.Net())
    with joins(blocks=2):
        model(torch.randn(1, 1, 32, 32))
