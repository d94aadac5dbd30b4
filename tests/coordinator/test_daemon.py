# SPDX-License-Identifier: Apache-2.0
"""The daemon as a process of its own, on a real broker, with devices that fake the training."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_fleet import BUNDLE, FakeDevice

from coordinator import ledger
from edge_sdk import systemd, topics
from edge_sdk.errors import FedgeError
from edge_sdk.transport.mqtt import Mqtt

needs_mosquitto = pytest.mark.skipif(
    shutil.which("mosquitto") is None and not Path("/usr/sbin/mosquitto").exists(),
    reason="mosquitto is not installed",
)
CONFIG = """
broker = "{broker}"
store = "store"
[task.t]
bundle = "t.fedge"
codec = "dense"
pace = ["rounds", {{ cohort = 4, quorum = 2, deadline_s = 20, count = {count} }}]
"""


def until(condition: Callable[[], object], within_s: float = 15.0) -> None:
    ends = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < ends, f"not within {within_s} s"
        time.sleep(0.01)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[str]:
    with mosquitto(tmp_path) as url:
        yield url


@contextlib.contextmanager
def mosquitto(tmp_path: Path, port: int = 0) -> Iterator[str]:
    port = port or free_port()
    config = tmp_path / "mosquitto.conf"
    config.write_text(f"listener {port} 127.0.0.1\nallow_anonymous true\n")
    program = shutil.which("mosquitto") or "/usr/sbin/mosquitto"
    with subprocess.Popen(
        [program, "-c", str(config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as child:
        until(lambda: _listens(port))
        try:
            yield f"mqtt://127.0.0.1:{port}"
        finally:
            child.kill()


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.2):
        return True
    return False


class RealDevice(FakeDevice):
    """The fake device on a real connection: it reports as soon as it is invited."""

    def counted(self) -> list[int]:
        """Rounds in which an update of ours is known to count."""
        return [r.round for r in self.receipts if r.outcome in {"counted", "late", "duplicate"}]

    def __init__(self, url: str, index: int, *, reports: bool = True) -> None:
        super().__init__(None, index)  # type: ignore[arg-type]  # its broker is elsewhere
        self.url, self.reports = url, reports

    def start(self) -> None:
        will = self.frame(self.status(online=False), topics.status(self.id))
        self.transport = Mqtt(  # type: ignore[assignment]  # the same port
            self.url, self.id, will=(topics.status(self.id), will)
        )
        self.transport.subscribe(topics.down_filter("t", self.id), topics.offer("t"))
        self.transport.start(self._take, self._connected)

    def _connected(self, is_up: bool) -> None:
        if is_up:
            self.send(self.status(online=True), topics.status(self.id), retain=True)
            if "t" in self.offers:
                self.check_in()
            for waiting in list(self.outbox.values()):
                self.transport.publish(*waiting)

    def _take(self, topic: str, payload: bytes) -> None:
        seen = len(self.invites)
        super()._take(topic, payload)
        if len(self.invites) > seen and self.reports:
            self.report(self.invites[-1][1].round)


@contextlib.contextmanager
def fleet(url: str) -> Iterator[list[RealDevice]]:
    devices = [RealDevice(url, i) for i in (1, 2, 3, 4)]
    for device in devices:
        device.start()
    try:
        yield devices
    finally:
        for device in devices:
            device.transport.close()


def write_config(folder: Path, broker: str, count: int) -> Path:
    BUNDLE.save(folder / "t.fedge")
    config = folder / "coordinator.toml"
    config.write_text(CONFIG.format(broker=broker, count=count))
    return config


@contextlib.contextmanager
def daemon(
    config: Path, *args: str, under: tuple[str, ...] = (), **env: str
) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "coordinator", "run", "--config", str(config), *args]
    with subprocess.Popen(
        [*under, *command], env=os.environ | env, stderr=subprocess.PIPE, text=True
    ) as child:
        try:
            yield child
        finally:
            child.kill()


def ended(config: Path) -> list[dict[str, object]]:
    with contextlib.suppress(FedgeError):  # the store is being made just now
        return [r for r in ledger.rounds(config.parent / "store") if r["outcome"] != "open"]
    return []


@pytest.mark.broker
@needs_mosquitto
def test_the_daemon_trains_on_a_real_broker_and_ends_when_done(tmp_path: Path, broker: str) -> None:
    config = write_config(tmp_path, broker, 2)
    with fleet(broker) as devices, daemon(config, "--exit-when-done") as child:
        assert child.wait(30) == 0
        assert all(d.outcomes() == ["counted", "counted"] for d in devices)
    assert [(r["outcome"], r["version"]) for r in ended(config)] == [("commit", 1), ("commit", 2)]


@pytest.mark.broker
@needs_mosquitto
def test_a_daemon_killed_in_mid_round_comes_to_the_same_model(
    tmp_path: Path, broker: str, calm_digest: str
) -> None:
    config = write_config(tmp_path, broker, 3)
    with fleet(broker) as devices:
        with daemon(config) as child:
            until(lambda: len(ended(config)) >= 1)
            devices[3].reports = False
            until(lambda: any(u["folded"] is None for u in ledger.updates(tmp_path / "store")))
            child.send_signal(signal.SIGKILL)
            child.wait(10)
        safe = {(u["round"], u["device"]) for u in ledger.updates(tmp_path / "store")}
        devices[3].reports = True
        with daemon(config, "--exit-when-done") as child:
            assert child.wait(30) == 0
        receipts = {(r.round, d.id) for d in devices for r in d.receipts if r.outcome == "counted"}
    rows = ledger.updates(tmp_path / "store")
    assert receipts <= {(u["round"], u["device"]) for u in rows}
    assert safe <= {(u["round"], u["device"]) for u in rows}
    assert all(u["folded"] for u in rows)
    assert [m["version"] for m in ledger.models(tmp_path / "store")] == [0, 1, 2, 3]

    assert len(rows) == 12
    assert ledger.models(tmp_path / "store")[-1]["digest"] == calm_digest


def counted(config: Path) -> list[dict[str, object]]:
    with contextlib.suppress(FedgeError):  # the store is being made just now
        return ledger.updates(config.parent / "store")
    return []


@pytest.fixture(scope="module")
def calm_digest(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The model after three rounds in which nothing went wrong."""
    folder = tmp_path_factory.mktemp("calm")
    with (
        mosquitto(folder) as url,
        fleet(url),
        daemon(write_config(folder, url, 3), "--exit-when-done") as child,
    ):
        assert child.wait(30) == 0
    return str(ledger.models(folder / "store")[-1]["digest"])


@pytest.mark.broker
@pytest.mark.trace
@needs_mosquitto
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
@pytest.mark.parametrize("nth", [2, 5, 7, 8, 9, 11])
def test_killed_at_any_fsync_the_daemon_comes_to_the_same_model(
    tmp_path: Path, calm_digest: str, nth: int
) -> None:
    fault = f"inject=fdatasync:signal=KILL:when={nth}"
    strace = ("strace", "-f", "-qq", "--seccomp-bpf", "-o", "/dev/null", "-e", fault)
    with mosquitto(tmp_path) as url, fleet(url) as devices:
        config = write_config(tmp_path, url, 3)
        with daemon(config, "--exit-when-done", under=strace) as child:
            assert child.wait(60) == -signal.SIGKILL
        with daemon(config, "--exit-when-done") as child:
            assert child.wait(30) == 0
        until(lambda: all(len(set(d.counted())) == 3 for d in devices))
    assert ledger.models(tmp_path / "store")[-1]["digest"] == calm_digest
    assert all(u["folded"] == u["round"] for u in ledger.updates(tmp_path / "store"))


@pytest.mark.broker
@needs_mosquitto
def test_a_broker_that_dies_and_forgets_everything_costs_nothing(
    tmp_path: Path, calm_digest: str
) -> None:
    port = free_port()
    config = write_config(tmp_path, f"mqtt://127.0.0.1:{port}", 3)
    with contextlib.ExitStack() as stack:
        with mosquitto(tmp_path, port) as url:
            devices = stack.enter_context(fleet(url))
            child = stack.enter_context(daemon(config, "--exit-when-done"))
            devices[2].reports = False
            until(lambda: len(counted(config)) >= 3)
        devices[2].reports = True
        with mosquitto(tmp_path, port):
            assert child.wait(60) == 0
    assert ledger.models(tmp_path / "store")[-1]["digest"] == calm_digest


@pytest.mark.broker
@needs_mosquitto
def test_sigterm_ends_the_daemon_in_time_and_systemd_is_told(tmp_path: Path, broker: str) -> None:
    config = write_config(tmp_path, broker, 1000)
    address = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address)
        manager.settimeout(15)
        with daemon(config, NOTIFY_SOCKET=address, WATCHDOG_USEC="200000") as child:
            assert manager.recv(200).startswith(b"READY=1\nSTATUS=training t")
            assert manager.recv(200) == b"WATCHDOG=1"
            child.send_signal(signal.SIGTERM)
            started = time.monotonic()
            assert child.wait(5) == 0
            assert time.monotonic() - started < 5
            heard = {manager.recv(200)}
            while b"STOPPING=1" not in heard:
                heard.add(manager.recv(200))


def test_a_broker_that_is_not_there_is_one_line_and_exit_code_4(tmp_path: Path) -> None:
    config = write_config(tmp_path, f"mqtt://127.0.0.1:{free_port()}", 1)
    with daemon(config) as child:
        assert child.wait(20) == 4
        assert child.stderr is not None
        last = child.stderr.read().splitlines()[-1]
    assert last.startswith("fedge: ")
    assert "127.0.0.1" in last


def test_without_a_service_manager_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not systemd.notify("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", "/nowhere/socket")
    assert not systemd.notify("READY=1")


@pytest.mark.parametrize(
    ("usec", "pid", "expected"), [("2000000", None, 2.0), ("0", None, None), ("5", "1", None)]
)
def test_the_watchdog_is_fed_when_this_process_is_asked(
    monkeypatch: pytest.MonkeyPatch, usec: str, pid: str | None, expected: float | None
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", usec)
    if pid is None:
        monkeypatch.delenv("WATCHDOG_PID", raising=False)
    else:
        monkeypatch.setenv("WATCHDOG_PID", pid)
    assert systemd.watchdog_s() == expected
