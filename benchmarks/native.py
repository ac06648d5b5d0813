"""What the native library says of itself."""

from __future__ import annotations

import importlib
from types import ModuleType

import cnnkernels
from cnnkernels import _native


def kernel_calls() -> dict[str, int]:
    """Native kernel calls so far, by entry point; empty without the native library."""
    library = _library()
    return {} if library is None else dict(library.kernel_calls())


def instruction_set() -> str:
    """The instruction set that the native kernels run on; "" without the native library."""
    library = _library()
    return "" if library is None else str(library.config()["isa"])


def cuda_config() -> str:
    """The CUDA release and the architectures of the native library's kernels; "" without any."""
    library = _library()
    if library is None or not library.config()["cuda"]:
        return ""
    built = _native.build_info["cuda"]
    return f"{built['release']}, for {built['architectures'].replace(';', ', ')}"


def _library() -> ModuleType | None:
    if not cnnkernels.is_native_available():
        return None
    return importlib.import_module("cnnkernels._C")
