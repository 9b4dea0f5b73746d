"""`extract`: the representations of a network's layers, from one pass over a loader."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from repsim_kernels.comparison import batches
from repsim_kernels.comparison.batches import Call
from repsim_kernels.comparison.layers import Layers, Network, Output
from repsim_kernels.comparison.pooling import Pool, check_pool, pool_output
from repsim_kernels.comparison.stimuli import iterate
from repsim_kernels.errors import LayerError, OptionError, ShapeError

# Stimuli of the pass that finds the layers: not the number of layers that recurrent networks have.
_PROBE = 3


def extract(
    model: nn.Module,
    loader: Iterable[Any],
    layers: Layers = None,
    *,
    pool: Pool = "flatten",
    output: Output = None,
    call: Call | None = None,
    out: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """The representations of a network's layers, from one pass over a loader.

    Parameters
    ----------
    model : nn.Module
        It runs unchanged, in eval mode and without gradients; afterwards every module is back in
        its own mode. Networks from torch.compile and DataParallel are unwrapped.
    loader : iterable of batches
        Tensors (n, …), tuples whose first item is the input, or dicts of keyword arguments. They
        are moved to the device of the model. Without ``call``, floating-point inputs also get the
        dtype of its first parameter, so that a model in half precision can be given float32.
        The number of stimuli n is the length of the first tensor of a batch.
    layers : names, "conv" | "linear" | "attention" | "blocks", function or None
        Which modules are layers: by name, by kind, or those for which ``layers(name, module)`` is
        true; by default every module that returns a tensor. Modules that return the same tensor
        count once. A module's second call in a pass is the layer "name:2". The network itself is
        "output", or "" if it has a module "output". For a module named "conv", pass ``["conv"]``.
    pool : {"flatten", "mean", "max", "cls", "last", "tokens"} or function
        How an output (n, …) becomes (n, p): all values; the mean or maximum over positions; the
        first or last token; every token as a stimulus of its own; or a function of the output.
        Outputs are taken for sequences (n, t, d) or feature maps (n, c, h, w); other orders, such
        as Swin's (n, h, w, c) or (n, c, t) of a Conv1d, need a function. An ``attention_mask``
        (n, t) in a batch marks padding, which never counts.
    output : int or str, optional
        Where the tensor is in a module's output, such as 0, "hidden_states.3" or
        "hidden_states.-1"; by default its first tensor.
    call : function, optional
        How the network is called: ``call(model, batch)``. By default with the batch, the first item
        of a tuple, or the entries of a dict. With it, batches need no tensors: a list of n texts
        has n stimuli.
    out : path, optional
        Folder for the representations, one ``.npy`` file each, which replace files of these names.
        They need not fit in memory then.

    Returns
    -------
    representations : dict of str to array, (n, p)
        By layer, in the order listed, and otherwise in that of the calls. Tensors on the CPU with
        the dtype of the layer; with ``out``, memory-mapped NumPy arrays (float32 in place of
        bfloat16).

    Raises
    ------
    LayerError
        The model is not a module, or lacks a layer; or a layer is not called, or does not return
        floating-point numbers (n, …).
    ShapeError
        The loader has no batches, or layers differ in their number of stimuli.
    OptionError
        An option has a value that is not accepted.

    Notes
    -----
    The network first runs on three stimuli of the first batch, to find the layers.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> import repsim_kernels as rk
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5))
    >>> loader = [torch.randn(10, 3, 8, 8) for _ in range(2)]
    >>> representations = rk.extract(model, loader, ["0", "3"])
    >>> {name: tuple(x.shape) for name, x in representations.items()}
    {'0': (20, 288), '3': (20, 5)}
    """
    network = Network(model, layers, output, call or batches.call_on_inputs)
    pool = check_pool(pool)
    if out is not None:
        return extract_to_files(network, loader, pool, Path(out))
    kept: FeatureBuffer | None = None
    for batch in iterate(loader):
        if kept is None:
            names = list(find_sizes(network, batch, pool))
            kept = FeatureBuffer(names, "cpu")
        visit_representations(network, batch, pool, names, kept.add)
    assert kept is not None  # `iterate` refuses a loader without batches
    return kept.join()


@dataclass(frozen=True)
class LayerSize:
    """The size of a layer.

    Attributes
    ----------
    p, itemsize : int
        Neurons, and bytes of one.
    row_bytes : int
        Bytes of all rows that one stimulus of a batch makes: several with pool="tokens".
    largest_bytes : int
        Bytes for one stimulus of the largest output of any module of the network.
    """

    p: int
    itemsize: int
    row_bytes: int
    largest_bytes: int


def find_sizes(network: Network, batch: Any, pool: Pool) -> dict[str, LayerSize]:
    """Return the layers that a batch passes, and their sizes, from a pass of a few stimuli."""
    sample = batches.take_stimuli(batch, _PROBE)
    try:
        outputs, largest = network.find_layers(sample)
    except LayerError:
        raise
    except Exception:  # a network may need all of its batch
        sample = batch
        outputs, largest = network.find_layers(sample)
    n = batches.count_stimuli(sample)
    if not outputs:
        raise LayerError(
            f"layers: no selected module of {type(network.model).__name__} ({network.owner}) "
            f"returns floating-point numbers ({n}, …) for a batch of {n} stimuli"
        )
    mask, sizes = None if callable(pool) else batches.find_mask(sample), {}
    for name, output in outputs.items():
        x = pool_output(output, pool, mask, network.describe(name))
        sizes[name] = LayerSize(x.shape[1], x.itemsize, x.nbytes // n, largest)
    return sizes


def visit_representations(
    network: Network, batch: Any, pool: Pool, names: Iterable[str], visit: Any
) -> None:
    """Run a network on a batch, and call ``visit(name, x)`` for each of its named layers."""
    missing, n = dict.fromkeys(names), batches.count_stimuli(batch)
    mask = None if callable(pool) else batches.find_mask(batch)

    def pool_and_visit(name: str, output: Tensor) -> None:
        if name not in missing:
            return
        del missing[name]
        if len(output) != n:
            raise LayerError(
                f"layers: {name!r} of {network.owner} returns {len(output)} rows for a batch of "
                f"{n} stimuli; expected one for each"
            )
        visit(name, pool_output(output, pool, mask, network.describe(name)))

    network.run(batch, pool_and_visit)
    if missing:
        name = next(iter(missing))
        raise LayerError(
            f"layers: {name!r} is not called for every batch by {network.owner}; expected layers "
            "that are"
        )


class FeatureBuffer:
    """Representations that are kept in memory, batch by batch.

    Parameters
    ----------
    names : iterable of str
        The layers.
    device : str, optional
        Where they are kept; by default where they are.

    Attributes
    ----------
    nbytes : int
        Their size so far.
    """

    def __init__(self, names: Iterable[str], device: str | None = None) -> None:
        self._parts: dict[str, list[Tensor]] = {name: [] for name in names}
        self._device = device
        self.nbytes = 0

    def add(self, name: str, x: Tensor) -> None:
        """Keep a copy of a batch x (n, p) of a layer."""
        parts = self._parts[name]
        if parts:
            check_width(name, x, parts[0].shape[1])
        parts.append(x.to(self._device or x.device, copy=True))
        self.nbytes += x.nbytes

    def join(self) -> dict[str, Tensor]:
        """Return the representations of all batches; they are not kept any longer."""
        return _check_same_stimuli(
            {name: torch.cat(self._parts.pop(name)) for name in list(self._parts)}
        )


def check_width(name: str, x: Tensor, p: int) -> None:
    """Check that a layer has as many neurons in a batch as in the first."""
    if x.shape[1] != p:
        raise ShapeError(
            f"layers: {name!r} has {x.shape[1]} neurons in one batch and {p} in the first; "
            "expected the same number: pool over positions, or pad the batches to one length"
        )


def _check_same_stimuli(representations: dict[str, Any]) -> dict[str, Any]:
    """Check that all layers have equally many stimuli."""
    counts = {name: len(x) for name, x in representations.items()}
    first = next(iter(counts))
    for name, n in counts.items():
        if n != counts[first]:
            raise ShapeError(
                f"layers: {name!r} has {n} stimuli, but {first!r} has {counts[first]}; expected "
                "the same number: select such layers"
            )
    return representations


def extract_to_files(
    network: Network, loader: Iterable[Any], pool: Pool, folder: Path
) -> dict[str, np.ndarray[Any, Any]]:
    """Write representations batch by batch; the files appear once all are complete."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(f"out: {folder} can't be made: {error.strerror}") from None
    writers: dict[str, _ArrayWriter] = {}
    with ExitStack() as stack:
        for batch in iterate(loader):
            if not writers:
                for name in find_sizes(network, batch, pool):
                    path = folder / f"{name.replace('/', '%2F')}.npy"  # stays in the folder
                    writers[name] = _ArrayWriter(path, name)
                    stack.callback(writers[name].discard)
            visit_representations(
                network, batch, pool, writers, lambda name, x: writers[name].append(x)
            )
        _check_same_stimuli(writers)
        for writer in writers.values():
            writer.finish()
    return {name: np.load(writer.path, mmap_mode="r") for name, writer in writers.items()}


class _ArrayWriter:
    """Appends rows to a .npy file, which gets its name when it is complete."""

    def __init__(self, path: Path, layer: str) -> None:
        self.path, self._layer = path, layer
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._file = self._temporary.open("wb")
        self._shape = (0, 0)
        self._dtype = np.dtype(np.float32)

    def __len__(self) -> int:
        return self._shape[0]

    def append(self, x: Tensor) -> None:
        rows = np.ascontiguousarray(_to_numpy(x))
        if self._shape[0]:
            check_width(self._layer, x, self._shape[1])
        else:
            self._dtype, self._shape = rows.dtype, (0, x.shape[1])
            self._write_header()
        self._file.write(rows.data)
        self._shape = (self._shape[0] + len(rows), x.shape[1])

    def finish(self) -> None:
        self._file.seek(0)
        self._write_header()
        self._file.close()
        self._temporary.replace(self.path)

    def discard(self) -> None:
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _write_header(self) -> None:
        """Write the header, whose length does not depend on the number of rows."""
        descr = np.lib.format.dtype_to_descr(self._dtype)
        header = {"descr": descr, "fortran_order": False, "shape": self._shape}
        np.lib.format.write_array_header_1_0(self._file, header)


def _to_numpy(x: Tensor) -> np.ndarray[Any, Any]:
    x = x.cpu()
    return (x.float() if x.dtype == torch.bfloat16 else x).numpy()
