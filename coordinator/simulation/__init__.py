# SPDX-License-Identifier: Apache-2.0
"""Deterministic simulation: the production coordinator and devices in virtual time, under faults.

`simulate(Setup(seed=7))` is a function of its argument: the same seed, the same events, on any
machine. docs/explain/simulation.md says what is real in it and what is not.
"""

from __future__ import annotations

from coordinator.simulation.faults import CLASSES
from coordinator.simulation.world import Outcome, Setup, simulate

__all__ = ["CLASSES", "Outcome", "Setup", "simulate"]
