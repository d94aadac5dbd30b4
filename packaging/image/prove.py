# SPDX-License-Identifier: Apache-2.0
"""Boots the card image in QEMU and proves that the board takes part, also over a power cut.

    sudo packaging/image/build --out dist
    .venv/bin/python packaging/image/prove.py --image dist/fedge-VERSION-arm64.img --json image.json

On `-M virt` with Cortex-A53 and Cortex-A72 and 1 GB each: the settings on the boot partition are
taken and wiped, the board reaches a broker on this machine's loopback over TLS, its update is
counted in a complete round with two native devices, it receives the next version and predicts
with it; then power is cut in mid-round, and after the next boot identity, examples, model and
outbox are there and the round ends. The same card image on `-M raspi3b` comes to its first
receipt. Boots run one at a time. Needs qemu-system-arm, mosquitto, mtools, fdisk.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from hub import Hub
from machine import BOARDS, MEMORY_MIB, Machine, needed

T = TypeVar("T")

PATIENCE_S = {"virt-cortex-a53": 420.0, "virt-cortex-a72": 420.0, "raspi3b": 1500.0}
MAX_HELLO_S, MAX_RSS_MIB, MAX_IMAGE_MB, MAX_DEB_MB = 60.0, 90.0, 220.0, 30.0
EPOCHS = {"virt-cortex-a53": 90, "virt-cortex-a72": 90, "raspi3b": 2}
"""Enough that a round lasts some seconds under emulation: power is cut within."""
STATUS = "cat /var/lib/fedge/status.json"
PREDICT = (
    "ORT_DISABLE_TELEMETRY=1 PYTHONPATH=/opt/fedge/device/lib python3 -c '"
    "import numpy as n, onnxruntime as o;"
    's=o.InferenceSession("/var/lib/fedge/model.onnx");i=s.get_inputs()[0];'
    'x=n.load("/var/lib/fedge/inbox/consumed/rows.npz");'
    'v=x["x"].astype(n.float32).reshape([-1]+[d for d in i.shape[1:]]);'
    "p=s.run(None,{i.name:v})[0].argmax(-1);"
    'print("right",int((p==x["y"]).sum()),"of",len(p))\''
)


class Unproven(Exception):  # noqa: N818 - the proof's own ending
    """What did not hold."""


def main() -> int:
    """Run the proofs that were asked for; write the record; return 0 when all hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--image", type=Path, required=True, help="the .img, not packed")
    parser.add_argument("--board", action="append", choices=BOARDS, help="only these")
    parser.add_argument("--json", type=Path, help="write the record there")
    parser.add_argument("--folder", type=Path, help="keep cards and logs there")
    args = parser.parse_args()
    if missing := needed():
        sys.exit(
            f"expected {', '.join(missing)}; apt-get install qemu-system-arm mosquitto mtools fdisk"
        )
    with tempfile.TemporaryDirectory(prefix="fedge-prove-") as made:
        folder = args.folder or Path(made)
        built = args.image.with_suffix(".json")
        about = json.loads(built.read_text()) if built.exists() else {}
        epoch = about.get("epoch", args.image.stat().st_mtime)  # where a board's clock begins
        record: dict[str, Any] = {
            "command": "packaging/test --image",
            "machine": f"{os.cpu_count()} cores {platform.machine()}, {_qemu()}, no KVM",
            "built": about,
            "guest": f"{MEMORY_MIB} MiB, 2 cores (raspi3b: 4)",
            "boards": {},
        }
        for board in args.board or BOARDS:
            print(f"== {board}", flush=True)
            began = time.monotonic()
            record["boards"][board] = _board(board, args.image, folder / board, epoch)
            record["boards"][board]["seconds"] = round(time.monotonic() - began)
            print(json.dumps(record["boards"][board], indent=2), flush=True)
    record["falls_short"] = short(record)
    record["proven"] = not record["falls_short"]
    if args.json:
        args.json.write_text(json.dumps(record, indent=2) + "\n")
    for line in record["falls_short"]:
        print(f"falls short: {line}")
    return 0 if record["proven"] else 1


def short(record: dict[str, Any]) -> list[str]:
    """Return every claim that the record does not bear out."""
    lines = []
    for board, found in record["boards"].items():
        if "unproven" in found:
            lines.append(f"{board}: {found['unproven']}")
        if board == "raspi3b":
            continue
        if found.get("hello_s", 0) > MAX_HELLO_S:
            lines.append(f"{board}: first message after {found['hello_s']} s, over {MAX_HELLO_S}")
        if found.get("rss_mib", 0) > MAX_RSS_MIB:
            lines.append(f"{board}: {found['rss_mib']} MiB resident, over {MAX_RSS_MIB}")
    built = record["built"]
    if built.get("xz_bytes", 0) > MAX_IMAGE_MB * 1e6:
        lines.append(f"image of {built['xz_bytes']} bytes, over {MAX_IMAGE_MB} MB")
    if built.get("deb", {}).get("bytes", 0) > MAX_DEB_MB * 1e6:
        lines.append(f"deb of {built['deb']['bytes']} bytes, over {MAX_DEB_MB} MB")
    return lines


def _board(board: str, image: Path, folder: Path, epoch: float) -> dict[str, Any]:
    found: dict[str, Any] = {"log": []}
    machine = Machine(board, image, folder)
    since = datetime.fromtimestamp(epoch, UTC)
    rounds = 1 if board == "raspi3b" else 3
    try:
        with Hub(folder / "hub", _port(), since=since, rounds=rounds, epochs=EPOCHS[board]) as hub:
            story = Story(machine, hub, found)
            story.first_receipt()
            if board != "raspi3b":
                story.next_version()
                story.power_cut()
    except (Unproven, TimeoutError, OSError, subprocess.CalledProcessError) as error:
        found["unproven"] = " ".join(str(error).split())
        found["console"] = machine.console().splitlines()[-30:]
    finally:
        machine.cut()
    return found


class Story:
    """What one board goes through; each step adds its figures to the record, or ends it."""

    def __init__(self, machine: Machine, hub: Hub, found: dict[str, Any]) -> None:
        self._machine, self._hub, self._found = machine, hub, found
        self._name = machine.board
        self._patience_s = PATIENCE_S[machine.board]
        self._device = ""
        self._began = time.monotonic()

    def first_receipt(self) -> None:
        """From a fresh card to an update that is counted."""
        self._machine.put(self._hub.card(self._name))
        began = self._machine.on()
        at, self._device = self._until("hello", lambda: self._hub.seen.hello(self._name))
        self._found["hello_s"] = round(at - began, 1)
        self._found["hello_cpu_s"] = round(self._machine.cpu_s(), 1)
        self._found["device"] = self._device
        received = self._until("receipt", lambda: self._hub.seen.first("receipt", self._device))
        self._found["first_receipt_s"] = round(received - began, 1)
        counted = self._until("update in the journal", lambda: self._hub.updates(self._device))
        self._expect("the update is counted", counted[0]["outcome"] == "counted")
        self._found["first_update"] = {
            key: counted[0][key] for key in ("round", "outcome", "examples", "steps", "size")
        }
        left = [name for name in self._machine.boot_files() if "rows" in name or "password" in name]
        says = self._machine.get("fedge-says.txt")
        self._expect(f"the card is wiped, left: {left}", not left and says.startswith(b"OK"))
        self._found["card_says"] = says.decode().strip()

    def next_version(self) -> None:
        """A complete round: what it made is in use here, and predicts."""
        self._until("version 1", lambda: self._hub.version() >= 1)
        first = self._hub.round_of(1)
        self._expect("three updates make version 1", _folded(self._hub, 1) == 3)
        self._found["round"] = {"outcome": first.get("outcome"), "counted": 3}
        self._until("version 1 on the board", lambda: (self._status().get("version") or 0) >= 1)
        self._found["version_in_use"] = self._status()["version"]
        right = re.search(r"right (\d+) of (\d+)", self._machine.ask(PREDICT, 180))
        self._expect(
            "the model in use predicts", right is not None and int(right[1]) * 2 > int(right[2])
        )
        self._found["predicted"] = right[0] if right else None

    def power_cut(self) -> None:
        """Pull the plug between an invite and its receipt; then everything is there and goes on."""
        seen, device = self._hub.seen, self._device
        kept = self._kept()
        under_way = self._until("the next round", lambda: self._hub.under_way(device))
        time.sleep(3.0)
        self._expect(f"round {under_way} is under way", self._hub.under_way(device) == under_way)
        self._machine.cut()
        self._found["power_cut"] = {
            "round": under_way,
            "updates_before": self._hub.outcomes(device),
        }
        self._note("power is cut")
        cut_at = time.monotonic()
        began = self._machine.on()
        at, again = self._until("hello", lambda: seen.hello(self._name, cut_at + 1))
        self._expect(f"the same device as before: {again}", again == device)
        self._found["power_cut"]["hello_s"] = round(at - began, 1)
        after = self._kept()
        self._expect(f"nothing lost: {kept}, then {after}", _is_kept(kept, after))
        last = self._until("every round ends", lambda: self._hub.version() >= 3)
        self._expect("the last version is 3", last)
        mine = [u for u in self._hub.updates(device) if u["folded"]]
        self._expect(f"in every version, got {len(mine)}", len(mine) >= 3)
        self._until("version 3 on the board", lambda: self._status().get("version") == 3)
        status = self._status()
        self._expect("the outbox is empty", status["outbox"] == 0)
        self._found["power_cut"] |= {
            "updates": self._hub.outcomes(device),
            "after": after,
            "counted": len(mine),
            "version": status["version"],
        }
        self._idle()

    def _idle(self) -> None:
        rss = self._machine.ask(
            "grep -E 'VmRSS|VmHWM' /proc/$(systemctl show -P MainPID fedge-device)/status;"
            "systemctl show -P MemoryCurrent fedge-device; systemd-analyze time;"
            "systemctl --failed --no-legend --plain; df -h /data | tail -1"
        )
        self._found["idle"] = rss.splitlines()
        journal = self._machine.ask("journalctl -u fedge-device -o cat --no-pager")
        self._found["journal_after_the_cut"] = journal.splitlines()
        resident = re.search(r"VmRSS:\s+(\d+) kB", rss)
        self._expect("the service is there", resident is not None)
        self._found["rss_mib"] = round(int(resident[1]) / 1024, 1) if resident else None

    def _kept(self) -> dict[str, Any]:
        sums = self._machine.ask(
            "cd /var/lib/fedge; sha256sum identity.key /etc/machine-id; ls inbox/consumed"
        )
        status = self._status()
        return {
            "files": [line.split()[0][:16] for line in sums.splitlines()],
            "examples": status.get("examples"),
            "version": status.get("version"),
        }

    def _status(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads(self._machine.ask(STATUS))
        except (ValueError, OSError):
            return {}
        return found

    def _until(self, what: str, probe: Callable[[], T | None]) -> T:
        until = time.monotonic() + self._patience_s
        while time.monotonic() < until:
            if found := probe():
                self._note(what)
                return found
            if not self._machine.is_on:
                raise Unproven(f"the machine ended before: {what}")
            time.sleep(0.2)
        raise Unproven(f"not within {self._patience_s:.0f} s: {what}")

    def _expect(self, what: str, holds: bool) -> None:
        if not holds:
            raise Unproven(f"expected: {what}")
        self._note(f"holds: {what}")

    def _note(self, what: str) -> None:
        line = f"{time.monotonic() - self._began:7.1f} s  {what}"
        print(line, flush=True)
        self._found["log"].append(line)


def _folded(hub: Hub, version: int) -> int:
    from coordinator import ledger

    return sum(1 for update in ledger.updates(hub.folder / "store") if update["folded"] == version)


def _is_kept(before: dict[str, Any], after: dict[str, Any]) -> bool:
    return (
        before["files"] == after["files"]
        and before["examples"] == after["examples"]
        and (after["version"] or 0) >= (before["version"] or 0)
    )


def _port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _qemu() -> str:
    words = ["qemu-system-aarch64", "--version"]
    shown = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    found = re.search(r"version (\S+)", shown)
    return f"QEMU {found[1] if found else '?'}"


if __name__ == "__main__":
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    sys.exit(main())
