# SPDX-License-Identifier: Apache-2.0
"""How a task learns from reports: an aggregator, a server optimizer and a staleness discount.

A strategy is a value. FedAdam is not a class, it is `adam` given to a weighted mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from coordinator import aggregators, optimizers
from coordinator.aggregators import Aggregator
from coordinator.optimizers import ServerOptimizer
from edge_sdk.errors import ConfigError
from edge_sdk.types import Spec

Discount = Callable[[int], float]
"""From staleness, in versions, to the share of its weight that an update keeps: above 0 up to 1."""


class Strategy(NamedTuple):
    """A strategy as a value; change one part with `_replace`."""

    name: str
    aggregator: Aggregator
    server: ServerOptimizer
    discount: Discount
    spec: Spec


def polynomial(exponent: float = 0.5) -> Discount:
    """Discount staleness s to (1 + s) ** -exponent (Xie et al. 2019, "polynomial"); 0 is none.

    Raises: ConfigError for a negative exponent.
    """
    if not 0 <= exponent < float("inf"):
        raise ConfigError(f"expected a staleness exponent from 0, got {exponent}")

    def discount(staleness: int) -> float:
        return float((1 + max(0, staleness)) ** -exponent)

    return discount


def fedavg(lr: float = 1.0, *, staleness: float = 0.5) -> Strategy:
    """Add the weighted mean delta to the model (McMahan et al. 2017)."""
    return _strategy("fedavg", optimizers.sgd(lr), staleness)


def fedavgm(lr: float = 1.0, *, decay: float = 0.9, staleness: float = 0.5) -> Strategy:
    """Like `fedavg`, with momentum at the coordinator (Hsu et al. 2019)."""
    return _strategy("fedavgm", optimizers.momentum(lr, decay=decay), staleness)


def fedadam(
    lr: float = 0.02,
    *,
    b1: float = 0.9,
    b2: float = 0.99,
    tau: float = 1e-3,
    staleness: float = 0.5,
) -> Strategy:
    """Step with adam along the weighted mean delta (Reddi et al. 2021)."""
    return _strategy("fedadam", optimizers.adam(lr, b1=b1, b2=b2, tau=tau), staleness)


def fedyogi(
    lr: float = 0.02,
    *,
    b1: float = 0.9,
    b2: float = 0.99,
    tau: float = 1e-3,
    staleness: float = 0.5,
) -> Strategy:
    """Step with yogi along the weighted mean delta (Reddi et al. 2021)."""
    return _strategy("fedyogi", optimizers.yogi(lr, b1=b1, b2=b2, tau=tau), staleness)


KNOWN: dict[str, tuple[str, ...]] = {
    "fedavg": ("lr", "staleness"),
    "fedavgm": ("lr", "decay", "staleness"),
    "fedadam": ("lr", "b1", "b2", "tau", "staleness"),
    "fedyogi": ("lr", "b1", "b2", "tau", "staleness"),
}
FACTORIES: dict[str, Callable[..., Strategy]] = {
    "fedavg": fedavg,
    "fedavgm": fedavgm,
    "fedadam": fedadam,
    "fedyogi": fedyogi,
}


def from_spec(spec: Sequence[object] | str) -> Strategy:
    """Return the strategy that a spec spells: ``["fedadam", {"lr": 0.02}]``, or just its name.

    Raises: ConfigError for an unknown name or wrong settings.
    """
    name, settings = optimizers.settings_of(spec, KNOWN, "strategy")
    return FACTORIES[name](**settings)


def _strategy(name: str, server: ServerOptimizer, staleness: float) -> Strategy:
    settings = server.spec[1]
    assert isinstance(settings, dict)  # noqa: S101 - every optimizer's spec is [name, settings]
    spec: Spec = [name, {**settings, "staleness": staleness}]
    return Strategy(name, aggregators.weighted_mean(), server, polynomial(staleness), spec)
