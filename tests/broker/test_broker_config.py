# SPDX-License-Identifier: Apache-2.0
"""The files of `fedge coordinator broker-config`, in a real mosquitto: who may say what to whom."""

from __future__ import annotations

import asyncio
import datetime as dt
import shutil
import ssl
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import paho.mqtt.client as paho
import pytest
from cryptography import x509
from hand_bundles import examples, mlp

from coordinator import Coordinator, Task, pacing
from coordinator.broker_cli import AUTHORITY_KEY
from coordinator.broker_config import IDENTITIES, Fleet, config, rights
from coordinator.certificates import Issued, authority, broker
from coordinator.cli import main
from edge_sdk import topics
from edge_sdk.device import Device
from edge_sdk.errors import ConfigError, TransportError
from edge_sdk.signing import DeviceKey
from edge_sdk.transport.mqtt import Mqtt

A, B = "d" + "a" * 15, "d" + "b" * 15
NOW = dt.datetime(2026, 6, 1, tzinfo=dt.UTC)
Made = Callable[..., Path]


@pytest.fixture
def made(tmp_path: Path) -> Made:
    """Run the command; return its folder."""

    def run(*options: str) -> Path:
        folder = tmp_path / "broker"
        assert main(["broker-config", "--folder", str(folder), *options]) == 0
        return folder

    return run


@pytest.fixture
def serve(start_mosquitto: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """Start a mosquitto with the files of a folder and some users, all with one password."""

    def start(folder: Path, *users: str) -> Any:
        program = shutil.which("mosquitto_passwd")
        if program is None:
            pytest.skip("mosquitto_passwd is not installed")
        passwords = folder / "passwords"
        passwords.touch()
        for user in users:
            subprocess.run([program, "-b", str(passwords), user, "letmein"], check=True)
        listener, _, rest = (folder / "fedge.conf").read_text().partition("certfile")
        assert "\nlistener 8883\n" in listener
        started = start_mosquitto(listener=tuple(f"certfile{rest}".splitlines()))
        started.url = started.url.replace("mqtt://", "mqtts://")
        return started

    return start


class Client:
    """Somebody at the broker, and all that reached them."""

    def __init__(self, url: str, folder: Path, user: str, client_id: str = "") -> None:
        self.got: list[tuple[str, bytes]] = []
        self.mqtt = Mqtt(
            url,
            client_id or user,
            ca_file=folder / "ca.pem",
            username=user,
            password="letmein",
        )

    def start(self, *filters: str) -> Client:
        self.mqtt.subscribe(*filters)
        self.mqtt.start(
            lambda topic, payload: self.got.append((topic, payload)), lambda _is_up: None
        )
        return self


def heard(client: Client) -> set[bytes]:
    return {payload for _, payload in client.got}


EVERYTHING = ("#", "fedge/1/t/+/up/#", f"fedge/1/t/t/dn/{A}/+", f"fedge/1/t/t/dn/{B}/+")


@pytest.mark.broker
@pytest.mark.parametrize("identity", ["username", "client"])
def test_a_device_writes_as_itself_and_hears_what_is_for_it(
    made: Made, serve: Callable[..., Any], until: Any, identity: str
) -> None:
    folder = made("--host", "127.0.0.1", "--identity", identity)
    users = (A, B) if identity == "username" else ("devices", "devices")
    at = serve(folder, "coordinator", *users)
    coordinator = Client(at.url, folder, "coordinator").start(
        topics.up_filter(), topics.status_filter()
    )
    one, other = (
        Client(at.url, folder, user, name).start(*EVERYTHING, topics.offer("t"))
        for user, name in zip(users, (A, B), strict=True)
    )
    clients = (coordinator, one, other)
    until(lambda: all(client.mqtt.is_up for client in clients), "three connections")
    forged = (topics.status(B), topics.up("t", B, "update"), topics.offer("t"), "elsewhere")
    for topic in (*forged, topics.down("t", A, "invite"), topics.part("t", "weights", 0)):
        one.mqtt.publish(topic, b"forged", retain=True)
    one.mqtt.publish(topics.up("t", A, "update"), b"mine")  # after the others, on one connection
    one.mqtt.publish(topics.status(A), b"here")
    until(lambda: len(coordinator.got) >= 2, "what the device may say")
    coordinator.mqtt.publish(topics.down("t", B, "invite"), b"for b")
    coordinator.mqtt.publish(topics.down("t", A, "invite"), b"for a")
    coordinator.mqtt.publish(topics.offer("t"), b"for all", retain=True)
    until(lambda: heard(one) >= {b"for all"} <= heard(other), "what devices may hear")
    assert [payload for _, payload in coordinator.got] == [b"mine", b"here"]
    assert heard(one) == {b"for a", b"for all"}
    assert heard(other) == {b"for all", b"for b"}
    for client in clients:
        client.mqtt.close()


@pytest.mark.broker
def test_nobody_comes_in_without_a_name_or_says_more_than_a_frame(
    made: Made, serve: Callable[..., Any], until: Any
) -> None:
    folder = made("--host", "127.0.0.1")
    at = serve(folder, "coordinator", A)
    with pytest.raises(TransportError, match="user name and a password"):
        Mqtt(at.url, A, ca_file=folder / "ca.pem").probe()
    with pytest.raises(TransportError, match="TLS port"):
        Mqtt(at.url.replace("mqtts", "mqtt"), A).probe()
    coordinator = Client(at.url, folder, "coordinator").start(topics.up_filter())
    device = Client(at.url, folder, A).start("x")
    until(lambda: coordinator.mqtt.is_up and device.mqtt.is_up, "two connections")
    update = topics.up("t", A, "update")
    device.mqtt.publish(update, bytes(120_000))
    until(lambda: len(coordinator.got) == 1, "the largest frame")
    device.mqtt.publish(update, bytes(120_001))
    until(lambda: device.mqtt.error is not None, "the broker to hang up")
    until(lambda: device.mqtt.is_up, "another connection")
    device.mqtt.publish(update, b"again")
    until(lambda: len(coordinator.got) > 1, "what came after")
    assert [len(payload) for _, payload in coordinator.got] == [120_000, 5]
    device.mqtt.close()
    coordinator.mqtt.close()


@pytest.mark.broker
@pytest.mark.skipif(not hasattr(paho.Client, "ack"), reason="the coordinator needs paho-mqtt 2")
def test_a_round_is_done_with_no_more_rights_than_that(
    made: Made, serve: Callable[..., Any], tmp_path: Path
) -> None:
    folder, bundle = made("--host", "127.0.0.1"), mlp()
    bundle.save(tmp_path / "b.fedge")
    key = DeviceKey.load_or_create(tmp_path / "device" / "identity.key")
    at = serve(folder, "coordinator", key.id)
    names = {"ca_file": folder / "ca.pem", "password": "letmein"}

    async def story() -> Any:
        task = Task("t", tmp_path / "b.fedge", epochs=1, batch=8)
        place = tmp_path / "coordinator"
        coordinator = Coordinator(at.url, store=place, username="coordinator", **names)
        async with coordinator:
            pace = pacing.rounds(cohort=1, quorum=1, deadline_s=60, select_s=0.01, count=1)
            return [result async for result in coordinator.train(task, pace)]

    with Device(
        at.url, task="t", state=tmp_path / "device", bundle=bundle, username=key.id, **names
    ) as device:
        device.learn_many(*examples(40))
        results = asyncio.run(asyncio.wait_for(story(), 90))
    assert [(r.outcome, r.version, r.reported) for r in results] == [("commit", 1, (key.id,))]


# --- the files --------------------------------------------------------------------------------
def test_the_certificate_is_good_for_its_hosts_and_no_others(made: Made) -> None:
    folder = made("--host", "fleet.example.org", "--host", "192.0.2.7")
    found = x509.load_pem_x509_certificate((folder / "broker.pem").read_bytes())
    issuer = x509.load_pem_x509_certificate((folder / "ca.pem").read_bytes())
    found.verify_directly_issued_by(issuer)
    names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["fleet.example.org"]
    assert [str(a) for a in names.get_values_for_type(x509.IPAddress)] == ["192.0.2.7"]
    context = ssl.create_default_context(cafile=str(folder / "ca.pem"))
    context.load_cert_chain(folder / "broker.pem", folder / "broker.key")
    for key in (AUTHORITY_KEY, "broker.key"):
        assert stat.S_IMODE((folder / key).stat().st_mode) == 0o600


def test_what_is_there_is_kept(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    folder = made("--host", "a.example")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    made("--host", "b.example")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert "remove it and broker.key to have new ones" in capsys.readouterr().out
    (folder / "broker.pem").unlink()
    (folder / "broker.key").unlink()
    made("--host", "b.example")
    assert (folder / "ca.pem").read_bytes() == before["ca.pem"]
    assert (folder / "broker.pem").read_bytes() != before["broker.pem"]


def test_an_authority_without_its_key_signs_nothing(made: Made) -> None:
    folder = made("--host", "a.example")
    for name in ("ca.key", "broker.pem", "broker.key"):
        (folder / name).unlink()
    with pytest.raises(ConfigError, match=r"ca\.key: No such file or directory; it goes with"):
        made("--host", "a.example")


def test_another_authoritys_key_is_told_apart() -> None:
    one, other = authority("one", NOW), authority("other", NOW)
    with pytest.raises(ConfigError, match="not that of its certificate"):
        broker(Issued(one.certificate, other.key), ["a.example"], NOW)
    with pytest.raises(ConfigError, match="certificate and key of an authority"):
        broker(Issued(b"", one.key), ["a.example"], NOW)
    with pytest.raises(ConfigError, match="names or addresses"):
        broker(one, [], NOW)


@pytest.mark.parametrize("identity", IDENTITIES)
def test_each_identity_asks_for_what_proves_it(identity: Any) -> None:
    fleet = Fleet(PurePosixPath("/etc/mosquitto/fedge"), identity=identity)
    lines = config(fleet).splitlines()
    by_certificate = identity == "certificate"
    assert ("password_file /etc/mosquitto/fedge/passwords" in lines) is not by_certificate
    assert ("require_certificate true" in lines) is by_certificate
    assert ("use_identity_as_username true" in lines) is by_certificate
    assert ("%c" in rights(fleet), "%u" in rights(fleet)) == (
        identity == "client",
        identity != "client",
    )
    assert "allow_anonymous false" in lines
    assert "message_size_limit 120000" in lines


def test_limits_grow_with_the_fleet() -> None:
    small, large = (
        config(Fleet(PurePosixPath("/b"), devices=devices)).splitlines()
        for devices in (10, 100_000)
    )
    assert {"max_queued_messages 10000", "max_connections 120"} <= set(small)
    assert {"max_queued_messages 800000", "max_connections 200100"} <= set(large)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"port": 0}, "port: expected 1 to 65535, got 0"),
        ({"devices": 0}, "devices: expected 1 to 1000000, got 0"),
        ({"coordinator": "a\nuser b"}, "coordinator: expected a user name"),
    ],
)
def test_wrong_wishes_have_their_line(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Fleet(PurePosixPath("/b"), **wrong)


def test_the_files_in_the_package_are_those_that_the_command_makes() -> None:
    package = Path(__file__).parents[2] / "packaging" / "mosquitto"
    fleet = Fleet(PurePosixPath("/etc/mosquitto/fedge"))
    assert (package / "fedge.conf").read_text() == config(fleet)
    assert (package / "fedge.acl").read_text() == rights(fleet)
