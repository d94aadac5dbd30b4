# SPDX-License-Identifier: Apache-2.0
"""A .tflite file as the graph that the checks read: the one view of both formats. Pure.

Tensors that TFLite tells apart by index get names of their own: the first one of a name keeps it,
inputs and outputs before all others. What a graph stores are its constants, and the scales of its
quantized tensors, at their places in the file. Types are numbered as in ONNX.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from edge_sdk import tflitefile
from edge_sdk.errors import RefusedError
from edge_sdk.graphview import Attribute, GraphView, Operation, Port, Stored, shown
from edge_sdk.onnxschema import DTYPES
from edge_sdk.operators import TFLITE
from edge_sdk.tflitefile import Subgraph, Tensor, TfliteFile

DOMAIN = "tflite"
"""The domain that operators of such a graph have."""

_CODES = {name: code for code, (name, _, _) in DTYPES.items()} | {"string": 8}
_NOT_NUMBERS = {"resource", "variant"}
_PLAIN = "NONE"  # the fused activation that does nothing


def read(data: memoryview) -> GraphView:
    """Read a serialized model, of which an engine runs the first subgraph and no other.

    Raises: BundleError when it is damaged; RefusedError when signatures name what is no port.
    """
    file = tflitefile.read(data)
    subgraph = file.subgraphs[0]
    names = _names(subgraph)
    _check_signatures(file, names)
    stored = dict(_stored(file, subgraph, names))
    ports = [_port(names[i], tensor) for i, tensor in enumerate(subgraph.tensors)]
    outside = {*subgraph.inputs, *subgraph.outputs}
    return GraphView(
        opsets={},
        nodes=tuple(_node(operator, names) for operator in subgraph.operators),
        inputs=tuple(ports[i] for i in subgraph.inputs),
        outputs=tuple(ports[i] for i in subgraph.outputs),
        values=tuple(p for i, p in enumerate(ports) if i not in outside),
        initializers=stored,
        extras={
            **_unknown(file.subgraphs[1:]),
            "sparse tensor": sum(t.sparsity for t in subgraph.tensors),
            "quantization beyond scales": sum(bool(t.details) for t in subgraph.tensors),
        },
        metadata=frozenset(file.metadata),
        spare=len(file.subgraphs) - 1,
        state=frozenset(names[i] for i, t in enumerate(subgraph.tensors) if t.is_variable),
    )


def _unknown(others: Sequence[Subgraph]) -> dict[str, int]:
    """Count operators of other subgraphs that may not run: a runtime loads those as well."""
    found = Counter(o.op for subgraph in others for o in subgraph.operators)
    return {shown(op)[1:-1]: count for op, count in found.items() if op not in TFLITE}


def _names(subgraph: Subgraph) -> list[str]:
    """Name tensors by index, each differently."""
    found = [""] * len(subgraph.tensors)
    taken: set[str] = set()
    ports = dict.fromkeys((*subgraph.inputs, *subgraph.outputs))
    for i in dict.fromkeys((*ports, *range(len(found)))):
        name = subgraph.tensors[i].name
        while not name or name in taken:
            name = f"{name}#{i}"
        found[i] = name
        taken.add(name)
    return found


def _check_signatures(file: TfliteFile, names: list[str]) -> None:
    """Refuse signatures that give out more than the graph, or the same by another name."""
    subgraph = file.subgraphs[0]
    for key, signature in file.signatures.items():
        if signature.subgraph:
            continue  # a second subgraph is refused anyway
        sides = (
            ("input", signature.inputs, subgraph.inputs),
            ("output", signature.outputs, subgraph.outputs),
        )
        for side, named, ports in sides:
            for name, index in named.items():
                # a model's own signature may call its only output as it likes
                if index not in ports or (len(ports) > 1 and name != names[index]):
                    raise RefusedError(
                        f"signature {shown(key)}: expected {side} {shown(name)} to be the graph's "
                        "own of that name"
                    )


def _stored(file: TfliteFile, subgraph: Subgraph, names: list[str]) -> Iterator[tuple[str, Stored]]:
    made = {i for operator in subgraph.operators for i in operator.outputs}
    for i, tensor in enumerate(subgraph.tensors):
        buffer = file.buffers[tensor.buffer]
        is_made = i in made or i in subgraph.inputs
        # a constant without numbers needs no bytes: the shape that a scalar is reshaped to
        if buffer.size or (not tensor.elements and not is_made and not tensor.is_variable):
            yield names[i], _constant(names[i], tensor, file.data(tensor.buffer), buffer.offset)
    taken = set(names)
    for i, tensor in enumerate(subgraph.tensors):
        if tensor.scale_offset is not None:
            name = f"{names[i]}#scale"
            while name in taken:
                name += "#"
            taken.add(name)
            dims, at = (len(tensor.scale),), tensor.scale_offset
            data = file.content[at : at + tensor.scale.nbytes]
            yield name, Stored(name, _CODES["float32"], dims, data, at, {}, is_external=False)


def _constant(name: str, tensor: Tensor, data: memoryview, offset: int) -> Stored:
    code = _CODES.get(tensor.dtype, 0)
    return Stored(name, code, tensor.shape, data, offset, {}, is_external=False)


def _port(name: str, tensor: Tensor) -> Port:
    kind = tensor.dtype if tensor.dtype in _NOT_NUMBERS else "tensor"
    return Port(name, kind, _CODES.get(tensor.dtype, 0), tensor.signature_shape)


def _node(operator: tflitefile.Operator, names: list[str]) -> Operation:
    attributes = []
    for name, value in operator.options.items():
        if isinstance(value, int):
            attributes.append(Attribute(name, "int", int(value), ()))
        elif value != _PLAIN:
            kind = "ints" if isinstance(value, tuple) else "float"
            attributes.append(
                Attribute(name, "string" if isinstance(value, str) else kind, None, ())
            )
    inputs, outputs = (
        tuple("" if i == tflitefile.ABSENT else names[i] for i in side)
        for side in (operator.inputs, operator.outputs)
    )
    return Operation(
        op=operator.op,
        domain=DOMAIN,
        name="",
        inputs=inputs,
        outputs=outputs,
        attributes=tuple(attributes),
        overload="",
        is_placed=False,
    )
