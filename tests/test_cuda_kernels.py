"""The CUDA kernels without a GPU: compiled by a host compiler, and run by an emulator.

``tests/cuda_kernels`` holds the emulator (docs/cuda-emulator.md), its own tests, and the program
that compares every kernel with naive loops. What the emulator must find is put into kernels on
purpose here, one mistake at a time.
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

KERNELS = ROOT / "csrc" / "kernels" / "cuda"
PROGRAM = ROOT / "tests" / "cuda_kernels"
CASES = ROOT / "tests" / "kernels"
INCLUDES = [f"-I{folder}" for folder in (ROOT / "csrc", CASES, PROGRAM)]
FLAGS = shlex.split("-std=c++17 -Wall -Wextra -Werror -Wno-unknown-pragmas -pthread")
SUPPORT = CASES / "support.cpp"
EMULATOR_TESTS = PROGRAM / "emulator_tests.cpp"
KERNEL_TESTS = [
    *sorted(KERNELS.glob("*.cu")),
    *sorted(KERNELS.glob("*.cpp")),
    *(CASES / f"{name}.cpp" for name in ("cases", "problems", "reference")),
    PROGRAM / "conv2d_tests.cpp",
    PROGRAM / "kernel_tests.cpp",
    PROGRAM / "plan_tests.cpp",
    PROGRAM / "weight_gradient_tests.cpp",
]
BUILDS = {"plain": ["-O1"], "sanitized": SANITIZE}
# Of poolings, of steps and of plans; and of convolutions, each of which runs every kernel.
CASES_OF_A_RUN, CONVOLUTIONS_OF_A_RUN = 300, 24


@dataclass
class Programs:
    """Both programs in one build, and the objects to link them of."""

    compiler: list[str]
    folder: Path
    flags: list[str]
    objects: dict[Path, Path]

    @classmethod
    def build(cls, name: str, folder: Path) -> Programs:
        """Compile and link both."""
        compiler = find_compiler()
        if name == "sanitized":
            skip_without_sanitizers(compiler, folder)
        flags = BUILDS[name]
        sources = [SUPPORT, EMULATOR_TESTS, *KERNEL_TESTS]
        units = [Unit(source, [*FLAGS, *flags, *INCLUDES]) for source in sources]
        objects = dict(zip(sources, compile_units(compiler, units, folder), strict=True))
        return cls(compiler, folder, flags, objects)

    def link(self, sources: list[Path], name: str, replaced: dict[Path, Path]) -> Path:
        """Link the objects of some sources, of which some are replaced."""
        objects = [replaced.get(source, self.objects[source]) for source in [SUPPORT, *sources]]
        return link(self.compiler, [*FLAGS, *self.flags], objects, self.folder / name)

    def emulator_tests(self, name: str, replaced: Path | None = None) -> list[str]:
        """The command that tests the emulator."""
        replacements = {} if replaced is None else {EMULATOR_TESTS: replaced}
        return [str(self.link([EMULATOR_TESTS], name, replacements))]

    def kernel_tests(
        self, name: str, cases: int, convolutions: int, replaced: dict[Path, Path] | None = None
    ) -> list[str]:
        """The command that tests the kernels."""
        program = self.link(KERNEL_TESTS, name, replaced or {})
        return [str(program), str(cases), str(convolutions), "1"]


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Programs]:
    """What was built so far, by name."""
    return {}


@pytest.fixture
def build(
    request: pytest.FixtureRequest,
    programs: dict[str, Programs],
    tmp_path_factory: pytest.TempPathFactory,
) -> Programs:
    """The build that the test is for."""
    name = request.param
    if name not in programs:
        programs[name] = Programs.build(name, tmp_path_factory.mktemp(name))
    return programs[name]


def check_passes(command: list[str], least_checks: int) -> None:
    done = run(command)
    report = f"{done.stdout[-10_000:]}\n{done.stderr[-10_000:]}"
    assert done.returncode == 0, report
    counted = re.search(r"^checks: (\d+)$", done.stdout, re.MULTILINE)
    assert counted is not None, report
    assert int(counted.group(1)) > least_checks, report


@pytest.mark.parametrize("build", BUILDS, indirect=True)
def test_the_emulator(build: Programs) -> None:
    check_passes(build.emulator_tests("emulator_tests"), 1000)


@pytest.mark.parametrize("build", BUILDS, indirect=True)
def test_kernels_match_naive_loops(build: Programs) -> None:
    command = build.kernel_tests("kernel_tests", CASES_OF_A_RUN, CONVOLUTIONS_OF_A_RUN)
    check_passes(command, 20 * CASES_OF_A_RUN)


@dataclass(frozen=True)
class Mistake:
    """A change of one line of a file that must turn the tests red, in the build that sees it."""

    name: str
    file: Path
    line: str  # the first that is like it; the last, counting from the end, where `nth` is negative
    instead: str
    nth: int = 0
    build: str = "plain"

    def text(self) -> str:
        """The file with the mistake in it."""
        parts = self.file.read_text(encoding="utf-8").split(self.line)
        assert len(parts) > 1, f"{self.file.name} has no {self.line!r}"
        at = self.nth % (len(parts) - 1) + 1
        return self.line.join(parts[:at]) + self.instead + self.line.join(parts[at:])


STEP = KERNELS / "gradient_step.cu"
STRIPS = KERNELS / "max_pool2d_strips.cu"
WINDOWS = KERNELS / "max_pool2d_windows.cu"
DIRECT = KERNELS / "conv2d_direct.cu"
GEMM = KERNELS / "conv2d_implicit_gemm.cu"
WEIGHT = KERNELS / "conv2d_weight_gradient.cu"
DEPTHWISE = KERNELS / "conv2d_depthwise.cu"
SUM = PROGRAM / "block_sum.cuh"
PRODUCT = PROGRAM / "matrix_product.cuh"
WINNER = KERNELS / "max_pool2d_device.cuh"

MISTAKES = [
    Mistake("step: stores past the end", STEP, "if (i >= end) break;", "", nth=1,
            build="sanitized"),
    Mistake("step: loads past the end", STEP, "if (i >= end) break;", "", build="sanitized"),
    Mistake("step: vectors anywhere", STEP, "addresses % kVectorBytes == 0", "true"),
    Mistake("step: another tensor's chunk", STEP, "[middle] <= block", "[middle] < block"),
    Mistake("step: the last chunk is whole", STEP, "left < list.chunk ? left : list.chunk",
            "list.chunk", build="sanitized"),
    Mistake("strips: rows past the end", STRIPS, "if (y >= g.out_height) return;", "",
            build="sanitized"),
    Mistake("strips: rows below the image", STRIPS, "row < 0 || row >= g.in_height", "row < 0"),
    Mistake("strips: columns left of it", STRIPS, "halo_column >= 0 && ", ""),
    Mistake("strips: columns right of it", STRIPS, " && halo_column < g.in_width", ""),
    Mistake("strips: gradients past the end", STRIPS, "if (row >= g.in_height) break;", "",
            build="sanitized"),
    Mistake("strips: windows past the last", STRIPS, "y < 0 || y >= g.out_height", "y < 0"),
    Mistake("windows: pixels past the last", WINDOWS,
            "position.pixel >= g.out_height * g.out_width || ", "", build="sanitized"),
    Mistake("windows: taps past the image", WINDOWS, "end < kernel ? end : kernel", "kernel"),
    Mistake("windows: over no window", WINDOWS, "end < windows ? end : windows", "end"),
    Mistake("windows: images only once", WINDOWS, "image += position.image_step",
            "image += g.images"),
    Mistake("gather: any tap", WINDOWS, "tap < 0 || tap >= g.kernel_height * g.kernel_width",
            "false"),
    Mistake("gather: above the image", WINDOWS, "y >= 0 && ", ""),
    Mistake("gather: below the image", WINDOWS, "y < g.in_height && ", ""),
    Mistake("gather: left of the image", WINDOWS, "x >= 0 && ", ""),
    Mistake("gather: right of the image", WINDOWS, "x < g.in_width", "true"),
    Mistake("gather: pixels past the last", WINDOWS,
            "if (pixel >= g.out_height * g.out_width || channel >= g.channels) return;", "",
            build="sanitized"),
    Mistake("indices: pixels past the last", WINDOWS,
            "if (pixel >= g.out_height * g.out_width || channel >= g.channels) return;", "", nth=-1,
            build="sanitized"),
    Mistake("windows: channels past the last", WINDOWS, " || channel >= g.channels", "",
            build="sanitized"),
    Mistake("windows: gradients past the last", WINDOWS,
            "position.pixel >= g.in_height * g.in_width || ", "", build="sanitized"),
    Mistake("windows: taps before the image", WINDOWS, "start < 0 ? -start : 0", "0"),
    Mistake("windows: over windows before it", WINDOWS,
            "position < extent ? 0 : (position - extent) / stride + 1", "0"),
    Mistake("strips: images only once", STRIPS, "image += position.image_step",
            "image += g.images"),
    Mistake("strips: gradients of images only once", STRIPS, "image += position.image_step",
            "image += g.images", nth=-1),
    Mistake("strips: windows before the first", STRIPS, "y < 0 || y >= g.out_height",
            "y >= g.out_height"),
    Mistake("strips: windows left of the row", STRIPS, "x + kNeighbour >= 0 && ", "",
            build="sanitized"),
    Mistake("strips: windows right of the row", STRIPS, " && x + kNeighbour < g.out_width", "",
            build="sanitized"),
    Mistake("winners: the last of equals", WINNER, "other > value", "other >= value"),
    Mistake("winners: no NaN", WINNER, " || other != other", ""),
    Mistake("direct: no barrier before reading", DIRECT, "__syncthreads();", "", nth=-1),
    Mistake("implicit GEMM: no wait", GEMM, "cp_async_wait<kStages - 2>();", ""),
    Mistake("implicit GEMM: no barrier", GEMM, "__syncthreads();", ""),
    Mistake("implicit GEMM: a lane is left out", GEMM, "0xffffffffu", "0x7fffffffu"),
    Mistake("weight gradient: no wait", WEIGHT, "cp_async_wait<0>();", ""),
    Mistake("weight gradient: no barrier behind the front", WEIGHT,
            "__syncthreads();  // the front", "// the front"),
    Mistake("weight gradient: no barrier behind tables", WEIGHT,
            "__syncthreads();  // the tables", "// the tables"),
    Mistake("weight gradient: no barrier between tiles", WEIGHT,
            "__syncthreads();  // the tile", "// the tile"),
    Mistake("weight gradient: no barrier before NaN is looked for", WEIGHT,
            "__syncthreads();  // all is multiplied, and looked", "// looked"),
    Mistake("weight gradient: no barrier before staging", WEIGHT,
            "__syncthreads();  // all is multiplied, and what", "// what"),
    Mistake("weight gradient: no barrier behind staging", WEIGHT,
            "__syncthreads();\n#pragma unroll", "\n#pragma unroll"),
    Mistake("weight gradient: no barrier between lanes of a weight", WEIGHT,
            "sums[thread] = sum;\n      __syncthreads();", "sums[thread] = sum;"),
    Mistake("weight gradient: pixels that do not exist", WEIGHT,
            "place != kOutside ? place + at[j] : 0", "place + at[j]"),
    Mistake("weight gradient: gradients of them", WEIGHT, "exists ? kChunkBytes : 0",
            "kChunkBytes"),
    Mistake("weight gradient: rows past the last", WEIGHT, "row < pass.result_channels && ", ""),
    Mistake("weight gradient: channels past the last", WEIGHT,
            " && channel + e % 2 < pass.source_channels", ""),
    Mistake("weight gradient: infinities are NaN", WEIGHT, "if (front.any_nan == 0) break;",
            "break;"),
    Mistake("depthwise: no barrier", DEPTHWISE, "__syncthreads();", ""),
    Mistake("sum: no barrier before reading", SUM, "__syncthreads();", ""),
    Mistake("sum: no barrier before writing", SUM, "__syncthreads();", "", nth=-1),
    Mistake("sum: a lane is left out", SUM, "(kAllLanes, value", "(kAllLanes >> 1, value"),
    Mistake("product: no wait", PRODUCT, "cp_async_wait<kStages - 2>();", ""),
    Mistake("product: waits for too few", PRODUCT, "cp_async_wait<kStages - 2>();",
            "cp_async_wait<kStages - 1>();"),
    Mistake("product: no barrier", PRODUCT, "__syncthreads();", ""),
    Mistake("product: loads past the end", PRODUCT, "row0 + row < m && ", "", build="sanitized"),
    Mistake("product: stores past the end", PRODUCT, "if (row < m && column < n)",
            "if (column < n)", build="sanitized"),
]  # fmt: skip


def mistaken_unit(mistake: Mistake, folder: Path, flags: list[str]) -> Unit:
    """The source that holds, or includes, a mistake."""
    folder.mkdir()
    own = folder / mistake.file.name
    own.write_text(mistake.text(), encoding="utf-8")
    includes = INCLUDES
    source = own
    if mistake.file in (SUM, PRODUCT):
        # The file beside the source is found first, so that the source comes along.
        source = folder / EMULATOR_TESTS.name
        source.write_text(EMULATOR_TESTS.read_text(encoding="utf-8"), encoding="utf-8")
    elif mistake.file == WINNER:
        source = WINDOWS
        nested = folder / "kernels" / "cuda"
        nested.mkdir(parents=True)
        own.rename(nested / own.name)
        includes = [f"-I{folder}", *INCLUDES]
    return Unit(source, [*FLAGS, "-w", *flags, *includes], name=folder.name)


@pytest.fixture(scope="module")
def mistaken(
    programs: dict[str, Programs], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The object of each mistake, by name."""
    compiler = find_compiler()
    folder = tmp_path_factory.mktemp("mistakes")
    units = [
        mistaken_unit(mistake, folder / f"mistake{i}", BUILDS[mistake.build])
        for i, mistake in enumerate(MISTAKES)
    ]
    objects = compile_units(compiler, units, folder)
    return {mistake.name: made for mistake, made in zip(MISTAKES, objects, strict=True)}


@pytest.mark.parametrize(
    ("build", "mistake"),
    [pytest.param(m.build, m, id=m.name) for m in MISTAKES],
    indirect=["build"],
)
def test_mistakes_are_found(build: Programs, mistake: Mistake, mistaken: dict[str, Path]) -> None:
    made = mistaken[mistake.name]
    if mistake.file in (SUM, PRODUCT):
        command = build.emulator_tests(made.stem, made)
    else:
        source = WINDOWS if mistake.file == WINNER else mistake.file
        of_convolution = mistake.file in (DIRECT, GEMM, WEIGHT, DEPTHWISE)
        cases, convolutions = (0, 12) if of_convolution else (100, 0)
        command = build.kernel_tests(made.stem, cases, convolutions, {source: made})
    done = run(command)
    assert done.returncode != 0, f"nothing sees it:\n{done.stdout}"
    # It is the checks that see it, or a sanitizer, and not the system that ends the program.
    assert re.search(r"^failures: [1-9]", done.stdout, re.MULTILINE) or (
        "AddressSanitizer" in done.stderr
    ), f"exit status {done.returncode}:\n{done.stdout}\n{done.stderr}"
