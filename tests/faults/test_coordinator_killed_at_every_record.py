# SPDX-License-Identifier: Apache-2.0
"""The coordinator killed before and after every record of its journal: the same model comes out.

Three rounds of eight devices that train for real, a fresh federation for each kill. A kill that
comes to another model, or an update lost or counted twice, fails with the place to kill at:
FEDGE_KILL_AT=before_commit@17 replays that one.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
from live_rounds import Boards, Template, check_journal, daemon, digests

from edge_sdk.lasting import LastingTrainer

pytestmark = [pytest.mark.broker, pytest.mark.slow]
DEVICES, ROUNDS, AT_ONCE = 8, 3, 2
LIVES = 60


class Matrix:
    """Federations that begin alike, `AT_ONCE` at a time."""

    def __init__(self, folder: Path, start_mosquitto: Any) -> None:
        (folder / "template").mkdir()
        self.folder, self.template = folder, Template(folder / "template", DEVICES, ROUNDS)
        self._start_mosquitto = start_mosquitto
        self._trainers: SimpleQueue[LastingTrainer] = SimpleQueue()
        for _ in range(AT_ONCE):
            self._trainers.put(LastingTrainer(nice=0))

    def close(self) -> None:
        while not self._trainers.empty():
            self._trainers.get().close()

    def run(self, *failpoints: str, within_s: float = 240.0) -> tuple[list[str], int, str]:
        """Run a federation whose coordinator has one life a failpoint, until it ends by itself.

        Give the hash of each version, how many lives were cut short, and the log.
        """
        folder = self.folder / (failpoints[0] or "calm").replace(":", "-").replace("=", "-")
        trainer, deaths = self._trainers.get(), 0
        broker = self._start_mosquitto("allow_anonymous true", "set_tcp_nodelay true")
        config = self.template.copy(folder, broker.url)
        boards = Boards(folder, [broker.url] * DEVICES, trainer)
        try:
            boards.start()
            for failpoint in failpoints:
                with daemon(config, "--exit-when-done", failpoints=failpoint) as child:
                    code = child.wait(within_s)
                if code == 0:
                    break
                log = (folder / "coordinator.log").read_text()
                assert code == -signal.SIGKILL, log[-2000:]
                deaths += 1
            assert code == 0
            check_journal(config, self.template, boards.receipts)
            return digests(config), deaths, (folder / "coordinator.log").read_text()
        finally:
            boards.close()
            broker.kill()
            shutil.rmtree(folder)
            self._trainers.put(trainer)


@pytest.fixture
def matrix(quick: Path, start_mosquitto: Any) -> Iterator[Matrix]:
    made = Matrix(quick, start_mosquitto)
    yield made
    made.close()


@pytest.mark.timeout(900)
def test_killed_at_any_record_of_its_journal_the_coordinator_comes_to_the_same_model(
    matrix: Matrix, figure: Any, request: pytest.FixtureRequest
) -> None:
    calm, _, log = matrix.run("before_commit:sleep=0")
    records = log.count("failpoint name=before_commit")
    assert records >= ROUNDS * (DEVICES + 2)  # at the least: opened, each update, committed
    assert len(set(calm)) == ROUNDS + 1

    def killed(place: str) -> int:
        point, _, at = place.partition("@")
        try:
            versions, deaths, _ = matrix.run(f"{point}:kill@{at}", "")
            assert versions == calm
        except BaseException as error:
            error.add_note(f"replay with FEDGE_KILL_AT={place}")
            raise
        return deaths

    only = os.environ.get("FEDGE_KILL_AT")
    points = ("before_commit", "after_commit")
    every = [f"{point}@{at}" for at in range(1, records + 1) for point in points]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        deaths = sum(pool.map(killed, [only] if only else every))
    request.node.user_properties.append(("result", f"{deaths} kills, the same model each time"))
    figure("coordinator killed, before and after each record", deaths, "the same model each time")
    # Which devices say hello in one transaction differs: a run may be over a record sooner.
    assert only or deaths >= len(every) - 2 * DEVICES


@pytest.mark.timeout(600)
def test_killed_again_and_again_in_one_run_the_coordinator_still_arrives(
    matrix: Matrix, figure: Any
) -> None:
    calm, *_ = matrix.run("")
    # A new call, at most a hello of each device, and then one record more at the least.
    versions, deaths, _ = matrix.run(*[f"after_commit:kill@{DEVICES + 2}"] * LIVES)
    assert versions == calm
    assert deaths >= ROUNDS
    figure("deaths of the coordinator in one run of three rounds", deaths, "the same model")
