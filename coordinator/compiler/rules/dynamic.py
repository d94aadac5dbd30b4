# SPDX-License-Identifier: Apache-2.0
"""DynamicQuantizeLinear, straight through: its range is the tensor's, so nothing saturates."""

from __future__ import annotations

from coordinator.compiler.emit import Emit
from coordinator.compiler.graph import Node
from coordinator.compiler.vjp import Grads, vjp_several


@vjp_several("DynamicQuantizeLinear")
def _dynamic_quantize(_e: Emit, _n: Node, upstream: Grads) -> Grads:
    """The integers pass their gradient on; scale and zero point carry none."""
    return upstream[:1]
