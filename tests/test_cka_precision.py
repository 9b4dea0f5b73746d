"""Linear CKA from float32 products: within 1e-6 of float64, whatever the features."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import repsim_kernels as rk
from repsim_kernels.kernels.torch import cka, memory, panels

BOUND = 1e-6  # on a similarity, absolute


def draw(kind: str, n: int, p: int, rng: np.random.Generator) -> np.ndarray:
    """Features that are hard to multiply in float32, unless they are ordinary."""
    shared = rng.standard_normal((n, 5))
    x = shared @ rng.standard_normal((5, p)) / 3 + rng.standard_normal((n, p))
    first, row = np.arange(n)[:, None] == 0, np.arange(n)[:, None] == n // 2
    match kind:
        case "rectified":
            return np.maximum(x, 0)
        case "sparse":
            return np.maximum(x - 2, 0) + 0.01 * first
        case "binary":
            return (x > 1) * 0.3
        case "counts":
            return rng.poisson(np.exp(x)) * 1.0
        case "heavy tails":
            return rng.standard_t(1.5, (n, p))
        case "far from zero":
            return x + 1e6
        case "different means":
            return x + 10.0 ** rng.uniform(-6, 6, p)
        case "different scales":
            return x * 10.0 ** rng.uniform(-6, 6, p)
        case "outlying first stimulus":
            return x + 1e3 * first
        case "outlying stimulus":
            return x + 1e3 * row
        case "large stimulus":
            return x * np.where(row, 100, 1)
        case "one-hot":
            return np.eye(n, p) * 1.1 + 1e-4 * x
        case "two clusters":
            return np.sign(shared[:, :1]) * np.abs(rng.standard_normal(p)) + 1e-3 * x
        case "repeated stimuli":
            return x[np.arange(n) // 3]
        case "products underflow":
            return x * 1e-20
        case "products overflow":
            return x * 1e18
        case _:
            return x


KINDS = (
    "ordinary", "rectified", "sparse", "binary", "counts", "heavy tails", "far from zero",
    "different means", "different scales", "outlying first stimulus", "outlying stimulus",
    "large stimulus", "one-hot", "two clusters", "repeated stimuli", "products underflow",
    "products overflow",
)  # fmt: skip


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@given(
    other=st.sampled_from(KINDS),
    n=st.integers(4, 120),
    p=st.integers(1, 300),
    q=st.integers(1, 300),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**32 - 1),
)
def test_float32_products_give_similarities_within_the_bound(
    kind, debiased, other, n, p, q, dtype, seed
):
    """From features if p and q are small, and otherwise from Grams, alone and in a list."""
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(draw(kind, n, p, rng)).to(dtype)
    y = torch.from_numpy(draw(other, n, q, rng)).to(dtype)
    try:
        want = float(rk.cka(x, y, debiased=debiased, precision="float64"))
    except rk.ConstantError:
        with pytest.raises(rk.ConstantError):
            rk.cka(x, y, debiased=debiased)
        return
    assert abs(float(rk.cka(x, y, debiased=debiased)) - want) <= BOUND
    third = torch.from_numpy(draw("ordinary", n, 3, rng)).to(dtype)
    values = rk.pairwise([x, third], [y, third], debiased=debiased)
    assert abs(float(values[0, 0]) - want) <= BOUND


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize(("n", "p"), [(60, 5000), (300, 100), (3000, 30), (300, 2500)])
def test_float32_products_lose_little_of_ordinary_features(n, p, debiased):
    """Sums over more than one run of products, against the definition in float64."""
    rng = np.random.default_rng(n)
    x = draw("rectified", n, p, rng).astype(np.float32)
    y = (x[:, ::-1] + draw("ordinary", n, p, rng)).astype(np.float32)
    want = rk.cka(x, y, debiased=debiased, backend="reference")
    got = rk.cka(x, y, debiased=debiased)
    assert abs(got - want) < 1e-7
    if p > 1000:  # multiplied in float32, as the other digits show
        assert got != want
    assert rk.cka(x, y, debiased=debiased, precision="float64") == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("debiased", [False, True])
def test_blocks_and_runs_of_products_do_not_change_the_result(monkeypatch, debiased, precision):
    """From Grams and from features, with one matrix per core and with all cores on each."""
    rng = np.random.default_rng(3)
    options = {"debiased": debiased, "precision": precision}
    for n, widths in ((40, (400, 400, 90)), (400, (40, 40, 70)), (700, (3, 200, 2))):
        xs = [rng.standard_normal((n, p)).astype(np.float32) for p in widths]
        want = rk.pairwise(xs, backend="reference", **options)
        for block, short, width, cores in ((2**21, 97, 1, 2), (41, 30, 1, 2), (9000, 64, 50, 1)):
            monkeypatch.setattr(memory, "BLOCK", block)
            monkeypatch.setattr(panels, "SHORT", short)
            monkeypatch.setattr(panels, "_MIN_WIDTH", width)
            monkeypatch.setattr(panels, "count_cores", lambda x, cores=cores: cores)
            tolerance = 1e-7 if precision == "float32" else 1e-12
            np.testing.assert_allclose(rk.pairwise(xs, **options), want, rtol=0, atol=tolerance)
            for i, j in ((0, 1), (0, 2)):
                assert rk.cka(xs[i], xs[j], **options) == pytest.approx(want[i, j], abs=tolerance)


@pytest.mark.parametrize("debiased", [False, True])
def test_fifty_layers_keep_their_order(debiased):
    """Similarities that differ by more than the bound are ranked as in float64."""
    rng = np.random.default_rng(0)
    layers = [rng.standard_normal((100, 400))]
    for _ in range(49):
        layers.append(layers[-1] + 0.2 * rng.standard_normal((100, 400)))
    layers = [layer.astype(np.float32) for layer in layers]
    got, want = (
        rk.pairwise(layers, debiased=debiased, precision=precision)[np.triu_indices(50, 1)]
        for precision in ("float32", "float64")
    )
    apart = want[:, None] - want > BOUND
    assert (got[:, None] > got)[apart].all()
    assert apart.sum() > 0.49 * apart.size


@pytest.mark.parametrize("dtypes", [(np.float64, np.float64), (np.float32, np.float64)])
def test_float64_input_is_always_multiplied_in_float64(dtypes):
    rng = np.random.default_rng(1)
    for p in (20, 200):
        x, y = (rng.standard_normal((50, p)).astype(dtype) for dtype in dtypes)
        for options in ({}, {"debiased": True}):
            assert rk.cka(x, y, **options) == rk.cka(x, y, precision="float64", **options)
    assert cka.product_dtype([torch.zeros(1)], "rbf", "float32") == torch.float64


def test_shorter_float32_products_of_pytorch_are_not_used():
    """`torch.set_float32_matmul_precision("medium")` allows bfloat16 on some CPUs."""
    rng = np.random.default_rng(2)
    x, y = (torch.from_numpy(rng.standard_normal((200, 600)).astype(np.float32)) for _ in "xy")
    want = rk.cka(x, y)
    backends: list = [torch.backends.mkldnn.matmul, torch.backends.cuda.matmul]
    torch.set_float32_matmul_precision("medium")
    try:
        before = [backend.fp32_precision for backend in backends]
        assert rk.cka(x, y) == want
        assert [backend.fp32_precision for backend in backends] == before != ["ieee", "ieee"]
    finally:
        torch.set_float32_matmul_precision("highest")


def test_precision_is_checked():
    x = np.ones((4, 2))
    for call in (lambda: rk.cka(x, x, precision="tf32"), lambda: rk.pairwise([x], precision=None)):
        with pytest.raises(rk.OptionError, match=r"^precision: .*one of 'float32', 'float64'$"):
            call()
