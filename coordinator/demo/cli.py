# SPDX-License-Identifier: Apache-2.0
"""The command line of `fedge demo`."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import sys
from pathlib import Path

from coordinator.demo.settings import RECIPES, Settings
from edge_sdk.engine import ENGINES

EPILOG = """examples:
  fedge demo                                   ten devices, fifteen rounds, scikit-learn's digits
  fedge demo --drop 0.3 --straggle 0.3         three are killed for good, three are always late
  fedge demo --recipe anomaly                  find what no device has seen
  fedge demo --model m.onnx --data rows.npz    anybody's model and data
  fedge demo --model m.tflite --data rows.npz --train last:1 --devices 100 --cohort 20"""

ANOMALY = {"epochs": 4, "lr": 0.003}
"""What the autoencoder learns well with."""


def parser() -> argparse.ArgumentParser:
    """Return the parser; defaults are those of `Settings`."""
    p = argparse.ArgumentParser("fedge demo", description=__doc__, epilog=EPILOG)
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    add, d = p.add_argument, Settings()
    add("--devices", type=int, metavar="N", help=f"device processes ({d.devices})")
    add("--cohort", type=int, metavar="C", help="devices invited to a round (all)")
    add(
        "--hosts",
        type=int,
        metavar="H",
        help="processes that share the devices (one a device up to 12)",
    )
    add("--rounds", type=int, metavar="R", default=d.rounds, help=f"versions to reach ({d.rounds})")
    add("--epochs", type=int, metavar="E", help=f"local epochs ({d.epochs})")
    add("--batch", type=int, default=d.batch, help=f"rows of a local step ({d.batch})")
    add("--lr", type=float, help=f"local learning rate ({d.lr})")
    add("--drop", type=float, metavar="P", default=0.0, help="share of devices killed for good")
    add("--straggle", type=float, metavar="P", default=0.0, help="share that is always late")
    add("--deadline", type=float, metavar="S", dest="deadline_s", help="seconds a round may take")
    add("--recipe", choices=RECIPES, default=d.recipe, help=f"what is learned ({d.recipe})")
    add("--model", type=Path, metavar="FILE", help="an ONNX or TFLite model, float or int8")
    add("--data", type=Path, metavar="NPZ", help="its rows: x_train, y_train, client_train, ...")
    add("--train", default=d.train, metavar="SEL", help=f"what is trained ({d.train})")
    add("--headroom", type=float, default=1.0, help="widen an int8 model's range of logits (1)")
    add("--ranges", default=d.ranges, choices=["fixed", "learned"], help="of int8 activations")
    add("--engine", default=d.engine, choices=["auto", *ENGINES], help="what runs the graphs")
    add("--codec", default=d.codec, metavar="C", help=f"preset of the updates' codec ({d.codec})")
    add(
        "--broker",
        default=d.broker,
        metavar="URL",
        help="a broker that runs; mosquitto or amqtt start one",
    )
    add("--seed", type=int, default=0, help="of the split, the cohorts and the training (0)")
    add("--kill-coordinator", type=int, metavar="R", default=0, help="kill -9 it in round R")
    add("--device-python", default=d.device_python, metavar="EXE", help="runs the devices")
    add("--work", type=Path, metavar="DIR", help="keep every process's files there")
    add("--export", type=Path, metavar="FILE", help="write the model that was learned there")
    add("--json", type=Path, metavar="FILE", help="write the record there")
    add("--png", type=Path, metavar="FILE", default=Path("demo-curves.png"), help="the curves")
    return p


def main(argv: list[str]) -> int:
    """Run the demo; print the table; write the record and the curves."""
    from coordinator.demo import report
    from coordinator.demo.run import demo

    options = vars(parser().parse_args(argv))
    work, record_to, png = options.pop("work"), options.pop("json"), options.pop("png")
    record = asyncio.run(demo(settings(options), work, show=_show))
    print(report.table(record))
    report.curves(record, png)
    print(f"curves: {png}")
    if options["export"]:
        print(f"model:  {options['export']}")
    if record_to:
        record_to.write_text(record.to_json())
        print(f"record: {record_to}")
    return 0


def settings(options: dict[str, object]) -> Settings:
    """Fill in what depends on other options, and check the whole."""
    given = {name: value for name, value in options.items() if value is not None}
    if "data" in given and "devices" not in given:
        from coordinator.demo.data import owners

        given["devices"] = owners(Path(str(given["data"])))
    devices = int(str(given.get("devices", Settings().devices)))
    given.setdefault("cohort", devices)
    if given["recipe"] == "anomaly":
        given = {**ANOMALY, **given}
    if given["straggle"]:  # every round waits for its deadline: as short as the others need
        given.setdefault("deadline_s", max(4.0, 0.6 * int(str(given["cohort"]))))
    known = {f.name for f in dataclasses.fields(Settings)}
    return Settings(**{name: value for name, value in given.items() if name in known})  # type: ignore[arg-type] # argparse has checked the types


def _show(line: str) -> None:
    print(line, flush=True)
    sys.stdout.flush()
