# SPDX-License-Identifier: Apache-2.0
"""A board under QEMU: its card is a file, settings are put on it, power comes and goes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import time
from pathlib import Path

CARD_BYTES = 4 * 2**30
SECTOR = 512
MEMORY_MIB = 1024
BOARDS = {
    "virt-cortex-a53": ("virt", "cortex-a53"),
    "virt-cortex-a72": ("virt", "cortex-a72"),
    "raspi3b": ("raspi3b", None),
}


class Machine:
    """One board and its card; `on` gives it power, `cut` takes it away as a pulled plug does."""

    def __init__(self, board: str, image: Path, folder: Path) -> None:
        self.board, self.folder = board, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.card = folder / "card.img"
        subprocess.run(["cp", "--sparse=always", image, self.card], check=True)
        with self.card.open("r+b") as card:
            card.truncate(CARD_BYTES)
        table = json.loads(_out("sfdisk", "--json", self.card))["partitiontable"]["partitions"]
        self._starts = [part["start"] * SECTOR for part in table]
        self._qemu: subprocess.Popen[bytes] | None = None
        self._console = folder / "console.log"
        self._shell = folder / "shell.sock"

    def put(self, files: dict[str, bytes]) -> None:
        """Write files to the boot partition, as a technician does."""
        for name, content in files.items():
            if "/" in name:
                with contextlib.suppress(subprocess.CalledProcessError):
                    self._mtool("mmd", f"::{name.rpartition('/')[0]}")
            local = self.folder / "put"
            local.write_bytes(content)
            self._mtool("mcopy", "-o", str(local), f"::{name}")
            local.unlink()

    def boot_files(self) -> list[str]:
        """Return the names on the boot partition."""
        listed = self._mtool("mdir", "-b", "-/", "::")
        return sorted(line.removeprefix("::/") for line in listed.splitlines() if line)

    def get(self, name: str) -> bytes:
        """Return a file of the boot partition."""
        return self._mtool("mtype", f"::{name}").encode()

    def on(self) -> float:
        """Give power; return when."""
        for name in ("vmlinuz", "initrd.img", "bcm2837-rpi-3-b.dtb"):
            (self.folder / name).unlink(missing_ok=True)
            self._mtool("mcopy", f"::{name}", str(self.folder / name))
        words = self._words()
        self._shell.unlink(missing_ok=True)
        began = time.monotonic()
        with (self.folder / "qemu.log").open("ab") as log:
            self._qemu = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        return began

    def cut(self) -> None:
        """Take the power away: what the guest had not written to its card is gone."""
        if self._qemu is not None:
            self._qemu.kill()
            self._qemu.wait()
            self._qemu = None

    @property
    def is_on(self) -> bool:
        """Whether it runs."""
        return self._qemu is not None and self._qemu.poll() is None

    def cpu_s(self) -> float:
        """Return the processor time of the emulation, which a busy host changes least."""
        if self._qemu is None:
            return 0.0
        fields = Path(f"/proc/{self._qemu.pid}/stat").read_text().rpartition(") ")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def console(self) -> str:
        """Return what the board has written to its serial line."""
        return self._console.read_text(errors="replace") if self._console.exists() else ""

    def ask(self, command: str, patience_s: float = 60.0) -> str:
        """Run a command in the guest's debug shell, which only the kernel's command line opens."""
        with socket.socket(socket.AF_UNIX) as line:
            line.connect(str(self._shell))
            line.settimeout(1.0)
            mark = f"{time.monotonic_ns():x}"
            line.sendall(f"\necho be'gin'{mark}; {command}; echo en'd'{mark}\n".encode())
            heard, until = "", time.monotonic() + patience_s
            while f"end{mark}" not in heard:
                if time.monotonic() > until:
                    raise TimeoutError(f"no answer to {command!r}: {heard[-300:]!r}")
                with contextlib.suppress(TimeoutError):
                    heard += line.recv(65536).decode(errors="replace")
        found = re.search(f"begin{mark}\r?\n(.*)end{mark}", heard, re.DOTALL)
        return found[1].replace("\r", "").strip() if found else ""

    def _words(self) -> list[str]:
        kind, cpu = BOARDS[self.board]
        cmdline = self.get("cmdline.txt").decode().strip()
        tty = "ttyAMA0" if cpu else "ttyS1"  # a Pi 3's first port is Bluetooth's
        cmdline = cmdline.replace("ttyS1", tty)
        cmdline += f" systemd.debug_shell systemd.default_debug_tty={tty}"
        cmdline += f" systemd.mask=serial-getty@{tty}.service"
        words = ["qemu-system-aarch64", "-M", kind, "-m", str(MEMORY_MIB), "-display", "none"]
        words += ["-kernel", str(self.folder / "vmlinuz")]
        words += ["-initrd", str(self.folder / "initrd.img"), "-no-reboot", "-monitor", "none"]
        words += [
            "-chardev",
            f"socket,id=tty,path={self._shell},server=on,wait=off,logfile={self._console},logappend=on",
            *([] if cpu else ["-serial", "null"]), "-serial", "chardev:tty",
            "-netdev", "user,id=net",
        ]  # fmt: skip
        if cpu:
            words += ["-cpu", cpu, "-smp", "2", "-device", "virtio-net-pci,netdev=net,romfile="]
            words += ["-drive", f"if=none,id=card,format=raw,file={self.card}"]
            words += ["-device", "virtio-blk-pci,drive=card", "-device", "virtio-rng-pci"]
        else:
            # QEMU takes the board's watchdog for a reset as soon as it is started.
            cmdline += " module_blacklist=bcm2835_wdt"
            words += ["-dtb", str(self.folder / "bcm2837-rpi-3-b.dtb")]
            words += ["-drive", f"if=sd,format=raw,file={self.card}"]
            words += ["-device", "usb-net,netdev=net"]
        return [*words, "-append", cmdline]

    def _mtool(self, tool: str, *words: str) -> str:
        return _out(tool, "-i", f"{self.card}@@{self._starts[0]}", *words)


def _out(*words: str | Path) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def needed() -> list[str]:
    """Return the programs of this proof that are not installed."""
    programs = ("qemu-system-aarch64", "mosquitto", "mosquitto_passwd", "mcopy", "sfdisk")
    return [name for name in programs if not shutil.which(name)]
