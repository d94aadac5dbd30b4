# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import onnx
import pytest
from check_grads import session
from onnx import TensorProto, helper, numpy_helper

from coordinator.compiler.emit import Emit
from coordinator.compiler.graph import Graph
from coordinator.compiler.vjp import backward
from edge_sdk.errors import CompileError


def start(**shapes: tuple[int | None, ...]) -> Emit:
    e = Emit()
    for name, shape in shapes.items():
        e.input(name, np.float32, shape)
    return e


def ops_after(e: Emit, count: int) -> list[str]:
    return [node.op for node in e.nodes[count:]]


def test_gradients_of_several_uses_add_up() -> None:
    e = start(x=(3,))
    y = e.Add(e.Mul("x", "x"), e.Exp("x"))
    grads = backward(e, {y: e.const(np.ones(3))}, ["x"])
    x = np.array([0.5, -1, 2], np.float32)
    (got,) = session(e, [grads["x"]]).run(None, {"x": x})
    np.testing.assert_allclose(got, 2 * x + np.exp(x), rtol=1e-6)


def test_a_tensor_between_target_and_loss_can_be_a_target_too() -> None:
    e = start(x=(3,))
    h = e.Exp("x")
    y = e.Mul(h, h)
    grads = backward(e, {y: e.const(np.ones(3))}, ["x", h])
    x = np.array([0.5, -1, 2], np.float32)
    by_x, by_h = session(e, [grads["x"], grads[h]]).run(None, {"x": x})
    np.testing.assert_allclose(by_h, 2 * np.exp(x), rtol=1e-6)
    np.testing.assert_allclose(by_x, 2 * np.exp(2 * x), rtol=1e-6)


def test_nothing_is_emitted_below_the_lowest_target() -> None:
    e = start(x=(None, 1, 8, 8), kernel=(4, 1, 3, 3), head=(144, 3))
    h = e.Flatten(e.Relu(e.Conv("x", "kernel")))
    y = e.MatMul(h, "head")
    before = len(e.nodes)
    backward(e, {y: e.input("g", np.float32, (None, 3))}, ["head"])
    assert ops_after(e, before) == ["Gemm"]


def test_a_frozen_branch_gets_no_gradient() -> None:
    e = start(x=(2, 3), a=(3,), b=(3,))
    y = e.Mul(e.Add("x", "a"), e.Tanh(e.Add("x", "b")))
    before = len(e.nodes)
    backward(e, {y: e.const(np.ones((2, 3)))}, ["a"])
    assert ops_after(e, before) == ["Mul", "ReduceSum"]


def test_several_seeds_flow_together() -> None:
    e = start(x=(3,))
    a, b = e.Exp("x"), e.Neg("x")
    grads = backward(e, {a: e.const(np.ones(3)), b: e.const(np.full(3, 2.0))}, ["x"])
    x = np.array([0.5, -1, 2], np.float32)
    (got,) = session(e, [grads["x"]]).run(None, {"x": x})
    np.testing.assert_allclose(got, np.exp(x) - 2, rtol=1e-6)


def test_a_missing_rule_names_the_node_and_what_to_do() -> None:
    e = start(x=(3, 2, 2))
    y = e.Neg(e.Det("x"))
    with pytest.raises(CompileError, match=r"Det node .* has none: .*@vjp\('Det'\)"):
        backward(e, {y: e.const(np.ones(3))}, ["x"])


def test_a_missing_rule_below_the_targets_does_not_matter() -> None:
    e = start(x=(3, 2, 2), w=(3,))
    y = e.Mul(e.Det("x"), "w")
    assert set(backward(e, {y: e.const(np.ones(3))}, ["w"])) == {"w"}


def test_a_target_that_nothing_reads_is_named() -> None:
    e = start(x=(3,), w=(3,))
    y = e.Neg("x")
    with pytest.raises(CompileError, match="'w', no node reads it"):
        backward(e, {y: e.const(np.ones(3))}, ["w"])


def test_a_target_behind_a_flat_operator_is_named_with_its_reader() -> None:
    e = start(x=(3,), w=(3,))
    y = e.Mul("x", e.Floor("w"))
    with pytest.raises(CompileError, match=r"path from 'w' to the loss.*Floor"):
        backward(e, {y: e.const(np.ones(3))}, ["w"])


def test_a_cast_to_integers_ends_the_path() -> None:
    e = start(x=(3,))
    y = e.Cast(e.Cast("x", to=np.int64), to=np.float32)
    with pytest.raises(CompileError, match="path from 'x'"):
        backward(e, {y: e.const(np.ones(3))}, ["x"])


def test_an_old_opset_is_refused() -> None:
    e = Emit(opset=13)
    e.input("x", np.float32, (3,))
    y = e.Neg("x")
    with pytest.raises(CompileError, match="expected opset 18"):
        backward(e, {y: "x"}, ["x"])


def test_an_unknown_rank_is_refused_with_the_tensor_named() -> None:
    e = Emit()
    e.input("x", np.float32, None)
    e.input("w", np.float32, (3,))
    y = e.Add("x", "w")
    e.input("g", np.float32, None)
    with pytest.raises(CompileError, match="known rank for tensor 'g'"):
        backward(e, {y: "g"}, ["w"])


def test_a_gradient_for_a_second_output_is_refused() -> None:
    e = start(x=(2, 3, 4, 4))
    _, mean, _ = e.LayerNormalization("x", e.const(np.ones(4)), outputs=3)
    with pytest.raises(CompileError, match="first output of LayerNormalization"):
        backward(e, {mean: e.const(np.ones((2, 3, 4, 1)))}, ["x"])


def test_dropout_in_training_uses_the_mask_of_the_forward_pass() -> None:
    e = start(x=(50,))
    y = e.Dropout("x", e.const(0.3), e.const(1, np.bool_), seed=4)
    grads = backward(e, {y: e.const(np.ones(50))}, ["x"])
    x = np.linspace(1, 2, 50, dtype=np.float32)
    out, grad = session(e, [y, grads["x"]]).run(None, {"x": x})
    assert 0 < np.count_nonzero(out) < 50
    np.testing.assert_allclose(grad, out / x, rtol=1e-5)


def test_dropout_at_inference_passes_the_gradient_on() -> None:
    e = start(x=(5,))
    y = e.Dropout("x", e.const(0.3), e.const(0, np.bool_))
    assert backward(e, {y: "x"}, ["x"]) == {"x": "x"}


def resized(e: Emit, **setting: str) -> str:
    roi = e.const([0, 0, 0, 0, 1, 1, 1, 1])
    return e.Resize("x", roi, None, e.ints(1, 2, 3, 3), mode="linear", **setting)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda e: e.BatchNormalization("x", *["c"] * 4, training_mode=1, outputs=3)[0], "eval"),
        (lambda e: e.Slice("x", e.Cast("c", to=np.int64), e.ints(1, 1)), "fixed slices"),
        (lambda e: e.MaxPool("x", kernel_shape=[2, 2], storage_order=1), "row-major"),
        (lambda e: e.ReduceSum("x", e.Cast("c", to=np.int64)), "constant axes"),
        (lambda e: e.Tile("x", e.Cast("c", to=np.int64)), "constant repeats"),
        (lambda e: resized(e, coordinate_transformation_mode="tf_crop_and_resize"), "crop first"),
        (lambda e: resized(e, keep_aspect_ratio_policy="not_larger"), "that stretches"),
        (lambda e: e.Pad("x", e.Cast("c", to=np.int64), mode="edge"), "constant pads"),
        (lambda e: e.Dropout("x", e.ReduceMax("c", keepdims=0)), "constant ratio"),
    ],
)
def test_a_setting_without_a_gradient_says_what_to_do(model: object, words: str) -> None:
    e = start(x=(1, 2, 4, 4), c=(2,))
    y = model(e)
    e.declare(y, (1, 2, 3, 3))
    with pytest.raises(CompileError, match=words):
        backward(e, {y: e.input("g", np.float32, (1, 2, 3, 3))}, ["x"])


def test_unknown_spatial_sizes_are_refused() -> None:
    e = start(x=(None, 2, None, 4), w=(2, 2, 3, 3))
    y = e.Conv("x", "w")
    with pytest.raises(CompileError, match="known spatial sizes in Conv"):
        backward(e, {y: e.input("g", np.float32, (None, 2, None, 2))}, ["w"])


def model_of(nodes: list, opset: int = 18, **weights: np.ndarray) -> onnx.ModelProto:
    return helper.make_model(
        helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(v, k) for k, v in weights.items()],
        ),
        opset_imports=[helper.make_opsetid("", opset)],
    )


def test_an_older_model_is_brought_to_the_opset_floor_and_differentiated() -> None:
    old = model_of([helper.make_node("ReduceMean", ["x"], ["y"], axes=[1], keepdims=0)], 13)
    e = Emit(Graph.from_model(old))
    grads = backward(e, {"y": e.input("g", np.float32, (None,))}, ["x"])
    feeds = {"x": np.ones((2, 3), np.float32), "g": np.array([3, 6], np.float32)}
    (got,) = session(e, [grads["x"]]).run(None, feeds)
    np.testing.assert_allclose(got, [[1, 1, 1], [2, 2, 2]])


def test_equal_maxima_of_a_window_share_the_gradient() -> None:
    e = start(x=(1, 1, 2, 4))
    y = e.MaxPool("x", kernel_shape=[2, 2], strides=[2, 2])
    grads = backward(e, {y: e.input("g", np.float32, (1, 1, 1, 2))}, ["x"])
    x = np.array([[[[0, 0, 1, 2], [0, 0, 2, 0]]]], np.float32)
    g = np.array([[[[4, 6]]]], np.float32)
    (got,) = session(e, [grads["x"]]).run(None, {"x": x, "g": g})
    np.testing.assert_array_equal(got, [[[[1, 1, 0, 3], [1, 1, 3, 0]]]])
