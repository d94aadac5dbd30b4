# SPDX-License-Identifier: Apache-2.0
"""What a device says of its being there, and which offers it takes: numbers, without a network."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from edge_sdk import messages, newest, topics
from edge_sdk.messages import Heard, Offer, Status
from edge_sdk.newest import Newest
from edge_sdk.presence import Presence
from edge_sdk.settings import Settings
from edge_sdk.signing import DeviceKey
from edge_sdk.store import Store

KEY = DeviceKey.from_seed(bytes(32))
SETTINGS = Settings(task="t", name="n", sdk="s", boot=3, start=77)
OFFER = Offer("t", 9, 4, 7, *[b"b" * 32] * 2, 1, 1, b"k" * 32, "open")


def read(said: tuple[str, bytes]) -> Status:
    topic, frame = said
    status, signed = messages.decode(frame, topic)
    assert isinstance(status, Status)
    assert signed.by(KEY.public)
    assert topic == topics.status(KEY.id)
    return status


def test_each_connection_has_a_will_of_its_own_and_its_status_the_same_numbers() -> None:
    presence = Presence(KEY, SETTINGS)
    for connection in (1, 2, 3):
        will, here = read(presence.will()), read(presence.here())
        assert (will.online, here.online) == (False, True)
        assert replace(will, online=True) == here
        assert (here.boot, here.start, here.connection) == (3, 77, connection)


def test_check_ins_are_numbered_over_connections() -> None:
    presence = Presence(KEY, SETTINGS)
    presence.will()
    first = presence.check_in(9, ready=True, examples=5)
    presence.will()
    second = presence.check_in(9, ready=False, examples=5, reason="disk")
    assert (first.boot, first.start, first.connection, first.turn) == (3, 77, 1, 1)
    assert (second.connection, second.turn, second.reason) == (2, 2, "disk")


def test_a_device_whose_count_was_lost_goes_on_from_what_it_is_told(tmp_path: Path) -> None:
    store = Store(tmp_path)
    presence = Presence(KEY, replace(SETTINGS, boot=store.count_boot()), store.count_boot)
    presence.will()
    assert presence.heard(Heard(50, 76, 0, 9, 4))
    assert presence.boot == 51
    here = read(presence.here())
    assert (here.boot, here.start, here.connection) == (51, 77, 1)
    assert not presence.heard(Heard(50, 76, 0, 9, 4)), "played back it says nothing new"
    assert not presence.heard(Heard(51, 77, 0, 9, 4)), "this start is the newest"
    assert store.count_boot() == 52


def test_who_tells_no_start_is_not_told_how_far_it_came() -> None:
    presence = Presence(KEY, replace(SETTINGS, start=0))
    assert not presence.heard(Heard(50, 76, 0, 9, 4))


@pytest.mark.parametrize(("call", "round_"), [(8, 9), (9, 3), (0, 0)])
def test_an_older_offer_is_passed_over(call: int, round_: int) -> None:
    known = Newest("d")
    assert known.takes(OFFER, 0.0)
    assert not known.takes(replace(OFFER, call=call, round=round_), 0.0)
    assert known.takes(OFFER, 0.0), "the same one again is no older"
    assert known.takes(replace(OFFER, call=10, round=1), 0.0)
    assert known.passed_over == 1


def test_after_a_start_an_offer_of_a_version_before_the_model_in_use_is_older() -> None:
    known = Newest("d", version=8)
    assert not known.takes(OFFER, 0.0)
    assert known.takes(replace(OFFER, version=8), 0.0)
    assert known.takes(replace(OFFER, version=8, round=5), 0.0)


def test_it_asks_once_in_a_while_and_not_where_a_newer_offer_follows() -> None:
    known = Newest("d")
    known.takes(OFFER, 0.0)
    older = replace(OFFER, call=1)
    known.takes(older, 100.0)
    at = known.ask_at
    assert newest.ASK_AFTER_S <= at - 100.0 <= newest.ASK_AFTER_S + newest.ASK_WITHIN_S
    assert known.asked(at - 0.1) is None
    known.takes(OFFER, at - 0.1)
    assert known.asked(at) is None, "what is retained is right again"
    known.takes(older, 200.0)
    assert known.asked(300.0) == 9
    known.takes(older, 301.0)
    assert known.ask_at == 300.0 + newest.ASK_AGAIN_S


def test_only_the_answer_to_the_very_question_makes_an_older_offer_hold() -> None:
    known, restored = Newest("d"), replace(OFFER, call=2, round=1, version=1)
    known.takes(OFFER, 0.0)
    known.takes(restored, 0.0)
    assert known.asked(100.0) == 9
    known.asking(6)
    for wrong in (Heard(3, 77, 5, 2, 1), Heard(3, 76, 6, 2, 1), Heard(3, 77, 0, 2, 1)):
        assert known.answered(wrong, 77) is None
        assert not known.takes(restored, 101.0)
    assert known.answered(Heard(3, 77, 6, 2, 1), 77) == restored
    assert known.takes(replace(restored, round=2), 102.0)
    assert not known.takes(replace(restored, round=1), 103.0)
    assert known.answered(Heard(3, 77, 6, 1, 1), 77) is None, "an answer holds once"


def test_an_answer_that_names_a_newer_offer_than_the_one_played_back_does_not_make_it_hold() -> (
    None
):
    known, old = Newest("d"), replace(OFFER, call=2)
    known.takes(OFFER, 0.0)
    known.takes(old, 0.0)
    known.asked(100.0)
    known.asking(1)
    assert known.answered(Heard(3, 77, 1, 9, 4), 77) is None
    assert not known.takes(old, 101.0)
    assert known.takes(OFFER, 102.0)
