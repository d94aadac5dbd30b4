# SPDX-License-Identifier: Apache-2.0
"""Processes in memory cgroups that hold little more than they need: the kernel kills for real."""

from __future__ import annotations

import contextlib
import hashlib
import json
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from board_process import BoardProcess
from hand_bundles import examples
from live_rounds import TASK, Boards, Template, check_journal, daemon, digests, rows, until
from memory_group import MemoryGroup, memory_group

from edge_sdk import messages, topics
from edge_sdk.lasting import LastingTrainer
from edge_sdk.messages import Chunk, Status
from edge_sdk.signing import DeviceKey
from edge_sdk.training import TrainFailed
from edge_sdk.transport.mqtt import Mqtt

pytestmark = [pytest.mark.broker, pytest.mark.slow, pytest.mark.timeout(300)]
DEVICES, ROUNDS = 2, 2
SIZES = (120, 120, 10)
MODEL = {"codec": '"dense"', "sizes": SIZES}
OPEN = ("allow_anonymous true", "set_tcp_nodelay true", "max_queued_messages 100000")
MIB = 2**20
TRANSFER, STRANGERS = 190_000, 400
"""What an update of this model may be at most, nearly; and so many each begin two of them."""


@pytest.fixture
def group() -> Iterator[MemoryGroup]:
    with memory_group("faults") as made:
        yield made


def begun_transfers() -> Iterator[tuple[str, bytes]]:
    """Yield what strangers say who each begin two large updates and end none.

    Each has a key of its own and signs: a coordinator has to hold what they send, for a while.
    """
    body = bytes(TRANSFER // 2)
    for number in range(STRANGERS):
        key = DeviceKey.from_seed(hashlib.sha256(b"stranger %d" % number).digest())
        status, topic = topics.status(key.id), topics.up(TASK, key.id, "chunk")
        here = Status(key.id, key.public, online=True, boot=1, name="", sdk="")
        yield status, messages.encode(here, key, status)
        for mark in (b"a" * 32, b"b" * 32):
            chunk = Chunk(mark, 0, 2, TRANSFER, body=body)
            yield topic, messages.encode(chunk, key, topic)


def test_a_coordinator_killed_for_its_memory_under_attack_comes_to_the_same_model(
    *,
    template: Template,
    trainer: LastingTrainer,
    calm: list[str],
    quick: Path,
    start_mosquitto: Any,
    group: MemoryGroup,
    request: pytest.FixtureRequest,
) -> None:
    broker, folder, is_dead = start_mosquitto(*OPEN), quick / "attacked", threading.Event()
    config = template.copy(folder, broker.url)

    def second_waits(index: int, cancel: threading.Event) -> None:
        while index == 1 and not is_dead.is_set():
            if cancel.wait(0.02):
                raise TrainFailed("cancelled")

    boards = Boards(folder, [broker.url] * DEVICES, trainer, second_waits)
    attacker = Mqtt(broker.url, "attacker", window=20, queue_bytes=2**28)
    with contextlib.closing(boards), contextlib.closing(attacker):
        with daemon(config, "--exit-when-done", under=group.under) as child:
            boards.start()
            until(lambda: boards.receipts, "the first receipt of the round")
            group.limit(group.need + 32 * MIB)
            attacker.start(lambda _topic, _payload: None, lambda _is_up: None)
            until(lambda: attacker.is_up, "the attacker to be let in")
            for topic, payload in begun_transfers():
                attacker.publish(topic, payload)
            assert child.wait(120) == -signal.SIGKILL
        assert group.kills == 1
        assert len(rows(config)) == 1
        is_dead.set()
        code: int = -signal.SIGKILL
        while code == -signal.SIGKILL:  # as its service would; the broker has the rest for it
            assert group.kills < 20
            with daemon(config, "--exit-when-done", under=group.under) as child:
                code = child.wait(120)
    assert code == 0, (folder / "coordinator.log").read_text()[-3000:]
    check_journal(config, template, boards.receipts)
    assert digests(config) == calm
    request.node.user_properties.append(("result", f"{group.kills} kills"))


def test_a_training_child_killed_for_its_memory_leaves_the_application_alive(
    template: Template,
    trainer: LastingTrainer,
    quick: Path,
    start_mosquitto: Any,
    group: MemoryGroup,
) -> None:
    broker, folder, is_free = start_mosquitto(*OPEN), quick / "small", threading.Event()
    config = template.copy(folder, broker.url)

    def friend_waits(_index: int, cancel: threading.Event) -> None:
        while not is_free.is_set():
            if cancel.wait(0.02):
                raise TrainFailed("cancelled")

    source = {"socket": "s"}
    friend = Boards(folder, [broker.url], trainer, friend_waits, first=1)
    with (
        contextlib.closing(friend),
        BoardProcess(folder, broker.url, 0, group.under, source=source) as board,
    ):
        until(lambda: "mqtt is up" in board.said, "the device")
        assert len(predicted(folder / "s")) == SIZES[2]
        group.limit(group.need + 12 * MIB)  # the application has room, a training has none
        with daemon(config, "--exit-when-done") as child:
            friend.start()
            until(lambda: "kind=oom" in board.said, "the training to be given up")
            assert group.kills > 0
            assert board.process.poll() is None
            assert len(predicted(folder / "s")) == SIZES[2]
            group.limit(None)
            is_free.set()
            assert child.wait(120) == 0, (folder / "coordinator.log").read_text()[-3000:]
        assert board.leave()["training"]["failures"]["oom"] >= 1
        assert "version=0 rows=4" in board.said  # half of those before
        assert "Traceback" not in board.said
    assert template.ids[0] in {update["device"] for update in rows(config)}


def predicted(path: Path) -> list[float]:
    """Ask the device at a socket what it makes of an example."""
    x, _ = examples(1, SIZES)
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(30)
        until(lambda: client.connect_ex(str(path)) == 0, "its socket")
        client.sendall(json.dumps({"predict": x[0].tolist()}).encode() + b"\n")
        found: list[float] = json.loads(client.makefile().readline())["output"]
    return found
