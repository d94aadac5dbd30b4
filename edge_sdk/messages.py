# SPDX-License-Identifier: Apache-2.0
"""Every message there is, as a frozen dataclass, to signed bytes and back. Pure.

A frame is a 24-byte prelude, a CBOR header, a raw body and an Ed25519 signature that also covers
the topic, so that no frame can be replayed elsewhere. `docs/protocol.md` is the normative text.
A field's key in the header is its place in the class, from 1: fields are only ever appended, with a
default. What `decode` returns is within the bounds written beside each field: nothing downstream
checks again. What it does not say is who sent it: ask `Signed.by(key)`.
"""

from __future__ import annotations

import functools
import hashlib
import struct
import zlib
from dataclasses import MISSING, dataclass, fields
from typing import Any, NamedTuple, TypeAlias, get_type_hints

from edge_sdk import cbor, signing, topics
from edge_sdk.bounds import (
    Bound,
    Code,
    CodecSpec,
    Flag,
    Hash16,
    Hash32,
    Label,
    MaybeCorrection,
    MaybeHash16,
    MaybeNatural,
    MaybePartSize,
    MaybeReal,
    MaybeSeconds,
    MaybeSizes,
    MaybeTags,
    Natural,
    OfferState,
    Outcome,
    PartKind,
    PartSize,
    Real,
    Seconds,
    Sentence,
    SliceCount,
    Slices,
    Word32,
    Word63,
)
from edge_sdk.errors import MessageError
from edge_sdk.signing import Signer, Verify

VERSION = 1
MAX_FRAME = 120_000
"""The largest payload on a topic: what the smallest cloud brokers take, with room to spare."""
MAX_TRANSFER = 64 * 2**20
"""The largest Update frame, carried in chunks."""
PRELUDE = struct.Struct("<4sHHIIII")
OVERHEAD = PRELUDE.size + signing.SIGNATURE_BYTES

REASONS = (
    "conditions",
    "limits",
    "disk",
    "examples",
    "failed",
    "no-update",
    "no-model",
    "bad-bundle",
    "bad-model",
    "version",
    "deadline",
    "gave-up",
    "leaving",
)
"""Why a device declines. Only ever appended to: a place in the list is what stores keep."""

_MAGIC = b"FDGE"
_MAX_HEADER = 2048
_MUST_KNOW = 0xFFFF  # of the flags: a reader that does not know one of these bits refuses the frame


@dataclass(frozen=True, slots=True)
class Status:
    """A device is here, or (as its will) gone. Retained; tells the key that its id is cut from."""

    device: Label
    key: Hash32
    online: Flag
    boot: Word63
    """Grows with each start, so that the will of an old start cannot end a new one."""
    name: Label
    sdk: Label
    tags: MaybeTags = None
    """What the device says of itself, for choosing who takes part in a task."""
    start: Word63 = 0
    """Drawn at random by each start of the device; 0 is not told."""
    connection: Word32 = 0
    """Grows with each connection of a start; the will is that of its own connection."""


@dataclass(frozen=True, slots=True)
class Offer:
    """What a task is at now. Retained. A device checks in once for each `call`."""

    task: Label
    call: Word63
    round: Word32
    version: Word32
    bundle: Hash32
    """The bundle's digest."""
    model: Hash32
    """sha256 of the weights, flat little-endian float32."""
    bundle_size: PartSize
    model_size: PartSize
    key: Hash32
    """The coordinator's public key."""
    state: OfferState
    patches: MaybeSizes = None
    """Sizes of the patches that lead to `version`, the last to `version` itself, bytes."""
    spread_s: MaybeSeconds = None
    """Over how long devices answer a new call, each at its own moment; None is all at once."""
    bundle_packed: MaybePartSize = None
    """Bytes of the bundle's parts where they are its zlib stream; None: they are the bundle."""


@dataclass(frozen=True, slots=True)
class CheckIn:
    """A device can take part; stands until withdrawn. `ready=False` withdraws, or declines."""

    call: Word63
    ready: Flag
    examples: Word32
    boot: Word63 = 0
    """This and the next two as in the status of the connection that it is said over."""
    start: Word63 = 0
    connection: Word32 = 0
    turn: Word32 = 0
    """Grows with each check-in of a start: one with a smaller number is an old one."""
    reason: Code = ""
    """Why not ready: one of `REASONS`, or one that a later device knows."""
    asks: Flag = False
    """Whether an offer came that is older than one before it: `Heard` is to say which holds."""
    round: Word32 = 0
    """The round that is declined, and no other; 0 where it is about none."""


@dataclass(frozen=True, slots=True)
class Invite:
    """One device is asked to train from `version`; what is None has no limit of its own."""

    round: Word32
    version: Word32
    model: Hash32
    deadline_s: Seconds
    codec: CodecSpec
    epochs: MaybeNatural
    steps: MaybeNatural
    seconds: MaybeSeconds
    batch: MaybeNatural
    lr: MaybeReal
    mu: MaybeReal
    seed: Word63
    correction: MaybeCorrection = None
    """What the device adds to its gradients; `mu` pulls it to the anchor that this moves."""
    body: bytes = b""
    """What the correction needs to know of all devices, as `correction.unpack` reads it."""


@dataclass(frozen=True, slots=True)
class Update:
    """What a device learned: the body is a codec's blob of `local - base`."""

    round: Word32
    version: Word32
    examples: Word32
    steps: Word32
    loss: Real
    seconds: Real
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class Chunk:
    """One slice of a frame too large for one packet; see `chunks.py`."""

    hash: Hash32
    """sha256 of the whole frame."""
    index: Word32
    count: SliceCount
    size: Natural
    """Bytes of the whole frame; with `index` and `count` it fixes the length of the body."""
    probe: Flag = False
    """Asks which of the others are missing, instead of sending them all again."""
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class Receipt:
    """What became of an update, for ever. Sent after the coordinator's commit, never before."""

    round: Word32
    update: Hash16
    """`Signed.id` of the update's frame."""
    outcome: Outcome
    reason: Sentence = ""
    counted: MaybeHash16 = None
    """For a duplicate: the update of this device that was counted."""
    rest_s: MaybeSeconds = None
    """No round will need the device sooner: until then it need not check in again."""


@dataclass(frozen=True, slots=True)
class Missing:
    """The answer to a probe: which slices of a transfer have not come, the first of them."""

    hash: Hash32
    """As in the chunks."""
    count: SliceCount
    missing: Slices


@dataclass(frozen=True, slots=True)
class Heard:
    """The newest that the coordinator has heard of a device, and what it offers now.

    It answers a check-in that `asks`, and a device whose start is not proven to be the newest one.
    """

    boot: Word63
    """The greatest that the device ever told."""
    start: Word63
    turn: Word32
    """Of the check-in that it answers; 0 where it answers none."""
    call: Word63
    """Of the task's offer, as the next."""
    round: Word32


@dataclass(frozen=True, slots=True)
class Part:
    """One slice of the bundle, of the weights or of a patch. Retained."""

    what: PartKind
    digest: Hash32
    """As in the offer: of the bundle or of the weights. Of a patch: of the weights it makes."""
    version: Word32
    index: Word32
    count: SliceCount
    size: PartSize
    body: bytes = b""


Message: TypeAlias = (
    Status | Offer | CheckIn | Invite | Update | Chunk | Receipt | Part | Missing | Heard
)

KINDS: dict[int, type[Message]] = {
    1: Status,
    2: Offer,
    3: CheckIn,
    4: Invite,
    5: Update,
    6: Chunk,
    7: Receipt,
    8: Part,
    9: Missing,
    10: Heard,
}
_NUMBERS = {kind: number for number, kind in KINDS.items()}


class Signed(NamedTuple):
    """The bytes a message came in, and the topic: enough to say who sent it, and to name it."""

    frame: bytes
    topic: str
    scheme: Verify = signing.verify

    @property
    def id(self) -> bytes:
        """sha256 of the frame, cut to 16 bytes: what a receipt calls an update."""
        return hashlib.sha256(self.frame).digest()[:16]

    def by(self, key: bytes) -> bool:
        """Say whether the holder of `key` signed this frame for this topic."""
        return verify(self.frame, self.topic, key, self.scheme)


def encode(message: Message, signer: Signer, topic: str) -> bytes:
    """Return the signed frame of `message` for `topic`.

    A number that is not a plain int or float becomes one, and a `reason` becomes one short line.
    Raises: MessageError when a field is out of bounds, the frame too large (120,000 bytes; an
        Update may be 64 MiB, to be cut by `chunks.split`) or the topic not this message's.
    """
    number = _NUMBERS[type(message)]
    layout = _layout(number)
    body: bytes = getattr(message, "body", b"")
    tidy: dict[str, Any] = {
        name: bound.tidy(getattr(message, name)) for _, name, bound, _ in layout
    }
    if "body" in KINDS[number].__dataclass_fields__:
        tidy["body"] = body
    message = KINDS[number](**tidy)
    _check(message)
    _check_address(message, topics.parse(topic))
    header = cbor.encode(_told(message, layout))
    size = OVERHEAD + len(header) + len(body)
    _check_size(size, MAX_TRANSFER if isinstance(message, Update) else MAX_FRAME, "frame")
    start = PRELUDE.pack(_MAGIC, VERSION, number, 0, len(header), len(body), 0)[:-4]
    crc = zlib.crc32(body, zlib.crc32(header, zlib.crc32(start)))
    unsigned = b"".join((start, crc.to_bytes(4, "little"), header, body))
    return unsigned + signer.sign(_to_sign(topic, unsigned))


def _told(message: Message, layout: tuple[_Field, ...]) -> dict[int, Any]:
    """Return the header of a message, short of last fields that hold what an absent one means."""
    told = {key: getattr(message, name) for key, name, _, _ in layout}
    for key, _, _, default in reversed(layout):
        if told[key] != default:
            break
        del told[key]
    return told


def decode(
    frame: bytes, topic: str, limit: int = MAX_FRAME, *, scheme: Verify = signing.verify
) -> tuple[Message, Signed]:
    """Read a frame that came on `topic`: all bounds checked, the signature not yet.

    `limit` is raised only for a frame that was put together from chunks. `scheme` is what
    `Signed.by` will check the signature with.
    Raises: MessageError, one line.
    """
    _check_size(len(frame), limit, "frame")
    message = _build(*_cut(frame))
    _check_address(message, topics.parse(topic))
    return message, Signed(frame, topic, scheme)


def verify(frame: bytes, topic: str, key: bytes, scheme: Verify = signing.verify) -> bool:
    """Say whether the holder of `key` signed `frame` for `topic`."""
    cut = len(frame) - signing.SIGNATURE_BYTES
    return cut > 0 and scheme(key, _to_sign(topic, frame[:cut]), frame[cut:])


def slice_of(index: int, count: int, size: int) -> slice:
    """Return which bytes of `size` slice `index` of `count` holds: even slices, in order."""
    return slice(index * size // count, (index + 1) * size // count)


def _to_sign(topic: str, unsigned: bytes) -> bytes:
    return b"".join((b"fedge/1\0", topic.encode(), b"\0", unsigned))


def _check_size(size: int, limit: int, what: str) -> None:
    if size > limit:
        raise MessageError(f"expected a {what} of at most {limit} bytes, got {size}")


def _cut(frame: bytes) -> tuple[int, bytes, bytes]:
    if len(frame) < OVERHEAD or not frame.startswith(_MAGIC):
        raise MessageError(f"expected a frame of fedge, got {len(frame)} bytes of something else")
    _, version, number, flags, header_size, body_size, crc = PRELUDE.unpack_from(frame)
    if version != VERSION:
        older = "the sender" if version < VERSION else "this side"
        raise MessageError(f"expected protocol {VERSION}, got {version}: upgrade {older}")
    if flags & _MUST_KNOW:
        raise MessageError(f"flags {flags:#x} are not known here: upgrade this side")
    if number not in KINDS:
        raise MessageError(f"message kind {number} is not known here: upgrade this side")
    _check_size(header_size, _MAX_HEADER, "header")
    if OVERHEAD + header_size + body_size != len(frame):
        raise MessageError(
            f"expected {OVERHEAD + header_size + body_size} bytes by the lengths, got {len(frame)}"
        )
    at = PRELUDE.size + header_size
    header, body = frame[PRELUDE.size : at], frame[at : at + body_size]
    if zlib.crc32(body, zlib.crc32(header, zlib.crc32(frame[: PRELUDE.size - 4]))) != crc:
        raise MessageError("the frame's checksum does not hold: it was damaged on the way")
    return number, header, body


class _Field(NamedTuple):
    key: int
    name: str
    bound: Bound
    default: Any


@functools.cache
def _layout(number: int) -> tuple[_Field, ...]:
    kind = KINDS[number]
    hints = get_type_hints(kind, include_extras=True)
    named = [field for field in fields(kind) if field.name != "body"]
    return tuple(
        _Field(key, field.name, hints[field.name].__metadata__[0], field.default)
        for key, field in enumerate(named, 1)
    )


def _build(number: int, header: bytes, body: bytes) -> Message:
    kind, given = KINDS[number], cbor.decode(header)
    if not isinstance(given, dict):
        raise MessageError(f"{kind.__name__}: expected a map as header")
    values: dict[str, Any] = {}
    for key, name, _, default in _layout(number):
        if key in given:
            values[name] = given[key]
        elif default is MISSING:
            raise MessageError(f"{kind.__name__}: {name} is missing")
    if "body" in kind.__dataclass_fields__:
        values["body"] = body
    elif body:
        raise MessageError(f"{kind.__name__}: expected no body, got {len(body)} bytes")
    message = kind(**values)
    _check(message)
    return message


def _check(message: Message) -> None:
    kind = type(message)
    for _, name, bound, _ in _layout(_NUMBERS[kind]):
        value = getattr(message, name)
        if not bound.holds(value):
            raise MessageError(f"{kind.__name__}.{name}: expected {bound.says}, got {value!r:.60}")
    if isinstance(message, Chunk | Part):
        _check_slice(message)
    if isinstance(message, Status) and message.device != signing.device_id(message.key):
        raise MessageError(f"Status: {message.device} is not the id of the key that it shows")


def _check_slice(message: Chunk | Part) -> None:
    index, count, size = message.index, message.count, message.size
    if index >= count or count > size:
        raise MessageError(f"expected a slice below {count} of {size} bytes, got slice {index}")
    if isinstance(message, Chunk):
        _check_size(size, MAX_TRANSFER, "transfer")
    cut = slice_of(index, count, size)
    if len(message.body) != cut.stop - cut.start:
        raise MessageError(
            f"slice {index} of {count}: expected {cut.stop - cut.start} bytes,"
            f" got {len(message.body)}"
        )


def _check_address(message: Message, address: topics.Address) -> None:
    fits = address.kind == type(message).__name__.lower()
    if isinstance(message, Status):
        fits = fits and address.device == message.device
    elif isinstance(message, Offer):
        fits = fits and address.task == message.task
    elif isinstance(message, Part):
        fits = fits and (address.what, address.index) == (message.what, message.index)
        if message.what == "patch":
            fits = fits and address.slot == topics.slot(message.version)
    if not fits:
        raise MessageError(f"{type(message).__name__}: it does not belong on its topic {address}")
