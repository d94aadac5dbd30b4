# SPDX-License-Identifier: Apache-2.0
"""What a training step costs next to torch in eager mode: same weights, batches and threads."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest

from coordinator.bench import device, step
from edge_sdk.engine import ENGINES

LIMITS = {"dscnn": 1.0, "autoencoder": 1.0, "resnet8": 1.5, "mobilenet": 1.5}
"""Ratios of times that gate, with room for a machine that others use."""

AIMS = {"dscnn": 0.8, "autoencoder": 0.5, "resnet8": 1.3, "mobilenet": 1.0}
"""Ratios that a machine at rest should show."""

REPEAT = 8


@pytest.mark.slow
@pytest.mark.oracle
@pytest.mark.timeout(600)
@pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="torch is missing")
@pytest.mark.parametrize("model", LIMITS)
def test_a_step_keeps_up_with_torch_in_a_third_of_its_memory(
    model: str, figure: Callable[..., None]
) -> None:
    (cost,) = step.measure(model, settings=step.Settings(repeat=REPEAT))
    if cost["ratio"] is None or cost["ratio"] > LIMITS[model]:  # once more: others were busy
        (cost,) = step.measure(model, settings=step.Settings(repeat=2 * REPEAT))
    ratio, rss_ratio = cost["ratio"], cost["rss_ratio"]
    assert ratio is not None
    assert rss_ratio is not None
    figure(f"step of {model}: ours / torch", ratio, f"<= {AIMS[model]:g} at rest")
    figure(f"step of {model}: ours, ms", cost["ms"])
    figure(f"step of {model}: memory, ours / torch", rss_ratio, "<= 0.333")
    assert ratio <= LIMITS[model]
    assert rss_ratio <= 1 / 3


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ort", "litert"])
def test_a_head_trains_in_the_memory_of_a_small_board(
    engine: str, figure: Callable[..., None]
) -> None:
    pytest.importorskip(ENGINES[engine].module)
    found = device.measure("dscnn", "head", engine)
    most = {"ort": 75, "litert": 70}[engine]
    figure(f"training a head of dscnn, {engine}, MiB", found["training_mib"], f"<= {most}")
    assert found["training_mib"] <= most
