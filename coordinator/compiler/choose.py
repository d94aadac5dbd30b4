# SPDX-License-Identifier: Apache-2.0
"""Which weights a task trains: "all", "bias", "last:2", a name, a glob, or a list of those."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from coordinator.compiler.graph import Graph
from coordinator.compiler.vjp import differentiable_inputs
from coordinator.compiler.weights import Weight, any_weight, find_weights
from edge_sdk.errors import CompileError

_SHOWN = 20


def select(
    graph: Graph, train: str | Sequence[str], logits: str, kept: Collection[str] | None = None
) -> list[Weight]:
    """Return the chosen weights in topological order.

    Weights that no gradient can reach, or that `kept` does not name where it is given, are left out
    of a wide choice ("all", a glob). Those that no gradient can reach are refused by name.

    Raises: CompileError naming what there is to choose from.
    """
    weights = find_weights(graph)
    reached = _reached(graph, logits)
    usable = _usable(weights, reached, kept)
    asked = [train] if isinstance(train, str) else list(train)
    chosen: dict[str, Weight] = {}
    for pattern in asked:
        chosen |= {w.name: w for w in _matching(graph, pattern, weights, usable, reached)}
    order = {w.name: i for i, w in enumerate(weights)}
    found = sorted(chosen.values(), key=lambda w: order.get(w.name, len(order)))
    if not found:
        raise CompileError(f"expected at least one weight to train, {train!r}: {_menu(usable)}")
    return found


def selections(graph: Graph, logits: str, kept: Collection[str] | None = None) -> list[str]:
    """Return ways to choose weights, from the widest to the narrowest."""
    usable = _usable(find_weights(graph), _reached(graph, logits), kept)
    layers = len({w.layer for w in usable})
    bias = ["bias"] if layers > 1 and any(w.role == "bias" for w in usable) else []
    middle = [f"last:{k}" for k in range(layers - 1, 1, -1)]
    return ["all", *middle, *bias, *(["last:1"] if layers > 1 else [])]


def _usable(
    weights: Sequence[Weight], reached: set[str], kept: Collection[str] | None
) -> list[Weight]:
    found = [w for w in weights if reached.issuperset(w.tensors)]
    return found if kept is None else [w for w in found if w.source in kept]


def _matching(
    graph: Graph, pattern: str, weights: list[Weight], usable: list[Weight], reached: set[str]
) -> list[Weight]:
    """Return what one pattern chooses, never nothing."""
    if not isinstance(pattern, str):
        raise CompileError(f"expected names or globs to train, got {pattern!r}")
    if pattern.startswith("last:"):
        return _last(pattern, usable)
    if pattern in {"all", "bias"}:
        found = [w for w in usable if pattern == "all" or w.role == "bias"]
    elif set(pattern) & set("*?["):
        found = [w for w in usable if fnmatchcase(w.name, pattern)]
    else:
        return [_by_name(graph, pattern, weights, reached)]
    if not found:
        raise CompileError(f"expected weights for train={pattern!r}, none match: {_menu(usable)}")
    return found


def _last(pattern: str, usable: list[Weight]) -> list[Weight]:
    text = pattern.removeprefix("last:")
    layers = sorted({w.layer for w in usable})
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= len(layers):
        raise CompileError(
            f"expected train='last:k' with k from 1 to {len(layers)}, the layers with weights, "
            f"got {pattern!r}"
        )
    kept = set(layers[-int(text) :])
    return [w for w in usable if w.layer in kept]


def _by_name(graph: Graph, name: str, weights: list[Weight], reached: set[str]) -> Weight:
    weight = next((w for w in weights if name in {w.name, w.source}), None)
    weight = weight or any_weight(graph, name)
    if weight is None:
        near = get_close_matches(name, [w.name for w in weights], 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise CompileError(f"expected a weight to train, {name!r} is none{hint}: {_menu(weights)}")
    if not reached.issuperset(weight.tensors):
        raise CompileError(
            f"expected a weight that the loss depends on smoothly, no gradient reaches {name!r}: "
            f"{_menu([w for w in weights if reached.issuperset(w.tensors)])}"
        )
    return weight


def _reached(graph: Graph, logits: str) -> set[str]:
    """Return the tensors that the logits depend on through operators that carry gradients."""
    reached = {logits}
    for node in reversed(graph.nodes):
        if reached.intersection(node.outputs):
            reached.update(differentiable_inputs(node))
    return reached


def _menu(weights: list[Weight]) -> str:
    names = [w.name for w in weights]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"the model has {', '.join(names[:_SHOWN]) or 'none'}{more}"
