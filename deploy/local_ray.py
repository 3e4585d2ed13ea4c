"""A private Ray on this machine, for when the user has none: started, then removed without trace.

Session files, sockets and logs live in one temporary directory that is deleted at the end; the
access token exists only in this process and its children. Where Ray's own services listen is Ray's
choice, also beyond loopback: the token, which it demands of every call, is what keeps strangers out.
"""

import logging
import os
import secrets
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import ray

from deploy.ray_connection import no_ray

TRIES = 2
OBJECT_STORE_BYTES = 80 << 20  # we send small control messages only; Ray's minimum is 75 MiB

logger = logging.getLogger(__name__)


@contextmanager
def local_ray(num_cpus: float, *, show_logs: bool = False) -> Iterator[Path]:
    """Start Ray with `num_cpus` logical CPUs and connect to it; on exit leave nothing behind.

    show_logs: write what the processes log, which would be lost with Ray's files, to our stderr. Yields the
    directory; the logs are below its session_latest/logs. Raises NoRayError.
    """
    # The mode stays unset: Ray then turns token authentication on itself and reads our token.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray would make our processes give way to all others (15), clients and their load among them.
    os.environ.setdefault("RAY_worker_niceness", "0")
    directory = _start(num_cpus, show_logs)
    try:
        yield directory
    finally:
        _remove(directory)


def _start(num_cpus: float, show_logs: bool) -> Path:
    """Ray gives itself 30 s, which a machine that is busy with others may not grant at the first try."""
    for tries_left in reversed(range(TRIES)):
        directory = _new_directory()
        try:
            ray.init(
                address="local",
                num_cpus=round(num_cpus),
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                logging_level=logging.ERROR,
                log_to_driver=show_logs,
                _temp_dir=str(directory),
                _node_ip_address="127.0.0.1",
            )
        except BaseException as error:
            _remove(directory)
            if not isinstance(error, Exception):
                raise
            if not tries_left:
                raise no_ray("Ray does not start on this machine", error, _fix(error)) from error
            logger.warning("Ray did not start (%s); trying once more", error)
        else:
            break
    return directory


def _new_directory() -> Path:
    try:
        return Path(tempfile.mkdtemp(prefix="expertmesh-"))
    except OSError as error:
        fix = "set TMPDIR to a directory with room"
        raise no_ray("Ray does not start on this machine", error, fix) from error


def _fix(error: Exception) -> str:
    if "AF_UNIX" in str(error):  # whose paths the kernel limits
        return "set TMPDIR to a shorter path"
    return (
        f"look for free memory and for room in {tempfile.gettempdir()}, or set RAY_ADDRESS to "
        "HOST:PORT of a Ray that runs"
    )


def _remove(directory: Path) -> None:
    started = _processes_of(directory)
    with suppress(Exception):  # a Ray that never came up has nothing to shut down
        ray.shutdown()
    # Workers that it was starting meanwhile are no children of ours any more, but still bear its name.
    late = [process for process in psutil.process_iter() if _mentions(process, str(directory))]
    _end([*started, *late])
    shutil.rmtree(directory, ignore_errors=True)


def _processes_of(directory: Path) -> list[psutil.Process]:
    """Processes that this Ray started: those below us whose command line names its directory."""
    ours = psutil.Process().children(recursive=True)
    daemons = [p for p in ours if _mentions(p, str(directory))]
    return [*daemons, *(child for p in daemons for child in _children(p))]


def _mentions(process: psutil.Process, text: str) -> bool:
    with suppress(psutil.Error):
        return any(text in argument for argument in process.cmdline())
    return False


def _children(process: psutil.Process) -> list[psutil.Process]:
    with suppress(psutil.Error):
        return process.children(recursive=True)
    return []


def _end(processes: list[psutil.Process]) -> None:
    """Wait for each process to leave, then insist."""
    _, alive = psutil.wait_procs(processes, timeout=5)
    for process in alive:
        with suppress(psutil.Error):
            process.send_signal(signal.SIGKILL)
    psutil.wait_procs(alive, timeout=5)
