# SPDX-License-Identifier: Apache-2.0
"""The outbox killed at every system call that could tear it: an update is there, or it is not."""

from __future__ import annotations

import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from edge_sdk.outbox import Entry, Outbox

SCRIPT = textwrap.dedent("""
    import sys
    from pathlib import Path
    from edge_sdk.outbox import Entry, Outbox
    box = Outbox(Path(sys.argv[1]))
    box.append(Entry(b"2" * 16, 2, b"second" * 500, b"yes", b"no"))
    print("kept", flush=True)
    box.remove(b"1" * 16)
    print("removed", flush=True)
""")


def killed_at(folder: Path, call: str, number: int) -> tuple[int, str]:
    inject = f"inject={call}:signal=KILL:when={number}"
    tracer = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", inject]
    command = [*tracer, sys.executable, "-c", SCRIPT, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout


@pytest.mark.trace
@pytest.mark.parametrize("call", ["fsync", "/^rename", "/^unlink"])
def test_killed_at_any_call_the_outbox_holds_whole_updates_and_all_it_said_it_kept(
    tmp_path: Path, call: str
) -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not on PATH")
    first = Entry(b"1" * 16, 1, b"first" * 500, b"yes", b"no")
    deaths = 0
    for number in range(1, 8):
        folder = tmp_path / f"{number}"
        folder.mkdir()
        Outbox(folder).append(first)
        code, said = killed_at(folder, call, number)
        assert code in {0, -9}
        deaths += code != 0
        found = {waiting.round for waiting in Outbox(folder)}
        assert found <= {1, 2}
        assert "kept" not in said or 2 in found
        assert "removed" in said or 1 in found or "kept" in said
        assert "removed" not in said or 1 not in found
        assert not [path for path in folder.iterdir() if path.suffix != ".update"]
        if code == 0:
            break
    assert deaths >= 1
