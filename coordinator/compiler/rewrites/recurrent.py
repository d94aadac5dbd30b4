# SPDX-License-Identifier: Apache-2.0
"""LSTM, GRU and RNN, one step after the other, for sequences of known length.

Products with the input are made for all steps at once; a state is [1, batch, hidden]. The equations
are those of the operators' specification (Hochreiter & Schmidhuber 1997; Cho et al. 2014).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

from coordinator.compiler.emit import Emit
from coordinator.compiler.graph import Node
from coordinator.compiler.rewrite import rewrite
from edge_sdk.errors import CompileError

_ACTIVATIONS = ("Sigmoid", "Tanh", "Relu", "Softsign", "Softplus")
_DEFAULTS = {"LSTM": ("Sigmoid", "Tanh", "Tanh"), "GRU": ("Sigmoid", "Tanh"), "RNN": ("Tanh",)}
_LATE = {"LSTM": 7, "GRU": 99, "RNN": 99}  # the input that holds peepholes

Activation = Callable[[str], str]


class _Direction(NamedTuple):
    """What one direction's steps read.

    Attributes:
        x: the input's part of the gates, one [1, batch, gates * hidden] a step.
        r: recurrent weights [hidden, gates * hidden], rb: their bias, where it acts apart.
        h: the first state, c: the first cell, peep: the peepholes i, o, f.
        act: the activations.
    """

    x: tuple[str, ...]
    r: str
    rb: str | None
    h: str
    c: str
    peep: tuple[str, ...]
    act: tuple[Activation, ...]


@rewrite("LSTM", "GRU", "RNN")
def _recurrent(e: Emit, n: Node) -> tuple[str, ...]:
    steps = _length(e, n)
    way = n.attr("direction", "forward")
    step = {"LSTM": _lstm, "GRU": _gru, "RNN": _rnn}[n.op]
    whole, last, cells = [], [], []
    for d in range(2 if way == "bidirectional" else 1):
        is_back = way == "reverse" or d == 1
        direction = _direction(e, n, d, steps, is_back=is_back)
        h, c, made = direction.h, direction.c, []
        for x in direction.x:
            h, c = step(e, n, direction, (x, h, c))
            made.append(h)
        joined = e.Concat(*(reversed(made) if is_back else made), axis=0)
        whole.append(e.Unsqueeze(joined, e.ints(1)))
        last.append(h)
        cells.append(c)
    outputs = [_joined(e, whole, 1), _joined(e, last, 0), _joined(e, cells, 0)]
    return tuple(outputs[: 3 if n.op == "LSTM" else 2])


def _joined(e: Emit, parts: list[str], axis: int) -> str:
    return parts[0] if len(parts) == 1 else e.Concat(*parts, axis=axis)


def _length(e: Emit, n: Node) -> int:
    """Return the number of steps; raise CompileError for what cannot be unrolled."""
    steps = e.dims(n.inputs[0])[0]
    if n.attr("clip", 0.0):
        raise CompileError(f"expected no clip in {n.label}: train only tensors after it")
    if n.attr("layout", 0):
        raise CompileError(f"expected layout=0 in {n.label}, got 1: onnxruntime runs no other")
    if steps is None:
        raise CompileError(
            f"expected a known sequence length in {n.label}, got {e.dims(n.inputs[0])}: "
            "give the model's input a fixed length, or train only tensors after it"
        )
    lengths = e.value(n.input(4))
    if n.input(4) and (lengths is None or (lengths != steps).any()):
        raise CompileError(
            f"expected whole sequences in {n.label}, it is given lengths: export it without "
            "packed sequences, or train only tensors after it"
        )
    return steps


def _direction(e: Emit, n: Node, d: int, steps: int, *, is_back: bool) -> _Direction:
    hidden = e.dims(n.inputs[2])[2]
    if hidden is None:
        raise CompileError(f"expected weights of known shape in {n.label}")
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[n.op]
    w, r = (_turned(e, _part(e, n.inputs[i], d)) for i in (1, 2))
    x = e.MatMul(n.inputs[0], w)
    rb = None
    if n.input(3):
        both = _part(e, n.inputs[3], d)
        wb, rb = e.Split(both, e.ints(gates * hidden, gates * hidden), outputs=2, axis=0)
        apart = n.op == "GRU" and n.attr("linear_before_reset", 0)
        x = e.Add(x, wb if apart else e.Add(wb, rb))
        rb = rb if apart else None
    parts = e.Split(x, e.ints(*[1] * steps), outputs=steps, axis=0)
    zero = _zero_state(e, n, hidden)
    peep = n.input(_LATE[n.op])
    return _Direction(
        tuple(reversed(parts)) if is_back else parts,
        r,
        rb,
        _kept(e, n.input(5), d) or zero,
        (_kept(e, n.input(6), d) if n.op == "LSTM" else None) or zero,
        e.Split(_part(e, peep, d), e.ints(*[hidden] * 3), outputs=3, axis=0) if peep else (),
        _activations(e, n, d),
    )


def _part(e: Emit, x: str, d: int) -> str:
    """Return one direction's part of [directions, ...]."""
    if e.dims(x)[0] == 1:
        return e.Squeeze(x, e.ints(0))
    return e.Squeeze(e.Slice(x, e.ints(d), e.ints(d + 1), e.ints(0)), e.ints(0))


def _kept(e: Emit, x: str, d: int) -> str | None:
    """Return one direction's part as [1, ...], None where there is none."""
    if not x or e.dims(x)[0] == 1:
        return x or None
    return e.Slice(x, e.ints(d), e.ints(d + 1), e.ints(0))


def _turned(e: Emit, x: str) -> str:
    return e.Transpose(x, perm=[1, 0])


def _zero_state(e: Emit, n: Node, hidden: int) -> str:
    batch = e.Shape(n.inputs[0], start=1, end=2)
    shape = e.Concat(e.ints(1), batch, e.ints(hidden), axis=0)
    zeros = e.ConstantOfShape(shape, value=np.zeros(1, np.float32))
    return e.declare(zeros, (1, e.dims(n.inputs[0])[1], hidden))


def _activations(e: Emit, n: Node, d: int) -> tuple[Activation, ...]:
    count = len(_DEFAULTS[n.op])
    names = (tuple(n.attr("activations") or ()) or _DEFAULTS[n.op] * 2)[d * count :][:count]
    strange = [name for name in names if name not in _ACTIVATIONS]
    if strange or n.attr("activation_alpha") or n.attr("activation_beta"):
        raise CompileError(
            f"expected activations of {', '.join(_ACTIVATIONS)} in {n.label}, got "
            f"{', '.join(names)}: train only tensors after it"
        )
    return tuple(partial(_apply, e, name) for name in names)


def _apply(e: Emit, op: str, x: str) -> str:
    return e.op(op, [x])[0]


_State = tuple[str, str, str]


def _rnn(e: Emit, _: Node, d: _Direction, now: _State) -> tuple[str, str]:
    x, h, c = now
    return d.act[0](e.Add(x, e.MatMul(h, d.r))), c


def _lstm(e: Emit, n: Node, d: _Direction, now: _State) -> tuple[str, str]:
    x, h, c = now
    total = e.Add(x, e.MatMul(h, d.r))
    hidden = (e.dims(d.r)[0] or 0,) * 4
    i, o, f, new = e.Split(total, e.ints(*hidden), outputs=4, axis=2)
    if d.peep:
        i, f = e.Add(i, e.Mul(d.peep[0], c)), e.Add(f, e.Mul(d.peep[2], c))
    i = d.act[0](i)
    f = e.Sub(e.const(1.0), i) if n.attr("input_forget", 0) else d.act[0](f)
    c = e.Add(e.Mul(f, c), e.Mul(i, d.act[1](new)))
    if d.peep:
        o = e.Add(o, e.Mul(d.peep[1], c))
    return e.Mul(d.act[0](o), d.act[2](c)), c


def _gru(e: Emit, n: Node, d: _Direction, now: _State) -> tuple[str, str]:
    x, h, c = now
    hidden = e.dims(d.r)[0] or 0
    thirds = e.ints(hidden, hidden, hidden)
    xz, xr, xh = e.Split(x, thirds, outputs=3, axis=2)
    if n.attr("linear_before_reset", 0):
        product = e.MatMul(h, d.r)
        product = e.Add(product, d.rb) if d.rb else product
        hz, hr, hh = e.Split(product, thirds, outputs=3, axis=2)
        z, r = d.act[0](e.Add(xz, hz)), d.act[0](e.Add(xr, hr))
        new = d.act[1](e.Add(xh, e.Mul(r, hh)))
    else:
        gates, own = e.Split(d.r, e.ints(2 * hidden, hidden), outputs=2, axis=1)
        hz, hr = e.Split(e.MatMul(h, gates), e.ints(hidden, hidden), outputs=2, axis=2)
        z, r = d.act[0](e.Add(xz, hz)), d.act[0](e.Add(xr, hr))
        new = d.act[1](e.Add(xh, e.MatMul(e.Mul(r, h), own)))
    return e.Add(new, e.Mul(z, e.Sub(h, new))), c
