# SPDX-License-Identifier: Apache-2.0
"""The training process as the parent sees it: a line in, a line out, and word of how it ended.

While it works the child gives a sign of life now and then. One that gives none for long, or is
still at it long after its time, is killed: a runtime that hangs must not hold the device up.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import IO, Any, Literal, NoReturn, TypeAlias, cast

from edge_sdk import footprint
from edge_sdk.errors import EngineError

Kind: TypeAlias = Literal["failed", "oom", "killed", "hung", "cancelled"]

HANG_S = 300.0
"""Longer than any one step that a device takes on: 20 GFLOP an example, on a board's slow core."""
_POLL_S = 0.1
_NOISE_BYTES = 8192
_MOST_LINE_BYTES = 1 << 20


class TrainFailed(EngineError):  # noqa: N818 - says what happened, as `when` and `left` do
    """A local training gave no delta; `reason` says why. The device goes on without it.

    `kind`: "oom" when memory ran out, "killed" by somebody, "hung" when it had to be killed,
    "cancelled" when it was asked to end, else "failed".
    """

    def __init__(self, reason: str, kind: Kind = "failed") -> None:
        super().__init__(reason)
        self.reason, self.kind = reason, kind


class Child:
    """A process that answers each line with a line. Raises: OSError when it cannot be started.

    The kernel ends it with the thread that made this. `hang_s`: how long it may give no sign of
    life while it works.
    """

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], hang_s: float = HANG_S
    ) -> None:
        self._hang_s = hang_s
        self._heard, self._noise = b"", b""
        self._kills = footprint.oom_kills()
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command,
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            env=environment,
            process_group=0,  # the terminal's Ctrl-C is for the application
        )
        self.is_free = True
        """Whether it waits for a line: not after an answer that was not waited for."""

    @property
    def is_gone(self) -> bool:
        """Whether the process has ended."""
        return self._process.poll() is not None

    def call(
        self, request: Mapping[str, Any], cancel: threading.Event, patience_s: float
    ) -> dict[str, Any]:
        """Send a request and wait for its answer, `patience_s` at most.

        Raises: TrainFailed, also when `cancel` is set; the child is then of no more use.
        """
        self.is_free = False
        self._ask(json.dumps(request).encode() + b"\n")
        said = self._answer(cancel, patience_s)
        self.is_free = True
        if "error" in said:
            kind: Kind = "oom" if said.get("kind") == "oom" else "failed"
            raise TrainFailed(str(said["error"]), kind)
        return said

    def end(self) -> None:
        """Kill it, if it is still there."""
        self._process.kill()
        with suppress(OSError), self._process:  # waits, and closes the pipes
            pass

    def _ask(self, line: bytes) -> None:
        try:
            asked = cast("IO[bytes]", self._process.stdin)
            asked.write(line)
            asked.flush()
        except OSError:  # it is gone: what it said before tells why
            self._fail()

    def _answer(self, cancel: threading.Event, patience_s: float) -> dict[str, Any]:
        """Return the next line that is an answer; other libraries may print before it."""
        until_s = time.monotonic() + patience_s
        hangs_at_s = time.monotonic() + self._hang_s
        with selectors.DefaultSelector() as selector:
            for stream in self._streams():
                selector.register(stream, selectors.EVENT_READ)
            while not cancel.is_set():
                said, is_alive = self._next()
                if said is not None:
                    return said
                now = time.monotonic()
                if is_alive:
                    hangs_at_s = now + self._hang_s
                if now > until_s:
                    raise TrainFailed("still training long after its budget; killed", "hung")
                if now > hangs_at_s:
                    raise TrainFailed(f"no sign of life for {self._hang_s:g} s; killed", "hung")
                for key, _ in selector.select(_POLL_S):
                    self._hear(key.fd, selector)
        raise TrainFailed("cancelled", "cancelled")

    def _streams(self) -> tuple[IO[bytes], IO[bytes]]:
        process = self._process
        return cast("IO[bytes]", process.stdout), cast("IO[bytes]", process.stderr)

    def _next(self) -> tuple[dict[str, Any] | None, bool]:
        """Return the answer among what was heard, if it is there; and whether the child lives."""
        is_alive = False
        while b"\n" in self._heard:
            line, _, self._heard = self._heard.partition(b"\n")
            said = _said(line)
            if said is not None and "at" not in said:
                return said, True
            is_alive = is_alive or said is not None
        self._heard = self._heard[-_MOST_LINE_BYTES:]
        return None, is_alive

    def _hear(self, stream: int, selector: selectors.BaseSelector) -> None:
        more = os.read(stream, 65536)
        if stream == self._streams()[0].fileno():
            self._heard += more
            if not more:
                self._fail()
        elif more:
            self._noise = (self._noise + more)[-_NOISE_BYTES:]
        else:
            selector.unregister(stream)

    def _fail(self) -> NoReturn:
        """Say how it ended, after all that it said; it is no longer there to say more."""
        code = self._process.wait()
        out, noise = (stream.read() for stream in self._streams())
        said = (self._heard + out).decode(errors="replace")
        if code == 0:
            raise TrainFailed(f"the training process answered {said[-200:]!r}; upgrade it")
        words = (self._noise + noise)[-_NOISE_BYTES:].decode(errors="replace")
        raise last_words(code, words, has_killed=footprint.oom_kills() > self._kills)


def last_words(code: int, noise: str, *, has_killed: bool = False) -> TrainFailed:
    """Return why a child ended, from its exit code and what it printed to stderr.

    `has_killed`: whether the kernel killed a process for want of memory meanwhile.
    """
    has_no_memory = any(word in noise for word in footprint.NO_MEMORY)
    if code < 0:
        name = next((s.name for s in signal.Signals if s == -code), f"signal {-code}")
        reason = f"the training process was killed by {name}; is there enough memory?"
        if has_no_memory or (has_killed and -code == signal.SIGKILL):
            return TrainFailed(f"out of memory: {reason}", "oom")
        return TrainFailed(reason, "killed" if -code == signal.SIGKILL else "failed")
    lines = noise.split("\n") if noise else []
    last = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
    kind: Kind = "oom" if has_no_memory else "failed"
    return TrainFailed(f"the training process failed with code {code}: {last[:300]}", kind)


def _said(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
