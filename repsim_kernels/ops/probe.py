"""Linear decodability of a representation and of each of its ablations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from repsim_kernels import _arrays, _check, _dispatch, _options
from repsim_kernels.errors import LabelError, OptionError

SCORES = ("accuracy", "balanced_accuracy", "margin", "r2")


def ablation_decodability(
    x: Any,
    cells: Any,
    labels: Any,
    *,
    target: int | Sequence[int] | None = None,
    ridge: float | str = 1.0,
    folds: Any = None,
    score: str | Sequence[str] | None = None,
    probe: str = "ridge",
    batched: bool = False,
    precision: str = "tf32x3",
    backend: str | None = None,
) -> dict[str, Any]:
    """How well a linear reader tells held-out stimuli apart, for each ablation of a representation.

    The reader is ridge regression on one-hot classes or logistic regression of each class against
    the rest, with an unpenalised intercept; the largest output is the answer.

    Parameters
    ----------
    x : array, (n, p), float16 | bfloat16 | float32 | float64
        Activations: n >= 2 stimuli, p >= 1 neurons, any strides. Integers are taken as float64.
    cells : integer array, (p,), or boolean array, (C, p)
        Cell of each neuron, 0 … C - 1, or -1 for a neuron that is never ablated; or the membership
        of cells that may overlap.
    labels : integer array, (n,)
        Class of each stimulus; at least two classes.
    target : int or sequence of T different ints, optional
        Read this class against the rest, or each of these; by default tell all classes apart.
    ridge : float, or "gcv"
        1e-6 … 1e10. Relative: the penalty is κ/2 ‖w‖² beside half the squared errors, or the log
        loss, with κ = ridge · tr(K) / n, K the Gram of all stimuli of the side that the reader is
        fitted on. "gcv", of probe="ridge": between 1e-6 and 1e6, where generalised
        cross-validation of the intact representation is least, one for all targets.
    folds : int, or integer array, (n,), optional
        Which stimuli are held out together: those of k folds, where the i-th stimulus of each class
        of `labels` is in fold i mod k, or of the folds given, at least 2. By default each stimulus
        alone, which probe="logistic" can't.
    score : str or sequence of different str, optional
        "accuracy", the share of right answers; "balanced_accuracy", its mean over classes;
        "margin", the output of the true class less the largest other one, averaged over stimuli,
        or with a target over target and rest and then over both; "r2", of probe="ridge": 1 less
        the squared errors of all outputs over those of the means. By default "accuracy", or
        "balanced_accuracy" with a target.
    probe : {"ridge", "logistic"}
        The reader. The outputs of "logistic" are its decision values, that of the rest minus the
        target's. A class that a fold has all stimuli of can't be learnt without it: its output for
        that fold is what "ridge" makes of zeros, and -inf for "logistic".
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
    score : dict
        ``"refit"``, (…, C): the reader is fitted on the ablated representation (what information
        is left), NaN where a cell of everything leaves none; ``"frozen"``, (…, C): fitted on the
        original without a fold, applied to the ablated stimuli of that fold, their activations set
        to zero (what a fixed reader loses); ``"intact"``, a float, or (…) for a batch. With a
        sequence of targets (…, T, C) and, intact, (…, T). With a sequence of scores a dict of
        these by name. With ridge="gcv" also ``"ridge"``, a float, or (…) for a batch. Accuracies
        are in [0, 1], "r2" is at most 1.

    Raises
    ------
    ShapeError, DtypeError, NonFiniteError, ConstantError, CellError, LabelError, OptionError,
    BackendUnavailable

    Notes
    -----
    From the Grams of one pass over x; no vector of p weights is made. "ridge": a factorisation and
    an inverse a cell, n³ operations, however many targets; k folds add n³ / 3k² and 2 n³ / k,
    "gcv" one eigendecomposition. "logistic": n³ / 3 for each cell, fold, class or target, and
    Newton step, of which there are some 5 to 10; its outputs are right to 1e-10 for a ridge of 1e-4
    or more. Source: METRICS, "Linear decodability"; Golub, Heath & Wahba 1979 for "gcv";
    Rasmussen & Williams 2006, algorithm 3.1, for "logistic".
    """
    probe = _options.check_choice(probe, "probe", ("ridge", "logistic"))
    ridge = _relative(ridge, probe)
    names = _scores(score, target, probe)
    x, source = _check.check_representation(x, batched=batched)
    cells, n_cells = _check.check_cells(cells, x.shape[-1])
    labels, targets = _targets(target, labels, x.shape[-2])
    result = _dispatch.call(
        "ablation_decodability",
        backend,
        source,
        x,
        cells=cells,
        n_cells=n_cells,
        labels=labels,
        target=targets,
        ridge=ridge,
        folds=_folds(folds, labels, probe),
        score=names,
        probe=probe,
        precision=_options.check_precision(precision),
    )
    if x.ndim == 2:
        if ridge == "gcv":
            result["ridge"] = float(result["ridge"])
        if not isinstance(targets, tuple):
            for name in names:
                result[name]["intact"] = float(result[name]["intact"])
    if score is None or isinstance(score, str):
        result |= result.pop(names[0])
    return result


def _relative(ridge: Any, probe: str) -> float | str:
    """Check the ridge of a probe."""
    ridge = _options.check_ridge_or_gcv(ridge)
    if ridge == "gcv" and probe == "logistic":
        raise OptionError(
            "ridge: 'gcv' with probe='logistic'; expected a number, or probe='ridge', since "
            "generalised cross-validation is of least squares"
        )
    return ridge


def _scores(score: Any, target: Any, probe: str) -> tuple[str, ...]:
    """Check the names of scores."""
    if score is None:
        return ("accuracy" if target is None else "balanced_accuracy",)
    items = (score,) if isinstance(score, str) else _options.to_tuple(score)
    names = tuple(_options.check_choice(item, "score", SCORES) for item in items or ())
    if not names or len(set(names)) < len(names):
        raise OptionError(
            f"score: {_options.short_repr(score)}; expected a name or a sequence of different names"
        )
    if probe == "logistic" and "r2" in names:
        raise OptionError(
            "score: 'r2' with probe='logistic'; expected other scores, or probe='ridge', since "
            "decision values are not fitted to the one-hot classes"
        )
    return names


def _targets(target: Any, labels: Any, n: int) -> tuple[Any, int | tuple[int, ...] | None]:
    """Check labels (n,) and the target or targets."""
    if _arrays.detect_library(target):
        target = _arrays.to_numpy(_arrays.convert(target, "target")[0])
    if target is None:
        return _check.check_labels(labels, n), None
    several = None if isinstance(target, str) else _options.to_tuple(target)
    if several is None:
        return _check.check_labels(labels, n, target), int(target)
    labels = _check.check_labels(labels, n)
    for one in several:
        _check.check_labels(labels, n, one)
    found = tuple(int(one) for one in several)
    if not found or len(set(found)) < len(found):
        raise LabelError(
            f"target: {_options.short_repr(target)}; expected a label or a sequence of different "
            "labels"
        )
    return labels, found


def _folds(folds: Any, labels: Any, probe: str) -> Any:
    """Check the folds, and make those of a number of them: (n,) from 0 on, none empty, or None."""
    if folds is None:
        if probe == "logistic":
            raise OptionError(
                "folds: None with probe='logistic'; expected a number of folds or a fold for each "
                "stimulus, since without one stimulus at a time it has no closed form"
            )
        return None
    if isinstance(folds, (int, np.integer)) and not isinstance(folds, bool):
        _, classes, counts = np.unique(labels, return_inverse=True, return_counts=True)
        if not 2 <= folds <= counts.max():
            raise OptionError(
                f"folds: {_options.short_repr(folds)}; expected 2 or more, and at most "
                f"{counts.max()}, the stimuli of the largest class"
            )
        fold = np.empty_like(labels)
        for k, count in enumerate(counts):
            fold[classes == k] = np.arange(count) % folds
        return fold
    text = isinstance(folds, str)  # no array, where a number of folds would do as well
    values = np.asarray(folds) if text else _arrays.to_numpy(_arrays.convert(folds, "folds")[0])
    if values.dtype.kind not in "iu" or values.shape != labels.shape:
        raise OptionError(
            f"folds: {_options.short_repr(folds)}; expected a whole number of at least 2, or "
            f"integers ({len(labels)},), a fold for each stimulus"
        )
    present, fold = np.unique(values, return_inverse=True)
    if len(present) < 2:
        raise OptionError(f"folds: only fold {present[0]}; expected at least two folds")
    return fold.astype(np.int64)
