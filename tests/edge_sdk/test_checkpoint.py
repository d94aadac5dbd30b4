# SPDX-License-Identifier: Apache-2.0
"""A training that was killed goes on from its checkpoint and ends in the very same bits."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import forward_models
import numpy as np
import pytest
from device_scene import Clock
from hand_bundles import examples, initial, mlp
from tflite_bundles import lowered

from coordinator.compiler import adam, build
from edge_sdk import files, worker
from edge_sdk.bundle import Bundle
from edge_sdk.checkpoint import FLASH_BYTES_PER_S, Keeper
from edge_sdk.failpoints import VARIABLE
from edge_sdk.params import flatten
from edge_sdk.samples import Samples
from edge_sdk.trainer import Progress, Trainer
from edge_sdk.training import Budget, ChildTrainer, TrainFailed, TrainJob

BUDGET = Budget(epochs=3, batch=16)
STEPS = 21
LAYOUT: dict[str, Any] = {
    "x_shape": (6,),
    "x_dtype": "float32",
    "y_shape": (),
    "y_dtype": "int64",
}


class Killed(Exception):  # noqa: N818 - what happened, for a test
    """Stands for the end of a process."""


def job_in(folder: Path, *, capacity: int = 200, **change: Any) -> TrainJob:
    bundle = mlp(momentum=True, proximal=True)
    bundle.save(folder / "x.fedge")
    flat = flatten(initial((6, 5, 3), 3), bundle.shapes)
    (folder / "w.bin").write_bytes(flat.astype("<f4").tobytes())
    with Samples(folder / "s", **LAYOUT, capacity=capacity) as samples:
        samples.extend(*examples(100))
    given: dict[str, Any] = {
        "budget": BUDGET,
        "seed": 7,
        "out": folder / "d",
        "checkpoint": folder / "c",
        "checkpoint_s": 0.0,
    }
    return TrainJob(folder / "x.fedge", folder / "w.bin", folder / "s", **(given | change))


def train(job: TrainJob) -> Any:
    return ChildTrainer().train(job, threading.Event())


def killed_at(job: TrainJob, checkpoint: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setenv(VARIABLE, f"checkpoint:kill@{checkpoint}")
        with pytest.raises(TrainFailed, match="killed by SIGKILL") as caught:
            train(job)
        assert caught.value.kind == "killed"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, Any]:
    """The delta of an undisturbed training, and what it said."""
    job = job_in(tmp_path_factory.mktemp("whole"), checkpoint=None)
    done = train(job)
    return job.delta.read_bytes(), (done.loss, done.steps, done.epochs, done.examples)


@pytest.mark.parametrize("at", [1, 7, 20], ids=["first step", "end of an epoch", "last but one"])
def test_a_child_killed_at_a_checkpoint_goes_on_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: tuple[bytes, Any], at: int
) -> None:
    job = job_in(tmp_path)
    killed_at(job, at, monkeypatch)
    assert not job.delta.exists()
    done = train(job)
    assert done.resumed_at == at
    assert job.delta.read_bytes() == whole[0]
    assert (done.loss, done.steps, done.epochs, done.examples) == whole[1]


def test_killed_again_and_again_it_still_ends_in_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: tuple[bytes, Any]
) -> None:
    job = job_in(tmp_path)
    for checkpoint in (4, 2, 9):
        killed_at(job, checkpoint, monkeypatch)
    assert train(job).resumed_at == 15
    assert job.delta.read_bytes() == whole[0]


@pytest.fixture(scope="module", params=["ort", "litert"])
def bundle(request: pytest.FixtureRequest) -> tuple[str, Bundle]:
    made = build(forward_models.mlp(), loss="mse", optimizer=adam(lr=0.01))
    return request.param, made if request.param == "ort" else lowered(made)


@pytest.mark.parametrize("state", [1, 2, 6, 7, 13])
def test_each_engine_restores_what_it_told(bundle: tuple[str, Bundle], state: int) -> None:
    model, engine = bundle[1], bundle[0]
    rng = np.random.default_rng(5)
    ports = model.manifest["input"]["shape"][1:], model.manifest["target"]["shape"][1:]
    x, y = (rng.normal(size=(50, *shape)).astype(np.float32) for shape in ports)
    told: list[Progress] = []

    def until(progress: Callable[[], Progress]) -> None:
        told.append(progress())
        if len(told) == state:
            raise Killed

    here = Trainer(model, engine, seed=3)
    done = here.fit(x, y, epochs=2, batch=8)
    first = Trainer(model, engine, seed=3)
    with pytest.raises(Killed):
        first.fit(x, y, epochs=2, batch=8, on_step=until)
    second = Trainer(model, engine, seed=3)
    again = second.fit(x, y, epochs=2, batch=8, start=told[-1])
    assert {**again, "seconds": 0} == {**done, "seconds": 0}
    for name, change in here.delta().items():
        np.testing.assert_array_equal(second.delta()[name], change)


def test_a_checkpoint_of_another_job_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: tuple[bytes, Any]
) -> None:
    job = job_in(tmp_path)
    killed_at(replace(job, seed=8), 5, monkeypatch)
    assert train(job).resumed_at == 0
    assert (tmp_path / "d").read_bytes() == whole[0]


def last_checkpoint(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[TrainJob, bytes]:
    job = job_in(folder)
    killed_at(job, 5, monkeypatch)
    return job, (folder / "c").read_bytes()


def test_a_damaged_checkpoint_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, data = last_checkpoint(tmp_path, monkeypatch)
    rng = np.random.default_rng(0)
    shapes = [(6, 5), (5,), (5, 3), (3,)] * 2
    with Samples.open(tmp_path / "s") as samples:
        for _ in range(200):
            broken = bytearray(data)
            broken[rng.integers(len(data))] ^= 1 << rng.integers(8)
            (tmp_path / "c").write_bytes(broken[: rng.integers(1, len(data) + 1)])
            assert Keeper(tmp_path / "c", 0, "any").begin(samples, shapes)[0] is None
        for other in (b"", b"\0" * 500, data[::-1], data + b"\0"):
            (tmp_path / "c").write_bytes(other)
            assert Keeper(tmp_path / "c", 0, "any").begin(samples, shapes)[0] is None


def test_new_examples_do_not_change_a_training_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: tuple[bytes, Any]
) -> None:
    job, _ = last_checkpoint(tmp_path, monkeypatch)
    with Samples(tmp_path / "s", **LAYOUT, capacity=200) as samples:
        samples.extend(*examples(30, seed=9))
    assert train(job).resumed_at == 5
    assert job.delta.read_bytes() == whole[0]


def test_examples_that_were_pushed_out_are_replaced_by_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_in(tmp_path, capacity=100)
    killed_at(job, 5, monkeypatch)
    with Samples(tmp_path / "s", **LAYOUT, capacity=100) as samples:
        samples.extend(*examples(3, seed=9))
    done = train(job)
    assert (done.resumed_at, done.steps, done.examples) == (5, STEPS, 100)


def test_with_fewer_examples_than_it_had_it_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, _ = last_checkpoint(tmp_path, monkeypatch)
    (tmp_path / "s").unlink()
    with Samples(tmp_path / "s", **LAYOUT, capacity=200) as samples:
        samples.extend(*examples(40))
    done = train(job)
    assert (done.resumed_at, done.examples) == (0, 40)


def progress(size: int) -> Callable[[], Progress]:
    return lambda: Progress(1, 8, 0.5, 1.0, 1, {}, [np.zeros(size, np.float32)])


@pytest.mark.parametrize(
    ("size", "pause_s"), [(10, 30.0), (50 * FLASH_BYTES_PER_S // 4, 50.0)], ids=["small", "large"]
)
def test_checkpoints_are_seldom_and_of_a_large_model_more_so(
    tmp_path: Path, size: int, pause_s: float
) -> None:
    clock = Clock()
    keeper = Keeper(tmp_path / "c", 30.0, "job", clock)
    written = []
    while len(written) < 3:
        clock.now += 1.0
        keeper.on_step(progress(size))
        if (tmp_path / "c").exists():
            written.append(clock.now)
            (tmp_path / "c").unlink()
    assert written[0] == 30.0
    assert pause_s <= written[1] - written[0] == written[2] - written[1] <= pause_s + 1


def test_a_full_disk_costs_the_checkpoint_not_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "write_all", full)
    Keeper(tmp_path / "c", 0.0, "job").on_step(progress(10))
    assert "checkpoint not kept" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_attempt_has_its_seconds_anew_but_all_share_those_in_all() -> None:
    before = progress(1)()
    given: dict[str, Any] = {"epochs": None, "batch": 8, "seconds": 10.0, "seconds_in_all": None}
    assert worker._budget({"budget": given}, None)["seconds"] == 10.0
    assert worker._budget({"budget": given}, before)["seconds"] == 11.0  # one went before
    given["seconds_in_all"] = 4.0
    assert worker._budget({"budget": given}, before)["seconds"] == 4.0
    assert worker._budget({"budget": {**given, "seconds": None}}, None)["seconds"] == 4.0
