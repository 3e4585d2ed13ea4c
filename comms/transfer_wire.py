"""What a transfer says on the wire.

One connection carries one request:

    server:  nonce (16)
    client:  nonce (16) | proof (32) | layer (4) | slot (4)
    server:  proof (32) | bytes in all (8; 0: that slot holds nothing) | chunks
    chunk:   length (4) | CRC-32 of the payload (4) | payload

A proof is an HMAC of both nonces under the secret that all ranks share: nothing is served to, nor
taken from, anyone who does not know it.
"""

import hmac
import secrets
import socket
import struct

PROOF_BYTES = 32
NONCE_BYTES = 16
REQUEST = struct.Struct(f"<{NONCE_BYTES}s{PROOF_BYTES}sII")
ANSWER = struct.Struct(f"<{PROOF_BYTES}sQ")
CHUNK = struct.Struct("<II")
FETCH, SERVE = b"fetch", b"serve"


def new_nonce() -> bytes:
    return secrets.token_bytes(NONCE_BYTES)


def prove(secret: bytes, role: bytes, server_nonce: bytes, client_nonce: bytes) -> bytes:
    """What only one who knows the secret can say, in this role and on this connection."""
    return hmac.digest(secret, role + server_nonce + client_nonce, "sha256")


def proves(
    proof: bytes, secret: bytes, role: bytes, server_nonce: bytes, client_nonce: bytes
) -> bool:
    return hmac.compare_digest(proof, prove(secret, role, server_nonce, client_nonce))


def family_of(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
