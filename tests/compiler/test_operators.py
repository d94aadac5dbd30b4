# SPDX-License-Identifier: Apache-2.0
"""Every ONNX operator is in exactly one class, and the reference page says which."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from forward_models import Net, session
from onnx import defs, helper

from coordinator.compiler import build, operators
from coordinator.compiler.emit import Emit
from coordinator.compiler.graph import OPSET_CEILING
from coordinator.compiler.rewrite import REWRITES
from coordinator.compiler.vjp import FLAT, RULES
from edge_sdk.errors import CompileError
from edge_sdk.operators import ALLOWED

PAGE = Path(__file__).parents[2] / "docs/reference/operators.md"
F = np.float32


@pytest.mark.parametrize("operator", sorted(operators.standard() | set(operators.NEWEST)))
def test_every_operator_is_in_exactly_one_class(operator: str) -> None:
    assert len(operators.classes(operator)) == 1


def test_the_tables_name_no_operator_that_is_not() -> None:
    named = {op for op in (*RULES, *REWRITES, *FLAT, *operators.REFUSED) if "." not in op}
    assert named <= operators.standard()
    assert not set(operators.NEWEST) & operators.standard()
    assert all(defs.has(op) for op in operators.NEWEST)


def test_the_page_is_what_the_tables_say(tmp_path: Path) -> None:
    written = tmp_path / "operators.md"
    assert operators.main([str(written)]) == 0
    assert PAGE.read_text() == written.read_text(), (
        "run: python -m coordinator.compiler.operators docs/reference/operators.md"
    )


def test_the_page_is_printed_where_no_path_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert operators.main([]) == 0
    assert capsys.readouterr().out == operators.page()


def test_what_the_compiler_differentiates_may_run_on_a_device() -> None:
    for operator in RULES:
        *domain, name = operator.rsplit(".", 1)
        assert name in ALLOWED["".join(domain)], f"{operator}: add it to edge_sdk/operators.py"


def test_what_onnxruntime_training_had_is_here() -> None:
    for operator in (*operators._PROBED.split(), *operators._NAMED.split()):
        if operator != "SoftmaxCrossEntropyLoss":  # named in build(loss=..)
            assert operators.classes(operator)[0] in {"rule", "rewritten"}


NEAR = np.array([[0.3, -1.2, 2.6], [-0.4, 1.7, 0.9]], F)
ODDS = np.array([[0.2, 0.7, 0.5]], F)
INTS = [np.array(n, np.int64) for n in (6, 32, 8000)]
FLAT_AT: dict[str, tuple[list[np.ndarray], dict[str, Any]]] = {
    "Bernoulli": ([ODDS], {"seed": 3.0}),
    "Ceil": ([NEAR], {}),
    "EyeLike": ([NEAR], {}),
    "Floor": ([NEAR], {}),
    "Hardmax": ([NEAR], {}),
    "MelWeightMatrix": ([*INTS, np.array(10.3, F), np.array(3001.7, F)], {}),
    "RandomNormalLike": ([NEAR], {"seed": 3.0}),
    "RandomUniformLike": ([NEAR], {"seed": 3.0}),
    "Round": ([NEAR], {}),
    "Sign": ([NEAR], {}),
}


def _values(op: str, inputs: list[np.ndarray], attributes: dict[str, Any]) -> np.ndarray:
    e = Emit(opset=18)
    names = [e.input(f"x{i}", x.dtype, x.shape) for i, x in enumerate(inputs)]
    y = e.op(op, names, **attributes)[0]
    model = e.graph(outputs=[y]).to_model().SerializeToString()
    feeds = dict(zip(names, inputs, strict=True))
    runs = session(model)
    taken = {i.name for i in runs.get_inputs()}
    made: np.ndarray = runs.run(None, {k: v for k, v in feeds.items() if k in taken})[0]
    return made


def _has_floats(ports: Any) -> bool:
    return any("tensor(float)" in port.types for port in ports)


@pytest.mark.parametrize("operator", sorted(FLAT))
def test_what_counts_as_flat_is_flat(operator: str) -> None:
    """No floats in, or none out, or a step of each input changes nothing."""
    schema = defs.get_schema(operator, OPSET_CEILING)
    if operator in FLAT_AT:
        inputs, attributes = FLAT_AT[operator]
        before = _values(operator, inputs, attributes)
        for index, x in enumerate(inputs):
            if x.dtype != F:
                continue
            for step in (1e-4, -1e-4):
                moved = [np.asarray(v + F(step)) if i == index else v for i, v in enumerate(inputs)]
                np.testing.assert_array_equal(_values(operator, moved, attributes), before)
    else:
        assert not (_has_floats(schema.inputs) and _has_floats(schema.outputs))


@pytest.mark.parametrize("operator", ["Det", "DFT"])
def test_a_refused_operator_is_named_by_the_compiler(operator: str) -> None:
    net = Net(("N", 6)).dense("body", 6, 9)
    net.weights |= {"shape": np.array([-1, 3, 3]), "column": np.array([0, -1])}
    net.add("Reshape", "shape")
    if operator == "DFT":
        net.weights["one"] = np.array([3])
        net.add("Unsqueeze", "one")
    net.add(operator)
    if operator == "Det":
        net.weights["column"] = np.array([-1, 1])
    width = 1 if operator == "Det" else 18
    with pytest.raises(CompileError, match=rf"{operator} node .* has none"):
        build(net.add("Reshape", "column").dense("head", width, 3).model(), loss="cross_entropy")


def test_a_flat_operator_lets_training_go_on_around_it() -> None:
    net = Net(("N", 6)).dense("body", 6, 3)
    net.add("Hardmax")
    net.nodes.append(helper.make_node("Mul", ["gemm_0", net.last], ["gated"], name="gate"))
    net.last = "gated"
    bundle = build(net.dense("head", 3, 3).model(), loss="cross_entropy")
    assert "body.weight" in bundle.shapes
    assert onnx.load_from_string(bundle.member("onnx/train.onnx")).graph.node
