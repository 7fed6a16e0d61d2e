"""The cluster's certificates: one authority for API clients and servers, one for the front proxy.

Promises: every certificate names what it is for and where it may be used; keys are readable by
their owner only.
Does not: renew; a test cluster is younger than its certificates.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

VALID = datetime.timedelta(days=30)


def _pem(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _write(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(descriptor, "wb") as out:
        out.write(content)


def _builder(
    subject: x509.Name, key: ec.EllipticCurvePrivateKey, valid: datetime.timedelta = VALID
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + valid)
    )


def _name(user: str, groups: tuple[str, ...] = ()) -> x509.Name:
    return x509.Name(
        [x509.NameAttribute(NameOID.ORGANIZATION_NAME, group) for group in groups]
        + [x509.NameAttribute(NameOID.COMMON_NAME, user)]
    )


@dataclass(frozen=True)
class Authority:
    """A certificate authority; its own files are ``NAME.crt`` and ``NAME.key``."""

    directory: Path
    name: str
    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @classmethod
    def create(cls, directory: Path, name: str) -> Authority:
        """A new authority, its files written."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = _name(name)
        usage = x509.KeyUsage(
            digital_signature=True,
            key_cert_sign=True,
            crl_sign=True,
            content_commitment=False,
            key_encipherment=False,
            data_encipherment=False,
            key_agreement=False,
            encipher_only=False,
            decipher_only=False,
        )
        certificate = (
            _builder(subject, key)
            .issuer_name(subject)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
            )
            .sign(key, hashes.SHA256())
        )
        authority = cls(directory, name, key, certificate)
        directory.mkdir(parents=True, exist_ok=True)
        _write(directory / f"{name}.key", _pem(key))
        _write(authority.path, certificate.public_bytes(serialization.Encoding.PEM))
        return authority

    @classmethod
    def load(cls, directory: Path, name: str) -> Authority:
        """The authority whose files are in ``directory``."""
        key = serialization.load_pem_private_key((directory / f"{name}.key").read_bytes(), None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise TypeError(f"{name}.key is no elliptic curve key")
        certificate = x509.load_pem_x509_certificate((directory / f"{name}.crt").read_bytes())
        return cls(directory, name, key, certificate)

    @property
    def path(self) -> Path:
        """The authority's certificate."""
        return self.directory / f"{self.name}.crt"

    def issue(
        self,
        file: str,
        user: str,
        *,
        groups: tuple[str, ...] = (),
        names: tuple[str, ...] = (),
        valid: datetime.timedelta = VALID,
    ) -> tuple[Path, Path]:
        """A certificate and its key, ``file.crt`` and ``file.key``: for clients, and with ``names``
        (DNS names and addresses) for servers too. A negative ``valid`` makes one that has expired.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        usages = [ExtendedKeyUsageOID.CLIENT_AUTH]
        builder = _builder(_name(user, groups), key, valid).issuer_name(self.certificate.subject)
        if names:
            usages.append(ExtendedKeyUsageOID.SERVER_AUTH)
            builder = builder.add_extension(
                x509.SubjectAlternativeName([_general(name) for name in names]), critical=False
            )
        certificate = (
            builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()),
                critical=False,
            )
            .sign(self.key, hashes.SHA256())
        )
        certificate_path = self.directory / f"{file}.crt"
        key_path = self.directory / f"{file}.key"
        _write(certificate_path, certificate.public_bytes(serialization.Encoding.PEM))
        _write(key_path, _pem(key))
        return certificate_path, key_path


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def create_signing_key(directory: Path, name: str) -> tuple[Path, Path]:
    """A key pair for ServiceAccount tokens: private ``name.key`` and public ``name.pub``."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    private, public = directory / f"{name}.key", directory / f"{name}.pub"
    _write(private, _pem(key))
    _write(
        public,
        key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        ),
    )
    return private, public
