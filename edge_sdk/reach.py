# SPDX-License-Identifier: Apache-2.0
"""What can get where in a graph. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from edge_sdk.graphview import Operation


def reached(
    nodes: Sequence[Operation], sources: Collection[str], cut: Collection[str] = ()
) -> set[str]:
    """Return the tensors that depend on the sources, not counting ways through the cut ones.

    Requires: nodes in topological order. Every input of a node counts, for its shape if nothing
    else, and whatever a Loop's body reads reaches all that the Loop makes.
    """
    found = set(sources) - {""}
    for node in nodes:
        if not found.isdisjoint(node.reads):
            found.update(name for name in node.outputs if name and name not in cut)
    return found
