"""The metrics in 60-digit arithmetic, computed from Grams: the oracle of the reference.

They are slow, so pass few stimuli. Each takes float64 arrays (n, p) and (n, q), read exactly.
"""

from __future__ import annotations

from mpmath import mp, mpf

mp.dps = 60
ZERO = mpf(10) ** -45


def centre(x):
    a = mp.matrix(x.tolist())
    for j in range(a.cols):
        mean = mp.fsum(a[:, j]) / a.rows
        for i in range(a.rows):
            a[i, j] -= mean
    return a


def gram(x):
    a = centre(x)
    return a * a.T


def inner(k, m):
    return mp.fsum(u * v for u, v in zip(k, m, strict=True))


def trace(k):
    return mp.fsum(k[i, i] for i in range(k.rows))


def apply(k, function):
    """Apply a function to the positive eigenvalues of k; the others become 0."""
    w, u = mp.eigsy(k)
    cut = ZERO * max(w)
    return u * mp.diag([function(v) if v > cut else mpf(0) for v in w]) * u.T


def cka(x, y):
    k, m = gram(x), gram(y)
    return inner(k, m) / mp.sqrt(inner(k, k) * inner(m, m))


def cka_debiased(x, y):
    k, m = gram(x), gram(y)
    for i in range(k.rows):
        k[i, i] = m[i, i] = mpf(0)
    return _hsic1(k, m) / mp.sqrt(_hsic1(k, k) * _hsic1(m, m))


def _hsic1(k, m):
    n = k.rows
    ones = mp.ones(n, 1)
    grand = (ones.T * k * ones)[0] * (ones.T * m * ones)[0] / ((n - 1) * (n - 2))
    cross = (ones.T * k * m * ones)[0] * 2 / (n - 2)
    return (inner(k, m) + grand - cross) / (n * (n - 3))


def procrustes(x, y):
    k, m = gram(x), gram(y)
    return _sum_of_roots(k, m) / mp.sqrt(trace(k) * trace(m))


def procrustes_distance(x, y):
    return 2 - 2 * procrustes(x, y)


def _sum_of_roots(k, m):
    """Return the nuclear norm of k^½ m^½."""
    root = apply(k, mp.sqrt)
    return mp.fsum(mp.sqrt(max(v, 0)) for v in mp.eigsy(root * m * root, eigvals_only=True))


def _projector(x, ridge, penalty):
    """Return A (AᵀA + κI)⁻¹ Aᵀ, (n, n), for the centred x A."""
    k = gram(x)
    kappa = mpf(penalty) or mpf(ridge) * trace(k) / k.rows
    return apply(k, lambda v: v / (v + kappa))


def _rank(projector):
    return sum(v > ZERO for v in mp.eigsy(projector, eigvals_only=True))


def cca(x, y, squared=False, ridge=0, penalty=0):
    k, m = _projector(x, ridge, penalty), _projector(y, ridge, penalty)
    total = trace(k * m) if squared else _sum_of_roots(k, m)
    ridged = ridge or penalty
    n, p, q = len(x), x.shape[1], y.shape[1]
    return total / (min(n - 1, p, q) if ridged else min(_rank(k), _rank(m)))


def pwcca(x, y, ridge=0, penalty=0):
    k, m = _projector(x, ridge, penalty), _projector(y, ridge, penalty)
    root = apply(k, mp.sqrt)
    rho2, u = mp.eigsy(root * m * root)  # ascending
    shares = (root * u).T * centre(x)
    in_rank = range(len(rho2) - min(_rank(k), _rank(m)), len(rho2))
    weights = [mp.fsum(abs(v) for v in shares[i, :]) for i in in_rank]
    rho = [mp.sqrt(max(rho2[i], 0)) for i in in_rank]
    return mp.fdot(weights, rho) / mp.fsum(weights)


def svcca(x, y, variance=0.99):
    bases = []
    for z in (x, y):
        w, u = mp.eigsy(gram(z))
        order = sorted(range(len(w)), key=lambda i: -w[i])
        count = 1
        while mp.fsum(w[i] for i in order[:count]) < mpf(variance) * mp.fsum(w):
            count += 1
        basis = mp.matrix(u.rows, count)
        for column, i in enumerate(order[:count]):
            basis[:, column] = u[:, i]
        bases.append(basis)
    rho = mp.svd_r(bases[0].T * bases[1], compute_uv=False)
    return mp.fsum(rho) / min(b.cols for b in bases)
