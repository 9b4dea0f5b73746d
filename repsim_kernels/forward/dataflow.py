"""What the operations of a network read and write, and which of them depend on a layer.

A pass over two stimuli shows whose memory each of them reads, gives and writes to: PyTorch counts
the writes to every tensor, so that no list of in-place operations is needed. The *tail* is every
operation that can see what the layer gave, through values or through shared memory; the *head* is
the others. Both keep the network's order and its in-place operations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from repsim_kernels.errors import LayerError
from repsim_kernels.forward.trace import TRANSIENT, Trace, Values, label

# Of padded stimuli the encoder drops what the padding would give, on its fast path alone.
NOT_NESTED = ", as of nn.TransformerEncoder with enable_nested_tensor=False"


@dataclass
class Step:
    node: fx.Node
    dropped: tuple[fx.Node, ...]  # what nothing after it needs


@dataclass
class Split:
    layer: str
    cut: fx.Node
    head: list[Step]
    tail: list[Step]
    inputs: list[fx.Node]  # what the tail takes from the head besides the activation
    varying: list[fx.Node]  # those that depend on the images
    changed: list[fx.Node]  # what the tail takes from the head and writes to
    writes: dict[fx.Node, list[fx.Node]]  # by operation of the tail, those it is the first to write
    copy_images: bool  # the head writes to them, or a state would hold them
    copy_activation: bool  # another value shares its memory
    apart: bool  # no two of `changed` share memory
    batchable: bool  # cells may run together
    plain: bool  # a hook that changes nothing leaves the output bit-identical
    held: int  # bytes a stimulus of a state: the activation and what varies
    peak: int  # bytes a stimulus, the most that the tail holds at once
    whole_peak: int  # and that a whole pass holds
    head_flops: float  # a stimulus
    tail_flops: float
    weights: int  # bytes of parameters and buffers that the tail reads
    most: int | None = None  # cells x stimuli that fit together, once memory ran out


def split(trace: Trace, layer: str, images: Tensor) -> Split:
    """Run the network as under a hook that returns a clone, and see who touches what.

    Raises LayerError where the layer or the model gives no tensor (n, …), or a pass writes to the
    model's own tensors.
    """
    cut = trace.cut(layer)
    written_since = watch_writes(trace.model)
    values: Values = {}
    facts: dict[fx.Node, _Facts] = {}
    seen: list[tuple[Tensor, int]] = []
    for x in trace.nodes:
        value, flops = (images, 0) if x is trace.input else _run_counted(trace, x, values)
        writes = _union(_memory(t).keys() for t, old in seen if version(t) != old)
        if x is cut:
            check_units(value, images, layer)
            raw, value = value, value.clone()  # both kept, so that no address comes back
        values[x] = value
        seen = [(t, version(t)) for t, _ in seen] if writes else seen
        seen += [(t, version(t)) for t in tensors(value)]
        facts[x] = _Facts(
            reads=_union(_memory(t).keys() for y in x.all_input_nodes for t in tensors(values[y])),
            gives=_memory(*tensors(value)),
            writes=writes,
            batched=_is_batch(value, images),
            flops=flops,
            weights=sum(_memory(*trace.weights(x)).values()),
        )
    check_batch(values[trace.output], images, "model: it")
    written = _union(fact.writes for fact in facts.values())
    own = (label(x) for x in facts if x.op == "get_attr" and written & _gives(facts, x))
    check_unwritten([*written_since(), *own])
    (place,) = _memory(raw)
    return _split(facts, layer, cut, place, len(images))


def _run_counted(trace: Trace, node: fx.Node, values: Values) -> tuple[Any, int]:
    """What an operation gives, and how many operations of floating point it takes.

    The counter takes fused operations apart, which autocast refuses: they then count for nothing.
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
class _Facts:
    """The memory that an operation touches, by address; and the bytes, of what it gives."""

    reads: set[int]
    gives: dict[int, int]
    writes: set[int]
    batched: bool  # gives a tensor (n, …)
    flops: int
    weights: int  # bytes of the model's own that it reads


def _split(facts: dict[fx.Node, _Facts], layer: str, cut: fx.Node, raw: int, n: int) -> Split:
    """Head and tail, from a pass over n stimuli; `raw` is the memory of the layer's output."""
    images, *nodes = facts
    after = _reach(facts, cut) - {cut} | {nodes[-1]}
    head, tail = [x for x in nodes if x not in after], [x for x in nodes if x in after]
    taken = [x for x in facts if x not in after and not after.isdisjoint(x.users)]
    written = _union(facts[x].writes for x in tail)
    changed = [x for x in taken if written & _gives(facts, x)]
    copied = [key for x in changed for key in _gives(facts, x)]
    writes: dict[fx.Node, list[fx.Node]] = {}
    for x in changed:
        first = next(y for y in tail if facts[y].writes & _gives(facts, x))
        writes.setdefault(first, []).append(x)
    kept = _union(_gives(facts, x) for x in taken) | _union(facts[x].writes for x in head)
    imaged = _reach(facts, images)
    inputs = [x for x in taken if x is not cut]
    varying = [x for x in inputs if x in imaged]
    steps = schedule(tail, {nodes[-1]})
    return Split(
        layer=layer,
        cut=cut,
        head=schedule(head, {*inputs, cut}),
        tail=steps,
        inputs=inputs,
        varying=varying,
        changed=changed,
        writes=writes,
        copy_images=bool(kept & _gives(facts, images)),
        copy_activation=any(
            raw in facts[x].gives for x in facts if x is images or set(x.users) != {cut}
        ),
        apart=len(set(copied)) == len(copied),
        batchable=len(set(copied)) == len(copied) and all(facts[x].batched for x in varying),
        plain=True,
        held=_bytes(facts, [cut, *varying]) // n,
        peak=-(-_most(facts, steps, {cut, *varying}) // n),
        whole_peak=-(-_most(facts, schedule(nodes, {nodes[-1]}), {images}) // n),
        head_flops=sum(facts[x].flops for x in head) / n,
        tail_flops=sum(facts[x].flops for x in tail) / n,
        weights=sum(facts[x].weights for x in tail),
    )


def _reach(facts: dict[fx.Node, _Facts], source: fx.Node) -> set[fx.Node]:
    """The operations to run again when `source` gives another value, and `source`.

    One takes a value of one, or memory that one has written to; or it writes to memory that an
    earlier one reads, which would else find the write already made.
    """
    found, written, read = {source}, set[int](), set[int]()
    for x, fact in facts.items():
        takes = not found.isdisjoint(x.all_input_nodes) or written & fact.reads
        if x is not source and (takes or read & fact.writes):
            found.add(x)
            written |= fact.writes
            read |= fact.reads
    return found


def schedule(nodes: list[fx.Node], keep: set[fx.Node]) -> list[Step]:
    """The operations in their order, and what each is the last to need."""
    needed, steps = set(keep), []
    for x in reversed(nodes):
        dropped = tuple(y for y in (x, *x.all_input_nodes) if y not in needed)
        needed.update(dropped)
        steps.append(Step(x, dropped))
    return steps[::-1]


def _most(facts: dict[fx.Node, _Facts], steps: list[Step], alive: set[fx.Node]) -> int:
    """The most bytes that are held at once."""
    alive, most = set(alive), 0
    for step in steps:
        alive.add(step.node)
        most = max(most, _bytes(facts, alive))
        alive.difference_update(step.dropped)
    return most


def _bytes(facts: dict[fx.Node, _Facts], nodes: Iterable[fx.Node]) -> int:
    return sum({key: size for x in nodes for key, size in facts[x].gives.items()}.values())


def version(t: Tensor) -> int:
    """How often a tensor, or what shares its memory, has been written to."""
    return 0 if t.is_inference() else t._version


def tensors(value: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists and dicts."""
    found: list[Tensor] = []
    fx.node.map_aggregate(value, lambda x: found.append(x) if isinstance(x, Tensor) else None)
    return found


def _memory(*given: Tensor) -> dict[int, int]:
    """The bytes of the memory that tensors take, by address.

    A layout of another library (MKL-DNN's) has no address to ask for, and no views; it is known by
    its tensor, which a pass keeps alive.
    """
    found: dict[int, int] = {}
    for t in given:
        if t.layout == torch.sparse_coo:
            found |= _memory(t._indices(), t._values())
        elif t.layout in (torch.sparse_csr, torch.sparse_bsr):
            found |= _memory(t.crow_indices(), t.col_indices(), t.values())
        elif t.layout in (torch.sparse_csc, torch.sparse_bsc):
            found |= _memory(t.ccol_indices(), t.row_indices(), t.values())
        elif t.layout == torch.strided:
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        else:
            found[id(t)] = t.numel() * t.element_size()
    return found


def _is_batch(value: Any, images: Tensor) -> bool:
    """Whether a value is a tensor (n, …) whose rows can be taken and repeated."""
    dense = isinstance(value, Tensor) and value.layout == torch.strided
    return dense and value.shape[:1] == images.shape[:1]


def _gives(facts: dict[fx.Node, _Facts], node: fx.Node) -> set[int]:
    return set(facts[node].gives)


def _union(sets: Iterable[Iterable[int]]) -> set[int]:
    return set().union(*sets)


def watch_writes(model: nn.Module) -> Callable[[], list[str]]:
    """Give a function that names the model's parameters and buffers written to since."""
    own = [(n, t, version(t)) for n, t in [*model.named_parameters(), *model.named_buffers()]]
    return lambda: [name for name, t, old in own if version(t) != old]


def check_unwritten(written: list[str]) -> None:
    """Check that a pass wrote to none of the model's own tensors."""
    if written:
        raise LayerError(f"model: a pass writes to its {written[0]!r}; expected none to")


def check_batch(value: Any, images: Tensor, what: str) -> Tensor:
    """Check that a value is a tensor with an entry for each image."""
    if not isinstance(value, Tensor):
        kind = type(value).__name__.removeprefix("immutable_")
        raise LayerError(f"{what} gives {kind}; expected a tensor (n, …)")
    if value.is_nested:
        raise LayerError(f"{what} gives a nested tensor; expected a dense one (n, …){NOT_NESTED}")
    if value.layout != torch.strided:
        raise LayerError(
            f"{what} gives a tensor of layout {value.layout}; expected a dense one (n, …)"
        )
    if value.shape[:1] != images.shape[:1]:
        shape, n = tuple(value.shape), len(images)
        raise LayerError(f"{what} gives a tensor {shape} for {n} images; expected (n, …)")
    return value


def check_units(value: Any, images: Tensor, layer: str) -> Tensor:
    """Check that a layer's output is a tensor (n, …) with at least one unit."""
    out = check_batch(value, images, f"layer: {layer!r}")
    if not out.numel():
        raise LayerError(f"layer: {layer!r} has no units, shape {tuple(out.shape)}; expected some")
    return out
