"""`compare(…, calibrate=…)`: its threshold is that of `calibrate`, however the map is computed."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from _small_network import Returns
from torch import nn

import repsim_kernels as rk

N = 23
RNG = np.random.default_rng(0)
SHARED = RNG.standard_normal((N, 6))
A = {f"a{i}": SHARED @ RNG.standard_normal((6, 9)) for i in range(2)} | {
    "noise": RNG.standard_normal((N, 12))
}
B = {"b": SHARED[:, :4] + 0.3 * RNG.standard_normal((N, 4)), "c": RNG.standard_normal((N, 30))}
METRICS = {
    "cka_debiased": {},
    "cka": {"kernel": "rbf"},
    "rsa": {},
    "cca": {"squared": True, "ridge": 0.1},
    "procrustes": {},
    "mutual_knn": {"k": 5},
}


def make_network(seed, width):
    """Make six convolutions, whose outputs are larger than their Grams."""
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, width, 3, padding=1)]
    for _ in range(5):
        layers += [nn.Tanh(), nn.Conv2d(width, width, 3, padding=1)]
    return nn.Sequential(*layers).double()


NETWORKS = make_network(0, 4), make_network(1, 5)
IMAGES = torch.randn(N, 3, 16, 16, generator=torch.Generator().manual_seed(2)).double()


def compare(*arguments, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rk.DegenerateWarning)
        return rk.compare(*arguments, **options)


def find_threshold(xs, ys=None, **options):
    ys = ys and list(ys.values())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rk.DegenerateWarning)
        return float(rk.calibrate(list(xs.values()), ys, aggregate="max", **options).threshold)


@pytest.mark.parametrize("itself", [False, True])
@pytest.mark.parametrize("metric", METRICS)
def test_threshold_is_that_of_the_largest_value(metric, itself):
    other = None if itself else B
    m = compare(A, other, metric=metric, calibrate=50, **METRICS[metric])
    want = find_threshold(A, other, metric=metric, permutations=50, **METRICS[metric])
    assert m.threshold == pytest.approx(want, abs=1e-12)
    assert m.options["calibrate"] == {"permutations": 50, "alpha": 0.05, "seed": 0}
    plain = compare(A, other, metric=metric, **METRICS[metric])
    assert plain.threshold is None
    np.testing.assert_array_equal(m.values, plain.values)
    assert {("a0", "b"), ("a1", "b"), ("a0", "a1")} & {
        (m.rows[i], m.columns[j]) for i, j in np.argwhere(m.is_above_threshold & (m.values < 1))
    }


def test_options_are_those_of_calibrate():
    indices = np.random.default_rng(3).permuted(np.tile(np.arange(N), (30, 1)), axis=1)
    for options, recorded in (
        ({"permutations": 40, "alpha": 0.2, "seed": 7}, {}),
        (
            {"strata": ["one"] * 10 + ["two"] * (N - 10)},
            {"permutations": 200, "alpha": 0.05, "seed": 0, "strata": True},
        ),
        ({"indices": indices}, {"permutations": 30, "alpha": 0.05, "indices": True}),
    ):
        m = compare(A, B, calibrate=options)
        assert m.threshold == pytest.approx(find_threshold(A, B, metric="cka_debiased", **options))
        assert m.options["calibrate"] == (recorded or options)


def test_each_metric_has_a_threshold_of_its_own():
    maps = compare(A, B, metric=["cka_debiased", "rsa"], calibrate=50)
    for metric, m in maps.items():
        assert m.threshold == pytest.approx(find_threshold(A, B, metric=metric, permutations=50))
    assert maps["rsa"].threshold != maps["cka_debiased"].threshold


@pytest.mark.parametrize("metric", ["cka_debiased", "cka", "rsa"])
@pytest.mark.parametrize("memory", ["1GiB", 800_000, 300_000])
@pytest.mark.parametrize("itself", [False, True])
def test_features_grams_and_files_give_the_same_threshold(metric, memory, itself, capsys):
    other = None if itself else NETWORKS[1]
    options = {"metric": metric} | ({} if metric == "rsa" else {"precision": "float64"})
    m = compare(
        NETWORKS[0], other, IMAGES.split(5), layers="conv", memory=memory, calibrate=60, **options
    )
    sides = [rk.extract(network, [IMAGES], "conv") for network in NETWORKS]
    want = find_threshold(sides[0], None if itself else sides[1], permutations=60, **options)
    assert m.threshold == pytest.approx(want, abs=1e-9)
    printed = capsys.readouterr().err
    assert ("features are written" in printed) == (metric == "rsa" and memory != "1GiB")
    assert "passes of" in printed or metric == "rsa" or memory != 300_000


def test_layers_without_a_value_are_left_out():
    bad = A | {"constant": np.ones((N, 3)), "nan": np.full((N, 2), np.nan)}
    with pytest.warns(UserWarning, match="no value for layers 'constant', 'nan'"):
        m = rk.compare(bad, B, calibrate=50)
    assert m.threshold == compare(A, B, calibrate=50).threshold
    assert not m.is_above_threshold[3:].any()


def test_layers_of_grams_without_a_value_are_left_out():
    network = nn.Sequential(NETWORKS[0], nn.Hardtanh(7.0, 8.0))  # constant
    sides = network, NETWORKS[1]
    with pytest.warns(UserWarning, match="no value for layers '1'"):
        m = rk.compare(
            *sides, IMAGES.split(5), layers=["0.0", "0.4", "1"], layers_b="conv", memory=400_000,
            calibrate=50, precision="float64",
        )  # fmt: skip
    left = rk.extract(network, [IMAGES], ["0.0", "0.4"])
    right = rk.extract(NETWORKS[1], [IMAGES], "conv")
    want = find_threshold(left, right, metric="cka_debiased", permutations=50)
    assert m.threshold == pytest.approx(want, abs=1e-9)


def test_one_layer_with_itself_has_no_threshold():
    assert rk.compare({"a": A["a0"]}, calibrate=50).threshold is None


def test_nothing_is_above_chance_where_every_permutation_scores_the_same():
    groups = {"a": np.repeat([[0.0], [1.0]], 2, axis=0)}  # 4 stimuli, 3 different pairings
    m = compare(groups, {"b": groups["a"] + 1}, metric="cka", calibrate=200)
    assert m.values[0, 0] == pytest.approx(1)
    assert not m.is_above_threshold.any()


def raise_error(_):
    raise AssertionError("the network was run")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"metric": "pwcca", "calibrate": 50}, "metric: 'pwcca' has no cheap null"),
        ({"metric": ["cka", "cca"], "calibrate": 50}, "metric: 'cca' with squared=False"),
        ({"metric": "procrustes_distance", "calibrate": 50}, "metric: 'procrustes_distance'"),
        ({"calibrate": 0}, "calibrate: 0; expected a whole number of at least 1"),
        ({"calibrate": "200"}, "calibrate: '200'; expected a whole number"),
        ({"calibrate": {"level": 0.1}}, "calibrate: unknown option 'level'; expected one of perm"),
        ({"calibrate": {"alpha": 1.0}}, "alpha: 1"),
        ({"calibrate": {"seed": -1}}, "seed: -1; expected a whole number of at least 0"),
        ({"calibrate": 50, "estimator": "minibatch"}, "calibrate: given with estimator 'minib"),
    ],
)
def test_wrong_options_are_refused_before_a_network_runs(options, match):
    with pytest.raises(rk.OptionError, match=f"^{match}"):
        rk.compare(Returns(raise_error), None, [IMAGES], **options)


@pytest.mark.parametrize(("n", "per_pair"), [(23, 28), (400, 12)], ids=["Grams", "features"])
def test_too_little_memory_is_refused_with_what_is_needed(n, per_pair):
    # Features of 23 stimuli do not fit, but their Grams do; those of 400 small images fit.
    images = IMAGES if n == N else torch.randn(n, 3, 2, 2).double()
    memory = 80_000 if n == N else 10_000_000
    size = f"{per_pair * 6 * n * n / 2**20:.3g} MiB"
    with pytest.raises(rk.OptionError, match=f"^memory: .* calibrate needs {size} for matrices"):
        compare(*NETWORKS, images.split(5), layers="conv", memory=memory, calibrate=50)
    # Neighbours need no matrices.
    options = {"metric": "mutual_knn", "k": 3, "calibrate": 50}
    m = compare(*NETWORKS, images.split(5), layers="conv", memory=memory, **options)
    assert m.threshold is not None
