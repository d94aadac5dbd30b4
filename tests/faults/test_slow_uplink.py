# SPDX-License-Identifier: Apache-2.0
"""An update so large, over a link so slow, that a packet of it would outlast the keepalive."""

from __future__ import annotations

import contextlib
import random
import time
from pathlib import Path
from typing import Any

import pytest
from hand_bundles import examples, mlp
from live_rounds import CONFIG, TASK, Hosted, rows, until
from scripted_coordinator import FakeTraining
from toxic_proxy import Ailment, ToxicProxy

from edge_sdk.device import Device
from edge_sdk.transport.mqtt import Mqtt

pytestmark = [pytest.mark.broker, pytest.mark.slow, pytest.mark.timeout(300)]
SIZES = (120, 120, 10)
BUNDLE = mlp(SIZES)


def slow_link(number: int, rng: random.Random) -> Ailment:
    return Ailment(bytes_per_s=2_500, delay_s=0.15, loss=0.05)


def cut_in_the_middle(number: int, rng: random.Random) -> Ailment:
    after = 32_000 if number == 0 else None
    return Ailment(cut_after=after, bytes_per_s=2_500, delay_s=0.15, loss=0.05)


def _device(state: Path, url: str, trainer: FakeTraining) -> Device:
    def connect(client_id: str, will: tuple[str, bytes]) -> Mqtt:
        return Mqtt(url, client_id, will=will, keepalive_s=10, backoff_s=(0.1, 0.3))

    made = Device(url, task=TASK, bundle=BUNDLE, state=state, trainer=trainer, connect=connect)
    made.learn_many(*examples(20, SIZES))
    return made


@pytest.mark.parametrize("doctor", [slow_link, cut_in_the_middle])
def test_60_kb_go_up_20_kbit_of_300_ms_and_loss_with_a_keepalive_of_10_s(
    tmp_path: Path, start_mosquitto: Any, doctor: Any, figure: Any
) -> None:
    broker = start_mosquitto("allow_anonymous true")
    BUNDLE.save(tmp_path / "t.fedge")
    config = tmp_path / "coordinator.toml"
    config.write_text(CONFIG.format(broker=broker.url, codec='"dense"', cohort=2, count=1))
    with contextlib.ExitStack() as stack:
        proxy = stack.enter_context(ToxicProxy(broker.port, doctor, 3))
        friend = FakeTraining()
        friend.may_end.clear()  # so that the round outlives a cut
        slow = stack.enter_context(_device(tmp_path / "slow", proxy.url, FakeTraining()))
        stack.enter_context(_device(tmp_path / "friend", broker.url, friend))
        hosted = stack.enter_context(contextlib.closing(Hosted(config)))
        until(lambda: slow.state == "submitting" or slow.status()["outbox"], "an update")
        began = time.monotonic()
        until(lambda: rows(config), "the update over the slow link")
        took_s = time.monotonic() - began
        until(lambda: slow.status()["outbox"] == 0, "its receipt")
        sent = slow.status()["bytes_up"]
        [update] = rows(config)
        friend.may_end.set()
        until(lambda: hosted.is_done, "the end of the round")
    assert update["device"] == slow.id
    assert update["size"] > 60_000
    is_cut = doctor is cut_in_the_middle
    name = "60 KB over 20 kbit/s" + (", cut in the middle" if is_cut else "")
    figure(f"{name}: seconds", took_s, "24 at the least")
    most = 1.5 if is_cut else 1.1
    figure(f"{name}: bytes sent / its own", sent / update["size"], f"<= {most}")
    assert proxy.connections == 1 + is_cut  # the keepalive ended none
    assert sent <= most * update["size"]
