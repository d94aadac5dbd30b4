# SPDX-License-Identifier: Apache-2.0
"""What Keras and TensorFlow's converter made, trained and written back: LiteRT runs every file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from litert_runs import old_python, tflite_runtime
from tflite_models import litert

from coordinator.compiler import build, export, momentum
from edge_sdk import Bundle, Trainer
from edge_sdk.engine.litert import Litert

FOLDER = Path(__file__).with_name("models")
REFUSED = {"gru_loop_float", "lstm_quantized_int8", "variables"}
NAMES = sorted(p.stem for p in FOLDER.glob("*.tflite") if not p.stem.startswith("refused"))
CLOSE = 1e-4
APART = {"gru_unrolled_int8": 16}
"""A bias beside a constant of zeros: its step is next to nothing, 32 bits are not enough for it."""
ROUNDING = {"cnn_1d_float16": 1e-3, "cnn_1d_dynamic": 1e-2, "mobilenet_v1_dynamic": 1e-2}
"""Files whose weights, or whose kernels' inputs, have fewer bits than the ONNX model's."""


def small(name: str) -> str:
    """Return what is trained of a model: all, or the last layers of a large one."""
    return "last:3" if name.startswith(("mobilenet", "efficientnet")) else "all"


def moved(bundle: Bundle) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    ranges = {n for n in bundle.params() if n.endswith(".range")}
    return {
        n: np.asarray(v + 0.05 if n in ranges else v * (1 + 0.05 * rng.normal(size=v.shape)), "f4")
        for n, v in bundle.params().items()
    }


def rows(bundle: Bundle) -> Any:
    port, rng = bundle.manifest["input"], np.random.default_rng(2)
    shape = (4, *port["shape"][1:])
    if port["dtype"] == "int8":
        return rng.integers(-128, 128, shape).astype(np.int8)
    return rng.integers(0, 9, shape).astype("i4") if port["dtype"] == "int32" else (
        rng.normal(size=shape).astype(np.float32)
    )  # fmt: skip


def made(name: str) -> Bundle:
    data = (FOLDER / f"{name}.tflite").read_bytes()
    rule = momentum(0.9, lr=0.01)
    return build(data, loss="mse", train=small(name), optimizer=rule, ranges="learned")


@pytest.mark.parametrize("name", [name for name in NAMES if name not in REFUSED])
def test_an_export_comes_out_byte_for_byte_and_trained_it_says_what_the_onnx_model_says(
    name: str,
) -> None:
    data, bundle = (FOLDER / f"{name}.tflite").read_bytes(), made(name)
    bundle.check()
    assert export(bundle, bundle.params()) == data
    params, x = moved(bundle), rows(bundle)
    trained = export(bundle, params)
    assert trained != data
    trainer = Trainer(bundle, engine="ort")
    trainer.load_params(params)
    here, there = trainer.predict(x), litert(trained, x)
    device = Litert(1).predictor(trained)
    for _ in range(2):  # of what it said before a device's engine knows nothing
        np.testing.assert_allclose(device.run(x), there, rtol=1e-5, atol=1e-6)
    off = np.abs(here.astype(np.float64) - there)
    if here.dtype == np.int8:  # on new ranges numbers round otherwise, here and there
        assert np.median(off) <= 1
        assert off.max() <= APART.get(name, 8)
    else:
        assert off.max() <= ROUNDING.get(name, CLOSE) * max(1.0, np.abs(there).max())


QUICK = [
    "activations_int8", "arrangements_int8", "cnn_1d_float16", "cnn_1d_int8", "cnn_2d_int8",
    "decoder_int8", "gru_unrolled_int8", "lstm_short_float", "signatures", "text_float",
    "tied_int8",
]  # fmt: skip


def test_tflite_runtime_of_before_runs_what_was_trained(tmp_path: Path) -> None:
    old_python()
    runs, wanted = {}, {}
    for name in QUICK:
        bundle = made(name)
        trained, x = export(bundle, moved(bundle)), rows(bundle)[:1]
        runs[name] = trained, {bundle.manifest["input"]["name"]: x}
        wanted[name] = litert(trained, x).astype(np.float64)
    for name, said in tflite_runtime(runs, tmp_path).items():
        (answer,) = said.values()
        atol = 2 if answer.dtype == np.int8 else 1e-5
        np.testing.assert_allclose(answer.astype(np.float64), wanted[name], atol=atol, err_msg=name)
