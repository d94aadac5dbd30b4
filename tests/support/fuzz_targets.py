# SPDX-License-Identifier: Apache-2.0
"""What the fuzzer feeds: every decoder of bytes that others may have made, and what must hold.

A target takes any bytes. It either decodes them, and then what it promises of the result holds, or
raises an error of ours, in one line. Formats with checksums are fed twice: as they come, and with
the checksums put right, so that what lies behind them is reached.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edge_sdk import archive, cbor, chunks, codec, manifest, messages, onnxfile, params, tflitefile
from edge_sdk.bundle import Bundle
from edge_sdk.errors import BundleError, CodecError, CompileError, FedgeError, MessageError
from edge_sdk.limits import Limits
from edge_sdk.messages import Chunk, Part
from edge_sdk.outbox import Entry
from edge_sdk.types import Shapes

GOLDEN = Path(__file__).parents[1] / "edge_sdk" / "golden"
TFLITE = Path(__file__).parents[1] / "compiler" / "tflite" / "models"
SHAPES: Shapes = {"w": (40, 33), "v": (3, 8, 8), "b": (40,)}
COUNT = params.count(SHAPES)
HELD = 4096
"""What the assembler under test may hold for one source, bytes."""


class Target(NamedTuple):
    """One decoder: its name, what feeds it, its seeds, and the errors that it promises."""

    name: str
    feed: Callable[[bytes], None]
    seeds: Callable[[], Iterable[bytes]]
    allowed: tuple[type[FedgeError], ...]


def run(target: Target, data: bytes) -> None:
    """Feed `data`; errors that the decoder promises are fine, in one line of a sane length."""
    try:
        target.feed(data)
    except target.allowed as error:
        said = str(error)
        assert said, "an error says what is wrong"
        assert "\n" not in said, "an error is one line"
        assert len(said) < 2000, "an error is short"


def warm(name: str) -> None:
    """Import what a target imports late, so that instruments see it."""
    if name == "importer":
        import coordinator.compiler.tflite.importer  # noqa: F401
    elif name == "stream":
        import edge_sdk.fetching
    elif name == "outbox":
        import edge_sdk.outbox  # noqa: F401


# --- the wire -------------------------------------------------------------------------------------
@cache
def golden() -> tuple[dict[str, Any], ...]:
    return tuple(json.loads((GOLDEN / "messages.json").read_text()))


def frame(data: bytes) -> None:
    """Byte 0 chooses the topic; the rest is a frame as it comes from the broker."""
    vectors = golden()
    topic = vectors[data[0] % len(vectors)]["topic"] if data else vectors[0]["topic"]
    message, signed = messages.decode(data[1:], topic)
    assert signed.frame == data[1:]
    assert not signed.by(bytes(32)), "no frame is signed by a key of zeros"
    assert len(repr(message)) < 10 * len(data) + 1000


def repaired(data: bytes) -> None:
    """Byte 0 chooses topic and kind; the rest is a header and a body in a frame that adds up."""
    vectors = golden()
    vector = vectors[data[0] % len(vectors)] if data else vectors[0]
    kind = struct.unpack_from("<H", bytes.fromhex(vector["frame"]), 6)[0]
    length = struct.unpack_from("<H", data[1:3].ljust(2, b"\0"))[0]
    header, body = data[3 : 3 + length], data[3 + length :]
    start = messages.PRELUDE.pack(b"FDGE", messages.VERSION, kind, 0, len(header), len(body), 0)
    crc = zlib.crc32(body, zlib.crc32(header, zlib.crc32(start[:-4])))
    whole = b"".join((start[:-4], crc.to_bytes(4, "little"), header, body, bytes(64)))
    topic = vector["topic"]
    message, _ = messages.decode(whole, topic)
    tidy = messages.decode(messages.encode(message, _Zeros(), topic), topic)[0]
    assert messages.decode(messages.encode(tidy, _Zeros(), topic), topic)[0] == tidy


class _Zeros:
    """Signs with zeros: signatures are not what is fuzzed."""

    public = bytes(32)

    def sign(self, _: bytes) -> bytes:
        return bytes(64)


def frames() -> Iterable[bytes]:
    for i, vector in enumerate(golden()):
        yield bytes([i]) + bytes.fromhex(vector["frame"])


def sections() -> Iterable[bytes]:
    for i, vector in enumerate(golden()):
        whole = bytes.fromhex(vector["frame"])
        size = struct.unpack_from("<I", whole, 12)[0]
        yield bytes([i]) + struct.pack("<H", size) + whole[messages.PRELUDE.size : -64]


def header(data: bytes) -> None:
    """CBOR: what decodes is the one way to write it."""
    assert cbor.encode(cbor.decode(data)) == data


def headers() -> Iterable[bytes]:
    for vector in golden():
        whole = bytes.fromhex(vector["frame"])
        size = struct.unpack_from("<I", whole, 12)[0]
        yield whole[messages.PRELUDE.size : messages.PRELUDE.size + size]
    yield cbor.encode([1, -1, 1.5, None, True, "x", b"y", {1: [2, {3: 4}]}])


def update(data: bytes) -> None:
    """An update's body: integers within the shapes, whoever wrote it."""
    lattice = codec.lattice(data, SHAPES)
    assert np.isfinite(lattice.step)
    assert lattice.q.dtype == np.int32
    if lattice.positions is None:
        assert lattice.q.size == COUNT
    else:
        assert lattice.positions.size == lattice.q.size <= COUNT
        assert (np.diff(lattice.positions) > 0).all()
        assert not lattice.positions.size or lattice.positions[0] >= 0
        assert not lattice.positions.size or lattice.positions[-1] < COUNT
    assert not np.isnan(codec.norm(lattice))


def updates() -> Iterable[bytes]:
    rng = np.random.default_rng(1)
    for scale in (1.0, 1e-3):
        delta = {k: (scale * rng.standard_normal(s)).astype(np.float32) for k, s in SHAPES.items()}
        for name in ("default", "lean", "stateless", "stateless-lean", "exact-ish", "dense"):
            chain = codec.preset(name)
            yield chain.encode(delta, chain.init(SHAPES))[0]
    sparse = {k: np.zeros(s, np.float32) for k, s in SHAPES.items()}
    sparse["w"][3, :5] = 1.0
    for name in ("default", "stateless"):
        chain = codec.preset(name)
        yield chain.encode(sparse, chain.init(SHAPES))[0]


def chunk(data: bytes) -> None:
    """Chunks in any order, of any sizes: memory stays within the limits, wholes hash right."""
    assembler = chunks.Assembler(max_bytes=HELD, max_open=2, max_total=2 * HELD)
    for source, one in _chunks(data):
        try:
            whole = assembler.add(source, one)
        except MessageError:
            whole = None
        assert whole is None or hashlib.sha256(whole).digest() == one.hash
        assert assembler.bytes <= 2 * HELD
        assert len(assembler) <= 2 * 3


def part(data: bytes) -> None:
    """Parts of a model that was offered; nothing but the whole comes out."""
    wanted = _wanted()
    parts = chunks.Parts("weights", hashlib.sha256(wanted).digest(), len(wanted))
    for _, one in _chunks(data):
        piece = Part("weights", parts.digest, 1, one.index, one.count, one.size, body=one.body)
        try:
            whole = parts.add(piece)
        except MessageError:
            whole = None
        assert whole is None or whole == wanted


def _wanted() -> bytes:
    return bytes(range(200))


def _chunks(data: bytes) -> Iterable[tuple[str, Chunk]]:
    """Read instructions of 6 bytes: who, which transfer, index, count, size of the whole."""
    sent = [_wanted()[:n] for n in (0, 1, 60, 200)]
    for at in range(0, len(data) - 5, 6):
        who, which, index, count, low, high = data[at : at + 6]
        frame_ = sent[which % 4]
        size = len(frame_) if low == high == 0 else low + 256 * high
        count = max(1, count)
        piece = messages.slice_of(index % count, count, size)
        body = frame_[piece].ljust(piece.stop - piece.start, b"\0")
        digest = hashlib.sha256(frame_).digest()
        yield f"d{who % 3}", Chunk(digest, index % count, count, size, body=body)


def orders() -> Iterable[bytes]:
    yield b"".join(bytes([0, 3, i, 4, 0, 0]) for i in range(4))
    yield b"".join(bytes([i % 3, i % 4, 3 - i % 4, 4, 0, 0]) for i in range(24))
    yield b"".join(bytes([1, 2, i, 3, 60, i]) for i in range(9))


def stream(data: bytes) -> None:
    """A bundle's zlib stream: bytes 0-2 say what was offered, and nothing else comes of it."""
    from edge_sdk.fetching import unpacked

    size = int.from_bytes(data[:3], "little")
    assert len(unpacked(data[3:], size)) == size


def streams() -> Iterable[bytes]:
    for size in (0, 1, 1000, 70_000):
        yield size.to_bytes(3, "little") + zlib.compress(bytes(i % 251 for i in range(size)))


# --- bundles and models ---------------------------------------------------------------------------
def bundle(data: bytes) -> None:
    """An archive as it comes: read, checked as a device checks it, its parameters within it."""
    _use(Bundle.from_bytes(data))


def resealed(data: bytes) -> None:
    """Byte 0 chooses a bundle; the rest is another manifest for it, its digests put right."""
    whole = _whole()[data[0] % len(_whole())] if data else _whole()[0]
    try:
        table = json.loads(data[1:])
    except (ValueError, RecursionError):
        return
    if not isinstance(table, dict):
        return
    table.pop("members", None)
    spliced = table.pop("spliced", None)
    members = {name: bytes(view) for name, view in archive.read(whole).items()}
    del members["manifest.json"]
    entries_ = {
        name: {"sha256": hashlib.sha256(member).hexdigest(), "size": len(member)}
        for name, member in members.items()
    }
    raw = manifest.encode({**table, "members": entries_, "spliced": spliced})
    _use(Bundle.from_bytes(archive.write({**members, "manifest.json": raw})))


def _use(found: Bundle) -> None:
    found.check(Limits())
    assert params.count(found.shapes) * 4 == len(found.member("params.bin"))
    found.params()
    repr(found.explain())


def bundles() -> Iterable[bytes]:
    import hand_bundles  # needs onnx, which only makes the seeds
    import tflite_bundles

    yield hand_bundles.mlp().data
    yield hand_bundles.mlp(momentum=True, proximal=True).data
    yield hand_bundles.mlp(quantized=True).data
    yield tflite_bundles.lowered(hand_bundles.mlp()).data


@cache
def _whole() -> tuple[bytes, ...]:
    return tuple(bundles())


def manifests() -> Iterable[bytes]:
    for i, data in enumerate(_whole()):
        yield bytes([i]) + bytes(archive.read(data)["manifest.json"])


def onnx(data: bytes) -> None:
    """An ONNX graph by the device's own reader, and its law."""
    view = onnxfile.read(memoryview(data))
    assert len(view.nodes) <= onnxfile.MAX_NODES


def onnx_graphs() -> Iterable[bytes]:
    for data in bundles():
        found = Bundle.from_bytes(data)
        for role in ("predict", "train", "evaluate"):
            if "onnx" in found.manifest["graphs"]:
                yield found.graph("onnx", role)


def tflite(data: bytes) -> None:
    """A `.tflite` file by the device's own reader, every buffer within it."""
    found = tflitefile.read(data)
    for buffer in found.buffers:
        assert 0 <= buffer.offset <= buffer.offset + buffer.size <= len(data)


def importer(data: bytes) -> None:
    """A `.tflite` file by the compiler's importer, at a workstation."""
    from coordinator.compiler.tflite.importer import import_model

    import_model(data)


def tflite_files() -> Iterable[bytes]:
    yield from (path.read_bytes() for path in _tflite(most_bytes=20_000))


def importable() -> Iterable[bytes]:
    """Files whose operators are all imported, and few: each costs the importer a few ms."""
    for path in _tflite(most_bytes=12_000):
        if path.stem.startswith(("activations", "arrangements", "cnn", "decoder", "tied")):
            yield path.read_bytes()


def _tflite(most_bytes: int) -> list[Path]:
    return [p for p in sorted(TFLITE.glob("*.tflite")) if p.stat().st_size <= most_bytes]


# --- what lies on a device's disk -----------------------------------------------------------------
def entry(data: bytes) -> None:
    """A file of the outbox, its checksum put right: whole or not at all."""
    from edge_sdk import outbox

    try:
        found = outbox._decode(_with_crc(data))
    except ValueError:
        return
    assert outbox._decode(b"".join(outbox._encode(found))) == found


def _with_crc(data: bytes) -> bytes:
    """Put the CRC of an outbox file right; its last field of the head is the checksum."""
    from edge_sdk.outbox import _HEAD

    if len(data) < _HEAD.size:
        return data
    bare = data[: _HEAD.size - 4] + bytes(4) + data[_HEAD.size :]
    return data[: _HEAD.size - 4] + zlib.crc32(bare).to_bytes(4, "little") + data[_HEAD.size :]


def entries() -> Iterable[bytes]:
    from edge_sdk import outbox

    yield b"".join(outbox._encode(Entry(bytes(16), 3, b"frame", b"accepted", b"refused")))
    yield b"".join(outbox._encode(Entry(bytes(range(16)), 2**31, b"", b"", b"")))


TARGETS = (
    Target("frame", frame, frames, (MessageError,)),
    Target("repaired", repaired, sections, (MessageError,)),
    Target("header", header, headers, (MessageError,)),
    Target("update", update, updates, (CodecError,)),
    Target("chunk", chunk, orders, (MessageError,)),
    Target("part", part, orders, (MessageError,)),
    Target("stream", stream, streams, (MessageError,)),
    Target("bundle", bundle, bundles, (BundleError,)),
    Target("manifest", resealed, manifests, (BundleError,)),
    Target("onnx", onnx, onnx_graphs, (BundleError,)),
    Target("tflite", tflite, tflite_files, (BundleError,)),
    Target("importer", importer, importable, (BundleError, CompileError)),
    Target("outbox", entry, entries, ()),
)
