# SPDX-License-Identifier: Apache-2.0
"""Whole models against LiteRT: those that make_models.py exported, and MLPerf Tiny's four."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from ai_edge_litert.interpreter import Interpreter
from forward_models import session
from onnx import numpy_helper
from tflite_compare import drawn, outputs
from tflite_models import Builder

from coordinator.compiler import Optimizer, adam, build, chain, clip, momentum
from coordinator.compiler.batch import free_batch
from coordinator.compiler.load import load
from coordinator.compiler.tflite.importer import Imported, import_model
from edge_sdk import Trainer
from edge_sdk.engine.ort import Ort
from edge_sdk.errors import CompileError
from edge_sdk.tflitefile import read

FOLDER = Path(__file__).parent / "models"
NAMES = sorted(path.stem for path in FOLDER.glob("*.tflite"))
REFUSED = {
    "gru_loop_float": "WHILE.*control flow",
    "lstm_quantized_int8": "UNIDIRECTIONAL_SEQUENCE_LSTM.*16 bits",
    "refused_custom": "CUSTOM:Betainc.*custom operator",
    "refused_flex_flex": "CUSTOM:Flex.*SELECT_TF_OPS",
    "refused_int16": "int16: convert with int8 activations",
    "variables": "CALL_ONCE.*state between calls",
}
AMPLIFIED = {  # share of exact outputs, largest difference: one near tie of an ADD grows on the way
    "attention_int8": (0.97, 1),
    "decoder_int8": (0.99, 1),
}
HYBRID = {"cnn_1d_dynamic": 2e-3, "mobilenet_v1_dynamic": 2e-3}
"""Their kernels round activations on the way, anew for each example; the graph does not."""


@cache
def imported(name: str) -> Imported:
    return import_model((FOLDER / f"{name}.tflite").read_bytes())


@pytest.mark.parametrize("name", [name for name in NAMES if name not in REFUSED])
def test_an_exported_model_says_what_litert_says(
    name: str, figure: Callable[[str, Any, str], None]
) -> None:
    made = outputs((FOLDER / f"{name}.tflite").read_bytes(), 100, imported(name))
    figure(f"{name}: exact, largest difference", (made.exact, made.largest), "1 LSB or 1e-4")
    if made.theirs.dtype.kind == "f":
        assert made.largest <= HYBRID.get(name, 1e-4)
        assert made.same_class >= 0.99
    else:
        least, most = AMPLIFIED.get(name, (1.0, 0))
        assert made.exact >= least
        assert made.largest <= most


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_imported_is_refused_by_name_and_with_what_to_do(name: str) -> None:
    with pytest.raises(ValueError, match=REFUSED[name]) as caught:
        import_model((FOLDER / f"{name}.tflite").read_bytes())
    assert "convert" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.shared
@pytest.mark.parametrize("name", ["kws_ref_model", "vww_96_int8"])
def test_mlperf_tiny_in_int8_is_bit_exact(
    name: str, shared: Path, figure: Callable[[str, Any, str], None]
) -> None:
    made = outputs((shared / "models" / f"{name}.tflite").read_bytes(), 1000)
    figure(f"{name}: share of exact outputs", made.exact, "1")
    assert made.exact == 1.0


@pytest.mark.shared
def test_resnet_in_int8_is_exact_but_for_near_ties(
    shared: Path, figure: Callable[[str, Any, str], None]
) -> None:
    made = outputs((shared / "models/pretrainedResnet_quant.tflite").read_bytes(), 1000)
    figure("resnet8 int8: exact, same class", (made.exact, made.same_class), ">= 0.95, 0.99")
    assert made.exact >= 0.95
    assert made.same_class >= 0.99


@pytest.mark.shared
def test_resnet_in_float_differs_by_rounding_alone(
    shared: Path, figure: Callable[[str, Any, str], None]
) -> None:
    made = outputs((shared / "models/pretrainedResnet.tflite").read_bytes(), 1000)
    figure("resnet8 float: largest difference", made.largest, "<= 1e-5")
    assert made.largest <= 1e-5


@pytest.mark.parametrize("name", [name for name in NAMES if name not in REFUSED])
def test_every_trained_tensor_is_one_of_the_file(name: str) -> None:
    file, made = read((FOLDER / f"{name}.tflite").read_bytes()), imported(name)
    stored = {t.name: t for t in made.proto.graph.initializer}
    graph = file.subgraphs[made.subgraph]
    for initializer, origin in made.origins.items():
        tensor = graph.tensors[origin.tensor]
        master = numpy_helper.to_array(stored[initializer])
        laid = master if origin.order is None else np.transpose(master, origin.order)
        here = laid.astype(np.dtype(tensor.dtype).newbyteorder("<"))
        assert here.tobytes() == bytes(file.data(tensor.buffer))
    for name_of_step, tensors in made.steps.items():
        step = float(numpy_helper.to_array(stored[name_of_step]).reshape(()))
        assert {float(graph.tensors[i].scale[0]) for i in tensors} == {step}


def test_a_signature_is_chosen_by_its_name() -> None:
    data = (FOLDER / "signatures.tflite").read_bytes()
    signatures = read(data).signatures
    made = {key: import_model(data, key) for key in signatures}
    assert {key: m.subgraph for key, m in made.items()} == {
        key: signature.subgraph for key, signature in signatures.items()
    }
    last = {key: m.proto.graph.node[-1].op_type for key, m in made.items()}
    assert last == {"classes": "Softmax", "scores": "Gemm"}
    with pytest.raises(CompileError, match=r"'classes', 'scores'.*got 'train'"):
        import_model(data, "train")


def test_a_file_of_a_fixed_batch_takes_any() -> None:
    b = Builder(0)
    x = b.tensor("x", (4, 6, 6, 2), "float32")
    flat = b.tensor("flat", (4, 72), "float32")
    shape = b.tensor("shape", (2,), "int32", [4, 72])
    b.op("RESHAPE", (x, shape), flat, "ReshapeOptions", 1, newShape=[4, 72])
    w = b.tensor("w", (3, 72), "float32", b.rng.normal(size=(3, 72)))
    bias = b.tensor("b", (3,), "float32", b.rng.normal(size=3))
    y = b.tensor("y", (4, 3), "float32")
    b.op("FULLY_CONNECTED", (flat, w, bias), y, "FullyConnectedOptions", 1)
    for tensor in b.graph.tensors:
        tensor.shapeSignature = None
    data = b.pack(x, y)
    runtime = Interpreter(model_content=data)
    runtime.allocate_tensors()
    given = drawn((4, 6, 6, 2), np.float32)
    runtime.set_tensor(runtime.get_input_details()[0]["index"], given)
    runtime.invoke()
    theirs = runtime.get_tensor(runtime.get_output_details()[0]["index"])
    runs = Ort(1).predictor(free_batch(load(import_model(data).proto)).SerializeToString())
    np.testing.assert_allclose(runs.run(given[:3]), theirs[:3], rtol=1e-5, atol=1e-5)


INTEGERS = [
    "efficientnet_b0_int8",
    "mobilenet_v1_int8",
    "mobilenet_v2_int8",
    "mobilenet_v3_small_int8",
]


@pytest.mark.parametrize("name", INTEGERS)
def test_convolutions_of_integers_run_on_integer_kernels(name: str, tmp_path: Path) -> None:
    proto = imported(name).proto
    wanted = [node.op_type for node in proto.graph.node].count("Conv")
    path = tmp_path / "optimized.onnx"
    session(proto.SerializeToString(), optimized_model_filepath=str(path))
    ran = [node.op_type for node in onnx.load(path).graph.node]
    assert ran.count("QLinearConv") == wanted
    assert not {"Conv", "FusedConv", "NhwcFusedConv"} & set(ran)


CONVOLUTIONS = {
    "mobilenet_v1_float", "mobilenet_v1_int8", "mobilenet_v2_float", "mobilenet_v2_int8",
    "mobilenet_v3_small_float", "mobilenet_v3_small_int8", "efficientnet_b0_float",
    "efficientnet_b0_int8", "activations_float", "activations_int8", "cnn_1d_int8",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(CONVOLUTIONS))
def test_images_are_turned_once_not_at_every_layer(name: str) -> None:
    proto = imported(name).proto
    assert [node.op_type for node in proto.graph.node].count("Transpose") == 1


LEARNING = [
    "arrangements_int8", "attention_float", "cnn_1d_dynamic", "cnn_1d_int8", "cnn_2d_int8",
    "gru_unrolled_int8", "lstm_short_float", "mobilenet_v2_int8", "text_float", "tied_int8",
]  # fmt: skip


@pytest.mark.parametrize("name", LEARNING)
def test_an_imported_model_learns_whole(name: str) -> None:
    falls(imported(name).proto, adam(lr=0.01))


@pytest.mark.parametrize("name", ["activations_int8", "decoder_int8"])
def test_saturating_activations_learn_too_only_slower(name: str) -> None:
    proto = imported(name).proto
    falls(proto, adam(lr=0.003), part=0.95, steps=60)


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "lr"),
    [("kws_ref_model", 0.02), ("vww_96_int8", 0.02), ("pretrainedResnet_quant", 0.0005)],
)
def test_mlperf_tiny_learns_whole(name: str, lr: float, shared: Path) -> None:
    data = (shared / "models" / f"{name}.tflite").read_bytes()
    optimizer = chain(clip(1.0), momentum(0.9, lr=lr))
    falls(import_model(data).proto, optimizer, steps=30)


def falls(proto: Any, optimizer: Optimizer, part: float = 0.5, steps: int = 40) -> None:
    """Train all weights on one batch: the loss falls to a part of what it was."""
    bundle = build(proto, loss="cross_entropy", train="all", optimizer=optimizer)
    source, classes = bundle.manifest["input"], bundle.manifest["output"]["shape"][-1]
    x = drawn((8, *source["shape"][1:]), source["dtype"])
    if source["scale"]:
        x = ((x.astype(np.float32) - source["zero_point"]) * source["scale"]).astype(np.float32)
    trainer = Trainer(bundle)
    losses = [trainer.step(x, np.arange(8) % classes) for _ in range(steps)]
    assert min(losses[-5:]) < losses[0] * part
