# SPDX-License-Identifier: Apache-2.0
"""docs/reference/faults.md, made of the table of faults and of what its tests came to.

``scripts/faults`` runs the tests of `tests/faults/faults.toml`, and then this, which writes their
results to `tests/faults/results.json` and the page from both.
"""

from __future__ import annotations

import ast
import json
import sys
import tomllib
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "tests" / "faults" / "faults.toml"
RESULTS = ROOT / "tests" / "faults" / "results.json"
PAGE = ROOT / "docs" / "reference" / "faults.md"
HEAD = """# Faults: what may go wrong, and what holds then

Written by `scripts/faults`, which runs the tests that are named here; `scripts/test --slow TEST`
runs one. A kill is SIGKILL of a real process; where two runs have "the same model", its bytes have
the same sha256.

"""


@dataclass(frozen=True, slots=True)
class Fault:
    """A row: what goes wrong, what is promised, which tests show it, and what is still to come."""

    fault: str
    promise: str
    tests: tuple[str, ...] = ()
    later: str = ""


def faults() -> list[Fault]:
    """Read the table."""
    rows = tomllib.loads(TABLE.read_text())["fault"]
    return [Fault(**(row | {"tests": tuple(row.get("tests", ()))})) for row in rows]


def results() -> dict[str, str]:
    """Return what each test came to when the page was written."""
    found: dict[str, str] = json.loads(RESULTS.read_text())
    return found


def missing(test: str) -> str:
    """Say what is not there of a test `FILE` or `FILE::NAME`; empty when it is."""
    file, _, name = test.partition("::")
    path = ROOT / file
    if not path.is_file():
        return f"there is no {file}"
    tree = ast.parse(path.read_text())
    names = {
        n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    return "" if not name or name in names else f"{file} has no {name}"


def render(table: Sequence[Fault], told: dict[str, str]) -> str:
    """Return the page."""
    parts = [HEAD]
    for number, row in enumerate(table, 1):
        parts.append(f"## {number}. {row.fault}\n\n{row.promise}\n\n")
        if row.tests:
            parts.append("| test | result |\n| --- | --- |\n")
            parts += [f"| {_shown(test)} | {told.get(test, 'not run')} |\n" for test in row.tests]
            parts.append("\n")
        if row.later:
            parts.append(f"Still to come: {row.later}.\n\n")
    return "".join(parts).rstrip() + "\n"


def read(reports: Sequence[Path], tests: Sequence[str]) -> dict[str, str]:
    """Return what pytest's XML reports say of each test.

    Raises: SystemExit when one of them failed, was skipped or was not run.
    """
    trees = [ET.parse(report) for report in reports]  # noqa: S314 - our own
    cases = [_case(case) for tree in trees for case in tree.iter("testcase")]
    told = {}
    for test in tests:
        mine = [case for case in cases if _is_of(case[0], test)]
        bad = [name for name, is_good, _ in mine if not is_good]
        if bad or not mine:
            raise SystemExit(f"faults: {test}: {', '.join(bad) or 'it did not run'}")
        said = next((result for _, _, result in mine if result), "")
        cases_of = f"{len(mine)} cases" if len(mine) > 1 else ""
        told[test] = ", ".join(filter(None, ["passed", cases_of, said]))
    return told


def _case(case: ET.Element) -> tuple[str, bool, str]:
    file = str(case.get("classname", "")).replace(".", "/") + ".py"
    name = f"{file}::{str(case.get('name', '')).partition('[')[0]}"
    is_good = not any(case.find(kind) is not None for kind in ("failure", "error", "skipped"))
    said = [p.get("value", "") for p in case.iter("property") if p.get("name") == "result"]
    return name, is_good, "".join(said)


def _is_of(case: str, test: str) -> bool:
    return case == test if "::" in test else case.startswith(test + "::")


def _shown(test: str) -> str:
    file, _, name = test.partition("::")
    words = name.removeprefix("test_").replace("_", " ") or "all of it"
    return f"{words} (`{file}`)"


def main(arguments: Sequence[str]) -> int:
    """Write the page: with reports, of new results; without, of those that are there."""
    table = faults()
    tests = sorted({test for row in table for test in row.tests})
    if arguments[:1] == ["--tests"]:
        print("\n".join(tests))  # noqa: T201 - for scripts/faults
        return 0
    if arguments:
        told = read([Path(report) for report in arguments], tests)
        RESULTS.write_text(json.dumps(told, indent=1, sort_keys=True) + "\n")
    PAGE.write_text(render(table, results()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
