"""The tutorial: its numbers on every backend, its judge, its tables and its pictures."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

import cnnkernels
from cnnkernels.__main__ import main
from cnnkernels.tutorial import PROGRAMS, Program, command, program, run_program
from cnnkernels.tutorial import by_hand as hand
from cnnkernels.tutorial import linear as linear_module
from cnnkernels.tutorial import pattern_training as training

BACKENDS = ["torch", "native"] if cnnkernels.is_native_available() else ["torch"]
BY_NAME = {p.name: p for p in PROGRAMS}

# The numbers of the chapters, written down again here so that a slip in a module cannot hide.
NUMBERS = [
    ("gradient", "gradient at (1, 2)", [2, 4]),
    ("net", "parameter tensors", 10),
    ("net", "size of conv1.weight", [6, 1, 3, 3]),
    ("net", "parameters in all", 81194),
    ("net", "shape after pool2", [1, 16, 6, 6]),
    ("net", "shape after fc3", [1, 10]),
    ("max-pooling", "pooled 4×4 matrix", [[4, 4], [4, 4]]),
    ("max-pooling", "pooled row and shifted row", [5, 5]),
    ("worked-convolution", "one output", 15),
    ("convolution-4x4", "output", -0.8313058),
    ("stride", "first filter", np.full((2, 2), -0.39049476)),
    ("stride", "second filter", np.full((2, 2), 0.12070286)),
    ("padding", "kernel 2, padding 0: size", [2, 2]),
    ("padding", "kernel 3, padding 0: size", [1, 1]),
    ("padding", "kernel 3, padding 1: size", [2, 2]),
    ("linear", "1 feature: y", [0.04909718, 4.909718]),
    ("linear", "2 features: y", [[-0.5130856, 0.6920992], [-51.30856, 69.20992]]),
    ("loss", "0 and 2", 0.4581),
    ("loss", "10, 122, 1000, 200", 58437.6680),
    ("pattern-training", "first loss, seeds 0 to 4", np.full(5, 1.3862943649)),
    ("pattern-training", "loss 6", 3.7199602127),
    ("pattern-training", "accuracy before, %", 0),
    ("pattern-training", "accuracy after, %", 100),
    ("gradient-descent", "x after 800 steps", 0.98**800),
    ("simple-gd", "x after 50 steps", 0.8**50),
]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads that wait for each other cost more than they bring on images this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=BACKENDS)
def computed(request):
    """Every program's values on one backend."""
    with cnnkernels.use_backend(request.param):
        return {p.name: p.compute() for p in PROGRAMS}


@pytest.mark.parametrize(("name", "quantity", "expected"), NUMBERS)
def test_number_of_the_chapter(computed, name, quantity, expected):
    value = computed[name][quantity]
    value = value.detach().numpy() if isinstance(value, torch.Tensor) else value
    # The descent multiplies 800 rounded numbers.
    tolerance = 5e-5 if name == "gradient-descent" else 3e-6 if name == "simple-gd" else 1e-6
    assert_allclose(value, expected, rtol=tolerance)


def test_loss_of_equal_images_is_exactly_zero(computed):
    assert computed["loss"]["the same image"].item() == 0.0


@pytest.mark.parametrize("name", BY_NAME)
def test_every_row_agrees(name):
    rows = run_program(BY_NAME[name])
    assert [row.quantity for row in rows if not row.agrees] == []
    for row in rows:
        assert (row.kernel is not None) == cnnkernels.is_native_available()


@pytest.mark.parametrize("name", BY_NAME)
def test_printed_values_belong_to_computed_quantities(computed, name):
    chosen = BY_NAME[name]
    quantities = chosen.by_hand().keys()
    assert computed[name].keys() == quantities
    assert chosen.printed.keys() <= quantities
    assert chosen.tolerances.keys() <= quantities


@pytest.mark.skipif("native" not in BACKENDS, reason="the compiled library is not built")
@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        ("gradient", ["conv2d", "conv2d_backward"]),
        ("net", ["conv2d", "max_pool2d", "max_pool2d_backward", "conv2d_relu_max_pool2d"]),
        ("max-pooling", ["max_pool2d"]),
        ("linear", ["conv2d"]),
        ("pattern-training", ["conv2d", "conv2d_backward", "sgd_step_"]),
        ("simple-gd", ["gd_step_"]),
    ],
)
def test_kernel_column_comes_from_the_kernels(name, kernels):
    from cnnkernels import _C

    def calls(backend: str) -> dict[str, int]:
        before = _C.kernel_calls()
        with cnnkernels.use_backend(backend):
            BY_NAME[name].compute()
        return {kernel: count - before[kernel] for kernel, count in _C.kernel_calls().items()}

    native = calls("native")
    assert [kernel for kernel in kernels if native[kernel] == 0] == []
    assert set(calls("torch").values()) == {0}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", [0, 7])
def test_training_follows_plain_torch(backend, seed):
    weight = training.random_weight(seed)
    with cnnkernels.use_backend(backend):
        ours = training.train_from(weight)

    net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 4, bias=False), torch.nn.Flatten())
    with torch.no_grad():
        net[0].weight.copy_(weight)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.001, momentum=0.9)
    losses = training.train(net, optimizer)

    assert len(losses) == 80
    assert_allclose(ours.losses, losses, rtol=0, atol=3e-5)
    assert_allclose(ours.weight, net[0].weight.detach(), rtol=0, atol=1e-6)
    assert_allclose(ours.losses, training.train_by_hand(weight).losses, rtol=0, atol=3e-5)


def test_random_weights_are_those_of_torch_and_leave_its_generator_alone():
    torch.manual_seed(3)
    expected = torch.nn.Conv2d(1, 4, 4, bias=False).weight
    torch.manual_seed(11)
    first = torch.rand(1)
    torch.manual_seed(11)
    assert torch.equal(training.random_weight(3), expected)
    assert torch.equal(torch.rand(1), first)


def test_fitted_weights_are_weights_that_torch_may_draw():
    # torch draws a 4×4 filter's weights between -1/4 and 1/4.
    assert training.fitted_weight().abs().max() <= 0.25
    assert torch.tensor(cnnkernels.tutorial.loss.filter_from_losses()).abs().max() <= 0.25


@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_is_torchs_linear(backend):
    x, weight = torch.randn(2, 3, 5), torch.randn(4, 5)
    with cnnkernels.use_backend(backend):
        y = linear_module.linear(x, weight)
    assert_allclose(y, torch.nn.functional.linear(x, weight), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("stride", "pad"), [(1, 0), (2, 0), (1, 1), (2, 1), (3, 2)])
def test_convolution_by_hand_is_a_convolution(stride, pad):
    rng = np.random.default_rng(0)
    image, weight, bias = rng.normal(size=(2, 7, 6)), rng.normal(size=(3, 2, 3, 2)), [0.5, -1, 2]
    expected = torch.nn.functional.conv2d(
        *map(torch.as_tensor, (image, weight, np.array(bias))), stride=stride, padding=pad
    )
    output = hand.conv2d(image, weight, bias, stride, pad)
    assert_allclose(output, expected, rtol=1e-12)
    size = [hand.output_size(7, 3, stride, pad), hand.output_size(6, 2, stride, pad)]
    assert list(output.shape[1:]) == size


def test_gradients_by_hand_are_the_gradients():
    rng = np.random.default_rng(1)
    image, weight = rng.normal(size=(2, 8, 8)), rng.normal(size=(3, 2, 3, 3))
    leaves = [torch.tensor(a, requires_grad=True) for a in (image, weight, np.zeros(3))]
    convolved = torch.nn.functional.conv2d(*leaves)
    convolved.retain_grad()
    pooled = torch.nn.functional.max_pool2d(convolved, (2, 3))
    grad_pooled = rng.normal(size=tuple(pooled.shape))
    pooled.backward(torch.tensor(grad_pooled))

    grad = hand.max_pool2d_backward(grad_pooled, convolved.detach().numpy(), 2, 3)
    assert_allclose(grad, convolved.grad, rtol=1e-12)
    gradients = hand.conv2d_backward(grad, image, weight)
    for ours, leaf in zip(gradients, leaves, strict=True):
        assert_allclose(ours, leaf.grad, rtol=1e-12, atol=1e-14)


def constant(by_hand, computed, printed=None, **options):
    """A program of one quantity, q."""
    return Program(
        name="constant",
        chapter=1,
        title="A constant",
        explanation="One number.",
        by_hand=lambda: {"q": by_hand},
        compute=lambda: {"q": computed},
        printed={} if printed is None else {"q": printed},
        **options,
    )


@pytest.mark.parametrize(
    ("chosen", "agrees"),
    [
        (constant(1.0, 1.0), True),
        (constant(1.0, 1.0 + 1e-7), True),
        (constant(1.0, 1.0 + 1e-5), False),
        (constant(1.0, 1.0 + 1e-5, tolerance=1e-4), True),
        (constant(1.0, 1.0 + 1e-5, tolerances={"q": 1e-4}), True),
        (constant(1e-9, 1.1e-9), False),
        (constant(1e-9, 1.1e-9, scale=1.0), True),
        (constant(1.0, 1.0, printed=1.001), False),
        (constant(1.0, float("nan")), False),
        (constant([1.0, 1.0], [1.0, float("nan")]), False),
        (constant([1.0, 1.0], 1.0), False),
        (constant(0.0, 1e-9), True),
        (constant(0.0, 1e-3), False),
    ],
)
def test_agreement(chosen, agrees):
    (row,) = run_program(chosen)
    assert row.agrees == agrees


def test_missing_quantity_is_an_error():
    incomplete = dataclasses.replace(constant(1.0, 1.0), compute=dict)
    with pytest.raises(KeyError, match="q"):
        run_program(incomplete)


def test_command_prints_the_four_columns(capsys):
    assert main(["tutorial", "--only", "stride", "--only", "worked-convolution"]) == 0
    output = capsys.readouterr().out
    header = next(line for line in output.splitlines() if "quantity" in line)
    columns = ["quantity", "chapter", "by hand", "fallback", "kernel", "agree"]
    positions = [header.index(column) for column in columns]
    assert positions == sorted(positions)
    first = next(line for line in output.splitlines() if "first filter" in line)
    shown = 3 + cnnkernels.is_native_available()
    assert first.count("-0.39049476 (×4)") == shown
    product = next(line for line in output.splitlines() if "one output" in line)
    assert product.split().count("15") == shown
    assert "4 of 4 rows agree" in output
    assert "Max pooling" not in output


def test_command_runs_the_programs_in_the_chapters_order(monkeypatch, capsys):
    # The programs' rows have a test of their own.
    monkeypatch.setattr(command, "run_program", lambda chosen: [])
    assert main(["tutorial"]) == 0
    output = capsys.readouterr().out
    titles = [output.index(f"Chapter {p.chapter}: {p.title}") for p in PROGRAMS]
    assert titles == sorted(titles)
    assert [p.chapter for p in PROGRAMS] == sorted(p.chapter for p in PROGRAMS)


def test_command_fails_when_a_row_disagrees(monkeypatch, capsys):
    monkeypatch.setattr(command, "PROGRAMS", (constant(1.0, 1.0), constant(1.0, 1.5)))
    assert main(["tutorial"]) == 1
    output = capsys.readouterr().out
    assert "✗ 5e-01" in output
    assert "1 of 2 rows agree" in output


def test_command_refuses_unknown_program(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["tutorial", "--only", "nothing"])
    assert exit_.value.code == 2
    assert "nothing" in capsys.readouterr().err


def test_without_library_the_kernel_column_says_so(monkeypatch, capsys):
    for module in (program, command):
        monkeypatch.setattr(module, "is_native_available", lambda: False)
    assert main(["tutorial", "--only", "worked-convolution"]) == 0
    output = capsys.readouterr().out
    row = next(line for line in output.splitlines() if "one output" in line)
    assert "not built" in row
    assert "python -m cnnkernels info" in output


def test_tables_need_neither_matplotlib_nor_unicode():
    script = (
        "import sys; from cnnkernels.__main__ import main; "
        "code = main(['tutorial', '--only', 'stride']); "
        "assert 'matplotlib' not in sys.modules; sys.exit(code)"
    )
    root = Path(cnnkernels.__file__).parents[1]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "-0.39049476 (?4)" in done.stdout


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """The directory of a run with --out."""
    pytest.importorskip("matplotlib", reason="the extra 'examples' is not installed")
    pytest.importorskip("PIL", reason="the extra 'examples' is not installed")
    directory = tmp_path_factory.mktemp("tutorial") / "new" / "directory"
    assert main(["tutorial", "--only", "simple-gd", "--out", str(directory)]) == 0
    return directory


@pytest.mark.parametrize("name", ["chapter1.png", "chapter2.png"])
def test_picture_of_a_chapter(pictures, name):
    from PIL import Image

    with Image.open(pictures / name) as image:
        image.load()
        assert image.format == "PNG"
        assert min(image.size) > 500
        # Something is drawn: a blank page has one colour.
        assert len(image.convert("RGB").getcolors(maxcolors=2**24)) > 50


def test_animation_descends_the_parabola(pictures):
    from PIL import Image

    path = pictures / "gradient_descent.gif"
    assert path.stat().st_size < 300_000
    columns = []
    with Image.open(path) as animation:
        assert animation.format == "GIF"
        assert animation.n_frames > 10
        for frame in (0, 10, animation.n_frames - 1):
            animation.seek(frame)
            pixels = np.asarray(animation.convert("RGB")).astype(int)
            # The point is the red blob; its column goes down to the middle, x = 0.
            red = (pixels[..., 0] - pixels[..., 1] > 100) & (pixels[..., 0] > 180)
            columns.append(np.nonzero(red)[1].max() if frame == 0 else np.nonzero(red)[1].min())
    assert columns[0] > columns[1] > columns[2]


def test_out_without_matplotlib_says_what_to_install(monkeypatch, tmp_path, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "matplotlib" else found(name, *rest),
    )
    assert main(["tutorial", "--out", str(tmp_path / "pictures")]) == 1
    captured = capsys.readouterr()
    assert "pip install 'cnnkernels[examples]'" in captured.err
    assert captured.out == ""
    assert not (tmp_path / "pictures").exists()


def test_value_formats():
    from cnnkernels.tutorial.report import format_value

    def shown(value):
        return format_value(program._to_array(value))

    assert shown(-0.8313058) == "-0.8313058"
    assert shown(torch.tensor(-0.0)) == "0"
    assert shown(81194) == "81194"
    assert shown(torch.Size([1, 1, 2, 2])) == "[1, 1, 2, 2]"
    assert shown([[4.0, 4.0], [4.0, 4.0]]) == "4 (×4)"
    assert shown([2.0, 4.0]) == "[2, 4]"
    assert shown([-51.30856, 69.20992]) == "[-51.30856,\n69.20992]"
    assert shown([3.0, 4.0, 0.0, 0.0, 0.0]) == "norm 5"
    assert shown(math.nan) == "nan"


def test_chapter_column_shows_the_chapters_digits(capsys):
    assert main(["tutorial", "--only", "pattern-training", "--only", "convolution-4x4"]) == 0
    output = capsys.readouterr().out
    for number in ("1.3862943649", "3.7199602127", "-0.83130583167", "-0.8313058 "):
        assert number in output
