# SPDX-License-Identifier: Apache-2.0
"""The folder of wheels that a package carries: fetched by hash, and stripped of what never runs."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path

from pack.locks import Lock, Locked, platform_options, read

# In the locks because pip wants every requirement; never imported by what runs here. Of cffi the
# compiled half alone is: cryptography loads it.
NOT_NEEDED = ("cffi", "flatbuffers", "google", "packaging", "protobuf", "pycparser")
STRIPPED = (
    "*.a", "*.h", "*.lib", "*.pxd", "*.pyi", "*.pyx", "*.md",
    "numpy/f2py", "numpy/_pyinstaller", "numpy/**/tests", "numpy/random/_examples",
    "numpy/testing", "numpy/_core/_*_tests.*.so", "numpy/_core/_simd.*.so",
    "onnxruntime/backend", "onnxruntime/datasets", "onnxruntime/quantization", "onnxruntime/tools",
    "onnxruntime/transformers",
    "*.dist-info/RECORD", "*.dist-info/INSTALLER", "*.dist-info/sboms",
)  # fmt: skip


def fetch(lock: Lock, into: Path) -> list[Path]:
    """Download what `lock` names; a file with another hash is refused by pip."""
    words = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    words += ["--only-binary=:all:", f"--dest={into}", f"--requirement={lock.file}"]
    words += platform_options(lock.machine, lock.python)
    subprocess.run(words, check=True, stderr=subprocess.DEVNULL)
    return sorted(into.glob("*.whl"))


def unpack(wheels: Iterable[Path], home: Path) -> None:
    """Unpack `wheels` into `home`, and leave out what a device never runs."""
    home.mkdir(parents=True, exist_ok=True)
    for wheel in wheels:
        zipfile.ZipFile(wheel).extractall(home)
    for pattern in STRIPPED:
        for path in list(home.rglob(pattern) if "/" not in pattern else home.glob(pattern)):
            _remove(path)
    for name in NOT_NEEDED:
        for path in home.glob(f"{name}*.dist-info"):
            if name != "cffi":
                _remove(path)
        _remove(home / name)


def carried(lock: Lock) -> list[Locked]:
    """Return the lines of `lock` whose code ends up in the package."""
    return [line for line in read(lock.name) if line.name == "cffi" or line.name not in NOT_NEEDED]


def only_commands_of(home: Path, packages: Iterable[str]) -> None:
    """Offer no subcommand of `fedge` whose package was left out of `home`."""
    for package in packages:
        _remove(home / package)
    for entries in home.glob("fedge-*.dist-info/entry_points.txt"):
        lines = entries.read_text().splitlines()
        kept = [line for line in lines if line.partition("= ")[2].split(".")[0] not in packages]
        entries.write_text("\n".join(kept) + "\n")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
