# SPDX-License-Identifier: Apache-2.0
"""The files of the card image agree with each other; the image itself is proven by booting it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from loading import module_at

ROOT = Path(__file__).resolve().parents[2]
IMAGE = ROOT / "packaging/image"
UNITS = IMAGE / "overlay/etc/systemd/system"


PROVISION = module_at(IMAGE / "overlay/usr/lib/fedge-image/provision.py")
BUILD = module_at(IMAGE / "build.py")


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


def system(folder: Path, *, packages: str = "a 1 all\n") -> Any:
    """Make something in the shape of a root file system, with an archive that holds its listing."""
    (folder / "root/etc").mkdir(parents=True)
    (folder / "root/etc/issue").write_text("fedge\n")
    (folder / "root/etc/link").symlink_to("issue")
    for path in (folder / "root/etc/issue", folder / "root/etc", folder / "root/etc/link"):
        os.utime(path, (5, 5), follow_symlinks=False)
    return squashed(folder, packages)


def squashed(folder: Path, packages: str = "a 1 all\n") -> Any:
    archive = folder / "system.squashfs"
    archive.write_text(str(sorted(BUILD.listing(folder / "root").items())))
    return BUILD.System(folder / "root", packages, archive)


def test_two_systems_of_the_same_files_are_the_same(tmp_path: Path) -> None:
    BUILD.expect_same(system(tmp_path / "a"), system(tmp_path / "b"))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda root: (root / "etc/machine-id").write_text("1"), "etc/machine-id"),
        (lambda root: os.utime(root / "etc/issue", (6, 6)), "etc/issue"),
        (lambda root: (root / "etc/issue").chmod(0o600), "etc/issue"),
        (lambda root: (root / "etc/link").unlink(), "etc/link"),
    ],
    ids=["one file more", "another date", "another mode", "one link less"],
)
def test_what_differs_between_two_builds_ends_them_by_name(
    change: Callable[[Path], object], named: str, tmp_path: Path
) -> None:
    first = system(tmp_path / "a")
    system(tmp_path / "b")
    change(tmp_path / "b/root")
    with pytest.raises(SystemExit, match=named):
        BUILD.expect_same(first, squashed(tmp_path / "b"))


def test_a_mirror_that_moved_on_between_two_builds_is_not_taken_for_a_fault(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="mirror moved on between: a 1 all a 2 all"):
        BUILD.expect_same(system(tmp_path / "a"), system(tmp_path / "b", packages="a 2 all\n"))
