# SPDX-License-Identifier: Apache-2.0
"""What the coordinator says: offers and models (retained), invitations and receipts. All signed."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import zlib
from typing import Literal

from coordinator.desk import Desk
from coordinator.link import Link
from coordinator.sitting import Sitting
from edge_sdk import chunks, topics
from edge_sdk.errors import TransportError
from edge_sdk.messages import Heard, Invite, Message, Missing, Offer, Part, Receipt, encode
from edge_sdk.signing import Signer

log = logging.getLogger(__name__)


class Publisher:
    """Signs and sends. What the broker does not take is logged: the protocol asks again."""

    def __init__(self, link: Link, signer: Signer) -> None:
        self._link = link
        self._signer = signer
        self._bundles: dict[str, bytes] = {}
        self._counts: dict[str, int] = {}
        """How many parts are retained, by the filter of their topics."""
        self._controls: dict[str, tuple[bytes, bytes]] = {}
        self._offers: dict[str, Offer] = {}
        self.bytes_down = 0
        """Bytes handed to the broker; it multiplies retained ones by its subscribers."""

    async def all(self, desk: Desk) -> None:
        """Retain all that a device needs: a broker may have forgotten it."""
        await self.bundle(desk)
        await self.patches(desk)
        await self.model(desk)

    async def bundle(self, desk: Desk) -> None:
        """Retain the bundle's parts."""
        digest = bytes.fromhex(desk.bundle.digest)
        await self._parts(desk, chunks.parts("bundle", self._packed(desk), digest, 0))

    def _packed(self, desk: Desk) -> bytes:
        """Return a bundle as it goes down: its zlib stream, where that is shorter."""
        bundle = desk.bundle
        if bundle.digest not in self._bundles:
            self._bundles[bundle.digest] = min(zlib.compress(bundle.data, 9), bundle.data, key=len)
        return self._bundles[bundle.digest]

    async def model(self, desk: Desk, state: Literal["open", "closed"] = "open") -> None:
        """Retain the newest weights and the patch to them, then the offer that names them."""
        v = desk.version
        await self._parts(desk, chunks.parts("weights", v.params, v.digest, v.number))
        if v.patch:
            await self._parts(desk, chunks.parts("patch", v.patch, v.digest, v.number))
        await self.offer(desk, state)

    async def patches(self, desk: Desk) -> None:
        """Retain every patch that an offer may name."""
        first = desk.version.number - len(desk.patches) + 1
        for number, patch in enumerate(desk.patches, first):
            await self._parts(desk, chunks.parts("patch", patch.body, patch.digest, number))

    async def offer(self, desk: Desk, state: Literal["open", "closed"] = "open") -> None:
        """Retain the task's offer."""
        number = desk.current.number if desk.current else desk.next_round
        packed = len(self._packed(desk))
        offer = Offer(
            task=desk.task.name,
            call=desk.call,
            round=number,
            version=desk.version.number,
            bundle=bytes.fromhex(desk.bundle.digest),
            model=desk.version.digest,
            bundle_size=len(desk.bundle.data),
            model_size=len(desk.version.params),
            key=self._signer.public,
            state=state,
            patches=[len(patch.body) for patch in desk.patches],
            spread_s=desk.spread_s,
            bundle_packed=packed if packed < len(desk.bundle.data) else None,
        )
        self._offers[desk.task.name] = offer
        await self._send(topics.offer(desk.task.name), offer, retain=True)

    async def offer_again(self, desk: Desk) -> None:
        """Retain the offer that holds: somebody may have put an older one in its place."""
        if (offer := self._offers.get(desk.task.name)) is not None:
            await self._send(topics.offer(desk.task.name), offer, retain=True)

    async def heard(self, desk: Desk, device: str, newest: Sitting, turn: int = 0) -> None:
        """Tell a device what was heard of it last, and which offer holds."""
        if (offer := self._offers.get(desk.task.name)) is None:
            return  # it hears that soon
        word = Heard(newest.boot, newest.start, turn, offer.call, offer.round)
        await self._send(topics.down(desk.task.name, device, "heard"), word)

    async def invite(self, desk: Desk, device: str) -> None:
        """Invite one device to the open round."""
        if desk.current is None:
            return
        task, r = desk.task, desk.stored(desk.current.number)
        invite = Invite(
            round=r.number,
            version=r.version,
            model=desk.version.digest,
            deadline_s=r.deadline_s,
            codec=task.codec_spec,
            epochs=task.epochs,
            steps=task.steps,
            seconds=task.seconds,
            batch=task.batch,
            lr=task.lr,
            mu=task.pull,
            seed=seed_of(device, r.seed),
            correction=task.strategy.correction,
            body=self._control(desk),
        )
        await self._send(topics.down(task.name, device, "invite"), invite)

    def _control(self, desk: Desk) -> bytes:
        """Return what the newest version's strategy tells devices: made once for each version."""
        server, name = desk.task.strategy.server, desk.task.name
        if server.control is None:
            return b""
        known = self._controls.get(name)
        if known is None or known[0] != desk.version.digest:
            known = (
                desk.version.digest,
                server.control(server.load(desk.version.optimizer, desk.size)),
            )
            self._controls[name] = known
        return known[1]

    async def receipt(self, desk: Desk, device: str, receipt: Receipt) -> None:
        """Tell a device what became of its update; after the store's commit, never before."""
        await self._send(topics.down(desk.task.name, device, "receipt"), receipt)

    async def missing(self, desk: Desk, device: str, missing: Missing) -> None:
        """Tell a device which chunks of a transfer have not come."""
        await self._send(topics.down(desk.task.name, device, "missing"), missing)

    async def _parts(self, desk: Desk, parts: list[Part]) -> None:
        name, first = desk.task.name, parts[0]
        place = topics.parts_filter(name, first.what, first.version)
        before, self._counts[place] = self._counts.get(place, 0), first.count
        for index in range(first.count, before):  # of a longer one that was here
            await self._clear(topics.part(name, first.what, index, first.version))
        await asyncio.gather(
            *(
                self._send(topics.part(name, p.what, p.index, p.version), p, retain=True)
                for p in parts
            )
        )

    async def _clear(self, topic: str) -> None:
        try:
            await self._link.publish(topic, b"", retain=True)
        except (TransportError, TimeoutError) as error:
            log.warning("not cleared topic=%s reason=%s", topic, error)

    async def _send(self, topic: str, message: Message, *, retain: bool = False) -> None:
        frame = encode(message, self._signer, topic)
        self.bytes_down += len(frame)
        try:
            await self._link.publish(topic, frame, retain=retain)
        except (TransportError, TimeoutError) as error:
            log.warning("publish failed topic=%s reason=%s", topic, error)


def seed_of(*parts: object) -> int:
    """Return a seed below 2**63 that depends on every part, on any machine the same."""
    text = "\0".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1
