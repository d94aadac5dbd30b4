# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import sqlite3
import zlib
from pathlib import Path
from typing import Any

import hand_bundles
import pytest
from fake_fleet import BUNDLE, FakeDevice, World, invited, play

from coordinator import config, ledger, pacing
from coordinator.cli import main
from coordinator.fleet import Entry, Fleet, Known, Standing
from coordinator.pacing import Pace
from coordinator.tags import where
from coordinator.task import Task
from edge_sdk.errors import ConfigError
from edge_sdk.messages import Status

PACE = pacing.rounds(cohort=2, quorum=2, deadline_s=60)


class Tagged(FakeDevice):
    """A device that says tags of itself."""

    tags: dict[str, Any] | None = None

    def status(self, *, online: bool) -> Status:
        return Status(
            self.id, self.key.public, online, self.boot, f"n{self.index}", "0.1.0", self.tags
        )


def task(**changes: Any) -> Task:
    return Task("t", BUNDLE, **({"codec": "dense", "downlink": "dense"} | changes))


def fleet_of(world: World, *tags: dict[str, Any] | None) -> list[Tagged]:
    devices = [Tagged(world.broker, i) for i in range(1, len(tags) + 1)]
    for device, said in zip(devices, tags, strict=True):
        device.tags = said
        device.start()
    return devices


def test_only_listed_devices_are_invited(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        devices = world.devices(4)
        listed = [devices[0].id, devices[3].id]
        async with world.coordinator((task(devices=listed), PACE)):
            for number in (1, 2, 3):
                await world.until(invited([devices[0], devices[3]], number))
                devices[0].report(number)
                devices[3].report(number)
                await world.until(lambda n=number: len(world.results) == n)
        assert not devices[1].invites
        assert not devices[2].invites

    play(tmp_path, story)


def test_a_task_chooses_by_what_devices_say_and_operators_assign(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def story(world: World) -> None:
        north, south, beta, silent = fleet_of(
            world, {"site": "north"}, {"site": "south"}, {"site": "north", "beta": True}, None
        )
        chosen = task(where="site == 'north' and not beta")
        async with world.coordinator((chosen, PACE)) as coordinator:
            fleet = coordinator.fleet
            await world.until(lambda: len(fleet.checked_in.get("t", ())) == 4)
            assert fleet.ready("t") == {north.id}
            store = ["--store", str(world.folder)]
            assert main(["tag", silent.id, "site=north", "rack=7", *store]) == 0
            assert "rack=7 site=north" in capsys.readouterr().out
            assert main(["tag", beta.id, "beta=false", *store, "--json"]) == 0
            assert json.loads(capsys.readouterr().out)["tags"] == {"beta": False}
            world.clock.advance(11)
            await world.until(lambda: fleet.ready("t") == {north.id, silent.id, beta.id})
            main(["tag", beta.id, "beta=", *store])
            main(["tag", north.id, "site=south", *store])
            main(["tag", south.id, "site=north", *store])
            world.clock.advance(11)
            await world.until(lambda: fleet.ready("t") == {silent.id, south.id})
        capsys.readouterr()
        main(["fleet", *store, "--json"])
        rows = {row["id"]: row for row in json.loads(capsys.readouterr().out)}
        assert rows[north.id]["tags"] == {"site": "south"}
        assert rows[silent.id]["tags"] == {"site": "north", "rack": 7}
        assert rows[beta.id]["tags"] == {"site": "north", "beta": True}
        async with world.coordinator((chosen, PACE)) as again:  # all of it is remembered
            await world.until(lambda: len(again.fleet.checked_in.get("t", ())) == 4)
            assert again.fleet.ready("t") == {silent.id, south.id}

    play(tmp_path, story)


def test_a_device_that_changes_its_tags_is_sorted_anew_and_still_counts_where_invited(
    tmp_path: Path,
) -> None:
    async def story(world: World) -> None:
        one, two = fleet_of(world, {"site": "north"}, {"site": "north"})
        async with world.coordinator((task(where="site == 'north'"), PACE)) as coordinator:
            await world.until(invited([one, two], 1))
            one.tags = {"site": "south"}
            one.send(one.status(online=True), f"fedge/1/d/{one.id}/status", retain=True)
            await world.until(lambda: coordinator.fleet.ready("t") == {two.id})
            one.report(1)
            two.report(1)
            await world.until(lambda: one.outcomes() == ["counted"])

    play(tmp_path, story)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"where": "site =="}, "where: expected a number"),
        ({"devices": []}, "list of ids"),
        ({"devices": "d0123456789abcde"}, "list of ids"),
        ({"devices": ["pump-1"]}, "expected a device id"),
    ],
)
def test_a_list_or_an_expression_that_makes_no_sense_is_refused(
    bad: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=f"task t: .*{says}"):
        task(**bad)


def test_a_list_shorter_than_the_quorum_is_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hand_bundles.mlp().save(tmp_path / "x.fedge")
    text = """[task.t]
bundle = "x.fedge"
pace = ["rounds", { cohort = 4, deadline_s = 9 }]
devices = ["d0123456789abcde"]
where = "site == 'north'"
"""
    path = tmp_path / "coordinator.toml"
    path.write_text(text)
    assert main(["check", "--config", str(path)]) == 0
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1
    assert "1 listed devices never make a quorum of 2" in warning
    ((found, pace),) = config.load(path).tasks
    assert found.entry.devices == {"d0123456789abcde"}
    assert found.entry.where is not None
    assert pacing.unmet(pace, ["a", "b"]) is None
    assert pacing.unmet(pace, None) is None
    buffered: Pace = pacing.buffered(size=2, concurrency=4, deadline_s=9)
    assert pacing.unmet(buffered, ["a"]) is None


def test_why_each_device_could_be_drawn_or_not_is_told_and_kept_with_the_round(
    tmp_path: Path,
) -> None:
    fleet = Fleet()
    for device in ("listed", "away", "idle", "held", "ready", "untagged"):
        fleet.status(Known(device, b"k" * 32, name=device, online=device != "away"))
    for device in ("held", "ready", "untagged", "stranger"):
        fleet.check_in("t", device, 1, 5)
    plain = fleet.standings("t")
    assert plain == bytes([Standing.UNREADY, Standing.OFFLINE, Standing.UNREADY, 6, 6, 6])
    names = frozenset({"away", "idle", "held", "ready", "untagged"})
    fleet.admit("t", Entry(names, where("name != 'untagged'")))
    fleet.hold("t", {"held": 9})
    expected = [Standing.UNLISTED, Standing.OFFLINE, Standing.UNREADY, Standing.HELD]
    assert list(fleet.standings("t")) == [*expected, Standing.READY, Standing.UNTAGGED]
    assert fleet.ready("t") == {"ready"}
    assert fleet.standing("t", "nobody") is Standing.UNKNOWN

    async def story(world: World) -> None:
        devices = world.devices(3)
        listed = [d.id for d in devices[:2]]
        async with world.coordinator((task(devices=listed), PACE)):
            await world.until(invited(devices[:2], 1))
        (row,) = ledger.rounds(world.folder)
        assert set(row["cohort"]) == set(listed)
        with sqlite3.connect(world.folder / "coordinator.db") as db:
            (blob,) = db.execute("SELECT standings FROM rounds").fetchone()
            numbers = dict(db.execute("SELECT device, number FROM devices"))
        standings = zlib.decompress(blob)
        assert {d.index: standings[numbers[d.id]] for d in devices} == {
            1: Standing.READY,
            2: Standing.READY,
            3: Standing.UNLISTED,
        }

    play(tmp_path, story)
