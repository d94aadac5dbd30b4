# SPDX-License-Identifier: Apache-2.0
"""Every formulation of a convolution's gradients gives the same numbers where it applies."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from check_grads import assert_close, session

from coordinator.compiler.emit import Emit
from coordinator.compiler.graph import Node
from coordinator.compiler.rules import conv, formulations
from coordinator.compiler.rules.conv import choose, layer_of
from coordinator.compiler.rules.formulations import FILTER, INPUT
from coordinator.compiler.rules.window import Layer, Window

LAYERS = [  # x, w, attributes
    ((2, 5, 7, 6), (4, 5, 3, 3), {"pads": [1, 1, 1, 1]}),
    ((2, 5, 7, 6), (4, 5, 3, 2), {"strides": [2, 2], "pads": [1, 0, 0, 1]}),
    ((2, 5, 9, 8), (4, 5, 3, 3), {"dilations": [2, 1], "strides": [1, 2]}),
    ((2, 5, 9, 8), (4, 5, 3, 2), {"dilations": [2, 3], "pads": [1, 0, 3, 2]}),
    ((2, 5, 9, 8), (3, 5, 4, 3), {}),
    ((2, 5, 4, 6), (4, 5, 1, 1), {}),
    ((2, 5, 5, 6), (4, 5, 1, 1), {"strides": [2, 2]}),
    ((2, 1, 8, 6), (4, 1, 4, 3), {"strides": [2, 2], "pads": [1, 1, 2, 1]}),
    ((3, 4, 7, 6), (4, 1, 3, 3), {"group": 4, "pads": [1, 1, 1, 1]}),
    ((3, 4, 7, 6), (4, 1, 3, 3), {"group": 4, "strides": [2, 2], "pads": [0, 0, 1, 1]}),
    ((3, 4, 9, 9), (4, 1, 3, 3), {"group": 4, "dilations": [2, 2]}),
    ((2, 4, 6, 5), (6, 2, 3, 3), {"group": 2, "pads": [1, 1, 1, 1]}),
    ((2, 4, 11), (3, 4, 3), {"strides": [2], "pads": [1, 1]}),
    ((2, 4, 11), (4, 1, 3), {"group": 4, "strides": [3]}),
    ((2, 4, 3, 2), (4, 1, 5, 5), {"group": 4, "strides": [2, 1], "pads": [3, 2, 3, 2]}),
    ((2, 3, 1, 2), (3, 1, 3, 3), {"group": 3, "pads": [1, 1, 1, 1]}),
    ((2, 3, 4, 5, 4), (3, 1, 2, 3, 2), {"group": 3, "pads": [1, 0, 0, 0, 1, 1]}),
    ((2, 3, 5, 5), (6, 1, 3, 3), {"group": 3}),
]


def convolution(x: tuple[int, ...], w: tuple[int, ...], attributes: dict) -> tuple[Emit, Node]:
    e = Emit()
    e.input("x", np.float32, x)
    e.input("w", np.float32, w)
    y = e.Conv("x", "w", **attributes)
    e.input("g", np.float32, e.shape(y))
    return e, e.nodes[-1]


@pytest.mark.parametrize("is_small", [True, False])
@pytest.mark.parametrize(("x", "w", "attributes"), LAYERS)
def test_all_formulations_of_a_layer_agree(
    x: tuple[int, ...],
    w: tuple[int, ...],
    attributes: dict,
    is_small: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not is_small:  # no table of places is stored for a large image
        monkeypatch.setattr(formulations, "_MOST_PLACES", 0)
    e, node = convolution(x, w, attributes)
    layer = layer_of(e, node)
    filters = [FILTER[name](e, "x", "g", layer) for name in sorted(FILTER) if serves(name, layer)]
    inputs = [INPUT[name](e, "g", "w", layer) for name in sorted(INPUT) if serves(name, layer)]
    assert filters
    assert inputs
    assert {e.shape(name) for name in filters} == {w}
    assert {e.shape(name) for name in inputs} == {x}
    rng = np.random.default_rng(1)
    shapes = {"x": x, "w": w, "g": e.shape("g")}
    feeds = {k: rng.standard_normal(v).astype(np.float32) for k, v in shapes.items()}
    loaded = session(e, [*filters, *inputs])
    found = loaded.run(None, {i.name: feeds[i.name] for i in loaded.get_inputs()})
    for group in (found[: len(filters)], found[len(filters) :]):
        for other in group[1:]:
            assert_close(other, group[0], 1e-5)


def serves(name: str, layer: Layer) -> bool:
    return formulations.SERVES[name](layer)


@pytest.mark.parametrize(
    ("channels", "group", "kernel", "stride", "batch"),
    list(itertools.product((1, 3, 16, 64), (1, 4, 16), (1, 3, 4), (1, 2), (None, 8))),
)
def test_the_choice_is_a_formulation_that_serves_the_layer(
    channels: int, group: int, kernel: int, stride: int, batch: int | None
) -> None:
    channels *= group
    window = Window(
        (kernel,) * 2, (stride,) * 2, (1, 1), (kernel // 2,) * 2, (0, 0), (20, 12), (10, 6)
    )
    layer = Layer(batch, channels, channels, group, window)
    plan = choose(layer)
    assert serves(plan.filter, layer)
    assert serves(plan.input, layer)


def test_every_formulation_says_which_layers_it_serves() -> None:
    assert set(formulations.SERVES) == set(FILTER) | set(INPUT)
    assert conv.FILTER is FILTER
