# SPDX-License-Identifier: Apache-2.0
"""Every codec: what it sends comes back, what it drops is carried, nonsense is refused."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sdk import codec, params
from edge_sdk.codec import body
from edge_sdk.errors import CodecError
from edge_sdk.types import Params, Shapes

CHAINS = [
    *codec.PRESETS,
    [["ef"], ["deadzone", 2.0], ["int8"]],
    [["ef"], ["top_k", 0.01], ["int8"]],
    [["ef"], ["top_k", 1.0], ["int8"]],
    [["ef"], ["grid", 0.5], ["int8"]],
    [["stochastic", 1.0]],
    [["int8"]],
]
SHAPES: list[Shapes] = [
    {"one": (1,)},
    {"scalar": ()},
    {"a": (7,)},
    {"w": (40, 33), "b": (40,)},
    {"conv": (8, 3, 3, 3), "empty": (0, 4), "b": (8,), "w": (10, 72)},
    {"w": (64, 64)},
    {"w": (300, 240), "b": (11,)},
]


def normal(shapes: Shapes, seed: int = 0, scale: float = 1e-3) -> Params:
    rng = np.random.default_rng(seed)
    return {k: (scale * rng.standard_t(4, s)).astype(np.float32) for k, s in shapes.items()}


def flat(values: Params) -> np.ndarray:
    return np.concatenate([v.ravel() for v in values.values()]) if values else np.zeros(0)


def send(spec: object, delta: Params, seed: int = 0) -> Params:
    c, shapes = codec.from_spec(spec), params.shapes_of(delta)
    blob, _ = c.encode(delta, c.init(shapes, seed))
    return c.decode(blob, shapes)


@pytest.mark.parametrize("spec", CHAINS, ids=str)
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_what_is_decoded_is_the_delta_up_to_the_codecs_own_error(
    spec: object, shapes: Shapes
) -> None:
    delta = normal(shapes)
    got = send(spec, delta)
    assert params.shapes_of(got) == shapes
    assert all(v.dtype == np.float32 for v in got.values())
    energy = np.sum(flat(delta) ** 2)
    noise = np.sum((flat(got) - flat(delta)) ** 2)
    unbiased = str(spec) in {"stateless-lean", "stateless", "[['stochastic', 1.0]]"}
    assert noise <= energy * (60 if unbiased else 1.0001)


@pytest.mark.parametrize("spec", CHAINS, ids=str)
@pytest.mark.parametrize("shapes", [*SHAPES, {}], ids=str)
def test_an_all_zero_delta_comes_back_as_zero(spec: object, shapes: Shapes) -> None:
    got = send(spec, {k: np.zeros(s, np.float32) for k, s in shapes.items()})
    assert not flat(got).any()


@pytest.mark.parametrize("spec", ["dense", "exact-ish", [["int8"]]], ids=str)
def test_codecs_that_send_all_are_close_everywhere(spec: object) -> None:
    delta = normal(SHAPES[6])
    gap = np.abs(flat(send(spec, delta)) - flat(delta)).max()
    rms = np.sqrt(np.mean(flat(delta) ** 2))
    limit = {"dense": 1e-7, "exact-ish": 0.0505}.get(str(spec), 0.6)
    assert gap <= limit * rms


@pytest.mark.parametrize("k", [0, 1, 2, 63, 64, 400, 1359, 1360])
def test_any_number_of_positions_makes_the_trip(k: int) -> None:
    shapes, rng = SHAPES[3], np.random.default_rng(k)
    found = np.sort(rng.choice(1360, k, replace=False)).astype(np.int64)
    q = rng.integers(1, 400, k).astype(np.int32) * rng.choice([-1, 1], k).astype(np.int32)
    blob = body.write(codec.Lattice(found, q, 0.5), shapes)
    got = codec.lattice(blob, shapes)
    assert got.step == 0.5
    expected = np.zeros(1360, np.float32)
    expected[found] = q * 0.5
    np.testing.assert_array_equal(body.dense(got, 1360), expected)


def test_a_single_change_anywhere_makes_the_trip() -> None:
    for count in range(1, 600):
        for at in {0, count // 2, count - 1}:
            sent = codec.Lattice(np.array([at]), np.array([-3], np.int32), 1.0)
            got = codec.lattice(body.write(sent, {"w": (count,)}), {"w": (count,)})
            assert np.flatnonzero(body.dense(got, count)).tolist() == [at]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_lattice_makes_the_trip(data: st.DataObject) -> None:
    shape = data.draw(st.tuples(st.integers(1, 60), st.integers(1, 60)))
    shapes = {"v": (3,), "w": shape, "b": (shape[0],)}
    count = params.count(shapes)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    rows = rng.random(count) ** data.draw(st.integers(1, 8))  # from uniform to clustered
    found = np.flatnonzero(rows < data.draw(st.floats(0, 1)))
    top = data.draw(st.sampled_from([1, 2, 200, 300, body.MAX_LEVEL]))
    q = rng.integers(1, top + 1, found.size) * rng.choice([-1, 1], found.size)
    sent = codec.Lattice(found, q.astype(np.int32), 2.0**-9)
    got = codec.lattice(body.write(sent, shapes), shapes)
    np.testing.assert_array_equal(body.dense(got, count), body.dense(sent, count))


def test_top_k_sends_exactly_the_largest() -> None:
    delta = {"w": np.arange(-500, 500, dtype=np.float32)}
    got = send([["ef"], ["top_k", 0.01], ["int8"]], delta)["w"]
    assert np.flatnonzero(got).tolist() == [*range(6), *range(996, 1000)]


def test_int8_holds_what_follows_a_lattice_to_127_steps() -> None:
    delta = {"w": np.concatenate([np.full(9999, 1e-6), [1.0]]).astype(np.float32)}
    c = codec.from_spec([["ef"], ["grid", 0.1], ["int8"]])
    lattice = codec.lattice(c.encode(delta, c.init({"w": (10000,)}))[0], {"w": (10000,)})
    assert np.abs(lattice.q).max() == 127


@pytest.mark.parametrize("name", ["default", "lean"])
def test_nothing_is_lost_with_error_feedback(name: str) -> None:
    shapes = {"w": (50, 20), "b": (13,)}
    rng = np.random.default_rng(3)
    c = codec.preset(name)
    state = c.init(shapes)
    given_, sent = np.zeros(1013), np.zeros(1013)
    for _ in range(20):  # whole multiples of 2**-20: every float32 sum on the way is exact
        delta = {
            k: (rng.integers(-(2**8), 2**8, s) / 2**20).astype("f4") for k, s in shapes.items()
        }
        blob, pending = c.encode(delta, state)
        state = c.commit(pending, accepted=True)
        given_ += flat(delta)
        sent += flat(c.decode(blob, shapes))
    assert state.residual is not None
    np.testing.assert_array_equal(sent + state.residual, given_)


def test_the_residual_moves_only_when_the_update_is_accepted() -> None:
    shapes = {"w": (30, 30)}
    c = codec.preset("default")
    start = c.commit(c.encode(normal(shapes, 1), c.init(shapes))[1])
    assert start.residual is not None
    before = start.residual.copy()
    _, pending = c.encode(normal(shapes, 2), start)
    declined, accepted = c.commit(pending, accepted=False), c.commit(pending, accepted=True)
    np.testing.assert_array_equal(before, declined.residual)
    np.testing.assert_array_equal(before, start.residual)
    assert not np.array_equal(before, accepted.residual)
    assert declined.updates == accepted.updates == 2


@pytest.mark.parametrize("spec", ["stateless", "stateless-lean", [["stochastic", 0.3]]], ids=str)
@pytest.mark.parametrize("shapes", [{"w": (37,)}, {"w": (200,), "b": (9,)}], ids=str)
def test_the_mean_of_many_updates_has_no_error(spec: object, shapes: Shapes) -> None:
    delta, c = normal(shapes, 5), codec.from_spec(spec)
    state, runs = c.init(shapes, seed=11), 2000
    total = np.zeros(params.count(shapes))
    squares = np.zeros_like(total)
    for _ in range(runs):
        blob, pending = c.encode(delta, state)
        state = c.commit(pending)
        got = flat(c.decode(blob, shapes)).astype(np.float64)
        total += got
        squares += got**2
    mean = total / runs
    variance = squares / runs - mean**2  # some numbers are sent too rarely to tell theirs
    deviation = np.sqrt(np.maximum(variance, 0.1 * variance.mean()) / runs)
    off = np.abs(mean - flat(delta)) / deviation
    assert off.max() < 5.0
    assert np.mean(off**2) < 1.5


def test_one_bit_a_number_errs_as_eden_says() -> None:
    delta = normal({"w": (131_072 + 5000,)}, 7)
    got = send("stateless", delta)
    nmse = np.sum((flat(got) - flat(delta)) ** 2) / np.sum(flat(delta) ** 2)
    assert nmse == pytest.approx(np.pi / 2 - 1, abs=0.02)


def test_a_seed_and_a_count_fix_the_bytes_and_change_the_noise() -> None:
    delta = normal({"w": (50, 50)})
    for name in ("stateless", "stateless-lean"):
        c = codec.preset(name)
        one, two = c.init({"w": (50, 50)}, seed=1), c.init({"w": (50, 50)}, seed=2)
        blob, pending = c.encode(delta, one)
        assert blob == c.encode(delta, one)[0]
        assert blob != c.encode(delta, two)[0]
        assert blob != c.encode(delta, c.commit(pending, accepted=False))[0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e20])
@pytest.mark.parametrize("name", codec.PRESETS)
def test_a_delta_that_diverged_is_refused(name: str, bad: float) -> None:
    delta = {"w": np.ones(100, np.float32)}
    delta["w"][3] = bad
    c = codec.preset(name)
    with pytest.raises(CodecError, match="training diverged"):
        c.encode(delta, c.init({"w": (100,)}))


@pytest.mark.parametrize("spec", CHAINS, ids=str)
def test_a_spec_makes_the_codec_that_spells_it(spec: object) -> None:
    c = codec.from_spec(spec)
    assert codec.from_spec(c.spec).spec == c.spec
    delta = normal({"w": (20, 20)})
    state = c.init({"w": (20, 20)})
    assert c.encode(delta, state)[0] == codec.from_spec(c.spec).encode(delta, state)[0]


def test_factories_and_specs_spell_the_same() -> None:
    c = codec.ef(codec.chain(codec.top_k(0.01), codec.int8()))
    assert c.spec == [["ef"], ["top_k", 0.01], ["int8"]]
    assert codec.preset("default").spec == codec.ef(codec.chain(codec.deadzone(rms=2.0))).spec
    assert codec.chain(codec.rotate(), codec.sign1()).is_unbiased
    assert codec.chain(codec.dense()).is_unbiased
    assert not c.is_unbiased


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ([["top_k", 0.1]], "cannot end with top_k: expected int8"),
        ([["rotate"]], "expected sign1 after rotate"),
        ([["sign1"]], "sign1 cannot follow the start"),
        ([["rotate"], ["int8"]], "int8 cannot follow rotate"),
        ([["stochastic", 0.1], ["int8"]], "more would bias it"),
        ([["int8"], ["top_k", 0.1]], "top_k cannot follow int8"),
        ([["dense"], ["int8"]], "expected dense alone"),
        ([["ef"]], "cannot end with the start"),
        ([["ef"], ["ef"], ["int8"]], "expected a stage among"),
        ([["ef"], ["rotate"], ["sign1"]], "use it without ef"),
        ([["ef"], ["dense"]], "use it without ef"),
        ([["ef"], ["deadzone", 8]], "up to 4 rms"),
        ([["top_k", 0.0]], "above 0 up to 1"),
        ([["top_k", float("nan")]], "above 0 up to 1"),
        ([["deadzone", -1]], "above 0 up to 64"),
        ([["deadzone"]], r"expected 1 number\(s\)"),
        ([["deadzone", True]], r"expected 1 number\(s\)"),
        ([["int8", 3]], r"expected 0 number\(s\)"),
        ([["gzip"]], "expected a stage among"),
        ([[["int8"]]], "expected a stage among"),
        ([[]], "expected a stage such as"),
        (["int8"], "expected a stage such as"),
        ([], "expected a codec spec"),
        (7, "expected a codec spec"),
        ("best", "expected a codec among default"),
    ],
)
def test_a_spec_that_makes_no_sense_is_refused_in_one_line(spec: object, says: str) -> None:
    with pytest.raises(CodecError, match=says) as caught:
        codec.from_spec(spec)
    assert "\n" not in str(caught.value)


def test_error_feedback_twice_is_refused() -> None:
    with pytest.raises(CodecError, match="without error feedback"):
        codec.ef(codec.preset("default"))


@pytest.mark.parametrize("spec", [[["deadzone", 2.0]], [["top_k", 0.1], ["int8"]]], ids=str)
def test_a_codec_that_loses_changes_for_good_warns_when_it_starts(spec: object) -> None:
    with pytest.warns(codec.BiasedCodec, match="wrap it"):
        codec.from_spec(spec).init({"w": (3,)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        codec.from_spec([["ef"], *spec]).init({"w": (3,)})  # type: ignore[misc] # a list above


def test_deltas_of_other_shapes_are_refused() -> None:
    c = codec.preset("default")
    with pytest.raises(ValueError, match="expected shape"):
        c.encode({"w": np.zeros(4, np.float32)}, c.init({"w": (5,)}))


def test_norm_is_the_norm_of_what_is_decoded() -> None:
    delta, c = normal({"w": (90, 9)}), codec.preset("default")
    lattice = codec.lattice(c.encode(delta, c.init({"w": (90, 9)}))[0], {"w": (90, 9)})
    got = np.linalg.norm(body.dense(lattice, 810).astype(np.float64))
    assert codec.norm(lattice) == pytest.approx(float(got), rel=1e-6)
