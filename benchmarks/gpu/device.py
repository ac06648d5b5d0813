"""The device under test: a CUDA device, or the CPU as a dry run of all but events and graphs.

``python -m benchmarks.gpu.device`` prints its facts.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import shutil
import subprocess
import sys
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

import cnnkernels

from ..environment import describe_environment
from ..native import cuda_config

CUDA = "cuda"
CPU = "cpu"

# No call may read what the last one on the same input left in the second-level cache.
_CACHES_PER_ROTATION = 2
# Of small tensors so many copies would never fill a cache, in which they lie in a network, too.
_MOST_COPIES = 256
_MEMORY_SHARE = 8
# What the dry run assumes of the CPU.
_CPU_CACHE_BYTES = 2**16
_CPU_MEMORY_BYTES = 2**28


@dataclass(frozen=True)
class Device:
    """What a suite needs to know of the device.

    ``stream`` is the one stream on which everything runs: graphs cannot be captured on the default
    one, and a backward pass runs on the stream of its forward.
    """

    kind: str
    cache_bytes: int
    memory_bytes: int
    stream: torch.cuda.Stream | None

    @property
    def is_cuda(self) -> bool:
        """Whether it is a GPU, not the dry run."""
        return self.kind == CUDA

    def current(self) -> AbstractContextManager[object]:
        """Makes its stream the current one."""
        return contextlib.nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def synchronize(self) -> None:
        """Waits until it has done everything."""
        if self.is_cuda:
            torch.cuda.synchronize()

    def free(self) -> None:
        """Gives memory back that a case and its graphs held."""
        if self.is_cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def rotation(self, bytes_each: int) -> int:
        """How many copies of what a call touches take turns.

        Together they exceed twice the second-level cache, unless they are so small that hundreds
        would be needed, or so large that memory ends first.
        """
        wanted = math.ceil(_CACHES_PER_ROTATION * self.cache_bytes / max(1, bytes_each))
        fitting = self.memory_bytes // _MEMORY_SHARE // max(1, bytes_each)
        return max(1, min(wanted, fitting, _MOST_COPIES))


def open_device(kind: str) -> Device:
    """The first CUDA device, or the CPU for a dry run.

    Raises RuntimeError when there is no CUDA device that torch can use.
    """
    if kind == CPU:
        return Device(CPU, _CPU_CACHE_BYTES, _CPU_MEMORY_BYTES, None)
    if not torch.cuda.is_available():
        raise RuntimeError("torch sees no CUDA device; --device cpu is a dry run without one")
    properties = torch.cuda.get_device_properties(0)
    return Device(CUDA, properties.L2_cache_size, properties.total_memory, torch.cuda.Stream())


def describe_device(device: Device) -> dict[str, str | int]:
    """The facts that a measurement depends on, as JSON-ready values."""
    facts: dict[str, str | int] = {"date": datetime.date.today().isoformat(), "device": device.kind}
    if device.is_cuda:
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_mib": properties.total_memory >> 20,
            "l2_mib": properties.L2_cache_size >> 20,
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "cuda": str(torch.version.cuda),
            "cudnn": str(torch.backends.cudnn.version()),
        }
    library = {"backend": cnnkernels.get_backend(), "kernels": cuda_config()}
    return facts | describe_environment() | library


def _output(program: str, *arguments: str) -> str:
    """The first line that a program prints; "" where there is no such program."""
    path = shutil.which(program)
    if path is None:
        return ""
    finished = subprocess.run([path, *arguments], capture_output=True, text=True, check=False)
    return finished.stdout.strip().partition("\n")[0]


def main() -> int:
    """Print what can be known of the device; the exit status is 1 without one."""
    kind = CUDA if torch.cuda.is_available() else CPU
    facts = describe_device(open_device(kind))
    print(", ".join(f"{name} {fact}" for name, fact in facts.items() if fact != ""))
    return 0 if kind == CUDA else 1


if __name__ == "__main__":
    sys.exit(main())
