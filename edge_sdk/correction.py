# SPDX-License-Identifier: Apache-2.0
"""What a device adds to its gradients so that its own examples do not pull the model its own way.

Devices whose examples differ drift apart as they train. FedDyn (Acar et al. 2021, "Federated
learning based on dynamic regularization", algorithm 1) lets each remember where it has pulled so
far and pull the less that way. It steps along

    gradient + alpha * (w - base) - h,      h becomes h - alpha * delta,

and `own`, the sum of its deltas that counted, is all that has to be kept, for h = -alpha * own. As
the training graph pulls by mu to an anchor, this is mu = alpha and the anchor `base - own`. A delta
here is what the coordinator decodes: both sides must count the same. Pure: numpy only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from edge_sdk.types import Array


class Correction(NamedTuple):
    """A method's half on the device, as a value. All arrays are flat float32 of the model's size.

    `anchor(base, own)` is where training is pulled to; `after(own, delta)` what `own` becomes once
    an update that decodes to `delta` has counted. It is zeros before the first.
    """

    anchor: Callable[[Array, Array], Array]
    after: Callable[[Array, Array], Array]


def _summed(own: Array, delta: Array) -> Array:
    return own + delta


def _away(base: Array, own: Array) -> Array:
    return base - own


CORRECTIONS = {"feddyn": Correction(_away, _summed)}
"""By the name that an invitation has."""
