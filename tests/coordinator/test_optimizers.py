# SPDX-License-Identifier: Apache-2.0
"""Server optimizers follow their equations, in float32, and go on after a restart bit for bit."""

from __future__ import annotations

import numpy as np
import pytest

from coordinator import optimizers
from coordinator.optimizers import (
    ServerOptimizer,
    adagrad,
    adam,
    controlled,
    dynamic,
    momentum,
    sgd,
    yogi,
)
from edge_sdk.errors import ConfigError, StoreError

ALL = [sgd(0.5), momentum(0.7, decay=0.9), adam(0.02), yogi(0.02), adagrad(0.02, b1=0.9)]
NAMES = [str(o.spec[0]) for o in ALL]
EVERY = [*ALL, dynamic(7), controlled(0.5, devices=7)]
EVERY_NAME = [str(o.spec[0]) for o in EVERY]


def deltas(rounds: int = 6, count: int = 50) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal(count).astype(np.float32) * 1e-2 for _ in range(rounds)]


def by_hand(name: str, rounds: list[np.ndarray]) -> np.ndarray:
    """Reddi et al. 2021, algorithm 2, in float64."""
    x, m, v = np.zeros(50), np.zeros(50), np.full(50, 1e-6)
    for d in (d.astype(np.float64) for d in rounds):
        if name == "sgd":
            x = x + 0.5 * d
            continue
        if name == "momentum":
            m = 0.9 * m + d
            x = x + 0.7 * m
            continue
        m = 0.9 * m + 0.1 * d
        if name == "adagrad":
            v = v + d**2
        else:
            v = v - 0.01 * (v - d**2 if name == "adam" else d**2 * np.sign(v - d**2))
        x = x + 0.02 * m / (np.sqrt(v) + 1e-3)
    return x


@pytest.mark.parametrize("optimizer", ALL, ids=NAMES)
def test_the_equations_are_the_papers(optimizer: ServerOptimizer) -> None:
    x, state = np.zeros(50, np.float32), optimizer.init(50)
    for d in deltas():
        x, state = optimizer.step(x, d, state)
    assert x.dtype == np.float32
    assert all(v.dtype == np.float32 for v in state.vectors)
    np.testing.assert_allclose(x, by_hand(str(optimizer.spec[0]), deltas()), rtol=2e-5, atol=1e-7)


def test_sgd_of_one_adds_the_mean_delta() -> None:
    x, d = np.arange(4, dtype=np.float32), np.full(4, 0.25, np.float32)
    np.testing.assert_array_equal(sgd().step(x, d, sgd().init(4))[0], x + d)


@pytest.mark.parametrize("optimizer", EVERY, ids=EVERY_NAME)
def test_what_is_given_is_left_alone(optimizer: ServerOptimizer) -> None:
    x, d, state = np.ones(50, np.float32), deltas()[0], optimizer.init(50)
    before = [v.copy() for v in (x, d, *state.vectors)]
    optimizer.step(x, d, state)
    for was, now in zip(before, (x, d, *state.vectors), strict=True):
        np.testing.assert_array_equal(was, now)


@pytest.mark.parametrize("optimizer", EVERY, ids=EVERY_NAME)
def test_a_restart_changes_no_bit(optimizer: ServerOptimizer) -> None:
    x, state = np.ones(50, np.float32), optimizer.init(50)
    for d in deltas(3):
        x, state = optimizer.step(x, d, state)
    again = optimizer.load(optimizer.dump(state), 50)
    one, two = optimizer.step(x, deltas()[4], state), optimizer.step(x, deltas()[4], again)
    np.testing.assert_array_equal(one[0], two[0])
    assert optimizer.dump(one[1]) == optimizer.dump(two[1])


@pytest.mark.parametrize("optimizer", EVERY, ids=EVERY_NAME)
def test_another_state_is_refused(optimizer: ServerOptimizer) -> None:
    other = momentum() if optimizer.spec[0] != "momentum" else adam()
    stored = other.dump(other.init(50))
    for damaged in (b"", b"x" * 40, stored, optimizer.dump(optimizer.init(50))[:-1]):
        with pytest.raises(StoreError, match=r"expected the (stored )?state of"):
            optimizer.load(damaged, 50)


def test_a_state_of_another_model_is_refused() -> None:
    with pytest.raises(StoreError, match="over 49 numbers"):
        adam().load(adam().dump(adam().init(50)), 49)


@pytest.mark.parametrize("optimizer", EVERY, ids=EVERY_NAME)
def test_a_spec_makes_the_optimizer_that_spells_it(optimizer: ServerOptimizer) -> None:
    assert optimizers.from_spec(optimizer.spec).spec == optimizer.spec
    assert optimizers.from_spec(str(optimizer.spec[0])).spec[0] == optimizer.spec[0]


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (["lamb"], "expected a server optimizer among sgd, momentum, adagrad, adam"),
        ([], "expected a server optimizer"),
        (["adam", 0.1], r"expected \[name, settings\]"),
        (["adam", {}, {}], r"expected \[name, settings\]"),
        (["adam", {"decay": 1}], "adam: expected lr, b1, b2, tau, got 'decay'"),
        (["sgd", {"lr": "fast"}], "sgd: expected a number for lr, got 'fast'"),
        (["sgd", {"lr": True}], "expected a number"),
        (["sgd", {"lr": 0}], "expected lr above 0"),
        (["sgd", {"lr": float("inf")}], "expected lr above 0"),
        (["momentum", {"decay": 1.0}], "expected decay from 0 to below 1"),
        (["adam", {"b2": -0.1}], "expected b2 from 0 to below 1"),
        (["yogi", {"tau": 0}], "expected tau above 0"),
    ],
)
def test_a_wrong_setting_is_refused_in_one_line(spec: list[object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        optimizers.from_spec(spec)
