# SPDX-License-Identifier: Apache-2.0
"""Check a gradient rule, emitted and run by stock onnxruntime, against finite differences."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import numpy as np
import onnxruntime as ort
from onnx.reference import ReferenceEvaluator

import coordinator.compiler.rewrites
import coordinator.compiler.rules  # noqa: F401 # importing them fills the tables
from coordinator.compiler.emit import Emit
from coordinator.compiler.passes import drop_unused
from coordinator.compiler.rewrite import REWRITES, rewritten
from coordinator.compiler.vjp import backward

Build = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """One operator with values for its inputs (None: absent).

    Attributes:
        wrt: the inputs to differentiate by.
        fixed: the inputs that are constants of the graph (axes, pads, statistics).
        batch: the inputs whose dimension 0 is the batch; it is left unknown in the graph.
        outputs: how many outputs to ask for, and which of them get an upstream gradient.
        eps: the step of the finite difference; a large one for operators that are linear.
        evaluator: "reference" (float64) or "ort" (float32).
        build: emits something else than the bare operator.
        meaning: the function to differentiate where it is not what the graph computes.
        covers: further operators that `build` brings to a test, with their inputs.
    """

    op: str
    inputs: tuple[np.ndarray | None, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    wrt: tuple[int, ...] = (0,)
    fixed: tuple[int, ...] = ()
    batch: tuple[int, ...] = ()
    outputs: int = 1
    upstream: tuple[int, ...] = (0,)
    eps: float = 1e-5
    evaluator: str = "reference"
    build: Build | None = None
    meaning: Build | None = None
    covers: tuple[tuple[str, int], ...] = ()
    tolerance: float = 1e-3
    opset: int = 18

    @property
    def title(self) -> str:
        """Return what pytest prints."""
        shapes = ",".join("-" if x is None else "x".join(map(str, x.shape)) for x in self.inputs)
        attributes = ",".join(f"{k}={v}" for k, v in self.attributes.items())
        return f"{self.op}({shapes};{attributes})".replace(" ", "")

    @property
    def setting(self) -> str:
        """Return what tells two attribute sets apart: attributes, constants, ranks and absences."""
        fixed = [
            None if x is None else (x.tolist() if i in self.fixed else x.shape)
            for i, x in enumerate(self.inputs)
        ]
        return f"{sorted(self.attributes.items())} {fixed} {self.outputs} {self.upstream}"


def emit_forward(case: Case, e: Emit, *, dynamic: bool, dtype: Any) -> tuple[list[str], list[str]]:
    """Emit the operator; return the names of its inputs and outputs."""
    names = []
    for index, value in enumerate(case.inputs):
        if value is None:
            names.append("")
            continue
        value = value.astype(dtype) if value.dtype == np.float32 else value  # noqa: PLW2901 # one name
        if index in case.fixed:
            names.append(e.const(value, value.dtype))
        else:
            lead = (None,) if dynamic and index in case.batch else value.shape[:1]
            names.append(e.input(f"x{index}", value.dtype, (*lead, *value.shape[1:])))
    if case.build is not None:
        made = case.build(e, *names)
        return names, [made] if isinstance(made, str) else list(made)
    return names, list(e.op(case.op, names, outputs=case.outputs, **case.attributes))


def session(e: Emit, outputs: Sequence[str]) -> ort.InferenceSession:
    """Load the emitted graph in stock onnxruntime, one thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    data = drop_unused(e.graph(outputs=outputs)).to_model().SerializeToString()
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


class Gradient:
    """The compiled gradient of a case: call it with values, get gradients."""

    def __init__(self, case: Case, *, dynamic: bool) -> None:
        self.case = case
        self.emit = e = Emit(opset=case.opset)
        names, outs = emit_forward(case, e, dynamic=dynamic, dtype=np.float32)
        if case.op in REWRITES:
            spelled = rewritten(e.graph(outputs=outs), [names[i] for i in case.wrt])
            self.emit = e = Emit(spelled)
        seeds = {}
        for index in case.upstream:
            known = e.shape(outs[index])
            assert known is not None, f"no rank known for the output of {case.title}"
            seeds[outs[index]] = e.input(f"dy{index}", np.float32, known)
        self.found = backward(e, seeds, [names[i] for i in case.wrt])
        self.session = session(e, list(self.found.values()))
        self.takes = {i.name for i in self.session.get_inputs()}

    def __call__(
        self, inputs: Sequence[np.ndarray | None], upstream: Mapping[int, np.ndarray]
    ) -> list[np.ndarray]:
        feeds = {f"x{i}": x for i, x in enumerate(inputs) if x is not None}
        feeds |= {f"dy{i}": g for i, g in upstream.items()}
        return list(self.session.run(None, {k: v for k, v in feeds.items() if k in self.takes}))


def forward(case: Case) -> Callable[[Sequence[np.ndarray | None]], list[np.ndarray]]:
    """Return the operator as a function: its meaning, or float64 reference, or onnxruntime."""
    if case.meaning is not None:
        meaning = case.meaning
        return lambda inputs: [np.asarray(meaning(*inputs))]
    exact = case.evaluator == "reference"
    e = Emit(opset=case.opset)
    _, outs = emit_forward(case, e, dynamic=False, dtype=np.float64 if exact else np.float32)
    if exact:
        evaluator: Any = ReferenceEvaluator(e.graph(outputs=outs).to_model())
    else:
        evaluator = session(e, outs)
    takes = {f"x{i}" for i, x in enumerate(case.inputs) if x is not None and i not in case.fixed}

    def run(inputs: Sequence[np.ndarray | None]) -> list[np.ndarray]:
        feeds = {f"x{i}": x for i, x in enumerate(inputs) if x is not None}
        return list(evaluator.run(None, {k: v for k, v in feeds.items() if k in takes}))

    return run


def finite_differences(case: Case, upstream: Mapping[int, np.ndarray]) -> list[np.ndarray]:
    """Differentiate sum(upstream * outputs) by each input of `wrt`, element by element."""
    run = forward(case)
    exact = case.evaluator == "reference" or case.meaning is not None
    dtype = np.float64 if exact else np.float32
    inputs = [
        x.astype(dtype) if x is not None and x.dtype == np.float32 else x for x in case.inputs
    ]

    def loss() -> float:
        outs = run(inputs)
        return sum(float(np.sum(g * outs[i], dtype=np.float64)) for i, g in upstream.items())

    grads = []
    for index in case.wrt:
        x = inputs[index]
        assert x is not None
        grad = np.zeros(x.shape)
        for at in np.ndindex(x.shape):
            kept = x[at]
            x[at] = kept + case.eps
            up = loss()
            x[at] = kept - case.eps
            grad[at] = (up - loss()) / (2 * case.eps)
            x[at] = kept
        grads.append(grad)
    return grads


def upstream_for(case: Case, seed: int = 7) -> dict[int, np.ndarray]:
    """Return a random upstream gradient, none of it small, for each output that gets one."""
    rng = np.random.default_rng(seed)
    e = Emit(opset=case.opset)
    _, outs = emit_forward(case, e, dynamic=False, dtype=np.float32)
    shapes = {i: e.static(outs[i]) for i in case.upstream}
    if None in shapes.values():  # a length that depends on values
        made = forward(case)(case.inputs)
        shapes = {i: made[i].shape for i in case.upstream}
    drawn = {i: rng.standard_normal(shape) for i, shape in shapes.items()}
    return {i: np.asarray(g + np.copysign(0.5, g), np.float32) for i, g in drawn.items()}


def assert_close(got: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    """Compare within `tolerance` of the largest entry."""
    assert got.shape == expected.shape, f"expected shape {expected.shape}, got {got.shape}"
    scale = max(1.0, float(np.abs(expected).max(initial=0.0)))
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * scale)
