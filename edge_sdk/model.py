# SPDX-License-Identifier: Apache-2.0
"""A model that answers on this device: a bundle's inference graph with given weights written in.

Opening one proves it before anybody relies on it: the weights fit the bundle and are finite, the
engine loads the requantized graph, and an answer to a batch of zeros is finite.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edge_sdk import footprint
from edge_sdk.bundle import Bundle
from edge_sdk.engine import Predictor, open_engine
from edge_sdk.errors import BundleError, EngineError
from edge_sdk.params import unflatten
from edge_sdk.requantize import requantize
from edge_sdk.trainer import Feed


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Model:
    """What `when_updated` is told about: a loaded model and which version it is."""

    version: int
    """The version of the global model; 0 is what the bundle came with."""
    bundle: str
    """The bundle's digest, hex."""
    weights: str
    """sha256 of the weights, hex."""
    _predictor: Predictor
    _feed: Feed
    _shape: tuple[int | None, ...]

    def predict(self, x: ArrayLike) -> NDArray[Any]:
        """Answer for one example, or for a batch when `x` has one axis more.

        Returns: the forward model's output, raw int8 for an int8 output, `[...]` or `[n, ...]`.
        Raises: ValueError on another shape; EngineError.
        """
        xs, is_one = batched(x, self._shape)
        batch = self._feed.forward(xs)
        if self._shape[0] is None or self._shape[0] == len(batch):
            answers = self._predictor.run(batch)
        else:  # a graph made for one example at a time
            answers = np.concatenate([self._predictor.run(row[np.newaxis]) for row in batch])
        return answers[0] if is_one else answers

    def __repr__(self) -> str:
        return f"<Model version {self.version} of bundle {self.bundle[:12]}>"


def open_model(
    bundle: Bundle,
    weights: bytes,
    version: int,
    *,
    engine: str = "auto",
    threads: int = 1,
) -> Model:
    """Load the inference model with these weights (flat little-endian float32) and try it.

    Raises: BundleError when they do not fit or are not finite; EngineError when it does not run.
    """
    try:
        params = unflatten(np.frombuffer(weights, "<f4").astype(np.float32), bundle.shapes)
    except ValueError as error:
        raise BundleError(f"the weights are not of this bundle: {error}") from error
    opened = open_engine(bundle, engine, threads)
    footprint.hand_back()  # importing the runtime cost what running it does not
    predictor = opened.predictor(requantize(bundle, params, opened.format))
    shape = tuple(bundle.manifest["input"]["shape"])
    digest = hashlib.sha256(weights).hexdigest()
    model = Model(version, bundle.digest, digest, predictor, Feed(bundle.manifest), shape)
    _try(model)
    footprint.hand_back()
    return model


def answers(model: Model, x: NDArray[Any], rows: int = 64) -> NDArray[Any]:
    """Return a model's answers to a batch of any size, a few `rows` at a time. As `predict`."""
    return np.concatenate([model.predict(x[at : at + rows]) for at in range(0, len(x), rows)])


def batched(x: ArrayLike, shape: tuple[int | None, ...]) -> tuple[NDArray[Any], bool]:
    """Return `x` as a batch, and whether it was a single example.

    `shape` is the model's input shape, batch first. A flat example is taken as well, where the
    shape says how long it is: a CSV row or a JSON list.
    Raises: ValueError when `x` is neither an example nor a batch.
    """
    xs, one = np.asarray(x), shape[1:]
    sizes = [size for size in one if size is not None]
    length = math.prod(sizes) if len(sizes) == len(one) else -1
    if xs.ndim == len(one) and _fits(xs.shape, one):
        return xs[np.newaxis], True
    if xs.ndim == len(shape) and _fits(xs.shape[1:], one):
        return xs, False
    if xs.ndim == 1 and xs.size == length:
        return xs.reshape(1, *sizes), True
    if xs.ndim == 2 and xs.shape[1] == length:
        return xs.reshape(len(xs), *sizes), False
    wanted = ["any" if size is None else size for size in one]
    raise ValueError(f"expected an example of shape {wanted} or a batch, got {list(xs.shape)}")


def _fits(found: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    return all(want in {None, have} for want, have in zip(wanted, found, strict=True))


def _try(model: Model) -> None:
    zeros = np.zeros([1, *(size or 1 for size in model._shape[1:])], np.float32)  # noqa: SLF001 - same module
    answer = model.predict(zeros)
    if not np.isfinite(answer).all():
        raise EngineError("expected finite answers to a batch of zeros, got NaN or infinity")
