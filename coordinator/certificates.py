# SPDX-License-Identifier: Apache-2.0
"""An authority of one's own and what it signs: enough for TLS between a fleet and its broker.

X.509 v3 with P-256 keys (RFC 5280). Bytes in, bytes out; who may have them is the caller's care.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self, cast

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from edge_sdk.errors import ConfigError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPrivateKeyTypes

AUTHORITY_DAYS = 20 * 365
BROKER_DAYS = 2 * 365
EARLY = dt.timedelta(days=1)
"""A board whose clock is behind by a day still believes a certificate made today."""


@dataclass(frozen=True, slots=True)
class Issued:
    """A certificate and its private key, both PEM."""

    certificate: bytes
    key: bytes

    @classmethod
    def of(cls, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> Self:
        """Return them as PEM."""
        return cls(
            certificate.public_bytes(serialization.Encoding.PEM),
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            ),
        )


def authority(name: str, now: dt.datetime, days: int = AUTHORITY_DAYS) -> Issued:
    """Make an authority that signs itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    made = _draft(name, name, key, now, days)
    made = made.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    made = made.add_extension(_usage(signs=True), critical=True)
    return Issued.of(made.sign(key, hashes.SHA256()), key)


def broker(
    issuer: Issued, hosts: Sequence[str], now: dt.datetime, days: int = BROKER_DAYS
) -> Issued:
    """Make the certificate of a broker that is reached by `hosts`, names or addresses.

    Raises: ConfigError without hosts, or when the authority's files are not what they should be.
    """
    if not hosts:
        raise ConfigError("expected the names or addresses that devices reach the broker by")
    found, signing = _opened(issuer)
    key = ec.generate_private_key(ec.SECP256R1())
    made = _draft(hosts[0], _name_of(found), key, now, days)
    names = x509.SubjectAlternativeName([_host(host) for host in hosts])
    made = made.add_extension(names, critical=False)
    made = made.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    made = made.add_extension(_usage(signs=False), critical=True)
    serves = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
    made = made.add_extension(serves, critical=False)
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(found.public_key())  # type: ignore[arg-type]  # ours are of P-256
    made = made.add_extension(identifier, critical=False)
    return Issued.of(made.sign(signing, hashes.SHA256()), key)


def _opened(issuer: Issued) -> tuple[x509.Certificate, CertificateIssuerPrivateKeyTypes]:
    try:
        key = serialization.load_pem_private_key(issuer.key, None)
        found = x509.load_pem_x509_certificate(issuer.certificate)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"expected the certificate and key of an authority: {error}") from error
    if found.public_key() != key.public_key():
        raise ConfigError("the authority's key is not that of its certificate")
    return found, cast("CertificateIssuerPrivateKeyTypes", key)


def _name_of(certificate: x509.Certificate) -> str:
    return str(certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)


def _draft(
    name: str, issuer: str, key: ec.EllipticCurvePrivateKey, now: dt.datetime, days: int
) -> x509.CertificateBuilder:
    made = x509.CertificateBuilder()
    made = made.subject_name(_named(name)).issuer_name(_named(issuer))
    made = made.public_key(key.public_key()).serial_number(x509.random_serial_number())
    made = made.not_valid_before(now - EARLY).not_valid_after(now + dt.timedelta(days=days))
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    return made.add_extension(identifier, critical=False)


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )
