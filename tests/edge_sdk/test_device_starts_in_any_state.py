# SPDX-License-Identifier: Apache-2.0
"""Whatever a power cut, a worn card or a hand did to its files, a device starts.

It answers wherever a model is intact, learns, takes part in the next round, and starts again.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from device_scene import Clock
from hand_bundles import examples, mlp
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_coordinator import TASK, FakeTraining, Scripted, weights_of

from edge_sdk import files
from edge_sdk.device import Device
from edge_sdk.errors import StoreError
from edge_sdk.outbox import Outbox
from edge_sdk.transport.memory import MemoryBroker

BUNDLE = mlp()
X, Y = examples(30)
EF = [["ef"], ["deadzone", 2.0]]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the disk: no power is cut here."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


class Scene:
    """A broker, a coordinator, and lives of one device that are driven by hand."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.clock, self.broker = folder, Clock(), MemoryBroker()
        self.coordinator = Scripted(self.broker.transport("coordinator"), BUNDLE)
        self.coordinator.start()
        self.training = FakeTraining()

    def born(self, bundle: Any = BUNDLE, **options: Any) -> Device:
        device = Device(
            "memory",
            task=TASK,
            state=self.folder,
            bundle=bundle,
            connect=self.broker.transport,
            trainer=self.training,
            clock=self.clock,
            **options,
        )
        device._agent.begin()
        return device

    def turn(self, device: Device, count: int = 12) -> None:
        for _ in range(count):
            self.broker.pump()
            device._agent.turn(0)

    def until(self, device: Device, claim: Callable[[], object]) -> None:
        for _ in range(300):
            self.turn(device, 1)
            if claim():
                return
            self.clock.now += 5
        pytest.fail("it did not come true")

    def killed(self, device: Device) -> None:
        device._agent._stint._later = lambda _: None
        device._agent._stint.cancel()
        device._agent._stint.join(5)
        self.broker.cut(device.id)
        device._local.close()
        device._store.close()


@pytest.fixture(scope="module")
def lived(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The state of a device that was killed in training, with everything that it can have."""
    scene = Scene(tmp_path_factory.mktemp("lived") / "state")
    device = scene.born()
    device.learn_many(X, Y)
    for version in (1, 2):
        scene.coordinator.publish_model(version, weights_of(BUNDLE, 0.1 * version))
        scene.until(device, lambda v=version: device.version == v)
        scene.until(device, lambda: not device.status()["on_trial"])
    scene.until(device, lambda: scene.coordinator.checkins)
    scene.coordinator.invite(device.id, codec=EF)
    scene.until(device, lambda: device.status()["receipts"])
    scene.coordinator.outcome = None
    scene.coordinator.invite(device.id, codec=EF)
    scene.until(device, lambda: device.status()["outbox"])
    scene.coordinator.publish_model(3, weights_of(BUNDLE, 0.3))
    scene.until(device, lambda: device.version == 3)
    scene.training.may_end.clear()
    scene.coordinator.invite(device.id, codec=EF)
    scene.until(device, lambda: device.state == "training")
    (scene.folder / "train" / "3.checkpoint").write_bytes(b"x" * 1000)
    (scene.folder / "train" / ".3.checkpoint.1-2.tmp").write_bytes(b"y" * 500)
    (scene.folder / "setbacks.json").write_text('{"bundle": "x", "batch": 4, "in_a_row": 0}')
    device._agent._write_status()
    device._agent._meter.close()
    scene.killed(device)
    return scene.folder


def files_of(folder: Path) -> list[Path]:
    found = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    return [path for path in found if path.name != "lock"]


def check(folder: Path, bundle: Any = BUNDLE) -> None:
    """Start, answer, learn, take part, stop; and start once more."""
    scene = Scene(folder)
    scene.training.may_end.set()
    device = scene.born(bundle)
    assert device.version in {0, 1, 2, 3, None}
    if bundle is not None:
        assert device.version is not None
        assert np.isfinite(device.predict(X)).all()
        device.learn_many(X, Y)
    scene.clock.now += 1000
    scene.coordinator.publish_model(9, weights_of(BUNDLE, 0.9))
    scene.until(device, lambda: device.version == 9)
    if not device.examples:
        device.learn_many(X, Y)
    scene.until(device, lambda: scene.coordinator.checkins)
    scene.until(device, lambda: scene.coordinator.checkins[-1].ready and device.state == "idle")
    scene.coordinator.round = 8
    scene.coordinator.invite(device.id, codec=EF)
    scene.until(device, lambda: 9 in {u.round for u, _ in scene.coordinator.updates})
    scene.until(device, lambda: device.status()["outbox"] == 0)
    device.close()
    again = scene.born(bundle)
    assert again.version == 9
    assert again.id == device.id
    again.close()


def emptied(data: bytes) -> bytes:
    return data[:0]


def halved(data: bytes) -> bytes:
    return data[: len(data) // 2]


def shortened(data: bytes) -> bytes:
    return data[:-1]


def lengthened(data: bytes) -> bytes:
    return data + b"\xff" * 100


def zeroed(data: bytes) -> bytes:
    return bytes(len(data))


def flipped(data: bytes) -> bytes:
    broken = bytearray(data)
    for at in np.random.default_rng(len(data)).integers(0, max(1, len(data)), 3):
        if data:
            broken[at] ^= 0x10
    return bytes(broken)


def other_json(_: bytes) -> bytes:
    return b'{"version": [], "bundle": 7, "weights": null, "starts": "x", "task": {}}'


def a_list(_: bytes) -> bytes:
    return b"[]"


def not_text(data: bytes) -> bytes:
    return np.random.default_rng(1).bytes(len(data) + 10)


DAMAGES = [
    emptied, halved, shortened, lengthened, zeroed, flipped, other_json, a_list, not_text
]  # fmt: skip


@pytest.fixture
def state(lived: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(lived, tmp_path / "state"))


def test_the_state_that_is_damaged_has_every_file_that_a_device_keeps(lived: Path) -> None:
    names = {path.name for path in files_of(lived)}
    suffixes = {path.suffix for path in files_of(lived)}
    wanted = {"identity.key", "coordinator.key", "model.json", "residual.bin", "boot"}
    assert wanted | {"status.json", "round.json", "setbacks.json", "usage.json"} <= names
    assert {".fedge", ".bin", ".update", ".ring", ".checkpoint"} <= suffixes
    assert len(list((lived / "weights").iterdir())) == 2


def test_undamaged_it_goes_on(state: Path) -> None:
    check(state)


@pytest.mark.parametrize("third", range(3))
def test_each_file_with_each_damage_lets_it_start(
    lived: Path, tmp_path: Path, third: int, seeds: Callable[[int], range]
) -> None:
    """Each file with one damage in three, another one for each file; with all under all seeds."""
    for turn in seeds(3):
        for number, name in enumerate(files_of(lived)):
            damage = DAMAGES[(number + 3 * third + turn) % len(DAMAGES)]
            state = Path(shutil.copytree(lived, tmp_path / f"{number}-{turn}"))
            (state / name).write_bytes(damage((state / name).read_bytes()))
            with_name(Path(damage.__name__) / name, lambda s=state: check(s))


def test_each_file_may_be_lost_or_be_a_folder(lived: Path, tmp_path: Path) -> None:
    for number, name in enumerate(files_of(lived)):
        state = Path(shutil.copytree(lived, tmp_path / f"{number}"))
        (state / name).unlink()
        with_name(name, lambda s=state: check(s))
        state = Path(shutil.copytree(lived, tmp_path / f"{number}-folder"))
        (state / name).unlink()
        (state / name / "within").mkdir(parents=True)
        with_name(name, lambda s=state: check(s))


def test_each_folder_may_be_lost_or_be_a_file(lived: Path, tmp_path: Path) -> None:
    for folder in ("samples", "outbox", "train", "bundles", "weights"):
        state = Path(shutil.copytree(lived, tmp_path / folder))
        shutil.rmtree(state / folder)
        with_name(Path(folder), lambda s=state: check(s))
        state = Path(shutil.copytree(lived, tmp_path / f"{folder}-file"))
        shutil.rmtree(state / folder)
        (state / folder).write_bytes(b"?")
        with_name(Path(folder), lambda s=state: check(s))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_files_may_have_changed_places_or_been_damaged_together(
    lived: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    state = tmp_path_factory.mktemp("any") / "state"
    shutil.copytree(lived, state)
    names = st.sampled_from(files_of(lived))
    for _ in range(data.draw(st.integers(1, 4))):
        one, other = data.draw(names), data.draw(names)
        first, second = (state / one).read_bytes(), (state / other).read_bytes()
        (state / one).write_bytes(second)
        (state / other).write_bytes(first)
    for name in data.draw(st.lists(names, max_size=4)):
        damage = data.draw(st.sampled_from(DAMAGES))
        (state / name).write_bytes(damage((state / name).read_bytes()))
    check(state, data.draw(st.sampled_from([BUNDLE, None])))


def with_name(name: Path, run: Callable[[], None]) -> None:
    try:
        run()
    except BaseException as error:
        error.add_note(f"the file was {name}")
        raise


def test_a_lost_key_makes_a_new_device_and_says_so_and_sends_nothing_of_the_old_one(
    state: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scene = Scene(state)
    before = scene.born()
    scene.killed(before)
    (state / "identity.key").unlink()
    after = scene.born()
    assert after.id != before.id
    assert f"a new device begins: {after.id}" in caplog.text
    assert after.status()["outbox"] == 0
    scene.killed(after)


def test_updates_of_another_folder_are_not_sent(state: Path, tmp_path: Path) -> None:
    other = Scene(tmp_path / "other")
    device = other.born()
    other.killed(device)
    shutil.rmtree(tmp_path / "other" / "outbox")
    shutil.copytree(state / "outbox", tmp_path / "other" / "outbox")
    assert len(Outbox(tmp_path / "other" / "outbox")) == 1
    device = other.born()
    assert device.status()["outbox"] == 0
    other.killed(device)


def read_only(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let a folder be as on a card that the kernel has remounted."""
    real = os.open

    def open_(path: Any, flags: int, mode: int = 0o777, **options: Any) -> int:
        if str(path).startswith(str(folder)) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return real(path, flags, mode, **options)

    patch.setattr(os, "open", open_)


def test_on_a_card_that_went_read_only_it_starts_answers_and_takes_no_part(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = Scene(state)
    with monkeypatch.context() as patch:
        read_only(patch, state)
        device = scene.born()
        assert device.version == 3
        assert np.isfinite(device.predict(X)).all()
        assert device.examples == len(X)
        with pytest.raises(StoreError, match="opened to read"):
            device.learn(X[0], Y[0])
        with pytest.raises(StoreError, match="another process uses"):
            scene.born()
        scene.turn(device)
        device.close()
    check(state)


def test_a_disk_that_is_full_costs_no_examples_and_gives_a_model_all_the_same(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    fresh, known = Scene(tmp_path / "fresh"), Scene(state)
    fresh.born().close()
    shutil.rmtree(tmp_path / "fresh" / "samples")
    with monkeypatch.context() as patch:
        patch.setattr(files, "write_all", full)
        device = known.born(capacity=10)  # a ring of another size must be written anew
        assert device.version is not None
        assert device.examples == len(X)
        device.close()
        device = fresh.born()
        assert np.isfinite(device.predict(X)).all()
        with pytest.raises(StoreError):
            device.learn(X[0], Y[0])
    device.learn(X[0], Y[0])  # there is room again
    assert device.examples == 1
    device.close()
    device = known.born(capacity=10)
    assert device.examples == 10
    device.close()


def test_two_processes_never_share_a_folder(state: Path) -> None:
    scene = Scene(state)
    device = scene.born()
    with pytest.raises(StoreError, match="another process uses"):
        scene.born()
    scene.killed(device)
