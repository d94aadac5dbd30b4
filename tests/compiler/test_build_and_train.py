# SPDX-License-Identifier: Apache-2.0
"""The compiler's bundles in the hands of the device's trainer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from forward_models import Steps, blobs, cnn, mlp, predict, quantized

from coordinator.compiler import adam, build, chain, clip, export, momentum, sgd
from edge_sdk.bundle import Bundle
from edge_sdk.trainer import Trainer

X, LABELS = blobs((1, 8, 8), 4)


@pytest.mark.parametrize("int8", [False, True])
def test_a_device_learns_and_predicts_with_what_it_learned(int8: bool, tmp_path: Path) -> None:
    model = quantized(cnn(opset=17), X) if int8 else cnn()
    optimizer = chain(clip(5.0), momentum(0.9, lr=0.05))
    headroom = 8.0 if int8 else 1.0
    made = build(model, loss="cross_entropy", optimizer=optimizer, headroom=headroom)
    made.save(tmp_path / "net.fedge")
    trainer = Trainer(Bundle.load(tmp_path / "net.fedge"))
    before = trainer.evaluate(X, LABELS)
    trainer.fit(X, LABELS, epochs=15, batch=16)
    after = trainer.evaluate(X, LABELS)
    assert after["loss"] < 0.3 * before["loss"]
    assert after["accuracy"] > 0.9
    logits = np.asarray(trainer.predict(X))
    assert np.mean(logits.argmax(1) == LABELS) == pytest.approx(after["accuracy"], abs=0.05)
    np.testing.assert_array_equal(logits, predict(export(made, trainer.params()), X))


@pytest.mark.parametrize("optimizer", [sgd(lr=0.1), momentum(0.9, lr=0.05), adam(lr=0.01)])
def test_the_trainer_takes_the_steps_of_the_plain_runner(optimizer: object) -> None:
    bundle = build(cnn(), loss="cross_entropy", optimizer=optimizer)  # type: ignore[arg-type]
    trainer, plain = Trainer(bundle), Steps(bundle)
    for i in range(4):
        x, y = X[i * 16 : i * 16 + 16], LABELS[i * 16 : i * 16 + 16]
        assert trainer.step(x, y) == plain.step(x, y)
    for name, value in trainer.params().items():
        np.testing.assert_array_equal(value, plain.params()[name])


def test_fedprox_holds_a_device_near_the_rounds_start() -> None:
    bundle = build(mlp(), loss="cross_entropy", optimizer=sgd(lr=0.2), proximal=True)
    x, y = blobs((6,), 3)
    moved = []
    for mu in (0.0, 5.0):
        trainer = Trainer(bundle)
        trainer.fit(x, y, epochs=10, batch=16, mu=mu)
        moved.append(sum(float(np.sum(d * d)) for d in trainer.delta().values()))
    assert moved[1] < 0.2 * moved[0]


def test_regression_and_labels_train_too() -> None:
    x, y = blobs((6,), 3)
    target = np.eye(3, dtype=np.float32)[y]
    for loss in ("mse", "bce_logits"):
        trainer = Trainer(build(mlp(), loss=loss, optimizer=adam(lr=0.02)))
        before = trainer.evaluate(x, target)["loss"]
        trainer.fit(x, target, epochs=20, batch=16)
        assert trainer.evaluate(x, target)["loss"] < 0.4 * before
