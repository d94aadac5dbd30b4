# SPDX-License-Identifier: Apache-2.0
"""The coordinator killed before and after every record of its journal: the same model comes out.

Three rounds of eight devices that train for real, a fresh federation for each kill. A kill that
comes to another model, or an update lost or counted twice, fails with the place to kill at:
FEDGE_KILL_AT=before_commit@17 replays that one.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from crash_matrix import ONLY, Matrix, deaths_at, note
from live_rounds import Boards, check_journal, daemon, digests

pytestmark = [pytest.mark.broker, pytest.mark.slow]
DEVICES, ROUNDS = 8, 3
LIVES = 60


class Kills(Matrix):
    """Runs in which the coordinator is killed."""

    def run(self, *failpoints: str, within_s: float = 240.0) -> tuple[list[str], int, str]:
        """Run a federation whose coordinator has one life a failpoint, until it ends by itself.

        Give the hash of each version, how many lives were cut short, and the log.
        """
        deaths = 0
        with self.setting(failpoints[0] or "calm") as (config, url, trainer):
            boards = Boards(config.parent, [url] * DEVICES, trainer)
            log = config.parent / "coordinator.log"
            with contextlib.closing(boards):
                boards.start()
                for failpoint in failpoints:
                    with daemon(config, "--exit-when-done", failpoints=failpoint) as child:
                        code = child.wait(within_s)
                    if code == 0:
                        break
                    assert code == -signal.SIGKILL, log.read_text()[-2000:]
                    deaths += 1
                assert code == 0
                check_journal(config, self.template, boards.receipts)
                return digests(config), deaths, log.read_text()


@pytest.fixture
def matrix(quick: Path, start_mosquitto: Any) -> Iterator[Kills]:
    with contextlib.closing(Kills(quick, start_mosquitto, DEVICES, ROUNDS)) as made:
        yield made


@pytest.mark.timeout(900)
def test_killed_at_any_record_of_its_journal_the_coordinator_comes_to_the_same_model(
    matrix: Kills, figure: Any, request: pytest.FixtureRequest
) -> None:
    calm, _, log = matrix.run("before_commit:sleep=0")
    records = log.count("failpoint name=before_commit")
    assert records >= ROUNDS * (DEVICES + 2)  # at the least: opened, each update, committed
    assert len(set(calm)) == ROUNDS + 1

    def killed(place: str) -> int:
        point, _, at = place.partition("@")
        versions, deaths, _ = matrix.run(f"{point}:kill@{at}", "")
        assert versions == calm
        return deaths

    points = ("before_commit", "after_commit")
    every = [f"{point}@{at}" for at in range(1, records + 1) for point in points]
    deaths = deaths_at(every, killed)
    note(request, deaths)
    figure("coordinator killed, before and after each record", deaths, "the same model each time")
    # Which devices say hello in one transaction differs: a run may be over a record sooner.
    assert ONLY in os.environ or deaths >= len(every) - 2 * DEVICES


@pytest.mark.timeout(600)
def test_killed_again_and_again_in_one_run_the_coordinator_still_arrives(
    matrix: Kills, figure: Any
) -> None:
    calm, *_ = matrix.run("")
    # A new call, at most a hello of each device, and then one record more at the least.
    versions, deaths, _ = matrix.run(*[f"after_commit:kill@{DEVICES + 2}"] * LIVES)
    assert versions == calm
    assert deaths >= ROUNDS
    figure("deaths of the coordinator in one run of three rounds", deaths, "the same model")
