"""N hosts on this machine: network namespaces joined by links of a known speed.

    host 0      host 1      host 2          each a namespace "expertmesh.NAME.hostN"
   10.77.0.1   10.77.0.2   10.77.0.3
      e0          e0          e0            tbf: what the host sends
      |           |           |
     p0          p1          p2             tbf: what the host receives
   ============= br0 =============          namespace "expertmesh.NAME.switch", 10.77.0.254

The switch is a namespace too, so the machine's own network sees nothing of it, and every testbed can
use the same addresses. The switch's address is for what no host should own, such as the rendezvous
store: cutting a host off leaves it to the others.

A testbed goes when its owner closes it. If the owner is killed, a small watchdog process removes it;
if that is killed too, the next testbed does, or `expertmesh testbed down`. One with a name, made by
hand, has no owner and stays until it is removed by name.
"""

import itertools
import json
import os
import re
import select
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from simulations import netns
from simulations.netns import Counters

T = TypeVar("T")

INTERFACE = "e0"
BY_HAND = "by-hand"  # what a testbed is named that somebody makes on the command line
MAX_HOSTS = 200
_PREFIX = "expertmesh"
_SWITCH_ADDRESS = "10.77.0.254"
_UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
# A bucket that holds one packet of TCP's largest (64 KiB in 46 segments with their headers): a smaller
# one would make the kernel cut each into 1500 bytes, at 20 times the CPU time. 1 ms at high rates.
_MIN_BURST = 80 << 10
_BURST_S = 1e-3
# A queue long enough that TCP from all hosts to one loses nothing, as in a network made for this.
_MIN_QUEUE = 1 << 20
_QUEUE_S = 0.1
_serial = itertools.count()


class TestbedError(RuntimeError):
    """A testbed cannot be made, or is not there; the message says what to do."""

    __test__ = False  # pytest would take the name for a test


@dataclass(frozen=True, kw_only=True)
class HostState:
    """A host of a testbed that is up, seen from outside. bits_per_s: None without a limit."""

    host: int
    address: str
    bits_per_s: float | None
    counters: Counters
    num_processes: int


class Testbed:
    """Hosts with limited links. Use as a context manager, or call up() and down().

    hosts: how many. rate: of each link, each way, as tc writes it ("200mbit"); None is unlimited.
    name: of a testbed by hand, which has no owner and no watchdog. Raises ValueError for options
    that cannot be; up() raises TestbedError.
    """

    __test__ = False

    def __init__(self, hosts: int, rate: str | None = "200mbit", *, name: str = "") -> None:
        if not 1 <= hosts <= MAX_HOSTS:
            raise ValueError(f"a testbed has 1 to {MAX_HOSTS} hosts, got {hosts}")
        self.hosts = hosts
        self.rate = rate
        self._bits_per_s = None if rate is None else parse_rate(rate)
        self._by_hand = bool(name)
        self.name = _checked_name(name) if name else f"{_process_id(os.getpid())}-{next(_serial)}"
        self._watchdog: subprocess.Popen[bytes] | None = None
        self._started: list[subprocess.Popen[Any]] = []

    @staticmethod
    def available() -> str | None:
        """None when testbeds can be made here, found out by making one; else why not."""
        try:
            with Testbed(1):
                return None
        except TestbedError as error:
            return str(error)

    @property
    def switch(self) -> str:
        """The namespace of the switch."""
        return _namespace(self.name, "switch")

    @property
    def switch_address(self) -> str:
        return _SWITCH_ADDRESS

    def namespace(self, host: int) -> str:
        """The name of a host's namespace, for `ip netns` and for entering it."""
        if not 0 <= host < self.hosts:
            raise ValueError(f"host must be in [0, {self.hosts}), got {host}")
        return host_namespace(self.name, host)

    def address(self, host: int) -> str:
        self.namespace(host)
        return _address(host)

    def up(self) -> None:
        """Make it; what dead owners left is removed first."""
        if reason := netns.missing():
            raise TestbedError(f"cannot make a testbed: {reason}")
        remove_stale()
        if _namespaces(self.name):
            raise TestbedError(
                f"a testbed named {self.name} is up already; "
                f"`expertmesh testbed down --name {self.name}` removes it"
            )
        try:
            if not self._by_hand:
                self._watchdog = _start_watchdog(self.name)
            self._make_switch()
            for host in range(self.hosts):
                self._make_host(host)
        except netns.NamespaceError as error:
            self.down()
            raise TestbedError(
                f"cannot make a testbed: {error} (a container needs --cap-add SYS_ADMIN,NET_ADMIN)"
            ) from error
        except BaseException:
            self.down()
            raise

    def down(self) -> None:
        """Kill what runs inside and remove everything. Fine to call twice."""
        remove(self.name)
        for process in self._started:
            process.wait(5.0)
        self._started.clear()
        if self._watchdog is not None:
            self._watchdog.terminate()
            self._watchdog.wait(5.0)
            self._watchdog = None

    def exec(
        self, host: int, arguments: Sequence[str], *, timeout_s: float = 60.0
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in a host to its end; output as text. Raises subprocess.TimeoutExpired."""
        return subprocess.run(
            command_in(self.namespace(host), arguments),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def popen(self, host: int, arguments: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Start a command in a host; options as of subprocess.Popen. It ends with the testbed."""
        process = subprocess.Popen(command_in(self.namespace(host), arguments), **options)
        self._started.append(process)
        return process

    def call(self, host: int, fn: Callable[[], T]) -> T:
        """fn() in a thread of this process that is inside a host."""
        return netns.call(self.namespace(host), fn)

    def counters(self, host: int) -> Counters:
        """What the kernel counted on a host's link."""
        return self.call(host, lambda: netns.counters(INTERFACE))

    def wire_bytes(self) -> int:
        """Bytes that all hosts have sent on their links so far."""
        return sum(self.counters(host).tx_bytes for host in range(self.hosts))

    def cut(self, host: int) -> None:
        """Take a host's interface down: nothing reaches it, nothing leaves it, nobody is told."""
        netns.ip("link", "set", INTERFACE, "down", inside=self.namespace(host))

    def mend(self, host: int) -> None:
        netns.ip("link", "set", INTERFACE, "up", inside=self.namespace(host))

    def __enter__(self) -> "Testbed":
        self.up()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.down()

    def _make_switch(self) -> None:
        netns.add(self.switch)
        self._switch("link", "add", "br0", "type", "bridge", "mcast_snooping", "0")
        self._switch("link", "set", "br0", "addrgenmode", "none")
        self._switch("addr", "add", f"{_SWITCH_ADDRESS}/24", "dev", "br0")
        self._switch("link", "set", "lo", "up")
        self._switch("link", "set", "br0", "up")

    def _make_host(self, host: int) -> None:
        name, port = self.namespace(host), f"p{host}"
        netns.add(name)
        ends = (INTERFACE, "netns", name, "type", "veth", "peer", "name", port)
        netns.ip("link", "add", *ends, "netns", self.switch)
        self._switch("link", "set", port, "addrgenmode", "none", "master", "br0", "up")
        self._limit(self.switch, port)
        self._limit(name, INTERFACE)
        netns.ip("addr", "add", f"{_address(host)}/24", "dev", INTERFACE, inside=name)
        netns.ip("link", "set", "lo", "up", inside=name)
        # Without an IPv6 address nothing is sent that nobody asked for; the counters stay ours.
        netns.ip("link", "set", INTERFACE, "addrgenmode", "none", "up", inside=name)

    def _switch(self, *arguments: str) -> None:
        netns.ip(*arguments, inside=self.switch)

    def _limit(self, namespace: str, interface: str) -> None:
        if self._bits_per_s is None:
            return
        bytes_per_s = self._bits_per_s / 8
        burst = max(_MIN_BURST, int(bytes_per_s * _BURST_S))
        queue = burst + max(_MIN_QUEUE, int(bytes_per_s * _QUEUE_S))
        tbf = ("tbf", "rate", f"{int(self._bits_per_s)}bit", "burst", f"{burst}", "limit")
        netns.tc("qdisc", "add", "dev", interface, "root", *tbf, f"{queue}", inside=namespace)


def parse_rate(rate: str) -> float:
    """Bits per second of "200mbit", "2.5gbit" ...: tc's own "mbps" would be *bytes*."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(kbit|mbit|gbit)", rate)
    bits_per_s = float(match[1]) * _UNITS[match[2]] if match else 0.0
    if not 1e5 <= bits_per_s <= 1e11:
        raise ValueError(
            f'a rate reads "200mbit" or "10gbit" (kbit, mbit, gbit; 100kbit to 100gbit), '
            f"got {rate!r}"
        )
    return bits_per_s


def existing() -> dict[str, list[str]]:
    """The testbeds of this machine by name, each with its namespaces; hosts in order."""
    found: dict[str, list[str]] = {}
    for namespace in netns.names():
        if match := re.fullmatch(rf"{_PREFIX}\.([\w-]+)\.(?:host\d+|switch)", namespace):
            found.setdefault(match[1], []).append(namespace)
    return {
        name: sorted(members, key=lambda member: (len(member), member))
        for name, members in found.items()
    }


def hosts_of(name: str) -> list[HostState]:
    """What the kernel knows of each host of a testbed, in host order."""
    members = [member for member in _namespaces(name) if not member.endswith(".switch")]
    return [
        HostState(
            host=host,
            address=_address(host),
            bits_per_s=_limit_of(member),
            counters=netns.call(member, lambda: netns.counters(INTERFACE)),
            num_processes=len(netns.pids([member])),
        )
        for host, member in enumerate(members)
    ]


def remove(name: str) -> bool:
    """Remove a testbed by name with all that runs inside; False when there is none."""
    members = _namespaces(name)
    netns.remove(members)
    return bool(members)


def remove_stale() -> list[str]:
    """Remove the testbeds whose owners are dead; returns their names."""
    stale = [name for name in existing() if _owner_died(name)]
    for name in stale:
        remove(name)
    return stale


def host_namespace(name: str, host: int) -> str:
    return _namespace(name, f"host{host}")


def command_in(namespace: str, arguments: Sequence[str]) -> list[str]:
    if not arguments:
        raise ValueError("there is no command to run")
    return ["ip", "netns", "exec", namespace, *arguments]


def _namespace(name: str, member: str) -> str:
    return f"{_PREFIX}.{name}.{member}"


def _limit_of(namespace: str) -> float | None:
    """Bits per second that a host may send."""
    for queue in json.loads(netns.tc("-j", "qdisc", "show", "dev", INTERFACE, inside=namespace)):
        if queue["kind"] == "tbf":
            return 8.0 * float(queue["options"]["rate"])
    return None


def _namespaces(name: str) -> list[str]:
    return existing().get(name, [])


def _address(host: int) -> str:
    return f"10.77.0.{host + 1}"


def _checked_name(name: str) -> str:
    if not re.fullmatch(r"[a-z][a-z0-9-]{0,31}", name):
        raise ValueError(
            f"a testbed's name is up to 32 of a-z, 0-9 and -, and begins with a letter; got {name!r}"
        )
    return name


def _process_id(pid: int) -> str:
    """The pid and when it was started, so that a later process of the same pid is not taken for it."""
    text = Path(f"/proc/{pid}/stat").read_text()
    return f"{pid}-{text.rpartition(')')[2].split()[19]}"


def _owner_died(name: str) -> bool:
    match = re.fullmatch(r"((\d+)-\d+)-\d+", name)
    if match is None:
        return False  # made by hand
    with suppress(OSError):
        return _process_id(int(match[2])) != match[1]
    return True


def _start_watchdog(name: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", __name__, name],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for the owner
    )


def _watch(name: str) -> None:
    """What the watchdog does: wait for the owner's end, and remove the owner's testbed."""
    with suppress(ProcessLookupError):  # gone already
        owner = os.pidfd_open(int(name.partition("-")[0]))
        if not _owner_died(name):
            select.select([owner], [], [])
    remove(name)


if __name__ == "__main__":
    _watch(sys.argv[1])
