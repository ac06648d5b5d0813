"""``python -m benchmarks.gpu.run``: all that there is to do on a machine with an NVIDIA GPU.

Builds the library with its CUDA kernels in the checkout, runs the tests of the GPU, the four tools
of compute-sanitizer on tiny cases, then the benchmark, and makes the page of the results. It uses
the Python that runs it, installs nothing and needs no package index.

Each step is a process with a time limit of its own and ends with the process: one that fails or is
cut off is recorded, and the next one goes on. While the tests run, compute-sanitizer does; the
benchmark has the machine to itself. After each step the folder of results holds ``steps.json``
(outcomes, seconds, the end of each output) and ``run.log`` (all output) as far as the run has come.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

PROJECT = Path(__file__).resolve().parents[2]
PAGE = PROJECT / "docs" / "performance-gpu.md"

PASSED = "passed"
FAILED = "failed"
CUT_OFF = "cut off"
LEFT_OUT = "left out"

SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
# The suites of the benchmark, and the seconds that each may take at most.
SUITES = {
    "convolution": 190.0,
    "block": 120.0,
    "network": 90.0,
    "max_pool2d": 75.0,
    "optimizer": 45.0,
}

_TOTAL_SECONDS = 585.0
# What is kept for the steps that follow the longest one.
_RESERVE_SECONDS = 15.0
# A benchmark begins no case after this share of its limit; a case takes seconds.
_BENCHMARK_SHARE = 0.8
_LEAST_SECONDS = 3.0
_TAIL_CHARACTERS = 4000


@dataclass(frozen=True)
class Step:
    """A process to run. ``command`` is told for how many seconds it may."""

    name: str
    limit: float
    command: Callable[[float], Sequence[str]]
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """How a step ended. ``summary`` is the last line of its output, ``tail`` the last thousands."""

    name: str
    outcome: str
    status: int | None
    seconds: float
    limit: float
    command: str
    summary: str
    tail: str


class Runner:
    """Runs steps against a common deadline, and writes down how they end."""

    def __init__(self, folder: Path, seconds: float) -> None:
        self.folder = folder
        self.outcomes: list[Outcome] = []
        self._deadline = monotonic() + seconds
        self._begin = monotonic()
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        self._lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "run.log").write_bytes(b"")

    def remaining(self) -> float:
        """The seconds until the deadline."""
        return self._deadline - monotonic()

    def together(self, *lanes: Sequence[Step]) -> None:
        """Run several sequences of steps at once."""
        with ThreadPoolExecutor(len(lanes)) as pool:
            for finished in [pool.submit(self.one_by_one, lane) for lane in lanes]:
                finished.result()

    def one_by_one(self, steps: Sequence[Step]) -> None:
        """Run steps one after the other, whatever becomes of each."""
        for step in steps:
            self.run(step)

    def run(self, step: Step, reserve: float = _RESERVE_SECONDS) -> bool:
        """Run a step; returns whether it passed. ``reserve`` is left for what follows."""
        limit = min(step.limit, self.remaining() - reserve)
        if limit < _LEAST_SECONDS:
            self._record(Outcome(step.name, LEFT_OUT, None, 0.0, limit, "", "no time was left", ""))
            return False
        begin = monotonic()
        command = list(step.command(limit))
        try:
            outcome, status, output = self._process(command, step.environment, limit)
        except OSError as error:
            outcome, status, output = FAILED, None, str(error)
        lines = [line.strip() for line in output.splitlines() if line.strip()]
        self._record(
            Outcome(
                name=step.name,
                outcome=outcome,
                status=status,
                seconds=monotonic() - begin,
                limit=limit,
                command=shlex.join(command),
                summary=lines[-1][:200] if lines else "",
                tail=output[-_TAIL_CHARACTERS:],
            ),
            output,
        )
        return outcome == PASSED

    def stop(self) -> None:
        """End the processes that still run."""
        with self._lock:
            running = list(self._running.values())
        for process in running:
            _kill(process)

    def _process(
        self, command: Sequence[str], environment: dict[str, str], limit: float
    ) -> tuple[str, int | None, str]:
        with tempfile.TemporaryFile() as output:
            process = subprocess.Popen(
                command,
                cwd=PROJECT,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            with self._lock:
                self._running[process.pid] = process
            try:
                status: int | None = process.wait(limit)
                outcome = PASSED if status == 0 else FAILED
            except subprocess.TimeoutExpired:
                status, outcome = None, CUT_OFF
            finally:
                _kill(process)
                with self._lock:
                    del self._running[process.pid]
            output.seek(0)
            return outcome, status, output.read().decode(errors="replace")

    def _record(self, outcome: Outcome, output: str = "") -> None:
        with self._lock:
            self.outcomes.append(outcome)
            with (self.folder / "run.log").open("a", encoding="utf-8") as log:
                log.write(f"=== {outcome.name}: {outcome.outcome}\n$ {outcome.command}\n{output}\n")
            document: dict[str, Any] = {
                "seconds": monotonic() - self._begin,
                "steps": [dataclasses.asdict(each) for each in self.outcomes],
            }
            text = json.dumps(document, indent=1) + "\n"
            (self.folder / "steps.json").write_text(text, encoding="utf-8")
            print(
                f"{outcome.name}: {outcome.outcome} in {outcome.seconds:.1f} s: {outcome.summary}",
                flush=True,
            )
            if outcome.outcome != PASSED:
                print(outcome.tail, flush=True)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a step's process, if it runs, and all that it has started, which are a process group."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def missing() -> list[str]:
    """What a machine lacks for this, in words; [] if it has all."""
    import torch

    absent = []
    if torch.version.cuda is None:
        if not list(Path("/dev").glob("nvidia[0-9]*")):
            absent.append("an NVIDIA GPU")
        absent.append(f"a CUDA build of torch (this is torch {torch.__version__})")
    elif not torch.cuda.is_available():
        absent.append("an NVIDIA GPU that torch can use")
    if _cuda_program("nvcc") is None:
        absent.append("nvcc")
    return absent


def _cuda_program(name: str) -> str | None:
    """The path of a program of the CUDA toolkit, on the path or where torch finds the toolkit."""
    found = shutil.which(name)
    if found is not None:
        return found
    from torch.utils.cpp_extension import CUDA_HOME

    for folder in ("bin", f"extras/{name}", name):
        candidate = Path(CUDA_HOME or "/usr/local/cuda", folder, name)
        if candidate.is_file():
            return str(candidate)
    return None


def _facts(environment: dict[str, str]) -> Step:
    command = [sys.executable, "-m", "benchmarks.gpu.device"]
    return Step("environment", 60, lambda limit: command, environment)


def _build(environment: dict[str, str]) -> Step:
    import torch

    major, minor = torch.cuda.get_device_capability(0)
    settings = {
        "CNNKERNELS_BUILD": "require",
        "CNNKERNELS_CUDA": "require",
        # What is for 9.0a alone, a release has too.
        "TORCH_CUDA_ARCH_LIST": "9.0a" if (major, minor) == (9, 0) else f"{major}.{minor}",
    }
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return Step("build", 240, lambda limit: command, environment | settings)


def _pytest(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]


def _tests(environment: dict[str, str]) -> list[Step]:
    graphs = "tests/cuda/test_cuda_graphs.py"
    return [
        Step("CUDA graphs", 60, lambda limit: _pytest(graphs), environment),
        Step(
            "tests",
            160,
            lambda limit: _pytest("tests/cuda", f"--ignore={graphs}", "--durations=10"),
            environment,
        ),
    ]


def _sanitizers(environment: dict[str, str]) -> list[Step]:
    program = _cuda_program("compute-sanitizer") or "compute-sanitizer"

    def step(tool: str) -> Step:
        options = ["--tool", tool, "--target-processes", "all", "--error-exitcode", "1"]
        if tool == "memcheck":
            # torch and the driver ask for functions that need not be there; kernels that fail
            # are seen all the same.
            options += ["--report-api-errors", "no"]
        command = [program, *options, *_pytest("tests/cuda", "-m", "sanitizer")]
        # Each tensor in an allocation of its own: beside it is nobody's memory. And left as it is:
        # what fills new tensors, to poison them, would hide reads of what was never written.
        settings = {
            "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
            "CNNKERNELS_TEST_POISON": "0",
            "OMP_NUM_THREADS": "4",
        }
        return Step(f"compute-sanitizer {tool}", 75, lambda limit: command, environment | settings)

    return [step(tool) for tool in SANITIZERS]


def _benchmark(
    suite: str, folder: Path, options: Sequence[str], environment: dict[str, str]
) -> Step:
    def command(limit: float) -> list[str]:
        seconds = f"{limit * _BENCHMARK_SHARE:.0f}"
        arguments = ["--suite", suite, "--out", str(_results(folder, suite)), "--seconds", seconds]
        return [sys.executable, "-m", "benchmarks.gpu", *arguments, *options]

    return Step(f"benchmark {suite}", SUITES[suite], command, environment)


def _results(folder: Path, suite: str) -> Path:
    return folder / f"{suite}.json"


def _page(folder: Path, environment: dict[str, str]) -> Step:
    def command(limit: float) -> list[str]:
        files = [str(file) for suite in SUITES if (file := _results(folder, suite)).exists()]
        steps = str(folder / "steps.json")
        return [sys.executable, "-m", "benchmarks.gpu.report", *files, "--steps", steps]

    return Step("page", 60, command, environment)


def _write_page(runner: Runner, folder: Path, environment: dict[str, str], page: Path) -> None:
    """Make the page, if there are results; a page that could not be made replaces none."""
    if not any(_results(folder, suite).exists() for suite in SUITES):
        return
    step = _page(folder, environment)
    target = folder / page.name
    quoted = shlex.join(step.command(0))
    shell = Step(step.name, step.limit, lambda limit: ["sh", "-c", f"{quoted} >{target}"])
    shell = dataclasses.replace(shell, environment=environment)
    if runner.run(shell, reserve=0) and target.resolve() != page.resolve():
        shutil.copyfile(target, page)


@contextlib.contextmanager
def _ended_with(runner: Runner) -> Iterator[None]:
    """Let the processes end with this one, also when it is asked to end."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        runner.stop()
        signal.signal(signal.SIGTERM, before)


def run_all(args: argparse.Namespace) -> int:
    """Run all steps; the exit status is 1 unless each passed."""
    folder = args.out.resolve()
    for suite in args.suite:
        _results(folder, suite).unlink(missing_ok=True)
    options = ["--quick"] if args.quick else []
    paths = [str(PROJECT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    runner = Runner(folder, args.seconds)
    with _ended_with(runner):
        runner.run(_facts(environment))
        if runner.run(_build(environment)):
            # Where the kernels cannot run, no test may be skipped for it.
            required = environment | {"CNNKERNELS_CUDA": "require"}
            if not args.no_tests:
                runner.together(_tests(required), _sanitizers(required))
        for suite in args.suite:
            runner.run(_benchmark(suite, folder, options, environment))
        _write_page(runner, folder, environment, args.page)
    return 0 if all(outcome.outcome == PASSED for outcome in runner.outcomes) else 1


def main() -> int:
    """Build, test, check, measure and report on a GPU; the exit status is 1 unless all passed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.run", description=main.__doc__)
    add = parser.add_argument
    add("--out", type=Path, default=Path("out/gpu"), metavar="DIR", help="default: out/gpu")
    add("--page", type=Path, default=PAGE, metavar="FILE", help="default: docs/performance-gpu.md")
    add("--quick", action="store_true", help="a short benchmark")
    add("--no-tests", action="store_true", help="neither tests nor compute-sanitizer")
    add(
        "--suite",
        nargs="*",
        choices=list(SUITES),
        default=list(SUITES),
        metavar="NAME",
        help="of the benchmark, in this order; results of others in DIR stay (default: all)",
    )
    add(
        "--seconds",
        type=float,
        default=_TOTAL_SECONDS,
        metavar="N",
        help=f"for all steps together (default: {_TOTAL_SECONDS:.0f})",
    )
    args = parser.parse_args()
    absent = missing()
    if absent:
        print(
            "make gpu needs an NVIDIA GPU, a CUDA build of torch and nvcc; missing here: "
            f"{', '.join(absent)}.",
            file=sys.stderr,
        )
        return 2
    return run_all(args)


if __name__ == "__main__":
    sys.exit(main())
