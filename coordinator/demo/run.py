# SPDX-License-Identifier: Apache-2.0
"""A whole federation on this machine: every participant a real process, all of it measured."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from coordinator import ledger
from coordinator.broker import embedded
from coordinator.compiler import export
from coordinator.demo import folders, score
from coordinator.demo.prepare import Start, prepare
from coordinator.demo.processes import Process, stop_all
from coordinator.demo.report import DeviceRow, Record, RoundRow
from coordinator.demo.settings import Settings
from edge_sdk import params
from edge_sdk.errors import FedgeError, StoreError
from edge_sdk.failpoints import VARIABLE
from edge_sdk.types import Params

Show = Callable[[str], None]
Result = dict[str, Any]
POLL_S = 0.2
BROKERS: dict[str, Literal["auto", "mosquitto", "amqtt"]] = {
    "embedded": "auto",
    "mosquitto": "mosquitto",
    "amqtt": "amqtt",
}


async def demo(settings: Settings, work: Path | None, *, show: Show) -> Record:
    """Run the federation to its last round and measure it.

    Args:
        settings: what is asked for.
        work: where the processes' files stay; a folder that is removed afterwards when None.
        show: takes each line of progress.

    Raises: FedgeError when a process that must live has died, with the last line that it printed.
    """
    began = time.monotonic()
    show("preparing the model and the rows of each device")
    start = await asyncio.to_thread(prepare, settings)
    with _folder(work) as folder:
        async with _broker(settings.broker) as url:
            fleet = Fleet(settings, start, folder, url)
            try:
                await fleet.run(show)
            finally:
                await asyncio.to_thread(fleet.stop)
        show("measuring the exported models, and each device alone")
        return await asyncio.to_thread(fleet.record, time.monotonic() - began)


class Fleet:
    """The processes of one run."""

    def __init__(self, settings: Settings, start: Start, folder: Path, url: str) -> None:
        self.settings, self.start, self.folder, self.url = settings, start, folder, url
        config = folders.coordinator_config(folder / "coordinator", settings, url, start.bundle)
        self._daemon = [sys.executable, "-m", "edge_sdk", "coordinator", "run"]
        self._daemon += ["--config", str(config)]
        self.store = config.parent / "store"
        self.coordinators = [self._coordinator()]
        self.devices = [self._device(i) for i in range(settings.devices)]

    async def run(self, show: Show) -> None:
        """Wait until the last version is there, telling how each round ended."""
        shown = 0
        while True:
            await asyncio.sleep(POLL_S)
            entries = await asyncio.to_thread(self._look)
            for entry in entries[shown:]:
                show(_line(entry))
            shown = len(entries)
            if entries and entries[-1]["version"] >= self.settings.rounds:
                return
            await asyncio.to_thread(self._pull_the_plug, len(entries) + 1, show)

    def rounds(self) -> list[Result]:
        """Return the rounds that have ended, as the coordinator's store has them."""
        if not (self.store / ledger.DATABASE).exists():
            return []
        try:
            found = ledger.rounds(self.store, folders.TASK)
        except StoreError:  # it is being made just now
            return []
        return [row for row in found if row["outcome"] != "open"]

    def _look(self) -> list[Result]:
        for process in (*self.coordinators, *self.devices):
            process.watch()
        self._all_alive()
        return self.rounds()

    def _all_alive(self) -> None:
        if self.coordinators[-1].exit is not None and not self._finished():
            raise FedgeError(f"the coordinator stopped: {self.coordinators[-1].last_line()}")
        doomed = set(self.settings.droppers)
        for number, device in enumerate(self.devices):
            if device.exit is not None and number not in doomed:
                raise FedgeError(f"device {number} stopped: {device.last_line()}")

    def _finished(self) -> bool:
        entries = self.rounds()
        return bool(entries) and entries[-1]["version"] >= self.settings.rounds

    def _pull_the_plug(self, number: int, show: Show) -> None:
        due = number == self.settings.kill_coordinator and len(self.coordinators) == 1
        if due and any(u["folded"] is None for u in ledger.updates(self.store, folders.TASK)):
            self.coordinators[0].kill()
            self.coordinators[0].wait()
            show(f"round {number:>2}  the coordinator is killed in mid-round and started again")
            self.coordinators.append(self._coordinator())

    def _coordinator(self) -> Process:
        return Process(self._daemon, self.folder / "coordinator" / "log")

    def _device(self, number: int) -> Process:
        place = self.folder / f"device-{number:03}"
        rows = self.start.split.devices[number]
        config = folders.device_config(place, self.settings, self.url, rows)
        command = [self.settings.device_python, "-m", "edge_sdk", "device", "run"]
        points = failpoints(self.settings, number)
        environment = {VARIABLE: points} if points else {}
        return Process([*command, "--config", str(config)], place / "log", environment)

    def stop(self) -> None:
        """Stop the devices, then the coordinator."""
        stop_all(self.devices)
        stop_all(self.coordinators)

    def record(self, seconds: float) -> Record:
        """Measure what the run came to."""
        settings, bundle, split = self.settings, self.start.bundle, self.start.split
        states = [folders.status(self.folder / f"device-{i:03}") for i in range(settings.devices)]
        rounds = [self._row(entry) for entry in self.rounds()]
        final = self._params(settings.rounds)
        model = export(bundle, final)
        rounds_each = round(settings.rounds * settings.cohort / settings.devices)
        steps = [rounds_each * self._steps(len(y)) for _, y in split.devices]
        alone = score.alone(
            bundle,
            split.devices,
            steps,
            (split.x_test, split.y_test),
            batch=settings.batch,
            seed=settings.seed,
        )
        sums = [s for s in states if s.get("rounds")]
        return Record(
            accuracy_before=score.exported(bundle, bundle.params(), split.x_test, split.y_test),
            accuracy_alone=float(np.mean(alone)),
            accuracy_after=score.accuracy(model, split.x_test, split.y_test),
            rounds=rounds,
            devices=[self._device_row(*pair) for pair in zip(self.devices, states, strict=True)],
            bytes_up_mean=_mean(sums, "bytes_up"),
            bytes_down_mean=_mean(sums, "bytes_down"),
            bytes_dense=4 * params.count(bundle.shapes),
            device_rss_mib=max(d.peak_mib for d in self.devices),
            training_rss_mib=max(map(_child_mib, states), default=0.0),
            coordinator_rss_mib=max(c.peak_mib for c in self.coordinators),
            model_digest=ledger.models(self.store, folders.TASK)[-1]["digest"],
            model_sha256=hashlib.sha256(model).hexdigest(),
            broker=self.url,
            seconds=seconds,
            settings={k: str(getattr(settings, k)) for k in Settings.__slots__},
        )

    def _steps(self, rows: int) -> int:
        return self.settings.epochs * -(-rows // self.settings.batch)

    def _params(self, version: int) -> Params:
        flat = ledger.weights(self.store, folders.TASK, version)
        return params.unflatten(flat, self.start.bundle.shapes)

    def _row(self, entry: Result) -> RoundRow:
        split, accuracy = self.start.split, None
        if entry["outcome"] == "commit":
            weights = self._params(entry["version"])
            accuracy = score.exported(self.start.bundle, weights, split.x_test, split.y_test)
        counts = (len(entry["reported"]), len(entry["left"]), len(entry["late"]))
        return RoundRow(entry["number"], entry["outcome"], *counts, accuracy)

    def _device_row(self, process: Process, state: dict[str, Any]) -> DeviceRow:
        own, child = process.peak_mib, _child_mib(state)
        return DeviceRow(str(state.get("device", "")), process.pid, process.exit, own, child)


def failpoints(settings: Settings, number: int) -> str:
    """Return what befalls a device: droppers die one after another, stragglers are always late."""
    if number in settings.droppers:
        return f"before_last_chunk:kill@{1 + number % 3}"
    if number in settings.stragglers:
        return f"after_train:sleep={settings.deadline_s + 1}"
    return ""


def _line(entry: Result) -> str:
    loss = entry["metrics"].get("loss")
    told = "" if loss is None else f"  loss {loss:.3f}"
    counts = "".join(f"  {name} {len(entry[name])}" for name in ("left", "late") if entry[name])
    reported = len(entry["reported"])
    return f"round {entry['number']:>2}  {entry['outcome']}  reported {reported}{counts}{told}"


def _child_mib(state: dict[str, Any]) -> float:
    return float(state.get("child_rss_peak_kib", 0)) / 1024


def _mean(states: list[dict[str, Any]], name: str) -> float:
    rounds = sum(int(s["rounds"]) for s in states)
    return sum(float(s[name]) for s in states) / rounds if rounds else 0.0


@contextlib.contextmanager
def _folder(work: Path | None) -> Iterator[Path]:
    if work is not None:
        work.mkdir(parents=True, exist_ok=True)
        yield work
        return
    made = Path(tempfile.mkdtemp(prefix="fedge-demo-"))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


@contextlib.asynccontextmanager
async def _broker(broker: str) -> AsyncIterator[str]:
    if broker not in BROKERS:
        yield broker
        return
    async with embedded(kind=BROKERS[broker]) as url:
        yield url
