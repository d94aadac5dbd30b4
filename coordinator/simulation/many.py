# SPDX-License-Identifier: Apache-2.0
"""Many seeds on every core, in order of seeds, each a process-wide function of its setup alone."""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor

from coordinator.simulation.world import Outcome, Setup, simulate

CHUNK = 10


def outcomes(setups: Sequence[Setup], jobs: int = 0) -> Iterator[Outcome]:
    """Yield what came of each setup, in order."""
    jobs = min(jobs or len(os.sched_getaffinity(0)), -(-len(setups) // CHUNK))
    if jobs <= 1:
        yield from map(simulate, setups)
        return
    cut = [setups[i : i + CHUNK] for i in range(0, len(setups), CHUNK)]
    context = multiprocessing.get_context("spawn")  # threads of ours must not be forked
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=gc.disable) as pool:
        try:
            yield from itertools.chain.from_iterable(pool.map(_some, cut))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _some(setups: Sequence[Setup]) -> list[Outcome]:
    done = [simulate(setup) for setup in setups]
    gc.collect()  # in a process of ours alone: what one run leaves in cycles can wait for the rest
    return done
