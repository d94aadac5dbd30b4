# SPDX-License-Identifier: Apache-2.0
"""What runs graphs, as a port: open one by name and never meet the runtime behind it.

An engine predicts with a model's bytes and trains with a bundle's graphs. It keeps parameters and
optimizer state to itself between steps; they pass through Python only when asked for. Importing
this package loads no runtime.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

from numpy.typing import NDArray

from edge_sdk.errors import EngineError
from edge_sdk.types import Array

if TYPE_CHECKING:
    from edge_sdk.bundle import Bundle


class Runtime(NamedTuple):
    """A runtime that an engine stands on."""

    where: str
    """The engine's class, as `module:class`."""
    module: str
    """What must be importable."""
    extra: str
    """What to install for it."""
    format: str
    """The format of the graphs that it runs: onnx or tflite."""

    @property
    def is_installed(self) -> bool:
        """Whether it can be imported, found out without importing it."""
        return find_spec(self.module) is not None

    def version(self) -> str:
        """Return the version that is installed. Raises: PackageNotFoundError."""
        from importlib.metadata import version  # 3 MiB that no training process needs

        return version(self.module.replace("_", "-"))


ENGINES = {
    "ort": Runtime("edge_sdk.engine.ort:Ort", "onnxruntime", "fedge[onnx]", "onnx"),
    "litert": Runtime("edge_sdk.engine.litert:Litert", "ai_edge_litert", "fedge[litert]", "tflite"),
    "tflite": Runtime("edge_sdk.engine.litert:Tflite", "tflite_runtime", "fedge[tflite]", "tflite"),
}
"""Every engine by name, in the order in which "auto" prefers them."""

AUTO = "auto"
"""Leaves the choice to `choose`."""


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

    def write(self, values: Sequence[Array], anchors: Sequence[Array] | None = None) -> None:
        """Set the parameters, and what a proximal term pulls to: those values unless `anchors`."""
        ...

    def reset(self) -> None:
        """Set the optimizer's state to zeros."""
        ...

    def state(self) -> list[Array]:
        """Return copies of the parameters and, after them, of the optimizer's state."""
        ...

    def restore(self, values: Sequence[Array]) -> None:
        """Set what `state` returned; the anchor stays."""
        ...


class Engine(Protocol):
    """A runtime with its settings."""

    format: str
    """What its graphs are written in: onnx or tflite."""

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


def installed() -> list[str]:
    """Return the engines whose runtimes are installed, in the order of preference."""
    return [name for name, runtime in ENGINES.items() if runtime.is_installed]


class Choice(NamedTuple):
    """An engine that was picked, and why each other one was not."""

    engine: str
    reasons: Mapping[str, str]


def choose(manifest: Mapping[str, Any], engine: str = AUTO) -> Choice:
    """Pick the engine for a bundle: the first that is installed and that it has graphs for.

    Only an engine that can train is picked; the reasons say of each other what it lacks.
    Raises: EngineError when there is no such engine, or the bundle cannot train on it;
    ModuleNotFoundError, saying what to install, when its runtime is not there.
    """
    if engine != AUTO and engine not in ENGINES:
        raise EngineError(f"expected an engine of {[AUTO, *ENGINES]}, got {engine!r}")
    names = list(ENGINES) if engine == AUTO else [engine]
    reasons = {name: _lacks(ENGINES[name], manifest["graphs"]) for name in names}
    able = [name for name in names if not reasons[name]]
    if able:
        return Choice(able[0], {n: r or f"{able[0]} comes first" for n, r in reasons.items()})
    fitting = [ENGINES[name] for name in names if _is_for(ENGINES[name], manifest["graphs"])]
    if not fitting:
        raise EngineError(f"expected graphs for {' or '.join(names)}: {reasons[names[0]]}")
    wanted = " or ".join(f"pip install '{runtime.extra}'" for runtime in fitting)
    module = fitting[0].module
    raise ModuleNotFoundError(f"{module} is not installed; {wanted}", name=module)


def _is_for(runtime: Runtime, graphs: Mapping[str, Any]) -> bool:
    return "train" in graphs.get(runtime.format, {})


def _lacks(runtime: Runtime, graphs: Mapping[str, Any]) -> str:
    """Return why a bundle with these graphs cannot train on a runtime here; "" when it can."""
    if not _is_for(runtime, graphs):
        able = sorted(name for name, roles in graphs.items() if "train" in roles)
        said = f"this bundle trains in {', '.join(able)}, not in {runtime.format}"
        return f"{said}; rebuild it with engines= naming it"
    if not runtime.is_installed:
        return f"{runtime.module} is not installed; pip install '{runtime.extra}'"
    return ""


def open_engine(bundle: Bundle, engine: str = AUTO, threads: int = 1) -> Engine:
    """Return an engine by name, or the one that `choose` picks, to run `bundle` on `threads`.

    Raises: EngineError when there is no such engine or the bundle has no graphs for it;
    ModuleNotFoundError, saying what to install, when its runtime is not there.
    """
    if threads < 1:
        raise EngineError(f"expected at least 1 thread, got {threads}")
    runtime = ENGINES[choose(bundle.manifest, engine).engine]
    module, _, name = runtime.where.partition(":")
    return cast("Engine", getattr(import_module(module), name)(threads))
