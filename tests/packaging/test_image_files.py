# SPDX-License-Identifier: Apache-2.0
"""The files of the card image agree with each other; the image itself is proven by booting it."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
IMAGE = ROOT / "packaging/image"
UNITS = IMAGE / "overlay/etc/systemd/system"


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PROVISION = load(IMAGE / "overlay/usr/lib/fedge-image/provision.py")
BUILD = load(IMAGE / "build.py")


@pytest.mark.parametrize("name", [*PROVISION.CHECKS, "inbox"])
def test_each_file_of_the_card_is_explained_and_wakes_the_service(name: str) -> None:
    for page in (IMAGE / "card/README.txt", ROOT / "docs/how-to/flash-a-card.md"):
        assert name in page.read_text(), page.name
    assert f"/boot/firmware/{name}" in (UNITS / "fedge-provision.service").read_text()


def test_the_example_on_the_card_is_a_configuration_that_is_taken() -> None:
    example = (IMAGE / "card/fedge.toml.example").read_text()
    said = [line.removeprefix("# ") for line in example.splitlines()[1:] if "..." not in line]
    assert "min_examples" in PROVISION.settle("\n".join(said), {"ca.pem", "broker-password"})


def test_telemetry_is_off_for_services_and_for_logins() -> None:
    for file in ("etc/environment", "etc/systemd/system.conf.d/fedge.conf"):
        assert "ORT_DISABLE_TELEMETRY=1" in (IMAGE / "overlay" / file).read_text()


def test_one_signature_names_the_disk_everywhere() -> None:
    files = [
        path for path in IMAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ]
    named = [path.name for path in files if "@DISK@" in path.read_text()]
    assert {"fstab", "cmdline.txt", "fedge-data", "genimage.cfg"} <= set(named)
    literal = [path.name for path in files if BUILD.DISK in path.read_text()]
    assert literal == ["build.py"]
    assert f"PARTUUID={BUILD.DISK}-03" in (ROOT / "docs/how-to/flash-a-card.md").read_text()


def test_every_own_unit_is_started_by_something() -> None:
    own = {path.name for path in UNITS.glob("*.service")}
    wanted = {unit for units in BUILD.UNITS_ON.values() for unit in units}
    pulled = {"fedge-hostkeys.service"}  # by ssh.service
    assert own == (wanted & own) | pulled
    assert "Wants=fedge-hostkeys.service" in (UNITS / "ssh.service.d/fedge.conf").read_text()


def test_the_service_reads_the_copies_that_systemd_hands_it() -> None:
    unit = (UNITS / "fedge-device.service.d/image.conf").read_text()
    loaded = re.findall(r"^LoadCredential=(\S+):/data/etc/(\S+)$", unit, re.MULTILINE)
    assert [name for name, file in loaded if name == file] == [
        "fedge.toml",
        "broker-password",
        "ca.pem",
    ]
    kept = PROVISION.check({"fedge.toml": b'broker = "mqtts://hub"\ntask = "t"\n'})
    assert set(kept) == {name for name, _ in loaded}  # none is missing, or it would not start
