# SPDX-License-Identifier: Apache-2.0
from edge_sdk.transport.packet_size import LEAST, PacketSize


def test_a_packet_that_outlasts_the_keepalive_quarters_the_size() -> None:
    size = PacketSize(120_000, 30.0)
    size.lost(40.0)
    assert size.limit == 30_000
    for _ in range(9):
        size.lost(40.0)
    assert size.limit == LEAST


def test_a_connection_that_ends_for_other_reasons_changes_nothing() -> None:
    size = PacketSize(120_000, 30.0)
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
    size = PacketSize(120_000, 30.0)
    size.allow(60_000)
    assert size.limit == 60_000
    size.allow(10)
    assert size.limit == LEAST
    size.allow(120_000)
    size.acked(LEAST, 0.01)
    assert size.limit == 2 * LEAST
