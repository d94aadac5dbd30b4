# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hand_bundles import examples, initial, mlp

from edge_sdk import footprint, worker
from edge_sdk.child import last_words
from edge_sdk.params import flatten, unflatten
from edge_sdk.samples import Samples
from edge_sdk.trainer import Trainer
from edge_sdk.training import Budget, ChildTrainer, TrainFailed, TrainJob

LONG = Budget(epochs=None, steps=10**9)


def job_in(folder: Path, budget: Budget, n: int = 100, **change: object) -> TrainJob:
    bundle = mlp(momentum=True)
    bundle.save(folder / "x.fedge")
    flat = flatten(initial((6, 5, 3), 3), bundle.shapes)
    (folder / "w.bin").write_bytes(flat.astype("<f4").tobytes())
    x, y = examples(n)
    layout = {"x_shape": (6,), "x_dtype": "float32", "y_shape": (), "y_dtype": "int64"}
    with Samples(folder / "s", **layout, capacity=max(n, 1)) as samples:
        samples.extend(x, y)
    job = TrainJob(folder / "x.fedge", folder / "w.bin", folder / "s", budget, seed=7)
    return TrainJob(**{f: getattr(job, f) for f in TrainJob.__slots__} | change)


def children_of(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task")
    return [int(c) for t in path.iterdir() for c in (t / "children").read_text().split()]


def eventually(claim: Callable[[], bool], within_s: float = 20.0) -> None:
    until = time.monotonic() + within_s
    while not claim():
        assert time.monotonic() < until, "it did not come true in time"
        threading.Event().wait(0.02)


def is_training(pid: int) -> bool:
    """True once the child has loaded its engine: itself, not as a copy of us before its exec."""
    try:
        is_worker = b"edge_sdk.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
        return is_worker and "onnxruntime_pybind11" in Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return False


def trained_child() -> int:
    eventually(lambda: any(is_training(c) for c in children_of(os.getpid())))
    return next(c for c in children_of(os.getpid()) if is_training(c))


class InThread:
    """A training under way in a thread, with what it ended in."""

    def __init__(self, job: TrainJob) -> None:
        self.cancel = threading.Event()
        self.ended: object = None
        # daemon: a test that fails before it cancels must not keep the suite from ending
        self._thread = threading.Thread(target=self._run, args=(job,), daemon=True)
        self._thread.start()

    def _run(self, job: TrainJob) -> None:
        try:
            self.ended = ChildTrainer().train(job, self.cancel)
        except TrainFailed as error:
            self.ended = error

    def result(self) -> object:
        self._thread.join(20)
        return self.ended


def test_a_child_trains_the_same_bits_as_a_trainer_here(tmp_path: Path) -> None:
    job = job_in(tmp_path, Budget(epochs=3, batch=16))
    result = ChildTrainer().train(job, threading.Event())
    bundle = mlp(momentum=True)
    here = Trainer(bundle, seed=7)
    here.load_params(initial((6, 5, 3), 3))
    done = here.fit(*examples(100), epochs=3, batch=16)
    assert (result.examples, result.steps, result.epochs) == (100, 21, 3)
    assert (result.loss, result.stopped_by) == (done["loss"], "epochs")
    delta = unflatten(np.fromfile(result.delta, "<f4"), bundle.shapes)
    for name, change in here.delta().items():
        np.testing.assert_array_equal(delta[name], change)
    assert 20 << 20 < result.peak_bytes < 110 << 20


def test_a_job_is_pulled_to_its_anchor(tmp_path: Path) -> None:
    job = job_in(tmp_path, Budget(epochs=1, mu=0.5), anchor=tmp_path / "a.bin")
    bundle, start, anchor = mlp(proximal=True), initial((6, 5, 3), 3), initial((6, 5, 3), 4)
    bundle.save(job.bundle)
    flatten(anchor, bundle.shapes).astype("<f4").tofile(tmp_path / "a.bin")
    worker.train(ChildTrainer().request(job))
    here = Trainer(bundle, seed=7)
    here.load_params(start, anchor)
    here.fit(*examples(100), epochs=1, mu=0.5)
    expected = flatten(here.delta(), bundle.shapes)
    np.testing.assert_array_equal(np.fromfile(job.delta, "<f4"), expected)


def test_the_budget_reaches_the_child(tmp_path: Path) -> None:
    budget = Budget(epochs=None, steps=5, batch=8, lr=0.01)
    result = ChildTrainer().train(job_in(tmp_path, budget), threading.Event())
    assert (result.steps, result.stopped_by) == (5, "steps")
    soon = job_in(tmp_path, Budget(epochs=None, seconds=0.05), out=tmp_path / "d")
    result = ChildTrainer().train(soon, threading.Event())
    assert (result.stopped_by, result.delta) == ("seconds", tmp_path / "d")


def test_killing_the_child_is_a_named_failure_and_the_host_lives(tmp_path: Path) -> None:
    running = InThread(job_in(tmp_path, LONG))
    os.kill(trained_child(), signal.SIGKILL)
    failure = running.result()
    assert isinstance(failure, TrainFailed)
    assert "killed by SIGKILL" in failure.reason
    assert not (tmp_path / "w.delta.bin").exists()


def test_cancelling_ends_the_child(tmp_path: Path) -> None:
    running = InThread(job_in(tmp_path, LONG))
    child = trained_child()
    running.cancel.set()
    failure = running.result()
    assert isinstance(failure, TrainFailed)
    assert failure.reason == "cancelled"
    eventually(lambda: not Path(f"/proc/{child}").exists())


def test_a_child_over_its_time_is_killed(tmp_path: Path) -> None:
    job = job_in(tmp_path, Budget(epochs=None, seconds=1000.0))
    with pytest.raises(TrainFailed, match="after its budget; killed"):
        ChildTrainer(grace_s=-999.8).train(job, threading.Event())


def test_the_child_dies_with_its_parent(tmp_path: Path) -> None:
    script = textwrap.dedent("""
        import sys, threading
        from pathlib import Path
        from edge_sdk.training import *
        bundle, weights, samples = map(Path, sys.argv[1:])
        budget = Budget(epochs=None, steps=10**9)
        ChildTrainer().train(TrainJob(bundle, weights, samples, budget), threading.Event())
    """)
    job = job_in(tmp_path, LONG)
    paths = [str(p) for p in (job.bundle, job.weights, job.samples)]
    with subprocess.Popen([sys.executable, "-c", script, *paths]) as parent:
        eventually(lambda: any(is_training(c) for c in children_of(parent.pid)))
        (child,) = children_of(parent.pid)
        parent.kill()
        parent.wait()
        eventually(lambda: not Path(f"/proc/{child}/maps").exists() or not is_training(child))


def test_the_hosts_script_is_never_run_again(tmp_path: Path) -> None:
    job = job_in(tmp_path, Budget())
    script = tmp_path / "app.py"
    script.write_text(
        textwrap.dedent("""
        import sys, threading
        from pathlib import Path
        from edge_sdk.training import Budget, ChildTrainer, TrainJob
        print("the app runs")
        job = TrainJob(*map(Path, sys.argv[1:]), Budget())
        print(ChildTrainer().train(job, threading.Event()).steps)
    """)
    )
    (tmp_path / "json.py").write_text("raise SystemExit('a file of the app was imported')")
    paths = [str(p) for p in (job.bundle, job.weights, job.samples)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, str(script), *paths]
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.stdout == "the app runs\n4\n", done.stderr


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda p: (p / "x.fedge").write_bytes(b"junk"), "x.fedge: not a bundle"),
        (lambda p: (p / "w.bin").write_bytes(b"1234"), "expected 212 bytes of weights"),
        (lambda p: (p / "w.bin").write_bytes(b"\xff" * 212), "finite parameters"),
        (lambda p: (p / "s").unlink(), "are there examples"),
        (lambda p: (p / "w.bin").unlink(), "No such file"),
    ],
    ids=["bundle", "short", "nan", "samples", "weights"],
)
def test_what_is_wrong_with_a_job_comes_back_as_one_line(
    tmp_path: Path, spoil: Callable[[Path], object], said: str
) -> None:
    job = job_in(tmp_path, Budget())
    spoil(tmp_path)
    with pytest.raises(TrainFailed, match=said) as caught:
        ChildTrainer().train(job, threading.Event())
    assert "\n" not in caught.value.reason


def test_no_examples_and_a_diverging_rate_are_failures_with_a_reason(tmp_path: Path) -> None:
    with pytest.raises(TrainFailed, match="as many labels as inputs, from 1"):
        ChildTrainer().train(job_in(tmp_path, Budget(), n=0), threading.Event())
    (tmp_path / "s").unlink()
    with pytest.raises(TrainFailed, match="lower"):
        ChildTrainer().train(job_in(tmp_path, Budget(epochs=9, lr=1e38)), threading.Event())


def test_a_python_that_is_not_there_is_a_failure(tmp_path: Path) -> None:
    with pytest.raises(TrainFailed, match="cannot start /no/python"):
        ChildTrainer("/no/python").train(job_in(tmp_path, Budget()), threading.Event())


def test_a_child_that_crashes_before_the_job_gives_its_last_words(tmp_path: Path) -> None:
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho noise >&2\necho 'the last words' >&2\nexit 3\n")
    fake.chmod(0o755)
    with pytest.raises(TrainFailed, match="code 3: the last words"):
        ChildTrainer(str(fake)).train(job_in(tmp_path, Budget()), threading.Event())


@pytest.mark.parametrize("said", ["", "hello", '{"steps": 1}', "[]"])
def test_an_answer_that_is_not_a_result_is_a_failure(tmp_path: Path, said: str) -> None:
    fake = tmp_path / "python"
    fake.write_text(f"#!/bin/sh\nprintf '%s' '{said}'\n")
    fake.chmod(0o755)
    with pytest.raises(TrainFailed, match="answered"):
        ChildTrainer(str(fake)).train(job_in(tmp_path, Budget()), threading.Event())


def test_weights_that_end_as_nan_never_leave_the_child(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = ChildTrainer().request(job_in(tmp_path, Budget()))
    real = Trainer.delta
    monkeypatch.setattr(Trainer, "delta", lambda t: {k: v * np.nan for k, v in real(t).items()})
    with pytest.raises(ValueError, match="not finite"):
        worker.train(request)
    assert not (tmp_path / "w.delta.bin").exists()


def test_memory_that_runs_out_takes_the_child_alone(tmp_path: Path) -> None:
    fake = tmp_path / "python"
    fake.write_text(f'#!/bin/sh\nulimit -v 60000\nexec {sys.executable} "$@"\n')
    fake.chmod(0o755)
    with pytest.raises(TrainFailed):
        ChildTrainer(str(fake)).train(job_in(tmp_path, Budget()), threading.Event())


def test_the_child_is_nice_goes_first_and_loads_no_network_library(tmp_path: Path) -> None:
    job = job_in(tmp_path, Budget())
    request = ChildTrainer(nice=10).request(job)
    script = textwrap.dedent("""
        import atexit, os, sys
        def tell():
            heavy = {"paho", "cryptography", "aiohttp", "onnx", "asyncio", "ssl"}
            nice, oom = os.nice(0), open("/proc/self/oom_score_adj").read().strip()
            sys.stderr.write(f"{nice} {oom} {sorted(heavy & sys.modules.keys())}")
        atexit.register(tell)
        from edge_sdk import worker
        sys.exit(worker.main())
    """)
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == f"{min(os.nice(0) + 10, 19)} 1000 []"
    assert json.loads(done.stdout.splitlines()[-1])["steps"] == 4


def test_an_orphan_does_nothing(tmp_path: Path) -> None:
    request = {**ChildTrainer().request(job_in(tmp_path, Budget())), "parent": 1 << 30}
    done = subprocess.run(
        [sys.executable, "-m", "edge_sdk.worker"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert not (tmp_path / "w.delta.bin").exists()


def test_a_child_that_gives_no_sign_of_life_is_killed(tmp_path: Path) -> None:
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\nexec 2>&-\nexec sleep 1000\n")
    fake.chmod(0o755)
    with pytest.raises(TrainFailed, match="no sign of life for") as caught:
        ChildTrainer(str(fake), hang_s=0.3).train(job_in(tmp_path, Budget()), threading.Event())
    assert caught.value.kind == "hung"


def test_a_child_that_gives_signs_of_life_may_take_its_time(tmp_path: Path) -> None:
    fake = tmp_path / "python"
    signs = "for i in 1 2 3 4 5 6 7 8; do echo '{\"at\": 1}'; sleep 0.2; done"
    fake.write_text(f'#!/bin/sh\n{signs}\necho \'{{"error": "at last"}}\'\n')
    fake.chmod(0o755)
    with pytest.raises(TrainFailed, match="at last"):
        ChildTrainer(str(fake), hang_s=1.2).train(job_in(tmp_path, Budget()), threading.Event())


def test_the_worker_gives_signs_of_life_while_it_trains(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(worker, "SIGN_OF_LIFE_S", 0.0)
    tell = worker._on_step(None)
    for _ in range(3):
        tell(lambda: pytest.fail("nobody asked where it stands"))
    assert capsys.readouterr().out.count('{"at": ') == 3


def test_memory_beyond_its_share_is_refused_and_said_and_fewer_rows_fit(tmp_path: Path) -> None:
    sizes = (32, 4096, 3)
    bundle, many = mlp(sizes), 4000
    bundle.save(tmp_path / "wide.fedge")
    flat = flatten(bundle.params(), bundle.shapes)
    (tmp_path / "wide.bin").write_bytes(flat.astype("<f4").tobytes())
    layout = {"x_shape": (32,), "x_dtype": "float32", "y_shape": (), "y_dtype": "int64"}
    with Samples(tmp_path / "wide", **layout, capacity=many) as samples:
        samples.extend(*examples(many, sizes))
    places = tmp_path / "wide.fedge", tmp_path / "wide.bin", tmp_path / "wide"
    job = TrainJob(*places, Budget(steps=2, batch=many), memory=64 << 20)
    with pytest.raises(TrainFailed) as caught:
        ChildTrainer().train(job, threading.Event())
    assert caught.value.kind == "oom", caught.value.reason
    fewer = replace(job, budget=Budget(steps=2, batch=many // 64))
    assert ChildTrainer().train(fewer, threading.Event()).steps == 2


@pytest.mark.parametrize(
    ("code", "noise", "has_killed", "kind"),
    [
        (-9, "", True, "oom"),
        (-9, "", False, "killed"),
        (-6, "terminate called after throwing an instance of 'std::bad_alloc'", False, "oom"),
        (-6, "assertion failed", True, "failed"),
        (-11, "", False, "failed"),
        (1, "MemoryError", False, "oom"),
        (1, "some other error", True, "failed"),
    ],
)
def test_how_a_child_ended_is_told_from_its_code_its_words_and_the_kernels_count(
    code: int, noise: str, has_killed: bool, kind: str
) -> None:
    assert last_words(code, noise, has_killed=has_killed).kind == kind


def test_the_kernels_count_of_kills_is_read(tmp_path: Path) -> None:
    (tmp_path / "vmstat").write_text("nr_free_pages 7\noom_kill 3\ndrop_slab 0\n")
    assert footprint.oom_kills(tmp_path / "vmstat") == 3
    assert footprint.oom_kills(tmp_path / "none") == 0
    assert footprint.oom_kills() >= 0
