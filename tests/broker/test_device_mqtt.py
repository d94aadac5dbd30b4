# SPDX-License-Identifier: Apache-2.0
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import paho.mqtt.client as paho
import pytest

from edge_sdk import chunks, messages, topics
from edge_sdk.chunks import Assembler
from edge_sdk.errors import TransportError
from edge_sdk.messages import Chunk, Update
from edge_sdk.signing import DeviceKey
from edge_sdk.transport import Transport
from edge_sdk.transport.mqtt import Mqtt

pytestmark = pytest.mark.broker
KEY = DeviceKey.from_seed(bytes(32))


class Client:
    """A device's transport that writes down all that it is told."""

    def __init__(self, url: str, name: str, *filters: str, **options: Any) -> None:
        options = {"backoff_s": (0.02, 0.1), **options}
        self.mqtt = Mqtt(url, name, **options)
        port: Transport = self.mqtt  # the port is filled, says mypy
        self.got: list[tuple[str, bytes]] = []
        self.states: list[bool] = []
        port.subscribe(*filters)
        port.start(lambda topic, payload: self.got.append((topic, payload)), self.states.append)


@pytest.fixture
def client() -> Iterator[Callable[..., Client]]:
    made: list[Client] = []

    def make(url: str, name: str, *filters: str, **options: Any) -> Client:
        made.append(Client(url, name, *filters, **options))
        return made[-1]

    yield make
    for one in made:
        one.mqtt.close()


def test_messages_go_both_ways_and_are_counted(mosquitto: Any, client: Any, until: Any) -> None:
    a, b = client(mosquitto.url, "a", "to/a"), client(mosquitto.url, "b", "to/b")
    until(lambda: a.states == b.states == [True], "both connections")
    a.mqtt.publish("to/b", b"ping")
    until(lambda: b.got, "the ping")
    b.mqtt.publish("to/a", b"pong!")
    until(lambda: a.got, "the pong")
    assert (a.got, b.got) == ([("to/a", b"pong!")], [("to/b", b"ping")])
    assert (a.mqtt.counters.bytes_up, a.mqtt.counters.bytes_down) == (4, 5)
    assert a.mqtt.error is None


def test_an_update_of_300_kb_travels_in_chunks(mosquitto: Any, client: Any, until: Any) -> None:
    topic = topics.up("pump", KEY.id, "update")
    update = Update(1, 2, 3, 4, 0.5, 1.0, bytes(range(256)) * 1200)
    frame = messages.encode(update, KEY, topic)
    chunk_topic = topics.up("pump", KEY.id, "chunk")
    a, b = client(mosquitto.url, "a"), client(mosquitto.url, "b", topics.up_filter())
    until(lambda: a.states == b.states == [True], "both connections")
    cut = chunks.split(frame, messages.MAX_FRAME)
    for chunk in cut:
        a.mqtt.publish(chunk_topic, messages.encode(chunk, KEY, chunk_topic))
    until(lambda: len(b.got) == len(cut) == 3, "three chunks")
    assembler, whole = Assembler(), None
    for where, payload in b.got:
        chunk, signed = messages.decode(payload, where)
        assert isinstance(chunk, Chunk)
        assert signed.by(KEY.public)
        whole = assembler.add(KEY.id, chunk)
    assert whole == frame
    assert messages.decode(whole, topic, limit=messages.MAX_TRANSFER)[0] == update


def test_a_killed_broker_is_found_again_and_subscriptions_are_redone(
    mosquitto: Any, client: Any, until: Any
) -> None:
    a, b = client(mosquitto.url, "a"), client(mosquitto.url, "b", "t", "u")
    until(lambda: a.states == b.states == [True], "both connections")
    b.mqtt.unsubscribe("u")
    mosquitto.kill()
    until(lambda: a.states == b.states == [True, False], "both to notice")
    assert "127.0.0.1" in str(a.mqtt.error)
    a.mqtt.publish("t", b"lost")
    a.mqtt.publish("t/kept", b"old", retain=True)
    a.mqtt.publish("t/kept", b"new", retain=True)
    mosquitto.start()
    until(lambda: a.states == b.states == [True, False, True], "both to be back")
    a.mqtt.publish("u", b"no longer wanted")
    a.mqtt.publish("t", b"again")
    until(lambda: b.got, "a message after the restart")
    assert b.got == [("t", b"again")]
    assert a.mqtt.counters.dropped == 1
    late = client(mosquitto.url, "late", "t/kept")
    until(lambda: late.got, "the retained message")
    assert late.got == [("t/kept", b"new")]


def test_a_session_outlives_a_restart_of_the_broker(
    mosquitto: Any, client: Any, until: Any
) -> None:
    a = client(mosquitto.url, "a", "t")
    until(lambda: a.states == [True], "a connection")
    mosquitto.stop()
    until(lambda: a.states == [True, False], "it to notice")
    a.mqtt.close()
    mosquitto.start()
    b = client(mosquitto.url, "b")
    until(lambda: b.states == [True], "another connection")
    b.mqtt.publish("t", b"while you were away")
    until(lambda: not b.mqtt._under_way and not b.mqtt._queue, "the broker to have it")
    again = client(mosquitto.url, "a")
    until(lambda: again.got, "what came meanwhile")
    assert again.got == [("t", b"while you were away")]


def test_an_unsubscribe_reaches_a_session_that_a_former_process_left(
    mosquitto: Any, client: Any, until: Any
) -> None:
    first = client(mosquitto.url, "a", "t", "u")
    until(lambda: first.states == [True], "a connection")
    first.mqtt.close()
    got: list[str] = []
    again, states = Mqtt(mosquitto.url, "a"), list[bool]()
    again.unsubscribe("t")
    again.start(lambda topic, _payload: got.append(topic), states.append)
    until(lambda: states == [True], "another connection")
    again.publish("t", b"x")
    again.publish("u", b"x")
    until(lambda: got, "what is still wanted")
    assert got == ["u"]
    again.close()


def test_a_will_tells_of_a_death_and_of_a_goodbye(mosquitto: Any, client: Any, until: Any) -> None:
    watcher = client(mosquitto.url, "w", "will/#")
    dies = client(mosquitto.url, "dies", will=("will/dies", b"gone"))
    leaves = client(mosquitto.url, "leaves", will=("will/leaves", b"gone"))
    until(lambda: dies.states == leaves.states == watcher.states == [True], "connections")
    leaves.mqtt.publish("will/leaves", b"a last word")
    leaves.mqtt.close()
    until(lambda: len(watcher.got) == 2, "the goodbye")
    assert watcher.got == [("will/leaves", b"a last word"), ("will/leaves", b"gone")]
    link = dies.mqtt._link
    assert link is not None
    assert link.socket is not None
    link.socket.shutdown(socket.SHUT_RDWR)  # as a pulled cable and a timeout would
    until(lambda: ("will/dies", b"gone") in watcher.got, "the will")


def test_a_broker_that_is_not_there_is_one_warning_and_a_reason(
    mosquitto: Any, client: Any, until: Any, caplog: pytest.LogCaptureFixture
) -> None:
    mosquitto.stop()
    with caplog.at_level(logging.DEBUG, "edge_sdk.transport.mqtt"):
        a = client(mosquitto.url, "a", backoff_s=(0.001, 0.002))
        until(lambda: len(caplog.records) > 5, "several tries")
        a.mqtt.close()
    loud = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(loud) == 1
    assert "start it or correct the URL" in loud[0]
    assert f"no broker listens at {mosquitto.url}" in str(a.mqtt.error)
    assert a.states == []


def test_a_probe_says_yes_or_what_to_do(mosquitto: Any) -> None:
    mqtt = Mqtt(mosquitto.url, "a")
    mqtt.probe()
    mosquitto.stop()
    with pytest.raises(TransportError, match=r"no broker listens at .*: start it"):
        mqtt.probe()
    with pytest.raises(TransportError, match=r"name .*\.invalid does not resolve|cannot reach"):
        Mqtt("mqtt://nowhere.invalid", "a").probe()
    mqtt.close()


def test_what_is_not_mqtt_is_told_apart(until: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def chat() -> None:
            for reply in (b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x20\xff\xff\xff\xff\xff"):
                connection, _ = server.accept()
                with connection:
                    connection.recv(1000)
                    connection.sendall(reply)

        talker = threading.Thread(target=chat)
        talker.start()
        mqtt = Mqtt(f"mqtt://127.0.0.1:{port}?mqtt=3.1.1", "a")
        for _ in range(3):
            with pytest.raises(TransportError, match=r"is it a TLS port\?|not MQTT"):
                mqtt.probe()
        mqtt.close()
        talker.join(10)


def test_a_full_queue_drops_and_counts(mosquitto: Any, client: Any, until: Any) -> None:
    a = client(mosquitto.url, "a", queue_bytes=1000)
    until(lambda: a.states == [True], "a connection")
    a.mqtt.publish("t", bytes(1001))
    a.mqtt.publish("t", bytes(999))
    until(lambda: a.mqtt.counters.messages_up == 1, "the one that fits")
    assert a.mqtt.counters.dropped == 1


def test_a_callback_that_raises_costs_a_log_line_not_the_connection(
    mosquitto: Any, client: Any, until: Any, caplog: pytest.LogCaptureFixture
) -> None:
    b = client(mosquitto.url, "b")
    seen: list[str] = []

    def faulty(topic: str, payload: bytes) -> None:
        seen.append(topic)
        raise ValueError("a fault of the application")

    mqtt = Mqtt(mosquitto.url, "faulty")
    mqtt.subscribe("t")
    states: list[bool] = []
    mqtt.start(faulty, states.append)
    until(lambda: states == b.states == [True], "connections")
    b.mqtt.publish("t", b"1")
    b.mqtt.publish("t", b"2")
    until(lambda: len(seen) == 2, "both messages")
    assert states == [True]
    assert "a callback of the transport raised" in caplog.text
    mqtt.close()


def test_a_broker_that_falls_silent_is_noticed_by_its_missing_answer(
    mosquitto: Any, client: Any, until: Any
) -> None:
    a = client(mosquitto.url, "a", keepalive_s=1)
    until(lambda: a.states == [True], "a connection")
    mosquitto.process.send_signal(signal.SIGSTOP)
    until(lambda: a.states == [True, False], "the silence to be noticed")
    mosquitto.process.send_signal(signal.SIGCONT)
    until(lambda: a.states == [True, False, True], "the return")


def test_a_topic_that_mqtt_does_not_allow_costs_that_message_only(
    mosquitto: Any, client: Any, until: Any, caplog: pytest.LogCaptureFixture
) -> None:
    a = client(mosquitto.url, "a", "t")
    until(lambda: a.states == [True], "a connection")
    a.mqtt.publish("a/#", b"x")
    until(lambda: a.states == [True, False, True], "a new connection")
    a.mqtt.publish("t", b"y")
    until(lambda: a.got == [("t", b"y")], "a message on it")
    assert "the transport failed and connects again" in caplog.text


def test_a_broker_of_mqtt_5_that_ends_it_tells_why(until: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        mqtt = Mqtt(f"mqtt://127.0.0.1:{server.getsockname()[1]}", "a", backoff_s=(30.0, 30.0))
        mqtt.start(lambda _topic, _payload: None, lambda _is_up: None)
        connection, _ = server.accept()
        with connection:
            connection.recv(1000)
            connection.sendall(bytes.fromhex("2003000000"))  # CONNACK
            until(lambda: mqtt.is_up, "the connection")
            connection.sendall(bytes.fromhex("e0028e00"))  # DISCONNECT, session taken over
        until(lambda: mqtt.error, "its end")
    is_told = hasattr(paho, "CallbackAPIVersion")  # paho 1.6 does not read so short a packet
    why = "another connection took over this client id" if is_told else "was lost"
    assert why in str(mqtt.error)
    mqtt.close()


def test_a_broker_of_mqtt_5_may_lower_the_packet_size(until: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        mqtt = Mqtt(f"mqtt://127.0.0.1:{server.getsockname()[1]}", "a")
        mqtt.start(lambda _topic, _payload: None, lambda _is_up: None)
        connection, _ = server.accept()
        with connection:
            connection.recv(1000)
            connection.sendall(bytes.fromhex("20080000052700010000"))  # at most 65,536 bytes
            until(lambda: mqtt.is_up, "the connection")
            assert mqtt._size.most == 65_536 - 4096
            assert mqtt.max_packet <= mqtt._size.most
            mqtt.close()
