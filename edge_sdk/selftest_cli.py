# SPDX-License-Identifier: Apache-2.0
"""``fedge selftest``: does this board compute what it should? Needs nothing but an engine."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict

FAILED = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Load, predict, learn, encode and sign with known answers; return 0 when all is as it should.

    Raises: ModuleNotFoundError when no engine is installed.
    """
    args = _parser().parse_args(argv)
    from edge_sdk import engine, selftest

    if not engine.installed():
        raise ModuleNotFoundError("no engine is installed", name="onnxruntime")
    results = selftest.run(args.engine)
    ok = all(result.ok for result in results)
    if args.json:
        print(json.dumps({"ok": ok, "checks": [asdict(result) for result in results]}))
    else:
        for r in results:
            print(f"{'ok  ' if r.ok else 'FAIL'} {r.check:<8} {r.seconds:6.2f} s  {r.says}")
    return 0 if ok else FAILED


def _parser() -> argparse.ArgumentParser:
    from edge_sdk.engine import AUTO, ENGINES

    parser = argparse.ArgumentParser(
        prog="fedge selftest",
        description="Load, predict, learn, encode and sign here, and compare with known answers.",
        epilog="example: fedge selftest --engine ort",
    )
    parser.add_argument("--engine", default=AUTO, choices=(AUTO, *ENGINES), help="the one to try")
    parser.add_argument("--json", action="store_true", help="for machines")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
