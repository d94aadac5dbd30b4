# SPDX-License-Identifier: Apache-2.0
"""`fedge coordinator fleet|release|tag|..`: what an operator asks and orders at any time."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from coordinator.listing import Row, listing
from edge_sdk.errors import ConfigError

EXAMPLE = "example: fedge coordinator {} --config coordinator.toml{}"


def add(commands: Any) -> None:
    """Add the operator's commands to those of `fedge coordinator`."""
    _command(commands, "fleet", "list the devices ever seen, and who is in quarantine", _fleet)
    _command(
        commands, "deadletters", "list the messages in which the coordinator failed", _deadletters
    )
    tag = _command(
        commands, "tag", "assign tags to a device; NAME= takes one away", _tag,
        example="tag d0123456789abcde site=north",
    )  # fmt: skip
    tag.add_argument("device", help="the device's id")
    tag.add_argument("tags", nargs="+", metavar="NAME=VALUE", help="a tag, such as site=north")
    why = _command(
        commands, "why", "tell why a device was invited or not, and what became of its updates",
        _why, example="why d0123456789abcde",
    )  # fmt: skip
    why.add_argument("device", help="the device's id")
    why.add_argument("--task", help="only this task")
    why.add_argument("--rounds", type=int, default=20, help="how many of the latest (20)")
    release = _command(
        commands, "release", "let a device out of quarantine, its past forgotten", _release,
        example="release d0123456789abcde",
    )  # fmt: skip
    release.add_argument("device", help="the device's id")
    release.add_argument("--task", help="only in this task")


def _command(
    commands: Any,
    name: str,
    about: str,
    command: Callable[[argparse.Namespace], int],
    *,
    example: str = "",
    json_: bool = True,
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=about, epilog=EXAMPLE.format(example or name, "" if example else " --json")
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--config", help="coordinator.toml, for the place of its store")
    where.add_argument("--store", help="the store's folder")
    if json_:
        parser.add_argument("--json", action="store_true", help="for machines")
    parser.set_defaults(command=command)
    return parser


def store_of(args: argparse.Namespace) -> Path:
    """Return the store's folder that a command line names.

    Raises: ConfigError when the configuration that it names is not sound.
    """
    if args.store is not None:
        return Path(args.store)
    from coordinator import config

    return config.load(args.config).store


def _fleet(args: argparse.Namespace) -> int:
    from coordinator import ledger

    rows = ledger.fleet(store_of(args))
    columns = (
        "id",
        "name",
        "sdk",
        "online",
        "updates",
        "last_seen",
        "tags",
        "quarantine",
        "declined",
    )
    ways = {"tags": _tags, "quarantine": _quarantine, "declined": _declined}
    print(listing(rows, args.json, columns, ways))
    return 0


def _tags(row: Row) -> str:
    return " ".join(f"{name}={_plain(value)}" for name, value in sorted(row["tags"].items())) or "-"


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _quarantine(row: Row) -> str:
    held = row["quarantine"].items()
    return " ".join(f"{task}:until-round-{h['until_round']}" for task, h in held) or "-"


def _declined(row: Row) -> str:
    lately = row["declined"].items()
    return " ".join(f"{task}:round-{d['round']}:{d['reason']}" for task, d in lately) or "-"


def _deadletters(args: argparse.Namespace) -> int:
    from coordinator import ledger

    rows = ledger.letters(store_of(args))
    columns = ("id", "topic", "size", "attempts", "dead", "last_at", "error")
    print(listing(rows, args.json, columns))
    return 0


def _tag(args: argparse.Namespace) -> int:
    from coordinator import docket, ledger
    from coordinator.tags import assigned
    from edge_sdk import topics
    from edge_sdk.errors import MessageError

    try:
        device = topics.checked_device(args.device)
    except MessageError as error:
        raise ConfigError(str(error)) from error
    changes = [assigned(text) for text in args.tags]
    with ledger.ordering(store_of(args)) as db:
        for name, value in changes:
            docket.tag(db, device, name, value)
        tags = docket.orders(db).tags.get(device, {})
    if args.json:
        print(json.dumps({"device": device, "tags": tags}))
    else:
        print(f"{device} is assigned {_tags({'tags': tags})}; a running coordinator heeds it soon")
    return 0


def _why(args: argparse.Namespace) -> int:
    from coordinator.why import lines, why

    found = why(store_of(args), args.device, args.task, args.rounds)
    print(json.dumps(found, indent=2) if args.json else "\n".join(lines(found)))
    return 0


def _release(args: argparse.Namespace) -> int:
    from coordinator import docket, ledger

    with ledger.ordering(store_of(args)) as db:
        tasks = docket.pardon(db, args.device, args.task)
    if args.json:
        print(json.dumps({"device": args.device, "tasks": tasks}))
    elif tasks:
        print(f"{args.device} is free in {', '.join(tasks)}; a running coordinator heeds it soon")
    else:
        raise ConfigError(f"nothing is held against {args.device}; fedge coordinator fleet lists")
    return 0
