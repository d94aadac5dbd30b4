# SPDX-License-Identifier: Apache-2.0
"""Whether this board computes what it should: load, predict, learn, encode, sign; known answers.

It needs no broker, no state and no configuration. The bundle that comes along is an int8 network of
2,276 weights, made by ``models/selftest/build.py``; the answers are what every engine of
every supported machine gives, within the last bit of an int8 and the rounding of float32.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_sdk import codec
from edge_sdk.bundle import Bundle
from edge_sdk.engine import choose
from edge_sdk.errors import EngineError, FedgeError
from edge_sdk.model import open_model
from edge_sdk.signing import DeviceKey, verify
from edge_sdk.trainer import Trainer

BUNDLE = Path(__file__).with_name("selftest.fedge")
CLASSES, SIDE, ROWS, STEPS = 4, 8, 32, 20
ANSWERS = (0.095, 0.812, -0.591, 0.717)
"""The first row's logits."""
FIRST_LOSS, LAST_LOSS = 1.543, 0.345
ANSWER_WITHIN, LOSS_WITHIN = 0.06, 0.02


@dataclass(frozen=True, slots=True)
class Result:
    """One check: what it found and how long it took."""

    check: str
    ok: bool
    says: str
    seconds: float


def rows() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return examples by arithmetic alone: `[32, 1, 8, 8]` in 0..1, and their classes."""
    row, pixel = np.arange(ROWS)[:, None], np.arange(SIDE * SIDE)[None, :]
    label = row % CLASSES
    shape = ((pixel * (2 * label + 3)) % 17) / 20
    noise = ((pixel * 31 + row * 7 + pixel * row) % 5) / 33
    x = (shape + noise).astype(np.float32).reshape(ROWS, 1, SIDE, SIDE)
    return x, label[:, 0].astype(np.int64)


def run(engine: str = "auto") -> list[Result]:
    """Make every check in turn; one that fails ends the run, for the next ones stand on it."""
    test = _Test(engine)
    checks: tuple[Callable[[], str], ...] = (
        test.load,
        test.predict,
        test.train,
        test.encode,
        test.sign,
    )
    results: list[Result] = []
    for check in checks:
        began = time.monotonic()
        try:
            ok, says = True, check()
        except (FedgeError, ImportError, ValueError, OSError) as error:
            ok, says = False, " ".join(str(error).split())
        results.append(Result(check.__name__, ok, says, time.monotonic() - began))
        if not ok:
            break
    return results


class _Test:
    """What the checks hand on to each other."""

    def __init__(self, engine: str) -> None:
        self._engine = engine
        self._x, self._y = rows()
        self._bundle: Bundle
        self._delta: dict[str, NDArray[np.float32]] = {}

    def load(self) -> str:
        self._bundle = Bundle.load(BUNDLE)
        self._bundle.check()
        self._engine, _ = choose(self._bundle.manifest, self._engine)
        return f"{len(self._bundle.data)} bytes pass the checks; the engine is {self._engine}"

    def predict(self) -> str:
        model = open_model(self._bundle, self._bundle.member("params.bin"), 0, engine=self._engine)
        got = model.predict(self._x[0])
        _near("the first answer", got, ANSWERS, ANSWER_WITHIN)
        return f"{_shown(got)}, as it should"

    def train(self) -> str:
        trainer = Trainer(self._bundle, engine=self._engine)
        losses = [trainer.step(self._x, self._y) for _ in range(STEPS)]
        _near("the first loss", losses[0], FIRST_LOSS, LOSS_WITHIN)
        _near(f"the loss of step {STEPS}", losses[-1], LAST_LOSS, LOSS_WITHIN)
        self._delta = trainer.delta()
        return f"the loss went from {losses[0]:.3f} to {losses[-1]:.3f} in {STEPS} steps"

    def encode(self) -> str:
        chain = codec.preset("default")
        blob, _ = chain.encode(self._delta, chain.init(self._bundle.shapes))
        decoded = chain.decode(blob, self._bundle.shapes)
        weights = sum(tensor.size for tensor in self._delta.values())
        sent = np.concatenate([decoded[name].ravel() for name in self._delta])
        wanted = np.concatenate([tensor.ravel() for tensor in self._delta.values()])
        alike = float(sent @ wanted / (np.linalg.norm(sent) * np.linalg.norm(wanted)))
        if not alike > 0.5:
            raise EngineError(
                f"expected an update like what was learned, got a cosine of {alike:.2f}"
            )
        return f"{len(blob)} bytes for {weights} weights, cosine {alike:.2f} to what was learned"

    def sign(self) -> str:
        key = DeviceKey.from_seed(bytes(32))
        signature = key.sign(b"selftest")
        if not verify(key.public, b"selftest", signature) or verify(key.public, b"", signature):
            raise EngineError("expected a signature of this message alone; cryptography is broken")
        return f"as {key.id}"


def _near(what: str, got: Any, wanted: Any, within: float) -> None:
    if not np.allclose(got, wanted, rtol=0, atol=within):
        raise EngineError(
            f"{what}: expected {_shown(wanted)} within {within}, got {_shown(got)}; this engine "
            "computes something else on this processor: install another version of it"
        )


def _shown(values: Any) -> str:
    return " ".join(f"{value:.3f}" for value in np.ravel(values))
