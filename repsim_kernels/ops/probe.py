"""Linear decodability of a representation and of each of its ablations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from repsim_kernels import _arrays, _check, _check_cells, _dispatch, _options
from repsim_kernels._cell_sets import are_partitions
from repsim_kernels._typing import ArrayLike, CellsLike
from repsim_kernels.errors import LabelError, OptionError
from repsim_kernels.ops.ablation import check_grams

SCORES = ("accuracy", "balanced_accuracy", "margin", "r2")


def ablation_decodability(
    x: ArrayLike,
    cells: CellsLike,
    labels: ArrayLike,
    *,
    target: int | Sequence[int] | None = None,
    ridge: float | str = 1.0,
    folds: int | ArrayLike | None = None,
    score: str | Sequence[str] | None = None,
    probe: str = "ridge",
    memory: int | None = None,
    grams: ArrayLike | None = None,
    batched: bool = False,
    precision: str = "tf32x3",
    backend: str | None = None,
) -> dict[str, Any]:
    """How well a linear probe classifies held-out stimuli after each ablation of a representation.

    The probe is ridge regression on one-hot classes, or logistic regression of each class against
    the rest, with an unpenalised intercept. It predicts the class with the largest output.

    Parameters
    ----------
    x : array, (n, p), float16 | bfloat16 | float32 | float64
        Activations for n >= 2 stimuli, p >= 1 neurons, any strides. Integers are converted to
        float64.
    cells : integer array, (p,) or (T, p); boolean array, (p,) or (C, p); or sparse, (C, p)
        Integers: the cell of each neuron, 0 … C - 1, or -1 for a neuron that is never ablated; or T
        such partitions, for example one for each target. `rk.cells` makes labels of channels,
        attention heads, positions and others.
        Booleans: the neurons of one cell, (p,), or of cells that may overlap, (C, p). Sparse: the
        latter as a SciPy CSR array, or as a tuple (indptr, indices). Labels and the neurons of one
        cell may also have a shape that broadcasts to that of one stimulus' activation, such as
        (c, 1, 1) or (tokens, 1); one run of 1s then stands for the dimensions to broadcast.
    labels : integer array, (n,)
        Class of each stimulus; at least two classes.
    target : int or sequence of T different ints, optional
        The class to discriminate from the rest, or several classes, each discriminated from its
        rest; by default, all classes are discriminated from each other. With T partitions, several
        targets must be T: the first one is discriminated after ablations of the first partition's
        cells, and so on.
    ridge : float, or "gcv"
        Relative ridge, 1e-6 … 1e10: the penalty is κ/2 ‖w‖², added to half the squared errors or to
        the log loss, with κ = ridge · tr(K) / n, where K is the Gram matrix, for all stimuli, of
        the representation that the probe is fitted on. "gcv", only with probe="ridge", chooses the
        ridge between 1e-6 and 1e6 that minimises the generalised cross-validation error of the
        intact representation, one for all targets.
    folds : int, or integer array, (n,), optional
        Which stimuli are held out together. An int k: the i-th stimulus of each class of `labels`
        is in fold i mod k. An array: the fold of each stimulus, at least two folds. By default
        every stimulus is held out alone, which probe="logistic" doesn't support.
    score : str or sequence of different str, optional
        "accuracy": the fraction of correct predictions. "balanced_accuracy": its mean over classes.
        "margin": the output of the true class minus the largest other output, averaged over
        stimuli; with a target, averaged within target and rest, and then over both. "r2", only with
        probe="ridge": 1 minus the ratio of the squared errors of all outputs to those of the means.
        By default "accuracy", or "balanced_accuracy" with a target.
    probe : {"ridge", "logistic"}
        The probe. The outputs of "logistic" are its decision values; with a target, the value of
        the rest is minus that of the target. If a fold contains all stimuli of a class, a probe
        can't learn it from the others: its output for that fold is -inf for "logistic", and that of
        a fit to zeros for "ridge".
    memory : int, optional
        Bytes for the Gram matrices of sparse cells, by default 1 GiB: the cells are scored in
        chunks. On a GPU it limits those of several partitions too. The Gram matrices of other cells
        need up to 8 C n² bytes (half of that in the torch backend, which stores one triangle).
    grams : array like x, (C, n, n) or (T, C, n, n), float64, optional
        The result of ``cell_grams`` for this x and these cells, which is then not computed again.
        Its values are not checked. Not with ``batched=True``.
    batched : bool
        Whether x is a batch, (…, n, p), whose leading dimensions become those of the result.
        Without it, more than two dimensions are an error: flatten activations (n, c, h, w) first.
    precision : {"tf32x3", "tf32", "ieee"}
        Float32 products in the Triton kernels: "tf32x3" is as accurate as float32 and runs on
        tensor cores, "tf32" has 10 bits and runs on tensor cores, "ieee" is plain float32. Other
        backends compute in float64.
    backend : {"reference", "torch", "triton"}, optional
        Backend to use; by default chosen by the library and device of x.

    Returns
    -------
    score : dict of str to array like x, float64
        ``"refit"``, (…, C): the probe is fitted on the ablated representation, which shows what
        information remains; NaN for a cell of all neurons. ``"frozen"``, (…, C): the probe is
        fitted on the original without a fold, and applied to the stimuli of that fold with the
        cell's activations set to zero, which shows what a fixed probe loses. ``"intact"``: the
        score without ablation, a float, or (…) for a batch. With ridge="gcv" also ``"ridge"``, a
        float, or (…) for a batch. With a sequence of targets, or with T partitions, (…, T, C) and,
        for "intact", (…, T).
        With a sequence of scores a dict of these by score. Accuracies are in [0, 1], "r2" is at
        most 1; all are dimensionless.

    Raises
    ------
    ShapeError, DtypeError, NonFiniteError, ConstantError, CellError, LabelError, OptionError,
    BackendUnavailable

    Notes
    -----
    Computed from Gram matrices, with one pass over x, or one for each chunk of sparse cells; no
    vector of p weights is formed.

    "ridge": one factorisation and one inverse per cell, n³ operations, for any number of targets; k
    folds add n³ / 3k² and 2 n³ / k, "gcv" one eigendecomposition. "logistic": n³ / 3 for each cell,
    fold, class or target, and Newton step, about 5 to 10 steps; its outputs are accurate to 1e-10
    for a ridge of 1e-4 or more.

    Source: docs/metrics.md, "Linear decodability"; Golub, Heath & Wahba 1979, Technometrics 21, for
    "gcv"; Rasmussen & Williams 2006, *Gaussian Processes for Machine Learning*, algorithm 3.1, for
    "logistic".

    Examples
    --------
    >>> import numpy as np
    >>> import repsim_kernels as rk
    >>> rng = np.random.default_rng(0)
    >>> labels = np.arange(60) % 3
    >>> x = rng.standard_normal((60, 20))
    >>> x[:, :10] += 2 * np.eye(3)[labels] @ rng.standard_normal((3, 10))
    >>> cells = np.repeat([0, 1], 10)  # the classes differ in the neurons of cell 0 only
    >>> scores = rk.ablation_decodability(x, cells, labels)
    >>> round(scores["intact"], 2), scores["refit"].round(2), scores["frozen"].round(2)
    (1.0, array([0.38, 1.  ]), array([0.33, 1.  ]))
    """
    probe = _options.check_choice(probe, "probe", ("ridge", "logistic"))
    ridge = _check_ridge(ridge, probe)
    names = _check_scores(score, target, probe)
    x, source = _check.check_representation(x, batched=batched)
    checked, n_cells = _check_cells.check_cells(cells, x.shape[-1], allow_partitions=True)
    labels, targets = _check_targets(target, labels, x.shape[-2])
    partitioned = are_partitions(checked)
    if partitioned and isinstance(targets, tuple) and len(targets) != len(checked):
        raise LabelError(
            f"target: {len(targets)} targets for {len(checked)} partitions; expected one for each"
        )
    result = _dispatch.call(
        "ablation_decodability",
        backend,
        source,
        x,
        cells=checked,
        n_cells=n_cells,
        labels=labels,
        target=targets,
        ridge=ridge,
        folds=_check_folds(folds, labels, probe),
        score=names,
        probe=probe,
        memory=_options.check_memory(memory),
        grams=check_grams(grams, x, source, checked, n_cells),
        precision=_options.check_precision(precision),
    )
    if x.ndim == 2:
        if ridge == "gcv":
            result["ridge"] = float(result["ridge"])
        if not (partitioned or isinstance(targets, tuple)):
            for name in names:
                result[name]["intact"] = float(result[name]["intact"])
    if score is None or isinstance(score, str):
        result |= result.pop(names[0])
    return result


def _check_ridge(ridge: Any, probe: str) -> float | str:
    """Check the relative ridge of a probe."""
    ridge = _options.check_ridge_or_gcv(ridge)
    if ridge == "gcv" and probe == "logistic":
        raise OptionError(
            "ridge: 'gcv' with probe='logistic'; expected a number, or probe='ridge', since "
            "generalised cross-validation is defined for least squares"
        )
    return ridge


def _check_scores(score: Any, target: Any, probe: str) -> tuple[str, ...]:
    """Check the names of scores; None gives the default."""
    if score is None:
        return ("accuracy" if target is None else "balanced_accuracy",)
    scores = (score,) if isinstance(score, str) else _options.to_tuple(score)
    names = tuple(_options.check_choice(name, "score", SCORES) for name in scores or ())
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


def _check_targets(target: Any, labels: Any, n: int) -> tuple[Any, int | tuple[int, ...] | None]:
    """Check labels (n,) and the target or targets; return both."""
    if _arrays.detect_library(target):
        target = _arrays.to_numpy(_arrays.convert(target, "target")[0])
    if target is None:
        return _check.check_labels(labels, n), None
    classes = None if isinstance(target, str) else _options.to_tuple(target)
    if classes is None:
        return _check.check_labels(labels, n, target), int(target)
    labels = _check.check_labels(labels, n)
    for label in classes:
        _check.check_labels(labels, n, label)
    targets = tuple(int(label) for label in classes)
    if not targets or len(set(targets)) < len(targets):
        raise LabelError(
            f"target: {_options.short_repr(target)}; expected a label or a sequence of different "
            "labels"
        )
    return labels, targets


def _check_folds(folds: Any, labels: Any, probe: str) -> np.ndarray[Any, Any] | None:
    """Return the fold of each stimulus, from 0 on and none empty; None to hold out each alone."""
    if folds is None:
        if probe == "logistic":
            raise OptionError(
                "folds: None with probe='logistic'; expected a number of folds or a fold for each "
                "stimulus, since leave-one-out has no closed form for it"
            )
        return None
    if isinstance(folds, (int, np.integer)) and not isinstance(folds, bool):
        _, classes, counts = np.unique(labels, return_inverse=True, return_counts=True)
        if not 2 <= folds <= counts.max():
            raise OptionError(
                f"folds: {_options.short_repr(folds)}; expected 2 or more, and at most "
                f"{counts.max()}, the size of the largest class"
            )
        fold = np.empty_like(labels)
        for k, count in enumerate(counts):
            fold[classes == k] = np.arange(count) % folds
        return fold
    # A string gets the error below, which mentions a number of folds, not that of `convert`.
    is_text = isinstance(folds, str)
    values = np.asarray(folds) if is_text else _arrays.to_numpy(_arrays.convert(folds, "folds")[0])
    if values.dtype.kind not in "iu" or values.shape != labels.shape:
        raise OptionError(
            f"folds: {_options.short_repr(folds)}; expected a whole number of at least 2, or "
            f"integers ({len(labels)},), a fold for each stimulus"
        )
    present, fold = np.unique(values, return_inverse=True)
    if len(present) < 2:
        raise OptionError(f"folds: only fold {present[0]}; expected at least two folds")
    return fold.astype(np.int64)
