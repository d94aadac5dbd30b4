# SPDX-License-Identifier: Apache-2.0
"""A shipped int8 keyword model, trained on real clips: LiteRT says what the float masters said."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tflite_models import litert

from coordinator.compiler import build, export, momentum
from edge_sdk import Trainer

WAYS: dict[str, tuple[str, float, dict[str, Any]]] = {
    "head": ("last:1", 0.05, {}),
    "head, learned ranges": ("last:1", 0.05, {"ranges": "learned"}),
    "last three": ("last:3", 0.02, {}),
    "last three, learned ranges": ("last:3", 0.02, {"ranges": "learned"}),
    "last three, headroom 4": ("last:3", 0.02, {"headroom": 4.0}),
    "all": ("all", 0.0002, {}),
    "all, learned ranges": ("all", 0.0002, {"ranges": "learned"}),
}


@pytest.fixture(scope="module")
def clips(shared: Path) -> dict[str, Any]:
    loader = runpy.run_path(str(shared / "data" / "load.py"))["load"]
    data: dict[str, Any] = loader("kws", str(shared / "data"), normalise=False)
    return {n: np.moveaxis(v, 1, -1) if n.startswith("x") else v for n, v in data.items()}


@pytest.mark.shared
@pytest.mark.parametrize("way", WAYS)
def test_the_exported_int8_file_is_within_half_a_point_of_its_float_masters(
    shared: Path, clips: dict[str, Any], way: str, figure: Callable[..., None]
) -> None:
    train, rate, options = WAYS[way]
    model = shared / "models" / "kws_ref_model.tflite"
    bundle = build(
        model, loss="cross_entropy", train=train, optimizer=momentum(0.9, lr=rate), **options
    )
    trainer = Trainer(bundle, engine="ort")
    trainer.fit(clips["x_train"], clips["y_train"], epochs=1, batch=32)
    x, y = clips["x_test"], clips["y_test"]
    master = 100 * trainer.evaluate(x, y)["accuracy"]
    port = bundle.manifest["input"]
    rows = np.rint(x / np.float32(port["scale"])) + port["zero_point"]
    told = litert(export(bundle, trainer.params()), np.clip(rows, -128, 127).astype(np.int8))
    exported = 100 * float((told.argmax(1) == y).mean())
    figure(f"kws, {way}: float masters, %", master)
    figure(f"kws, {way}: exported .tflite by LiteRT, %", exported, "within 0.5")
    assert abs(exported - master) <= 0.5
    assert exported > 91.5
    assert (told == trainer.predict(x)).mean() > 0.999  # and so does onnxruntime
