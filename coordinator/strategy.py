# SPDX-License-Identifier: Apache-2.0
"""How a task learns from reports: an aggregator, a server optimizer and a staleness discount.

A strategy is a value. FedAdam is not a class, it is `adam` given to a weighted mean. Every one
takes `staleness`, the exponent of `polynomial`, and `clip`, an L2 norm that updates are scaled down
to.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from coordinator import aggregators, optimizers
from coordinator.aggregators import BUCKETS, Aggregator
from coordinator.optimizers import ServerOptimizer
from edge_sdk.errors import ConfigError
from edge_sdk.types import Spec

HOLD = 1e-4
"""SCAFFOLD's mu: its correction comes by way of the anchor, the pull to the base is nothing."""

Discount = Callable[[int], float]
"""From staleness, in versions, to the share of its weight that an update keeps: above 0 up to 1."""


class Strategy(NamedTuple):
    """A strategy as a value; change one part with `_replace`."""

    name: str
    aggregator: Aggregator
    server: ServerOptimizer
    discount: Discount
    spec: Spec
    mu: float | None = None
    """How strongly devices are pulled towards the model that they began with."""
    correction: str | None = None
    """What devices add to their gradients, by its name in `edge_sdk.correction`; it needs `mu`."""


def polynomial(exponent: float = 0.5) -> Discount:
    """Discount staleness s to (1 + s) ** -exponent (Xie et al. 2019, "polynomial"); 0 is none.

    Raises: ConfigError for a negative exponent.
    """
    if not 0 <= exponent < float("inf"):
        raise ConfigError(f"expected a staleness exponent from 0, got {exponent}")

    def discount(staleness: int) -> float:
        return float((1 + max(0, staleness)) ** -exponent)

    return discount


def fedavg(lr: float = 1.0, *, staleness: float = 0.5, clip: float | None = None) -> Strategy:
    """Add the weighted mean delta to the model (McMahan et al. 2017)."""
    return _strategy("fedavg", optimizers.sgd(lr), staleness, clip)


def fedavgm(
    lr: float = 1.0, *, decay: float = 0.9, staleness: float = 0.5, clip: float | None = None
) -> Strategy:
    """Like `fedavg`, with momentum at the coordinator (Hsu et al. 2019)."""
    return _strategy("fedavgm", optimizers.momentum(lr, decay=decay), staleness, clip)


def fedadagrad(
    lr: float = 0.02,
    *,
    b1: float = 0.0,
    tau: float = 1e-3,
    staleness: float = 0.5,
    clip: float | None = None,
) -> Strategy:
    """Step with adagrad along the weighted mean delta (Reddi et al. 2021)."""
    return _strategy("fedadagrad", optimizers.adagrad(lr, b1=b1, tau=tau), staleness, clip)


def fedadam(
    lr: float = 0.02,
    *,
    b1: float = 0.9,
    b2: float = 0.99,
    tau: float = 1e-3,
    staleness: float = 0.5,
    clip: float | None = None,
) -> Strategy:
    """Step with adam along the weighted mean delta (Reddi et al. 2021)."""
    return _strategy("fedadam", optimizers.adam(lr, b1=b1, b2=b2, tau=tau), staleness, clip)


def fedyogi(
    lr: float = 0.02,
    *,
    b1: float = 0.9,
    b2: float = 0.99,
    tau: float = 1e-3,
    staleness: float = 0.5,
    clip: float | None = None,
) -> Strategy:
    """Step with yogi along the weighted mean delta (Reddi et al. 2021)."""
    return _strategy("fedyogi", optimizers.yogi(lr, b1=b1, b2=b2, tau=tau), staleness, clip)


def fedprox(
    mu: float = 0.01, lr: float = 1.0, *, staleness: float = 0.5, clip: float | None = None
) -> Strategy:
    """Like `fedavg`, with devices pulled towards the model they began with by mu / 2 * |w - w0|^2.

    Li et al. 2020, "Federated optimization in heterogeneous networks", eq. 2. The bundle must be
    built with `proximal=True`.
    """
    if not 0 < mu < float("inf"):
        raise ConfigError(f"fedprox: expected mu above 0, got {mu}")
    made = _strategy("fedprox", optimizers.sgd(lr), staleness, clip, settings={"mu": mu})
    return made._replace(mu=mu)


def fednova(
    lr: float = 1.0, *, decay: float = 0.0, staleness: float = 0.5, clip: float | None = None
) -> Strategy:
    """Average deltas per local step, so that partial work does not bias (Wang et al. 2020).

    `decay` is that of the devices' momentum.
    """
    aggregator = aggregators.normalized_mean(decay)
    server, settings = optimizers.sgd(lr), {"decay": decay}
    return _strategy("fednova", server, staleness, clip, fold=aggregator, settings=settings)


def fedbuff(lr: float = 1.0, *, staleness: float = 0.5, clip: float | None = None) -> Strategy:
    """Add the mean of discounted deltas: for the pace `buffered` (Nguyen et al. 2022)."""
    return _strategy("fedbuff", optimizers.sgd(lr), staleness, clip, fold=aggregators.plain_mean())


def feddyn(
    alpha: float = 0.1, *, devices: int = 100, staleness: float = 0.0, clip: float | None = None
) -> Strategy:
    """Let each device pull the less the way it has pulled before (Acar et al. 2021, algorithm 1).

    The devices' gradients gain alpha * (w - w0 + what they added so far), the model gains the mean
    delta and the mean of what all `devices` of the task added so far. At rest the devices' losses
    have no slope together, however their examples differ: that does not depend on `devices`, which
    sets how far a round goes. The bundle must be built with `proximal=True`. A discount or a clip
    makes the coordinator count less than a device does: without them the two agree.
    """
    if not 0 < alpha < float("inf"):
        raise ConfigError(f"feddyn: expected alpha above 0, got {alpha}")
    made = _strategy(
        "feddyn",
        optimizers.dynamic(devices),
        staleness,
        clip,
        fold=aggregators.plain_mean(),
        settings={"alpha": alpha},
    )
    return made._replace(mu=alpha, correction="feddyn")


def scaffold(
    lr: float = 1.0,
    *,
    devices: int = 20,
    decay: float = 0.0,
    staleness: float = 0.0,
    clip: float | None = None,
) -> Strategy:
    """Let each device's steps be as all devices' together (Karimireddy et al. 2020, option II).

    What a step of a device moves the weights by is known from its last round; the difference to
    that of all `devices` of the task, which comes with the invitation, is taken off its gradients.
    `decay` is that of the devices' momentum. The bundle must be built with `proximal=True`, with
    sgd or momentum, for at most 150,000 trainable numbers. As with `feddyn`, a discount or a clip
    makes the coordinator count less than a device does.
    """
    made = _strategy(
        "scaffold",
        optimizers.controlled(lr, devices=devices),
        staleness,
        clip,
        fold=aggregators.stepwise_mean(decay),
        settings={"decay": decay},
    )
    return made._replace(mu=HOLD, correction="scaffold")


def qfedavg(
    q: float = 0.2, *, local_lr: float = 0.1, staleness: float = 0.5, clip: float | None = None
) -> Strategy:
    """Weigh devices by their loss to the power q, so that the worst served gain (Li et al. 2020).

    `local_lr`: the learning rate of the devices.
    """
    aggregator = aggregators.fair_mean(q, local_lr)
    settings = {"q": q, "local_lr": local_lr}
    return _strategy(
        "qfedavg", optimizers.sgd(), staleness, clip, fold=aggregator, settings=settings, lr=False
    )


def median(
    lr: float = 1.0, *, buckets: int = BUCKETS, staleness: float = 0.5, clip: float | None = None
) -> Strategy:
    """Step by the median over buckets of devices (Yin et al. 2018)."""
    aggregator, server = aggregators.median(buckets), optimizers.sgd(lr)
    return _strategy(
        "median", server, staleness, clip, fold=aggregator, settings={"buckets": buckets}
    )


def trimmed_mean(
    cut: float = 0.2,
    lr: float = 1.0,
    *,
    buckets: int = BUCKETS,
    staleness: float = 0.5,
    clip: float | None = None,
) -> Strategy:
    """Step by the mean over buckets without the largest and smallest (Yin et al. 2018)."""
    aggregator, settings = aggregators.trimmed_mean(cut, buckets), {"cut": cut, "buckets": buckets}
    return _strategy(
        "trimmed_mean", optimizers.sgd(lr), staleness, clip, fold=aggregator, settings=settings
    )


def krum(
    attackers: int = 1,
    lr: float = 1.0,
    *,
    buckets: int = BUCKETS,
    staleness: float = 0.5,
    clip: float | None = None,
) -> Strategy:
    """Step by the bucket nearest to its neighbours (Blanchard et al. 2017)."""
    aggregator = aggregators.krum(attackers, buckets)
    settings = {"attackers": attackers, "buckets": buckets}
    return _strategy(
        "krum", optimizers.sgd(lr), staleness, clip, fold=aggregator, settings=settings
    )


def multi_krum(
    attackers: int = 1,
    keep: int = 3,
    lr: float = 1.0,
    *,
    buckets: int = BUCKETS,
    staleness: float = 0.5,
    clip: float | None = None,
) -> Strategy:
    """Step by the mean of the `keep` buckets nearest to their neighbours (the same paper)."""
    aggregator = aggregators.krum(attackers, buckets, keep=keep)
    settings = {"attackers": attackers, "keep": keep, "buckets": buckets}
    return _strategy(
        "multi_krum", optimizers.sgd(lr), staleness, clip, fold=aggregator, settings=settings
    )


def geometric_median(
    lr: float = 1.0, *, buckets: int = BUCKETS, staleness: float = 0.5, clip: float | None = None
) -> Strategy:
    """Step by the geometric median over buckets of devices (Pillutla et al. 2022)."""
    aggregator, server = aggregators.geometric_median(buckets), optimizers.sgd(lr)
    return _strategy(
        "geometric_median", server, staleness, clip, fold=aggregator, settings={"buckets": buckets}
    )


FACTORIES: dict[str, Callable[..., Strategy]] = {
    factory.__name__: factory
    for factory in (
        fedavg,
        fedavgm,
        fedadagrad,
        fedadam,
        fedyogi,
        fedprox,
        fednova,
        fedbuff,
        feddyn,
        scaffold,
        qfedavg,
        median,
        trimmed_mean,
        krum,
        multi_krum,
        geometric_median,
    )
}
WHOLE = frozenset({"buckets", "attackers", "keep", "devices"})
"""Settings that are whole numbers."""


def from_spec(spec: Sequence[object] | str) -> Strategy:
    """Return the strategy that a spec spells: ``["fedadam", {"lr": 0.02}]``, or just its name.

    Raises: ConfigError for an unknown name or wrong settings.
    """
    known = {name: tuple(inspect.signature(f).parameters) for name, f in FACTORIES.items()}
    name, settings = optimizers.settings_of(spec, known, "strategy")
    for key in WHOLE & settings.keys():
        if settings[key] != int(settings[key]):
            raise ConfigError(f"{name}: expected a whole number for {key}, got {settings[key]}")
    whole = {key: int(value) if key in WHOLE else value for key, value in settings.items()}
    return FACTORIES[name](**whole)


def _strategy(
    name: str,
    server: ServerOptimizer,
    staleness: float,
    clip: float | None,
    *,
    fold: Aggregator | None = None,
    settings: Mapping[str, float] | None = None,
    lr: bool = True,
) -> Strategy:
    """Join the parts; `lr`: the server's settings are the strategy's, too."""
    own = server.spec[1] if lr else {}
    assert isinstance(own, dict)  # noqa: S101 - every optimizer's spec is [name, settings]
    limit = {} if clip is None else {"clip": clip}
    spec: Spec = [name, {**own, **(settings or {}), "staleness": staleness, **limit}]
    fold = fold or aggregators.weighted_mean()
    fold = fold if clip is None else aggregators.clipped(fold, clip)
    return Strategy(name, fold, server, polynomial(staleness), spec)
