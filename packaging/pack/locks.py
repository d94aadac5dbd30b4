# SPDX-License-Identifier: Apache-2.0
"""Locked sets: exactly these files, by hash, for one platform and one Python.

``python -m pack.locks`` asks the package index anew and writes ``packaging/locks/*.txt``, which
``pip install --require-hashes -r`` takes as they are.
"""

from __future__ import annotations

import email
import hashlib
import re
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from pack.source import REPOSITORY

FOLDER = REPOSITORY / "packaging" / "locks"
# The newest onnxruntime whose Linux wheels were seen to carry no telemetry code: 44 MB unpacked
# against 64, and it runs on every core we support.
ENGINE = "onnxruntime==1.27.0"
ARM_LITE = "tflite-runtime==2.14.0"
MACHINES = {"arm64": "aarch64", "amd64": "x86_64", "armhf": "armv7l"}
# Debian 12 has glibc 2.36, Debian 13 has 2.41.
GLIBC = (28, 27, 26, 24, 17, 31, 34, 35)


class Lock(NamedTuple):
    """One locked set: what it is for, and what is asked for."""

    name: str
    machine: str
    """A Debian architecture."""
    python: str
    asked: tuple[str, ...]
    has_dependencies: bool = True

    @property
    def file(self) -> Path:
        """Where it stands."""
        return FOLDER / f"{self.name}.txt"


class Locked(NamedTuple):
    """One file of a lock."""

    name: str
    version: str
    sha256: str
    licence: str
    """As its maker states it: an SPDX expression, or words."""


def all_locks() -> list[Lock]:
    """Return every lock, from what ``pyproject.toml`` asks for today."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    device = tuple(project["dependencies"])
    coordinator = (*device, *extras["coordinator"], *extras["compiler"], ENGINE)
    locks = [
        Lock(f"{what}-{machine}-py{python.replace('.', '')}", machine, python, asked)
        for what, asked in (("device", (*device, ENGINE)), ("coordinator", coordinator))
        for machine in ("arm64", "amd64")
        for python in ("3.11", "3.13")
    ]
    locks.append(Lock("device-armhf-py311", "armhf", "3.11", (ARM_LITE,), has_dependencies=False))
    locks.append(Lock("tools", "amd64", "3.11", ("hatchling>=1.25",)))  # pure Python: any machine
    return locks


def read(name: str) -> list[Locked]:
    """Return the lines of the lock `name`."""
    text = (FOLDER / f"{name}.txt").read_text().replace("\\\n", " ")
    line = r"^# (.*)\n([\w.-]+)==(\S+)\s+--hash=sha256:([0-9a-f]{64})$"
    found = re.findall(line, text, re.MULTILINE)
    return [Locked(name, version, digest, licence) for licence, name, version, digest in found]


def platform_options(machine: str, python: str) -> list[str]:
    """Return how pip is told to look for another machine's wheels."""
    tags = [f"--platform=manylinux_2_{minor}_{MACHINES[machine]}" for minor in GLIBC]
    tags += [f"--platform=manylinux2014_{MACHINES[machine]}"]
    return [*tags, f"--python-version={python}", "--implementation=cp"]


def resolve(lock: Lock) -> list[Locked]:
    """Ask the index which files satisfy `lock` today, and take the hashes of what it sent."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:"]
        words += [f"--dest={folder}", *platform_options(lock.machine, lock.python)]
        words += [] if lock.has_dependencies else ["--no-deps"]
        subprocess.run([*words, *lock.asked], check=True, stderr=subprocess.DEVNULL)
        return sorted(_locked(wheel) for wheel in Path(folder).glob("*.whl"))


def _locked(wheel: Path) -> Locked:
    name, version, _ = wheel.name.split("-", 2)
    plain = re.sub(r"[-_.]+", "-", name).lower()
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return Locked(plain, version, digest, _licence(wheel))


def _licence(wheel: Path) -> str:
    with zipfile.ZipFile(wheel) as archive:
        file = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(file))
    stated = [metadata.get("License-Expression"), metadata.get("License")]
    classified = [c for c in metadata.get_all("Classifier", []) if c.startswith("License ::")]
    stated += [c.rpartition(" :: ")[2] for c in classified]
    return next((s for s in stated if s and "\n" not in s and len(s) < 60), "not stated")


def text(lock: Lock, lines: Iterable[Locked]) -> str:
    """Return the file: one package, one wheel, one hash."""
    asked = ", ".join(lock.asked)
    head = f"# For Debian's {lock.machine} with Python {lock.python}: {asked}.\n"
    made = "# Made by packaging/lock; do not edit.\n"
    return (
        head
        + made
        + "".join(f"# {li}\n{n}=={v} \\\n    --hash=sha256:{h}\n" for n, v, h, li in lines)
    )


def main() -> int:
    """Write every lock, or those named."""
    if sys.version_info[:2] != (3, 11):  # markers such as python_version < "3.13" are ours
        print("run this with Python 3.11, the oldest that the locks are for", file=sys.stderr)
        return 2
    for lock in all_locks():
        if not sys.argv[1:] or lock.name in sys.argv[1:]:
            FOLDER.mkdir(exist_ok=True)
            lock.file.write_text(text(lock, resolve(lock)))
            print(lock.file.relative_to(REPOSITORY))
    return 0


if __name__ == "__main__":
    sys.exit(main())
