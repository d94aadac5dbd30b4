# SPDX-License-Identifier: Apache-2.0
"""What the journal of a device says: each step of its session as facts, facts as lines. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

from edge_sdk import events as ev
from edge_sdk.session import Phase, Round, Session

Entry: TypeAlias = dict[str, Any]
"""One fact: `what` happened, and what is known of it."""


def entries(
    before: Session, event: ev.Event, after: Session, actions: tuple[ev.Action, ...]
) -> list[Entry]:
    """Return what a technician would want to know of one step of the session, in order."""
    found = [*_happened(before, event)]
    seen = before
    if isinstance(event, ev.Invited) and before.round is None:  # taken up in this very step
        seen = before._replace(round=Round(event, before.now + event.deadline_s))
    found += [entry for action in actions for entry in _done(seen, after, action)]
    if after.offer is not None and _stance(before) != _stance(after):
        ready, reasons = after.is_ready, list(_stance(after))
        found.append({"what": "ready"} if ready else {"what": "not ready", "reasons": reasons})
    return found


def reasons(state: Session) -> Iterator[str]:
    """Say what stands against taking part in a round now."""
    offer, model = state.offer, state.model
    yield from state.lapsed
    if state.examples < state.min_examples:
        yield f"{state.examples} of {state.min_examples} examples"
    if state.now < state.train_retry.at:
        yield "a training failed a moment ago"
    if offer is None:
        yield "no offer was heard"
    elif offer.bundle == state.refused_bundle:
        yield "the task's bundle is refused here"
    elif offer.model in state.refused:
        yield "the task's model does not work here"
    elif model is None or model.bundle != offer.bundle:
        yield "the task's bundle is not here yet"


def _stance(state: Session) -> tuple[str, ...]:
    if state.is_ready:
        return ()
    return tuple(reasons(state)) or ("not ready",)


def _happened(before: Session, event: ev.Event) -> Iterator[Entry]:  # noqa: C901, PLR0912 - one line a fact
    match event:
        case ev.Connected():
            yield {"what": "online"}
        case ev.Disconnected():
            yield {"what": "offline"}
        case ev.Offered():
            yield from _passed_over(before, event)
        case ev.Invited():
            yield {
                "what": "invited",
                "round": event.round,
                "version": event.version,
                "deadline_s": round(event.deadline_s, 1),
            }
        case ev.Fetched():
            yield {"what": "fetched", "of": event.what}
        case ev.FetchFailed():
            yield {"what": "fetch failed", "of": event.what, "reason": event.reason}
        case ev.ModelReady():
            yield {"what": "model", "version": event.version}
        case ev.ModelRefused():
            yield {"what": "model refused", "reason": event.reason}
        case ev.BundleRefused() if event.bundle != before.refused_bundle:
            yield {"what": "bundle refused", "reason": event.reason}
        case ev.SwitchFailed():
            yield {"what": "model not switched", "reason": event.reason}
        case ev.Trained():
            yield {"what": "trained", "round": event.round, **(event.figures or {})}
        case ev.TrainFailed():
            yield {"what": "training failed", "round": event.round, "reason": event.reason}
        case ev.Sent():
            yield {"what": "sent", "round": event.round}
        case ev.Receipted():
            yield from _receipt(before, event)


def _passed_over(before: Session, offer: ev.Offered) -> Iterator[Entry]:
    """Tell of a round that went by without us though we were ready for it."""
    last, stands = before.offer, before.stands
    if last is None or offer.round <= last.round or stands is None or not stands.ready:
        return
    ours = {u.round for u in before.unreceipted} | {before.sent_round}
    ours |= {r.invite.round for r in (before.round, before.following) if r is not None}
    if last.round not in ours and last.call == offer.call:
        yield {"what": "not invited", "round": last.round}


def _receipt(before: Session, event: ev.Receipted) -> Iterator[Entry]:
    known = next((u for u in before.unreceipted if u.update == event.update), None)
    if known is None:
        return
    entry: Entry = {"what": "receipt", "round": known.round, "outcome": event.outcome}
    if event.reason:
        entry["reason"] = event.reason
    if event.rest_s:
        entry["rest_s"] = round(event.rest_s, 1)
    yield entry


def _done(before: Session, after: Session, action: ev.Action) -> Iterator[Entry]:
    match action:
        case ev.Fetch():
            yield {"what": "fetch", "of": action.what, "bytes": action.size}
        case ev.Train(round_):
            yield {"what": "training", "round": round_}
        case ev.StopTraining(round_):
            why = list(after.lapsed) or ["a later round waits"]
            yield {"what": "training stopped", "round": round_, "reasons": why}
        case ev.Resend(update):
            known = next((u for u in after.unreceipted if u.update == update), None)
            yield {"what": "sent again", "round": known.round if known else None}
        case ev.Abandon(round_):
            yield {
                "what": "declined",
                "round": round_,
                "reasons": list(_against(before, after, round_)),
            }


def _against(before: Session, after: Session, round_: int) -> Iterator[str]:
    """Say why a round was let go."""
    current = next(
        (r for r in (before.round, before.following) if r and r.invite.round == round_), None
    )
    if current is not None and current.phase is not Phase.INVITED:
        yield "its training gave no update"
        return
    newest = [known.version for known in (after.model, after.offer) if known is not None]
    if current is not None and after.now >= current.deadline_at:
        yield "its deadline had passed"
    elif current is not None and max(newest, default=0) > current.invite.version:
        yield f"version {max(newest)} is current, the round trains version {current.invite.version}"
    yield from reasons(after)


# --- lines --------------------------------------------------------------------------------------
_LINES = {
    "started": "fedge started",
    "online": "the broker has us",
    "offline": "the broker is out of reach",
    "ready": "ready for a round",
    "not ready": "not ready",
    "not invited": "was ready and not invited: others made up the cohort",
    "invited": "invited: from version {version}, within {deadline_s:g} s",
    "declined": "declined",
    "training": "training",
    "training stopped": "training stopped",
    "trained": "trained {steps} steps in {seconds:g} s, loss {loss:g}, stopped by {stopped_by}",
    "training failed": "training failed",
    "sent": "update in the outbox and sent",
    "sent again": "update sent again: no receipt came",
    "receipt": "receipt: {outcome}",
    "fetch": "fetching the {of}, at most {bytes} bytes",
    "fetched": "the {of} is here",
    "fetch failed": "fetching the {of} failed",
    "model": "predicts with version {version}",
    "model refused": "model refused, the old one stays",
    "model not switched": "model not switched",
    "bundle refused": "bundle refused",
}
MEANING = {
    "counted": "it is in the next version",
    "late": "it came after its round and is folded into a later version",
    "stale": "it came too late to be of use",
    "refused": "the coordinator did not take it",
    "duplicate": "another update of this device was counted",
}


def line(entry: Mapping[str, Any]) -> str:
    """Return one fact as a technician reads it, without its time and round."""
    what = str(entry.get("what", "?"))
    try:
        said = _LINES[what].format_map(entry)
    except (KeyError, ValueError, TypeError):  # of a later version, or of an earlier one
        said = what
    why = [*entry.get("reasons", ()), *([entry["reason"]] if entry.get("reason") else [])]
    if what == "receipt" and not why and (meaning := MEANING.get(str(entry.get("outcome")))):
        why = [meaning]
    if why:
        said += ": " + ", ".join(map(str, why))
    if "bytes_up" in entry:
        said += f" ({entry['bytes_up']} bytes up, {entry['bytes_down']} down since the invitation)"
    if entry.get("rest_s"):
        said += f"; not needed for {entry['rest_s']:g} s"
    return said
