"""The benchmark on a GPU, as a dry run on the CPU, and the runner of `make gpu` without one."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.cases import FORWARD, Spread
from benchmarks.gpu import command, convolution, max_pool2d, measure, optimizer, run, timing
from benchmarks.gpu.device import Device, open_device
from benchmarks.gpu.goals import GOALS, verdicts
from benchmarks.gpu.options import DRY_RUN, Options
from benchmarks.gpu.report import page
from benchmarks.gpu.results import Results, merge, read_results, write_results
from benchmarks.gpu.rows import OURS, TORCH, Case, Comparison, Contender, Measured, Row, Workload
from benchmarks.gpu.run import CUT_OFF, FAILED, LEFT_OUT, PASSED, Runner, Step
from benchmarks.gpu.tables import tables_of
from benchmarks.gpu.timing import Sampling
from benchmarks.layers import read_conv2d_layers
from benchmarks.optimizer import parameter_lists
from cnnkernels import _native

PROJECT = Path(__file__).parent.parent
TINY = Sampling(rounds=2, least_rounds=1, budget_seconds=0.0, wall_rounds=1, wall_seconds=0.0)
CPU = Device("cpu", 2**16, 2**28, None)


@pytest.fixture(autouse=True)
def _one_thread():
    """On a busy machine two wait for each other much longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(arguments)


def measured(label: str, seconds: float, share: float | None = None) -> Measured:
    spread = Spread(seconds, seconds, seconds)
    return Measured(label, OURS, "", "graph", "", spread, seconds, 1e-7, share, None)


def optimizer_row(name: str, foreach: float, fused: float, share: float) -> Row:
    times = {OURS: 1e-5, optimizer.FOREACH: foreach * 1e-5, optimizer.FUSED: fused * 1e-5}
    return Row(
        suite=optimizer.SUITE,
        name=name,
        batch=None,
        dtype="float32",
        mode="step, plain",
        native=True,
        measured={label: measured(label, seconds, share) for label, seconds in times.items()},
        comparisons={
            name: Comparison(OURS, peer, Spread(ratio, ratio * 0.9, ratio * 1.1), ratio)
            for name, peer, ratio in (
                ("foreach", optimizer.FOREACH, foreach),
                ("fused", optimizer.FUSED, fused),
            )
        },
    )


class TestSuites:
    def test_every_row_of_the_dry_run_is_measured_and_agrees_with_float64(self, tmp_path, capsys):
        file = tmp_path / "results.json"
        assert command.run(parse("--out", str(file), "--device", "cpu")) == 0
        results = read_results(file)
        assert {row.suite for row in results.rows} == set(command.SUITES)
        for row in results.rows:
            assert not row.failure
            assert row.native is (None if row.suite == convolution.SUITE else _has_library())
            if row.suite == max_pool2d.SUITE:
                assert row.exact
            for side in row.measured.values():
                assert side.seconds.median > 0
                half = "float16" in row.dtype
                # torch's fused step on the CPU leaves 16-bit elements out.
                if side.error is not None and not (half and side.label == optimizer.FUSED):
                    assert side.error < (5e-3 if half else 1e-6), (row, side)
        printed = capsys.readouterr()
        assert "dry run" in printed.out
        assert "10,000 in 160" in printed.out
        text = page(results)
        assert "no figure below means anything" in text
        assert text.count("\n| resnet50_v1_5 ") == 6
        assert read_results(file) == results

    def test_time_that_runs_out_is_told(self, tmp_path, capsys):
        file = tmp_path / "results.json"
        arguments = ["--out", str(file), "--device", "cpu", "--suite", "max_pool2d"]
        assert command.run(parse(*arguments, "--seconds", "-1")) == 0
        results = read_results(file)
        assert not results.rows
        assert len(results.left_out) == 8
        assert "0 rows measured, 0 failed, 8 left out" in capsys.readouterr().out
        assert "## Left out for time" in page(results)

    def test_a_case_that_fails_is_a_row_and_the_next_is_measured(
        self, tmp_path, monkeypatch, capsys
    ):
        def cases(options, device):
            whole = max_pool2d.cases(options, device)[:2]
            return [replace(whole[0], prepare=lambda: 1 // 0), whole[1]]

        monkeypatch.setitem(command.SUITES, "max_pool2d", cases)
        file = tmp_path / "results.json"
        assert command.run(parse("--out", str(file), "--device", "cpu", "--suite", "max_pool2d"))
        first, second = read_results(file).rows
        assert first.failure.startswith("ZeroDivisionError")
        assert not second.failure
        assert "failed: ZeroDivisionError" in capsys.readouterr().out

    def test_sizes_of_tensors_add_up(self):
        for parameters in Options().parameters:
            assert optimizer.sizes_of(parameters, 1) == [parameters]
            sizes = optimizer.sizes_of(parameters, 160)
            assert (len(sizes), sum(sizes)) == (160, parameters)
            assert min(sizes) >= 1
            assert len(set(sizes)) > 10
        with pytest.raises(ValueError, match="too few"):
            optimizer.sizes_of(100, 160)
        assert len(parameter_lists()["resnet50"]) >= 160

    def test_bytes_of_a_step(self):
        for dtype, plain, momentum in ((torch.float32, 12, 20), (torch.float16, 6, 10)):
            assert optimizer.bytes_per_parameter(optimizer.PLAIN, dtype) == plain
            assert optimizer.bytes_per_parameter(optimizer.MOMENTUM_RULE, dtype) == momentum

    def test_bytes_of_a_pooling_count_the_argmax(self):
        case = max_pool2d.cases(replace(DRY_RUN, shrink=1), CPU)[0]
        assert (case.name, case.batch, case.dtype, case.mode) == (
            "spp_5x5_s1",
            2,
            "float32",
            FORWARD,
        )
        elements = 2 * 256 * 20 * 20
        assert case.prepare().bytes_moved == elements * (4 + 4 + 1)

    def test_convolutions_are_all_layers_of_three_networks_in_three_passes(self):
        cases = convolution.cases(Options(), CPU)
        layers = [
            layer for network in convolution.NETWORKS for layer in read_conv2d_layers(network)
        ]
        images = sum(layer.reads_image for layer in layers)
        assert len(cases) == 3 * len(layers) - images
        assert {case.batch for case in cases} == {32}
        assert len({case.name.split()[0] for case in cases[:9]}) == 3

    def test_tf32_is_allowed_within_its_contenders_only(self):
        before = torch.backends.cudnn.allow_tf32
        case = convolution.cases(DRY_RUN, CPU)[0]
        for contender in case.prepare().contenders:
            with contender.context():
                allowed = torch.backends.cudnn.allow_tf32
                assert allowed == contender.label.startswith("TF32")
                assert torch.backends.cudnn.benchmark
        assert torch.backends.cudnn.allow_tf32 == before
        assert not torch.backends.cudnn.benchmark


class TestDevice:
    def test_inputs_rotate_past_the_cache_within_memory(self):
        device = Device("cuda", 50 * 2**20, 80 * 2**30, None)
        assert device.rotation(200 * 2**20) == 1
        assert device.rotation(10 * 2**20) == 10
        assert device.rotation(64) == 256
        assert Device("cuda", 2**30, 2**30, None).rotation(2**27) == 1

    def test_without_a_gpu_nothing_is_measured(self, monkeypatch, tmp_path, capsys):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        file = tmp_path / "results.json"
        assert command.run(parse("--out", str(file))) == 1
        assert "torch sees no CUDA device" in capsys.readouterr().err
        assert not file.exists()
        assert open_device("cpu").kind == "cpu"

    def test_a_row_has_ratios_rates_and_shares(self):
        calls: list[str] = []
        contenders = (
            Contender(OURS, OURS, lambda index: calls.append(OURS)),
            Contender(TORCH, TORCH, lambda index: calls.append(TORCH)),
        )
        workload = Workload(
            contenders, 3, 2**17, bytes_moved=1000, flops=500,
            errors=lambda: {OURS: 0.0, TORCH: 1e-8},
            pairs=lambda medians: {"ratio": (OURS, TORCH)},
        )  # fmt: skip
        case = Case("suite", "name", None, "float32", "mode", lambda: workload)
        row = measure.measure(case, CPU, TINY, bandwidth=1e9)
        ours, theirs = row.measured[OURS], row.measured[TORCH]
        assert ours.share == pytest.approx(1000 / (1e9 * ours.seconds.median))
        assert ours.teraflops == pytest.approx(500 / ours.seconds.median * 1e-12)
        assert (ours.error, theirs.error) == (0.0, 1e-8)
        assert row.cold
        assert row.comparisons["ratio"].ratio.median > 0
        assert set(calls) == {OURS, TORCH}


class FakeGpu:
    """torch.cuda's graphs and events on a clock of its own: each call of ``work`` takes 2 µs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, refuses: bool = False) -> None:
        self.now, self.indices, self.captured = 0.0, [], []
        self.capturing = False
        gpu = self

        class Graph:
            def capture_begin(self) -> None:
                if refuses:
                    raise RuntimeError("operation not permitted\nwhen stream is capturing")
                gpu.capturing, gpu.indices = True, []

            def capture_end(self) -> None:
                gpu.capturing = False
                self.calls = list(gpu.indices)
                gpu.captured.append(self.calls)

            def replay(self) -> None:
                gpu.now += 2e-6 * len(self.calls)

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = gpu.now

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, end: Event) -> float:
                return (end.at - self.at) * 1e3

        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def work(self, index: int) -> None:
        self.indices.append(index)
        if not self.capturing:
            self.now += 2e-6


class TestTiming:
    DEVICE = Device("cuda", 2**20, 2**30, None)

    @pytest.mark.parametrize("rotation", [1, 7, 256])
    def test_a_graph_holds_whole_turns_that_fill_a_sample(self, monkeypatch, rotation):
        gpu = FakeGpu(monkeypatch)
        contender = Contender(OURS, OURS, gpu.work)
        sampler = timing.device_sampler(contender, rotation, self.DEVICE, 1e-3)
        assert (sampler.method, sampler.reason) == (timing.GRAPH, "")
        assert sampler.sample() == pytest.approx(2e-6)
        calls = gpu.captured[-1]
        assert len(calls) % rotation == 0
        assert calls == list(range(len(calls)))
        assert 0.7e-3 < len(calls) * 2e-6 < 1.3e-3
        before = gpu.now
        sampler.sample()
        assert gpu.now - before == pytest.approx(len(calls) * 2e-6)

    def test_long_work_is_captured_once(self, monkeypatch):
        gpu = FakeGpu(monkeypatch)
        contender = Contender(OURS, OURS, gpu.work)
        sampler = timing.device_sampler(contender, 3, self.DEVICE, 1e-6)
        assert sampler.sample() == pytest.approx(2e-6)
        assert gpu.captured == [[0, 1, 2]]

    def test_what_cannot_be_captured_is_timed_eagerly_and_says_why(self, monkeypatch):
        gpu = FakeGpu(monkeypatch, refuses=True)
        entered = []

        @contextlib.contextmanager
        def context():
            entered.append(True)
            yield

        contender = Contender(OURS, OURS, gpu.work, context=context)
        sampler = timing.device_sampler(contender, 7, self.DEVICE, 1e-3)
        assert (sampler.method, sampler.reason) == (timing.EAGER, "operation not permitted")
        before = len(gpu.indices)
        assert sampler.sample() == pytest.approx(2e-6)
        assert (len(gpu.indices) - before) % 7 == 0
        assert len(entered) == 2


class TestPage:
    def test_goals_are_judged_by_their_least_row(self):
        rows = [
            optimizer_row("25M in 1", 2.5, 1.2, 0.9),
            optimizer_row("25M in 160", 1.9, 1.1, 0.8),
            optimizer_row("4M in 1", 0.1, 0.1, 0.1),
        ]
        # Against torch's default it is momentum that counts.
        assert len(verdicts(rows)) == 2
        rows = [replace(row, mode=f"step, {optimizer.MOMENTUM_RULE}") for row in rows]
        found = {verdict.goal.text: verdict for verdict in verdicts(rows)}
        assert len(found) == 3
        share, foreach, fused = found.values()
        assert (share.reached, share.rows, share.holds, share.worst) == (1, 2, False, 0.8)
        assert (foreach.worst, foreach.holds) == (1.9, False)
        assert foreach.worst_row.startswith("25M in 160")
        assert fused.holds
        assert {verdict.goal for verdict in found.values()} < set(GOALS)

    def test_losing_delegated_and_failed_rows_stay(self):
        rows = [
            optimizer_row("1M in 1", 0.5, 0.4, 0.1),
            replace(optimizer_row("4M in 1", 1.0, 1.0, 0.5), native=False),
            Row(optimizer.SUITE, "1M in 160", None, "float32", "step, plain", failure="no memory"),
        ]
        table = tables_of(rows)[-1]
        assert table.rows[0][2] == "0.50"
        assert table.rows[1][0] == "4M in 1 (ATen)"
        assert table.rows[2][:2] == ["1M in 160, float32", "failed: no memory"]
        assert all(len(row) == len(table.heads) for row in table.rows)

    def test_results_of_several_files_make_one_page(self, tmp_path):
        environment: dict[str, str | int] = {"device": "cuda", "gpu": "a GPU", "torch": "2.11"}
        files = [tmp_path / "a.json", tmp_path / "b.json"]
        for file, name in zip(files, ("1M in 1", "25M in 1"), strict=True):
            rows = [optimizer_row(name, 2.0, 1.0, 0.9)]
            write_results(file, Results(environment, 3e12, rows, []))
        step = {"name": "build", "outcome": "passed", "seconds": 61.2, "summary": "a | b"}
        (tmp_path / "steps.json").write_text(json.dumps({"steps": [step]}))
        finished = subprocess.run(
            [sys.executable, "-m", "benchmarks.gpu.report", *map(str, files),
             "--steps", str(tmp_path / "steps.json")],
            cwd=PROJECT, capture_output=True, text=True, check=True,
        )  # fmt: skip
        text = finished.stdout
        assert "dry run" not in text
        assert "| GPU | a GPU |" in text
        assert "| build | passed | 61 | a \\| b |" in text
        assert "| copy bandwidth | 3.00 TB/s |" in text
        assert "| 1M in 1 | float32 | 2.00 |" in text
        assert "| reached |" in text
        assert "| missed |" in text
        assert merge([read_results(file) for file in files]).copy_bytes_per_second == 3e12


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


class TestRunner:
    def test_steps_that_fail_are_recorded_and_the_next_go_on(self, tmp_path, capsys):
        runner = Runner(tmp_path, 60)
        steps = [
            Step("good", 30, lambda limit: python("print('one'); print('two')")),
            Step("bad", 30, lambda limit: python("import sys; print('why'); sys.exit(3)")),
            Step(
                "slow", 4, lambda limit: python("print(1, flush=True); import time; time.sleep(99)")
            ),
            Step("none", 30, lambda limit: [str(tmp_path / "missing")]),
            Step(
                "variable",
                30,
                lambda limit: python("import os; print(os.environ['A'])"),
                {"A": "b"},
            ),
            Step("never", 2, lambda limit: python("")),
        ]
        runner.together(steps[:2], steps[2:3])
        runner.one_by_one(steps[3:])
        document = json.loads((tmp_path / "steps.json").read_text())
        outcomes = {step["name"]: step for step in document["steps"]}
        assert {name: step["outcome"] for name, step in outcomes.items()} == {
            "good": PASSED,
            "bad": FAILED,
            "slow": CUT_OFF,
            "none": FAILED,
            "variable": PASSED,
            "never": LEFT_OUT,
        }
        assert outcomes["good"]["summary"] == "two"
        assert (outcomes["bad"]["status"], outcomes["bad"]["tail"]) == (3, "why\n")
        assert outcomes["slow"]["tail"] == "1\n"
        assert 4 <= outcomes["slow"]["seconds"] < 30
        assert outcomes["variable"]["summary"] == "b"
        assert "=== bad: failed" in (tmp_path / "run.log").read_text()
        assert "why" in capsys.readouterr().out

    def test_a_page_is_made_of_what_there_is(self, tmp_path):
        page_file = tmp_path / "docs" / "performance-gpu.md"
        page_file.parent.mkdir()
        page_file.write_text("before")
        environment = {"PYTHONPATH": str(PROJECT)}
        runner = Runner(tmp_path, 60)
        run._write_page(runner, tmp_path, environment, page_file)
        assert page_file.read_text() == "before"
        runner.run(Step("good", 30, lambda limit: python("print(1)")))
        facts: dict[str, str | int] = {"device": "cuda", "gpu": "a GPU"}
        results = Results(facts, 3e12, [optimizer_row("1M in 1", 2.0, 1.6, 0.9)], [])
        write_results(tmp_path / "optimizer.json", results)
        run._write_page(runner, tmp_path, environment, page_file)
        assert [outcome.outcome for outcome in runner.outcomes] == [PASSED, PASSED]
        assert "| good | passed |" in page_file.read_text()
        assert (tmp_path / "performance-gpu.md").read_text() == page_file.read_text()

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_without_a_gpu_it_says_what_is_missing_in_a_sentence(self, tmp_path):
        finished = subprocess.run(
            [sys.executable, "-m", "benchmarks.gpu.run", "--out", str(tmp_path / "out")],
            cwd=PROJECT, capture_output=True, text=True, check=False,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        )  # fmt: skip
        assert finished.returncode == 2
        assert finished.stdout == ""
        assert finished.stderr.count("\n") == 1
        assert finished.stderr.startswith("make gpu needs an NVIDIA GPU, a CUDA build of torch")
        assert f"(this is torch {torch.__version__})" in finished.stderr or (
            torch.version.cuda is not None
        )
        assert not (tmp_path / "out").exists()


def _has_library() -> bool:
    return _native.library is not None
