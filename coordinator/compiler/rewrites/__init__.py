# SPDX-License-Identifier: Apache-2.0
"""Operators in simpler ones, one file a family; importing this package fills the table."""

from coordinator.compiler.rewrites import grid, normalize, recurrent

__all__ = ["grid", "normalize", "recurrent"]
