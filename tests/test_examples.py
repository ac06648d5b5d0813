"""The programs in examples/."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import cnnkernels

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str) -> ModuleType:
    """The example as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads that wait for each other cost more than they bring on images this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def digits():
    for library in ("sklearn", "matplotlib"):
        pytest.importorskip(library, reason="the extra 'examples' is not installed")
    return load("train_digits")


def test_both_runs_start_from_the_same_weights(digits):
    ours, plain = digits.make_runs(seed=5)
    assert ours.model.state_dict().keys() == plain.model.state_dict().keys()
    for name, value in plain.model.state_dict().items():
        assert torch.equal(ours.model.state_dict()[name], value)
    kinds = [type(module) for module in ours.model.modules()]
    assert kinds.count(cnnkernels.nn.Conv2dReLUMaxPool2d) == 2
    assert type(ours.optimizer) is cnnkernels.optim.SGD
    assert {type(module).__module__.split(".")[0] for module in plain.model.modules()} == {"torch"}
    assert type(plain.optimizer) is torch.optim.SGD


def test_held_out_images_are_not_trained_on(digits):
    data = digits.load_data(seed=0)
    assert data.train_images.shape == (1437, 1, 8, 8)
    assert data.test_images.shape == (360, 1, 8, 8)
    assert len(data.train_labels) + len(data.test_labels) == 1797
    # No image of the data set occurs twice, so the two parts must not share one.
    everything = torch.cat([data.train_images, data.test_images]).flatten(1)
    assert len(torch.unique(everything, dim=0)) == 1797
    assert everything.min() == 0
    assert everything.max() == 1


def test_training_reaches_97_per_cent(digits):
    data = digits.load_data(seed=2)
    ours, plain = digits.make_runs(seed=2)
    digits.train((ours, plain), data, epochs=8, batch_size=32, seed=2)
    for run in (ours, plain):
        assert run.accuracies[-1] >= 0.97
        assert len(run.seconds) == len(run.losses) == len(run.accuracies) == 8
        assert min(run.seconds) > 0
    # Rounding differs and training amplifies it: the first epoch is compared closely.
    assert ours.losses[0] == pytest.approx(plain.losses[0], rel=1e-3)
    assert ours.accuracies[-1] == pytest.approx(plain.accuracies[-1], abs=0.015)


def test_speedup_is_the_median_of_the_pairs_after_the_first(digits):
    ours, plain = digits.make_runs(seed=0)
    ours.seconds, plain.seconds = [1.0, 1.0, 2.0, 1.0], [90.0, 3.0, 4.0, 8.0]
    assert digits.median_speedup(ours, plain) == 3.0
    ours.seconds, plain.seconds = [1.0], [5.0]
    assert digits.median_speedup(ours, plain) == 5.0


def test_train_digits_prints_both_and_draws(digits, tmp_path, capsys):
    from PIL import Image

    picture = tmp_path / "new" / "curve.png"
    digits.main(["--epochs", "2", "--batch-size", "64", "--seed", "1", "--out", str(picture)])
    output = capsys.readouterr().out
    rows = re.findall(r"│ (cnnkernels|torch) +│ +([\d.]+)% │ +([\d.]+) │ +\d+ ms │", output)
    assert [name for name, _, _ in rows] == ["cnnkernels", "torch"]
    assert all(0 < float(accuracy) <= 100 for _, accuracy, _ in rows)
    assert re.search(r"An epoch takes plain torch [\d.]+ times as long", output)
    with Image.open(picture) as image:
        image.load()
        assert image.format == "PNG"
        assert len(image.convert("RGB").getcolors(maxcolors=2**24)) > 50


@pytest.mark.parametrize("option", ["--epochs", "--batch-size"])
def test_train_digits_refuses_zero(digits, option, capsys):
    with pytest.raises(SystemExit) as exit_:
        digits.main([option, "0"])
    assert exit_.value.code == 2
    assert f"{option} must be at least 1" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_export_model_gives_the_same_outputs(tmp_path, capsys):
    load("export_model").main(["--out", str(tmp_path / "models")])
    differences = re.findall(r"(.+), largest difference: (.+)", capsys.readouterr().out)
    assert [name for name, _ in differences] == ["torch.export", "TorchScript"]
    assert all(float(difference) < 1e-6 for _, difference in differences)
    assert {path.name for path in (tmp_path / "models").iterdir()} == {"model.pt", "model.pt2"}


def test_train_digits_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(SystemExit, match=r"pip install 'cnnkernels\[examples\]'"):
        load("train_digits")
