# SPDX-License-Identifier: Apache-2.0
"""One thing to measure: a model and which of its weights are trained, ready in a folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coordinator.bench import plan, recipes
from coordinator.bench.child import BATCHES, save
from coordinator.bench.int8 import quantize
from coordinator.compiler import build, momentum, sgd
from edge_sdk.bundle import Bundle
from edge_sdk.errors import CompileError, ConfigError
from edge_sdk.params import count

LR, DECAY = 0.001, 0.9
MODES = {"all": "all", "head": "last:1", "bias": "bias", "int8": "last:1"}
"""What is trained, and how `build` spells it; int8 is the head of a quantized model, whose frozen
layers run on integer kernels, next to the head of its float32 twin."""

OPTIMIZERS = {"momentum": momentum(DECAY, lr=LR), "sgd": sgd(lr=LR)}


@dataclass(frozen=True)
class Case:
    """A bundle, its batches and what rivals need of it.

    Attributes:
        name: of the model; mode: of `MODES`.
        folder: holds ``task.fedge``, batches, and what `plan.write` leaves.
        bundle: what is in there.
        batch: rows of a step.
        twin: folder of the float32 model where the model is int8.
        lacks: why the bundle has no graphs to train in a format.
    """

    name: str
    mode: str
    folder: Path
    bundle: Bundle
    batch: int
    twin: Path | None = None
    lacks: dict[str, str] = field(default_factory=dict)

    @property
    def trained(self) -> int:
        """How many numbers are trained."""
        return count(self.bundle.shapes)

    def predicted(self, format: str) -> int | None:  # noqa: A002 - the manifest's word
        """Return the bytes that training is said to add; None where nothing is said."""
        told = self.bundle.manifest["cost"]["ram_train"] if format == "onnx" else {}
        size: int | None = told.get(str(self.batch))
        return size


def prepare(
    model: str,
    mode: str,
    *,
    loss: str | None,
    batch: int,
    optimizer: str,
    formats: tuple[str, ...],
    folder: Path,
) -> Case:
    """Build the bundle, its twin and the batches in `folder`.

    Raises: CompileError, ConfigError for a model that cannot be trained.
    """
    loss = loss or recipes.LOSSES.get(model, "cross_entropy")
    proto = recipes.model(model)
    chosen: dict[str, Any] = {"loss": loss, "train": MODES[mode], "batch": batch}
    chosen["optimizer"] = OPTIMIZERS[optimizer]
    decay = DECAY if optimizer == "momentum" else 0.0
    if mode != "int8":
        bundle, lacks = _built(proto, formats, chosen, folder)
        if not isinstance(proto, Path):
            plan.write(proto, loss, list(bundle.shapes), lr=LR, decay=decay, folder=folder)
        save(folder, *recipes.examples(bundle, batch * BATCHES))
        return Case(Path(model).stem, mode, folder, bundle, batch, lacks=lacks)
    if isinstance(proto, Path):
        raise ConfigError(f"mode int8 quantizes a float32 ONNX model, got {model}: use mode head")
    twin = folder / "twin"
    twin.mkdir()
    exact, _ = _built(proto, formats, chosen, twin)
    x, y = recipes.examples(exact, batch * BATCHES)
    save(twin, x, y)
    save(folder, x, y)
    bundle, lacks = _built(quantize(proto, x), formats, chosen, folder)
    return Case(Path(model).stem, mode, folder, bundle, batch, twin, lacks)


def _built(
    model: Any, formats: tuple[str, ...], chosen: dict[str, Any], folder: Path
) -> tuple[Bundle, dict[str, str]]:
    """Save a bundle in all formats, or in ONNX alone; say why not in the others."""
    lacks: dict[str, str] = {}
    try:
        bundle = build(model, **chosen, engines=formats)
    except CompileError as error:
        if formats == ("onnx",):
            raise
        bundle = build(model, **chosen, engines=("onnx",))
        lacks = {name: str(error) for name in formats if name != "onnx"}
    bundle.save(folder / "task.fedge")
    return bundle, lacks
