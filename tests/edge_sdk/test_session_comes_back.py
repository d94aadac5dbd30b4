# SPDX-License-Identifier: Apache-2.0
"""When a device answers a roll call, and when it comes back after a receipt."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from edge_sdk import events as e
from edge_sdk.session import CHECK_IN_AGAIN_S, Session, Unreceipted, moment, next_due, step

B1, W1 = b"bundle-1", b"weights-1"
DEVICE = "d0123456789abcde"
OFFER = e.Offered(call=1, round=1, version=1, bundle=B1, model=W1, spread_s=20.0)
AT = 20.0 * moment(DEVICE, 1)
UPDATE = b"u" * 16


def run(state: Session, *events: e.Event) -> tuple[Session, list[e.Action]]:
    actions: list[e.Action] = []
    for event in events:
        state, more = step(state, event)
        actions += more
    return state, actions


def ready(spread_s: float = 20.0) -> Session:
    """Online, with the model in use and examples; what it said so far is taken as said."""
    state, _ = run(
        Session(device=DEVICE),
        e.Connected(),
        e.ConditionsChanged(hold=True, examples=10),
        replace(OFFER, spread_s=spread_s),
        e.Fetched("bundle", B1),
        e.Fetched("weights", W1),
        e.ModelReady(B1, W1, 1),
    )
    return state


def said(actions: list[e.Action]) -> list[bool]:
    return [a.ready for a in actions if isinstance(a, e.CheckIn)]


def test_the_moments_of_a_fleet_fill_the_spread_evenly_and_change_with_the_call() -> None:
    devices = [f"d{i:015x}" for i in range(10_000)]
    for call in (1, 2, 77):
        drawn = [moment(device, call) for device in devices]
        assert min(drawn) >= 0
        assert max(drawn) < 1
        each_second, _ = np.histogram(drawn, bins=20, range=(0, 1))
        assert each_second.max() < 1.2 * 500
        assert each_second.min() > 0.8 * 500
    assert moment(devices[0], 1) != moment(devices[0], 2)


def test_the_moment_is_the_one_that_the_protocol_says() -> None:
    """The vector of docs/protocol.md, section 7: sha256 of id, zero byte and call."""
    assert moment("d56475aa75463474", 9) == 0.723240275757135


def test_a_roll_call_is_answered_at_our_moment_and_once() -> None:
    state, actions = run(ready(), e.Tick(AT - 0.01))
    assert said(actions) == []
    assert next_due(state) == AT
    state, actions = run(state, e.Tick(AT))
    assert said(actions) == [True]
    assert said(run(state, e.Tick(AT + 100))[1]) == []


def test_a_small_fleet_answers_at_once() -> None:
    assert ready(spread_s=0.0).stands == e.CheckIn(1, ready=True, examples=10)


def test_a_new_call_has_another_moment_which_also_holds_for_what_has_no_receipt() -> None:
    state, _ = run(ready(), e.Tick(AT), e.Sent(UPDATE, 1), e.Tick(AT + 1))
    state, actions = run(state, replace(OFFER, call=2))
    at = AT + 1 + 20 * moment(DEVICE, 2)
    assert actions == []
    assert next_due(state) == at
    _, actions = run(state, e.Tick(at))
    assert said(actions) == [True]
    assert e.Resend(UPDATE) in actions


def test_what_was_sent_again_at_the_start_is_not_sent_once_more_for_the_first_offer() -> None:
    waiting = Session(device=DEVICE, unreceipted=(Unreceipted(UPDATE, 1),))
    state, actions = run(waiting, e.Connected())
    assert actions == [e.Resend(UPDATE)]
    assert e.Resend(UPDATE) not in run(state, OFFER)[1]


def test_after_a_reconnect_a_fleet_is_spread_as_well() -> None:
    state, _ = run(ready(), e.Tick(AT), e.Disconnected())
    state, actions = run(state, e.Tick(50.0), e.Connected())
    assert said(actions) == []
    assert said(run(state, e.Tick(50.0 + AT))[1]) == [True]


def test_to_withdraw_and_to_decline_waits_for_nothing() -> None:
    state, _ = run(ready(), e.Tick(AT))
    state, _ = run(state, e.Receipted(UPDATE, "counted"), replace(OFFER, call=2))
    invite = e.Invited(round=5, version=0, model=b"older", deadline_s=60.0)
    _, actions = run(state, invite)
    assert said(actions) == [False, True], "it declines a round that is over"
    state, _ = run(ready(), e.Tick(AT))
    _, actions = run(state, e.ConditionsChanged(hold=False, examples=10))
    assert said(actions) == [False]


def test_a_device_that_was_told_to_rest_does_not_check_in_sooner() -> None:
    state, _ = run(ready(0.0), e.Sent(UPDATE, 1), e.Tick(10.0))
    state, _ = run(state, e.Receipted(UPDATE, "counted", rest_s=3600.0))
    assert state.rest_until == 3610.0
    # it stands all the while: nothing is said, whether the roll is called or the link is lost
    state, actions = run(state, e.Tick(CHECK_IN_AGAIN_S + 11), replace(OFFER, call=2))
    assert said(actions) == []
    state, actions = run(state, e.Disconnected(), e.Tick(2000.0), e.Connected())
    assert said(actions) == []
    assert next_due(state) == 3610.0
    assert said(run(state, e.Tick(3610.0))[1]) == [True]


def test_while_it_rests_the_next_thing_to_do_is_not_in_the_past() -> None:
    state, _ = run(ready(0.0), e.Sent(UPDATE, 1), e.Tick(10.0))
    state, _ = run(state, e.Receipted(UPDATE, "counted", rest_s=3600.0))
    state, actions = run(state, e.Tick(CHECK_IN_AGAIN_S + 100))
    assert said(actions) == []
    assert next_due(state) == 3610.0


def test_a_resting_device_takes_up_an_invitation() -> None:
    state, _ = run(ready(0.0), e.Sent(UPDATE, 1), e.Tick(10.0))
    state, _ = run(state, e.Receipted(UPDATE, "counted", rest_s=3600.0))
    invite = e.Invited(round=2, version=1, model=W1, deadline_s=60.0)
    assert run(state, invite)[1] == [e.Train(2)]


def test_a_receipt_for_somebody_elses_update_puts_nobody_to_rest() -> None:
    state, _ = run(ready(0.0), e.Receipted(b"x" * 16, "counted", rest_s=3600.0))
    assert state.rest_until == 0.0
