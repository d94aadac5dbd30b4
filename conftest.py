# SPDX-License-Identifier: Apache-2.0
"""Rules of the whole suite: a skip may be a failure, where data stands, the table of figures."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from pathlib import Path

import pytest
from hypothesis import settings

# The same examples in every run: a red suite is red for everybody. FEDGE_FUZZ=1 looks further.
settings.register_profile("fedge", derandomize=os.environ.get("FEDGE_FUZZ") != "1", deadline=None)
settings.load_profile("fedge")

NO_SKIPS = os.environ.get("FEDGE_NO_SKIPS") == "1"
FIGURES: list[tuple[str, str, str]] = []


@pytest.fixture
def figure() -> Callable[[str, object, str], None]:
    """Note a measured figure next to its target; all are printed as a table at the end."""

    def note(name: str, value: object, target: str = "") -> None:
        FIGURES.append((name, f"{value:.4g}" if isinstance(value, float) else str(value), target))

    return note


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder of reference data and models, which FEDGE_SHARED names."""
    folder = os.environ.get("FEDGE_SHARED")
    if folder and (Path(folder) / "data" / "load.py").exists():
        return Path(folder)
    reason = "FEDGE_SHARED does not name the folder of reference data"
    if os.environ.get("FEDGE_REQUIRE_DATA") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def seeds() -> Callable[[int], range]:
    """Return one seed, or as many as asked for where FEDGE_ALL_SEEDS=1 (`scripts/test --all`)."""
    return lambda count: range(count if os.environ.get("FEDGE_ALL_SEEDS") == "1" else 1)


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


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the figures that the tests noted."""
    if not FIGURES:
        return
    terminalreporter.section("figures")
    width = max(len(name) for name, _, _ in FIGURES)
    for name, value, target in FIGURES:
        terminalreporter.write_line(f"{name:<{width}}  {value:>12}  {target}")
