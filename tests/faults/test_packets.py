# SPDX-License-Identifier: Apache-2.0
"""Packets that are lost, late, doubled, overtaken or altered: the model of a calm run comes out.

The device, or the coordinator, is a process in a network namespace of its own, behind a user-space
impairer; what TCP, its checksums and its timers make of that is the kernel's own.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from board_process import BoardProcess
from live_rounds import Boards, Template, check_journal, daemon, digests, rows, until
from tun_network import Host, Network, Wire

from coordinator.broker import free_port
from edge_sdk.lasting import LastingTrainer
from edge_sdk.training import TrainFailed

pytestmark = [pytest.mark.broker, pytest.mark.slow, pytest.mark.timeout(300)]
DEVICES, ROUNDS, SEED = 2, 2, 5
MODEL = {"codec": '"dense"', "sizes": (60, 50, 10)}
"""An update of 14 kB: a couple of dozen packets of 576 bytes."""
KEEPALIVE_S = 2
COORDINATOR_KEEPALIVE_S = 10
"""The shortest that mosquitto can ask of a client."""
MOST_OF_AN_UPDATE = 12_000
DEAD = Wire(loss=1.0)


class Stage:
    """A broker that listens in the test's own namespace, and the other one, for its victim."""

    def __init__(self, network: Network, broker: Any, port: int) -> None:
        self.host: Host = network.hosts[0]
        self.near = broker.url
        self.far = f"mqtt://{network.address}:{port}"


@pytest.fixture
def stage(start_mosquitto: Any, request: pytest.FixtureRequest) -> Any:
    with Network(1, seed=SEED, mtu=getattr(request, "param", 1500)) as network:
        port = free_port()
        lines = ("allow_anonymous true", "set_tcp_nodelay true")
        more = (f"max_keepalive {COORDINATOR_KEEPALIVE_S}", f"listener {port} {network.address}")
        yield Stage(network, start_mosquitto(*lines, *more), port)


class Run:
    """A federation of which device 0, or the coordinator, is on the far side of the network."""

    def __init__(self, config: Path, template: Template, friend: Boards) -> None:
        self.config, self.template, self.friend = config, template, friend
        self.is_held = threading.Event()
        """Set to keep the friend, which is the last of each round, from training."""

    def rounds_of(self, index: int) -> int:
        return sum(u["device"] == self.template.ids[index] for u in rows(self.config))


Play = Callable[..., list[str]]


@pytest.fixture
def play(template: Template, trainer: LastingTrainer, quick: Path, stage: Stage) -> Play:
    """Run a federation with device 0 on the far side, and let something happen meanwhile."""

    def go(
        meanwhile: Callable[[BoardProcess, Run], None], keepalive_s: int = KEEPALIVE_S
    ) -> list[str]:
        folder = quick / "ailing"
        config = template.copy(folder, stage.near)

        def last(index: int, cancel: threading.Event) -> None:
            mine = run.rounds_of(index)
            while run.rounds_of(0) <= mine or run.is_held.is_set():
                if cancel.wait(0.02):
                    raise TrainFailed("cancelled while it waited for the other device")

        friend = Boards(folder, [stage.near], trainer, last, first=1)
        run = Run(config, template, friend)
        with (
            contextlib.closing(friend),
            daemon(config, "--exit-when-done") as child,
            BoardProcess(folder, stage.far, 0, stage.host.under, keepalive_s=keepalive_s) as victim,
        ):
            friend.start()
            meanwhile(victim, run)
            assert child.wait(120) == 0, (folder / "coordinator.log").read_text()[-3000:]
            assert victim.process.poll() is None
        check_journal(config, template, friend.receipts)
        return digests(config)

    return go


@pytest.mark.parametrize("stage", [576], indirect=True)
def test_packets_of_576_bytes_doubled_and_overtaken_change_no_bit(
    play: Play, calm: list[str], stage: Stage
) -> None:
    host = stage.host
    ills = Wire(delay_s=0.01, jitter_s=0.01, reorder=0.2, duplicate=0.2, corrupt=0.02)
    host.up.wire = host.down.wire = ills
    assert play(lambda _victim, _run: None, keepalive_s=30) == calm, f"seed {SEED}"
    assert host.up.packets > ROUNDS * 14_000 / 576
    assert host.up.altered + host.down.altered > 0
    assert host.connections == 1


def test_a_device_that_is_no_longer_heard_knocks_again_and_no_bit_is_lost(
    play: Play, calm: list[str], stage: Stage
) -> None:
    host = stage.host
    host.up.wire = Wire(dead_after=MOST_OF_AN_UPDATE)

    def meanwhile(_victim: BoardProcess, run: Run) -> None:
        until(lambda: host.up.lost, "the cut, in the middle of its update")
        until(lambda: host.connections > 1, "the device to notice and to knock again")
        assert not run.rounds_of(0)
        host.up.wire = Wire()

    assert play(meanwhile) == calm, f"seed {SEED}"


def test_a_device_that_no_longer_hears_knocks_again_and_no_bit_is_lost(
    play: Play, calm: list[str], stage: Stage
) -> None:
    host = stage.host
    host.up.wire = host.down.wire = Wire(delay_s=0.1)

    def meanwhile(_victim: BoardProcess, run: Run) -> None:
        until(lambda: host.up.bytes > MOST_OF_AN_UPDATE, "its update to be on the way")
        host.down.wire = DEAD  # before any answer can be there
        until(lambda: host.connections > 1, "the device to notice and to knock again")
        assert run.rounds_of(0) == 1  # and its receipt is lost
        host.down.wire = Wire()

    assert play(meanwhile) == calm, f"seed {SEED}"


def test_a_nat_that_forgets_an_idle_device_costs_a_connection_and_nothing_else(
    play: Play, calm: list[str], stage: Stage
) -> None:
    def meanwhile(victim: BoardProcess, run: Run) -> None:
        run.is_held.set()  # the round stays open, and the device has nothing to do
        until(lambda: "receipt round=1" in victim.said, "its update to count")
        before = stage.host.connections
        stage.host.forget()
        until(lambda: stage.host.connections > before, "the device to notice by its keepalive")
        assert len(rows(run.config)) == 1
        run.is_held.clear()

    assert play(meanwhile) == calm, f"seed {SEED}"


@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_coordinator_cut_off_in_one_direction_comes_back_and_no_bit_is_lost(
    *,
    template: Template,
    trainer: LastingTrainer,
    calm: list[str],
    quick: Path,
    stage: Stage,
    direction: str,
) -> None:
    folder, host = quick / "ailing", stage.host
    config = template.copy(folder, stage.far)
    is_cut = threading.Event()

    def second_waits(index: int, cancel: threading.Event) -> None:
        while index == 1 and not is_cut.is_set():
            if cancel.wait(0.02):
                raise TrainFailed("cancelled")

    boards = Boards(folder, [stage.near] * DEVICES, trainer, second_waits)
    with (
        contextlib.closing(boards),
        daemon(config, "--exit-when-done", under=host.under) as child,
    ):
        boards.start()
        until(lambda: rows(config), "the first update of the round")
        way = {"up": host.up, "down": host.down}[direction]
        way.wire = DEAD
        is_cut.set()  # what is trained now comes to nobody, or its receipt does
        until(lambda: host.connections > 1, "the coordinator to notice and to knock again")
        way.wire = Wire()
        assert child.wait(120) == 0, (folder / "coordinator.log").read_text()[-3000:]
    check_journal(config, template, boards.receipts)
    assert digests(config) == calm, f"seed {SEED}"
