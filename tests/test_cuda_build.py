"""Which toolkits build the CUDA kernels, for which architectures, and why not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from compiling import ROOT

sys.path.insert(0, str(ROOT / "build_backend"))
import cuda_build

NVCC = """#!/bin/sh
case "$1" in
  --version) echo "Cuda compilation tools, release {release}, V{release}.88" ;;
  --list-gpu-arch) printf 'compute_%s\\n' {architectures} ;;
esac
"""
ALL = "75 80 86 87 89 90 100 103 110 120 121"


def make_home(
    folder: Path, release: str = "13.0", architectures: str = ALL, text: str = NVCC
) -> Path:
    """A toolkit's folder, whose nvcc can only tell what it is."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(text.format(release=release, architectures=architectures), encoding="utf-8")
    nvcc.chmod(0o755)
    return folder


def make_torch(cuda: str | None, home: Path | None) -> SimpleNamespace:
    """What the build asks of the module torch."""
    extension = SimpleNamespace(CUDA_HOME=None if home is None else str(home))
    return SimpleNamespace(
        __version__="2.13.0",
        version=SimpleNamespace(cuda=cuda),
        utils=SimpleNamespace(cpp_extension=extension),
    )


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_build, "CUDA_MODE", "auto")
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)


def test_a_release_is_for_all_its_architectures(tmp_path: Path) -> None:
    toolkit = cuda_build.find_toolkit(make_torch("13.0", make_home(tmp_path)))
    assert toolkit == cuda_build.Toolkit("13.0", "7.5;8.0;8.6;8.9;9.0a;10.0;12.0+PTX")


def test_an_older_nvcc_does_not_know_the_last(tmp_path: Path) -> None:
    home = make_home(tmp_path, "12.6", "50 60 70 75 80 86 87 89 90")
    toolkit = cuda_build.find_toolkit(make_torch("12.8", home))
    assert toolkit == cuda_build.Toolkit("12.6", "7.5;8.0;8.6;8.9+PTX;9.0a")


def test_the_user_names_architectures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    toolkit = cuda_build.find_toolkit(make_torch("13.0", make_home(tmp_path)))
    assert toolkit.architectures == "9.0"


def test_reasons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def reason(cuda: str | None, home: Path | None) -> str:
        with pytest.raises(cuda_build.CudaUnavailableError) as error:
            cuda_build.find_toolkit(make_torch(cuda, home))
        return str(error.value)

    def folder(name: str) -> Path:
        (tmp_path / name).mkdir()
        return tmp_path / name

    assert reason(None, None) == "torch 2.13.0 is a build without CUDA."
    assert reason("13.0", None).startswith("There is no nvcc: install the CUDA 13.0 toolkit")
    empty = folder("empty")
    assert reason("13.0", empty).startswith(f"There is no nvcc in {empty}: ")
    other = reason("13.0", make_home(folder("other"), "12.8"))
    assert other.startswith("torch 2.13.0 is built with CUDA 13.0, but ")
    assert other.endswith(" is of CUDA 12.8: both must be of the same major version.")
    assert "need 12.1 or later" in reason("12.6", make_home(folder("old"), "12.0"))
    assert "knows none of 7.5" in reason("13.0", make_home(folder("none"), "13.0", "50 60"))
    assert "does not run" in reason("13.0", make_home(folder("broken"), text="#!/bin/false\n"))
    refusing = NVCC.replace("esac", "  *) echo 'unsupported GNU version!' >&2; exit 1 ;;\nesac")
    reason_refusing = reason("13.0", make_home(folder("refusing"), text=refusing))
    assert reason_refusing.endswith("nvcc does not compile: unsupported GNU version!")
    silent = make_home(folder("silent"), text="#!/bin/true\n")
    assert "does not tell its release" in reason("13.0", silent)
    monkeypatch.setattr(cuda_build, "CUDA_MODE", "0")
    assert "CNNKERNELS_CUDA=0" in reason("13.0", make_home(folder("unwanted")))


def test_a_second_runtime_is_refused(tmp_path: Path) -> None:
    """A compiler that links the C++ runtime into a library makes one that crashes beside torch."""
    static = tmp_path / "static-g++"
    static.write_text('#!/bin/sh\nexec g++ -static-libstdc++ "$@"\n', encoding="ascii")
    static.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env={**os.environ, "CXX": str(static), "CNNKERNELS_CUDA": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"compiles cnnkernels, since {static} would link a C++ runtime" in done.stderr


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("require", "error: cnnkernels's CUDA kernels cannot be built. "),
        ("yes", "CNNKERNELS_CUDA must be 0, 1 or require, not 'yes'."),
    ],
)
def test_setup_refuses(mode: str, message: str) -> None:
    """Without nvcc ``require`` is an error, and so is any other word, before anything is built."""
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "CNNKERNELS_CUDA": mode, "CUDA_HOME": "/nonexistent"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert message in done.stderr
