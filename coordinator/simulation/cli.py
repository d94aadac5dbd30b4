# SPDX-License-Identifier: Apache-2.0
"""`fedge simulate`: the production coordinator and devices in virtual time, under seeded faults."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from coordinator.simulation.faults import CLASSES, classes_of
from coordinator.simulation.many import outcomes
from coordinator.simulation.world import Outcome, Setup

EPILOG = """examples:
  fedge simulate --seed 7                       one run, all kinds of faults; what happened
  fedge simulate --seed 0 --seeds 2000          many runs, on every core; the first that breaks
  fedge simulate --seed 7 --faults network,disk   only some kinds; "none" for a quiet run
  fedge simulate coordinator.toml --seed 7      with the pace, strategy and codec of a task"""


def main(argv: Sequence[str]) -> int:
    """Run `fedge simulate ARGV`; 0 if every invariant held, 1 if one broke."""
    args = _parser().parse_args(list(argv))
    settings = args.devices, args.rounds, classes_of(args.faults), args.config, args.task
    seeds = range(args.seed, args.seed + args.seeds)
    setups = [Setup(seed, *settings) for seed in seeds]
    began_s = time.monotonic()
    found = list(_told(outcomes(setups, args.jobs), len(setups), quiet=args.json))
    broken = [outcome for outcome in found if not outcome.holds]
    if args.json:
        print(json.dumps([asdict(outcome) for outcome in found], indent=2))
    elif len(found) == 1:
        _show(found[0])
    else:
        _sum_up(found, time.monotonic() - began_s)
    for outcome in broken[:1]:
        _explain(outcome, args)
    return 1 if broken else 0


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("fedge simulate", description=__doc__, epilog=EPILOG)
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.add_argument("config", nargs="?", type=Path, help="coordinator.toml, for a task's settings")
    p.add_argument("--task", help="which of its tasks (the first)")
    p.add_argument("--seed", type=int, default=0, help="the first seed (0)")
    p.add_argument("--seeds", type=int, default=1, metavar="N", help="how many, from there (1)")
    p.add_argument("--devices", type=int, default=20, help="devices in a run (20)")
    p.add_argument("--rounds", type=int, default=5, help="versions that a run has to reach (5)")
    p.add_argument("--faults", default="all", help=f"all, none, or some of {','.join(CLASSES)}")
    p.add_argument("--jobs", type=int, default=0, help="processes (as many as cores)")
    p.add_argument("--json", action="store_true", help="for machines")
    return p


def _told(found: Iterator[Outcome], count: int, *, quiet: bool) -> Iterator[Outcome]:
    """Pass outcomes on, up to the first that broke; say to a terminal how far we are."""
    for done, outcome in enumerate(found, 1):
        if count > 1 and not quiet and sys.stderr.isatty():
            print(f"\r{done} of {count}", end="", file=sys.stderr)
        yield outcome
        if not outcome.holds:
            break
    if count > 1 and not quiet and sys.stderr.isatty():
        print("\r", end="", file=sys.stderr)


def _show(outcome: Outcome) -> None:
    print(
        f"seed {outcome.seed}: {outcome.events} events in {outcome.virtual_s:.0f} virtual seconds"
    )
    for name, table in (
        ("rounds", outcome.rounds),
        ("receipts", outcome.receipts),
        ("faults", outcome.faults),
    ):
        print(f"{name:9}", ", ".join(f"{count} {what}" for what, count in table.items()) or "none")
    for number, digest in enumerate(outcome.versions):
        print(f"version {number}  {digest}")
    print(f"trace      {outcome.trace}")


def _sum_up(found: list[Outcome], seconds: float) -> None:
    total = Counter[str]()
    for outcome in found:
        total.update(outcome.faults)
    virtual_s = sum(outcome.virtual_s for outcome in found)
    print(
        f"{len(found)} seeds, {virtual_s / 3600:.1f} virtual hours in {seconds:.1f} s; "
        f"{sum(outcome.events for outcome in found)} events"
    )
    print("faults:", ", ".join(f"{count} {what}" for what, count in total.most_common()) or "none")


def _explain(outcome: Outcome, args: argparse.Namespace) -> None:
    broken = outcome.broken
    if broken is None:
        return
    print("\n".join(outcome.latest), file=sys.stderr)
    print(
        f"seed {outcome.seed}, {broken.at_s:.3f} virtual s: {broken.invariant} does not hold: "
        f"{broken.why}",
        file=sys.stderr,
    )
    again = [f"fedge simulate --seed {outcome.seed}"]
    again += [str(args.config)] * (args.config is not None)
    for name, default in (("devices", 20), ("rounds", 5), ("faults", "all"), ("task", None)):
        if (value := getattr(args, name)) != default:
            again.append(f"--{name} {value}")
    print("again:", " ".join(again), file=sys.stderr)
