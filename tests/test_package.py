"""The package as a whole: imports, layers, dispatch, and documentation."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import repsim_kernels as rk
from repsim_kernels import _arrays, _dispatch
from repsim_kernels._metrics import METRICS
from repsim_kernels._operations import OPERATIONS
from repsim_kernels.forward import AblatedForward

ROOT = Path(rk.__file__).parent


def test_importing_the_package_imports_no_framework():
    code = (
        "import sys, repsim_kernels; repsim_kernels.__all__;"
        "names = ('torch', 'triton', 'cupy', 'pandas', 'matplotlib', 'sklearn');"
        "print([name for name in names if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def find_imports(path: Path) -> set[str]:
    """Return the names of the modules that a file of the package imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return names


def find_modules(*folders: str) -> list[Path]:
    """Return the files of modules in folders of the package."""
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


# The types that every backend takes and returns.
SHARED_TYPES = ("repsim_kernels._cell_sets", "repsim_kernels._noise", "repsim_kernels._routes")


def test_layers_import_only_what_is_below():
    """`kernels` and `reference` import nothing above them.

    `ops`, `forward` and `comparison` reach them only through the dispatcher, so that one rule
    chooses backends.
    """
    assert len(find_modules("ops", "kernels", "reference")) > 20
    for module in SHARED_TYPES:
        path = ROOT / f"{module.partition('.')[2]}.py"
        roots = {m.partition(".")[0] for m in find_imports(path)}
        assert roots <= {*sys.stdlib_module_names, "numpy"}, path
    for path in find_modules("kernels"):
        upward = {m for m in find_imports(path) if m.startswith("repsim_kernels.")}
        assert all(m.startswith(("repsim_kernels.kernels", *SHARED_TYPES)) for m in upward), path
    for folder, others in (("torch", ("triton", "cupy")), ("cupy", ("triton",))):
        for path in find_modules(f"kernels/{folder}"):
            backends = {m.split(".")[2] for m in find_imports(path) if m.count(".") > 1}
            assert backends.isdisjoint(others), path
    for path in find_modules("reference"):
        roots = {m.partition(".")[0] for m in find_imports(path)}
        assert roots <= {"__future__", "numpy", "repsim_kernels", "collections", "typing"}, path
        inner = {m for m in find_imports(path) if m.startswith("repsim_kernels")}
        assert all(m.startswith(("repsim_kernels.reference", *SHARED_TYPES)) for m in inner), path
    for registry in ("_operations.py", "_metrics.py"):
        roots = {m.partition(".")[0] for m in find_imports(ROOT / registry)}
        assert roots <= sys.stdlib_module_names, registry
    for path in find_modules("ops", "forward"):
        others = {"comparison", "ops", "forward", "kernels", "reference"} - {path.parent.name}
        packages = {m.split(".")[1] for m in find_imports(path) if m.startswith("repsim_kernels.")}
        assert packages.isdisjoint(others), path
        assert path.parent.name == "forward" or "torch" not in find_imports(path), path
    for path in find_modules("comparison"):
        packages = {m.split(".")[1] for m in find_imports(path) if m.startswith("repsim_kernels.")}
        assert packages.isdisjoint({"experiments", "kernels", "reference"}), path


def test_every_registered_kernel_exists():
    for operation in OPERATIONS:
        assert set(operation.batched) <= set(operation.backends)
        if operation.kernel is not None:
            (kernel,) = [op for op in OPERATIONS if op.name == operation.kernel]
            assert (operation.backends, operation.batched) == (kernel.backends, ())
    for op, backend in _dispatch.KERNELS:
        assert callable(_dispatch._load_kernel(op, backend))


def test_type_checkers_see_every_public_name():
    """They can't follow lazy loading, and read the imports under `TYPE_CHECKING` instead."""
    names = {name for name in rk.__all__ if getattr(rk, name).__module__ != rk.errors.__name__}
    imports = find_imports(ROOT / "__init__.py")
    assert {f"{getattr(rk, name).__module__}.{name}" for name in names} <= imports


@pytest.mark.parametrize("metric", [m for m in METRICS if m.pairwise], ids=lambda m: m.name)
def test_values_are_within_the_bounds_of_the_registry(metric):
    rng = np.random.default_rng(0)
    xs = [rng.standard_normal((8, p)) for p in (1, 2, 3, 3)]
    options = {"k": 3} if metric.neighbours else {}
    values = rk.pairwise([*xs, -xs[0] + xs[1] ** 3], metric=metric.name, **options)
    low, high = metric.bounds
    assert (values >= low).all()
    assert (values <= high).all()


def test_distances_of_ablations_are_within_the_bounds_of_the_registry():
    x = np.random.default_rng(0).standard_normal((8, 12)) ** 3
    distances = rk.ablation_distances(x, np.tri(12, dtype=bool)[:-1], metrics="all", k=3)
    for metric in (m for m in METRICS if m.ablation):
        low, high = metric.ablation_bounds
        assert (distances[metric.name] >= low).all()
        assert (distances[metric.name] <= high).all()


def test_unknown_names_raise_and_public_ones_are_listed():
    with pytest.raises(AttributeError, match="no attribute 'ckka'"):
        rk.ckka  # noqa: B018
    assert "cka" in dir(rk)
    assert rk.__version__


def test_show_config_prints_versions_and_backends(capsys):
    rk.show_config()
    out = capsys.readouterr().out
    assert f"torch {torch.__version__}" in out
    assert "reference" in out
    assert (
        f"cupy      {'no: ' + why if (why := _dispatch.unavailable_reason('cupy')) else 'usable'}"
        in out
    )


def test_the_environment_chooses_a_backend_unless_the_argument_does(monkeypatch):
    x, y = np.random.default_rng(0).standard_normal((2, 8, 4))
    monkeypatch.setenv("REPSIM_BACKEND", "cupy")
    with pytest.raises(rk.BackendUnavailable, match="'cupy' can't serve cka"):
        rk.cka(x, y)
    assert rk.cka(x, y, backend="torch") == pytest.approx(rk.cka(x, y, backend="reference"))
    monkeypatch.setenv("REPSIM_BACKEND", "numpy")
    with pytest.raises(rk.OptionError, match="REPSIM_BACKEND: 'numpy'"):
        rk.cka(x, y)


def test_forward_chooses_backends_by_the_same_rule(monkeypatch):
    """Except that PyTorch runs the network if the requested backend can't."""
    masked_copies = pytest.importorskip("repsim_kernels.kernels.triton.masked_copies")
    x = torch.ones(2, 3)

    def is_triton_chosen(backend):
        monkeypatch.setenv("REPSIM_BACKEND", backend)
        return _dispatch.uses_triton("ablate", x)

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not any(map(is_triton_chosen, ("", *_dispatch.BACKENDS)))
    x = SimpleNamespace(device="cuda:0")
    monkeypatch.setattr(masked_copies, "unsupported", lambda t: None)
    assert list(filter(is_triton_chosen, ("", *_dispatch.BACKENDS))) == ["", "triton"]
    monkeypatch.setattr(masked_copies, "unsupported", lambda t: "it takes float32")
    assert not any(map(is_triton_chosen, ("", *_dispatch.BACKENDS)))
    with pytest.raises(rk.OptionError, match="REPSIM_BACKEND: 'numpy'"):
        is_triton_chosen("numpy")
    with pytest.raises(rk.OptionError, match="REPSIM_BACKEND: 'numpy'"):
        AblatedForward(torch.nn.Sequential(torch.nn.Linear(3, 3)).eval(), "0")


def test_arrays_share_memory():
    a = np.arange(12.0).reshape(3, 4)[:, ::2]
    t, source = _arrays.convert(a, "a")
    a[0, 0] = 7
    assert t[0, 0] == 7
    assert np.shares_memory(source.restore(t), a)
    assert np.shares_memory(_arrays.to_numpy(t), a)
    a.flags.writeable = False
    t, _ = _arrays.convert(a, "a")
    assert t.data_ptr() == a.ctypes.data


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_strides_that_torch_does_not_support_are_accepted(backend):
    fields = np.zeros((5, 4), [("flag", "u1"), ("value", "f8")])
    fields["value"] = np.random.default_rng(0).standard_normal((5, 4))
    for x in (fields["value"], fields["value"][::-1], np.ones((4, 3))[:, ::-1]):
        labels = np.arange(len(x))
        np.testing.assert_array_equal(rk.class_means(x, labels, backend=backend), x)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "i2", "u4"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_both_byte_orders_are_accepted(backend, dtype, order):
    x = np.random.default_rng(0).integers(0, 9, (2, 6, 5)).astype(dtype)
    cells, labels = np.arange(5) % 2, np.arange(6) % 2
    swapped = x.astype(order + dtype).swapaxes(1, 2).copy().swapaxes(1, 2)
    result = rk.cell_grams(swapped, cells.astype(order + "i4"), batched=True, backend=backend)
    np.testing.assert_array_equal(result, rk.cell_grams(x, cells, batched=True, backend=backend))
    result = rk.class_means(swapped, labels.astype(order + "i8"), batched=True, backend=backend)
    np.testing.assert_array_equal(result, rk.class_means(x, labels, batched=True, backend=backend))
    assert result.dtype.isnative
    result = rk.pairwise(swapped, x.astype(order + dtype), backend=backend)
    np.testing.assert_array_equal(result, rk.pairwise(x, x, backend=backend))


def test_autocast_of_the_caller_changes_nothing():
    x, y = torch.randn(30, 40), torch.randn(30, 50)
    plain = rk.pwcca(x, y, ridge=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(rk.pwcca(x, y, ridge=0.1), plain)
        assert torch.is_autocast_enabled("cpu")


def test_results_are_not_subclasses():
    frozen = torch.nn.Parameter(torch.randn(8, 2), requires_grad=False)
    assert type(rk.cka(frozen, frozen)) is torch.Tensor

    class Named(np.ndarray):
        pass

    a = np.random.default_rng(1).standard_normal((6, 3)).view(Named)
    assert type(rk.centered_gram(a)) is np.ndarray
