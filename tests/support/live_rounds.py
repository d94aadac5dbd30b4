# SPDX-License-Identifier: Apache-2.0
"""A federation whose result is the same in every run: a coordinator process, real devices.

The devices train for real, one after another, so that each update is a transaction of its own, and
one child trains for all of them. `Template` is what every run of a test begins with: keys, examples
and the bundle, made once.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hand_bundles import examples, mlp

from coordinator import ledger
from coordinator.config import load
from coordinator.replay import replay
from coordinator.service import Coordinator
from edge_sdk import messages
from edge_sdk.bundle import Bundle
from edge_sdk.device import Device
from edge_sdk.errors import FedgeError
from edge_sdk.failpoints import VARIABLE
from edge_sdk.messages import Receipt
from edge_sdk.signing import DeviceKey
from edge_sdk.training import LocalTraining, TrainFailed, TrainJob, TrainResult
from edge_sdk.transport.mqtt import Mqtt

TASK = "t"
SIZES = (6, 5, 3)
BUNDLE = mlp(SIZES, quantized=True)
PATIENCE_S = 120.0
CONFIG = """
broker = "{broker}"
store = "store"
[task.t]
bundle = "t.fedge"
codec = {codec}
pace = ["rounds", {{ cohort = {cohort}, quorum = {cohort}, deadline_s = 300, count = {count} }}]
budget = {{ epochs = 2, batch = 8 }}
"""


def until(claim: Callable[[], object], what: str, within_s: float = PATIENCE_S) -> None:
    """Wait until a claim holds; fail with what was waited for."""
    ends = time.monotonic() + within_s
    pause = threading.Event()
    while not claim():
        assert time.monotonic() < ends, f"waited {within_s} s in vain for {what}"
        pause.wait(0.003)


class Template:
    """Folders of `count` devices with keys and examples, and of a coordinator, to copy."""

    def __init__(
        self,
        folder: Path,
        count: int,
        rounds: int,
        codec: str = '[["ef"], ["deadzone", 2.0]]',
        sizes: tuple[int, int, int] = SIZES,
    ) -> None:
        self.folder, self.count, self.rounds, self.codec = folder, count, rounds, codec
        self.bundle = mlp(sizes, quantized=True)
        self.calm: list[str] = []
        """The hashes of an undisturbed run, once a test has made one."""
        self.calm_kib = 0
        """The most memory that its coordinator had."""
        self.bundle.save(folder / "t.fedge")
        for index in range(count):
            state = folder / f"d{index}"
            with _never(state, self.bundle) as device:
                device.learn_many(*examples(20 + index, sizes, seed=index + 1))
        self.ids = [
            DeviceKey.load_or_create(folder / f"d{i}" / "identity.key").id for i in range(count)
        ]

    def copy(self, folder: Path, broker: str) -> Path:
        """Begin a run in `folder`; return the coordinator's configuration."""
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)
        config = folder / "coordinator.toml"
        config.write_text(
            CONFIG.format(broker=broker, cohort=self.count, count=self.rounds, codec=self.codec)
        )
        return config


@contextlib.contextmanager
def _never(state: Path, bundle: Bundle) -> Iterator[Device]:
    """Give a device that never connects."""
    device = Device("mqtt://127.0.0.1:1", task=TASK, bundle=bundle, state=state)
    try:
        yield device
    finally:
        device.close()


@contextlib.contextmanager
def daemon(
    config: Path, *args: str, failpoints: str = "", under: Sequence[str] = (), **env: str
) -> Iterator[subprocess.Popen[bytes]]:
    """Run the coordinator as a process; it is killed at the end if it still runs."""
    command = [sys.executable, "-m", "coordinator", "run", "--config", str(config), *args]
    with (
        (config.parent / "coordinator.log").open("ab") as log,
        subprocess.Popen(
            [*under, *command], env=os.environ | {VARIABLE: failpoints} | env, stderr=log
        ) as child,
    ):
        try:
            yield child
        finally:
            child.kill()


class Turns:
    """Who has a receipt for which round: a device trains when the one before it is through."""

    def __init__(self, count: int) -> None:
        self._through = [0] * count
        self._changed = threading.Condition()

    def heard(self, index: int, number: int) -> None:
        """Note a receipt of a device for a round."""
        with self._changed:
            self._through[index] = max(self._through[index], number)
            self._changed.notify_all()

    def wait_for(self, index: int, cancel: threading.Event) -> None:
        """Wait for the turn of a device. Raises: TrainFailed when cancelled."""
        ends = time.monotonic() + PATIENCE_S
        with self._changed:
            while not self._is_next(index):
                self._changed.wait(0.1)
                if cancel.is_set() or time.monotonic() > ends:
                    raise TrainFailed("cancelled while it waited for its turn")

    def _is_next(self, index: int) -> bool:
        mine, before = self._through[index], self._through[index - 1]
        return before == mine if index == 0 else before > mine


class Patient:
    """A training that first waits for something."""

    def __init__(self, inner: LocalTraining, wait: Callable[[threading.Event], None]) -> None:
        self._inner, self._wait = inner, wait

    def train(self, job: TrainJob, cancel: threading.Event) -> TrainResult:
        self._wait(cancel)
        return self._inner.train(job, cancel)


class Boards:
    """The devices of a run, in this process; `receipts` is all that they were told.

    Args:
        folder: where `Template.copy` put their states.
        brokers: the URL by which each device connects.
        trainer: what trains for all of them.
        may_train: what a device waits for before it trains, by its index; its turn if not given.
        first: the index of the first of them: those before it are elsewhere.
        options: of their connections.
    """

    def __init__(
        self,
        folder: Path,
        brokers: Sequence[str],
        trainer: LocalTraining,
        may_train: Callable[[int, threading.Event], None] | None = None,
        first: int = 0,
        **options: Any,
    ) -> None:
        self.receipts: list[Receipt] = []
        self.turns = Turns(first + len(brokers))
        self._folder, self._trainer, self._options = folder, trainer, options
        self._may_train = may_train or self.turns.wait_for
        self.devices = [self._device(url, index) for index, url in enumerate(brokers, first)]

    def _device(self, broker: str, index: int) -> Device:
        def heard(receipt: Receipt) -> None:
            self.receipts.append(receipt)
            self.turns.heard(index, receipt.round)

        def connect(client_id: str, will: tuple[str, bytes]) -> Mqtt:
            options = {"backoff_s": (0.05, 0.2)} | self._options
            return Listening(broker, client_id, will=will, heard=heard, **options)

        return Device(
            broker,
            task=TASK,
            bundle=self._folder / "t.fedge",
            state=self._folder / f"d{index}",
            trainer=Patient(self._trainer, lambda cancel: self._may_train(index, cancel)),
            connect=connect,
        )

    def start(self) -> None:
        for device in self.devices:
            device.start()

    def close(self) -> None:
        closing = [threading.Thread(target=device.close) for device in self.devices]
        for thread in closing:
            thread.start()
        for thread in closing:
            thread.join()


class Listening(Mqtt):
    """The device's transport, with an ear for receipts."""

    def __init__(self, *args: Any, heard: Callable[[Receipt], None], **options: Any) -> None:
        super().__init__(*args, **options)
        self._heard = heard

    def start(
        self, on_message: Callable[[str, bytes], None], on_state: Callable[[bool], None]
    ) -> None:
        def listen(topic: str, payload: bytes) -> None:
            if topic.endswith("/receipt"):
                message, _ = messages.decode(payload, topic)
                assert isinstance(message, Receipt)
                self._heard(message)
            on_message(topic, payload)

        super().start(listen, on_state)


def digests(config: Path) -> list[str]:
    """Return the hash of every version in the store, oldest first."""
    return [str(m["digest"]) for m in ledger.models(config.parent / "store")]


def rows(config: Path) -> list[dict[str, Any]]:
    """Return the counted updates so far; none while the store is being made."""
    with contextlib.suppress(FedgeError):
        return ledger.updates(config.parent / "store")
    return []


def last_waits(config: Path, template: Template) -> Callable[[int, threading.Event], None]:
    """Return a `may_train`: the last device waits for the others, so no round ends without them."""

    def wait(index: int, cancel: threading.Event) -> None:
        if index != template.count - 1:
            return
        ours = template.ids[index]
        mine = sum(u["device"] == ours for u in rows(config))
        while sum(u["device"] != ours for u in rows(config)) < (mine + 1) * index:
            if cancel.wait(0.02):
                raise TrainFailed("cancelled while it waited for the others")

    return wait


def check_journal(config: Path, template: Template, told: Sequence[Receipt]) -> None:
    """Assert that every update is in the version of its round, once, and every receipt is true."""
    counted = rows(config)
    wanted = {(r, d) for r in range(1, template.rounds + 1) for d in template.ids}
    assert sorted((u["round"], u["device"]) for u in counted) == sorted(wanted)
    assert all(u["folded"] == u["round"] for u in counted)
    hashes = {u["hash"] for u in counted}
    for receipt in told:
        assert receipt.outcome in {"counted", "duplicate"}, receipt
        assert receipt.update.hex() in hashes, receipt
    settings = load(config)
    for task, _ in settings.tasks:  # as `fedge coordinator verify`
        versions = list(replay(settings.store, task))
        assert len(versions) == template.rounds + 1
        assert all(version.holds for version in versions), versions


class Hosted:
    """A coordinator in a thread of this process, for tests whose victim is a device."""

    def __init__(self, config: Path) -> None:
        self._settings = load(config)
        self.coordinator: Coordinator | None = None
        self._done = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        with contextlib.suppress(asyncio.CancelledError), self._loop_closed():
            self._task = self._loop.create_task(self._train())
            self._loop.run_until_complete(self._task)

    @contextlib.contextmanager
    def _loop_closed(self) -> Iterator[None]:
        try:
            yield
        finally:
            self._loop.close()

    async def _train(self) -> None:
        settings = self._settings
        async with Coordinator(settings.broker, store=settings.store) as coordinator:
            self.coordinator = coordinator
            [(task, pace)] = settings.tasks
            async for _ in coordinator.train(task, pace):
                pass
            self._done.set()
            await asyncio.Event().wait()  # late receipts are still asked for

    @property
    def is_done(self) -> bool:
        """Whether the task is at its last version."""
        return self._done.is_set()

    def is_ready(self, device: str) -> bool:
        """Say whether a device stands ready for an invitation."""
        found = self.coordinator
        return found is not None and device in found.fleet.ready(TASK)

    def close(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join(10)
