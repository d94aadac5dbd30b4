# SPDX-License-Identifier: Apache-2.0
"""What runs graphs, as a port: open one by name and never meet the runtime behind it.

An engine predicts with a model's bytes and trains with a bundle's graphs. It keeps parameters and
optimizer state to itself between steps; they pass through Python only when asked for. Importing
this package loads no runtime.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast

from numpy.typing import NDArray

from edge_sdk.errors import EngineError
from edge_sdk.types import Array

if TYPE_CHECKING:
    from edge_sdk.bundle import Bundle

ENGINES = {"ort": ("edge_sdk.engine.ort:Ort", "onnxruntime", "fedge[onnx]")}
"""Name to (class, the module it stands on, what to install for it)."""


class Predictor(Protocol):
    """A model that is loaded and answers."""

    def run(self, x: NDArray[Any]) -> NDArray[Any]:
        """Return the model's output for a batch of its own input type.

        Raises: EngineError when the engine refuses the batch.
        """
        ...


class Training(Protocol):
    """Parameters in the manifest's order, with optimizer state, inside an engine."""

    def step(self, x: NDArray[Any], y: NDArray[Any], lr: float, mu: float) -> float:
        """Train on one batch of any size and return its mean loss before the step.

        Raises: EngineError when the engine fails or refuses the batch.
        """
        ...

    def evaluate(self, x: NDArray[Any], y: NDArray[Any]) -> tuple[float, int | None]:
        """Return the mean loss of one batch and how many it got right, where the loss can say."""
        ...

    def read(self) -> list[Array]:
        """Return copies of the parameters."""
        ...

    def write(self, values: Sequence[Array]) -> None:
        """Set the parameters, and the anchor that a proximal term pulls towards."""
        ...

    def reset(self) -> None:
        """Set the optimizer's state to zeros."""
        ...


class Engine(Protocol):
    """A runtime with its settings."""

    def predictor(self, model: bytes) -> Predictor:
        """Load a forward model.

        Raises: EngineError when the runtime does not take it.
        """
        ...

    def training(self, bundle: Bundle) -> Training:
        """Load a bundle's training graphs, at its initial parameters.

        Raises: EngineError when the runtime does not take them.
        """
        ...


def open_engine(bundle: Bundle, engine: str = "ort", threads: int = 1) -> Engine:
    """Return the engine called `engine`, to run `bundle` on `threads` threads.

    Raises: EngineError when there is no such engine or the bundle has no graphs for it;
    ModuleNotFoundError, saying what to install, when its runtime is not there.
    """
    if engine not in ENGINES:
        raise EngineError(f"expected an engine of {sorted(ENGINES)}, got {engine!r}")
    if engine not in bundle.manifest["graphs"]:
        raise EngineError(
            f"this bundle has graphs for {sorted(bundle.manifest['graphs'])}, not for {engine!r}; "
            "rebuild it with engines= naming it"
        )
    if threads < 1:
        raise EngineError(f"expected at least 1 thread, got {threads}")
    where, runtime, extra = ENGINES[engine]
    module, _, name = where.partition(":")
    try:
        return cast("Engine", getattr(import_module(module), name)(threads))
    except ModuleNotFoundError as error:
        if error.name != runtime:
            raise
        said = f"{runtime} is not installed; pip install '{extra}'"
        raise ModuleNotFoundError(said, name=runtime) from error
