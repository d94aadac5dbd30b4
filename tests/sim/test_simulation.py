# SPDX-License-Identifier: Apache-2.0
"""The production coordinator and devices, in virtual time, under every kind of fault."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from coordinator.simulation import CLASSES, Outcome, Setup, simulate
from coordinator.simulation.cli import main
from coordinator.simulation.faults import draw
from coordinator.simulation.loop import VirtualLoop
from coordinator.simulation.many import outcomes
from edge_sdk.errors import ConfigError

QUICK = 40
SEEDS = int(os.environ.get("FEDGE_SIM_SEEDS", "2000"))
"""Of the long run; nightly it is 50000."""


def told(outcome: Outcome) -> str:
    """What to print of a run in which an invariant broke."""
    story = "\n".join(outcome.latest)
    return f"{story}\n{outcome.broken}\nagain: fedge simulate --seed {outcome.seed}"


@pytest.mark.parametrize("first", range(0, QUICK, 4))
def test_every_invariant_holds_under_all_faults(first: int) -> None:
    for seed in range(first, first + 4):
        outcome = simulate(Setup(seed))
        assert outcome.holds, told(outcome)


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_every_invariant_holds_over_thousands_of_seeds() -> None:
    faults, receipts, count = set[str](), set[str](), 0
    for outcome in outcomes([Setup(seed) for seed in range(QUICK, QUICK + SEEDS)]):
        assert outcome.holds, told(outcome)
        faults |= outcome.faults.keys()
        receipts |= outcome.receipts.keys()
        count += 1
    assert count == SEEDS
    assert receipts == {"counted", "late", "duplicate", "stale", "refused"}
    wanted = {"lose", "repeat", "corrupt", "partition", "broker", "kill", "stop", "power cut"}
    assert faults == wanted | {"disk", "unready", "leave", "replay"}


@pytest.mark.parametrize("kind", CLASSES)
def test_one_kind_of_fault_alone(kind: str) -> None:
    outcome = simulate(Setup(11, faults=(kind,)))
    assert outcome.holds, told(outcome)


def test_without_faults_rounds_commit_and_nothing_goes_wrong() -> None:
    for seed in range(3):
        outcome = simulate(Setup(seed, devices=6, rounds=3, faults=()))
        assert outcome.holds, told(outcome)
        assert not outcome.faults
        assert len(outcome.versions) == 4


def test_real_signatures_in_one_seed_of_fifty() -> None:
    outcome = simulate(Setup(49, devices=5, rounds=2))
    assert outcome.holds, told(outcome)


@pytest.mark.parametrize("seed", [3, 8])
def test_a_seed_tells_the_same_story_in_any_process(seed: int) -> None:
    code = f"from coordinator.simulation import *; print(simulate(Setup({seed})).trace)"
    here = simulate(Setup(seed)).trace
    for salt in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": salt}
        ran = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        assert ran.stdout.strip() == here


def test_another_seed_tells_another_story() -> None:
    assert simulate(Setup(3, rounds=2)).trace != simulate(Setup(4, rounds=2)).trace


def test_the_command_says_what_happened(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seed", "5", "--devices", "6", "--rounds", "2"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("seed 5: ")
    assert "version 2  " in said
    assert main(["--seed", "5", "--devices", "6", "--rounds", "2", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["trace"] in said


def test_the_command_runs_many_seeds(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--seeds", "3", "--devices", "5", "--rounds", "1", "--faults", "network,disk"]
    assert main(options) == 0
    assert capsys.readouterr().out.startswith("3 seeds, ")


def test_what_broke_is_shown_with_the_command_that_repeats_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coordinator.desk.Desk.fold", lambda *_: 1 / 0)
    options = ["--seed", "2", "--devices", "5", "--rounds", "2", "--faults", "device"]
    assert main(options) == 1
    said = capsys.readouterr().err
    assert "crash does not hold: " in said
    assert "ZeroDivisionError" in said
    assert "again: fedge simulate --seed 2 --devices 5 --rounds 2 --faults device" in said


def test_a_task_of_a_configuration_is_simulated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "coordinator.toml"
    pace = '["rounds", { cohort = 4, quorum = 2, deadline_s = 20, count = 2 }]'
    file.write_text(f'[task.pump]\nbundle = "pump.fedge"\ncodec = "lean"\npace = {pace}\n')
    assert main([str(file), "--seed", "1", "--devices", "8"]) == 0
    assert "version 2  " in capsys.readouterr().out
    with pytest.raises(ConfigError, match="expected a task of"):
        main([str(file), "--task", "fan"])


def test_an_unknown_kind_of_fault_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"expected faults among network, .* got 'meteor'"):
        main(["--faults", "meteor"])


def test_faults_that_are_left_out_do_not_strike() -> None:
    import random

    faults = draw(random.Random(1), ("disk",))  # noqa: S311
    assert faults.any_message == faults.doomed == faults.leave == 0
    assert faults.disk_every_s < 1000


def test_virtual_time_passes_at_once_and_what_can_never_happen_is_an_error() -> None:
    loop = VirtualLoop(lambda *_: None)

    async def nap() -> float:
        await asyncio.sleep(1e6)
        return asyncio.get_running_loop().time()

    assert loop.run(nap()) == pytest.approx(1e6)
    stuck = VirtualLoop(lambda *_: None)
    waiting = asyncio.Event().wait()
    with pytest.raises(RuntimeError, match="nothing is left to happen"):
        stuck.run(waiting)
