# SPDX-License-Identifier: Apache-2.0
"""A broker of the coordinator's own, on loopback, for the demo and for development.

mosquitto as a child process where it is installed (it dies with its parent), else amqtt in the
running loop. For a fleet, run mosquitto as a service with TLS and an access list instead.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import socket
import sys
import tempfile
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Literal

from edge_sdk.errors import FedgeError, TransportError

log = logging.getLogger(__name__)

START_S = 15.0
STOP_S = 5.0
HOST = "127.0.0.1"

# The child asks the kernel for a signal when its parent dies, and only then becomes the broker.
_TETHER = (
    "import ctypes, os, sys\n"
    "ctypes.CDLL(None).prctl(1, 15)\n"  # PR_SET_PDEATHSIG, SIGTERM
    "if os.getppid() != int(sys.argv[1]): sys.exit(1)\n"
    "os.execv(sys.argv[2], sys.argv[2:])\n"
)


@contextlib.asynccontextmanager
async def embedded(
    port: int = 0,
    *,
    folder: str | Path | None = None,
    kind: Literal["auto", "mosquitto", "amqtt"] = "auto",
) -> AsyncIterator[str]:
    """Run a broker on loopback while the context lasts; give its URL.

    `port` 0 takes a free one. mosquitto keeps sessions and retained messages in `folder` from one
    run to the next; without it, and with amqtt, they last as long as the context.
    Raises: FedgeError when no broker is installed, TransportError when it does not start.
    """
    program = _mosquitto() if kind != "amqtt" else None
    if program is not None:
        with _folder(folder) as where:
            async with _child(program, port, where) as url:
                yield url
    elif kind != "mosquitto" and _has_amqtt():
        async with _amqtt(port) as url:
            yield url
    else:
        wanted = {"auto": "mosquitto or amqtt"}.get(kind, kind)
        raise FedgeError(
            f"no broker to embed: expected {wanted}; apt install mosquitto,"
            " or pip install 'fedge[broker]', or give the URL of a broker that runs"
        )


def free_port() -> int:
    """Return a TCP port of loopback that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def mosquitto_config(port: int, folder: Path) -> str:
    """Return the configuration of an embedded mosquitto: loopback only, nobody asked for a name.

    What matters: more than the 1000 messages that are kept for a client by default, for all that
    is over is lost although it was acknowledged.
    """
    lines = [
        f"listener {port} {HOST}",
        "allow_anonymous true",
        "persistence true",
        f"persistence_location {folder}/",
        "autosave_interval 60",
        "persistent_client_expiration 1d",
        "max_queued_messages 100000",
        "max_queued_bytes 1073741824",
        "message_size_limit 0",
        "set_tcp_nodelay true",
        "log_dest stderr",
        "log_type error",
        "log_type warning",
        "connection_messages false",
    ]
    if os.geteuid() == 0:  # else it would become a user who cannot write here
        lines.append("user root")
    return "\n".join(lines) + "\n"


# --- mosquitto ------------------------------------------------------------------------------------
def _mosquitto() -> str | None:
    return shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")


@contextlib.contextmanager
def _folder(given: str | Path | None) -> Iterator[Path]:
    if given is None:
        with tempfile.TemporaryDirectory(prefix="fedge-broker-") as fresh:
            yield Path(fresh)
    else:
        Path(given).mkdir(parents=True, exist_ok=True)
        yield Path(given).resolve()


@contextlib.asynccontextmanager
async def _child(program: str, port: int, folder: Path) -> AsyncIterator[str]:
    child, chosen = await _start_somewhere(program, port, folder)
    try:
        yield f"mqtt://{HOST}:{chosen}"
    finally:
        await _end(child)


async def _start_somewhere(
    program: str, port: int, folder: Path
) -> tuple[asyncio.subprocess.Process, int]:
    for _ in range(0 if port else 2):  # a free port may be taken before the child has it
        with contextlib.suppress(TransportError):
            chosen = free_port()
            return await _start(program, chosen, folder), chosen
    chosen = port or free_port()
    return await _start(program, chosen, folder), chosen


async def _start(program: str, port: int, folder: Path) -> asyncio.subprocess.Process:
    _check_free(port)
    config, errors = folder / "mosquitto.conf", folder / "mosquitto.log"
    config.write_text(mosquitto_config(port, folder))
    arguments = ["-I", "-S", "-c", _TETHER, str(os.getpid()), program, "-c", str(config)]
    with errors.open("wb") as out:
        child = await asyncio.create_subprocess_exec(
            sys.executable, *arguments, stdin=asyncio.subprocess.DEVNULL, stdout=out, stderr=out
        )
    try:
        async with asyncio.timeout(START_S):
            await _listening(child, port)
    except BaseException as error:
        await _end(child)
        if not isinstance(error, TimeoutError):
            raise
    else:
        if child.returncode is None:
            log.info("mosquitto listens on %s:%d", HOST, port)
            return child
    said = errors.read_text(errors="replace").strip().splitlines()
    raise TransportError(
        f"mosquitto did not start on port {port}: {said[-1] if said else 'it ended'}"
    )


def _check_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise TransportError(
                f"mosquitto did not start on port {port}: {error.strerror}; choose another"
            ) from error


async def _listening(child: asyncio.subprocess.Process, port: int) -> None:
    while child.returncode is None:
        try:
            _, writer = await asyncio.open_connection(HOST, port)
        except OSError:
            await asyncio.sleep(0.02)
            continue
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
        await asyncio.sleep(0)
        return


async def _end(child: asyncio.subprocess.Process) -> None:
    for attempt in range(10):  # again: mosquitto misses a signal that comes right after its start
        with contextlib.suppress(ProcessLookupError):
            child.terminate() if attempt < 9 else child.kill()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOP_S / 10):
                await child.wait()
            return
    await child.wait()


# --- amqtt ----------------------------------------------------------------------------------------
def _has_amqtt() -> bool:
    from importlib.util import find_spec

    return find_spec("amqtt") is not None


@contextlib.asynccontextmanager
async def _amqtt(port: int) -> AsyncIterator[str]:
    chosen = port or free_port()
    with _quiet():
        from amqtt.broker import Broker

        broker = Broker(
            {
                "listeners": {"default": {"type": "tcp", "bind": f"{HOST}:{chosen}"}},
                "plugins": {
                    "amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}
                },
            }
        )
        connected = _Connections(broker.stream_connected)
        broker.stream_connected = connected
        try:
            await broker.start()
        except Exception as error:
            raise TransportError(f"amqtt did not start on port {chosen}: {error}") from error
        try:
            yield f"mqtt://{HOST}:{chosen}?mqtt=3.1.1"  # it does not answer a CONNECT of MQTT 5
        finally:
            await broker.shutdown()
            await connected.end()


class _Connections:
    """Sees to it that every connection that amqtt serves is closed, whatever becomes of it."""

    def __init__(self, serve: Callable[..., Awaitable[None]]) -> None:
        self._serve = serve
        self._tasks: set[asyncio.Task[object]] = set()

    async def __call__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, listener_name: str
    ) -> None:
        task = asyncio.current_task()
        if task is not None:
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        try:
            await self._serve(reader, writer, listener_name=listener_name)
        except (OSError, asyncio.CancelledError) as error:
            log.debug("a connection of amqtt ended: %r", error)
        except RuntimeError as error:
            # amqtt walks its subscriptions while others subscribe; the client connects again.
            log.info("amqtt dropped a connection: %s", error)
        finally:
            writer.close()
            with contextlib.suppress(OSError, asyncio.CancelledError):
                await writer.wait_closed()

    async def end(self) -> None:
        """End what is still served."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what amqtt and its parts log below an error: it is much, and about themselves."""
    loggers = [logging.getLogger(name) for name in ("amqtt", "transitions")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(amqtt|transitions)\b")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
