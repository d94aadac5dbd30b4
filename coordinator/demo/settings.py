# SPDX-License-Identifier: Apache-2.0
"""What a demo run was asked for, checked before anything is started."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from edge_sdk.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Settings:
    """The options of `fedge demo`; shares are of 1, times in seconds.

    Raises: ConfigError for values that make no sense together.
    """

    devices: int = 10
    cohort: int = 10
    rounds: int = 15
    epochs: int = 2
    batch: int = 16
    lr: float = 0.05
    drop: float = 0.0
    straggle: float = 0.0
    deadline_s: float = 30.0
    select_s: float = 1.0
    kill_coordinator: int = 0
    model: Path | None = None
    data: Path | None = None
    train: str = "all"
    engine: str = "auto"
    codec: str = "default"
    broker: str = "embedded"
    seed: int = 0
    device_python: str = sys.executable

    def __post_init__(self) -> None:
        if (self.model is None) != (self.data is None):
            raise ConfigError("--model and --data go together: a model and the rows to train it on")
        if not 1 <= self.cohort <= self.devices:
            raise ConfigError(
                f"--cohort must be 1 to {self.devices} (--devices), got {self.cohort}"
            )
        if self.rounds < 1 or self.epochs < 1 or self.batch < 1:
            raise ConfigError("--rounds, --epochs and --batch must be at least 1")
        if min(self.drop, self.straggle) < 0 or self.drop + self.straggle >= 1:
            raise ConfigError("--drop and --straggle are shares that together leave some devices")

    @property
    def droppers(self) -> range:
        """The devices that are killed for good: the first ones."""
        return range(round(self.drop * self.devices))

    @property
    def stragglers(self) -> range:
        """The devices that report late in every round: the ones after the droppers."""
        first = len(self.droppers)
        return range(first, first + round(self.straggle * self.devices))

    @property
    def quorum(self) -> int:
        """Reports that a round needs: half of those that can be in time."""
        in_time = self.cohort - len(self.droppers) - len(self.stragglers)
        return max(1, (in_time + 1) // 2)
