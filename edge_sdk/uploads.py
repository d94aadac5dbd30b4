# SPDX-License-Identifier: Apache-2.0
"""From a trained delta to an update that is safe: encoded, signed, in the outbox, on its way.

The codec's state (the residual) moves on only with a receipt, and with it what a correction
remembers. Should another round be trained before that receipt comes, the waiting update is taken as
accepted, which it nearly always is.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from edge_sdk import chunks, codec, files, messages, topics
from edge_sdk.bundle import Bundle
from edge_sdk.codec import Codec, State
from edge_sdk.correction import CORRECTIONS, Terms, decay_of, plain_steps, unpack
from edge_sdk.errors import CodecError, StoreError
from edge_sdk.failpoints import Failpoints
from edge_sdk.messages import Chunk, Invite, Missing, Update
from edge_sdk.outbox import Entry, Outbox
from edge_sdk.params import count, flatten, unflatten
from edge_sdk.signing import Identity
from edge_sdk.store import Residual, Store
from edge_sdk.training import TrainResult
from edge_sdk.types import Array, Params, Spec

log = logging.getLogger(__name__)

Publish = Callable[[str, bytes], None]


class Uploads:
    """The way out of a device, for one task."""

    def __init__(
        self,
        *,
        task: str,
        key: Identity,
        store: Store,
        outbox: Outbox,
        publish: Publish,
        failpoints: Failpoints,
        max_packet: Callable[[], int],
        is_sending: Callable[[str], bool] = lambda _topic: False,
    ) -> None:
        self._task, self._key, self._store, self._outbox = task, key, store, outbox
        self._publish, self._failpoints, self._max_packet = publish, failpoints, max_packet
        self._is_sending = is_sending
        self._cuts: dict[bytes, int] = {}
        """The packets that an update was cut for: what has arrived is of use while it stays so."""
        self._asked: set[bytes] = set()
        """Updates whose missing chunks were asked for at the latest attempt."""
        self._disown()

    def submit(self, invite: Invite, trained: TrainResult, bundle: Bundle) -> bytes:
        """Put the update of a round into the outbox and send it; return what a receipt calls it.

        Raises: CodecError when the delta is not finite or the codec unknown; StoreError when the
        disk refuses; MessageError when the update is too large.
        """
        chain = codec.from_spec(invite.codec)
        known = self._newest()
        state = self._state(chain, known, invite.codec, bundle)
        blob, pending = chain.encode(self._delta(trained.delta, bundle), state)
        method, own = invite.correction or "", self._own(known, invite, bundle)
        moved = b"" if own is None else _moved(own, blob, invite, bundle, trained.steps)
        frame = messages.encode(
            Update(
                round=invite.round,
                version=invite.version,
                examples=trained.examples,
                steps=trained.steps,
                loss=float(trained.loss),
                seconds=float(trained.seconds),
                body=blob,
            ),
            self._key,
            self._topic("update"),
        )
        update = messages.Signed(frame, self._topic("update")).id

        def record(*, accepted: bool) -> bytes:
            after = chain.dump(chain.commit(pending, accepted=accepted))
            order = known.order + 1 if known else 1
            kept = moved if accepted or own is None else own.astype("<f4").tobytes()
            return Residual(invite.codec, bundle.digest, order, after, method, kept).to_bytes()

        entry = Entry(update, invite.round, frame, record(accepted=True), record(accepted=False))
        self._outbox.append(entry)
        log.info("update kept round=%d bytes=%d", invite.round, len(frame))
        self._send(frame)
        return update

    def resend(self, update: bytes) -> None:
        """Send an update from the outbox again; one that is no longer there is let go.

        Of one in chunks, the first asks which others are missing; every second time all are sent,
        for a coordinator that does not answer. What is still on its way is left to arrive.
        """
        if (entry := self._outbox.entry(update)) is None:
            return
        if any(self._is_sending(self._topic(kind)) for kind in ("update", "chunk")):
            return  # a slow link still carries it
        log.info("update sent again round=%d", entry.round)
        cut = self._cut(entry.frame)
        asked = update in self._asked
        self._asked ^= {update}
        if asked or len(cut) == 1:
            self._send(entry.frame)
        else:
            self._publish(*self._packet(replace(cut[0], probe=True)))

    def supply(self, wanted: Missing) -> None:
        """Send the chunks that a coordinator misses of an update that is still in the outbox."""
        update = wanted.hash[:16]
        if (entry := self._outbox.entry(update)) is None:
            return
        self._asked -= {update}
        cut = self._cut(entry.frame)
        if len(cut) != wanted.count:  # cut for other packets: what is there is of no use
            self._send(entry.frame)
            return
        chosen = [cut[i] for i in wanted.missing if i < len(cut)]
        log.info("chunks sent round=%d missing=%d of=%d", entry.round, len(chosen), len(cut))
        for chunk in chosen:
            self._publish(*self._packet(chunk))

    def settle(self, update: bytes, *, accepted: bool) -> None:
        """Act on a receipt: move the residual on, then take the update out of the outbox.

        In this order, so that a power cut between the two repeats the first.
        Raises: StoreError when the disk refuses.
        """
        if (entry := self._outbox.entry(update)) is not None:
            after = Residual.from_bytes(entry.if_accepted if accepted else entry.if_refused)
            known = self._store.residual()
            if known is None or after.order > known.order:
                self._store.set_residual(after)
        self._outbox.remove(update)
        self._cuts.pop(update, None)

    def anchor(self, invite: Invite, weights: str, bundle: Bundle) -> Path | None:
        """Write what a round's training is pulled to: the weights, moved by its correction.

        None where the round has none, and it is the weights themselves.
        Raises: StoreError when the weights are gone or the disk refuses; CodecError when what the
            invitation brought does not add up.
        """
        own, base = self._own(self._newest(), invite, bundle), self._store.weights(weights)
        if own is None or invite.correction is None:
            return None
        if base is None:
            raise StoreError("expected the weights on disk, they are damaged; fetch again")
        terms = _terms(invite, bundle, 1)
        moved = CORRECTIONS[invite.correction].anchor(_flat(base), own, terms)
        path = self._store.train / f"{invite.round}.anchor.bin"
        files.write(path, moved.astype("<f4").tobytes(), mode=0o600, disk=self._store.disk)
        return path

    def _own(self, known: Residual | None, invite: Invite, bundle: Bundle) -> Array | None:
        """Return what this device's correction remembers: zeros at first."""
        if invite.correction is None:
            return None
        size = 4 * count(bundle.shapes)
        fits = known is not None and (known.bundle, known.correction, len(known.own)) == (
            bundle.digest,
            invite.correction,
            size,
        )
        return _flat(known.own if known is not None and fits else bytes(size))

    def _disown(self) -> None:
        """Drop updates that another key signed, as after the loss of ours: nobody would take them.

        The residual is this folder's all the same.
        """
        topic, key = self._topic("update"), self._key
        for update in [waiting.update for waiting in self._outbox]:
            entry = self._outbox.entry(update)
            if entry and not messages.verify(entry.frame, topic, key.public, key.verify):
                log.warning("update of another device or task dropped round=%d", entry.round)
                with contextlib.suppress(StoreError):  # it is left out of account all the same
                    self._outbox.remove(update)

    def _newest(self) -> Residual | None:
        """The state after the last update that was encoded here, taken as accepted."""
        waiting = (self._outbox.entry(w.update) for w in reversed(list(self._outbox)))
        last = next((entry for entry in waiting if entry is not None), None)
        found = [self._store.residual(), Residual.from_bytes(last.if_accepted) if last else None]
        return max(filter(None, found), key=lambda residual: residual.order, default=None)

    def _state(self, chain: Codec, known: Residual | None, spec: Spec, bundle: Bundle) -> State:
        if known is not None and known.is_for(spec, bundle.digest):
            try:
                return chain.load(known.state, bundle.shapes)
            except CodecError as error:
                log.warning("residual damaged, begun anew reason=%s", error)
        return chain.init(bundle.shapes, seed=int.from_bytes(self._key.public[:7], "little"))

    def _send(self, frame: bytes) -> None:
        cut = self._cut(frame)
        packets = [(self._topic("update"), frame)]
        if len(cut) > 1:
            packets = [self._packet(chunk) for chunk in cut]
        for packet in packets[:-1]:
            self._publish(*packet)
        self._failpoints.reach("before_last_chunk")
        self._publish(*packets[-1])
        self._failpoints.reach("after_send")

    def _cut(self, frame: bytes) -> list[Chunk]:
        """Return the chunks that a frame goes in; a single one where it fits a packet whole."""
        limit, update = self._max_packet(), messages.Signed(frame, self._topic("update")).id
        limit = self._cuts[update] = min(limit, self._cuts.get(update, limit))
        return chunks.split(frame, limit if len(frame) > limit else messages.MAX_TRANSFER)

    def _packet(self, chunk: Chunk) -> tuple[str, bytes]:
        topic = self._topic("chunk")
        return topic, messages.encode(chunk, self._key, topic)

    def _topic(self, kind: str) -> str:
        return topics.up(self._task, self._key.id, kind)

    def _delta(self, path: Path, bundle: Bundle) -> Params:
        try:
            flat = np.frombuffer(self._store.disk.read(path), "<f4").astype(np.float32)
            return unflatten(flat, bundle.shapes)
        except (OSError, ValueError) as error:
            raise CodecError(
                f"expected a delta of this bundle from training, got: {error}"
            ) from error


def _moved(own: Array, blob: bytes, invite: Invite, bundle: Bundle, steps: int) -> bytes:
    """Return what a correction remembers once an update, as it is decoded, has counted."""
    flat = flatten(codec.decode(blob, bundle.shapes), bundle.shapes)
    terms = _terms(invite, bundle, steps)
    moved = CORRECTIONS[invite.correction or ""].after(own, flat, terms)
    return moved.astype("<f4").tobytes()


def _terms(invite: Invite, bundle: Bundle, steps: int) -> Terms:
    manifest = bundle.manifest
    return Terms(
        mu=invite.mu or 0.0,
        lr=float(manifest["lr"] if invite.lr is None else invite.lr),
        steps=plain_steps(steps, decay_of(manifest["optimizer"]) or 0.0),
        control=unpack(invite.body, count(bundle.shapes)),
    )


def _flat(data: bytes) -> Array:
    return np.frombuffer(data, "<f4").astype(np.float32)
