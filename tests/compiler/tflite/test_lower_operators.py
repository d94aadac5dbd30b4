# SPDX-License-Identifier: Apache-2.0
"""Every operator with its gradients, lowered to builtin operators, against onnxruntime."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from check_grads import Case
from grad_cases import CASES
from litert_runs import litert, tflite_runtime
from lowered_cases import expected

from coordinator.compiler.rewrite import REWRITES
from coordinator.compiler.tflite.lower import LOWERS, lower
from edge_sdk.errors import CompileError

PAGE = Path(__file__).parents[3] / "docs/reference/tflite-operators.md"
_, _WHOLLY, _PARTLY, _FORWARD = PAGE.read_text().split("\n## ")
WHOLLY = set(re.findall(r"\w+", _WHOLLY.partition("\n")[2]))
"""Lowered in every setting that has a gradient."""

PARTLY = set(re.findall(r"^- (\w+):", _PARTLY, re.MULTILINE))
"""Lowered but for some settings, which are refused by the node's name."""

FORWARD = set(re.findall(r"\w+", _FORWARD.partition("\n")[2]))
"""Lowered, and without a gradient."""

OPS = sorted({case.op for case in CASES})


def cases_of(op: str) -> list[Case]:
    return [case for case in CASES if case.op == op]


def test_page_names_what_is_lowered_and_nothing_else() -> None:
    named = WHOLLY | PARTLY | FORWARD
    spelled_out = {op for op in REWRITES if "." not in op}
    assert named <= set(LOWERS) | spelled_out
    others = {op for op in LOWERS if "." not in op} - named
    assert others == {
        "CastLike", "DequantizeLinear", "GatherElements", "GatherND", "RMSNormalization",
        "ScatterND", "Upsample",
    }  # fmt: skip


@pytest.mark.parametrize("op", OPS)
def test_operator_and_gradients_equal_onnxruntimes_or_are_refused(op: str) -> None:
    served, refusals = 0, list[str]()
    for case in cases_of(op):
        try:
            graph, feeds, wanted = expected(case)
            model = lower(graph)
        except CompileError as error:
            refusals.append(str(error))
            continue
        served += 1
        made = litert(model, feeds)
        for value, want in zip(graph.outputs, wanted, strict=True):
            np.testing.assert_allclose(
                made[value.name], want, rtol=1e-4, atol=1e-4, err_msg=case.title
            )
    assert served or op not in WHOLLY | PARTLY
    assert not refusals or op not in WHOLLY
    for said in refusals:
        assert "builtin TFLite operators" in said or "known type and shape" in said


def test_old_runtime_computes_the_same(tmp_path: Path) -> None:
    chosen = {}
    for op in sorted(WHOLLY | PARTLY):
        for i, case in enumerate(cases_of(op)):
            try:
                graph, feeds, wanted = expected(case)
                model = lower(graph)
            except CompileError:
                continue
            chosen[f"{op}{i}.tflite"] = (model, feeds, wanted, [v.name for v in graph.outputs])
    made = tflite_runtime({k: v[:2] for k, v in chosen.items()}, tmp_path)
    for name, (_, _, wanted, outputs) in chosen.items():
        for output, want in zip(outputs, wanted, strict=True):
            np.testing.assert_allclose(made[name][output], want, rtol=1e-4, atol=1e-4, err_msg=name)
