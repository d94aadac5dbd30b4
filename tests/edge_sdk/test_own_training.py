# SPDX-License-Identifier: Apache-2.0
"""A .tflite model with train, infer, save and restore of its own runs as it is, once checked."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tflite_oracle as oracle
from ai_edge_litert import schema_py_generated as schema

from edge_sdk import owncheck
from edge_sdk.engine.own import OwnModel
from edge_sdk.errors import EngineError, RefusedError
from edge_sdk.limits import Limits
from edge_sdk.tfliteschema import BUILTINS

START = np.float32([[0.5], [-0.25], [0.125]])
LR = np.float32(0.1)
_CODES = {"float32": 0, "int32": 2, "resource": 13}


class Net:
    """y = x @ w with w in a variable: subgraphs by name, written by hand."""

    def __init__(self) -> None:
        self.model = schema.ModelT()
        self.model.version, self.model.description = 3, "trains itself"
        self.model.operatorCodes, self.model.signatureDefs = [], []
        self.model.buffers, self.model.subgraphs = [schema.BufferT()], []

    def graph(self, name: str) -> None:
        self.now = schema.SubGraphT()
        self.now.name, self.now.tensors, self.now.operators = name, [], []
        self.now.inputs, self.now.outputs = [], []
        self.model.subgraphs.append(self.now)

    def tensor(
        self, name: str, shape: tuple[int, ...] = (), dtype: str = "float32", data: Any = None
    ) -> int:
        made = schema.TensorT()
        made.name, made.shape, made.type = name.encode(), [abs(d) for d in shape], _CODES[dtype]
        made.hasRank = True
        if -1 in shape:
            made.shapeSignature = [*shape]
        if data is not None:
            made.buffer = len(self.model.buffers)
            self.model.buffers.append(schema.BufferT())
            self.model.buffers[-1].data = [*np.asarray(data, dtype).tobytes()]
        self.now.tensors.append(made)
        return len(self.now.tensors) - 1

    def op(self, op: str, inputs: list[int], outputs: list[int], options: Any = None) -> None:
        code = schema.OperatorCodeT()
        code.builtinCode = BUILTINS.index(op)
        code.deprecatedBuiltinCode = min(code.builtinCode, 127)
        self.model.operatorCodes.append(code)
        made = schema.OperatorT()
        made.opcodeIndex, made.inputs, made.outputs = (
            len(self.model.operatorCodes) - 1, inputs, outputs,
        )  # fmt: skip
        if options is not None:
            kind = type(options).__name__.removesuffix("T")
            made.builtinOptionsType = getattr(schema.BuiltinOptions, kind)
            made.builtinOptions = options
        self.now.operators.append(made)

    def variable(self, *, starts: bool = True) -> int:
        """Get the handle of w, set up once."""
        if starts:
            once = schema.CallOnceOptionsT()
            once.initSubgraphIndex = 4
            self.op("CALL_ONCE", [], [], once)
        named = schema.VarHandleOptionsT()
        named.sharedName = b"w"
        handle = self.tensor("handle", (), "resource")
        self.op("VAR_HANDLE", [], [handle], named)
        return handle

    def read(self, handle: int) -> int:
        w = self.tensor("w", (3, 1))
        self.op("READ_VARIABLE", [handle], [w])
        return w

    def product(self, a: int, b: int, shape: tuple[int, ...], *, turned: bool = False) -> int:
        options = schema.BatchMatMulOptionsT()
        options.adjX = turned
        out = self.tensor(f"product {len(self.now.tensors)}", shape)
        self.op("BATCH_MATMUL", [a, b], [out], options)
        return out

    def simple(self, op: str, inputs: list[int], shape: tuple[int, ...]) -> int:
        out = self.tensor(f"{op} {len(self.now.tensors)}", shape)
        self.op(op, inputs, [out])
        return out

    def entry(self, key: str, inputs: dict[str, int], outputs: dict[str, int]) -> None:
        made = schema.SignatureDefT()
        made.signatureKey, made.subgraphIndex = key.encode(), len(self.model.subgraphs) - 1
        made.inputs = [_named(name, at) for name, at in inputs.items()]
        made.outputs = [_named(name, at) for name, at in outputs.items()]
        self.now.inputs, self.now.outputs = [*inputs.values()], [*outputs.values()]
        self.model.signatureDefs.append(made)


def _named(name: str, at: int) -> Any:
    made = schema.TensorMapT()
    made.name, made.tensorIndex = name.encode(), at
    return made


def net() -> Any:
    """Make the model: least squares by gradient descent, its gradient written out."""
    n = Net()
    n.graph("train")
    x, y = n.tensor("x", (4, 3)), n.tensor("y", (4, 1))
    handle = n.variable()
    w = n.read(handle)
    off = n.simple("SUB", [n.product(x, w, (4, 1)), y], (4, 1))
    square = n.simple("MUL", [off, off], (4, 1))
    axes = n.tensor("axes", (2,), "int32", [0, 1])
    loss = n.simple("MEAN", [square, axes], ())
    slope = n.product(x, off, (3, 1), turned=True)
    step = n.simple("MUL", [slope, n.tensor("lr", (), data=LR * 2 / 4)], (3, 1))
    n.op("ASSIGN_VARIABLE", [handle, n.simple("SUB", [w, step], (3, 1))], [])
    n.entry("train", {"x": x, "y": y}, {"loss": loss})
    n.graph("infer")
    x = n.tensor("x", (4, 3))
    n.entry("infer", {"x": x}, {"y": n.product(x, n.read(n.variable()), (4, 1))})
    n.graph("save")
    n.entry("save", {}, {"w": n.read(n.variable())})
    n.graph("restore")
    new = n.tensor("new", (3, 1))
    n.op("ASSIGN_VARIABLE", [n.variable(), new], [])
    n.entry("restore", {"w": new}, {})
    n.graph("start")
    n.op("ASSIGN_VARIABLE", [n.variable(starts=False), n.tensor("w0", (3, 1), data=START)], [])
    return n.model


NET = oracle.pack(net())
X = np.random.default_rng(1).normal(size=(4, 3)).astype(np.float32)
Y = X @ np.float32([[1], [2], [3]])


def test_it_trains_as_its_author_wrote_it() -> None:
    model = OwnModel(NET)
    assert model.entries["train"] == (("x", "y"), ("loss",))
    np.testing.assert_array_equal(model.params()["w"], START)
    w = START.copy()
    for _ in range(5):
        off = X @ w - Y
        assert model.step(X, Y) == pytest.approx(float((off**2).mean()), rel=1e-5)
        w = w - LR * 2 / 4 * (X.T @ off)
    np.testing.assert_allclose(model.params()["w"], w, atol=1e-5)
    np.testing.assert_allclose(model.predict(X), X @ w, atol=1e-5)


def test_weights_go_out_and_in_exactly() -> None:
    model, twin = OwnModel(NET, "litert", threads=2), OwnModel(NET)
    for _ in range(3):
        model.step(X, Y)
    twin.load_params(model.params())
    np.testing.assert_array_equal(twin.predict(X), model.predict(X))
    assert twin.step(X, Y) == model.step(X, Y)


def test_what_it_does_not_have_is_said() -> None:
    model = OwnModel(NET)
    with pytest.raises(EngineError, match=r"expected an entry of \['infer', 'restore', 'save'"):
        model.call("evaluate")
    with pytest.raises(EngineError, match=r"train: expected inputs \['x', 'y'\], got \['x'\]"):
        model.call("train", x=X)
    with pytest.raises(EngineError, match="could not run an entry"):
        model.call("infer", x=X[:, :2])
    with pytest.raises(EngineError, match="expected an engine of"):
        OwnModel(NET, "ort")
    only = net()
    del only.signatureDefs[2:]
    with pytest.raises(EngineError, match=r"expected an entry save or get, got \['infer'"):
        OwnModel(oracle.pack(only)).params()


def test_a_runtime_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from edge_sdk.engine import Runtime

    monkeypatch.setattr(Runtime, "is_installed", property(lambda _: False))
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'fedge\[litert\]'"):
        OwnModel(NET)


# --- what may not run -----------------------------------------------------------------------------
def refusal(change: Callable[[Any], object], limits: Limits | None = None) -> str:
    model = copy.deepcopy(net())
    change(model)
    with pytest.raises(RefusedError) as caught:
        owncheck.check(oracle.pack(model), limits or Limits())
    line = str(caught.value)
    assert "\n" not in line
    return line


def other_operator(name: str, custom: bytes | None = None) -> Callable[[Any], object]:
    def change(model: Any) -> None:
        model.operatorCodes[-1].builtinCode = BUILTINS.index(name)
        model.operatorCodes[-1].deprecatedBuiltinCode = min(BUILTINS.index(name), 127)
        model.operatorCodes[-1].customCode = custom
        model.subgraphs[4].operators[-1].builtinOptionsType = 0

    return change


@pytest.mark.parametrize("name", ["IF", "WHILE", "CALL", "HASHTABLE", "RANDOM_UNIFORM"])
def test_operators_outside_the_list(name: str) -> None:
    line = refusal(other_operator(name))
    assert line == f"subgraph 4: {name} is not among the operators that may run"


def test_tensorflow_s_own_operators_by_name() -> None:
    line = refusal(other_operator("CUSTOM", b"FlexConv2DBackpropFilter"))
    assert "CUSTOM:FlexConv2DBackpropFilter is not among the operators that may run" in line


def test_no_signatures() -> None:
    assert "expected signatures such as train" in refusal(lambda m: m.signatureDefs.clear())


def test_strings_and_handles_that_are_none() -> None:
    def text(model: Any) -> None:
        model.subgraphs[0].tensors[0].type = 5

    def handle(model: Any) -> None:
        model.subgraphs[0].tensors[0].type = 13

    def sparse(model: Any) -> None:
        model.subgraphs[0].tensors[0].sparsity = schema.SparsityParametersT()

    assert refusal(text) == "tensor 'x': expected numbers, got string"
    assert refusal(handle) == "tensor 'x': expected numbers, got resource"
    assert refusal(sparse) == "tensor 'x': expected it dense, with plain scales"


@pytest.mark.parametrize("start", [-1, 0, 5])
def test_a_start_that_is_not_there(start: int) -> None:
    def change(model: Any) -> None:
        model.subgraphs[1].operators[0].builtinOptions.initSubgraphIndex = start

    assert refusal(change) == f"subgraph 1: CALL_ONCE calls subgraph {start}, there is none"


def test_a_start_that_leads_to_itself() -> None:
    def change(model: Any) -> None:
        model.subgraphs[4].operators.append(model.subgraphs[0].operators[0])

    assert refusal(change) == "subgraph 4: expected no CALL_ONCE in what is called once"


def test_limits() -> None:
    assert "nodes, this device allows max_nodes=3" in refusal(lambda _: None, Limits(max_nodes=3))
    assert "bytes of memory for constants" in refusal(lambda _: None, Limits(max_ram_bytes=8))

    def bomb(model: Any) -> None:
        model.operatorCodes[-1].builtinCode = BUILTINS.index("FILL")
        model.operatorCodes[-1].deprecatedBuiltinCode = BUILTINS.index("FILL")
        start = model.subgraphs[4]
        start.tensors[-1].type, start.tensors[-1].shape = 2, [3]
        model.buffers[start.tensors[-1].buffer].data = [*np.full(3, 1 << 20, "<i4").tobytes()]
        start.operators[-1].inputs = [1, 1]
        start.operators[-1].outputs = []

    assert refusal(bomb).startswith("FILL: makes 1152921504606846976 numbers")


def test_a_damaged_file() -> None:
    with pytest.raises(RefusedError, match="expected"):
        owncheck.check(NET[:500], Limits())


def test_a_model_of_tensorflow_s_converter(request: pytest.FixtureRequest) -> None:
    folder = Path(request.config.rootpath) / "tests/compiler/tflite/models"
    model = OwnModel((folder / "variables.tflite").read_bytes())
    assert set(model.entries) == {"remember"}
    (takes,) = model.entries["remember"].inputs
    shape = model._interpreter.get_input_details()[0]["shape"]
    first = model.call("remember", **{takes: np.ones(shape, np.float32)})
    second = model.call("remember", **{takes: np.ones(shape, np.float32)})
    assert any((first[n] != second[n]).any() for n in first)  # it remembers
