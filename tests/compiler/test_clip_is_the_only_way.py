# SPDX-License-Identifier: Apache-2.0
"""Where the manifest promises a clip, examples reach new parameters only through it."""

from __future__ import annotations

from typing import Any

import onnx
import pytest
from forward_models import mlp
from onnx import helper
from planted import maker, planted

from coordinator.compiler import adam, build, chain, clip, momentum, sgd
from edge_sdk import clips, onnxfile, reach
from edge_sdk.bundle import Bundle
from edge_sdk.errors import RefusedError

LIMIT = 0.5
PLAIN = build(mlp(), loss="cross_entropy", optimizer=sgd(lr=0.1))
CLIPPED = build(mlp(), loss="cross_entropy", optimizer=chain(clip(LIMIT), sgd(lr=0.1)))
HEAVY = build(mlp(), loss="mse", optimizer=chain(clip(LIMIT), momentum(0.9, lr=0.1)), proximal=True)
ADAM = build(mlp(), loss="cross_entropy", optimizer=chain(clip(LIMIT), adam(lr=0.1)))
NO_OTHER_WAY = "expected examples to reach it only through the clip at 0.5"


def refusal(bundle: Bundle) -> str:
    with pytest.raises(RefusedError) as caught:
        bundle.check()
    return str(caught.value)


def says_clip(manifest: dict[str, Any]) -> None:
    manifest["optimizer"].insert(0, ["clip", LIMIT])


def test_a_clip_that_is_promised_and_not_there_is_refused() -> None:
    assert NO_OTHER_WAY in refusal(planted(PLAIN, manifest=says_clip))


def test_a_clip_of_another_limit_is_not_the_one_that_is_promised() -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest["optimizer"][0][1] = 0.25

    assert "through the clip at 0.25" in refusal(planted(CLIPPED, manifest=change))


@pytest.mark.parametrize("limit", [None, "1", [1.0], True])
def test_a_clip_without_a_number_is_refused(limit: Any) -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest["optimizer"][0] = ["clip", limit]

    assert "clip" in refusal(planted(CLIPPED, manifest=change))


@pytest.mark.parametrize("bundle", [CLIPPED, HEAVY, ADAM], ids=["sgd", "momentum", "adam"])
def test_a_way_round_the_clip_is_found_for_every_parameter(bundle: Bundle) -> None:
    for i in range(len(bundle.manifest["params"])):

        def change(model: onnx.ModelProto, i: int = i) -> None:
            """Add the sum of the examples to a parameter, past the clip."""
            name = f"p.{i}.next"
            maker(model, name).output[0] = "honest"
            more = helper.make_node("ReduceSum", ["x"], ["sum"], keepdims=0)
            model.graph.node.extend([more, helper.make_node("Add", ["honest", "sum"], [name])])

        assert f"output p.{i}.next: {NO_OTHER_WAY}" in refusal(planted(bundle, "train", change))


def test_a_way_round_through_the_state_of_an_earlier_step_is_found() -> None:
    def change(model: onnx.ModelProto) -> None:
        """Keep examples in s.0, which the next step adds to p.0 through the velocity."""
        maker(model, "s.0.next").output[0] = "velocity"
        for node in model.graph.node:
            for k, name in enumerate(node.input):
                if name == "s.0.next":
                    node.input[k] = "velocity"
        more = helper.make_node("ReduceSum", ["x"], ["sum"], keepdims=0)
        kept = helper.make_node("Add", ["velocity", "sum"], ["s.0.next"])
        model.graph.node.extend([more, kept])

    assert f"output p.0.next: {NO_OTHER_WAY}" in refusal(planted(HEAVY, "train", change))


def test_a_norm_that_leaves_a_gradient_out_does_not_count() -> None:
    def change(model: onnx.ModelProto) -> None:
        total = next(n for n in model.graph.node if n.op_type == "Sum")
        del total.input[-1]

    assert NO_OTHER_WAY in refusal(planted(CLIPPED, "train", change))


def test_a_norm_of_something_else_does_not_count() -> None:
    def change(model: onnx.ModelProto) -> None:
        square = next(n for n in model.graph.node if n.op_type == "ReduceSumSquare")
        square.input[0] = "p.0"

    assert NO_OTHER_WAY in refusal(planted(CLIPPED, "train", change))


def test_a_minimum_in_place_of_the_maximum_does_not_count() -> None:
    def change(model: onnx.ModelProto) -> None:
        next(n for n in model.graph.node if n.op_type == "Max").op_type = "Min"

    assert NO_OTHER_WAY in refusal(planted(CLIPPED, "train", change))


def test_the_clip_is_found_by_what_it_does_not_by_its_names() -> None:
    def change(model: onnx.ModelProto) -> None:
        promised = {v.name for v in (*model.graph.input, *model.graph.output)}
        for node in model.graph.node:
            for names in (node.input, node.output):
                for k, name in enumerate(names):
                    names[k] = name if name in promised or not name else f"z{name[::-1]}"
        for tensor in model.graph.initializer:
            tensor.name = f"z{tensor.name[::-1]}"

    planted(HEAVY, "train", change).check()


def test_what_is_clipped_is_each_gradient_once() -> None:
    graph = onnxfile.read(memoryview(HEAVY.member("onnx/train.onnx")))
    (stage,) = clips.clips(graph, LIMIT)
    assert len(stage.reads) == len(set(stage.reads)) == len(stage.makes) == 4
    everything = reach.reached(graph.nodes, {"x"})
    past = reach.reached(graph.nodes, {"x"}, stage.makes)
    new = {f"p.{i}.next" for i in range(4)}
    assert new <= everything
    assert new.isdisjoint(past)
    assert "loss" in past
