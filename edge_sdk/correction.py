# SPDX-License-Identifier: Apache-2.0
"""What a device adds to its gradients so that its own examples do not pull the model its own way.

Devices whose examples differ drift apart as they train. Each method lets a device remember, in
`own`, where it has pulled so far, and pull the less that way. The training graph pulls by mu to an
anchor, gradient + mu * (w - anchor), so a method is a choice of anchor:

- FedDyn (Acar et al. 2021, "Federated learning based on dynamic regularization", algorithm 1) steps
  along gradient + alpha * (w - base) - h, and h becomes h - alpha * delta. `own` is the sum of the
  device's deltas, h = -alpha * own, mu = alpha: the anchor is `base - own`.
- SCAFFOLD (Karimireddy et al. 2020, "Stochastic controlled averaging for federated learning",
  algorithm 1, option II) steps along gradient - c_i + c; c_i becomes c_i - c - delta / (K * lr).
  Here `own` is -lr * c_i and `control` is -lr * c: what a step of the device, and of all devices,
  moves the weights by. The anchor is `base - (own - control) / (lr * mu)`, with a mu so small that
  its pull to the base is nothing beside the gradient.

A delta here is what the coordinator decodes: both sides must count the same. Pure: numpy only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from edge_sdk import codec
from edge_sdk.errors import CodecError
from edge_sdk.types import Array

MOST = 150_000
"""Numbers that a control may have: it comes with each invitation, in one packet."""

_CONTROL = codec.preset("exact-ish")


class Terms(NamedTuple):
    """What else a correction depends on.

    `mu` and `lr` are those of the training, `steps` how far it went in plain steps of gradient
    descent (`plain_steps`), `control` what the invitation brought, zeros where it brought nothing.
    """

    mu: float
    lr: float
    steps: float
    control: Array


class Correction(NamedTuple):
    """A method's half on the device, as a value. All arrays are flat float32 of the model's size.

    `anchor(base, own, terms)` is where training is pulled to; `after(own, delta, terms)` what `own`
    becomes once an update that decodes to `delta` has counted. It is zeros before the first.
    """

    anchor: Callable[[Array, Array, Terms], Array]
    after: Callable[[Array, Array, Terms], Array]


def _feddyn_anchor(base: Array, own: Array, _terms: Terms) -> Array:
    return base - own


def _feddyn_after(own: Array, delta: Array, _terms: Terms) -> Array:
    return own + delta


def _scaffold_anchor(base: Array, own: Array, terms: Terms) -> Array:
    return base - (own - terms.control) / np.float32(terms.lr * terms.mu)


def _scaffold_after(own: Array, delta: Array, terms: Terms) -> Array:
    return own - terms.control + delta / np.float32(terms.steps)


CORRECTIONS = {
    "feddyn": Correction(_feddyn_anchor, _feddyn_after),
    "scaffold": Correction(_scaffold_anchor, _scaffold_after),
}
"""By the name that an invitation has."""


def pack(control: Array) -> bytes:
    """Return a control as an invitation carries it: within 0.05 of its rms, nothing for zeros."""
    if not control.any():
        return b""
    shapes = {"control": control.shape}
    blob, _ = _CONTROL.encode({"control": control}, _CONTROL.init(shapes))
    return blob


def unpack(body: bytes, count: int) -> Array:
    """Read a control of `count` numbers: every reader gets the same bits.

    Raises: CodecError when it does not add up.
    """
    if not body:
        return np.zeros(count, np.float32)
    if count > MOST:
        raise CodecError(f"expected a control of at most {MOST} numbers, got {count}")
    return codec.decode(body, {"control": (count,)})["control"]


def plain_steps(steps: int, decay: float) -> float:
    """Return how far `steps` of SGD with momentum go, in plain steps of the same learning rate.

    Wang et al. 2020, "Tackling the objective inconsistency problem", section 4.
    """
    count = max(1, steps)
    if decay == 0:
        return float(count)
    return (count - decay * (1 - decay**count) / (1 - decay)) / (1 - decay)


def decay_of(optimizer: Sequence[Sequence[Any]]) -> float | None:
    """Return the momentum of a bundle's optimizer, 0 without; None of one that is not followed.

    `optimizer`: as the manifest spells it, a list of [name, settings].
    """
    match [[name, *settings] for name, *settings in optimizer]:
        case [["sgd", _]]:
            return 0.0
        case [["momentum", {"decay": decay, **rest}]] if not rest.get("nesterov"):
            return float(decay)
    return None
