# SPDX-License-Identifier: Apache-2.0
"""A graph as the checks see it, whatever format it is stored in. Pure.

`onnxfile` and `tflitegraph` make these views; nothing here knows either format but for the numbers
of element types, which are ONNX's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in the file. `data` is its raw bytes, at `offset` of the file; None if not raw."""

    name: str
    dtype: int
    dims: tuple[int, ...]
    data: memoryview | None
    offset: int
    typed: Mapping[str, int]
    """How many numbers each typed field has, for one that is not raw."""
    is_external: bool

    @property
    def elements(self) -> int:
        """How many numbers its dims make."""
        return math.prod(self.dims)


class Attribute(NamedTuple):
    """One setting of a node; `number` is an int's value, `tensors` what it stores.

    `graph` is read in a model's own graph and not entered in a nested one.
    """

    name: str
    kind: str
    number: int | None
    tensors: tuple[Stored, ...]
    graph: Nested | None = None


@dataclass(frozen=True, slots=True)
class Operation:
    """One node."""

    op: str
    domain: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: tuple[Attribute, ...]
    overload: str
    is_placed: bool
    """Whether it says on which devices it runs."""

    @property
    def bodies(self) -> list[Nested]:
        """The graphs that it holds, of those that were entered."""
        return [a.graph for a in self.attributes if a.graph is not None]

    @property
    def reads(self) -> tuple[str, ...]:
        """Every tensor that it depends on: its inputs, and what its bodies read from outside."""
        return (*self.inputs, *(name for body in self.bodies for name in body.reads))

    @property
    def label(self) -> str:
        """How errors call it: ``Conv node 'stem'``, after its first output if it has no name."""
        name = self.name or next(iter(self.outputs), "")
        return f"{shown(self.op)[1:-1]} node {shown(name)}"


class Port(NamedTuple):
    """An input, output or inner value: `kind` is ``tensor``, ``sequence``, ...; None: not said."""

    name: str
    kind: str
    dtype: int
    shape: tuple[int | None, ...] | None


@dataclass(frozen=True, slots=True)
class Nested:
    """A graph inside a node."""

    nodes: tuple[Operation, ...]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    values: tuple[Port, ...]
    initializers: Mapping[str, Stored]
    sparse: int
    """How many sparse initializers there are."""

    @property
    def reads(self) -> tuple[str, ...]:
        """What it reads from outside, each name once."""
        own = {port.name for port in self.inputs} | self.initializers.keys()
        own |= {name for node in self.nodes for name in node.outputs}
        asked = [name for node in self.nodes for name in node.inputs]
        asked += [port.name for port in self.outputs]
        return tuple(dict.fromkeys(name for name in asked if name and name not in own))


@dataclass(frozen=True, slots=True)
class GraphView:
    """The facts of a model."""

    opsets: Mapping[str, int]
    nodes: tuple[Operation, ...]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    values: tuple[Port, ...]
    initializers: Mapping[str, Stored]
    extras: Mapping[str, int]
    """How many functions, sparse initializers, training infos and configurations there are."""
    metadata: frozenset[str]
    """Keys of the model's own metadata."""
    spare: int = 0
    """How many more graphs the file holds, which no engine runs."""
    state: frozenset[str] = frozenset()
    """Tensors that nothing makes and that keep their value from run to run; ONNX has none."""


def shown(text: object) -> str:
    """Return something from a file as it may stand in a line of a log: short and printable."""
    line = ascii(text)
    return line if len(line) <= 80 else f"{line[:77]}...'"
