# SPDX-License-Identifier: Apache-2.0
"""Many devices in few processes: each a device of its own, and what hurts one hurts no other."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from coordinator import ledger
from coordinator.demo import folders
from coordinator.demo.report import Record
from coordinator.demo.run import demo
from coordinator.demo.settings import Settings

Figure = Callable[[str, object, str], None]
PLANT = """import os, pathlib, signal
if "edge_sdk.worker" in pathlib.Path("/proc/self/cmdline").read_text().split("\\0"):
    try:
        pathlib.Path(__file__).with_name("once").mkdir()
        os.kill(os.getpid(), signal.SIGKILL)
    except FileExistsError:
        pass
"""
pytestmark = [pytest.mark.slow, pytest.mark.broker, pytest.mark.timeout(400)]


def run(work: Path, **settings: object) -> Record:
    return asyncio.run(demo(Settings(**settings), work, show=print))  # type: ignore[arg-type] # tests name the fields


def test_a_hundred_devices_learn_in_four_processes(tmp_path: Path, figure: Figure) -> None:
    record = run(tmp_path, devices=100, cohort=20, rounds=5)
    assert [r.reported for r in record.rounds] == [20] * 5
    assert all(device.exit == 0 for device in record.devices)
    assert len({device.pid for device in record.devices}) == 4
    assert len({device.id for device in record.devices}) == 100  # a key of its own each
    assert len({u["device"] for u in updates(tmp_path)}) > 20
    figure("demo: seconds for 100 devices, 5 rounds of 20", record.seconds, "< 180")
    figure("demo: MiB of a process of 25 devices", record.device_rss_mib, "<= 200")
    assert record.device_rss_mib <= 200
    assert record.seconds < 180


def test_in_one_process_devices_learn_what_they_learn_in_their_own(tmp_path: Path) -> None:
    apart = run(tmp_path / "apart", devices=4, cohort=4, rounds=2, hosts=4)
    shared = run(tmp_path / "shared", devices=4, cohort=4, rounds=2, hosts=1)
    assert len({d.pid for d in apart.devices}) == 4
    assert len({d.pid for d in shared.devices}) == 1
    assert [r.reported for r in shared.rounds] == [4, 4]
    assert abs(shared.accuracy_after - apart.accuracy_after) <= 0.05


def test_killed_and_late_devices_have_processes_of_their_own(tmp_path: Path) -> None:
    record = run(
        tmp_path, devices=12, cohort=12, rounds=3, hosts=2, drop=0.17, straggle=0.08, deadline_s=5.0
    )
    assert [d.exit for d in record.devices] == [-9, -9] + [0] * 10
    assert [d.hosted for d in record.devices] == [1, 1, 1] + [4] * 4 + [5] * 5
    assert sum(r.outcome == "commit" for r in record.rounds) == 3


def test_a_child_that_dies_is_replaced_and_the_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(PLANT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    record = run(tmp_path / "work", devices=3, cohort=3, rounds=2, hosts=1)
    log = (tmp_path / "work" / "device-000" / "log").read_text()
    assert log.count("training goes on from its checkpoint") == 1
    assert "killed by SIGKILL" in log
    assert all(device.exit == 0 for device in record.devices)
    assert [r.outcome for r in record.rounds] == ["commit", "commit"]
    assert record.rounds[0].reported == 3


def updates(work: Path) -> list[dict[str, object]]:
    return ledger.updates(work / "coordinator" / "store", folders.TASK)


def test_the_log_of_a_shared_process_tells_its_devices_apart(tmp_path: Path) -> None:
    record = run(tmp_path, devices=2, cohort=2, rounds=1, hosts=1)
    log = (tmp_path / "device-000" / "log").read_text()
    trained = set(re.findall(r"thread=fedge-agent-(\w+) trained round=1", log))
    assert trained == {device.id for device in record.devices}
    for number in range(2):
        state = tmp_path / f"device-{number:03}" / "state"
        assert (state / "identity.key").exists()
        assert json.loads((state / "status.json").read_bytes())["receipts"] == {"counted": 1}
