# SPDX-License-Identifier: Apache-2.0
"""What training will take of a device's memory, told before anything runs.

Counted exactly: two sets of parameters and of optimizer state, the round's start to take the delta
from, the anchor of a proximal task, the batch as it was stored and as it is fed, and the pages of
the arena that activations and gradients touch (`lifetimes`, `arena`). The figures below are
measured, not derived: fitted once to the peak resident set (VmHWM) of training processes with
onnxruntime 1.32 on x86-64, Python 3.11; docs/explain/memory.md says how, and how well they hold.
Pure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from coordinator.compiler.body import bodies
from coordinator.compiler.graph import Graph
from coordinator.compiler.lifetimes import schedule

RUNTIME_BYTES = 45_100_000
"""A process that has imported numpy and onnxruntime and done nothing."""
FIXED_BYTES = 20_700_000
"""What `edge_sdk`, the runtime's code that runs for any graph, and an empty session add."""
NODE_BYTES = 6_100
"""A node of the training graph, loaded: its kernel, names and shapes."""
FILE_SHARE = 1.1
"""The bundle is held whole; a little of it twice."""
CONSTANT_SHARE = 1.5
"""Constants that the running graph reads, stored and folded, as they stay."""
COPIES_LOADING = 2
"""Of stored constants, while a session is made: cut out of the bundle, parsed."""
COPIES_PACKING = {"Conv": 2, "ConvTranspose": 1, "DequantizeLinear": 2, "Gemm": 1, "MatMul": 1}
"""Copies of a weight besides, by who reads it: into blocks of channels, or as a product likes it.
A convolution does so when its bias, too, is constant."""
SPARE_BYTES = 1_500_000
"""Heap that start-up leaves free, which the first of those copies fill."""

BATCHES = (1, 2, 4, 8, 16, 32, 64)
"""The batch sizes that a bundle's cost table tells of."""


class Footprint(NamedTuple):
    """Bytes that training adds to a process with numpy and onnxruntime imported.

    Attributes:
        fixed: whatever the bundle.
        loaded: the bundle, the graph's nodes, folded constants.
        weights: parameters and optimizer state.
        loading: stored constants, while a session is made of them; gone when it runs.
        running: the same constants as they stay, the batch, and what activations touch.
    """

    fixed: int
    loaded: int
    weights: int
    loading: int
    running: int

    @property
    def total(self) -> int:
        """Return what the process's peak grows by: loading comes before running."""
        return self.fixed + self.loaded + self.weights + max(self.loading, self.running)


class Held(NamedTuple):
    """What a training process holds besides the graph: bytes, but for the flag.

    Attributes:
        members: all files of the bundle together.
        params: the trained tensors, once; slots: the optimizer's state, once.
        example: one input and its target.
    """

    members: int
    params: int
    slots: int
    example: int
    is_proximal: bool = False


def footprint(train: Graph, held: Held, batch: int) -> Footprint:
    """Predict what training on `batch` rows a step adds at the peak."""
    plan = schedule(train, batch)
    parts = [train, *bodies(train)]
    stored = sum(array.nbytes for part in parts for array in part.initializers.values())
    folded = max(0, plan.constants - stored)
    copies = 3 + held.is_proximal  # two sets, the round's start, perhaps the anchor
    return Footprint(
        fixed=FIXED_BYTES,
        loaded=NODE_BYTES * sum(len(part.nodes) for part in parts)
        + round(FILE_SHARE * held.members + CONSTANT_SHARE * folded),
        weights=copies * held.params + 2 * held.slots,
        loading=max(0, sum(map(_loading, parts)) - SPARE_BYTES),
        running=round(CONSTANT_SHARE * min(stored, plan.constants))
        + 2 * batch * held.example
        + plan.resident(),
    )


def _loading(graph: Graph) -> int:
    """Return the bytes of all copies of a graph's constants while it is loaded."""
    copies = dict.fromkeys(graph.initializers, COPIES_LOADING)
    for node in graph.nodes:
        packed = COPIES_PACKING.get(node.kind, 0)
        if node.kind == "Conv" and not graph.initializers.keys() >= set(node.inputs[1:]):
            continue
        name = node.inputs[0] if node.kind == "DequantizeLinear" else node.input(1)
        if packed and name in copies:
            copies[name] = max(copies[name], COPIES_LOADING + packed)
    return sum(n * graph.initializers[name].nbytes for name, n in copies.items())


class ByBatch(Mapping[str, int]):
    """Totals by the number of rows, as text; each is worked out when it is asked for, once."""

    def __init__(self, train: Graph, held: Held, batch: int) -> None:
        """Take a graph and what is held besides, for `BATCHES` and `batch` rows."""
        self._train, self._held = train, held
        self._totals: dict[str, int] = {}
        self._sizes = [str(n) for n in sorted({*BATCHES, batch})]

    def __getitem__(self, rows: str) -> int:
        """Return what training on so many rows a step adds, bytes."""
        if rows not in self._sizes:
            raise KeyError(rows)
        if rows not in self._totals:
            self._totals[rows] = footprint(self._train, self._held, int(rows)).total
        return self._totals[rows]

    def __iter__(self) -> Iterator[str]:
        """Go through the numbers of rows, rising."""
        return iter(self._sizes)

    def __len__(self) -> int:
        """Return how many numbers of rows there are."""
        return len(self._sizes)

    @property
    def unsized(self) -> int:
        """How many tensors have a size that nobody can tell before running: they count as 0."""
        return unsized(self._train)


def unsized(train: Graph) -> int:
    """Return how many tensors have a size that nobody can tell before running: they count as 0."""
    return len(schedule(train, 1).unknown)
