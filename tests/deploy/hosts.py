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

from simulations.testbed import Testbed
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

    def address(self, host: int) -> str:
        return self._testbed.address(host)

    def tmp(self, host: int) -> Path:
        return self._own(host, Path("/tmp"))

    def home(self, host: int) -> Path:
        return self._own(host, Path.home())

    def command(self, host: int, arguments: Sequence[str]) -> list[str]:
        """The arguments that run a command in a host from outside."""
        script = "\n".join(["set -e", *self._mounts(host), f"hostname host{host}", 'exec "$@"'])
        return [
            "ip", "netns", "exec", self._testbed.namespace(host),
            "unshare", "--uts", "sh", "-c", script, "sh", *arguments,
        ]  # fmt: skip

    def _own(self, host: int, folder: Path) -> Path:
        return self._directory / str(host) / folder.name

    def _mounts(self, host: int) -> Iterator[str]:
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
