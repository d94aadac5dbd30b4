# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import hand_bundles
import pytest

from coordinator import config
from coordinator.config import Config
from coordinator.task import Task
from edge_sdk.errors import BundleError, ConfigError

PAGE = Path(__file__).parents[2] / "docs/reference/coordinator-config.md"
GOOD = """
broker = "mqtts://hub.farm.example"
store = "state"
ca_file = "ca.pem"
username = "fedge"
password_file = "secret"

[task.pump-anomaly]
bundle = "pump.fedge"
pace = ["rounds", { cohort = 20, quorum = 12, deadline_s = 600 }]
strategy = ["fedadam", { lr = 0.02 }]
codec = [["ef"], ["deadzone", 2.0]]
budget = { epochs = 2, batch = 16, lr = 0.1 }
late = "refuse"

[task.other]
bundle = "/srv/other.fedge"
pace = ["rounds", { cohort = 2, deadline_s = 60, count = 5 }]
"""


def load(tmp_path: Path, text: str) -> Config:
    file = tmp_path / "coordinator.toml"
    file.write_text(text)
    return config.load(file)


def test_a_configuration_becomes_tasks_and_paces(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("hush\n")
    found = load(tmp_path, GOOD)
    (other, slow), (pump, pace) = found.tasks
    assert (pump.name, other.name) == ("pump-anomaly", "other")
    assert (pace.cohort, pace.quorum, pace.last_version) == (20, 12, None)
    assert (slow.quorum, slow.last_version) == (1, 5)
    assert pump.strategy.name == "fedadam"
    assert pump.codec_spec == [["ef"], ["deadzone", 2.0]]
    assert (pump.epochs, pump.batch, pump.lr, pump.late) == (2, 16, 0.1, "refuse")
    assert pump.bundle == tmp_path / "pump.fedge"
    assert other.bundle == Path("/srv/other.fedge")
    assert (found.store, found.ca_file) == (tmp_path / "state", tmp_path / "ca.pem")
    assert found.password() == "hush"
    assert found.embedded_port is None


@pytest.mark.parametrize(
    ("broker", "port"), [("embedded", 1883), ("embedded:18830", 18830), ("mqtt://h", None)]
)
def test_the_broker_may_be_embedded(tmp_path: Path, broker: str, port: int | None) -> None:
    text = GOOD.replace("mqtts://hub.farm.example", broker)
    assert load(tmp_path, text).embedded_port == port


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("store =", "stroe =", "did you mean store?"),
        ('bundle = "pump', 'bundel = "pump', "did you mean bundle?"),
        ("epochs = 2", "epoch = 2", "did you mean epochs?"),
        ("late =", "xyzzy =", "it takes bundle, pace"),
        ("cohort = 20", "cohrt = 20", "cohort"),
        ("fedadam", "fedadamant", "fedadam"),
        ('["deadzone", 2.0]', '["dedzone", 2.0]', "stage"),
        ("pump-anomaly", "Pump_Anomaly", "task name"),
        ("mqtts://", "https://", "expected broker"),
        ('"refuse"', '"maybe"', "late"),
        ("quorum = 12", "quorum = 21", "quorum"),
        ("epochs = 2", "epochs = 0", "epochs"),
        ("lr = 0.1", "lr = -1", "lr"),
        ("budget = {", "budget = 3 # {", "budget"),
        ('store = "state"', "store = 3", "store"),
        ('bundle = "pump.fedge"', "", "bundle"),
        ("[task.other]", "[task.other", "TOML"),
        ('late = "refuse"', 'late = "refuse"\nmax_norm = 1e9', "max_norm"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_that_says_what_to_do(
    tmp_path: Path, old: str, new: str, says: str
) -> None:
    assert old in GOOD
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, GOOD.replace(old, new, 1))
    message = str(caught.value)
    assert says in message
    assert "coordinator.toml" in message
    assert "\n" not in message


def test_a_configuration_needs_a_task(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least one"):
        load(tmp_path, 'broker = "embedded"')


def test_a_missing_file_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        config.load(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="password_file"):
        load(tmp_path, GOOD).password()


def test_a_budget_in_steps_is_not_cut_short_by_the_default_epoch(tmp_path: Path) -> None:
    text = GOOD.replace("epochs = 2, batch = 16, lr = 0.1", "steps = 40")
    task = load(tmp_path, text).tasks[1][0]
    assert (task.epochs, task.steps) == (None, 40)


def test_a_bundle_is_read_when_the_task_is_loaded(tmp_path: Path) -> None:
    hand_bundles.mlp().save(tmp_path / "x.fedge")
    assert Task("t", tmp_path / "x.fedge").load().digest == hand_bundles.mlp().digest
    with pytest.raises(ConfigError, match="No such file"):
        Task("t", tmp_path / "none.fedge").load()
    (tmp_path / "bad.fedge").write_bytes(b"PK nonsense")
    with pytest.raises(BundleError):
        Task("t", tmp_path / "bad.fedge").load()
    with pytest.raises(ConfigError, match="proximal"):
        Task("t", tmp_path / "x.fedge", mu=0.1).load()


def test_a_task_needs_some_budget() -> None:
    with pytest.raises(ConfigError, match="epochs, steps or seconds"):
        Task("t", "x.fedge", epochs=None)


def test_every_key_is_documented() -> None:
    text = PAGE.read_text()
    keys = {*config._TOP, *config._TASK, *config._BUDGET} - {"task"}
    keys |= {"cohort", "quorum", "deadline_s", "count", "overselect", "select_s"}
    assert [key for key in sorted(keys) if f"`{key}`" not in text] == []


def test_the_example_of_the_documentation_is_sound(tmp_path: Path) -> None:
    example = PAGE.read_text().split("```toml\n")[1].split("```")[0]
    assert load(tmp_path, example).tasks[0][0].name == "pump-anomaly"
