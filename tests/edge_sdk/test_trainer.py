# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnxruntime
import pytest
from hand_bundles import (
    INPUT_SCALE,
    INPUT_ZERO,
    examples,
    initial,
    mlp,
    numpy_loss,
    numpy_steps,
)

from edge_sdk.errors import ConfigError, EngineError
from edge_sdk.requantize import requantize
from edge_sdk.trainer import Trainer

SIZES = (6, 5, 3)


class Ticks:
    """A clock that moves by one second at each look."""

    def __init__(self) -> None:
        self._ticks = itertools.count()

    def monotonic(self) -> float:
        return float(next(self._ticks))


def batches(count: int, n: int = 8) -> list:
    x, y = examples(count * n)
    return [(x[i : i + n], y[i : i + n]) for i in range(0, count * n, n)]


@pytest.mark.parametrize("momentum", [False, True])
def test_ten_steps_equal_the_numpy_reference(momentum: bool) -> None:
    trainer = Trainer(mlp(momentum=momentum))
    expected, losses = numpy_steps(initial(SIZES, 0), batches(10), momentum=momentum)
    assert [trainer.step(x, y) for x, y in batches(10)] == pytest.approx(losses, rel=1e-5)
    for name, value in trainer.params().items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=1e-6)


def test_the_proximal_term_pulls_towards_the_loaded_parameters() -> None:
    trainer = Trainer(mlp(proximal=True))
    start = initial(SIZES, 5)
    trainer.load_params(start)
    expected, _ = numpy_steps(start, batches(10), mu=0.7)
    for x, y in batches(10):
        trainer.step(x, y, mu=0.7)
    for name, value in trainer.params().items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=1e-6)


def test_an_anchor_of_its_own_takes_the_place_of_the_loaded_parameters() -> None:
    trainer = Trainer(mlp(proximal=True))
    start, anchor = initial(SIZES, 5), initial(SIZES, 6)
    trainer.load_params(start, anchor)
    expected, _ = numpy_steps(start, batches(10), mu=0.7, anchor=anchor)
    for x, y in batches(10):
        trainer.step(x, y, mu=0.7)
    for name, value in trainer.params().items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=1e-6)
    trainer.load_params(start)
    with pytest.raises(ValueError, match="finite"):
        trainer.load_params(start, {k: v * np.float32("nan") for k, v in anchor.items()})


def test_mu_on_a_bundle_without_the_term_is_a_named_error() -> None:
    with pytest.raises(ConfigError, match="proximal=True"):
        Trainer(mlp()).fit(*examples(8), mu=0.1)


def test_weights_stay_in_two_fixed_sets_of_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(mlp((40, 30, 3)))
    x, y = examples(64, (40, 30, 3))
    trainer.step(x, y)
    wrapped: list[int] = []
    make = onnxruntime.OrtValue.ortvalue_from_numpy

    def counting(array: np.ndarray, *args: Any) -> Any:
        wrapped.append(array.nbytes)
        return make(array, *args)

    monkeypatch.setattr(onnxruntime.OrtValue, "ortvalue_from_numpy", counting)
    training = trainer._training
    addresses = []
    for _ in range(6):
        addresses.append([p.ctypes.data for p in training._params()])
        trainer.step(x, y)
    assert addresses[0] == addresses[2] == addresses[4]
    assert addresses[1] == addresses[3] == addresses[5]
    assert not set(addresses[0]) & set(addresses[1])
    assert wrapped == [], "the same batch arrays are not even bound again"
    trainer.fit(x, y, steps=20, epochs=None, batch=24)
    assert len(wrapped) <= 2 * 2 * 14, "only the two batch buffers are bound, as their size changes"
    assert max(wrapped) <= 24 * 40 * 4, "no weight passed through Python"


def test_a_step_reads_memory_that_the_binding_was_given_once() -> None:
    trainer = Trainer(mlp())
    x, y = (a.copy() for a in examples(8))
    trainer.step(x, y, lr=0.0)
    x2, y2 = examples(8, seed=4)
    x[...], y[...] = x2, y2
    assert trainer.step(x, y, lr=0.0) == pytest.approx(numpy_loss(initial(SIZES, 0), x2, y2)[0])


@pytest.mark.parametrize("n", [1, 2, 31, 32, 33, 100])
def test_any_number_of_examples_and_any_last_batch(n: int) -> None:
    done = Trainer(mlp()).fit(*examples(n), epochs=2, batch=32)
    assert done["steps"] == 2 * -(-n // 32)
    assert (done["epochs"], done["stopped_by"]) == (2, "epochs")
    assert np.isfinite(done["loss"])


def test_every_example_is_seen_once_an_epoch() -> None:
    seen: list[np.ndarray] = []
    trainer = Trainer(mlp())
    real = trainer._training.step

    def watching(x: np.ndarray, *args: Any) -> float:
        seen.append(x.copy())
        return real(x, *args)

    trainer._training.step = watching
    x, y = examples(37)
    trainer.fit(x, y, batch=8)
    rows = np.concatenate(seen)
    assert sorted(map(tuple, rows)) == sorted(map(tuple, x))
    assert not np.array_equal(rows, x)


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not() -> None:
    def run(seed: int) -> bytes:
        trainer = Trainer(mlp(momentum=True), seed=seed)
        trainer.fit(*examples(100), epochs=3, batch=16)
        return b"".join(p.tobytes() for p in trainer.params().values())

    assert run(3) == run(3)
    assert run(3) != run(4)


def test_training_learns_and_evaluate_says_so() -> None:
    trainer = Trainer(mlp((6, 16, 3), momentum=True))
    x, y = examples(400)
    before = trainer.evaluate(x, y)
    trainer.fit(x, y, epochs=20)
    after = trainer.evaluate(x, y)
    assert after["loss"] < before["loss"] / 2
    assert after["accuracy"] > 0.9


def test_evaluate_is_the_mean_over_uneven_batches() -> None:
    x, y = examples(300)
    loss, _ = numpy_loss(initial(SIZES, 0), x, y)
    assert Trainer(mlp()).evaluate(x, y)["loss"] == pytest.approx(loss, rel=1e-5)


def test_a_regression_has_a_loss_and_no_accuracy() -> None:
    trainer = Trainer(mlp(loss="mse"))
    x, _ = examples(64)
    target = x[:, :3] * 0.5
    before = trainer.evaluate(x, target)
    trainer.fit(x, target, epochs=30, lr=0.2)
    assert trainer.evaluate(x, target)["loss"] < before["loss"] / 2
    assert before.keys() == {"loss"}


def test_whichever_budget_ends_first_is_named() -> None:
    x, y = examples(64)
    trainer = Trainer(mlp(), clock=Ticks())
    assert trainer.fit(x, y, epochs=1, batch=8, steps=100)["stopped_by"] == "epochs"
    by_steps = trainer.fit(x, y, epochs=None, batch=8, steps=11)
    assert (by_steps["stopped_by"], by_steps["steps"], by_steps["epochs"]) == ("steps", 11, 1)
    by_time = trainer.fit(x, y, epochs=100, batch=8, seconds=5)
    assert (by_time["stopped_by"], by_time["steps"]) == ("seconds", 5)


@pytest.mark.parametrize(
    "budget", [{"epochs": None}, {"epochs": 0}, {"batch": 0}, {"steps": 0}], ids=str
)
def test_a_budget_without_sense_is_refused(budget: dict) -> None:
    with pytest.raises(ValueError, match="expected"):
        Trainer(mlp()).fit(*examples(4), **budget)


def test_delta_is_local_minus_base_and_begins_at_zero() -> None:
    trainer = Trainer(mlp())
    assert all(not d.any() for d in trainer.delta().values())
    base = initial(SIZES, 7)
    trainer.load_params(base)
    trainer.fit(*examples(50))
    local = trainer.params()
    for name, change in trainer.delta().items():
        np.testing.assert_array_equal(change, local[name] - base[name])


def test_loading_parameters_begins_the_optimizer_afresh() -> None:
    bundle, (x, y) = mlp(momentum=True), examples(8)
    used, fresh = Trainer(bundle), Trainer(bundle)
    used.fit(*examples(64))
    used.load_params(fresh.params())
    used.step(x, y)
    fresh.step(x, y)
    for a, b in zip(used.params().values(), fresh.params().values(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_params_are_copies() -> None:
    trainer = Trainer(mlp())
    trainer.params()["w1"][...] = 99
    assert trainer.params()["w1"].max() < 99


def test_wrong_or_poisoned_parameters_are_refused() -> None:
    trainer = Trainer(mlp())
    params = trainer.params()
    with pytest.raises(ValueError, match="w2"):
        trainer.load_params({k: v for k, v in params.items() if k != "w2"})
    params["b1"][0] = np.nan
    with pytest.raises(ValueError, match="finite"):
        trainer.load_params(params)


def test_scalars_of_any_kind_reach_the_runtime_as_zero_dimensional_arrays() -> None:
    trainer = Trainer(mlp(proximal=True))
    x, y = examples(8)
    for lr in (np.float32(0.01), np.float64(0.01), np.array(0.01), 0, 1):
        trainer.step(x, y, lr=lr, mu=np.float32(0.1))
    with pytest.raises(ConfigError, match="learning rate"):
        trainer.step(x, y, lr=float("nan"))


def test_a_loss_that_is_not_finite_stops_with_advice() -> None:
    trainer = Trainer(mlp())
    x, y = examples(32)
    with pytest.raises(EngineError, match="lower it") as caught:
        trainer.fit(x * np.float32(1e30), y, epochs=5, lr=1e30)
    assert "\n" not in str(caught.value)
    trainer.load_params(initial(SIZES, 0))
    assert np.isfinite(trainer.fit(x, y)["loss"])


def test_wrong_shapes_and_labels_say_what_was_expected() -> None:
    trainer = Trainer(mlp())
    x, y = examples(8)
    for bad_x, bad_y, said in (
        (x[:, :5], y, r"x of shape \['any', 6\]"),
        (x[0], y, "x of shape"),
        (x, y[:, None], "y of shape"),
        (x, y[:7], "as many labels"),
        (x[:0], y[:0], "from 1"),
        (x, y + 3, "classes 0 to 2"),
        (x, y.astype(np.float32), "whole class numbers"),
    ):
        with pytest.raises(ValueError, match=said):
            trainer.fit(bad_x, bad_y)


def test_predict_answers_with_what_was_trained() -> None:
    trainer = Trainer(mlp())
    x, y = examples(40)
    before = trainer.predict(x)
    trainer.fit(x, y, epochs=3)
    after = trainer.predict(x)
    p = trainer.params()
    hidden = np.maximum(x @ p["w1"] + p["b1"], 0)
    np.testing.assert_allclose(after, hidden @ p["w2"] + p["b2"], atol=1e-5)
    assert not np.allclose(before, after)


def test_an_int8_model_takes_floats_or_its_own_int8_and_answers_in_int8() -> None:
    bundle = mlp(quantized=True)
    trainer = Trainer(bundle)
    x, y = examples(30)
    trainer.fit(x, y, epochs=2)
    scores = trainer.predict(x)
    assert scores.dtype == np.int8
    raw = np.clip(np.rint(x / np.float32(INPUT_SCALE)) + INPUT_ZERO, -128, 127).astype(np.int8)
    np.testing.assert_array_equal(trainer.predict(raw), scores)
    session = onnxruntime.InferenceSession(requantize(bundle, trainer.params()))
    np.testing.assert_array_equal(session.run(None, {"features": raw})[0], scores)


def test_raw_int8_examples_train_as_their_dequantized_floats() -> None:
    raw = np.random.default_rng(0).integers(-128, 128, (40, 6), np.int8)
    floats = (raw.astype(np.float32) - INPUT_ZERO) * np.float32(INPUT_SCALE)
    y = examples(40)[1]
    a, b = Trainer(mlp(quantized=True)), Trainer(mlp(quantized=True))
    assert a.fit(raw, y, batch=16)["loss"] == b.fit(floats, y, batch=16)["loss"]
    for name, value in a.params().items():
        np.testing.assert_array_equal(value, b.params()[name])
    assert a.evaluate(raw, y) == b.evaluate(floats, y)
