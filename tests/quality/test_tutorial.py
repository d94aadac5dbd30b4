# SPDX-License-Identifier: Apache-2.0
"""The files of the tutorial are what the product reads: its program runs, its settings parse."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import numpy as np
import pytest
from hand_bundles import mlp

from coordinator import config
from edge_sdk import device_config

PAGE = Path(__file__).resolve().parents[2] / "docs/tutorial/first-federation.md"


def blocks(language: str) -> list[str]:
    found = re.findall(
        rf"^ *```{language}\n(.*?)^ *```", PAGE.read_text(), re.DOTALL | re.MULTILINE
    )
    return [textwrap.dedent(block) for block in found]


def test_the_settings_of_the_tutorial_are_read_and_fit_together(tmp_path: Path) -> None:
    coordinator, device = blocks("toml")
    (tmp_path / "coordinator.toml").write_text(coordinator)
    mlp().save(tmp_path / "digits.fedge")
    ((task, pace),) = config.load(tmp_path / "coordinator.toml").tasks
    read = device_config.parse(tomllib.loads(device), tmp_path)
    assert (read.task, read.broker) == (task.name, tomllib.loads(coordinator)["broker"])
    assert pace is not None


def test_the_rows_of_the_tutorial_are_made(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    (program,) = blocks("python")
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, timeout=60)
    held = [np.load(tmp_path / device / "inbox/rows.npz") for device in "ab"]
    assert [(rows["x"].shape, rows["y"].dtype) for rows in held] == [((600, 1, 8, 8), np.int64)] * 2
