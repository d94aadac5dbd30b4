# SPDX-License-Identifier: Apache-2.0
"""The coordinator as a service: signals, readiness and watchdog, logs on stderr, exit codes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator

from coordinator.config import Config
from coordinator.pacing import Pace
from coordinator.service import Coordinator
from coordinator.task import Task
from edge_sdk.systemd import notify, watchdog_s

log = logging.getLogger(__name__)

LOOK_S = 5.0
"""How often the manager is told of trouble, at least."""


def run(config: Config, *, exit_when_done: bool = False) -> int:
    """Train the configured tasks until SIGTERM or SIGINT; return the exit code.

    Args:
        config: from `config.load`.
        exit_when_done: also stop once every task is at its last version.

    Raises: FedgeError with what stopped it, for the caller to turn into an exit code.
    """
    asyncio.run(_main(config, exit_when_done))
    return 0


def configure_logging(level: str = "info") -> None:
    """Log key=value lines to stderr; the journal adds the time itself."""
    stamp = "" if "JOURNAL_STREAM" in os.environ else "%(asctime)s "
    logging.basicConfig(
        stream=sys.stderr, level=level.upper(), format=f"{stamp}%(levelname)s %(name)s %(message)s"
    )


async def _main(config: Config, exit_when_done: bool) -> None:
    stop = asyncio.Event()
    with _signals(stop):
        serving = asyncio.create_task(_serve(config, stop, exit_when_done))
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        notify("STOPPING=1")
        stopping.cancel()
        serving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await serving


async def _serve(config: Config, stop: asyncio.Event, exit_when_done: bool) -> None:
    async with _broker(config) as url, _coordinator(config, url) as coordinator:
        loops = [
            asyncio.create_task(_train(coordinator, task, pace)) for task, pace in config.tasks
        ]
        doing = f"training {', '.join(task.name for task, _ in config.tasks)}"
        watch = asyncio.create_task(_watch(coordinator, doing))
        notify(f"READY=1\nSTATUS={doing}")
        log.info("ready broker=%s tasks=%d", _shown(url), len(loops))
        try:
            await asyncio.gather(*loops)
            log.info("all tasks are at their last version")
            if not exit_when_done:
                await stop.wait()
        finally:
            for task in (*loops, watch):
                task.cancel()
            await asyncio.gather(*loops, watch, return_exceptions=True)


async def _train(coordinator: Coordinator, task: Task, pace: Pace) -> None:
    async with contextlib.aclosing(coordinator.train(task, pace)) as results:
        async for _ in results:  # the service logs each
            pass


async def _watch(coordinator: Coordinator, doing: str) -> None:
    """Feed the watchdog from real progress: the loop turns and the store answers, well or not.

    A disk that refuses is no reason to be killed: it is said, and work goes on once it is over.
    """
    every_s, said = watchdog_s(), None
    while True:
        await asyncio.sleep(min(every_s / 2, LOOK_S) if every_s else LOOK_S)
        trouble = await coordinator.check_alive()
        notify("WATCHDOG=1")
        if trouble != said:
            said = trouble
            log.log(logging.WARNING if trouble else logging.INFO, "trouble=%s", trouble or "over")
            notify(f"STATUS={doing if trouble is None else f'no receipts, no rounds: {trouble}'}")


@contextlib.asynccontextmanager
async def _broker(config: Config) -> AsyncIterator[str]:
    if config.embedded_port is None:
        yield config.broker
        return
    from coordinator.broker import embedded

    async with embedded(port=config.embedded_port, folder=config.store / "broker") as url:
        yield url


def _coordinator(config: Config, url: str) -> Coordinator:
    return Coordinator(
        url,
        store=config.store,
        ca_file=config.ca_file,
        username=config.username,
        password=config.password(),
        client_id=config.client_id,
    )


@contextlib.contextmanager
def _signals(stop: asyncio.Event) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


def _shown(url: str) -> str:
    """Return a broker's address without the credentials in it."""
    scheme, _, rest = url.rpartition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}"
