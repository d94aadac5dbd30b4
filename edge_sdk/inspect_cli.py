# SPDX-License-Identifier: Apache-2.0
"""`fedge inspect X.fedge [--json]`: what a bundle holds and costs, after checking all of it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from edge_sdk.bundle import Bundle


def main(argv: Sequence[str]) -> int:
    """Check a bundle and print its table, or its manifest as JSON; 0 when it is sound."""
    args = _parser().parse_args(argv)
    bundle = Bundle.load(args.bundle)
    signer = bundle.signed_by
    key = None if signer is None else signer.hex()
    if args.json:
        record = {"digest": bundle.digest, "size": len(bundle.data), "signed_by": key}
        print(json.dumps({**record, "manifest": bundle.manifest}, sort_keys=True))
        return 0
    print(bundle.explain())
    print(f"  signed by  {key or 'nobody'}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fedge inspect",
        description="Check a bundle and show what it holds and costs.",
        epilog="example: fedge inspect digits.fedge --json",
    )
    parser.add_argument("bundle", type=Path, help="the .fedge file")
    parser.add_argument("--json", action="store_true", help="print one JSON object for machines")
    return parser
