"""`compare`: how often networks and loaders run, what waits in files, and several processes."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import repsim_kernels as rk
from repsim_kernels import _options

N = 23


def make_network(seed, width):
    """Make ten convolutions with outputs of the same size, followed by operations in place."""
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, width, 3, padding=1)]
    for _ in range(9):
        layers += [nn.LeakyReLU(0.3, inplace=True), nn.Conv2d(width, width, 3, padding=1)]
    return nn.Sequential(*layers).double()


A, B = make_network(0, 4), make_network(1, 5)
IMAGES = torch.randn(N, 3, 16, 16, generator=torch.Generator().manual_seed(2)).double()
OPTIONS = {"layers": "conv", "precision": "float64"}


class Loader:
    """Counts how often it is read."""

    def __init__(self, batches):
        self.batches, self.read = batches, 0

    def __iter__(self):
        self.read += 1
        return iter(self.batches)


class LoaderOfKnownLength(Loader):
    def __len__(self):
        return len(self.batches)


class Counting(nn.Module):
    """Counts the stimuli that a network has been run on, by batch."""

    def __init__(self, network):
        super().__init__()
        self.network, self.stimuli = network, []

    def forward(self, x):
        self.stimuli.append(len(x))
        return self.network(x)


def compare(loader, a=A, b=B, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rk.DegenerateWarning)
        return rk.compare(a, b, loader, **(OPTIONS | options))


WANT = compare([IMAGES]).values
# Features take 4.2 MB here, batches 141 kB and the Grams of all layers 42 kB.
PLANS = {
    "features fit": ("1GiB", 1),
    "stimuli fit one pass": (1_100_000, 1),
    "several passes, batches are held": (400_000, 1),
    "several passes": (120_000, 60),
    "several passes, Grams in files": (80_000, 58),
}


@pytest.mark.parametrize(("memory", "readings"), PLANS.values(), ids=PLANS)
def test_every_plan_gives_the_same_values(memory, readings, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    loader = LoaderOfKnownLength(IMAGES.split(5))
    network = Counting(A)
    state = torch.get_rng_state()
    got = compare(loader, network, memory=memory)
    assert torch.equal(torch.get_rng_state(), state)
    np.testing.assert_allclose(got.values, WANT, rtol=0, atol=1e-10)
    assert loader.read == readings
    assert (N in network.stimuli) == (memory == 1_100_000)
    printed = capsys.readouterr().err
    assert printed.count("passes of ") == (2 if isinstance(memory, int) and memory < 1e6 else 0)
    assert ("of Gram matrices are written to" in printed) == (memory == 80_000)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("metric", ["cka", "cka_debiased"])
@pytest.mark.parametrize("itself", [True, False])
@pytest.mark.parametrize("memory", [400_000, 100_000, "1GiB"])
def test_fewer_neurons_than_stimuli_are_compared_as_features(metric, itself, memory, capsys):
    """Grams of six layers take 480,000 bytes, more than the memory, and features 182,400."""
    torch.manual_seed(5)
    network = nn.Sequential(
        nn.Linear(4, 20), nn.Tanh(), nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 2),
        nn.Linear(2, 12),
    ).double()  # fmt: skip
    x = torch.randn(200, 4).double()
    got = compare(
        list(x.split(30)), network, None if itself else network, layers=None, metric=metric,
        memory=memory,
    )  # fmt: skip
    printed = capsys.readouterr().err
    assert ("features are written to" in printed) == (memory == 100_000)
    features = list(rk.extract(network, [x]).values())
    want = rk.pairwise(
        features, None if itself else features, debiased=metric != "cka", precision="float64"
    )
    np.testing.assert_allclose(got.values, want, rtol=0, atol=1e-10)
    assert not itself or np.array_equal(got.values, got.values.T)


def test_features_are_not_computed_in_vain_if_they_will_not_fit():
    for loader, extra in ((Loader, [5, 5]), (LoaderOfKnownLength, [])):
        network = Counting(A)
        compare(loader(IMAGES.split(5)), network, None, memory=800_000)
        # Three to find the layers, and all in one pass.
        assert network.stimuli == [3, *extra, N]


@pytest.mark.parametrize("memory", [1_100_000, 80_000])
def test_several_metrics_share_all_passes(memory):
    both, one = (Loader(IMAGES.split(5)) for _ in range(2))
    metrics = "cka", "cka_debiased"
    got = compare(both, metric=metrics, memory=memory)
    compare(one, memory=memory)
    assert both.read == one.read
    for name in metrics:
        want = compare(Loader([IMAGES]), metric=name)
        np.testing.assert_allclose(got[name].values, want.values, rtol=0, atol=1e-10)


@pytest.mark.parametrize("memory", ["1GiB", 1_100_000, 80_000])
def test_high_biased_cka_is_warned_of_in_the_line_of_the_call(memory, monkeypatch):
    monkeypatch.setattr(_options, "_warnings_shown", set())
    with pytest.warns(rk.DegenerateWarning, match="when the stimuli of one side are") as caught:
        rk.compare(A, B, IMAGES.split(5), layers="conv", metric="cka", memory=memory)
    assert [w.filename for w in caught] == [__file__]


def test_a_full_disk_is_an_error_that_says_what_is_needed(monkeypatch):
    def fail(*_arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", fail)
    with pytest.raises(rk.OptionError, match="memory: less than the Gram matrices of 10 layers"):
        compare(Loader(IMAGES.split(5)), memory=80_000)


@pytest.mark.parametrize("memory", [1_100_000, 80_000])
def test_too_few_stimuli_for_debiased_cka(memory):
    with pytest.raises(rk.ShapeError, match=r"3 stimuli.*at least 4"):
        compare([IMAGES[:3]], memory=2000)


def test_batches_of_another_width_are_refused():
    loader = Loader([IMAGES[:12], torch.ones(11, 3, 18, 16, dtype=torch.float64)])
    with pytest.raises(rk.ShapeError, match="'0' has 1152 neurons in one batch and 1024 in the fi"):
        compare(loader, memory=80_000)


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e25])
def test_features_of_any_size_in_float32(scale):
    torch.manual_seed(6)
    network = nn.Sequential(nn.Linear(30, 200), nn.Linear(200, 150))
    for parameter in network[0].parameters():
        parameter.data *= scale
    network[1].weight.data /= scale
    loader = Loader(torch.randn(50, 30).split(10))
    want = rk.compare(network, loader=loader).values
    for memory in (60_000, 20_000):
        got = rk.compare(network, loader=loader, memory=memory).values
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


def test_a_temporary_folder_that_can_not_be_made_is_named(monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/nonexistent")
    compare(IMAGES.split(5))
    with pytest.raises(rk.OptionError, match=r"a temporary folder.* in /nonexistent: No such file"):
        compare(IMAGES.split(5), memory=80_000)


def test_a_loader_that_reuses_its_memory_is_refused():
    class Reusing(Loader):
        def __iter__(self):
            buffer = torch.empty_like(IMAGES[:5])
            for batch in self.batches:
                yield buffer[: len(batch)].copy_(batch)

    with pytest.raises(rk.OptionError, match=r"batch 0 differs.*reuse the memory of its batches"):
        compare(Reusing(IMAGES.split(5)), memory=1_100_000)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("memory", [80_000, "1GiB"])
def test_networks_of_any_precision(dtype, memory, capsys):
    network, loader = make_network(3, 5).to(dtype), Loader(IMAGES.to(dtype).split(5))
    got = rk.compare(network, loader=loader, layers="conv", memory=memory)
    assert ("passes of" in capsys.readouterr().err) == (memory == 80_000)
    features = [x.double() for x in rk.extract(network, loader, "conv").values()]
    want = rk.pairwise(features, debiased=True, precision="float64")
    np.testing.assert_allclose(got.values, want, rtol=0, atol=1e-6)


_RANK = """
import os, sys
import torch, torch.distributed as dist
import repsim_kernels as rk

rank = int(os.environ["RANK"])
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], world_size=2, rank=rank)
a, b, images = torch.load(sys.argv[2], weights_only=False)
part = slice(0, 15) if rank == 0 else slice(15, None)  # of different sizes
batches = list(zip(images[part].split(5), torch.arange(len(images))[part].split(5)))
reversed_batches = [tuple(x.flip(0) for x in batch) for batch in batches]
cases = {
    "features": {"calibrate": 40},
    "joined": {"memory": 1_100_000, "calibrate": 40},
    "passes": {"memory": 80_000},
    "itself": {"model_b": None},
    "two loaders": {
        "loader_b": reversed_batches, "ids": lambda batch: batch[1].tolist(), "memory": 400_000
    },
    "rsa": {"metric": "rsa"},
    "files": {"metric": "rsa", "memory": 80_000},
    "minibatch": {"estimator": "minibatch"},
}
results = {}
for name, options in cases.items():
    precision = {} if "metric" in options else {"precision": "float64"}
    m = rk.compare(a, **({"model_b": b, "loader": batches} | options), layers="conv", **precision)
    results[name] = (m.values, m.n, m.n_left_out, m.threshold)
for estimator in ("exact", "minibatch"):
    try:
        rk.compare(a, b, batches if rank == 0 else [], layers="conv", estimator=estimator)
    except rk.RepsimError as error:
        results[estimator + " fails"] = str(error)
torch.save(results, f"{sys.argv[3]}/{rank}.pt")
dist.destroy_process_group()
"""


def test_two_processes_return_what_one_does(tmp_path):
    torch.save((A, B, IMAGES), tmp_path / "inputs.pt")
    arguments = tmp_path / "store", tmp_path / "inputs.pt", tmp_path
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _RANK, *map(str, arguments)],
            env=os.environ | {"RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    rsa = rk.compare(A, B, [IMAGES], layers="conv", metric="rsa").values
    with pytest.warns(UserWarning, match="3 stimuli are left out"):
        minibatch = compare(IMAGES.split(5), estimator="minibatch")
    assert minibatch.n == 20
    calibrated = compare([IMAGES], calibrate=40)
    wants = {
        "itself": compare([IMAGES], A, None).values,
        "rsa": rsa,
        "files": rsa,
        "minibatch": minibatch.values,
    }
    for rank, result in enumerate(results):
        owner = "" if rank == 1 else "rank 1: ShapeError: "
        for estimator in ("exact", "minibatch"):  # an error of one rank is raised on both
            assert result.pop(f"{estimator} fails").startswith(f"{owner}loader: no batches")
        for name, (values, n, n_left_out, threshold) in result.items():
            want = wants.get(name, WANT)
            np.testing.assert_allclose(values, want, rtol=0, atol=1e-10, err_msg=name)
            assert (n, n_left_out) == ((20, 3) if name == "minibatch" else (N, 0))
            if name in ("features", "joined"):
                assert threshold == pytest.approx(calibrated.threshold, abs=1e-10)
    assert ["passes of Sequential" in error for error in errors] == [True, False]
