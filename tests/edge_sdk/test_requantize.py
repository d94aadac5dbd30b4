# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
from hand_bundles import INPUT_SCALE, initial, mlp, quantize
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sdk import requantize as rules
from edge_sdk.bundle import Bundle, pack
from edge_sdk.errors import BundleError
from edge_sdk.requantize import TINY, along, requantize, scale_of


def original(bundle: Bundle) -> bytes:
    return bundle.graph("onnx", "predict")


def read(model: bytes, patch: dict, count: int, dtype: str, key: str = "offset") -> np.ndarray:
    return np.frombuffer(model, dtype, count, patch[key])


@pytest.mark.parametrize("quantized", [False, True])
def test_untrained_parameters_give_back_the_original_bytes(quantized: bool) -> None:
    bundle = mlp(quantized=quantized)
    assert requantize(bundle, bundle.params()) == original(bundle)


def test_a_float_model_holds_the_new_values_and_nothing_else_moved() -> None:
    bundle = mlp()
    params = bundle.params()
    params["w2"] += 1
    model = requantize(bundle, params)
    patch = bundle.manifest["patches"]["onnx"][2]
    np.testing.assert_array_equal(read(model, patch, 15, "<f4").reshape(5, 3), params["w2"])
    at, end = patch["offset"], patch["offset"] + 60
    assert (model[:at], model[end:]) == (original(bundle)[:at], original(bundle)[end:])


def patched(bundle: Bundle, index: int, **fields: object) -> Bundle:
    """Return a bundle with one patch spelled otherwise."""
    manifest = {k: v for k, v in bundle.manifest.items() if k != "members"}
    patches = [dict(p) for p in manifest["patches"]["onnx"]]
    patches[index] |= fields
    members = {k: bundle.member(k) for k in bundle.manifest["members"]}
    return pack(manifest | {"patches": {"onnx": patches}}, members)


def test_half_precision_takes_two_bytes_a_number_and_is_never_infinite() -> None:
    bundle = patched(mlp(), 2, kind="float16")
    params = bundle.params()
    params["w2"] = initial((6, 5, 3), 9)["w2"]
    params["w2"][0, 0] = 1e9
    model = requantize(bundle, params)
    patch = bundle.manifest["patches"]["onnx"][2]
    expected = np.clip(params["w2"], -65504, 65504).astype(np.float16)
    np.testing.assert_array_equal(read(model, patch, 15, "<f2").reshape(5, 3), expected)
    end = patch["offset"] + 30
    assert model[end:] == original(bundle)[end:]


def test_a_weight_is_laid_out_as_its_format_has_it() -> None:
    bundle = patched(mlp(), 2, order=[1, 0])
    params = bundle.params()
    params["w2"] = initial((6, 5, 3), 9)["w2"]
    patch = bundle.manifest["patches"]["onnx"][2]
    found = read(requantize(bundle, params), patch, 15, "<f4").reshape(3, 5)
    np.testing.assert_array_equal(found, params["w2"].T)


def test_weights_and_scales_follow_the_numpy_reference() -> None:
    bundle = mlp(quantized=True)
    params = bundle.params()
    trained = initial((6, 5, 3), 9)
    params |= {"w1": trained["w1"], "w2": trained["w2"]}
    model = requantize(bundle, params)
    per_channel, bias, per_tensor, _ = bundle.manifest["patches"]["onnx"]
    for patch, name, axis in ((per_channel, "w1", 1), (per_tensor, "w2", None)):
        q, scale = quantize(params[name], axis)
        np.testing.assert_array_equal(read(model, patch, q.size, "i1").reshape(q.shape), q)
        np.testing.assert_array_equal(
            read(model, patch, patch["scales"], "<f4", "scale_offset"), np.ravel(scale)
        )
    scale = np.float32(INPUT_SCALE) * quantize(params["w1"], 1)[1]
    np.testing.assert_array_equal(read(model, bias, 5, "<f4", "scale_offset"), scale)
    np.testing.assert_array_equal(
        read(model, bias, 5, "<i4"), np.rint(params["b1"].astype(np.float64) / scale)
    )


def test_a_trained_bias_keeps_the_original_scale_of_an_untrained_weight() -> None:
    bundle = mlp(quantized=True)
    params = bundle.params()
    params["b1"] += np.float32(0.25)
    model = requantize(bundle, params)
    bias = bundle.manifest["patches"]["onnx"][1]
    for key in ("scale_offset",):
        np.testing.assert_array_equal(
            read(model, bias, 5, "<f4", key), read(original(bundle), bias, 5, "<f4", key)
        )
    assert not np.array_equal(read(model, bias, 5, "<i4"), read(original(bundle), bias, 5, "<i4"))


def with_input_range(**bias: object) -> Bundle:
    """The hand-made int8 model, its input's step a parameter that the first bias follows."""
    bundle = mlp(quantized=True)
    manifest = {k: v for k, v in bundle.manifest.items() if k != "members"}
    members = {k: bundle.member(k) for k in bundle.manifest["members"]}
    at = original(bundle).find(np.float32(INPUT_SCALE).tobytes())
    n, patches = len(bundle.shapes), list(manifest["patches"]["onnx"])
    patches[1] = {**patches[1], "input": n, **bias}
    patches.append({"param": n, "kind": "range", "offset": at})
    changed = {
        "params": [*manifest["params"], {"name": "x.range", "shape": []}],
        "patches": {"onnx": patches},
    }
    members["params.bin"] += np.float32(0).tobytes()
    return pack({**manifest, **changed}, members)


def test_a_learned_range_rescales_its_step_and_the_bias_that_follows_it() -> None:
    bundle = with_input_range()
    assert requantize(bundle, bundle.params()) == original(bundle)
    params = bundle.params()
    params["x.range"] = np.full((), 0.375, np.float32)  # times four: one octave and a half
    model = requantize(bundle, params)
    bias, step = bundle.manifest["patches"]["onnx"][1], bundle.manifest["patches"]["onnx"][-1]
    assert read(model, step, 1, "<f4")[0] == np.float32(INPUT_SCALE) * 2 * np.float32(1.5)
    before, after = (
        read(data, bias, 5, "<f4", "scale_offset") for data in (original(bundle), model)
    )
    np.testing.assert_allclose(after, 3 * before, rtol=1e-6)
    np.testing.assert_array_equal(
        read(model, bias, 5, "<i4"), np.rint(params["b1"].astype(np.float64) / after)
    )
    assert sum(a != b for a, b in zip(model, original(bundle), strict=True)) <= 4 + 2 * 20


@settings(deadline=None, max_examples=50)
@given(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.floats(2.0**-100, 2.0**100, width=32),
)
def test_a_step_stays_a_positive_number_within_its_bounds(value: float, start: float) -> None:
    start32 = np.float32(start)
    step = rules.step_of(np.asarray(value, np.float32), start32)
    assert np.float32(2.0**-16) * start32 <= step <= np.float32(2.0**16) * start32


@pytest.mark.parametrize("wrong", [0, 1, 9_999])
def test_a_bias_follows_nothing_but_a_range(wrong: int) -> None:
    with pytest.raises(BundleError, match="a parameter that is a range"):
        with_input_range(input=wrong)


def test_a_frozen_bias_follows_the_new_scale_of_its_weight() -> None:
    bundle = mlp(quantized=True)
    manifest = {k: v for k, v in bundle.manifest.items() if k != "members"}
    members = {k: bundle.member(k) for k in bundle.manifest["members"]}
    bias = {**manifest["patches"]["onnx"][1], "param": None, "shape": [5]}
    patches = list(manifest["patches"]["onnx"])
    patches[1] = bias
    frozen = pack({**manifest, "patches": {"onnx": patches}}, members)
    params = frozen.params()
    params["w1"] *= np.float32(3)
    model = requantize(frozen, params)
    levels, scale = read(model, bias, 5, "<i4"), read(model, bias, 5, "<f4", "scale_offset")
    np.testing.assert_allclose(levels * scale, frozen.params()["b1"], atol=float(scale.max()) / 2)
    np.testing.assert_allclose(
        scale, 3 * read(original(frozen), bias, 5, "<f4", "scale_offset"), rtol=1e-6
    )


def test_a_given_weight_scale_sets_the_bias_scale() -> None:
    bundle = mlp(quantized=True)
    manifest = {k: v for k, v in bundle.manifest.items() if k != "members"}
    members = {k: bundle.member(k) for k in bundle.manifest["members"]}
    patches = list(manifest["patches"]["onnx"])
    patches[1] = {k: v for k, v in patches[1].items() if k != "weight"} | {"weight_scale": [0.5]}
    other = pack({**manifest, "patches": {"onnx": patches}}, members)
    params = other.params()
    params["b1"] += 1
    model = requantize(other, params)
    scale = np.float32(INPUT_SCALE) * np.float32(0.5)
    np.testing.assert_array_equal(
        read(model, patches[1], 5, "<f4", "scale_offset"), np.full(5, scale)
    )


def test_the_model_answers_within_a_step_of_the_float_master() -> None:
    bundle = mlp((20, 16, 4), quantized=True)
    params = bundle.params()
    rng = np.random.default_rng(2)
    params = {k: v + rng.normal(0, 0.3, v.shape).astype(np.float32) for k, v in params.items()}
    raw = rng.integers(-60, 60, (50, 20), np.int8)
    x = (raw.astype(np.float32) - 3) * np.float32(INPUT_SCALE)
    hidden = np.maximum(x @ params["w1"] + params["b1"], 0)
    expected = np.clip((hidden @ params["w2"] + params["b2"]) / 0.125 - 7, -128, 127)
    session = onnxruntime.InferenceSession(requantize(bundle, params))
    got = session.run(None, {"features": raw})[0]
    assert np.abs(got - expected).mean() < 1.0


def test_values_that_are_not_finite_are_refused_by_name() -> None:
    bundle = mlp(quantized=True)
    params = bundle.params()
    params["w2"][0, 0] = np.inf
    with pytest.raises(BundleError, match=r"\['w2'\]"):
        requantize(bundle, params)


def test_a_weight_of_zeros_takes_the_least_scale_and_a_huge_bias_is_clipped() -> None:
    bundle = mlp(quantized=True)
    params = bundle.params()
    params["w1"][...] = 0
    params["b1"][...] = [1e30, -1e30, 0, 1, -1]
    with np.errstate(all="raise", under="ignore"):
        model = requantize(bundle, params)
    bias = read(model, bundle.manifest["patches"]["onnx"][1], 5, "<i4")
    assert list(bias[:3]) == [2**31 - 1, -(2**31), 0]
    assert not read(model, bundle.manifest["patches"]["onnx"][0], 30, "i1").any()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(["int8", "uint8"]),
    st.sampled_from([None, 0, 1, 2]),
    st.integers(-128, 255),
    st.floats(1e-6, 1e6),
)
def test_dequantized_weights_are_within_half_a_step_and_in_range(
    seed: int, dtype: str, axis: int | None, zero: int, size: float
) -> None:
    low, high = rules.limits(dtype)
    point = np.asarray(np.clip(zero, low + 1, high - 1))
    weight = (np.random.default_rng(seed).normal(0, size, (3, 4, 5))).astype(np.float32)
    scale = scale_of(weight, dtype, axis, point)
    q = rules.quantize(weight, scale, dtype, axis, point)
    assert q.dtype == dtype
    assert q.min() >= low
    step = along(scale, axis, 3)
    error = np.abs((q.astype(np.float32) - point) * step - weight)
    assert (error <= step * 0.5001 + TINY).all()


def test_a_zero_point_at_the_edge_leaves_the_other_side_to_set_the_scale() -> None:
    weight = np.array([-1.0, 0.0, 2.55], np.float32)
    scale = scale_of(weight, "uint8", None, np.asarray(0))
    assert scale == np.float32(2.55) / np.float32(255)
    assert list(rules.quantize(weight, scale, "uint8", None, np.asarray(0))) == [0, 0, 255]
