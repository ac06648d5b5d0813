"""The benchmark: its shapes, suites, statistics and outputs. No timing decides a test."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

import benchmarks
import cnnkernels
from benchmarks import command, measure
from benchmarks.accuracy import median_error, relative_error
from benchmarks.cases import (
    FORWARD,
    FORWARD_BACKWARD,
    OURS,
    STEP,
    TORCH,
    Candidate,
    Case,
    Options,
    Row,
    Side,
    Spread,
    Workload,
)
from benchmarks.layers import CONV2D_FILES, read_conv2d_layers, read_max_pool2d_layers
from benchmarks.operators import CHANNELS_LAST, NCHW
from benchmarks.optimizer import RULES, _workload, parameter_lists
from benchmarks.picture import write_png
from benchmarks.report import print_report, summarize, write_json
from benchmarks.suites import SUITES, all_cases
from benchmarks.timing import MINIMUM_SAMPLES, Sampling, geometric_mean, interleave, ratio_spread

TINY = Sampling(samples=2, sample_seconds=1e-6)
PROJECT = Path(__file__).parent.parent
ENVIRONMENT: dict[str, str | int] = {"cpu": "a CPU", "isa": "avx2", "torch": "2.13.0"}


def make_row(ratio: float = 2.0, **changes: object) -> Row:
    row = Row(
        suite="conv2d",
        name="layer",
        batch=1,
        mode=FORWARD,
        threads=2,
        gradients=(),
        samples=5,
        ratio=Spread(ratio, ratio * 0.9, ratio * 1.1),
        same_layout_ratio=Spread(ratio, ratio * 0.9, ratio * 1.1),
        ours=Side(NCHW, NCHW, 1e-5, 1e-7),
        torch=Side(CHANNELS_LAST, CHANNELS_LAST, ratio * 1e-5, 2e-7),
        kernel="direct",
        native=True,
        interruptions=0.0,
        seconds={OURS: {NCHW: 1e-5}, TORCH: {CHANNELS_LAST: ratio * 1e-5}},
    )
    return dataclasses.replace(row, **changes)


@pytest.fixture
def keep_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class TestShapes:
    @pytest.mark.parametrize(
        ("file", "rows", "layers"),
        [
            ("tutorial", 7, 7),
            ("mobilenet_v2", 30, 52),
            ("resnet50_v1_5", 23, 53),
            ("small_cnn", 10, 23),
            ("vgg16", 9, 13),
        ],
    )
    def test_conv2d_files_hold_whole_networks(self, file, rows, layers):
        read = read_conv2d_layers(file)
        assert len(read) == rows
        assert sum(layer.count for layer in read) == layers

    @pytest.mark.parametrize("file", CONV2D_FILES)
    def test_every_convolution_is_valid(self, file):
        for layer in read_conv2d_layers(file):
            convolution = torch.nn.Conv2d(
                layer.in_channels,
                layer.out_channels,
                layer.kernel_size,
                layer.stride,
                layer.padding,
                groups=layer.groups,
                device="meta",
            )
            size = (1, layer.in_channels, layer.height, layer.width)
            assert convolution(torch.empty(size, device="meta")).numel() > 0, layer.name

    def test_every_pooling_is_valid(self):
        layers = read_max_pool2d_layers()
        assert len(layers) == 12
        for layer in layers:
            pool = torch.nn.MaxPool2d(layer.kernel_size, layer.stride, layer.padding)
            size = (1, layer.channels, layer.height, layer.width)
            assert pool(torch.empty(size, device="meta")).numel() > 0, layer.name

    def test_parameter_lists_are_the_networks(self):
        counts = {
            name: (len(sizes), sum(torch.Size(size).numel() for size in sizes))
            for name, sizes in parameter_lists().items()
        }
        assert counts == {
            "ch1_net": (10, 81_194),
            "lenet5": (10, 61_706),
            "resnet50": (161, 25_557_032),
            "flat": (1, 25_000_000),
        }


class TestStatistics:
    def test_ratio_pairs_samples_of_the_same_round(self):
        # Twice as slow in every round, though the machine slows down tenfold in the third.
        torch_times = np.array([2.0, 2.0, 20.0, 2.0])
        our_times = np.array([1.0, 1.0, 10.0, 1.0])
        assert ratio_spread(torch_times, our_times) == Spread(2.0, 2.0, 2.0)

    def test_ratio_reports_median_and_quartiles(self):
        spread = ratio_spread(np.array([1.0, 2.0, 3.0, 4.0, 5.0]), np.ones(5))
        assert spread == Spread(median=3.0, low=2.0, high=4.0)

    def test_geometric_mean_of_reciprocals_is_one(self):
        assert geometric_mean([4.0, 0.25]) == pytest.approx(1.0)
        assert geometric_mean([1.0, 8.0, 27.0]) == pytest.approx(6.0)

    def test_relative_error_is_the_worst_tensor_in_norm(self):
        exact = [torch.tensor([3.0, 4.0], dtype=torch.float64), torch.ones(1, dtype=torch.float64)]
        assert relative_error([torch.tensor([3.0, 4.5]), torch.ones(1)], exact) == 0.1
        assert relative_error([torch.tensor([3.0, 4.0]), torch.zeros(1)], exact) == 1.0
        assert relative_error([torch.tensor([3.0, 4.0]), torch.ones(1)], exact) == 0.0

    def test_relative_error_refuses_unequal_shapes(self):
        with pytest.raises(ValueError, match="cannot be compared"):
            relative_error([torch.ones(2)], [torch.ones(1)])

    def test_median_error_leaves_out_one_odd_input(self):
        references = [(torch.ones(1, dtype=torch.float64),)] * 3
        results = [(torch.tensor([1.0]),), (torch.tensor([9.0]),), (torch.tensor([1.5]),)]
        assert median_error(lambda index: results[index], references) == 0.5

    def test_error_quotient(self):
        exact, inexact = Side("", "", 1.0, 0.0), Side("", "", 1.0, 1e-7)
        assert make_row().error_quotient == 0.5
        assert make_row(ours=exact, torch=exact).error_quotient == 1.0
        assert make_row(ours=inexact, torch=exact).error_quotient == float("inf")

    def test_summaries_keep_batches_and_modes_apart(self):
        rows = [
            make_row(2.0),
            make_row(0.5, native=False),
            make_row(3.0, batch=64),
            make_row(5.0, mode=FORWARD_BACKWARD),
        ]
        found = {
            (summary.batch, summary.mode): (summary.ratio, summary.rows, summary.delegated)
            for summary in summarize(rows)
        }
        assert found == {
            (1, FORWARD): (pytest.approx(1.0), 2, 1),
            (64, FORWARD): (pytest.approx(3.0), 1, 0),
            (1, FORWARD_BACKWARD): (pytest.approx(5.0), 1, 0),
        }


class TestInterleave:
    def test_rounds_visit_every_candidate_and_rotate_inputs(self):
        calls: list[tuple[str, int]] = []

        def candidate(name):
            return Candidate(name, NCHW, lambda i: calls.append((name, i)), lambda i: ())

        times = interleave([candidate("a"), candidate("b")], Sampling(4, 0.0))
        assert times.shape == (4, 2)
        assert (times > 0).all()
        sampled = calls[-8:]
        assert [{name for name, _ in sampled[i : i + 2]} for i in range(0, 8, 2)] == [
            {"a", "b"}
        ] * 4
        for name in ("a", "b"):
            indices = [index for which, index in sampled if which == name]
            assert len(set(indices)) == 4

    def test_budget_ends_sampling_early_but_not_before_the_minimum(self):
        candidate = Candidate(OURS, NCHW, lambda i: None, lambda i: ())
        assert len(interleave([candidate], Sampling(1000, 0.0, 0.0))) == MINIMUM_SAMPLES
        assert len(interleave([candidate], Sampling(3, 0.0, 0.0))) == 3

    def test_calls_run_within_their_context(self):
        seen = []

        def call(index):
            seen.append(torch.is_grad_enabled())

        interleave([Candidate(OURS, NCHW, call, lambda i: (), context=torch.no_grad)], TINY)
        assert seen
        assert not any(seen)


@pytest.mark.usefixtures("keep_threads")
class TestMeasure:
    @staticmethod
    def case(**kernels):
        """A case whose results are known: torch's candidate is off by 20%, ours by 10%."""
        exact = (torch.ones(4, dtype=torch.float64),)
        candidates = (
            Candidate(OURS, NCHW, lambda i: None, lambda i: (torch.full((4,), 1.1),), **kernels),
            Candidate(TORCH, NCHW, lambda i: sum(range(2000)), lambda i: (torch.full((4,), 1.2),)),
        )
        workload = Workload(candidates, lambda i: exact, 2, ("conv2d",))
        return Case("conv2d", "known", 1, FORWARD, (), lambda: workload)

    def test_row_carries_errors_and_sides(self):
        row = measure.measure(self.case(), TINY, threads=1)
        assert row.ours.error == pytest.approx(0.1, rel=1e-5)
        assert row.torch.error == pytest.approx(0.2, rel=1e-5)
        assert row.error_quotient == pytest.approx(0.5, rel=1e-5)
        assert row.samples == 2
        assert row.threads == 1

    def test_ratio_is_torchs_faster_layout_over_our_faster_layout(self, monkeypatch):
        seconds = {
            (OURS, NCHW): 1.0,
            (OURS, CHANNELS_LAST): 2.0,
            (TORCH, NCHW): 7.0,
            (TORCH, CHANNELS_LAST): 6.0,
        }
        monkeypatch.setattr(measure, "interleave", lambda *_: np.array([[*seconds.values()]] * 3))
        result = (torch.ones(1, dtype=torch.float64),)
        candidates = tuple(Candidate(*key, lambda i: None, lambda i: result) for key in seconds)
        workload = Workload(candidates, lambda i: result, 1, ("conv2d",))
        case = Case("conv2d", "known", 1, FORWARD, (), lambda: workload)
        row = measure.measure(case, TINY, threads=1)
        assert row.ratio == Spread(6.0, 6.0, 6.0)
        assert row.same_layout_ratio == Spread(3.0, 3.0, 3.0)
        assert (row.ours.label, row.ours.seconds) == (NCHW, 1.0)
        assert (row.torch.label, row.torch.seconds) == (CHANNELS_LAST, 6.0)
        assert row.seconds == {
            OURS: {NCHW: 1.0, CHANNELS_LAST: 2.0},
            TORCH: {NCHW: 7.0, CHANNELS_LAST: 6.0},
        }

    def test_without_kernel_calls_a_row_is_marked_as_atens(self, monkeypatch):
        monkeypatch.setattr(measure, "kernel_calls", lambda: {"conv2d": 5})
        row = measure.measure(self.case(plan="aten"), TINY, threads=1)
        assert (row.kernel, row.native) == ("aten", False)

    def test_a_plan_that_reaches_no_kernel_is_an_error(self, monkeypatch):
        monkeypatch.setattr(measure, "kernel_calls", lambda: {"conv2d": 5})
        with pytest.raises(RuntimeError, match=r"'direct'.*ran no kernel"):
            measure.measure(self.case(plan="direct"), TINY, threads=1)

    def test_a_delegated_layout_is_named(self, monkeypatch):
        calls = {"conv2d": 0}
        result = (torch.ones(1, dtype=torch.float64),)

        def native(index):
            calls["conv2d"] += 1

        monkeypatch.setattr(measure, "kernel_calls", calls.copy)
        monkeypatch.setattr(measure, "interleave", lambda *_: np.array([[1.0, 2.0, 3.0]]))
        candidates = (
            Candidate(OURS, NCHW, native, lambda i: result, plan="direct"),
            Candidate(OURS, CHANNELS_LAST, lambda i: None, lambda i: result, plan="aten"),
            Candidate(TORCH, CHANNELS_LAST, lambda i: None, lambda i: result),
        )
        workload = Workload(candidates, lambda i: result, 1, ("conv2d",))
        case = Case("conv2d", "known", 1, FORWARD, (), lambda: workload)
        row = measure.measure(case, TINY, threads=1)
        assert (row.kernel, row.native) == ("direct; channels_last: aten", False)

    def test_kernel_calls_are_the_evidence_for_native(self, monkeypatch):
        counter = iter(range(100))
        monkeypatch.setattr(measure, "kernel_calls", lambda: {"conv2d": next(counter)})
        row = measure.measure(self.case(plan="direct"), TINY, threads=1)
        assert (row.kernel, row.native) == ("direct", True)


@pytest.mark.usefixtures("keep_threads")
class TestSuites:
    @pytest.mark.parametrize("suite", SUITES)
    def test_every_quick_case_runs_and_agrees_with_float64(self, suite):
        cases = all_cases([suite], Options(batches=(2,), quick=True))
        assert cases
        for case in cases:
            # One thread: on a busy machine two wait for each other much longer than they work.
            row = measure.measure(case, TINY, threads=1)
            assert (row.suite, row.name, row.mode) == (suite, case.name, case.mode)
            assert 0 <= row.ours.error < 1e-5, row
            assert 0 <= row.torch.error < 1e-5, row
            assert row.ratio.low <= row.ratio.median <= row.ratio.high
            if cnnkernels.get_backend() == "native":
                assert row.native, f"{row.name} {row.mode} ran on {row.kernel}"
            else:
                assert row.kernel == "aten"

    def test_defaults_are_the_tutorials_batches_in_both_modes(self):
        cases = all_cases(["conv2d", "block"], Options(quick=True))
        assert {(case.batch, case.mode) for case in cases} == {
            (batch, mode) for batch in (1, 64) for mode in (FORWARD, FORWARD_BACKWARD)
        }

    def test_networks_default_to_a_small_batch(self):
        cases = all_cases(["conv2d"], Options(shapes=("vgg16",), modes=(FORWARD,)))
        assert {case.batch for case in cases} == {1, 8}
        assert len(cases) == 18

    def test_both_sides_are_measured_in_both_layouts(self):
        for case in all_cases(["conv2d", "block"], Options(quick=True)):
            if case.batch == 1:
                found = [(c.side, c.layout) for c in case.prepare().candidates]
                assert sorted(found) == sorted(
                    (side, layout) for side in (OURS, TORCH) for layout in (NCHW, CHANNELS_LAST)
                )

    def test_candidates_get_data_in_their_layout(self):
        cases = [
            case
            for case in all_cases(["max_pool2d"], Options(batches=(2,), modes=(FORWARD,)))
            if case.name == "ch1_net_pool1"
        ]
        assert [case.mode for case in cases] == [
            f"{FORWARD} / {NCHW}",
            f"{FORWARD} / {CHANNELS_LAST}",
        ]
        for case in cases:
            for candidate in case.prepare().candidates:
                (output,) = candidate.results(0)
                last = output.is_contiguous(memory_format=torch.channels_last)
                assert (
                    last == (candidate.layout == CHANNELS_LAST) == case.mode.endswith(CHANNELS_LAST)
                )

    def test_large_poolings_are_measured_against_a_copy(self):
        cases = all_cases(["max_pool2d"], Options(batches=(8,)))
        copies = {case.name for case in cases if case.mode.endswith("copy")}
        assert copies == {"resnet_stem", "vgg_224", "vgg_112", "vgg_56"}
        (case,) = [
            case
            for case in cases
            if case.name == "vgg_56" and case.mode == f"{FORWARD_BACKWARD} / {NCHW} / copy"
        ]
        ours, copy = case.prepare().candidates
        assert (ours.side, copy.variant) == (OURS, "copy")
        for index in range(9):  # more than there are sources
            copy.call(index)

    def test_gradients_are_those_that_training_asks_for(self):
        cases = all_cases(["conv2d", "block"], Options(modes=(FORWARD_BACKWARD,), quick=True))
        gradients = {case.name: case.gradients for case in cases}
        assert gradients["ch1_conv_4x4_k4"] == ("weight",)
        assert gradients["ch1_net_conv1"] == ("weight", "bias")
        assert gradients["ch1_net_conv2"] == ("input", "weight", "bias")
        assert gradients["ch1_net_block1"] == ("weight", "bias")
        for case in cases:
            if case.batch == 1:
                candidate = case.prepare().candidates[0]
                assert len(candidate.results(0)) == 1 + len(case.gradients), case.name

    def test_optimizer_rows_have_one_peer_each(self):
        cases = all_cases(["optimizer"], Options())
        peers = {case.mode: set() for case in cases}
        for case in cases:
            peers[case.mode].add(case.name.split()[0])
        lists = set(parameter_lists())
        assert peers == {
            "step / default": lists,
            "step / fused": lists,
            "step / copy": {"resnet50", "flat"},
        }
        for case in all_cases(["optimizer"], Options(quick=True)):
            ours, theirs = case.prepare().candidates
            assert (ours.side, theirs.side) == (OURS, TORCH)
            assert case.mode == f"{STEP} / {theirs.label}"

    def test_a_copy_moves_the_bytes_of_a_step(self):
        sizes = [(3, 5), (5,)]
        for rule, floats in zip(RULES, (30, 50, 50), strict=True):
            _, copy = _workload(rule, "copy", sizes, seed=0).candidates
            assert copy.call(0).numel() == floats
            assert relative_error(copy.results(0), copy.results(0)) == 0

    def test_training_measures_torch_in_both_layouts_and_optimizers(self):
        case = all_cases(["training_step"], Options(batches=(1,)))[0]
        peers = {c.label for c in case.prepare().candidates if c.side == TORCH}
        assert peers == {
            f"{layout} {v}" for layout in (NCHW, CHANNELS_LAST) for v in ("default", "fused")
        }


class TestOutputs:
    def test_table_keeps_slow_and_delegated_rows(self):
        console = Console(record=True, width=200, file=io.StringIO())
        rows = [make_row(2.0), make_row(0.5, name="slow", kernel="aten", native=False)]
        print_report(console, rows, ENVIRONMENT)
        text = console.export_text()
        assert "a CPU" in text
        slow = next(line for line in text.splitlines() if "slow" in line)
        assert "0.50" in slow
        assert "aten" in slow
        mean = next(line for line in text.splitlines() if "geometric mean" in line)
        assert "1.00" in mean
        assert "1/2 aten" in mean

    def test_disturbed_rows_are_marked_and_counted(self):
        console = Console(record=True, width=200, file=io.StringIO())
        rows = [make_row(), make_row(name="disturbed", interruptions=250.0)]
        print_report(console, rows, ENVIRONMENT)
        text = console.export_text()
        marked = [line for line in text.splitlines() if "1.80–2.20!" in line]
        assert len(marked) == 1
        assert "disturbed" in marked[0]
        assert "1 of 2 rows were interrupted" in text

    def test_json_schema(self, tmp_path):
        inexact = make_row(torch=Side(NCHW, NCHW, 1e-5, 0.0))
        file = tmp_path / "report.json"
        write_json(file, [make_row(), inexact], ENVIRONMENT)
        report = json.loads(file.read_text())
        assert set(report) == {"version", "environment", "rows", "summaries"}
        assert report["environment"] == ENVIRONMENT
        fields = {field.name for field in dataclasses.fields(Row)} | {"error_quotient"}
        assert all(set(row) == fields for row in report["rows"])
        first, second = report["rows"]
        assert first["ratio"] == {"median": 2.0, "low": 1.8, "high": pytest.approx(2.2)}
        assert first["error_quotient"] == 0.5
        assert second["error_quotient"] is None
        assert report["summaries"][0]["ratio"] == pytest.approx(2.0)

    def test_environment_names_no_machine(self):
        from benchmarks.environment import describe_environment

        environment = describe_environment()
        assert {"cpu", "isa", "torch", "python"} <= set(environment)
        import platform

        text = json.dumps(environment)
        assert platform.node() not in text
        assert str(Path.home()) not in text

    def test_png_is_small(self, tmp_path):
        from PIL import Image

        file = tmp_path / "report.png"
        write_png(file, [make_row(0.5 + index / 20) for index in range(100)], ENVIRONMENT)
        assert file.stat().st_size < 300_000
        with Image.open(file) as image:
            assert image.format == "PNG"
            assert image.height > image.width


class TestCommand:
    @staticmethod
    def parse(*arguments):
        parser = argparse.ArgumentParser()
        benchmarks.add_arguments(parser)
        return parser.parse_args(arguments)

    def test_refuses_to_compare_torch_with_itself(self, capsys, tmp_path):
        file = tmp_path / "report.json"
        with cnnkernels.use_backend("torch"):
            assert benchmarks.run(self.parse("--quick", "--json", str(file))) == 1
        assert "Nothing to measure" in capsys.readouterr().err
        assert not file.exists()

    @pytest.mark.usefixtures("keep_threads")
    def test_run_writes_what_was_asked_for(self, monkeypatch, capsys, tmp_path):
        monkeypatch.setattr(command.cnnkernels, "get_backend", lambda: "native")
        before = torch.get_num_threads()
        json_file, png_file = tmp_path / "report.json", tmp_path / "report.png"
        arguments = ["--quick", "--suite", "max_pool2d", "--batch", "1", "--samples", "2"]
        arguments += ["--threads", "1", "2", "--forward-only"]
        arguments += ["--json", str(json_file), "--png", str(png_file)]
        assert benchmarks.run(self.parse(*arguments)) == 0
        rows = json.loads(json_file.read_text())["rows"]
        assert [row["threads"] for row in rows] == [1] * 6 + [2] * 6
        assert {row["mode"] for row in rows} == {
            f"{FORWARD} / {layout}" for layout in (NCHW, CHANNELS_LAST)
        }
        assert png_file.exists()
        assert "ch1_pool_4x4" in capsys.readouterr().out
        assert torch.get_num_threads() == before

    @pytest.mark.parametrize(
        "arguments",
        [("--suite", "conv3d"), ("--batch", "0"), ("--threads", "-1"), ("--samples", "many")],
    )
    def test_bad_arguments_are_refused(self, arguments, capsys):
        with pytest.raises(SystemExit) as raised:
            self.parse(*arguments)
        assert raised.value.code == 2
        assert arguments[1] in capsys.readouterr().err

    def test_runs_as_a_module_from_a_checkout(self):
        finished = subprocess.run(
            [sys.executable, "-m", "benchmarks", "--help"],
            cwd=PROJECT,
            capture_output=True,
            text=True,
            check=True,
        )
        assert "--quick" in finished.stdout
