# SPDX-License-Identifier: Apache-2.0
"""Cross entropy takes logits as a last convolution leaves them, with axes of size 1."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from forward_models import Net, Steps, blobs

from coordinator.compiler import build, momentum
from coordinator.compiler.losses import classes_of
from edge_sdk.bundle import Bundle
from edge_sdk.trainer import Trainer

X, LABELS = blobs((1, 8, 8), 4)


def ending(*, last: str = "", axes: tuple[int, ...] = (), flat: bool = False) -> Net:
    net = Net(("N", 1, 8, 8)).conv("conv", 1, 6, 3).add("Relu").add("GlobalAveragePool")
    net.conv("head", 6, 4, 1)
    if flat:
        net.add("Flatten")
    elif axes:
        net.add("Transpose", perm=[0, *axes])
    return net.add(last, axis=1) if last else net


def trained(model: onnx.ModelProto) -> tuple[Bundle, list[float], Steps]:
    bundle = build(model, loss="cross_entropy", optimizer=momentum(0.9, lr=0.05))
    bundle.check()
    run = Steps(bundle)
    return bundle, [run.step(X, LABELS) for _ in range(5)], run


@pytest.mark.parametrize("net", [ending(), ending(axes=(2, 1, 3)), ending(axes=(2, 3, 1))])
def test_logits_with_axes_of_size_1_train_as_flat_ones_do(net: Net) -> None:
    _, losses, run = trained(net.model())
    _, flat_losses, flat = trained(ending(flat=True).model())
    np.testing.assert_allclose(losses, flat_losses, rtol=1e-5)
    for name, value in flat.params().items():
        np.testing.assert_allclose(run.params()[name], value, atol=1e-6)


@pytest.mark.parametrize("last", ["Softmax", "LogSoftmax"])
def test_a_softmax_over_classes_that_lie_before_them_is_left_to_the_loss(last: str) -> None:
    _, losses, _ = trained(ending(last=last).model())
    _, bare, _ = trained(ending().model())
    np.testing.assert_allclose(losses, bare, rtol=1e-5)


def test_they_are_evaluated_and_their_classes_checked() -> None:
    bundle = build(ending().model(), loss="cross_entropy", optimizer=momentum(0.9, lr=0.05))
    assert bundle.manifest["output"]["shape"] == [None, 4, 1, 1]
    trainer = Trainer(bundle)
    trainer.fit(X, LABELS, epochs=30)
    assert trainer.evaluate(X, LABELS)["accuracy"] > 0.5
    assert trainer.predict(X).shape == (len(X), 4, 1, 1)
    with pytest.raises(ValueError, match="classes 0 to 3, got 0 to 4"):
        trainer.step(X[:2], np.array([0, 4]))


def test_more_than_one_axis_is_no_row_of_classes() -> None:
    assert [classes_of(s) for s in ((None, 4), (None, 4, 1, 1), (None, 1, 4))] == [4, 4, 4]
    assert [classes_of(s) for s in (None, (4,), (None, 1), (None, None), (None, 2, 2))] == [
        None
    ] * 5
