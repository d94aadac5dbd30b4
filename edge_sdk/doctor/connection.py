# SPDX-License-Identifier: Apache-2.0
"""The way to the coordinator: whether the broker lets us in, and how long certificates last."""

from __future__ import annotations

import datetime as dt
import os
import re
import ssl
from typing import TYPE_CHECKING

from edge_sdk.doctor.board import Board
from edge_sdk.doctor.finding import Amiss

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

SOON_DAYS = 30
ANSWER_S = 10.0


def broker(board: Board) -> str:
    """Say whether the broker lets this device in."""
    from edge_sdk.transport.mqtt import Mqtt

    config = board.config
    mqtt = Mqtt(
        config.broker,
        f"doctor-{os.getpid()}",
        ca_file=config.ca_file,
        username=config.username,
        password=config.password,
    )
    try:
        mqtt.probe()
    finally:
        mqtt.close()
    return f"{mqtt.endpoint} lets us in"


def certificate(board: Board) -> str:
    """Say how long the CA's and the broker's certificates last."""
    from edge_sdk.transport.endpoint import Endpoint

    config = board.config
    endpoint = Endpoint.parse(config.broker, ca_file=config.ca_file)
    if endpoint.tls is None:
        return _no_tls(endpoint.host)
    trusted = _certificates(config.ca_file.read_bytes()) if config.ca_file is not None else []
    said = [_valid(one, "the CA's", board.now_s) for one in trusted]
    try:
        where = endpoint.host, endpoint.port
        shown = ssl.get_server_certificate(where, timeout=ANSWER_S)
    except OSError as error:
        why = getattr(error, "strerror", None) or error
        raise Amiss(f"the broker shows no certificate ({why})", "see the line above") from error
    said += [_valid(one, "the broker's", board.now_s) for one in _certificates(shown.encode())]
    return ", ".join(said)


def _no_tls(host: str) -> str:
    if host in {"localhost", "127.0.0.1", "::1"}:
        return "no TLS, and none needed on this machine"
    do = "mqtts://, with the CA's certificate as ca_file"
    raise Amiss("no TLS: whoever is on the way reads and changes what is said", do, "warn")


def _valid(certificate: Certificate, whose: str, now_s: float) -> str:
    starts, ends = _life(certificate)
    today = dt.datetime.fromtimestamp(now_s, dt.UTC)
    if today < starts:
        raise Amiss(
            f"{whose} certificate is valid from {starts:%Y-%m-%d %H:%M} UTC on, "
            f"and here it is {today:%Y-%m-%d %H:%M} UTC",
            "set this board's clock: timedatectl set-ntp true",
        )
    if today >= ends:
        raise Amiss(f"{whose} certificate expired on {ends:%Y-%m-%d}", "renew it")
    days = (ends - today).days
    if days < SOON_DAYS:
        raise Amiss(f"{whose} certificate expires in {days} days", "renew it soon", "warn")
    return f"{whose} certificate is good for {days} days"


def _certificates(pem: bytes) -> list[Certificate]:
    from cryptography.x509 import load_pem_x509_certificate

    found = re.findall(rb"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", pem, re.DOTALL)
    if not found:
        raise Amiss("the CA's file holds no certificate", "set ca_file to a PEM file of the CA's")
    return [load_pem_x509_certificate(one) for one in found]


def _life(certificate: Certificate) -> tuple[dt.datetime, dt.datetime]:
    if hasattr(certificate, "not_valid_after_utc"):  # cryptography 42 on
        return certificate.not_valid_before_utc, certificate.not_valid_after_utc
    ends = certificate.not_valid_before, certificate.not_valid_after
    return ends[0].replace(tzinfo=dt.UTC), ends[1].replace(tzinfo=dt.UTC)
