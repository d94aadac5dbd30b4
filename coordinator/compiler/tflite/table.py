# SPDX-License-Identifier: Apache-2.0
"""The table of importers: one function for each TFLite operator that can be written in ONNX.

@imports("RELU")
def _(f: Forward, op: Operator) -> None:
    f.write(op.outputs[0], f.e.Relu(f.read(op.inputs[0])))
"""

from __future__ import annotations

from collections.abc import Callable

from coordinator.compiler.tflite.forward import Forward
from edge_sdk.tflitefile import Operator

Rule = Callable[[Forward, Operator], None]

IMPORTS: dict[str, Rule] = {}
"""By operator, as `edge_sdk.tfliteschema.BUILTINS` spells it."""


def imports(*operators: str) -> Callable[[Rule], Rule]:
    """Register a function as the importer of these operators."""

    def register(rule: Rule) -> Rule:
        for operator in operators:
            if operator in IMPORTS:
                raise ValueError(f"expected one importer of {operator}, got a second")
            IMPORTS[operator] = rule
        return rule

    return register
