# SPDX-License-Identifier: Apache-2.0
"""The how-to on training one's own model does what it says, command by command."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs/how-to/train-your-own-model.md"
BLOCK = re.compile(r"```(python|sh)\n(.*?)```", re.DOTALL)
SCRIPT = re.compile(r"`(\w+\.py)`[^`]*\Z")


def programs() -> list[tuple[str, str]]:
    """Return (name, text) of each script, named by the sentence before it, and ("", commands)."""
    page = PAGE.read_text()
    found = []
    for block in BLOCK.finditer(page):
        named = SCRIPT.search(page[: block.start()])
        if block[1] == "python":
            assert named, f"a script without a name: {block[2][:60]!r}"
        found.append((named[1] if named and block[1] == "python" else "", block[2]))
    return found


def test_the_page_has_every_step() -> None:
    names = [name for name, _ in programs()]
    others = ["quantize.py", "", "tflite.py", "", "keep.py", "", "app.py", ""]
    assert names == ["export.py", "", *others]
    text = PAGE.read_text()
    for command in ("fedge build", "fedge inspect", "fedge demo --model", "--data"):
        assert command in text


@pytest.mark.slow
@pytest.mark.oracle
@pytest.mark.timeout(300)
def test_every_command_of_the_page_runs(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("onnxscript")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    told = ""
    for name, text in programs():
        if name:
            (tmp_path / name).write_text(text)
            continue
        done = subprocess.run(
            ["bash", "-euc", text], cwd=tmp_path, env={**os.environ, "PATH": path},
            capture_output=True, text=True, check=False, timeout=200,
        )  # fmt: skip
        assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        told += done.stdout
    assert told.count("checks     passed") == 3
    assert "it is the file that went in: True" in told
    assert told.count("should be") == 20
    right = [line.split()[0] == line.split()[-1] for line in told.splitlines() if "should" in line]
    assert sum(right) >= 12
    assert (tmp_path / "demo-curves.png").exists()
