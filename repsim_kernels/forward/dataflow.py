"""Which operations of a network depend on a layer, and which memory each one reads and writes.

One pass over two images records the memory that every operation reads, returns and writes to.
PyTorch counts the writes to each tensor, so no list of in-place operations is needed. The *tail* is
every operation that can see the layer's output, through a value or through shared memory; the
*head* is the rest. Both keep the network's order and its in-place operations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from repsim_kernels.errors import LayerError
from repsim_kernels.forward import exported
from repsim_kernels.forward.inputs import Inputs
from repsim_kernels.forward.trace import TRANSIENT, Trace, Values, get_label

# On its fast path only, the encoder drops what it would compute at padded positions.
NESTED_HINT = "; for nn.TransformerEncoder, pass enable_nested_tensor=False"


@dataclass
class Step:
    """An operation, and the values that can be dropped after it."""

    node: fx.Node
    to_drop: tuple[fx.Node, ...]  # values that no later step needs


@dataclass
class Split:
    """A traced network cut at one layer. Sizes and counts are per image."""

    layer: str
    cut: fx.Node
    head: list[Step]
    tail: list[Step]
    inputs: list[fx.Node]  # the head's values that the tail reads, without the activation
    per_image_inputs: list[fx.Node]  # the inputs that depend on the images, without `sizes`
    sizes: list[fx.Node]  # the inputs that are numbers, proportional to the number of images
    mutated_inputs: list[fx.Node]  # the head's values that the tail writes to
    first_writes: dict[fx.Node, list[fx.Node]]  # tail operation -> inputs it is the first to write
    copy_images: bool  # the head writes to the images, or a state would hold them
    copy_activation: bool  # another value shares the activation's memory
    no_shared_memory: bool  # no two of `mutated_inputs` share memory
    batchable: bool  # several cells may run in one pass
    hook_keeps_bits: bool  # a hook that changes nothing leaves the output bit-identical
    state_bytes: int  # what a state holds: the activation and `per_image_inputs`
    tail_peak_bytes: int  # the most that the tail holds at one moment
    pass_peak_bytes: int  # the most that a whole pass holds
    head_flops: float
    tail_flops: float
    weight_bytes: int  # parameters and buffers that the tail reads; not per image
    oom_limit: int | None = None  # cells x images that fit in one pass, once memory has run out


def split_at_layer(
    trace: Trace, layer: str, inputs: Inputs, flops: dict[fx.Node, int] | None = None
) -> Split:
    """Run a network as under a hook that returns a clone, and split it into head and tail.

    `flops` has the floating-point operations that were counted in an earlier pass of these inputs;
    this pass counts the others, and adds them.

    Raises LayerError if the output of the layer or the model is not a tensor (n, …), or if a pass
    writes to the model's parameters or buffers.
    """
    cut = trace.find_cut(layer)
    list_written = watch_writes(trace.model)
    n, values = len(inputs), trace.bind(inputs)
    flops = {} if flops is None else flops
    effects: dict[fx.Node, _Effects] = {}
    tensors: list[Tensor] = []  # all so far, with the number of writes to each
    versions: list[int] = []
    for x in trace.nodes:
        if x not in values and x not in flops:
            value, flops[x] = _run_counted(trace, x, values)
        else:
            value = values[x] if x in values else trace.run(x, values)
        writes: set[int] = set()
        current = [t._version for t in tensors]
        if current != versions:
            pairs = zip(tensors, versions, current, strict=True)
            writes = _union(_measure_storage(t).keys() for t, old, new in pairs if new != old)
        if x is cut:
            check_units(value, n, layer)
            original, value = value, value.clone()  # both stay alive, so no address is reused
        values[x] = value
        added = [t for t in collect_tensors(value) if not t.is_inference()]
        tensors += added
        versions = current + [t._version for t in added]
        effects[x] = _Effects(
            reads=_union(
                _measure_storage(t).keys()
                for y in x.all_input_nodes
                for t in collect_tensors(values[y])
            ),
            outputs=_measure_storage(*collect_tensors(value)),
            writes=writes,
            is_batch=_is_batch(value, n),
            is_size=exported.is_size(x) and value % n == 0,
            flops=flops.get(x, 0),
            weight_bytes=sum(_measure_storage(*trace.get_weights(x)).values()),
        )
    check_batch(values[trace.output], n, "model: it")
    written = _union(effect.writes for effect in effects.values())
    constants = (
        get_label(x) for x in effects if x.op == "get_attr" and written & set(effects[x].outputs)
    )
    check_unwritten([*list_written(), *constants])
    (address,) = _measure_storage(original)
    batches = [x for i, x in enumerate(trace.inputs) if inputs.is_batch(i)]
    return _build_split(effects, layer, cut, address, (trace.inputs, batches), n)


def _run_counted(trace: Trace, node: fx.Node, values: Values) -> tuple[Any, int]:
    """Run an operation; return its value and its number of floating-point operations.

    The counter decomposes fused operations, which fails under autocast; those count as 0.
    """
    try:
        with FlopCounterMode(display=False) as counter:
            value = trace.run(node, values)
    except TRANSIENT:
        raise
    except Exception:
        return trace.run(node, values), 0
    return value, counter.get_total_flops()


@dataclass
class _Effects:
    """The memory that an operation touches: addresses, with sizes in bytes for its outputs."""

    reads: set[int]
    outputs: dict[int, int]
    writes: set[int]
    is_batch: bool  # the value is a tensor (n, …)
    is_size: bool  # the value is a multiple of n
    flops: int
    weight_bytes: int  # parameters and buffers that it reads


def _build_split(
    effects: dict[fx.Node, _Effects],
    layer: str,
    cut: fx.Node,
    address: int,
    inputs: tuple[list[fx.Node], list[fx.Node]],
    n: int,
) -> Split:
    """Split a pass over n images into head and tail.

    The layer's output is at `address`. `inputs` has all inputs of the network, and those with one
    entry for each image.
    """
    images, batches = inputs
    nodes = [x for x in effects if x not in images]
    in_tail = _find_dependents(effects, cut) - {cut} | {nodes[-1]}
    head, tail = [x for x in nodes if x not in in_tail], [x for x in nodes if x in in_tail]
    crossing = [x for x in effects if x not in in_tail and not in_tail.isdisjoint(x.users)]
    written = _union(effects[x].writes for x in tail)
    mutated = [x for x in crossing if written & set(effects[x].outputs)]
    addresses = [key for x in mutated for key in effects[x].outputs]
    no_shared_memory = len(set(addresses)) == len(addresses)
    first_writes: dict[fx.Node, list[fx.Node]] = {}
    for x in mutated:
        first = next(y for y in tail if effects[y].writes & set(effects[x].outputs))
        first_writes.setdefault(first, []).append(x)
    stored_or_written = _union(effects[x].outputs for x in crossing) | _union(
        effects[x].writes for x in head
    )
    from_images = set().union(*(_find_dependents(effects, x) for x in batches))
    held = [x for x in crossing if x is not cut]
    sizes = [x for x in held if effects[x].is_size]
    per_image = [x for x in held if x in from_images and x not in sizes]
    steps = schedule(tail, {nodes[-1]})
    whole = schedule(nodes, {nodes[-1]})
    return Split(
        layer=layer,
        cut=cut,
        head=schedule(head, {*held, cut}),
        tail=steps,
        inputs=held,
        per_image_inputs=per_image,
        sizes=sizes,
        mutated_inputs=mutated,
        first_writes=first_writes,
        copy_images=bool(stored_or_written & _union(effects[x].outputs for x in images)),
        copy_activation=any(
            address in effects[x].outputs for x in effects if x in images or set(x.users) != {cut}
        ),
        no_shared_memory=no_shared_memory,
        batchable=no_shared_memory and all(effects[x].is_batch for x in per_image),
        hook_keeps_bits=True,
        state_bytes=_count_bytes(effects, [cut, *per_image]) // n,
        tail_peak_bytes=-(-_find_peak_bytes(effects, steps, {cut, *per_image}) // n),
        pass_peak_bytes=-(-_find_peak_bytes(effects, whole, set(images)) // n),
        head_flops=sum(effects[x].flops for x in head) / n,
        tail_flops=sum(effects[x].flops for x in tail) / n,
        weight_bytes=sum(effects[x].weight_bytes for x in tail),
    )


def _find_dependents(effects: dict[fx.Node, _Effects], source: fx.Node) -> set[fx.Node]:
    """Return `source` and the operations to rerun when its value changes.

    An operation depends on `source` if it reads a dependent value, or memory that a dependent
    operation has written to. It also depends on `source` if it writes to memory that an earlier
    dependent operation reads: on a rerun, that operation would find the write already made.
    """
    dependents, written, read = {source}, set[int](), set[int]()
    for x, effect in effects.items():
        reads = not dependents.isdisjoint(x.all_input_nodes) or written & effect.reads
        if x is not source and (reads or read & effect.writes):
            dependents.add(x)
            written |= effect.writes
            read |= effect.reads
    return dependents


def schedule(nodes: list[fx.Node], keep: set[fx.Node]) -> list[Step]:
    """Return the operations in their order, each with the values that it is the last to need."""
    needed, steps = set(keep), []
    for x in reversed(nodes):
        to_drop = tuple(y for y in (x, *x.all_input_nodes) if y not in needed)
        needed.update(to_drop)
        steps.append(Step(x, to_drop))
    return steps[::-1]


def _find_peak_bytes(
    effects: dict[fx.Node, _Effects], steps: list[Step], alive: set[fx.Node]
) -> int:
    alive, peak = set(alive), 0
    for step in steps:
        alive.add(step.node)
        peak = max(peak, _count_bytes(effects, alive))
        alive.difference_update(step.to_drop)
    return peak


def _count_bytes(effects: dict[fx.Node, _Effects], nodes: Iterable[fx.Node]) -> int:
    """Return the bytes of some operations' outputs; memory that several share counts once."""
    return sum({key: size for x in nodes for key, size in effects[x].outputs.items()}.values())


def get_version(t: Tensor) -> int:
    """Return the number of writes to a tensor, or to others that share its memory."""
    return 0 if t.is_inference() else t._version


def collect_tensors(value: Any) -> list[Tensor]:
    """Return the tensors in nested tuples, lists and dicts."""
    tensors: list[Tensor] = []
    fx.node.map_aggregate(value, lambda x: tensors.append(x) if isinstance(x, Tensor) else None)
    return tensors


def _measure_storage(*tensors: Tensor) -> dict[int, int]:
    """Return the bytes of the memory behind tensors, by address.

    MKL-DNN's layout has no readable address and no views. Its key is the id of the tensor, which
    the pass keeps alive.
    """
    sizes: dict[int, int] = {}
    for t in tensors:
        if t.layout == torch.sparse_coo:
            sizes |= _measure_storage(t._indices(), t._values())
        elif t.layout in (torch.sparse_csr, torch.sparse_bsr):
            sizes |= _measure_storage(t.crow_indices(), t.col_indices(), t.values())
        elif t.layout in (torch.sparse_csc, torch.sparse_bsc):
            sizes |= _measure_storage(t.ccol_indices(), t.row_indices(), t.values())
        elif t.layout == torch.strided:
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        else:
            sizes[id(t)] = t.numel() * t.element_size()
    return sizes


def _is_batch(value: Any, n: int) -> bool:
    """Whether a value is a tensor (n, …) whose rows can be selected and repeated."""
    dense = isinstance(value, Tensor) and value.layout == torch.strided
    return dense and value.shape[:1] == (n,)


def _union(sets: Iterable[Iterable[int]]) -> set[int]:
    return set().union(*sets)


def watch_writes(model: nn.Module) -> Callable[[], list[str]]:
    """Return a function that lists the parameters and buffers written to since this call."""
    named = [*model.named_parameters(), *model.named_buffers()]
    versions = [(name, t, get_version(t)) for name, t in named]
    return lambda: [name for name, t, old in versions if get_version(t) != old]


def check_unwritten(written: list[str]) -> None:
    """Raise LayerError if a pass wrote to any of the model's tensors."""
    if written:
        raise LayerError(
            f"model: a pass writes to its {written[0]!r}; expected a pass that writes to no "
            "parameter or buffer"
        )


def check_batch(value: Any, n: int, what: str) -> Tensor:
    """Check that a value is a dense tensor with one entry for each image."""
    if not isinstance(value, Tensor):
        kind = type(value).__name__.removeprefix("immutable_")
        raise LayerError(f"{what} gives a value of type {kind}; expected a tensor (n, …)")
    if value.is_nested:
        raise LayerError(f"{what} gives a nested tensor; expected a dense one (n, …){NESTED_HINT}")
    if value.layout != torch.strided:
        raise LayerError(
            f"{what} gives a tensor of layout {value.layout}; expected a dense one (n, …)"
        )
    if value.shape[:1] != (n,):
        shape = tuple(value.shape)
        raise LayerError(f"{what} gives a tensor {shape} for {n} images; expected (n, …)")
    return value


def check_units(value: Any, n: int, layer: str) -> Tensor:
    """Check that a layer's output is a tensor (n, …) with at least one neuron."""
    out = check_batch(value, n, f"layer: {layer!r}")
    if not out.numel():
        shape = tuple(out.shape)
        raise LayerError(f"layer: {layer!r} has no neurons, shape {shape}; expected at least one")
    return out
