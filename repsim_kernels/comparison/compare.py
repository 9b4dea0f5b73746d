"""`compare`: metrics between all layers of two networks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, overload

from torch import nn

from repsim_kernels import _options
from repsim_kernels._typing import ArrayLike
from repsim_kernels.comparison import batches, features, thresholds
from repsim_kernels.comparison.batches import Call
from repsim_kernels.comparison.exact import compare_exactly
from repsim_kernels.comparison.extract import find_sizes, visit_representations
from repsim_kernels.comparison.features import Metrics
from repsim_kernels.comparison.grams import GramTable
from repsim_kernels.comparison.layers import Layers, Network, Output
from repsim_kernels.comparison.minibatch import MinibatchCKA
from repsim_kernels.comparison.pooling import Pool, check_pool
from repsim_kernels.comparison.ranks import run_on_all
from repsim_kernels.comparison.side import check_devices
from repsim_kernels.comparison.similarity_map import SimilarityMap
from repsim_kernels.comparison.stimuli import Ids, Stimuli, iterate
from repsim_kernels.errors import OptionError, ShapeError
from repsim_kernels.forward.memory import parse_size
from repsim_kernels.ops import pairwise


@overload
def compare(
    model_a: nn.Module | Mapping[str, ArrayLike],
    model_b: nn.Module | Mapping[str, ArrayLike] | None = None,
    loader: Iterable[Any] | None = None,
    *,
    loader_b: Iterable[Any] | None = ...,
    layers: Layers = ...,
    layers_b: Layers = ...,
    metric: str = ...,
    estimator: str = ...,
    pool: Pool = ...,
    output: Output | tuple[Output, Output] = ...,
    call: Call | tuple[Call | None, Call | None] | None = ...,
    ids: Ids | None = ...,
    memory: int | str = ...,
    calibrate: int | Mapping[str, Any] | None = ...,
    **options: Any,
) -> SimilarityMap: ...


@overload
def compare(
    model_a: nn.Module | Mapping[str, ArrayLike],
    model_b: nn.Module | Mapping[str, ArrayLike] | None = None,
    loader: Iterable[Any] | None = None,
    *,
    loader_b: Iterable[Any] | None = ...,
    layers: Layers = ...,
    layers_b: Layers = ...,
    metric: Sequence[str],
    estimator: str = ...,
    pool: Pool = ...,
    output: Output | tuple[Output, Output] = ...,
    call: Call | tuple[Call | None, Call | None] | None = ...,
    ids: Ids | None = ...,
    memory: int | str = ...,
    calibrate: int | Mapping[str, Any] | None = ...,
    **options: Any,
) -> dict[str, SimilarityMap]: ...


def compare(
    model_a: nn.Module | Mapping[str, ArrayLike],
    model_b: nn.Module | Mapping[str, ArrayLike] | None = None,
    loader: Iterable[Any] | None = None,
    *,
    loader_b: Iterable[Any] | None = None,
    layers: Layers = None,
    layers_b: Layers = None,
    metric: str | Sequence[str] = "cka_debiased",
    estimator: str = "exact",
    pool: Pool = "flatten",
    output: Output | tuple[Output, Output] = None,
    call: Call | tuple[Call | None, Call | None] | None = None,
    ids: Ids | None = None,
    memory: int | str = "512MiB",
    calibrate: int | Mapping[str, Any] | None = None,
    **options: Any,
) -> SimilarityMap | dict[str, SimilarityMap]:
    """A metric between all layers of two networks, or of a network with itself.

    Parameters
    ----------
    model_a, model_b : nn.Module or dict of str to array, (n, p)
        Networks, or representations by layer, as from `extract`; next to a network, in the order of
        its loader. Without ``model_b``, ``model_a`` is compared with itself.
    loader, loader_b : iterable of batches
        The stimuli, as in `extract`; ``loader_b`` for ``model_b``, if its inputs differ. They are
        then aligned by their ids.
    layers, layers_b : names, "conv" | "linear" | "attention" | "blocks", function or None
        Which modules are layers, as in `extract`; ``layers_b`` for ``model_b``, if selected
        differently.
    metric : str or sequence of str
        "cka_debiased", or any metric of `pairwise`; several give a dict of maps.
    estimator : {"exact", "minibatch"}
        "exact" computes the metric over all stimuli. "minibatch" averages HSIC over batches
        (`MinibatchCKA`), for "cka_debiased" only: one pass, and a standard error.
    pool, output, call
        As in `extract`; a pair of ``output`` or ``call`` is for ``model_a`` and ``model_b``.
        Several batches may be joined to one.
    ids : function, optional
        Returns the ids of the stimuli of a batch; required with two loaders.
    memory : int or str
        Budget in bytes, or a size such as "2GiB": for features and the Gram matrices of linear CKA
        together, and again for the batches of each loader.
    calibrate : int or dict, optional
        Number of permutations of the stimuli of one side, or the options of the function
        `calibrate`: ``permutations``, ``alpha``, ``strata``, ``indices`` and ``seed``. The map then
        has the threshold of its largest similarity: a map of unrelated networks exceeds it anywhere
        with probability ``alpha``, 5 % by default.
    **options
        Options of the metric, as in `pairwise`.

    Returns
    -------
    map : SimilarityMap, or dict of str to SimilarityMap
        ``map.values[i, j]`` compares layer i of ``model_a`` with layer j of ``model_b``. It is NaN
        if a layer has values that are not finite, or is constant across stimuli.

    Raises
    ------
    LayerError, ShapeError, DtypeError, DeviceError, OptionError, LabelError
        A model, layer, loader, option or id is wrong; a second pass over the loader gave other
        batches; or Gram matrices fit neither ``memory`` nor the temporary folder.

    Warns
    -----
    UserWarning
        Layers have no value, or stimuli of small batches were left out.
    DegenerateWarning
        As the function of the metric warns.

    Notes
    -----
    Exact CKA keeps features if all of them fit in ``memory``. If not, and all stimuli fit one pass,
    Grams are computed as each layer's output arrives. Otherwise the network runs several times
    over the loader, each time for some of the layers or neurons, since Grams are additive over
    neurons. Grams that do not fit are written to a temporary folder, and so are features where
    they are smaller than Grams, or the metric needs all of them. Several passes and files are
    announced on stderr first. ``calibrate`` needs a matrix (n, n) of every layer in memory.

    With `torch.distributed` initialised, each rank passes its own part of the stimuli, and all
    ranks return the same map.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> import repsim_kernels as rk
    >>> torch.manual_seed(0)
    <torch._C.Generator object at ...>
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5))
    >>> loader = [torch.randn(10, 3, 8, 8) for _ in range(2)]
    >>> m = rk.compare(model, loader=loader, layers=["0", "1", "3"])
    >>> m.rows
    ('0', '1', '3')
    """
    metrics = _check_metrics(metric, estimator, options)
    chosen = thresholds.check_calibrate(calibrate, metrics, estimator)
    pool = check_pool(pool)
    budget = parse_size(memory)
    if model_b is None and (loader_b is not None or layers_b is not None):
        raise OptionError("model_b: None with loader_b or layers_b; expected a network or arrays")
    models = (model_a,) if model_b is None else (model_a, model_b)
    calls, outputs = _to_pair(call), _to_pair(output)
    selected = layers, layers if layers_b is None else layers_b
    sides: list[Any] = [
        features.convert_arrays(model, name)
        if isinstance(model, Mapping)
        else Network(model, selected[i], outputs[i], calls[i] or batches.call_on_inputs, name)
        for i, (model, name) in enumerate(zip(models, ("model_a", "model_b"), strict=False))
    ]
    networks = [side for side in sides if isinstance(side, Network)]
    if not networks:
        _check_for_arrays(
            loader=loader, loader_b=loader_b, layers=layers, layers_b=layers_b, output=output,
            call=call, ids=ids, pool=None if pool == "flatten" else pool,
            estimator=None if estimator == "exact" else estimator,
        )  # fmt: skip
        maps = features.compare_features(sides, metrics, calibrate=chosen)
        return maps[metric] if isinstance(metric, str) else maps
    loaders = _check_loaders(loader, loader_b, ids)
    if estimator == "minibatch":
        if len(loaders) > 1 or len(networks) < len(sides):
            raise OptionError(
                "estimator: 'minibatch' with arrays or two loaders; expected networks and one "
                "loader, or 'exact'"
            )
        check_devices(networks)
        ((name, own),) = metrics.items()
        accumulator = run_on_all(
            lambda: _accumulate(networks, loaders["loader"], pool, own["precision"], budget)
        )
        maps = {name: accumulator.compute()}
    else:
        stimuli = run_on_all(
            lambda: [Stimuli(one, budget, ids, name) for name, one in loaders.items()]
        )
        maps = compare_exactly(sides, stimuli, pool, metrics, budget, chosen)
    return maps[metric] if isinstance(metric, str) else maps


def _check_loaders(loader: Any, loader_b: Any, ids: Any) -> dict[str, Any]:
    """Return the loaders by the names of their arguments."""
    if loader is None:
        raise OptionError("loader: None; expected the batches that the network is shown")
    if (ids is None) != (loader_b is None):
        raise OptionError(
            f"ids: {'None with two loaders' if ids is None else 'given with one loader'}; expected "
            "a function that returns the ids of the stimuli of a batch, if there are two loaders"
        )
    if ids is not None and not callable(ids):
        raise OptionError(
            f"ids: {_options.short_repr(ids)}; expected a function that returns the ids of the "
            "stimuli of a batch"
        )
    return {"loader": loader} | ({} if loader_b is None else {"loader_b": loader_b})


def _check_for_arrays(**arguments: Any) -> None:
    """Check that arguments for networks are not given with arrays."""
    for name, value in arguments.items():
        if value is not None:
            raise OptionError(f"{name}: given with arrays only; expected it with a network")


def _check_metrics(metric: Any, estimator: Any, options: dict[str, Any]) -> Metrics:
    """Return the metrics with their options."""
    names = pairwise.check_names(metric)
    metrics = pairwise.check_metric_options(names, options)
    estimator = _options.check_choice(estimator, "estimator", ("exact", "minibatch"))
    kernels = {own.get("kernel", "linear") for own in metrics.values()}
    if "precomputed" in kernels:
        raise OptionError("kernel: 'precomputed' with compare; expected 'linear' or 'rbf'")
    if estimator == "minibatch" and (names != ("cka_debiased",) or kernels != {"linear"}):
        raise OptionError(
            f"estimator: 'minibatch' with metric {_options.short_repr(metric)}; expected "
            "'cka_debiased' with the linear kernel, whose HSIC is unbiased on batches"
        )
    return metrics


def _to_pair(value: Any) -> tuple[Any, Any]:
    return value if isinstance(value, tuple) and len(value) == 2 else (value, value)


def _accumulate(
    networks: list[Network], loader: Iterable[Any], pool: Pool, precision: str, budget: int
) -> MinibatchCKA:
    """Compare two networks, or one with itself, batch by batch."""
    accumulator: MinibatchCKA | None = None
    layers: list[list[str]] = []
    for batch in iterate(loader):
        if accumulator is None:
            layers = [list(find_sizes(network, batch, pool)) for network in networks]
            accumulator = MinibatchCKA(layers[0], layers[-1], precision=precision)
        # Grams are made as each layer's output arrives, so that no features are kept.
        tables = [GramTable(names, True, precision, memory=budget) for names in layers]
        for network, table in zip(networks, tables, strict=True):
            visit_representations(network, batch, pool, table.names, table.add)
        if tables[0].n != tables[-1].n:
            raise ShapeError(
                f"pool: makes {tables[0].n} stimuli of a batch for model_a and {tables[-1].n} for "
                "model_b; expected the same"
            )
        accumulator.add_tables(*tables)
    assert accumulator is not None  # `iterate` refuses a loader without batches
    return accumulator
