"""Every metric between a representation and each of its ablations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from repsim_kernels import _arrays, _check, _dispatch, _metrics, _options
from repsim_kernels._routes import Distances, Info, Route

METRICS = tuple(metric.name for metric in _metrics.METRICS if metric.ablation)


def ablation_distances(
    x: Any,
    cells: Any,
    *,
    metrics: Sequence[str] = METRICS,
    ridge: float = 0.1,
    penalty: float = 0.0,
    memory: int | None = None,
    info: bool = False,
    batched: bool = False,
    precision: str = "tf32x3",
    backend: str | None = None,
) -> Any:
    """Distances between a representation and each of its ablations, by every metric.

    The original x is the first argument of each metric; the second is x with the neurons of one
    cell set to zero (or left out: the same to each metric here).

    Parameters
    ----------
    x : array, (n, p), float16 | bfloat16 | float32 | float64
        Activations: n >= 2 stimuli (n >= 4 for "cka_debiased"), p >= 1 neurons, any strides.
        Integers are taken as float64.
    cells : integer array, (p,), or boolean array, (C, p)
        Cell of each neuron, 0 … C - 1, or -1 for a neuron that is never ablated; or the membership
        of cells that may overlap.
    metrics : sequence of str
        Among "cka", "cka_debiased", "procrustes" (the squared form), "pwcca", "cca",
        "cca_squared" and "svcca" (99 % of the variance).
    ridge : float
        Relative ridge of cca, cca_squared and pwcca: κ = ridge · tr(K) / n on each side; ignored
        where `penalty` > 0. At most 1e10.
    penalty : float
        Absolute ridge κ of the same, on both sides, in x's units squared. At most 1e150.
    memory : int, optional
        Bytes for the canonical variates that wait for a pass over x, 1 GiB unless given: with less
        there are more passes for "pwcca". Beside it stand the Grams, 8 C n² bytes at most: the
        torch backend keeps halves.
    info : bool
        Whether to tell as well how each distance was found.
    batched : bool
        Whether x is a batch, (…, n, p), whose leading dimensions are those of the result. Without
        it more than two dimensions are refused: flatten activations (n, c, h, w) first.
    precision : {"tf32x3", "tf32", "ieee"}
        Of the float32 products of the Triton kernels: as accurate as float32 on tensor cores,
        10 bits on tensor cores, or float32 without them. Other backends compute in float64.
    backend : {"reference", "torch", "triton"}, optional
        What computes it; by default chosen by the kind and the device of x.

    Returns
    -------
    distances : dict of str to array like x, (…, C), float64
        1 - similarity, "procrustes" 2 - 2·similarity. A cell that is empty or dead (constant on
        these stimuli) has exactly the self-distance, which is 0 without a ridge; a cell of
        everything leaves no representation, and has NaN.
    info : dict of str to Info, only with ``info=True``
        For each metric the ``route`` (…, C) to each distance, by name, and the ``steps`` (…, C) it
        took; NumPy arrays. "nothing": nothing was removed or is left, or CCA without a ridge;
        "sums": over elements; "iterations": of a Riccati equation; "factors": singular values of
        the features that are left, where iterations would crawl; "eigenvectors": of an ablated
        matrix, which PWCCA needs, and CCA uses beside it; "definition".

    Raises
    ------
    ShapeError, DtypeError, NonFiniteError, ConstantError, CellError, OptionError,
    BackendUnavailable
    ConvergenceError
        For "cca", "cca_squared" and "pwcca", a ridge below 1e-10 but not 0, or as small a penalty.

    Warns
    -----
    DegenerateWarning
        CCA without a ridge: the ablated neurons span a part of what the original's span, so that
        every canonical correlation is 1 and every distance 0.

    Notes
    -----
    One pass over x gives the Grams of all cells, 2 n² p operations at most whatever C is; CKA costs
    n² a cell, the other metrics a few times n³; "pwcca" 2 C n² p more, in x's precision. No ablated
    copy of x is made. Distances do not come from 1 minus a similarity near 1, and keep their digits
    where they are small: from float64 input, "cka", "procrustes" and what "cca" and "cca_squared"
    have above the self-distance are right to 1e-6 relative or 1e-14 absolute; of the latter two for
    a ridge of 1e-3 or more, since rounding grows as the ridge falls.
    Source: METRICS, "One original, many ablations".
    """
    names = _options.check_choices(metrics, "metrics", METRICS)
    ridge, penalty = _options.check_ridge_and_penalty(ridge, penalty)
    memory = None if memory is None else int(_options.check_number(memory, "memory", low=1))
    info = _options.check_flag(info, "info")
    # CKA is NaN of every ablation if x has a number that is not finite; eigenvectors are not found.
    defer_finite = bool(names) and set(names) <= {"cka", "cka_debiased"}
    x, source = _check.check_representation(
        x,
        batched=batched,
        min_stimuli=4 if "cka_debiased" in names else 2,
        defer_finite=defer_finite,
    )
    cells, n_cells = _check.check_cells(cells, x.shape[-1])
    _options.warn_without_ridge(names, ridge, penalty)
    found = _dispatch.call(
        "ablation_distances",
        backend,
        source,
        x,
        cells=cells,
        n_cells=n_cells,
        metrics=names,
        ridge=ridge,
        penalty=penalty,
        memory=memory,
        precision=_options.check_precision(precision),
    )
    if defer_finite:
        _check.finish_finite_check(found[names[0]].values, x, "x")
    return public_result(found, info)


def public_result(found: dict[str, Distances], info: bool) -> Any:
    """Return what a public function of ablations promises, from what a backend gave.

    Parameters
    ----------
    found : dict of str to Distances
        By metric; arrays (…, C) of the caller's kind.
    info : bool
        Whether to tell how each distance was computed.

    Returns
    -------
    dict of str to array, or (dict of str to array, dict of str to Info) with `info`
    """
    distances = {name: one.values for name, one in found.items()}
    if not info:
        return distances
    routes = np.array([route.name.lower() for route in Route])
    return distances, {
        name: Info(routes[_arrays.to_numpy(one.route)], _arrays.to_numpy(one.steps))
        for name, one in found.items()
    }
