# SPDX-License-Identifier: Apache-2.0
"""Signatures at the price of a hash, for simulations: everybody who knows the public key can sign.

Nobody in a simulation forges, and one seed in fifty runs with real Ed25519 keys.
"""

from __future__ import annotations

import hashlib
import hmac

from edge_sdk.signing import SIGNATURE_BYTES, DeviceKey, Identity, device_id


class HashKey:
    """An `Identity` by keyed BLAKE2b."""

    def __init__(self, seed: bytes) -> None:
        self.public: bytes = hashlib.sha256(b"public" + seed).digest()
        self.id: str = device_id(self.public)

    def sign(self, message: bytes) -> bytes:
        """Return the keyed hash."""
        return _keyed(self.public, message)

    def verify(self, key: bytes, message: bytes, signature: bytes) -> bool:
        """Say whether this is the keyed hash."""
        return hmac.compare_digest(_keyed(key, message), signature)


def identity(name: str, *, real: bool) -> Identity:
    """Return the key of a name: real Ed25519, or a hash."""
    seed = hashlib.sha256(name.encode()).digest()
    return DeviceKey.from_seed(seed) if real else HashKey(seed)


def _keyed(key: bytes, message: bytes) -> bytes:
    return hashlib.blake2b(message, key=key, digest_size=SIGNATURE_BYTES).digest()
