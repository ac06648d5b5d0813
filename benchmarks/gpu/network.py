"""The ``network`` suite: the tutorial's Net and ResNet-18, converted whole.

``cnnkernels.replace_modules`` against the same network with eager torch, for which cuDNN chooses by
measuring. A training step is forward, cross entropy, backward and SGD with momentum, by
``cnnkernels.optim.SGD`` against ``torch.optim.SGD(fused=True)``; the device's time is that of the
step in a CUDA graph, and the wall time that of the eager program. Under autocast the loss is scaled
by a constant: a ``GradScaler`` looks at its result on the host, which no graph can hold.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cnnkernels

from ..accuracy import relative_error
from ..operators import CHANNELS_LAST, LAYOUTS, NCHW, to_layout
from ..optimizer import MOMENTUM
from ..resnet18 import ResNet18
from ..training_step import LEARNING_RATE, Batch, Net
from .device import Device
from .operation import RATIO
from .options import Options
from .precision import FP32, PRECISIONS, TF32, Precision, cudnn_settings
from .rows import OURS, TORCH, Case, Contender, Pairs, Workload

SUITE = "network"
TRAINING = "training step"
INFERENCE = "inference"

AUTOCAST = "fp16 autocast"
LOSS = "loss"
APART = "apart"
"""The figures of a row: the loss of each side, and how far ours is from torch's logits."""

_ROTATION = 2
# The steps after which logits are compared, of so many images, at a rate that moves the weights.
_JUDGED_STEPS = 3
_JUDGED_IMAGES = 4
_JUDGED_RATE = 1e-3
_AUTOCAST_SCALE = 1024.0


@dataclass(frozen=True)
class Network:
    """A network, and the images that it takes."""

    name: str
    make: Callable[[], nn.Module]
    image: tuple[int, int, int]
    classes: int
    layouts: tuple[str, ...]


def _networks(options: Options) -> dict[str, Network]:
    # Smaller images leave the last batch norm a single pixel.
    width, side = 64 // options.shrink, max(64, 224 // options.shrink)
    return {
        "net": Network("ch1_net", Net, (1, 32, 32), 10, (NCHW,)),  # its view admits no other
        "resnet18": Network(
            "resnet18",
            functools.partial(ResNet18, width=width),
            (3, side, side),
            1000,
            tuple(LAYOUTS),
        ),
    }


def cases(options: Options, device: Device) -> list[Case]:
    """The Net's training step at two batches, and ResNet-18's and its inference by precision."""
    networks = _networks(options)
    net, resnet = networks["net"], networks["resnet18"]
    planned = [(net, batch, TRAINING, FP32) for batch in (1, options.small_batch)]
    planned += [
        (resnet, options.batch, mode, precision)
        for precision in (AUTOCAST, FP32, TF32)
        for mode in (TRAINING, INFERENCE)
    ]
    return [
        Case(
            suite=SUITE,
            name=network.name,
            batch=batch,
            dtype=precision,
            mode=mode,
            prepare=functools.partial(
                _workload, network, batch, mode, precision, device, options.seed
            ),
        )
        for network, batch, mode, precision in planned
    ]


@dataclass(frozen=True)
class _Run:
    """How a network is run: its precision, whether it learns, and where."""

    network: Network
    mode: str
    precision: str
    device: Device
    seed: int

    @property
    def autocasts(self) -> bool:
        return self.precision == AUTOCAST

    def context(self) -> AbstractContextManager[object]:
        plain: Precision = PRECISIONS[FP32 if self.autocasts else self.precision]
        return _entered(plain, self.mode)

    def model(self, side: str, layout: str, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The network with the initial weights of the seed; torch's generator stays as it was."""
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(self.seed)
            model = self.network.make()
        if side == OURS:
            model = cnnkernels.replace_modules(model)
        model = model.to(self.device.kind, dtype).train(self.mode == TRAINING)
        if layout == CHANNELS_LAST:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return model

    def logits(self, model: nn.Module, images: Tensor) -> Tensor:
        enabled = self.autocasts and images.dtype != torch.float64
        with torch.autocast(self.device.kind, torch.float16, enabled=enabled):
            return model(images)

    def step(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch
    ) -> tuple[Tensor, Tensor]:
        """A training step as a user writes it; returns the logits and the loss before it."""
        images, labels = batch
        optimizer.zero_grad()
        logits = self.logits(model, images)
        loss = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels)
        (loss * self.scale if self.autocasts else loss).backward()
        optimizer.step()
        return logits, loss

    @property
    def scale(self) -> float:
        return _AUTOCAST_SCALE if self.autocasts else 1.0

    def optimizer(
        self, side: str, model: nn.Module, rate: float, fused: bool = True
    ) -> torch.optim.Optimizer:
        parameters = list(model.parameters())
        rate /= self.scale
        if side == OURS:
            return cnnkernels.optim.SGD(parameters, rate, momentum=MOMENTUM)
        return torch.optim.SGD(parameters, rate, momentum=MOMENTUM, fused=fused)


@contextlib.contextmanager
def _entered(precision: Precision, mode: str) -> Iterator[None]:
    with cudnn_settings(precision), torch.set_grad_enabled(mode == TRAINING):
        yield


def _workload(
    network: Network, batch: int, mode: str, precision: str, device: Device, seed: int
) -> Workload:
    run = _Run(network, mode, precision, device, seed)
    generator = torch.Generator(device.kind).manual_seed(seed)
    batches = [
        (
            torch.randn((batch, *network.image), generator=generator, device=device.kind),
            torch.randint(network.classes, (batch,), generator=generator, device=device.kind),
        )
        for _ in range(_ROTATION)
    ]
    contenders = [
        Contender(
            label=f"{side} {layout}",
            side=side,
            layout=layout,
            call=_call(run, side, layout, batches),
            context=run.context,
        )
        for side in (TORCH, OURS)
        for layout in network.layouts
    ]
    judged = functools.cache(functools.partial(_judged, run, batches[0]))
    return Workload(
        contenders=tuple(contenders),
        rotation=_ROTATION,
        # The images alone; the activations are many times as large.
        bytes_each=4 * batches[0][0].numel(),
        errors=lambda: judged()[0],
        figures=lambda: judged()[1],
        pairs=functools.partial(_pairs, network.layouts),
    )


def _call(run: _Run, side: str, layout: str, batches: list[Batch]) -> Callable[[int], Tensor]:
    model = run.model(side, layout)
    converted = [(to_layout(images, layout), labels) for images, labels in batches]
    if run.mode == INFERENCE:
        return lambda index: run.logits(model, converted[index % _ROTATION][0])
    optimizer = run.optimizer(side, model, LEARNING_RATE)
    return lambda index: run.step(model, optimizer, converted[index % _ROTATION])[1]


def _judged(run: _Run, batch: Batch) -> tuple[dict[str, float], dict[str, float]]:
    """The distance of the logits from float64, and the figures, of fresh networks.

    In training they are those after some steps on a few images.
    """
    images, labels = (tensor[:_JUDGED_IMAGES] for tensor in batch)

    def outcome(side: str, layout: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        with run.context():
            model = run.model(side, layout, dtype)
            few = to_layout(images.to(dtype), layout), labels
            if run.mode == INFERENCE:
                logits = run.logits(model, few[0])
                return logits, F.cross_entropy(logits.double(), labels)
            # torch's fused step on the CPU leaves some elements of some dtypes out.
            fused = run.device.is_cuda
            optimizer = run.optimizer(side, model, _JUDGED_RATE, fused)
            for _ in range(_JUDGED_STEPS):
                logits, loss = run.step(model, optimizer, few)
            return logits.detach(), loss.detach()

    truth, _ = outcome(TORCH, NCHW, torch.float64)
    outcomes = {
        (side, layout): outcome(side, layout, torch.float32)
        for side in (OURS, TORCH)
        for layout in run.network.layouts
    }
    errors = {
        f"{side} {layout}": relative_error([logits], [truth])
        for (side, layout), (logits, _) in outcomes.items()
    }
    figures = {
        f"{LOSS} {side} {layout}": float(loss) for (side, layout), (_, loss) in outcomes.items()
    }
    for layout in run.network.layouts:
        ours, torchs = (outcomes[side, layout][0] for side in (OURS, TORCH))
        figures[f"{APART} {layout}"] = relative_error([ours], [torchs.double()])
    return errors, figures


def _pairs(layouts: tuple[str, ...], medians: Mapping[str, float]) -> Pairs:
    def fastest(side: str) -> str:
        return min((f"{side} {layout}" for layout in layouts), key=lambda label: medians[label])

    pairs = {layout: (f"{OURS} {layout}", f"{TORCH} {layout}") for layout in layouts}
    return pairs | {RATIO: (fastest(OURS), fastest(TORCH))}
