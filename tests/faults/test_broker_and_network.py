# SPDX-License-Identifier: Apache-2.0
"""The broker killed in mid-round, and networks that ail: the model of a calm run comes out."""

from __future__ import annotations

import contextlib
import random
import signal
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from live_rounds import Boards, Template, check_journal, daemon, digests, last_waits, rows, until
from toxic_proxy import Ailment, Doctor, ToxicProxy

from coordinator import certificates
from coordinator.broker import free_port
from edge_sdk.lasting import LastingTrainer

pytestmark = [pytest.mark.broker, pytest.mark.timeout(300)]
DEVICES, ROUNDS = 4, 2
OPEN = ("allow_anonymous true", "set_tcp_nodelay true")
SEED = 5


Play = Callable[..., tuple[list[str], Boards]]


@pytest.fixture
def play(template: Template, trainer: LastingTrainer, quick: Path) -> Play:
    """Run a federation to its end, with something done to it meanwhile; give the versions."""

    def go(
        broker: Any,
        brokers: list[str] | None = None,
        *,
        may_train: Any = None,
        meanwhile: Callable[[Path], None] = lambda _config: None,
        then: signal.Signals | None = None,
        **options: Any,
    ) -> tuple[list[str], Boards]:
        folder = quick / f"run-{len(list(quick.iterdir()))}"
        config = template.copy(folder, broker.url)
        wait = may_train or last_waits(config, template)
        boards = Boards(folder, brokers or [broker.url] * DEVICES, trainer, wait, **options)
        with contextlib.closing(boards), contextlib.ExitStack() as lives:
            child = lives.enter_context(daemon(config, "--exit-when-done"))
            boards.start()
            meanwhile(config)
            if then is not None:
                child.send_signal(then)
                assert child.wait(5) == 0
                child = lives.enter_context(daemon(config, "--exit-when-done"))
            assert child.wait(120) == 0, (folder / "coordinator.log").read_text()[-3000:]
        check_journal(config, template, boards.receipts)
        return digests(config), boards

    return go


@pytest.fixture
def calm(play: Play, start_mosquitto: Any, template: Template) -> list[str]:
    """The versions of a run in which nothing happened, made once."""
    template.calm = template.calm or play(start_mosquitto(*OPEN))[0]
    return template.calm


@pytest.mark.parametrize("persistence", ["none", "the default"])
def test_a_broker_killed_in_mid_round_and_again_loses_nothing(
    play: Play, calm: list[str], start_mosquitto: Any, tmp_path: Path, persistence: str
) -> None:
    lines = ("persistence true", f"persistence_location {tmp_path}/")
    broker = start_mosquitto(*OPEN, *(lines if persistence != "none" else ()))
    held = threading.Event()

    def may_train(index: int, cancel: threading.Event) -> None:
        while index >= DEVICES // 2 and not held.wait(0.02) and not cancel.is_set():
            pass

    def meanwhile(config: Path) -> None:
        until(lambda: len(rows(config)) == DEVICES // 2, "half of the first round")
        broker.kill()
        held.set()  # what they train now is sent to nobody
        broker.start()
        until(lambda: len(rows(config)) > DEVICES, "the second round")
        broker.kill()
        broker.start()

    versions, _ = play(broker, may_train=may_train, meanwhile=meanwhile)
    assert versions == calm


def cut(number: int, rng: random.Random) -> Ailment:
    return Ailment(cut_after=rng.randrange(200, 9_000)) if number < 12 else Ailment()


def cut_twice(number: int, rng: random.Random) -> Ailment:
    """Soon enough for a test: the coordinator waits longer from one attempt to the next."""
    return Ailment(cut_after=rng.randrange(2_000, 8_000)) if number < 2 else Ailment()


def flip(number: int, rng: random.Random) -> Ailment:
    return Ailment(flip_every=5_000) if number < 10 else Ailment()


def slow(number: int, rng: random.Random) -> Ailment:
    return Ailment(bytes_per_s=20_000, delay_s=0.03)


@pytest.mark.parametrize("doctor", [cut, slow])
def test_over_a_network_that_ails_the_same_model_comes_out(
    play: Play, calm: list[str], start_mosquitto: Any, doctor: Doctor
) -> None:
    broker = start_mosquitto(*OPEN)
    with ToxicProxy(broker.port, doctor, SEED) as proxy:
        brokers = [proxy.url] * (DEVICES - 1) + [broker.url]
        versions, _ = play(broker, brokers, keepalive_s=2)
    assert versions == calm, f"seed {SEED}"
    assert doctor is slow or proxy.connections > DEVICES - 1


def test_flipped_bytes_below_tls_cost_connections_and_nothing_else(
    play: Play, calm: list[str], start_mosquitto: Any, tmp_path: Path
) -> None:
    now = datetime.now(UTC)
    authority = certificates.authority("test ca", now)
    made = certificates.broker(authority, ["127.0.0.1"], now)
    for name, data in {"ca": authority.certificate, "c": made.certificate, "k": made.key}.items():
        (tmp_path / name).write_bytes(data)
    plain = free_port()
    keys = (f"certfile {tmp_path / 'c'}", f"keyfile {tmp_path / 'k'}")
    broker = start_mosquitto(*OPEN, f"listener {plain} 127.0.0.1", listener=keys)
    with ToxicProxy(broker.port, flip, SEED) as proxy:
        urls = [proxy.url] * (DEVICES - 1) + [broker.url]
        brokers = [url.replace("mqtt://", "mqtts://") for url in urls]
        broker.url = f"mqtt://127.0.0.1:{plain}"
        versions, _ = play(broker, brokers, keepalive_s=2, ca_file=tmp_path / "ca")
    assert versions == calm, f"seed {SEED}"
    assert proxy.connections > DEVICES - 1


def test_a_coordinator_whose_wire_is_cut_again_and_again_comes_to_the_same_model(
    play: Play, calm: list[str], start_mosquitto: Any
) -> None:
    broker = start_mosquitto(*OPEN)
    with ToxicProxy(broker.port, cut_twice, SEED) as proxy:
        real, broker.url = broker.url, proxy.url
        versions, _ = play(broker, [real] * DEVICES)
    assert versions == calm, f"seed {SEED}"
    assert proxy.connections > 1


def test_sigterm_in_mid_round_stops_the_coordinator_at_once_and_the_round_goes_on(
    play: Play, calm: list[str], start_mosquitto: Any
) -> None:
    def meanwhile(config: Path) -> None:
        until(lambda: len(rows(config)) >= 2, "some of the first round")

    broker = start_mosquitto(*OPEN)
    versions, _ = play(broker, meanwhile=meanwhile, then=signal.SIGTERM)
    assert versions == calm
