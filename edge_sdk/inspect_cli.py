# SPDX-License-Identifier: Apache-2.0
"""`fedge inspect X.fedge [--json]`: what a bundle holds and costs, after checking all of it."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from edge_sdk import tflitegraph
from edge_sdk.bundle import Bundle
from edge_sdk.errors import BundleError, RefusedError
from edge_sdk.graphview import shown

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
    counted = _tflite_operators(bundle)
    if args.json:
        record = {"digest": bundle.digest, "size": len(bundle.data), "signed_by": key}
        record |= {"checks": "refused" if refusal else "passed", "refusal": refusal}
        record |= {"tflite_operators": counted, "manifest": bundle.manifest}
        print(json.dumps(record, sort_keys=True))
    else:
        print(bundle.explain())
        for role, operators in counted.items():
            print(f"  tflite {role}: {', '.join(f'{op} {n}' for op, n in operators.items())}")
        print(f"  signed by  {key or 'nobody'}")
        print(f"  checks     {'refused: ' + refusal if refusal else 'passed'}")
    return REFUSED if refusal else 0


def _tflite_operators(bundle: Bundle) -> dict[str, dict[str, int]]:
    """Count the operators of each .tflite graph, most frequent first; those of ONNX are costed."""
    found = {}
    for role in sorted(bundle.manifest["graphs"].get("tflite", ())):
        try:
            graph = tflitegraph.read(memoryview(bundle.graph("tflite", role)))
        except BundleError:
            continue  # refused below, with the reason
        counts = Counter(shown(node.op)[1:-1] for node in graph.nodes)
        found[role] = dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
    return found


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
