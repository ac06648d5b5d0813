"""The layers of ``shapes/*.csv``."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SHAPES = Path(__file__).parent / "shapes"

CONV2D_FILES = ("tutorial", "mobilenet_v2", "resnet50_v1_5", "small_cnn", "vgg16")
"""Files of convolution layers. ``max_pool.csv`` holds the pooling layers."""

TUTORIAL_PREFIXES = ("ch1_", "ch2_")

# A network's batch: 64 images of 224x224 would measure the machine's memory, and take hours.
_DEFAULT_BATCHES = (1, 8)
_DEFAULT_TUTORIAL_BATCHES = (1, 64)


@dataclass(frozen=True)
class Conv2dLayer:
    """A convolution layer; ``count`` is how often the network has it."""

    name: str
    in_channels: int
    height: int
    width: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    groups: int
    count: int
    bias: bool

    @property
    def reads_image(self) -> bool:
        """Whether the input is a grey or RGB image, for which training asks no gradient."""
        return self.in_channels in (1, 3)


@dataclass(frozen=True)
class MaxPool2dLayer:
    """A max pooling layer."""

    name: str
    channels: int
    height: int
    width: int
    kernel_size: int
    stride: int
    padding: int


def read_conv2d_layers(file: str) -> list[Conv2dLayer]:
    """The layers of a file of :data:`CONV2D_FILES`, in its order."""
    return [
        Conv2dLayer(
            name=row["layer"],
            in_channels=int(row["in_channels"]),
            height=int(row["height"]),
            width=int(row["width"]),
            out_channels=int(row["out_channels"]),
            kernel_size=(int(row["kernel_h"]), int(row["kernel_w"])),
            stride=(int(row["stride_h"]), int(row["stride_w"])),
            padding=(int(row["pad_h"]), int(row["pad_w"])),
            groups=int(row["groups"]),
            count=int(row["count"]),
            bias=_has_bias(file, row["layer"]),
        )
        for row in _rows(file)
    ]


def read_max_pool2d_layers() -> list[MaxPool2dLayer]:
    """The layers of ``max_pool.csv``, in its order."""
    return [
        MaxPool2dLayer(
            name=row["layer"],
            channels=int(row["channels"]),
            height=int(row["height"]),
            width=int(row["width"]),
            kernel_size=int(row["kernel"]),
            stride=int(row["stride"]),
            padding=int(row["padding"]),
        )
        for row in _rows("max_pool")
    ]


def is_tutorial(layer: str) -> bool:
    """Whether a layer of that name is one of the tutorial's."""
    return layer.startswith(TUTORIAL_PREFIXES)


def batches_for(layer: str, asked: tuple[int, ...] | None) -> tuple[int, ...]:
    """The batches to measure a layer with: those asked for, or the default of its network."""
    if asked is not None:
        return asked
    return _DEFAULT_TUTORIAL_BATCHES if is_tutorial(layer) else _DEFAULT_BATCHES


def _has_bias(file: str, layer: str) -> bool:
    # Batch norm replaces the bias in ResNet and MobileNet, and the chapters' examples of a single
    # convolution switch it off.
    return file in ("small_cnn", "vgg16") or "_net_" in layer


def _rows(file: str) -> Iterator[dict[str, str]]:
    with (SHAPES / f"{file}.csv").open(newline="", encoding="utf-8") as lines:
        yield from csv.DictReader(lines)
