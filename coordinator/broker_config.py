# SPDX-License-Identifier: Apache-2.0
"""Files for a mosquitto that serves a fleet: TLS, rights for each device, limits. Pure.

Fit for `/etc/mosquitto/conf.d` of Debian's package, which keeps persistence and the log itself.
(mosquitto.conf(5) of 2.0; what each limit is for stands beside it in the file.)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal, TypeAlias

from edge_sdk.errors import ConfigError
from edge_sdk.messages import MAX_FRAME
from edge_sdk.topics import PREFIX

Identity: TypeAlias = Literal["username", "client", "certificate"]
IDENTITIES: tuple[Identity, ...] = ("username", "client", "certificate")
CONFIG, RIGHTS = "fedge.conf", "fedge.acl"
LEAST_QUEUED = 10_000
A_DEVICE_QUEUES = 8
"""Messages of one device that may wait for the coordinator: status, check-in, update in parts."""


@dataclass(frozen=True, slots=True)
class Fleet:
    """What the broker is for.

    Attributes:
        folder: where the files will lie.
        port: of the TLS listener.
        devices: how many there may be; sizes the queues and the number of connections.
        identity: how the broker knows a device by its id: a user of that name ("username", one
            password each), the client id alone ("client", one user and password for all), or the
            name in its certificate ("certificate", no passwords).
        coordinator: the user that the coordinator logs in as (the name in its certificate).
        authority, certificate, key, passwords: files, in `folder` unless absolute.
    """

    folder: PurePosixPath
    port: int = 8883
    devices: int = 1000
    identity: Identity = "username"
    coordinator: str = "coordinator"
    authority: str = "ca.pem"
    certificate: str = "broker.pem"
    key: str = "broker.key"
    passwords: str = "passwords"

    def __post_init__(self) -> None:
        if not 1 <= self.port <= 65_535:
            raise ConfigError(f"port: expected 1 to 65535, got {self.port}")
        if not 1 <= self.devices <= 1_000_000:
            raise ConfigError(f"devices: expected 1 to 1000000, got {self.devices}")
        if not self.coordinator or not self.coordinator.isprintable() or "/" in self.coordinator:
            raise ConfigError(f"coordinator: expected a user name, got {self.coordinator!r}")


def config(fleet: Fleet) -> str:
    """Return `fedge.conf`."""
    queued = max(LEAST_QUEUED, A_DEVICE_QUEUES * fleet.devices)
    lines = [
        "# Made by `fedge coordinator broker-config`.",
        f"listener {fleet.port}",
        f"certfile {_at(fleet, fleet.certificate)}",
        f"keyfile {_at(fleet, fleet.key)}",
        "tls_version tlsv1.2",
        *_who(fleet),
        "allow_anonymous false",
        f"acl_file {_at(fleet, RIGHTS)}",
        "",
        "# No message of the protocol is larger; 2.0 takes 256 MB by default.",
        f"message_size_limit {MAX_FRAME}",
        "# What is over is lost although it was acknowledged; devices send again, which costs.",
        f"max_queued_messages {queued}",
        f"max_queued_bytes {queued * 8192}",
        "# Each device once, the coordinator, an operator's tools, and those who reconnect.",
        f"max_connections {2 * fleet.devices + 100}",
        "# A board that sleeps longer than that begins a new session: nothing is lost by it.",
        "persistent_client_expiration 14d",
        "# A restart forgets what came since; offers and models are published again.",
        "autosave_interval 60",
        "# A receipt of few bytes must not wait for company.",
        "set_tcp_nodelay true",
        "# Nobody keeps a dead connection for longer.",
        "max_keepalive 3600",
    ]
    return "\n".join(lines) + "\n"


def rights(fleet: Fleet) -> str:
    """Return `fedge.acl`: a device writes below its own id, and reads what is for it."""
    me = "%c" if fleet.identity == "client" else "%u"
    lines = [
        "# Made by `fedge coordinator broker-config`.",
        f"user {fleet.coordinator}",
        f"topic write {PREFIX}/t/+/offer",
        f"topic write {PREFIX}/t/+/model/#",
        f"topic write {PREFIX}/t/+/dn/#",
        f"topic read {PREFIX}/t/+/up/#",
        f"topic read {PREFIX}/d/+/status",
        "",
        f"pattern write {PREFIX}/d/{me}/status",
        f"pattern write {PREFIX}/t/+/up/+/{me}/#",
        f"pattern read {PREFIX}/t/+/dn/{me}/#",
        f"pattern read {PREFIX}/t/+/offer",
        f"pattern read {PREFIX}/t/+/model/#",
    ]
    return "\n".join(lines) + "\n"


def _who(fleet: Fleet) -> list[str]:
    if fleet.identity == "certificate":
        return [
            f"cafile {_at(fleet, fleet.authority)}",
            "require_certificate true",
            "use_identity_as_username true",
        ]
    return [f"password_file {_at(fleet, fleet.passwords)}"]


def _at(fleet: Fleet, name: str) -> PurePosixPath:
    return fleet.folder / name
