# SPDX-License-Identifier: Apache-2.0
"""The board's own test: passes on every engine here, and fails where something computes wrongly."""

from __future__ import annotations

import json

import numpy as np
import pytest

from edge_sdk import selftest, selftest_cli
from edge_sdk.bundle import Bundle
from edge_sdk.engine import installed

CHECKS = ["load", "predict", "train", "encode", "sign"]


@pytest.mark.parametrize("engine", installed())
def test_every_engine_here_gives_the_known_answers(engine: str) -> None:
    results = selftest.run(engine)
    assert [(r.check, r.ok) for r in results] == [(check, True) for check in CHECKS]


def test_examples_come_from_arithmetic_alone() -> None:
    x, y = selftest.rows()
    assert x.shape == (32, 1, 8, 8)
    assert x.dtype == np.float32
    assert 0 <= x.min() < x.max() <= 1
    assert np.bincount(y).tolist() == [8, 8, 8, 8]
    assert float(x.sum(dtype=np.float64)) == pytest.approx(945.94, abs=0.01)


@pytest.mark.parametrize(
    ("answer", "check", "others"),
    [("ANSWERS", "predict", 1), ("FIRST_LOSS", "train", 2), ("LAST_LOSS", "train", 2)],
)
def test_an_answer_that_is_off_fails_its_check_and_ends_the_run(
    answer: str, check: str, others: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = np.add(getattr(selftest, answer), 0.1)
    monkeypatch.setattr(selftest, answer, wrong if wrong.ndim else float(wrong))
    results = selftest.run()
    assert [r.ok for r in results] == [True] * others + [False]
    assert results[-1].check == check
    assert "expected" in results[-1].says


def test_the_command_prints_json_and_its_exit_code_says_whether_all_is_well(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert selftest_cli.main(["--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True
    monkeypatch.setattr(selftest, "FIRST_LOSS", 9.0)
    assert selftest_cli.main([]) == 1
    assert "FAIL train" in capsys.readouterr().out


def test_the_bundle_that_comes_along_is_small_and_for_every_engine() -> None:
    bundle = Bundle.load(selftest.BUNDLE)
    assert set(bundle.manifest["graphs"]) == {"onnx", "tflite"}
    assert selftest.BUNDLE.stat().st_size < 100_000
