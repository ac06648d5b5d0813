"""The kernels without Python: a C++ program checks them, also under sanitizers and as AVX-512.

The kernels include no torch header, so ``tests/kernels`` links them alone. Where the machine has
AVX2, the AVX-512 tier's vectors and tiles run too, compiled to AVX2 instructions.
"""

from __future__ import annotations

import concurrent.futures
import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "csrc" / "kernels"
PROGRAM = ROOT / "tests" / "kernels"
EXACT_WORKSPACES = PROGRAM / "exact_workspaces.cpp"
# -Wno-psabi: no vector is passed between functions of different tiers.
FLAGS = shlex.split("-std=c++17 -DCNNK_EMULATE_AVX512 -Wall -Wextra -Werror -Wno-psabi -pthread")
# The numbers are independent of optimisation, what the optimiser makes of a mistake is not: the
# kernels are compiled as they are for the package.
KERNEL_FLAGS = shlex.split("-O2 -fno-math-errno -fno-trapping-math -ffp-contract=fast")
# What is left out costs most of the compile time and finds what AddressSanitizer finds.
SANITIZE = shlex.split(
    "-O1 -fno-omit-frame-pointer -fsanitize=address,undefined "
    "-fno-sanitize=null,object-size,pointer-overflow -fno-sanitize-recover=all"
)


@dataclass(frozen=True)
class Variant:
    """How the program is built, and for how many cases it runs."""

    kernel_flags: list[str]
    program_flags: list[str]
    left_out: set[Path]
    cases: int


VARIANTS = {
    "optimised": Variant(KERNEL_FLAGS, ["-O1"], {EXACT_WORKSPACES}, 300),
    "sanitized": Variant(
        SANITIZE, SANITIZE, {KERNELS / "workspace.cpp", PROGRAM / "workspaces.cpp"}, 60
    ),
}


def find_compiler() -> list[str]:
    """Return the compiler's command, or skip."""
    command = shlex.split(os.environ.get("CXX", "").strip() or "g++")
    if shutil.which(command[0]) is None:
        pytest.skip(f"there is no C++ compiler: {command[0]} was not found")
    return command


def run(command: list[str], timeout: int = 600) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


def skip_without_sanitizers(compiler: list[str], folder: Path) -> None:
    source = folder / "empty.cpp"
    source.write_text("int main() { return 0; }\n", encoding="utf-8")
    program = folder / "empty"
    linked = run([*compiler, *SANITIZE, str(source), "-o", str(program)])
    if linked.returncode != 0:
        pytest.skip(f"{compiler[0]} has no address and undefined-behaviour sanitizers")
    if run([str(program)]).returncode != 0:
        pytest.skip("programs with address sanitizer do not start on this machine")


def build(compiler: list[str], variant: Variant, folder: Path) -> Path:
    """Compile each source once, two at a time, and link the program."""
    sources = [*KERNELS.rglob("*.cpp"), *PROGRAM.glob("*.cpp")]
    sources = [source for source in sources if source not in variant.left_out]
    # The longest first, so that none is left for the end alone.
    sources.sort(key=lambda source: source.parent.name != "cpu")
    objects = [folder / f"{source.parent.name}-{source.stem}.o" for source in sources]

    def compile_source(source: Path, target: Path) -> None:
        of_kernel = source.is_relative_to(KERNELS)
        flags = variant.kernel_flags if of_kernel else variant.program_flags
        includes = [f"-I{ROOT / 'csrc'}", f"-I{PROGRAM}"]
        done = run([*compiler, *FLAGS, *flags, *includes, "-c", str(source), "-o", str(target)])
        assert done.returncode == 0, f"{source} does not compile:\n{done.stderr}"

    with concurrent.futures.ThreadPoolExecutor(max_workers=2) as jobs:
        for _ in jobs.map(compile_source, sources, objects):
            pass
    program = folder / "kernels"
    linked = run(
        [*compiler, *FLAGS, *variant.program_flags, *map(str, objects), "-o", str(program)]
    )
    assert linked.returncode == 0, linked.stderr
    return program


@pytest.mark.parametrize("name", VARIANTS)
def test_kernels_match_naive_loops(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    compiler = find_compiler()
    folder = tmp_path_factory.mktemp(name)
    variant = VARIANTS[name]
    if name == "sanitized":
        skip_without_sanitizers(compiler, folder)
    program = build(compiler, variant, folder)
    done = run([str(program), str(variant.cases), "1"])
    report = f"{done.stdout[-10_000:]}\n{done.stderr[-10_000:]}"
    assert done.returncode == 0, report
    counted = re.search(r"^checks: (\d+)$", done.stdout, re.MULTILINE)
    assert counted is not None, report
    # Every case makes many more checks than this.
    assert int(counted.group(1)) > 20 * variant.cases, report
    assert re.search(r"^tiers: baseline\b", done.stdout, re.MULTILINE), report
