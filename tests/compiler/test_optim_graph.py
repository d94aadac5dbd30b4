# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pytest
from forward_models import Steps, Tensor, blobs, mlp, predict

from coordinator.compiler import adam, build, chain, clip, momentum, sgd
from coordinator.compiler.emit import Emit
from coordinator.compiler.graph import Graph
from edge_sdk.errors import CompileError

if TYPE_CHECKING:
    import onnx

    from coordinator.compiler import Optimizer
    from coordinator.compiler.graph import Node

X, LABELS = blobs((6,), 3)
Update = Callable[[Tensor, dict[str, Tensor], int], Tensor]


def momentum_of(decay: float, lr: float, *, nesterov: bool = False) -> Update:
    def update(g: Tensor, state: dict[str, Tensor], t: int) -> Tensor:
        state["v"] = decay * state.get("v", np.zeros_like(g)) + g
        ahead = g + decay * state["v"] if nesterov else state["v"]
        return lr * ahead

    return update


def adam_of(lr: float, b1: float, b2: float, eps: float) -> Update:
    def update(g: Tensor, state: dict[str, Tensor], t: int) -> Tensor:
        state["m"] = b1 * state.get("m", np.zeros_like(g)) + (1 - b1) * g
        state["v"] = b2 * state.get("v", np.zeros_like(g)) + (1 - b2) * g * g
        mean, square = state["m"] / (1 - b1**t), state["v"] / (1 - b2**t)
        return lr * mean / (np.sqrt(square) + eps)

    return update


def follow(optimizer: Optimizer, update: Update, norm: float = np.inf) -> None:
    """Take five steps in the graph and in double precision, side by side."""
    run = Steps(build(mlp(), loss="cross_entropy", optimizer=optimizer))
    values = {n: v.astype(np.float64) for n, v in run.params().items()}
    states: dict[str, dict[str, Tensor]] = {name: {} for name in values}
    for t in range(1, 6):
        grads = gradient(values)
        size = np.sqrt(sum(float(np.sum(g * g)) for g in grads.values()))
        run.step(X, LABELS)
        for name, g in grads.items():
            by = min(1.0, norm / size)
            values[name] = values[name] - update(g * by, states[name], t)
            np.testing.assert_allclose(run.params()[name], values[name], atol=2e-6, rtol=2e-5)


def gradient(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Differentiate the network by hand, in numpy."""
    hidden = X @ values["body.weight"].T + values["body.bias"]
    active = np.maximum(hidden, 0)
    logits = active @ values["head.weight"].T + values["head.bias"]
    p = np.exp(logits - logits.max(1, keepdims=True))
    g = (p / p.sum(1, keepdims=True) - np.eye(3)[LABELS]) / len(X)
    back = g @ values["head.weight"] * (hidden > 0)
    return {
        "body.weight": back.T @ X,
        "body.bias": back.sum(0),
        "head.weight": g.T @ active,
        "head.bias": g.sum(0),
    }


def test_sgd_follows_the_gradient() -> None:
    follow(sgd(lr=0.3), lambda g, _s, _t: 0.3 * g)


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_equals_its_definition(nesterov: bool) -> None:
    follow(momentum(0.9, lr=0.1, nesterov=nesterov), momentum_of(0.9, 0.1, nesterov=nesterov))


def test_adam_equals_its_definition() -> None:
    follow(adam(lr=0.02), adam_of(0.02, 0.9, 0.999, 1e-8))
    follow(adam(lr=0.02, b1=0.8, b2=0.99, eps=1e-3), adam_of(0.02, 0.8, 0.99, 1e-3))


@pytest.mark.parametrize("norm", [0.05, 100.0])
def test_clip_bounds_the_joint_norm_and_leaves_shorter_gradients(norm: float) -> None:
    follow(chain(clip(norm), sgd(lr=0.3)), lambda g, _s, _t: 0.3 * g, norm)
    follow(chain(clip(norm), momentum(0.9, lr=0.1)), momentum_of(0.9, 0.1), norm)


def test_clip_of_a_zero_gradient_is_zero() -> None:
    run = Steps(build(mlp(), loss="mse", train="head.bias", optimizer=chain(clip(1.0), sgd(lr=1))))
    run.step(X, predict(run.bundle.member("onnx/predict.onnx"), X))
    np.testing.assert_array_equal(run.params()["head.bias"], run.bundle.params()["head.bias"])


def test_the_learning_rate_is_an_input() -> None:
    run = Steps(build(mlp(), loss="cross_entropy", optimizer=sgd(lr=0.1)))
    run.step(X, LABELS, lr=0.0)
    for name, value in run.bundle.params().items():
        np.testing.assert_array_equal(run.params()[name], value)
    run.step(X, LABELS, lr=0.5)
    assert not np.array_equal(run.params()["head.weight"], run.bundle.params()["head.weight"])


def test_the_proximal_term_pulls_back_to_the_anchor() -> None:
    plain = Steps(build(mlp(), loss="cross_entropy", optimizer=sgd(lr=0.2)))
    near = Steps(build(mlp(), loss="cross_entropy", optimizer=sgd(lr=0.2), proximal=True))
    start = plain.bundle.params()
    plain.step(X, LABELS)
    near.step(X, LABELS, mu=0.7)  # at the anchor itself there is no pull
    for name in start:
        np.testing.assert_allclose(plain.params()[name], near.params()[name], atol=1e-7)
    before = plain.params()
    plain.step(X, LABELS)
    near.step(X, LABELS, mu=0.7)
    for name, base in start.items():
        pull = 0.2 * 0.7 * (before[name] - base)
        np.testing.assert_allclose(near.params()[name], plain.params()[name] - pull, atol=1e-6)


def test_a_proximal_bundle_at_mu_zero_trains_as_without() -> None:
    plain = Steps(build(mlp(), loss="cross_entropy", optimizer=momentum(0.9, lr=0.1)))
    near = Steps(build(mlp(), loss="cross_entropy", optimizer=momentum(0.9, lr=0.1), proximal=True))
    losses = [(plain.step(X, LABELS), near.step(X, LABELS, mu=0.0)) for _ in range(5)]
    np.testing.assert_allclose(*zip(*losses, strict=True), rtol=1e-6)
    assert near.bundle.manifest["proximal"] is True


def test_specs_spell_what_was_built() -> None:
    optimizer = chain(clip(1.0), momentum(0.9, lr=0.05))
    assert optimizer.spec == [["clip", 1.0], ["momentum", {"decay": 0.9, "lr": 0.05}]]
    manifest = build(mlp(), loss="mse", optimizer=optimizer).manifest
    assert manifest["optimizer"] == optimizer.spec
    assert manifest["lr"] == 0.05
    assert adam(lr=0.01).spec == [["adam", {"lr": 0.01, "b1": 0.9, "b2": 0.999, "eps": 1e-8}]]
    assert sgd(lr=0.01).spec == [["sgd", {"lr": 0.01}]]


def test_slots_name_their_parameter() -> None:
    manifest = build(mlp(), loss="mse", train="head.*", optimizer=adam(lr=0.01)).manifest
    assert [(s["name"], s["param"], s["shape"]) for s in manifest["slots"]] == [
        ("mean:head.weight", 0, [3, 8]),
        ("mean:head.bias", 1, [3]),
        ("square:head.weight", 0, [3, 8]),
        ("square:head.bias", 1, [3]),
        ("count", None, []),
    ]


@pytest.mark.parametrize(
    "make",
    [
        lambda: sgd(lr=0),
        lambda: sgd(lr=-1),
        lambda: sgd(lr=float("nan")),
        lambda: momentum(1.0, lr=0.1),
        lambda: momentum(-0.1, lr=0.1),
        lambda: adam(lr=0.1, b2=1.0),
        lambda: adam(lr=0.1, eps=0.0),
        lambda: clip(0),
        lambda: clip(float("inf")),
        chain,
        lambda: chain(clip(1.0)),
        lambda: chain(sgd(lr=0.1), clip(1.0)),
        lambda: chain(sgd(lr=0.1), sgd(lr=0.1)),
        lambda: build(mlp(), loss="mse", optimizer=clip(1.0)),
    ],
)
def test_settings_that_make_no_sense_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises(CompileError, match="expected"):
        make()


def maker(optimizer: Optimizer, made: str) -> Node:
    graph = Graph.load(build(mlp(), loss="mse", optimizer=optimizer).graph("onnx", "train"))
    return graph.producers[made]


def test_a_plain_step_of_a_dense_layer_is_the_product_that_adds_to_its_weight() -> None:
    node = maker(sgd(lr=0.1), "p.0.next")
    assert (node.kind, node.input(2)) == ("Gemm", "p.0")


def test_a_dense_layer_s_velocity_is_the_product_that_adds_to_the_old_one() -> None:
    node = maker(momentum(0.9, lr=0.1), "s.0.next")
    assert (node.kind, node.input(2)) == ("Gemm", "s.0")
    assert node.attr("beta") == pytest.approx(0.9)


def test_clipped_gradients_are_products_of_their_own() -> None:
    node = maker(chain(clip(1.0), sgd(lr=0.1)), "p.0.next")
    assert node.kind == "Sub"


def deep(layers: int) -> onnx.ModelProto:
    """Dense layers one after the other."""
    net = Emit()
    y = net.input("x", np.float32, (None, 4))
    rng = np.random.default_rng(0)
    for i in range(layers):
        weight = net.initializer(f"w{i}", rng.standard_normal((4, 4)).astype(np.float32))
        y = net.Relu(net.Gemm(y, weight, net.initializer(f"b{i}", np.full(4, i, np.float32))))
    return net.graph(outputs=[y]).to_model()


@pytest.mark.parametrize("optimizer", [momentum(0.9, lr=0.1), adam(lr=0.1)])
def test_many_biases_take_no_more_kernels_than_a_few(optimizer: Optimizer) -> None:
    def kernels(layers: int) -> int:
        made = build(deep(layers), loss="mse", train="bias", optimizer=optimizer)
        step = Graph.load(made.graph("onnx", "train"))
        updating = {"Sub", "Sqrt", "Div", "Concat", "Split"}
        return sum(node.kind in updating for node in step.nodes)

    assert kernels(4) == kernels(8)


def test_joined_biases_keep_to_the_definition() -> None:
    run = Steps(build(deep(5), loss="mse", train="bias", optimizer=adam(lr=0.1)))
    alone = Steps(build(deep(5), loss="mse", train="b3", optimizer=adam(lr=0.1)))
    x = np.random.default_rng(1).standard_normal((6, 4)).astype(np.float32)
    run.step(x, x)
    alone.step(x, x)
    np.testing.assert_allclose(run.params()["b3"], alone.params()["b3"], atol=1e-6)
