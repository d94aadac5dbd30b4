# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from federation import Plan, federate
from forward_models import (
    Net,
    Steps,
    Tensor,
    blobs,
    cnn,
    evaluate,
    logits_of_training,
    predict,
    quantized,
    session,
)
from onnx import TensorProto

from coordinator.compiler import Optimizer, adam, build, chain, clip, export, momentum, sgd
from coordinator.compiler.emit import Emit
from coordinator.compiler.graph import Graph
from coordinator.compiler.ranges import SLOWED, step
from coordinator.compiler.vjp import backward
from edge_sdk.bundle import Bundle, pack
from edge_sdk.errors import BundleError, CompileError
from edge_sdk.limits import Limits
from edge_sdk.requantize import MOST_OCTAVES, OCTAVES, step_of
from edge_sdk.trainer import Trainer

KINDS: dict[str, dict[str, Any]] = {
    "int8 per tensor": {},
    "int8 per channel": {"per_channel": True},
    "uint8 per channel": {"unsigned": True, "per_channel": True},
}
X, LABELS = blobs((1, 8, 8), 4)
OPTIMIZERS = {"momentum": momentum(0.9, lr=0.03), "adam": adam(lr=0.01)}


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest) -> onnx.ModelProto:
    """A model that knows nothing yet, its ranges fitted to that."""
    return quantized(cnn(opset=17), X, **KINDS[request.param])


def trained(
    model: onnx.ModelProto,
    steps: int = 80,
    optimizer: Optimizer = OPTIMIZERS["momentum"],
    **kw: Any,
) -> tuple[Steps, float]:
    settings = {"ranges": "learned", **kw}
    run = Steps(build(model, loss="cross_entropy", optimizer=optimizer, **settings))
    return run, [run.step(X, LABELS) for _ in range(steps)][-1]


def ranges_of(params: dict[str, Tensor]) -> dict[str, float]:
    return {name: float(v) for name, v in params.items() if name.endswith(".range")}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_learned_ranges_follow_what_training_makes_larger(
    model: onnx.ModelProto, optimizer: Optimizer
) -> None:
    _, tight = trained(model, optimizer=optimizer, ranges="fixed")
    run, loose = trained(model, optimizer=optimizer)
    assert tight > 0.4  # cut off: no logit may exceed the range it was quantized for
    assert loose < 0.05
    grown = ranges_of(run.params())
    assert len(grown) == 4
    assert grown["output_QuantizeLinear_Input.range"] * OCTAVES > 1.5
    came = predict(export(run.bundle, run.params()), X)
    told = int(evaluate(run.bundle, X, LABELS, run.params())["correct"]) / len(X)
    assert np.mean(came.argmax(1) == LABELS) == pytest.approx(told, abs=0.005)


def test_the_exported_model_computes_what_training_saw(model: onnx.ModelProto) -> None:
    run, _ = trained(model)
    data = export(run.bundle, run.params())
    graph = Graph.load(data)
    last = graph.producers[graph.outputs[0].name]
    lattice = float(graph.initializers[last.inputs[1]].reshape(()))
    seen, came = logits_of_training(run.bundle, X, LABELS, run.params()), predict(data, X)
    off = np.abs(seen - came) / lattice
    assert np.mean(off < 0.5) > 0.9  # the same lattice point but for roundings at its edges
    assert off.max() < 4.5


def test_an_untrained_export_is_byte_identical(model: onnx.ModelProto) -> None:
    bundle = build(model, loss="cross_entropy", ranges="learned")
    data = bundle.member("onnx/predict.onnx")
    assert export(bundle, bundle.params()) == data
    np.testing.assert_array_equal(predict(data, X), predict(model.SerializeToString(), X))
    assert bundle.data == build(model, loss="cross_entropy", ranges="learned").data


def test_a_float_model_has_no_ranges_to_learn() -> None:
    built = [build(cnn(), loss="cross_entropy", ranges=r).data for r in ("fixed", "learned")]
    assert built[0] == built[1]


def test_only_ranges_that_training_moves_are_learned(model: onnx.ModelProto) -> None:
    bundle = build(model, loss="cross_entropy", ranges="learned", train="head.*")
    assert list(bundle.shapes) == [
        "head.weight", "head.bias", "output_QuantizeLinear_Input.range"
    ]  # fmt: skip


def test_the_bias_of_a_frozen_layer_follows_its_learned_input(model: onnx.ModelProto) -> None:
    run, _ = trained(model, train=["conv1.weight"])
    patches = run.bundle.manifest["patches"]["onnx"]
    inputs = [p for p in patches if p["kind"] == "bias" and "input" in p]
    assert len(inputs) == 3
    assert all(p["param"] is None and "weight_scale" in p for p in inputs)
    values = [biases(data) for data in (predict_of(run.bundle), export(run.bundle, run.params()))]
    assert values[0].keys() == values[1].keys() >= {"fc.bias_quantized", "head.bias_quantized"}
    for name, value in values[0].items():
        np.testing.assert_allclose(value, values[1][name], atol=1e-3)


def predict_of(bundle: Bundle) -> bytes:
    return bundle.member("onnx/predict.onnx")


def biases(data: bytes) -> dict[str, Tensor]:
    stored = Graph.load(data)
    return {
        n.inputs[0]: stored.initializers[n.inputs[0]] * stored.initializers[n.inputs[1]]
        for n in stored.nodes
        if n.kind == "DequantizeLinear" and n.inputs[0].endswith("bias_quantized")
    }


def test_an_int8_output_keeps_the_step_that_its_readers_count_on() -> None:
    model = quantized(cnn(opset=17), X)
    last = next(n for n in model.graph.node if n.output[0] == model.graph.output[0].name)
    model.graph.node.remove(last)
    model.graph.output[0].name = last.input[0]
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.INT8
    run, _ = trained(model, steps=5)
    assert len(ranges_of(run.params())) == 3
    ends = [Graph.load(d) for d in (predict_of(run.bundle), export(run.bundle, run.params()))]
    steps = [g.initializers[g.producers[g.outputs[0].name].inputs[1]] for g in ends]
    assert steps[0] == steps[1] == np.float32(run.bundle.manifest["output"]["scale"])


def test_a_step_that_a_frozen_quantizer_shares_is_copied() -> None:
    model = quantized(cnn(opset=17), X)
    pairs = [n for n in model.graph.node if n.op_type.endswith("uantizeLinear")]
    theirs = next(n.input[1] for n in pairs if n.input[0] == "input")
    for node in pairs:
        if any("relu_7" in name for name in (*node.input, *node.output)):
            node.input[1] = theirs
    run, _ = trained(model, steps=20)
    assert abs(ranges_of(run.params())["relu_7.range"]) > 1e-5
    before, after = (
        Graph.load(d) for d in (predict_of(run.bundle), export(run.bundle, run.params()))
    )
    assert before.initializers[theirs].tobytes() == after.initializers[theirs].tobytes()
    told = int(evaluate(run.bundle, X, LABELS, run.params())["correct"]) / len(X)
    came = predict(export(run.bundle, run.params()), X)
    assert np.mean(came.argmax(1) == LABELS) == pytest.approx(told, abs=0.05)


@pytest.mark.parametrize("optimizer", [sgd(0.05), chain(clip(1.0), momentum(0.9, lr=0.03))])
def test_a_device_lets_ranges_learn(model: onnx.ModelProto, optimizer: Optimizer) -> None:
    build(model, loss="cross_entropy", ranges="learned", optimizer=optimizer).check(Limits())


def test_ranges_may_be_nothing_else(model: onnx.ModelProto) -> None:
    with pytest.raises(CompileError, match="ranges fixed or learned, got 'wide'"):
        build(model, loss="cross_entropy", ranges="wide")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"input": 0}, "a parameter that is a range"),
        ({"input": 9_999}, "a parameter that is a range"),
    ],
)
def test_a_bias_that_follows_no_range_is_refused(
    model: onnx.ModelProto, change: dict[str, int], said: str
) -> None:
    bundle = build(model, loss="cross_entropy", ranges="learned")
    patches = [p | change if "input" in p else p for p in bundle.manifest["patches"]["onnx"]]
    with pytest.raises(BundleError, match=said):
        repacked(bundle, patches)


def test_a_range_of_several_numbers_is_refused(model: onnx.ModelProto) -> None:
    bundle = build(model, loss="cross_entropy", ranges="learned")
    names = list(bundle.shapes)
    patches = [
        p | {"param": names.index("head.bias")} if p["kind"] == "range" else p
        for p in bundle.manifest["patches"]["onnx"]
    ]
    with pytest.raises(BundleError, match=r"a parameter of one number|is a range"):
        repacked(bundle, patches)


def repacked(bundle: Bundle, patches: list[Any]) -> Bundle:
    manifest = {k: v for k, v in bundle.manifest.items() if k != "members"}
    manifest |= {"patches": {"onnx": patches}}
    return pack(manifest, {name: bundle.member(name) for name in bundle.manifest["members"]})


def test_the_graph_and_the_device_agree_on_every_step() -> None:
    e = Emit()
    made = step(e, e.input("p"), 0.0371)
    graph = e.graph(outputs=[made]).to_model().SerializeToString()
    run = session(graph)
    rng = np.random.default_rng(0)
    edges = [0.0, 0.25, -0.25, 1e-7, -1e-7, 3.99, 4.0, 9.0, -9.0, 1e30, -1e30]
    for one in np.float32([*edges, *rng.normal(size=300)]):
        value = np.asarray(one)
        (told,) = run.run(None, {"p": value})
        assert told.tobytes() == step_of(value, np.float32(0.0371)).tobytes()
    assert step_of(np.zeros((), np.float32), np.float32(0.3)) == np.float32(0.3)
    assert step_of(np.float32(1e30), np.float32(1)) == 2.0**MOST_OCTAVES
    assert step_of(np.float32(-1e30), np.float32(1e-44)) > 0


def test_steps_rise_with_their_parameter_without_jumps() -> None:
    values = np.linspace(-1, 1, 4001, dtype=np.float32)
    steps = np.array([step_of(v, np.float32(1)) for v in values])
    assert (np.diff(steps) >= 0).all()
    assert (np.diff(steps) < steps[1:] * OCTAVES * (values[1] - values[0]) * 1.01).all()


@pytest.mark.parametrize("zero", [-128, -5, 7])
def test_the_gradient_of_a_step_is_that_of_learned_step_size(zero: int) -> None:
    """Esser et al. 2020, eq. 3: the error of rounding inside, the clipped integer outside."""
    rng = np.random.default_rng(zero + 200)
    x, g, start = rng.normal(size=(6, 50)), rng.normal(size=(6, 50)), 0.01
    e = Emit()
    e.input("x", np.float32, (6, 50))
    scale, z = step(e, e.input("p"), start), e.const(zero, np.int8)
    y = e.DequantizeLinear(e.QuantizeLinear("x", scale, z), scale, z)
    upstream = e.const(g.astype(np.float32))
    made = backward(e, {y: upstream}, ["p", "x"])
    run = session(e.graph(outputs=[made["p"], made["x"]]).to_model().SerializeToString())
    by_p, by_x = run.run(None, {"x": x.astype(np.float32), "p": np.zeros((), np.float32)})
    steps = x / start
    low, high = -128 - zero, 127 - zero
    inside = (steps > low - 0.5) & (steps < high + 0.5)
    slope = np.where(inside, np.rint(steps) - steps, np.clip(steps, low, high))
    assert 0.1 < inside.mean() < 0.95
    np.testing.assert_allclose(by_p, (g * slope).sum() * start * OCTAVES, rtol=1e-4)
    np.testing.assert_allclose(by_x, g * inside, rtol=1e-6)


def test_a_range_moves_by_octaves_under_plain_descent(model: onnx.ModelProto) -> None:
    """Its parameter counts in fours, its gradient is slowed by sixteen: together one."""
    run = Steps(build(model, loss="cross_entropy", ranges="learned", optimizer=sgd(1e-3)))
    name = "output_QuantizeLinear_Input.range"
    params = run.bundle.params()
    params["head.weight"] = 4 * params["head.weight"]  # logits well past their range
    params[name] = np.full((), 0.1, np.float32)  # amid an octave
    run.state = {f"p.{i}": value for i, value in enumerate(params.values())}
    run.step(X, LABELS, lr=1.0)
    told = params[name] - run.params()[name]
    eps, sides = np.float32(1 / 64), []
    for sign in (1, -1):
        moved = params | {name: np.asarray(params[name] + sign * eps)}
        sides.append(float(evaluate(run.bundle, X, LABELS, moved)["loss"]))
    found = (sides[0] - sides[1]) / (2 * eps)
    assert abs(found) > 0.1
    assert float(told) == pytest.approx(found * SLOWED, rel=0.1)


def test_pooled_and_reshaped_numbers_keep_one_step() -> None:
    """Integer kernels of MaxPool and Reshape want the same step before and after."""
    net = Net(("N", 1, 8, 8), opset=17).conv("conv", 1, 4, 3, pads=[1, 1, 1, 1]).add("Relu")
    net.add("MaxPool", kernel_shape=[2, 2], strides=[2, 2]).add("Flatten").dense("head", 64, 4)
    model = quantized(net.model(), X)
    copies = 0
    for node in model.graph.node:  # equal steps under several names, as other quantizers write
        if node.op_type == "QuantizeLinear" and node.input[0] != "input":
            copies += 1
            pair = next(n for n in model.graph.node if n.input[0] == node.output[0])
            stored = next(t for t in model.graph.initializer if t.name == node.input[1])
            twin = model.graph.initializer.add()
            twin.CopyFrom(stored)
            twin.name = f"{stored.name}.{copies}"
            node.input[1] = pair.input[1] = twin.name
    run, _ = trained(model, steps=10)
    assert copies == 4
    assert len(ranges_of(run.params())) == 2


def test_ranges_learn_through_depthwise_layers_and_sums() -> None:
    """Layers that training rewrites into another layout, and a quantizer with several readers."""
    net = Net(("N", 1, 8, 8), opset=17).conv("stem", 1, 8, 3, pads=[1, 1, 1, 1]).add("Relu")
    kept = net.last
    net.conv("depthwise", 8, 8, 3, pads=[1, 1, 1, 1], group=8).add("Relu")
    net.conv("pointwise", 8, 8, 1).add("Add", kept).add("Relu")
    model = net.add("GlobalAveragePool").add("Flatten").dense("head", 8, 4).model()
    run, loss = trained(quantized(model, X, per_channel=True), steps=150)
    _, tight = trained(quantized(model, X, per_channel=True), steps=150, ranges="fixed")
    assert loss < 0.5 * tight
    assert len(ranges_of(run.params())) >= 6
    run.bundle.check(Limits())
    told = int(evaluate(run.bundle, X, LABELS, run.params())["correct"]) / len(X)
    came = predict(export(run.bundle, run.params()), X)
    assert np.mean(came.argmax(1) == LABELS) == pytest.approx(told, abs=0.04)


def test_ranges_travel_in_updates_and_are_the_same_on_every_device() -> None:
    model = quantized(cnn(opset=17), X)
    bundle = build(model, loss="cross_entropy", ranges="learned", optimizer=momentum(0.9, lr=0.03))
    devices = [(X[i::2], LABELS[i::2]) for i in range(2)]
    plan = Plan(rounds=6, cohort=2, epochs=8, batch=16, lr=0.03)

    def score(params: dict[str, Tensor]) -> float:
        models = [Trainer(Bundle.from_bytes(bundle.data)) for _ in devices]
        for each in models:
            each.load_params(params)
        one, other = (each.predict(X) for each in models)
        assert one.tobytes() == other.tobytes() == predict(export(bundle, params), X).tobytes()
        return float(np.mean(one.argmax(1) == LABELS))

    done = federate(bundle, devices, plan, score)
    grown = ranges_of(done.params)["output_QuantizeLinear_Input.range"]
    assert grown * OCTAVES > 1
    assert done.scores[-1] > 0.95
