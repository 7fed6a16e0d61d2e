"""The project's own certificate authority: making, writing and reading certificates and keys.

Promises: keys are made here, ECDSA on P-256, and shown in no message; a certificate for servers
is good for the names given and for servers only, since whoever held one that is good for clients
could call an agent as anybody; an authority signs certificates, but no further authorities.
Does not: decide when (``rotation.py``), or store anything (``keeper.py``).
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Sequence

from cryptography import exceptions, x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from agent.admission.rotation import BACKDATE_S, Issued

_ORGANIZATION = "ckpt-agent"


@dataclasses.dataclass(frozen=True)
class Pair:
    """A certificate and its key, both as PEM. ``key`` is empty where only the certificate is
    known.
    """

    certificate: bytes
    key: bytes = dataclasses.field(default=b"", repr=False)

    @property
    def issued(self) -> Issued:
        """Its times and identities."""
        found = x509.load_pem_x509_certificate(self.certificate)
        return Issued(
            identity=_identity(found),
            made_s=found.not_valid_before_utc.timestamp() + BACKDATE_S,
            not_after_s=found.not_valid_after_utc.timestamp(),
            signer=_signer(found),
        )


def new_authority(now_s: float, lifetime_s: float) -> Pair:
    """Return a new authority that is good from now on."""
    key = ec.generate_private_key(ec.SECP256R1())
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    # A name of its own for each: clients then never try the wrong one of two.
    name = _name(f"{_ORGANIZATION} CA {identifier.digest.hex()[:8]}")
    certificate = (
        _builder(name, name, key, now_s, now_s + lifetime_s)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(identifier, critical=False)
        .sign(key, hashes.SHA256())
    )
    return _pair(certificate, key)


def new_leaf(authority: Pair, names: Sequence[str], now_s: float, lifetime_s: float) -> Pair:
    """Return a certificate for a server called ``names`` (DNS names), signed by ``authority``;
    it ends no later than that one.
    """
    signer = x509.load_pem_x509_certificate(authority.certificate)
    signing_key = _load_key(authority.key)
    key = ec.generate_private_key(ec.SECP256R1())
    not_after_s = min(now_s + lifetime_s, signer.not_valid_after_utc.timestamp())
    certificate = (
        _builder(_name(names[0]), signer.subject, key, now_s, not_after_s)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(
            x509.SubjectAlternativeName([x509.DNSName(name) for name in names]), critical=False
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signing_key.public_key()),
            critical=False,
        )
        .sign(signing_key, hashes.SHA256())
    )
    return _pair(certificate, key)


def read_authority(certificate: bytes, key: bytes) -> Pair | None:
    """Return the authority in these PEM texts; None if they hold none or do not fit together."""
    try:
        found = x509.load_pem_x509_certificate(certificate)
        constraints = found.extensions.get_extension_for_class(x509.BasicConstraints).value
        if not constraints.ca or _load_key(key).public_key() != found.public_key():
            return None
        return _pair(found, _load_key(key))
    except (ValueError, TypeError, exceptions.UnsupportedAlgorithm, x509.ExtensionNotFound):
        return None


def read_leaf(
    certificate: bytes, key: bytes, names: Sequence[str], authorities: Sequence[Pair] | None
) -> Pair | None:
    """Return the server certificate in these PEM texts; None if they hold none, do not fit
    together, are for other names, or none of ``authorities`` (None: whoever) signed it.
    """
    try:
        found = x509.load_pem_x509_certificate(certificate)
        for_names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        if set(for_names.get_values_for_type(x509.DNSName)) != set(names):
            return None
        if _load_key(key).public_key() != found.public_key():
            return None
        if authorities is not None and not any(_signed(found, each) for each in authorities):
            return None
        return _pair(found, _load_key(key))
    except (ValueError, TypeError, exceptions.UnsupportedAlgorithm, x509.ExtensionNotFound):
        return None


def read_bundle(text: bytes) -> tuple[Pair, ...]:
    """Return the certificates in a PEM text, without keys; none if it cannot be read."""
    try:
        found = x509.load_pem_x509_certificates(text) if text.strip() else []
        return tuple(Pair(each.public_bytes(serialization.Encoding.PEM)) for each in found)
    except ValueError:
        return ()


def bundle(pairs: Sequence[Pair]) -> bytes:
    """The certificates of ``pairs`` as one PEM text."""
    return b"".join(pair.certificate for pair in pairs)


def _signed(found: x509.Certificate, authority: Pair) -> bool:
    try:
        found.verify_directly_issued_by(x509.load_pem_x509_certificate(authority.certificate))
    except (ValueError, TypeError, exceptions.InvalidSignature):
        return False
    return True


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    now_s: float,
    not_after_s: float,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_moment(now_s - BACKDATE_S))
        .not_valid_after(_moment(not_after_s))
    )


def _moment(seconds: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(int(seconds), datetime.UTC)


def _name(common: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, _ORGANIZATION),
            # RFC 5280 allows 64 characters.
            x509.NameAttribute(NameOID.COMMON_NAME, common[:64]),
        ]
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _pair(certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> Pair:
    return Pair(
        certificate.public_bytes(serialization.Encoding.PEM),
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ),
    )


def _load_key(text: bytes) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_pem_private_key(text, password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise TypeError("not a key of an elliptic curve")
    return key


def _identity(found: x509.Certificate) -> str:
    value = x509.SubjectKeyIdentifier.from_public_key(found.public_key())
    return value.digest.hex()


def _signer(found: x509.Certificate) -> str:
    try:
        extension = found.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier)
    except x509.ExtensionNotFound:
        return _identity(found)
    return (extension.value.key_identifier or b"").hex()
