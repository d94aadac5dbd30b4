# SPDX-License-Identifier: Apache-2.0
"""Einsum: the gradient of each operand is an Einsum of the upstream one with the other operands."""

from __future__ import annotations

import string

import numpy as np

from coordinator.compiler.emit import Emit
from coordinator.compiler.graph import Node
from coordinator.compiler.vjp import Grads, unbroadcast, vjp
from edge_sdk.errors import CompileError


def terms(e: Emit, n: Node) -> tuple[list[str], str]:
    """Return each operand's letters and the result's, the ellipsis spelled out."""
    text = n.attr("equation").replace(" ", "")
    left, arrow, right = text.partition("->")
    operands = left.split(",")
    if not arrow:
        letters = left.replace(",", "").replace(".", "")
        right = "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
        right = ("..." if "..." in left else "") + right
    free = [c for c in string.ascii_letters if c not in text]
    pairs = zip(n.inputs, operands, strict=True)
    widths = [e.rank(x) - len(t.replace("...", "")) for x, t in pairs if "..." in t]
    dots = "".join(free[: max(widths, default=0)])
    spelled = []
    for x, term in zip(n.inputs, operands, strict=True):
        width = e.rank(x) - len(term.replace("...", ""))
        spelled.append(term.replace("...", dots[len(dots) - width :]))
    return spelled, right.replace("...", dots)


@vjp("Einsum")
def _einsum(e: Emit, n: Node, g: str) -> Grads:
    operands, result = terms(e, n)
    return tuple(
        _side(e, n, g, i, (operands, result)) if e.needs(x) else None
        for i, x in enumerate(n.inputs)
    )


def _side(e: Emit, n: Node, g: str, index: int, spelled: tuple[list[str], str]) -> str:
    """Return the gradient of one operand: what no other term spells is repeated."""
    operands, result = spelled
    own, x = operands[index], n.inputs[index]
    once = "".join(dict.fromkeys(own))
    others = [(t, name) for i, (t, name) in enumerate(zip(operands, n.inputs, strict=True))
              if i != index]  # fmt: skip
    known = set(result).union(*(t for t, _ in others))
    made = "".join(c for c in once if c in known)
    equation = ",".join([result, *(t for t, _ in others)]) + f"->{made}"
    total = e.Einsum(g, *(name for _, name in others), equation=equation)
    sizes = _sizes(e, operands, n.inputs, result, n.outputs[0])
    total = e.declare(total, tuple(sizes[c] for c in made))
    missing = [i for i, c in enumerate(once) if c not in known]
    if missing:
        total = e.Unsqueeze(total, e.ints(*missing))
    if once != own:
        return _diagonal(e, total, n, x, own)
    if missing:
        return e.declare(e.Expand(total, e.size(x)), e.dims(x))
    return unbroadcast(e, total, x)


def _sizes(
    e: Emit, operands: list[str], inputs: tuple[str, ...], result: str, output: str
) -> dict[str, int | None]:
    """Return the size of each letter; of a broadcast one, the larger."""
    sizes: dict[str, int | None] = {}
    for letters, name in zip((*operands, result), (*inputs, output), strict=True):
        shape = e.shape(name)
        for letter, dim in zip(letters, shape or (), strict=False):
            if sizes.get(letter, 1) == 1:
                sizes[letter] = dim
    return sizes


def _diagonal(e: Emit, g: str, n: Node, x: str, own: str) -> str:
    """Put a gradient on the diagonal that a repeated letter takes."""
    shape = e.static(x)
    if shape is None:
        raise CompileError(
            f"expected fixed sizes in {n.label}, which takes a diagonal, got {e.dims(x)}: "
            "give the model's input a fixed shape"
        )
    at = np.indices(shape)
    mask = np.logical_and.reduce([at[i] == at[own.index(c)] for i, c in enumerate(own)])
    again = [i for i, c in enumerate(own) if own.index(c) < i]
    return e.Mul(e.Unsqueeze(g, e.ints(*again)), e.const(mask))
