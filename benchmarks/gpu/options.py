"""What the user asks the suites for."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Options:
    """The sizes of the cases.

    ``parameters`` are those of the optimizer's lists. ``batches`` is None for each pooling layer's
    own default, and ``batch`` is that of the convolutions. ``layers`` bounds the layers of each
    file (None: all), and ``shrink`` divides the channels and sides of each layer, for a dry run.
    """

    parameters: tuple[int, ...] = (1_000_000, 4_000_000, 25_000_000, 100_000_000)
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16)
    batches: tuple[int, ...] | None = None
    batch: int = 32
    layers: int | None = None
    shrink: int = 1
    seed: int = 0


QUICK = Options(parameters=(1_000_000, 25_000_000), layers=4)
"""A few rows of each kind."""

DRY_RUN = Options(parameters=(10_000,), batches=(2,), batch=1, layers=2, shrink=8)
"""As small as it gets, for the CPU."""
