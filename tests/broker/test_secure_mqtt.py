# SPDX-License-Identifier: Apache-2.0
import asyncio
import datetime as dt
import logging
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import paho.mqtt.client as paho
import pytest

from coordinator import certificates
from coordinator.mqtt import Mqtt as CoordinatorMqtt
from edge_sdk.errors import TransportError
from edge_sdk.transport.mqtt import Mqtt

pytestmark = pytest.mark.broker
needs_paho_2 = pytest.mark.skipif(
    not hasattr(paho.Client, "ack"), reason="the coordinator needs paho-mqtt 2"
)
NOW = dt.datetime.now(dt.UTC)


class Authority(NamedTuple):
    """A CA of one test, and the certificate that it gave a broker on loopback."""

    ca: Path
    certificate: Path
    key: Path


def _authority(folder: Path, address: str = "127.0.0.1") -> Authority:
    folder.mkdir(exist_ok=True)
    ca = certificates.authority("test ca", NOW)
    made = certificates.broker(ca, [address], NOW)
    found = Authority(folder / "ca.pem", folder / "broker.pem", folder / "broker.key")
    for path, data in zip(found, (ca.certificate, made.certificate, made.key), strict=True):
        path.write_bytes(data)
    return found


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return _authority(tmp_path / "ca")


@pytest.fixture
def secure(start_mosquitto: Callable[..., Any], authority: Authority, tmp_path: Path) -> Any:
    """Start a mosquitto with TLS that asks for a name (device) and a password (letmein)."""
    program = shutil.which("mosquitto_passwd")
    if program is None:
        pytest.skip("mosquitto_passwd is not installed")
    passwords = tmp_path / "passwords"
    subprocess.run([program, "-c", "-b", str(passwords), "device", "letmein"], check=True)
    broker = start_mosquitto(
        "allow_anonymous false",
        f"password_file {passwords}",
        listener=(f"certfile {authority.certificate}", f"keyfile {authority.key}"),
    )
    broker.url = broker.url.replace("mqtt://", "mqtts://")
    return broker


def test_a_device_with_the_ca_and_the_password_gets_in(
    secure: Any, authority: Authority, until: Any
) -> None:
    mqtt = Mqtt(secure.url, "a", ca_file=authority.ca, username="device", password="letmein")
    mqtt.probe()
    got: list[bytes] = []
    mqtt.subscribe("t")
    mqtt.start(lambda _topic, payload: got.append(payload), lambda _is_up: None)
    until(lambda: mqtt.is_up, "a connection")
    for _ in range(3):
        mqtt.publish("t", bytes(100_000))
    until(lambda: len(got) == 3, "300 kB over TLS")
    assert got == [bytes(100_000)] * 3
    mqtt.close()


@needs_paho_2
def test_a_coordinator_with_the_ca_and_the_password_gets_in(
    secure: Any, authority: Authority
) -> None:
    async def story() -> None:
        url = secure.url.replace("mqtts://", "mqtts://device:letmein@")
        async with CoordinatorMqtt(url, "c", ca_file=authority.ca) as mqtt:
            await mqtt.subscribe("t")
            for _ in range(3):
                await mqtt.publish("t", bytes(100_000))
            stream = mqtt.messages()
            for _ in range(3):
                _, payload, ack = await anext(stream)
                assert payload == bytes(100_000)
                ack()

    asyncio.run(asyncio.wait_for(story(), 20))


async def _enter(url: str, **options: Any) -> None:
    async with CoordinatorMqtt(url, "c", **options):
        pass


def _probe(url: str, **options: Any) -> None:
    Mqtt(url, "a", **options).probe()


@pytest.mark.parametrize("side", ["device", pytest.param("coordinator", marks=needs_paho_2)])
def test_each_way_to_be_kept_out_has_its_own_words(
    secure: Any, authority: Authority, tmp_path: Path, side: str
) -> None:
    enter = {"device": _probe, "coordinator": lambda *a, **o: asyncio.run(_enter(*a, **o))}
    other = _authority(tmp_path / "other")
    plain = secure.url.replace("mqtts://", "mqtt://")
    cases: list[tuple[str, dict[str, Any], str]] = [
        (
            secure.url,
            {"ca_file": authority.ca, "username": "device", "password": "guess"},
            "does not accept our user name and password: correct them",
        ),
        (
            secure.url,
            {"ca_file": authority.ca},
            "does not let us in without a user name and a password: give them",
        ),
        (secure.url, {"ca_file": other.ca}, "certificate of .* is not to be trusted .*ca_file"),
        (secure.url, {}, "certificate of .* is not to be trusted .*ca_file"),
        (
            secure.url.replace("127.0.0.1", "localhost"),
            {"ca_file": authority.ca},
            "certificate of .* is not to be trusted .*the host name that it was made for",
        ),
        (plain, {}, r"hung up without an answer: is it a TLS port\? then use mqtts://"),
    ]
    for url, options, words in cases:
        with pytest.raises(TransportError, match=words) as caught:
            enter[side](url, **options)
        assert "\n" not in str(caught.value)
        assert "guess" not in str(caught.value)


def test_tls_to_a_plain_port_is_told_apart(mosquitto: Any, authority: Authority) -> None:
    url = mosquitto.url.replace("mqtt://", "mqtts://")
    with pytest.raises(TransportError, match=r"no TLS with .*: is it a TLS port\?"):
        Mqtt(url, "a", ca_file=authority.ca).probe()


def test_a_wrong_password_waits_as_long_as_can_be(
    secure: Any, authority: Authority, until: Any, caplog: pytest.LogCaptureFixture
) -> None:
    mqtt = Mqtt(
        secure.url,
        "a",
        ca_file=authority.ca,
        username="device",
        password="guess",
        backoff_s=(0.001, 60.0),
    )
    with caplog.at_level(logging.WARNING):
        mqtt.start(lambda _topic, _payload: None, lambda _is_up: None)
        until(lambda: mqtt.error, "the refusal")
        mqtt.close()
    line = next(r.getMessage() for r in caplog.records if "next try" in r.getMessage())
    assert float(line.split("next try in ")[1].split(" ")[0]) >= 30.0
    assert "guess" not in caplog.text
