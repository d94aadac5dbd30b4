# SPDX-License-Identifier: Apache-2.0
"""A coordinator that says what a test tells it to, over any transport, and notes what it hears."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from edge_sdk import chunks, messages, params, topics
from edge_sdk.bundle import Bundle
from edge_sdk.messages import CheckIn, Chunk, Invite, Message, Offer, Receipt, Status, Update
from edge_sdk.signing import DeviceKey
from edge_sdk.training import TrainJob, TrainResult
from edge_sdk.transport import Transport
from edge_sdk.transport.memory import MemoryBroker

TASK = "toy"
KEY = DeviceKey.from_seed(b"c" * 32)


def weights_of(bundle: Bundle, shift: float = 0.0) -> bytes:
    """Return the bundle's initial weights, all moved by `shift`, as they travel."""
    flat = params.flatten(bundle.params(), bundle.shapes) + np.float32(shift)
    return flat.astype("<f4").tobytes()


class Scripted:
    """One task's coordinator."""

    def __init__(self, transport: Transport, bundle: Bundle, key: DeviceKey = KEY) -> None:
        self.bundle, self.key, self.transport = bundle, key, transport
        self.checkins: list[CheckIn] = []
        self.updates: list[tuple[Update, bytes]] = []  # with the id that a receipt names
        self.statuses: list[Status] = []
        self.payloads: list[bytes] = []
        self.chunks: list[Chunk] = []
        self.call, self.round, self.version = 1, 0, 0
        self.model = weights_of(bundle)
        self.outcome: str | None = "counted"
        self._assembler = chunks.Assembler()

    def start(self) -> None:
        self.transport.subscribe(topics.up_filter(TASK), topics.status_filter())
        self.transport.start(self._take, lambda _up: None)

    def send(self, message: Message, topic: str, key: DeviceKey | None = None) -> None:
        retain = isinstance(message, Offer | messages.Part)
        self.transport.publish(
            topic, messages.encode(message, key or self.key, topic), retain=retain
        )

    def publish_model(self, version: int, model: bytes) -> None:
        """Retain the bundle, these weights, and the offer that names them."""
        self.version, self.model = version, model
        bundle = bytes.fromhex(self.bundle.digest)
        parts = chunks.parts("bundle", self.bundle.data, bundle, version, 2000)
        digest = hashlib.sha256(model).digest()
        parts += chunks.parts("weights", model, digest, version, 700)
        for part in parts:
            self.send(part, topics.part(TASK, part.what, part.index))
        self.offer()

    def offer(self, **changes: Any) -> None:
        fields: dict[str, Any] = {
            "task": TASK,
            "call": self.call,
            "round": self.round,
            "version": self.version,
            "bundle": bytes.fromhex(self.bundle.digest),
            "model": hashlib.sha256(self.model).digest(),
            "bundle_size": len(self.bundle.data),
            "model_size": len(self.model),
            "key": self.key.public,
            "state": "open",
        }
        self.send(Offer(**(fields | changes)), topics.offer(TASK))

    def invite(self, device: str, **changes: Any) -> None:
        self.round += 1
        fields: dict[str, Any] = {
            "round": self.round,
            "version": self.version,
            "model": hashlib.sha256(self.model).digest(),
            "deadline_s": 60.0,
            "codec": [["dense"]],
            "epochs": 1,
            "steps": None,
            "seconds": None,
            "batch": 8,
            "lr": None,
            "mu": None,
            "seed": 7,
        }
        self.send(Invite(**(fields | changes)), topics.down(TASK, device, "invite"))

    def receipt(self, device: str, update: bytes, outcome: str, **changes: Any) -> None:
        fields = {"round": self.round, "update": update, "outcome": outcome} | changes
        self.send(Receipt(**fields), topics.down(TASK, device, "receipt"))

    def _take(self, topic: str, payload: bytes) -> None:
        self.payloads.append(payload)
        message, signed = messages.decode(payload, topic)
        address = topics.parse(topic)
        if isinstance(message, Chunk):
            self.chunks.append(message)
            frame = self._assembler.add(address.device, message)
            if frame is None:
                return
            topic = topics.up(TASK, address.device, "update")
            message, signed = messages.decode(frame, topic, messages.MAX_TRANSFER)
        if isinstance(message, Status):
            self.statuses.append(message)
        elif isinstance(message, CheckIn):
            self.checkins.append(message)
        elif isinstance(message, Update):
            self.updates.append((message, signed.id))
            if self.outcome is not None:
                self.receipt(address.device, signed.id, self.outcome, round=message.round)


class FakeTraining:
    """Trains nothing: the delta is all `step`, unless `fail` says why not."""

    def __init__(self, step: float = 0.5) -> None:
        self.step, self.fail = step, ""
        self.jobs: list[TrainJob] = []
        self.may_end = threading.Event()
        self.may_end.set()

    def train(self, job: TrainJob, cancel: threading.Event) -> TrainResult:
        from edge_sdk.training import TrainFailed

        self.jobs.append(job)
        while not self.may_end.wait(0.01):
            if cancel.is_set():
                raise TrainFailed("cancelled")
        if self.fail:
            raise TrainFailed(self.fail)
        size = Path(job.weights).stat().st_size // 4
        np.full(size, self.step, "<f4").tofile(job.delta)
        return TrainResult(job.delta, 20, 3, 1, 0.25, 0.1, "epochs", 1 << 20)


def until(
    claim: Callable[[], object], broker: MemoryBroker | None = None, within_s: float = 10.0
) -> None:
    """Let messages flow until `claim` holds; fail when it does not."""
    deadline = time.monotonic() + within_s
    pause = threading.Event()
    while True:
        if broker is not None:
            broker.pump()
        if claim():
            return
        assert time.monotonic() < deadline, "it did not come true in time"
        pause.wait(0.005)
