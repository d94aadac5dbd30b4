# SPDX-License-Identifier: Apache-2.0
"""A .tflite model by LiteRT and as it is imported, on the same random inputs.

    PYTHONPATH=. python tests/support/tflite_compare.py MODEL.tflite ..

prints the share of equal numbers, the largest difference, and how often the class is the same; a
last SOFTMAX is left off, as its int8 output says little of a thousand classes.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter

from coordinator.compiler.batch import free_batch
from coordinator.compiler.load import load
from coordinator.compiler.tflite.importer import Imported, import_model
from edge_sdk.engine.ort import Ort
from edge_sdk.tflitefile import read


class Outputs(NamedTuple):
    """What LiteRT and the imported model make of the same inputs."""

    theirs: Any
    ours: Any

    @property
    def exact(self) -> float:
        return float((self.theirs == self.ours).mean())

    @property
    def largest(self) -> float:
        return float(np.abs(self.theirs.astype(np.float64) - self.ours).max())

    @property
    def same_class(self) -> float:
        return float((self.theirs.argmax(1) == self.ours.argmax(1)).mean())


def outputs(model: bytes, rows: int, made: Imported | None = None) -> Outputs:
    """Run LiteRT row by row and the imported model on all rows at once."""
    runtime = Interpreter(model_content=model, num_threads=1)
    runtime.allocate_tensors()
    to, of = runtime.get_input_details()[0], runtime.get_output_details()[0]["index"]
    x = drawn((rows, *to["shape"][1:]), to["dtype"])
    theirs = []
    for row in x:
        runtime.reset_all_variables()
        runtime.set_tensor(to["index"], row[np.newaxis])
        runtime.invoke()
        theirs.append(runtime.get_tensor(of)[0])
    proto = free_batch(load((made or import_model(model)).proto))
    ours = Ort(1).predictor(proto.SerializeToString()).run(x)
    said = np.array(theirs)
    assert ours.shape == said.shape
    assert ours.dtype == said.dtype
    return Outputs(said, ours)


def drawn(shape: tuple[int, ...], dtype: Any) -> Any:
    rng = np.random.default_rng(0)
    if np.dtype(dtype).kind == "f":
        return rng.standard_normal(shape).astype(np.float32)
    if np.dtype(dtype).itemsize == 1:
        ends = np.iinfo(dtype)
        return rng.integers(ends.min, ends.max, shape, dtype, endpoint=True)
    return rng.integers(0, 50, shape).astype(dtype)


def without_softmax(model: bytes) -> bytes:
    """Return a model that ends before its last operator, if that is a SOFTMAX."""
    last = read(model).subgraphs[0].operators[-1]
    if last.op != "SOFTMAX":
        return model
    cut = schema.ModelT.InitFromPackedBuf(model, 0)
    cut.subgraphs[0].operators.pop()
    cut.subgraphs[0].outputs = [last.inputs[0]]
    cut.signatureDefs = None
    builder = flatbuffers.Builder(len(model))
    builder.Finish(cut.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def main() -> None:
    """Compare the models that are named."""
    for name in sys.argv[1:]:
        made = outputs(without_softmax(Path(name).read_bytes()), 20)
        told = f"{made.exact:.2%} equal, largest difference {made.largest:.3g}"
        print(f"{Path(name).stem}: {told}, same class {made.same_class:.0%}")  # noqa: T201  a script


if __name__ == "__main__":
    main()
