"""Start our commands as a user would, and see what they leave behind."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

EXPERTMESH = str(Path(sys.executable).with_name("expertmesh"))
ROOT = Path(__file__).resolve().parents[2]
# Every process that one of our commands starts inherits it, whoever its parent is by then.
MARK = {"EXPERTMESH_TEST_RUN": str(os.getpid())}


class Command:
    """A running command whose output is collected line by line."""

    def __init__(self, arguments: Sequence[str], **environment: str) -> None:
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            arguments,
            cwd=ROOT,
            env={**os.environ, **MARK, "PYTHONUNBUFFERED": "1", "COLUMNS": "80", **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._collect, daemon=True)
        self._reader.start()

    def _collect(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(line.rstrip("\n") for line in self.process.stdout)

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    def wait_for(self, pattern: str, timeout_s: float) -> re.Match[str]:
        """The first match of `pattern` in the output; fails when the command ends without it."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if match := re.search(pattern, self.output):
                return match
            if self.process.poll() is not None and not self._reader.is_alive():
                break
            time.sleep(0.05)
        raise AssertionError(f"{pattern!r} did not appear within {timeout_s} s in:\n{self.output}")

    def wait(self, timeout_s: float) -> int:
        """The exit code."""
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout_s} s:\n{self.output}") from None
        self._reader.join(5)
        return code

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def close(self) -> None:
        """End the command and everything it started; for the `finally` of a test."""
        with contextlib.suppress(psutil.Error):
            family = psutil.Process(self.process.pid).children(recursive=True)
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(30)
            for process in [*family, self.process]:
                with contextlib.suppress(psutil.Error, OSError):
                    process.kill()
        self.process.wait(5)
        self._reader.join(5)
        assert self.process.stdout is not None
        self.process.stdout.close()


@contextlib.contextmanager
def running(arguments: Sequence[str], **environment: str) -> Iterator[Command]:
    command = Command(arguments, **environment)
    try:
        yield command
    finally:
        command.close()


@dataclass(frozen=True)
class Traces:
    """What a command could leave on this machine."""

    processes: frozenset[int]
    shared_memory: frozenset[str]
    temporary_files: frozenset[str]

    @staticmethod
    def now() -> "Traces":
        return Traces(
            processes=frozenset(_marked()),
            shared_memory=frozenset(os.listdir("/dev/shm")),
            temporary_files=frozenset(
                name
                for name in os.listdir(tempfile.gettempdir())
                if name.startswith(("expertmesh", "ray"))
            ),
        )

    def left_since(self, before: "Traces") -> dict[str, list[str]]:
        """What is here now and was not before; empty when nothing was left behind.

        Without what others use who run on this machine at the same time, another test session say.
        """
        left = {
            "processes": sorted(map(_describe, self.processes - before.processes)),
            "shared_memory": _unused(self.shared_memory - before.shared_memory),
            "temporary_files": _unused(self.temporary_files - before.temporary_files),
        }
        return {kind: names for kind, names in left.items() if names}


def _marked() -> Iterator[int]:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if MARK.items() <= process.environ().items():
                yield process.pid


def _unused(names: frozenset[str]) -> list[str]:
    """Those that are still there, and that no process but ours has open, mapped or on its command line."""
    if not names:
        return []
    used: set[str] = set()
    ours = set(_marked())
    for process in psutil.process_iter():
        if process.pid in ours:
            continue
        with contextlib.suppress(psutil.Error, OSError):
            home = Path(f"/proc/{process.pid}")
            text = (home / "cmdline").read_text() + (home / "maps").read_text()
            text += "".join(os.readlink(file) for file in (home / "fd").iterdir())
            used |= {name for name in names if name in text}
    folders = (Path("/dev/shm"), Path(tempfile.gettempdir()))
    there = {name for name in names for folder in folders if (folder / name).exists()}
    return sorted(there - used)


def _describe(pid: int) -> str:
    with contextlib.suppress(psutil.Error):
        return f"{pid}: {' '.join(psutil.Process(pid).cmdline())[:200]}"
    return f"{pid}: ended meanwhile"


def workers_below(pid: int) -> list[psutil.Process]:
    """The rank processes among the descendants of a command."""
    family = psutil.Process(pid).children(recursive=True)
    return [
        process for process in family if "Worker" in process.name() + "".join(process.cmdline())
    ]
