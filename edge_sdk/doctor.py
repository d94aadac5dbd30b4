# SPDX-License-Identifier: Apache-2.0
"""What a device needs, looked at one by one: what is well, what is not, and what to do about it.

Whatever is read of the board is read below a root, which stands for ``/`` in tests. Nothing here
starts a device or changes one.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import re
import shutil
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from edge_sdk import conditions, meter
from edge_sdk.device_config import DeviceConfig
from edge_sdk.errors import FedgeError
from edge_sdk.store import is_in_use
from edge_sdk.usage import SANE_FROM_S

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

    from edge_sdk.bundle import Bundle

State = Literal["ok", "warn", "fail"]

PACKAGES = ("numpy", "paho-mqtt", "cryptography")
MIB = 1 << 20
LEAST_DISK, SOME_DISK = 16 * MIB, 256 * MIB
BASE_RAM = 96 * MIB
"""An interpreter and an engine with a small model: what training takes at the least."""
HOT_C = 80.0  # a Raspberry Pi slows down here
SOON_DAYS = 30
ANSWER_S = 10.0
_FAILED, _CONFIG, _BROKER, _MISSING = 1, 3, 4, 6  # exit codes
_THROTTLED = {  # bits of the firmware's word: now, and 16 higher since the boot
    0: "the voltage is too low",
    1: "the frequency is capped",
    2: "it is throttled",
    3: "it is near its limit of temperature",
}
_TELEMETRY = Path("Microsoft/DeveloperTools/.onnxruntime")


class Finding(NamedTuple):
    """What became of one check."""

    check: str
    state: State
    says: str
    do: str = ""
    """What a person does about it; nothing where all is well."""
    code: int = 0
    """The exit code of a failure."""

    @property
    def ok(self) -> bool:
        """Whether a device can work with it as it is."""
        return self.state != "fail"

    def to_json(self) -> dict[str, Any]:
        """Return it for machines."""
        return {
            "check": self.check,
            "ok": self.ok,
            "state": self.state,
            "says": self.says,
            "do": self.do,
        }

    def __str__(self) -> str:
        word = {"ok": "ok  ", "warn": "warn", "fail": "FAIL"}[self.state]
        is_new = self.do and self.do not in self.says
        return f"{word} {self.check:<13} {self.says}" + (f" -> {self.do}" if is_new else "")


class _Not(Exception):  # noqa: N818 - says what is the case
    """Something is not as it should be."""

    def __init__(self, says: str, do: str, state: State = "fail") -> None:
        super().__init__(says)
        self.says, self.do, self.state = says, do, state


@dataclass(frozen=True, slots=True)
class Board:
    """Where a device is looked at: its configuration, its state folder, and the machine."""

    config: DeviceConfig
    state: Path
    root: Path = Path("/")
    now_s: float = field(default_factory=lambda: dt.datetime.now(dt.UTC).timestamp())
    home: Path = field(default_factory=Path.home)
    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))


def examine(board: Board) -> Iterator[Finding]:
    """Check everything, in the order in which a person would mend it."""
    for name, (check, code) in _CHECKS.items():
        try:
            yield Finding(name, "ok", check(board))
        except _Not as found:
            yield Finding(name, found.state, found.says, found.do, code)
        except (FedgeError, OSError, ImportError, ValueError, KeyError) as error:
            says = " ".join(str(error).split())
            do = re.split(r"[:;] ", says)[-1] if re.search(r"[:;] ", says) else ""
            yield Finding(name, "fail", says, do, code)


# --- what it is made of -------------------------------------------------------------------------
def _configuration(board: Board) -> str:
    config = board.config
    files = {"bundle": config.bundle, "ca_file": config.ca_file, "password": config.password_file}
    for key, path in files.items():
        if path is not None and not os.access(path, os.R_OK):
            raise _Not(f"{key}: cannot read {path}", "correct the path, or its owner and mode")
    secret = config.password_file
    if secret is not None and secret.stat().st_mode & 0o077:
        raise _Not(f"others may read {secret}", f"chmod 600 {secret}", "warn")
    return f"task {config.task}, broker {config.broker.rpartition('@')[2]}"


def _packages(board: Board) -> str:  # noqa: ARG001 - as the other checks are called
    from importlib.metadata import PackageNotFoundError, version

    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            raise _Not(f"{package} is not installed", "pip install fedge") from None
    return f"python {sys.version.split()[0]}, {', '.join(found)}"


def _engine(board: Board) -> str:
    """Say which engine runs the model, and why no other."""
    from edge_sdk import engine

    bundle = _bundle(board)
    if bundle is None:
        there = engine.installed()
        if not there:
            extras = " or ".join(f"pip install '{r.extra}'" for r in engine.ENGINES.values())
            raise _Not("no engine is installed", extras)
        return f"{', '.join(there)} installed; the first bundle decides"
    chosen, reasons = engine.choose(bundle.manifest, board.config.engine)
    others = "; ".join(f"not {name}: {why}" for name, why in reasons.items() if name != chosen)
    return f"{chosen} {engine.ENGINES[chosen].version()}" + (f"; {others}" if others else "")


def _telemetry(board: Board) -> str:
    """Look for what onnxruntime writes where its telemetry is on."""
    caches = [board.home / ".cache", board.state / ".cache"]
    if named := board.environ.get("XDG_CACHE_HOME"):
        caches.append(Path(named))
    for folder in (cache / _TELEMETRY for cache in caches):
        if folder.exists():
            raise _Not(
                f"some program ran onnxruntime with its telemetry on: {folder}",
                f"rm -r {folder}, and set ORT_DISABLE_TELEMETRY=1 for that program",
                "warn",
            )
    return "off in every process of fedge, and onnxruntime has left no device id here"


# --- the board ----------------------------------------------------------------------------------
def _memory(board: Board) -> str:
    free = _meminfo(board.root).get("MemAvailable")
    if free is None:
        return "this board does not say how much is free"
    bundle = _bundle(board)
    costs = bundle.manifest["cost"] if bundle is not None else {}
    needs = max(BASE_RAM, int(costs.get("ram_peak", 0)))
    if free < needs:
        raise _Not(
            f"{free // MIB} MiB available, training takes about {needs // MIB} MiB",
            "stop other programs, or train less of the model",
        )
    return f"{free // MIB} MiB available, training takes about {needs // MIB} MiB"


def _clock(board: Board) -> str:
    today = dt.datetime.fromtimestamp(board.now_s, dt.UTC).strftime("%Y-%m-%d %H:%M UTC")
    do = "connect a time server (timedatectl set-ntp true) or a battery-backed clock"
    if not SANE_FROM_S <= board.now_s < SANE_FROM_S + 40 * 365 * 86_400:
        raise _Not(f"it is {today} here, which cannot be; TLS will fail", do)
    if not meter.is_synchronized(board.root):
        raise _Not(f"{today}, not synchronized with a time server", do, "warn")
    return f"{today}, synchronized"


def _disk(board: Board) -> str:
    folder = next(p for p in (board.state, *board.state.absolute().parents) if p.exists())
    kind, options = _mount(board.root, folder)
    if "ro" in options:
        raise _Not(
            f"{folder} is on a file system that is read-only",
            "a card that fails is remounted so: look at dmesg, replace the card; else remount it",
        )
    try:
        with tempfile.TemporaryFile(dir=folder) as trial:
            trial.write(b"fedge")
            trial.flush()
            os.fsync(trial.fileno())
    except OSError as error:
        do = "correct the folder's owner and mode, or free some space"
        raise _Not(f"cannot write in {folder}: {error.strerror}", do) from error
    there = os.statvfs(folder)
    free = there.f_bavail * there.f_frsize
    if free < LEAST_DISK:
        raise _Not(f"{free // MIB} MiB free in {folder}", "free some space: training needs it")
    if free < SOME_DISK:
        raise _Not(f"{free // MIB} MiB free in {folder}", "free some space soon", "warn")
    if kind == "tmpfs":
        raise _Not(f"{folder} is in memory and gone at the next boot", "set another state", "warn")
    return f"{free // MIB} MiB free, {folder} takes writes"


def _temperature(board: Board) -> str:
    readings = conditions.temperatures(board.root)
    if not readings:
        return "this board has no thermometer"
    hottest, limit = max(readings), board.config.limits.max_celsius
    if limit is not None and hottest >= limit:
        do = "let it cool: better air, a heat sink, or a higher max_celsius"
        raise _Not(f"{hottest:.0f} C, no training above max_celsius={limit:g}", do, "warn")
    if hottest >= HOT_C:
        raise _Not(f"{hottest:.0f} C, it slows down", "better air or a heat sink", "warn")
    return f"{hottest:.0f} C"


def _throttling(board: Board) -> str:
    word = _throttled(board.root)
    if word is None:
        return "this board does not tell"
    now = [said for bit, said in _THROTTLED.items() if word >> bit & 1]
    since = [said for bit, said in _THROTTLED.items() if word >> (bit + 16) & 1]
    if word & 1:
        raise _Not(f"now {', '.join(now)}", "a better power supply and cable: cards die of this")
    if now:
        raise _Not(f"now {', '.join(now)}", "better air or a heat sink", "warn")
    if since:
        do = "a better power supply" if word >> 16 & 1 else "better air or a heat sink"
        raise _Not(f"since the boot {', '.join(since)}", do, "warn")
    return "never since the boot"


# --- the other side -----------------------------------------------------------------------------
def _broker(board: Board) -> str:
    from edge_sdk.transport.mqtt import Mqtt

    config = board.config
    mqtt = Mqtt(
        config.broker,
        f"doctor-{os.getpid()}",
        ca_file=config.ca_file,
        username=config.username,
        password=config.password,
    )
    try:
        mqtt.probe()
    finally:
        mqtt.close()
    return f"{mqtt.endpoint} lets us in"


def _certificate(board: Board) -> str:
    from edge_sdk.transport.endpoint import Endpoint

    config = board.config
    endpoint = Endpoint.parse(config.broker, ca_file=config.ca_file)
    if endpoint.tls is None:
        return _no_tls(endpoint.host)
    trusted = _certificates(config.ca_file.read_bytes()) if config.ca_file is not None else []
    said = [_valid(one, "the CA's", board.now_s) for one in trusted]
    try:
        where = endpoint.host, endpoint.port
        shown = ssl.get_server_certificate(where, timeout=ANSWER_S)
    except OSError as error:
        why = getattr(error, "strerror", None) or error
        raise _Not(f"the broker shows no certificate ({why})", "see the line above") from error
    said += [_valid(one, "the broker's", board.now_s) for one in _certificates(shown.encode())]
    return ", ".join(said)


def _no_tls(host: str) -> str:
    if host in {"localhost", "127.0.0.1", "::1"}:
        return "no TLS, and none needed on this machine"
    do = "mqtts://, with the CA's certificate as ca_file"
    raise _Not("no TLS: whoever is on the way reads and changes what is said", do, "warn")


def _valid(certificate: Certificate, whose: str, now_s: float) -> str:
    starts, ends = _life(certificate)
    today = dt.datetime.fromtimestamp(now_s, dt.UTC)
    if today < starts:
        raise _Not(
            f"{whose} certificate is valid from {starts:%Y-%m-%d %H:%M} UTC on, "
            f"and here it is {today:%Y-%m-%d %H:%M} UTC",
            "set this board's clock: timedatectl set-ntp true",
        )
    if today >= ends:
        raise _Not(f"{whose} certificate expired on {ends:%Y-%m-%d}", "renew it")
    days = (ends - today).days
    if days < SOON_DAYS:
        raise _Not(f"{whose} certificate expires in {days} days", "renew it soon", "warn")
    return f"{whose} certificate is good for {days} days"


def _certificates(pem: bytes) -> list[Certificate]:
    from cryptography.x509 import load_pem_x509_certificate

    found = re.findall(rb"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", pem, re.DOTALL)
    if not found:
        raise _Not("the CA's file holds no certificate", "set ca_file to a PEM file of the CA's")
    return [load_pem_x509_certificate(one) for one in found]


def _life(certificate: Certificate) -> tuple[dt.datetime, dt.datetime]:
    if hasattr(certificate, "not_valid_after_utc"):  # cryptography 42 on
        return certificate.not_valid_before_utc, certificate.not_valid_after_utc
    ends = certificate.not_valid_before, certificate.not_valid_after
    return ends[0].replace(tzinfo=dt.UTC), ends[1].replace(tzinfo=dt.UTC)


# --- the device ---------------------------------------------------------------------------------
def _state(board: Board) -> str:
    folder = board.state
    if not folder.exists():
        return f"{folder} will be made at the first start"
    if not os.access(folder, os.W_OK | os.X_OK):
        raise _Not(f"cannot write in {folder}", "correct its owner, or set another state")
    damaged = sorted(path.name for path in folder.rglob("*.damaged"))
    if damaged:
        do = "look at the disk; the device went on without them, delete them"
        raise _Not(f"set aside as damaged: {', '.join(damaged)}", do, "warn")
    return f"{folder}, {'in use by a running device' if is_in_use(folder) else 'not in use'}"


def _conditions(board: Board) -> str:
    around = conditions.Surroundings(board.root, int(_status(board).get("examples", 0)))
    wanted = board.config.conditions & meter.within(board.config.limits)
    lapsed = wanted.lapsed(around)
    if lapsed:
        return f"no training now: {', '.join(lapsed)} does not hold"
    return f"{wanted.name}: hold now"


def _limits(board: Board) -> str:
    limits = board.config.limits
    today = meter.Meter(board.state / "usage.json", limits, time, board.root)
    if lapsed := today.lapsed(0):
        do = "wait for the next day, or raise it under [limits]"
        raise _Not(f"{', '.join(lapsed)} is used up", do, "warn")
    used = today.status()
    data = f"{used['bytes'] / 1e6:.1f}" + _of(used["max_bytes"], 1e6) + " MB"
    trained = (
        f"{used['training_s'] / 60:.1f}" + _of(used["max_training_s"], 60) + " min of training"
    )
    return f"used today: {data}, {trained}"


def _of(most: float | None, unit: float) -> str:
    return "" if most is None else f" of {most / unit:.1f}"


# --- reading ------------------------------------------------------------------------------------
def _status(board: Board) -> dict[str, Any]:
    try:
        found = json.loads((board.state / "status.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _bundle(board: Board) -> Bundle | None:
    """Return the bundle in use, else the one that the configuration names."""
    from edge_sdk.bundle import Bundle

    digest = _status(board).get("bundle")
    stored = board.state / "bundles" / f"{digest}.fedge"
    if digest and stored.exists():
        return Bundle.load(stored)
    return Bundle.load(board.config.bundle) if board.config.bundle else None


def _meminfo(root: Path) -> dict[str, int]:
    """Return the kernel's memory figures, bytes."""
    found = {}
    for line in _text(root / "proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        if value.split()[:1] and value.split()[0].isdigit():
            found[name] = int(value.split()[0]) << 10
    return found


def _mount(root: Path, folder: Path) -> tuple[str, set[str]]:
    """Return the kind of the file system that a folder is on, and its options."""
    best, kind, options = -1, "", set[str]()
    for line in _text(root / "proc/mounts").splitlines():
        fields = line.split(" ")
        if len(fields) < 4:
            continue
        point = Path(fields[1].replace("\\040", " "))
        if folder.absolute().is_relative_to(point) and len(point.parts) > best:
            best, kind, options = len(point.parts), fields[2], set(fields[3].split(","))
    return kind, options


def _throttled(root: Path) -> int | None:
    """Return the firmware's word about throttling, from whoever tells it; None on other boards."""
    word = _text(root / "sys/devices/platform/soc/soc:firmware/get_throttled")
    if not word and root == Path("/") and shutil.which("vcgencmd"):
        asked = subprocess.run(
            ["vcgencmd", "get_throttled"], capture_output=True, text=True, timeout=5, check=False
        )
        word = asked.stdout.partition("=")[2].strip()
    if re.fullmatch(r"(0x)?[0-9a-fA-F]{1,8}", word):
        return int(word, 16)
    for name in root.glob("sys/class/hwmon/hwmon*/name"):
        if _text(name) == "rpi_volt":
            return int(_text(name.with_name("in0_lcrit_alarm")) == "1")
    return None


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace").strip()
    except OSError:  # a reading that this board does not have
        return ""


_CHECKS: dict[str, tuple[Callable[[Board], str], int]] = {
    "configuration": (_configuration, _CONFIG),
    "packages": (_packages, _MISSING),
    "engine": (_engine, _MISSING),
    "telemetry": (_telemetry, _FAILED),
    "memory": (_memory, _FAILED),
    "clock": (_clock, _FAILED),
    "disk": (_disk, _FAILED),
    "temperature": (_temperature, _FAILED),
    "throttling": (_throttling, _FAILED),
    "state": (_state, _FAILED),
    "broker": (_broker, _BROKER),
    "certificate": (_certificate, _BROKER),
    "conditions": (_conditions, _FAILED),
    "limits": (_limits, _FAILED),
}
