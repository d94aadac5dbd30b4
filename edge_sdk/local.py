# SPDX-License-Identifier: Apache-2.0
"""What a device has in hand: the model that answers, and the labelled examples that fit it.

The app's threads predict and learn here while the agent's thread switches models. A switch is one
assignment: whoever is answering goes on with the model it began with.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edge_sdk import anomaly
from edge_sdk.bundle import Bundle
from edge_sdk.errors import BundleError, EngineError, FedgeError, RefusedError, StoreError
from edge_sdk.limits import Limits
from edge_sdk.model import Model, batched, open_model
from edge_sdk.model_file import ModelFile
from edge_sdk.samples import Samples
from edge_sdk.store import ModelName, Store
from edge_sdk.trainer import Feed
from edge_sdk.types import Shapes

log = logging.getLogger(__name__)

PARAMS = "params.bin"
ANSWERS_KEPT = 16
_ERRORS_BATCH = 64


class NoModelError(EngineError):
    """There is no model on this device yet: give one, or wait for the coordinator's first offer."""


class Runtime:
    """What runs models and keeps examples, as a port: a simulation has its own."""

    def check(self, bundle: Bundle, limits: Limits) -> None:
        """Pass a bundle that may run here. Raises: RefusedError, one line."""
        bundle.check(limits)

    def open(
        self, bundle: Bundle, weights: bytes, version: int, *, engine: str, threads: int
    ) -> Model:
        """Load and try a model. Raises: BundleError or EngineError."""
        return open_model(bundle, weights, version, engine=engine, threads=threads)

    def ring(self, path: Path, capacity: int, layout: dict[str, Any]) -> Samples:
        """Open or make the ring of examples. Raises: StoreError, ValueError or OSError."""
        return Samples(path, **layout, capacity=capacity)


class Local:
    """The model in use and its examples.

    A bundle that fails the device's checks is never run: it is as if there were none, and
    `refused` says why.

    Raises: StoreError, EngineError or ModuleNotFoundError when the given bundle cannot run here.
    """

    def __init__(
        self,
        store: Store,
        given: Bundle | None,
        *,
        engine: str = "auto",
        threads: int = 1,
        capacity: int = 2000,
        limits: Limits | None = None,
        quantile: float | None = None,
        model_file: ModelFile | None = None,
        runtime: Runtime | None = None,
    ) -> None:
        self._runtime = runtime or Runtime()
        self._file = model_file
        self._quantile = quantile
        self._threshold: tuple[tuple[str, int], float] | None = None
        self.model: Model | None = None
        self.bundle: Bundle | None = None
        self.refused: dict[str, str] | None = None
        """The last bundle that was refused, by digest, and the reason; None once another runs."""
        self._limits, self._answers = limits or Limits(), dict[str, str]()
        self._store, self._engine, self._threads = store, engine, threads
        self._capacity = capacity
        self._samples: Samples | None = None
        self._learning = threading.Lock()
        self.arrived = threading.Event()
        self._start(given)

    @property
    def examples(self) -> int:
        """How many labelled examples are stored."""
        samples = self._samples
        return len(samples) if samples is not None else 0

    @property
    def examples_ever(self) -> int:
        """How many were ever stored: the oldest make room for new ones."""
        samples = self._samples
        return samples.total if samples is not None else 0

    @property
    def samples_bytes(self) -> int:
        """How much room the examples take."""
        samples = self._samples
        return len(samples) * samples.layout.record_bytes if samples is not None else 0

    @property
    def samples_path(self) -> Path:
        """Where the examples are."""
        if self._samples is None:
            raise NoModelError("no examples yet: there is no model that says what one looks like")
        return self._samples.path

    def predict(self, x: ArrayLike) -> NDArray[Any]:
        """Answer with the model in use, for one example or a batch.

        Raises: NoModelError before the first model; ValueError on another shape; EngineError.
        """
        if (model := self.model) is None:
            raise NoModelError(
                "no model yet: pass bundle=, or wait for the coordinator's first offer"
            )
        return model.predict(x)

    @property
    def threshold(self) -> float | None:
        """The error that the `quantile` asked for of the stored examples stays within.

        None where none was asked for, or nothing can be said yet. Reckoned anew when the model or
        the examples are others than last time.
        """
        model, count = self.model, self.examples_ever
        if self._quantile is None or model is None or not count:
            return None
        now = model.weights, count
        if self._threshold is None or self._threshold[0] != now:
            try:
                self._threshold = now, self.error_quantile(self._quantile)
            except (FedgeError, ValueError) as error:
                log.warning("no error threshold reason=%s", error)
                return None
        return self._threshold[1]

    def error_quantile(self, level: float) -> float:
        """Return the mean squared error that a share `level` of the stored examples stays within.

        Raises: NoModelError; ValueError without examples, or for a model that is not trained to
        come near its targets (loss mse); EngineError.
        """
        with self._learning:
            model, bundle, samples = self.model, self.bundle, self._samples
            if model is None or bundle is None or samples is None:
                raise NoModelError(
                    "no model yet to have errors: pass bundle=, or wait for an offer"
                )
            x, y = samples.arrays()
        if (loss := bundle.manifest["loss"]) != "mse":
            raise ValueError(f"expected a bundle of loss mse for error quantiles, got {loss}")
        batches = [slice(at, at + _ERRORS_BATCH) for at in range(0, len(x), _ERRORS_BATCH)]
        output = bundle.manifest["output"]
        found = [anomaly.errors(model.predict(x[b]), y[b], output) for b in batches]
        return anomaly.quantile(np.concatenate([*found, np.empty(0)]), level)

    def learn(self, xs: ArrayLike, labels: ArrayLike) -> None:
        """Store labelled examples, `xs` one example or a batch. They never leave this device.

        Raises: NoModelError; ValueError on another shape, class or NaN; StoreError on a full disk.
        """
        with self._learning:
            if (bundle := self.bundle) is None or self._samples is None:
                raise NoModelError("no model yet to learn for: pass bundle=, or wait for an offer")
            x, y = _checked(bundle.manifest, xs, labels)
            if len(x):
                self._samples.extend(x, y)

    def switch(self, bundle: bytes, weights: bytes, version: int) -> Model:
        """Make `predict` answer with these weights, which are on disk; the old ones go.

        Raises: BundleError, EngineError or StoreError: the model in use stays in use.
        """
        found = self._bundle(bundle.hex())
        data = self._store.weights(weights.hex())
        if found is None or data is None:
            raise StoreError("expected bundle and weights on disk, they are damaged; fetch again")
        return self._use(found, data, version)

    def has_weights(self, digest: bytes, bundle: str) -> bool:
        """Say whether weights are on disk, or are those that the bundle `bundle` came with."""
        if self._store.weights(digest.hex()) is not None:
            return True
        if (found := self._bundle(bundle)) is None:
            return False
        initial = found.member(PARAMS)
        is_initial = hashlib.sha256(initial).digest() == digest
        if is_initial:
            self._store.put_weights(initial)
        return is_initial

    def base(self, bundle: str) -> tuple[int, bytes, Shapes] | None:
        """Return the version of a bundle that is nearest at hand, its weights and their shapes.

        That of the model in use, else the one that the bundle came with; None without the bundle.
        """
        if (found := self._bundle(bundle)) is None:
            return None
        model = self.model
        data = self._store.weights(model.weights) if model and model.bundle == bundle else None
        if model is None or data is None:
            return 0, found.member(PARAMS), found.shapes
        return model.version, data, found.shapes

    def check(self, bundle: Bundle) -> None:
        """Pass a bundle whose graphs may run here; the answer is remembered.

        Raises: RefusedError, one line, when they may not.
        """
        if bundle.digest not in self._answers:
            for old in list(self._answers)[: 1 - ANSWERS_KEPT]:
                del self._answers[old]
            self._answers[bundle.digest] = self._judged(bundle)
        self.check_known(bundle.digest)

    def check_known(self, digest: str) -> None:
        """Raise the RefusedError of a bundle that was refused before, without having it."""
        if reason := self._answers.get(digest):
            self.refused = {"bundle": digest, "reason": reason}
            raise RefusedError(reason)

    def _judged(self, bundle: Bundle) -> str:
        try:
            self._runtime.check(bundle, self._limits)
        except RefusedError as error:
            log.warning("bundle refused digest=%s reason=%s", bundle.digest[:12], error)
            return str(error)
        return ""

    def close(self) -> None:
        """Let go of the examples; predictions still work."""
        with self._learning:
            if self._samples is not None:
                self._samples.close()
                self._samples = None

    def _start(self, given: Bundle | None) -> None:
        """Go on with the last good model; without one, with the given bundle as it came."""
        name = self._store.model()
        if name is not None and self._resume(name):
            return
        bundle = self._passed(given) or self._passed(self._store.any_bundle())
        if bundle is not None:
            self._store.put_bundle(bundle)
            initial = bundle.member(PARAMS)
            self._store.put_weights(initial)
            self._use(bundle, initial, 0)

    def _passed(self, bundle: Bundle | None) -> Bundle | None:
        try:
            if bundle is not None:
                self.check(bundle)
        except RefusedError:
            return None
        return bundle

    def _resume(self, name: ModelName) -> bool:
        bundle = self._store.bundle(name.bundle)
        if bundle is None:
            return False
        data, version = self._store.weights(name.weights), name.version
        if data is None:  # the bundle's own are better than no answers
            data, version = bundle.member(PARAMS), 0
            self._store.put_weights(data)
        try:
            self._use(bundle, data, version)
        except FedgeError as error:
            log.warning("last model does not open version=%d reason=%s", version, error)
            return False
        return True

    def _bundle(self, digest: str) -> Bundle | None:
        if self.bundle is not None and self.bundle.digest == digest:
            return self.bundle
        return self._store.bundle(digest)

    def _use(self, bundle: Bundle, weights: bytes, version: int) -> Model:
        self.check(bundle)
        layout = _layout(bundle.manifest)
        engine, threads = self._engine, self._threads
        model = self._runtime.open(bundle, weights, version, engine=engine, threads=threads)
        self._open_samples(layout)
        if self._file is not None:
            self._file.put(bundle, weights)
        self._store.set_model(ModelName(bundle.digest, model.weights, version))
        self.bundle, self.model, self.refused = bundle, model, None
        self.arrived.set()
        return model

    def _open_samples(self, layout: dict[str, Any]) -> None:
        tag = hashlib.sha256(repr(layout).encode()).hexdigest()[:12]
        path = self._store.samples / f"{tag}.ring"
        with self._learning:
            if self._samples is not None and self._samples.path == path:
                return
            opened = self._opened(path, layout)
            if self._samples is not None:
                self._samples.close()
            self._samples = opened

    def _opened(self, path: Path, layout: dict[str, Any]) -> Samples:
        try:
            return self._runtime.ring(path, self._capacity, layout)
        except (StoreError, ValueError, OSError) as error:
            log.warning("examples damaged, set aside file=%s reason=%s", path.name, error)
            self._store.disk.rename(path, path.with_name(path.name + ".damaged"))
            return self._runtime.ring(path, self._capacity, layout)


def _layout(manifest: dict[str, Any]) -> dict[str, Any]:
    x, y = manifest["input"]["shape"][1:], manifest["target"]["shape"][1:]
    if None in x or None in y:
        raise BundleError(
            f"expected examples of one fixed shape, the bundle says {x} and {y}; fix the model's "
            "input shape, all but the batch"
        )
    dtype = Feed(manifest).dtype.name
    return {
        "x_shape": tuple(x),
        "x_dtype": dtype,
        "y_shape": tuple(y),
        "y_dtype": manifest["target"]["dtype"],
    }


def _checked(
    manifest: dict[str, Any], xs: ArrayLike, labels: ArrayLike
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Examples and labels as the training graph takes them, `[n, ...]` both."""
    x, is_one = batched(xs, tuple(manifest["input"]["shape"]))
    y = np.asarray(labels)
    y = y[np.newaxis] if is_one and y.ndim < len(manifest["target"]["shape"]) else y
    if len(x) == 0 == len(y):
        return x, y
    wanted = manifest["target"]
    if wanted["dtype"].startswith("int") and y.dtype.kind == "f" and np.array_equal(y, np.rint(y)):
        y = y.astype(np.int64)  # 3.0, as a CSV file has it
    if y.size == len(x) and y.ndim != len(wanted["shape"]):
        y = y.reshape(len(x), *(1 for _ in wanted["shape"][1:]))
    feed = Feed(manifest)
    x, y = feed.examples(x, y)
    inputs = feed.inputs(x)
    for name, values in (("x", inputs), ("label", y)):
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise ValueError(f"expected finite numbers in {name}, got NaN or infinity")
    return inputs, y
