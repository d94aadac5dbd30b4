# SPDX-License-Identifier: Apache-2.0
"""The page of faults says what the table says, and its tests are there."""

from __future__ import annotations

import fault_page
import pytest

TABLE = fault_page.faults()


def test_every_row_has_a_test_or_says_when_it_will() -> None:
    assert len(TABLE) == 28
    assert all(row.tests or row.later for row in TABLE)


@pytest.mark.parametrize("test", sorted({test for row in TABLE for test in row.tests}))
def test_every_test_that_is_named_is_there_and_has_passed(test: str) -> None:
    assert not fault_page.missing(test)
    assert fault_page.results()[test].startswith("passed"), "run scripts/faults"


def test_the_page_is_what_the_table_and_the_results_make() -> None:
    told = fault_page.results()
    assert fault_page.PAGE.read_text() == fault_page.render(TABLE, told), "scripts/faults --page"


def test_a_test_that_is_not_there_is_found_out() -> None:
    here = "tests/faults/test_fault_page.py"
    assert fault_page.missing(f"{here}::test_nothing") == f"{here} has no test_nothing"
    assert fault_page.missing("tests/nowhere.py") == "there is no tests/nowhere.py"
