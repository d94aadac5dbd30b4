# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from hand_bundles import examples, mlp

from edge_sdk import engine as engines
from edge_sdk.engine import choose, open_engine
from edge_sdk.errors import EngineError

OTHER = engines.Runtime("edge_sdk.engine.other:Other", "other", "fedge[other]", "onnx")


def test_an_unknown_engine_is_named_with_the_known_ones() -> None:
    known = r"\['auto', 'ort', 'litert', 'tflite'\], got 'tflight'"
    with pytest.raises(EngineError, match=known):
        open_engine(mlp(), "tflight")


def test_an_engine_that_the_bundle_has_no_graphs_for_says_which_it_has() -> None:
    with pytest.raises(EngineError, match="this bundle trains in onnx, not in tflite"):
        open_engine(mlp(), "litert")


def test_the_first_engine_that_is_installed_and_fits_is_picked_and_the_others_reasons_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engines, "ENGINES", {"other": OTHER, **engines.ENGINES})
    chosen, reasons = choose(mlp().manifest)
    assert chosen == "ort"
    assert reasons["other"] == "other is not installed; pip install 'fedge[other]'"
    assert "not in tflite" in reasons["litert"]
    assert choose(mlp().manifest, "ort").engine == "ort"


def test_what_comes_after_the_pick_is_said_to_come_after(monkeypatch: pytest.MonkeyPatch) -> None:
    later = engines.ENGINES["ort"]
    monkeypatch.setattr(engines, "ENGINES", {**engines.ENGINES, "later": later})
    assert choose(mlp().manifest).reasons["later"] == "ort comes first"


def test_no_threads_is_an_error() -> None:
    with pytest.raises(EngineError, match="at least 1"):
        open_engine(mlp(), threads=0)


def test_a_missing_runtime_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    engines.import_module("edge_sdk.engine.ort")._runtime.cache_clear()
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'fedge\[onnx\]'"):
        open_engine(mlp())


@pytest.mark.parametrize(
    "model", [b"", b"not a model", b"\x08\x0a" * 50], ids=["none", "text", "pb"]
)
def test_a_graph_that_does_not_load_is_one_line(model: bytes) -> None:
    with pytest.raises(EngineError, match="could not load the graph") as caught:
        open_engine(mlp()).predictor(model)
    assert "\n" not in str(caught.value)


def test_a_batch_that_does_not_fit_is_one_line() -> None:
    bundle = mlp()
    opened = open_engine(bundle)
    with pytest.raises(EngineError, match="could not predict") as caught:
        opened.predictor(bundle.graph("onnx", "predict")).run(np.zeros((2, 99), np.float32))
    assert "\n" not in str(caught.value)
    x, y = examples(4)
    with pytest.raises(EngineError, match="could not train"):
        opened.training(bundle).step(x[:, :2].copy(), y, 0.1, 0.0)


def test_a_failed_step_leaves_the_weights_as_they_were() -> None:
    training = open_engine(mlp()).training(mlp())
    before = training.read()
    with pytest.raises(EngineError):
        training.step(np.zeros((4, 99), np.float32), np.zeros(4, np.int64), 0.1, 0.0)
    for a, b in zip(before, training.read(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_arrays_that_are_not_contiguous_are_read_each_time() -> None:
    training = open_engine(mlp()).training(mlp())
    x, y = examples(8)
    wide = np.zeros((8, 12), np.float32)
    wide[:, ::2] = x
    strided = wide[:, ::2]
    first = training.step(strided, y, 0.0, 0.0)
    assert first == training.step(x, y, 0.0, 0.0)
    wide[:] = 0
    assert training.step(strided, y, 0.0, 0.0) != first


def test_importing_the_port_loads_no_runtime_and_telemetry_is_off_before_it_loads() -> None:
    script = (
        "import sys, os, edge_sdk.trainer, edge_sdk.bundle;"
        "heavy = {'onnxruntime', 'onnx', 'paho', 'cryptography', 'aiohttp'};"
        "assert not heavy & sys.modules.keys();"
        "import edge_sdk.engine.ort as ort;"
        "assert 'onnxruntime' not in sys.modules;"
        "ort.Ort(); assert os.environ['ORT_DISABLE_TELEMETRY'] == '1'"
    )
    env = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True, env=env)
