# SPDX-License-Identifier: Apache-2.0
"""The wheel and the sdist, the same bytes from the same commit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from pack.source import Source


class Distributions(NamedTuple):
    """What goes to a package index."""

    wheel: Path
    sdist: Path


def build(source: Source, out: Path) -> Distributions:
    """Build both with the pinned back end that runs this, dated by the commit."""
    out.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", out.resolve()],
        cwd=source.folder,
        env={**os.environ, "SOURCE_DATE_EPOCH": str(source.epoch)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"the wheel was not built: {done.stderr.strip()}")
    stem = f"fedge-{source.version}"
    return Distributions(out / f"{stem}-py3-none-any.whl", out / f"{stem}.tar.gz")
