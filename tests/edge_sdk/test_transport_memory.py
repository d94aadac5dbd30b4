# SPDX-License-Identifier: Apache-2.0
import pytest

from edge_sdk.transport import Transport
from edge_sdk.transport.memory import QUEUE_LIMIT, MemoryBroker, MemoryTransport


class Client:
    """A client that writes down all that it is told."""

    def __init__(self, broker: MemoryBroker, name: str, *filters: str, will: bool = False) -> None:
        last = (f"will/{name}", b"gone") if will else None
        self.transport: MemoryTransport = broker.transport(name, last)
        port: Transport = self.transport  # the port is filled, says mypy
        self.got: list[tuple[str, bytes]] = []
        self.states: list[bool] = []
        port.subscribe(*filters)
        port.start(lambda topic, payload: self.got.append((topic, payload)), self.states.append)


def test_a_message_reaches_each_subscriber_once_and_only_when_pumped() -> None:
    broker = MemoryBroker()
    a, b = Client(broker, "a", "t/+", "t/#"), Client(broker, "b")
    b.transport.publish("t/1", b"x")
    assert a.got == []
    broker.pump()
    assert (a.got, b.got) == ([("t/1", b"x")], [])
    assert a.states == [True]


def test_what_is_retained_greets_a_late_subscriber_until_it_is_emptied() -> None:
    broker = MemoryBroker()
    a = Client(broker, "a")
    a.transport.publish("t", b"1", retain=True)
    a.transport.publish("t", b"2", retain=True)
    late = Client(broker, "b", "t")
    broker.pump()
    assert late.got == [("t", b"2")]
    a.transport.publish("t", b"", retain=True)
    later = Client(broker, "c", "t")
    broker.pump()
    assert later.got == []


def test_a_session_keeps_what_came_while_its_client_was_away() -> None:
    broker = MemoryBroker()
    a, b = Client(broker, "a", "t"), Client(broker, "b")
    broker.cut("a")
    b.transport.publish("t", b"x")
    broker.pump()
    assert (a.got, a.states) == ([], [True, False])
    broker.restore("a")
    broker.pump()
    assert (a.got, a.states) == ([("t", b"x")], [True, False, True])


def test_a_queue_for_the_absent_is_bounded() -> None:
    broker = MemoryBroker()
    a, b = Client(broker, "a", "t"), Client(broker, "b")
    broker.cut("a")
    for _ in range(QUEUE_LIMIT + 5):
        b.transport.publish("t", b"x")
    broker.restore("a")
    broker.pump()
    assert len(a.got) == QUEUE_LIMIT


@pytest.mark.parametrize("how", ["cut", "close", "taken over"])
def test_a_will_is_published_and_retained_however_a_client_goes(how: str) -> None:
    broker = MemoryBroker()
    watcher = Client(broker, "w", "will/#")
    a = Client(broker, "a", will=True)
    if how == "cut":
        broker.cut("a")
    elif how == "close":
        a.transport.close()
    else:
        Client(broker, "a")
    broker.pump()
    assert watcher.got == [("will/a", b"gone")]
    assert broker.retained == {"will/a": b"gone"}


def test_what_is_published_offline_is_dropped_but_for_the_latest_retained() -> None:
    broker = MemoryBroker()
    a, b = Client(broker, "a"), Client(broker, "b", "t", "r")
    broker.cut("a")
    a.transport.publish("t", b"lost")
    a.transport.publish("r", b"1", retain=True)
    a.transport.publish("r", b"2", retain=True)
    broker.restore("a")
    broker.pump()
    assert b.got == [("r", b"2")]
    assert a.transport.counters.dropped == 1


def test_a_stopped_broker_comes_back_with_or_without_its_memory() -> None:
    for forget in (False, True):
        broker = MemoryBroker()
        a, b = Client(broker, "a", "t"), Client(broker, "b")
        b.transport.publish("r", b"x", retain=True)
        broker.stop(forget=forget)
        broker.pump()
        assert a.states[-1] is False
        broker.resume()
        b.transport.publish("t", b"x")
        broker.pump()
        assert a.got == [("t", b"x")]  # subscribed again, whatever the broker remembered
        assert bool(broker.retained) is not forget


def test_an_unsubscribed_topic_is_quiet() -> None:
    broker = MemoryBroker()
    a = Client(broker, "a", "t", "u")
    a.transport.unsubscribe("t")
    a.transport.publish("t", b"x")
    a.transport.publish("u", b"x")
    broker.pump()
    assert a.got == [("u", b"x")]


def test_an_unsubscribe_reaches_a_session_that_a_former_process_left() -> None:
    broker = MemoryBroker()
    Client(broker, "a", "t", "u").transport.close()
    again = broker.transport("a")
    got: list[str] = []
    again.unsubscribe("t")
    again.start(lambda topic, _payload: got.append(topic), lambda _is_up: None)
    broker.pump()
    again.publish("t", b"x")
    again.publish("u", b"x")
    broker.pump()
    assert got == ["u"]


def test_fate_can_lose_and_double_messages() -> None:
    copies = {"t/lost": 0, "t/twice": 2}
    broker = MemoryBroker(fate=lambda _client, topic, _payload: copies.get(topic, 1))
    a = Client(broker, "a", "t/#")
    for topic in ("t/lost", "t/twice", "t/once"):
        a.transport.publish(topic, b"x")
    broker.pump()
    assert [topic for topic, _ in a.got] == ["t/twice", "t/twice", "t/once"]


def test_payloads_are_counted_both_ways() -> None:
    broker = MemoryBroker()
    a, b = Client(broker, "a", "t"), Client(broker, "b")
    b.transport.publish("t", b"12345")
    broker.pump()
    assert (b.transport.counters.bytes_up, b.transport.counters.messages_up) == (5, 1)
    assert (a.transport.counters.bytes_down, a.transport.counters.messages_down) == (5, 1)


def test_clients_that_talk_in_a_circle_are_found_out() -> None:
    broker = MemoryBroker()
    a = broker.transport("a")
    a.subscribe("t")
    a.start(a.publish, lambda _is_up: None)
    a.publish("t", b"x")
    with pytest.raises(RuntimeError, match="not quiet after 50 deliveries"):
        broker.pump(limit=50)
