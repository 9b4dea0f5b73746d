"""Train the shipped networks on Fashion-MNIST."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from repsim_kernels._files import replace_file
from repsim_kernels.experiments.inputs.images import (
    FASHION_MNIST,
    load_fashion_mnist,
    prepare_fashion_mnist,
)
from repsim_kernels.experiments.inputs.networks import ASSETS, SMALL, build

EPOCHS = {"alexnet_small": 6, "mobilenet_v2_small": 5, "resnet50_small": 5, "vit_small": 12}
PEAK_RATE = {
    "alexnet_small": 2e-3,
    "mobilenet_v2_small": 6e-3,
    "resnet50_small": 6e-3,
    "vit_small": 3e-3,
}
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
    """Train networks on all training images and store their weights.

    Parameters
    ----------
    names : sequence of str
        Names from `SMALL`.
    dataset : path
        Directory of Fashion-MNIST's gzipped idx files.
    out : path, optional
        Directory for ``<name>.safetensors``, in float16; the package's assets by default.
    epochs : int, optional
        Passes over the training images; by default `EPOCHS`.
    seed : int
        Seed of the initial weights and the order of the images. On another machine, or with
        another number of threads, the weights are nearly but not exactly the same.
    log : callable
        Called with each line of progress.

    Returns
    -------
    accuracy : dict of str to float
        Fraction of test images classified correctly with the stored weights.

    Raises
    ------
    ModelError
        If a name is unknown.
    DataError
        If a file of the data set is missing or damaged.

    Notes
    -----
    AdamW with a one-cycle rate (Smith & Topin 2018); half of each batch is mirrored. Test images
    are used only for the reported accuracy, never for a choice.
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
        torch.set_flush_denormal(True)  # subnormal weights would slow a CPU many times over
        try:
            _train_one(name, model, images, labels.long(), passes, seed, log)
        finally:
            torch.set_flush_denormal(False)
        model.half().float()  # round the weights as stored
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
    """Train one network in place."""
    torch.manual_seed(seed)
    batches = max(1, len(images) // BATCH)  # an incomplete last batch is dropped
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
    """Measure the fraction of correct answers."""
    model.eval()
    pairs = zip(images.split(500), labels.split(500), strict=True)
    n_correct = sum(int((model(prepare_fashion_mnist(x)).argmax(1) == y).sum()) for x, y in pairs)
    return n_correct / len(images)


def _save_half(model: nn.Module, path: Path, metadata: dict[str, str]) -> None:
    """Save a network's weights in float16."""
    tensors = {
        key: (value.half() if value.is_floating_point() else value).contiguous()
        for key, value in model.state_dict().items()
    }
    with replace_file(path) as temporary:
        save_file(tensors, temporary, metadata)
