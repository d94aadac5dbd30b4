# SPDX-License-Identifier: Apache-2.0
"""A shipped int8 .tflite learns from 100 people's own voices and goes back as it came.

MLPerf Tiny's keyword model, its last layer trained on 100 devices in real processes, one for each
speaker, 20 of them a round; tested on 139 other speakers. Every accuracy is that of the exported
file in LiteRT.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pytest
from loading import module_at

from coordinator.demo.report import Record
from coordinator.demo.run import demo
from coordinator.demo.settings import Settings
from edge_sdk.engine import ENGINES

Figure = Callable[[str, object, str], None]
Seeds = Callable[[int], range]

pytestmark = [
    pytest.mark.shared,
    pytest.mark.slow,
    pytest.mark.broker,
    pytest.mark.timeout(1800),
]
MODEL = "kws_ref_model.tflite"


@pytest.fixture(scope="module")
def rows(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the clips in the `--data` form: raw MFCC, channels last, as the model takes them."""
    found: dict[str, Any] = module_at(shared / "data" / "load.py").load("kws", normalise=False)
    arrays = {k: found[k] for k in ("x_train", "y_train", "client_train", "x_test", "y_test")}
    for name in ("x_train", "x_test"):
        arrays[name] = np.ascontiguousarray(arrays[name].transpose(0, 2, 3, 1))
    path = tmp_path_factory.mktemp("kws") / "kws.npz"
    np.savez(path, **arrays)
    return path


def litert(model: bytes, rows: Path) -> float:
    """Accuracy of a .tflite file, by nothing but LiteRT and numpy."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_content=model)
    interpreter.allocate_tensors()
    entry, output = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
    assert entry["dtype"] == output["dtype"] == np.int8
    scale, zero = entry["quantization"]
    with np.load(rows) as arrays:
        x, y = np.rint(arrays["x_test"] / scale) + zero, arrays["y_test"]
    right = 0
    for clip, label in zip(np.clip(x, -128, 127).astype(np.int8), y, strict=True):
        interpreter.set_tensor(entry["index"], clip[np.newaxis])
        interpreter.invoke()
        right += int(np.argmax(interpreter.get_tensor(output["index"])) == label)
    return right / len(y)


@pytest.mark.parametrize("engine", ["ort", "litert"])
def test_a_hundred_speakers_better_the_model_that_was_shipped(
    shared: Path, rows: Path, tmp_path: Path, *, seeds: Seeds, figure: Figure, engine: str
) -> None:
    if not ENGINES[engine].is_installed:
        pytest.skip(f"{ENGINES[engine].module} is not installed")
    model, exports = shared / "models" / MODEL, list[bytes]()

    def run(seed: int) -> Record:
        settings = Settings(
            devices=100,
            cohort=20,
            rounds=10,
            model=model,
            data=rows,
            train="last:1",
            engine=engine,
            seed=seed,
            deadline_s=60.0,
            export=tmp_path / f"{seed}.tflite",
        )
        record = asyncio.run(demo(settings, None, show=print))
        exports.append((tmp_path / f"{seed}.tflite").read_bytes())
        return record

    records = [run(seed) for seed in seeds(5)]
    fifth = mean(record.rounds[4].accuracy or 0.0 for record in records)
    tenth = mean(record.accuracy_after for record in records)
    alone = mean(record.accuracy_alone for record in records)
    exported = mean(litert(model, rows) for model in exports)
    up = mean(record.bytes_up_mean for record in records)
    shipped = litert(model.read_bytes(), rows)
    for name, value, target in (
        ("as shipped", shipped, ""),
        ("the mean device alone", alone, ""),
        ("round 5", fifth, ">= 0.915"),
        ("round 10", tenth, ">= 0.92"),
        ("the exported int8 .tflite in LiteRT", exported, ">= 0.915"),
        ("bytes up for a device and round", up, "<= 500"),
        ("of it update", mean(r.bytes_update_mean for r in records), ""),
        ("seconds", mean(r.seconds for r in records), "< 180"),
        ("MiB of a process of 25 devices", max(r.device_rss_mib for r in records), ""),
        ("MiB of its training child", max(r.training_rss_mib for r in records), ""),
    ):
        figure(f"kws by {engine}: {name}", value, target)
    slack = 0.0 if len(records) > 1 else 0.005  # one seed may be an unlucky one
    assert fifth >= 0.915 - slack
    assert tenth >= 0.92 - slack
    assert exported >= 0.915 - slack
    assert exported == pytest.approx(tenth, abs=1e-9)
    assert tenth >= max(shipped, alone) + 0.005
    assert up <= 500
    for record, made in zip(records, exports, strict=True):
        assert min(r.reported for r in record.rounds) >= 18  # a busy machine may lose one or two
        assert all(device.exit == 0 for device in record.devices)
        assert len(made) == model.stat().st_size  # the same file, trained in place
