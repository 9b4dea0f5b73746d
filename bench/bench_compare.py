"""Maps of two networks by this package, pytorch-cka and hooks: time, memory and values.

Each measurement runs in a new process, since the peak memory is that of a process.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import repsim_kernels as rk
from bench.common import memory
from bench.common.machine import Json, describe_environment, format_seconds, save
from bench.peers.tables import format_markdown_table

Array = np.ndarray[Any, Any]
Networks = tuple[nn.Module, nn.Module]
Loader = Iterable[Any]

_THREADS = (1, 2)
_SIZES: dict[bool, Json] = {  # by `quick`
    False: {
        "convolutions": {"n": 300, "side": 64, "batch": 50},
        "wide": {"n": 2000, "side": 50, "channels": 80, "batch": 50},
        "BERT": {"n": 200, "tokens": 64, "width": 128, "batch": 50},
    },
    True: {
        "convolutions": {"n": 12, "side": 32, "batch": 6},
        "wide": {"n": 40, "side": 5, "channels": 4, "batch": 10},
        "BERT": {"n": 12, "tokens": 8, "width": 16, "batch": 6},
    },
}


@dataclass(frozen=True)
class Workload:
    """Two networks and their stimuli.

    Attributes
    ----------
    build : function of the sizes
        Returns the networks, and batches of 4 or more stimuli; the same ones in each process.
    layers, pool : str
        As in `compare`.
    find_layers : function of a network
        Returns the same layers.
    methods : names of functions in `METHODS`
    turns : int
        How often each method is measured.
    """

    build: Callable[[Json], tuple[Networks, Loader]]
    layers: str
    pool: str
    find_layers: Callable[[Any], Iterable[nn.Module]]
    methods: tuple[str, ...]
    turns: int


def _build_resnets(sizes: Json) -> tuple[Networks, Loader]:
    networks = torchvision.models.resnet18(), torchvision.models.resnet50()
    images = torch.randn(sizes["n"], 3, sizes["side"], sizes["side"])
    return networks, DataLoader(TensorDataset(images), sizes["batch"])


def _build_wide(sizes: Json) -> tuple[Networks, Loader]:
    networks = nn.Conv2d(3, sizes["channels"], 1), nn.Conv2d(3, sizes["channels"], 1)
    images = torch.randn(sizes["n"], 3, sizes["side"], sizes["side"])
    return networks, DataLoader(TensorDataset(images), sizes["batch"])


def _build_berts(sizes: Json) -> tuple[Networks, Loader]:
    """Build networks with 12 layers, and padded batches of sentences with 4 tokens or more."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=1000,
        hidden_size=sizes["width"],
        num_hidden_layers=12,
        num_attention_heads=4,
        intermediate_size=4 * sizes["width"],
    )
    networks = BertModel(config), BertModel(config)
    ids = torch.randint(1000, (sizes["n"], sizes["tokens"]))
    lengths = torch.randint(4, sizes["tokens"] + 1, (sizes["n"], 1))
    masks = (torch.arange(sizes["tokens"]) < lengths).long()
    batches = zip(ids.split(sizes["batch"]), masks.split(sizes["batch"]), strict=True)
    return networks, [{"input_ids": i, "attention_mask": mask} for i, mask in batches]


def _find_convolutions(network: nn.Module) -> Iterable[nn.Module]:
    return [module for module in network.modules() if isinstance(module, nn.Conv2d)]


WORKLOADS = {
    "convolutions": Workload(
        _build_resnets, "conv", "flatten", _find_convolutions,
        ("exact", "minibatch", "pytorch-cka", "hooks"), turns=3,
    ),
    # Once, since only its memory has an aim, which hardly varies.
    "wide": Workload(_build_wide, "conv", "flatten", _find_convolutions, ("exact",), turns=1),
    "BERT": Workload(
        _build_berts, "blocks", "mean", lambda bert: bert.encoder.layer,
        ("exact", "extract", "hooks"), turns=3,
    ),
}  # fmt: skip


def _compare(workload: Workload, networks: Networks, loader: Loader, **options: Any) -> Array:
    options |= {"layers": workload.layers, "pool": workload.pool}
    result: Any = rk.compare(*networks, loader, **options)
    return result.values


def _extract_and_compare(workload: Workload, networks: Networks, loader: Loader) -> Array:
    xs, ys = (
        rk.extract(network, loader, workload.layers, pool=workload.pool).values()
        for network in networks
    )
    return rk.pairwise(list(xs), list(ys), metric="cka_debiased").numpy()


def _call_pytorch_cka(workload: Workload, networks: Networks, loader: Loader) -> Array:
    from cka import compute_cka

    names = []
    for network in networks:
        modules = set(workload.find_layers(network))
        names.append([name for name, module in network.named_modules() if module in modules])
    layers = {"layers": names[0], "model2_layers": names[1]}
    (values,) = compute_cka(*networks, loader, **layers, device="cpu", progress=False)
    return values.numpy()


def _call_hooks(workload: Workload, networks: Networks, loader: Loader) -> Array:
    """Keep the features of all layers, and compute debiased CKA of them in float64."""
    grams = []
    for network in networks:
        features = _extract_by_hand(network, workload.find_layers(network), loader)
        grams.append(torch.stack([_make_unbiased_gram(x.double()).flatten() for x in features]))
        grams[-1] /= grams[-1].norm(dim=1, keepdim=True)
    return (grams[0] @ grams[1].mT).numpy()


def _extract_by_hand(
    network: nn.Module, layers: Iterable[nn.Module], loader: Loader
) -> list[Tensor]:
    parts: dict[nn.Module, list[Tensor]] = defaultdict(list)
    mask: Tensor | None = None

    def keep(module: nn.Module, _inputs: Any, output: Any) -> None:
        x = output[0] if isinstance(output, tuple) else output
        if mask is None:
            x = x.flatten(1)
        else:  # the mean over tokens, without padding
            x = (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        parts[module].append(x)

    handles = [layer.register_forward_hook(keep) for layer in layers]
    with torch.no_grad():
        network.eval()
        for batch in loader:
            if isinstance(batch, dict):
                mask = batch["attention_mask"]
                network(**batch)
            else:
                network(batch[0])
    for handle in handles:
        handle.remove()
    return [torch.cat(x) for x in parts.values()]


def _make_unbiased_gram(x: Tensor) -> Tensor:
    """Return the U-centred Gram, whose inner products are those of debiased CKA.

    Source: Székely & Rizzo 2014.
    """
    n = len(x)
    gram = (x @ x.mT).fill_diagonal_(0)
    sums = gram.sum(0)
    gram -= (sums[:, None] + sums) / (n - 2) - sums.sum() / ((n - 1) * (n - 2))
    return gram.fill_diagonal_(0)


METHODS: dict[str, Callable[[Workload, Networks, Loader], Array]] = {
    "exact": _compare,
    "minibatch": partial(_compare, estimator="minibatch"),
    "extract": _extract_and_compare,
    "pytorch-cka": _call_pytorch_cka,
    "hooks": _call_hooks,
}


def measure_process(name: str, method: str, sizes: Json, threads: int) -> tuple[Json, Array]:
    """Return the seconds and the peak memory of one map in this process, and the map.

    Networks, stimuli, and what a map of a few stimuli imports and loads, are not counted.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    workload = WORKLOADS[name]
    networks, loader = workload.build(sizes)
    compute = METHODS[method]
    compute(workload, networks, _take_stimuli(loader))
    before = memory.start_peak()
    start = time.perf_counter()
    values = compute(workload, networks, loader)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "memory_bytes": memory.read_peak() - before}, values


def _take_stimuli(loader: Loader) -> Loader:
    """Return a loader of the first 4 stimuli, the fewest that have debiased CKA."""
    batch = next(iter(loader))
    if isinstance(batch, dict):
        return [{key: value[:4] for key, value in batch.items()}]
    return DataLoader(TensorDataset(batch[0][:4]), 4)


def compare_networks(out: Path | None, quick: bool = False) -> Json:
    """Measure all methods on all workloads, in turns; save the record to ``out``; return it."""
    packages = ("torchvision", "pytorch-cka", "transformers")
    sizes = _SIZES[quick]
    record: Json = {
        "environment": describe_environment("cpu", packages),
        "quick": quick,
        "sizes": sizes,
        "rows": [],
    }
    for name, workload in WORKLOADS.items():
        turns, threads = (1, _THREADS[-1:]) if quick else (workload.turns, _THREADS)
        record["rows"] += _measure_workload(name, workload, sizes[name], turns, threads)
        if out:
            save(out, record)
    return record


def _measure_workload(
    name: str, workload: Workload, sizes: Json, turns: int, threads: Sequence[int]
) -> list[Json]:
    rows: list[Json] = [
        {"workload": name, "method": method, "threads": count, "seconds": [], "memory_bytes": []}
        for count in threads
        for method in workload.methods
    ]
    maps: dict[str, Array] = {}
    # A new process for each task.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as processes:
        for _ in range(turns):
            for row in rows:
                facts, values = processes.submit(
                    measure_process, name, row["method"], sizes, row["threads"]
                ).result()
                for key, value in facts.items():
                    row[key].append(value)
                maps[row["method"]] = values
    for row in rows:
        if "hooks" in maps and row["method"] != "hooks":
            row["error"] = float(np.abs(maps[row["method"]] - maps["hooks"]).max())
        print(" | ".join([name, f"threads={row['threads']}", *_format_method(row)]), flush=True)
    return rows


_TITLES = {
    "convolutions": "ResNet-18 x ResNet-50, 20 x 53 convolutions, {n} images of {side} x {side}",
    "wide": "Two convolutions with p = {p:,}, n = {n:,}",
    "BERT": "Two BERTs, 12 x 12 layers, {n} padded sentences, mean over tokens",
}
_METHODS = {
    "exact": "`compare`",
    "minibatch": '`compare`, `estimator="minibatch"`',
    "extract": "`extract`, then `pairwise`",
    "pytorch-cka": "pytorch-cka, `compute_cka`",
    "hooks": "hooks that keep all features; float64",
}


def tabulate(record: Json) -> str:
    """Tabulate time, memory and error of all methods, one table for each workload."""
    head = ["method", "1 thread", "2 threads", "memory, 1 thread", "2 threads", "difference"]
    tables = []
    for name, workload in WORKLOADS.items():
        sizes = record["sizes"][name]
        neurons = sizes.get("channels", 0) * sizes.get("side", 0) ** 2
        title = _TITLES[name].format(**sizes, p=neurons)
        table = [
            _format_method(*(_find_row(record, name, method, threads) for threads in _THREADS))
            for method in workload.methods
        ]
        tables.append(f"**{title}**, batches of {sizes['batch']}:\n\n")
        tables[-1] += format_markdown_table(head, table)
    return "\n\n".join(tables)


def _format_method(*rows: Json) -> list[str]:
    """Format a method's times and memory by the number of threads, and its largest error."""
    times = [format_seconds(statistics.median(row["seconds"])) for row in rows]
    memories = [_format_bytes(statistics.median(row["memory_bytes"])) for row in rows]
    errors = [row["error"] for row in rows if "error" in row]
    error = f"{max(errors):.0e}" if errors else ""
    return [_METHODS[rows[0]["method"]], *times, *memories, error]


def tabulate_aims(record: Json) -> str:
    """Tabulate each aim and what was reached."""
    rows = []
    for method, key, what, limits in (
        ("exact", "memory_bytes", "memory", (1.2, 1.2)),
        ("exact", "seconds", "time", (1.5, 2.0)),
        ("minibatch", "seconds", "time", (1.0, 1.0)),
    ):
        for threads, limit in zip(_THREADS, limits, strict=True):
            ours, theirs = (
                _find_median(record, "convolutions", each, threads, key)
                for each in (method, "pytorch-cka")
            )
            label = f"{_METHODS[method]}, {threads} thread{'s' * (threads > 1)}: {what}"
            rows.append([f"{label} / pytorch-cka's", f"at most {limit}", f"{ours / theirs:.2f}"])
    most = max(
        _find_median(record, "wide", "exact", threads, "memory_bytes") for threads in _THREADS
    )
    sizes = record["sizes"]["wide"]
    label = f"n = {sizes['n']:,}, p = {sizes['channels'] * sizes['side'] ** 2:,}: memory"
    rows.append([label, "under 1 GB", _format_bytes(most)])
    return format_markdown_table(["quantity", "aim", "reached"], rows)


def _find_median(record: Json, workload: str, method: str, threads: int, key: str) -> float:
    return statistics.median(_find_row(record, workload, method, threads)[key])


def _find_row(record: Json, workload: str, method: str, threads: int) -> Json:
    (row,) = (
        row
        for row in record["rows"]
        if (row["workload"], row["method"], row["threads"]) == (workload, method, threads)
    )
    return row


def _format_bytes(value: float) -> str:
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"
