"""The benchmark of patched heads: its two methods, its bound and its table."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from bench import bench_patching
from bench.bench_patching import AIMS, build_gpt2, compute_bound, describe_patching
from repsim_kernels.forward import AblatedForward

pytest.importorskip("transformers")

SIZES = bench_patching._SIZES[True]


@pytest.fixture(scope="module")
def record():
    return bench_patching.measure_patching(quick=True)


def test_every_patch_is_bit_equal_to_a_hook(record):
    assert [row["logits"] for row in record["rows"]] == list(AIMS)
    for row in record["rows"]:
        assert row["equal"] == row["patches"] == SIZES["layers"] * SIZES["heads"]
        assert row["largest_difference"] == 0
        assert min(row["seconds"], row["hook_seconds"]) > 0


def count_operations(kept, layer=None):
    """Products with weights, for one prompt: of all layers, or behind the heads of one."""
    square = 2 * SIZES["tokens"] * SIZES["width"] ** 2
    unembedding = 2 * SIZES["width"] * SIZES["vocabulary"] * (kept or SIZES["tokens"])
    if layer is None:
        return 12 * square * SIZES["layers"] + unembedding
    return (12 * (SIZES["layers"] - layer) - 3) * square + unembedding


@pytest.mark.parametrize("kept", [0, 1])
def test_the_bound_counts_the_products_behind_the_heads(record, kept):
    total = SIZES["layers"] * count_operations(kept)
    behind = sum(count_operations(kept, layer) for layer in range(SIZES["layers"]))
    assert compute_bound(record["rows"][kept]) == pytest.approx(total / behind, rel=1e-12)


@pytest.mark.parametrize("kept", [0, 1])
def test_patches_change_the_logits(kept):
    torch.manual_seed(0)
    model = build_gpt2(SIZES)
    prompts, others = torch.randint(SIZES["vocabulary"], (2, SIZES["prompts"], SIZES["tokens"]))
    call = partial(bench_patching.get_logits, kept=kept)
    intact = call(model, prompts)
    assert intact.shape == (SIZES["prompts"], kept or SIZES["tokens"], SIZES["vocabulary"])
    values = bench_patching._record_heads(model, call, others)
    own = bench_patching._record_heads(model, call, prompts)
    patched = bench_patching._patch_with_hooks(model, call, prompts, 1, values[1])
    assert len({tuple(logits.flatten().tolist()) for logits in [intact, *patched]}) == 3
    for logits in bench_patching._patch_with_hooks(model, call, prompts, 1, own[1]):
        assert torch.equal(logits, intact)  # the same values in their place
    layer = "transformer.h.1.attn:heads"
    forward = AblatedForward(model, layer, call=call)
    ours = bench_patching._patch_heads(forward, forward.prefix(prompts), forward.prefix(others))
    assert all(map(torch.equal, ours, patched))


def test_the_page_has_ratios_bounds_and_differences():
    row = {
        "setup_seconds": 2.0,
        "seconds": 2.0,
        "hook_seconds": 4.0,
        "patches": 6,
        "equal": 6,
        "largest_difference": 0.0,
        "operations": 300,
        "operations_behind": 100,
    }
    rows = [
        {"logits": "all positions"} | row,
        {"logits": "the last position"} | row | {"equal": 5, "largest_difference": 2e-7},
    ]
    environment = {
        "device": "a CPU", "torch": "2", "date": "2026-01-02T00:00", "commit": None, "changed": None
    }  # fmt: skip
    text = describe_patching({"environment": environment, **SIZES, "rows": rows})
    assert "| all positions | 2 s | 4 s | 2.00 | 1.4 | 3.00 | 6 of 6 | 2 s | 6 |" in text
    assert "| 1.7 | 3.00 | 5 of 6, up to 2e-07 apart | 2 s | 6 |" in text
    assert "3 layers of 2 heads" in text


@pytest.mark.parametrize(
    ("seconds", "setup", "expected"),
    [(3.0, 1.0, "40"), (3.0, 1.01, "41"), (4.0, 1.0, "never"), (5.0, 0.1, "never")],
)
def test_the_set_up_pays_off_after_enough_patches(seconds, setup, expected):
    row = {"seconds": seconds, "hook_seconds": 4.0, "patches": 40, "setup_seconds": setup}
    assert bench_patching.count_patches_to_lead(row) == expected
