# SPDX-License-Identifier: Apache-2.0
"""What int8 costs in accuracy: models trained from random weights, float32 and int8, side by side.

Runs of a seed see the same rows in the same order. "float" is the float32 twin, trained as long;
"master" is what the training graph, which rounds as int8 does, says of the trained masters, and
"exported" what plain onnxruntime says of the int8 file made of them; "unrounded" is the float32
model with the masters in it, which knows nothing of the ranges they were trained in. Accuracies are
on rows that nothing was trained on; differences are in points, positive where int8 is worse.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray

from coordinator.compiler import Optimizer, build, chain, export, momentum
from coordinator.compiler.emit import Emit
from coordinator.compiler.optim import Directions
from coordinator.recipes import recipe
from edge_sdk.bundle import Bundle
from edge_sdk.errors import ConfigError
from edge_sdk.requantize import along
from edge_sdk.trainer import Trainer
from edge_sdk.types import Array, Params

CALIBRATION, BATCH, LR, DECAY = 80, 32, 0.05, 0.9
STEPS = 1200
"""Of a run, whatever the data."""

NARROW = 0.25
"""How much of the range they need activations get where the calibration is poor."""

SETTINGS: dict[str, dict[str, Any]] = {
    "fixed": {},
    "headroom 8": {"headroom": 8.0},
    "learned": {"ranges": "learned"},
}
"""What is done about ranges that training outgrows: arguments of `build`."""


class Rows(NamedTuple):
    """Labelled rows to train on and others to judge by: `x` float32, `y` int64 classes."""

    x: NDArray[Any]
    y: NDArray[Any]
    test_x: NDArray[Any]
    test_y: NDArray[Any]


def measure(
    model: str = "digits", data: Path | None = None, *, seeds: int = 3, steps: int = STEPS
) -> dict[str, list[Mapping[str, Any]]]:
    """Train a recipe's model in float32 and in int8; rows are means over seeds.

    Args:
        model: a recipe with `build(seed)`, or digits.
        data: rows in the `--data` form (x_train, y_train, x_test, y_test); digits brings its own.
        seeds: how many.
        steps: of each run.

    Returns: tables "int8" (ranges of activations) and "scaling" (units of the parameters).
    Raises: ConfigError without data.
    """
    runs = [_of_seed(model, data, seed, steps) for seed in range(seeds)]
    tables = {name: [run[name] for run in runs] for name in ("int8", "scaling")}
    return {
        name: [_mean(model, rows) for rows in zip(*found, strict=True)]
        for name, found in tables.items()
    }


def _of_seed(model: str, data: Path | None, seed: int, steps: int) -> dict[str, list[Any]]:
    net, rows = _task(model, data, seed)
    plain = build(net, loss="cross_entropy", optimizer=momentum(DECAY, lr=LR))

    def judged(bundle: Bundle) -> dict[str, float]:
        return _judged(bundle, plain, rows, steps, seed)

    exact = judged(plain)
    found: list[dict[str, Any]] = [{"calibration": "-", "ranges": "-", **exact}]
    for calibration, share in (("good", 1.0), ("poor", NARROW)):
        int8 = quantize(net, rows.x[:CALIBRATION], share)
        for ranges, settings in SETTINGS.items():
            way = {"calibration": calibration, "ranges": ranges}
            found.append({**way, **judged(_built(int8, **settings))})
    scaling = [
        {"units": units, **judged(bundle)}
        for units, bundle in _in_units(quantize(net, rows.x[:CALIBRATION])).items()
    ]
    for row in (*found, *scaling):
        row["float"] = exact["exported"]
    return {"int8": found, "scaling": scaling}


def _in_units(int8: onnx.ModelProto) -> dict[str, Bundle]:
    """Return bundles that train in units of the weights and in units of their integers."""
    optimizer, levels = momentum(DECAY, lr=LR), steps_of(_built(int8))
    ways = {
        "masters": optimizer,
        "integers": chain(in_levels(levels, is_scaled=False), optimizer),
        "integers, QAS": chain(in_levels(levels, is_scaled=True), optimizer),
    }
    return {units: _built(int8, optimizer=way, headroom=8.0) for units, way in ways.items()}


def in_levels(levels: Sequence[Array], *, is_scaled: bool) -> Optimizer:
    """Take steps as a training that keeps integers instead of masters would take them.

    It sees the gradient by the integer, ``s * g``, and moves the integer, so the weight by ``s``
    times the step. Quantization-aware scaling (Lin et al. 2022, section 3.1) multiplies the
    gradient by ``s**-2`` in between.
    """

    def emit(e: Emit, grads: list[str], slots: list[str]) -> Directions:
        del slots
        made = []
        for g, s in zip(grads, levels, strict=True):
            by_integer = e.Mul(g, e.const(s))
            step = e.Mul(by_integer, e.const(s**-2)) if is_scaled else by_integer
            made.append(e.Mul(step, e.const(s)))
        return Directions(made, None, [])

    return Optimizer([["levels", is_scaled]], None, lambda _: [], emit)


def steps_of(bundle: Bundle) -> list[Array]:
    """Return what one integer step of each parameter is worth, shaped to broadcast over it."""
    data, found = bundle.graph("onnx", "predict"), {}
    for patch in bundle.manifest["patches"]["onnx"]:
        if patch["param"] is not None and "scale_offset" in patch:
            at, n = patch["scale_offset"], patch["scales"]
            scale = np.frombuffer(data, "<f4", n, at).astype(np.float32)
            axis = patch["axis"] if n > 1 and patch["kind"] == "quantized" else None
            rank = len(bundle.manifest["params"][patch["param"]]["shape"])
            found[patch["param"]] = scale if axis is None else along(scale, axis, rank)
    return [found.get(i, np.ones(1, np.float32)) for i in range(len(bundle.shapes))]


def quantize(model: onnx.ModelProto, x: NDArray[Any], share: float = 1.0) -> onnx.ModelProto:
    """Return the int8 QDQ form, weights per channel, ranges of activations fitted to ``share * x``.

    The range of the input itself is always that of `x`.
    """
    from onnxruntime import quantization as q

    name = model.graph.input[0].name

    class Reader(q.CalibrationDataReader):  # type: ignore[misc] # onnxruntime has no types
        """Hand the calibration rows over, all at once."""

        def __init__(self) -> None:
            self._left: Iterator[dict[str, NDArray[Any]]] = iter([{name: np.float32(share) * x}])

        def get_next(self) -> dict[str, NDArray[Any]] | None:
            return next(self._left, None)

    ends = {"rmin": np.float32(min(x.min(), 0)), "rmax": np.float32(max(x.max(), 0))}
    ready = onnx.ModelProto.FromString(model.SerializeToString())
    onnx.helper.set_model_props(ready, {"onnx.quant.pre_process": "onnxruntime.quant"})
    with tempfile.TemporaryDirectory() as folder:
        source, made = Path(folder, "float.onnx"), Path(folder, "int8.onnx")
        onnx.save(ready, source)
        q.quantize_static(
            source,
            made,
            Reader(),
            quant_format=q.QuantFormat.QDQ,
            per_channel=True,
            activation_type=q.QuantType.QInt8,
            weight_type=q.QuantType.QInt8,
            extra_options={"TensorQuantOverrides": {name: [ends]}},
        )
        return onnx.load_model(made)


def _built(model: onnx.ModelProto, **settings: Any) -> Bundle:
    chosen = {"optimizer": momentum(DECAY, lr=LR), **settings}
    return build(model, loss="cross_entropy", **chosen)


def _judged(bundle: Bundle, plain: Bundle, rows: Rows, steps: int, seed: int) -> dict[str, float]:
    """Train a bundle and say what came of it."""
    trainer = Trainer(bundle, seed=seed)
    done = trainer.fit(rows.x, rows.y, epochs=None, steps=steps, batch=BATCH)
    params = trainer.params()
    masters: Params = {name: params[name] for name in plain.shapes}
    return {
        "step_ms": 1e3 * done["seconds"] / done["steps"],
        "loss": trainer.evaluate(rows.x, rows.y)["loss"],
        "unrounded": accuracy(export(plain, masters), rows.test_x, rows.test_y),
        "master": trainer.evaluate(rows.test_x, rows.test_y)["accuracy"],
        "exported": accuracy(export(bundle, params), rows.test_x, rows.test_y),
    }


def accuracy(model: bytes, x: NDArray[Any], y: NDArray[Any]) -> float:
    """Return the share of rows whose class plain onnxruntime gets right with a model."""
    import onnxruntime as ort

    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: x})
    return float(np.mean(np.argmax(logits, axis=1) == y))


def _task(model: str, data: Path | None, seed: int) -> tuple[onnx.ModelProto, Rows]:
    made = recipe(model)
    if model == "digits" and data is None:
        parts = made.split(seed)
        return made.network(seed), Rows(*parts.devices, *parts.test)
    if data is None:
        raise ConfigError(
            f"expected --data with rows for {model}: x_train, y_train, x_test, y_test"
        )
    with np.load(data, allow_pickle=False) as held:
        rows = Rows(*(held[name] for name in ("x_train", "y_train", "x_test", "y_test")))
    return (made.network if model == "digits" else made.build)(seed), rows


def _mean(model: str, rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Average over the seeds."""
    first = rows[0]
    below = [100 * (row["master"] - row["exported"]) for row in rows]
    means = {
        k: float(np.mean([r[k] for r in rows])) if isinstance(v, float) else v
        for k, v in first.items()
    }
    return {
        "model": model,
        **means,
        "below_master": float(np.mean(below)),
        "below_master_at_most": max(below),
        "below_float": round(100 * (means["float"] - means["exported"]), 6) + 0.0,
    }
