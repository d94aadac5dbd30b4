# SPDX-License-Identifier: Apache-2.0
"""Every bundle that `build` makes passes the checks of the device that it is made for."""

from __future__ import annotations

from collections.abc import Callable

import onnx
import pytest
from forward_models import Net, blobs, cnn, mlp, quantized

from coordinator.compiler import adam, build, chain, clip, momentum, sgd
from coordinator.compiler.optim import Optimizer
from edge_sdk.operators import STANDARD

FLAT, IMAGES = blobs((6,), 3)[0], blobs((1, 8, 8), 4)[0]
OPTIMIZERS: dict[str, Optimizer] = {
    "sgd": sgd(lr=0.1),
    "momentum": momentum(0.9, lr=0.1),
    "nesterov": momentum(0.9, lr=0.1, nesterov=True),
    "adam": adam(lr=0.01),
    "clip": chain(clip(1.0), sgd(lr=0.1)),
    "clip momentum": chain(clip(0.3), momentum(0.9, lr=0.1)),
    "clip adam": chain(clip(2.5), adam(lr=0.01)),
    "clip clip": chain(clip(2.0), clip(1.0), sgd(lr=0.1)),
}
MODELS: dict[str, Callable[[], onnx.ModelProto]] = {
    "mlp": mlp,
    "mlp softmax": lambda: mlp(last="Softmax"),
    "mlp opset 11": lambda: mlp(opset=11),
    "mlp batch 1": lambda: mlp(batch=1),
    "cnn": cnn,
    "cnn smooth": lambda: cnn(smooth=True),
    "mlp int8": lambda: quantized(mlp(), FLAT),
    "cnn int8": lambda: quantized(cnn(), IMAGES),
    "cnn int8 per channel": lambda: quantized(cnn(), IMAGES, per_channel=True),
    "cnn uint8": lambda: quantized(cnn(), IMAGES, unsigned=True),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", MODELS)
def test_every_model_with_every_optimizer(model: str, optimizer: str) -> None:
    proto = MODELS[model]()
    both = ("onnx", "tflite")
    made = build(proto, loss="cross_entropy", optimizer=OPTIMIZERS[optimizer], engines=both)
    assert sorted(made.manifest["graphs"]) == [*both]
    made.check()


@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize("proximal", [False, True])
@pytest.mark.parametrize("loss", ["cross_entropy", "mse", "bce_logits"])
def test_every_loss_near_an_anchor_or_not(loss: str, proximal: bool, is_int8: bool) -> None:
    proto = quantized(mlp(), FLAT) if is_int8 else mlp()
    for optimizer in OPTIMIZERS.values():
        build(proto, loss=loss, optimizer=optimizer, proximal=proximal).check()


@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize("train", ["all", "bias", "last:1", "head.*", "conv1.weight"])
def test_every_selection(train: str, is_int8: bool) -> None:
    proto = quantized(cnn(), IMAGES) if is_int8 else cnn()
    for optimizer in (OPTIMIZERS["momentum"], OPTIMIZERS["clip adam"]):
        build(proto, loss="cross_entropy", train=train, optimizer=optimizer).check()


def test_a_single_trained_tensor_is_clipped_without_a_sum() -> None:
    made = build(mlp(), loss="cross_entropy", train="head.bias", optimizer=OPTIMIZERS["clip"])
    made.check()
    assert [p["name"] for p in made.manifest["params"]] == ["head.bias"]


def test_a_deep_model_of_many_operators() -> None:
    net = Net(("N", 3, 16, 16))
    net.conv("stem", 3, 8, 3, pads=[1, 1, 1, 1]).add("Clip")
    for i, act in enumerate(("Relu", "LeakyRelu", "Elu", "Sigmoid", "Tanh", "Softplus", "Mish")):
        net.conv(f"depth{i}", 8, 8, 3, pads=[1, 1, 1, 1], group=8)
        net.conv(f"point{i}", 8, 8, 1).add(act)
    net.add("GlobalAveragePool").add("Flatten").dense("head", 8, 5)
    build(net.model(), loss="cross_entropy", optimizer=OPTIMIZERS["clip momentum"]).check()


def test_all_that_has_a_gradient_is_allowed() -> None:
    from coordinator.compiler.vjp import RULES

    nested = {"If", "Loop", "Scan"}
    rules = {key for key in RULES if "." not in key} - nested
    assert rules <= STANDARD


def test_the_table_holds_operators_of_onnx_alone() -> None:
    known = {s.name for s in onnx.defs.get_all_schemas_with_history() if not s.domain}
    assert known >= STANDARD
    for word in ("Sequence", "String", "Optional", "Random", "Image"):
        assert not [op for op in STANDARD if word in op and op != "ReverseSequence"]
    assert STANDARD.isdisjoint({"If", "Loop", "Scan", "Bernoulli", "Multinomial"})


def test_the_check_of_large_graphs_copies_one_at_a_time_those_alone_that_share_bytes() -> None:
    import tracemalloc

    net = Net(("N", 1024))
    made = build(
        net.dense("body", 1024, 2048).add("Relu").dense("head", 2048, 4).model(),
        loss="cross_entropy",
        train="head.*",
    )
    assert 8 << 20 < len(made.data) < 9 << 20
    assert sorted(made.manifest["spliced"]) == ["onnx/evaluate.onnx", "onnx/train.onnx"]
    tracemalloc.start()
    made.check()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 9 << 20
