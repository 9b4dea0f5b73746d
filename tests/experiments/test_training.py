"""Training of the small networks."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from repsim_kernels.experiments.errors import DataError, ModelError
from repsim_kernels.experiments.inputs import images as data
from repsim_kernels.experiments.inputs import networks as models
from repsim_kernels.experiments.inputs.train import train


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A data set in Fashion-MNIST's format: 40 training and 20 test images of noise."""
    folder = tmp_path / "dataset"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for split, n in (("train", 40), ("t10k", 20)):
        for kind, shape, top in (("images-idx3", (n, 28, 28), 256), ("labels-idx1", (n,), 10)):
            head = bytes((0, 0, 8, len(shape))) + np.array(shape, ">i4").tobytes()
            body = rng.integers(0, top, shape, dtype=np.uint8).tobytes()
            (folder / f"{split}-{kind}-ubyte.gz").write_bytes(gzip.compress(head + body))
    return folder


@pytest.mark.parametrize("name", ["alexnet_small", "vit_small"])
def test_training_writes_a_checkpoint_with_its_accuracy(name, dataset, tmp_path):
    lines: list[str] = []
    out = tmp_path / "out"
    accuracy = train([name], dataset=dataset, out=out, epochs=1, log=lines.append)
    assert [path.name for path in out.iterdir()] == [f"{name}.safetensors"]
    assert len(lines) == 2
    with safe_open(out / f"{name}.safetensors", "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["epochs"]) == 1
    assert metadata["accuracy"] == f"{accuracy[name]:.4f}"
    images, labels = data.load_fashion_mnist("t10k", dataset)
    model = models.load(name, out / f"{name}.safetensors")
    correct = (
        model(data.prepare_fashion_mnist(torch.from_numpy(images))).argmax(1).numpy() == labels
    )
    assert correct.mean() == pytest.approx(accuracy[name])


def test_training_without_the_data_set_raises(tmp_path):
    with pytest.raises(DataError, match="Debian package dataset-fashion-mnist"):
        train(["alexnet_small"], dataset=tmp_path, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ModelError, match="'lenet' is unknown"):
        train(["lenet"], dataset=tmp_path, out=tmp_path / "out")
