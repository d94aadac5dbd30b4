# SPDX-License-Identifier: Apache-2.0
"""Federated rounds in one process, with the trainer, codec and aggregator that the product uses.

No broker, no clock: what is left is learning, so that a hundred rounds take seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coordinator import sums
from coordinator.sums import weight_of
from edge_sdk import codec, params
from edge_sdk.bundle import Bundle
from edge_sdk.trainer import Trainer
from edge_sdk.types import Params

Rows = tuple[NDArray[Any], NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Plan:
    """How a federation learns: rounds of `cohort` devices, each training `epochs` on its rows."""

    rounds: int
    cohort: int
    epochs: int
    batch: int
    lr: float
    codec: str = "default"
    seed: int = 0
    downlink: str = "dense"


@dataclass(slots=True)
class Outcome:
    """The score of each version from 1 on, the bytes of each update body and of each patch."""

    params: Params
    scores: list[float] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    patches: list[int] = field(default_factory=list)


def federate(
    bundle: Bundle, devices: Sequence[Rows], plan: Plan, score: Callable[[Params], float]
) -> Outcome:
    """Run all rounds; everybody who is invited reports."""
    chosen = codec.from_spec(plan.codec)
    states = [chosen.init(bundle.shapes, seed=i) for i in range(len(devices))]
    trainer, rng = Trainer(bundle, seed=plan.seed), np.random.default_rng(plan.seed)
    outcome = Outcome(bundle.params())
    target, down = params.flatten(outcome.params, bundle.shapes), codec.from_spec(plan.downlink)
    for _ in range(plan.rounds):
        state = sums.init(params.count(bundle.shapes))
        for i in rng.choice(len(devices), plan.cohort, replace=False):
            x, y = devices[i]
            trainer.load_params(outcome.params)
            trainer.fit(x, y, epochs=plan.epochs, batch=plan.batch, lr=plan.lr)
            blob, pending = chosen.encode(trainer.delta(), states[i])
            states[i] = chosen.commit(pending, accepted=True)
            outcome.sizes.append(len(blob))
            state = sums.add(state, codec.lattice(blob, bundle.shapes), weight_of(len(y)))
        target = target + sums.mean(state)
        gap = target - params.flatten(outcome.params, bundle.shapes)
        patch, _ = down.encode(params.unflatten(gap, bundle.shapes), down.init(bundle.shapes))
        outcome.patches.append(len(patch))
        step = down.decode(patch, bundle.shapes)
        outcome.params = params.apply(outcome.params, step)
        outcome.scores.append(score(outcome.params))
    return outcome
