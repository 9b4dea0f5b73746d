"""Noise ceilings: definitions, simulated noise with known answers, and rsatoolbox."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist

import repsim_kernels as rk
from repsim_kernels.errors import ConstantError, OptionError, ShapeError
from repsim_kernels.ops.ceiling import _choose_halves
from repsim_kernels.reference.cka import u_centre
from repsim_kernels.reference.gram import centered_gram

RNG = np.random.default_rng(0)
SIGNAL = RNG.standard_normal((20, 5))
SUBJECTS = [SIGNAL @ RNG.standard_normal((5, p)) + RNG.standard_normal((20, p)) for p in (4, 9, 6)]
REPEATS = SIGNAL + RNG.standard_normal((5, 20, 5))
EACH_BACKEND = pytest.mark.parametrize("backend", ["torch", "reference"])


def make_unit_vectors(subjects, options):
    """Return what is compared, by definition: a unit vector for each subject."""
    options = {"metric": "cka", "debiased": True, "compare": "pearson"} | options
    if options["metric"] == "rsa":
        vectors = np.array([pdist(x) for x in subjects])
        if options["compare"] == "pearson":
            vectors -= vectors.mean(1, keepdims=True)
    else:
        grams = [centered_gram(x) for x in subjects]
        grams = [u_centre(k) for k in grams] if options["debiased"] else grams
        vectors = np.array([k.ravel() for k in grams])
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def compare(u, v):
    return u @ v / np.linalg.norm(u) / np.linalg.norm(v)


OPTIONS = (
    {},
    {"debiased": False},
    {"metric": "rsa", "compare": "pearson"},
    {"metric": "rsa", "compare": "cosine"},
)


@EACH_BACKEND
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("subjects", [SUBJECTS, list(REPEATS), SUBJECTS[:2]], ids=len)
def test_subjects_are_compared_with_averages(options, subjects, backend):
    unit = make_unit_vectors(subjects, options)
    r = len(unit)
    lower = np.mean([compare(u, np.delete(unit, s, 0).mean(0)) for s, u in enumerate(unit)])
    upper = np.mean([compare(u, unit.mean(0)) for u in unit])
    halves = [
        (list(a), [s for s in range(r) if s not in a])
        for a in itertools.combinations(range(r), r // 2)
    ]
    split = np.mean([compare(unit[a].mean(0), unit[b].mean(0)) for a, b in halves])
    result = rk.ceiling(subjects, backend=backend, **options)
    np.testing.assert_allclose(result, (lower, upper, split), rtol=1e-9)
    corrected = rk.ceiling(subjects, backend=backend, spearman_brown=True, **options)
    if r == 2:  # one split: the formula, of its mean
        assert corrected.split_half == pytest.approx(2 * split / (1 + split))
    assert corrected[:2] == pytest.approx(result[:2])


@EACH_BACKEND
@pytest.mark.parametrize("options", [*OPTIONS, {"metric": "rsa"}], ids=str)
def test_repeats_are_averaged_in_each_half(options, backend):
    """Activations are, while the bounds are those of a list."""
    result = rk.ceiling(REPEATS, backend=backend, **options)
    values = []
    for a in itertools.combinations(range(5), 2):
        b = [s for s in range(5) if s not in a]
        own = {"metric": "cka"} | options
        own |= {"debiased": options.get("debiased", True)} if own["metric"] == "cka" else {}
        pair = REPEATS[list(a)].mean(0), REPEATS[b].mean(0)
        values.append(rk.pairwise([pair[0]], [pair[1]], **own)[0, 0])
    assert result.split_half == pytest.approx(np.mean(values), rel=1e-9)
    as_list = rk.ceiling(list(REPEATS), backend=backend, **options)
    assert result[:2] == pytest.approx(as_list[:2])
    assert result.split_half != pytest.approx(as_list.split_half)


def test_simulated_noise_has_the_ceiling_of_its_variance():
    """In the limit of many stimuli every similarity follows from the covariances."""
    rng, n, r, noise = np.random.default_rng(5), 3000, 6, 1.0
    spectrum = 1 / np.arange(1, 9)
    signal = rng.standard_normal((n, 8)) * np.sqrt(spectrum)
    repeats = signal + math.sqrt(noise) * rng.standard_normal((r, n, 8))

    def correlate(noise_of_average):
        """Return debiased CKA of two averages of repeats."""
        return np.sum(spectrum**2) / np.sum((spectrum + noise_of_average) ** 2)

    one = correlate(noise)
    lower = (r - 1) * one / math.sqrt((r - 1) * (1 + (r - 2) * one))
    upper = (1 + (r - 1) * one) / math.sqrt(r * (1 + (r - 1) * one))
    result = rk.ceiling(repeats)
    np.testing.assert_allclose(result, (lower, upper, correlate(noise / 3)), atol=0.015)
    score = np.mean([rk.cka(x, signal, debiased=True) for x in repeats])
    assert score == pytest.approx(math.sqrt(one), abs=0.01)
    assert result.lower < score < result.upper
    # Spearman-Brown is exact for averages of Gram matrices.
    corrected = rk.ceiling(list(repeats), spearman_brown=True).split_half
    assert corrected == pytest.approx(r * one / (1 + (r - 1) * one), abs=0.01)


def test_no_model_scores_more_than_the_upper_bound():
    rng = np.random.default_rng(2)
    for options in ({"debiased": True}, {"metric": "rsa"}):
        upper = rk.ceiling(SUBJECTS, **options).upper
        metric = "cka" if "metric" not in options else "rsa"
        own = {"debiased": True} if metric == "cka" else {}
        for model in (*SUBJECTS, SIGNAL, *(rng.standard_normal((30, 20, 3)))):
            assert rk.pairwise([model], SUBJECTS, metric=metric, **own).mean() <= upper + 1e-12


@pytest.mark.parametrize(
    ("method", "options", "tolerance"),
    [
        ("corr", {"compare": "pearson"}, 1e-12),
        ("cosine", {"compare": "cosine"}, 1e-12),
        ("spearman", {}, 0.01),  # rsatoolbox ranks the average of ranks again
    ],
)
def test_bounds_are_those_of_rsatoolbox(method, options, tolerance):
    rdm = pytest.importorskip("rsatoolbox.rdm")
    noise_ceiling = pytest.importorskip("rsatoolbox.inference.noise_ceiling")
    rdms = rdm.RDMs(np.array([pdist(x) for x in SUBJECTS]))
    want = noise_ceiling.boot_noise_ceiling(rdms, method)
    result = rk.ceiling(SUBJECTS, metric="rsa", **options)
    assert result[:2] == pytest.approx(want, abs=tolerance)


def test_halves_are_complementary_and_different():
    for r in range(2, 9):
        halves = _choose_halves(r, 0)
        assert len(halves) == math.comb(r, r // 2) // (1 if r % 2 else 2)
        assert len({frozenset(map(frozenset, pair)) for pair in halves}) == len(halves)
        for a, b in halves:
            assert sorted([*a, *b]) == list(range(r))
            assert len(b) - len(a) == r % 2
    drawn = _choose_halves(20, 3)
    assert len(drawn) == 100
    assert drawn == _choose_halves(20, 3) != _choose_halves(20, 4)


def test_kinds_of_arrays():
    want = rk.ceiling(REPEATS)
    result = rk.ceiling(torch.from_numpy(REPEATS))
    assert all(isinstance(value, torch.Tensor) for value in result)
    assert [float(v) for v in result] == pytest.approx(want)
    assert rk.ceiling(REPEATS.astype(np.float32)) == pytest.approx(want, abs=1e-6)
    grams = [x @ x.T for x in REPEATS]
    for repeats in (grams, np.array(grams)):  # matrices are averaged, not activations
        precomputed = rk.ceiling(repeats, kernel="precomputed")
        assert precomputed == pytest.approx(rk.ceiling(list(REPEATS)))


@EACH_BACKEND
def test_opposite_repeats_have_no_average(backend):
    """Two U-centred Grams of four stimuli can be opposite, and their average is then zero."""
    x = np.array([[1.0, 0], [1, 0], [-1, 0], [-1, 0]])
    k, m = (u_centre(g) for g in (x @ x.T, -(x @ x.T)))
    with pytest.raises(ConstantError, match="repeats: their average is zero"):
        rk.ceiling([k, m], kernel="precomputed", backend=backend)


ERRORS = [
    ([SIGNAL], {}, ShapeError, "repeats: one; expected at least two"),
    (SIGNAL, {}, ShapeError, r"repeats: an array .*; expected a list .*, or .* array \(r, n, p\)"),
    ([SIGNAL, SIGNAL[:9]], {}, ShapeError, r"repeats\[1\]: 9 stimuli"),
    ([SIGNAL, SIGNAL * 0], {}, ConstantError, r"repeats\[1\]: the representation is the same"),
    ([SIGNAL, np.eye(20)], {}, ConstantError, "repeats: its kernel matrix is zero after centring"),
    (REPEATS, {"metric": "procrustes"}, OptionError, "metric: 'procrustes'; expected one of 'cka'"),
    (REPEATS, {"metric": "rsa", "debiased": False}, OptionError, "debiased: False with metric"),
    (REPEATS, {"spearman_brown": 1}, OptionError, "spearman_brown: 1; expected True or False"),
    (REPEATS, {"seed": 0.5}, OptionError, "seed: 0.5; expected a whole number"),
    (REPEATS, {"folds": 2}, OptionError, "folds: not an option of metric 'cka'"),
]


@pytest.mark.parametrize(
    ("repeats", "options", "error", "match"), ERRORS, ids=[e[3] for e in ERRORS]
)
def test_errors_name_the_argument(repeats, options, error, match):
    with pytest.raises(error, match=match) as caught:
        rk.ceiling(repeats, **options)
    assert len(str(caught.value).splitlines()) == 1
