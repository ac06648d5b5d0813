"""A pytest plugin: the CUDA operators, with emulated kernels, in place of the CPU's.

``CNNKERNELS_EMULATED_OPERATORS`` is the library that ``emulated_operators.cpp`` is compiled to.
"""

from __future__ import annotations

import os

import torch

from cnnkernels import _native

OPERATORS = (
    *("conv2d", "conv2d_relu", "conv2d_backward"),
    *("conv2d_relu_max_pool2d", "conv2d_relu_max_pool2d_backward"),
    *("max_pool2d", "max_pool2d_backward", "max_pool2d_gather"),
    *("gd_step_", "sgd_step_"),
)


def pytest_configure() -> None:
    torch.ops.load_library(os.environ["CNNKERNELS_EMULATED_OPERATORS"])
    library = _native.library
    assert library is not None
    others = library.kernel_calls

    def kernel_calls() -> dict[str, int]:
        """The library's counters; of what is emulated, those of the emulated kernels alone."""
        emulated = torch.ops.cnnkernels_emulated
        return {
            **others(),
            **{name: getattr(emulated, f"{name}_calls")() for name in OPERATORS},
        }

    library.kernel_calls = kernel_calls
