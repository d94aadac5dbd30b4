# SPDX-License-Identifier: Apache-2.0
"""The state folder: whatever its files hold, the device starts."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from edge_sdk.errors import StoreError
from edge_sdk.slots import ModelName, Slots
from edge_sdk.store import Residual, Store

WEIGHTS = np.arange(5, dtype="<f4").tobytes()
DIGEST = hashlib.sha256(WEIGHTS).hexdigest()
NAME = ModelName("ab" * 32, DIGEST, 7)
SPEC: list[object] = [["deadzone", 2.0], ["int8"]]
RESIDUAL = Residual(SPEC, "bundle", 3, b"state\n\0")


def filled(folder: Path) -> Store:
    store = Store(folder)
    store.identity()
    store.trust(b"k" * 32)
    store.count_boot()
    store.put_weights(WEIGHTS)
    store.set_slots(Slots(NAME))
    store.set_residual(RESIDUAL)
    store.write_status({"version": 7})
    return store


def reopened(store: Store) -> Store:
    store.close()
    return Store(store.folder)


def test_what_is_stored_is_there_after_a_restart(tmp_path: Path) -> None:
    first = filled(tmp_path / "state")
    identity = first.identity().id
    store = reopened(first)
    assert store.identity().id == identity
    assert store.trusted() == b"k" * 32
    assert store.weights(DIGEST) == WEIGHTS
    assert store.slots() == Slots(NAME)
    assert store.residual() == RESIDUAL
    assert store.count_boot() == 2
    store.close()


def test_a_fresh_folder_is_private_and_empty(tmp_path: Path) -> None:
    store = Store(tmp_path / "a" / "b")
    assert store.folder.stat().st_mode & 0o777 == 0o700
    assert store.trusted() is None
    assert store.slots() == Slots()
    assert store.weights(DIGEST) is None
    assert store.bundle("ab" * 32) is None
    assert store.residual() is None
    assert store.any_bundle() is None
    assert store.count_boot() == 1
    assert store.identity().id.startswith("d")
    assert (store.folder / "identity.key").stat().st_mode & 0o777 == 0o600
    store.close()


def test_a_residual_is_only_good_for_its_codec_and_bundle() -> None:
    assert RESIDUAL.is_for([("deadzone", 2.0), ["int8"]], "bundle")
    assert not RESIDUAL.is_for([["int8"]], "bundle")
    assert not RESIDUAL.is_for(SPEC, "other")


def test_one_process_at_a_time(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(StoreError, match="another process uses"):
        Store(tmp_path)
    store.close()
    Store(tmp_path).close()


@pytest.mark.parametrize("damage", [b"", b"\0" * 64, b"{}", b"{not json", bytes(range(256))])
@pytest.mark.parametrize(
    "name", ["identity.key", "coordinator.key", "boot", "model.json", "residual.bin", "status.json"]
)
def test_any_damaged_file_is_set_aside_and_the_device_starts(
    tmp_path: Path, name: str, damage: bytes
) -> None:
    filled(tmp_path).close()
    (tmp_path / name).write_bytes(damage)
    store = Store(tmp_path)
    store.identity()
    assert store.count_boot() >= 1
    assert store.trusted() in {None, b"k" * 32}
    assert store.slots() in {Slots(), Slots(NAME)}
    assert store.residual() in (None, RESIDUAL)
    if name not in {"status.json", "boot"}:
        assert (tmp_path / f"{name}.damaged").read_bytes() == damage
    store.write_status({})
    store.close()


def test_weights_that_do_not_hash_to_their_name_are_not_used(tmp_path: Path) -> None:
    store = filled(tmp_path)
    store.weights_path(DIGEST).write_bytes(WEIGHTS[:-1] + b"\x01")
    assert store.weights(DIGEST) is None
    store.put_weights(WEIGHTS)
    assert store.weights(DIGEST) == WEIGHTS
    store.close()


def test_a_file_where_a_folder_should_be_is_set_aside(tmp_path: Path) -> None:
    (tmp_path / "outbox").write_bytes(b"?")
    store = Store(tmp_path)
    assert store.outbox.is_dir()
    store.close()


def test_old_models_are_forgotten_but_those_in_use_are_not(tmp_path: Path) -> None:
    store = filled(tmp_path)
    other = store.put_weights(b"\0" * 8)
    store.forget_models(keep=[DIGEST])
    assert store.weights(other) is None
    assert store.weights(DIGEST) == WEIGHTS
    (store.train / "left.bin").write_bytes(b"?")
    store.clear_training()
    assert list(store.train.iterdir()) == []
    store.close()


def test_a_folder_that_cannot_be_made_is_a_one_line_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match="cannot make folder"):
        Store(tmp_path / "file" / "state")
