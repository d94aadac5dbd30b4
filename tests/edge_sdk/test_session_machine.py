# SPDX-License-Identifier: Apache-2.0
"""The device's session, one claim at a time and then in any order of events."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sdk import events as e
from edge_sdk import session
from edge_sdk.messages import REASONS
from edge_sdk.session import Session, next_due, step

B1, W1, W2 = b"bundle-1", b"weights-1", b"weights-2"
OFFER = e.Offered(call=1, round=1, version=1, bundle=B1, model=W1)
INVITE = e.Invited(round=1, version=1, model=W1, deadline_s=60.0)
READY = e.CheckIn(1, ready=True, examples=10)


def no(reason: str, number: int = 0) -> e.CheckIn:
    """Return what declines a round, or withdraws."""
    assert reason in REASONS
    return e.CheckIn(1, ready=False, examples=10, reason=reason, round=number)


def run(state: Session, *events: e.Event) -> tuple[Session, list[e.Action]]:
    actions: list[e.Action] = []
    for event in events:
        state, more = step(state, event)
        actions += more
    return state, actions


def ready() -> Session:
    """Online, checked in, model 1 in use, 10 examples."""
    state, _ = run(
        Session(min_examples=5),
        e.Connected(),
        e.ConditionsChanged(hold=True, examples=10),
        OFFER,
        e.Fetched("bundle", B1),
        e.Fetched("weights", W1),
        e.ModelReady(B1, W1, 1),
    )
    return state


def training() -> Session:
    return run(ready(), INVITE)[0]


def test_a_fresh_device_brings_bundle_then_weights_then_switches_then_checks_in() -> None:
    state, actions = run(
        Session(), e.Connected(), e.ConditionsChanged(hold=True, examples=10), OFFER
    )
    assert actions == [e.Fetch("bundle", B1, 0)]
    state, actions = run(state, e.Fetched("bundle", B1))
    assert actions == [e.Fetch("weights", W1, 0)]
    state, actions = run(state, e.Fetched("weights", W1))
    assert actions == [e.SwitchModel(B1, W1, 1)]
    _, actions = run(state, e.ModelReady(B1, W1, 1))
    assert actions == [e.CheckIn(1, ready=True, examples=10)]


def test_a_check_in_is_made_once_a_call() -> None:
    state, actions = run(ready(), OFFER, e.Tick(5), OFFER)
    assert actions == []
    _, actions = run(state, replace(OFFER, call=2))
    assert actions == [e.CheckIn(2, ready=True, examples=10)]


def test_a_check_in_is_withdrawn_when_conditions_lapse_and_made_again_when_they_hold() -> None:
    state, actions = run(ready(), e.ConditionsChanged(hold=False, examples=10))
    assert actions == [no("conditions")]
    _, actions = run(state, e.ConditionsChanged(hold=True, examples=12))
    assert actions == [e.CheckIn(1, ready=True, examples=12)]


def test_a_reconnected_device_checks_in_again_because_its_will_may_have_been_heard() -> None:
    _, actions = run(ready(), e.Disconnected(), e.Connected())
    assert actions == [e.CheckIn(1, ready=True, examples=10)]


def test_a_standing_check_in_is_repeated_after_a_while() -> None:
    state = ready()
    _, actions = run(state, e.Tick(session.CHECK_IN_AGAIN_S))
    assert actions == [e.CheckIn(1, ready=True, examples=10)]


def test_a_device_with_too_few_examples_never_checks_in_and_declines() -> None:
    state = ready()._replace(stands=None)
    state, actions = run(state, e.ConditionsChanged(hold=True, examples=4))
    assert actions == []
    _, actions = run(state, INVITE)
    assert actions == [e.Abandon(1), replace(no("examples", 1), examples=4)]


def test_a_closed_task_gets_no_check_in_but_its_model_is_brought() -> None:
    _, actions = run(
        Session(),
        e.Connected(),
        e.ConditionsChanged(hold=True, examples=10),
        replace(OFFER, is_open=False),
    )
    assert actions == [e.Fetch("bundle", B1, 0)]


def test_an_invitation_to_the_model_in_use_trains_at_once() -> None:
    _, actions = run(ready(), INVITE)
    assert actions == [e.Train(1)]


def test_an_invitation_to_a_newer_model_trains_once_it_is_in_use() -> None:
    state, actions = run(ready(), e.Invited(2, 2, W2, 60.0))
    assert actions == []
    state, actions = run(state, replace(OFFER, round=2, version=2, model=W2))
    assert actions == [e.Fetch("weights", W2, 0)]
    state, actions = run(state, e.Fetched("weights", W2))
    assert actions == [e.SwitchModel(B1, W2, 2)]
    _, actions = run(state, e.ModelReady(B1, W2, 2))
    assert actions == [e.Train(2)]


def test_an_invitation_whose_weights_never_come_ends_at_its_deadline() -> None:
    state, _ = run(ready(), e.Invited(2, 2, W2, 60.0))
    assert next_due(state) == 60.0
    state, actions = run(state, e.Tick(60.0))
    said = [e.Abandon(2), no("deadline", 2), READY]
    assert (state.round, actions) == (None, said)


def test_an_invitation_to_a_model_already_replaced_is_let_go() -> None:
    state, _ = run(ready(), replace(OFFER, version=2, model=W2))
    state, actions = run(state, INVITE)
    said = [e.Abandon(1), no("version", 1), READY]
    assert (state.round, actions) == (None, said)


def test_an_invitation_to_a_round_before_the_one_that_is_offered_is_let_go() -> None:
    state, _ = run(ready(), replace(OFFER, round=2))
    state, actions = run(state, INVITE)
    assert (state.round, actions) == (None, [e.Abandon(1), no("deadline", 1), READY])


def test_training_is_submitted_once() -> None:
    state, actions = run(training(), e.Trained(1))
    assert actions == [e.Submit(1)]
    _, actions = run(state, e.Trained(1))
    assert actions == []


def test_training_stops_when_conditions_lapse_and_what_it_has_is_sent() -> None:
    state, actions = run(training(), e.ConditionsChanged(hold=False, examples=10))
    assert actions[0] == e.StopTraining(1)
    _, actions = run(state, e.Trained(1))
    assert e.Submit(1) in actions


def test_failed_training_declines_then_waits_longer_each_time() -> None:
    state, actions = run(training(), e.TrainFailed(1))
    assert actions == [e.Abandon(1), no("no-update", 1)]
    assert next_due(state) == session.RETRY_FIRST_S
    state, actions = run(state, e.Tick(session.RETRY_FIRST_S))
    assert actions == [e.CheckIn(1, ready=True, examples=10)]
    state, _ = run(state, e.Invited(2, 1, W1, 60.0), e.TrainFailed(2))
    assert next_due(state) == session.RETRY_FIRST_S + 2 * session.RETRY_FIRST_S


def test_a_newer_invitation_waits_until_the_round_under_way_is_sent() -> None:
    state, actions = run(training(), e.Invited(2, 1, W1, 60.0))
    assert actions == []
    state, actions = run(state, e.Trained(1))
    assert actions == [e.Submit(1)]
    _, actions = run(state, e.Sent(b"u1", 1))
    assert actions == [e.Train(2)]


def test_a_newer_invitation_replaces_a_round_long_overdue() -> None:
    state, _ = run(training(), e.Tick(50), e.Invited(2, 1, W1, 200.0))
    assert next_due(state) == 120  # twice the deadline of the first
    state, actions = run(state, e.Tick(120))
    assert actions == [e.StopTraining(1)]
    _, actions = run(state, e.TrainFailed(1), e.Tick(130))
    assert e.Train(2) not in actions  # it declined: what made it fail may hold on


def test_an_update_is_resent_until_its_receipt_and_dropped_once() -> None:
    state, _ = run(training(), e.Trained(1), e.Sent(b"u1", 1))
    assert next_due(state) == session.RESEND_FIRST_S
    state, actions = run(state, e.Tick(20), e.Tick(40))
    assert actions == [e.Resend(b"u1"), e.Resend(b"u1")]
    state, actions = run(state, e.Tick(45), e.Disconnected(), e.Connected())
    assert e.Resend(b"u1") in actions
    state, actions = run(state, e.Receipted(b"u1", "counted"), e.Receipted(b"u1", "counted"))
    assert actions == [e.Drop(b"u1", accepted=True)]
    assert state.unreceipted == ()


def test_a_new_roll_call_resends_what_has_no_receipt() -> None:
    state, _ = run(training(), e.Trained(1), e.Sent(b"u1", 1))
    _, actions = run(state, replace(OFFER, call=2))
    assert actions == [e.CheckIn(2, ready=True, examples=10), e.Resend(b"u1")]


def test_an_invitation_to_a_round_already_sent_resends_instead_of_training_again() -> None:
    state, _ = run(training(), e.Trained(1), e.Sent(b"u1", 1))
    state, actions = run(state, INVITE)
    assert actions == [e.Resend(b"u1")]
    state, actions = run(state, e.Receipted(b"u1", "counted"), INVITE)
    assert actions == [e.Drop(b"u1", accepted=True)]


def test_what_a_receipt_says_decides_the_residual() -> None:
    def verdict(outcome: str, counted: bytes | None = None) -> list[e.Action]:
        state, _ = run(training(), e.Trained(1), e.Sent(b"u1", 1))
        return run(state, e.Receipted(b"u1", outcome, counted))[1]

    assert verdict("late") == [e.Drop(b"u1", accepted=True)]
    assert verdict("duplicate", b"u1") == [e.Drop(b"u1", accepted=True)]
    assert verdict("duplicate", b"u0") == [e.Drop(b"u1", accepted=False)]
    assert verdict("refused") == [e.Drop(b"u1", accepted=False)]
    assert verdict("stale") == [e.Drop(b"u1", accepted=False)]


def test_a_failed_fetch_is_tried_again_later_and_a_new_offer_at_once() -> None:
    state, _ = run(ready(), replace(OFFER, version=2, model=W2))
    state, actions = run(state, e.FetchFailed("weights", W2))
    assert actions == []
    assert next_due(state) == session.RETRY_FIRST_S
    state, actions = run(state, e.Tick(session.RETRY_FIRST_S))
    assert actions == [e.Fetch("weights", W2, 0)]
    state, _ = run(state, e.FetchFailed("weights", W2))
    _, actions = run(state, replace(OFFER, version=3, model=b"weights-3"))
    assert actions == [e.Fetch("weights", b"weights-3", 0)]


def test_refused_weights_are_not_tried_again_until_another_offer() -> None:
    state, _ = run(ready(), replace(OFFER, version=2, model=W2), e.Fetched("weights", W2))
    state, actions = run(state, e.ModelRefused(B1, W2), e.Tick(1000), OFFER)
    assert not any(isinstance(a, e.Fetch) for a in actions)
    assert state.model is not None
    assert state.model.model == W1


def test_a_switch_that_the_disk_spoiled_is_fetched_and_tried_again() -> None:
    state, _ = run(ready(), replace(OFFER, version=2, model=W2), e.Fetched("weights", W2))
    state, actions = run(state, e.SwitchFailed(B1, W2))
    assert actions == []
    state, actions = run(state, e.Tick(session.RETRY_FIRST_S))
    assert actions == [e.Fetch("bundle", B1, 0)]
    _, actions = run(state, e.Fetched("bundle", B1), e.Fetched("weights", W2))
    assert actions == [e.Fetch("weights", W2, 0), e.SwitchModel(B1, W2, 2)]


def test_an_update_found_in_the_outbox_at_start_is_sent_at_the_first_connection() -> None:
    state = Session(unreceipted=(session.Unreceipted(b"u0", 7),))
    _, actions = run(state, e.Connected())
    assert actions == [e.Resend(b"u0")]


# --- after a restart ----------------------------------------------------------------------------
def restarted(deadline_at: float = 60.0) -> Session:
    """A device that was killed in round 1, with model 1 in use, started again at 0 s."""
    return Session(
        min_examples=5,
        bundle=B1,
        weights=W1,
        model=e.ModelReady(B1, W1, 1),
        round=session.Round(INVITE, deadline_at, resumed_at=0.0),
    )


HOLD = e.ConditionsChanged(hold=True, examples=10)


def test_a_restarted_device_goes_on_with_its_round_once_the_offer_says_that_it_stands() -> None:
    state, actions = run(restarted(), e.Tick(0), HOLD, e.Connected())
    assert actions == []
    state, actions = run(state, OFFER)
    assert actions == [e.Train(1), READY]
    _, actions = run(state, INVITE)  # the coordinator asks again whoever checks in
    assert actions == []


def test_out_of_reach_of_the_broker_it_goes_on_after_a_while() -> None:
    state, actions = run(restarted(), e.Tick(0), HOLD)
    assert (actions, next_due(state)) == ([], session.OFFER_PATIENCE_S)
    _, actions = run(state, e.Tick(session.OFFER_PATIENCE_S))
    assert actions == [e.Train(1)]


def test_a_round_whose_version_was_replaced_meanwhile_is_abandoned_once() -> None:
    state, actions = run(restarted(), HOLD, e.Connected(), replace(OFFER, version=2, model=W2))
    assert actions.count(e.Abandon(1)) == 1
    assert actions.count(no("version", 1)) == 1
    _, actions = run(state, e.Tick(100), e.Disconnected(), e.Connected())
    assert e.Abandon(1) not in actions
    assert no("version", 1) not in actions


def test_a_round_whose_deadline_passed_is_abandoned_once_and_said_once_there_is_a_way() -> None:
    state, actions = run(restarted(deadline_at=-5.0), e.Tick(0), HOLD, e.Tick(30))
    assert actions == [e.Abandon(1)]
    state, actions = run(state, e.Connected(), OFFER)
    assert actions == [no("deadline", 1), READY]
    _, actions = run(state, e.Disconnected(), e.Connected(), OFFER)
    assert actions == [READY]


def test_a_restarted_device_whose_conditions_do_not_hold_declines() -> None:
    state, actions = run(restarted(), e.ConditionsChanged(hold=False, examples=10))
    assert actions == []
    _, actions = run(state, e.Connected(), OFFER)
    assert actions == [e.Abandon(1), no("conditions", 1)]


def test_an_invitation_that_comes_again_brings_the_deadline_that_holds() -> None:
    state, _ = run(restarted(deadline_at=12.0), e.Tick(5), HOLD, replace(INVITE, deadline_s=50.0))
    assert state.round is not None
    assert state.round.deadline_at == 55.0


def test_a_round_that_was_gone_on_with_makes_way_for_a_newer_invitation_at_once() -> None:
    state, _ = run(restarted(), e.Tick(0), HOLD, e.Connected(), OFFER)
    state, actions = run(state, e.Invited(2, 1, W1, 60.0))
    assert actions == [e.StopTraining(1)]
    _, actions = run(state, e.TrainFailed(1))
    assert actions == [e.Abandon(1), e.Train(2)]


def test_refused_weights_keep_a_device_out_of_their_rounds_alone() -> None:
    state = ready()._replace(refused=(W2,))
    state, actions = run(state, replace(OFFER, version=2, model=W2))
    assert actions == [no("bad-model")]
    assert not state.is_ready
    _, actions = run(state, replace(OFFER, version=3, model=b"w3"), e.Fetched("weights", b"w3"))
    assert e.SwitchModel(B1, b"w3", 3) in actions


# --- any order ----------------------------------------------------------------------------------
ROUNDS = st.integers(1, 4)
WEIGHTS = st.sampled_from([W1, W2])
UPDATES = st.sampled_from([b"u1", b"u2", b"u3"])
WHATS: Any = st.sampled_from(["bundle", "weights"])
OUTCOMES = st.sampled_from(["counted", "late", "stale", "refused", "duplicate"])
EVENTS: st.SearchStrategy[e.Event] = st.one_of(
    st.builds(e.Tick, st.floats(0, 5000)),
    st.just(e.Connected()),
    st.just(e.Disconnected()),
    st.builds(e.ConditionsChanged, st.booleans(), st.integers(0, 10)),
    st.builds(
        e.Offered,
        st.integers(1, 3),
        ROUNDS,
        st.integers(1, 3),
        st.just(B1),
        WEIGHTS,
        st.just(1),
        st.just(1),
        st.booleans(),
    ),
    st.builds(e.Invited, ROUNDS, st.integers(1, 3), WEIGHTS, st.floats(1, 100)),
    st.builds(e.Fetched, WHATS, st.sampled_from([B1, W1, W2])),
    st.builds(e.FetchFailed, WHATS, st.sampled_from([B1, W1, W2])),
    st.builds(e.ModelReady, st.just(B1), WEIGHTS, st.integers(1, 3)),
    st.builds(e.ModelRefused, st.just(B1), WEIGHTS),
    st.builds(e.SwitchFailed, st.just(B1), WEIGHTS),
    st.builds(e.Trained, ROUNDS),
    st.builds(e.TrainFailed, ROUNDS),
    st.builds(e.Sent, UPDATES, ROUNDS),
    st.builds(e.Receipted, UPDATES, OUTCOMES, st.none() | UPDATES),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(EVENTS, max_size=60), st.booleans())
def test_in_any_order_of_events_the_session_keeps_its_promises(
    events: list[e.Event],
    is_restarted: bool,
) -> None:
    state = restarted() if is_restarted else Session(min_examples=5)
    at_work: int | None = None
    for event in events:
        before = state
        state, actions = step(state, event)
        if isinstance(event, e.Trained | e.TrainFailed) and event.round == at_work:
            at_work = None
        for action in actions:
            match action:
                case e.Train(round_):
                    assert at_work is None, "one training at a time"
                    assert state.may_train
                    assert state.examples >= 5
                    at_work = round_
                case e.Submit(round_):
                    assert event == e.Trained(round_)
                case e.CheckIn(ready=True):
                    assert state.is_online
                    assert state.is_ready
                case e.CheckIn() | e.Fetch() | e.Resend():
                    assert state.is_online
                case e.Abandon(round_):
                    assert at_work is None, "nothing is forgotten of a training under way"
                    assert state.round is None or state.round.invite.round != round_
                case e.Drop(update):
                    assert update in {u.update for u in before.unreceipted}
                    assert update not in {u.update for u in state.unreceipted}
        assert state.now >= before.now
        due = next_due(state)
        assert due is None or due > state.now or state.unreceipted or not state.is_online


@settings(max_examples=200, deadline=None)
@given(st.lists(EVENTS, max_size=30))
def test_whatever_happened_before_a_calm_device_takes_part_again(events: list[e.Event]) -> None:
    state, _ = run(Session(min_examples=5), *events)
    state, _ = run(state, e.Tick(10_000), e.Connected(), e.ConditionsChanged(hold=True, examples=9))
    w9 = b"weights-9"
    state, actions = run(state, e.Offered(9, 9, 9, B1, w9))
    for _ in range(10):
        state, actions = _obey(state, actions)
    assert state.model == e.ModelReady(B1, w9, 9)
    assert state.stands == e.CheckIn(9, ready=True, examples=9)
    _, actions = run(state, e.Invited(9, 9, w9, 60.0))
    assert e.Train(9) in actions


def _obey(state: Session, actions: list[e.Action]) -> tuple[Session, list[e.Action]]:
    answers: list[e.Event] = [e.Tick(state.now + 700)]
    if state.round is not None:
        answers.append(e.Trained(state.round.invite.round))
        answers.append(e.Sent(b"u9", state.round.invite.round))
    for action in actions:
        match action:
            case e.Fetch(what, digest):
                answers.append(e.Fetched(what, digest))
            case e.SwitchModel(bundle, model, version):
                answers.append(e.ModelReady(bundle, model, version))
    if state.switching is not None:
        answers.append(e.ModelReady(*_parts(state.switching)))
    return run(state, *answers)


def _parts(switch: e.SwitchModel) -> tuple[bytes, bytes, int]:
    return switch.bundle, switch.model, switch.version


def test_an_update_whose_receipt_the_disk_did_not_take_is_sent_again() -> None:
    state, _ = run(training(), e.Trained(1), e.Sent(b"u", 1))
    state, actions = run(state, e.Receipted(b"u", "counted"), e.DropFailed(b"u", 1))
    assert e.Drop(b"u", accepted=True) in actions
    _, actions = run(state, e.Tick(state.now + session.RESEND_FIRST_S))
    assert e.Resend(b"u") in actions
