# SPDX-License-Identifier: Apache-2.0
"""Activations computed again and nodes in another order: the same step in less memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from forward_models import Net, blobs, cnn, mlp, quantized

from coordinator.bench import memory, recipes
from coordinator.compiler import build, chain, clip, momentum, sgd
from coordinator.compiler.cli import build_main
from coordinator.compiler.emit import Emit
from coordinator.compiler.graph import Graph
from coordinator.compiler.lifetimes import schedule
from coordinator.compiler.order import frees_early, late_last
from coordinator.compiler.recompute import arranged, copied
from edge_sdk.bundle import Bundle
from edge_sdk.errors import EngineError
from edge_sdk.trainer import Trainer

Figure = Callable[[str, object, str], None]


def deep(last: int = 4) -> onnx.ModelProto:
    """Return ten convolutions, one past the other, of an image of 32 by 32."""
    net = Net(("N", 3, 32, 32)).conv("stem", 3, 8, 3, pads=[1, 1, 1, 1]).add("Relu")
    for i in range(8):
        net.conv(f"body{i}", 8, 8, 3, pads=[1, 1, 1, 1])
        net.add("Tanh" if i % 2 else "Relu")
    return net.add("GlobalAveragePool").add("Flatten").dense("head", 8, last).model()


def steps(bundle: Bundle, rows: int = 9) -> tuple[list[float], dict[str, Any]]:
    trainer = Trainer(bundle)
    x, y = recipes.examples(bundle, rows)
    return [trainer.step(x, y) for _ in range(3)], trainer.params()


MODELS: dict[str, Callable[[], onnx.ModelProto]] = {
    "mlp": mlp,
    "cnn": cnn,
    "deep": deep,
    "cnn int8": lambda: quantized(cnn(), blobs((1, 8, 8), 4)[0], per_channel=True),
}


@pytest.mark.parametrize("micro_batch", [None, 4])
@pytest.mark.parametrize("model", MODELS)
def test_the_step_is_the_same(model: str, micro_batch: int | None) -> None:
    proto = MODELS[model]()
    made = [
        build(
            proto,
            loss="cross_entropy",
            optimizer=chain(clip(1.0), momentum(0.9, lr=0.05)),
            micro_batch=micro_batch,
            recompute=again,
        )
        for again in (False, True)
    ]
    (losses, params), (others, rest) = map(steps, made)
    assert others == pytest.approx(losses, rel=1e-5)
    for name, value in params.items():
        np.testing.assert_allclose(rest[name], value, rtol=1e-4, atol=1e-6)
    made[1].check()


def test_the_cost_table_tells_what_it_saves_and_what_it_costs() -> None:
    kept, again = (
        build(deep(), loss="cross_entropy", recompute=way).manifest["cost"] for way in (False, True)
    )
    assert again["ram_train"]["32"] < kept["ram_train"]["32"]
    assert again["flops_step"] > kept["flops_step"]
    assert again["recomputed"] > 0
    assert "recomputed" not in kept


def test_a_chain_keeps_less_than_half_of_what_it_kept() -> None:
    e = Emit()
    e.input("x", np.float32, (None, 1024))
    e.input("y", np.float32, (None, 1024))
    made = ["x"]
    for _ in range(32):
        made.append(e.Tanh(made[-1]))
    g = e.Sub(made[-1], "y")
    for name in reversed(made[1:]):
        g = e.Mul(g, e.Sub(e.const(1.0), e.Mul(name, name)))
    total = e.ReduceSum(g, keepdims=0)
    loss = e.ReduceSum(e.Sub(made[-1], "y"), keepdims=0)
    graph = e.graph(outputs=[loss, total])
    plain, again = (arranged(graph, 16, again=way) for way in (False, True))
    assert schedule(again, 16).live_peak < schedule(plain, 16).live_peak / 2
    assert copied(again) > 20
    assert copied(plain) == 0
    assert same_results(graph, again, plain)


def same_results(*graphs: Graph) -> bool:
    rng = np.random.default_rng(0)
    feed = {name: rng.standard_normal((5, 1024)).astype(np.float32) for name in ("x", "y")}
    found = []
    for graph in graphs:
        session = onnxruntime.InferenceSession(graph.to_model().SerializeToString())
        found.append(session.run(None, feed))
    return all(np.allclose(a, b, rtol=1e-5) for a, b in zip(found[0], found[1], strict=True))


def test_the_runtime_does_not_merge_the_copies_back(tmp_path: Path) -> None:
    bundle = build(deep(), loss="cross_entropy", recompute=True)
    operators = bundle.manifest["cost"]["train_operators"]
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    onnxruntime.InferenceSession(bundle.graph("onnx", "train"), options)
    kept = Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)
    forward = 1 + 8
    convolutions = sum(kept[op] for op in ("Conv", "FusedConv"))
    assert convolutions == operators["Conv"] > forward


def test_nothing_is_computed_again_where_that_saves_nothing() -> None:
    made = build(mlp(), loss="cross_entropy", train="last:1", recompute=True)
    assert "recomputed" not in made.manifest["cost"]


def test_an_order_keeps_nodes_and_results() -> None:
    e = Emit()
    e.input("x", np.float32, (None, 1024))
    e.input("y", np.float32, (None, 1024))
    a = e.Exp("x")
    b = e.Tanh(a)
    g = e.Sub(b, "y")
    outputs = [e.ReduceMean(e.Mul(e.Mul(g, e.Sign(b)), e.Sign(a))), e.ReduceMean(e.Mul(g, b))]
    graph = e.graph(outputs=outputs)
    for other in (late_last(graph, "y"), frees_early(graph, "y", 8)):
        assert sorted(n.outputs for n in other.nodes) == sorted(n.outputs for n in graph.nodes)
        assert schedule(other, 8).resident() <= schedule(graph, 8).resident()
        assert same_results(graph, other)


def test_masks_are_made_when_their_gradients_are_there() -> None:
    e = Emit()
    e.input("x", np.float32, (None, 1024))
    e.input("y", np.float32, (None, 1024))
    made = ["x"]
    for _ in range(8):
        made.append(e.Relu(e.Exp(made[-1])))
    g, sums = e.Sub(made[-1], "y"), list[str]()
    for name in reversed(made[1:]):
        sums.append(e.ReduceMean(e.Mul(name, g)))  # as a layer's gradient reads both
        g = e.Mul(g, e.HardSigmoid(name, alpha=1e30, beta=0.0))
    graph = e.graph(outputs=sums)
    other = late_last(graph, "y")
    assert schedule(other, 8).live_peak < 0.7 * schedule(graph, 8).live_peak


def test_it_is_deterministic() -> None:
    made = [build(deep(), loss="cross_entropy", recompute=True).data for _ in range(2)]
    assert made[0] == made[1]


def test_a_loss_that_is_not_finite_is_told_as_ever() -> None:
    trainer = Trainer(build(deep(), loss="cross_entropy", optimizer=sgd(lr=1.0), recompute=True))
    x = np.full((4, 3, 32, 32), np.nan, np.float32)
    with pytest.raises(EngineError, match="expected a finite loss"):
        trainer.step(x, np.zeros(4, np.int64))


def test_the_command_has_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(deep(), tmp_path / "m.onnx")
    args = [str(tmp_path / "m.onnx"), "-o", str(tmp_path / "m.fedge"), "--loss", "cross_entropy"]
    assert build_main([*args, "--recompute"]) == 0
    assert "operators computed again" in capsys.readouterr().out
    assert build_main([*args, "--no-recompute"]) == 0
    assert "operators computed again" not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("model", ["dscnn", "mobilenet"])
def test_it_saves_memory_that_the_kernel_counts(model: str, figure: Figure) -> None:
    grown = []
    for again in (False, True):
        bundle = build(
            recipes.model(model),
            loss="cross_entropy",
            optimizer=momentum(0.9, lr=0.001),
            recompute=again,
        )
        runtime, peak = memory.grown(bundle, 32)
        grown.append((peak - runtime) / (1 << 20))
    figure(f"{model}: MiB to train, kept and computed again", grown, "less")
    assert grown[1] < grown[0] - 2
