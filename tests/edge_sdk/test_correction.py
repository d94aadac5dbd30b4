# SPDX-License-Identifier: Apache-2.0
"""Both halves of FedDyn and of SCAFFOLD are what their papers write, and do what they promise."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from coordinator import strategy
from coordinator.aggregators import Report
from coordinator.strategy import Strategy
from edge_sdk.codec import Lattice
from edge_sdk.correction import (
    CORRECTIONS,
    MOST,
    Terms,
    decay_of,
    pack,
    plain_steps,
    unpack,
)
from edge_sdk.errors import CodecError
from edge_sdk.messages import MAX_FRAME

ALPHA, LR = 0.5, 0.05
CURVES = np.array([[1.0, 4.0], [3.0, 1.0], [2.0, 9.0], [5.0, 2.0]])
RESTS = np.array([[2.0, -1.0], [-3.0, 0.5], [1.0, 4.0], [0.0, -2.0]])
"""Device k has the loss sum(CURVES[k] / 2 * (w - RESTS[k])**2)."""
BEST = (CURVES * RESTS).sum(0) / CURVES.sum(0)
FINE = 2.0**-20
"""The step of a lattice that loses next to nothing."""
STEPS = (3, 5, 1, 8)
"""How many steps each device does."""

Cohorts = list[list[int]]


def cohorts_of(size: int, rounds: int) -> Cohorts:
    rng = np.random.default_rng(size)
    return [rng.choice(4, size, replace=False).tolist() for _ in range(rounds)]


def lattice(delta: np.ndarray) -> Lattice:
    return Lattice(None, np.rint(delta / FINE).astype(np.int32), FINE)


def minimum(k: int, pull: float, anchor: np.ndarray, slope: np.ndarray) -> np.ndarray:
    """Return where device k's loss + pull/2 |w - anchor|^2 - slope . w is least."""
    return (CURVES[k] * RESTS[k] + pull * anchor + slope) / (CURVES[k] + pull)


def descent(k: int, start: np.ndarray, extra: object, decay: float = 0.0) -> np.ndarray:
    """Do device k's steps along its gradient plus `extra(w)`, a function or a constant."""
    w, velocity = start.astype(np.float64), np.zeros(2)
    for _ in range(STEPS[k]):
        more = extra(w) if callable(extra) else extra
        velocity = decay * velocity + CURVES[k] * (w - RESTS[k]) + more
        w = w - LR * velocity
    return w


def feddyn_by_the_paper(cohorts: Cohorts) -> list[np.ndarray]:
    """Acar et al. 2021, algorithm 1, as it is written."""
    theta, h, slopes = np.zeros(2), np.zeros(2), np.zeros((4, 2))
    made = []
    for cohort in cohorts:
        models = {k: minimum(k, ALPHA, theta, slopes[k]) for k in cohort}
        for k, model in models.items():
            slopes[k] = slopes[k] - ALPHA * (model - theta)
        h = h - ALPHA * sum(model - theta for model in models.values()) / 4
        theta = sum(models.values()) / len(cohort) - h / ALPHA
        made.append(theta)
    return made


def scaffold_by_the_paper(cohorts: Cohorts, server_lr: float) -> list[np.ndarray]:
    """Karimireddy et al. 2020, algorithm 1 with option II, but for what packing c loses of it."""
    x, c, own = np.zeros(2), np.zeros(2), np.zeros((4, 2))
    made = []
    for cohort in cohorts:
        moved, changed = np.zeros(2), np.zeros(2)
        told = -unpack(pack((-LR * c).astype(np.float32)), 2) / LR
        for k in cohort:
            y = descent(k, x, told - own[k])
            new = own[k] - told + (x - y) / (STEPS[k] * LR)
            moved, changed = moved + (y - x), changed + (new - own[k])
            own[k] = new
        x, c = x + server_lr * moved / len(cohort), c + changed / 4
        made.append(x)
    return made


def by_ours(how: Strategy, cohorts: Cohorts, train: object, decay: float = 0.0) -> list[np.ndarray]:
    """Run both halves of a strategy; `train(k, base, anchor, mu)` returns a local model."""
    params, owns = np.zeros(2, np.float32), np.zeros((4, 2), np.float32)
    state, made = how.server.init(2), []
    for cohort in cohorts:
        total = how.aggregator.init(2)
        told = unpack(how.server.control(state) if how.server.control else b"", 2)
        for k in cohort:
            steps = plain_steps(STEPS[k], decay)
            terms = Terms(how.mu or 0.0, LR, steps, told)
            anchor = params
            if how.correction:
                anchor = CORRECTIONS[how.correction].anchor(params, owns[k], terms)
            sent = lattice(train(k, params, anchor, terms.mu) - params)  # type: ignore[operator] # a function
            total = how.aggregator.add(total, sent, Report(1, STEPS[k]))
            if how.correction:
                delta = (sent.q * sent.step).astype(np.float32)
                owns[k] = CORRECTIONS[how.correction].after(owns[k], delta, terms)
        beside = how.aggregator.beside(total) if how.aggregator.beside else None
        mean, count = how.aggregator.result(total), how.aggregator.count(total)
        params, state = how.server.step(params, mean, state, count, beside)
        made.append(params)
    return made


def to_the_minimum(k: int, _base: np.ndarray, anchor: np.ndarray, mu: float) -> np.ndarray:
    return minimum(k, mu, anchor, np.zeros(2))


def some_steps(k: int, base: np.ndarray, anchor: np.ndarray, mu: float) -> np.ndarray:
    return descent(k, base, lambda w: mu * (w - anchor))


@pytest.mark.parametrize("cohort", [1, 2, 4])
def test_rounds_of_feddyn_are_those_of_its_paper(cohort: int) -> None:
    cohorts = cohorts_of(cohort, 25)
    ours = by_ours(strategy.feddyn(ALPHA, devices=4), cohorts, to_the_minimum)
    np.testing.assert_allclose(ours, feddyn_by_the_paper(cohorts), atol=5e-5)


def test_feddyn_comes_to_the_joint_optimum_and_a_pull_alone_does_not() -> None:
    everybody = [[0, 1, 2, 3]] * 200
    dyn = by_ours(strategy.feddyn(ALPHA, devices=4), everybody, to_the_minimum)
    prox = by_ours(strategy.fedprox(ALPHA), everybody, to_the_minimum)
    assert np.abs(dyn[-1] - BEST).max() < 1e-3
    assert np.abs(prox[-1] - BEST).max() > 0.1


def test_a_first_round_of_feddyn_and_a_second_by_hand() -> None:
    """One device of two of loss (w - 1)^2 / 2, alpha 1: 0 -> 1/2, then it is pulled to 1/4."""
    feddyn, server = CORRECTIONS["feddyn"], strategy.feddyn(1.0, devices=2).server
    own, w, terms = (
        np.zeros(1, np.float32),
        np.zeros(1, np.float32),
        Terms(1.0, 0.1, 1.0, np.zeros(1)),
    )
    delta = np.float32([0.5])
    own = feddyn.after(own, delta, terms)
    w, state = server.step(w, delta, server.init(1), 1)
    assert w.tolist() == [0.75]  # 0 + 0.5 + (1 / 2) * 0.5
    assert feddyn.anchor(w, own, terms).tolist() == [0.25]
    w, _ = server.step(w, np.float32([-0.125]), state, 1)
    assert w.tolist() == [0.8125]  # 0.75 - 0.125 + 0.25 - 0.0625


@pytest.mark.parametrize("server_lr", [1.0, 0.5])
@pytest.mark.parametrize("cohort", [1, 2, 4])
def test_rounds_of_scaffold_are_those_of_its_paper(cohort: int, server_lr: float) -> None:
    cohorts = cohorts_of(cohort, 25)
    ours = by_ours(strategy.scaffold(server_lr, devices=4), cohorts, some_steps)
    paper = scaffold_by_the_paper(cohorts, server_lr)
    np.testing.assert_allclose(ours, paper, atol=2e-3)


def test_scaffold_comes_to_the_joint_optimum_and_the_mean_of_models_does_not() -> None:
    everybody = [[0, 1, 2, 3]] * 300
    ours = by_ours(strategy.scaffold(devices=4), everybody, some_steps)
    plain = by_ours(strategy.fedavg(), everybody, some_steps)
    assert np.abs(ours[-1] - BEST).max() < 2e-3
    assert np.abs(plain[-1] - BEST).max() > 0.1


def test_scaffold_follows_momentum_when_it_is_told_of_it() -> None:
    everybody = [[0, 1, 2, 3]] * 300

    def train(k: int, base: np.ndarray, anchor: np.ndarray, mu: float) -> np.ndarray:
        return descent(k, base, lambda w: mu * (w - anchor), decay=0.5)

    ours = by_ours(strategy.scaffold(devices=4, decay=0.5), everybody, train, decay=0.5)
    assert np.abs(ours[-1] - BEST).max() < 2e-3


def test_what_the_coordinator_keeps_is_the_mean_of_what_devices_keep() -> None:
    """The paper's invariant: c is the mean of all c_i, though neither is ever sent up."""
    rng, how = np.random.default_rng(3), strategy.scaffold(devices=4)
    owns, state = np.zeros((4, 50), np.float32), how.server.init(50)
    for _ in range(30):
        total, told = how.aggregator.init(50), unpack(how.server.control(state), 50)  # type: ignore[misc] # it has one
        for k in rng.choice(4, 2, replace=False):
            sent = lattice(rng.standard_normal(50))
            total = how.aggregator.add(total, sent, Report(1, STEPS[k]))
            delta, terms = np.float32(sent.q * sent.step), Terms(1e-4, LR, STEPS[k], told)
            owns[k] = CORRECTIONS["scaffold"].after(owns[k], delta, terms)
        beside = how.aggregator.beside(total)  # type: ignore[misc] # it has one
        _, state = how.server.step(np.zeros(50, np.float32), np.zeros(50), state, 2, beside)
        np.testing.assert_allclose(state.vectors[0], owns.mean(0), atol=1e-5)


def test_a_control_travels_in_one_packet_and_is_read_alike_by_all() -> None:
    assert pack(np.zeros(7, np.float32)) == b""
    assert unpack(b"", 7).tolist() == [0] * 7
    for n, draw in (
        (1, "normal"),
        (20_598, "standard_cauchy"),
        (MOST, "normal"),
        (MOST, "uniform"),
    ):
        made = getattr(np.random.default_rng(1), draw)(size=n).astype(np.float32) * 1e-3
        body = pack(made)
        assert len(body) < MAX_FRAME - 2048 - 88
        rms = float(np.sqrt(np.mean(np.square(made, dtype=np.float64))))
        assert np.abs(unpack(body, n) - made).max() <= 0.06 * rms
    with pytest.raises(CodecError):
        unpack(body, MOST - 1)
    with pytest.raises(CodecError, match="at most 150000 numbers"):
        unpack(body, MOST + 1)
    with pytest.raises(CodecError):
        unpack(b"what", 7)


@pytest.mark.parametrize(
    ("optimizer", "decay"),
    [
        ([["sgd", {"lr": 0.1}]], 0.0),
        ([["clip", 1.0], ["momentum", {"decay": 0.9, "lr": 0.1}]], None),
        ([["momentum", {"decay": 0.9, "lr": 0.1}]], 0.9),
        ([["momentum", {"decay": 0.9, "lr": 0.1, "nesterov": True}]], None),
        ([["adam", {"lr": 0.1}]], None),
    ],
    ids=str,
)
def test_steps_of_sgd_and_of_momentum_can_be_followed(
    optimizer: Sequence[Sequence[object]], decay: float | None
) -> None:
    assert decay_of(optimizer) == decay
