# SPDX-License-Identifier: Apache-2.0
"""Where a device is tested: a broker in memory, a coordinator by script, time that a test moves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hand_bundles import examples
from scripted_coordinator import TASK, FakeTraining, Scripted, until, weights_of

from edge_sdk.bundle import Bundle
from edge_sdk.device import Device
from edge_sdk.transport.memory import MemoryBroker


class Clock:
    """Time that a test moves, and that goes on over restarts as the kernel's does."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def monotonic(self) -> float:
        return self.now


class Scene:
    """A broker, a coordinator with its bundle, and what makes a device with that state folder."""

    def __init__(self, state: Path, bundle: Bundle) -> None:
        self.state, self.bundle = state, bundle
        self.broker = MemoryBroker()
        self.coordinator = Scripted(self.broker.transport("coordinator"), bundle)
        self.coordinator.start()
        self.training = FakeTraining()

    def device(self, **options: Any) -> Device:
        options = {"bundle": self.bundle, "trainer": self.training} | options
        connect = self.broker.transport
        return Device("memory", task=TASK, state=self.state, connect=connect, **options)

    def until(self, claim: Callable[[], object]) -> None:
        until(claim, self.broker)

    def is_ready(self) -> bool:
        """Say whether the last that the coordinator heard is a device that stands ready."""
        return bool(self.coordinator.checkins) and self.coordinator.checkins[-1].ready

    def ready(self, device: Device) -> None:
        """Give examples and a model; wait until the device has checked in."""
        device.learn_many(*examples(40))
        self.coordinator.publish_model(0, weights_of(self.bundle))
        self.until(self.is_ready)
