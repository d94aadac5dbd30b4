# SPDX-License-Identifier: Apache-2.0
"""What is planted in a bundle's .tflite graphs is refused in a line that names it, as in ONNX."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from forward_models import cnn, mlp
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import refusal
from tflite_bundles import Change, Editable, lowered, planted_tflite

from coordinator.compiler import adam, build, chain, clip, momentum, sgd
from edge_sdk import clips, ranks, reach, tflitegraph
from edge_sdk.bundle import Bundle
from edge_sdk.errors import RefusedError
from edge_sdk.limits import Limits
from edge_sdk.operators import TFLITE
from edge_sdk.tfliteschema import BUILTINS

LIMIT = 0.5


def made(net: Callable[[], Any], optimizer: Any, **more: Any) -> Bundle:
    return lowered(build(net(), loss="cross_entropy", optimizer=optimizer, **more))


PLAIN = made(mlp, sgd(lr=0.1))
CLIPPED = made(mlp, chain(clip(LIMIT), sgd(lr=0.1)))
HEAVY = made(mlp, chain(clip(LIMIT), momentum(0.9, lr=0.1)), proximal=True)
ADAM = made(mlp, chain(clip(LIMIT), adam(lr=0.1)))
IMAGES = made(cnn, chain(clip(LIMIT), momentum(0.9, lr=0.1)))
MODELS = Path(__file__).parents[1] / "compiler/tflite/models"
BOTH = ("onnx", "tflite")
NO_OTHER_WAY = "expected examples to reach it only through the clip at 0.5"


@pytest.mark.parametrize("bundle", [PLAIN, CLIPPED, HEAVY, ADAM, IMAGES])
def test_sound_bundles_pass(bundle: Bundle) -> None:
    bundle.check()
    for role in ("predict", "train", "evaluate"):  # written again, by other hands
        planted_tflite(bundle, role, Editable.done).check()


# --- operators ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "op",
    [
        "CUSTOM", "CALL_ONCE", "VAR_HANDLE", "READ_VARIABLE", "ASSIGN_VARIABLE", "IF", "WHILE",
        "CALL", "HASHTABLE_FIND", "RANDOM_UNIFORM", "DELEGATE", "STABLEHLO_ADD",
    ],
)  # fmt: skip
@pytest.mark.parametrize("role", ["predict", "train", "evaluate"])
def test_operators_outside_the_list_are_refused(op: str, role: str) -> None:
    def change(graph: Editable) -> None:
        graph.add(op, [graph.graph.inputs[0]], graph.tensor("leak"))
        graph.model.operatorCodes[-1].customCode = b"FlexReluGrad" if op == "CUSTOM" else None

    name = "CUSTOM:FlexReluGrad" if op == "CUSTOM" else op
    assert refusal(planted_tflite(HEAVY, role, change)) == (
        f"tflite {role} graph: {name} node 'leak': this operator is not among those that may run "
        "here"
    )


def test_the_list_holds_builtin_operators() -> None:
    assert set(BUILTINS) >= TFLITE


# --- ports ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("role", ["train", "evaluate"])
def test_an_output_that_nobody_asked_for_is_refused(role: str) -> None:
    def change(graph: Editable) -> None:
        graph.graph.outputs.append(graph.sum_of_x())

    assert refusal(planted_tflite(HEAVY, role, change)) == (
        f"tflite {role} graph: output 'leak': the manifest promises no such output"
    )


def test_a_second_tensor_of_an_output_s_name_is_no_output() -> None:
    """A runtime tells them apart by index, and callers by name."""

    def change(graph: Editable) -> None:
        leak = graph.sum_of_x()
        graph.rename("leak", "loss")
        graph.graph.outputs.append(leak)

    line = refusal(planted_tflite(HEAVY, "train", change))
    assert line.startswith("tflite train graph: output 'loss#")


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("p.0", [3], "expected shape"),
        ("p.1.next", [1, 1], "expected shape"),
        ("s.0", [2], "expected shape"),
        ("lr", [1], "expected shape []"),
        ("loss", [4], "expected shape []"),
    ],
)
def test_ports_of_another_shape_are_refused(name: str, shape: list[int], said: str) -> None:
    def change(graph: Editable) -> None:
        graph.graph.tensors[graph.index(name)].shape = shape

    assert f"{name}': {said}" in refusal(planted_tflite(HEAVY, "train", change))


def test_ports_of_another_type_are_refused() -> None:
    def change(graph: Editable) -> None:
        graph.graph.tensors[graph.index("lr")].type = schema.TensorType.FLOAT64

    def text(graph: Editable) -> None:
        graph.graph.tensors[graph.index("lr")].type = schema.TensorType.STRING

    def handle(graph: Editable) -> None:
        graph.graph.tensors[graph.index("lr")].type = schema.TensorType.RESOURCE

    assert "input 'lr': expected float32, got float64" in refusal(
        planted_tflite(HEAVY, "train", change)
    )
    assert "'lr': expected float32, got type number 8" in refusal(
        planted_tflite(HEAVY, "train", text)
    )
    assert "'lr': expected a tensor, got resource" in refusal(
        planted_tflite(HEAVY, "train", handle)
    )


@pytest.mark.parametrize(("kind", "said"), [(5, "strings"), (13, "resource"), (14, "variant")])
def test_inner_tensors_that_are_no_numbers_are_refused(kind: int, said: str) -> None:
    def change(graph: Editable) -> None:
        at = graph.sum_of_x()
        graph.graph.tensors[at].type = kind

    assert f"value 'leak': expected a tensor of numbers, got {said}" in refusal(
        planted_tflite(HEAVY, "train", change)
    )


def test_signatures_give_out_the_graph_s_ports_by_their_names() -> None:
    def other_name(graph: Editable) -> None:
        """What a caller takes for a new parameter is state, which nothing clips."""
        for port in graph.model.signatureDefs[0].outputs:
            if port.name == b"p.0.next":
                port.tensorIndex = graph.index("s.0.next")

    def inner(graph: Editable) -> None:
        graph.model.signatureDefs[0].outputs[0].tensorIndex = graph.sum_of_x()

    for change in (other_name, inner):
        line = refusal(planted_tflite(HEAVY, "train", change))
        assert "signature 'serving_default': expected output" in line

    def own_name(graph: Editable) -> None:
        graph.model.signatureDefs[0].outputs[0].name = b"scores"

    planted_tflite(HEAVY, "predict", own_name).check()


# --- what a graph is made of ----------------------------------------------------------------------
def test_a_second_subgraph_is_refused_but_in_a_forward_model() -> None:
    def change(graph: Editable) -> None:
        graph.model.subgraphs.append(schema.SubGraphT())

    def evil(graph: Editable) -> None:
        graph.add("CUSTOM", [], graph.tensor("leak"))
        graph.model.operatorCodes[-1].customCode = b"FlexReadFile"
        change(graph)
        graph.model.subgraphs[1].operators = [graph.graph.operators.pop()]
        graph.model.subgraphs[1].tensors = [graph.graph.tensors[0]]
        graph.model.subgraphs[1].operators[0].outputs = [0]

    for role in ("train", "evaluate"):
        line = refusal(planted_tflite(HEAVY, role, change))
        assert line == f"tflite {role} graph: expected no second subgraph, got 1"
    planted_tflite(HEAVY, "predict", change).check()
    line = refusal(planted_tflite(HEAVY, "predict", evil))
    assert line == "tflite predict graph: expected no CUSTOM:FlexReadFile, got 1"


def test_order_is_checked() -> None:
    def unmade(graph: Editable) -> None:
        graph.add("NEG", [graph.tensor("never")], graph.tensor("leak"))

    def twice(graph: Editable) -> None:
        graph.add("NEG", [graph.index("lr")], graph.index("loss"))

    def over_an_input(graph: Editable) -> None:
        graph.add("NEG", [graph.index("lr")], graph.index("mu"))

    def over_a_constant(graph: Editable) -> None:
        graph.add("NEG", [graph.index("lr")], graph.tensor("c", stored=np.float32([1])))

    def stored_input(graph: Editable) -> None:
        graph.graph.tensors[graph.index("lr")].buffer = len(graph.model.buffers)
        graph.model.buffers.append(schema.BufferT())
        graph.model.buffers[-1].data = [0, 0, 0, 0]

    for change, said in (
        (unmade, "NEG node 'leak': reads 'never', which nothing made before"),
        (twice, "NEG node 'loss': makes 'loss', which is there already"),
        (over_an_input, "NEG node 'mu': makes 'mu', which is there already"),
        (over_a_constant, "NEG node 'c': makes 'c', which is there already"),
        (stored_input, "input 'lr': it is stored as well"),
    ):
        assert said in refusal(planted_tflite(HEAVY, "train", change))


def test_nothing_is_kept_from_run_to_run_but_by_a_forward_model() -> None:
    def change(graph: Editable) -> None:
        at = graph.tensor("kept")
        graph.graph.tensors[at].isVariable = True
        graph.add("NEG", [at], graph.tensor("read"))

    for role in ("train", "evaluate"):
        line = refusal(planted_tflite(HEAVY, role, change))
        assert line == f"tflite {role} graph: 'kept': expected nothing kept from run to run"
    planted_tflite(HEAVY, "predict", change).check()


def test_sparse_tensors_and_other_quantization_are_refused() -> None:
    def sparse(graph: Editable) -> None:
        graph.graph.tensors[0].sparsity = schema.SparsityParametersT()

    def blocks(graph: Editable) -> None:
        graph.graph.tensors[0].quantization = schema.QuantizationParametersT()
        graph.graph.tensors[0].quantization.detailsType = 2
        graph.graph.tensors[0].quantization.details = schema.BlockwiseQuantizationT()

    assert "expected no sparse tensor, got 1" in refusal(planted_tflite(HEAVY, "train", sparse))
    assert "expected no quantization beyond scales, got 1" in refusal(
        planted_tflite(HEAVY, "train", blocks)
    )


@pytest.mark.parametrize(("op", "at"), [("FILL", 0), ("BROADCAST_TO", 1)])
def test_a_tensor_beyond_memory_is_not_made(op: str, at: int) -> None:
    def change(graph: Editable) -> None:
        inputs = [graph.index("lr")]
        shape = np.full(3, 1 << 20, np.int32)
        inputs.insert(at, graph.tensor("vast", stored=shape))
        graph.add(op, inputs, graph.tensor("leak"))

    assert f"{op} node 'leak': makes {1 << 60} numbers" in refusal(
        planted_tflite(HEAVY, "train", change)
    )


def test_a_damaged_file_is_refused_by_its_graph() -> None:
    line = refusal(planted_tflite(HEAVY, "train", raw=lambda data: data[:200]))
    assert line.startswith("tflite train graph: ")


def test_limits_hold_for_this_format_too() -> None:
    assert "nodes, this device allows max_nodes=3" in refusal(HEAVY, Limits(max_nodes=3))
    numbers = sum(p.size for p in HEAVY.params().values())
    most = Limits(max_ram_bytes=4 * 5 * numbers - 1)
    assert "bytes of memory for weights and optimizer" in refusal(
        planted_tflite(HEAVY, manifest=lambda m: m.update(cost={})), most
    )


# --- patches --------------------------------------------------------------------------------------
def test_patches_write_weights_and_nothing_else() -> None:
    def shifted(manifest: dict[str, Any]) -> None:
        manifest["patches"]["tflite"][0]["offset"] -= 4

    assert refusal(planted_tflite(HEAVY, manifest=shifted)) == (
        "tflite predict graph: patches[0]: expected the place of a stored tensor, got other bytes"
    )


def test_a_patch_does_not_write_what_another_tensor_reads_otherwise() -> None:
    def change(graph: Editable) -> None:
        """Use the weights' bytes as a shape as well."""
        weights = next(t for t in graph.graph.tensors if len(t.shape) == 2 and t.buffer)
        at = graph.tensor("shape")
        graph.graph.tensors[at].buffer = weights.buffer
        graph.graph.tensors[at].shape = [int(np.prod(weights.shape))]
        graph.graph.tensors[at].type = 2

    line = refusal(planted_tflite(HEAVY, "predict", change))
    assert "numbers of float32 in 'shape', it holds" in line


# --- where an example may go ----------------------------------------------------------------------
def says_clip(manifest: dict[str, Any]) -> None:
    manifest["optimizer"].insert(0, ["clip", LIMIT])


def test_a_clip_that_is_promised_and_not_there_is_refused() -> None:
    assert NO_OTHER_WAY in refusal(planted_tflite(PLAIN, manifest=says_clip))


def test_a_clip_of_another_limit_is_not_the_one_that_is_promised() -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest["optimizer"][0][1] = 0.25

    assert "through the clip at 0.25" in refusal(planted_tflite(CLIPPED, manifest=change))


def test_a_parameter_that_is_not_a_step_from_the_old_one_is_refused() -> None:
    def change(graph: Editable) -> None:
        graph.graph.outputs.remove(graph.rename("p.1.next", "hidden"))
        leak = graph.add("NEG", [graph.index("lr")], graph.tensor("p.1.next", like="p.1"))
        graph.graph.outputs.append(leak)
        graph.model.signatureDefs = None

    assert "output p.1.next: expected a step from p.1" in refusal(
        planted_tflite(HEAVY, "train", change)
    )


def past_the_clip(i: int) -> Change:
    """Add the sum of the examples to a parameter."""

    def change(graph: Editable) -> None:
        name = f"p.{i}.next"
        honest = graph.rename(name, "honest")
        graph.graph.outputs.remove(honest)
        new = graph.tensor(name, like="honest")
        graph.graph.outputs.append(graph.add("ADD", [honest, graph.sum_of_x()], new))
        graph.model.signatureDefs = None

    return change


@pytest.mark.parametrize("bundle", [CLIPPED, HEAVY, ADAM, IMAGES])
def test_a_way_round_the_clip_is_found_for_every_parameter(bundle: Bundle) -> None:
    for i in range(len(bundle.manifest["params"])):
        line = refusal(planted_tflite(bundle, "train", past_the_clip(i)))
        assert f"output p.{i}.next: {NO_OTHER_WAY}" in line


def test_a_way_round_through_the_state_of_an_earlier_step_is_found() -> None:
    def change(graph: Editable) -> None:
        velocity = graph.rename("s.0.next", "velocity")
        graph.graph.outputs.remove(velocity)
        new = graph.tensor("s.0.next", like="velocity")
        graph.graph.outputs.append(graph.add("ADD", [velocity, graph.sum_of_x()], new))
        graph.model.signatureDefs = None

    assert f"output p.0.next: {NO_OTHER_WAY}" in refusal(planted_tflite(HEAVY, "train", change))


def share(graph: Editable) -> Any:
    """Return the division of the limit by the larger of norm and limit."""
    (larger,) = graph.makers("MAXIMUM")
    return next(o for o in graph.makers("DIV") if o.inputs[1] in larger.outputs)


def fused(graph: Editable) -> None:
    """Put something else between the norm and the product."""
    options = schema.DivOptionsT()
    options.fusedActivationFunction = 1
    share(graph).builtinOptions = options
    share(graph).builtinOptionsType = schema.BuiltinOptions.DivOptions


def smaller(graph: Editable) -> None:
    (larger,) = graph.makers("MAXIMUM")
    graph.add("MINIMUM", list(larger.inputs), -1)
    larger.opcodeIndex = graph.graph.operators.pop().opcodeIndex


def other_square(graph: Editable) -> None:
    """Sum the squares of a parameter in place of its gradient's."""
    squares = [o for o in graph.makers("MUL") if o.inputs[0] == o.inputs[1]]
    squares[0].inputs = [graph.index("p.0"), graph.index("p.0")]


def one_axis(graph: Editable) -> None:
    """Sum squares along one axis of a matrix: columns are clipped, each by itself."""
    squares = {o.outputs[0] for o in graph.makers("MUL") if o.inputs[0] == o.inputs[1]}
    total = next(
        o
        for o in graph.makers("SUM")
        if o.inputs[0] in squares and len(graph.graph.tensors[o.inputs[0]].shape) == 2
    )
    total.inputs = [total.inputs[0], graph.tensor("one axis", stored=np.int32([0]))]


def pretended(graph: Editable) -> None:
    """Say that a matrix of squares is a vector, so that one axis seems to be all."""
    one_axis(graph)
    square = next(o for o in graph.makers("SUM") if o.inputs[1] == graph.index("one axis"))
    graph.graph.tensors[square.inputs[0]].shape = [7]
    graph.graph.tensors[square.inputs[0]].shapeSignature = None


def left_out(graph: Editable) -> None:
    """Leave a gradient out of the norm."""
    sums = {o.outputs[0] for o in graph.makers("SUM")}
    total = next(o for o in graph.makers("ADD") if set(o.inputs) <= sums)
    total.inputs = [total.inputs[0], total.inputs[0]]


def no_root(graph: Editable) -> None:
    """Take the norm's absolute value for its root."""
    (root,) = graph.makers("SQRT")
    root.opcodeIndex = opcode(graph, "ABS")


def a_cube(graph: Editable) -> None:
    """Sum something else than a square."""
    square = next(o for o in graph.makers("MUL") if o.inputs[0] == o.inputs[1])
    square.opcodeIndex = opcode(graph, "ADD")
    square.builtinOptionsType = 0
    square.builtinOptions = None


def a_number_more(graph: Editable) -> None:
    """Add to the norm something that is no sum of squares."""
    sums = {o.outputs[0] for o in graph.makers("SUM")}
    total = next(o for o in graph.makers("ADD") if set(o.inputs) <= sums)
    total.inputs = [total.inputs[0], graph.tensor("more", stored=np.float32(-1e9))]


def opcode(graph: Editable, op: str) -> int:
    graph.add(op, [], -1)
    return int(graph.graph.operators.pop().opcodeIndex)


@pytest.mark.parametrize(
    "change",
    [fused, smaller, other_square, one_axis, pretended, left_out, no_root, a_cube, a_number_more],
    ids=lambda c: c.__name__,
)
def test_what_is_not_quite_a_clip_is_none(change: Change) -> None:
    assert NO_OTHER_WAY in refusal(planted_tflite(CLIPPED, "train", change))


def test_a_clip_may_be_spelled_otherwise() -> None:
    """SQUARE, and one ADD_N of all sums, mean the same."""

    def change(graph: Editable) -> None:
        for square in graph.makers("MUL"):
            if square.inputs[0] == square.inputs[1]:
                square.opcodeIndex = opcode(graph, "SQUARE")
                square.inputs = [square.inputs[0]]
                square.builtinOptionsType, square.builtinOptions = 0, None
        (root,) = graph.makers("SQRT")
        sums = {o.outputs[0] for o in graph.makers("SUM")}
        adds = {o.outputs[0]: o for o in graph.makers("ADD")}
        terms, waiting = [], [root.inputs[0]]
        while waiting:
            at = waiting.pop()
            terms += [at] if at in sums else []
            waiting += [] if at in sums else [*adds[at].inputs]
        place = graph.graph.operators.index(root)
        root.inputs = [graph.add("ADD_N", terms, graph.tensor("total"), place)]

    planted_tflite(CLIPPED, "train", change).check()


def test_what_is_meant_to_take_long_does_not() -> None:
    """A sum that doubles at each step, under many divisions."""

    def change(graph: Editable) -> None:
        (root,) = graph.makers("SQRT")
        (larger,) = graph.makers("MAXIMUM")
        limit = next(i for i in larger.inputs if i not in root.outputs)
        at = root.inputs[0]
        for i in range(100):
            at = graph.add("ADD", [at, at], graph.tensor(f"double {i}"))
        for i in range(500):
            other = graph.add("SQRT", [at], graph.tensor(f"root {i}"))
            most = graph.add("MAXIMUM", [other, limit], graph.tensor(f"most {i}"))
            graph.add("DIV", [limit, most], graph.tensor(f"share {i}"))

    slow = planted_tflite(CLIPPED, "train", change)
    began = time.process_time()
    slow.check()
    assert time.process_time() - began < 5


@pytest.mark.parametrize("bundle", [CLIPPED, HEAVY, ADAM, IMAGES])
def test_the_clip_is_found_by_what_it_does_not_by_its_names(bundle: Bundle) -> None:
    def change(graph: Editable) -> None:
        ports = {*graph.graph.inputs, *graph.graph.outputs}
        for i, tensor in enumerate(graph.graph.tensors):
            tensor.name = tensor.name if i in ports else b"same"

    planted_tflite(bundle, "train", change).check()


@pytest.mark.parametrize("bundle", [CLIPPED, HEAVY, ADAM, IMAGES])
def test_what_is_clipped_is_each_gradient_once(bundle: Bundle) -> None:
    graph = tflitegraph.read(memoryview(bundle.graph("tflite", "train")))
    (stage,) = clips.clips(graph, LIMIT)
    count = len(bundle.manifest["params"])
    assert len(stage.reads) == len(set(stage.reads)) == count
    everything = reach.reached(graph.nodes, {"x"})
    past = reach.reached(graph.nodes, {"x"}, stage.makes)
    new = {f"p.{i}.next" for i in range(count)}
    assert new <= everything
    assert new.isdisjoint(past)
    assert "loss" in past


@pytest.mark.parametrize("bundle", [CLIPPED, HEAVY, ADAM, IMAGES])
def test_ranks_are_those_that_the_writer_knew(bundle: Bundle) -> None:
    for role in ("train", "evaluate"):
        graph = tflitegraph.read(memoryview(bundle.graph("tflite", role)))
        said = {p.name: len(p.shape or ()) for p in (*graph.values, *graph.outputs)}
        sure = ranks.of(graph)
        assert {name: rank for name, rank in sure.items() if name in said} == {
            name: said[name] for name in sure if name in said
        }
        assert said.keys() <= sure.keys()


@given(st.sampled_from(["predict", "train", "evaluate"]), st.data())
@settings(deadline=None, max_examples=50)
def test_damage_passes_or_is_refused(role: str, draw: st.DataObject) -> None:
    data = bytearray(CLIPPED.graph("tflite", role))
    for at in draw.draw(st.lists(st.integers(0, len(data) - 1), min_size=1, max_size=4)):
        data[at] ^= 1 << draw.draw(st.integers(0, 7))
    spoilt = planted_tflite(CLIPPED, role, raw=lambda _: bytes(data))
    with contextlib.suppress(RefusedError):
        spoilt.check()


@pytest.mark.parametrize("name", ["kws_ref_model", "pretrainedResnet_quant", "vww_96_int8"])
def test_bundles_of_real_models_pass_in_both_formats(
    shared: Path, name: str, figure: Callable[..., None]
) -> None:
    optimizer = chain(clip(1.0), momentum(0.9, lr=0.05))
    model = shared / "models" / f"{name}.tflite"
    bundle = build(model, loss="cross_entropy", train="all", optimizer=optimizer, engines=BOTH)
    assert sorted(bundle.manifest["graphs"]) == ["onnx", "tflite"]
    began = time.perf_counter()
    bundle.check()
    figure(f"checking a bundle of {name}, ms", 1000 * (time.perf_counter() - began))


@pytest.mark.parametrize(
    "name",
    ["activations_int8", "attention_float", "cnn_1d_float", "gru_unrolled_int8", "lstm_float",
     "mobilenet_v2_float", "signatures", "tied_int8"],
)  # fmt: skip
def test_bundles_of_keras_models_pass_in_both_formats(name: str) -> None:
    optimizer = chain(clip(1.0), momentum(0.9, lr=0.05))
    model = MODELS / f"{name}.tflite"
    build(model, loss="mse", train="all", optimizer=optimizer, engines=BOTH).check()


def test_inspect_tells_what_tflite_graphs_are_made_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from edge_sdk import inspect_cli

    HEAVY.save(tmp_path / "sound.fedge")
    assert inspect_cli.main([str(tmp_path / "sound.fedge")]) == 0
    said = capsys.readouterr().out
    assert "tflite; the model came as tflite" in said
    assert "  tflite predict: " in said
    assert "  checks     passed" in said
    leaking = planted_tflite(HEAVY, "train", past_the_clip(0))
    leaking.save(tmp_path / "leaking.fedge")
    assert inspect_cli.main([str(tmp_path / "leaking.fedge"), "--json"]) == 5
    record = json.loads(capsys.readouterr().out)
    assert NO_OTHER_WAY in record["refusal"]
    assert record["tflite_operators"]["train"]["MUL"] > 0
    planted_tflite(HEAVY, "train", raw=lambda data: data[:99]).save(tmp_path / "torn.fedge")
    assert inspect_cli.main([str(tmp_path / "torn.fedge")]) == 5
    assert "checks     refused: tflite train graph: " in capsys.readouterr().out
