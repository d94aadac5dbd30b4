# SPDX-License-Identifier: Apache-2.0
"""Which models a device has on disk, and how far it trusts them. Pure.

A version that comes is on trial: it answers, but the last one that proved itself stays beside it.
Once it has proved itself too, one write makes it the good one. A process that dies with a model on
trial counts against it; after a few deaths the next start goes back, and that model is not tried
again. Two models are kept: the good one, and the one on trial or the one before.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

REFUSED_KEPT = 8
_DIGEST_BYTES = 32


@dataclass(frozen=True, slots=True)
class ModelName:
    """A model: hex digests of bundle and weights, and the version."""

    bundle: str
    weights: str
    version: int

    def is_same(self, other: ModelName | None) -> bool:
        """Whether it is the same model, whatever its version is called."""
        return other is not None and (self.bundle, self.weights) == (other.bundle, other.weights)


@dataclass(frozen=True, slots=True)
class Refusal:
    """A model that did not work here, and what was wrong with it."""

    model: ModelName
    reason: str


@dataclass(frozen=True, slots=True)
class Slots:
    """The models of a device."""

    good: ModelName | None = None
    """The last that proved itself."""
    before: ModelName | None = None
    """The good one before it."""
    trial: ModelName | None = None
    """The one on trial."""
    starts: int = 0
    """How many processes have begun with it since one ended as it should."""
    refused: tuple[Refusal, ...] = ()
    """What will not be tried again; the oldest are forgotten."""

    @property
    def current(self) -> ModelName | None:
        """The one to answer with."""
        return self.trial or self.good

    @property
    def candidates(self) -> tuple[ModelName, ...]:
        """What to answer with, best first."""
        return tuple(name for name in (self.trial, self.good, self.before) if name is not None)

    @property
    def kept(self) -> set[str]:
        """The digests of what must stay on disk."""
        names = (self.good, self.trial or self.before)
        return {digest for n in names if n is not None for digest in (n.bundle, n.weights)}

    def refusal(self, name: ModelName) -> str:
        """Return why a model is not tried again; "" for one that may be."""
        return next((r.reason for r in self.refused if name.is_same(r.model)), "")

    def tried(self, name: ModelName) -> Slots:
        """Put a model on trial, but the first, and the good one by another version's name."""
        if self.good is None or name.is_same(self.good):
            return replace(self, good=name, trial=None, starts=0)
        return replace(self, trial=name, starts=0)

    def settled(self, name: ModelName) -> Slots:
        """Go on with a model, whatever is wrong with the better ones; one on trial stays so."""
        if name == self.trial:
            return self
        before = None if name == self.before else self.before
        return replace(self, good=name, before=before, trial=None, starts=0)

    def started(self) -> Slots:
        """Count a process that begins with what is on trial."""
        return self if self.trial is None else replace(self, starts=self.starts + 1)

    def ended(self) -> Slots:
        """Count a process that ended as it should."""
        return replace(self, starts=0)

    def proven(self) -> Slots:
        """Make the one on trial the good one."""
        if self.trial is None:
            return self
        return replace(self, good=self.trial, before=self.good, trial=None, starts=0)

    def refuse(self, name: ModelName, reason: str) -> Slots:
        """Go back from a model, and not to it again."""
        others = tuple(r for r in self.refused if not name.is_same(r.model))
        refused = (*others, Refusal(name, reason))[-REFUSED_KEPT:]
        if name.is_same(self.trial):
            return replace(self, trial=None, starts=0, refused=refused)
        return replace(self, refused=refused)

    def to_bytes(self) -> bytes:
        """Return it as JSON; the good one's fields stand at the top, as they did before trials."""
        fields = {
            **(_fields(self.good) or {}),
            "before": _fields(self.before),
            "trial": _fields(self.trial),
            "starts": self.starts,
            "refused": [{"model": _fields(r.model), "reason": r.reason} for r in self.refused],
        }
        return json.dumps(fields, sort_keys=True).encode() + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes) -> Slots:
        """Read it back.

        Raises: ValueError, KeyError, TypeError or AttributeError when it does not add up.
        """
        fields = json.loads(data)
        starts = fields.get("starts", 0 if "bundle" in fields else None)
        if type(starts) is not int or starts < 0:
            raise ValueError(f"expected how many starts, got {starts!r}")
        return cls(
            good=_name(fields) if "bundle" in fields else None,
            before=_maybe(fields.get("before")),
            trial=_maybe(fields.get("trial")),
            starts=starts,
            refused=tuple(
                Refusal(_name(r["model"]), str(r["reason"])) for r in fields.get("refused", [])
            ),
        )


def _fields(name: ModelName | None) -> dict[str, Any] | None:
    if name is None:
        return None
    return {"bundle": name.bundle, "weights": name.weights, "version": name.version}


def _maybe(fields: dict[str, Any] | None) -> ModelName | None:
    return None if fields is None else _name(fields)


def _name(fields: dict[str, Any]) -> ModelName:
    name = ModelName(fields["bundle"], fields["weights"], fields["version"])
    for digest in (name.bundle, name.weights):
        if len(bytes.fromhex(digest)) != _DIGEST_BYTES:
            raise ValueError(f"expected digests of {_DIGEST_BYTES} bytes")
    if type(name.version) is not int:
        raise TypeError(f"expected a version number, got {name.version!r}")
    return name
