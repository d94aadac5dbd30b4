# SPDX-License-Identifier: Apache-2.0
"""An update so large, over a link so slow, that a packet of it would outlast the keepalive.

Two device processes, each in a network namespace behind such a link, whose packets are really lost;
of one of them the network forgets the connection half-way, without a word.
"""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from board_process import BoardProcess
from live_rounds import Boards, Template, check_journal, daemon, rows, until
from tun_network import Network, Wire

from coordinator.broker import free_port
from edge_sdk.lasting import LastingTrainer
from edge_sdk.training import TrainFailed

pytestmark = [pytest.mark.broker, pytest.mark.slow, pytest.mark.timeout(300)]
DEVICES, ROUNDS, SEED = 3, 1, 3
MODEL = {"codec": '"dense"', "sizes": (120, 120, 10)}
SLOW = Wire(delay_s=0.15, bytes_per_s=2_500, loss=0.05)
"""20 kbit/s, 300 ms from question to answer, one packet in twenty lost, in each direction."""
KEEPALIVE_S = 10
HALF_WAY = 40_000


def test_60_kb_go_up_20_kbit_of_300_ms_and_loss_with_a_keepalive_of_10_s(
    *,
    template: Template,
    trainer: LastingTrainer,
    quick: Path,
    start_mosquitto: Any,
    figure: Any,
    request: pytest.FixtureRequest,
) -> None:
    def friend_waits(_index: int, cancel: threading.Event) -> None:
        while len(rows(config)) < DEVICES - 1:  # so that the round outlives a cut
            if cancel.wait(0.1):
                raise TrainFailed("cancelled while it waited for the others")

    with contextlib.ExitStack() as stack:
        network = stack.enter_context(Network(DEVICES - 1, seed=SEED))
        port = free_port()
        lines = ("allow_anonymous true", "set_tcp_nodelay true")
        broker = start_mosquitto(*lines, f"listener {port} {network.address}")
        config = template.copy(quick / "slow", broker.url)
        child = stack.enter_context(daemon(config, "--exit-when-done"))
        friend = Boards(quick / "slow", [broker.url], trainer, friend_waits, first=2)
        stack.enter_context(contextlib.closing(friend))
        friend.start()
        url, settings = f"mqtt://{network.address}:{port}", {"keepalive_s": KEEPALIVE_S}
        boards = []
        for index, host in enumerate(network.hosts):
            host.up.wire = host.down.wire = SLOW
            board = BoardProcess(quick / "slow", url, index, host.under, **settings)
            boards.append(stack.enter_context(board))
        until(lambda: all("update kept" in board.said for board in boards), "both updates")
        began = time.monotonic()
        steady, forgotten = network.hosts
        until(lambda: forgotten.up.bytes > HALF_WAY, "half of an update")
        assert not rows(config)
        forgotten.forget()
        wire = []
        for host, board in zip(network.hosts, boards, strict=True):
            until(lambda board=board: "receipt round=1" in board.said, "a receipt")  # type: ignore[misc]  # a default binds it
            wire.append((time.monotonic() - began, host.up.bytes))
        assert child.wait(120) == 0
        sent = [board.leave()["bytes_up"] for board in boards]
    check_journal(config, template, friend.receipts)
    sizes = {u["device"]: u["size"] for u in rows(config)}
    said = []
    for index, (name, most) in enumerate({"steady": 1.1, "forgotten half-way": 1.5}.items()):
        size, (took_s, packets) = sizes[template.ids[index]], wire[index]
        assert size > 60_000
        figure(f"60 KB over 20 kbit/s, {name}: seconds", took_s, "25 at the least")
        figure(
            f"60 KB over 20 kbit/s, {name}: bytes sent / its own", sent[index] / size, f"<= {most}"
        )
        figure(f"60 KB over 20 kbit/s, {name}: bytes on the wire / its own", packets / size, "")
        said.append(f"{name} {packets / size:.2f} times its bytes on the wire")
        assert sent[index] <= most * size
    request.node.user_properties.append(("result", ", ".join(said)))
    assert steady.connections == 1  # the keepalive ended none
    assert forgotten.connections > 1
