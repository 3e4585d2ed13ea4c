"""Hosts of a testbed that also have a home, a /tmp and a name of their own, as machines have.

`ip netns exec` gives each command a mount namespace; what we mount there nobody else sees.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from simulations.testbed import Testbed, command_in
from tests.deploy.processes import ROOT, Command, running

_OWN = (Path.home(), Path("/tmp"))  # folders of which every host has its own
_COMMON = (ROOT, Path(sys.prefix), Path(sys.base_prefix))  # and what it must see all the same


class Hosts:
    """Hosts 0 .. n-1 of `testbed`; files that a host sees as /tmp/NAME are at `tmp(host) / NAME`."""

    def __init__(self, testbed: Testbed, directory: Path) -> None:
        self._testbed = testbed
        self._directory = directory
        for host in range(testbed.hosts):
            for folder in _OWN:
                self._own(host, folder).mkdir(parents=True)
        names = [f"{testbed.address(host)} host{host}" for host in range(testbed.hosts)]
        (directory / "hosts").write_text("\n".join(["127.0.0.1 localhost", *names, ""]))

    def address(self, host: int) -> str:
        return self._testbed.address(host)

    def tmp(self, host: int) -> Path:
        return self._own(host, Path("/tmp"))

    def home(self, host: int) -> Path:
        return self._own(host, Path.home())

    def command(self, host: int, arguments: Sequence[str]) -> list[str]:
        """The arguments that run a command in a host from outside."""
        inside = self._inside(host, ["--uts"], 'exec "$@"', arguments)
        return command_in(self._testbed.namespace(host), inside)

    def boot(self, host: int, arguments: Sequence[str], log: Path) -> None:
        """Run a command that sees no processes but those that it starts, until the testbed is gone.

        `ray stop` ends every Ray that it sees; a shell stays above to bury whom others leave.
        """
        alone = ["--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        inside = self._inside(host, alone, '"$@" & wait $!', arguments)
        with log.open("wb") as output:
            self._testbed.popen(host, inside, stdout=output, stderr=output)

    def _inside(
        self, host: int, own: Sequence[str], last: str, arguments: Sequence[str]
    ) -> list[str]:
        script = "\n".join(["set -e", *self._mounts(host), f"hostname host{host}", last])
        return ["unshare", *own, "sh", "-c", script, "sh", *arguments]

    def _own(self, host: int, folder: Path) -> Path:
        return self._directory / str(host) / folder.name

    def _mounts(self, host: int) -> Iterator[str]:
        yield f"mount --bind {self._directory / 'hosts'} /etc/hosts"
        for folder in _OWN:
            own = self._own(host, folder)
            for common in _COMMON:
                if common.is_relative_to(folder):
                    place = own / common.relative_to(folder)
                    yield f"mkdir -p {place} && mount --bind {common} {place}"
            yield f"mount --rbind {own} {folder}"

    @contextmanager
    def running(self, host: int, arguments: Sequence[str], **environment: str) -> Iterator[Command]:
        with running(self.command(host, arguments), **environment) as command:
            yield command

    def run(
        self, host: int, arguments: Sequence[str], timeout_s: float = 60, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(host, arguments),
            capture_output=True, text=True, timeout=timeout_s, check=False, **options,
        )  # fmt: skip
