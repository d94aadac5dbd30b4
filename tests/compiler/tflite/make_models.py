# SPDX-License-Identifier: Apache-2.0
"""Makes the .tflite models of this folder from Keras, random weights: for developers, by hand.

    python3.11 -m venv /tmp/tf && /tmp/tf/bin/pip install tensorflow-cpu==2.21.0 tf-keras==2.21.0
    TF_USE_LEGACY_KERAS=1 /tmp/tf/bin/python tests/compiler/tflite/make_models.py [NAME ..]
    TF_USE_LEGACY_KERAS=1 /tmp/tf/bin/python tests/compiler/tflite/make_models.py --full DIR

The first command line is set-up, the second makes the small models that the tests check without
TensorFlow, the third the full-size networks, for tests/support/tflite_compare.py. The tests never
import this file.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")  # its LSTM converts to the fused operator
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf
from tensorflow import keras

layers: Any = keras.layers
HERE = Path(__file__).parent / "models"
SEED = 20261123
FLOAT_INT8 = ("float", "int8")

Make = Callable[[], Any]
MODELS: dict[str, tuple[Make, tuple[str, ...]]] = {}
FULL: dict[str, tuple[Make, tuple[str, ...]]] = {}


def model(*ways: str, table: dict[str, Any] = MODELS) -> Callable[[Make], Make]:
    """Register a function that makes a Keras model, and the ways to convert it."""

    def register(make: Make) -> Make:
        table[make.__name__] = (make, ways)
        return make

    return register


def net(shape: tuple[int, ...], build: Callable[[Any], Any], **kwargs: Any) -> Any:
    x = layers.Input(shape, **kwargs)
    return keras.Model(x, build(x))


# -- networks that people use, made narrow ------------------------------------------------------


@model("float", "int8", "dynamic")
def mobilenet_v1() -> Any:
    return keras.applications.MobileNet((40, 40, 3), alpha=0.125, weights=None, classes=5)


@model(*FLOAT_INT8)
def mobilenet_v2() -> Any:
    base = keras.applications.MobileNetV2((32, 32, 3), alpha=0.05, weights=None, include_top=False)
    x = base.get_layer("block_12_add").output
    return keras.Model(base.input, layers.Dense(5)(layers.GlobalAveragePooling2D()(x)))


@model(*FLOAT_INT8)
def mobilenet_v3_small() -> Any:
    base = keras.applications.MobileNetV3Small(
        (48, 48, 3), alpha=0.1, weights=None, include_top=False, include_preprocessing=False
    )
    x = next(n for n in reversed(base.layers) if n.output.shape[-1] < 64).output
    return keras.Model(base.input, layers.Dense(5)(layers.GlobalAveragePooling2D()(x)))


@model(*FLOAT_INT8)
def efficientnet_b0() -> Any:
    from tf_keras.src.applications.efficientnet import EfficientNet  # its general form

    base = EfficientNet(0.1, 0.1, 32, weights=None, include_top=False, input_shape=(32, 32, 3))
    return keras.Model(base.input, layers.Dense(5)(layers.GlobalAveragePooling2D()(base.output)))


@model("float", "int8", "dynamic", "float16")
def cnn_1d() -> Any:
    def build(x: Any) -> Any:
        x = layers.Conv1D(16, 5, padding="same", activation="relu")(x)
        x = layers.MaxPool1D(2)(x)
        x = layers.Conv1D(24, 3, strides=2, padding="same", activation="relu")(x)
        x = layers.Conv1D(24, 3, dilation_rate=2, padding="same", activation="relu")(x)
        x = layers.GlobalAveragePooling1D()(x)
        return layers.Dense(6, activation="softmax")(layers.Dense(16, activation="relu")(x))

    return net((64, 6), build)


@model(*FLOAT_INT8)
def cnn_2d() -> Any:
    """Odd sizes, SAME with strides, dilation, a depth multiplier, groups, L2 of the pooled."""

    def build(x: Any) -> Any:
        x = layers.Conv2D(8, (3, 2), strides=2, padding="same", activation="relu")(x)
        x = layers.ZeroPadding2D(((1, 2), (0, 1)))(x)
        x = layers.DepthwiseConv2D(3, strides=2, depth_multiplier=2, activation="relu6")(x)
        x = layers.Conv2D(16, 3, dilation_rate=2, padding="same")(x)
        x = layers.AveragePooling2D(2, padding="same")(layers.ReLU(6.0)(x))
        x = layers.MaxPool2D(2, strides=1, padding="same")(x)
        x = layers.Conv2D(12, 1, activation="relu")(x)
        return layers.Dense(4)(layers.Flatten()(x))

    return net((21, 18, 3), build)


@model("float", "dynamic")
def lstm() -> Any:
    return net(
        (20, 6),
        lambda x: layers.Dense(5)(layers.LSTM(12)(layers.LSTM(8, return_sequences=True)(x))),
    )


@model("float")
def lstm_short() -> Any:
    return net((8, 6), lambda x: layers.Dense(5)(layers.LSTM(12)(x)))


@model("int8")
def lstm_quantized() -> Any:
    return net((8, 6), lambda x: layers.Dense(5)(layers.LSTM(12)(x)))


@model("float")
def gru_loop() -> Any:
    return net((8, 6), lambda x: layers.Dense(5)(layers.GRU(8)(x)), batch_size=1)


@model(*FLOAT_INT8)
def gru_unrolled() -> Any:
    return net((5, 6), lambda x: layers.Dense(5)(layers.GRU(8, unroll=True)(x)))


# -- operators ----------------------------------------------------------------------------------


@model(*FLOAT_INT8)
def decoder() -> Any:
    def build(x: Any) -> Any:
        a = layers.Conv2D(8, 3, strides=2, padding="same", activation="relu")(x)
        b = layers.Conv2D(8, 3, strides=2, padding="same", activation="relu")(a)
        up = layers.Conv2DTranspose(8, 3, strides=2, padding="same", activation="relu")(b)
        a = layers.Concatenate()([a, up])
        wide = layers.UpSampling2D(2, interpolation="bilinear")(a)
        near = layers.UpSampling2D(2, interpolation="nearest")(a)
        odd = tf.image.resize(a, (13, 11), method="bilinear")
        odd = tf.image.resize(odd, (16, 16), method="nearest")
        x = layers.Conv2D(6, 3, padding="same")(layers.Add()([wide, near, odd]))
        x = layers.Conv2DTranspose(4, 2, strides=3, padding="valid")(x)
        x = tf.pad(x, [[0, 0], [1, 1], [2, 2], [0, 0]], mode="REFLECT")
        x = tf.pad(x, [[0, 0], [1, 0], [0, 1], [0, 0]], constant_values=0.5)
        return layers.Dense(4)(layers.GlobalAveragePooling2D()(x))

    return net((16, 16, 3), build)


@model(*FLOAT_INT8)
def activations() -> Any:
    def build(x: Any) -> Any:
        def conv(x: Any, name: str = "linear") -> Any:
            return layers.Conv2D(6, 3, padding="same", activation=name)(x)

        x = conv(layers.PReLU(shared_axes=[1, 2])(conv(x)))
        x = layers.LeakyReLU(0.2)(x)
        x = layers.ELU()(conv(x))
        x = tf.nn.relu6(conv(x) + 3.0) * conv(x) * (1 / 6)
        x = conv(x)
        x = x * tf.nn.relu6(x + 3.0) * 0.16666667
        x = conv(tf.nn.softmax(conv(x)))
        x = tf.minimum(tf.maximum(conv(x, "tanh"), -0.5), conv(x, "sigmoid"))
        x = layers.GlobalAveragePooling2D()(x) - 0.25
        return tf.nn.log_softmax(layers.Dense(4)(tf.nn.gelu(layers.Dense(8)(x))))

    return net((8, 8, 3), build)


@model(*FLOAT_INT8)
def arrangements() -> Any:
    def build(x: Any) -> Any:
        x = layers.Conv2D(8, 3, padding="same", activation="relu")(x)
        a, b = tf.split(x, 2, axis=3)
        c, d, _ = tf.split(x, [3, 4, 1], axis=3)
        x = tf.concat([a * 2.0, b, tf.tanh(c), d], axis=3)
        x = x[:, 1:-1, ::2, :]
        x = tf.transpose(x, [0, 2, 1, 3])
        x = tf.slice(x, [0, 0, 1, 0], [-1, -1, 4, -1])
        rows = tf.unstack(x, axis=1)
        x = tf.stack([rows[0] + rows[1], rows[2]], axis=1)
        x = tf.gather(x, [1, 0, 1], axis=1)
        x = tf.expand_dims(tf.reduce_max(x, axis=2), 1)
        x = tf.squeeze(tf.tile(x, [1, 2, 1, 1])[:, :1], axis=1)
        x = tf.concat([tf.reduce_sum(x, axis=1), tf.reduce_mean(x, axis=1)], axis=1)
        return layers.Dense(4)(x)

    return net((8, 8, 3), build)


@model(*FLOAT_INT8)
def attention() -> Any:
    def build(x: Any) -> Any:
        x = layers.Dense(16)(x)
        y = layers.LayerNormalization()(x)
        x = x + layers.MultiHeadAttention(2, 8)(y, y)
        x = x + layers.Dense(16)(
            layers.Dense(32, activation="gelu")(layers.LayerNormalization()(x))
        )
        return layers.Dense(4)(tf.reduce_mean(x, axis=1))

    return net((10, 6), build)


@model("float", "dynamic")
def text() -> Any:
    def build(x: Any) -> Any:
        x = layers.Embedding(50, 8)(x)
        x = layers.Conv1D(12, 3, activation="relu")(x)
        return layers.Dense(3)(layers.GlobalMaxPool1D()(x))

    return net((12,), build, dtype="int32")


@model("float")
def mathematics() -> Any:
    def build(x: Any) -> Any:
        x = layers.Dense(8)(x)
        x = tf.sqrt(tf.abs(x) + 0.1) + tf.exp(-tf.square(x)) + tf.sin(x) * tf.cos(x)
        x = tf.where(x > 0.5, tf.math.log(tf.abs(x) + 1.0), tf.pow(tf.abs(x), 1.5))
        x = x / (1.0 + tf.abs(x)) + tf.math.floordiv(x, 0.7) - tf.math.floormod(x, 0.3)
        x = x + tf.cumsum(tf.reverse(x, [1]), axis=1) + tf.round(x) + tf.floor(x) + tf.sign(x)
        x = tf.math.l2_normalize(layers.Dense(8)(x), axis=1) * tf.math.rsqrt(tf.abs(x) + 0.5)
        return layers.Dense(4)(x)

    return net((6,), build)


@model(*FLOAT_INT8)
def tied() -> Any:
    """Layers used twice, and two constants of the same numbers."""

    def build(x: Any) -> Any:
        dense = layers.Dense(8, activation="relu")
        x = dense(dense(x)) + 0.5
        y = dense(x) * tf.constant(np.linspace(0, 1, 8, dtype=np.float32))
        y = y + tf.constant(np.linspace(0, 1, 8, dtype=np.float32))
        return layers.Dense(3)(y)

    return net((8,), build)


@model("int16", "custom")
def refused() -> Any:
    def build(x: Any) -> Any:
        return layers.Dense(3)(layers.Dense(4, activation="relu")(x))

    return net((6,), build)


# -- full-size networks -------------------------------------------------------------------------


def application(name: str, **kwargs: Any) -> None:
    def make() -> Any:
        return getattr(keras.applications, name)(weights=None, **kwargs)

    FULL[name.lower()] = (make, ("float", "int8", "dynamic"))


application("MobileNet")
application("MobileNetV2")
application("MobileNetV3Small", input_shape=(224, 224, 3), include_preprocessing=False)
application("EfficientNetB0")


# -- converting ---------------------------------------------------------------------------------


def shake(net: Any, seed: int) -> None:
    """Set every weight to a seeded random number of a size that keeps activations alive."""
    rng = np.random.default_rng(seed)
    for layer in net.layers:
        for weight in layer.weights:
            shape, name = tuple(weight.shape), weight.name
            if "variance" in name:
                value = rng.uniform(0.6, 1.4, shape)
            elif "gamma" in name:
                value = rng.uniform(0.8, 1.2, shape)
            elif len(shape) < 2:
                value = rng.normal(0, 0.1, shape)
            else:
                value = rng.normal(0, np.sqrt(1.6 / max(np.prod(shape[:-1]), 1)), shape)
                if "depthwise" in name:
                    value = rng.normal(0, np.sqrt(1.6 / np.prod(shape[:2])), shape)
                if "alpha" in name or "embedding" in name:
                    value = rng.normal(0, 0.4, shape)
            weight.assign(value.astype(np.float32))


def examples(net: Any, seed: int) -> Iterator[list[Any]]:
    rng = np.random.default_rng(seed + 1)
    shape = (1, *net.inputs[0].shape[1:])
    for _ in range(40):
        yield [rng.standard_normal(shape).astype(np.float32)]


def convert(net: Any, way: str, seed: int) -> bytes:
    if any(isinstance(layer, layers.LSTM) for layer in net.layers):
        return convert_saved(net, way, seed)
    return finished(tf.lite.TFLiteConverter.from_keras_model(net), net, way, seed)


def convert_saved(net: Any, way: str, seed: int) -> bytes:
    """Convert by way of a saved model of a fixed batch, which keeps an LSTM in one piece."""
    spec = tf.TensorSpec((1, *net.inputs[0].shape[1:]))
    run = tf.function(net.call).get_concrete_function(spec)
    with tempfile.TemporaryDirectory() as folder:
        net.save(folder, save_format="tf", signatures=run)
        converter = tf.lite.TFLiteConverter.from_saved_model(folder)
        return finished(converter, net, way, seed)


def finished(converter: Any, net: Any, way: str, seed: int) -> bytes:
    """Set a converter to one of the ways and run it."""
    ops = tf.lite.OpsSet
    if way != "float":
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    if way in {"int8", "uint8", "int16"}:
        converter.representative_dataset = lambda: examples(net, seed)
        converter.target_spec.supported_ops = [ops.TFLITE_BUILTINS_INT8]
        converter.inference_input_type = converter.inference_output_type = tf.int8
    if way == "int16":
        wide = ops.EXPERIMENTAL_TFLITE_BUILTINS_ACTIVATIONS_INT16_WEIGHTS_INT8
        converter.target_spec.supported_ops = [wide]
        converter.inference_input_type = converter.inference_output_type = tf.int16
    if way == "flex":
        converter.optimizations = []
        converter.target_spec.supported_ops = [ops.TFLITE_BUILTINS, ops.SELECT_TF_OPS]
    if way == "float16":
        converter.target_spec.supported_types = [tf.float16]
    if way == "custom":
        return foreign(net)
    return bytes(converter.convert())


def foreign(net: Any) -> bytes:
    """Put an operator that is no builtin behind a network."""

    @tf.function(input_signature=[tf.TensorSpec((1, 6))])
    def run(x: Any) -> Any:
        return tf.raw_ops.Betainc(a=tf.abs(net(x)), b=tf.ones((1, 3)), x=tf.ones((1, 3)) / 2)

    converter = tf.lite.TFLiteConverter.from_concrete_functions([run.get_concrete_function()], net)
    converter.allow_custom_ops = True
    return bytes(converter.convert())


@model("flex")
def refused_flex() -> Any:
    def build(x: Any) -> Any:
        return layers.Dense(3)(tf.linalg.diag_part(tf.einsum("bi,bj->bij", x, x)))

    return net((6,), build)


def several_signatures(folder: Path) -> None:
    """Write a model of two signatures and one that keeps its weights in variables."""
    net = MODELS["tied"][0]()
    shake(net, SEED)

    class Module(tf.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net
            self.seen = tf.Variable(tf.zeros((8,)))

        @tf.function(input_signature=[tf.TensorSpec((1, 8))])
        def scores(self, x: Any) -> Any:
            return {"scores": self.net(x)}

        @tf.function(input_signature=[tf.TensorSpec((1, 8))])
        def classes(self, x: Any) -> Any:
            return {"classes": tf.nn.softmax(self.net(x) * 2.0)}

        @tf.function(input_signature=[tf.TensorSpec((1, 8))])
        def remember(self, x: Any) -> Any:
            self.seen.assign(self.seen + x[0])
            return {"scores": self.net(x + self.seen)}

    module = Module()
    for name, functions in {
        "signatures": {"scores": module.scores, "classes": module.classes},
        "variables": {"remember": module.remember},
    }.items():
        with tempfile.TemporaryDirectory() as saved:
            calls = {k: f.get_concrete_function() for k, f in functions.items()}
            tf.saved_model.save(module, saved, calls)
            converter = tf.lite.TFLiteConverter.from_saved_model(saved, signature_keys=[*calls])
            converter.experimental_enable_resource_variables = True
            (folder / f"{name}.tflite").write_bytes(converter.convert())


def main() -> None:
    """Make all models, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--full", type=Path, help="make the full-size networks in this folder")
    args = parser.parse_args()
    table, folder = (FULL, args.full) if args.full else (MODELS, HERE)
    folder.mkdir(parents=True, exist_ok=True)
    for name, (make, ways) in table.items():
        if args.names and name not in args.names:
            continue
        seed = SEED + zlib.crc32(name.encode()) % 1000
        keras.backend.clear_session()
        keras.utils.set_random_seed(seed)
        made = make()
        shake(made, seed)
        for way in ways:
            try:
                data = convert(made, way, seed)
            except Exception as error:  # noqa: BLE001  what the converter refuses is told, not hidden
                print(f"{name}_{way}: not converted: {str(error).strip().splitlines()[0][:150]}")  # noqa: T201  a script tells what it made
                continue
            (folder / f"{name}_{way}.tflite").write_bytes(data)
            print(f"{name}_{way}: {len(data)} bytes", flush=True)  # noqa: T201  a script tells what it made
    if not args.full and (not args.names or "signatures" in args.names):
        several_signatures(folder)


if __name__ == "__main__":
    main()
