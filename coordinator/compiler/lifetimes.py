# SPDX-License-Identifier: Apache-2.0
"""The order in which onnxruntime runs a graph, and when it takes and frees each tensor's memory.

What is followed: nodes of constants alone are computed once at load; an activation moves into the
Conv before it and a transpose into the MatMul after it; nodes run in the order of a depth-first
walk back from the last node whose results nobody reads; a reshape is another name for its input;
an elementwise node writes over an input that ends with it, where the runtime can prove that both
are of one size, which a free batch keeps it from; the graph's own inputs and outputs live outside;
each turn of a Loop takes its slices, runs its body and frees the sums of the turn before. Pure.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from coordinator.compiler.arena import Arena, Chunk
from coordinator.compiler.body import Body, body_of
from coordinator.compiler.graph import Graph, Node, Value

BLOCK = 16
"""Channels that the runtime's blocked convolutions compute together, on AVX-512 and ARM."""

_RENAMES = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity"})
_BINARY = frozenset({"Add", "Sub", "Mul", "Div"})
_IN_PLACE = _BINARY | frozenset(
    {"Abs", "Cast", "Clip", "Elu", "Exp", "HardSigmoid", "LeakyRelu", "Log", "Neg", "Reciprocal",
     "Relu", "Selu", "Sigmoid", "Softplus", "Softsign", "Sqrt", "Sum", "Tanh"}
)  # fmt: skip
_ACTIVATIONS = frozenset({"Relu", "Sigmoid", "Tanh", "LeakyRelu", "Clip", "HardSigmoid"})
_ON_INTEGERS = frozenset(
    {"Add", "AveragePool", "Concat", "Conv", "Flatten", "Gemm", "GlobalAveragePool", "MatMul",
     "MaxPool", "Mul", "Reshape", "Sigmoid", "Softmax", "Squeeze", "Transpose", "Unsqueeze"}
)  # fmt: skip
_NEVER_FOLDED = frozenset(
    {"DequantizeLinear", "RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike"}
)
_PACKED = "/blocks"
_SCRATCH = "/columns"
_STEERS = (
    64  # elements: larger constants never steer shape inference, and need not be copied for it
)
_FOR_EVER = 1 << 40
_TURNS = 3
"""Turns of a Loop that are followed: the third reads sums of the second, as all later ones do."""


class Event(NamedTuple):
    """A tensor's memory taken (`size` bytes from 0), or freed (-1)."""

    tensor: str
    size: int


class Schedule(NamedTuple):
    """What a step does to memory.

    Attributes:
        events: in the order of one step.
        constants: bytes of initializers that the running graph reads, folded ones included.
        folded: bytes computed while folding, of which `constants` keeps the last.
        nodes: how many run in a step.
        unknown: tensors whose size inference could not tell; they count as nothing.
    """

    events: tuple[Event, ...]
    constants: int
    folded: int
    nodes: int
    unknown: tuple[str, ...]

    @property
    def live_peak(self) -> int:
        """Return the most bytes that tensors hold at once, without any allocator's rounding."""
        sizes: dict[str, int] = {}
        now = most = 0
        for tensor, size in self.events:
            now += size if size >= 0 else -sizes[tensor]
            sizes[tensor] = size
            most = max(most, now)
        return most

    def around(self, inner: Schedule) -> Schedule:
        """Return the plan of a graph with a body, whose events it has already."""
        return self._replace(
            constants=self.constants + inner.constants,
            folded=self.folded + inner.folded,
            nodes=self.nodes + inner.nodes,
            unknown=(*self.unknown, *inner.unknown),
        )

    def resident(self, steps: int = 4) -> int:
        """Return the bytes that the arena touches in some steps: it settles in a few."""
        arena, held = Arena(), dict[str, Chunk]()
        for _ in range(steps):
            for tensor, size in self.events:
                if size >= 0:
                    held[tensor] = arena.allocate(size)
                else:
                    arena.release(held.pop(tensor))
        return arena.resident


def at_batch(graph: Graph, batch: int) -> Graph:
    """Return the graph with its free dimensions set to `batch` and its shapes inferred."""

    def sized(value: Value) -> Value:
        shape = value.shape
        return replace(value, shape=shape and tuple(batch if d is None else d for d in shape))

    large = {name: a for name, a in graph.initializers.items() if a.size > _STEERS}
    stored = {name: a for name, a in graph.initializers.items() if name not in large}
    standing = [Value(name, a.dtype, a.shape) for name, a in large.items()]
    standing += _sums(graph)
    inputs = tuple(map(sized, graph.inputs))
    known = {value.name for value in standing}
    outputs = tuple(replace(v, shape=None) for v in graph.outputs if v.name not in known)
    light = replace(
        graph,
        nodes=tuple(node for node in graph.nodes if body_of(node) is None),
        inputs=(*inputs, *standing),
        outputs=outputs,
        initializers=stored,
    )
    found = {**light.inferred().values}
    outputs = tuple(found[v.name] for v in graph.outputs)
    return replace(graph, inputs=inputs, outputs=outputs, values=found)


def _sums(graph: Graph) -> list[Value]:
    """Return what Loops make: their bodies know its shapes, their files do not say."""
    return [
        replace(value, name=name)
        for node in graph.nodes
        if (body := body_of(node)) is not None
        for name, value in zip(node.outputs, body.graph.outputs, strict=True)
    ]


def schedule(graph: Graph, batch: int) -> Schedule:
    """Follow one step of `graph`, free dimensions and all, on `batch` rows."""
    return _followed(graph, at_batch(graph, batch), batch)


def _followed(graph: Graph, sized: Graph, batch: int, *, keeps_outputs: bool = False) -> Schedule:
    """Follow a graph, and the bodies in it. `keeps_outputs`: they are the arena's, and stay."""
    constant = _constants(sized)
    running = [n for n in sized.nodes if not constant.issuperset(n.outputs)]
    joined = _without_transposes(_activated(_integer(running, sized), sized), sized)
    ready = _ordered(_blocked(joined, sized, constant))
    read = {name for node in ready for name in node.inputs}
    known = {name: array.nbytes for name, array in sized.initializers.items()}
    folded = {name: bytes_of(sized, name) for name in constant - known.keys() if name}
    kept = sum(size for name, size in (known | folded).items() if name in read)
    made = [name for node in running for name in node.outputs if name]
    outside = constant | {v.name for v in sized.inputs}
    outside |= set() if keeps_outputs else {v.name for v in sized.outputs}
    turns = {n.outputs[0]: _turn(body, batch) for n in ready if (body := body_of(n))}
    events = tuple(_events(ready, graph, sized, outside, turns))
    whole = Schedule(
        events=events,
        constants=kept,
        folded=sum(folded.values()),
        nodes=len(ready),
        unknown=tuple(name for name in made if _is_open(sized, name)),
    )
    for inner in turns.values():
        whole = whole.around(inner.plan)
    return whole


class _Turn(NamedTuple):
    """A body's plan, how often it is followed to see what stays, and its sums' bytes by name."""

    plan: Schedule
    times: int
    sums: Mapping[str, int]


def _turn(body: Body, batch: int) -> _Turn:
    """Follow a body of a Loop on its slice of the batch; cutting the slices out belongs to it."""
    rows = min(body.rows, batch)
    cuts = body.graph.inputs[:2]
    sized = at_batch(body.graph, rows)
    cutting = [Node("Slice", (f"{v.name}/whole",), (v.name,)) for v in cuts]
    whole = [Value(f"{v.name}/whole") for v in cuts]
    sliced = [
        replace(g, nodes=(*cutting, *g.nodes), inputs=(*whole, *g.inputs[2:]))
        for g in (body.graph, sized)
    ]
    plan = _followed(sliced[0], sliced[1], rows, keeps_outputs=True)
    sums = {v.name: bytes_of(sized, v.name) for v in body.graph.outputs}
    return _Turn(plan, min(-(-batch // body.rows), _TURNS), sums)


def _turned(turn: _Turn, outputs: Sequence[str]) -> Iterator[Event]:
    """Yield what turns of a body take and free, and its sums becoming the Loop's outputs.

    The sums that a turn reads are let go when the next one begins; after the last, when all is
    copied out.
    """
    for i in range(turn.times):
        if i > 1:
            yield from (Event(f"{i - 2}/{name}", -1) for name in turn.sums)
        yield from (Event(f"{i}/{name}", size) for name, size in turn.plan.events)
    for out, size in zip(outputs, turn.sums.values(), strict=True):
        yield Event(out, size)
    for i in range(max(turn.times - 2, 0), turn.times):
        yield from (Event(f"{i}/{name}", -1) for name in turn.sums)


def _constants(graph: Graph) -> set[str]:
    """Return the tensors that the runtime computes once; it leaves dequantized weights alone."""
    found = set(graph.initializers) | {""}
    for node in graph.nodes:
        if node.kind not in _NEVER_FOLDED and found.issuperset(node.inputs):
            found.update(node.outputs)
    return found


def _uses(nodes: Sequence[Node], graph: Graph) -> Counter[str]:
    """Count the readers of each tensor; the graph's outputs have one more."""
    uses = Counter(name for node in nodes for name in node.inputs if name)
    uses.update(v.name for v in graph.outputs)
    return uses


def _integer(nodes: list[Node], graph: Graph) -> list[Node]:
    """Join an operator between DequantizeLinear and QuantizeLinear with both: integer kernels."""
    uses = _uses(nodes, graph)
    opened = {n.outputs[0]: n for n in nodes if n.kind == "DequantizeLinear"}
    closed = {n.inputs[0]: n for n in nodes if n.kind in {"QuantizeLinear", "Relu", "Clip"}}
    gone: set[int] = set()
    late: list[Node] = []
    for node in nodes:
        data = [name for name in node.inputs if name and name not in graph.initializers]
        after = closed.get(node.outputs[0])
        if node.kind not in _ON_INTEGERS or not data or not opened.keys() >= set(data):
            continue
        chain = [node]
        while after is not None and uses[after.inputs[0]] == 1:
            chain.append(after)
            after = closed.get(after.outputs[0]) if after.kind != "QuantizeLinear" else None
        if chain[-1].kind == "QuantizeLinear":
            inputs = tuple(opened[name].inputs[0] for name in data)
            late.append(replace(node, op=f"Q{node.op}", inputs=inputs, outputs=chain[-1].outputs))
            gone.update(map(id, chain))
    return _without_unread([n for n in nodes if id(n) not in gone] + late, opened.keys(), graph)


def _activated(nodes: list[Node], graph: Graph) -> list[Node]:
    """Move each activation into the Conv that it alone follows; a joined node comes last."""
    uses = _uses(nodes, graph)
    convs = {n.outputs[0]: n for n in nodes if n.kind == "Conv" and uses[n.outputs[0]] == 1}
    joined = {n.inputs[0]: n for n in nodes if n.kind in _ACTIVATIONS and n.inputs[0] in convs}
    late = [replace(convs[name], outputs=node.outputs) for name, node in joined.items()]
    gone = {id(convs[name]) for name in joined} | {id(node) for node in joined.values()}
    return [n for n in nodes if id(n) not in gone] + late


def _without_transposes(nodes: list[Node], graph: Graph) -> list[Node]:
    """Let products read their operands transposed, as the runtime's can."""
    swapped = {n.outputs[0]: n.inputs[0] for n in nodes if _swaps(n)}
    kept: list[Node] = []
    late: list[Node] = []
    for node in nodes:
        inputs = tuple(swapped.get(name, name) for name in node.inputs)
        is_product = node.kind in {"MatMul", "Gemm"} and inputs != node.inputs
        (late if is_product else kept).append(replace(node, inputs=inputs) if is_product else node)
    return _without_unread(kept + late, swapped.keys(), graph)


def _without_unread(nodes: list[Node], names: Collection[str], graph: Graph) -> list[Node]:
    uses = _uses(nodes, graph)
    return [n for n in nodes if n.outputs[0] not in names or uses[n.outputs[0]]]


def _blocked(nodes: list[Node], graph: Graph, constant: set[str]) -> list[Node]:
    """Write frozen convolutions in whole blocks of channels, unpacked for who cannot read those."""
    inside = {n.outputs[0] for n in nodes if _is_frozen(n, constant)}
    takes = {n.outputs[0] for n in nodes if _reads_blocks(n, graph, constant)}
    made: list[Node] = []
    for node in nodes:
        plain, blocks = node.outputs[0], node.outputs[0] in takes
        inputs = tuple(f"{i}{_PACKED}" if blocks and i in inside else i for i in node.inputs)
        if plain not in inside:
            made.append(replace(node, inputs=inputs))
            continue
        packed = (f"{plain}{_PACKED}",)
        made.append(replace(node, inputs=inputs, outputs=packed))
        if any(plain in n.inputs and n.outputs[0] not in takes for n in nodes):
            made.append(Node("ReorderOutput", packed, (plain,)))
    return made


def _is_frozen(node: Node, constant: set[str]) -> bool:
    is_conv = node.kind == "Conv" and constant.issuperset(node.inputs[1:])
    return is_conv and node.inputs[0] not in constant


def _reads_blocks(node: Node, graph: Graph, constant: set[str]) -> bool:
    """Tell whether a node runs on blocked channels: pools do, convolutions of enough channels."""
    if node.kind in {"MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"}:
        return True
    if not _is_frozen(node, constant):
        return False
    channels = (graph.shape(node.inputs[0]) or (0, 0))[1] or 0
    return node.attr("group", 1) > 1 or channels >= BLOCK


def _swaps(node: Node) -> bool:
    """Tell whether a node transposes the last two axes and no others."""
    perm = node.attr("perm")
    if node.kind != "Transpose" or perm is None or len(perm) < 2:
        return False
    n = len(perm)
    return tuple(perm) == (*range(n - 2), n - 1, n - 2)


def _ordered(nodes: list[Node]) -> list[Node]:
    """Return the nodes as onnxruntime runs them: depth first from the last, later inputs first."""
    made = {name: i for i, node in enumerate(nodes) for name in node.outputs if name}
    reads = [sorted({made[name] for name in node.inputs if name in made}) for node in nodes]
    read = {i for these in reads for i in these}
    stack = [(i, False) for i in range(len(nodes)) if i not in read]
    order: list[Node] = []
    entered: set[int] = set()
    while stack:
        i, is_done = stack.pop()
        if is_done:
            order.append(nodes[i])
        elif i not in entered:
            entered.add(i)
            stack += [(i, True), *((j, False) for j in reads[i] if j not in entered)]
    return order


def _events(
    nodes: list[Node],
    free: Graph,
    sized: Graph,
    outside: set[str],
    turns: Mapping[str, _Turn],
) -> Iterator[Event]:
    """Yield what each node takes and frees."""
    left = Counter(name for node in nodes for name in node.inputs if name)
    ends = {v.name for v in sized.outputs}  # never written over anything
    left.update(dict.fromkeys(ends, _FOR_EVER))
    place: dict[str, str] = {}  # a tensor to the tensor whose memory it lives in
    for node in nodes:
        taken = []
        if node.outputs[0] in turns:
            yield from _turned(turns[node.outputs[0]], node.outputs)
        for i, name in enumerate(node.outputs):
            if not name or name in outside or node.outputs[0] in turns:
                continue
            is_free = i == 0 and name not in ends
            over = _home(node, (free, sized), place, left, outside) if is_free else None
            place[name] = name if over is None else over
            if over is None:
                taken.append(name)
                yield Event(name, bytes_of(sized, name))
            elif over not in outside:
                left[over] += left[name]
        scratch = _columns(node, sized)
        if scratch:
            yield Event(_SCRATCH, scratch)
            yield Event(_SCRATCH, -1)
        yield from (Event(name, -1) for name in taken if not left[name])
        homes = [place.get(name, name) for name in node.inputs if name]
        yield from _let_go([home for home in homes if home not in outside], left)


def _let_go(homes: Iterable[str], left: Counter[str]) -> Iterator[Event]:
    """Yield what is freed when a node has read from these places."""
    for home in homes:
        left[home] -= 1
        if not left[home]:
            yield Event(home, -1)


def _home(
    node: Node,
    graphs: tuple[Graph, Graph],
    place: Mapping[str, str],
    left: Mapping[str, int],
    outside: set[str],
) -> str | None:
    """Return the tensor whose memory a node's first output shares, None for memory of its own."""
    (free, sized), out = graphs, node.outputs[0]
    if node.kind in _RENAMES:
        return place.get(node.inputs[0], node.inputs[0])
    if node.kind not in _IN_PLACE or _is_open(free, out):
        return None
    for name in node.inputs[: 2 if node.kind in _BINARY else 1]:
        home = place.get(name, name)
        fits = sized.shape(name) == sized.shape(out) and sized.dtype(name) == sized.dtype(out)
        if fits and home not in outside and left[home] == 1 and not _is_open(free, name):
            return home
    return None


def _columns(node: Node, graph: Graph) -> int:
    """Return the scratch of an integer convolution: the columns of the whole batch, a byte each."""
    if node.kind != "QConv" or node.attr("group", 1) != 1:
        return 0
    kernel = [d or 0 for d in graph.shape(node.inputs[1]) or ()]
    out = [d or 0 for d in graph.shape(node.outputs[0]) or ()]
    if math.prod(kernel[2:]) == 1 or not out:
        return 0
    return math.prod(kernel[1:]) * out[0] * math.prod(out[2:])


def _is_open(graph: Graph, name: str) -> bool:
    shape = graph.shape(name)
    return shape is None or None in shape


def bytes_of(graph: Graph, name: str) -> int:
    """Return a tensor's size, in whole blocks of channels where it is packed; 0 if unknown."""
    plain = name.removesuffix(_PACKED)
    if _is_open(graph, plain):
        return 0
    dims = [d or 0 for d in graph.shape(plain) or ()]
    if plain != name:
        dims[1] = -(-dims[1] // BLOCK) * BLOCK
    return math.prod(dims) * (graph.dtype(plain) or np.dtype(np.float32)).itemsize
