# SPDX-License-Identifier: Apache-2.0
"""A step over slices of the batch is the step over the whole batch, in the memory of a slice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from forward_models import Net, blobs, cnn, mlp, quantized
from numpy.typing import NDArray

from coordinator.compiler import adam, build, chain, clip, momentum, sgd
from coordinator.compiler.choose import select
from coordinator.compiler.cli import build_main
from coordinator.compiler.graph import Graph, Value
from coordinator.compiler.lifetimes import schedule
from coordinator.compiler.losses import from_name
from coordinator.compiler.optim import Optimizer
from coordinator.compiler.train import open_weights, train_graph
from edge_sdk.bundle import Bundle
from edge_sdk.errors import CompileError
from edge_sdk.trainer import Trainer

OPTIMIZERS: dict[str, Optimizer] = {
    "sgd": sgd(lr=0.1),
    "momentum": momentum(0.9, lr=0.1),
    "clip adam": chain(clip(0.5), adam(lr=0.01)),
}
MODELS: dict[str, Callable[[], onnx.ModelProto]] = {
    "mlp": mlp,
    "cnn": cnn,
    "mlp int8": lambda: quantized(mlp(), blobs((6,), 3)[0]),
    "cnn int8": lambda: quantized(cnn(), blobs((1, 8, 8), 4)[0], per_channel=True),
}


def examples(bundle: Bundle, rows: int) -> tuple[NDArray[Any], NDArray[Any]]:
    rng = np.random.default_rng(rows)
    x = rng.standard_normal((rows, *bundle.manifest["input"]["shape"][1:])).astype(np.float32)
    if bundle.manifest["target"]["dtype"] == "int64":
        return x, rng.integers(0, bundle.manifest["output"]["shape"][-1], rows)
    return x, rng.random((rows, *bundle.manifest["target"]["shape"][1:])).astype(np.float32)


def assert_same_steps(whole: Bundle, sliced: Bundle, rows: int, **options: float) -> None:
    """Train both on the same batches, and compare losses and how far parameters moved."""
    trainers = [Trainer(whole), Trainer(sliced)]
    start = whole.params()
    for turn in range(3):
        x, y = examples(whole, rows + turn)
        a, b = (t.step(x, y, **options) for t in trainers)
        assert b == pytest.approx(a, rel=1e-5)
    a, b = (t.params() for t in trainers)
    for name, value in a.items():
        moved = np.abs(value - start[name]).max()
        assert moved > 0
        np.testing.assert_allclose(b[name], value, rtol=0, atol=2e-3 * moved + 1e-7)


@pytest.mark.parametrize("rows", [1, 2, 7, 12, 33])
@pytest.mark.parametrize("model", MODELS)
def test_any_number_of_rows_gives_the_step_of_the_whole_batch(model: str, rows: int) -> None:
    proto = MODELS[model]()
    whole, sliced = (
        build(proto, loss="cross_entropy", optimizer=OPTIMIZERS["momentum"], micro_batch=m)
        for m in (None, 4)
    )
    assert_same_steps(whole, sliced, rows)


@pytest.mark.parametrize("micro_batch", [1, 3, 100])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("loss", ["cross_entropy", "mse", "bce_logits"])
def test_every_loss_and_optimizer(loss: str, optimizer: str, micro_batch: int) -> None:
    whole, sliced = (
        build(mlp(), loss=loss, optimizer=OPTIMIZERS[optimizer], micro_batch=m)
        for m in (None, micro_batch)
    )
    assert_same_steps(whole, sliced, 10)


@pytest.mark.parametrize("train", ["bias", "last:1", "conv1.weight"])
def test_every_selection_with_an_anchor(train: str) -> None:
    whole, sliced = (
        build(cnn(), loss="cross_entropy", train=train, proximal=True, micro_batch=m)
        for m in (None, 3)
    )
    assert_same_steps(whole, sliced, 8, mu=0.1)


@pytest.mark.parametrize("model", ["mlp int8", "cnn int8"])
def test_ranges_are_learned_from_slices_too(model: str) -> None:
    whole, sliced = (
        build(MODELS[model](), loss="cross_entropy", ranges="learned", micro_batch=m)
        for m in (None, 5)
    )
    trainers = [Trainer(whole), Trainer(sliced)]
    x, y = examples(whole, 12)
    losses = [t.step(x, y) for t in trainers]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", MODELS)
def test_a_device_passes_it(model: str, optimizer: str) -> None:
    made = build(
        MODELS[model](), loss="cross_entropy", optimizer=OPTIMIZERS[optimizer], micro_batch=4
    )
    made.check()


def test_the_manifest_says_so_and_counts_what_runs_inside() -> None:
    whole, sliced = (build(cnn(), loss="cross_entropy", micro_batch=m) for m in (None, 4))
    cost = sliced.manifest["cost"]
    assert cost["micro_batch"] == 4
    assert "micro_batch" not in whole.manifest["cost"]
    assert cost["train_operators"]["Loop"] == 1
    assert cost["train_operators"]["Conv"] == whole.manifest["cost"]["train_operators"]["Conv"]
    assert cost["flops_step"] == pytest.approx(whole.manifest["cost"]["flops_step"], rel=0.1)
    assert "rows at a time" in str(sliced.explain())
    assert cost["ram_train"]["64"] < whole.manifest["cost"]["ram_train"]["64"]


@pytest.mark.parametrize("model", MODELS)
def test_every_size_is_known_inside_and_after_the_loop(model: str) -> None:
    made = build(
        MODELS[model](), loss="cross_entropy", optimizer=OPTIMIZERS["clip adam"], micro_batch=4
    )
    assert "unsized" not in made.manifest["cost"]


def test_it_is_deterministic() -> None:
    made = [build(cnn(), loss="cross_entropy", micro_batch=4).data for _ in range(2)]
    assert made[0] == made[1]


@pytest.mark.parametrize("rows", [0, -1, 2.0, True, 1 << 21])
def test_a_micro_batch_that_is_none_is_refused(rows: Any) -> None:
    with pytest.raises(CompileError, match="expected a micro_batch of 1 to"):
        build(mlp(), loss="cross_entropy", micro_batch=rows)


def test_the_command_has_it(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(mlp(), tmp_path / "m.onnx")
    said = build_main(
        [str(tmp_path / "m.onnx"), "-o", str(tmp_path / "m.fedge"), "--loss", "cross_entropy",
         "--micro-batch", "2"]
    )  # fmt: skip
    assert said == 0
    assert "rows at a time" in capsys.readouterr().out
    assert Bundle.load(tmp_path / "m.fedge").manifest["cost"]["micro_batch"] == 2


def test_a_longer_batch_takes_its_own_bytes_and_no_more() -> None:
    cost = build(cnn(), loss="cross_entropy", micro_batch=4).manifest["cost"]["ram_train"]
    example = 8 * 8 * 4 + 8
    assert cost["64"] - cost["32"] == 2 * 32 * example
    assert cost["32"] - cost["16"] == 2 * 16 * example


def planned(rows: int | None) -> Graph:
    """Return a training graph as the compiler has it: one gradient of 8 MiB."""
    net = Net(("N", 1024)).dense("body", 1024, 2048).add("Relu").dense("head", 2048, 4)
    forward = Graph.load(net.model())
    weights = select(forward, "all", forward.outputs[0].name)
    step, _ = train_graph(
        open_weights(forward, weights, forward.outputs[0].name),
        from_name("cross_entropy"),
        momentum(0.9, lr=0.1),
        target=Value("y", np.dtype(np.int64), (None,)),
        is_proximal=False,
        rows=rows,
    )
    return step


def test_two_sums_and_what_is_copied_out_stand_together() -> None:
    whole, sliced = planned(None), planned(2)
    peaks = [schedule(sliced, n).live_peak for n in (2, 4, 8, 64)]
    size = 4 * 1024 * 2048
    assert peaks[0] < peaks[1] == peaks[2] == peaks[3]
    assert 3 * size < peaks[2] < 3.2 * size
    assert peaks[2] - schedule(whole, 8).live_peak > 1.9 * size
