"""The accuracy benchmark: its oracle, its judgement of bad packages, and this package's bounds."""

from __future__ import annotations

import json

import _oracle
import numpy as np
import pytest
import torch
from _draw import SEEDS
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from bench import accuracy
from bench.__main__ import app
from bench.accuracy_figure import STYLES
from bench.common import longdouble
from bench.common.tolerances import DISTANCE, SAME, Tol, assert_close
from bench.peers.packages import PACKAGES, Package

SIMILARITIES = ("cka", "cka_debiased", "procrustes")


@settings(max_examples=10)
@given(st.integers(4, 7), st.integers(8, 30), st.sampled_from([0, 10, 1e4]), SEEDS)
def test_the_oracle_matches_60_digit_arithmetic(n, p, mean, seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, p)) + mean
    y = x + rng.standard_normal((n, p)) - 2 * mean
    got = longdouble.compute_similarities(x, y)
    for name in SIMILARITIES:
        assert_close(got[name], float(getattr(_oracle, name)(x, y)), Tol(1e-14, 1e-14))


@settings(max_examples=10)
@given(st.integers(4, 7), st.sampled_from([0, 10]), SEEDS)
def test_the_oracle_keeps_the_digits_of_small_distances(n, mean, seed):
    rng = np.random.default_rng(seed)
    cells = np.arange(24) % 3
    x = rng.standard_normal((n, 24)) * np.array([1, 1e-1, 1e-2])[cells] + mean
    got = longdouble.compute_distances(x, cells)
    for c in range(3):
        y = np.where(cells == c, 0, x)
        for name in SIMILARITIES:
            want = (2 if name == "procrustes" else 1) * (1 - getattr(_oracle, name)(x, y))
            assert_close(got[name][c], float(want), Tol(1e-9, 1e-17))


def test_the_oracle_has_the_reference_values():
    rng = np.random.RandomState(1337)
    x = rng.randn(100, 10)
    got = longdouble.compute_similarities(x, rng.randn(100, 10) + x)
    want = {"cka": 0.55761, "cka_debiased": 0.51346, "procrustes": 0.73626}
    for name, value in want.items():
        assert_close(got[name], value, Tol(0, 5e-6))


def test_the_oracle_of_rsa_matches_scipy():
    from scipy.spatial.distance import pdist

    x, y = np.random.default_rng(0).standard_normal((2, 12, 30))
    y += x
    want = np.corrcoef(pdist(x, "sqeuclidean"), pdist(y, "sqeuclidean"))[0, 1]
    assert_close(longdouble.compute_similarities(x, y)["rsa"], want, SAME)


def make_fake(name, pair, metric="cka"):
    return Package(name, "", "torch", metric, False, "", pair)


def uncentred(x, y):
    """Compute Grams in the features' dtype and centre them afterwards, which loses digits."""
    k, m = (z @ z.T for z in (x, y))
    k, m = (g - g.mean(0) - g.mean(1, keepdim=True) + g.mean() for g in (k, m))
    return (k * m).sum() / (k.norm() * m.norm())


def refusing(x, y):
    if x.dtype == torch.bfloat16:
        raise TypeError("no bfloat16\nhere")
    return uncentred(x.double(), y.double())


FAKES = (
    make_fake("uncentred", uncentred),
    make_fake("refusing", refusing),
    make_fake("nan", lambda x, y: float("nan")),
    make_fake("backwards", lambda x, y: -uncentred(x.double(), y.double())),
    Package("missing", "no-such-distribution", "numpy", "cka", True, "", uncentred),
)
OURS = tuple(p for p in PACKAGES if p.name == accuracy.OURS)


@pytest.fixture(scope="module")
def record():
    return accuracy.measure_accuracy(quick=True, packages=(*OURS, *FAKES))


def select_points(record, name, **facts):
    points = [p for p in record["points"] if p["package"] == name]
    return [p for p in points if all(p[key] == value for key, value in facts.items())]


def select_point(record, name, vary, value):
    (point,) = select_points(record, name, vary=vary, value=value)
    return point


def select_orders(record, name, metric="cka"):
    return [o for o in record["order"] if (o["package"], o["metric"]) == (name, metric)]


def test_this_package_reaches_float64_accuracy_for_any_input(record):
    """Features are centred, and Grams summed, in float64."""
    for metric in accuracy.METRICS:
        name = accuracy.OURS + (", float64" if "cka" in metric else "")
        points = select_points(record, name, metric=metric)
        assert len(points) == sum(map(len, accuracy.QUICK.values()))
        for p in points:
            assert p["status"] == "ok", p
            assert p["worst"] <= SAME.relative, p


@pytest.mark.parametrize("metric", ["cka", "cka_debiased"])
def test_float32_products_keep_their_bound(record, metric):
    for p in select_points(record, accuracy.OURS, metric=metric):
        assert p["status"] == "ok", p
        assert p["worst"] <= 1e-6, p
    ours = select_points(record, accuracy.OURS, metric="cka", vary="mean", value=0)[0]["worst"]
    assert SAME.relative < ours < select_point(record, "uncentred", "mean", 0)["worst"]


@pytest.mark.parametrize("metric", ["cka", "procrustes"])
def test_this_packages_distances_keep_digits_and_order(record, metric):
    bound = DISTANCE["float64"]
    orders = select_orders(record, accuracy.OURS, metric)
    assert [o["mean"] for o in orders] == [0, 10]
    for o in orders:
        assert o["out_of_order"] == 0
        assert min(float(d["distance"]) for d in o["decades"]) <= 1e-8
        for d in o["decades"]:
            assert d["worst"] <= max(bound.relative, bound.absolute / float(d["distance"]))


def test_an_uncentred_package_is_detected(record):
    assert select_point(record, "uncentred", "mean", 0)["worst"] < 1e-5
    assert select_point(record, "uncentred", "mean", 1000)["status"] == "wrong"
    assert select_point(record, "uncentred", "mean", 1000)["worst"] > 0.05
    assert max(o["share"] for o in select_orders(record, "uncentred")) > 0


def test_a_refusal_is_recorded_with_its_error(record):
    refused = select_point(record, "refusing", "dtype", "bfloat16")
    assert (refused["status"], refused["worst"]) == ("refused", None)
    assert refused["why"].startswith("TypeError: no bfloat16")
    assert select_point(record, "refusing", "dtype", "float64")["status"] == "ok"


def test_nan_and_wrong_results_are_recorded(record):
    assert {p["status"] for p in select_points(record, "nan")} == {"nan"}
    assert {o["status"] for o in select_orders(record, "nan")} == {"nan"}
    assert {o["share"] for o in select_orders(record, "nan")} == {1}
    assert {p["status"] for p in select_points(record, "backwards")} == {"wrong"}
    assert {o["share"] for o in select_orders(record, "backwards")} == {1}
    assert record["absent"] == {"missing: cka": "not installed"}


def test_the_summary(record):
    head, *rows = accuracy.summarize(record)
    by_key = {row[:2]: dict(zip(head[2:], row[2:], strict=True)) for row in rows}
    # Without CCA and the missing package, with both kinds of CKA in float64.
    assert len(by_key) == len(OURS) - 1 + len(FAKES) - 1 + 2
    ours = by_key[accuracy.OURS, "cka"]
    assert float(ours["error at mean 100"]) <= SAME.relative
    assert ours["out of order, mean 0"] == ours["out of order, mean 10"] == "none"
    assert by_key["nan", "cka"]["error at mean 0"] == "nan"
    assert by_key["backwards", "cka"]["out of order, mean 0"] == "100%"
    assert by_key[accuracy.OURS, "rsa"]["out of order, mean 0"] == ""


def test_counting_pairs_out_of_order():
    want = np.array([1.0, 2.0, 3.0, 3.0 + 1e-9])  # five pairs differ
    assert accuracy.count_out_of_order(want, want) == (0, 5)
    assert accuracy.count_out_of_order(np.array([1.0, 2.0, 1.5, 3.0]), want) == (1, 5)
    tied = np.array([1.0, 1.0, 3.0, 2.0])
    assert accuracy.count_out_of_order(tied, want) == (1, 5)  # ties count as out of order
    assert accuracy.count_out_of_order(np.array([np.nan, 2.0, 3.0, 3.0]), want) == (3, 5)


@settings(max_examples=10)
@given(st.sampled_from([1.0, 1e2, 1e4]), st.sampled_from([0, 100]), SEEDS)
def test_features_have_the_properties_of_their_case(condition, mean, seed):
    case = accuracy.FeatureCase(mean=mean, scale=1e3, condition=condition, dtype="float64")
    for x in accuracy.draw_features(case, accuracy.SMALL, seed):
        assert x.mean().item() == pytest.approx(1e3 * mean, abs=1e2)
        values = torch.linalg.svdvals(x - x.mean(0))[: accuracy.SMALL.directions]
        assert (values[0] / values[-1]).item() == pytest.approx(condition, rel=1e-6)
        assert x.std().item() == pytest.approx(1e3, rel=0.1)


def test_every_package_has_a_style():
    drawn = {p.name for p in PACKAGES if p.pair and p.metric in accuracy.METRICS}
    assert drawn <= set(STYLES)


def test_the_command_measures_all_packages(tmp_path):
    out = tmp_path / "accuracy.json"
    done = CliRunner().invoke(app, ["accuracy", "--quick", "--out", str(out)])
    assert done.exit_code == 0, done.output
    record = json.loads(out.read_text())
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    compared = {p.key for p in PACKAGES if p.pair and p.metric in accuracy.METRICS}
    compared |= {f"{accuracy.OURS}, float64: {metric}" for metric in ("cka", "cka_debiased")}
    present = {f"{p['name']}: {p['metric']}" for p in record["packages"]}
    assert present | set(record["absent"]) == compared
    cases = sum(map(len, accuracy.QUICK.values()))
    assert len(record["points"]) == cases * len(present)
    assert "pytorch-cka | cka_debiased" in done.output


def test_an_unknown_device_is_refused():
    with pytest.raises(RuntimeError, match="--device tpu: expected cuda or cpu"):
        accuracy.measure_accuracy("tpu")
