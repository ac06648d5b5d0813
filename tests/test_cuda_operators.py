"""The CUDA operators without a GPU: for CPU tensors, with kernels that the emulator runs.

What lies between Python and the CUDA kernels, arguments, memory formats, gradients and lists of
tensors, is compiled as for a GPU, but registered for the CPU. The tests of the operators then run
on it in a process of their own.
"""

from __future__ import annotations

import concurrent.futures
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
SOURCES = [
    *sorted(KERNELS.glob("*.cu")),
    *sorted(KERNELS.glob("*.cpp")),
    *sorted((OPERATORS / "cuda").glob("*.cpp")),
    OPERATORS / "arguments.cpp",
    OPERATORS / "operators.cpp",
    OPERATORS / "step_operators.cpp",
    EMULATION / "emulated_operators.cpp",
]
# The instruction sets are the CPU's, and so is the exception for an argmax of no window.
CHOSEN = "(baseline or not (avx2 or avx512 or amx)) and not (argmax and refused)"
# What is small enough for an emulator.
CONVOLUTIONS = (
    "gradients_asked_for or any_strides or non_finite or infinite_gradient or other_dtypes"
    " or clipped_output or errors_name"
)
BLOCKS = (
    "any_shape or leave_to_torch or zero_output or nan_and_infinite or infinite_gradients"
    " or gradient_alone"
)
RUNS = {
    # Policy: the files, the tests chosen of them, and the least number of these.
    "native": [
        (
            ["test_max_pool2d.py", "test_gradient_step.py", "test_optim.py", "test_autograd.py"],
            CHOSEN,
            500,
        ),
        (["test_functional.py"], "(conv or bad or kernels_run or autocast) and not torch-", 200),
        (["test_conv2d.py", "test_conv2d_relu.py"], f"{CHOSEN} and ({CONVOLUTIONS})", 10),
        (["test_block.py"], f"{CHOSEN} and ({BLOCKS})", 8),
    ],
    **{
        policy: [
            (["test_functional.py"], "test_conv2d and not formats and not memory_format1", 60),
            (["test_conv2d.py"], f"{CHOSEN} and ({CONVOLUTIONS})", 8),
            (["test_block.py"], f"{CHOSEN} and ({BLOCKS})", 8),
        ]
        for policy in ("direct", "implicit_gemm")
    },
    "depthwise": [(["test_conv2d.py"], f"{CHOSEN} and ({CONVOLUTIONS})", 8)],
}


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


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The operators with the emulator."""
    return build_library(tmp_path_factory.mktemp("operators"))


Run = tuple[str, list[str], str, int]
ALL_RUNS: list[Run] = [(policy, *one) for policy, runs in RUNS.items() for one in runs]


def run_tests(library: Path, policy: str, files: list[str], chosen: str) -> str:
    """Run tests on the library in a process of its own, and return what it prints."""
    python_path = [str(EMULATION), str(ROOT), os.environ.get("PYTHONPATH", "")]
    done = run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "emulated_operators"),
            *("-p", "no:cacheprovider", "-k", chosen),
            *(ROOT / "tests" / name for name in files),
        ],
        timeout=900,
        PYTHONPATH=os.pathsep.join(filter(None, python_path)),
        CNNKERNELS_EMULATED_OPERATORS=str(library),
        CNNKERNELS_BACKEND="native",
        CNNKERNELS_CUDA_CONV2D=policy,
    )
    return f"exit status {done.returncode}\n{done.stdout[-10_000:]}\n{done.stderr[-5_000:]}"


@pytest.fixture(scope="module")
def reports(library: Path) -> list[str]:
    """What all runs print; two of them run at once, since the emulator has one thread."""
    with concurrent.futures.ThreadPoolExecutor(max_workers=2) as pool:
        return list(pool.map(lambda one: run_tests(library, *one[:3]), ALL_RUNS))


@pytest.mark.parametrize(
    "number", range(len(ALL_RUNS)), ids=[f"{policy}-{files[0]}" for policy, files, *_ in ALL_RUNS]
)
def test_operators_on_emulated_kernels(reports: list[str], number: int) -> None:
    report, least = reports[number], ALL_RUNS[number][3]
    assert report.startswith("exit status 0\n"), report
    passed = re.search(r"(\d+) passed", report)
    assert passed is not None, report
    assert int(passed.group(1)) >= least, report
