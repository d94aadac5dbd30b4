# SPDX-License-Identifier: Apache-2.0
"""One round: who was invited, who reported, who left, and when it is over.

A value and one function over it, `step(round, event)`. Time enters as the event `DeadlinePassed`,
so every order of stragglers and departures is tested with a list of events. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

Verdict: TypeAlias = Literal["waiting", "commit", "abort"]
Standing: TypeAlias = Literal["counted", "late", "duplicate", "refused"]


@dataclass(frozen=True, slots=True)
class Round:
    """One attempt at the next version. `goal` reports end it early, `quorum` let it commit.

    A round without a quorum (0) is open-ended, as the pace `buffered` has them: devices join while
    it goes on, no deadline ends it, and it commits when its buffer is `Filled`.
    """

    number: int
    version: int
    cohort: frozenset[str]
    quorum: int
    goal: int
    reported: frozenset[str] = frozenset()
    left: frozenset[str] = frozenset()
    declined: frozenset[str] = frozenset()
    verdict: Verdict = "waiting"

    @property
    def awaited(self) -> frozenset[str]:
        """Devices that may still report: invited, and neither reported, nor left, nor declined."""
        return self.cohort - self.reported - self.left - self.declined

    @property
    def stragglers(self) -> frozenset[str]:
        """Devices that were there all along and did not report in time; empty until settled."""
        return frozenset() if self.verdict == "waiting" else self.awaited

    @property
    def is_open_ended(self) -> bool:
        """Whether it waits for its buffer alone."""
        return self.quorum == 0

    @property
    def has_quorum(self) -> bool:
        """Whether enough devices reported to commit."""
        return len(self.reported) >= self.quorum


@dataclass(frozen=True, slots=True)
class Reported:
    """An update of `device` for this round is safe in the store."""

    device: str


@dataclass(frozen=True, slots=True)
class Left:
    """The broker announced that `device` went away."""

    device: str


@dataclass(frozen=True, slots=True)
class Returned:
    """`device` is back, or checked in anew: it may have lost its invitation."""

    device: str


@dataclass(frozen=True, slots=True)
class Declined:
    """`device` withdrew: its conditions no longer hold."""

    device: str


@dataclass(frozen=True, slots=True)
class DeadlinePassed:
    """The seconds a round may take are over."""


@dataclass(frozen=True, slots=True)
class Joined:
    """`devices` take part from now on, in an open-ended round."""

    devices: frozenset[str]


@dataclass(frozen=True, slots=True)
class Filled:
    """The buffer holds as many updates as a version needs, of this round or of earlier ones."""


Event: TypeAlias = Reported | Left | Returned | Declined | DeadlinePassed | Joined | Filled


@dataclass(frozen=True, slots=True)
class Invite:
    """Send `device` the invitation of this round."""

    device: str


@dataclass(frozen=True, slots=True)
class Settle:
    """The round is over: commit or abort it. Emitted once in the life of a round."""

    verdict: Verdict


Action: TypeAlias = Invite | Settle


def begin(
    number: int, version: int, cohort: Iterable[str], *, quorum: int, goal: int | None = None
) -> tuple[Round, tuple[Action, ...]]:
    """Open round `number` on top of `version` and invite its cohort; quorum 0 is open-ended.

    Raises: ValueError when the cohort cannot reach the quorum.
    """
    devices = frozenset(cohort)
    aim = len(devices) if goal is None else min(goal, len(devices))
    if quorum == 0 and goal:
        aim = goal
    elif not 1 <= quorum <= aim:
        raise ValueError(f"expected 1 <= quorum <= goal, got quorum {quorum} of goal {aim}")
    opened = Round(number, version, devices, quorum, aim)
    return opened, tuple(Invite(device) for device in sorted(devices))


def standing(r: Round, device: str) -> Standing:
    """Return what an update of `device` for this round would be, before it is stored."""
    if device not in r.cohort:
        return "refused"
    if device in r.reported:
        return "duplicate"
    return "counted" if r.verdict == "waiting" else "late"


def step(r: Round, event: Event) -> tuple[Round, tuple[Action, ...]]:
    """Apply one event. A settled round never changes; an event about a stranger is ignored."""
    if r.verdict != "waiting":
        return r, ()
    if isinstance(event, Filled | Joined | DeadlinePassed):
        return _apply_to_all(r, event)
    if event.device not in r.cohort or event.device in r.reported:
        return r, ()
    changed, actions = _apply(r, event)
    if len(changed.reported) >= changed.goal:
        return _settle(changed, "commit")
    heard = len(changed.reported) + len(changed.left) + len(changed.declined)  # disjoint
    if heard == len(changed.cohort) and not r.is_open_ended:
        return _settle(changed, "commit" if changed.has_quorum else "abort")
    return changed, actions


def _apply_to_all(
    r: Round, event: Filled | Joined | DeadlinePassed
) -> tuple[Round, tuple[Action, ...]]:
    match event:
        case Filled():
            return _settle(r, "commit")
        case Joined(devices):
            new = sorted(devices - r.cohort)
            return replace(r, cohort=r.cohort | devices), tuple(map(Invite, new))
        case DeadlinePassed():
            return (r, ()) if r.is_open_ended else _settle(r, "commit" if r.has_quorum else "abort")


def _apply(
    r: Round, event: Reported | Left | Returned | Declined
) -> tuple[Round, tuple[Action, ...]]:
    one = frozenset({event.device})
    match event:
        case Reported():
            kept = replace(r, left=r.left - one, declined=r.declined - one)
            return replace(kept, reported=r.reported | one), ()
        case Left():
            return replace(r, left=r.left | one, declined=r.declined - one), ()
        case Declined():
            return replace(r, left=r.left - one, declined=r.declined | one), ()
        case Returned():
            back = replace(r, left=r.left - one, declined=r.declined - one)
            return back, (Invite(event.device),)


def _settle(r: Round, verdict: Verdict) -> tuple[Round, tuple[Action, ...]]:
    return replace(r, verdict=verdict), (Settle(verdict),)
