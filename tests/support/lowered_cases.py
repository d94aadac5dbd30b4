# SPDX-License-Identifier: Apache-2.0
"""The cases of the gradient rules as graphs to lower: an operator and its gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime as ort
from check_grads import Case, emit_forward

from coordinator.compiler.emit import Emit
from coordinator.compiler.graph import Graph
from coordinator.compiler.passes import simplify
from coordinator.compiler.rewrite import REWRITES, rewritten
from coordinator.compiler.tflite.gradients import TFLITE_RULES
from coordinator.compiler.vjp import RULES, SeveralRule, backward


def graph_of(case: Case, rules: Mapping[str, SeveralRule] | None, *, dynamic: bool = True) -> Graph:
    """Return the operator's outputs and, with `rules`, its gradients, the batch left open."""
    e = Emit(opset=case.opset)
    names, outs = emit_forward(case, e, dynamic=dynamic, dtype=np.float32)
    if case.op in REWRITES:
        e = Emit(rewritten(e.graph(outputs=outs), [names[i] for i in case.wrt]))
    ends = [outs[i] for i in case.upstream]
    if rules is not None:
        seeds = {outs[i]: e.input(f"dy{i}", np.float32, e.shape(outs[i])) for i in case.upstream}
        ends += backward(e, seeds, [names[i] for i in case.wrt], rules).values()
    ends = [e.Identity(name) for name in ends]
    return simplify(e.graph(outputs=ends))


def by_onnxruntime(graph: Graph, feeds: Mapping[str, Any]) -> list[np.ndarray]:
    """Run a graph once."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    data = graph.to_model().SerializeToString()
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    wanted = {port.name: feeds[port.name] for port in session.get_inputs()}
    return list(session.run(None, wanted))


def expected(case: Case) -> tuple[Graph, dict[str, np.ndarray], list[np.ndarray]]:
    """Return the graph to lower, what to feed it, and what onnxruntime makes of it."""
    feeds = {
        f"x{i}": value
        for i, value in enumerate(case.inputs)
        if value is not None and i not in case.fixed
    }
    rng = np.random.default_rng(1)
    made = by_onnxruntime(graph_of(case, None), feeds)
    for i, output in zip(case.upstream, made, strict=True):
        feeds[f"dy{i}"] = rng.standard_normal(output.shape).astype(np.float32)
    wanted = by_onnxruntime(graph_of(case, RULES), feeds)
    graph = graph_of(case, TFLITE_RULES)
    used = {value.name for value in graph.inputs}
    return graph, {name: value for name, value in feeds.items() if name in used}, wanted
