"""Builds the package: the compiled library where that is possible, pure Python where it is not.

``CNNKERNELS_BUILD=0`` leaves the library out; ``CNNKERNELS_BUILD=require`` makes a failed build
an error. Otherwise a build that cannot be done is reported, its reason is recorded in
``cnnkernels/_build_info.json``, and the package runs on its PyTorch fallback. Where torch has CUDA
the library has CUDA kernels too, if these can be built: ``build_backend/cuda_build.py``.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from setuptools import find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

# Not every way to build has it on the path.
sys.path.insert(0, str(Path(__file__).resolve().parent / "build_backend"))
import cuda_build

PACKAGE = "cnnkernels"
SUPPORTED_TORCH = "torch>=2.11,<2.15"
BUILD_MODE = os.environ.get("CNNKERNELS_BUILD", "auto").strip().lower()
# One compiler process on torch's headers, and one of nvcc, takes up to this much.
BYTES_PER_JOB = 2 << 30
BYTES_PER_CUDA_JOB = 4 << 30


class BuildImpossibleError(Exception):
    """The library cannot be built here; the message is the reason, as a sentence for the user."""


def links_shared_runtime(command: str) -> bool:
    """Whether a compiler's libraries use the C++ runtime that is there, as torch's do.

    Two runtimes in one process crash, at the latest where an error's message prints a number.
    """
    if sys.platform != "linux":
        return True
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "probe.cpp"), Path(folder, "probe.so")
        source.write_text(
            "#include <sstream>\n"
            "std::string text(int n) { std::ostringstream s; s << n; return s.str(); }\n",
            encoding="ascii",
        )
        arguments = ["-shared", "-fPIC", str(source), "-o", str(library)]
        done = subprocess.run([*shlex.split(command), *arguments], capture_output=True, check=False)
        if done.returncode != 0:
            return True  # the build will tell what is wrong
        needed = library.read_bytes()
    return b"libstdc++.so" in needed or b"libc++.so" in needed


def find_compiler() -> str:
    """Return the C++ compiler's command: ``CXX``, or the first usual name that will do."""
    chosen = os.environ.get("CXX", "").strip()
    usual = ["c++", "g++", "clang++"]

    def exists(command: str) -> bool:
        return shutil.which(shlex.split(command)[0]) is not None

    if not any(map(exists, [chosen] if chosen else usual)):
        wanted = f"CXX={chosen}" if chosen else "c++, g++ or clang++"
        raise BuildImpossibleError(f"There is no C++ compiler: {wanted} was not found.")
    refused: list[str] = []
    for command in filter(exists, [chosen, *usual] if chosen else usual):
        if links_shared_runtime(command):
            if refused:
                print(
                    f"note: {command} compiles {PACKAGE}, since {', '.join(refused)} would link a "
                    "C++ runtime of its own into it, beside torch's.",
                    file=sys.stderr,
                )
            return command
        refused.append(command)
    raise BuildImpossibleError(
        f"{', '.join(refused)} would link a C++ runtime of its own into the library, beside "
        "torch's: CXX must name a compiler that links the shared one."
    )


def check_python_headers() -> None:
    """Debian and Fedora ship Python.h apart from Python."""
    include = sysconfig.get_paths()["include"]
    if not Path(include, "Python.h").exists():
        raise BuildImpossibleError(
            f"Python.h is not in {include}: install Python's development files "
            "(python3-dev on Debian and Ubuntu, python3-devel on Fedora)."
        )


def import_torch() -> Any:
    """Return the module torch, with its extension builder loaded."""
    try:
        import torch.utils.cpp_extension
    except Exception as error:  # a broken torch raises more than ImportError
        raise BuildImpossibleError(
            f"torch could not be imported by {sys.executable} ({type(error).__name__}: {error}). "
            f"Install {SUPPORTED_TORCH} first, then build."
        ) from error
    return torch


def put_ninja_on_path() -> None:
    """Let torch find the ninja of an environment that is used without being activated."""
    if shutil.which("ninja") is None:
        scripts = sysconfig.get_path("scripts")
        os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), scripts])


def free_memory() -> int | None:
    """Bytes that new processes can have, where that can be told."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        available = re.search(r"^MemAvailable: *(\d+) kB$", text, re.MULTILINE)
        if available is not None:
            return int(available[1]) << 10
    except OSError:
        pass
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def limit_jobs(bytes_per_job: int) -> None:
    """Bound the number of compilers by cores and memory; torch's default looks at cores alone."""
    if hasattr(os, "sched_getaffinity"):
        jobs = len(os.sched_getaffinity(0))
    else:
        jobs = os.cpu_count() or 1
    memory = free_memory()
    if memory is not None:
        jobs = min(jobs, memory // bytes_per_job)
    if not os.environ.get("MAX_JOBS", "").strip().isdigit():
        os.environ["MAX_JOBS"] = str(max(1, jobs))


def make_extension(torch: Any, toolkit: cuda_build.Toolkit | None) -> Any:
    """Describe the library ``cnnkernels._C`` to setuptools, with CUDA kernels or without."""
    sources = [*Path("csrc/ops").glob("*.cpp"), *Path("csrc/kernels").rglob("*.cpp")]
    headers = [path for suffix in ("h", "inl", "cuh") for path in Path("csrc").rglob(f"*.{suffix}")]
    # No -std: torch adds the one that its headers need, and that differs between releases.
    # No -march: the kernels choose their instruction set when they run.
    flags = "-O2 -fno-math-errno -fno-trapping-math -ffp-contract=fast -fvisibility=hidden -g0"
    compile_args = {"cxx": flags.split()}
    if torch.backends.openmp.is_available() and sys.platform == "linux":
        # at::parallel_for is a template: compiled without OpenMP it is serial. OpenMP's runtime
        # is not linked, since the one that torch has loaded (under a name of torch's own in some
        # releases) must serve, or there would be two pools of threads.
        compile_args["cxx"].append("-fopenmp")
    extension = torch.utils.cpp_extension.CppExtension
    if toolkit is not None:
        extension = torch.utils.cpp_extension.CUDAExtension
        sources += [*Path("csrc/ops/cuda").glob("*.cpp"), *Path("csrc/kernels").rglob("*.cu")]
        compile_args["nvcc"] = [*cuda_build.NVCC_FLAGS, "-Xcompiler", "-fvisibility=hidden"]
    return extension(
        f"{PACKAGE}._C",
        sorted(path.as_posix() for path in sources),
        include_dirs=[str(Path("csrc").resolve())],  # ninja runs in another folder
        depends=sorted(path.as_posix() for path in headers),
        extra_compile_args=compile_args,
    )


def warn(reason: str) -> None:
    """Tell the user that there will be no library."""
    print(
        f"warning: {PACKAGE} is installed without its compiled library and runs on PyTorch alone. "
        f"{reason} (CNNKERNELS_BUILD=require makes this an error.)",
        file=sys.stderr,
    )


def warn_of_no_cuda(reason: str) -> None:
    """Tell the user of a torch with CUDA that the library will have no kernels for it."""
    print(
        f"warning: {PACKAGE} is installed without CUDA kernels and leaves CUDA tensors to torch. "
        f"{reason} (CNNKERNELS_CUDA=require makes this an error.)",
        file=sys.stderr,
    )


def write_build_info(package_dir: Path, **info: Any) -> None:
    """Replace ``_build_info.json`` in one step, so that a reader never sees half of it."""
    package_dir.mkdir(parents=True, exist_ok=True)
    scratch = package_dir / "_build_info.json.tmp"
    scratch.write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
    scratch.replace(package_dir / "_build_info.json")


def record_no_library(package_dir: Path, reason: str) -> None:
    """Record why there is no library, and leave none of an earlier build behind."""
    write_build_info(package_dir, built=False, reason=reason)
    for suffix in ("so", "pyd", "dylib"):
        for library in package_dir.glob(f"_C.*{suffix}"):
            library.unlink()


def compiler_version(command: str) -> str:
    """Return the first line of ``CXX --version``, or the command where there is none."""
    try:
        output = subprocess.run(
            [*shlex.split(command), "--version"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return command
    return output.splitlines()[0].strip() if output else command


def failure(error: Exception) -> str:
    """Return the reason that a failed build is."""
    return (
        f"The build failed ({type(error).__name__}: {error}); its log "
        "(pip install --verbose) has the compiler's messages."
    )


class BuildPython(build_py):
    """Copies the Python files; records the reason where no library is going to be built."""

    reason_for_no_library: str | None = None

    def run(self) -> None:
        source, target = Path(self.get_package_dir(PACKAGE)), Path(self.build_lib, PACKAGE)
        if not self.editable_mode:
            # The wheel is everything that lies there, and so would be what an earlier build left.
            shutil.rmtree(target, ignore_errors=True)
        super().run()
        if self.reason_for_no_library is not None:
            record_no_library(source if self.editable_mode else target, self.reason_for_no_library)
            warn(self.reason_for_no_library)


class BuildNothing(build_ext):
    """Stands in for ``build_ext`` where no library is going to be built."""

    reason_for_no_library = ""

    def run(self) -> None:
        if self.inplace:
            package_dir = Path(self.get_finalized_command("build_py").get_package_dir(PACKAGE))
            record_no_library(package_dir, self.reason_for_no_library)
        warn(self.reason_for_no_library)


def make_build_library(
    torch: Any, compiler: str, toolkit: cuda_build.Toolkit | None, no_cuda: str
) -> type[build_ext]:
    """Return the ``build_ext`` command that compiles with ``torch`` and records how it went.

    ``no_cuda`` is the reason why there is no toolkit.
    """

    class BuildLibrary(torch.utils.cpp_extension.BuildExtension):
        inplace: Any

        def finalize_options(self) -> None:
            super().finalize_options()
            # Always the same folder, so that an editable install rebuilds only what changed, but
            # one for each torch, whose headers the objects depend on.
            target = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
            self.build_temp = str(Path("build", f"temp.{target}-torch-{torch.__version__}"))

        def run(self) -> None:
            build_py = self.get_finalized_command("build_py")
            source, target = build_py.get_package_dir(PACKAGE), Path(self.build_lib, PACKAGE)
            package_dir = Path(source) if self.inplace else target
            try:
                cuda = self.build()
            except Exception as error:  # distutils, ninja and the compiler each have their own
                if BUILD_MODE == "require":
                    raise
                reason = failure(error)
                self.extensions: list[Any] = []
                record_no_library(package_dir, reason)
                warn(reason)
            else:
                write_build_info(
                    package_dir,
                    built=True,
                    torch_version=torch.__version__,
                    compiler=compiler_version(compiler),
                    python_version=platform.python_version(),
                    cuda=cuda,
                )

        def build(self) -> dict[str, str]:
            """Build with CUDA kernels where that succeeds; return what became of them."""
            if toolkit is None:
                super().run()
                return {"reason": no_cuda}
            inplace = self.inplace
            try:
                super().run()
            except Exception as error:
                if cuda_build.CUDA_MODE == "require":
                    raise
                # What nvcc refuses costs the CUDA kernels only.
                reason = failure(error)
                warn_of_no_cuda(reason)
                without_cuda = vars(make_extension(torch, None))
                (extension,) = self.extensions
                for name in (
                    "sources",
                    "include_dirs",
                    "library_dirs",
                    "libraries",
                    "extra_compile_args",
                ):
                    setattr(extension, name, without_cuda[name])
                # As they were before the first run, which changes both.
                self.inplace, self.compiler = inplace, None
                super().run()
                return {"reason": reason}
            return {"release": toolkit.release, "architectures": toolkit.architectures}

        def copy_extensions_to_source(self) -> None:
            # A library is never beside a record that speaks of another one, even if the build
            # is stopped here.
            package_dir = self.get_finalized_command("build_py").get_package_dir(PACKAGE)
            record_no_library(Path(package_dir), "The build was interrupted.")
            super().copy_extensions_to_source()

    return BuildLibrary


def plan_cuda(torch: Any) -> tuple[cuda_build.Toolkit | None, str]:
    """Return the toolkit to build CUDA kernels with, or None and the reason."""
    if cuda_build.CUDA_MODE not in ("auto", "0", "1", "require"):
        raise SystemExit(f"CNNKERNELS_CUDA must be 0, 1 or require, not {cuda_build.CUDA_MODE!r}.")
    try:
        toolkit = cuda_build.find_toolkit(torch)
    except cuda_build.CudaUnavailableError as error:
        if cuda_build.CUDA_MODE == "require":
            raise SystemExit(f"error: {PACKAGE}'s CUDA kernels cannot be built. {error}") from error
        if torch.version.cuda is not None and cuda_build.CUDA_MODE != "0":
            warn_of_no_cuda(str(error))
        return None, str(error)
    # Without it torch asks the devices that this machine happens to have.
    os.environ["TORCH_CUDA_ARCH_LIST"] = toolkit.architectures
    return toolkit, ""


def plan_build() -> dict[str, Any]:
    """Return the arguments of ``setup`` that depend on whether the library can be built."""
    if BUILD_MODE not in ("auto", "0", "1", "require"):
        raise SystemExit(f"CNNKERNELS_BUILD must be 0, 1 or require, not {BUILD_MODE!r}.")
    try:
        if BUILD_MODE == "0":
            if cuda_build.CUDA_MODE == "require":
                raise SystemExit(
                    "error: with CNNKERNELS_BUILD=0 there are no CUDA kernels to require."
                )
            raise BuildImpossibleError("CNNKERNELS_BUILD=0 was set when it was installed.")
        torch = import_torch()
        check_python_headers()
        compiler = find_compiler()
    except BuildImpossibleError as error:
        if BUILD_MODE == "require":
            raise SystemExit(f"error: {PACKAGE}'s library cannot be built. {error}") from error
        BuildPython.reason_for_no_library = BuildNothing.reason_for_no_library = str(error)
        return {
            "cmdclass": {"build_py": BuildPython, "build_ext": BuildNothing},
            "install_requires": [SUPPORTED_TORCH],
        }
    os.environ["CXX"] = compiler  # torch and setuptools must use the same one
    put_ninja_on_path()
    toolkit, no_cuda = plan_cuda(torch)
    limit_jobs(BYTES_PER_JOB if toolkit is None else BYTES_PER_CUDA_JOB)
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    return {
        "cmdclass": {
            "build_py": BuildPython,
            "build_ext": make_build_library(torch, compiler, toolkit, no_cuda),
        },
        "ext_modules": [make_extension(torch, toolkit)],
        # The C++ interface of torch changes from one release line to the next.
        "install_requires": [f"torch>={major}.{minor},<{major}.{minor + 1}"],
    }


plan = plan_build()
plan["install_requires"] += ["numpy", "rich"]
setup(
    packages=[
        *find_packages(include=[PACKAGE, f"{PACKAGE}.*"]),
        f"{PACKAGE}.benchmarks",
        *(f"{PACKAGE}.benchmarks.{name}" for name in find_packages("benchmarks")),
    ],
    package_dir={f"{PACKAGE}.benchmarks": "benchmarks"},
    **plan,
)
