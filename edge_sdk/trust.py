# SPDX-License-Identifier: Apache-2.0
"""Whose word a device takes: one coordinator's, pinned or trusted on first use."""

from __future__ import annotations

import logging

from edge_sdk.errors import MessageError
from edge_sdk.messages import Message, Offer, Signed
from edge_sdk.store import Store

log = logging.getLogger(__name__)


class Trust:
    """The coordinator's key. The first offer that proves itself sets it, for good."""

    def __init__(self, store: Store, pinned: bytes | None = None) -> None:
        self._store = store
        self.key = pinned or store.trusted()

    def check(self, message: Message, signed: Signed) -> None:
        """Pass a message that the trusted coordinator signed.

        Raises: MessageError for any other; StoreError when a new key cannot be kept.
        """
        if self.key is None and isinstance(message, Offer) and signed.by(message.key):
            self._store.trust(message.key)
            self.key = message.key
            log.info("coordinator trusted on first use key=%s", message.key.hex()[:16])
            return
        kind = type(message).__name__
        if self.key is None:
            raise MessageError(f"{kind}: expected an offer first, to learn whom to trust")
        if isinstance(message, Offer) and message.key != self.key:
            raise MessageError(
                f"expected an offer of the coordinator {self.key.hex()[:16]}, got one of "
                f"{message.key.hex()[:16]}; if it was replaced: fedge device wipe, or set "
                "coordinator_key"
            )
        if not signed.by(self.key):
            raise MessageError(f"{kind}: not signed by our coordinator")
