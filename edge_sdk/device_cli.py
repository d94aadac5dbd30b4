# SPDX-License-Identifier: Apache-2.0
"""``fedge device``: run a device from a configuration file, look at it, check it, forget it."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_sdk.errors import ConfigError, StoreError
from edge_sdk.systemd import Service

if TYPE_CHECKING:
    from edge_sdk.device import Device
    from edge_sdk.device_config import DeviceConfig
    from edge_sdk.training import LocalTraining

log = logging.getLogger(__name__)

LOOK_S = 1.0
"""A signal that another thread takes wakes nobody: the main thread looks that often."""
EXAMPLE = """example:
  fedge device run --config device.toml
  fedge device run --config a/device.toml --config b/device.toml     two devices, one process
  fedge device status --config device.toml --json"""
STATUS_ROWS = (
    "device",
    "task",
    "state",
    "online",
    "version",
    "examples",
    "error_threshold",
    "conditions_lapsed",
    "rounds",
    "last_receipt",
    "refused",
    "outbox",
    "bytes_up",
    "bytes_down",
    "bytes_today",
    "training_today",
    "limits",
    "rss_peak_kib",
    "child_rss_peak_kib",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``fedge device ...``; return its exit code."""
    args = _parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int] = args.command
    return command(args)


def run(args: argparse.Namespace) -> int:
    """Take part until SIGTERM or SIGINT, then leave within a few seconds.

    Several configurations make several devices in this process, each with its own identity, state
    folder, connection and outbox. They take turns with one training child.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy: its threads cost memory
    configs = _configs(args.config)
    _log_to_stderr(configs[0].log_level, is_host=len(configs) > 1)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    trainer = _one_child(configs)
    devices: list[Device] = []
    sources: list[threading.Thread | None] = []
    service = Service()
    try:
        for config in configs:
            devices.append(_device(config, trainer))
            service.look_after(devices[-1])
            devices[-1].start()
            log.info("device id=%s task=%s state=%s", devices[-1].id, config.task, _state(config))
            sources.append(_source(config, devices[-1], stop))
        service.ready()
        while not stop.wait(LOOK_S):
            pass
        service.stopping()
        log.info("stopping")
    finally:
        stop.set()
        _close(devices)
    for source in sources:
        if source is not None:
            source.join(2.0)
    return 0


def _configs(paths: Sequence[str]) -> list[DeviceConfig]:
    from edge_sdk import device_config

    configs = [device_config.load(path) for path in paths]
    states = [_state(config).resolve() for config in configs]
    if shared := {str(state) for state in states if states.count(state) > 1}:
        raise ConfigError(f"expected a state folder of its own for each device, got {shared} twice")
    return configs


def _one_child(configs: Sequence[DeviceConfig]) -> LocalTraining | None:
    """Return what trains for all of several devices; None leaves a device to itself."""
    if len(configs) == 1:
        return None
    from edge_sdk.lasting import LastingTrainer

    return LastingTrainer()


def _close(devices: Sequence[Device]) -> None:
    """Leave with all at once: one that waits for its broker must not hold the others up."""
    leaving = [threading.Thread(target=device.close) for device in devices]
    for thread in leaving:
        thread.start()
    for thread in leaving:
        thread.join()


def status(args: argparse.Namespace) -> int:
    """Show what the device last wrote of itself."""
    config = _config(args)
    file = _state(config) / "status.json"
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise StoreError(
            f"expected a status in {file}, there is none; start it: fedge device run"
        ) from error
    found["running"] = _is_running(config)
    if args.json:
        print(json.dumps(found, indent=1, sort_keys=True))
        return 0
    found |= _today(found.get("today") or {})
    for name in ("running", *STATUS_ROWS):
        print(f"{name:<20} {_cell(found.get(name))}")
    return 0


def _today(today: dict[str, Any]) -> dict[str, str | None]:
    """Return the rows of what was used today, beside what is allowed."""
    if not today:
        return {}
    used, most = today["bytes"] / 1e6, today["max_bytes"]
    trained, longest = today["training_s"] / 60, today["max_training_s"]
    board = [f"below {today['max_celsius']:g} C"] if today["max_celsius"] else []
    board += [] if today["on_battery"] else ["not on battery"]
    return {
        "bytes_today": f"{used:.1f} MB" + (f" of {most / 1e6:.1f} MB" if most else ", no limit"),
        "training_today": f"{trained:.1f} min"
        + (f" of {longest / 60:.1f} min" if longest else ", no limit"),
        "limits": ", ".join(board) or None,
    }


def doctor(args: argparse.Namespace) -> int:
    """Check what a device needs, each on a line; return the code of the first that fails."""
    from edge_sdk.doctor import Board, examine

    config, findings = _config(args), []
    for finding in examine(Board(config, _state(config))):
        findings.append(finding)
        if not args.json:
            print(finding, flush=True)
    if args.json:
        print(json.dumps([finding.to_json() for finding in findings]))
    return next((finding.code for finding in findings if not finding.ok), 0)


def why(args: argparse.Namespace) -> int:
    """Tell what happened to the device: selections, refusals, receipts, and the reasons."""
    from edge_sdk import journal
    from edge_sdk.why import line

    folder = _state(_config(args)) / "why"
    found = [e for e in journal.read(folder) if args.round in (None, e.get("round"))]
    found = found[-args.last :]
    if args.json:
        for entry in found:
            print(json.dumps(entry, sort_keys=True))
        return 0
    if not found:
        print("nothing to tell yet; a running device writes every half minute")
    for entry in found:
        numbered = "" if entry.get("round") is None else f"round {entry['round']}"
        print(f"{_when(entry)}  {numbered:<10} {line(entry)}")
    return 0


def _when(entry: dict[str, Any]) -> str:
    """Return when a fact was, by the board's clock, or else by its time since the boot."""
    import datetime as dt

    if entry.get("at"):
        return dt.datetime.fromtimestamp(entry["at"]).astimezone().strftime("%F %T")
    return f"start {entry.get('boot')}, {entry.get('up_s', 0):>7.0f} s"


def wipe(args: argparse.Namespace) -> int:
    """Delete the device's examples, models, outbox and identity."""
    import shutil

    from edge_sdk.store import Store

    config = _config(args)
    folder = _state(config)
    if not (folder / "identity.key").exists():
        raise StoreError(f"expected a device's state in {folder}, there is none; nothing to wipe")
    if not args.yes:
        raise ConfigError(f"this deletes {folder} for good, examples included; say --yes")
    Store(folder).close()  # refuses while a process uses it
    shutil.rmtree(folder)
    print(f"wiped {folder}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fedge device",
        description="Run a device of fedge, and look after it.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command, about in (
        (run, "take part in a task until stopped"),
        (status, "show how the device is doing"),
        (doctor, "check what it needs, from its packages to its broker, and say what to do"),
        (why, "tell what happened: selections, refusals, lateness, receipts, and the reasons"),
        (wipe, "delete all it knows, its identity included"),
    ):
        sub = commands.add_parser(
            command.__name__,
            help=about,
            description=f"{about[0].upper()}{about[1:]}.",
            epilog=f"example: fedge device {command.__name__} --config device.toml",
        )
        is_run = command is run
        sub.add_argument(
            "--config",
            required=True,
            metavar="FILE",
            action="append" if is_run else "store",
            help="device.toml; again for more devices in this process" if is_run else "device.toml",
        )
        sub.set_defaults(command=command)
        if command in {status, doctor, why}:
            sub.add_argument("--json", action="store_true", help="for machines")
        if command is why:
            sub.add_argument("--round", type=int, metavar="N", help="of one round alone")
            sub.add_argument("--last", type=int, default=100, metavar="N", help="at most so many")
        if command is wipe:
            sub.add_argument("--yes", action="store_true", help="do it")
    return parser


def _config(args: argparse.Namespace) -> DeviceConfig:
    from edge_sdk import device_config

    return device_config.load(args.config)


def _state(config: DeviceConfig) -> Path:
    from edge_sdk.store import default_state

    return config.state or default_state(config.task)


def _device(config: DeviceConfig, trainer: LocalTraining | None) -> Device:
    from edge_sdk.device import Device

    return Device(
        config.broker,
        task=config.task,
        bundle=config.bundle,
        state=config.state,
        model_file=config.model_file,
        conditions=config.conditions,
        engine=config.engine,
        threads=config.threads,
        capacity=config.capacity,
        min_examples=config.min_examples,
        error_quantile=config.error_quantile,
        name=config.name,
        tags=config.tags,
        coordinator_key=config.coordinator_key,
        ca_file=config.ca_file,
        username=config.username,
        password=config.password,
        keepalive_s=config.keepalive_s,
        outbox_bytes=config.outbox_bytes,
        limits=config.limits,
        checkpoint_s=config.checkpoint_s,
        trial=config.trial,
        trainer=trainer,
    )


def _source(config: DeviceConfig, device: Device, stop: threading.Event) -> threading.Thread | None:
    serve = _serve(config, device)
    if serve is None:
        return None
    thread = threading.Thread(target=serve, args=(stop,), name="fedge-source", daemon=True)
    thread.start()
    return thread


def _serve(config: DeviceConfig, device: Device) -> Callable[[threading.Event], None] | None:
    source = config.source
    if source is None:
        return None
    if source.socket is not None:
        from edge_sdk.socket_source import Socket

        return Socket(source.socket, device).run
    from edge_sdk.source import Folder

    journal = _state(config) / "source.json"
    folder = source.folder or Path()
    return Folder(folder, device, journal=journal, label=source.label, poll_s=source.poll_s).run


def _log_to_stderr(level: str, *, is_host: bool) -> None:
    handler = logging.StreamHandler(sys.stderr)
    stamp = "" if os.environ.get("JOURNAL_STREAM") else "%(asctime)s "
    who = "thread=%(threadName)s " if is_host else ""  # which names the device
    line = f"{stamp}level=%(levelname)s at=%(name)s {who}%(message)s"
    handler.setFormatter(logging.Formatter(line))
    logging.basicConfig(level=level.upper(), handlers=[handler])


def _is_running(config: DeviceConfig) -> bool:
    from edge_sdk.store import is_in_use

    return is_in_use(_state(config))


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items() if item != "")
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "-" if value is None else str(value)
