# SPDX-License-Identifier: Apache-2.0
import asyncio
import logging
import socket
from collections.abc import Callable, Coroutine
from typing import Any

import paho.mqtt.client as paho
import pytest

from coordinator import mqtt as coordinator_mqtt
from coordinator.broker import embedded
from coordinator.mqtt import Delivery, Mqtt
from edge_sdk import chunks, messages, topics
from edge_sdk.chunks import Assembler
from edge_sdk.errors import ConfigError, TransportError
from edge_sdk.messages import Chunk, Invite, Update
from edge_sdk.signing import DeviceKey
from edge_sdk.transport.mqtt import Mqtt as DeviceMqtt

pytestmark = pytest.mark.skipif(
    not hasattr(paho.Client, "ack"), reason="the coordinator needs paho-mqtt 2"
)
KEY = DeviceKey.from_seed(bytes(32))
HUB = DeviceKey.from_seed(b"\7" * 32)
INVITE = Invite(1, 2, bytes(32), 60.0, [["int8"]], 5, None, None, 16, 0.05, None, 7)
FAST = (0.02, 0.1)


def run(story: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(story, 30))


async def take(mqtt: Mqtt, count: int) -> list[tuple[str, bytes]]:
    """Take and acknowledge so many messages."""
    stream, got = mqtt.messages(), []
    for _ in range(count):
        topic, payload, ack = await anext(stream)
        got.append((topic, payload))
        ack()
    return got


async def until_async(holds: Callable[[], object], what: str) -> None:
    """Wait until a condition of this loop holds."""
    try:
        async with asyncio.timeout(10):
            while not holds():  # noqa: ASYNC110 - what is waited for sets no event
                await asyncio.sleep(0.005)
    except TimeoutError:
        pytest.fail(f"waited in vain for {what}")


class Device:
    """A device on a thread of its own, seen from the loop."""

    def __init__(self, url: str, **options: Any) -> None:
        self.got: list[tuple[str, bytes]] = []
        self.states: list[bool] = []
        will = (topics.status(KEY.id), b"gone")
        self.mqtt = DeviceMqtt(url, KEY.id, will=will, backoff_s=FAST, **options)
        self.mqtt.subscribe(topics.down_filter("pump", KEY.id), topics.offer("pump"))
        self.mqtt.start(
            lambda topic, payload: self.got.append((topic, payload)), self.states.append
        )

    async def up(self) -> None:
        await until_async(lambda: self.states[-1:] == [True], "the device's connection")

    async def close(self) -> None:
        await asyncio.to_thread(self.mqtt.close)


async def a_round(url: str) -> None:
    """A device and a coordinator talk: an offer, an invite, an update of 300 kB, a goodbye."""
    device = Device(url)
    async with Mqtt(url, "coordinator", backoff_s=FAST) as mqtt:
        await mqtt.subscribe(topics.up_filter(), topics.status_filter())
        await mqtt.publish(topics.offer("pump"), b"an offer", retain=True)
        await device.up()
        where = topics.down("pump", KEY.id, "invite")
        await mqtt.publish(where, messages.encode(INVITE, HUB, where))
        await until_async(lambda: len(device.got) == 2, "offer and invite")
        assert messages.decode(dict(device.got)[where], where)[0] == INVITE

        topic, chunk_topic = (topics.up("pump", KEY.id, kind) for kind in ("update", "chunk"))
        update = Update(1, 2, 3, 4, 0.5, 1.0, bytes(range(256)) * 1200)
        cut = chunks.split(messages.encode(update, KEY, topic))
        for chunk in cut:
            device.mqtt.publish(chunk_topic, messages.encode(chunk, KEY, chunk_topic))
        assembler, whole = Assembler(), None
        for where, payload in await take(mqtt, len(cut)):
            chunk, signed = messages.decode(payload, where)
            assert isinstance(chunk, Chunk)
            assert signed.by(KEY.public)
            whole = assembler.add(topics.parse(where).device, chunk) or whole
        assert whole is not None
        assert messages.decode(whole, topic, limit=messages.MAX_TRANSFER)[0] == update

        await device.close()
        assert await take(mqtt, 1) == [(topics.status(KEY.id), b"gone")]
        assert mqtt.unacked == 0


@pytest.mark.broker
def test_a_round_over_mosquitto(mosquitto: Any) -> None:
    run(a_round(mosquitto.url))


@pytest.mark.parametrize("kind", [pytest.param("mosquitto", marks=pytest.mark.broker), "amqtt"])
def test_a_round_over_an_embedded_broker(kind: Any) -> None:
    async def story() -> None:
        async with embedded(kind=kind) as url:
            await a_round(url)

    run(story())


@pytest.mark.broker
def test_a_killed_broker_is_made_whole_again(mosquitto: Any) -> None:
    async def story() -> None:
        device = Device(mosquitto.url)
        await device.up()
        async with Mqtt(mosquitto.url, "coordinator", backoff_s=FAST) as mqtt:
            await mqtt.subscribe("t/#")
            await mqtt.publish("r/kept", b"1", retain=True)
            await mqtt.publish("r/dropped", b"1", retain=True)
            await mqtt.publish("r/dropped", b"", retain=True)
            mosquitto.kill()
            await until_async(lambda: not mqtt.is_up, "the loss to be noticed")
            assert "127.0.0.1" in str(mqtt.error)
            late = asyncio.create_task(mqtt.publish("t/late", b"said while it was down"))
            await until_async(lambda: device.states[-1] is False, "the device to notice")
            mosquitto.start()
            await late
            await device.up()
            device.mqtt.publish("t/device", b"back")
            assert {topic for topic, _ in await take(mqtt, 2)} == {"t/late", "t/device"}
            await mqtt.subscribe("r/#")
            assert await take(mqtt, 1) == [("r/kept", b"1")]
            assert mqtt.error is None
        await device.close()

    run(story())


@pytest.mark.broker
def test_the_broker_sends_no_more_ahead_than_receive_maximum(mosquitto: Any) -> None:
    async def story() -> None:
        async with Mqtt(mosquitto.url, "coordinator", receive_maximum=4) as mqtt:
            await mqtt.subscribe("t")
            for n in range(40):
                await mqtt.publish("t", bytes([n]))
            stream = mqtt.messages()
            held = [await anext(stream) for _ in range(4)]
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await mqtt._inbox.get()
            assert mqtt.unacked == 4
            most = 0
            while len(held) < 40:
                _ack(held.pop(0))
                held.append(await anext(stream))
                most = max(most, mqtt.unacked)
                if held[-1][1] == bytes([39]):
                    break
            assert most <= 4

    run(story())


def _ack(delivery: Delivery) -> None:
    delivery[2]()


@pytest.mark.broker
def test_what_was_not_acknowledged_comes_again_after_a_crash(mosquitto: Any) -> None:
    async def story() -> None:
        async with Mqtt(mosquitto.url, "coordinator") as mqtt:
            await mqtt.subscribe("t")
            for n in range(3):
                await mqtt.publish("t", bytes([n]))
            stream = mqtt.messages()
            _ack(await anext(stream))
            await anext(stream)  # taken, but never committed
        async with Mqtt(mosquitto.url, "coordinator") as again:
            got = await take(again, 2)
        assert [payload for _, payload in got] == [b"\1", b"\2"]

    run(story())


@pytest.mark.broker
def test_an_acknowledgement_that_comes_late_is_void(mosquitto: Any) -> None:
    async def story() -> None:
        async with Mqtt(mosquitto.url, "coordinator", backoff_s=FAST) as mqtt:
            await mqtt.subscribe("t")
            await mqtt.publish("t", b"x")
            stream = mqtt.messages()
            _, _, ack = await anext(stream)
            mosquitto.stop()
            await until_async(lambda: not mqtt.is_up, "the loss")
            mosquitto.start()
            await until_async(lambda: mqtt.is_up, "the return")
            ack()
            assert mqtt.unacked in {0, 1}  # the broker may have sent it again already
            _, payload, again = await anext(stream)
            assert payload == b"x"
            again()
            again()
            assert mqtt.unacked == 0

    run(story())


@pytest.mark.broker
def test_publishes_wait_their_turn_in_a_window(mosquitto: Any) -> None:
    async def story() -> None:
        async with Mqtt(mosquitto.url, "coordinator", window=3) as mqtt:
            await mqtt.subscribe("t")
            sends = [asyncio.create_task(mqtt.publish("t", bytes([n]))) for n in range(50)]
            given_up = asyncio.create_task(mqtt.publish("t", b"never"))
            await asyncio.sleep(0)
            assert len(mqtt._under_way) == 3
            given_up.cancel()
            await asyncio.gather(*sends)
            assert [payload[0] for _, payload in await take(mqtt, 50)] == list(range(50))

    run(story())


@pytest.mark.broker
def test_a_topic_that_mqtt_does_not_allow_costs_that_message_only(mosquitto: Any) -> None:
    async def story() -> None:
        async with Mqtt(mosquitto.url, "coordinator") as mqtt:
            await mqtt.subscribe("t")
            with pytest.raises(TransportError, match="cannot publish on 'a/#'"):
                await mqtt.publish("a/#", b"x")
            await mqtt.publish("t", b"y")
            assert await take(mqtt, 1) == [("t", b"y")]

    run(story())


@pytest.mark.broker
def test_closing_ends_the_stream_and_fails_what_waits(mosquitto: Any) -> None:
    async def story() -> None:
        async with Mqtt(mosquitto.url, "coordinator", backoff_s=(9.0, 9.0)) as mqtt:
            mosquitto.stop()
            await until_async(lambda: not mqtt.is_up, "the loss")
            waiting = asyncio.create_task(mqtt.publish("t", b"x"))
            await asyncio.sleep(0)
        with pytest.raises(TransportError, match="closed before the broker had this message"):
            await waiting
        assert [delivery async for delivery in mqtt.messages()] == []
        with pytest.raises(TransportError, match="open another"):
            await mqtt.publish("t", b"x")

    run(story())


@pytest.mark.broker
def test_a_patient_coordinator_starts_before_its_broker(
    mosquitto: Any, caplog: pytest.LogCaptureFixture
) -> None:
    mosquitto.stop()

    async def story() -> None:
        async with Mqtt(mosquitto.url, "c", patient=True, backoff_s=FAST) as mqtt:
            assert not mqtt.is_up
            said = asyncio.create_task(mqtt.publish("t", b"x"))
            await asyncio.to_thread(mosquitto.start)
            await said
            assert mqtt.is_up
        with pytest.raises(TransportError, match="no broker listens at"):
            async with Mqtt(mosquitto.url.replace("127.0.0.1", "127.0.0.9"), "c"):
                pass

    with caplog.at_level(logging.WARNING):
        run(story())
    assert caplog.text.count("start it or correct the URL") == 1


@pytest.mark.broker
def test_an_access_list_that_says_no_is_heard(
    start_mosquitto: Callable[..., Any], tmp_path: Any, until: Any
) -> None:
    rules = tmp_path / "acl"
    rules.write_text("topic readwrite open/#\n")
    broker = start_mosquitto("allow_anonymous true", f"acl_file {rules}")

    async def story() -> None:
        async with Mqtt(broker.url, "c") as mqtt:
            await mqtt.subscribe("open/a")
            await mqtt.publish("open/a", b"x")
            assert await take(mqtt, 1) == [("open/a", b"x")]
            with pytest.raises(TransportError, match="refused a message: Not authorized"):
                await mqtt.publish("closed/a", b"x")

    run(story())


@pytest.mark.broker
def test_an_unsubscribed_topic_is_quiet(mosquitto: Any) -> None:
    async def story() -> None:
        async with Mqtt(mosquitto.url, "coordinator") as mqtt:
            await mqtt.subscribe("t", "u")
            mqtt.unsubscribe("t")
            await mqtt.publish("t", b"x")
            await mqtt.publish("u", b"x")
            assert await take(mqtt, 1) == [("u", b"x")]

    run(story())


def test_a_server_that_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordinator_mqtt, "ANSWER_S", 0.1)

    async def story(url: str) -> None:
        async with Mqtt(url, "coordinator"):
            pass

    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"mqtt://127.0.0.1:{server.getsockname()[1]}?mqtt=3.1.1"
        with pytest.raises(TransportError, match=r"did not answer in 0.1 s: is it MQTT\?"):
            run(story(url))


def test_leaving_in_the_middle_of_a_handshake_leaves_nothing_open() -> None:
    async def story(server: socket.socket) -> None:
        url = f"mqtts://127.0.0.1:{server.getsockname()[1]}"
        mqtt = Mqtt(url, "coordinator")
        entering = asyncio.create_task(mqtt.__aenter__())
        connection, _ = await asyncio.to_thread(server.accept)
        entering.cancel()
        with pytest.raises(asyncio.CancelledError):
            await entering
        connection.close()

    with socket.create_server(("127.0.0.1", 0)) as server:
        run(story(server))


def test_an_older_paho_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(paho.Client, "ack")
    with pytest.raises(ConfigError, match="needs paho-mqtt 2"):
        Mqtt("mqtt://127.0.0.1", "c")
