# SPDX-License-Identifier: Apache-2.0
"""Examples from a watched folder and over a local socket."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import ArrayLike, NDArray
from scripted_coordinator import until

from edge_sdk import source
from edge_sdk.errors import ConfigError, StoreError
from edge_sdk.socket_source import MAX_CLIENTS, MAX_LINE_BYTES, Socket
from edge_sdk.source import Folder


class Learner:
    """Stands in for a device: takes rows of two numbers."""

    def __init__(self) -> None:
        self.rows: list[tuple[list[float], float]] = []
        self.fail: Exception | None = None

    @property
    def examples_ever(self) -> int:
        return len(self.rows)

    def wait_for_model(self, timeout_s: float) -> bool:
        return timeout_s >= 0

    def learn_many(self, xs: ArrayLike, labels: ArrayLike) -> None:
        if self.fail is not None:
            raise self.fail
        x = np.asarray(xs)
        if len(x) and x.shape[1:] != (2,):
            raise ValueError(f"expected an example of shape [2], got {list(x.shape[1:])}")
        self.rows += list(zip(x.tolist(), np.asarray(labels).tolist(), strict=True))

    def learn(self, x: ArrayLike, label: ArrayLike) -> None:
        self.learn_many(np.asarray(x)[None], [label])

    def predict(self, x: ArrayLike) -> NDArray[Any]:
        return np.asarray(x) * 2

    def status(self) -> dict[str, Any]:
        return {"examples": len(self.rows)}


class Inbox:
    def __init__(self, folder: Path) -> None:
        self.path = folder / "inbox"
        self.path.mkdir()
        self.journal = folder / "source.json"
        self.learner = Learner()
        self.folder = self.open()

    def open(self, **options: Any) -> Folder:
        return Folder(self.path, self.learner, journal=self.journal, **options)

    def look(self) -> int:
        """Look until files that do not change are taken."""
        self.folder.look()
        return self.folder.look()

    def names(self) -> list[str]:
        return sorted(str(p.relative_to(self.path)) for p in self.path.rglob("*") if p.is_file())


@pytest.fixture
def inbox(tmp_path: Path) -> Inbox:
    return Inbox(tmp_path)


def rows(count: int, start: float = 0.0) -> dict[str, NDArray[Any]]:
    x = np.arange(2 * count, dtype=np.float32).reshape(count, 2) + np.float32(start)
    return {"x": x, "y": np.arange(count)}


def test_npz_and_csv_files_are_learned_once_and_moved(inbox: Inbox) -> None:
    np.savez(inbox.path / "a.npz", **rows(3))
    (inbox.path / "b.csv").write_text("left,right,label\n5,6,1\n7,8,0\n")
    assert inbox.look() == 2
    assert inbox.look() == 0
    assert [label for _, label in inbox.learner.rows] == [0, 1, 2, 1.0, 0.0]
    assert inbox.learner.rows[3] == ([5.0, 6.0], 1.0)
    assert inbox.names() == ["consumed/a.npz", "consumed/b.csv"]
    np.savez(inbox.path / "a.npz", **rows(1))  # the same name again is another file
    assert inbox.look() == 1
    assert "consumed/a.1.npz" in inbox.names()
    assert not inbox.journal.exists()


def test_the_label_may_be_any_named_column(inbox: Inbox) -> None:
    (inbox.path / "b.csv").write_text("label,left,right\n1,6,7\n")
    inbox.folder = inbox.open(label="label")
    assert inbox.look() == 1
    assert inbox.learner.rows == [([6.0, 7.0], 1.0)]


def test_a_file_that_still_grows_is_left_alone(inbox: Inbox) -> None:
    file = inbox.path / "b.csv"
    file.write_text("1,2,0\n")
    assert inbox.folder.look() == 0
    with file.open("a") as more:
        more.write("3,4,1\n")
    assert inbox.folder.look() == 0
    assert inbox.folder.look() == 1
    assert len(inbox.learner.rows) == 2


def test_names_that_begin_with_a_dot_and_other_suffixes_are_not_ours(inbox: Inbox) -> None:
    (inbox.path / ".b.csv").write_text("1,2,0\n")
    (inbox.path / "notes.txt").write_text("1,2,0\n")
    assert inbox.look() == 0
    assert inbox.names() == [".b.csv", "notes.txt"]


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("a.npz", b"PK\x03\x04 torn", "NPZ"),
        ("a.npz", b"", "NPZ"),
        ("a.csv", b"1,2,0\n3,4\n", "one length"),
        ("a.csv", b"left,right,label\n1,2,cat\n", "numbers"),
        ("a.csv", b"", "column"),
        ("a.csv", b"1,2,3,0\n", r"shape \[2\]"),
        ("a.csv", b"\xff\xfe\x00", "utf-8"),
    ],
)
def test_a_file_that_cannot_be_learned_is_put_aside_with_the_reason_in_the_log(
    inbox: Inbox, caplog: pytest.LogCaptureFixture, name: str, content: bytes, why: str
) -> None:
    (inbox.path / name).write_bytes(content)
    assert inbox.look() == 0
    assert inbox.names() == [f"refused/{name}"]
    assert caplog.records
    assert re.search(why, caplog.text)


def test_an_npz_is_never_unpickled(inbox: Inbox) -> None:
    np.savez(inbox.path / "a.npz", x=np.array([{"a": 1}], dtype=object), y=np.array([1]))
    assert inbox.look() == 0
    assert inbox.names() == ["refused/a.npz"]


def test_arrays_of_other_names_and_lengths_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", inputs=np.zeros((2, 2)))
    with pytest.raises(ValueError, match="expected arrays x and y, got inputs"):
        source.read(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", x=np.zeros((2, 2)), y=np.zeros(3))
    with pytest.raises(ValueError, match="one label for each"):
        source.read(tmp_path / "b.npz")
    (tmp_path / "c.csv").write_text("1,2,0\n")
    with pytest.raises(ValueError, match="'kind' in the header"):
        source.read(tmp_path / "c.csv", "kind")


def test_a_crash_after_learning_and_before_moving_teaches_nothing_twice(inbox: Inbox) -> None:
    np.savez(inbox.path / "a.npz", **rows(4))
    path, took = inbox.path / "a.npz", inbox.learner.rows

    class Killed(BaseException):
        pass

    def crash(*_: object) -> bool:
        raise Killed

    inbox.folder._move = crash  # type: ignore[method-assign]  # the moment of the crash
    with pytest.raises(Killed):
        inbox.look()
    assert len(took) == 4
    assert path.exists()
    inbox.folder = inbox.open()
    assert inbox.look() == 1
    assert len(took) == 4
    del took[2:]  # had only half of it been stored, the other half would follow
    np.savez(inbox.path / "b.npz", **rows(4))
    inbox.folder._move = crash  # type: ignore[method-assign]  # the moment of the crash
    with pytest.raises(Killed):
        inbox.look()
    del took[4:]
    inbox.folder = inbox.open()
    inbox.look()
    assert [label for _, label in took] == [0, 1, 0, 1, 2, 3]


def test_a_full_disk_leaves_the_file_for_later(inbox: Inbox) -> None:
    np.savez(inbox.path / "a.npz", **rows(2))
    inbox.learner.fail = StoreError("no space left")
    assert inbox.look() == 0
    assert inbox.names() == ["a.npz"]
    inbox.learner.fail = None
    assert inbox.folder.look() == 1
    assert len(inbox.learner.rows) == 2


def test_a_folder_that_is_not_there_is_waited_for(inbox: Inbox) -> None:
    inbox.path.rmdir()
    assert inbox.look() == 0
    inbox.path.mkdir()
    np.savez(inbox.path / "a.npz", **rows(2))
    assert inbox.look() == 1


def test_the_thread_stops_when_told_to(inbox: Inbox) -> None:
    stop = threading.Event()
    inbox.folder = inbox.open(poll_s=0.01)
    thread = threading.Thread(target=inbox.folder.run, args=(stop,))
    thread.start()
    np.savez(inbox.path / ".a.npz", **rows(2))
    (inbox.path / ".a.npz").rename(inbox.path / "a.npz")
    until(lambda: inbox.names() == ["consumed/a.npz"])
    stop.set()
    thread.join(2)
    assert not thread.is_alive()


# --- the socket ---------------------------------------------------------------------------------
class Served:
    def __init__(self, path: Path) -> None:
        self.path, self.learner, self.stop = path, Learner(), threading.Event()
        self.thread = threading.Thread(target=Socket(path, self.learner).run, args=(self.stop,))
        self.thread.start()

    def ask(self, *lines: bytes) -> list[dict[str, Any]]:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(5)
            client.connect(str(self.path))
            client.sendall(b"".join(lines))
            answers = client.makefile("rb")
            return [json.loads(answers.readline()) for _ in lines]


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    served = Served(tmp_path / "s")
    yield served
    served.stop.set()
    served.thread.join(5)
    assert not served.path.exists()


def test_predict_learn_and_status_over_one_connection(served: Served) -> None:
    answers = served.ask(
        b'{"predict": [1, 2.5]}\n', b'{"learn": [3, 4], "label": 1}\n', b'{"status": true}\n'
    )
    assert answers == [{"output": [2.0, 5.0]}, {"learned": True}, {"examples": 1}]
    assert served.learner.rows == [([3.0, 4.0], 1)]
    assert served.path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "line",
    [
        b"\n",
        b"nonsense\n",
        b"[]\n",
        b'{"predict": "x"}\n',
        b'{"learn": [1, 2]}\n',
        b"\xff\n",
        b'{"learn": [1], "label": 1}\n',
        b"[" * 5000 + b"\n",
    ],
)
def test_a_wrong_request_gets_an_error_and_the_next_an_answer(served: Served, line: bytes) -> None:
    wrong, right = served.ask(line, b'{"predict": [1, 1]}\n')
    assert list(wrong) == ["error"]
    assert wrong["error"]
    assert right == {"output": [2.0, 2.0]}


def test_a_line_without_end_is_hung_up_on(served: Served) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(5)
        client.connect(str(served.path))
        endless = b"1" * (2 * MAX_LINE_BYTES)
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            client.sendall(endless)
    assert served.ask(b'{"predict": [1, 1]}\n') == [{"output": [2.0, 2.0]}]


def test_more_clients_than_there_is_room_for_are_turned_away(served: Served) -> None:
    with ExitStack() as stack:
        clients = [
            stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(MAX_CLIENTS + 1)
        ]
        assert all(_answer(served, client) for client in clients[:-1])
        assert _answer(served, clients[-1]) == b""


def _answer(served: Served, client: socket.socket) -> bytes:
    """What the server says to one request; nothing when it hung up, before the request or after."""
    client.settimeout(5)
    client.connect(str(served.path))
    try:
        client.sendall(b'{"predict": [1, 1]}\n')
        return client.recv(100)
    except (BrokenPipeError, ConnectionResetError):
        return b""


def test_a_socket_left_by_a_killed_process_is_taken_over_and_a_live_one_is_not(
    tmp_path: Path,
) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "s"))
    served = Served(tmp_path / "s")
    with pytest.raises(ConfigError, match="choose another"):
        Socket(tmp_path / "s", served.learner)
    served.stop.set()
    served.thread.join(5)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="cannot listen"):
        Socket(tmp_path / "file", Learner())
    assert (tmp_path / "file").read_text() == "mine"
