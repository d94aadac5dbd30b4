# SPDX-License-Identifier: Apache-2.0
"""Run beside an installed fedge-device: makes a state worth keeping, or says what is in one.

``state.py make FOLDER`` leaves an identity, a model, examples and an update without a receipt;
``state.py show FOLDER`` prints what the code that is installed now finds of them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, "/opt/fedge/device/lib")

from edge_sdk import Device, messages, selftest, topics
from edge_sdk.outbox import Entry, Outbox
from edge_sdk.signing import DeviceKey

OPTIONS = {"task": "kept", "broker": "mqtt://127.0.0.1:9"}


def make(folder: Path) -> None:
    """Be a device that has learned and has something to send."""
    with Device(bundle=selftest.BUNDLE, state=folder, **OPTIONS) as device:
        device.learn_many(*selftest.rows())
    key = DeviceKey.load_or_create(folder / "identity.key")
    topic = topics.up(OPTIONS["task"], key.id, "update")
    learned = messages.Update(7, 0, 32, 4, 0.5, 1.0, body=bytes(range(256)))
    frame = messages.encode(learned, key, topic)
    update = messages.Signed(frame, topic).id
    Outbox(folder / "outbox").append(Entry(update, learned.round, frame))


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
