# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
from forward_models import Tensor, session

from coordinator.compiler.emit import Emit
from coordinator.compiler.graph import Graph
from coordinator.compiler.passes import (
    drop_identities,
    drop_unused,
    fold_constants,
    merge_equal,
    rename,
    simplify,
)


def emitter() -> Emit:
    e = Emit()
    e.input("x", np.float32, (None, 4))
    return e


def ops(graph: Graph) -> list[str]:
    return [node.op for node in graph.nodes]


def run(graph: Graph, x: Tensor) -> list[Tensor]:
    made: list[Tensor] = session(graph.to_model().SerializeToString()).run(None, {"x": x})
    return made


def test_unused_nodes_and_weights_go_and_inputs_stay() -> None:
    e = emitter()
    e.input("unused", np.float32, ())
    kept = e.Relu("x")
    e.Mul(kept, e.const(3.0))
    graph = drop_unused(e.graph(outputs=[kept]))
    assert ops(graph) == ["Relu"]
    assert not graph.initializers
    assert [v.name for v in graph.inputs] == ["x", "unused"]


def test_identities_go_unless_they_make_an_output() -> None:
    e = emitter()
    inner = e.Identity(e.Identity("x"))
    out = e.Identity(e.Relu(inner))
    graph = drop_identities(e.graph(outputs=[out]))
    assert ops(graph) == ["Relu", "Identity"]
    assert graph.nodes[0].inputs == ("x",)


def test_dropout_goes_when_it_predicts_and_its_mask_is_unread() -> None:
    e = emitter()
    a = e.Dropout("x", e.const(0.5))
    b, mask = e.Dropout(a, outputs=2)
    graph = drop_identities(e.graph(outputs=[e.Relu(b), e.Not(mask)]))
    assert ops(graph) == ["Dropout", "Relu", "Not"]


def test_equal_nodes_are_computed_once_and_equal_weights_stored_once() -> None:
    e = emitter()
    one = e.initializer("one", np.ones(4, np.float32))
    two = e.initializer("two", np.ones(4, np.float32))
    out = e.Add(e.Relu(e.Mul("x", one)), e.Relu(e.Mul("x", two)))
    graph = merge_equal(e.graph(outputs=[out]))
    assert ops(graph) == ["Mul", "Relu", "Add"]
    assert list(graph.initializers) == ["one"]


def test_attributes_and_dtypes_tell_nodes_and_weights_apart() -> None:
    e = emitter()
    zero = e.initializer("f", np.zeros(4, np.float32))
    e.initializer("i", np.zeros(4, np.int32))
    out = e.Concat(e.Elu("x", alpha=1.0), e.Elu("x", alpha=2.0), e.Add("x", zero), axis=1)
    graph = merge_equal(e.graph(outputs=[out]))
    assert ops(graph) == ["Elu", "Elu", "Add", "Concat"]
    assert set(graph.initializers) == {"f", "i"}


def test_a_node_with_fewer_outputs_joins_its_twin() -> None:
    e = Emit()
    e.input("x", np.float32, (None, 1, 4, 4))
    plain = e.MaxPool("x", kernel_shape=[2, 2])
    y, at = e.MaxPool("x", kernel_shape=[2, 2], outputs=2)
    out = e.Add(e.Relu(plain), e.Mul(y, e.Cast(at, to=1)))
    graph = merge_equal(e.graph(outputs=[out]))
    assert ops(graph).count("MaxPool") == 1
    x = np.random.default_rng(0).standard_normal((2, 1, 4, 4)).astype(np.float32)
    np.testing.assert_array_equal(*run(graph, x), *run(e.graph(outputs=[out]), x))


def test_two_outputs_of_the_same_value_stay_two() -> None:
    e = emitter()
    graph = simplify(e.graph(outputs=[e.Relu("x"), e.Relu("x")]))
    assert ops(graph) == ["Relu", "Relu"]


def test_what_is_constant_is_computed_now() -> None:
    e = emitter()
    w = e.initializer("w", np.arange(8, dtype=np.float32).reshape(2, 4))
    out = e.MatMul("x", e.Transpose(e.Mul(w, e.const(2.0)), perm=[1, 0]))
    graph = simplify(e.graph(outputs=[out]))
    assert ops(graph) == ["MatMul"]
    (stored,) = graph.initializers.values()
    np.testing.assert_array_equal(stored, 2 * np.arange(8).reshape(2, 4).T)


def test_shapes_fold_where_they_are_static_only() -> None:
    e = emitter()
    known = e.Add("x", e.Cast(e.Gather(e.Shape("x"), e.ints(1)), to=1))
    graph = simplify(e.graph(outputs=[known]))
    assert ops(graph) == ["Shape", "Gather", "Cast", "Add"]  # its batch is open
    e = emitter()
    known = e.Add("x", e.Cast(e.Shape("x", start=1), to=1))
    assert ops(simplify(e.graph(outputs=[known]))) == ["Add"]


def test_large_results_are_left_to_the_device() -> None:
    e = emitter()
    wide = e.Expand(e.const(1.0), e.ints(100_000, 4))
    graph = fold_constants(e.graph(outputs=[e.ReduceSum(e.Neg(wide)), e.Relu("x")]))
    assert "Expand" in ops(graph)
    assert all(array.nbytes < 1 << 16 for array in graph.initializers.values())
    run(graph, np.zeros((1, 4), np.float32))


def test_quantized_weights_are_not_unpacked_and_dice_are_not_thrown() -> None:
    e = emitter()
    w = e.initializer("w", np.ones((4, 4), np.int8))
    w = e.DequantizeLinear(w, e.const(0.5), e.const(0, np.int8))
    noise = e.RandomNormalLike(e.const(np.zeros(4)))
    graph = simplify(e.graph(outputs=[e.Add(e.MatMul("x", w), noise)]))
    assert ops(graph) == ["DequantizeLinear", "RandomNormalLike", "MatMul", "Add"]


def test_renaming_reaches_everything() -> None:
    e = emitter()
    out = e.Add(e.Relu("x"), e.initializer("w", np.ones(4, np.float32)))
    graph = rename(e.graph(outputs=[out]), {"x": "in", out: "out", "w": "weight"})
    assert [v.name for v in (*graph.inputs, *graph.outputs)] == ["in", "out"]
    assert list(graph.initializers) == ["weight"]
    assert graph.shape("out") == (None, 4)
    session(graph.to_model().SerializeToString())


def test_simplifying_changes_no_number() -> None:
    e = emitter()
    a = e.Identity(e.Mul("x", e.Add(e.const(1.0), e.const(2.0))))
    b = e.Mul("x", e.const(3.0))
    out = e.Sub(e.Add(a, b), e.ReduceSum(e.Relu("x"), e.ints(1), keepdims=1))
    x = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    graph = e.graph(outputs=[out])
    np.testing.assert_array_equal(*run(graph, x), *run(simplify(graph), x))
    assert len(simplify(graph).nodes) < len(graph.nodes)
