# SPDX-License-Identifier: Apache-2.0
"""The demo without its processes: the shipped int8 model, ten devices, fifteen rounds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation import Plan, federate
from loading import module_at

from coordinator.compiler import build, momentum
from coordinator.demo import score
from coordinator.demo.data import dirichlet
from coordinator.demo.settings import Settings

RECIPE = Path(__file__).parents[2] / "models" / "digits" / "build.py"


@pytest.fixture(scope="module")
def recipe() -> Any:
    return module_at(RECIPE)


def test_the_parts_of_the_digits_share_no_row(recipe: Any) -> None:
    for seed in range(3):
        parts = recipe.split(seed)
        assert [len(part.y) for part in parts] == [397, 80, 1320]
        rows = np.concatenate([part.x.reshape(len(part.x), -1) for part in parts])
        assert len(np.unique(rows, axis=0)) >= 1797 - 5  # a few digits are drawn alike
        assert set(np.unique(parts.pretrain.y)) == set(range(10))


def _learned(recipe: Any, seed: int, codec: str, downlink: str = "dense") -> dict[str, float]:
    """Return accuracies of the int8 file by plain onnxruntime, and how much smaller updates are."""
    settings, rows = Settings(), recipe.split(seed)
    optimizer = momentum(0.9, lr=settings.lr)
    bundle = build(recipe.build(seed), loss="cross_entropy", optimizer=optimizer)
    owner = dirichlet(rows.devices.y, 10, 0.5, np.random.default_rng(seed))
    devices = [(rows.devices.x[owner == i], rows.devices.y[owner == i]) for i in range(10)]
    plan = Plan(
        settings.rounds,
        10,
        settings.epochs,
        settings.batch,
        settings.lr,
        codec=codec,
        seed=seed,
        downlink=downlink,
    )
    judge = score.Judge(bundle, *rows.test)
    done = federate(bundle, devices, plan, judge.score)
    steps = [settings.rounds * settings.epochs * -(-len(y) // settings.batch) for _, y in devices]
    alone = score.alone(judge, devices, steps, batch=settings.batch, seed=seed)
    size = 4 * sum(value.size for value in done.params.values())
    return {
        "before": judge.score(bundle.params()),
        "after": done.scores[-1],
        "alone": float(np.mean([judge.score_of(model) for model in alone])),
        "ratio": size / float(np.mean(done.sizes)),
        "weights": size / 4,
        "last": float(np.mean(done.scores[-3:])),
        "patches": size / float(np.mean(done.patches)),
    }


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_devices_learn_what_none_of_them_could_alone(
    recipe: Any, seeds: Callable[[int], range], figure: Callable[..., None]
) -> None:
    runs = [_learned(recipe, seed, "default") for seed in seeds(5)]
    dense = [_learned(recipe, seed, "dense")["after"] for seed in seeds(5)]
    mean = {name: float(np.mean([run[name] for run in runs])) for name in runs[0]}
    figure("digits in process: shipped model", mean["before"])
    figure("digits in process: average device alone", mean["alone"])
    figure("digits in process: federation", mean["after"], ">= 0.95")
    figure("digits in process: federation, uncompressed", float(np.mean(dense)))
    figure("digits in process: dense float32 / update body", mean["ratio"], ">= 25")
    assert mean["weights"] >= 30_000
    assert mean["after"] >= 0.95
    assert mean["after"] >= mean["before"] + 0.05
    assert mean["after"] >= mean["alone"] + 0.15
    assert mean["after"] >= float(np.mean(dense)) - 0.01
    assert mean["ratio"] >= 25


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_patches_down_cost_no_accuracy(
    recipe: Any, seeds: Callable[[int], range], figure: Callable[..., None]
) -> None:
    patched = [_learned(recipe, seed, "default", "downlink") for seed in seeds(5)]
    whole = [_learned(recipe, seed, "default") for seed in seeds(5)]
    last, dense, ratio = (
        float(np.mean([run[name] for run in runs]))
        for runs, name in ((patched, "last"), (whole, "last"), (patched, "patches"))
    )
    figure("digits in process: patches down, mean of the last 3 rounds", last)
    figure("digits in process: whole weights down, mean of the last 3 rounds", dense)
    figure("digits in process: dense float32 / patch", ratio, ">= 10")
    assert ratio >= 10
    assert last >= dense - (0.005 if len(patched) > 1 else 0.01)
