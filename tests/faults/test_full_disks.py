# SPDX-License-Identifier: Apache-2.0
"""Disks that fill up and are emptied again, under processes: both sides go on by themselves.

Each victim has a file system of a few megabytes to itself, in a mount namespace of its own, which
needs no rights where the kernel lets users have namespaces.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from live_rounds import (
    TASK,
    Boards,
    Hosted,
    Template,
    check_journal,
    daemon,
    digests,
    rows,
    until,
)

from edge_sdk.lasting import LastingTrainer
from edge_sdk.training import TrainFailed

pytestmark = [pytest.mark.broker, pytest.mark.slow, pytest.mark.timeout(300)]
DEVICES, ROUNDS, MIB = 2, 2, 2**20
OPEN = ("allow_anonymous true", "set_tcp_nodelay true")
SIZE_MIB = 4


def small_disk(folder: Path) -> tuple[str, ...]:
    """Return what to run a process under, so that `folder` is a disk of its own, as it is now."""
    user = () if os.geteuid() == 0 else ("--map-root-user",)
    if subprocess.run(["unshare", "--mount", *user, "true"], check=False).returncode:
        pytest.skip("no mount namespaces here")
    script = (
        'cp -a "$0" "$0.was" && mount -t tmpfs -o size="$1"m,mode=700 tmpfs "$0" &&'
        ' cp -a "$0.was/." "$0" && shift && exec "$@"'
    )
    return ("unshare", "--mount", *user, "sh", "-c", script, str(folder), str(SIZE_MIB))


class Ballast:
    """What fills the disk of a process; it stands in the process's own view of the folder."""

    def __init__(self, pid: int, folder: Path) -> None:
        self.folder = Path(f"/proc/{pid}/root{folder}")

    @property
    def free(self) -> int:
        found = os.statvfs(self.folder)
        return found.f_bavail * found.f_frsize

    def fill(self) -> None:
        number = len(list(self.folder.glob("ballast*")))
        with contextlib.suppress(OSError), (self.folder / f"ballast{number}").open("wb") as file:
            while True:
                file.write(bytes(4096))
                file.flush()
        assert self.free < 4096

    def clear(self) -> None:
        for file in self.folder.glob("ballast*"):
            file.unlink()


def test_a_coordinator_whose_disk_fills_up_goes_on_once_there_is_room(
    template: Template, trainer: LastingTrainer, calm: list[str], quick: Path, start_mosquitto: Any
) -> None:
    broker = start_mosquitto(*OPEN)
    folder = quick / "coordinator"
    config = template.copy(folder, broker.url)
    store = folder / "store"
    store.mkdir()
    may = threading.Event()

    def may_train(index: int, cancel: threading.Event) -> None:
        while not may.wait(0.02):
            if cancel.is_set():
                raise TrainFailed("cancelled")

    boards = Boards(folder, [broker.url] * DEVICES, trainer, may_train)
    with (
        contextlib.closing(boards),
        daemon(config, under=small_disk(store)) as child,
    ):
        boards.start()
        until(lambda: all(d.state == "training" for d in boards.devices), "the first round")
        disk = Ballast(child.pid, store)
        disk.fill()
        may.set()
        until(lambda: all(d.status()["outbox"] for d in boards.devices), "their updates")
        until(lambda: "disk" in (folder / "coordinator.log").read_text(), "a word about the disk")
        assert not boards.receipts  # none before its update is safe
        assert child.poll() is None
        disk.clear()
        inside = Path(f"/proc/{child.pid}/root{store}")
        until(lambda: len(boards.receipts) >= DEVICES * ROUNDS, "the rounds to go on")
        seen = folder / "seen"
        until(lambda: _committed(inside, seen, config), "the last version")
    shutil.rmtree(store)
    shutil.move(seen / "store", store)
    check_journal(config, template, boards.receipts)
    assert digests(config) == calm


def _committed(inside: Path, seen: Path, config: Path) -> bool:
    """Copy the store out of the other namespace; say whether it holds the last version."""
    shutil.rmtree(seen, ignore_errors=True)
    shutil.copytree(inside, seen / "store", ignore=shutil.ignore_patterns("*.lock", "ballast*"))
    return len(digests(seen / "coordinator.toml")) == ROUNDS + 1


def test_a_device_whose_disk_fills_up_goes_on_once_there_is_room(
    template: Template, trainer: LastingTrainer, calm: list[str], quick: Path, start_mosquitto: Any
) -> None:
    broker = start_mosquitto(*OPEN)
    folder = quick / "device"
    config = template.copy(folder, broker.url)
    toml = folder / "device.toml"
    lines = [f'broker = "{broker.url}"', f'task = "{TASK}"', 'state = "d0"', 'bundle = "t.fedge"']
    toml.write_text("\n".join(lines))
    log = folder / "device.log"
    command = [sys.executable, "-m", "edge_sdk", "device", "run", "--config", str(toml)]
    victim, friend = template.ids
    with contextlib.ExitStack() as stack:
        hosted = stack.enter_context(contextlib.closing(Hosted(config)))
        out = stack.enter_context(log.open("ab"))
        child = stack.enter_context(
            subprocess.Popen([*small_disk(folder / "d0"), *command], stderr=out)
        )
        stack.callback(child.kill)
        until(lambda: hosted.is_ready(victim), "the device to be ready")
        disk = Ballast(child.pid, folder / "d0")
        disk.fill()

        def wait(index: int, cancel: threading.Event) -> None:
            done = sum(u["device"] == friend for u in rows(config))
            while sum(u["device"] == victim for u in rows(config)) <= done:
                if cancel.wait(0.02):
                    raise TrainFailed("cancelled")

        boards = Boards(folder, [broker.url], trainer, wait, first=1)
        stack.enter_context(contextlib.closing(boards))
        boards.start()
        until(lambda: boards.devices[0].state == "training", "the first round")
        until(lambda: "No space left" in log.read_text(), "a word about the disk")
        assert child.poll() is None
        assert not rows(config)
        disk.clear()
        until(lambda: hosted.is_done, "the rounds to go on")
        status = json.loads((disk.folder / "status.json").read_bytes())
        assert status["receipts"]["counted"] >= 1
    counted = rows(config)
    assert len({(u["round"], u["device"]) for u in counted}) == len(counted)
    assert {u["device"] for u in counted} == {victim, friend}
