# SPDX-License-Identifier: Apache-2.0
import hashlib
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk import chunks, messages, topics
from edge_sdk.chunks import Assembler, Parts
from edge_sdk.errors import MessageError
from edge_sdk.messages import Chunk
from edge_sdk.signing import DeviceKey

KEY = DeviceKey.from_seed(bytes(32))
TOPIC = topics.up("t" * 20, KEY.id, "chunk")


def _random(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)  # noqa: S311 - test data


@given(st.integers(1, 20_000), st.integers(512, 4000), st.randoms(use_true_random=False))
def test_chunks_in_any_order_and_twice_make_the_frame(
    size: int, packet: int, rng: random.Random
) -> None:
    frame = _random(size)
    cut = chunks.split(frame, packet)
    sent = cut + cut[:-1]
    rng.shuffle(sent)
    assembler = Assembler()
    whole = [done for chunk in sent if (done := assembler.add("d", chunk)) is not None]
    assert whole[0] == frame
    assert max(len(messages.encode(chunk, KEY, TOPIC)) for chunk in cut) <= packet


def test_a_whole_transfer_leaves_nothing_behind() -> None:
    assembler = Assembler()
    for chunk in chunks.split(_random(5000), 1000):
        assembler.add("d", chunk)
    assert (len(assembler), assembler.bytes) == (0, 0)


def test_what_is_missing_can_be_asked_for() -> None:
    cut = chunks.split(_random(5000), 1000)
    assembler = Assembler()
    assert assembler.missing("d", cut[0].hash) is None
    assembler.add("d", cut[2])
    expected = [i for i in range(len(cut)) if i != 2]
    assert assembler.missing("d", cut[0].hash) == expected
    assembler.forget("d")
    assert assembler.missing("d", cut[0].hash) is None
    assert assembler.bytes == 0


def test_sources_are_kept_apart() -> None:
    cut = chunks.split(_random(1000), 800)
    assembler = Assembler()
    assert len(cut) == 2
    assert assembler.add("a", cut[0]) is None
    assert assembler.add("b", cut[1]) is None
    assert assembler.add("a", cut[1]) == _random(1000)


def test_memory_follows_what_came_not_what_was_announced() -> None:
    assembler = Assembler()
    assembler.add("d", Chunk(bytes(32), 0, 65_535, 65_535, body=b"x"))
    assert assembler.bytes == 1


def test_a_source_has_so_many_transfers_open_and_the_oldest_goes() -> None:
    assembler = Assembler(max_open=2)
    cuts = [chunks.split(_random(3000, seed), 1000) for seed in range(3)]
    for cut in cuts:
        assembler.add("d", cut[0])
    assert len(assembler) == 2
    assert assembler.missing("d", cuts[0][0].hash) is None
    assert assembler.missing("d", cuts[2][0].hash) is not None


def test_a_source_holds_so_many_bytes_and_the_oldest_goes() -> None:
    assembler = Assembler(max_bytes=3000, max_open=9)
    cuts = [chunks.split(_random(3000, seed), 1000) for seed in range(2)]
    for cut in cuts:
        for chunk in cut[:-1]:
            assembler.add("d", chunk)
    assert len(assembler) == 1
    assert assembler.bytes <= 3000
    with pytest.raises(MessageError, match="expected at most 3000 bytes, 3001 are coming"):
        assembler.add("d", chunks.split(_random(3001), 1000)[0])


def test_all_sources_together_are_bounded() -> None:
    assembler = Assembler(max_total=10_000)
    for device in range(50):
        for chunk in chunks.split(_random(3000, device), 1000)[:-1]:
            assembler.add(f"d{device}", chunk)
            assert assembler.bytes <= 10_000
    assert assembler.missing("d49", chunks.split(_random(3000, 49), 1000)[0].hash)


def test_chunks_that_hash_to_something_else_are_refused_and_forgotten() -> None:
    a, b = chunks.split(_random(1000), 800)
    assembler = Assembler()
    assembler.add("d", a)
    with pytest.raises(MessageError, match="do not hash"):
        assembler.add("d", Chunk(b.hash, b.index, b.count, b.size, body=bytes(len(b.body))))
    assert (len(assembler), assembler.bytes) == (0, 0)
    assembler.add("d", a)
    assert assembler.add("d", b) == _random(1000)


def test_a_frame_cut_anew_begins_again() -> None:
    assembler = Assembler()
    for chunk in chunks.split(_random(5000), 1000)[:-1]:
        assembler.add("d", chunk)
    *some, last = chunks.split(_random(5000), 2000)
    assert [assembler.add("d", chunk) for chunk in some] == [None] * len(some)
    assert assembler.add("d", last) == _random(5000)
    assert assembler.bytes == 0


def test_a_packet_too_small_to_be_sensible_is_refused() -> None:
    with pytest.raises(MessageError, match="at least 512 bytes, got 100"):
        chunks.split(b"x", 100)


def test_parts_of_the_weights_are_gathered_and_hashed() -> None:
    data = _random(5000)
    digest = hashlib.sha256(data).digest()
    cut = chunks.parts("weights", data, digest, 3, 1000)
    gather = Parts("weights", digest, len(data))
    assert gather.missing is None
    for part in reversed(cut[1:]):
        assert gather.add(part) is None
    assert gather.missing == [0]
    assert gather.add(cut[0]) == data


def test_parts_of_another_version_are_not_mixed_in() -> None:
    data, other = _random(5000), _random(5000, 1)
    digest = hashlib.sha256(data).digest()
    gather = Parts("weights", digest, 5000)
    for part in chunks.parts("weights", other, hashlib.sha256(other).digest(), 3, 1000):
        assert gather.add(part) is None
    assert gather.missing is None
    for part in chunks.parts("weights", data, digest, 3, 1000)[1:]:
        gather.add(part)
    whole = [gather.add(part) for part in chunks.parts("weights", data, digest, 3, 2000)]
    assert whole[-1] == data


def test_weights_that_do_not_hash_to_the_offer_are_refused() -> None:
    gather = Parts("weights", bytes(32), 10)
    with pytest.raises(MessageError, match="fetch them again"):
        gather.add(chunks.parts("weights", bytes(10), bytes(32), 1)[0])


def test_a_bundle_is_handed_over_as_it_came() -> None:
    gather = Parts("bundle", bytes(32), 10)
    assert gather.add(chunks.parts("bundle", b"0123456789", bytes(32), 1)[0]) == b"0123456789"
