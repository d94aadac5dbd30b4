# SPDX-License-Identifier: Apache-2.0
"""What tests of several parts share: a mosquitto on loopback, and waiting with a deadline."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

Until = Callable[[Callable[[], object], str], None]


@pytest.fixture
def until() -> Until:
    """Wait until a condition holds: `until(lambda: got, "a message")`; ten seconds at most."""

    def wait(holds: Callable[[], object], what: str, seconds: float = 10.0) -> None:
        deadline = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < deadline, f"waited {seconds} s in vain for {what}"
            time.sleep(0.005)

    return wait


class Mosquitto:
    """A mosquitto: `url`, `kill()` (as kill -9 does), `stop()`, `start()` on the same port."""

    def __init__(self, folder: Path, *lines: str, listener: tuple[str, ...] = ()) -> None:
        self.program = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin")
        if self.program is None:
            pytest.skip("mosquitto is not installed")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.url = f"mqtt://127.0.0.1:{self.port}"
        self.folder = folder
        user = ["user root"] if os.geteuid() == 0 else []
        config = [f"listener {self.port} 127.0.0.1", *listener, *user, *lines]
        self.config = folder / f"mosquitto-{self.port}.conf"
        self.config.write_text("\n".join(config) + "\n")
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        assert self.program is not None
        with (self.folder / "mosquitto.log").open("ab") as log:
            self.process = subprocess.Popen(
                [self.program, "-c", str(self.config)], stdout=log, stderr=log
            )
        deadline = time.monotonic() + 10
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            said = (self.folder / "mosquitto.log").read_text()
            assert self.process.poll() is None, f"mosquitto ended: {said}"
            assert time.monotonic() < deadline, f"mosquitto does not listen: {said}"
            time.sleep(0.01)

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def _end(self, number: signal.Signals) -> None:
        deadline = time.monotonic() + 10
        while self.process is not None:
            self.process.send_signal(number)  # again: mosquitto misses one right after its start
            try:
                self.process.wait(0.5)
                self.process = None
            except subprocess.TimeoutExpired:
                assert time.monotonic() < deadline, "mosquitto does not end"


@pytest.fixture
def start_mosquitto(tmp_path: Path) -> Iterator[Callable[..., Mosquitto]]:
    """Start a mosquitto with lines of configuration of the test's own; ended with the test."""
    started: list[Mosquitto] = []

    def start(*lines: str, listener: tuple[str, ...] = ()) -> Mosquitto:
        broker = Mosquitto(tmp_path, *lines, listener=listener)
        started.append(broker)
        broker.start()
        return broker

    yield start
    for broker in started:
        broker.stop()


@pytest.fixture
def mosquitto(start_mosquitto: Callable[..., Mosquitto], tmp_path: Path) -> Mosquitto:
    """A mosquitto that lets everybody in and keeps sessions over a `stop` (not over a `kill`)."""
    return start_mosquitto(
        "allow_anonymous true", "persistence true", f"persistence_location {tmp_path}/"
    )
