# SPDX-License-Identifier: Apache-2.0
"""The README's two programs run as they stand, against each other, over a real broker."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from forward_models import mlp

from coordinator.compiler import build, sgd

README = Path(__file__).resolve().parents[2] / "README.md"
Until = Callable[..., None]


def blocks() -> tuple[str, str]:
    device, coordinator = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    return device, coordinator


def lines(block: str) -> int:
    return sum(bool(line.strip()) for line in block.splitlines())


def change(text: str, old: str, new: str) -> str:
    assert old in text, f"the README no longer says {old!r}"
    return text.replace(old, new)


def test_the_programs_are_as_short_as_promised() -> None:
    device, coordinator = blocks()
    assert lines(device) <= 15
    assert lines(coordinator) <= 10
    assert len(README.read_text().splitlines()) <= 150


def test_every_link_of_the_documents_leads_somewhere() -> None:
    root = README.parent
    for page in [*root.glob("*.md"), *root.glob("docs/**/*.md"), *root.glob("models/**/*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.relative_to(root)} links to {target}"


@pytest.mark.broker
@pytest.mark.timeout(60)
def test_the_two_programs_learn_together(
    mosquitto: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    rng = np.random.default_rng(0)
    build(mlp(), loss="cross_entropy", optimizer=sgd(lr=0.1)).save("pump-anomaly.fedge")
    device, coordinator = blocks()
    coordinator = change(coordinator, '"mqtts://localhost"', repr(mosquitto.url))
    coordinator = change(coordinator, '"/var/lib/fedge"', '"store"')
    coordinator = change(coordinator, "cohort=20, quorum=12", "count=1, cohort=1, quorum=1")
    device = change(device, '"mqtts://hub.farm.example"', repr(mosquitto.url))
    device = change(device, "when.on_mains & when.idle & when.cooler_than(70)", "when.always")
    device = change(device, "print(device.predict", "answers.append(device.predict")
    updated, answers = threading.Event(), []

    def windows() -> Iterator[tuple[Any, int | None]]:
        for label in (0, 1, 2, 0, 1):
            yield rng.normal(size=6).astype(np.float32), label
        assert updated.wait(40), "no new version came"
        yield rng.normal(size=6).astype(np.float32), None

    names = {"sensor": SimpleNamespace(windows=windows), "answers": answers}
    names["print"] = lambda *words: updated.set() if words[-1] == 1 else None
    program: dict[str, Any] = {"print": lambda *_: None}
    exec(coordinator, program)  # noqa: S102 # our own README
    daemon = threading.Thread(target=lambda: asyncio.run(program["main"]()))
    daemon.start()
    exec(device, names)  # noqa: S102 # our own README
    daemon.join(20)
    assert len(answers) == 6
    assert all(np.isfinite(a).all() for a in answers)
