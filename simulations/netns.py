"""Network namespaces of this machine: make them, enter them, see who is inside, count, remove them.

A namespace is a host as far as the network goes: its own interfaces, addresses, routes and ports.
Files, processes and memory stay common. Everything here needs root and iproute2.
"""

import ctypes
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

FOLDER = Path("/run/netns")  # where iproute2 keeps the names
_CLONE_NEWNET = 0x40000000
_COMMAND_TIMEOUT_S = 30.0
_KILL_TIMEOUT_S = 10.0


class NamespaceError(RuntimeError):
    """The kernel or iproute2 refused; the message holds the command and what it said."""


@dataclass(frozen=True, kw_only=True)
class Counters:
    """What the kernel counted on one interface since it was made. Bytes include Ethernet headers.

    A packet is what crosses the interface at once: TCP hands over up to 64 KiB with one header.
    """

    rx_bytes: int
    rx_packets: int
    tx_bytes: int
    tx_packets: int

    def __sub__(self, earlier: "Counters") -> "Counters":
        return Counters(
            rx_bytes=self.rx_bytes - earlier.rx_bytes,
            rx_packets=self.rx_packets - earlier.rx_packets,
            tx_bytes=self.tx_bytes - earlier.tx_bytes,
            tx_packets=self.tx_packets - earlier.tx_packets,
        )


def missing() -> str | None:
    """What namespaces need that is not here; None when nothing is missing."""
    if os.geteuid() != 0:
        return "network namespaces need root: run as root, or with sudo"
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"`{tool}` is missing: install iproute2 (apt-get install iproute2)"
    return None


def names() -> list[str]:
    """All named namespaces of this machine."""
    return sorted(os.listdir(FOLDER)) if FOLDER.is_dir() else []


def add(name: str) -> None:
    ip("netns", "add", name)


def remove(namespaces: Sequence[str]) -> None:
    """Kill whoever is inside, but for this process, and delete the names. Absent ones are fine."""
    deadline = time.monotonic() + _KILL_TIMEOUT_S
    while (inside := pids(namespaces) - {os.getpid()}) and time.monotonic() < deadline:
        for pid in inside:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    for name in namespaces:
        if (FOLDER / name).exists():
            with suppress(NamespaceError):  # somebody else was faster
                ip("netns", "del", name)
    if left := set(namespaces) & set(names()):
        raise NamespaceError(f"could not remove the namespaces {sorted(left)}")


def pids(namespaces: Sequence[str]) -> set[int]:
    """Processes inside any of the namespaces."""
    identities = set()
    for name in namespaces:
        with suppress(OSError):
            identities.add(_identity(FOLDER / name))
    found = set()
    for process in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):  # ended meanwhile
            if _identity(Path("/proc", process, "ns/net")) in identities:
                found.add(int(process))
    return found


def enter(name: str) -> None:
    """Move the calling thread into a namespace, for good: the sockets it opens are there."""
    # os.setns exists only from Python 3.12.
    libc = ctypes.CDLL(None, use_errno=True)
    fd = os.open(FOLDER / name, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc.setns(fd, _CLONE_NEWNET) != 0:
            number = ctypes.get_errno()
            raise NamespaceError(f"cannot enter the namespace {name}: {os.strerror(number)}")
    finally:
        os.close(fd)


def call(name: str, fn: Callable[[], T]) -> T:
    """fn() in a thread inside a namespace. Sockets that fn opens stay there wherever they go."""

    def inside() -> T:
        enter(name)
        return fn()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(inside).result()


def counters(interface: str) -> Counters:
    """The counters of an interface in the namespace of the calling thread."""
    for line in Path("/proc/thread-self/net/dev").read_text().splitlines()[2:]:
        name, _, numbers = line.partition(":")
        if name.strip() == interface:
            fields = [int(number) for number in numbers.split()]
            return Counters(
                rx_bytes=fields[0], rx_packets=fields[1], tx_bytes=fields[8], tx_packets=fields[9]
            )
    raise NamespaceError(f"there is no interface {interface} here")


def ip(*arguments: str, inside: str | None = None) -> str:
    return _run(["ip", *(("-n", inside) if inside else ()), *arguments])


def tc(*arguments: str, inside: str) -> str:
    return _run(["tc", "-n", inside, *arguments])


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=_COMMAND_TIMEOUT_S, check=False
    )
    if done.returncode:
        raise NamespaceError(f"`{' '.join(command)}` failed: {done.stderr.strip()}")
    return done.stdout


def _identity(path: Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino
