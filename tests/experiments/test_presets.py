"""Presets, and loading full-size networks."""

import hashlib
import re
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torchvision.models as zoo
from safetensors.torch import save_file
from torch import nn

from repsim_kernels.experiments.columns import METRICS
from repsim_kernels.experiments.errors import ModelError
from repsim_kernels.experiments.inputs.networks import list_default_layers
from repsim_kernels.experiments.inputs.presets import (
    PRESETS,
    LoadedNetwork,
    Network,
    assign_weights,
    load_network,
)
from repsim_kernels.forward import AblatedForward

NETWORKS = {network.name: network for p in PRESETS.values() for network in p.networks}
MOBILENET, NARROW = NETWORKS["mobilenet_v2"], NETWORKS["mobilenet_v2_035"]


# Each takes seconds, except the narrow network.
EACH = [
    pytest.param(name, marks=() if name == NARROW.name else pytest.mark.slow) for name in NETWORKS
]


@pytest.fixture(scope="module", params=EACH)
def network(request: pytest.FixtureRequest) -> tuple[Network, LoadedNetwork]:
    """Each network, with random weights."""
    return NETWORKS[request.param], load_network(NETWORKS[request.param], "random")


@pytest.fixture(scope="module")
def mobilenet() -> nn.Module:
    return load_network(MOBILENET, "random").model


@pytest.fixture(scope="module")
def narrow() -> nn.Module:
    return load_network(NARROW, "random").model


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty torch.hub cache, and no network connection."""

    def urlopen(*_: object, **__: object) -> None:
        raise URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", urlopen)
    return tmp_path / "hub" / "checkpoints"


def one_line(error: pytest.ExceptionInfo[ModelError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def photographs(n: int) -> torch.Tensor:
    """Noise with a photograph's spectrum, amplitude 1 / frequency; unit variance per channel."""
    wave = torch.fft.rfft2(torch.randn(n, 3, 224, 224, generator=torch.Generator().manual_seed(7)))
    frequency = torch.fft.fftfreq(224)[:, None] ** 2 + torch.fft.rfftfreq(224) ** 2
    images = torch.fft.irfft2(wave / frequency.clamp(min=1 / 224**2).sqrt())
    return (images - images.mean((0, 2, 3), True)) / images.std((0, 2, 3), keepdim=True)


def test_classes_match_the_paper():
    assert list(PRESETS) == [
        *("alexnet", "mobilenet_v2", "mobilenet_v2_035", "resnet50", "vit_b_16", "hayne2024")
    ]
    fifty = NETWORKS["alexnet"].classes
    ten = {
        *("n04147183", "n01917289", "n01534433", "n01944390", "n02066245"),
        *("n02110185", "n03271574", "n02870880", "n03388183", "n04442312"),
    }
    assert len(fifty) == len(set(fifty)) == 50
    assert ten < set(fifty)
    assert all(re.fullmatch(r"n\d{8}", wnid) for wnid in fifty)
    assert sum(int(wnid[1:]) for wnid in fifty) == 149_245_304
    for name in ("mobilenet_v2", "mobilenet_v2_035", "resnet50", "vit_b_16"):
        assert len(NETWORKS[name].classes) == 10
        assert set(NETWORKS[name].classes) == ten
    stimuli = {
        n.name: n.images_per_class * (len(n.classes) if n.others is None else 1 + n.others)
        for n in NETWORKS.values()
    }
    assert stimuli == {"alexnet": 550, **dict.fromkeys(list(NETWORKS)[1:], 500)}


def test_options_match_the_paper_or_our_defaults():
    paper = PRESETS["hayne2024"]
    assert [n.name for n in paper.networks] == ["alexnet", "mobilenet_v2_035", "resnet50"]
    assert (paper.options["edges"], paper.options["penalty"]) == ("inclusive", 1000)
    assert set(METRICS) - set(paper.options["metrics"]) == {"svcca", "cka_debiased"}
    for name in list(PRESETS)[:5]:
        ours = PRESETS[name]
        assert [n.name for n in ours.networks] == [name]
        assert (ours.options, ours.paired) == ({}, True)


LAYERS = {  # number of layers, millions of activations in total, most in one layer
    "alexnet": (7, 0.49, 193_600),
    "mobilenet_v2": (104, 13.36, 1_204_224),
    "mobilenet_v2_035": (104, 5.73, 602_112),
    "resnet50": (16, 5.52, 802_816),
    "vit_b_16": (24, 3.63, 151_296),
}


def test_random_networks_have_no_dead_layers(network):
    spec, (model, _, note) = network
    assert note == "random weights"
    activations: dict[str, torch.Tensor] = {}
    modules = dict(model.named_modules())
    layers = list_default_layers(model)
    handles = [
        modules[layer].register_forward_hook(
            lambda _m, _i, out, layer=layer: activations.__setitem__(layer, out.flatten(1).clone())
        )
        for layer in layers
        if layer in modules
    ]
    logits = model(photographs(4))
    for handle in handles:
        handle.remove()
    if heads := [layer for layer in layers if layer not in modules]:
        states = AblatedForward(model, heads).prefixes(photographs(4))
        activations |= {layer: state.activation.flatten(1) for layer, state in states.items()}
    activations = {layer: activations[layer] for layer in layers}
    sizes = [len(out[0]) for out in activations.values()]
    assert (len(sizes), round(sum(sizes) / 1e6, 2), max(sizes)) == LAYERS[spec.name]
    assert min(float((out.std(0) > 0).double().mean()) for out in activations.values()) > 0.4
    scales = [float(out.std()) for layer, out in activations.items() if layer not in heads]
    assert 0.1 < scales[-1] / scales[0] < 10  # neither vanishes nor explodes
    scales += [float(activations[layer].std()) for layer in heads]
    assert 1e-3 < min(scales) <= max(scales) < 1e3
    assert logits.isfinite().all()
    assert 0.2 < logits.std(0).mean() < 5  # each class's, between images
    assert len(set(logits.argmax(1).tolist())) > 1


def test_random_weights_are_reproducible(network):
    spec, (model, _, _) = network
    torch.rand(1)  # moves the caller's generator
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(threads + 1)
    again = load_network(spec, "random").model
    used = torch.get_num_threads()
    torch.set_num_threads(threads)
    assert used == threads + 1
    assert torch.equal(torch.get_rng_state(), state)
    pairs = zip(model.state_dict().items(), again.state_dict().items(), strict=True)
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_from_a_file(suffix, narrow, tmp_path):
    # Without batch norms' counters, which old checkpoints lack.
    state = {k: v for k, v in narrow.state_dict().items() if not k.endswith("batches_tracked")}
    assert len(state) < len(narrow.state_dict())
    path = tmp_path / f"mine{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(state, path)
    model, _, note = load_network(NARROW, str(path))
    x = photographs(2)
    assert torch.equal(model(x), narrow(x))
    assert note == str(path)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    counters = [v for k, v in model.state_dict().items() if k.endswith("batches_tracked")]
    assert all(counter == 0 for counter in counters)


def test_weights_from_a_training_checkpoint(narrow, tmp_path):
    state = {f"module.{name}": value for name, value in narrow.state_dict().items()}
    torch.save({"model": state, "epoch": 3}, tmp_path / "a.pth")
    model, _, note = load_network(NARROW, tmp_path / "a.pth")
    x = photographs(2)
    assert torch.equal(model(x), narrow(x))
    assert note == f"{tmp_path / 'a.pth'}, read from 'model', prefix 'module.' removed"


def test_half_precision_becomes_float32(narrow, tmp_path):
    half = {k: v.half() if v.is_floating_point() else v for k, v in narrow.state_dict().items()}
    save_file(half, tmp_path / "half.safetensors")
    model = load_network(NARROW, tmp_path / "half.safetensors").model
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.classifier[1].weight, half["classifier.1.weight"].float())


def test_the_transform_matches_the_weights(narrow, tmp_path):
    first = zoo.MobileNet_V2_Weights.IMAGENET1K_V1
    for name, side in ((Path(first.url).name, 256), ("mine.pth", 232)):
        torch.save(narrow.state_dict(), tmp_path / name)
        assert load_network(NARROW, tmp_path / name).transform.resize_size == [side]
    image = torch.full((3, 300, 400), 255, dtype=torch.uint8)
    made = load_network(NARROW, tmp_path / "mine.pth").transform(image)
    assert made.shape == (3, 224, 224)
    white = [(1 - mean) / std for mean, std in ((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))]
    torch.testing.assert_close(made.mean((1, 2)), torch.tensor(white))


def test_checkpoints_of_other_architectures_raise(narrow, tmp_path):
    state = narrow.state_dict()
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(ModelError, match=r"a\.pth does not match the architecture of 'resnet50'"):
        load_network(NETWORKS["resnet50"], tmp_path / "a.pth")
    with pytest.raises(ModelError, match="the architecture of 'mobilenet_v2'"):
        load_network(MOBILENET, tmp_path / "a.pth")
    ten = {"classifier.1.weight": torch.zeros(10, 1280), "classifier.1.bias": torch.zeros(10)}
    torch.save(state | ten, tmp_path / "b.pth")
    with pytest.raises(ModelError, match=r"b\.pth has 10 outputs; expected ImageNet's 1000"):
        load_network(NARROW, tmp_path / "b.pth")
    with pytest.raises(ModelError, match="there is no file"):
        load_network(NARROW, tmp_path / "c.pth")


@pytest.mark.parametrize("name", ["alexnet", "mobilenet_v2", "resnet50", "vit_b_16"])
def test_failed_downloads_raise(name, cache):
    url = zoo.get_model_weights(name).DEFAULT.url
    with pytest.raises(ModelError, match=r"can't be downloaded \(.*no network") as error:
        load_network(NETWORKS[name])
    path = cache / url.rpartition("/")[2]
    assert f"expected {url} as {path}, or --weights FILE" in one_line(error)
    assert list(cache.iterdir()) == []


def test_a_width_without_torchvision_weights_raises(cache):
    with pytest.raises(ModelError, match=r"none for 'mobilenet_v2_035' \(of width 0\.35") as error:
        load_network(NARROW)
    assert "expected --weights FILE, or random" in one_line(error)
    assert not cache.exists()


def test_a_damaged_file_in_the_cache_raises(cache):
    url = zoo.MobileNet_V2_Weights.DEFAULT.url
    path = cache / url.rpartition("/")[2]
    cache.mkdir(parents=True)
    path.write_bytes(b"the beginning of a checkpoint")
    with pytest.raises(ModelError, match=re.escape(f"{path} is damaged")) as error:
        load_network(MOBILENET)
    assert url in one_line(error)
    assert path.read_bytes() == b"the beginning of a checkpoint"


def test_weights_are_downloaded_once(mobilenet, tmp_path, monkeypatch):
    served, default = tmp_path / "served", zoo.MobileNet_V2_Weights.DEFAULT
    served.mkdir()
    # In the old format, like torchvision's older files.
    torch.save(mobilenet.state_dict(), served / "a.pth", _use_new_zipfile_serialization=False)
    digest = hashlib.sha256((served / "a.pth").read_bytes()).hexdigest()
    good, bad = served / f"mobilenet_v2-{digest[:8]}.pth", served / "mobilenet_v2-00000000.pth"
    (served / "a.pth").rename(good)
    bad.write_bytes(good.read_bytes()[:-1])
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cache = tmp_path / "hub" / "checkpoints"

    monkeypatch.setattr(default.value, "url", bad.as_uri())
    with pytest.raises(ModelError, match=r"can't be downloaded .*invalid hash value") as error:
        load_network(MOBILENET)
    one_line(error)
    assert list(cache.iterdir()) == []

    monkeypatch.setattr(default.value, "url", good.as_uri())
    x = photographs(2)
    for _ in range(2):
        model, transform, note = load_network(MOBILENET)
        assert torch.equal(model(x), mobilenet(x))
        assert note == "MobileNet_V2_Weights.IMAGENET1K_V2"
        assert transform.resize_size == [232]
        good.unlink(missing_ok=True)  # the second time it comes from the cache
    assert [path.name for path in cache.iterdir()] == [good.name]


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        (None, (None, None, None)),
        ([], (None, None, None)),
        (["random"], ("random", "random", "random")),
        (["a.pth", "b.pth", "c.pth"], ("a.pth", "b.pth", "c.pth")),
        (["a.pth", "random", "./x=y.pth"], ("a.pth", "random", "./x=y.pth")),
        (["resnet50=r.pth"], (None, None, "r.pth")),
        (["resnet50=d/x=1.pth", "alexnet=random"], ("random", None, "d/x=1.pth")),
    ],
)
def test_weights_are_assigned_to_networks(weights, expected):
    names = ("alexnet", "mobilenet_v2_035", "resnet50")
    result = assign_weights(PRESETS["hayne2024"], weights)
    assert result == dict(zip(names, expected, strict=True))
    assert list(result) == list(names)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (
            ["a.pth"],
            "weights: a.pth for 3 networks; .* in the order alexnet, mobilenet_v2_035, res",
        ),
        (
            ["a.pth"] * 4,
            "for 3 networks; expected 'random', NAME=FILE for some, or a file for each",
        ),
        (["random", "random"], "random, random for 3 networks"),
        (["random", "alexnet=a.pth"], "random, alexnet=a.pth for 3 networks"),
        (["alexnet=a", "b", "c"], "alexnet=a, b, c for 3 networks"),
        (["vgg=a.pth"], "weights: 'vgg' is unknown; expected one of alexnet, mobilenet_v2_035"),
        (["mobilenet_v2=a.pth"], "'mobilenet_v2' is unknown"),
        (["alexnet=a", "alexnet=b"], "'alexnet=b' is empty or repeated; expected one alexnet=FILE"),
        (["alexnet="], "'alexnet=' is empty or repeated"),
    ],
)
def test_weights_that_do_not_fit_a_preset_raise(weights, message):
    with pytest.raises(ModelError, match=message) as error:
        assign_weights(PRESETS["hayne2024"], weights)
    one_line(error)


def test_weights_are_assigned_to_a_single_network():
    assert assign_weights(PRESETS["alexnet"], ["a.pth"]) == {"alexnet": "a.pth"}
    assert assign_weights(PRESETS["alexnet"], ["random"]) == {"alexnet": "random"}
