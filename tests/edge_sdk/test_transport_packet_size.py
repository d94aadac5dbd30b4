# SPDX-License-Identifier: Apache-2.0
from edge_sdk import chunks, messages, topics
from edge_sdk.signing import DeviceKey
from edge_sdk.transport.packet_size import FIRST, LEAST, PacketSize

KEY = DeviceKey.from_seed(bytes(32))
TOPIC = topics.up("t", KEY.id, "chunk")


def grown(to: int = 120_000) -> PacketSize:
    size = PacketSize(to, 30.0)
    while size.limit < to:
        size.acked(size.limit - 200, 0.01)
    return size


def test_the_first_packets_are_small_enough_for_a_slow_link() -> None:
    assert PacketSize(120_000, 10.0).limit == FIRST  # 3 s at 20 kbit/s
    assert PacketSize(4_000, 10.0).limit == 4_000


def test_a_packet_that_outlasts_the_keepalive_quarters_the_size() -> None:
    size = grown()
    size.lost(40.0)
    assert size.limit == 30_000
    for _ in range(9):
        size.lost(40.0)
    assert size.limit == LEAST


def test_a_connection_that_ends_for_other_reasons_changes_nothing() -> None:
    size = grown()
    size.lost(1.0)
    assert size.limit == 120_000


def test_quick_acknowledgements_of_full_packets_double_it_up_to_the_most() -> None:
    size = PacketSize(120_000, 30.0)
    for _ in range(3):
        size.lost(40.0)
    size.acked(100, 0.01)
    size.acked(1800, 20.0)
    assert size.limit == LEAST
    for _ in range(9):
        size.acked(size.limit - 200, 0.01)
    assert size.limit == 120_000


def test_the_broker_has_the_last_word() -> None:
    size = grown()
    size.allow(60_000)
    assert size.limit == 60_000
    size.allow(10)
    assert size.limit == LEAST
    size.allow(120_000)
    size.acked(LEAST, 0.01)
    assert size.limit == 2 * LEAST


def test_a_link_that_goes_silent_does_not_undo_what_was_cut_to_a_size_that_got_through() -> None:
    frame = bytes(63_043)
    cut = chunks.split(frame, FIRST)
    size = PacketSize(120_000, 10.0)
    assert size.carried == 0
    size.acked(len(messages.encode(cut[0], KEY, TOPIC)), 4.0)
    size.lost(15.0)
    assert size.limit == FIRST // 4
    assert chunks.split(frame, size.carried) == cut
    size.acked(200, 0.1)  # no proof
    size.lost(15.0)
    assert size.carried == 0  # twice: it became slower
