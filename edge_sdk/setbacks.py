# SPDX-License-Identifier: Apache-2.0
"""What a board has learned of its own memory: how many rows of a step it can take. Pure.

A training that ran out of memory is tried with half the rows next time, also after a restart. Each
few trainings that end well allow twice as many again: what else took the memory may be gone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

FIRST_PATIENCE = 4
LONGEST_PATIENCE = 64


@dataclass(frozen=True, slots=True)
class Setbacks:
    """Trainings that ran out of memory, of one bundle."""

    bundle: str = ""
    batch: int | None = None
    """The most rows that are tried; None for as many as are asked for."""
    in_a_row: int = 0
    good: int = 0
    """Trainings that ended well since the last one that did not."""
    patience: int = FIRST_PATIENCE
    """How many of them allow twice the rows."""

    def of(self, bundle: str) -> Setbacks:
        """Return what is known of a bundle: nothing, when it is another one."""
        return self if self.bundle == bundle else Setbacks(bundle)

    def rows(self, asked: int) -> int:
        """Return how many rows a step should have when so many are asked for."""
        return asked if self.batch is None else min(asked, self.batch)

    def out_of_memory(self, rows: int) -> Setbacks:
        """Return what is known after a training with steps of so many rows ran out of memory."""
        patience = min(2 * self.patience, LONGEST_PATIENCE) if self.batch else self.patience
        return replace(
            self, batch=max(1, rows // 2), in_a_row=self.in_a_row + 1, good=0, patience=patience
        )

    def ended_well(self, asked: int) -> Setbacks:
        """Return what is known after a training that was to have so many rows ended well."""
        if self.batch is None:
            return replace(self, in_a_row=0)
        after = replace(self, in_a_row=0, good=self.good + 1)
        if after.good < self.patience:
            return after
        batch = 2 * self.batch
        return replace(after, good=0, batch=None if batch >= asked else batch)
