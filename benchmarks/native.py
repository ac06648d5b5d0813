"""What the native library says of itself."""

from __future__ import annotations

import importlib
from types import ModuleType

import cnnkernels


def kernel_calls() -> dict[str, int]:
    """Native kernel calls so far, by entry point; empty without the native library."""
    library = _library()
    return {} if library is None else dict(library.kernel_calls())


def instruction_set() -> str:
    """The instruction set that the native kernels run on; "" without the native library."""
    library = _library()
    return "" if library is None else str(library.config()["isa"])


def cuda_config() -> str:
    """What the native library says of its CUDA kernels; "" where it has none."""
    library = _library()
    return "" if library is None else str(library.config().get("cuda") or "")


def _library() -> ModuleType | None:
    if not cnnkernels.is_native_available():
        return None
    return importlib.import_module("cnnkernels._C")
