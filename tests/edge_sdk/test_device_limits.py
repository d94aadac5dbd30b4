# SPDX-License-Identifier: Apache-2.0
"""A device at a limit of its day: it stands aside, says why, and goes on predicting."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from device_scene import Clock, Scene
from hand_bundles import examples, mlp
from scripted_coordinator import weights_of

from edge_sdk import device_cli, device_config, errand
from edge_sdk.device import Device
from edge_sdk.errors import ConfigError, RefusedError
from edge_sdk.limits import Limits
from edge_sdk.messages import Invite
from edge_sdk.usage import DAY_S

BUNDLE = mlp(quantized=True)
X, Y = examples(40)


class Limited(Scene):
    """A device with limits, on a board made of files."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "state", BUNDLE)
        self.root, self.clock = folder / "root", Clock(1000.0)

    def device(self, **limits: Any) -> Device:
        device = super().device(limits=Limits(**limits), clock=self.clock, root=self.root)
        device.learn_many(X, Y)
        return device

    def board(self, path: str, text: str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


@pytest.fixture
def scene(tmp_path: Path) -> Limited:
    return Limited(tmp_path)


def test_a_device_whose_bytes_are_used_up_stands_aside_until_the_next_day(scene: Limited) -> None:
    scene.coordinator.publish_model(0, weights_of(BUNDLE))
    with scene.device(max_bytes_per_day=5000) as device:
        scene.until(scene.is_ready)
        for _ in range(40):
            if "max_bytes_per_day" in device.status()["conditions_lapsed"]:
                break
            done = len(scene.coordinator.updates)
            scene.coordinator.invite(device.id)
            scene.until(
                lambda done=done: len(scene.coordinator.updates) > done or not scene.is_ready()
            )
            scene.until(lambda: not device.status()["outbox"])
            device._agent.poke()
        scene.until(lambda: not scene.is_ready())
        counted = len(scene.coordinator.updates)
        assert counted >= 1
        assert device.status()["today"]["bytes"] <= 5000
        scene.coordinator.invite(device.id)  # by a coordinator that has not heard it
        scene.until(lambda: len(scene.coordinator.checkins) > 2)
        assert not scene.coordinator.checkins[-1].ready
        assert len(scene.coordinator.updates) == counted
        device.predict(X)
        scene.clock.now += DAY_S
        device._agent.poke()
        scene.until(scene.is_ready)


def test_the_use_of_a_day_survives_a_restart(scene: Limited) -> None:
    scene.coordinator.publish_model(0, weights_of(BUNDLE))
    with scene.device(max_minutes_per_day=1) as device:
        scene.until(scene.is_ready)
        scene.training.may_end.clear()
        scene.coordinator.invite(device.id)
        scene.until(lambda: scene.training.jobs)
        assert scene.training.jobs[0].budget.seconds == pytest.approx(0.8 * 60)
        scene.clock.now += 45
        scene.training.may_end.set()
        scene.until(lambda: device.status()["receipts"])
        assert device.status()["today"]["training_s"] == 45
        scene.coordinator.invite(device.id, deadline_s=600)
        scene.until(lambda: len(scene.coordinator.updates) == 2)
        assert scene.training.jobs[1].budget.seconds == pytest.approx(15)
    with scene.device(max_minutes_per_day=0.75) as device:
        scene.until(lambda: device.status()["conditions_lapsed"] == ["max_minutes_per_day"])
        assert not device.status()["ready"]


def test_too_warm_or_on_battery_it_does_not_train(scene: Limited) -> None:
    scene.coordinator.publish_model(0, weights_of(BUNDLE))
    scene.board("sys/class/thermal/thermal_zone0/temp", "71000")
    scene.board("sys/class/power_supply/battery/type", "Battery")
    scene.board("sys/class/power_supply/battery/status", "Discharging")
    with scene.device(max_celsius=70, on_battery=False) as device:
        scene.until(lambda: device.online)
        lapsed = ["on_mains", "cooler_than(70)"]
        scene.until(lambda: device.status()["conditions_lapsed"] == lapsed)
        scene.board("sys/class/thermal/thermal_zone0/temp", "69000")
        scene.board("sys/class/power_supply/battery/status", "Charging")
        device._agent.poke()
        scene.until(scene.is_ready)


def test_a_bundle_whose_update_is_more_than_a_days_bytes_is_refused() -> None:
    size = BUNDLE.manifest["cost"]["bytes_update"]
    BUNDLE.check(Limits(max_bytes_per_day=size))
    with pytest.raises(RefusedError, match=f"this device allows max_bytes_per_day={size - 1}"):
        BUNDLE.check(Limits(max_bytes_per_day=size - 1))


def test_a_training_ends_with_the_day_at_the_latest() -> None:
    fixed = 1, 1, bytes(32), 100.0, [["dense"]], 1, None, 50.0, 8, None, None, 7
    assert errand.budget(Invite(*fixed), 100.0).seconds == 50  # type: ignore[arg-type]
    assert errand.budget(Invite(*fixed), 100.0, 20.0).seconds == 20  # type: ignore[arg-type]


def test_the_file_spells_the_limits_and_status_shows_what_was_used_beside_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "device.toml"
    start = 'broker = "mqtt://hub"\ntask = "pump"\nstate = "state"\n[limits]\n'
    file.write_text(
        f"{start}max_bytes_per_day = 50_000_000\nmax_minutes_per_day = 60\nmax_celsius = 70\n"
        "on_battery = false\n"
    )
    limits = device_config.load(file).limits
    assert limits == Limits(
        max_bytes_per_day=50_000_000, max_minutes_per_day=60, max_celsius=70, on_battery=False
    )
    file.write_text(start + 'on_battery = "no"\n')
    with pytest.raises(ConfigError, match=r"limits.on_battery: expected true or false, got 'no'"):
        device_config.load(file)
    (tmp_path / "state").mkdir()
    file.write_text(start)
    today = {
        "bytes": 12_300_000,
        "max_bytes": 50_000_000,
        "training_s": 90.0,
        "max_training_s": None,
        "max_celsius": 70,
        "on_battery": False,
    }
    (tmp_path / "state/status.json").write_text(json.dumps({"today": today}))
    device_cli.main(["status", "--config", str(file)])
    said = capsys.readouterr().out
    assert "bytes_today          12.3 MB of 50.0 MB" in said
    assert "training_today       1.5 min, no limit" in said
    assert "limits               below 70 C, not on battery" in said
