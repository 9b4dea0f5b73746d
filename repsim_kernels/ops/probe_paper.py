"""The probe of the published study: logistic regressions on randomly drawn neurons."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import numpy as np

from repsim_kernels import _arrays, _check, _check_cells, _options
from repsim_kernels._arrays import Source
from repsim_kernels._cell_sets import Cells, mark_members
from repsim_kernels._typing import Array, ArrayLike, CellsLike, Tensor
from repsim_kernels.errors import LabelError, OptionError
from repsim_kernels.ops.logistic import MAX_NEURONS, check_tolerance, fit_columns

# Orderings of up to _MAX_SORTED_NEURONS come from sorting random keys, at most _MAX_KEYS at once.
_MAX_SORTED_NEURONS, _MAX_KEYS = 2**13, 2**22
_MAX_DRAWS = 10**6
# scikit-learn's log_loss clips predictions to [eps, 1 - eps]: the losses of a wrong hard prediction
# and of a correct one.
_EPS = float(np.finfo(np.float64).eps)
_LOSS_IF_WRONG, _LOSS_IF_RIGHT = -math.log(_EPS), -math.log1p(-_EPS)


def probe_paper(
    x: ArrayLike,
    cells: CellsLike,
    labels: ArrayLike,
    target: int,
    *,
    draws: int = 200,
    size: int = 100,
    paired: bool = True,
    seed: int = 0,
    C: float = 1.0,
    precision: str = "tf32x3",
    backend: str | None = None,
) -> dict[str, Array]:
    """Linear decodability of a class before and after each ablation, by the published probe.

    Each of `draws` logistic regressions discriminates the class from the rest, using `size` neurons
    drawn without replacement from those that are not ablated, and is scored on the stimuli that it
    was fitted on. The result is exp(-mean log loss of the hard predictions) over the draws.

    Parameters
    ----------
    x : array, (n, p), float16 | bfloat16 | float32 | float64
        Activations for n >= 2 stimuli, p >= 1 neurons, any strides. Integers are converted to
        float64.
    cells : integer array, (p,), or boolean array, (C, p)
        Integers: the cell of each neuron, 0 … C - 1, or -1 for a neuron that is never ablated.
        Booleans: the membership of cells that may overlap.
    labels : integer array, (n,)
        Class of each stimulus; at least two classes.
    target : int
        The class to discriminate from the rest.
    draws : int
        Number of draws, at most 1,000,000. The study used 200 for AlexNet, p / 100 but at least 200
        for MobileNetV2, and p / 50 for ResNet50.
    size : int
        Neurons per draw, at most 128; all remaining neurons if they are fewer.
    paired : bool
        Whether the fits of an ablation keep the intact fits' neurons where these survive, and draw
        only replacements for the others. Each estimate has the same distribution either way, but
        their difference is less noisy. False draws all neurons anew, as the study did.
    seed : int
        Seed of the draws, at least 0. Draws are the same on every backend.
    C : float
        Inverse strength of the penalty, above 0.
    precision : {"tf32x3", "tf32", "ieee"}
        As in `logistic_fits`.
    backend : {"reference", "torch", "triton"}, optional
        As in `logistic_fits`.

    Returns
    -------
    scores : dict of str to array like x, float64
        ``"intact"``, a float, and ``"ablated"``, (C,), in [0, 1]; ``"change"``, (C,), intact minus
        ablated; ``"standard_error"``, (C,), the Monte Carlo error of the change: how much it varies
        with the draws. It is 0 if there is only one way to draw, and NaN for a single draw. For a
        cell of all neurons, all but the intact score are NaN. Dimensionless.

    Raises
    ------
    ShapeError, DtypeError, NonFiniteError, ConstantError, CellError, LabelError, OptionError,
    BackendUnavailable

    Notes
    -----
    Costs (1 + C) · draws fits, where C is the number of cells, each as in `logistic_fits`; paired
    fits start from the intact ones. x is copied unless its memory is ordered neuron by neuron. A
    thread draws the neurons of the next cell during the fits of the current one. The study's
    classifier stops early (scikit-learn's lbfgs after 100 iterations); this one converges,
    with outliers in float64, as described in `logistic_fits`.

    Source: Hayne, Jung & Carter 2024, "Does Representation Similarity Capture Function
    Similarity?", TMLR, and its published code; the log loss is scikit-learn's (>= 1.5) log_loss.

    Examples
    --------
    >>> import numpy as np
    >>> import repsim_kernels as rk
    >>> rng = np.random.default_rng(0)
    >>> labels = np.arange(60) % 3
    >>> x = rng.standard_normal((60, 40))
    >>> x[labels == 1, :20] += 2  # only the neurons of cell 0 respond to class 1
    >>> cells = np.repeat([0, 1], 20)
    >>> scores = rk.probe_paper(x, cells, labels, target=1, draws=20, size=10)
    >>> round(scores["intact"], 2), scores["ablated"].round(2)
    (0.97, array([0., 1.]))
    """
    x, source = _check.check_representation(x, allow_batch=False)
    n, p = x.shape
    checked, n_cells = _check_cells.check_cells(cells, p)
    if target is None:
        raise LabelError("target: None; expected an integer label")
    y = _check.check_labels(labels, n, target) == target
    draws = _options.check_count(draws, "draws", maximum=_MAX_DRAWS)
    size = _options.check_count(size, "size")
    if size > MAX_NEURONS:
        raise OptionError(f"size: {size}; expected at most {MAX_NEURONS} neurons")
    paired = _options.check_flag(paired, "paired")
    seed = _options.check_count(seed, "seed", minimum=0)
    options = {
        "C": _options.check_number(C, "C", low=0, exclude_low=True),
        "tol": check_tolerance(None, x),
        "max_iter": 200,
        "precision": _options.check_precision(precision),
    }
    probe = _Probe(x, y, draws, size, options, backend)
    scores = probe.score_cells(checked, n_cells, paired, seed)
    return {name: source.restore(value) for name, value in scores.items()}


class _Probe:
    """The fits of `probe_paper`, on a copy of x (n, p) that is contiguous for each neuron."""

    def __init__(
        self,
        x: Tensor,
        y: np.ndarray[Any, Any],
        draws: int,
        size: int,
        options: dict[str, Any],
        backend: str | None,
    ) -> None:
        self.y, self.draws, self.size = y, draws, size
        self.options, self.backend = options, backend
        self.x = x.mT.contiguous().mT
        self.source = Source("torch", str(x.device))  # the fits are needed as tensors
        self.means = self.x.mean(0)
        # Cache of the intact draws: the longest prefixes of the random orderings so far.
        self.orderings = np.empty((0, 0), dtype=np.int64)
        self.uploaded = self.orderings, _arrays.to_tensor(self.orderings, x.device)

    def score_cells(self, cells: Cells, n_cells: int, paired: bool, seed: int) -> dict[str, Any]:
        """Return the scores of the intact representation and of each ablation.

        A thread draws the neurons of the next cell during the fits of the current one. Only the
        seeds determine the draws.
        """
        p = self.x.shape[1]
        intact_seed, *cell_seeds = np.random.SeedSequence(seed).spawn(n_cells + 1)

        def find_members(c: int) -> np.ndarray[Any, Any]:
            return mark_members(cells, c, n_cells)

        n_remaining = [p - int(find_members(c).sum()) for c in range(n_cells)]
        # If few neurons remain, hardly any of the intact draws survive.
        pair_draws = [paired and m > self.size and m >= p / 8 for m in n_remaining]

        def draw(c: int | None) -> np.ndarray[Any, Any]:
            if c is None:
                return self._draw(intact_seed, p, self.size)
            if pair_draws[c]:
                return self._extend_orderings(intact_seed, find_members(c))
            remaining = np.flatnonzero(~find_members(c))
            return remaining[self._draw(cell_seeds[c], n_remaining[c], self.size)]

        fitted = [c for c in range(n_cells) if n_remaining[c]]
        ablated, errors = np.full(n_cells, np.nan), np.full(n_cells, np.nan)
        with closing(_call_ahead(draw, [None, *fitted])) as draws:
            intact_fits, intact_losses = self._fit(next(draws))
            intact = math.exp(-intact_losses.mean())
            for c, drawn in zip(fitted, draws, strict=True):
                if pair_draws[c]:
                    intact_results = intact_fits, intact_losses
                    losses = self._fit_survivors(drawn, find_members(c), *intact_results)
                else:
                    _, losses = self._fit(drawn)
                ablated[c] = math.exp(-losses.mean())
                # A score is s = exp(-mean loss), so to first order ds = -s d(mean loss).
                if pair_draws[c]:
                    errors[c] = _standard_error(intact * intact_losses - ablated[c] * losses)
                else:
                    terms = (intact * intact_losses, p), (ablated[c] * losses, n_remaining[c])
                    # A draw of all neurons has no sampling error.
                    random = (_standard_error(v) for v, m in terms if m > self.size)
                    errors[c] = math.hypot(*random, 0)
        change = intact - ablated
        return {"intact": intact, "ablated": ablated, "change": change, "standard_error": errors}

    def _draw(self, seed: np.random.SeedSequence, p: int, length: int) -> np.ndarray[Any, Any]:
        """Return `length` of p neurons for each draw, or a single draw of all if p <= size."""
        if p <= self.size:
            return np.arange(p)[None]
        return _draw_orderings(seed, p, self.draws, length)

    def _fit(
        self, columns: np.ndarray[Any, Any] | Tensor, start: tuple[Tensor, Tensor] | None = None
    ) -> tuple[dict[str, Tensor], np.ndarray[Any, Any]]:
        """Return fits, and the log loss of each fit's hard predictions."""
        y = self.y[None]
        fits = fit_columns(self.source, self.x, y, columns, start, self.backend, **self.options)
        wrong = _arrays.to_numpy(fits["errors"])[:, 0] / len(self.y)
        return fits, wrong * _LOSS_IF_WRONG + (1 - wrong) * _LOSS_IF_RIGHT

    def _extend_orderings(
        self, seed: np.random.SeedSequence, inside: np.ndarray[Any, Any]
    ) -> np.ndarray[Any, Any]:
        """Return orderings that all have `size` neurons outside the cell."""
        length = self.size + 16
        while True:
            length = min(len(inside), length + length // 4)
            if self.orderings.shape[1] < length:
                self.orderings = self._draw(seed, len(inside), length)
            lost = inside[self.orderings].sum(axis=1, dtype=np.int32)
            if self.orderings.shape[1] - lost.max() >= self.size:
                return self.orderings

    def _fit_survivors(
        self,
        orderings: np.ndarray[Any, Any],
        inside: np.ndarray[Any, Any],
        intact_fits: dict[str, Tensor],
        intact_losses: np.ndarray[Any, Any],
    ) -> np.ndarray[Any, Any]:
        """Return the losses of fits to the first `size` neurons of each ordering outside the cell.

        Only draws that lost a neuron are fitted again, starting from their intact fit.
        """
        device, size = self.x.device, self.size
        if self.uploaded[0] is not orderings:
            self.uploaded = orderings, _arrays.to_tensor(orderings, device)
        order = self.uploaded[1]
        survives = ~_arrays.to_tensor(inside, device)[order]
        changed = (~survives[:, :size]).any(1).nonzero()[:, 0]
        losses = intact_losses.copy()
        if len(changed):
            order, survives = order[changed], survives[changed]
            chosen = survives & (survives.cumsum(1) <= size)
            positions = chosen.nonzero()[:, 1].view(-1, size)
            columns = order.gather(1, positions)
            intact_coef = intact_fits["coef"][changed, 0]
            # Survivors keep their coefficients; replacements start at 0.
            coef = intact_coef.gather(1, positions.clamp(max=size - 1)).where(positions < size, 0)
            # The intercept is shifted so that the mean of the decision values stays the same.
            intact_mean = (intact_coef * self.means[order[:, :size]]).sum(1)
            new_mean = (coef * self.means[columns]).sum(1)
            shift = (intact_mean - new_mean).to(coef.dtype)
            intercept = intact_fits["intercept"][changed, 0] + shift
            start = coef[:, None], intercept[:, None]
            losses[_arrays.to_numpy(changed)] = self._fit(columns, start)[1]
        return losses


def _call_ahead(
    function: Callable[[Any], Any], arguments: Iterable[Any]
) -> Generator[Any, None, None]:
    """Yield the result for each argument; a thread computes the next while the caller uses one."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        futures = (pool.submit(function, argument) for argument in arguments)
        upcoming = next(futures, None)
        while upcoming is not None:
            result = upcoming.result()
            upcoming = next(futures, None)
            yield result


def _draw_orderings(
    seed: np.random.SeedSequence, p: int, draws: int, length: int
) -> np.ndarray[Any, Any]:
    """Return the first `length` of p neurons in random order, for each draw: (draws, length).

    For one seed, a longer result begins with each shorter one.
    """
    rng = np.random.default_rng(seed)
    if p <= _MAX_SORTED_NEURONS:
        step = max(1, _MAX_KEYS // p)
        counts = [min(step, draws - i) for i in range(0, draws, step)]
        return np.concatenate([_order_smallest(rng.random((k, p)), length) for k in counts])
    # Draw with replacement and keep the first occurrence of each neuron.
    count = length + length // 2 + 8
    while True:
        rng = np.random.default_rng(seed)
        values = np.ascontiguousarray(rng.integers(p, size=(count, draws), dtype=np.int32).T)
        orderings = values[:, :length].astype(np.int64)
        ordered = np.sort(values[:, :length], axis=1)
        with_repeats = np.flatnonzero((ordered[:, 1:] == ordered[:, :-1]).any(axis=1))
        values = values[with_repeats]
        first = _find_first_occurrences(values)
        if (first.sum(axis=1) >= length).all():
            first &= first.cumsum(axis=1) <= length
            orderings[with_repeats] = values[first].reshape(-1, length)
            return orderings
        count *= 2


def _order_smallest(keys: np.ndarray[Any, Any], length: int) -> np.ndarray[Any, Any]:
    """Return the positions of the `length` smallest keys of each row, in ascending order."""
    smallest = keys.argpartition(length - 1, axis=1)[:, :length]
    order = np.take_along_axis(keys, smallest, axis=1).argsort(axis=1)
    return np.take_along_axis(smallest, order, axis=1)


def _find_first_occurrences(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return where a value of a row occurs for the first time in it."""
    order = values.argsort(axis=1, kind="stable")
    ordered = np.take_along_axis(values, order, axis=1)
    first = np.ones(values.shape, dtype=bool)
    np.put_along_axis(first, order[:, 1:], ordered[:, 1:] != ordered[:, :-1], axis=1)
    return first


def _standard_error(values: np.ndarray[Any, Any]) -> float:
    """Return the standard error of the mean; NaN for a single value."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
