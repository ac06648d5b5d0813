"""The CUDA operators without a GPU: for CPU tensors, with kernels that the emulator runs.

What lies between Python and the CUDA kernels, arguments, memory formats, gradients and lists of
tensors, is compiled as for a GPU, but registered for the CPU. The tests of the operators then run
on it in a process of their own.
"""

from __future__ import annotations

import os
import re
import sys
import sysconfig
from pathlib import Path

import pytest
from compiling import ROOT, Unit, compile_units, find_compiler, link, run
from torch.utils import cpp_extension

import cnnkernels

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not cnnkernels.is_native_available(), reason="there is no compiled library"),
]

OPERATORS = ROOT / "csrc" / "ops"
KERNELS = ROOT / "csrc" / "kernels" / "cuda"
EMULATION = ROOT / "tests" / "cuda_kernels"
# No operator calls a convolution's kernels.
SOURCES = [
    *sorted(path for path in KERNELS.glob("*.cu") if not path.name.startswith("conv2d")),
    *sorted(KERNELS.glob("*.cpp")),
    *sorted((OPERATORS / "cuda").glob("*.cpp")),
    OPERATORS / "arguments.cpp",
    OPERATORS / "step_operators.cpp",
    EMULATION / "emulated_operators.cpp",
]
TESTS = ["test_max_pool2d.py", "test_gradient_step.py", "test_optim.py", "test_autograd.py"]
# The instruction sets are the CPU's, and so is the exception for an argmax of no window.
CHOSEN = "(baseline or not (avx2 or avx512 or amx)) and not (argmax and refused)"
LEAST_TESTS = 500


def build_library(folder: Path) -> Path:
    """Compile the operators with the emulator."""
    compiler = find_compiler()
    flags = [
        *("-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-w", "-DCNNK_EMULATE_CUDA"),
        *(f"-I{path}" for path in (ROOT / "csrc", EMULATION)),
        *(f"-isystem{path}" for path in cpp_extension.include_paths()),
    ]
    units = [Unit(source, flags) for source in SOURCES]
    objects = compile_units(compiler, units, folder)
    libraries = [
        *(f"-L{path}" for path in cpp_extension.library_paths()),
        *("-lc10", "-ltorch", "-ltorch_cpu", "-Wl,-z,defs"),
    ]
    suffix = sysconfig.get_config_var("SHLIB_SUFFIX")
    program = folder / f"emulated_operators{suffix}"
    return link([*compiler, "-shared"], [], [*objects, *map(Path, libraries)], program)


def test_operators_on_emulated_kernels(tmp_path: Path) -> None:
    library = build_library(tmp_path)
    python_path = [str(EMULATION), str(ROOT), os.environ.get("PYTHONPATH", "")]
    done = run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "emulated_operators"),
            *("-p", "no:cacheprovider", "-k", CHOSEN),
            *(ROOT / "tests" / name for name in TESTS),
        ],
        timeout=900,
        PYTHONPATH=os.pathsep.join(filter(None, python_path)),
        CNNKERNELS_EMULATED_OPERATORS=str(library),
        CNNKERNELS_BACKEND="native",
    )
    report = f"{done.stdout[-10_000:]}\n{done.stderr[-5_000:]}"
    assert done.returncode == 0, report
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None, report
    assert int(passed.group(1)) >= LEAST_TESTS, report
