"""replace_modules and patch: what changes in a model, and what does not."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import runs_kernel
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import parametrize

import cnnkernels
from cnnkernels import functional, nn, patch, replace_modules

pytestmark = pytest.mark.usefixtures("backend")


def sequential(**pool: Any) -> torch.nn.Sequential:
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(2, **pool),
        torch.nn.Conv2d(4, 8, 3),
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(3, 1),
        torch.nn.Flatten(),
        torch.nn.Linear(8 * 4 * 4, 5),
    )


def classes(model: torch.nn.Module) -> list[str]:
    return [type(child).__name__ for child in model._modules.values()]


FUSED = ["Conv2dReLUMaxPool2d", "Identity", "Identity"]
APART = ["Conv2d", "ReLU", "MaxPool2d"]
WITHOUT_POOL = ["Conv2dReLU", "Identity", "MaxPool2d"]
INPUT = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(3))


def assert_computes(model: Callable[[Tensor], Tensor], expected: Tensor) -> None:
    torch.testing.assert_close(model(INPUT), expected, rtol=1e-4, atol=1e-5)


def test_fuses_and_changes_nothing_else() -> None:
    model = torch.nn.Sequential(*list(sequential())[:7])
    expected, state = model(INPUT), copy.deepcopy(model.state_dict())
    parameters, conv = list(model.parameters()), model[0]
    assert replace_modules(model) is model
    assert classes(model) == [*FUSED, *FUSED, "Flatten"]
    assert model[0] is conv
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    torch.testing.assert_close(dict(model.state_dict()), dict(state), rtol=0, atol=0)
    with runs_kernel("conv2d_relu_max_pool2d"):
        assert_computes(model, expected)
    before = repr(model)
    assert repr(replace_modules(model)) == before


HOOKS: dict[str, Callable[[torch.nn.Module, list[Any]], Any]] = {
    "forward": lambda m, calls: m.register_forward_hook(lambda *_: calls.append(1)),
    "forward_pre": lambda m, calls: m.register_forward_pre_hook(lambda *_: calls.append(1)),
    "backward": lambda m, calls: m.register_full_backward_hook(lambda *_: calls.append(1)),
    "backward_pre": lambda m, calls: m.register_full_backward_pre_hook(lambda *_: calls.append(1)),
}


def chain() -> torch.nn.Sequential:
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3, padding=1),
        torch.nn.ReLU(inplace=True),
        torch.nn.Conv2d(4, 4, 3, padding="same", groups=2),
        torch.nn.ReLU(),
        torch.nn.BatchNorm2d(4),
        torch.nn.Conv2d(4, 2, 3, stride=2),
        torch.nn.BatchNorm2d(2),
        torch.nn.ReLU(),
        torch.nn.Conv2d(2, 2, 1, padding_mode="reflect"),
        torch.nn.ReLU().eval(),
    )


def test_fuses_a_convolution_and_a_relu_without_a_pool() -> None:
    model = chain()
    expected, state = model(INPUT), copy.deepcopy(model.state_dict())
    parameters, conv, relu = list(model.parameters()), model[0], model[1]
    replace_modules(model)
    pair = ["Conv2dReLU", "Identity"]
    assert classes(model) == [*pair, *pair, "BatchNorm2d", "Conv2d", "BatchNorm2d", "ReLU", *pair]
    assert model[0] is conv
    assert [module.training for module in model] == [True] * 9 + [False]
    assert relu is not model[1]
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == list(state)
    model.load_state_dict(state)
    with runs_kernel("conv2d_relu"):
        assert_computes(model, expected)
    before = repr(model)
    assert repr(replace_modules(model)) == before


def test_a_convolution_and_a_relu_without_a_pool_train_as_before() -> None:
    ours, theirs = chain(), chain()
    theirs.load_state_dict(ours.state_dict())
    replace_modules(ours)
    for model in (ours, theirs):
        model(INPUT).square().sum().backward()
    torch.testing.assert_close(
        [p.grad for p in ours.parameters()],
        [p.grad for p in theirs.parameters()],
        rtol=1e-3,
        atol=1e-4,
    )


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("kind", [*HOOKS, "own forward", "used twice"])
def test_convolution_and_relu_stay_apart_where_someone_could_tell(kind: str, index: int) -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 3), torch.nn.ReLU())
    if kind == "own forward":
        plain = model[index].forward
        model[index].forward = lambda input: -plain(input)  # type: ignore[method-assign]
    elif kind == "used twice":
        model.append(model[0])  # a ReLU has no state that its uses could share
    else:
        HOOKS[kind](model[index], [])
    expected = model(INPUT)
    assert classes(replace_modules(model))[:2] == ["Conv2d", "ReLU"]
    assert_computes(model, expected)


def test_without_fusing() -> None:
    model = torch.nn.Sequential(*list(sequential())[:7])
    expected = model(INPUT)
    replace_modules(model, fuse=False)
    assert classes(model) == [*APART, *APART, "Flatten"]
    assert type(model[0]) is nn.Conv2d
    assert type(model[2]) is nn.MaxPool2d
    with runs_kernel("conv2d", "max_pool2d"):
        assert_computes(model, expected)
    assert classes(replace_modules(model)) == [*FUSED, *FUSED, "Flatten"]
    assert_computes(model, expected)


@pytest.mark.parametrize("cls", ["Conv2d", "MaxPool2d"])
def test_the_model_may_be_the_module_itself(cls: str) -> None:
    module = torch.nn.Conv2d(1, 2, 3) if cls == "Conv2d" else torch.nn.MaxPool2d(3)
    expected = module(INPUT)
    assert replace_modules(module) is module
    assert type(module) is getattr(nn, cls)
    assert_computes(module, expected)


def test_a_model_of_ones_own_keeps_its_forward() -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(1, 4, 3)
            self.pool = torch.nn.MaxPool2d(2)
            self.features = torch.nn.Sequential(
                torch.nn.Conv2d(4, 4, 3), torch.nn.ReLU(inplace=True), torch.nn.MaxPool2d(2)
            )

        def forward(self, input: Tensor) -> Tensor:
            return self.features(self.pool(F.relu(self.conv(input))))

    model = Net().eval()
    expected = model(INPUT)
    replace_modules(model)
    assert classes(model) == ["Conv2d", "MaxPool2d", "Sequential"]
    assert type(model.conv) is nn.Conv2d
    assert classes(model.features) == FUSED
    assert not any(module.training for module in model.modules())
    assert_computes(model, expected)


def test_subclasses_stay() -> None:
    class MyConv(torch.nn.Conv2d):
        pass

    model = torch.nn.Sequential(MyConv(1, 2, 3), torch.nn.ConvTranspose2d(2, 2, 3))
    assert list(map(type, replace_modules(model))) == [MyConv, torch.nn.ConvTranspose2d]


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_still_run(index: int, kind: str) -> None:
    model = torch.nn.Sequential(*list(sequential())[:3])
    expected, calls = model(INPUT), []
    HOOKS[kind](model[index], calls)
    replace_modules(model)
    assert classes(model) == (WITHOUT_POOL if index == 2 else APART)
    output = model(INPUT)
    output.sum().backward()
    assert calls == [1]
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


def test_not_fused_where_someone_could_tell() -> None:
    indices = torch.nn.Sequential(*list(sequential(return_indices=True))[:3])
    assert classes(replace_modules(indices)) == WITHOUT_POOL
    assert len(indices(INPUT)) == 2

    conv = torch.nn.Conv2d(1, 1, 3, padding=1)
    shared = torch.nn.Sequential(conv, torch.nn.ReLU(), torch.nn.MaxPool2d(2), conv)
    expected = shared(INPUT)
    assert classes(replace_modules(shared)) == [*APART, "Conv2d"]
    assert_computes(shared, expected)

    pool = torch.nn.MaxPool2d(2)
    pools = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 3), torch.nn.ReLU(), pool, pool)
    assert classes(replace_modules(pools)) == [*WITHOUT_POOL, "MaxPool2d"]

    class Reversed(torch.nn.Sequential):
        def forward(self, input: Tensor) -> Tensor:
            for module in reversed(self):
                input = module(input)
            return input

    assert classes(replace_modules(Reversed(*list(sequential())[:3]))) == APART
    leaky = torch.nn.Sequential(
        torch.nn.Conv2d(1, 1, 3), torch.nn.LeakyReLU(), torch.nn.MaxPool2d(2)
    )
    assert classes(replace_modules(leaky)) == ["Conv2d", "LeakyReLU", "MaxPool2d"]


def test_one_relu_for_all() -> None:
    relu = torch.nn.ReLU()
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 2, 3), relu, torch.nn.MaxPool2d(2), torch.nn.Linear(7, 3), relu
    )
    expected = model(INPUT)
    assert classes(replace_modules(model)) == [*FUSED, "Linear", "ReLU"]
    assert_computes(model, expected)


class Doubled(torch.nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight / 2


@pytest.mark.parametrize("fuse", [True, False])
def test_parametrizations_stay_and_can_be_removed(fuse: bool) -> None:
    model = torch.nn.Sequential(*list(sequential())[:3])
    parametrize.register_parametrization(model[0], "weight", Doubled())
    expected, keys = model(INPUT), list(model.state_dict())
    replace_modules(model, fuse=fuse)
    ours = nn.Conv2dReLUMaxPool2d if fuse else nn.Conv2d
    assert isinstance(model[0], ours)
    assert parametrize.is_parametrized(model[0], "weight")
    assert list(model.state_dict()) == keys
    assert_computes(model, expected)
    assert_computes(copy.deepcopy(model), expected)
    parametrize.remove_parametrizations(model[0], "weight")
    assert type(model[0]) is ours
    assert_computes(model, expected)


def test_shared_weights_stay_shared() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 3), torch.nn.Conv2d(1, 1, 3))
    model[1].weight = model[0].weight
    replace_modules(model)
    assert model[1].weight is model[0].weight


def test_trains_as_before() -> None:
    ours, theirs = sequential(), sequential()
    theirs.load_state_dict(ours.state_dict())
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (ours, theirs)]
    replace_modules(ours)
    images, labels = torch.randn(4, 1, 16, 16), torch.randint(5, (4,))
    for model, optimizer in zip((ours, theirs), optimizers, strict=True):
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
    torch.testing.assert_close(
        list(ours.parameters()), list(theirs.parameters()), rtol=1e-3, atol=1e-4
    )


def test_only_modules_are_replaced() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got list"):
        replace_modules([torch.nn.Conv2d(1, 1, 1)])  # type: ignore[type-var]


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the cnnkernels operators that run on the PyTorch backend, as they run."""
    calls: list[str] = []
    for name in ("conv2d", "max_pool2d", "max_pool2d_with_indices"):
        original = getattr(cnnkernels.fallback, name)
        monkeypatch.setattr(
            cnnkernels.fallback,
            name,
            lambda *args, name=name, original=original: calls.append(name) or original(*args),
        )
    return calls


IMAGE, WEIGHT = torch.randn(1, 2, 6, 6), torch.randn(3, 2, 3, 3)
CALLS: dict[str, tuple[Callable[[], Any], str]] = {
    "F.conv2d": (lambda: F.conv2d(IMAGE, WEIGHT, padding="same"), "conv2d"),
    "torch.conv2d": (lambda: torch.conv2d(IMAGE, WEIGHT, stride=2), "conv2d"),
    "Conv2d": (lambda: torch.nn.Conv2d(2, 3, 3)(IMAGE).shape, "conv2d"),
    "F.max_pool2d": (lambda: F.max_pool2d(IMAGE, 2, ceil_mode=True), "max_pool2d"),
    "F.max_pool2d with indices": (
        lambda: F.max_pool2d(IMAGE, 2, return_indices=True),
        "max_pool2d_with_indices",
    ),
    "F.max_pool2d_with_indices": (
        lambda: F.max_pool2d_with_indices(IMAGE, 2, 1),
        "max_pool2d_with_indices",
    ),
    "torch._C._nn.max_pool2d_with_indices": (
        lambda: torch._C._nn.max_pool2d_with_indices(IMAGE, [2], [2]),
        "max_pool2d_with_indices",
    ),
    "torch.max_pool2d": (lambda: torch.max_pool2d(IMAGE, 2), "max_pool2d"),
    "MaxPool2d": (lambda: torch.nn.MaxPool2d(2)(IMAGE), "max_pool2d"),
    "MaxPool2d with indices": (
        lambda: torch.nn.MaxPool2d(2, return_indices=True)(IMAGE),
        "max_pool2d_with_indices",
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_patch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call, operator = CALLS[name]
    expected = call()
    with cnnkernels.use_backend("torch"):
        calls = counted(monkeypatch)
        with patch():
            output = call()
        assert calls == [operator]
        call()
        assert calls == [operator]
    torch.testing.assert_close(
        output, type(output)(expected) if isinstance(output, tuple) else expected
    )
    with patch(), runs_kernel(operator.removesuffix("_with_indices")):
        call()


def test_patch_nests_decorates_and_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    @patch()
    def loss(model: torch.nn.Module) -> Tensor:
        with patch():
            return model(INPUT).square().sum()

    model = sequential()
    loss(model).backward()
    grads = [p.grad for p in model.parameters()]
    expected = torch.autograd.grad(model(INPUT).square().sum(), list(model.parameters()))
    torch.testing.assert_close(grads, list(expected), rtol=1e-3, atol=1e-3)
    with cnnkernels.use_backend("torch"):
        calls = counted(monkeypatch)
        loss(model)
        assert calls.count("conv2d") == 2
        with pytest.raises(ZeroDivisionError), patch():
            raise ZeroDivisionError
        model(INPUT)
        assert calls.count("conv2d") == 2


def test_patch_holds_for_its_thread_only(monkeypatch: pytest.MonkeyPatch) -> None:
    with cnnkernels.use_backend("torch"):
        calls = counted(monkeypatch)
        with patch():
            thread = threading.Thread(target=lambda: F.conv2d(IMAGE, WEIGHT))
            thread.start()
            thread.join()
        assert calls == []


def test_patch_leaves_our_own_functions_alone() -> None:
    with patch():
        ours = functional.conv2d_relu_max_pool2d(IMAGE, WEIGHT)
        torch.testing.assert_close(ours, F.max_pool2d(F.relu(F.conv2d(IMAGE, WEIGHT)), 2))


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_module_with_a_forward_of_its_own_is_not_fused(index: int) -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU(), torch.nn.MaxPool2d(2))
    plain = type(model[index]).forward
    module = model[index]
    module.forward = lambda input: -plain(module, input)
    input = torch.randn(2, 1, 9, 9)
    expected = model(input)
    torch.testing.assert_close(cnnkernels.replace_modules(model)(input), expected)


def test_patch_leaves_calls_with_out_to_torch() -> None:
    image, values, indices = torch.randn(1, 1, 4, 4), torch.empty(0), torch.empty(0).long()
    with patch():
        torch._C._nn.max_pool2d_with_indices(image, 2, out=(values, indices))
    torch.testing.assert_close(values, F.max_pool2d(image, 2))
