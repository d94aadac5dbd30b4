# SPDX-License-Identifier: Apache-2.0
"""Settings for the operators that are spelled in simpler ones before they are differentiated."""

from __future__ import annotations

from typing import Any

import numpy as np
from check_grads import Case
from grad_draws import RNG, F, ints, normal, positive


def _ort(op: str, inputs: tuple[Any, ...], attributes: dict[str, Any], **more: Any) -> Case:
    """Return a case whose evaluator is onnxruntime's own kernel."""
    known = {"evaluator": "ort", "eps": 0.01, "tolerance": 3e-3, "batch": (0,)}
    return Case(op, inputs, attributes, **{**known, **more})


NORMALIZED = [
    _ort("MeanVarianceNormalization", (normal(2, 3, 4),), {"axes": [1, 2]}),
    _ort("MeanVarianceNormalization", (normal(2, 3, 2, 2),), {}, batch=()),
    *[
        _ort(
            "GroupNormalization",
            (normal(2, 4, *space), normal(4), normal(4)),
            {"num_groups": groups, **extra},
            wrt=(0, 1, 2),
            opset=21,
        )
        for groups, space, extra in ((2, (3,), {}), (4, (2, 3), {"epsilon": 0.1}))
    ],
    _ort("LpNormalization", (positive(3, 4) * np.array([1, -1, 1, -1], F),), {"p": 1}),
    _ort("LpNormalization", (normal(3, 4),), {}),
    _ort("LpNormalization", (normal(2, 3, 4),), {"axis": 1}),
    *[
        _ort("GlobalLpPool", ((positive(2, 3, 4) * sign).astype(F),), {"p": p})
        for p, sign in ((1, -1), (2, 1), (3, 1))
    ],
]  # fmt: skip


def _recurrent(
    op: str, *, steps: int = 3, dirs: int = 1, tail: str = "", wrt: tuple[int, ...] = (),
    outputs: tuple[int, ...] = (0,), **attributes: Any,
) -> Case:  # fmt: skip
    """Return a case of two examples of three features, two hidden units.

    `tail` names the optional inputs: b (bias), h (first state), c (first cell), p (peepholes).
    """
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[op] * 2
    inputs: list[np.ndarray | None] = [
        normal(steps, 2, 3), normal(dirs, gates, 3), normal(dirs, gates, 2),
        normal(dirs, 2 * gates) if "b" in tail else None, None,
        normal(dirs, 2, 2) if "h" in tail else None,
        normal(dirs, 2, 2) if "c" in tail else None,
        normal(dirs, 6) if "p" in tail else None,
    ]  # fmt: skip
    while inputs[-1] is None:
        inputs.pop()
    known = tuple(i for i, x in enumerate(inputs) if x is not None)
    return _ort(
        op,
        tuple(inputs),
        {"hidden_size": 2, **attributes},
        wrt=wrt or known,
        eps=0.002,
        batch=(),
        outputs=max(outputs) + 1,
        upstream=outputs,
    )


RECURRENT = [
    _recurrent("RNN"),
    _recurrent("RNN", tail="bh", direction="reverse", outputs=(0, 1), activations=["Sigmoid"]),
    _recurrent("RNN", tail="bh", dirs=2, direction="bidirectional", outputs=(0, 1)),
    _recurrent("GRU"),
    _recurrent("GRU", tail="b", direction="reverse", linear_before_reset=1, outputs=(0, 1)),
    _recurrent("GRU", tail="bh", dirs=2, direction="bidirectional", outputs=(0, 1)),
    _recurrent("GRU", tail="bh", linear_before_reset=1, activations=["Sigmoid", "Sigmoid"]),
    _recurrent("LSTM"),
    _recurrent("LSTM", tail="b", direction="reverse", outputs=(0, 1, 2)),
    _recurrent("LSTM", tail="bhc", dirs=2, direction="bidirectional", outputs=(0, 1, 2)),
    _recurrent("LSTM", tail="bhcp", outputs=(0, 1, 2)),
    _recurrent("LSTM", tail="bhc", input_forget=1, steps=2),
    _recurrent("LSTM", tail="bhcp", dirs=2, direction="bidirectional", steps=2),
]


def _spots(size: tuple[int, ...], *shape: int, aligned: bool) -> np.ndarray:
    """Return coordinates, some beyond the image, none near a place where the slope changes."""
    axes = []
    for n in reversed(size):
        off = RNG.uniform(0.15, 0.4, shape) + 0.45 * RNG.integers(0, 2, shape)
        pixel = RNG.integers(-2, n + 1, shape) + off
        axes.append(2 * pixel / (n - 1) - 1 if aligned else (2 * pixel + 1) / n - 1)
    return np.stack(axes, -1).astype(F)


def _sampled(x: tuple[int, ...], grid: tuple[int, ...], wrt: tuple[int, ...] = (0, 1),
             **attributes: Any) -> Case:  # fmt: skip
    aligned = bool(attributes.get("align_corners"))
    spots = _spots(x[2:], *grid[:-1], aligned=aligned)
    return _ort(
        "GridSample", (normal(*x), spots), attributes, wrt=wrt, batch=(0, 1), eps=0.002,
        tolerance=6e-3, opset=20,
    )  # fmt: skip


GRIDS = [
    _sampled((2, 3, 4, 5), (2, 3, 2, 2)),
    _sampled((2, 3, 4, 5), (2, 3, 2, 2), align_corners=1, padding_mode="border"),
    _sampled((2, 3, 4, 5), (2, 3, 2, 2), padding_mode="reflection"),
    _sampled((2, 2, 4, 3), (2, 2, 2, 2), padding_mode="reflection", align_corners=1),
    _sampled((2, 3, 4, 5), (2, 3, 2, 2), wrt=(0,), mode="nearest"),
    _sampled((2, 3, 4, 5), (2, 3, 2, 2), wrt=(0,), mode="nearest", padding_mode="reflection"),
    _sampled((2, 2, 3, 4, 2), (2, 2, 1, 2, 3), padding_mode="border"),
    *[
        _ort(
            "AffineGrid",
            (normal(2, d, d + 1), ints(2, 1, *out)),
            {"align_corners": aligned},
            fixed=(1,),
            batch=(),
            opset=20,
        )
        for d, out, aligned in ((2, (3, 4), 0), (2, (3, 2), 1), (3, (2, 3, 2), 0))
    ],
]

REWRITTEN = [*NORMALIZED, *RECURRENT, *GRIDS]
