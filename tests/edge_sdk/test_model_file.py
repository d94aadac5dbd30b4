# SPDX-License-Identifier: Apache-2.0
"""The model as a file: one version or the next, whatever is killed and whoever has it mapped."""

from __future__ import annotations

import mmap
import re
import shutil
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hand_bundles import mlp
from scripted_coordinator import weights_of

from edge_sdk import Device, files
from edge_sdk.errors import BundleError, ConfigError, StoreError
from edge_sdk.local import Local
from edge_sdk.model_file import ModelFile
from edge_sdk.params import unflatten
from edge_sdk.requantize import requantize
from edge_sdk.store import Store
from edge_sdk.transport.memory import MemoryBroker

BUNDLE = mlp(quantized=True)
FIRST, SECOND = BUNDLE.member("params.bin"), weights_of(BUNDLE, 0.5)


def model_of(weights: bytes) -> bytes:
    params = unflatten(np.frombuffer(weights, "<f4").astype(np.float32), BUNDLE.shapes)
    return requantize(BUNDLE, params)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(tmp_path / "state")
    yield opened
    opened.close()


def test_the_file_holds_the_model_in_use_from_the_start_and_after_each_switch(
    store: Store, tmp_path: Path
) -> None:
    path = tmp_path / "m.onnx"
    local = Local(store, BUNDLE, model_file=ModelFile(path))
    assert path.read_bytes() == model_of(FIRST)
    local.switch(bytes.fromhex(BUNDLE.digest), bytes.fromhex(store.put_weights(SECOND)), 1)
    assert path.read_bytes() == model_of(SECOND) != model_of(FIRST)
    local.close()


def test_a_file_that_is_lost_or_stale_is_put_right_at_the_next_start(
    store: Store, tmp_path: Path
) -> None:
    path = tmp_path / "m.onnx"
    Local(store, BUNDLE, model_file=ModelFile(path)).close()
    path.write_bytes(b"something else")
    (tmp_path / ".m.onnx.12-34.tmp").write_bytes(b"half of a model")
    (tmp_path / ".other.12-34.tmp").write_bytes(b"somebody else's")
    Local(store, None, model_file=ModelFile(path)).close()
    assert path.read_bytes() == model_of(FIRST)
    assert [p.name for p in tmp_path.glob(".*")] == [".other.12-34.tmp"]


def test_a_file_that_is_right_is_not_written_again(tmp_path: Path) -> None:
    file = ModelFile(tmp_path / "m.onnx")
    file.put(BUNDLE, FIRST)
    before = file.path.stat()
    file.put(BUNDLE, FIRST)
    assert (file.path.stat().st_ino, file.path.stat().st_mtime_ns) == (
        before.st_ino,
        before.st_mtime_ns,
    )


def test_whoever_has_the_old_file_mapped_goes_on_with_the_old_model(tmp_path: Path) -> None:
    file = ModelFile(tmp_path / "m.onnx")
    file.put(BUNDLE, FIRST)
    with file.path.open("rb") as opened, mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as seen:
        file.put(BUNDLE, SECOND)
        assert bytes(seen) == model_of(FIRST)
    assert file.path.read_bytes() == model_of(SECOND)


def test_a_disk_that_refuses_keeps_the_model_in_use(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.onnx"
    local = Local(store, BUNDLE, model_file=ModelFile(path))
    digest = bytes.fromhex(store.put_weights(SECOND))

    def full(*_: object, **__: object) -> None:
        raise StoreError("cannot write: No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(files, "write", full)
        with pytest.raises(StoreError, match="No space"):
            local.switch(bytes.fromhex(BUNDLE.digest), digest, 1)
    assert local.model is not None
    assert local.model.version == 0
    assert path.read_bytes() == model_of(FIRST)
    local.switch(bytes.fromhex(BUNDLE.digest), digest, 1)
    assert path.read_bytes() == model_of(SECOND)
    local.close()


@pytest.mark.parametrize("name", ["m.bin", "m", "no/such/folder/m.tflite"])
def test_a_name_that_cannot_be_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"model_file: expected .*, got"):
        ModelFile(tmp_path / name)


def test_a_bundle_without_that_format_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="predict graph in 'tflite'"):
        ModelFile(tmp_path / "m.tflite").put(BUNDLE, FIRST)
    assert not (tmp_path / "m.tflite").exists()


def test_a_device_keeps_the_file(tmp_path: Path) -> None:
    broker = MemoryBroker()
    path = tmp_path / "m.onnx"
    device = Device(
        "mqtt://nowhere",
        task="t",
        bundle=BUNDLE,
        state=tmp_path / "state",
        model_file=path,
        connect=broker.transport,
    )
    device.close()
    assert path.read_bytes() == model_of(FIRST)


SCRIPT = textwrap.dedent("""
    import os, sys
    from pathlib import Path
    from edge_sdk import files
    path = Path(sys.argv[1])
    data = sys.argv[2].encode() * 50_000
    files.sweep(path.parent, path.name)
    os.path.exists("/begin-here")
    files.write(path, data[:70_000], data[70_000:], mode=0o644)
    os.path.exists("/end-here")
""")
CALL = re.compile(r"^(?:\d+ +)?(\w+)\(")
HARMLESS = {"brk", "exit_group", "lseek", "mmap", "munmap", "rt_sigaction"}


def traced(path: Path, log: Path, *more: str) -> subprocess.CompletedProcess[bytes]:
    run = [sys.executable, "-I", "-B", "-c", SCRIPT, str(path), "2"]
    command = ["strace", "-f", "-qq", "-o", str(log), *more, *run]
    return subprocess.run(command, capture_output=True, check=False)


def between_marks(log: Path) -> list[tuple[str, int]]:
    """Return each system call between the marks, with its number among those of its name."""
    seen: Counter[str] = Counter()
    found, inside = [], False
    for line in log.read_text().splitlines():
        match = CALL.match(line)
        if match is None:
            continue
        seen[match[1]] += 1
        inside = (inside or "/begin-here" in line) and "/end-here" not in line
        if inside and match[1] not in HARMLESS:
            found.append((match[1], seen[match[1]]))
    return found[1:]


@pytest.mark.trace
def test_killed_at_any_system_call_the_file_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not on PATH")
    path, log = tmp_path / "m.tflite", tmp_path / "log"
    old, new = b"1" * 90_000, b"2" * 50_000
    assert traced(path, log).returncode == 0
    calls = between_marks(log)
    assert {"openat", "write", "fsync", "close"} < {name for name, _ in calls}
    seen = Counter[bytes]()
    for name, number in calls:
        path.write_bytes(old)
        if traced(path, log, "-e", f"inject={name}:signal=KILL:when={number}").returncode == 0:
            continue  # it began with fewer calls of that name this time
        assert path.read_bytes() in {old, new}, name
        seen[path.read_bytes()] += 1
        assert traced(path, log).returncode == 0
        assert path.read_bytes() == new
        assert sorted(p.name for p in tmp_path.iterdir()) == ["log", "m.tflite"]
    assert seen[old] >= 5
    assert seen[new] >= 2
    assert seen.total() >= 0.8 * len(calls)
