# SPDX-License-Identifier: Apache-2.0
"""A Loop of a training graph sums up slices of the batch; whatever else one could do is refused."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from forward_models import mlp
from onnx import TensorProto, helper, numpy_helper
from planted import maker, planted

from coordinator.compiler import build, chain, clip, momentum
from edge_sdk import clips, onnxfile, reach
from edge_sdk.errors import RefusedError
from edge_sdk.limits import Limits

LIMIT = 0.5
MADE = build(
    mlp(),
    loss="cross_entropy",
    optimizer=chain(clip(LIMIT), momentum(0.9, lr=0.1)),
    proximal=True,
    micro_batch=4,
)
Change = Callable[[onnx.ModelProto, onnx.NodeProto, onnx.GraphProto], object]


def refused(change: Change, limits: Limits | None = None) -> str:
    def apply(model: onnx.ModelProto) -> None:
        loop = next(n for n in model.graph.node if n.op_type == "Loop")
        change(model, loop, loop.attribute[0].g)

    with pytest.raises(RefusedError) as caught:
        planted(MADE, "train", apply).check(limits)
    line = str(caught.value)
    assert line.startswith("train graph: ") or limits is not None
    assert "\n" not in line
    return line


def test_sums_over_slices_pass() -> None:
    MADE.check()


def stored(model: onnx.ModelProto, name: str, value: object) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(value, np.int64), name))


def endless(model: onnx.ModelProto, loop: onnx.NodeProto, _: onnx.GraphProto) -> None:
    stored(model, "many", [1 << 60])
    loop.input[0] = "many"


def times(model: onnx.ModelProto, loop: onnx.NodeProto, _: onnx.GraphProto) -> None:
    maker(model, loop.input[0]).op_type = "Mul"


def by_nothing(model: onnx.ModelProto, loop: onnx.NodeProto, _: onnx.GraphProto) -> None:
    stored(model, "none", [0])
    maker(model, loop.input[0]).input[1] = "none"


def by_itself(model: onnx.ModelProto, loop: onnx.NodeProto, _: onnx.GraphProto) -> None:
    divided = maker(model, loop.input[0])
    divided.input[1] = divided.input[0]


def many_more(model: onnx.ModelProto, loop: onnx.NodeProto, _: onnx.GraphProto) -> None:
    stored(model, "many", [1 << 60])
    maker(model, maker(model, loop.input[0]).input[0]).input[1] = "many"


def of_values(model: onnx.ModelProto, loop: onnx.NodeProto, _: onnx.GraphProto) -> None:
    added = maker(model, maker(model, loop.input[0]).input[0])
    counted = maker(model, added.input[0])
    counted.input[0] = "y"


def of_columns(model: onnx.ModelProto, loop: onnx.NodeProto, _: onnx.GraphProto) -> None:
    added = maker(model, maker(model, loop.input[0]).input[0])
    for attribute in maker(model, added.input[0]).attribute:
        attribute.i = {"start": 1, "end": 2}[attribute.name]


@pytest.mark.parametrize(
    "change", [endless, times, by_nothing, by_itself, many_more, of_values, of_columns]
)
def test_more_turns_than_slices_are_refused(change: Change) -> None:
    assert "expected as many turns as slices of x" in refused(change)


def test_a_condition_is_refused() -> None:
    def change(model: onnx.ModelProto, loop: onnx.NodeProto, _: onnx.GraphProto) -> None:
        model.graph.initializer.append(numpy_helper.from_array(np.array([True]), "ever"))
        loop.input[1] = "ever"

    assert "expected no condition" in refused(change)


def test_what_each_turn_saw_cannot_be_given_out() -> None:
    def change(_: onnx.ModelProto, loop: onnx.NodeProto, body: onnx.GraphProto) -> None:
        body.output.append(helper.make_tensor_value_info("g.x", TensorProto.FLOAT, None))
        loop.output.append("leak")

    assert "expected sums to go in and come out" in refused(change)


def test_a_tensor_that_grows_is_refused() -> None:
    def change(_: onnx.ModelProto, __: onnx.NodeProto, body: onnx.GraphProto) -> None:
        last = next(n for n in body.node if body.output[1].name in n.output)
        last.op_type = "Concat"
        last.input[1] = last.input[0]
        last.attribute.append(helper.make_attribute("axis", 0))

    assert "and something added to it" in refused(change)


def test_a_sum_of_a_sum_is_refused() -> None:
    def change(_: onnx.ModelProto, __: onnx.NodeProto, body: onnx.GraphProto) -> None:
        last = next(n for n in body.node if body.output[1].name in n.output)
        last.input[1] = last.input[0]

    assert "expected nothing to read" in refused(change)


def test_a_sum_that_comes_out_twice_is_refused() -> None:
    def change(_: onnx.ModelProto, __: onnx.NodeProto, body: onnx.GraphProto) -> None:
        body.output[2].name = body.output[1].name

    assert "expected nothing to read" in refused(change)


@pytest.mark.parametrize("op", ["Loop", "If", "Scan"])
def test_no_graph_is_nested_in_the_body(op: str) -> None:
    def change(_: onnx.ModelProto, loop: onnx.NodeProto, body: onnx.GraphProto) -> None:
        inner = helper.make_node(op, list(loop.input), ["deep"])
        inner.attribute.append(helper.make_attribute("body", helper.make_graph([], "b", [], [])))
        body.node.insert(0, inner)

    assert f"{op} node 'deep': this operator is not among those" in refused(change)


def test_the_bodys_operators_are_those_of_the_list() -> None:
    def change(_: onnx.ModelProto, __: onnx.NodeProto, body: onnx.GraphProto) -> None:
        body.node.insert(0, helper.make_node("RandomNormal", [], ["noise"], shape=[1 << 40]))

    assert "RandomNormal node 'noise': this operator is not among" in refused(change)


def test_a_body_cannot_make_what_is_beyond_memory() -> None:
    def change(_: onnx.ModelProto, __: onnx.NodeProto, body: onnx.GraphProto) -> None:
        body.initializer.append(numpy_helper.from_array(np.array([1 << 40]), "wide"))
        body.node.insert(0, helper.make_node("ConstantOfShape", ["wide"], ["huge"]))

    assert "makes 1099511627776 numbers" in refused(change)


def test_a_body_reads_what_was_made_before_it_and_its_own() -> None:
    def change(_: onnx.ModelProto, __: onnx.NodeProto, body: onnx.GraphProto) -> None:
        body.node.insert(0, helper.make_node("Identity", ["p.0.next"], ["early"]))

    assert "reads 'p.0.next', which nothing made before" in refused(change)


def test_nothing_outside_reads_a_bodys_own() -> None:
    def change(model: onnx.ModelProto, _: onnx.NodeProto, __: onnx.GraphProto) -> None:
        maker(model, "p.0.next").input[0] = "g.x"

    assert "reads 'g.x', which nothing made before" in refused(change)


@pytest.mark.parametrize("name", ["x", "p.0"])
def test_a_name_means_one_tensor(name: str) -> None:
    def change(_: onnx.ModelProto, __: onnx.NodeProto, body: onnx.GraphProto) -> None:
        body.node.insert(0, helper.make_node("Identity", [body.input[0].name], [name]))

    assert f"makes '{name}', which is there already" in refused(change)


def test_a_way_round_the_clip_past_the_loop_is_found() -> None:
    def change(model: onnx.ModelProto, loop: onnx.NodeProto, _: onnx.GraphProto) -> None:
        maker(model, "p.1.next").output[0] = "honest"
        add = helper.make_node("Add", ["honest", loop.output[0]], ["p.1.next"])
        model.graph.node.append(add)

    assert f"only through the clip at {LIMIT}" in refused(change)


def test_everything_a_body_reads_reaches_all_that_its_loop_makes() -> None:
    graph = onnxfile.read(memoryview(MADE.member("onnx/train.onnx")))
    (loop,) = (n for n in graph.nodes if n.op == "Loop")
    assert {"x", "y", "p.0"} <= set(loop.reads)
    assert set(loop.outputs) <= reach.reached(graph.nodes, {"y"})
    (stage,) = clips.clips(graph, LIMIT)
    new = {f"p.{i}.next" for i in range(len(MADE.manifest["params"]))}
    assert new.isdisjoint(reach.reached(graph.nodes, {"x", "y"}, stage.makes))


def test_nodes_and_constants_inside_count() -> None:
    def more(_: onnx.ModelProto, __: onnx.NodeProto, body: onnx.GraphProto) -> None:
        for i in range(100):
            body.node.append(helper.make_node("Identity", ["g.x"], [f"again.{i}"]))
        body.initializer.append(numpy_helper.from_array(np.zeros(10_000, np.float32), "much"))

    graph = onnxfile.read(memoryview(MADE.member("onnx/train.onnx")))
    inner = len(next(n for n in graph.nodes if n.op == "Loop").bodies[0].nodes)
    enough = Limits(max_nodes=len(graph.nodes) + inner)
    MADE.check(enough)
    assert f"max_nodes={enough.max_nodes}" in refused(more, enough)


def test_other_attributes_and_sparse_constants_are_refused() -> None:
    def labelled(_: onnx.ModelProto, loop: onnx.NodeProto, __: onnx.GraphProto) -> None:
        loop.attribute.append(helper.make_attribute("more", 1))

    def sparse(_: onnx.ModelProto, __: onnx.NodeProto, body: onnx.GraphProto) -> None:
        body.sparse_initializer.add()

    assert "expected a body and no other attribute" in refused(labelled)
    assert "expected no sparse_initializer" in refused(sparse)


def test_strings_in_a_body_are_refused() -> None:
    def change(_: onnx.ModelProto, __: onnx.NodeProto, body: onnx.GraphProto) -> None:
        body.value_info.append(helper.make_tensor_value_info("g.x", TensorProto.STRING, None))

    assert "expected a tensor of numbers, got strings" in refused(change)
