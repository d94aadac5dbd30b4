# SPDX-License-Identifier: Apache-2.0
"""A device as a process of its own, `fedge device run`, beside those of `live_rounds`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from live_rounds import TASK


class BoardProcess:
    """Device `index` of a run in `folder`, under another command if `under` says so.

    Args:
        settings: more lines of its `device.toml`; a `source` is a table.
    """

    def __init__(
        self, folder: Path, broker: str, index: int, under: Sequence[str] = (), **settings: Any
    ) -> None:
        self.state, self._log = folder / f"d{index}", folder / f"device{index}.log"
        config = folder / f"device{index}.toml"
        known = {"broker": broker, "task": TASK, "state": f"d{index}", "bundle": "t.fedge"}
        source = settings.pop("source", None)
        lines = [f"{key} = {json.dumps(value)}" for key, value in (known | settings).items()]
        if source is not None:
            lines += ["[source]", *(f"{k} = {json.dumps(v)}" for k, v in source.items())]
        config.write_text("\n".join(lines))
        run = [sys.executable, "-m", "edge_sdk", "device", "run", "--config", str(config)]
        self._command = [*under, *run]

    def __enter__(self) -> Self:
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(self._command, stderr=log)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.process.kill()
        self.process.wait()
        if error is not None:
            error.add_note(f"device: {self.said[-2000:]}")

    @property
    def said(self) -> str:
        """All that it has logged."""
        return self._log.read_text()

    @property
    def status(self) -> dict[str, Any]:
        """What it last said of itself; nothing before it has."""
        file = self.state / "status.json"
        found: dict[str, Any] = json.loads(file.read_bytes()) if file.exists() else {}
        return found

    def leave(self) -> dict[str, Any]:
        """Stop it politely; return what it says of itself in the end."""
        self.process.terminate()
        assert self.process.wait(15) == 0, self.said[-2000:]
        return self.status
