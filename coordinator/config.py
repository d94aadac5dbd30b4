# SPDX-License-Identifier: Apache-2.0
"""`coordinator.toml` to frozen dataclasses. An unknown key is an error that names its nearest."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coordinator import pacing, strategy
from coordinator.pacing import Pace
from coordinator.quarantine import Rules
from coordinator.task import Task
from edge_sdk.errors import ConfigError, FedgeError

EMBEDDED_PORT = 1883
_BROKER = re.compile(r"embedded(:[0-9]{1,5})?|mqtts?://[^\s/]+")
_TOP = ("broker", "store", "ca_file", "username", "password_file", "client_id", "task")
_BUDGET = ("epochs", "steps", "seconds", "batch", "lr", "mu")
_PLAIN = ("codec", "downlink", "late", "max_norm", "max_examples", "seed", "devices", "where")
_QUARANTINE = ("strikes", "window", "rounds", "hours")
_TASK = ("bundle", "pace", "strategy", "budget", "quarantine", *_PLAIN)


@dataclass(frozen=True, slots=True)
class Config:
    """What a coordinator is told at its start. Paths are as found from the file's own folder."""

    broker: str
    store: Path
    tasks: tuple[tuple[Task, Pace], ...]
    ca_file: Path | None = None
    username: str | None = None
    password_file: Path | None = None
    client_id: str = "fedge-coordinator"

    @property
    def embedded_port(self) -> int | None:
        """The port of the embedded broker; None when the broker stands elsewhere."""
        if not self.broker.startswith("embedded"):
            return None
        return int(self.broker.partition(":")[2] or EMBEDDED_PORT)

    def password(self) -> str | None:
        """Read the password from its file; None when there is none.

        Raises: ConfigError when the file cannot be read.
        """
        if self.password_file is None:
            return None
        try:
            return self.password_file.read_text().rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise ConfigError(f"password_file {self.password_file}: {reason}") from error


def load(path: str | Path) -> Config:
    """Read a configuration file.

    Raises: ConfigError of one line: what was expected, what came, what is nearest.
    """
    file = Path(path)
    try:
        with file.open("rb") as source:
            found = tomllib.load(source)
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not TOML: {error}") from error
    try:
        return parse(found, file.parent)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error


def parse(found: Mapping[str, Any], folder: Path) -> Config:
    """Check a parsed file; relative paths are taken from `folder`.

    Raises: ConfigError naming the key.
    """
    _known(found, _TOP, "")
    tasks = found.get("task", {})
    if not isinstance(tasks, Mapping) or not tasks:
        raise ConfigError("expected at least one [task.NAME], got none")
    broker = _text(found, "broker", "embedded")
    if not _BROKER.fullmatch(broker):
        raise ConfigError(
            f'expected broker = "embedded", "embedded:PORT", "mqtt://HOST[:PORT]" or '
            f'"mqtts://HOST[:PORT]", got {broker!r}'
        )
    username = _text(found, "username", "")
    return Config(
        broker=broker,
        store=folder / _text(found, "store", "coordinator"),
        tasks=tuple(_task(name, body, folder) for name, body in sorted(tasks.items())),
        ca_file=_path(found, "ca_file", folder),
        username=username or None,
        password_file=_path(found, "password_file", folder),
        client_id=_text(found, "client_id", "fedge-coordinator"),
    )


def _task(name: str, body: object, folder: Path) -> tuple[Task, Pace]:
    where = f"task.{name}"
    if not isinstance(body, Mapping):
        raise ConfigError(f"expected [{where}] to be a table, got {body!r}")
    _known(body, _TASK, where)
    for needed in ("bundle", "pace"):
        if needed not in body:
            raise ConfigError(f"[{where}]: expected the key {needed}, got none")
    budget = _table(body, "budget", _BUDGET, where)
    held = _table(body, "quarantine", _QUARANTINE, where)
    values: dict[str, Any] = {key: body[key] for key in _PLAIN if key in body} | dict(budget)
    if budget and "epochs" not in budget and ("steps" in budget or "seconds" in budget):
        values["epochs"] = None  # a budget in steps or seconds is not cut short by the default
    try:
        if "strategy" in body:
            values["strategy"] = strategy.from_spec(body["strategy"])
        values["quarantine"] = Rules(**held)
        pace = pacing.from_spec(body["pace"])
        return Task(name, folder / _text(body, "bundle", ""), **values), pace
    except FedgeError as error:
        raise ConfigError(f"[{where}]: {error}") from error


def _table(
    body: Mapping[str, Any], name: str, keys: Sequence[str], where: str
) -> Mapping[str, Any]:
    found = body.get(name, {})
    if not isinstance(found, Mapping):
        raise ConfigError(f"[{where}]: expected {name} = {{ {keys[0]} = 1, .. }}, got {found!r}")
    _known(found, keys, f"{where}.{name}")
    return found


def _known(found: Mapping[str, Any], keys: Iterable[str], where: str) -> None:
    for key in found:
        if key not in keys:
            near = difflib.get_close_matches(str(key), list(keys), 1, 0.5)
            hint = f"did you mean {near[0]}?" if near else f"it takes {', '.join(keys)}"
            place = f"[{where}]" if where else "the top level"
            raise ConfigError(f"unknown key {key!r} in {place}; {hint}")


def _text(found: Mapping[str, Any], key: str, default: str) -> str:
    value = found.get(key, default)
    if not isinstance(value, str) or (key in found and not value):
        raise ConfigError(f"expected {key} to be text, got {value!r}")
    return value


def _path(found: Mapping[str, Any], key: str, folder: Path) -> Path | None:
    return folder / _text(found, key, "") if key in found else None
