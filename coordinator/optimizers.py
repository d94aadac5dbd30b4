# SPDX-License-Identifier: Apache-2.0
"""What the coordinator does with the mean delta of a round: sgd, momentum, adam, dynamic, ..

After Reddi et al., "Adaptive federated optimization" (2021), algorithm 2; `sgd(1.0)` is FedAvg
(McMahan et al. 2017), `momentum` is FedAvgM (Hsu et al. 2019). There the round's pseudo-gradient is
the mean delta, which we add. All arithmetic is elementwise float32, so every machine that replays a
round gets the same bits.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from edge_sdk.correction import pack, unpack
from edge_sdk.errors import ConfigError, StoreError
from edge_sdk.types import Array, Spec

HEAD = struct.Struct("<4sHBBQ")  # magic, version, number of slots, kind, n
MAGIC = b"FDGO"


@dataclass(frozen=True, slots=True)
class Slots:
    """What an optimizer remembers between rounds: flat float32 vectors, as many as it needs.

    `kind` tells apart what has as many but means another thing.
    """

    vectors: tuple[Array, ...] = ()
    kind: int = 0


class Step(Protocol):
    """What makes the next version of the mean of `updates` deltas; leaves its inputs alone.

    `beside`: what the aggregator has beside the mean.
    """

    def __call__(
        self,
        params: Array,
        mean_delta: Array,
        state: Slots,
        updates: int = 1,
        beside: Array | None = None,
    ) -> tuple[Array, Slots]: ...


class ServerOptimizer(NamedTuple):
    """A server optimizer as a value. `control` is what devices are told of its state, if anything.

    As bytes: see `edge_sdk.correction.unpack`.
    """

    spec: Spec
    init: Callable[[int], Slots]
    step: Step
    dump: Callable[[Slots], bytes]
    load: Callable[[bytes, int], Slots]
    control: Callable[[Slots], bytes] | None = None


def sgd(lr: float = 1.0) -> ServerOptimizer:
    """Add `lr` times the mean delta: x + lr * d."""
    _positive("sgd", "lr", lr)

    def step(params: Array, mean_delta: Array, state: Slots) -> tuple[Array, Slots]:
        return params + np.float32(lr) * mean_delta, state

    return _optimizer("sgd", {"lr": lr}, (), _plain(step))


def momentum(lr: float = 1.0, *, decay: float = 0.9) -> ServerOptimizer:
    """Add a decaying sum of mean deltas: m = decay * m + d; x + lr * m."""
    _positive("momentum", "lr", lr)
    _share("momentum", "decay", decay)

    def step(params: Array, mean_delta: Array, state: Slots) -> tuple[Array, Slots]:
        (m,) = state.vectors
        m = np.float32(decay) * m + mean_delta
        return params + np.float32(lr) * m, Slots((m,))

    return _optimizer("momentum", {"lr": lr, "decay": decay}, (0.0,), _plain(step))


def adam(
    lr: float = 0.02, *, b1: float = 0.9, b2: float = 0.99, tau: float = 1e-3
) -> ServerOptimizer:
    """Scale each number by the mean square of its past: v = b2 * v + (1 - b2) * d^2."""

    def second(v: Array, square: Array) -> Array:
        return np.float32(b2) * v + np.float32(1 - b2) * square

    return _adaptive("adam", second, {"lr": lr, "b1": b1, "b2": b2, "tau": tau})


def yogi(
    lr: float = 0.02, *, b1: float = 0.9, b2: float = 0.99, tau: float = 1e-3
) -> ServerOptimizer:
    """Like `adam`, but v changes by no more than d^2: v - (1 - b2) * d^2 * sign(v - d^2)."""

    def second(v: Array, square: Array) -> Array:
        change: Array = np.float32(1 - b2) * square * np.sign(v - square)
        return v - change

    return _adaptive("yogi", second, {"lr": lr, "b1": b1, "b2": b2, "tau": tau})


def adagrad(lr: float = 0.02, *, b1: float = 0.0, tau: float = 1e-3) -> ServerOptimizer:
    """Scale each number by the sum of the squares of its past: v = v + d^2."""
    return _adaptive("adagrad", np.add, {"lr": lr, "b1": b1, "tau": tau})


def dynamic(devices: int = 100) -> ServerOptimizer:
    """Add the mean delta and the mean over all `devices` of what each ever added: x + d + s.

    The server of FedDyn (Acar et al. 2021, "Federated learning based on dynamic regularization",
    algorithm 1): h = h - alpha * (sum of d) / m and x = mean of models - h / alpha. Here s is
    -h / alpha.
    """
    _at_least_one("dynamic", devices)

    def step(
        params: Array,
        mean_delta: Array,
        state: Slots,
        updates: int = 1,
        beside: Array | None = None,
    ) -> tuple[Array, Slots]:
        del beside
        (s,) = state.vectors
        s = s + np.float32(min(1.0, updates / devices)) * mean_delta
        return params + mean_delta + s, Slots((s,), kind=1)

    return _optimizer("dynamic", {"devices": devices}, (0.0,), step, kind=1)


def controlled(lr: float = 1.0, *, devices: int = 20) -> ServerOptimizer:
    """Add `lr` times the mean delta, and keep what a step of all `devices` moves: SCAFFOLD.

    Karimireddy et al. 2020, algorithm 1, lines 16 and 17, with u = -local_lr * c: u becomes
    u + (sum over those who reported of d / steps - u) / m. The u that is taken off is the one that
    devices were told, so that theirs and this one agree.
    """
    _positive("controlled", "lr", lr)
    _at_least_one("controlled", devices)

    def step(
        params: Array,
        mean_delta: Array,
        state: Slots,
        updates: int = 1,
        beside: Array | None = None,
    ) -> tuple[Array, Slots]:
        (u,) = state.vectors
        if beside is not None:
            told = unpack(pack(u), u.size)
            u = u + np.float32(min(1.0, updates / devices)) * (beside - told)
        return params + np.float32(lr) * mean_delta, Slots((u,), kind=2)

    made = _optimizer("controlled", {"lr": lr, "devices": devices}, (0.0,), step, kind=2)
    return made._replace(control=lambda state: pack(state.vectors[0]))


KNOWN: dict[str, tuple[str, ...]] = {
    "sgd": ("lr",),
    "momentum": ("lr", "decay"),
    "adagrad": ("lr", "b1", "tau"),
    "adam": ("lr", "b1", "b2", "tau"),
    "yogi": ("lr", "b1", "b2", "tau"),
    "dynamic": ("devices",),
    "controlled": ("lr", "devices"),
}
FACTORIES: dict[str, Callable[..., ServerOptimizer]] = {
    "sgd": sgd,
    "momentum": momentum,
    "adagrad": adagrad,
    "adam": adam,
    "yogi": yogi,
    "dynamic": dynamic,
    "controlled": controlled,
}


def from_spec(spec: Sequence[object] | str) -> ServerOptimizer:
    """Return the optimizer that a spec spells: ``["adam", {"lr": 0.02}]``, or just its name.

    Raises: ConfigError for an unknown name or wrong settings.
    """
    name, settings = settings_of(spec, KNOWN, "server optimizer")
    return FACTORIES[name](**settings)


def settings_of(
    spec: Sequence[object] | str, known: Mapping[str, tuple[str, ...]], what: str
) -> tuple[str, dict[str, float]]:
    """Return the name and the numeric settings of a spec, each of them known.

    Raises: ConfigError otherwise, with what would have been right.
    """
    name, *rest = [spec] if isinstance(spec, str) else [*spec] or [None]
    if not isinstance(name, str) or name not in known:
        raise ConfigError(f"expected a {what} among {', '.join(known)}, got {spec!r:.80}")
    settings = rest[0] if rest else {}
    if len(rest) > 1 or not isinstance(settings, dict):
        raise ConfigError(f"expected [name, settings] for a {what}, got {spec!r:.80}")
    for key, value in settings.items():
        if key not in known[name]:
            raise ConfigError(f"{name}: expected {', '.join(known[name])}, got {key!r:.40}")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{name}: expected a number for {key}, got {value!r:.40}")
    return name, {key: float(value) for key, value in settings.items()}


def _plain(step: Callable[[Array, Array, Slots], tuple[Array, Slots]]) -> Step:
    """Make a step of one that does not ask how many devices the mean is of."""

    def of_any(
        params: Array,
        mean_delta: Array,
        state: Slots,
        updates: int = 1,
        beside: Array | None = None,
    ) -> tuple[Array, Slots]:
        del updates, beside
        return step(params, mean_delta, state)

    return of_any


def _optimizer(
    name: str,
    settings: dict[str, float],
    starts: tuple[float, ...],
    step: Step,
    kind: int = 0,
) -> ServerOptimizer:
    def init(count: int) -> Slots:
        return Slots(tuple(np.full(count, start, np.float32) for start in starts), kind)

    def load(data: bytes, count: int) -> Slots:
        return _load(data, count, (len(starts), kind), name)

    return ServerOptimizer([name, settings], init, step, _dump, load)


def _adaptive(
    name: str, second: Callable[[Array, Array], Array], settings: dict[str, float]
) -> ServerOptimizer:
    """Build adagrad, adam and yogi, which differ in the second moment alone (v from tau^2)."""
    lr, b1, tau = (settings[key] for key in ("lr", "b1", "tau"))
    _positive(name, "lr", lr)
    _positive(name, "tau", tau)
    _share(name, "b1", b1)
    _share(name, "b2", settings.get("b2", 0.0))

    def step(params: Array, mean_delta: Array, state: Slots) -> tuple[Array, Slots]:
        m, v = state.vectors
        m = np.float32(b1) * m + np.float32(1 - b1) * mean_delta
        v = second(v, mean_delta * mean_delta)
        root: Array = np.sqrt(v)
        change: Array = np.float32(lr) * m / (root + np.float32(tau))
        return params + change, Slots((m, v))

    return _optimizer(name, settings, (0.0, tau * tau), _plain(step))


def _dump(state: Slots) -> bytes:
    count = state.vectors[0].size if state.vectors else 0
    head = HEAD.pack(MAGIC, 1, len(state.vectors), state.kind, count)
    return head + b"".join(vector.astype("<f4").tobytes() for vector in state.vectors)


def _load(data: bytes, count: int, form: tuple[int, int], name: str) -> Slots:
    slots, kind = form
    if len(data) < HEAD.size or data[:4] != MAGIC:
        raise StoreError(f"expected the stored state of {name}, got other bytes")
    _, version, found, its_kind, size = HEAD.unpack_from(data)
    fits = version == 1 and (found, its_kind) == form and (size == count or not slots)
    if not fits or len(data) != HEAD.size + 4 * slots * size:
        raise StoreError(
            f"expected the state of {name} over {count} numbers, got {found} vectors of {size}: "
            "the strategy or the model changed; start a new task"
        )
    flat = np.frombuffer(data, "<f4", offset=HEAD.size).astype(np.float32)
    return Slots(tuple(flat.reshape(slots, size)) if slots else (), kind)


def _positive(name: str, key: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ConfigError(f"{name}: expected {key} above 0, got {value}")


def _at_least_one(name: str, devices: float) -> None:
    if not devices >= 1:
        raise ConfigError(f"{name}: expected at least 1 device, got {devices}")


def _share(name: str, key: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ConfigError(f"{name}: expected {key} from 0 to below 1, got {value}")
