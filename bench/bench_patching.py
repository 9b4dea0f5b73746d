"""Patches of attention heads in a GPT-2, against a whole pass under a hook for each patch.

A patch runs the network on one set of prompts, with the values of one head replaced by those of
another set. The hook runs everything again for each; `AblatedForward` runs what is behind the head.
"""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import repsim_kernels as rk
from bench.common.machine import Json, describe_environment, format_seconds
from bench.common.records import describe_device
from bench.peers.tables import format_markdown_table
from repsim_kernels.forward import AblatedForward, State

_SIZES: dict[bool, Json] = {  # by `quick`; otherwise the sizes of GPT-2 small
    False: {
        "layers": 12, "heads": 12, "width": 768, "vocabulary": 50257, "prompts": 8, "tokens": 32,
    },
    True: {
        "layers": 3, "heads": 2, "width": 16, "vocabulary": 40, "prompts": 3, "tokens": 5,
    },
}  # fmt: skip
_KEPT = {"all positions": 0, "the last position": 1}  # logits of the last k positions; 0: of all
AIMS = {"all positions": 1.4, "the last position": 1.7}  # time of the hook / time of this package


def measure_patching(quick: bool = False) -> Json:
    """Return the record: seconds of all patches by both methods, and how their logits differ."""
    if importlib.util.find_spec("transformers") is None:
        raise RuntimeError("transformers is not installed; it is in the extra `dev`")
    sizes = _SIZES[quick]
    torch.manual_seed(0)
    model = build_gpt2(sizes)
    prompts, others = torch.randint(sizes["vocabulary"], (2, sizes["prompts"], sizes["tokens"]))
    return {
        "environment": describe_environment("cpu", ("transformers",)),
        **sizes,
        "rows": [
            {"logits": logits} | _measure(model, prompts, others, kept)
            for logits, kept in _KEPT.items()
        ],
    }


def build_gpt2(sizes: Json) -> Any:
    """Build a GPT2LMHeadModel with random weights, in evaluation mode."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=sizes["layers"],
        n_head=sizes["heads"],
        n_embd=sizes["width"],
        vocab_size=sizes["vocabulary"],
        n_positions=max(64, sizes["tokens"]),
    )
    model: Any = GPT2LMHeadModel(config)
    return model.eval().requires_grad_(False)


def get_logits(model: nn.Module, prompts: Tensor, kept: int) -> Tensor:
    """Return the logits of the last `kept` positions; of all if it is 0."""
    logits: Tensor = model(input_ids=prompts, use_cache=False, logits_to_keep=kept).logits
    return logits


def _measure(model: Any, prompts: Tensor, others: Tensor, kept: int) -> Json:
    """Patch every head by both methods, which take turns layer by layer, and compare the logits."""
    call = partial(get_logits, kept=kept)
    layers = [f"transformer.h.{i}.attn:heads" for i in range(model.config.n_layer)]
    forward = AblatedForward(model, layers, call=call)
    start = time.perf_counter()
    costs = forward.costs(prompts, timed=False)  # traces the network
    states = forward.prefixes(prompts)  # verifies the cuts
    record: Json = {
        "setup_seconds": time.perf_counter() - start,
        "patches": len(layers) * model.config.n_head,
        "equal": 0,
        "largest_difference": 0.0,
        "operations": sum(cost.head_flops + cost.tail_flops for cost in costs.values()),
        "operations_behind": sum(cost.tail_flops for cost in costs.values()),
    }
    ours, (states, sources) = _time(lambda: (forward.prefixes(prompts), forward.prefixes(others)))
    theirs, outputs = _time(lambda: _record_heads(model, call, others))
    for i, layer in enumerate(layers):
        methods: list[Callable[[], Any]] = [
            partial(_patch_heads, forward, states[layer], sources[layer]),
            partial(_patch_with_hooks, model, call, prompts, i, outputs[i]),
        ]
        timed = {which: _time(methods[which]) for which in (i % 2, (i + 1) % 2)}
        (seconds, got), (hook_seconds, want) = timed[0], timed[1]
        ours, theirs = ours + seconds, theirs + hook_seconds
        record["equal"] += sum(map(torch.equal, got, want))
        differences = [float((a - b).abs().max()) for a, b in zip(got, want, strict=True)]
        record["largest_difference"] = max(record["largest_difference"], *differences)
    return record | {"seconds": ours, "hook_seconds": theirs}


def _time(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def _patch_heads(forward: AblatedForward, state: State, source: State) -> Tensor:
    """Return the logits after each patch of a layer's heads."""
    cells = rk.cells.heads(state.activation.shape[1:], forward.count_heads(state.layer))
    return forward.logits(state, cells, fill=source, batch=1)


def _patch_with_hooks(
    model: Any,
    call: Callable[..., Tensor],
    prompts: Tensor,
    layer: int,
    values: Tensor,
) -> list[Tensor]:
    """Return the logits after each patch of a layer's heads, by a whole pass for each."""
    logits = []
    size = values.shape[-1] // model.config.n_head
    for head in range(model.config.n_head):

        def replace(
            heads: Tensor, columns: slice = slice(head * size, (head + 1) * size)
        ) -> Tensor:
            patched = heads.clone()
            patched[..., columns] = values[..., columns]
            return patched

        with _hook_heads(model, layer, replace), torch.no_grad():
            logits.append(call(model, prompts))
    return logits


def _record_heads(model: Any, call: Callable[..., Tensor], prompts: Tensor) -> list[Tensor]:
    """Return what the heads of each layer return, (prompts, tokens, width)."""
    recorded: list[Tensor] = []
    hooks = []
    for block in model.transformer.h:
        hooks.append(
            block.attn.c_proj.register_forward_pre_hook(
                lambda _module, arguments: recorded.append(arguments[0].clone())
            )
        )
    with torch.no_grad():
        call(model, prompts)
    for hook in hooks:
        hook.remove()
    return recorded


@contextmanager
def _hook_heads(model: Any, layer: int, replace: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace what the heads of a layer return, before they are projected."""
    projection = model.transformer.h[layer].attn.c_proj
    hook = projection.register_forward_pre_hook(lambda _module, heads: (replace(*heads),))
    try:
        yield
    finally:
        hook.remove()


def compute_bound(row: Json) -> float:
    """Return the number of all products with weights, relative to those behind the heads."""
    return row["operations"] / row["operations_behind"]


def count_patches_to_lead(row: Json) -> str:
    """Return after how many patches the set-up has paid off."""
    saved = (row["hook_seconds"] - row["seconds"]) / row["patches"]
    return f"{math.ceil(row['setup_seconds'] / saved):,}" if saved > 0 else "never"


def describe_patching(record: Json) -> str:
    """Return the record in words and a table, also for bench/README.md."""
    table = []
    for row in record["rows"]:
        times = [format_seconds(row[key]) for key in ("seconds", "hook_seconds")]
        ratio = f"{row['hook_seconds'] / row['seconds']:.2f}"
        equal = f"{row['equal']} of {row['patches']}"
        if row["equal"] < row["patches"]:
            equal += f", up to {row['largest_difference']:.0e} apart"
        bound, aim = f"{compute_bound(row):.2f}", f"{AIMS[row['logits']]:.1f}"
        setup = format_seconds(row["setup_seconds"]), count_patches_to_lead(row)
        table.append([row["logits"], *times, ratio, aim, bound, equal, *setup])
    sizes = {key: f"{record[key]:,}" for key in ("layers", "heads", "prompts", "tokens")}
    head = ["logits", "this package", "a hook", "ratio", "aim", "bound", "bit-equal"]
    head += ["set-up", "ahead after"]
    return f"""\
On {describe_device(record)}: a GPT-2 with random weights, {sizes["layers"]} layers of \
{sizes["heads"]} heads, width {record["width"]:,}; each head is patched alone, on \
{sizes["prompts"]} prompts of {sizes["tokens"]} tokens. Times are those of all patches, with the \
passes that both sets of prompts need first. The bound is the number of all products with weights \
divided by that of those behind the patched heads. The times do not include the set-up, which \
traces and verifies the network once; the last column is the number of patches that make up for it.

{format_markdown_table(head, table)}"""
