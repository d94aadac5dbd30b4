# SPDX-License-Identifier: Apache-2.0
"""Named byte strings in one deterministic ZIP: stored, dated 1980, sorted. Pure.

The same members give the same bytes on every machine, and only those bytes are read back: every
header is compared with the one we would have written, so there is no room for compression bombs,
odd paths, duplicate names, comments or bytes that nobody looks at. (ZIP: PKWARE APPNOTE 6.3.)
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Mapping

from edge_sdk.errors import BundleError

MAX_BYTES = 256 << 20
MAX_MEMBERS = 32
MAX_NAME_BYTES = 100
_LOCAL = struct.Struct("<4s5H3I2H")
_ENTRY = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_DATE = 0x21  # 1980-01-01, the oldest that ZIP can say
_VERSION = 20
_UNIX = 3 << 8 | _VERSION
_REGULAR_FILE = 0o100644 << 16
_NAME = re.compile(r"[a-z0-9_][a-z0-9_.-]*(/[a-z0-9_][a-z0-9_.-]*)*\Z")
_DAMAGED = "fetch it again"


def write(members: Mapping[str, bytes]) -> bytes:
    """Lay the members out as a ZIP archive.

    Raises: BundleError when a name or a size is beyond what `read` would take.
    """
    size = sum(map(len, members.values()))
    if len(members) > MAX_MEMBERS or size > MAX_BYTES // 2:
        raise BundleError(
            f"expected at most {MAX_MEMBERS} members of {MAX_BYTES >> 21} MiB in all, got "
            f"{len(members)} of {size >> 20} MiB: bundle a smaller model"
        )
    body: list[bytes] = []
    spans: dict[str, tuple[int, int, int]] = {}
    at = 0
    for name in sorted(members):
        _check_name(name)
        data = members[name]
        crc = zlib.crc32(data)
        head = _local(name, crc, len(data))
        spans[name] = (at, crc, len(data))
        body += [head, data]
        at += len(head) + len(data)
    return b"".join([*body, _directory(spans, at)])


def read(data: bytes) -> dict[str, memoryview]:
    """Return the members of an archive that `write` made, as views on `data`.

    Raises: BundleError when one byte is not as `write` would have put it.
    """
    if len(data) > MAX_BYTES:
        raise BundleError(f"expected at most {MAX_BYTES} bytes, got {len(data)}; not our bundle")
    view = memoryview(data)
    found: dict[str, memoryview] = {}
    spans: dict[str, tuple[int, int, int]] = {}
    at = 0
    while data[at : at + 4] == b"PK\x03\x04":
        name, crc, start, end = _member(view, at)
        if len(found) >= MAX_MEMBERS:
            raise BundleError(f"expected at most {MAX_MEMBERS} members, got more; {_DAMAGED}")
        if zlib.crc32(view[start:end]) != crc:
            raise BundleError(f"member {name} is damaged: its checksum differs; {_DAMAGED}")
        found[name] = view[start:end]
        spans[name] = (at, crc, end - start)
        at = end
    if not found or list(found) != sorted(found) or data[at:] != _directory(spans, at):
        raise BundleError(f"not a bundle, or a damaged one: no archive of ours ends so; {_DAMAGED}")
    return found


def _member(view: memoryview, at: int) -> tuple[str, int, int, int]:
    if len(view) < at + _LOCAL.size:
        raise BundleError(f"the bundle is truncated at byte {at}; {_DAMAGED}")
    fields = _LOCAL.unpack_from(view, at)
    crc, size, name_bytes = fields[6], fields[8], fields[9]
    start = at + _LOCAL.size + name_bytes
    if name_bytes > MAX_NAME_BYTES or start + size > len(view):
        raise BundleError(f"the bundle is truncated at byte {at}; {_DAMAGED}")
    name = bytes(view[at + _LOCAL.size : start]).decode("ascii", "replace")
    _check_name(name)
    if view[at:start] != _local(name, crc, size):
        raise BundleError(f"member {name} is not plainly stored; {_DAMAGED}")
    return name, crc, start, start + size


def _check_name(name: str) -> None:
    if len(name) > MAX_NAME_BYTES or not _NAME.match(name):
        raise BundleError(f"expected a member name of a-z 0-9 _ . - and /, got {name[:40]!r}")


def _local(name: str, crc: int, size: int) -> bytes:
    raw = name.encode("ascii")
    return _LOCAL.pack(b"PK\x03\x04", _VERSION, 0, 0, 0, _DATE, crc, size, size, len(raw), 0) + raw


def _directory(spans: Mapping[str, tuple[int, int, int]], start: int) -> bytes:
    entries = b"".join(_entry(name, *span) for name, span in spans.items())
    n = len(spans)
    return entries + _END.pack(b"PK\x05\x06", 0, 0, n, n, len(entries), start, 0)


def _entry(name: str, at: int, crc: int, size: int) -> bytes:
    raw = name.encode("ascii")
    head = (b"PK\x01\x02", _UNIX, _VERSION, 0, 0, 0, _DATE, crc, size, size)
    return _ENTRY.pack(*head, len(raw), 0, 0, 0, 0, _REGULAR_FILE, at) + raw
