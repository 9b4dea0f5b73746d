"""The probe of the published study: logistic regressions on neurons that are drawn at random."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from repsim_kernels import _arrays, _check, _options
from repsim_kernels._arrays import Source
from repsim_kernels._typing import Array
from repsim_kernels.errors import LabelError, OptionError
from repsim_kernels.ops.logistic import MOST, _fits, _tolerance

# Up to so many neurons orderings come from sorted random keys, at most so many at a time.
_KEYED, _KEYS = 2**13, 2**22
# scikit-learn's log-loss keeps predictions from 0 and 1 by the rounding of a float64.
_EPS = float(np.finfo(np.float64).eps)
_MOST_DRAWS = 10**6
_WRONG, _RIGHT = -math.log(_EPS), -math.log1p(-_EPS)


def probe_paper(
    x: Any,
    cells: Any,
    labels: Any,
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
    """Linear decodability of a class, and what each ablation takes of it, by the study's own probe.

    ``draws`` times a logistic regression tells the class from the rest by ``size`` neurons that are
    drawn without replacement from those that are left, and is scored on the stimuli that it was
    fitted on: exp(-the mean over the draws of the log-loss of its hard predictions).

    Parameters
    ----------
    x : array, (n, p), float16 | bfloat16 | float32 | float64
        Activations: n >= 2 stimuli, p >= 1 neurons, any strides. Integers are taken as float64.
    cells : integer array, (p,), or boolean array, (C, p)
        Cell of each neuron, 0 … C - 1, or -1 for a neuron that is never ablated; or the membership
        of cells that may overlap.
    labels : integer array, (n,)
        Class of each stimulus; at least two classes.
    target : int
        The class that is told from the rest.
    draws : int
        At most 1,000,000. The study took 200 for AlexNet, p / 100 but at least 200 for
        MobileNetV2, and p / 50 for ResNet50.
    size : int
        Neurons of a draw, at most 128; all that are left, if they are fewer.
    paired : bool
        Whether an ablated fit keeps the intact one's neurons as far as they survive, and draws only
        the others' replacements. Each estimate has the same distribution as by itself, and their
        difference less noise. False draws all anew, as the study did.
    seed : int
        Of the draws, at least 0. They are the same on every backend.
    C : float
        Inverse of the penalty's strength, above 0.
    precision, backend
        As in `logistic_fits`.

    Returns
    -------
    scores : dict
        ``"intact"``, a float, and ``"ablated"``, (C,), in [0, 1]; ``"change"``, (C,), intact -
        ablated; ``"standard_error"``, (C,), that of the change by Monte Carlo: what other draws
        would change, 0 where there is only one way to draw, NaN for a single draw. NaN for a cell
        of everything. float64.

    Raises
    ------
    ShapeError, DtypeError, NonFiniteError, ConstantError, CellError, LabelError, OptionError,
    BackendUnavailable

    Notes
    -----
    (1 + C) · draws fits, each as in `logistic_fits`; an ablated one that is paired starts from the
    intact one. A copy of x is made unless it lies neuron by neuron. The study's classifier stops
    early (scikit-learn's lbfgs, 100 iterations); this one converges, with outliers in float64, as
    `logistic_fits` describes.

    Source: Hayne, Jung & Carter, *Does Representation Similarity Capture Function Similarity?*,
    TMLR 2024, and its published code; scikit-learn >= 1.5, log_loss.
    """
    x, source = _check.check_representation(x, allow_batch=False)
    n, p = x.shape
    cells, n_cells = _check.check_cells(cells, p)
    if target is None:
        raise LabelError("target: None; expected an integer label")
    y = _check.check_labels(labels, n, target) == target
    draws, size = (
        _options.check_count(draws, "draws", maximum=_MOST_DRAWS),
        _options.check_count(size, "size"),
    )
    if size > MOST:
        raise OptionError(f"size: {size}; expected at most {MOST} neurons")
    paired, seed = (
        _options.check_flag(paired, "paired"),
        _options.check_count(seed, "seed", minimum=0),
    )
    options = {
        "C": _options.check_number(C, "C", low=0, exclude_low=True),
        "tol": _tolerance(None, x),
        "max_iter": 200,
        "precision": _options.check_precision(precision),
    }
    probe = _Probe(x, y, draws, size, options, backend)
    found = probe.scores(cells, n_cells, paired, seed)
    return {name: source.restore(value) for name, value in found.items()}


class _Probe:
    """The fits of `probe_paper`, on a copy of x (n, p) that lies neuron by neuron."""

    def __init__(
        self,
        x: Array,
        y: np.ndarray[Any, Any],
        draws: int,
        size: int,
        options: dict[str, Any],
        backend: str | None,
    ) -> None:
        self.y, self.draws, self.size = y, draws, size
        self.options, self.backend = options, backend
        self.x = x.mT.contiguous().mT
        self.source = Source("torch", str(x.device))  # of the fits, which are used as tensors here
        self.means = self.x.mean(0)
        self.known = np.empty((0, 0), dtype=np.int64)  # the longest orderings so far of all neurons

    def scores(
        self, cells: np.ndarray[Any, Any], n_cells: int, paired: bool, seed: int
    ) -> dict[str, Array]:
        p = self.x.shape[1]
        own, *sources = np.random.SeedSequence(seed).spawn(n_cells + 1)
        order = self._order(own, p, self.size)
        whole, before = self._fit(order)
        intact = math.exp(-before.mean())
        after, errors = np.full(n_cells, np.nan), np.full(n_cells, np.nan)
        for c, source in enumerate(sources):
            inside = cells == c if cells.ndim == 1 else cells[c]
            left = p - int(inside.sum())
            if left == 0:
                continue
            # Of few that are left hardly any were drawn before.
            together = paired and left > self.size and left >= p / 8
            if together:
                losses = self._survivors(own, inside, whole, before)
            else:
                outside = np.flatnonzero(~inside)
                _, losses = self._fit(outside[self._order(source, left, self.size)])
            after[c] = math.exp(-losses.mean())
            # Of s = exp(-mean loss) to first order, d s = -s d (mean loss).
            if together:
                errors[c] = _deviation(intact * before - after[c] * losses)
            else:
                parts = (intact * before, p), (after[c] * losses, left)
                # Where all neurons are taken, there is one way to draw them.
                errors[c] = math.hypot(*(_deviation(v) for v, m in parts if m > self.size), 0)
        change = intact - after
        return {"intact": intact, "ablated": after, "change": change, "standard_error": errors}

    def _order(self, source: np.random.SeedSequence, p: int, length: int) -> np.ndarray[Any, Any]:
        """Beginnings of random orderings of p neurons, for each draw; one if all are drawn."""
        if p <= self.size:
            return np.arange(p)[None]
        return _orderings(source, p, self.draws, length)

    def _fit(
        self, columns: np.ndarray[Any, Any] | Array, start: tuple[Array, Array] | None = None
    ) -> tuple[dict[str, Array], np.ndarray[Any, Any]]:
        """Fits, and the log-loss of each one's hard predictions, as scikit-learn has it."""
        y = self.y[None]
        found = _fits(self.source, self.x, y, columns, start, self.backend, **self.options)
        share = _arrays.to_numpy(found["errors"])[:, 0] / len(self.y)
        return found, share * _WRONG + (1 - share) * _RIGHT

    def _survivors(
        self,
        source: np.random.SeedSequence,
        inside: np.ndarray[Any, Any],
        whole: dict[str, Array],
        before: np.ndarray[Any, Any],
    ) -> np.ndarray[Any, Any]:
        """The losses by the first neurons of each ordering that are not inside a cell."""
        device, size = self.x.device, self.size
        gone = _arrays.to_tensor(inside, device)
        length = size + 16
        while True:
            length = min(len(inside), length + length // 4)
            if self.known.shape[1] < length:
                self.known = self._order(source, len(inside), length)
            order = _arrays.to_tensor(self.known, device)
            alive = ~gone[order]
            if int(alive.sum(1).min()) >= size:
                break
        changed = (~alive[:, :size]).any(1).nonzero()[:, 0]
        losses = before.copy()
        if len(changed):
            order, alive = order[changed], alive[changed]
            chosen = alive & (alive.cumsum(1) <= size)
            at = chosen.nonzero()[:, 1].view(-1, size)
            old = whole["coef"][changed, 0]
            coef = old.gather(1, at.clamp(max=size - 1)).where(at < size, 0)
            # The fit goes on from margins of the same mean.
            lost = (old * self.means[order[:, :size]]).sum(1)
            columns = order.gather(1, at)
            kept = (coef * self.means[columns]).sum(1)
            intercept = whole["intercept"][changed, 0] + (lost - kept).to(coef.dtype)
            start = coef[:, None], intercept[:, None]
            losses[_arrays.to_numpy(changed)] = self._fit(columns, start)[1]
        return losses


def _orderings(
    source: np.random.SeedSequence, p: int, draws: int, length: int
) -> np.ndarray[Any, Any]:
    """The first `length` of p neurons in random order, `draws` times: (draws, length).

    A longer one of the same source begins with a shorter one.
    """
    rng = np.random.default_rng(source)
    if p <= _KEYED:
        step = max(1, _KEYS // p)
        counts = [min(step, draws - i) for i in range(0, draws, step)]
        return np.concatenate([rng.random((k, p)).argsort(1)[:, :length] for k in counts])
    # Distinct numbers in the order in which they first come, of numbers with repeats.
    count = length + length // 2 + 8
    while True:
        rng = np.random.default_rng(source)
        values = np.ascontiguousarray(rng.integers(p, size=(count, draws), dtype=np.int32).T)
        found = values[:, :length].astype(np.int64)
        ranked = np.sort(values[:, :length], axis=1)
        some = np.flatnonzero((ranked[:, 1:] == ranked[:, :-1]).any(axis=1))
        for row in some:
            _, first = np.unique(values[row], return_index=True)
            if len(first) < length:
                break
            found[row] = values[row, np.sort(first)[:length]]
        else:
            return found
        count *= 2


def _deviation(values: np.ndarray[Any, Any]) -> float:
    """Standard error of the mean; NaN of one value."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
