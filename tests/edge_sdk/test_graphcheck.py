# SPDX-License-Identifier: Apache-2.0
"""Each kind of violation, planted in a sound bundle, is refused in a line that names it."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hand_bundles import mlp as hand_made
from onnx import TensorProto, helper, numpy_helper
from planted import Change, both, maker, node, output, planted, port, refusal

from edge_sdk.bundle import Bundle
from edge_sdk.errors import BundleError, ConfigError
from edge_sdk.limits import Limits
from edge_sdk.operators import MICROSOFT, STANDARD, TFLITE

MOMENTUM = hand_made(momentum=True, proximal=True)
INT8 = hand_made(quantized=True)
DOCS = Path(__file__).parents[2] / "docs/reference"


def after(op: str, inputs: list[str], **options: Any) -> Change:
    return both(node(op, inputs, ["leak"], **options), output("leak", None))


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("proximal", [False, True])
@pytest.mark.parametrize("momentum", [False, True])
def test_sound_bundles_pass(momentum: bool, proximal: bool, quantized: bool, loss: str) -> None:
    hand_made(loss=loss, momentum=momentum, proximal=proximal, quantized=quantized).check()


@pytest.mark.parametrize("role", ["train", "evaluate"])
def test_an_output_that_nobody_asked_for_is_refused(role: str) -> None:
    leaking = planted(MOMENTUM, role, after("Identity", ["x"]))
    assert refusal(leaking) == (
        f"{role} graph: output 'leak': the manifest promises no such output"
    )


def test_a_batch_in_place_of_a_metric_is_refused() -> None:
    def change(model: onnx.ModelProto) -> None:
        maker(model, "loss").output[0] = "hidden"
        model.graph.node.append(helper.make_node("Identity", ["x"], ["loss"]))

    def undeclared(model: onnx.ModelProto) -> None:
        change(model)
        port(model, "loss").type.tensor_type.ClearField("shape")

    def declared(model: onnx.ModelProto) -> None:
        change(model)
        port(model, "loss").CopyFrom(port(model, "x"))
        port(model, "x").name = "x"
        model.graph.output[0].name = "loss"

    assert "output 'loss': expected shape [], got no shape" in refusal(
        planted(MOMENTUM, "train", undeclared)
    )
    assert "output 'loss': expected shape [], got [" in refusal(
        planted(MOMENTUM, "evaluate", declared)
    )


def test_a_parameter_that_is_not_a_step_from_the_old_one_is_refused() -> None:
    def change(model: onnx.ModelProto) -> None:
        maker(model, "p.1.next").output[0] = "hidden"
        model.graph.node.append(helper.make_node("ReduceMax", ["x"], ["p.1.next"], keepdims=0))

    assert "output p.1.next: expected a step from p.1" in refusal(
        planted(MOMENTUM, "train", change)
    )


def a_graph(op: str) -> Change:
    body = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["inner"])],
        "body",
        [],
        [helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)],
    )
    names = ["then_branch", "else_branch"] if op == "If" else ["body"]
    return node(op, ["lr"], ["leak"], **dict.fromkeys(names, body))


@pytest.mark.parametrize("op", ["If", "Loop", "Scan"])
@pytest.mark.parametrize("role", ["train", "evaluate", "predict"])
def test_nested_graphs_are_refused(op: str, role: str) -> None:
    line = refusal(planted(MOMENTUM, role, a_graph(op)))
    said = "this operator is not among those"
    if (op, role) == ("Loop", "train"):  # where it may sum up slices of the batch
        said = "expected sums to go in and come out, and nothing else"
    assert line.startswith(f"{role} graph: {op} node 'leak': {said}")


def test_a_nested_graph_in_an_operator_that_is_allowed_is_refused() -> None:
    def change(model: onnx.ModelProto) -> None:
        body = helper.make_graph([], "body", [], [])
        model.graph.node[0].attribute.append(helper.make_attribute("body", body))

    assert "attribute 'body': expected numbers or a word, got graph" in refusal(
        planted(MOMENTUM, "train", change)
    )


@pytest.mark.parametrize(
    ("op", "domain"),
    [
        ("Evil", "com.example"),
        ("PythonOp", "com.microsoft"),
        ("TreeEnsembleClassifier", "ai.onnx.ml"),
        ("RandomUniform", ""),
        ("Bernoulli", ""),
        ("StringNormalizer", ""),
        ("SequenceConstruct", ""),
        ("Optional", ""),
        ("ImageDecoder", ""),
        ("NoSuchThing", "ai.onnx"),
    ],
)
def test_operators_outside_the_list_are_refused(op: str, domain: str) -> None:
    line = refusal(planted(MOMENTUM, "predict", node(op, ["logits"], ["z"], domain=domain)))
    assert line.startswith(f"predict graph: {op} node 'z': ")
    assert "may not run here" in line or "not among those that may run" in line


def external(model: onnx.ModelProto) -> None:
    tensor = model.graph.initializer[-1]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "/etc/passwd"


def strings(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(helper.make_tensor("words", TensorProto.STRING, [1], [b"a"]))


def too_few(model: onnx.ModelProto) -> None:
    model.graph.initializer[-1].dims[0] = 1 << 20


def both_forms(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(helper.make_tensor("twice", TensorProto.FLOAT, [1], [1.0]))
    model.graph.initializer[-1].raw_data = b"1234"


def odd_type(model: onnx.ModelProto) -> None:
    model.graph.initializer[-1].data_type = TensorProto.COMPLEX64


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (external, "external data"),
        (strings, "expected numbers, got strings"),
        (too_few, "the file holds another amount"),
        (both_forms, "the file holds another amount"),
        (odd_type, "expected a known element type"),
    ],
)
@pytest.mark.parametrize("role", ["predict", "train"])
def test_stored_tensors_that_are_not_plain_numbers_are_refused(
    change: Change, reason: str, role: str
) -> None:
    def on_a_new_one(model: onnx.ModelProto) -> None:
        model.graph.initializer.append(numpy_helper.from_array(np.ones(2, np.float32), "c"))
        change(model)

    assert reason in refusal(planted(MOMENTUM, role, on_a_new_one))


def test_strings_and_hidden_tensors_in_attributes_are_refused() -> None:
    def constant(**value: Any) -> str:
        return refusal(planted(MOMENTUM, "train", node("Constant", [], ["c"], **value)))

    assert "expected numbers, got strings" in constant(value_string="a")
    assert "expected numbers, got strings" in constant(
        value=helper.make_tensor("t", TensorProto.STRING, [1], [b"a"])
    )
    to_text = node("Cast", ["x"], ["c"], to=TensorProto.STRING)
    assert "got strings" in refusal(planted(MOMENTUM, "train", to_text))


def a_function(model: onnx.ModelProto) -> None:
    relu = helper.make_node("Identity", ["a"], ["b"])
    imports = [helper.make_opsetid("", 18)]
    model.functions.append(helper.make_function("", "Relu", ["a"], ["b"], [relu], imports))


def sparse(model: onnx.ModelProto) -> None:
    values = helper.make_tensor("v", TensorProto.FLOAT, [1], [1.0])
    at = helper.make_tensor("i", TensorProto.INT64, [1], [0])
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, at, [1 << 40]))


def options(model: onnx.ModelProto) -> None:
    entry = model.metadata_props.add()
    entry.key, entry.value = "ort_config", '{"session_options": {"intra_op_num_threads": 64}}'


def a_sequence(model: onnx.ModelProto) -> None:
    inner = helper.make_tensor_type_proto(TensorProto.FLOAT, [1])
    model.graph.value_info.append(
        helper.make_value_info("s", helper.make_sequence_type_proto(inner))
    )


def unmade(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[0] = "nowhere"


def made_twice(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Identity", ["lr"], [model.graph.node[0].output[0]]))


def turned(model: onnx.ModelProto) -> None:
    model.graph.node.reverse()


def stored_input(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.ones((), np.float32), "lr"))


def silent(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Identity", ["lr"], [""], name="mute"))


def overloaded(model: onnx.ModelProto) -> None:
    model.graph.node[0].overload = "other"


def no_loss(model: onnx.ModelProto) -> None:
    maker(model, "loss").output[0] = "hidden"


def untyped(model: onnx.ModelProto) -> None:
    port(model, "loss").ClearField("type")


def vast(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.array([1 << 40]), "vast"))
    model.graph.node.append(helper.make_node("ConstantOfShape", ["vast"], ["bomb"]))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (a_function, "expected no functions, got 1"),
        (sparse, "expected no sparse_initializer"),
        (options, "expected no ort_config"),
        (a_sequence, "value 's': expected a tensor of numbers, got sequence"),
        (unmade, "reads 'nowhere', which nothing made before"),
        (made_twice, "which is there already"),
        (turned, "which nothing made before"),
        (silent, "Identity node 'mute': expected it to make something"),
        (overloaded, "expected no overload"),
        (no_loss, "output 'loss': nothing makes it"),
        (untyped, "output 'loss': expected a tensor, got no type"),
        (stored_input, "input 'lr': it is stored as well"),
        (vast, "ConstantOfShape node 'bomb': makes 1099511627776 numbers"),
    ],
)
def test_models_that_are_not_plain_graphs_are_refused(change: Change, reason: str) -> None:
    assert reason in refusal(planted(MOMENTUM, "train", change))


def widened(name: str) -> Change:
    def change(model: onnx.ModelProto) -> None:
        port(model, name).type.tensor_type.shape.dim[0].dim_value = 99

    return change


def retyped(name: str) -> Change:
    def change(model: onnx.ModelProto) -> None:
        port(model, name).type.tensor_type.elem_type = TensorProto.DOUBLE

    return change


def dropped(model: onnx.ModelProto) -> None:
    model.graph.output.pop()


@pytest.mark.parametrize("name", ["p.0", "p.1.next", "s.2", "s.3.next", "a.0"])
def test_parameters_and_slots_of_another_shape_are_refused(name: str) -> None:
    assert re.search(
        rf"train graph: (in|out)put '{name}': expected shape .*, got \[99",
        refusal(planted(MOMENTUM, "train", widened(name))),
    )


@pytest.mark.parametrize(
    ("role", "change", "reason"),
    [
        ("train", retyped("x"), "input 'x': expected float32, got float64"),
        ("train", retyped("lr"), "input 'lr': expected float32, got float64"),
        ("train", dropped, "expected it once, got it 0 times"),
        ("evaluate", retyped("loss"), "output 'loss': expected float32, got float64"),
        ("predict", retyped("features"), "input 'features': expected float32, got float64"),
        ("predict", after("Identity", ["logits"]), "output 'leak': the manifest promises no such"),
    ],
)
def test_ports_other_than_the_manifest_s_are_refused(
    role: str, change: Change, reason: str
) -> None:
    assert reason in refusal(planted(MOMENTUM, role, change))


def test_an_evaluation_need_not_count_what_is_correct() -> None:
    def change(model: onnx.ModelProto) -> None:
        maker(model, "correct").output[0] = "unused"
        dropped(model)

    planted(MOMENTUM, "evaluate", change).check()


def test_examples_of_another_width_are_refused() -> None:
    def change(model: onnx.ModelProto) -> None:
        port(model, "x").type.tensor_type.shape.dim[1].dim_value = 7

    assert "input 'x': expected shape [?, 6], got [" in refusal(
        planted(MOMENTUM, "evaluate", change)
    )


@pytest.mark.parametrize("bundle", [MOMENTUM, INT8], ids=["float32", "int8"])
def test_patches_write_weights_and_nothing_else(bundle: Bundle) -> None:
    def shifted(manifest: dict[str, Any]) -> None:
        manifest["patches"]["onnx"][0]["offset"] -= 12

    def missized(manifest: dict[str, Any]) -> None:
        first, second = manifest["patches"]["onnx"][0], manifest["patches"]["onnx"][1]
        first["offset"], second["offset"] = second["offset"], first["offset"]

    line = refusal(planted(bundle, manifest=shifted))
    assert (
        line == "predict graph: patches[0]: expected the place of a stored tensor, got other bytes"
    )
    with pytest.raises(BundleError, match="patches"):  # here, or by the manifest's own check before
        planted(bundle, manifest=missized).check()


def test_onnxruntime_s_own_format_does_not_pass_for_onnx() -> None:
    def disguised(data: bytes) -> bytes:
        return b"\x08\x0a\x12\x04ORTM" + data[2:]  # a producer's name, and a flatbuffer's magic

    assert refusal(planted(MOMENTUM, raw=disguised)) == (
        "train graph: expected ONNX, got onnxruntime's own format"
    )


def test_a_second_graph_does_not_hide_behind_the_first() -> None:
    line = refusal(planted(MOMENTUM, raw=lambda data: data + data[2:]))
    assert line == "train graph: model: expected graph once, got it again"


def test_names_from_a_graph_cannot_forge_lines_of_a_log() -> None:
    line = refusal(planted(MOMENTUM, "train", node("Evil\nlevel=INFO all is well" * 9, [], ["z"])))
    assert len(line) < 300


@pytest.mark.parametrize(
    ("limit", "value", "reason"),
    [
        ("max_bundle_bytes", 1000, "bytes of bundle, this device allows max_bundle_bytes=1000"),
        ("max_flops_step", 10, "floating-point operations to train on one example"),
        ("max_update_bytes", 1, "bytes of an update"),
        ("max_ram_bytes", 100, "bytes of memory for weights and optimizer"),
        ("max_nodes", 3, "nodes, this device allows max_nodes=3"),
    ],
)
def test_a_bundle_beyond_the_limits_is_refused(limit: str, value: int, reason: str) -> None:
    assert reason in refusal(MOMENTUM, Limits(**{limit: value}))


def test_graphs_are_read_as_the_format_that_the_manifest_names() -> None:
    def moved(manifest: dict[str, Any]) -> None:
        manifest["graphs"]["tflite"] = manifest["graphs"].pop("onnx")
        manifest["patches"] = {"tflite": []}
        manifest["source"] = "tflite"

    line = refusal(planted(MOMENTUM, manifest=moved))
    assert line.startswith("tflite evaluate graph: model: expected the identifier b'TFL3', got ")


def test_declared_memory_counts_and_what_is_not_declared_is_counted_anyway() -> None:
    def declares(manifest: dict[str, Any]) -> None:
        manifest["cost"]["ram_step"] = 1 << 40

    def says_nothing(manifest: dict[str, Any]) -> None:
        manifest["cost"] = {}

    assert "needs 1099511627776 bytes of memory (ram_step)" in refusal(
        planted(MOMENTUM, manifest=declares)
    )
    numbers = sum(p.size for p in MOMENTUM.params().values())
    silent = planted(MOMENTUM, manifest=says_nothing)
    refusal(silent, Limits(max_ram_bytes=4 * 5 * numbers - 1))  # p twice, s twice, a
    silent.check(Limits(max_ram_bytes=4 * 5 * numbers + 1000))


COUNTS = [f.name for f in dataclasses.fields(Limits) if str(f.type).startswith("int")]


@pytest.mark.parametrize("field", COUNTS)
def test_a_limit_is_a_whole_number_above_zero(field: str) -> None:
    for wrong in (0, -1, 1.5, True):
        with pytest.raises(ConfigError, match=field):
            Limits(**{field: wrong})


def test_the_page_lists_every_operator_and_limit() -> None:
    page = (DOCS / "bundle-checks.md").read_text()
    said = set(re.findall(r"`([A-Z]\w+)`", page.partition("## Operators that may run")[2]))
    assert said == STANDARD | MICROSOFT | TFLITE
    config = (DOCS / "device-config.md").read_text()
    for field in dataclasses.fields(Limits):
        default = {None: "none", True: "true"}.get(field.default, field.default)
        assert f"`{field.name}` | {default} |" in config
        assert str(field.type) != "int" or f"`{field.name}` |" in page
