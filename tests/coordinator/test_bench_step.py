# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from coordinator.bench import child, cli, device, plan, recipes, step
from edge_sdk.errors import ConfigError, EngineError

needs_torch = pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="torch is missing")


class Peer:
    """A rival that says what it is told to."""

    def __init__(self, losses: list[float], error: str = "") -> None:
        self.losses, self.error = losses, error

    def run(self, steps: int) -> dict[str, Any]:
        assert steps == step.COMPARED
        if self.error:
            raise EngineError(self.error)
        return {"losses": self.losses}


@needs_torch
@pytest.mark.oracle
def test_a_step_is_timed_next_to_torch_once_their_losses_agree() -> None:
    cost = step.measure("dscnn", batch=4, threads=1, repeat=1)
    assert cost["torch"] == "measured"
    assert cost["losses_differ_by"] is not None
    assert cost["losses_differ_by"] <= step.AGREE
    assert cost["ratio"] == pytest.approx(cost["ms"] / cast("float", cost["torch_ms"]))
    assert 20 < cost["rss_mib"] < 200


def test_without_torch_our_own_figures_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    cost = step.measure("autoencoder", batch=2, threads=1, repeat=1)
    assert cost["torch"] == "torch is not installed"
    assert cost["ratio"] is None
    assert cost["ms"] > 0


def test_losses_that_differ_stop_the_measurement() -> None:
    peer = cast("child.Child", Peer([1.0, 1.1]))
    with pytest.raises(EngineError, match="same losses as torch"):
        step._agreed(peer, [1.0, 1.0])
    with pytest.raises(EngineError, match="same losses as torch"):
        step._agreed(cast("child.Child", Peer([1.0, float("nan")])), [1.0, 1.0])


def test_a_model_that_torch_has_no_layers_for_is_measured_without_it() -> None:
    peer = cast("child.Child", Peer([], "torch has no layer here for Gather"))
    assert step._agreed(peer, [1.0]) == (None, None, "torch has no layer here for Gather")


def test_a_child_that_dies_is_reported(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with (
        child.started("coordinator.bench.ours", tmp_path / "nothing", 1) as one,
        pytest.raises(EngineError, match="ended early"),
    ):
        one.run(1)
    assert "nothing" in capfd.readouterr().err


def test_the_rival_needs_no_onnx(tmp_path: Path) -> None:
    plan.write(recipes.model("resnet8"), "cross_entropy", 0.1, 0.9, tmp_path)
    read = json.loads((tmp_path / "plan.json").read_text())
    assert {node["op"] for node in read["nodes"]} >= {"Conv", "Relu", "Add", "Gemm"}
    assert (tmp_path / "weights.npz").exists()


def test_an_unknown_model_is_named() -> None:
    with pytest.raises(ConfigError, match=r"dscnn.*'nosuch'"):
        recipes.model("nosuch")
    with pytest.raises(ConfigError, match="from 1"):
        step.measure("dscnn", batch=0)


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
    rows = [{"model": "a", "ms": 1.23456, "ratio": None}, {"model": "b", "ms": 2.0, "ratio": 0.5}]
    monkeypatch.setattr(step, "measure", lambda model, **_: {"a": rows[0], "b": rows[1]}[model])
    monkeypatch.setattr(cli, "MODELS", ("a", "b"))
    assert cli.main(["step"]) == 0
    head, first, second = capsys.readouterr().out.splitlines()
    assert head.split() == ["model", "ms", "ratio"]
    assert first.split() == ["a", "1.235", "-"]
    assert second.split() == ["b", "2", "0.5"]
    assert cli.main(["step", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"step": rows}
    assert cli.main(["step", "--model", "a"]) == 0
    assert "ms     1.235" in capsys.readouterr().out
