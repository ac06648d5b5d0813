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

from benchmarks.cases import FORWARD, FORWARD_BACKWARD, Spread
from benchmarks.gpu import (
    block,
    command,
    convolution,
    max_pool2d,
    measure,
    network,
    operation,
    optimizer,
    run,
    timing,
)
from benchmarks.gpu.device import Device, open_device
from benchmarks.gpu.goals import GOALS, verdicts
from benchmarks.gpu.operation import CHANNELS_LAST, NCHW
from benchmarks.gpu.options import DRY_RUN, QUICK, Options
from benchmarks.gpu.precision import BF16, FP16, FP32, PRECISIONS, TF32
from benchmarks.gpu.report import page
from benchmarks.gpu.results import Results, merge, read_results, write_results
from benchmarks.gpu.rows import OURS, TORCH, Case, Comparison, Contender, Measured, Row, Workload
from benchmarks.gpu.run import CUT_OFF, FAILED, LEFT_OUT, PASSED, Runner, Step
from benchmarks.gpu.tables import tables_of
from benchmarks.gpu.timing import Sampling
from benchmarks.layers import read_conv2d_layers
from benchmarks.optimizer import parameter_lists
from benchmarks.resnet18 import ResNet18
from cnnkernels import _native

PROJECT = Path(__file__).parent.parent
TINY = Sampling(rounds=2, least_rounds=1, budget_seconds=0.0, wall_rounds=1, wall_seconds=0.0)
CPU = Device("cpu", 2**16, 2**28, None)


class _LargestErrors(dict[tuple[str, str], float]):
    """By precision, for any pass; several where a pool or a step makes more of rounding."""

    def __missing__(self, key: tuple[str, str]) -> float:
        return {
            "float32": 1e-6, FP32: 1e-6, TF32: 1e-6, "float16": 5e-3, FP16: 5e-3, BF16: 2e-2,
            network.AUTOCAST: 5e-3,
        }[key[0]]  # fmt: skip


LARGEST_ERRORS = _LargestErrors(
    {
        # Outputs that half precision makes equal send a gradient to another place.
        (FP16, FORWARD_BACKWARD): 1.0,
        (FP32, network.TRAINING): 1e-4,
        (TF32, network.TRAINING): 1e-4,
        (network.AUTOCAST, network.TRAINING): 0.5,
    }
)


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


def convolution_row(kind: str, dtype: str, mode: str, **ratios: float) -> Row:
    """A row of our own times 1e-5 s; ratios by name, those of forced kernels too."""
    labels = [f"{side} {layout}" for side in (TORCH, OURS) for layout in (NCHW, CHANNELS_LAST)]
    return Row(
        suite=convolution.SUITE,
        name="layer",
        batch=32,
        dtype=dtype,
        mode=mode,
        kind=kind,
        native=True,
        measured={
            label: replace(measured(label, 1e-5, 0.25), matmul_share=0.5, plan="direct")
            for label in labels
        },
        comparisons={
            name: Comparison(OURS, TORCH, Spread(ratio, ratio, ratio), None)
            for name, ratio in ratios.items()
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
            plans = {side.plan for side in row.measured.values()}
            if not any(operation.ATEN in plan for plan in plans):
                assert row.native is _has_library(), row
            if row.suite == max_pool2d.SUITE:
                assert row.exact
            for side in row.measured.values():
                assert side.seconds.median > 0
                # torch's fused step on the CPU leaves 16-bit elements out.
                if side.error is not None and side.label != optimizer.FUSED:
                    assert side.error < LARGEST_ERRORS[row.dtype, row.mode], (row, side)
        printed = capsys.readouterr()
        assert "dry run" in printed.out
        assert "10,000 in 160" in printed.out
        text = page(results)
        assert "no figure below means anything" in text
        assert "This suite has not been measured" not in text
        for title in ("convolution: backward", "block: forward+backward", "network: inference"):
            assert f"## {title}" in text
        assert "not available: not asked for" in text
        assert "* Inductor: not asked for" in text
        assert read_results(file) == results

    def test_time_that_runs_out_is_told(self, tmp_path, capsys):
        file = tmp_path / "results.json"
        arguments = ["--out", str(file), "--device", "cpu", "--suite", "max_pool2d"]
        assert command.run(parse(*arguments, "--seconds", "-1")) == 0
        results = read_results(file)
        assert not results.rows
        assert len(results.left_out) == 4
        assert "0 rows measured, 0 failed, 4 left out" in capsys.readouterr().out
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
            "alexnet_3x3_s2",
            2,
            "float32",
            FORWARD,
        )
        inputs, outputs = 2 * 64 * 55 * 55, 2 * 64 * 27 * 27
        assert case.prepare().bytes_moved == 4 * inputs + (4 + 1) * outputs


class TestConvolution:
    def test_layers_of_every_kind_come_first_in_the_passes_of_the_goals(self):
        cases = convolution.cases(Options(), CPU)
        assert {case.kind for case in cases[:4]} == set(convolution.KINDS)
        assert {case.mode for case in cases[:50]} == {FORWARD}
        assert {case.dtype for case in cases[:50]} == {FP32, FP16}
        assert {case.mode for case in cases} == set(convolution.MODES)
        assert {case.dtype for case in cases} == set(PRECISIONS)
        assert {case.batch for case in cases} == {32, 64}
        titles = [case.title for case in cases]
        assert len(set(titles)) == len(titles)
        for network_name in convolution.NETWORKS:
            assert any(case.name.startswith(network_name) for case in cases)
        for layer in ("ch1_net_conv1", "ch1_net_conv2", "lenet5_c1_k6_32x32_5x5"):
            assert any(layer in case.name for case in cases), layer
        # As many as fit into the time of the step.
        assert 150 < len(cases) < 200

    def test_full_is_all_layers_in_all_passes_and_precisions(self):
        cases = convolution.cases(Options(full=True), CPU)
        layers = [
            layer
            for network_name in convolution.NETWORKS
            for layer in read_conv2d_layers(network_name)
            if network_name != "tutorial" or "_net_" in layer.name
        ]
        images = sum(layer.reads_image for layer in layers)
        assert len(cases) == len(PRECISIONS) * (4 * len(layers) - images)
        assert len(convolution.cases(QUICK, CPU)) < len(convolution.cases(Options(), CPU))

    @pytest.mark.parametrize(
        ("file", "name", "kind"),
        [
            ("vgg16", "c3_k64_224x224_3x3_s1", convolution.FIRST),
            ("tutorial", "ch1_net_conv1", convolution.FIRST),
            ("mobilenet_v2", "dw_c32_112_s1", convolution.DEPTHWISE),
            ("tutorial", "ch1_net_conv2", convolution.NARROW),
            ("resnet50_v1_5", "c128_k128_28x28_3x3_s1", convolution.NARROW),
            ("resnet50_v1_5", "c64_k256_56x56_1x1_s1", convolution.WIDE),
        ],
    )
    def test_kinds(self, file, name, kind):
        (layer,) = [layer for layer in read_conv2d_layers(file) if layer.name == name]
        assert convolution.kind_of(layer) == kind

    def test_tf32_is_allowed_within_its_contenders_only(self):
        before = torch.backends.cudnn.allow_tf32
        for case in convolution.cases(DRY_RUN, CPU)[:20:4]:
            for contender in case.prepare().contenders:
                with contender.context():
                    assert torch.backends.cudnn.allow_tf32 == (case.dtype == TF32)
                    assert torch.backends.cudnn.benchmark
                    assert torch.is_grad_enabled() == (case.mode != FORWARD)
        assert torch.backends.cudnn.allow_tf32 == before
        assert not torch.backends.cudnn.benchmark
        assert torch.is_grad_enabled()

    @pytest.mark.parametrize(
        ("mode", "results", "elements"),
        [
            (FORWARD, ("output",), 54 + 18 + 108),
            (convolution.INPUT_GRADIENT, ("input",), 108 + 18 + 54),
            (convolution.WEIGHT_GRADIENT, ("weight",), 108 + 54 + 18),
            (convolution.BACKWARD, ("input", "weight", "bias"), 108 + 2 * (54 + 18)),
        ],
    )
    def test_bytes_and_results_of_the_passes(self, mode, results, elements):
        layer = replace(read_conv2d_layers("tutorial")[0], in_channels=2, out_channels=4)
        one = operation.Operation(
            input_size=torch.Size((3, 2, 3, 3)),
            weight_size=torch.Size((9, 2, 1, 1)),
            output_size=torch.Size((3, 4, 3, 3)),
            precision=PRECISIONS[FP16],
            gradients=convolution._gradients(layer, mode),
            with_forward=False,
            flops=1,
        )
        assert one.results == results
        assert one.bytes_moved == 2 * elements

    def test_float64_judges_the_first_images_where_all_take_too_long(self):
        one = operation.Operation(
            torch.Size((8, 2, 5, 5)), torch.Size((3, 2, 3, 3)), torch.Size((8, 3, 3, 3)),
            PRECISIONS[FP32], ("input", "weight", "bias"), with_forward=False, flops=8 * 10**9,
        )  # fmt: skip
        assert one.judged_images == 8
        long = replace(one, flops=8 * 3 * 10**9)
        assert long.judged_images == 3
        assert replace(one, flops=10**14).judged_images == 1
        functions = convolution._functions(
            replace(read_conv2d_layers("tutorial")[0], padding=(0, 0))
        )
        tensors = operation._random(long, 2, CPU, 0)
        variants = [
            operation.Variant(side, side, NCHW, functions[side], contextlib.nullcontext)
            for side in (OURS, TORCH)
        ]
        wrong_after = operation.Variant(
            "wrong", OURS, NCHW, self.wrong_of_images(functions[TORCH], 3), contextlib.nullcontext
        )
        wrong_before = replace(
            wrong_after, label="seen", function=self.wrong_of_images(functions[TORCH], 2)
        )
        errors = operation._errors(
            long, functions[TORCH], tensors, [*variants, wrong_after, wrong_before]
        )
        assert max(errors[label] for label in (OURS, TORCH, "wrong")) < 1e-6
        assert errors["seen"] > 1e-2

    @staticmethod
    def wrong_of_images(function, first):
        """The function, doubled from an image on."""

        def wrong(x, weight, bias):
            output = function(x, weight, bias)
            if output.dtype == torch.float64:
                return output
            scale = torch.ones(len(output), 1, 1, 1)
            scale[first:] = 2
            return output * scale

        return wrong

    def test_what_a_plan_leaves_to_aten_is_forced_beside_it(self, monkeypatch):
        policies: list[str] = []

        class Library:
            def set_cuda_conv2d(self, name: str) -> None:
                policies.append(name)

            def config(self) -> dict[str, str]:
                return {"cuda_conv2d": policies[-1] if policies else "auto"}

        class OnGpu:
            is_cuda = True

        class Explained:
            weight = OnGpu()

            def explain(self, function):
                plan = policies[-1] if policies and policies[-1] != "auto" else "aten"
                return {"algorithm": plan, "input_gradient": "direct", "weight_gradient": plan}

        monkeypatch.setattr(convolution._native, "library", Library())
        functions = convolution._functions(read_conv2d_layers("tutorial")[0])
        tensors = {layout: Explained() for layout in (NCHW, CHANNELS_LAST)}
        found = {
            variant.label: variant
            for variant in convolution._variants(functions, FORWARD, (), PRECISIONS[BF16], tensors)
        }
        assert policies == ["native", "auto"] * 2
        assert [found[f"{side} {NCHW}"].plan for side in (OURS, "native")] == ["aten", "native"]
        with found["native NCHW"].context():
            assert policies[-1] == "native"
        assert policies[-1] == "auto"
        labels = {label: (each.side, each.layout) for label, each in found.items()}
        pairs = convolution._pairs(labels, dict.fromkeys(found, 1.0))
        assert pairs["native NCHW"] == ("native NCHW", "torch NCHW")
        assert pairs[convolution.CUDNN_ALONE] == ("ours NCHW", convolution.CUDNN_ALONE)
        assert pairs[CHANNELS_LAST] == ("ours channels_last", "torch channels_last")
        inputs = convolution._variants(
            functions, convolution.INPUT_GRADIENT, ("input",), PRECISIONS[FP32], tensors
        )
        assert {variant.plan for variant in inputs if variant.side == OURS} == {"direct"}
        assert convolution.CUDNN_ALONE not in {variant.label for variant in inputs}
        both = convolution._plan(Explained().explain(None), ("input", "weight", "bias"))
        assert both == "direct + aten"


class TestBlock:
    CASES = block.cases(replace(DRY_RUN, inductor=True), CPU)

    def test_blocks_and_modes(self):
        cases = block.cases(Options(), CPU)
        assert {case.dtype for case in cases} == {FP16, FP32}
        assert len(cases) == 4 * len(block.BLOCKS)
        assert len(block.cases(Options(full=True), CPU)) == 8 * len(block.BLOCKS)

    def test_what_torch_compile_makes_is_a_peer(self, monkeypatch):
        monkeypatch.setattr(block, "compiled", lambda function, tensors, operation: function)
        for case in (self.CASES[0], self.CASES[1]):
            row = measure.measure(case, CPU, TINY, ceilings=measure.Ceilings())
            assert not row.missing
            assert row.measured[block.INDUCTOR].error < 1e-2
            assert row.comparisons[block.INDUCTOR].ours == "ours NCHW"
            assert (
                f"{row.comparisons[block.INDUCTOR].ratio.median:.2f}"
                in tables_of([row])[-1].rows[0]
            )

    def test_without_torch_compile_the_reason_is_told(self, monkeypatch):
        def refuse(function, tensors, operation):
            raise RuntimeError("no | compiler\nand a trace")

        monkeypatch.setattr(block, "compiled", refuse)
        row = measure.measure(self.CASES[0], CPU, TINY, ceilings=measure.Ceilings())
        assert row.missing == {block.INDUCTOR: "RuntimeError: no | compiler"}
        assert "not available: RuntimeError: no \\| compiler" in tables_of([row])[-1].rows[0]
        assert not any("Inductor" in verdict.goal.text for verdict in verdicts([row]))
        text = page(Results({"device": "cuda"}, 1e12, {}, [row], []))
        assert "* Inductor: RuntimeError: no | compiler" in text

    def test_a_compiled_block_has_been_run_in_its_pass(self, monkeypatch):
        calls = []

        def compile_of(function, **options):
            assert options == {"fullgraph": True, "dynamic": False}

            def counted(x, weight, bias):
                calls.append((x.requires_grad, weight.requires_grad, torch.is_grad_enabled()))
                return function(x, weight, bias)

            return counted

        monkeypatch.setattr(torch, "compile", compile_of)
        for case in self.CASES[:2]:
            case.prepare()
        assert calls == [(False, False, False), (False, True, True)]


class TestNetwork:
    def test_resnet18_is_the_network_of_the_paper(self):
        model = ResNet18()
        assert sum(parameter.numel() for parameter in model.parameters()) == 11_689_512
        with torch.device("meta"):
            assert ResNet18(classes=7)(torch.empty(2, 3, 64, 64)).shape == (2, 7)

    def test_cases(self):
        cases = network.cases(Options(), CPU)
        assert {(case.name, case.dtype) for case in cases if case.mode == network.TRAINING} == {
            ("ch1_net", FP32),
            *(("resnet18", precision) for precision in (network.AUTOCAST, FP32, TF32)),
        }

    def test_both_sides_learn_the_same(self):
        case = network.cases(DRY_RUN, CPU)[1]
        row = measure.measure(case, CPU, TINY, ceilings=measure.Ceilings())
        assert row.native is _has_library()
        assert row.figures[f"{network.APART} {NCHW}"] < 1e-5
        ours, torchs = (row.figures[f"{network.LOSS} {side} {NCHW}"] for side in (OURS, TORCH))
        assert ours == pytest.approx(torchs, rel=1e-5)
        assert CHANNELS_LAST not in row.comparisons  # the Net's view admits none
        (table,) = tables_of([row])
        assert f"{ours:.6g}" in table.rows[0]


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
            contenders, 3, 2**17, bytes_moved=1000, flops=500, arithmetic=FP16,
            errors=lambda: {OURS: 0.0, TORCH: 1e-8},
            pairs=lambda medians: {"ratio": (OURS, TORCH)},
        )  # fmt: skip
        case = Case("suite", "name", None, "float32", "mode", lambda: workload)
        ceilings = measure.Ceilings(1e9, {FP16: 1e12})
        row = measure.measure(case, CPU, TINY, ceilings=ceilings)
        ours, theirs = row.measured[OURS], row.measured[TORCH]
        assert ours.share == pytest.approx(1000 / (1e9 * ours.seconds.median))
        assert ours.teraflops == pytest.approx(500 / ours.seconds.median * 1e-12)
        assert ours.matmul_share == pytest.approx(500 / (1e12 * ours.seconds.median))
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

    def test_goals_of_convolutions_speak_of_their_kinds(self):
        first = convolution_row(convolution.FIRST, FP16, FORWARD, NCHW=1.5, channels_last=1.1)
        rows = [
            first,
            replace(first, kind=convolution.DEPTHWISE),
            convolution_row(
                convolution.NARROW, FP16, FORWARD, NCHW=1.4, **{convolution.CUDNN_ALONE: 0.7}
            ),
            convolution_row(convolution.WIDE, FP16, FORWARD, NCHW=0.1),
            convolution_row(convolution.WIDE, FP32, FORWARD, NCHW=9.0, same=1.2),
            convolution_row(convolution.WIDE, TF32, convolution.BACKWARD, NCHW=1.1),
            convolution_row(convolution.NARROW, FP32, convolution.WEIGHT_GRADIENT, NCHW=0.9),
        ]
        found = {
            verdict.goal.text.partition(":")[0].partition(",")[0]: verdict
            for verdict in verdicts(rows)
        }
        assert (found["first layers"].worst, found["first layers"].holds) == (1.1, False)
        assert (found["depthwise"].worst, found["depthwise"].rows) == (1.1, 1)
        fp16 = [verdict for verdict in verdicts(rows) if verdict.goal.text.startswith("fp16")]
        assert [(each.worst, each.rows, each.holds) for each in fp16] == [
            (1.4, 1, True),
            (0.7, 1, False),
        ]
        assert (found["strict fp32"].worst, found["strict fp32"].rows) == (1.2, 1)
        assert (found["convolution"].worst, found["convolution"].rows) == (0.9, 2)

    def test_forced_kernels_plans_and_ceilings_have_columns(self):
        row = convolution_row(
            convolution.WIDE, FP32, FORWARD, NCHW=0.9, channels_last=0.8,
            **{"native channels_last": 0.4},
        )  # fmt: skip
        row.measured[f"{OURS} {CHANNELS_LAST}"] = replace(
            row.measured[f"{OURS} {CHANNELS_LAST}"], plan="aten"
        )
        lost = replace(row, native=False, measured={}, comparisons={}, failure="no memory")
        table = tables_of([row, lost])[-1]
        cells = dict(zip(table.heads, table.rows[0], strict=True))
        assert cells["plan"] == "direct / aten"
        assert cells["forced"] == "– / 0.40"
        assert (cells["NCHW"], cells["NHWC"]) == ("0.90", "0.80")
        assert (cells["of matmul"], cells["of copy"]) == ("50%", "25%")
        assert cells["our µs, NCHW / NHWC"] == "10.0 / 10.0"
        assert table.rows[1][:2] == ["layer, batch 32, fp32", "failed: no memory"]
        assert all(len(cells) == len(table.heads) for cells in table.rows)

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

    def test_the_page_that_is_kept_has_every_suite(self):
        lines = (PROJECT / "docs" / "performance-gpu.md").read_text(encoding="utf-8").splitlines()
        for suite in command.SUITES:
            assert any(line.startswith(f"## {suite}") for line in lines), suite

    def test_results_of_several_files_make_one_page(self, tmp_path):
        environment: dict[str, str | int] = {"device": "cuda", "gpu": "a GPU", "torch": "2.11"}
        files = [tmp_path / "a.json", tmp_path / "b.json"]
        for file, name in zip(files, ("1M in 1", "25M in 1"), strict=True):
            rows = [optimizer_row(name, 2.0, 1.0, 0.9)]
            write_results(file, Results(environment, 3e12, {FP16: 7e14}, rows, []))
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
        assert "| matrix product in fp16 | 700 TFLOP/s |" in text
        assert "## network\n\nThis suite has not been measured.\n" in text
        assert text.count("This suite has not been measured.") == len(command.SUITES) - 1
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
        results = Results(facts, 3e12, {}, [optimizer_row("1M in 1", 2.0, 1.6, 0.9)], [])
        write_results(tmp_path / "optimizer.json", results)
        run._write_page(runner, tmp_path, environment, page_file)
        assert [outcome.outcome for outcome in runner.outcomes] == [PASSED, PASSED]
        assert "| good | passed |" in page_file.read_text()
        assert (tmp_path / "performance-gpu.md").read_text() == page_file.read_text()

    @pytest.mark.parametrize("no_tests", [False, True])
    def test_suites_are_chosen_and_results_of_the_others_stay(
        self, tmp_path, monkeypatch, no_tests
    ):
        def step(name: str) -> Step:
            return Step(name, 30, lambda limit: python("print(1)"))

        monkeypatch.setattr(run, "_facts", lambda environment: step("environment"))
        monkeypatch.setattr(run, "_build", lambda environment: step("build"))
        monkeypatch.setattr(run, "_tests", lambda environment: [step("tests")])
        monkeypatch.setattr(run, "_sanitizers", lambda environment: [step("sanitizer")])
        monkeypatch.setattr(run, "_benchmark", lambda suite, *others: step(suite))
        monkeypatch.setattr(run, "_write_page", lambda *args: None)
        for suite in run.SUITES:
            (tmp_path / f"{suite}.json").touch()
        args = argparse.Namespace(
            out=tmp_path, page=tmp_path / "page.md", quick=False, no_tests=no_tests,
            suite=["network", "block"], seconds=60.0,
        )  # fmt: skip
        assert run.run_all(args) == 0
        document = json.loads((tmp_path / "steps.json").read_text())
        names = [each["name"] for each in document["steps"]]
        assert names[-2:] == ["network", "block"]
        assert ("tests" in names, "sanitizer" in names) == (not no_tests, not no_tests)
        left = {file.stem for file in tmp_path.glob("*.json")} - {"steps"}
        assert left == set(run.SUITES) - {"network", "block"}

    def test_a_step_of_the_benchmark_knows_its_suite_and_its_time(self, tmp_path):
        assert set(run.SUITES) == set(command.SUITES)
        for suite, limit in run.SUITES.items():
            step = run._benchmark(suite, tmp_path, ["--quick"], {})
            arguments = list(step.command(limit))[3:]
            parsed = parse(*arguments)
            assert parsed.suite == [suite]
            assert parsed.quick
            assert parsed.seconds < limit

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
