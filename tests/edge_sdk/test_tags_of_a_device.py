# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edge_sdk import device_config, messages, topics
from edge_sdk.device import Device
from edge_sdk.errors import ConfigError
from edge_sdk.messages import Status
from edge_sdk.settings import Settings, hello
from edge_sdk.signing import DeviceKey

BROKER = {"broker": "mqtt://localhost", "task": "t"}
SAID = {"site": "north", "ram_mib": 2048, "t": 1.5, "beta": True}


def test_tags_are_read_from_the_configuration() -> None:
    assert device_config.parse(BROKER).tags == {}
    assert device_config.parse(BROKER | {"tags": SAID}).tags == SAID


@pytest.mark.parametrize("bad", ["north", {"a b": 1}, {"a": [1]}, {f"t{i}": 1 for i in range(17)}])
def test_tags_that_could_not_be_said_are_refused_at_once(tmp_path: Path, bad: Any) -> None:
    with pytest.raises(ConfigError, match="tags: expected up to 16"):
        device_config.parse(BROKER | {"tags": bad})
    if isinstance(bad, dict):
        with pytest.raises(ConfigError, match="tags: expected up to 16"):
            Device("mqtt://localhost:1", task="t", state=tmp_path / "s", tags=bad)


def test_a_device_says_its_tags_whenever_it_says_that_it_is_there() -> None:
    key = DeviceKey.from_seed(bytes(32))
    topic = topics.status(key.id)
    for tags, expected in ((SAID, SAID), ({}, None)):
        settings = Settings(task="t", name="n", sdk="fedge 1", boot=1, tags=tags)
        for online in (True, False):
            status, _ = messages.decode(hello(key, settings, online=online), topic)
            assert isinstance(status, Status)
            assert (status.tags, status.online) == (expected, online)
