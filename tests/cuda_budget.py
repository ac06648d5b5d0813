"""Holds the machine code of the CUDA kernels to ``cuda_budget.ini``; it needs no GPU.

    python tests/cuda_budget.py            exit status 1, and a line for each excess
    python tests/cuda_budget.py --show     what each kernel takes
    python tests/cuda_budget.py --update   writes registers and shared memory into the budget

Every ``csrc/kernels/cuda/*.cu`` is compiled to a cubin for each of ``ARCHITECTURES``. What ptxas
says of a kernel (registers, memory) and how often each kind of instruction stands in its
disassembly are its *measures*; the budget file bounds them. nvcc brings ptxas. nvdisasm comes from
the same toolkit or from PyPI, as nvidia-cuda-nvdisasm.

A kernel goes by its name and template arguments, ``gradient_step<float, true>``: without its
namespaces, its parameters, and the hash of the file that an anonymous namespace brings along. What
holds for one architecture alone is a budget of ``gradient_step<float, true> on sm_90a``.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import configparser
import fnmatch
import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

# Both the script and the tests that import it find what the build knows.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "build_backend"))
from cuda_build import NVCC_FLAGS

ROOT = Path(__file__).resolve().parent.parent
INCLUDE = ROOT / "csrc"
SOURCES = INCLUDE / "kernels" / "cuda"
BUDGET = Path(__file__).resolve().with_suffix(".ini")
ARCHITECTURES = ("sm_80", "sm_90a")
# As setup.py compiles them: another flag is another kernel.
FLAGS = ("-std=c++17", *NVCC_FLAGS)
# A multiprocessor allocates registers in groups of this many a thread: fewer change nothing, and
# the next release of ptxas may well take one more.
REGISTER_GROUP = 8

PTXAS_MEASURES = (
    "registers",
    "spill_bytes",
    "stack_bytes",
    "static_shared_bytes",
    "constant_bytes",
)
# Instructions as they stand in the disassembly, not as often as they run.
SASS_MEASURES = (
    "instructions",
    "double_instructions",
    "local_accesses",
    "generic_accesses",
    "loads_128",
    "loads_64",
    "loads_narrow",
    "stores_128",
    "stores_64",
    "stores_narrow",
    "async_copies",
    "tensor_copies",
    "matrix_loads",
    "tensor_products",
    "warpgroup_products",
    "block_barriers",
)
MEASURES = PTXAS_MEASURES + SASS_MEASURES
# What a kernel cannot be without: the section that gives it is the kernel's budget.
REQUIRED = "max_registers"
UPDATED = (REQUIRED, "max_static_shared_bytes")

DOUBLE_ARITHMETIC = {"DADD", "DFMA", "DMMA", "DMNMX", "DMUL", "DSETP"}
# Conversions, roundings and atomics name the type behind a dot; so do the two halves of a double's
# reciprocal and its square root.
DOUBLE_MODIFIERS = {"F64", "RCP64H", "RSQ64H"}
INSTRUCTION_KINDS = {
    "LDL": "local_accesses",
    "STL": "local_accesses",
    "LD": "generic_accesses",
    "ST": "generic_accesses",
    "ATOM": "generic_accesses",
    "LDGSTS": "async_copies",
    "UBLKCP": "async_copies",
    "UTMALDG": "tensor_copies",
    "LDSM": "matrix_loads",
    "HMMA": "tensor_products",
    "IMMA": "tensor_products",
    "DMMA": "tensor_products",
    "HGMMA": "warpgroup_products",
    "IGMMA": "warpgroup_products",
    "QGMMA": "warpgroup_products",
    "BAR": "block_barriers",
}


class BudgetError(Exception):
    """A budget file that cannot be read, or a source that does not compile."""


class ToolMissingError(Exception):
    """A program is not on this machine; the message says which, and where it comes from."""


@dataclass(frozen=True)
class Toolkit:
    """The commands that the measurement runs."""

    nvcc: str
    nvdisasm: str
    filt: str


@dataclass(frozen=True)
class Kernel:
    """One instantiation, compiled for one architecture."""

    name: str
    architecture: str
    source: str
    measures: dict[str, int]

    @property
    def place(self) -> str:
        """The name that it has on one architecture alone."""
        return f"{self.name} on {self.architecture}"

    def is_named(self, pattern: str) -> bool:
        """Whether a section's pattern is for this kernel."""
        return any(fnmatch.fnmatchcase(name, pattern) for name in (self.name, self.place))

    def __str__(self) -> str:
        return f"{self.place} ({self.source})"


@dataclass(frozen=True)
class Limit:
    """One line of a budget: a bound on a measure. ``value`` is None where anything goes."""

    section: str
    key: str
    value: int | None

    @property
    def measure(self) -> str:
        return self.key.partition("_")[2]

    def explain_excess(self, found: int) -> str | None:
        """Return what is wrong with a measure of ``found``, or None."""
        if self.value is None:
            return None
        least = self.key.startswith("min_")
        if found >= self.value if least else found <= self.value:
            return None
        bound = "asks for at least" if least else "allows"
        return f"{self.measure} {found}, [{self.section}] {bound} {self.value}"


@dataclass(frozen=True)
class Budget:
    """The sections of a budget file. A section's name is a pattern for names of kernels."""

    sections: dict[str, list[Limit]]

    def limits(self, kernel: Kernel) -> dict[str, Limit]:
        """Return the kernel's limits: of those with the same key, the last in the file."""
        return {
            limit.key: limit
            for pattern, limits in self.sections.items()
            if kernel.is_named(pattern)
            for limit in limits
        }


# Tools


def find_nvcc() -> str:
    """Return the path of nvcc: of ``CUDA_HOME`` or ``CUDA_PATH``, on the path, or the usual one."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates = [Path(home, "bin", "nvcc") for home in homes if home]
    on_path = shutil.which("nvcc")
    candidates += [Path(on_path)] if on_path else []
    candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    for candidate in candidates:
        if candidate.is_file():
            return str(candidate)
    raise ToolMissingError("there is no nvcc: it is not in CUDA_HOME, nor on the path")


def find_nvdisasm(nvcc: str) -> str:
    """Return the path of nvdisasm: nvcc's own, or else PyPI's, or the one on the path."""
    beside = Path(nvcc).with_name("nvdisasm")
    if beside.is_file():
        return str(beside)
    try:
        files = importlib.metadata.files("nvidia-cuda-nvdisasm") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == "nvdisasm":
            return str(file.locate())
    on_path = shutil.which("nvdisasm")
    if on_path is None:
        raise ToolMissingError("there is no nvdisasm: pip install nvidia-cuda-nvdisasm")
    return on_path


def find_toolkit(nvcc: str | None = None) -> Toolkit:
    """Return the tools of this machine, or raise ToolMissingError."""
    nvcc = nvcc or find_nvcc()
    filt = shutil.which("c++filt")
    if filt is None:
        raise ToolMissingError("there is no c++filt: it comes with binutils")
    return Toolkit(nvcc, find_nvdisasm(nvcc), filt)


def run(command: list[str], stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; a failure raises BudgetError with what it said."""
    try:
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BudgetError(str(error)) from error
    if done.returncode != 0:
        raise BudgetError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")
    return done


# Measures


def parse_ptxas(text: str) -> dict[str, dict[str, int]]:
    """Return the measures that ``ptxas -v`` reports, by the mangled name of the kernel.

    Functions that a kernel calls are listed behind it. Their spills count as its own; their stack
    frames are in its cumulative stack.
    """
    kernels: dict[str, dict[str, int]] = {}
    measures: dict[str, int] = {}
    for line in text.splitlines():
        if entry := re.search(r"Compiling entry function '(\S+)'", line):
            measures = kernels[entry.group(1)] = dict.fromkeys(PTXAS_MEASURES, 0)
        elif frame := re.search(r"(\d+) bytes stack frame", line):
            measures["stack_bytes"] = max(measures["stack_bytes"], int(frame.group(1)))
            spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", line)
            measures["spill_bytes"] += sum(map(int, spills))
        elif used := re.search(r"Used (\d+) registers", line):
            measures["registers"] = int(used.group(1))
            for size, space in re.findall(
                r"(\d+) bytes (smem|cmem\[\d+\]|cumulative stack size)", line
            ):
                if space == "smem":
                    measures["static_shared_bytes"] = int(size)
                elif space == "cumulative stack size":
                    measures["stack_bytes"] = max(measures["stack_bytes"], int(size))
                else:
                    measures["constant_bytes"] += int(size)
    return kernels


def measures_of_opcode(opcode: str) -> Iterator[str]:
    """Yield the measures that an instruction such as ``LDG.E.128.CONSTANT`` adds one to."""
    yield "instructions"
    operation, *modifiers = opcode.split(".")
    if operation in DOUBLE_ARITHMETIC or DOUBLE_MODIFIERS.intersection(modifiers):
        yield "double_instructions"
    if operation in INSTRUCTION_KINDS:
        yield INSTRUCTION_KINDS[operation]
    # A load through a pointer of unknown space is one from global memory all the same.
    access = {"LDG": "loads", "LD": "loads", "STG": "stores", "ST": "stores"}.get(operation)
    if access is not None:
        width = next((width for width in ("128", "64") if width in modifiers), "narrow")
        yield f"{access}_{width}"


def parse_sass(text: str) -> dict[str, Counter[str]]:
    """Count a disassembly's instructions, by the mangled name of the kernel.

    A function that a kernel calls lies in the kernel's section and is counted there.
    """
    kernels: dict[str, Counter[str]] = {}
    counts: Counter[str] = Counter()
    for line in text.splitlines():
        if section := re.match(r"\.text\.(\S+):$", line):
            counts = kernels[section.group(1)] = Counter()
        elif code := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line):
            counts.update(measures_of_opcode(code.group(1)))
    return kernels


def shorten_name(demangled: str) -> str:
    """Return a kernel's name and template arguments, without namespaces and parameters."""
    name = demangled
    if name.endswith(")"):
        depth = 0
        for position in reversed(range(len(name))):
            depth += {")": 1, "(": -1}.get(name[position], 0)
            if depth == 0:
                name = name[:position]
                break
    name = name.removeprefix("void ").replace("(anonymous namespace)::", "")
    return re.sub(r"\b[A-Za-z_]\w*::", "", name)


def measure_source(
    toolkit: Toolkit, source: Path, architecture: str, include: Path
) -> list[Kernel]:
    """Compile a source for an architecture and return its kernels, sorted by name."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = str(Path(folder, "kernels.cubin"))
        compile_command = [toolkit.nvcc, *FLAGS, f"-I{include}", f"-arch={architecture}"]
        compile_command += ["-Xptxas", "-v", "-cubin", str(source), "-o", cubin]
        reported = parse_ptxas(run(compile_command).stderr)
        counted = parse_sass(run([toolkit.nvdisasm, "-c", cubin]).stdout)
    if reported.keys() != counted.keys():
        unknown = sorted(reported.keys() ^ counted.keys())
        raise BudgetError(f"{source.name}: ptxas and nvdisasm differ in the kernels {unknown}")
    symbols = sorted(reported)
    names = run([toolkit.filt], stdin="\n".join(symbols)).stdout.splitlines()
    kernels = []
    for symbol, name in zip(symbols, names, strict=True):
        measures = {**dict.fromkeys(MEASURES, 0), **reported[symbol], **counted[symbol]}
        kernels.append(Kernel(shorten_name(name), architecture, source.name, measures))
    return sorted(kernels, key=lambda kernel: kernel.name)


def measure_folder(
    toolkit: Toolkit,
    folder: Path = SOURCES,
    include: Path = INCLUDE,
    architectures: Iterable[str] = ARCHITECTURES,
) -> list[Kernel]:
    """Return the kernels of a folder's sources on architectures; two compilers run at once."""
    sources = sorted(folder.glob("*.cu"))
    if not sources:
        raise BudgetError(f"there is no .cu file in {folder}")

    def measure(job: tuple[Path, str]) -> list[Kernel]:
        return measure_source(toolkit, *job, include)

    jobs = [(source, architecture) for source in sources for architecture in architectures]
    with concurrent.futures.ThreadPoolExecutor(max_workers=2) as pool:
        return [kernel for kernels in pool.map(measure, jobs) for kernel in kernels]


# The budget


def read_budget(text: str) -> Budget:
    """Parse a budget file; an unknown key or a value that is no number raises BudgetError."""
    parser = configparser.ConfigParser(interpolation=None, default_section="", delimiters="=")
    try:
        parser.read_string(text)
    except configparser.Error as error:
        raise BudgetError(str(error)) from error
    sections: dict[str, list[Limit]] = {}
    for section in parser.sections():
        sections[section] = []
        for key, value in parser[section].items():
            bound, _, measure = key.partition("_")
            if bound not in ("max", "min") or measure not in MEASURES:
                raise BudgetError(f"[{section}] {key}: no such limit")
            if value != "any" and not value.isdecimal():
                raise BudgetError(f"[{section}] {key}: {value!r} is neither a number nor 'any'")
            limit = Limit(section, key, None if value == "any" else int(value))
            sections[section].append(limit)
    return Budget(sections)


def check(kernels: Iterable[Kernel], budget: Budget) -> list[str]:
    """Return a sentence for each kernel over its budget or without one, and each idle section."""
    failures = []
    homeless: set[str] = set()
    deciding: set[str] = set()
    matching: set[str] = set()
    for kernel in kernels:
        limits = budget.limits(kernel)
        # Once, not for each architecture.
        if REQUIRED not in limits and kernel.name not in homeless:
            homeless.add(kernel.name)
            place = f"{kernel.name} ({kernel.source})"
            failures.append(f"{place} has no budget: no section with {REQUIRED} names it")
        for limit in limits.values():
            deciding.add(limit.section)
            excess = limit.explain_excess(kernel.measures[limit.measure])
            if excess is not None:
                failures.append(f"{kernel}: {excess}")
        matching.update(section for section in budget.sections if kernel.is_named(section))
    for section in budget.sections:
        if section not in matching:
            failures.append(f"[{section}] names no kernel")
        elif section not in deciding:
            failures.append(f"[{section}] decides nothing: later sections overrule it")
    return failures


def update(text: str, kernels: list[Kernel]) -> str:
    """Return the budget file with the numbers of ``UPDATED`` as measured; comments stay.

    Only the sections with ``max_registers`` change: the rules for all kernels are no measurement.
    Kernels without a budget get sections at the end, one for each template.
    """
    budget = read_budget(text)
    measured: dict[tuple[str, str], int] = {}
    missing: dict[str, list[Kernel]] = {}
    for kernel in kernels:
        limits = budget.limits(kernel)
        if REQUIRED not in limits:
            missing.setdefault(kernel.name.partition("<")[0], []).append(kernel)
        for limit in limits.values():
            if limit.key in UPDATED:
                place = (limit.section, limit.key)
                measured[place] = max(measured.get(place, 0), demand(kernel, limit.key))
    families = {
        section
        for section, limits in budget.sections.items()
        if any(limit.key == REQUIRED for limit in limits)
    }
    section = ""
    lines = []
    for line in text.splitlines():
        if header := re.match(r"\[(.+)\]\s*$", line):
            section = header.group(1)
        number = re.match(r"(\w+)\s*=\s*\d+\s*$", line)
        if number and section in families and (section, number.group(1)) in measured:
            line = f"{number.group(1)} = {measured[section, number.group(1)]}"
        lines.append(line)
    for family, members in missing.items():
        lines += ["", f"[{family}<*>]" if "<" in members[0].name else f"[{family}]"]
        for key in UPDATED:
            value = max(demand(kernel, key) for kernel in members)
            if key == REQUIRED or value > 0:
                lines.append(f"{key} = {value}")
    return "\n".join(lines) + "\n"


def demand(kernel: Kernel, key: str) -> int:
    """Return the smallest limit that lets a kernel pass; registers in whole groups."""
    found = kernel.measures[key.partition("_")[2]]
    return -(-found // REGISTER_GROUP) * REGISTER_GROUP if key == REQUIRED else found


def describe(kernel: Kernel) -> str:
    """Return a line with the measures that are not zero."""
    measures = [f"{name} {value}" for name, value in kernel.measures.items() if value != 0]
    return f"{kernel}: {', '.join(measures)}"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description="Holds the machine code of the CUDA kernels to a budget.",
        epilog="Exit status: 0 all kernels fit, 1 some do not, 2 it could not be measured.",
    )
    parser.add_argument("--nvcc", metavar="PATH", help="the compiler, instead of the one found")
    parser.add_argument("--show", action="store_true", help="print what each kernel takes")
    parser.add_argument(
        "--update",
        action="store_true",
        help="write registers (in eights) and static shared memory into the budget, then check",
    )
    options = parser.parse_args(arguments)
    try:
        kernels = measure_folder(find_toolkit(options.nvcc))
        text = BUDGET.read_text(encoding="utf-8")
        if options.update:
            text = update(text, kernels)
            BUDGET.write_text(text, encoding="utf-8")
        failures = check(kernels, read_budget(text))
    except (BudgetError, ToolMissingError) as error:
        print(error, file=sys.stderr)
        return 2
    if options.show:
        print("\n".join(map(describe, kernels)))
    print("\n".join(failures) or f"{len(kernels)} kernels are within their budgets")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
