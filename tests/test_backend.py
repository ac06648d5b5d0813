"""Choosing a backend, the reports on it, and the library that must not be loaded."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import BACKENDS
from torch.nn import functional as F

import cnnkernels
from cnnkernels import (
    _backend,
    _native,
    explain,
    functional,
    get_backend,
    nn,
    show_config,
    use_backend,
)
from cnnkernels.__main__ import main

IMAGE, WEIGHT = torch.randn(1, 2, 8, 8), torch.randn(3, 2, 3, 3)


def python(code: str, path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code with the package that lies in path."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, "PYTHONPATH": str(path), **environment},
        cwd=path,
        capture_output=True,
        text=True,
        check=False,
    )


SOURCE = Path(cnnkernels.__file__).parent


def copy_package(path: Path, build_info: dict[str, object] | None, library: str | None) -> None:
    """Puts the Python files into path, with a build's record and a file in the library's place."""
    shutil.copytree(
        SOURCE,
        path / "cnnkernels",
        ignore=shutil.ignore_patterns("_C*", "_build_info.json", "__pycache__"),
    )
    if build_info is not None:
        (path / "cnnkernels" / "_build_info.json").write_text(json.dumps(build_info))
    if library is not None:
        (path / "cnnkernels" / "_C.py").write_text(library)


def test_backends_nest_and_come_back() -> None:
    default = get_backend()
    assert default in BACKENDS
    with use_backend("torch"):
        assert get_backend() == "torch"
        for name in BACKENDS:
            with use_backend(name):
                assert get_backend() == name
            assert get_backend() == "torch"
        with pytest.raises(ZeroDivisionError), use_backend(default):
            raise ZeroDivisionError
        assert get_backend() == "torch"
    assert get_backend() == default


def test_one_block_enters_twice_and_decorates() -> None:
    block = use_backend("torch")
    with block, block:
        assert get_backend() == "torch"
    assert get_backend() == BACKENDS[0]
    assert use_backend("torch")(get_backend)() == "torch"
    assert get_backend() == BACKENDS[0]


def test_a_choice_holds_for_its_thread() -> None:
    seen = []
    with use_backend("torch"):
        thread = threading.Thread(target=lambda: seen.append(get_backend()))
        thread.start()
        thread.join()
    assert seen == [BACKENDS[0]]


def test_blocks_that_overlap_in_two_threads() -> None:
    """Compilers read one choice for all threads: of the blocks open, that entered last."""
    entered, leave = threading.Event(), threading.Event()

    def enter_and_leave() -> None:
        with use_backend("torch"):
            entered.set()
            leave.wait()

    default = _backend._captured
    thread = threading.Thread(target=enter_and_leave)
    thread.start()
    entered.wait()
    in_thread = _backend._captured
    with use_backend(BACKENDS[0]):
        assert _backend._captured is default
        leave.set()
        thread.join()
        assert _backend._captured is default
    assert _backend._captured is default
    assert (in_thread is default) == (BACKENDS[0] == "torch")


@pytest.mark.parametrize("name", ["cuda", "", "Native", None])
def test_unknown_backends(name: str) -> None:
    with pytest.raises(ValueError, match="backend must be 'native' or 'torch', got"):
        use_backend(name)


def test_compiled_functions_notice_the_choice() -> None:
    """On a graph compiler that runs the graph as it is, and counts."""
    graphs = []

    def compiler(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(str(graph.graph))
        return graph.forward

    compiled = torch.compile(lambda x, w: functional.conv2d(x, w), backend=compiler, fullgraph=True)
    for name in BACKENDS:
        with use_backend(name):
            torch.testing.assert_close(
                compiled(IMAGE, WEIGHT), F.conv2d(IMAGE, WEIGHT), rtol=1e-4, atol=1e-5
            )
    assert ["cnnkernels" in graph for graph in graphs] == [name == "native" for name in BACKENDS]


def test_show_config() -> None:
    text = show_config()
    rows = dict(line.split(":", 1) for line in text.splitlines())
    assert rows["cnnkernels"].strip() == cnnkernels.__version__
    assert rows["backend"].strip() == get_backend()
    assert torch.__version__ in rows["torch"]
    assert rows["threads"].strip() == str(torch.get_num_threads())
    if cnnkernels.is_native_available():
        assert rows["library"].strip() == "loaded"
        assert _native.library is not None
        assert _native.library.config()["isa"] in rows["instruction set"]
    else:
        assert _native.reason in rows["library"]


@pytest.mark.usefixtures("backend")
def test_explain() -> None:
    torch_backend = get_backend() == "torch"
    for plan, operator in (
        (explain(functional.conv2d, IMAGE, WEIGHT, padding="same"), "conv2d"),
        (explain(functional.max_pool2d, IMAGE, 2), "max_pool2d"),
        (explain(nn.MaxPool2d(2, return_indices=True), IMAGE), "max_pool2d_with_indices"),
        (explain(nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), IMAGE), "conv2d"),
        (explain(functional.conv2d_relu, IMAGE, WEIGHT, padding="same"), "conv2d_relu"),
        (explain(nn.Conv2dReLU(2, 3, 3), IMAGE), "conv2d_relu"),
        (explain(nn.Conv2dReLUMaxPool2d(2, 3, 3), IMAGE), "conv2d_relu_max_pool2d"),
    ):
        assert plan["operator"] == operator
        assert (plan["algorithm"] == "aten") == torch_backend
        assert str(plan).split()[:2] == ["operator:", operator]
        assert ("reason" in plan) == torch_backend
    complex_plan = explain(functional.conv2d, IMAGE.cfloat(), WEIGHT.cfloat())
    assert complex_plan["algorithm"] == "aten"
    assert complex_plan["reason"]
    ints = IMAGE.long(), WEIGHT.long()
    assert explain(functional.conv2d_relu, *ints)["algorithm"] == "aten"


def test_explain_wants_one_operator() -> None:
    with pytest.raises(ValueError, match="it ran 0"):
        explain(F.conv2d, IMAGE, WEIGHT)
    with pytest.raises(ValueError, match="it ran 2"):
        explain(torch.nn.Sequential(nn.Conv2d(2, 2, 3), nn.MaxPool2d(2)), IMAGE)


REPORT = "import cnnkernels; print(cnnkernels.is_native_available(), cnnkernels.get_backend())"


def test_environment_chooses_the_backend() -> None:
    result = python(REPORT, SOURCE.parent, CNNKERNELS_BACKEND="torch")
    assert result.stdout.startswith(f"{cnnkernels.is_native_available()} torch")


def test_environment_with_a_bad_name() -> None:
    result = python(REPORT, SOURCE.parent, CNNKERNELS_BACKEND="gpu")
    assert "CNNKERNELS_BACKEND=gpu: backend must be 'native' or 'torch', got 'gpu'" in result.stderr
    assert result.returncode != 0


FALLBACK = """
import torch, cnnkernels
from cnnkernels import functional
print(cnnkernels.is_native_available(), cnnkernels.get_backend())
print(cnnkernels.show_config())
x, w = torch.randn(1, 2, 8, 8), torch.randn(3, 2, 3, 3)
expected = torch.nn.functional.conv2d(x, w)
torch.testing.assert_close(functional.conv2d(x, w), expected)
torch.testing.assert_close(torch.ops.cnnkernels.conv2d(x, w), expected)
try:
    cnnkernels.use_backend("native")
except RuntimeError as error:
    print("refused:", error)
"""


def test_the_library_of_another_torch_is_not_even_imported(tmp_path: Path) -> None:
    info = {"built": True, "torch_version": "1.2.3+cpu"}
    copy_package(tmp_path, info, "raise SystemExit('the library was imported')")
    result = python(FALLBACK, tmp_path)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    reason = "the library was built for torch 1.2.3+cpu, but this is torch"
    assert lines[0] == "False torch"
    assert any(line.startswith("library:") and reason in line for line in lines)
    assert lines[-1].startswith(f"refused: the native backend is not available: {reason}")
    assert "pip install --force-reinstall --no-deps --no-build-isolation" in lines[-1]


def test_reasons_why_there_is_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = {"built": False, "reason": "no C++ compiler was found"}
    assert _native._load(failed) == (
        None,
        "the library was not built: no C++ compiler was found",
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    library, reason = _native._load({})
    assert library is None
    assert "there is no compiled library" in reason
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)

    def broken(name: str) -> None:
        raise ImportError("undefined symbol: foo")

    monkeypatch.setattr(importlib, "import_module", broken)
    library, reason = _native._load({"built": True, "torch_version": torch.__version__})
    assert library is None
    assert "could not be loaded (undefined symbol: foo)" in reason


def test_environment_cannot_force_a_library_that_is_not_there(tmp_path: Path) -> None:
    copy_package(tmp_path, {"built": False, "reason": "no C++ compiler was found"}, None)
    result = python(REPORT, tmp_path, CNNKERNELS_BACKEND="native")
    assert result.returncode != 0
    assert "CNNKERNELS_BACKEND=native: the native backend is not available" in result.stderr
    assert "no C++ compiler was found" in result.stderr


@pytest.mark.skipif(BACKENDS[0] == "torch", reason="needs the compiled library")
@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("Baseline", "baseline (available"),
        ("sse9", "CNNKERNELS_CPU_ISA=sse9 is not an instruction set"),
    ],
)
def test_environment_chooses_the_instruction_set(name: str, shown: str) -> None:
    code = "import cnnkernels; print(cnnkernels.show_config())"
    result = python(code, SOURCE.parent, CNNKERNELS_CPU_ISA=name)
    assert shown in result.stdout.split("instruction set:")[1].split("threads")[0]


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    assert capsys.readouterr().out.strip() == show_config()
    with pytest.raises(SystemExit) as exit_:
        main([])
    assert exit_.value.code == 2
    assert "{info,tutorial,bench}" in capsys.readouterr().err


def test_package_runs_as_a_module() -> None:
    run = [sys.executable, "-m", "cnnkernels", "info"]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE.parent)}
    info = subprocess.run(run, env=environment, capture_output=True, text=True, check=True)
    assert info.stdout.strip() == show_config()
