# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from coordinator import recipes

SIZES = {"dscnn": 22_604, "resnet8": 77_706, "mobilenet": 210_850, "autoencoder": 265_864}
SIZES |= {"har": 20_078}
MODELS = Path(__file__).parents[2] / "models"


@pytest.mark.parametrize("name", SIZES)
def test_a_recipe_makes_the_same_model_each_time(name: str) -> None:
    first, second = (recipes.recipe(name).build() for _ in range(2))
    assert first.SerializeToString(deterministic=True) == second.SerializeToString(
        deterministic=True
    )
    assert first.SerializeToString() != recipes.recipe(name).build(seed=1).SerializeToString()
    assert sum(int(np.prod(w.dims)) for w in first.graph.initializer) == SIZES[name]


@pytest.mark.parametrize("name", SIZES)
def test_a_model_answers_for_any_batch(name: str) -> None:
    session = onnxruntime.InferenceSession(recipes.recipe(name).build().SerializeToString())
    entry, answer = session.get_inputs()[0], session.get_outputs()[0]
    for batch in (1, 3):
        x = np.random.default_rng(0).standard_normal((batch, *entry.shape[1:]), np.float32)
        (y,) = session.run(None, {entry.name: x})
        assert y.shape == (batch, *answer.shape[1:])
        assert np.isfinite(y).all()


def test_a_recipe_runs_as_a_script(tmp_path: Path) -> None:
    command = [sys.executable, str(MODELS / "dscnn" / "build.py"), str(tmp_path / "made")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "22,604 weights" in done.stdout
    assert (tmp_path / "made" / "dscnn.onnx").stat().st_size < 100_000


def test_every_model_has_a_card() -> None:
    folders = {build.parent for build in MODELS.glob("*/build.py")}
    assert {folder.name for folder in folders} >= {*SIZES, "digits"}
    for folder in folders:
        assert "| weights |" in (folder / "README.md").read_text()
