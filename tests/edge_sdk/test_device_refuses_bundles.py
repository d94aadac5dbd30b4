# SPDX-License-Identifier: Apache-2.0
"""A device does not run a bundle that fails its checks: it says why and waits for another."""

from __future__ import annotations

import json
import logging
import pathlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from device_scene import Scene
from hand_bundles import examples, mlp
from planted import both, node, output, planted
from scripted_coordinator import TASK, weights_of

from edge_sdk import device_cli, device_config, inspect_cli
from edge_sdk import events as e
from edge_sdk.bundle import Bundle
from edge_sdk.device import Device
from edge_sdk.errors import ConfigError
from edge_sdk.limits import Limits
from edge_sdk.local import NoModelError
from edge_sdk.session import Session, step

GOOD = mlp()
BAD = planted(GOOD, "train", both(node("Identity", ["x"], ["leak"]), output("leak", [None, 6])))
REASON = "train graph: output 'leak': the manifest promises no such output"
REFUSED = {"bundle": BAD.digest, "reason": REASON}
X, Y = examples(40)


class Tempted(Scene):
    """A device that begins without a bundle, and a coordinator that offers a good or a bad one."""

    def __init__(self, state: Path) -> None:
        super().__init__(state, GOOD)

    def device(self, **options: Any) -> Device:
        return super().device(**{"bundle": None} | options)

    def offer(self, bundle: Bundle, version: int = 0, shift: float = 0.0) -> None:
        self.coordinator.bundle = bundle
        self.coordinator.publish_model(version, weights_of(bundle, shift))

    def written(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.state / "status.json").read_text())
        return found


@pytest.fixture
def scene(tmp_path: Path) -> Tempted:
    return Tempted(tmp_path / "state")


def test_an_offered_bundle_that_fails_is_never_kept_or_run(
    scene: Tempted, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), scene.device() as device:
        scene.offer(BAD)
        scene.until(lambda: device.status()["refused"])
        assert device.status()["refused"] == REFUSED
        scene.until(lambda: scene.written()["refused"] == REFUSED)
        with pytest.raises(NoModelError):
            device.predict(X[0])
        assert list((scene.state / "bundles").iterdir()) == []
    (line,) = (r.getMessage() for r in caplog.records if "bundle refused" in r.getMessage())
    assert line == f"bundle refused digest={BAD.digest[:12]} reason={REASON}"


def test_the_model_in_use_goes_on_and_another_bundle_is_taken(scene: Tempted) -> None:
    with scene.device(bundle=GOOD) as device:
        device.learn_many(X, Y)
        scene.offer(GOOD)
        scene.until(scene.is_ready)
        before = device.predict(X)
        scene.offer(BAD, 1, 1.0)
        scene.until(lambda: device.status()["refused"])
        scene.until(lambda: not scene.coordinator.checkins[-1].ready)  # withdrawn
        np.testing.assert_array_equal(device.predict(X), before)
        said = len(scene.coordinator.checkins)
        scene.coordinator.invite(device.id)
        scene.until(lambda: len(scene.coordinator.checkins) > said)
        assert not scene.coordinator.checkins[-1].ready  # declined
        better = mlp(momentum=True)
        scene.offer(better, 2, 0.5)
        scene.until(lambda: device.version == 2)
        assert device.status()["bundle"] == better.digest
        assert device.status()["refused"] is None
        scene.until(lambda: scene.coordinator.checkins[-1].ready)


def test_new_weights_for_a_refused_bundle_are_not_fetched(scene: Tempted) -> None:
    with scene.device() as device:
        scene.offer(BAD)
        scene.until(lambda: device.status()["refused"])
        down = device.status()["bytes_down"]
        scene.offer(BAD, 1, 0.25)
        scene.until(lambda: device.status()["bytes_down"] > down)
        scene.broker.pump()
        assert device.status()["bytes_down"] - down < 2000  # the offer alone
        assert device.version is None


def test_a_given_bundle_that_fails_does_not_stop_the_device(scene: Tempted) -> None:
    with scene.device(bundle=BAD) as device:
        assert device.model is None
        assert device.status()["refused"] == REFUSED
        assert device.state == "waiting"
        scene.offer(BAD)
        scene.offer(GOOD)
        scene.until(lambda: device.version == 0)
    with scene.device(bundle=BAD) as device:  # the last good model, whatever is given
        assert device.status()["bundle"] == GOOD.digest


def test_limits_that_were_lowered_stop_a_bundle_that_ran_before(scene: Tempted) -> None:
    with scene.device(bundle=GOOD) as device:
        assert device.version == 0
    with scene.device(limits=Limits(max_flops_step=1)) as device:
        assert device.model is None
        assert "max_flops_step=1" in device.status()["refused"]["reason"]
        scene.offer(GOOD)
        scene.until(lambda: device.online)
        scene.broker.pump()
        assert device.model is None
    with scene.device() as device:
        assert device.version == 0


def test_a_bundle_is_judged_once(scene: Tempted, monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[str] = []
    check = Bundle.check

    def counting(bundle: Bundle, limits: Limits | None = None) -> None:
        judged.append(bundle.digest)
        check(bundle, limits)

    monkeypatch.setattr(Bundle, "check", counting)
    with scene.device(bundle=GOOD) as device:
        for version in range(1, 4):
            scene.offer(GOOD, version, 0.1 * version)
            scene.until(lambda v=version: device.version == v)
    assert judged == [GOOD.digest]


# --- the session --------------------------------------------------------------------------------
def test_a_refusal_ends_only_what_belongs_to_that_bundle() -> None:
    def after(state: Session, *events: e.Event) -> tuple[Session, list[e.Action]]:
        actions: list[e.Action] = []
        for event in events:
            state, more = step(state, event)
            actions += more
        return state, actions

    offer = e.Offered(call=1, round=1, version=1, bundle=b"bad", model=b"w")
    state, actions = after(Session(), e.Connected(), offer)
    assert actions == [e.Fetch("bundle", b"bad", 0)]
    stale, _ = after(state, e.BundleRefused(b"older"))
    assert stale.fetching == state.fetching
    state, actions = after(state, e.BundleRefused(b"bad"))
    assert (state.fetching, actions) == (None, [])
    state, actions = after(state, e.Tick(1e6), e.Invited(1, 1, b"w", 60.0))
    no = e.CheckIn(1, ready=False, examples=0, reason="bad-bundle", round=1)
    assert actions == [e.Abandon(1), no]
    fresh = e.Offered(call=1, round=2, version=2, bundle=b"good", model=b"w")
    assert after(state, fresh)[1] == [e.Fetch("bundle", b"good", 0)]


# --- the commands -------------------------------------------------------------------------------
def test_inspect_says_what_a_device_would_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = tmp_path / "good.fedge", tmp_path / "bad.fedge"
    GOOD.save(good)
    BAD.save(bad)
    assert inspect_cli.main([str(good)]) == 0
    assert "  checks     passed\n" in capsys.readouterr().out
    assert inspect_cli.main([str(bad)]) == 5
    assert f"  checks     refused: {REASON}\n" in capsys.readouterr().out
    assert inspect_cli.main([str(good), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["checks"], told["refusal"]) == ("passed", None)
    assert inspect_cli.main([str(bad), "--json"]) == 5
    told = json.loads(capsys.readouterr().out)
    assert (told["checks"], told["refusal"]) == ("refused", REASON)


def test_status_shows_the_refusal(
    scene: Tempted, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with scene.device(bundle=BAD):
        pass
    config = tmp_path / "device.toml"
    config.write_text(f'broker = "mqtt://localhost"\ntask = "{TASK}"\nstate = "{scene.state}"\n')
    assert device_cli.main(["status", "--config", str(config)]) == 0
    (row,) = (r for r in capsys.readouterr().out.splitlines() if r.startswith("refused"))
    assert row == f"{'refused':<20} bundle {BAD.digest}, reason {REASON}"


def test_limits_are_read_from_the_configuration() -> None:
    table = {"broker": "mqtt://localhost", "task": "t"}
    assert device_config.parse(table).limits == Limits()
    parsed = device_config.parse({**table, "limits": {"max_ram_bytes": 1000}})
    assert parsed.limits == Limits(max_ram_bytes=1000)
    with pytest.raises(ConfigError, match=r"limits\.max_ram.*did you mean limits\.max_ram_bytes"):
        device_config.parse({**table, "limits": {"max_ram": 1000}})
    with pytest.raises(ConfigError, match=r"limits\.max_ram_bytes: expected a whole number"):
        device_config.parse({**table, "limits": {"max_ram_bytes": 0}})
    with pytest.raises(ConfigError, match=r"limits: expected a table"):
        device_config.parse({**table, "limits": pathlib.Path()})
