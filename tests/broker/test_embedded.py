# SPDX-License-Identifier: Apache-2.0
import asyncio
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import pytest

from coordinator import broker
from coordinator.broker import embedded
from coordinator.mqtt import Mqtt
from edge_sdk.errors import FedgeError, TransportError
from edge_sdk.transport import mqtt as device_mqtt
from edge_sdk.transport.mqtt import Mqtt as DeviceMqtt

pytestmark = pytest.mark.skipif(
    not hasattr(paho.Client, "ack"), reason="the coordinator needs paho-mqtt 2"
)


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _port(url: str) -> int:
    return int(url.partition("?")[0].rpartition(":")[2])


@pytest.mark.parametrize("kind", [pytest.param("mosquitto", marks=pytest.mark.broker), "amqtt"])
def test_an_embedded_broker_lives_as_long_as_its_context(kind: Any) -> None:
    async def story() -> int:
        async with embedded(kind=kind) as url:
            async with Mqtt(url, "c") as mqtt:
                await mqtt.publish("t", b"x")
            return _port(url)

    assert not _answers(asyncio.run(story()))


@pytest.mark.parametrize("kind", [pytest.param("mosquitto", marks=pytest.mark.broker), "amqtt"])
def test_a_port_that_is_taken_is_a_clear_error(kind: Any) -> None:
    async def story(port: int) -> None:
        async with embedded(port, kind=kind):
            pass

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(TransportError, match=f"{kind} did not start on port {port}"):
            asyncio.run(asyncio.wait_for(story(port), 20))


@pytest.mark.broker
def test_a_folder_keeps_what_was_retained(tmp_path: Path) -> None:
    async def said() -> None:
        async with embedded(folder=tmp_path / "broker") as url, Mqtt(url, "c") as mqtt:
            await mqtt.publish("t", b"kept", retain=True)

    async def heard() -> bytes:
        async with embedded(folder=tmp_path / "broker") as url, Mqtt(url, "d") as mqtt:
            await mqtt.subscribe("t")
            return (await anext(mqtt.messages()))[1]

    asyncio.run(said())
    assert asyncio.run(asyncio.wait_for(heard(), 10)) == b"kept"


@pytest.mark.broker
def test_the_child_dies_with_its_parent(tmp_path: Path, until: Any) -> None:
    script = (
        "import asyncio, sys\n"
        "from coordinator.broker import embedded\n"
        "async def main():\n"
        "    async with embedded(folder=sys.argv[1]) as url:\n"
        "        print(url, flush=True)\n"
        "        await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(broker.__file__).parents[1])}
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as parent:
        assert parent.stdout is not None
        port = _port(parent.stdout.readline().strip())
        assert _answers(port)
        parent.send_signal(signal.SIGKILL)
        parent.wait(10)
    until(lambda: not _answers(port), "the broker to go")


def test_without_any_broker_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_args, **_options: None)
    monkeypatch.setattr(broker, "_has_amqtt", lambda: False)

    async def story(kind: Any) -> None:
        async with embedded(kind=kind):
            pass

    for kind in ("auto", "mosquitto", "amqtt"):
        with pytest.raises(FedgeError, match=r"apt install mosquitto, or pip install 'fedge\[bro"):
            asyncio.run(story(kind))


def test_amqtt_is_taken_where_mosquitto_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_args, **_options: None)

    async def story() -> str:
        async with embedded() as url:
            return url

    assert asyncio.run(story()).endswith("?mqtt=3.1.1")


def test_amqtt_keeps_its_own_noise_to_itself(
    caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    logger, level = logging.getLogger("amqtt"), logging.getLogger("amqtt").level

    async def story() -> None:
        async with embedded(kind="amqtt") as url:
            device = DeviceMqtt(url, "d", will=("will", b"gone"))
            device.subscribe("t/#")
            device.start(lambda _topic, _payload: None, lambda _is_up: None)
            async with Mqtt(url, "c") as mqtt:
                await mqtt.subscribe("t/#")
                await mqtt.publish("t/a", b"x", retain=True)
            await asyncio.to_thread(device.close)

    with caplog.at_level(logging.WARNING):
        asyncio.run(story())
    assert [r for r in caplog.records if not r.name.startswith(("edge_sdk", "coordinator"))] == []
    assert list(recwarn) == []
    assert logger.level == level


def test_a_device_finds_3_1_1_by_itself_on_a_broker_that_ignores_mqtt_5(
    until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_mqtt, "ANSWER_S", 0.5)

    async def story() -> None:
        async with embedded(kind="amqtt") as url:
            device = DeviceMqtt(url.partition("?")[0], "d", will=("will", b"x" * 40))
            device.start(lambda _topic, _payload: None, lambda _is_up: None)
            await asyncio.to_thread(until, lambda: device.is_up, "a connection", 20.0)
            await asyncio.to_thread(device.close)

    asyncio.run(story())
