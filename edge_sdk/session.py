# SPDX-License-Identifier: Apache-2.0
"""The device's side of the protocol as a pure state machine: ``step(state, event)``.

Each event changes what is known; one plan then says what to do about it, so that the order in
which the network delivers things does not matter. One round at a time: an invitation to a newer
round waits until the current one is sent, or replaces it when that one is long overdue. Pure: no
clock (a `Tick` carries the time), socket, thread, file or log.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from enum import Enum
from typing import NamedTuple

from edge_sdk.events import (
    Abandon,
    Action,
    BundleRefused,
    CheckIn,
    ConditionsChanged,
    Connected,
    Disconnected,
    Drop,
    DropFailed,
    Event,
    Fetch,
    Fetched,
    FetchFailed,
    Invited,
    ModelReady,
    ModelRefused,
    Offered,
    Receipted,
    Resend,
    Sent,
    StopTraining,
    Submit,
    SwitchFailed,
    SwitchModel,
    Tick,
    Train,
    Trained,
    TrainFailed,
)

RESEND_FIRST_S = 20.0
RESEND_LONGEST_S = 600.0
RETRY_FIRST_S = 5.0
RETRY_LONGEST_S = 600.0
CHECK_IN_AGAIN_S = 900.0  # a broker may lose a check-in that it acknowledged
REFUSED_KEPT = 8
OFFER_PATIENCE_S = 10.0  # after a restart, for word of whether the round that we were at goes on


_CODES = {"max_bytes_per_day": "limits", "max_minutes_per_day": "limits", "disk": "disk"}
"""What else lapses than the application's conditions, as a decline says it."""


class Phase(Enum):
    """Where the round under way stands."""

    INVITED = "invited"
    TRAINING = "training"
    STOPPING = "stopping"
    SUBMITTING = "submitting"


@dataclass(frozen=True, slots=True)
class Round:
    """The round under way, or the one that waits its turn."""

    invite: Invited
    deadline_at: float
    phase: Phase = Phase.INVITED
    resumed_at: float | None = None
    """When the process started that found the round begun by the one before it."""


@dataclass(frozen=True, slots=True)
class Unreceipted:
    """An update in the outbox, and when to send it again."""

    update: bytes
    round: int
    due_at: float = 0.0
    wait_s: float = RESEND_FIRST_S


@dataclass(frozen=True, slots=True)
class Retry:
    """Something failed: when it may be tried again, and how long to wait after the next failure."""

    at: float = 0.0
    wait_s: float = RETRY_FIRST_S

    def after(self, now: float) -> Retry:
        """Return the state after one more failure."""
        return Retry(now + self.wait_s, min(2 * self.wait_s, RETRY_LONGEST_S))


class Session(NamedTuple):
    """All that the device knows of its dealings with the coordinator.

    A tuple: each event makes a new one, and copying many fields must be cheap.
    """

    device: str = ""
    min_examples: int = 1
    now: float = 0.0
    is_online: bool = False
    may_train: bool = False
    lapsed: tuple[str, ...] = ()  # the conditions that do not hold
    examples: int = 0
    offer: Offered | None = None
    stands: CheckIn | None = None
    stands_at: float = 0.0
    answer_at: float = 0.0  # our moment in the spread of the roll call
    rest_until: float = 0.0  # no round will need us before
    bundle: bytes = b""  # on disk
    weights: bytes = b""  # on disk
    model: ModelReady | None = None  # in use
    fetching: Fetch | None = None
    switching: SwitchModel | None = None
    refused: tuple[bytes, ...] = ()  # weights that made no working model: not tried again
    refused_bundle: bytes = b""  # will not run here: its offers are declined
    fetch_retry: Retry = Retry()
    train_retry: Retry = Retry()
    round: Round | None = None
    following: Round | None = None
    declined: bool = False
    declined_for: str = ""
    """Why, in one of `messages.REASONS`."""
    declined_round: int = 0
    sent_round: int = -1
    unreceipted: tuple[Unreceipted, ...] = ()

    @property
    def is_ready(self) -> bool:
        """Whether an invitation would be taken up now."""
        return (
            self.can_train
            and self.offer is not None
            and self.model is not None
            and self.model.bundle == self.offer.bundle
            and self.offer.model not in self.refused
        )

    @property
    def can_train(self) -> bool:
        """Whether nothing here stands against training now."""
        return (
            self.may_train
            and self.examples >= self.min_examples
            and self.now >= self.train_retry.at
        )


def step(state: Session, event: Event) -> tuple[Session, tuple[Action, ...]]:
    """Take in one event; return the new state and what to do, in order."""
    state, first = _learn(state, event)
    actions = list(first)
    for plan in (_plan_model, _plan_round, _plan_check_in, _plan_resend):
        state, more = plan(state)
        actions += more
    return state, tuple(actions)


def next_due(state: Session) -> float | None:
    """Return when a `Tick` would next change something; None when nothing waits for time."""
    times = [u.due_at for u in state.unreceipted if state.is_online]
    times += [retry.at for retry in (state.fetch_retry, state.train_retry) if retry.at > state.now]
    if state.stands is not None and state.stands.ready:
        times.append(max(state.stands_at + CHECK_IN_AGAIN_S, state.rest_until))
    elif state.now < (at := max(state.answer_at, state.rest_until)):
        times.append(at)
    if state.round is not None and state.round.phase is Phase.INVITED:
        times.append(state.round.deadline_at)
        if state.round.resumed_at is not None and state.offer is None:
            times.append(state.round.resumed_at + OFFER_PATIENCE_S)
    elif state.round is not None and state.round.phase is Phase.TRAINING and state.following:
        times.append(_overdue_at(state.round))
    return min(times, default=None)


# --- what an event changes ----------------------------------------------------------------------
def _learn(state: Session, event: Event) -> tuple[Session, tuple[Action, ...]]:  # noqa: PLR0911
    match event:
        case Offered():
            return _offered(state, event), ()
        case Invited():
            return _invited(state, event), ()
        case Fetched() | FetchFailed():
            return _fetch_ended(state, event), ()
        case ModelReady() | ModelRefused() | SwitchFailed():
            return _switch_ended(state, event), ()
        case BundleRefused(bundle):
            return _bundle_refused(state, bundle), ()
        case Trained():
            return _trained(state, event)
        case TrainFailed():
            return _train_failed(state, event)
        case Receipted():
            return _receipted(state, event)
        case _:
            return _surroundings(state, event), ()


def _surroundings(
    state: Session,
    event: Tick | Connected | Disconnected | ConditionsChanged | Sent | DropFailed,
) -> Session:
    match event:
        case Tick(now):
            return state._replace(now=max(now, state.now))
        case Connected():
            return _roll_called(state._replace(is_online=True), state.offer)
        case Disconnected():
            return state._replace(is_online=False, stands=None)
        case ConditionsChanged(hold, examples, lapsed):
            return state._replace(may_train=hold, examples=examples, lapsed=lapsed)
        case Sent():
            return _sent(state, event)
        case DropFailed(update, round_):  # sent again it is a duplicate, and settled then
            waiting = Unreceipted(update, round_, state.now + RESEND_FIRST_S)
            return state._replace(unreceipted=(*state.unreceipted, waiting))


def _all_due(state: Session, at: float) -> Session:
    due = tuple(replace(u, due_at=at, wait_s=RESEND_FIRST_S) for u in state.unreceipted)
    return state._replace(unreceipted=due)


def _roll_called(state: Session, offer: Offered | None) -> Session:
    """Say all again that may have been forgotten, at our own moment: a fleet does so at once."""
    at = _answer_at(state, offer)
    return _all_due(state._replace(stands=None, answer_at=at), at)


def _answer_at(state: Session, offer: Offered | None) -> float:
    if offer is None:
        return state.now
    return state.now + moment(state.device, offer.call) * offer.spread_s


def moment(device: str, call: int) -> float:
    """Return when in the spread of a roll call a device answers, from 0 up to 1."""
    drawn = hashlib.sha256(f"{device}\0{call}".encode()).digest()[:8]
    return int.from_bytes(drawn, "big") / 2**64


def _offered(state: Session, offer: Offered) -> Session:
    known = state.offer
    if known is None:
        state = state._replace(answer_at=_answer_at(state, offer))
    elif known.call != offer.call:  # the coordinator started anew
        state = _roll_called(state, offer)
    if known is None or (known.bundle, known.model) != (offer.bundle, offer.model):
        state = state._replace(fetch_retry=Retry())
    return state._replace(offer=offer)


def _invited(state: Session, invite: Invited) -> Session:
    if any(u.round == invite.round for u in state.unreceipted):  # it has not seen our update
        return _all_due(state, state.now)
    if invite.round == state.sent_round:
        return state
    fresh = Round(invite, state.now + invite.deadline_s)
    current = state.round
    if current is None or (current.phase is Phase.INVITED and _is_news(current, invite)):
        is_again = current is not None and current.invite.round == invite.round
        since = current.resumed_at if current is not None and is_again else None
        return state._replace(round=replace(fresh, resumed_at=since))
    waiting = state.following.invite.round if state.following else current.invite.round
    return state._replace(following=fresh) if invite.round > waiting else state


def _fetch_ended(state: Session, event: Fetched | FetchFailed) -> Session:
    wanted = state.fetching
    if wanted is None or (wanted.what, wanted.digest) != (event.what, event.digest):
        return state
    state = state._replace(fetching=None)
    if isinstance(event, FetchFailed):
        return state._replace(fetch_retry=state.fetch_retry.after(state.now))
    state = state._replace(fetch_retry=Retry())
    if event.what == "bundle":
        return state._replace(bundle=event.digest)
    return state._replace(weights=event.digest)


def _switch_ended(state: Session, event: ModelReady | ModelRefused | SwitchFailed) -> Session:
    state = state._replace(switching=None)
    if isinstance(event, SwitchFailed):
        retry = state.fetch_retry.after(state.now)
        return state._replace(bundle=b"", weights=b"", fetch_retry=retry)
    if isinstance(event, ModelReady):
        return state._replace(model=event, bundle=event.bundle, weights=event.model)
    refused = tuple(weights for weights in state.refused if weights != event.model)
    return state._replace(refused=(*refused, event.model)[-REFUSED_KEPT:])


def _bundle_refused(state: Session, bundle: bytes) -> Session:
    fetching, switching = state.fetching, state.switching
    if fetching is not None and fetching.digest == bundle:
        fetching = None
    if switching is not None and switching.bundle == bundle:
        switching = None
    return state._replace(fetching=fetching, switching=switching, refused_bundle=bundle)


def _trained(state: Session, event: Trained) -> tuple[Session, tuple[Action, ...]]:
    current = state.round
    if current is None or current.invite.round != event.round or not _is_training(current):
        return state, ()
    submitting = replace(current, phase=Phase.SUBMITTING)
    return state._replace(round=submitting), (Submit(event.round),)


def _train_failed(state: Session, event: TrainFailed) -> tuple[Session, tuple[Action, ...]]:
    current = state.round
    if current is None or current.invite.round != event.round:
        return state, ()
    was_resumed = current.resumed_at is not None
    if was_resumed and current.phase is Phase.STOPPING and state.following is not None:
        return state._replace(round=None), (Abandon(event.round),)  # it made way for a newer one
    state = state._replace(train_retry=state.train_retry.after(state.now))
    state, actions = _give_up(state, event.round, why_not(state, trained=True))
    return state, tuple(actions)


def _sent(state: Session, event: Sent) -> Session:
    waiting = Unreceipted(event.update, event.round, state.now + RESEND_FIRST_S)
    state = state._replace(
        unreceipted=(*state.unreceipted, waiting),
        sent_round=event.round,
        train_retry=Retry(),
    )
    if state.round is not None and state.round.invite.round == event.round:
        state = state._replace(round=None)
    return state


def _receipted(state: Session, event: Receipted) -> tuple[Session, tuple[Action, ...]]:
    left = tuple(u for u in state.unreceipted if u.update != event.update)
    if len(left) == len(state.unreceipted):
        return state, ()
    is_counted = event.outcome == "duplicate" and event.counted == event.update
    accepted = event.outcome in {"counted", "late"} or is_counted
    rest_until = max(state.rest_until, state.now + event.rest_s)
    state = state._replace(unreceipted=left, rest_until=rest_until)
    return state, (Drop(event.update, accepted),)


# --- what to do about it ------------------------------------------------------------------------
def _plan_model(state: Session) -> tuple[Session, list[Action]]:
    offer = state.offer
    if offer is None or state.switching is not None or not _wants(state, offer):
        return state, []
    if state.bundle != offer.bundle:
        return _fetch(state, Fetch("bundle", offer.bundle, offer.bundle_size))
    if state.weights != offer.model:
        return _fetch(state, Fetch("weights", offer.model, offer.model_size))
    switch = SwitchModel(offer.bundle, offer.model, offer.version)
    return state._replace(switching=switch), [switch]


def _wants(state: Session, offer: Offered) -> bool:
    if offer.model in state.refused or offer.bundle == state.refused_bundle:
        return False
    model = state.model
    return model is None or (model.bundle, model.model, model.version) != (
        offer.bundle,
        offer.model,
        offer.version,
    )


def _fetch(state: Session, fetch: Fetch) -> tuple[Session, list[Action]]:
    if state.fetching == fetch or not state.is_online or state.now < state.fetch_retry.at:
        return state, []
    return state._replace(fetching=fetch), [fetch]


def _plan_round(state: Session) -> tuple[Session, list[Action]]:
    if state.round is None and state.following is not None:
        state = state._replace(round=state.following, following=None)
    current = state.round
    if current is None:
        return state, []
    if current.phase is Phase.INVITED:
        return _take_up(state, current)
    is_abandoned = state.following is not None and state.now >= _overdue_at(current)
    if current.phase is Phase.TRAINING and (is_abandoned or not state.may_train):
        stopping = replace(current, phase=Phase.STOPPING)
        return state._replace(round=stopping), [StopTraining(current.invite.round)]
    return state, []


def _take_up(state: Session, current: Round) -> tuple[Session, list[Action]]:
    model, offer, invite = state.model, state.offer, current.invite
    newest = max([known.version for known in (model, offer) if known is not None], default=0)
    is_settled = offer is not None and invite.round < offer.round  # without a version of its own
    if newest > invite.version or is_settled or state.now >= current.deadline_at:
        why = "version" if newest > invite.version else "deadline"
        return _give_up(state, invite.round, why)
    if offer is None and current.resumed_at is not None:
        if state.now < current.resumed_at + OFFER_PATIENCE_S:
            return state, []  # it says whether the round goes on
        is_ready = state.can_train
    else:
        is_ready = state.is_ready
    if not is_ready:
        return _give_up(state, invite.round, why_not(state))
    if model is None or model.model != invite.model:
        return state, []  # its weights are on the way
    training = replace(current, phase=Phase.TRAINING)
    return state._replace(round=training), [Train(invite.round)]


def _give_up(state: Session, round_: int, why: str) -> tuple[Session, list[Action]]:
    """Let go of the round under way, and say so, that nobody waits for us in vain."""
    state = state._replace(round=None, declined=True, declined_for=why, declined_round=round_)
    return state, [Abandon(round_)]


def why_not(state: Session, *, trained: bool = False) -> str:  # noqa: PLR0911 - one line a reason
    """Return why no invitation is taken up now: one of `messages.REASONS`, or nothing."""
    offer, model = state.offer, state.model
    if offer is not None and offer.bundle == state.refused_bundle:
        return "bad-bundle"
    if offer is not None and offer.model in state.refused:
        return "bad-model"
    if state.lapsed or not state.may_train:
        return next((_CODES[name] for name in state.lapsed if name in _CODES), "conditions")
    if state.examples < state.min_examples:
        return "examples"
    if trained:
        return "no-update"
    if state.now < state.train_retry.at:
        return "failed"
    return "" if offer and model and model.bundle == offer.bundle else "no-model"


def _plan_check_in(state: Session) -> tuple[Session, list[Action]]:
    offer, declined = state.offer, state.declined
    if offer is None or not offer.is_open or not state.is_online:
        return state if state.stands is None else state._replace(stands=None), []
    state = state._replace(declined=False) if declined else state
    ready, stands = state.is_ready, state.stands
    is_old = stands is not None and state.now >= state.stands_at + CHECK_IN_AGAIN_S
    stood = stands is not None and stands.ready
    if not (declined or ready != stood or (ready and is_old)):
        return state, []
    if ready and not declined and state.now < max(state.answer_at, state.rest_until):
        return state, []  # neither at once with everybody, nor before a round can need us
    why = (declined and state.declined_for) or why_not(state)
    yes = CheckIn(offer.call, ready=True, examples=state.examples)
    of = state.declined_round if declined else 0
    no = replace(yes, ready=False, reason=why, round=of)
    said = [yes if is_in else no for is_in in _standings(ready, declined)]
    return state._replace(stands=said[-1], stands_at=state.now), [*said]


def _standings(ready: bool, declined: bool) -> list[bool]:
    """Return what to say, in order: no to this invitation, and whether the next one is welcome."""
    return [False, True] if declined and ready else [ready]


def _plan_resend(state: Session) -> tuple[Session, list[Action]]:
    if not state.is_online:
        return state, []
    due = [u for u in state.unreceipted if u.due_at <= state.now]
    if not due:
        return state, []
    later = tuple(_again(u, state.now) if u in due else u for u in state.unreceipted)
    return state._replace(unreceipted=later), [Resend(u.update) for u in due]


def _again(u: Unreceipted, now: float) -> Unreceipted:
    return replace(u, due_at=now + u.wait_s, wait_s=min(2 * u.wait_s, RESEND_LONGEST_S))


def _is_news(current: Round, invite: Invited) -> bool:
    """Whether an invitation takes the place of one that nothing was done about yet."""
    is_again = invite.round == current.invite.round and current.resumed_at is not None
    return is_again or invite.round > current.invite.round


def _is_training(current: Round) -> bool:
    return current.phase in {Phase.TRAINING, Phase.STOPPING}


def _overdue_at(current: Round) -> float:
    """Return when a newer invitation ends a training: at once if the process before began it."""
    if current.resumed_at is not None:
        return current.resumed_at
    return current.deadline_at + current.invite.deadline_s
