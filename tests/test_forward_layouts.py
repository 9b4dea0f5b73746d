"""Networks with tensors that are not dense, layers without neurons, and mixed dtypes."""

import itertools

import pytest
import torch
from _hook import Lambda, Net, check_cut
from torch import nn
from torch.utils import mkldnn

import repsim_kernels as rk
from repsim_kernels.errors import LayerError
from repsim_kernels.forward import AblatedForward


def through_mkldnn(m, x):
    return m.out(m.inner(m.cut(m.a(x)).to_mkldnn()).to_dense())


def through_coo(m, x):
    return torch.sparse.mm(m.cut(m.a(x)).relu().to_sparse(), m.out.weight.mT)


def through_csr(m, x):
    return m.cut(m.a(x)).relu().to_sparse_csr() @ m.out.weight.mT


def through_coo_and_back(m, x):
    return m.out(m.cut(m.a(x)).relu().to_sparse().to_dense())


def coo_in_the_head(m, x):
    return m.out(m.cut(m.a(x.relu().to_sparse().to_dense())))


def coo_from_head_to_tail(m, x):
    """The tail reads a sparse value of the head."""
    side = m.b(x).relu().to_sparse()
    return m.out(m.cut(m.a(x)) + side.to_dense())


def coo_buffer(m, x):
    return m.out(torch.sparse.mm(m.table, m.cut(m.a(x)).mT).mT)


def build_network(run, cut=None):
    torch.manual_seed(0)
    model = Net(run, cut)
    if run is through_mkldnn:
        model.inner = mkldnn.to_mkldnn(nn.Linear(4, 4).eval())
    model.register_buffer("table", torch.randn(4, 4).relu().to_sparse())
    return model.eval()


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")  # by to_mkldnn
@pytest.mark.parametrize(
    "run",
    [
        through_mkldnn,
        through_coo,
        through_csr,
        through_coo_and_back,
        coo_in_the_head,
        coo_from_head_to_tail,
        coo_buffer,
    ],
)
def test_networks_may_use_other_layouts_inside(run):
    check_cut(build_network(run), "cut", torch.randn(5, 6))


@pytest.mark.parametrize(
    ("run", "cut", "match"),
    [
        (
            lambda m, x: m.out(m.cut(m.a(x)).to_dense()),
            lambda h: h.to_sparse(),
            r"layer: 'cut' gives a tensor of layout torch\.sparse_coo; expected a dense one",
        ),
        (
            lambda m, x: m.out(m.cut(m.a(x)).to_dense()),
            lambda h: h.to_mkldnn(),
            r"layer: 'cut' gives a tensor of layout torch\._mkldnn; expected a dense one",
        ),
        (
            lambda m, x: m.cut(m.a(x)).to_sparse(),
            lambda h: h,
            r"model: it gives a tensor of layout torch\.sparse_coo; expected a dense one",
        ),
    ],
    ids=["sparse layer", "MKL-DNN layer", "sparse output"],
)
def test_layer_and_output_must_be_dense(run, cut, match):
    with pytest.raises(LayerError, match=match) as error:
        AblatedForward(build_network(run, Lambda(cut)), "cut").prefix(torch.randn(5, 6))
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_images_must_be_dense():
    forward = AblatedForward(build_network(through_coo_and_back), "cut")
    nested = torch.nested.nested_tensor([torch.randn(6)] * 3)
    for images, match in (
        (torch.randn(5, 6).to_sparse(), r"images: a tensor of layout torch\.sparse_coo; expected"),
        (nested, "images: a nested tensor; expected one dense tensor"),
    ):
        with pytest.raises(rk.DtypeError, match=match):
            forward.prefix(images)
    with pytest.raises(rk.DtypeError, match=r"images: a tensor inside torch\.func"):
        torch.vmap(lambda x: forward.prefix(x).activation)(torch.randn(2, 5, 6))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_layers_without_units_are_refused():
    for sizes, layer in (((6, 0, 3), "0"), ((6, 4, 0), "1")):
        parts = [nn.Linear(p, q) for p, q in itertools.pairwise(sizes)]
        model = nn.Sequential(*parts).eval()
        with pytest.raises(LayerError, match=f"layer: '{layer}' has no neurons, shape"):
            AblatedForward(model, layer).prefix(torch.randn(5, 6))


def test_networks_may_have_two_dtypes():
    torch.manual_seed(0)
    model = Net(lambda m, x: m.out(m.cut(m.a(x)).double())).eval()
    model.out.double()
    check_cut(model, "cut", torch.randn(5, 6))
    broken = Net(lambda m, x: m.out(m.cut(m.a(x)))).eval()
    broken.out.double()
    match = "float32 of shape .*, with parameters of float32 and float64: "
    with pytest.raises(LayerError, match=match):
        AblatedForward(broken, "cut").prefix(torch.randn(5, 6))


class Padded(nn.Module):
    """An encoder with two padding tokens; `traceable` is whether fx can trace it."""

    def __init__(self, nested, traceable):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)
        self.out, self.traceable = nn.Linear(8, 3), traceable
        self.register_buffer("padding", torch.arange(5)[None] > 2)

    def forward(self, x):
        n = x.shape[0] if self.traceable else len(x)
        mask = self.padding.expand(n, -1)
        return self.out(self.encoder(x, src_key_padding_mask=mask).mean(1))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("traceable", [True, False])
@pytest.mark.parametrize("layer", ["encoder", "encoder.layers.0", "encoder.layers.1.linear1"])
@pytest.mark.parametrize("nested", [True, False])
def test_encoders_with_padding_match_a_hook_or_are_refused(nested, layer, traceable):
    torch.manual_seed(0)
    model, images = Padded(nested, traceable).eval(), torch.randn(4, 5, 8)
    forward = AblatedForward(model, layer)
    if nested and not (traceable and layer == "encoder"):
        match = "differs from a whole pass" if layer == "encoder" else "gives a nested tensor"
        with pytest.raises(LayerError, match=f"{match}; .* pass enable_nested_tensor=False$"):
            forward.prefix(images)
        return
    state = forward.prefix(images)
    cells = torch.arange(state.activation[0].numel()) % 3
    got = forward.logits(state, cells)
    for c in range(3):
        handle = model.get_submodule(layer).register_forward_hook(
            lambda _m, _i, out, c=c: out.clone().masked_fill_((cells == c).view(out[0].shape), 0)
        )
        with torch.no_grad():
            torch.testing.assert_close(got[c], model(images))
        handle.remove()


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_heads_of_an_encoder_with_padding_are_ablated_or_refused(nested):
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=nested
    ).eval()
    inputs = {"src": torch.randn(4, 5, 8), "src_key_padding_mask": torch.arange(20).view(4, 5) > 17}
    forward = AblatedForward(encoder, "layers.1.self_attn:heads")
    if nested:
        match = r"under a forward hook on 'layers.1.*pass enable_nested_tensor=False$"
        with pytest.raises(LayerError, match=match):
            forward.prefix(inputs)
        return
    state = forward.prefix(inputs)
    ablated = forward.logits(state, torch.arange(8) // 4 - torch.zeros(5, 1, dtype=torch.int64))
    for c in range(2):
        projection = encoder.layers[1].self_attn.out_proj
        weight = projection.weight.detach().clone()
        projection.weight.data[:, 4 * c : 4 * c + 4] = 0
        with torch.no_grad():
            torch.testing.assert_close(ablated[c], encoder(**inputs))
        projection.weight.data = weight


def test_an_error_that_only_the_trace_raises_is_named():
    class Shifty(nn.Module):
        def forward(self, x):
            if isinstance(x, torch.fx.Proxy) or torch.compiler.is_exporting():
                return torch.ops.aten.view.default(x, [-1, 7])
            return x

    model = Net(lambda m, x: m.out(m.inner(m.cut(m.a(x)))))
    model.inner = Shifty()
    match = r"cut at 'cut', its torch\.fx trace raises an error that a whole pass doesn't \(.*\); "
    with pytest.raises(LayerError, match=match):
        AblatedForward(model.eval(), "cut").prefix(torch.randn(5, 6))
