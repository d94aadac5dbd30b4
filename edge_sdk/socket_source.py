# SPDX-License-Identifier: Apache-2.0
"""Predict and learn over a local Unix socket (0600), one JSON object a line, for any language.

Requests: ``{"predict": X}``, ``{"learn": X, "label": Y}``, ``{"status": true}``. Each gets one line
back; ``{"error": "..."}`` says what was expected. One thread serves all clients in turn.
"""

from __future__ import annotations

import contextlib
import json
import logging
import selectors
import socket
import threading
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edge_sdk.errors import ConfigError, FedgeError

log = logging.getLogger(__name__)

MAX_LINE_BYTES = 4 * 2**20
MAX_CLIENTS = 16
SEND_PATIENCE_S = 2.0


class Answerer(Protocol):
    """The part of a `Device` that requests are put to."""

    def predict(self, x: ArrayLike) -> NDArray[Any]:
        """Answer with the model in use."""
        ...

    def learn(self, x: ArrayLike, label: ArrayLike) -> None:
        """Store one labelled example."""
        ...

    def status(self) -> dict[str, Any]:
        """Say how the device is doing."""
        ...


class Socket:
    """Serves requests at `path` until told to stop.

    Raises: ConfigError when the socket cannot be made there.
    """

    def __init__(self, path: Path, device: Answerer) -> None:
        self._path, self._device = path, device
        self._listener = _listen(path)
        self._clients: dict[socket.socket, bytearray] = {}

    def run(self, stop: threading.Event) -> None:
        """Serve until `stop` is set; looks at it twice a second."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            while not stop.is_set():
                for key, _ in selector.select(0.5):
                    self._ready(selector, key.fileobj)
        self.close()

    def close(self) -> None:
        """Hang up on all clients and remove the socket."""
        for client in list(self._clients):
            client.close()
        self._clients.clear()
        self._listener.close()
        with contextlib.suppress(OSError):
            self._path.unlink()

    def _ready(self, selector: selectors.BaseSelector, ready: Any) -> None:
        if ready is not self._listener:
            if not self._serve(ready):
                selector.unregister(ready)
                ready.close()
                del self._clients[ready]
            return
        client, _ = self._listener.accept()
        if len(self._clients) >= MAX_CLIENTS:
            client.close()
            return
        client.settimeout(SEND_PATIENCE_S)
        self._clients[client] = bytearray()
        selector.register(client, selectors.EVENT_READ)

    def _serve(self, client: socket.socket) -> bool:
        """Answer all whole lines that came; return whether the client stays."""
        pending = self._clients[client]
        try:
            data = client.recv(2**16)
            pending += data
            while (end := pending.find(b"\n")) >= 0:
                line = bytes(pending[:end])
                del pending[: end + 1]
                client.sendall(json.dumps(self._answer(line)).encode() + b"\n")
        except OSError:  # it hung up, or does not read its answers
            return False
        return bool(data) and len(pending) <= MAX_LINE_BYTES

    def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            request = json.loads(line)
            return self._asked(request)
        except (ValueError, TypeError, RecursionError, FedgeError) as error:
            return {"error": " ".join(str(error).split())}

    def _asked(self, request: object) -> dict[str, Any]:
        match request:
            case {"predict": x}:
                return {"output": np.asarray(self._device.predict(_numbers(x))).tolist()}
            case {"learn": x, "label": label}:
                self._device.learn(_numbers(x), label)
                return {"learned": True}
            case {"status": _}:
                return self._device.status()
        raise ValueError('expected {"predict": X}, {"learn": X, "label": Y} or {"status": true}')


def _numbers(x: object) -> NDArray[np.float32]:
    return np.asarray(x, np.float32)


def _listen(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.is_socket() and not _is_served(path):
            path.unlink()  # its process was killed
        listener.bind(str(path))
        path.chmod(0o600)  # before listen: until then nobody can connect
        listener.listen(MAX_CLIENTS)
    except OSError as error:
        listener.close()
        why = error.strerror or str(error)
        raise ConfigError(
            f"source.socket: cannot listen at {path}: {why}; choose another"
        ) from error
    return listener


def _is_served(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return False
    return True
