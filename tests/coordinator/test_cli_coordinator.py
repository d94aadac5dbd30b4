# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import asyncio
import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from fake_fleet import BUNDLE, World

from coordinator import cli as coordinator_cli
from coordinator import ledger, pacing
from coordinator.task import Task
from edge_sdk import cli
from edge_sdk.errors import StoreError

CONFIG = """
broker = "mqtt://user:hush@localhost"
store = "store"
[task.t]
bundle = "t.fedge"
pace = ["rounds", { cohort = 2, deadline_s = 60, count = 2 }]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A configuration and a store in which one round of two devices was committed."""
    BUNDLE.save(tmp_path / "t.fedge")
    (tmp_path / "coordinator.toml").write_text(CONFIG)
    asyncio.run(_one_round(tmp_path / "store"))
    return tmp_path


async def _one_round(store: Path) -> None:
    world = World(store)
    devices = world.devices(2)
    pace = pacing.rounds(cohort=2, deadline_s=60, count=1)
    async with world.coordinator((Task("t", BUNDLE, codec="dense"), pace)):
        await world.until(lambda: all(d.invites for d in devices))
        for device in devices:
            device.report()
        await world.until(lambda: world.results)


def run(*args: str) -> int:
    return cli.main(["coordinator", *args])


def test_the_store_is_read_while_nobody_serves_it(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown: dict[str, list[dict[str, object]]] = {}
    for command in ("fleet", "rounds", "models"):
        assert run(command, "--store", str(folder / "store"), "--json") == 0
        shown[command] = json.loads(capsys.readouterr().out)
    assert [d["updates"] for d in shown["fleet"]] == [1, 1]
    (round_,) = shown["rounds"]
    assert (round_["number"], round_["outcome"], round_["version"]) == (1, "commit", 1)
    assert len(round_["reported"]) == 2  # type: ignore[arg-type]
    assert [m["version"] for m in shown["models"]] == [0, 1]
    assert shown["models"][1]["digest"] == round_["digest"]
    assert shown["models"][0]["bundle"] == BUNDLE.digest


@pytest.mark.parametrize("command", ["fleet", "rounds", "models"])
def test_without_json_a_table_is_printed(
    folder: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert run(command, "--config", str(folder / "coordinator.toml")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == {"fleet": 3, "rounds": 2, "models": 3}[command]


def test_check_says_what_would_run_and_hides_the_password(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("check", "--config", str(folder / "coordinator.toml")) == 0
    out = capsys.readouterr().out
    assert "sound" in out
    assert "hush" not in out
    assert run("check", "--config", str(folder / "coordinator.toml"), "--json") == 0
    assert json.loads(capsys.readouterr().out)[0]["bundle"] == BUNDLE.digest


def test_mistakes_are_one_line_and_a_numbered_exit_code(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = folder / "coordinator.toml"
    config.write_text(CONFIG.replace("cohort", "cohrt"))
    assert run("check", "--config", str(config)) == 3
    (folder / "t.fedge").write_bytes(b"nonsense")
    config.write_text(CONFIG)
    assert run("check", "--config", str(config)) == 5
    assert run("rounds", "--store", str(folder / "nowhere")) == 1
    config.write_text(CONFIG.replace("broker =", 'ca_file = "no.pem"\nbroker ='))
    assert run("check", "--config", str(config)) == 3
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert all(line.startswith("fedge: ") for line in lines)


@pytest.mark.parametrize("command", ["run", "check", "fleet", "rounds", "models"])
def test_each_command_shows_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        coordinator_cli.main([command, "--help"])
    assert ended.value.code == 0
    assert f"example: fedge coordinator {command}" in capsys.readouterr().out


def test_the_ledger_returns_weights_and_refuses_what_is_not_a_store(
    folder: Path, tmp_path: Path
) -> None:
    weights = ledger.weights(folder / "store", "t", 0)
    assert weights.dtype == "float32"
    with pytest.raises(StoreError, match="no version 9"):
        ledger.weights(folder / "store", "t", 9)
    assert [u["folded"] for u in ledger.updates(folder / "store", "t")] == [1, 1]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / ledger.DATABASE).write_text("grocery list")
    with pytest.raises(StoreError, match="cannot read"):
        ledger.rounds(tmp_path / "other")


def replayed(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> tuple[int, list[dict[str, object]]]:
    code = run("verify", "--config", str(folder / "coordinator.toml"), "--json")
    rows: list[dict[str, object]] = json.loads(capsys.readouterr().out)
    return code, rows


def test_verify_makes_every_version_again_from_the_journal(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = folder / "coordinator.toml"
    config.write_text(CONFIG + 'codec = "dense"\n')
    code, rows = replayed(folder, capsys)
    assert code == 0
    assert [(r["version"], r["updates"], r["holds"]) for r in rows] == [(0, 0, True), (1, 2, True)]
    assert all(r["replayed"] == r["stored"] for r in rows)


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE updates SET examples = 9999 WHERE device = (SELECT min(device) FROM updates)",
        "DELETE FROM updates WHERE device = (SELECT min(device) FROM updates)",
        "UPDATE versions SET digest = zeroblob(32) WHERE version = 1",
    ],
)
def test_verify_finds_what_does_not_add_up(
    folder: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    with closing(sqlite3.connect(folder / "store" / ledger.DATABASE)) as db, db:
        db.execute(damage)
    code, rows = replayed(folder, capsys)
    assert code == 1
    assert [r["holds"] for r in rows] == [True, False]


def test_verify_says_what_it_cannot_check(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with closing(sqlite3.connect(folder / "store" / ledger.DATABASE)) as db, db:
        db.execute("UPDATE updates SET blob = NULL")
    code, rows = replayed(folder, capsys)
    assert code == 0
    assert rows[1]["replayed"] is None
    assert run("verify", "--config", str(folder / "coordinator.toml"), "--task", "u") == 3
    assert "expected a task of" in capsys.readouterr().err
