"""`expertmesh credentials`: all that a server beyond loopback, and its clients, need to trust each other.

An authority of its own signs one certificate for the server and one for clients. The authority's key is
written too, to sign more of them, and belongs nowhere else. Nothing that exists is overwritten.
"""

import datetime
import ipaddress
import os
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_TOKEN_BYTES = 32
_HERE = ("localhost", "127.0.0.1", "::1")
_FILES = (
    "ca.pem", "ca.key", "server.pem", "server.key", "client.pem", "client.key", "token", "admin-token"
)  # fmt: skip


def credentials_command(directory: Path, hosts: Sequence[str], days: int) -> int:
    """Write everything and print how to use it; 2 if that would overwrite or cannot be written."""
    try:
        write_credentials(directory, hosts, days)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    print(_advice(directory.resolve()))
    return 0


def write_credentials(directory: Path, hosts: Sequence[str], days: int) -> None:
    """Certificates for a server that is reached as any of `hosts`, names or addresses, or on loopback."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    existing = [name for name in _FILES if (directory / name).exists()]
    if existing:
        raise ValueError(
            f"{directory / existing[0]} exists: choose another directory, or remove it"
        )
    authority = _Authority(days)
    named = [_general_name(host) for host in dict.fromkeys((*hosts, *_HERE))]
    server, client = (
        authority.issue("expertmesh server", ExtendedKeyUsageOID.SERVER_AUTH, named),
        authority.issue("expertmesh client", ExtendedKeyUsageOID.CLIENT_AUTH),
    )
    secret = {
        "ca.key": _pem_of_key(authority.key),
        "server.key": server[1],
        "client.key": client[1],
        "token": secrets.token_urlsafe(_TOKEN_BYTES).encode() + b"\n",
        "admin-token": secrets.token_urlsafe(_TOKEN_BYTES).encode() + b"\n",
    }
    public = {"ca.pem": authority.pem, "server.pem": server[0], "client.pem": client[0]}
    for name, content in (secret | public).items():
        _write(directory / name, content, 0o600 if name in secret else 0o644)


class _Authority:
    def __init__(self, days: int) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name("expertmesh authority")
        self._days = days
        usage = x509.KeyUsage(
            digital_signature=False,
            content_commitment=False,
            key_encipherment=False,
            data_encipherment=False,
            key_agreement=False,
            key_cert_sign=True,
            crl_sign=True,
            encipher_only=False,
            decipher_only=False,
        )
        builder = self._builder(self._name, self.key.public_key()).add_extension(
            x509.BasicConstraints(ca=True, path_length=0), critical=True
        )
        self.pem = self._sign(builder.add_extension(usage, critical=True))

    def issue(
        self,
        name: str,
        purpose: x509.ObjectIdentifier,
        reached_as: Sequence[x509.GeneralName] = (),
    ) -> tuple[bytes, bytes]:
        """(certificate, key) as PEM."""
        key = ec.generate_private_key(ec.SECP256R1())
        builder = (
            self._builder(_name(name), key.public_key())
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        )
        if reached_as:
            builder = builder.add_extension(x509.SubjectAlternativeName(reached_as), critical=False)
        return self._sign(builder), _pem_of_key(key)

    def _builder(
        self, subject: x509.Name, key: ec.EllipticCurvePublicKey
    ) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))  # clocks differ
            .not_valid_after(now + datetime.timedelta(days=self._days))
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(authority, critical=False)
        )

    def _sign(self, builder: x509.CertificateBuilder) -> bytes:
        return builder.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    if not host.isascii() or not host or any(c.isspace() or c in ":/" for c in host):
        raise ValueError(f"--hosts {host!r}: must be a name or an address, without a port")
    return x509.DNSName(host)


def _pem_of_key(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _write(path: Path, content: bytes, mode: int) -> None:
    """Never readable by others, not even for a moment, and never over another file."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)


def _advice(directory: Path) -> str:
    return f"""\
wrote {directory}

In the server's configuration (with host: 0.0.0.0 other hosts reach it):
  server:
    tls_cert_file: {directory}/server.pem
    tls_key_file: {directory}/server.key
    token_file: {directory}/token
    admin_token_file: {directory}/admin-token
    # Only clients with a certificate, too:
    # tls_client_ca_file: {directory}/ca.pem

For clients, which need copies of ca.pem and of a token:
  export EXPERTMESH_CA_FILE={directory}/ca.pem
  export EXPERTMESH_TOKEN_FILE={directory}/token
  # And where the server wants certificates:
  # export EXPERTMESH_CERT_FILE={directory}/client.pem
  # export EXPERTMESH_KEY_FILE={directory}/client.key

Whoever has ca.key can make certificates that all of these believe: keep it elsewhere."""
