# SPDX-License-Identifier: Apache-2.0
"""What the fault tests share: a training child, a federation to copy, a run of it undisturbed."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live_rounds import Boards, Template, check_journal, daemon, digests

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
def calm(
    template: Template, trainer: LastingTrainer, quick: Path, start_mosquitto: Any
) -> list[str]:
    """The versions of a run in which nothing happened, made once."""
    if not template.calm:
        broker = start_mosquitto("allow_anonymous true", "set_tcp_nodelay true")
        config = template.copy(quick / "calm", broker.url)
        boards = Boards(quick / "calm", [broker.url] * template.count, trainer)
        with contextlib.closing(boards), daemon(config, "--exit-when-done") as child:
            boards.start()
            assert child.wait(120) == 0
        check_journal(config, template, boards.receipts)
        template.calm = digests(config)
    return template.calm


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
