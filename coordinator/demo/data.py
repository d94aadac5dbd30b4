# SPDX-License-Identifier: Apache-2.0
"""Whose rows are whose: splits examples over devices, reads data in the `--data` form.

The form is an NPZ of `x_train, y_train, client_train, x_test, y_test`: `client_train` says which
device holds each training row.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_sdk.errors import ConfigError

FIELDS = ("x_train", "y_train", "client_train", "x_test", "y_test")
DRAWS = 20
LEAST_ROWS = 2
"""A device with fewer rows than this cannot show a loss that means anything."""


class Split(NamedTuple):
    """Rows of each device, and the rows that only the final measurement sees."""

    devices: list[tuple[NDArray[Any], NDArray[Any]]]
    x_test: NDArray[Any]
    y_test: NDArray[Any]


def dirichlet(
    labels: NDArray[np.int64], devices: int, alpha: float, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Give each row to a device, each class in Dirichlet(alpha) shares (Hsu et al. 2019).

    Draws again where a device holds fewer than `LEAST_ROWS` rows; with so many devices that this
    goes on, the richest give what is missing.
    Returns: int64 `[rows]`, the device of each row.
    """
    if len(labels) < devices * LEAST_ROWS:
        raise ConfigError(
            f"{len(labels)} training rows are too few for {devices} devices; use fewer"
        )
    owner = np.empty(len(labels), np.int64)
    for _ in range(DRAWS):
        for label in np.unique(labels):
            rows = rng.permutation(np.flatnonzero(labels == label))
            cuts = np.cumsum(rng.dirichlet(np.full(devices, alpha)))[:-1]
            for device, part in enumerate(np.split(rows, (cuts * len(rows)).astype(np.int64))):
                owner[part] = device
        if np.bincount(owner, minlength=devices).min() >= LEAST_ROWS:
            break
    while (counts := np.bincount(owner, minlength=devices)).min() < LEAST_ROWS:
        owner[np.flatnonzero(owner == counts.argmax())[0]] = counts.argmin()
    return owner


def load(path: Path, devices: int | None) -> Split:
    """Read the `--data` form; keep the `devices` largest owners of rows where fewer are asked for.

    Raises: ConfigError naming the array that is missing or of the wrong length.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: expected an NPZ file without pickles: {error}") from None
    missing = [name for name in FIELDS if name not in arrays]
    if missing:
        raise ConfigError(f"{path}: expected the arrays {', '.join(FIELDS)}; missing {missing}")
    if not len(arrays["x_train"]) == len(arrays["y_train"]) == len(arrays["client_train"]):
        raise ConfigError(f"{path}: x_train, y_train and client_train must have as many rows each")
    if len(arrays["x_test"]) != len(arrays["y_test"]) or not len(arrays["x_test"]):
        raise ConfigError(f"{path}: x_test and y_test must have as many rows each, and some")
    return divide(arrays, devices)


def divide(arrays: dict[str, NDArray[Any]], devices: int | None) -> Split:
    """Cut the training rows by `client_train`."""
    owners, sizes = np.unique(arrays["client_train"], return_counts=True)
    wanted = len(owners) if devices is None else devices
    if wanted > len(owners):
        raise ConfigError(f"{wanted} devices asked for, the data has rows of {len(owners)}")
    chosen = sorted(owners[np.argsort(-sizes, kind="stable")[:wanted]].tolist())
    rows = [arrays["client_train"] == owner for owner in chosen]
    x, y = arrays["x_train"], arrays["y_train"]
    return Split([(x[r], y[r]) for r in rows], arrays["x_test"], arrays["y_test"])


def owners(path: Path) -> int:
    """Return how many devices the data names."""
    return len(load(path, None).devices)
