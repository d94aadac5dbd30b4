# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sdk import cbor, messages, topics
from edge_sdk.errors import MessageError
from edge_sdk.messages import (
    CheckIn,
    Chunk,
    Heard,
    Invite,
    Message,
    Missing,
    Offer,
    Part,
    Receipt,
    Status,
    Update,
)
from edge_sdk.signing import DeviceKey

KEY = DeviceKey.from_seed(bytes(range(32)))
HUB = DeviceKey.from_seed(b"\7" * 32)
TASK = "pump"
GOLDEN = Path(__file__).parent / "golden" / "messages.json"

_SPEC: list[object] = [["deadzone", 2.0], ["int8"], ["momentum", {"decay": 0.9, "lr": 0.05}]]
EXAMPLES: list[tuple[Message, DeviceKey, str]] = [
    (
        Status(KEY.id, KEY.public, online=True, boot=3, name="pump-7", sdk="fedge 0.1.0"),
        KEY,
        topics.status(KEY.id),
    ),
    (
        Offer(
            TASK, 9, 4, 17, b"\1" * 32, b"\2" * 32, 30_000, 180_000, HUB.public, "open", [900, 1000]
        ),
        HUB,
        topics.offer(TASK),
    ),
    (
        Status(
            KEY.id,
            KEY.public,
            online=True,
            boot=4,
            name="pump-7",
            sdk="fedge 0.1.0",
            tags={"site": "north", "ram_mib": 2048, "t": -1.5, "beta": False},
        ),
        KEY,
        topics.status(KEY.id),
    ),
    (
        Offer(
            *(TASK, 10, 4, 17, b"\1" * 32, b"\2" * 32, 30_000, 180_000, HUB.public, "open"),
            patches=None,
            spread_s=20.0,
        ),
        HUB,
        topics.offer(TASK),
    ),
    (
        Offer(
            *(TASK, 10, 4, 17, b"\1" * 32, b"\2" * 32, 30_000, 180_000, HUB.public, "open"),
            bundle_packed=17_000,
        ),
        HUB,
        topics.offer(TASK),
    ),
    (CheckIn(9, ready=True, examples=240), KEY, topics.up(TASK, KEY.id, "checkin")),
    (
        Status(
            *(KEY.id, KEY.public, True, 5, "pump-7", "fedge 0.1.0", None, 2**63 - 1), connection=2
        ),
        KEY,
        topics.status(KEY.id),
    ),
    (
        CheckIn(
            9,
            ready=False,
            examples=7,
            boot=5,
            start=6,
            connection=2,
            turn=8,
            reason="disk",
            round=4,
        ),
        KEY,
        topics.up(TASK, KEY.id, "checkin"),
    ),
    (
        CheckIn(9, ready=True, examples=7, boot=5, start=6, connection=2, turn=9, asks=True),
        KEY,
        topics.up(TASK, KEY.id, "checkin"),
    ),
    (Heard(5, 2**63 - 1, 9, 10, 4), HUB, topics.down(TASK, KEY.id, "heard")),
    (
        Invite(4, 17, b"\2" * 32, 60.0, _SPEC, 5, None, None, 16, 0.05, None, 2**63 - 1),
        HUB,
        topics.down(TASK, KEY.id, "invite"),
    ),
    (
        Invite(4, 17, b"\2" * 32, 60.0, _SPEC, 5, None, None, 16, 0.05, 0.1, 7, "feddyn"),
        HUB,
        topics.down(TASK, KEY.id, "invite"),
    ),
    (
        Invite(
            4, 17, b"\2" * 32, 60.0, _SPEC, 5, *[None] * 3, 0.05, 1e-4, 7, "scaffold", b"\1" * 9
        ),
        HUB,
        topics.down(TASK, KEY.id, "invite"),
    ),
    (
        Update(4, 17, 240, 75, 0.125, 3.5, b"\5" * 40),
        KEY,
        topics.up(TASK, KEY.id, "update"),
    ),
    (
        Chunk(b"\3" * 32, 1, 3, 100, body=b"\6" * 33),
        KEY,
        topics.up(TASK, KEY.id, "chunk"),
    ),
    (
        Chunk(b"\3" * 32, 0, 3, 100, probe=True, body=b"\6" * 33),
        KEY,
        topics.up(TASK, KEY.id, "chunk"),
    ),
    (Missing(b"\3" * 32, 3, [1, 2]), HUB, topics.down(TASK, KEY.id, "missing")),
    (
        Receipt(4, b"\4" * 16, "duplicate", "one a round", b"\x08" * 16),
        HUB,
        topics.down(TASK, KEY.id, "receipt"),
    ),
    (
        Receipt(4, b"\4" * 16, "counted", rest_s=3600.0),
        HUB,
        topics.down(TASK, KEY.id, "receipt"),
    ),
    (
        Part("weights", b"\2" * 32, 17, 0, 2, 9, b"\x09" * 4),
        HUB,
        topics.part(TASK, "weights", 0),
    ),
    (
        Part("patch", b"\2" * 32, 17, 1, 2, 9, b"\x07" * 5),
        HUB,
        topics.part(TASK, "patch", 1, 17),
    ),
]
_ids = [f"{type(m).__name__}-{i}" for i, (m, _, _) in enumerate(EXAMPLES)]
each = pytest.mark.parametrize(("message", "key", "topic"), EXAMPLES, ids=_ids)


def forged(number: int, content: Any, payload: bytes = b"", **prelude: int) -> bytes:
    """Make a frame that holds together, whatever it says."""
    raw = content if isinstance(content, bytes) else cbor.encode(content)
    start = messages.PRELUDE.pack(
        b"FDGE",
        prelude.get("version", 1),
        number,
        prelude.get("flags", 0),
        prelude.get("header", len(raw)),
        prelude.get("body", len(payload)),
        0,
    )[:-4]
    crc = zlib.crc32(start + raw + payload) if "crc" not in prelude else prelude["crc"]
    return start + crc.to_bytes(4, "little") + raw + payload + bytes(64)


@each
def test_a_message_comes_back_equal_and_signed(
    message: Message, key: DeviceKey, topic: str
) -> None:
    frame = messages.encode(message, key, topic)
    back, signed = messages.decode(frame, topic)
    assert back == message
    assert signed.by(key.public)
    assert messages.verify(frame, topic, key.public)


@each
def test_a_frame_is_worth_nothing_on_another_topic_or_by_another_key(
    message: Message, key: DeviceKey, topic: str
) -> None:
    frame = messages.encode(message, key, topic)
    assert not messages.verify(frame, topic + "x", key.public)
    assert not messages.verify(frame, topic, (HUB if key is KEY else KEY).public)
    assert not messages.verify(frame[:-1], topic, key.public)
    assert not messages.verify(b"", topic, key.public)
    with pytest.raises(MessageError):
        messages.decode(frame, "fedge/1/t/other-task/offer")


@each
def test_the_golden_bytes_have_not_changed(message: Message, key: DeviceKey, topic: str) -> None:
    golden = {case["frame"]: case for case in json.loads(GOLDEN.read_text())}
    case = golden[messages.encode(message, key, topic).hex()]
    assert (case["kind"], case["topic"]) == (type(message).__name__, topic)
    assert messages.decode(bytes.fromhex(case["frame"]), topic)[0] == message


def test_an_offer_from_before_there_were_patches_is_read_as_one_without() -> None:
    older = next(c for c in json.loads(GOLDEN.read_text()) if c["kind"] == "Offer")
    message, signed = messages.decode(bytes.fromhex(older["frame"]), topics.offer(TASK))
    assert isinstance(message, Offer)
    assert message.patches is None
    assert signed.by(HUB.public)


def test_an_invite_from_before_there_were_corrections_is_read_as_one_without() -> None:
    older = next(c for c in json.loads(GOLDEN.read_text()) if c["kind"] == "Invite")
    message, signed = messages.decode(bytes.fromhex(older["frame"]), older["topic"])
    assert isinstance(message, Invite)
    assert message.correction is None
    assert signed.by(HUB.public)


def test_what_came_before_there_were_tags_spreads_and_rests_is_read_without() -> None:
    golden = json.loads(GOLDEN.read_text())
    later = [("Status", "tags"), ("Offer", "spread_s"), ("Offer", "bundle_packed")]
    for kind, field in (*later, ("Receipt", "rest_s")):
        older = next(c for c in golden if c["kind"] == kind and field not in c["fields"])
        message, _ = messages.decode(bytes.fromhex(older["frame"]), older["topic"])
        assert getattr(message, field) is None


def test_what_came_before_presence_was_numbered_is_read_as_not_told() -> None:
    golden = json.loads(GOLDEN.read_text())
    later = {
        "Status": "start connection",
        "CheckIn": "boot start connection turn reason asks round",
    }
    for kind, names in later.items():
        older = next(c for c in golden if c["kind"] == kind)
        assert not set(names.split()) & set(older["fields"])
        message, _ = messages.decode(bytes.fromhex(older["frame"]), older["topic"])
        assert not any(getattr(message, name) for name in names.split())


@pytest.mark.parametrize("reason", ["x" * 17, "Disk", "a b", "no\n", 5])
def test_a_reason_is_a_short_word(reason: Any) -> None:
    said = dataclasses.replace(CheckIn(9, ready=False, examples=1), reason=reason)
    with pytest.raises(MessageError, match="reason: expected at most 16 of a-z and -"):
        messages.encode(said, KEY, topics.up(TASK, KEY.id, "checkin"))


@pytest.mark.parametrize(
    "tags",
    [
        {f"t{i}": 1 for i in range(17)},
        {"9a": 1},
        {"": 1},
        {"a b": 1},
        {"a": "x" * 65},
        {"a": "x\n"},
        {"a": None},
        {"a": [1]},
        {"a": math.inf},
        {"a": 2**60},
        {f"t{i}": "\u00e9" * 64 for i in range(9)},
    ],
)
def test_tags_are_few_and_small(tags: dict[str, Any]) -> None:
    status = dataclasses.replace(EXAMPLES[0][0], tags=tags)  # type: ignore[call-arg]  # a Status
    with pytest.raises(MessageError, match="tags"):
        messages.encode(status, KEY, topics.status(KEY.id))


def test_as_many_tags_as_there_may_be_fit_a_frame() -> None:
    tags = {f"t{i}": "\u00e9" * 30 for i in range(16)}
    long = "\u20ac" * 64
    status = Status(KEY.id, KEY.public, online=True, boot=2**63 - 1, name=long, sdk=long, tags=tags)
    frame = messages.encode(status, KEY, topics.status(KEY.id))
    assert messages.decode(frame, topics.status(KEY.id))[0] == status


@each
@given(st.data())
@settings(max_examples=60)
def test_one_flipped_bit_never_passes(
    message: Message, key: DeviceKey, topic: str, data: Any
) -> None:
    frame = bytearray(messages.encode(message, key, topic))
    frame[data.draw(st.integers(0, len(frame) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        _, signed = messages.decode(bytes(frame), topic)
    except MessageError:
        return
    assert not signed.by(key.public)


@each
def test_a_truncated_or_padded_frame_is_refused(
    message: Message, key: DeviceKey, topic: str
) -> None:
    frame = messages.encode(message, key, topic)
    for wrong in [*(frame[:n] for n in range(0, len(frame), 7)), frame + b"\0"]:
        with pytest.raises(MessageError):
            messages.decode(wrong, topic)


@each
def test_every_field_refuses_what_is_not_of_its_kind(
    message: Message, key: DeviceKey, topic: str
) -> None:
    for field in dataclasses.fields(message):
        if field.name == "body":
            continue
        for wrong in ([], -1, 2**70, math.nan, b"", "x\n", "y" * 65, 1.5, True, {"a": 1}):
            changed = dataclasses.replace(message, **{field.name: wrong})
            if changed == message:
                continue
            try:
                frame = messages.encode(changed, key, topic)
            except MessageError as error:
                assert "\n" not in str(error)  # noqa: PT017 - either outcome is right
                continue
            back, _ = messages.decode(frame, topic)
            assert type(getattr(back, field.name)) in _kinds(field.name)


def _kinds(name: str) -> set[type]:
    real = {"loss", "seconds", "deadline_s", "lr", "mu", "spread_s", "rest_s"}
    text = {"name", "sdk", "reason"}
    flag = {"online", "ready", "probe", "asks"}
    kinds: set[type] = {str} if name in text else {bool} if name in flag else {int}
    return (
        {float}
        if name in real
        else kinds
        | ({list} if name in {"codec", "patches", "missing"} else set())
        | ({dict} if name == "tags" else set())
    )


@given(
    st.integers(0, 9),
    st.dictionaries(
        st.integers(0, 14),
        st.none()
        | st.booleans()
        | st.integers(-(2**40), 2**40)
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.binary(max_size=33)
        | st.text(st.characters(exclude_categories=["Cs"]), max_size=66)
        | st.lists(st.integers(0, 3), max_size=3),
    ),
    st.binary(max_size=10),
    st.sampled_from([topic for _, _, topic in EXAMPLES]),
)
def test_any_header_is_a_message_within_bounds_or_refused(
    number: int, header: dict[int, Any], body: bytes, topic: str
) -> None:
    try:
        message, _ = messages.decode(forged(number, header, body), topic)
    except MessageError:
        return
    assert messages.encode(message, KEY, topic)  # what came in could also go out


@given(st.binary(max_size=200))
def test_any_bytes_are_refused_in_one_line(data: bytes) -> None:
    with pytest.raises(MessageError):
        messages.decode(data, EXAMPLES[0][2])


def test_headers_are_small() -> None:
    largest = Update(2**32 - 1, 2**32 - 1, 2**32 - 1, 2**32 - 1, 0.1, 0.1)
    assert len(messages.encode(largest, KEY, topics.up(TASK, KEY.id, "update"))) <= 150
    called = CheckIn(2**63 - 1, ready=True, examples=2**32 - 1)
    assert len(messages.encode(called, KEY, topics.up(TASK, KEY.id, "checkin"))) <= 120


def test_a_header_key_of_the_future_is_ignored() -> None:
    topic = topics.up(TASK, KEY.id, "checkin")
    message, _ = messages.decode(forged(3, {1: 9, 2: True, 3: 240, 99: "new", "x": 1}), topic)
    assert message == CheckIn(9, ready=True, examples=240)


def test_a_field_with_a_default_may_be_absent() -> None:
    message, _ = messages.decode(
        forged(7, {1: 4, 2: bytes(16), 3: "counted"}), topics.down(TASK, KEY.id, "receipt")
    )
    assert message == Receipt(4, bytes(16), "counted", "", None)


@pytest.mark.parametrize(
    ("frame", "why"),
    [
        (forged(3, {1: 9, 2: True, 3: 0}, version=2), "got 2: upgrade this side"),
        (forged(3, {1: 9, 2: True, 3: 0}, version=0), "got 0: upgrade the sender"),
        (forged(77, {}), "kind 77 is not known here: upgrade this side"),
        (forged(3, {1: 9, 2: True, 3: 0}, flags=1), "flags 0x1 are not known"),
        (forged(3, {1: 9, 2: True}), "CheckIn: examples is missing"),
        (forged(3, {1: 9, 2: 1, 3: 0}), "ready: expected true or false, got 1"),
        (forged(3, {1: 9, 2: True, 3: -1}), "expected an integer of 0 to 4294967295, got -1"),
        (forged(3, {1: 9, 2: True, 3: 0}, b"x"), "expected no body, got 1 bytes"),
        (forged(3, [1]), "expected a map as header"),
        (forged(3, b"\xff"), "cbor"),
        (forged(3, {1: 9, 2: True, 3: 0}, header=4_000_000_000), "header of at most 2048"),
        (forged(3, {1: 9, 2: True, 3: 0}, body=4_000_000_000), "bytes by the lengths"),
        (forged(3, {1: 9, 2: True, 3: 0}, crc=1), "checksum does not hold"),
        (b"\x89PNG" + bytes(200), "bytes of something else"),
        (bytes(120_001), "frame of at most 120000 bytes, got 120001"),
    ],
)
def test_each_refusal_says_what_came_and_what_to_do(frame: bytes, why: str) -> None:
    with pytest.raises(MessageError, match=why):
        messages.decode(frame, topics.up(TASK, KEY.id, "checkin"))


def test_flags_that_need_not_be_known_are_ignored() -> None:
    frame = forged(3, {1: 9, 2: True, 3: 0}, flags=0x10000)
    assert messages.decode(frame, topics.up(TASK, KEY.id, "checkin"))[0] == CheckIn(
        9, ready=True, examples=0
    )


def test_an_id_that_is_not_cut_from_the_key_is_refused() -> None:
    liar = Status(HUB.id, KEY.public, online=True, boot=1, name="", sdk="")
    with pytest.raises(MessageError, match="is not the id of the key"):
        messages.encode(liar, KEY, topics.status(HUB.id))


@pytest.mark.parametrize(
    ("message", "topic"),
    [
        (EXAMPLES[0][0], topics.status(HUB.id)),
        (EXAMPLES[1][0], topics.offer("other")),
        (EXAMPLES[2][0], topics.up(TASK, KEY.id, "update")),
        (EXAMPLES[7][0], topics.part(TASK, "weights", 1)),
        (EXAMPLES[7][0], topics.part(TASK, "bundle", 0)),
    ],
)
def test_a_message_that_is_not_of_its_topic_is_refused(message: Message, topic: str) -> None:
    with pytest.raises(MessageError, match="does not belong on its topic"):
        messages.encode(message, KEY, topic)


@pytest.mark.parametrize(
    ("index", "count", "size", "body"),
    [(3, 3, 9, 3), (0, 3, 9, 4), (0, 3, 2, 0), (0, 1, 64 * 2**20 + 1, 5), (0, 65_536, 70_000, 1)],
)
def test_a_slice_that_cannot_be_is_refused(index: int, count: int, size: int, body: int) -> None:
    with pytest.raises(MessageError):
        messages.encode(
            Chunk(bytes(32), index, count, size, bytes(body)),
            KEY,
            topics.up(TASK, KEY.id, "chunk"),
        )


def test_only_an_update_may_be_larger_than_a_packet_and_only_out_of_chunks() -> None:
    topic = topics.up(TASK, KEY.id, "update")
    frame = messages.encode(Update(1, 1, 1, 1, 0.0, 0.0, bytes(200_000)), KEY, topic)
    with pytest.raises(MessageError, match="at most 120000"):
        messages.decode(frame, topic)
    message, signed = messages.decode(frame, topic, limit=messages.MAX_TRANSFER)
    assert isinstance(message, Update)
    assert signed.by(KEY.public)
    with pytest.raises(MessageError, match="at most 120000"):
        messages.encode(
            Part("bundle", bytes(32), 0, 0, 1, 120_000, bytes(120_000)),
            HUB,
            topics.part(TASK, "bundle", 0),
        )


def test_a_sender_may_use_numpys_numbers_and_a_long_reason() -> None:
    topic = topics.up(TASK, KEY.id, "update")
    loose: Any = (np.int64(4), np.int32(17), np.uint32(240), np.int8(75), np.float32(0.125), 3)
    message, _ = messages.decode(messages.encode(Update(*loose), KEY, topic), topic)
    assert message == Update(4, 17, 240, 75, 0.125, 3.0)
    assert isinstance(message, Update)
    assert (type(message.round), type(message.seconds)) == (int, float)
    topic = topics.down(TASK, KEY.id, "receipt")
    long = Receipt(1, bytes(16), "refused", "a\nb\x1b[0m" + "c" * 300)
    back, _ = messages.decode(messages.encode(long, HUB, topic), topic)
    assert isinstance(back, Receipt)
    assert back.reason.startswith("a b[0mccc")
    assert len(back.reason) == 200


def test_an_update_has_an_id_of_sixteen_bytes_of_its_hash() -> None:
    import hashlib

    message, key, topic = EXAMPLES[4]
    frame = messages.encode(message, key, topic)
    assert messages.decode(frame, topic)[1].id == hashlib.sha256(frame).digest()[:16]
