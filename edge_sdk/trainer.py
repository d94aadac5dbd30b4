# SPDX-License-Identifier: Apache-2.0
"""Train a bundle on local examples: the same seed, examples and threads give the same bits.

A step is one call into the engine. Shuffling comes from `np.random.default_rng(seed)`, time from a
clock that is passed in. FedProx's term pulls towards the parameters of the last `load_params`
(Li et al. 2020, "Federated Optimization in Heterogeneous Networks", eq. 2), or to an anchor given
with them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edge_sdk import params as tensors
from edge_sdk.bundle import Bundle
from edge_sdk.engine import Predictor, open_engine
from edge_sdk.errors import ConfigError, EngineError
from edge_sdk.requantize import requantize
from edge_sdk.types import Array, Clock, Params

_EVALUATE_BATCH = 256
_MOST = 1e38  # what a float32 of the graph can hold


class Fit(TypedDict):
    """What a `fit` did. `loss` is the mean over the examples seen, before each step."""

    loss: float
    steps: int
    epochs: int
    seconds: float
    stopped_by: str


@dataclass(frozen=True, slots=True, eq=False)
class Progress:
    """Where a `fit` stood after a step: whoever starts from it ends with the same bits."""

    steps: int
    seen: int
    loss: float
    """The sum over the examples seen."""
    seconds: float
    at: int
    """How many steps of them in the pass over the examples that was under way."""
    shuffle: dict[str, Any]
    """The state of the generator before that pass was shuffled."""
    state: list[Array]
    """The parameters, then the optimizer's state."""


OnStep = Callable[[Callable[[], Progress]], object]
"""Called after each step with what tells, copied, where it stands."""


class Trainer:
    """A bundle's parameters, trained in place.

    Raises: EngineError when the engine cannot run the bundle; ModuleNotFoundError when its runtime
    is not installed.
    """

    def __init__(
        self,
        bundle: Bundle,
        engine: str = "auto",
        threads: int = 1,
        seed: int = 0,
        *,
        clock: Clock = time,
    ) -> None:
        self._bundle, self._clock = bundle, clock
        self._engine = open_engine(bundle, engine, threads)
        self._training = self._engine.training(bundle)
        self._rng = np.random.default_rng(seed)
        self._shuffle: dict[str, Any] = {}
        self._base = bundle.params()
        self._predictor: Predictor | None = None
        self._feed = Feed(bundle.manifest)

    def step(
        self, x: ArrayLike, y: ArrayLike, *, lr: float | None = None, mu: float = 0.0
    ) -> float:
        """Train on one batch, `x` as the forward model takes it, and return its mean loss.

        Raises: ValueError on another shape; EngineError when the loss is not finite.
        """
        xs, ys = self._feed.examples(x, y)
        return self._step(self._feed.inputs(xs), ys, self._lr(lr), self._mu(mu))

    def fit(
        self,
        x: ArrayLike,
        y: ArrayLike,
        epochs: int | None = 1,
        batch: int = 32,
        *,
        steps: int | None = None,
        seconds: float | None = None,
        lr: float | None = None,
        mu: float = 0.0,
        start: Progress | None = None,
        on_step: OnStep | None = None,
    ) -> Fit:
        """Train in shuffled batches until the first of the budgets ends; None is no limit.

        `batch`: rows of a step, but never more than a bundle built for so much memory allows.
        `start`: go on from there, after `load_params` as before; budgets count from its beginning.

        Raises: ValueError on no examples, no limit or another shape; EngineError when the loss is
        not finite.
        """
        xs, ys = self._feed.examples(x, y)
        batch = self._rows(batch)
        _check_budget(batch, epochs, steps, seconds)
        rate, pull = self._lr(lr), self._mu(mu)
        per_epoch = math.ceil(len(xs) / batch)
        if start is not None:
            self._go_on(start)
        came_s, total, seen, done = _before(start)
        began_s, offset = self._clock.monotonic() - came_s, min(start.at, per_epoch) if start else 0
        stopped_by, before = "", done - offset

        def progress() -> Progress:
            seconds, state = self._clock.monotonic() - began_s, self._training.state()
            at = (done - before - 1) % per_epoch + 1
            return Progress(done, seen, total, seconds, at, self._shuffle, state)

        for bx, by in self._batches(xs, ys, batch, offset):
            total += self._step(bx, by, rate, pull) * len(bx)
            seen += len(bx)
            done += 1
            elapsed_s = self._clock.monotonic() - began_s
            if epochs is not None and done >= epochs * per_epoch:
                stopped_by = "epochs"
            elif steps is not None and done >= steps:
                stopped_by = "steps"
            elif seconds is not None and elapsed_s >= seconds:
                stopped_by = "seconds"
            if stopped_by:
                break
            if on_step is not None:
                on_step(progress)
        return Fit(
            loss=total / seen,
            steps=done,
            epochs=done // per_epoch,
            seconds=self._clock.monotonic() - began_s,
            stopped_by=stopped_by,
        )

    def evaluate(self, x: ArrayLike, y: ArrayLike) -> dict[str, float]:
        """Return the mean `loss` over the examples and, for a classifier, the `accuracy`.

        This is the float32 master; `predict` answers with the requantized model.
        Raises: ValueError on no examples or another shape; EngineError.
        """
        xs, ys = self._feed.examples(x, y)
        loss, right, can_say = 0.0, 0, True
        for at in range(0, len(xs), _EVALUATE_BATCH):
            bx, by = xs[at : at + _EVALUATE_BATCH], ys[at : at + _EVALUATE_BATCH]
            mean, correct = self._training.evaluate(self._feed.inputs(bx), by)
            loss += mean * len(bx)
            can_say = can_say and correct is not None
            right += correct or 0
        said = {"loss": loss / len(xs)}
        return {**said, "accuracy": right / ys.size} if can_say else said

    def predict(self, x: ArrayLike) -> NDArray[Any]:
        """Return what the forward model returns for a batch, at the current parameters.

        float32 `x` for a quantized input is quantized by the input's scale; a quantized output
        comes raw. Raises: ValueError on another shape; EngineError.
        """
        if self._predictor is None:
            model = requantize(self._bundle, self.params(), self._engine.format)
            self._predictor = self._engine.predictor(model)
        return self._predictor.run(self._feed.forward(x))

    def params(self) -> Params:
        """Return copies of the trainable tensors, float32, by forward-model name."""
        return dict(zip(self._bundle.shapes, self._training.read(), strict=True))

    def load_params(self, params: Params, anchor: Params | None = None) -> None:
        """Start from these parameters: `delta` counts from here, optimizer state begins afresh.

        `anchor`: what `mu` pulls towards, these parameters when None.

        Raises: ValueError when a tensor is missing, of another shape or not finite.
        """
        self._base = self._finite(params)
        anchors = None if anchor is None else list(self._finite(anchor).values())
        self._training.write(list(self._base.values()), anchors)
        self.reset_optimizer()
        self._predictor = None

    def delta(self) -> Params:
        """Return `local - base`: what training changed since the last `load_params`."""
        return tensors.delta(self.params(), self._base)

    def reset_optimizer(self) -> None:
        """Forget momentum and the like."""
        self._training.reset()

    def _finite(self, params: Params) -> Params:
        flat = tensors.flatten(params, self._bundle.shapes)
        if not np.isfinite(flat).all():
            raise ValueError("expected finite parameters, got NaN or infinity; fetch them again")
        return tensors.unflatten(flat, self._bundle.shapes)

    def _step(self, x: NDArray[Any], y: NDArray[Any], lr: float, mu: float) -> float:
        loss = self._training.step(x, y, lr, mu)
        self._predictor = None
        if not math.isfinite(loss):
            raise EngineError(
                f"expected a finite loss, got {loss} at learning rate {lr:g}; lower it, check the "
                "examples, and load_params to go on"
            )
        return loss

    def _go_on(self, start: Progress) -> None:
        self._training.restore(start.state)
        self._rng.bit_generator.state = start.shuffle
        self._predictor = None

    def _batches(
        self, xs: NDArray[Any], ys: NDArray[Any], batch: int, offset: int
    ) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
        """Yield shuffled batches for ever, in two buffers that are filled again and again.

        The first `offset` of the first pass are left out.
        """
        size = min(batch, len(xs))
        room_x = np.empty((size, *xs.shape[1:]), self._feed.dtype)
        room_y = np.empty((size, *ys.shape[1:]), ys.dtype)
        rooms = {n: (room_x[:n], room_y[:n]) for n in (size, len(xs) % size)}
        while True:
            self._shuffle = dict(self._rng.bit_generator.state)
            order = self._rng.permutation(len(xs))
            for at in range(offset * size, len(xs), size):
                rows = order[at : at + size]
                bx, by = rooms[len(rows)]
                self._feed.fill(bx, xs, rows)
                np.take(ys, rows, axis=0, out=by, mode="clip")
                yield bx, by
            offset = 0

    def _rows(self, batch: int) -> int:
        most = self._bundle.manifest["cost"].get("batch")
        return batch if most is None else min(batch, int(most))

    def _lr(self, lr: float | None) -> float:
        rate = float(self._bundle.manifest["lr"] if lr is None else lr)
        if not 0 <= rate <= _MOST:
            raise ConfigError(f"expected a learning rate from 0 to {_MOST:g}, got {rate}")
        return rate

    def _mu(self, mu: float) -> float:
        if mu and not self._bundle.manifest["proximal"]:
            raise ConfigError("mu needs a bundle built with proximal=True; rebuild it or set mu=0")
        if not 0 <= mu <= _MOST:
            raise ConfigError(f"expected mu from 0 to {_MOST:g}, got {mu}")
        return float(mu)


class Feed:
    """Examples as people have them to arrays as the graphs take them, by the manifest."""

    def __init__(self, manifest: dict[str, Any]) -> None:
        self._input, self._output = manifest["input"], manifest["output"]
        self._target = manifest["target"]
        self._is_quantized = self._input["scale"] is not None
        self._model_dtype = np.dtype(self._input["dtype"])
        self.dtype = np.dtype(np.float32) if self._is_quantized else self._model_dtype
        self._has_classes = manifest["loss"] == "cross_entropy"

    def examples(self, x: ArrayLike, y: ArrayLike) -> tuple[NDArray[Any], NDArray[Any]]:
        """Check a batch and its labels; labels come in the graph's type.

        Raises: ValueError saying which shape was expected.
        """
        xs, ys = _shaped(x, self._input["shape"], "x"), np.asarray(y)
        dtype = np.dtype(self._target["dtype"])
        if dtype.kind == "i" and ys.dtype.kind not in "iub":
            raise ValueError(f"expected whole class numbers in y, got {ys.dtype}; convert them")
        ys = _shaped(np.ascontiguousarray(ys, dtype), self._target["shape"], "y")
        if len(xs) != len(ys) or not len(xs):
            raise ValueError(f"expected as many labels as inputs, from 1, got {len(ys)}, {len(xs)}")
        self._check_classes(ys)
        return xs, ys

    def inputs(self, x: NDArray[Any]) -> NDArray[Any]:
        """Return a checked batch as the training graph takes it; raw int8 is dequantized."""
        if self._is_quantized and x.dtype == self._model_dtype:
            zero, scale = np.float32(self._input["zero_point"]), np.float32(self._input["scale"])
            return np.ascontiguousarray((x.astype(np.float32) - zero) * scale)
        return np.ascontiguousarray(x, self.dtype)

    def fill(self, room: NDArray[Any], x: NDArray[Any], rows: NDArray[np.int64]) -> None:
        """Put rows of `x` into `room`, as `inputs` would give them."""
        if x.dtype == room.dtype:
            np.take(x, rows, axis=0, out=room, mode="clip")
        else:
            room[...] = self.inputs(x[rows])

    def forward(self, x: ArrayLike) -> NDArray[Any]:
        """Return a batch as the forward model takes it; floats are quantized where it is int8.

        Raises: ValueError saying which shape was expected.
        """
        xs = _shaped(x, self._input["shape"], "x")
        if not self._is_quantized or xs.dtype == self._model_dtype:
            return np.ascontiguousarray(xs, self._model_dtype)
        info = np.iinfo(self._model_dtype)
        levels = np.rint(np.asarray(xs, np.float32) / np.float32(self._input["scale"]))
        shifted = levels + np.float32(self._input["zero_point"])
        return np.asarray(np.clip(shifted, info.min, info.max), self._model_dtype)

    def _check_classes(self, ys: NDArray[Any]) -> None:
        sizes = self._output["shape"][1:]
        if not self._has_classes or not sizes or None in sizes:
            return
        classes = math.prod(sizes)
        if ys.min() < 0 or ys.max() >= classes:
            raise ValueError(f"expected classes 0 to {classes - 1}, got {ys.min()} to {ys.max()}")


def _shaped(values: ArrayLike, shape: list[int | None], name: str) -> NDArray[Any]:
    array = np.asarray(values)
    fits = array.ndim == len(shape) and all(
        want is None or want == have for want, have in zip(shape[1:], array.shape[1:], strict=True)
    )
    if not fits:
        open_shape = ["any", *("any" if d is None else d for d in shape[1:])]
        raise ValueError(f"expected {name} of shape {open_shape}, got {list(array.shape)}")
    return array


def _check_budget(batch: int, epochs: int | None, steps: int | None, seconds: float | None) -> None:
    if epochs is None and steps is None and seconds is None:
        raise ValueError("expected a limit of epochs, steps or seconds, got none")
    if batch < 1 or min((n for n in (epochs, steps) if n is not None), default=1) < 1:
        raise ValueError(f"expected batch, epochs, steps from 1, got {batch}, {epochs}, {steps}")


def _before(start: Progress | None) -> tuple[float, float, int, int]:
    """Return the seconds, the sum of losses, the examples and the steps of what went before."""
    return (start.seconds, start.loss, start.seen, start.steps) if start else (0.0, 0.0, 0, 0)
