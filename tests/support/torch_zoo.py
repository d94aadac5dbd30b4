# SPDX-License-Identifier: Apache-2.0
"""Well-known architectures as small torch modules, and both of torch's ONNX exporters.

The shapes follow the papers; depths and widths are cut where that only costs time. Batch
normalizations get their statistics from the data, so that an untrained network is not dead.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from forward_models import Tensor, blobs
from torch import nn

CLASSES = 5
IMAGE, SERIES, TOKENS = (3, 32, 32), (10, 6), (12,)
VOCABULARY = 20


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(60, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 16), nn.GELU(),
        nn.Linear(16, CLASSES),
    )  # fmt: skip


def cnn() -> nn.Module:
    """Plain convolutions, each with a BatchNorm."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, CLASSES),
    )  # fmt: skip


class Residual(nn.Module):
    """A basic block (He et al. 2016)."""

    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(i, o, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(o)
        self.conv2 = nn.Conv2d(o, o, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(o)
        self.relu = nn.ReLU(inplace=True)
        self.down: nn.Module = nn.Identity()
        if stride > 1 or i != o:
            self.down = nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + self.down(x))


def resnet18(width: int = 64) -> nn.Module:
    """Eleven million parameters at its own width (He et al. 2016)."""
    blocks: list[nn.Module] = [
        nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, 1),
    ]  # fmt: skip
    i = width
    for stage, stride in enumerate((1, 2, 2, 2)):
        o = width << stage
        blocks += [Residual(i, o, stride), Residual(o, o, 1)]
        i = o
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(i, CLASSES))


class Squeeze(nn.Module):
    """Squeeze and excite (Hu et al. 2018), as in MobileNetV3."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = max(8, channels // 4)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc1, self.fc2 = nn.Conv2d(channels, inner, 1), nn.Conv2d(inner, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = self.fc2(torch.relu(self.fc1(self.pool(x))))
        return x * nn.functional.hardsigmoid(gate)


class Inverted(nn.Module):
    """An inverted residual (Sandler et al. 2018), squeezed or not (Howard et al. 2019)."""

    def __init__(
        self, i: int, mid: int, o: int, *, k: int, stride: int, act: type[nn.Module], se: bool
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        if mid != i:
            layers += [nn.Conv2d(i, mid, 1, bias=False), nn.BatchNorm2d(mid), act()]
        layers += [nn.Conv2d(mid, mid, k, stride, k // 2, groups=mid, bias=False)]
        layers += [nn.BatchNorm2d(mid), act()]
        layers += [Squeeze(mid)] if se else []
        layers += [nn.Conv2d(mid, o, 1, bias=False), nn.BatchNorm2d(o)]
        self.layers = nn.Sequential(*layers)
        self.is_residual = stride == 1 and i == o

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layers(x)
        return x + y if self.is_residual else y


def mobilenet_v2() -> nn.Module:
    """All seventeen blocks at a quarter of the width; the stem's stride is 1, for small images."""
    table = [  # expansion, channels, repeats, stride
        (1, 8, 1, 1), (6, 8, 2, 2), (6, 8, 3, 2), (6, 16, 4, 2),
        (6, 24, 3, 1), (6, 40, 3, 2), (6, 80, 1, 1),
    ]  # fmt: skip
    layers: list[nn.Module] = [nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6()]
    i = 8
    for t, c, n, s in table:
        for repeat in range(n):
            stride = 1 if repeat else s
            layers.append(Inverted(i, i * t, c, k=3, stride=stride, act=nn.ReLU6, se=False))
            i = c
    layers += [nn.Conv2d(i, 160, 1, bias=False), nn.BatchNorm2d(160), nn.ReLU6()]
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(160, CLASSES)
    )


def mobilenet_v3() -> nn.Module:
    """MobileNetV3-small's eleven blocks at half the width; the stem's stride is 1."""
    table = [  # kernel, expansion, channels, squeeze, hard swish, stride
        (3, 8, 8, True, False, 2), (3, 36, 12, False, False, 2), (3, 44, 12, False, False, 1),
        (5, 48, 20, True, True, 2), (5, 120, 20, True, True, 1), (5, 120, 20, True, True, 1),
        (5, 60, 24, True, True, 1), (5, 72, 24, True, True, 1), (5, 144, 48, True, True, 2),
        (5, 288, 48, True, True, 1), (5, 288, 48, True, True, 1),
    ]  # fmt: skip
    layers: list[nn.Module] = [nn.Conv2d(3, 8, 3, 1, 1, bias=False)]
    layers += [nn.BatchNorm2d(8), nn.Hardswish()]
    i = 8
    for k, mid, o, se, is_hard, stride in table:
        act = nn.Hardswish if is_hard else nn.ReLU
        layers.append(Inverted(i, mid, o, k=k, stride=stride, act=act, se=se))
        i = o
    layers += [nn.Conv2d(i, 288, 1, bias=False), nn.BatchNorm2d(288), nn.Hardswish()]
    head = [nn.Linear(288, 64), nn.Hardswish(), nn.Dropout(0.2), nn.Linear(64, CLASSES)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), *head)


class Transformer(nn.Module):
    """Tokens, learned positions, two encoder layers, the mean, a head (Vaswani et al. 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 16)
        self.place = nn.Parameter(0.1 * torch.randn(TOKENS[0], 16))
        layer = nn.TransformerEncoderLayer(16, 4, 32, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(self.embed(ids) + self.place).mean(1))


class Recurrent(nn.Module):
    """A recurrent layer over a series, classified by its last state or the mean of both ways."""

    def __init__(self, kind: type[nn.Module], **options: Any) -> None:
        super().__init__()
        self.rnn = kind(SERIES[1], 12, batch_first=True, **options)
        self.is_both = bool(options.get("bidirectional"))
        self.head = nn.Linear(24 if self.is_both else 12, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        states = self.rnn(x)[0]
        return self.head(states.mean(1) if self.is_both else states[:, -1])


class Model(NamedTuple):
    """How to make a network, the shape of an example, and whether examples are token ids."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    is_text: bool = False


ZOO = {
    "mlp": Model(mlp, SERIES),
    "cnn": Model(cnn, IMAGE),
    "resnet18": Model(resnet18, IMAGE),
    "mobilenet_v2": Model(mobilenet_v2, IMAGE),
    "mobilenet_v3": Model(mobilenet_v3, IMAGE),
    "transformer": Model(Transformer, TOKENS, is_text=True),
    "lstm": Model(lambda: Recurrent(nn.LSTM), SERIES),
    "gru": Model(lambda: Recurrent(nn.GRU, bidirectional=True), SERIES),
}


def rows(model: Model, n: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Draw examples that a small network tells apart."""
    if not model.is_text:
        return blobs(model.shape, CLASSES, n, seed)
    rng = np.random.default_rng(seed)
    y = rng.integers(0, CLASSES, n)
    spread = rng.integers(0, VOCABULARY // CLASSES, (n, *model.shape))
    return (y[:, None] * (VOCABULARY // CLASSES) + spread).astype(np.int64), y.astype(np.int64)


def network(model: Model) -> nn.Module:
    """Make a network from a fixed seed, ready to infer."""
    torch.manual_seed(0)
    made = model.make()
    with torch.no_grad():  # exporters store equal tensors once, and what starts equal learns as one
        for p in made.parameters():
            p.add_(torch.randn_like(p) * (0.02 + 0.05 * p.abs().mean()))
    x = torch.tensor(rows(model, 64)[0])
    for layer in made.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None  # the mean over what it sees
    with torch.no_grad():
        made.train()(x)
    return made.eval()


def taught(made: nn.Module, x: Tensor, y: Tensor, steps: int = 30) -> nn.Module:
    """Train a network a little, in torch, so that its activations have the ranges of a real one."""
    rows, labels = torch.tensor(x), torch.tensor(y)
    optimizer = torch.optim.Adam(made.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(made(rows), labels).backward()
        optimizer.step()
    return made


def exported(
    made: nn.Module,
    x: Tensor,
    *,
    new: bool = False,
    batch: int | None = None,
    opset: int | None = None,
    **more: Any,
) -> onnx.ModelProto:
    """Export as torch's users do, by the new exporter or the old; `batch` None is dynamic."""
    example = torch.tensor(x[: 2 if batch is None else batch])
    options: dict[str, Any] = {"opset_version": opset, "dynamo": new, **more}
    if batch is None and new:
        options["dynamic_shapes"] = ({0: torch.export.Dim("batch")},)
    elif batch is None:
        options["dynamic_axes"] = {"x": {0: "batch"}, "y": {0: "batch"}}
    with _quiet():
        if new:
            program = torch.onnx.export(made, (example,), verbose=False, **options)
            assert program is not None
            return program.model_proto
        file = io.BytesIO()
        names = {"input_names": ["x"], "output_names": ["y"]}
        torch.onnx.export(made, (example,), file, **names, **options)
        return onnx.load_from_string(file.getvalue())


def unfolded(made: nn.Module, x: Tensor) -> onnx.ModelProto:
    """Export each parameter as torch has it: by its name, BatchNorm not folded into Conv."""
    keep = torch.onnx.TrainingMode.PRESERVE
    return exported(made, x, training=keep, do_constant_folding=False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Exporters warn of their own parts; that is not what is tested."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
