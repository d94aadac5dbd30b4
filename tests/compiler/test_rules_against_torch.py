# SPDX-License-Identifier: Apache-2.0
"""torch's autograd as the second opinion on whole families of rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from check_grads import Case, Gradient, assert_close, upstream_for
from grad_cases import CASES

torch = pytest.importorskip("torch", reason="the oracle group is not installed: torch is missing")
pytestmark = pytest.mark.oracle
F = torch.nn.functional


def _padded(x: Any, pads: tuple[int, ...], value: float = 0.0) -> Any:
    half = len(pads) // 2
    pairs = [(pads[i], pads[i + half]) for i in reversed(range(half))]
    return F.pad(x, [p for pair in pairs for p in pair], value=value)


def _conv(a: dict, x: Any, w: Any, b: Any = None) -> Any:
    convolve = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[x.ndim]
    x = _padded(x, tuple(a.get("pads", (0,) * 2 * (x.ndim - 2))))
    return convolve(x, w, b, a.get("strides", 1), 0, a.get("dilations", 1), a.get("group", 1))


def _deconv(a: dict, x: Any, w: Any, b: Any = None) -> Any:
    convolve = {3: F.conv_transpose1d, 4: F.conv_transpose2d}[x.ndim]
    half = x.ndim - 2
    pads = a.get("pads", [0] * 2 * half)
    full = convolve(
        x,
        w,
        b,
        a.get("strides", 1),
        0,
        a.get("output_padding", 0),
        a.get("group", 1),
        a.get("dilations", 1),
    )
    for i in range(half):
        full = full.narrow(2 + i, pads[i], full.shape[2 + i] - pads[i] - pads[half + i])
    return full


def _max_pool(a: dict, x: Any) -> Any:
    pool = {3: F.max_pool1d, 4: F.max_pool2d}[x.ndim]
    x = _padded(x, tuple(a.get("pads", (0,) * 2 * (x.ndim - 2))), -np.inf)
    return pool(
        x,
        a["kernel_shape"],
        a.get("strides", 1),
        0,
        a.get("dilations", 1),
        bool(a.get("ceil_mode", 0)),
    )


def _average_pool(a: dict, x: Any) -> Any:
    pool = {3: F.avg_pool1d, 4: F.avg_pool2d}[x.ndim]
    half = x.ndim - 2
    pads = a.get("pads", [0] * 2 * half)
    ceil, include = bool(a.get("ceil_mode", 0)), bool(a.get("count_include_pad", 0))
    return pool(x, a["kernel_shape"], a.get("strides", 1), pads[:half], ceil, include)


def _gemm(a: dict, x: Any, y: Any, c: Any = 0.0) -> Any:
    x = x.T if a.get("transA") else x
    y = y.T if a.get("transB") else y
    return a.get("alpha", 1.0) * (x @ y) + a.get("beta", 1.0) * c


def _layer_norm(a: dict, x: Any, scale: Any, bias: Any = None) -> Any:
    return F.layer_norm(x, scale.shape, scale, bias, a.get("epsilon", 1e-5))


def _batch_norm(a: dict, x: Any, *vectors: Any) -> Any:
    scale, bias, mean, var = vectors
    return F.batch_norm(x, mean, var, scale, bias, training=False, eps=a.get("epsilon", 1e-5))


TORCH: dict[str, Callable[..., Any]] = {
    "Conv": _conv,
    "ConvTranspose": _deconv,
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "Gemm": _gemm,
    "MatMul": lambda _, x, y: torch.matmul(x, y),
    "LayerNormalization": _layer_norm,
    "BatchNormalization": _batch_norm,
    "Softmax": lambda a, x: F.softmax(x, a.get("axis", -1)),
    "LogSoftmax": lambda a, x: F.log_softmax(x, a.get("axis", -1)),
    "HardSwish": lambda _, x: F.hardswish(x),
    "HardSigmoid": lambda a, x: torch.clip(a.get("alpha", 0.2) * x + a.get("beta", 0.5), 0, 1),
    "Elu": lambda a, x: F.elu(x, a.get("alpha", 1.0)),
    "Softplus": lambda _, x: F.softplus(x),
    "Mish": lambda _, x: F.mish(x),
    "Gelu": lambda a, x: F.gelu(x, approximate=a.get("approximate", "none")),
    "InstanceNormalization": lambda a, x, s, b: F.instance_norm(
        x, weight=s, bias=b, eps=a.get("epsilon", 1e-5)
    ),
    "Erf": lambda _, x: torch.erf(x),
}
ONNX_ONLY = ("auto_pad", "output_shape")  # paddings that torch does not compute


def _comparable(case: Case) -> bool:
    pads = list(case.attributes.get("pads", ()))
    uneven = pads[: len(pads) // 2] != pads[len(pads) // 2 :]
    if case.op == "AveragePool" and uneven:
        return False
    return case.op in TORCH and not set(case.attributes) & set(ONNX_ONLY)


KNOWN = [case for case in CASES if _comparable(case)]


@pytest.mark.parametrize("case", KNOWN, ids=[case.title for case in KNOWN])
def test_torch_agrees(case: Case) -> None:
    upstream = upstream_for(case)
    grads = Gradient(case, dynamic=True)(case.inputs, upstream)
    leaves = [torch.tensor(x, requires_grad=i in case.wrt) for i, x in enumerate(case.inputs)]
    expected = TORCH[case.op](dict(case.attributes), *leaves)
    expected.backward(torch.tensor(upstream[0]))
    for index, got in zip(case.wrt, grads, strict=True):
        assert_close(got, leaves[index].grad.numpy(), 1e-5)


def test_the_second_opinion_covers_the_families_that_matter() -> None:
    assert {case.op for case in KNOWN} == set(TORCH)
