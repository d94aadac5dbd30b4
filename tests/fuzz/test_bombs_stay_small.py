# SPDX-License-Identifier: Apache-2.0
"""What asks for gigabytes gets a line of refusal, and at most 1 MiB beyond its own size."""

from __future__ import annotations

import bombs
import pytest

from edge_sdk.errors import FedgeError

ALL = list(bombs.all_bombs())


@pytest.mark.parametrize("bomb", ALL, ids=lambda bomb: bomb.name)
def test_a_bomb_takes_at_most_one_mib(bomb: bombs.Bomb) -> None:
    bombs._meet(bomb)  # what is loaded and made once, such as tables
    peak, _ = bombs.cost(bomb)
    assert peak <= bombs.MOST_BYTES


@pytest.mark.parametrize(
    "bomb", [bomb for bomb in ALL if "65,535" not in bomb.name], ids=lambda bomb: bomb.name
)
def test_a_bomb_is_refused(bomb: bombs.Bomb) -> None:
    with pytest.raises(FedgeError):
        bomb.meet(bomb.data)
