# SPDX-License-Identifier: Apache-2.0
"""From a payload to its consequences: who sent it, may they, what does it change.

No message can stop the coordinator. What is wrong with one is counted, logged once a device and
cause (never the payload), and answered with a receipt when its author is certain.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any, cast

from coordinator.desk import Desk, Verdict
from coordinator.docket import Refusal
from coordinator.fleet import Fleet, Known
from coordinator.letters import Handled, Letters, handled
from coordinator.publishing import Publisher
from coordinator.rounds import Action, Left, Returned
from coordinator.sitting import Age, Sitting
from coordinator.store import Store, StoredUpdate
from edge_sdk import topics
from edge_sdk.bounds import MAX_MISSING
from edge_sdk.chunks import Assembler
from edge_sdk.errors import MessageError, StoreError
from edge_sdk.messages import (
    MAX_FRAME,
    MAX_TRANSFER,
    CheckIn,
    Chunk,
    Message,
    Missing,
    Receipt,
    Signed,
    Status,
    Update,
    decode,
)
from edge_sdk.signing import Verify, verify
from edge_sdk.topics import Address

log = logging.getLogger(__name__)

Later = Coroutine[Any, Any, None]
MOST_COMPLAINTS = 10_000
MOST_PARKED = 1_000
MOST_EARLY, EARLY_S = 64, 30.0
"""Updates kept that came before their task was open, and for how long after the start."""
SLACK_BYTES = 65_536
TELL_EVERY_S, OFFER_EVERY_S = 5.0, 30.0
"""How often a device is told what was heard of it at the most, and an offer is said once more."""
MOST_TOLD = 10_000


class Intake:
    """Takes in every message; `counters` tells how many of each kind and outcome there were."""

    def __init__(
        self,
        store: Store,
        publisher: Publisher,
        act: Callable[[Desk, tuple[Action, ...]], None],
        now_s: Callable[[], float],
        letters: Letters,
        *,
        scheme: Verify = verify,
    ) -> None:
        self.fleet = Fleet()
        self.desks: dict[str, Desk] = {}
        self.running: set[str] = set()
        self.counters: Counter[str] = Counter()
        self._store = store
        self._publisher = publisher
        self._act = act
        self._now_s = now_s
        self.letters = letters
        self._scheme = scheme
        self._assembler = Assembler()
        self._parked: dict[str, tuple[str, bytes]] = {}
        self._early: dict[str, list[tuple[str, bytes]]] = {}
        self._until_s = now_s() + EARLY_S
        self._complaints: set[tuple[str, str]] = set()
        self._told_s: dict[str, float] = {}
        self._offered_s: dict[str, float] = {}

    def take(self, topic: str, payload: bytes) -> Later | None:
        """Take in one message; what it needs of the disk and the network is returned as work.

        The message may be acknowledged once that work is done, at once when there is none.
        """
        self.counters["messages"] += 1
        self.counters["bytes"] += len(payload)
        reading = handled("read", topic, payload)
        if reading.name in self.letters.dead:
            self.counters["dead"] += 1
            return None
        device = ""
        try:
            address = topics.parse(topic)
            device = address.device
            with self.letters.handling(reading):
                return self._route(address, topic, payload)
        except MessageError as error:
            self._complain(device, "malformed", error)
        except Exception as error:  # noqa: BLE001  # whatever a message does, the rounds go on
            self._complain(device, "crashed", error)
            return self._read_again(reading, payload, error)
        return None

    async def _read_again(self, reading: Handled, payload: bytes, error: Exception) -> None:
        """Try a message once more in which we failed, unless that was the last attempt."""
        if await self.letters.failed(reading, error):
            self.counters["dead"] += 1
        elif (work := self.take(reading.topic, payload)) is not None:
            await work

    def _route(self, address: Address, topic: str, payload: bytes) -> Later | None:
        if address.kind == "status":
            return self._status(topic, payload)
        desk, key = self.desks.get(address.task), self.fleet.key(address.device)
        if desk is None or key is None:
            (self._too_early if desk is None else self._park)(address, topic, payload)
            return None
        match self._verified(topic, payload, key):
            case (CheckIn() as check_in, _):
                return self._check_in(desk, address.device, check_in)
            case (Chunk() as chunk, _):
                return self._chunk(desk, address, chunk, key)
            case (Update() as update, signed):
                return self._count(desk, address.device, update, signed)
        return None

    def _too_early(self, address: Address, topic: str, payload: bytes) -> None:
        """Keep what the broker held while we were away: it comes before its task is open."""
        self.counters["unknown_task"] += 1
        is_full = sum(map(len, self._early.values())) >= MOST_EARLY
        if address.kind in {"update", "chunk"} and not is_full and self._now_s() < self._until_s:
            self._early.setdefault(address.task, []).append((topic, payload))

    def open(self, desk: Desk) -> list[Later]:
        """Take in a task; return what there is to do for messages that came before it."""
        self.called(desk)
        self.desks[desk.task.name] = desk
        early = self._early.pop(desk.task.name, [])
        return [work for message in early if (work := self.take(*message)) is not None]

    def called(self, desk: Desk) -> None:
        """Note that the offer is being said: what crosses it is no reason to say it once more."""
        self._offered_s[desk.task.name] = self._now_s()

    def _verified(
        self, topic: str, frame: bytes, key: bytes, limit: int = MAX_FRAME
    ) -> tuple[Message, Signed] | None:
        message, signed = decode(frame, topic, limit, scheme=self._scheme)
        if signed.by(key):
            return message, signed
        device = topics.parse(topic).device
        self._complain(device, "forged", MessageError("the signature is not this device's"))
        return None

    def _status(self, topic: str, payload: bytes) -> Later | None:
        message, signed = decode(payload, topic, scheme=self._scheme)
        status = cast("Status", message)
        if not signed.by(status.key):
            raise MessageError("the status is not signed with the key that it shows")
        seen = _known(status)
        before = self.fleet.devices.get(seen.device)
        if before is not None and before.key != seen.key:  # first come, first trusted
            self._complain(seen.device, "forged", MessageError("the device has another key"))
            return None
        found = self.fleet.age(seen.device, seen.sitting, is_will=not seen.online)
        if not self.fleet.status(seen):
            return self._outdated(seen.device, found, list(self.desks.values()))
        for desk in self.desks.values():
            if not seen.online:
                self._act(desk, desk.apply(Left(seen.device)))
            desk.changed.set()
        parked = self._parked.pop(seen.device, None)
        work = None if parked is None else self.take(*parked)
        seen = self.fleet.devices[seen.device]
        return work if before == seen else self._remember(seen, work)

    async def _remember(self, seen: Known, then: Later | None = None) -> None:
        try:
            await self._store.remember(seen)
        except StoreError as error:
            self._complain(seen.device, "store", error)
        if then is not None:
            await then

    def _park(self, address: Address, topic: str, payload: bytes) -> None:
        """Keep a check-in that overtook its device's status; the rest is sent again anyway."""
        self.counters["stranger"] += 1
        if address.kind == "checkin" and len(self._parked) < MOST_PARKED:
            self._parked[address.device] = (topic, payload)

    def _outdated(self, device: str, found: Age, desks: list[Desk]) -> Later | None:
        """Change nothing for a frame that is not the newest.

        It may be of a device that lost count of its starts: that one goes on from what it is told.
        """
        self.counters["outdated"] += 1
        if self.counters["outdated"] == 1:
            log.info("message outdated device=%s: older than what was heard of it", device)
        now_s = self._now_s()
        if found is not Age.UNPROVEN or now_s < self._told_s.get(device, -math.inf) + TELL_EVERY_S:
            return None
        if len(self._told_s) >= MOST_TOLD:
            self._told_s.clear()
        self._told_s[device] = now_s
        return self._tell(device, desks)

    async def _tell(self, device: str, desks: list[Desk], turn: int = 0) -> None:
        newest = self.fleet.devices[device].sitting
        for desk in desks:
            await self._publisher.heard(desk, device, newest, turn)

    def _check_in(self, desk: Desk, device: str, said: CheckIn) -> Later | None:
        before, task = self.fleet.devices[device], desk.task.name
        sitting = Sitting(said.boot, said.start, said.connection)
        found = self.fleet.said(task, device, sitting, said.turn)
        if found in (Age.OLD, Age.UNPROVEN):
            return self._outdated(device, found, [desk])
        if said.call != desk.call:
            self.counters["outdated"] += 1
        elif said.ready:
            self.fleet.check_in(task, device, said.call, said.examples)
            self._act(desk, desk.apply(Returned(device)))
        else:
            self.fleet.withdraw(task, device, said.reason)
            self._act(desk, desk.withdrawn(device, said.round, said.reason))
        desk.changed.set()
        after = self.fleet.devices[device]
        doubted = desk if said.asks or said.call != desk.call else None
        if after == before and doubted is None:
            return None
        return self._settle(before, after, doubted, said)

    async def _settle(
        self, before: Known, after: Known, doubted: Desk | None, said: CheckIn
    ) -> None:
        """Keep what a check-in tells of its device; say which offer holds, if it knows another."""
        if after != before:
            await self._remember(after)
        if doubted is None:
            return
        if said.asks:
            await self._tell(after.device, [doubted], said.turn)
        task, now_s = doubted.task.name, self._now_s()
        if now_s >= self._offered_s.get(task, -math.inf) + OFFER_EVERY_S:
            self._offered_s[task] = now_s
            await self._publisher.offer_again(doubted)

    def _chunk(self, desk: Desk, address: Address, chunk: Chunk, key: bytes) -> Later | None:
        most = 8 * desk.size + SLACK_BYTES
        if chunk.size > most:
            raise MessageError(f"expected an update of at most {most} bytes, got {chunk.size}")
        frame = self._assembler.add(address.device, chunk)
        if frame is None:
            return self._probed(desk, address.device, chunk) if chunk.probe else None
        topic = topics.up(address.task, address.device, "update")
        match self._verified(topic, frame, key, MAX_TRANSFER):
            case (Update() as update, signed):
                return self._count(desk, address.device, update, signed)
        return None

    async def _probed(self, desk: Desk, device: str, chunk: Chunk) -> None:
        """Say which chunks are missing, or that the update was counted and its receipt lost."""
        try:
            number = await self._store.round_of(desk.task.name, device, chunk.hash[:16])
        except StoreError as error:
            self._complain(device, "store", error)
            return
        if number is not None:
            self._assembler.forget(device)
            update = chunk.hash[:16]
            receipt = Receipt(number, update, "duplicate", "", update)
            await self._answer(desk, device, receipt)
            return
        missing = self._assembler.missing(device, chunk.hash)
        if missing:
            answer = Missing(chunk.hash, chunk.count, missing[:MAX_MISSING])
            await self._publisher.missing(desk, device, answer)

    async def _count(self, desk: Desk, device: str, update: Update, signed: Signed) -> None:
        judging = handled("judge", signed.topic, signed.frame)
        try:
            if judging.name in self.letters.dead:
                answer = await self._give_up(desk, device, update, signed)
            else:
                answer = await self._counted(desk, device, update, signed, judging)
        except StoreError as error:  # no receipt: the device keeps the update and sends it again
            self._complain(device, "store", error)
            return
        except Exception as error:  # noqa: BLE001  # whatever a message does, the rounds go on
            self._complain(device, "crashed", error)
            if not await self.letters.failed(judging, error) or judging.name in self.letters.dead:
                await self._count(desk, device, update, signed)
            return
        if answer.outcome == "refused":
            self._complain(device, "refused", MessageError(answer.reason))
        else:
            self.counters[answer.outcome] += 1
        await self._answer(desk, device, answer)

    async def _answer(self, desk: Desk, device: str, receipt: Receipt) -> None:
        """Send a receipt; it also tells when to come back."""
        rest_s = desk.rest_s(self._now_s())
        await self._publisher.receipt(desk, device, replace(receipt, rest_s=rest_s))

    async def _give_up(self, desk: Desk, device: str, update: Update, signed: Signed) -> Receipt:
        """Refuse an update in which the coordinator failed each time, through no fault proven."""
        self.counters["dead"] += 1
        counted = await self._store.counted(desk.task.name, update.round, device)
        if counted is not None:
            return Receipt(update.round, signed.id, "duplicate", "", counted)
        verdict = Verdict("refused", "the coordinator failed on this update and has set it aside")
        took_s = self._release(desk, device, update.round)
        return await self._refused(desk, device, update.round, signed, verdict, took_s=took_s)

    async def _counted(
        self, desk: Desk, device: str, update: Update, signed: Signed, judging: Handled
    ) -> Receipt:
        with self.letters.handling(judging):
            verdict = desk.judge(device, update)
        took_s = self._release(desk, device, update.round)
        receipt = Receipt(update.round, signed.id, verdict.outcome, verdict.reason)
        if verdict.lattice is None:  # whatever it would be now, what was counted stays counted
            counted = await self._store.counted(desk.task.name, update.round, device)
            if counted is not None or verdict.outcome == "duplicate":
                return Receipt(update.round, signed.id, "duplicate", "", counted)
            return await self._refused(desk, device, update.round, signed, verdict, took_s=took_s)
        stored = _stored(device, update, signed, verdict, took_s)
        answer = await self._store.count(desk.task.name, stored)
        if not answer.is_new:
            return Receipt(update.round, signed.id, "duplicate", "", answer.hash)
        with self.letters.handling(judging):
            self._act(desk, desk.fold(stored, verdict.lattice))
        return receipt

    async def _refused(
        self,
        desk: Desk,
        device: str,
        number: int,
        signed: Signed,
        verdict: Verdict,
        *,
        took_s: float | None,
    ) -> Receipt:
        """Keep a refusal, hold it against the device if the update was bad, and say so."""
        refusal = Refusal(
            round=number,
            device=device,
            hash=signed.id,
            outcome="stale" if verdict.outcome == "stale" else "refused",
            reason=verdict.reason[:200],
            is_bad=verdict.is_bad,
            during=desk.next_round - 1,
            size=len(signed.frame),
            took_s=took_s,
        )
        await self._hold_against(desk, refusal)
        return Receipt(number, refusal.hash, refusal.outcome, refusal.reason)

    async def _hold_against(self, desk: Desk, refusal: Refusal) -> None:
        task, device = desk.task, refusal.device
        held = await self._store.refuse(task.name, refusal, task.quarantine)
        if held is not None:
            desk.conducts[device] = held
            if held.is_held(desk.next_round):
                self.counters["quarantined"] += 1
                desk.held_since.pop(device, None)
                self.fleet.hold(task.name, desk.held())
                log.warning(
                    "quarantine task=%s device=%s until_round=%d terms=%d reason=%s",
                    *(task.name, device, held.until, held.terms, held.reason),
                )
        if refusal.outcome == "refused":  # nothing else will come of it for this round
            self._act(desk, desk.decline(device, refusal.round))

    def _release(self, desk: Desk, device: str, number: int) -> float | None:
        """Note that a device is done with its round; return what it took, seconds, if known."""
        errand = desk.release(device, number)
        took_s = desk.took_s(number, errand, self._now_s())
        if errand is not None and took_s is not None:
            self.fleet.took(desk.task.name, took_s)
            desk.changed.set()
        return took_s

    def _complain(self, device: str, cause: str, error: Exception) -> None:
        self.counters[cause] += 1
        about = (device, f"{cause}:{type(error).__name__}")
        if about in self._complaints or len(self._complaints) >= MOST_COMPLAINTS:
            return
        self._complaints.add(about)
        trace = error if cause == "crashed" else None
        log.warning("message %s device=%s reason=%s", cause, device, error, exc_info=trace)


def _known(status: Status) -> Known:
    s = status
    named = s.device, s.key, s.name, s.sdk, s.online, s.boot, s.tags or {}
    return Known(*named, start=s.start, connection=s.connection)


def _stored(
    device: str, update: Update, signed: Signed, verdict: Verdict, took_s: float | None
) -> StoredUpdate:
    return StoredUpdate(
        round=update.round,
        device=device,
        hash=signed.id,
        version=update.version,
        examples=update.examples,
        steps=update.steps,
        loss=update.loss,
        seconds=update.seconds,
        size=len(signed.frame),
        outcome="late" if verdict.outcome == "late" else "counted",
        blob=update.body,
        took_s=took_s,
    )
