# SPDX-License-Identifier: Apache-2.0
"""Proves a 32-bit ARM device: Debian 12 armhf under user-mode emulation joins a federation here.

    sudo .venv/bin/python packaging/armhf/prove.py --json armhf.json

Makes a Debian 12 armhf file system with Debian's own python3, numpy, paho-mqtt and cryptography,
adds the tflite-runtime wheel and this checkout's own, and runs `fedge device run` in it. A
broker, a coordinator and a second, native device run on the host's loopback. The proof holds when
every round counts the armhf device's update and that device has switched to the last version.

Needs root, Debian or a derivative, mosquitto and the package index; two minutes on two cores.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from coordinator import ledger
from coordinator.broker import embedded
from coordinator.compiler import build, momentum
from coordinator.demo.processes import Process, stop_all
from coordinator.recipes import recipe

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = "python3,python3-numpy,python3-paho-mqtt,python3-cryptography,libstdc++6"
WHEEL = "tflite-runtime==2.14.0"
LIBRARIES = "/usr/lib/arm-linux-gnueabihf"
ROUNDS, ROWS, PATIENCE_S = 2, 60, 600.0
BINFMT = Path("/proc/sys/fs/binfmt_misc")
ARM_ELF = (
    rb":fedge-arm:M::\x7f\x45\x4c\x46\x01\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\x28\x00"
    rb":\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff"
    rb":/usr/bin/qemu-arm-static:F"
)


def main() -> int:
    """Make the file system, run the federation, print what was proven."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--root", type=Path, help="keep the armhf file system here; reused if there"
    )
    parser.add_argument("--mirror", default=_mirror(), help="of Debian, for the armhf packages")
    parser.add_argument("--json", type=Path, help="write the record there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fedge-armhf-") as made:
        root = args.root or Path(made) / "root"
        began = time.monotonic()
        _tools()
        _emulation()
        _file_system(root, args.mirror)
        record = asyncio.run(_federation(root, Path(made))) | {"seconds": time.monotonic() - began}
    print(json.dumps(record, indent=2))
    if args.json:
        args.json.write_text(json.dumps(record, indent=2) + "\n")
    return 0 if record["proven"] else 1


def _run(*command: str | Path, **options: Any) -> str:
    return subprocess.run(
        list(map(str, command)), check=True, capture_output=True, text=True, **options
    ).stdout


def _mirror() -> str:
    """Return the mirror that this machine's own packages come from."""
    places = [Path("/etc/apt/sources.list"), *Path("/etc/apt/sources.list.d").glob("*")]
    for place in filter(Path.is_file, places):
        found = re.search(r"^(?:URIs:|deb(?: \[.*\])?) (\S+)", place.read_text(), re.MULTILINE)
        if found:
            return found[1]
    return "http://deb.debian.org/debian"


def _tools() -> None:
    wanted = {"mmdebstrap": "mmdebstrap", "qemu-arm-static": "qemu-user-static"}
    missing = [package for command, package in wanted.items() if not shutil.which(command)]
    if missing:
        _run("apt-get", "update", "-q")
        _run("apt-get", "install", "-y", "-q", *missing)


def _emulation() -> None:
    """Let the kernel hand ARM programs to the emulator, children of ARM programs included."""
    if not (BINFMT / "register").exists():
        _run("mount", "-t", "binfmt_misc", "none", BINFMT)
    if not any(b"arm" in entry.name.encode() for entry in BINFMT.iterdir()):
        (BINFMT / "register").write_bytes(ARM_ELF)


def _file_system(root: Path, mirror: str) -> None:
    if not (root / "usr/bin/python3.11").exists():
        _run(
            "mmdebstrap", "--quiet", "--mode=root", "--architectures=armhf", "--variant=extract",
            f"--include={PACKAGES}", "bookworm", root, mirror,
        )  # fmt: skip
    home = root / "opt/fedge"
    shutil.rmtree(home, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        _run(
            sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:",
            "--platform=manylinux_2_34_armv7l", "--python-version=311", "--implementation=cp",
            f"--dest={folder}", WHEEL,
        )  # fmt: skip
        _run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", f"-w{folder}", REPOSITORY)
        for wheel in Path(folder).glob("*.whl"):
            shutil.unpack_archive(wheel, home, "zip")


async def _federation(root: Path, folder: Path) -> dict[str, Any]:
    async with embedded() as url:
        return await asyncio.to_thread(_rounds, url, root, folder)


def _rounds(url: str, root: Path, folder: Path) -> dict[str, Any]:
    bundle_rows = _coordinator_files(folder, url)
    here = _device_files(folder / "native", url, "native", bundle_rows[:ROWS])
    there = _device_files(root / "srv/device", url, "armhf", bundle_rows[ROWS : 2 * ROWS])
    fedge = [sys.executable, "-m", "edge_sdk"]
    config = folder / "coordinator.toml"
    run = ["coordinator", "run", "--exit-when-done", "--config", str(config)]
    coordinator = Process([*fedge, *run], folder / "coordinator.log")
    arm = Process(
        ["chroot", str(root), "/usr/bin/python3.11", "-m", "edge_sdk", "device", "run",
         "--config", "/srv/device/device.toml"],
        folder / "armhf.log",
        {"PYTHONPATH": "/opt/fedge", "LD_LIBRARY_PATH": f"{LIBRARIES}/blas:{LIBRARIES}/lapack"},
    )  # fmt: skip
    native = Process([*fedge, "device", "run", "--config", str(here)], folder / "native.log")
    try:
        until = time.monotonic() + PATIENCE_S
        while coordinator.exit is None and arm.exit is None and time.monotonic() < until:
            time.sleep(0.5)
        _settle(there.parent)
    finally:
        stop_all([arm, native, coordinator])
    return _record(folder, there.parent, arm)


def _settle(device: Path) -> None:
    """Give the device the time to switch to the last version, too."""
    until = time.monotonic() + 60
    while _status(device).get("version") != ROUNDS and time.monotonic() < until:
        time.sleep(0.5)


def _coordinator_files(folder: Path, url: str) -> list[tuple[Any, Any]]:
    digits = recipe("digits")
    rows = digits.split(0)
    bundle = build(
        digits.build(0).SerializeToString(),
        loss="cross_entropy",
        train="all",
        optimizer=momentum(0.9, lr=0.05),
        engines=("onnx", "tflite"),
    )
    bundle.save(folder / "digits.fedge")
    pace = f"{{ cohort = 2, quorum = 2, deadline_s = 300, count = {ROUNDS} }}"
    (folder / "coordinator.toml").write_text(
        f'broker = "{url}"\nstore = "store"\n[task.armhf]\nbundle = "digits.fedge"\n'
        f'pace = ["rounds", {pace}]\nbudget = {{ epochs = 2, batch = 16 }}\n'
    )
    return list(zip(rows.devices.x, rows.devices.y, strict=True))


def _device_files(folder: Path, url: str, name: str, rows: list[tuple[Any, Any]]) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "inbox").mkdir(parents=True)
    xs, ys = zip(*rows, strict=True)
    np.savez(folder / "inbox" / "rows.npz", x=np.stack(xs), y=np.array(ys))
    (folder / "device.toml").write_text(
        f'broker = "{url}"\ntask = "armhf"\nstate = "state"\nname = "{name}"\n'
        f'min_examples = {len(rows)}\n[source]\nfolder = "inbox"\npoll_s = 1.0\n'
    )
    return folder / "device.toml"


def _status(device: Path) -> dict[str, Any]:
    file = device / "state" / "status.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return found


def _record(folder: Path, device: Path, arm: Process) -> dict[str, Any]:
    status, store = _status(device), folder / "store"
    updates = ledger.updates(store) if (store / ledger.DATABASE).exists() else []
    mine = [u for u in updates if u["device"] == status.get("device")]
    counted = [u for u in mine if u["outcome"] == "counted" and (u["folded"] or 0) > 0]
    return {
        "proven": len(counted) == ROUNDS and status.get("version") == ROUNDS,
        "counted": len(counted),
        "rounds": ROUNDS,
        "version_in_use": status.get("version"),
        "receipts": status.get("receipts"),
        "engine": "tflite-runtime 2.14.0",
        "system": "Debian 12 armhf, Python 3.11, numpy 1.24, paho-mqtt 1.6, cryptography 38",
        "last_line": arm.last_line(),
    }


if __name__ == "__main__":
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    sys.exit(main())
