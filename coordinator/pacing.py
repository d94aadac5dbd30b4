# SPDX-License-Identifier: Apache-2.0
"""When to invite and when to stop waiting: the pace of a task, as a value.

`rounds(...)` is synchronous. Over-selection and the two-stage start (a goal, a floor, a time limit)
follow Bonawitz et al. 2019, "Towards federated learning at scale". `buffered(...)` is asynchronous:
Nguyen et al. 2022, "Federated learning with buffered asynchronous aggregation" (FedBuff). Pure.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

from edge_sdk.bounds import MAX_SECONDS
from edge_sdk.errors import ConfigError

HEARD = 20
"""Reports to have heard before the deadline follows them."""

MOST = 3.0
"""Never invite more than this many times the cohort, however few devices complete."""

CHECK_INS_PER_S = 1000
"""How many devices are asked to answer a roll call in a second."""

MOST_SPREAD_S = 300.0
"""However large the fleet, after so long everybody has answered."""

MOST_STALE = 100
"""Versions that an update may be behind at the most."""


class Pace(NamedTuple):
    """How a task proceeds; made by `rounds` or `buffered`.

    `invite(ready, waited_s, completion)` returns how many devices to invite now, 0 for not yet.
    `waited_s` counts from when `quorum` devices were first ready, `completion` is the share of
    invited devices that lately reported.

    Attributes:
        cohort: devices at work at a time.
        quorum: reports that a commit needs; 0 where only a full buffer commits.
        deadline_s: seconds that a round may take; of a buffer, that a device may take.
        extend: how many times a round without a quorum is given its time once more.
        adapt: the deadline is this many times what the slowest tenth of devices lately needed.
        size: of the buffer; None for rounds.
        max_staleness: versions that an update may be behind; None as long as it is remembered.
        rest_s: seconds from a version to the next round.
    """

    invite: Callable[[int, float, float], int]
    cohort: int
    quorum: int
    deadline_s: float
    select_s: float
    last_version: int | None
    spec: list[object]
    extend: int = 0
    adapt: float | None = None
    size: int | None = None
    max_staleness: int | None = None
    rest_s: float = 0.0

    def time_for(self, lately_s: Sequence[float]) -> float:
        """Return the deadline of a round, seconds, from what reports lately took, seconds each."""
        if self.adapt is None or len(lately_s) < HEARD:
            return self.deadline_s
        slow_s = sorted(lately_s)[math.ceil(0.9 * len(lately_s)) - 1]
        return min(self.deadline_s, max(1.0, self.adapt * slow_s))


def rounds(
    *,
    cohort: int,
    quorum: int | None = None,
    deadline_s: float,
    count: int | None = None,
    overselect: float | Literal["auto"] = 1.0,
    select_s: float = 5.0,
    extend: int = 0,
    adapt: float | None = None,
    rest_s: float = 0.0,
) -> Pace:
    """Synchronous rounds: invite a cohort, commit at the goal, else at the deadline with a quorum.

    Args:
        cohort: reports that end a round early.
        quorum: reports that a commit needs; half the cohort, rounded up, when None.
        deadline_s: seconds that a round may take.
        count: stop at this version of the task, those of earlier runs included; None goes on.
        overselect: invite this many times the cohort, 1.0 to 3.0; "auto" follows completion.
        select_s: with a quorum but no full cohort ready, wait this long for the others.
        extend: when the deadline finds no quorum, give the round its time again this many times
            before it is abandoned.
        adapt: cut the deadline to this many times what nine of ten reports lately took; None keeps
            `deadline_s`.
        rest_s: after a version, wait this long before the next round begins; devices are told, and
            need not check in again before.

    Raises: ConfigError when the numbers contradict each other.
    """
    need = math.ceil(cohort / 2) if quorum is None else quorum
    _check(
        cohort,
        need,
        deadline_s=deadline_s,
        count=count,
        overselect=overselect,
        select_s=select_s,
    )
    _check_patience(extend, adapt)
    if not (_is_number(rest_s) and 0 <= rest_s <= MAX_SECONDS):
        raise ConfigError(f"expected rest_s from 0 to 31 days in seconds, got {rest_s!r}")

    def invite(ready: int, waited_s: float, completion: float) -> int:
        factor = 1.0 / max(completion, 1e-9) if overselect == "auto" else overselect
        wanted = math.ceil(cohort * min(max(factor, 1.0), MOST) - 1e-9)
        if ready >= wanted:
            return wanted
        return ready if ready >= need and waited_s >= select_s else 0

    spec: list[object] = [
        "rounds",
        {
            "cohort": cohort,
            "quorum": need,
            "deadline_s": deadline_s,
            "count": count,
            "overselect": overselect,
            "select_s": select_s,
            "extend": extend,
            "adapt": adapt,
            "rest_s": rest_s,
        },
    ]
    times = float(deadline_s), float(select_s)
    return Pace(
        invite, cohort, need, *times, count, spec, extend=extend, adapt=adapt, rest_s=float(rest_s)
    )


def buffered(
    *,
    size: int,
    concurrency: int,
    deadline_s: float,
    max_staleness: int = 10,
    count: int | None = None,
) -> Pace:
    """Asynchronous: a version for every `size` updates, whichever version they began from.

    Devices are kept at work all the time: who reports is replaced at once, and nobody waits for the
    slowest. Updates weigh less the more versions they are behind (the strategy's `staleness`).

    Args:
        size: updates that make a version.
        concurrency: devices at work at a time; more than `size`.
        deadline_s: seconds after which a silent device is given up, and another is invited.
        max_staleness: an update further behind, in versions, is refused.
        count: stop at this version of the task; None goes on.

    Raises: ConfigError when the numbers contradict each other.
    """
    _check(size, size, deadline_s=deadline_s, count=count, overselect=1.0, select_s=0.0)
    if not (_is_whole(concurrency) and concurrency >= size):
        raise ConfigError(f"expected a concurrency of at least size {size}, got {concurrency!r}")
    if not (_is_whole(max_staleness) and 0 <= max_staleness <= MOST_STALE):
        raise ConfigError(f"expected max_staleness from 0 to {MOST_STALE}, got {max_staleness!r}")
    settings = {
        "size": size,
        "concurrency": concurrency,
        "deadline_s": deadline_s,
        "max_staleness": max_staleness,
        "count": count,
    }
    return Pace(
        lambda ready, _waited_s, _completion: min(ready, concurrency),
        concurrency,
        0,
        float(deadline_s),
        0.0,
        count,
        ["buffered", settings],
        size=size,
        max_staleness=max_staleness,
    )


PACES: dict[str, Callable[..., Pace]] = {"rounds": rounds, "buffered": buffered}


def from_spec(spec: object) -> Pace:
    """Read ``["rounds", {cohort = 20, ..}]``, the way a pace is spelled in TOML.

    Raises: ConfigError when the name or a setting is unknown.
    """
    if (
        not isinstance(spec, Sequence)
        or isinstance(spec, str)
        or len(spec) != 2
        or not isinstance(spec[1], Mapping)
    ):
        raise ConfigError(
            f'expected a pace such as ["rounds", {{cohort = 20, deadline_s = 600}}], got {spec!r}'
        )
    name, settings = spec
    if name not in PACES:
        raise ConfigError(f"expected a pace among {', '.join(PACES)}, got {name!r}")
    try:
        return PACES[name](**cast("dict[str, Any]", dict(settings)))
    except TypeError as error:
        known = ", ".join(inspect.signature(PACES[name]).parameters)
        raise ConfigError(f"pace {name}: {error}; it takes {known}") from error


def unmet(pace: Pace, devices: Collection[str] | None) -> str | None:
    """Say that a list of devices is too short for a pace ever to come to a version, if it is."""
    needed = pace.quorum or 1
    if devices is None or len(devices) >= needed:
        return None
    return f"{len(devices)} listed devices never make a quorum of {needed}: list more, or lower it"


def spread_s(devices: int) -> float | None:
    """Return over how many seconds a fleet answers a roll call; None when it may do so at once."""
    seconds = devices / CHECK_INS_PER_S
    return min(seconds, MOST_SPREAD_S) if seconds > 1 else None


def _check(
    cohort: int,
    quorum: int,
    *,
    deadline_s: float,
    count: int | None,
    overselect: float | str,
    select_s: float,
) -> None:
    whole = [cohort, quorum, *([] if count is None else [count])]
    if not all(map(_is_whole, whole)):
        raise ConfigError(f"expected whole numbers of devices and rounds, got {whole}")
    if not 1 <= quorum <= cohort:
        raise ConfigError(f"expected 1 <= quorum <= cohort, got quorum {quorum}, cohort {cohort}")
    if count is not None and count < 1:
        raise ConfigError(f"expected a count of at least 1, got {count}")
    if not (_is_number(deadline_s) and 0 < deadline_s < math.inf):
        raise ConfigError(f"expected a deadline_s above 0, got {deadline_s!r}")
    if not (_is_number(select_s) and 0 <= select_s < math.inf):
        raise ConfigError(f"expected select_s of 0 or more, got {select_s!r}")
    if overselect != "auto" and not (
        isinstance(overselect, int | float) and 1.0 <= overselect <= MOST
    ):
        raise ConfigError(f'expected overselect from 1.0 to {MOST} or "auto", got {overselect!r}')


def _check_patience(extend: int, adapt: float | None) -> None:
    if not (_is_whole(extend) and 0 <= extend <= 100):
        raise ConfigError(f"expected extend from 0 to 100 times, got {extend!r}")
    if adapt is not None and not (_is_number(adapt) and 1 <= adapt < math.inf):
        raise ConfigError(f"expected adapt of 1 or more, got {adapt!r}")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
