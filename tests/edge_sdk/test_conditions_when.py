# SPDX-License-Identifier: Apache-2.0
"""Conditions on boards that are nothing but a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_sdk import conditions as when
from edge_sdk.conditions import Surroundings
from edge_sdk.errors import ConfigError


def board(tmp_path: Path, files: dict[str, str]) -> Surroundings:
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return Surroundings(tmp_path)


def test_a_board_that_tells_nothing_may_train(tmp_path: Path) -> None:
    everything = when.on_mains & when.idle & when.cooler_than(70)
    assert everything.holds(Surroundings(tmp_path))


@pytest.mark.parametrize(("reading", "holds"), [("69900", True), ("70000", False), ("mad", True)])
def test_the_hottest_sensor_decides(tmp_path: Path, reading: str, holds: bool) -> None:
    hot = board(
        tmp_path,
        {
            "sys/class/thermal/thermal_zone0/temp": "40000",
            "sys/class/thermal/thermal_zone1/temp": reading,
        },
    )
    assert when.cooler_than(70).holds(hot) is holds


@pytest.mark.parametrize(
    ("load", "cores", "own", "holds"),
    [
        ("0.90 0 0", "0-1", 0.0, True),
        ("1.10 0 0", "0-1", 0.0, False),
        ("1.10 0 0", "0-3", 0.0, True),
        ("1.90 0 0", "0,2-2", 1.0, True),  # our own training is not what makes a board busy
        ("3.10 0 0", "0-1", 1.0, False),
    ],
)
def test_idle_is_less_than_half_a_core_per_core(
    tmp_path: Path, load: str, cores: str, own: float, holds: bool
) -> None:
    board(tmp_path, {"proc/loadavg": load, "sys/devices/system/cpu/online": cores})
    assert when.idle.holds(Surroundings(tmp_path, own_load=own)) is holds


@pytest.mark.parametrize(
    ("supplies", "holds"),
    [
        ({"AC/type": "Mains", "AC/online": "1", "B/type": "Battery", "B/status": "Full"}, True),
        ({"AC/type": "Mains", "AC/online": "0"}, False),
        ({"B/type": "Battery", "B/status": "Discharging"}, False),
        ({"B/type": "Battery", "B/status": "Charging"}, True),
        ({"M/type": "Battery", "M/status": "Discharging", "M/scope": "Device"}, True),
        ({"U/type": "USB", "U/online": "1", "B/type": "Battery", "B/status": "Discharging"}, True),
    ],
)
def test_mains_is_any_supply_from_outside(
    tmp_path: Path, supplies: dict[str, str], holds: bool
) -> None:
    files = {f"sys/class/power_supply/{name}": text for name, text in supplies.items()}
    assert when.on_mains.holds(board(tmp_path, files)) is holds


def test_conditions_combine_with_and_or_not_and_with_any_function(tmp_path: Path) -> None:
    here = Surroundings(tmp_path, examples=3)
    calls: list[bool] = []

    def shop_is_closed() -> bool:
        calls.append(True)
        return True

    both = when.always & shop_is_closed
    assert both.holds(here)
    assert (shop_is_closed & when.always).holds(here)
    assert calls
    assert not (both & when.never).holds(here)
    assert (when.never | shop_is_closed).holds(here)
    assert (shop_is_closed | when.never).holds(here)
    assert (~when.never).holds(here)
    assert when.examples(3).holds(here)
    assert not when.examples(4).holds(here)


def test_what_does_not_hold_is_named(tmp_path: Path) -> None:
    wanted = when.always & when.examples(9) & (when.never | ~when.always) & when.cooler_than(70.5)
    assert wanted.lapsed(Surroundings(tmp_path)) == ("examples(9)", "(never | ~always)")
    assert wanted.name == "examples(9) & (never | ~always) & cooler_than(70.5)"
    assert repr(when.idle) == "when.idle"
    assert repr(wanted).startswith("when(examples(9) & ")


def test_a_configuration_file_spells_the_same_conditions(tmp_path: Path) -> None:
    read = when.from_spec(["on_mains", "idle", ["cooler_than", 70], ["examples", 20]])
    assert read.name == "on_mains & idle & cooler_than(70) & examples(20)"
    assert when.from_spec([]).holds(Surroundings(tmp_path))


@pytest.mark.parametrize("wrong", ["idel", ["cooler_than"], ["cooler_than", "hot"], 7])
def test_an_unknown_condition_is_a_config_error_that_lists_the_known(wrong: object) -> None:
    with pytest.raises(ConfigError, match=r"on_mains.*cooler_than.*got"):
        when.from_spec([wrong])


def test_values_out_of_range_are_config_errors() -> None:
    with pytest.raises(ConfigError, match="Celsius"):
        when.cooler_than(0)
    with pytest.raises(ConfigError, match="at least 1"):
        when.examples(0)
    with pytest.raises(ConfigError, match="function"):
        when.condition(3)  # type: ignore[arg-type]  # that it is wrong is the point
