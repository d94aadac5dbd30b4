# SPDX-License-Identifier: Apache-2.0
"""`fedge inspect X.fedge [--json]`: what a bundle holds and costs, after checking all of it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from edge_sdk.bundle import Bundle
from edge_sdk.errors import RefusedError

REFUSED = 5


def main(argv: Sequence[str]) -> int:
    """Check a bundle and print its table, or its manifest as JSON.

    Returns: 0 when a device would run it, 5 when it would refuse; both are printed.
    """
    args = _parser().parse_args(argv)
    bundle = Bundle.load(args.bundle)
    signer = bundle.signed_by
    key = None if signer is None else signer.hex()
    refusal = _refusal(bundle)
    if args.json:
        record = {"digest": bundle.digest, "size": len(bundle.data), "signed_by": key}
        record |= {"checks": "refused" if refusal else "passed", "refusal": refusal}
        print(json.dumps({**record, "manifest": bundle.manifest}, sort_keys=True))
    else:
        print(bundle.explain())
        print(f"  signed by  {key or 'nobody'}")
        print(f"  checks     {'refused: ' + refusal if refusal else 'passed'}")
    return REFUSED if refusal else 0


def _refusal(bundle: Bundle) -> str | None:
    """Say why a device with the default limits would not run this bundle."""
    try:
        bundle.check()
    except RefusedError as error:
        return str(error)
    return None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fedge inspect",
        description="Check a bundle and show what it holds and costs.",
        epilog="Exit code 5: a device would refuse it. Example: fedge inspect digits.fedge --json",
    )
    parser.add_argument("bundle", type=Path, help="the .fedge file")
    parser.add_argument("--json", action="store_true", help="print one JSON object for machines")
    return parser
