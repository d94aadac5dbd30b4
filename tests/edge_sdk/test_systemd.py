# SPDX-License-Identifier: Apache-2.0
"""What the service manager hears of a device: nothing that a timer alone could say."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_sdk.systemd import Service


class Watch:
    """A device's dealings with the watchdog, by hand."""

    def __init__(self, name: str) -> None:
        self.id, self.state, self.version = name, "idle", None
        self.turn: Callable[[], object] = lambda: None

    def watch(self, alive: Callable[[], object]) -> None:
        self.turn = alive


class Time:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


def service(every_s: float | None, *names: str) -> tuple[Service, list[str], Time, list[Watch]]:
    said: list[str] = []
    time, watches = Time(), [Watch(name) for name in names]
    made = Service(said.append, every_s, time)  # type: ignore[arg-type]  # the clock's one method
    for watch in watches:
        made.look_after(watch)
    return made, said, time, watches


def test_readiness_is_told_once_all_devices_have_started_and_how_they_are() -> None:
    made, said, _, (watch,) = service(60, "a")
    watch.turn()
    assert said == []
    made.ready()
    assert said == ["READY=1\nSTATUS=idle, no model yet"]


def test_the_watchdog_is_fed_by_turns_no_more_than_twice_in_its_time() -> None:
    made, said, time, (watch,) = service(60, "a")
    made.ready()
    for time.now in (0, 10, 20, 29, 30, 40):
        watch.turn()
    assert said[1:] == ["WATCHDOG=1", "WATCHDOG=1"]


def test_time_alone_feeds_nothing() -> None:
    made, said, time, (watch,) = service(60, "a")
    made.ready()
    watch.turn()
    time.now = 1e6
    assert said[1:] == ["WATCHDOG=1"]


def test_one_device_that_hangs_is_not_covered_up_by_those_that_do_not() -> None:
    made, said, time, (first, hangs) = service(60, "a", "b")
    made.ready()
    first.turn()
    hangs.turn()
    for time.now in range(30, 3000, 10):
        first.turn()
    assert said[1:].count("WATCHDOG=1") == 1
    hangs.turn()
    assert said[1:].count("WATCHDOG=1") == 2


def test_a_change_of_state_is_told_at_once_and_only_once() -> None:
    made, said, _, (watch,) = service(None, "a")
    made.ready()
    watch.state, watch.version = "training", 3  # type: ignore[assignment]  # a Device's are wider
    watch.turn()
    watch.turn()
    assert said[1:] == ["STATUS=training, version 3"]


def test_several_devices_are_counted_in_the_status() -> None:
    made, said, _, watches = service(None, "a", "b", "c")
    watches[2].state = "offline"
    made.ready()
    assert said == ["READY=1\nSTATUS=3 devices: 2 idle, 1 offline"]


def test_fedge_device_run_tells_the_manager_when_it_is_ready_that_it_lives_and_that_it_leaves(
    tmp_path: Path,
) -> None:
    (tmp_path / "device.toml").write_text(
        'broker = "mqtt://127.0.0.1:9"\ntask = "t"\nstate = "state"\n'
    )
    address = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address)
        manager.settimeout(30)
        environment = {**os.environ, "NOTIFY_SOCKET": address, "WATCHDOG_USEC": "1000000"}
        environment.pop("WATCHDOG_PID", None)
        words = [sys.executable, "-m", "edge_sdk", "device", "run", "--config", "device.toml"]
        child = subprocess.Popen(
            words, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL, text=True
        )
        try:
            assert manager.recv(500) == b"READY=1\nSTATUS=waiting, no model yet"
            assert b"WATCHDOG=1" in manager.recv(500)
            child.terminate()
            heard = b""
            while b"STOPPING=1" not in heard:
                heard = manager.recv(500)
            assert child.wait(20) == 0
        finally:
            child.kill()


def test_a_device_whose_thread_hangs_is_given_up_by_the_manager() -> None:
    """The real agent, its thread held in a turn: after that not one more sign of life."""
    script = textwrap.dedent(
        """
        import sys, tempfile, threading
        from edge_sdk.device import Device
        from edge_sdk.systemd import Service
        from edge_sdk.transport.memory import MemoryBroker
        said, beat, hang = [], threading.Event(), threading.Event()
        def send(state):
            said.append(state); beat.set()
        service = Service(send, every_s=1e-6)
        broker = MemoryBroker()
        device = Device("mqtt://x", task="t", state=tempfile.mkdtemp(),
                        connect=lambda name, will: broker.transport(name, will))
        service.look_after(device); service.ready(); beat.clear()
        device.start(); assert beat.wait(20)
        entered = threading.Event()
        def stuck():
            entered.set(); hang.wait(); return []
        device._agent._queue.put(stuck); assert entered.wait(20)
        before = said.count("WATCHDOG=1")
        for _ in range(50): device._agent.poke()
        print(before > 0, said.count("WATCHDOG=1") == before)
        hang.set(); device.close()
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.split() == ["True", "True"], done.stderr


@pytest.mark.parametrize("address", ["", "nonsense", "/nowhere/at/all"])
def test_without_a_manager_nobody_is_told_and_nothing_fails(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edge_sdk.systemd import notify

    monkeypatch.setenv("NOTIFY_SOCKET", address)
    assert notify("READY=1") is False
