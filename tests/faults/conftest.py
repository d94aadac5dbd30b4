# SPDX-License-Identifier: Apache-2.0
"""What the fault tests share: a folder in memory."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


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
