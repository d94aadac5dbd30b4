# SPDX-License-Identifier: Apache-2.0
"""What a device is made of: its configuration, its packages, its engine, and no telemetry."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from edge_sdk.doctor.board import Board
from edge_sdk.doctor.finding import Amiss

PACKAGES = ("numpy", "paho-mqtt", "cryptography")
_TELEMETRY = Path("Microsoft/DeveloperTools/.onnxruntime")


def configuration(board: Board) -> str:
    """Say whether the files that the configuration names are there, and private."""
    config = board.config
    files = {"bundle": config.bundle, "ca_file": config.ca_file, "password": config.password_file}
    for key, path in files.items():
        if path is not None and not os.access(path, os.R_OK):
            raise Amiss(f"{key}: cannot read {path}", "correct the path, or its owner and mode")
    secret = config.password_file
    if secret is not None and secret.stat().st_mode & 0o077:
        raise Amiss(f"others may read {secret}", f"chmod 600 {secret}", "warn")
    return f"task {config.task}, broker {config.broker.rpartition('@')[2]}"


def packages(board: Board) -> str:  # noqa: ARG001 - as the other checks are called
    """Say which packages are installed."""
    from importlib.metadata import PackageNotFoundError, version

    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            raise Amiss(f"{package} is not installed", "pip install fedge") from None
    return f"python {sys.version.split()[0]}, {', '.join(found)}"


def engine(board: Board) -> str:
    """Say which engine runs the model, and why no other."""
    from edge_sdk import engine as engines

    bundle = board.bundle()
    if bundle is None:
        there = engines.installed()
        if not there:
            extras = " or ".join(f"pip install '{r.extra}'" for r in engines.ENGINES.values())
            raise Amiss("no engine is installed", extras)
        return f"{', '.join(there)} installed; the first bundle decides"
    chosen, reasons = engines.choose(bundle.manifest, board.config.engine)
    others = "; ".join(f"not {name}: {why}" for name, why in reasons.items() if name != chosen)
    return f"{chosen} {engines.ENGINES[chosen].version()}" + (f"; {others}" if others else "")


def telemetry(board: Board) -> str:
    """Look for what onnxruntime writes where its telemetry is on."""
    caches = [board.home / ".cache", board.state / ".cache"]
    if named := board.environ.get("XDG_CACHE_HOME"):
        caches.append(Path(named))
    for folder in (cache / _TELEMETRY for cache in caches):
        if folder.exists():
            raise Amiss(
                f"some program ran onnxruntime with its telemetry on: {folder}",
                f"rm -r {folder}, and set ORT_DISABLE_TELEMETRY=1 for that program",
                "warn",
            )
    return "off in every process of fedge, and onnxruntime has left no device id here"
