# SPDX-License-Identifier: Apache-2.0
"""An ear for the programs' logs: one that says that it met what it cannot explain has a fault."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from coordinator.simulation.watch import Watch

_NAMES = "edge_sdk", "coordinator"


class _Ear(logging.Handler):
    def __init__(self, watch: Watch) -> None:
        super().__init__(logging.WARNING)
        self._watch = watch

    def emit(self, record: logging.LogRecord) -> None:
        """Listen to a line."""
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            at = error.__traceback__
            while at is not None and at.tb_next is not None:
                at = at.tb_next
            place = "" if at is None else f" at {at.tb_frame.f_code.co_qualname}:{at.tb_lineno}"
            self._watch.fail("crash", f"{record.name}: {record.getMessage()}: {error!r}{place}")


@contextlib.contextmanager
def listening(watch: Watch) -> Iterator[None]:
    """Hear of every exception that a program logs, and keep the rest of its lines to ourselves."""
    ear, before = _Ear(watch), []
    for name in _NAMES:
        log = logging.getLogger(name)
        before.append((log, log.level, log.propagate))
        log.setLevel(logging.WARNING)
        log.propagate = False
        log.addHandler(ear)
    try:
        yield
    finally:
        for log, level, propagate in before:
            log.setLevel(level)
            log.propagate = propagate
            log.removeHandler(ear)
