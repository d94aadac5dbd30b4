# SPDX-License-Identifier: Apache-2.0
"""Inputs that ask for far more than they are: lengths that lie, zeros that inflate, depth.

Each is fed to the decoder that meets it first. `python tests/support/bombs.py` prints what each
takes, as JSON: bytes above the input by tracemalloc, and milliseconds (the least of five).
"""

from __future__ import annotations

import json
import struct
import sys
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import fuzz_targets
import numpy as np

from edge_sdk import archive, chunks, codec, messages
from edge_sdk.codec import body, positions
from edge_sdk.codec.bits import pack_flags
from edge_sdk.errors import FedgeError
from edge_sdk.messages import Chunk

MOST_BYTES = 2**20
ZEROS = 256 * 2**20


class Bomb(NamedTuple):
    """What it is, the bytes, and who meets them."""

    name: str
    data: bytes
    meet: Callable[[bytes], object]


def cost(bomb: Bomb) -> tuple[int, float]:
    """Return what meeting it takes above the input: peak bytes, and milliseconds, least of five."""
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    _meet(bomb)
    peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    return peak, min(_timed(bomb) for _ in range(5))


def _timed(bomb: Bomb) -> float:
    began = time.perf_counter()
    _meet(bomb)
    return 1000 * (time.perf_counter() - began)


def _meet(bomb: Bomb) -> None:
    try:
        bomb.meet(bomb.data)
    except FedgeError:
        return


def all_bombs() -> Iterator[Bomb]:
    """Yield them, one after the other: some are large."""
    yield from _frames()
    yield from _headers()
    yield from _bodies()
    yield from _archives()
    yield from _files()


def _frames() -> Iterator[Bomb]:
    vector = fuzz_targets.golden()[0]
    whole, topic = bytes.fromhex(vector["frame"]), vector["topic"]

    def meet(data: bytes) -> object:
        return messages.decode(data, topic)

    four_gib = struct.pack("<II", 2**32 - 1, 2**32 - 1)
    yield Bomb("frame: lengths of 4 GiB", whole[:12] + four_gib + whole[20:], meet)
    yield Bomb("frame: 120,001 bytes", whole[:24].ljust(120_001, b"\0"), meet)
    yield Bomb("frame: a topic of 64 KiB", whole, lambda d: messages.decode(d, "x/" * 32_000))
    yield Bomb("chunks: 65,535 of one byte", b"", lambda _: _flood(65_535))
    yield Bomb("chunks: a size of 4 GiB", b"", lambda _: _one(2**32 - 1))


def _flood(count: int) -> None:
    assembler = chunks.Assembler(max_bytes=2**16, max_open=2, max_total=2**17)
    for i in range(2_000):
        assembler.add("d0", Chunk(i.to_bytes(32, "little"), 0, count, count, body=b"x"))
    assert assembler.bytes <= 2**17


def _one(size: int) -> None:
    chunks.Assembler().add("d0", Chunk(bytes(32), 0, 60_000, size, body=b""))


def _headers() -> Iterator[Bomb]:
    def meet(header: bytes) -> object:
        return fuzz_targets.repaired(b"\0" + struct.pack("<H", len(header)) + header)

    yield Bomb("header: 2,000 lists within each other", b"\x81" * 2000, meet)
    yield Bomb("header: 50,000 lists within each other", b"\x81" * 50_000, meet)
    yield Bomb("header: a list of 2**63 items", b"\x9b\x7f" + b"\xff" * 7, meet)
    yield Bomb("header: a map of 2**32 keys", b"\xba\xff\xff\xff\xff", meet)
    yield Bomb("header: a text of 4 GiB", b"\x7a\xff\xff\xff\xff", meet)
    yield Bomb("header: 2,000 empty lists", b"\x99\x07\xd0" + b"\x80" * 2000, meet)


def _bodies() -> Iterator[Bomb]:
    meet, count = fuzz_targets.update, fuzz_targets.COUNT
    deflater = zlib.compressobj(9, zlib.DEFLATED, -15)
    zeros = deflater.compress(bytes(ZEROS)) + deflater.flush()
    ones = np.ones(1, np.int32)

    def lattice(k: int, coding: int, where: bytes, levels: bytes) -> bytes:
        head = body.HEAD.pack(1, body.LATTICE, count)
        head += body.LATTICE_HEAD.pack(0x3E80, k, coding, len(where), len(levels))
        return head + where + levels + pack_flags(ones < 0)

    yield Bomb("update: a bitmap of 256 MiB of zeros", lattice(1, 3, zeros, b""), meet)
    coded = struct.pack("<BI", 1, 0) + zeros
    yield Bomb("update: levels of 256 MiB of zeros", lattice(1, 0, b"", coded), meet)
    yield Bomb("update: a table of 256 MiB of zeros", lattice(1, 4, bytes(12) + zeros, b""), meet)
    yield Bomb("update: 2**32 positions", lattice(2**32 - 1, positions.ROWS, b"", b""), meet)
    yield Bomb("update: a model of 2**32 numbers", body.HEAD.pack(1, 1, 2**32 - 1), meet)
    yield Bomb("update: floats of another model", body.HEAD.pack(1, 3, 2**28) + bytes(64), meet)
    small = codec.preset("default")
    shapes = {"w": (4,)}
    blob = small.encode({"w": np.ones(4, np.float32)}, small.init(shapes))[0]
    yield Bomb("update: of another model", blob, meet)


def _archives() -> Iterator[Bomb]:
    zeros = zlib.compress(bytes(ZEROS))
    offered = (100_000).to_bytes(3, "little")
    yield Bomb("stream: 256 MiB of zeros for 100 kB", offered + zeros, fuzz_targets.stream)
    meet = fuzz_targets.bundle
    whole = bytearray(next(iter(fuzz_targets.bundles())))
    at = whole.index(b"PK\x03\x04")
    whole[at + 18 : at + 26] = b"\xff" * 8
    yield Bomb("bundle: a member of 4 GiB", bytes(whole), meet)
    deep = {"manifest.json": b'{"a":' + b"[" * 150_000 + b"]" * 150_000 + b"}"}
    yield Bomb("bundle: a manifest 150,000 deep", archive.write(deep), meet)
    deep = {"manifest.json": b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}"}
    yield Bomb("bundle: a manifest 50,000 deep", archive.write(deep), meet)
    wide = {"manifest.json": b'{"a":[' + b"[]," * 120_000 + b"[]]}"}
    yield Bomb("bundle: 120,000 empty lists", archive.write(wide), meet)
    many = {f"m{i}": b"" for i in range(32)}
    yield Bomb("bundle: 32 empty members", archive.write(many), meet)


def _files() -> Iterator[Bomb]:
    lie = b"\x3a\xff\xff\xff\xff\x0f"
    yield Bomb("onnx: a graph of 4 GiB", lie, fuzz_targets.onnx)
    yield Bomb("onnx: graphs within each other", _nested(3000), fuzz_targets.onnx)
    for name, word in (("root", 0), ("vector", 40)):
        data = bytearray(next(iter(fuzz_targets.tflite_files())))
        data[word : word + 4] = b"\xff\xff\xff\x7f"
        yield Bomb(f"tflite: a {name} far away", bytes(data), fuzz_targets.tflite)
    data = bytearray(next(iter(fuzz_targets.tflite_files())))
    for at in range(8, len(data) - 4, 4):  # every offset and length a large one, one by one
        data[at : at + 4] = b"\xff\xff\xff\x0f" if at % 64 == 0 else data[at : at + 4]
    yield Bomb("tflite: large lengths all over", bytes(data), fuzz_targets.tflite)


def _nested(depth: int) -> bytes:
    data = b""
    for _ in range(depth):
        data = b"\x3a" + _varint(len(data)) + data
    return data


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def main() -> None:
    """Print what each bomb takes."""
    rows = []
    for bomb in all_bombs():
        _meet(bomb)  # what is loaded and made once
        peak, ms = cost(bomb)
        rows.append({"bomb": bomb.name, "bytes": len(bomb.data), "peak": peak, "ms": round(ms, 3)})
    worst = {"peak": max(r["peak"] for r in rows), "ms": max(r["ms"] for r in rows)}
    json.dump({"bombs": rows, "worst": worst}, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
