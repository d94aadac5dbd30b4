# SPDX-License-Identifier: Apache-2.0
"""The figures of `fedge bench`, for the table of `scripts/test --all`. Times gate nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from coordinator.bench import aggregate, codec, step

Figure = Callable[[str, object, str], None]
pytestmark = [pytest.mark.figures, pytest.mark.slow, pytest.mark.timeout(600)]

TIMES = {"dscnn": 1.0, "autoencoder": 1.0, "resnet8": 2.0, "mobilenet": 2.0}


@pytest.mark.oracle
@pytest.mark.parametrize(("model", "most"), TIMES.items())
def test_a_step_next_to_torch(model: str, most: float, figure: Figure) -> None:
    pytest.importorskip("torch")
    row = step.measure(model)  # refuses to give a time before the losses agree
    figure(f"step {model}: time / torch's", row["ratio"], f"<= {most}")
    figure(f"step {model}: peak memory / torch's", row["rss_ratio"], "<= 0.33")
    assert row["rss_ratio"] is not None
    assert row["rss_ratio"] <= 1 / 3


def test_updates_encode_and_fold_by_the_thousand(figure: Figure) -> None:
    for row in codec.measure():
        for name, value in row.items():
            figure(f"codec {row['codec']}: {name}", value, "")
    for row in aggregate.measure():
        for name, value in row.items():
            figure(f"aggregate {row['codec']}: {name}", value, "")
