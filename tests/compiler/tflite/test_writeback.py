# SPDX-License-Identifier: Apache-2.0
"""A .tflite file in, trained, and the same file out: every claim checked by LiteRT or the bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tflite_models as made
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter
from tflite_oracle import pack

from coordinator.compiler import build, export, momentum
from edge_sdk import Bundle, Trainer
from edge_sdk.errors import CompileError
from edge_sdk.requantize import requantize, step_of
from edge_sdk.tflitefile import Tensor, read

MODELS: dict[str, Callable[[], bytes]] = {
    "branches": made.branches_int8,
    "float": made.dense_float,
    "float16": made.dense_float16,
    "hybrid": made.hybrid,
    "per channel": lambda: made.dense_int8(per_channel=True),
    "per tensor": lambda: made.dense_int8(per_channel=False),
    "twins": made.twins_int8,
    "uint8": made.dense_uint8,
}
FLOAT = {
    "float": 1e-5,
    "float16": 1e-2,
    "hybrid": 0.2,
}  # how close; hybrids round inputs as they run
EIGHT_BITS = sorted({*MODELS} - {*FLOAT})


def bundle_of(model: bytes, train: Any = "all", **options: Any) -> Bundle:
    return build(model, loss="cross_entropy", train=train, optimizer=momentum(0.9, 0.05), **options)


def moved(bundle: Bundle, seed: int = 0, factor: float = 0.3) -> dict[str, Any]:
    """Return parameters that are all a little off their initial values."""
    rng = np.random.default_rng(seed)
    return {
        name: (value + factor * rng.normal(size=value.shape) * (np.abs(value).max() or 0.1)).astype(
            np.float32
        )
        for name, value in bundle.params().items()
    }


def rows(bundle: Bundle, count: int = 40) -> Any:
    port = bundle.manifest["input"]
    rng = np.random.default_rng(5)
    shape = (count, *port["shape"][1:])
    if port["dtype"] == "float32":
        return rng.normal(size=shape).astype(np.float32)
    ends = np.iinfo(port["dtype"])
    return rng.integers(ends.min, ends.max, shape, port["dtype"], endpoint=True)


def tensors(model: bytes) -> dict[str, Tensor]:
    return {t.name: t for t in read(model).subgraphs[0].tensors}


def values(model: bytes, name: str) -> Any:
    file = read(model)
    tensor = tensors(model)[name]
    return np.frombuffer(file.data(tensor.buffer), tensor.dtype).reshape(tensor.shape)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("train", ["all", "last:1", "bias"])
def test_untrained_the_file_comes_out_byte_for_byte(name: str, train: str) -> None:
    data = MODELS[name]()
    bundle = bundle_of(data, train)
    assert bundle.manifest["source"] == "tflite"
    assert export(bundle, bundle.params()) == data


@pytest.mark.shared
@pytest.mark.parametrize(
    "name", ["kws_ref_model", "pretrainedResnet", "pretrainedResnet_quant", "vww_96_int8"]
)
def test_untrained_a_shipped_file_comes_out_byte_for_byte(shared: Path, name: str) -> None:
    path = shared / "models" / f"{name}.tflite"
    ranges = "fixed" if name == "pretrainedResnet" else "learned"
    bundle = bundle_of(path, "last:2", ranges=ranges)  # type: ignore[arg-type]  # a path does, too
    assert export(bundle, bundle.params()) == path.read_bytes()
    assert requantize(bundle, bundle.params(), "tflite") == path.read_bytes()


@pytest.mark.parametrize("name", EIGHT_BITS)
@pytest.mark.parametrize("ranges", ["fixed", "learned"])
def test_trained_the_file_says_what_the_onnx_model_says(name: str, ranges: str) -> None:
    bundle = bundle_of(MODELS[name](), ranges=ranges)
    params = moved(bundle)
    trainer = Trainer(bundle, engine="ort")
    trainer.load_params(params)
    x = rows(bundle)
    here, there = trainer.predict(x).astype(int), made.litert(export(bundle, params), x).astype(int)
    # an integer's difference that rounding makes on a new scale is several behind a softmax
    assert np.abs(here - there).max() <= (1 if ranges == "fixed" else 8)
    assert (here == there).mean() > 0.9
    assert len(np.unique(there)) > 10


@pytest.mark.parametrize("name", FLOAT)
def test_float_outputs_say_what_the_onnx_model_says(name: str) -> None:
    bundle = bundle_of(MODELS[name]())
    params = moved(bundle)
    trainer = Trainer(bundle, engine="ort")
    trainer.load_params(params)
    x = rows(bundle)
    there = made.litert(export(bundle, params), x)
    assert np.abs(trainer.predict(x) - there).max() < FLOAT[name] * max(1.0, np.abs(there).std())


@pytest.mark.parametrize("per_channel", [True, False])
def test_scales_follow_weights_and_biases_follow_scales(per_channel: bool) -> None:
    bundle = bundle_of(made.dense_int8(per_channel=per_channel))
    params = moved(bundle)
    out = export(bundle, params)
    found, x = tensors(out), tensors(out)["y0"].scale[0]
    weight, axis = params["w1"], (1,) if per_channel else None
    expected = np.abs(weight).max(axis) / np.float32(127)
    np.testing.assert_allclose(found["w1"].scale, np.atleast_1d(expected), rtol=1e-6)
    np.testing.assert_array_equal(found["b1"].scale, x * found["w1"].scale)
    real = values(out, "b1") * found["b1"].scale
    np.testing.assert_allclose(real, params["b1"], atol=found["b1"].scale.max())


def test_a_frozen_bias_keeps_its_meaning_on_its_weights_new_scale() -> None:
    data = made.dense_int8(per_channel=True)
    bundle = bundle_of(data, ["w1"])
    params = {name: 3 * value for name, value in bundle.params().items()}
    out = export(bundle, params)
    before, after = (values(d, "b1") * tensors(d)["b1"].scale for d in (data, out))
    np.testing.assert_allclose(after, before, atol=tensors(out)["b1"].scale.max())
    grown = np.abs(params["w1"]).max(1) / 127
    np.testing.assert_allclose(tensors(out)["w1"].scale, grown, rtol=1e-6)
    assert values(out, "w0").tobytes() == values(data, "w0").tobytes()


def test_a_learned_range_reaches_every_tensor_that_its_kernels_want_alike() -> None:
    data = made.branches_int8()
    bundle = bundle_of(data, ranges="learned")
    ranges = [n for n in bundle.params() if n.endswith(".range")]
    params = bundle.params() | dict.fromkeys(ranges, np.float32(0.4))
    old, new = tensors(data), tensors(export(bundle, params))
    together = {"y1", "y2", "joined", "most", "mean", "flat"}
    moved_by = step_of(np.array(0.4, np.float32), np.float32(1))
    grown = {n for n in new if len(new[n].scale) and new[n].dtype == "int8" and n[0] not in "xw"}
    for name in grown - {"probabilities"}:
        np.testing.assert_allclose(new[name].scale, old[name].scale * moved_by, rtol=1e-6)
    assert together < grown
    assert new["probabilities"].scale == np.float32(1 / 256)
    assert new["x"].scale == old["x"].scale
    for bias, weight, x in (("b1", "w1", "y0"), ("b7", "w7", "flat")):
        product = new[x].scale * new[weight].scale
        np.testing.assert_array_equal(new[bias].scale, np.asarray(product, np.float32))


def test_a_range_that_a_frozen_layer_shares_stays() -> None:
    right = bundle_of(made.branches_int8(), ["w2", "w7"], ranges="learned").params()
    both = bundle_of(made.branches_int8(), ["w1", "w2", "w7"], ranges="learned").params()
    assert [n for n in right if n.endswith(".range")] == ["y7.range"]
    assert len([n for n in both if n.endswith(".range")]) == 2


def test_one_of_two_tensors_with_the_same_bytes_is_trained_alone() -> None:
    data = made.twins_int8()
    bundle = bundle_of(data, ["w1", "b1"])
    held = bundle.graph("tflite", "predict")
    assert len(read(held).content) > len(data)
    params = moved(bundle)
    out = export(bundle, params)
    assert values(out, "w0").tobytes() == values(data, "w0").tobytes()
    assert values(out, "b0").tobytes() == values(data, "b0").tobytes()
    assert values(out, "w1").tobytes() != values(data, "w1").tobytes()
    x = rows(bundle)
    np.testing.assert_array_equal(made.litert(held, x), made.litert(data, x))


def test_equal_constants_that_training_leaves_alone_stay_shared() -> None:
    data = made.twins_int8()
    assert bundle_of(data, "last:1").graph("tflite", "predict") == data
    assert bundle_of(data, ["w2"]).graph("tflite", "predict") == data


def test_a_frozen_bias_that_moves_with_its_weight_is_told_from_its_twin() -> None:
    data = made.twins_int8()
    bundle = bundle_of(data, ["w1"])
    out = export(bundle, {"w1": bundle.params()["w1"] * np.float32(5)})
    assert values(out, "b0").tobytes() == values(data, "b0").tobytes()
    np.testing.assert_allclose(values(out, "b1"), values(data, "b1") / 5, atol=1)


def test_headroom_widens_the_step_of_the_files_logits() -> None:
    data = made.dense_int8(per_channel=True)
    bundle = bundle_of(data, headroom=4.0)
    out = export(bundle, bundle.params())
    assert tensors(out)["y1"].scale == 4 * tensors(data)["y1"].scale
    trainer, x = Trainer(bundle, engine="ort"), rows(bundle)
    off = trainer.predict(x).astype(int) - made.litert(out, x)
    assert np.abs(off).max() <= 1


def test_headroom_reaches_all_that_has_the_logits_step() -> None:
    b = made.Builder(9)
    x = b.tensor("x", (1, 6), scale=(0.02,), zero=-5)
    y = b.dense(x, 4, 0.05)
    logits = b.tensor("logits", (1, 4), scale=(0.05,), zero=3)
    shape = b.tensor("shape", (2,), "int32", [-1, 4])
    b.op("RESHAPE", (y, shape), logits, "ReshapeOptions", 1, newShape=[-1, 4])
    bundle = bundle_of(b.pack(x, b.softmax(logits)), headroom=4.0, ranges="learned")
    trainer, rows_, out = Trainer(bundle, engine="ort"), rows(bundle), export(bundle, moved(bundle))
    assert tensors(out)["y0"].scale == tensors(out)["logits"].scale
    trainer.load_params(moved(bundle))
    assert np.abs(trainer.predict(rows_).astype(int) - made.litert(out, rows_)).max() <= 2


def test_the_exported_file_is_accepted_whole_and_in_batches() -> None:
    bundle = bundle_of(made.branches_int8(), ranges="learned")
    runtime = Interpreter(model_content=export(bundle, moved(bundle)))
    port = runtime.get_input_details()[0]
    runtime.resize_tensor_input(port["index"], (3, *port["shape"][1:]))
    runtime.allocate_tensors()
    runtime.set_tensor(port["index"], np.zeros((3, *port["shape"][1:]), np.int8))
    runtime.invoke()
    assert runtime.get_tensor(runtime.get_output_details()[0]["index"]).shape == (3, 4)


def test_a_model_that_runtimes_would_not_run_first_is_refused() -> None:
    data = (Path(__file__).with_name("models") / "signatures.tflite").read_bytes()
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(data, 0))
    assert [s.subgraphIndex for s in model.signatureDefs] == [0, 1]
    model.signatureDefs[1].signatureKey = "serving_default"
    with pytest.raises(CompileError, match="serving_default is number 1: convert it alone"):
        bundle_of(pack(model))


def test_a_bias_of_two_layers_is_refused_by_name() -> None:
    b = made.Builder(7)
    x = b.tensor("x", (1, 6), scale=(0.02,), zero=-5)
    y = b.dense(x, 6, 0.05, act=made.RELU)
    y = b.dense(y, 6, 0.05, act=made.RELU)
    b.graph.operators[1].inputs[2] = b.graph.operators[0].inputs[2]
    data = b.pack(x, b.softmax(y))
    with pytest.raises(CompileError, match=r"'b0'.*several"):
        bundle_of(data)


def test_a_trained_constant_that_is_joined_with_others_is_refused_by_name() -> None:
    b = made.Builder(8)
    x = b.tensor("x", (1, 6), scale=(0.02,), zero=-5)
    y = b.dense(x, 6, 0.05, act=made.RELU)
    token = b.tensor("token", (1, 6), "int8", [range(6)], scale=(0.05,), zero=-128)
    both = b.tensor("both", (1, 6), scale=(0.05,), zero=-128)
    b.op("MAXIMUM", (token, y), both, "MaximumMinimumOptions", 2)
    data = b.pack(x, b.softmax(b.dense(both, 3, 0.1)))
    names = bundle_of(data, ["w0", "w2"], ranges="learned").params()
    assert not any("both" in n or "y0" in n for n in names)
    assert {"w0", "w2"} < {*bundle_of(data).params()} <= {"w0", "b0", "w2", "b2"}
    with pytest.raises(CompileError, match="token"):
        bundle_of(data, ["token"])
