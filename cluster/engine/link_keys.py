"""Encryption between gateway and leaders: members of a cluster share one key pair, nobody else has it.

ZeroMQ's CURVE (http://curvezmq.org). A client's first message is sealed for the server's public key, which
is never sent in the clear. Here members alone know that key, so whoever lacks it cannot even begin: what
strangers send to these sockets never reaches us.
"""

from dataclasses import dataclass, field
from typing import Any

import zmq


@dataclass(frozen=True)
class LinkKeys:
    """Made once per cluster and given to its members; both halves are secret."""

    public: bytes = field(repr=False)
    secret: bytes = field(repr=False)

    @staticmethod
    def make() -> "LinkKeys":
        return LinkKeys(*zmq.curve_keypair())

    def guard_bound(self, socket: "zmq.Socket[Any]") -> None:
        """Before it binds: let in members only."""
        socket.curve_secretkey = self.secret
        socket.curve_publickey = self.public
        socket.curve_server = True

    def guard_connected(self, socket: "zmq.Socket[Any]") -> None:
        """Before it connects: speak to members only."""
        socket.curve_secretkey = self.secret
        socket.curve_publickey = self.public
        socket.curve_serverkey = self.public
