# SPDX-License-Identifier: Apache-2.0
"""One MQTT connection over paho, from CONNECT to its end; whoever drives it owns the waiting.

The device drives it from a thread, the coordinator from asyncio: both wait on `socket`, then call
`read`, `write` and `tick`. Knows both generations of paho's callbacks (1.6 and 2). A link is used
once: what was under way when it ended is its driver's to send again, so nothing is sent behind
anyone's back. Not thread-safe.
"""

from __future__ import annotations

import socket as net
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import paho.mqtt.client as paho
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from edge_sdk.transport.endpoint import Endpoint
from edge_sdk.transport.redial import Cause, LinkError

MAX_FILTERS = 8  # in one SUBSCRIBE; the smallest cloud broker's limit
PACKET_ROOM = 4096  # topic and properties, beside the largest payload
_FROM_3_1_1 = {1: 132, 2: 133, 3: 136, 4: 134, 5: 135}  # CONNACK codes, as MQTT 5 numbers them
_VERSION, _BAD_LOGIN, _NOT_ALLOWED, _TAKEN_OVER = 132, 134, 135, 142
_AUTH = (_BAD_LOGIN, _NOT_ALLOWED, 138)
_REASONS = {
    133: "the client id is not acceptable",
    136: "it is not available",
    137: "it is busy",
    139: "it is shutting down",
    141: "we were silent for too long",
    _TAKEN_OVER: "another connection took over this client id",
    149: "a packet was too large for it",
    151: "a quota is used up",
    159: "it allows no more connections at this rate",
}
_OUT_OF_TIME = {  # by OpenSSL's codes, X509_V_ERR_CERT_NOT_YET_VALID and _HAS_EXPIRED
    9: "is not yet valid by this machine's clock: set the clock, or let NTP do it",
    10: "has expired by this machine's clock: renew it, or set the clock",
}
try:
    from paho.mqtt import enums as _enums
except ImportError:  # paho 1.6, as in Debian 12
    _HAS_V2 = False
else:
    _HAS_V2 = True


class Sink(NamedTuple):
    """What a driver is told, always from within its own call to `read`, `write` or `tick`."""

    on_up: Callable[[], None]
    on_message: Callable[[str, bytes, int], None]
    """Topic, payload, and the number to `ack`."""
    on_acked: Callable[[int, str | None], None]
    """The number of a publish or subscribe, and why the broker refused it if it did."""


@dataclass(frozen=True, slots=True)
class Hello:
    """What a client says of itself when it connects."""

    client_id: str
    will: tuple[str, bytes] | None = None
    keepalive_s: int = 30
    session_s: int = 86_400
    receive_maximum: int = 20
    manual_ack: bool = False
    clean: bool = False
    max_payload: int = 120_000


class Link:
    """One connection. `open` blocks for the handshake; the rest never blocks."""

    def __init__(self, endpoint: Endpoint, hello: Hello, version: int, sink: Sink) -> None:
        self.endpoint, self.hello, self.version = endpoint, hello, version
        self.is_up = False
        self.error: LinkError | None = None
        """Why the link ended; None while it stands, or after our own `close`."""
        self.on_close: Callable[[int], object] = lambda _fd: None
        """Called with the socket's number just before it is closed: stop waiting on it."""
        self.server_window = 65_535
        self.server_packet = 2**28
        self._sink = sink
        self._client = self._make_client()

    def open(self) -> None:
        """Connect, shake hands and send CONNECT; `on_up` follows when the broker has answered.

        Raises: LinkError, which says what to do.
        """
        extra = {}
        if self.version == 5:
            extra = {"clean_start": self.hello.clean, "properties": self._connect_properties()}
        try:
            self._client.connect(
                self.endpoint.host, self.endpoint.port, self.hello.keepalive_s, **extra
            )
        except (OSError, ValueError) as error:
            raise _explained(error, self.endpoint) from error
        if (sock := self.socket) is not None:  # else an answer waits for the peer's delayed ACK
            sock.setsockopt(net.IPPROTO_TCP, net.TCP_NODELAY, 1)

    @property
    def socket(self) -> net.socket | None:
        """The socket to wait on; None when the link is down."""
        found: net.socket | None = self._client.socket()
        return found if found is not None and found.fileno() >= 0 else None

    @property
    def wants_write(self) -> bool:
        """Whether bytes wait for the socket to take them."""
        return bool(self._client.want_write())

    def read(self) -> None:
        """Take in what the socket holds."""
        self._do(self._client.loop_read)
        while isinstance(sock := self.socket, ssl.SSLSocket) and sock.pending():
            self._do(self._client.loop_read)

    def write(self) -> None:
        """Give the socket what it takes."""
        self._do(self._client.loop_write)

    def tick(self) -> None:
        """See to keepalive; a few times in each keepalive period is enough."""
        self._do(self._client.loop_misc)

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> int:
        """Send with QoS 1; return the number that `on_acked` will name."""
        return int(self._client.publish(topic, payload, qos=1, retain=retain).mid)

    def subscribe(self, filters: list[str]) -> list[int]:
        """Ask for topic filters; each number returned is acknowledged through `on_acked`."""
        cuts = (filters[i : i + MAX_FILTERS] for i in range(0, len(filters), MAX_FILTERS))
        return [int(self._client.subscribe([(f, 1) for f in cut])[1] or 0) for cut in cuts]

    def unsubscribe(self, filters: list[str]) -> None:
        """Drop topic filters."""
        for i in range(0, len(filters), MAX_FILTERS):
            self._client.unsubscribe(filters[i : i + MAX_FILTERS])

    def ack(self, mid: int) -> None:
        """Acknowledge a message, where `Hello.manual_ack` left that to us."""
        if self.socket is not None:
            self._client.ack(mid, 1)

    def close(self) -> None:
        """Say goodbye and close, discarding the will."""
        self.is_up = False
        if self.socket is not None:
            self._client.disconnect()
            self._client.loop_write()
        self._shut()

    def fail(self, message: str, cause: Cause) -> None:
        """End the link for a reason that the driver found."""
        self.error = self.error or LinkError(message, cause)
        self.is_up = False
        self._shut()

    def _shut(self) -> None:
        if (sock := self.socket) is not None:
            self.on_close(sock.fileno())
            sock.close()

    def _do(self, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:  # noqa: BLE001 - paho meets bad packets with all sorts of them
            self.fail(f"{self.endpoint} sent what is not MQTT ({error!r:.80})", "lost")
        if self.socket is None and self.error is None:
            self.fail(*self._why_closed())

    def _why_closed(self) -> tuple[str, Cause]:
        if self.is_up:
            return f"the connection to {self.endpoint} was lost", "lost"
        hint = "is it a TLS port? then use mqtts://" if self.endpoint.tls is None else "is it MQTT?"
        return f"{self.endpoint} hung up without an answer: {hint}", "silent"

    # --- paho's side --------------------------------------------------------------------------
    def _make_client(self) -> Any:
        options: dict[str, Any] = {
            "client_id": self.hello.client_id,
            "protocol": paho.MQTTv5 if self.version == 5 else paho.MQTTv311,
            "reconnect_on_failure": False,
        }
        if self.version != 5:
            options["clean_session"] = self.hello.clean
        if _HAS_V2:
            options["callback_api_version"] = _enums.CallbackAPIVersion.VERSION2
            options["manual_ack"] = self.hello.manual_ack
        client: Any = paho.Client(**options)
        client.max_inflight_messages_set(65_535)  # the driver has a window of its own
        client.on_connect, client.on_disconnect = self._connected, self._disconnected
        client.on_message, client.on_publish = self._message, self._acked
        client.on_subscribe, client.on_socket_close = self._subscribed, self._closing
        if self.endpoint.tls is not None:
            client.tls_set_context(self.endpoint.tls)
        if self.endpoint.username is not None:
            client.username_pw_set(self.endpoint.username, self.endpoint.password)
        if self.hello.will is not None:
            client.will_set(*self.hello.will, qos=1, retain=True)
        return client

    def _connect_properties(self) -> Any:
        make: Any = Properties
        properties = make(PacketTypes.CONNECT)
        properties.SessionExpiryInterval = 0 if self.hello.clean else self.hello.session_s
        properties.ReceiveMaximum = self.hello.receive_maximum
        properties.MaximumPacketSize = self.hello.max_payload + PACKET_ROOM
        return properties

    def _closing(self, _: object, __: object, sock: net.socket) -> None:
        if sock.fileno() >= 0:
            self.on_close(sock.fileno())

    def _connected(self, _: object, __: object, ___: object, code: Any, *rest: Any) -> None:
        number = _number(code)
        if number != 0:
            self.error = _refusal(_FROM_3_1_1.get(number, number), self.endpoint)
            return
        self._take_limits(rest[0] if rest else None)
        self.is_up = True
        self._sink.on_up()

    def _take_limits(self, properties: Any) -> None:
        self.server_window = getattr(properties, "ReceiveMaximum", self.server_window)
        self.server_packet = getattr(properties, "MaximumPacketSize", self.server_packet)

    def _disconnected(self, _: object, __: object, *rest: Any) -> None:
        code = rest[1] if _HAS_V2 else rest[0]  # v1: (code[, properties]); v2: (flags, code, ..)
        told = rest[0].is_disconnect_packet_from_server if _HAS_V2 else hasattr(code, "value")
        number = _number(code) if told else 0
        if self.is_up and number in _REASONS and self.error is None:
            why = _REASONS[number]
            self.error = LinkError(f"{self.endpoint} ended the connection: {why}", "lost")

    def _message(self, _: object, __: object, message: Any) -> None:
        self._sink.on_message(message.topic, bytes(message.payload), int(message.mid))

    def _acked(self, _: object, __: object, mid: int, code: Any = 0, *___: Any) -> None:
        failed = _number(code) >= 128
        self._sink.on_acked(mid, f"the broker refused a message: {code}" if failed else None)

    def _subscribed(self, _: object, __: object, mid: int, codes: Any, *___: Any) -> None:
        failed = any(_number(code) >= 128 for code in codes)
        why = "the broker refused a subscription: does its access list allow it?"
        self._sink.on_acked(mid, why if failed else None)


def _number(code: Any) -> int:
    return int(getattr(code, "value", code))


def _refusal(number: int, endpoint: Endpoint) -> LinkError:
    if number == _VERSION:
        return LinkError(f"{endpoint} does not speak this version of MQTT", "version")
    if number in _AUTH and endpoint.username:
        why = "does not accept our user name and password: correct them"
        return LinkError(f"{endpoint} {why}", "auth")
    if number in _AUTH:
        why = "does not let us in without a user name and a password: give them"
        return LinkError(f"{endpoint} {why}", "auth")
    why = _REASONS.get(number, f"reason {number}")
    return LinkError(f"{endpoint} refused the connection: {why}", "refused")


def _explained(error: Exception, endpoint: Endpoint) -> LinkError:
    if isinstance(error, ssl.SSLCertVerificationError):
        why = _OUT_OF_TIME.get(error.verify_code) or (
            f"is not to be trusted ({error.verify_message or error.reason}):"
            " give the file of its CA as ca_file, and the host name that it was made for"
        )
        return LinkError(f"the certificate of {endpoint} {why}", "tls")
    hung_up = isinstance(error, ConnectionResetError | BrokenPipeError | ssl.SSLEOFError)
    if isinstance(error, ssl.SSLError) or (hung_up and endpoint.tls):
        why = "is it a TLS port? mqtt:// has none"
        return LinkError(f"no TLS with {endpoint} ({_reason(error)}): {why}", "tls")
    if isinstance(error, net.gaierror):
        return LinkError(f"the name {endpoint.host} does not resolve: correct the URL", "absent")
    if isinstance(error, TimeoutError):
        return LinkError(
            f"{endpoint} does not answer: is it up, and no firewall between?", "absent"
        )
    if isinstance(error, ConnectionRefusedError):
        return LinkError(f"no broker listens at {endpoint}: start it or correct the URL", "absent")
    return LinkError(f"cannot reach {endpoint}: {_reason(error)}", "absent")


def _reason(error: Exception) -> str:
    return str(getattr(error, "reason", None) or getattr(error, "strerror", None) or error)
