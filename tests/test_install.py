"""Every way to install the package, in fresh environments, from an unpacked source archive.

pip has no index here, only a folder with setuptools and ninja, so an install that wanted another
torch would fail. The environments see the torch of the environment that runs the tests through a
.pth file, which pip takes for an installed torch.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from email.parser import Parser
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ["benchmarks", "build_backend", "cnnkernels", "csrc", "docs", "examples", "tests"]
FILES = [
    ".clang-format",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "MANIFEST.in",
    "Makefile",
    "README.md",
    "pyproject.toml",
    "setup.py",
]
BUILT_FILES = ("*.so", "*.py[cod]", "__pycache__", "_build_info.json")

SMOKE_TEST = """
import json, torch, cnnkernels, cnnkernels.benchmarks, cnnkernels.tutorial, cnnkernels.functional
x, w = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)
torch.testing.assert_close(cnnkernels.functional.conv2d(x, w), torch.conv2d(x, w))
print(json.dumps({
    "native": cnnkernels.is_native_available(),
    "package": cnnkernels.__file__,
    "benchmarks": cnnkernels.benchmarks.__file__,
    "config": cnnkernels.show_config(),
}))
"""


def run(
    *command: str | Path, cwd: Path, fails: bool = False, **environment: str | Path
) -> subprocess.CompletedProcess[str]:
    """Run ``command`` free of the caller's settings of pip, Python and the package."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PIP_", "PYTHON", "CNNKERNELS_", "MAKE", "MFLAGS"))
        and name not in ("CC", "CXX", "VIRTUAL_ENV")
    }
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**inherited, **{name: str(value) for name, value in environment.items()}},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert (result.returncode != 0) == fails, result.stdout
    return result


@dataclass
class Environment:
    """A virtual environment that holds nothing of its own and sees the tests' torch."""

    folder: Path
    wheelhouse: Path

    @classmethod
    def create(cls, folder: Path, wheelhouse: Path) -> Environment:
        """Make the environment in ``folder``."""
        run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
        environment = cls(folder, wheelhouse)
        # A .pth file inside these folders is not read: an editable install there stays unseen.
        names = ["torch", "numpy", "rich", "pip", "setuptools"]
        paths = {str(importlib.metadata.distribution(name).locate_file("")) for name in names}
        environment.site_packages.joinpath("host.pth").write_text("\n".join(sorted(paths)))
        return environment

    @property
    def python(self) -> Path:
        """The environment's interpreter."""
        return self.folder / "bin" / "python"

    @property
    def site_packages(self) -> Path:
        """Where pip installs."""
        return next(self.folder.glob("lib/python*/site-packages"))

    def pip(
        self, *arguments: str | Path, fails: bool = False, **environment: str | Path
    ) -> subprocess.CompletedProcess[str]:
        """Run pip without an index."""
        return run(
            *(self.python, "-m", "pip", *arguments, "--verbose"),
            cwd=self.folder,
            fails=fails,
            PIP_CONFIG_FILE=os.devnull,
            PIP_NO_INDEX="1",
            PIP_FIND_LINKS=self.wheelhouse,
            PIP_DISABLE_PIP_VERSION_CHECK="1",
            **environment,
        )

    def install(
        self, *arguments: str | Path, **environment: Any
    ) -> subprocess.CompletedProcess[str]:
        """Install, and check that pip installed this package alone."""
        report = self.folder / "report.json"
        result = self.pip("install", "--report", report, *arguments, **environment)
        installed = [item["metadata"]["name"] for item in json.loads(report.read_text())["install"]]
        assert installed == ["cnnkernels"]
        assert "Collecting torch" not in result.stdout
        return result

    def smoke_test(self) -> dict[str, str | bool]:
        """Use the installed package, and return what it says of itself."""
        output = run(self.python, "-W", "ignore", "-c", SMOKE_TEST, cwd=self.folder).stdout
        return json.loads(output.splitlines()[-1])


@pytest.fixture(scope="module")
def wheelhouse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what an isolated build may ask for."""
    folder = tmp_path_factory.mktemp("wheelhouse")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest"]
    subprocess.run([*command, str(folder), "setuptools>=77.0.3", "ninja"], check=True)
    return folder


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source archive, made in a tree that also holds what a build leaves."""
    tree = tmp_path_factory.mktemp("checkout")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns(*BUILT_FILES))
    for name in FILES:
        shutil.copy(ROOT / name, tree / name)
    (tree / "cnnkernels" / "_C.stale.so").touch()
    (tree / "cnnkernels" / "_build_info.json").write_text('{"built": false, "reason": "stale"}')
    run(
        *(sys.executable, "-c", "import backend; backend.build_sdist('dist')"),
        cwd=tree,
        PYTHONPATH=tree / "build_backend",
    )
    return next((tree / "dist").glob("*.tar.gz"))


@pytest.fixture(scope="module")
def source(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked archive, which every native build shares for the sake of its object files."""
    folder = tmp_path_factory.mktemp("source")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder)
    return next(folder.iterdir())


@pytest.fixture
def pure_source(source: Path, tmp_path: Path) -> Path:
    """A copy of the source tree for a build that compiles nothing."""
    ignore = shutil.ignore_patterns("build", *BUILT_FILES)
    return Path(shutil.copytree(source, tmp_path / "source", ignore=ignore))


@pytest.fixture
def environment(wheelhouse: Path, tmp_path: Path) -> Environment:
    """An environment for one test."""
    return Environment.create(tmp_path / "environment", wheelhouse)


@pytest.fixture(scope="module")
def builder(wheelhouse: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """The environment of the native builds: its path is in the compiler's command line."""
    return Environment.create(tmp_path_factory.mktemp("builder") / "environment", wheelhouse)


@pytest.fixture(scope="module")
def native_wheel(builder: Environment, source: Path) -> Path:
    """The wheel that an isolated build makes."""
    builder.pip("wheel", "--no-deps", "--wheel-dir", "dist", source, CNNKERNELS_BUILD="require")
    return next((builder.folder / "dist").glob("*.whl"))


@pytest.fixture
def failing_compiler(tmp_path: Path) -> Path:
    """A compiler that tells its version and compiles nothing."""
    script = tmp_path / "failing-c++"
    script.write_text(
        '#!/bin/sh\ncase "$1" in -v|--version|-dump*) exec c++ "$@";; esac\n'
        'echo "this compiler compiles nothing" >&2\nexit 1\n'
    )
    script.chmod(0o755)
    return script


def package_files(source: Path) -> set[str]:
    """The files of the package in a source tree, under the names they are installed with."""
    folders = {"cnnkernels": "cnnkernels", "benchmarks": "cnnkernels/benchmarks"}
    kept = {".py", ".typed", ".csv"}
    return {
        f"{target}/{path.relative_to(source / folder).as_posix()}"
        for folder, target in folders.items()
        for path in (source / folder).rglob("*")
        if path.suffix in kept
    }


def torch_requirement(metadata: str) -> set[str]:
    """The bounds that ``Requires-Dist`` sets on torch."""
    requirements = Parser().parsestr(metadata).get_all("Requires-Dist", [])
    (bounds,) = (text.removeprefix("torch") for text in requirements if text.startswith("torch"))
    return set(bounds.strip(" ()").split(","))


def test_sdist_holds_the_sources_and_no_build_product(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        metadata = archive.extractfile(f"{sdist.name.removesuffix('.tar.gz')}/PKG-INFO")
        assert metadata is not None
        bounds = torch_requirement(metadata.read().decode())
    wanted = {
        path.relative_to(ROOT).as_posix()
        for folder in ("csrc", "build_backend", "tests", "cnnkernels", "benchmarks")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".cpp", ".h", ".inl", ".py", ".csv"}
    }
    assert wanted | set(FILES) <= names
    assert not [name for name in names if name.endswith((".so", ".pyc", "_build_info.json"))]
    assert bounds == {">=2.11", "<2.15"}


def test_wheel_holds_the_package_and_nothing_else(native_wheel: Path, source: Path) -> None:
    with zipfile.ZipFile(native_wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (metadata,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        bounds = torch_requirement(archive.read(metadata).decode())
        build_info = json.loads(archive.read("cnnkernels/_build_info.json"))
    libraries = {name for name in names if name.startswith("cnnkernels/_C.")}
    assert len(libraries) == 1
    assert names - libraries == package_files(source) | {"cnnkernels/_build_info.json"}
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    assert bounds == {f">={major}.{minor}", f"<{major}.{minor + 1}"}
    assert build_info["built"] is True
    assert build_info["torch_version"] == torch.__version__


def test_wheel_runs_natively(native_wheel: Path, environment: Environment) -> None:
    environment.install(native_wheel)
    result = environment.smoke_test()
    assert result["native"] is True
    assert Path(str(result["package"])).is_relative_to(environment.site_packages)
    assert Path(str(result["benchmarks"])).is_relative_to(environment.site_packages)
    command = (environment.python, "-m", "cnnkernels", "info")
    assert torch.__version__ in run(*command, cwd=environment.folder).stdout


def test_library_for_another_torch_is_refused(native_wheel: Path, environment: Environment) -> None:
    environment.install(native_wheel)
    path = environment.site_packages / "cnnkernels" / "_build_info.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "torch_version": "2.1.0"}))
    result = environment.smoke_test()
    assert result["native"] is False
    assert "built for torch 2.1.0" in str(result["config"])
    assert "pip install" in str(result["config"])


@pytest.mark.parametrize("isolation", [[], ["--no-build-isolation"]], ids=["isolated", "shared"])
@pytest.mark.parametrize("editable", [[], ["--editable"]], ids=["copied", "editable"])
def test_install_builds_against_the_torch_that_is_there(
    builder: Environment,
    native_wheel: Path,  # made first, so that this compiles nothing anew
    source: Path,
    isolation: list[str],
    editable: list[str],
) -> None:
    builder.install(*isolation, *editable, source, CNNKERNELS_BUILD="require")
    result = builder.smoke_test()
    assert result["native"] is True
    home = source if editable else builder.site_packages
    assert Path(str(result["package"])).is_relative_to(home)
    assert Path(str(result["benchmarks"])).is_relative_to(home)


def test_build_0_is_pure_python(environment: Environment, pure_source: Path) -> None:
    left_by_an_earlier_build = pure_source / "build" / "lib" / "cnnkernels" / "renamed.py"
    left_by_an_earlier_build.parent.mkdir(parents=True)
    left_by_an_earlier_build.touch()
    log = environment.install(pure_source, CNNKERNELS_BUILD="0").stdout
    assert "installed without its compiled library" in log
    result = environment.smoke_test()
    assert result["native"] is False
    assert "CNNKERNELS_BUILD=0" in str(result["config"])
    (metadata,) = environment.site_packages.glob("cnnkernels-*.dist-info")
    assert "Tag: py3-none-any" in (metadata / "WHEEL").read_text()
    assert torch_requirement((metadata / "METADATA").read_text()) == {">=2.11", "<2.15"}
    package = environment.site_packages / "cnnkernels"
    assert not list(package.glob("_C.*"))
    assert not (package / "renamed.py").exists()


def test_without_a_compiler_it_is_pure_python(environment: Environment, pure_source: Path) -> None:
    reason = "There is no C++ compiler: CXX=/nonexistent/c++ was not found."
    log = environment.install("--no-build-isolation", pure_source, CXX="/nonexistent/c++").stdout
    assert reason in log
    result = environment.smoke_test()
    assert result["native"] is False
    assert reason in str(result["config"])


def test_a_failed_build_is_pure_python(
    environment: Environment, pure_source: Path, failing_compiler: Path
) -> None:
    log = environment.install("--no-build-isolation", pure_source, CXX=failing_compiler).stdout
    assert "this compiler compiles nothing" in log
    assert "installed without its compiled library" in log
    result = environment.smoke_test()
    assert result["native"] is False
    assert "The build failed" in str(result["config"])


def test_require_makes_a_failed_build_fatal(
    environment: Environment, pure_source: Path, failing_compiler: Path
) -> None:
    environment.pip(
        *("install", "--no-build-isolation", pure_source),
        fails=True,
        CXX=failing_compiler,
        CNNKERNELS_BUILD="require",
    )
    assert not (environment.site_packages / "cnnkernels").exists()


def test_a_failed_rebuild_leaves_no_library(
    environment: Environment, pure_source: Path, failing_compiler: Path
) -> None:
    package = pure_source / "cnnkernels"
    (package / "_C.cpython-stale.so").touch()
    (package / "_build_info.json").write_text('{"built": true, "torch_version": "2.1.0"}')
    build = (environment.python, "setup.py", "build_ext", "--inplace")
    run(*build, cwd=pure_source, CXX=failing_compiler)
    assert not list(package.glob("_C.*"))
    assert json.loads((package / "_build_info.json").read_text())["built"] is False


def test_an_unknown_build_mode_is_refused(environment: Environment, pure_source: Path) -> None:
    build = (environment.python, "setup.py", "build_ext", "--inplace")
    result = run(*build, cwd=pure_source, fails=True, CNNKERNELS_BUILD="yes")
    assert "CNNKERNELS_BUILD must be 0, 1 or require, not 'yes'." in result.stdout


@pytest.mark.parametrize(
    ("release", "wanted"),
    [(None, True), ("2.10.0", True), ("2.11.0", False), ("2.14.1+cpu", False), ("2.15.0", True)],
)
def test_torch_is_asked_for_only_if_there_is_none_to_use(
    tmp_path: Path, wheelhouse: Path, release: str | None, wanted: bool
) -> None:
    folder = tmp_path / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=tmp_path)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    if release is not None:
        metadata = site_packages / f"torch-{release}.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {release}\n")
    (setuptools,) = wheelhouse.glob("setuptools-*.whl")
    with zipfile.ZipFile(setuptools) as archive:
        archive.extractall(tmp_path / "setuptools")
    result = run(
        *(folder / "bin" / "python", "-c"),
        "import backend; print(backend.get_requires_for_build_wheel())",
        cwd=tmp_path,
        PYTHONPATH=os.pathsep.join([str(ROOT / "build_backend"), str(tmp_path / "setuptools")]),
        PYTHONDONTWRITEBYTECODE="1",
    )
    assert ("torch>=2.11,<2.15" in result.stdout) == wanted
