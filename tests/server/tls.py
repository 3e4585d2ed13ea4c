"""Certificates and keys for tests, made by the `cryptography` library."""

import datetime
import ipaddress

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

DAY = datetime.timedelta(days=1)


class Authority:
    """A CA that writes PEM files into one directory: its own `ca.pem`, and `NAME.pem`, `NAME.key`."""

    def __init__(self, directory, name="test CA"):
        self._directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        certificate = self._sign(self._name, self._key, is_ca=True)
        self.ca = self._write(f"{name.split()[0]}-ca.pem", certificate, 0o644)

    def issue(self, name, address="127.0.0.1"):
        """(certificate file, key file) of a server at this address, or of a client."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        certificate = self._sign(subject, key, is_ca=False, address=address)
        pem = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        return (
            self._write(f"{name}.pem", certificate, 0o644),
            self._write_bytes(f"{name}.key", pem, 0o600),
        )

    def _sign(self, subject, key, *, is_ca, address=None):
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - DAY)
            .not_valid_after(now + DAY)
            .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
        )
        if address:
            names = [x509.IPAddress(ipaddress.ip_address(address)), x509.DNSName("localhost")]
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(self._key, hashes.SHA256())

    def _write(self, name, certificate, mode):
        return self._write_bytes(name, certificate.public_bytes(serialization.Encoding.PEM), mode)

    def _write_bytes(self, name, content, mode):
        path = self._directory / name
        path.write_bytes(content)
        path.chmod(mode)
        return path
