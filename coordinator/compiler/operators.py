# SPDX-License-Identifier: Apache-2.0
"""What becomes of every ONNX operator in training: the table, and the page generated from it.

    python -m coordinator.compiler.operators docs/reference/operators.md

Each operator of the standard domain up to the newest supported set is in exactly one class: a
gradient rule, zero gradient, rewritten before it is differentiated, or refused with a reason.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from onnx import defs

import coordinator.compiler.rewrites
import coordinator.compiler.rules  # noqa: F401  both fill their tables
from coordinator.compiler import qoperator
from coordinator.compiler.graph import OPSET_CEILING
from coordinator.compiler.load import OLDEST
from coordinator.compiler.rewrite import REWRITES
from coordinator.compiler.vjp import FLAT, NO_GRADIENT, RULES

_BOXES = "it reads boxes as a second input; a model that trains has one input"
_SEQUENCES = "its values are sequences or optionals of tensors, not tensors"
_STRINGS = "it works on strings"
_SPECTRA = "it transforms signals; put it before the first trained layer, or outside the model"
_LOSSES = "it is a loss; a bundle's loss is named in build(loss=..)"
_RENAMED = "ONNX withdrew it; the loader reads what took its place"

REFUSED: dict[str, str] = {
    "ConcatFromSequence": _SEQUENCES,
    "DFT": _SPECTRA,
    "DeformConv": "onnxruntime 1.22 has no CPU kernel for it",
    "Det": "its gradient needs a matrix inverse, which ONNX lacks",
    "ImageDecoder": "it reads encoded images, not numbers",
    "MaxRoiPool": _BOXES,
    "NegativeLogLikelihoodLoss": _LOSSES,
    "Optional": _SEQUENCES,
    "OptionalGetElement": _SEQUENCES,
    "OptionalHasElement": _SEQUENCES,
    "RegexFullMatch": _STRINGS,
    "RoiAlign": _BOXES,
    "STFT": _SPECTRA,
    "Scatter": _RENAMED,
    "SequenceAt": _SEQUENCES,
    "SequenceConstruct": _SEQUENCES,
    "SequenceEmpty": _SEQUENCES,
    "SequenceErase": _SEQUENCES,
    "SequenceInsert": _SEQUENCES,
    "SequenceLength": _SEQUENCES,
    "SequenceMap": _SEQUENCES,
    "SoftmaxCrossEntropyLoss": _LOSSES,
    "SplitToSequence": _SEQUENCES,
    "StringConcat": _STRINGS,
    "StringNormalizer": _STRINGS,
    "StringSplit": _STRINGS,
    "Unique": "the shape of its output depends on the data",
    "Upsample": _RENAMED,
}
"""Operators that a gradient cannot pass, with the reason; below trained layers most may stand."""

UNROLLED = ("If", "Loop", "Scan")
"""Spelled out by the loader where their course does not depend on the data."""

TO_QDQ = ("ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul")
"""Rewritten by the loader to QuantizeLinear and DequantizeLinear."""

NEWEST = ("Attention", "RMSNormalization", "RotaryEmbedding", "Swish")
"""Newer than the newest supported set: the loader spells them out as ONNX defines them."""

_PARTLY = {
    "AffineGrid": "sizes known",
    "BatchNormalization": "inference mode",
    "ConvInteger": "dynamic quantization",
    "GRU": "sequence length known, no clip",
    "GridSample": "linear and nearest",
    "GroupNormalization": "from opset 21 on",
    "If": "condition not from data",
    "LSTM": "sequence length known, no clip",
    "Loop": "number of turns not from data",
    "MatMulInteger": "dynamic quantization",
    "Mod": "fmod",
    "Pow": "by the base",
    "RNN": "sequence length known, no clip",
    "Resize": "scales or sizes known",
    "Scan": "length known",
    "Tile": "repeats known",
}

# What onnxruntime-training 1.19.2, the last, differentiates: probed operator by operator with a
# weight upstream, and the rest as named by the gradient builders in its library.
_PROBED = """
Abs Add AveragePool Clip Concat Conv ConvTranspose Cos Div Erf Exp Expand Flatten Gather Gemm
GlobalAveragePool Identity LeakyRelu Log LogSoftmax MatMul Max MaxPool Min Mul Neg Pad Pow
Reciprocal ReduceL2 ReduceLogSumExp ReduceMean ReduceSum Relu Reshape Resize Sigmoid Sin Slice
Softmax Split Sqrt Squeeze Sub Tanh Tile Transpose Unsqueeze Where com.microsoft.Gelu
"""
_NAMED = """
Cast Dropout GRU GatherElements GatherND LSTM LayerNormalization ScatterElements ScatterND
SoftmaxCrossEntropyLoss TopK Trilu com.microsoft.BiasGelu com.microsoft.FastGelu
com.microsoft.QuickGelu
"""


class Row(NamedTuple):
    """One operator: its class, and what there is to say of it."""

    operator: str
    kind: str  # "rule", "zero", "rewritten" or "refused"
    note: str


def standard() -> set[str]:
    """Return every operator of the standard domain up to the newest supported set."""
    schemas = defs.get_all_schemas_with_history()
    return {s.name for s in schemas if not s.domain and s.since_version <= OPSET_CEILING}


def classes(operator: str) -> list[str]:
    """Return the classes that an operator is in; it should be one."""
    rewritten = {*REWRITES, *UNROLLED, *TO_QDQ, *NEWEST, "Constant"}
    rewritten |= {f"com.microsoft.{op}" for op in qoperator.RULES if not defs.has(op)}
    tables = {"rule": RULES, "zero": FLAT, "rewritten": rewritten, "refused": REFUSED}
    return [name for name, table in tables.items() if operator in table]


def rows() -> Iterator[Row]:
    """Yield a row for each operator, those of the standard domain first."""
    extra = {op for op in (*RULES, *REWRITES) if "." in op}
    extra |= {f"com.microsoft.{op}" for op in qoperator.RULES if not defs.has(op)}
    for operator in (*sorted(standard() | set(NEWEST)), *sorted(extra)):
        for kind in classes(operator):
            yield Row(operator, kind, _note(operator, kind))


def _note(operator: str, kind: str) -> str:
    if kind == "refused":
        return REFUSED[operator]
    notes = [_PARTLY[operator]] if operator in _PARTLY else []
    skipped = NO_GRADIENT.get(operator, frozenset()) if kind == "rule" else frozenset()
    if skipped and defs.has(operator):
        inputs = defs.get_schema(operator, OPSET_CEILING).inputs
        notes.append("none by " + ", ".join(inputs[i].name for i in sorted(skipped)))
    return "; ".join(notes)


_MARKS = {"rule": "yes", "zero": "zero", "rewritten": "yes, rewritten", "refused": "no"}

_INTRODUCTION = """\
# Operators in training

Generated by `python -m coordinator.compiler.operators`; a test fails when it is stale.

Every operator of ONNX's standard domain in operator sets {oldest} to {newest}, some of later sets,
and some of onnxruntime's own: {rule} have a gradient rule, {rewritten} are rewritten to such as
have one, {zero} have a gradient of zero by definition. {refused} are refused, by the node's name
and with the reason, where a gradient would have to pass them. Below the first trained layer any
operator may stand that a device allows ([bundle checks](bundle-checks.md)). Weights may be stored,
in Constant nodes, or behind DequantizeLinear.

- **yes**: a rule, checked against finite differences and, for the main families, torch.
- **yes, rewritten**: spelled in simpler operators before it is differentiated.
- **zero**: indices, comparisons, roundings, windows: nothing flows back, and training goes on
  around it.
- onnxruntime-training is version 1.19.2, the last. *named*: its library names a gradient for the
  operator or for a training variant of it; not tried here.

| operator | by fedge | note | by onnxruntime-training |
| --- | --- | --- | --- |
"""


def page() -> str:
    """Return the reference page."""
    table = list(rows())
    count = {kind: sum(row.kind == kind for row in table) for kind in _MARKS}
    head = _INTRODUCTION.format(oldest=OLDEST, newest=OPSET_CEILING, **count)
    lines = [f"| {r.operator} | {_MARKS[r.kind]} | {r.note} | {_theirs(r)} |" for r in table]
    return head + "\n".join(lines) + "\n"


def _theirs(row: Row) -> str:
    if row.operator in _PROBED.split():
        return "yes"
    if row.operator in _NAMED.split():
        return "named"
    return "" if row.kind in {"zero", "refused"} else "no"


def main(arguments: list[str]) -> int:
    """Write the page to a path, or to standard output."""
    if arguments:
        Path(arguments[0]).write_text(page(), encoding="utf-8")
    else:
        sys.stdout.write(page())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
