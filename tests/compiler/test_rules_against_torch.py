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


def _gather_elements(a: dict, x: Any, indices: Any) -> Any:
    axis = a.get("axis", 0)
    return torch.gather(x, axis, indices % x.shape[axis])


def _scatter_elements(a: dict, x: Any, indices: Any, updates: Any) -> Any:
    axis = a.get("axis", 0)
    indices = indices % x.shape[axis]
    if a["reduction"] == "none":
        return x.scatter(axis, indices, updates)
    how = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}[a["reduction"]]
    return x.scatter_reduce(axis, indices, updates, how)


def _product(a: dict, x: Any, axes: Any = None) -> Any:
    if axes is None:
        return x
    for axis in sorted((int(i) % x.ndim for i in axes), reverse=True):
        x = x.prod(axis, keepdim=bool(a.get("keepdims", 1)))
    return x


def _resize(a: dict, x: Any, _: Any, scales: Any, sizes: Any = None) -> Any:
    kind = {"linear": {3: "linear", 4: "bilinear"}[x.ndim], "cubic": "bicubic"}[a["mode"]]
    corners = a.get("coordinate_transformation_mode") == "align_corners"
    size = None if sizes is None else [int(n) for n in sizes[2:]]
    scale = None if scales is None else [float(s) for s in scales[2:]]
    return F.interpolate(x, size, scale, kind, align_corners=corners)


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
    "Tan": lambda _, x: torch.tan(x),
    "Asin": lambda _, x: torch.asin(x),
    "Acos": lambda _, x: torch.acos(x),
    "Atanh": lambda _, x: torch.atanh(x),
    "Sinh": lambda _, x: torch.sinh(x),
    "Cosh": lambda _, x: torch.cosh(x),
    "Asinh": lambda _, x: torch.asinh(x),
    "Acosh": lambda _, x: torch.acosh(x),
    "Celu": lambda a, x: F.celu(x, a.get("alpha", 1.0)),
    "Mod": lambda _, x, y: torch.fmod(x, y),
    "Einsum": lambda a, *xs: torch.einsum(a["equation"], *xs),
    "GatherElements": _gather_elements,
    "ScatterElements": _scatter_elements,
    "TopK": lambda a, x, k: (
        torch.topk(x, int(k), a.get("axis", -1), bool(a.get("largest", 1))).values
    ),
    "LRN": lambda a, x: F.local_response_norm(
        x, a["size"], a["alpha"], a.get("beta", 0.75), a.get("bias", 1.0)
    ),
    "LpNormalization": lambda a, x: F.normalize(x, a.get("p", 2), a.get("axis", -1)),
    "ReduceProd": _product,
    "Resize": _resize,
}
ONNX_ONLY = ("auto_pad", "output_shape")  # paddings that torch does not compute


def _comparable(case: Case) -> bool:
    pads = list(case.attributes.get("pads", ()))
    uneven = pads[: len(pads) // 2] != pads[len(pads) // 2 :]
    if case.op == "AveragePool" and uneven:
        return False
    if case.op == "Resize":
        return _as_torch_resizes(case)
    return case.op in TORCH and not set(case.attributes) & set(ONNX_ONLY)


def _as_torch_resizes(case: Case) -> bool:
    """Linear, and cubic with torch's own coefficient."""
    a = dict(case.attributes)
    known = a.get("mode") == "linear" or (a.get("mode") == "cubic" and len(a) == 1)
    asymmetric = a.get("coordinate_transformation_mode") == "asymmetric"
    return known and not asymmetric and "antialias" not in a


KNOWN = [case for case in CASES if _comparable(case)]


@pytest.mark.parametrize("case", KNOWN, ids=[case.title for case in KNOWN])
def test_torch_agrees(case: Case) -> None:
    upstream = upstream_for(case)
    grads = Gradient(case, dynamic=True)(case.inputs, upstream)
    leaves = [
        None if x is None else torch.tensor(x, requires_grad=i in case.wrt)
        for i, x in enumerate(case.inputs)
    ]
    expected = TORCH[case.op](dict(case.attributes), *leaves)
    expected.backward(torch.tensor(upstream[0]))
    for index, got in zip(case.wrt, grads, strict=True):
        assert_close(got, leaves[index].grad.numpy(), 1e-5)


def test_the_second_opinion_covers_the_families_that_matter() -> None:
    assert {case.op for case in KNOWN} == set(TORCH)
