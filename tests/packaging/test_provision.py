# SPDX-License-Identifier: Apache-2.0
"""What a technician puts on a card is checked whole, moved, and wiped: or nothing is changed."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from loading import module_at

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "packaging/image/overlay/usr/lib/fedge-image/provision.py"
TOML = 'broker = "mqtts://hub.example"\ntask = "pumps"\n'
WIFI = 'country=CH\nnetwork={\n  ssid="barn"\n  psk="correct horse"\n}\n'
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIB0hVbQ8gm7Yt5mTkq1c9mYz3n8rQ0mYtqB3v6o2hH1p me@desk\n"


@pytest.fixture(name="provision", scope="module")
def _provision() -> ModuleType:
    return module_at(SCRIPT)


class Board:
    def __init__(self, folder: Path, provision: ModuleType) -> None:
        self.boot, self.data = folder / "boot", folder / "data"
        self.state = self.data / "private" / "fedge"
        for made in (self.boot / "inbox", self.data / "etc", self.data / "private"):
            made.mkdir(parents=True)
        self._provision = provision

    def put(self, **files: str) -> None:
        for name, text in files.items():
            path = self.boot / {"toml": "fedge.toml", "wifi": "wpa_supplicant.conf"}.get(name, name)
            path.write_text(text, "utf-8")

    def take(self) -> str:
        says: str = self._provision.take(self.boot, self.data, self.state)
        return says

    def kept(self, name: str) -> str:
        return (self.data / "etc" / name).read_text()

    def on_card(self) -> list[str]:
        return sorted(path.name for path in self.boot.rglob("*") if path.is_file())


@pytest.fixture(name="board")
def _board(tmp_path: Path, provision: ModuleType) -> Board:
    return Board(tmp_path, provision)


def test_settings_move_to_the_data_partition_for_root_alone_and_are_wiped(board: Board) -> None:
    board.put(toml=TOML, wifi=WIFI, authorized_keys=KEY)
    (board.boot / "broker-password").write_text("s3cret\n")
    assert board.take().startswith("OK")
    assert board.on_card() == []
    for name in ("fedge.toml", "broker-password", "ca.pem", "wpa_supplicant.conf"):
        assert stat.S_IMODE((board.data / "etc" / name).stat().st_mode) == 0o600
    assert board.kept("broker-password") == "s3cret\n"


def test_what_the_image_decides_is_added_once(board: Board) -> None:
    board.put(toml=TOML)
    (board.boot / "broker-password").write_text("s3cret\n")
    board.take()
    settled = board.kept("fedge.toml")
    assert 'state = "/var/lib/fedge"' in settled
    assert 'password_file = "broker-password"' in settled
    assert 'folder = "/var/lib/fedge/inbox"' in settled
    board.put(authorized_keys=KEY)
    board.take()
    assert board.kept("fedge.toml") == settled


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"toml": "broker ="}, "fedge.toml: not TOML"),
        ({"toml": TOML + 'tsk = "x"\n'}, "unknown key tsk; did you mean task"),
        ({"toml": 'broker = "hub"\ntask = "pumps"\n'}, "expected mqtts://HOST"),
        ({"toml": TOML + 'ca_file = "ca.pem"\n'}, "names ca.pem, which is not on the card"),
        ({"toml": TOML + 'state = "/srv/x"\n'}, "expected a path in /var/lib/fedge"),
        ({"toml": TOML, "ca.pem": "nonsense"}, "ca.pem: expected certificates"),
        ({"toml": TOML, "broker-password": "one\ntwo\n"}, "broker-password: expected one line"),
        ({"toml": TOML, "wifi": "network={\n}\n"}, "country=XX"),
        ({"toml": TOML, "wifi": "country=CH\nnetwork={\n"}, "expected network={"),
        ({"toml": TOML, "authorized_keys": "hunter2\n"}, "expected a public key a line"),
        ({"authorized_keys": KEY}, "there is no fedge.toml"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_file_is_named_and_nothing_is_changed(
    board: Board, provision: ModuleType, files: dict[str, str], reason: str
) -> None:
    board.put(**files)
    before = board.on_card()
    with pytest.raises(provision.Wrong, match=reason):
        board.take()
    assert board.on_card() == before
    assert not any((board.data / "etc").iterdir())


def test_a_wrong_file_leaves_the_old_settings_in_force_and_says_so_on_the_card(
    board: Board, provision: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    board.put(toml=TOML)
    board.take()
    settled = board.kept("fedge.toml")
    board.put(toml="broker =")
    monkeypatch.setattr(
        "sys.argv", ["provision", "--boot", str(board.boot), "--data", str(board.data)]
    )
    assert provision.main() == 0  # the board boots on
    assert board.kept("fedge.toml") == settled
    assert "PROBLEM: fedge.toml: not TOML" in (board.boot / "fedge-says.txt").read_text()
    board.put(toml=TOML.replace("pumps", "fans"))
    assert provision.main() == 0
    assert (board.boot / "fedge-says.txt").read_text().startswith("OK")
    assert "fans" in board.kept("fedge.toml")


def test_notepad_and_its_line_ends_are_understood(board: Board) -> None:
    (board.boot / "fedge.toml").write_bytes(b"\xef\xbb\xbf" + TOML.replace("\n", "\r\n").encode())
    board.take()
    assert "\r" not in board.kept("fedge.toml")


def test_power_cut_at_any_write_loses_nothing_and_delivers_examples_once(
    tmp_path: Path, provision: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_at, cuts = 0, 0
    while True:
        board = Board(tmp_path / str(cut_at), provision)
        board.put(toml=TOML, wifi=WIFI)
        (board.boot / "broker-password").write_text("s3cret\n")
        (board.boot / "inbox" / "rows.csv").write_text("1,2,0\n")
        with monkeypatch.context() as patch:
            patch.setattr(provision, "_sync", _power(provision._sync, cut_at))
            try:
                board.take()
                break
            except InterruptedError:
                cuts += 1
        board.take()  # the next boot
        assert board.kept("broker-password") == "s3cret\n", f"cut at {cut_at}"
        assert board.on_card() == [], f"cut at {cut_at}"
        _consumed(board)
        board.take()
        assert not (board.state / "inbox" / "rows.csv").exists(), f"cut at {cut_at}"
        cut_at += 1
    assert cuts > 10


def test_examples_that_were_learned_already_are_not_delivered_again(board: Board) -> None:
    board.put(toml=TOML)
    (board.boot / "inbox" / "rows.csv").write_text("1,2,0\n")
    board.take()
    _consumed(board)
    (board.boot / "inbox" / "rows.csv").write_text("1,2,0\n")
    board.take()
    assert not (board.state / "inbox" / "rows.csv").exists()


def test_wiping_overwrites_before_it_removes(
    board: Board, provision: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    (board.boot / "broker-password").write_text("s3cret\n")
    seen: list[bytes] = []
    real = Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda path: (seen.append(path.read_bytes()), real(path)))
    provision.wipe(board.boot / "broker-password")
    assert seen == [bytes(len("s3cret\n"))]


def _consumed(board: Board) -> None:
    """As the device does with a file of its inbox."""
    target = board.state / "inbox" / "consumed"
    target.mkdir(exist_ok=True)
    os.replace(board.state / "inbox" / "rows.csv", target / "rows.csv")  # noqa: PTH105 - one word


def _power(real: Callable[[Path], None], cut_at: int) -> Callable[[Path], None]:
    left = iter(range(cut_at))

    def sync(folder: Path) -> None:
        real(folder)
        if next(left, None) is None:
            raise InterruptedError("power cut")

    return sync
