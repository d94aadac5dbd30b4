# SPDX-License-Identifier: Apache-2.0
"""How a session begins: with what the last process left, and with what an offer says."""

from __future__ import annotations

from edge_sdk import events as ev
from edge_sdk.local import Local
from edge_sdk.messages import Offer
from edge_sdk.outbox import Outbox
from edge_sdk.session import Retry, Session, Unreceipted
from edge_sdk.settings import Settings
from edge_sdk.stint import Stint


def first(
    settings: Settings,
    device: str,
    *,
    now: float,
    local: Local,
    outbox: Outbox,
    stint: Stint,
) -> Session:
    """Return the session that a process begins with."""
    model, refused = local.model, local.refused
    ready = None
    if model is not None:
        parts = bytes.fromhex(model.bundle), bytes.fromhex(model.weights)
        ready = ev.ModelReady(*parts, model.version)
    unreceipted = tuple(Unreceipted(w.update, w.round) for w in outbox)
    resumed = stint.resumed(u.round for u in unreceipted)
    return Session(
        device=device,
        min_examples=settings.min_examples,
        now=now,
        bundle=ready.bundle if ready else b"",
        weights=ready.model if ready else b"",
        model=ready,
        refused=tuple(bytes.fromhex(one.model.weights) for one in local.slots.refused),
        refused_bundle=bytes.fromhex(refused["bundle"]) if refused else b"",
        unreceipted=unreceipted,
        round=resumed,
        declined=stint.has_let_go,
        declined_for="gave-up" if stint.has_let_go else "",
        train_retry=Retry() if resumed else stint.retry,
    )


def offered(offer: Offer) -> ev.Offered:
    """Return an offer as the session takes it."""
    return ev.Offered(
        call=offer.call,
        round=offer.round,
        version=offer.version,
        bundle=offer.bundle,
        model=offer.model,
        bundle_size=offer.bundle_size,
        model_size=offer.model_size,
        is_open=offer.state == "open",
        spread_s=offer.spread_s or 0.0,
    )
