# SPDX-License-Identifier: Apache-2.0
"""Real people, real sensors: 21 phones learn what their owners do; 9 other people are the test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation import Plan, federate
from loading import module_at

from coordinator.compiler import build, momentum
from edge_sdk.bundle import Bundle
from edge_sdk.trainer import Trainer

ROUNDS, COHORT, EPOCHS, BATCH, LR = 30, 10, 2, 32, 0.05
MODELS = Path(__file__).parents[2] / "models"


@pytest.fixture(scope="module")
def people(shared: Path) -> dict[str, Any]:
    return module_at(shared / "data" / "load.py").load("har")


@pytest.fixture(scope="module")
def bundles() -> Callable[[int], Bundle]:
    recipe = module_at(MODELS / "har" / "build.py")
    optimizer = momentum(0.9, lr=LR)
    return lambda seed: build(recipe.build(seed), loss="cross_entropy", optimizer=optimizer)


def _last_rounds(people: dict[str, Any], bundle: Bundle, codec: str, seed: int) -> float:
    """Return the mean accuracy of versions 26 to 30 on people who were never asked."""
    owners = people["client_train"]
    rows = [owners == person for person in np.unique(owners)]
    devices = [(people["x_train"][r], people["y_train"][r]) for r in rows]
    judge = Trainer(bundle)

    def score(params: Any) -> float:
        judge.load_params(params)
        return judge.evaluate(people["x_test"], people["y_test"])["accuracy"]

    plan = Plan(ROUNDS, COHORT, EPOCHS, BATCH, LR, codec=codec, seed=seed)
    return float(np.mean(federate(bundle, devices, plan, score).scores[-5:]))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.shared
def test_people_learn_together_with_the_default_codec_as_well_as_uncompressed(
    people: dict[str, Any],
    bundles: Callable[[int], Bundle],
    seeds: Callable[[int], range],
    figure: Callable[..., None],
) -> None:
    compressed, dense = [], []
    for seed in seeds(3):
        bundle = bundles(seed)
        compressed.append(_last_rounds(people, bundle, "default", seed))
        dense.append(_last_rounds(people, bundle, "dense", seed))
        figure(f"har, seed {seed}, default codec, mean of rounds 26-30", compressed[-1])
        figure(f"har, seed {seed}, dense, mean of rounds 26-30", dense[-1])
    figure("har, default codec, mean of seeds", float(np.mean(compressed)), ">= 0.80")
    figure(
        "har, dense minus default codec, mean of seeds",
        float(np.mean(dense) - np.mean(compressed)),
        "<= 0.015",
    )
    assert np.mean(compressed) >= 0.80
    assert np.mean(dense) - np.mean(compressed) <= 0.015
