# SPDX-License-Identifier: Apache-2.0
"""One task in memory: its newest version, the open round, and the sum that grows towards the next.

Everything here can be rebuilt from the store. No socket, file, thread or clock: the service feeds
it what the store has accepted, and does what it says.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np

from coordinator import quarantine
from coordinator.aggregators import Report
from coordinator.pacing import Pace
from coordinator.quarantine import Conduct
from coordinator.rounds import (
    Action,
    DeadlinePassed,
    Declined,
    Event,
    Filled,
    Joined,
    Left,
    Reported,
    Returned,
    Round,
    Standing,
    standing,
    step,
)
from coordinator.store import Patch, Resumed, StoredRound, StoredUpdate, Version
from coordinator.sums import AccumulatorFull
from coordinator.task import Task
from coordinator.versions import next_version, places, report, weights_of
from edge_sdk import codec, params
from edge_sdk.bounds import MAX_PATCHES
from edge_sdk.bundle import Bundle
from edge_sdk.codec import Lattice
from edge_sdk.errors import CodecError
from edge_sdk.messages import Update
from edge_sdk.types import Array

RECENT = 16
"""Rounds that a late update may still belong to; older ones are stale."""


class Errand(NamedTuple):
    """What a device is at work on: a round, and since when, seconds."""

    round: int
    since_s: float


class Verdict(NamedTuple):
    """What an update is before it is stored; `lattice` comes with counted and late alone."""

    outcome: Literal["counted", "late", "stale", "refused", "duplicate"]
    reason: str = ""
    lattice: Lattice | None = None
    is_bad: bool = False
    """Whether it breaks bounds that its device could have kept."""


@dataclass(frozen=True, slots=True)
class RoundResult:
    """How a round ended. `version` is the task's version after it; an abort leaves it as it was.

    `is_expired` says that the deadline ended it, with `stragglers` still at work.
    `late` are the stragglers of earlier rounds whose updates this version holds. `metrics` has
    `loss` (of the reports, weighted by examples; NaN without any), `examples`, `bytes_up`, and
    `norm` (L2 of the change of the weights).
    """

    number: int
    version: int
    outcome: Literal["commit", "abort"]
    reported: tuple[str, ...]
    left: tuple[str, ...]
    declined: tuple[str, ...]
    stragglers: tuple[str, ...]
    late: tuple[str, ...]
    is_expired: bool
    digest: str
    reason: str
    metrics: dict[str, float]
    reasons: dict[str, str] = field(default_factory=dict)
    """Why devices declined, of those that said."""

    def record(self) -> dict[str, Any]:
        """Return the result as plain JSON values; a number that is not finite becomes null."""
        plain = asdict(self)
        known = self.metrics.items()
        plain["metrics"] = {name: v if math.isfinite(v) else None for name, v in known}
        return plain


class Next(NamedTuple):
    """What a settled round comes to: a version to store, or the reason why there is none."""

    version: Version | None
    folded: tuple[tuple[int, str], ...]
    result: RoundResult


@dataclass(slots=True)
class Desk:
    """The state of one task. Made by `begin`."""

    task: Task
    bundle: Bundle
    pace: Pace
    call: int
    version: Version
    rounds: dict[int, Round] = field(default_factory=dict)
    current: Round | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set whenever something happened that a waiting round may care for."""
    folded: dict[tuple[int, str], StoredUpdate] = field(default_factory=dict)
    at_work: dict[str, Errand] = field(default_factory=dict)
    """Devices that were invited and have not been heard of since."""
    patches: list[Patch] = field(default_factory=list)
    """Those that lead to `version`, oldest first, as far back as they are worth taking."""
    conducts: dict[str, Conduct] = field(default_factory=dict)
    """What is held against devices."""
    reasons: dict[str, str] = field(default_factory=dict)
    """Why devices declined the open round, of those that said."""
    spent: set[str] = field(default_factory=set)
    """Devices whose update for the open round was refused: they are not invited to it again."""
    held_since: dict[str, float] = field(default_factory=dict)
    """When this coordinator first knew each to be in quarantine, seconds."""
    spread_s: float | None = None
    """Over how long devices answer a roll call."""
    next_at_s: float = 0.0
    """When the next round may begin."""
    base: int = 0
    """The version that the sum grows on: ahead of `version` while a commit is being stored."""
    _sum: Any = None
    _deferred: list[tuple[StoredUpdate, Lattice]] = field(default_factory=list)
    _stored: dict[int, StoredRound] = field(default_factory=dict)
    _opened_s: dict[int, float] = field(default_factory=dict)
    """When each round began, of those that this coordinator saw begin or go on."""
    _buckets: dict[int, Mapping[str, int]] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """How many numbers the trainable tensors hold."""
        return params.count(self.bundle.shapes)

    @property
    def next_round(self) -> int:
        """The number of the round after the newest."""
        return max(self.rounds, default=0) + 1

    def held(self) -> dict[str, int]:
        """Return who sits out the next round, and until which."""
        number = self.next_round
        return {d: c.until for d, c in self.conducts.items() if c.is_held(number)}

    @property
    def recent(self) -> int:
        """How many rounds are remembered."""
        return max(RECENT, (self.pace.max_staleness or 0) + 1)

    def weights(self) -> Array:
        """Return the newest version's masters: float32, flat."""
        return weights_of(self.version)

    def stored(self, number: int) -> StoredRound:
        """Return a recent round as it was opened."""
        return self._stored[number]

    def open(self, r: StoredRound, opened: Round, now_s: float = 0.0) -> None:
        """Take in a round that the store has begun."""
        self._note(r, now_s, r.cohort)
        self.rounds[r.number] = self.current = opened
        self.spent, self.reasons = set(), {}
        if r.state == "open" and not opened.is_open_ended:
            self._opened_s[r.number] = now_s
        for old in sorted(self.rounds)[: -self.recent]:
            del self.rounds[old], self._stored[old], self._buckets[old]
            self._opened_s.pop(old, None)

    def join(self, devices: frozenset[str], now_s: float = 0.0) -> tuple[Action, ...]:
        """Let devices take part in the open round, which the store has seen join."""
        if self.current is None or self.current.verdict != "waiting":
            return ()
        r = self._stored[self.current.number]
        self._note(replace(r, cohort=r.cohort | devices), now_s, devices)
        return self.apply(Joined(devices))

    def _note(self, r: StoredRound, now_s: float, new: frozenset[str]) -> None:
        self._stored[r.number] = r
        self._place(r)
        self.at_work |= dict.fromkeys(new, Errand(r.number, now_s))

    def _place(self, r: StoredRound) -> None:
        self._buckets[r.number] = places(self.task, r)

    def release(self, device: str, number: int) -> Errand | None:
        """Note that a device was heard of about a round; return what it was at work on."""
        errand = self.at_work.get(device)
        if errand is None or errand.round != number:
            return None
        return self.at_work.pop(device)

    def took_s(self, number: int, errand: Errand | None, now_s: float) -> float | None:
        """Return how long ago a device was invited to a round, seconds; None if nobody knows."""
        since_s = self._opened_s.get(number) if errand is None else errand.since_s
        return None if since_s is None else now_s - since_s

    def wanted(self, ready: AbstractSet[str], now_s: float) -> tuple[set[str], int]:
        """Return who is idle among `ready`, and how many of them the pace has room for."""
        given_up = [d for d, e in self.at_work.items() if now_s >= e.since_s + self.pace.deadline_s]
        for device in given_up:
            del self.at_work[device]
        taking_part = self.current.cohort if self.current else frozenset()
        idle = set(ready) - self.at_work.keys() - taking_part
        return idle, max(0, self.pace.cohort - len(self.at_work))

    def apply(self, event: Event) -> tuple[Action, ...]:
        """Let something happen to the open round, if there is one."""
        if isinstance(event, Left | Declined):
            self.at_work.pop(event.device, None)
        if isinstance(event, Returned) and event.device in self.spent:
            return ()
        return () if self.current is None else self._step(self.current.number, event)

    def decline(self, device: str, number: int) -> tuple[Action, ...]:
        """Expect nothing more of a device in the open round, if it is round `number`."""
        if self.current is None or self.current.number != number:
            return ()
        self.spent.add(device)
        return self.apply(Declined(device))

    def withdrawn(self, device: str, number: int, reason: str) -> tuple[Action, ...]:
        """Expect nothing of a device in the round that it declines (0: the open one); keep why."""
        if number and (self.current is None or self.current.number != number):
            self.release(device, number)
            return ()
        if reason and self.current is not None and device in self.current.awaited:
            self.reasons[device] = reason
        return self.apply(Declined(device))

    def paroled(self, now_s: float) -> list[str]:
        """Return who was in quarantine for as many hours as its term may take at the most."""
        held = self.held()
        self.held_since = {device: self.held_since.get(device, now_s) for device in held}
        hours = self.task.quarantine.hours
        return [
            device
            for device, since_s in self.held_since.items()
            if now_s - since_s >= 3600 * hours * self.conducts[device].doubled()
        ]

    def rest_s(self, now_s: float) -> float | None:
        """Return for how long no round will need anybody who has reported; None for no time."""
        rest_s = self.pace.rest_s if self.current else self.next_at_s - now_s
        return rest_s if rest_s > 0 else None

    def expire(self) -> tuple[Action, ...]:
        """Let the deadline of the open round pass."""
        return self.apply(DeadlinePassed())

    def judge(self, device: str, update: Update) -> Verdict:
        """Check an update whose signature holds; nothing is changed."""
        r = self.rounds.get(update.round)
        if r is None:
            return Verdict("stale", f"round {update.round} is not among the last {self.recent}")
        stands = standing(r, device)
        return (
            self._judge_sender(r, device, stands)
            or self._judge_age(r, stands)
            or self._judge_body(r, update, "late" if stands == "late" else "counted")
        )

    def _judge_sender(self, r: Round, device: str, stands: Standing) -> Verdict | None:
        if stands == "refused":
            return Verdict("refused", f"{device} was not invited to round {r.number}")
        if stands == "duplicate":
            return Verdict("duplicate")
        if (held := self.conducts.get(device)) and held.is_held(self.next_round):
            return Verdict("refused", quarantine.says(held))
        return None

    def _judge_age(self, r: Round, stands: Standing) -> Verdict | None:
        if stands == "late" and self.task.late == "refuse":
            return Verdict("stale", f"round {r.number} is over and this task takes no late updates")
        behind, most = self.base - r.version, self.pace.max_staleness
        if most is not None and behind > most:
            return Verdict("stale", f"{behind} versions behind, this task takes up to {most}")
        return None

    def _judge_body(self, r: Round, update: Update, outcome: Literal["counted", "late"]) -> Verdict:
        if update.version != r.version:
            return Verdict("refused", f"round {r.number} starts from version {r.version}")
        if update.examples < 1:
            reason = "expected an update from at least one example"
            return Verdict("refused", reason, is_bad=True)
        try:
            lattice = codec.lattice(update.body, self.bundle.shapes)
        except CodecError as error:
            return Verdict("refused", str(error), is_bad=True)
        norm = codec.norm(lattice)
        if not norm <= self.task.max_norm:
            limit = self.task.max_norm
            reason = f"expected a delta of L2 norm up to {limit:g}, got {norm:g}"
            return Verdict("refused", reason, is_bad=True)
        return Verdict(outcome, "", lattice)

    def fold(self, update: StoredUpdate, lattice: Lattice) -> tuple[Action, ...]:
        """Add an update that the store has counted; the order of calls changes nothing."""
        self._add(replace(update, blob=b""), lattice)
        return (*self._step(update.round, Reported(update.device)), *self._filled())

    def _filled(self) -> tuple[Action, ...]:
        """Settle an open-ended round whose buffer is full, whichever rounds filled it."""
        r = self.current
        if r is None or not r.is_open_ended or len(self.folded) < r.goal:
            return ()
        return self._step(r.number, Filled())

    def _add(self, update: StoredUpdate, lattice: Lattice) -> None:
        report = self._report(update, lattice)
        try:
            self._sum = self.task.strategy.aggregator.add(self._sum, lattice, report)
        except AccumulatorFull:  # counted all the same: it goes into the version after this one
            self._deferred.append((update, lattice))
        else:
            self.folded[update.round, update.device] = update

    def _report(self, update: StoredUpdate, lattice: Lattice) -> Report:
        bucket = self._buckets.get(update.round, {}).get(update.device, 0)
        return report(self.task, update, lattice, bucket, self.base)

    def settle(self) -> Next:
        """Turn the settled round into the next version, or into the reason why there is none.

        What was folded leaves the sum here, so that an update which arrives while the store writes
        is counted towards the version after.
        """
        r = self.current
        if r is None or r.verdict == "waiting":
            raise RuntimeError("settle() before the round is settled")
        if r.verdict == "abort":
            reason = f"{len(r.reported)} of {r.quorum} needed devices reported"
            return Next(None, (), self._result(r, "abort", reason))
        version = next_version(self.task, self.bundle, self.version, self._sum, r.number)
        if version is not None:
            moved = weights_of(version).astype(np.float64) - self.weights()
            result = self._result(r, "commit", "", version, float(np.linalg.norm(moved)))
            settled = Next(version, tuple(sorted(self.folded)), result)
            self.base += 1
        else:  # the sum is poisoned: without setting it aside no later round could commit
            result = self._result(r, "abort", "the new weights are not finite")
            settled = Next(None, tuple(sorted(self.folded)), result)
        self._restart_sum()
        return settled

    def _restart_sum(self) -> None:
        self.folded, self._sum = {}, self.task.strategy.aggregator.init(self.size)
        deferred, self._deferred = self._deferred, []
        for update, lattice in deferred:
            self._add(update, lattice)

    def close(self, settled: Next) -> None:
        """Go on from what `settle` returned, once the store has it."""
        self.current = None
        if (version := settled.version) is not None:
            self.version = version
            self._remember(Patch(version.digest, version.patch))

    def _remember(self, patch: Patch) -> None:
        """Keep the patches that are worth more than the weights: together they are smaller."""
        self.patches = [*self.patches, patch][-MAX_PATCHES:] if patch.body else []
        while sum(len(p.body) for p in self.patches) >= len(self.version.params):
            self.patches = self.patches[1:]

    def _step(self, number: int, event: Event) -> tuple[Action, ...]:
        r = self.rounds.get(number)
        if r is None:
            return ()
        changed, actions = step(r, event)
        self.rounds[number] = changed
        if self.current is r:
            self.current = changed
        return actions

    def _result(
        self,
        r: Round,
        outcome: Literal["commit", "abort"],
        reason: str,
        version: Version | None = None,
        norm: float = 0.0,
    ) -> RoundResult:
        mine = [u for u in self.folded.values() if u.round == r.number]
        declined = r.declined | r.left  # whoever leaves says it first
        late = {u.device for u in self.folded.values() if u.round != r.number}
        after = self.version if version is None else version
        return RoundResult(
            number=r.number,
            version=after.number,
            outcome=outcome,
            reported=tuple(sorted(r.reported)),
            left=tuple(sorted(r.left)),
            declined=tuple(sorted(r.declined)),
            stragglers=tuple(sorted(r.stragglers)),
            late=() if version is None else tuple(sorted(late)),
            is_expired=bool(r.stragglers) and len(r.reported) < r.goal and not r.is_open_ended,
            digest=after.digest.hex(),
            reason=reason,
            metrics=_metrics(mine) | {"norm": norm},
            reasons={d: self.reasons[d] for d in sorted(self.reasons) if d in declined},
        )


def begin(task: Task, bundle: Bundle, pace: Pace, resumed: Resumed, now_s: float = 0.0) -> Desk:
    """Rebuild a task from the store: the same rounds, the same sum, nothing counted twice."""
    desk = Desk(task, bundle, pace, resumed.call, resumed.version, base=resumed.version.number)
    desk.conducts |= resumed.conducts
    desk._restart_sum()  # noqa: SLF001  # its own maker
    for patch in resumed.patches:
        desk._remember(patch)  # noqa: SLF001
    for stored in resumed.rounds:
        opened = Round(stored.number, stored.version, stored.cohort, stored.quorum, stored.goal)
        desk.open(stored, opened, now_s)
        if stored.state != "open":
            desk.current = None
    for stored in resumed.rounds:  # also of those too old for anything but their pending updates
        desk._place(stored)  # noqa: SLF001
    _replay(desk, resumed)
    return desk


def _replay(desk: Desk, resumed: Resumed) -> None:
    for update in resumed.reports:
        desk._step(update.round, Reported(update.device))  # noqa: SLF001
        desk.release(update.device, update.round)
    for stored in resumed.rounds:  # the closed ones were settled before, whoever reported since
        if stored.state != "open":
            desk._step(stored.number, DeadlinePassed())  # noqa: SLF001
    for update in resumed.pending:
        desk.fold(update, codec.lattice(update.blob, desk.bundle.shapes))


def _metrics(reports: Sequence[StoredUpdate]) -> dict[str, float]:
    examples = sum(u.examples for u in reports)
    loss = math.fsum(u.loss * u.examples for u in reports) / examples if examples else math.nan
    return {
        "loss": loss,
        "examples": float(examples),
        "bytes_up": float(sum(u.size for u in reports)),
    }
