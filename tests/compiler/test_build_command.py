# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from forward_models import cnn, mlp
from tflite_models import twins_int8

from coordinator.compiler.cli import build_main
from edge_sdk.bundle import Bundle
from edge_sdk.errors import CompileError


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "net.onnx"
    onnx.save(cnn(), path)
    return path


def test_it_writes_a_bundle_and_says_what_it_costs(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "net.fedge"
    args = ["--loss", "cross_entropy", "--train", "head.*", "fc.bias", "--optimizer", "momentum"]
    assert build_main([str(model), "-o", str(out), *args, "--lr", "0.02", "--clip", "1"]) == 0
    bundle = Bundle.load(out)
    assert list(bundle.shapes) == ["fc.bias", "head.weight", "head.bias"]
    assert bundle.manifest["optimizer"] == [
        ["clip", 1.0],
        ["momentum", {"decay": 0.9, "lr": 0.02}],
    ]
    assert bundle.manifest["name"] == "net"
    printed = capsys.readouterr().out
    assert bundle.digest in printed
    assert "trainable share" in printed


def test_a_tflite_file_is_built_and_passes_the_checks_of_a_device(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "net.tflite", tmp_path / "net.fedge"
    path.write_bytes(twins_int8())
    args = ["--loss", "cross_entropy", "--engines", "tflite", "onnx"]
    assert build_main([str(path), "-o", str(out), *args]) == 0
    bundle = Bundle.load(out)
    assert {form: sorted(roles) for form, roles in bundle.manifest["graphs"].items()} == {
        "onnx": ["evaluate", "predict", "train"],
        "tflite": ["evaluate", "predict", "train"],
    }
    assert (bundle.manifest["source"], bundle.manifest["name"]) == ("tflite", "net")
    bundle.check()
    assert "net" in capsys.readouterr().out


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_json_is_for_machines(
    optimizer: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "net.fedge"
    args = ["--loss", "mse", "--optimizer", optimizer, "--proximal", "--name", "pump", "--json"]
    assert build_main([str(model), "-o", str(out), *args]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == {
        "path": str(out),
        "digest": Bundle.load(out).digest,
        "bytes": out.stat().st_size,
    }
    assert Bundle.load(out).manifest["proximal"] is True


def test_a_model_in_the_way_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "old.onnx"
    onnx.save(mlp(opset=9), path)
    with pytest.raises(CompileError, match="opset 11"):
        build_main([str(path), "-o", str(tmp_path / "x.fedge"), "--loss", "mse"])
    assert not (tmp_path / "x.fedge").exists()


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        build_main(["--help"])
    assert "example: fedge build" in capsys.readouterr().out


def test_the_package_is_light_until_a_name_is_used() -> None:
    code = (
        "import sys, coordinator.compiler as c; assert 'onnx' not in sys.modules;"
        "c.build; assert callable(c.build) and 'onnx' in sys.modules;"
        "from coordinator.compiler import build, export, sgd, momentum, adam, chain, clip"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
