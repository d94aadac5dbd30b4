# SPDX-License-Identifier: Apache-2.0
"""A rank that is called certain is the one that LiteRT reckons, whatever the file says of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from ai_edge_litert.interpreter import Interpreter, OpResolverType
from forward_models import cnn, mlp
from tflite_bundles import Editable, lowered

from coordinator.compiler import adam, build, chain, clip, momentum
from edge_sdk import ranks, tflitefile, tflitegraph
from edge_sdk.graphview import GraphView, Operation, Port, Stored

MODELS = sorted((Path(__file__).parents[1] / "compiler/tflite/models").glob("*.tflite"))
IMAGES = lowered(
    build(cnn(), loss="cross_entropy", optimizer=chain(clip(0.5), momentum(0.9, lr=0.1)))
)
FLAT = lowered(build(mlp(), loss="mse", optimizer=chain(clip(0.5), adam(lr=0.1))))
WITHOUT_DELEGATES = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES


def runtime_ranks(data: bytes) -> dict[int, int] | None:
    """Run a graph on zeros; None where the runtime will not."""
    try:
        interpreter = Interpreter(
            model_content=data, experimental_op_resolver_type=WITHOUT_DELEGATES
        )
        interpreter.allocate_tensors()
        interpreter.invoke()
    except (RuntimeError, ValueError):
        return None
    return {d["index"]: len(d["shape"]) for d in interpreter.get_tensor_details()}


def compare(data: bytes, runtime: dict[int, int]) -> int:
    """Return how many ranks were certain, all of them right."""
    certain = ranks.of(tflitegraph.read(memoryview(data)))
    names = [t.name for t in tflitefile.read(data).subgraphs[0].tensors]
    known = {i: certain[n] for i, n in enumerate(names) if n in certain and i in runtime}
    assert known == {i: runtime[i] for i in known}
    return len(known)


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_ranks_of_models_that_tensorflow_s_converter_wrote(path: Path) -> None:
    data = path.read_bytes()
    runtime = runtime_ranks(data)
    if runtime is not None:
        assert compare(data, runtime) > 2


@pytest.mark.parametrize("role", ["train", "evaluate"])
@pytest.mark.parametrize("bundle", [IMAGES, FLAT], ids=["images", "flat"])
def test_ranks_of_training_graphs_are_all_certain(bundle: object, role: str) -> None:
    data = bundle.graph("tflite", role)  # type: ignore[attr-defined]
    runtime = runtime_ranks(data)
    assert runtime is not None
    count = len(tflitefile.read(data).subgraphs[0].tensors)
    assert compare(data, runtime) == min(count, len(runtime))

    lying = Editable(data)  # what the file says of inner tensors changes nothing
    ports = {*lying.graph.inputs, *lying.graph.outputs}
    for i, tensor in enumerate(lying.graph.tensors):
        if i not in ports and lying.model.buffers[tensor.buffer].data is None:
            tensor.shape, tensor.shapeSignature = [2, 2, 2], None
    assert compare(lying.done(), runtime) == min(count, len(runtime))


def graph(*nodes: Operation, **stored: Stored) -> GraphView:
    """Make a graph with inputs x of rank 2 and z of no known rank."""
    ports = (Port("x", "tensor", 1, (None, 3)), Port("z", "tensor", 1, None))
    return GraphView({}, nodes, ports, (), (), stored, {}, frozenset())


def node(op: str, *inputs: str, **options: int) -> Operation:
    from edge_sdk.graphview import Attribute

    told = tuple(Attribute(name, "int", value, ()) for name, value in options.items())
    return Operation(op, "tflite", "", inputs, ("y",), told, "", is_placed=False)


def ints(*values: int, dims: tuple[int, ...] | None = None) -> Stored:
    data = memoryview(b"".join(v.to_bytes(4, "little", signed=True) for v in values))
    shape = (len(values),) if dims is None else dims
    return Stored("", 6, shape, data, 0, {}, is_external=False)


@pytest.mark.parametrize(
    ("made", "rank"),
    [
        (node("NEG", "x"), 2),
        (node("NEG", "z"), None),
        (node("ADD", "x", "z"), None),
        (node("MYSTERY", "x"), None),
        (node("PACK", "x", "x"), 3),
        (node("UNPACK", "x"), 1),
        (node("UNPACK", "z"), None),
        (node("SUM", "x", "one"), 1),
        (node("SUM", "x", "twice"), None),
        (node("SUM", "x", "far"), None),
        (node("SUM", "x", "z"), None),
        (node("SUM", "x", "z", keep_dims=1), 2),
        (node("SUM", "x"), None),
        (node("RESHAPE", "x", "three"), 3),
        (node("RESHAPE", "x", "scalar"), None),
        (node("RESHAPE", "x", "z"), None),
        (node("RESHAPE", "x"), None),
        (node("GATHER", "x", "three"), 2),
        (node("GATHER", "x", "z"), None),
        (node("STRIDED_SLICE", "x", shrink_axis_mask=3), 0),
        (node("STRIDED_SLICE", "x", ellipsis_mask=1), None),
        (node("STRIDED_SLICE", "x", new_axis_mask=1), None),
        (node("SPLIT", "scalar", "x"), 2),
        (node("SPLIT", "scalar"), None),
        (node("FULLY_CONNECTED", "z", "x"), 2),
        (node("FULLY_CONNECTED", "x", "x", keep_num_dims=1), 2),
        (node("CONV_2D", "z", "z"), 4),
        (node("SHAPE", "x"), 1),
    ],
)
def test_rules(made: Operation, rank: int | None) -> None:
    stored = {
        "one": ints(-1), "twice": ints(0, -2), "far": ints(2), "three": ints(1, 2, 3),
        "scalar": ints(1, dims=()),
    }  # fmt: skip
    assert ranks.of(graph(made, **stored)).get("y") == rank


@pytest.mark.parametrize(
    ("made", "length"),
    [
        (node("SHAPE", "x"), 2),
        (node("RESHAPE", "x", "five"), 5),
        (node("RESHAPE", "x", "all"), None),
        (node("CONCATENATION", "three", "five"), 4),
        (node("PACK", "scalar", "scalar"), 2),
        (node("MUL", "three", "five"), 3),
        (node("MUL", "three", "two"), None),
        (node("CAST", "three"), 3),
        (node("NEG", "three"), None),
    ],
)
def test_a_vector_of_certain_length_says_a_rank(made: Operation, length: int | None) -> None:
    stored = {
        "five": ints(5), "all": ints(-1), "three": ints(1, 2, 3), "two": ints(1, 2),
        "scalar": ints(1, dims=()),
    }  # fmt: skip
    shaped = Operation("FILL", "tflite", "", ("y", "scalar"), ("w",), (), "", is_placed=False)
    assert ranks.of(graph(made, shaped, **stored)).get("w") == length
