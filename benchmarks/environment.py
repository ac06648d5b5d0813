"""The facts that a measurement depends on, and nothing that names the machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import torch

from .native import instruction_set


def describe_environment() -> dict[str, str | int]:
    """CPU, instruction sets and versions, as JSON-ready values."""
    return {
        "cpu": _cpu_model(),
        "cpus": os.cpu_count() or 1,
        "isa": instruction_set(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "numpy": importlib.metadata.version("numpy"),
        "system": platform.system(),
    }


def _cpu_model() -> str:
    """The model name that Linux reports, or what the platform knows elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
