# SPDX-License-Identifier: Apache-2.0
"""Rules of the whole suite: where a skip is a failure, and that no test leaves threads behind."""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest

NO_SKIPS = os.environ.get("FEDGE_NO_SKIPS") == "1"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn a skip into a failure where FEDGE_NO_SKIPS=1, as in CI."""
    report = yield
    if NO_SKIPS and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} skipped where no skip is allowed: {report.longrepr}"
    return report
