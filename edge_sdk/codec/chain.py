# SPDX-License-Identifier: Apache-2.0
"""Stages joined to a codec: a value of pure functions, from a delta to bytes and back.

`ef` adds error feedback (Karimireddy et al. 2019): what an update could not carry is kept as a
residual and added to the next delta. A residual changes only when the coordinator's receipt is in.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from edge_sdk import params
from edge_sdk.codec import body, residual
from edge_sdk.codec.residual import State
from edge_sdk.codec.stages import MAX_RESIDUAL_RMS, Draft, Stage
from edge_sdk.errors import CodecError
from edge_sdk.types import Array, Params, Shapes, Spec

LARGEST_ENERGY = 1e30
"""A delta whose squares sum to more than this has diverged: nothing is sent."""
ENDS = ("levels", "even", "int8", "signs", "plain")


class BiasedCodec(UserWarning):
    """A codec drops numbers for good; wrap it in `ef(...)`, or choose an unbiased one."""


class Pending(NamedTuple):
    """What the state becomes, once it is known whether the update was accepted."""

    accepted: State
    declined: State


class Codec(NamedTuple):
    """A codec as a value. `commit(pending, accepted)` returns the state for the next update."""

    spec: Spec
    stages: tuple[Stage, ...]
    feedback: bool
    init: Callable[..., State]
    encode: Callable[[Params, State], tuple[bytes, Pending]]
    commit: Callable[..., State]
    decode: Callable[[bytes, Shapes], Params]
    dump: Callable[[State], bytes]
    load: Callable[..., State]

    @property
    def is_unbiased(self) -> bool:
        """Whether the average of many updates has no error left."""
        return any(stage.unbiased for stage in self.stages) or self.spec == [["dense"]]

    @property
    def sends_all(self) -> bool:
        """Whether every update says something of every number."""
        return not any(stage.drops or stage.name == "stochastic" for stage in self.stages)


def chain(*stages: Stage) -> Codec:
    """Join stages to a codec without error feedback.

    Raises: CodecError when the order makes no sense.
    """
    return _codec(_checked(stages), feedback=False)


def ef(codec: Codec) -> Codec:
    """Return `codec` with error feedback: nothing that it drops is lost, it is sent later.

    Raises: CodecError when error feedback would do harm.
    """
    if codec.feedback:
        raise CodecError("ef: expected a codec without error feedback, got one that has it")
    for stage in codec.stages:
        if stage.unbiased or stage.name == "dense":
            raise CodecError(f"ef: {stage.name} leaves nothing worth carrying; use it without ef")
        if stage.name == "deadzone" and stage.args[0] > MAX_RESIDUAL_RMS:
            raise CodecError(
                f"ef: expected deadzone up to {MAX_RESIDUAL_RMS:g} rms, got {stage.args[0]:g}: "
                "the residual would widen the step that made it"
            )
    return _codec(codec.stages, feedback=True)


def _checked(stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
    form, before = "float", "the start"
    for stage in stages:
        if form not in stage.takes:
            raise CodecError(f"{stage.name} cannot follow {before}: {WHY[form]}")
        form, before = stage.gives, stage.name
    if form not in ENDS:
        raise CodecError(f"a codec cannot end with {before}: {WHY[form]}")
    return stages


WHY = {
    "float": "expected a stage that makes integers first, such as deadzone(2.0)",
    "picked": "expected int8 after top_k",
    "levels": "expected int8 or the end after a lattice",
    "even": "the lattice is complete, and more would bias it",
    "int8": "expected the end after int8",
    "turned": "expected sign1 after rotate",
    "signs": "expected the end after sign1",
    "plain": "expected dense alone",
}


def _codec(stages: tuple[Stage, ...], *, feedback: bool) -> Codec:
    spec: Spec = [[stage.name, *stage.args] for stage in stages]
    drops = any(stage.drops for stage in stages) and not feedback

    def init(shapes: Shapes, seed: int = 0) -> State:
        """Start without a residual. `seed` must differ from device to device."""
        if drops:
            names = " -> ".join(stage.name for stage in stages)
            warnings.warn(
                f"{names} drops small changes for good; wrap it: ef(chain(...))",
                BiasedCodec,
                stacklevel=2,
            )
        return State(dict(shapes), seed % 2**63, 0, residual.none(shapes) if feedback else None)

    def encode(delta: Params, state: State) -> tuple[bytes, Pending]:
        flat = _with_residual(params.flatten(delta, state.shapes), state)
        draft = _draft(flat, state)
        for stage in stages:
            draft = stage.apply(draft)
        after = state._replace(updates=state.updates + 1)
        kept = residual.rest(flat, draft.lattice) if feedback and draft.lattice else state.residual
        return _write(draft, state.shapes), Pending(after._replace(residual=kept), after)

    return Codec(
        spec=[["ef"], *spec] if feedback else spec,
        stages=stages,
        feedback=feedback,
        init=init,
        encode=encode,
        commit=_commit,
        decode=body.decode,
        dump=residual.dump,
        load=lambda data, shapes: residual.load(data, shapes, feedback=feedback),
    )


def _commit(pending: Pending, accepted: bool = True) -> State:
    return pending.accepted if accepted else pending.declined


def _with_residual(flat: Array, state: State) -> Array:
    return flat if state.residual is None else flat + state.residual


def _draft(flat: Array, state: State) -> Draft:
    with np.errstate(over="ignore", invalid="ignore"):
        energy = float(np.dot(flat, flat))
    if not energy <= LARGEST_ENERGY:
        raise CodecError(
            "expected a delta of finite, moderate numbers, got NaN, infinity or a norm above 1e15: "
            "training diverged, nothing was encoded; lower the learning rate"
        )
    rms = float(np.sqrt(energy / max(1, flat.size)))
    key = _key(state.seed, state.updates)
    random = np.random.Generator(np.random.PCG64(int.from_bytes(key, "little")))
    return Draft(flat, rms, random, key)


def _key(seed: int, count: int) -> bytes:
    text = f"fedge-codec-1:{seed}:{count}".encode()
    return hashlib.sha256(text).digest()[:16]


def _write(draft: Draft, shapes: Shapes) -> bytes:
    if draft.lattice is not None:
        return body.write(draft.lattice, shapes)
    if draft.rotated is not None:
        return body.write_signs(draft.rotated, shapes)
    return body.write_floats(draft.flat)
