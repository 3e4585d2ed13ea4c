"""The server's TLS certificate as it is on disk: new connections get the one that is there by then.

Certificates are replaced every few weeks, requests and streams come all the time: a server that had to
be started again for it would be started again for nothing.
"""

import logging
import os
import ssl
import threading
from typing import Any, NamedTuple

import grpc

from cluster.config import ConfigError
from cluster.server.secret_files import read_file, read_secret

logger = logging.getLogger(__name__)


class TlsFiles(NamedTuple):
    """Paths of PEM files: a chain, its key, and the authorities of clients (None: all are let in)."""

    cert: str
    key: str
    client_ca: str | None


class Certificate(NamedTuple):
    """What the files held at one time, read and found to belong together."""

    cert: bytes
    key: bytes
    client_ca: bytes | None
    context: ssl.SSLContext


def read_certificate(files: TlsFiles) -> Certificate:
    """Checked as the TLS library will use it: certificate and key belong together. Raises ConfigError."""
    cert, key, client_ca = files
    contents = read_file("tls_cert_file", cert), read_secret("tls_key_file", key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # A key with a passphrase would make the library ask for it on the terminal.
        context.load_cert_chain(cert, key, password="")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"server.tls_cert_file = {cert!r}, server.tls_key_file = {key!r}: no PEM certificate "
            f"with its unencrypted key: {error}"
        ) from None
    if client_ca is None:
        return Certificate(*contents, None, context)
    authorities = read_file("tls_client_ca_file", client_ca)
    try:
        context.load_verify_locations(client_ca)
    except OSError as error:
        raise ConfigError(
            f"server.tls_client_ca_file = {client_ca!r}: no PEM certificates: {error}"
        ) from None
    context.verify_mode = ssl.CERT_REQUIRED
    return Certificate(*contents, authorities, context)


class CertificateOnDisk:
    """`current` may be asked for each connection, by any thread: files that did not change are not read.

    Raises ConfigError if there is no usable certificate to begin with. Later one that cannot be used,
    as when only one of its files has been replaced yet, leaves the one before in force.
    """

    def __init__(self, files: TlsFiles) -> None:
        self._files = files
        self._lock = threading.Lock()
        self._seen: object = self._look()
        self._certificate = read_certificate(files)

    def current(self) -> Certificate:
        """The same object until the files change."""
        with self._lock:
            seen = self._look()
            if seen != self._seen:
                self._take(seen)
            return self._certificate

    def _take(self, seen: object) -> None:
        try:
            certificate = read_certificate(self._files)
        except ConfigError as error:
            logger.warning("the TLS certificate before stays in use: %s", error)
        else:
            if self._look() != seen:
                return  # written to while we read: the next connection will look again
            self._certificate = certificate
            logger.info("new connections get the TLS certificate that is in %s now", self._files[0])
        self._seen = seen

    def _look(self) -> list[object]:
        """Something that differs once a file was written or another one took its place."""
        return [_state(path) for path in self._files if path is not None]


class CurrentContext(ssl.SSLContext):
    """For asyncio, which keeps the one context that it began to listen with: each new connection is
    wrapped by the context of the certificate that is on disk by then."""

    _on_disk: CertificateOnDisk

    def __new__(cls, on_disk: CertificateOnDisk) -> "CurrentContext":
        context = super().__new__(cls, ssl.PROTOCOL_TLS_SERVER)
        context._on_disk = on_disk
        return context

    def wrap_bio(self, *arguments: Any, **options: Any) -> ssl.SSLObject:
        return self._on_disk.current().context.wrap_bio(*arguments, **options)


def grpc_credentials(on_disk: CertificateOnDisk) -> grpc.ServerCredentials:
    """Which gRPC asks for a new certificate before each handshake."""
    given = on_disk.current()

    def newer() -> grpc.ServerCertificateConfiguration | None:
        nonlocal given
        current = on_disk.current()
        if current is given:
            return None
        given = current
        return _for_grpc(current)

    return grpc.dynamic_ssl_server_credentials(
        _for_grpc(given),
        newer,  # type: ignore[arg-type]  # None is as good, whatever the stubs say
        require_client_authentication=given.client_ca is not None,
    )


def _for_grpc(certificate: Certificate) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration(
        [(certificate.key, certificate.cert)], root_certificates=certificate.client_ca
    )


def _state(path: str) -> object:
    try:
        found = os.stat(path)
    except OSError as error:
        return error.errno
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
