# SPDX-License-Identifier: Apache-2.0
"""What a board meets in the proof, on this machine's loopback.

An authority, a broker that asks for TLS and a password, a coordinator, two native devices.
"""

from __future__ import annotations

import ipaddress
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import paho.mqtt.client as paho
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from coordinator import ledger
from coordinator.compiler import build, momentum
from coordinator.demo.processes import Process, stop_all
from coordinator.recipes import recipe
from edge_sdk import messages

GATEWAY = "10.0.2.2"
"""Where a guest of QEMU's user network finds this machine's loopback."""
PASSWORD = "throwaway"  # noqa: S105 - of a broker that lives for minutes
USERS = ("coordinator", "board", "native", "prover")
TASK = "proof"
ROWS = 60
FEDGE = (sys.executable, "-m", "edge_sdk")


class Hub:
    """The broker and everybody on it but the board; `with` starts it and stops it."""

    def __init__(
        self, folder: Path, port: int, *, since: datetime, rounds: int, epochs: int
    ) -> None:
        self.folder, self.port = folder, port
        folder.mkdir(parents=True)
        self._authority(since)
        digits = recipe("digits")
        devices = digits.split(0).devices
        self._rows = devices.x, devices.y
        bundle = build(
            digits.build(0).SerializeToString(),
            loss="cross_entropy",
            train="all",
            optimizer=momentum(0.9, lr=0.05),
        )
        bundle.save(folder / "digits.fedge")
        pace = f"{{ cohort = 3, quorum = 3, deadline_s = 900, count = {rounds} }}"
        (folder / "password").write_text(f"{PASSWORD}\n")
        (folder / "coordinator.toml").write_text(
            f'{self._login("127.0.0.1", "coordinator")}store = "store"\n[task.{TASK}]\n'
            f'bundle = "digits.fedge"\npace = ["rounds", {pace}]\n'
            f"budget = {{ epochs = {epochs}, batch = 16 }}\n"
        )
        self.seen = Seen(self)
        self._processes: list[Process] = []

    def __enter__(self) -> Self:
        self._broker_file = self._broker()
        self._start_broker()
        self.seen.start()
        self.start_coordinator()
        for number in (1, 2):
            config = str(self._native(number))
            self._start([*FEDGE, "device", "run", "--config", config], f"native-{number}")
        return self

    def __exit__(self, *_: object) -> None:
        self.seen.stop()
        stop_all(list(reversed(self._processes)))

    def start_coordinator(self) -> None:
        """Start the coordinator, from its store if it ran before."""
        config = str(self.folder / "coordinator.toml")
        words = [*FEDGE, "coordinator", "run", "--config", config]
        self._coordinator = self._start(words, "coordinator")

    def kill_coordinator(self) -> None:
        """Kill the coordinator: there is no receipt until it is started again."""
        self._coordinator.kill()
        self._coordinator.wait()

    def renew_broker(self) -> None:
        """Kill the broker and start another, which holds nothing of what the first one held."""
        self._mosquitto.kill()
        self._mosquitto.wait()
        self._start_broker()

    def _start_broker(self) -> None:
        self._mosquitto = self._start(["mosquitto", "-c", str(self._broker_file)], "mosquitto")

    def card(self, name: str) -> dict[str, bytes]:
        """Return the files that a technician puts on the card of a board called `name`."""
        rows = self.folder / f"{name}.npz"
        self._save(rows, 0)
        text = (
            f'broker = "mqtts://{GATEWAY}:{self.port}"\ntask = "{TASK}"\nname = "{name}"\n'
            f'username = "board"\nmin_examples = {ROWS}\n'
            'model_file = "/var/lib/fedge/model.onnx"\n'
        )
        return {
            "fedge.toml": text.encode(),
            "broker-password": f"{PASSWORD}\n".encode(),
            "ca.pem": (self.folder / "ca.pem").read_bytes(),
            "inbox/rows.npz": rows.read_bytes(),
        }

    def updates(self, device: str) -> list[dict[str, Any]]:
        """Return what the coordinator's journal holds of a device."""
        store = self.folder / "store"
        if not (store / ledger.DATABASE).exists():
            return []
        return [update for update in ledger.updates(store) if update["device"] == device]

    def outcomes(self, device: str) -> list[str]:
        """Return what became of each update of a device: its round, and in which version it is."""
        return [
            f"round {update['round']}: {update['outcome']}, in version {update['folded']}"
            for update in self.updates(device)
        ]

    def under_way(self, device: str) -> int | None:
        """Return the round that is open, in which the device was invited and has not reported."""
        rounds = ledger.rounds(self.folder / "store", TASK)
        newest = rounds[-1] if rounds else {}
        reported = {update["round"] for update in self.updates(device)}
        if newest.get("outcome") != "open" or device not in newest["cohort"]:
            return None
        return None if newest["number"] in reported else int(newest["number"])

    def version(self) -> int:
        """Return the newest version of the model."""
        return max((int(row["version"]) for row in ledger.models(self.folder / "store")), default=0)

    def round_of(self, number: int) -> dict[str, Any]:
        """Return a round as the journal has it."""
        found = ledger.rounds(self.folder / "store", TASK)
        return next((row for row in found if row["number"] == number), {})

    def _start(self, args: list[str], name: str) -> Process:
        process = Process(args, self.folder / f"{name}.log")
        self._processes.append(process)
        return process

    def _login(self, host: str, user: str, ca: str = "ca.pem") -> str:
        return (
            f'broker = "mqtts://{host}:{self.port}"\nca_file = "{ca}"\n'
            f'username = "{user}"\npassword_file = "{self.folder / "password"}"\n'
        )

    def _native(self, number: int) -> Path:
        home = self.folder / f"native-{number}"
        (home / "inbox").mkdir(parents=True)
        self._save(home / "inbox" / "rows.npz", number)
        login = self._login("127.0.0.1", "native", str(self.folder / "ca.pem"))
        (home / "device.toml").write_text(
            f'{login}task = "{TASK}"\nstate = "state"\nname = "native-{number}"\n'
            f'min_examples = {ROWS}\n[source]\nfolder = "inbox"\npoll_s = 1.0\n'
        )
        return home / "device.toml"

    def _save(self, file: Path, part: int) -> None:
        x, y = (np.asarray(side[part * ROWS : (part + 1) * ROWS]) for side in self._rows)
        np.savez(file, x=x, y=y)

    def _broker(self) -> Path:
        users = self.folder / "users"
        users.touch(mode=0o600)
        for user in USERS:
            subprocess.run(["mosquitto_passwd", "-b", users, user, PASSWORD], check=True)
        config = self.folder / "mosquitto.conf"
        config.write_text(
            f"listener {self.port} 127.0.0.1\ncafile {self.folder}/ca.pem\n"
            f"certfile {self.folder}/broker.pem\nkeyfile {self.folder}/broker.key\n"
            f"allow_anonymous false\npassword_file {users}\nmax_queued_messages 10000\n"
            "user root\nlog_type error\nlog_type warning\n"
        )
        return config

    def _authority(self, since: datetime) -> None:
        """Make a throwaway authority and the broker's certificate, valid since the image was made.

        A board without a clock of its own starts at that time.
        """
        until = datetime.now(UTC) + timedelta(days=2)
        ca_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
        ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedge proof")])
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "broker")])
        addresses = [
            x509.IPAddress(ipaddress.ip_address(place)) for place in (GATEWAY, "127.0.0.1")
        ]

        def builder(subject: x509.Name, public: ec.EllipticCurvePublicKey) -> Any:
            made = x509.CertificateBuilder().subject_name(subject).issuer_name(ca_name)
            made = made.public_key(public).serial_number(x509.random_serial_number())
            return made.not_valid_before(since - timedelta(days=1)).not_valid_after(until)

        usage = x509.KeyUsage(
            digital_signature=True, content_commitment=False, key_encipherment=False,
            data_encipherment=False, key_agreement=False, key_cert_sign=True, crl_sign=True,
            encipher_only=False, decipher_only=False,
        )  # fmt: skip
        identifier = x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key())
        ca = (
            builder(ca_name, ca_key.public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(identifier, critical=False)
            .sign(ca_key, hashes.SHA256())
        )
        issuer = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)
        broker = (
            builder(name, key.public_key())
            .add_extension(x509.SubjectAlternativeName(addresses), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(issuer, critical=False)
            .sign(ca_key, hashes.SHA256())
        )
        pem = serialization.Encoding.PEM
        (self.folder / "ca.pem").write_bytes(ca.public_bytes(pem))
        (self.folder / "broker.pem").write_bytes(broker.public_bytes(pem))
        (self.folder / "broker.key").write_bytes(
            key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        )


class Frame(NamedTuple):
    """One message as it passed: when, on which topic, as bytes and as what they say."""

    at: float
    topic: str
    payload: bytes
    message: Any

    @property
    def id(self) -> str:
        """What the coordinator's journal calls an update."""
        return messages.Signed(self.payload, self.topic).id.hex()


class Seen:
    """What passes through the broker, with the time: an observer that takes no part."""

    def __init__(self, hub: Hub) -> None:
        self._hub, self._lock = hub, threading.Lock()
        self._frames: list[tuple[float, str, bytes]] = []
        self._client = paho.Client(paho.CallbackAPIVersion.VERSION2, "prover")
        self._client.username_pw_set("prover", PASSWORD)
        self._client.tls_set(str(hub.folder / "ca.pem"))
        self._client.on_connect = lambda client, *_: client.subscribe("fedge/1/#", 1)
        self._client.on_message = self._note

    def start(self) -> None:
        """Connect, trying until the broker is there."""
        self._client.connect_async("127.0.0.1", self._hub.port)
        self._client.reconnect_delay_set(1, 2)
        self._client.loop_start()

    def stop(self) -> None:
        """Leave."""
        self._client.disconnect()
        self._client.loop_stop()

    def _note(self, _client: object, _userdata: object, message: paho.MQTTMessage) -> None:
        with self._lock:
            self._frames.append((time.monotonic(), message.topic, message.payload))

    def first(self, kind: str, device: str, since: float = 0.0) -> float | None:
        """Return when the first frame of a kind from or to a device passed, after `since`."""
        with self._lock:
            frames = list(self._frames)
        for at, topic, _ in frames:
            if at >= since and device in topic.split("/") and topic.endswith(f"/{kind}"):
                return at
        return None

    def of_round(
        self, kind: str, device: str, round_: int | None, since: float = 0.0
    ) -> Frame | None:
        """Return the first frame of a kind, from or to a device, that is about a round."""
        with self._lock:
            frames = list(self._frames)
        for at, topic, payload in frames:
            if at >= since and device in topic.split("/") and topic.endswith(f"/{kind}"):
                message, _ = messages.decode(payload, topic)
                if getattr(message, "round", None) == round_:
                    return Frame(at, topic, payload, message)
        return None

    def say_again(self, frame: Frame) -> None:
        """Let a frame pass once more, as a broker that had kept it would."""
        self._client.publish(frame.topic, frame.payload, qos=1).wait_for_publish(10.0)

    def hello(self, name: str, since: float = 0.0) -> tuple[float, str] | None:
        """Return when a device called `name` first said that it is online, and its id."""
        with self._lock:
            frames = list(self._frames)
        for at, topic, payload in frames:
            if at >= since and topic.endswith("/status"):
                message, _ = messages.decode(payload, topic)
                if isinstance(message, messages.Status) and message.online and message.name == name:
                    return at, message.device
        return None
