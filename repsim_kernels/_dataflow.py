"""What the operations of a network read and write, and which of them depend on a layer.

``torch.fx`` gives their order. A pass over two stimuli shows whose memory each of them reads, gives
and writes to: PyTorch counts the writes to every tensor, so that no list of in-place operations is
needed. The *tail* is every operation that can see what the layer gave, through values or through
shared memory; the *head* is the others. Both keep the network's order and its in-place operations.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partialmethod
from typing import Any

from torch import Tensor, fx, nn

from repsim_kernels.errors import LayerError

Values = dict[fx.Node, Any]


@dataclass
class Step:
    node: fx.Node
    dropped: tuple[fx.Node, ...]  # what nothing after it needs


@dataclass
class Split:
    head: list[Step]
    tail: list[Step]
    inputs: list[fx.Node]  # what the tail takes from the head besides the activation
    varying: list[fx.Node]  # those that depend on the images
    changed: list[fx.Node]  # what the tail takes from the head and writes to
    copy_images: bool  # the head writes to them, or a state would hold them
    copy_activation: bool  # another value shares its memory
    batchable: bool  # cells may run together
    bytes_per_stimulus: int  # the most that the tail holds at once


class Trace:
    """The operations of a model in their order, with one module kept whole, the cut.

    Raises LayerError where fx can't trace the model, or the module isn't called exactly once.
    """

    def __init__(self, model: nn.Module, module: nn.Module, name: str) -> None:
        root = _Root(model)
        graph = _graph(root, module)
        self._interpreter = fx.Interpreter(root, graph=graph)
        self._model, self._name = model, name
        self._nodes: list[fx.Node] = list(graph.nodes)
        self.input, self.output = self._nodes[0], self._nodes[-1]
        modules = {x: x.target for x in self._nodes if x.op == "call_module"}
        calls = [x for x, target in modules.items() if root.get_submodule(str(target)) is module]
        if len(calls) != 1:
            sites = "; ".join(f"on {', '.join(map(_label, x.all_input_nodes))}" for x in calls)
            times = f"called {len(calls)} times ({sites})" if calls else "never called"
            raise LayerError(f"layer: {name!r} is {times}; expected one call in a pass")
        self.cut = calls[0]

    def run(self, node: fx.Node, values: Values) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        return getattr(self._interpreter, node.op)(node.target, args, kwargs)

    def module(self, node: fx.Node) -> nn.Module:
        module: nn.Module = self._interpreter.fetch_attr(str(node.target))
        return module

    def split(self, images: Tensor) -> Split:
        """Run the network as under a hook that returns a clone, and see who touches what."""
        own = [*self._model.named_parameters(), *self._model.named_buffers()]
        before = [version(t) for _, t in own]
        values: Values = {}
        facts: dict[fx.Node, _Facts] = {}
        seen: list[tuple[Tensor, int]] = []
        for x in self._nodes:
            value = images if x is self.input else self.run(x, values)
            writes = {_memory(t) for t, old in seen if version(t) != old}
            if x is self.cut:
                _check_batch(value, images, f"layer: {self._name!r}")
                raw, value = value, value.clone()  # both kept, so that no address comes back
            values[x] = value
            seen = [(t, version(t)) for t, _ in seen] if writes else seen
            seen += [(t, version(t)) for t in tensors(value)]
            facts[x] = _Facts(
                reads={_memory(t) for y in x.all_input_nodes for t in tensors(values[y])},
                gives={_memory(t): t.untyped_storage().nbytes() for t in tensors(value)},
                writes=writes,
                batched=isinstance(value, Tensor) and value.shape[:1] == images.shape[:1],
            )
        _check_batch(values[self.output], images, "model: it")
        written = _union(fact.writes for fact in facts.values())
        changed = [name for (name, t), old in zip(own, before, strict=True) if version(t) != old]
        changed += [_label(x) for x in facts if x.op == "get_attr" and written & _gives(facts, x)]
        if changed:
            raise LayerError(f"model: a pass writes to its {changed[0]!r}; expected none to")
        return _split(facts, self.cut, _memory(raw), len(images))


@dataclass
class _Facts:
    """The memory that an operation touches, by address; and the bytes, of what it gives."""

    reads: set[int]
    gives: dict[int, int]
    writes: set[int]
    batched: bool  # gives a tensor (n, …)


def _split(facts: dict[fx.Node, _Facts], cut: fx.Node, raw: int, n: int) -> Split:
    """Head and tail, from a pass over n stimuli; `raw` is the memory of the layer's output."""
    images, *nodes = facts
    after = _reach(facts, cut) - {cut} | {nodes[-1]}
    head, tail = [x for x in nodes if x not in after], [x for x in nodes if x in after]
    taken = [x for x in facts if x not in after and not after.isdisjoint(x.users)]
    written = _union(facts[x].writes for x in tail)
    changed = [x for x in taken if written & _gives(facts, x)]
    copied = [key for x in changed for key in _gives(facts, x)]
    kept = _union(_gives(facts, x) for x in taken) | _union(facts[x].writes for x in head)
    imaged = _reach(facts, images)
    inputs = [x for x in taken if x is not cut]
    varying = [x for x in inputs if x in imaged]
    steps = _schedule(tail, {nodes[-1]})
    alive, most = {cut, *varying}, 0
    for step in steps:
        alive.add(step.node)
        held = {key: size for x in alive for key, size in facts[x].gives.items()}
        most = max(most, sum(held.values()))
        alive.difference_update(step.dropped)
    return Split(
        head=_schedule(head, {*inputs, cut}),
        tail=steps,
        inputs=inputs,
        varying=varying,
        changed=changed,
        copy_images=bool(kept & _gives(facts, images)),
        copy_activation=any(raw in facts[x].gives for x in facts if x is not cut),
        batchable=len(set(copied)) == len(copied) and all(facts[x].batched for x in varying),
        bytes_per_stimulus=-(-most // n),
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


def _schedule(nodes: list[fx.Node], keep: set[fx.Node]) -> list[Step]:
    needed, steps = set(keep), []
    for x in reversed(nodes):
        dropped = tuple(y for y in (x, *x.all_input_nodes) if y not in needed)
        needed.update(dropped)
        steps.append(Step(x, dropped))
    return steps[::-1]


class _Root(nn.Module):
    """Keeps what a trace stores off the model, and the defaults of its other arguments."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Any:
        return self.model(images)


class _Proxy(fx.Proxy):
    """Records ``x[i] = y``, which fx refuses, and ``x += y``, which it takes for ``x = x + y``."""

    def _record(self, function: Any, *args: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, *args), {})


for _function in (
    operator.setitem, operator.iadd, operator.isub, operator.imul, operator.imatmul,
    operator.itruediv, operator.ifloordiv, operator.imod, operator.ipow, operator.iand,
    operator.ior, operator.ixor, operator.ilshift, operator.irshift,
):  # fmt: skip
    setattr(_Proxy, f"__{_function.__name__}__", partialmethod(_Proxy._record, _function))


class _Tracer(fx.Tracer):
    """Goes into every module that holds the cut, and not into the cut."""

    def __init__(self, cut: nn.Module, buffers: bool) -> None:
        super().__init__()
        self._cut, self.proxy_buffer_attributes = cut, buffers

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if any(x is self._cut for x in m.modules()):
            return m is self._cut
        return super().is_leaf_module(m, module_qualified_name)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)


def _graph(root: nn.Module, cut: nn.Module) -> fx.Graph:
    kept = [(vars(m), dict(vars(m))) for m in root.modules()]  # a pass may store what it made
    try:
        try:
            return _Tracer(cut, buffers=True).trace(root)
        except Exception:  # sizes and branches may hang on buffers, which are constants then
            return _Tracer(cut, buffers=False).trace(root)
    except Exception as e:
        reason = (str(e) or type(e).__name__).splitlines()[0]
        raise LayerError(f"model: torch.fx can't trace it: {reason}") from e
    finally:
        for attributes, old in kept[1:]:  # the root's are the trace's own
            attributes.clear()
            attributes.update(old)


def version(t: Tensor) -> int:
    """How often a tensor, or what shares its memory, has been written to."""
    return 0 if t.is_inference() else t._version


def tensors(value: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists and dicts."""
    found: list[Tensor] = []
    fx.node.map_aggregate(value, lambda x: found.append(x) if isinstance(x, Tensor) else None)
    return found


def _memory(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def _gives(facts: dict[fx.Node, _Facts], node: fx.Node) -> set[int]:
    return set(facts[node].gives)


def _union(sets: Iterable[set[int]]) -> set[int]:
    return set().union(*sets)


def _check_batch(value: Any, images: Tensor, what: str) -> None:
    if not isinstance(value, Tensor):
        kind = type(value).__name__.removeprefix("immutable_")
        raise LayerError(f"{what} gives {kind}; expected a tensor (n, …)")
    if value.shape[:1] != images.shape[:1]:
        shape, n = tuple(value.shape), len(images)
        raise LayerError(f"{what} gives a tensor {shape} for {n} images; expected (n, …)")


def _label(node: fx.Node) -> str:
    if node.op in ("call_module", "get_attr"):
        return str(node.target).removeprefix("model.")
    return "the images" if node.op == "placeholder" else node.name
