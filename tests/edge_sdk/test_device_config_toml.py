# SPDX-License-Identifier: Apache-2.0
"""device.toml: what it may say, and how a mistake in it is told. And failpoints."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from edge_sdk import device_config
from edge_sdk.device_config import DeviceConfig, SourceConfig
from edge_sdk.errors import ConfigError
from edge_sdk.failpoints import Failpoints
from edge_sdk.training import CHECKPOINT_S
from edge_sdk.trial import Terms

TASK = 'task = "pump"\n'
FULL = """
broker = "mqtts://hub.example"
task = "pump"
state = "state"
bundle = "pump.fedge"
name = "pump 7"
threads = 2
capacity = 500
min_examples = 20
conditions = ["on_mains", ["cooler_than", 70]]
coordinator_key = "KEY"
ca_file = "/etc/ca.pem"
username = "pump7"
password_file = "secret"
log_level = "debug"
[source]
folder = "inbox"
poll_s = 1
"""


def load(folder: Path, text: str) -> DeviceConfig:
    (folder / "device.toml").write_text(text.replace("KEY", "ab" * 32))
    return device_config.load(folder / "device.toml")


def test_everything_it_may_say_is_read_and_paths_start_at_its_folder(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s3cret\n")
    config = load(tmp_path, FULL)
    assert config.state == tmp_path / "state"
    assert config.ca_file == Path("/etc/ca.pem")
    assert config.conditions.name == "on_mains & cooler_than(70)"
    assert config.coordinator_key == b"\xab" * 32
    assert config.password == "s3cret"
    assert config.source == SourceConfig(folder=tmp_path / "inbox", poll_s=1.0)


def test_a_minimal_file_is_a_broker_and_a_task(tmp_path: Path) -> None:
    config = load(tmp_path, 'broker = "mqtt://hub"\ntask = "pump"')
    assert config.conditions.name == "always"
    assert config.password is None
    assert (config.state, config.source, config.capacity) == (None, None, 2000)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ('brokre = "x"', "unknown key brokre; did you mean broker?"),
        ("zzzz = 1", "unknown key zzzz; known keys: broker"),
        ("threads = 0", "threads: expected a whole number of at least 1, got 0"),
        ("threads = true", "threads: expected a whole number"),
        ('conditions = ["idel"]', "conditions: expected any of"),
        ('coordinator_key = "12"', "coordinator_key: expected 64 hex digits"),
        ('task = "No Task"', "task"),
        ('log_level = "loud"', "log_level: expected debug"),
        ("source = 3", r"expected a table \[source\]"),
        ("name = [", "not TOML"),
        ("[source]", "either folder or socket"),
        ('[source]\nfolder = "a"\nsocket = "b"', "either folder or socket"),
        ('[source]\nfolder = "a"\npoll_s = 0.001', "poll_s: expected 0.05"),
        ('[source]\nfodler = "a"', r"unknown key source.fodler; did you mean source.folder\?"),
        ('[source]\npoll_s = "soon"', "source.poll_s: expected a number, got 'soon'"),
    ],
)
def test_a_mistake_is_one_line_that_names_file_key_and_remedy(
    tmp_path: Path, change: str, says: str
) -> None:
    with pytest.raises(ConfigError, match=says.replace("?", r"\?").replace(r"\\?", r"\?")) as told:
        load(tmp_path, f'{TASK if "task" not in change else ""}broker = "mqtt://hub"\n{change}')
    assert str(told.value).startswith(str(tmp_path / "device.toml"))
    assert "\n" not in str(told.value) or "TOML" in str(told.value)


def test_what_must_be_there_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="task: expected a value"):
        load(tmp_path, 'broker = "mqtt://hub"')
    with pytest.raises(ConfigError, match="give --config"):
        device_config.load(tmp_path / "nowhere.toml")
    config = load(tmp_path, 'broker = "b"\ntask = "t"\nusername = "u"\npassword_file = "gone"')
    with pytest.raises(ConfigError, match="password_file"):
        _ = config.password


def test_the_reference_page_names_every_key() -> None:
    page = (Path(__file__).parents[2] / "docs/reference/device-config.md").read_text()
    keys = [*DeviceConfig.__dataclass_fields__, *SourceConfig.__dataclass_fields__]
    assert [key for key in keys if not re.search(rf"`\[?{key}\]?`", page)] == []


def test_a_failpoint_acts_at_each_visit_or_at_the_one_that_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slept: list[float] = []
    monkeypatch.setattr("edge_sdk.failpoints.time.sleep", slept.append)
    points = Failpoints("after_train:sleep=8@2, invited:sleep=0.5")
    points.reach("after_train")
    points.reach("after_send")
    assert slept == []
    for point in ("invited", "invited", "after_train", "after_train"):
        points.reach(point)
    assert slept == [0.5, 0.5, 8.0]


@pytest.mark.parametrize("spec", ["nowhere:kill", "invited", "invited:explode", "invited:sleep=x"])
def test_a_wrong_failpoint_is_a_config_error(spec: str) -> None:
    with pytest.raises(ConfigError, match="FEDGE_FAILPOINTS"):
        Failpoints(spec)


def test_failpoints_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDGE_FAILPOINTS", "on_receipt:kill@99")
    Failpoints.from_environment().reach("on_receipt")
    monkeypatch.delenv("FEDGE_FAILPOINTS")
    Failpoints.from_environment().reach("on_receipt")


def test_checkpoints_and_trials_are_set_in_the_file() -> None:
    base = {"broker": "mqtts://b", "task": "t"}
    config = device_config.parse(base)
    assert (config.checkpoint_s, config.trial) == (CHECKPOINT_S, Terms())
    trial = {"answers": 5, "seconds": 10, "starts": 2, "margin": 0.05}
    config = device_config.parse(
        {**base, "checkpoint_s": 0, "trial": trial, "limits": {"max_disk_bytes": 9_000_000}}
    )
    assert config.checkpoint_s == 0
    assert config.trial == Terms(5, 10.0, 2, 0.05)
    assert config.limits.max_disk_bytes == 9_000_000
    with pytest.raises(ConfigError, match="checkpoint_s: expected seconds from 0"):
        device_config.parse({**base, "checkpoint_s": -1})
    with pytest.raises(ConfigError, match=r"trial: expected a margin from 0"):
        device_config.parse({**base, "trial": {"margin": -1}})
    with pytest.raises(ConfigError, match=r"trial\.starts"):
        device_config.parse({**base, "trial": {"starts": 0}})
