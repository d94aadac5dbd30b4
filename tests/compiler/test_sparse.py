# SPDX-License-Identifier: Apache-2.0
"""Only the channels that contribute most are trained, sent and written back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from forward_models import Net, blobs, cnn, mlp, predict, quantized
from onnx import numpy_helper
from planted import planted

from coordinator.compiler import adam, build, chain, clip, export, momentum, sgd
from coordinator.compiler.budget import AT_ONCE, Budget, Choice, Way, choose
from coordinator.compiler.cli import build_main
from edge_sdk.bundle import Bundle
from edge_sdk.errors import BundleError, CompileError
from edge_sdk.trainer import Trainer

X, LABELS = blobs((1, 8, 8), 4)


def grouped() -> onnx.ModelProto:
    """Return a net of a depthwise and a pointwise layer and a product with its weights on top."""
    net = Net(("N", 1, 8, 8)).conv("stem", 1, 8, 3, pads=[1, 1, 1, 1]).add("Relu")
    net.conv("depth", 8, 8, 3, group=8).add("Relu").conv("point", 8, 16, 1).add("Relu")
    net.add("GlobalAveragePool").add("Flatten")
    net.add("MatMul", net.weight("mid.weight", 16, 12)).add("Relu")
    return net.dense("head", 12, 4).model()


MODELS: dict[str, Callable[[], onnx.ModelProto]] = {
    "cnn": cnn,
    "grouped": grouped,
    "cnn int8": lambda: quantized(cnn(), X, per_channel=True),
    "cnn uint8": lambda: quantized(cnn(), X, per_channel=True, unsigned=True),
    "grouped int8": lambda: quantized(grouped(), X, per_channel=True),
}


def trained(bundle: Bundle, steps: int = 4) -> Trainer:
    trainer = Trainer(bundle)
    for _ in range(steps):
        trainer.step(X[:24], LABELS[:24])
    return trainer


def stored(model: bytes) -> dict[str, Any]:
    graph = onnx.load_from_string(model).graph
    return {t.name: numpy_helper.to_array(t) for t in graph.initializer}


def rows_of(bundle: Bundle) -> dict[str, dict[str, Any]]:
    """Return what the patches say of rows, by parameter."""
    names = list(bundle.shapes)
    patches = bundle.manifest["patches"]["onnx"]
    return {names[p["param"]]: p["rows"] for p in patches if "rows" in p}


@pytest.mark.parametrize("model", MODELS)
def test_a_share_of_the_numbers_is_trained_and_the_last_layer_whole(model: str) -> None:
    proto = MODELS[model]()
    whole, part = (build(proto, loss="cross_entropy", train=t) for t in ("all", "sparse:0.6"))
    cost = part.manifest["cost"]
    assert cost["params"] == whole.manifest["cost"]["params"]
    assert 0.4 <= cost["trainable_share"] <= 0.6
    assert cost["bytes_update"] < whole.manifest["cost"]["bytes_update"]
    assert part.manifest["train"] == "sparse:0.6"
    assert part.shapes["head.weight"] == whole.shapes["head.weight"]
    for name, rows in rows_of(part).items():
        assert part.shapes[name][rows["axis"]] == len(rows["at"]) < rows["of"]
        assert whole.shapes[name][rows["axis"]] == rows["of"]
    part.check()


@pytest.mark.parametrize("model", MODELS)
def test_what_is_exported_is_what_was_trained(model: str) -> None:
    bundle = build(
        MODELS[model](),
        loss="cross_entropy",
        train="sparse:0.6",
        optimizer=chain(clip(1.0), momentum(0.9, lr=0.05)),
    )
    trainer = trained(bundle)
    assert export(bundle, bundle.params()) == bundle.graph("onnx", "predict")
    logits = np.asarray(predict(export(bundle, trainer.params()), X), np.float64)
    right = float(np.mean(logits.argmax(1) == LABELS))
    said = trainer.evaluate(X, LABELS)
    assert right == pytest.approx(said["accuracy"], abs=0.1 if "int8" in model else 0.03)
    if "int8" not in model and "uint8" not in model:
        log = logits - logits.max(1, keepdims=True)
        log -= np.log(np.exp(log).sum(1, keepdims=True))
        assert -log[np.arange(len(X)), LABELS].mean() == pytest.approx(said["loss"], rel=1e-4)


@pytest.mark.parametrize("model", MODELS)
def test_channels_that_are_not_chosen_keep_their_bytes(model: str) -> None:
    bundle = build(MODELS[model](), loss="cross_entropy", train="sparse:0.6", optimizer=sgd(lr=0.3))
    before = stored(bundle.graph("onnx", "predict"))
    after = stored(export(bundle, trained(bundle).params()))
    cut = rows_of(bundle)
    assert cut
    for name, rows in cut.items():
        source = next(n for n in before if n in {name, f"{name}_quantized"})
        rest = [i for i in range(rows["of"]) if i not in rows["at"]]
        old, new = (np.moveaxis(s[source], rows["axis"], 0) for s in (before, after))
        np.testing.assert_array_equal(old[rest], new[rest])
        assert not np.array_equal(old[rows["at"]], new[rows["at"]])
    frozen = before.keys() - {n for c in bundle.shapes for n in (c, f"{c}_quantized")}
    for name in frozen:
        changed = before[name] != after[name]
        assert changed.sum() <= max(len(r["at"]) for r in cut.values()) or "scale" in name


def test_an_int8_channel_gets_a_scale_of_its_own() -> None:
    bundle = build(
        MODELS["cnn int8"](), loss="cross_entropy", train="sparse:0.6", optimizer=sgd(lr=0.3)
    )
    model = bytearray(export(bundle, trained(bundle).params()))
    was = bundle.graph("onnx", "predict")
    for patch in bundle.manifest["patches"]["onnx"]:
        if patch["kind"] != "quantized" or "rows" not in patch:
            continue
        at, n, rows = patch["scale_offset"], patch["scales"], patch["rows"]["at"]
        old, new = (np.frombuffer(m, "<f4", n, at) for m in (was, model))
        rest = [i for i in range(n) if i not in rows]
        np.testing.assert_array_equal(old[rest], new[rest])
        assert (old[rows] != new[rows]).any()


@pytest.mark.parametrize("micro_batch", [None, 5])
@pytest.mark.parametrize("model", ["grouped", "cnn int8"])
def test_the_gradient_of_rows_is_rows_of_the_gradient(model: str, micro_batch: int | None) -> None:
    proto = MODELS[model]()
    whole, part = (
        build(
            proto,
            loss="cross_entropy",
            train=t,
            optimizer=sgd(lr=0.1),
            micro_batch=micro_batch,
            proximal=True,
        )
        for t in ("all", "sparse:0.6")
    )
    cut, moved = rows_of(part), []
    for bundle in (whole, part):
        trainer = Trainer(bundle)
        trainer.step(X[:13], LABELS[:13])
        moved.append(trainer.delta())
    for name, delta in moved[1].items():
        rows = cut.get(name)
        expected = np.take(moved[0][name], rows["at"], rows["axis"]) if rows else moved[0][name]
        np.testing.assert_allclose(delta, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("model", ["cnn", "cnn int8"])
def test_tflite_trains_and_writes_back_the_same_channels(model: str) -> None:
    pytest.importorskip("ai_edge_litert")
    bundle = build(
        MODELS[model](),
        loss="cross_entropy",
        train="sparse:0.6",
        optimizer=momentum(0.9, lr=0.05),
        engines=("onnx", "tflite"),
    )
    bundle.check()
    made = []
    for engine in ("ort", "litert"):
        trainer = Trainer(bundle, engine=engine)
        losses = [trainer.step(X[:24], LABELS[:24]) for _ in range(3)]
        made.append((losses, np.asarray(trainer.predict(X[:64]), np.float64)))
    assert made[1][0] == pytest.approx(made[0][0], rel=1e-3)
    np.testing.assert_allclose(made[1][1], made[0][1], atol=2 if "int8" in model else 1e-4)


def test_loops_and_copies_are_for_onnx_alone() -> None:
    for asked in ({"micro_batch": 2}, {"recompute": True}):
        with pytest.raises(CompileError, match=r"expected engines=\('onnx',\) with micro_batch"):
            build(cnn(), loss="cross_entropy", engines=("tflite",), **asked)


def test_examples_tell_which_channels_matter() -> None:
    """Half of a layer's channels are cut off from the output, though their norms are large."""
    net = Net(("N", 6)).dense("body", 6, 8).add("Relu").dense("head", 8, 3)
    net.weights["body.weight"][:4] *= 10
    net.weights["head.weight"][:, :4] = 0
    x = np.random.default_rng(0).standard_normal((64, 6)).astype(np.float32)
    y = np.arange(64) % 3
    asked: dict[str, Any] = {"loss": "cross_entropy", "train": "sparse:0.65"}
    by_norm = build(net.model(), **asked)
    by_gradient = build(net.model(), **asked, calibration=(x, y))
    assert set(rows_of(by_norm)["body.weight"]["at"]) <= {0, 1, 2, 3}
    assert set(rows_of(by_gradient)["body.weight"]["at"]) <= {4, 5, 6, 7}
    assert build(net.model(), **asked, calibration=(x, y)).data == by_gradient.data


def test_a_share_of_some_layers() -> None:
    part = build(cnn(), loss="cross_entropy", train="sparse:0.9:last:2")
    base = build(cnn(), loss="cross_entropy", train="last:2")
    assert part.shapes.keys() == base.shapes.keys()
    share = part.manifest["cost"]["trainable"] / base.manifest["cost"]["trainable"]
    assert 0.7 < share <= 0.9
    build(grouped(), loss="cross_entropy", train="sparse:0.9:*", optimizer=adam(lr=0.01)).check()


@pytest.mark.parametrize("spelled", ["sparse:", "sparse:0", "sparse:1", "sparse:-0.5", "sparse:x"])
def test_a_share_that_is_none_is_refused(spelled: str) -> None:
    with pytest.raises(CompileError, match="a share between 0 and 1"):
        build(mlp(), loss="cross_entropy", train=spelled)


def test_a_share_smaller_than_the_last_layer_is_refused() -> None:
    with pytest.raises(CompileError, match="which are trained whole: they are 0"):
        build(cnn(), loss="cross_entropy", train="sparse:0.0001")


@pytest.mark.parametrize(
    "examples",
    [
        (X[:4], LABELS[:3]),
        (X[:0], LABELS[:0]),
        (X[:4, :, :4], LABELS[:4]),
        (X[:4], X[:4]),
    ],
)
def test_examples_that_do_not_fit_are_refused(examples: Any) -> None:
    with pytest.raises(CompileError, match="to calibrate on"):
        build(cnn(), loss="cross_entropy", train="sparse:0.9", calibration=examples)


def test_layers_with_one_scale_for_all_channels_stay_frozen() -> None:
    made = build(quantized(cnn(), X), loss="cross_entropy", train="sparse:0.9")
    assert rows_of(made) == {}
    assert set(made.shapes) == {"head.weight", "head.bias"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: rows["at"].pop(), "an index for each along axis"),
        (lambda rows: rows["at"].reverse(), "indices below 16, rising"),
        (lambda rows: rows["at"].__setitem__(1, rows["at"][0]), "indices below 16, rising"),
        (lambda rows: rows["at"].__setitem__(-1, 16), "indices below 16, rising"),
        (lambda rows: rows.update(axis=9), "an index for each along axis 9"),
        (lambda rows: rows.update(of=4), "indices below 4, rising"),
        (lambda rows: rows.update(of=17), "expected (136 numbers|bytes that no other)"),
        (lambda rows: rows.update(of=1 << 24), "expected bytes"),
        (lambda rows: rows.update(more=1), "no such field"),
    ],
)
def test_rows_that_do_not_fit_their_tensor_are_refused(
    change: Callable[[dict[str, Any]], object], said: str
) -> None:
    bundle = build(grouped(), loss="cross_entropy", train="sparse:0.7")

    def apply(manifest: dict[str, Any]) -> None:
        names = [p["name"] for p in manifest["params"]]
        patches = manifest["patches"]["onnx"]
        change(next(p for p in patches if names[p["param"]] == "point.weight")["rows"])

    assert len(rows_of(bundle)["point.weight"]["at"]) > 2
    with pytest.raises(BundleError, match=said):
        planted(bundle, manifest=apply).check()


def test_a_budget_for_updates_takes_channels_before_it_takes_layers() -> None:
    free = build(cnn(), loss="cross_entropy").manifest["cost"]
    made = build(cnn(), loss="cross_entropy", max_bytes_per_update=free["bytes_update"] - 10)
    assert made.manifest["train"].startswith("sparse:")
    assert made.manifest["cost"]["bytes_update"] < free["bytes_update"]


def test_a_selection_is_halved_until_it_fits() -> None:
    asked: list[str] = []

    def price(train: str, _: Way) -> dict[str, Any] | None:
        asked.append(train)
        share = float(train.split(":")[1]) if train.startswith("sparse") else 1.0
        if train == "sparse:0.125:last:2":
            return None
        depth = {"all": 4, "last:3": 3, "last:2": 2, "last:1": 1, "bias": 1}
        among = train.split(":", 2)[2] if train.count(":") > 1 else "all"
        size = depth[train if share == 1.0 else among]
        told = {str(n): 1000 * size for n in (1, 2, 4, 8, 16, 32, 64)}
        return {"ram_train": told, "bytes_update": int(800 * size * share), "flops_step": 1}

    widths = ["all", "last:3", "last:2", "bias", "last:1"]
    shares = (0.5, 0.25, 0.125)

    def chosen(limits: Budget) -> Choice:
        return choose(widths, price, limits, [AT_ONCE], shares)

    assert chosen(Budget(update=4000)).train == "all"
    assert chosen(Budget(update=1700)).train == "sparse:0.5"
    assert chosen(Budget(update=500)).train == "sparse:0.125"
    assert chosen(Budget(ram=3000, update=700)).train == "sparse:0.25:last:3"
    assert chosen(Budget(ram=2000, update=900)).train == "sparse:0.5:last:2"
    with pytest.raises(CompileError, match=r"the nearest is train='sparse:0\.25:last:2'"):
        chosen(Budget(ram=2000, update=300))
    with pytest.raises(CompileError, match="the nearest is"):
        chosen(Budget(ram=500))


def test_the_command_has_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(cnn(), tmp_path / "m.onnx")
    np.savez(tmp_path / "known.npz", x=X[:32], y=LABELS[:32])
    args = [str(tmp_path / "m.onnx"), "-o", str(tmp_path / "m.fedge"), "--loss", "cross_entropy"]
    args += ["--train", "sparse:0.9", "--calibration"]
    assert build_main([*args, str(tmp_path / "known.npz")]) == 0
    assert "sparse:0.9" in capsys.readouterr().out
    np.savez(tmp_path / "other.npz", x=X[:4])
    with pytest.raises(SystemExit, match="2"):
        build_main([*args, str(tmp_path / "other.npz")])
    assert "expected arrays x and y in --calibration" in capsys.readouterr().err
