# SPDX-License-Identifier: Apache-2.0
"""What the fault tests share: a training child, a federation to copy, a folder in memory."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from live_rounds import Template

from edge_sdk.lasting import LastingTrainer


@pytest.fixture(scope="module")
def trainer() -> Iterator[LastingTrainer]:
    one = LastingTrainer(nice=0)
    yield one
    one.close()


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Template:
    """A federation of as many devices and rounds as the module says, of its model if it has one."""
    folder, module = tmp_path_factory.mktemp("template"), request.module
    return Template(folder, module.DEVICES, module.ROUNDS, **getattr(module, "MODEL", {}))


@pytest.fixture
def quick(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: kill -9 takes no page from the kernel's cache.

    What a power cut takes is tested where files are written.
    """
    memory = Path("/dev/shm")  # noqa: S108 - a folder of its own is made in it
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    folder = Path(tempfile.mkdtemp(prefix="fedge-faults-", dir=memory))
    yield folder
    shutil.rmtree(folder)
