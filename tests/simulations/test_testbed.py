"""Hosts as network namespaces: what they see, what the kernel counts, and that nothing is left.

What is asserted comes from the kernel: `ip`, /run/netns, /proc and plain sockets.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import psutil
import pytest

from simulations import testbed as testbeds
from simulations.testbed import Testbed, TestbedError
from tests.simulations.sockets import connect, connected, listening, receive, seconds_to_send

IMPOSSIBLE = Testbed.available()
needs_hosts = pytest.mark.skipif(IMPOSSIBLE is not None, reason=IMPOSSIBLE or "")
RATE, BITS_PER_S = "40mbit", 40e6
OWNER = """
import sys, time
from simulations.testbed import Testbed
testbed = Testbed(2)
testbed.up()
print(testbed.name, testbed.popen(0, ["sleep", "600"]).pid, flush=True)
time.sleep(600)
"""


@pytest.fixture(scope="module")
def testbed() -> Iterator[Testbed]:
    with Testbed(3, RATE) as made:
        yield made


def root_network() -> str:
    """Interfaces, addresses, routes and bridges outside of all namespaces, without counters."""
    tables = (["link"], ["addr"], ["route"])
    return "".join(subprocess.check_output(["ip", *table], text=True) for table in tables)


def left_of(name: str) -> list[str]:
    folder = "/run/netns"
    return [entry for entry in os.listdir(folder) if name in entry]


def runs(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def eventually(condition: Callable[[], bool], timeout_s: float = 20.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@contextlib.contextmanager
def owner() -> Iterator[tuple[subprocess.Popen[str], str, int]]:
    """A process that owns a testbed of two hosts: it, the testbed's name, a process in host 0."""
    process = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process, contextlib.ExitStack() as stack:
        stack.callback(process.kill)
        name, pid = process.stdout.readline().split()
        stack.callback(testbeds.remove, name)
        yield process, name, int(pid)


@needs_hosts
def test_a_host_has_its_own_network(testbed: Testbed) -> None:
    for host in range(testbed.hosts):
        seen = testbed.exec(host, ["ip", "-br", "-4", "addr"]).stdout
        addresses = {line.split()[2] for line in seen.splitlines()}
        assert addresses == {"127.0.0.1/8", f"{testbed.address(host)}/24"}


@needs_hosts
def test_the_machine_keeps_its_network() -> None:
    before = root_network()
    with Testbed(2):
        assert root_network() == before
    assert root_network() == before


@needs_hosts
def test_exec_passes_on_output_and_exit_code(testbed: Testbed) -> None:
    done = testbed.exec(1, ["sh", "-c", "echo out; echo err >&2; exit 7"])
    assert (done.returncode, done.stdout, done.stderr) == (7, "out\n", "err\n")


@needs_hosts
def test_counters_count_what_was_sent(testbed: Testbed) -> None:
    num_bytes = 1_000_000
    with connected(testbed, 0, 1) as (ours, theirs):
        before = [testbed.counters(host) for host in range(3)]
        total_before = testbed.wire_bytes()
        seconds_to_send([(ours, theirs)], num_bytes)
        sent, received, idle = (testbed.counters(host) - before[host] for host in range(3))
        total = testbed.wire_bytes() - total_before
    # 66 bytes of headers for at least every 1448 of payload, and as much again for acknowledgements.
    assert num_bytes <= sent.tx_bytes <= 1.10 * num_bytes
    assert num_bytes <= received.rx_bytes <= 1.10 * num_bytes
    assert 0 < sent.rx_bytes == received.tx_bytes <= 0.10 * num_bytes
    assert 0 < received.rx_packets == sent.tx_packets <= num_bytes // 1000
    assert idle.tx_bytes <= 1000
    assert idle.rx_bytes <= 1000
    assert total == sent.tx_bytes + received.tx_bytes + idle.tx_bytes


@needs_hosts
def test_what_stays_in_a_host_is_not_on_its_link(testbed: Testbed) -> None:
    with connected(testbed, 2, 2) as pair:
        before = testbed.counters(2)
        seconds_to_send([pair], 1_000_000)
        assert (testbed.counters(2) - before).tx_bytes <= 1000


@needs_hosts
def test_a_host_sends_no_faster_than_its_link(testbed: Testbed) -> None:
    num_bytes = 1_500_000  # to two receivers: only the sender's link is full
    with connected(testbed, 0, 1) as first, connected(testbed, 0, 2) as second:
        seconds = seconds_to_send([first, second], num_bytes)
    assert seconds >= 0.8 * 2 * num_bytes * 8 / BITS_PER_S


@needs_hosts
def test_a_host_receives_no_faster_than_its_link(testbed: Testbed) -> None:
    num_bytes = 1_500_000  # from two senders: only the receiver's link is full
    with listening(testbed, 1) as server, contextlib.ExitStack() as stack:
        pairs = []
        for source in (0, 2):
            ours = stack.enter_context(connect(testbed, source, 1))
            pairs.append((ours, stack.enter_context(server.accept()[0])))
        seconds = seconds_to_send(pairs, num_bytes)
    assert seconds >= 0.8 * 2 * num_bytes * 8 / BITS_PER_S


@needs_hosts
def test_cut_separates_one_host_and_mend_brings_it_back(testbed: Testbed) -> None:
    with connected(testbed, 0, 1) as (ours, theirs), listening(testbed, 2):
        testbed.cut(1)
        try:
            ours.sendall(b"x")  # taken by the kernel, which cannot deliver it
            theirs.settimeout(0.5)
            with pytest.raises(TimeoutError):
                theirs.recv(1)
            with pytest.raises(OSError, match=r"timed out|unreachable|No route"):
                connect(testbed, 0, 1, timeout_s=0.5)
            connect(testbed, 0, 2).close()
        finally:
            testbed.mend(1)
        theirs.settimeout(20)
        assert theirs.recv(1) == b"x"  # the connection has outlived the cut


@needs_hosts
def test_down_removes_everything() -> None:
    made = Testbed(2)
    made.up()
    process = made.popen(1, ["sleep", "600"])
    children = psutil.Process().children()
    assert len(left_of(made.name)) == 3
    made.down()
    assert left_of(made.name) == []
    assert process.returncode == -signal.SIGKILL
    assert not any(runs(child.pid) for child in children if made.name in " ".join(_argv(child)))
    made.down()  # nothing to do
    assert left_of(made.name) == []


def _argv(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.Error):
        return process.cmdline()
    return []


@needs_hosts
def test_an_error_inside_removes_everything() -> None:
    made = Testbed(2)

    def fail() -> None:
        with made:
            assert left_of(made.name)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert left_of(made.name) == []


@needs_hosts
def test_a_killed_owner_leaves_nothing() -> None:
    with owner() as (process, name, inside):
        assert runs(inside)
        process.kill()
        assert eventually(lambda: not left_of(name)), left_of(name)
        assert eventually(lambda: not runs(inside))


@needs_hosts
def test_the_next_testbed_removes_what_a_crash_left() -> None:
    with owner() as (process, name, inside):
        for child in psutil.Process(process.pid).children():
            if child.pid != inside:
                child.kill()  # the watchdog
        process.kill()
        process.wait()
        assert left_of(name)
        with Testbed(2) as made:
            assert left_of(name) == []
            assert not runs(inside)
            assert made.exec(0, ["true"]).returncode == 0


@needs_hosts
def test_a_living_owner_keeps_its_testbed() -> None:
    with owner() as (_, name, inside), Testbed(1):
        assert len(left_of(name)) == 3
        assert runs(inside)


@needs_hosts
def test_two_at_once_do_not_meet(testbed: Testbed) -> None:
    with Testbed(2) as other, connected(other, 0, 1) as (ours, theirs):
        before = testbed.wire_bytes(), other.wire_bytes()
        thread = threading.Thread(target=ours.sendall, args=(bytes(200_000),))
        thread.start()
        receive(theirs, 200_000)
        thread.join()
        assert other.wire_bytes() - before[1] >= 200_000
        assert testbed.wire_bytes() - before[0] <= 1000
        with pytest.raises(OSError, match=r"timed out|refused"):  # same address, nobody listens
            connect(testbed, 0, 1, timeout_s=0.5)


@needs_hosts
def test_without_a_rate_links_have_no_limit() -> None:
    with Testbed(2, rate=None) as made:
        queues = made.exec(0, ["tc", "qdisc", "show", "dev", "e0"]).stdout
        assert "tbf" not in queues
        with connected(made, 0, 1) as pair:
            seconds_to_send([pair], 100_000)


@pytest.mark.parametrize(
    ("hosts", "rate", "says"),
    [
        (0, RATE, "1 to 200 hosts, got 0"),
        (201, RATE, "1 to 200 hosts, got 201"),
        (2, "200", "'200'"),
        (2, "fast", "'fast'"),
        (2, "-1mbit", "'-1mbit'"),
        (2, "200mbps", "'200mbps'"),  # tc would take it for megabytes
        (2, "1kbit", "100kbit to 100gbit"),
        (2, "1000gbit", "100kbit to 100gbit"),
    ],
)
def test_options_that_cannot_be(hosts: int, rate: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Testbed(hosts, rate)


@pytest.mark.parametrize("name", ["1st", "Hand", "a.b", "a b", "x" * 33])
def test_names_that_cannot_be(name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        Testbed(2, name=name)


def test_hosts_that_are_not_there() -> None:
    made = Testbed(2)
    for host in (-1, 2):
        with pytest.raises(ValueError, match=rf"\[0, 2\), got {host}"):
            made.address(host)


def test_rates_as_tc_writes_them() -> None:
    assert testbeds.parse_rate("200mbit") == 200e6
    assert testbeds.parse_rate("2.5gbit") == 2.5e9
    assert testbeds.parse_rate("500kbit") == 5e5


@needs_hosts
def test_a_name_is_taken_once() -> None:
    name = f"test-{os.getpid()}"
    made = Testbed(1, name=name)
    made.up()
    try:
        with pytest.raises(TestbedError, match=f"{name} is up already"):
            Testbed(1, name=name).up()
        assert made.exec(0, ["true"]).returncode == 0  # it is as it was
        assert name not in testbeds.remove_stale()  # without an owner, none is dead
        assert left_of(name)
    finally:
        made.down()
    assert left_of(name) == []


def test_who_is_not_root_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "root" in (Testbed.available() or "")
    with pytest.raises(TestbedError, match="root"):
        Testbed(2).up()


def test_who_has_no_iproute2_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("PATH", "/nonexistent")
    assert "install iproute2" in (Testbed.available() or "")


@needs_hosts
def test_calls_run_inside_and_the_caller_stays_outside(testbed: Testbed) -> None:
    def addresses() -> set[str]:
        return {name for _, name in socket.if_nameindex()}

    outside = addresses()
    assert testbed.call(0, addresses) == {"lo", "e0"}
    assert addresses() == outside
