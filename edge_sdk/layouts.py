# SPDX-License-Identifier: Apache-2.0
"""What an example of a model is: how one is stored, and what the app gives made into it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edge_sdk.errors import BundleError
from edge_sdk.model import batched
from edge_sdk.trainer import Feed


def layout(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return what one example of a model is, as a ring of examples is told.

    Raises: BundleError when its shape is not fixed.
    """
    x, y = manifest["input"]["shape"][1:], manifest["target"]["shape"][1:]
    if None in x or None in y:
        raise BundleError(
            f"expected examples of one fixed shape, the bundle says {x} and {y}; fix the model's "
            "input shape, all but the batch"
        )
    dtype = Feed(manifest).dtype.name
    return {
        "x_shape": tuple(x),
        "x_dtype": dtype,
        "y_shape": tuple(y),
        "y_dtype": manifest["target"]["dtype"],
    }


def checked(
    manifest: dict[str, Any], xs: ArrayLike, labels: ArrayLike
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return examples and labels as the training graph takes them, `[n, ...]` both.

    Raises: ValueError on another shape, an unknown class, or numbers that are not finite.
    """
    x, is_one = batched(xs, tuple(manifest["input"]["shape"]))
    y = np.asarray(labels)
    y = y[np.newaxis] if is_one and y.ndim < len(manifest["target"]["shape"]) else y
    if len(x) == 0 == len(y):
        return x, y
    wanted = manifest["target"]
    if wanted["dtype"].startswith("int") and y.dtype.kind == "f" and np.array_equal(y, np.rint(y)):
        y = y.astype(np.int64)  # 3.0, as a CSV file has it
    if y.size == len(x) and y.ndim != len(wanted["shape"]):
        y = y.reshape(len(x), *(1 for _ in wanted["shape"][1:]))
    feed = Feed(manifest)
    x, y = feed.examples(x, y)
    inputs = feed.inputs(x)
    for name, values in (("x", inputs), ("label", y)):
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise ValueError(f"expected finite numbers in {name}, got NaN or infinity")
    return inputs, y
