# SPDX-License-Identifier: Apache-2.0
"""onnxruntime, the stock inference wheel, as an engine that also trains.

Parameters and optimizer state live in two sets of buffers that the runtime reads and writes in
place through IOBinding: a step reads one set and writes the other, the next step the reverse. No
step copies a weight through Python. Telemetry is switched off before the runtime is loaded, for
good: a device talks to its broker and to nobody else.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from edge_sdk.errors import EngineError
from edge_sdk.types import Array

if TYPE_CHECKING:
    from edge_sdk.bundle import Bundle

T = TypeVar("T")
_ALIGN_BYTES = 64
_ERRORS_ONLY = 3
SETTINGS = {
    # A waiting thread sleeps. Spinning for long is a quarter faster on an idle machine and 2 to 3
    # times slower on one that has anything else to do; a board does.
    "session.intra_op.allow_spinning": "0",
    "session.inter_op.allow_spinning": "0",
    "session.use_device_allocator_for_initializers": "1",  # constants stay out of the arena
}
BRIEF_SPIN = {
    # DS-CNN, 2 threads: 2.9 ms a step instead of 3.4 on an idle machine, no slower on a busy one.
    "session.intra_op.allow_spinning": "1",
    "session.intra_op.spin_duration_us": "10",
}
BRIEF_SPIN_SINCE = (1, 26)
"""Older runtimes know no duration: they would spin for long."""


class Ort:
    """onnxruntime on the CPU with a fixed number of threads."""

    format = "onnx"

    def __init__(self, threads: int = 1) -> None:
        _runtime()
        self._threads = threads

    def predictor(self, model: bytes) -> OrtPredictor:
        """Load a forward model of one input and one output. Raises: EngineError."""
        return OrtPredictor(self.session(model))

    def training(self, bundle: Bundle) -> OrtTraining:
        """Load a bundle's training graph, and its evaluation graph when first needed."""
        return OrtTraining(self, bundle)

    def session(self, model: bytes) -> Any:
        """Load a graph with settings for small boards. Raises: EngineError."""
        ort = _runtime()
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.log_severity_level = _ERRORS_ONLY
        options.use_deterministic_compute = True
        options.enable_mem_pattern = (
            False  # with the arena alone: 25 to 40 MiB less, 0 to 8 % slower
        )
        for name, value in {**SETTINGS, **_brief_spin(ort.__version__)}.items():
            options.add_session_config_entry(name, value)
        providers = ["CPUExecutionProvider"]
        return _guarded("load the graph", ort.InferenceSession, model, options, providers)


class OrtPredictor:
    """A loaded forward model."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._input = session.get_inputs()[0].name

    def run(self, x: NDArray[Any]) -> NDArray[Any]:
        """Return the first output for a batch. Raises: EngineError."""
        feed = {self._input: np.ascontiguousarray(x)}
        outputs = _guarded("predict", self._session.run, None, feed)
        return np.asarray(outputs[0])


class OrtTraining:
    """A training session whose weights the runtime keeps to itself."""

    def __init__(self, engine: Ort, bundle: Bundle) -> None:
        self._engine, self._bundle = engine, bundle
        initial = list(bundle.params().values())
        slots = [tuple(s["shape"]) for s in bundle.manifest["slots"]]
        self._sets = tuple(
            [*map(_buffer, (p.shape for p in initial)), *map(_buffer, slots)] for _ in range(2)
        )
        self._count = len(initial)
        self._now = 0
        self._loss, self._lr, self._mu = (_buffer(()) for _ in range(3))
        self._anchors = [_buffer(p.shape) for p in initial] if bundle.manifest["proximal"] else []
        self._session = engine.session(bundle.graph("onnx", "train"))
        self._bindings = tuple(self._bind(turn) for turn in (0, 1))
        self._x: Any = None
        self._y: Any = None
        self._evaluation: Any = None
        self.write(initial)

    def step(self, x: NDArray[Any], y: NDArray[Any], lr: float, mu: float) -> float:
        """Train on one batch; arrays given again are not bound again. Raises: EngineError."""
        self._feed(x, y)
        self._lr[...], self._mu[...] = lr, mu
        binding = self._bindings[self._now]
        _guarded("train", self._session.run_with_iobinding, binding)
        self._now = 1 - self._now
        return float(self._loss)

    def evaluate(self, x: NDArray[Any], y: NDArray[Any]) -> tuple[float, int | None]:
        """Return the mean loss and the number right, if the graph says. Raises: EngineError."""
        if self._evaluation is None:
            self._evaluation = self._engine.session(self._bundle.graph("onnx", "evaluate"))
        feed = {f"p.{i}": p for i, p in enumerate(self._params())}
        outputs = _guarded("evaluate", self._evaluation.run, None, {**feed, "x": x, "y": y})
        said = {o.name: v for o, v in zip(self._evaluation.get_outputs(), outputs, strict=True)}
        return float(said["loss"]), int(said["correct"]) if "correct" in said else None

    def read(self) -> list[Array]:
        """Return copies of the parameters, in the manifest's order."""
        return [p.copy() for p in self._params()]

    def write(self, values: Sequence[Array], anchors: Sequence[Array] | None = None) -> None:
        """Set the parameters and the proximal anchor."""
        for buffer, value in zip(self._params(), values, strict=True):
            buffer[...] = value
        for anchor, value in zip(self._anchors, anchors or values, strict=False):
            anchor[...] = value

    def reset(self) -> None:
        """Set the optimizer's state to zeros."""
        for slot in self._sets[self._now][self._count :]:
            slot[...] = 0

    def state(self) -> list[Array]:
        """Return copies of the parameters and the optimizer's state."""
        return [value.copy() for value in self._sets[self._now]]

    def restore(self, values: Sequence[Array]) -> None:
        """Set the parameters and the optimizer's state."""
        for buffer, value in zip(self._sets[self._now], values, strict=True):
            buffer[...] = value

    def _params(self) -> list[Array]:
        return self._sets[self._now][: self._count]

    def _bind(self, turn: int) -> Any:
        """Read set `turn`, write the other."""
        binding = self._session.io_binding()
        names = [f"p.{i}" for i in range(self._count)]
        names += [f"s.{i}" for i in range(len(self._sets[0]) - self._count)]
        inputs = dict(zip(names, self._sets[turn], strict=True)) | {"lr": self._lr}
        if self._anchors:
            inputs |= {"mu": self._mu, **{f"a.{i}": a for i, a in enumerate(self._anchors)}}
        outputs = {f"{n}.next": b for n, b in zip(names, self._sets[1 - turn], strict=True)}
        for name, array in inputs.items():
            _guarded(f"bind {name}", binding.bind_ortvalue_input, name, _value(array))
        for name, array in {**outputs, "loss": self._loss}.items():
            _guarded(f"bind {name}", binding.bind_ortvalue_output, name, _value(array))
        return binding

    def _feed(self, x: NDArray[Any], y: NDArray[Any]) -> None:
        for name, array in (("x", x), ("y", y)):
            if getattr(self, f"_{name}") is not array:
                flat = np.ascontiguousarray(array)
                for binding in self._bindings:
                    _guarded(f"bind {name}", binding.bind_ortvalue_input, name, _value(flat))
                setattr(self, f"_{name}", array if flat is array else None)


@cache
def _runtime() -> Any:
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    import onnxruntime

    onnxruntime.set_default_logger_severity(_ERRORS_ONLY)
    return onnxruntime


def _brief_spin(version: str) -> dict[str, str]:
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    return BRIEF_SPIN if numbers >= BRIEF_SPIN_SINCE else {}


def _buffer(shape: tuple[int, ...]) -> Array:
    """Make a float32 array of zeros that starts on a cache line."""
    size = int(np.prod(shape, dtype=np.int64)) * 4
    room = np.zeros(size + _ALIGN_BYTES, np.uint8)
    skip = -room.ctypes.data % _ALIGN_BYTES
    return room[skip : skip + size].view(np.float32).reshape(shape)


def _value(array: NDArray[Any]) -> Any:
    """Wrap an array as the runtime's value: the same memory, no copy."""
    return _runtime().OrtValue.ortvalue_from_numpy(array)


def _guarded(doing: str, call: Callable[..., T], *args: Any) -> T:
    """Call into the runtime; what it raises becomes one line of ours."""
    try:
        return call(*args)
    except Exception as error:  # the runtime's own classes share no other root
        line = " ".join(str(error).split())[:300]
        raise EngineError(f"onnxruntime could not {doing}: {line}") from error
