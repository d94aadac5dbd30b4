# SPDX-License-Identifier: Apache-2.0
"""What importing and running the device costs, and what it must not load."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
from hand_bundles import examples, mlp

import edge_sdk
from edge_sdk import footprint
from edge_sdk.model import open_model

FORBIDDEN = ("onnx", "onnxruntime", "aiohttp", "coordinator", "torch", "paho", "asyncio")


def run(code: str, *args: str) -> dict[str, object]:
    command = [sys.executable, "-c", textwrap.dedent(code), *args]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, object] = json.loads(done.stdout)
    return found


def test_importing_edge_sdk_loads_neither_engine_nor_network_nor_coordinator() -> None:
    code = """
        import json, sys
        import edge_sdk
        from edge_sdk import when
        print(json.dumps({name: name in sys.modules for name in sys.argv[1:]}))
    """
    assert run(code, *FORBIDDEN) == dict.fromkeys(FORBIDDEN, False)


def test_a_running_device_never_loads_onnx_aiohttp_torch_or_the_coordinator(tmp_path: Path) -> None:
    mlp(quantized=True).save(tmp_path / "x.fedge")
    code = """
        import json, sys
        from edge_sdk import Device
        with Device("mqtt://127.0.0.1:1", task="t", bundle=sys.argv[1], state=sys.argv[2]) as d:
            d.learn([0.0] * 6, 1)
            d.predict([0.0] * 6)
        names = ("onnx", "aiohttp", "coordinator", "torch", "asyncio", "numpy.testing")
        print(json.dumps({name: name in sys.modules for name in names}))
    """
    loaded = run(code, str(tmp_path / "x.fedge"), str(tmp_path / "state"))
    assert not any(loaded.values()), loaded


def test_the_host_process_stays_under_75_mib(tmp_path: Path) -> None:
    mlp((490, 64, 12), quantized=True).save(tmp_path / "x.fedge")
    code = """
        import json, sys
        from edge_sdk import Device, footprint
        with Device("mqtt://127.0.0.1:1", task="t", bundle=sys.argv[1], state=sys.argv[2]) as d:
            for _ in range(100):
                d.predict([0.5] * 490)
            print(json.dumps({"peak": footprint.peak_kib() / 1024}))
    """
    found = run(code, str(tmp_path / "x.fedge"), str(tmp_path / "state"))
    assert 30 < float(str(found["peak"])) <= 75


def test_handing_memory_back_changes_no_answer() -> None:
    bundle = mlp(quantized=True)
    model = open_model(bundle, bundle.member("params.bin"), 0)
    x, _ = examples(8)
    before = model.predict(x)
    for _ in range(3):
        footprint.hand_back()
        np.testing.assert_array_equal(model.predict(x), before)


def test_the_public_names_are_what_the_reference_says() -> None:
    assert edge_sdk.__all__ == ["Bundle", "Device", "Trainer", "codec", "when"]
    assert all(getattr(edge_sdk, name) for name in edge_sdk.__all__)
    assert set(dir(edge_sdk)) == {*edge_sdk.__all__, "__version__"}
    assert not hasattr(edge_sdk, "Server")


def test_the_version_is_the_distributions() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert f'version = "{edge_sdk.__version__}"' in text


def test_without_a_mounted_proc_the_process_is_measured_otherwise(tmp_path: Path) -> None:
    assert footprint.peak_kib(tmp_path / "none") > 1000
    footprint.hand_back(tmp_path / "none")
