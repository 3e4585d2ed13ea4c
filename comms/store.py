"""The rendezvous: a key-value store that one process hosts and every rank connects to.

The host binds port 0 and keeps the store open for as long as the cluster lives, so there is no
moment at which another process can take the port.
"""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from torch.distributed import (  # type: ignore[attr-defined]  # public, but not listed in __all__
    PrefixStore,
    Store,
    TCPStore,
)

__all__ = ["PrefixStore", "Store", "TCPStore", "connect_store", "host_store", "patience"]

_BACKLOG = 1024  # every rank of a cluster may connect at once


def host_store(host: str = "127.0.0.1", timeout_s: float = 60.0) -> tuple[TCPStore, str]:
    """Open a store on a free port of `host`; returns it and its "host:port"."""
    # Left to itself the store listens on every interface; the socket that we bind is on this one.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, 0), family=family, backlog=_BACKLOG)
    port = listener.getsockname()[1]
    store = TCPStore(
        host,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_s),
        master_listen_fd=listener.detach(),
    )
    return store, f"{host}:{port}"


def connect_store(address: str, timeout_s: float = 60.0) -> TCPStore:
    """Connect to the store at "host:port". Raises ValueError or torch's DistStoreError."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f'a store address reads "host:port", got {address!r}')
    return TCPStore(
        host.strip("[]"),
        int(port),
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_s),
    )


@contextmanager
def patience(store: Store, timeout_s: float) -> Iterator[None]:
    """Inside the block, whoever waits on the store without a deadline of its own waits so long."""
    before = store.timeout  # type: ignore[attr-defined,unused-ignore]
    store.set_timeout(timedelta(seconds=timeout_s))
    try:
        yield
    finally:
        store.set_timeout(before)
