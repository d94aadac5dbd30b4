# SPDX-License-Identifier: Apache-2.0
"""What trouble and slowness cost: 21 people's phones, the product's coordinator, virtual time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from loading import module_at
from virtual_fleet import Fleet, Nature, Rows, Run, steady, troubled

from coordinator import pacing, strategy
from coordinator.compiler import build, momentum
from coordinator.pacing import Pace
from coordinator.strategy import Strategy
from coordinator.task import Task
from edge_sdk.bundle import Bundle
from edge_sdk.trainer import Trainer
from edge_sdk.types import Params

pytestmark = [pytest.mark.shared, pytest.mark.slow, pytest.mark.timeout(1800)]

UPDATES = 300
"""Thirty rounds of ten."""
DEADLINE_S = 600.0
GOALS = (0.80, 0.82, 0.84, 0.86)
MODELS = Path(__file__).parents[2] / "models"

Seeds = Callable[[int], range]
Figure = Callable[..., None]


class People(NamedTuple):
    """The rows of each phone, the rows of nine people who were never asked, and the model."""

    devices: list[Rows]
    test: Rows
    build: Callable[[int], Bundle]

    def live(
        self, pace: Pace, nature: Nature, seed: int, until: Callable[[Run], bool], how: Strategy
    ) -> Run:
        """Let the phones live by a pace until `until` holds."""
        bundle = self.build(seed)
        judge = Trainer(bundle)

        def score(params: Params) -> float:
            judge.load_params(params)
            return judge.evaluate(*self.test)["accuracy"]

        task = Task("t", bundle, strategy=how, epochs=2, seed=seed)
        fleet = Fleet(bundle, self.devices, task, nature=nature, score=score, seed=seed)
        return fleet.live(pace, until)


@pytest.fixture(scope="module")
def people(shared: Path) -> People:
    found = module_at(shared / "data" / "load.py").load("har")
    recipe = module_at(MODELS / "har" / "build.py")
    owners, optimizer = found["client_train"], momentum(0.9, lr=0.05)
    rows = [
        (found["x_train"][owners == i], found["y_train"][owners == i]) for i in np.unique(owners)
    ]
    return People(
        rows,
        (found["x_test"], found["y_test"]),
        lambda seed: build(recipe.build(seed), loss="cross_entropy", optimizer=optimizer),
    )


def test_half_lost_and_a_third_late_costs_nothing_at_an_equal_number_of_updates(
    people: People, seeds: Seeds, figure: Figure
) -> None:
    """Of all invitations 50 % end with the device gone, 30 % in an update after the deadline."""

    def enough(run: Run) -> bool:
        return bool(run.points) and run.points[-1].updates >= UPDATES

    gaps = []
    for seed in seeds(5):
        calm = people.live(
            pacing.rounds(cohort=10, deadline_s=DEADLINE_S),
            steady([60.0] * len(people.devices)),
            seed,
            enough,
            strategy.fedavg(),
        )
        rough = people.live(
            pacing.rounds(cohort=10, quorum=3, deadline_s=DEADLINE_S, overselect="auto", extend=1),
            troubled(0.5, 0.3, DEADLINE_S),
            seed,
            enough,
            strategy.fedavg(),
        )
        gaps.append(calm.last(5, UPDATES) - rough.last(5, UPDATES))
        late = sum(len(r.late) for r in rough.results)
        assert late > UPDATES / 6
        assert sum(len(r.left) for r in rough.results) > UPDATES / 6
        figure(f"har, seed {seed}, calm, mean of the last 5 versions", calm.last(5, UPDATES))
        figure(f"har, seed {seed}, troubled, mean of the last 5 versions", rough.last(5, UPDATES))
    mean = float(np.mean(gaps))
    figure("har, what 50 % lost and 30 % late cost, mean of seeds", mean, "<= 0.02")
    assert mean <= (0.02 if len(gaps) > 1 else 0.03)  # one seed may waver


def test_a_buffer_comes_as_far_as_rounds_in_half_the_time_beside_slow_boards(
    people: People, seeds: Seeds, figure: Figure
) -> None:
    """The slowest board takes ten times as long as the quickest; times in virtual seconds.

    Reached is an accuracy when the mean of five versions in a row has it.
    """
    ratios = []
    for seed in seeds(3):
        times_s = np.geomspace(10.0, 100.0, len(people.devices))
        np.random.default_rng([seed, 5]).shuffle(times_s)
        nature = steady(times_s.tolist())
        in_rounds = people.live(
            pacing.rounds(cohort=10, quorum=5, deadline_s=300, overselect=1.3, adapt=1.0),
            nature,
            seed,
            lambda run: run.reached_s(GOALS[-1]) < np.inf,
            strategy.fedavg(),
        )
        buffered = people.live(
            pacing.buffered(size=5, concurrency=15, deadline_s=300),
            nature,
            seed,
            lambda run: run.reached_s(GOALS[-1]) < np.inf,
            strategy.fedbuff(),
        )
        for name, run in (("rounds", in_rounds), ("buffered", buffered)):
            every = run.points[:: max(1, len(run.points) // 8)]
            curve = ", ".join(f"{p.at_s:.0f} s {p.score:.2f}" for p in every)
            figure(f"har, seed {seed}, {name}, curve", curve)
            reached = ", ".join(f"{goal:g}: {run.reached_s(goal):.0f} s" for goal in GOALS)
            figure(f"har, seed {seed}, {name}, reached", reached)
            figure(f"har, seed {seed}, {name}, updates in all", run.points[-1].updates)
        each = [buffered.reached_s(goal) / in_rounds.reached_s(goal) for goal in GOALS]
        ratios.append(float(np.mean(each)))
        figure(f"har, seed {seed}, time of buffered over rounds, mean of goals", ratios[-1])
    figure("har, time of buffered over rounds, mean of seeds", float(np.mean(ratios)), "<= 0.5")
    assert np.mean(ratios) <= (0.5 if len(ratios) > 1 else 0.75)  # one seed may waver
