# SPDX-License-Identifier: Apache-2.0
"""The impairer of the fault tests does what it says, by its seed, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import random
import re
import socket
import subprocess
from pathlib import Path

import pytest
from tun_network import Network, Way, Wire

PACKETS = [bytes([number]) * 100 for number in range(200)]


def carried(wire: Wire, seed: int = 1) -> tuple[Way, list[tuple[float, bytes]]]:
    """Send packets a second apart through a wire; return what comes out, in that order."""
    way = Way(random.Random(seed))  # noqa: S311 - repeats by its seed
    way.wire = wire
    found = [one for at, packet in enumerate(PACKETS) for one in way.through(packet, at)]
    return way, sorted(found, key=lambda one: one[0])


def test_a_wire_does_what_it_says_and_the_same_by_the_same_seed() -> None:
    calm, same = carried(Wire())
    assert [packet for _, packet in same] == PACKETS
    assert calm.bytes == 100 * len(PACKETS)
    lossy, rest = carried(Wire(loss=0.2))
    assert 20 < lossy.lost == len(PACKETS) - len(rest) < 60
    assert rest == carried(Wire(loss=0.2))[1] != carried(Wire(loss=0.2), seed=2)[1]
    _, doubled = carried(Wire(duplicate=0.2))
    assert {packet for _, packet in doubled} == set(PACKETS)
    assert 20 < len(doubled) - len(PACKETS) < 60
    _, overtaken = carried(Wire(reorder=0.2, held_s=1.5))
    assert sorted(packet for _, packet in overtaken) == sorted(PACKETS)
    assert [packet for _, packet in overtaken] != PACKETS
    _, late = carried(Wire(delay_s=0.3, jitter_s=5.0))
    assert [packet for _, packet in late] == PACKETS  # in order all the same
    altered, damaged = carried(Wire(corrupt=0.2))
    assert altered.altered == sum(p not in PACKETS for _, p in damaged) > 20


def test_a_wire_that_is_slow_has_a_queue_and_loses_what_finds_it_full() -> None:
    slow, late = carried(Wire(bytes_per_s=50.0, queue_s=10.0))  # two seconds for each packet
    assert [at for at, _ in late] == [2.0 * (n + 1) for n in range(len(late))]
    assert slow.lost == len(PACKETS) - len(late) > 80
    dead, first = carried(Wire(dead_after=1_000))
    assert [packet for _, packet in first] == PACKETS[:10]
    assert dead.lost == len(PACKETS) - 10


def test_nothing_is_left_of_a_network_after_a_failure() -> None:
    with contextlib.suppress(ZeroDivisionError), Network(2, seed=1) as network:
        for host in network.hosts:
            ping = f"import socket; socket.create_connection(({network.address!r}, 1), 5)"
            done = subprocess.run([*host.under, "python3", "-c", ping], stderr=-1, check=False)
            assert b"ConnectionRefusedError" in done.stderr  # it is there, and answers
        raise ZeroDivisionError
    for host in network.hosts:
        pid = re.findall(r"/proc/(\d+)/ns/net", host.under[1])
        assert not Path("/proc", *pid).exists()
    with socket.socket() as probe, pytest.raises(OSError, match="assign requested address"):
        probe.bind((network.address, 0))
