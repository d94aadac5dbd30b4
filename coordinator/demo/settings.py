# SPDX-License-Identifier: Apache-2.0
"""What a demo run was asked for, checked before anything is started."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from edge_sdk.engine import AUTO
from edge_sdk.errors import ConfigError

RECIPES = ("digits", "anomaly")
PROCESSES = 12
"""Up to so many devices have a process each, unless `hosts` says otherwise."""
PER_HOST, HOSTS = 25, 8
"""More devices share more processes, then larger ones."""


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
    hosts: int = 0
    """Processes that share the devices, those of `drop` and `straggle` left out; 0 chooses."""
    kill_coordinator: int = 0
    recipe: str = "digits"
    model: Path | None = None
    data: Path | None = None
    train: str = "all"
    headroom: float = 1.0
    ranges: str = "fixed"
    engine: str = AUTO
    codec: str = "default"
    broker: str = "embedded"
    seed: int = 0
    device_python: str = sys.executable
    export: Path | None = None
    """Where the model that was learned goes, in the format it came in."""

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
        if self.hosts < 0:
            raise ConfigError(f"--hosts must be at least 1, got {self.hosts}")

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
    def select_s(self) -> float:
        """How long a round waits for a full cohort: long where all of it is sure to come."""
        hurt = len(self.droppers) + len(self.stragglers)
        return 1.0 if self.devices - hurt < self.cohort else 20.0

    @property
    def groups(self) -> list[range]:
        """The devices of each process: one alone where it is to be hurt, the others shared out."""
        hurt = len(self.droppers) + len(self.stragglers)
        rest = self.devices - hurt
        chosen = rest if rest <= PROCESSES else min(-(-rest // PER_HOST), HOSTS)
        count = min(self.hosts or chosen, rest)
        ends = [hurt + rest * i // count for i in range(count + 1)]
        shared = [range(*pair) for pair in pairwise(ends)]
        return [range(i, i + 1) for i in range(hurt)] + shared

    @property
    def quorum(self) -> int:
        """Reports that a round needs: half of those that can be in time."""
        in_time = self.cohort - len(self.droppers) - len(self.stragglers)
        return max(1, (in_time + 1) // 2)
