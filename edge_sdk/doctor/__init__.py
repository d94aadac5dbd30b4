# SPDX-License-Identifier: Apache-2.0
"""What a device needs, looked at one by one: what is well, what is not, and what to do about it.

Whatever is read of the board is read below a root, which stands for ``/`` in tests. Nothing here
starts a device or changes one.
"""

from __future__ import annotations

from edge_sdk.doctor.board import Board
from edge_sdk.doctor.checks import CHECKS, examine
from edge_sdk.doctor.finding import Finding

__all__ = ["CHECKS", "Board", "Finding", "examine"]
