# SPDX-License-Identifier: Apache-2.0
"""torch as the second opinion on whole training runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from forward_models import Steps, Tensor, blobs, cnn, mlp

from coordinator.compiler import adam, build, chain, clip, momentum

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.oracle
X, LABELS = blobs((1, 8, 8), 4)


def net(params: dict[str, Tensor]) -> Any:
    """Build the network of `forward_models.cnn` with these weights."""
    nn = torch.nn
    layers = {
        "conv1": nn.Conv2d(1, 6, 3, padding=1),
        "conv2": nn.Conv2d(6, 8, 3, padding=1, stride=2),
        "fc": nn.Linear(32, 12),
        "head": nn.Linear(12, 4),
    }
    for name, layer in layers.items():
        for part in ("weight", "bias"):
            value = torch.tensor(params[f"{name}.{part}"])
            getattr(layer, part).data.copy_(value)
    chained = nn.Sequential()
    chained.add_module("conv1", layers["conv1"])
    chained.append(nn.ReLU()).append(nn.MaxPool2d(2))
    chained.add_module("conv2", layers["conv2"])
    chained.append(nn.ReLU()).append(nn.Flatten())
    chained.add_module("fc", layers["fc"])
    chained.append(nn.ReLU())
    chained.add_module("head", layers["head"])
    return chained


@pytest.mark.parametrize("optimizer", ["momentum", "nesterov", "adam", "clip"])
def test_five_steps_give_the_weights_that_torch_gives(optimizer: str) -> None:
    made = {
        "momentum": momentum(0.9, lr=0.05),
        "nesterov": momentum(0.9, lr=0.05, nesterov=True),
        "adam": adam(lr=0.01),
        "clip": chain(clip(0.5), momentum(0.9, lr=0.05)),
    }[optimizer]
    run = Steps(build(cnn(), loss="cross_entropy", optimizer=made))
    model = net(run.bundle.params())
    parameters = list(model.parameters())
    if optimizer == "adam":
        rival = torch.optim.Adam(parameters, lr=0.01)
    else:
        rival = torch.optim.SGD(parameters, 0.05, momentum=0.9, nesterov=optimizer == "nesterov")
    loss_of = torch.nn.CrossEntropyLoss()
    for i in range(5):
        x, y = X[i * 12 : i * 12 + 12], LABELS[i * 12 : i * 12 + 12]
        rival.zero_grad()
        loss = loss_of(model(torch.tensor(x)), torch.tensor(y))
        loss.backward()
        if optimizer == "clip":
            torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        rival.step()
        assert run.step(x, y) == pytest.approx(float(loss.detach()), rel=1e-5)
    theirs = {n: p.detach().numpy() for n, p in model.named_parameters()}
    assert theirs.keys() == run.params().keys()
    for name, value in run.params().items():
        np.testing.assert_allclose(value, theirs[name], atol=1e-4, rtol=0)


@pytest.mark.parametrize("loss", ["bce_logits", "mse"])
def test_other_losses_are_torchs_too(loss: str) -> None:
    x, y = blobs((6,), 3)
    target = np.eye(3, dtype=np.float32)[y]
    run = Steps(build(mlp(), loss=loss, optimizer=momentum(0.9, lr=0.1)))
    start = run.bundle.params()
    body, head = torch.nn.Linear(6, 8), torch.nn.Linear(8, 3)
    for name, layer in (("body", body), ("head", head)):
        layer.weight.data.copy_(torch.tensor(start[f"{name}.weight"]))
        layer.bias.data.copy_(torch.tensor(start[f"{name}.bias"]))
    model = torch.nn.Sequential(body, torch.nn.ReLU(), head)
    rival = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loss_of = torch.nn.BCEWithLogitsLoss() if loss == "bce_logits" else torch.nn.MSELoss()
    for _ in range(5):
        rival.zero_grad()
        theirs = loss_of(model(torch.tensor(x)), torch.tensor(target))
        theirs.backward()
        rival.step()
        assert run.step(x, target) == pytest.approx(float(theirs.detach()), rel=1e-5)
    np.testing.assert_allclose(run.params()["body.weight"], body.weight.detach().numpy(), atol=1e-5)
