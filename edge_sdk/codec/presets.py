# SPDX-License-Identifier: Apache-2.0
"""Codecs by name and from data: a spec is looked up in a closed table, never run as code."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from edge_sdk.codec import stages
from edge_sdk.codec.chain import Codec, chain, ef
from edge_sdk.codec.stages import Stage
from edge_sdk.errors import CodecError

PRESETS: dict[str, list[list[object]]] = {
    "default": [["ef"], ["deadzone", 2.0]],
    "lean": [["ef"], ["deadzone", 4.0]],
    "stateless": [["rotate"], ["sign1"]],
    "stateless-lean": [["stochastic", 0.05]],
    "exact-ish": [["grid", 0.1]],
    "dense": [["dense"]],
    "downlink": [["ef"], ["deadzone", 1.0]],
}
STAGES: dict[str, tuple[Callable[..., Stage], int]] = {
    "top_k": (stages.top_k, 1),
    "deadzone": (stages.deadzone, 1),
    "grid": (stages.grid, 1),
    "stochastic": (stages.stochastic, 1),
    "int8": (stages.int8, 0),
    "rotate": (stages.rotate, 0),
    "sign1": (stages.sign1, 0),
    "dense": (stages.dense, 0),
}


def preset(name: str) -> Codec:
    """Return the codec of a name, one of `PRESETS`.

    Raises: CodecError for another name.
    """
    if name not in PRESETS:
        raise CodecError(f"expected a codec among {', '.join(PRESETS)}, got {name!r}")
    return from_spec(PRESETS[name])


def from_spec(spec: Sequence[object] | str) -> Codec:
    """Return the codec of a spec such as ``[["ef"], ["deadzone", 2.0]]``, or of a preset's name.

    Raises: CodecError for an unknown stage, wrong arguments, or an order that makes no sense.
    """
    if isinstance(spec, str):
        return preset(spec)
    if not isinstance(spec, Sequence) or not spec:
        raise CodecError(f"expected a codec spec such as [['int8']], got {spec!r:.80}")
    feedback = spec[0] in (["ef"], ("ef",))
    joined = chain(*(_stage(part) for part in spec[feedback:]))
    return ef(joined) if feedback else joined


def _stage(part: object) -> Stage:
    if not isinstance(part, Sequence) or isinstance(part, str) or not part:
        raise CodecError(f"expected a stage such as ['deadzone', 2.0], got {part!r:.80}")
    name, *args = part
    if not isinstance(name, str) or name not in STAGES:
        known = ", ".join(STAGES)
        raise CodecError(f"expected a stage among {known}, got {name!r:.80}; upgrade fedge")
    factory, arity = STAGES[name]
    numbers = [a for a in args if isinstance(a, int | float) and not isinstance(a, bool)]
    if len(args) != arity or len(numbers) != arity:
        raise CodecError(f"{name}: expected {arity} number(s), got {args!r:.80}")
    return factory(*map(float, numbers))
