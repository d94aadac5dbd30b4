# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from coordinator.compiler.emit import Emit
from coordinator.compiler.graph import IR_VERSION, OPSET_CEILING, Graph, Node, topological
from edge_sdk.errors import CompileError

W = np.arange(12, dtype=np.float32).reshape(3, 4)


def model(nodes: list[onnx.NodeProto], opset: int = 18) -> onnx.ModelProto:
    return helper.make_model(
        helper.make_graph(
            nodes,
            "net",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(W, "w")],
        ),
        opset_imports=[helper.make_opsetid("", opset)],
    )


def gemm_relu() -> onnx.ModelProto:
    return model(
        [
            helper.make_node("Gemm", ["x", "w"], ["h"], alpha=0.5, name="first"),
            helper.make_node("Relu", ["h"], ["y"]),
        ]
    )


def test_a_model_survives_the_view_and_back() -> None:
    graph = Graph.from_model(gemm_relu())
    written = graph.to_model()
    onnx.checker.check_model(written, full_check=True)
    assert Graph.from_model(written).to_model().SerializeToString() == written.SerializeToString()
    assert written.ir_version == IR_VERSION
    assert graph.nodes[0] == Node("Gemm", ("x", "w"), ("h",), {"alpha": 0.5}, "", "first")


def test_shapes_and_dtypes_are_inferred_with_the_batch_unknown() -> None:
    graph = Graph.from_model(gemm_relu())
    assert graph.shape("h") == graph.outputs[0].shape == (None, 4)
    assert graph.shape("w") == (3, 4)
    assert graph.dtype("h") == np.float32
    assert graph.shape("nowhere") is None


def test_producers_and_uses_are_known() -> None:
    graph = Graph.from_model(gemm_relu())
    assert graph.producers["y"].op == "Relu"
    assert [n.op for n in graph.uses["h"]] == ["Relu"]


def test_constant_nodes_become_initializers() -> None:
    nodes = [
        helper.make_node("Constant", [], ["c"], value_floats=[1.0, 2.0, 3.0]),
        helper.make_node("Add", ["x", "c"], ["y"]),
    ]
    graph = Graph.from_model(model(nodes))
    assert [n.op for n in graph.nodes] == ["Add"]
    np.testing.assert_array_equal(graph.initializers["c"], np.array([1, 2, 3], np.float32))


def test_nodes_are_put_in_topological_order() -> None:
    late = Node("Neg", ("a",), ("b",))
    early = Node("Exp", ("x",), ("a",))
    assert topological([late, early]) == (early, late)
    assert topological([early, late]) == (early, late)


def test_a_cycle_is_refused() -> None:
    with pytest.raises(CompileError, match="without cycles"):
        topological([Node("Neg", ("a",), ("b",)), Node("Neg", ("b",), ("a",))])


def test_control_flow_is_refused_by_name() -> None:
    body = helper.make_graph([], "body", [], [helper.make_tensor_value_info("w", 1, None)])
    loop = helper.make_node("If", ["x"], ["y"], name="maybe", then_branch=body, else_branch=body)
    with pytest.raises(CompileError, match="without control flow, got If node 'maybe'"):
        Graph.from_model(model([loop]))


@pytest.mark.parametrize(("opset", "expected"), [(13, 18), (18, 18), (21, 21), (24, OPSET_CEILING)])
def test_the_opset_is_brought_into_range(opset: int, expected: int) -> None:
    graph = Graph.from_model(model([helper.make_node("Relu", ["x"], ["y"])], opset))
    assert graph.opset == expected


def test_model_local_functions_are_inlined() -> None:
    double = helper.make_function(
        "local",
        "Double",
        ["a"],
        ["b"],
        [helper.make_node("Add", ["a", "a"], ["b"])],
        [helper.make_opsetid("", 18)],
    )
    proto = model([helper.make_node("Double", ["x"], ["y"], domain="local")])
    proto.functions.append(double)
    proto.opset_import.append(helper.make_opsetid("local", 1))
    assert [n.kind for n in Graph.from_model(proto).nodes] == ["Add"]


def test_attributes_are_python_values_both_ways() -> None:
    node = helper.make_node(
        "Conv", ["x", "w"], ["y"], pads=[1, 1], auto_pad="NOTSET", group=1, name="c"
    )
    graph = Graph.from_model(model([node]))
    assert dict(graph.nodes[0].attributes) == {"pads": (1, 1), "auto_pad": "NOTSET", "group": 1}
    assert Graph.from_model(graph.to_model()).nodes == graph.nodes


def test_equal_constants_are_stored_once() -> None:
    e = Emit()
    assert e.const(1.0) == e.const(1.0)
    assert e.const(1.0) != e.const([1.0])
    assert e.const(0, np.int64) != e.const(0.0)
    assert e.const(0.0) != e.const(-0.0)
    assert len(e.initializers) == 5


def test_emitted_values_know_their_shape_and_dtype() -> None:
    e = Emit()
    e.input("x", np.float32, (None, 3))
    y = e.MatMul("x", e.const(W))
    assert e.shape(y) == (None, 4)
    assert e.dtype(e.Greater(y, e.const(0.0))) == np.bool_
    a, b = e.Split(y, outputs=2, axis=1, num_outputs=2)
    assert e.shape(a) == e.shape(b) == (None, 2)
    assert e.shape(e.Reshape(y, e.ints(-1, 2, 2))) == (None, 2, 2)


def test_new_names_never_meet_the_models_own() -> None:
    proto = model([helper.make_node("Relu", ["x"], ["g.relu.1"], name="n")])
    proto.graph.output[0].name = "g.relu.1"
    e = Emit(Graph.from_model(proto))
    assert e.Relu("x") != "g.relu.1"


def test_an_operator_that_cannot_be_is_refused_at_once() -> None:
    e = Emit()
    e.input("x", np.float32, (2, 3))
    with pytest.raises(CompileError, match="cannot emit MatMul"):
        e.MatMul("x", e.const(np.ones((4, 4))))


def test_absent_inputs_and_attributes_are_left_out() -> None:
    e = Emit()
    e.input("x", np.float32, (2, 3))
    e.Clip("x", None, e.const(1.0), axis=None)
    e.Clip("x", None, None)
    assert [n.inputs[:2] for n in e.nodes] == [("x", ""), ("x",)]
    assert not e.nodes[0].attributes


def test_an_initializer_can_become_an_input() -> None:
    e = Emit(Graph.from_model(gemm_relu()))
    e.input("w", np.float32, (3, 4))
    graph = e.graph(outputs=["y"])
    assert [v.name for v in graph.inputs] == ["x", "w"]
    assert "w" not in graph.initializers


def test_an_optional_output_can_be_asked_for_later() -> None:
    e = Emit()
    e.input("x", np.float32, (2, 3))
    y = e.Dropout("x")
    mask = e.output(e.nodes[0], 1)
    assert e.nodes[0].outputs == (y, mask)
    assert e.output(e.nodes[0], 1) == mask
    assert e.dtype(mask) == np.bool_
