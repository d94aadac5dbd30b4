# SPDX-License-Identifier: Apache-2.0
"""Bringing a bundle or weights to disk from their retained parts, one at a time.

Parts are subscribed to only while they are wanted: a device takes each model once, and a sleeping
one is not sent those it will never use.
"""

from __future__ import annotations

import logging

from edge_sdk import topics
from edge_sdk.bundle import Bundle
from edge_sdk.chunks import Parts
from edge_sdk.errors import FedgeError, MessageError, RefusedError
from edge_sdk.events import BundleRefused, Event, Fetch, Fetched, FetchFailed
from edge_sdk.local import Local
from edge_sdk.messages import Part
from edge_sdk.store import Store
from edge_sdk.transport import Transport

log = logging.getLogger(__name__)

PATIENCE_S = 60.0


class Fetching:
    """The fetch under way, if any."""

    def __init__(self, task: str, store: Store, local: Local, transport: Transport) -> None:
        self._task, self._store, self._local, self._transport = task, store, local, transport
        self._wanted: Fetch | None = None
        self._parts: Parts | None = None
        self._moved_at = 0.0

    def begin(self, wanted: Fetch, bundle: bytes, now: float) -> list[Event]:
        """Go and get it, in place of anything else; at once if it is here already."""
        self._end()
        try:
            if self._is_here(wanted, bundle.hex()):
                return [Fetched(wanted.what, wanted.digest)]
        except RefusedError:
            return [BundleRefused(wanted.digest)]
        log.info("fetch what=%s bytes=%d", wanted.what, wanted.size)
        self._wanted, self._moved_at = wanted, now
        self._parts = Parts(wanted.what, wanted.digest, wanted.size)
        self._transport.subscribe(topics.parts_filter(self._task, wanted.what))
        return []

    def part(self, part: Part, now: float) -> list[Event]:
        """Take in a part; those of another model than the wanted one pass by."""
        wanted, parts = self._wanted, self._parts
        if wanted is None or parts is None or part.digest != wanted.digest:
            return []
        self._moved_at = now
        try:
            whole = parts.add(part)
            if whole is None:
                return []
            self._keep(wanted, whole)
        except RefusedError:
            self._end()
            return [BundleRefused(wanted.digest)]
        except FedgeError as error:
            return self._failed(wanted, str(error))
        self._end()
        return [Fetched(wanted.what, wanted.digest)]

    def look(self, now: float) -> list[Event]:
        """Give up a fetch for which nothing came for a while."""
        if self._wanted is None or now < self._moved_at + PATIENCE_S:
            return []
        return self._failed(self._wanted, f"nothing came for {PATIENCE_S:g} s")

    def tidy(self) -> None:
        """Drop what a broker may remember of the wishes of a process that was killed."""
        current = self._wanted.what if self._wanted else None
        for what in ("bundle", "weights"):
            if what != current:
                self._transport.unsubscribe(topics.parts_filter(self._task, what))

    def _is_here(self, wanted: Fetch, bundle: str) -> bool:
        if wanted.what == "weights":
            return self._local.has_weights(wanted.digest, bundle)
        self._local.check_known(wanted.digest.hex())
        found = self._store.bundle(wanted.digest.hex())
        if found is not None:
            self._local.check(found)
        return found is not None

    def _keep(self, wanted: Fetch, whole: bytes) -> None:
        if wanted.what == "weights":
            self._store.put_weights(whole)
            return
        bundle = Bundle.from_bytes(whole)
        if bundle.digest != wanted.digest.hex():
            raise MessageError(f"expected bundle {wanted.digest.hex()[:12]}, got {bundle!r}")
        self._local.check(bundle)
        self._store.put_bundle(bundle)

    def _failed(self, wanted: Fetch, reason: str) -> list[Event]:
        log.warning("fetch failed what=%s reason=%s", wanted.what, reason)
        self._end()
        return [FetchFailed(wanted.what, wanted.digest)]

    def _end(self) -> None:
        if self._wanted is not None:
            self._transport.unsubscribe(topics.parts_filter(self._task, self._wanted.what))
        self._wanted = self._parts = None
