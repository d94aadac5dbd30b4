# SPDX-License-Identifier: Apache-2.0
"""Bringing a bundle or weights to disk from their retained parts, one at a time.

Weights come as patches to the version that is here, where that is cheaper, else whole. Parts are
subscribed to only while they are wanted: a device takes each model once, and a sleeping one is not
sent those it will never use.

No part is paid for twice. What came before the connection was cut stays, in memory, and on disk
for a restart. After a reconnect the broker first sends what it still holds for us, then the offer:
that is when the parts that are missing by then are subscribed to, each by its own topic.
"""

from __future__ import annotations

import hashlib
import logging
import zlib
from collections.abc import Callable

import numpy as np

from edge_sdk import patches, topics
from edge_sdk.bundle import Bundle
from edge_sdk.chunks import Parts
from edge_sdk.errors import FedgeError, MessageError, RefusedError
from edge_sdk.events import BundleRefused, Event, Fetch, Fetched, FetchFailed
from edge_sdk.local import Local
from edge_sdk.messages import Offer, Part
from edge_sdk.partial import Partial
from edge_sdk.store import Store
from edge_sdk.transport import Transport

log = logging.getLogger(__name__)

PATIENCE_S = 60.0  # without a part, then a fetch is given up
QUIET_S = 20.0  # without a part, then what is missing is asked for again
OFFER_S = 5.0  # after a reconnect, then nobody waits for the offer any longer
SAVE_EVERY_S = 30.0  # what a kill may cost of a download
MAX_ASKED = 512
MAX_EARLY_BYTES = 4 << 20


class Fetching:
    """The fetch under way, if any.

    `may_take` says whether so many bytes may come today.
    """

    def __init__(
        self,
        task: str,
        store: Store,
        local: Local,
        transport: Transport,
        may_take: Callable[[int], bool] = lambda _bytes: True,
    ) -> None:
        self._task, self._store, self._local, self._transport = task, store, local, transport
        self._may_take = may_take
        self._wanted: Fetch | None = None
        self._waiting: dict[str, Parts] = {}
        """What is gathered, by the filter of its topics, in the order in which it is used."""
        self._patches: dict[int, bytes] = {}
        self._packed: int | None = None
        """Bytes of the bundle's zlib stream, where that is what comes."""
        self._start, self._shapes = b"", dict[str, tuple[int, ...]]()
        self._asked: tuple[str, ...] = ()
        """What is subscribed to."""
        self._open: set[str] = set()
        """Of these the topics of single parts that have not come."""
        self._early: dict[str, Part] = {}
        """By topic, parts that came before anybody asked for them."""
        self._partial, self._unsaved = Partial(store.folder / "download", store.disk), list[Part]()
        self._is_loaded = False
        self._is_up, self._up_at = False, 0.0
        self._moved_at = self._asked_at = self._saved_at = 0.0

    def begin(self, wanted: Fetch, bundle: bytes, offer: Offer | None, now: float) -> list[Event]:
        """Go and get it, in place of anything else; at once if it is here already."""
        held, applied = self._waiting, self._patches
        self._end()
        try:
            if self._is_here(wanted, bundle.hex()):
                self._forget()
                return [Fetched(wanted.what, wanted.digest)]
        except RefusedError as error:
            self._forget()
            return [BundleRefused(wanted.digest, str(error))]
        self._wanted, self._moved_at, self._saved_at = wanted, now, now
        if not self._follow(wanted, bundle.hex(), offer):
            self._gather_whole(wanted, offer)
        return self._resumed(held, applied, now)

    def part(self, part: Part, now: float) -> list[Event]:
        """Take in a part; those of another model than the wanted one are kept for a moment."""
        topic = topics.part(self._task, part.what, part.index, part.version)
        self._open.discard(topic)
        try:
            events = self._take(part, now)
            self._ask_on(now)
            return events
        finally:
            if self._wanted is not None and now >= self._saved_at + SAVE_EVERY_S:
                self._save(now)

    def look(self, now: float) -> list[Event]:
        """See to a fetch for which nothing came for a while.

        What is missing is asked for again; then patches are given up for weights, then the rest.
        """
        if self._wanted is None or not self._is_up:
            if self._early and now >= self._moved_at + PATIENCE_S:
                self._early = {}
            return []
        if now >= self._moved_at + PATIENCE_S:
            if not self._patching:
                return self._failed(self._wanted, f"nothing came for {PATIENCE_S:g} s")
            log.warning("no patches came for %g s, fetching the weights", PATIENCE_S)
            return self._take_whole(self._wanted, now)
        waits_s = QUIET_S if self._asked else OFFER_S
        if now >= max(self._moved_at, self._asked_at) + waits_s:
            self._ask(now)
        return []

    def connected(self, now: float) -> None:
        """Drop what a broker may remember of the wishes of a process that was killed."""
        self._is_up, self._moved_at, self._asked_at = True, now, now
        filters = [topics.parts_filter(self._task, what) for what in ("bundle", "weights")]
        filters += [topics.parts_filter(self._task, "patch", v) for v in range(topics.SLOTS)]
        self._transport.unsubscribe(*(f for f in filters if f not in self._asked))

    def offered(self, now: float) -> None:
        """Take note of an offer: behind it, the broker holds nothing more for us."""
        if stray := [topic for topic in self._early if topic not in self._asked]:
            self._transport.unsubscribe(*stray)
        if self._wanted is not None and self._is_up and not self._asked:
            self._ask(now)

    def disconnected(self, now: float) -> None:
        """Keep what has come, and leave it to `offered` to ask for the rest."""
        self._is_up = False
        self._hang_up()
        self._save(now)

    def close(self) -> None:
        """Keep what has come for the next start."""
        self._save(self._moved_at)

    # --- what is wanted -----------------------------------------------------------------------
    @property
    def _patching(self) -> bool:
        return any(parts.version is not None for parts in self._waiting.values())

    def _follow(self, wanted: Fetch, bundle: str, offer: Offer | None) -> bool:
        """Gather the patches that lead to the wanted weights; False if none do."""
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
        for made, size in zip(way, sizes[-len(way) :], strict=True):
            place = topics.parts_filter(self._task, "patch", made)
            self._waiting[place] = Parts("patch", b"", size, made)
        return True

    def _gather_whole(self, wanted: Fetch, offer: Offer | None = None) -> None:
        self._packed = None
        if offer is not None and (wanted.what, wanted.digest) == ("bundle", offer.bundle):
            self._packed = offer.bundle_packed
        size = self._packed or wanted.size
        log.info("fetch what=%s bytes=%d", wanted.what, size)
        place = topics.parts_filter(self._task, wanted.what)
        self._waiting = {place: Parts(wanted.what, wanted.digest, size)}

    def _take_whole(self, wanted: Fetch, now: float) -> list[Event]:
        """Fetch the weights: the patches were of no use."""
        self._end()
        self._forget()
        self._wanted, self._moved_at = wanted, now
        self._gather_whole(wanted)
        return self._resumed({}, {}, now)

    def _resumed(
        self, held: dict[str, Parts], applied: dict[int, bytes], now: float
    ) -> list[Event]:
        """Begin with what is here of it, and ask for the rest."""
        events = self._from_before(held, applied, now)
        early, self._early = list(self._early.values()), {}
        for part in early:
            events = events or self._take(part, now)
        if self._wanted is None or events:
            return events
        if not self._may_take(left := self._left()):
            reason = f"max_bytes_per_day leaves no room for {left} bytes"
            return self._failed(self._wanted, reason)
        self._ask(now)
        return []

    def _from_before(
        self, held: dict[str, Parts], applied: dict[int, bytes], now: float
    ) -> list[Event]:
        """Take what an earlier try has left, in memory or, of an earlier process, on disk."""
        is_of_use, events = False, list[Event]()
        for place, parts in self._waiting.items():
            if (before := held.get(place)) is not None and before.is_same(parts):
                self._waiting[place], is_of_use = before, True
            if parts.version is None:
                continue
            if len(patch := applied.get(parts.version, b"")) == parts.size:
                self._patches[parts.version], is_of_use = patch, True
        if not self._is_loaded:
            self._is_loaded = True
            for part in self._partial.load():
                is_of_use = is_of_use or self._fits(part)
                events = events or self._take(part, now)
            self._unsaved = []
        if not is_of_use:
            self._forget()
        return events

    def _left(self) -> int:
        """Return how many bytes have not come."""
        here = sum(map(len, self._patches.values()))
        return sum(parts.left for parts in self._waiting.values()) - here

    # --- asking -------------------------------------------------------------------------------
    def _ask(self, now: float) -> None:
        """Subscribe to the parts that are missing: to single ones where some are here."""
        self._hang_up()
        filters: list[str] = []
        for place, parts in self._waiting.items():
            if parts.version in self._patches:
                continue
            missing = parts.missing
            if missing is None or len(missing) == parts.count:
                filters.append(place)
                continue
            ones = missing[: max(0, MAX_ASKED - len(self._open))]
            names = [topics.part(self._task, parts.what, i, parts.version or 0) for i in ones]
            self._open.update(names)
            filters += names
        self._asked, self._asked_at = tuple(filters), now
        if filters:
            self._transport.subscribe(*filters)

    def _ask_on(self, now: float) -> None:
        """Ask for the next ones when those that were asked for are here."""
        is_each = self._asked and not any(one.endswith("+") for one in self._asked)
        if self._wanted is not None and is_each and not self._open:
            self._ask(now)

    def _hang_up(self) -> None:
        if self._asked:
            self._transport.unsubscribe(*self._asked)
        self._asked, self._open = (), set()

    # --- what comes ---------------------------------------------------------------------------
    def _take(self, part: Part, now: float) -> list[Event]:
        if (wanted := self._wanted) is None or not self._fits(part):
            self._put_aside(part, now)
            return []
        try:
            for parts in self._waiting.values():
                before = parts.missing
                whole = None if parts.version in self._patches else parts.add(part)
                if whole is None and parts.missing == before:
                    continue
                self._moved_at = now
                self._unsaved.append(part)
                if whole is not None:
                    return self._arrived(wanted, parts, whole, now)
        except RefusedError as error:
            self._end()
            self._forget()
            return [BundleRefused(wanted.digest, str(error))]
        except FedgeError as error:
            self._forget()
            return self._failed(wanted, str(error), keep=False)
        return []

    def _fits(self, part: Part) -> bool:
        return any(parts.fits(part) for parts in self._waiting.values())

    def _put_aside(self, part: Part, now: float) -> None:
        held = sum(len(early.body) for early in self._early.values())
        if held + len(part.body) <= MAX_EARLY_BYTES:
            topic = topics.part(self._task, part.what, part.index, part.version)
            self._early[topic] = part
            if self._wanted is None:
                self._moved_at = now

    def _arrived(self, wanted: Fetch, parts: Parts, whole: bytes, now: float) -> list[Event]:
        """Use what is complete."""
        if parts.version is None:
            self._keep(wanted, whole)
        else:
            self._patches[parts.version] = whole
            if len(self._patches) < len(self._waiting):
                return []
            if not self._patched(wanted):
                return self._take_whole(wanted, now)
        self._end()
        self._forget()
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
        self._local.check_offered(wanted.digest.hex(), wanted.size)
        found = self._store.bundle(wanted.digest.hex())
        if found is not None:
            self._local.check(found)
        return found is not None

    def _keep(self, wanted: Fetch, whole: bytes) -> None:
        if wanted.what == "weights":
            self._store.put_weights(whole)
            return
        bundle = Bundle.from_bytes(unpacked(whole, wanted.size) if self._packed else whole)
        if bundle.digest != wanted.digest.hex():
            raise MessageError(f"expected bundle {wanted.digest.hex()[:12]}, got {bundle!r}")
        self._local.check(bundle)
        self._store.put_bundle(bundle)

    # --- the end ------------------------------------------------------------------------------
    def _failed(self, wanted: Fetch, reason: str, *, keep: bool = True) -> list[Event]:
        """Give up for now; what has come is kept for the next try, unless it is of no use."""
        log.warning("fetch failed what=%s reason=%s", wanted.what, reason)
        self._hang_up()
        self._wanted = None
        if not keep:
            self._end()
        return [FetchFailed(wanted.what, wanted.digest, reason)]

    def _end(self) -> None:
        self._hang_up()
        self._wanted, self._waiting, self._patches, self._start = None, {}, {}, b""

    def _save(self, now: float) -> None:
        self._saved_at = now
        if self._unsaved and self._partial.save(self._unsaved):
            self._unsaved = []

    def _forget(self) -> None:
        """Delete what is on disk of a download: it has ended, or another one is wanted."""
        self._unsaved = []
        self._partial.clear()


def unpacked(stream: bytes, size: int) -> bytes:
    """Return the `size` bytes that a zlib stream is of; no more are ever unpacked.

    Raises: MessageError when it is of more, of fewer, damaged, or has something behind it.
    """
    reader = zlib.decompressobj()
    try:
        data = reader.decompress(stream, size + 1)
    except zlib.error as error:
        raise MessageError(
            f"expected a bundle's zlib stream, got a damaged one: {error}"
        ) from error
    if len(data) != size or not reader.eof or reader.unused_data:
        raise MessageError(f"expected a zlib stream of {size} bytes, got another: fetch it again")
    return data
