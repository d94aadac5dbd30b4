# SPDX-License-Identifier: Apache-2.0
"""The figures of `fedge bench`, for the table of `scripts/test --all`. Times gate nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from coordinator.bench import aggregate, codec

Figure = Callable[[str, object, str], None]
pytestmark = [pytest.mark.figures, pytest.mark.slow, pytest.mark.timeout(600)]


def test_updates_encode_and_fold_by_the_thousand(figure: Figure) -> None:
    for row in codec.measure():
        for name, value in row.items():
            figure(f"codec {row['codec']}: {name}", value, "")
    for row in aggregate.measure():
        for name, value in row.items():
            figure(f"aggregate {row['codec']}: {name}", value, "")
