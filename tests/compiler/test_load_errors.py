# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from forward_models import Net, Steps, blobs, cnn, evaluate, mlp, predict
from onnx import TensorProto, helper, numpy_helper

from coordinator.compiler import build
from edge_sdk.errors import CompileError


def refuse(model: Any, message: str, **options: Any) -> None:
    with pytest.raises(CompileError, match=message) as caught:
        build(model, **{"loss": "cross_entropy", **options})
    assert "\n" not in str(caught.value)


def test_bytes_and_files_that_are_no_model_are_refused(tmp_path: Path) -> None:
    refuse(b"not a model", "these bytes")
    refuse(b"", "these bytes")
    refuse(tmp_path / "absent.onnx", r"absent\.onnx")
    refuse("model.tflite", r"model\.tflite")


def test_weights_outside_the_file_are_refused_and_never_read(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(
        mlp(), path, save_as_external_data=True, location="w.bin", size_threshold=0,
        all_tensors_to_one_file=True,
    )  # fmt: skip
    refuse(path, r"'body\.weight' lies outside it.*one file")
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        tensor.external_data[0].value = "/etc/hostname"
    refuse(model.SerializeToString(), "lies outside it")


def test_operator_sets_before_11_are_refused() -> None:
    refuse(mlp(opset=9), "opset 11 or newer, got 9")


def test_unknown_losses_and_engines_are_refused() -> None:
    refuse(mlp(), r"bce_logits, cross_entropy, mse, got 'hinge'", loss="hinge")
    refuse(mlp(), r"engines out of 'onnx' and 'tflite'", engines=("abacus",))


def test_cross_entropy_wants_classes() -> None:
    refuse(mlp(o=1), r"\[N, C\].*bce_logits")
    net = Net(("N", 1, 8, 8)).conv("conv", 1, 4, 3)
    refuse(net.model(), r"shape \[N, C\].*Flatten")


def test_two_inputs_or_outputs_are_refused() -> None:
    model = mlp()
    model.graph.output.append(helper.make_tensor_value_info("relu_1", TensorProto.FLOAT, None))
    refuse(model, r"one output, got \['output', 'relu_1'\]")
    net = Net(("N", 6)).add("Add", "other").dense("head", 6, 3)
    model = net.model()
    model.graph.input.append(helper.make_tensor_value_info("other", TensorProto.FLOAT, ["N", 6]))
    refuse(model, r"one input, got \['input', 'other'\]")


def test_open_sizes_besides_the_batch_are_refused() -> None:
    net = Net(("N", 1, "H", 8)).conv("conv", 1, 4, 3).add("GlobalAveragePool").add("Flatten")
    refuse(net.model(), "dimension 2 of 'input' is H")
    refuse(Net(()).add("Relu").model(), "has no dimensions")


def test_infinite_weights_are_refused_by_name() -> None:
    net = Net(("N", 6)).dense("head", 6, 3)
    net.weights["head.bias"][1] = np.nan
    refuse(net.model(), r"finite numbers in 'head\.bias'")


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("opset", [11, 17, 18])
def test_a_batch_fixed_by_the_export_becomes_free(batch: int, opset: int) -> None:
    x, y = blobs((1, 8, 8), 4)
    fixed = build(cnn(batch=batch, opset=opset), loss="cross_entropy", name="n")
    free = build(cnn(opset=opset), loss="cross_entropy", name="n")
    assert fixed.manifest["input"]["shape"] == [None, 1, 8, 8]
    assert fixed.manifest["output"]["shape"] == [None, 4]
    np.testing.assert_array_equal(
        *(predict(b.member("onnx/predict.onnx"), x) for b in (fixed, free))
    )
    assert Steps(fixed).step(x, y) == Steps(free).step(x, y)


def reshaped(batch: int, first: list[int], second: list[int]) -> onnx.ModelProto:
    net = Net((batch, 1, 8, 8)).conv("conv", 1, 4, 3, strides=[2, 2]).add("Relu")
    net.weights["first"], net.weights["second"] = np.array(first), np.array(second)
    net.add("Reshape", "first").add("MatMul", net.weight("mix", 9, 9)).add("Reshape", "second")
    return net.dense("head", 36, 3).model()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([1, 4, 9], [1, 36]),
        ([1, 4, -1], [1, -1]),
        ([4, 9], [1, 36]),
        ([-1, 9], [1, 36]),
        ([1, 1, 4, 9], [-1, 36]),
        ([0, 4, 9], [0, -1]),
        ([4, -1], [1, 36]),
    ],
)
def test_reshapes_that_spell_the_batch_out_are_freed(first: list[int], second: list[int]) -> None:
    x, y = blobs((1, 8, 8), 3)
    model = reshaped(1, first, second)
    bundle = build(model, loss="cross_entropy")
    rows = [predict(model.SerializeToString(), row[None]) for row in x[:5]]
    np.testing.assert_allclose(
        predict(bundle.member("onnx/predict.onnx"), x[:5]), np.concatenate(rows), atol=1e-5
    )
    run = Steps(bundle)
    losses = [run.step(x, y) for _ in range(10)]
    assert losses[-1] < losses[0]


def test_a_reshape_that_tears_the_batch_apart_is_refused_by_name() -> None:
    net = Net((1, 1, 8, 8)).conv("conv", 1, 4, 3, strides=[2, 2]).add("Relu")
    net.add("Transpose", perm=[1, 0, 2, 3])
    net.weights["first"], net.weights["second"] = np.array([3, 12]), np.array([1, 36])
    net.add("Reshape", "first").add("Reshape", "second").dense("head", 36, 3)
    refuse(net.model(), r"keeps the batch, node 'reshape_3\.node' makes .*\[3, 12\].*dynamic")


def test_a_model_that_mixes_its_batch_is_refused() -> None:
    net = Net(("N", 6)).dense("body", 6, 3)
    net.weights["axes"] = np.array([0])
    refuse(net.add("Softmax", axis=0).model(), "on that example alone")
    squeezed = Net((1, 6)).dense("body", 6, 3).add("Squeeze").add("Unsqueeze", "axes")
    squeezed.weights["axes"] = np.array([0])
    refuse(squeezed.model(), r"any batch|batch, \.\.\.")


def test_a_constant_as_large_as_the_batch_is_refused_by_its_node() -> None:
    net = Net((1, 6)).dense("body", 6, 8)
    net.weights["state"] = np.zeros((1, 8), np.float32)
    net.add("Concat", "state", axis=1).dense("head", 16, 3)
    refuse(net.model(), r"runs on a batch of 3: Concat node 'concat_1\.node' fails; export it with")


def test_an_old_softmax_of_known_rank_is_still_left_to_the_loss() -> None:
    net = Net(("N", 6), opset=11).dense("head", 6, 3)
    net.add("Shape")
    net.last = "gemm_0"
    net.add("Reshape", "shape_1").add("Softmax", axis=1)
    x, y = blobs((6,), 3)
    plain = Net(("N", 6)).dense("head", 6, 3).model()
    runs = [Steps(build(m, loss="cross_entropy")) for m in (net.model(), plain)]
    assert runs[0].step(x, y) == pytest.approx(runs[1].step(x, y), rel=1e-6)


def test_initializers_listed_as_inputs_are_weights() -> None:
    model = mlp()
    for tensor in model.graph.initializer:
        value = helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        model.graph.input.append(value)
    assert len(build(model, loss="mse").shapes) == 4


def test_weights_stored_as_lists_of_floats_are_found_in_the_bytes() -> None:
    model = mlp()
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        tensor.CopyFrom(helper.make_tensor(tensor.name, 1, array.shape, array.ravel().tolist()))
        assert not tensor.raw_data
    bundle = build(model, loss="mse")
    data = bundle.member("onnx/predict.onnx")
    patches = bundle.manifest["patches"]["onnx"]
    for patch, value in zip(patches, bundle.params().values(), strict=True):
        at = patch["offset"]
        assert data[at : at + value.nbytes] == value.tobytes()


def test_local_functions_are_inlined() -> None:
    model = mlp()
    domain = "local"
    body = [helper.make_node("Relu", ["a"], ["b"])]
    imports = [helper.make_opsetid("", 18)]
    model.functions.append(helper.make_function(domain, "Act", ["a"], ["b"], body, imports))
    model.opset_import.append(helper.make_opsetid(domain, 1))
    relu = next(n for n in model.graph.node if n.op_type == "Relu")
    relu.op_type, relu.domain = "Act", domain
    x, y = blobs((6,), 3)
    assert Steps(build(model, loss="cross_entropy")).step(x, y) == pytest.approx(
        Steps(build(mlp(), loss="cross_entropy")).step(x, y)
    )


def test_dropout_of_an_inference_export_is_identity() -> None:
    net = Net(("N", 6)).dense("body", 6, 8).add("Dropout").dense("head", 8, 3)
    plain = Net(("N", 6)).dense("body", 6, 8).dense("head", 8, 3)
    x, y = blobs((6,), 3)
    a, b = (build(m.model(), loss="cross_entropy") for m in (net, plain))
    assert [Steps(a).step(x, y)] == [Steps(b).step(x, y)]
    assert evaluate(a, x, y)["correct"] == evaluate(b, x, y)["correct"]
