# SPDX-License-Identifier: Apache-2.0
"""What can happen to a device in its dealings with a coordinator, and what it may do about it.

Events go into `edge_sdk.session.step`, actions come out of it. Both are plain frozen values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

What: TypeAlias = Literal["bundle", "weights"]


@dataclass(frozen=True, slots=True)
class Tick:
    """It is `now` seconds on the device's monotonic clock."""

    now: float


@dataclass(frozen=True, slots=True)
class Connected:
    """The broker is reached; what the coordinator heard of us before may be forgotten."""


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The broker is out of reach."""


@dataclass(frozen=True, slots=True)
class ConditionsChanged:
    """Whether the conditions hold now, and how many labelled examples are stored."""

    hold: bool
    examples: int
    lapsed: tuple[str, ...] = ()
    """Those that do not."""


@dataclass(frozen=True, slots=True)
class Offered:
    """The coordinator's standing offer: which model is current, and in which roll call."""

    call: int
    round: int
    version: int
    bundle: bytes
    model: bytes
    bundle_size: int = 0
    model_size: int = 0
    is_open: bool = True
    spread_s: float = 0.0
    """Over how long devices answer a new call."""


@dataclass(frozen=True, slots=True)
class Invited:
    """We are in the cohort of a round that starts from the weights `model`."""

    round: int
    version: int
    model: bytes
    deadline_s: float


@dataclass(frozen=True, slots=True)
class Fetched:
    """A bundle or weights are on disk and have the digest that was asked for."""

    what: What
    digest: bytes


@dataclass(frozen=True, slots=True)
class FetchFailed:
    """A fetch stalled or what came was damaged: try again later."""

    what: What
    digest: bytes
    reason: str = ""


@dataclass(frozen=True, slots=True)
class ModelReady:
    """Predictions now come from these weights."""

    bundle: bytes
    model: bytes
    version: int


@dataclass(frozen=True, slots=True)
class ModelRefused:
    """These weights do not make a working model here: stay with the last good one."""

    bundle: bytes
    model: bytes
    reason: str = ""


@dataclass(frozen=True, slots=True)
class BundleRefused:
    """This device will not run the bundle: nothing of it is fetched, and no round of it joined."""

    bundle: bytes
    reason: str = ""


@dataclass(frozen=True, slots=True)
class SwitchFailed:
    """The disk did not give or take what a switch needs: fetch it again, later."""

    bundle: bytes
    model: bytes
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Trained:
    """The round's training ended with a delta worth sending."""

    round: int
    figures: Mapping[str, object] = field(default_factory=dict)
    """What it did, for whoever asks."""


@dataclass(frozen=True, slots=True)
class TrainFailed:
    """The round's training, or putting its update away, failed."""

    round: int
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Sent:
    """An update is in the outbox, and on its way if we are online."""

    update: bytes
    round: int


@dataclass(frozen=True, slots=True)
class DropFailed:
    """The disk did not take what a receipt settled: the update is still in the outbox."""

    update: bytes
    round: int


@dataclass(frozen=True, slots=True)
class Receipted:
    """The coordinator's last word on an update; `counted` names the one that it counted."""

    update: bytes
    outcome: str
    counted: bytes | None = None
    rest_s: float = 0.0
    """How long no round will need us."""
    reason: str = ""


Event: TypeAlias = (
    Tick
    | Connected
    | Disconnected
    | ConditionsChanged
    | Offered
    | Invited
    | Fetched
    | FetchFailed
    | ModelReady
    | ModelRefused
    | BundleRefused
    | SwitchFailed
    | Trained
    | TrainFailed
    | Sent
    | DropFailed
    | Receipted
)


@dataclass(frozen=True, slots=True)
class CheckIn:
    """Tell the coordinator whether we may be invited. Not ready also declines an invitation."""

    call: int
    ready: bool
    examples: int
    reason: str = ""
    """Why not: one of `messages.REASONS`."""
    round: int = 0
    """The round that is declined, and no other; 0 for whichever it is."""


@dataclass(frozen=True, slots=True)
class Fetch:
    """Bring a bundle or weights to disk; replaces any fetch under way."""

    what: What
    digest: bytes
    size: int


@dataclass(frozen=True, slots=True)
class SwitchModel:
    """Make predictions come from these weights, both parts being on disk."""

    bundle: bytes
    model: bytes
    version: int


@dataclass(frozen=True, slots=True)
class Train:
    """Train for this round, from the model in use."""

    round: int


@dataclass(frozen=True, slots=True)
class StopTraining:
    """End the training under way; what it has so far may still be sent."""

    round: int


@dataclass(frozen=True, slots=True)
class Submit:
    """Encode the delta of this round, put it in the outbox, send it."""

    round: int


@dataclass(frozen=True, slots=True)
class Abandon:
    """This round gets no update of ours: forget what was kept of it. The coordinator is told."""

    round: int


@dataclass(frozen=True, slots=True)
class Resend:
    """Send this update again: no receipt has come."""

    update: bytes


@dataclass(frozen=True, slots=True)
class Drop:
    """Settled: take the update out of the outbox and commit or roll back its residual."""

    update: bytes
    accepted: bool


Action: TypeAlias = (
    CheckIn | Fetch | SwitchModel | Train | StopTraining | Submit | Abandon | Resend | Drop
)
