# SPDX-License-Identifier: Apache-2.0
"""What must hold in every run, looked at with every transaction, message and file that matters.

I1 versions strictly one by one, one open round at a time, nothing announced that is not committed.
I2 an update counts once. I3 a receipt comes after its commit and is for ever; what a device keeps
it keeps until a receipt. I4 weights are finite. I5 every round ends, and the task. I6 outboxes stay
within their cap. I7 a device sends messages and nothing else, and no examples. I8 the journal makes
every version again, and so does a plain sum of what it says was folded; residuals add up.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from coordinator.pacing import Pace
from coordinator.replay import journal
from coordinator.simulation import reference
from coordinator.simulation.model import SHAPES, SIZE
from coordinator.simulation.trace import Trace
from coordinator.task import Task
from edge_sdk import codec, messages, topics
from edge_sdk.messages import Invite, Offer, Receipt, Update
from edge_sdk.store import Residual
from edge_sdk.types import Array

GRACE_S = 5.0
"""What a round may take beyond its deadline: the disk's flushes, and a loop's turn."""
ACCEPTED = frozenset({"counted", "late"})


@dataclass(frozen=True, slots=True)
class Broken:
    """An invariant that did not hold."""

    invariant: str
    why: str
    at_s: float


@dataclass(frozen=True, slots=True)
class Kept:
    """An update as a device put it into its outbox."""

    update: bytes
    round: int
    frame: bytes
    if_accepted: bytes
    if_refused: bytes


@dataclass(slots=True)
class _Ledger:
    """What is known of one device's updates and of the residual that they imply."""

    kept: dict[bytes, Kept] = field(default_factory=dict)
    """In the outbox, for sure."""
    doubtful: Kept | None = None
    """Being written when we last looked: in the outbox or not."""
    leaving: bytes = b""
    """Being taken out when we last looked."""
    delta: Array | None = None
    """What the latest training came to."""
    after: dict[bytes, tuple[NDArray[np.float64], NDArray[np.float64]]] = field(
        default_factory=dict
    )
    """By update: what the residual should be if it is accepted, and if it is not."""
    carried: NDArray[np.float64] = field(default_factory=lambda: np.zeros(SIZE))
    """What the residual should be now."""
    number: dict[bytes, int] = field(default_factory=dict)
    """By update: how many were encoded before it."""
    moving: tuple[bytes, bytes, bool] | None = None
    """The residual that was being written when we last looked, of which update, and which way."""
    moved: int = -1
    """The number of the update that moved the residual last."""


class Watch:
    """The notes of one run. The first invariant that breaks is kept in `broken`."""

    def __init__(self, task: Task, pace: Pace, trace: Trace) -> None:
        self.task, self.pace, self.trace = task, pace, trace
        self.broken: Broken | None = None
        self.newest = -1
        self.digests: list[bytes] = []
        self.rounds: dict[int, str] = {}
        self.outcomes: Counter[str] = Counter()
        self._db: sqlite3.Connection | None = None
        self._last = b""
        self._changes = -1
        self._updates: dict[tuple[int, str], tuple[bytes, int | None]] = {}
        self._receipts: dict[bytes, set[str]] = {}
        self._due_s: dict[int, float] = {}
        self._ledgers: dict[str, _Ledger] = {}
        self._feedback = codec.from_spec(task.codec).feedback

    def fail(self, invariant: str, why: str) -> None:
        """Take note that an invariant does not hold."""
        if self.broken is None:
            self.trace.event("BROKEN", invariant, why)
            self.broken = Broken(invariant, why, self.trace.now_s)

    # --- the coordinator's disk -----------------------------------------------------------------
    def committed(self, db: sqlite3.Connection) -> None:
        """Look at the database after a transaction."""
        if db.total_changes == self._changes:
            return
        self._db, self._changes = db, db.total_changes
        self._versions(db)
        self._rounds(db)
        self._counted(db)

    def _versions(self, db: sqlite3.Connection) -> None:
        count, newest = db.execute("SELECT count(*), max(version) FROM versions").fetchone()
        if count != (newest or 0) + (newest is not None):
            self.fail("I1", f"{count} versions are stored, the newest is number {newest}")
        for number, digest, params in db.execute(_NEW_VERSIONS, (self.newest,)):
            if number != self.newest + 1:
                self.fail("I1", f"version {number} follows version {self.newest}")
            if not np.isfinite(np.frombuffer(params, "<f4")).all():
                self.fail("I4", f"version {number} has weights that are not finite")
            self.newest = number
            self.digests.append(digest)
            self.trace.event("version", str(number), digest.hex()[:12])

    def _rounds(self, db: sqlite3.Connection) -> None:
        rows = db.execute("SELECT round, state, deadline_s, quorum FROM rounds ORDER BY round")
        now, newest = dict[int, str](), max(self.rounds, default=0)
        for number, state, deadline_s, quorum in rows:
            now[number] = state
            before = self.rounds.get(number)
            if before is None and number != newest + 1:
                self.fail("I1", f"round {number} follows round {newest}")
            if before in ("commit", "abort") and state != before:
                self.fail("I1", f"round {number} was settled as {before}, and became {state}")
            newest = max(newest, number)
            if state != "open":
                self._due_s.pop(number, None)
            elif quorum and number not in self._due_s:
                self._expect(number, deadline_s)
        if (
            sum(state == "open" for state in now.values()) > 1
            or not now.keys() >= self.rounds.keys()
        ):
            self.fail("I1", f"rounds went from {self.rounds} to {now}")
        self.rounds = now

    def _counted(self, db: sqlite3.Connection) -> None:
        now: dict[tuple[int, str], tuple[bytes, int | None]] = {}
        total = 0
        for number, device, update, folded in db.execute(_UPDATES):
            total += 1
            now[number, device] = update, folded
        if total != len(now):
            self.fail("I2", "a device has two updates in one round")
        for key, (update, folded) in self._updates.items():
            found = now.get(key)
            if found is None or found[0] != update:
                self.fail("I3", f"the counted update of {key[1]} in round {key[0]} is gone")
            elif folded is not None and found[1] != folded:
                self.fail("I2", f"the update of {key} was folded into {folded} and {found[1]}")
            elif folded is None and found[1] not in (None, self.newest, -1):
                self.fail("I2", f"the update of {key} went into the old version {found[1]}")
        self._updates = now

    # --- time -----------------------------------------------------------------------------------
    def _expect(self, number: int, deadline_s: float) -> None:
        times = 1 + self.pace.extend
        self._due_s[number] = self.trace.now_s + times * deadline_s * 1.001 + GRACE_S

    def excuse(self, seconds: float = 0.0) -> None:
        """Give open rounds their time again: the coordinator began anew, or its disk refused."""
        db = self._db
        if db is None:
            return
        for number, deadline_s in db.execute(_OPEN).fetchall():
            self._expect(number, deadline_s)
            self._due_s[number] += seconds

    def tick(self) -> None:
        """Look at what time alone brings about."""
        for number, due_s in self._due_s.items():
            if self.trace.now_s > due_s:
                self.fail("I5", f"round {number} is open {self.trace.now_s - due_s:.1f} s too long")

    # --- what is said ---------------------------------------------------------------------------
    def said(self, topic: str, payload: bytes) -> None:
        """Look at a frame that the coordinator sends."""
        if "/model/" in topic or self._db is None or payload == self._last:
            return
        self._last = payload
        message, _ = messages.decode(payload, topic)
        if isinstance(message, Offer):
            self._announced(message.version, message.model)
        elif isinstance(message, Invite):
            if message.round not in self.rounds:
                self.fail("I1", f"an invitation to round {message.round}, which is not stored")
            self._announced(message.version, message.model)
        elif isinstance(message, Receipt):
            self._receipted(topics.parse(topic).device, message)

    def _announced(self, version: int, digest: bytes) -> None:
        if not (0 <= version < len(self.digests)) or self.digests[version] != digest:
            self.fail("I1", f"version {version} is announced, and is not what is stored")

    def _receipted(self, device: str, receipt: Receipt) -> None:
        self.outcomes[receipt.outcome] += 1
        held = self._updates.get((receipt.round, device))
        if receipt.outcome in ACCEPTED and (held is None or held[0] != receipt.update):
            self.fail("I3", f"{device} has a receipt for round {receipt.round} before its commit")
        elif receipt.outcome == "duplicate" and (held is None or held[0] != receipt.counted):
            self.fail("I3", f"{device} is told of a counted update that is not stored")
        elif receipt.outcome in ("refused", "stale") and held and held[0] == receipt.update:
            self.fail("I3", f"{device} is refused round {receipt.round}, for which it counted")
        said = receipt.outcome
        if said == "duplicate" and receipt.counted == receipt.update:
            said = "counted"
        self._receipts.setdefault(receipt.update, set()).add(said)

    def sent(self, device: str, topic: str, payload: bytes, secret: bytes) -> None:
        """Look at a frame that a device sends."""
        if device not in topic or secret in payload:
            self.fail("I7", f"{device} sent what is not its to send, on {topic}")

    # --- a device's disk ------------------------------------------------------------------------
    def trained(self, device: str, delta: Array) -> None:
        """Note what a training came to."""
        self._of(device).delta = delta

    def keeping(self, device: str, kept: Kept) -> None:
        """Note that an update is being put into the outbox."""
        ledger = self._of(device)
        ledger.doubtful = kept
        if not self._feedback or ledger.delta is None:
            return
        message, _ = messages.decode(kept.frame, _update_topic(self.task.name, device), 2**20)
        body = message.body if isinstance(message, Update) else b""
        lost = reference.decoded(body)
        newest = max(ledger.kept, key=lambda u: ledger.number.get(u, -1), default=b"")
        before = ledger.carried
        if ledger.number.get(newest, -1) > ledger.moved:  # taken as accepted, for the time being
            before = ledger.after[newest][0]
        ledger.after[kept.update] = before + ledger.delta - lost, before
        ledger.number[kept.update] = len(ledger.number)

    def kept(self, device: str, update: bytes) -> None:
        """Note that the outbox says that it has an update."""
        ledger = self._of(device)
        if ledger.doubtful is not None and ledger.doubtful.update == update:
            ledger.kept[update] = ledger.doubtful
        ledger.doubtful = None

    def restarted(self, device: str, found: set[bytes], residual: bytes) -> None:
        """Compare what a device finds in its outbox with what it was told is safe there."""
        self.moved(device, residual)
        ledger = self._of(device)
        if ledger.doubtful is not None and ledger.doubtful.update in found:
            ledger.kept[ledger.doubtful.update] = ledger.doubtful
        ledger.doubtful = None
        if ledger.leaving and ledger.leaving not in found:
            ledger.kept.pop(ledger.leaving, None)
        ledger.leaving = b""
        if lost := ledger.kept.keys() - found:
            self.fail("I3", f"{device} lost {len(lost)} updates that were on its disk")

    def removing(self, device: str, update: bytes) -> None:
        """Note that a device takes an update out of its outbox."""
        ledger = self._of(device)
        if update in ledger.kept and update not in self._receipts:
            self.fail("I3", f"{device} dropped an update that has no receipt")
        ledger.leaving = update

    def removed(self, device: str, update: bytes) -> None:
        """Note that it is out."""
        ledger = self._of(device)
        ledger.kept.pop(update, None)
        ledger.leaving = b""

    def moving(self, device: str, residual: bytes) -> None:
        """Look at a residual that replaces the one before."""
        ledger = self._of(device)
        for kept in ledger.kept.values():
            outcomes = self._receipts.get(kept.update, set())
            ways = residual == kept.if_accepted, residual == kept.if_refused
            if any(ways):
                if not any(ways[outcome not in ACCEPTED] for outcome in outcomes):
                    self.fail("I8", f"{device} moved its residual before a receipt said so")
                ledger.moving = residual, kept.update, ways[0]
                return
        self.fail("I8", f"{device} moved its residual to what no update of its outbox implies")

    def moved(self, device: str, residual: bytes) -> None:
        """Note what residual is on the disk for sure."""
        ledger = self._of(device)
        if ledger.moving is not None and ledger.moving[0] == residual:
            _, update, is_accepted = ledger.moving
            if update in ledger.after:
                ledger.carried = ledger.after[update][0 if is_accepted else 1]
                ledger.moved = ledger.number[update]
        ledger.moving = None

    def _of(self, device: str) -> _Ledger:
        return self._ledgers.setdefault(device, _Ledger())

    # --- the end --------------------------------------------------------------------------------
    def residual(self, device: str, found: Residual | None) -> None:
        """Compare a residual with the sum of what was trained less what was accepted."""
        if not self._feedback or found is None:
            return
        state = codec.from_spec(self.task.codec).load(found.state, SHAPES)
        expected = self._of(device).carried
        scale = max(1.0, float(np.abs(expected).max()))
        if state.residual is None or not np.allclose(state.residual, expected, atol=1e-4 * scale):
            self.fail("I8", f"the residual of {device} is not what its updates left")

    def finish(self, db: sqlite3.Connection) -> None:
        """Make every version again, in two ways."""
        for one in journal(db, self.task):
            if one.replayed is None or not one.holds:
                self.fail("I8", f"the journal comes to another version {one.version}")
        if (why := reference.compare(db, self.task)) is not None:
            self.fail("I8", why)
        for update, outcomes in self._receipts.items():
            if "counted" in outcomes and not any(u == update for u, _ in self._updates.values()):
                self.fail("I3", f"the update {update.hex()} has a receipt and is not stored")


def _update_topic(task: str, device: str) -> str:
    return topics.up(task, device, "update")


_NEW_VERSIONS = "SELECT version, digest, params FROM versions WHERE version > ? ORDER BY version"
_UPDATES = "SELECT round, device, hash, folded FROM updates"
_OPEN = "SELECT round, deadline_s FROM rounds WHERE state = 'open' AND quorum > 0"
