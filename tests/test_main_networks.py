"""The command line on every kind of network and data: report, figures, warnings."""

import re
from types import SimpleNamespace
from typing import ClassVar

import jax
import numpy as np
import pytest
from command_line import TINY, contents, lines
from flax.traverse_util import flatten_dict

import scl_jax
from experiments import imagenet
from experiments import main as entry
from experiments.config import Config
from experiments.data import ABOUT, NO_EXAMPLES, Dataset, Split
from experiments.main import main
from experiments.models import MODELS, LanguageModel
from experiments.network import make_network

SHORT = ["--epochs", "1", "--seeds", "1", "--batch-size", "16", "--validation", "0"]
SHORT += ["--devices", "1"]


@pytest.fixture(autouse=True)
def tiny_data(monkeypatch):
    monkeypatch.setattr(entry, "load", lambda *args, **kwargs: TINY)


def run(folder, name, *settings):
    """Run an experiment; return the figures that its report shows."""
    assert main([name, *SHORT, *settings, "--out", str(folder)]) == 0
    shown = re.findall(r"!\[.*?\]\((.*?)\)", (folder / "report.md").read_text("utf-8"))
    pictures = [name for name in contents(folder) if name.endswith(".png")]
    assert sorted(shown) == sorted(pictures)
    return shown


def kernels(dataset, model):
    """Return what `_first_kernel` reads of a report, without a training."""
    init = make_network(Config(dataset=dataset, model=model)).init
    params, _ = jax.eval_shape(init, jax.random.key(0))
    masks = jax.eval_shape(scl_jax.mask_params, params).masks
    return SimpleNamespace(
        rows=[
            SimpleNamespace(path=path, shape=leaf.shape)
            for path, leaf in flatten_dict(masks, sep="/").items()
            if leaf is not None
        ]
    )


# Figures


def test_convolutional_run_shows_the_taps_of_the_first_convolution(tmp_path):
    shown = run(tmp_path / "run", "mnist5k_lenet5")
    assert shown == ["training.png", "layers.png", "inputs.png"]


class TinyText(LanguageModel):
    next_layer: ClassVar[dict[str, str]] = {}
    blocks, heads, mlp = 1, 1, 8  # a kernel of 128 inputs, as many as the text has


def test_run_on_text_has_a_report_without_a_figure_of_inputs(tmp_path, monkeypatch):
    def text(count):
        tokens = np.random.RandomState(count).randint(0, 97, (count, 129))
        return Split(tokens[:, :-1].astype(np.uint8), tokens[:, 1:].astype(np.int32))

    data = Dataset(text(16), text(16), text(8))
    monkeypatch.setattr(entry, "load", lambda *args, **kwargs: data)
    monkeypatch.setitem(MODELS, "language_model", TinyText)
    make_network.cache_clear()
    shown = run(tmp_path / "run", "python_docs_language_model", "--warmup-epochs", "0")
    make_network.cache_clear()
    assert shown == ["training.png", "layers.png"]


@pytest.mark.parametrize(
    ("dataset", "model", "expected"),
    [
        ("mnist5k", "lenet300", "Dense_0/kernel"),
        ("mnist5k", "mobilenet_v1", "Conv_0/kernel"),  # depthwise ones read 1 channel
        ("cifar10", "resnet20", "Conv_0/kernel"),
        ("cifar10", "vit_b16", "Conv_0/kernel"),  # its MLPs have 3,072 inputs, too
        ("python_docs", "language_model", None),
    ],
)
def test_kernel_that_is_drawn_is_the_first_that_reads_the_image(
    dataset, model, expected
):
    report = kernels(dataset, model)
    assert entry._first_kernel(report, ABOUT[dataset].shape) == expected


# ImageNet


class FakeStream:
    """Images of 8x8 pixels, made up; keeps what it was asked for."""

    opened: ClassVar[list[dict]] = []

    def __init__(self, split, *, batch_size, **settings):
        self.opened.append({"split": split, "batch_size": batch_size, **settings})
        self.steps, self._count, self._train = 2, batch_size, split == "train"

    def reseeded(self, seed):
        return self

    def batches(self, start=0):
        step = start
        while self._train or step < 2:
            images = np.random.RandomState(step).randint(0, 256, (self._count, 8, 8, 3))
            yield Split(images.astype(np.uint8), np.full(self._count, 7, np.int32))
            step += 1


@pytest.fixture
def opened(monkeypatch):
    monkeypatch.setattr(imagenet, "Stream", FakeStream)
    monkeypatch.setattr(FakeStream, "opened", [])
    return FakeStream.opened


IMAGENET = ["mnist5k_lenet300", "--dataset", "imagenet2012"]


def test_run_on_imagenet_streams_its_splits(tmp_path, opened):
    settings = ["--image-size", "8", "--validation", "10", "--workers", "3"]
    folder = tmp_path / "run"
    shown = run(folder, *IMAGENET, *settings, "--data-dir", "elsewhere")
    same = {
        "batch_size": 16,
        "image_size": 8,
        "validation": 10,
        "data_dir": "elsewhere",
        "part": (0, 1),
        "workers": 3,
    }
    assert sorted(opened, key=lambda one: one["split"]) == [
        {"split": split, **same} for split in ("test", "train", "validation")
    ]
    assert "inputs.png" in shown  # of 8x8 pixels, not of the published size
    for metrics in lines(folder / "metrics.jsonl"):
        assert 0 <= metrics["validation_accuracy"] <= 1


def test_imagenet_without_validation_has_its_published_size(
    tmp_path, opened, monkeypatch
):
    seen = []
    monkeypatch.setattr(entry, "run", lambda config, data, folder: seen.append(data))
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    monkeypatch.setattr(jax, "process_index", lambda: 2)
    assert main([*IMAGENET, *SHORT, "--out", str(tmp_path / "run")]) == 0
    (data,) = seen
    assert data.validation is NO_EXAMPLES
    assert {one["split"] for one in opened} == {"train", "test"}
    for one in opened:
        assert (one["image_size"], one["part"], one["workers"]) == (224, (2, 4), 8)
        assert one["data_dir"] is None


# Warnings


def test_layer_that_collapses_is_reported_once(tmp_path, capsys):
    settings = ["--epochs", "3", "--sparsity", "0", "--penalty", "0.5"]
    settings += ["--mask-learning-rate", "1", "--freeze-at", "1"]
    run(tmp_path / "run", "mnist5k_lenet300", *settings)
    said = capsys.readouterr().err
    assert "Traceback" not in said
    for layer in ("Dense_0", "Dense_1", "Dense_2"):
        lost = f"scl, seed 0, step 3: {layer}/kernel has lost its last connection"
        assert said.count(lost) == 1
        assert said.count(f"{layer}/kernel") == 1
    assert said.count("the output of the network does not depend on its input") == 1
    assert "dense, seed 0, step" not in said
