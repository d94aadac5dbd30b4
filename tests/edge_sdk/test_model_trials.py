# SPDX-License-Identifier: Apache-2.0
"""A new version is on trial; one that fails is gone back from, over crashes, for good."""

from __future__ import annotations

import contextlib
import hashlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from device_scene import Clock, Scene
from hand_bundles import examples, mlp
from hypothesis import given
from hypothesis import strategies as st
from scripted_coordinator import weights_of

from edge_sdk import files, trial
from edge_sdk.bundle import Bundle
from edge_sdk.errors import ConfigError, EngineError, StoreError
from edge_sdk.local import Local, Runtime
from edge_sdk.model import Model
from edge_sdk.slots import REFUSED_KEPT, ModelName, Slots
from edge_sdk.store import Store
from edge_sdk.trial import FAULTS, OnTrial, Terms

BUNDLE = mlp()
X, Y = examples(40)
DIGEST = bytes.fromhex(BUNDLE.digest)


class Broken:
    """A predictor that works until it is told not to."""

    def __init__(self, real: Any) -> None:
        self.real, self.fate = real, "works"

    def run(self, x: Any) -> Any:
        if self.fate == "fails":
            raise EngineError("the runtime failed")
        answer = self.real.run(x)
        return answer * np.nan if self.fate == "nan" else answer


class Breaking(Runtime):
    """Opens models whose predictors a test can break, by version."""

    def __init__(self) -> None:
        self.made: dict[int, Broken] = {}

    def open(
        self, bundle: Bundle, weights: bytes, version: int, *, engine: str, threads: int
    ) -> Model:
        model = super().open(bundle, weights, version, engine=engine, threads=threads)
        self.made[version] = Broken(model._predictor)
        object.__setattr__(model, "_predictor", self.made[version])
        return model


@contextlib.contextmanager
def opened(folder: Path, **options: Any) -> Iterator[Local]:
    """A device's model in a life that ends as it should."""
    store = Store(folder)
    local = Local(store, BUNDLE, **options)
    try:
        yield local
    finally:
        local.close()
        store.close()


@contextlib.contextmanager
def killed(folder: Path, **options: Any) -> Iterator[Local]:
    """A life that ends as SIGKILL ends it: nothing more is written."""
    store = Store(folder)
    local = Local(store, BUNDLE, **options)
    try:
        yield local
    finally:
        store.close()


def take(local: Local, version: int, weights: bytes | None = None) -> Model:
    data = weights_of(BUNDLE, 0.01 * version) if weights is None else weights
    digest = local._store.put_weights(data)
    return local.switch(DIGEST, bytes.fromhex(digest), version)


def settled(local: Local) -> None:
    """Let a trial end well."""
    local.look(0.0)
    local.look(Terms().seconds)


def test_a_version_proves_itself_by_answers_or_by_time(tmp_path: Path) -> None:
    with opened(tmp_path) as local:
        assert local.slots.trial is None  # the first: there is nothing to go back to
        take(local, 1)
        assert (local.slots.trial is not None, local.model and local.model.version) == (True, 1)
        for _ in range(Terms().answers):
            local.predict(X[0])
        local.look(0.0)
        assert local.slots.good is not None
        assert (local.slots.good.version, local.slots.trial) == (1, None)
        take(local, 2)
        local.look(10.0)
        local.look(10.0 + Terms().seconds - 1)
        assert local.slots.trial is not None
        local.look(10.0 + Terms().seconds)
        assert local.slots.before is not None
        assert (local.slots.good.version, local.slots.before.version) == (2, 1)
    with opened(tmp_path) as local:
        assert local.model is not None
        assert local.model.version == 2


def test_a_version_that_processes_die_with_is_gone_back_from_and_not_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(tmp_path) as local:
        take(local, 1)
        settled(local)
        before = local.predict(X)
    with killed(tmp_path) as local:
        take(local, 2)
    for _ in range(Terms().starts - 1):
        with killed(tmp_path) as local:
            assert local.model is not None
            assert local.model.version == 2
    with killed(tmp_path) as local:
        assert local.model is not None
        assert local.model.version == 1
        np.testing.assert_array_equal(local.predict(X), before)
        assert "gone back from version=2" in caplog.text
        with pytest.raises(EngineError, match="did not work here before: 3 processes died"):
            take(local, 2)
        take(local, 3)
    with opened(tmp_path) as local:
        assert local.model is not None
        assert local.model.version == 3


class Fatal(Runtime):
    """Ends the process as it opens a version."""

    def open(
        self, bundle: Bundle, weights: bytes, version: int, *, engine: str, threads: int
    ) -> Model:
        if version == 1:
            raise KeyboardInterrupt
        return super().open(bundle, weights, version, engine=engine, threads=threads)


def test_a_version_that_processes_die_with_as_they_open_it_is_gone_back_from(
    tmp_path: Path,
) -> None:
    with pytest.raises(KeyboardInterrupt), killed(tmp_path, runtime=Fatal()) as local:
        take(local, 1)
    for _ in range(Terms().starts - 1):
        store = Store(tmp_path)
        with pytest.raises(KeyboardInterrupt):
            Local(store, BUNDLE, runtime=Fatal())
        store.close()
    with opened(tmp_path, runtime=Fatal()) as local:
        assert local.model is not None
        assert local.model.version == 0
        assert [r.model.version for r in local.slots.refused] == [1]


def test_processes_that_end_as_they_should_do_not_count(tmp_path: Path) -> None:
    with opened(tmp_path) as local:
        take(local, 1)
    for _ in range(2 * Terms().starts):
        with opened(tmp_path) as local:
            assert local.model is not None
            assert local.model.version == 1
    with opened(tmp_path) as local:
        for _ in range(Terms().answers):
            local.predict(X)
    with killed(tmp_path) as local:
        assert local.slots.trial is None  # its answers have proved it, as it was closed
        assert local.slots.good is not None
        assert local.slots.good.version == 1


@pytest.mark.parametrize("fate", ["fails", "nan"])
def test_answers_that_fail_or_are_not_finite_end_the_trial_at_once(
    tmp_path: Path, fate: str
) -> None:
    runtime, told = Breaking(), []
    with opened(tmp_path, runtime=runtime) as local:
        local.when_decided = lambda: told.append(1)
        before = local.predict(X)
        take(local, 1)
        runtime.made[1].fate = fate
        for _ in range(FAULTS):
            with contextlib.suppress(EngineError):
                assert np.isnan(local.predict(X)).all()
        assert told == [1]
        refusal = local.look(0.0)
        assert refusal is not None
        assert refusal.model.version == 1
        assert local.model is not None
        assert local.model.version == 0
        np.testing.assert_array_equal(local.predict(X), before)
        assert local.look(0.0) is None


def test_an_input_that_is_not_finite_is_not_the_models_fault(tmp_path: Path) -> None:
    with opened(tmp_path) as local:
        take(local, 1)
        for _ in range(2 * FAULTS):
            local.predict(X * np.nan)
        assert local.look(0.0) is None
        assert local.model is not None
        assert local.model.version == 1


def test_a_version_that_does_not_open_is_refused_and_the_one_in_use_stays(tmp_path: Path) -> None:
    with opened(tmp_path) as local:
        take(local, 1)
        with pytest.raises(EngineError, match="finite answers"):
            take(local, 2, np.full(len(weights_of(BUNDLE)) // 4, 3e38, "<f4").tobytes())
        assert local.model is not None
        assert local.model.version == 1
        assert local.slots.trial is not None
        assert local.slots.trial.version == 1
        assert [r.model.version for r in local.slots.refused] == [2]


def test_stored_examples_are_tried_too(tmp_path: Path) -> None:
    with opened(tmp_path) as local:
        local.learn(np.full((3, 6), 3e4, np.float32), [0, 1, 2])
        with pytest.raises(EngineError, match="finite answers to stored examples"):
            take(local, 1, (np.frombuffer(weights_of(BUNDLE), "<f4") * 1e18).tobytes())
        assert local.model is not None
        assert local.model.version == 0


def taught(local: Local) -> bytes:
    """Store examples that the model in use gets right, and return weights that get them wrong."""
    right = local.predict(X).argmax(1)
    local.learn(X, right)
    wrong = {k: v.copy() for k, v in BUNDLE.params().items()}
    wrong["w2"] *= -1
    wrong["b2"] *= -1
    from edge_sdk.params import flatten

    return flatten(wrong, BUNDLE.shapes).astype("<f4").tobytes()


def test_a_version_that_is_worse_for_this_device_is_taken_unless_a_margin_is_set(
    tmp_path: Path,
) -> None:
    with opened(tmp_path / "a") as local:
        take(local, 1, taught(local))
        assert local.model is not None
        assert local.model.version == 1
    with opened(tmp_path / "b", terms=Terms(margin=0.1)) as local:
        worse = taught(local)
        with pytest.raises(EngineError, match=r"at most 0\.1 above the 0 of the version before"):
            take(local, 1, worse)
        take(local, 2)  # much the same as before
    with opened(tmp_path / "c", terms=Terms(margin=0.1)) as local:
        local.learn(X[:20], local.predict(X[:20]).argmax(1))  # too few to say
        take(local, 1, taught_less(local))


def taught_less(local: Local) -> bytes:
    return (-np.frombuffer(weights_of(BUNDLE), "<f4")).tobytes()


def test_a_full_disk_puts_nothing_on_trial_and_a_known_model_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with opened(tmp_path) as local:
        digest = local._store.put_weights(weights_of(BUNDLE, 0.5))
        with monkeypatch.context() as patch:
            patch.setattr(files, "write_all", full)
            with pytest.raises(StoreError):
                local.switch(DIGEST, bytes.fromhex(digest), 1)
        assert local.model is not None
        assert local.model.version == 0
        assert local.slots.refused == ()
        take(local, 1, weights_of(BUNDLE, 0.5))
        monkeypatch.setattr(files, "write_all", full)
        settled(local)
        assert local.slots.trial is None
    monkeypatch.undo()
    with opened(tmp_path) as local:  # the disk has not heard: it is on trial once more
        assert local.model is not None
        assert local.model.version == 1


@pytest.mark.parametrize("lost", ["trial", "good", "both"])
def test_lost_weights_cost_no_more_than_that_model(tmp_path: Path, lost: str) -> None:
    with opened(tmp_path) as local:
        take(local, 1)
        settled(local)
        take(local, 2)
        settled(local)
        take(local, 3)
        slots = local.slots
    for name in ("trial", "good"):
        if lost in {name, "both"}:
            model = getattr(slots, name)
            (tmp_path / "weights" / f"{model.weights}.bin").write_bytes(b"damaged")
    expected = {"trial": 2, "good": 3, "both": 1}[lost]
    for _ in range(Terms().starts + 1):
        with opened(tmp_path) as local:
            assert local.model is not None
            assert local.model.version == expected
            assert local.slots.refused == ()
            assert local.slots.current is not None
            assert local.slots.current.version == expected


def test_a_device_goes_back_tells_and_sits_that_version_out(tmp_path: Path) -> None:
    scene, runtime = Scene(tmp_path, BUNDLE), Breaking()
    coordinator = scene.coordinator
    with scene.device(clock=Clock(100.0)) as device:
        device._local.runtime = runtime
        device.learn_many(X, Y)
        seen: list[int] = []
        device.when_updated = lambda model: seen.append(model.version)
        coordinator.publish_model(1, weights_of(BUNDLE, 0.25))
        scene.until(lambda: device.version == 1)
        scene.until(scene.is_ready)
        runtime.made[1].fate = "nan"
        for _ in range(FAULTS):
            device.predict(X)
        scene.until(lambda: device.version == 0)
        scene.until(lambda: not scene.is_ready())
        status = device.status()
        assert [r["version"] for r in status["models_refused"]] == [1]
        assert "not finite" in status["models_refused"][0]["reason"]
        assert seen == [1, 0]
        coordinator.publish_model(2, weights_of(BUNDLE, 0.125))
        scene.until(lambda: device.version == 2)
        scene.until(scene.is_ready)
    with scene.device() as device:
        coordinator.publish_model(1, weights_of(BUNDLE, 0.25))
        scene.until(lambda: device.online)
        assert device._agent._session.refused == (
            hashlib.sha256(weights_of(BUNDLE, 0.25)).digest(),
        )
        assert device.version == 2


APP = """
import os, signal, sys
from hand_bundles import examples, mlp
from edge_sdk.local import Local
from edge_sdk.model import Model
from edge_sdk.store import Store
real = Model.predict
def predict(model, x):
    if model.version == 1:
        os.kill(os.getpid(), signal.SIGSEGV)  # as a runtime with a bug in a kernel does
    return real(model, x)
Model.predict = predict
bundle = mlp()
local = Local(Store(sys.argv[1]), bundle)
if sys.argv[2:]:
    local.switch(bytes.fromhex(bundle.digest), bytes.fromhex(sys.argv[2]), 1)
local.predict(examples(1)[0])
print(local.model.version)
"""


def test_a_model_that_takes_the_process_with_it_is_gone_back_from_by_the_fourth_start(
    tmp_path: Path,
) -> None:
    with opened(tmp_path / "state") as local:
        digest = local._store.put_weights(weights_of(BUNDLE, 0.5))

    def app(*more: str) -> tuple[int, str]:
        paths = [str(Path(__file__).parents[1] / "support"), *sys.path]
        script = f"import sys; sys.path[:0] = {paths!r}\n{APP}"
        command = [sys.executable, "-W", "ignore", "-c", script, str(tmp_path / "state"), *more]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout.strip()

    codes = [app(digest)[0], app()[0], app()[0]]
    assert codes == [-11, -11, -11]
    assert app() == (0, "0")
    with opened(tmp_path / "state") as local:
        assert [r.model.version for r in local.slots.refused] == [1]


# --- the pure parts -----------------------------------------------------------------------------
NAMES = st.builds(
    ModelName,
    st.just("ab" * 32),
    st.sampled_from(["01" * 32, "02" * 32, "03" * 32]),
    st.integers(0, 9),
)
STEPS: st.SearchStrategy[Callable[[Slots], Slots]] = st.one_of(
    NAMES.map(lambda name: lambda slots: slots.tried(name)),
    NAMES.map(lambda name: lambda slots: slots.refuse(name, "why")),
    st.just(Slots.started),
    st.just(Slots.ended),
    st.just(Slots.proven),
    st.integers(0, 2).map(
        lambda i: lambda s: s.settled(s.candidates[i]) if i < len(s.candidates) else s
    ),
)


@given(st.lists(STEPS, max_size=30))
def test_whatever_happens_to_slots_they_are_read_back_and_hold_something_good(
    steps: list[Callable[[Slots], Slots]],
) -> None:
    slots = Slots()
    for step in steps:
        known = slots.good is not None
        slots = step(slots)
        assert Slots.from_bytes(slots.to_bytes()) == slots
        assert not known or slots.good is not None
        assert slots.trial is None or slots.good is not None
        assert len(slots.kept) <= 3  # one bundle, two weights
        assert len(slots.refused) <= REFUSED_KEPT
        assert slots.trial is None or not slots.refusal(slots.trial) or slots.trial == slots.current


def test_a_file_from_before_trials_is_read() -> None:
    old = b'{"bundle": "%s", "version": 7, "weights": "%s"}' % (b"ab" * 32, b"cd" * 32)
    assert Slots.from_bytes(old) == Slots(ModelName("ab" * 32, "cd" * 32, 7))


@pytest.mark.parametrize(
    "data",
    [
        b"{}",
        b"[]",
        b"null",
        b'{"starts": -1}',
        b'{"starts": 0, "trial": {}}',
        b'{"starts": 0, "refused": 7}',
        b'{"bundle": "ab", "version": 7, "weights": "cd"}',
        b'{"bundle": "%s", "version": "7", "weights": "%s"}' % (b"ab" * 32, b"cd" * 32),
    ],
)
def test_what_does_not_add_up_is_not_read(data: bytes) -> None:
    with pytest.raises((ValueError, KeyError, TypeError, AttributeError)):
        Slots.from_bytes(data)


def test_a_trial_that_saw_a_fault_is_not_ended_by_time_alone() -> None:
    on_trial = OnTrial(Terms(answers=3, seconds=10))
    on_trial.failed("once")
    assert not on_trial.is_proven(0.0)
    assert not on_trial.is_proven(100.0)
    for _ in range(3):
        on_trial.answered(np.zeros(1), np.zeros(1, np.int8))
    assert on_trial.is_proven(100.0)


def test_errors_are_told_for_the_losses_that_say() -> None:
    output = {"scale": None, "zero_point": None}
    logits = np.eye(3, dtype=np.float32)[np.arange(40) % 3]
    labels = np.zeros(40, np.int64)
    assert trial.error("cross_entropy", logits, labels, output) == pytest.approx(26 / 40)
    assert trial.error("mse", logits, logits + 2, output) == pytest.approx(4.0)
    assert trial.error("bce_logits", logits, labels, output) is None
    assert trial.error("mse", logits[:9], logits[:9], output) is None
    assert trial.is_worse("mse", 1.2, 1.0, 0.1)
    assert not trial.is_worse("mse", 1.05, 1.0, 0.1)
    assert not trial.is_worse("cross_entropy", 0.55, 0.5, 0.1)


@pytest.mark.parametrize("wrong", [{"answers": 0}, {"starts": 0}, {"seconds": -1}, {"margin": -1}])
def test_terms_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="trial: expected"):
        Terms(**wrong)
