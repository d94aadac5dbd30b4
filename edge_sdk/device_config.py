# SPDX-License-Identifier: Apache-2.0
"""``device.toml`` as frozen values. An unknown key is an error that names the nearest known one."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar, cast

from edge_sdk import conditions, topics
from edge_sdk.bounds import MAX_TAGS, Tag, are_tags
from edge_sdk.conditions import Condition
from edge_sdk.errors import ConfigError, MessageError
from edge_sdk.limits import Limits
from edge_sdk.trial import Terms

T = TypeVar("T")

LOG_LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True, slots=True)
class SourceConfig:
    """Where examples come from: files put into `folder`, or requests over the socket at `path`."""

    folder: Path | None = None
    socket: Path | None = None
    poll_s: float = 2.0
    label: str = "last"
    """Which CSV column is the label: its name in the header line, or ``last``."""

    def __post_init__(self) -> None:
        if (self.folder is None) == (self.socket is None):
            raise ConfigError("[source] expected either folder or socket; keep one of them")
        if not 0.05 <= self.poll_s <= 3600:
            raise ConfigError(f"[source] poll_s: expected 0.05 to 3600 seconds, got {self.poll_s}")


@dataclass(frozen=True, slots=True)
class DeviceConfig:
    """All that ``fedge device run`` can be told."""

    broker: str
    task: str
    state: Path | None = None
    """Its state folder; ``~/.local/state/fedge/TASK`` if not given."""
    bundle: Path | None = None
    model_file: Path | None = None
    """Where to keep the model in use as a file, ``.tflite`` or ``.onnx``."""
    name: str = ""
    tags: Mapping[str, Tag] = field(default_factory=dict)
    """What the device says of itself: tasks choose by it."""
    engine: str = "auto"
    threads: int = 1
    capacity: int = 2000
    min_examples: int = 1
    error_quantile: float | None = None
    """Of an anomaly detector: the share of the stored examples that is taken as normal."""
    outbox_bytes: int = 64 * 2**20
    conditions: Condition = field(default=conditions.always)
    coordinator_key: bytes | None = None
    ca_file: Path | None = None
    username: str | None = None
    password_file: Path | None = None
    keepalive_s: int = 30
    log_level: str = "info"
    source: SourceConfig | None = None
    checkpoint_s: float = 30.0
    """How often a training under way is kept on disk; 0 is never."""
    limits: Limits = field(default_factory=Limits)
    trial: Terms = field(default_factory=Terms)

    @property
    def password(self) -> str | None:
        """The broker's password, read from its file: never from this one, nor from argv.

        Raises: ConfigError when the file cannot be read.
        """
        if self.password_file is None:
            return None
        try:
            return self.password_file.read_text().rstrip("\n")
        except OSError as error:
            raise ConfigError(f"password_file: {error.strerror}: {self.password_file}") from error

    def __post_init__(self) -> None:
        if self.log_level not in LOG_LEVELS:
            raise ConfigError(f"log_level: expected {', '.join(LOG_LEVELS)}, got {self.log_level}")
        try:
            topics.checked_task(self.task)
        except MessageError as error:
            raise ConfigError(f"task: {error}") from error
        if not self.checkpoint_s >= 0:
            raise ConfigError(f"checkpoint_s: expected seconds from 0, got {self.checkpoint_s}")
        if self.error_quantile is not None and not 0 < self.error_quantile <= 1:
            raise ConfigError(
                f"error_quantile: expected above 0, at most 1, got {self.error_quantile}"
            )


TABLES: dict[str, type[Any]] = {"source": SourceConfig, "trial": Terms, "limits": Limits}
"""Tables of the file and what each is read into."""


def load(path: str | Path) -> DeviceConfig:
    """Read a configuration file; relative paths in it start at its own folder.

    Raises: ConfigError naming the file, the key, what was expected and what came.
    """
    path = Path(path)
    try:
        table = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; give --config a device.toml") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not TOML: {error}") from error
    try:
        return parse(table, path.parent)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def parse(table: Mapping[str, Any], folder: Path = Path()) -> DeviceConfig:
    """Read a table as TOML gives it.

    Raises: ConfigError naming the key.
    """
    values = dict(table)
    tables = {name: values.pop(name) for name in TABLES if name in values}
    config = _read(DeviceConfig, values, folder)
    for name, inner in tables.items():
        if not isinstance(inner, dict):
            raise ConfigError(f"{name}: expected a table [{name}], got {inner!r}")
        config = replace(config, **{name: _read(TABLES[name], inner, folder, f"{name}.")})
    return config


def _read(kind: type[T], table: Mapping[str, Any], folder: Path, prefix: str = "") -> T:
    known = {f.name: f for f in fields(kind) if f.name not in TABLES}  # type: ignore[arg-type]  # dataclasses only
    for key in table:
        if key not in known:
            raise ConfigError(_unknown(prefix + key, [prefix + name for name in known]))
    for name, f in known.items():
        if f.default is MISSING and f.default_factory is MISSING and name not in table:
            raise ConfigError(f"{prefix}{name}: expected a value, it is not there; add it")
    return kind(
        **{
            key: _value(key, str(known[key].type), value, folder, prefix)
            for key, value in table.items()
        }
    )


def _unknown(key: str, known: list[str]) -> str:
    import difflib  # only where a mistake is explained

    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}"
    return f"unknown key {key}; {hint}"


def _value(key: str, kind: str, value: object, folder: Path, prefix: str) -> object:
    check, says = READERS[kind.removesuffix(" | None")]
    try:
        return check(value, folder)
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{prefix}{key}: expected {says}, got {value!r}") from error


def _text(value: object, _: Path) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _count(value: object, _: Path) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise TypeError
    return value


def _number(value: object, _: Path) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError
    return float(value)


def _flag(value: object, _: Path) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _tags(value: object, _: Path) -> Mapping[str, Tag]:
    if not are_tags(value):
        raise TypeError
    return cast("Mapping[str, Tag]", value)


def _path(value: object, folder: Path) -> Path:
    return folder / Path(_text(value, folder)).expanduser()


def _key(value: object, folder: Path) -> bytes:
    key = bytes.fromhex(_text(value, folder))
    if len(key) != 32:
        raise ValueError
    return key


def _conditions(value: object, _: Path) -> Condition:
    return conditions.from_spec(value if isinstance(value, list) else [value])


READERS: dict[str, tuple[Callable[[object, Path], object], str]] = {
    "str": (_text, "text"),
    "int": (_count, "a whole number of at least 1"),
    "float": (_number, "a number"),
    "bool": (_flag, "true or false"),
    "Mapping[str, Tag]": (_tags, f'up to {MAX_TAGS} short tags such as {{ site = "north" }}'),
    "Path": (_path, "a path"),
    "bytes": (_key, "64 hex digits"),
    "Condition": (_conditions, "a list of conditions"),
}
