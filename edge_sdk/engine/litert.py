# SPDX-License-Identifier: Apache-2.0
"""LiteRT, and tflite-runtime of before, as engines that also train: stock interpreters both.

A graph's parameters and optimizer state are inputs and outputs of it; after a step the outputs are
copied over the inputs inside the interpreter, so that no weight is made into a Python object. An
interpreter is laid out for one batch size. The few sizes seen last keep theirs: a pass over the
examples has two, the batch and what is left at the end.
"""

from __future__ import annotations

import gc
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from edge_sdk.errors import EngineError
from edge_sdk.types import Array

if TYPE_CHECKING:
    from edge_sdk.bundle import Bundle

T = TypeVar("T")
_KEPT = 2
"""Interpreters of one graph that are kept, each for a batch size of its own."""


class Litert:
    """ai-edge-litert on the CPU with a fixed number of threads."""

    format = "tflite"
    _module = "ai_edge_litert.interpreter"

    def __init__(self, threads: int = 1) -> None:
        self._runtime = import_module(self._module)
        self._threads = threads

    def predictor(self, model: bytes) -> LitertPredictor:
        """Load a forward model of one input and one output. Raises: EngineError."""
        return LitertPredictor(Sizes(self, model))

    def training(self, bundle: Bundle) -> LitertTraining:
        """Load a bundle's training graph, and its evaluation graph when first needed."""
        return LitertTraining(self, bundle)

    def interpreter(self, model: bytes) -> Any:
        """Load a graph. Raises: EngineError."""
        make = self._runtime.Interpreter
        return guarded("load the graph", make, model_content=model, num_threads=self._threads)


class Tflite(Litert):
    """tflite-runtime 2.14, the last of its name: the one with a wheel for 32-bit ARM."""

    _module = "tflite_runtime.interpreter"

    def __init__(self, threads: int = 1) -> None:
        if int(np.__version__.split(".")[0]) >= 2:
            raise EngineError(
                f"expected numpy below 2 for tflite-runtime, got {np.__version__}: "
                "pip install 'numpy<2', or use the engine litert"
            )
        super().__init__(threads)


class Session:
    """An interpreter laid out for one batch size; its ports by name."""

    def __init__(self, interpreter: Any, rows: int | None, resized: Sequence[str] = ()) -> None:
        self._interpreter = interpreter
        self.inputs = _ports(interpreter.get_input_details())
        self.outputs = _ports(interpreter.get_output_details())
        for name in resized:
            port = self.inputs[name]
            shape = [rows, *port["shape"][1:]]
            guarded("resize", interpreter.resize_tensor_input, port["index"], shape)
        guarded("lay out the graph", interpreter.allocate_tensors)
        both = {**self.inputs, **self.outputs}
        self._views = {name: interpreter.tensor(port["index"]) for name, port in both.items()}

    def view(self, name: str) -> NDArray[Any]:
        """Return a port's memory, of a scalar a copy; let go of it before the next `run`."""
        return np.asarray(self._views[name]())

    def put(self, name: str, value: Any) -> None:
        """Set an input."""
        room = self._views[name]()
        if np.ndim(room):
            np.copyto(room, value)
        else:  # the runtime gives a number, not its memory
            number = np.array(value, room.dtype)
            self._interpreter.set_tensor(self.inputs[name]["index"], number)

    def run(self) -> None:
        """Run the graph once. Raises: EngineError."""
        guarded("run the graph", self._interpreter.invoke)

    def forget(self) -> None:
        """Begin anew where the graph keeps state between runs, as TFLite's LSTM does."""
        self._interpreter.reset_all_variables()


class Sizes:
    """A graph's interpreters, one for each batch size seen lately."""

    def __init__(self, engine: Litert, model: bytes, resized: Sequence[str] = ()) -> None:
        self._engine, self._model, self._resized = engine, model, tuple(resized)
        self._sessions: OrderedDict[int, Session] = OrderedDict()

    def session(self, rows: int) -> Session:
        """Return the interpreter for a batch of `rows`. Raises: EngineError."""
        if rows not in self._sessions:
            while len(self._sessions) >= _KEPT:
                self._sessions.popitem(last=False)
            gc.collect()  # interpreters and their views know each other
            interpreter = self._engine.interpreter(self._model)
            resized = self._resized or tuple(_ports(interpreter.get_input_details()))
            self._sessions[rows] = Session(interpreter, rows, resized)
        self._sessions.move_to_end(rows)
        return self._sessions[rows]

    def fixed(self) -> Session:
        """Return the interpreter for the batch that the file was written with."""
        if 0 not in self._sessions:
            self._sessions[0] = Session(self._engine.interpreter(self._model), None)
        return self._sessions[0]


class LitertPredictor:
    """A loaded forward model. One whose batch is fixed in the file is run row by row."""

    def __init__(self, sizes: Sizes) -> None:
        self._sizes, self._is_fixed = sizes, False

    def run(self, x: NDArray[Any]) -> NDArray[Any]:
        """Return the output for a batch. Raises: EngineError."""
        if not self._is_fixed:
            try:
                made = self._answer(self._sizes.session(len(x)), x)
            except EngineError:
                if len(x) == 1:
                    raise
                made = None
            if made is not None and (made.ndim and len(made) == len(x)):
                return made
            self._is_fixed = True
        session = self._sizes.fixed()
        (port,) = session.inputs.values()
        step = int(port["shape"][0]) if len(port["shape"]) else 1
        padded = np.concatenate([x, np.repeat(x[-1:], -len(x) % step, axis=0)])
        parts = [self._answer(session, padded[i : i + step]) for i in range(0, len(padded), step)]
        return np.concatenate(parts)[: len(x)]

    def _answer(self, session: Session, x: NDArray[Any]) -> NDArray[Any]:
        name, out = next(iter(session.inputs)), next(iter(session.outputs))
        session.put(name, x)
        session.forget()
        session.run()
        return session.view(out).copy()


class LitertTraining:
    """Training graphs whose weights stay in the interpreter that trained last."""

    def __init__(self, engine: Litert, bundle: Bundle) -> None:
        self._engine, self._bundle = engine, bundle
        initial = list(bundle.params().values())
        slots = [tuple(s["shape"]) for s in bundle.manifest["slots"]]
        names = [f"p.{i}" for i in range(len(initial))]
        self._params, self._slots = names, [f"s.{j}" for j in range(len(slots))]
        self._held: dict[str, Array] = dict(zip(names, initial, strict=True))
        self._held |= {
            n: np.zeros(shape, np.float32) for n, shape in zip(self._slots, slots, strict=True)
        }
        self._now: Session | None = None
        self._anchors = initial if bundle.manifest["proximal"] else []
        self._train = Sizes(engine, bundle.graph("tflite", "train"), ("x", "y"))
        self._measure: Sizes | None = None

    def step(self, x: NDArray[Any], y: NDArray[Any], lr: float, mu: float) -> float:
        """Train on one batch. Raises: EngineError."""
        session = self._at(len(x))
        session.put("x", x)
        session.put("y", y)
        session.put("lr", lr)
        if self._anchors:
            session.put("mu", mu)
        session.run()
        for name in (*self._params, *self._slots):
            session.put(name, session.view(f"{name}.next"))
        return float(session.view("loss"))

    def evaluate(self, x: NDArray[Any], y: NDArray[Any]) -> tuple[float, int | None]:
        """Return the mean loss and the number right, if the graph says. Raises: EngineError."""
        if self._measure is None:
            graph = self._bundle.graph("tflite", "evaluate")
            self._measure = Sizes(self._engine, graph, ("x", "y"))
        session = self._measure.session(len(x))
        for name, value in (("x", x), ("y", y), *((n, self._array(n)) for n in self._params)):
            session.put(name, value)
        session.run()
        right = int(session.view("correct")) if "correct" in session.outputs else None
        return float(session.view("loss")), right

    def read(self) -> list[Array]:
        """Return copies of the parameters, in the manifest's order."""
        return [self._array(name).copy() for name in self._params]

    def write(self, values: Sequence[Array], anchors: Sequence[Array] | None = None) -> None:
        """Set the parameters and the proximal anchor."""
        for name, value in zip(self._params, values, strict=True):
            self._set(name, value)
        if self._anchors:
            self._anchors = [np.array(value, np.float32) for value in anchors or values]
            if self._now is not None:
                self._pull_to_anchors(self._now)

    def reset(self) -> None:
        """Set the optimizer's state to zeros."""
        for name in self._slots:
            self._set(name, 0.0)

    def state(self) -> list[Array]:
        """Return copies of the parameters and the optimizer's state."""
        return [self._array(name).copy() for name in (*self._params, *self._slots)]

    def restore(self, values: Sequence[Array]) -> None:
        """Set the parameters and the optimizer's state."""
        for name, value in zip((*self._params, *self._slots), values, strict=True):
            self._set(name, value)

    def _array(self, name: str) -> Array:
        """Return where a parameter or slot is now; let go of it before the next step."""
        return self._held[name] if self._now is None else self._now.view(name)

    def _set(self, name: str, value: Any) -> None:
        if self._now is None:
            self._held[name] = np.broadcast_to(np.float32(value), self._held[name].shape).copy()
        else:
            self._now.put(name, value)

    def _at(self, rows: int) -> Session:
        """Return the interpreter for a batch, with parameters and slots in it."""
        session = self._train.session(rows)
        if session is not self._now:
            for name in (*self._params, *self._slots):
                session.put(name, self._array(name))
            self._pull_to_anchors(session)
            self._now, self._held = session, {}
        return session

    def _pull_to_anchors(self, session: Session) -> None:
        for i, anchor in enumerate(self._anchors):
            session.put(f"a.{i}", anchor)


def _ports(details: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    return {str(detail["name"]): detail for detail in details}


def guarded(doing: str, call: Callable[..., T], *args: Any, **named: Any) -> T:
    """Call into the runtime; what it raises becomes one line of ours."""
    try:
        return call(*args, **named)
    except (ValueError, RuntimeError, MemoryError) as error:
        line = " ".join(str(error).split())[:300]
        raise EngineError(f"the TFLite runtime could not {doing}: {line}") from error
