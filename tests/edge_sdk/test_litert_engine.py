# SPDX-License-Identifier: Apache-2.0
"""The engines that run `.tflite` graphs train, evaluate and predict as onnxruntime does."""

from __future__ import annotations

import json
import os
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forward_models import blobs, cnn, mlp, quantized
from litert_runs import old_python

from coordinator.bench import device, recipes
from coordinator.compiler import adam, build, chain, clip, momentum, sgd
from coordinator.compiler.tflite.write import Model, Operator, Tensor, write
from edge_sdk.bundle import Bundle
from edge_sdk.engine.litert import Litert, Tflite
from edge_sdk.errors import EngineError
from edge_sdk.requantize import requantize
from edge_sdk.trainer import Trainer

BOTH = ("onnx", "tflite")
ROOT = Path(__file__).resolve().parents[2]
MODES = ("all", "bias", "last:1")


@cache
def recipe_bundle(name: str, mode: str) -> Bundle:
    options: dict[str, Any] = {"loss": recipes.LOSSES[name], "optimizer": momentum(0.9, lr=0.01)}
    return build(recipes.model(name), train=mode, engines=BOTH, **options)


def trained(bundle: Bundle, engine: str, x: Any, y: Any, steps: int = 4) -> dict[str, Any]:
    """Train a few steps on batches of two sizes and say everything that an engine says."""
    trainer = Trainer(bundle, engine=engine, seed=3)
    losses = [trainer.step(x[:16], y[:16]) for _ in range(steps)]
    losses.append(trainer.step(x[16:], y[16:]))
    return {
        "losses": losses,
        "params": trainer.params(),
        "measured": trainer.evaluate(x, y),
        "predicted": trainer.predict(x),
    }


def assert_same(a: dict[str, Any], b: dict[str, Any], tolerance: float = 1e-4) -> None:
    np.testing.assert_allclose(b["losses"], a["losses"], rtol=tolerance, atol=tolerance)
    for name, value in a["params"].items():
        np.testing.assert_allclose(
            b["params"][name], value, rtol=10 * tolerance, atol=5 * tolerance, err_msg=name
        )
    assert b["measured"] == pytest.approx(a["measured"], rel=10 * tolerance)
    if a["predicted"].dtype == np.float32:
        near = {"rtol": 10 * tolerance, "atol": 10 * tolerance}
        np.testing.assert_allclose(b["predicted"], a["predicted"], **near)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", sorted(recipes.LOSSES))
def test_litert_trains_every_recipe_as_onnxruntime_does(name: str, mode: str) -> None:
    bundle = recipe_bundle(name, mode)
    x, y = recipes.examples(bundle, 21)
    # where ReLUs are many, rounding soon flips one, and what follows is another course
    steps = 1 if name == "mobilenet" else 2
    assert_same(trained(bundle, "ort", x, y, steps), trained(bundle, "litert", x, y, steps))


OPTIMIZERS = {
    "sgd": sgd(lr=0.1),
    "momentum": momentum(0.9, lr=0.05),
    "nesterov": momentum(0.9, lr=0.05, nesterov=True),
    "adam": adam(lr=0.01),
    "clip and adam": chain(clip(0.5), adam(lr=0.01)),
    "clip and sgd": chain(clip(0.1), sgd(lr=0.1)),
}


@pytest.mark.parametrize("proximal", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_steps_alike_near_its_anchor_or_not(
    optimizer: str, *, proximal: bool
) -> None:
    bundle = build(
        cnn(),
        loss="cross_entropy",
        optimizer=OPTIMIZERS[optimizer],
        proximal=proximal,
        engines=BOTH,
    )
    x, y = blobs((1, 8, 8), 4, 48)
    said = []
    for engine in ("ort", "litert"):
        trainer = Trainer(bundle, engine=engine, seed=1)
        trainer.step(x, y)
        base = bundle.params()
        trainer.load_params(base, {k: v + np.float32(0.1) for k, v in base.items()})
        fit = trainer.fit(x, y, epochs=3, batch=20, mu=0.3 if proximal else 0.0)
        said.append((fit["loss"], trainer.params()))
    assert said[1][0] == pytest.approx(said[0][0], rel=1e-4)
    for name, value in said[0][1].items():
        np.testing.assert_allclose(said[1][1][name], value, rtol=1e-3, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("loss", ["cross_entropy", "mse", "bce_logits"])
def test_every_loss_is_the_same_number(loss: str) -> None:
    bundle = build(mlp(last=""), loss=loss, optimizer=sgd(lr=0.1), engines=BOTH)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((21, 6)).astype(np.float32)
    y = rng.integers(0, 3, 21) if loss == "cross_entropy" else rng.random((21, 3), np.float32)
    assert_same(trained(bundle, "ort", x, y), trained(bundle, "litert", x, y))


@pytest.mark.parametrize("kind", ["per tensor", "per channel", "unsigned"])
@pytest.mark.parametrize("mode", MODES)
def test_int8_models_train_and_predict_alike(kind: str, mode: str) -> None:
    x, y = blobs((1, 8, 8), 4, 48)
    options = {"per_channel": kind == "per channel", "unsigned": kind == "unsigned"}
    model = quantized(cnn(), x, **options)
    bundle = build(model, loss="cross_entropy", train=mode, optimizer=sgd(lr=0.05), engines=BOTH)
    a, b = (trained(bundle, engine, x[:21], y[:21]) for engine in ("ort", "litert"))
    np.testing.assert_allclose(b["losses"], a["losses"], rtol=0.02)
    step = np.abs(a["predicted"]).max() / 127
    assert np.abs(b["predicted"] - a["predicted"]).max() <= 2.01 * step + 1e-6


def test_learned_ranges_train_alike() -> None:
    x, y = blobs((1, 8, 8), 4, 48)
    bundle = build(
        quantized(cnn(), x),
        loss="cross_entropy",
        optimizer=sgd(lr=0.05),
        ranges="learned",
        engines=BOTH,
    )
    a, b = (trained(bundle, engine, x[:21], y[:21]) for engine in ("ort", "litert"))
    np.testing.assert_allclose(b["losses"], a["losses"], rtol=0.02)
    ranges = {p["param"] for p in bundle.manifest["patches"]["tflite"] if p["kind"] == "range"}
    assert ranges == {
        p["param"] for p in bundle.manifest["patches"]["onnx"] if p["kind"] == "range"
    }


def test_untrained_weights_leave_the_file_as_it_is() -> None:
    bundle = recipe_bundle("digits", "all")
    assert requantize(bundle, bundle.params(), "tflite") == bundle.graph("tflite", "predict")


def test_state_moves_with_the_batch_size_and_resets() -> None:
    bundle = build(mlp(), loss="cross_entropy", optimizer=momentum(0.9, lr=0.1), engines=BOTH)
    x, y = blobs((6,), 3, 64)
    said = []
    for engine in ("ort", "litert"):
        trainer = Trainer(bundle, engine=engine)
        for rows in (7, 3, 7, 1, 16, 3):
            trainer.step(x[:rows], y[:rows])
        trainer.reset_optimizer()
        trainer.step(x, y)
        trainer.load_params(trainer.params())
        assert not any(d.any() for d in trainer.delta().values())
        trainer.step(x[:5], y[:5])
        said.append(trainer.params())
    for name, value in said[0].items():
        np.testing.assert_allclose(said[1][name], value, rtol=1e-4, atol=1e-5, err_msg=name)


def test_bundle_with_tflite_graphs_alone_trains_by_itself() -> None:
    bundle = build(mlp(), loss="cross_entropy", optimizer=sgd(lr=0.1), engines=("tflite",))
    x, y = blobs((6,), 3, 32)
    trainer = Trainer(bundle)
    first = trainer.step(x, y)
    assert trainer.fit(x, y, epochs=20)["loss"] < first
    bundle.check()


def test_same_arguments_give_the_same_bytes() -> None:
    made = [
        build(cnn(), loss="cross_entropy", optimizer=adam(lr=0.01), engines=BOTH).data
        for _ in range(2)
    ]
    assert made[0] == made[1]


def test_damaged_graph_is_one_line() -> None:
    with pytest.raises(EngineError, match="could not load the graph") as caught:
        Litert().predictor(b"TFL3" * 10).run(np.zeros((1, 1), np.float32))
    assert "\n" not in str(caught.value)


def test_tflite_runtime_refuses_a_numpy_it_would_crash_with() -> None:
    if int(np.__version__.split(".")[0]) < 2:
        pytest.skip("numpy is below 2 here")
    with pytest.raises(EngineError, match="numpy below 2"):
        Tflite()


_OLD = """
import json, sys
import numpy as np
from edge_sdk.bundle import Bundle
from edge_sdk.trainer import Trainer
said = {}
for name in sys.argv[1:]:
    data = np.load(name + ".npz")
    x, y = data["x"], data["y"]
    t = Trainer(Bundle.load(name), engine="tflite", seed=3)
    losses = [t.step(x[:16], y[:16]) for _ in range(4)] + [t.step(x[16:], y[16:])]
    said[name] = losses + [t.evaluate(x, y)["loss"], float(np.abs(t.predict(x)).sum())]
print(json.dumps(said))
"""


def test_tflite_runtime_trains_as_onnxruntime_does(tmp_path: Path) -> None:
    python = old_python()
    wanted = {}
    for name in ("dscnn", "autoencoder", "har", "resnet8"):
        bundle = recipe_bundle(name, "all")
        x, y = recipes.examples(bundle, 21)
        path = tmp_path / name
        bundle.save(path)
        np.savez(f"{path}.npz", x=x, y=y)
        said = trained(bundle, "ort", x, y)
        wanted[str(path)] = [
            *said["losses"], said["measured"]["loss"], float(np.abs(said["predicted"]).sum())
        ]  # fmt: skip
    run = subprocess.run(
        [python, "-c", _OLD, *wanted],
        check=True,
        capture_output=True,
        timeout=110,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    for name, numbers in json.loads(run.stdout.splitlines()[-1]).items():
        np.testing.assert_allclose(numbers, wanted[name], rtol=1e-3, err_msg=name)


@pytest.mark.parametrize("threads", [1, 2])
def test_same_seed_gives_the_same_bits(threads: int) -> None:
    bundle = build(cnn(), loss="cross_entropy", optimizer=adam(lr=0.01), engines=("tflite",))
    x, y = blobs((1, 8, 8), 4, 48)
    made = []
    for _ in range(2):
        trainer = Trainer(bundle, engine="litert", threads=threads, seed=5)
        trainer.fit(x, y, epochs=2, batch=20)
        made.append({name: value.tobytes() for name, value in trainer.params().items()})
    assert made[0] == made[1]


def test_head_training_of_dscnn_takes_at_most_70_mib(figure: Any) -> None:
    peak = device.measure("dscnn", "head", "litert")["training_mib"]
    figure("peak of DS-CNN head training by LiteRT, MiB", peak, "<= 70")
    assert peak <= 70


def test_model_whose_batch_is_fixed_predicts_row_by_row() -> None:
    tensors = [
        Tensor("x", "float32", (1, 2, 3)),
        Tensor("shape", "int32", (2,), np.array([1, 6], np.int32)),
        Tensor("y", "float32", (1, 6)),
    ]
    flatten = Operator("RESHAPE", (0, 1), (2,), {"new_shape": (1, 6)})
    model = write(Model(tensors, [flatten], (0,), (2,)))
    x = np.arange(24, dtype=np.float32).reshape(4, 2, 3)
    predictor = Litert().predictor(model)
    for rows in (4, 1, 3):
        np.testing.assert_array_equal(predictor.run(x[:rows]), x[:rows].reshape(rows, 6))
