# SPDX-License-Identifier: Apache-2.0
"""The measurements of codecs and folds run, and what they count holds; times are not gated."""

from __future__ import annotations

from coordinator.bench import aggregate, codec


def test_each_codec_is_measured_on_both_kinds_of_delta() -> None:
    rows = codec.measure(count=20_000, repeat=1)
    assert len(rows) == 2 * len(codec.CODECS)
    assert all(row["params"] == 20_000 and row["bytes"] > 0 for row in rows)
    by = {(row["delta"], row["codec"]): row for row in rows}
    assert by["heavy", "default"]["ratio"] > 35
    assert by["heavy", "top_k 1 %, int8"]["density"] == 0.01
    assert by["flat", "exact-ish"]["error"] < 1e-3
    assert all(row["encode_ms"] > 0 and row["decode_ms"] > 0 for row in rows)


def test_uniform_positions_are_measured_within_3_percent_of_their_entropy() -> None:
    rows = codec.measure_positions(count=400_000)
    assert max(row["over_percent"] for row in rows) < 3


def test_folds_are_measured() -> None:
    rows = aggregate.measure(count=10_000, repeat=1)
    assert [row["codec"] for row in rows] == list(aggregate.NAMES)
    assert all(row["updates_per_s"] > 0 for row in rows)
