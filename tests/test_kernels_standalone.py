"""The kernels without Python: a C++ program checks them, also under sanitizers and as AVX-512.

The kernels include no torch header, so ``tests/kernels`` links them alone. Where the machine has
AVX2, the AVX-512 tier's vectors and tiles run too, compiled to AVX2 instructions.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
from compiling import (
    ROOT,
    SANITIZE,
    Unit,
    compile_units,
    find_compiler,
    link,
    run,
    skip_without_sanitizers,
)

pytestmark = pytest.mark.slow

KERNELS = ROOT / "csrc" / "kernels"
PROGRAM = ROOT / "tests" / "kernels"
EXACT_WORKSPACES = PROGRAM / "exact_workspaces.cpp"
# -Wno-psabi: no vector is passed between functions of different tiers.
FLAGS = shlex.split("-std=c++17 -DCNNK_EMULATE_AVX512 -Wall -Wextra -Werror -Wno-psabi -pthread")
# The numbers are independent of optimisation, what the optimiser makes of a mistake is not: the
# kernels are compiled as they are for the package.
KERNEL_FLAGS = shlex.split("-O2 -fno-math-errno -fno-trapping-math -ffp-contract=fast")


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


def build(compiler: list[str], variant: Variant, folder: Path) -> Path:
    """Compile each source once and link the program."""
    sources = [*KERNELS.rglob("*.cpp"), *PROGRAM.glob("*.cpp")]
    sources = [source for source in sources if source not in variant.left_out]
    # The longest first, so that none is left for the end alone.
    sources.sort(key=lambda source: source.parent.name != "cpu")
    includes = [f"-I{ROOT / 'csrc'}", f"-I{PROGRAM}"]

    def unit(source: Path) -> Unit:
        of_kernel = source.is_relative_to(KERNELS)
        flags = variant.kernel_flags if of_kernel else variant.program_flags
        return Unit(source, [*FLAGS, *flags, *includes])

    objects = compile_units(compiler, map(unit, sources), folder)
    return link(compiler, [*FLAGS, *variant.program_flags], objects, folder / "kernels")


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
