"""Causal tracing in GPT-2: heads and tokens of one prompt patched into another, against hooks."""

import numpy as np
import pytest
import torch
from torch import nn

from repsim_kernels.forward import AblatedForward
from repsim_kernels.forward.fills import draw_other_images

transformers = pytest.importorskip("transformers")

PROMPTS, TOKENS, HEADS, WIDTH, LAYERS = 3, 6, 4, 16, 2
ATTENTION = [f"transformer.h.{i}.attn" for i in range(LAYERS)]


@pytest.fixture(scope="module")
def gpt2():
    """A network of two small blocks with random weights."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=LAYERS, n_head=HEADS, n_embd=WIDTH, vocab_size=20, n_positions=8,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def draw_prompts():
    """Clean and corrupted prompts, which differ in one token."""
    clean = torch.randint(20, (PROMPTS, TOKENS), generator=torch.Generator().manual_seed(1))
    corrupted = clean.clone()
    corrupted[:, 2] = (clean[:, 2] + 7) % 20
    return clean, corrupted


def get_logits(model, tokens):
    return model(tokens).logits


def get_last_logits(model, tokens):
    return model(tokens, logits_to_keep=1).logits[:, -1]


def run_patched(model, layer, tokens, change, call=get_logits):
    """The network's output with what the heads of a layer return changed by a function."""
    projection = model.get_submodule(layer).c_proj
    handle = projection.register_forward_pre_hook(lambda _module, args: (change(args[0]),))
    try:
        with torch.no_grad():
            return call(model, tokens)
    finally:
        handle.remove()


def record_heads(model, layer, tokens):
    """What the heads of a layer return, (prompts, tokens, width)."""
    kept = []
    run_patched(model, layer, tokens, lambda x: kept.append(x.clone()) or x)
    return kept[0]


def write(x, part, values):
    """A copy of x with the features `part`, a slice or an index into (tokens, width), replaced."""
    x = x.clone()
    x[(slice(None), *part)] = values[(slice(None), *part)]
    return x


def select_head(head):
    e = WIDTH // HEADS
    return slice(None), slice(head * e, (head + 1) * e)


HEAD_CELLS = np.arange(WIDTH) // (WIDTH // HEADS)  # broadcasts over the tokens


@pytest.mark.parametrize("call", [get_logits, get_last_logits])
@pytest.mark.parametrize("layer", ATTENTION)
def test_every_head_patched_from_the_clean_prompts(gpt2, layer, call):
    clean, corrupted = draw_prompts()
    names = [f"{name}:heads" for name in ATTENTION]
    forward = AblatedForward(gpt2, names, call=call)
    states = forward.prefixes(corrupted)
    source = forward.prefixes(clean)[f"{layer}:heads"]
    assert torch.equal(source.activation, record_heads(gpt2, layer, clean))
    state = states[f"{layer}:heads"]
    patched = forward.logits(state, HEAD_CELLS, fill=source, batch=1)
    assert len(patched) == forward.count_heads(f"{layer}:heads") == HEADS
    with torch.no_grad():
        intact = call(gpt2, corrupted)
    for head in range(HEADS):
        want = run_patched(
            gpt2,
            layer,
            corrupted,
            lambda x, head=head: write(x, select_head(head), source.activation),
            call,
        )
        assert torch.equal(patched[head], want)
        assert not torch.equal(want, intact)
    batched = forward.logits(state, HEAD_CELLS, fill=source, batch=HEADS)
    torch.testing.assert_close(batched, patched, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fill", ["zero", "mean", "resample"])
@pytest.mark.parametrize("layer", ATTENTION)
def test_every_head_ablated(gpt2, layer, fill):
    tokens = draw_prompts()[0]
    forward = AblatedForward(gpt2, f"{layer}:heads", call=get_logits)
    values = {
        "zero": torch.zeros_like,
        "mean": lambda x: x.mean(0, dtype=torch.float64).float().expand_as(x),
        "resample": lambda x: x[draw_other_images(len(x), 5)],
    }[fill]
    got = forward.logits(forward.prefix(tokens), HEAD_CELLS, fill=fill, seed=5, batch=1)
    for head in range(HEADS):
        want = run_patched(
            gpt2, layer, tokens, lambda x, head=head: write(x, select_head(head), values(x))
        )
        assert torch.equal(got[head], want)


def test_one_head_at_one_token(gpt2):
    clean, corrupted = draw_prompts()
    layer = ATTENTION[1]
    forward = AblatedForward(gpt2, f"{layer}:heads", call=get_logits)
    state, source = forward.prefix(corrupted), forward.prefix(clean)
    cells = np.arange(TOKENS)[:, None] * HEADS + HEAD_CELLS  # (tokens, width)
    patched = forward.logits(state, cells, fill=source, batch=1)
    assert len(patched) == TOKENS * HEADS
    e = WIDTH // HEADS
    for c in range(TOKENS * HEADS):
        t, head = divmod(c, HEADS)
        part = t, slice(head * e, (head + 1) * e)
        want = run_patched(
            gpt2, layer, corrupted, lambda x, part=part: write(x, part, source.activation)
        )
        assert torch.equal(patched[c], want)
    with torch.no_grad():
        intact = get_logits(gpt2, corrupted)
    # The prompts agree before the token that differs, so patches there have no effect.
    unchanged = [torch.equal(logits, intact) for logits in patched]
    assert unchanged == [c < 2 * HEADS for c in range(TOKENS * HEADS)]


def test_the_residual_stream_at_every_token(gpt2):
    clean, corrupted = draw_prompts()
    block = gpt2.transformer.h[0]
    forward = AblatedForward(gpt2, "transformer.h.0", call=get_logits)
    state, source = forward.prefix(corrupted), forward.prefix(clean)
    patched = forward.logits(state, np.arange(TOKENS)[:, None], fill=source, batch=1)
    for t in range(TOKENS):
        handle = block.register_forward_hook(
            lambda _m, _i, out, t=t: write(out, (t, slice(None)), source.activation)
        )
        with torch.no_grad():
            want = get_logits(gpt2, corrupted)
        handle.remove()
        assert torch.equal(patched[t], want)


def test_patching_everything_gives_the_clean_output(gpt2):
    clean, corrupted = draw_prompts()
    forward = AblatedForward(gpt2, "transformer.h.1", call=get_logits)
    state, source = forward.prefix(corrupted), forward.prefix(clean)
    patched = forward.logits(state, np.zeros((TOKENS, WIDTH), int), fill=source, batch=1)
    assert torch.equal(patched[0], forward.intact(source))
    assert not torch.equal(patched[0], forward.intact(state))


def test_the_blocks_before_the_cut_do_not_run_again(gpt2):
    clean, corrupted = draw_prompts()
    name = f"{ATTENTION[1]}:heads"
    forward = AblatedForward(gpt2, name, call=get_logits)
    state, source = forward.prefix(corrupted), forward.prefix(clean)
    tail, ran, run = [step.node for step in state._split.tail], [], type(state._trace).run

    def record(self, node, values):
        ran.append(node)
        return run(self, node, values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(state._trace), "run", record)
        forward.logits(state, HEAD_CELLS, fill=source, batch=1)
    assert ran == tail * HEADS
    assert 0 < len(tail) < len(state._split.head)
