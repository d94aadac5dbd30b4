# SPDX-License-Identifier: Apache-2.0
"""A client of the broker that means harm, beside a federation at work: the model stays the same.

The broker gives this one every right, as if there were no access list: it hears all and may publish
anywhere. What is left is what signatures, checks and bounds hold.
"""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import bombs
import pytest
from live_rounds import TASK, Boards, Template, check_journal, daemon, digests, last_waits

from edge_sdk import messages, topics
from edge_sdk.errors import FedgeError
from edge_sdk.lasting import LastingTrainer
from edge_sdk.messages import CheckIn, Invite, Offer, Receipt, Status, Update
from edge_sdk.signing import DeviceKey
from edge_sdk.transport.mqtt import Mqtt

pytestmark = [pytest.mark.broker, pytest.mark.timeout(300)]
DEVICES, ROUNDS, SEED = 4, 2, 11
MOST_KIB = 48 << 10
"""What an attacked coordinator may have more of than a calm one, at its peak."""


Attack = Callable[[str, bytes], Iterator[tuple[str, bytes]]]


class Attacker:
    """Hears every message of others and answers each with what `attack` makes of it."""

    def __init__(self, url: str, attack: Attack) -> None:
        self.sent: set[bytes] = set()
        self._attack = attack
        self._mqtt = Mqtt(url, "attacker", window=20)
        self._mqtt.subscribe(f"{topics.PREFIX}/#")
        self._mqtt.start(self._heard, lambda _is_up: None)

    def _heard(self, topic: str, payload: bytes) -> None:
        if payload in self.sent:
            return
        for where, what in self._attack(topic, payload):
            self.sent.add(what)
            self._mqtt.publish(where, what)

    def close(self) -> None:
        self._mqtt.close()


def repeated() -> Attack:
    """Everything a second time, and all updates and receipts that were ever sent, newest first.

    Old offers, check-ins and states of devices have a test of their own.
    """
    said: list[tuple[str, bytes]] = []

    def attack(topic: str, payload: bytes) -> Iterator[tuple[str, bytes]]:
        if topics.parse(topic).kind in {"update", "chunk", "receipt"}:
            yield from said[::-1]
            said.append((topic, payload))
        yield topic, payload

    return attack


def spoiled() -> Attack:
    """Everything cut short, with bits flipped, of another version, elsewhere; and noise."""
    rng = random.Random(SEED)  # noqa: S311 - repeats by its seed

    def attack(topic: str, payload: bytes) -> Iterator[tuple[str, bytes]]:
        for _ in range(3):
            flipped = bytearray(payload)
            flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
            yield topic, bytes(flipped)
            yield topic, payload[: rng.randrange(1, len(payload))]
        yield topic, payload[:4] + b"\xff\xff" + payload[6:]
        yield topic, rng.randbytes(rng.randrange(1, 2000))
        yield topic + "/more", payload
        yield f"{topics.PREFIX}/t/{TASK}/up/0/nobody/update", payload

    return attack


def forged(ids: list[str]) -> Attack:
    """In the name of devices and of the coordinator, signed with another key."""
    key = DeviceKey.from_seed(b"e" * 32)

    def attack(topic: str, payload: bytes) -> Iterator[tuple[str, bytes]]:
        with contextlib.suppress(FedgeError):
            message, _ = messages.decode(payload, topic)
            for where, lie in [(topic, message), *_lies(topic, message, ids, key.public)]:
                yield where, messages.encode(lie, key, where)

    return attack


def _lies(  # noqa: PLR0911 - one for each kind of message
    topic: str, message: messages.Message, ids: list[str], key: bytes
) -> list[tuple[str, messages.Message]]:
    """Return what a message could be turned into to do harm, and where it would be sent."""
    match message:
        case Offer():
            return [(topic, replace(message, key=key, version=message.version + 9))]
        case Status():
            gone = replace(message, online=False, boot=message.boot + 1)
            return [(topic, gone), (topic, replace(gone, key=key))]
        case CheckIn():
            return [(topic, replace(message, ready=False))]
        case Invite():
            return [(topics.down(TASK, d, "invite"), replace(message, seed=1)) for d in ids]
        case Update():
            more = replace(message, examples=10**6)
            lies: list[tuple[str, messages.Message]]
            lies = [(topics.up(TASK, d, "update"), more) for d in ids]
            settled = Receipt(message.round, bytes(16), "counted", "", None)
            return lies + [(topics.down(TASK, d, "receipt"), settled) for d in ids]
        case Receipt():
            return [(topic, replace(message, outcome="refused"))]
    return []


def bombed(ids: list[str]) -> Attack:
    """What asks for gigabytes, in place of updates and of what devices hear."""
    made = [bomb.data for bomb in bombs.all_bombs() if len(bomb.data) <= messages.MAX_FRAME]

    def attack(topic: str, payload: bytes) -> Iterator[tuple[str, bytes]]:
        if topics.parse(topic).kind != "update":
            return
        for data in made:
            yield topic, data
            yield topics.down(TASK, ids[0], "receipt"), data

    return attack


ATTACKS: dict[str, Callable[[list[str]], Attack]] = {
    "repeated": lambda _ids: repeated(),
    "spoiled": lambda _ids: spoiled(),
    "forged": forged,
    "bombed": bombed,
}


@pytest.fixture
def play(
    template: Template, trainer: LastingTrainer, quick: Path, start_mosquitto: Any
) -> Callable[[str], tuple[list[str], int]]:
    """Run a federation under an attack; give the versions and the coordinator's peak in KiB."""

    def go(name: str) -> tuple[list[str], int]:
        folder = quick / (name or "calm")
        broker = start_mosquitto("allow_anonymous true", "set_tcp_nodelay true")
        config = template.copy(folder, broker.url)
        wait = last_waits(config, template)
        boards = Boards(folder, [broker.url] * DEVICES, trainer, wait)
        sent: set[bytes] = set()
        with contextlib.ExitStack() as stack:
            if name:
                attacker = Attacker(broker.url, ATTACKS[name](template.ids))
                sent = stack.enter_context(contextlib.closing(attacker)).sent
            stack.enter_context(contextlib.closing(boards))
            child = stack.enter_context(daemon(config, "--exit-when-done"))
            peak = Peak(child.pid)
            boards.start()
            assert child.wait(120) == 0, (folder / "coordinator.log").read_text()[-3000:]
            told = [r for r in boards.receipts if not name]
            devices = [device.status() for device in boards.devices]
        log = (folder / "coordinator.log").read_text()
        assert "Traceback" not in log, log[-3000:]
        assert not name or len(sent) > DEVICES * ROUNDS
        check_journal(config, template, told)
        assert all(status["version"] is not None for status in devices)
        return digests(config), peak.kib

    return go


class Peak:
    """The most memory that a process had, looked at until it ends."""

    def __init__(self, pid: int) -> None:
        self.kib, self._status = 0, Path(f"/proc/{pid}/status")
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        pause = threading.Event()
        with contextlib.suppress(OSError, StopIteration):
            while not pause.wait(0.05):
                lines = self._status.read_text().splitlines()
                self.kib = max(self.kib, int(next(s for s in lines if "VmHWM" in s).split()[1]))


@pytest.mark.parametrize("attack", list(ATTACKS))
def test_under_attack_the_same_model_comes_out(
    attack: str, play: Callable[[str], tuple[list[str], int]], template: Template
) -> None:
    if not template.calm:
        template.calm, template.calm_kib = play("")
    versions, kib = play(attack)
    assert versions == template.calm, f"seed {SEED}"
    assert kib <= template.calm_kib + MOST_KIB
