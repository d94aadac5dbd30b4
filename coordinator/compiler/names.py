# SPDX-License-Identifier: Apache-2.0
"""Names that nothing else in a graph has."""

from __future__ import annotations


def fresh(stem: str, taken: set[str]) -> str:
    """Return `stem`, numbered where it is taken, and note it as taken."""
    name, count = stem, 0
    while name in taken:
        count += 1
        name = f"{stem}.{count}"
    taken.add(name)
    return name
