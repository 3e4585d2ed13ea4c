"""`expertmesh testbed ...`: hosts with limited links on this machine, made and used by hand.

Exit codes: 0 done; 1 it could not be done here (not root, no iproute2, a name that is taken);
2 options that cannot be. `exec` passes on the exit code of what it ran; its own failures are 125,
and a command that is not there is 127, as with `docker exec`.
"""

import os
import shutil
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from simulations import netns, testbed
from simulations.testbed import Testbed, TestbedError

_EXEC_FAILED = 125
_NOT_FOUND = 127


def up_command(hosts: int, rate: str, name: str) -> int:
    """Make a testbed that stays until `down`."""
    try:
        made = Testbed(hosts, None if rate == "none" else rate, name=name)
        made.up()
    except ValueError as error:
        return _failed(str(error), 2)
    except TestbedError as error:
        return _failed(str(error), 1)
    speed = "links without a limit" if made.rate is None else f"links of {made.rate} each way"
    last = f" .. {made.address(hosts - 1)}" if hosts > 1 else ""
    print(f"{name}: {hosts} hosts, {made.address(0)}{last}, {speed}")
    option = "" if name == testbed.BY_HAND else f"--name {name} "
    print(f"  expertmesh testbed exec {option}0 -- COMMAND   runs a command in host 0")
    print(f"  expertmesh testbed down {option}".rstrip())
    return 0


def exec_command(host: int, command: Sequence[str], name: str) -> int:
    """Become the command, inside a host."""
    namespace = testbed.host_namespace(name, host)
    if namespace not in netns.names():
        return _failed(
            f"testbed {name} has no host {host}; `expertmesh testbed status` shows what is up",
            _EXEC_FAILED,
        )
    if shutil.which(command[0]) is None:
        return _failed(f"{command[0]}: command not found", _NOT_FOUND)
    if os.geteuid() != 0:
        return _failed("entering a host needs root: run as root, or with sudo", _EXEC_FAILED)
    arguments = testbed.command_in(namespace, command)
    return os.execvp(arguments[0], arguments)


def status_command() -> int:
    """All testbeds of this machine, by hand or not."""
    found = testbed.existing()
    if not found:
        print("no testbed is up")
        return 0
    if os.geteuid() != 0:
        return _failed("looking into hosts needs root: run as root, or with sudo", 1)
    table = Table("testbed", "host", "address", "rate", "sent", "received", "processes")
    for name in found:
        for row in testbed.hosts_of(name):
            table.add_row(
                name,
                str(row.host),
                row.address,
                "none" if row.bits_per_s is None else f"{row.bits_per_s / 1e6:g} Mbit/s",
                f"{row.counters.tx_bytes:,}",
                f"{row.counters.rx_bytes:,}",
                str(row.num_processes),
            )
    Console().print(table)
    return 0


def down_command(name: str) -> int:
    """Remove a testbed and what dead owners left."""
    if os.geteuid() != 0:
        return _failed("removing a testbed needs root: run as root, or with sudo", 1)
    try:
        removed = ([name] if testbed.remove(name) else []) + testbed.remove_stale()
    except netns.NamespaceError as error:
        return _failed(str(error), 1)
    print(f"removed {', '.join(removed)}" if removed else f"there was no testbed named {name}")
    return 0


def _failed(message: str, code: int) -> int:
    print(message, file=sys.stderr)
    return code
