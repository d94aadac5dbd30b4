# SPDX-License-Identifier: Apache-2.0
"""Every decoder bears its seeds, what broke it once, and a few hundred changed seeds.

The same targets as `scripts/fuzz`, which runs for a minute each and is guided by coverage.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from fuzz_mutations import mutations
from fuzz_targets import TARGETS, Target, run

FOUND = Path(__file__).parent / "found"
CHANGED = 150
by_name = pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)


@by_name
def test_seeds_are_taken(target: Target) -> None:
    """A seed that is refused leads the fuzzer nowhere."""
    fed = [target.feed(data) for data in target.seeds()]
    assert fed


@by_name
def test_what_broke_a_decoder_once_does_so_no_more(target: Target) -> None:
    for path in sorted((FOUND / target.name).glob("*")):
        run(target, path.read_bytes())


@by_name
def test_changed_seeds_are_taken_or_refused(target: Target) -> None:
    changed = mutations(list(target.seeds()), seed=7)
    for i, data in enumerate(itertools.islice(changed, CHANGED)):
        try:
            run(target, data)
        except Exception as error:
            raise AssertionError(f"{target.name}, change {i} of seed 7: {data.hex()}") from error


def test_every_file_that_broke_a_decoder_has_its_target() -> None:
    assert {path.name for path in FOUND.glob("*")} <= {target.name for target in TARGETS}
