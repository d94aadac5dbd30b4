# SPDX-License-Identifier: Apache-2.0
"""Federated rounds in one process under any strategy: both halves of it, as the product has them.

No broker and no time: what is left is learning, so that a strategy is compared in seconds. Trainer,
codec, aggregator, correction and server optimizer are the product's; devices may be attackers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coordinator.aggregators import Report
from coordinator.sampling import buckets
from coordinator.strategy import Strategy
from edge_sdk import codec, params
from edge_sdk.bundle import Bundle
from edge_sdk.correction import CORRECTIONS, Terms, decay_of, plain_steps, unpack
from edge_sdk.trainer import Trainer
from edge_sdk.types import Array, Params

Rows = tuple[NDArray[Any], NDArray[Any]]
Attack = Callable[[Params], Params]
"""What a poisoned device sends in place of its delta."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How devices learn: `cohort` a round, device i `epochs[i % len(epochs)]` over its rows."""

    rounds: int
    cohort: int
    epochs: tuple[int, ...] = (1,)
    batch: int = 32
    lr: float = 0.1
    codec: str = "default"
    seed: int = 0


@dataclass(slots=True)
class Learned:
    """The score of each version from 1 on, and what came of it all."""

    params: Params
    scores: list[float] = field(default_factory=list)

    def last(self, count: int = 5) -> float:
        """Return the mean of the last scores."""
        return float(np.mean(self.scores[-count:]))


class Learning:
    """Devices with rows of their own that learn one bundle; `run` begins anew each time."""

    def __init__(
        self, bundle: Bundle, devices: Sequence[Rows], score: Callable[[Params], float]
    ) -> None:
        self.bundle, self.devices, self.score = bundle, devices, score
        self._size = params.count(bundle.shapes)
        self._trainer = Trainer(bundle)

    def run(
        self, strategy: Strategy, plan: Plan, poisoned: dict[int, Attack] | None = None
    ) -> Learned:
        """Learn under a strategy. `poisoned`: devices that do not send what they learned."""
        shapes, chain = self.bundle.shapes, codec.from_spec(plan.codec)
        states = [chain.init(shapes, seed=i) for i in range(len(self.devices))]
        owns = np.zeros((len(self.devices), self._size), np.float32)
        rng = np.random.default_rng(plan.seed)
        self._trainer = Trainer(self.bundle, seed=plan.seed)
        flat = params.flatten(self.bundle.params(), shapes)
        memory, learned = strategy.server.init(self._size), Learned(self.bundle.params())
        for number in range(plan.rounds):
            total = strategy.aggregator.init(self._size)
            cohort = [int(i) for i in rng.choice(len(self.devices), plan.cohort, replace=False)]
            places = buckets(map(str, cohort), number, strategy.aggregator.buckets)
            told = strategy.server.control(memory) if strategy.server.control else b""
            terms = Terms(strategy.mu or 0.0, plan.lr, 1.0, unpack(told, self._size))
            for i in cohort:
                epochs = plan.epochs[i % len(plan.epochs)]
                done = self._train(strategy, flat, owns[i], terms, plan, epochs, i)
                delta = self._trainer.delta()
                if poisoned and i in poisoned:
                    delta = poisoned[i](delta)
                blob, pending = chain.encode(delta, states[i])
                states[i] = chain.commit(pending, accepted=True)
                owns[i] = self._moved(strategy, blob, owns[i], terms, done["steps"])
                lattice = codec.lattice(blob, shapes)
                report = Report(
                    len(self.devices[i][1]),
                    done["steps"],
                    done["loss"],
                    codec.norm(lattice),
                    bucket=places[str(i)],
                )
                total = strategy.aggregator.add(total, lattice, report)
            mean, fold = strategy.aggregator.result(total), strategy.aggregator
            beside = fold.beside(total) if fold.beside else None
            flat, memory = strategy.server.step(flat, mean, memory, fold.count(total), beside)
            learned.params = params.unflatten(flat, shapes)
            learned.scores.append(self.score(learned.params))
        return learned

    def _train(  # noqa: PLR0917 - one training, told all of it
        self,
        strategy: Strategy,
        flat: Array,
        own: Array,
        terms: Terms,
        plan: Plan,
        epochs: int,
        i: int,
    ) -> Any:
        shapes, (x, y) = self.bundle.shapes, self.devices[i]
        anchor = None
        if strategy.correction:
            moved = CORRECTIONS[strategy.correction].anchor(flat, own, terms)
            anchor = params.unflatten(moved, shapes)
        self._trainer.load_params(params.unflatten(flat, shapes), anchor)
        return self._trainer.fit(x, y, epochs=epochs, batch=plan.batch, lr=plan.lr, mu=terms.mu)

    def _moved(
        self, strategy: Strategy, blob: bytes, own: Array, terms: Terms, steps: int
    ) -> Array:
        if not strategy.correction:
            return own
        shapes = self.bundle.shapes
        sent = params.flatten(codec.decode(blob, shapes), shapes)
        decay = decay_of(self.bundle.manifest["optimizer"]) or 0.0
        done = terms._replace(steps=plain_steps(steps, decay))
        return CORRECTIONS[strategy.correction].after(own, sent, done)


def sign_flip(times: float = 1.0) -> Attack:
    """Send the opposite of what was learned, `times` as large."""
    return lambda delta: {name: np.float32(-times) * value for name, value in delta.items()}


def scaled(times: float) -> Attack:
    """Send what was learned, so much larger."""
    return lambda delta: {name: np.float32(times) * value for name, value in delta.items()}
