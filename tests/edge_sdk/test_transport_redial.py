# SPDX-License-Identifier: Apache-2.0
import random

import pytest

from edge_sdk.transport.redial import LinkError, Redial

ABSENT = LinkError("nobody there", "absent")


def _redial(version: int = 5) -> Redial:
    return Redial(1.0, 60.0, random.Random(1), version)  # noqa: S311 - a test's jitter


def test_waits_grow_with_full_jitter_up_to_the_longest() -> None:
    waits: list[list[float]] = []
    for seed in range(300):
        redial = Redial(1.0, 60.0, random.Random(seed))  # noqa: S311 - a test's jitter
        waits.append([redial.failed(ABSENT, 0.0) for _ in range(12)])
    for attempt, column in enumerate(zip(*waits, strict=True)):
        ceiling = min(60.0, 2.0**attempt)
        assert 0 <= min(column) < 0.1 * ceiling
        assert 0.9 * ceiling < max(column) <= ceiling


def test_only_twenty_stable_seconds_forget_the_failures() -> None:
    redial = _redial()
    for _ in range(5):
        redial.failed(ABSENT, 0.0)
    redial.up(100.0)
    redial.failed(LinkError("lost", "lost"), 119.0)
    assert redial.failures == 6
    redial.up(200.0)
    assert redial.failed(LinkError("lost", "lost"), 220.0) <= 1.0
    assert redial.failures == 1


def test_wrong_credentials_wait_long_at_once() -> None:
    redial = _redial()
    assert all(redial.failed(LinkError("no", "auth"), 0.0) >= 30.0 for _ in range(20))


def test_a_broker_without_mqtt_5_is_tried_again_at_once_in_3_1_1() -> None:
    redial = _redial()
    assert redial.failed(LinkError("not 5", "version"), 0.0) == 0.0
    assert redial.version == 4
    assert redial.failed(LinkError("not 3.1.1 either", "version"), 0.0) > 0.0


def test_a_broker_that_hangs_up_is_tried_in_turns() -> None:
    redial = _redial()
    versions = []
    for _ in range(3):
        redial.failed(LinkError("hung up", "silent"), 0.0)
        versions.append(redial.version)
    assert versions == [4, 5, 4]


def test_a_version_asked_for_is_kept() -> None:
    redial = _redial(version=4)
    redial.failed(LinkError("hung up", "silent"), 0.0)
    assert redial.version == 4


def test_only_what_differs_is_news() -> None:
    redial = _redial()
    news = []
    for error in (ABSENT, ABSENT, LinkError("no", "auth"), ABSENT):
        redial.failed(error, 0.0)
        news.append(redial.is_news)
    redial.up(1.0)
    redial.failed(ABSENT, 2.0)
    assert [*news, redial.is_news] == [True, False, True, True, True]


@pytest.mark.parametrize("waits", [(0.0, 1.0), (2.0, 1.0)])
def test_waits_that_make_no_sense_are_refused(waits: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="expected 0 < shortest <= longest"):
        Redial(*waits, random.Random())  # noqa: S311 - a test's jitter
