# SPDX-License-Identifier: Apache-2.0
"""`fedge bench`: measure on this machine, next to the rivals where they are installed."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from edge_sdk.engine import ENGINES

EXAMPLES = """examples:
  fedge bench step                           four models: all, head, bias and int8 head
  fedge bench step --model dscnn --json      one of them, for machines
  fedge bench step --model mine.onnx --mode all --batch 4
  fedge bench step --engine all              every engine that is installed, in one run
  fedge bench step --peer onnxruntime-training --peer-python VENV/bin/python
  fedge bench step --device                  memory of a device: the application and its training
  fedge bench memory                         memory to train, predicted and measured
  fedge bench int8                           accuracy of int8 training next to float32
  fedge bench int8 --model har --data har.npz
  fedge bench codec                          bytes and milliseconds of an update
  fedge bench aggregate                      updates folded per second
  fedge bench restart --json                 a killed coordinator of 1000 devices, until it is back
  fedge bench hostile --json                 what devices notice of 1000 hostile connections"""
Tables = Mapping[str, Sequence[Mapping[str, Any]]]
"""What a measurement gives: rows of named fields, by the name of their table."""

MODELS = ("dscnn", "resnet8", "mobilenet", "autoencoder")
MODES = ("all", "head", "bias", "int8")
PEERS = ("torch", "onnxruntime-training")


def main(argv: Sequence[str]) -> int:
    """Run one measurement; returns the exit code."""
    args = _parser().parse_args(argv)
    tables: Tables = args.run(args)
    if args.json:
        print(json.dumps(tables, indent=2))
        return 0
    print("\n\n".join(_table(rows) for rows in tables.values()))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fedge bench",
        description="Measure fedge on this machine; rivals run in the same minutes, in turn.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = parser.add_subparsers(
        required=True, metavar="step|memory|int8|codec|aggregate|restart|hostile"
    )
    _add_step(_kind(kinds, "step", "one training step: time and memory, next to torch's", _step))
    memory = _kind(kinds, "memory", "memory to train, predicted and measured", _memory)
    memory.add_argument("--model", help="a recipe's name or an ONNX file (six recipes)")
    memory.add_argument("--loss", help="of a model from a file (cross_entropy)")
    memory.add_argument("--batch", type=int, help="rows of a step (4, 16 and 32)")
    memory.add_argument("--train", help="which weights (all, last:1 and bias)")
    memory.add_argument("--max-ram", nargs="+", metavar="SIZE", help="what a build chooses to fit")
    memory.add_argument("--threads", type=int, default=1, help="of the runtime (1)")
    int8 = _kind(kinds, "int8", "accuracy of int8 training next to float32", _int8)
    int8.add_argument("--model", default="digits", help="a recipe's name (digits)")
    int8.add_argument("--data", type=Path, metavar="NPZ", help="x_train, y_train, x_test, y_test")
    int8.add_argument("--seeds", type=int, default=3, help="runs that a row averages (3)")
    _kind(kinds, "codec", "encode and decode updates", _codec)
    _kind(kinds, "aggregate", "decode and fold updates", _aggregate)
    restart = _kind(kinds, "restart", "a killed coordinator, until it is back", _restart)
    restart.add_argument("--devices", type=int, default=1000, help="that it knows (1000)")
    restart.add_argument("--pending", type=int, default=300, help="updates of the open round (300)")
    hostile = _kind(kinds, "hostile", "what devices notice of hostile connections", _hostile)
    hostile.add_argument("--connections", type=int, default=1000, help="hostile ones (1000)")
    hostile.add_argument("--seconds", type=float, default=10.0, help="of each of both parts (10)")
    return parser


def _add_step(step: argparse.ArgumentParser) -> None:
    step.add_argument(
        "--model", nargs="+", help="recipes or files (the four of MLPerf Tiny)", default=MODELS
    )
    step.add_argument(
        "--mode", nargs="+", choices=MODES, default=MODES, help="what is trained (every mode)"
    )
    step.add_argument("--loss", help="of a model from a file (cross_entropy)")
    step.add_argument("--batch", nargs="+", type=int, default=(16,), help="rows of a step (16)")
    step.add_argument("--threads", type=int, default=2, help="of every side (2)")
    step.add_argument("--repeat", type=int, default=15, help="turns of ten steps each (15)")
    step.add_argument(
        "--engine", nargs="+", choices=[*ENGINES, "all"], default=("ort",), help="of ours (ort)"
    )
    step.add_argument(
        "--peer", nargs="+", choices=[*PEERS, "none"], default=PEERS[:1], help="rivals (torch)"
    )
    step.add_argument("--peer-python", metavar="EXE", help="that has onnxruntime-training")
    step.add_argument("--tflite-python", metavar="EXE", help="that has tflite-runtime")
    step.add_argument("--device", action="store_true", help="memory of a device instead of time")


def _kind(
    kinds: Any, name: str, about: str, run: Callable[[argparse.Namespace], Tables]
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = kinds.add_parser(name, help=about, description=about)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)
    return parser


def _step(args: argparse.Namespace) -> Tables:
    engines = tuple(ENGINES) if "all" in args.engine else tuple(args.engine)
    if args.device:
        from coordinator.bench import device

        models = ["dscnn"] if args.model is MODELS else args.model
        modes = ["all"] if args.mode is MODES else args.mode
        return {"device": [device.measure(*w) for w in product(models, modes, engines)]}
    from coordinator.bench import step

    rows: list[Mapping[str, Any]] = []
    for model, mode, batch in product(args.model, args.mode, args.batch):
        if sys.stderr.isatty():
            print(f"measuring {model}, {mode}, batch {batch}", file=sys.stderr)
        how = step.Settings(
            batch=batch,
            threads=args.threads,
            repeat=args.repeat,
            engines=engines,
            peers=tuple(name for name in args.peer if name != "none"),
            peer_python=args.peer_python,
            tflite_python=args.tflite_python,
        )
        rows += step.measure(model, mode, loss=args.loss, settings=how)
    return {"step": rows}


def _memory(args: argparse.Namespace) -> Tables:
    from coordinator.bench import memory

    models = [args.model] if args.model else [*MODELS, "har", "digits"]
    if args.max_ram:
        how = {"batch": args.batch, "loss": args.loss, "threads": args.threads}
        return {"memory": list(memory.within(models, args.max_ram, **how))}
    batches = [args.batch] if args.batch else memory.BATCHES
    selections = [args.train] if args.train else memory.SELECTIONS
    settings = {"batches": batches, "selections": selections, "loss": args.loss}
    return {"memory": list(memory.measure(models, **settings, threads=args.threads))}


def _int8(args: argparse.Namespace) -> Tables:
    from coordinator.bench import int8

    return int8.measure(args.model, args.data, seeds=args.seeds)


def _codec(args: argparse.Namespace) -> Tables:
    del args
    from coordinator.bench import codec

    return {"codec": codec.measure(), "positions": codec.measure_positions()}


def _aggregate(args: argparse.Namespace) -> Tables:
    del args
    from coordinator.bench import aggregate

    return {"aggregate": aggregate.measure()}


def _restart(args: argparse.Namespace) -> Tables:
    from coordinator.bench import restart

    return {"restart": restart.measure(args.devices, args.pending)}


def _hostile(args: argparse.Namespace) -> Tables:
    from coordinator.bench import hostile

    return {"hostile": hostile.measure(args.connections, seconds=args.seconds)}


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Lay rows out below each other, what they share above; a single row as one line a field."""
    if len(rows) == 1:
        width = max(len(name) for name in rows[0])
        return "\n".join(f"{name:<{width}}  {_cell(value)}" for name, value in rows[0].items())
    shared = {k: v for k, v in rows[0].items() if all(row.get(k) == v for row in rows)}
    names = [name for name in rows[0] if name not in shared]
    cells = [names, *[[_cell(row.get(name)) for name in names] for row in rows]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in cells]
    said = "  ".join(f"{k} {_cell(v)}" for k, v in shared.items() if v not in {None, ""})
    return "\n".join([said, *lines] if said else lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
