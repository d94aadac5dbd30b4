# SPDX-License-Identifier: Apache-2.0
"""A task's `.fedge` file: graphs, initial parameters and the manifest that binds them by digest.

Reading needs numpy alone. Nothing in a bundle is executed or unpickled here, every size is checked
before memory is taken for it, and the same inputs give the same bytes on every machine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_sdk import archive, explain, files, splices
from edge_sdk import manifest as schema
from edge_sdk import params as tensors
from edge_sdk.errors import BundleError
from edge_sdk.types import Params, Shapes

if TYPE_CHECKING:
    from typing import Self

    from edge_sdk.limits import Limits
    from edge_sdk.signing import Signer

MANIFEST, PARAMS, SIGNATURE = "manifest.json", "params.bin", "signature"
_SIGNED = b"fedge-bundle\0"
_SIGNATURE_BYTES = 64 + 32


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Bundle:
    """A checked bundle. Make one with `load`, `from_bytes` or `pack`, never by hand."""

    data: bytes
    manifest: dict[str, Any]
    digest: str
    _members: dict[str, memoryview]

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read and check a `.fedge` file.

        Raises: BundleError when it is damaged, too big or not ours; OSError when it is not there.
        """
        with Path(path).open("rb") as file:
            data = file.read(archive.MAX_BYTES + 1)
        try:
            return cls.from_bytes(data)
        except BundleError as error:
            raise BundleError(f"{path}: {error}") from error

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Check the bytes of a bundle: archive, digests, manifest.

        Raises: BundleError naming what is wrong, in one line.
        """
        members = archive.read(bytes(data))
        if MANIFEST not in members:
            raise BundleError("expected a manifest.json in the bundle, got none; rebuild it")
        raw = bytes(members[MANIFEST])
        manifest = schema.decode(raw)
        contents = {k: v for k, v in members.items() if k not in {MANIFEST, SIGNATURE}}
        schema.check(manifest, {name: len(view) for name, view in contents.items()})
        _check_digests(manifest, contents)
        if len(members.get(SIGNATURE, b"*" * _SIGNATURE_BYTES)) != _SIGNATURE_BYTES:
            raise BundleError(f"signature: expected {_SIGNATURE_BYTES} bytes; sign it again")
        return cls(bytes(data), manifest, hashlib.sha256(raw).hexdigest(), members)

    @property
    def shapes(self) -> Shapes:
        """Shape of each trainable tensor, in the manifest's order."""
        return {p["name"]: tuple(p["shape"]) for p in self.manifest["params"]}

    def params(self) -> Params:
        """Return the initial values of the trainable tensors, float32, as fresh arrays."""
        flat = np.frombuffer(self._members[PARAMS], "<f4").astype(np.float32)
        return tensors.unflatten(flat, self.shapes)

    def member(self, name: str) -> bytes:
        """Return one member's bytes, whole.

        Raises: BundleError when the bundle has no such member.
        """
        if name not in self._members:
            raise BundleError(f"expected one of {sorted(self._members)}, got {name!r}")
        return splices.join(name, self._members, self.manifest["spliced"].get(name, ()))

    def check(self, limits: Limits | None = None) -> None:
        """Check the graphs as a device does before it runs them.

        Raises: RefusedError, one line that names graph, node and reason.
        """
        from edge_sdk import graphcheck  # the training child never needs it
        from edge_sdk.limits import Limits

        graphcheck.check(self.manifest, self._view, len(self.data), limits or Limits())

    def _view(self, name: str) -> memoryview:
        """Return a whole member, without a copy where it shares nothing."""
        if name in self.manifest["spliced"]:
            return memoryview(self.member(name))
        return self._members[name]

    def graph(self, format: str, role: str) -> bytes:  # noqa: A002 - the field's word
        """Return the `predict`, `train` or `evaluate` graph in a format, "onnx" or "tflite".

        Raises: BundleError when the bundle has no such graph in that format.
        """
        roles = self.manifest["graphs"].get(format, {})
        if role not in roles:
            has = {name: sorted(graphs) for name, graphs in self.manifest["graphs"].items()}
            raise BundleError(f"expected a {role} graph in {format!r}, this bundle has {has}")
        return self.member(roles[role])

    def save(self, path: str | Path) -> None:
        """Write the bundle to a file, atomically and durably.

        Raises: StoreError when the disk refuses.
        """
        files.write(Path(path), self.data, mode=0o644)

    def sign(self, signer: Signer) -> Bundle:
        """Return this bundle signed by `signer`, in place of any signature it had."""
        members = {name: bytes(view) for name, view in self._members.items()}
        members[SIGNATURE] = signer.sign(_SIGNED + members[MANIFEST]) + signer.public
        return Bundle.from_bytes(archive.write(members))

    @property
    def signed_by(self) -> bytes | None:
        """The Ed25519 public key whose signature was verified; None for an unsigned bundle.

        Raises: BundleError when there is a signature and it does not fit.
        """
        if SIGNATURE not in self._members:
            return None
        from edge_sdk import signing  # the training child never needs cryptography

        both = self.member(SIGNATURE)
        signature, public = both[:64], both[64:]
        if not signing.verify(public, _SIGNED + self.member(MANIFEST), signature):
            raise BundleError(
                f"the signature does not fit the key {public.hex()[:16]}; fetch the bundle again"
            )
        return public

    def explain(self) -> explain.Explanation:
        """Return what the bundle holds and costs: prints as a table, renders as HTML."""
        return explain.of(self.manifest, self.digest, len(self.data))

    def __repr__(self) -> str:
        return f"<Bundle {self.manifest['name']} {self.digest[:12]} {len(self.data)} bytes>"


def pack(
    manifest: Mapping[str, Any],
    members: Mapping[str, bytes],
    spans: Mapping[str, Iterable[splices.Span]] | None = None,
) -> Bundle:
    """Make a bundle of a manifest, but for its tables of members, and the members' bytes.

    `spans` are bytes of members that others may have, too: they are stored once.
    Raises: BundleError when the manifest is at odds with the schema or with the members.
    """
    stored, spliced = splices.split(members, spans or {})
    table = {
        name: {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
        for name, data in stored.items()
    }
    raw = schema.encode({**manifest, "members": table, "spliced": spliced})
    return Bundle.from_bytes(archive.write({**stored, MANIFEST: raw}))


def _check_digests(manifest: Mapping[str, Any], members: Mapping[str, memoryview]) -> None:
    for name, view in members.items():
        if hashlib.sha256(view).hexdigest() != manifest["members"][name]["sha256"]:
            raise BundleError(f"member {name}: its sha256 is not the manifest's; fetch it again")
    if not np.isfinite(np.frombuffer(members[PARAMS], "<f4")).all():
        raise BundleError("params.bin: expected finite numbers, got NaN or infinity; rebuild")
