# SPDX-License-Identifier: Apache-2.0
"""`fedge device` as a process: over a real broker, killed, stopped, and asked how it is."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hand_bundles import examples, mlp
from scripted_coordinator import KEY, TASK, Scripted, until, weights_of

from edge_sdk import cli, device_cli
from edge_sdk.errors import ConfigError, StoreError
from edge_sdk.signing import DeviceKey
from edge_sdk.transport.mqtt import Mqtt

BUNDLE = mlp((6, 5, 3), quantized=True)
X, Y = examples(30)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    mosquitto = shutil.which("mosquitto")
    if mosquitto is None:
        pytest.skip("mosquitto is not on PATH")
    port = free_port()
    config = tmp_path_factory.mktemp("broker") / "mosquitto.conf"
    config.write_text(f"listener {port} 127.0.0.1\nallow_anonymous true\n")
    process = subprocess.Popen([mosquitto, "-c", str(config)], stderr=subprocess.DEVNULL)
    until(lambda: _answers(port))
    yield f"mqtt://127.0.0.1:{port}"
    process.terminate()
    process.wait()


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 0.2).close()
    except OSError:
        return False
    return True


class Board:
    """A folder with a device.toml, rows to learn, and the processes that ran there."""

    def __init__(self, folder: Path, broker: str, **settings: Any) -> None:
        self.folder, self.inbox, self.state = folder, folder / "inbox", folder / "state"
        self.inbox.mkdir()
        BUNDLE.save(folder / "model.fedge")
        self.config = folder / "device.toml"
        lines = [f'broker = "{broker}"', f'task = "{TASK}"', 'state = "state"']
        lines += ['bundle = "model.fedge"']
        lines += [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
        lines += ["[source]", 'folder = "inbox"', "poll_s = 0.05"]
        self.config.write_text("\n".join(lines))
        self.log = folder / "log"

    @property
    def device(self) -> str:
        return DeviceKey.load_or_create(self.state / "identity.key").id

    def start(self, failpoints: str = "") -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "edge_sdk", "device", "run", "--config", str(self.config)],
                stderr=log,
                env={**os.environ, "FEDGE_FAILPOINTS": failpoints},
            )

    def give(self, count: int = 30) -> None:
        np.savez(self.inbox / ".rows.npz", x=X[:count], y=Y[:count])
        (self.inbox / ".rows.npz").rename(self.inbox / "rows.npz")

    def status(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads((self.state / "status.json").read_bytes())
        except (OSError, ValueError):
            return {}
        return found


@pytest.fixture
def coordinator(broker: str) -> Iterator[Scripted]:
    transport = Mqtt(broker, f"coordinator-{free_port()}")
    coordinator = Scripted(transport, BUNDLE)
    coordinator.start()
    until(lambda: transport.is_up)
    yield coordinator
    transport.close()


def is_ready(coordinator: Scripted) -> bool:
    return bool(coordinator.checkins) and coordinator.checkins[-1].ready


def standing(
    folder: Path, broker: str, coordinator: Scripted, failpoint: str = ""
) -> tuple[Board, subprocess.Popen[bytes]]:
    """Start a device with rows to learn; it stands ready, with version 1."""
    board = Board(folder, broker, coordinator_key=KEY.public.hex())
    board.give()
    process = board.start(failpoint)
    coordinator.publish_model(1, weights_of(BUNDLE, 0.125))
    until(lambda: is_ready(coordinator), within_s=20)
    return board, process


def train_without_end(
    board: Board, process: subprocess.Popen[bytes], coordinator: Scripted
) -> None:
    """Get as far as a training that goes on until it is stopped."""
    coordinator.invite(board.device, epochs=None, steps=2**31)
    tasks = Path(f"/proc/{process.pid}/task")
    until(lambda: any((task / "children").read_text().strip() for task in tasks.iterdir()))


@pytest.mark.broker
def test_a_device_process_takes_part_and_stops_cleanly(
    tmp_path: Path, broker: str, coordinator: Scripted
) -> None:
    board, process = standing(tmp_path, broker, coordinator)
    for _ in range(2):
        coordinator.invite(board.device, epochs=2, codec=[["ef"], ["deadzone", 2.0]])
        count = len(coordinator.updates)
        until(lambda count=count: len(coordinator.updates) > count, within_s=20)
    until(lambda: board.status().get("receipts") == {"counted": 2})
    update, _ = coordinator.updates[0]
    assert (update.examples, update.steps) == (30, 8)
    asked = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0, board.log.read_text()
    assert time.monotonic() - asked < 5
    until(lambda: not coordinator.statuses[-1].online)
    status = board.status()
    assert status["version"] == 1
    assert status["rounds"] == 2
    assert 0 < status["bytes_up"] < 20_000
    assert status["bytes_down"] > len(BUNDLE.data) / 10
    assert status["rss_peak_kib"] > status["child_rss_peak_kib"] / 4 > 0
    assert (board.inbox / "consumed" / "rows.npz").exists()
    assert "Traceback" not in board.log.read_text()


@pytest.mark.broker
def test_a_process_of_two_devices_that_is_killed_comes_back_with_both(
    tmp_path: Path, broker: str, coordinator: Scripted
) -> None:
    boards = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        boards.append(Board(tmp_path / name, broker, coordinator_key=KEY.public.hex()))
        boards[-1].give()
    command = [sys.executable, "-m", "edge_sdk", "device", "run"]
    command += [part for board in boards for part in ("--config", str(board.config))]

    def start(failpoints: str) -> subprocess.Popen[bytes]:
        env = {**os.environ, "FEDGE_FAILPOINTS": failpoints}
        with boards[0].log.open("ab") as log:
            return subprocess.Popen(command, stderr=log, env=env)

    process = start("after_send:kill")
    coordinator.publish_model(1, weights_of(BUNDLE, 0.125))
    until(lambda: sum(c.ready for c in coordinator.checkins) == 2, within_s=20)
    assert boards[0].device != boards[1].device
    for board in boards:
        coordinator.round = 0
        coordinator.invite(board.device)
    assert process.wait(20) == -signal.SIGKILL
    coordinator.checkins.clear()
    process = start("")
    until(lambda: sum(c.ready for c in coordinator.checkins) == 2, within_s=20)
    for board in boards:
        if not board.status().get("receipts") and not list(board.state.glob("outbox/*.update")):
            coordinator.round = 0
            coordinator.invite(board.device)  # a coordinator would invite it again
    until(lambda: all(b.status().get("receipts") for b in boards), within_s=20)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0, boards[0].log.read_text()
    assert len({update for _, update in coordinator.updates}) == 2


def test_two_devices_in_one_state_folder_are_refused(tmp_path: Path) -> None:
    board = Board(tmp_path, "mqtt://127.0.0.1:1")
    (tmp_path / "again.toml").write_text(board.config.read_text())
    twice = ["--config", str(board.config), "--config", str(tmp_path / "again.toml")]
    with pytest.raises(ConfigError, match="a state folder of its own for each device"):
        device_cli.main(["run", *twice])


@pytest.mark.broker
@pytest.mark.parametrize(
    ("failpoint", "trainings"),
    [
        ("invited:kill", 1),
        ("after_train:kill", 2),
        ("before_last_chunk:kill", 1),
        ("after_send:kill", 1),
        ("on_receipt:kill", 1),
    ],
)
def test_killed_anywhere_in_a_round_the_device_comes_back_and_counts_once(
    tmp_path: Path, broker: str, coordinator: Scripted, failpoint: str, trainings: int
) -> None:
    board, process = standing(tmp_path, broker, coordinator, failpoint)
    coordinator.invite(board.device)
    assert process.wait(20) == -signal.SIGKILL
    until(lambda: not coordinator.statuses[-1].online)  # its will
    process = board.start()
    until(lambda: coordinator.statuses[-1].online, within_s=20)
    if not coordinator.updates and not list((board.state / "outbox").glob("*.update")):
        until(lambda: is_ready(coordinator), within_s=20)
        coordinator.round -= 1
        coordinator.invite(board.device)  # a coordinator would invite it again
    until(lambda: board.status().get("receipts"), within_s=20)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0, board.log.read_text()
    assert len({update for _, update in coordinator.updates}) == 1
    assert not list((board.state / "outbox").glob("*.update"))
    assert board.log.read_text().count("training round=1") == trainings


@pytest.mark.broker
def test_killed_in_mid_training_the_device_declares_itself_gone_and_joins_the_next_round(
    tmp_path: Path, broker: str, coordinator: Scripted
) -> None:
    board, process = standing(tmp_path, broker, coordinator)
    train_without_end(board, process, coordinator)
    process.kill()
    process.wait()
    until(lambda: not coordinator.statuses[-1].online)
    heard = len(coordinator.checkins)
    process = board.start()
    until(lambda: len(coordinator.checkins) > heard and is_ready(coordinator), within_s=20)
    coordinator.invite(board.device)
    until(lambda: board.status().get("receipts") == {"counted": 1}, within_s=20)
    process.terminate()
    assert process.wait(10) == 0
    assert [update.round for update, _ in coordinator.updates] == [2]


@pytest.mark.broker
def test_sigterm_in_mid_training_is_a_clean_stop_within_five_seconds(
    tmp_path: Path, broker: str, coordinator: Scripted
) -> None:
    board, process = standing(tmp_path, broker, coordinator)
    train_without_end(board, process, coordinator)
    asked = time.monotonic()
    process.terminate()
    assert process.wait(10) == 0, board.log.read_text()
    assert time.monotonic() - asked < 5
    until(lambda: not coordinator.statuses[-1].online)
    assert board.status()["examples"] == 30
    assert "Traceback" not in board.log.read_text()


@pytest.mark.broker
def test_the_broker_may_come_later(tmp_path: Path) -> None:
    port = free_port()
    board = Board(tmp_path, f"mqtt://127.0.0.1:{port}")
    board.give()
    process = board.start()
    until((board.inbox / "consumed" / "rows.npz").exists, within_s=20)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0
    assert "no broker listens" in board.log.read_text()
    assert board.status()["examples"] == 30


@pytest.mark.broker
def test_doctor_says_what_is_well_and_what_is_not(
    tmp_path: Path, broker: str, capsys: pytest.CaptureFixture[str]
) -> None:
    board = Board(tmp_path, broker, conditions=["on_mains", ["examples", 50]])
    assert device_cli.main(["doctor", "--config", str(board.config)]) == 0
    said = capsys.readouterr().out
    assert "lets us in" in said
    assert "examples(50)" in said
    assert "ort 1." in said
    assert "not litert: this bundle trains in onnx" in said
    board.config.write_text(f'broker = "mqtt://127.0.0.1:{free_port()}"\ntask = "toy"')
    assert device_cli.main(["doctor", "--config", str(board.config), "--json"]) == 4
    checks = {c["check"]: c for c in json.loads(capsys.readouterr().out)}
    assert not checks["broker"]["ok"]
    assert "start it" in checks["broker"]["says"]
    assert checks["packages"]["ok"]
    assert "the first bundle decides" in checks["engine"]["says"]


def test_status_shows_what_the_device_last_wrote(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    board = Board(tmp_path, "mqtt://localhost")
    command = ["status", "--config", str(board.config)]
    with pytest.raises(StoreError, match="fedge device run"):
        device_cli.main(command)
    board.state.mkdir()
    written = {"device": "d1", "rounds": 3, "last_receipt": {"round": 3, "outcome": "counted"}}
    (board.state / "status.json").write_text(json.dumps({**written, "conditions_lapsed": []}))
    assert device_cli.main(command) == 0
    said = capsys.readouterr().out
    assert "round 3, outcome counted" in said
    assert "running              False" in said
    device_cli.main([*command, "--json"])
    assert json.loads(capsys.readouterr().out)["rounds"] == 3


def test_wipe_deletes_everything_but_only_when_told_to(tmp_path: Path) -> None:
    board = Board(tmp_path, "mqtt://localhost")
    command = ["wipe", "--config", str(board.config)]
    with pytest.raises(StoreError, match="nothing to wipe"):
        device_cli.main(command)
    assert board.device
    with pytest.raises(ConfigError, match="--yes"):
        device_cli.main(command)
    assert device_cli.main([*command, "--yes"]) == 0
    assert not board.state.exists()


@pytest.mark.broker
def test_a_device_serves_predict_learn_and_status_on_its_socket(
    tmp_path: Path, broker: str
) -> None:
    board = Board(tmp_path, broker)
    text = board.config.read_text().partition("[source]")[0]
    board.config.write_text(text + '[source]\nsocket = "s"\n')
    process = board.start()
    requests = [
        {"predict": X[0].tolist()},
        {"learn": X[0].tolist(), "label": int(Y[0])},
        {"learn": X[0].tolist(), "label": 99},
        {"status": True},
    ]
    with socket.socket(socket.AF_UNIX) as client:
        until(lambda: client.connect_ex(str(tmp_path / "s")) == 0, within_s=20)
        answers = client.makefile()
        heard = []
        for request in requests:
            client.sendall(json.dumps(request).encode() + b"\n")
            heard.append(json.loads(answers.readline()))
    assert len(heard[0]["output"]) == 3
    assert heard[1] == {"learned": True}
    assert "classes 0 to 2" in heard[2]["error"]
    assert heard[3]["examples"] == 1
    assert heard[3]["version"] == 0
    process.terminate()
    assert process.wait(10) == 0, board.log.read_text()
    assert not (tmp_path / "s").exists()


def test_a_wrong_configuration_is_one_line_and_code_3(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    board = Board(tmp_path, "mqtt://localhost", min_exmaples=3)
    assert cli.main(["device", "run", "--config", str(board.config)]) == 3
    said = capsys.readouterr().err
    assert "did you mean min_examples?" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("command", ["run", "status", "doctor", "wipe"])
def test_every_command_has_help_with_an_example(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        device_cli.main([command, "--help"])
    assert left.value.code == 0
    assert "example: fedge device" in capsys.readouterr().out
