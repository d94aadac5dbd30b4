# SPDX-License-Identifier: Apache-2.0
"""Small .tflite models of the tests' own, written with LiteRT's generated schema, and LiteRT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter

TYPES = {"float32": 0, "float16": 1, "int32": 2, "uint8": 3, "int8": 9, "bool": 6}
RELU = 1
PROBABILITIES = {"scale": (1 / 256,), "zero": -128}


class Builder:
    """A model under construction: tensors by their index, constants with a buffer each."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.model = schema.ModelT()
        self.model.version = 3
        self.model.buffers, self.model.operatorCodes = [schema.BufferT()], []
        self.graph = schema.SubGraphT()
        self.graph.name, self.graph.tensors, self.graph.operators = "main", [], []
        self.model.subgraphs = [self.graph]

    def tensor(
        self,
        name: str,
        shape: Sequence[int],
        dtype: str = "int8",
        data: Any = None,
        *,
        scale: Sequence[float] = (),
        zero: int = 0,
        axis: int = 0,
        buffer: int | None = None,
    ) -> int:
        """Add a tensor; one with `data` is a constant. The first dimension of others is free."""
        made = schema.TensorT()
        made.name, made.shape, made.type = name, list(shape), TYPES[dtype]
        made.buffer = 0
        if buffer is not None:
            made.buffer = buffer
        elif data is not None:
            stored = schema.BufferT()
            stored.data = list(np.ascontiguousarray(data, dtype).tobytes())
            made.buffer = len(self.model.buffers)
            self.model.buffers.append(stored)
        else:
            made.shapeSignature = [-1, *shape[1:]]
        if len(scale):
            made.quantization = schema.QuantizationParametersT()
            made.quantization.scale = [float(s) for s in scale]
            made.quantization.zeroPoint = [zero] * len(scale)
            made.quantization.quantizedDimension = axis
        self.graph.tensors.append(made)
        return len(self.graph.tensors) - 1

    def weight(self, name: str, shape: Sequence[int], axis: int | None = None) -> int:
        """Add int8 weights, with one scale or one for each index of an axis."""
        count = 1 if axis is None else shape[axis]
        scale = 0.01 * (1 + self.rng.random(count))
        data = self.rng.integers(-127, 128, shape)
        return self.tensor(name, shape, "int8", data, scale=scale, axis=axis or 0)

    def bias(self, name: str, x: int, weight: int) -> int:
        """Add an int32 bias on the scale that kernels demand."""
        scales = [self.graph.tensors[i].quantization.scale for i in (x, weight)]
        scale = np.float32(scales[0][0]) * np.asarray(scales[1], np.float32)
        size = self.graph.tensors[weight].shape
        length = size[-1] if len(size) == 4 and size[0] == 1 else size[0]
        return self.tensor(
            name, (length,), "int32", self.rng.integers(-200, 200, length), scale=scale
        )

    def op(
        self,
        name: str,
        inputs: Sequence[int],
        output: int,
        options: str = "",
        version: int = 3,
        **fields: Any,
    ) -> int:
        """Add an operator and return its output."""
        code = schema.OperatorCodeT()
        number = getattr(schema.BuiltinOperator, name)
        code.builtinCode, code.deprecatedBuiltinCode = number, min(number, 127)
        code.version = version
        self.model.operatorCodes.append(code)
        made = schema.OperatorT()
        made.opcodeIndex = len(self.model.operatorCodes) - 1
        made.inputs, made.outputs = list(inputs), [output]
        if options:
            made.builtinOptionsType = getattr(schema.BuiltinOptions, options)
            made.builtinOptions = getattr(schema, f"{options}T")()
            for field, value in fields.items():
                setattr(made.builtinOptions, field, value)
        self.graph.operators.append(made)
        return output

    def dense(
        self, x: int, size: int, scale: float, *, per_channel: bool = False, act: int = 0
    ) -> int:
        """Add an int8 FULLY_CONNECTED layer: tensors w0, b0 and y0, numbered on."""
        i = len(self.graph.operators)
        w = self.weight(
            f"w{i}", (size, self.graph.tensors[x].shape[-1]), 0 if per_channel else None
        )
        b = self.bias(f"b{i}", x, w)
        y = self.tensor(f"y{i}", (1, size), scale=(scale,), zero=-128 if act else 3)
        options = {"fusedActivationFunction": act}
        return self.op("FULLY_CONNECTED", (x, w, b), y, "FullyConnectedOptions", 4, **options)

    def conv(self, x: int, filters: int, scale: float) -> int:
        """Add a 3x3 CONV_2D with SAME padding and RELU, weights per channel."""
        i = len(self.graph.operators)
        shape = self.graph.tensors[x].shape
        w = self.weight(f"w{i}", (filters, 3, 3, shape[-1]), 0)
        b = self.bias(f"b{i}", x, w)
        y = self.tensor(f"y{i}", (*shape[:3], filters), scale=(scale,), zero=-128)
        options = {"padding": 0, "strideW": 1, "strideH": 1, "dilationWFactor": 1}
        options |= {"dilationHFactor": 1, "fusedActivationFunction": RELU}
        return self.op("CONV_2D", (x, w, b), y, "Conv2DOptions", 3, **options)

    def softmax(self, x: int) -> int:
        """Add a SOFTMAX with the scale that its kernel demands."""
        y = self.tensor("probabilities", self.graph.tensors[x].shape, **PROBABILITIES)
        return self.op("SOFTMAX", (x,), y, "SoftmaxOptions", 2, beta=1.0)

    def pack(self, x: int, y: int) -> bytes:
        """Return the file."""
        self.graph.inputs, self.graph.outputs = [x], [y]
        builder = flatbuffers.Builder(1024)
        builder.Finish(self.model.Pack(builder), b"TFL3")
        return bytes(builder.Output())


def dense_int8(*, per_channel: bool, seed: int = 0) -> bytes:
    """Two int8 layers and a softmax: [1, 8] to [1, 4]."""
    b = Builder(seed)
    x = b.tensor("x", (1, 8), scale=(0.02,), zero=-5)
    y = b.dense(x, 6, 0.05, per_channel=per_channel, act=RELU)
    return b.pack(x, b.softmax(b.dense(y, 4, 0.1, per_channel=per_channel)))


def branches_int8() -> bytes:
    """Two convolutions joined, pooled and flattened, all on one scale, then a dense layer."""
    b = Builder(1)
    x = b.tensor("x", (1, 8, 8, 1), scale=(0.02,), zero=0)
    stem = b.conv(x, 3, 0.05)
    left, right = b.conv(stem, 2, 0.1), b.conv(stem, 3, 0.1)
    joined = b.tensor("joined", (1, 8, 8, 5), scale=(0.1,), zero=-128)
    b.op("CONCATENATION", (left, right), joined, "ConcatenationOptions", 2, axis=3)
    pool = {"padding": 1, "strideW": 2, "strideH": 2, "filterWidth": 2, "filterHeight": 2}
    most = b.tensor("most", (1, 4, 4, 5), scale=(0.1,), zero=-128)
    b.op("MAX_POOL_2D", (joined,), most, "Pool2DOptions", 2, **pool)
    mean = b.tensor("mean", (1, 2, 2, 5), scale=(0.1,), zero=-128)
    b.op("AVERAGE_POOL_2D", (most,), mean, "Pool2DOptions", 2, **pool)
    flat = b.tensor("flat", (1, 20), scale=(0.1,), zero=-128)
    shape = b.tensor("shape", (2,), "int32", [-1, 20])
    b.op("RESHAPE", (mean, shape), flat, "ReshapeOptions", 1, newShape=[-1, 20])
    return b.pack(x, b.softmax(b.dense(flat, 4, 0.1)))


def twins_int8(*, tied_biases: bool = True) -> bytes:
    """Three int8 layers; the first two have equal weights and biases, stored once."""
    b = Builder(2)
    x = b.tensor("x", (1, 6), scale=(0.02,), zero=-5)
    first = b.dense(x, 6, 0.05, act=RELU)
    second = b.dense(first, 6, 0.08, act=RELU)
    tensors = {t.name: t for t in b.graph.tensors}
    tensors["w1"].buffer = tensors["w0"].buffer
    if tied_biases:
        tensors["b1"].buffer = tensors["b0"].buffer
    return b.pack(x, b.softmax(b.dense(second, 4, 0.1)))


def hybrid() -> bytes:
    """Two layers of int8 weights with float32 inputs, biases and outputs."""
    b = Builder(3)
    x = b.tensor("x", (1, 8), "float32")
    for i, size in enumerate((6, 4)):
        source = x if i == 0 else b.graph.operators[-1].outputs[0]
        w = b.weight(f"w{i}", (size, b.graph.tensors[source].shape[-1]))
        bias = b.tensor(f"b{i}", (size,), "float32", b.rng.normal(size=size))
        y = b.tensor(f"y{i}", (1, size), "float32")
        act = RELU if i == 0 else 0
        options = {"fusedActivationFunction": act}
        b.op("FULLY_CONNECTED", (source, w, bias), y, "FullyConnectedOptions", 3, **options)
    return b.pack(x, b.graph.operators[-1].outputs[0])


def dense_float() -> bytes:
    """Two float32 layers: [1, 8] to [1, 4]."""
    b = Builder(4)
    x = source = b.tensor("x", (1, 8), "float32")
    for i, size in enumerate((6, 4)):
        shape = (size, b.graph.tensors[source].shape[-1])
        w = b.tensor(f"w{i}", shape, "float32", b.rng.normal(size=shape))
        bias = b.tensor(f"b{i}", (size,), "float32", b.rng.normal(size=size))
        y = b.tensor(f"y{i}", (1, size), "float32")
        options = {"fusedActivationFunction": RELU if i == 0 else 0}
        source = b.op(
            "FULLY_CONNECTED", (source, w, bias), y, "FullyConnectedOptions", 1, **options
        )
    return b.pack(x, source)


def dense_float16() -> bytes:
    """Two layers of float16 weights, made float32 by DEQUANTIZE: [1, 8] to [1, 4]."""
    b = Builder(6)
    x = source = b.tensor("x", (1, 8), "float32")
    for i, size in enumerate((6, 4)):
        read = []
        for name, shape in (("w", (size, b.graph.tensors[source].shape[-1])), ("b", (size,))):
            half = b.tensor(f"{name}{i}", shape, "float16", b.rng.normal(size=shape))
            whole = b.tensor(f"{name}{i}.float32", shape, "float32")
            read.append(b.op("DEQUANTIZE", (half,), whole, "DequantizeOptions", 3))
        y = b.tensor(f"y{i}", (1, size), "float32")
        options = {"fusedActivationFunction": RELU if i == 0 else 0}
        inputs = (source, *read)
        source = b.op("FULLY_CONNECTED", inputs, y, "FullyConnectedOptions", 1, **options)
    return b.pack(x, source)


def dense_uint8() -> bytes:
    """Two layers in uint8 with zero points inside their ranges, as older converters made them."""
    b = Builder(5)
    x = y = b.tensor("x", (1, 8), "uint8", scale=(0.02,), zero=120)
    for i, (size, zero) in enumerate(((6, 0), (4, 128))):
        shape = (size, b.graph.tensors[y].shape[-1])
        data = b.rng.integers(0, 256, shape)
        w = b.tensor(f"w{i}", shape, "uint8", data, scale=(0.01,), zero=131 - 9 * i)
        bias = b.bias(f"b{i}", y, w)
        out = b.tensor(f"y{i}", (1, size), "uint8", scale=(0.05,), zero=zero)
        options = {"fusedActivationFunction": RELU if i == 0 else 0}
        y = b.op("FULLY_CONNECTED", (y, w, bias), out, "FullyConnectedOptions", 1, **options)
    made = b.tensor("probabilities", (1, 4), "uint8", scale=(1 / 256,), zero=0)
    return b.pack(x, b.op("SOFTMAX", (y,), made, "SoftmaxOptions", 1, beta=1.0))


def litert(model: bytes, x: Any) -> Any:
    """Return LiteRT's outputs for a batch, row by row, for the model's only output."""
    runtime = Interpreter(model_content=model, num_threads=1)
    runtime.allocate_tensors()
    to, of = runtime.get_input_details()[0]["index"], runtime.get_output_details()[0]["index"]
    rows = []
    for row in x:
        runtime.reset_all_variables()  # an LSTM would go on where the last row left it
        runtime.set_tensor(to, row[np.newaxis])
        runtime.invoke()
        rows.append(runtime.get_tensor(of)[0])
    return np.array(rows)
