# SPDX-License-Identifier: Apache-2.0
"""Members are stored without what earlier ones store, and read back whole."""

from __future__ import annotations

from typing import Any

import pytest
from hand_bundles import mlp
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk import manifest, splices
from edge_sdk.bundle import Bundle, pack
from edge_sdk.errors import BundleError, RefusedError
from edge_sdk.limits import Limits

BLOCK = 256
BLOCKS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 40)), max_size=6)


def laid(blocks: list[tuple[int, int]]) -> tuple[bytes, list[splices.Span]]:
    """Lay known blocks out with other bytes between them."""
    data, spans = b"", []
    for which, gap in blocks:
        data += b"\xff" * gap
        spans.append((len(data), BLOCK + which))
        data += bytes([which]) * (BLOCK + which)
    return data, spans


def whole(stored: dict[str, bytes], found: Any) -> dict[str, bytes]:
    views = {name: memoryview(data) for name, data in stored.items()}
    return {name: splices.join(name, views, found.get(name, ())) for name in stored}


@given(st.lists(BLOCKS, min_size=1, max_size=4))
def test_what_is_split_is_joined_to_the_same_bytes(plans: list[list[tuple[int, int]]]) -> None:
    made = {f"m{i}": laid(plan) for i, plan in enumerate(plans)}
    members = {name: data for name, (data, _) in made.items()}
    stored, found = splices.split(members, {name: spans for name, (_, spans) in made.items()})
    assert whole(stored, found) == members
    assert "m0" not in found
    gone = sum(s["size"] for each in found.values() for s in each)
    assert sum(map(len, stored.values())) == sum(map(len, members.values())) - gone


def test_a_weight_of_three_graphs_is_stored_once() -> None:
    weight = bytes(range(256)) * 40
    members = {"a": b"head" + weight, "b": weight + b"tail", "c": b"x" + weight + b"y"}
    spans = {"a": [(4, len(weight))], "b": [(0, len(weight))], "c": [(1, len(weight))]}
    stored, found = splices.split(members, spans)
    assert stored == {"a": members["a"], "b": b"tail", "c": b"xy"}
    assert found["c"] == [{"at": 1, "member": "a", "offset": 4, "size": len(weight)}]
    assert whole(stored, found) == members


def test_little_is_not_worth_a_copy() -> None:
    members = {"a": bytes(300), "b": bytes(300) + bytes(range(256)) * 10}
    stored, found = splices.split(members, {"a": [(0, 300)], "b": [(0, 300)]})
    assert (stored, found) == (members, {})
    tiny = {"a": bytes(255), "b": bytes(255)}
    assert splices.split(tiny, {"a": [(0, 255)], "b": [(0, 255)]}) == (tiny, {})


def test_a_bundle_reads_as_if_nothing_were_shared() -> None:
    plain = mlp()
    members = {name: plain.member(name) for name in ["params.bin", *graphs(plain)]}
    extra = bytes(range(256)) * 8
    members = {n: d + extra * (n != "params.bin") for n, d in members.items()}
    spans = {n: [(len(d) - len(extra), len(extra))] for n, d in members.items()}
    shared = pack(plain.manifest, members, spans)
    assert len(shared.manifest["spliced"]) == 2
    assert {name: shared.member(name) for name in members} == members
    assert Bundle.from_bytes(shared.data).digest == shared.digest
    again = pack(shared.manifest, members)
    assert again.manifest["spliced"] == {}
    assert len(again.data) > len(shared.data) + 2 * len(extra) - 1000


def graphs(bundle: Bundle) -> list[str]:
    roles = bundle.manifest["graphs"]["onnx"]
    return [roles[role] for role in ("predict", "train", "evaluate")]


@pytest.mark.parametrize(
    ("name", "spliced", "message"),
    [
        (
            "params.bin",
            {"at": 0, "member": "params.bin", "offset": 0, "size": 4},
            "a graph of this",
        ),
        ("nosuch", {"at": 0, "member": "params.bin", "offset": 0, "size": 4}, "a graph of this"),
        (None, {"at": 0, "member": "nosuch", "offset": 0, "size": 4}, "that a member stores"),
        (None, {"at": 0, "member": "params.bin", "offset": 0, "size": 1 << 20}, "that a member"),
        (None, {"at": 1 << 30, "member": "params.bin", "offset": 0, "size": 4}, "places in order"),
        (None, {"at": 0, "member": "params.bin", "offset": -1, "size": 4}, "a byte offset"),
        (None, {"at": 0, "member": "params.bin", "offset": 0}, "a value"),
    ],
)
def test_splices_that_do_not_fit_are_refused(
    monkeypatch: pytest.MonkeyPatch, name: str | None, spliced: dict[str, Any], message: str
) -> None:
    bundle = mlp()
    members = {n: bundle.member(n) for n in ["params.bin", *graphs(bundle)]}
    wrong = {name or graphs(bundle)[1]: [spliced]}
    monkeypatch.setattr(splices, "split", lambda *_: (members, wrong))
    with pytest.raises(BundleError, match=message):
        pack(bundle.manifest, members)


def test_splices_out_of_order_and_members_that_swell_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bundle = mlp()
    members = {n: bundle.member(n) for n in ["params.bin", *graphs(bundle)]}
    one = {"at": 8, "member": "params.bin", "offset": 0, "size": 4}
    wrong = {graphs(bundle)[1]: [one, {**one, "at": 4}]}
    monkeypatch.setattr(splices, "split", lambda *_: (members, wrong))
    with pytest.raises(BundleError, match="places in order"):
        pack(bundle.manifest, members)
    wrong[graphs(bundle)[1]] = [one]
    pack(bundle.manifest, members)
    most = max(map(len, members.values()))
    monkeypatch.setattr(manifest, "MAX_WHOLE_BYTES", most)
    with pytest.raises(BundleError, match=f"at most {most} bytes"):
        pack(bundle.manifest, members)


def test_a_small_bundle_of_large_members_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = mlp()
    members = {n: bundle.member(n) for n in ["params.bin", *graphs(bundle)]}
    size, name = len(members["params.bin"]), graphs(bundle)[1]
    again = {"member": "params.bin", "offset": 0, "size": size}
    wrong = {name: [{"at": i * size, **again} for i in range(1000)]}
    monkeypatch.setattr(splices, "split", lambda *_: (members, wrong))
    made = pack(bundle.manifest, members)
    limit = len(made.data) + 1
    assert limit < 1000 * size
    with pytest.raises(RefusedError, match=rf"{name}, whole, this device allows max_bundle_bytes"):
        made.check(Limits(max_bundle_bytes=limit))
