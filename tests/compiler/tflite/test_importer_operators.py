# SPDX-License-Identifier: Apache-2.0
"""Each operator that is imported, alone, against LiteRT: float32 and int8, on random numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter
from tflite_cases import CASES, ONE_VERSION, Case, Flags, Ids, Ints, State
from tflite_models import Builder

from coordinator.compiler.tflite.importer import import_model
from coordinator.compiler.tflite.table import IMPORTS
from edge_sdk.engine.ort import Ort
from edge_sdk.errors import FedgeError
from edge_sdk.tflitefile import read

MODELS = Path(__file__).parent / "models"
ROWS = 40
NEAR_TIES = 2e-4
"""Share of integers that may be off by one: kernels scale by numbers of 20 bits, not of 24."""


def built(case: Case, mode: str, *, unsigned: bool = False) -> bytes:
    """Return a model of one operator."""
    b = Builder(1)
    shift = 128 if unsigned else 0
    dtype = "uint8" if unsigned else "int8"
    quantized = {"scale": (0.02,), "zero": 5 + shift} if mode == "int8" else {}
    kind = dtype if mode == "int8" else "float32"
    inputs, activations, steps = [], [], []
    for n, given in enumerate(case.inputs):
        if isinstance(given, Ints):
            array = np.asarray(given.values, np.int32)
            inputs.append(b.tensor(f"ints{n}", array.shape, "int32", array))
        elif isinstance(given, Ids | Flags):
            plain = "int32" if isinstance(given, Ids) else "bool"
            inputs.append(b.tensor(f"x{n}", given.shape, plain))
            activations.append(inputs[-1])
        elif isinstance(given, State):
            inputs.append(b.tensor(f"state{n}", given.shape, "float32"))
            b.graph.tensors[-1].isVariable = True
        elif isinstance(given, tuple):
            inputs.append(b.tensor(f"x{n}", given, kind, **quantized))
            activations.append(inputs[-1])
            steps.append(0.02)
        elif mode == "float":
            inputs.append(b.tensor(f"w{n}", given.shape, "float32", given))
        elif steps and len(steps) > 1 and given.ndim == 1:  # a bias
            scale = np.float32(steps[0]) * np.atleast_1d(steps[1])
            data = np.rint(given / scale)
            inputs.append(b.tensor(f"b{n}", given.shape, "int32", data, scale=scale))
        else:
            inputs.append(weight(b, case, n, given, steps, unsigned=unsigned))
    scale, zero = case.out or (0.02, 5)
    kinds = case.made.split() or [kind] * case.outputs
    made = [
        b.tensor(
            f"y{n}",
            case.shape,
            kinds[n],
            **({"scale": (scale,), "zero": zero + shift} if mode == "int8" else {}),
        )
        for n in range(case.outputs)
    ]
    is_second = mode == "int8" and case.op not in ONE_VERSION
    version = 2 if is_second or case.op == "BROADCAST_TO" else 1
    b.op(case.op, inputs, made[0], case.options, version, **case.fields)
    b.graph.operators[0].outputs = made
    data = b.pack(activations[0], made[0])
    if len(activations) == len(made) == 1:
        return data
    b.graph.inputs, b.graph.outputs = activations, made
    return packed(b)


def packed(b: Builder) -> bytes:
    """Return a file of several inputs or outputs."""
    inputs, outputs = b.graph.inputs, b.graph.outputs
    b.pack(inputs[0], outputs[0])
    b.graph.inputs, b.graph.outputs = inputs, outputs
    builder = flatbuffers.Builder(1024)
    builder.Finish(b.model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def weight(b: Builder, case: Case, n: int, given: Any, steps: list[Any], *, unsigned: bool) -> int:
    """Add int8 weights, those of layers with a scale per channel, or old uint8 ones with one."""
    if unsigned:
        scale = np.float32(np.abs(given).max() / 120)
        steps.append(scale)
        data = np.rint(given / scale) + 131
        return b.tensor(f"w{n}", given.shape, "uint8", data, scale=(scale,), zero=131)
    axis = {"CONV_2D": 0, "DEPTHWISE_CONV_2D": 3, "TRANSPOSE_CONV": 0, "FULLY_CONNECTED": 0}
    along = axis.get(case.op)
    rest = tuple(i for i in range(given.ndim) if i != along)
    most = np.abs(given).max() if along is None else np.abs(given).max(rest, keepdims=True)
    scale = (most / 127).astype(np.float32)
    data = np.rint(given / scale)
    steps.append(np.ravel(scale))
    return b.tensor(f"w{n}", given.shape, "int8", data, scale=np.ravel(scale), axis=along or 0)


def both(model: bytes) -> list[tuple[Any, Any]]:
    """Return what LiteRT and the imported model make of the same random inputs, by output."""
    runtime = Interpreter(model_content=model, num_threads=1)
    runtime.allocate_tensors()
    runs = Ort(1).session(import_model(model).proto.SerializeToString())
    rng = np.random.default_rng(0)
    ends, theirs, ours = runtime.get_output_details(), [], []
    for _ in range(ROWS):
        feeds = {}
        for to, of in zip(runtime.get_input_details(), runs.get_inputs(), strict=True):
            x = drawn(rng, to["shape"], to["dtype"])
            runtime.set_tensor(to["index"], x)
            feeds[of.name] = x
        runtime.reset_all_variables()
        runtime.invoke()
        theirs.append([runtime.get_tensor(end["index"]) for end in ends])
        ours.append(runs.run(None, feeds))
    return [
        (np.array([row[n] for row in theirs]), np.array([row[n] for row in ours]))
        for n in range(len(ends))
    ]


def drawn(rng: np.random.Generator, shape: Any, dtype: Any) -> Any:
    if np.dtype(dtype).kind == "f":
        return rng.normal(0, 2, shape).astype(np.float32)
    if np.dtype(dtype).itemsize > 1 or dtype == np.bool_:
        return rng.integers(0, 4 if dtype != np.bool_ else 2, shape).astype(dtype)
    ends = np.iinfo(dtype)
    return rng.integers(ends.min, ends.max, shape, dtype, endpoint=True)


def agree(model: bytes) -> None:
    for theirs, ours in both(model):
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        if theirs.dtype.itemsize > 1 or theirs.dtype.kind == "b":
            np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=2e-6)
        else:
            off = np.abs(ours.astype(int) - theirs)
            assert off.max() <= 1
            assert (off > 0).mean() <= NEAR_TIES
            assert len(np.unique(theirs)) > 1


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("mode", ["float", "int8"])
def test_an_operator_computes_what_litert_does(name: str, mode: str) -> None:
    case = CASES[name]
    if mode not in case.modes.split():
        return
    agree(built(case, mode))


UNSIGNED = [
    "add", "conv, valid", "conv, same, strides", "dense", "depthwise", "depthwise, multiplied",
    "logistic", "max pool", "mean pool", "mul", "reshape", "softmax",
]  # fmt: skip


@pytest.mark.parametrize("name", UNSIGNED)
def test_uint8_models_are_read_like_int8(name: str) -> None:
    case = CASES[name]
    agree(built(case, "int8", unsigned=True))


def test_every_importer_has_a_test() -> None:
    checked = {case.op for case in CASES.values()}
    for path in MODELS.glob("*.tflite"):
        checked |= {op.op for graph in read(path.read_bytes()).subgraphs for op in graph.operators}
    nothing_to_compute = {"FAKE_QUANT", "RANGE", "RANK", "ZEROS_LIKE"}
    assert set(IMPORTS) - checked == nothing_to_compute


def test_the_page_of_operators_names_them_all() -> None:
    page = Path(__file__).parents[3] / "docs/reference/tflite-import.md"
    table = page.read_text(encoding="utf-8").split("## ")[0]
    rows = [line.split("|")[2] for line in table.splitlines() if line.startswith("| ")]
    assert {name for row in rows[1:] for name in row.split()} - {"---"} == set(IMPORTS)


def test_a_file_that_no_converter_wrote_is_refused_in_one_line() -> None:
    rng = np.random.default_rng(0)
    small = [path for path in sorted(MODELS.glob("*.tflite")) if path.stat().st_size < 12_000]
    refusals, imported = [], 0
    for n in range(60):
        model = schema.ModelT.InitFromPackedBuf(small[n % len(small)].read_bytes(), 0)
        graph = model.subgraphs[0]
        op = graph.operators[rng.integers(len(graph.operators))]
        op.inputs = [int(i) for i in op.inputs]
        op.inputs[rng.integers(len(op.inputs))] = int(rng.integers(-1, len(graph.tensors)))
        if n % 2:
            op.opcodeIndex = int(rng.integers(len(model.operatorCodes)))
        builder = flatbuffers.Builder(1024)
        builder.Finish(model.Pack(builder), b"TFL3")
        try:
            import_model(bytes(builder.Output()))
            imported += 1
        except FedgeError as error:
            refusals.append(str(error))
    assert imported
    assert refusals
    assert not any("\n" in text for text in refusals)
