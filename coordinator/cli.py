# SPDX-License-Identifier: Apache-2.0
"""`fedge coordinator`: run the daemon, check its configuration, read its store."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from coordinator import broker_cli, operator_cli
from coordinator.listing import listing
from coordinator.operator_cli import store_of
from edge_sdk.errors import ConfigError, StoreError

RUN = "example: fedge coordinator run --config coordinator.toml"
CHECK = "example: fedge coordinator check --config coordinator.toml"
VERIFY = "example: fedge coordinator verify --config coordinator.toml"
READ = "example: fedge coordinator {name} --config coordinator.toml --json"


def main(argv: Sequence[str]) -> int:
    """Run `fedge coordinator ARGV`; return the exit code."""
    args = _parser().parse_args(list(argv))
    command: Callable[[argparse.Namespace], int] = args.command
    return command(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fedge coordinator", description="Fold what many devices learn into the next model.",
        epilog=RUN,
    )  # fmt: skip
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="train the configured tasks until stopped", epilog=RUN)
    run.add_argument("--config", required=True, help="coordinator.toml")
    run.add_argument("--log", default="info", choices=("debug", "info", "warning", "error"))
    run.add_argument(
        "--exit-when-done", action="store_true", help="stop once every task is at its last version"
    )
    run.set_defaults(command=_run)
    check = commands.add_parser(
        "check",
        help="read the configuration and its bundles, try the store, start nothing",
        epilog=CHECK,
    )
    check.add_argument("--config", required=True, help="coordinator.toml")
    check.add_argument("--json", action="store_true", help="for machines")
    check.set_defaults(command=_check)
    verify = commands.add_parser(
        "verify", help="make every version again from the journal and compare", epilog=VERIFY
    )
    verify.add_argument("--config", required=True, help="coordinator.toml")
    verify.add_argument("--task", help="only this task")
    verify.add_argument("--json", action="store_true", help="for machines")
    verify.set_defaults(command=_verify)
    operator_cli.add(commands)
    broker_cli.add(commands)
    _reader(commands, "rounds", "list the rounds and how they ended", _rounds)
    _reader(commands, "models", "list the versions of each task", _models)
    return parser


def _reader(
    commands: Any, name: str, about: str, command: Callable[[argparse.Namespace], int]
) -> None:
    parser = commands.add_parser(name, help=about, epilog=READ.format(name=name))
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--config", help="coordinator.toml, for the place of its store")
    where.add_argument("--store", help="the store's folder")
    parser.add_argument("--task", help="only this task")
    parser.add_argument("--json", action="store_true", help="for machines")
    parser.set_defaults(command=command)


def _run(args: argparse.Namespace) -> int:
    from coordinator import config, daemon

    settings = config.load(args.config)
    daemon.configure_logging(args.log)
    return daemon.run(settings, exit_when_done=args.exit_when_done)


def _check(args: argparse.Namespace) -> int:
    from coordinator import config, health, pacing

    settings = config.load(args.config)
    settings.password()
    if settings.ca_file is not None and not settings.ca_file.is_file():
        raise ConfigError(f"ca_file {settings.ca_file}: there is no such file")
    rows = []
    for task, pace in settings.tasks:
        bundle = task.load()
        rows.append(
            {
                "task": task.name,
                "bundle": bundle.digest,
                "parameters": sum(p.size for p in bundle.params().values()),
                "strategy": task.strategy.name,
                "cohort": pace.cohort,
                "quorum": pace.quorum,
                "deadline_s": pace.deadline_s,
            }
        )
    columns = ("task", "parameters", "strategy", "cohort", "quorum", "deadline_s")
    print(listing(rows, args.json, columns))
    for task, pace in settings.tasks:
        if unmet := pacing.unmet(pace, task.entry.devices):
            print(f"warning: task {task.name}: {unmet}", file=sys.stderr)
    store = health.inspect(settings.store)
    if not args.json:
        print(f"{args.config} is sound; broker {settings.broker.rpartition('@')[2]}; store {store}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from coordinator import config
    from coordinator.replay import replay

    settings = config.load(args.config)
    tasks = [task for task, _ in settings.tasks if args.task in (None, task.name)]
    if not tasks:
        raise ConfigError(f"expected a task of {args.config}, got {args.task!r}")
    found = [r for task in tasks for r in replay(settings.store, task)]
    rows = [asdict(r) | {"holds": r.holds} for r in found]
    columns = ("task", "version", "stored", "replayed", "updates", "holds")
    print(listing(rows, args.json, columns))
    broken = [r for r in found if not r.holds]
    if broken:
        raise StoreError(
            f"task {broken[0].task} version {broken[0].version}: the journal comes to another "
            "model than is stored; was the configuration of the task changed?"
        )
    return 0


def _rounds(args: argparse.Namespace) -> int:
    from coordinator import ledger

    rows = ledger.rounds(store_of(args), args.task)
    columns = ("task", "number", "outcome", "version", "reported", "left", "stragglers", "late")
    ways = {"loss": lambda row: row.get("metrics", {}).get("loss")}
    print(listing(rows, args.json, (*columns, "loss"), ways))
    return 0


def _models(args: argparse.Namespace) -> int:
    from coordinator import ledger

    rows = ledger.models(store_of(args), args.task)
    print(listing(rows, args.json, ("task", "version", "round", "digest", "made_at")))
    return 0
