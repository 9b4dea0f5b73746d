"""Networks on the phantom device: comparing, extracting, ablating and the study, as on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _phantom import PhantomTensor
from _phantom_cuda import phantom_device
from _small_network import IMAGES, make_network
from _toy import toy_study
from torch import nn

import repsim_kernels as rk
from bench.common.tolerances import DISTANCE, assert_close
from repsim_kernels.experiments.columns import METRICS, PERFORMANCE, PROBES
from repsim_kernels.forward import AblatedForward

KEYS = ["model", "class", "layer", "cell", "size"]


class Skips(nn.Module):
    """Convolutions, a batch norm, in-place ReLUs, a skip connection and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.norm, self.relu1, self.relu2 = nn.BatchNorm2d(4), nn.ReLU(), nn.ReLU(inplace=True)
        self.pool, self.fc = nn.AdaptiveAvgPool2d(2), nn.Linear(16, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.relu1(self.norm(self.conv1(images)))
        x = x + self.relu2(self.conv2(x))
        return self.fc(self.pool(x).flatten(1))


def run_ablations(device: str, layer: str, fill: str | float = "zero") -> list[torch.Tensor]:
    model = Skips().eval().to(device)
    forward = AblatedForward(model, layer)
    state = forward.prefix(IMAGES.to(device))
    cells = np.arange(state.activation[0].numel()) % 3
    logits = forward.logits(state, cells, fill=fill)
    assert isinstance(logits, PhantomTensor) == (device == "cuda")
    return [t.cpu() for t in (logits, forward.intact(state))]


@pytest.mark.parametrize("layer", ["conv1", "relu1", "conv2", "relu2", "pool"])
def test_ablated_passes(monkeypatch, layer):
    with phantom_device() as device:
        got = run_ablations("cuda", layer)
        assert device.counts.count("launch", "_kernel") > 0
    monkeypatch.setenv("REPSIM_BACKEND", "torch")
    want = run_ablations("cpu", layer)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fill", ["mean", "resample", 1.5])
def test_filled_passes(monkeypatch, fill):
    with phantom_device():
        got = run_ablations("cuda", "conv2", fill)
    monkeypatch.setenv("REPSIM_BACKEND", "torch")
    torch.testing.assert_close(got, run_ablations("cpu", "conv2", fill), rtol=1e-5, atol=1e-5)


def test_a_fill_may_be_a_state_or_an_array_but_not_on_another_device():
    with phantom_device():
        forward = AblatedForward(Skips().eval().to("cuda"), "conv2")
        state, other = forward.prefix(IMAGES.to("cuda")), forward.prefix(IMAGES.to("cuda") + 1)
        cells = np.arange(4).reshape(4, 1, 1)
        want = forward.logits(state, cells, fill=other)
        on_host = other.activation.cpu()
        sparse = (
            np.arange(5) * state.activation[0, 0].numel(),
            np.arange(state.activation[0].numel()),
        )
        for form, fill in ((cells, other.activation), (cells, on_host.numpy()), (sparse, other)):
            got = forward.logits(state, form, fill=fill)
            torch.testing.assert_close(got.cpu(), want.cpu(), rtol=1e-5, atol=1e-5)
        assert isinstance(forward.logits(state, sparse), PhantomTensor)
        with pytest.raises(rk.DeviceError, match="fill: on cpu; expected the activation's cuda:0"):
            forward.logits(state, cells, fill=on_host)


def test_extract():
    want = rk.extract(make_network(), [IMAGES])
    with phantom_device():
        got = rk.extract(make_network().to("cuda"), [IMAGES.cuda()])
        for name, x in want.items():
            torch.testing.assert_close(torch.as_tensor(got[name]).cpu(), x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [{}, {"metric": "procrustes"}, {"calibrate": 30}, {"metric": "rsa", "calibrate": 30}],
    ids=str,
)
def test_compare(options):
    want = rk.compare(make_network(), make_network(), [IMAGES], **options)
    with phantom_device():
        models = [make_network().to("cuda") for _ in range(2)]
        got = rk.compare(*models, [IMAGES.cuda()], **options)
    assert_close(got.values, want.values, DISTANCE["float32"])
    if "calibrate" in options:
        assert_close(got.threshold, want.threshold, DISTANCE["float32"])


def test_calibrating_grams_of_several_passes_is_refused():
    message = r"memory: .* which calibrate needs on a GPU"
    with phantom_device(), pytest.raises(rk.OptionError, match=message):
        rk.compare(make_network().to("cuda"), None, [IMAGES.cuda()], memory=3500, calibrate=30)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_minibatch_cka(dtype):
    generator = torch.Generator().manual_seed(0)
    xs = [torch.randn(12, p, generator=generator).to(dtype) for p in (5, 20)]
    want = accumulate(xs)
    with phantom_device() as device:
        got = accumulate([x.cuda() for x in xs])
        assert device.counts.count("launch", "_kernel") > 0
    assert_close(got.values, want.values, DISTANCE["float32"])
    assert_close(got.standard_error, want.standard_error, DISTANCE["float32"])


def accumulate(xs: list[torch.Tensor]) -> rk.SimilarityMap:
    cka = rk.MinibatchCKA()
    for batch in (slice(0, 6), slice(6, 12)):
        cka.update([x[batch] for x in xs])
    return cka.compute()


def test_study(monkeypatch, tmp_path):
    with phantom_device() as device:
        study = toy_study(targets=[0, 2], grid=(2, 3), device="cuda")
        rows = study.run(out=tmp_path / "device").table
        assert device.counts.count("launch", "weights_kernel") > 0
    monkeypatch.setenv("REPSIM_BACKEND", "torch")
    expected = toy_study(targets=[0, 2], grid=(2, 3)).run(out=tmp_path / "cpu").table
    assert rows[KEYS].equals(expected[KEYS])
    for name in METRICS:
        assert_close(rows[name].to_numpy(), expected[name].to_numpy(), DISTANCE["float32"])
    for name in (*PERFORMANCE, *PROBES["ridge"]):
        np.testing.assert_allclose(
            rows[name], expected[name], atol=1e-4, equal_nan=True, err_msg=name
        )
