# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
from check_grads import Case, Gradient, assert_close, finite_differences, upstream_for
from grad_cases import CASES
from onnx import defs

from coordinator.compiler.graph import OPSET_CEILING
from coordinator.compiler.rewrite import REWRITES
from coordinator.compiler.vjp import NO_GRADIENT, RULES

BATCHED = [case for case in CASES if case.batch]


def titles(cases: list[Case]) -> list[str]:
    return [case.title for case in cases]


@pytest.mark.parametrize("case", CASES, ids=titles(CASES))
def test_the_gradient_is_what_finite_differences_say(case: Case) -> None:
    upstream = upstream_for(case)
    grads = Gradient(case, dynamic=True)(case.inputs, upstream)
    for got, expected in zip(grads, finite_differences(case, upstream), strict=True):
        assert_close(got, expected, case.tolerance)


@pytest.mark.parametrize("case", BATCHED, ids=titles(BATCHED))
def test_one_gradient_graph_serves_every_batch_size(case: Case) -> None:
    graph = Gradient(case, dynamic=True)
    rng = np.random.default_rng(3)
    whole = [
        x if x is None or i not in case.batch else rng.permutation(np.repeat(x, 8, 0))[:8]
        for i, x in enumerate(case.inputs)
    ]
    upstream = upstream_for(replace(case, inputs=tuple(whole)))
    at_once = graph(whole, upstream)
    for step in (1, 3):
        parts = []
        for low in range(0, 8, step):
            rows = slice(low, low + step)
            inputs = [x if i not in case.batch else x[rows] for i, x in enumerate(whole)]
            parts.append(graph(inputs, {i: g[rows] for i, g in upstream.items()}))
        for index, (got, *pieces) in zip(case.wrt, zip(at_once, *parts, strict=True), strict=True):
            joined = np.concatenate(pieces) if index in case.batch else np.sum(pieces, axis=0)
            assert_close(got, joined, 1e-5)


@pytest.mark.parametrize("case", BATCHED, ids=titles(BATCHED))
def test_a_fixed_batch_gives_the_same_gradient(case: Case) -> None:
    upstream = upstream_for(case)
    dynamic = Gradient(case, dynamic=True)(case.inputs, upstream)
    fixed = Gradient(case, dynamic=False)(case.inputs, upstream)
    for a, b in zip(dynamic, fixed, strict=True):
        assert_close(a, b, 1e-5)


@pytest.mark.parametrize("case", CASES, ids=titles(CASES))
def test_the_newest_opset_gives_the_same_gradient(case: Case) -> None:
    upstream = upstream_for(case)
    floor = Gradient(case, dynamic=True)(case.inputs, upstream)
    newest = Gradient(replace(case, opset=OPSET_CEILING), dynamic=True)(case.inputs, upstream)
    for a, b in zip(newest, floor, strict=True):
        assert_close(a, b, 1e-6)


def test_every_rule_has_two_settings_for_each_differentiable_input() -> None:
    settings: dict[tuple[str, int], set[str]] = defaultdict(set)
    for case in CASES:
        for index in case.wrt:
            settings[case.op, index].add(case.setting)
        for covered in case.covers:
            settings[covered].add(case.setting)
    lacking = [
        (op, index)
        for op in (*RULES, *(op for op in REWRITES if "." not in op))
        for index in differentiable(op)
        if len(settings[op, index]) < 2
    ]
    assert not lacking, f"add cases to grad_cases.py for {lacking}"


OF_REWRITTEN = {
    "AffineGrid": frozenset({1}), "GRU": frozenset({4}), "LSTM": frozenset({4}),
    "RNN": frozenset({4}),
}  # fmt: skip
"""Lengths and sizes among the inputs of operators that are rewritten."""


def differentiable(op: str) -> list[int]:
    """Return the inputs that carry a gradient, by the operator's schema and our own list."""
    skipped = NO_GRADIENT.get(op, frozenset()) | OF_REWRITTEN.get(op, frozenset())
    return [i for i in range(len(defs.get_schema(op, OPSET_CEILING).inputs)) if i not in skipped]


SEVERAL = [case for case in CASES if len(case.wrt) > 1]


@pytest.mark.parametrize("case", SEVERAL, ids=titles(SEVERAL))
def test_freezing_an_input_changes_no_other_gradient(case: Case) -> None:
    upstream = upstream_for(case)
    together = Gradient(case, dynamic=True)
    grads = together(case.inputs, upstream)
    for index, joint in zip(case.wrt, grads, strict=True):
        alone = Gradient(replace(case, wrt=(index,)), dynamic=True)
        assert len(alone.emit.nodes) <= len(together.emit.nodes)
        assert_close(alone(case.inputs, upstream)[0], joint, 1e-6)
