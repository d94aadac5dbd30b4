# SPDX-License-Identifier: Apache-2.0
"""Compressed rounds learn as well as uncompressed ones: codec, fold and server step together."""

from __future__ import annotations

import functools
import json

import numpy as np
import pytest

from coordinator import strategy
from coordinator.aggregators import Report
from edge_sdk import codec, params
from edge_sdk.correction import CORRECTIONS, Terms, unpack
from edge_sdk.types import Params, Shapes

SHAPES: Shapes = {"w0": (16, 48), "b0": (48,), "w1": (48, 6), "b1": (6,)}
COUNT = params.count(SHAPES)


def forward(p: Params, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    hidden = np.maximum(x @ p["w0"] + p["b0"], 0)
    return hidden, hidden @ p["w1"] + p["b1"]


def train(
    base: Params, x: np.ndarray, y: np.ndarray, pull: tuple[np.float32, Params], lr: float = 0.1
) -> Params:
    mu, anchor = pull
    p = {k: v.copy() for k, v in base.items()}
    for at in range(0, len(x), 10):
        xb, yb = x[at : at + 10], y[at : at + 10]
        hidden, z = forward(p, xb)
        g = np.exp(z - z.max(1, keepdims=True))
        g /= g.sum(1, keepdims=True)
        g[np.arange(len(yb)), yb] -= 1
        g /= len(yb)
        back = (g @ p["w1"].T) * (hidden > 0)
        step = {"w0": xb.T @ back, "b0": back.sum(0), "w1": hidden.T @ g, "b1": g.sum(0)}
        step = {k: v + mu * (p[k] - anchor[k]) for k, v in step.items()}
        p = {k: v - np.float32(lr) * step[k] for k, v in p.items()}
    return params.delta(p, base)


@functools.cache
def accuracy(
    name: str, how: str = "fedavg", rounds: int = 45, *, cohort: int = 6, poisoned: int = 0
) -> tuple[float, float]:
    """Train 12 devices of skewed labels for some rounds; return accuracy and bytes an update.

    `poisoned` of them send the fourfold opposite of what they learned.
    """
    rng = np.random.default_rng(0)
    teacher = {k: rng.standard_normal(s).astype("f4") for k, s in SHAPES.items()}
    x = rng.standard_normal((3000, 16)).astype("f4")
    y = forward(teacher, x)[1].argmax(1)
    order = np.argsort(y[:1800] + 2.0 * rng.random(1800))  # neighbours in label, mixed a little
    shards = np.array_split(order, 12)
    s, c = strategy.from_spec(json.loads(how) if how[0] == "[" else how), codec.preset(name)
    states = [c.init(SHAPES, seed=i) for i in range(12)]
    model = params.flatten({k: 0.3 * v for k, v in _start(rng).items()}, SHAPES)
    memory, sent, owns = s.server.init(COUNT), 0, np.zeros((12, COUNT), np.float32)
    correction = CORRECTIONS[s.correction] if s.correction else None
    for _ in range(rounds):
        base, total = params.unflatten(model, SHAPES), s.aggregator.init(COUNT)
        told = s.server.control(memory) if s.server.control else b""
        terms = Terms(s.mu or 0.0, 0.1, 1.0, unpack(told, COUNT))
        for i in rng.choice(12, cohort, replace=False):
            mine = rng.permutation(shards[i])
            anchor = correction.anchor(model, owns[i], terms) if correction else model
            pull = np.float32(terms.mu), params.unflatten(anchor, SHAPES)
            delta = train(base, x[mine], y[mine], pull)
            if i < poisoned:
                delta = {k: np.float32(-4) * v for k, v in delta.items()}
            blob, pending = c.encode(delta, states[i])
            states[i] = c.commit(pending)
            sent += len(blob)
            if correction:
                sent, steps = params.flatten(c.decode(blob, SHAPES), SHAPES), -(-len(mine) // 10)
                owns[i] = correction.after(owns[i], sent, terms._replace(steps=steps))
            lattice = codec.lattice(blob, SHAPES)
            report = Report(len(mine), -(-len(mine) // 10), 1.0, codec.norm(lattice), bucket=i % 8)
            total = s.aggregator.add(total, lattice, report)
        beside = s.aggregator.beside(total) if s.aggregator.beside else None
        mean, count = s.aggregator.result(total), s.aggregator.count(total)
        model, memory = s.server.step(model, mean, memory, count, beside)
    z = forward(params.unflatten(model, SHAPES), x[1800:])[1]
    return float((z.argmax(1) == y[1800:]).mean()), sent / (cohort * rounds)


def _start(rng: np.random.Generator) -> Params:
    return {k: rng.standard_normal(s).astype("f4") * (len(s) > 1) for k, s in SHAPES.items()}


@pytest.mark.parametrize(
    ("name", "loss", "ratio"),
    [("default", 0.03, 20), ("stateless", 0.03, 25), ("exact-ish", 0.015, 5)],
)
def test_a_codec_costs_little_accuracy_for_its_bytes(name: str, loss: float, ratio: float) -> None:
    plain, dense_bytes = accuracy("dense")
    got, sent = accuracy(name)
    assert plain > 0.7
    assert got >= plain - loss
    assert dense_bytes / sent >= ratio


# The robust rules hear half of the devices out at a time here, and the labels are skewed: they
# learn more slowly, which is what their protection costs.
SLOWER = {"median": 0.45, "trimmed_mean": 0.45, "krum": 0.3, "multi_krum": 0.45}


@pytest.mark.parametrize("how", sorted(strategy.FACTORIES))
def test_every_strategy_learns_from_compressed_updates(how: str) -> None:
    assert accuracy("default", how)[0] > SLOWER.get(how, 0.65)


BESIDE_ATTACKERS = {
    "median": {},
    "trimmed_mean": {"cut": 0.3},
    "krum": {"attackers": 2},
    "multi_krum": {"attackers": 2},
    "geometric_median": {},
    "fedavg": {"clip": 0.5},
}


@pytest.mark.parametrize("how", BESIDE_ATTACKERS)
def test_two_poisoned_devices_of_twelve_ruin_the_mean_and_not_what_bounds_them(how: str) -> None:
    spec = json.dumps([how, BESIDE_ATTACKERS[how]])
    mean, _ = accuracy("default", rounds=15, cohort=12, poisoned=2)
    got, _ = accuracy("default", spec, rounds=15, cohort=12, poisoned=2)
    assert got > mean + 0.2
