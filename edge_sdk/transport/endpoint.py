# SPDX-License-Identifier: Apache-2.0
"""Where a broker is and how to prove ourselves to it: a URL, and secrets that are never printed."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from edge_sdk.errors import ConfigError

_VERSIONS = {"": 5, "mqtt=5": 5, "mqtt=3.1.1": 4}
_PORTS = {"mqtt": 1883, "mqtts": 8883}


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A broker's address and credentials; its text form leaves the credentials out."""

    host: str
    port: int
    tls: ssl.SSLContext | None = None
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    version: int = 5
    """The version of MQTT to begin with: 5, or 4 for 3.1.1."""

    @classmethod
    def parse(
        cls,
        url: str,
        *,
        ca_file: str | Path | None = None,
        username: str | None = None,
        password: str | None = None,
        password_file: str | Path | None = None,
    ) -> Endpoint:
        """Read `mqtt://[user[:password]@]host[:1883]` or `mqtts://host[:8883]`.

        With `?mqtt=3.1.1` MQTT 5 is not tried, for a broker that would not even refuse it.
        A user or password given by name wins over the URL's; the password's file holds one line.
        Raises: ConfigError when the URL or a file cannot be used.
        """
        scheme, host, port, in_url, version = _split(url)
        if scheme == "mqtt" and ca_file is not None:
            raise ConfigError(f"a CA file is for mqtts:// URLs, got {scheme}://{host}: use mqtts")
        if password_file is not None:
            password = _first_line(Path(password_file))
        username = in_url[0] if username is None else username
        if password is not None and username is None:
            raise ConfigError("a password needs a user name beside it: give both")
        return cls(
            host,
            port,
            _context(ca_file) if scheme == "mqtts" else None,
            username,
            in_url[1] if password is None else password,
            version,
        )

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'mqtts' if self.tls else 'mqtt'}://{host}:{self.port}"


def _split(url: str) -> tuple[str, str, int, tuple[str | None, str | None], int]:
    try:
        parts = urlsplit(url if "://" in url else f"mqtt://{url}")
        scheme, host, port = parts.scheme, parts.hostname, parts.port
    except ValueError as error:
        raise ConfigError(f"the broker's URL does not parse: {error}") from error
    if scheme not in _PORTS or not host or parts.path.strip("/"):
        raise ConfigError("expected a broker as mqtt://host[:port] or mqtts://host[:port]")
    if parts.query not in _VERSIONS:
        raise ConfigError("expected nothing or ?mqtt=3.1.1 after the broker's address")
    user, password = (unquote(s) if s else None for s in (parts.username, parts.password))
    return scheme, host, port or _PORTS[scheme], (user, password), _VERSIONS[parts.query]


def _first_line(file: Path) -> str:
    try:
        return file.read_text().partition("\n")[0].rstrip("\r")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the password in {file}: {error}") from error


class _Tidy(ssl.SSLSocket):
    """A socket that a failed handshake closes: paho would leave it to the garbage collector."""

    def do_handshake(self, block: bool = False) -> None:
        try:
            super().do_handshake(block)
        except BaseException:
            self.close()
            raise


def _context(ca_file: str | Path | None) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=ca_file and str(ca_file))
    except OSError as error:  # SSLError is one too
        raise ConfigError(f"cannot use the CA file {ca_file}: {error}") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.sslsocket_class = _Tidy
    return context
