"""The ``training_step`` suite: forward, loss, backward and update of the tutorial's Net."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cnnkernels

from .cases import OURS, STEP, TORCH, Candidate, Case, Options, Workload
from .operators import CHANNELS_LAST, NCHW, to_layout
from .optimizer import MOMENTUM, TORCH_VARIANTS, MakeOptimizer

# So small that thousands of timed steps leave the network as it was drawn: one that has learnt its
# few batches by heart, or died, would time something else.
LEARNING_RATE = 1e-6

_BATCHES = (1, 64)
_ROTATION = 8
_CLASSES = 10

MakeModel = Callable[[], nn.Module]
Batch = tuple[Tensor, Tensor]


class Net(nn.Module):
    """The network of the tutorial's first chapter, which calls functions in its ``forward``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 3)
        self.conv2 = nn.Conv2d(6, 16, 3)
        self.fc1 = nn.Linear(16 * 6 * 6, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, _CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of shape (N, 10) for images of shape (N, 1, 32, 32)."""
        x = F.max_pool2d(F.relu(self.conv1(x)), (2, 2))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = x.view(-1, self.num_flat_features(x))
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        x = self.fc3(x)
        return x

    def num_flat_features(self, x: Tensor) -> int:
        """The number of features of an image, for features of shape (N, ...)."""
        size = x.size()[1:]
        num_features = 1
        for s in size:
            num_features *= s
        return num_features


def sequential_net() -> nn.Module:
    """The same network as a sequence of modules."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * 6 * 6, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, _CLASSES),
    )


def cases(options: Options) -> list[Case]:
    """For each batch, the sequence and the Net converted, and the Net under ``patch()``."""
    workloads = {
        "ch1_net converted": _converted,
        "ch1_net functions converted": _functions_converted,
        "ch1_net patched": _patched,
    }
    return [
        Case(
            suite="training_step",
            name=name,
            batch=batch,
            mode=STEP,
            gradients=("parameters",),
            prepare=functools.partial(workload, batch, options.seed),
        )
        for name, workload in workloads.items()
        for batch in options.batches or _BATCHES
    ]


def _converted(batch: int, seed: int) -> Workload:
    """``replace_modules(fuse=True)`` against the same sequence, in both memory formats."""
    return _workload(
        make_ours=lambda: cnnkernels.replace_modules(sequential_net(), fuse=True),
        make_torch=sequential_net,
        layouts=(NCHW, CHANNELS_LAST),
        context=contextlib.nullcontext,
        kernels=("conv2d_relu_max_pool2d", "conv2d_relu_max_pool2d_backward", "sgd_step_"),
        batch=batch,
        seed=seed,
    )


def _functions_converted(batch: int, seed: int) -> Workload:
    """``replace_modules(fuse=True)`` of the chapter's Net; its ``view`` admits no channels_last."""
    return _workload(
        make_ours=lambda: cnnkernels.replace_modules(Net(), fuse=True),
        make_torch=Net,
        layouts=(NCHW,),
        context=contextlib.nullcontext,
        kernels=("conv2d_relu_max_pool2d", "conv2d_relu_max_pool2d_backward", "sgd_step_"),
        batch=batch,
        seed=seed,
    )


def _patched(batch: int, seed: int) -> Workload:
    """The chapter's Net on both sides; its ``view`` admits no channels_last."""
    return _workload(
        make_ours=Net,
        make_torch=Net,
        layouts=(NCHW,),
        context=cnnkernels.patch,
        kernels=("conv2d", "conv2d_backward", "max_pool2d", "max_pool2d_backward", "sgd_step_"),
        batch=batch,
        seed=seed,
    )


def _workload(
    *,
    make_ours: MakeModel,
    make_torch: MakeModel,
    layouts: tuple[str, ...],
    context: Callable[[], AbstractContextManager[object]],
    kernels: tuple[str, ...],
    batch: int,
    seed: int,
) -> Workload:
    generator = torch.Generator().manual_seed(seed)
    batches = [
        (
            torch.randn((batch, 1, 32, 32), generator=generator),
            torch.randint(_CLASSES, (batch,), generator=generator),
        )
        for _ in range(_ROTATION)
    ]

    def candidate(
        side: str, layout: str, make_model: MakeModel, make_optimizer: MakeOptimizer, variant: str
    ) -> Candidate:
        make = functools.partial(_model, make_model, layout, seed)
        converted = [(to_layout(images, layout), labels) for images, labels in batches]
        return Candidate(
            side=side,
            layout=layout,
            variant=variant,
            call=_training(make(), make_optimizer, converted),
            results=lambda index: _loss_and_gradients(make(), make_optimizer, converted[index]),
            context=context if side == OURS else contextlib.nullcontext,
        )

    candidates = []
    for layout in layouts:
        candidates.append(candidate(OURS, layout, make_ours, _our_sgd, ""))
        for variant, fused in TORCH_VARIANTS.items():
            make_optimizer = functools.partial(_torch_sgd, fused)
            candidates.append(candidate(TORCH, layout, make_torch, make_optimizer, variant))

    def reference(index: int) -> tuple[Tensor, ...]:
        images, labels = batches[index]
        model = _model(make_torch, NCHW, seed).double()
        return _loss_and_gradients(
            model, functools.partial(_torch_sgd, None), (images.double(), labels)
        )

    return Workload(tuple(candidates), reference, _ROTATION, kernels)


def _model(make: MakeModel, layout: str, seed: int) -> nn.Module:
    """A network with the initial weights of the seed; the generator is left as it was."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model = make()
    if layout == CHANNELS_LAST:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def _our_sgd(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return cnnkernels.optim.SGD(parameters, LEARNING_RATE, momentum=MOMENTUM)


def _torch_sgd(fused: bool | None, parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, LEARNING_RATE, momentum=MOMENTUM, fused=fused)


def _training(
    model: nn.Module, make_optimizer: MakeOptimizer, batches: list[Batch]
) -> Callable[[int], Tensor]:
    """The training step as a user writes it; returns the loss."""
    optimizer = make_optimizer(list(model.parameters()))

    def step(index: int) -> Tensor:
        images, labels = batches[index % len(batches)]
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss

    return step


def _loss_and_gradients(
    model: nn.Module, make_optimizer: MakeOptimizer, batch: Batch
) -> tuple[Tensor, ...]:
    loss = _training(model, make_optimizer, [batch])(0)
    gradients = [parameter.grad for parameter in model.parameters()]
    return (loss.detach(), *(gradient for gradient in gradients if gradient is not None))
