# SPDX-License-Identifier: Apache-2.0
"""The container files, read: no engine builds them here, and each of them says so."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from coordinator import config as coordinator_config
from edge_sdk.errors import ConfigError

FOLDER = Path(__file__).resolve().parents[2] / "packaging" / "container"
FILES = sorted(FOLDER.glob("Containerfile.*"))
KNOWN = {"FROM", "ARG", "WORKDIR", "COPY", "RUN", "ENV", "USER", "VOLUME", "ENTRYPOINT", "CMD"}


def instructions(file: Path) -> list[tuple[str, str]]:
    text = re.sub(r"^#.*\n", "", file.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [
        (w[0], w[2].strip()) for w in (line.partition(" ") for line in text.splitlines() if line)
    ]


def compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((FOLDER / "compose.yaml").read_text())
    return found


@pytest.fixture(params=FILES, ids=lambda file: file.suffix[1:])
def containerfile(request: pytest.FixtureRequest) -> Path:
    found: Path = request.param
    return found


def test_there_is_one_for_the_coordinator_and_one_for_the_device() -> None:
    assert [file.suffix for file in FILES] == [".coordinator", ".device"]


def test_every_file_says_that_it_was_not_built_here(containerfile: Path) -> None:
    assert "NOT BUILT HERE" in containerfile.read_text()
    assert "NOT RUN HERE" in (FOLDER / "compose.yaml").read_text()


def test_every_instruction_is_one_that_exists(containerfile: Path) -> None:
    assert {word for word, _ in instructions(containerfile)} <= KNOWN


def test_bases_are_named_with_a_release_and_never_latest(containerfile: Path) -> None:
    bases = [
        rest.partition(" AS ")[0] for word, rest in instructions(containerfile) if word == "FROM"
    ]
    bases += [service["image"] for service in compose()["services"].values()]
    for base in bases:
        assert re.fullmatch(r"\S+:\d\S+", base), base
        assert "latest" not in base


def test_what_runs_is_not_root_and_may_write_to_its_state_alone(containerfile: Path) -> None:
    found = instructions(containerfile)
    last = max(n for n, (word, _) in enumerate(found) if word == "FROM")
    final = dict(found[last:])
    assert final["USER"] == "10001"
    assert json.loads(final["VOLUME"]) == [final["WORKDIR"]]


def test_nothing_phones_home_from_a_container(containerfile: Path) -> None:
    assert any(
        word == "ENV" and "ORT_DISABLE_TELEMETRY=1" in rest
        for word, rest in instructions(containerfile)
    )


def test_only_what_a_lock_names_is_installed(containerfile: Path) -> None:
    commands = [rest for word, rest in instructions(containerfile) if word == "RUN"]
    installs = re.findall(r"pip install ([^&]+)", " ".join(commands))
    assert installs
    for words in installs:
        assert "--require-hashes" in words or "--no-deps" in words, words
    for lock in re.findall(r"packaging/locks/([^\"\s]+)", " ".join(commands)):
        for arch in ("amd64", "arm64"):
            name = lock.replace("${TARGETARCH}", arch)
            assert (FOLDER.parent / "locks" / name).exists(), name


def test_what_is_copied_and_run_exists_in_the_checkout(containerfile: Path) -> None:
    entry = [json.loads(rest) for word, rest in instructions(containerfile) if word == "ENTRYPOINT"]
    scripts = tomllib.loads((FOLDER.parents[1] / "pyproject.toml").read_text())["project"][
        "scripts"
    ]
    assert entry == [["/opt/fedge/bin/fedge"]]
    assert "fedge" in scripts


def test_services_are_read_only_without_capabilities_and_bound_to_this_machine() -> None:
    found = compose()
    for name, service in found["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:"), port
        for volume in service["volumes"]:
            source = volume.partition(":")[0]
            is_named = source in found["volumes"]
            assert is_named or source.startswith("./config") or (FOLDER / source).exists(), volume


def test_the_broker_lets_nobody_in_without_a_password_and_keeps_what_it_holds() -> None:
    lines = (FOLDER / "mosquitto.conf").read_text().splitlines()
    assert {"allow_anonymous false", "persistence true"} <= set(lines)


def test_the_coordinators_settings_are_such_as_it_reads(tmp_path: Path) -> None:
    table = tomllib.loads((FOLDER / "coordinator.toml").read_text())
    found = coordinator_config.parse(table, tmp_path)
    assert found.broker == "mqtt://broker"
    assert str(found.password_file) == "/run/secrets/broker-password"
    with pytest.raises(ConfigError):
        coordinator_config.parse({**table, "brokr": 1}, tmp_path)
