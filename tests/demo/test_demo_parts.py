# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordinator.demo import cli, data, report
from coordinator.demo.settings import Settings
from edge_sdk.errors import ConfigError


def write(path: Path, **changes: object) -> Path:
    rng = np.random.default_rng(0)
    arrays: dict[str, object] = {
        "x_train": rng.normal(size=(30, 4)).astype(np.float32),
        "y_train": rng.integers(0, 3, 30),
        "client_train": np.repeat([7, 3, 9], [5, 10, 15]),
        "x_test": np.zeros((4, 4), np.float32),
        "y_test": np.zeros(4, np.int64),
    }
    arrays |= changes
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})  # type: ignore[arg-type] # None drops an array
    return path


def test_dirichlet_gives_every_row_to_one_device_and_every_device_some_rows() -> None:
    labels = np.repeat(np.arange(10), 40)
    owner = data.dirichlet(labels, 10, 0.5, np.random.default_rng(1))
    counts = np.bincount(owner, minlength=10)
    assert counts.sum() == 400
    assert counts.min() >= data.LEAST_ROWS
    assert counts.max() > 1.5 * counts.mean()  # it is uneven, as devices are


def test_the_same_seed_splits_the_same_way() -> None:
    labels = np.repeat(np.arange(4), 30)
    first, again = (data.dirichlet(labels, 5, 0.5, np.random.default_rng(3)) for _ in range(2))
    assert np.array_equal(first, again)


def test_hundreds_of_devices_have_some_rows_each() -> None:
    labels = np.repeat(np.arange(10), 132)
    owner = data.dirichlet(labels, 500, 0.5, np.random.default_rng(0))
    assert np.bincount(owner, minlength=500).min() == data.LEAST_ROWS
    assert np.bincount(owner).sum() == 1320


def test_too_few_rows_for_the_devices_is_one_clear_line() -> None:
    with pytest.raises(ConfigError, match="10 training rows are too few for 6 devices"):
        data.dirichlet(np.zeros(10, np.int64), 6, 0.5, np.random.default_rng(0))


def test_rows_go_to_the_device_that_the_data_names(tmp_path: Path) -> None:
    split = data.load(write(tmp_path / "d.npz"), None)
    assert [len(y) for _, y in split.devices] == [10, 5, 15]  # owners 3, 7, 9


def test_fewer_devices_keep_the_largest_owners(tmp_path: Path) -> None:
    split = data.load(write(tmp_path / "d.npz"), 2)
    assert [len(y) for _, y in split.devices] == [10, 15]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"client_train": None}, "missing .'client_train'."),
        ({"y_train": np.zeros(3, np.int64)}, "as many rows each"),
        ({"y_test": np.zeros(0, np.int64)}, "and some"),
        ({"x_train": np.array([{}] * 30, object)}, "without pickles"),
    ],
)
def test_wrong_data_is_one_clear_line(
    tmp_path: Path, changes: dict[str, object], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        data.load(write(tmp_path / "d.npz", **changes), None)


def test_more_devices_than_owners_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="4 devices asked for, the data has rows of 3"):
        data.load(write(tmp_path / "d.npz"), 4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--drop", "0.6", "--straggle", "0.4"], "leave some devices"),
        (["--cohort", "11"], "--cohort must be 1 to 10"),
        (["--rounds", "0"], "at least 1"),
        (["--model", "m.onnx"], "go together"),
        (["--hosts", "-1"], "--hosts must be at least 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        cli.settings(vars(cli.parser().parse_args(options)))


def test_droppers_and_stragglers_are_other_devices_and_the_quorum_can_be_met() -> None:
    s = Settings(drop=0.3, straggle=0.3)
    assert list(s.droppers) == [0, 1, 2]
    assert list(s.stragglers) == [3, 4, 5]
    assert 1 <= s.quorum <= 4


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({"devices": 12}, [1] * 12),
        ({"devices": 100}, [25] * 4),
        ({"devices": 30}, [15] * 2),
        ({"devices": 1000}, [125] * 8),
        ({"devices": 10, "hosts": 3}, [3, 3, 4]),
        ({"devices": 4, "hosts": 9}, [1] * 4),
        ({"devices": 20, "drop": 0.1, "straggle": 0.1, "hosts": 2}, [1, 1, 1, 1, 8, 8]),
    ],
)
def test_devices_share_processes_but_those_that_are_to_be_hurt(
    options: dict[str, Any], sizes: list[int]
) -> None:
    settings = Settings(cohort=4, **options)
    assert [len(group) for group in settings.groups] == sizes
    assert [n for group in settings.groups for n in group] == list(range(settings.devices))


def test_a_round_waits_for_its_cohort_unless_some_of_it_may_never_come() -> None:
    assert Settings(devices=100, cohort=20, drop=0.3).select_s > 10
    assert Settings().select_s > 10
    assert Settings(drop=0.1).select_s == Settings(straggle=0.1).select_s == 1.0


def test_a_recipe_brings_what_it_learns_well_with_and_options_win() -> None:
    plain = cli.settings(vars(cli.parser().parse_args(["--recipe", "anomaly"])))
    asked = cli.settings(vars(cli.parser().parse_args(["--recipe", "anomaly", "--lr", "0.5"])))
    assert (plain.epochs, plain.lr) == (4, 0.003)
    assert (asked.epochs, asked.lr) == (4, 0.5)
    assert cli.settings(vars(cli.parser().parse_args([]))).lr == Settings().lr


def test_the_deadline_is_short_where_every_round_waits_for_it() -> None:
    usual = cli.settings(vars(cli.parser().parse_args([])))
    late = cli.settings(vars(cli.parser().parse_args(["--straggle", "0.3"])))
    assert late.deadline_s < usual.deadline_s
    assert (
        cli.settings(
            vars(cli.parser().parse_args(["--straggle", "0.3", "--deadline", "9"]))
        ).deadline_s
        == 9
    )


def record() -> report.Record:
    rounds = [
        report.RoundRow(1, "commit", 9, 1, 0, 0.5),
        report.RoundRow(2, "abort", 1, 0, 0, None),
        report.RoundRow(3, "commit", 8, 0, 2, 0.75),
    ]
    devices = [
        report.DeviceRow("d1", 11, 0, 60.0, 90.0),
        report.DeviceRow("d2", 12, -9, 61.0, 0.0),
    ]
    return report.Record(
        accuracy_before=0.25,
        accuracy_alone=0.3,
        accuracy_after=0.75,
        rounds=rounds,
        devices=devices,
        bytes_up_mean=1000.0,
        bytes_down_mean=5000.0,
        bytes_dense=40000,
        device_rss_mib=61.0,
        training_rss_mib=90.0,
        coordinator_rss_mib=50.0,
        model_digest="ab" * 32,
        model_sha256="cd" * 32,
        broker="mosquitto",
        seconds=3.0,
    )


def test_the_table_tells_the_gain_the_bytes_and_who_left() -> None:
    text = report.table(record())
    assert "+50.0 points" in text
    assert "1/40 of dense" in text
    assert "1 stayed, 1 left; late updates: 2" in text
    assert max(map(len, text.splitlines())) <= 80


def test_the_record_is_json_with_the_promised_names() -> None:
    names = json.loads(record().to_json())
    assert {"accuracy_before", "accuracy_alone", "accuracy_after", "rounds", "devices"} <= set(
        names
    )
    assert set(names["rounds"][0]) == {
        "number", "outcome", "reported", "left", "late", "accuracy",
    }  # fmt: skip
    assert {"id", "pid", "exit", "rss_mib"} <= set(names["devices"][0])


def test_the_table_says_how_many_devices_share_a_process_and_what_was_found() -> None:
    found = {"detected_at_level": 0.8, "detected": 0.9, "false_alarms": 0.06}
    shared = dataclasses.replace(
        record(),
        measure="AUC",
        devices=[report.DeviceRow(f"d{i}", 11, 0, 100.0, 60.0, 25) for i in range(25)],
        anomalies=dict.fromkeys(("shipped", "alone", "together"), found),
    )
    text = report.table(shared)
    assert "process of 25 devices 100 MiB" in text
    assert "AUC on rows that no device has seen" in text
    assert "0.900, false alarms 0.060" in text
    assert max(map(len, text.splitlines())) <= 80


def test_the_curves_are_a_picture(tmp_path: Path) -> None:
    report.curves(record(), tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
