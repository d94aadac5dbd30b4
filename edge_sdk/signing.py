# SPDX-License-Identifier: Apache-2.0
"""Ed25519 identities: a key in a file that only its owner reads, and an id that proves itself.

A device's id is cut from the hash of its public key, so whoever shows a key that hashes to the id,
and signs with it, is that device: no table of names has to be trusted.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeAlias

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from edge_sdk.errors import StoreError

SIGNATURE_BYTES = 64


Verify: TypeAlias = Callable[[bytes, bytes, bytes], bool]
"""Says whether, by a public key, a message has this signature: `verify`, but in simulations."""


class Signer(Protocol):
    """Whoever can sign: a key in a file today, a secure element tomorrow."""

    @property
    def public(self) -> bytes:
        """The raw Ed25519 public key, 32 bytes."""
        ...

    def sign(self, message: bytes) -> bytes:
        """Return the Ed25519 signature of `message`, 64 bytes."""
        ...


class Identity(Signer, Protocol):
    """A signer with an id, that also tells others' signatures from forgeries."""

    @property
    def id(self) -> str:
        """`device_id(public)`."""
        ...

    def verify(self, key: bytes, message: bytes, signature: bytes) -> bool:
        """Say whether `signature` over `message` was made with the private half of `key`."""
        ...


class DeviceKey:
    """An Ed25519 private key held in memory; `load_or_create` keeps it in a file."""

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private
        self.public: bytes = private.public_key().public_bytes(
            serialization.Encoding.Raw, serialization.PublicFormat.Raw
        )
        self.id: str = device_id(self.public)

    @classmethod
    def from_seed(cls, seed: bytes) -> DeviceKey:
        """Make the key of a 32-byte seed, the same each time: for tests and simulation."""
        return cls(Ed25519PrivateKey.from_private_bytes(seed))

    @classmethod
    def load_or_create(cls, path: str | os.PathLike[str]) -> DeviceKey:
        """Read the key at `path` (PKCS#8 PEM, mode 0600), making it there the first time.

        Whole or not at all, also when power fails or two processes race.
        Raises: StoreError when the file is open to others, damaged, or cannot be written.
        """
        file = Path(path)
        try:
            if not file.exists():
                _create(file)
            return cls(_load(file))
        except StoreError:
            raise
        except OSError as error:
            reason = error.strerror or str(error)
            raise StoreError(f"cannot keep the key at {file}: {reason}") from error

    def sign(self, message: bytes) -> bytes:
        """Return the Ed25519 signature of `message`, 64 bytes."""
        return self._private.sign(message)

    def verify(self, key: bytes, message: bytes, signature: bytes) -> bool:
        """Say whether `signature` over `message` was made with the private half of `key`."""
        return verify(key, message, signature)

    def __repr__(self) -> str:
        return f"<DeviceKey {self.id}>"


def device_id(public: bytes) -> str:
    """Return the id of a public key: `d` and the first 15 hex digits of its sha256."""
    return "d" + hashlib.sha256(public).hexdigest()[:15]


def verify(key: bytes, message: bytes, signature: bytes) -> bool:
    """Say whether `signature` over `message` was made with the private half of `key`."""
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


def _create(file: Path) -> None:
    pem = Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fresh = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(fd, "wb") as out:
            out.write(pem)
            out.flush()
            os.fsync(fd)
        with contextlib.suppress(FileExistsError):  # another process was first: theirs is the key
            os.link(fresh, file)
    finally:
        fresh.unlink()
    folder = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _load(file: Path) -> Ed25519PrivateKey:
    mode = file.stat().st_mode & 0o777
    if mode & 0o077:
        raise StoreError(f"{file} must be its owner's alone, its mode is {mode:o}: chmod 600 it")
    try:
        key = serialization.load_pem_private_key(file.read_bytes(), password=None)
    except (ValueError, TypeError) as error:
        raise StoreError(f"{file} is not a PEM private key: restore it or remove it") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise StoreError(f"{file} holds another kind of key, expected Ed25519: remove it")
    return key
