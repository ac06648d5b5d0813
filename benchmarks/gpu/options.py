"""What the user asks the suites for."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Options:
    """The sizes of the cases.

    ``parameters`` are those of the optimizer's lists. ``batches`` is None for each pooling layer's
    own default; ``batch`` is that of the convolutions and networks, and ``small_batch`` that of the
    small ones. ``layers`` bounds the pooling layers, the convolutions of each kind and the blocks
    (None: by the suite), and ``full`` asks for all of them in all precisions. ``inductor`` asks for
    torch.compile as a peer. ``shrink`` divides channels and sides, for a dry run.
    """

    parameters: tuple[int, ...] = (1_000_000, 4_000_000, 25_000_000, 100_000_000)
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16)
    batches: tuple[int, ...] | None = None
    batch: int = 32
    small_batch: int = 64
    layers: int | None = None
    full: bool = False
    inductor: bool = True
    shrink: int = 1
    seed: int = 0


QUICK = Options(parameters=(1_000_000, 25_000_000), layers=2)
"""A few rows of each kind."""

DRY_RUN = Options(
    parameters=(10_000,),
    batches=(2,),
    batch=4,
    small_batch=2,
    layers=1,
    inductor=False,
    shrink=8,
)
"""As small as it gets, for the CPU."""
