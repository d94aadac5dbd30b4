# SPDX-License-Identifier: Apache-2.0
"""The command line behind ``packaging/wheel`` and ``packaging/deb/build``."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from pack import deb, locks, sbom, source, wheel


def main() -> int:
    """Make what is asked for, and print the file of each."""
    parser = argparse.ArgumentParser(prog="packaging", description=__doc__)
    parser.add_argument("what", choices=("wheel", "deb"))
    parser.add_argument("names", nargs="*", metavar="NAME:ARCH[:SUITE]")
    parser.add_argument("--out", type=Path, default=source.REPOSITORY / "dist")
    parser.add_argument("--tree", action="store_true", help="the working tree, not the last commit")
    parser.add_argument("--version", default="", help="of the package, where it is not the code's")
    args = parser.parse_intermixed_args()
    wanted = _wanted(parser, args.names)
    with tempfile.TemporaryDirectory(prefix="fedge-pack-") as folder:
        tree = source.export(Path(folder) / "source", is_tree=args.tree)
        into = args.out if args.what == "wheel" else Path(folder)
        made = wheel.build(tree, into)
        if args.what == "wheel":
            print(made.wheel, made.sdist, *_bills(tree, args.out), sep="\n")
            return 0
        for target in wanted:
            print(deb.build(target, tree, made.wheel, args.out, version=args.version), flush=True)
    return 0


def _bills(tree: source.Source, out: Path) -> list[Path]:
    """Write what the wheel is locked with, one bill for each platform."""
    made = []
    for lock in locks.all_locks():
        if lock.name != "tools":
            made.append(out / f"fedge-{tree.version}.{lock.name}.cdx.json")
            lines = locks.read(lock.name)
            made[-1].write_text(sbom.bill("fedge", tree.version, lines, tree.epoch))
    return made


def _wanted(parser: argparse.ArgumentParser, names: list[str]) -> list[deb.Target]:
    known = {f"{t.recipe.name}:{t.arch}:{t.suite}": t for t in deb.targets()}
    full = [name if name.count(":") == 2 else f"{name}:trixie" for name in names]
    for name in full:
        if name not in known:
            parser.error(f"expected one of {', '.join(known)}, got {name}")
    return [known[name] for name in full] or list(known.values())


if __name__ == "__main__":
    sys.exit(main())
