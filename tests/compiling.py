"""How tests compile C++ programs: with which compiler and flags, and two sources at once."""

from __future__ import annotations

import concurrent.futures
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Whether to try what a change of a CUDA kernel calls for, beyond what every run does: every mistake
# and every architecture.
TEST_ALL = os.environ.get("CNNKERNELS_TEST_ALL", "") not in ("", "0")
# What is left out costs most of the compile time and finds what AddressSanitizer finds.
SANITIZE = shlex.split(
    "-O1 -fno-omit-frame-pointer -fsanitize=address,undefined "
    "-fno-sanitize=null,object-size,pointer-overflow -fno-sanitize-recover=all"
)


def find_compiler() -> list[str]:
    """Return the compiler's command, or skip."""
    command = shlex.split(os.environ.get("CXX", "").strip() or "g++")
    if shutil.which(command[0]) is None:
        pytest.skip(f"there is no C++ compiler: {command[0]} was not found")
    return command


def run(
    command: Sequence[str | Path], timeout: int = 600, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command and return what it printed."""
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env={**os.environ, **environment},
    )


def skip_without_sanitizers(compiler: list[str], folder: Path) -> None:
    """Skip where a sanitized program cannot be linked or does not start."""
    source = folder / "empty.cpp"
    source.write_text("int main() { return 0; }\n", encoding="utf-8")
    program = folder / "empty"
    linked = run([*compiler, *SANITIZE, source, "-o", program])
    if linked.returncode != 0:
        pytest.skip(f"{compiler[0]} has no address and undefined-behaviour sanitizers")
    if run([program]).returncode != 0:
        pytest.skip("programs with address sanitizer do not start on this machine")


@dataclass
class Unit:
    """A source with its flags; ``name`` is that of its object, without a suffix."""

    source: Path
    flags: list[str]
    name: str = ""
    object_file: Path = field(init=False)

    def __post_init__(self) -> None:
        self.name = self.name or "-".join([*self.source.parts[-3:-1], self.source.stem])


def compile_units(compiler: list[str], units: Iterable[Unit], folder: Path) -> list[Path]:
    """Compile each unit, two at a time, and return the objects in their order."""

    def compile_unit(unit: Unit) -> Path:
        unit.object_file = folder / f"{unit.name}.o"
        # CUDA sources are C++ to a host compiler.
        done = run([*compiler, *unit.flags, "-x", "c++", "-c", unit.source, "-o", unit.object_file])
        assert done.returncode == 0, f"{unit.source} does not compile:\n{done.stderr}"
        return unit.object_file

    with concurrent.futures.ThreadPoolExecutor(max_workers=2) as jobs:
        return list(jobs.map(compile_unit, units))


def link(compiler: list[str], flags: list[str], objects: Iterable[Path], program: Path) -> Path:
    """Link a program, or a library if the flags say so."""
    linked = run([*compiler, *flags, *objects, "-o", program])
    assert linked.returncode == 0, linked.stderr
    return program
