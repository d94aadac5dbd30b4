# SPDX-License-Identifier: Apache-2.0
"""`fedge coordinator broker-config`: what a mosquitto needs to serve a fleet, as files."""

from __future__ import annotations

import argparse
import datetime as dt
from pathlib import Path, PurePosixPath
from typing import Any

from coordinator import broker_config, certificates
from coordinator.broker_config import CONFIG, IDENTITIES, RIGHTS, Fleet
from edge_sdk import files
from edge_sdk.errors import ConfigError

NAME = "broker-config"
EXAMPLE = "example: fedge coordinator broker-config --folder broker --host fleet.example.org"
AUTHORITY_KEY = "ca.key"


def add(commands: Any) -> None:
    """Add the command to those of `fedge coordinator`."""
    parser = commands.add_parser(
        NAME, help="write files for mosquitto: TLS, rights, limits", epilog=EXAMPLE
    )
    parser.add_argument("--folder", required=True, help="where to write the files")
    parser.add_argument(
        "--installed", help="where they will lie at the broker (default: the same folder)"
    )
    parser.add_argument("--port", type=int, default=8883, help="of the TLS listener (default 8883)")
    parser.add_argument("--devices", type=int, default=1000, help="how many there may be")
    parser.add_argument(
        "--identity", choices=IDENTITIES, default="username",
        help="how the broker knows a device: a user for each (default), its client id, or a "
        "certificate for each",
    )  # fmt: skip
    parser.add_argument("--coordinator", default="coordinator", help="the coordinator's user")
    parser.add_argument(
        "--host", action="append", default=[], metavar="NAME",
        help="make an authority and a certificate for the broker at NAME, where there is none; "
        "may be given several times",
    )  # fmt: skip
    parser.set_defaults(command=_run)


def _run(args: argparse.Namespace) -> int:
    folder = Path(args.folder)
    fleet = Fleet(
        folder=PurePosixPath(args.installed or folder.resolve()),
        port=args.port,
        devices=args.devices,
        identity=args.identity,
        coordinator=args.coordinator,
    )
    texts = {CONFIG: broker_config.config(fleet), RIGHTS: broker_config.rights(fleet)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--folder {folder}: {error.strerror}") from error
    for name, text in texts.items():
        files.write(folder / name, text.encode(), mode=0o644)
        print(f"wrote {folder / name}")
    if args.host:
        _certify(folder, fleet, args.host)
    print(_next(fleet))
    return 0


def _certify(folder: Path, fleet: Fleet, hosts: list[str]) -> None:
    """Make what is missing; an authority that is there signs, a certificate that is there stays."""
    now = dt.datetime.now(dt.UTC)
    paths = (folder / fleet.authority, folder / AUTHORITY_KEY)
    if not any(path.exists() for path in paths):
        _keep(certificates.authority("fedge fleet", now), *paths)
    mine = (folder / fleet.certificate, folder / fleet.key)
    if any(path.exists() for path in mine):
        print(f"kept {mine[0]}: remove it and {mine[1].name} to have new ones")
        return
    try:
        issuer = certificates.Issued(*(path.read_bytes() for path in paths))
    except OSError as error:
        raise ConfigError(f"{error.filename}: {error.strerror}; it goes with {paths[0]}") from error
    _keep(certificates.broker(issuer, hosts, now), *mine)


def _keep(issued: certificates.Issued, certificate: Path, key: Path) -> None:
    files.write(key, issued.key, mode=0o600)
    files.write(certificate, issued.certificate, mode=0o644)
    print(f"wrote {certificate} and {key}")


def _next(fleet: Fleet) -> str:
    if fleet.identity == "certificate":
        return "next: give each device a certificate of the authority with its id as the name"
    names = "for each device id" if fleet.identity == "username" else "for the devices, one name"
    passwords = fleet.folder / fleet.passwords
    return f"next: mosquitto_passwd {passwords} USER, {names} and for {fleet.coordinator}"
