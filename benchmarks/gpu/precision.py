"""The precisions that convolutions are measured in, and torch's switches for them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Precision:
    """The dtype of all tensors, and whether convolutions may round float32 to TF32."""

    name: str
    dtype: torch.dtype
    allow_tf32: bool


FP32 = "fp32"
TF32 = "TF32"
FP16 = "fp16"
BF16 = "bf16"

PRECISIONS = {
    precision.name: precision
    for precision in (
        Precision(FP32, torch.float32, False),
        Precision(TF32, torch.float32, True),
        Precision(FP16, torch.float16, False),
        Precision(BF16, torch.bfloat16, False),
    )
}
"""By name: float32 proper, as torch computes convolutions by default, and the two of 16 bits."""


@contextlib.contextmanager
def cudnn_settings(precision: Precision) -> Iterator[None]:
    """Lets cuDNN round as the precision says, and choose its kernels by measuring them."""
    backend = torch.backends.cudnn
    before = backend.allow_tf32, backend.benchmark, backend.benchmark_limit
    backend.allow_tf32, backend.benchmark = precision.allow_tf32, True
    if backend.is_available():
        # Of its candidates cuDNN measures those that it expects to be the fastest.
        backend.benchmark_limit = 3
    try:
        yield
    finally:
        backend.allow_tf32, backend.benchmark = before[:2]
        if backend.is_available():
            backend.benchmark_limit = before[2]
