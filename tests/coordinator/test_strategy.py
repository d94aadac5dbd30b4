# SPDX-License-Identifier: Apache-2.0
"""A strategy is a value: it is spelled as data, and its parts can be exchanged."""

from __future__ import annotations

import numpy as np
import pytest
from hand_bundles import mlp

from coordinator import strategy
from coordinator.aggregators import Report
from coordinator.strategy import Strategy, fedadam, fedavg, fedavgm, fedyogi, polynomial
from coordinator.sums import weight_of
from coordinator.task import Task
from edge_sdk import codec
from edge_sdk.errors import ConfigError

ALL = [fedavg(), fedavgm(decay=0.8), fedadam(lr=0.01), fedyogi(b2=0.9, staleness=1.0)]


EVERY = [
    *ALL,
    strategy.fedadagrad(b1=0.5),
    strategy.fedprox(0.1),
    strategy.fednova(decay=0.9),
    strategy.fedbuff(0.5),
    strategy.feddyn(0.2, devices=12),
    strategy.scaffold(0.5, devices=12, decay=0.9),
    strategy.qfedavg(1.0, clip=2.0),
    strategy.median(buckets=5),
    strategy.trimmed_mean(0.3, clip=0.5),
    strategy.krum(2, buckets=9),
    strategy.multi_krum(1, 4),
    strategy.geometric_median(0.5),
]


@pytest.mark.parametrize("made", EVERY, ids=[s.name for s in EVERY])
def test_a_spec_makes_the_strategy_that_spells_it(made: Strategy) -> None:
    again = strategy.from_spec(made.spec)
    assert again.spec == made.spec
    assert again.name == made.name == made.spec[0]
    assert again.server.spec == made.server.spec
    assert again.aggregator.spec == made.aggregator.spec
    assert again.mu == made.mu
    assert again.discount(3) == made.discount(3)
    assert strategy.from_spec(made.name).name == made.name


def test_each_strategy_has_its_server_optimizer() -> None:
    assert [s.server.spec[0] for s in ALL] == ["sgd", "momentum", "adam", "yogi"]
    assert ALL[2].server.spec == ["adam", {"lr": 0.01, "b1": 0.9, "b2": 0.99, "tau": 1e-3}]
    assert all(s.aggregator.spec == ["weighted_mean", {}] for s in ALL)


def test_a_part_is_exchanged_with_replace() -> None:
    none = fedavg()._replace(discount=lambda _staleness: 1.0)
    assert none.discount(9) == 1.0


def test_a_round_of_fedavg_adds_the_mean_of_what_was_decoded() -> None:
    shapes = {"w": (40,)}
    rng, s, c = np.random.default_rng(0), fedavg(), codec.preset("exact-ish")
    total, expected = s.aggregator.init(40), np.zeros(40)
    for examples in (10, 30):
        blob, _ = c.encode({"w": rng.standard_normal(40).astype(np.float32)}, c.init(shapes))
        total = s.aggregator.add(total, codec.lattice(blob, shapes), Report(examples))
        expected += examples / 40 * c.decode(blob, shapes)["w"]
    start = np.ones(40, np.float32)
    after, _ = s.server.step(start, s.aggregator.result(total), s.server.init(40))
    np.testing.assert_allclose(after, start + expected, rtol=1e-6)


def test_a_stale_update_weighs_less_and_never_nothing() -> None:
    discount = polynomial(0.5)
    assert discount(0) == 1.0
    assert discount(3) == pytest.approx(0.5)
    assert discount(-1) == 1.0
    assert all(weight_of(1, discount(s)) >= 1 for s in (10, 10**6))
    assert polynomial(0.0)(7) == 1.0


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (["fedprox2"], "expected a strategy among fedavg, fedavgm, fedadagrad, fedadam"),
        (["fedavg", {"b1": 0.9}], "fedavg: expected lr, staleness, clip, got 'b1'"),
        (["fedavg", {"staleness": -1}], "expected a staleness exponent from 0"),
        (["fedavg", {"staleness": float("nan")}], "expected a staleness exponent from 0"),
        (["fedadam", {"lr": -1}], "expected lr above 0"),
        (["feddyn", {"alpha": 0}], "feddyn: expected alpha above 0"),
        (["feddyn", {"devices": 0}], "expected at least 1 device"),
        (["fedprox", {"mu": 0}], "fedprox: expected mu above 0"),
        (["median", {"buckets": 2.5}], "median: expected a whole number for buckets, got 2.5"),
        (["median", {"buckets": 2}], "median: expected 3 to 256 buckets"),
        (["fedavg", {"clip": 0}], "expected a clip above 0"),
        (["krum", {"attackers": 3}], "at least 9 buckets for 3 attackers"),
    ],
)
def test_a_wrong_setting_is_refused_in_one_line(spec: list[object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        strategy.from_spec(spec)


def test_every_factory_is_spelled_as_it_is_called() -> None:
    assert {s.name for s in EVERY} == set(strategy.FACTORIES)


def test_a_rule_over_single_devices_needs_a_codec_that_sends_every_number() -> None:
    alone = strategy.median(buckets=0)
    with pytest.raises(ConfigError, match="median over single devices needs a codec that sends"):
        Task("t", "x.fedge", strategy=alone)
    assert Task("t", "x.fedge", strategy=alone, codec="exact-ish").strategy is alone
    assert Task("t", "x.fedge", strategy=strategy.median()).codec == "default"


def test_a_strategys_pull_is_the_tasks_unless_that_has_its_own() -> None:
    assert Task("t", "x.fedge", strategy=strategy.fedprox(0.3)).pull == 0.3
    assert Task("t", "x.fedge", strategy=strategy.fedprox(0.3), mu=0.1).pull == 0.1
    assert Task("t", "x.fedge").pull is None


def test_feddyn_sets_the_pull_itself_and_needs_a_bundle_that_can_be_pulled() -> None:
    dyn = strategy.feddyn(0.3, devices=4)
    assert Task("t", "x.fedge", strategy=dyn).pull == 0.3
    assert dyn.correction == "feddyn"
    with pytest.raises(ConfigError, match="feddyn sets mu; leave it out"):
        Task("t", "x.fedge", strategy=dyn, mu=0.1)
    with pytest.raises(
        ConfigError, match="feddyn needs a bundle built with proximal=True; rebuild"
    ):
        Task("t", mlp(), strategy=dyn).load()
    assert Task("t", mlp(proximal=True), strategy=dyn).load().manifest["proximal"]


def test_scaffold_needs_a_bundle_whose_steps_it_can_follow() -> None:
    plain, quick = strategy.scaffold(), strategy.scaffold(decay=0.9)
    plain_bundle = mlp(proximal=True)
    assert Task("t", plain_bundle, strategy=plain).load() is plain_bundle
    with pytest.raises(ConfigError, match=r"needs decay = 0 here, got decay = 0.9"):
        Task("t", plain_bundle, strategy=quick).load()
    with pytest.raises(ConfigError, match="scaffold needs a bundle built with proximal=True"):
        Task("t", mlp(), strategy=plain).load()
    large = mlp(sizes=(400, 400, 3), proximal=True)
    with pytest.raises(ConfigError, match="for at most 150000 trainable numbers, got 161603"):
        Task("t", large, strategy=plain).load()
