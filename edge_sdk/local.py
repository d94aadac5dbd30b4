# SPDX-License-Identifier: Apache-2.0
"""What a device has in hand: the model that answers, and the labelled examples that fit it.

The app's threads predict and learn here while the agent's thread switches models. A switch is one
assignment: whoever is answering goes on with the model it began with.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edge_sdk import anomaly, files, footprint, layouts, trial
from edge_sdk.bundle import Bundle
from edge_sdk.errors import EngineError, FedgeError, RefusedError, StoreError
from edge_sdk.limits import Limits
from edge_sdk.model import Model, answers, open_model
from edge_sdk.model_file import ModelFile
from edge_sdk.params import count
from edge_sdk.samples import Layout, Samples
from edge_sdk.slots import ModelName, Refusal, Slots
from edge_sdk.store import Store
from edge_sdk.trial import OnTrial, Terms
from edge_sdk.types import Shapes

log = logging.getLogger(__name__)

PARAMS = "params.bin"
ANSWERS_KEPT = 16
_ERRORS_BATCH = 64
ROUND_FACTOR, ROUND_SLACK = 12, 1 << 14
FEW_EXAMPLES, MANY_EXAMPLES = 4, 256
"""That a model has to answer before it is used: to see that it does, and how well."""


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

    def ring_to_read(self, path: Path) -> Samples:
        """Open a ring that the disk does not let us write. Raises: StoreError."""
        return Samples.open(path)

    def newest(self, ring: Samples, most: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return the newest examples of a ring, at most so many, inputs and labels."""
        return ring.newest(most)

    def peak_kib(self) -> int:
        """Return the most memory that the process ever had, KiB."""
        return footprint.peak_kib()


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
        terms: Terms | None = None,
    ) -> None:
        self._terms = terms or Terms()
        self._trial: OnTrial | None = None
        self.when_decided: Callable[[], object] = lambda: None
        """Called, in the thread of whoever predicted, once answers have decided a trial."""
        self.runtime = runtime or Runtime()
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
        self._is_closed = False
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
    def round_bytes(self) -> int:
        """How much disk a round takes at the most, from the weights to the update."""
        bundle = self.bundle
        return ROUND_FACTOR * 4 * count(bundle.shapes) + ROUND_SLACK if bundle is not None else 0

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
        model, on_trial = self.model, self._trial
        if model is None:
            raise NoModelError(
                "no model yet: pass bundle=, or wait for the coordinator's first offer"
            )
        if on_trial is None or on_trial.is_over:
            return model.predict(x)
        try:
            answer = model.predict(x)
            on_trial.answered(np.asarray(x), answer)
        except EngineError as error:
            on_trial.failed(str(error))
            raise
        finally:
            self._decide(on_trial)
        return answer

    def _decide(self, on_trial: OnTrial) -> None:
        if on_trial.is_over:
            self.when_decided()

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
        if self._samples is None and self.bundle is not None and not self._is_closed:
            self._open_samples(layouts.layout(self.bundle.manifest))  # the disk may have room again
        with self._learning:
            if (bundle := self.bundle) is None or self._samples is None:
                raise NoModelError("no model yet to learn for: pass bundle=, or wait for an offer")
            x, y = layouts.checked(bundle.manifest, xs, labels)
            if len(x):
                self._samples.extend(x, y)

    def switch(self, bundle: bytes, weights: bytes, version: int) -> Model:
        """Make `predict` answer with these weights, which are on disk, on trial at first.

        Raises: BundleError, EngineError or StoreError: the model in use stays in use.
        """
        name, before = ModelName(bundle.hex(), weights.hex(), version), self.slots
        if reason := before.refusal(name):
            raise EngineError(f"it did not work here before: {reason}")
        found = self._bundle(name.bundle)
        data = self._store.weights(name.weights)
        if found is None or data is None:
            raise StoreError("expected bundle and weights on disk, they are damaged; fetch again")
        self._keep(before.tried(name))  # before it is opened: that may end the process
        try:
            return self._use(found, data, version)
        except (StoreError, RefusedError):  # not the weights' fault
            self._note(before)
            raise
        except (FedgeError, ModuleNotFoundError) as error:
            self._note(before.refuse(name, str(error)))
            raise

    def look(self, now_s: float) -> Refusal | None:
        """See how the trial stands: end it if it can be; return what was gone back from.

        Raises: EngineError when the model to go back to does not open.
        """
        on_trial, name, good = self._trial, self.slots.trial, self.slots.good
        if on_trial is None or name is None or good is None:
            return None
        if on_trial.is_proven(now_s):
            self._trial = None
            self._note(self.slots.proven())
            log.info("model proved itself version=%d", name.version)
        if not on_trial.fault:
            return None
        self._trial = None
        self._note(self.slots.refuse(name, on_trial.fault))
        log.warning("model gone back from version=%d reason=%s", name.version, on_trial.fault)
        if not self._resume(good):
            raise EngineError(f"version {good.version} no longer opens; waiting for another")
        return Refusal(name, on_trial.fault)

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

    def check_offered(self, digest: str, size: int) -> None:
        """Pass a bundle of `size` bytes that is offered, before a byte of it comes.

        Raises: RefusedError when it is too large, or was refused before.
        """
        most = self._limits.max_bundle_bytes
        if size > most:
            reason = f"needs {size} bytes of bundle, this device allows max_bundle_bytes={most}"
            log.warning("bundle refused digest=%s reason=%s", digest[:12], reason)
            self._answers[digest] = reason
        self.check_known(digest)

    def check_known(self, digest: str) -> None:
        """Raise the RefusedError of a bundle that was refused before, without having it."""
        if reason := self._answers.get(digest):
            self.refused = {"bundle": digest, "reason": reason}
            raise RefusedError(reason)

    def _judged(self, bundle: Bundle) -> str:
        try:
            self.runtime.check(bundle, self._limits)
        except RefusedError as error:
            log.warning("bundle refused digest=%s reason=%s", bundle.digest[:12], error)
            return str(error)
        return ""

    def close(self) -> None:
        """Let go of the examples; predictions still work."""
        if self._trial is not None:  # the process did not end for the model's sake
            slots = self.slots.ended()
            self._note(slots.proven() if self._trial.is_proven(None) else slots)
        with self._learning:
            self._is_closed = True
            if self._samples is not None:
                self._samples.close()
                self._samples = None

    def _start(self, given: Bundle | None) -> None:
        """Go on with the model of last time; without one, with the given bundle as it came."""
        self.slots = self._store.slots()
        if (name := self.slots.trial) is not None:
            self._note(self._begun(self.slots.started(), name))
        for name in self.slots.candidates:
            if self._resume(name):
                self._note(self.slots.settled(name))
                return
        for name in self.slots.candidates:  # a bundle's own weights are better than no answers
            if self._store.weights(name.weights) is None and self._fall_back(
                self._store.bundle(name.bundle)
            ):
                return
        for bundle in (given, self._store.any_bundle()):
            if self._fall_back(bundle):
                return

    def _begun(self, slots: Slots, name: ModelName) -> Slots:
        """Go back from a model that processes died with."""
        if slots.starts < self._terms.starts:
            return slots
        reason = f"{slots.starts} processes died with it"
        log.warning("model gone back from version=%d reason=%s", name.version, reason)
        return slots.refuse(name, reason)

    def _fall_back(self, bundle: Bundle | None) -> bool:
        """Use a bundle as it came, if it may run and has not failed here."""
        if (bundle := self._passed(bundle)) is None:
            return False
        initial = bundle.member(PARAMS)
        name = ModelName(bundle.digest, hashlib.sha256(initial).hexdigest(), 0)
        if self.slots.refusal(name):
            return False
        self._store.put_bundle(bundle)
        self._store.put_weights(initial)
        self._keep(self.slots.settled(name))
        self._use(bundle, initial, 0)
        return True

    def _passed(self, bundle: Bundle | None) -> Bundle | None:
        try:
            if bundle is not None:
                self.check(bundle)
        except RefusedError:
            return None
        return bundle

    def _resume(self, name: ModelName) -> bool:
        bundle, data = self._store.bundle(name.bundle), self._store.weights(name.weights)
        if bundle is None or data is None:
            log.warning("model is lost version=%d", name.version)
            return False
        try:
            self._use(bundle, data, name.version)
        except (FedgeError, ModuleNotFoundError) as error:
            log.warning("model does not open version=%d reason=%s", name.version, error)
            return False
        return True

    def _bundle(self, digest: str) -> Bundle | None:
        if self.bundle is not None and self.bundle.digest == digest:
            return self.bundle
        return self._store.bundle(digest)

    def _use(self, bundle: Bundle, weights: bytes, version: int) -> Model:
        self.check(bundle)
        layout = layouts.layout(bundle.manifest)
        engine, threads = self._engine, self._threads
        model = self.runtime.open(bundle, weights, version, engine=engine, threads=threads)
        try:
            self._open_samples(layout)
        except StoreError as error:
            if self.model is not None:
                raise  # the one in use has its examples
            log.warning("examples cannot be kept, the model answers reason=%s", error)
        name = ModelName(bundle.digest, model.weights, version)
        is_on_trial = name.is_same(self.slots.trial)
        if is_on_trial:
            self._try_on(model, bundle)
        if self._file is not None:
            self._file.put(bundle, weights)
        self._trial = OnTrial(self._terms) if is_on_trial else None
        self.bundle, self.model, self.refused = bundle, model, None
        self.arrived.set()
        return model

    def _try_on(self, model: Model, bundle: Bundle) -> None:
        """Let a model answer stored examples. Raises: EngineError when it does not do well."""
        margin, old = self._terms.margin, self.model
        with self._learning:
            ring = self._samples
            most = FEW_EXAMPLES if margin is None else MANY_EXAMPLES
            x, y = self.runtime.newest(ring, most) if ring is not None else (np.empty(0),) * 2
        if not len(x):
            return
        new = answers(model, x)
        if new.dtype.kind == "f" and not np.isfinite(new).all():
            raise EngineError("expected finite answers to stored examples, got NaN or infinity")
        if margin is None or old is None or old.bundle != model.bundle:
            return
        loss, output = bundle.manifest["loss"], bundle.manifest["output"]
        found, known = (trial.error(loss, a, y, output) for a in (new, answers(old, x)))
        if found is None or known is None or not trial.is_worse(loss, found, known, margin):
            return
        raise EngineError(
            f"expected an error on stored examples of at most {margin:g} above the {known:.4g} of "
            f"the version before, got {found:.4g}"
        )

    def _keep(self, slots: Slots) -> None:
        """Remember what is known of the models. Raises: StoreError."""
        if slots != self.slots:
            self._store.set_slots(slots)
            self.slots = slots

    def _note(self, slots: Slots) -> None:
        """Do so where a disk that refuses must not stand in the way."""
        try:
            self._keep(slots)
        except StoreError as error:
            log.warning("what is known of models is not kept reason=%s", error)
            self.slots = slots

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
        capacity = self._capacity_of(layout)
        try:
            found = self.runtime.ring(path, capacity, layout)
        except (StoreError, ValueError, OSError) as error:
            if files.is_refusal(error):
                return self.runtime.ring_to_read(path)
            log.warning("examples damaged, set aside file=%s reason=%s", path.name, error)
            self._store.disk.rename(path, path.with_name(path.name + ".damaged"))
            found = self.runtime.ring(path, capacity, layout)
        self._store.quota.speak_for(path, capacity * found.layout.record_bytes)
        return found

    def _capacity_of(self, layout: dict[str, Any]) -> int:
        """Return how many examples to keep: as many as asked for, in half of what is allowed."""
        if (most := self._store.quota.most) is None:
            return self._capacity
        fit = max(1, most // 2 // Layout(**layout, capacity=1).record_bytes)
        if fit < self._capacity:
            log.warning("examples kept are %d, max_disk_bytes has no room for more", fit)
        return min(fit, self._capacity)
