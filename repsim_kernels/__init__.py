"""Metric kernels for comparing neural representations, and for ablations of a representation.

Public names are loaded at first use, so that importing this package imports no framework.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from repsim_kernels._operations import OPERATIONS

__version__ = "0.4.0"

_ERRORS = (
    "RepsimError",
    "ShapeError",
    "DtypeError",
    "NonFiniteError",
    "ConstantError",
    "CellError",
    "LabelError",
    "OptionError",
    "DeviceError",
    "LayerError",
    "ConvergenceError",
    "BackendUnavailable",
    "GradientError",
)
_MODULES = {
    **{op.name: f"repsim_kernels.ops.{op.family}" for op in OPERATIONS},
    **{name: "repsim_kernels.errors" for name in _ERRORS},
    "show_config": "repsim_kernels._dispatch",
    "DegenerateWarning": "repsim_kernels.errors",
    "OutOfMemoryWarning": "repsim_kernels.errors",
    **{name: f"repsim_kernels.comparison.{name}" for name in ("compare", "extract")},
    "MinibatchCKA": "repsim_kernels.comparison.minibatch",
    "SimilarityMap": "repsim_kernels.comparison.similarity_map",
    "Calibrated": "repsim_kernels.ops.calibration",
    "Ceiling": "repsim_kernels.ops.ceiling",
    "Interval": "repsim_kernels.ops.interval",
    "spheres": "repsim_kernels.ops.searchlight",
}

_SUBMODULES = ("cells", "forward")  # public, and like names loaded at first use

__all__ = sorted(_MODULES)

if TYPE_CHECKING:
    from repsim_kernels import cells as cells
    from repsim_kernels import forward as forward
    from repsim_kernels._dispatch import show_config as show_config
    from repsim_kernels.comparison.compare import compare as compare
    from repsim_kernels.comparison.extract import extract as extract
    from repsim_kernels.comparison.minibatch import MinibatchCKA as MinibatchCKA
    from repsim_kernels.comparison.similarity_map import SimilarityMap as SimilarityMap
    from repsim_kernels.errors import *  # noqa: F403
    from repsim_kernels.ops.ablation import ablation_distances as ablation_distances
    from repsim_kernels.ops.calibration import Calibrated as Calibrated
    from repsim_kernels.ops.calibration import calibrate as calibrate
    from repsim_kernels.ops.cca import cca as cca
    from repsim_kernels.ops.cca import pwcca as pwcca
    from repsim_kernels.ops.cca import svcca as svcca
    from repsim_kernels.ops.ceiling import Ceiling as Ceiling
    from repsim_kernels.ops.ceiling import ceiling as ceiling
    from repsim_kernels.ops.cells import class_means as class_means
    from repsim_kernels.ops.cells import selectivity_grid as selectivity_grid
    from repsim_kernels.ops.cka import cka as cka
    from repsim_kernels.ops.gram import cell_grams as cell_grams
    from repsim_kernels.ops.gram import centered_gram as centered_gram
    from repsim_kernels.ops.interval import Interval as Interval
    from repsim_kernels.ops.interval import interval as interval
    from repsim_kernels.ops.logistic import logistic_fits as logistic_fits
    from repsim_kernels.ops.neighbours import cknna as cknna
    from repsim_kernels.ops.neighbours import jaccard_knn as jaccard_knn
    from repsim_kernels.ops.neighbours import mutual_knn as mutual_knn
    from repsim_kernels.ops.pairwise import pairwise as pairwise
    from repsim_kernels.ops.predictivity import linear_predictivity as linear_predictivity
    from repsim_kernels.ops.probe import ablation_decodability as ablation_decodability
    from repsim_kernels.ops.probe_paper import probe_paper as probe_paper
    from repsim_kernels.ops.procrustes import procrustes as procrustes
    from repsim_kernels.ops.procrustes import procrustes_distance as procrustes_distance
    from repsim_kernels.ops.rdm import rdm as rdm
    from repsim_kernels.ops.rdm_comparison import compare_rdms as compare_rdms
    from repsim_kernels.ops.rsa import rsa as rsa
    from repsim_kernels.ops.searchlight import searchlight as searchlight
    from repsim_kernels.ops.searchlight import spheres as spheres
    from repsim_kernels.ops.similarities import similarities as similarities
    from repsim_kernels.ops.spectral import eigh as eigh
    from repsim_kernels.ops.spectral import gram_ablation_distances as gram_ablation_distances
    from repsim_kernels.ops.spectral import svd as svd


def __getattr__(name: str) -> Any:
    """Import a public name at its first use (PEP 562)."""
    if name in _SUBMODULES:
        return importlib.import_module(f"repsim_kernels.{name}")
    try:
        module = _MODULES[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, *_SUBMODULES]
