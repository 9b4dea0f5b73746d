"""Units whose rows contain NaN are stored and read back, whatever the bit pattern of the NaN."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from _run_data import make_configuration

from repsim_kernels.experiments.runs.store import Store


@pytest.fixture
def store(tmp_path: Any) -> Store:
    return Store.create(tmp_path / "run", make_configuration())


def nans(kind: str) -> np.ndarray[Any, Any]:
    """NaNs of both signs, quiet and signalling, with payloads, and one that was computed."""
    unsigned, quiet = {"float64": ("u8", 0x7FF8 << 48), "float32": ("u4", 0x7FC0 << 16)}[kind]
    sign = 1 << (8 * int(unsigned[1]) - 1)
    signalling = quiet & quiet << 1  # the exponent alone
    patterns = [top | low for top in (quiet, signalling) for low in (1, 0xAB, 0x1234)] + [quiet]
    bits = np.array(patterns + [sign | pattern for pattern in patterns], unsigned).view(kind)
    computed = torch.tensor([math.inf], dtype=getattr(torch, kind)).sub(math.inf).numpy()
    return np.concatenate([bits, computed])


@pytest.mark.parametrize("kind", ["float64", "float32"])
def test_any_nan_pattern_is_accepted_but_a_changed_value_is_not(
    store: Store, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    unit, patterns = store.units[0], nans(kind)
    assert np.isnan(patterns).all()
    assert len(set(np.signbit(patterns))) == 2
    rng = np.random.default_rng(7)
    for _ in range(5):
        values = rng.choice(np.array([0.0, -0.0, np.inf, -np.inf, 0.5], kind), 40)
        at = rng.permutation(40)[: len(patterns)]
        # Copy bits, because a cast may turn a signalling NaN into a quiet one.
        values.view(f"u{values.itemsize}")[at] = patterns.view(f"u{values.itemsize}")
        rows = pd.DataFrame({"cell": np.arange(40), "lost": values})
        store.save(unit, rows)
        read = store.read_finished([unit])[unit]
        np.testing.assert_array_equal(read["lost"], values)
        numbers = ~np.isnan(values)
        assert read["lost"][numbers].to_numpy().tobytes() == values[numbers].tobytes()
        assert store.unfinished() == store.units[1:]
        other = read.assign(lost=read["lost"].where(read["cell"] != at[0], 1))
        with monkeypatch.context() as patch:
            patch.setattr(pd, "read_parquet", lambda *_, table=other, **__: table)
            with pytest.warns(UserWarning, match="its rows differ from those that were written"):
                assert store.unfinished() == store.units
