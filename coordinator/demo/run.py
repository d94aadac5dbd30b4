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
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np

from coordinator import ledger
from coordinator.broker import embedded
from coordinator.compiler import export
from coordinator.demo import detection, folders, score
from coordinator.demo.prepare import Start, prepare
from coordinator.demo.processes import Process, stop_all
from coordinator.demo.report import DeviceRow, Record, RoundRow
from coordinator.demo.settings import Settings
from edge_sdk import params
from edge_sdk.engine import AUTO, ENGINES
from edge_sdk.errors import FedgeError, StoreError
from edge_sdk.failpoints import VARIABLE
from edge_sdk.types import Params

Show = Callable[[str], None]
Result = dict[str, Any]
POLL_S = 0.2
SETTLE_S = 15.0
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
                if fleet.judge.finds_anomalies:
                    await fleet.settled()
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
        self.judge = start.judge
        self.coordinators = [self._coordinator()]
        self.hosts = {group: self._host(group) for group in settings.groups}

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
        for process in (*self.coordinators, *self.hosts.values()):
            process.watch()
        self._all_alive()
        return self.rounds()

    def _all_alive(self) -> None:
        if self.coordinators[-1].exit is not None and not self._finished():
            raise FedgeError(f"the coordinator stopped: {self.coordinators[-1].last_line()}")
        doomed = set(self.settings.droppers)
        for group, host in self.hosts.items():
            if host.exit is not None and group[0] not in doomed:
                raise FedgeError(f"{_named(group)} stopped: {host.last_line()}")

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

    def _host(self, group: range) -> Process:
        """Start the process of one device, or of several."""
        command = [self.settings.device_python, "-m", "edge_sdk", "device", "run"]
        for number in group:
            command += ["--config", str(self._configured(number))]
        points = failpoints(self.settings, group[0])
        environment = {VARIABLE: points} if points else {}
        return Process(command, self._place(group[0]) / "log", environment)

    def _configured(self, number: int) -> Path:
        rows = self.start.split.devices[number]
        quantile = detection.LEVEL if self.judge.finds_anomalies else None
        return folders.device_config(self._place(number), self.settings, self.url, rows, quantile)

    def _place(self, number: int) -> Path:
        return self.folder / f"device-{number:03}"

    async def settled(self) -> None:
        """Wait until the devices that are left have said what they make of the last model."""
        until = time.monotonic() + SETTLE_S
        while time.monotonic() < until:
            alive = [g for g, host in self.hosts.items() if host.exit is None]
            states = [folders.status(self._place(n)) for g in alive for n in g]
            if all(s.get("version") == self.settings.rounds for s in states):
                return
            await asyncio.sleep(POLL_S)

    def stop(self) -> None:
        """Stop the devices, then the coordinator."""
        stop_all(list(self.hosts.values()))
        stop_all(self.coordinators)

    def record(self, seconds: float) -> Record:
        """Measure what the run came to, and write the model where it is wanted."""
        settings, bundle, judge = self.settings, self.start.bundle, self.judge
        states = [folders.status(self._place(i)) for i in range(settings.devices)]
        rounds = [self._row(entry) for entry in self.rounds()]
        model = export(bundle, self._params(settings.rounds))
        if settings.export is not None:
            settings.export.write_bytes(model)
        rows, alone = self._alone()
        sizes = [u["size"] for u in ledger.updates(self.store, folders.TASK)]
        return Record(
            measure=judge.measure,
            accuracy_before=judge.score(bundle.params()),
            accuracy_alone=float(np.mean([judge.score_of(one) for one in alone])),
            accuracy_after=judge.score_of(model),
            anomalies=self._anomalies(model, rows, alone, states) if judge.finds_anomalies else {},
            rounds=rounds,
            devices=[
                self._device_row(group, host, states[number])
                for group, host in self.hosts.items()
                for number in group
            ],
            bytes_up_mean=_mean(states, "bytes_up"),
            bytes_down_mean=_mean(states, "bytes_down"),
            bytes_update_mean=float(np.mean(sizes)),
            bytes_dense=4 * params.count(bundle.shapes),
            bytes_export=len(model),
            device_rss_mib=max(host.peak_mib for host in self.hosts.values()),
            training_rss_mib=max(map(_child_mib, states), default=0.0),
            coordinator_rss_mib=max(c.peak_mib for c in self.coordinators),
            model_digest=ledger.models(self.store, folders.TASK)[-1]["digest"],
            model_sha256=hashlib.sha256(model).hexdigest(),
            broker=self.url,
            seconds=seconds,
            settings={k: str(getattr(settings, k)) for k in Settings.__slots__},
        )

    def _alone(self) -> tuple[list[score.Rows], list[bytes]]:
        """Train devices by themselves, as long as if each had been invited to every round."""
        devices, settings = self.start.split.devices, self.settings
        chosen = np.linspace(0, len(devices) - 1, min(len(devices), score.MOST_ALONE))
        rows = [devices[int(i)] for i in chosen]
        steps = [settings.rounds * self._steps(len(y)) for _, y in rows]
        options = {"batch": settings.batch, "seed": settings.seed, "engine": _here(settings.engine)}
        return rows, score.alone(self.judge, rows, steps, **options)  # type: ignore[arg-type] # names and values belong together

    def _anomalies(
        self, model: bytes, rows: list[score.Rows], alone: list[bytes], states: list[Result]
    ) -> Result:
        """Say what thresholds find: before, alone, and together with what the devices told."""
        judge, shipped = self.judge, export(self.start.bundle, self.start.bundle.params())
        told = [s["error_threshold"] for s in states if s.get("version") == self.settings.rounds]
        before = detection.agree([judge.threshold(shipped, own) for own in rows])
        pairs = zip(alone, rows, strict=True)
        each = [judge.detection(one, judge.threshold(one, own)) for one, own in pairs]
        found = {
            "shipped": judge.detection(shipped, before),
            "alone": detection.mean(each),
            "together": judge.detection(model, detection.agree(told)),
        }
        return {"thresholds": told, **{name: asdict(one) for name, one in found.items()}}

    def _steps(self, rows: int) -> int:
        return self.settings.epochs * -(-rows // self.settings.batch)

    def _params(self, version: int) -> Params:
        flat = ledger.weights(self.store, folders.TASK, version)
        return params.unflatten(flat, self.start.bundle.shapes)

    def _row(self, entry: Result) -> RoundRow:
        accuracy = None
        if entry["outcome"] == "commit":
            accuracy = self.judge.score(self._params(entry["version"]))
        counts = (len(entry["reported"]), len(entry["left"]), len(entry["late"]))
        return RoundRow(entry["number"], entry["outcome"], *counts, accuracy)

    def _device_row(self, group: range, host: Process, state: Result) -> DeviceRow:
        own, child, name = host.peak_mib, _child_mib(state), str(state.get("device", ""))
        return DeviceRow(name, host.pid, host.exit, own, child, len(group))


def failpoints(settings: Settings, number: int) -> str:
    """Return what befalls a device: droppers die one after another, stragglers are always late."""
    if number in settings.droppers:
        return f"before_last_chunk:kill@{1 + number % 3}"
    if number in settings.stragglers:
        return f"after_train:sleep={settings.deadline_s + 1}"
    return ""


def _here(engine: str) -> str:
    """Return the engine if this Python has it, as that of the devices may; else any."""
    return engine if engine in ENGINES and ENGINES[engine].is_installed else AUTO


def _named(group: range) -> str:
    return f"device {group[0]}" if len(group) == 1 else f"devices {group[0]} to {group[-1]}"


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
