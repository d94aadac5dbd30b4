# SPDX-License-Identifier: Apache-2.0
"""A model is tried before it answers; what a device has in hand survives damage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hand_bundles import examples, mlp
from scripted_coordinator import weights_of

from edge_sdk import bundle as bundles
from edge_sdk.bundle import Bundle
from edge_sdk.errors import BundleError, EngineError, StoreError
from edge_sdk.local import Local, NoModelError
from edge_sdk.model import batched, open_model
from edge_sdk.slots import ModelName, Slots
from edge_sdk.store import Store

FLOAT, INT8 = mlp(), mlp(quantized=True)
X, Y = examples(20)


def changed(bundle: Bundle, **manifest: Any) -> Bundle:
    """Return a bundle that differs in its manifest."""
    members = {name: bundle.member(name) for name in bundle.manifest["members"]}
    kept = {k: v for k, v in bundle.manifest.items() if k != "members"}
    return bundles.pack(json.loads(json.dumps(kept | manifest)), members)


@pytest.mark.parametrize(
    ("shape", "x", "batch", "is_one"),
    [
        ((None, 6), np.zeros(6), (1, 6), True),
        ((None, 6), np.zeros((4, 6)), (4, 6), False),
        ((None, 1, 2, 3), np.zeros((1, 2, 3)), (1, 1, 2, 3), True),
        ((None, 1, 2, 3), np.zeros(6), (1, 1, 2, 3), True),
        ((None, 1, 2, 3), np.zeros((5, 6)), (5, 1, 2, 3), False),
        ((None, 1, 2, 3), np.zeros((5, 1, 2, 3)), (5, 1, 2, 3), False),
        ((None, None, 3), np.zeros((7, 3)), (1, 7, 3), True),
    ],
)
def test_one_example_a_batch_or_flat_rows_become_a_batch(
    shape: tuple[int | None, ...], x: Any, batch: tuple[int, ...], is_one: bool
) -> None:
    found, one = batched(x, shape)
    assert found.shape == batch
    assert one is is_one


@pytest.mark.parametrize("x", [np.zeros(5), np.zeros((2, 5)), np.float32(1), np.zeros((1, 1, 6))])
def test_what_is_neither_says_the_shape_that_was_expected(x: Any) -> None:
    with pytest.raises(ValueError, match=r"shape \[6\] or a batch, got"):
        batched(x, (None, 6))


def test_a_graph_for_one_example_at_a_time_answers_batches() -> None:
    ports = {**FLOAT.manifest["input"], "shape": [1, 6]}
    single = open_model(changed(FLOAT, input=ports), FLOAT.member("params.bin"), 0)
    model = open_model(FLOAT, FLOAT.member("params.bin"), 0)
    np.testing.assert_allclose(single.predict(X[:3]), model.predict(X[:3]), rtol=1e-5)
    assert repr(model) == f"<Model version 0 of bundle {FLOAT.digest[:12]}>"


def test_weights_of_another_size_or_not_finite_make_no_model() -> None:
    with pytest.raises(BundleError, match="not of this bundle"):
        open_model(FLOAT, FLOAT.member("params.bin")[:-4], 0)
    with pytest.raises(BundleError, match="finite"):
        open_model(FLOAT, weights_of(FLOAT, float("nan")), 0)


def test_weights_that_answer_with_infinity_make_no_model() -> None:
    huge = np.full(len(FLOAT.member("params.bin")) // 4, 3e38, "<f4").tobytes()
    with pytest.raises(EngineError, match="finite answers"):
        open_model(FLOAT, huge, 0)


def test_an_engine_that_is_not_there_is_said_at_once() -> None:
    with pytest.raises(EngineError, match="engine"):
        open_model(FLOAT, FLOAT.member("params.bin"), 0, engine="abacus")


@pytest.fixture
def store(tmp_path: Path) -> Any:
    store = Store(tmp_path)
    yield store
    store.close()


def test_a_lost_weights_file_falls_back_to_the_bundles_own(store: Store) -> None:
    store.put_bundle(INT8)
    store.set_slots(Slots(ModelName(INT8.digest, "ab" * 32, 7)))
    local = Local(store, None)
    assert local.model is not None
    assert local.model.version == 0
    local.close()


def test_a_last_model_that_does_not_open_falls_back_to_the_given_bundle(store: Store) -> None:
    store.put_bundle(INT8)
    digest = store.put_weights(weights_of(INT8, float("inf")))
    store.set_slots(Slots(ModelName(INT8.digest, digest, 7)))
    local = Local(store, FLOAT)
    assert local.bundle is not None
    assert local.bundle.digest == FLOAT.digest
    local.close()


def test_without_a_name_any_whole_bundle_on_disk_will_do(store: Store) -> None:
    store.put_bundle(INT8)
    local = Local(store, None)
    assert local.model is not None
    local.close()


def test_a_switch_without_its_files_changes_nothing(store: Store) -> None:
    local = Local(store, INT8)
    with pytest.raises(StoreError, match="fetch again"):
        local.switch(bytes.fromhex(INT8.digest), b"\0" * 32, 1)
    assert local.model is not None
    assert local.model.version == 0
    local.close()


def test_initial_weights_need_no_download(store: Store) -> None:
    import hashlib

    local = Local(store, None)
    initial = hashlib.sha256(INT8.member("params.bin")).digest()
    assert not local.has_weights(initial, INT8.digest)
    store.put_bundle(INT8)
    assert local.has_weights(initial, INT8.digest)
    assert not local.has_weights(b"\1" * 32, INT8.digest)
    with pytest.raises(NoModelError):
        _ = local.samples_path
    local.close()


def test_another_layout_opens_another_ring_and_the_first_one_is_kept(store: Store) -> None:
    local = Local(store, INT8)
    local.learn(X, Y)
    local.learn(X[0].tolist(), 1)
    assert local.examples == 21
    wide = mlp((4, 5, 3))
    store.put_bundle(wide)
    digest = store.put_weights(wide.member("params.bin"))
    local.switch(bytes.fromhex(wide.digest), bytes.fromhex(digest), 1)
    assert local.examples == 0
    local.learn([1, 2, 3, 4], 1)
    digest = store.put_weights(INT8.member("params.bin"))
    local.switch(bytes.fromhex(INT8.digest), bytes.fromhex(digest), 2)
    assert local.examples == local.examples_ever == 21
    local.close()


def test_raw_int8_examples_are_stored_as_the_numbers_they_mean(store: Store) -> None:
    local = Local(store, INT8)
    local.learn(np.full(6, 23, np.int8), 1)  # (23 - 3) * 0.05
    assert local._samples is not None
    stored, labels = local._samples.arrays()
    np.testing.assert_allclose(stored, 1.0, rtol=1e-6)
    assert labels.tolist() == [1]
    local.close()


def test_regression_labels_are_rows_of_numbers(store: Store) -> None:
    local = Local(store, mlp(loss="mse"))
    local.learn(X[0], [0.5, 1.5, 2.5])
    local.learn(X[:2], np.zeros((2, 3)))
    with pytest.raises(ValueError, match="label"):
        local.learn(X[0], [np.nan, 0, 0])
    assert local.examples == 3
    local.close()


def test_examples_of_no_fixed_shape_are_refused_with_the_remedy(store: Store) -> None:
    ports = {**FLOAT.manifest["input"], "shape": [None, None]}
    with pytest.raises(BundleError, match="fix the model's input shape"):
        Local(store, changed(FLOAT, input=ports))
