# SPDX-License-Identifier: Apache-2.0
"""Clocks that are days off, or stand at 1970: rounds do not notice, and TLS says what is wrong."""

from __future__ import annotations

import datetime as dt
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from live_rounds import Boards, Template, check_journal, daemon, digests

from coordinator import certificates
from edge_sdk.lasting import LastingTrainer

pytestmark = [pytest.mark.broker, pytest.mark.timeout(300)]
DEVICES, ROUNDS = 2, 1
OPEN = ("allow_anonymous true", "set_tcp_nodelay true")
DAY_S = 86_400
DISTANT = {"three days behind": -3 * DAY_S, "three days ahead": 3 * DAY_S, "1970": None}


def faked(when: str) -> tuple[str, ...]:
    """Return what to run a process under; the wall clock alone is another."""
    if shutil.which("faketime") is None:
        pytest.skip("faketime is not installed")
    offset = DISTANT[when]
    if offset is None:
        return ("faketime", "--exclude-monotonic", "1970-01-01 00:00:30")
    return ("faketime", "--exclude-monotonic", "-f", f"{offset:+d}s")


@pytest.mark.parametrize("when", list(DISTANT))
def test_with_clocks_days_off_the_same_model_comes_out(
    template: Template, trainer: LastingTrainer, quick: Path, start_mosquitto: Any, when: str
) -> None:
    under = faked(when)
    for name in ("skewed",) if template.calm else ("calm", "skewed"):
        folder = quick / name
        broker = start_mosquitto(*OPEN)
        config = template.copy(folder, broker.url)
        boards = Boards(folder, [broker.url] * DEVICES, trainer)
        try:
            boards.start()
            off = under if name == "skewed" else ()
            with daemon(config, "--exit-when-done", under=off) as child:
                assert child.wait(120) == 0, (folder / "coordinator.log").read_text()[-2000:]
        finally:
            boards.close()
        check_journal(config, template, boards.receipts)
        template.calm = template.calm or digests(config)
    assert digests(quick / "skewed" / "coordinator.toml") == template.calm


PROBE = """
import sys
from edge_sdk.errors import TransportError
from edge_sdk.transport.mqtt import Mqtt
try:
    Mqtt(sys.argv[1], "a", ca_file=sys.argv[2]).probe()
except TransportError as error:
    print(error)
"""


def test_a_certificate_that_is_not_valid_yet_names_the_clock(
    tmp_path: Path, start_mosquitto: Any
) -> None:
    now = dt.datetime.now(dt.UTC)
    authority = certificates.authority("test ca", now)
    made = certificates.broker(authority, ["127.0.0.1"], now)
    for name, data in {"ca": authority.certificate, "c": made.certificate, "k": made.key}.items():
        (tmp_path / name).write_bytes(data)
    keys = (f"certfile {tmp_path / 'c'}", f"keyfile {tmp_path / 'k'}")
    broker = start_mosquitto(*OPEN, listener=keys)
    url = broker.url.replace("mqtt://", "mqtts://")
    command = [sys.executable, "-c", PROBE, url, str(tmp_path / "ca")]
    said = [
        subprocess.run([*under, *command], capture_output=True, text=True, check=True).stdout
        for under in ((), faked("1970"))
    ]
    assert said[0] == ""
    assert "not yet valid" in said[1]
    assert "clock" in said[1]
    assert said[1].count("\n") == 1
