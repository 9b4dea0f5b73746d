"""Checks of a layer of heads: every head against whole passes under a hook."""

import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.flop_counter import FlopCounterMode

from repsim_kernels.forward import AblatedForward


def make_head_cells(activation, n_heads):
    """Membership (n_heads, p) of the heads in an activation (n, t, d)."""
    t, d = activation.shape[1:]
    cells = torch.zeros(n_heads, t, n_heads, d // n_heads, dtype=torch.bool)
    for h in range(n_heads):
        cells[h, :, h] = True
    return cells.flatten(1)


def check_heads(model, layers, inputs, run, run_hooked, n_heads):
    """Check each head of each layer, bit for bit, and that what precedes a layer never reruns.

    ``run(model, inputs)`` gives the output. ``run_hooked(layer, mask)`` gives it with the heads'
    outputs (n, t, d) zero where the mask (t, d) is true. Returns the forward and its states.
    """
    forward = AblatedForward(model, layers, call=run)
    states = forward.prefixes(inputs)
    for layer, state in states.items():
        assert forward.count_heads(layer) == n_heads
        cells = make_head_cells(state.activation, n_heads)
        logits = forward.logits(state, cells, batch=1)
        masks = cells.view(n_heads, *state.activation.shape[1:])
        with torch.no_grad():
            expected = [run_hooked(layer, mask) for mask in masks]
            plain = run(model, inputs)
        for h in range(n_heads):
            assert torch.equal(logits[h], expected[h]), (layer, h)
            assert not torch.allclose(logits[h], plain, rtol=1e-3), (layer, h)
        assert torch.equal(forward.intact(state), plain)
        torch.testing.assert_close(forward.logits(state, cells), logits, rtol=1e-4, atol=1e-5)
        check_only_the_rest_runs(forward, state, cells[:1])
    return forward, states


def check_only_the_rest_runs(forward, state, cell):
    """Check by modules and by operations that a patch runs what follows the layer, and no more."""
    called = []
    handle = register_module_forward_pre_hook(lambda module, _inputs: called.append(module))
    try:
        with FlopCounterMode(display=False) as counter:
            forward.logits(state, cell, batch=1)
    finally:
        handle.remove()
    split = state._split
    assert counter.get_total_flops() == split.tail_flops * len(state)
    assert split.head_flops > 0
    assert set(called) <= {
        state._trace.get_module(step.node) for step in split.tail if step.node.op == "call_module"
    }
    assert len(called) == len(set(called))
