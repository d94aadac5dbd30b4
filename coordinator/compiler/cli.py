# SPDX-License-Identifier: Apache-2.0
"""`fedge build`: compile an ONNX model into a bundle."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from coordinator.compiler.losses import LOSSES
from coordinator.compiler.optim import Optimizer, adam, chain, clip, momentum, sgd
from edge_sdk.errors import CompileError

if TYPE_CHECKING:
    from coordinator.compiler.contribution import Examples

_EXAMPLE = "example: fedge build digits.onnx -o digits.fedge --loss cross_entropy --train last:2"


def build_main(argv: Sequence[str]) -> int:
    """Run `fedge build` and return its exit code."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        optimizer = _optimizer(args)
    except CompileError as error:
        parser.error(str(error))
    if not Path(args.output).parent.is_dir() or Path(args.output).is_dir():
        parser.error(f"expected a file in a folder that exists, got -o {args.output}: make it")
    from coordinator.compiler.pipeline import build

    train = args.train[0] if args.train and len(args.train) == 1 else args.train
    bundle = build(
        args.model,
        loss=args.loss,
        train=train,
        optimizer=optimizer,
        proximal=args.proximal,
        headroom=args.headroom,
        ranges=args.ranges,
        name=args.name,
        max_ram=args.max_ram,
        max_bytes_per_update=args.max_bytes_per_update,
        max_flops=args.max_flops,
        batch=args.batch,
        micro_batch=args.micro_batch,
        recompute=args.recompute,
        calibration=_calibration(parser, args.calibration),
        engines=args.engines,
    )
    bundle.save(args.output)
    if args.json:
        size = len(bundle.data)
        print(json.dumps({"path": args.output, "digest": bundle.digest, "bytes": size}))
    else:
        print(f"{bundle.explain()}\nwrote {args.output}")
    return 0


def _calibration(parser: argparse.ArgumentParser, path: str | None) -> Examples | None:
    """Read examples; a file that holds none ends the command."""
    if path is None:
        return None
    try:
        with np.load(path) as arrays:
            return arrays["x"], arrays["y"]
    except (OSError, ValueError, KeyError) as error:
        parser.error(f"expected arrays x and y in --calibration {path}: {error}")


def _optimizer(args: argparse.Namespace) -> Optimizer:
    made = {
        "sgd": lambda: sgd(args.lr),
        "momentum": lambda: momentum(args.decay, args.lr, nesterov=args.nesterov),
        "adam": lambda: adam(args.lr),
    }[args.optimizer]()
    return chain(clip(args.clip), made) if args.clip is not None else made


class _Parser(argparse.ArgumentParser):
    """Ends a wrong command line as every other failure ends: in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="fedge build",
        description="Compile a float32 or int8 model, ONNX or TFLite, into a bundle that trains on "
        "stock runtimes.",
        epilog=_EXAMPLE,
    )
    add = parser.add_argument
    add("model", help="the forward model, an .onnx or .tflite file")
    add("-o", "--output", required=True, metavar="X.fedge", help="where the bundle goes")
    add("--loss", required=True, choices=sorted(LOSSES))
    add(
        "--train",
        nargs="+",
        metavar="SEL",
        help="all, bias, last:K, sparse:SHARE[:SEL], names or globs such as 'head.*' (default: "
        "all, or under limits the widest that keeps them)",
    )
    add("--optimizer", choices=["sgd", "momentum", "adam"], default="sgd")
    add("--lr", type=float, default=0.05, help="learning rate (default 0.05)")
    add("--decay", type=float, default=0.9, help="of momentum (default 0.9)")
    add("--nesterov", action="store_true", help="look ahead with momentum")
    add("--clip", type=float, metavar="NORM", help="largest joint norm of a step's gradients")
    add("--proximal", action="store_true", help="allow a FedProx term")
    add(
        "--headroom",
        type=float,
        default=1.0,
        metavar="X",
        help="widen the range of an int8 model's logits by this factor (default 1)",
    )
    add("--max-ram", metavar="SIZE", help="what training may add to a process, such as 24MiB")
    add("--max-bytes-per-update", metavar="SIZE", help="what a round may send, such as 8KiB")
    add("--max-flops", type=float, metavar="N", help="operations to train on one example")
    add("--batch", type=int, metavar="N", help="rows of a step that must fit in --max-ram")
    add("--micro-batch", type=int, metavar="M", help="sum a step's gradients up, M rows at a time")
    add(
        "--calibration", metavar="NPZ", help="examples x and y, to rank channels by their gradients"
    )
    add(
        "--recompute",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="compute activations twice where that saves memory (default: where --max-ram demands)",
    )
    add(
        "--ranges",
        choices=["fixed", "learned"],
        default="fixed",
        help="train the ranges of an int8 model's activations, too (default fixed)",
    )
    add(
        "--engines",
        nargs="+",
        choices=["onnx", "tflite"],
        default=["onnx"],
        help="what to write training graphs for: onnx for onnxruntime, tflite for LiteRT and "
        "tflite-runtime (default onnx)",
    )
    add("--name", help="of the bundle (default: the file's)")
    add("--json", action="store_true", help="print path, digest and size for machines")
    return parser
