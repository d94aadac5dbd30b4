# SPDX-License-Identifier: Apache-2.0
"""Boots the card image in QEMU and proves that the board takes part, also over a power cut.

    sudo packaging/image/build --out dist
    sudo packaging/image/prove --image dist/fedge-VERSION-arm64.img --json image.json

On `-M virt` with Cortex-A53 and Cortex-A72 and 1 GB each: the settings on the boot partition are
taken and wiped, the board reaches a broker on this machine's loopback over TLS, its update is
counted in a complete round with two native devices, it receives the next version and predicts
with it. Power is cut twice. Once with an update sent and the coordinator dead, and then the broker
is killed too, so that the card alone has it: after the next boot it is sent and counted, once,
under its own name. Once in training. Identity, examples and model are there each time. On the
Cortex-A72 the package is also upgraded while its service runs, with an update waiting. The same
card image on `-M raspi3b` comes to its first receipt. Boots run one at a time.
Needs qemu-system-arm, mosquitto, mtools, fdisk.
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

from hub import Frame, Hub
from machine import BOARDS, MEMORY_MIB, Machine, needed

T = TypeVar("T")

PATIENCE_S = {"virt-cortex-a53": 420.0, "virt-cortex-a72": 420.0, "raspi3b": 1500.0}
MAX_HELLO_S, MAX_RSS_MIB, MAX_IMAGE_MB, MAX_DEB_MB = 60.0, 90.0, 220.0, 30.0
EPOCHS = {"virt-cortex-a53": 90, "virt-cortex-a72": 90, "raspi3b": 2}
"""Enough that a round lasts some seconds under emulation: power is cut within."""
VERSIONS = {"virt-cortex-a53": 3, "virt-cortex-a72": 4, "raspi3b": 1}
"""One for a round of no trouble, a cut before the receipt, a cut in training, and an upgrade."""
NEXT, NEXT_VERSION = "next.deb", "99.0"
OUTBOX = "(cd /var/lib/fedge/outbox; sha256sum *.update)"
UPGRADE = (
    "modprobe overlay && mkdir -p /run/over && mount -t tmpfs over /run/over || exit;"
    "for d in usr opt etc/alternatives etc/fedge etc/systemd var/lib/dpkg; do"
    " o=/run/over/$d; mkdir -p $o/up $o/work &&"
    " mount -t overlay -o lowerdir=/$d,upperdir=$o/up,workdir=$o/work over /$d || exit; done;"
    f"dpkg -i /boot/firmware/{NEXT} 2>&1 | cat"
)
"""The root is read-only, and a board's system is exchanged whole. To see a package's own upgrade
under systemd, what it writes to lies in memory here; the next boot has the old one again."""
SERVICE = (
    "dpkg-query -W -f '${Version} ' fedge-device; systemctl show -P MainPID fedge-device;"
    "systemctl is-active fedge-device"
)
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
    parser.add_argument("--next", type=Path, required=True, help="a later package, to upgrade to")
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
            record["boards"][board] = _board(board, args, folder / board, epoch)
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


def _board(board: str, args: argparse.Namespace, folder: Path, epoch: float) -> dict[str, Any]:
    found: dict[str, Any] = {"log": []}
    machine = Machine(board, args.image, folder)
    if VERSIONS[board] > 3:
        machine.put({NEXT: args.next.read_bytes()})
    since = datetime.fromtimestamp(epoch, UTC)
    rounds = VERSIONS[board]
    try:
        with Hub(folder / "hub", _port(), since=since, rounds=rounds, epochs=EPOCHS[board]) as hub:
            story = Story(machine, hub, found)
            story.first_receipt()
            if board != "raspi3b":
                story.next_version()
                if VERSIONS[board] > VERSIONS["virt-cortex-a53"]:
                    story.upgrade()
                story.cut_before_receipt()
                story.cut_in_training()
                story.idle()
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

    def cut_before_receipt(self) -> None:
        """Pull the plug between an update and its receipt: the card alone still knows of it."""
        seen, device = self._hub.seen, self._device
        kept, sent = self._unreceipted()
        number = sent.message.round
        self._cut()
        self._hub.renew_broker()
        self._expect("nobody else has the update", number not in self._rounds())
        cut_at = time.monotonic()
        self._again("cut_before_receipt", kept)
        found = self._found["cut_before_receipt"]
        found |= {"round": number, "update": sent.id, "size": len(sent.payload)}
        again = self._until(
            "the update is sent again", lambda: seen.of_round("update", device, number, cut_at)
        )
        self._expect(f"it is the same update: {sent.id}", again.id == sent.id)
        self._expect("the coordinator is still dead", number not in self._rounds())
        self._hub.start_coordinator()
        self._counted_once(sent)
        said = self._machine.ask("journalctl -u fedge-device -o cat --no-pager")
        self._expect("it was not trained again", f"training round={number} " not in said)
        found["journal"] = said.splitlines()

    def upgrade(self) -> None:
        """Go to the next package while the service runs, with an update that has no receipt."""
        kept, sent = self._unreceipted()
        before = self._machine.ask(SERVICE).split()
        waiting = self._machine.ask(OUTBOX)
        self._expect(f"the update waits: {waiting}", waiting.count(".update") == 1)
        began = time.monotonic()
        said = self._machine.ask(UPGRADE, self._patience_s)
        took_s = round(time.monotonic() - began, 1)
        after = self._until("the next package's service", lambda: self._restarted(before))
        self._expect(f"upgraded: {said[-300:]}", after[0].startswith(NEXT_VERSION))
        again = self._kept()
        self._expect(f"all is kept: {kept}, then {again}", _is_kept(kept, again))
        self._expect("the update, too", self._machine.ask(OUTBOX) == waiting)
        self._hub.start_coordinator()
        self._counted_once(sent)
        self._found["upgrade"] = {
            "seconds": took_s, "before": before, "after": after, "update": sent.id,
            "round": sent.message.round, "said": said.splitlines(), "kept": again,
        }  # fmt: skip

    def _restarted(self, before: list[str]) -> list[str] | None:
        after = self._machine.ask(SERVICE).split()
        is_new = len(after) == 3 and after[1] not in ("0", before[1])
        return after if is_new and after[2] == "active" else None

    def cut_in_training(self) -> None:
        """Pull the plug between an invite and the update; then everything is there and goes on."""
        device = self._device
        kept = self._kept()
        under_way = self._until("the next round", lambda: self._hub.under_way(device))
        time.sleep(3.0)
        self._expect(f"round {under_way} is under way", self._hub.under_way(device) == under_way)
        before = self._hub.outcomes(device)
        self._cut()
        self._again("cut_in_training", kept)
        self._found["cut_in_training"] |= {"round": under_way, "updates_before": before}
        versions = VERSIONS[self._name]
        self._until(f"version {versions}", lambda: self._hub.version() == versions)
        mine = [u for u in self._hub.updates(device) if u["folded"]]
        held = {u["folded"] for u in mine}
        self._expect(f"in every version: {sorted(held)}", held >= set(range(1, versions + 1)))
        self._until(
            f"version {versions} on the board", lambda: self._status().get("version") == versions
        )
        status = self._status()
        self._expect("the outbox is empty", status["outbox"] == 0)
        self._found["cut_in_training"] |= {
            "updates": self._hub.outcomes(device),
            "counted": len(mine),
            "version": status["version"],
        }

    def _unreceipted(self) -> tuple[dict[str, Any], Frame]:
        """Kill the coordinator in mid-round, and wait for the update that gets no receipt now."""
        seen, device = self._hub.seen, self._device
        number = self._until("the next round", lambda: self._hub.under_way(device))
        self._until("the board is invited", lambda: seen.of_round("invite", device, number))
        self._hub.kill_coordinator()
        self._note("the coordinator is killed")
        self._expect("before there is an update", number not in self._rounds())
        kept = self._kept()
        sent = self._until("an update is sent", lambda: seen.of_round("update", device, number))
        return kept, sent

    def _counted_once(self, sent: Frame) -> None:
        """See an update counted under its own id, once, though it arrives twice."""
        number, device, seen = sent.message.round, self._device, self._hub.seen
        self._until("the update in the journal", lambda: number in self._rounds())
        self._until("its receipt", lambda: seen.of_round("receipt", device, number, sent.at))
        seen.say_again(sent)
        self._until("the round's version", lambda: self._hub.round_of(number).get("closed_at"))
        mine = [u for u in self._hub.updates(device) if u["round"] == number]
        told = [(u["hash"], u["outcome"]) for u in mine]
        self._expect(f"counted once, as itself: {told}", told == [(sent.id, "counted")])
        version = self._hub.version()
        self._expect(f"it is in version {version}", mine[0]["folded"] == version)
        self._until("the outbox is empty", lambda: self._status().get("outbox") == 0)

    def _cut(self) -> None:
        self._machine.cut()
        self._note("power is cut")

    def _again(self, step: str, kept: dict[str, Any]) -> None:
        """Give power, and find everything that was there."""
        cut_at = time.monotonic()
        began = self._machine.on()
        seen = self._hub.seen
        at, again = self._until("hello", lambda: seen.hello(self._name, cut_at + 1))
        self._expect(f"the same device as before: {again}", again == self._device)
        after = self._kept()
        self._expect(f"nothing lost: {kept}, then {after}", _is_kept(kept, after))
        self._found[step] = {"hello_s": round(at - began, 1), "after": after}

    def _rounds(self) -> list[int]:
        return [update["round"] for update in self._hub.updates(self._device)]

    def idle(self) -> None:
        """See what it takes when there is nothing to do."""
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
            "cd /var/lib/fedge; sha256sum model.onnx identity.key /etc/machine-id;ls inbox/consumed"
        )
        status = self._status()
        model, *files = (line.split()[0][:16] for line in sums.splitlines())
        return {
            "model": model,
            "files": files,
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
        and (after["model"] == before["model"] or after["version"] != before["version"])
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
