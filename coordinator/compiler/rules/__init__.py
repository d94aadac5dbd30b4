# SPDX-License-Identifier: Apache-2.0
"""Gradient rules, one file a family; importing this package fills ``vjp.RULES``."""

from coordinator.compiler.rules import linear

__all__ = ["linear"]
