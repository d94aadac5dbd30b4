# SPDX-License-Identifier: Apache-2.0
"""The meter: what was used survives restarts and kills, with few writes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from edge_sdk import files, meter
from edge_sdk.errors import ConfigError
from edge_sdk.limits import Limits
from edge_sdk.meter import Meter
from edge_sdk.usage import DAY_S

MB = 1_000_000


class Hands:
    """A clock that a test moves, monotonic and on the wall."""

    def __init__(self) -> None:
        self.now, self.wall = 100.0, 1_790_000_000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.wall


class Board:
    """A state folder, a clock and a fake ``/``, which restarts share."""

    def __init__(self, folder: Path, **limits: float) -> None:
        self.file, self.root, self.clock = folder / "usage.json", folder / "root", Hands()
        self.limits = Limits(**limits)  # type: ignore[arg-type]
        self.boot("one")

    def boot(self, name: str) -> None:
        kernel = self.root / "proc/sys/kernel/random"
        kernel.mkdir(parents=True, exist_ok=True)
        (kernel / "boot_id").write_text(name)
        self.clock.now = 100.0

    def meter(self) -> Meter:
        return Meter(self.file, self.limits, self.clock, self.root)


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Note every write of the meter's."""
    noted: list[Path] = []
    real = files.write

    def note(path: Path, *parts: bytes, **options: object) -> None:
        noted.append(path)
        real(path, *parts, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(meter.files, "write", note)
    return noted


def test_bytes_of_every_start_of_a_day_add_up_and_a_new_day_begins_with_none(
    tmp_path: Path,
) -> None:
    board = Board(tmp_path, max_bytes_per_day=10 * MB)
    first = board.meter()
    first.count(3 * MB)
    first.close()
    second = board.meter()
    assert second.left_bytes == 7 * MB
    second.count(MB)
    second.count(2 * MB)
    assert second.left_bytes == 5 * MB
    assert second.lapsed(4 * MB) == ()
    assert second.lapsed(6 * MB) == ("max_bytes_per_day",)
    board.clock.now += DAY_S
    second.count(2 * MB)
    assert second.left_bytes == 10 * MB


def test_a_kill_never_gives_back_what_was_used(tmp_path: Path) -> None:
    board = Board(tmp_path, max_bytes_per_day=10 * MB)
    used = 0
    for _ in range(20):  # killed twenty times, a bit further each time
        running = board.meter()
        for step in range(1, 4):
            running.count(step * 100_000)
        used += 300_000
        assert 10 * MB - board.meter().left_bytes >= used
    assert board.meter().left_bytes < 10 * MB - used + 1


def test_a_day_up_to_its_limit_is_written_some_twenty_times(
    tmp_path: Path, writes: list[Path]
) -> None:
    running = Board(tmp_path, max_bytes_per_day=50 * MB).meter()
    for total in range(0, 50 * MB, 10_000):
        running.count(total)
    assert 5 <= len(writes) <= meter.SHARE + 2


def test_without_a_limit_hardly_anything_is_written_and_all_is_counted(
    tmp_path: Path, writes: list[Path]
) -> None:
    board = Board(tmp_path)
    running = board.meter()
    for total in range(0, MB, 10_000):
        running.count(total)
    assert (running.left_bytes, running.left_s, writes) == (math.inf, math.inf, [])
    running.close()
    assert board.meter().status()["bytes"] == running.status()["bytes"] > 0
    board.meter().close()
    assert len(writes) == 1


def test_a_training_cut_by_a_power_cut_counts_as_planned_else_as_it_was(tmp_path: Path) -> None:
    board = Board(tmp_path, max_minutes_per_day=10)
    running = board.meter()
    running.will_train(240)
    assert board.meter().left_s == 360
    running.trained(30)
    assert running.left_s == 570
    running.close()
    assert board.meter().left_s == 570
    running.trained(570)
    assert running.lapsed(0) == ("max_minutes_per_day",)


def test_a_clock_that_jumps_by_a_year_leaves_the_day_as_it_is(tmp_path: Path) -> None:
    board = Board(tmp_path, max_bytes_per_day=MB)
    running = board.meter()
    running.count(MB)
    for jump in (400 * DAY_S, -800 * DAY_S, 1e9):
        board.clock.wall += jump
        running.count(MB)
        assert running.left_bytes == 0
        assert board.meter().left_bytes == 0
    board.boot("two")  # a board without a time server, 31 years later by its clock
    assert board.meter().left_bytes == 0


def test_a_night_off_counts_only_with_a_time_server(tmp_path: Path) -> None:
    board = Board(tmp_path, max_bytes_per_day=MB)
    synchronized = board.root / "run/systemd/timesync/synchronized"
    synchronized.parent.mkdir(parents=True)
    synchronized.touch()
    running = board.meter()
    running.count(MB)
    running.close()
    board.boot("two")
    board.clock.wall += DAY_S
    synchronized.unlink()  # not yet
    later = board.meter()
    assert later.left_bytes == 0
    synchronized.touch()
    later.count(0)
    assert later.left_bytes == MB


@pytest.mark.parametrize("junk", [b"", b"{}", b"[]", b'{"bytes": -5}', b"\xff" * 9, b"{" * 5000])
def test_a_damaged_file_is_a_new_day(tmp_path: Path, junk: bytes) -> None:
    board = Board(tmp_path, max_bytes_per_day=MB)
    board.file.write_bytes(junk)
    running = board.meter()
    assert running.left_bytes == MB
    running.count(10)
    assert json.loads(board.file.read_bytes())["bytes"] >= 10


def test_a_full_disk_does_not_stop_the_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    board = Board(tmp_path, max_bytes_per_day=MB)
    running = board.meter()
    board.file.mkdir()  # nothing can be put there
    running.count(MB)
    assert running.left_bytes == 0


def test_too_warm_and_on_battery_are_the_conditions_of_that_name(tmp_path: Path) -> None:
    assert meter.within(Limits()).name == "always"
    assert meter.within(Limits(max_celsius=70)).name == "cooler_than(70)"
    both = meter.within(Limits(max_celsius=70, on_battery=False))
    assert both.name == "on_mains & cooler_than(70)"
    with pytest.raises(ConfigError, match="max_celsius: expected degrees"):
        Limits(max_celsius=1000)


def test_the_machines_own_clock_can_be_asked() -> None:
    assert isinstance(meter.is_synchronized(), bool)
