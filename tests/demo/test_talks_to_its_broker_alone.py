# SPDX-License-Identifier: Apache-2.0
"""No process of the product tries to reach any address but its broker.

The kernel is the witness: strace follows every process of a whole round and notes each address
that anybody so much as tries to reach.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.trace, pytest.mark.slow, pytest.mark.timeout(400)]
ADDRESS = re.compile(
    r"sa_family=AF_INET6?, sin6?_port=htons\((\d+)\).*?"
    r"inet_(?:addr|pton)\((?:AF_INET6, )?\"([^\"]+)\""
)
PLANT = """import os, socket
if "edge_sdk.worker" in " ".join(open("/proc/self/cmdline").read().split("\\0")):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.connect(("127.0.0.2", 9))
"""


def reached(trace: Path) -> set[tuple[str, int]]:
    """Return every internet address in a trace of connect, sendto, sendmsg and sendmmsg."""
    calls = trace.read_text(errors="replace")
    assert calls.count("execve(") > 4, "the trace did not follow the children"
    return {(host, int(port)) for port, host in ADDRESS.findall(calls)}


def trace_a_round(folder: Path, **environment: str) -> tuple[set[tuple[str, int]], int]:
    """Run one round of two devices under strace; return the addresses and the broker's port."""
    if shutil.which("strace") is None or shutil.which("mosquitto") is None:
        pytest.skip("strace and mosquitto are needed; scripts/test installs them where it may")
    trace, record = folder / "trace", folder / "record.json"
    command = [sys.executable, "-m", "edge_sdk", "demo", "--devices", "2", "--rounds", "1"]
    command += ["--json", str(record), "--png", str(folder / "c.png"), "--work", str(folder / "w")]
    calls = "trace=connect,sendto,sendmsg,sendmmsg,execve"
    done = subprocess.run(
        ["strace", "-f", "-qq", "--seccomp-bpf", "-e", calls, "-o", str(trace), *command],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=380,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(record.read_text())
    assert found["rounds"][-1]["reported"] == 2
    return reached(trace), int(found["broker"].rpartition(":")[2])


def test_a_whole_round_reaches_the_broker_and_nothing_else(tmp_path: Path) -> None:
    addresses, port = trace_a_round(tmp_path)
    assert addresses == {("127.0.0.1", port)}


def test_the_trace_would_catch_a_training_child_that_calls_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(PLANT)
    addresses, port = trace_a_round(tmp_path, PYTHONPATH=str(tmp_path))
    assert ("127.0.0.2", 9) in addresses - {("127.0.0.1", port)}
