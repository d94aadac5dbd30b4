# SPDX-License-Identifier: Apache-2.0
"""What goes into the packages: units, settings, locks, bills. `packaging/test` tries them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from coordinator import config as coordinator_config
from edge_sdk import device_config
from edge_sdk.errors import ConfigError

PACKAGING = Path(__file__).resolve().parents[2] / "packaging"
sys.path.insert(0, str(PACKAGING))

from pack import deb, locks, repository, sbom, source, vendor  # noqa: E402

LOCKS = locks.all_locks()
UNITS = ("fedge-device", "fedge-coordinator")


def unit(name: str) -> str:
    return (PACKAGING / "systemd" / f"{name}.service").read_text()


@pytest.mark.parametrize("name", UNITS)
def test_a_unit_is_watched_confined_and_silent(name: str) -> None:
    lines = unit(name).splitlines()
    for wanted in (
        "Type=notify", "DynamicUser=yes", "ProtectSystem=strict", "NoNewPrivileges=yes",
        "CapabilityBoundingSet=", "MemoryDenyWriteExecute=yes", "StateDirectoryMode=0700",
    ):  # fmt: skip
        assert wanted in lines
    assert any(line.startswith("WatchdogSec=") for line in lines)
    assert any(
        "ORT_DISABLE_TELEMETRY=1" in line for line in lines if line.startswith("Environment=")
    )
    assert "LoadCredential=broker-password:/etc/fedge/broker-password" in lines


@pytest.mark.parametrize("name", UNITS)
def test_the_watchdog_waits_longer_than_a_thread_may_idle(name: str) -> None:
    minutes = re.search(r"^WatchdogSec=(\d+)min$", unit(name), re.MULTILINE)
    assert minutes
    assert int(minutes[1]) >= 2


@pytest.mark.parametrize("name", UNITS)
@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_a_break_in_would_be_left_with_little(name: str, tmp_path: Path) -> None:
    limit = {"fedge-device": 2.2, "fedge-coordinator": 1.5}[name]
    file = tmp_path / f"{name}.service"
    file.write_text(unit(name))
    words = ["systemd-analyze", "security", "--offline=true", "--no-pager", str(file)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    exposed = re.search(r"exposure level for .*: ([\d.]+)", done.stdout)
    assert exposed, done.stderr
    assert float(exposed[1]) <= limit
    assert "Invalid" not in done.stderr


CONFINED = """
import ctypes, mmap, sys
assert ctypes.CDLL(None).prctl(65, 1, 0, 0, 0) == 0, "no PR_SET_MDWE"
try:
    mmap.mmap(-1, 4096, prot=mmap.PROT_WRITE | mmap.PROT_EXEC)
except PermissionError:
    from edge_sdk import selftest
    print([r.ok for r in selftest.run(sys.argv[1])])
"""


@pytest.mark.parametrize("engine", ["ort", "litert"])
def test_engines_need_no_memory_that_is_written_and_run(engine: str) -> None:
    """What MemoryDenyWriteExecute= forbids, asked of the kernel itself where it knows how."""
    if tuple(map(int, os.uname().release.split(".")[:2])) < (6, 3):
        return  # the kernel learned PR_SET_MDWE in 6.3: nothing to ask it
    words = [sys.executable, "-c", CONFINED, engine]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.strip() == str([True] * 5), done.stderr


def test_the_devices_settings_wait_for_a_broker_and_are_right_with_one(tmp_path: Path) -> None:
    text = (PACKAGING / "deb/fedge-device/device.toml").read_text()
    with pytest.raises(ConfigError, match="broker"):
        device_config.parse(tomllib.loads(text), tmp_path)
    whole = re.sub(r"^# (\w+ = |\[)", r"\1", text, flags=re.MULTILINE)
    found = device_config.parse(tomllib.loads(whole), tmp_path)
    assert str(found.state) == "/var/lib/fedge"
    assert str(found.password_file) == "/run/credentials/fedge-device.service/broker-password"
    assert re.search(r"^StateDirectory=fedge$", unit("fedge-device"), re.MULTILINE)


def test_the_coordinators_settings_wait_for_a_task_and_are_right_with_one(tmp_path: Path) -> None:
    text = (PACKAGING / "deb/fedge-coordinator/coordinator.toml").read_text()
    with pytest.raises(ConfigError, match="task"):
        coordinator_config.parse(tomllib.loads(text), tmp_path)
    whole = re.sub(r"^# (\w+ = |\[)", r"\1", text, flags=re.MULTILINE)
    found = coordinator_config.parse(tomllib.loads(whole), tmp_path)
    assert str(found.store) == "/var/lib/fedge-coordinator"


@pytest.mark.parametrize(
    ("name", "line"), [("device", 'broker = "mqtt://b"'), ("coordinator", "[task.x]")]
)
def test_a_unit_starts_when_its_settings_are_complete_and_not_before(
    name: str, line: str, tmp_path: Path
) -> None:
    file = f"{name}.toml"
    condition = re.search(r"^ExecCondition=(.*)$", unit(f"fedge-{name}"), re.MULTILINE)
    assert condition
    settings = tmp_path / file
    settings.write_text((PACKAGING / f"deb/fedge-{name}" / file).read_text())
    command = condition[1].replace(f"/etc/fedge/{file}", str(settings))
    assert subprocess.run(["sh", "-c", command], check=False).returncode == 1
    settings.write_text(settings.read_text() + f"\n{line}\n")
    assert subprocess.run(["sh", "-c", command], check=False).returncode == 0


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_a_lock_names_each_file_by_hash_and_nobodys_host(lock: locks.Lock) -> None:
    text, lines = lock.file.read_text(), locks.read(lock.name)
    assert text.count("==") - text.split("\n", 1)[0].count("==") == len(lines) > 0
    assert "://" not in text
    assert not re.search(r"^-", text, re.MULTILINE)
    assert len({line.name for line in lines}) == len(lines)


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_a_lock_is_of_what_the_project_asks_for_today(lock: locks.Lock) -> None:
    assert lock.file.read_text() == locks.text(lock, locks.read(lock.name))
    have = {line.name for line in locks.read(lock.name)}
    assert {re.split(r"[<>=;\[ ]", asked)[0] for asked in lock.asked} <= have


def test_no_lock_holds_an_onnxruntime_that_carries_telemetry() -> None:
    found = {
        line.version
        for lock in LOCKS
        for line in locks.read(lock.name)
        if line.name == "onnxruntime"
    }
    assert found == {"1.27.0"}


def test_a_bill_names_every_file_with_hash_and_licence_and_is_the_same_each_time() -> None:
    carried = locks.read("device-arm64-py313")
    text = sbom.bill("fedge-device", "1.0+deb13", carried, 1_700_000_000, "deb")
    assert text == sbom.bill("fedge-device", "1.0+deb13", reversed(carried), 1_700_000_000, "deb")
    bill = json.loads(text)
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    assert bill["metadata"]["timestamp"] == "2023-11-14T22:13:20Z"
    assert {c["name"] for c in bill["components"]} == {line.name for line in carried}
    for component in bill["components"]:
        assert re.fullmatch(r"[0-9a-f]{64}", component["hashes"][0]["content"])
        (licence,) = component["licenses"]
        assert "expression" in licence or licence["license"]["name"]
    refs = {c["bom-ref"] for c in bill["components"]}
    assert set(bill["dependencies"][0]["dependsOn"]) == refs
    assert {d["ref"] for d in bill["dependencies"]} == refs | {
        bill["metadata"]["component"]["bom-ref"]
    }


def test_what_a_package_carries_is_in_its_bill_and_what_it_leaves_out_is_not() -> None:
    lock = next(lock for lock in LOCKS if lock.name == "device-arm64-py313")
    names = {line.name for line in vendor.carried(lock)}
    assert names == {"cffi", "cryptography", "numpy", "onnxruntime", "paho-mqtt"}


@pytest.mark.parametrize(
    "target", deb.targets(), ids=lambda t: f"{t.recipe.name}-{t.arch}-{t.suite}"
)
def test_a_package_depends_on_what_it_does_not_carry(target: deb.Target) -> None:
    depends = " ".join(target.depends)
    carried = {line.name for line in vendor.carried(target.lock)} if target.lock else set()
    for package, debian in (("numpy", "python3-numpy"), ("paho-mqtt", "python3-paho-mqtt"),
                            ("cryptography", "python3-cryptography")):  # fmt: skip
        assert (package in carried) != (debian in depends)
    if target.recipe is deb.DEVICE:
        engines = {"onnxruntime", "tflite-runtime"} & carried
        assert bool(engines) != ("python3-onnxruntime" in depends)
    if target.lock:  # compiled for one Python alone
        major, minor = target.python.split(".")
        assert f"python3 (<< {major}.{int(minor) + 1})" in depends


def test_a_newer_debians_package_is_the_newer_one() -> None:
    old, new = (
        deb.Target(deb.DEVICE, "arm64", suite).version("1.0") for suite in ("bookworm", "trixie")
    )
    words = ["dpkg", "--compare-versions", old, "lt", new]
    assert subprocess.run(words, check=False).returncode == 0


def test_a_stripped_wheel_keeps_its_code_and_licences_and_loses_its_tests(tmp_path: Path) -> None:
    names = [
        "numpy/__init__.py", "numpy/tests/test_x.py", "numpy/f2py/x.py", "numpy/x.pyi",
        "numpy/_core/_simd.cpython-313.so", "numpy-2.0.dist-info/licenses/LICENSE.txt",
        "numpy-2.0.dist-info/RECORD", "google/protobuf/x.py", "protobuf-7.dist-info/METADATA",
    ]  # fmt: skip
    for name in names:
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text(name)
    wheel = shutil.make_archive(str(tmp_path / "x"), "zip", tmp_path / "in")
    vendor.unpack([Path(wheel)], tmp_path / "out")
    left = {
        str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()
    }
    assert left == {"numpy/__init__.py", "numpy-2.0.dist-info/licenses/LICENSE.txt"}


def test_an_apt_repository_takes_only_packages_that_name_their_debian(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\+deb13"):
        repository.add(tmp_path, [tmp_path / "fedge-device_1.0_arm64.deb"], "nobody")


def test_what_is_packed_is_the_commit_and_not_what_lies_about(tmp_path: Path) -> None:
    if not (source.REPOSITORY / ".git").exists():
        pytest.skip("not a checkout")
    stray = source.REPOSITORY / "edge_sdk" / "stray-of-a-test.py"
    stray.write_text("")
    try:
        made = source.export(tmp_path / "tree")
    finally:
        stray.unlink()
    assert not (made.folder / "edge_sdk" / stray.name).exists()
    assert (made.folder / "pyproject.toml").exists()
    assert made.epoch > 1_600_000_000
