# SPDX-License-Identifier: Apache-2.0
"""What a round's updates come to, as a value: how each weighs, and what is made of the sums.

Every aggregator folds as updates arrive, in memory that does not grow with the fleet, and comes to
the same bits in whatever order they do. Robust rules compare the means of `buckets` of devices:
compressed updates touch different numbers, so that a median over single devices would be nearly
always zero. `buckets=0` compares devices one by one, and needs a codec that sends every number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from coordinator import robust, sums
from coordinator.sums import WEIGHT_ONE, Sum, weight_of
from edge_sdk.codec import Lattice
from edge_sdk.correction import plain_steps
from edge_sdk.errors import ConfigError
from edge_sdk.types import Array, Spec

FAIR_ONE = 2**16
"""The weight of a loss of 1 in `fair_mean`."""

MOST_LOSS = 1e3
BUCKETS = 8


class Report(NamedTuple):
    """What is known of an update besides its delta.

    `discount` is for its staleness; `norm` the L2 norm of its delta; `bucket` where it is put,
    from 0, decided by who sent it before anybody trained.
    """

    examples: int
    steps: int = 1
    loss: float = 0.0
    norm: float = 0.0
    discount: float = 1.0
    bucket: int = 0


Sums = dict[int, Sum]
"""The sums on their way, by bucket."""


def _updates(state: Sums) -> int:
    return sum(one.updates for one in state.values())


class Aggregator(NamedTuple):
    """A fold of updates as a value.

    `add(state, update, report)` uses the state passed in up. `buckets`: how many sums it keeps, 0
    for one for each device. `count` says how many updates there were; `beside` a second vector,
    for a server optimizer that asks for one.
    """

    spec: Spec
    init: Callable[[int], Sums]
    add: Callable[[Sums, Lattice, Report], Sums]
    result: Callable[[Sums], Array]
    buckets: int = 1
    count: Callable[[Sums], int] = _updates
    beside: Callable[[Sums], Array] | None = None


def weighted_mean() -> Aggregator:
    """Average deltas by examples (McMahan et al. 2017, algorithm 1), in int64 fixed point."""
    return _mean("weighted_mean", {}, lambda one, u, r: sums.add(one, u, _weight(r)))


def plain_mean() -> Aggregator:
    """Average deltas, each discounted and divided by how many there are: not by their discounts.

    FedBuff (Nguyen et al. 2022, "Federated learning with buffered asynchronous aggregation",
    algorithm 1, line 11): a stale update moves the model less, even when all are stale.
    """

    def add(one: Sum, update: Lattice, report: Report) -> Sum:
        return sums.add(one, update, weight_of(1, report.discount), mass=WEIGHT_ONE)

    return _mean("plain_mean", {}, add)


def stepwise_mean(decay: float = 0.0) -> Aggregator:
    """Average deltas as `plain_mean` does and, beside that, what a step of each moved: SCAFFOLD.

    Karimireddy et al. 2020, algorithm 1, lines 12 to 17, where c_i cancels out of the change of
    c_i. `decay` is that of the devices' momentum.
    """
    if not 0 <= decay < 1:
        raise ConfigError(f"stepwise_mean: expected decay from 0 to below 1, got {decay}")

    def init(count: int) -> Sums:
        return {0: sums.init(count), 1: sums.init(count)}

    def add(state: Sums, update: Lattice, report: Report) -> Sums:
        weight, steps = weight_of(1, report.discount), plain_steps(report.steps, decay)
        per_step = update._replace(step=update.step / steps)
        whole = sums.add(state[0], update, weight, mass=WEIGHT_ONE)  # the larger: refuses first
        return {0: whole, 1: sums.add(state[1], per_step, weight, mass=WEIGHT_ONE)}

    return Aggregator(
        ["stepwise_mean", {"decay": decay}],
        init,
        add,
        lambda state: sums.mean(state[0]),
        count=lambda state: state[0].updates,
        beside=lambda state: sums.mean(state[1]),
    )


def normalized_mean(decay: float = 0.0) -> Aggregator:
    """Average deltas per local step, times the steps that were taken on average: FedNova.

    A device that did more steps no longer pulls the model further its way (Wang et al. 2020,
    "Tackling the objective inconsistency problem", eq. 6 and section 4). `decay` is that of the
    devices' momentum: a_i = [t - d (1 - d^t) / (1 - d)] / (1 - d) for t steps, t without momentum.
    """
    if not 0 <= decay < 1:
        raise ConfigError(f"normalized_mean: expected decay from 0 to below 1, got {decay}")

    def add(one: Sum, update: Lattice, report: Report) -> Sum:
        steps = plain_steps(report.steps, decay)
        weight = _weight(report)
        per_step = update._replace(step=update.step / steps)
        return sums.add(one, per_step, weight, work=round(weight * steps))

    def result(one: Sum) -> Array:
        return sums.mean(one) * np.float32(one.work / max(one.mass, 1))

    return _mean("normalized_mean", {"decay": decay}, add, result)


def fair_mean(q: float = 0.2, lr: float = 0.1) -> Aggregator:
    """Weigh devices by their loss to the power `q`: q-FedAvg. 0 is the plain mean.

    Li et al. 2020, "Fair resource allocation in federated learning", algorithm 2, with L = 1 / lr
    of the devices: the sum of F^q * delta over the sum of F^q + q * F^(q-1) * |delta|^2 / lr.
    """
    if not (0 <= q <= 16 and lr > 0):
        raise ConfigError(f"fair_mean: expected q from 0 to 16 and lr above 0, got {q} and {lr}")

    def add(one: Sum, update: Lattice, report: Report) -> Sum:
        loss = min(max(report.loss, 1.0 / FAIR_ONE), MOST_LOSS)
        power = loss**q
        mass = power + q * loss ** (q - 1) * report.norm**2 / lr
        weight = max(1, round(power * report.discount * FAIR_ONE))
        return sums.add(one, update, weight, mass=max(1, round(mass * FAIR_ONE)))

    return _mean("fair_mean", {"q": q, "lr": lr}, add)


def median(buckets: int = BUCKETS) -> Aggregator:
    """Take the median over buckets of devices, number by number (Yin et al. 2018)."""
    return _robust("median", {}, buckets, robust.median)


def trimmed_mean(cut: float = 0.2, buckets: int = BUCKETS) -> Aggregator:
    """Average over buckets without the `cut` share of largest and smallest (Yin et al. 2018)."""
    if not 0 <= cut < 0.5:
        raise ConfigError(f"trimmed_mean: expected a cut from 0 to below 0.5, got {cut}")

    def rule(rows: Array) -> Array:
        return robust.trimmed_mean(rows, int(cut * len(rows)))

    return _robust("trimmed_mean", {"cut": cut}, buckets, rule)


def krum(attackers: int = 1, buckets: int = BUCKETS, *, keep: int = 1) -> Aggregator:
    """Take the bucket nearest to its neighbours, or the mean of `keep` (Blanchard et al. 2017).

    `attackers`: how many buckets may be poisoned. With fewer than 2 attackers + 3 buckets in a
    round, where Krum promises nothing, their median is taken.
    """
    least = 2 * attackers + 3
    if (
        attackers < 0
        or keep < 1
        or (buckets and (buckets < least or keep > buckets - attackers - 2))
    ):
        raise ConfigError(
            f"krum: expected at least {least} buckets for {attackers} attackers, and to keep 1 to "
            f"buckets - attackers - 2, got {buckets} and keep = {keep}"
        )

    def rule(rows: Array) -> Array:
        if len(rows) < least:
            return robust.median(rows)
        return robust.krum(rows, attackers, min(keep, len(rows) - attackers - 2))

    return _robust("krum", {"attackers": attackers, "keep": keep}, buckets, rule)


def geometric_median(buckets: int = BUCKETS) -> Aggregator:
    """Take the point with the least sum of distances to the buckets (Pillutla et al. 2022)."""
    return _robust("geometric_median", {}, buckets, robust.geometric_median)


def clipped(inner: Aggregator, norm: float) -> Aggregator:
    """Return `inner` with each update scaled down to an L2 norm of at most `norm`.

    Sun et al. 2019, "Can you really backdoor federated learning?", section 4.
    """
    if not 0 < norm < float("inf"):
        raise ConfigError(f"expected a clip above 0, got {norm}")

    def add(state: Sums, update: Lattice, report: Report) -> Sums:
        if report.norm > norm:
            update = update._replace(step=update.step * (norm / report.norm))
            report = report._replace(norm=norm)
        return inner.add(state, update, report)

    return inner._replace(spec=["clipped", inner.spec, norm], add=add)


def _mean(
    name: str,
    settings: Mapping[str, float],
    add: Callable[[Sum, Lattice, Report], Sum],
    result: Callable[[Sum], Array] = sums.mean,
) -> Aggregator:
    """Build an aggregator of one sum."""

    def init(count: int) -> Sums:
        return {0: sums.init(count)}

    def fold(state: Sums, update: Lattice, report: Report) -> Sums:
        return {0: add(state[0], update, report)}

    return Aggregator([name, dict(settings)], init, fold, lambda state: result(state[0]))


def _robust(
    name: str, settings: Mapping[str, float], buckets: int, rule: Callable[[Array], Array]
) -> Aggregator:
    """Build an aggregator that compares buckets by `rule`; empty ones have no say."""
    if not (isinstance(buckets, int) and (buckets == 0 or 3 <= buckets <= 256)):
        raise ConfigError(f"{name}: expected 3 to 256 buckets, or 0 for each device, got {buckets}")

    def init(count: int) -> Sums:
        return {-1: sums.init(count)}  # remembers the size; stays empty

    def add(state: Sums, update: Lattice, report: Report) -> Sums:
        at = report.bucket
        one = state.get(at) or sums.init(state[-1].total.size)
        return {**state, at: sums.add(one, update, _weight(report))}

    def result(state: Sums) -> Array:
        means = [sums.mean(state[at]) for at in sorted(state) if at >= 0]
        return rule(np.stack(means)) if means else sums.mean(state[-1])

    return Aggregator([name, {**settings, "buckets": buckets}], init, add, result, buckets)


def _weight(report: Report) -> int:
    return weight_of(report.examples, report.discount)


FACTORIES: dict[str, Callable[..., Aggregator]] = {
    "weighted_mean": weighted_mean,
    "plain_mean": plain_mean,
    "stepwise_mean": stepwise_mean,
    "normalized_mean": normalized_mean,
    "fair_mean": fair_mean,
    "median": median,
    "trimmed_mean": trimmed_mean,
    "krum": krum,
    "geometric_median": geometric_median,
}


def from_spec(spec: Any) -> Aggregator:
    """Return the aggregator that a spec spells: ``["trimmed_mean", {"cut": 0.1}]``.

    Raises: ConfigError for one that is not known, or wrong settings.
    """
    parts: list[Any] = [spec] if isinstance(spec, str) else [*spec] or [None]
    name, rest = parts[0], parts[1:]
    if name == "clipped" and len(rest) == 2:
        return clipped(from_spec(rest[0]), rest[1])
    if name not in FACTORIES or len(rest) > 1 or not isinstance(rest[0] if rest else {}, dict):
        raise ConfigError(f"expected an aggregator among {', '.join(FACTORIES)}, got {spec!r:.80}")
    try:
        return FACTORIES[name](**(rest[0] if rest else {}))
    except TypeError as error:
        raise ConfigError(f"{name}: {error}") from error
