"""Sizes in bytes, free memory, and batches that fit it."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from repsim_kernels.errors import OptionError
from repsim_kernels.forward import memory
from repsim_kernels.forward.memory import Batch, split_to_fit

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("value", "want"),
    [
        (1, 1),
        (2**40, 2**40),
        ("17B", 17),
        ("500MB", 500_000_000),
        (" 1.5 kB ", 1500),
        ("1.5KiB", 1536),
        ("0.5MiB", 2**19),
        ("8GiB", 2**33),
        ("3 GB", 3_000_000_000),
        ("2TiB", 2**41),
        ("0.1TB", 10**11),
    ],
)
def test_sizes_are_parsed_to_bytes(value, want):
    assert memory.parse_size(value) == want
    assert memory.resolve_budget(value, CPU) == want
    assert memory.resolve_budget(value, torch.device("cuda")) == want


INVALID_SIZES = "", "GiB", "8 gib", "8KB", "1e9", "-1", "+1", ".5GB", "0", "0.4B", "1 2", "8\nX"


@pytest.mark.parametrize("value", INVALID_SIZES)
def test_invalid_texts_are_refused(value):
    with pytest.raises(OptionError, match=r"limit: '.*'; expected bytes, or a size such") as error:
        memory.parse_size(value, "limit")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [0, 0.5, -1, math.nan, math.inf, True, [8], b"8", 10**400])
def test_invalid_numbers_are_refused(value):
    with pytest.raises(OptionError, match=r"memory: .*; expected a finite number of at least 1"):
        memory.parse_size(value)


def test_text_that_overflows_a_float_is_refused():
    with pytest.raises(OptionError, match=r"memory: .*; expected"):
        memory.parse_size("9" * 400)


@given(
    st.lists(st.integers(0, 99), max_size=12, unique=True),
    st.integers(0, 9),
    st.integers(1, 12),
    st.integers(1, 40),
    st.integers(1, 15),
)
def test_each_cell_and_image_is_in_one_part(cells, start, n, rows, max_cells):
    parts = split_to_fit(Batch(cells, start, start + n), rows, max_cells)
    pairs = [(c, i) for part in parts for c in part.cells for i in range(part.start, part.stop)]
    assert sorted(pairs) == sorted((c, start + i) for c in cells for i in range(n))
    for part in parts:
        size = part.stop - part.start
        assert 1 <= len(part.cells) <= max_cells
        assert 1 <= len(part.cells) * size <= rows
        assert size == n if rows >= n else len(part.cells) == 1
    # As few parts as possible, with equal numbers of images.
    count = min(max_cells, rows // n)
    assert len(parts) == (-(-len(cells) // count) if count else len(cells) * -(-n // rows))
    assert len({part.stop - part.start for part in parts}) <= 2


def test_free_bytes_on_a_cpu_respect_the_control_group(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "Path", lambda path: tmp_path / Path(path).relative_to("/"))
    pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1000}
    monkeypatch.setattr(memory.os, "sysconf", pages.__getitem__)
    assert memory.get_free_bytes(CPU) == 4_096_000
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:   3000 kB\n")
    assert memory.get_free_bytes(CPU) == 3_072_000
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("700000\n")
    (group / "memory.stat").write_text("anon 1\ninactive_file 200000\n")
    assert memory.get_free_bytes(CPU) == 3_072_000
    (group / "memory.max").write_text("1500000\n")
    assert memory.get_free_bytes(CPU) == 1_000_000  # inactive file pages can be reclaimed
    assert memory.resolve_budget(None, CPU) == 500_000
    (group / "memory.max").write_text("400000\n")
    assert memory.get_free_bytes(CPU) == 1
    (group / "memory.stat").write_text("anon 1\n")
    assert memory.get_free_bytes(CPU) == 3_072_000


def test_free_bytes_on_a_gpu_include_cached_memory(monkeypatch):
    device = torch.device("cuda", 1)
    readings = {"mem_get_info": (2**33, 2**36), "memory_reserved": 2**34, "memory_allocated": 2**32}
    for name, value in readings.items():
        monkeypatch.setattr(torch.cuda, name, {device: value}.__getitem__)
    assert memory.get_free_bytes(device) == 2**33 + 2**34 - 2**32
    assert memory.resolve_budget(None, device) == (2**33 + 2**34 - 2**32) // 2
    assert memory.resolve_batch_budget(2**40, device) == 2**33  # enough to keep a GPU busy
    assert memory.resolve_batch_budget(2**20, device) == 2**20
    assert memory.resolve_batch_budget(2**40, CPU) == 2**40
    monkeypatch.setattr(memory, "get_free_bytes", lambda device: 5000)
    assert memory.resolve_budget(None, device) == 2500
    monkeypatch.setattr(memory, "get_free_bytes", lambda device: 2**40)
    assert memory.resolve_budget(None, CPU) == 2**39
    assert memory.resolve_budget("1TiB", device) == 2**40
