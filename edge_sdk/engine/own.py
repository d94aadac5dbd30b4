# SPDX-License-Identifier: Apache-2.0
"""A .tflite model that brings its own training runs as it is, by its own entry points.

TensorFlow's converter writes such models, with signatures train, infer, save and restore over
resource variables. Nothing is compiled and nothing is added: the stock interpreter calls the entry
points, after the device's check of all operators.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from edge_sdk import owncheck
from edge_sdk.engine import AUTO, ENGINES
from edge_sdk.engine.litert import Litert, guarded
from edge_sdk.errors import EngineError
from edge_sdk.limits import Limits
from edge_sdk.types import Params

_SAVE, _RESTORE = ("save", "get"), ("restore", "set")


class Entry(NamedTuple):
    """One signature: the names of what it takes and gives."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class OwnModel:
    """A model with entry points of its own.

    Args:
        data: the file's bytes.
        engine: litert, tflite, or "auto", the first of them that is installed.
        threads: of the interpreter.
        limits: what this device is ready to spend.

    Raises: RefusedError for a model that may not run here, such as one with TensorFlow's own (Flex)
    operators; EngineError; ModuleNotFoundError, saying what to install.
    """

    def __init__(
        self, data: bytes, engine: str = AUTO, threads: int = 1, limits: Limits | None = None
    ) -> None:
        file = owncheck.check(data, limits or Limits())
        self.entries: Mapping[str, Entry] = {
            key: Entry(tuple(found.inputs), tuple(found.outputs))
            for key, found in file.signatures.items()
        }
        self._data = data  # the interpreter reads weights where they are
        self._interpreter = _opened(engine, threads).interpreter(data)
        self._runners: dict[str, Any] = {}

    def call(self, entry: str, **inputs: Any) -> dict[str, NDArray[Any]]:
        """Run an entry point. Raises: EngineError."""
        if entry not in self.entries:
            raise EngineError(f"expected an entry of {sorted(self.entries)}, got {entry!r}")
        takes = self.entries[entry].inputs
        if set(inputs) != set(takes):
            raise EngineError(f"{entry}: expected inputs {sorted(takes)}, got {sorted(inputs)}")
        if entry not in self._runners:
            make = self._interpreter.get_signature_runner
            self._runners[entry] = guarded("find an entry", make, entry)
        made = guarded("run an entry", self._runners[entry], **inputs)
        return {name: np.array(value) for name, value in made.items()}

    def step(self, x: NDArray[Any], y: NDArray[Any]) -> float:
        """Train on one batch by the entry ``train`` of inputs x and y; return its loss."""
        made = self.call("train", x=x, y=y)
        loss = made.get("loss", next(iter(made.values())))
        return float(loss.reshape(()))

    def predict(self, x: NDArray[Any]) -> NDArray[Any]:
        """Return the first output of the entry ``infer``, whose one input is any."""
        takes = self._entry(("infer",)).inputs
        made = self.call("infer", **dict.fromkeys(takes, x))
        return made[self.entries["infer"].outputs[0]]

    def params(self) -> Params:
        """Return the weights, as the entry ``save`` (or ``get``) gives them."""
        return cast("Params", self.call(self._name(_SAVE)))

    def load_params(self, params: Mapping[str, NDArray[Any]]) -> None:
        """Set the weights by the entry ``restore`` (or ``set``), which takes them by name."""
        self.call(self._name(_RESTORE), **params)

    def _entry(self, names: tuple[str, ...]) -> Entry:
        return self.entries[self._name(names)]

    def _name(self, names: tuple[str, ...]) -> str:
        for name in names:
            if name in self.entries:
                return name
        raise EngineError(f"expected an entry {' or '.join(names)}, got {sorted(self.entries)}")


def _opened(engine: str, threads: int) -> Litert:
    able = {name: row for name, row in ENGINES.items() if row.format == "tflite"}
    if engine != AUTO and engine not in able:
        raise EngineError(f"expected an engine of {[AUTO, *able]}, got {engine!r}")
    wanted = list(able) if engine == AUTO else [engine]
    name = next((n for n in wanted if able[n].is_installed), wanted[0])
    if not able[name].is_installed:
        module, extra = able[name].module, able[name].extra
        raise ModuleNotFoundError(f"{module} is not installed; pip install '{extra}'", name=module)
    where, _, found = able[name].where.partition(":")
    return cast("Litert", getattr(import_module(where), found)(threads))
