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
    TEST_ALL,
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
    PROGRAM / "conv2d_block_tests.cpp",
    PROGRAM / "conv2d_tests.cpp",
    PROGRAM / "kernel_tests.cpp",
    PROGRAM / "plan_tests.cpp",
    PROGRAM / "wgmma_tests.cpp",
    PROGRAM / "weight_gradient_tests.cpp",
]
BUILDS = {"plain": ["-O1"], "sanitized": SANITIZE}
# What a run of the program checks, and how often.
CHECKS = {
    **dict.fromkeys(("fixed", "accuracy", "weight_accuracy"), 1),
    **dict.fromkeys(("step_plan", "pool_plan", "conv2d_plan", "block_plan"), 300),
    **dict.fromkeys(("max_pool2d", "foreign_argmax", "gradient_step"), 300),
    **dict.fromkeys(("conv2d", "wgmma"), 24),
    **dict.fromkeys(("block", "weight_gradient", "depthwise"), 80),
    **dict.fromkeys(("planned_conv2d", "specials"), 120),
}
# The sanitized program takes several times as long.
SANITIZED_CHECKS = {name: max(1, times // 16) for name, times in CHECKS.items()}


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
        """Link the objects of some sources, of which some are replaced.

        These come first: of an inline function that several objects have, the first one's is taken.
        """
        objects = sorted(
            (replaced.get(source, self.objects[source]) for source in [SUPPORT, *sources]),
            key=lambda one: one not in replaced.values(),
        )
        return link(self.compiler, [*FLAGS, *self.flags], objects, self.folder / name)

    def emulator_tests(self, name: str, replaced: Path | None = None) -> list[str]:
        """The command that tests the emulator."""
        replacements = {} if replaced is None else {EMULATOR_TESTS: replaced}
        return [str(self.link([EMULATOR_TESTS], name, replacements))]

    def kernel_tests(
        self,
        name: str,
        checks: dict[str, int],
        replaced: dict[Path, Path] | None = None,
        *,
        only_first: bool = False,
    ) -> list[str]:
        """The command that tests the kernels."""
        program = self.link(KERNEL_TESTS, name, replaced or {})
        chosen = [f"{check}={times}" for check, times in checks.items()]
        return [str(program), "1", *(["--first"] if only_first else []), *chosen]


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
    checks = SANITIZED_CHECKS if "-fsanitize=address,undefined" in build.flags else CHECKS
    check_passes(build.kernel_tests("kernel_tests", checks), 2000)


@dataclass(frozen=True)
class Mistake:
    """A change of one line of a file that must turn the tests red, in the build that sees it."""

    name: str
    file: Path
    line: str  # the first that is like it; the last, counting from the end, where `nth` is negative
    instead: str
    nth: int = 0
    build: str = "plain"
    source: Path | None = None  # of a header: that in which the mistake is made
    rare: bool = False  # made only under TEST_ALL

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
GEMM = KERNELS / "conv2d_implicit_gemm.cuh"
PATCH = KERNELS / "source_patch.cuh"
RESULTS = KERNELS / "tile_results.cuh"
TENSOR_PRODUCTS = KERNELS / "tensor_products.cuh"
WEIGHT = KERNELS / "conv2d_weight_gradient.cu"
DEPTHWISE = KERNELS / "conv2d_depthwise.cu"
TILES = KERNELS / "conv2d_depthwise_tiles.cu"
TILE_WEIGHT = KERNELS / "conv2d_depthwise_weight.cu"
TILE_ROWS = KERNELS / "depthwise_tiles.cuh"
WARP_SUM = KERNELS / "warp_sum.cuh"
WGMMA = KERNELS / "conv2d_wgmma.cu"
SUM = PROGRAM / "block_sum.cuh"
PRODUCT = PROGRAM / "matrix_product.cuh"
WINNER = KERNELS / "max_pool2d_device.cuh"
# Of headers: the source in which a mistake is made. (In products of parts what is no number is
# computed again, and hides what is never written.)
SOURCE_OF = {
    WINNER: WINDOWS,
    GEMM: KERNELS / "conv2d_implicit_gemm_float16.cu",
    PATCH: KERNELS / "conv2d_implicit_gemm_float16.cu",
    RESULTS: KERNELS / "conv2d_implicit_gemm_float16.cu",
    TILE_ROWS: TILES,
    WARP_SUM: TILE_WEIGHT,
}
PARTS = KERNELS / "conv2d_implicit_gemm_tf32_parts.cu"

MISTAKES = [
    Mistake("step: stores past the end", STEP, "if (i >= end) break;", "", nth=1,
            build="sanitized"),
    Mistake("step: loads past the end", STEP, "if (i >= end) break;", "", build="sanitized",
            rare=True),
    Mistake("step: vectors anywhere", STEP, "addresses % kVectorBytes == 0", "true"),
    Mistake("step: another tensor's chunk", STEP, "[middle] <= block", "[middle] < block"),
    Mistake("step: the last chunk is whole", STEP, "left < list.chunk ? left : list.chunk",
            "list.chunk", build="sanitized", rare=True),
    Mistake("strips: rows past the end", STRIPS, "if (y >= g.out_height) return;", "",
            build="sanitized", rare=True),
    Mistake("strips: rows below the image", STRIPS, "row < 0 || row >= g.in_height", "row < 0"),
    Mistake("strips: columns left of it", STRIPS, "halo_column >= 0 && ", ""),
    Mistake("strips: columns right of it", STRIPS, " && halo_column < g.in_width", "", rare=True),
    Mistake("strips: gradients past the end", STRIPS, "if (row >= g.in_height) break;", "",
            build="sanitized", rare=True),
    Mistake("strips: windows past the last", STRIPS, "y < 0 || y >= g.out_height", "y < 0",
            rare=True),
    Mistake("windows: pixels past the last", WINDOWS,
            "position.pixel >= g.out_height * g.out_width || ", "", build="sanitized"),
    Mistake("windows: taps past the image", WINDOWS, "end < kernel ? end : kernel", "kernel"),
    Mistake("windows: over no window", WINDOWS, "end < windows ? end : windows", "end", rare=True),
    Mistake("windows: images only once", WINDOWS, "image += position.image_step",
            "image += g.images", rare=True),
    Mistake("gather: any tap", WINDOWS, "tap < 0 || tap >= g.kernel_height * g.kernel_width",
            "false"),
    Mistake("gather: above the image", WINDOWS, "y >= 0 && ", "", rare=True),
    Mistake("gather: below the image", WINDOWS, "y < g.in_height && ", "", rare=True),
    Mistake("gather: left of the image", WINDOWS, "x >= 0 && ", "", rare=True),
    Mistake("gather: right of the image", WINDOWS, "x < g.in_width", "true", rare=True),
    Mistake("gather: pixels past the last", WINDOWS,
            "if (pixel >= g.out_height * g.out_width || channel >= g.channels) return;", "",
            build="sanitized", rare=True),
    Mistake("indices: pixels past the last", WINDOWS,
            "if (pixel >= g.out_height * g.out_width || channel >= g.channels) return;", "", nth=-1,
            build="sanitized", rare=True),
    Mistake("windows: channels past the last", WINDOWS, " || channel >= g.channels", "",
            build="sanitized", rare=True),
    Mistake("windows: gradients past the last", WINDOWS,
            "position.pixel >= g.in_height * g.in_width || ", "", build="sanitized", rare=True),
    Mistake("windows: taps before the image", WINDOWS, "start < 0 ? -start : 0", "0", rare=True),
    Mistake("windows: over windows before it", WINDOWS,
            "position < extent ? 0 : (position - extent) / stride + 1", "0", rare=True),
    Mistake("strips: images only once", STRIPS, "image += position.image_step",
            "image += g.images", rare=True),
    Mistake("strips: gradients of images only once", STRIPS, "image += position.image_step",
            "image += g.images", nth=-1, rare=True),
    Mistake("strips: windows before the first", STRIPS, "y < 0 || y >= g.out_height",
            "y >= g.out_height", rare=True),
    Mistake("strips: windows left of the row", STRIPS, "x + kNeighbour >= 0 && ", "",
            build="sanitized", rare=True),
    Mistake("strips: windows right of the row", STRIPS, " && x + kNeighbour < g.out_width", "",
            build="sanitized", rare=True),
    Mistake("winners: the last of equals", WINNER, "other > value", "other >= value"),
    Mistake("winners: no NaN", WINNER, " || other != other", ""),
    Mistake("direct: no barrier before reading", DIRECT, "__syncthreads();", "", nth=-1),
    Mistake("direct: no barrier before staging", DIRECT,
            "__syncthreads();  // the last slice is multiplied", "", rare=True),
    Mistake("direct: no barrier before pooling", DIRECT,
            "__syncthreads();  // all results are staged", "", rare=True),
    Mistake("implicit GEMM: no wait", GEMM, "cp_async_wait<kAhead - 1>();", ""),
    Mistake("implicit GEMM: waits for too few", GEMM, "cp_async_wait<kAhead - 1>();",
            "cp_async_wait<kAhead>();", rare=True),
    Mistake("implicit GEMM: no barrier in a step", GEMM,
            "__syncthreads();  // the step's copies are there, and the step before is multiplied",
            ""),
    Mistake("implicit GEMM: no barrier after the places", GEMM,
            "__syncthreads();  // the pixels' places are there", "", rare=True),
    Mistake("implicit GEMM: no barrier before staging", GEMM,
            "__syncthreads();  // all is multiplied", "", rare=True),
    Mistake("implicit GEMM: no barrier after staging", GEMM,
            "__syncthreads();  // all results are staged", "", rare=True),
    Mistake("implicit GEMM: slabs of one buffer", GEMM, "layout.slab_count = patch_slab_count",
            "layout.slab_count = 0 * patch_slab_count", rare=True),
    Mistake("implicit GEMM: weights of channels past the last", GEMM,
            " && channel < pass.source_channels", "", build="sanitized", rare=True),
    Mistake("implicit GEMM: bias of channels past the last", GEMM,
            "if (column >= channels) continue;", "", build="sanitized", rare=True),
    Mistake("products: a part is left out", TENSOR_PRODUCTS,
            "mma_m16n8k8_tf32(short_sums, high_a, low_b);", "",
            source=PARTS),
    Mistake("implicit GEMM: parts of infinities", GEMM, " || result == result", " || true",
            source=PARTS),
    Mistake("patch: images past the last", PATCH, "tile.image + image < pass.images &&", "",
            build="sanitized", rare=True),
    Mistake("patch: rows outside of the image", PATCH,
            "static_cast<unsigned>(row) < static_cast<unsigned>(pass.source_height) &&", ""),
    Mistake("patch: channels past the last", PATCH, " && channel + e < channels", "",
            build="sanitized", rare=True),
    Mistake("patch: chunks past the last", PATCH, " && channel < channels", "",
            build="sanitized", rare=True),
    Mistake("results: of pixels outside", RESULTS, "!at.exists || ", "", build="sanitized",
            rare=True),
    Mistake("results: of channels past the last", RESULTS, " || channel >= channels", "",
            build="sanitized", rare=True),
    Mistake("pooled: rows outside of the image", RESULTS,
            "static_cast<unsigned>(tile.row + row) >= static_cast<unsigned>(phase.rows)", "false"),
    Mistake("pooled: columns outside of the image", RESULTS,
            "static_cast<unsigned>(tile.column + column) >= static_cast<unsigned>(phase.columns)",
            "false", rare=True),
    Mistake("pooled: windows past the last", RESULTS, "y >= pool.rows ||", "",
            build="sanitized", rare=True),
    Mistake("pooled: what is clipped wins", RESULTS, "!(winner.value <= 0)", "true"),
    Mistake("weight gradient: no wait", WEIGHT, "cp_async_wait<0>();", ""),
    Mistake("weight gradient: no barrier behind the front", WEIGHT,
            "__syncthreads();  // the front", "// the front", rare=True),
    Mistake("weight gradient: no barrier behind tables", WEIGHT,
            "__syncthreads();  // the tables", "// the tables", rare=True),
    Mistake("weight gradient: no barrier between tiles", WEIGHT,
            "__syncthreads();  // the tile", "// the tile"),
    Mistake("weight gradient: no barrier before NaN is looked for", WEIGHT,
            "__syncthreads();  // all is multiplied, and looked", "// looked", rare=True),
    Mistake("weight gradient: no barrier before staging", WEIGHT,
            "__syncthreads();  // all is multiplied, and what", "// what", rare=True),
    Mistake("weight gradient: no barrier behind staging", WEIGHT,
            "__syncthreads();\n#pragma unroll", "\n#pragma unroll", rare=True),
    Mistake("weight gradient: no barrier between lanes of a weight", WEIGHT,
            "sums[thread] = sum;\n      __syncthreads();", "sums[thread] = sum;", rare=True),
    Mistake("weight gradient: pixels that do not exist", WEIGHT,
            "place != kOutside ? place + at[j] : 0", "place + at[j]"),
    Mistake("weight gradient: gradients of them", WEIGHT, "exists ? kChunkBytes : 0",
            "kChunkBytes", rare=True),
    Mistake("weight gradient: rows past the last", WEIGHT, "row < pass.result_channels && ", "",
            rare=True),
    Mistake("weight gradient: channels past the last", WEIGHT,
            " && channel + e % 2 < pass.source_channels", "", rare=True),
    Mistake("weight gradient: infinities are NaN", WEIGHT, "if (front.any_nan == 0) break;",
            "break;"),
    Mistake("depthwise: no barrier", DEPTHWISE, "__syncthreads();", ""),
    Mistake("wgmma: patches are not waited for", WGMMA,
            "wait(ring.patch_full[patch_stage.index], patch_stage.parity);", ""),
    Mistake("wgmma: weights are not waited for", WGMMA,
            "wait(ring.weights_full[weight_stage.index], weight_stage.parity);", ""),
    Mistake("wgmma: the phase before is waited for", WGMMA,
            "wait(ring.weights_full[weight_stage.index], weight_stage.parity);",
            "wait(ring.weights_full[weight_stage.index], weight_stage.parity ^ 1);", rare=True),
    Mistake("wgmma: patches are filled too early", WGMMA,
            "wait(ring.patch_empty[patch_stage.index], patch_stage.parity ^ 1);", "", rare=True),
    Mistake("wgmma: weights are filled too early", WGMMA,
            "wait(ring.weights_empty[weight_stage.index], weight_stage.parity ^ 1);", "",
            rare=True),
    Mistake("wgmma: the phase to come is waited for", WGMMA,
            "wait(ring.weights_empty[weight_stage.index], weight_stage.parity ^ 1);",
            "wait(ring.weights_empty[weight_stage.index], weight_stage.parity);", rare=True),
    Mistake("wgmma: one warp hands a stage back", WGMMA,
            "init_barrier(ring.weights_empty[i], kConsumerWarps);",
            "init_barrier(ring.weights_empty[i], 1);", rare=True),
    Mistake("wgmma: a stage is handed back before it is read", WGMMA, "wgmma_wait<1>();", ""),
    Mistake("wgmma: weights are never handed back", WGMMA,
            "if (slab + tap > 0) arrive(ring.weights_empty[used_weights]);", "", rare=True),
    Mistake("wgmma: patches are never handed back", WGMMA,
            "if (slab > 0 && tap == 0) arrive(ring.patch_empty[used_patch]);", "", rare=True),
    Mistake("wgmma: too few bytes are expected", WGMMA,
            "arrive_expecting(weights_full, kWeightBytes);",
            "arrive_expecting(weights_full, kWeightBytes / 2);", rare=True),
    Mistake("wgmma: copies do not see barriers", WGMMA, "publish_barriers();", "", rare=True),
    Mistake("wgmma: no barrier before copies", WGMMA, "__syncthreads();", "", rare=True),
    Mistake("wgmma: no barrier before staging", WGMMA, "__syncthreads();", "", nth=1, rare=True),
    Mistake("wgmma: no barrier before storing", WGMMA, "__syncthreads();", "", nth=2, rare=True),
    Mistake("wgmma: no fence", WGMMA, "wgmma_fence();", "", rare=True),
    Mistake("wgmma: no group", WGMMA, "wgmma_commit();", "", rare=True),
    Mistake("wgmma: sums are not waited for", WGMMA, "wgmma_finish(sums);", ""),
    Mistake("wgmma: rows of a patch without its border", WGMMA,
            "below.width * kChunkBytes, false", "kWgmmaColumns * kChunkBytes, false", rare=True),
    Mistake("wgmma: weights are not swizzled", WGMMA, "8 * kWeightRowBytes, true",
            "8 * kWeightRowBytes, false"),
    Mistake("wgmma: planes are half as far apart", WGMMA, "i * 2 * plane_bytes",
            "i * plane_bytes", rare=True),
    Mistake("wgmma: chunks past the last", WGMMA,
            "(channels + kProductDepth - 1) / kProductDepth", "kSlabProducts", rare=True),
    Mistake("wgmma: bias of channels past the last", WGMMA,
            "if (channel >= channels) continue;", "", build="sanitized", rare=True),
    Mistake("wgmma: weights at any address", WGMMA,
            "(-shared_address(shared) & (kSwizzleBytes - 1))", "0", rare=True),
    Mistake("tiles: no barrier", TILES, "__syncthreads();", ""),
    Mistake("tiles: rows outside of the image", TILE_ROWS,
            "static_cast<unsigned>(first_row + i) < static_cast<unsigned>(source_height)", "true"),
    Mistake("tiles: columns outside of it", TILE_ROWS,
            "static_cast<unsigned>(column_ + i) < static_cast<unsigned>(source_width)", "true",
            rare=True),
    Mistake("tiles: left of the row", TILE_ROWS, "has_left_(column_ > 0)", "has_left_(true)"),
    Mistake("tiles: right of the row", TILE_ROWS, "column_ + kOwn < source_width", "true",
            rare=True),
    Mistake("tiles: rows past the last", TILES, "exists = y + i < g.result_height",
            "exists = true", build="sanitized", rare=True),
    Mistake("tiles: columns past the last", TILES, "exists && x + j < g.result_width", "exists",
            rare=True),
    Mistake("tiles: pixels past the last", TILES, "exists && x + j < g.result_width", "exists",
            nth=-1, build="sanitized", rare=True),
    Mistake("tiles: planes past the last", TILES,
            "if (image >= static_cast<uint32_t>(g.images)) return;", "", build="sanitized",
            rare=True),
    Mistake("tiles: channels past the last", TILES, "channel >= g.groups || ", "",
            build="sanitized", rare=True),
    Mistake("tile sums: no barrier", TILE_WEIGHT, "__syncthreads();", ""),
    Mistake("tile sums: no barrier before reading", TILE_WEIGHT, "__syncthreads();", "", nth=1,
            rare=True),
    Mistake("tile sums: no barrier before writing", TILE_WEIGHT, "__syncthreads();", "", nth=-1,
            rare=True),
    Mistake("tile sums: a lane is left out", WARP_SUM, "0xffffffffu", "0x7fffffffu", rare=True),
    Mistake("tile sums: results that do not exist", TILE_WEIGHT, "if (!exists(y, x)) continue;",
            "", rare=True),
    Mistake("tile sums: tiles past the last", TILE_WEIGHT,
            "begin + tiles_per_part < tiles ? begin + tiles_per_part : tiles",
            "begin + tiles_per_part", build="sanitized", rare=True),
    Mistake("tile sums: channels past the last", TILE_WEIGHT,
            "if (first_channel + own_channel < g.groups)", "if (true)", build="sanitized",
            rare=True),
    Mistake("sum: no barrier before reading", SUM, "__syncthreads();", ""),
    Mistake("sum: no barrier before writing", SUM, "__syncthreads();", "", nth=-1, rare=True),
    Mistake("sum: a lane is left out", SUM, "(kAllLanes, value", "(kAllLanes >> 1, value"),
    Mistake("product: no wait", PRODUCT, "cp_async_wait<kStages - 2>();", ""),
    Mistake("product: waits for too few", PRODUCT, "cp_async_wait<kStages - 2>();",
            "cp_async_wait<kStages - 1>();", rare=True),
    Mistake("product: no barrier", PRODUCT, "__syncthreads();", ""),
    Mistake("product: loads past the end", PRODUCT, "row0 + row < m && ", "", build="sanitized",
            rare=True),
    Mistake("product: stores past the end", PRODUCT, "if (row < m && column < n)",
            "if (column < n)", build="sanitized", rare=True),
]  # fmt: skip


def source_of(mistake: Mistake) -> Path:
    """The source that holds, or includes, a mistake."""
    return mistake.source or SOURCE_OF.get(mistake.file, mistake.file)


def mistaken_unit(mistake: Mistake, folder: Path, flags: list[str]) -> Unit:
    """The source with a mistake, as it is to be compiled."""
    folder.mkdir()
    own = folder / mistake.file.name
    own.write_text(mistake.text(), encoding="utf-8")
    includes = INCLUDES
    source = own
    if mistake.file in (SUM, PRODUCT):
        # The file beside the source is found first, so that the source comes along.
        source = folder / EMULATOR_TESTS.name
        source.write_text(EMULATOR_TESTS.read_text(encoding="utf-8"), encoding="utf-8")
    elif source_of(mistake) != mistake.file:
        source = source_of(mistake)
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
    made = [mistake for mistake in MISTAKES if TEST_ALL or not mistake.rare]
    units = [
        mistaken_unit(mistake, folder / f"mistake{i}", BUILDS[mistake.build])
        for i, mistake in enumerate(made)
    ]
    objects = compile_units(compiler, units, folder)
    return {mistake.name: of_it for mistake, of_it in zip(made, objects, strict=True)}


def checks_of(source: Path) -> dict[str, int]:
    """The checks that are to see a mistake in a source, and how often they may try."""
    name = source.stem
    if not name.startswith("conv2d"):
        return dict.fromkeys(("max_pool2d", "foreign_argmax", "gradient_step"), 100)
    if name.startswith("conv2d_depthwise"):
        return {"depthwise": 60, "conv2d": 6}
    if name == "conv2d_weight_gradient":
        return {"weight_gradient": 60, "weight_accuracy": 1}
    if name == "conv2d_wgmma":
        return {"wgmma": 40}
    return {"accuracy": 1, "specials": 30, "block": 30, "conv2d": 15}


@pytest.mark.parametrize(
    ("build", "mistake"),
    [
        pytest.param(
            mistake.build,
            mistake,
            id=mistake.name,
            marks=pytest.mark.skipif(
                mistake.rare and not TEST_ALL,
                reason="CNNKERNELS_TEST_ALL=1 makes every mistake",
            ),
        )
        for mistake in MISTAKES
    ],
    indirect=["build"],
)
def test_mistakes_are_found(build: Programs, mistake: Mistake, mistaken: dict[str, Path]) -> None:
    made = mistaken[mistake.name]
    if mistake.file in (SUM, PRODUCT):
        command = build.emulator_tests(made.stem, made)
    else:
        source = source_of(mistake)
        command = build.kernel_tests(made.stem, checks_of(source), {source: made}, only_first=True)
    done = run(command)
    assert done.returncode != 0, f"nothing sees it:\n{done.stdout}"
    # It is the checks that see it, or a sanitizer, and not the system that ends the program.
    assert re.search(r"^failures: [1-9]", done.stdout, re.MULTILINE) or (
        "AddressSanitizer" in done.stderr
    ), f"exit status {done.returncode}:\n{done.stdout}\n{done.stderr}"
