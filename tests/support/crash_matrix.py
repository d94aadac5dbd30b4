# SPDX-License-Identifier: Apache-2.0
"""One federation over and over, with a process killed at another place each time.

A place that comes to another result fails with its name: FEDGE_KILL_AT=<place> replays that one.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import pytest
from live_rounds import Template

from edge_sdk.lasting import LastingTrainer

AT_ONCE = 2
ONLY = "FEDGE_KILL_AT"


class Setting(NamedTuple):
    """What one run is given."""

    config: Path
    """The coordinator's configuration, in the folder of the run."""
    url: str
    trainer: LastingTrainer


class Matrix:
    """Federations that begin alike, `AT_ONCE` at a time."""

    def __init__(self, folder: Path, start_mosquitto: Any, devices: int, rounds: int) -> None:
        (folder / "template").mkdir()
        self.folder, self.template = folder, Template(folder / "template", devices, rounds)
        self._start_mosquitto = start_mosquitto
        self._trainers: SimpleQueue[LastingTrainer] = SimpleQueue()
        for _ in range(AT_ONCE):
            self._trainers.put(LastingTrainer(nice=0))

    def close(self) -> None:
        while not self._trainers.empty():
            self._trainers.get().close()

    @contextlib.contextmanager
    def setting(self, name: str) -> Iterator[Setting]:
        """Give a run its folder, its broker and its trainer, for as long as it lasts."""
        folder = self.folder / re.sub("[:=/]", "-", name)
        trainer = self._trainers.get()
        broker = self._start_mosquitto("allow_anonymous true", "set_tcp_nodelay true")
        try:
            yield Setting(self.template.copy(folder, broker.url), broker.url, trainer)
        finally:
            broker.kill()
            shutil.rmtree(folder)
            self._trainers.put(trainer)


def deaths_at(places: Sequence[str], kill: Callable[[str], int]) -> int:
    """Kill at each place, or at the one to replay; return how many deaths that made."""

    def replayable(place: str) -> int:
        try:
            return kill(place)
        except BaseException as error:
            error.add_note(f"replay with {ONLY}={place}")
            raise

    only = os.environ.get(ONLY)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return sum(pool.map(replayable, [only] if only else places))


def note(request: pytest.FixtureRequest, deaths: int) -> None:
    """Say in the table of faults what became of the kills."""
    request.node.user_properties.append(("result", f"{deaths} kills, the same model each time"))
