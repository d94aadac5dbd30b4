# SPDX-License-Identifier: Apache-2.0
"""The device's part of a roll call: says what its presence is, takes the offers that are news."""

from __future__ import annotations

import logging

from edge_sdk import events as ev
from edge_sdk import messages, opening, topics
from edge_sdk.messages import CheckIn, Heard, Offer
from edge_sdk.newest import Newest
from edge_sdk.presence import Presence
from edge_sdk.session import Session, why_not
from edge_sdk.signing import Identity
from edge_sdk.transport import Transport

log = logging.getLogger(__name__)


class RollCall:
    """What is said and heard of one task's calls. `version` is the model's in use; -1 is none."""

    def __init__(
        self, task: str, key: Identity, presence: Presence, transport: Transport, version: int
    ) -> None:
        self.presence, self.newest = presence, Newest(key.id, version)
        self.offer: Offer | None = None
        """The newest."""
        self._key, self._transport = key, transport
        self._topic = topics.up(task, key.id, "checkin")

    def here(self) -> None:
        """Say that the device is here."""
        self._transport.publish(*self.presence.here(), retain=True)

    def check_in(self, said: ev.CheckIn) -> None:
        """Say whether the device may be invited."""
        self._say(
            self.presence.check_in(
                said.call,
                ready=said.ready,
                examples=said.examples,
                reason=said.reason,
                number=said.round,
            )
        )

    def take(self, message: Offer | Heard, now: float) -> list[ev.Event]:
        """Take in what the coordinator says of its calls."""
        return self._offered(message, now) if isinstance(message, Offer) else self._heard(message)

    def _offered(self, offer: Offer, now: float) -> list[ev.Event]:
        if not self.newest.takes(offer, now):
            log.debug("offer passed over call=%d round=%d: it is older", offer.call, offer.round)
            return []
        return self._taken(offer)

    def _heard(self, word: Heard) -> list[ev.Event]:
        events = list[ev.Event]()
        if self.presence.heard(word):
            log.info("the count of starts was behind: %d is ours now", self.presence.boot)
            self.here()
            events.append(ev.Connected())  # what was said before was not believed
        if (offer := self.newest.answered(word, self.presence.start)) is not None:
            log.info("an older offer holds call=%d round=%d", offer.call, offer.round)
            events += self._taken(offer)
        return events

    def due_at(self, session: Session) -> float:
        """Return when `ask` has something to say."""
        return self.newest.ask_at if session.is_online else float("inf")

    def ask(self, session: Session, now: float) -> None:
        """Ask which offer holds, once it is time to, by saying once more what stands."""
        if not session.is_online or (call := self.newest.asked(now)) is None:
            return
        stands = session.stands
        is_in = session.is_ready if stands is None else stands.ready
        ready = is_in or session.round is not None  # to ask is not to decline
        said = self.presence.check_in(
            call,
            ready=ready,
            examples=session.examples,
            reason="" if ready else why_not(session),
            asks=True,
        )
        self.newest.asking(said.turn)
        self._say(said)

    def leave(self, session: Session) -> None:
        """Tell a coordinator that may count on us why we are gone in a moment.

        A round under way is not declined: the next start goes on with it.
        """
        is_told = session.is_online and session.stands is not None and session.stands.ready
        if session.offer is None or not is_told or session.round is not None:
            return
        call, examples = session.offer.call, session.examples
        self.check_in(ev.CheckIn(call, ready=False, examples=examples, reason="leaving"))

    def _taken(self, offer: Offer) -> list[ev.Event]:
        self.offer = offer
        return [opening.offered(offer)]

    def _say(self, said: CheckIn) -> None:
        self._transport.publish(self._topic, messages.encode(said, self._key, self._topic))
