# SPDX-License-Identifier: Apache-2.0
"""Networks as torch exports them, trained by LiteRT: convolutional, attending, recurrent."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch", reason="the oracle group is not installed: torch is missing")
from forward_models import quantized
from torch_zoo import ZOO, exported, network, rows

from coordinator.compiler import build, sgd
from edge_sdk.trainer import Trainer

pytestmark = pytest.mark.oracle
BOTH = ("onnx", "tflite")


@pytest.mark.parametrize("name", ["cnn", "mobilenet_v3", "transformer", "lstm", "gru"])
def test_exported_network_trains_alike(name: str) -> None:
    x, y = rows(ZOO[name], 20)
    model = exported(network(ZOO[name]), x)
    bundle = build(model, loss="cross_entropy", optimizer=sgd(lr=0.01), engines=BOTH)
    bundle.check()
    said = []
    for engine in ("ort", "litert"):
        trainer = Trainer(bundle, engine=engine)
        losses = [trainer.step(x[:16], y[:16]) for _ in range(3)]
        said.append((losses, trainer.evaluate(x, y)["loss"], trainer.predict(x)))
    assert said[1][0] == pytest.approx(said[0][0], rel=1e-4)
    assert said[1][1] == pytest.approx(said[0][1], rel=1e-4)
    np.testing.assert_allclose(said[1][2], said[0][2], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["cnn", "mobilenet_v3"])
def test_head_of_an_int8_network_learns_on_integer_kernels_alike(name: str) -> None:
    x, y = rows(ZOO[name], 24)
    model = quantized(exported(network(ZOO[name]), x), x, per_channel=True)
    bundle = build(
        model, loss="cross_entropy", train="last:1", optimizer=sgd(lr=0.01), engines=BOTH
    )
    said = []
    for engine in ("ort", "litert"):
        trainer = Trainer(bundle, engine=engine)
        said.append([trainer.step(x[:16], y[:16]) for _ in range(3)])
    assert said[1] == pytest.approx(said[0], rel=1e-3)
