# SPDX-License-Identifier: Apache-2.0
"""The writer's tables and files against LiteRT's own schema, and against our reader."""

from __future__ import annotations

import inspect
import re

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema

from coordinator.compiler.tflite.write import (
    ACTIVATIONS,
    OPERATORS,
    OPTIONS,
    PADDINGS,
    TYPES,
    Model,
    Operator,
    Quantization,
    Tensor,
    write,
)
from edge_sdk import tflitefile
from edge_sdk.errors import CompileError

SOURCE = inspect.getsource(schema)


def test_operator_codes_are_the_schemas() -> None:
    for name, (code, table, _) in OPERATORS.items():
        assert getattr(schema.BuiltinOperator, name) == code
        assert not table or table in OPTIONS


def test_types_paddings_and_activations_are_the_schemas() -> None:
    for name, number in TYPES.items():
        assert getattr(schema.TensorType, name.upper()) == number
    for name, number in PADDINGS.items():
        assert getattr(schema.Padding, name) == number
    for name, number in ACTIVATIONS.items():
        assert getattr(schema.ActivationFunctionType, name) == number


@pytest.mark.parametrize("table", sorted(OPTIONS))
def test_options_have_the_schemas_number_and_slots(table: str) -> None:
    number, fields = OPTIONS[table]
    assert getattr(schema.BuiltinOptions, f"{table}Options") == number
    pattern = (
        rf"def {table}OptionsAdd(\w+)\(builder, \w+\):\s*\n\s*builder\.Prepend(\w+)Slot\((\d+)"
    )
    slots = {int(slot): (name, kind) for name, kind, slot in re.findall(pattern, SOURCE)}
    kinds = {
        "int": {"Int32"}, "bool": {"Bool"}, "float": {"Float32"}, "type": {"Int8"},
        "padding": {"Int8"}, "activation": {"Int8"}, "ints": {"UOffsetTRelative"},
        "text": {"UOffsetTRelative"},
    }  # fmt: skip
    for i, (name, kind) in enumerate(fields):
        if name.startswith("_"):
            assert i not in slots  # a field that the schema has given up
        elif name != "weights_format":
            assert slots[i][1] in kinds[kind], (table, name, slots[i])


def test_reader_finds_everything_that_was_written() -> None:
    scheme = Quantization((0.5, 0.25), (0, 0), 0)
    tensors = [
        Tensor("x", "int8", (None, 1, 1, 3), None, Quantization((0.125,), (-3,))),
        Tensor("w", "int8", (2, 1, 1, 3), np.arange(6, dtype=np.int8).reshape(2, 1, 1, 3), scheme),
        Tensor("b", "int32", (2,), np.array([5, -7], np.int32)),
        Tensor("y", "int8", (None, 1, 1, 2), None, Quantization((1.0,), (4,))),
    ]
    options = {
        "padding": "VALID", "stride_w": 1, "stride_h": 1, "activation": "RELU6", "dilation_w": 1,
        "dilation_h": 1,
    }  # fmt: skip
    conv = Operator("CONV_2D", (0, 1, 2), (3,), options)
    data = write(Model(tensors, [conv], (0,), (3,), "predict"))
    file = tflitefile.read(data)
    graph = file.subgraphs[0]
    assert [t.name for t in graph.tensors] == ["x", "w", "b", "y"]
    assert graph.tensors[0].signature_shape == (None, 1, 1, 3)
    assert graph.tensors[1].scale.tolist() == [0.5, 0.25]
    assert graph.tensors[1].shape == (2, 1, 1, 3)
    assert bytes(file.data(graph.tensors[1].buffer)) == bytes(range(6))
    assert np.frombuffer(file.data(graph.tensors[2].buffer), "<i4").tolist() == [5, -7]
    assert graph.operators[0].op == "CONV_2D"
    assert graph.operators[0].version == 3
    assert graph.operators[0].options["padding"] == "VALID"
    assert graph.operators[0].options["fused_activation_function"] == "RELU6"
    assert set(file.signatures) == {"predict"}
    assert data == write(Model(tensors, [conv], (0,), (3,), "predict"))


def test_constants_lie_on_16_bytes() -> None:
    tensors = [
        Tensor("x", "float32", (None, 3)),
        Tensor("a", "float32", (3,), np.ones(3, np.float32)),
        Tensor("b", "float32", (3,), np.full(3, 2, np.float32)),
        Tensor("m", "float32", (None, 3)),
        Tensor("y", "float32", (None, 3)),
    ]
    operators = [Operator("MUL", (0, 1), (3,)), Operator("ADD", (3, 2), (4,))]
    file = tflitefile.read(write(Model(tensors, operators, (0,), (4,))))
    assert [b.offset % 16 for b in file.buffers if b.size] == [0, 0]


@pytest.mark.parametrize(
    ("operator", "said"),
    [
        (Operator("NO_SUCH", (0,), (1,)), "builtin operator"),
        (Operator("RELU", (0,), (1,), {"alpha": 1.0}), "no options|has no"),
        (Operator("LEAKY_RELU", (0,), (1,), {"beta": 1.0}), "has no"),
    ],
)
def test_what_no_table_has_is_refused(operator: Operator, said: str) -> None:
    tensors = [Tensor("x", "float32", (2,)), Tensor("y", "float32", (2,))]
    with pytest.raises(CompileError, match=said):
        write(Model(tensors, [operator], (0,), (1,)))


def test_type_that_no_runtime_has_is_refused() -> None:
    tensors = [Tensor("x", "float128", (2,)), Tensor("y", "float32", (2,))]
    with pytest.raises(CompileError, match="float128"):
        write(Model(tensors, [Operator("RELU", (0,), (1,))], (0,), (1,)))
