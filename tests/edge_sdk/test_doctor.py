# SPDX-License-Identifier: Apache-2.0
"""The doctor on boards made of files: what it finds, and what it says to do."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import json
import os
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hand_bundles import mlp
from planted import planted

from coordinator import certificates
from edge_sdk import device_cli, device_config
from edge_sdk.doctor import CHECKS, Board, Finding, connection, examine, software
from edge_sdk.doctor.hardware import MIB
from edge_sdk.limits import Limits

NOW = dt.datetime(2026, 11, 23, 12, tzinfo=dt.UTC)
DAY = dt.timedelta(days=1)
BUNDLE = mlp(quantized=True)


class Bench:
    """A fake board, looked at by the doctor."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.root = folder, folder / "root"
        self.root.mkdir()
        self.toml: dict[str, Any] = {"broker": "mqtt://127.0.0.1:1", "task": "toy"}
        self.now = NOW
        self.environ: dict[str, str] = {}
        (folder / "state").mkdir()
        self.put("run/systemd/timesync/synchronized", "")
        self.put("proc/meminfo", "MemTotal: 900000 kB\nMemAvailable:  600000 kB\nHugePages: x\n")

    def put(self, path: str, text: str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def board(self, **limits: Any) -> Board:
        config = device_config.parse(self.toml, self.folder)
        config = dataclasses.replace(config, limits=Limits(**limits))
        return Board(
            config,
            self.folder / "state",
            self.root,
            self.now.timestamp(),
            self.folder / "home",
            self.environ,
        )

    def look(self, check: str, **limits: Any) -> Finding:
        (found,) = examine(self.board(**limits), {check: CHECKS[check]})
        return found


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_a_healthy_board_is_all_green_but_for_its_broker(bench: Bench) -> None:
    findings = list(examine(bench.board()))
    assert [f.check for f in findings if f.state != "ok"] == ["broker"]
    assert len(findings) >= 14


@pytest.mark.parametrize(
    ("word", "state", "says", "do"),
    [
        ("0", "ok", "never since the boot", ""),
        ("50005", "fail", "now the voltage is too low, it is throttled", "power supply"),
        ("0x8", "warn", "now it is near its limit of temperature", "heat sink"),
        ("50000", "warn", "since the boot the voltage is too low, it is throttled", "power supply"),
        ("20000", "warn", "since the boot the frequency is capped", "heat sink"),
        ("what?", "ok", "does not tell", ""),
    ],
)
def test_the_firmwares_word_about_throttling_is_spelled_out(
    bench: Bench, word: str, state: str, says: str, do: str
) -> None:
    bench.put("sys/devices/platform/soc/soc:firmware/get_throttled", word)
    found = bench.look("throttling")
    assert found.state == state
    assert says in found.says
    assert do in found.do


def test_an_alarm_of_the_voltage_sensor_is_read_where_the_firmware_is_silent(bench: Bench) -> None:
    bench.put("sys/class/hwmon/hwmon1/name", "rpi_volt\n")
    bench.put("sys/class/hwmon/hwmon1/in0_lcrit_alarm", "1\n")
    assert "voltage is too low" in bench.look("throttling").says
    bench.put("sys/class/hwmon/hwmon1/in0_lcrit_alarm", "0\n")
    assert bench.look("throttling").says == "never since the boot"


def test_a_hot_board_is_told_to_cool(bench: Bench) -> None:
    bench.put("sys/class/thermal/thermal_zone0/temp", "65000")
    assert bench.look("temperature").says == "65 C"
    assert "max_celsius=60" in bench.look("temperature", max_celsius=60).says
    bench.put("sys/class/thermal/thermal_zone1/temp", "83000")
    found = bench.look("temperature")
    assert (found.state, found.do) == ("warn", "better air or a heat sink")


def test_a_clock_that_was_never_set_is_red_and_one_without_a_server_yellow(bench: Bench) -> None:
    bench.now = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
    found = bench.look("clock")
    assert (found.state, found.code) == ("fail", 1)
    assert "timedatectl set-ntp true" in found.do
    bench.now = NOW
    assert bench.look("clock").state == "ok"
    (bench.root / "run/systemd/timesync/synchronized").unlink()
    assert bench.look("clock").state == "warn"


def test_too_little_memory_for_the_bundle_in_use_is_red(bench: Bench) -> None:
    assert bench.look("memory").state == "ok"
    bench.put("proc/meminfo", "MemAvailable: 50000 kB")
    found = bench.look("memory")
    assert found.state == "fail"
    assert "48 MiB available" in found.says
    bench.put("proc/meminfo", "")
    assert "does not say" in bench.look("memory").says


def test_a_bundle_says_how_much_its_training_takes(bench: Bench) -> None:
    table = {"ram_train": {"1": MIB, "16": 300 * MIB}, "ram_peak": 343 * MIB}
    made = planted(mlp(), manifest=lambda manifest: manifest["cost"].update(table))
    made.save(bench.folder / "large.fedge")
    bench.toml["bundle"] = "large.fedge"
    assert "training takes about 343 MiB" in bench.look("memory").says
    bench.put("proc/meminfo", "MemAvailable: 300000 kB")
    found = bench.look("memory")
    assert found.state == "fail"
    assert "292 MiB available, training takes about 343 MiB" in found.says


def test_a_card_that_was_remounted_read_only_is_red(bench: Bench) -> None:
    inner = str(bench.folder).replace(" ", "\\040")
    bench.put("proc/mounts", f"/dev/root / ext4 rw 0 0\n/dev/mmcblk0p3 {inner} ext4 ro,noatime 0 0")
    found = bench.look("disk")
    assert found.state == "fail"
    assert "replace the card" in found.do
    bench.put("proc/mounts", f"/dev/root / ext4 ro 0 0\ntmpfs {inner} tmpfs rw 0 0\njunk\n")
    assert "in memory" in bench.look("disk").says
    bench.put("proc/mounts", f"/dev/root / ext4 ro 0 0\n/dev/sda {inner} ext4 rw 0 0\n")
    assert bench.look("disk").state == "ok"


def test_a_disk_that_is_nearly_full_or_refuses_is_told(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.statvfs

    def small(free_mib: int) -> Any:
        def statvfs(path: Any) -> Any:
            found = list(real(path))
            found[0:2], found[4] = [4096, 4096], free_mib * 256
            return os.statvfs_result(found)

        return statvfs

    monkeypatch.setattr(os, "statvfs", small(5))
    assert bench.look("disk").state == "fail"
    monkeypatch.setattr(os, "statvfs", small(100))
    assert bench.look("disk").state == "warn"

    def full(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert "No space left" in bench.look("disk").says


def test_telemetry_of_another_program_is_found_by_what_it_wrote(bench: Bench) -> None:
    assert bench.look("telemetry").state == "ok"
    left = bench.folder / "home/.cache/Microsoft/DeveloperTools/.onnxruntime"
    left.mkdir(parents=True)
    found = bench.look("telemetry")
    assert found.state == "warn"
    assert "ORT_DISABLE_TELEMETRY=1" in found.do
    left.rmdir()
    bench.environ["XDG_CACHE_HOME"] = str(bench.folder / "xdg")
    (bench.folder / "xdg/Microsoft/DeveloperTools/.onnxruntime").mkdir(parents=True)
    assert bench.look("telemetry").state == "warn"


def test_what_the_configuration_names_must_be_there_and_private(bench: Bench) -> None:
    bench.toml |= {"username": "u", "password_file": "secret"}
    found = bench.look("configuration")
    assert (found.state, found.code) == ("fail", 3)
    (bench.folder / "secret").write_text("x")
    (bench.folder / "secret").chmod(0o644)
    assert "chmod 600" in bench.look("configuration").do
    (bench.folder / "secret").chmod(0o600)
    assert bench.look("configuration").state == "ok"


def test_credentials_in_the_brokers_url_are_not_shown(bench: Bench) -> None:
    bench.toml["broker"] = "mqtt://me:secret@127.0.0.1:1"
    assert not any("secret" in str(found) for found in examine(bench.board()))


def test_damaged_files_in_the_state_folder_are_named(bench: Bench) -> None:
    (bench.folder / "state/residual.bin.damaged").touch()
    assert "residual.bin.damaged" in bench.look("state").says


def test_a_limit_that_is_used_up_is_told_with_what_was_used(bench: Bench) -> None:
    assert bench.look("limits", max_bytes_per_day=10**7).says == (
        "used today: 0.0 of 10.0 MB, 0.0 min of training"
    )
    day = {"bytes": 10**7, "training_s": 60, "elapsed_s": 0, "seen": None, "began": None}
    (bench.folder / "state/usage.json").write_text(json.dumps(day))
    found = bench.look("limits", max_bytes_per_day=10**7)
    assert (found.state, found.ok) == ("warn", True)
    assert "max_bytes_per_day is used up" in found.says


def test_conditions_that_do_not_hold_are_named(bench: Bench) -> None:
    bench.put("sys/class/power_supply/b/type", "Battery")
    assert "on_mains does not hold" in bench.look("conditions", on_battery=False).says


def test_no_tls_is_worth_a_word_unless_the_broker_is_here(bench: Bench) -> None:
    assert bench.look("certificate").state == "ok"
    bench.toml["broker"] = "mqtt://192.0.2.1"
    assert bench.look("certificate").state == "warn"


@contextlib.contextmanager
def serving(folder: Path, made: certificates.Issued, tries: int) -> Iterator[int]:
    """Shake hands over TLS so many times with whoever comes."""
    (folder / "broker.pem").write_bytes(made.certificate)
    (folder / "broker.key").write_bytes(made.key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "broker.pem", folder / "broker.key")
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            for _ in range(tries):
                raw, _ = server.accept()
                with raw, contextlib.suppress(OSError), context.wrap_socket(raw, server_side=True):
                    pass

        thread = threading.Thread(target=serve)
        thread.start()
        yield server.getsockname()[1]
        thread.join(10)


def test_the_life_of_both_certificates_is_told_and_a_wrong_clock_suspected(bench: Bench) -> None:
    ca = certificates.authority("test", NOW)
    made = certificates.broker(ca, ["127.0.0.1"], NOW)
    (bench.folder / "ca.pem").write_bytes(ca.certificate)
    with serving(bench.folder, made, 4) as port:
        bench.toml |= {"broker": f"mqtts://127.0.0.1:{port}", "ca_file": "ca.pem"}
        bench.now = NOW + DAY
        found = bench.look("certificate")
        assert found.state == "ok"
        assert "the broker's certificate is good for" in found.says
        ends = connection._life(connection._certificates(made.certificate)[0])[1]
        bench.now = ends - 5 * DAY
        assert "expires in 5 days" in bench.look("certificate").says
        bench.now = ends + DAY
        assert "expired on" in bench.look("certificate").says
        bench.now = NOW - 400 * DAY
        found = bench.look("certificate")
        assert (found.state, found.code) == ("fail", 4)
        assert "set this board's clock" in found.do
        with socket.create_connection(("127.0.0.1", port)):  # the last of the four
            pass
    found = bench.look("certificate")
    assert found.state == "fail"
    (bench.folder / "ca.pem").write_text("no certificate at all")
    assert bench.look("certificate").state == "fail"


def test_every_finding_is_one_line_and_json_has_what_to_do(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    file = bench.folder / "device.toml"
    file.write_text('broker = "mqtt://127.0.0.1:1"\ntask = "toy"\nstate = "state"')
    assert device_cli.main(["doctor", "--config", str(file)]) == 4
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(CHECKS)
    assert device_cli.main(["doctor", "--config", str(file), "--json"]) == 4
    said = json.loads(capsys.readouterr().out)
    assert {tuple(one) for one in said} == {("check", "ok", "state", "says", "do")}
    (broker,) = [one for one in said if not one["ok"]]
    assert broker["do"] == "start it or correct the URL"


def test_a_package_or_an_engine_that_is_not_there_is_red_with_code_6(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(software, "PACKAGES", ("numpy", "no-such-package"))
    found = bench.look("packages")
    assert (found.state, found.code, found.do) == ("fail", 6, "pip install fedge")
    monkeypatch.setattr("edge_sdk.engine.installed", dict)
    assert "pip install" in bench.look("engine").do


def test_the_page_names_every_check() -> None:
    page = (Path(__file__).parents[2] / "docs/how-to/look-after-a-device.md").read_text()
    assert [name for name in CHECKS if f"`{name}`" not in page] == []
