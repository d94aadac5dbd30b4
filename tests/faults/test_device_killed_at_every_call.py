# SPDX-License-Identifier: Apache-2.0
"""A device killed at each system call of an upload that changes something: the same model.

Of two devices one is a process of its own. An undisturbed upload is traced first: every send,
write, flush, rename, unlink and creation of a file in the thread that deals with the coordinator
and in the one that holds the connection, from the invitation to the next one. Then a fresh
federation is run for each of them, whose device gets SIGKILL in place of that call, and is started
again. FEDGE_KILL_AT=0/fsync/2 replays the second fsync of the first thread.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from crash_matrix import ONLY, Matrix, Setting, deaths_at, note
from live_rounds import BUNDLE, TASK, Hosted, Patient, Template, check_journal, digests, rows, until

from edge_sdk.device import Device
from edge_sdk.training import TrainFailed
from edge_sdk.transport.mqtt import Mqtt

pytestmark = [pytest.mark.broker, pytest.mark.trace, pytest.mark.slow]
DEVICES, ROUNDS = 2, 2
CHANGING = "sendto,sendmsg,write,writev,pwrite64,fsync,fdatasync,openat,ftruncate,rename,renameat,renameat2,unlink,unlinkat,mkdir,mkdirat"  # noqa: E501 - one argument
LINE = re.compile(r"^(\d+) +(\w+)\((.*)$")


class Victim:
    """The device that is a process: start it, trace it, kill it."""

    def __init__(self, folder: Path, broker: str) -> None:
        self.state, self._log = folder / "d0", folder / "device.log"
        self._config = folder / "device.toml"
        lines = [f'broker = "{broker}"', f'task = "{TASK}"', 'state = "d0"', 'bundle = "t.fedge"']
        self._config.write_text("\n".join(lines))
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "edge_sdk", "device", "run", "--config", self._config]
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(command, stderr=log)

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def threads(self) -> list[int]:
        """Its threads but the first, in the order in which they began."""
        return sorted(int(p.name) for p in Path(f"/proc/{self.pid}/task").iterdir())[1:]

    @contextlib.contextmanager
    def traced(self, thread: int, *options: str) -> Iterator[None]:
        """Attach strace to one thread, or to all of them when it is the process."""
        command = ["strace", "-p", str(thread), *options]
        with subprocess.Popen(command, stderr=subprocess.PIPE) as tracer:
            assert tracer.stderr is not None
            assert b"attached" in (said := tracer.stderr.readline()), said
            drain = threading.Thread(target=tracer.stderr.read, daemon=True)
            drain.start()
            try:
                yield
            finally:
                tracer.terminate()
                drain.join()

    def end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()


class Run:
    """A federation of the victim and of a device that reports after it."""

    def __init__(self, template: Template, setting: Setting) -> None:
        self.template, self.config = template, setting.config
        self.hosted = Hosted(self.config)
        self._url, self._folder = setting.url, setting.config.parent
        self.victim = Victim(self._folder, self._url)
        self._friend = self._made(Patient(setting.trainer, self._wait))

    def _made(self, trainer: Patient) -> Device:
        def connect(client_id: str, will: tuple[str, bytes]) -> Mqtt:
            return Mqtt(self._url, client_id, will=will)

        state = self._folder / "d1"
        return Device(
            self._url, task=TASK, bundle=BUNDLE, state=state, trainer=trainer, connect=connect
        )

    def _wait(self, cancel: threading.Event) -> None:
        number = self._rounds_of(1) + 1
        while self._rounds_of(0) < number:
            if cancel.wait(0.02):
                raise TrainFailed("cancelled while it waited for the other device")

    def _rounds_of(self, index: int) -> int:
        return sum(u["device"] == self.template.ids[index] for u in rows(self.config))

    def until_ready(self) -> None:
        self.victim.start()
        until(lambda: self.hosted.is_ready(self.template.ids[0]), "the device to be ready")

    def begin(self) -> None:
        """Let the first round open."""
        self._friend.start()

    def until_done(self) -> list[str]:
        outbox = self.victim.state / "outbox"
        until(lambda: self.hosted.is_done, "the last round")
        until(lambda: not list(outbox.glob("*.update")), "the last receipt")
        check_journal(self.config, self.template, [])
        return digests(self.config)

    def close(self) -> None:
        self.victim.end()
        self._friend.close()
        self.hosted.close()


class Kills(Matrix):
    """Runs in which the victim is killed."""

    @contextlib.contextmanager
    def run(self, name: str) -> Iterator[Run]:
        with (
            self.setting(name) as setting,
            contextlib.closing(Run(self.template, setting)) as run,
        ):
            yield run

    def undisturbed(self) -> tuple[list[str], list[str]]:
        """Return the hash of each version, and the calls of the first upload as thread/call/n."""
        said = self.folder / "trace"
        with self.run("calm") as run:
            run.until_ready()
            threads = run.victim.threads
            options = ("-f", "-s", "200", "-o", str(said), "-e", f"trace={CHANGING}")
            with run.victim.traced(run.victim.pid, *options):
                run.begin()
                versions = run.until_done()
        return versions, calls(said.read_text().splitlines(), threads)

    def killed_at(self, place: str) -> tuple[list[str], bool]:
        """Return the hash of each version, and whether the call was met."""
        thread, call, nth = place.split("/")
        with self.run(place) as run:
            run.until_ready()
            inject = f"inject={call}:signal=KILL:when={nth}"
            target = run.victim.threads[int(thread)]
            with run.victim.traced(target, "-o", "/dev/null", "-e", inject):
                run.begin()
                process = run.victim.process
                assert process is not None
                until(lambda: process.poll() is not None or run.hosted.is_done, "the kill")
            was_killed = process.poll() == -signal.SIGKILL
            if was_killed:
                run.victim.start()
            return run.until_done(), was_killed


def calls(lines: list[str], threads: list[int]) -> list[str]:
    """Return the calls that change something, up to the second update in the outbox."""
    seen: Counter[tuple[int, str]] = Counter()
    found, updates = [], 0
    for line in lines:
        match = LINE.match(line)
        if match is None or int(match[1]) not in threads:
            continue
        thread, call, rest = threads.index(int(match[1])), match[2], match[3]
        seen[thread, call] += 1
        if call == "openat":
            updates += ".update." in rest
            if updates == 2:
                break
            if "O_CREAT" not in rest:
                continue
        if call == "write" and rest.startswith("2,"):  # the log
            continue
        found.append(f"{thread}/{call}/{seen[thread, call]}")
    return found


@pytest.fixture
def matrix(quick: Path, start_mosquitto: Any) -> Iterator[Kills]:
    if shutil.which("strace") is None:
        pytest.skip("strace is not on PATH")
    with contextlib.closing(Kills(quick, start_mosquitto, DEVICES, ROUNDS)) as made:
        yield made


@pytest.mark.timeout(900)
def test_killed_at_any_call_of_an_upload_the_device_counts_once_and_the_model_is_the_same(
    matrix: Kills, figure: Any, request: pytest.FixtureRequest
) -> None:
    calm, places = matrix.undisturbed()
    names = {place.split("/")[1] for place in places}
    assert {"sendto", "write", "fsync", "rename", "unlink", "openat"} <= names, places

    def killed(place: str) -> bool:
        versions, was_killed = matrix.killed_at(place)
        assert versions == calm
        return was_killed

    deaths = deaths_at(places, killed)
    note(request, deaths)
    figure("device killed at each call of an upload", deaths, "the same model each time")
    assert ONLY in os.environ or deaths >= 0.9 * len(
        places
    )  # one more ping or log line shifts the last ones
