# SPDX-License-Identifier: Apache-2.0
"""Bringing a bundle or weights to disk from their retained parts, one at a time.

Weights come as patches to the version that is here, where that is cheaper, else whole. Parts are
subscribed to only while they are wanted: a device takes each model once, and a sleeping one is not
sent those it will never use.
"""

from __future__ import annotations

import hashlib
import logging

import numpy as np

from edge_sdk import patches, topics
from edge_sdk.bundle import Bundle
from edge_sdk.chunks import Parts
from edge_sdk.errors import FedgeError, MessageError, RefusedError
from edge_sdk.events import BundleRefused, Event, Fetch, Fetched, FetchFailed
from edge_sdk.local import Local
from edge_sdk.messages import Offer, Part
from edge_sdk.store import Store
from edge_sdk.transport import Transport

log = logging.getLogger(__name__)

PATIENCE_S = 60.0


class Fetching:
    """The fetch under way, if any."""

    def __init__(self, task: str, store: Store, local: Local, transport: Transport) -> None:
        self._task, self._store, self._local, self._transport = task, store, local, transport
        self._wanted: Fetch | None = None
        self._waiting: dict[str, Parts] = {}
        """What is gathered, by the filter of its topics, in the order in which it is used."""
        self._patches: dict[int, bytes] = {}
        self._start, self._shapes = b"", dict[str, tuple[int, ...]]()
        self._moved_at = 0.0

    def begin(self, wanted: Fetch, bundle: bytes, offer: Offer | None, now: float) -> list[Event]:
        """Go and get it, in place of anything else; at once if it is here already."""
        self._end()
        try:
            if self._is_here(wanted, bundle.hex()):
                return [Fetched(wanted.what, wanted.digest)]
        except RefusedError:
            return [BundleRefused(wanted.digest)]
        self._wanted = wanted
        if not self._follow(wanted, bundle.hex(), offer, now):
            self._take_whole(now)
        return []

    def part(self, part: Part, now: float) -> list[Event]:
        """Take in a part; those of another model than the wanted one pass by."""
        if (wanted := self._wanted) is None:
            return []
        try:
            for parts in list(self._waiting.values()):
                before = parts.missing
                whole = parts.add(part)
                if whole is None and parts.missing == before:
                    continue
                self._moved_at = now
                if whole is not None:
                    return self._arrived(wanted, parts, whole, now)
        except RefusedError:
            self._end()
            return [BundleRefused(wanted.digest)]
        except FedgeError as error:
            return self._failed(wanted, str(error))
        return []

    def look(self, now: float) -> list[Event]:
        """Give up a fetch for which nothing came for a while; patches are given up for weights."""
        if self._wanted is None or now < self._moved_at + PATIENCE_S:
            return []
        if self._patching:
            log.warning("no patches came for %g s, fetching the weights", PATIENCE_S)
            self._take_whole(now)
            return []
        return self._failed(self._wanted, f"nothing came for {PATIENCE_S:g} s")

    @property
    def _patching(self) -> bool:
        return any(parts.version is not None for parts in self._waiting.values())

    def tidy(self) -> None:
        """Drop what a broker may remember of the wishes of a process that was killed."""
        filters = [topics.parts_filter(self._task, what) for what in ("bundle", "weights")]
        filters += [topics.parts_filter(self._task, "patch", v) for v in range(topics.SLOTS)]
        self._transport.unsubscribe(*(f for f in filters if f not in self._waiting))

    def _follow(self, wanted: Fetch, bundle: str, offer: Offer | None, now: float) -> bool:
        """Begin to fetch the patches that lead to the wanted weights; False if none do."""
        if wanted.what != "weights" or offer is None or offer.model != wanted.digest:
            return False
        base, sizes = self._local.base(bundle), offer.patches or []
        if base is None or len(base[1]) != offer.model_size:
            return False
        version, self._start, self._shapes = base
        way = patches.route(version, offer.version, sizes, offer.model_size)
        if way is None:
            return False
        log.info("fetch patches=%d bytes=%d", len(way), sum(sizes[-len(way) :]))
        self._patches, self._moved_at = {}, now
        for made, size in zip(way, sizes[-len(way) :], strict=True):
            place = topics.parts_filter(self._task, "patch", made)
            self._waiting[place] = Parts("patch", b"", size, made)
        self._transport.subscribe(*self._waiting)
        return True

    def _take_whole(self, now: float) -> None:
        wanted = self._wanted
        self._end()
        if wanted is None:
            return
        log.info("fetch what=%s bytes=%d", wanted.what, wanted.size)
        self._wanted, self._moved_at = wanted, now
        place = topics.parts_filter(self._task, wanted.what)
        self._waiting = {place: Parts(wanted.what, wanted.digest, wanted.size)}
        self._transport.subscribe(place)

    def _arrived(self, wanted: Fetch, parts: Parts, whole: bytes, now: float) -> list[Event]:
        """Use what is complete."""
        if parts.version is None:
            self._keep(wanted, whole)
        else:
            self._patches[parts.version] = whole
            if len(self._patches) < len(self._waiting):
                return []
            if not self._patched(wanted):
                self._take_whole(now)
                return []
        self._end()
        return [Fetched(wanted.what, wanted.digest)]

    def _patched(self, wanted: Fetch) -> bool:
        """Apply the patches and keep what comes of it; False if it is not what was wanted."""
        weights = np.frombuffer(self._start, "<f4").astype(np.float32)
        try:
            for version in sorted(self._patches):
                weights = patches.apply(weights, self._patches[version], self._shapes)
        except FedgeError as error:
            log.warning("patch refused, fetching the weights reason=%s", error)
            return False
        data = weights.astype("<f4").tobytes()
        if hashlib.sha256(data).digest() != wanted.digest:
            log.warning("patched weights are not those of the offer, fetching the weights")
            return False
        self._store.put_weights(data)
        return True

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
        if self._waiting:
            self._transport.unsubscribe(*self._waiting)
        self._wanted, self._waiting, self._patches, self._start = None, {}, {}, b""
