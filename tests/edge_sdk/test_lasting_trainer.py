# SPDX-License-Identifier: Apache-2.0
"""One child for several devices: the same bits, in turn, and nothing but the child is lost."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hand_bundles import examples, initial, mlp

from edge_sdk.lasting import LastingTrainer
from edge_sdk.params import flatten
from edge_sdk.samples import Samples
from edge_sdk.training import Budget, ChildTrainer, TrainFailed, TrainJob, TrainResult

LONG = Budget(epochs=None, steps=10**9)
SHORT = Budget(epochs=3, batch=16)


def job_in(folder: Path, budget: Budget = SHORT, seed: int = 7) -> TrainJob:
    folder.mkdir()
    bundle = mlp(momentum=True)
    bundle.save(folder / "x.fedge")
    flat = flatten(initial((6, 5, 3), 3), bundle.shapes)
    (folder / "w.bin").write_bytes(flat.astype("<f4").tobytes())
    x, y = examples(100)
    layout = {"x_shape": (6,), "x_dtype": "float32", "y_shape": (), "y_dtype": "int64"}
    with Samples(folder / "s", **layout, capacity=100) as samples:
        samples.extend(x, y)
    return TrainJob(folder / "x.fedge", folder / "w.bin", folder / "s", budget, seed=seed)


def children() -> list[int]:
    tasks = Path(f"/proc/{os.getpid()}/task").iterdir()
    found = [int(c) for t in tasks for c in (t / "children").read_text().split()]
    return [c for c in found if b"edge_sdk.worker" in Path(f"/proc/{c}/cmdline").read_bytes()]


def eventually(claim: Callable[[], object], within_s: float = 20.0) -> None:
    until = time.monotonic() + within_s
    while not claim():
        assert time.monotonic() < until, "it did not come true in time"
        threading.Event().wait(0.02)


class Started:
    """A training begun in a thread, as a device's errand begins it, and how it ended."""

    def __init__(self, trainer: LastingTrainer, job: TrainJob) -> None:
        self.cancel, self.ended = threading.Event(), None
        self._thread = threading.Thread(target=self._run, args=(trainer, job), daemon=True)
        self._thread.start()

    def _run(self, trainer: LastingTrainer, job: TrainJob) -> None:
        try:
            self.ended: object = trainer.train(job, self.cancel)
        except TrainFailed as error:
            self.ended = error.reason

    def result(self) -> object:
        self._thread.join(20)
        return self.ended


@pytest.fixture
def trainer() -> Iterator[LastingTrainer]:
    made = LastingTrainer()
    yield made
    made.close()


def test_one_child_gives_each_job_the_bits_that_a_child_of_its_own_gives(
    tmp_path: Path, trainer: LastingTrainer
) -> None:
    jobs = [job_in(tmp_path / str(i), seed=i) for i in range(3)]
    alone = [np.fromfile(ChildTrainer().train(j, threading.Event()).delta) for j in jobs]
    pids = set()
    for job, expected in zip(jobs, alone, strict=True):
        result = trainer.train(job, threading.Event())
        assert np.array_equal(np.fromfile(result.delta), expected)
        pids |= set(children())
    assert len(pids) == 1


def test_devices_of_several_threads_are_served_in_turn_by_one_child(
    tmp_path: Path, trainer: LastingTrainer
) -> None:
    started = [Started(trainer, job_in(tmp_path / str(i))) for i in range(6)]
    assert all(isinstance(s.result(), TrainResult) for s in started)
    assert len(children()) == 1


def test_a_child_that_is_killed_costs_its_job_alone(
    tmp_path: Path, trainer: LastingTrainer
) -> None:
    long = Started(trainer, job_in(tmp_path / "long", LONG))
    eventually(children)
    waiting = Started(trainer, job_in(tmp_path / "waiting"))
    os.kill(children()[0], signal.SIGKILL)
    assert "killed by SIGKILL" in str(long.result())
    assert isinstance(waiting.result(), TrainResult)


def test_a_job_that_is_wrong_is_a_reason_and_the_child_stays(
    tmp_path: Path, trainer: LastingTrainer
) -> None:
    good, bad = job_in(tmp_path / "good"), job_in(tmp_path / "bad")
    trainer.train(good, threading.Event())
    first = children()
    (tmp_path / "bad" / "w.bin").write_bytes(b"1234")
    with pytest.raises(TrainFailed, match="expected 212 bytes of weights"):
        trainer.train(bad, threading.Event())
    trainer.train(good, threading.Event())
    assert children() == first


def test_cancelling_ends_the_training_under_way_and_the_next_has_its_turn(
    tmp_path: Path, trainer: LastingTrainer
) -> None:
    long = Started(trainer, job_in(tmp_path / "long", LONG))
    eventually(children)
    waiting = Started(trainer, job_in(tmp_path / "waiting", LONG))
    waiting.cancel.set()
    assert waiting.result() == "cancelled before its turn"
    after = Started(trainer, job_in(tmp_path / "after"))
    long.cancel.set()
    assert long.result() == "cancelled"
    assert isinstance(after.result(), TrainResult)


def test_what_was_waited_comes_off_the_seconds(tmp_path: Path, trainer: LastingTrainer) -> None:
    long = Started(trainer, job_in(tmp_path / "long", LONG))
    late = Started(trainer, job_in(tmp_path / "late", Budget(epochs=None, seconds=0.01)))
    threading.Event().wait(0.1)
    long.cancel.set()
    assert "went by while it waited its turn" in str(late.result())


def test_a_child_over_its_time_is_killed_and_replaced(tmp_path: Path) -> None:
    trainer = LastingTrainer(grace_s=-999.9)
    with pytest.raises(TrainFailed, match="killed"):
        trainer.train(job_in(tmp_path / "a", Budget(epochs=None, seconds=1000)), threading.Event())
    trainer.train(job_in(tmp_path / "b"), threading.Event())
    trainer.close()


def test_an_idle_child_is_ended(tmp_path: Path) -> None:
    trainer = LastingTrainer(idle_s=0.05)
    trainer.train(job_in(tmp_path / "a"), threading.Event())
    eventually(lambda: not children())
    trainer.train(job_in(tmp_path / "b"), threading.Event())
    trainer.close()
    assert not children()


def test_memory_that_runs_out_takes_the_child_alone(tmp_path: Path) -> None:
    fake = tmp_path / "python"
    fake.write_text(f'#!/bin/sh\nulimit -v 60000\nexec {sys.executable} "$@"\n')
    fake.chmod(0o755)
    trainer = LastingTrainer(str(fake))
    with pytest.raises(TrainFailed):
        trainer.train(job_in(tmp_path / "a"), threading.Event())
    trainer.close()


def test_a_python_that_is_not_there_is_a_failure_each_time(tmp_path: Path) -> None:
    trainer, job = LastingTrainer("/no/python"), job_in(tmp_path / "a")
    for _ in range(2):
        with pytest.raises(TrainFailed, match="/no/python"):
            trainer.train(job, threading.Event())
    trainer.close()
