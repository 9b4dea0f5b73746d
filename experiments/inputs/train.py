"""Training of the shipped networks on Fashion-MNIST."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from repsim_kernels.experiments.files import replace_file
from repsim_kernels.experiments.inputs.images import (
    FASHION_MNIST,
    load_fashion_mnist,
    prepare_fashion_mnist,
)
from repsim_kernels.experiments.inputs.networks import ASSETS, SMALL, build

EPOCHS = {"alexnet_small": 6, "mobilenet_v2_small": 5, "resnet50_small": 5}
PEAK_RATE = {"alexnet_small": 2e-3, "mobilenet_v2_small": 6e-3, "resnet50_small": 6e-3}
WEIGHT_DECAY = 1e-2
BATCH = 128


def train(
    names: Sequence[str] = SMALL,
    *,
    dataset: str | Path = FASHION_MNIST,
    out: str | Path | None = None,
    epochs: int | None = None,
    seed: int = 0,
    log: Callable[[str], object] = print,
) -> dict[str, float]:
    """Train networks on all training images and store them.

    Parameters
    ----------
    names : sequence of str
        Of `SMALL`.
    dataset : path
        Directory of Fashion-MNIST's gzipped idx files.
    out : path, optional
        Directory that ``<name>.safetensors`` is written to, in float16; the shipped assets by
        default.
    epochs : int, optional
        Passes over the training images; by default `EPOCHS`.
    seed : int
        Of torch's generator, for the initial weights and the order of the images. Another
        machine, or number of threads, gives nearly, not exactly, the same weights.
    log : callable
        Takes a line of progress.

    Returns
    -------
    accuracy : dict of str to float
        Fraction of the test images that the network is right about, with the weights as stored.

    Raises
    ------
    ModelError
        If a name is unknown.
    DataError
        If a file of the data set is missing or damaged.

    Notes
    -----
    AdamW with a one-cycle rate (Smith & Topin 2018); each image is mirrored half of the time.
    Test images serve for the accuracy that is reported, never for a choice.
    """
    models = {}
    for name in names:
        torch.manual_seed(seed)
        models[name] = build(name).to(memory_format=torch.channels_last)
    images, labels = map(torch.from_numpy, load_fashion_mnist("train", dataset))
    test_images, test_labels = map(torch.from_numpy, load_fashion_mnist("t10k", dataset))
    directory = ASSETS if out is None else Path(out)
    directory.mkdir(parents=True, exist_ok=True)
    accuracy = {}
    for name, model in models.items():
        passes = EPOCHS[name] if epochs is None else epochs
        torch.set_flush_denormal(True)  # dying weights would slow a CPU manyfold
        try:
            _train_one(name, model, images, labels.long(), passes, seed, log)
        finally:
            torch.set_flush_denormal(False)
        model.half().float()  # rounds the weights to what is stored
        accuracy[name] = _measure_accuracy(model, test_images, test_labels)
        metadata = {
            "accuracy": f"{accuracy[name]:.4f}",
            "dataset": f"Fashion-MNIST, {len(images)} training and {len(test_images)} test images",
            "epochs": str(passes),
            "seed": str(seed),
        }
        path = directory / f"{name}.safetensors"
        _save_half(model, path, metadata)
        log(f"{name}: {accuracy[name]:.2%} of {len(test_images)} test images, in {path}")
    return accuracy


def _train_one(
    name: str,
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    epochs: int,
    seed: int,
    log: Callable[[str], object],
) -> None:
    torch.manual_seed(seed)
    batches = max(1, len(images) // BATCH)  # the odd rest of an epoch is left out
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_RATE[name], total_steps=epochs * batches
    )
    model.train()
    for epoch in range(epochs):
        start, total = time.perf_counter(), 0.0
        order = torch.randperm(len(images))
        for batch in order.split(BATCH)[:batches]:
            x = prepare_fashion_mnist(images[batch])
            x[::2] = x[::2].flip(-1)
            logits = model(x.to(memory_format=torch.channels_last))
            loss = nn.functional.cross_entropy(logits, labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        seconds = time.perf_counter() - start
        log(f"{name}: epoch {epoch + 1}/{epochs}, loss {total / batches:.3f}, {seconds:.0f} s")


@torch.inference_mode()
def _measure_accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    model.eval()
    pairs = zip(images.split(500), labels.split(500), strict=True)
    right = sum(int((model(prepare_fashion_mnist(x)).argmax(1) == y).sum()) for x, y in pairs)
    return right / len(images)


def _save_half(model: nn.Module, path: Path, metadata: dict[str, str]) -> None:
    tensors = {
        key: (value.half() if value.is_floating_point() else value).contiguous()
        for key, value in model.state_dict().items()
    }
    with replace_file(path) as temporary:
        save_file(tensors, temporary, metadata)
