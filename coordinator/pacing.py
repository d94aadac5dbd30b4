# SPDX-License-Identifier: Apache-2.0
"""When to invite and when to stop waiting: the pace of a task, as a value.

`rounds(...)` is synchronous. Over-selection and the two-stage start (a goal, a floor, a time limit)
follow Bonawitz et al. 2019, "Towards federated learning at scale". Pure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

from edge_sdk.errors import ConfigError

MOST = 3.0
"""Never invite more than this many times the cohort, however few devices complete."""


class Pace(NamedTuple):
    """How a task proceeds; made by `rounds`.

    `invite(ready, waited_s, completion)` returns how many devices to invite now, 0 for not yet.
    `waited_s` counts from when `quorum` devices were first ready, `completion` is the share of
    invited devices that lately reported.
    """

    invite: Callable[[int, float, float], int]
    cohort: int
    quorum: int
    deadline_s: float
    select_s: float
    last_version: int | None
    spec: list[object]


def rounds(
    *,
    cohort: int,
    quorum: int | None = None,
    deadline_s: float,
    count: int | None = None,
    overselect: float | Literal["auto"] = 1.0,
    select_s: float = 5.0,
) -> Pace:
    """Synchronous rounds: invite a cohort, commit at the goal, else at the deadline with a quorum.

    Args:
        cohort: reports that end a round early.
        quorum: reports that a commit needs; half the cohort, rounded up, when None.
        deadline_s: seconds that a round may take.
        count: stop at this version of the task, those of earlier runs included; None goes on.
        overselect: invite this many times the cohort, 1.0 to 3.0; "auto" follows completion.
        select_s: with a quorum but no full cohort ready, wait this long for the others.

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
        },
    ]
    return Pace(invite, cohort, need, float(deadline_s), float(select_s), count, spec)


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
    if name != "rounds":
        raise ConfigError(f'expected the pace "rounds", got {name!r}')
    try:
        return rounds(**cast("dict[str, Any]", dict(settings)))
    except TypeError as error:
        known = "cohort, quorum, deadline_s, count, overselect, select_s"
        raise ConfigError(f"pace rounds: {error}; it takes {known}") from error


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
    if any(not isinstance(n, int) or isinstance(n, bool) for n in whole):
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


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
