"""Decides whether the CUDA kernels can be built here, and for which architectures.

``CNNKERNELS_CUDA=0`` leaves them out; ``CNNKERNELS_CUDA=require`` makes their absence an error.
``TORCH_CUDA_ARCH_LIST`` names the architectures, as for every CUDA extension of torch.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CUDA_MODE = os.environ.get("CNNKERNELS_CUDA", "auto").strip().lower()

# What a release is built for. Code for an architecture runs on later minor versions of its major
# one, and PTX for the last on all that come; but what is for 9.0a, where alone there are warpgroup
# products, runs on devices of 9.0 and no others.
RELEASE_ARCHITECTURES = ("7.5", "8.0", "8.6", "8.9", "9.0a", "10.0", "12.0")
# Kernels take more than 4 KiB of arguments, which this release was the first to allow.
OLDEST_TOOLKIT = (12, 1)
NVCC_FLAGS = ("-O3", "--expt-relaxed-constexpr")


class CudaUnavailableError(Exception):
    """The CUDA kernels cannot be built; the message is the reason, as a sentence for the user."""


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit that fits torch: its release, and what to build for, as torch writes it."""

    release: str
    architectures: str


def _output(nvcc: Path, option: str) -> str:
    try:
        return subprocess.run(
            [str(nvcc), option], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise CudaUnavailableError(f"{nvcc} does not run ({error}).") from error


def release_architectures(supported: str) -> str:
    """The architectures of a release that an nvcc supports.

    Args:
        supported: what ``nvcc --list-gpu-arch`` prints: a line ``compute_90`` for each.
    """
    known = set(re.findall(r"compute_(\d+)", supported))
    chosen = [
        name for name in RELEASE_ARCHITECTURES if name.replace(".", "").removesuffix("a") in known
    ]
    last = next((name for name in reversed(chosen) if not name.endswith("a")), None)
    return ";".join(f"{name}+PTX" if name == last else name for name in chosen)


def _check_that_it_compiles(nvcc: Path) -> None:
    """A host compiler that nvcc does not take, say, shows in the smallest file."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cu")
        source.write_text("__global__ void probe() {}\n", encoding="ascii")
        command = [str(nvcc), "-c", str(source), "-o", str(Path(folder, "probe.o"))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().partition("\n")[0]
        raise CudaUnavailableError(f"{nvcc} does not compile: {said or 'it says nothing'}")


def find_toolkit(torch: Any) -> Toolkit:
    """Return the toolkit that builds kernels for this torch.

    Args:
        torch: the module, with ``torch.utils.cpp_extension`` loaded.

    Raises:
        CudaUnavailableError: there is none, or it does not fit.
    """
    if CUDA_MODE == "0":
        raise CudaUnavailableError("CNNKERNELS_CUDA=0 was set when it was installed.")
    wanted = torch.version.cuda
    if wanted is None:
        raise CudaUnavailableError(f"torch {torch.__version__} is a build without CUDA.")
    home = torch.utils.cpp_extension.CUDA_HOME
    nvcc = Path(home or "", "bin", "nvcc")
    if home is None or not nvcc.exists():
        raise CudaUnavailableError(
            f"There is no nvcc{f' in {home}' if home else ''}: install the CUDA {wanted} toolkit, "
            "or set CUDA_HOME to where it is."
        )
    printed = re.search(r"release (\d+)\.(\d+)", _output(nvcc, "--version"))
    if printed is None:
        raise CudaUnavailableError(f"{nvcc} does not tell its release.")
    release = int(printed[1]), int(printed[2])
    if release[0] != int(wanted.split(".")[0]):
        raise CudaUnavailableError(
            f"torch {torch.__version__} is built with CUDA {wanted}, but {nvcc} is of CUDA "
            f"{printed[1]}.{printed[2]}: both must be of the same major version."
        )
    if release < OLDEST_TOOLKIT:
        raise CudaUnavailableError(
            f"{nvcc} is of CUDA {printed[1]}.{printed[2]}; the kernels need "
            f"{OLDEST_TOOLKIT[0]}.{OLDEST_TOOLKIT[1]} or later."
        )
    architectures = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if not architectures:
        architectures = release_architectures(_output(nvcc, "--list-gpu-arch"))
    if not architectures:
        raise CudaUnavailableError(f"{nvcc} knows none of {', '.join(RELEASE_ARCHITECTURES)}.")
    _check_that_it_compiles(nvcc)
    return Toolkit(f"{printed[1]}.{printed[2]}", architectures)
