# SPDX-License-Identifier: Apache-2.0
"""The files that the processes of a run are given, as an operator would write them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from coordinator.demo.settings import Settings
from edge_sdk.bundle import Bundle

TASK = "demo"
POLL_S = 0.2
HOST_POLL_S = 1.0
"""A process of many devices has better things to do than to look into many folders."""


def coordinator_config(folder: Path, settings: Settings, broker: str, bundle: Bundle) -> Path:
    """Write `coordinator.toml` and the bundle; return the file to give to `--config`."""
    folder.mkdir(parents=True)
    bundle.save(folder / "model.fedge")
    pace = {
        "cohort": settings.cohort,
        "quorum": settings.quorum,
        "deadline_s": settings.deadline_s,
        "count": settings.rounds,
        "select_s": settings.select_s,
    }
    lines = [
        f"broker = {json.dumps(broker)}",
        'store = "store"',
        f"[task.{TASK}]",
        'bundle = "model.fedge"',
        f'pace = ["rounds", {_inline(pace)}]',
        f"codec = {json.dumps(settings.codec)}",
        f"budget = {_inline({'epochs': settings.epochs, 'batch': settings.batch})}",
        f"seed = {settings.seed}",
    ]
    return _write(folder / "coordinator.toml", lines)


def device_config(
    folder: Path,
    settings: Settings,
    broker: str,
    rows: tuple[NDArray[Any], NDArray[Any]],
    quantile: float | None = None,
) -> Path:
    """Write `device.toml` and the rows of one device; return the file to give to `--config`.

    `quantile`: of the errors on its own rows, for the device to tell.
    """
    inbox = folder / "inbox"
    inbox.mkdir(parents=True)
    np.savez(inbox / "rows.npz", x=rows[0], y=rows[1])
    _identity(folder / "state", f"fedge demo {settings.seed} {folder.name}")
    wanted = [] if quantile is None else [f"error_quantile = {quantile}"]
    poll_s = POLL_S if len(settings.groups) == settings.devices else HOST_POLL_S
    lines = [
        f"broker = {json.dumps(broker)}",
        f'task = "{TASK}"',
        'state = "state"',
        f"name = {json.dumps(folder.name)}",
        f"engine = {json.dumps(settings.engine)}",
        f"capacity = {len(rows[1])}",
        f"min_examples = {len(rows[1])}",
        *wanted,
        "[source]",
        'folder = "inbox"',
        f"poll_s = {poll_s}",
    ]
    return _write(folder / "device.toml", lines)


def _identity(state: Path, name: str) -> None:
    """Give a device a key that its name makes: what it trains, and so the demo, is the seed's.

    Of use to nobody else: the device speaks with a broker of the demo's own, on loopback.
    """
    key = Ed25519PrivateKey.from_private_bytes(hashlib.sha256(name.encode()).digest())
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    state.mkdir(mode=0o700)
    file = state / "identity.key"
    file.touch(0o600)
    file.write_bytes(key.private_bytes(encoding, form, serialization.NoEncryption()))


def _inline(values: dict[str, float]) -> str:
    return "{ " + ", ".join(f"{key} = {value}" for key, value in values.items()) + " }"


def _write(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join([*lines, ""]))
    return path


def status(folder: Path) -> dict[str, Any]:
    """Return what a device last wrote of itself; nothing when it never came that far."""
    file = folder / "state" / "status.json"
    if not file.exists():
        return {}
    found: dict[str, Any] = json.loads(file.read_text())
    return found
