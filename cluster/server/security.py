"""Who may call this server: tokens, TLS, and the refusal to listen to strangers without both.

Every token counts for user calls, admin tokens for admin calls too; without `admin_token_file` admin
calls are for loopback clients. Health checks and reflection need no token: probes have none, and
neither tells more than that we are here and what the published .proto files say.
"""

import hashlib
import hmac
import ipaddress
import ssl
from dataclasses import dataclass

import grpc

from cluster.config import ConfigError, ServerConfig
from cluster.server.certificate import (
    CertificateOnDisk,
    CurrentContext,
    TlsFiles,
    grpc_credentials,
    read_certificate,
)
from cluster.server.errors import Code, RequestError
from cluster.server.secret_files import read_secret


@dataclass(frozen=True)
class Credentials:
    """What `server` of the configuration says of tokens and TLS, read and checked.

    tokens: digests of all that are let in; empty: everybody is. admin_tokens: those of admins; empty:
    admins come from loopback. Digests are alike long, so comparing them tells nothing by its time.
    """

    tokens: tuple[bytes, ...] = ()
    admin_tokens: tuple[bytes, ...] = ()
    tls_files: TlsFiles | None = None

    @staticmethod
    def load(config: ServerConfig) -> "Credentials":
        """Read the files; raises ConfigError for those that cannot be used, and where strangers
        could reach a server that has no TLS or no token."""
        users = _read_tokens("token_file", config.token_file)
        admins = _read_tokens("admin_token_file", config.admin_token_file)
        credentials = Credentials(
            tokens=(*users, *admins) if users else (),
            admin_tokens=admins,
            tls_files=_read_tls(config),
        )
        if not is_loopback(config.host):
            credentials._refuse_strangers(config.host)
        return credentials

    @property
    def grpc(self) -> grpc.ServerCredentials | None:
        """None: plain text."""
        if self.tls_files is None:
            return None
        return grpc_credentials(CertificateOnDisk(self.tls_files))

    @property
    def ssl_context(self) -> ssl.SSLContext | None:
        """For servers of asyncio; None: plain text."""
        return CurrentContext(CertificateOnDisk(self.tls_files)) if self.tls_files else None

    def check_user(self, authorization: str | bytes | None) -> None:
        """`authorization` is what the client sent in metadata or header of that name."""
        if self.tokens and not _is_one_of(authorization, self.tokens):
            raise RequestError(
                Code.UNAUTHENTICATED, "`authorization: Bearer <token>` is required with each call"
            )

    def check_admin(self, authorization: str | bytes | None, peer_is_loopback: bool) -> None:
        if self.admin_tokens:
            if not _is_one_of(authorization, self.admin_tokens):
                raise RequestError(
                    Code.UNAUTHENTICATED,
                    "`authorization: Bearer <admin token>` is required with this call",
                )
        elif not peer_is_loopback:
            raise RequestError(
                Code.PERMISSION_DENIED,
                "without server.admin_token_file this call is for loopback clients only",
            )

    def _refuse_strangers(self, host: str) -> None:
        missing = []
        if self.tls_files is None:
            missing.append("server.tls_cert_file and server.tls_key_file")
        if not self.tokens:
            missing.append("server.token_file")
        if missing:
            raise ConfigError(
                f"server.host = {host!r}: other hosts could reach this server, so it needs TLS and "
                f"a token: set {' and '.join(missing)} (`expertmesh credentials DIR` makes them), "
                "or listen on 127.0.0.1"
            )


EVERYBODY = Credentials()
"""No tokens and no TLS: for servers on loopback."""


def is_loopback(host: str) -> bool:
    """Of an address as configured or as a peer has it. Names other than localhost count as not."""
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return host == "localhost"
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def _is_one_of(authorization: str | bytes | None, digests: tuple[bytes, ...]) -> bool:
    """Compares with all of them, so that time does not tell which one was close."""
    sent = authorization or b""
    scheme, _, token = (sent if isinstance(sent, bytes) else sent.encode()).partition(b" ")
    digest = _digest(token.strip())
    found = [hmac.compare_digest(digest, known) for known in digests]
    return scheme.lower() == b"bearer" and any(found)


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()


def _read_tokens(option: str, path: str | None) -> tuple[bytes, ...]:
    if path is None:
        return ()
    tokens = [line.strip() for line in read_secret(option, path).splitlines() if line.strip()]
    if not tokens:
        raise ConfigError(f"server.{option} = {path!r}: the file holds no token")
    for number, token in enumerate(tokens, 1):
        if b" " in token or not token.isascii() or not token.decode("ascii").isprintable():
            raise ConfigError(
                f"server.{option} = {path!r}: token {number} must be printable ASCII without spaces"
            )
    return tuple(_digest(token) for token in tokens)


def _read_tls(config: ServerConfig) -> TlsFiles | None:
    """Their names, once they have been read and checked."""
    cert, key, client_ca = config.tls_cert_file, config.tls_key_file, config.tls_client_ca_file
    if cert is None or key is None:
        alone = [n for n in ("cert", "key", "client_ca") if getattr(config, f"tls_{n}_file")]
        if alone:
            raise ConfigError(
                f"server.tls_{alone[0]}_file: TLS needs server.tls_cert_file and "
                "server.tls_key_file, both"
            )
        return None
    files = TlsFiles(cert, key, client_ca)
    read_certificate(files)
    return files
