# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from coordinator.bench import child, cli, device, plan, recipes, rivals, step
from coordinator.compiler import build
from edge_sdk.engine import ENGINES
from edge_sdk.errors import ConfigError, EngineError

needs_torch = pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="torch is missing")


class Said:
    """A process that says what it is told to."""

    def __init__(self, losses: list[float], error: str = "") -> None:
        self.losses, self.error = losses, error

    def run(self, steps: int) -> dict[str, Any]:
        assert steps == step.COMPARED
        if self.error:
            raise EngineError(self.error)
        return {"losses": self.losses}


def side(name: str, losses: list[float], error: str = "") -> rivals.Rival:
    return rivals.Rival(name, child=cast("child.Child", Said(losses, error)))


def quick(**changed: Any) -> step.Settings:
    return step.Settings(batch=2, threads=1, repeat=1)._replace(**changed)


@needs_torch
@pytest.mark.oracle
@pytest.mark.parametrize("mode", ["all", "head", "bias"])
def test_a_step_is_timed_next_to_torch_once_their_losses_agree(mode: str) -> None:
    (cost,) = step.measure("dscnn", mode, settings=quick(batch=4))
    assert cost["note"] == ""
    assert cost["peer"] == "torch"
    assert cost["losses_differ_by"] is not None
    assert cost["losses_differ_by"] <= step.AGREE
    assert cost["ratio"] == pytest.approx(
        cast("float", cost["ms"]) / cast("float", cost["peer_ms"])
    )
    assert 20 < cast("float", cost["rss_mib"]) < 200


def test_without_torch_our_own_figures_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals, "find_spec", lambda _: None)
    (cost,) = step.measure("autoencoder", settings=quick())
    assert cost["note"] == "torch is not installed"
    assert cost["ratio"] is None
    assert cast("float", cost["ms"]) > 0


def test_memory_that_was_predicted_stands_next_to_what_was_measured() -> None:
    (cost,) = step.measure("dscnn", "head", settings=quick(peers=()))
    added, predicted = cast("float", cost["added_mib"]), cast("float", cost["predicted_mib"])
    assert cost["off"] == pytest.approx(predicted / added - 1)
    assert predicted == pytest.approx(added, rel=0.25)
    assert cost["peer"] == ""


def test_the_rival_of_an_int8_model_is_its_float_twin() -> None:
    (cost,) = step.measure("dscnn", "int8", settings=quick(peers=("torch",)))
    assert cost["peer"] == "float32"
    assert cast("float", cost["ratio"]) > 0
    assert cost["losses_differ_by"] is None


def test_a_rival_whose_python_is_not_given_or_not_there_is_named() -> None:
    peers = (rivals.ORT_TRAINING,)
    (cost,) = step.measure("autoencoder", "head", settings=quick(peers=peers))
    assert cost["note"] == "onnxruntime-training needs --peer-python"
    wrong = quick(peers=peers, peer_python="/nowhere/python")
    (cost,) = step.measure("autoencoder", "head", settings=wrong)
    assert "/nowhere/python does not run" in cost["note"]
    plain = quick(peers=peers, peer_python=sys.executable)
    (cost,) = step.measure("autoencoder", "head", settings=plain)
    assert "is the plain one" in cost["note"]
    assert cast("float", cost["ms"]) > 0


@pytest.mark.figures  # the rival runs on Python 3.11 alone: `scripts/bench rivals` makes it one
@pytest.mark.skipif("FEDGE_ORT_TRAINING" not in os.environ, reason="FEDGE_ORT_TRAINING is not set")
@pytest.mark.parametrize("mode", ["all", "head", "bias"])
def test_onnxruntime_training_takes_the_same_steps(mode: str) -> None:
    how = quick(peers=(rivals.ORT_TRAINING,), peer_python=os.environ["FEDGE_ORT_TRAINING"])
    (cost,) = step.measure("resnet8", mode, settings=how)
    assert cost["note"] == ""
    assert cast("float", cost["losses_differ_by"]) <= step.AGREE


def test_an_engine_that_is_not_there_leaves_a_row_that_says_so() -> None:
    how = quick(engines=("ort", "tflite"), peers=(), tflite_python=sys.executable)
    rows = step.measure("autoencoder", "head", settings=how)
    assert [row["engine"] for row in rows] == ["ort", "tflite"]
    assert cast("float", rows[0]["ms"]) > 0
    if not importlib.util.find_spec("tflite_runtime"):
        assert rows[1]["ms"] is None
        assert rows[1]["note"]


def test_a_tflite_file_is_measured_without_torch(tmp_path: Path) -> None:
    formats = ("onnx", "tflite")
    made = build(recipes.model("autoencoder"), loss="mse", train="last:1", engines=formats)
    file = tmp_path / "anomalies.tflite"
    file.write_bytes(made.graph("tflite", "predict"))
    (cost,) = step.measure(str(file), "head", loss="mse", settings=quick())
    assert (cost["model"], cost["note"]) == ("anomalies", "torch reads no .tflite file")
    assert cast("float", cost["ms"]) > 0
    with pytest.raises(ConfigError, match="use mode head"):
        step.measure(str(file), "int8", loss="mse", settings=quick())


def test_losses_that_differ_stop_the_measurement() -> None:
    ours = step._tried(side("ort", [1.0, 1.0]), [])
    assert ours.losses == (1.0, 1.0)
    for losses in ([1.0, 1.1], [1.0, float("nan")]):
        with pytest.raises(EngineError, match="same losses of ort and torch"):
            step._tried(side("torch", losses), [ours])
    assert step._tried(side("torch", [1.0, 1.00001]), [ours]).differs == pytest.approx(
        1e-5, rel=1e-3
    )


def test_a_model_that_torch_has_no_layers_for_is_measured_without_it() -> None:
    rival = step._tried(side("torch", [], "torch has no layer here for Gather"), [])
    assert (rival.child, rival.why) == (None, "torch has no layer here for Gather")


def test_a_child_that_dies_is_reported(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with (
        child.started("coordinator.bench.ours", tmp_path / "nothing", 1, "ort") as one,
        pytest.raises(EngineError, match="ended early"),
    ):
        one.run(1)
    assert "nothing" in capfd.readouterr().err


def test_the_rival_needs_no_onnx(tmp_path: Path) -> None:
    trains = ["conv.weight"]
    plan.write(
        recipes.model("resnet8"), "cross_entropy", trains, lr=0.1, decay=0.9, folder=tmp_path
    )
    read = json.loads((tmp_path / "plan.json").read_text())
    assert {node["op"] for node in read["nodes"]} >= {"Conv", "Relu", "Add", "Gemm"}
    assert (tmp_path / "weights.npz").exists()


def test_an_unknown_model_is_named() -> None:
    with pytest.raises(ConfigError, match=r"dscnn.*'nosuch'"):
        recipes.model("nosuch")
    with pytest.raises(ConfigError, match="from 1"):
        step.measure("dscnn", settings=step.Settings(batch=0))
    with pytest.raises(ConfigError, match=r"all, head, bias, int8.*'half'"):
        step.measure("dscnn", "half")


def test_the_memory_of_a_device_keeps_its_limits(figure: Callable[..., None]) -> None:
    found = device.measure("dscnn")
    figure("device: application that predicts, MiB", found["application_mib"], "<= 75")
    figure("device: training child, MiB", found["training_mib"], "<= 110")
    figure("device: both, MiB", found["together_mib"], "<= 175")
    assert found["application_mib"] <= 75
    assert found["training_mib"] <= 110
    assert found["together_mib"] <= 175


def test_results_are_a_table_for_people_and_json_for_machines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"model": "a", "threads": 2, "ms": 1.23456, "ratio": None, "note": ""},
        {"model": "b", "threads": 2, "ms": 2.0, "ratio": 0.5, "note": ""},
    ]
    made = {"a": rows[:1], "b": rows[1:]}
    monkeypatch.setattr(step, "measure", lambda model, *_, **__: made[model])
    monkeypatch.setattr(cli, "MODELS", ("a", "b"))
    assert cli.main(["step", "--mode", "all"]) == 0
    shared, head, first, second = capsys.readouterr().out.splitlines()
    assert shared == "threads 2"
    assert head.split() == ["model", "ms", "ratio"]
    assert first.split() == ["a", "1.235", "-"]
    assert second.split() == ["b", "2", "0.5"]
    assert cli.main(["step", "--mode", "all", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"step": rows}
    assert cli.main(["step", "--model", "a", "--mode", "all"]) == 0
    assert "ms       1.235" in capsys.readouterr().out


def test_models_modes_batches_and_engines_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str, int, tuple[str, ...]]] = []

    def measured(model: str, mode: str, settings: step.Settings, **_: object) -> list[Any]:
        asked.append((model, mode, settings.batch, settings.engines))
        return [{"ms": 1.0}]

    monkeypatch.setattr(step, "measure", measured)
    words = "step --model dscnn --mode head int8 --batch 4 16 --engine all"
    assert cli.main(words.split()) == 0
    every = tuple(ENGINES)
    assert asked == [("dscnn", m, b, every) for m in ("head", "int8") for b in (4, 16)]
    with pytest.raises(SystemExit):
        cli.main(["step", "--mode", "half"])
