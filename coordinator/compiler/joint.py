# SPDX-License-Identifier: Apache-2.0
"""Short vectors that an optimizer serves as one: many short kernels cost more than one long one.

A dense layer's bias is. That of a convolution is not: onnxruntime runs what a join waits for after
all other gradients, and what that gradient sums up would have left the caches by then.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from coordinator.compiler.emit import Emit
from coordinator.compiler.optim import Optimizer, add, descend, is_even

_LEAST = 4
"""Vectors worth joining: cutting the result up again takes as long as a kernel or two."""
_LARGEST = 1024
"""Numbers of an example that a joined gradient sums up, at the most."""
_PASSED = frozenset({"Add", "Reshape", "ReduceSum"})

Params = Sequence[tuple[str, tuple[int, ...]]]


class Moved(NamedTuple):
    """Names of the new parameters and of the new slots."""

    params: list[str]
    slots: list[str]


class _Joint(NamedTuple):
    """Which parameters stand together; a group of several holds vectors and comes first.

    onnxruntime begins with what is last, and so serves every other one as its gradient comes.
    """

    groups: tuple[tuple[int, ...], ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def params(self) -> list[tuple[str, tuple[int, ...]]]:
        """Return a name and the shape of each group's tensor."""
        sizes = [sum(math.prod(self.shapes[i]) for i in group) for group in self.groups]
        pairs = zip(self.groups, sizes, strict=True)
        return [("", self.shapes[g[0]] if len(g) == 1 else (size,)) for g, size in pairs]

    def joined(self, e: Emit, names: Sequence[str]) -> list[str]:
        """Return one tensor for each group, of one for each parameter."""
        return [_joined(e, [names[i] for i in group]) for group in self.groups]

    def parted(self, e: Emit, name: str, group: int) -> dict[int, str]:
        """Return the tensor of each parameter in a group."""
        members = self.groups[group]
        if len(members) == 1:
            return {members[0]: name}
        sizes = e.ints(*(math.prod(self.shapes[i]) for i in members))
        parts = e.Split(name, sizes, outputs=len(members), axis=0)
        return dict(zip(members, parts, strict=True))


def step(
    e: Emit, optimizer: Optimizer, shapes: Params, gradients: list[str], states: list[str]
) -> Moved:
    """Emit an optimizer's step of parameters ``p.i`` along `gradients`, learning rate ``lr``.

    `states` name its slots, in their order.
    """
    joint = _joint(e, optimizer, shapes, gradients)
    own, whole = optimizer.slots(shapes), optimizer.slots(joint.params)
    places = defaultdict[int | None, list[int]](list)  # of the slots of each parameter
    for place, slot in enumerate(own):
        places[slot.param].append(place)
    held: list[list[int]] = []  # of each slot of a group, the slots that it joins
    seen = defaultdict[int | None, int](int)
    for slot in whole:
        members = (None,) if slot.param is None else joint.groups[slot.param]
        held.append([places[i][seen[slot.param]] for i in members])
        seen[slot.param] += 1
    joined = [_joined(e, [states[k] for k in some]) for some in held]
    made = optimizer.emit(e, joint.joined(e, gradients), joined)
    params = joint.joined(e, [f"p.{i}" for i in range(len(shapes))])
    moved: dict[int, str] = {}
    for group, name in enumerate(descend(e, params, "lr", made)):
        moved |= joint.parted(e, name, group)
    kept: dict[int, str] = {}
    for slot, some, name in zip(whole, held, made.slots, strict=True):
        parts = {0: name} if slot.param is None else joint.parted(e, name, slot.param)
        kept |= zip(some, parts.values(), strict=True)
    return Moved([moved[i] for i in range(len(shapes))], [kept[k] for k in range(len(own))])


def plain_step(e: Emit, shapes: Params, steps: list[str]) -> Moved:
    """Emit ``p.i + step``, the steps being scaled already."""
    return Moved(add(e, [f"p.{i}" for i in range(len(shapes))], steps), [])


def _joint(e: Emit, optimizer: Optimizer, shapes: Params, gradients: Sequence[str]) -> _Joint:
    sizes = tuple(shape for _, shape in shapes)
    near = tuple(i for i, g in enumerate(gradients) if len(sizes[i]) == 1 and _is_near(e, g))
    if len(near) < _LEAST or not is_even(optimizer):
        near = ()
    alone = [(i,) for i in range(len(sizes)) if i not in near]
    return _Joint(((near, *alone) if near else tuple(alone)), sizes)


def _is_near(e: Emit, gradient: str) -> bool:
    """Tell whether a gradient sums up little: what it is made of still is in the caches then."""
    makers = {name: node for node in e.nodes for name in node.outputs}
    size = _row(e, gradient)
    while (node := makers.get(gradient)) is not None and node.kind in _PASSED:
        gradient = node.inputs[0]
        size = max(size, _row(e, gradient))
    return size <= _LARGEST


def _row(e: Emit, name: str) -> int:
    """Return the numbers of one example of a tensor."""
    return math.prod(dim for dim in e.shape(name) or () if dim is not None)


def _joined(e: Emit, names: list[str]) -> str:
    return names[0] if len(names) == 1 else e.Concat(*names, axis=0)
