# SPDX-License-Identifier: Apache-2.0
"""Device optimizers as values: `chain(clip(1.0), momentum(0.9, lr=.05))`, emitted as operators.

A part turns gradients into directions and may keep slots, tensors that start at zeros and live from
one step to the next. `descend` writes ``p.next = p - lr * direction`` once, for every optimizer.
The learning rate is an input of the graph; the value given here is what the manifest offers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from coordinator.compiler.emit import Emit
from edge_sdk.errors import CompileError
from edge_sdk.types import Spec


class Slot(NamedTuple):
    """One tensor of optimizer state: float32, zeros at the start; `param` is None for a counter."""

    name: str
    param: int | None
    shape: tuple[int, ...]


class Directions(NamedTuple):
    """What a part makes: one tensor per parameter, a factor of the learning rate, the new slots."""

    tensors: list[str]
    scale: str | None
    slots: list[str]


class Optimizer(NamedTuple):
    """An optimizer, or a step of one, as functions that emit operators.

    Attributes:
        spec: how the manifest spells it, always as a chain: ``[["clip", 1.0], ["sgd", {...}]]``.
        lr: the learning rate offered; None for a part that only reshapes gradients, such as clip.
        slots: (parameters' names and shapes) -> the state it keeps.
        emit: (e, gradients, slots' names) -> Directions.
    """

    spec: Spec
    lr: float | None
    slots: Callable[[Sequence[tuple[str, tuple[int, ...]]]], list[Slot]]
    emit: Callable[[Emit, list[str], list[str]], Directions]


def sgd(lr: float) -> Optimizer:
    """Plain gradient descent: ``p - lr * g``."""

    def emit(e: Emit, grads: list[str], slots: list[str]) -> Directions:
        del e, slots
        return Directions(grads, None, [])

    spec: Spec = [["sgd", {"lr": _positive("lr", lr)}]]
    return Optimizer(spec, lr, lambda _: [], emit)


def momentum(decay: float, lr: float, *, nesterov: bool = False) -> Optimizer:
    """Heavy ball (Polyak 1964), ``v = decay * v + g``; with `nesterov`, ``g + decay * v`` leads."""
    settings: dict[str, float | bool] = {"decay": _share("decay", decay), "lr": _positive("lr", lr)}
    if nesterov:
        settings["nesterov"] = True

    def emit(e: Emit, grads: list[str], slots: list[str]) -> Directions:
        by = e.const(decay)
        kept = [e.Add(_scaled(e, v, by), g) for v, g in zip(slots, grads, strict=True)]
        if not nesterov:
            return Directions(kept, None, kept)
        ahead = [e.Add(_scaled(e, v, by), g) for v, g in zip(kept, grads, strict=True)]
        return Directions(ahead, None, kept)

    return Optimizer([["momentum", settings]], lr, lambda ps: _per_param("velocity", ps), emit)


def adam(lr: float, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> Optimizer:
    """Adam (Kingma & Ba 2015), in the order of its section 2: the corrections fold into scalars."""
    settings = {
        "lr": _positive("lr", lr),
        "b1": _share("b1", b1),
        "b2": _share("b2", b2),
        "eps": _positive("eps", eps),
    }

    def slots_of(params: Sequence[tuple[str, tuple[int, ...]]]) -> list[Slot]:
        moments = _per_param("mean", params) + _per_param("square", params)
        return [*moments, Slot("count", None, ())]

    def emit(e: Emit, grads: list[str], slots: list[str]) -> Directions:
        count = e.Add(slots[-1], e.const(1.0))
        scale, floor = _corrections(e, count, b1, b2, eps)
        n = len(grads)
        means = [_average(e, m, g, b1) for m, g in zip(slots[:n], grads, strict=True)]
        squares = [
            _average(e, v, e.Mul(g, g), b2) for v, g in zip(slots[n : 2 * n], grads, strict=True)
        ]
        tensors = [
            e.Div(m, e.Add(e.Sqrt(v), _ranked(e, floor, v)))
            for m, v in zip(means, squares, strict=True)
        ]
        return Directions(tensors, scale, [*means, *squares, count])

    return Optimizer([["adam", settings]], lr, slots_of, emit)


def clip(max_norm: float) -> Optimizer:
    """Scale all gradients together so that their joint L2 norm is at most `max_norm`."""
    limit = _positive("max_norm", max_norm)

    def emit(e: Emit, grads: list[str], slots: list[str]) -> Directions:
        del slots
        squares = [e.ReduceSumSquare(g, keepdims=0) for g in grads]
        total = squares[0] if len(squares) == 1 else e.Sum(*squares)
        bound = e.const(limit)
        by = e.Div(bound, e.Max(e.Sqrt(total), bound))
        return Directions([_scaled(e, g, by) for g in grads], None, [])

    return Optimizer([["clip", limit]], None, lambda _: [], emit)


def chain(*parts: Optimizer) -> Optimizer:
    """Join parts left to right; exactly the last one brings the learning rate.

    Raises: CompileError when none does, or one before the last.
    """
    if not parts or parts[-1].lr is None or any(part.lr is not None for part in parts[:-1]):
        names = [step[0] for part in parts for step in part.spec if isinstance(step, list)]
        raise CompileError(
            f"expected a chain that ends in its only sgd, momentum or adam, got {names}: "
            "write chain(clip(1.0), sgd(lr=0.05))"
        )

    def slots_of(params: Sequence[tuple[str, tuple[int, ...]]]) -> list[Slot]:
        return [slot for part in parts for slot in part.slots(params)]

    def emit(e: Emit, grads: list[str], slots: list[str]) -> Directions:
        made, kept = Directions(grads, None, []), list[str]()
        for part in parts:  # only the last keeps slots: the others reshape gradients
            made = part.emit(e, made.tensors, slots if part is parts[-1] else [])
            kept += made.slots
        return Directions(made.tensors, made.scale, kept)

    spec: Spec = [step for part in parts for step in part.spec]
    return Optimizer(spec, parts[-1].lr, slots_of, emit)


def descend(e: Emit, params: Sequence[str], lr: str, made: Directions) -> list[str]:
    """Emit ``p - lr * scale * direction`` and return the new parameters' names."""
    rate = lr if made.scale is None else e.Mul(lr, made.scale)
    return [e.Sub(p, _scaled(e, d, rate)) for p, d in zip(params, made.tensors, strict=True)]


def is_plain(optimizer: Optimizer) -> bool:
    """Tell whether a step is the gradient times the learning rate, and nothing else."""
    return _names(optimizer) == ["sgd"]


def add(e: Emit, params: Sequence[str], steps: Sequence[str]) -> list[str]:
    """Emit ``p + step``, the steps being scaled already, and return the new parameters' names."""
    return [e.Add(p, s) for p, s in zip(params, steps, strict=True)]


def is_even(optimizer: Optimizer) -> bool:
    """Tell whether each element is served as any other, whichever tensor it is in.

    A clip is too, but devices look for the one product of each gradient that proves it.
    """
    return set(_names(optimizer)) <= {"sgd", "momentum", "adam"}


def _names(optimizer: Optimizer) -> list[str]:
    return [str(part[0]) for part in optimizer.spec if isinstance(part, list)]


def proximal(
    e: Emit, grads: Sequence[str], params: Sequence[str], mu: str, anchors: Sequence[str]
) -> list[str]:
    """Add the gradient of ``mu / 2 * |p - anchor|^2`` (FedProx, Li et al. 2020)."""
    return [
        e.Add(g, _scaled(e, e.Sub(p, a), mu))
        for g, p, a in zip(grads, params, anchors, strict=True)
    ]


def _average(e: Emit, old: str, new: str, decay: float) -> str:
    """Emit ``decay * old + (1 - decay) * new``."""
    return e.Add(_scaled(e, old, e.const(decay)), _scaled(e, new, e.const(1.0 - decay)))


def _scaled(e: Emit, tensor: str, factor: str) -> str:
    """Emit ``tensor * factor``, the factor having as many dimensions as the tensor.

    With fewer, onnxruntime 1.32 goes through [256, 256, 1, 1] one element at a time: 0.42 ms
    instead of 0.007.
    """
    return e.Mul(tensor, _ranked(e, factor, tensor))


def _ranked(e: Emit, scalar: str, tensor: str) -> str:
    ones = [1] * len(e.shape(tensor) or ())
    value = e.value(scalar)
    if not ones:
        return scalar
    return e.Reshape(scalar, e.ints(*ones)) if value is None else e.const(value.reshape(ones))


def _corrections(e: Emit, count: str, b1: float, b2: float, eps: float) -> tuple[str, str]:
    """Emit the factor of lr and the floor of the root, in double: 1 - b2**t cancels."""
    t, one = e.Cast(count, to=_DOUBLE), e.const(1.0, np.float64)
    first = e.Sub(one, e.Pow(e.const(b1, np.float64), t))
    second = e.Sqrt(e.Sub(one, e.Pow(e.const(b2, np.float64), t)))
    scale = e.Cast(e.Div(second, first), to=_FLOAT)
    return scale, e.Cast(e.Mul(second, e.const(eps, np.float64)), to=_FLOAT)


_FLOAT, _DOUBLE = 1, 11  # TensorProto.FLOAT, TensorProto.DOUBLE


def _per_param(stem: str, params: Sequence[tuple[str, tuple[int, ...]]]) -> list[Slot]:
    return [Slot(f"{stem}:{name}", i, shape) for i, (name, shape) in enumerate(params)]


def _positive(name: str, value: float) -> float:
    if not 0 < value < np.inf:
        raise CompileError(f"expected {name} above 0, got {value!r}: choose a positive number")
    return float(value)


def _share(name: str, value: float) -> float:
    if not 0 <= value < 1:
        raise CompileError(f"expected {name} in [0, 1), got {value!r}: 0.9 is usual")
    return float(value)
