# SPDX-License-Identifier: Apache-2.0
"""Bytes that members of a bundle have in common are stored once. Pure.

A frozen weight stands in each graph that reads it. Of those graphs the first keeps it; the others
are stored without, and a splice says where it goes and where it is found:
``{"at": .., "member": .., "offset": .., "size": ..}``, `at` in the whole member, `offset` in what
the other stores.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

Splice: TypeAlias = Mapping[str, Any]
Span: TypeAlias = tuple[int, int]
"""Offset and size, bytes."""

LEAST = 256
"""Fewer bytes than that are not worth the words."""

WORTH = 8
"""A member is stored in part where that saves one in so many of its bytes: reading it is a copy."""


def split(
    members: Mapping[str, bytes], spans: Mapping[str, Iterable[Span]]
) -> tuple[dict[str, bytes], dict[str, list[Splice]]]:
    """Return what to store of each member, and the splices of those that are stored in part.

    Args:
        members: by name; earlier ones keep what later ones share, the first is whole.
        spans: of each, what might occur elsewhere; they do not overlap.
    """
    known: dict[bytes, tuple[str, int]] = {}
    stored: dict[str, bytes] = {}
    found: dict[str, list[Splice]] = {}
    for name, data in members.items():
        view = memoryview(data)
        places = sorted(s for s in spans.get(name, ()) if s[1] >= LEAST)
        keys = [hashlib.sha256(view[at : at + size]).digest() for at, size in places]
        shared = [(key, *span) for key, span in zip(keys, places, strict=True) if key in known]
        saved = sum(size for _, _, size in shared)
        if WORTH * saved < len(data) or not stored:
            shared = []
        splices: list[Splice] = []
        own, begun = [], 0
        for key, at, size in shared:
            member, offset = known[key]
            splices.append({"at": at, "member": member, "offset": offset, "size": size})
            own.append(view[begun:at])
            begun = at + size
        stored[name] = b"".join([*own, view[begun:]]) if own else data
        found |= {name: splices} if splices else {}
        known = _places(name, zip(keys, places, strict=True), splices) | known
    return stored, found


def _places(
    name: str, spans: Iterable[tuple[bytes, Span]], splices: Sequence[Splice]
) -> dict[bytes, tuple[str, int]]:
    """Return where the spans of a member that it stores itself begin in what it stores."""
    gone = {splice["at"]: splice["size"] for splice in splices}
    found: dict[bytes, tuple[str, int]] = {}
    before = 0
    for key, (at, _) in spans:
        if at in gone:
            before += gone[at]
        else:
            found.setdefault(key, (name, at - before))
    return found


def join(name: str, stored: Mapping[str, memoryview], splices: Sequence[Splice]) -> bytes:
    """Return a whole member, its splices put in; they were checked with the manifest."""
    own, parts, begun, gone = stored[name], [], 0, 0
    for splice in splices:
        until = splice["at"] - gone
        other, offset = stored[splice["member"]], splice["offset"]
        parts += [own[begun:until], other[offset : offset + splice["size"]]]
        begun, gone = until, gone + splice["size"]
    return b"".join([*parts, own[begun:]])
