# SPDX-License-Identifier: Apache-2.0
"""Forward model in, training bundle out: the only code that knows onnx and flatbuffers.

from coordinator.compiler import build, export, sgd, momentum, adam, chain, clip
bundle = build("model.onnx", loss="cross_entropy", train="head.*", optimizer=momentum(0.9, lr=0.05))

Nothing heavy is loaded before a name is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coordinator.compiler.optim import Optimizer, adam, chain, clip, momentum, sgd
    from coordinator.compiler.pipeline import build, export

__all__ = ["Optimizer", "adam", "build", "chain", "clip", "export", "momentum", "sgd"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "pipeline" if name in {"build", "export"} else "optim"
    return getattr(import_module(f"{__name__}.{home}"), name)
