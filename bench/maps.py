"""Maps of two trained networks, and how far estimates from batches are from exact CKA.

The networks are the study's small MobileNetV2 and ResNet50, trained on Fashion-MNIST, and the
stimuli are 500 test images, of which batches are drawn at random.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import repsim_kernels as rk
from bench.common.machine import Json, describe_environment
from bench.peers.tables import format_markdown_table
from repsim_kernels.experiments.inputs.images import load_demo
from repsim_kernels.experiments.inputs.networks import load

Array = np.ndarray[Any, Any]

_NETWORKS = "mobilenet_v2_small", "resnet50_small"
# Batch sizes, all of which divide the number of images. Those up to 50 also divide the number of
# images of a class, so that batches of sorted images have one class each.
_SIZES = (5, 10, 25, 50, 100, 250)
_SHUFFLES, _DRAWS = 5, 20
_NOISE_N, _NOISE_P = 100, (10, 50, 100, 200, 1000, 10_000)
# Label, colour and marker of each estimate, and whether it is compared with debiased CKA.
_ESTIMATES = {
    "debiased": ("debiased, this package", "#c1272d", "o", True),
    "pytorch-cka": ("debiased, pytorch-cka", "#000000", "o", True),
    "sorted": ("debiased, images sorted by class", "#8c8c8c", "s", True),
    "biased": ("biased (error against exact biased CKA)", "#0072b2", "^", False),
}
# Names of the networks in the figure, and where their stages start.
_TITLES = "MobileNetV2", "ResNet50"
_STAGES = (
    [f"features.{block}" for block in (2, 4, 7, 11, 14, 17)],
    [f"layer{stage}" for stage in (1, 2, 3, 4)],
)


def measure_maps(quick: bool = False) -> Json:
    """Return the record: maps, errors by batch size, and CKA of noise."""
    a, b = map(load, _NETWORKS)
    images = load_demo().images
    sizes, shuffles, draws = (_SIZES[-2:], 1, 2) if quick else (_SIZES, _SHUFFLES, _DRAWS)
    loader = images.split(100)
    maps: list[Any] = [
        rk.compare(a, b, loader, layers="conv"),
        rk.compare(b, loader=loader, layers="conv"),
    ]
    grams = [_make_grams(network, images) for network in (a, b)]
    return {
        "environment": describe_environment("cpu", ("torchvision", "pytorch-cka")),
        "networks": _NETWORKS,
        "maps": [_to_json(m) for m in maps],
        "shuffles": shuffles,
        "batches": _measure_batches((a, b), images, grams, maps[0], sizes, shuffles),
        "unrelated": _measure_unrelated(grams),
        "noise": {
            "n": _NOISE_N,
            "draws": draws,
            "rows": [_measure_noise(p, draws) for p in _NOISE_P],
        },
    }


def _to_json(m: rk.SimilarityMap) -> Json:
    facts = {"rows": m.rows, "columns": m.columns, "metric": m.metric, "n": m.n}
    return facts | {"options": dict(m.options), "values": m.values.round(5).tolist()}


def _make_grams(network: nn.Module, images: Tensor) -> Tensor:
    """Return the Gram of each convolution, not centred, so that those of batches are parts."""
    features = rk.extract(network, images.split(100), "conv")
    return torch.stack([x.double() @ x.double().mT for x in features.values()])


def estimate_biased(grams: Sequence[Tensor], batches: Iterable[Tensor]) -> Array:
    """Return biased CKA from the HSIC₀ of batches of one size, given as indices of stimuli."""
    sums = [torch.tensor(0.0, dtype=torch.float64)] * 3
    for i in batches:
        h, k = (_centre(gram[:, i[:, None], i]).flatten(1) for gram in grams)
        products = h @ k.mT, (h * h).sum(1), (k * k).sum(1)
        sums = [total + product for total, product in zip(sums, products, strict=True)]
    xy, xx, yy = sums
    return (xy / torch.outer(xx, yy).sqrt()).numpy()


def _centre(grams: Tensor) -> Tensor:
    grams = grams - grams.mean(-1, keepdim=True)
    return grams - grams.mean(-2, keepdim=True)


def _measure_batches(
    networks: tuple[nn.Module, nn.Module], images: Tensor, grams: Sequence[Tensor],
    m: rk.SimilarityMap, sizes: Sequence[int], shuffles: int,
) -> list[Json]:  # fmt: skip
    """Return the mean and the largest error over all pairs and shuffles, for each batch size."""
    from cka import compute_cka

    minibatch: Json = {"layers": "conv", "estimator": "minibatch"}
    names = {"layers": m.rows, "model2_layers": m.columns}
    unbatched = estimate_biased(grams, [torch.arange(len(images))])
    rows = []
    for size in sizes:
        values: dict[str, list[Array]] = {name: [] for name in _ESTIMATES}
        for seed in range(shuffles):
            order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
            shuffled = images[order]
            ours: Any = rk.compare(*networks, shuffled.split(size), **minibatch)
            loader = DataLoader(TensorDataset(shuffled), size)
            (theirs,) = compute_cka(*networks, loader, **names, device="cpu", progress=False)
            values["debiased"].append(ours.values)
            values["pytorch-cka"].append(theirs.numpy())
            values["biased"].append(estimate_biased(grams, order.split(size)))
        in_order: Any = rk.compare(*networks, images.split(size), **minibatch)
        values["sorted"].append(in_order.values)
        for name, (*_, is_debiased) in _ESTIMATES.items():
            errors = np.abs(np.stack(values[name]) - (m.values if is_debiased else unbatched))
            facts = {"mean": float(errors.mean()), "largest": float(errors.max())}
            rows.append({"size": size, "estimate": name} | facts)
    return rows


def _measure_unrelated(grams: Sequence[Tensor]) -> Json:
    """Return the range of CKA between the layers after the images of one side are shuffled."""
    n = grams[0].shape[-1]
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    rows, columns = list(grams[0]), [gram[order[:, None], order] for gram in grams[1]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rk.DegenerateWarning)
        both: Any = rk.pairwise(rows, columns, metric=["cka", "cka_debiased"], kernel="precomputed")
    return {name: [float(values.min()), float(values.max())] for name, values in both.items()}


def _measure_noise(p: int, draws: int) -> Json:
    """Return the mean CKA of two matrices of independent Gaussian noise."""
    values = []
    rng = np.random.default_rng(p)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rk.DegenerateWarning)
        for _ in range(draws):
            x, y = rng.standard_normal((2, _NOISE_N, p))
            values.append([rk.cka(x, y), rk.cka(x, y, debiased=True)])
    biased, debiased = np.mean(values, axis=0)
    return {"p": p, "biased": float(biased), "debiased": float(debiased)}


def draw_maps(record: Json, out: Path) -> None:
    """Write the two maps side by side as PNG, to be read at a width of 850 pixels."""
    figure = Figure(figsize=(7, 2.95), layout="constrained")
    left, right = figure.subplots(1, 2)
    for ax, facts, row in zip((left, right), record["maps"], (0, 1), strict=True):
        rk.SimilarityMap(**facts).plot(ax, limits=(0.2, 1.0))
        ax.set_aspect("equal")
        ax.tick_params(axis="x", rotation=0)
        _label_stages(ax.yaxis, facts["rows"], row)
        _label_stages(ax.xaxis, facts["columns"], 1)
    # One bar serves both maps. At this size, the outline would hide the diagonal.
    left.child_axes[0].remove()
    right.collections[0].remove()
    bar = right.child_axes[0]
    bar.tick_params(labelsize=8)
    bar.yaxis.label.set_fontsize(9)
    _save(figure, out)


def _label_stages(axis: Axis, layers: Sequence[str], network: int) -> None:
    """Label the first layer of each stage, and say which network it is."""
    stages = _STAGES[network]
    first = [[name.startswith(f"{stage}.") for name in layers].index(True) for stage in stages]
    axis.set_ticks(first, stages, fontsize=8)
    axis.set_label_text(f"{_TITLES[network]}, convolutions by depth", fontsize=9)


def draw_batches(record: Json, out: Path) -> None:
    """Write the errors of estimates by batch size as PNG, to be read at a width of 850 pixels."""
    figure = Figure(figsize=(7, 3.7), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    titles = {"mean": "mean over pairs of layers", "largest": "largest over pairs and orders"}
    for ax, (key, title) in zip(axes, titles.items(), strict=True):
        for name, (label, colour, marker, _) in _ESTIMATES.items():
            rows = [row for row in record["batches"] if row["estimate"] == name]
            sizes = [row["size"] for row in rows]
            style: Json = {"color": colour, "marker": marker, "ms": 5}
            if name == "pytorch-cka":  # rings around the points of this package
                style |= {"ms": 9, "mfc": "none", "lw": 0, "zorder": 3}
            ax.plot(sizes, [row[key] for row in rows], label=label, **style)
        ax.set(xscale="log", yscale="log", xlabel="batch size")
        ax.set_title(title, fontsize=9)
        ax.set_xticks(sizes, map(str, sizes))
        ax.minorticks_off()
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel(f"absolute error against CKA\nof all {record['maps'][0]['n']} images")
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        title=f"{record['shuffles']} random orders of the images; one order where sorted by class",
        loc="outside lower center", ncols=2, frameon=False, fontsize=9, title_fontsize=9,
    )  # fmt: skip
    _save(figure, out)


def _save(figure: Figure, out: Path) -> None:
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=186)
    # With a palette, the file has a third of the size.
    palette = Image.open(drawn).convert("RGB").quantize(method=Image.Quantize.MAXCOVERAGE)
    palette.save(out, optimize=True)


def describe_unrelated(record: Json) -> str:
    """Tabulate CKA of noise by the ratio of neurons and stimuli; state that of real layers."""
    n, draws = record["noise"]["n"], record["noise"]["draws"]
    rows = [
        [f"{row['p'] / n:g}", f"{row['biased']:.3f}", f"{row['p'] / (n + row['p']):.3f}",
         f"{row['debiased']:.3f}"]
        for row in record["noise"]["rows"]
    ]  # fmt: skip
    ranges = {
        name: " to ".join(f"{value:.2g}" for value in values)
        for name, values in record["unrelated"].items()
    }
    return f"""\
Independent Gaussian noise, n = {n} stimuli and p neurons, mean of {draws} draws:

{format_markdown_table(["p / n", "biased CKA", "p / (n + p)", "debiased CKA"], rows)}

The convolutions of the maps above, with the images of one network permuted: biased CKA \
{ranges["cka"]}, debiased CKA {ranges["cka_debiased"]}."""
