# SPDX-License-Identifier: Apache-2.0
"""Run beside an installed fedge-device: makes a state worth keeping, or says what is in one.

``state.py make FOLDER`` leaves an identity, a model, examples and an update without a receipt;
``state.py show FOLDER`` prints what the code that is installed now finds of them.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

sys.path.insert(0, "/opt/fedge/device/lib")

from edge_sdk import Device, selftest
from edge_sdk.outbox import Entry, Outbox

OPTIONS = {"task": "kept", "broker": "mqtt://127.0.0.1:9"}


def make(folder: Path) -> None:
    """Be a device that has learned and has something to send."""
    with Device(bundle=selftest.BUNDLE, state=folder, **OPTIONS) as device:
        device.learn_many(*selftest.rows())
    frame = bytes(range(256)) * 4
    update = hashlib.sha256(frame).digest()[:16]
    Outbox(folder / "outbox").append(Entry(update=update, round=7, frame=frame))


def show(folder: Path) -> dict[str, object]:
    """Open the state as a device does, without a bundle of ours."""
    with Device(state=folder, **OPTIONS) as device:
        status = device.status()
        answers = device.predict(selftest.rows()[0][:4]).tolist()
    kept = ("device", "task", "version", "bundle", "model", "examples", "outbox")
    return {key: status[key] for key in kept} | {"answers": answers}


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]))
    print(json.dumps(show(Path(sys.argv[2])), sort_keys=True))
