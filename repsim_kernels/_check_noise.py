"""Checks of the noise by which distances between patterns are normalised."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from repsim_kernels import _arrays, _check, _options
from repsim_kernels._arrays import Source
from repsim_kernels._check_conditions import check_names
from repsim_kernels._check_matrices import MAX_ASYMMETRY, MAX_GRAM
from repsim_kernels._noise import Noise
from repsim_kernels.errors import (
    ConstantError,
    DegenerateWarning,
    DtypeError,
    OptionError,
    ShapeError,
)

_EXPECTED = (
    "a covariance (p, p), residuals (m, p), or labels (n,) of the conditions within which "
    "residuals are computed from x"
)


def check_noise(
    noise: Any,
    shrinkage: Any,
    x: Tensor,
    distance: str,
    groups: NDArray[np.float64] | None,
    source: Source,
) -> Noise | None:
    """Check the noise of the neurons of x (n, p), and how its covariance is shrunk.

    ``groups`` are those of `check_conditions`, and ``source`` is that of x. None if patterns are
    not whitened.
    """
    if shrinkage is not None:
        shrinkage = _options.check_choice(shrinkage, "shrinkage", ("ledoit-wolf", "diagonal"))
    if distance not in ("mahalanobis", "crossnobis"):
        for name, value in (("noise", noise), ("shrinkage", shrinkage)):
            if value is not None:
                raise OptionError(
                    f"{name}: given with distance={distance!r}; expected None, or "
                    "distance='mahalanobis' or 'crossnobis'"
                )
        return None
    if noise is None:
        if shrinkage is not None:
            raise OptionError(
                f"shrinkage: {shrinkage!r} without noise; expected noise= as well: {_EXPECTED}"
            )
        if distance == "mahalanobis":
            raise OptionError(f"noise: None with distance='mahalanobis'; expected {_EXPECTED}")
        return None
    if _is_one_dimensional(noise):
        if hasattr(noise, "dtype") and "float" in _arrays.dtype_name(noise):
            raise DtypeError(
                f"noise: {len(noise)} values of dtype {_arrays.dtype_name(noise)}; expected "
                f"{_EXPECTED}; for variances pass numpy.diag(variances)"
            )
        residuals, scale = _subtract_conditions(x, noise, groups)
        return _make_noise(residuals, scale, shrinkage)
    values, noise_source = _arrays.convert(noise, "noise")
    _check.check_same_source(source, noise_source, "x", "noise")
    p = x.shape[1]
    fewest = min(p, 2)  # two residuals, or the covariance of a single neuron
    if values.ndim != 2 or values.shape[1] != p or len(values) < fewest:
        raise ShapeError(
            f"noise: shape {tuple(values.shape)}, but x has {p} neurons; expected {_EXPECTED}"
        )
    values = values.double()
    is_covariance = len(values) == p and _is_symmetric(values)
    _check.check_finite(values, "noise", MAX_GRAM if is_covariance else _check.MAX_MAGNITUDE)
    if is_covariance:
        return _check_covariance((values + values.mT) / 2, shrinkage)
    if len(values) == p and _is_symmetric(values, 0.1):
        raise ShapeError(
            f"noise: ({p}, {p}) and nearly symmetric; expected a covariance that is symmetric up "
            f"to {MAX_ASYMMETRY:g} of its largest entry, or residuals that are not"
        )
    values = values - values[:1]  # what is left of a constant neuron is exactly zero
    return _make_noise(values - values.mean(0), 1.0, shrinkage)


def _is_one_dimensional(noise: Any) -> bool:
    """Whether noise holds labels: one dimension, or a list of strings."""
    if hasattr(noise, "ndim"):
        return bool(noise.ndim == 1)
    return isinstance(noise, (list, tuple)) and _arrays.count_dimensions(noise) == 1


def _is_symmetric(a: Tensor, limit: float = MAX_ASYMMETRY) -> bool:
    """Whether a square matrix equals its transpose up to a share of its largest entry.

    By default that of rounded float32 products. False if any value is not finite.
    """
    return bool((a - a.mT).abs().amax() <= a.abs().amax() * limit)


def _subtract_conditions(
    x: Tensor, labels: Any, groups: NDArray[np.float64] | None
) -> tuple[Tensor, float]:
    """Return the residuals of x (n, p) within conditions, and n over their degrees of freedom."""
    n = len(x)
    names, index = check_names(labels, "noise", n)
    if groups is not None and len(groups) > 1:
        _warn_if_shared(index, groups)
    if len(names) == n:
        raise OptionError(
            f"noise: {n} conditions of one row each, which leave no residuals; expected several "
            "rows of some conditions, or another form of noise"
        )
    weights = np.zeros((len(names), n))
    weights[index, np.arange(n)] = 1 / np.bincount(index)[index]
    first = np.unique(index, return_index=True)[1]
    rows, first_rows, means = (
        torch.as_tensor(a, device=x.device) for a in (index, first[index], weights)
    )
    values = x.double()
    values = values - values[first_rows]  # what is left of a constant neuron is exactly zero
    return values - (means @ values)[rows], n / (n - len(names))


def _warn_if_shared(index: NDArray[np.int64], groups: NDArray[np.float64]) -> None:
    """Warn if a group of rows whose residuals are noise, ``index`` (n,), is in several folds."""
    fold = groups.any(1).argmax(0)
    if len(np.unique(index * len(groups) + fold)) > index.max() + 1:
        warnings.warn(
            "noise: residuals within conditions contain the differences between folds, which makes "
            "crossnobis distances too large; pass labels that also differ between folds, or "
            "residuals (m, p) that do not contain them, such as those of a GLM within each run",
            DegenerateWarning,
            stacklevel=_options.find_stacklevel(),
        )


def _make_noise(residuals: Tensor, scale: float, shrinkage: str | None) -> Noise:
    """Return noise with centred residuals (m, p), or with their variances for "diagonal"."""
    variances = residuals.square().mean(0) * scale
    if shrinkage == "diagonal":
        _check_variances(variances)
        return Noise(variances=variances)
    if not bool(variances.any()):
        raise ConstantError("noise: no neuron varies within it; expected residuals that vary")
    # Neuron-major, since `Noise.select` gathers neurons.
    return Noise(residuals=residuals.mT.contiguous().mT, scale=scale)


def _check_covariance(covariance: Tensor, shrinkage: str | None) -> Noise:
    """Return noise with a symmetric covariance, or its diagonal."""
    if shrinkage == "ledoit-wolf":
        raise OptionError(
            "shrinkage: 'ledoit-wolf' with a covariance; expected residuals or labels as noise, "
            "or shrinkage=None or 'diagonal'"
        )
    _check_variances(covariance.diagonal())
    if shrinkage == "diagonal":
        return Noise(variances=covariance.diagonal())
    return Noise(covariance=covariance)


def _check_variances(variances: Tensor) -> None:
    """Check that every neuron has a positive variance (p,)."""
    wrong = ~(variances > 0)
    if bool(wrong.any()):
        first = int(wrong.byte().argmax())
        raise ConstantError(
            f"noise: neuron {first} has variance {float(variances[first]):g}, one of "
            f"{int(wrong.sum())} such neurons; expected positive variances: leave these out of x"
        )
