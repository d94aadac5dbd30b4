# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest

from edge_sdk.errors import ConfigError
from edge_sdk.transport.endpoint import Endpoint


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("mqtt://hub", "mqtt://hub:1883"),
        ("hub", "mqtt://hub:1883"),
        ("hub:1884", "mqtt://hub:1884"),
        ("mqtts://hub", "mqtts://hub:8883"),
        ("mqtts://[::1]:9", "mqtts://[::1]:9"),
        ("mqtt://u:secret@hub/", "mqtt://hub:1883"),
    ],
)
def test_a_url_gives_the_address_and_hides_the_secrets(url: str, text: str) -> None:
    endpoint = Endpoint.parse(url)
    assert str(endpoint) == text
    assert "secret" not in repr(endpoint)


def test_credentials_come_from_the_url_by_name_or_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "pw").write_text("from file\n")
    in_url = Endpoint.parse("mqtt://us%40er:p%3Aw@hub")
    assert (in_url.username, in_url.password) == ("us@er", "p:w")
    named = Endpoint.parse("mqtt://a:b@hub", username="c", password="d")
    assert (named.username, named.password) == ("c", "d")
    filed = Endpoint.parse("mqtt://a:b@hub", password_file=tmp_path / "pw")
    assert (filed.username, filed.password) == ("a", "from file")
    assert (Endpoint.parse("mqtt://hub").username, Endpoint.parse("mqtt://hub").password) == (
        None,
        None,
    )


def test_a_version_can_be_asked_for() -> None:
    assert Endpoint.parse("mqtt://hub").version == 5
    assert Endpoint.parse("mqtt://hub:1?mqtt=3.1.1").version == 4


@pytest.mark.parametrize(
    ("url", "options", "why"),
    [
        ("http://hub", {}, "expected a broker as mqtt://"),
        ("mqtt://", {}, "expected a broker as mqtt://"),
        ("mqtt://hub/topic", {}, "expected a broker as mqtt://"),
        ("mqtt://hub:99999", {}, "does not parse"),
        ("mqtt://hub?mqtt=4", {}, r"expected nothing or \?mqtt=3.1.1"),
        ("mqtt://hub", {"ca_file": "ca.pem"}, "use mqtts"),
        ("mqtts://hub", {"ca_file": "/nowhere/ca.pem"}, "cannot use the CA file /nowhere/ca.pem"),
        ("mqtt://hub", {"password": "x"}, "a password needs a user name"),
        ("mqtt://u@hub", {"password_file": "/nowhere/pw"}, "cannot read the password"),
    ],
)
def test_what_cannot_be_used_is_refused_before_connecting(
    url: str, options: dict[str, str], why: str
) -> None:
    with pytest.raises(ConfigError, match=why):
        Endpoint.parse(url, **options)  # type: ignore[arg-type]  # a table of options


def test_a_ca_file_that_is_no_certificate_is_named(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("not a certificate")
    with pytest.raises(ConfigError, match=r"cannot use the CA file .*ca\.pem"):
        Endpoint.parse("mqtts://hub", ca_file=tmp_path / "ca.pem")
