"""The machine code of the CUDA kernels is within its budget, and the budget can be exceeded."""

from __future__ import annotations

from pathlib import Path

import cuda_budget
import pytest
from compiling import TEST_ALL
from cuda_budget import Budget, BudgetError, Kernel, Toolkit, ToolMissingError

# One kernel each that does what a rule of the budget forbids, and one that does none of it.
SAMPLES = {
    "wide": """
namespace sample {
namespace {
template <class T>
struct alignas(16) Vector {
  T values[16 / sizeof(T)];
};
template <class T>
__global__ void scale(Vector<T>* data, T factor) {
  Vector<T> vector = data[threadIdx.x];
  for (T& value : vector.values) value *= factor;
  data[threadIdx.x] = vector;
}
}  // namespace
void launch(Vector<float>* floats, Vector<double>* doubles) {
  scale<<<1, 32>>>(floats, 2.0f);
  scale<<<1, 32>>>(doubles, 2.0);
}
}  // namespace sample
""",
    "double_scalar": """
__global__ void double_scalar(float* data, double factor) { data[threadIdx.x] *= factor; }
""",
    # The loads are apart for the compiler: the stores between them may change what they read.
    "narrow": """
template <class T>
__global__ void narrow(T* data, const T* other) {
  for (int i = 0; i < 4; ++i) data[4 * threadIdx.x + i] += other[4 * threadIdx.x + i];
}
template __global__ void narrow<float>(float*, const float*);
""",
    "local_array": """
__global__ void local_array(float* data, const int* places) {
  float values[32] = {};
  for (int i = 0; i < 32; ++i) values[places[i] & 31] += data[i];
  for (int i = 0; i < 32; ++i) data[i] = values[i];
}
""",
    # 1024 threads leave 64 registers each.
    "spilling": """
__global__ void __launch_bounds__(1024) spilling(float* data) {
  float values[96];
#pragma unroll
  for (int i = 0; i < 96; ++i) values[i] = data[1024 * i + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 96; ++i) data[1024 * i + threadIdx.x] = values[95 - i];
}
""",
    "many_registers": """
__global__ void __launch_bounds__(256) many_registers(float* data) {
  float values[48];
#pragma unroll
  for (int i = 0; i < 48; ++i) values[i] = data[256 * i + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 48; ++i) data[256 * i + threadIdx.x] = values[47 - i];
}
""",
    "shared": """
__global__ void shared(float* data) {
  __shared__ float values[256];
  values[threadIdx.x] = data[threadIdx.x];
  __syncthreads();
  data[threadIdx.x] = values[255 - threadIdx.x];
}
""",
    # One pointer for both kinds of memory.
    "generic": """
__global__ void generic(float* data, bool keep) {
  __shared__ float values[32];
  (keep ? values : data)[threadIdx.x] = 1;
  __syncthreads();
  data[threadIdx.x] = values[31 - threadIdx.x];
}
""",
}
SAMPLE_BUDGET = """
[scale<*>]
max_registers = 24
min_loads_128 = 1
min_stores_128 = 1

[narrow<*>]
max_registers = 24
min_loads_128 = 1

[double_scalar]
max_registers = 16

[many_registers]
max_registers = 40

[local_array]
max_registers = 64

[spilling]
max_registers = 64

[shared]
max_registers = 16

[generic]
max_registers = 16
max_static_shared_bytes = 128
"""

PTXAS = """\
ptxas info    : 24 bytes gmem, 24 bytes cmem[4]
ptxas info    : Compiling entry function '_Z6callerPfid' for 'sm_80'
ptxas info    : Function properties for _Z6callerPfid
    8 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 28 registers, used 1 barriers, 160 bytes cumulative stack size, 1024 bytes \
smem, 376 bytes cmem[0], 16 bytes cmem[2]
ptxas info    : Compile time = 6.094 ms
ptxas info    : Function properties for _Z3recPfid
    152 bytes stack frame, 16 bytes spill stores, 0 bytes spill loads
ptxas info    : Compiling entry function '_Z5plainPf' for 'sm_90a'
ptxas info    : Function properties for _Z5plainPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers
ptxas info    : Compile time = 1.514 ms
"""

SASS = """\
	.target	sm_80
//--------------------- .text._Z6callerPfid --------------------------
	.section	.text._Z6callerPfid,"ax",@progbits
.text._Z6callerPfid:
        .type           _Z6callerPfid,@function
_Z6callerPfid:
        /*0000*/                   S2R R2, SR_TID.X ;
        /*0010*/              @!P0 LDG.E.LTC128B.128.CONSTANT R8, [R2.64] ;
        /*0020*/             @!UP0 LD.E.64 R8, [R2.64] ;
        /*0030*/               @P0 LDG.E.U8 R8, [R2.64] ;
.L_x_1:
        /*0040*/                   STG.E [R2.64], R4 ;
        /*0050*/                   LDGSTS.E.BYPASS.128 [R0], [R2.64] ;
        /*0060*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0070*/                   DEPBAR.LE SB0, 0x1 ;
$_Z6callerPfid$_Z3recPfid:
        /*0080*/                   DSETP.GTU.AND P0, PT, |R6|, +INF , PT ;
        /*0090*/                   F2F.F32.F64 R6, R6 ;
        /*00a0*/                   MUFU.RCP64H R7, R9 ;
        /*00b0*/                   STL.128 [R1], R4 ;
        /*00c0*/                   LDL.LU R4, [R1] ;
.text._Z5plainPf:
_Z5plainPf:
        /*0000*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0010*/                   LDSM.16.M88.4 R8, [R2] ;
        /*0018*/                   HGMMA.64x64x16.F32 R24, gdesc[UR8], R24, gsb0 ;
        /*001c*/                   UTMALDG.5D [UR8], [UR4], desc[UR6] ;
        /*0020*/                   LDC.64 R2, c[0x0][0x210] ;
"""


def toolkit() -> Toolkit:
    """Return the tools, or skip."""
    try:
        return cuda_budget.find_toolkit()
    except ToolMissingError as error:
        pytest.skip(str(error))


def make_kernel(name: str, **measures: int) -> Kernel:
    return Kernel(name, "sm_80", "a.cu", dict.fromkeys(cuda_budget.MEASURES, 0) | measures)


def failures(kernels: list[Kernel], budget: str) -> list[str]:
    return cuda_budget.check(kernels, cuda_budget.read_budget(budget))


@pytest.mark.slow
def test_kernels_are_within_their_budgets() -> None:
    # Of two architectures nothing new is found by the second nearly always, and minutes are spent.
    architectures = cuda_budget.ARCHITECTURES if TEST_ALL else cuda_budget.ARCHITECTURES[-1:]
    kernels = cuda_budget.measure_folder(toolkit(), architectures=architectures)
    budget = cuda_budget.read_budget(cuda_budget.BUDGET.read_text(encoding="utf-8"))
    found = cuda_budget.check(kernels, budget)
    assert not found, "\n".join(found)


@pytest.fixture(scope="module")
def failures_of_samples(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What the rules for all kernels, as they are checked in, find in the samples."""
    folder = tmp_path_factory.mktemp("samples")
    for name, source in SAMPLES.items():
        (folder / f"{name}.cu").write_text(source, encoding="utf-8")
    kernels = cuda_budget.measure_folder(toolkit(), folder, folder)
    budget = cuda_budget.read_budget(cuda_budget.BUDGET.read_text(encoding="utf-8"))
    rules = {section: budget.sections[section] for section in ("*", "*<*double*>")}
    of_samples = cuda_budget.read_budget(SAMPLE_BUDGET).sections
    return cuda_budget.check(kernels, Budget(rules | of_samples))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", cuda_budget.ARCHITECTURES)
@pytest.mark.parametrize(
    ("kernel", "measures"),
    [
        ("scale<float>", set()),
        ("scale<double>", set()),
        ("double_scalar", {"double_instructions"}),
        ("narrow<float>", {"loads_128"}),
        ("local_array", {"local_accesses", "stack_bytes"}),
        ("spilling", {"local_accesses", "spill_bytes", "stack_bytes"}),
        ("many_registers", {"registers"}),
        ("shared", {"static_shared_bytes"}),
        ("generic", {"generic_accesses"}),
    ],
)
def test_what_exceeds_the_budget_is_reported(
    failures_of_samples: list[str], kernel: str, measures: set[str], architecture: str
) -> None:
    place = f"{kernel} on {architecture} ("
    reported = [line for line in failures_of_samples if line.startswith(place)]
    assert {line.partition("): ")[2].split()[0] for line in reported} == measures, reported


@pytest.mark.slow
def test_a_source_that_does_not_compile_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "broken.cu").write_text("int broken = ;\n", encoding="utf-8")
    with pytest.raises(BudgetError, match=r"broken[.]cu"):
        cuda_budget.measure_folder(toolkit(), tmp_path, tmp_path)


# The emulator's own test kernels, of which a GPU's compiler makes what they are to exercise.
TEST_KERNELS = """
#include "{folder}/block_sum.cuh"
#include "{folder}/matrix_product.cuh"
namespace cuda_kernel_tests {{
template <class T>
using Product = void (*)(const T*, const T*, float*, int, int, int);
Product<float16> of_float16() {{ return matrix_product_kernel<float16>; }}
Product<bfloat16> of_bfloat16() {{ return matrix_product_kernel<bfloat16>; }}
}}
"""


@pytest.mark.slow
@pytest.mark.parametrize("architecture", cuda_budget.ARCHITECTURES)
def test_instructions_of_tensor_cores(architecture: str, tmp_path: Path) -> None:
    source = tmp_path / "test_kernels.cu"
    folder = cuda_budget.ROOT / "tests" / "cuda_kernels"
    source.write_text(TEST_KERNELS.format(folder=folder), encoding="utf-8")
    kernels = cuda_budget.measure_source(toolkit(), source, architecture, cuda_budget.INCLUDE)
    measures = {kernel.name: kernel.measures for kernel in kernels}
    for name in ("matrix_product_kernel<float16>", "matrix_product_kernel<bfloat16>"):
        for instructions in ("tensor_products", "matrix_loads", "async_copies", "block_barriers"):
            assert measures[name][instructions] > 0, f"{name}: no {instructions}"
        assert measures[name]["spill_bytes"] == 0, name
    assert measures["matrix_product_tf32_kernel"]["tensor_products"] > 0


def test_no_source_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=r"no [.]cu file"):
        cuda_budget.measure_folder(Toolkit("nvcc", "nvdisasm", "c++filt"), tmp_path, tmp_path)


def test_ptxas_report() -> None:
    assert cuda_budget.parse_ptxas(PTXAS) == {
        "_Z6callerPfid": {
            "registers": 28,
            "spill_bytes": 28,
            "stack_bytes": 160,
            "static_shared_bytes": 1024,
            "constant_bytes": 392,
        },
        "_Z5plainPf": {
            "registers": 8,
            "spill_bytes": 0,
            "stack_bytes": 0,
            "static_shared_bytes": 0,
            "constant_bytes": 0,
        },
    }


def test_disassembly() -> None:
    assert cuda_budget.parse_sass(SASS) == {
        "_Z6callerPfid": {
            "instructions": 13,
            "double_instructions": 3,
            "local_accesses": 2,
            "generic_accesses": 1,
            "loads_128": 1,
            "loads_64": 1,
            "loads_narrow": 1,
            "stores_narrow": 1,
            "async_copies": 1,
            "block_barriers": 1,
        },
        "_Z5plainPf": {
            "instructions": 5,
            "tensor_products": 1,
            "matrix_loads": 1,
            "warpgroup_products": 1,
            "tensor_copies": 1,
        },
    }


@pytest.mark.parametrize(
    ("demangled", "name"),
    [
        ("plain", "plain"),
        ("sample::plain(float*, double)", "plain"),
        (
            "void sample::(anonymous namespace)::step<sample::half, (sample::Mode)1, 64>"
            "(sample::half*, void (*)(int))",
            "step<half, (Mode)1, 64>",
        ),
        (
            "void each<void (*)(float), __nv_bfloat16>(float*)",
            "each<void (*)(float), __nv_bfloat16>",
        ),
    ],
)
def test_names_are_short(demangled: str, name: str) -> None:
    assert cuda_budget.shorten_name(demangled) == name


def test_the_last_section_decides() -> None:
    budget = (
        "[*]\nmax_spill_bytes = 0\n"
        "[step<*>]\nmax_registers = 16\nmin_loads_128 = 2\n"
        "[step<double, *>]\nmax_registers = 32\nmax_spill_bytes = any\n"
    )
    wide = make_kernel("step<double, 1>", registers=32, spill_bytes=8, loads_128=2)
    assert failures([make_kernel("step<float, 1>", registers=16, loads_128=3), wide], budget) == []
    excess = make_kernel("step<float, 1>", registers=17, spill_bytes=8, loads_128=1)
    assert failures([excess, wide], budget) == [
        "step<float, 1> on sm_80 (a.cu): spill_bytes 8, [*] allows 0",
        "step<float, 1> on sm_80 (a.cu): registers 17, [step<*>] allows 16",
        "step<float, 1> on sm_80 (a.cu): loads_128 1, [step<*>] asks for at least 2",
    ]


def test_a_section_for_one_architecture() -> None:
    budget = "[step<*>]\nmax_registers = 16\n[step<*> on sm_90a]\nmin_warpgroup_products = 2\n"
    elsewhere = make_kernel("step<float>")
    there = Kernel("step<float>", "sm_90a", "a.cu", {**elsewhere.measures})
    assert failures([elsewhere, there], budget) == [
        "step<float> on sm_90a (a.cu): warpgroup_products 0, "
        "[step<*> on sm_90a] asks for at least 2",
    ]
    assert failures([elsewhere], budget) == ["[step<*> on sm_90a] names no kernel"]


def test_the_budget_cannot_rot() -> None:
    budget = (
        "[*]\nmax_spill_bytes = 0\n"
        "[gone<*>]\nmax_registers = 16\n"
        "[idle]\nmax_registers = 8\n"
        "[idl?]\nmax_registers = 16\n"
    )
    assert failures([make_kernel("new<float>"), make_kernel("idle")], budget) == [
        "new<float> (a.cu) has no budget: no section with max_registers names it",
        "[gone<*>] names no kernel",
        "[idle] decides nothing: later sections overrule it",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[step]\nmax_speed = 1\n", "max_speed: no such limit"),
        ("[step]\nregisters = 1\n", "registers: no such limit"),
        ("[step]\nmax_registers = few\n", "'few' is neither a number nor 'any'"),
        ("max_registers = 1\n", "no section headers"),
        ("[step]\n[step]\n", "already exists"),
    ],
)
def test_a_wrong_budget_is_an_error(text: str, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        cuda_budget.read_budget(text)


def test_update_writes_numbers_and_keeps_the_rest() -> None:
    text = (
        "# A reason.\n"
        "[*]\nmax_static_shared_bytes = 0\n\n"
        "[step<*>]\n# Another reason.\nmax_registers = 8\nmax_static_shared_bytes = 8\n"
        "max_spill_bytes = 0\n"
    )
    kernels = [
        make_kernel("step<float>", registers=17, static_shared_bytes=64, spill_bytes=4),
        make_kernel("step<int>", registers=9),
        make_kernel("new<float>", registers=40, static_shared_bytes=12),
        make_kernel("plain", registers=33),
    ]
    assert cuda_budget.update(text, kernels) == (
        "# A reason.\n"
        "[*]\nmax_static_shared_bytes = 0\n\n"
        "[step<*>]\n# Another reason.\nmax_registers = 24\nmax_static_shared_bytes = 64\n"
        "max_spill_bytes = 0\n\n"
        "[new<*>]\nmax_registers = 40\nmax_static_shared_bytes = 12\n\n"
        "[plain]\nmax_registers = 40\n"
    )
